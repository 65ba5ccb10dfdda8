package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// Host is the process that has the replicas and sources. All methods may be called concurrently.
type Host interface {
	// OpenReplica returns a replica of this node, opened if it is not. ErrUnknown and ErrBusy, the sentinels of block and replica, and ServerConfig.Codes come back at the peer as what they are. ctx
	// ends with the Server.
	OpenReplica(ctx context.Context, replicaID string) (Served, error)
	// OpenSource opens something to be read: "image/DISKID/IMAGEID", or "layer/REPLICAID/LAYERID", of which it has the units that the layer has, the others being Absent. The Server closes dev.
	OpenSource(ctx context.Context, name string) (dev block.Device, info json.RawMessage, err error)
}

// Served is an open replica.
type Served struct {
	// Connect returns a connection of its own to it, not let in yet. Its Close must not be needed for the replica's to succeed.
	Connect func() replica.Replica
	// Release is called once, when every connection has been closed.
	Release func()
}

// ServerConfig says what a Server serves.
type ServerConfig struct {
	Host Host // required
	// MaxConns bounds the connections at one time; one more is closed at once. Zero: 1024.
	MaxConns int
	// Linger is how long a replica that nobody uses stays open, so that who lost a connection finds it. Zero: 10 s.
	Linger time.Duration
	// Beat is how often a peer that waits for a verb hears that it is under way. Zero: 1 s.
	Beat time.Duration
	// Patience is how long a peer may take to say what its connection is for, TLS included. Zero: 10 s.
	Patience time.Duration
	// Codes are further errors that cross the wire as what they are.
	Codes []Code
	Log   *slog.Logger // nil: none
}

func (c ServerConfig) defaults() ServerConfig {
	if c.MaxConns <= 0 {
		c.MaxConns = 1024
	}
	if c.Linger <= 0 {
		c.Linger = 10 * time.Second
	}
	if c.Beat <= 0 {
		c.Beat = time.Second
	}
	if c.Patience <= 0 {
		c.Patience = 10 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// deadPeer is after how long without an acknowledgement the kernel gives a client's connection up.
const deadPeer = 5 * time.Second

// Server serves replicas and sources to other nodes. All methods may be called concurrently.
type Server struct {
	cfg    ServerConfig
	life   context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // of connections
	http   *http.Server
	verbs  *inbox

	mu        sync.Mutex // guards the rest
	closed    bool
	listeners map[net.Listener]struct{}
	conns     map[net.Conn]struct{}
	bytes     map[*bytesConn]struct{}
	opened    map[string]*opened
}

// NewServer returns a Server that serves nobody yet.
func NewServer(cfg ServerConfig) *Server {
	s := &Server{cfg: cfg.defaults(), verbs: newInbox(), listeners: map[net.Listener]struct{}{}, conns: map[net.Conn]struct{}{}, bytes: map[*bytesConn]struct{}{},
		opened: map[string]*opened{}}
	s.life, s.cancel = context.WithCancel(context.Background())
	s.http = &http.Server{Handler: http.HandlerFunc(s.answer), ReadHeaderTimeout: s.cfg.Patience, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelWarn), BaseContext: func(net.Listener) context.Context { return s.life }}
	s.wg.Go(func() { _ = s.http.Serve(s.verbs) }) // until Close: an inbox does not fail
	return s
}

// Serve accepts connections of ln, plain or with TLS that was not shaken hands on, until ctx ends or the Server is closed (nil), or ln fails. It closes ln; connections go on.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return errors.Join(fmt.Errorf("serve replicas: %w", block.ErrClosed), ln.Close())
	}
	s.listeners[ln] = struct{}{}
	s.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer func() {
		stop()
		s.mu.Lock()
		delete(s.listeners, ln)
		s.mu.Unlock()
		_ = ln.Close() // closed before, perhaps
	}()
	for wait := time.Duration(0); ; {
		nc, err := ln.Accept()
		switch {
		case err == nil:
			wait = 0
			s.take(nc)
		case ctx.Err() != nil, s.life.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("serve replicas: %w", err)
		default: // out of descriptors, say: others may give some back
			s.cfg.Log.Warn("cannot accept a connection of another node", "err", err)
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			if rest(ctx, wait) != nil || s.life.Err() != nil {
				return nil
			}
		}
	}
}

