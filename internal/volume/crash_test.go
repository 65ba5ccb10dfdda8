package volume_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/replica"
	"ashlar/internal/volume"
	"ashlar/internal/volume/ledgertest"
)

// The crash tests stop a volume before every single change that a verb makes to the disk, and before and after every swap that it asks of the catalogue, by kill -9 and by power
// cuts; they open what is left, by resuming and by claiming, and check that the volume is what it was before the verb or what it is after, that nothing is pending,
// that what was flushed is there, and that the verb, said again with the same id, is done once.

// crashScript is a verb to be stopped. check looks at what is left; done: act had returned, and nothing was lost before it was said.
type crashScript struct {
	name  string
	build func(g *rig)
	act   func(g *rig) error
	check func(g *rig, done bool)
	// closed: the volume is not open when act begins; act opens it.
	closed bool
}

// fixed ids, so that a verb said again is the same verb.
const (
	opOne  = replica.LayerID("000000000000000000000000000000e1")
	opTwo  = replica.LayerID("000000000000000000000000000000e2")
	opThis = replica.LayerID("000000000000000000000000000000ee")
)

const u = block.UnitBytes

// twoSnapshots: 1s under snapshot one, 2s under two, then 3s, all flushed.
func twoSnapshots(g *rig) {
	g.fill(1, 0, 8*u)
	g.must(g.v.Snapshot(g.ctx, opOne, meta("one")), "snapshot")
	g.fill(2, 2*u, 8*u)
	g.must(g.v.Snapshot(g.ctx, opTwo, meta("two")), "snapshot")
	g.fill(3, 4*u, 8*u)
	g.flush()
	g.awaitSettled()
}

func wantTwoSnapshots(g *rig) {
	g.Helper()
	d := g.v.Device()
	g.wantFill(d, 1, 0, 2*u)
	g.wantFill(d, 2, 2*u, 2*u)
	g.wantFill(d, 3, 4*u, 8*u)
}

// loose writes 8 units of 1 that are flushed, and then 8 of 2 from unit 4 on that are not.
func loose(g *rig) {
	g.fill(1, 0, 8*u)
	g.flush()
	g.fill(2, 4*u, 8*u)
}

func wantLoose(g *rig, d block.Device, sure bool) {
	g.Helper()
	g.wantFill(d, 1, 0, 4*u)
	if sure {
		g.wantFill(d, 2, 4*u, 8*u)
		return
	}
	g.wantSectors(d, 4*u, 4*u, 1, 2)
	g.wantSectors(d, 8*u, 4*u, 0, 2)
}

// wantSectors checks that every sector is all of one of the bytes allowed.
func (g *rig) wantSectors(d block.Device, off, n int64, allowed ...byte) {
	g.Helper()
	p := make([]byte, n)
	_, err := d.ReadAt(p, off)
	g.must(err, "read")
	for i := range len(p) / 512 {
		s := p[i*512 : i*512+512]
		if !slices.ContainsFunc(allowed, func(b byte) bool { return bytes.Equal(s, bytes.Repeat([]byte{b}, 512)) }) {
			g.Fatalf("sector at %d is neither of %v: it begins with %#x", off+int64(i)*512, allowed, s[0])
		}
	}
}

func hasLayer(g *rig, id replica.LayerID) bool {
	return slices.ContainsFunc(g.status().Layers, func(l replica.LayerInfo) bool { return l.ID == id })
}

