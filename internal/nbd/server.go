package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// ErrServerClosed: the server was closed or is draining.
var ErrServerClosed = errors.New("nbd server closed")

// ErrTooMany: the server has as many connections as it may have.
var ErrTooMany = errors.New("too many connections")

// idleAfter is how long a connection without traffic keeps its thread and its buffers.
const idleAfter = 5 * time.Second

// Config says what a Server serves and what it grants its clients.
type Config struct {
	// Exports is what is served; required.
	Exports Exports
	// MaxConns bounds the connections at one time; one more is closed at once. Zero means 1024.
	MaxConns int
	// TLS, if not nil, is required of every client (STARTTLS), and says which certificate is ours and whether and how clients'
	// are verified; before it nothing is told and nothing served. Nil: no TLS.
	TLS *tls.Config
	// NegotiationTimeout is how long a client may take to choose an export. Zero means 15 s.
	NegotiationTimeout time.Duration
	// Report, if not nil, is told of each connection that ended otherwise than by the client's leave. It may be called concurrently.
	Report func(error)
}

// check fills in defaults.
func (c Config) check() (Config, error) {
	if c.Exports == nil {
		return c, errors.New("nbd: config without exports")
	}
	if c.MaxConns <= 0 {
		c.MaxConns = 1024
	}
	if c.NegotiationTimeout <= 0 {
		c.NegotiationTimeout = 15 * time.Second
	}
	if c.Report == nil {
		c.Report = func(error) {}
	}
	return c, nil
}

// Server serves exports to NBD clients. All methods may be called concurrently.
//
// What survives a crash is the Device's affair: a reply to a write promises no more than WriteAt does, and a reply to a flush, or to a
// command with FUA, is sent only after Flush returned.
type Server struct {
	cfg  Config
	pool buffers
	idle time.Duration // before a quiet connection is parked; tests shorten it

	refused atomic.Uint64
	wg      sync.WaitGroup // connections of Serve
	closing chan struct{}  // closed with the server

	mu        sync.Mutex // guards the rest
	closed    bool       // nothing new is accepted
	listeners map[net.Listener]bool
	sessions  map[*session]bool
	nextID    uint64
	empty     chan struct{}        // closed when the last session and listener are gone; nil when nobody waits
	counters  map[string]*counters // by canonical export name
	away      map[string]bool      // canonical names of exports that were detached
}

// NewServer returns a Server that serves nobody yet.
func NewServer(cfg Config) (*Server, error) {
	cfg, err := cfg.check()
	if err != nil {
		return nil, err
	}
	return &Server{
		cfg: cfg, idle: idleAfter, closing: make(chan struct{}),
		listeners: map[net.Listener]bool{}, sessions: map[*session]bool{}, counters: map[string]*counters{},
		away: map[string]bool{},
	}, nil
}

// Serve accepts connections from l until the server is closed or drained (nil) or l fails, and closes l. Connections go on after it
// returned.
func (s *Server) Serve(l net.Listener) error {
	if !s.addListener(l) {
		return errors.Join(ErrServerClosed, l.Close())
	}
	defer s.removeListener(l)
	backoff := time.Duration(0)
	for {
		nc, err := l.Accept()
		switch {
		case err == nil:
			backoff = 0
			s.wg.Go(func() {
				if err := s.ServeConn(nc); err != nil && !errors.Is(err, ErrServerClosed) {
					s.cfg.Report(err)
				}
			})
		case s.isClosed():
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("nbd: accept: %w", err)
		default:
			// Out of descriptors or memory: others may give some back. Clients wait in the backlog meanwhile.
			s.cfg.Report(fmt.Errorf("nbd: accept: %w", err))
			backoff = min(max(2*backoff, 5*time.Millisecond), time.Second)
			select {
			case <-time.After(backoff):
			case <-s.closing:
			}
		}
	}
}

