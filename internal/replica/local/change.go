package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
)

// verb runs do with the token of the verbs, for a writer that is let in. A newer writer, or Close, cancels its context; whatever do then still wants to commit, it
// asks again whether it may.
func (c *Conn) verb(ctx context.Context, w replica.Writer, name string, do func(context.Context) error) error {
	r := c.r
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.life, cancel)()
	err := ctx.Err()
	select {
	case r.verbs <- struct{}{}:
		defer func() { <-r.verbs }()
		if err == nil {
			err = r.enterVerb(c, w, cancel)
		}
		if err == nil {
			err = do(ctx)
			r.leaveVerb()
		}
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if why := r.checkWriter(c, w); why != nil && !errors.Is(err, why) {
		err = why // what stopped the verb counts more than how it noticed
	}
	return fmt.Errorf("replica %s: %s: %w", r.dir, name, err)
}

func (r *Replica) enterVerb(c *Conn, w replica.Writer, cancel context.CancelFunc) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.checkWriter(c, w); err != nil {
		return err
	}
	r.stopVerb = cancel
	return nil
}

func (r *Replica) leaveVerb() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopVerb = nil
}

// now returns the state as it is.
func (r *Replica) now() state {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.st
}

// layer returns an open layer of the tree; the token of the verbs is held.
func (r *Replica) layer(id replica.LayerID) *layer.Layer {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.layers[id]
}

// Prepare implements replica.Replica.
func (c *Conn) Prepare(ctx context.Context, w replica.Writer, ch replica.Change, progress func(doneBytes, totalBytes int64)) error {
	return c.verb(ctx, w, "prepare "+ch.Verb, func(ctx context.Context) error {
		if err := c.prepare(ctx, w, ch, progress); err != nil {
			return err
		}
		if ch.Verb != replica.VerbSnapshot && ch.Verb != replica.VerbExpand || c.r.isDone(ch) {
			return nil
		}
		return c.r.flushAhead(ctx)
	})
}

// prepare records the intent and makes the new layer's file, durably.
func (c *Conn) prepare(ctx context.Context, w replica.Writer, ch replica.Change, progress func(doneBytes, totalBytes int64)) error {
	r := c.r
	done, err := r.intend(c, w, ch)
	if err != nil || done {
		return err
	}
	if err := r.removeDropped(); err != nil {
		return err
	}
	if r.prepared == nil {
		l, err := r.make(ctx, ch, progress)
		if err != nil {
			return err
		}
		r.mu.Lock()
		r.prepared = l
		r.mu.Unlock()
	}
	return nil
}

// flushAhead leaves as little as possible to the flush of the instant.
func (r *Replica) flushAhead(ctx context.Context) error {
	err := r.stack.FlushAhead(ctx)
	if errors.Is(err, block.ErrFailed) {
		return r.fail(err)
	}
	return err
}

// intend records ch as the intent, in the place of any other, and returns whether ch has been carried out already.
func (r *Replica) intend(c *Conn, w replica.Writer, ch replica.Change) (done bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.checkWriter(c, w); err != nil {
		return false, err
	}
	if r.st.done(ch) {
		return true, nil
	}
	if r.st.Change != nil && r.st.Change.Equal(ch) {
		return false, nil
	}
	if err := r.st.startsHere(ch); err != nil {
		return false, err
	}
	return false, r.abandon(&ch)
}

// abandon gives an intent up, for another one if next is not nil; r.mu is held.
func (r *Replica) abandon(next *replica.Change) error {
	if r.st.Change == nil && next == nil {
		return nil
	}
	if err := r.update(func(st *state) { st.abandon(); st.Change = next }); err != nil {
		return err
	}
	if r.prepared == nil {
		return nil
	}
	err := r.prepared.Close()
	r.prepared = nil
	return err
}

