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
	"log/slog"
	"strings"
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
	Node    string           // says of this node that it leads, while it does (catalog.KindLeader); "": nothing is said
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
	told telling
	// planned is how long this round's plans took.
	planned time.Duration
}

const (
	resync = 30 * time.Second
	// holdFor is how long a write that failed waits for the watch to show why.
	holdFor       = 200 * time.Millisecond
	announceRetry = time.Second
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
	c.view, c.held, c.told = plan.NewView(), map[catalog.Key]time.Time{}, telling{last: map[catalog.Key]time.Time{}}
	ctx, cancel := context.WithCancel(ctx)
	batches := make(chan catalog.Batch, 4096) // a round's own writes come back here, and must not stand before others' for several rounds
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
	stopped, silent := background(follow), background(func() { c.announce(ctx) })
	defer silent()
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
		case <-timer.C:
		}
		c.drain(batches)
		c.planned = 0
		wait := c.round(ctx)
		if wait < 0 {
			wait = c.cfg.Resync
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

// announce says who leads, until ctx ends.
func (c *Control) announce(ctx context.Context) {
	if c.cfg.Node == "" {
		return
	}
	value, err := json.Marshal(catalog.Leader{Node: c.cfg.Node, Since: c.cfg.Now().UTC()})
	if err != nil { // it has nothing that cannot be encoded
		panic(err)
	}
	for ctx.Err() == nil {
		err := c.cfg.Catalog.Hold(ctx, catalog.Holding{Key: catalog.LeaderKey(), Value: value, TTL: catalog.AliveTTL}, func(catalog.Rev) {})
		c.cfg.Log.Debug("it is not said who leads; trying again", "error", err)
		retry := time.NewTimer(announceRetry)
		select {
		case <-ctx.Done():
		case <-retry.C:
		}
		retry.Stop()
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
		if delete(c.held, ev.Key); ev.Value == nil {
			delete(c.told.last, ev.Key)
		}
		if err := c.view.Apply(ev); err != nil {
			c.cfg.Log.Error("record cannot be read", "error", err)
		}
	}
}

// round plans and writes until there is nothing left to do, and tells some of what there is to be told; wait is when it has more to do although nothing changes, below zero: never.
func (c *Control) round(ctx context.Context) (wait time.Duration) {
	const bound = 16 // each turn does all it can; more of them only follow from what the first wrote
	wait = -1
	for n := range bound {
		if c.away || ctx.Err() != nil {
			return -1
		}
		now := c.cfg.Now()
		began := time.Now() // a duration, whatever Now is
		writes := plan.Cluster(plan.ClusterInput{View: c.view, Now: now, NewID: c.cfg.NewID, API: c.cfg.API})
		c.planned += time.Since(began)
		does := 0
		for does < len(writes) && writes[does].For == plan.Does {
			does++
		}
		wrote, late := c.do(ctx, writes[:does], now)
		if late {
			wait = holdFor
		}
		if wrote && n < bound-1 {
			continue
		}
		if wrote {
			wait = 0
		}
		if more := c.tell(ctx, writes[does:], now); more >= 0 && (wait < 0 || more < wait) {
			wait = more
		}
		break
	}
	return wait
}

// do carries writes out: those of volumes, which have nothing to do with each other, several volumes at a time, all others one after the other. late tells that some were held back or failed.
func (c *Control) do(ctx context.Context, writes []plan.Write, now time.Time) (wrote, late bool) {
	failed := map[string]bool{}
	for len(writes) > 0 {
		groups, n := together(writes)
		writes = writes[n:]
		for i, g := range groups {
			ready := c.ready(g, now)
			if failed[g[0].Group] {
				ready = nil
			}
			if len(ready) < len(g) {
				failed[g[0].Group], late = g[0].Group != "", true
			}
			groups[i] = ready
		}
		answers, away := c.carryAll(ctx, groups)
		for i, g := range groups {
			for k, a := range answers[i] {
				put, err := c.took(ctx, g[k], a)
				if err != nil {
					failed[g[k].Group], late = g[k].Group != "", true
				}
				wrote = wrote || put
			}
		}
		if away { // each of the others would wait as long
			return wrote, true
		}
	}
	return wrote, late
}

// together takes from the beginning of writes what may be carried out at the same time: the groups of volumes, or one write of something else. n is how many writes that are.
func together(writes []plan.Write) (groups [][]plan.Write, n int) {
	for n < len(writes) && strings.HasPrefix(writes[n].Group, "volume/") {
		first := n
		for n < len(writes) && writes[n].Group == writes[first].Group {
			n++
		}
		groups = append(groups, writes[first:n])
	}
	if n == 0 {
		return [][]plan.Write{writes[:1]}, 1
	}
	return groups, n
}

// ready is a group up to the first write that is held back.
func (c *Control) ready(group []plan.Write, now time.Time) []plan.Write {
	for i, w := range group {
		if until, ok := c.held[w.Key]; ok && now.Before(until) {
			return group[:i]
		}
	}
	return group
}
