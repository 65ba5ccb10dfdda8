package layer

import (
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// TestFailedSync lets an fdatasync of the head fail and drop what was not flushed, at every place where there is one.
func TestFailedSync(t *testing.T) {
	failed, salvaged := 0, 0
	n := steps(t, 75)
	for seed := range uint64(n) {
		w := newWorld(t, seed, disk.MemOptions{Seed: seed}, limitsFor(seed))
		w.note("seed %d", seed)
		w.mem.FailSync(w.chain[0], 1+int(seed%11))
		var err error
		for i := 0; i < 60 && err == nil; i++ {
			unit, k := w.pick()
			switch r := w.rand.IntN(10); {
			case r < 5:
				err = w.write(unit, k)
			case r < 6:
				err = w.zero(unit, k)
			case r < 9:
				err = w.flush()
			default:
				promised := w.promise()
				if err = w.stack.FlushAhead(context.Background()); err == nil {
					promised()
				}
			}
		}
		if err == nil {
			continue // the history had fewer fdatasyncs
		}
		failed++
		w.failedForGood(err)
		if seed%2 == 0 {
			w.note("kill after a failed fdatasync")
			w.mem.KillProcess()
		} else {
			w.note("power cut after a failed fdatasync")
			w.boot++
			w.mem = w.mem.Crash(disk.CrashOptions{Rand: w.rand})
		}
		o := w.options()
		if err := w.tryOpen(o); !errors.Is(err, ErrSalvage) {
			w.fatalf("opening after a failed fdatasync: %v, want ErrSalvage", err)
		}
		o.Salvage = true
		w.must(w.tryOpen(o), "salvage")
		salvaged++
		w.check("salvaged", fromFloor, true)
		w.boot++
		w.mem = w.mem.Crash(disk.CrashOptions{Keep: disk.KeepNone})
		w.open()
		w.check("salvaged, and a power cut", fromFloor, true)
		w.must(w.write(0, 1), "write")
		w.must(w.flush(), "flush")
		w.must(w.stack.Close(), "close")
	}
	t.Logf("failed fdatasyncs: %d, salvaged: %d, seeds 0 to %d", failed, salvaged, n-1)
	if failed < n/3 {
		t.Errorf("only %d of %d histories met their failure", failed, n)
	}
}

// failedForGood checks that nothing succeeds any more after err but reading.
func (w *world) failedForGood(err error) {
	w.t.Helper()
	if !errors.Is(err, block.ErrFailed) {
		w.fatalf("after a failed fdatasync: %v, want ErrFailed", err)
	}
	for name, err := range map[string]error{
		"write": w.write(0, 1), "zero": w.zero(0, 1), "flush": w.stack.Flush(), "seal": w.stack.Seal(nil),
		"flush ahead": w.stack.FlushAhead(context.Background()),
	} {
		if !errors.Is(err, block.ErrFailed) {
			w.fatalf("%s after a failed fdatasync: %v, want ErrFailed", name, err)
		}
	}
	w.content(w.stack) // reads still succeed
	for _, m := range w.model {
		m.acked = m.floor
	}
}

// TestNoSpace fills the disk: writers hear of it, nothing is corrupt, all else goes on, and discards give room again; with crash points.
func TestNoSpace(t *testing.T) {
	c := &crasher{t: t, copies: 1, every: 4}
	refused := 0
	n := steps(t, 6)
	for seed := range uint64(n) {
		lim := limitsFor(seed)
		sizing := newWorld(t, seed, disk.MemOptions{Seed: seed}, lim)
		total, free, err := sizing.mem.Usage()
		sizing.must(err, "usage")
		c.rand = rand.New(rand.NewPCG(seed, 55))
		w := newWorld(t, seed, disk.MemOptions{Seed: seed, CapacityBytes: total - free + int64(2*lim.segmentBytes) + int64(1+seed%14)*4096}, lim)
		w.note("seed %d", seed)
		w.full = true
		balloon, err := w.mem.Create("balloon", 2*lim.segmentBytes) // what the base's log had, so that creating the head does not meet a full disk
		w.must(err, "create balloon")
		w.must(balloon.Reserve(0, 2*lim.segmentBytes), "reserve balloon")
		c.arm(w)
		for range 60 {
			refused += w.stepFull()
		}
		w.mem.OnOp(nil)
		w.must(w.stack.FlushAhead(context.Background()), "checkpoint on a full disk")
		w.must(w.stack.Seal(sealMeta), "seal on a full disk")
		w.check("sealed on a full disk", fromAcked, false)
		if err := w.stack.Layers()[0].Settle(context.Background()); err != nil && !errors.Is(err, block.ErrNoSpace) {
			w.fatalf("settle on a full disk: %v", err)
		}
		w.must(w.stack.Close(), "close")
	}
	t.Logf("refused writes: %d, crash points: %d; seeds 0 to %d", refused, c.points.Load()+c.kills.Load(), n-1)
	if refused == 0 {
		t.Error("the disk was never full")
	}
}

// stepFull does one random thing on a disk that may be full, and returns 1 if it was refused.
func (w *world) stepFull() int {
	w.t.Helper()
	unit, n := w.pick()
	switch k := w.rand.IntN(20); {
	case k < 12:
		w.note("write %d+%d", unit, n)
		err := w.write(unit, n)
		if err == nil {
			return 0
		}
		if !errors.Is(err, block.ErrNoSpace) {
			w.fatalf("write: %v, want ErrNoSpace", err)
		}
		w.check("after a refused write", fromAcked, false)
		w.overwriteFull()
		return 1
	case k < 14:
		w.note("zero %d+%d", unit, n)
		if err := w.zero(unit, n); err != nil && !errors.Is(err, block.ErrNoSpace) {
			w.fatalf("zero: %v", err)
		}
	case k < 18:
		w.note("flush")
		w.must(w.flush(), "flush")
	case k < 19:
		w.note("flush ahead")
		w.must(w.stack.FlushAhead(context.Background()), "flush ahead")
	default:
		w.note("reopen")
		w.must(w.stack.Close(), "close")
		w.open()
	}
	return 0
}

// overwriteFull checks that on a full disk existing data can be overwritten and flushed, and that a discard gives room.
func (w *world) overwriteFull() {
	w.t.Helper()
	w.must(w.flush(), "flush on a full disk")
	for _, u := range hotUnits() {
		extents, err := w.stack.Extents(u*unitBytes, unitBytes)
		w.must(err, "extents")
		if extents[0].State != block.Data || u < regionUnits && u%3 != 0 {
			continue // not the head's own, or perhaps not
		}
		w.note("overwrite %d, discard it, write it", u)
		w.must(w.write(u, 1), "overwrite on a full disk")
		w.must(w.zero(u, 1), "discard on a full disk")
		w.must(w.flush(), "flush on a full disk")
		w.must(w.write(u, 1), "write into the room of a discard")
		return
	}
}

// TestCreateFails lets every operation of Create fail, with no space and otherwise: no file is left.
func TestCreateFails(t *testing.T) {
	for _, cause := range []error{disk.ErrNoSpace, errors.New("broken")} {
		for _, kind := range []disk.OpKind{disk.OpCreate, disk.OpWrite, disk.OpReserve, disk.OpSync, disk.OpSyncDir} {
			for nth := 1; ; nth++ {
				mem := disk.NewMem(disk.MemOptions{})
				mem.Fail(disk.FailOptions{Kind: kind, Nth: nth, Err: cause})
				l, err := Create(mem, "x", testMeta(), 1<<20, Options{BootID: testBoot})
				if err == nil {
					l.Close()
					if nth == 1 {
						t.Errorf("Create does no %v", kind)
					}
					break
				}
				if !errors.Is(err, cause) || errors.Is(cause, disk.ErrNoSpace) != errors.Is(err, block.ErrNoSpace) {
					t.Errorf("%v %d: %v", kind, nth, err)
				}
				if _, err := mem.Stat("x"); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%v %d leaves a file: %v", kind, nth, err)
				}
			}
		}
	}
}
