package layer

import (
	"unsafe"

	"ashlar/internal/block"
)

// source says where a unit of a stack is found, and what the head's writer must remember of it:
//
//	bits 5–15  slot of the layer that has it (stack.go: view); 0 is nowhere: Absent, reads as zero
//	bits 3–4   in U only: the covered state (block.State)
//	bits 1–2   in U only: the flush interval of its last record, 1 to 3; 0 means not in U
//	bit  0     Zero, else Data
type source uint16

const (
	maxSlot      = 1<<11 - 1
	sourceZero   = 1
	absentSource = source(0)
)

func makeSource(slot int, zero bool) source {
	s := source(slot) << 5
	if zero {
		s |= sourceZero
	}
	return s
}

// uncovered returns s as a member of U.
func (s source) uncovered(interval int, covered block.State) source {
	return s&^(15<<1) | source(interval)<<1 | source(covered)<<3
}

func (s source) slot() int                 { return int(s >> 5) }
func (s source) zero() bool                { return s&sourceZero != 0 }
func (s source) interval() int             { return int(s >> 1 & 3) }
func (s source) coveredState() block.State { return block.State(s >> 3 & 3) }
func (s source) plain() source             { return s &^ (15 << 1) }

// state is what the unit is in the stack.
func (s source) state() block.State {
	switch {
	case s.slot() == 0:
		return block.Absent
	case s.zero():
		return block.Zero
	}
	return block.Data
}

// region is the sources of 1024 neighbouring units, 4 MiB of disk. It is never changed once readers may see it. What a *region points to is the
// first of several 16-bit words that were allocated together, so that a region costs one small allocation the collector need not look into (a volume
// of 1 TiB has 262,144 of them):
//
//	runs: header (runs | colours<<8), colours × source, runs × (first unit | colour<<10)
//	flat: header (flatBit | log2 of the width), colours, colours × source, 1024 × width bits
//
// A region with few runs is kept as runs, any other as flat, whichever is smaller.
type region struct{ header uint16 }

const (
	flatBit    = 1 << 15
	maxRuns    = 255
	maxColours = 63 // in a region of runs
)

// words returns n of the region's words. The pointer is to the first element of a slice that was made with at least as many.
func (r *region) words(n int) []uint16 { return unsafe.Slice(&r.header, n) }

func regionOf(words []uint16) *region { return (*region)(unsafe.Pointer(unsafe.SliceData(words))) }

func (r *region) flat() bool { return r.header&flatBit != 0 }

// size is the number of words.
func (r *region) size() int {
	if !r.flat() {
		return 1 + int(r.header>>8) + int(r.header&0xff)
	}
	colours := int(r.words(2)[1])
	return 2 + colours + regionUnits/16<<(r.header&7)
}

// run is a run of units of one source, up to the next run's first or the region's end.
type run struct {
	first uint16
	src   source
}

// at returns the source of unit i (0 to 1023), and the end of the run of units of that source, at most limit.
func (r *region) at(i, limit int) (source, int) {
	if !r.flat() {
		runs, colours := int(r.header&0xff), int(r.header>>8)
		w := r.words(1 + colours + runs)
		list := w[1+colours:]
		lo, hi := 0, runs // the last run whose first is at most i
		for hi-lo > 1 {
			if mid := (lo + hi) / 2; int(list[mid]&1023) <= i {
				lo = mid
			} else {
				hi = mid
			}
		}
		end := regionUnits
		if lo+1 < runs {
			end = int(list[lo+1] & 1023)
		}
		return source(w[1+list[lo]>>10]), min(end, limit)
	}
	colours, body, shift := r.flatParts()
	c := flatGet(body, shift, i)
	end := i + 1
	for end < limit && flatGet(body, shift, end) == c {
		end++
	}
	return source(colours[c]), end
}

// flatParts returns the colours, the body and the log2 of the width of a flat region.
func (r *region) flatParts() (colours, body []uint16, shift uint) {
	w := r.words(r.size())
	n := 2 + int(w[1])
	return w[2:n], w[n:], uint(w[0] & 7)
}

func flatGet(body []uint16, shift uint, i int) int {
	bit := uint(i) << shift
	return int(body[bit>>4]>>(bit&15)) & (1<<(1<<shift) - 1)
}

func flatSet(body []uint16, shift uint, i, c int) {
	bit := uint(i) << shift
	mask := uint16(1<<(1<<shift)-1) << (bit & 15)
	body[bit>>4] = body[bit>>4]&^mask | uint16(c)<<(bit&15)
}

