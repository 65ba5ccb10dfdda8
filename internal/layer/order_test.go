package layer

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// The tests here go through one rule each of docs/formats/layer.md that random histories meet rarely.

// TestSalt lays a new life of a segment over an old one, of which the power cut lost the first sector only. Generation, seq and offsets agree; still nothing of
// the old life continues the new one.
func TestSalt(t *testing.T) {
	l := &Layer{boot: testBoot}
	life := func(second recordKind, records ...record) []byte {
		b, seed := l.startRecord(2, 10)
		b, _ = appendRecord(b, &record{gen: 2, seq: 11, kind: second, unit: 1}, seed)
		for i, r := range records {
			r.gen, r.seq, r.count = 2, 12+uint64(i), 1
			b, _ = appendRecord(b, &r, seed)
		}
		return b
	}
	sum := make([]byte, 4)
	old := life(kindMark, record{kind: kindWrite, unit: 1, payload: sum}, record{kind: kindZero, unit: 7}, record{kind: kindZero, unit: 8})
	fresh := life(kindCheckpoint, record{kind: kindWrite, unit: 3, payload: sum})
	s, err := parseSegment(append(fresh, old[len(fresh):]...), 1000)
	if err != nil || s == nil || len(s.records) != 1 || s.records[0].unit != 3 {
		t.Errorf("parsed %+v, %v", s, err)
	}
}

// hookFS tells a test when a write has been made, before its caller knows.
type hookFS struct {
	disk.FS
	mu    sync.Mutex
	wrote func(off int64) // guarded by mu
}

type hookFile struct {
	disk.File
	fsys *hookFS
}

func (f *hookFS) Create(name string, n int64) (disk.File, error) {
	file, err := f.FS.Create(name, n)
	return &hookFile{file, f}, err
}

func (f *hookFile) WriteAt(p []byte, off int64) (int, error) {
	n, err := f.File.WriteAt(p, off)
	f.fsys.mu.Lock()
	wrote := f.fsys.wrote
	f.fsys.mu.Unlock()
	if wrote != nil {
		wrote(off)
	}
	return n, err
}

// TestFlushWaitsForRecords rewrites a unit in U, and asks for a flush when its bytes are written and its record is not. If that flush were
// acknowledged now, a power cut would find bytes that match no record.
func TestFlushWaitsForRecords(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	fsys := &hookFS{FS: mem}
	s := ownedStack(t, []*Layer{newHead(t, fsys, 0, 1<<20, limits{inline: true})}, StackOptions{})
	put(t, s, 5, 1, 1)
	var flushed sync.WaitGroup
	asked := false
	fsys.wrote = func(off int64) {
		if asked || off != s.Layers()[0].sb.Data.Off+5*unitBytes {
			return
		}
		asked = true
		done := make(chan error, 1)
		flushed.Go(func() { done <- s.Flush() })
		timer := time.NewTimer(200 * time.Millisecond)
		defer timer.Stop()
		select {
		case err := <-done:
			must(t, err)
			after := openStack(t, mem.CrashClone(disk.CrashOptions{Keep: disk.KeepNone}), []string{"l0"}, Options{BootID: BootID{2}})
			b := make([]byte, unitBytes)
			_, err = after.ReadAt(b, 5*unitBytes)
			must(t, errors.Join(err, after.Close()))
			if v := readVec(b, 5); v != same(1) && v != same(2) {
				t.Errorf("a flush was acknowledged, and after a power cut the unit is %x", v)
			}
		case <-timer.C: // it waits, as it must
		}
	}
	put(t, s, 5, 1, 2)
	flushed.Wait()
	if !asked {
		t.Fatal("the unit was not written")
	}
	must(t, s.Close())
}

// TestCoveredAtOnce has units written for the first time while the first of the two flushes runs that the layer makes of its own accord. Whoever rewrites them afterwards waits for no flush:
// it would have to take everything to the medium that is dirty by then.
func TestCoveredAtOnce(t *testing.T) {
	fsys := disk.NewMem(disk.MemOptions{})
	s := ownedStack(t, []*Layer{newHead(t, fsys, 0, 1<<20, limits{inline: true})}, StackOptions{})
	w := s.view.Load().writer
	put(t, s, 5, 1, 1)
	var late sync.WaitGroup
	syncs := 0
	fsys.OnOp(func(op disk.Op) {
		if op.Kind != disk.OpSync {
			return
		}
		if syncs++; syncs != 2 { // the first one is the write back
			return
		}
		late.Go(func() { put(t, s, 7, 1, 2) })
		if w.still.TryRLock() { // nothing stops it
			w.still.RUnlock()
			late.Wait()
		}
	})
	must(t, w.coverAll())
	late.Wait()
	if syncs != 3 {
		t.Errorf("%d fdatasyncs, want 3", syncs)
	}
	syncs = 3
	put(t, s, 5, 1, 3)
	put(t, s, 7, 1, 3)
	if syncs != 3 {
		t.Errorf("rewriting two units took %d fdatasyncs", syncs-3)
	}
	fsys.OnOp(nil)
	must(t, s.Close())
}

