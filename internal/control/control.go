// Package control is the leader's loop: it keeps a copy of the catalogue, asks plan what the cluster needs next, and writes that back. It keeps nothing that the
// catalogue does not: stopped between any two writes and started again, here or elsewhere, it goes on.
//
// Read next: plan (what is decided), agent (who acts on it).
package control

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// Leader sees to it that one control at a time leads. Lead calls fn when this one has become the leader, with a context that ends when it is not the leader
// any more; it returns fn's error, or ctx's when that ends first. It may call fn several times.
type Leader interface {
	Lead(ctx context.Context, fn func(context.Context) error) error
}

// Alone is the Leader of a cluster with one control: it leads at once.
type Alone struct{}

// Lead implements Leader.
func (Alone) Lead(ctx context.Context, fn func(context.Context) error) error { return fn(ctx) }

// Config is what control needs of the world.
type Config struct {
	Catalog catalog.Catalog
	Leader  Leader           // nil: Alone
	Resync  time.Duration    // how often it plans although nothing changed; zero: 30 s
	Now     func() time.Time // nil: time.Now
	NewID   func() string    // 32 random hex digits; nil: the kernel's
	API     plan.Window      // the versions this build speaks between nodes: others that speak none of them get nothing; zero: not compared
	Log     *slog.Logger     // nil: dropped
}

// Control is the loop. One goroutine.
type Control struct {
	cfg  Config
	view *plan.View
	away bool
	// held keeps records from being written again and again from an old picture: until they change, or a while has passed.
	held map[catalog.Key]time.Time
	// planned is how long this round's plans took.
	planned time.Duration
}

const (
	resync = 30 * time.Second
	// holdFor is how long a write that failed waits for the watch to show why.
	holdFor = 200 * time.Millisecond
	// share bounds what planning takes of a processor: after a round it rests so many times as long as its plans took, but not longer than restMax, and takes what changed meanwhile together.
	share   = 2
	restMax = 100 * time.Millisecond
)

// New returns a Control; Run makes it work. It panics without a Catalog, which is a mistake of the program.
func New(cfg Config) *Control {
	if cfg.Catalog == nil {
		panic("control: New without a Catalog")
	}
	if cfg.Leader == nil {
		cfg.Leader = Alone{}
	}
	if cfg.Resync == 0 {
		cfg.Resync = resync
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.NewID == nil {
		cfg.NewID = newID
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Control{cfg: cfg}
}

func newID() string {
	var b [16]byte
	rand.Read(b[:]) //nolint:errcheck // it cannot fail
	return hex.EncodeToString(b[:])
}

// Run leads, when it is this control's turn, until ctx ends, whose error it returns. The catalogue being away is no reason to end.
func (c *Control) Run(ctx context.Context) error {
	return c.cfg.Leader.Lead(ctx, c.lead)
}

// lead follows the catalogue and plans at every change.
func (c *Control) lead(ctx context.Context) error {
	c.view, c.held = plan.NewView(), map[catalog.Key]time.Time{}
	ctx, cancel := context.WithCancel(ctx)
	batches := make(chan catalog.Batch, 64)
	done := make(chan error, 1)
	follow := func() {
		done <- catalog.Follow(ctx, c.cfg.Catalog, func(b catalog.Batch) error {
			select {
			case batches <- b:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}
	stopped := background(follow)
	defer stopped()
	defer cancel()

	timer := time.NewTimer(c.cfg.Resync)
	defer timer.Stop()
	for {
		select {
		case err := <-done:
			return err
		case b := <-batches:
			c.take(b)
			c.drain(batches)
		case <-timer.C:
		}
		wait := c.cfg.Resync
		c.planned = 0
		if again := c.round(ctx); again {
			wait = holdFor
		}
		if rest := min(share*c.planned, restMax); rest > 0 {
			timer.Reset(rest)
			select {
			case <-timer.C:
			case <-ctx.Done():
			}
		}
		timer.Reset(wait)
	}
}

// drain takes what has come: one plan for all that is known.
func (c *Control) drain(batches <-chan catalog.Batch) {
	for {
		select {
		case b := <-batches:
			c.take(b)
		default:
			return
		}
	}
}

func (c *Control) take(b catalog.Batch) {
	if c.away = b.Away; b.Reset {
		c.view.Reset()
	}
	for _, ev := range b.Events {
		delete(c.held, ev.Key)
		if err := c.view.Apply(ev); err != nil {
			c.cfg.Log.Error("record cannot be read", "error", err)
		}
	}
}

// round plans and writes until there is nothing left to write; it tells whether something was held back.
func (c *Control) round(ctx context.Context) (again bool) {
	const bound = 16 // each round does all it can; more of them only follow from what the first wrote
	for range bound {
		if c.away || ctx.Err() != nil {
			return false
		}
		wrote := false
		now := c.cfg.Now()
		failed := map[string]bool{}
		began := time.Now() // a duration, whatever Now is
		writes := plan.Cluster(plan.ClusterInput{View: c.view, Now: now, NewID: c.cfg.NewID, API: c.cfg.API})
		c.planned += time.Since(began)
		for _, w := range writes {
			if until, ok := c.held[w.Key]; ok && now.Before(until) || w.Group != "" && failed[w.Group] {
				failed[w.Group], again = true, true
				continue
			}
			put, err := c.write(ctx, w)
			if err != nil {
				failed[w.Group], again = true, true
				c.held[w.Key] = now.Add(holdFor)
				if !errors.Is(err, catalog.ErrConflict) && !errors.Is(err, catalog.ErrNotFound) && ctx.Err() == nil {
					c.cfg.Log.Warn("write failed", "error", err)
				}
				continue
			}
			wrote = wrote || put
		}
		if !wrote {
			return again
		}
	}
	return true
}

// write carries one write out and applies it to the view: what was put is planned with at once, what was deleted when the watch shows it.
func (c *Control) write(ctx context.Context, w plan.Write) (put bool, err error) {
	if w.Value == nil {
		// Held until the watch shows it, or the next plan would delete it again.
		c.held[w.Key] = c.cfg.Now().Add(holdFor)
		err = c.cfg.Catalog.Delete(ctx, w.Key, w.Was)
	} else {
		var value []byte
		var rev catalog.Rev
		if value, err = json.Marshal(w.Value); err == nil {
			rev, err = c.cfg.Catalog.Put(ctx, w.Key, value, w.Was)
		}
		if err == nil {
			put = true
			err = c.view.Apply(catalog.Event{Entry: catalog.Entry{Key: w.Key, Value: value, Rev: rev}})
		}
	}
	if err != nil {
		return false, fmt.Errorf("%s: %w", w.Key, err)
	}
	for _, ev := range w.Notes {
		if err := catalog.Note(ctx, c.cfg.Catalog, ev); err != nil {
			c.cfg.Log.Warn("event lost", "error", err)
		}
	}
	return put, nil
}
