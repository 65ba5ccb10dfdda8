package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
)

// holder keeps descriptors while this process is killed and started again: a hold.Keeper, or a stand-in of the tests.
type holder interface {
	Put(ctx context.Context, name string, f *os.File) error
	Get(ctx context.Context, name string) (*os.File, error)
	Drop(ctx context.Context, name string) error
	List(ctx context.Context) ([]string, error)
	Stop(ctx context.Context) error
}

// Names of descriptors at the holder, docs/formats/hold.md.
const (
	heldControl = "control/"
	heldNBD     = "nbd/"
)

// listener returns the socket at path, as a dead process of this run directory left it with the holder, connections waiting in it and all; or a new one, kept there from now on.
func (p *Process) listener(ctx context.Context, name, path string) (net.Listener, error) {
	f, err := p.holder.Get(ctx, name)
	if err == nil {
		ln, err := takeListener(f, path)
		if err == nil {
			return ln, nil
		}
		p.log.Warn("a held socket cannot be used; clients connect to a new one", "name", name, "error", err)
	} else if !errors.Is(err, hold.ErrNotHeld) {
		return nil, err
	}
	ln, err := client.Listen(path)
	if err != nil {
		return nil, err
	}
	if f, err = ln.File(); err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), ln.Close())
	}
	err = p.holder.Put(ctx, name, f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return ln, nil
}

// takeListener makes a listener of a held descriptor, provided that clients can still find it: its name must be there. It owns f.
func takeListener(f *os.File, path string) (net.Listener, error) {
	defer f.Close()
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("%s: %w: not a socket", path, client.ErrExists)
	}
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("take %s over: %w", path, err)
	}
	if u, ok := ln.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	return ln, nil
}

// nbdSocket is where a volume's clients connect, the same path on every host.
func (p *Process) nbdSocket(volume string) string {
	return filepath.Join(p.cfg.RunDir, "nbd", volume+".sock")
}

// dropListener takes a volume's socket away for good; content if there is none.
func (p *Process) dropListener(ctx context.Context, volume string) error {
	err := p.holder.Drop(ctx, heldNBD+volume)
	if errors.Is(err, hold.ErrClosed) {
		err = nil // the holder was stopped, and has closed it
	}
	if e := os.Remove(p.nbdSocket(volume)); e != nil && !errors.Is(e, fs.ErrNotExist) {
		err = errors.Join(err, e)
	}
	return err
}

// sweepListeners drops what the holder keeps for nobody: sockets of volumes that are not to be reopened, and of data processes of other versions, which are dead,
// because this one has the lock of all.
func (p *Process) sweepListeners(ctx context.Context, f openFile) error {
	names, err := p.holder.List(ctx)
	if err != nil {
		return err
	}
	wanted := map[string]bool{heldControl + p.cfg.Version: true}
	for _, e := range f.Volumes {
		if e.Open.Frontend == frontendNBD {
			wanted[heldNBD+e.Open.Volume] = true
		}
	}
	for _, n := range names {
		if wanted[n] {
			continue
		}
		path := ""
		if v, ok := strings.CutPrefix(n, heldControl); ok {
			path = client.DataSocket(p.cfg.RunDir, v)
		} else if v, ok := strings.CutPrefix(n, heldNBD); ok {
			path = p.nbdSocket(v)
		} else {
			continue // whoever put it there knows
		}
		err := p.holder.Drop(ctx, n)
		if e := os.Remove(path); e != nil && !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
