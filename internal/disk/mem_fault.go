package disk

import (
	"maps"
	"path"
	"slices"
	"syscall"
)

// FailOptions describes a failure that is to come.
type FailOptions struct {
	Kind OpKind
	// Pattern is matched with path.Match against the name an operation carries; "" matches all names.
	Pattern string
	// Nth is the matching operation that fails, counted from 1 after this call.
	Nth int
	// Times is how many fail from then on: 0 means one, a negative number means all.
	Times int
	// Err is what they return, wrapped; nil means EIO.
	Err error
}

// fault is one FailOptions with its count; guarded by Mem.mu.
type fault struct {
	FailOptions
	seen int
}

// Fail makes operations fail on request.
//
// A Sync that fails drops what was not synced, as Linux does: of each such page the medium has any subset of its sectors,
// the page counts as clean from then on, and reads see either what the medium has or what was written. A later Sync that
// succeeds does not bring it back. A WriteAt that fails leaves any subset of its sectors written and reports none. All others do
// nothing when they fail.
func (m *Mem) Fail(opts FailOptions) {
	if opts.Nth < 1 {
		opts.Nth = 1
	}
	if opts.Times == 0 {
		opts.Times = 1
	}
	if opts.Err == nil {
		opts.Err = syscall.EIO
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faults = append(m.faults, &fault{FailOptions: opts})
}

// FailSync has the nth Sync of a file that matches pattern fail and drop what was not synced; see Fail.
func (m *Mem) FailSync(pattern string, nth int) {
	m.Fail(FailOptions{Kind: OpSync, Pattern: pattern, Nth: nth})
}

// FailWrite has the nth WriteAt of a file that matches pattern fail half done; see Fail.
func (m *Mem) FailWrite(pattern string, nth int) {
	m.Fail(FailOptions{Kind: OpWrite, Pattern: pattern, Nth: nth})
}

// ClearFaults forgets all failures that are still to come.
func (m *Mem) ClearFaults() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faults = nil
}

// due returns the error that op is to fail with, if any; the lock is held.
func (m *Mem) due(op Op) error {
	var err error
	for _, f := range m.faults {
		if f.Kind != op.Kind {
			continue
		}
		if ok, bad := path.Match(f.Pattern, op.Name); f.Pattern != "" && (bad != nil || !ok) {
			continue
		}
		f.seen++
		if f.seen >= f.Nth && (f.Times < 0 || f.seen < f.Nth+f.Times) && err == nil {
			err = f.Err
		}
	}
	return err
}

// hasFaults spares reads the write lock while nothing is to fail.
func (m *Mem) hasFaults() bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return len(m.faults) > 0
}

func (m *Mem) dueRead(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.due(Op{Kind: OpRead, Name: name})
}

// dropDirty is what a failed Sync does to the pages it should have written; the lock is held.
func (m *Mem) dropDirty(n *node) {
	ch := &chooser{opts: CrashOptions{Rand: m.rand}}
	ch.file()
	for _, no := range slices.Sorted(maps.Keys(n.dirty)) {
		p := n.pages[no]
		onMedium := p.afterCrash(ch)
		onMedium.mask = allSectors
		settled := &page{vers: []version{onMedium}}
		if m.rand.IntN(2) == 0 {
			seen := p.current()
			// The allocation is the medium's in both views, or the account would not add up after a crash.
			seen.alloc = onMedium.alloc || seen.data != nil
			onMedium.alloc = seen.alloc
			settled.vers[0] = onMedium
			settled.cached = &seen
		}
		n.replace(no, settled)
	}
}

// take sets count blocks aside for a page that is about to be put, or says ErrNoSpace. Like a journalling file system it makes pending
// releases of space durable before it gives up; the lock is held.
func (m *Mem) take(count int64) error {
	limit := m.opts.CapacityBytes / pageBytes
	if m.opts.CapacityBytes == 0 || m.reserved+count <= limit {
		return nil
	}
	commit(m.openTxns())
	all := m.reachable()
	for n := range all {
		if !n.dir {
			n.settleFrees()
		}
	}
	m.recount()
	if m.reserved+count > limit {
		return ErrNoSpace
	}
	return nil
}

// reachable returns every node that a name, an unsynced change or a handle leads to.
func (m *Mem) reachable() map[*node]bool {
	all := map[*node]bool{}
	reach(m.root, all, true)
	for f := range m.handles {
		all[f.n] = true
	}
	return all
}

// recount adds up the blocks anew, after nodes may have gone.
func (m *Mem) recount() {
	m.reserved = 0
	for n := range m.reachable() {
		m.reserved += n.held
	}
}
