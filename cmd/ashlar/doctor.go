package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ashlar/internal/api"
	dataclient "ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
)

// finding is one line of `ashlar doctor`.
type finding struct {
	Level string `json:"level"` // ok, note, problem
	What  string `json:"what"`
	Do    string `json:"do,omitempty"`
}

const (
	levelOK      = "ok"
	levelNote    = "note"
	levelProblem = "problem"
)

// doctorTimeout bounds each question to a process of the node.
const doctorTimeout = 5 * time.Second

// doctorCommand looks at everything a node needs. It asks the processes themselves, so that it also works when some of them are down.
func (a *app) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "Say what is wrong on this machine, and what to do about it",
		Long: `Doctor looks at the configuration, the machine, the node's processes and what they report, and says what to do about each problem. It changes nothing, and works
whether or not the node runs. It exits with 7 if it found problems; notes are not problems.`,
		Example: "  ashlar doctor\n  ashlar doctor -o json | jq '.[] | select(.level == \"problem\")'", Args: cobra.NoArgs,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { a.lenient = true; return a.configure(cmd) },
		RunE: func(cmd *cobra.Command, _ []string) error {
			found := a.diagnose(cmd.Context())
			err := a.print(found, func() {
				for _, f := range found {
					a.say("%-8s %s", a.mark(f.Level), f.What)
					if f.Do != "" {
						a.say("         -> %s", f.Do)
					}
				}
			})
			for _, f := range found {
				if f.Level == levelProblem && err == nil {
					err = errProblems
				}
			}
			return err
		},
	}
}

func (a *app) mark(level string) string {
	colour := map[string]string{levelOK: "32", levelNote: "33", levelProblem: "31"}[level]
	if !a.terminal {
		return level
	}
	return "\x1b[" + colour + "m" + level + "\x1b[0m" + strings.Repeat(" ", 8-len(level))
}

// diagnose looks at everything.
func (a *app) diagnose(ctx context.Context) []finding {
	var all []finding
	all = append(all, a.lookAtConfig()...)
	all = append(all, lookAtMachine()...)
	all = append(all, a.lookAtDirectories()...)
	all = append(all, a.lookAtCertificates()...)
	all = append(all, a.lookAtGivenCertificates()...)
	all = append(all, a.lookAtProcesses(ctx)...)
	return append(all, a.lookAtNode(ctx)...)
}

func ok(format string, args ...any) finding {
	return finding{Level: levelOK, What: fmt.Sprintf(format, args...)}
}

func note(what, do string) finding    { return finding{Level: levelNote, What: what, Do: do} }
func problem(what, do string) finding { return finding{Level: levelProblem, What: what, Do: do} }

func (a *app) lookAtConfig() []finding {
	name := a.configPath()
	_, err := configFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist) && name == defaultConfig:
		return []finding{ok("no configuration file (%s): defaults hold", name)}
	case err != nil:
		return []finding{problem(err.Error(), "mend "+name+"; `ashlar config check` reads it again, `ashlar config example` explains every setting")}
	}
	return []finding{ok("configuration %s", name)}
}

// lookAtMachine is what the kernel offers.
func lookAtMachine() []finding {
	var out []finding
	if os.Geteuid() != 0 {
		out = append(out, note("not run by root: sockets and directories of the node may not be readable", "sudo ashlar doctor"))
	}
	var u unix.Utsname
	release := "unknown"
	if unix.Uname(&u) == nil {
		release = unix.ByteSliceToString(u.Release[:])
	}
	for _, dev := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(dev); err != nil {
			out = append(out, note(dev+" is missing: no block devices (attach --frontend blockdev)", "modprobe "+map[string]string{"/dev/fuse": "fuse", "/dev/loop-control": "loop"}[dev]))
		}
	}
	if major, minor := kernelVersion(release); major < 6 || major == 6 && minor < 9 {
		out = append(out, note("kernel "+release+" cannot resend FUSE requests: block devices (attach --frontend blockdev) need its nbd driver",
			"modprobe nbd, or a kernel of 6.9 or later"))
	} else {
		out = append(out, ok("kernel %s", release))
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil && limit.Max < 65536 {
		out = append(out, note(fmt.Sprintf("only %d open files are allowed: enough for about %d volumes", limit.Max, limit.Max/8), "raise LimitNOFILE, or ulimit -n"))
	}
	return out
}

