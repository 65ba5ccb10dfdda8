package blocktest

import (
	"math/rand/v2"
	"testing"

	"ashlar/internal/block"
)

// ReadOnlyConfig says how to make the devices under test.
type ReadOnlyConfig struct {
	// New returns a device with this content, whose length is a multiple of block.UnitBytes.
	New func(t testing.TB, content []byte) block.Device
}

type readOnlyCheck struct {
	name string
	run  func(t testing.TB, d block.Device, content []byte)
}

func readOnlyChecks() []readOnlyCheck {
	return []readOnlyCheck{
		{"Content", readOnlyContent}, {"Ranges", readOnlyRanges}, {"Refused", readOnlyRefused},
		{"Concurrent", readOnlyConcurrent}, {"Closed", readOnlyClosed},
	}
}

// RunReadOnly checks devices that take no writes: their content is given when they are made.
func RunReadOnly(t *testing.T, c ReadOnlyConfig) {
	for _, k := range readOnlyChecks() {
		for name, content := range contents(t) {
			t.Run(k.name+"/"+name, func(t *testing.T) {
				d := c.New(t, content)
				t.Cleanup(func() { closeQuietly(t, d) })
				k.run(t, d, content)
			})
		}
	}
}

// contents are what read-only devices are made of: holes, noise, and bytes that are easy to compress.
func contents(t testing.TB) map[string][]byte {
	r := newRand(t)
	mixed := make([]byte, 3<<20+5*block.UnitBytes)
	noise(r, mixed[64<<10:200<<10])
	copy(mixed[512<<10:], fill(300<<10, 'a'))
	noise(r, mixed[1<<20+1:1<<20+2])
	noise(r, mixed[len(mixed)-block.UnitBytes:])
	full := make([]byte, 1<<20)
	noise(r, full)
	return map[string][]byte{"mixed": mixed, "full": full, "holes": make([]byte, 1<<20), "unit": full[:block.UnitBytes]}
}

func readOnlyContent(t testing.TB, d block.Device, content []byte) {
	n := len(content)
	if d.Size() != int64(n) {
		t.Fatalf("Size() = %d, want %d", d.Size(), n)
	}
	wantContent(t, d, content, "all")
	wantExtents(t, d, 0, int64(n), content)
	r := newRand(t)
	for range 200 {
		off := r.IntN(n)
		m := 1 + r.IntN(min(100<<10, n-off))
		wantBytes(t, d, int64(off), content[off:off+m], "a part")
		wantExtents(t, d, int64(off), int64(m), content)
	}
	wantBytes(t, d, int64(n-1), content[n-1:], "the last byte")
}

func readOnlyRanges(t testing.TB, d block.Device, content []byte) {
	for _, r := range outside(int64(len(content))) {
		_, err := d.ReadAt(make([]byte, r[1]), r[0])
		wantIs(t, err, block.ErrRange, "ReadAt outside")
		_, err = d.Extents(r[0], r[1])
		wantIs(t, err, block.ErrRange, "Extents outside")
	}
	if n, err := d.ReadAt(nil, int64(len(content))); n != 0 || err != nil {
		t.Errorf("ReadAt of nothing at the end: %d, %v", n, err)
	}
}

func readOnlyRefused(t testing.TB, d block.Device, content []byte) {
	_, err := d.WriteAt(fill(block.UnitBytes, 1), 0)
	wantIs(t, err, block.ErrReadOnly, "WriteAt")
	wantIs(t, d.Zero(0, block.UnitBytes), block.ErrReadOnly, "Zero")
	must(t, d.Flush(), "Flush")
	wantContent(t, d, content, "after refused calls")
}

func readOnlyConcurrent(t testing.TB, d block.Device, content []byte) {
	parallel(t, "concurrent reads", func(w int, r *rand.Rand) {
		for range 50 {
			off := r.IntN(len(content))
			n := 1 + r.IntN(min(64<<10, len(content)-off))
			b := make([]byte, n)
			if _, err := d.ReadAt(b, int64(off)); err != nil || string(b) != string(content[off:off+n]) {
				t.Errorf("worker %d: read %d bytes at %d: wrong, %v", w, n, off, err)
				return
			}
		}
	})
}

func readOnlyClosed(t testing.TB, d block.Device, _ []byte) {
	must(t, d.Close(), "Close")
	_, err := d.ReadAt(make([]byte, 1), 0)
	wantIs(t, err, block.ErrClosed, "ReadAt after Close")
	_, err = d.Extents(0, 1)
	wantIs(t, err, block.ErrClosed, "Extents after Close")
}
