package local

import (
	"context"
	"errors"
	"fmt"

	"ashlar/internal/block"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
)

// Purge implements replica.Replica. A snapshot that is read (Pinned) is passed by. Stopped anywhere it is called again; an intent that nobody made is given up.
func (c *Conn) Purge(ctx context.Context, w replica.Writer, progress func(doneBytes, totalBytes int64)) error {
	return c.verb(ctx, w, "purge", func(ctx context.Context) error {
		p := &purge{c: c, w: w, tell: progress}
		err := p.dropLeaves()
		if err == nil {
			err = c.r.removeDropped()
		}
		if err == nil {
			p.report(p.leafBytes)
			err = p.prune(ctx)
		}
		if err == nil {
			p.report(p.total)
		}
		return err
	})
}

// purge is one run.
type purge struct {
	c                *Conn
	w                replica.Writer
	tell             func(doneBytes, totalBytes int64)
	leafBytes, total int64
}

// dropLeaves gives an intent up, adds up the work, and takes out of the tree the removed snapshots that nobody reads and nothing stands on, or only other such ones.
func (p *purge) dropLeaves() error {
	r := p.c.r
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.checkWriter(p.c, p.w); err != nil {
		return err
	}
	if err := r.abandon(nil); err != nil {
		return err
	}
	children := map[replica.LayerID]int{}
	parent := map[replica.LayerID]replica.LayerID{}
	for _, n := range r.st.Layers {
		children[n.Parent]++
		parent[n.ID] = n.Parent
	}
	var leaves []replica.LayerID
	for _, n := range r.st.Layers {
		for id := n.ID; id != "" && children[id] == 0 && r.removed(id) && !r.pinned(id); id = parent[id] {
			leaves = append(leaves, id)
			p.leafBytes += r.allocated(id)
			children[id] = -1 // taken
			children[parent[id]]--
		}
	}
	p.total = p.leafBytes
	if below := parent[r.st.Head]; below != "" && r.removed(below) {
		p.total += r.allocated(below)
	}
	p.report(0)
	return r.drop(leaves)
}

func (p *purge) report(done int64) {
	if p.tell != nil {
		p.tell(done, p.total)
	}
}

// removed tells whether a layer is a snapshot marked removed; r.mu is held.
func (r *Replica) removed(id replica.LayerID) bool {
	s := r.layers[id].Meta().Snapshot
	return id != r.st.Head && s != nil && s.Removed
}

// allocated is for progress only; r.mu is held.
func (r *Replica) allocated(id replica.LayerID) int64 {
	n, err := r.layers[id].AllocatedBytes()
	if err != nil {
		return 0
	}
	return n
}

// drop takes layers out of the tree, all in one record; r.mu is held.
func (r *Replica) drop(leaves []replica.LayerID) error {
	if len(leaves) == 0 {
		return nil
	}
	err := r.update(func(st *state) {
		for _, id := range leaves {
			st.drop(id)
		}
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range leaves {
		errs = append(errs, r.forget(id))
	}
	return errors.Join(errs...)
}

// choosePruned returns the removed snapshot right below the head, if nothing else stands on it and nobody reads it, and keeps readers away from it.
func (r *Replica) choosePruned() *layer.Layer {
	r.mu.Lock()
	defer r.mu.Unlock()
	id := r.st.Layers[r.st.index(r.st.Head)].Parent
	if id == "" || !r.removed(id) || len(r.st.children(id)) != 1 || r.pinned(id) {
		return nil
	}
	r.pruning = r.layers[id]
	return r.pruning
}

// prune frees what the head hides in the removed snapshot below it.
func (p *purge) prune(ctx context.Context) error {
	r := p.c.r
	below := r.choosePruned()
	if below == nil {
		return nil
	}
	defer func() {
		r.mu.Lock()
		r.pruning = nil
		r.mu.Unlock()
	}()
	if !below.Meta().Settled {
		if err := below.Settle(ctx); err != nil && !below.Meta().Settled {
			return fmt.Errorf("layer %s: %w", below.ID(), err)
		}
	}
	_, err := r.stack.Prune(ctx, below, func(done, total int64) {
		p.report(p.leafBytes + int64(float64(done)/float64(total)*float64(p.total-p.leafBytes)))
	})
	if errors.Is(err, block.ErrFailed) {
		return r.fail(err)
	}
	if err != nil {
		return fmt.Errorf("layer %s: %w", below.ID(), err)
	}
	return nil
}
