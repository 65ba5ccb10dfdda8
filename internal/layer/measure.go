package layer

import (
	"context"
	"fmt"
	"math/bits"

	"ashlar/internal/block"
)

// What layers hold of each other's, found out from their maps: no data is read. Everything here is momentary while somebody writes.

// Placed is a layer in a tree of layers.
type Placed struct {
	Layer *Layer
	Stack *Stack // if Layer is the head of a stack in use: that stack
	// Parent is the index, among the layers given with this one, of the one below, which comes earlier; -1: it stands on the base, or on nothing.
	Parent int
	Fate   Fate // what a purge would do with it
	// Next is the index of the one layer that would stand on it once those that are Freed are gone; None or Several.
	Next int
}

// What Next says where it names no layer.
const (
	None    = -1
	Several = -2
)

// Fate is what a purge does with a layer.
type Fate uint8

// The fates of a layer.
const (
	Kept   Fate = iota
	Freed       // all of it goes
	Merged      // what layers above it hide goes: Next, which there is one, and if that is Merged too, its Next, and so on
)

// Use is what a layer takes and reads, in bytes of guest data.
type Use struct {
	DataBytes     int64 // what it holds
	HiddenBytes   int64 // of that, what would go if it were Merged; all if Next is None, 0 if it is Several
	InheritsBytes int64 // what reads through it find below it
	FreedBytes    int64 // of DataBytes, what its Fate frees
}

// Measure finds out what each of the layers of a tree holds of its own, over base (may be nil), and how many bytes of the base's data any of them still reads.
// It reads maps and no data; I/O goes on, and what it changes meanwhile is counted or not. The caller holds references to all the layers.
func Measure(ctx context.Context, base *Layer, tree []Placed) (uses []Use, baseBytes int64, err error) {
	m := newMeasure(base, tree)
	pages := int64(0)
	for _, p := range tree {
		pages = max(pages, p.Layer.mapPages())
	}
	for page := range pages {
		if err := ctx.Err(); err != nil {
			return nil, 0, err
		}
		if err := m.page(page); err != nil {
			return nil, 0, fmt.Errorf("layer: measure: %w", err)
		}
	}
	return m.uses, m.baseBytes, nil
}

// pageWords is a map page as words of 32 units each.
type pageWords [pageBytes / 8]uint64

// presentBits has the lower bit of each of a word's codes that is not Absent, dataBits of each that is Data.
func presentBits(w uint64) uint64 { return (w | w>>1) & evenBits }
func dataBits(w uint64) uint64    { return w >> 1 & evenBits }

// over lays the codes of w over those of below.
func over(w, below uint64) uint64 {
	absent := ^(w | w>>1) & evenBits
	return w | below&(absent|absent<<1)
}

// measure is a Measure under way. Of each page it keeps, per layer and only if the layer has the page, its codes; what reads through it find; and which of its
// units would be hidden after a purge.
type measure struct {
	tree      []Placed
	roots     []int
	above     [][]int // of a pruned layer: its children
	codes     []*pageWords
	seen      []*pageWords // a layer without the page shares its parent's
	seenData  []int64
	hides     []*pageWords // present bits of all that Merged lets hide it
	uses      []Use
	base      *Layer
	baseBytes int64
	free      []*pageWords
	buf       [pageBytes]byte
}

func newMeasure(base *Layer, tree []Placed) *measure {
	n := len(tree)
	m := &measure{tree: tree, base: base, codes: make([]*pageWords, n), seen: make([]*pageWords, n),
		seenData: make([]int64, n), hides: make([]*pageWords, n), uses: make([]Use, n), above: make([][]int, n)}
	for i, p := range tree {
		if p.Parent >= 0 {
			if tree[p.Parent].Layer.Meta().Pruned {
				m.above[p.Parent] = append(m.above[p.Parent], i)
			}
		} else {
			m.roots = append(m.roots, i)
		}
	}
	return m
}

// words returns a page to be filled.
func (m *measure) words() *pageWords {
	if k := len(m.free); k > 0 {
		w := m.free[k-1]
		m.free = m.free[:k-1]
		return w
	}
	return new(pageWords)
}

