package catalog

import (
	"context"
	"errors"
	"time"
)

// Batch is what Follow hands over. With Reset, Events are all records there are, and whatever the receiver had is void; otherwise changes, in order.
// Away tells that the catalogue does not answer: what the receiver has may be old, and there are no events.
type Batch struct {
	Reset  bool
	Events []Event
	Rev    Rev
	Away   bool
}

// The bounds of Follow's wait before it asks an unreachable catalogue again.
const (
	followWaitMin = 50 * time.Millisecond
	followWaitMax = 2 * time.Second
)

// Follow calls fn with everything there is and then with every change, until ctx ends (its error) or fn fails (fn's error). It starts
// again with everything (Reset) when the history it needs was compacted, and when the catalogue is back after it was away: it says so once and
// asks again, ever more slowly up to every 2 s. fn is called by one goroutine.
func Follow(ctx context.Context, c Catalog, fn func(Batch) error) error {
	f := follower{c: c, fn: fn, wait: followWaitMin}
	for {
		if err := f.round(ctx); err != nil {
			return err
		}
		timer := time.NewTimer(f.wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
		f.wait = min(2*f.wait, followWaitMax)
	}
}

// follower is the state of a Follow: listed tells that the receiver has everything up to rev.
type follower struct {
	c      Catalog
	fn     func(Batch) error
	listed bool
	rev    Rev
	wait   time.Duration
	told   bool // fn knows that the catalogue is away
}

// round lists if it must and watches until the catalogue goes away (nil) or all is over.
func (f *follower) round(ctx context.Context) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		var stop error // fn's
		err := f.list(ctx, &stop)
		if err == nil {
			err = f.c.Watch(ctx, f.rev, func(ev Event) error {
				f.rev, f.wait, f.told = ev.Rev, followWaitMin, false
				stop = f.fn(Batch{Events: []Event{ev}, Rev: ev.Rev})
				return stop
			})
		}
		switch {
		case stop != nil:
			return stop
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, ErrCompacted):
			f.listed = false
		case f.told:
			return nil
		default: // it may come back with another past, restored from a backup
			f.told, f.listed = true, false
			return f.fn(Batch{Away: true, Rev: f.rev})
		}
	}
}

func (f *follower) list(ctx context.Context, stop *error) error {
	if f.listed {
		return nil
	}
	es, rev, err := f.c.List(ctx, "")
	if err != nil {
		return err
	}
	b := Batch{Reset: true, Rev: rev, Events: make([]Event, len(es))}
	for i, e := range es {
		b.Events[i] = Event{e}
	}
	f.listed, f.rev, f.wait, f.told = true, rev, followWaitMin, false
	*stop = f.fn(b)
	return *stop
}
