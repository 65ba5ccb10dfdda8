package volume_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/replica"
	"ashlar/internal/volume"
)

// farCopy is a copy as one on another node behaves: it may fall silent, when calls wait until it is closed, and its host may be booted again.
type farCopy struct {
	replica.Replica
	mu     sync.Mutex // guards the rest
	silent chan struct{}
	closed chan struct{}
	boot   string // "": the copy's own
	lost   error  // what writes, flushes and confirmations are answered with
	swap   func() // called by Fence, before it answers

	writing, flushing chan struct{} // capacity 1: one waits
}

func newFarCopy(r replica.Replica) *farCopy {
	return &farCopy{Replica: r, closed: make(chan struct{}), writing: make(chan struct{}, 1), flushing: make(chan struct{}, 1)}
}

func (c *farCopy) set(do func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	do()
}

// answer waits while the copy is silent, and says so on waiting.
func (c *farCopy) answer(waiting chan<- struct{}) error {
	c.mu.Lock()
	silent, lost := c.silent, c.lost
	c.mu.Unlock()
	if silent != nil {
		select {
		case waiting <- struct{}{}:
		default:
		}
		select {
		case <-silent:
		case <-c.closed:
		}
	}
	select {
	case <-c.closed:
		return block.ErrClosed
	default:
		return lost
	}
}

// WriteAt implements block.Device.
func (c *farCopy) WriteAt(p []byte, off int64) (int, error) {
	if err := c.answer(c.writing); err != nil {
		return 0, err
	}
	return c.Replica.WriteAt(p, off)
}

// Flush implements block.Device.
func (c *farCopy) Flush() error {
	if err := c.answer(c.flushing); err != nil {
		return err
	}
	return c.Replica.Flush()
}

// Confirm implements replica.Replica.
func (c *farCopy) Confirm(ctx context.Context, w replica.Writer) error {
	c.mu.Lock()
	lost := c.lost
	c.mu.Unlock()
	return errors.Join(lost, c.Replica.Confirm(ctx, w))
}

// Fence implements replica.Replica.
func (c *farCopy) Fence(ctx context.Context, w replica.Writer) error {
	if c.swap != nil {
		c.swap()
	}
	return c.Replica.Fence(ctx, w)
}

// Keep implements replica.Replica.
func (c *farCopy) Keep(ctx context.Context, w replica.Writer, rec replica.Record) error {
	c.mu.Lock()
	silent := c.silent
	c.mu.Unlock()
	if silent != nil {
		select {
		case <-silent:
		case <-c.closed:
			return block.ErrClosed
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return c.Replica.Keep(ctx, w, rec)
}

// Status implements replica.Replica.
func (c *farCopy) Status(ctx context.Context) (replica.Status, error) {
	st, err := c.Replica.Status(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.boot != "" {
		st.BootID = c.boot
	}
	return st, err
}

// Close implements block.Device.
func (c *farCopy) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.closed:
		return block.ErrClosed
	default:
		close(c.closed)
	}
	return c.Replica.Close()
}

// far makes a config's copy one on another node.
func far(c **farCopy) func(*volume.Config) {
	return func(cfg *volume.Config) {
		*c = newFarCopy(cfg.Replicas[0].Replica)
		cfg.Replicas[0].Replica = *c
	}
}

const otherBoot = "2f1c7d8e-0000-4000-8000-999999999999"

// TestCloseOfSilentCopy: a close of a volume whose copy does not answer ends with its context, one that waits is ended by Abandon, whether it waits for a guest's write or for its own flush; and none of that says that
// the copy failed.
func TestCloseOfSilentCopy(t *testing.T) {
	byContext := func(g *rig, _ *farCopy) error {
		ctx, cancel := context.WithTimeout(g.ctx, 50*time.Millisecond)
		defer cancel()
		return g.v.Close(ctx)
	}
	abandoned := func(g *rig, _ *farCopy) error { return errors.Join(g.v.Abandon(), g.v.Close(g.ctx)) }
	inFlush := func(g *rig, c *farCopy) error {
		done := make(chan error, 1)
		go func() { done <- g.v.Close(g.ctx) }()
		<-c.flushing
		if err := g.v.Abandon(); err != nil {
			return err
		}
		select {
		case err := <-done:
			if err == nil {
				return errors.New("a flush that was not done is no error")
			}
			return nil
		case <-time.After(time.Minute):
			return errors.New("it hangs")
		}
	}
	for name, tc := range map[string]struct {
		stuck bool // a guest's write waits
		told  bool // the close says that it could not flush
		end   func(*rig, *farCopy) error
	}{"context, a write waits": {true, true, byContext}, "context, the flush waits": {false, true, byContext}, "abandoned": {true, false, abandoned}, "abandoned in its flush": {false, false, inFlush}} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t, 1<<20, disk.MemOptions{})
			var c *farCopy
			g.open(far(&c))
			g.fill(1, 0, 4096)
			c.set(func() { c.silent = make(chan struct{}) })
			answer := make(chan error, 1)
			if tc.stuck {
				go func() {
					_, err := g.v.Device().WriteAt(make([]byte, 4096), 4096)
					answer <- err
				}()
				<-c.writing
			} else {
				answer <- block.ErrClosed
			}
			if err := tc.end(g, c); (err != nil) != tc.told {
				t.Errorf("it ended with %v", err)
			}
			if err := <-answer; err == nil {
				t.Error("a write that was given up is acknowledged")
			}
			rec := g.record()
			if rec.Members[0].Failed != "" || rec.WriterNode != node {
				t.Errorf("the record says %+v", rec)
			}
			g.must(g.r.Close(), "close")
			g.open(func(cfg *volume.Config) { cfg.GuestsGone = true })
			g.wantFill(g.v.Device(), 1, 0, 4096)
			g.close()
		})
	}
}

