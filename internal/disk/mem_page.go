package disk

import (
	"maps"
	"slices"
)

// How finely a Mem keeps bytes: space is given out in pages, and a power cut tears at sectors.
const (
	pageBytes   = 4096
	sectorBytes = 512
	pageSectors = pageBytes / sectorBytes
	allSectors  = 1<<pageSectors - 1
	// maxVersions bounds what is remembered of a page between two Syncs. The durable version and the newest ones are kept.
	maxVersions = 8
	// maxSizes bounds the lengths remembered between two Syncs.
	maxSizes = 32
)

// version is one state of a page. It is never changed once made: clones share it.
type version struct {
	data  *[pageBytes]byte // the whole page as it read then; nil reads as zeros
	alloc bool             // a block was set aside
	mask  uint8            // the sectors that this version changed
}

// page is what a Mem knows of one page: what the medium surely has, then every version since, the newest last.
type page struct {
	vers []version
	// cached, if not nil, is what reads see after a failed Sync: the kernel took the page for clean, so no later Sync writes it.
	cached *version
}

func (p *page) current() version {
	if p.cached != nil {
		return *p.cached
	}
	return p.vers[len(p.vers)-1]
}

// push adds a version. After a failed Sync the next write takes the whole page along, as the kernel does.
func (p *page) push(v version) {
	if p.cached != nil {
		v.mask, p.cached = allSectors, nil
	}
	if len(p.vers) == maxVersions {
		// The second oldest goes; its sectors are in the third, because each version holds the whole page.
		kept := append([]version{p.vers[0]}, p.vers[2:]...)
		kept[1].mask |= p.vers[1].mask
		p.vers = kept
	}
	p.vers = append(p.vers[:len(p.vers):len(p.vers)], v)
}

// occupies says whether the page has a block in any version a power cut could leave.
func (p *page) occupies() bool {
	return slices.ContainsFunc(p.vers, func(v version) bool { return v.alloc })
}

// content is what a file holds.
type content struct {
	pages  map[int64]*page    // by page number; a missing page is a durable hole
	dirty  map[int64]struct{} // pages with more than one version
	size   int64
	sizes  []int64 // lengths a power cut could leave, the durable one first, size last
	blocks int64   // pages that have a block now
	held   int64   // pages that have a block in any version
	index  []int64 // page numbers with data, sorted; nil when it must be made again
}

func newContent() content {
	return content{pages: map[int64]*page{}, dirty: map[int64]struct{}{}, sizes: []int64{0}}
}

// at returns the newest version of page no.
func (c *content) at(no int64) version {
	if p := c.pages[no]; p != nil {
		return p.current()
	}
	return version{}
}

// set adds a version to page no.
func (c *content) set(no int64, v version) {
	p := c.pages[no]
	if p == nil {
		p = &page{vers: []version{{mask: allSectors}}}
		c.pages[no] = p
	}
	old, heldBefore := p.current(), p.occupies()
	p.push(v)
	c.dirty[no] = struct{}{}
	c.tally(old.alloc, v.alloc, &c.blocks)
	c.tally(heldBefore, p.occupies(), &c.held)
	if (old.data == nil) != (v.data == nil) {
		c.index = nil
	}
}

// tally moves a count when a block came or went.
func (c *content) tally(before, after bool, count *int64) {
	if before == after {
		return
	}
	if after {
		*count++
	} else {
		*count--
	}
}

// replace puts p, a page with one version, in place of page no; it is how Sync and its failure settle a page.
func (c *content) replace(no int64, p *page) {
	old := c.pages[no]
	c.tally(old.current().alloc, p.current().alloc, &c.blocks)
	c.tally(old.occupies(), p.occupies(), &c.held)
	c.index = nil
	delete(c.dirty, no)
	if v := p.vers[0]; p.cached == nil && v.data == nil && !v.alloc {
		delete(c.pages, no)
		return
	}
	c.pages[no] = p
}

// settle makes the newest version of every page, and the length, the durable ones.
func (c *content) settle() {
	for no := range c.dirty {
		old := c.pages[no]
		v := old.current()
		p := &page{vers: []version{{data: v.data, alloc: v.alloc, mask: allSectors}}}
		if v.data == nil && !v.alloc {
			c.replace(no, p)
			continue
		}
		c.tally(old.occupies(), p.occupies(), &c.held)
		c.pages[no] = p
	}
	clear(c.dirty)
	c.sizes = []int64{c.size}
}

// settleFrees makes durable what gave blocks back, so that they can be given out again.
func (c *content) settleFrees() {
	for _, no := range slices.Collect(maps.Keys(c.dirty)) {
		if p := c.pages[no]; !p.current().alloc && p.occupies() {
			c.replace(no, &page{vers: []version{{mask: allSectors}}})
		}
	}
}

// grow sets a new, larger length.
func (c *content) grow(n int64) {
	if n <= c.size {
		return
	}
	c.size = n
	if len(c.sizes) == maxSizes {
		c.sizes = slices.Delete(slices.Clone(c.sizes), 1, 2)
	}
	c.sizes = append(c.sizes[:len(c.sizes):len(c.sizes)], n)
}

// read fills b from off, which lies within the file.
func (c *content) read(b []byte, off int64) {
	for len(b) > 0 {
		no, in := off/pageBytes, int(off%pageBytes)
		n := min(pageBytes-in, len(b))
		if v := c.at(no); v.data != nil {
			copy(b[:n], v.data[in:])
		} else {
			clear(b[:n])
		}
		b, off = b[n:], off+int64(n)
	}
}

// span is the part of one page that a range covers.
type span struct {
	no     int64
	in, n  int
	before int64 // bytes of the range that lie before this page
}

// whole says whether the span is the whole page.
func (s span) whole() bool { return s.n == pageBytes }

// mask returns the sectors that the span touches.
func (s span) mask() uint8 {
	first, last := s.in/sectorBytes, (s.in+s.n-1)/sectorBytes
	return uint8(allSectors << first & (allSectors >> (pageSectors - 1 - last)))
}

// spans calls f for each page that [off, off+n) touches until f returns false.
func spans(off, n int64, f func(span) bool) {
	for done := int64(0); done < n; {
		at := off + done
		s := span{no: at / pageBytes, in: int(at % pageBytes), before: done}
		s.n = int(min(pageBytes-int64(s.in), n-done))
		if !f(s) {
			return
		}
		done += int64(s.n)
	}
}

// dataIndex returns the numbers of the pages that hold data, sorted.
func (c *content) dataIndex() []int64 {
	if c.index == nil {
		c.index = []int64{}
		for no, p := range c.pages {
			if p.current().data != nil {
				c.index = append(c.index, no)
			}
		}
		slices.Sort(c.index)
	}
	return c.index
}
