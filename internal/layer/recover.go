package layer

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// recovery is the opening of a layer whose log may hold something: docs/formats/layer.md section 5, "Opening".
type recovery struct {
	l       *Layer
	halves  [2]*segment
	replay  []*segment // oldest first
	mark    uint64
	trusted bool // the page cache is as it was: records need no proof
}

// resolved is what the log makes of one map page.
type resolved struct {
	codes  [pageBytes]byte
	inLog  [pageUnits / 8]byte // a bit for each unit that the log names
	unsure [pageUnits / 8]byte // those of them with records that are not covered
	empty  bool                // the map page was a hole
}

func setBits(b []byte, first, n int) {
	for i := first; i < first+n; i++ {
		b[i>>3] |= 1 << (i & 7)
	}
}

func bit(b []byte, i int) bool { return b[i>>3]>>(i&7)&1 != 0 }

// recover replays the log into the map, on disk or, for a layer that is only read, in memory.
func (l *Layer) recover() error {
	r := &recovery{l: l}
	if err := r.read(); err != nil {
		return err
	}
	byPage := map[int64][]record{}
	for _, s := range r.replay {
		for _, rec := range s.records {
			page := int64(rec.unit) / pageUnits
			byPage[page] = append(byPage[page], rec)
		}
	}
	if l.readOnly {
		l.overlay = map[int64][]byte{}
	} else if err := r.secureLog(); err != nil {
		return err
	}
	for _, page := range slices.Sorted(maps.Keys(byPage)) {
		p := new(resolved)
		if err := r.resolve(p, page, byPage[page]); err != nil {
			return fmt.Errorf("recover map page %d: %w", page, err)
		}
		if l.readOnly {
			l.overlay[page] = p.codes[:]
			continue
		}
		if err := r.write(p, page); err != nil {
			return fmt.Errorf("recover map page %d: %w", page, err)
		}
	}
	if l.readOnly {
		return nil
	}
	return r.finish()
}

// secureLog makes the log durable before anything rests on it, if it may not be: records that a killed process left in the page cache, and those that
// a failed fdatasync left there as if they were clean.
func (r *recovery) secureLog() error {
	salvaged := r.l.meta.Failed && r.sameBoot()
	if salvaged {
		b := make([]byte, r.l.sb.Log.N)
		if _, err := r.l.f.ReadAt(b, r.l.sb.Log.Off); err != nil {
			return err
		}
		if _, err := r.l.f.WriteAt(b, r.l.sb.Log.Off); err != nil {
			return err
		}
	}
	unproved := slices.ContainsFunc(r.replay, func(s *segment) bool {
		return len(s.records) > 0 && s.records[len(s.records)-1].seq > r.mark
	})
	if salvaged || r.trusted && unproved {
		return r.l.f.Sync()
	}
	return nil
}

// read reads both segments, and decides what is to be replayed and whether it can be trusted.
func (r *recovery) read() error {
	l := r.l
	for i := range r.halves {
		b := make([]byte, l.sb.segBytes())
		if _, err := l.f.ReadAt(b, l.halfOff(i)); err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		s, err := parseSegment(b, l.sb.units())
		if err != nil {
			return err
		}
		r.halves[i] = s
	}
	var err error
	if r.replay, err = chooseSegments(r.halves[0], r.halves[1]); err != nil {
		return err
	}
	r.trusted = !l.meta.Failed
	for _, s := range r.replay {
		r.mark = max(r.mark, s.mark)
		r.trusted = r.trusted && s.boot == l.boot
	}
	return nil
}

// resolve finds the state of every unit of a page that the log names. records are in order.
func (r *recovery) resolve(p *resolved, page int64, records []record) error {
	has, err := r.l.readPage(page, p.codes[:])
	if err != nil {
		return err
	}
	p.empty = !has
	for i := range records {
		rec := &records[i]
		first, n := int(rec.unit%pageUnits), int(rec.count)
		setBits(p.inLog[:], first, n)
		sure := r.trusted || rec.seq <= r.mark
		switch {
		case sure && rec.kind == kindWrite:
			setCodes(p.codes[:], first, n, block.Data)
		case sure:
			setCodes(p.codes[:], first, n, block.Zero)
		default:
			setBits(p.unsure[:], first, n)
			setCodes(p.codes[:], first, n, rec.covered)
		}
	}
	if r.trusted {
		return nil
	}
	return r.prove(p, page, records)
}

