package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"ashlar/internal/api/client"
	"ashlar/internal/node"
)

// serveCommands are the processes of a node; all but serve are started by others and hidden.
func (a *app) serveCommands() []*cobra.Command {
	return []*cobra.Command{a.serveCommand(), a.dataCommand(), a.holdCommand(), a.workCommand(), a.blockdevCommand()}
}

func (a *app) serveCommand() *cobra.Command {
	cfg := node.Config{Version: version}
	var level, format string
	var external func()
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run a node",
		Long: `Run a node: catalogue, control, agent and REST API. It starts the data process, which has the files and the guests' I/O open, and which goes on when this
process stops, crashes or is upgraded. "ashlar shutdown" ends both. Every flag can stand in the configuration file and in the environment: see "ashlar config example".`,
		Example: "  ashlar serve\n  ashlar serve --data-dir /srv/ashlar --run-dir /run/ashlar --listen 127.0.0.1:9500 --name kvm1",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.RunDir, cfg.Systemd = a.runDir, a.systemd()
			if cfg.Listen == "none" {
				cfg.Listen = ""
			}
			external()
			cfg.Log = logger(a.err, level, format)
			return a.profiled(cmd.Context(), "serve", func() error { return serve(cmd.Context(), cfg) })
		},
	}
	for flag, into := range map[string]*string{"data-dir": &cfg.DataDir, "listen": &cfg.Listen, "name": &cfg.Name, "log-level": &level, "log-format": &format,
		"tls-certificate": &cfg.TLSCertificate, "tls-key": &cfg.TLSKey, "nbd-listen": &cfg.NBD.Address, "nbd-certificate": &cfg.NBD.CertFile, "nbd-key": &cfg.NBD.KeyFile,
		"nbd-client-ca": &cfg.NBD.ClientCA} {
		optionOf(flag).define(cmd, into)
	}
	o := optionOf("require-token")
	cmd.Flags().BoolVar(&cfg.RequireToken, o.flag, false, o.usage())
	external = etcdFlags(cmd, &cfg)
	return cmd
}

// etcdFlags has a command find an etcd that is not the nodes' own, as the configuration names it; set puts it into cfg once flags are read. Whoever opens the catalogue beside serve needs
// them: without, it would make one of the node's own, which nobody reads.
func etcdFlags(cmd *cobra.Command, cfg *node.Config) (set func()) {
	var etcd string
	for flag, into := range map[string]*string{"etcd": &etcd, "etcd-ca": &cfg.EtcdFiles.CA, "etcd-certificate": &cfg.EtcdFiles.Cert, "etcd-key": &cfg.EtcdFiles.Key} {
		optionOf(flag).define(cmd, into)
	}
	return func() {
		if etcd != "" {
			cfg.Etcd = strings.Split(etcd, ",")
		}
	}
}

// systemd tells whether this process is one of the package's units, whose others systemd starts.
func (a *app) systemd() bool { return a.getenv("ASHLAR_SYSTEMD") == "1" }

// logger writes what is at least as important as level, a line each.
func logger(w io.Writer, level, format string) *slog.Logger {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil { // checked before
		l = slog.LevelInfo
	}
	o := &slog.HandlerOptions{Level: l}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

// hostname is this machine's first name, or "node" if it has none.
func hostname() string {
	name, err := os.Hostname()
	short, _, _ := strings.Cut(strings.ToLower(name), ".")
	if err != nil || short == "" {
		return "node"
	}
	return short
}

// serve runs a node until it is told to stop. A node that becomes another (in a cluster, say) is built anew here; guests do not notice.
func serve(ctx context.Context, cfg node.Config) error {
	for again := false; ; again = true {
		n, err := node.Start(ctx, cfg)
		if err != nil {
			return err
		}
		// Told to systemd, if it is who started us; an error means only that nobody listens.
		_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
		cfg.Log.Info("node is up", "node", cfg.Name, "version", cfg.Version, "socket", client.Socket(cfg.RunDir), "listen", cfg.Listen, "again", again)
		err = n.Wait(ctx)
		ended := closeNode(n, cfg.Log)
		if !errors.Is(err, node.ErrRestart) || ctx.Err() != nil {
			return errors.Join(err, ended)
		}
		cfg.Log.Info("the node is built anew", "why", err)
		if ended != nil {
			cfg.Log.Warn("not everything ended in order", "error", ended)
		}
	}
}

// closeLimit is how long a node may take to end; mostly it takes about a second.
const closeLimit = 20 * time.Second

// closeNode ends a node. One that hangs is no reason to stay: nothing is lost when this process ends in the middle of anything, but whoever stops or upgrades it waits. Where it hung stands in
// the log.
func closeNode(n *node.Node, log *slog.Logger) error {
	stuck := time.AfterFunc(closeLimit, func() {
		stacks := make([]byte, 4<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		log.Error("the node does not end; the process ends all the same, which loses nothing; please report this with what follows", "after", closeLimit, "goroutines", string(stacks))
		os.Exit(exitFailed)
	})
	defer stuck.Stop()
	return n.Close()
}
