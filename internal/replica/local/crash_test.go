package local_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
	"ashlar/internal/replica/replicatest"
)

// The crash tests stop a replica before every single change that a verb makes to the disk, in every way a machine stops (killed process, power cut that keeps
// nothing, everything, or any subset), open what is left, and check that it is what was before the verb or after it, that what was flushed is there, and that the
// verb, said again, goes through.

const (
	crashSize = 1 << 20
	firstHead = replica.LayerID("00000000000000000000000000000001")
)

// lab is an opened replica with a writer, on a Mem.
type lab struct {
	testing.TB
	ctx  context.Context
	fsys *disk.Mem
	dir  string
	boot string
	r    *local.Replica
	c    *local.Conn
	w    replica.Writer
	// lost: a power cut may have taken what was not flushed before the verb was last said.
	lost bool
}

func newLab(t testing.TB, opts disk.MemOptions) *lab {
	t.Helper()
	l := &lab{TB: t, ctx: context.Background(), fsys: disk.NewMem(opts), boot: boot}
	dir, err := local.Create(l.fsys, local.CreateConfig{ReplicaID: replicaID, VolumeID: replicatest.VolumeID, Volume: "db1", HeadID: firstHead,
		SizeBytes: crashSize, BootID: boot})
	l.must(err, "create")
	l.dir = dir
	l.open(replica.Writer{Epoch: 1, Session: 1})
	return l
}

func (l *lab) must(err error, what string) {
	l.Helper()
	if err != nil {
		l.Fatalf("%s: %v", what, err)
	}
}

// open opens the replica and lets w in.
func (l *lab) open(w replica.Writer) {
	l.Helper()
	r, err := local.Open(l.fsys, l.dir, local.OpenConfig{BootID: l.boot})
	l.must(err, "open")
	l.r, l.c, l.w = r, r.Connect(), w
	l.must(l.c.Fence(l.ctx, w), "fence")
}

func (l *lab) close() {
	l.Helper()
	l.must(l.r.Close(), "close")
}

// after returns the lab that goes on with what a crash left.
func (l *lab) after(t testing.TB, fsys *disk.Mem, power bool) *lab {
	n := &lab{TB: t, ctx: l.ctx, fsys: fsys, dir: l.dir, boot: l.boot}
	if power {
		n.boot = "2f1c7d8e-0000-4000-8000-000000000002"
	}
	return n
}

func (l *lab) fill(b byte, u, n int64) {
	l.Helper()
	_, err := l.c.WriteAt(bytes.Repeat([]byte{b}, int(n*block.UnitBytes)), u*block.UnitBytes)
	l.must(err, "write")
}

func (l *lab) flush() { l.Helper(); l.must(l.c.Flush(), "flush") }

func (l *lab) status() replica.Status {
	l.Helper()
	st, err := l.r.Status()
	l.must(err, "status")
	return st
}

func (l *lab) change(c replica.Change) {
	l.Helper()
	l.must(l.c.Change(l.ctx, l.w, c), c.Verb)
}

func (l *lab) snapshotNow(name string) {
	l.Helper()
	l.change(l.snapshotChange(name, newID(name)))
}

func (l *lab) snapshotChange(name string, id replica.LayerID) replica.Change {
	c := l.status().Chain
	c.Generation++
	c.Layers = append([]replica.LayerID{id}, c.Layers...)
	return replica.Change{Verb: replica.VerbSnapshot, Chain: c, Snapshot: &replica.SnapshotMeta{Name: name, UserCreated: true, Created: time.Unix(1e9, 0).UTC()}}
}

func (l *lab) mark(id replica.LayerID) error {
	for _, info := range l.status().Layers {
		if info.ID == id {
			m := *info.Snapshot
			m.Removed = true
			return l.c.SetSnapshot(l.ctx, l.w, id, m)
		}
	}
	return replica.ErrNoSnapshot
}

// newID derives a layer id from a name.
func newID(name string) replica.LayerID {
	return replica.LayerID(fmt.Sprintf("%032x", []byte(name)))[:32]
}

