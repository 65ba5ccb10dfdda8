// Package testbed starts Ashlar for proofs, one node or many, with verbs for what goes wrong. The demo, the benchmark and the integration tests stand on it.
//
//	form               file        a node is                                            what can go wrong
//	Process, Cluster   cluster.go  its real processes, driven by its own command line   kill -9 of each, pause
//	… on a Switch      switch.go   the same, each in a network namespace (root)         partition, also one-way; delay
//	Inside             inside.go   goroutines of this process                           stops and starts, clock jumps
//
// Inside has the data process and the holder in this process as well, and not as children: they share nothing but sockets, files and locks with the others (a flock is an open file's, not a process's),
// so nothing of them had to change but who starts the holder; and a race detector that did not see them would miss half of the house. What only a process can show (kill -9, hand-over to a successor,
// imports in work processes, what the environment says) is Cluster's.
//
// Read next: demo, bench, and the tests in this package.
package testbed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Process is one node as processes: `ashlar serve`, and the holder and the data process that it brings up. The verbs are not to be called concurrently, except
// Run.
type Process struct {
	Bin     string // the program
	Name    string // the node's
	DataDir string
	RunDir  string
	Listen  string // host:port of REST
	// Namespace is the network namespace its processes run in; "": this process's own. Its sockets are files, and reached from anywhere.
	Namespace string
	Args      []string // more arguments of `ashlar serve`

	serve *exec.Cmd
	log   *os.File
}

// readyLimit bounds how long a node may take to answer.
const readyLimit = 30 * time.Second

// ErrNotReady: the node did not come up in time.
var ErrNotReady = errors.New("node is not ready")

// CommandError is a failed run of the command line.
type CommandError struct {
	Args   []string
	Code   int // exit code; -1 when it did not start
	Stderr string
}

// Error names the command, its code and what it said.
func (e *CommandError) Error() string {
	return fmt.Sprintf("ashlar %s: exit code %d: %s", strings.Join(e.Args, " "), e.Code, strings.TrimSpace(e.Stderr))
}

// StartProcess starts a node called node1 with a free port in a directory; see Start.
func StartProcess(ctx context.Context, bin, dir string) (*Process, error) {
	port, err := FreePorts(1)
	if err != nil {
		return nil, err
	}
	p := &Process{Bin: bin, Name: "node1", Listen: "127.0.0.1:" + strconv.Itoa(port)}
	if err := p.Start(ctx, dir); err != nil {
		return nil, err
	}
	return p, nil
}

