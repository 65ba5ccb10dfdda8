package block_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/block/blockfault"
)

// TestGateHold: calls in flight are waited for, new ones wait, and go on with the device that was swapped in.
func TestGateHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := blockfault.NewPause(block.NewMem(1 << 20))
		g := block.NewGate(p)
		p.Pause()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := g.WriteAt([]byte{1}, 0); err != nil {
				t.Error(err)
			}
		})
		p.AwaitWaiting(1)
		var held atomic.Bool
		wg.Go(func() {
			if err := g.Hold(t.Context()); err != nil {
				t.Error(err)
			}
			held.Store(true)
		})
		synctest.Wait()
		if held.Load() {
			t.Fatal("Hold returned with a call in flight")
		}
		p.Resume()
		synctest.Wait()
		if !held.Load() {
			t.Fatal("Hold did not return after the last call")
		}
		var through atomic.Int32
		for _, call := range everyCall(g) {
			wg.Go(func() {
				if err := call(); err != nil {
					t.Error(err)
				}
				through.Add(1)
			})
		}
		synctest.Wait()
		if n := through.Load(); n != 0 {
			t.Fatalf("%d calls went through a held gate", n)
		}
		if g.Size() != 1<<20 {
			t.Errorf("Size() = %d", g.Size())
		}
		next := block.NewMem(2 << 20)
		old := g.Swap(next)
		if old != block.Device(p) {
			t.Error("Swap returned another device than was there")
		}
		if g.Size() != 2<<20 {
			t.Errorf("Size() = %d after Swap", g.Size())
		}
		if err := old.Close(); err != nil {
			t.Error(err)
		}
		g.Release()
		wg.Wait()
		b := make([]byte, 1)
		if _, err := next.ReadAt(b, 0); err != nil || b[0] != 9 {
			t.Errorf("the waiting write did not reach the new device: %v, %v", b, err)
		}
		if err := g.Close(); err != nil {
			t.Error(err)
		}
		if err := next.Flush(); !errors.Is(err, block.ErrClosed) {
			t.Errorf("Close did not close the device: %v", err)
		}
	})
}

// everyCall returns one call of each method that waits.
func everyCall(d block.Device) []func() error {
	return []func() error{
		func() error { _, err := d.ReadAt(make([]byte, 1), 0); return err },
		func() error { _, err := d.WriteAt([]byte{9}, 0); return err },
		func() error { return d.Zero(4096, 4096) },
		d.Flush,
		func() error { _, err := d.Extents(0, 4096); return err },
	}
}

func TestGateHoldIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := blockfault.NewPause(block.NewMem(1 << 20))
		g := block.NewGate(p)
		p.Pause(blockfault.Write)
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = g.WriteAt([]byte{1}, 0) })
		p.AwaitWaiting(1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := g.Hold(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Hold with a stuck call: %v", err)
		}
		for _, call := range []func() error{g.Flush, func() error { _, err := g.ReadAt(make([]byte, 1), 0); return err }} {
			if err := call(); err != nil {
				t.Errorf("a call after Hold was given up: %v", err)
			}
		}
		if err := g.Hold(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Hold with a context that ended: %v", err)
		}
		p.Resume()
		wg.Wait()
		for range 3 { // several holders, one after the other
			wg.Go(func() {
				if err := g.Hold(t.Context()); err != nil {
					t.Error(err)
					return
				}
				synctest.Wait()
				g.Release()
			})
			wg.Wait()
		}
	})
}

// TestGateHoldersTakeTurns: a second Hold waits for the first Release.
func TestGateHoldersTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := block.NewGate(block.NewMem(1 << 20))
		if err := g.Hold(t.Context()); err != nil {
			t.Fatal(err)
		}
		var second atomic.Bool
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := g.Hold(t.Context()); err != nil {
				t.Error(err)
			}
			second.Store(true)
		})
		synctest.Wait()
		if second.Load() {
			t.Error("two hold the gate")
		}
		g.Release()
		wg.Wait()
		g.Release()
	})
}

