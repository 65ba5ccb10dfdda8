package sim

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// Net is a network of streams between named hosts. A cut holds what is under way, in one direction, as TCP does while it sends again and again; Break ends connections.
type Net struct {
	mu      sync.Mutex
	hosts   map[string]*listener
	cuts    map[[2]string]bool
	late    map[[2]string]time.Duration
	changed chan struct{} // closed and replaced when cuts or late change
	conns   map[*wire]struct{}
	wg      sync.WaitGroup
}

// NewNet returns a network without hosts.
func NewNet() *Net {
	return &Net{hosts: map[string]*listener{}, cuts: map[[2]string]bool{}, late: map[[2]string]time.Duration{}, changed: make(chan struct{}), conns: map[*wire]struct{}{}}
}

// wire is a connection: what its two ends hold, and the middle that carries between them.
type wire struct {
	from, to string
	ends     [4]net.Conn
}

func (w *wire) close() {
	for _, c := range w.ends {
		c.Close()
	}
}

// Cut holds everything from one host to another, until it is called with Heal.
func (n *Net) Cut(from, to string) { n.change(func() { n.cuts[[2]string{from, to}] = true }) }

// Late makes everything from one host to another arrive d later.
func (n *Net) Late(from, to string, d time.Duration) {
	n.change(func() { n.late[[2]string{from, to}] = d })
}

// Heal ends all cuts and delays.
func (n *Net) Heal() {
	n.change(func() { clear(n.cuts); clear(n.late) })
}

// Break ends every connection to and from a host, as its processes' death does.
func (n *Net) Break(host string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for w := range n.conns {
		if w.from == host || w.to == host {
			w.close()
		}
	}
}

func (n *Net) change(edit func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	edit()
	close(n.changed)
	n.changed = make(chan struct{})
}

// look tells whether a direction is cut, how late it is, and when to look again.
func (n *Net) look(from, to string) (cut bool, late time.Duration, changed <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cuts[[2]string{from, to}], n.late[[2]string{from, to}], n.changed
}

// pass waits until something may go from one host to another.
func (n *Net) pass(ctx context.Context, from, to string) error {
	for waited := false; ; {
		cut, late, changed := n.look(from, to)
		if !cut && (waited || late == 0) {
			return nil
		}
		var timer <-chan time.Time
		if !cut {
			timer = time.After(late)
			changed = nil
		}
		select {
		case <-timer:
			waited = true
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Dial connects two hosts. While a direction is cut it waits for ctx; a host that does not listen refuses.
func (n *Net) Dial(ctx context.Context, from, to string) (net.Conn, error) {
	for _, d := range [][2]string{{from, to}, {to, from}} {
		if err := n.pass(ctx, d[0], d[1]); err != nil {
			return nil, fmt.Errorf("dial %s: %w", to, err)
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	ln := n.hosts[to]
	if ln == nil {
		return nil, fmt.Errorf("dial %s: %w", to, syscall.ECONNREFUSED)
	}
	near, nearMiddle := net.Pipe()
	farMiddle, far := net.Pipe()
	w := &wire{from: from, to: to, ends: [4]net.Conn{near, nearMiddle, farMiddle, far}}
	select {
	case ln.queue <- far:
	default:
		return nil, fmt.Errorf("dial %s: %w", to, syscall.ECONNREFUSED)
	}
	n.conns[w] = struct{}{}
	ctx, cancel := context.WithCancel(context.Background())
	var both sync.WaitGroup
	both.Add(2)
	n.wg.Go(func() { defer both.Done(); n.carry(ctx, w, nearMiddle, farMiddle); cancel() })
	n.wg.Go(func() {
		defer both.Done()
		back := &wire{from: to, to: from, ends: w.ends}
		n.carry(ctx, back, farMiddle, nearMiddle)
		cancel()
	})
	n.wg.Go(func() {
		both.Wait()
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.conns, w)
	})
	return near, nil
}

// carry takes what one end wrote to the other, until either is closed; an end that is closed is known on the other side only when that can be said.
func (n *Net) carry(ctx context.Context, w *wire, r, to net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		k, err := r.Read(buf)
		if err == nil || err == io.EOF {
			if perr := n.pass(ctx, w.from, w.to); perr != nil {
				err = perr
			}
		}
		if k > 0 && err == nil {
			_, err = to.Write(buf[:k])
		}
		if err != nil {
			w.close()
			return
		}
	}
}

// Close ends all connections and waits for what carried them.
func (n *Net) Close() {
	n.mu.Lock()
	for w := range n.conns {
		w.close()
	}
	n.mu.Unlock()
	n.wg.Wait()
}

// Listen takes a host's place on the network, from whoever had it.
func (n *Net) Listen(host string) net.Listener {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := &listener{net: n, host: host, queue: make(chan net.Conn, 64), closed: make(chan struct{})}
	n.hosts[host] = l
	return l
}

type listener struct {
	net    *Net
	host   string
	queue  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	case c := <-l.queue:
		return c, nil
	}
}

// Close implements net.Listener. Connections that nobody accepted end.
func (l *listener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.net.mu.Lock()
		defer l.net.mu.Unlock()
		if l.net.hosts[l.host] == l {
			delete(l.net.hosts, l.host)
		}
		for {
			select {
			case c := <-l.queue:
				c.Close()
			default:
				return
			}
		}
	})
	return nil
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return address(l.host) }

type address string

func (a address) Network() string { return "sim" }

func (a address) String() string { return string(a) }