func crashScripts() []crashScript {
	return []crashScript{
		{name: "open and write", closed: true, build: func(g *rig) { g.fill(1, 0, 4*u); g.must(g.v.Close(g.ctx), "close") }, act: func(g *rig) error {
			if err := g.tryOpen(); err != nil {
				return err
			}
			g.fill(2, 0, u)
			return g.v.Device().Flush()
		}, check: func(g *rig, done bool) {
			if done {
				g.wantFill(g.v.Device(), 2, 0, u)
			}
			g.wantSectors(g.v.Device(), 0, u, 1, 2)
			g.wantFill(g.v.Device(), 1, u, 3*u)
		}},
		{name: "close", build: loose, act: func(g *rig) error { return g.v.Close(g.ctx) }, check: func(g *rig, done bool) { wantLoose(g, g.v.Device(), done) }},
		{name: "snapshot and write", build: loose, act: func(g *rig) error {
			if err := g.v.Snapshot(g.ctx, opThis, meta("s")); err != nil {
				return err
			}
			_, err := g.v.Device().WriteAt(bytes.Repeat([]byte{9}, 100), 0)
			return errors.Join(err, g.v.Device().Flush())
		}, check: func(g *rig, done bool) {
			g.wantSectors(g.v.Device(), 512, 4*u-512, 1)
			if done {
				g.wantFill(g.v.Device(), 9, 0, 100)
			}
			if _, ok := g.layer("s"); ok || done {
				d, err := g.v.OpenSnapshot(g.ctx, "s")
				g.must(err, "open snapshot")
				wantLoose(g, d, done)
				g.must(d.Close(), "close")
			}
		}},
		{name: "expand", build: loose, act: func(g *rig) error { return g.v.Expand(g.ctx, opThis, 2*mib) }, check: func(g *rig, done bool) {
			wantLoose(g, g.v.Device(), done)
			if n := g.v.Device().Size(); n != 2*mib && (done || n != mib) {
				g.Fatalf("size is %d", n)
			} else if n == 2*mib {
				g.wantFill(g.v.Device(), 0, mib, mib)
			}
		}},
		{name: "revert and write", build: twoSnapshots, act: func(g *rig) error {
			if err := g.v.Revert(g.ctx, opThis, "one"); err != nil {
				return err
			}
			_, err := g.v.Device().WriteAt(bytes.Repeat([]byte{7}, 2*u), 0)
			return errors.Join(err, g.v.Device().Flush())
		}, check: func(g *rig, done bool) {
			if !hasLayer(g, opThis) {
				if done {
					g.Fatal("the revert is gone")
				}
				wantTwoSnapshots(g)
				return
			}
			if done {
				g.wantFill(g.v.Device(), 7, 0, 2*u)
			}
			g.wantSectors(g.v.Device(), 0, 2*u, 1, 7)
			g.wantFill(g.v.Device(), 1, 2*u, 6*u)
			g.wantFill(g.v.Device(), 0, 8*u, 8*u)
			g.wantSnapshot("two", 2, 2*u, 8*u)
		}},
		{name: "merge", build: func(g *rig) {
			twoSnapshots(g)
			g.must(g.v.RemoveSnapshot(g.ctx, "one"), "remove")
		}, act: func(g *rig) error { return g.v.Purge(g.ctx, nil) }, check: func(g *rig, done bool) {
			wantTwoSnapshots(g)
			g.wantSnapshot("two", 1, 0, 2*u)
			g.wantSnapshot("two", 2, 2*u, 8*u)
			if _, ok := g.layer("one"); ok && done {
				g.Fatal("the merge is undone")
			}
		}},
		{name: "purge beside", build: func(g *rig) {
			twoSnapshots(g)
			g.must(g.v.Revert(g.ctx, opThis, "one"), "revert")
			g.fill(5, 0, u)
			g.flush()
			g.must(g.v.RemoveSnapshot(g.ctx, "two"), "remove")
			g.must(g.v.RemoveSnapshot(g.ctx, "one"), "remove")
		}, act: func(g *rig) error { return g.v.Purge(g.ctx, nil) }, check: func(g *rig, done bool) {
			g.wantFill(g.v.Device(), 5, 0, u)
			g.wantFill(g.v.Device(), 1, u, 7*u)
			g.wantFill(g.v.Device(), 0, 8*u, 4*u)
			if _, ok := g.layer("two"); ok && done {
				g.Fatal("the leaf is back")
			}
		}},
		{name: "remove", build: twoSnapshots, act: func(g *rig) error { return g.v.RemoveSnapshot(g.ctx, "two") }, check: func(g *rig, done bool) {
			wantTwoSnapshots(g)
			if l, ok := g.layer("two"); !ok || done && !l.Snapshot.Removed {
				g.Fatalf("snapshot is %+v", l.Snapshot)
			}
		}},
	}
}

// crashEnd is what a machine's death left of disk and catalogue.
type crashEnd struct {
	fsys   *disk.Mem
	ledger *ledgertest.Mem
	power  bool
	done   bool
	how    string
}

// thorough is how many more random power cuts are tried at every step than in a quick run: one less than ASHLAR_STEPS.
func thorough() int {
	n, err := strconv.Atoi(os.Getenv("ASHLAR_STEPS"))
	if err != nil || n <= 1 {
		return 0
	}
	return min(n-1, 20)
}

// recorder collects ends.
type recorder struct {
	g    *rig
	seed uint64
	mu   sync.Mutex
	list []crashEnd
	done atomic.Bool
}

