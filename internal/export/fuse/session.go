package fuse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/block"
)

// ErrClosed: the session was detached or closed, or its mount has ended.
var ErrClosed = errors.New("fuse session closed")

// ErrVersion: the kernel's FUSE is too old (below 7.28, Linux 4.20), or of another major version.
var ErrVersion = errors.New("kernel's FUSE protocol not supported")

// Config says what a session serves.
type Config struct {
	// Device has the file's bytes; required. It stays the caller's. The file's size is the Device's at each moment.
	Device block.Device
	// ReadOnly refuses writes, zeroing and discards with EROFS.
	ReadOnly bool
	// Buffers lends memory; required.
	Buffers *Buffers
	// Background is how many reads and writes the kernel may have under way at once; default 64. It bounds goroutines and, with bigAtOnce, memory.
	Background int
	// Workers is how many goroutines may answer requests that are not slow; default one for each processor, at most 4.
	Workers int
	// WithoutResend does as on a kernel that cannot send requests again, for tests.
	WithoutResend bool
	// Report, if not nil, is told once per failure of the Device, and of a session that ends by itself; concurrently.
	Report func(error)
}

func (c Config) check() (Config, error) {
	if c.Device == nil || c.Buffers == nil {
		return c, errors.New("fuse: config without device or buffers")
	}
	if c.Background == 0 {
		c.Background = 64
	}
	if c.Workers == 0 {
		c.Workers = min(4, runtime.GOMAXPROCS(0))
	}
	if c.Background < 1 || c.Background > 1<<15 || c.Workers < 1 {
		return c, fmt.Errorf("fuse: config with %d background requests and %d workers", c.Background, c.Workers)
	}
	if c.Report == nil {
		c.Report = func(error) {}
	}
	return c, nil
}

// Stats counts what a session did since it was started in this process.
type Stats struct {
	Reads, Writes, Flushes, Zeroes uint64
	ReadBytes, WrittenBytes        uint64
	Errors                         uint64 // of the Device
	Resent                         uint64 // requests that the kernel sent again
	Opens                          int64  // descriptors of the file opened here, less those released here: below zero if others opened them
}

// Session serves one mount. All methods may be called concurrently.
//
// Few goroutines read: one, and up to Workers while requests come without a pause. A request that is slow by nature (a flush, a zeroing), or on a device that
// was slow lately when it does not come alone, is served by a goroutine that no longer counts as a reader, and another takes its place first: no request waits for a slow one,
// and the kernel's bound on background requests is the bound on goroutines. A small one takes a buffer of its size along, a big one the reader's;
// of these there are bigAtOnce at most, then the reader waits.
type Session struct {
	cfg     Config
	file    *os.File // non-blocking, so that a deadline ends a wait
	fd      int      // file's, valid until the workers are gone
	conn    syscall.RawConn
	resends bool

	wg sync.WaitGroup // workers

	mu       sync.Mutex // guards the rest and the file's deadline
	readers  int        // workers that read, wait, or serve what is not slow
	workers  int        // all of them
	stopping bool
	ended    bool          // the kernel ended the session
	drained  chan struct{} // closed when the last worker leaves a session that is stopping

	handed atomic.Int32 // how many requests are under way without the reader
	big    atomic.Int32 // how many big requests are under way
	slow   atomic.Int32 // how many further requests are taken to be slow
	stats  counters
}

type counters struct {
	reads, writes, flushes, zeroes, readBytes, writtenBytes, errors, resent atomic.Uint64
	opens                                                                   atomic.Int64
}

// Negotiate answers the INIT of a descriptor of /dev/fuse that was just mounted, and serves. It takes f over, also when it fails.
// ErrVersion: the kernel is too old. The root of the mount must be a regular file (rootmode=100000).
func Negotiate(ctx context.Context, f *os.File, cfg Config) (*Session, error) {
	s, err := newSession(f, cfg)
	if err != nil {
		return nil, err
	}
	// A cancelled context ends the wait for INIT, which otherwise comes at once.
	stop := context.AfterFunc(ctx, func() { s.file.SetReadDeadline(time.Unix(1, 0)) }) //nolint:errcheck // then it waits for INIT
	err = s.init()
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("fuse: negotiate: %w", err), s.file.Close())
	}
	s.start()
	return s, nil
}

