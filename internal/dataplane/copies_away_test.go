package dataplane

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
	"ashlar/internal/replica/remote"
	"ashlar/internal/volume/ledgertest"
)

// leaver is an original whose node goes away for good before a call of a copy: it and all later ones wait, as remote.Replica's do, until their context ends or it is closed.
type leaver struct {
	origin
	closed chan struct{}

	mu    sync.Mutex // guards the rest
	left  int        // calls that are answered
	since time.Time  // away since
}

// call counts a call, and waits if the node is away.
func (l *leaver) call(ctx context.Context) error {
	l.mu.Lock()
	if l.left--; l.left < 0 && l.since.IsZero() {
		l.since = time.Now()
	}
	away := l.left < 0
	l.mu.Unlock()
	if !away {
		return nil
	}
	select {
	case <-ctx.Done():
		return errors.Join(remote.ErrAway, context.Cause(ctx))
	case <-l.closed:
		return block.ErrClosed
	}
}

// Away is remote.Replica's.
func (l *leaver) Away() (time.Time, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.since, nil
}

// Status implements replica.Replica.
func (l *leaver) Status(ctx context.Context) (replica.Status, error) {
	if err := l.call(ctx); err != nil {
		return replica.Status{}, err
	}
	return l.origin.Status(ctx)
}

// Count implements replica.Replica.
func (l *leaver) Count(ctx context.Context) error {
	if err := l.call(ctx); err != nil {
		return err
	}
	return l.origin.Count(ctx)
}

// Fence implements replica.Replica.
func (l *leaver) Fence(ctx context.Context, w replica.Writer) error {
	if err := l.call(ctx); err != nil {
		return err
	}
	return l.origin.Fence(ctx, w)
}

// Confirm implements replica.Replica. It is asked by the clock, and so not counted.
func (l *leaver) Confirm(ctx context.Context, w replica.Writer) error {
	if since, _ := l.Away(); !since.IsZero() {
		if err := l.call(ctx); err != nil {
			return err
		}
	}
	return l.origin.Confirm(ctx, w)
}

// Keep implements replica.Replica.
func (l *leaver) Keep(ctx context.Context, w replica.Writer, rec replica.Record) error {
	if err := l.call(ctx); err != nil {
		return err
	}
	return l.origin.Keep(ctx, w, rec)
}

// Flush implements block.Device.
func (l *leaver) Flush() error {
	if err := l.call(context.Background()); err != nil {
		return err
	}
	return l.origin.Flush()
}

// OpenLayer implements origin.
func (l *leaver) OpenLayer(ctx context.Context, id replica.LayerID) (block.Device, json.RawMessage, error) {
	if err := l.call(ctx); err != nil {
		return nil, nil, err
	}
	return l.origin.OpenLayer(ctx, id)
}

// Close implements block.Device.
func (l *leaver) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.closed:
		return block.ErrClosed
	default:
		close(l.closed)
	}
	return l.origin.Close()
}

// leave is the node's end.
func (l *leaver) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.left, l.since = 0, time.Now()
}

// TestMoveAway: the original's node goes away for good before any call of a copy, or with the swap, as one does that is removed as soon as nothing of the volume is there any more. The copy ends all the same, soon if the
// swap has happened, and says whether it has.
func TestMoveAway(t *testing.T) {
	atSwap := func(l *leaver) func(ledgertest.Call) ledgertest.Fault {
		return func(c ledgertest.Call) ledgertest.Fault {
			if c.Swap && names(c.Rec, moveTo) {
				l.leave()
			}
			return ledgertest.OK
		}
	}
	if named, _ := moveFromLeaver(t, "away with the swap", 1000, atSwap); !named {
		t.Error("away with the swap: the copy is not in charge")
	}
	ahead := 0 // how many calls there are depends on whether what the layers have was counted yet
	for n, away := 0, true; away && !t.Failed(); n++ {
		var named bool
		if named, away = moveFromLeaver(t, fmt.Sprintf("away before call %d", n), n, nil); !named {
			ahead++
		}
	}
	t.Logf("away before %d calls ahead of the swap", ahead)
	if ahead == 0 {
		t.Error("none")
	}
}

// moveFromLeaver copies from a node that answers so many calls, and checks how that ends and that the next attempt goes well; named tells whether the record names the copy, away whether the node went.
func moveFromLeaver(t *testing.T, how string, answers int, on func(*leaver) func(ledgertest.Call) ledgertest.Fault) (named, away bool) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m := newMover(labelled{t, how})
		m.build()
		var l *leaver
		m.on = func(o origin) origin {
			l = &leaver{origin: o, closed: make(chan struct{}), left: answers}
			if on != nil {
				m.cat.OnCall(on(l))
			}
			return l
		}
		mv := m.move()
		mv.look = copyLookEvery
		began := time.Now()
		err := mv.run(m.ctx)
		took := time.Since(began)
		m.cat.OnCall(nil)
		since, _ := l.Away()
		named, away = m.record().Members[0].ReplicaID == moveTo, !since.IsZero()
		bound := 2 * copyAwayPatience
		if named {
			bound = 15 * time.Second
		}
		if named != (err == nil) || took > bound {
			t.Errorf("%s: moved %t after %v, and it ended with %v", how, named, took, err)
		}
		m.must(mv.disk.close(), "disk")
		m.on = nil
		m.must(m.run(m.ctx), "move again")
		m.wantMoved()
	})
	return named, away
}
