package blockfault_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"ashlar/internal/block"
	"ashlar/internal/block/blockfault"
	"ashlar/internal/block/blocktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestTransparent checks that a wrapper that is asked for nothing keeps the contract.
func TestTransparent(t *testing.T) {
	for name, wrap := range map[string]func(block.Device) block.Device{
		"Error": func(d block.Device) block.Device {
			return blockfault.Error(d, func(blockfault.Op) error { return nil })
		},
		"Delay":  func(d block.Device) block.Device { return blockfault.Delay(d, func(blockfault.Op) {}) },
		"Pause":  func(d block.Device) block.Device { return blockfault.NewPause(d) },
		"Record": func(d block.Device) block.Device { return blockfault.NewRecord(d) },
	} {
		t.Run(name, func(t *testing.T) {
			blocktest.Run(t, blocktest.Config{New: func(_ testing.TB, n int64) block.Device { return wrap(block.NewMem(n)) }})
		})
	}
}

func TestErrors(t *testing.T) {
	mine := errors.New("mine")
	var flag atomic.Bool
	for name, tt := range map[string]struct {
		when func(blockfault.Op) error
		want []int // which of ten writes, with a read after each, fail
	}{
		"Nth":       {blockfault.Nth(3, mine, blockfault.Write), []int{2}},
		"NthOfAll":  {blockfault.Nth(3, mine), []int{1}},
		"Every":     {blockfault.Every(4, mine, blockfault.Write, blockfault.Flush), []int{3, 7}},
		"While":     {blockfault.While(&flag, mine, blockfault.Write), []int{5, 6, 7, 8, 9}},
		"Within":    {blockfault.Within(4096, 8192, mine, blockfault.Write), []int{1, 2}},
		"OtherKind": {blockfault.Every(1, mine, blockfault.Flush), nil},
	} {
		t.Run(name, func(t *testing.T) {
			flag.Store(false)
			d := blockfault.Error(block.NewMem(1<<20), tt.when)
			var failed []int
			for i := range 10 {
				flag.Store(i >= 5)
				_, err := d.WriteAt(make([]byte, 4096), int64(i)*4096)
				if err != nil {
					if !errors.Is(err, mine) {
						t.Fatal(err)
					}
					failed = append(failed, i)
				}
				_, _ = d.ReadAt(make([]byte, 4096), 0) // counts, where all kinds do
			}
			if !slices.Equal(failed, tt.want) {
				t.Errorf("writes %v failed, want %v", failed, tt.want)
			}
		})
	}
}

func TestPause(t *testing.T) {
	p := blockfault.NewPause(block.NewMem(1 << 20))
	p.Pause(blockfault.Write)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if _, err := p.WriteAt(make([]byte, 4096), 0); err != nil {
				t.Error(err)
			}
		})
	}
	p.AwaitWaiting(3)
	if _, err := p.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Errorf("a read while writes are paused: %v", err)
	}
	p.Resume()
	wg.Wait()
	p.Pause()
	wg.Go(func() {
		if err := p.Flush(); !errors.Is(err, block.ErrClosed) {
			t.Errorf("a call that was stuck while the device was closed: %v", err)
		}
	})
	p.AwaitWaiting(1)
	if err := p.Close(); err != nil {
		t.Errorf("Close of a paused device: %v", err)
	}
	p.Resume()
	wg.Wait()
	if n := p.Waiting(); n != 0 {
		t.Errorf("%d calls wait", n)
	}
}

func TestDelay(t *testing.T) {
	turns := make(chan blockfault.Op, 1)
	d := blockfault.Delay(block.NewMem(1<<20), func(op blockfault.Op) { turns <- op })
	if err := d.Zero(4096, 8192); err != nil {
		t.Fatal(err)
	}
	if op := <-turns; op.String() != "Zero[4096,+8192)" {
		t.Errorf("delayed %v", op)
	}
}

func TestRecord(t *testing.T) {
	r := blockfault.NewRecord(block.NewMem(1 << 20))
	b := bytes.Repeat([]byte{7}, 4096)
	_, _ = r.WriteAt(b, 8192)
	_, _ = r.ReadAt(b, 1<<20)
	_ = r.Flush()
	log := r.Entries()
	if len(log) != 3 || log[0].Sum != sha256.Sum256(b) || log[0].Op != (blockfault.Op{Kind: blockfault.Write, Off: 8192, N: 4096}) ||
		!errors.Is(log[1].Err, block.ErrRange) || log[2].Kind != blockfault.Flush || r.Count(blockfault.Write) != 1 {
		t.Errorf("log %v", log)
	}
	if r.Reset(); len(r.Entries()) != 0 {
		t.Error("Reset forgot nothing")
	}
}

func TestCompareByCopy(t *testing.T) {
	a, b := block.NewMem(4<<20), block.NewMem(4<<20)
	for _, d := range []block.Device{a, b} {
		if _, err := d.WriteAt(bytes.Repeat([]byte{7}, 100<<10), 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := block.Copy(t.Context(), blockfault.NewCompare(b), a, block.CopyOptions{}); err != nil {
		t.Errorf("equal devices: %v", err)
	}
	for _, off := range []int64{3 << 20, 1<<20 + 5} {
		if _, err := b.WriteAt([]byte{1}, off); err != nil {
			t.Fatal(err)
		}
		if _, err := block.Copy(t.Context(), blockfault.NewCompare(b), a, block.CopyOptions{}); !errors.Is(err, blockfault.ErrDiffer) {
			t.Errorf("different at %d: %v", off, err)
		}
		if _, err := b.WriteAt([]byte{map[bool]byte{true: 0, false: 7}[off == 3<<20]}, off); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTwin(t *testing.T) {
	blocktest.Run(t, blocktest.Config{New: func(_ testing.TB, n int64) block.Device { return serial(block.NewMem(n), block.NewMem(n)) }})
	a, b := block.NewMem(1<<20), block.NewMem(1<<20)
	twin := blockfault.NewTwin(a, b)
	if _, err := b.WriteAt([]byte{1}, 5000); err != nil {
		t.Fatal(err)
	}
	if _, err := twin.ReadAt(make([]byte, 8192), 0); !errors.Is(err, blockfault.ErrDiffer) {
		t.Errorf("different devices: %v", err)
	}
	mine := errors.New("mine")
	one := blockfault.NewTwin(blockfault.Error(a, blockfault.Every(1, mine)), b)
	if err := one.Flush(); !errors.Is(err, blockfault.ErrDiffer) || !errors.Is(err, mine) {
		t.Errorf("one failed: %v", err)
	}
}

// locked keeps overlapping calls apart, as Twin asks.
type locked struct {
	block.Device
	mu sync.Mutex
}

func serial(a, b block.Device) block.Device { return &locked{Device: blockfault.NewTwin(a, b)} }

func (l *locked) WriteAt(p []byte, off int64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Device.WriteAt(p, off)
}

func (l *locked) ReadAt(p []byte, off int64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Device.ReadAt(p, off)
}

func (l *locked) Zero(off, n int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Device.Zero(off, n)
}

func (l *locked) Flush() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Device.Flush()
}

func (l *locked) Extents(off, n int64) ([]block.Extent, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Device.Extents(off, n)
}

func (l *locked) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Device.Close()
}
