package layer

import (
	"context"
	"math/rand/v2"
	"os"
	"runtime"
	"testing"
)

// benchStack makes a stack of depth layers on a real disk with 256 MiB of data, spread over the layers.
func benchStack(b *testing.B, depth int) *Stack {
	b.Helper()
	fsys := realFS(b)
	const size = 256 << 20
	s := ownedStack(b, []*Layer{newHead(b, fsys, 0, size, limits{})}, StackOptions{})
	p := make([]byte, 1<<20)
	for i := range p {
		p[i] = byte(i>>9) + 1
	}
	for off := int64(0); off < size; off += int64(len(p)) {
		if _, err := s.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	rnd := rand.New(rand.NewPCG(1, 1))
	for i := 1; i < depth; i++ {
		sealOver(b, fsys, s, i, size, limits{})
		for range size / unitBytes / depth {
			put(b, s, rnd.Int64N(size/unitBytes), 1, uint64(i))
		}
	}
	must(b, s.Flush())
	must(b, s.Flush())
	b.Cleanup(func() { must(b, s.Close()) })
	return s
}

func benchRead(b *testing.B, depth int, settle bool) {
	s := benchStack(b, depth)
	if settle {
		must(b, s.Seal(nil))
		for _, l := range s.Layers() {
			must(b, l.Settle(context.Background()))
		}
	}
	p := make([]byte, unitBytes)
	for u := range s.Size() / unitBytes {
		if _, err := s.ReadAt(p, u*unitBytes); err != nil {
			b.Fatal(err)
		}
	}
	rnd := rand.New(rand.NewPCG(2, 2))
	b.ReportAllocs()
	b.SetBytes(unitBytes)
	for b.Loop() {
		if _, err := s.ReadAt(p, rnd.Int64N(s.Size()/unitBytes)*unitBytes); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRead4K(b *testing.B)         { benchRead(b, 1, false) }
func BenchmarkRead4KDepth200(b *testing.B) { benchRead(b, 200, false) }
func BenchmarkRead4KSums(b *testing.B)     { benchRead(b, 1, true) }
func BenchmarkRead4KSums200(b *testing.B)  { benchRead(b, 200, true) }

// BenchmarkReadFile is the floor: one pread of the file.
func BenchmarkReadFile(b *testing.B) {
	s := benchStack(b, 1)
	l := s.Layers()[0]
	p := make([]byte, unitBytes)
	rnd := rand.New(rand.NewPCG(2, 2))
	b.SetBytes(unitBytes)
	for b.Loop() {
		if _, err := l.f.ReadAt(p, l.sb.Data.Off+rnd.Int64N(s.Size()/unitBytes)*unitBytes); err != nil {
			b.Fatal(err)
		}
	}
}

func benchWrite(b *testing.B, n int) {
	s := benchStack(b, 1)
	p := make([]byte, n)
	p[0] = 1
	rnd := rand.New(rand.NewPCG(2, 2))
	b.ReportAllocs()
	b.SetBytes(int64(n))
	for b.Loop() {
		if _, err := s.WriteAt(p, rnd.Int64N(s.Size()/int64(n))*int64(n)); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOverwrite4K(b *testing.B) { benchWrite(b, 4096) }
func BenchmarkOverwrite1M(b *testing.B) { benchWrite(b, 1<<20) }

// BenchmarkOverwriteFile is the floor: one pwrite of the file.
func BenchmarkOverwriteFile(b *testing.B) {
	s := benchStack(b, 1)
	l := s.Layers()[0]
	p := make([]byte, unitBytes)
	rnd := rand.New(rand.NewPCG(2, 2))
	b.SetBytes(unitBytes)
	for b.Loop() {
		if _, err := l.f.WriteAt(p, l.sb.Data.Off+rnd.Int64N(s.Size()/unitBytes)*unitBytes); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFirstWrite4K writes each unit once, in random order, over a sealed layer; every 1 GiB the head is discarded.
func BenchmarkFirstWrite4K(b *testing.B) {
	fsys := realFS(b)
	const size = 1 << 30
	s := ownedStack(b, []*Layer{newHead(b, fsys, 0, size, limits{})}, StackOptions{})
	defer s.Close()
	p := make([]byte, unitBytes)
	p[0] = 1
	order := rand.New(rand.NewPCG(2, 2)).Perm(size / unitBytes)
	b.ReportAllocs()
	b.SetBytes(unitBytes)
	i := 0
	for b.Loop() {
		if i == len(order) {
			b.StopTimer()
			must(b, s.Zero(0, size))
			must(b, s.Flush())
			must(b, s.Flush())
			i = 0
			b.StartTimer()
		}
		if _, err := s.WriteAt(p, int64(order[i])*unitBytes); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

// fakeMap writes a layer's map as if the units were there: full, or in runs of 16 at random places.
func fakeMap(t testing.TB, l *Layer, full bool, runs int) {
	t.Helper()
	codes := make([]byte, l.sb.units()/4)
	if full {
		for i := range codes {
			codes[i] = 0xaa
		}
	}
	rnd := rand.New(rand.NewPCG(4, 4))
	for range runs {
		setCodes(codes, int(rnd.Int64N(l.sb.units()/16)*16), 16, 2)
	}
	if _, err := l.f.WriteAt(codes, l.sb.Map.Off); err != nil {
		t.Fatal(err)
	}
}

// mapMemory loads the whole map of a 1 TiB stack and returns the bytes of heap it took.
func mapMemory(t testing.TB, full bool, runs, below int) int64 {
	t.Helper()
	const size = 1 << 40
	fsys := realFS(t)
	layers := []*Layer{newHead(t, fsys, 1000, size, limits{})}
	fakeMap(t, layers[0], full, runs)
	layers = append(layers, sealedLayers(t, fsys, below, size, limits{})...)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	s, err := NewStack(layers, StackOptions{})
	must(t, err)
	for off := int64(0); off < size; {
		extents, err := s.Extents(off, size-off)
		must(t, err)
		for _, e := range extents {
			off += e.N
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	must(t, s.Close())
	for _, l := range layers {
		must(t, l.Close())
	}
	return int64(after.HeapAlloc) - int64(before.HeapAlloc)
}

// TestMemory holds the map of an open TiB to its bound: full, and with 64 GiB scattered in runs of 64 KiB.
func TestMemory(t *testing.T) {
	const bound = 16 << 20 // what the design asks is 32
	for _, c := range []struct {
		name  string
		full  bool
		runs  int
		below int
	}{{"full", true, 0, 0}, {"64 GiB scattered", false, 64 << 30 >> 16, 0}, {"64 GiB scattered over 20 layers", false, 64 << 30 >> 16, 20}} {
		if c.below > 0 && os.Getenv("ASHLAR_STEPS") == "" || raceEnabled && !c.full {
			continue // in the stage "steps" it is all done
		}
		got := mapMemory(t, c.full, c.runs, c.below)
		t.Logf("map of 1 TiB, %s: %.1f MiB", c.name, float64(got)/(1<<20))
		if got > bound {
			t.Errorf("map of 1 TiB, %s: %d bytes of heap, bound %d", c.name, got, bound)
		}
	}
}