// TestSettledHeaderLost kills the process when the header says settled in the page cache only; the next one frees the log; the power fails.
func TestSettledHeaderLost(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	l := sealedLayers(t, mem, 2, 1<<20, limits{segmentBytes: 8 << 10, inline: true})[0] // not settled
	tried := 0
	mem.OnOp(func(op disk.Op) {
		if op.Kind != disk.OpSync {
			return
		}
		killed := mem.Clone()
		m, _, err := Inspect(killed, l.name)
		must(t, err)
		if !m.Settled {
			return
		}
		tried++
		next, err := Open(killed, l.name, Options{BootID: testBoot})
		must(t, err)
		must(t, next.Close())
		for seed := range uint64(40) {
			after := killed.CrashClone(disk.CrashOptions{Rand: rand.New(rand.NewPCG(seed, 3))})
			l, err := Open(after, "l1", Options{BootID: BootID{2}})
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			must(t, l.Close())
		}
	})
	must(t, l.Settle(context.Background()))
	if tried == 0 {
		t.Error("settling never wrote its header")
	}
}

// TestPruneCrash fails the power at every step of pruning, many times each, with what hides the units not yet flushed.
func TestPruneCrash(t *testing.T) {
	c := &crasher{t: t, copies: 4, checks: true}
	for seed := range uint64(steps(t, 2)) {
		c.rand = rand.New(rand.NewPCG(seed, 44))
		lim := limitsFor(seed)
		w := newWorld(t, seed, disk.MemOptions{Seed: seed}, lim)
		w.note("seed %d", seed)
		for _, u := range hotUnits() {
			w.must(w.write(u, 1), "write")
		}
		w.must(w.snap(), "snapshot")
		for _, u := range hotUnits()[seed%3:] {
			w.must(w.write(u, 1), "write")
		}
		w.must(w.zero(3, 2), "zero")
		c.arm(w)
		w.must(w.prune(), "prune")
		w.mem.OnOp(nil)
		w.check("pruned", fromAcked, false)
		w.must(w.stack.Close(), "close")
	}
	t.Logf("crash points: %d", c.points.Load()+c.kills.Load())
}

// longLog is limitsFor, but for every second seed, which makes no checkpoint by itself: all that was written is in the log alone when the layer is sealed or opened again.
func longLog(seed uint64) limits {
	lim := limitsFor(seed)
	if seed%2 == 1 {
		lim.segmentBytes, lim.uncovered = 32<<10, 1000
	}
	return lim
}

// TestSealCrash fails the power at every step of a snapshot, many times each, with first writes that were not flushed.
func TestSealCrash(t *testing.T) {
	c := &crasher{t: t, copies: 5}
	for seed := range uint64(steps(t, 2)) {
		c.rand = rand.New(rand.NewPCG(seed, 45))
		w := newWorld(t, seed, disk.MemOptions{Seed: seed}, longLog(seed))
		w.note("seed %d", seed)
		for range 3 {
			for range 4 {
				w.must(w.write(w.pick()), "write")
			}
			w.must(w.zero(w.pick()), "zero")
			c.arm(w)
			w.must(w.snap(), "snapshot")
			w.mem.OnOp(nil)
		}
		w.must(w.stack.Close(), "close")
	}
	t.Logf("crash points: %d", c.points.Load()+c.kills.Load())
}

// TestKillThenPowerCut opens what a killed process left in the page cache, and fails the power at every step of that, many times each.
func TestKillThenPowerCut(t *testing.T) {
	c := &crasher{t: t, copies: 10}
	for seed := range uint64(steps(t, 4)) {
		c.rand = rand.New(rand.NewPCG(seed, 46))
		w := newWorld(t, seed, disk.MemOptions{Seed: seed}, longLog(seed))
		w.note("seed %d", seed)
		for range 4 {
			for range 3 {
				w.must(w.write(w.pick()), "write")
			}
			w.must(w.zero(w.pick()), "zero")
			if w.rand.IntN(2) == 0 {
				w.must(w.flush(), "flush")
			}
			w.note("kill")
			w.mem.KillProcess()
			c.arm(w)
			w.open()
			w.mem.OnOp(nil)
			w.check("after a kill", fromAcked, true)
		}
		w.must(w.stack.Close(), "close")
	}
	t.Logf("crash points: %d", c.points.Load()+c.kills.Load())
}