// TestGateClose: Close waits for nothing: not for a stuck call, not for the holder. Who waits gets ErrClosed.
func TestGateClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := blockfault.NewPause(block.NewMem(1 << 20))
		g := block.NewGate(p)
		p.Pause(blockfault.Write)
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := g.WriteAt([]byte{1}, 0); !errors.Is(err, block.ErrClosed) {
				t.Errorf("the stuck call: %v", err)
			}
		})
		p.AwaitWaiting(1)
		wg.Go(func() {
			if err := g.Hold(t.Context()); !errors.Is(err, block.ErrClosed) {
				t.Errorf("Hold of a gate that is closed: %v", err)
			}
		})
		synctest.Wait()
		for _, call := range everyCall(g) {
			wg.Go(func() {
				if err := call(); !errors.Is(err, block.ErrClosed) {
					t.Errorf("a waiting call: %v", err)
				}
			})
		}
		synctest.Wait()
		if err := g.Close(); err != nil {
			t.Error(err)
		}
		p.Resume()
		wg.Wait()
		for _, call := range everyCall(g) {
			if err := call(); !errors.Is(err, block.ErrClosed) {
				t.Errorf("a call after Close: %v", err)
			}
		}
		if err := g.Hold(t.Context()); !errors.Is(err, block.ErrClosed) {
			t.Errorf("Hold after Close: %v", err)
		}
		if err := g.Close(); !errors.Is(err, block.ErrClosed) {
			t.Errorf("a second Close: %v", err)
		}
	})
}

// TestGateCloseWhileHeld: who waits is let go at once, and the holder finds out by getting its own device back.
func TestGateCloseWhileHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := block.NewGate(block.NewMem(1 << 20))
		if err := g.Hold(t.Context()); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for _, call := range append(everyCall(g), func() error { return g.Hold(t.Context()) }) {
			wg.Go(func() {
				if err := call(); !errors.Is(err, block.ErrClosed) {
					t.Errorf("a waiting call: %v", err)
				}
			})
		}
		synctest.Wait()
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		next := block.NewMem(1 << 20)
		if got := g.Swap(next); got != block.Device(next) {
			t.Error("Swap took a device although the gate is closed")
		}
		g.Release()
		if err := g.Flush(); !errors.Is(err, block.ErrClosed) {
			t.Errorf("a call after Close and Release: %v", err)
		}
	})
}

func TestGateMisuse(t *testing.T) {
	for name, f := range map[string]func(*block.Gate){
		"Swap":    func(g *block.Gate) { g.Swap(block.NewMem(0)) },
		"Release": func(g *block.Gate) { g.Release() },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			f(block.NewGate(block.NewMem(1 << 20)))
		})
	}
}

// counting is a device that knows whether a call runs in it, and whether it may.
type counting struct {
	*block.Mem
	inside atomic.Int64
	out    atomic.Bool // was swapped out: nobody may be inside
	bad    *atomic.Int64
}

func (c *counting) ReadAt(p []byte, off int64) (int, error) {
	c.inside.Add(1)
	if c.out.Load() {
		c.bad.Add(1)
	}
	n, err := c.Mem.ReadAt(p, off)
	if c.out.Load() {
		c.bad.Add(1)
	}
	c.inside.Add(-1)
	return n, err
}

// TestGateUnderLoad holds, swaps and releases while many read: no call is ever in a device that is held or swapped out.
func TestGateUnderLoad(t *testing.T) {
	var bad atomic.Int64
	fresh := func() *counting { return &counting{Mem: block.NewMem(1 << 20), bad: &bad} }
	current := fresh()
	g := block.NewGate(current)
	var calls atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			b := make([]byte, 512)
			for {
				if _, err := g.ReadAt(b, 0); err != nil {
					if !errors.Is(err, block.ErrClosed) {
						t.Error(err)
					}
					return
				}
				calls.Add(1)
			}
		})
	}
	for range 2000 {
		if err := g.Hold(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := current.inside.Load(); n != 0 {
			t.Fatalf("%d calls in flight in a held gate", n)
		}
		current.out.Store(true)
		next := fresh()
		g.Swap(next)
		current = next
		g.Release()
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if n := bad.Load(); n != 0 {
		t.Errorf("%d calls in a device that was swapped out", n)
	}
	t.Logf("%d calls in 2000 swaps", calls.Load())
}

// still is a device that does nothing, to see what a gate costs.
type still struct{ block.Device }

func (still) ReadAt(p []byte, _ int64) (int, error) { return len(p), nil }

func BenchmarkGate(b *testing.B) {
	for name, d := range map[string]block.Device{"bare": still{}, "gate": block.NewGate(still{})} {
		b.Run(name, func(b *testing.B) {
			buf := make([]byte, 1)
			for b.Loop() {
				_, _ = d.ReadAt(buf, 0)
			}
		})
		b.Run(name+"-parallel", func(b *testing.B) {
			b.RunParallel(func(pb *testing.PB) {
				buf := make([]byte, 1)
				for pb.Next() {
					_, _ = d.ReadAt(buf, 0)
				}
			})
		})
	}
}