// load reads a layer's page, or returns nil if it has nothing there.
func (m *measure) load(l *Layer, s *Stack, page int64) (*pageWords, error) {
	if page >= l.mapPages() {
		return nil, nil
	}
	if err := l.livePage(page, s, m.buf[:]); err != nil {
		return nil, err
	}
	w, any := m.words(), uint64(0)
	for i := range w {
		w[i] = loadCodes(m.buf[i*8:])
		any |= w[i]
	}
	if any == 0 {
		m.free = append(m.free, w)
		return nil, nil
	}
	return w, nil
}

// livePage reads the codes of a page as they are now; s is the stack that l is the head of, if it is one.
func (l *Layer) livePage(page int64, s *Stack, codes []byte) error {
	if s != nil {
		if w := s.view.Load().writer; w != nil && w.l == l {
			l.countMu.Lock() // it is not being sealed
			defer l.countMu.Unlock()
			if !l.sealed.Load() {
				mu := s.stripe(page)
				mu.RLock()
				defer mu.RUnlock()
				return w.pageCodes(page, codes)
			}
		}
	}
	return l.pageCodes(page, codes)
}

// page adds one page of all layers.
func (m *measure) page(page int64) error {
	var own []*pageWords // what was made for this page
	var below *pageWords
	var err error
	if m.base != nil {
		if below, err = m.load(m.base, nil, page); err != nil {
			return err
		}
	}
	for i, p := range m.tree {
		if m.codes[i], err = m.load(p.Layer, p.Stack, page); err != nil {
			return err
		}
	}
	for i := range m.tree {
		own = m.see(i, below, own)
	}
	for i := len(m.tree) - 1; i >= 0; i-- {
		own = m.fate(i, own)
	}
	m.addBase(below)
	for i, w := range m.codes {
		if w != nil {
			m.free = append(m.free, w)
		}
		m.codes[i], m.seen[i], m.hides[i] = nil, nil, nil
	}
	m.free = append(m.free, own...)
	if below != nil {
		m.free = append(m.free, below)
	}
	return nil
}

// see finds what reads through layer i find; its parent was seen before.
func (m *measure) see(i int, base *pageWords, own []*pageWords) []*pageWords {
	below, inherited := base, int64(0)
	if p := m.tree[i].Parent; p >= 0 {
		below, inherited = m.seen[p], m.seenData[p]
	} else if base != nil {
		for _, w := range base {
			inherited += int64(bits.OnesCount64(dataBits(w)))
		}
	}
	u, c := &m.uses[i], m.codes[i]
	if c == nil {
		m.seen[i], m.seenData[i] = below, inherited
		u.InheritsBytes += inherited * unitBytes
		return own
	}
	seen := m.words()
	own = append(own, seen)
	data, all := 0, 0
	for k, w := range c {
		seen[k] = w
		if below != nil {
			seen[k] = over(w, below[k])
		}
		data += bits.OnesCount64(dataBits(w))
		all += bits.OnesCount64(dataBits(seen[k]))
	}
	m.seen[i], m.seenData[i] = seen, int64(all)
	u.DataBytes += int64(data) * unitBytes
	u.InheritsBytes += int64(all-data) * unitBytes
	return own
}

// hiddenBytes counts the Data of c in units that above has.
func hiddenBytes(c, above *pageWords) int64 {
	if c == nil || above == nil {
		return 0
	}
	n := 0
	for k, w := range c {
		n += bits.OnesCount64(dataBits(w) & presentBits(above[k]))
	}
	return int64(n) * unitBytes
}

// fate finds what would be hidden of layer i, and what its fate frees; the layers above it were looked at before.
func (m *measure) fate(i int, own []*pageWords) []*pageWords {
	p, u := m.tree[i], &m.uses[i]
	hidden := int64(0)
	switch {
	case p.Next == None:
		hidden = hiddenBytes(m.codes[i], m.codes[i])
	case p.Next >= 0:
		m.hides[i], own = m.hiding(p.Next, own)
		hidden = hiddenBytes(m.codes[i], m.hides[i])
	}
	u.HiddenBytes += hidden
	if p.Fate != Kept {
		u.FreedBytes += hidden
	}
	return own
}

