package layer

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"ashlar/internal/disk"
)

// crasher takes crash points: at every change of the disk it lets the power fail, in a copy of the world, and looks at what is left.
type crasher struct {
	t      testing.TB
	rand   *rand.Rand
	points atomic.Int64
	kills  atomic.Int64
	nested atomic.Int64
	every  int           // take one of so many crash points
	copies int           // outcomes of each power cut that are looked at
	meddle func(disk.Op) // does something of its own before the change
	checks bool          // run Check on what is left, too
	busy   sync.Mutex    // held while a crash point is taken; who comes meanwhile passes by
}

// arm has c act at every change of w's disk.
func (c *crasher) arm(w *world) {
	w.mem.OnOp(func(op disk.Op) {
		if !c.busy.TryLock() {
			return
		}
		defer c.busy.Unlock()
		if c.meddle != nil {
			c.meddle(op)
		}
		if c.every > 1 && c.rand.IntN(c.every) != 0 {
			return
		}
		for range c.copies {
			c.point(w, op)
		}
		if c.rand.IntN(4) == 0 {
			c.kill(w, op)
		}
	})
}

// instant is what was certain at a moment: for each unit the index of what was on the medium, and of what was acknowledged.
type instant struct{ floor, acked map[int64]int }

func (w *world) instant() instant {
	w.mu.Lock()
	defer w.mu.Unlock()
	at := instant{map[int64]int{}, map[int64]int{}}
	for u, m := range w.model {
		at.floor[u], at.acked[u] = m.floor, m.acked
	}
	return at
}

// fork copies the world around mem, which is what a crash leaves. at was taken before mem was made: what was acknowledged later may not be there, and
// every version begun until now may be.
func (c *crasher) fork(w *world, mem *disk.Mem, at instant) *world {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := &world{
		t: w.t, mem: mem, rand: rand.New(rand.NewPCG(c.rand.Uint64(), 1)), boot: w.boot, lim: w.lim, depth: w.depth + 1, hist: slices.Clone(w.hist),
		chain: slices.Clone(w.chain), base: w.base, snaps: slices.Clone(w.snaps), files: w.files,
		nextID: w.nextID + 1000000*uint64(w.depth+1), model: map[int64]*unitModel{}, full: w.full,
	}
	for u, m := range w.model {
		i := at.floor[u]
		f.model[u] = &unitModel{versions: slices.Clone(m.versions[i:]), acked: max(0, at.acked[u]-i)}
	}
	return f
}

// point lets the power fail before op.
func (c *crasher) point(w *world, op disk.Op) {
	at := w.instant()
	f := c.fork(w, w.mem.CrashClone(disk.CrashOptions{Rand: c.rand}), at)
	for _, m := range f.model {
		m.acked = 0 // only what was flushed is promised from here on
	}
	f.note("power cut before %v", op)
	f.boot = w.boot + 1 + uint64(w.depth)*1000
	c.points.Add(1)
	c.examine(f, fromFloor)
}

// kill lets the process die before op.
func (c *crasher) kill(w *world, op disk.Op) {
	at := w.instant()
	f := c.fork(w, w.mem.Clone(), at)
	f.note("kill before %v", op)
	c.kills.Add(1)
	c.examine(f, fromAcked)
}

// examine opens what a crash left, compares, and sometimes goes on: with crashes during recovery, and with more operations and another crash.
func (c *crasher) examine(f *world, from func(*unitModel) int) {
	f.t.Helper()
	f.lim.inline = true // one writer from here on: what runs in the background would change the disk, and be copied, in the middle of its steps
	deeper := f.depth < 3 && c.rand.IntN(60*f.depth*f.depth) == 0
	if deeper {
		c.nested.Add(1)
		sub := &crasher{t: c.t, rand: c.rand, every: 2, copies: 1}
		sub.arm(f)
		defer func() {
			c.points.Add(sub.points.Load())
			c.kills.Add(sub.kills.Load())
			c.nested.Add(sub.nested.Load())
		}()
	}
	f.recover(from)
	f.check("after "+f.hist[len(f.hist)-1], from, true)
	f.checkSnapshots("after a crash")
	if c.checks {
		problems, err := Check(context.Background(), f.mem, f.chain)
		f.must(err, "check")
		if len(problems) > 0 {
			f.fatalf("after a crash: %v", problems)
		}
	}
	if deeper {
		for range 6 {
			if f.full {
				f.stepFull()
				continue
			}
			if err := f.step(); err != nil {
				f.fatalf("after a crash: %v", err)
			}
		}
	}
	f.must(f.stack.Close(), "close")
	f.mem.OnOp(nil)
}

