package image

import (
	"bytes"
	"compress/flate"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"testing"

	"ashlar/internal/block"
)

// forged builds qcow2 files that say what a test wants. Clusters are 4096 bytes unless bits says otherwise; the header is in cluster 0, the L1 table in 1, the
// refcount table in 2, and tables and data follow where the test puts them.
type forged struct {
	b    []byte
	bits uint
}

const (
	l1At       = 0x1000
	refcountAt = 0x2000
	l2At       = 0x3000
	dataAt     = 0x4000
	copied     = uint64(1) << 63
)

// forge gives an honest version 3 image of size bytes with one L2 table and no data.
func forge(size uint64) *forged {
	f := &forged{b: make([]byte, 0x5000), bits: 12}
	copy(f.b, qcowMagic)
	f.u32(4, 3)
	f.u32(20, 12)
	f.u64(24, size)
	f.u32(36, 1)
	f.u64(40, l1At)
	f.u64(48, refcountAt)
	f.u32(56, 1)
	f.u32(96, 4)
	f.u32(100, 112)
	f.u64(l1At, l2At|copied)
	return f
}

func (f *forged) grow(n int) {
	if n > len(f.b) {
		f.b = append(f.b, make([]byte, n-len(f.b))...)
	}
}

func (f *forged) u32(off int, v uint32) *forged {
	f.grow(off + 4)
	binary.BigEndian.PutUint32(f.b[off:], v)
	return f
}

func (f *forged) u64(off int, v uint64) *forged {
	f.grow(off + 8)
	binary.BigEndian.PutUint64(f.b[off:], v)
	return f
}

func (f *forged) bytes(off int, p []byte) *forged {
	f.grow(off + len(p))
	copy(f.b[off:], p)
	return f
}

func deflated(t testing.TB, p []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, 9)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(p)
	w.Close()
	return b.Bytes()
}

// compressedEntry points to a stream of n bytes at off, in an image of 4096-byte clusters.
func compressedEntry(off, n int) uint64 {
	sectors := (off+n-1)/512 - off/512
	return l2Compressed | uint64(sectors)<<(62-4) | uint64(off)
}

func openForged(t testing.TB, f *forged, limits Limits) (*Image, error) {
	t.Helper()
	return Open(context.Background(), memFile(t, f.b), Options{Format: Qcow2, Limits: limits})
}

// TestForgedHonest: what the other tests bend is right to begin with.
func TestForgedHonest(t *testing.T) {
	packed := deflated(t, bytes.Repeat([]byte{5}, 4096))
	f := forge(8*4096).u64(l2At, dataAt|copied).bytes(dataAt, bytes.Repeat([]byte{3}, 4096)).
		u64(l2At+8, 1).u64(l2At+16, dataAt+0x1000|1).grown(dataAt+0x2000).
		u64(l2At+24, compressedEntry(0x6100, len(packed))).bytes(0x6100, packed).grown(0x7000)
	dev, err := openForged(t, f, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, dev.Size())
	if _, err := dev.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 8*4096)
	copy(want, bytes.Repeat([]byte{3}, 4096))
	copy(want[3*4096:], bytes.Repeat([]byte{5}, 4096))
	if !bytes.Equal(got, want) {
		t.Fatal("content differs")
	}
	list, err := dev.Extents(0, dev.Size())
	if err != nil {
		t.Fatal(err)
	}
	states := []block.State{block.Data, block.Zero, block.Data, block.Absent}
	for i, e := range list {
		if e.State != states[i] {
			t.Fatalf("extents %v", list)
		}
	}
	if dev.Close() != nil {
		t.Fatal("close")
	}
}

func (f *forged) grown(n int) *forged { f.grow(n); return f }