// take serves a connection, if there is room.
func (s *Server) take(nc net.Conn) {
	s.mu.Lock()
	full := len(s.conns) >= s.cfg.MaxConns
	if s.closed || full {
		s.mu.Unlock()
		if full {
			s.cfg.Log.Warn("a connection of another node was refused: there are as many as there may be", "conns", s.cfg.MaxConns)
		}
		_ = nc.Close()
		return
	}
	s.conns[nc] = struct{}{}
	s.wg.Go(func() { s.serve(nc) })
	s.mu.Unlock()
}

// forget takes a connection off the list.
func (s *Server) forget(nc net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, nc)
}

// serve finds out what a connection is for, and serves that.
func (s *Server) serve(nc net.Conn) {
	tune(nc, deadPeer)
	var line [len(preambleBytes)]byte
	_ = nc.SetDeadline(time.Now().Add(s.cfg.Patience)) // a connection that has none is served all the same, by who closes it
	err := s.life.Err()                                // Close sets a deadline of its own, which ours may have undone
	if err == nil {
		_, err = io.ReadFull(nc, line[:])
	}
	switch {
	case err == nil && string(line[:]) == preambleVerbs:
		_ = nc.SetDeadline(time.Time{})
		if s.verbs.put(&counted{Conn: nc, s: s}) {
			return // the HTTP server closes it
		}
	case err == nil && string(line[:]) == preambleBytes:
		s.serveBytes(nc)
	case err == nil:
		s.cfg.Log.Warn("another node speaks a protocol that is not known here", "remote", nc.RemoteAddr(), "says", string(line[:]), "known", "1-1")
		refuse(nc)
	default:
		s.cfg.Log.Debug("a connection ended before it said what it is for", "remote", nc.RemoteAddr(), "err", err)
	}
	s.forget(nc)
	_ = nc.Close()
}

// refuse says what is known here and waits a moment for the other side to hear it: a connection that is closed with something unread is reset, and what was said last is lost with it.
func refuse(nc net.Conn) {
	_ = nc.SetDeadline(time.Now().Add(refuseWait))
	_, _ = io.WriteString(nc, refusalPrefix+"1-1\n")
	_, _ = io.CopyN(io.Discard, nc, 64<<10)
}

// refuseWait is how long who is refused may take to hear it.
const refuseWait = time.Second

// Drop ends every connection to a replica, waits until their calls have returned, and releases it before it returns. Who connects afterwards has it opened anew, if the Host does.
func (s *Server) Drop(replicaID string) {
	s.mu.Lock()
	o := s.opened[replicaID]
	s.mu.Unlock()
	if o != nil {
		s.end(o)
	}
}

// Close ends every connection and releases everything, and waits until all that has ended. A replica whose calls are stuck holds it up.
func (s *Server) Close() error {
	s.cancel()
	s.mu.Lock()
	s.closed = true
	for ln := range s.listeners {
		_ = ln.Close() // wakes Serve
	}
	var all []*opened
	for _, o := range s.opened {
		all = append(all, o)
	}
	for b := range s.bytes {
		b.cut()
	}
	for nc := range s.conns {
		_ = nc.SetDeadline(time.Unix(1, 0)) // whoever is reading the first line
	}
	s.mu.Unlock()
	_ = s.http.Close()
	s.verbs.end()
	var wg sync.WaitGroup
	for _, o := range all {
		wg.Go(func() { s.end(o) })
	}
	wg.Wait()
	s.wg.Wait()
	return nil
}

// counted is a connection that is taken off the list when it is closed.
type counted struct {
	net.Conn
	s    *Server
	once sync.Once
}

// Close implements net.Conn.
func (c *counted) Close() error {
	c.once.Do(func() { c.s.forget(c.Conn) })
	return c.Conn.Close()
}

// inbox is a listener of connections that were accepted elsewhere.
type inbox struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newInbox() *inbox { return &inbox{conns: make(chan net.Conn), done: make(chan struct{})} }

// put hands a connection on; false when nobody takes it any more.
func (b *inbox) put(nc net.Conn) bool {
	select {
	case b.conns <- nc:
		return true
	case <-b.done:
		return false
	}
}

func (b *inbox) end() { b.once.Do(func() { close(b.done) }) }

// Accept implements net.Listener.
func (b *inbox) Accept() (net.Conn, error) {
	select {
	case nc := <-b.conns:
		return nc, nil
	case <-b.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (b *inbox) Close() error {
	b.end()
	return nil
}

// Addr implements net.Listener.
func (b *inbox) Addr() net.Addr { return &net.UnixAddr{Name: "verbs", Net: "unix"} }
