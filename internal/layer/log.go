package layer

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"sync"

	"ashlar/internal/block"
)

// startLog writes, in one sector, a start record of generation gen with number seq and the checkpoint record for the generation before into a half of
// the log, and makes it the place where the log goes on. It is not synced.
func (l *Layer) startLog(half int, gen uint32, seq uint64) error {
	b, seed := l.startRecord(gen, seq)
	b, _ = appendRecord(b, &record{gen: gen, seq: seq + 1, kind: kindCheckpoint, unit: uint64(gen) - 1}, seed)
	if _, err := l.f.WriteAt(b, l.halfOff(half)); err != nil {
		return err
	}
	l.log = &logPosition{current: half, gen: gen, seed: seed, nextSeq: seq + 2, tail: int64(len(b))}
	return nil
}

// startRecord encodes a start record with a fresh salt.
func (l *Layer) startRecord(gen uint32, seq uint64) ([]byte, uint32) {
	payload := make([]byte, startPayload)
	copy(payload, l.boot[:])
	rand.Read(payload[len(l.boot):]) //nolint:errcheck // never fails: crypto/rand ends the program instead
	return appendRecord(nil, &record{gen: gen, seq: seq, kind: kindStart, payload: payload}, 0)
}

func (l *Layer) halfOff(half int) int64 { return l.sb.Log.Off + int64(half)*l.sb.segBytes() }

// unitRange is a run of units of one record.
type unitRange struct{ unit, n int64 }

// interval is what was logged between the beginnings of two flushes: a third of U.
type interval struct {
	ranges  []unitRange
	units   int // units of writes
	records int // records of discards
}

// writeLog appends to a head's log, and keeps U: docs/formats/layer.md section 5.
//
//	              begin of flush k            end of flush k
//	current ─────────────────────▶ flushing ───────────────▶ flushed ──▶ (its mark is appended when flush k+1 begins, and
//	(records are appended)         (fdatasync runs)                       is on the medium when that ends) ──▶ covered: not in U
//
// Each of the three intervals has a code (1 to 3), which the sources of its units carry in the map.
type writeLog struct {
	l     *Layer
	limit int64 // bytes of a segment that writers may use

	mu        sync.Mutex // guards what follows, and the order of appends
	pos       logPosition
	otherFree bool
	otherLast uint64        // if not free: the last seq in the other half
	promised  int64         // bytes claimed and not yet appended
	touchedBy [2][]uint64   // per half: a bit for each map page that its records name
	intervals [4]interval   // by code; 0 is unused
	current   int           // code of the interval that records go to
	flushed   int           // code of the interval that the last completed flush made durable
	lastSeq   uint64        // the last seq of flushed
	waiting   chan struct{} // closed when the other half becomes free, or the log ends
	scratch   []byte
}

func newWriteLog(l *Layer, pos logPosition) *writeLog {
	words := (l.mapPages() + 63) / 64
	return &writeLog{
		l: l, limit: l.sb.segBytes() - logReserve, pos: pos, otherFree: true,
		touchedBy: [2][]uint64{make([]uint64, words), make([]uint64, words)},
		current:   1, flushed: 3, lastSeq: pos.nextSeq - 1, waiting: make(chan struct{}),
	}
}

// claim promises n bytes of the segment to a change that is about to be made, switching to the other half if need be and if that is free; switched says that a
// checkpoint is due. If not ok, there is no room until a checkpoint has been made. What is promised always fits after a switch too, because it fitted behind a longer tail.
func (g *writeLog) claim(n int64) (ok, switched bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.pos.tail+g.promised+n > g.limit && g.otherFree {
		if err := g.switchHalf(); err != nil {
			return false, false, err
		}
		switched = true
	}
	if g.pos.tail+g.promised+n > g.limit {
		return false, switched, nil
	}
	g.promised += n
	return true, switched, nil
}

// unclaim gives back what claim promised.
func (g *writeLog) unclaim(n int64) {
	g.mu.Lock()
	g.promised -= n
	g.mu.Unlock()
}

// switchHalf starts the other half, which is free; mu is held.
func (g *writeLog) switchHalf() error {
	half := 1 - g.pos.current
	b, seed := g.l.startRecord(g.pos.gen+1, g.pos.nextSeq)
	if _, err := g.l.f.WriteAt(b, g.l.halfOff(half)); err != nil {
		return err
	}
	g.otherFree, g.otherLast = false, g.pos.nextSeq-1
	g.pos = logPosition{current: half, gen: g.pos.gen + 1, seed: seed, nextSeq: g.pos.nextSeq + 1, tail: int64(len(b))}
	return nil
}