// ServeConn serves one client and closes nc. It returns nil when the client left in good order, ErrServerClosed when the server ended it,
// and else what went wrong; whatever a client does, the server and its other connections go on.
func (s *Server) ServeConn(nc net.Conn) error {
	// The deadline comes first: from the moment the session is known, the server may set its own.
	if err := nc.SetDeadline(time.Now().Add(s.cfg.NegotiationTimeout)); err != nil {
		return errors.Join(fmt.Errorf("nbd: set deadline: %w", err), nc.Close())
	}
	remote := ""
	if a := nc.RemoteAddr(); a != nil {
		remote = a.String()
	}
	ss, err := s.addSession(&netLink{nc: nc}, remote)
	if err != nil {
		return errors.Join(err, nc.Close())
	}
	defer s.removeSession(ss)
	return s.reason(ss, ss.serve(s, nc))
}

// reason is what ServeConn says of a session that ended with err.
func (s *Server) reason(ss *session, err error) error {
	switch {
	case errors.Is(err, errAborted):
		return nil
	case ss.stop.Load(), errors.Is(err, errWoken), err != nil && s.isClosed():
		return ErrServerClosed
	}
	return err
}

// Close ends all connections at once and waits until they and every call to a Device have returned. Requests that were not answered fail at
// the client. A Device that is stuck holds Close up; close the device, or use Drain with a context, which gives up waiting.
func (s *Server) Close() error {
	s.shut()
	for _, ss := range s.snapshot() {
		ss.interrupt()
	}
	<-s.whenEmpty()
	s.wg.Wait()
	return nil
}

// Drain stops accepting and reading; what clients sent before is carried out and answered, then their connections end. When ctx ends first,
// the rest is cut off as by Close, but not waited for, and ctx's error is returned.
func (s *Server) Drain(ctx context.Context) error {
	s.shut()
	for _, ss := range s.snapshot() {
		ss.closeRead()
	}
	select {
	case <-s.whenEmpty():
		return nil
	case <-ctx.Done():
	}
	for _, ss := range s.snapshot() {
		ss.interrupt()
	}
	return fmt.Errorf("nbd: drain: %w", ctx.Err())
}

// Stats returns what each export did, by its canonical name. Exports that no client asked for are missing.
func (s *Server) Stats() map[string]Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[string]Stats, len(s.counters))
	for name, c := range s.counters {
		out[name] = c.stats()
	}
	return out
}

// Refused returns how many connections were closed because there were MaxConns.
func (s *Server) Refused() uint64 { return s.refused.Load() }

// ConnInfo describes a connection.
type ConnInfo struct {
	ID         uint64 // unique in this server
	Remote     string // the client's address; empty for most unix sockets
	Since      time.Time
	Export     string // canonical name; empty during the negotiation
	Structured bool   // structured replies were negotiated
	TLS        bool   // the connection is encrypted
}

// Conns describes the connections that are open, in no order.
func (s *Server) Conns() []ConnInfo {
	var out []ConnInfo
	for _, ss := range s.snapshot() {
		ss.mu.Lock()
		out = append(out, ss.info)
		ss.mu.Unlock()
	}
	return out
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// shut stops everything that could bring new connections.
func (s *Server) shut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		close(s.closing)
	}
	for l := range s.listeners {
		_ = l.Close() // wakes Serve, which returns nil
	}
}

func (s *Server) snapshot() []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*session, 0, len(s.sessions))
	for ss := range s.sessions {
		out = append(out, ss)
	}
	return out
}

func (s *Server) addListener(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.listeners[l] = true
	return true
}

func (s *Server) removeListener(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = l.Close() // closed before by shut, perhaps
	delete(s.listeners, l)
	s.signalEmpty()
}

func (s *Server) addSession(l link, remote string) (*session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrServerClosed
	}
	if len(s.sessions) >= s.cfg.MaxConns {
		s.refused.Add(1)
		return nil, fmt.Errorf("nbd: %d connections are open: %w", len(s.sessions), ErrTooMany)
	}
	s.nextID++
	ss := &session{link: l, ended: make(chan struct{}), info: ConnInfo{ID: s.nextID, Remote: remote, Since: time.Now()}}
	s.sessions[ss] = true
	return ss, nil
}

func (s *Server) removeSession(ss *session) {
	ss.close()
	close(ss.ended)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, ss)
	s.signalEmpty()
}

