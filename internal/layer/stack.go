package layer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"ashlar/internal/block"
)

// StackOptions say how a Stack behaves.
type StackOptions struct {
	// RecordZeroes records a discard even where nothing lies below: for a stack whose lower layers are still being filled.
	RecordZeroes bool
}

// Stack is layers over each other, read as one Device. If the top is a head it takes writes and zeroes of whole units (block.ErrAlign);
// otherwise, or if its layers were opened for reading only, it answers block.ErrReadOnly. Reads are taken at any offset. Flush makes durable what the
// head was given.
type Stack struct {
	opts    StackOptions
	limits  limits
	view    atomic.Pointer[view]
	closed  atomic.Bool
	stripes [64]stripe
	sums    sumCache

	mu       sync.Mutex // one change of the view at a time; guards released
	released bool
}

var _ block.Device = (*Stack)(nil)

// stripe is a lock for the pages of a 64th of the disk; padded so that two do not share a cache line.
type stripe struct {
	sync.RWMutex
	_ [40]byte
}

// stripe returns the lock of a map page (64 MiB of disk): held shared by in-place overwrites, exclusively by what changes a unit's state or
// the page's regions in memory.
func (s *Stack) stripe(page int64) *sync.RWMutex {
	return &s.stripes[page%int64(len(s.stripes))].RWMutex
}

// view is what a stack consists of. It is never changed; a stack replaces it whole.
type view struct {
	layers    []*Layer // by slot; slot 0 is nobody. A merged layer stands in both slots of those it replaces
	chain     []int    // slots of the layers, head first
	writer    *writer  // nil if read-only
	table     *table
	sizeBytes int64
}

// NewStack returns the stack of layers, head first; it retains them. Only the first may be a head or building, and a head can be that of one
// stack only, once (ErrState): to use it again, close and open it. All others are sealed.
func NewStack(layers []*Layer, o StackOptions) (*Stack, error) {
	if len(layers) == 0 {
		return nil, fmt.Errorf("layer: stack of no layers: %w", ErrState)
	}
	for _, l := range layers[1:] {
		if !l.sealed.Load() {
			return nil, fmt.Errorf("layer: stack: layer %s lies below and is not sealed: %w", l.sb.ID, ErrState)
		}
	}
	s := &Stack{opts: o, limits: layers[0].limits}
	if len(layers) > s.limits.maxSlots {
		return nil, fmt.Errorf("layer: stack of %d layers; at most %d: %w", len(layers), s.limits.maxSlots, ErrState)
	}
	v, err := s.newView(layers)
	if err != nil {
		return nil, err
	}
	for _, l := range layers {
		l.Retain()
	}
	s.view.Store(v)
	return s, nil
}

// newView numbers the layers from the lowest up, with an empty table. The head's log is taken.
func (s *Stack) newView(layers []*Layer) (*view, error) {
	v := &view{layers: []*Layer{nil}, sizeBytes: layers[0].sb.SizeBytes, table: newTable(layers[0].sb.SizeBytes)}
	for _, l := range slices.Backward(layers) {
		v.chain = append(v.chain, len(v.layers))
		v.layers = append(v.layers, l)
	}
	slices.Reverse(v.chain)
	if top := layers[0]; !top.sealed.Load() && !top.readOnly {
		w, err := newWriter(s, top, v.chain[0], v.table)
		if err != nil {
			return nil, err
		}
		v.writer = w
	}
	return v, nil
}

// Layers returns the layers, head first. They are valid while the stack is open and has them.
func (s *Stack) Layers() []*Layer {
	v := s.view.Load()
	layers := make([]*Layer, len(v.chain))
	for i, slot := range v.chain {
		layers[i] = v.layers[slot]
	}
	return layers
}

// Size implements block.Device.
func (s *Stack) Size() int64 { return s.view.Load().sizeBytes }

// Flush implements block.Device. Calls that come while one runs share the next, with one fdatasync.
func (s *Stack) Flush() error {
	if s.closed.Load() {
		return fmt.Errorf("layer: flush: %w", block.ErrClosed)
	}
	if w := s.view.Load().writer; w != nil {
		return w.flush()
	}
	return nil
}