// TestWriteDuringCheckpoint makes first writes and discards while a checkpoint syncs and between the pages it writes, so that units of the pages it writes are in U again, and fails the
// power at every step that follows.
func TestWriteDuringCheckpoint(t *testing.T) {
	c := &crasher{t: t, copies: 6}
	lim := limits{segmentBytes: 32 << 10, uncovered: 1000, chunkUnits: 8, inline: true, maxSlots: 9}
	meddled := 0
	for seed := range uint64(steps(t, 2)) {
		c.rand = rand.New(rand.NewPCG(seed, 47))
		w := newWorld(t, seed, disk.MemOptions{Seed: seed}, lim)
		w.note("seed %d", seed)
		hot := hotUnits()
		for _, u := range hot {
			w.must(w.write(u, 1), "write") // so that there is something below to be lost
		}
		w.must(w.snap(), "snapshot")
		far := hot[len(hot)-3:] // on the second map page, while the first is written
		hot = hot[:len(hot)-4]
		w.must(w.write(pageUnits, 1), "write")
		w.rand.Shuffle(len(hot), func(i, k int) { hot[i], hot[k] = hot[k], hot[i] })
		for _, u := range hot[:8] {
			w.must(w.write(u, 1), "write")
		}
		hot = hot[8:] // the log knows nothing of these
		c.meddle = func(op disk.Op) {
			from := &hot
			if op.Kind == disk.OpWrite && op.Off == mapOff {
				from = &far
			} else if op.Kind != disk.OpSync {
				return
			}
			if len(*from) == 0 {
				return
			}
			u := (*from)[0]
			*from = (*from)[1:]
			meddled++
			if u%4 == 0 {
				w.must(w.zero(u, 1), "zero during a checkpoint")
			} else {
				w.must(w.write(u, 1), "write during a checkpoint")
			}
		}
		c.arm(w)
		for range 3 {
			w.must(w.stack.FlushAhead(context.Background()), "flush ahead")
			w.must(w.write(pageUnits, 1), "write")
		}
		w.mem.OnOp(nil)
		w.check("at the end", fromAcked, false)
		w.must(w.stack.Close(), "close")
	}
	t.Logf("crash points: %d, changes during a checkpoint: %d", c.points.Load()+c.kills.Load(), meddled)
}

// TestNoSpaceForMap opens a layer on a full disk whose log names a map page that was never reserved durably.
func TestNoSpaceForMap(t *testing.T) {
	lim := limits{segmentBytes: 8 << 10, inline: true}
	sizing := disk.NewMem(disk.MemOptions{})
	must(t, newHead(t, sizing, 0, 1<<30, lim).Close())
	total, free, err := sizing.Usage()
	must(t, err)
	opened := 0
	for seed := range uint64(60) {
		mem := disk.NewMem(disk.MemOptions{CapacityBytes: total - free + 4*unitBytes})
		s := ownedStack(t, []*Layer{newHead(t, mem, 0, 1<<30, lim)}, StackOptions{})
		put(t, s, 1, 1, 1)
		must(t, s.Flush())
		put(t, s, pageUnits+1, 1, 2) // takes the last two: its map page and its data
		after := mem.CrashClone(disk.CrashOptions{Rand: rand.New(rand.NewPCG(seed, 5))})
		if balloon, err := after.Create("balloon", 16*unitBytes); err == nil {
			for i := int64(0); balloon.Reserve(i*unitBytes, unitBytes) == nil; i++ {
			}
			must(t, errors.Join(balloon.Sync(), after.SyncDir("."), balloon.Close()))
		}
		again := openStack(t, after, []string{"l0"}, Options{BootID: BootID{2}, limits: lim})
		opened++
		wantUnit(t, again, 1, 1)
		b := make([]byte, unitBytes)
		_, err := again.ReadAt(b, (pageUnits+1)*unitBytes)
		must(t, err)
		if v := readVec(b, pageUnits+1); v != same(0) && v != same(2) {
			t.Fatalf("seed %d: unit is %x", seed, v)
		}
		put(t, again, 1, 1, 3)
		must(t, again.Flush())
		must(t, again.Close())
		must(t, s.Close())
	}
	if opened == 0 {
		t.Error("nothing was tried")
	}
}

// TestMarkBehindHole: a mark that says that a record which is broken was on the medium is found wherever it begins, among bytes that look like a record's, and nowhere else.
func TestMarkBehindHole(t *testing.T) {
	b, seed := appendRecord(nil, &record{gen: 1, seq: 1, kind: kindStart, payload: make([]byte, startPayload)}, 0)
	b, _ = appendRecord(b, &record{gen: 1, seq: 2, kind: kindCheckpoint}, seed)
	end := len(b)
	mark, _ := appendRecord(nil, &record{gen: 1, seq: 4, kind: kindMark, unit: 3}, seed)
	const segment = 512
	for at := end + 1; at <= segment; at++ {
		log := append(bytes.Clone(b), bytes.Repeat([]byte("ALOG."), segment)...)[:at]
		log = append(log, mark...)
		log = append(log, make([]byte, max(0, segment-len(log)))...)[:segment]
		_, err := parseSegment(log, pageUnits)
		if want := at%8 == 0 && at+recordBytes <= segment; errors.Is(err, block.ErrCorrupt) != want {
			t.Errorf("a mark at %d of %d: %v", at, segment, err)
		}
	}
}
