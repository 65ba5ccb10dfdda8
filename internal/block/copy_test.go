package block_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/block/blockfault"
)

func write(t testing.TB, d block.Device, b []byte, off int64) {
	t.Helper()
	if _, err := d.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

func content(t testing.TB, d block.Device) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func fill(n int, c byte) []byte { return bytes.Repeat([]byte{c}, n) }

// pieces is a device whose extents are as odd as the contract allows: short, by sectors, and cut anywhere.
type pieces struct {
	*block.Mem
	r *rand.Rand
}

func (p *pieces) Extents(off, n int64) ([]block.Extent, error) {
	b := make([]byte, min(n, 1+p.r.Int64N(256<<10)))
	if _, err := p.ReadAt(b, off); err != nil {
		return nil, err
	}
	var out []block.Extent
	for len(b) > 0 {
		sector := b[:min(len(b), int(512-off%512))]
		state := block.Data
		if bytes.Equal(sector, make([]byte, len(sector))) {
			state = []block.State{block.Absent, block.Zero, block.Data}[p.r.IntN(3)]
		}
		if last := len(out) - 1; last >= 0 && out[last].State == state && p.r.IntN(8) > 0 {
			out[last].N += int64(len(sector))
		} else {
			out = append(out, block.Extent{Off: off, N: int64(len(sector)), State: state})
		}
		b, off = b[len(sector):], off+int64(len(sector))
	}
	return out, nil
}

// TestCopy copies random devices with every set of options and compares.
func TestCopy(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range 25 {
		size := 4<<20 + r.Int64N(3)*(1+r.Int64N(5000))
		src := &pieces{block.NewMem(size), r}
		for range 20 {
			off := r.Int64N(size)
			n := min(1+r.Int64N(300<<10), size-off)
			switch r.IntN(4) {
			case 0:
				if err := src.Zero(off, n); err != nil {
					t.Fatal(err)
				}
			case 1:
				write(t, src, make([]byte, n), off) // data that is zeros
			default:
				write(t, src, fill(int(n), byte(1+r.IntN(255))), off)
			}
		}
		dstSize := size
		if r.IntN(2) == 0 {
			dstSize = (size+4095)/4096*4096 + r.Int64N(3)*4096
		}
		dst := block.NewMem(dstSize)
		opts := block.CopyOptions{Parallel: r.IntN(4), ChunkBytes: r.Int64N(200 << 10), DstIsZero: r.IntN(2) == 0, Flush: true}
		if !opts.DstIsZero {
			write(t, dst, fill(int(dstSize), 0xdd), 0)
		}
		var last, total int64
		opts.Progress = func(done, all int64) {
			if done < last || done > all {
				t.Errorf("progress went from %d to %d of %d", last, done, all)
			}
			last, total = done, all
		}
		rec := blockfault.NewRecord(dst)
		stats, err := block.Copy(t.Context(), rec, src, opts)
		if err != nil {
			t.Fatalf("%+v: %v", opts, err)
		}
		end := min(dstSize, (size+4095)/4096*4096)
		want := append(content(t, src), make([]byte, end-size)...)
		if !opts.DstIsZero {
			want = append(want, fill(int(dstSize-end), 0xdd)...)
		} else {
			want = append(want, make([]byte, dstSize-end)...)
		}
		if !bytes.Equal(content(t, dst), want) {
			t.Fatalf("%+v: content differs", opts)
		}
		if sum := stats.DataBytes + stats.ZeroBytes + stats.SkippedBytes; sum != end || last != end || total != end {
			t.Errorf("%+v of %d bytes, progress ended at %d of %d", stats, end, last, total)
		}
		for _, e := range rec.Entries() {
			if e.Kind == blockfault.Write && (e.Off%4096 != 0 || e.N%4096 != 0 && e.Off+e.N != dstSize) {
				t.Errorf("%v is not whole units", e.Op)
			}
			if opts.DstIsZero && e.Kind == blockfault.Zero {
				t.Errorf("%v although the destination was zero", e.Op)
			}
		}
		if rec.Count(blockfault.Flush) != 1 {
			t.Errorf("%d flushes", rec.Count(blockfault.Flush))
		}
	}
}

func TestCopyReadsOnlyData(t *testing.T) {
	src := block.NewMem(8 << 40)
	write(t, src, fill(64<<10, 1), 5<<40)
	if err := src.Zero(6<<40, 1<<20); err != nil {
		t.Fatal(err)
	}
	from, to := blockfault.NewRecord(src), blockfault.NewRecord(block.NewMem(8<<40))
	stats, err := block.Copy(t.Context(), to, from, block.CopyOptions{KeepAbsent: true})
	if err != nil {
		t.Fatal(err)
	}
	if stats != (block.CopyStats{DataBytes: 64 << 10, ZeroBytes: 1 << 20, SkippedBytes: 8<<40 - 64<<10 - 1<<20}) {
		t.Errorf("%+v", stats)
	}
	if n := from.Count(blockfault.Read); n != 1 {
		t.Errorf("%d reads", n)
	}
	if n := to.Count(blockfault.Zero); n != 1 {
		t.Errorf("%d zeroes", n)
	}
}

func TestCopyErrors(t *testing.T) {
	mine := errors.New("mine")
	src := block.NewMem(4 << 20)
	write(t, src, fill(2<<20, 1), 0)
	for _, kind := range []blockfault.Kind{blockfault.Read, blockfault.Extents} {
		bad := blockfault.Error(src, blockfault.Nth(1, mine, kind))
		if _, err := block.Copy(t.Context(), block.NewMem(4<<20), bad, block.CopyOptions{}); !errors.Is(err, mine) {
			t.Errorf("source fails in %v: %v", kind, err)
		}
	}
	for _, kind := range []blockfault.Kind{blockfault.Write, blockfault.Zero, blockfault.Flush} {
		bad := blockfault.Error(block.NewMem(4<<20), blockfault.Nth(1, mine, kind))
		if _, err := block.Copy(t.Context(), bad, src, block.CopyOptions{Flush: true}); !errors.Is(err, mine) {
			t.Errorf("destination fails in %v: %v", kind, err)
		}
	}
	if _, err := block.Copy(t.Context(), block.NewMem(4<<20-1), src, block.CopyOptions{}); !errors.Is(err, block.ErrRange) {
		t.Errorf("a destination that is too small: %v", err)
	}
	for _, e := range [][]block.Extent{nil, {{Off: 4096, N: 4096}}, {{Off: 0, N: 0}}, {{Off: 0, N: 5 << 20}}, {{Off: 0, N: 4096}, {Off: 0, N: 4096}}} {
		if _, err := block.Copy(t.Context(), block.NewMem(4<<20), lying{src, e}, block.CopyOptions{}); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("a source with extents %v: %v", e, err)
		}
	}
}

type lying struct {
	block.Device
	extents []block.Extent
}

func (l lying) Extents(int64, int64) ([]block.Extent, error) { return l.extents, nil }

func TestCopyIsCancelled(t *testing.T) {
	src := block.NewMem(64 << 20)
	write(t, src, fill(64<<20, 1), 0)
	ctx, cancel := context.WithCancel(t.Context())
	writes := 0
	dst := blockfault.NewRecord(block.NewMem(64 << 20))
	_, err := block.Copy(ctx, dst, src, block.CopyOptions{Parallel: 2, ChunkBytes: 64 << 10, Flush: true, Progress: func(int64, int64) {
		if writes++; writes == 10 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if n := dst.Count(blockfault.Write); n > 14 || dst.Count(blockfault.Flush) != 0 {
		t.Errorf("%d writes after it was cancelled at 10, %d flushes", n, dst.Count(blockfault.Flush))
	}
}

func BenchmarkCopy(b *testing.B) {
	src := block.NewMem(64 << 20)
	write(b, src, fill(64<<20, 1), 0)
	dst := block.NewMem(64 << 20)
	b.SetBytes(64 << 20)
	for b.Loop() {
		if _, err := block.Copy(b.Context(), dst, src, block.CopyOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}
