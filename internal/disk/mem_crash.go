package disk

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
)

// Keep says what a crash keeps of what was not synced.
type Keep uint8

// What a crash keeps of what was not synced.
const (
	// KeepRandom keeps any subset, drawn from CrashOptions.Rand: some files whole, some not at all, some torn.
	KeepRandom Keep = iota
	// KeepNone keeps only what was synced.
	KeepNone
	// KeepAll keeps everything: the machine had just written it back by itself.
	KeepAll
)

// CrashOptions says what a power cut leaves. KeepRandom needs Rand or Pick.
type CrashOptions struct {
	Rand *rand.Rand
	Keep Keep
	// Pick, if set, decides instead of Keep: it is asked with the number of possible outcomes (two or more) and answers with one, 0
	// for the oldest. It is asked for each directory (names kept), then for each file, by age, for its length, and for each unsynced
	// sector in order, and for each page whose allocation is open. It lets a test go through every outcome.
	Pick func(n int) int
}

// Crash cuts the power. The Mem returned is what the machine finds at its next boot: nothing open, no locks, hooks or
// faults. The old Mem and all its handles answer ErrPower from now on.
func (m *Mem) Crash(opts CrashOptions) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.afterCrash(opts)
	m.off = true
	return c
}

// CrashClone returns what Crash would, while m goes on undisturbed.
func (m *Mem) CrashClone(opts CrashOptions) *Mem {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.afterCrash(opts)
}

// Clone returns a Mem in the same state as m, with the same things not yet synced, but with nothing open or locked and without hooks and
// faults: what another process sees after a kill -9 at this instant, while m goes on undisturbed.
func (m *Mem) Clone() *Mem {
	m.mu.RLock()
	defer m.mu.RUnlock()
	c := NewMem(m.opts)
	c.off = m.off
	copies := map[*node]*node{}
	c.root = cloneNode(m.root, copies)
	for _, t := range m.openTxns() {
		for i, e := range t.edits {
			if d := cloneNode(e.dir, copies); i == 0 || t.edits[0].dir != e.dir {
				d.log = append(d.log, cloneTxn(t, copies))
			}
		}
	}
	c.nextID, c.nextTxn = m.nextID, m.nextTxn
	c.recount()
	return c
}

// KillProcess is kill -9 of whoever has files open: every handle answers fs.ErrClosed from now on and its lock is free,
// and what was written stays as it is, synced or not.
func (m *Mem) KillProcess() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for f := range maps.Clone(m.handles) {
		m.release(f)
	}
}

// afterCrash builds the Mem that a power cut leaves; the lock is held.
func (m *Mem) afterCrash(opts CrashOptions) *Mem {
	if opts.Keep == KeepRandom && opts.Rand == nil && opts.Pick == nil {
		panic("disk: a random crash needs CrashOptions.Rand or Pick")
	}
	c := NewMem(m.opts)
	ch := &chooser{opts: opts}
	durable := m.namesAfterCrash(ch)
	copies := map[*node]*node{}
	var files []*node
	c.root = survivors(m.root, durable, copies, &files)
	slices.SortFunc(files, func(a, b *node) int { return cmp.Compare(a.id, b.id) })
	for _, n := range files {
		copies[n].content = n.content.afterCrash(ch)
	}
	c.nextID, c.nextTxn = m.nextID, m.nextTxn
	c.recount()
	return c
}

// names is the entries of directories.
type names map[*node]map[string]*node

// namesAfterCrash decides which unsynced names are kept: a prefix of the changes of each directory, completed so that a change that
// concerns two directories is kept in both or in neither.
func (m *Mem) namesAfterCrash(ch *chooser) names {
	var dirs []*node
	all := map[*node]bool{}
	reach(m.root, all, true)
	for n := range all {
		if n.dir {
			dirs = append(dirs, n)
		}
	}
	slices.SortFunc(dirs, func(a, b *node) int { return cmp.Compare(a.id, b.id) })
	var kept []*txn
	for _, d := range dirs {
		if len(d.log) > 0 {
			kept = append(kept, d.log[:ch.prefix(len(d.log)+1)]...)
		}
	}
	after := names{}
	for _, d := range dirs {
		after[d] = maps.Clone(d.durable)
	}
	for _, t := range closure(kept) {
		for _, e := range t.edits {
			if e.to == nil {
				delete(after[e.dir], e.name)
			} else {
				after[e.dir][e.name] = e.to
			}
		}
	}
	return after
}

