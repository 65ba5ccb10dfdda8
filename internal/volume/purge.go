package volume

import (
	"context"

	"ashlar/internal/replica"
)

// Purge frees what no snapshot that is wanted needs. It marks every system snapshot removed, and then, until nothing changes: a removed snapshot that nothing
// stands on is deleted; one whose only child is another snapshot becomes one layer with it; one whose only child is the present loses what the present hides,
// and stays; one with several children stays. What any kept snapshot and the present read does not change. Stopped anywhere it is simply called again.
//
// progress, if not nil, is told how much of the space of removed snapshots has been dealt with; done never decreases.
func (v *Volume) Purge(ctx context.Context, progress func(doneBytes, totalBytes int64)) error {
	report := newReport(progress)
	err := v.verb(ctx, "purge", func(ctx context.Context, layers []replica.LayerInfo) error {
		for _, l := range layers {
			if l.Snapshot == nil || l.Snapshot.UserCreated || l.Snapshot.Removed {
				continue
			}
			if err := v.markRemoved(ctx, l); err != nil {
				return err
			}
		}
		return v.purgeCopies(ctx)
	})
	for more := true; more && err == nil; {
		err = v.verb(ctx, "purge", func(ctx context.Context, layers []replica.LayerInfo) error {
			report.see(layers)
			m, ok := nextMerge(layers)
			if more = ok; !ok {
				return v.purgeCopies(ctx)
			}
			m.Into = v.cfg.NewID()
			return v.change(ctx, mergeChange(v.book.rec.Chain, m))
		})
	}
	if err == nil {
		report.end()
	}
	return err
}

func (v *Volume) purgeCopies(ctx context.Context) error {
	for i, r := range v.copies {
		if err := r.Purge(ctx, v.writer, nil); err != nil {
			return v.verbError(i, "purge", err)
		}
	}
	return nil
}

// nextMerge finds a removed snapshot whose only child is another snapshot.
func nextMerge(layers []replica.LayerInfo) (replica.Merge, bool) {
	children := map[replica.LayerID][]replica.LayerInfo{}
	for _, l := range layers {
		children[l.Parent] = append(children[l.Parent], l)
	}
	for _, l := range layers {
		if c := children[l.ID]; l.Snapshot != nil && l.Snapshot.Removed && len(c) == 1 && !c[0].Head {
			return replica.Merge{Lower: l.ID, Upper: c[0].ID}, true
		}
	}
	return replica.Merge{}, false
}

// report turns what is left of removed snapshots into progress.
type report struct {
	tell        func(doneBytes, totalBytes int64)
	done, total int64
}

func newReport(tell func(doneBytes, totalBytes int64)) *report {
	if tell == nil {
		tell = func(int64, int64) {}
	}
	return &report{tell: tell}
}

// see is told the layers before each step.
func (r *report) see(layers []replica.LayerInfo) {
	var left int64
	for _, l := range layers {
		if l.Snapshot != nil && l.Snapshot.Removed {
			left += l.AllocatedBytes
		}
	}
	r.total = max(r.total, left)
	r.done = max(r.done, r.total-left)
	r.tell(r.done, r.total)
}

func (r *report) end() { r.tell(r.total, r.total) }