// recover opens the chain, and completes a snapshot that a crash interrupted after the seal.
func (w *world) recover(from func(*unitModel) int) {
	w.t.Helper()
	m, _, err := Inspect(w.mem, w.chain[0])
	w.must(err, "inspect head")
	if m.State != StateSealed {
		w.open()
		return
	}
	// The seal had reached the medium, the new chain had not been written down anywhere: roll forward.
	w.open()
	w.check("sealed, after "+w.hist[len(w.hist)-1], from, false)
	content := w.content(w.stack)
	w.must(w.stack.Close(), "close")
	name := w.create(m.ID)
	w.snaps = append(w.snaps, snapshot{chain: slices.Clone(w.chain), content: content})
	w.chain = append([]string{name}, w.chain...)
	w.open()
}

// history runs steps with crash points at every change of the disk.
func (c *crasher) history(seed uint64, n int, lim limits) {
	w := newWorld(c.t, seed, disk.MemOptions{Reflink: seed%2 == 0, Seed: seed}, lim)
	w.note("seed %d, limits %+v", seed, lim)
	c.arm(w)
	for range n {
		if err := w.step(); err != nil {
			w.fatalf("seed %d: %v", seed, err)
		}
	}
	w.mem.OnOp(nil)
	w.must(w.stack.Close(), "close")
}

// TestCrashClones stops at every change of the disk in random histories, loses any subset of what was not flushed, tears at 512 bytes, and opens what is left.
func TestCrashClones(t *testing.T) {
	c := &crasher{t: t, copies: 2}
	n := steps(t, 4)
	for seed := range uint64(n) {
		c.rand = rand.New(rand.NewPCG(seed, 99))
		c.history(seed, 40, limitsFor(seed))
	}
	t.Logf("crash points: %d power cuts, %d kills, of them histories that went on and crashed again: %d; seeds 0 to %d", c.points.Load(), c.kills.Load(), c.nested.Load(), n-1)
}

// TestCrashConcurrent does the same with several writers, each with units of its own, and the background at work, so that flushes, covers and checkpoints
// fall between the halves of writes.
func TestCrashConcurrent(t *testing.T) {
	c := &crasher{t: t, copies: 2, every: 2}
	n := steps(t, 6)
	ops := 0
	for seed := range uint64(n) {
		c.rand = rand.New(rand.NewPCG(seed, 77))
		lim := limitsFor(seed)
		lim.inline = false
		w := newWorld(t, seed, disk.MemOptions{Seed: seed}, lim)
		w.note("seed %d, limits %+v, several writers", seed, lim)
		c.arm(w)
		ops += w.concurrently(seed, 5, 40)
		w.mem.OnOp(nil)
		w.check("at the end", fromAcked, false)
		w.must(w.stack.Close(), "close")
	}
	t.Logf("crash points: %d power cuts, %d kills, %d crashed again, in %d operations of 5 writers; seeds 0 to %d", c.points.Load(), c.kills.Load(), c.nested.Load(), ops, n-1)
}

// concurrently runs writers that own every so many-th hot unit, and returns how many operations they did.
func (w *world) concurrently(seed uint64, writers, steps int) int {
	var all sync.WaitGroup
	errs := make(chan error, writers)
	for i := range writers {
		all.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(i)))
			var own []int64
			for k, u := range hotUnits() {
				if k%writers == i {
					own = append(own, u)
				}
			}
			for range steps {
				var err error
				switch u := own[rnd.IntN(len(own))]; rnd.IntN(10) {
				case 0, 1:
					err = w.flush()
				case 2:
					err = w.zero(u, 1)
				case 3:
					if i == 0 {
						err = w.stack.FlushAhead(context.Background())
					}
				default:
					err = w.write(u, 1)
				}
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	all.Wait()
	close(errs)
	for err := range errs {
		w.fatalf("writer: %v", err)
	}
	return writers * steps
}
