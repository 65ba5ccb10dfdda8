package image

import (
	"sync"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// memDevice is a disk in memory whose every byte is Data.
type memDevice struct {
	mu sync.Mutex // guards b
	b  []byte
	// fail, if not nil, is asked before each write.
	fail func(off int64) error
}

func newMemDevice(b []byte) *memDevice { return &memDevice{b: b} }

func (m *memDevice) Size() int64 { return int64(len(m.b)) }

func (m *memDevice) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := block.CheckRange(off, int64(len(p)), m.Size()); err != nil {
		return 0, err
	}
	return copy(p, m.b[off:]), nil
}

func (m *memDevice) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := block.CheckRange(off, int64(len(p)), m.Size()); err != nil {
		return 0, err
	}
	if off%block.UnitBytes != 0 || len(p)%block.UnitBytes != 0 {
		return 0, block.ErrAlign
	}
	if m.fail != nil {
		if err := m.fail(off); err != nil {
			return 0, err
		}
	}
	return copy(m.b[off:], p), nil
}

func (m *memDevice) Zero(off, n int64) error { clear(m.b[off : off+n]); return nil }
func (m *memDevice) Flush() error            { return nil }
func (m *memDevice) Close() error            { return nil }
func (m *memDevice) Extents(off, n int64) ([]block.Extent, error) {
	return []block.Extent{{Off: off, N: n, State: block.Data}}, nil
}

// memFile gives a file that holds b.
func memFile(t testing.TB, b []byte) disk.File {
	t.Helper()
	f, err := disk.NewMem(disk.MemOptions{}).Create("image", int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return f
}

// checkExtents wants extents that tile the device, in whole units, and hold every byte that is not zero as Data.
func checkExtents(t *testing.T, dev block.Device, content []byte) {
	t.Helper()
	for off := int64(0); off < dev.Size(); {
		list, err := dev.Extents(off, dev.Size()-off)
		if err != nil || len(list) == 0 {
			t.Fatalf("extents at %d: %v, %v", off, list, err)
		}
		for _, e := range list {
			if e.Off != off || e.N <= 0 || e.Off%block.UnitBytes != 0 || e.N%block.UnitBytes != 0 {
				t.Fatalf("extent %+v at %d", e, off)
			}
			if e.State != block.Data && !allZero(content[e.Off:e.Off+e.N]) {
				t.Fatalf("extent %+v is not zero", e)
			}
			off += e.N
		}
	}
}
