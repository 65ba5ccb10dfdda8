package disk

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"sync"
	"syscall"
)

// MemOptions says what kind of file system a Mem is. The zero value is an endless one without reflink.
type MemOptions struct {
	// CapacityBytes is the size of the disk; 0 means it never fills. Space is given out in blocks of 4096 bytes.
	CapacityBytes int64
	// Reflink lets ShareFrom work, as on XFS; without it ShareFrom says ErrNotSupported, as on ext4.
	// Shared blocks are charged to every file that has them.
	Reflink bool
	// Seed drives what injected faults lose (FailSync, FailWrite). Crash has a source of its own.
	Seed uint64
}

// Mem is a file system in memory that can lose power.
//
// It is as unkind as a real one may be. Sync makes a file's content, allocation and length durable but not its name;
// SyncDir makes the names in one directory durable but not the directory's own name. Everything else is lost or kept at a Crash
// sector by sector (512 bytes), and a sector that was written several times since the last Sync may come back as any of those
// versions. Names come back as any prefix of what was done in each directory; a rename is whole. A length comes back as
// any it has had since the last Sync.
//
// Three ways to end: Crash (power cut; this Mem answers ErrPower from then on), CrashClone (the Mem a power cut at this instant would
// leave, while this one goes on) and KillProcess (kill -9: handles die, content stays). OnOp is called before each change, so
// that a test can do any of them at every step of a history.
//
// All methods may be called concurrently. Pages are immutable once written, so that clones are cheap.
type Mem struct {
	opts MemOptions

	mu       sync.RWMutex // guards everything below, and every node and page
	off      bool         // power was cut
	root     *node
	nextID   uint64
	nextTxn  uint64
	ops      uint64
	reserved int64 // blocks that some version of some reachable file occupies; kept only with a capacity
	handles  map[*memFile]struct{}
	faults   []*fault
	hook     func(Op)
	rand     *rand.Rand
}

var _ FS = (*Mem)(nil)

// unlimitedBytes is the size a Mem without a capacity claims to have.
const unlimitedBytes = 1 << 50

// NewMem returns an empty file system whose root directory is durable.
func NewMem(opts MemOptions) *Mem {
	m := &Mem{opts: opts, handles: map[*memFile]struct{}{}, rand: rand.New(rand.NewPCG(opts.Seed, 0x61736831))}
	m.root = m.newNode(true)
	return m
}

// OpKind says what an Op does.
type OpKind uint8

// The kinds of Op, in the words of FS and File. OpRead changes nothing: it is never shown to OnOp, and exists for Fail.
const (
	OpCreate OpKind = iota
	OpMkdir
	OpRename
	OpRemove
	OpSyncDir
	OpWrite
	OpPunch
	OpReserve
	OpShare
	OpSync
	OpRead
)

// String returns the method's name.
func (k OpKind) String() string {
	names := [...]string{"Create", "Mkdir", "Rename", "Remove", "SyncDir", "WriteAt", "Punch", "Reserve", "ShareFrom", "Sync", "ReadAt"}
	if int(k) < len(names) {
		return names[k]
	}
	return "invalid"
}

// Op is one change that is about to happen.
type Op struct {
	Kind OpKind
	// Seq counts the changes of this Mem from 1.
	Seq uint64
	// Name is the file or directory, as it was given when it was opened; NewName is set for OpRename.
	Name, NewName string
	// Off and N are the range in bytes, for the kinds that have one; N is the length for OpCreate.
	Off, N int64
}

// String describes op for a test's log.
func (op Op) String() string {
	return fmt.Sprintf("#%d %s %s%s [%d,+%d)", op.Seq, op.Kind, op.Name, op.NewName, op.Off, op.N)
}

// OnOp has f called before every change, in the goroutine that makes it and without any lock held, so that f may call
// CrashClone, Clone, Crash or KillProcess. A nil f removes the hook. Clones do not inherit it.
func (m *Mem) OnOp(f func(Op)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hook = f
}

// announce numbers op and calls the hook.
func (m *Mem) announce(op Op) {
	m.mu.Lock()
	m.ops++
	op.Seq = m.ops
	hook := m.hook
	m.mu.Unlock()
	if hook != nil {
		hook(op)
	}
}

// change runs do, a change described by op, under the lock, unless the power is off or a fault is due.
func (m *Mem) change(op Op, do func() error) error {
	if !fs.ValidPath(op.Name) || op.Kind == OpRename && !fs.ValidPath(op.NewName) {
		return opError(op, fs.ErrInvalid)
	}
	m.announce(op)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.off {
		return opError(op, ErrPower)
	}
	if err := m.due(op); err != nil {
		return opError(op, err)
	}
	if err := do(); err != nil {
		return opError(op, err)
	}
	return nil
}