// TestLies: each way a header or table may lie, or ask for what is not given, has its refusal, and none reads anything else than the file.
func TestLies(t *testing.T) {
	const size = 8 * 4096
	cases := []struct {
		name string
		file *forged
		want error
	}{
		{"empty", &forged{}, ErrFormat},
		{"magic only", &forged{b: []byte(qcowMagic)}, ErrTruncated},
		{"71 bytes", &forged{b: forge(size).b[:71]}, ErrTruncated},
		{"v3 cut in its header", &forged{b: forge(size).b[:90]}, ErrTruncated},
		{"cut after the header", &forged{b: forge(size).b[:0x1000]}, ErrTruncated},
		{"cut in the L2 table", &forged{b: forge(size).b[:0x3800]}, ErrTruncated},
		{"cut in the data", &forged{b: forge(size).u64(l2At, dataAt).b[:0x4fff]}, ErrTruncated},
		{"version 1", forge(size).u32(4, 1), ErrUnsupported},
		{"version 4", forge(size).u32(4, 4), ErrUnsupported},
		{"backing file", forge(size).u64(8, 200).u32(16, 11).bytes(200, []byte("/etc/passwd")), ErrUnsupported},
		{"backing file beyond the end", forge(size).u64(8, 1<<60), ErrUnsupported},
		{"AES", forge(size).u32(32, 1), ErrUnsupported},
		{"LUKS", forge(size).u32(32, 2), ErrUnsupported},
		{"method 3", forge(size).u32(32, 3), ErrUnsupported},
		{"corrupt bit", forge(size).u64(72, 2), ErrFormat},
		{"external data file bit", forge(size).u64(72, 4), ErrUnsupported},
		{"unknown feature", forge(size).u64(72, 1<<5), ErrUnsupported},
		{"unknown feature, high", forge(size).u64(72, 1<<63), ErrUnsupported},
		{"compression bit without type", forge(size).u64(72, 8), ErrFormat},
		{"compression type without bit", forge(size).bytes(104, []byte{1}), ErrFormat},
		{"compression type 2", forge(size).u64(72, 8).bytes(104, []byte{2}), ErrUnsupported},
		{"extended L2 in small clusters", forge(size).u64(72, 16), ErrFormat},
		{"cluster bits 8", forge(size).u32(20, 8), ErrFormat},
		{"cluster bits 22", forge(size).u32(20, 22), ErrFormat},
		{"cluster bits 2^31", forge(size).u32(20, 1<<31), ErrFormat},
		{"size 0", forge(0), ErrFormat},
		{"size beyond the limit", forge(16 << 40), ErrTooLarge},
		{"size 2^63", forge(1 << 63), ErrTooLarge},
		{"size 2^64-1", forge(1<<64 - 1), ErrTooLarge},
		{"L1 too small for the size", forge(1 << 30), ErrFormat},
		{"L1 size 0", forge(size).u32(36, 0), ErrFormat},
		{"L1 size beyond the file", forge(size).u32(36, 1<<20), ErrTruncated},
		{"L1 size 2^32-1", forge(size).u32(36, 1<<32-1), ErrTooLarge},
		{"L1 unaligned", forge(size).u64(40, l1At+8), ErrFormat},
		{"L1 beyond the end", forge(size).u64(40, 1<<40), ErrTruncated},
		{"L1 at 2^63", forge(size).u64(40, 1<<63), ErrTruncated},
		{"L1 at the header", forge(size).u64(40, 0), ErrFormat},
		{"refcount table unaligned", forge(size).u64(48, 77), ErrFormat},
		{"refcount table beyond the end", forge(size).u64(48, 1<<50), ErrTruncated},
		{"refcount table of 2^32-1 clusters", forge(size).u32(56, 1<<32-1), ErrTruncated},
		{"refcount order 7", forge(size).u32(96, 7), ErrFormat},
		{"header length 100", forge(size).u32(100, 100), ErrFormat},
		{"header length 105", forge(size).u32(100, 105), ErrFormat},
		{"header length over a cluster", forge(size).u32(100, 4104), ErrFormat},
		{"header length 2^32-8", forge(size).u32(100, 1<<32-8), ErrFormat},
		{"extension over its cluster", forge(size).u32(112, 0x6803f857).u32(116, 8000), ErrFormat},
		{"extension of 2^32-1 bytes", forge(size).u32(112, 0x6803f857).u32(116, 1<<32-1), ErrFormat},
		{"extension LUKS", forge(size).u32(112, extEncryption).u32(116, 16), ErrUnsupported},
		{"extension data file", forge(size).u32(112, extDataFile).u32(116, 8).bytes(120, []byte("/etc/pwd")), ErrUnsupported},
		{"extensions without end", endlessExtensions(), ErrFormat},
		{"L1 entry: reserved bits", forge(size).u64(l1At, l2At|1), ErrFormat},
		{"L1 entry: reserved high bits", forge(size).u64(l1At, l2At|1<<60), ErrFormat},
		{"L1 entry: unaligned", forge(size).u64(l1At, l2At+512), ErrFormat},
		{"L1 entry: beyond the end", forge(size).u64(l1At, 1<<50), ErrTruncated},
		{"L1 entry: half a table", forge(size).u64(l1At, 0x5000).grown(0x5800), ErrTruncated},
		{"loop: L2 is the L1", forge(size).u64(l1At, l1At), ErrFormat},
		{"loop: data is the L1", forge(size).u64(l2At, l1At), ErrFormat},
		{"loop: data is its own L2", forge(size).u64(l2At, l2At), ErrFormat},
		{"two L1 entries share an L2", forge(4<<20).u32(36, 2).u64(l1At+8, l2At), ErrFormat},
		{"L2 entry: reserved bits", forge(size).u64(l2At, dataAt|2), ErrFormat},
		{"L2 entry: reserved high bits", forge(size).u64(l2At, dataAt|1<<56), ErrFormat},
		{"L2 entry: unaligned", forge(size).u64(l2At, dataAt+512), ErrFormat},
		{"L2 entry: the header, copied", forge(size).u64(l2At, copied), ErrFormat},
		{"L2 entry: beyond the end", forge(size).u64(l2At, 1<<50), ErrTruncated},
		{"L2 entry: zero flag in v2", forge(size).u32(4, 2).u64(l2At, 1), ErrFormat},
		{"L2 entry: zero cluster beyond the end", forge(size).u64(l2At, 1<<50|1), ErrTruncated},
		{"two guest clusters share data", forge(size).u64(l2At, dataAt).u64(l2At+8, dataAt), ErrFormat},
		{"compressed: beyond the end", forge(size).u64(l2At, compressedEntry(1<<40, 100)), ErrTruncated},
		{"compressed: in the L2 table", forge(size).u64(l2At, compressedEntry(l2At+64, 100)), ErrFormat},
		{"compressed: in the header", forge(size).u64(l2At, compressedEntry(0, 100)), ErrFormat},
		{"compressed: same stream twice", forge(size).u64(l2At, compressedEntry(dataAt, 100)).u64(l2At+8, compressedEntry(dataAt, 100)), ErrFormat},
		{"compressed over data", forge(size).u64(l2At, dataAt).u64(l2At+8, compressedEntry(dataAt+9, 100)), ErrFormat},
		{"data over compressed", forge(size).u64(l2At, compressedEntry(dataAt+9, 100)).u64(l2At+8, dataAt), ErrFormat},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dev, err := openForged(t, c.file, Limits{})
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if dev != nil {
				t.Fatal("a device came with the error")
			}
			t.Log(err)
		})
	}
}

