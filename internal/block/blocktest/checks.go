package blocktest

import (
	"bytes"
	"errors"
	"math"
	"testing"

	"ashlar/internal/block"
)

func checkFresh(t testing.TB, c Config) {
	for _, n := range []int64{1 << 20, sizeBytes, 5 << 20} {
		d := c.open(t, n)
		if d.Size() != n {
			t.Fatalf("Size() = %d, want %d", d.Size(), n)
		}
		wantContent(t, d, make([]byte, n), "a new device")
		wantExtents(t, d, 0, n, make([]byte, n))
	}
}

// outside lists ranges that do not lie within a device of n bytes, in whole units.
func outside(n int64) [][2]int64 {
	const u = block.UnitBytes
	return [][2]int64{
		{-u, u}, {-u, 2 * u}, {n, u}, {n - u, 2 * u}, {n + u, u}, {n + u, 0}, {-u, 0}, {0, n + u},
		{math.MaxInt64/u*u - u, u}, {math.MaxInt64 / u * u, u}, {math.MinInt64, u},
	}
}

func checkRanges(t testing.TB, c Config) {
	d := c.open(t, sizeBytes)
	content := fill(sizeBytes, 0x5a)
	write(t, d, content, 0)
	for _, r := range outside(sizeBytes) {
		b := make([]byte, r[1])
		_, err := d.ReadAt(b, r[0])
		wantIs(t, err, block.ErrRange, "ReadAt outside")
		_, err = d.WriteAt(b, r[0])
		wantIs(t, err, block.ErrRange, "WriteAt outside")
		wantIs(t, d.Zero(r[0], r[1]), block.ErrRange, "Zero outside")
		_, err = d.Extents(r[0], r[1])
		wantIs(t, err, block.ErrRange, "Extents outside")
	}
	for _, n := range []int64{-block.UnitBytes, math.MinInt64, math.MaxInt64/block.UnitBytes*block.UnitBytes - block.UnitBytes} {
		wantIs(t, d.Zero(2*block.UnitBytes, n), block.ErrRange, "Zero of an impossible length")
		_, err := d.Extents(2*block.UnitBytes, n)
		wantIs(t, err, block.ErrRange, "Extents of an impossible length")
	}
	_, err := d.ReadAt(make([]byte, 10), sizeBytes-9)
	wantIs(t, err, block.ErrRange, "ReadAt one byte too far")
	wantContent(t, d, content, "after refused calls")
}

func checkZeroLength(t testing.TB, c Config) {
	d := c.open(t, sizeBytes)
	content := fill(sizeBytes, 0x5a)
	write(t, d, content, 0)
	for _, off := range []int64{0, block.UnitBytes, sizeBytes} {
		if n, err := d.ReadAt(nil, off); n != 0 || err != nil {
			t.Errorf("ReadAt(0 bytes, %d) = %d, %v", off, n, err)
		}
		if n, err := d.WriteAt([]byte{}, off); n != 0 || err != nil {
			t.Errorf("WriteAt(0 bytes, %d) = %d, %v", off, n, err)
		}
		if err := d.Zero(off, 0); err != nil {
			t.Errorf("Zero(%d, 0): %v", off, err)
		}
		extents, err := d.Extents(off, 0)
		if err != nil || len(extents) != 0 {
			t.Errorf("Extents(%d, 0) = %v, %v", off, extents, err)
		}
	}
	wantContent(t, d, content, "after calls of length zero")
}

func checkAlign(t testing.TB, c Config) {
	d := c.open(t, sizeBytes)
	content := fill(sizeBytes, 0x11)
	write(t, d, content, 0)
	b := fill(3*block.UnitBytes, 0x22)
	for _, r := range [][2]int64{{1, 4096}, {0, 100}, {4096, 1}, {512, 512}, {4095, 2}, {4096, 4097}, {1000, 9000}, {sizeBytes - 1, 1}} {
		_, errWrite := d.WriteAt(b[:r[1]], r[0])
		if c.align() > 1 {
			wantIs(t, errWrite, block.ErrAlign, "an unaligned WriteAt")
			wantIs(t, d.Zero(r[0], r[1]), block.ErrAlign, "an unaligned Zero")
			continue
		}
		must(t, errWrite, "WriteAt(%d bytes, %d)", r[1], r[0])
		copy(content[r[0]:], b[:r[1]])
		wantContent(t, d, content, "after a write at an odd place")
		wantExtents(t, d, 0, sizeBytes, content)
		if r[1] > 2 { // leave the ends
			zero(t, d, r[0]+1, r[1]-2)
			clear(content[r[0]+1 : r[0]+r[1]-1])
			wantContent(t, d, content, "after a zero at an odd place")
			wantExtents(t, d, 0, sizeBytes, content)
		}
	}
	wantContent(t, d, content, "after unaligned calls")
}