// TestCopyBootedAgain: a copy whose host lost what was not flushed ends the volume for its guests, needs no salvage, and lets new guests in; one that lost nothing goes on, and the record knows its new boot.
func TestCopyBootedAgain(t *testing.T) {
	g := newRig(t, 1<<20, disk.MemOptions{})
	var c *farCopy
	g.open(far(&c))
	g.fill(1, 0, 4096)
	g.flush()
	c.set(func() { c.boot = otherBoot })
	g.must(g.v.Confirm(g.ctx), "confirm")
	if got := g.record().Members[0].Incarnation; got != otherBoot {
		t.Errorf("the record knows boot %s", got)
	}
	g.wantSettled()

	c.set(func() { c.lost = errors.Join(replica.ErrRestarted, block.ErrFailed) })
	if _, err := g.v.Device().WriteAt(make([]byte, 4096), 0); !errors.Is(err, volume.ErrLost) || errors.Is(err, block.ErrFailed) {
		t.Errorf("a write after that: %v", err)
	}
	g.want(g.v.Device().Flush(), volume.ErrLost, "a flush after that")
	g.want(g.v.Confirm(g.ctx), volume.ErrLost, "confirmed after that")
	if st := g.status(); st.State != volume.StateLost {
		t.Errorf("state %s", st.State)
	}
	if rec := g.record(); rec.Members[0].Failed != "" {
		t.Errorf("it is taken for failed: %+v", rec.Members)
	}
	g.must(g.r.Close(), "close")
	// The guests are not taken on again, whoever restarts.
	g.want(g.tryOpen(resume, func(cfg *volume.Config) { cfg.Guests = 1 }), volume.ErrLost, "opened for the same guests")
	g.open(func(cfg *volume.Config) { cfg.GuestsGone = true })
	g.close()
}

// TestBootedWhileOpening: a host that is booted between the look at its copy and the fence is noticed, whether the epoch is resumed or claimed.
func TestBootedWhileOpening(t *testing.T) {
	for _, what := range []string{"resumed", "claimed"} {
		t.Run(what, func(t *testing.T) {
			g := newRig(t, 1<<20, disk.MemOptions{})
			g.open()
			g.fill(1, 0, 4096)
			g.kill()
			var c *farCopy
			g.want(g.tryOpen(far(&c), func(cfg *volume.Config) {
				cfg.Resume, cfg.Guests = what == "resumed", 1
				c.swap = func() { c.set(func() { c.boot = otherBoot }) }
			}), volume.ErrLost, "opened for guests of before")
			g.must(g.openReplica(false), "open the copy")
			g.must(g.r.Close(), "close the copy")
		})
	}
}

// TestGuestsOvertaken: guests who were served under an epoch that somebody else ended are not served again by whoever restarts; an epoch that was only claimed ended nothing.
func TestGuestsOvertaken(t *testing.T) {
	g := newRig(t, 1<<20, disk.MemOptions{})
	g.open()
	g.kill()
	other := func(cfg *volume.Config) { cfg.Node, cfg.BootID, cfg.GuestsGone = "node-2", otherBoot, true }
	guests := func(cfg *volume.Config) { cfg.Resume, cfg.Guests = true, 1 }
	// Somebody claims, and dies before he opens.
	rec := g.record()
	_, rev, err := g.ledger.Clone().Read(g.ctx, volumeID)
	g.must(err, "read")
	claimed, err := volume.Claim(rec, time.Now())
	g.must(err, "claim")
	_, err = g.ledger.Swap(g.ctx, claimed, rev)
	g.must(err, "claim")
	g.open(guests)
	if st := g.status(); st.Writer.Epoch < 2 && st.Writer.Session < 2 {
		t.Errorf("writer %+v", st.Writer)
	}
	g.kill()
	for _, after := range []string{"dies", "closes"} {
		g.open(other)
		if after == "closes" {
			g.close()
		} else {
			g.kill()
		}
		before := g.record()
		g.want(g.tryOpen(guests), block.ErrFenced, "opened for guests of before, after the other "+after)
		if !g.record().Equal(before) {
			t.Error("and something was claimed")
		}
	}
}
