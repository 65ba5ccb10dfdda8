package volume

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// TestRangesExclude: no two locked ranges ever overlap, and no reader that passed finds a writer that was there before.
func TestRangesExclude(t *testing.T) {
	r := newRanges()
	const units = 64
	var owner [units]atomic.Int32
	var all sync.WaitGroup
	for g := range int32(8) {
		all.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 1))
			for range 3000 {
				from := rnd.Int64N(units)
				s := span{from, from + 1 + rnd.Int64N(min(8, units-from))}
				if rnd.IntN(3) == 0 {
					r.pass(s)
					continue
				}
				r.lock(s)
				for u := s.from; u < s.to; u++ {
					if was := owner[u].Swap(g + 1); was != 0 {
						t.Errorf("unit %d belongs to %d and %d", u, was, g+1)
					}
				}
				for u := s.from; u < s.to; u++ {
					owner[u].Store(0)
				}
				r.unlock(s)
			}
		})
	}
	all.Wait()
	if len(r.held) != 0 || r.waiting != 0 || r.writing.Load() != 0 {
		t.Errorf("left behind: %d held, %d waiting, %d writing", len(r.held), r.waiting, r.writing.Load())
	}
}

// TestRangesWait: who overlaps waits, who does not passes.
func TestRangesWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRanges()
		r.lock(span{10, 20})
		r.pass(span{0, 10})
		r.pass(span{20, 30})
		r.lock(span{20, 21})
		r.unlock(span{20, 21})
		var passed atomic.Int32
		for _, s := range []span{{19, 20}, {5, 11}, {12, 13}, {0, 100}} {
			go func() { r.pass(s); passed.Add(1) }()
			go func() { r.lock(s); passed.Add(1); r.unlock(s) }()
		}
		synctest.Wait()
		if n := passed.Load(); n != 0 {
			t.Errorf("%d passed a range that is locked", n)
		}
		r.unlock(span{10, 20})
		synctest.Wait()
		if n := passed.Load(); n != 8 {
			t.Errorf("%d of 8 passed when it was unlocked", n)
		}
	})
}
