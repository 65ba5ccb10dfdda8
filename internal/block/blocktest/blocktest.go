// Package blocktest is the contract of block.Device as a test suite: Run for devices that take writes, RunReadOnly for those that
// do not. Every Device of Ashlar passes it. Its own tests hand it broken devices and check that it notices.
//
// Read next: package block.
package blocktest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"ashlar/internal/block"
)

// Config says how to make the devices under test.
type Config struct {
	// New returns a device of sizeBytes (a multiple of 1 MiB) that reads as zeros. It is closed by the suite; what else there is to
	// clean up, New gives to t.Cleanup. It must not fail.
	New func(t testing.TB, sizeBytes int64) block.Device
	// AlignBytes is what offset and length of writes and zeroes must be multiples of: 1 (or 0), or block.UnitBytes. Others must be refused
	// with ErrAlign.
	AlignBytes int64
	// Reopen, if set, closes d and opens what it left. Everything flushed must be there.
	Reopen func(t testing.TB, d block.Device) block.Device
	// Steps is the number of random operations of the model check; 0 means 400.
	Steps int
	// HugeBytes, if set, is the size of a device that must work with a few units written, such as 8 TiB.
	HugeBytes int64
}

// sizeBytes is the size of the devices that most checks use.
const sizeBytes = 2 << 20

// patience is how long a call may take that should not block at all.
const patience = 20 * time.Second

type check struct {
	name string
	run  func(t testing.TB, c Config)
}

// checks is the suite. Each check gets devices of its own.
func checks() []check {
	return []check{
		{"Fresh", checkFresh}, {"Ranges", checkRanges}, {"ZeroLength", checkZeroLength}, {"Align", checkAlign},
		{"ReadBack", checkReadBack}, {"ReadAnywhere", checkReadAnywhere}, {"Buffers", checkBuffers},
		{"Zero", checkZero}, {"Extents", checkExtents}, {"Model", checkModel}, {"Huge", checkHuge},
		{"Disjoint", checkDisjoint}, {"SameUnits", checkSameUnits}, {"SharedUnits", checkSharedUnits},
		{"Flush", checkFlush}, {"Reopen", checkReopen}, {"Closed", checkClosed}, {"CloseRace", checkCloseRace},
	}
}

// Run checks devices that take writes.
func Run(t *testing.T, c Config) {
	for _, k := range checks() {
		t.Run(k.name, func(t *testing.T) { k.run(t, c) })
	}
}

func (c Config) align() int64 { return max(c.AlignBytes, 1) }

// open makes a device that is closed when the test ends.
func (c Config) open(t testing.TB, n int64) block.Device {
	t.Helper()
	d := c.New(t, n)
	t.Cleanup(func() { closeQuietly(t, d) })
	return d
}

// closeQuietly closes a device that may be closed already.
func closeQuietly(t testing.TB, d block.Device) {
	if err := d.Close(); err != nil && !errors.Is(err, block.ErrClosed) {
		t.Errorf("Close: %v", err)
	}
}

func must(t testing.TB, err error, format string, args ...any) {
	t.Helper()
	if err != nil {
		t.Fatalf(format+": %v", append(args, err)...)
	}
}

func wantIs(t testing.TB, err, target error, what string) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Errorf("%s: error %v, want one that is %q", what, err, target)
	}
}

func write(t testing.TB, d block.Device, b []byte, off int64) {
	t.Helper()
	n, err := d.WriteAt(b, off)
	must(t, err, "WriteAt(%d bytes, %d)", len(b), off)
	if n != len(b) {
		t.Fatalf("WriteAt(%d bytes, %d) wrote %d without an error", len(b), off, n)
	}
}

func zero(t testing.TB, d block.Device, off, n int64) {
	t.Helper()
	must(t, d.Zero(off, n), "Zero(%d, %d)", off, n)
}

func read(t testing.TB, d block.Device, off int64, n int) []byte {
	t.Helper()
	b := fill(n, 0xee)
	got, err := d.ReadAt(b, off)
	must(t, err, "ReadAt(%d bytes, %d)", n, off)
	if got != n {
		t.Fatalf("ReadAt(%d bytes, %d) = %d without an error", n, off, got)
	}
	return b
}

// wantContent compares all of d with want.
func wantContent(t testing.TB, d block.Device, want []byte, when string) {
	t.Helper()
	wantBytes(t, d, 0, want, when)
}

func wantBytes(t testing.TB, d block.Device, off int64, want []byte, when string) {
	t.Helper()
	got := read(t, d, off, len(want))
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s: byte %d is %#x, want %#x", when, off+int64(i), got[i], want[i])
		}
	}
}

// wantExtents checks that the extents of [off, off+n), asked for until it is covered, keep the contract and do not contradict want, the content of
// the whole device.
func wantExtents(t testing.TB, d block.Device, off, n int64, want []byte) {
	t.Helper()
	for end := off + n; off < end; {
		extents, err := d.Extents(off, end-off)
		must(t, err, "Extents(%d, %d)", off, end-off)
		if len(extents) == 0 {
			t.Fatalf("Extents(%d, %d) is empty", off, end-off)
		}
		for _, e := range extents {
			if e.Off != off || e.N <= 0 || e.N > end-off {
				t.Fatalf("extent [%d,+%d) where one from %d on, and not beyond %d, should be", e.Off, e.N, off, end)
			}
			if e.State > block.Data {
				t.Fatalf("extent [%d,+%d) has state %d", e.Off, e.N, e.State)
			}
			if e.State != block.Data && !allZero(want[off:off+e.N]) {
				t.Fatalf("extent [%d,+%d) is %v, but there is data", e.Off, e.N, e.State)
			}
			off += e.N
		}
	}
}

func fill(n int, c byte) []byte { return bytes.Repeat([]byte{c}, n) }

func allZero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}

// noise fills b with bytes that are never 0.
func noise(r *rand.Rand, b []byte) {
	for len(b) > 0 {
		var word [8]byte
		binary.LittleEndian.PutUint64(word[:], r.Uint64()|0x0101010101010101)
		b = b[copy(b, word[:]):]
	}
}

// newRand returns a source whose seed is in the log.
func newRand(t testing.TB) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// within fails the test when done is not closed in time.
func within(t testing.TB, done <-chan struct{}, what string) {
	t.Helper()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		t.Fatalf("%s does not return", what)
	}
}
