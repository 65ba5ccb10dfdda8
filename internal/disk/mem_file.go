package disk

import (
	"fmt"
	"io"
	"io/fs"
	"slices"
	"syscall"
)

// memFile is one open file of a Mem. Its fields but closed never change; closed is guarded by Mem.mu.
type memFile struct {
	m        *Mem
	n        *node
	name     string
	readOnly bool
	closed   bool
}

var _ File = (*memFile)(nil)

// maxOffset keeps offsets where sums of them cannot overflow.
const maxOffset = 1 << 62

// usable says why the handle cannot be used; the lock is held.
func (f *memFile) usable() error {
	if f.m.off {
		return ErrPower
	}
	if f.closed {
		return fs.ErrClosed
	}
	return nil
}

// change is Mem.change for an operation of an open file.
func (f *memFile) change(op Op, do func() error) error {
	op.Name = f.name
	return f.m.change(op, func() error {
		if err := f.writable(op); err != nil {
			return err
		}
		return do()
	})
}

// writable checks a change of [Off, Off+N); the lock is held.
func (f *memFile) writable(op Op) error {
	if err := f.usable(); err != nil {
		return err
	}
	if op.Off < 0 || op.N < 0 || op.Off > maxOffset || op.N > maxOffset {
		return fs.ErrInvalid
	}
	if f.readOnly && op.Kind != OpSync {
		return fs.ErrPermission
	}
	return nil
}