// want checks that each sector of the units from u on is all of one of the bytes allowed: a power cut leaves each sector of what was not flushed old or new.
func (l *lab) want(d block.Device, u, n int64, allowed ...byte) {
	l.Helper()
	const sector = 512
	p := make([]byte, n*block.UnitBytes)
	_, err := d.ReadAt(p, u*block.UnitBytes)
	l.must(err, "read")
	for i := range len(p) / sector {
		s := p[i*sector : (i+1)*sector]
		if !slices.ContainsFunc(allowed, func(b byte) bool { return bytes.Equal(s, bytes.Repeat([]byte{b}, sector)) }) {
			l.Fatalf("unit %d, sector %d is neither of %v: it begins with %#x", u+int64(i/8), i%8, allowed, s[0])
		}
	}
}

func (l *lab) wantSnapshot(id replica.LayerID, u, n int64, allowed ...byte) {
	l.Helper()
	d, err := l.r.OpenSnapshot(id)
	l.must(err, "open snapshot")
	l.want(d, u, n, allowed...)
	l.must(d.Close(), "close snapshot")
}

// script is a verb to be stopped. build prepares; act is the verb, said again with the same arguments after the crash; check looks at what is left, done when act had returned.
type script struct {
	name  string
	build func(l *lab)
	act   func(l *lab) error
	check func(l *lab, done bool)
}

// isNew tells whether the chain is one after the change; it must be if done.
func isNew(l *lab, done bool, was uint64) bool {
	l.Helper()
	g := l.status().Chain.Generation
	if g != was && g != was+1 || done && g == was {
		l.Fatalf("generation is %d after one change from %d (done %t)", g, was, done)
	}
	return g > was
}

func unflushed(l *lab) {
	l.fill(1, 0, 8)
	l.flush()
	l.fill(2, 4, 8)
}

// wantUnflushed: 8 units flushed as 1, then [4, 12) written as 2 and not flushed unless done.
func wantUnflushed(l *lab, d block.Device, done bool) {
	l.Helper()
	l.want(d, 0, 4, 1)
	if done && !l.lost {
		l.want(d, 4, 8, 2)
	} else {
		l.want(d, 4, 4, 1, 2)
		l.want(d, 8, 4, 0, 2)
	}
	l.want(d, 12, 8, 0)
}

// three has snapshots one (1s), two (2s) and three (3s) under a head with 4s, each 8 units later.
func three(l *lab) {
	for i, name := range []string{"one", "two", "three"} {
		l.fill(byte(i+1), int64(i*4), 8)
		l.snapshotNow(name)
	}
	l.fill(4, 12, 8)
	l.flush()
	l.awaitSettled()
}

// awaitSettled waits until the background has settled every snapshot.
func (l *lab) awaitSettled() {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.ctx, 30*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		if !slices.ContainsFunc(l.status().Layers, func(i replica.LayerInfo) bool { return !i.Head && !i.Verified }) {
			return
		}
		runtime.Gosched()
	}
	l.Fatal("snapshots were not settled")
}

func wantThree(l *lab, d block.Device) {
	l.Helper()
	for i := range 4 {
		l.want(d, int64(i*4), 4, byte(i+1))
	}
	l.want(d, 16, 4, 4)
}

// ids of what three makes: the layers that hold snapshot one, two, three, and the head.
var (
	layerOne   = firstHead
	layerTwo   = newID("one")
	layerThree = newID("two")
	layerHead  = newID("three")
)

