package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"ashlar/internal/block/limit"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
	"ashlar/internal/export"
	"ashlar/internal/export/blockdev"
	"ashlar/internal/nbd"
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
	heldTCP     = "nbd-tcp"
	heldCluster = "cluster-tcp"
)

// heldListeners keeps listening sockets with the holder.
type heldListeners struct {
	holder holder
	access export.Access
	report func(name string, err error) // told of a kept socket that could not be used
}

var _ export.Listeners = heldListeners{}

// Listen implements export.Listeners.
func (h heldListeners) Listen(ctx context.Context, name, path string) (net.Listener, error) {
	f, err := h.holder.Get(ctx, name)
	if err == nil {
		ln, err := h.access.Adopt(f, path)
		if err == nil {
			return ln, nil
		}
		h.report(name, err)
	} else if !errors.Is(err, hold.ErrNotHeld) {
		return nil, err
	}
	// What cannot be found any more is dropped before its place is taken: as long as it is kept, somebody seems to listen there.
	if err := h.holder.Drop(ctx, name); err != nil {
		return nil, err
	}
	ln, err := h.access.Bind(path)
	if err != nil {
		return nil, err
	}
	if f, err = ln.File(); err != nil {
		return nil, errors.Join(fmt.Errorf("keep %s: %w", name, err), ln.Close())
	}
	err = h.holder.Put(ctx, name, f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return ln, nil
}

// Forget implements export.Listeners. A holder that was stopped has closed everything.
func (h heldListeners) Forget(ctx context.Context, name string) error {
	if err := h.holder.Drop(ctx, name); err != nil && !errors.Is(err, hold.ErrClosed) {
		return err
	}
	return nil
}

// newFrontend returns the NBD frontend of this process.
func newFrontend(cfg Config, l heldListeners) (*export.NBD, error) {
	var err error
	if l.access, err = socketAccess(cfg.SocketGroup); err != nil {
		return nil, err
	}
	return export.NewNBD(export.NBDConfig{Dir: filepath.Join(cfg.RunDir, "nbd"), Listeners: l, Report: func(volume string, err error) {
		cfg.Log.Debug("NBD connection ended", "volume", volume, "error", err)
	}})
}

// socketAccess finds the group that may open volumes' sockets, by its name or its number. client.ErrInvalid.
func socketAccess(group string) (export.Access, error) {
	if group == "" {
		return export.Access{}, nil
	}
	number := group
	if g, err := user.LookupGroup(group); err == nil {
		number = g.Gid
	}
	gid, err := strconv.ParseInt(number, 10, 32)
	if err != nil || gid < 0 {
		return export.Access{}, fmt.Errorf("group %q of the volumes' sockets: %w: there is no such group on this host", group, client.ErrInvalid)
	}
	return export.Access{GroupID: int(gid)}, nil
}

// enable exports a volume's device.
func (p *Process) enable(ctx context.Context, a client.OpenVolume, dev *limit.Device) (err error) {
	switch a.Frontend {
	case frontendNBD:
		_, err = p.nbd.Add(ctx, a.Volume, dev, export.Options{MayWait: dev.MayWait, Far: isFar(a)})
	case frontendBlockdev:
		_, err = p.blockdev.Add(ctx, a.Volume, dev, blockdev.Options{Far: isFar(a)})
	}
	return err
}

// disable ends a volume's export, after its clients' requests under way, and takes its socket away. Content if there is none. A block device was taken away before.
func (p *Process) disable(ctx context.Context, a client.OpenVolume) error {
	if a.Frontend != frontendNBD {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	return p.nbd.Remove(ctx, a.Volume)
}

// statsOf turns the frontend's words into the wire's.
func statsOf(s nbd.Stats) client.Stats {
	return client.Stats{ReadOps: s.Reads, WriteOps: s.Writes, FlushOps: s.Flushes, ZeroOps: s.Zeroes, ReadBytes: s.ReadBytes, WriteBytes: s.WrittenBytes, Errors: s.Errors}
}

// sweepListeners drops what the holder keeps for nobody: sockets of volumes that are not to be reopened, and of data processes of other versions, which are dead,
// because this one has the lock of all.
func (p *Process) sweepListeners(ctx context.Context, f openFile) error {
	names, err := p.holder.List(ctx)
	if err != nil {
		return err
	}
	wanted := map[string]bool{heldControl + p.cfg.Version: true, heldTCP: f.Network.Address != "", heldCluster: f.Cluster.Listen != ""}
	for _, e := range f.Volumes {
		if e.Open.Frontend == frontendNBD {
			wanted[heldNBD+e.Open.Volume] = true
		}
		if e.Open.Frontend == frontendBlockdev {
			wanted[heldFUSE+e.Open.Volume] = true
		}
	}
	for _, n := range names {
		if wanted[n] {
			continue
		}
		if v, ok := strings.CutPrefix(n, heldControl); ok {
			err = p.removeControl(ctx, v)
		} else if v, ok := strings.CutPrefix(n, heldNBD); ok {
			err = p.nbd.Remove(ctx, v)
		} else if strings.HasPrefix(n, heldFUSE) {
			err = p.sweepBlockdev(ctx, n)
		} else if n == heldTCP || n == heldCluster {
			err = p.listeners.Forget(ctx, n)
		} // whoever put anything else there knows
		if err != nil {
			return err
		}
	}
	return nil
}

// removeControl takes the control socket of a version away.
func (p *Process) removeControl(ctx context.Context, version string) error {
	err := os.Remove(client.DataSocket(p.cfg.RunDir, version))
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, p.listeners.Forget(ctx, heldControl+version))
}
