package main

import (
	"context"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
)

// app is what all commands share: where output goes, and the options that stand before or after any command.
type app struct {
	out, err io.Writer
	getenv   func(string) string
	terminal bool // out is one: colours
	live     bool // err is one: progress bars that move
	now      func() time.Time

	config  string // the configuration's file, if one was named
	lenient bool   // a wrong configuration is reported and left out: for what guests' I/O depends on

	runDir            string
	server            string
	tokenFile, caFile string
	output            string
	noWait            bool
	wait              bool // the default, said aloud
	timeout           time.Duration
}

func newApp(out, err io.Writer, getenv func(string) string) *app {
	return &app{out: out, err: err, getenv: getenv, terminal: isTerminal(out) && getenv("NO_COLOR") == "", live: isTerminal(err), now: time.Now}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// env is an environment variable, or what holds without it.
func (a *app) env(name, otherwise string) string {
	if v := a.getenv(name); v != "" {
		return v
	}
	return otherwise
}

// root makes the tree of commands.
func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "ashlar",
		Short: "Keep the disks of virtual machines",
		Long: `Ashlar keeps the disks of virtual machines: golden images become thin copy-on-write
volumes that guests use over NBD, with snapshots that cost next to nothing.

  ashlar serve &                                       a node on this machine
  ashlar image import debian https://…/debian.qcow2    a golden image
  ashlar volume create db1 --image debian --size 20Gi  a disk made of it, in milliseconds
  ashlar volume attach db1                             prints what to give to QEMU or libvirt
  ashlar snapshot create db1 before-upgrade

Several machines: ashlar cluster init on the first, ashlar node join on the others; then any node answers for all.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 in conflict or in use, 5 no answer,
6 refused input, 7 problems found by a check, 8 not built yet, 9 this node was removed (serve), 130 interrupted.`,
		Version:           version,
		SilenceErrors:     true,
		SilenceUsage:      true,
		Args:              cobra.NoArgs,
		RunE:              func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return a.configure(cmd) },
	}
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usageError{cmd, err} })
	root.CompletionOptions.HiddenDefaultCmd = true
	flags := root.PersistentFlags()
	flags.StringVar(&a.config, "config", "", "file of the configuration; default: "+defaultConfig+", if it exists (ASHLAR_CONFIG)")
	flags.StringVar(&a.runDir, "run-dir", optionOf("run-dir").value, "directory of the node's sockets (ASHLAR_RUN_DIR)")
	flags.StringVar(&a.server, "server", "", "node to speak to: unix:///PATH, http://HOST:PORT or https://HOST:PORT; default: the socket in the run directory, else http://"+client.DefaultListen+" (ASHLAR_SERVER)")
	flags.StringVar(&a.tokenFile, "token-file", "", "file with the token to show to a node beyond loopback (ASHLAR_TOKEN_FILE)")
	flags.StringVar(&a.caFile, "ca-file", "", "file with the authority that signed the node's certificate; default: the system's (ASHLAR_CA_FILE)")
	flags.StringVarP(&a.output, "output", "o", a.env("ASHLAR_OUTPUT", "table"), "how to print: table or json (ASHLAR_OUTPUT)")
	root.AddCommand(a.serveCommands()...)
	root.AddCommand(a.statusCommand(), a.nodeCommand(), a.diskCommand(), a.imageCommand(), a.volumeCommand(), a.snapshotCommand(), a.settingCommand(), a.tokenCommand(), a.eventsCommand(), a.dumpCommand(), a.checkCommand(), a.recoverCommand(),
		a.shutdownCommand(), a.versionCommand(), a.configCommand(), a.doctorCommand(),
		a.supportCommand(), a.clusterCommand(), a.manualCommand(), a.upgradeCommand(), a.devCommand())
	checkArgs(root)
	return root
}

// checkArgs makes a wrong number of arguments a usage error for every command.
func checkArgs(cmd *cobra.Command) {
	if args := cmd.Args; args != nil {
		cmd.Args = func(cmd *cobra.Command, list []string) error {
			if err := args(cmd, list); err != nil {
				return usageError{cmd, err}
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		checkArgs(sub)
	}
}

// group is a command that only has subcommands.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(subs...)
	return cmd
}

// waits gives a command that starts something the flags about waiting for its end.
func (a *app) waits(cmd *cobra.Command, timeout time.Duration) *cobra.Command {
	cmd.Flags().BoolVar(&a.wait, "wait", true, "wait until it is done")
	cmd.Flags().BoolVar(&a.noWait, "no-wait", false, "return as soon as it is recorded")
	cmd.Flags().DurationVar(&a.timeout, "timeout", timeout, "wait at most this long; what was begun goes on; 0: for ever")
	return cmd
}

// waiting tells whether the person wants to wait.
func (a *app) waiting() bool { return a.wait && !a.noWait }

// bounded bounds a wait by --timeout.
func (a *app) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if a.timeout <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, a.timeout)
}

// node returns a client of the node to speak to.
func (a *app) node() (*client.Client, error) {
	if a.output != "table" && a.output != "json" {
		return nil, api.Failure(api.CodeInvalid, "output %q: print as table or json", a.output)
	}
	address := a.server
	if address == "" {
		address = client.Address(a.runDir)
	}
	return client.Open(address, client.Options{TokenFile: a.tokenFile, Token: a.getenv("ASHLAR_TOKEN"), CAFile: a.caFile})
}

// withNode runs f with a client and closes it.
func (a *app) withNode(f func(*client.Client) error) error {
	c, err := a.node()
	if err != nil {
		return err
	}
	defer c.Close()
	return f(c)
}
