package block

import (
	"sync"
	"sync/atomic"
)

// Mem is a Device in memory: the twin of a layer for tests, and what others are measured against. It takes writes and
// zeroes of any alignment, keeps a state for each unit, needs memory only for units with data, and loses nothing but on Close.
// Reads and writes are whole per unit, also while they overlap.
type Mem struct {
	size   int64
	closed atomic.Bool

	mu     sync.RWMutex // guards chunks, the map; each chunk guards itself
	chunks map[int64]*memChunk
}

var _ Device = (*Mem)(nil)

const (
	chunkUnits = 256
	chunkBytes = chunkUnits * UnitBytes
	// memExtentChunks bounds how far one call of Extents looks.
	memExtentChunks = 1 << 16
)

// memChunk is 1 MiB of the device. A nil unit reads as zeros; its state is in state.
type memChunk struct {
	mu    sync.RWMutex // guards what follows
	units [chunkUnits]*[UnitBytes]byte
	state [chunkUnits]State
}

// NewMem returns a device of sizeBytes, all of it absent.
func NewMem(sizeBytes int64) *Mem {
	if sizeBytes < 0 {
		panic("block: a device of negative size")
	}
	return &Mem{size: sizeBytes, chunks: map[int64]*memChunk{}}
}

// chunk returns chunk no; nil if it does not exist and is not to be made.
func (m *Mem) chunk(no int64, create bool) *memChunk {
	m.mu.RLock()
	c := m.chunks[no]
	m.mu.RUnlock()
	if c != nil || !create {
		return c
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if c = m.chunks[no]; c == nil {
		c = &memChunk{}
		m.chunks[no] = c
	}
	return c
}

func (m *Mem) check(off, n int64) error {
	if m.closed.Load() {
		return ErrClosed
	}
	return CheckRange(off, n, m.size)
}

// part is what of a range lies in one unit of a chunk: n bytes from in on.
type part struct{ unit, in, n int }

// parts returns the first part of [off, off+n) and the number of its chunk.
func parts(off, n int64) (chunk int64, p part) {
	in := off % UnitBytes
	return off / chunkBytes, part{int(off % chunkBytes / UnitBytes), int(in), int(min(n, UnitBytes-in))}
}

// ReadAt implements io.ReaderAt.
func (m *Mem) ReadAt(p []byte, off int64) (int, error) {
	if err := m.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	for rest := p; len(rest) > 0; {
		no, at := parts(off, int64(len(rest)))
		c := m.chunk(no, false)
		if c == nil {
			at.n = int(min(int64(len(rest)), chunkBytes-off%chunkBytes))
			clear(rest[:at.n])
		} else {
			c.read(rest[:at.n], at)
		}
		rest, off = rest[at.n:], off+int64(at.n)
	}
	return len(p), nil
}

func (c *memChunk) read(p []byte, at part) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if u := c.units[at.unit]; u != nil {
		copy(p, u[at.in:])
	} else {
		clear(p)
	}
}

// WriteAt implements io.WriterAt.
func (m *Mem) WriteAt(p []byte, off int64) (int, error) {
	if err := m.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	for rest := p; len(rest) > 0; {
		no, at := parts(off, int64(len(rest)))
		m.chunk(no, true).write(rest[:at.n], at)
		rest, off = rest[at.n:], off+int64(at.n)
	}
	return len(p), nil
}

func (c *memChunk) write(p []byte, at part) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.units[at.unit] == nil {
		c.units[at.unit] = new([UnitBytes]byte)
	}
	copy(c.units[at.unit][at.in:], p)
	c.state[at.unit] = Data
}

// Zero implements Device. A unit that is zeroed as a whole gives its memory back.
func (m *Mem) Zero(off, n int64) error {
	if err := m.check(off, n); err != nil {
		return err
	}
	for n > 0 {
		no, at := parts(off, n)
		m.chunk(no, true).zero(at)
		off, n = off+int64(at.n), n-int64(at.n)
	}
	return nil
}

// zero clears a part of a unit.
func (c *memChunk) zero(at part) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch u := c.units[at.unit]; {
	case u == nil, at.n == UnitBytes:
		c.units[at.unit] = nil
		c.state[at.unit] = Zero
	default:
		clear(u[at.in : at.in+at.n])
	}
}

// Flush implements Device. Memory has no medium: there is nothing to do.
func (m *Mem) Flush() error {
	if m.closed.Load() {
		return ErrClosed
	}
	return nil
}

// Extents implements Device.
func (m *Mem) Extents(off, n int64) ([]Extent, error) {
	if err := m.check(off, n); err != nil {
		return nil, err
	}
	var out []Extent
	add := func(n int64, s State) {
		if last := len(out) - 1; last >= 0 && out[last].State == s {
			out[last].N += n
		} else {
			out = append(out, Extent{Off: off, N: n, State: s})
		}
		off += n
	}
	for end, looked := off+n, 0; off < end && looked < memExtentChunks; looked++ {
		no := off / chunkBytes
		stop := min(end, (no+1)*chunkBytes)
		c := m.chunk(no, false)
		if c == nil {
			add(stop-off, Absent)
			continue
		}
		c.mu.RLock()
		for off < stop {
			_, at := parts(off, stop-off)
			add(int64(at.n), c.state[at.unit])
		}
		c.mu.RUnlock()
	}
	return out, nil
}

// Size implements Device.
func (m *Mem) Size() int64 { return m.size }

// Close implements Device. The content is gone.
func (m *Mem) Close() error {
	if m.closed.Swap(true) {
		return ErrClosed
	}
	return nil
}

// Zeroes is a device that reads as zeros and takes no writes.
type Zeroes struct {
	size   int64
	closed atomic.Bool
}

var _ Device = (*Zeroes)(nil)

// NewZeroes returns a Zeroes of sizeBytes.
func NewZeroes(sizeBytes int64) *Zeroes { return &Zeroes{size: sizeBytes} }

func (z *Zeroes) check(off, n int64) error {
	if z.closed.Load() {
		return ErrClosed
	}
	return CheckRange(off, n, z.size)
}

// refuse is the answer to whatever would change the device.
func (z *Zeroes) refuse(off, n int64) error {
	if err := z.check(off, n); err != nil || n == 0 {
		return err
	}
	return ErrReadOnly
}

// ReadAt implements io.ReaderAt.
func (z *Zeroes) ReadAt(p []byte, off int64) (int, error) {
	if err := z.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	clear(p)
	return len(p), nil
}

// WriteAt refuses.
func (z *Zeroes) WriteAt(p []byte, off int64) (int, error) { return 0, z.refuse(off, int64(len(p))) }

// Zero refuses.
func (z *Zeroes) Zero(off, n int64) error { return z.refuse(off, n) }

// Flush implements Device.
func (z *Zeroes) Flush() error { return z.check(0, 0) }

// Extents implements Device: one extent of State Zero.
func (z *Zeroes) Extents(off, n int64) ([]Extent, error) {
	if err := z.check(off, n); err != nil || n == 0 {
		return nil, err
	}
	return []Extent{{Off: off, N: n, State: Zero}}, nil
}

// Size implements Device.
func (z *Zeroes) Size() int64 { return z.size }

// Close implements Device.
func (z *Zeroes) Close() error {
	if z.closed.Swap(true) {
		return ErrClosed
	}
	return nil
}