func opError(op Op, err error) error {
	if op.NewName != "" {
		return fmt.Errorf("disk: %s %s to %s: %w", op.Kind, op.Name, op.NewName, err)
	}
	return fmt.Errorf("disk: %s %s: %w", op.Kind, op.Name, err)
}

// node is a file or a directory.
type node struct {
	id  uint64
	dir bool

	// A directory: its entries as they are, as they are on the medium, and the changes between the two, oldest first.
	entries, durable map[string]*node
	log              []*txn

	// A file; see pages.go.
	content
	lock  *memFile // who holds the advisory lock
	open  int      // handles
	links int      // names in entries
}

// txn is one change of names: applied to the medium whole or not at all.
type txn struct {
	id    uint64
	edits []edit
}

// edit sets one name in one directory; a nil node removes it.
type edit struct {
	dir  *node
	name string
	to   *node
}

func (m *Mem) newNode(dir bool) *node {
	m.nextID++
	n := &node{id: m.nextID, dir: dir}
	if dir {
		n.entries, n.durable = map[string]*node{}, map[string]*node{}
	} else {
		n.content = newContent()
	}
	return n
}

// lookup finds name from the root.
func (m *Mem) lookup(name string) (*node, error) {
	n := m.root
	if name == "." {
		return n, nil
	}
	for len(name) > 0 {
		first, rest := name, ""
		for i := range name {
			if name[i] == '/' {
				first, rest = name[:i], name[i+1:]
				break
			}
		}
		if !n.dir {
			return nil, syscall.ENOTDIR
		}
		if n = n.entries[first]; n == nil {
			return nil, fs.ErrNotExist
		}
		name = rest
	}
	return n, nil
}

// parent finds the directory that holds, or would hold, name.
func (m *Mem) parent(name string) (*node, string, error) {
	if name == "." {
		return nil, "", fs.ErrInvalid
	}
	dir, base := path.Split(name)
	d, err := m.lookup(path.Clean(dir))
	if err == nil && !d.dir {
		err = syscall.ENOTDIR
	}
	return d, base, err
}

// apply makes a change of names, and logs it for the directories concerned.
func (m *Mem) apply(edits ...edit) {
	m.nextTxn++
	t := &txn{id: m.nextTxn, edits: edits}
	for i, e := range edits {
		if old := e.dir.entries[e.name]; old != nil {
			old.links--
		}
		if e.to == nil {
			delete(e.dir.entries, e.name)
		} else {
			e.dir.entries[e.name] = e.to
			e.to.links++
		}
		if i == 0 || edits[0].dir != e.dir {
			e.dir.log = append(e.dir.log, t)
		}
	}
}

