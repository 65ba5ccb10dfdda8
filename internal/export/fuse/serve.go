package fuse

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/block"
)

const (
	// slowAfter, and slowPerByte for its length, is how long a request may take before the next slowRun are taken to be slow. A hand-over between
	// goroutines costs some microseconds; a copy, a quarter of a nanosecond a byte.
	slowAfter  = 50 * time.Microsecond
	bytesPerNS = 2
	slowRun    = 64
	bigAbove   = 64 << 10 // reads and writes above this are worth another processor
)

// big tells whether req needs a whole buffer.
func (r Request) big() bool { return (r.Op == OpRead || r.Op == OpWrite) && r.N > bigAbove }

// small tells whether req is a read or write that is not big.
func (r Request) small() bool { return (r.Op == OpRead || r.Op == OpWrite) && r.N <= bigAbove }

// mayBlock tells whether others should not wait for req.
func (s *Session) mayBlock(req Request) bool {
	switch req.Op {
	case OpFsync, OpFallocate:
		return true
	case OpRead, OpWrite:
		if req.big() {
			return true
		}
		if s.slow.Load() > 0 {
			s.slow.Add(-1)
			return true
		}
	}
	return false
}

// took notes how long the Device took for n bytes.
func (s *Session) took(n int64, d time.Duration) {
	if d > slowAfter+time.Duration(n/bytesPerNS) {
		s.slow.Store(slowRun)
	}
}

// serve carries req out and answers it.
func (s *Session) serve(b *buffer, req Request) {
	if !req.Reply() {
		return
	}
	body, err := s.do(b, req)
	errno := unix.Errno(0)
	if err != nil {
		if errno = errnoOf(err); !errors.As(err, new(refusal)) {
			s.stats.errors.Add(1)
			s.cfg.Report(fmt.Errorf("fuse: request %d for %d bytes at %d: %w", req.Op, req.N, req.Off, err))
		}
		body = nil
	}
	s.answer(b, req, errno, body)
}

// refusal is an answer that is no failure of the Device.
type refusal unix.Errno

func (r refusal) Error() string { return unix.Errno(r).Error() }

// do calls the Device. What it returns may lie in b.
func (s *Session) do(b *buffer, req Request) ([]byte, error) {
	switch req.Op {
	case OpRead:
		return s.doRead(b, req)
	case OpWrite:
		return s.doWrite(b, req)
	case OpFsync:
		s.stats.flushes.Add(1)
		return nil, s.cfg.Device.Flush()
	case OpFallocate:
		return nil, s.doZero(req)
	case OpGetattr:
		return s.attr(b), nil
	case OpSetattr:
		if req.Valid&setattrSize != 0 {
			return nil, refusal(unix.EPERM)
		}
		return s.attr(b), nil
	case OpOpen:
		s.stats.opens.Add(1)
		clear(b.data[:16])
		binary.LittleEndian.PutUint32(b.data[8:], openDirectIO|openNoFlush|openParallelDirectWrites)
		return b.data[:16], nil
	case OpRelease:
		s.stats.opens.Add(-1)
		return nil, nil
	case OpStatfs:
		clear(b.data[:80])
		binary.LittleEndian.PutUint32(b.data[40:], pageBytes) // bsize
		binary.LittleEndian.PutUint32(b.data[44:], 255)       // namelen
		return b.data[:80], nil
	case OpDestroy, OpAccess:
		return nil, nil
	}
	return nil, refusal(unix.ENOSYS)
}

func (s *Session) attr(b *buffer) []byte {
	perm := uint32(0o600)
	if s.cfg.ReadOnly {
		perm = 0o400
	}
	return b.data[:putAttr(b.data, s.cfg.Device.Size(), perm)]
}

func (s *Session) doRead(b *buffer, req Request) ([]byte, error) {
	n := min(req.N, s.cfg.Device.Size()-req.Off)
	if n <= 0 {
		return nil, nil // the file's end
	}
	p := b.data[:n]
	begin := time.Now()
	if _, err := s.cfg.Device.ReadAt(p, req.Off); err != nil {
		return nil, err
	}
	s.took(n, time.Since(begin))
	s.stats.reads.Add(1)
	s.stats.readBytes.Add(uint64(n))
	return p, nil
}

func (s *Session) doWrite(b *buffer, req Request) ([]byte, error) {
	if s.cfg.ReadOnly {
		return nil, refusal(unix.EROFS)
	}
	if req.N > s.cfg.Device.Size()-req.Off {
		return nil, refusal(unix.EFBIG)
	}
	begin := time.Now()
	if _, err := s.cfg.Device.WriteAt(req.Data, req.Off); err != nil {
		return nil, err
	}
	s.took(req.N, time.Since(begin))
	s.stats.writes.Add(1)
	s.stats.writtenBytes.Add(uint64(req.N))
	// The payload is not needed any more: the answer goes over it.
	binary.LittleEndian.PutUint64(b.data, uint64(req.N))
	return b.data[:8], nil
}

// doZero is what discards and zeroing become: a loop device sends PUNCH_HOLE for the first and either for the second. Reserving space is refused: a
// volume is thin.
func (s *Session) doZero(req Request) error {
	if req.Mode != fallocPunchHole|fallocKeepSize && req.Mode != fallocZeroRange|fallocKeepSize && req.Mode != fallocZeroRange {
		return refusal(unix.EOPNOTSUPP)
	}
	if s.cfg.ReadOnly {
		return refusal(unix.EROFS)
	}
	n := min(req.N, s.cfg.Device.Size()-req.Off)
	if n <= 0 {
		return nil
	}
	if err := s.cfg.Device.Zero(req.Off, n); err != nil {
		return err
	}
	s.stats.zeroes.Add(1)
	return nil
}

// errnoOf is this boundary's table.
func errnoOf(err error) unix.Errno {
	var r refusal
	switch {
	case errors.As(err, &r):
		return unix.Errno(r)
	case errors.Is(err, block.ErrNoSpace):
		return unix.ENOSPC
	case errors.Is(err, block.ErrReadOnly):
		return unix.EROFS
	case errors.Is(err, block.ErrRange), errors.Is(err, block.ErrAlign):
		return unix.EINVAL
	}
	return unix.EIO
}

// answer replies, and reports if that fails for another reason than that nobody waits any more.
func (s *Session) answer(b *buffer, req Request, errno unix.Errno, body []byte) {
	err := s.reply(b, req, errno, body)
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EPERM) {
		s.cfg.Report(fmt.Errorf("fuse: answer request %d: %w", req.Op, err))
	}
}

// reply sends a header, which is built over the request's, and body. The kernel answers ENOENT for a request that was aborted, ENODEV or EPERM when the
// session has ended.
func (s *Session) reply(b *buffer, req Request, errno unix.Errno, body []byte) error {
	head := b.head[:outHeaderBytes]
	putOutHeader(head, req.Unique, -int32(errno), len(body))
	b.out[0], b.out[1] = head, body
	n := 2
	if len(body) == 0 {
		n = 1
	}
	_, err := unix.Writev(s.fd, b.out[:n])
	return err //nolint:wrapcheck // answer tells errnos apart
}
