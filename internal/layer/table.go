package layer

import (
	"encoding/binary"
	"math/bits"
	"sync"
	"sync/atomic"
)

// evenBits has the lower bit of each of a word's 32 codes.
const evenBits = 0x5555555555555555

// loadCodes reads the codes of 32 units.
func loadCodes(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }

// table is the map of a stack in memory: for each unit the newest layer that has it. It is loaded map page by map page (16 regions, 64 MiB of
// disk) when somebody looks there, and clean pages are dropped again when it grows too large.
//
// Readers look without a lock. A region is put, replaced or taken away only under its page's stripe (Stack.stripe), exclusively.
type table struct {
	leaves []atomic.Pointer[leaf]
	bytes  atomic.Int64 // of regions and leaves, about
	hand   atomic.Int64 // where the search for pages to drop goes on
	absent *region      // a region in which nothing is, shared by all such
}

// leaf holds 16 pages, 1 GiB of disk.
type leaf [16 * pageRegions]atomic.Pointer[region]

const (
	leafPages = 16
	leafBytes = 8 * 16 * pageRegions
)

func newTable(sizeBytes int64) *table {
	pages := (sizeBytes/unitBytes + pageUnits - 1) / pageUnits
	return &table{
		leaves: make([]atomic.Pointer[leaf], (pages+leafPages-1)/leafPages),
		absent: makeRegion([]run{{0, absentSource}}),
	}
}

// grown returns a table for a larger disk with the same regions.
func (t *table) grown(sizeBytes int64) *table {
	g := newTable(sizeBytes)
	for i := range t.leaves {
		g.leaves[i].Store(t.leaves[i].Load())
	}
	g.bytes.Store(t.bytes.Load())
	return g
}

// region returns the region of number i (unit / 1024), or nil if it is not loaded.
func (t *table) region(i int64) *region {
	if l := t.leaves[i/(leafPages*pageRegions)].Load(); l != nil {
		return l[i%(leafPages*pageRegions)].Load()
	}
	return nil
}

// put sets a region; the stripe is held.
func (t *table) put(i int64, r *region) {
	slot := &t.leaves[i/(leafPages*pageRegions)]
	l := slot.Load()
	for l == nil {
		if fresh := new(leaf); slot.CompareAndSwap(nil, fresh) {
			t.bytes.Add(leafBytes)
		}
		l = slot.Load()
	}
	p := &l[i%(leafPages*pageRegions)]
	delta := int64(0)
	if old := p.Load(); old != nil {
		delta -= int64(old.size()) * 2
	}
	if r != nil {
		delta += int64(r.size()) * 2
	}
	p.Store(r)
	t.bytes.Add(delta)
}

// loader is what reading a map page of a stack needs; they are pooled.
type loader struct {
	codes   [pageBytes]byte
	sources [pageUnits]source
	open    [pageUnits / 64]uint64 // units that no layer so far has
	left    int                    // how many those are
	runs    [regionUnits]run
}

type loaderPool struct{ sync.Pool }

// loaders is safe for concurrent use and never reassigned.
var loaders = &loaderPool{sync.Pool{New: func() any { return new(loader) }}}

// load puts the 16 regions of a map page into v's table unless they are there; the page's stripe is held exclusively. The layers' maps on disk
// are true for it: a page that the head's log has touched since its last checkpoint is never dropped.
func (v *view) load(page int64) error {
	if v.table.region(page*pageRegions) != nil {
		return nil
	}
	ld := loaders.Get().(*loader)
	defer loaders.Put(ld)
	found := false
	for _, slot := range v.chain {
		l := v.layers[slot]
		has, err := l.hasPage(page)
		if err != nil {
			return err
		}
		if !has {
			continue
		}
		if has, err = l.readPage(page, ld.codes[:]); err != nil {
			return err
		}
		if !has {
			continue
		}
		if !found {
			ld.reset()
			found = true
		}
		if ld.overlay(slot, l.sb.units()-page*pageUnits); ld.left == 0 {
			break
		}
	}
	for r := range pageRegions {
		reg := v.table.absent
		if found {
			reg = ld.region(r)
		}
		v.table.put(page*pageRegions+int64(r), reg)
	}
	return nil
}

// reset forgets the page that was loaded before.
func (ld *loader) reset() {
	clear(ld.sources[:])
	for i := range ld.open {
		ld.open[i] = ^uint64(0)
	}
	ld.left = pageUnits
}

// overlay gives to slot the units that its codes have and no layer above had, among the first units of the page.
func (ld *loader) overlay(slot int, units int64) {
	for w := 0; w < pageUnits/32 && int64(w)*32 < units; w++ {
		codes := loadCodes(ld.codes[w*8:])
		if codes == 0 {
			continue
		}
		open := &ld.open[w/2]
		shift := uint(w%2) * 32
		for has := (codes | codes>>1) & evenBits; has != 0; has &= has - 1 {
			lane := uint(bits.TrailingZeros64(has))
			bit := uint64(1) << (shift + lane/2)
			u := w*32 + int(lane/2)
			if *open&bit == 0 || int64(u) >= units {
				continue
			}
			*open &^= bit
			ld.left--
			ld.sources[u] = makeSource(slot, codes>>lane&3 == 1)
		}
	}
}

// region encodes the r-th region of the page.
func (ld *loader) region(r int) *region {
	sources := ld.sources[r*regionUnits : (r+1)*regionUnits]
	runs := ld.runs[:0]
	for i, s := range sources {
		if i == 0 || s != sources[i-1] {
			runs = append(runs, run{uint16(i), s})
		}
	}
	return makeRegion(runs)
}

// codes writes the states that the head (slot) has in a page of a loaded table into dst (4096 bytes). Units in U get their covered state if
// covered is set, else the one they have now. The page's stripe is held, at least shared.
func (t *table) codes(page int64, slot int, covered bool, dst []byte) {
	clear(dst[:pageBytes])
	for r := range int64(pageRegions) {
		reg := t.region(page*pageRegions + r)
		for i := 0; i < regionUnits; {
			s, end := reg.at(i, regionUnits)
			if s.slot() == slot {
				state := s.state()
				if covered && s.interval() != 0 {
					state = s.coveredState()
				}
				setCodes(dst, int(r)*regionUnits+i, end-i, state)
			}
			i = end
		}
	}
}

// shrinkSteps bounds how many pages one load looks at to make room; loads come again.
const shrinkSteps = 64

// shrink drops loaded pages that the head's log does not name, until the table is below limit or it has looked at a few. keep is the page that
// was just loaded, whose stripe the caller holds; other stripes are only tried, because stripes have no order.
func (s *Stack) shrink(v *view, keep, limit int64) {
	t := v.table
	pages := int64(len(t.leaves)) * leafPages
	for range shrinkSteps {
		if t.bytes.Load() <= limit {
			return
		}
		page := t.hand.Add(1) % pages
		if t.leaves[page/leafPages].Load() == nil {
			t.hand.Add(leafPages - 1 - page%leafPages)
			continue
		}
		if page == keep || t.region(page*pageRegions) == nil {
			continue
		}
		mu := s.stripe(page)
		if mu == s.stripe(keep) || !mu.TryLock() {
			continue
		}
		if w := v.writer; w == nil || !w.log.touched(page) {
			for r := range int64(pageRegions) {
				t.put(page*pageRegions+r, nil)
			}
		}
		mu.Unlock()
	}
}