func endlessExtensions() *forged {
	f := forge(4096).u32(20, 16) // the header's cluster is 64 KiB
	for off := 112; off+8 <= 64<<10; off += 8 {
		f.u32(off, 0x12345678)
	}
	return f.u64(40, 64<<10).u64(48, 128<<10).grown(192 << 10)
}

// TestLiesExtended: the same for extended L2 entries.
func TestLiesExtended(t *testing.T) {
	forge := func() *forged {
		f := forge(8*16384).u64(72, 16).u32(20, 14).u64(40, 0x4000).u64(48, 0x8000).u64(0x4000, 0xc000|copied)
		return f.grown(0x14000)
	}
	ok := forge().u64(0xc000, 0x10000).u64(0xc008, 0x00000002_00000005).bytes(0x10000, bytes.Repeat([]byte{1}, 0x4000))
	dev, err := openForged(t, ok, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	if _, err := dev.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 4096)
	copy(want, bytes.Repeat([]byte{1}, 512))
	copy(want[1024:], bytes.Repeat([]byte{1}, 512))
	if !bytes.Equal(got, want) {
		t.Fatal("subclusters read wrong")
	}
	for name, c := range map[string]struct {
		file *forged
		want error
	}{
		"allocated and zero":          {forge().u64(0xc000, 0x10000).u64(0xc008, 0x00000001_00000001), ErrFormat},
		"allocated at the header":     {forge().u64(0xc008, 1), ErrFormat},
		"zero flag":                   {forge().u64(0xc000, 0x10000|1), ErrFormat},
		"compressed with bitmap":      {forge().u64(0xc000, l2Compressed|0x10000).u64(0xc008, 1), ErrFormat},
		"beyond the end":              {forge().u64(0xc000, 0x14000).u64(0xc008, 1), ErrTruncated},
		"last subcluster not in file": {&forged{b: forge().u64(0xc000, 0x10000).u64(0xc008, 1<<31).b[:0x13fff]}, ErrTruncated},
	} {
		if _, err := openForged(t, c.file, Limits{}); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
}

// TestBadStreams: compressed clusters that do not unpack are ErrCorrupt when they are read, and never data.
func TestBadStreams(t *testing.T) {
	short := deflated(t, make([]byte, 4000))
	good := deflated(t, bytes.Repeat([]byte("ashlar "), 600))
	long := deflated(t, bytes.Repeat([]byte("ashlar "), 100_000))
	zstd := func(f *forged) *forged { return f.u64(72, 8).bytes(104, []byte{1}) }
	at := func(p []byte) *forged {
		return forge(8*4096).u64(l2At, compressedEntry(dataAt, len(p))).bytes(dataAt, p).grown(dataAt + 4096)
	}
	for name, c := range map[string]struct {
		file *forged
		ok   bool
	}{
		"good":                 {at(good), true},
		"long":                 {at(long), true}, // as QEMU does, the first cluster is taken
		"short":                {at(short), false},
		"garbage":              {at(bytes.Repeat([]byte{0xff}, 300)), false},
		"zeroes":               {at(make([]byte, 300)), false},
		"deflate read as zstd": {zstd(at(good)), false},
		"zstd of 2^40 bytes":   {zstd(at([]byte("\x28\xb5\x2f\xfd\xe0\x00\x00\x00\x00\x00\x01\x00\x00\x03\x00\x00"))), false},
		"zstd, huge window":    {zstd(at([]byte("\x28\xb5\x2f\xfd\x00\xff\x03\x00\x00"))), false},
		"zstd, empty frames":   {zstd(at(bytes.Repeat([]byte("\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00"), 40))), false},
		"zstd, repeated byte":  {zstd(at([]byte("\x28\xb5\x2f\xfd\x60\x00\x0f\x03\x80\x00\x07"))), true},
		"zstd, over a cluster": {zstd(at([]byte("\x28\xb5\x2f\xfd\xa0\x00\x00\x02\x00\x02\x00\x10\x07\x03\x00\x10\x07"))), false},
	} {
		dev, err := openForged(t, c.file, Limits{})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, n := range []int{4096, 100} {
			_, err = dev.ReadAt(make([]byte, n), 0)
			if c.ok && err != nil || !c.ok && (!errors.Is(err, block.ErrCorrupt) || !errors.Is(err, ErrFormat)) {
				t.Errorf("%s: read of %d: %v", name, n, err)
			}
		}
		if _, err := dev.ReadAt(make([]byte, 4096), 4096); err != nil {
			t.Errorf("%s: the next cluster: %v", name, err)
		}
	}
}

// bomb is a file whose compressed clusters, of 2 MiB each, are all as small as they can be.
type bomb struct{ head []byte }

const (
	bombClusters = 1 << 18 // one full L2 table: 512 GiB
	bombBytes    = 10 << 20
)

func newBomb(shift int) *bomb {
	f := forge(bombClusters<<21).u32(20, 21).u64(40, 1<<21).u64(48, 2<<21).u64(1<<21, 3<<21|copied)
	for i := range bombClusters {
		f.u64(3<<21+i*8, l2Compressed|uint64(4<<21+i*shift))
	}
	f.grow(bombBytes)
	return &bomb{f.b}
}

// TestBombs: a small file that would become a huge disk is refused before anything is unpacked, and without much memory.
func TestBombs(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for name, c := range map[string]struct {
		shift int
		limit Limits
		want  error
	}{
		"every cluster its own stream": {7, Limits{}, ErrTooLarge},
		"one stream for all":           {0, Limits{Expand: 1 << 40}, ErrFormat},
		"allowed by the caller":        {7, Limits{Expand: 1 << 40}, nil},
		"virtual limit":                {7, Limits{VirtualBytes: bombClusters<<21 - 1, Expand: 1 << 40}, ErrTooLarge},
	} {
		if _, err := openForged(t, &forged{b: newBomb(c.shift).head}, c.limit); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v", name, err)
		} else {
			t.Log(err)
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 400<<20 {
		t.Errorf("%d bytes were allocated", n)
	}
}

// TestLargeDisks: sizes at the limits work without memory in proportion.
func TestLargeDisks(t *testing.T) {
	// 15 TiB in 2 MiB clusters: 30 L1 entries, nothing allocated.
	f := forge(15<<40).u32(20, 21).u32(36, 30).u64(40, 1<<21).u64(48, 2<<21).u64(l1At, 0).grown(4 << 21)
	dev, err := openForged(t, f, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	list, err := dev.Extents(0, dev.Size())
	if err != nil || len(list) != 1 || list[0].State != block.Absent {
		t.Fatalf("%v, %v", list, err)
	}
	if d, err := Digest(context.Background(), dev); err != nil || d == "" {
		t.Fatal(err)
	}
	if _, err := openForged(t, forge(15<<40), Limits{}); !errors.Is(err, ErrTooLarge) {
		t.Fatalf("an L1 table of gigabytes: %v", err)
	}
}

// changing is a file whose bytes can be swapped under an open image.
type changing struct{ b []byte }

func (c *changing) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(c.b).ReadAt(p, off)
}

// TestChangesUnderfoot: tables that change after they were checked are checked again when they are read.
func TestChangesUnderfoot(t *testing.T) {
	file := &changing{forge(8*4096).u64(l2At, dataAt).b}
	dev, err := openQcow2(context.Background(), file, int64(len(file.b)), openOptions{limits: Limits{}.withDefaults()})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4096)
	for entry, want := range map[uint64]error{1 << 50: ErrTruncated, dataAt + 512: ErrFormat, compressedEntry(1<<30, 9): ErrTruncated} {
		dev.tables = newFifo[int64, []byte](4)
		file.b = forge(8*4096).u64(l2At, entry).b
		if _, err := dev.ReadAt(p, 0); !errors.Is(err, want) {
			t.Errorf("entry %#x: %v", entry, err)
		}
	}
	file.b = file.b[:100]
	dev.tables = newFifo[int64, []byte](4)
	if _, err := dev.ReadAt(p, 0); !errors.Is(err, ErrTruncated) || errors.Is(err, io.EOF) {
		t.Errorf("a shrunk file: %v", err)
	}
}

// TestOpenStops: the walk over the tables ends with its context.
func TestOpenStops(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Open(ctx, memFile(t, forge(4096).b), Options{}); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
}