// Adopt serves a session that another process negotiated, and asks the kernel for all requests that were read and never answered.
// It takes f over, also when it fails. The process that served before must be gone, or have detached: two would share the requests out.
// ErrClosed: the mount has ended.
func Adopt(f *os.File, cfg Config) (*Session, error) {
	s, err := newSession(f, cfg)
	if err != nil {
		return nil, err
	}
	fds := []unix.PollFd{{Fd: int32(s.fd)}}
	if _, err := unix.Poll(fds, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("fuse: adopt: %w", err), s.file.Close())
	}
	if fds[0].Revents&unix.POLLERR != 0 {
		return nil, errors.Join(fmt.Errorf("fuse: adopt: %w", ErrClosed), s.file.Close())
	}
	if cfg.WithoutResend {
		s.start()
		return s, nil
	}
	var b [outHeaderBytes]byte
	putOutHeader(b[:], 0, notifyResend, 0)
	switch _, err := unix.Write(s.fd, b[:]); {
	case err == nil:
		s.resends = true
	case errors.Is(err, unix.EINVAL): // a kernel that does not know the notification: whoever served before detached, and has answered
	default:
		return nil, errors.Join(fmt.Errorf("fuse: ask for requests again: %w", err), s.file.Close())
	}
	s.start()
	return s, nil
}

// newSession makes f its own, non-blocking and known to the runtime's poller.
func newSession(f *os.File, cfg Config) (*Session, error) {
	cfg, err := cfg.check()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	file, err := NonBlocking(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return nil, errors.Join(fmt.Errorf("fuse: descriptor: %w", err), file.Close())
	}
	s := &Session{cfg: cfg, file: file}
	if s.conn, err = file.SyscallConn(); err == nil {
		err = s.conn.Control(func(fd uintptr) { s.fd = int(fd) })
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("fuse: descriptor: %w", err), file.Close())
	}
	return s, nil
}

// NonBlocking returns a duplicate of f that waits in the runtime's poller and takes deadlines. The mode is one of the open file, and f's too.
func NonBlocking(f *os.File) (*os.File, error) {
	c, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("fuse: descriptor: %w", err)
	}
	var dup int
	if ctlErr := c.Control(func(fd uintptr) {
		if err = unix.SetNonblock(int(fd), true); err == nil {
			dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
		}
	}); ctlErr != nil {
		return nil, fmt.Errorf("fuse: descriptor: %w", ctlErr)
	}
	if err != nil {
		return nil, fmt.Errorf("fuse: descriptor: %w", err)
	}
	return os.NewFile(uintptr(dup), f.Name()), nil
}

// init reads INIT and answers it.
func (s *Session) init() error {
	b, err := s.cfg.Buffers.get()
	if err != nil {
		return err
	}
	defer s.cfg.Buffers.put(b)
	if err := s.ready(); err != nil {
		return err
	}
	n, err := s.read(b)
	if err != nil {
		return err
	}
	req, err := Parse(b.message(n))
	if err != nil {
		return err
	}
	if req.Op != OpInit {
		return fmt.Errorf("request %d before INIT: %w", req.Op, ErrMalformed)
	}
	if req.Major != protocolMajor || req.Minor < minMinor {
		return errors.Join(fmt.Errorf("it speaks %d.%d, needed is %d.%d: %w", req.Major, req.Minor, protocolMajor, minMinor, ErrVersion),
			s.reply(b, req, unix.EPROTO, nil))
	}
	s.resends = req.Flags&initHasResend != 0 && !s.cfg.WithoutResend
	const want = initAsyncRead | initBigWrites | initAsyncDIO | initMaxPages | initExt | initHasResend
	n = putInit(b.data, req.Minor, req.Flags&want, s.cfg.Background)
	return s.reply(b, req, 0, b.data[:n])
}

func (s *Session) start() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spawn()
}