// Create implements FS.
func (m *Mem) Create(name string, n int64) (File, error) {
	var f *memFile
	err := m.change(Op{Kind: OpCreate, Name: name, N: n}, func() error {
		if n < 0 {
			return fs.ErrInvalid
		}
		d, base, err := m.parent(name)
		if err != nil {
			return err
		}
		if d.entries[base] != nil {
			return fs.ErrExist
		}
		file := m.newNode(false)
		file.grow(n)
		m.apply(edit{d, base, file})
		f = m.openNode(file, name)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Open implements FS.
func (m *Mem) Open(name string) (File, error) { return m.openName(name, false) }

// OpenRead implements FS.
func (m *Mem) OpenRead(name string) (File, error) { return m.openName(name, true) }

func (m *Mem) openName(name string, readOnly bool) (File, error) {
	if !fs.ValidPath(name) {
		return nil, fmt.Errorf("disk: open %s: %w", name, fs.ErrInvalid)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.off {
		return nil, fmt.Errorf("disk: open %s: %w", name, ErrPower)
	}
	n, err := m.lookup(name)
	if err == nil && n.dir {
		err = syscall.EISDIR
	}
	if err != nil {
		return nil, fmt.Errorf("disk: open %s: %w", name, err)
	}
	f := m.openNode(n, name)
	f.readOnly = readOnly
	return f, nil
}

func (m *Mem) openNode(n *node, name string) *memFile {
	f := &memFile{m: m, n: n, name: name}
	n.open++
	m.handles[f] = struct{}{}
	return f
}

// Mkdir implements FS.
func (m *Mem) Mkdir(name string) error {
	return m.change(Op{Kind: OpMkdir, Name: name}, func() error {
		if name == "." {
			return nil
		}
		for i := 0; i <= len(name); i++ {
			if i < len(name) && name[i] != '/' {
				continue
			}
			d, base, err := m.parent(name[:i])
			if err != nil {
				return err
			}
			switch old := d.entries[base]; {
			case old == nil:
				m.apply(edit{d, base, m.newNode(true)})
			case !old.dir:
				return syscall.ENOTDIR
			}
		}
		return nil
	})
}

// Rename implements FS. After a power cut it has happened or not, in both directories alike.
func (m *Mem) Rename(oldName, newName string) error {
	return m.change(Op{Kind: OpRename, Name: oldName, NewName: newName}, func() error {
		from, fromBase, err := m.parent(oldName)
		if err != nil {
			return err
		}
		n := from.entries[fromBase]
		if n == nil {
			return fs.ErrNotExist
		}
		to, toBase, err := m.parent(newName)
		if err != nil {
			return err
		}
		if n.dir && (oldName == newName || len(newName) > len(oldName) && newName[:len(oldName)+1] == oldName+"/") {
			if oldName == newName {
				return nil
			}
			return syscall.EINVAL
		}
		old := to.entries[toBase]
		switch {
		case old == n:
			return nil
		case old != nil && old.dir && !n.dir:
			return syscall.EISDIR
		case old != nil && !old.dir && n.dir:
			return syscall.ENOTDIR
		case old != nil && old.dir && len(old.entries) > 0:
			return syscall.ENOTEMPTY
		}
		m.apply(edit{from, fromBase, nil}, edit{to, toBase, n})
		return nil
	})
}

// Remove implements FS. Open handles of a removed file go on; its space is free once they are closed.
func (m *Mem) Remove(name string) error {
	return m.change(Op{Kind: OpRemove, Name: name}, func() error {
		d, base, err := m.parent(name)
		if err != nil {
			return err
		}
		switch n := d.entries[base]; {
		case n == nil:
			return fs.ErrNotExist
		case n.dir && len(n.entries) > 0:
			return syscall.ENOTEMPTY
		}
		m.apply(edit{d, base, nil})
		return nil
	})
}

// List implements FS.
func (m *Mem) List(dir string) ([]string, error) {
	n, err := m.find("list", dir)
	if err != nil {
		return nil, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if !n.dir {
		return nil, fmt.Errorf("disk: list %s: %w", dir, syscall.ENOTDIR)
	}
	names := make([]string, 0, len(n.entries))
	for name := range n.entries {
		names = append(names, name)
	}
	slices.Sort(names)
	return names, nil
}

// Stat implements FS.
func (m *Mem) Stat(name string) (Info, error) {
	n, err := m.find("stat", name)
	if err != nil {
		return Info{}, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if n.dir {
		return Info{Dir: true}, nil
	}
	return Info{SizeBytes: n.size, AllocatedBytes: n.blocks * pageBytes}, nil
}

// find is lookup with the checks that every query makes.
func (m *Mem) find(verb, name string) (*node, error) {
	if !fs.ValidPath(name) {
		return nil, fmt.Errorf("disk: %s %s: %w", verb, name, fs.ErrInvalid)
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.off {
		return nil, fmt.Errorf("disk: %s %s: %w", verb, name, ErrPower)
	}
	n, err := m.lookup(name)
	if err != nil {
		return nil, fmt.Errorf("disk: %s %s: %w", verb, name, err)
	}
	return n, nil
}

// SyncDir implements FS.
func (m *Mem) SyncDir(dir string) error {
	return m.change(Op{Kind: OpSyncDir, Name: dir}, func() error {
		d, err := m.lookup(dir)
		if err != nil {
			return err
		}
		if !d.dir {
			return syscall.ENOTDIR
		}
		if len(d.log) > 0 {
			commit(closure(d.log))
			m.recount()
		}
		return nil
	})
}

// Usage implements FS. Space that is only kept because its release is not yet durable counts as free: as on a real file system,
// asking for it makes the release durable first.
func (m *Mem) Usage() (totalBytes, freeBytes int64, err error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.off {
		return 0, 0, fmt.Errorf("disk: usage: %w", ErrPower)
	}
	totalBytes = m.opts.CapacityBytes
	if totalBytes == 0 {
		totalBytes = unlimitedBytes
	}
	seen := map[*node]bool{}
	reach(m.root, seen, false)
	for f := range m.handles {
		seen[f.n] = true
	}
	var used int64
	for n := range seen {
		used += n.blocks
	}
	return totalBytes, max(0, totalBytes-used*pageBytes), nil
}
