package fuse

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/block"
)

// kernel plays /dev/fuse: a socket of packets gives what that gives, one message a read, except that nothing is sent again.
type kernel struct {
	t *testing.T
	c *net.UnixConn
}

// newKernel returns a kernel and the descriptor its server has.
func newKernel(t *testing.T) (*kernel, *os.File) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(pair[0]), "kernel")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	return &kernel{t, c.(*net.UnixConn)}, os.NewFile(uintptr(pair[1]), "server")
}

func (k *kernel) send(m []byte) {
	k.t.Helper()
	if _, err := k.c.Write(m); err != nil {
		k.t.Fatal(err)
	}
}

// reply returns the next reply's unique number, error and body.
func (k *kernel) reply() (uint64, unix.Errno, []byte) {
	k.t.Helper()
	b := make([]byte, outHeaderBytes+MaxWriteBytes)
	n, err := k.c.Read(b)
	if err != nil || n < outHeaderBytes || binary.LittleEndian.Uint32(b) != uint32(n) {
		k.t.Fatalf("reply of %d bytes, %v", n, err)
	}
	return binary.LittleEndian.Uint64(b[8:]), unix.Errno(-int32(binary.LittleEndian.Uint32(b[4:]))), b[outHeaderBytes:n]
}

func (k *kernel) ask(m []byte) (unix.Errno, []byte) {
	k.t.Helper()
	k.send(m)
	unique, errno, body := k.reply()
	if unique != binary.LittleEndian.Uint64(m[8:]) {
		k.t.Fatalf("reply to %d, not to %d", unique, binary.LittleEndian.Uint64(m[8:]))
	}
	return errno, body
}

func initMessage(minor uint32) []byte {
	return message(OpInit, 2, uint32(7), minor, uint32(0), ^uint32(0), ^uint32(0), make([]byte, 44))
}