// survivors copies the tree below n as durable has it, and lists the files in it.
func survivors(n *node, durable names, copies map[*node]*node, files *[]*node) *node {
	if c := copies[n]; c != nil {
		c.links++
		return c
	}
	c := &node{id: n.id, dir: n.dir, links: 1}
	copies[n] = c
	if !n.dir {
		*files = append(*files, n)
		return c
	}
	c.entries, c.durable = map[string]*node{}, map[string]*node{}
	for name, child := range durable[n] {
		c.entries[name] = survivors(child, durable, copies, files)
	}
	maps.Copy(c.durable, c.entries)
	return c
}

// closure returns txns and all earlier ones of every directory they touch, oldest first and each once: the least that a
// journal could have written together with them.
func closure(txns []*txn) []*txn {
	set := map[*txn]bool{}
	todo := slices.Clone(txns)
	for len(todo) > 0 {
		t := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if set[t] {
			continue
		}
		set[t] = true
		for _, e := range t.edits {
			for _, earlier := range e.dir.log {
				if earlier.id < t.id && !set[earlier] {
					todo = append(todo, earlier)
				}
			}
		}
	}
	return slices.SortedFunc(maps.Keys(set), func(a, b *txn) int { return cmp.Compare(a.id, b.id) })
}

// commit makes txns, a closure, durable.
func commit(txns []*txn) {
	for _, t := range txns {
		for _, e := range t.edits {
			if e.to == nil {
				delete(e.dir.durable, e.name)
			} else {
				e.dir.durable[e.name] = e.to
			}
			e.dir.log = slices.DeleteFunc(slices.Clone(e.dir.log), func(o *txn) bool { return o == t })
		}
	}
}

// reach marks n and all nodes below it; with unsynced also those that only the medium or an unsynced change still names.
func reach(n *node, seen map[*node]bool, unsynced bool) {
	if seen[n] {
		return
	}
	seen[n] = true
	for _, child := range n.entries {
		reach(child, seen, unsynced)
	}
	if !unsynced {
		return
	}
	for _, child := range n.durable {
		reach(child, seen, unsynced)
	}
	for _, t := range n.log {
		for _, e := range t.edits {
			reach(e.dir, seen, unsynced)
			if e.to != nil {
				reach(e.to, seen, unsynced)
			}
		}
	}
}

// openTxns returns every change of names that is not durable, oldest first.
func (m *Mem) openTxns() []*txn {
	all := map[*node]bool{}
	reach(m.root, all, true)
	var txns []*txn
	for n := range all {
		txns = append(txns, n.log...)
	}
	return closure(txns)
}

// cloneNode copies n and what its entries and durable names reach, without logs.
func cloneNode(n *node, copies map[*node]*node) *node {
	if c := copies[n]; c != nil {
		return c
	}
	c := &node{id: n.id, dir: n.dir, links: n.links}
	copies[n] = c
	if !n.dir {
		c.content = n.content.clone()
		return c
	}
	c.entries, c.durable = map[string]*node{}, map[string]*node{}
	for name, child := range n.entries {
		c.entries[name] = cloneNode(child, copies)
	}
	for name, child := range n.durable {
		c.durable[name] = cloneNode(child, copies)
	}
	return c
}

// cloneTxn copies t once, however many directories log it.
func cloneTxn(t *txn, copies map[*node]*node) *txn {
	for _, e := range t.edits {
		for _, done := range cloneNode(e.dir, copies).log {
			if done.id == t.id {
				return done
			}
		}
	}
	c := &txn{id: t.id}
	for _, e := range t.edits {
		e.dir = cloneNode(e.dir, copies)
		if e.to != nil {
			e.to = cloneNode(e.to, copies)
		}
		c.edits = append(c.edits, e)
	}
	return c
}

// clone copies the bookkeeping and shares the bytes.
func (c *content) clone() content {
	d := *c
	d.pages = make(map[int64]*page, len(c.pages))
	for no, p := range c.pages {
		q := *p
		d.pages[no] = &q
	}
	d.dirty = maps.Clone(c.dirty)
	d.index = nil
	return d
}

