package block_test

import (
	"errors"
	"math"
	"testing"

	"go.uber.org/goleak"

	"ashlar/internal/block"
	"ashlar/internal/block/blocktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newMem(_ testing.TB, n int64) block.Device { return block.NewMem(n) }

func TestMem(t *testing.T) {
	blocktest.Run(t, blocktest.Config{New: newMem, Steps: 1500, HugeBytes: 8 << 40})
}

func TestGateKeepsTheContract(t *testing.T) {
	blocktest.Run(t, blocktest.Config{
		New:       func(t testing.TB, n int64) block.Device { return block.NewGate(newMem(t, n)) },
		HugeBytes: 8 << 40,
	})
}

func TestZeroes(t *testing.T) {
	z := block.NewZeroes(1 << 40)
	b := []byte{1, 2, 3}
	if n, err := z.ReadAt(b, 1<<40-3); n != 3 || err != nil || b[0]|b[1]|b[2] != 0 {
		t.Errorf("ReadAt = %d, %v, %v", n, err, b)
	}
	if e, err := z.Extents(5, 1<<39); err != nil || len(e) != 1 || e[0] != (block.Extent{Off: 5, N: 1 << 39, State: block.Zero}) {
		t.Errorf("Extents = %v, %v", e, err)
	}
	_, errWrite := z.WriteAt(b, 0)
	_, errRange := z.ReadAt(b, 1<<40-2)
	for err, want := range map[error]error{errWrite: block.ErrReadOnly, z.Zero(0, 1): block.ErrReadOnly, errRange: block.ErrRange} {
		if !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
	if err := errors.Join(z.Flush(), z.Close()); err != nil {
		t.Error(err)
	}
	if err := z.Flush(); !errors.Is(err, block.ErrClosed) {
		t.Errorf("Flush after Close: %v", err)
	}
}

func TestCheckRange(t *testing.T) {
	for _, tt := range []struct {
		off, n, size int64
		ok           bool
	}{
		{0, 0, 0, true}, {0, 1, 0, false}, {0, 10, 10, true}, {9, 1, 10, true}, {9, 2, 10, false}, {10, 0, 10, true}, {11, 0, 10, false},
		{-1, 1, 10, false}, {1, -1, 10, false}, {math.MaxInt64, 1, math.MaxInt64, false}, {1, math.MaxInt64, math.MaxInt64, false},
	} {
		if err := block.CheckRange(tt.off, tt.n, tt.size); (err == nil) != tt.ok || err != nil && !errors.Is(err, block.ErrRange) {
			t.Errorf("CheckRange(%d, %d, %d) = %v", tt.off, tt.n, tt.size, err)
		}
	}
}

func TestStateString(t *testing.T) {
	for s, want := range map[block.State]string{block.Absent: "absent", block.Zero: "zero", block.Data: "data", 9: "invalid"} {
		if s.String() != want {
			t.Errorf("State(%d) = %q", s, s.String())
		}
	}
}

func BenchmarkMemWrite4K(b *testing.B) {
	m := block.NewMem(1 << 30)
	buf := make([]byte, 4096)
	b.SetBytes(4096)
	for i := 0; b.Loop(); i++ {
		if _, err := m.WriteAt(buf, int64(i%4096)*4096); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkMemRead4K(b *testing.B) {
	m := block.NewMem(1 << 30)
	buf := make([]byte, 4096)
	if _, err := m.WriteAt(make([]byte, 16<<20), 0); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(4096)
	for i := 0; b.Loop(); i++ {
		if _, err := m.ReadAt(buf, int64(i%4096)*4096); err != nil {
			b.Fatal(err)
		}
	}
}