// expand appends the region's runs to dst.
func (r *region) expand(dst []run) []run {
	for i := 0; i < regionUnits; {
		s, end := r.at(i, regionUnits)
		dst = append(dst, run{uint16(i), s})
		i = end
	}
	return dst
}

// colourOf finds s among colours, or adds it.
func colourOf(colours []uint16, s source) (int, []uint16) {
	for i := len(colours) - 1; i >= 0; i-- {
		if colours[i] == uint16(s) {
			return i, colours
		}
	}
	return len(colours), append(colours, uint16(s))
}

// makeRegion encodes runs: the first begins at 0, neighbours differ.
func makeRegion(runs []run) *region {
	var space [16]uint16
	colours := space[:0]
	for _, r := range runs {
		_, colours = colourOf(colours, r.src)
	}
	shift := uint(0)
	for 1<<(1<<shift) < len(colours) {
		shift++
	}
	flatWords := 1 + len(colours) + regionUnits/16<<shift
	if len(colours) > maxColours || len(runs) > maxRuns || len(runs) > flatWords {
		return makeFlat(runs, colours, shift)
	}
	w := make([]uint16, 1+len(colours)+len(runs))
	w[0] = uint16(len(runs) | len(colours)<<8)
	copy(w[1:], colours)
	for i, r := range runs {
		c, _ := colourOf(colours, r.src)
		w[1+len(colours)+i] = r.first | uint16(c)<<10
	}
	return regionOf(w)
}

func makeFlat(runs []run, colours []uint16, shift uint) *region {
	w := make([]uint16, 2+len(colours)+regionUnits/16<<shift)
	w[0], w[1] = uint16(flatBit|shift), uint16(len(colours))
	copy(w[2:], colours)
	body := w[2+len(colours):]
	for i, r := range runs {
		end := regionUnits
		if i+1 < len(runs) {
			end = int(runs[i+1].first)
		}
		c, _ := colourOf(colours, r.src)
		for u := int(r.first); u < end; u++ {
			flatSet(body, shift, u, c)
		}
	}
	return regionOf(w)
}

// with returns the region with the n units from first on set to s.
func (r *region) with(first, n int, s source) *region {
	if r.flat() {
		if w := r.recoloured(first, n, s); w != nil {
			return w
		}
	}
	var oldSpace, newSpace [regionUnits]run
	old, runs := r.expand(oldSpace[:0]), newSpace[:0]
	add := func(first int, s source) {
		if len(runs) == 0 || runs[len(runs)-1].src != s {
			runs = append(runs, run{uint16(first), s})
		}
	}
	done := false
	for i, o := range old {
		start, end := int(o.first), regionUnits
		if i+1 < len(old) {
			end = int(old[i+1].first)
		}
		if start < first {
			add(start, o.src)
		}
		if !done && end > first {
			add(first, s)
			done = true
		}
		if end > first+n {
			add(max(start, first+n), o.src)
		}
	}
	return makeRegion(runs)
}

// recoloured is with for a flat region that has s among its colours: a copy and a few bits.
func (r *region) recoloured(first, n int, s source) *region {
	colours, _, _ := r.flatParts()
	c, more := colourOf(colours[:len(colours):len(colours)], s)
	if len(more) > len(colours) {
		return nil
	}
	w := append([]uint16(nil), r.words(r.size())...)
	copied := regionOf(w)
	_, body, shift := copied.flatParts()
	for u := first; u < first+n; u++ {
		flatSet(body, shift, u, c)
	}
	return copied
}

// settled returns the region with the units of slot that are in U with the given interval taken out of U; itself if there are none.
func (r *region) settled(slot, interval int) *region {
	var colours []uint16
	if r.flat() {
		colours, _, _ = r.flatParts()
	} else {
		colours = r.words(1 + int(r.header>>8))[1:]
	}
	found := false
	for _, c := range colours {
		found = found || source(c).slot() == slot && source(c).interval() == interval
	}
	if !found {
		return r
	}
	var oldSpace [regionUnits]run
	old := r.expand(oldSpace[:0])
	runs := old[:0]
	for _, o := range old {
		if o.src.slot() == slot && o.src.interval() == interval {
			o.src = o.src.plain()
		}
		if len(runs) == 0 || runs[len(runs)-1].src != o.src {
			runs = append(runs, o)
		}
	}
	return makeRegion(runs)
}
