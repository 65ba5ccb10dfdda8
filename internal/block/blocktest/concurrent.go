package blocktest

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"ashlar/internal/block"
)

const workers = 8

// parallel runs f in as many goroutines as there are workers, and waits.
func parallel(t testing.TB, what string, f func(worker int, r *rand.Rand)) {
	t.Helper()
	seed := newRand(t).Uint64()
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() { f(w, rand.New(rand.NewPCG(seed, uint64(w)))) })
	}
	done := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() { wg.Wait(); close(done) })
	within(t, done, what)
}

// checkDisjoint: each worker keeps a model of its own part of the device; the parts lie next to each other, unit by unit.
func checkDisjoint(t testing.TB, c Config) {
	d := c.open(t, sizeBytes)
	const units = sizeBytes / block.UnitBytes
	parallel(t, "concurrent calls", func(w int, r *rand.Rand) {
		mine := map[int64][]byte{}
		for range 150 {
			unit := r.Int64N(units/workers)*workers + int64(w)
			off := unit * block.UnitBytes
			b := make([]byte, block.UnitBytes)
			var err error
			switch r.IntN(8) {
			case 0:
				err = d.Zero(off, block.UnitBytes)
				mine[off] = b
			case 1:
				err = d.Flush()
			case 2:
				_, err = d.Extents(off, block.UnitBytes)
			default:
				noise(r, b)
				_, err = d.WriteAt(b, off)
				mine[off] = b
			}
			if err != nil {
				t.Errorf("worker %d: %v", w, err)
				return
			}
			want := mine[off]
			if want == nil {
				want = make([]byte, block.UnitBytes)
			}
			got := make([]byte, block.UnitBytes)
			if _, err := d.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
				t.Errorf("worker %d: unit %d is not what this worker alone wrote there (%v)", w, unit, err)
				return
			}
		}
	})
}

// checkSameUnits: workers write and zero the same units. In the end each unit is one of them, whole.
func checkSameUnits(t testing.TB, c Config) {
	d := c.open(t, sizeBytes)
	const units = 16
	for range 30 {
		parallel(t, "concurrent calls on the same units", func(w int, r *rand.Rand) {
			for range 6 {
				first := r.Int64N(units)
				n := (1 + r.Int64N(units-first)) * block.UnitBytes
				var err error
				if r.IntN(4) == 0 {
					err = d.Zero(first*block.UnitBytes, n)
				} else {
					_, err = d.WriteAt(fill(int(n), byte(w+1)), first*block.UnitBytes)
				}
				if err != nil {
					t.Errorf("worker %d: %v", w, err)
				}
			}
		})
		content := read(t, d, 0, units*block.UnitBytes)
		for u := range units {
			b := content[u*block.UnitBytes : (u+1)*block.UnitBytes]
			if b[0] > workers || !bytes.Equal(b, fill(len(b), b[0])) {
				t.Fatalf("unit %d is a mixture of two writes", u)
			}
		}
		wantExtents(t, d, 0, units*block.UnitBytes, content)
	}
}

// checkSharedUnits: workers write different sectors of the same units. No write may be undone by another's.
func checkSharedUnits(t testing.TB, c Config) {
	if c.align() > 1 {
		return
	}
	const units, sector = 4, block.UnitBytes / workers
	d := c.open(t, sizeBytes)
	for round := range 40 {
		if round%8 == 7 {
			zero(t, d, 0, units*block.UnitBytes)
		}
		parallel(t, "concurrent writes to parts of units", func(w int, r *rand.Rand) {
			for u := range int64(units) {
				off := u*block.UnitBytes + int64(w)*sector
				var err error
				if r.IntN(4) == 0 {
					err = d.Zero(off, sector)
				}
				if err == nil {
					_, err = d.WriteAt(fill(sector, byte(round+w+1)), off)
				}
				if err != nil {
					t.Errorf("worker %d: %v", w, err)
				}
			}
		})
		for u := range int64(units) {
			for w := range workers {
				wantBytes(t, d, u*block.UnitBytes+int64(w)*sector, fill(sector, byte(round+w+1)), "after others wrote to other parts of the unit")
			}
		}
	}
}

// checkFlush: many flush while others write; what was flushed survives Reopen.
func checkFlush(t testing.TB, c Config) {
	d := c.open(t, sizeBytes)
	must(t, d.Flush(), "Flush of a new device")
	const each = sizeBytes / workers
	content := make([]byte, sizeBytes)
	parallel(t, "concurrent flushes", func(w int, r *rand.Rand) {
		mine := content[w*each : (w+1)*each]
		for i := range 10 {
			b := mine[i*8192 : (i+1)*8192]
			noise(r, b)
			if _, err := d.WriteAt(b, int64(w*each+i*8192)); err != nil {
				t.Errorf("worker %d: %v", w, err)
			}
			if err := d.Flush(); err != nil {
				t.Errorf("worker %d: Flush: %v", w, err)
			}
		}
	})
	wantContent(t, d, content, "after flushes")
	if c.Reopen != nil {
		wantContent(t, c.reopen(t, d), content, "after flushes and reopening")
	}
}

// checkCloseRace: Close returns at once under calls, and each of them succeeds or says ErrClosed.
func checkCloseRace(t testing.TB, c Config) {
	for range 5 {
		d := c.New(t, sizeBytes)
		var begun, ended sync.WaitGroup
		begun.Add(workers)
		for w := range workers {
			ended.Go(func() {
				b := fill(block.UnitBytes, byte(w+1))
				for i := 0; ; i++ {
					var err error
					switch i % 4 {
					case 0, 1:
						_, err = d.WriteAt(b, int64(w)*block.UnitBytes)
					case 2:
						_, err = d.ReadAt(make([]byte, block.UnitBytes), int64(w)*block.UnitBytes)
					case 3:
						err = d.Zero(int64(w)*block.UnitBytes, block.UnitBytes)
					}
					if i == 4 {
						begun.Done()
					}
					if err == nil {
						continue
					}
					if !errors.Is(err, block.ErrClosed) {
						t.Errorf("a call that raced with Close: %v", err)
					}
					if i < 4 {
						begun.Done()
					}
					return
				}
			})
		}
		begun.Wait()
		done := make(chan struct{})
		ended.Go(func() {
			defer close(done)
			if err := d.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
		within(t, done, "Close under calls")
		all := make(chan struct{})
		var watch sync.WaitGroup
		watch.Go(func() { ended.Wait(); close(all) })
		within(t, all, "a call after Close")
	}
}