// spawn starts a reader. The caller holds mu.
func (s *Session) spawn() {
	s.readers++
	s.workers++
	s.wg.Go(func() {
		s.work()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.workers--; s.workers == 0 && s.stopping {
			close(s.drained)
		}
	})
}

// Resends tells whether the kernel can send again what a dead process had read: if not, such requests would never end, and the descriptor must
// die with the process.
func (s *Session) Resends() bool { return s.resends }

// Stats returns what was done so far.
func (s *Session) Stats() Stats {
	c := &s.stats
	return Stats{Reads: c.reads.Load(), Writes: c.writes.Load(), Flushes: c.flushes.Load(), Zeroes: c.zeroes.Load(),
		ReadBytes: c.readBytes.Load(), WrittenBytes: c.writtenBytes.Load(), Errors: c.errors.Load(), Resent: c.resent.Load(), Opens: c.opens.Load()}
}

// Dup returns another descriptor of the session, to be kept: as long as there is one, the mount lives, and requests wait.
func (s *Session) Dup() (*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, err := NonBlocking(s.file)
	if err != nil {
		return nil, fmt.Errorf("fuse: keep session: %w", err)
	}
	return f, nil
}

// Detach stops reading, waits until every request that was read is answered, and closes the descriptor. If another of it is kept, requests wait in the
// kernel from then on. If ctx ends first its cause is returned, and the session goes on as before. The Device must answer meanwhile: a held Gate holds Detach up.
func (s *Session) Detach(ctx context.Context) error {
	if !s.pause() {
		return fmt.Errorf("fuse: detach: %w", ErrClosed)
	}
	select {
	case <-s.drained:
		s.wg.Wait()
		if err := s.file.Close(); err != nil {
			return fmt.Errorf("fuse: detach: %w", err)
		}
		return nil
	case <-ctx.Done():
		s.resume()
		return fmt.Errorf("fuse: detach: requests are still under way: %w", context.Cause(ctx))
	}
}

// pause has all workers stop after the request that each is at; false if the session is stopped already.
func (s *Session) pause() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	s.stopping, s.drained = true, make(chan struct{})
	if s.workers == 0 {
		close(s.drained)
	}
	s.file.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // the descriptor is pollable, or newSession's first wait had failed
	return true
}

// resume takes pause back.
func (s *Session) resume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopping = false
	s.file.SetReadDeadline(time.Time{}) //nolint:errcheck // as in pause
	if s.readers == 0 {
		s.spawn()
	}
}

// Close waits for the Device calls under way, and closes the descriptor without further answers: unless another is kept, the mount ends, and its users get errors.
// Closing twice is harmless.
func (s *Session) Close() error {
	if !s.pause() {
		return nil
	}
	s.wg.Wait()
	if err := s.file.Close(); err != nil {
		return fmt.Errorf("fuse: close: %w", err)
	}
	return nil
}

// work reads requests and serves them until the session stops or there are enough other readers. While it waits it has no buffer.
func (s *Session) work() {
	b := s.buffer()
	defer func() { s.cfg.Buffers.put(b) }()
	streak := 0
	for b != nil {
		n, err := s.read(b)
		if errors.Is(err, unix.EAGAIN) {
			streak = 0
			if !s.stay() {
				return
			}
			s.cfg.Buffers.put(b)
			err = s.ready()
			if b = s.buffer(); err == nil {
				continue
			}
		}
		if err != nil {
			if s.over(err) {
				return
			}
			continue
		}
		if streak++; streak%busyStreak == 0 {
			s.help()
		}
		more := false
		if b, more = s.handle(b, n, streak); !more {
			return
		}
	}
}

// buffer waits until there is memory: a session without a reader would hold its users up for ever. It returns nil, and counts the reader out, if the session stops meanwhile.
func (s *Session) buffer() *buffer {
	for try := 0; ; try++ {
		b, err := s.cfg.Buffers.get()
		if err == nil {
			return b
		}
		if try == 0 {
			s.cfg.Report(err)
		}
		<-time.After(memoryRetry)
		if !s.more() {
			return nil
		}
	}
}

