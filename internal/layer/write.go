package layer

import (
	"errors"
	"fmt"
	"hash/crc32"
	"sync"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// unitSum is the CRC of a unit's bytes.
func unitSum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// WriteAt implements block.Device: whole units only (block.ErrAlign). After an error each unit of the range is old or new. block.ErrNoSpace: the disk is
// full; block.ErrFailed: a flush failed before.
func (s *Stack) WriteAt(p []byte, off int64) (int, error) {
	w, err := s.writable(off, int64(len(p)))
	if err != nil {
		return 0, fmt.Errorf("layer: write %d bytes at %d: %w", len(p), off, err)
	}
	done := 0
	for done < len(p) {
		unit := (off + int64(done)) / unitBytes
		n := min((len(p)-done)/unitBytes, w.l.limits.chunkUnits, int(pageUnits-unit%pageUnits))
		part := p[done : done+n*unitBytes]
		ok, err := w.overwrite(part, unit)
		if err == nil && !ok {
			n, err = w.logged(kindWrite, unit, int64(n), part)
		}
		if err != nil {
			return done, fmt.Errorf("layer: write %d bytes at %d: %w", len(p), off, mapError(err))
		}
		done += n * unitBytes
	}
	return done, nil
}

// Zero implements block.Device: whole units only (block.ErrAlign). The space is freed. A discard that was acknowledged and flushed never comes back.
func (s *Stack) Zero(off, n int64) error {
	w, err := s.writable(off, n)
	for done := int64(0); err == nil && done < n; {
		unit := (off + done) / unitBytes
		units := min((n-done)/unitBytes, pageUnits-unit%pageUnits)
		var did int
		did, err = w.logged(kindZero, unit, units, nil)
		done += int64(did) * unitBytes
	}
	if err != nil {
		return fmt.Errorf("layer: zero %d bytes at %d: %w", n, off, mapError(err))
	}
	return nil
}

// writable checks a change of [off, off+n) and returns who makes it.
func (s *Stack) writable(off, n int64) (*writer, error) {
	v := s.view.Load()
	switch err := block.CheckRange(off, n, v.sizeBytes); {
	case s.closed.Load():
		return nil, block.ErrClosed
	case v.writer == nil:
		return nil, block.ErrReadOnly
	case err != nil:
		return nil, err
	case (off|n)%unitBytes != 0:
		return nil, block.ErrAlign
	}
	return v.writer, v.writer.usable()
}

// overwrite writes units in place if all of them are covered Data of the head, and otherwise does nothing.
func (w *writer) overwrite(p []byte, unit int64) (bool, error) {
	mu := w.s.stripe(unit / pageUnits)
	mu.RLock()
	defer mu.RUnlock()
	if w.stopped.Load() {
		return false, block.ErrReadOnly
	}
	want := makeSource(w.slot, false)
	for i, n := unit, int64(len(p)/unitBytes); n > 0; {
		r := w.table.region(i / regionUnits)
		if r == nil {
			return false, nil
		}
		in := int(i % regionUnits)
		src, end := r.at(in, int(min(regionUnits, int64(in)+n)))
		if src != want {
			return false, nil
		}
		i, n = i+int64(end-in), n-int64(end-in)
	}
	_, err := w.l.f.WriteAt(p, w.l.sb.Data.Off+unit*unitBytes)
	return true, err
}

// need is what a logged change has to wait for before it can be made.
type need uint8

const (
	needNothing need = iota
	needFlush        // units must be covered first, or U is full
	needRoom         // the log is full
)

// change is a change under way, with its buffers; they are pooled.
type change struct {
	kind    recordKind
	unit    int64
	n       int64  // units that this step does
	p       []byte // kindWrite: the bytes of all units
	entries []entry
	sums    []byte
	bytes   int64 // of the entries in the log
	fresh   int   // units that come into U
	punch   []unitRange
}

type changePool struct{ sync.Pool }

// changes is safe for concurrent use and never reassigned.
var changes = &changePool{sync.Pool{New: func() any { return new(change) }}}

// logged makes a change that may need records: a write (with p) or a discard. It may stop short and returns how many units it did. The units lie in
// one map page.
func (w *writer) logged(kind recordKind, unit, n int64, p []byte) (int, error) {
	c := changes.Get().(*change)
	defer func() {
		c.p = nil
		changes.Put(c)
	}()
	for {
		if err := w.usable(); err != nil {
			return 0, err
		}
		c.kind, c.unit, c.n, c.p = kind, unit, n, p
		wakeup := w.log.wakeup()
		w.still.RLock()
		need, err := w.try(c)
		w.still.RUnlock()
		if w.due.Load() || w.log.full(w.l.limits.uncovered, 0) > 0 {
			w.kick()
		}
		switch {
		case err != nil:
			return 0, err
		case need == needNothing:
			return int(c.n), nil
		case need == needFlush:
			if err := w.flush(); err != nil {
				return 0, err
			}
		case w.l.limits.inline:
			if err := w.checkpoint(); err != nil {
				return 0, err
			}
		default:
			<-wakeup
		}
	}
}

// try makes the change unless it has to wait for something, which it does not do, because it holds locks.
func (w *writer) try(c *change) (need, error) {
	page := c.unit / pageUnits
	mu := w.s.stripe(page)
	mu.Lock()
	defer mu.Unlock()
	if w.stopped.Load() {
		return needNothing, block.ErrReadOnly
	}
	if err := w.s.load(w.s.view.Load(), page); err != nil {
		return needNothing, err
	}
	w.gate.RLock()
	defer w.gate.RUnlock()
	if need := w.plan(c, w.log.code()); need != needNothing {
		return need, nil
	}
	if len(c.entries) > 0 {
		if err := w.reserve(page); err != nil {
			return needNothing, err
		}
		ok, switched, err := w.log.claim(c.bytes)
		if err != nil {
			return needNothing, w.broke("start log segment", err)
		}
		if switched {
			w.due.Store(true)
		}
		if !ok {
			return needRoom, nil
		}
	}
	if c.kind == kindWrite {
		return needNothing, w.writeUnits(c)
	}
	return needNothing, w.zeroUnits(c)
}

// plan decides which records the change needs, and how far it goes in one step. code is the current interval.
func (w *writer) plan(c *change, code int) need {
	c.entries, c.sums, c.punch = c.entries[:0], c.sums[:0], c.punch[:0]
	c.bytes, c.fresh = 0, 0
	maxBytes, maxUnits := w.log.limit/4, w.l.limits.uncovered/2
	end := c.unit + c.n
	for at := c.unit; at < end; {
		in := int(at % regionUnits)
		src, stop := w.table.region(at/regionUnits).at(in, int(min(regionUnits, int64(in)+end-at)))
		n := int64(stop - in)
		e, needed, need := w.classify(src, c.kind, code)
		if need != needNothing {
			return need
		}
		if needed {
			e.unit = at
			if c.kind == kindWrite {
				// What one step may log is bounded, so that it fits into a fresh segment and into half of U.
				n = min(n, int64(maxUnits-c.fresh), max(1, (maxBytes-c.bytes-recordBytes)/4))
				if c.fresh >= maxUnits {
					n = 0
				}
			}
			if e.n = n; n == 0 || c.bytes >= maxBytes {
				break
			}
			w.addEntry(c, e, src)
		}
		at += n
		c.n = at - c.unit
	}
	if c.kind == kindWrite && w.log.full(w.l.limits.uncovered, c.fresh) == 2 || c.kind == kindZero && len(c.entries) > 0 && w.log.full(w.l.limits.uncovered, 0) == 2 {
		return needFlush
	}
	return needNothing
}

// addEntry adds e, for units of source src, to the change.
func (w *writer) addEntry(c *change, e entry, src source) {
	if c.kind == kindWrite {
		from := len(c.sums)
		first := (e.unit - c.unit) * unitBytes
		c.sums = encodeSums(c.sums, c.p[first:first+e.n*unitBytes])
		e.sums = c.sums[from:] // stays valid when c.sums moves: the old memory keeps its content
		if e.fresh {
			c.fresh += int(e.n)
		}
		if !e.proven { // Absent or Zero in the head; Data in the head needs no record but in U
			e.grow = e.n
		}
	} else if src.slot() == w.slot {
		c.punch = append(c.punch, unitRange{e.unit, e.n})
		e.grow = -e.n
	}
	c.bytes += e.bytes()
	c.entries = append(c.entries, e)
}

// classify says what record a unit of source src needs when it is written or discarded, if any.
func (w *writer) classify(src source, kind recordKind, code int) (e entry, needed bool, _ need) {
	e = entry{kind: kind, fresh: true}
	switch {
	case src.slot() != w.slot:
		// Absent in the head. With nothing below, a discard changes nothing.
		e.covered = block.Absent
		needed = kind == kindWrite || src.slot() != 0 || w.s.opts.RecordZeroes
	case src.zero() && kind == kindZero:
	case src.interval() == 0:
		e.covered = src.state()
		needed = kind == kindZero || src.zero()
	case src.interval() != code:
		// A flush has begun since it was recorded, and may have promised its bytes: cover it first.
		return e, false, needFlush
	default:
		e.covered, e.fresh, e.proven, needed = src.coveredState(), false, !src.zero(), true
	}
	return e, needed, needNothing
}

// reserve allocates a map page before the first record that names it.
func (w *writer) reserve(page int64) error {
	word, bit := &w.reserved[page/64], uint64(1)<<(page%64)
	if word.Load()&bit != 0 {
		return nil
	}
	if err := w.l.f.Reserve(w.l.sb.Map.Off+page*pageBytes, pageBytes); err != nil {
		return err
	}
	word.Or(bit)
	return nil
}

// writeUnits writes the bytes and then the records; the stripe and the gate are held.
func (w *writer) writeUnits(c *change) error {
	p := c.p[:c.n*unitBytes]
	if _, err := w.l.f.WriteAt(p, w.l.sb.Data.Off+c.unit*unitBytes); err != nil {
		return w.unwrite(c, err)
	}
	if len(c.entries) == 0 {
		return nil
	}
	code, err := w.log.append(c.entries, c.bytes)
	if err != nil {
		return w.broke("append to log", err)
	}
	w.setSources(c.entries, makeSource(w.slot, false), code)
	return nil
}

// setSources gives the entries' units their new place in the map.
func (w *writer) setSources(entries []entry, src source, code int) {
	for i := range entries {
		e := &entries[i]
		now := src.uncovered(code, e.covered)
		if e.grow != 0 && w.l.isTallied(e.unit/pageUnits) {
			w.l.data.Add(e.grow)
		}
		for at, left := e.unit, e.n; left > 0; {
			in := at % regionUnits
			n := min(left, regionUnits-in)
			w.table.put(at/regionUnits, w.table.region(at/regionUnits).with(int(in), int(n), now))
			at, left = at+n, left-n
		}
	}
}

// unwrite tidies up after a write of units that failed with cause. Units that had no content keep none. Data in U may now hold anything, which its
// last record does not match: what it holds is recorded.
func (w *writer) unwrite(c *change, cause error) error {
	again := c.entries[:0]
	for _, e := range c.entries {
		off := w.l.sb.Data.Off + e.unit*unitBytes
		if !e.proven {
			// If the hole cannot be made either, the space is lost until the layer is settled, no more.
			w.l.f.Punch(off, e.n*unitBytes) //nolint:errcheck // see above
			continue
		}
		b := make([]byte, e.n*unitBytes)
		if _, err := w.l.f.ReadAt(b, off); err != nil {
			return w.broke("read back after a failed write", errors.Join(cause, err))
		}
		e.sums = encodeSums(nil, b)
		again = append(again, e)
	}
	if len(again) == 0 {
		w.log.unclaim(c.bytes)
		return cause
	}
	code, err := w.log.append(again, c.bytes)
	if err != nil {
		return w.broke("append to log", errors.Join(cause, err))
	}
	w.setSources(again, makeSource(w.slot, false), code)
	return cause
}

// zeroUnits appends the records and then makes the holes; the stripe and the gate are held.
func (w *writer) zeroUnits(c *change) error {
	if len(c.entries) == 0 {
		return nil
	}
	code, err := w.log.append(c.entries, c.bytes)
	if err != nil {
		return w.broke("append to log", err)
	}
	w.setSources(c.entries, makeSource(w.slot, true), code)
	for _, r := range c.punch {
		// The units read as zero by their state. A hole that cannot be made loses space until the layer is settled, no more.
		if err := w.l.f.Punch(w.l.sb.Data.Off+r.unit*unitBytes, r.n*unitBytes); err != nil && !errors.Is(err, disk.ErrNoSpace) && !errors.Is(err, disk.ErrNotSupported) {
			return err
		}
	}
	return nil
}
