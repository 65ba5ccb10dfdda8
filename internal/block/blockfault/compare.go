package blockfault

import (
	"bytes"
	"errors"
	"fmt"

	"ashlar/internal/block"
)

// ErrDiffer: two things that should be the same are not.
var ErrDiffer = errors.New("content differs")

// differ says where a and b, which begin at off, differ first.
func differ(what string, off int64, a, b []byte) error {
	if bytes.Equal(a, b) {
		return nil
	}
	i := 0
	for i < len(a) && i < len(b) && a[i] == b[i] {
		i++
	}
	return fmt.Errorf("%s: byte %d: %w", what, off+int64(i), ErrDiffer)
}

// Compare is a device whose writes change nothing: WriteAt answers ErrDiffer unless d holds those bytes already, and Zero unless it
// reads as zeros there. A block.Copy onto it compares two devices.
type Compare struct{ block.Device }

// NewCompare returns a Compare of d.
func NewCompare(d block.Device) *Compare { return &Compare{d} }

// WriteAt compares p with the device.
func (c *Compare) WriteAt(p []byte, off int64) (int, error) {
	got := make([]byte, len(p))
	if _, err := c.ReadAt(got, off); err != nil {
		return 0, err
	}
	if err := differ("compare", off, got, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Zero compares the device with zeros. It reads only what is Data.
func (c *Compare) Zero(off, n int64) error {
	if err := block.CheckRange(off, n, c.Size()); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	zeros := make([]byte, 1<<20)
	for end := off + n; off < end; {
		extents, err := c.Extents(off, end-off)
		if err != nil {
			return err
		}
		if len(extents) == 0 {
			return fmt.Errorf("compare: no extents at %d: %w", off, block.ErrCorrupt)
		}
		for _, e := range extents {
			for e.N > 0 && e.State == block.Data {
				part := min(e.N, int64(len(buf)))
				if _, err := c.ReadAt(buf[:part], e.Off); err != nil {
					return err
				}
				if err := differ("compare", e.Off, buf[:part], zeros[:part]); err != nil {
					return err
				}
				e.Off, e.N = e.Off+part, e.N-part
			}
			off = e.Off + e.N
		}
	}
	return nil
}

// Twin is two devices side by side: changes go to both, and reads must agree, or the answer is ErrDiffer. Errors must agree as well: where
// one device fails and the other does not, the answer is ErrDiffer with the error. Calls that overlap may reach the two in different orders: the
// caller keeps them apart.
type Twin struct{ a, b block.Device }

var _ block.Device = (*Twin)(nil)

// NewTwin returns a Twin of two devices with the same size and content. Reads are answered by a.
func NewTwin(a, b block.Device) *Twin { return &Twin{a, b} }

// agree returns the error of both, or ErrDiffer when only one failed.
func agree(what string, a, b error) error {
	switch {
	case (a == nil) == (b == nil):
		return a
	case a != nil:
		return fmt.Errorf("twin: %s: only the first failed: %w: %w", what, ErrDiffer, a)
	}
	return fmt.Errorf("twin: %s: only the second failed: %w: %w", what, ErrDiffer, b)
}

// ReadAt implements io.ReaderAt.
func (t *Twin) ReadAt(p []byte, off int64) (int, error) {
	n, errA := t.a.ReadAt(p, off)
	other := make([]byte, len(p))
	_, errB := t.b.ReadAt(other, off)
	if err := agree("read", errA, errB); err != nil {
		return n, err
	}
	if err := differ("twin: read", off, p, other); err != nil {
		return 0, err
	}
	return n, nil
}

// WriteAt implements io.WriterAt.
func (t *Twin) WriteAt(p []byte, off int64) (int, error) {
	n, errA := t.a.WriteAt(p, off)
	_, errB := t.b.WriteAt(p, off)
	return n, agree("write", errA, errB)
}

// Zero implements Device.
func (t *Twin) Zero(off, n int64) error {
	return agree("zero", t.a.Zero(off, n), t.b.Zero(off, n))
}

// Flush implements Device.
func (t *Twin) Flush() error { return agree("flush", t.a.Flush(), t.b.Flush()) }

// Extents implements Device with those of the first: states are the devices' own business.
func (t *Twin) Extents(off, n int64) ([]block.Extent, error) {
	e, errA := t.a.Extents(off, n)
	_, errB := t.b.Extents(off, n)
	return e, agree("extents", errA, errB)
}

// Size implements Device.
func (t *Twin) Size() int64 { return t.a.Size() }

// Close implements Device.
func (t *Twin) Close() error { return agree("close", t.a.Close(), t.b.Close()) }