// afterCrash returns the content that a power cut leaves.
func (c *content) afterCrash(ch *chooser) content {
	ch.file()
	d := content{pages: make(map[int64]*page, len(c.pages)), dirty: map[int64]struct{}{}}
	d.size = c.sizes[ch.size(len(c.sizes))]
	d.sizes = []int64{d.size}
	outcome := make(map[int64]version, len(c.dirty))
	for _, no := range slices.Sorted(maps.Keys(c.dirty)) {
		outcome[no] = c.pages[no].afterCrash(ch)
	}
	for no, p := range c.pages {
		v, ok := outcome[no]
		if !ok {
			v = p.vers[0]
		}
		v = clip(v, d.size-no*pageBytes)
		if v.data == nil && !v.alloc {
			continue
		}
		v.mask = allSectors
		d.pages[no] = &page{vers: []version{v}}
		if v.alloc {
			d.blocks++
			d.held++
		}
	}
	return d
}

// clip removes what lies beyond the length that was kept: n bytes of this page are within it.
func clip(v version, n int64) version {
	if v.data == nil || n >= pageBytes {
		return v
	}
	if n <= 0 {
		return version{alloc: v.alloc}
	}
	data := *v.data
	clear(data[n:])
	v.data = &data
	return v
}

// afterCrash returns the version of p that a power cut leaves, put together from sectors of all its versions.
func (p *page) afterCrash(ch *chooser) version {
	var data [pageBytes]byte
	var stored, open bool
	ch.page(len(p.vers))
	for s := range pageSectors {
		var from []version
		for _, v := range p.vers {
			if v.mask&(1<<s) != 0 {
				from = append(from, v)
			}
		}
		v := from[ch.sector(len(from))]
		if v.data != nil {
			stored = true
			copy(data[s*sectorBytes:(s+1)*sectorBytes], v.data[s*sectorBytes:])
		}
	}
	if stored {
		return version{data: &data, alloc: true}
	}
	for _, v := range p.vers {
		open = open || v.alloc != p.vers[0].alloc
	}
	alloc := p.vers[0].alloc
	if open {
		alloc = p.vers[ch.alloc(len(p.vers))].alloc
	}
	return version{alloc: alloc}
}

// chooser decides what a power cut keeps. Purely independent coin tosses would almost never keep a file whole or lose one
// page of many, so KeepRandom first draws a temper for each file, and for each page whether it is torn.
type chooser struct {
	opts   CrashOptions
	temper int     // of the current file
	newest float64 // how likely the current file's parts are the newest version
	whole  bool    // the current page is not torn
	keep   bool    // and has this version
}

const (
	temperAll = iota
	temperNone
	temperMixed // and everything above
)

func (c *chooser) random() bool { return c.opts.Pick == nil && c.opts.Keep == KeepRandom }

// file begins a file.
func (c *chooser) file() {
	if !c.random() {
		return
	}
	c.temper = c.opts.Rand.IntN(6)
	c.newest = []float64{0.03, 0.3, 0.5, 0.7, 0.97}[c.opts.Rand.IntN(5)]
}

// page begins a page.
func (c *chooser) page(int) {
	if !c.random() {
		return
	}
	c.whole = c.opts.Rand.IntN(2) == 0
	c.keep = c.opts.Rand.Float64() < c.newest
}

// sector chooses one of n versions of a sector.
func (c *chooser) sector(n int) int {
	if n > 1 && c.random() && c.temper >= temperMixed && c.whole {
		if c.keep {
			return n - 1
		}
		return 0
	}
	return c.one(n)
}

func (c *chooser) size(n int) int  { return c.one(n) }
func (c *chooser) alloc(n int) int { return c.one(n) }

// prefix chooses how many of n-1 changes of names are kept.
func (c *chooser) prefix(n int) int {
	if !c.random() {
		return c.one(n)
	}
	switch c.opts.Rand.IntN(4) {
	case 0:
		return 0
	case 1:
		return n - 1
	}
	return c.opts.Rand.IntN(n)
}

// one chooses one of n, oldest first.
func (c *chooser) one(n int) int {
	switch {
	case n < 2:
		return 0
	case c.opts.Pick != nil:
		i := c.opts.Pick(n)
		if i < 0 || i >= n {
			panic(fmt.Sprintf("disk: Pick(%d) answered %d", n, i))
		}
		return i
	case c.opts.Keep == KeepNone || c.random() && c.temper == temperNone:
		return 0
	case c.opts.Keep == KeepAll || c.temper == temperAll:
		return n - 1
	case c.opts.Rand.Float64() < c.newest:
		return n - 1
	}
	return c.opts.Rand.IntN(n - 1)
}