// Start makes the directories below dir, starts `ashlar serve` and waits until it is ready. dir must be short: sockets lie in it. After an error nothing runs.
func (p *Process) Start(ctx context.Context, dir string) (err error) {
	p.DataDir, p.RunDir = filepath.Join(dir, "data"), filepath.Join(dir, "run")
	for _, d := range []string{p.DataDir, p.RunDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	if p.log, err = os.OpenFile(filepath.Join(dir, "serve.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		return err
	}
	if err := p.StartServe(ctx); err != nil {
		return errors.Join(err, p.Stop(context.WithoutCancel(ctx)))
	}
	return nil
}

// StartServe starts `ashlar serve` (again) and waits until it is ready.
func (p *Process) StartServe(ctx context.Context) error {
	args := []string{p.Bin, "serve", "--data-dir", p.DataDir, "--run-dir", p.RunDir, "--listen", p.Listen, "--name", p.Name}
	args = append(args, p.Args...)
	if p.Namespace != "" {
		args = append([]string{"nsenter", "--net=/var/run/netns/" + p.Namespace}, args...)
	}
	p.serve = exec.Command(args[0], args[1:]...)
	p.serve.Stdout, p.serve.Stderr = p.log, p.log
	p.serve.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.serve.Start(); err != nil {
		return err
	}
	err := Until(ctx, readyLimit, func() (bool, error) {
		var status struct{ Ready bool }
		err := p.Run(ctx, &status, "status")
		return err == nil && status.Ready, nil
	})
	if err != nil {
		return fmt.Errorf("%w: see %s: %w", ErrNotReady, p.log.Name(), err)
	}
	return nil
}

// KillServe kills `ashlar serve` like the kernel would: at once, without a word.
func (p *Process) KillServe() error {
	if p.serve == nil {
		return nil
	}
	err := p.serve.Process.Kill()
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	p.serve.Wait()
	p.serve = nil
	return err
}

// Run runs the command line. With out, it asks for JSON and decodes it there.
func (p *Process) Run(ctx context.Context, out any, args ...string) error {
	full := append([]string{}, args...)
	if out != nil {
		full = append(full, "-o", "json")
	}
	stdout, err := p.Text(ctx, full...)
	if err != nil || out == nil {
		return err
	}
	if err := json.Unmarshal([]byte(stdout), out); err != nil {
		return fmt.Errorf("ashlar %s: its JSON: %w: %s", strings.Join(args, " "), err, stdout)
	}
	return nil
}

// Text runs the command line and returns what it printed; a failure is a *CommandError.
func (p *Process) Text(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, p.Bin, args...)
	cmd.Env = append(os.Environ(), "ASHLAR_RUN_DIR="+p.RunDir)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return stdout.String(), &CommandError{Args: args, Code: exit.ExitCode(), Stderr: stderr.String()}
	}
	if err != nil {
		return "", &CommandError{Args: args, Code: -1, Stderr: err.Error()}
	}
	return stdout.String(), nil
}

// PID finds the process of this node that runs a subcommand ("data", "hold", "serve"), by its command line; 0 if there is none.
func (p *Process) PID(subcommand string) int {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0
	}
	for _, d := range dirs {
		line, err := os.ReadFile(filepath.Join(d, "cmdline"))
		if err != nil {
			continue
		}
		words := strings.Split(string(line), "\x00")
		if len(words) < 2 || words[1] != subcommand || !bytes.Contains(line, []byte(p.RunDir)) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(d))
		if err == nil {
			return pid
		}
	}
	return 0
}

// Kill sends SIGKILL to the process that runs a subcommand.
func (p *Process) Kill(subcommand string) error {
	pid := p.PID(subcommand)
	if pid == 0 {
		return fmt.Errorf("no `ashlar %s` is running: %w", subcommand, os.ErrNotExist)
	}
	return syscall.Kill(pid, syscall.SIGKILL)
}

// WaitServe waits until `ashlar serve` has ended by itself, as it does after `ashlar shutdown`, and returns how.
func (p *Process) WaitServe() error {
	if p.serve == nil {
		return nil
	}
	err := p.serve.Wait()
	p.serve = nil
	return err
}

// stopLimit bounds an orderly end.
const stopLimit = 30 * time.Second

// Stop shuts the node down in order, volumes that are attached included, and kills what is left after that. Of one that does not run there is nothing to stop.
func (p *Process) Stop(ctx context.Context) error {
	none := func() (bool, error) {
		return p.PID("serve") == 0 && p.PID("hold") == 0 && p.PID("data") == 0, nil
	}
	if gone, _ := none(); gone { // killed before
		return p.log.Close()
	}
	err := p.Run(ctx, nil, "shutdown", "--force")
	if err == nil {
		err = Until(ctx, stopLimit, none)
	}
	p.KillServe()
	// They start each other again, so it may take several rounds.
	killErr := Until(ctx, stopLimit, func() (bool, error) {
		for _, sub := range []string{"hold", "data"} {
			if pid := p.PID(sub); pid != 0 {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		return none()
	})
	return errors.Join(err, killErr, p.log.Close())
}

// Until calls try every few milliseconds until it is content, fails, or limit has passed.
func Until(ctx context.Context, limit time.Duration, try func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := try()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}