func start(t *testing.T, cfg Config) (*kernel, *Session) {
	t.Helper()
	k, f := newKernel(t)
	k.send(initMessage(45))
	cfg.Buffers = NewBuffers(4)
	s, err := Negotiate(t.Context(), f, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, errno, body := k.reply(); errno != 0 || len(body) != initOutBytes || binary.LittleEndian.Uint32(body[20:]) != MaxWriteBytes {
		t.Fatalf("INIT: %v, %d bytes", errno, len(body))
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return k, s
}

const devBytes = 1 << 20

func TestRequests(t *testing.T) {
	dev := &flushCounter{Device: block.NewMem(devBytes)}
	k, s := start(t, Config{Device: dev})
	if !s.Resends() {
		t.Error("INIT offered resending")
	}
	if errno, body := k.ask(message(OpOpen, 4, uint64(0))); errno != 0 || binary.LittleEndian.Uint32(body[8:]) != openDirectIO|openNoFlush|openParallelDirectWrites {
		t.Errorf("open: %v, %v", errno, body)
	}
	if errno, body := k.ask(message(OpGetattr, 6, uint64(0), uint64(0))); errno != 0 || binary.LittleEndian.Uint64(body[24:]) != devBytes {
		t.Errorf("getattr: %v, %v", errno, body)
	}
	payload := make([]byte, 8192)
	for i := range payload {
		payload[i] = byte(i * 7)
	}
	if errno, body := k.ask(message(OpWrite, 8, append(rangeIn(4096, 8192), payload)...)); errno != 0 || binary.LittleEndian.Uint32(body) != 8192 {
		t.Errorf("write: %v, %v", errno, body)
	}
	if errno, body := k.ask(message(OpRead, 10, rangeIn(4096, 8192)...)); errno != 0 || string(body) != string(payload) {
		t.Errorf("read: %v, %d bytes", errno, len(body))
	}
	if errno, _ := k.ask(message(OpFallocate, 12, uint64(1), uint64(4096), uint64(4096), uint32(3), uint32(0))); errno != 0 {
		t.Errorf("discard: %v", errno)
	}
	if errno, body := k.ask(message(OpRead, 14, rangeIn(4096, 8192)...)); errno != 0 || string(body) != string(make([]byte, 4096))+string(payload[4096:]) {
		t.Errorf("read after discard: %v, %d bytes", errno, len(body))
	}
	for name, c := range map[string]struct {
		m    []byte
		want unix.Errno
	}{
		"flush":               {message(OpFsync, 16, uint64(1), uint64(0)), 0},
		"reserve space":       {message(OpFallocate, 18, uint64(1), uint64(0), uint64(4096), uint32(0), uint32(0)), unix.EOPNOTSUPP},
		"write at the end":    {message(OpWrite, 20, append(rangeIn(devBytes-2, 4), []byte("abcd"))...), unix.EFBIG},
		"truncate":            {message(OpSetattr, 22, uint32(setattrSize), make([]byte, 84)), unix.EPERM},
		"unknown":             {message(999, 24), unix.ENOSYS},
		"malformed":           {message(OpRead, 26, uint64(0)), unix.EIO},
		"read at the end":     {message(OpRead, 28, rangeIn(devBytes, 512)...), 0},
		"discard past it all": {message(OpFallocate, 30, uint64(1), uint64(devBytes-512), uint64(1<<40), uint32(3), uint32(0)), 0},
	} {
		if errno, _ := k.ask(c.m); errno != c.want {
			t.Errorf("%s: %v, want %v", name, errno, c.want)
		}
	}
	// No reply: what follows is answered first.
	k.send(message(OpInterrupt, 33, uint64(8)))
	k.send(message(OpForget, 34, uint64(1)))
	if errno, _ := k.ask(message(OpStatfs, 36)); errno != 0 {
		t.Errorf("statfs: %v", errno)
	}
	// What was sent before is answered under the number it has now.
	if errno, _ := k.ask(message(OpFsync, 38|resentBit, uint64(1), uint64(0))); errno != 0 || s.Stats().Resent != 1 {
		t.Errorf("flush sent again: %v, %+v", errno, s.Stats())
	}
	if n := dev.n.Load(); n != 2 {
		t.Errorf("the Device was flushed %d times", n)
	}
	if got := s.Stats(); got.Reads != 2 || got.Writes != 1 || got.Zeroes != 2 || got.Flushes != 2 || got.Errors != 0 || got.Opens != 1 {
		t.Errorf("%+v", got)
	}
}

type flushCounter struct {
	block.Device
	n atomic.Int64
}

func (d *flushCounter) Flush() error {
	d.n.Add(1)
	return d.Device.Flush()
}

func TestReadOnlyAndErrors(t *testing.T) {
	k, _ := start(t, Config{Device: block.NewMem(devBytes), ReadOnly: true})
	if errno, _ := k.ask(message(OpWrite, 8, append(rangeIn(0, 4), []byte("abcd"))...)); errno != unix.EROFS {
		t.Errorf("write: %v", errno)
	}
	if errno, _ := k.ask(message(OpFallocate, 12, uint64(1), uint64(4096), uint64(4096), uint32(3), uint32(0))); errno != unix.EROFS {
		t.Errorf("discard: %v", errno)
	}
	for err, want := range map[error]unix.Errno{block.ErrNoSpace: unix.ENOSPC, block.ErrReadOnly: unix.EROFS, block.ErrRange: unix.EINVAL, block.ErrFenced: unix.EIO,
		block.ErrClosed: unix.EIO, errors.New("any"): unix.EIO} {
		if got := errnoOf(err); got != want {
			t.Errorf("%v: %v, want %v", err, got, want)
		}
	}
}

func TestOldKernel(t *testing.T) {
	k, f := newKernel(t)
	k.send(initMessage(12))
	if _, err := Negotiate(t.Context(), f, Config{Device: block.NewMem(devBytes), Buffers: NewBuffers(1)}); !errors.Is(err, ErrVersion) {
		t.Error(err)
	}
	if _, errno, _ := k.reply(); errno != unix.EPROTO {
		t.Error(errno)
	}
}

// TestSlowHoldsNobodyUp: while flushes and big writes wait in the Device, others are answered, and Detach waits for them, or gives up and serves on.
func TestSlowHoldsNobodyUp(t *testing.T) {
	gate := block.NewGate(block.NewMem(devBytes))
	dev := &flushBlocks{Device: gate, begun: make(chan struct{}, 100), wait: make(chan struct{})}
	k, s := start(t, Config{Device: dev})
	const flushes = 20
	for i := range uint64(flushes) {
		k.send(message(OpFsync, 100+2*i, uint64(1), uint64(0)))
	}
	for range flushes {
		select {
		case <-dev.begun:
		case <-time.After(time.Minute):
			close(dev.wait)
			t.Fatal("one slow request holds the others up")
		}
	}
	if errno, _ := k.ask(message(OpRead, 14, rangeIn(0, 4096)...)); errno != 0 {
		t.Error(errno)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Detach(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("detach: %v", err)
	}
	if errno, _ := k.ask(message(OpRead, 16, rangeIn(0, 4096)...)); errno != 0 {
		t.Errorf("after a detach that failed: %v", errno)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Detach(context.Background()); err != nil {
			t.Error(err)
		}
	})
	close(dev.wait)
	seen := map[uint64]bool{}
	for range flushes {
		unique, errno, _ := k.reply()
		if errno != 0 || seen[unique] {
			t.Errorf("flush %d: %v", unique, errno)
		}
		seen[unique] = true
	}
	wg.Wait()
	if err := s.Detach(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("detach again: %v", err)
	}
}

type flushBlocks struct {
	block.Device
	begun, wait chan struct{}
}

func (d *flushBlocks) Flush() error {
	d.begun <- struct{}{}
	<-d.wait
	return d.Device.Flush()
}

// TestMemoryIsBounded: while the Device holds everything up, big requests have a bounded number of buffers; small ones after them are read when they go on.
func TestMemoryIsBounded(t *testing.T) {
	gate := block.NewGate(block.NewMem(devBytes))
	k, s := start(t, Config{Device: gate})
	if err := gate.Hold(t.Context()); err != nil {
		t.Fatal(err)
	}
	const requests = 3 * bigAtOnce
	var wg sync.WaitGroup
	payload := make([]byte, bigAbove+4096)
	wg.Go(func() { // more than a socket takes at once
		for i := range uint64(requests) {
			if _, err := k.c.Write(message(OpWrite, 100+2*i, append(rangeIn(0, uint32(len(payload))), payload)...)); err != nil {
				t.Error(err)
			}
		}
	})
	for deadline := time.Now().Add(10 * time.Second); s.big.Load() <= bigAtOnce; {
		if time.Now().After(deadline) {
			t.Fatalf("only %d big requests are under way", s.big.Load())
		}
		runtime.Gosched()
	}
	gate.Release()
	for range requests {
		if _, errno, body := k.reply(); errno != 0 || len(body) != 8 {
			t.Errorf("%v, %d bytes", errno, len(body))
		}
		if n := s.big.Load(); n > bigAtOnce+1 {
			t.Errorf("%d big requests are under way", n)
		}
	}
	wg.Wait()
}

// TestSmallIsMoved: on a slow device, small requests are served from memory of their own, with the right bytes.
func TestSmallIsMoved(t *testing.T) {
	k, s := start(t, Config{Device: block.NewMem(devBytes)})
	for i := range uint64(100) {
		s.slow.Store(slowRun)
		s.handed.Store(1) // as if another were under way
		p := bytes.Repeat([]byte{byte(i + 1)}, 512*int(i%16+1))
		if errno, body := k.ask(message(OpWrite, 100+4*i, append(rangeIn(i*8192, uint32(len(p))), p)...)); errno != 0 || binary.LittleEndian.Uint32(body) != uint32(len(p)) {
			t.Fatalf("write: %v, %v", errno, body)
		}
		if errno, body := k.ask(message(OpRead, 102+4*i, rangeIn(i*8192, uint32(len(p)))...)); errno != 0 || !bytes.Equal(body, p) {
			t.Fatalf("read: %v, %d bytes", errno, len(body))
		}
	}
	if n := s.slow.Load(); n >= slowRun {
		t.Error("nothing was taken to be slow")
	}
}

// TestFailures: a failure of the Device is an error to who asked, is counted and reported, and ends nothing.
func TestFailures(t *testing.T) {
	var mu sync.Mutex
	var reported []error
	dev := failing{block.NewMem(devBytes)}
	k, s := start(t, Config{Device: dev, Report: func(err error) { mu.Lock(); reported = append(reported, err); mu.Unlock() }})
	if errno, _ := k.ask(message(OpWrite, 8, append(rangeIn(0, 4), []byte("abcd"))...)); errno != unix.ENOSPC {
		t.Errorf("write: %v", errno)
	}
	if errno, _ := k.ask(message(OpRead, 10, rangeIn(0, 512)...)); errno != 0 {
		t.Errorf("read: %v", errno)
	}
	mu.Lock()
	defer mu.Unlock()
	if s.Stats().Errors != 1 || len(reported) != 1 || !errors.Is(reported[0], block.ErrNoSpace) {
		t.Errorf("%+v, %v", s.Stats(), reported)
	}
}

type failing struct{ block.Device }

func (failing) WriteAt([]byte, int64) (int, error) { return 0, block.ErrNoSpace }
