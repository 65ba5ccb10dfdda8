package layer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// ReceiveSpec says which layer Receive makes, and of what.
type ReceiveSpec struct {
	// Units has the layer's own units, as Own tells them, perhaps from another node. It has SizeBytes and, behind them, SumsBytes of checksums to compare with.
	Units     block.Device
	SizeBytes int64
	SumsBytes int64 // 0: none
	// Meta is the header. Its State says what the layer becomes, StateHead or StateSealed; Settled, Sums, Failed and DataBytes are set by Receive.
	Meta    Meta
	Options Options
	// Parallel is how many pieces of up to 1 MiB are in flight; 0 means 4.
	Parallel int
	// Progress, if not nil, is told of each piece of Data that was taken over, by several goroutines.
	Progress func(bytes int64)
}

// receiveGap is how far apart two runs of Data may be to be read as one piece: less than what asking once more costs.
const receiveGap = 16 << 10

// Receive makes a layer of the units of another one, in the same places and states: a head that nothing was logged of yet, or a sealed and settled layer with checksums, computed from what was
// received. It returns once the layer is durable with its name, which was free. Only Data moves, and it is compared with the checksums that came with it (block.ErrCorrupt); a
// failure or a cancelled ctx leaves no file, a crash may leave one in state building. dataBytes are what the layer holds: its units in state Data. Reads that are stuck are waited for: who cannot wait closes spec.Units.
func Receive(ctx context.Context, fsys disk.FS, name string, spec ReceiveSpec) (dataBytes int64, err error) {
	m := spec.Meta.clone()
	if m.State != StateHead && m.State != StateSealed {
		return 0, fmt.Errorf("layer: receive %s: to become %q: %w", name, m.State, ErrState)
	}
	if spec.SumsBytes < 0 || spec.SumsBytes != 0 && spec.SumsBytes < 4*(spec.SizeBytes/unitBytes) || spec.Units.Size() < spec.SizeBytes+spec.SumsBytes {
		return 0, fmt.Errorf("layer: receive %s: %d bytes and %d of checksums from a device of %d: %w", name, spec.SizeBytes, spec.SumsBytes, spec.Units.Size(), block.ErrCorrupt)
	}
	m.State, m.Settled, m.Sums, m.Failed, m.DataBytes = StateBuilding, false, false, false, nil
	l, err := Create(fsys, name, m, spec.SizeBytes, spec.Options)
	if err != nil {
		return 0, err
	}
	r := &receiver{spec: spec, into: l}
	if err = r.run(ctx); err == nil {
		dataBytes, _ = l.DataBytes() // known since it was made
		return dataBytes, l.Close()
	}
	return 0, errors.Join(fmt.Errorf("layer: receive %s: %w", m.ID, mapError(err)), l.Close(), fsys.Remove(name), fsys.SyncDir(path.Dir(name)))
}

// receiver is a Receive under way: one goroutine looks at extents and gives out pieces, a few move them, and who moves the last piece of a map page writes the page.
type receiver struct {
	spec    ReceiveSpec
	into    *Layer
	buffers sync.Pool // of *[]byte, sumChunk long
}

// receivedPage is a map page's worth of units.
type receivedPage struct {
	no    int64
	codes [pageBytes]byte
	sums  [pageUnits]uint32
	left  atomic.Int64 // pieces that were not moved yet

	ask  sync.Once
	want []byte // the checksums that came with it; nil if none did
	err  error
}

// receivedPiece is runs of Data of one page, near each other.
type receivedPiece struct {
	page *receivedPage
	runs []unitRange
}

func (p *receivedPiece) first() int64 { return p.runs[0].unit }
func (p *receivedPiece) end() int64   { return p.runs[len(p.runs)-1].unit + p.runs[len(p.runs)-1].n }

