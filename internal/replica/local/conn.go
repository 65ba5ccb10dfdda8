package local

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"ashlar/internal/block"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
)

// Conn is one connection to a Replica: what one writer uses. It takes I/O once it was fenced in, and until another connection is with a newer writer, or with the
// same one; then it answers block.ErrFenced for good, unless it is fenced in again with a newer writer still.
//
// Its I/O goes through a block.Gate of its own, which is how a change of the chain holds it, and how fencing waits for the last of it.
type Conn struct {
	r     *Replica
	gate  *block.Gate
	ended atomic.Pointer[error] // why no more I/O is let in; nil while it is

	writer replica.Writer // that was fenced in; guarded by r.mu
}

var _ replica.Replica = (*Conn)(nil)

// Connect returns a new connection. Its I/O answers block.ErrFenced until Fence; closing it leaves the Replica open.
func (r *Replica) Connect() *Conn {
	c := &Conn{r: r}
	c.end(fmt.Errorf("replica %s: not let in yet: %w", r.dir, block.ErrFenced))
	r.mu.Lock()
	defer r.mu.Unlock()
	c.gate = block.NewGate(c.device())
	return c
}

// end lets no more I/O in.
func (c *Conn) end(why error) { c.ended.Store(&why) }

// units is the stack as one connection may use it.
type units struct {
	c     *Conn
	stack *layer.Stack
	size  int64
}

// device returns the Device for c's gate; r.mu is held.
func (c *Conn) device() *units {
	return &units{c: c, stack: c.r.stack, size: c.r.stack.Size()}
}

func (u *units) admit() error {
	if why := u.c.ended.Load(); why != nil {
		return *why
	}
	return nil
}

// whole says whether a range is whole units (invariant 6).
func whole(off, n int64) error {
	if (off|n)&(block.UnitBytes-1) != 0 {
		return fmt.Errorf("[%d, +%d): %w", off, n, block.ErrAlign)
	}
	return nil
}

// Size implements block.Device.
func (u *units) Size() int64 { return u.size }

// Close implements block.Device; the stack is the Replica's.
func (u *units) Close() error { return nil }

// ReadAt implements block.Device.
func (u *units) ReadAt(p []byte, off int64) (int, error) {
	if err := u.admit(); err != nil {
		return 0, err
	}
	return u.stack.ReadAt(p, off)
}

// WriteAt implements block.Device.
func (u *units) WriteAt(p []byte, off int64) (int, error) {
	if err := u.admit(); err != nil {
		return 0, err
	}
	if err := whole(off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := u.stack.WriteAt(p, off)
	if err != nil {
		return n, u.judge(err)
	}
	return n, nil
}

// Zero implements block.Device.
func (u *units) Zero(off, n int64) error {
	if err := u.admit(); err != nil {
		return err
	}
	if err := whole(off, n); err != nil {
		return err
	}
	if err := u.stack.Zero(off, n); err != nil {
		return u.judge(err)
	}
	return nil
}

// Flush implements block.Device. A flush that fails fails the replica.
func (u *units) Flush() error {
	if err := u.admit(); err != nil {
		return err
	}
	err := u.stack.Flush()
	if err == nil || errors.Is(err, block.ErrClosed) {
		return err
	}
	return u.c.r.fail(err)
}

// judge looks at an error of the stack: a layer that failed for good fails the replica.
func (u *units) judge(err error) error {
	if errors.Is(err, block.ErrFailed) {
		return u.c.r.fail(err)
	}
	return err
}

// Extents implements block.Device.
func (u *units) Extents(off, n int64) ([]block.Extent, error) {
	if err := u.admit(); err != nil {
		return nil, err
	}
	return u.stack.Extents(off, n)
}

// ReadAt implements block.Device, at any offset.
func (c *Conn) ReadAt(p []byte, off int64) (int, error) { return c.gate.ReadAt(p, off) }

// WriteAt implements block.Device, in whole units.
func (c *Conn) WriteAt(p []byte, off int64) (int, error) { return c.gate.WriteAt(p, off) }

// Zero implements block.Device, in whole units.
func (c *Conn) Zero(off, n int64) error { return c.gate.Zero(off, n) }

// Flush implements block.Device.
func (c *Conn) Flush() error { return c.gate.Flush() }

// Extents implements block.Device.
func (c *Conn) Extents(off, n int64) ([]block.Extent, error) { return c.gate.Extents(off, n) }

// Size implements block.Device.
func (c *Conn) Size() int64 { return c.gate.Size() }

// Close ends the connection; it does not wait for calls under way, and leaves the Replica open.
func (c *Conn) Close() error {
	c.end(fmt.Errorf("replica %s: %w", c.r.dir, block.ErrClosed))
	return c.gate.Close()
}

// Fence implements replica.Replica.
func (c *Conn) Fence(ctx context.Context, w replica.Writer) error {
	r := c.r
	err := r.admitWriter(c, w)
	// From here on no older writer can begin anything. What it had begun ends before the answer.
	for err == nil {
		r.mu.Lock()
		if len(r.ending) == 0 {
			r.mu.Unlock()
			break
		}
		old := r.ending[0]
		r.mu.Unlock()
		if err = old.drain(ctx); err == nil {
			r.mu.Lock()
			r.ending = slices.DeleteFunc(r.ending, func(o *Conn) bool { return o == old })
			r.mu.Unlock()
		}
	}
	if err == nil {
		err = c.letIn(ctx)
	}
	if err != nil {
		return fmt.Errorf("fence replica %s: %w", r.dir, err)
	}
	return nil
}

// admitWriter makes w durable and c the one connection that may do I/O, although not yet.
func (r *Replica) admitWriter(c *Conn, w replica.Writer) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.closed:
		return block.ErrClosed
	case r.failed != nil:
		return r.failed
	case w.Less(r.st.Writer), r.bound != c && c.writer == w:
		return fmt.Errorf("epoch %d session %d, held by %d and %d: %w", w.Epoch, w.Session, r.st.Writer.Epoch, r.st.Writer.Session, block.ErrFenced)
	}
	if r.st.Writer.Less(w) {
		if err := r.update(func(st *state) { st.Writer = w }); err != nil {
			return err
		}
		if r.stopVerb != nil {
			r.stopVerb() // an older writer's
		}
	}
	if r.bound != c {
		if r.bound != nil {
			r.bound.end(fmt.Errorf("replica %s: epoch %d session %d: %w", r.dir, w.Epoch, w.Session, block.ErrFenced))
			r.ending = append(r.ending, r.bound)
		}
		r.bound = c
	}
	c.writer = w
	return nil
}