func checkReadBack(t testing.TB, c Config) {
	d := c.open(t, sizeBytes)
	r := newRand(t)
	content := make([]byte, sizeBytes)
	for _, at := range [][2]int64{
		{0, 4096}, {sizeBytes - 4096, 4096}, {8192, 1 << 20}, {1<<20 - 4096, 8192}, {12288, 4096}, {64 << 10, 128 << 10}, {0, sizeBytes}, {4096, 12288},
	} {
		b := content[at[0] : at[0]+at[1]]
		noise(r, b)
		write(t, d, b, at[0])
		wantBytes(t, d, at[0], b, "what was just written")
		wantContent(t, d, content, "all")
		wantExtents(t, d, 0, sizeBytes, content)
	}
}

func checkReadAnywhere(t testing.TB, c Config) {
	d := c.open(t, sizeBytes)
	r := newRand(t)
	content := make([]byte, sizeBytes)
	noise(r, content[8192:1<<20])
	write(t, d, content[8192:1<<20], 8192)
	for _, at := range [][2]int{{0, 1}, {8191, 2}, {8192, 1}, {10000, 10000}, {1<<20 - 1, 2}, {1<<20 - 5000, 10001}, {sizeBytes - 1, 1}, {sizeBytes - 513, 513}, {1, sizeBytes - 1}} {
		wantBytes(t, d, int64(at[0]), content[at[0]:at[0]+at[1]], "a read at an odd place")
		wantExtents(t, d, int64(at[0]), int64(at[1]), content)
	}
	for range 100 {
		off := r.IntN(sizeBytes)
		n := 1 + r.IntN(min(20000, sizeBytes-off))
		wantBytes(t, d, int64(off), content[off:off+n], "a read at an odd place")
	}
}

// checkBuffers: the device neither changes nor keeps what it is given to write, and fills exactly what it is given to read into.
func checkBuffers(t testing.TB, c Config) {
	d := c.open(t, sizeBytes)
	b := fill(8192, 1)
	write(t, d, b, 4096)
	if !bytes.Equal(b, fill(8192, 1)) {
		t.Fatal("WriteAt changed the caller's buffer")
	}
	copy(b, fill(8192, 2))
	must(t, d.Flush(), "Flush")
	wantBytes(t, d, 4096, fill(8192, 1), "after the caller changed the buffer it had written")
	got := fill(3*4096+200, 0xcc)
	n, err := d.ReadAt(got[100:100+3*4096:100+3*4096], 0)
	must(t, err, "ReadAt")
	if n != 3*4096 || !bytes.Equal(got[:100], fill(100, 0xcc)) || !bytes.Equal(got[100+n:], fill(100, 0xcc)) {
		t.Fatalf("ReadAt wrote beyond the buffer it was given, or returned %d", n)
	}
	copy(got, fill(len(got), 0xdd)) // a device that kept our buffer as its cache shows it now
	wantBytes(t, d, 4096, fill(8192, 1), "after the caller changed the buffer it had read into")
}

func checkZero(t testing.TB, c Config) {
	d := c.open(t, sizeBytes)
	content := make([]byte, sizeBytes)
	step := func(what string) {
		t.Helper()
		wantContent(t, d, content, what)
		wantExtents(t, d, 0, sizeBytes, content)
	}
	zeroed := func(off, n int64) {
		t.Helper()
		zero(t, d, off, n)
		clear(content[off : off+n])
		step("after Zero")
	}
	zeroed(4096, 8192) // where nothing was written
	copy(content, fill(sizeBytes, 0x77))
	write(t, d, content, 0)
	step("after a write over everything")
	zeroed(0, 4096)
	zeroed(sizeBytes-4096, 4096)
	zeroed(12288, 300<<10/4096*4096)
	zeroed(8192, 8192) // once more in part
	copy(content[16384:], fill(4096, 0x33))
	write(t, d, content[16384:20480], 16384)
	step("after a write into what was zeroed")
	must(t, d.Flush(), "Flush")
	step("after Flush")
	zeroed(0, sizeBytes)
	if c.align() == 1 {
		write(t, d, []byte{9}, 5000)
		content[5000] = 9
		step("after one byte into a zeroed unit: what was there before must not come back")
	}
}

func checkExtents(t testing.TB, c Config) {
	d := c.open(t, sizeBytes)
	content := make([]byte, sizeBytes)
	for off := int64(0); off < sizeBytes; off += 7 * 4096 { // data, zero, untouched
		n := min(3*4096, sizeBytes-off)
		copy(content[off:off+n], fill(int(n), 1))
		write(t, d, content[off:off+n], off)
		if n == 3*4096 {
			zero(t, d, off+4096, 4096)
			clear(content[off+4096 : off+8192])
		}
	}
	wantExtents(t, d, 0, sizeBytes, content)
	for off := int64(0); off < 30*4096; off += 1111 {
		for _, n := range []int64{1, 4095, 4096, 12289, sizeBytes - off} {
			wantExtents(t, d, off, n, content)
		}
	}
	wantExtents(t, d, sizeBytes-1, 1, content)
}

