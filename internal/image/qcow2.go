package image

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"ashlar/internal/block"
)

// qcow2 is the active disk of a qcow2 file as a read-only Device. It reads in place; nothing of the file is copied ahead.
//
// Absent means unallocated (there is no backing file, so it reads as zero), Zero what the image marks as zero, Data the rest. Where clusters or
// subclusters are smaller than a unit, a unit with any Data is Data, and one with any Zero is Zero.
type qcow2 struct {
	decoder
	src     io.ReaderAt
	info    Info
	l1      []int64 // offset of each L2 table, 0 for none; constant
	tables  *fifo[int64, []byte]
	whole   *fifo[int64, *wholeCluster]
	inflate *inflater
	refs    *hostRefs
	closed  atomic.Bool
}

var _ block.Device = (*qcow2)(nil)

const (
	tableCacheBytes = 16 << 20
	wholeCacheBytes = 4 << 20
)

// openQcow2 checks the header and all tables of the file behind src, whose length is fileBytes. refs may be nil.
func openQcow2(ctx context.Context, src io.ReaderAt, fileBytes int64, o openOptions) (*qcow2, error) {
	h, err := readHeader(src, fileBytes, o.limits)
	if err != nil {
		return nil, err
	}
	q := &qcow2{decoder: decoder{header: h, fileBytes: fileBytes}, src: src}
	q.info = Info{Format: Qcow2, FileBytes: fileBytes, VirtualBytes: h.size}
	if err := q.info.checkVirtual(o.limits); err != nil {
		return nil, err
	}
	if o.freeing {
		q.refs = newHostRefs(fileBytes, h.clusterBits)
	}
	check := tableCheck{decoder: q.decoder, src: src, limits: o.limits, exclusive: clusterSet{}, packed: clusterSet{}, refs: q.refs, received: o.received}
	if check.received == 0 {
		check.received = fileBytes
	}
	if q.l1, err = check.run(ctx); err != nil {
		return nil, err
	}
	q.tables = newFifo[int64, []byte](max(4, tableCacheBytes/int(h.clusterBytes())))
	q.whole = newFifo[int64, *wholeCluster](max(2, wholeCacheBytes/int(h.clusterBytes())))
	q.inflate, err = newInflater(h)
	return q, err
}

// Info says what the header said.
func (q *qcow2) Info() Info { return q.info }

// Size is the virtual size rounded up to whole units.
func (q *qcow2) Size() int64 { return q.info.DeviceBytes }

// run is a stretch of the disk that is one thing: n bytes, stored at host if they are data.
type run struct {
	kind kind
	host int64
	n    int64
	e    entry // for kindCompressed
}

// lookup says what lies at off: a run of at most n bytes, and at least one.
func (q *qcow2) lookup(off, n int64) (run, error) {
	if off >= q.size {
		return run{kind: kindAbsent, n: n}, nil
	}
	n = min(n, q.size-off)
	table, err := q.table(off / q.l2Span())
	if err != nil {
		return run{}, err
	}
	n = min(n, q.l2Span()-off%q.l2Span())
	if table == nil {
		return run{kind: kindAbsent, n: n}, nil
	}
	total, err := q.piece(table, off)
	for err == nil && total.n < n && total.kind != kindCompressed {
		var next run
		next, err = q.piece(table, off+total.n)
		if next.kind != total.kind || next.kind == kindData && next.host != total.host+total.n {
			break
		}
		total.n += next.n
	}
	total.n = min(total.n, n)
	return total, err
}

// piece says what lies at off up to the end of its cluster or subcluster. table is the L2 table off belongs to.
func (q *qcow2) piece(table []byte, off int64) (run, error) {
	size := q.clusterBytes()
	within := off & (size - 1)
	e, err := q.decode(table, off%q.l2Span()>>q.clusterBits, min(size, q.size-off+within))
	if err != nil {
		return run{}, err
	}
	r := run{kind: e.kind, host: e.host + within, n: size - within, e: e}
	if e.kind == kindSplit {
		sub := size / 32
		bit := uint32(1) << (within / sub)
		r.n = sub - within%sub
		switch {
		case e.alloc&bit != 0:
			r.kind = kindData
		case e.zero&bit != 0:
			r.kind = kindZero
		default:
			r.kind = kindAbsent
		}
	}
	return r, nil
}

// table returns an L2 table, or nil if the L1 entry at index has none.
func (q *qcow2) table(index int64) ([]byte, error) {
	off := q.l1[index]
	if off == 0 {
		return nil, nil
	}
	if b, ok := q.tables.get(index); ok {
		return b, nil
	}
	b := make([]byte, q.clusterBytes())
	if _, err := q.src.ReadAt(b, off); err != nil {
		return nil, readFailed("L2 table", err)
	}
	q.tables.put(index, b)
	return b, nil
}