func scripts() []script {
	mergeOf := func(lower, upper replica.LayerID, layers ...replica.LayerID) replica.Change {
		m := replica.Merge{Lower: lower, Upper: upper, Into: newID("merged")}
		return replica.Change{Verb: replica.VerbMerge, Merge: &m, Chain: replica.Chain{Generation: 5, SizeBytes: crashSize, Layers: layers}}
	}
	snap := func(l *lab) replica.Change {
		return replica.Change{Verb: replica.VerbSnapshot, Chain: replica.Chain{Generation: 2, SizeBytes: crashSize, Layers: []replica.LayerID{newID("n"), firstHead}},
			Snapshot: &replica.SnapshotMeta{Name: "s", Created: time.Unix(1e9, 0).UTC()}}
	}
	return []script{
		{"snapshot", unflushed, func(l *lab) error {
			c := snap(l)
			return errors.Join(l.c.Prepare(l.ctx, l.w, c, nil), l.c.Change(l.ctx, l.w, c))
		}, func(l *lab, done bool) {
			// If the chain is new, the snapshot's flush came first.
			wantUnflushed(l, l.c, isNew(l, done, 1))
		}},
		{"snapshot unprepared, then a write", unflushed, func(l *lab) error {
			if err := l.c.Change(l.ctx, l.w, snap(l)); err != nil {
				return err
			}
			_, err := l.c.WriteAt(bytes.Repeat([]byte{9}, block.UnitBytes), 0)
			return errors.Join(err, l.c.Flush())
		}, func(l *lab, done bool) {
			if isNew(l, done, 1) {
				d, err := l.r.OpenSnapshot(firstHead)
				l.must(err, "open snapshot")
				wantUnflushed(l, d, done) // nothing was flushed ahead: until it is answered, it holds what a power cut leaves
				l.must(d.Close(), "close")
			}
			l.want(l.c, 0, 1, 1, 9)
			if done {
				l.want(l.c, 0, 1, 9)
			}
		}},
		{"expand", unflushed, func(l *lab) error {
			c := snap(l)
			c.Verb, c.Chain.SizeBytes = replica.VerbExpand, 2*crashSize
			return errors.Join(l.c.Prepare(l.ctx, l.w, c, nil), l.c.Change(l.ctx, l.w, c))
		}, func(l *lab, done bool) {
			want := int64(crashSize)
			wantUnflushed(l, l.c, isNew(l, done, 1))
			if isNew(l, done, 1) {
				want = 2 * crashSize
				l.want(l.c, crashSize/block.UnitBytes, 8, 0)
			}
			if l.c.Size() != want {
				l.Fatalf("size is %d, want %d", l.c.Size(), want)
			}
		}},
		{"revert", three, func(l *lab) error {
			c := replica.Change{Verb: replica.VerbRevert, Chain: replica.Chain{Generation: 5, SizeBytes: crashSize, Layers: []replica.LayerID{newID("r"), layerTwo, layerOne}}}
			return errors.Join(l.c.Prepare(l.ctx, l.w, c, nil), l.c.Change(l.ctx, l.w, c))
		}, func(l *lab, done bool) {
			if !isNew(l, done, 4) {
				wantThree(l, l.c)
				return
			}
			l.want(l.c, 0, 4, 1)
			l.want(l.c, 4, 8, 2)
			l.want(l.c, 12, 8, 0)
			l.wantSnapshot(layerThree, 8, 8, 3)
			if n := len(l.status().Layers); n != 4 {
				l.Fatalf("%d layers, want 4", n)
			}
		}},
		{"merge", func(l *lab) { three(l); l.must(l.mark(layerOne), "mark") }, func(l *lab) error {
			c := mergeOf(layerOne, layerTwo, layerHead, layerThree, newID("merged"))
			return errors.Join(l.c.Prepare(l.ctx, l.w, c, nil), l.c.Change(l.ctx, l.w, c))
		}, func(l *lab, done bool) {
			wantThree(l, l.c)
			two := layerTwo
			if isNew(l, done, 4) {
				two = newID("merged")
			}
			l.wantSnapshot(two, 0, 4, 1)
			l.wantSnapshot(two, 4, 8, 2)
			l.wantSnapshot(layerThree, 8, 8, 3)
		}},
		{"merge below the head", func(l *lab) { three(l); l.must(l.mark(layerTwo), "mark") }, func(l *lab) error {
			c := mergeOf(layerTwo, layerThree, layerHead, newID("merged"), layerOne)
			return l.c.Change(l.ctx, l.w, c)
		}, func(l *lab, done bool) {
			wantThree(l, l.c)
			isNew(l, done, 4)
			l.wantSnapshot(layerOne, 0, 8, 1)
		}},
		{"purge", func(l *lab) {
			three(l)
			l.change(replica.Change{Verb: replica.VerbRevert, Chain: replica.Chain{Generation: 5, SizeBytes: crashSize, Layers: []replica.LayerID{newID("r"), layerTwo, layerOne}}})
			l.fill(7, 5, 6)
			l.flush()
			l.must(errors.Join(l.mark(layerThree), l.mark(layerTwo)), "mark")
		}, func(l *lab) error { return l.c.Purge(l.ctx, l.w, nil) }, func(l *lab, done bool) {
			l.want(l.c, 0, 4, 1)
			l.want(l.c, 4, 1, 2)
			l.want(l.c, 5, 6, 7)
			l.want(l.c, 11, 1, 2)
			l.wantSnapshot(layerOne, 0, 8, 1)
			if n := len(l.status().Layers); n != 3 && (done || n != 4) {
				l.Fatalf("%d layers (done %t)", n, done)
			}
		}},
		{"set snapshot", three, func(l *lab) error { return l.mark(layerTwo) }, func(l *lab, done bool) {
			wantThree(l, l.c)
			for _, info := range l.status().Layers {
				if info.ID == layerTwo && done && !info.Snapshot.Removed {
					l.Fatal("the mark is gone")
				}
			}
		}},
		{"keep", unflushed, func(l *lab) error {
			return l.c.Keep(l.ctx, l.w, replica.Record{VolumeID: replicatest.VolumeID, Epoch: 1, Generation: 3})
		}, func(l *lab, done bool) {
			wantUnflushed(l, l.c, false)
			if rec := l.status().Record; rec.Generation != 3 && (done || rec.Generation != 0) {
				l.Fatalf("record is of generation %d (done %t)", rec.Generation, done)
			}
		}},
	}
}

