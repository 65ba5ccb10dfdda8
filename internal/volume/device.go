package volume

import (
	"errors"
	"fmt"
	"sync"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// device is the engine's data path: a Device of any offset and length over copies that take whole units only. It is one size for ever; expanding puts
// another in the Gate, over the same ranges.
//
// A write that does not end on units reads the edge units, changes them and writes them whole, under the lock of its range; so does a discard, with
// zeroes. Reads wait for writes that they overlap.
type device struct {
	v      *Volume
	copies []replica.Replica // every write goes to all, a read to the first; one for now
	size   int64
	ranges *ranges
	edges  *sync.Pool // of *[block.UnitBytes]byte
}

var _ block.Device = (*device)(nil)

// Size implements block.Device.
func (d *device) Size() int64 { return d.size }

// Close implements block.Device. The Volume owns the copies and closes them itself.
func (d *device) Close() error { return nil }

// cover is the units that [off, off+n) touches.
func cover(off int64, n int) span {
	return span{off / block.UnitBytes, (off + int64(n) + block.UnitBytes - 1) / block.UnitBytes}
}

// ReadAt implements block.Device.
func (d *device) ReadAt(p []byte, off int64) (int, error) {
	if err := d.admit(off, int64(len(p))); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	d.ranges.pass(cover(off, len(p)))
	n, err := d.copies[0].ReadAt(p, off)
	if err != nil {
		return n, d.v.note(err)
	}
	return n, nil
}

// admit refuses what cannot be done: out of range, or the engine has ended or failed.
func (d *device) admit(off, n int64) error {
	if err := block.CheckRange(off, n, d.size); err != nil {
		return err
	}
	return d.v.down()
}

// WriteAt implements block.Device.
func (d *device) WriteAt(p []byte, off int64) (int, error) {
	if err := d.admit(off, int64(len(p))); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	s := cover(off, len(p))
	d.ranges.lock(s)
	var n int
	var err error
	if (off|int64(len(p)))&(block.UnitBytes-1) == 0 {
		n, err = d.writeUnits(p, off)
	} else {
		n, err = d.writeBytes(p, off)
	}
	d.ranges.unlock(s)
	if err != nil {
		return n, d.v.note(err)
	}
	return n, nil
}

// writeUnits writes whole units to every copy.
func (d *device) writeUnits(p []byte, off int64) (int, error) {
	for _, r := range d.copies {
		if n, err := r.WriteAt(p, off); err != nil {
			return n, err
		}
	}
	return len(p), nil
}

// writeBytes writes any bytes: the whole units among them as they are, the edges merged with what is there. The range is locked.
func (d *device) writeBytes(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		at := off + int64(done)
		in := int(at % block.UnitBytes)
		n := len(p) - done
		var err error
		if in == 0 && n >= block.UnitBytes {
			n -= n % block.UnitBytes
			_, err = d.writeUnits(p[done:done+n], at)
		} else {
			n = min(n, block.UnitBytes-in)
			err = d.mergeEdge(p[done:done+n], at, n)
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// mergeEdge rewrites the one unit that [at, at+n) lies in, with p, or with zeroes if p is nil.
func (d *device) mergeEdge(p []byte, at int64, n int) error {
	edge := d.edges.Get().(*[block.UnitBytes]byte)
	defer d.edges.Put(edge)
	in := at % block.UnitBytes
	if _, err := d.copies[0].ReadAt(edge[:], at-in); err != nil {
		return err
	}
	if p == nil {
		clear(edge[in : in+int64(n)])
	} else {
		copy(edge[in:], p)
	}
	_, err := d.writeUnits(edge[:], at-in)
	return err
}

// Zero implements block.Device.
func (d *device) Zero(off, n int64) error {
	if err := d.admit(off, n); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	s := span{off / block.UnitBytes, (off + n + block.UnitBytes - 1) / block.UnitBytes}
	d.ranges.lock(s)
	err := d.zero(off, n)
	d.ranges.unlock(s)
	if err != nil {
		return d.v.note(err)
	}
	return nil
}

// zero frees the whole units of the range and writes zeroes at its edges. The range is locked.
func (d *device) zero(off, n int64) error {
	if in := off % block.UnitBytes; in != 0 {
		head := min(n, block.UnitBytes-in)
		if err := d.mergeEdge(nil, off, int(head)); err != nil {
			return err
		}
		off, n = off+head, n-head
	}
	if whole := n - n%block.UnitBytes; whole > 0 {
		for _, r := range d.copies {
			if err := r.Zero(off, whole); err != nil {
				return err
			}
		}
		off, n = off+whole, n-whole
	}
	if n > 0 {
		return d.mergeEdge(nil, off, int(n))
	}
	return nil
}

// Flush implements block.Device: it is acknowledged once every copy's medium has everything. A failure is never retried into success: the volume has failed
// until it is detached, and its last copy needs salvage (invariant 8).
func (d *device) Flush() error {
	if err := d.v.down(); err != nil {
		return err
	}
	for i, r := range d.copies {
		if err := r.Flush(); err != nil {
			if errors.Is(err, block.ErrFenced) || errors.Is(err, block.ErrClosed) || errors.Is(err, replica.ErrRestarted) {
				return d.v.note(err)
			}
			return d.v.fail(i, fmt.Errorf("flush: %w", err))
		}
	}
	return nil
}

// Extents implements block.Device.
func (d *device) Extents(off, n int64) ([]block.Extent, error) {
	if err := d.admit(off, n); err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, nil
	}
	d.ranges.pass(span{off / block.UnitBytes, (off + n + block.UnitBytes - 1) / block.UnitBytes})
	list, err := d.copies[0].Extents(off, n)
	if err != nil {
		return nil, d.v.note(err)
	}
	return list, nil
}
