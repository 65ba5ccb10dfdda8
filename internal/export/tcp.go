package export

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"sort"
	"sync"
	"time"

	"ashlar/internal/nbd"
)

// maxTCPConns bounds the connections that come over a network at one time.
const maxTCPConns = 1024

// TCP serves every volume of an NBD frontend on one listening socket, under its name; there is no default export, and a list shows all. What the volumes' own sockets grant (limits, read-only) holds here too.
//
// Each connection has a server of its own, which is known to the volumes that its client asked for: so that a volume can be removed with all its connections, and no others.
type TCP struct {
	n      *NBD
	l      net.Listener
	host   string
	port   string
	config *tls.Config // nil: plain

	wg      sync.WaitGroup
	closing chan struct{}

	mu       sync.Mutex // guards the rest
	closed   bool
	visitors map[*visitor]bool
}

// visitor is a connection over TCP. The volumes that it looked up are guarded by the NBD's mu.
type visitor struct {
	n      *NBD
	server *nbd.Server
	asked  []string
}

// ServeTCP serves n's volumes on l, which it takes over, until Drain or Close; plainly, or with config, and then nobody gets in without TLS.
// host is what URIs say instead of an address that means all of the host's; empty: its name.
func (n *NBD) ServeTCP(l net.Listener, config *tls.Config) (*TCP, error) {
	host, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("export: %s: %w", l.Addr(), err), l.Close())
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		if host, err = os.Hostname(); err != nil {
			return nil, errors.Join(fmt.Errorf("export: %w", err), l.Close())
		}
	}
	t := &TCP{n: n, l: l, host: host, port: port, config: config, closing: make(chan struct{}), visitors: map[*visitor]bool{}}
	t.wg.Go(t.accept)
	return t, nil
}

// URI is what clients connect to: nbd://HOST:PORT/VOLUME, or nbds with TLS.
func (t *TCP) URI(volume string) string {
	scheme := "nbd"
	if t.config != nil {
		scheme = "nbds"
	}
	return scheme + "://" + net.JoinHostPort(t.host, t.port) + "/" + escape(volume)
}

// accept takes connections until the listener is closed.
func (t *TCP) accept() {
	for backoff := time.Duration(0); ; {
		nc, err := t.l.Accept()
		if err == nil {
			backoff = 0
			t.admit(nc)
			continue
		}
		select {
		case <-t.closing:
			return
		default:
		}
		t.n.cfg.Report("", fmt.Errorf("export: accept: %w", err))
		if errors.Is(err, net.ErrClosed) {
			return
		}
		// Out of descriptors or memory: others may give some back. Clients wait in the backlog meanwhile.
		backoff = min(max(2*backoff, 5*time.Millisecond), time.Second)
		select {
		case <-time.After(backoff):
		case <-t.closing:
			return
		}
	}
}

// admit serves a connection in the background, unless there are too many.
func (t *TCP) admit(nc net.Conn) {
	v := &visitor{n: t.n}
	var err error
	v.server, err = nbd.NewServer(nbd.Config{Exports: v, MaxConns: 1, TLS: t.config})
	t.mu.Lock()
	switch {
	case err != nil:
	case t.closed:
		err = ErrClosed
	case len(t.visitors) >= maxTCPConns:
		err = fmt.Errorf("export: %d connections are open: %w", len(t.visitors), nbd.ErrTooMany)
	default:
		t.visitors[v] = true
		t.wg.Go(func() { t.serve(v, nc) })
	}
	t.mu.Unlock()
	if err != nil {
		t.n.cfg.Report("", errors.Join(err, nc.Close()))
	}
}

// serve serves one connection until it ends.
func (t *TCP) serve(v *visitor, nc net.Conn) {
	err := v.server.ServeConn(nc)
	volume := t.n.leave(v)
	t.mu.Lock()
	delete(t.visitors, v)
	t.mu.Unlock()
	if err != nil && !errors.Is(err, nbd.ErrServerClosed) {
		t.n.cfg.Report(volume, err)
	}
}

// Drain stops listening; what clients sent is carried out and answered, until ctx ends, then their connections are cut.
func (t *TCP) Drain(ctx context.Context) error {
	return t.end(func(s *nbd.Server) error { return s.Drain(ctx) })
}

// Close is Drain without grace.
func (t *TCP) Close() error { return t.end((*nbd.Server).Close) }

func (t *TCP) end(how func(*nbd.Server) error) error {
	t.mu.Lock()
	var err error
	if !t.closed {
		t.closed = true
		close(t.closing)
		err = t.l.Close()
	}
	servers := make([]*nbd.Server, 0, len(t.visitors))
	for v := range t.visitors {
		servers = append(servers, v.server)
	}
	t.mu.Unlock()
	if ended := endServers(servers, how); ended != nil { // a call to a Device may be stuck: it is not waited for
		return errors.Join(err, ended)
	}
	t.wg.Wait()
	return err
}

// endServers ends servers all at once.
func endServers(servers []*nbd.Server, how func(*nbd.Server) error) error {
	errs := make([]error, len(servers))
	var wg sync.WaitGroup
	for i, s := range servers {
		wg.Go(func() { errs[i] = how(s) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Lookup implements nbd.Exports for one connection: from here on the volume knows it.
func (v *visitor) Lookup(name string) (nbd.Export, error) {
	v.n.mu.Lock()
	defer v.n.mu.Unlock()
	s := v.n.volumes[name]
	if v.n.closed || s == nil || s.server == nil || s.removing {
		return nbd.Export{}, nbd.ErrNoExport
	}
	if !s.visitors[v] {
		s.visitors[v] = true
		v.asked = append(v.asked, name)
	}
	return s.export, nil
}

// List implements nbd.Exports.
func (v *visitor) List() []nbd.Export {
	v.n.mu.Lock()
	defer v.n.mu.Unlock()
	var out []nbd.Export
	for _, s := range v.n.volumes {
		if s.server != nil && !s.removing {
			out = append(out, s.export)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

// leave forgets an ended connection, but not what it did; it returns what it asked for last.
func (n *NBD) leave(v *visitor) (volume string) {
	stats := v.server.Stats()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, volume = range v.asked {
		if s := n.volumes[volume]; s != nil && s.visitors[v] {
			delete(s.visitors, v)
			s.past = addStats(s.past, stats[volume])
		}
	}
	return volume
}

// addStats adds up what two servers did for a volume.
func addStats(a, b nbd.Stats) nbd.Stats {
	a.Conns += b.Conns
	a.Accepted += b.Accepted
	a.Reads += b.Reads
	a.Writes += b.Writes
	a.Flushes += b.Flushes
	a.Zeroes += b.Zeroes
	a.Statuses += b.Statuses
	a.Others += b.Others
	a.ReadBytes += b.ReadBytes
	a.WrittenBytes += b.WrittenBytes
	a.ZeroedBytes += b.ZeroedBytes
	a.Errors += b.Errors
	return a
}