// end is one way in which a machine stopped.
type end struct {
	fsys  *disk.Mem
	power bool // the page cache is gone
	done  bool // the verb had returned
	op    disk.Op
	how   string
}

func (e end) String() string { return fmt.Sprintf("%s before %v, done %t", e.how, e.op, e.done) }

// ends lists what a crash at this instant could leave.
func ends(m *disk.Mem, seed uint64, op disk.Op, done bool) []end {
	var list []end
	every := thorough() > 0 || done // a quick run tries one or two of them before each change, in turn, and more before a sync
	if every || op.Seq%2 == 0 || op.Kind == disk.OpSync {
		list = append(list, end{fsys: m.CrashClone(disk.CrashOptions{Keep: disk.KeepNone}), power: true, done: done, op: op, how: "power cut that keeps nothing"})
	}
	if every || op.Seq%4 == 1 || op.Kind == disk.OpSync {
		list = append(list, end{fsys: m.Clone(), done: done, op: op, how: "kill -9"})
	}
	if every || op.Seq%4 == 3 {
		list = append(list, end{fsys: m.CrashClone(disk.CrashOptions{Keep: disk.KeepAll}), power: true, done: done, op: op, how: "power cut that keeps everything"})
	}
	for i := range 1 + thorough() {
		if !every && op.Seq%2 == 0 {
			break
		}
		s := seed*1e6 + op.Seq*10 + uint64(i)
		r := rand.New(rand.NewPCG(s, 0))
		list = append(list, end{fsys: m.CrashClone(disk.CrashOptions{Rand: r}), power: true, done: done, op: op, how: fmt.Sprintf("power cut with seed %d", s)})
	}
	return list
}

// thorough is how many more random power cuts are tried at every change of the disk than in a quick run: one less than ASHLAR_STEPS.
func thorough() int {
	n, err := strconv.Atoi(os.Getenv("ASHLAR_STEPS"))
	if err != nil || n <= 1 {
		return 0
	}
	return min(n-1, 20)
}

// crashes runs act with every end recorded, and returns them.
func crashes(fsys *disk.Mem, seed uint64, act func() error) ([]end, error) {
	var mu sync.Mutex
	var list []end
	var done atomic.Bool
	fsys.OnOp(func(op disk.Op) {
		mu.Lock()
		defer mu.Unlock()
		list = append(list, ends(fsys, seed, op, done.Load())...)
	})
	err := act()
	fsys.OnOp(nil)
	done.Store(true)
	mu.Lock()
	defer mu.Unlock()
	return append(list, ends(fsys, seed, disk.Op{}, true)...), err
}

