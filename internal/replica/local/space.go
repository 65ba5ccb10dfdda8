package local

import (
	"context"
	"errors"
	"fmt"

	"ashlar/internal/block"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
)

// Count implements replica.Replica.
func (c *Conn) Count(ctx context.Context) error { return c.r.Count(ctx) }

// Space implements replica.Replica.
func (c *Conn) Space(ctx context.Context) (replica.Usage, error) { return c.r.Space(ctx) }

// Changed implements replica.Replica.
func (c *Conn) Changed(ctx context.Context, d replica.Diff) ([]replica.Range, int64, error) {
	return c.r.Changed(ctx, d)
}

// held is some of a replica's layers, with references, as they stood at one moment.
type held struct {
	tree  []layer.Placed
	ids   []replica.LayerID
	base  *layer.Layer
	files []*layer.Layer // to be given back
}

func (h *held) close() error {
	var errs []error
	for _, l := range h.files {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// retain holds on to a layer.
func (h *held) retain(l *layer.Layer) { h.files = append(h.files, l.Retain()) }

// hold returns all layers, those below first; r.mu is held.
func (r *Replica) hold() *held {
	h := &held{base: r.base}
	if r.base != nil {
		h.retain(r.base)
	}
	at := map[replica.LayerID]int{"": -1}
	for len(h.tree) < len(r.st.Layers) { // a tree: every round finds at least one whose parent was found
		for _, n := range r.st.Layers {
			parent, ok := at[n.Parent]
			if _, twice := at[n.ID]; !ok || twice {
				continue
			}
			at[n.ID] = len(h.tree)
			h.add(r, n.ID, parent)
		}
	}
	return h
}

func (h *held) add(r *Replica, id replica.LayerID, parent int) {
	p := layer.Placed{Layer: r.layers[id], Parent: parent}
	if id == r.st.Head {
		p.Stack = r.stack
	}
	h.retain(p.Layer)
	h.tree = append(h.tree, p)
	h.ids = append(h.ids, id)
}

// Count is replica.Replica's.
func (r *Replica) Count(ctx context.Context) error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return fmt.Errorf("count replica %s: %w", r.dir, block.ErrClosed)
	}
	h := r.hold()
	r.mu.Unlock()
	var err error
	for _, p := range h.tree {
		if _, known := p.Layer.DataBytes(); known {
			continue
		}
		if p.Stack != nil {
			err = p.Stack.Count(ctx)
		} else {
			err = p.Layer.Count(ctx)
		}
		if err != nil {
			break
		}
	}
	if err = errors.Join(err, h.close()); err != nil {
		return fmt.Errorf("count replica %s: %w", r.dir, err)
	}
	return nil
}

// Space is replica.Replica's.
func (r *Replica) Space(ctx context.Context) (replica.Usage, error) {
	u := replica.Usage{Layers: map[replica.LayerID]replica.Space{}}
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return u, fmt.Errorf("space of replica %s: %w", r.dir, block.ErrClosed)
	}
	h := r.hold()
	r.decide(h)
	allocated, err := r.files()
	r.mu.Unlock()
	u.ExclusiveBytes = allocated
	if err == nil {
		var uses []layer.Use
		uses, u.SharedBytes, err = layer.Measure(ctx, h.base, h.tree)
		for i, use := range uses {
			if h.tree[i].Layer.Meta().Pruned {
				use.InheritsBytes = 0 // it cannot be read by itself
			}
			u.Layers[h.ids[i]] = replica.Space{ExclusiveBytes: use.HiddenBytes, SharedBytes: use.InheritsBytes, ReclaimableBytes: use.FreedBytes}
			u.ReclaimableBytes += use.FreedBytes
		}
	}
	if err = errors.Join(err, h.close()); err != nil {
		return u, fmt.Errorf("space of replica %s: %w", r.dir, err)
	}
	return u, nil
}

// files adds up what the replica's files take; r.mu is held.
func (r *Replica) files() (int64, error) {
	sum, err := r.lock.Allocated()
	if r.prepared != nil && err == nil {
		var n int64
		n, err = r.prepared.AllocatedBytes()
		sum += n
	}
	for _, l := range r.layers {
		if err != nil {
			return 0, err
		}
		var n int64
		n, err = l.AllocatedBytes()
		sum += n
	}
	return sum, err
}

// decide says what a purge would do with each layer, as volume.Purge does it: system snapshots count as removed; leaves go, and what is a leaf then; what has one child becomes one
// with it, or, below the head, loses what the head hides. r.mu is held.
func (r *Replica) decide(h *held) {
	for i := range h.tree {
		h.tree[i].Next = layer.None
	}
	for i := len(h.tree) - 1; i >= 0; i-- {
		p := &h.tree[i]
		s := p.Layer.Meta().Snapshot
		gone := h.ids[i] != r.st.Head && s != nil && (s.Removed || !s.UserCreated)
		switch {
		case gone && p.Next == layer.None:
			p.Fate = layer.Freed
			continue
		case gone && p.Next >= 0:
			p.Fate = layer.Merged
		}
		if p.Parent < 0 {
			continue
		}
		if below := &h.tree[p.Parent]; below.Next == layer.None {
			below.Next = i
		} else {
			below.Next = layer.Several
		}
	}
}

// Changed is replica.Replica's.
func (r *Replica) Changed(ctx context.Context, d replica.Diff) ([]replica.Range, int64, error) {
	r.mu.Lock()
	h, err := r.between(d.From, d.To)
	if err == nil {
		r.pin(h.files)
	}
	r.mu.Unlock()
	if err != nil {
		return nil, d.Off, fmt.Errorf("differences of replica %s: %w", r.dir, err)
	}
	found, next, err := layer.Changed(ctx, h.tree, d.Off, d.Max)
	r.mu.Lock()
	r.unpin(h.files)
	r.mu.Unlock()
	if err = errors.Join(err, h.close()); err != nil {
		return nil, d.Off, fmt.Errorf("differences of replica %s: %w", r.dir, err)
	}
	list := make([]replica.Range, len(found))
	for i, c := range found {
		list[i] = replica.Range{Off: c.Off, N: c.N, Zero: c.Zero}
	}
	return list, next, nil
}

// between returns the layers from to down to the one above from; r.mu is held.
func (r *Replica) between(from, to replica.LayerID) (*held, error) {
	if r.closed {
		return nil, block.ErrClosed
	}
	if to == "" {
		to = r.st.Head
	}
	for _, id := range []replica.LayerID{from, to} {
		if id != "" && !r.st.has(id) {
			return nil, fmt.Errorf("layer %s: %w", id, replica.ErrNoSnapshot)
		}
	}
	if l := r.layers[to]; l == r.pruning || l.Meta().Pruned {
		return nil, fmt.Errorf("layer %s: %w", to, replica.ErrPruned)
	}
	path, err := r.st.path(to)
	if err != nil {
		return nil, err
	}
	h := &held{}
	for _, id := range path {
		if id == from {
			break
		}
		h.add(r, id, -1)
		if r.st.Layers[r.st.index(id)].Parent == "" && from != "" {
			return nil, errors.Join(fmt.Errorf("layer %s and layer %s: %w", from, to, replica.ErrNotBelow), h.close())
		}
	}
	if len(h.tree) == 0 {
		return nil, fmt.Errorf("layer %s and itself: %w", from, replica.ErrNotBelow)
	}
	return h, nil
}