// prove decides units with uncovered records: from the last record backwards, a discard holds, and a write holds if its checksum matches what the
// unit has. The state that is left when none does is in p already.
func (r *recovery) prove(p *resolved, page int64, records []record) error {
	sums := map[int]uint32{}
	var done [pageUnits / 8]byte
	for i := len(records) - 1; i >= 0 && records[i].seq > r.mark; i-- {
		rec := &records[i]
		first := int(rec.unit % pageUnits)
		for k := range int(rec.count) {
			u := first + k
			if bit(done[:], u) {
				continue
			}
			if rec.kind == kindZero {
				setCode(p.codes[:], u, block.Zero)
				setBits(done[:], u, 1)
				continue
			}
			if _, ok := sums[u]; !ok {
				if err := r.sum(sums, page, rec, k); err != nil {
					return err
				}
			}
			if sums[u] == rec.unitSum(k) {
				setCode(p.codes[:], u, block.Data)
				setBits(done[:], u, 1)
			}
		}
	}
	return nil
}

// sum reads the units of rec from its k-th on, and notes their checksums.
func (r *recovery) sum(sums map[int]uint32, page int64, rec *record, k int) error {
	n := min(int(rec.count)-k, regionUnits)
	b := make([]byte, n*unitBytes)
	if _, err := r.l.f.ReadAt(b, r.l.sb.Data.Off+(int64(rec.unit)+int64(k))*unitBytes); err != nil {
		return err
	}
	for i := range n {
		sums[int(int64(rec.unit)-page*pageUnits)+k+i] = unitSum(b[i*unitBytes : (i+1)*unitBytes])
	}
	return nil
}

// write writes a page of the map and punches the units that the log names and that have no bytes.
func (r *recovery) write(p *resolved, page int64) error {
	l := r.l
	off := l.sb.Map.Off + page*pageBytes
	err := l.f.Reserve(off, pageBytes)
	switch {
	case errors.Is(err, disk.ErrNoSpace) && p.empty && !r.trusted:
		// The page was not reserved durably, so nothing in it was ever flushed: the units stay Absent.
		clear(p.codes[:])
	case err != nil:
		return err
	default:
		if _, err := l.f.WriteAt(p.codes[:], off); err != nil {
			return err
		}
	}
	for i := 0; i < pageUnits; {
		n := 1
		if bit(p.inLog[:], i) && codeAt(p.codes[:], i) != block.Data {
			for i+n < pageUnits && bit(p.inLog[:], i+n) && codeAt(p.codes[:], i+n) != block.Data {
				n++
			}
			if err := l.f.Punch(l.sb.Data.Off+(page*pageUnits+int64(i))*unitBytes, int64(n)*unitBytes); err != nil {
				return err
			}
		}
		i += n
	}
	return nil
}

// finish makes what was found durable, and then starts the log afresh in one sector: step 4.
func (r *recovery) finish() error {
	l := r.l
	if l.meta.Failed && r.sameBoot() {
		if err := l.rewrite(); err != nil {
			return fmt.Errorf("salvage: %w", err)
		}
	}
	_, seq, err := l.slots.Load()
	if err != nil {
		return err
	}
	if err := l.f.Sync(); err != nil {
		return err
	}
	l.slots.Synced(seq)
	last := slices.MaxFunc(r.replay, func(a, b *segment) int { return cmp.Compare(a.last, b.last) })
	gen, half := last.gen, 0
	for i, s := range r.halves {
		if s != nil {
			gen = max(gen, s.gen)
		}
		// Over the older one if both were replayed, else over the one that was not.
		if s == nil || len(r.replay) == 2 && s == r.replay[0] || len(r.replay) == 1 && s != r.replay[0] {
			half = i
		}
	}
	if err := l.startLog(half, gen+1, last.last+1); err != nil {
		return err
	}
	if err := l.f.Sync(); err != nil {
		return err
	}
	// What is left in the other half must not look current if the sector just written rots one day.
	if _, err := l.f.WriteAt(make([]byte, 512), l.halfOff(1-half)); err != nil {
		return err
	}
	if !l.meta.Failed {
		return nil
	}
	m := l.meta.clone()
	m.Failed = false
	return l.storeMeta(m)
}

// sameBoot tells whether the page cache may still hold what a failed fdatasync took for clean.
func (r *recovery) sameBoot() bool {
	return slices.ContainsFunc(r.replay, func(s *segment) bool { return s.boot == r.l.boot })
}

// rewrite writes every Data unit again with what it reads as, so that the next fdatasync takes it to the medium for certain.
func (l *Layer) rewrite() error {
	buf := make([]byte, sumChunk)
	for region := range (l.sb.units() + regionUnits - 1) / regionUnits {
		err := l.eachData(region, buf, func(unit int64, p []byte) error {
			_, err := l.f.WriteAt(p, l.sb.Data.Off+unit*unitBytes)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}