// removeDropped removes the files of layers that left the tree. Until that is durable they stay listed; the token of the verbs is held.
func (r *Replica) removeDropped() error {
	dropped := r.now().Dropped
	if len(dropped) == 0 {
		return nil
	}
	for _, id := range dropped {
		if err := r.fsys.Remove(r.file(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := r.fsys.SyncDir(r.dir); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.st.Dropped = nil // the next record written says so too
	return nil
}

// make makes the new layer of a change, or opens the one that an earlier attempt made; what that left half made is removed, since only the intent names it.
func (r *Replica) make(ctx context.Context, ch replica.Change, progress func(doneBytes, totalBytes int64)) (*layer.Layer, error) {
	name := r.file(newLayer(ch))
	there, err := disk.Exists(r.fsys, name)
	if err != nil {
		return nil, err
	}
	if there {
		if l := r.reuse(name, ch); l != nil {
			return l, nil
		}
		if err := r.fsys.Remove(name); err != nil {
			return nil, err
		}
	}
	if ch.Verb == replica.VerbMerge {
		return r.merge(ctx, name, *ch.Merge, progress)
	}
	st := r.now()
	parent := st.Head
	if ch.Verb == replica.VerbRevert {
		parent = ch.Chain.Layers[1]
	}
	meta := r.meta(st, newLayer(ch))
	meta.Parent = r.parentID(parent)
	meta.State = layer.StateHead
	return layer.Create(r.fsys, name, meta, ch.Chain.SizeBytes, r.layerOptions())
}

// reuse opens a layer file that an intent names, if it is complete.
func (r *Replica) reuse(name string, ch replica.Change) *layer.Layer {
	l, err := layer.Open(r.fsys, name, r.layerOptions())
	if err != nil {
		return nil
	}
	m, want := l.Meta(), layer.StateHead
	if ch.Verb == replica.VerbMerge {
		want = layer.StateSealed
	}
	if m.ID == layer.ID(newLayer(ch)) && m.State == want && l.SizeBytes() == r.sizeOf(ch) {
		return l
	}
	_ = l.Close() // it is about to be removed
	return nil
}

// sizeOf is the size of a change's new layer.
func (r *Replica) sizeOf(ch replica.Change) int64 {
	if ch.Verb != replica.VerbMerge {
		return ch.Chain.SizeBytes
	}
	return r.layer(ch.Merge.Upper).SizeBytes()
}

// meta is the part of a new layer's header that says whose it is.
func (r *Replica) meta(st state, id replica.LayerID) layer.Meta {
	return layer.Meta{ID: layer.ID(id), Kind: layer.KindVolume, VolumeID: st.VolumeID, Volume: st.Volume, ReplicaID: st.ReplicaID, Created: r.cfg.Now().UTC()}
}

// merge builds the layer that takes the place of several.
func (r *Replica) merge(ctx context.Context, name string, m replica.Merge, progress func(doneBytes, totalBytes int64)) (*layer.Layer, error) {
	var list []*layer.Layer
	for _, id := range m.Layers() {
		list = append(list, r.layer(id))
	}
	lower := list[len(list)-1].Meta()
	meta := r.meta(r.now(), m.Into)
	meta.Parent, meta.Image = lower.Parent, lower.Image
	meta.Snapshot = list[0].Meta().Snapshot
	return layer.Merge(ctx, r.fsys, name, layer.MergeSpec{Layers: list, Meta: meta, Options: r.layerOptions(), Progress: progress})
}

// Change implements replica.Replica.
func (c *Conn) Change(ctx context.Context, w replica.Writer, ch replica.Change) error {
	return c.verb(ctx, w, ch.Verb, func(ctx context.Context) error {
		if c.r.isDone(ch) {
			return nil
		}
		if err := c.prepare(ctx, w, ch, nil); err != nil {
			return err
		}
		var err error
		switch ch.Verb {
		case replica.VerbSnapshot, replica.VerbExpand:
			err = c.instant(ctx, w, func() error { return c.r.seal(ch) })
		case replica.VerbRevert:
			err = c.instant(ctx, w, func() error { return c.r.revert(ch) })
		case replica.VerbMerge:
			err = c.r.swapMerged(c, w, ch)
		}
		if err != nil {
			return err
		}
		c.r.settleSoon()
		// The change is made; a file that could not be removed is tried again by the next verb, and at the next open.
		_ = c.r.removeDropped()
		return nil
	})
}

func (r *Replica) isDone(ch replica.Change) bool {
	st := r.now()
	return st.done(ch)
}

// instant holds the I/O of c, runs do under the lock, and puts the stack as it is then behind c's gate.
func (c *Conn) instant(ctx context.Context, w replica.Writer, do func() error) error {
	if err := c.gate.Hold(ctx); err != nil {
		return err
	}
	defer c.gate.Release()
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	if err := c.r.checkWriter(c, w); err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	c.gate.Swap(c.device())
	return nil
}

// seal is the instant of a snapshot or expansion; r.mu is held and no I/O is under way. Once the seal reached the disk there is no way back: an error then fails the
// replica, and opening finds the old head sealed, and goes on, or not.
func (r *Replica) seal(ch replica.Change) error {
	err := r.stack.Seal(func(m *layer.Meta) { m.Snapshot = toLayer(*ch.Snapshot) })
	if errors.Is(err, block.ErrFailed) {
		return r.failLocked(err)
	}
	if err != nil {
		return err // refused before anything was written, because of labels that do not fit, say
	}
	if err := r.update(func(st *state) { st.carry(ch) }); err != nil {
		return r.failLocked(err)
	}
	if err := r.stack.PushHead(r.prepared); err != nil {
		return r.failLocked(err)
	}
	r.layers[r.st.Head], r.prepared = r.prepared, nil
	return nil
}

// revert is the instant of a revert; r.mu is held and no I/O is under way.
func (r *Replica) revert(ch replica.Change) error {
	old := r.st.Head
	list, err := r.stackOf(ch.Chain.Layers[1])
	if err != nil {
		return err
	}
	stack, err := layer.NewStack(append([]*layer.Layer{r.prepared}, list...), layer.StackOptions{})
	if err != nil {
		return err
	}
	if err := r.update(func(st *state) { st.carry(ch) }); err != nil {
		return errors.Join(err, stack.Close())
	}
	gone := r.stack
	r.stack = stack
	r.layers[r.st.Head], r.prepared = r.prepared, nil
	return errors.Join(gone.Close(), r.forget(old))
}

// forget closes a layer that left the tree; r.mu is held.
func (r *Replica) forget(id replica.LayerID) error {
	l := r.layers[id]
	delete(r.layers, id)
	if err := l.Close(); err != nil {
		return fmt.Errorf("layer %s: %w", id, err)
	}
	return nil
}

// swapMerged puts the merged layer in the place of those it was made of. I/O goes on, also on open snapshots, which keep the files that they read.
func (r *Replica) swapMerged(c *Conn, w replica.Writer, ch replica.Change) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.checkWriter(c, w); err != nil {
		return err
	}
	m := *ch.Merge
	merged := r.prepared
	var old []*layer.Layer
	for _, id := range m.Layers() {
		old = append(old, r.layers[id])
	}
	if said := old[0].Meta().Snapshot; said != nil { // it may have changed since the merge began
		if err := merged.SetMeta(func(to *layer.Meta) { to.Snapshot = said }); err != nil {
			return err
		}
	}
	onChain := contains(r.stack.Layers(), old[0])
	if err := r.update(func(st *state) { st.carry(ch) }); err != nil {
		return err
	}
	r.layers[m.Into], r.prepared = merged, nil
	if onChain {
		if err := r.stack.ReplaceMerged(old, merged); err != nil {
			return r.failLocked(err)
		}
	}
	for _, child := range r.st.children(m.Into) {
		if err := r.reparent(node{ID: child, Parent: m.Into}); err != nil {
			return r.failLocked(err)
		}
	}
	var errs []error
	for _, id := range m.Layers() {
		errs = append(errs, r.forget(id))
	}
	return errors.Join(errs...)
}

func contains(list []*layer.Layer, l *layer.Layer) bool {
	for _, x := range list {
		if x == l {
			return true
		}
	}
	return false
}

// SetSnapshot implements replica.Replica.
func (c *Conn) SetSnapshot(ctx context.Context, w replica.Writer, id replica.LayerID, m replica.SnapshotMeta) error {
	return c.verb(ctx, w, "set snapshot", func(context.Context) error {
		r := c.r
		r.mu.Lock()
		defer r.mu.Unlock()
		if err := r.checkWriter(c, w); err != nil {
			return err
		}
		if !r.st.has(id) || id == r.st.Head {
			return fmt.Errorf("layer %s: %w", id, replica.ErrNoSnapshot)
		}
		// Also if it says so already: that may not be durable, when whoever wrote it was killed.
		if err := r.layers[id].SetMeta(func(to *layer.Meta) { to.Snapshot = toLayer(m) }); err != nil {
			return fmt.Errorf("layer %s: %w", id, err)
		}
		return nil
	})
}
