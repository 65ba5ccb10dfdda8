package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// errIdle: nothing arrived for the link's idle time.
var errIdle = errors.New("idle")

// errWoken: nothing more is read from this link, because the connection is to be served by another process.
var errWoken = errors.New("woken to be detached")

// link is a connection's byte stream. One goroutine reads at a time and one writes at a time; interrupt and closeRead may come from any.
type link interface {
	// read returns at least one byte, or io.EOF, errIdle, errWoken or another error.
	read(p []byte) (int, error)
	// write sends all of bufs, in order, and may change bufs.
	write(bufs [][]byte) error
	// park returns when a read would not block, and holds no thread meanwhile. Only a link that returns errIdle needs it.
	park() error
	// interrupt ends the stream both ways: a read and a write in progress return, later ones fail. It may be repeated.
	interrupt()
	// closeRead ends the reading side: what the client sent before is still read, then io.EOF. Writing goes on.
	closeRead()
	// close frees the link, after the reader and the writer have ended.
	close()
}

// peeker is a link that knows whether there is something to read.
type peeker interface{ pending() bool }

// newLink makes the best link for nc, and takes it over: a socket is driven by blocking system calls, which saves a round through the
// poller for every read; everything else goes through net.Conn.
func newLink(nc net.Conn, idle time.Duration) (link, error) {
	_, isUnix := nc.(*net.UnixConn)
	_, isTCP := nc.(*net.TCPConn)
	if !isUnix && !isTCP {
		promptOf(nc).hurry(true) // as a socket
		return &netLink{nc: nc}, nil
	}
	fd, err := dupConn(nc.(syscall.Conn))
	if err != nil {
		return nil, fmt.Errorf("nbd: take over socket: %w", err)
	}
	s := &socket{fd: fd}
	if isUnix {
		s.widen()
	}
	if err := s.block(idle); err != nil {
		s.close()
		return nil, err
	}
	// The duplicate keeps the connection; closing the original takes it out of the runtime's poller.
	if err := nc.Close(); err != nil {
		s.close()
		return nil, fmt.Errorf("nbd: take over socket: %w", err)
	}
	return s, nil
}

// dupConn duplicates the descriptor below c.
func dupConn(c syscall.Conn) (int, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	var dupErr error
	err = rc.Control(func(f uintptr) { fd, dupErr = unix.FcntlInt(f, unix.F_DUPFD_CLOEXEC, 0) })
	return fd, errors.Join(err, dupErr)
}

// socket is a link over a blocking socket.
type socket struct {
	fd    int
	woken atomic.Bool // wake was called: nothing more is read

	mu     sync.Mutex // guards the rest; and closed, so that interrupt never hits a descriptor that was used again
	closed bool
	parked *os.File // what park waits on
}

// block makes the socket blocking, with reads that end after idle with errIdle; zero is never.
func (s *socket) block(idle time.Duration) error {
	if err := unix.SetNonblock(s.fd, false); err != nil {
		return fmt.Errorf("nbd: make socket blocking: %w", err)
	}
	tv := unix.NsecToTimeval(idle.Nanoseconds())
	if err := unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return fmt.Errorf("nbd: set socket's idle time: %w", err)
	}
	return nil
}

// sendBufferBytes is how much of our replies the kernel holds for a client on a unix socket. The usual 208 KiB makes us sleep several times
// in every large reply. TCP sizes its buffers itself.
const sendBufferBytes = 1 << 20

// widen enlarges the send buffer as far as we may; a smaller one only costs time.
func (s *socket) widen() {
	if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBufferBytes); err != nil {
		_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBufferBytes)
	}
}

