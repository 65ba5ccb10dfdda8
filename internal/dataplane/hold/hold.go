// Package hold is the holder: a process that does almost nothing, and therefore need not die. It keeps descriptors by name (listening sockets now, FUSE
// sessions later) while the data process that serves them is killed or replaced, and it alone starts the data process, again and again, also
// when no agent runs. Its protocol is frozen (docs/formats/hold.md), because a holder may be older than everything that talks to it.
//
//	serve ──┐                            ┌── starts, and starts again
//	        ├─ hold.sock ─▶ holder ──────┤
//	data  ──┘   PUT, GET, …              └── keeps the descriptors
//
// Whoever sees the holder's socket close starts it again (Keeper), and the data process hands its descriptors in again.
//
// It imports nothing of ours. Read next: proto.go (the wire), server.go (the holder), supervise.go (when data is started), keeper.go (its clients),
// and package dataplane.
package hold

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
)

// Config says where a holder lives and how it and the data process are started. The zero value of everything but RunDir has a default.
type Config struct {
	// RunDir holds sockets, locks and logs; absolute. It belongs to one boot: normally it is on a tmpfs.
	RunDir string
	// Binary is the newest installed ashlar: the path is looked up again at each start. Default: this process's executable.
	Binary string
	// HoldArgs and DataArgs follow Binary to run the holder and the data process in the foreground. Defaults: hold (data) --run-dir RunDir. The
	// holder is started through an intermediate that gets DetachFlag as well.
	HoldArgs, DataArgs []string
	// Systemd has the holder and the data process started as units (systemd.go), not as processes of whoever needs them.
	Systemd bool
	// Start starts the holder in place of Binary, and returns when it answers: for one that is no process of its own (package testbed). Nil: Binary is started.
	Start func(context.Context) error
	// Log gets what happened. Default: in Run standard error, bounded if that is HoldLog; elsewhere nothing.
	Log *slog.Logger
}

// DetachFlag, after HoldArgs, asks `ashlar hold` to call Detach instead of Run.
const DetachFlag = "--detach"

// TakeOverFlag, after DataArgs, asks `ashlar data` to take over from the one that runs, if one does.
const TakeOverFlag = "--take-over"

// The ways this package fails; everything else is an error of the operating system, wrapped.
var (
	// ErrNotHeld: the holder has no descriptor of that name.
	ErrNotHeld = errors.New("no descriptor of that name is held")
	// ErrRunning: another process holds the lock.
	ErrRunning = errors.New("already running")
	// ErrVersion: the holder and its client have no protocol version in common.
	ErrVersion = errors.New("version out of window")
	// ErrRefused: the holder did not understand or allow the request.
	ErrRefused = errors.New("refused by the holder")
	// ErrStart: the holder could not start the data process.
	ErrStart = errors.New("the data process cannot be started")
	// ErrClosed: the connection, or the Keeper, is closed.
	ErrClosed = errors.New("holder's connection closed")
)

// check fills in defaults.
func (c Config) check() (Config, error) {
	if !filepath.IsAbs(c.RunDir) {
		return c, fmt.Errorf("holder: run directory %q is not an absolute path", c.RunDir)
	}
	if len(c.Socket()) > 107 {
		return c, fmt.Errorf("holder: run directory %q is too long for a socket in it", c.RunDir)
	}
	if c.Binary == "" {
		exe, err := os.Executable()
		if err != nil {
			return c, fmt.Errorf("holder: find own executable: %w", err)
		}
		c.Binary = exe
	}
	if c.HoldArgs == nil {
		c.HoldArgs = []string{"hold", "--run-dir", c.RunDir}
	}
	if c.DataArgs == nil {
		c.DataArgs = []string{"data", "--run-dir", c.RunDir}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// Socket is where the holder listens.
func (c Config) Socket() string { return filepath.Join(c.RunDir, "hold.sock") }

// DataLog is where the data process's standard output and error go.
func (c Config) DataLog() string { return filepath.Join(c.RunDir, "data.log") }

// HoldLog is where the holder's go.
func (c Config) HoldLog() string { return filepath.Join(c.RunDir, "hold.log") }

// stopped marks that the holder was asked to stop: a Keeper that sees its socket close leaves it at that. A holder that starts removes the mark.
func (c Config) stopped() string { return filepath.Join(c.RunDir, "hold.stopped") }

func (c Config) holdLock() string { return filepath.Join(c.RunDir, "hold.lock") }

// dataLock is held by every data process of this run directory for as long as it lives: how a holder that is not its parent knows.
func dataLock(runDir string) string { return filepath.Join(runDir, "data", "run.lock") }
