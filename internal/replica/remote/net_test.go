package remote

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

var (
	errCut     = errors.New("connection reset by the test")
	errRefused = errors.New("connection refused by the test")
)

// fate is what becomes of a connection.
type fate struct {
	after int64 // bytes, of both directions together, until it happens; 0: never
	hole  bool  // nothing arrives any more, and nobody is told; else it is cut
	delay time.Duration
}

// network connects a Dial with listeners, through connections that can fail.
type network struct {
	mu    sync.Mutex
	ln    *listener // nil: nobody listens
	conns map[*pipe]struct{}
	next  func() fate // of the next connection; nil: none fails
	dials int
}

func newNetwork() *network { return &network{conns: map[*pipe]struct{}{}} }

// listen makes the listener that dials reach from now on.
func (n *network) listen() *listener {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ln = &listener{conns: make(chan net.Conn, 64), done: make(chan struct{})}
	return n.ln
}

// away makes dials fail.
func (n *network) away() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ln = nil
}

// dial is a Dial.
func (n *network) dial(ctx context.Context) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dials++
	if n.ln == nil || ctx.Err() != nil {
		return nil, errRefused
	}
	p := newPipe()
	if n.next != nil {
		p.fate = n.next()
	}
	n.conns[p] = struct{}{}
	select {
	case <-n.ln.done:
		return nil, errRefused
	case n.ln.conns <- p.b:
		return p.a, nil
	}
}

// dialed is how often somebody connected, or tried.
func (n *network) dialed() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dials
}

// each does something to every connection that there is.
func (n *network) each(f func(*pipe)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for p := range n.conns {
		f(p)
	}
}

// cut resets every connection.
func (n *network) cut() {
	n.each(func(p *pipe) { p.end(errCut) })
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.conns)
}

// swallow makes every connection a black hole.
func (n *network) swallow() { n.each(func(p *pipe) { p.swallow() }) }

type listener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case nc := <-l.conns:
		return nc, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *listener) Addr() net.Addr { return testAddr{} }

type testAddr struct{}

func (testAddr) Network() string { return "test" }
func (testAddr) String() string  { return "test" }

// pipe is a connection with a buffer each way.
type pipe struct {
	mu     sync.Mutex
	cond   sync.Cond
	a, b   *side
	passed int64
	fate   fate
	hole   bool
	kind   string // the first thing that was written
	err    error  // after a cut
}

// side is one end of a pipe.
type side struct {
	p      *pipe
	peer   *side
	in     []byte // what the peer wrote and we did not read
	closed bool
	until  [2]time.Time // read and write deadlines
	timers [2]*time.Timer
}

const pipeBuffer = 256 << 10

func newPipe() *pipe {
	p := &pipe{}
	p.cond.L = &p.mu
	p.a, p.b = &side{p: p}, &side{p: p}
	p.a.peer, p.b.peer = p.b, p.a
	return p
}

func (p *pipe) end(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.endLocked(err)
}

func (p *pipe) endLocked(err error) {
	if p.err == nil {
		p.err = err
	}
	p.cond.Broadcast()
}

func (p *pipe) swallow() { p.swallowIf("") }

// swallowIf makes the connection a black hole if it is of a kind.
func (p *pipe) swallowIf(kind string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if kind != "" && p.kind != kind {
		return
	}
	p.hole = true
	p.cond.Broadcast()
}

// pass counts n bytes and returns how many of them pass before the connection's fate.
func (p *pipe) pass(n int) int {
	if p.fate.after == 0 {
		return n
	}
	left := p.fate.after - p.passed
	p.passed += int64(n)
	if int64(n) < left {
		return n
	}
	if p.fate.hole {
		p.hole = true
	} else {
		p.endLocked(errCut)
	}
	return int(max(left, 0))
}

func (s *side) late(i int) bool { return !s.until[i].IsZero() && !time.Now().Before(s.until[i]) }

func (s *side) Read(b []byte) (int, error) {
	p := s.p
	if p.fate.delay > 0 {
		<-time.After(p.fate.delay)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case s.closed:
			return 0, net.ErrClosed
		case p.err != nil:
			return 0, p.err
		case s.late(0):
			return 0, os.ErrDeadlineExceeded
		case len(b) == 0:
			return 0, nil
		case p.hole:
		case len(s.in) > 0:
			n := copy(b, s.in)
			s.in = s.in[n:]
			p.cond.Broadcast()
			return n, nil
		case s.peer.closed:
			return 0, io.EOF
		}
		p.cond.Wait()
	}
}

func (s *side) Write(b []byte) (done int, err error) {
	p := s.p
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.kind == "" {
		p.kind = string(b)
	}
	for done < len(b) {
		switch {
		case s.closed:
			return done, net.ErrClosed
		case p.err != nil:
			return done, p.err
		case s.late(1):
			return done, os.ErrDeadlineExceeded
		case s.peer.closed && !p.hole:
			return done, errCut
		case p.hole || len(s.peer.in) >= pipeBuffer:
			p.cond.Wait()
			continue
		}
		n := min(len(b)-done, pipeBuffer-len(s.peer.in))
		ok := p.pass(n)
		s.peer.in = append(s.peer.in, b[done:done+ok]...)
		done += n
		p.cond.Broadcast()
	}
	return done, nil
}

func (s *side) Close() error {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	s.closed = true
	for _, t := range s.timers {
		if t != nil {
			t.Stop()
		}
	}
	s.p.cond.Broadcast()
	return nil
}

func (s *side) setDeadline(i int, t time.Time) {
	if s.timers[i] != nil {
		s.timers[i].Stop()
		s.timers[i] = nil
	}
	s.until[i] = t
	if d := time.Until(t); !t.IsZero() && d > 0 {
		s.timers[i] = time.AfterFunc(d, func() {
			s.p.mu.Lock()
			defer s.p.mu.Unlock()
			s.p.cond.Broadcast()
		})
	}
	s.p.cond.Broadcast()
}

func (s *side) SetDeadline(t time.Time) error {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.setDeadline(0, t)
	s.setDeadline(1, t)
	return nil
}

func (s *side) SetReadDeadline(t time.Time) error {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.setDeadline(0, t)
	return nil
}

func (s *side) SetWriteDeadline(t time.Time) error {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.setDeadline(1, t)
	return nil
}

func (s *side) LocalAddr() net.Addr  { return testAddr{} }
func (s *side) RemoteAddr() net.Addr { return testAddr{} }