func (s *socket) read(p []byte) (int, error) {
	for {
		if s.woken.Load() {
			return 0, errWoken
		}
		n, err := unix.Read(s.fd, p)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return 0, errIdle
		case err != nil:
			return 0, os.NewSyscallError("read", err)
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

// iovMax is how many buffers one system call takes; up to here unix.Writev does not allocate.
const iovMax = 8

func (s *socket) write(bufs [][]byte) error {
	for len(bufs) > 0 {
		var n int
		var err error
		if len(bufs) == 1 {
			n, err = unix.Write(s.fd, bufs[0])
		} else {
			n, err = unix.Writev(s.fd, bufs[:min(len(bufs), iovMax)])
		}
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("write", err)
		}
		for len(bufs) > 0 && n >= len(bufs[0]) {
			n -= len(bufs[0])
			bufs = bufs[1:]
		}
		if n > 0 {
			bufs[0] = bufs[0][n:]
		}
	}
	return nil
}

// park waits in the runtime's poller, with a duplicate of the descriptor that lives only as long.
func (s *socket) park() error {
	fd, err := unix.FcntlInt(uintptr(s.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("nbd: park: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return errors.Join(fmt.Errorf("nbd: park: %w", err), unix.Close(fd))
	}
	f := os.NewFile(uintptr(fd), "nbd")
	defer f.Close()
	s.setParked(f)
	defer s.setParked(nil)
	rc, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("nbd: park: %w", err)
	}
	var one [1]byte
	err = rc.Read(func(fd uintptr) bool {
		_, _, err := unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return err != unix.EAGAIN && err != unix.EINTR
	})
	if err != nil && !s.woken.Load() {
		return fmt.Errorf("nbd: park: %w", err)
	}
	// The flag belongs to the open socket, not to the descriptor: it must be put back before the next blocking read.
	if err := unix.SetNonblock(s.fd, false); err != nil {
		return fmt.Errorf("nbd: park: %w", err)
	}
	return nil
}

// pending tells whether a byte has arrived that was not read.
func (s *socket) pending() bool {
	var one [1]byte
	n, _, err := unix.Recvfrom(s.fd, one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	return err == nil && n > 0
}

func (s *socket) setParked(f *os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.parked = f
	if f != nil && s.woken.Load() {
		_ = f.SetReadDeadline(time.Unix(1, 0)) // cannot fail: the poller has f
	}
}

// wake makes read and park return errWoken, later ones at once and a park in progress too. A read in progress returns when a signal
// interrupts it: see nudge.
func (s *socket) wake() {
	s.woken.Store(true)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.parked != nil {
		_ = s.parked.SetReadDeadline(time.Unix(1, 0))
	}
}

// release gives the descriptor away: the link is as if closed, but the socket goes on.
func (s *socket) release() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return s.fd
}

// nudge interrupts every read of every socket that has an idle time, once: such a read is not begun anew by the kernel (signal(7)), and
// those that were not woken begin again themselves. Which thread a read is blocked in, nobody knows without a system call before each.
// The signal is the one that Go interrupts its threads with anyway, which every program must put up with at any time. A read
// that begins just then is missed: the caller nudges until it sees the effect.
func nudge() error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return fmt.Errorf("nbd: list threads: %w", err)
	}
	pid := unix.Getpid()
	for _, t := range threads {
		if tid, err := strconv.Atoi(t.Name()); err == nil {
			_ = unix.Tgkill(pid, tid, unix.SIGURG) // a thread that has ended blocks in nothing
		}
	}
	return nil
}

func (s *socket) interrupt() { s.shutdown(unix.SHUT_RDWR) }

func (s *socket) closeRead() { s.shutdown(unix.SHUT_RD) }

// shutdown wakes whoever is blocked in the kernel. Its error is that the peer has gone already.
func (s *socket) shutdown(how int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		_ = unix.Shutdown(s.fd, how)
	}
}

func (s *socket) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		_ = unix.Close(s.fd) // nothing is buffered: there is nothing to learn from its error
	}
}

// netLink is a link over any net.Conn, or over TLS on one.
type netLink struct {
	nc  net.Conn
	tls *tls.Conn // nil without TLS
}

func (l *netLink) stream() net.Conn {
	if l.tls != nil {
		return l.tls
	}
	return l.nc
}

func (l *netLink) read(p []byte) (int, error) {
	n, err := l.stream().Read(p)
	if n > 0 {
		return n, nil
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return 0, io.EOF // closeRead's way to wake a stream that cannot be closed on one side
	}
	return 0, err
}

func (l *netLink) write(bufs [][]byte) error {
	n, out := 0, l.stream()
	for _, b := range bufs {
		n += len(b)
	}
	return promptOf(out).together(n, func() error {
		for _, b := range bufs {
			if _, err := out.Write(b); err != nil {
				return err
			}
		}
		return nil
	})
}

func (l *netLink) park() error { return nil }

func (l *netLink) interrupt() { _ = l.nc.Close() }

func (l *netLink) closeRead() { _ = l.nc.SetReadDeadline(time.Unix(1, 0)) }

// close tells a TLS client that this is the end and no cut wire.
func (l *netLink) close() {
	if l.tls != nil {
		_ = l.tls.CloseWrite()
	}
	_ = l.nc.Close()
}
