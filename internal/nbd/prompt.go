package nbd

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// promptWait is how long a prompt read holds a thread, waiting in the kernel, before it waits in the runtime's poller.
	promptWait = 10 * time.Millisecond
	// recordBytes is what TLS sends at most at once, of its own accord, and corkBytes what a corked stream does.
	recordBytes = 16 << 10
	corkBytes   = 128 << 10
)

// promptConn is a socket that can be told that an answer is about to come, and that more is about to be written. A TLS connection over it then does neither pay for the way through the runtime's poller,
// where one thread is woken to wake another, nor for a system call per record.
//
// As any net.Conn it has one reader and one writer at a time, and may be closed by anybody: a read that waits in the kernel ends up to promptWait later, which also goes for deadlines.
type promptConn struct {
	net.Conn
	raw   syscall.RawConn
	hasty atomic.Bool

	mu     sync.Mutex // guards the rest; held while it is written
	corked bool
	kept   []byte // what was written since it was corked
}

// Prompt returns nc in a form in which a Client or Server on it, also through TLS, is quicker; or nc itself, when it is no socket. It is nc all the same: who has the one has the other.
func Prompt(nc net.Conn) net.Conn {
	switch nc.(type) {
	case *net.TCPConn, *net.UnixConn:
		if raw, err := nc.(syscall.Conn).SyscallConn(); err == nil {
			return &promptConn{Conn: nc, raw: raw}
		}
	}
	return nc
}

// NetConn returns what it is made of, as crypto/tls.Conn's does.
func (p *promptConn) NetConn() net.Conn { return p.Conn }

// promptOf returns the promptConn that nc is, or is made of; nil if there is none, which is as good as one that is never told anything.
func promptOf(nc net.Conn) *promptConn {
	for {
		if p, ok := nc.(*promptConn); ok {
			return p
		}
		outer, ok := nc.(interface{ NetConn() net.Conn })
		if !ok {
			return nil
		}
		nc = outer.NetConn()
	}
}

// hurry says whether reads are worth holding a thread from now on.
func (p *promptConn) hurry(yes bool) {
	if p != nil {
		p.hasty.Store(yes)
	}
}

// Read implements net.Conn.
func (p *promptConn) Read(b []byte) (n int, err error) {
	if !p.hasty.Load() || len(b) == 0 {
		return p.Conn.Read(b)
	}
	waited := false
	gone := p.raw.Read(func(fd uintptr) bool {
		for {
			n, err = unix.Read(int(fd), b)
			switch {
			case err == unix.EINTR:
			case err == unix.EAGAIN && !waited:
				waited = true
				_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(promptWait.Milliseconds())) // what it says, the next read says
			default:
				return err != unix.EAGAIN // else the poller waits, and comes again
			}
		}
	})
	switch {
	case gone != nil:
		return 0, gone
	case err != nil:
		return 0, os.NewSyscallError("read", err)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// Write implements net.Conn.
func (p *promptConn) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.corked {
		return p.Conn.Write(b)
	}
	if len(p.kept)+len(b) > corkBytes {
		if err := p.pour(); err != nil {
			return 0, err
		}
	}
	p.kept = append(p.kept, b...)
	return len(b), nil
}

// pour writes what was kept back; mu is held.
func (p *promptConn) pour() error {
	b := p.kept
	p.kept = p.kept[:0]
	if len(b) == 0 {
		return nil
	}
	_, err := p.Conn.Write(b)
	return err
}

// together calls write, and sends what it writes n bytes of with few system calls, if it is worth it.
func (p *promptConn) together(n int, write func() error) error {
	if p == nil || n <= recordBytes {
		return write()
	}
	p.cork(true)
	err := write()
	return errors.Join(err, p.cork(false))
}

func (p *promptConn) cork(yes bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.corked = yes
	if yes {
		if p.kept == nil {
			p.kept = make([]byte, 0, corkBytes)
		}
		return nil
	}
	return p.pour()
}
