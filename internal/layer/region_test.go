package layer

import (
	"math/rand/v2"
	"testing"
	"unsafe"

	"ashlar/internal/block"
)

func TestRegionAgainstArray(t *testing.T) {
	for seed := range uint64(60) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		var model [regionUnits]source
		r := makeRegion([]run{{0, absentSource}})
		colours := []int{2, 3, 6, 40, 300, 1200}[seed%6]
		for step := range 300 {
			first := rnd.IntN(regionUnits)
			n := 1 + rnd.IntN(min(regionUnits-first, 1+rnd.IntN(64)))
			s := makeSource(1+rnd.IntN(colours), rnd.IntN(3) == 0)
			if rnd.IntN(3) == 0 {
				s = s.uncovered(1+rnd.IntN(3), block.State(rnd.IntN(3)))
			}
			r = r.with(first, n, s)
			for u := first; u < first+n; u++ {
				model[u] = s
			}
			if step%50 == 49 {
				slot, interval := 1+rnd.IntN(colours), 1+rnd.IntN(3)
				r = r.settled(slot, interval)
				for u := range model {
					if model[u].slot() == slot && model[u].interval() == interval {
						model[u] = model[u].plain()
					}
				}
			}
			for u := 0; u < regionUnits; {
				s, end := r.at(u, regionUnits)
				for ; u < end; u++ {
					if model[u] != s {
						t.Fatalf("seed %d step %d: unit %d is %x, want %x", seed, step, u, s, model[u])
					}
				}
			}
			if len(r.words(r.size())) != cap(r.words(r.size())) {
				t.Fatal("size is wrong")
			}
		}
	}
}

func TestRegionSizes(t *testing.T) {
	data := makeSource(1, false)
	scattered := makeRegion([]run{{0, absentSource}})
	for i := range 4 {
		scattered = scattered.with(100+200*i, 16, data)
	}
	full := makeRegion([]run{{0, data}})
	random := full
	rnd := rand.New(rand.NewPCG(1, 1))
	for range 700 {
		random = random.with(rnd.IntN(regionUnits), 1, absentSource)
	}
	for _, c := range []struct {
		name string
		r    *region
		max  int
	}{{"full", full, 6}, {"4 runs", scattered, 24}, {"random", random, 140}} {
		if n := c.r.size() * int(unsafe.Sizeof(uint16(0))); n > c.max {
			t.Errorf("%s: %d bytes, want at most %d", c.name, n, c.max)
		}
	}
}
