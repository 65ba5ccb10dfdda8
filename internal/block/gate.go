package block

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
)

// Gate is a Device in front of another that can be held still and exchanged: how a live export is expanded, snapshotted together with
// others, handed over and moved.
//
//	       Hold                 in-flight calls done
//	open ───────▶ draining ──────────────────────────▶ held ──▶ Swap, any number of times
//	  ▲              │ ctx ends                          │
//	  └──────────────┴───────────────────────────────────┴── Release
//
//	Close, from anywhere: closed. Waiting calls and Hold answer ErrClosed; it waits for nothing.
//
// Calls that come while the gate is not open wait, with no time limit: a Device has no context. Size alone never waits.
// An open gate costs two atomic additions a call.
type Gate struct {
	// state is the number of calls in flight, with two flags above it. A call adds itself first and looks at the flags in what it
	// got: the holder that sees zero calls after it set the flag knows that later ones have seen the flag.
	state atomic.Int64
	dev   atomic.Pointer[Device]

	drained chan struct{} // capacity 1: a call that left a gate with a flag up may have been the last
	closed  chan struct{} // closed by Close
	holder  chan struct{} // capacity 1: taken by whoever holds

	mu       sync.Mutex    // guards the flags' changes, released, and that Close and Swap see each other
	released chan struct{} // closed by Release; nil while nobody holds
}

const (
	gateHeld   = 1 << 62
	gateClosed = 1 << 61
	gateCalls  = gateClosed - 1
)

var _ Device = (*Gate)(nil)

// NewGate returns an open gate in front of d, which it owns: Close closes it.
func NewGate(d Device) *Gate {
	g := &Gate{drained: make(chan struct{}, 1), closed: make(chan struct{}), holder: make(chan struct{}, 1)}
	g.dev.Store(&d)
	return g
}

// Hold makes new calls wait and returns once those in flight have returned. When ctx ends first the gate is open again and ctx's
// error is returned. Several may call Hold: one at a time gets it. ErrClosed when the gate is closed before or meanwhile.
func (g *Gate) Hold(ctx context.Context) error {
	select {
	case g.holder <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("block: hold: %w", context.Cause(ctx))
	case <-g.closed:
		return fmt.Errorf("block: hold: %w", ErrClosed)
	}
	g.mu.Lock()
	g.released = make(chan struct{})
	g.state.Or(gateHeld)
	g.mu.Unlock()
	for {
		s := g.state.Load()
		if s&gateClosed != 0 {
			g.Release()
			return fmt.Errorf("block: hold: %w", ErrClosed)
		}
		if s&gateCalls == 0 {
			return nil
		}
		select {
		case <-g.drained:
		case <-g.closed:
		case <-ctx.Done():
			g.Release()
			return fmt.Errorf("block: hold: %w", context.Cause(ctx))
		}
	}
}

// Swap puts next in the place of the device behind the gate and returns the one that was there, which the caller now owns. Only who holds may
// call it; anything else is a panic. On a gate that was closed meanwhile it returns next itself, because the other is closed already: closing
// what Swap returns is right in both cases.
func (g *Gate) Swap(next Device) (old Device) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.released == nil {
		panic("block: Swap on a gate that is not held")
	}
	if g.state.Load()&gateClosed != 0 {
		return next
	}
	return *g.dev.Swap(&next)
}

// Release opens the gate. Only who holds may call it; anything else is a panic.
func (g *Gate) Release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.released == nil {
		panic("block: Release of a gate that is not held")
	}
	g.state.And(^int64(gateHeld))
	close(g.released)
	g.released = nil
	<-g.holder
}

// Close closes the device behind the gate, and later calls, waiting ones and a Hold in progress return ErrClosed. Calls in flight get
// whatever the device gives them. Who holds the gate still has to Release it.
func (g *Gate) Close() error {
	g.mu.Lock()
	if g.state.Load()&gateClosed != 0 {
		g.mu.Unlock()
		return ErrClosed
	}
	g.state.Or(gateClosed)
	close(g.closed)
	d := *g.dev.Load()
	g.mu.Unlock()
	return d.Close()
}

// enter counts a call in, and returns the device it may use until leave.
func (g *Gate) enter() (Device, error) {
	if g.state.Add(1) >= gateClosed {
		if err := g.wait(); err != nil {
			return nil, err
		}
	}
	return *g.dev.Load(), nil
}

// wait takes back what enter counted and tries again when the gate opens.
func (g *Gate) wait() error {
	for {
		g.leave()
		g.mu.Lock()
		released := g.released
		g.mu.Unlock()
		if g.state.Load()&gateClosed != 0 {
			return ErrClosed
		}
		if released != nil {
			select {
			case <-released:
			case <-g.closed:
				return ErrClosed
			}
		}
		if g.state.Add(1) < gateClosed {
			return nil
		}
	}
}

func (g *Gate) leave() {
	if g.state.Add(-1) >= gateClosed {
		select {
		case g.drained <- struct{}{}:
		default: // there is a message already, and whoever takes it looks again
		}
	}
}

// ReadAt implements io.ReaderAt.
func (g *Gate) ReadAt(p []byte, off int64) (int, error) {
	d, err := g.enter()
	if err != nil {
		return 0, err
	}
	n, err := d.ReadAt(p, off)
	g.leave()
	return n, err
}

// WriteAt implements io.WriterAt.
func (g *Gate) WriteAt(p []byte, off int64) (int, error) {
	d, err := g.enter()
	if err != nil {
		return 0, err
	}
	n, err := d.WriteAt(p, off)
	g.leave()
	return n, err
}

// Zero implements Device.
func (g *Gate) Zero(off, n int64) error {
	d, err := g.enter()
	if err != nil {
		return err
	}
	err = d.Zero(off, n)
	g.leave()
	return err
}

// Flush implements Device.
func (g *Gate) Flush() error {
	d, err := g.enter()
	if err != nil {
		return err
	}
	err = d.Flush()
	g.leave()
	return err
}

// Extents implements Device.
func (g *Gate) Extents(off, n int64) ([]Extent, error) {
	d, err := g.enter()
	if err != nil {
		return nil, err
	}
	e, err := d.Extents(off, n)
	g.leave()
	return e, err
}

// Size implements Device: the size of the device behind the gate at this moment, also while it is held or closed.
func (g *Gate) Size() int64 { return (*g.dev.Load()).Size() }
