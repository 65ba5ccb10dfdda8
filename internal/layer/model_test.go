package layer

import (
	"testing"

	"ashlar/internal/disk"
)

// limitsFor draws the sizes for a history.
func limitsFor(seed uint64) limits {
	lim := limits{
		segmentBytes: []int64{4 << 10, 8 << 10, 32 << 10}[seed%3], uncovered: []int{8, 16, 60, 1000}[seed/3%4],
		chunkUnits: []int{1, 3, 8, 1024}[seed/12%4], mapBytes: []int64{1, 4 << 10, 1 << 20}[seed/2%3], maxSlots: 9, inline: true,
	}
	lim.chunkUnits = max(1, min(lim.chunkUnits, lim.uncovered/2))
	return lim
}

// TestModel runs random histories, with deaths of the process and power cuts between any two operations, against a plain model.
func TestModel(t *testing.T) {
	total := 0
	for seed := range uint64(steps(t, 20)) {
		w := newWorld(t, seed, disk.MemOptions{Reflink: seed%2 == 0, Seed: seed}, limitsFor(seed))
		for range 150 {
			total++
			switch w.rand.IntN(40) {
			case 0:
				w.note("kill")
				w.mem.KillProcess()
				w.open()
				w.check("after a kill", fromAcked, true)
				w.checkCounts("after a kill")
			case 1:
				w.note("power cut")
				w.boot++
				w.mem = w.mem.Crash(disk.CrashOptions{Rand: w.rand})
				w.open()
				w.check("after a power cut", fromFloor, true)
				w.checkSnapshots("after a power cut")
				w.checkCounts("after a power cut")
			default:
				if err := w.step(); err != nil {
					w.fatalf("seed %d: %v", seed, err)
				}
			}
		}
		w.check("at the end", fromAcked, false)
		w.checkSnapshots("at the end")
		w.checkCounts("at the end")
		w.must(w.stack.Close(), "close")
	}
	t.Logf("model steps: %d, seeds 0 to %d", total, steps(t, 20)-1)
}