// whenEmpty returns a channel that is closed once there is no session and no listener.
func (s *Server) whenEmpty() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.empty == nil {
		s.empty = make(chan struct{})
		s.signalEmpty()
	}
	return s.empty
}

// signalEmpty is called with mu held. A server that somebody waits for is closed: once empty it stays so.
func (s *Server) signalEmpty() {
	if s.empty == nil || len(s.sessions) > 0 || len(s.listeners) > 0 {
		return
	}
	select {
	case <-s.empty:
	default:
		close(s.empty)
	}
}

func (s *Server) countersOf(name string) *counters {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.counters[name]
	if c == nil {
		c = &counters{}
		s.counters[name] = c
	}
	return c
}

// session is a connection as its server sees it, in either phase.
type session struct {
	stop  atomic.Bool   // the server ends this connection
	ended chan struct{} // closed when it has ended, or was given away

	mu      sync.Mutex // guards the rest
	link    link
	chosen  bool // the client chose, or is about to be told that it did
	entered bool // link is transmission's
	leaving bool // Detach wants the connection, which has not entered
	cut     bool // interrupt was called
	drained bool // closeRead was called
	given   *Detached
	info    ConnInfo
}

// serve negotiates, changes over to the link that transmission uses, and transmits.
func (ss *session) serve(s *Server, nc net.Conn) error {
	h := &haggler{rw: nc, exports: present{s}, draining: s.isClosed, commit: ss.commit}
	var tc *tls.Conn
	if s.cfg.TLS != nil {
		h.secure = func() (io.ReadWriter, error) {
			in := Prompt(nc)
			promptOf(in).hurry(true)
			tc = tls.Server(in, s.cfg.TLS)
			if err := tc.Handshake(); err != nil {
				return nil, fmt.Errorf("nbd: %w handshake: %w", ErrTLS, err)
			}
			return tc, nil
		}
	}
	export, st, err := h.negotiate()
	if err != nil {
		if errors.Is(err, io.EOF) {
			return nil // the client only looked, or left between two options
		}
		return err
	}
	if err := nc.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("nbd: clear deadline: %w", err)
	}
	var l link = &netLink{tls: tc, nc: nc}
	if tc == nil {
		if l, err = newLink(nc, s.idle); err != nil {
			return err
		}
	}
	s.countersOf(export.Name).accepted.Add(1)
	ss.enter(l, st)
	return ss.transmit(s, transmission{export: export, state: st, link: l})
}

// transmit serves the requests of t until the connection ends or is given away (errWoken).
func (ss *session) transmit(s *Server, t transmission) error {
	t.pool, t.stats, t.stop = &s.pool, s.countersOf(t.export.Name), &ss.stop
	t.stats.conns.Add(1)
	defer t.stats.conns.Add(-1)
	left, err := transmit(t)
	if errors.Is(err, errWoken) {
		return errors.Join(err, ss.give(t, left))
	}
	return err
}

// commit notes what the client chooses: from here on a Detach does not cut the connection, which its client believes in as soon as it reads the
// reply.
func (ss *session) commit(e Export) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.chosen, ss.info.Export = true, e.Name
}

// enter makes l the session's link; what the server asked of the old one is asked of it too.
func (ss *session) enter(l link, st state) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.link, ss.chosen, ss.entered = l, true, true
	ss.info.Export, ss.info.Structured = st.Export, st.Structured
	if n, ok := l.(*netLink); ok {
		ss.info.TLS = n.tls != nil
	}
	if ss.leaving {
		ss.leave()
	}
	if ss.drained {
		l.closeRead()
	}
	if ss.cut {
		l.interrupt()
	}
}

func (ss *session) interrupt() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.interruptLocked()
}

// interruptLocked is interrupt for who holds mu.
func (ss *session) interruptLocked() {
	ss.cut = true
	ss.stop.Store(true)
	ss.link.interrupt()
}

func (ss *session) closeRead() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.drained = true
	ss.link.closeRead()
}

// close frees the link; the connection's goroutine is done with it.
func (ss *session) close() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.link.close()
}
