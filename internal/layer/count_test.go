package layer

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// checkCounts compares the count of every layer of the stack, where it is known, with what recovery would find in its file.
func (w *world) checkCounts(when string) {
	w.t.Helper()
	if w.rand.IntN(2) == 0 {
		w.must(w.stack.Count(context.Background()), when+": count")
		for _, l := range w.stack.Layers() {
			if _, known := l.DataBytes(); !known {
				w.fatalf("%s: layer %s is not counted after Count", when, l.Name())
			}
		}
	}
	for _, l := range w.stack.Layers() {
		got, known := l.DataBytes()
		if want := w.dataIn(l.Name()); known && got != want {
			w.fatalf("%s: layer %s has %d bytes of data by its count, %d by its map", when, l.Name(), got, want)
		}
	}
}

// dataIn counts the Data of a file from outside.
func (w *world) dataIn(name string) int64 {
	l, err := Open(w.mem, name, Options{ReadOnly: true, BootID: w.options().BootID})
	w.must(err, "open to count")
	n := int64(0)
	w.must(l.eachRun(0, l.sb.units(), func(_, units int64, s block.State) error {
		if s == block.Data {
			n += units * unitBytes
		}
		return nil
	}), "count")
	w.must(l.Close(), "close")
	return n
}

// TestCount: the count is known where the format says so, and not where nothing but the map can say it.
func TestCount(t *testing.T) {
	w := newWorld(t, 1, disk.MemOptions{}, limits{})
	want := func(when string, i int, n int64, known bool) {
		t.Helper()
		got, is := w.stack.Layers()[i].DataBytes()
		if is != known || known && got != n*unitBytes {
			t.Errorf("%s: layer %d counts %d units (known: %v), want %d (%v)", when, i, got/unitBytes, is, n, known)
		}
	}
	want("opened", 0, 0, false)
	want("image", 1, 8, true)
	w.must(w.stack.Count(context.Background()), "count")
	want("fresh", 0, 0, true)
	w.must(w.write(0, 4), "write")
	w.must(w.write(2, 4), "write")
	w.must(w.zero(5, 2), "zero")
	w.must(w.write(6, 1), "write")
	want("written", 0, 6, true)
	w.must(w.flush(), "flush")
	w.must(w.write(1, 1), "write")
	want("overwritten", 0, 6, true)
	w.mem.KillProcess()
	w.open()
	want("after a kill", 0, 0, false)
	w.must(w.write(7, 2), "write")
	w.must(w.zero(0, 1), "zero")
	w.must(w.stack.Count(context.Background()), "count")
	want("counted", 0, 7, true)
	w.must(w.snap(), "snapshot")
	want("sealed", 1, 7, true)
	w.must(w.stack.Layers()[1].Settle(context.Background()), "settle")
	w.must(w.stack.Close(), "close")
	w.open()
	want("settled and reopened", 1, 7, true)
	w.must(w.write(1, 3), "write")
	w.must(w.prune(), "prune")
	want("pruned", 1, 4, true)
	if m := w.stack.Layers()[1].Meta(); !m.Pruned || m.DataBytes == nil || *m.DataBytes != 4*unitBytes {
		t.Errorf("the pruned layer's header says %+v", m)
	}
	w.mem.KillProcess()
	w.open()
	want("pruned and reopened", 1, 4, true)
	w.must(w.stack.Close(), "close")
}

// TestCountWhileWriting counts a head while it is written to and sealed.
func TestCountWhileWriting(t *testing.T) {
	for seed := range uint64(10) {
		w := newWorld(t, seed, disk.MemOptions{}, limitsFor(seed))
		for range 60 {
			w.must(w.write(w.pick()), "write")
		}
		w.mem.KillProcess()
		w.open()
		stack, done := w.stack, make(chan error, 1)
		var counter sync.WaitGroup
		counter.Go(func() { done <- stack.Count(context.Background()) })
		for range 30 {
			w.must(w.write(w.pick()), "write")
			w.must(w.zero(w.pick()), "zero")
		}
		w.must(w.snap(), "snapshot")
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		counter.Wait()
		w.must(w.stack.Count(context.Background()), "count")
		w.checkCounts(fmt.Sprintf("seed %d", seed))
		w.must(w.stack.Close(), "close")
	}
}