// entry is a record to be appended for a run of units.
type entry struct {
	kind    recordKind
	covered block.State
	unit    int64
	n       int64
	sums    []byte // kindWrite
	fresh   bool   // the units are not in the current interval yet
	proven  bool   // the units are Data that is in U: their last record must match their bytes
	grow    int64  // the Data units that the layer has more of afterwards
}

// bytes is what the record takes.
func (e *entry) bytes() int64 { return int64(paddedBytes(len(e.sums))) }

// append appends a record for each entry, with one write, in exchange for claimed bytes, and puts the units into U. It returns the code of
// their interval. An error means that the log has ended: its tail may be torn.
func (g *writeLog) append(entries []entry, claimed int64) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.promised -= claimed
	b := g.scratch[:0]
	cur := &g.intervals[g.current]
	for i := range entries {
		e := &entries[i]
		r := record{gen: g.pos.gen, seq: g.pos.nextSeq, kind: e.kind, covered: e.covered, count: uint32(e.n), unit: uint64(e.unit), payload: e.sums}
		b, _ = appendRecord(b, &r, g.pos.seed)
		g.pos.nextSeq++
		page := e.unit / pageUnits
		g.touchedBy[g.pos.current][page/64] |= 1 << (page % 64)
		if e.fresh {
			cur.ranges = append(cur.ranges, unitRange{e.unit, e.n})
		}
		switch {
		case e.kind == kindZero:
			cur.records++
		case e.fresh:
			cur.units += int(e.n)
		}
	}
	g.scratch = b
	return g.current, g.write(b)
}

// appendMeta appends a mark or a checkpoint record into the reserved end; mu is held.
func (g *writeLog) appendMeta(kind recordKind, value uint64) error {
	r := record{gen: g.pos.gen, seq: g.pos.nextSeq, kind: kind, unit: value}
	b, _ := appendRecord(nil, &r, g.pos.seed)
	g.pos.nextSeq++
	return g.write(b)
}

// write appends encoded records; mu is held.
func (g *writeLog) write(b []byte) error {
	if g.pos.tail+g.promised+int64(len(b)) > g.l.sb.segBytes() {
		panic(fmt.Sprintf("layer %s: log segment overflows: %d bytes at %d, %d promised", g.l.sb.ID, len(b), g.pos.tail, g.promised))
	}
	if _, err := g.l.f.WriteAt(b, g.l.halfOff(g.pos.current)+g.pos.tail); err != nil {
		return err
	}
	g.pos.tail += int64(len(b))
	return nil
}

// pressing tells whether writers will soon have to wait: for room in U, three quarters full, or for the half of the log that is not free, with the other nearly full.
func (g *writeLog) pressing(limit int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	n, records := 0, 0
	for i := range g.intervals {
		n += g.intervals[i].units
		records += g.intervals[i].records
	}
	return max(n, records) > limit/4*3 || !g.otherFree && g.pos.tail+g.promised > g.limit/4*3
}

// full says how full U is: 0 below an eighth of limit, 1 from there (it is covered in the background), 2 when writers must wait before they add units more.
func (g *writeLog) full(limit, units int) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n, records := units, 0
	for i := range g.intervals {
		n += g.intervals[i].units
		records += g.intervals[i].records
	}
	switch n = max(n, records); {
	case n > limit:
		return 2
	case n > limit/8:
		return 1
	}
	return 0
}

// code returns the current interval.
func (g *writeLog) code() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.current
}

// touched tells whether the log names units of a map page, so that only the map in memory is true for it.
func (g *writeLog) touched(page int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return (g.touchedBy[0][page/64]|g.touchedBy[1][page/64])>>(page%64)&1 != 0
}

// touchedPages lists the map pages that records of the given half, or with half < 0 of both, name.
func (g *writeLog) touchedPages(half int) []int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	var pages []int64
	for i := range g.touchedBy[0] {
		w := g.touchedBy[0][i] | g.touchedBy[1][i]
		if half >= 0 {
			w = g.touchedBy[half][i]
		}
		for b := 0; w>>b != 0; b++ {
			if w>>b&1 != 0 {
				pages = append(pages, int64(i*64+b))
			}
		}
	}
	return pages
}

// wakeup returns a channel that is closed when waiting for room makes sense no more.
func (g *writeLog) wakeup() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.waiting
}

// wake wakes those who wait for room.
func (g *writeLog) wake() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.waiting)
	g.waiting = make(chan struct{})
}

// encodeSums writes the CRCs of the units of p behind dst.
func encodeSums(dst, p []byte) []byte {
	for ; len(p) > 0; p = p[unitBytes:] {
		dst = binary.LittleEndian.AppendUint32(dst, unitSum(p[:unitBytes]))
	}
	return dst
}
