package layer

import (
	"errors"
	"fmt"
	"sync"

	"ashlar/internal/block"
)

// ReadAt implements block.Device, at any offset and length. Bytes of a layer that has checksums are compared; block.ErrCorrupt names layer and unit, and
// then p holds nothing of use.
func (s *Stack) ReadAt(p []byte, off int64) (int, error) {
	if s.closed.Load() {
		return 0, fmt.Errorf("layer: read: %w", block.ErrClosed)
	}
	if err := block.CheckRange(off, int64(len(p)), s.view.Load().sizeBytes); err != nil {
		return 0, fmt.Errorf("layer: read %d bytes at %d: %w", len(p), off, err)
	}
	done := 0
	for done < len(p) {
		n, err := s.readRun(p[done:], off+int64(done))
		if err != nil {
			if s.closed.Load() && errors.Is(err, block.ErrClosed) {
				err = block.ErrClosed
			}
			return done, fmt.Errorf("layer: read %d bytes at %d: %w", len(p), off, err)
		}
		done += n
	}
	return done, nil
}

// readRun reads from off on what lies in one run of units of one source, in one region.
func (s *Stack) readRun(p []byte, off int64) (int, error) {
	unit := off / unitBytes
	in := int(unit % regionUnits)
	skip := off % unitBytes
	limit := int(min(regionUnits, int64(in)+(skip+int64(len(p))+unitBytes-1)/unitBytes))
	for {
		v, r, err := s.find(unit / regionUnits)
		if err != nil {
			return 0, err
		}
		src, end := r.at(in, limit)
		n := int(min(int64(len(p)), int64(end-in)*unitBytes-skip))
		if src.slot() == 0 || src.zero() {
			clear(p[:n])
			return n, nil
		}
		if src.slot() >= len(v.layers) {
			continue // a head newer than our view: look again
		}
		l := v.layers[src.slot()]
		if l.summed.Load() {
			err = s.readSummed(l, src.slot(), p[:n], off)
		} else if _, err = l.f.ReadAt(p[:n], l.sb.Data.Off+off); err != nil {
			err = fmt.Errorf("layer %s: %w", l.sb.ID, mapError(err))
		}
		// While we read from a layer that is sealed, a younger one may have hidden the units, and they may have been pruned; or the
		// layer was merged into another and closed. Then what we read is nothing.
		if s.same(v, unit, in, end, src) {
			return n, err
		}
		if s.closed.Load() {
			return 0, block.ErrClosed
		}
	}
}

// same tells whether the units [in, end) of a region still come from src, seen in v.
func (s *Stack) same(v *view, unit int64, in, end int, src source) bool {
	now := s.view.Load()
	if w := now.writer; w != nil && src.slot() == w.slot {
		return true // a head's units change only by writes that we race with anyway
	}
	if now != v && (src.slot() >= len(now.layers) || now.layers[src.slot()] != v.layers[src.slot()] || now.table != v.table) {
		return false
	}
	r := now.table.region(unit / regionUnits)
	if r == nil {
		return false
	}
	is, stop := r.at(in, end)
	return is.plain() == src.plain() && stop == end
}

// bounces holds buffers for reads of parts of units that are compared whole.
type bouncePool struct{ sync.Pool }

const bounceBytes = 64 << 10

// bounces is safe for concurrent use and never reassigned.
var bounces = &bouncePool{sync.Pool{New: func() any { b := make([]byte, bounceBytes); return &b }}}

// readSummed reads from a layer with checksums, of one region, and compares. slot is the layer's.
func (s *Stack) readSummed(l *Layer, slot int, p []byte, off int64) error {
	if (off|int64(len(p)))%unitBytes == 0 {
		return s.readUnits(l, slot, p, off/unitBytes)
	}
	bounce := bounces.Get().(*[]byte)
	defer bounces.Put(bounce)
	for len(p) > 0 {
		skip := int(off % unitBytes)
		n := min(len(p), bounceBytes-skip)
		whole := int(roundUp(int64(skip+n), unitBytes))
		if err := s.readUnits(l, slot, (*bounce)[:whole], off/unitBytes); err != nil {
			return err
		}
		copy(p[:n], (*bounce)[skip:])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// readUnits reads whole units and compares each.
func (s *Stack) readUnits(l *Layer, slot int, p []byte, unit int64) error {
	if _, err := l.f.ReadAt(p, l.sb.Data.Off+unit*unitBytes); err != nil {
		return fmt.Errorf("layer %s: %w", l.sb.ID, mapError(err))
	}
	return s.sums.verify(l, slot, p, unit)
}