// memoryRetry is how long after a failure memory is asked for again.
const memoryRetry = 100 * time.Millisecond

// busyStreak is how many requests a worker reads without having to wait before another one helps.
const busyStreak = 16

// handle serves the message of n bytes in b, the streak-th without a wait, and returns the buffer to go on with; false if this worker is not needed any more.
func (s *Session) handle(b *buffer, n, streak int) (*buffer, bool) {
	req, err := Parse(b.message(n))
	if err != nil {
		s.cfg.Report(err)
		if req.Unique != 0 && req.Reply() {
			s.answer(b, req, unix.EIO, nil)
		}
		return b, s.more()
	}
	if req.Resent() {
		s.stats.resent.Add(1)
	}
	// A small request that comes alone holds nobody up so far; whoever sends one at a time is served fastest without a hand-over.
	alone := streak == 1 && s.handed.Load() == 0
	if !s.mayBlock(req) || (alone && req.small()) {
		s.serve(b, req)
		return b, s.more()
	}
	if !req.big() {
		small := newSmall(&req)
		s.cfg.Buffers.put(b)
		s.handed.Add(1)
		s.handOff()
		s.serve(small, req)
		s.handed.Add(-1)
		if !s.rejoin() {
			return nil, false
		}
		return s.buffer(), true
	}
	defer s.big.Add(-1)
	if s.big.Add(1) > bigAtOnce {
		// The bound on memory: what comes after waits in the kernel.
		s.serve(b, req)
		return b, s.more()
	}
	s.handed.Add(1)
	s.handOff()
	s.serve(b, req)
	s.handed.Add(-1)
	return b, s.rejoin()
}

// bigAtOnce is how many reads and writes of more than bigAbove bytes a session carries out at once without its reader: with one more, that is how many whole buffers it may have.
const bigAtOnce = 16

// more tells a reader whether to go on.
func (s *Session) more() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		s.readers--
	}
	return !s.stopping
}

// stay tells a reader that found nothing to read whether it is the one that waits.
func (s *Session) stay() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping || s.readers > 1 {
		s.readers--
		return false
	}
	return true
}

// help starts another reader, if there may be one.
func (s *Session) help() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.stopping && s.readers < s.cfg.Workers {
		s.spawn()
	}
}

// handOff makes this worker no reader any more, and sees to it that there is one.
func (s *Session) handOff() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readers--
	if s.readers == 0 && !s.stopping {
		s.spawn()
	}
}

// rejoin makes this worker a reader again if there is none.
func (s *Session) rejoin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping || s.readers > 0 {
		return false
	}
	s.readers++
	return true
}

// over tells a reader whether an error of reading is the end.
func (s *Session) over(err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.stopping:
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN),
		errors.Is(err, unix.ENOENT), errors.Is(err, unix.EIO): // ENOENT: a request was taken back; EIO: one that does not fit was refused by the kernel
		return false
	case errors.Is(err, unix.ENODEV):
		if !s.ended {
			s.ended = true
			s.cfg.Report(fmt.Errorf("fuse: unmounted or aborted from outside: %w", ErrClosed))
		}
	default:
		s.cfg.Report(fmt.Errorf("fuse: read requests: %w", err))
	}
	s.readers--
	return true
}

// read reads a message if there is one, else EAGAIN.
func (s *Session) read(b *buffer) (int, error) {
	return unix.Readv(s.fd, b.in[:]) //nolint:wrapcheck // a bare errno, for over
}

// ready waits until there may be a message; a deadline ends it.
func (s *Session) ready() error {
	var err error
	waitErr := s.conn.Read(func(fd uintptr) bool {
		// What came before the poller was asked is not told by it.
		fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		var n int
		n, err = unix.Poll(fds[:], 0)
		return n != 0 || (err != nil && !errors.Is(err, unix.EINTR))
	})
	return errors.Join(waitErr, err)
}

// message is what n bytes that were read are made of.
func (b *buffer) message(n int) (head, tail []byte) {
	if n <= headBytes {
		return b.head[:n], nil
	}
	return b.head, b.data[:n-headBytes]
}