// kernelVersion reads "6.12.3-…"; what it cannot read is old.
func kernelVersion(release string) (major, minor int) {
	words := strings.FieldsFunc(release, func(r rune) bool { return r < '0' || r > '9' })
	if len(words) > 1 {
		major, _ = strconv.Atoi(words[0])
		minor, _ = strconv.Atoi(words[1])
	}
	return major, minor
}

// lookAtDirectories is where the node keeps things.
func (a *app) lookAtDirectories() []finding {
	var out []finding
	dataDir := a.dataDir()
	var st unix.Statfs_t
	switch err := unix.Statfs(dataDir, &st); {
	case errors.Is(err, fs.ErrNotExist):
		out = append(out, note("the data directory "+dataDir+" does not exist", "it is made when `ashlar serve` runs for the first time"))
	case err != nil:
		out = append(out, problem(fmt.Sprintf("the data directory %s: %v", dataDir, err), "see that its file system is mounted and readable"))
	default:
		out = append(out, lookAtSpace(dataDir, &st))
	}
	if err := unix.Statfs(a.runDir, &st); err == nil && st.Type != unix.TMPFS_MAGIC {
		out = append(out, note("the run directory "+a.runDir+" is not on a tmpfs: what belongs to one boot survives it there, and slows starts", "put it below /run"))
	}
	if info, err := os.Stat(a.runDir); err == nil && info.Mode().Perm()&0o022 != 0 {
		out = append(out, problem("others may write to the run directory "+a.runDir, "chmod 0755 "+a.runDir))
	}
	return out
}

// dataDir is where the node of this machine keeps things.
func (a *app) dataDir() string {
	dir := optionOf("data-dir").value
	if file, err := configFile(a.configPath()); err == nil && file["data-dir"] != "" {
		dir = file["data-dir"]
	}
	return a.env("ASHLAR_DATA_DIR", dir)
}

func lookAtSpace(dir string, st *unix.Statfs_t) finding {
	free := 100 * float64(st.Bavail) / float64(max(st.Blocks, 1))
	what := fmt.Sprintf("%s: %s of %s free (%.0f %%)", dir, size(int64(st.Bavail)*st.Bsize), size(int64(st.Blocks)*st.Bsize), free)
	switch {
	case free < 5:
		return problem(what+"; nothing new is placed there, and guests that write new data may get errors", "delete snapshots (ashlar snapshot delete) or volumes, or enlarge the file system")
	case free < 15:
		return note(what, "below 5 % nothing new is placed there; delete snapshots or enlarge the file system")
	}
	return ok("%s", what)
}

// lookAtProcesses asks the holder and the data process, which go on without serve.
func (a *app) lookAtProcesses(ctx context.Context) []finding {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	var out []finding
	conn, err := hold.Dial(ctx, hold.Config{RunDir: a.runDir})
	if err != nil {
		out = append(out, note(fmt.Sprintf("the holder does not answer (%v)", err), "it runs as long as a node does; `ashlar serve` starts it"))
	} else {
		st, err := conn.Status(ctx)
		_ = conn.Close()
		switch {
		case err != nil:
			out = append(out, problem(fmt.Sprintf("the holder: %v", err), "see "+filepath.Join(a.runDir, "hold.log")))
		case !st.Data.Running && st.Data.LastExit != "":
			out = append(out, problem(fmt.Sprintf("the data process does not stay up: %s, %d times in a row", st.Data.LastExit, st.Data.YoungDeaths), "see "+filepath.Join(a.runDir, "data.log")))
		default:
			out = append(out, ok("holder (pid %d, %d descriptors)", st.PID, st.Held))
		}
	}
	sockets, _ := dataclient.DataSockets(a.runDir)
	for _, s := range sockets {
		state, err := dataclient.New(s).State(ctx)
		if err != nil {
			out = append(out, problem(fmt.Sprintf("the data process at %s does not answer: %v", s, err), "see "+filepath.Join(a.runDir, "data.log")+"; `ashlar upgrade` if it speaks another version"))
			continue
		}
		out = append(out, lookAtData(state)...)
	}
	if len(sockets) == 0 {
		out = append(out, note("no data process", "it runs as long as a node does; `ashlar serve` starts it"))
	}
	return out
}

