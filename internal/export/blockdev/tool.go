package blockdev

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// The verbs of the tool, each with the arguments that follow it. PATH is the file below RunDir, DEV the loop device.
const (
	verbAttach = "attach" // PATH rw|ro: put a loop device on PATH; its path is the answer
	verbDetach = "detach" // DEV PATH: take it off, if nobody uses it
	verbDrop   = "drop"   // DEV: take it off as soon as nobody uses it
	verbResize = "resize" // DEV PATH: take PATH's size
	verbSync   = "sync"   // DEV: write out what the kernel holds for it
	verbProbe  = "probe"  // PATH: look whether somebody serves it

	// Those of the kernel's nbd driver, whose devices have an identifier ID. Where it says so, descriptor 3 is a socket for the driver.
	verbNBDLoad      = "nbd-load"      // load the module
	verbNBDConnect   = "nbd-connect"   // ID BYTES FLAGS, socket: make a device; its path is the answer
	verbNBDReconnect = "nbd-reconnect" // DEV ID BYTES, socket: give it a connection in place of a dead one
	verbNBDResize    = "nbd-resize"    // DEV ID BYTES
	verbNBDRemove    = "nbd-remove"    // DEV ID: disconnect it, if nobody uses it
	verbNBDSweep     = "nbd-sweep"     // DEV ID: the same, where nobody serves it
	verbNBDDrop      = "nbd-drop"      // DEV ID: disconnect it
)

// answer is what the tool says on its standard output: one line of JSON.
type answer struct {
	Device string `json:"device,omitempty"`
	Error  string `json:"error,omitempty"`
	Errno  int    `json:"errno,omitempty"`
}

// exitUsage is the tool's exit code for arguments it does not know; with an answer it is 0, whatever the answer says.
const exitUsage = 2

// Tool is the life of the short-lived process that touches a loop device, in place of the process that serves it (see the package comment). It is run with
// the arguments that follow Config.Tool, writes its answer to stdout, and returns the exit code.
func Tool(ctx context.Context, args []string, stdout io.Writer) int {
	var a answer
	var err error
	verb := ""
	if len(args) > 0 {
		verb = args[0]
	}
	switch {
	case verb == verbAttach && len(args) == 3:
		a.Device, err = attach(args[1], args[2] == "ro")
	case verb == verbDetach && len(args) == 3:
		err = detach(ctx, args[1], args[2])
	case verb == verbDrop && len(args) == 2:
		err = drop(args[1])
	case verb == verbResize && len(args) == 3:
		err = resize(args[1], args[2])
	case verb == verbSync && len(args) == 2:
		err = syncDevice(args[1])
	case verb == verbProbe && len(args) == 2:
		var st unix.Stat_t
		err = unix.Stat(args[1], &st)
	default:
		known := false
		if a.Device, known, err = kernelTool(ctx, args); !known {
			return exitUsage
		}
	}
	if err != nil {
		a.Error = err.Error()
		var errno unix.Errno
		if errors.As(err, &errno) {
			a.Errno = int(errno)
		}
	}
	if err := json.NewEncoder(stdout).Encode(a); err != nil {
		return exitUsage
	}
	return 0
}

// kernelTool carries out the verbs of the kernel's nbd driver; known is false for others.
func kernelTool(ctx context.Context, args []string) (dev string, known bool, err error) {
	want := map[string]int{verbNBDLoad: 1, verbNBDConnect: 4, verbNBDReconnect: 4, verbNBDResize: 4, verbNBDRemove: 3, verbNBDSweep: 3, verbNBDDrop: 3}
	if len(args) == 0 || want[args[0]] != len(args) {
		return "", false, nil
	}
	switch args[0] {
	case verbNBDLoad:
		err = nbdLoad(ctx)
	case verbNBDConnect:
		dev, err = nbdConnect(args[1], args[2], args[3])
	case verbNBDReconnect:
		err = nbdReconfigure(args[1], args[2], args[3], socketFD)
	case verbNBDResize:
		err = nbdReconfigure(args[1], args[2], args[3], -1)
	case verbNBDRemove:
		err = nbdRemove(ctx, args[1], args[2])
	case verbNBDSweep:
		err = nbdSweep(ctx, args[1], args[2])
	case verbNBDDrop:
		err = nbdDrop(ctx, args[1], args[2])
	}
	return dev, true, err
}

// toolError is what the tool said had failed.
type toolError struct {
	text  string
	errno unix.Errno
}

func (e *toolError) Error() string { return e.text }
func (e *toolError) Unwrap() error {
	if e.errno == 0 {
		return nil
	}
	return e.errno
}

// killDelay is how long after its context's end a tool's output is waited for.
const killDelay = time.Second

// tool runs a verb and returns the device it answered with. When ctx ends it returns at once; a process that cannot die because it waits for its
// volume is left behind, and ends when the volume is served again, or removed.
func (f *Frontend) tool(ctx context.Context, args ...string) (string, error) {
	return f.toolWith(ctx, nil, args...)
}

// toolWith is tool with a file that the process gets as descriptor 3, unless it is nil.
func (f *Frontend) toolWith(ctx context.Context, file *os.File, args ...string) (string, error) {
	type outcome struct {
		a   answer
		err error
	}
	argv := append(append([]string{}, f.cfg.Tool...), args...)
	out := make(chan outcome, 1)
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return "", ErrClosed
	}
	f.spawned.Go(func() {
		var stdout bytes.Buffer
		both, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(f.life, cancel)()
		cmd := exec.CommandContext(both, argv[0], argv[1:]...)
		cmd.Stdout, cmd.WaitDelay = &stdout, killDelay
		if file != nil {
			cmd.ExtraFiles = []*os.File{file}
		}
		var o outcome
		if o.err = cmd.Run(); o.err == nil {
			o.err = json.Unmarshal(stdout.Bytes(), &o.a)
		}
		out <- o
	})
	f.mu.Unlock()
	select {
	case o := <-out:
		switch {
		case ctx.Err() != nil:
			return "", fmt.Errorf("%s: %w", args[0], context.Cause(ctx))
		case o.err != nil:
			return "", fmt.Errorf("run %s %s: %w", f.cfg.Tool[0], args[0], o.err)
		case o.a.Error != "":
			return "", &toolError{text: o.a.Error, errno: unix.Errno(o.a.Errno)}
		}
		return o.a.Device, nil
	case <-ctx.Done():
		return "", fmt.Errorf("%s: %w", args[0], context.Cause(ctx))
	case <-f.life.Done():
		return "", fmt.Errorf("%s: %w", args[0], ErrClosed)
	}
}
