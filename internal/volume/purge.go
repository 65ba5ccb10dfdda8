package volume

import (
	"context"
	"slices"

	"ashlar/internal/replica"
)

// Purge frees what no snapshot that is wanted needs. It marks every system snapshot removed, and then, until nothing changes: a removed snapshot that nothing
// stands on is deleted; one whose only child is another snapshot becomes one layer with it, and with all its neighbours of which that is true, in one go; one whose only child is the present
// loses what the present hides, and stays; one with several children stays. What any kept snapshot and the present read does not change. Snapshots that are open (OpenSnapshot), and
// those they stand on, are passed by; Stats.Passed says how many of the removed ones. Stopped anywhere it is simply called again.
//
// progress, if not nil, is told how much of the work has been dealt with, in bytes of removed snapshots, always first 0 and last total; done never decreases, and total never changes.
func (v *Volume) Purge(ctx context.Context, progress func(doneBytes, totalBytes int64)) error {
	r := &report{tell: progress}
	err := v.verb(ctx, "purge", func(ctx context.Context, layers []replica.LayerInfo) error {
		for i, l := range layers {
			if l.Snapshot == nil || l.Snapshot.UserCreated || l.Snapshot.Removed {
				continue
			}
			if err := v.markRemoved(ctx, l); err != nil {
				return err
			}
			meta := *l.Snapshot
			meta.Removed = true
			layers[i].Snapshot = &meta
		}
		r.begin(layers)
		return v.purgeCopies(ctx, r.part(r.total/4))
	})
	merged := false
	for more := true; more && err == nil; merged = merged || more {
		err = v.verb(ctx, "purge", func(ctx context.Context, layers []replica.LayerInfo) error {
			var m replica.Merge
			if m, more = nextMerge(layers); !more {
				return nil
			}
			m.Into = v.cfg.NewID()
			return v.changeTelling(ctx, mergeChange(v.book.rec.Chain, m), r.part(r.share(layers, m)))
		})
	}
	if err == nil && merged { // what was merged may stand right below the present
		err = v.verb(ctx, "purge", func(ctx context.Context, _ []replica.LayerInfo) error {
			return v.purgeCopies(ctx, r.part(r.total-r.done))
		})
	}
	if err != nil {
		return err
	}
	r.reach(r.total)
	return v.notePassed(ctx)
}

func (v *Volume) purgeCopies(ctx context.Context, progress func(doneBytes, totalBytes int64)) error {
	for i, r := range v.copies {
		if err := r.Purge(ctx, v.writer, progress); err != nil {
			return v.verbError(i, "purge", err)
		}
	}
	return nil
}

// notePassed counts what the purge left only because it is read.
func (v *Volume) notePassed(ctx context.Context) error {
	layers, err := v.Layers(ctx)
	if err != nil {
		return err
	}
	children, passed := childrenOf(layers), 0
	for _, l := range layers {
		if l.Pinned && l.Snapshot != nil && l.Snapshot.Removed && len(children[l.ID]) < 2 {
			passed++
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.stats.Passed = passed
	return nil
}

func childrenOf(layers []replica.LayerInfo) map[replica.LayerID][]replica.LayerInfo {
	children := map[replica.LayerID][]replica.LayerInfo{}
	for _, l := range layers {
		children[l.Parent] = append(children[l.Parent], l)
	}
	return children
}

// maxMerge bounds how many layers become one in one go: the record has to name them.
const maxMerge = 256

// nextMerge finds neighbours that become one: each but the uppermost is removed, nobody reads it, and its only child is the next, which is a snapshot.
func nextMerge(layers []replica.LayerInfo) (replica.Merge, bool) {
	children := childrenOf(layers)
	// upOf returns what l becomes one with.
	upOf := func(l replica.LayerInfo) (replica.LayerInfo, bool) {
		c := children[l.ID]
		if l.Snapshot == nil || !l.Snapshot.Removed || l.Pinned || len(c) != 1 || c[0].Head || c[0].Pinned {
			return l, false
		}
		return c[0], true
	}
	at := slices.IndexFunc(layers, func(l replica.LayerInfo) bool {
		_, ok := upOf(l)
		below := slices.IndexFunc(layers, func(p replica.LayerInfo) bool { return p.ID == l.Parent })
		if !ok || below < 0 {
			return ok
		}
		_, more := upOf(layers[below]) // begin at the lowest
		return !more
	})
	if at < 0 {
		return replica.Merge{}, false
	}
	m := replica.Merge{Lower: layers[at].ID}
	l, _ := upOf(layers[at])
	for len(m.Between)+2 < maxMerge {
		up, ok := upOf(l)
		if !ok {
			break
		}
		m.Between = append([]replica.LayerID{l.ID}, m.Between...)
		l = up
	}
	m.Upper = l.ID
	return m, true
}

// report turns a purge's steps into progress. A quarter is for what is deleted and pruned at first, half for merging, the rest for pruning what was merged.
type report struct {
	tell        func(doneBytes, totalBytes int64)
	done, total int64
}

// begin adds up the space of removed snapshots; again, because the step is, it keeps what was told.
func (r *report) begin(layers []replica.LayerInfo) {
	if r.total > 0 {
		return
	}
	for _, l := range layers {
		if l.Snapshot != nil && l.Snapshot.Removed {
			r.total += l.AllocatedBytes
		}
	}
	r.reach(0)
}

// share is the part of the total that a merge may use up.
func (r *report) share(layers []replica.LayerInfo, m replica.Merge) int64 {
	n := int64(0)
	for _, l := range layers {
		if l.ID != m.Upper && slices.Contains(m.Layers(), l.ID) {
			n += l.AllocatedBytes
		}
	}
	return min(n/2, max(0, r.total*3/4-r.done))
}

// reach tells, if that is not less than was told before.
func (r *report) reach(done int64) {
	r.done = max(r.done, min(done, r.total))
	if r.tell != nil {
		r.tell(r.done, r.total)
	}
}

// part returns the progress of a step that takes n of the total.
func (r *report) part(n int64) func(doneBytes, totalBytes int64) {
	from := r.done
	return func(done, total int64) {
		if total > 0 {
			r.reach(from + int64(float64(done)/float64(total)*float64(n)))
		}
	}
}
