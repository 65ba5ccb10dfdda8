package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"ashlar/internal/block"

	"github.com/klauspost/compress/gzip"
)

// unevenDevice is a disk whose size is no multiple of a unit, as another program's NBD export may be.
type unevenDevice struct {
	*block.Mem
	size int64
}

func (u unevenDevice) Size() int64 { return u.size }
func (u unevenDevice) ReadAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange(off, int64(len(p)), u.size); err != nil {
		return 0, err
	}
	return u.Mem.ReadAt(p, off)
}
func (u unevenDevice) Extents(off, n int64) ([]block.Extent, error) {
	if err := block.CheckRange(off, n, u.size); err != nil {
		return nil, err
	}
	return u.Mem.Extents(off, n)
}

// patchwork makes a disk of data that packs well, data that does not, stored zeroes, zeroes and nothing, in pieces of odd lengths.
func patchwork(t testing.TB, rng *rand.Rand, size int64, pieces int) unevenDevice {
	t.Helper()
	mem := block.NewMem(roundUp(size, block.UnitBytes))
	for range pieces {
		off := rng.Int64N(size)
		p := make([]byte, min(1+rng.Int64N(1+rng.Int64N(600_000)), size-off))
		kind := rng.IntN(5)
		switch kind {
		case 0:
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
		case 1, 2:
			for i := range p {
				p[i] = byte(i / (1 + kind*50))
			}
		}
		var err error
		if kind == 4 {
			err = mem.Zero(off, int64(len(p)))
		} else {
			_, err = mem.WriteAt(p, off)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return unevenDevice{mem, size}
}

func contentOf(t testing.TB, dev block.Device) []byte {
	t.Helper()
	b := make([]byte, dev.Size())
	if _, err := dev.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// writeBoth writes dev as qcow2 both ways.
func writeBoth(t testing.TB, dev block.Device, o Qcow2Options) map[string][]byte {
	t.Helper()
	var stream bytes.Buffer
	n, err := WriteQcow2(t.Context(), &stream, dev, o)
	if err != nil || n != int64(stream.Len()) {
		t.Fatalf("%+v: %d bytes of %d, %v", o, n, stream.Len(), err)
	}
	f := memFile(t, nil)
	n, err = WriteQcow2At(t.Context(), f, dev, o)
	if size, e := f.Size(); err != nil || e != nil || n != size {
		t.Fatalf("%+v: %d bytes of %d, %v", o, n, size, errors.Join(err, e))
	}
	file := make([]byte, n)
	if _, err := f.ReadAt(file, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return map[string][]byte{"stream": stream.Bytes(), "file": file}
}

// checkRefcounts recounts the clusters of an image, and compares with its refcounts: no leak, nothing missing.
func checkRefcounts(t testing.TB, file []byte) {
	t.Helper()
	u := func(off uint64, n int) (v uint64) {
		for i := range n {
			v = v<<8 | uint64(file[off+uint64(i)])
		}
		return v
	}
	bits := u(20, 4)
	cluster := uint64(1) << bits
	want := make([]uint64, (uint64(len(file))+cluster-1)/cluster)
	use := func(off, n uint64) {
		for c := off / cluster; c <= (off+n-1)/cluster; c++ {
			want[c]++
		}
	}
	use(0, 1)
	use(u(40, 8), u(36, 4)*8)
	table, n := u(48, 8), u(56, 4)*cluster
	use(table, n)
	for i := range u(36, 4) {
		l2 := u(u(40, 8)+i*8, 8) & l1OffsetMask
		if l2 == 0 {
			continue
		}
		use(l2, cluster)
		for k := uint64(0); k < cluster; k += 8 {
			e := u(l2+k, 8)
			switch {
			case e&l2Compressed != 0:
				off := e & (1<<(62-(bits-8)) - 1)
				use(off, (off/512+e>>(62-(bits-8))&(1<<(bits-8)-1)+1)*512-off)
			case e&l2OffsetMask != 0:
				use(e&l2OffsetMask, cluster)
			}
		}
	}
	for i := uint64(0); i < n; i += 8 {
		if b := u(table+i, 8); b != 0 {
			use(b, cluster)
		}
	}
	for c, w := range want {
		per := cluster / 2
		var got uint64
		if b := u(table+uint64(c)/per*8, 8); b != 0 {
			got = u(b+uint64(c)%per*2, 2)
		}
		if got != w {
			t.Fatalf("cluster %d has the refcount %d, is used %d times", c, got, w)
		}
	}
}

// TestWriteQcow2 writes random disks both ways with every compression and several cluster sizes; our reader sees the same disk, and the refcounts are exact.
func TestWriteQcow2(t *testing.T) {
	for seed := range uint64(6) {
		rng := rand.New(rand.NewPCG(seed, 1))
		size := []int64{512, 5 << 20, 3<<20 + 1, 4<<20 + 513, 1 + rng.Int64N(1<<20), 6 << 20}[seed]
		dev := patchwork(t, rng, size, int(size>>18)+2)
		want := padded(contentOf(t, dev))
		for _, compress := range []string{"", "zlib", "zstd"} {
			for _, cluster := range [][]int64{{0, 4096}, {0, 2 << 20}, {32 << 10, 4096}}[seed%3] {
				o := Qcow2Options{Compress: compress, ClusterBytes: cluster}
				for way, file := range writeBoth(t, dev, o) {
					checkRefcounts(t, file)
					img, err := Open(t.Context(), memFile(t, file), Options{Format: Qcow2})
					if err != nil {
						t.Fatalf("seed %d, %+v, %s: %v", seed, o, way, err)
					}
					if img.Info().VirtualBytes != roundUp(size, 512) || !bytes.Equal(contentOf(t, img), want) {
						t.Fatalf("seed %d, %+v, %s: the disk differs", seed, o, way)
					}
					checkExtents(t, img, want)
				}
			}
		}
	}
}

// TestWriteQcow2Sparse: an empty disk and a large one with a few bytes are small files, and stored zeroes take no room where the file can be patched.
func TestWriteQcow2Sparse(t *testing.T) {
	empty := block.NewMem(1 << 40)
	for way, file := range writeBoth(t, empty, Qcow2Options{}) {
		if len(file) > 5*64<<10 {
			t.Errorf("%s: an empty TiB takes %d bytes", way, len(file))
		}
		checkRefcounts(t, file)
	}
	for _, off := range []int64{0, 5 << 30, 1<<40 - 4096} {
		if _, err := empty.WriteAt([]byte("x"), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := empty.Zero(1<<30, 1<<30); err != nil {
		t.Fatal(err)
	}
	for way, file := range writeBoth(t, empty, Qcow2Options{}) {
		img, err := Open(t.Context(), memFile(t, file), Options{})
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 1)
		for _, off := range []int64{0, 5 << 30, 1<<40 - 4096} {
			if _, err := img.ReadAt(p, off); err != nil || p[0] != 'x' {
				t.Errorf("%s: at %d: %q, %v", way, off, p, err)
			}
		}
		if len(file) > 20*64<<10 {
			t.Errorf("%s: %d bytes", way, len(file))
		}
	}
	zeros := block.NewMem(8 << 20)
	if _, err := zeros.WriteAt(make([]byte, 8<<20), 0); err != nil {
		t.Fatal(err)
	}
	if n, err := WriteQcow2At(t.Context(), memFile(t, nil), zeros, Qcow2Options{}); err != nil || n > 5*64<<10 {
		t.Errorf("8 MiB of stored zeroes take %d bytes, %v", n, err)
	}
	if err := zeros.Zero(1<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := zeros.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	img, err := Open(t.Context(), memFile(t, writeBoth(t, zeros, Qcow2Options{})["file"]), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if e, err := img.Extents(64<<10, 1<<20); err != nil || e[0].State != block.Zero {
		t.Errorf("zeroes read as %v, %v", e, err)
	}
}

// TestWriteQcow2ManySharers: more compressed clusters than a refcount can count would fit in one cluster; they do not go there.
func TestWriteQcow2ManySharers(t *testing.T) {
	if testing.Short() {
		t.Skip()
	}
	r := refcounts{perBlock: 32, shared: map[int64][]uint16{}, last: -1}
	for range maxRefcount {
		r.share(40, 40)
	}
	if r.of(40) != maxRefcount || r.of(41) != 1 {
		t.Fatalf("%d uses, %d beside it", r.of(40), r.of(41))
	}
	q, err := newQcow2Writer(block.NewMem(1<<30), Qcow2Options{Compress: "zstd"}, qcow2Sink{})
	if err != nil {
		t.Fatal(err)
	}
	q.refs = r
	q.refs.perBlock = 32
	q.out.pos = 40<<q.bits + 100
	if err := q.placePacked(0, []byte("packed")); err != nil || q.out.pos != 41<<q.bits+6 {
		t.Fatalf("placed before %#x, %v", q.out.pos, err)
	}
}

// TestWriteQcow2Refuses: options nobody knows, disks that do not fit, a source that fails or changes, a target that fails, a caller that has enough.
func TestWriteQcow2Refuses(t *testing.T) {
	for name, c := range map[string]struct {
		size int64
		o    Qcow2Options
		want error
	}{
		"lzma":         {1 << 20, Qcow2Options{Compress: "lzma"}, ErrUnsupported},
		"cluster 3000": {1 << 20, Qcow2Options{ClusterBytes: 3000}, ErrUnsupported},
		"cluster 512":  {1 << 20, Qcow2Options{ClusterBytes: 512}, ErrUnsupported},
		"cluster 4M":   {1 << 20, Qcow2Options{ClusterBytes: 4 << 20}, ErrUnsupported},
		"no disk":      {0, Qcow2Options{}, ErrUnsupported},
		"large":        {15 << 40, Qcow2Options{ClusterBytes: 4096}, ErrTooLarge},
	} {
		if _, err := WriteQcow2(t.Context(), io.Discard, block.NewMem(c.size), c.o); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := WriteQcow2At(t.Context(), memFile(t, nil), block.NewMem(c.size), c.o); !errors.Is(err, c.want) {
			t.Errorf("%s, at: %v", name, err)
		}
	}
	dev := patchwork(t, rand.New(rand.NewPCG(3, 3)), 20<<20, 100)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := WriteQcow2(ctx, io.Discard, dev, Qcow2Options{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := WriteRaw(ctx, io.Discard, dev, RawOptions{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	full := errors.New("full")
	for _, compress := range []string{"", "zstd"} {
		if _, err := WriteQcow2(t.Context(), &failingWriter{left: 300 << 10, err: full}, dev, Qcow2Options{Compress: compress}); !errors.Is(err, full) {
			t.Errorf("%q: %v", compress, err)
		}
	}
	if _, err := WriteQcow2(t.Context(), io.Discard, &restless{Device: dev}, Qcow2Options{Compress: "zstd"}); !errors.Is(err, ErrSource) {
		t.Errorf("a source that changes: %v", err)
	}
}

type failingWriter struct {
	left int
	err  error
}

func (f *failingWriter) Write(p []byte) (int, error) {
	if len(p) > f.left {
		return f.left, f.err
	}
	f.left -= len(p)
	return len(p), nil
}

// restless is a disk that has other bytes each time it is read.
type restless struct {
	block.Device
	reads byte
}

func (r *restless) Extents(off, n int64) ([]block.Extent, error) {
	if off == 0 {
		r.reads++
	}
	return r.Device.Extents(off, n)
}

func (r *restless) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.Device.ReadAt(p, off)
	if r.reads > 1 {
		for i := range p {
			p[i] = byte(i * i * i >> 5)
		}
	}
	return n, err
}

// TestWriteRaw: as they are, packed, and into a sparse file.
func TestWriteRaw(t *testing.T) {
	for seed := range uint64(4) {
		rng := rand.New(rand.NewPCG(seed, 2))
		size := []int64{1, 7<<20 + 777, 20 << 20, 1 << 20}[seed]
		dev := patchwork(t, rng, size, 12)
		want := contentOf(t, dev)
		var raw, zipped bytes.Buffer
		last := int64(0)
		n, err := WriteRaw(t.Context(), &raw, dev, RawOptions{Progress: func(done, total int64) {
			if done < last || total != size {
				t.Errorf("%d of %d after %d", done, total, last)
			}
			last = done
		}})
		if err != nil || n != size || last != size || !bytes.Equal(raw.Bytes(), want) {
			t.Fatalf("seed %d: %d bytes, %v", seed, n, err)
		}
		if _, err := WriteRaw(t.Context(), &zipped, dev, RawOptions{Compress: "gzip"}); err != nil {
			t.Fatal(err)
		}
		r, err := gzip.NewReader(&zipped)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("seed %d: gzip gives %d bytes, %v", seed, len(got), err)
		}
		f := memFile(t, make([]byte, size))
		if err := WriteRawAt(t.Context(), f, dev, RawOptions{}); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		if _, err := f.ReadAt(got, 0); err != nil && err != io.EOF || !bytes.Equal(got, want) {
			t.Fatalf("seed %d: the file differs, %v", seed, err)
		}
	}
	if _, err := WriteRaw(t.Context(), io.Discard, block.NewMem(4096), RawOptions{Compress: "xz"}); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
	if err := WriteRawAt(t.Context(), memFile(t, nil), block.NewMem(4096), RawOptions{Compress: "gzip"}); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
}

// TestRuns: pieces tile the disk, each as high as its highest byte.
func TestRuns(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 4))
		dev := patchwork(t, rng, 1+rng.Int64N(3<<20), 8)
		granule := int64(4096) << rng.IntN(8)
		next := int64(0)
		var states []block.State
		err := runs(dev, granule, func(e block.Extent) error {
			if e.Off != next || e.N <= 0 || e.Off%granule != 0 || e.N%granule != 0 && e.Off+e.N != dev.Size() {
				return fmt.Errorf("%+v after %d", e, next)
			}
			next += e.N
			for range (e.N + granule - 1) / granule {
				states = append(states, e.State)
			}
			return nil
		})
		if err != nil || next != dev.Size() {
			t.Fatalf("seed %d: to %d of %d, %v", seed, next, dev.Size(), err)
		}
		for off := int64(0); off < dev.Size(); {
			list, err := dev.Extents(off, dev.Size()-off)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range list {
				for g := e.Off / granule; g*granule < e.Off+e.N; g++ {
					if states[g] < e.State {
						t.Fatalf("seed %d: piece %d is %v, holds %v", seed, g, states[g], e.State)
					}
				}
				off += e.N
			}
		}
	}
}

// FuzzWriteQcow2: whatever the disk and the options, the file opens and reads as the disk.
func FuzzWriteQcow2(f *testing.F) {
	f.Add(uint64(1), uint32(5000), uint8(0))
	f.Add(uint64(2), uint32(3<<20), uint8(7))
	f.Add(uint64(3), uint32(1<<20), uint8(17))
	f.Fuzz(func(t *testing.T, seed uint64, size uint32, how uint8) {
		dev := patchwork(t, rand.New(rand.NewPCG(seed, 5)), int64(size%(4<<20))+1, int(seed%16))
		o := Qcow2Options{Compress: []string{"", "zlib", "zstd"}[how%3], ClusterBytes: 4096 << (how / 3 % 10)}
		want := padded(contentOf(t, dev))
		for way, file := range writeBoth(t, dev, o) {
			checkRefcounts(t, file)
			img, err := Open(t.Context(), memFile(t, file), Options{Format: Qcow2})
			if err != nil || !bytes.Equal(contentOf(t, img), want) {
				t.Fatalf("%+v, %s: %v", o, way, err)
			}
		}
	})
}

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 7)) }