// letIn lets c's I/O in, on the stack as it is now, once what c itself had begun under an older writer has ended.
func (c *Conn) letIn(ctx context.Context) error {
	if err := c.gate.Hold(ctx); err != nil {
		return err
	}
	defer c.gate.Release()
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	if err := c.r.checkWriter(c, c.writer); err != nil {
		return err
	}
	c.gate.Swap(c.device())
	c.ended.Store(nil)
	return nil
}

// drain waits until no call of c is under way.
func (c *Conn) drain(ctx context.Context) error {
	err := c.gate.Hold(ctx)
	if errors.Is(err, block.ErrClosed) {
		return nil // the caller gave up on its calls, and each of them finds itself ended
	}
	if err != nil {
		return err
	}
	c.gate.Release()
	return nil
}

// checkWriter says whether w may say verbs on c; r.mu is held.
func (r *Replica) checkWriter(c *Conn, w replica.Writer) error {
	switch {
	case r.closed:
		return block.ErrClosed
	case r.failed != nil:
		return r.failed
	case w != r.st.Writer || r.bound != c || c.writer != w:
		return fmt.Errorf("epoch %d session %d, held by %d and %d: %w", w.Epoch, w.Session, r.st.Writer.Epoch, r.st.Writer.Session, block.ErrFenced)
	}
	return nil
}

// Confirm implements replica.Replica.
func (c *Conn) Confirm(_ context.Context, w replica.Writer) error {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	if err := c.r.checkWriter(c, w); err != nil {
		return fmt.Errorf("confirm to replica %s: %w", c.r.dir, err)
	}
	return nil
}

// Keep implements replica.Replica.
func (c *Conn) Keep(_ context.Context, w replica.Writer, rec replica.Record) error {
	r := c.r
	r.mu.Lock()
	defer r.mu.Unlock()
	err := r.checkWriter(c, w)
	if err == nil {
		err = r.keep(rec)
	}
	if err != nil {
		return fmt.Errorf("keep record in replica %s: %w", r.dir, err)
	}
	return nil
}

// keep makes rec the record; r.mu is held.
func (r *Replica) keep(rec replica.Record) error {
	if rec.VolumeID != r.st.VolumeID {
		return fmt.Errorf("it is of volume %s: %w", rec.VolumeID, replica.ErrChain)
	}
	if have := r.st.Record; have != nil {
		if have.Equal(rec) {
			return nil
		}
		if !have.Less(rec) {
			return fmt.Errorf("epoch %d generation %d, held %d and %d: %w", rec.Epoch, rec.Generation, have.Epoch, have.Generation, replica.ErrStale)
		}
	}
	return r.update(func(st *state) { st.Record = &rec })
}

// Status implements replica.Replica. The layers of the chain come first, head first; then those beside it.
func (c *Conn) Status(context.Context) (replica.Status, error) { return c.r.Status() }