// add records the ends at this instant, with a catalogue as it is or as it will be.
func (r *recorder) add(ledger *ledgertest.Mem, what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seed++
	done := r.done.Load()
	m := r.g.fsys
	end := func(fsys *disk.Mem, power bool, how string) {
		r.list = append(r.list, crashEnd{fsys: fsys, ledger: ledger.Clone(), power: power, done: done, how: fmt.Sprintf("%s %s, done %t", how, what, done)})
	}
	every := thorough() > 0 || done || strings.Contains(what, "swap") // a quick run tries one or two of them before each change of the disk, in turn
	if every || r.seed%4 == 0 {
		end(m.Clone(), false, "kill -9")
	}
	if every || r.seed%4 == 2 {
		end(m.CrashClone(disk.CrashOptions{Keep: disk.KeepNone}), true, "power cut that keeps nothing")
	}
	for i := range 1 + thorough() {
		if !every && r.seed%2 == 0 {
			break
		}
		s := r.seed*100 + uint64(i)
		end(m.CrashClone(disk.CrashOptions{Rand: rand.New(rand.NewPCG(s, 3))}), true, fmt.Sprintf("power cut with seed %d", s))
	}
}

// record runs act and returns every way it could have ended.
func (g *rig) recordEnds(seed uint64, act func() error) ([]crashEnd, error) {
	r := &recorder{g: g, seed: seed * 1e6}
	g.fsys.OnOp(func(op disk.Op) { r.add(g.ledger, "before "+op.String()) })
	g.ledger.OnCall(func(c ledgertest.Call) ledgertest.Fault {
		if !c.Swap {
			return ledgertest.OK
		}
		r.add(g.ledger, fmt.Sprintf("before swap %d", c.N))
		after := g.ledger.Clone()
		if _, err := after.Swap(g.ctx, c.Rec, c.Was); err == nil {
			r.add(after, fmt.Sprintf("after swap %d", c.N))
		}
		return ledgertest.OK
	})
	err := act()
	g.fsys.OnOp(nil)
	g.ledger.OnCall(nil)
	r.done.Store(true)
	r.add(g.ledger, "after everything")
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.list), err // the background may still be adding
}

func TestCrashVerbs(t *testing.T) {
	total := 0
	for i, s := range crashScripts() {
		t.Run(s.name, func(t *testing.T) {
			g := newRig(t, mib, disk.MemOptions{})
			g.open()
			s.build(g)
			if s.closed {
				g.must(g.r.Close(), "close")
			}
			list, err := g.recordEnds(uint64(i+1), func() error { return s.act(g) })
			g.must(err, "act")
			g.must(g.r.Close(), "close")
			for n, e := range list {
				s.goOn(t, g, e, n%2 == 0)
				if t.Failed() {
					return
				}
			}
			t.Logf("%d crash points", len(list))
			total += len(list)
		})
	}
	t.Logf("%d crash points in all", total)
}

// goOn opens what a crash left, checks it, says the verb again, and checks once more.
func (s crashScript) goOn(t *testing.T, was *rig, e crashEnd, byResume bool) {
	t.Helper()
	g := &rig{TB: failing{t, e.how}, ctx: was.ctx, fsys: e.fsys, ledger: e.ledger, dir: was.dir, boots: was.boots, ids: was.ids}
	if e.power {
		g.boots++
	}
	g.open(func(c *volume.Config) { c.Resume = byResume })
	s.check(g, e.done)
	if g.status().Stats.Resumed {
		// Whatever the record says, the first verb sees to it.
		g.must(g.v.RemoveSnapshot(g.ctx, "none of this name"), "", replica.ErrNoSnapshot)
	}
	g.wantSettled()
	if s.closed {
		g.must(g.v.Close(g.ctx), "close")
		g.must(g.r.Close(), "close")
	}
	g.must(s.act(g), "the verb again")
	if g.status().State == volume.StateClosed {
		g.must(g.r.Close(), "close")
		g.open()
	}
	s.check(g, e.done || !e.power)
	g.wantSettled()
	g.close()
	if rec := g.record(); rec.WriterNode != "" || rec.Pending != nil {
		g.Fatalf("closed volume's record is %+v", rec)
	}
}

// failing says with every failure which crash it was.
type failing struct {
	*testing.T
	crash string
}

// Fatalf implements testing.TB.
func (f failing) Fatalf(format string, args ...any) {
	f.Helper()
	f.T.Fatalf(f.crash+": "+format, args...)
}

// Errorf implements testing.TB.
func (f failing) Errorf(format string, args ...any) {
	f.Helper()
	f.T.Errorf(f.crash+": "+format, args...)
}

// Fatal implements testing.TB.
func (f failing) Fatal(args ...any) {
	f.Helper()
	f.T.Fatal(append([]any{f.crash + ": "}, args...)...)
}
