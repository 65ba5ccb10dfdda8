package local

import (
	"context"
	"errors"
	"fmt"

	"ashlar/internal/block"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
)

// Purge implements replica.Replica. A snapshot that is open (OpenSnapshot) is passed by. Stopped anywhere it is called again; an intent that nobody made is given up.
func (c *Conn) Purge(ctx context.Context, w replica.Writer, progress func(doneBytes, totalBytes int64)) error {
	return c.verb(ctx, w, "purge", func(ctx context.Context) error {
		p := &purge{c: c, w: w, tell: progress}
		if err := p.begin(); err != nil {
			return err
		}
		for {
			id, ok, err := p.dropLeaf()
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			if err := c.r.removeDropped(); err != nil {
				return fmt.Errorf("layer %s: %w", id, err)
			}
		}
		if err := c.r.removeDropped(); err != nil {
			return err
		}
		return p.prune(ctx)
	})
}

// purge is one run.
type purge struct {
	c           *Conn
	w           replica.Writer
	tell        func(doneBytes, totalBytes int64)
	done, total int64
}

// begin gives an intent up, and adds up the work.
func (p *purge) begin() error {
	r := p.c.r
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.checkWriter(p.c, p.w); err != nil {
		return err
	}
	if err := r.abandon(nil); err != nil {
		return err
	}
	for _, n := range r.st.Layers {
		if r.removed(n.ID) {
			p.total += r.allocated(n.ID)
		}
	}
	p.report(0)
	return nil
}

func (p *purge) report(done int64) {
	p.done += done
	if p.tell != nil {
		p.tell(p.done, p.total)
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

// dropLeaf takes one removed snapshot that nothing stands on out of the tree.
func (p *purge) dropLeaf() (replica.LayerID, bool, error) {
	r := p.c.r
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.checkWriter(p.c, p.w); err != nil {
		return "", false, err
	}
	for _, n := range r.st.Layers {
		if !r.removed(n.ID) || len(r.st.children(n.ID)) > 0 || r.pinned(n.ID) {
			continue
		}
		bytes := r.allocated(n.ID)
		if err := r.update(func(st *state) { st.drop(n.ID) }); err != nil {
			return "", false, err
		}
		p.report(bytes)
		return n.ID, true, r.forget(n.ID)
	}
	return "", false, nil
}

// prune frees what the head hides in the removed snapshot below it.
func (p *purge) prune(ctx context.Context) error {
	r := p.c.r
	r.mu.Lock()
	var below *layer.Layer
	id := r.st.Layers[r.st.index(r.st.Head)].Parent
	if id != "" && r.removed(id) && len(r.st.children(id)) == 1 && !r.pinned(id) {
		below = r.layers[id]
	}
	r.mu.Unlock()
	if below == nil {
		return nil
	}
	if !below.Meta().Settled {
		if err := below.Settle(ctx); err != nil && !below.Meta().Settled {
			return fmt.Errorf("layer %s: %w", id, err)
		}
	}
	freed, err := r.stack.Prune(ctx, below)
	if errors.Is(err, block.ErrFailed) {
		return r.fail(err)
	}
	if err != nil {
		return fmt.Errorf("layer %s: %w", id, err)
	}
	p.report(freed)
	return nil
}