// checkModel compares random operations with a plain byte slice.
func checkModel(t testing.TB, c Config) {
	r := newRand(t)
	d := c.open(t, sizeBytes)
	content := make([]byte, sizeBytes)
	steps := c.Steps
	if steps == 0 {
		steps = 400
	}
	for step := range steps {
		off := r.Int64N(sizeBytes)
		n := 1 + r.Int64N(min(96<<10, sizeBytes-off))
		if c.align() > 1 || r.IntN(2) == 0 {
			off = off / block.UnitBytes * block.UnitBytes
			n = min((n+block.UnitBytes-1)/block.UnitBytes*block.UnitBytes, sizeBytes-off)
		}
		part := content[off : off+n]
		switch r.IntN(10) {
		case 0, 1, 2:
			zero(t, d, off, n)
			clear(part)
		case 3:
			must(t, d.Flush(), "Flush")
		case 4:
			if c.Reopen != nil && r.IntN(8) == 0 {
				must(t, d.Flush(), "Flush")
				d = c.reopen(t, d)
			}
		default:
			noise(r, part)
			write(t, d, part, off)
		}
		wantBytes(t, d, off, part, "where we just were")
		if step%16 == 0 || step == steps-1 {
			wantContent(t, d, content, "all")
			wantExtents(t, d, 0, sizeBytes, content)
		}
	}
}

func (c Config) reopen(t testing.TB, d block.Device) block.Device {
	t.Helper()
	e := c.Reopen(t, d)
	t.Cleanup(func() { closeQuietly(t, e) })
	return e
}

func checkHuge(t testing.TB, c Config) {
	if c.HugeBytes == 0 {
		return
	}
	d := c.open(t, c.HugeBytes)
	places := []int64{0, c.HugeBytes / 2 / block.UnitBytes * block.UnitBytes, c.HugeBytes - block.UnitBytes}
	for _, off := range places {
		write(t, d, fill(block.UnitBytes, 1), off)
	}
	for _, off := range places {
		wantBytes(t, d, off, fill(block.UnitBytes, 1), "far out")
	}
	zero(t, d, places[1], block.UnitBytes)
	wantBytes(t, d, places[1], make([]byte, block.UnitBytes), "far out")
	found := int64(0)
	for off := int64(0); off < c.HugeBytes; {
		extents, err := d.Extents(off, c.HugeBytes-off)
		must(t, err, "Extents(%d, %d)", off, c.HugeBytes-off)
		if len(extents) == 0 || extents[0].Off != off {
			t.Fatalf("Extents(%d) = %v", off, extents)
		}
		for _, e := range extents {
			if e.State == block.Data {
				found += e.N
			}
			off += e.N
		}
	}
	if found < 2*block.UnitBytes || found > c.HugeBytes/2 {
		t.Errorf("extents report %d bytes of data in a device with two units", found)
	}
	must(t, d.Flush(), "Flush")
}

func checkClosed(t testing.TB, c Config) {
	d := c.New(t, sizeBytes)
	write(t, d, fill(4096, 1), 0)
	must(t, d.Close(), "Close")
	_, err := d.ReadAt(make([]byte, 4096), 0)
	wantIs(t, err, block.ErrClosed, "ReadAt after Close")
	_, err = d.WriteAt(make([]byte, 4096), 0)
	wantIs(t, err, block.ErrClosed, "WriteAt after Close")
	wantIs(t, d.Zero(0, 4096), block.ErrClosed, "Zero after Close")
	wantIs(t, d.Flush(), block.ErrClosed, "Flush after Close")
	_, err = d.Extents(0, 4096)
	wantIs(t, err, block.ErrClosed, "Extents after Close")
	if err := d.Close(); err != nil && !errors.Is(err, block.ErrClosed) {
		t.Errorf("a second Close: %v", err)
	}
}

func checkReopen(t testing.TB, c Config) {
	if c.Reopen == nil {
		return
	}
	r := newRand(t)
	d := c.open(t, sizeBytes)
	content := make([]byte, sizeBytes)
	noise(r, content)
	write(t, d, content, 0)
	must(t, d.Flush(), "Flush")
	zero(t, d, 64<<10, 256<<10)
	clear(content[64<<10 : 320<<10])
	noise(r, content[128<<10:132<<10])
	write(t, d, content[128<<10:132<<10], 128<<10)
	must(t, d.Flush(), "Flush")
	for range 3 {
		d = c.reopen(t, d)
		if d.Size() != sizeBytes {
			t.Fatalf("Size() = %d after reopening, want %d", d.Size(), sizeBytes)
		}
		wantContent(t, d, content, "after reopening: what was flushed must be there, and what was zeroed must not come back")
		wantExtents(t, d, 0, sizeBytes, content)
		noise(r, content[:4096])
		write(t, d, content[:4096], 0)
		must(t, d.Flush(), "Flush")
	}
}
