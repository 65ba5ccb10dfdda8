package remote

import (
	"context"
	"errors"
	"fmt"
	"net"

	"ashlar/internal/block"
	"ashlar/internal/nbd"
	"ashlar/internal/replica"
)

// bytesConn is an NBD connection, and what it uses. It is the Exports of an nbd.Server of its own, so that it can be ended alone.
type bytesConn struct {
	s     *Server
	nbd   *nbd.Server
	ended chan struct{} // closed once nothing is used any more

	export *nbd.Export  // chosen; only the negotiation touches it
	dev    block.Device // a snapshot's or a source's, ours to close; the same

	// Guarded by the Server's mu.
	o     *opened
	seat  *seat
	token string
}

// uses tells whether b uses a replica; the Server's mu is held.
func (b *bytesConn) uses(o *opened) bool { return b.o == o }

// sitsOn tells whether b is the writer's connection t; the Server's mu is held.
func (b *bytesConn) sitsOn(t *seat) bool { return b.seat == t }

// cut ends the connection, and does not wait for that.
func (b *bytesConn) cut() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = b.nbd.Drain(ctx) // says that it did not wait
}

// serveBytes serves an NBD connection until it ends and every call it made has returned.
func (s *Server) serveBytes(nc net.Conn) {
	b := &bytesConn{s: s, ended: make(chan struct{})}
	var err error
	if b.nbd, err = nbd.NewServer(nbd.Config{Exports: b, MaxConns: 1, NegotiationTimeout: s.cfg.Patience}); err != nil {
		return
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.bytes[b] = struct{}{}
	s.mu.Unlock()
	remote := nc.RemoteAddr()
	if err := b.nbd.ServeConn(nc); err != nil && !errors.Is(err, nbd.ErrServerClosed) {
		s.cfg.Log.Debug("connection of another node ended", "remote", remote, "err", err)
	}
	s.vacate(b)
}

// vacate gives back what a connection used.
func (s *Server) vacate(b *bytesConn) {
	if b.dev != nil {
		if err := b.dev.Close(); err != nil && !errors.Is(err, block.ErrClosed) {
			s.cfg.Log.Warn("close what another node has read", "export", b.export.Name, "err", err)
		}
	}
	s.mu.Lock()
	delete(s.bytes, b)
	o, t := b.o, b.seat
	s.mu.Unlock()
	if t != nil {
		s.leave(t)
	}
	if o != nil {
		s.release(o)
	}
	close(b.ended)
}

// Lookup implements nbd.Exports. A connection has one export.
func (b *bytesConn) Lookup(name string) (nbd.Export, error) {
	if b.export != nil {
		if b.export.Name != name {
			return nbd.Export{}, nbd.ErrNoExport
		}
		return *b.export, nil
	}
	n, ok := parseName(name)
	if !ok {
		return nbd.Export{}, nbd.ErrNoExport
	}
	e := nbd.Export{Name: name, States: true, Errno: errnoOf, ReadOnly: n.kind != kindReplica}
	var err error
	switch n.kind {
	case kindReplica:
		e.Device, err = b.replica(n)
	case kindSnapshot:
		e.Device, err = b.snapshot(n)
	case kindSource:
		e.Device, _, err = b.s.cfg.Host.OpenSource(b.s.life, n.source)
		b.dev = e.Device
		if w, ok := e.Device.(interface{ MayWait() bool }); ok { // it is read at a rate, and must not keep this end from showing that it lives
			e.MayWait = w.MayWait
		}
	}
	if err != nil {
		b.s.cfg.Log.Debug("another node asks for what is not to be had", "export", name, "err", err)
		return nbd.Export{}, fmt.Errorf("%w: %w", nbd.ErrNoExport, err)
	}
	b.export = &e
	return e, nil
}

// List implements nbd.Exports: who is entitled knows the names.
func (b *bytesConn) List() []nbd.Export { return nil }

// replica takes the seat of exactly the writer that was let in last.
func (b *bytesConn) replica(n exportName) (block.Device, error) {
	o, err := b.join(n)
	if err != nil {
		return nil, err
	}
	t, err := b.s.use(o, n.writer)
	if err != nil {
		return nil, err
	}
	b.s.mu.Lock()
	b.seat = t
	over := t.over
	b.s.mu.Unlock()
	if over {
		return nil, fmt.Errorf("replica %s: %w", o.id, block.ErrFenced)
	}
	return t.r, nil
}

// snapshot opens one.
func (b *bytesConn) snapshot(n exportName) (block.Device, error) {
	o, err := b.join(n)
	if err != nil {
		return nil, err
	}
	b.dev, err = o.watch.OpenSnapshot(n.layer)
	return b.dev, err
}

// join makes the connection one that uses a replica, unless it did before, for another attempt.
func (b *bytesConn) join(n exportName) (*opened, error) {
	b.s.mu.Lock()
	used := b.o != nil
	b.s.mu.Unlock()
	if used {
		return nil, fmt.Errorf("a second export on one connection: %w", replica.ErrNoSnapshot)
	}
	o, err := b.s.acquire(b.s.life, n.replica)
	if err != nil {
		return nil, err
	}
	b.s.mu.Lock()
	ending := o.ending
	if !ending {
		b.o, b.token = o, n.token
	}
	b.s.mu.Unlock()
	if ending { // too late to be cut
		b.s.release(o)
		return nil, fmt.Errorf("replica %s: %w", o.id, block.ErrClosed)
	}
	return o, nil
}