// hiding returns what hides a layer that would be merged with i, or pruned below it: the units of i, and what hides those if i is merged itself.
func (m *measure) hiding(i int, own []*pageWords) (*pageWords, []*pageWords) {
	more := m.hides[i]
	if m.tree[i].Fate != Merged || more == nil {
		return m.codes[i], own
	}
	if m.codes[i] == nil {
		return more, own
	}
	both := m.words()
	for k, w := range m.codes[i] {
		both[k] = w | more[k]
	}
	return both, append(own, both)
}

// addBase counts the base's Data that anything still reads: what is not hidden from one of the lowest layers. One that was pruned is not read by itself, only through those above it.
func (m *measure) addBase(base *pageWords) {
	if base == nil {
		return
	}
	for k, w := range base {
		m.baseBytes += int64(bits.OnesCount64(dataBits(w)&m.reading(-1, k))) * unitBytes
	}
}

// reading returns which units, of those in word k, are Absent from layer i up to one that reads below it, by the lower bit of each code; for i < 0 over all the lowest layers.
func (m *measure) reading(i, k int) uint64 {
	absent, above := uint64(evenBits), m.roots
	if i >= 0 {
		if m.codes[i] != nil {
			absent &^= presentBits(m.codes[i][k])
		}
		if above = m.above[i]; absent == 0 || above == nil {
			return absent
		}
	}
	through := uint64(0)
	for _, up := range above {
		through |= m.reading(up, k)
	}
	return absent & through
}

// Change is a range of whole units that layers have.
type Change struct {
	Off, N int64
	Zero   bool // reads as zero through the uppermost
}

// Changed returns, from off (a multiple of 4096) on, the ranges that any of the given layers have (Data or Zero), ascending and merged: where the content of their stack
// may differ from that of what lies below the last. The layers are of one chain, uppermost first; of them only Layer and Stack count. It reads maps and no data, and
// stops at limit ranges; next is where to go on, the uppermost layer's size if that was all.
func Changed(ctx context.Context, chain []Placed, off int64, limit int) (list []Change, next int64, err error) {
	top := chain[0].Layer
	if err := block.CheckRange(off, 0, top.sb.SizeBytes); err != nil || off%unitBytes != 0 || limit < 1 {
		return nil, off, fmt.Errorf("layer: changed from %d on, %d ranges: %w", off, limit, block.ErrRange)
	}
	m := &measure{}
	for unit := off / unitBytes; unit < top.sb.units(); {
		if err := ctx.Err(); err != nil {
			return list, unit * unitBytes, err
		}
		page := unit / pageUnits
		seen, err := m.union(chain, page)
		if err != nil {
			return list, unit * unitBytes, fmt.Errorf("layer: changed: %w", err)
		}
		end := min((page+1)*pageUnits, top.sb.units())
		for seen != nil && unit < end {
			in := int(unit % pageUnits)
			s := seen.at(in)
			n := int64(1)
			for unit+n < end && seen.at(in+int(n)) == s {
				n++
			}
			if k := len(list) - 1; s == block.Absent {
			} else if k >= 0 && list[k].Off+list[k].N == unit*unitBytes && list[k].Zero == (s == block.Zero) {
				list[k].N += n * unitBytes
			} else if len(list) == limit {
				return list, unit * unitBytes, nil
			} else {
				list = append(list, Change{unit * unitBytes, n * unitBytes, s == block.Zero})
			}
			unit += n
		}
		unit = end
		if seen != nil {
			m.free = append(m.free, seen)
		}
	}
	return list, top.sb.SizeBytes, nil
}

// union lays a page of the layers over each other; nil if none has it.
func (m *measure) union(chain []Placed, page int64) (*pageWords, error) {
	var seen *pageWords
	for _, p := range chain {
		c, err := m.load(p.Layer, p.Stack, page)
		if err != nil {
			return nil, err
		}
		if c == nil {
			continue
		}
		if seen == nil {
			seen = c
			continue
		}
		for k := range seen {
			seen[k] = over(seen[k], c[k])
		}
		m.free = append(m.free, c)
	}
	return seen, nil
}

// at is the state of unit i of the page.
func (w *pageWords) at(i int) block.State { return block.State(w[i/32] >> (i % 32 * 2) & 3) }
