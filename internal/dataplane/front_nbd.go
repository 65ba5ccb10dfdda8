package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"sync"

	"ashlar/internal/block"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/nbd"
)

// front is a volume's frontend while it is enabled: an NBD server on one unix socket.
type front struct {
	volume, path string
	server       *nbd.Server
	wg           sync.WaitGroup
}

// startFront exports dev under the volume's name.
func (p *Process) startFront(ctx context.Context, volume string, dev block.Device) (*front, error) {
	f := &front{volume: volume, path: p.nbdSocket(volume)}
	var err error
	f.server, err = nbd.NewServer(nbd.Config{
		Exports: nbd.Single{Name: volume, Device: dev},
		Report:  func(err error) { p.log.Debug("NBD connection ended", "volume", volume, "error", err) },
	})
	if err != nil {
		return nil, fmt.Errorf("export %s: %w", volume, err)
	}
	ln, err := p.listener(ctx, heldNBD+volume, f.path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("export %s: %w", volume, err), f.server.Close())
	}
	f.wg.Go(func() {
		if err := f.server.Serve(ln); err != nil {
			p.log.Error("export ended", "volume", volume, "error", err)
		}
	})
	return f, nil
}

// stop lets requests under way be answered, for a while, and ends every connection. The listening socket is held elsewhere and goes on collecting
// clients until it is dropped.
func (f *front) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	err := f.server.Drain(ctx)
	f.wg.Wait()
	if err != nil {
		return fmt.Errorf("export %s: %w", f.volume, err)
	}
	return nil
}

// endpoint is the NBD URI of the volume.
func (f *front) endpoint() string {
	u := url.URL{Scheme: "nbd+unix", Host: "", Path: "/" + f.volume, RawQuery: "socket=" + f.path}
	return u.Scheme + "://" + u.EscapedPath() + "?" + u.RawQuery
}

func (f *front) clients() int { return f.server.Stats()[f.volume].Conns }

func (f *front) stats() client.Stats {
	s := f.server.Stats()[f.volume]
	return client.Stats{ReadOps: s.Reads, WriteOps: s.Writes, FlushOps: s.Flushes, ZeroOps: s.Zeroes, ReadBytes: s.ReadBytes, WriteBytes: s.WrittenBytes, Errors: s.Errors}
}
