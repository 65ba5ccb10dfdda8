package control

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// This file carries writes out, and bounds what it costs to tell people why something is not done: thousands of volumes that nobody can place must not keep the one waiting that somebody can.

const (
	// writers is how many writes are under way at once: etcd makes durable together what waits together.
	writers = 16
	// tellMost is how many records a round tells people something in, before it looks again at what is to be done.
	tellMost = 128
	// Records that say something already are written in other words (the free space of a disk changed) so many times in so long, all together.
	retellMost  = 128
	retellEvery = 25 * time.Second
)

// telling is what is remembered of what was told.
type telling struct {
	last  map[catalog.Key]time.Time // when a record was written last
	left  int                       // how many may be written in other words
	until time.Time                 // when it is retellMost again
}

// pick takes of all that is to be told what is told now: first what was never said, then the other words of what was said longest ago. wait is when to ask again: 0 at once, below 0 never.
func (t *telling) pick(all []plan.Write, now time.Time) (some []plan.Write, wait time.Duration) {
	if !now.Before(t.until) {
		t.left = retellMost
	}
	all = slices.Clone(all)
	slices.SortStableFunc(all, func(a, b plan.Write) int {
		return cmp.Or(cmp.Compare(a.For, b.For), t.last[a.Key].Compare(t.last[b.Key]))
	})
	for i, w := range all {
		switch {
		case i == tellMost:
			return some, 0
		case w.For == plan.Retell && t.left == 0:
			return some, t.until.Sub(now)
		case w.For == plan.Retell:
			if t.left == retellMost {
				t.until = now.Add(retellEvery)
			}
			t.left--
		}
		some = append(some, w)
	}
	return some, -1
}

// tell carries out, several at a time, what nothing follows from. wait is when there is more to be told, as of pick.
func (c *Control) tell(ctx context.Context, all []plan.Write, now time.Time) (wait time.Duration) {
	all = slices.DeleteFunc(slices.Clone(all), func(w plan.Write) bool { return now.Before(c.held[w.Key]) })
	some, wait := c.told.pick(all, now)
	groups := make([][]plan.Write, len(some))
	for i := range some {
		groups[i] = some[i : i+1]
	}
	answers, away := c.carryAll(ctx, groups)
	for i, a := range answers {
		if len(a) == 0 {
			continue
		}
		c.told.last[some[i].Key] = now
		if _, err := c.took(ctx, some[i], a[0]); err != nil && (wait < 0 || wait > holdFor) {
			wait = holdFor
		}
	}
	if away { // what was not asked would wait as long
		return holdFor
	}
	return wait
}

// answer is what the catalogue said to a write.
type answer struct {
	value []byte
	rev   catalog.Rev
	err   error
}

// carryAll carries groups of writes out, several groups at a time, each until a write of it fails. away tells that the catalogue could not be asked, after which no group is begun. There are
// answers for what was tried.
func (c *Control) carryAll(ctx context.Context, groups [][]plan.Write) (answers [][]answer, away bool) {
	answers = make([][]answer, len(groups))
	var next atomic.Int64
	var unreachable atomic.Bool
	work := func() {
		for i := int(next.Add(1)) - 1; i < len(groups) && !unreachable.Load(); i = int(next.Add(1)) - 1 {
			for _, w := range groups[i] {
				a := c.carry(ctx, w)
				if answers[i] = append(answers[i], a); a.err == nil {
					continue
				}
				if errors.Is(a.err, catalog.ErrUnreachable) {
					unreachable.Store(true)
				}
				break
			}
		}
	}
	if len(groups) == 1 {
		work()
		return answers, unreachable.Load()
	}
	var wg sync.WaitGroup
	for range min(writers, len(groups)) {
		wg.Go(work)
	}
	wg.Wait()
	return answers, unreachable.Load()
}

// carry carries a write out, with its notes. It may be called by several goroutines at once.
func (c *Control) carry(ctx context.Context, w plan.Write) (a answer) {
	if w.Value == nil {
		a.err = c.cfg.Catalog.Delete(ctx, w.Key, w.Was)
	} else if a.value, a.err = json.Marshal(w.Value); a.err == nil {
		a.rev, a.err = c.cfg.Catalog.Put(ctx, w.Key, a.value, w.Was)
	}
	if a.err != nil {
		a.err = fmt.Errorf("%s: %w", w.Key, a.err)
		return a
	}
	for _, ev := range w.Notes {
		if err := catalog.Note(ctx, c.cfg.Catalog, ev); err != nil {
			c.cfg.Log.Warn("event lost", "error", err)
		}
	}
	return a
}

// took takes the answer to a write into the view: what was put is planned with at once, what was deleted when the watch shows it. What failed is held back until the watch shows why.
func (c *Control) took(ctx context.Context, w plan.Write, a answer) (put bool, err error) {
	switch err = a.err; {
	case err == nil && w.Value == nil:
		c.held[w.Key] = c.cfg.Now().Add(holdFor) // or the next plan would delete it again
		return false, nil
	case err == nil:
		err = c.view.Apply(catalog.Event{Entry: catalog.Entry{Key: w.Key, Value: a.value, Rev: a.rev}})
	}
	if err == nil {
		return true, nil
	}
	c.held[w.Key] = c.cfg.Now().Add(holdFor)
	if !errors.Is(err, catalog.ErrConflict) && !errors.Is(err, catalog.ErrNotFound) && ctx.Err() == nil {
		c.cfg.Log.Warn("write failed", "error", err)
	}
	return false, err
}