func lookAtData(state dataclient.State) []finding {
	out := []finding{ok("data process %s (pid %d, %d volumes)", state.Hello.Version, state.Hello.PID, len(state.Volumes))}
	if state.Hello.Version != version {
		out = append(out, note(fmt.Sprintf("the data process is of version %s, this program of %s", state.Hello.Version, version), "when it suits you: ashlar upgrade"))
	}
	if !state.Hello.IOFlusher {
		out = append(out, note("the data process could not set PR_SET_IO_FLUSHER (no CAP_SYS_RESOURCE): when memory is short it may wait for its own block devices", "give it the capability; under systemd it has it"))
	}
	for _, d := range state.Disks {
		if d.Error != "" {
			out = append(out, problem(fmt.Sprintf("disk %s: %s", d.Path, d.Error), "see that it is mounted and whole; nothing on it was changed"))
		}
	}
	for _, v := range state.Volumes {
		if v.Error != "" {
			out = append(out, problem(fmt.Sprintf("volume %s is %s: %s", v.Volume, v.State, v.Error), "`ashlar volume show "+v.Volume+"`; after a failed flush: detach it, then `ashlar volume salvage "+v.Volume+"`"))
		}
	}
	return out
}

// lookAtNode is what the control plane knows.
func (a *app) lookAtNode(ctx context.Context) []finding {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	c, err := a.node()
	if err != nil {
		return []finding{problem(err.Error(), "mend --server, --token-file or --ca-file")}
	}
	defer c.Close()
	s, err := readStatus(ctx, c)
	switch {
	case api.CodeOf(err) == api.CodeUnreachable && s.About.Node != "":
		return []finding{problem(fmt.Sprintf("node %s answers, and the catalogue does not: %v", s.About.Node, err),
			"most of those who keep it must be up and reached; if they will never be: the runbook on a lost majority, docs/operate/cluster.md. Guests' I/O does not depend on it")}
	case api.CodeOf(err) == api.CodeUnreachable:
		return []finding{problem(fmt.Sprintf("the node does not answer: %v", err), "systemctl start ashlar, or `ashlar serve`; journalctl -u ashlar says why it ended. Guests' I/O does not depend on it")}
	case err != nil:
		return []finding{problem(fmt.Sprintf("the node: %v", err), "see its log: journalctl -u ashlar")}
	case !s.Ready:
		return []finding{problem("the node answers, and is not ready", "`ashlar status` says what it waits for")}
	}
	out := []finding{ok("node %s (ashlar %s, %s volumes, %d images)", s.About.Node, s.About.Version, countVolumes(s.Volumes), len(s.Images))}
	if s.About.Version != version {
		out = append(out, note(fmt.Sprintf("the node is of version %s, this program of %s", s.About.Version, version), "systemctl restart ashlar; guests do not notice"))
	}
	for _, d := range disksOf(s.Nodes, "") {
		if c := d.Conditions["Ready"]; c.Status == "False" && c.Reason != "NodeDown" { // of a node that is down it is said
			out = append(out, problem(fmt.Sprintf("disk %s/%s cannot be used: %s", d.Node, d.Name, c.Message),
				"mount its file system, or mend it: nothing on it was changed, and its volumes come back by themselves. If it is lost for good: ashlar disk remove "+d.Node+"/"+d.Name+" --force"))
		}
	}
	for _, v := range s.Volumes {
		if v.Error != "" || v.Robustness == "faulted" {
			out = append(out, problem(fmt.Sprintf("volume %s is %s, %s: %s", v.Name, v.State, v.Robustness, v.Error), "ashlar volume show "+v.Name))
		}
	}
	for _, i := range s.Images {
		if state := imageState(i); state.failed {
			out = append(out, problem(fmt.Sprintf("image %s: %s", i.Name, state.message), "ashlar image show "+i.Name+"; delete it and import it again"))
		}
	}
	out = append(out, a.lookAtCluster(ctx, c, s)...)
	return append(out, lookAtSockets(s)...)
}

// lookAtSockets finds volumes that are said to be attached and cannot be reached.
func lookAtSockets(s status) []finding {
	var out []finding
	for _, v := range s.Volumes {
		if v.State == "attached" && len(v.Controllers) > 0 && v.Controllers[0].HostID == s.About.Node && v.Controllers[0].Endpoint != "" && !reachable(v.Controllers[0].Endpoint) {
			out = append(out, problem(fmt.Sprintf("volume %s is attached, and nobody listens at %s", v.Name, v.Controllers[0].Endpoint), "wait a few seconds and look again; else `ashlar support-bundle`"))
		}
	}
	return out
}