// ReadAt implements File.
func (f *memFile) ReadAt(b []byte, off int64) (int, error) {
	if f.m.hasFaults() {
		if err := f.m.dueRead(f.name); err != nil {
			return 0, opError(Op{Kind: OpRead, Name: f.name}, err)
		}
	}
	f.m.mu.RLock()
	defer f.m.mu.RUnlock()
	if err := f.usable(); err != nil {
		return 0, opError(Op{Kind: OpRead, Name: f.name}, err)
	}
	if off < 0 {
		return 0, opError(Op{Kind: OpRead, Name: f.name}, fs.ErrInvalid)
	}
	if len(b) == 0 {
		return 0, nil
	}
	n := min(int64(len(b)), max(0, f.n.size-off))
	f.n.read(b[:n], off)
	if n < int64(len(b)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// WriteAt implements File.
func (f *memFile) WriteAt(b []byte, off int64) (n int, err error) {
	op := Op{Kind: OpWrite, Name: f.name, Off: off, N: int64(len(b))}
	f.m.announce(op)
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err = f.writable(op); err == nil {
		if err = f.m.due(op); err != nil {
			f.writeSome(b, off)
		} else {
			n, err = f.write(b, off)
		}
	}
	if err != nil {
		return n, opError(op, err)
	}
	return n, nil
}

// write puts b at off, page by page; the lock is held.
func (f *memFile) write(b []byte, off int64) (n int, err error) {
	spans(off, int64(len(b)), func(s span) bool {
		old := f.n.at(s.no)
		if !old.alloc {
			if err = f.m.take(1); err != nil {
				return false
			}
		}
		data := new([pageBytes]byte)
		if old.data != nil && !s.whole() {
			*data = *old.data
		}
		copy(data[s.in:s.in+s.n], b[s.before:])
		f.put(s.no, version{data: data, alloc: true, mask: s.mask()})
		f.n.grow(off + s.before + int64(s.n))
		n += s.n
		return true
	})
	return n, err
}

// writeSome is what a failing write leaves: any subset of its sectors.
func (f *memFile) writeSome(b []byte, off int64) {
	for len(b) > 0 {
		n := min(len(b), sectorBytes-int(off%sectorBytes))
		if f.m.rand.IntN(2) == 0 {
			if _, err := f.write(b[:n], off); err != nil {
				return
			}
		}
		b, off = b[n:], off+int64(n)
	}
}

// put sets a page and keeps the disk's account.
func (f *memFile) put(no int64, v version) {
	held := f.n.held
	f.n.set(no, v)
	f.m.reserved += f.n.held - held
}

// Punch implements File.
func (f *memFile) Punch(off, n int64) error {
	return f.change(Op{Kind: OpPunch, Off: off, N: n}, func() error {
		if n > 1<<16*pageBytes {
			f.punchMany(off, n)
			return nil
		}
		spans(off, n, func(s span) bool { f.punchPage(s); return true })
		return nil
	})
}

// punchMany is Punch for ranges that are larger than what the file holds.
func (f *memFile) punchMany(off, n int64) {
	var nos []int64
	for no := range f.n.pages {
		if (no+1)*pageBytes > off && no*pageBytes < off+n {
			nos = append(nos, no)
		}
	}
	slices.Sort(nos)
	for _, no := range nos {
		from, to := max(off, no*pageBytes), min(off+n, (no+1)*pageBytes)
		f.punchPage(span{no: no, in: int(from % pageBytes), n: int(to - from)})
	}
}

func (f *memFile) punchPage(s span) {
	old := f.n.at(s.no)
	switch {
	case s.whole() && (old.alloc || old.data != nil):
		f.put(s.no, version{mask: allSectors})
	case !s.whole() && old.data != nil:
		data := *old.data
		clear(data[s.in : s.in+s.n])
		f.put(s.no, version{data: &data, alloc: true, mask: s.mask()})
	}
}

// Reserve implements File. With ErrNoSpace the pages before the first that did not fit stay reserved.
func (f *memFile) Reserve(off, n int64) error {
	return f.change(Op{Kind: OpReserve, Off: off, N: n}, func() (err error) {
		spans(off, n, func(s span) bool {
			old := f.n.at(s.no)
			if old.alloc {
				return true
			}
			if err = f.m.take(1); err != nil {
				return false
			}
			f.put(s.no, version{data: old.data, alloc: true})
			return true
		})
		return err
	})
}

// NextData implements File.
func (f *memFile) NextData(off int64) (dataOff, n int64, err error) {
	f.m.mu.Lock() // not RLock: the index may have to be made
	defer f.m.mu.Unlock()
	if err := f.usable(); err != nil {
		return 0, 0, fmt.Errorf("disk: next data %s: %w", f.name, err)
	}
	if off < 0 {
		return 0, 0, fmt.Errorf("disk: next data %s: %w", f.name, fs.ErrInvalid)
	}
	index := f.n.dataIndex()
	i, _ := slices.BinarySearch(index, off/pageBytes)
	if i == len(index) || off >= f.n.size || index[i]*pageBytes >= f.n.size {
		return 0, 0, io.EOF
	}
	first, last := index[i], index[i]
	for i++; i < len(index) && index[i] == last+1; i++ {
		last++
	}
	dataOff = max(off, first*pageBytes)
	return dataOff, min((last+1)*pageBytes, f.n.size) - dataOff, nil
}

// ShareFrom implements File: whole pages only, and only with MemOptions.Reflink.
func (f *memFile) ShareFrom(src File, srcOff, off, n int64) error {
	return f.change(Op{Kind: OpShare, Off: off, N: n}, func() (err error) {
		from, ok := src.(*memFile)
		if !f.m.opts.Reflink || !ok || from.m != f.m {
			return ErrNotSupported
		}
		if err := from.usable(); err != nil {
			return err
		}
		if srcOff%pageBytes != 0 || off%pageBytes != 0 || n%pageBytes != 0 || srcOff < 0 || srcOff > from.n.size-n {
			return syscall.EINVAL
		}
		spans(off, n, func(s span) bool {
			now, old := from.n.at((srcOff+s.before)/pageBytes), f.n.at(s.no)
			if now.data != nil && !old.alloc {
				if err = f.m.take(1); err != nil {
					return false
				}
			}
			if now.data != nil || old.data != nil || old.alloc {
				f.put(s.no, version{data: now.data, alloc: now.data != nil, mask: allSectors})
			}
			f.n.grow(off + s.before + pageBytes)
			return true
		})
		return err
	})
}

// Sync implements File.
func (f *memFile) Sync() error {
	op := Op{Kind: OpSync, Name: f.name}
	f.m.announce(op)
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.usable(); err != nil {
		return opError(op, err)
	}
	held := f.n.held
	defer func() { f.m.reserved += f.n.held - held }()
	if err := f.m.due(op); err != nil {
		f.m.dropDirty(f.n)
		return opError(op, err)
	}
	f.n.settle()
	return nil
}

// Size implements File.
func (f *memFile) Size() (int64, error) {
	f.m.mu.RLock()
	defer f.m.mu.RUnlock()
	if err := f.usable(); err != nil {
		return 0, fmt.Errorf("disk: size %s: %w", f.name, err)
	}
	return f.n.size, nil
}

// Allocated implements File.
func (f *memFile) Allocated() (int64, error) {
	f.m.mu.RLock()
	defer f.m.mu.RUnlock()
	if err := f.usable(); err != nil {
		return 0, fmt.Errorf("disk: allocated %s: %w", f.name, err)
	}
	return f.n.blocks * pageBytes, nil
}

// Lock implements File.
func (f *memFile) Lock() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	err := f.usable()
	if err == nil && f.n.lock != nil && f.n.lock != f {
		err = ErrLocked
	}
	if err != nil {
		return fmt.Errorf("disk: lock %s: %w", f.name, err)
	}
	f.n.lock = f
	return nil
}

// Close implements File.
func (f *memFile) Close() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.usable(); err != nil {
		return fmt.Errorf("disk: close %s: %w", f.name, err)
	}
	f.m.release(f)
	return nil
}

// release ends a handle; the lock is held.
func (m *Mem) release(f *memFile) {
	f.closed = true
	delete(m.handles, f)
	f.n.open--
	if f.n.lock == f {
		f.n.lock = nil
	}
	if f.n.open == 0 && f.n.links == 0 {
		m.recount()
	}
}
