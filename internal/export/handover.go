package export

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"ashlar/internal/nbd"
)

// Passed is a client's connection to a volume, between two requests, on its way to another process.
type Passed struct {
	File  *os.File        // the socket; whoever has a Passed closes it
	State json.RawMessage // what nbd needs to go on with it
}

// How long clients that connected just now may take to choose the export before they are cut, and how often it is looked.
const (
	settlePatience = 250 * time.Millisecond
	settlePoll     = time.Millisecond
)

// Quiesce takes no new clients of a volume any more, who wait in the kept socket from here on, and lets those that are negotiating finish, within reason. Clients that are served do not notice. What follows is Detach, or
// Remove. A volume that is not exported is no error.
func (n *NBD) Quiesce(ctx context.Context, volume string) {
	n.mu.Lock()
	v := n.volumes[volume]
	var l net.Listener
	if v != nil {
		v.removing, l = true, v.listener // no visitor comes any more
	}
	n.mu.Unlock()
	if l == nil {
		return
	}
	_ = l.Close() // Serve may have closed it
	v.wg.Wait()
	for deadline := time.Now().Add(settlePatience); time.Now().Before(deadline) && ctx.Err() == nil && negotiating(v.server); {
		<-time.After(settlePoll)
	}
}

// negotiating tells whether a client has not chosen its export yet.
func negotiating(s *nbd.Server) bool {
	for _, c := range s.Conns() {
		if c.Export == "" {
			return true
		}
	}
	return false
}

// Detach ends volume's export as Remove does, except that its socket stays where it is kept, and that its clients' connections are returned, each between two
// requests: Adopt, in another process that exports the volume, goes on with them, and so it does here. Connections that cannot be passed on (TLS, still negotiating, not ready before ctx ended) are cut, and then those
// that can are returned with an error. Whatever it returns, the volume is not exported here any more and no call to its Device is running, unless ctx ended first. The volume that is not exported
// is no error.
func (n *NBD) Detach(ctx context.Context, volume string) ([]Passed, error) {
	n.Quiesce(ctx, volume)
	n.mu.Lock()
	v := n.volumes[volume]
	if v == nil || v.server == nil {
		n.mu.Unlock()
		return nil, nil
	}
	servers := v.servers()
	n.mu.Unlock()
	var out []Passed
	var errs []error
	for _, s := range servers {
		conns, err := s.Detach(ctx, volume)
		errs = append(errs, err)
		for _, c := range conns {
			out = append(out, Passed{File: c.File, State: c.State})
		}
	}
	errs = append(errs, endServers(servers, func(s *nbd.Server) error { return s.Drain(ctx) }))
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.volumes, volume)
	if err := errors.Join(errs...); err != nil {
		return out, fmt.Errorf("export: detach %s: %w", volume, err)
	}
	return out, nil
}

// Adopt goes on with a client's connection that was detached, here or in another process. It owns file, also when it fails: then the client sees its connection
// end, and connects again. ErrClosed if the volume is not exported here.
func (n *NBD) Adopt(volume string, file *os.File, state json.RawMessage) error {
	n.mu.Lock()
	v := n.volumes[volume]
	n.mu.Unlock()
	err := ErrClosed
	if v != nil && v.server != nil {
		err = v.server.Adopt(file, state)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("export: go on with a connection to %s: %w", volume, err), file.Close())
	}
	return nil
}