// ReadAt fills p. A compressed cluster that does not unpack is block.ErrCorrupt and ErrFormat.
func (q *qcow2) ReadAt(p []byte, off int64) (int, error) {
	if err := q.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		r, err := q.lookup(off+int64(done), int64(len(p)-done))
		if err != nil {
			return done, err
		}
		part := p[done : done+int(r.n)]
		switch r.kind {
		case kindData:
			if _, err = q.src.ReadAt(part, r.host); err != nil {
				err = readFailed("data cluster", err)
			}
		case kindCompressed:
			err = q.readCompressed(part, off+int64(done), r.e)
		default:
			clear(part)
		}
		if err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

// wholeCluster is an unpacked cluster: whoever comes first unpacks it.
type wholeCluster struct {
	once sync.Once
	b    []byte
	err  error
}

// readCompressed reads part of the compressed cluster e at off. A read of all of it goes straight to p; of a part, through a small cache, because the
// next part is likely to follow.
func (q *qcow2) readCompressed(p []byte, off int64, e entry) error {
	size := q.clusterBytes()
	within := off & (size - 1)
	if within == 0 && int64(len(p)) == size {
		return q.unpack(p, e)
	}
	w := q.whole.getOrPut(off>>q.clusterBits, func() *wholeCluster { return new(wholeCluster) })
	w.once.Do(func() {
		w.b = make([]byte, size)
		w.err = q.unpack(w.b, e)
	})
	copy(p, w.b[within:])
	return w.err
}

func (q *qcow2) unpack(dst []byte, e entry) error {
	if err := q.inflate.unpack(dst, q.src, e); err != nil {
		return fmt.Errorf("qcow2: compressed cluster at %#x: %w", e.host, err)
	}
	return nil
}

// check is what every call begins with.
func (q *qcow2) check(off, n int64) error {
	if q.closed.Load() {
		return block.ErrClosed
	}
	return block.CheckRange(off, n, q.Size())
}

// Extents describes up to a few thousand runs from off on.
func (q *qcow2) Extents(off, n int64) ([]block.Extent, error) {
	if err := q.check(off, n); err != nil {
		return nil, err
	}
	var list extentList
	end := off + n
	for at, steps := off, 0; at < end && steps < maxExtentSteps; steps++ {
		unitEnd := min(end, at-at%block.UnitBytes+block.UnitBytes)
		r, err := q.lookup(at, end-at)
		if err != nil {
			return nil, err
		}
		// A run that ends inside a unit is cut back to the unit's start, and a unit of several runs is judged as a whole.
		if rest := (at + r.n) % block.UnitBytes; at+r.n < end && rest != 0 {
			r.n -= rest
		}
		if at+r.n < unitEnd {
			if r, err = q.mixedUnit(at, unitEnd-at); err != nil {
				return nil, err
			}
		}
		if !list.add(at, r.n, r.kind.state()) {
			break
		}
		at += r.n
	}
	return list, nil
}

// mixedUnit judges [off, off+n), which lies in one unit.
func (q *qcow2) mixedUnit(off, n int64) (run, error) {
	unit := run{kind: kindAbsent, n: n}
	for at := off; at < off+n; {
		r, err := q.lookup(at, off+n-at)
		if err != nil {
			return run{}, err
		}
		if s := r.kind.state(); s > unit.kind.state() {
			unit.kind = r.kind
		}
		at += r.n
	}
	return unit, nil
}

// state is ordered like kind's meaning for a mixed unit: Absent < Zero < Data.
func (k kind) state() block.State {
	switch k {
	case kindData, kindCompressed:
		return block.Data
	case kindZero:
		return block.Zero
	}
	return block.Absent
}

// WriteAt refuses with block.ErrReadOnly.
func (q *qcow2) WriteAt(p []byte, off int64) (int, error) {
	return 0, q.refuseWrite(off, int64(len(p)))
}

// Zero refuses with block.ErrReadOnly.
func (q *qcow2) Zero(off, n int64) error { return q.refuseWrite(off, n) }

func (q *qcow2) refuseWrite(off, n int64) error {
	if err := q.check(off, n); err != nil || n == 0 {
		return err
	}
	return block.ErrReadOnly
}

// Flush has nothing to do.
func (q *qcow2) Flush() error { return q.check(0, 0) }

// Close ends the device; the file behind it belongs to whoever opened that.
func (q *qcow2) Close() error {
	if q.closed.Swap(true) {
		return block.ErrClosed
	}
	return nil
}

const (
	// maxExtents bounds one answer of Extents, maxExtentSteps the time it takes.
	maxExtents     = 4096
	maxExtentSteps = 64 << 10
)

type extentList []block.Extent

// add appends a run, merged with the last if it is of the same state; false says that the list is full.
func (l *extentList) add(off, n int64, state block.State) bool {
	if last := len(*l) - 1; last >= 0 && (*l)[last].State == state {
		(*l)[last].N += n
		return true
	}
	if len(*l) == maxExtents {
		return false
	}
	*l = append(*l, block.Extent{Off: off, N: n, State: state})
	return true
}

// fifo is a small cache: the oldest entry leaves first. A nil value is never stored.
type fifo[K comparable, V any] struct {
	mu    sync.Mutex // guards the rest
	items map[K]V
	order []K
	next  int
}

func newFifo[K comparable, V any](n int) *fifo[K, V] {
	return &fifo[K, V]{items: make(map[K]V), order: make([]K, 0, n)}
}

func (f *fifo[K, V]) get(k K) (V, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v, ok := f.items[k]
	return v, ok
}

func (f *fifo[K, V]) put(k K, v V) { f.getOrPut(k, func() V { return v }) }

// getOrPut returns the value of k, made by fresh if there is none.
func (f *fifo[K, V]) getOrPut(k K, fresh func() V) V {
	f.mu.Lock()
	defer f.mu.Unlock()
	if v, ok := f.items[k]; ok {
		return v
	}
	if len(f.order) < cap(f.order) {
		f.order = append(f.order, k)
	} else {
		delete(f.items, f.order[f.next])
		f.order[f.next] = k
		f.next = (f.next + 1) % len(f.order)
	}
	v := fresh()
	f.items[k] = v
	return v
}
