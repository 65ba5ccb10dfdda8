package layer

import (
	"errors"
	"fmt"

	"ashlar/internal/block"
)

// Own is one layer's own units as a read-only Device, for copying the layer as it is: Extents says Absent where the layer has nothing, whatever lies below it, and there it reads as zero. Behind
// the units, from SizeBytes of the layer on, come its checksums if it has them: 4 bytes a unit, little-endian, the CRC-32C of each Data unit (the others mean nothing), up to the end of the
// Device; see SumsBytes. Reads of a layer that has checksums are compared (block.ErrCorrupt).
//
// Of a head it tells what is there at this moment, and the caller has it to himself. Once the head was sealed or dropped, it answers ErrState or block.ErrClosed.
type Own struct {
	l     *Layer
	stack *Stack
	head  bool // stack is that of the head in use; else of this layer alone
	sums  int64
}

var _ block.Device = (*Own)(nil)

// OpenOwn returns l's own units, and retains it. A sealed layer is read by itself; that of a head in use needs the stack it is the head of (ErrState).
func OpenOwn(l *Layer, head *Stack) (*Own, error) {
	o := &Own{l: l, stack: head, head: true}
	if l.sealed.Load() {
		stack, err := NewStack([]*Layer{l}, StackOptions{})
		if err != nil {
			return nil, err
		}
		o.stack, o.head = stack, false
		if l.summed.Load() {
			o.sums = roundUp(4*l.sb.units(), unitBytes)
		}
	} else if head == nil || head.Layers()[0] != l {
		return nil, fmt.Errorf("layer %s: read alone: neither sealed nor the head: %w", l.sb.ID, ErrState)
	}
	l.Retain()
	return o, nil
}

// SumsBytes is the length of the checksums behind the units: 0 if the layer has none, else 4 bytes a unit rounded up to 4096.
func (o *Own) SumsBytes() int64 { return o.sums }

// Size implements block.Device: the layer's size and SumsBytes.
func (o *Own) Size() int64 { return o.l.sb.SizeBytes + o.sums }

// Extents implements block.Device.
func (o *Own) Extents(off, n int64) ([]block.Extent, error) {
	if err := block.CheckRange(off, n, o.Size()); err != nil {
		return nil, fmt.Errorf("layer %s: extents of %d bytes at %d: %w", o.l.sb.ID, n, off, err)
	}
	size := o.l.sb.SizeBytes
	switch {
	case n == 0:
		return nil, nil
	case off >= size:
		return []block.Extent{{Off: off, N: n, State: block.Data}}, nil
	case o.head:
		return o.stack.extents(off, min(n, size-off), o.ofHead)
	}
	return o.stack.Extents(off, min(n, size-off))
}

// ofHead is what a unit of the stack is in the head alone.
func (o *Own) ofHead(v *view, s source) (block.State, error) {
	switch {
	case v.writer == nil || v.writer.l != o.l:
		return block.Absent, fmt.Errorf("layer %s is no head any more: %w", o.l.sb.ID, ErrState)
	case s.slot() != v.writer.slot:
		return block.Absent, nil
	}
	return s.state(), nil
}

// ReadAt implements block.Device.
func (o *Own) ReadAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange(off, int64(len(p)), o.Size()); err != nil {
		return 0, fmt.Errorf("layer %s: read %d bytes at %d: %w", o.l.sb.ID, len(p), off, err)
	}
	size := o.l.sb.SizeBytes
	done := 0
	for done < len(p) {
		at := off + int64(done)
		if at >= size {
			if _, err := o.l.f.ReadAt(p[done:], o.l.sb.Sums.Off+at-size); err != nil {
				return done, fmt.Errorf("layer %s: read checksums: %w", o.l.sb.ID, mapError(err))
			}
			return len(p), nil
		}
		n, err := o.readUnits(p[done:done+int(min(int64(len(p)-done), size-at))], at)
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// readUnits reads a range of units, of a head what it has itself.
func (o *Own) readUnits(p []byte, off int64) (int, error) {
	if !o.head {
		return o.stack.ReadAt(p, off)
	}
	list, err := o.Extents(off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	done := 0
	for _, e := range list {
		part := p[done : done+int(e.N)]
		if e.State != block.Data {
			clear(part)
		} else if n, err := o.stack.ReadAt(part, e.Off); err != nil {
			return done + n, err
		}
		done += int(e.N)
	}
	return done, nil
}

func (o *Own) readOnly() error { return fmt.Errorf("layer %s: %w", o.l.sb.ID, block.ErrReadOnly) }

// WriteAt implements block.Device.
func (o *Own) WriteAt([]byte, int64) (int, error) { return 0, o.readOnly() }

// Zero implements block.Device.
func (o *Own) Zero(int64, int64) error { return o.readOnly() }

// Flush implements block.Device; there is nothing to be flushed.
func (o *Own) Flush() error { return nil }

// Close implements block.Device. It is called once.
func (o *Own) Close() error {
	if o.head {
		return o.l.Close()
	}
	return errors.Join(o.stack.Close(), o.l.Close())
}