func (r *receiver) run(ctx context.Context) error {
	parallel := r.spec.Parallel
	if parallel <= 0 {
		parallel = 4
	}
	r.buffers.New = func() any { b := make([]byte, sumChunk); return &b }
	g, gctx := errgroup.WithContext(ctx)
	pieces := make(chan receivedPiece)
	g.Go(func() error {
		defer close(pieces)
		return r.plan(gctx, pieces)
	})
	for range parallel {
		g.Go(func() error {
			for p := range pieces {
				if err := r.move(gctx, p); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	return r.finish()
}

// finish makes the layer what it is to be, durably.
func (r *receiver) finish() error {
	l, sealed := r.into, r.spec.Meta.State == StateSealed
	if err := l.f.Sync(); err != nil {
		return err
	}
	err := l.changeMeta(func(m *Meta) error {
		m.State = r.spec.Meta.State
		if !sealed {
			return nil
		}
		m.Settled, m.Sums = true, true
		return l.noteCount(m)
	})
	if err != nil || !sealed {
		return err
	}
	return l.f.Punch(l.sb.Log.Off, l.sb.Log.N)
}

// plan reads the extents and gives out pieces, page by page.
func (r *receiver) plan(ctx context.Context, pieces chan<- receivedPiece) error {
	var page *receivedPage
	var todo []receivedPiece
	next := func(no int64) error { // the page before it is complete
		if page != nil {
			if err := r.give(ctx, page, todo, pieces); err != nil {
				return err
			}
		}
		page, todo = &receivedPage{no: no}, todo[:0]
		return nil
	}
	size := r.spec.SizeBytes
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		list, err := r.spec.Units.Extents(off, size-off)
		if err != nil {
			return fmt.Errorf("extents at %d: %w", off, err)
		}
		if len(list) == 0 {
			return fmt.Errorf("no extents at %d: %w", off, block.ErrCorrupt)
		}
		for _, e := range list {
			if e.Off != off || e.N <= 0 || e.N > size-off || e.N%unitBytes != 0 || e.State > block.Data {
				return fmt.Errorf("extent [%d,+%d) %v at %d: %w", e.Off, e.N, e.State, off, block.ErrCorrupt)
			}
			off += e.N
			if e.State == block.Absent {
				continue
			}
			for unit, left := e.Off/unitBytes, e.N/unitBytes; left > 0; {
				no := unit / pageUnits
				if page == nil || page.no != no {
					if err := next(no); err != nil {
						return err
					}
				}
				n := min(left, (no+1)*pageUnits-unit)
				setCodes(page.codes[:], int(unit%pageUnits), int(n), e.State)
				if e.State == block.Data {
					todo = addRun(todo, page, unitRange{unit, n})
				}
				unit, left = unit+n, left-n
			}
		}
	}
	return next(-1)
}

// addRun adds a run of Data to the pieces of its page.
func addRun(todo []receivedPiece, page *receivedPage, run unitRange) []receivedPiece {
	const most = sumChunk / unitBytes
	for run.n > 0 {
		part := unitRange{run.unit, min(run.n, most)}
		if k := len(todo) - 1; k >= 0 && (run.unit-todo[k].end())*unitBytes <= receiveGap {
			if room := todo[k].first() + most - run.unit; room > 0 {
				part.n = min(part.n, room)
				todo[k].runs = append(todo[k].runs, part)
				run = unitRange{run.unit + part.n, run.n - part.n}
				continue
			}
		}
		todo = append(todo, receivedPiece{page: page, runs: []unitRange{part}})
		run = unitRange{run.unit + part.n, run.n - part.n}
	}
	return todo
}

// give gives a page's pieces out. One without Data is written at once.
func (r *receiver) give(ctx context.Context, page *receivedPage, todo []receivedPiece, pieces chan<- receivedPiece) error {
	if len(todo) == 0 {
		return r.writePage(page)
	}
	page.left.Store(int64(len(todo)))
	for _, p := range todo {
		select {
		case pieces <- p:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// move takes one piece over.
func (r *receiver) move(ctx context.Context, p receivedPiece) error {
	n := (p.end() - p.first()) * unitBytes
	if err := r.into.paced(ctx, n); err != nil {
		return err
	}
	buf := r.buffers.Get().(*[]byte)
	defer r.buffers.Put(buf)
	b := (*buf)[:n]
	if _, err := r.spec.Units.ReadAt(b, p.first()*unitBytes); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", n, p.first()*unitBytes, err)
	}
	if r.spec.SumsBytes > 0 {
		p.page.ask.Do(func() { p.page.want, p.page.err = r.sums(p.page.no) })
		if p.page.err != nil {
			return p.page.err
		}
	}
	for _, run := range p.runs {
		at := (run.unit - p.first()) * unitBytes
		data := b[at : at+run.n*unitBytes]
		if r.spec.Meta.State == StateSealed || p.page.want != nil {
			if err := p.page.sum(data, run.unit); err != nil {
				return err
			}
		}
		if _, err := r.into.f.WriteAt(data, r.into.sb.Data.Off+run.unit*unitBytes); err != nil {
			return err
		}
		if r.spec.Progress != nil {
			r.spec.Progress(int64(len(data)))
		}
	}
	if p.page.left.Add(-1) > 0 {
		return nil
	}
	return r.writePage(p.page)
}

// sums reads the checksums that came with a page.
func (r *receiver) sums(page int64) ([]byte, error) {
	off := page * pageUnits * 4
	b := make([]byte, min(pageUnits*4, r.spec.SumsBytes-off))
	if _, err := r.spec.Units.ReadAt(b, r.spec.SizeBytes+off); err != nil {
		return nil, fmt.Errorf("read checksums of map page %d: %w", page, err)
	}
	return b, nil
}

// sum notes the checksums of units that came, and compares them with those that came with them.
func (p *receivedPage) sum(data []byte, unit int64) error {
	for ; len(data) > 0; data, unit = data[unitBytes:], unit+1 {
		i, got := unit%pageUnits, unitSum(data[:unitBytes])
		if p.want != nil && got != binary.LittleEndian.Uint32(p.want[i*4:]) {
			return fmt.Errorf("unit %d came with checksum %08x, and has %08x: %w", unit, binary.LittleEndian.Uint32(p.want[i*4:]), got, block.ErrCorrupt)
		}
		p.sums[i] = got
	}
	return nil
}

// writePage writes a page of the map and, in a sealed layer, its checksums.
func (r *receiver) writePage(p *receivedPage) error {
	l := r.into
	if _, err := l.f.WriteAt(p.codes[:], l.sb.Map.Off+p.no*pageBytes); err != nil {
		return err
	}
	l.data.Add(countData(p.codes[:]))
	if r.spec.Meta.State != StateSealed {
		return nil
	}
	return l.writeSums(p.no, p.sums[:])
}