// FlushAhead flushes and folds the log into the map while writes go on, so that the Seal that follows has little to do. It has no effect on a
// stack without a head.
func (s *Stack) FlushAhead(ctx context.Context) error {
	if s.closed.Load() {
		return fmt.Errorf("layer: flush ahead: %w", block.ErrClosed)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if w := s.view.Load().writer; w != nil {
		return w.flushAhead()
	}
	return nil
}

// Close implements block.Device: later calls return block.ErrClosed, and the layers are released. It does not flush: what was written stays in the page
// cache, and opening the layers on the same boot finds all of it. It does not wait for calls that are stuck in the kernel.
func (s *Stack) Close() error {
	if s.closed.Swap(true) || !s.mu.TryLock() {
		return nil // closed before; or a change of the layers is under way, and unlock follows at its end
	}
	defer s.mu.Unlock()
	return s.release()
}

// lock begins a change of the view.
func (s *Stack) lock() error {
	s.mu.Lock()
	if s.closed.Load() {
		s.unlock()
		return block.ErrClosed
	}
	return nil
}

// unlock ends it. If Close came meanwhile and did not wait, its work is done here.
func (s *Stack) unlock() {
	s.mu.Unlock()
	if s.closed.Load() && s.mu.TryLock() {
		defer s.mu.Unlock()
		s.release() //nolint:errcheck // the files are closed whatever is returned, and Close has returned long ago
	}
}

// release ends the background and gives the layers back, once; mu is held.
func (s *Stack) release() error {
	if s.released {
		return nil
	}
	s.released = true
	v := s.view.Load()
	if v.writer != nil {
		v.writer.close()
	}
	var errs []error
	for _, slot := range v.chain {
		errs = append(errs, v.layers[slot].Close())
	}
	return errors.Join(errs...)
}

// load makes a map page of v's table present; its stripe is held exclusively.
func (s *Stack) load(v *view, page int64) error {
	if v.table.region(page*pageRegions) != nil {
		return nil
	}
	if err := v.load(page); err != nil {
		return err
	}
	limit := s.limits.mapBytes
	if limit == 0 {
		limit = 16<<20 + v.sizeBytes>>16 // 16 MiB a TiB and 16 more
	}
	s.shrink(v, page, limit)
	return nil
}

// find returns the present view and one of its regions, loading it if necessary. A region is always loaded with the present view, never with one that
// somebody remembers: an older one would not know what a newer head has.
func (s *Stack) find(i int64) (*view, *region, error) {
	for {
		v := s.view.Load()
		if r := v.table.region(i); r != nil {
			return v, r, nil
		}
		mu := s.stripe(i / pageRegions)
		mu.Lock()
		err := s.load(s.view.Load(), i/pageRegions)
		mu.Unlock()
		if err != nil {
			return nil, nil, err
		}
	}
}

// Extents implements block.Device. It looks at no more than 16 GiB of disk and 4096 extents at a time.
func (s *Stack) Extents(off, n int64) ([]block.Extent, error) {
	return s.extents(off, n, func(_ *view, src source) (block.State, error) { return src.state(), nil })
}

// extents is Extents with a say in what a unit's source means.
func (s *Stack) extents(off, n int64, state func(*view, source) (block.State, error)) ([]block.Extent, error) {
	v := s.view.Load()
	if s.closed.Load() {
		return nil, fmt.Errorf("layer: extents: %w", block.ErrClosed)
	}
	if err := block.CheckRange(off, n, v.sizeBytes); err != nil {
		return nil, fmt.Errorf("layer: extents of %d bytes at %d: %w", n, off, err)
	}
	const maxUnits, maxExtents = 16 << 30 / unitBytes, 4096
	var list []block.Extent
	end := (off + n + unitBytes - 1) / unitBytes
	for at, last := off/unitBytes, min(end, off/unitBytes+maxUnits); at < last && n > 0; {
		v, r, err := s.find(at / regionUnits)
		if err != nil {
			return nil, fmt.Errorf("layer: extents: %w", err)
		}
		in := int(at % regionUnits)
		src, stop := r.at(in, int(min(regionUnits, int64(in)+last-at)))
		is, err := state(v, src)
		if err != nil {
			return nil, fmt.Errorf("layer: extents: %w", err)
		}
		from, to := max(off, at*unitBytes), min(off+n, (at+int64(stop-in))*unitBytes)
		if k := len(list) - 1; k >= 0 && list[k].State == is {
			list[k].N += to - from
		} else if k+1 == maxExtents {
			break
		} else {
			list = append(list, block.Extent{Off: from, N: to - from, State: is})
		}
		at += int64(stop - in)
	}
	return list, nil
}