// Status is what the replica knows of itself.
func (r *Replica) Status() (replica.Status, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return replica.Status{}, fmt.Errorf("status of replica %s: %w", r.dir, block.ErrClosed)
	}
	st := replica.Status{Writer: r.st.Writer, Chain: r.st.chain(), Failed: r.st.Failed, BootID: r.cfg.BootID}
	if r.st.Record != nil {
		st.Record = *r.st.Record
	}
	if r.failed != nil && st.Failed == "" {
		st.Failed = r.failed.Error()
	}
	order := st.Chain.Layers
	for _, n := range r.st.Layers {
		if !slices.Contains(st.Chain.Layers, n.ID) {
			order = append(order, n.ID)
		}
	}
	for _, id := range order {
		info, err := r.info(id)
		if err != nil {
			return st, fmt.Errorf("status of replica %s: %w", r.dir, err)
		}
		st.Layers = append(st.Layers, info)
	}
	return st, nil
}

// info describes a layer of the tree; r.mu is held.
func (r *Replica) info(id replica.LayerID) (replica.LayerInfo, error) {
	l := r.layers[id]
	allocated, err := l.AllocatedBytes()
	if err != nil {
		return replica.LayerInfo{}, fmt.Errorf("layer %s: %w", id, err)
	}
	m := l.Meta()
	info := replica.LayerInfo{ID: id, Parent: r.st.Layers[r.st.index(id)].Parent, Head: id == r.st.Head, SizeBytes: l.SizeBytes(),
		AllocatedBytes: allocated, DataBytes: -1, Verified: m.Sums, Pruned: m.Pruned, Pinned: r.pins[l] > 0}
	if n, known := l.DataBytes(); known {
		info.DataBytes = n
	}
	if m.Snapshot != nil && !info.Head {
		info.Snapshot = fromLayer(*m.Snapshot)
	}
	return info, nil
}

func fromLayer(s layer.Snapshot) *replica.SnapshotMeta {
	return &replica.SnapshotMeta{Name: s.Name, UserCreated: s.UserCreated, Removed: s.Removed, Created: s.Created, Labels: s.Labels}
}

func toLayer(s replica.SnapshotMeta) *layer.Snapshot {
	return &layer.Snapshot{Name: s.Name, UserCreated: s.UserCreated, Removed: s.Removed, Created: s.Created, Labels: s.Labels}
}

// snapshot is an open snapshot, a stack of sealed layers, or a layer open by itself; what it reads is pinned.
type snapshot struct {
	block.Device
	r    *Replica
	pins []*layer.Layer
}

// Close implements block.Device.
func (s *snapshot) Close() error {
	s.r.mu.Lock()
	_, mine := s.r.snaps[s]
	delete(s.r.snaps, s)
	if mine {
		s.r.unpin(s.pins)
	}
	s.r.mu.Unlock()
	if !mine {
		return block.ErrClosed
	}
	return s.Device.Close()
}

// OpenSnapshot implements replica.Replica. It needs no writer.
func (c *Conn) OpenSnapshot(id replica.LayerID) (block.Device, error) { return c.r.OpenSnapshot(id) }

// OpenSnapshot returns a snapshot's content as a read-only Device. A purge passes it by until it is closed; Close of the Replica closes it.
func (r *Replica) OpenSnapshot(id replica.LayerID) (block.Device, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, fmt.Errorf("snapshot %s: %w", id, block.ErrClosed)
	}
	if !r.st.has(id) || id == r.st.Head {
		return nil, fmt.Errorf("layer %s: %w", id, replica.ErrNoSnapshot)
	}
	if l := r.layers[id]; l == r.pruning || l.Meta().Pruned {
		return nil, fmt.Errorf("layer %s: %w", id, replica.ErrPruned)
	}
	list, err := r.stackOf(id)
	if err != nil {
		return nil, err
	}
	stack, err := layer.NewStack(list, layer.StackOptions{})
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", id, err)
	}
	s := &snapshot{Device: stack, r: r, pins: list}
	r.snaps[s] = struct{}{}
	r.pin(list)
	return s, nil
}

// pin keeps purge and merge away from layers; r.mu is held.
func (r *Replica) pin(list []*layer.Layer) {
	for _, l := range list {
		r.pins[l]++
	}
}

// unpin undoes it; r.mu is held.
func (r *Replica) unpin(list []*layer.Layer) {
	for _, l := range list {
		if r.pins[l]--; r.pins[l] == 0 {
			delete(r.pins, l)
		}
	}
}

// pinned tells whether a layer is read; r.mu is held.
func (r *Replica) pinned(id replica.LayerID) bool { return r.pins[r.layers[id]] > 0 }