func TestCrashVerbs(t *testing.T) {
	total := 0
	for i, s := range scripts() {
		t.Run(s.name, func(t *testing.T) {
			l := newLab(t, disk.MemOptions{})
			s.build(l)
			list, err := crashes(l.fsys, uint64(i+1), func() error { return s.act(l) })
			l.must(err, "act")
			s.check(l, true)
			l.close()
			for n, e := range list {
				s.resume(t, l, e, n%(97-4*thorough()) == 7)
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

// resume opens what a crash left, checks it, says the verb again, and, if deep, crashes once more at every step of all that.
func (s script) resume(t *testing.T, l *lab, e end, deep bool) {
	t.Helper()
	n := l.after(failing{t, e.String()}, e.fsys, e.power)
	again := func() error {
		n.open(replica.Writer{Epoch: 1, Session: 2})
		s.check(n, e.done)
		n.lost = e.power && !e.done
		return s.act(n)
	}
	if !deep {
		n.must(again(), "the verb again")
		s.check(n, true)
		n.close()
		n.wantTidy()
		return
	}
	list, err := crashes(n.fsys, 77, again)
	n.must(err, "the verb again")
	s.check(n, true)
	n.close()
	n.wantTidy()
	for i, e2 := range list {
		if i%11 != 0 && !e2.done {
			continue
		}
		m := n.after(failing{t, e.String() + ", then " + e2.String()}, e2.fsys, e2.power)
		if e.power && !e2.power {
			m.boot = n.boot
		} else if e2.power {
			m.boot = "2f1c7d8e-0000-4000-8000-000000000003"
		}
		m.lost = n.lost || e2.power && !e2.done
		m.open(replica.Writer{Epoch: 2, Session: 1})
		s.check(m, e.done || e2.done)
		m.must(s.act(m), "the verb a third time")
		s.check(m, true)
		m.close()
	}
}

// wantTidy checks that nothing lies about that no record knows, also none of the old heads.
func (l *lab) wantTidy() {
	l.Helper()
	if found := local.Look(l.fsys, l.dir); found.Err != nil || len(found.Unknown) > 0 {
		l.Fatalf("left behind %v, %v", found.Unknown, found.Err)
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

// Fatal implements testing.TB.
func (f failing) Fatal(args ...any) {
	f.Helper()
	f.T.Fatal(append([]any{f.crash + ": "}, args...)...)
}

// TestCrashFence: a writer that was answered stays the writer, whatever happens to the machine.
func TestCrashFence(t *testing.T) {
	l := newLab(t, disk.MemOptions{})
	unflushed(l)
	newer := replica.Writer{Epoch: 7, Session: 3}
	other := l.r.Connect()
	list, err := crashes(l.fsys, 1, func() error { return other.Fence(l.ctx, newer) })
	l.must(err, "fence")
	l.close()
	for _, e := range list {
		n := l.after(failing{t, e.String()}, e.fsys, e.power)
		r, err := local.Open(n.fsys, n.dir, local.OpenConfig{BootID: n.boot})
		n.must(err, "open")
		st, err := r.Status()
		n.must(err, "status")
		if st.Writer != newer && (e.done || st.Writer != l.w) {
			n.Fatalf("writer is %+v", st.Writer)
		}
		if err := r.Connect().Fence(n.ctx, l.w); e.done && !errors.Is(err, block.ErrFenced) {
			n.Fatalf("the old writer is let in again: %v", err)
		}
		n.must(r.Close(), "close")
	}
	t.Logf("%d crash points", len(list))
}

// TestCrashFound: what a process that was killed had written but not synced is durable before it is confirmed to anybody.
func TestCrashFound(t *testing.T) {
	l := newLab(t, disk.MemOptions{})
	newer := replica.Writer{Epoch: 7, Session: 3}
	other := l.r.Connect()
	list, err := crashes(l.fsys, 1, func() error { return other.Fence(l.ctx, newer) })
	l.must(err, "fence")
	l.close()
	confirmed := 0
	for _, e := range list {
		if e.power {
			continue
		}
		n := l.after(failing{t, e.String()}, e.fsys, false)
		n.open(newer)
		n.fsys = n.fsys.CrashClone(disk.CrashOptions{Keep: disk.KeepNone})
		n.close()
		found := local.Look(n.fsys, n.dir)
		if found.Writer != newer {
			n.Fatalf("the writer that was let in is %+v after a power cut", found.Writer)
		}
		confirmed++
	}
	if confirmed == 0 {
		t.Error("no killed process")
	}
}

// TestCrashMark: the same of what is said of a snapshot.
func TestCrashMark(t *testing.T) {
	l := newLab(t, disk.MemOptions{})
	three(l)
	list, err := crashes(l.fsys, 1, func() error { return l.mark(layerTwo) })
	l.must(err, "mark")
	l.close()
	for _, e := range list {
		if e.power {
			continue
		}
		n := l.after(failing{t, e.String()}, e.fsys, false)
		n.open(replica.Writer{Epoch: 1, Session: 2})
		n.must(n.mark(layerTwo), "mark again")
		n.fsys = n.fsys.CrashClone(disk.CrashOptions{Keep: disk.KeepNone})
		n.close()
		for _, info := range local.Look(n.fsys, n.dir).Layers {
			if info.ID == layerTwo && !info.Snapshot.Removed {
				n.Fatal("a mark that was answered is gone after a power cut")
			}
		}
	}
}

// TestCrashCreate: a replica that was created is there, whole; one that was not can be created; either can be deleted.
func TestCrashCreate(t *testing.T) {
	conf := local.CreateConfig{ReplicaID: replicaID, VolumeID: replicatest.VolumeID, Volume: "db1", HeadID: firstHead, SizeBytes: crashSize, BootID: boot}
	m := disk.NewMem(disk.MemOptions{})
	list, err := crashes(m, 1, func() error { _, err := local.Create(m, conf); return err })
	if err != nil {
		t.Fatal(err)
	}
	for i, e := range list {
		l := &lab{TB: failing{t, e.String()}, ctx: t.Context(), fsys: e.fsys, boot: boot}
		found, err := local.List(e.fsys)
		l.must(err, "list")
		if len(found) > 1 || len(found) == 0 && e.done || len(found) == 1 && (found[0].Err != nil || found[0].RecordLost || found[0].ReplicaID != replicaID) {
			l.Fatalf("found %+v", found)
		}
		if i%2 == 0 {
			l.must(local.Delete(e.fsys, replicaID), "delete")
			wantGone(l)
		}
		l.dir, err = local.Create(e.fsys, conf)
		l.must(err, "create again")
		l.open(replica.Writer{Epoch: 1, Session: 1})
		unflushed(l)
		l.close()
	}
	t.Logf("%d crash points", len(list))
}

func wantGone(l *lab) {
	l.Helper()
	if _, err := local.Find(l.fsys, replicaID); !errors.Is(err, fs.ErrNotExist) {
		l.Fatalf("found after its deletion: %v", err)
	}
	names, err := l.fsys.List(local.Root)
	if err != nil && !errors.Is(err, fs.ErrNotExist) || len(names) > 0 {
		l.Fatalf("left behind: %v, %v", names, err)
	}
}

// TestCrashDelete: a replica is there, whole, until its deletion began, and its deletion is finished by saying it again.
func TestCrashDelete(t *testing.T) {
	l := newLab(t, disk.MemOptions{})
	three(l)
	if err := local.Delete(l.fsys, replicaID); !errors.Is(err, disk.ErrLocked) {
		t.Fatalf("delete of an open replica: %v", err)
	}
	l.close()
	list, err := crashes(l.fsys, 1, func() error { return local.Delete(l.fsys, replicaID) })
	l.must(err, "delete")
	for i, e := range list {
		n := l.after(failing{t, e.String()}, e.fsys, e.power)
		dir, err := local.Find(n.fsys, replicaID)
		switch {
		case err == nil && e.done:
			n.Fatal("it is still there")
		case err == nil && i%3 == 0:
			n.dir = dir
			n.open(replica.Writer{Epoch: 2, Session: 1})
			wantThree(n, n.c)
			n.close()
		case err != nil && i%3 == 1:
			n.must(local.Sweep(n.fsys), "sweep")
		}
		n.must(local.Delete(n.fsys, replicaID), "delete again")
		wantGone(n)
	}
	t.Logf("%d crash points", len(list))
}
