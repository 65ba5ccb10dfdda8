package nbd

import (
	"math/bits"
	"sync"
)

// Every buffer begins with a page that holds the header of a reply whose data follows, so that the data of a large request lies on a
// page boundary (the allocator aligns these sizes) and a Device that wants O_DIRECT need not copy it.
const (
	dataAt        = 4096
	minClassShift = 12 // smallest data area, 4 KiB
	maxClassShift = 22 // largest that is kept for reuse, 4 MiB

	smallReceive = 8 << 10   // data area of a quiet connection's receive buffer
	largeBuffer  = 256 << 10 // data area of a busy connection's receive buffer
	gatherBytes  = 128 << 10 // data area of the buffer that gathers replies; with more, client and server work by turns, not at once
)

// budgetBytes bounds the buffers of one connection's requests and replies, beside the receive buffer: one request of the largest size and
// the gathered replies, or sixteen of 2 MiB.
const budgetBytes = maxPayloadBytes + 1<<20

// buffer is memory with a range that is to be sent, mem[from:to].
type buffer struct {
	mem      []byte
	from, to int
	class    int  // index of its pool, -1 when it is not kept
	charged  int  // bytes charged to the budget of the connection that has it
	shared   bool // holds replies of several workers; guarded by the sender
}

// data is the first n bytes of the data area.
func (b *buffer) data(n int) []byte { return b.mem[dataAt : dataAt+n] }

// free is how many bytes can be appended.
func (b *buffer) free() int { return len(b.mem) - b.to }

// append returns the next n bytes to be sent. The caller knows that there is room.
func (b *buffer) append(n int) []byte {
	p := b.mem[b.to : b.to+n]
	b.to += n
	return p
}

// buffers keeps buffers of a server's connections for reuse, by size.
type buffers struct {
	pools [maxClassShift - minClassShift + 1]sync.Pool

	once sync.Once // makes zero
	zero []byte
}

// get returns a buffer with a data area of at least n bytes and nothing to send.
func (p *buffers) get(n int) *buffer {
	shift := max(minClassShift, bits.Len(uint(max(n, 1)-1)))
	if shift > maxClassShift {
		return &buffer{mem: make([]byte, dataAt+n), class: -1}
	}
	class := shift - minClassShift
	if b, ok := p.pools[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{mem: make([]byte, dataAt+1<<shift), class: class}
}

// put gives b back. Nobody may use it afterwards.
func (p *buffers) put(b *buffer) {
	if b == nil || b.class < 0 {
		return
	}
	b.from, b.to, b.charged, b.shared = 0, 0, 0, false
	p.pools[b.class].Put(b)
}

// budget counts the bytes one connection holds. Only the reading goroutine waits for it; workers and the sender only give back, or take
// the little that a reply without data needs (force), so that waiting always ends.
type budget struct {
	mu   sync.Mutex
	cond sync.Cond
	used int // guarded by mu
	wait bool
}

func (g *budget) init() { g.cond.L = &g.mu }

// try takes n bytes if the budget allows it.
func (g *budget) try(n int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.used > 0 && g.used+n > budgetBytes {
		return false
	}
	g.used += n
	return true
}

// take waits until n bytes can be taken.
func (g *budget) take(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.used > 0 && g.used+n > budgetBytes {
		g.wait = true
		g.cond.Wait()
	}
	g.wait = false
	g.used += n
}

// force takes n bytes whatever is used.
func (g *budget) force(n int) {
	g.mu.Lock()
	g.used += n
	g.mu.Unlock()
}

// give returns n bytes.
func (g *budget) give(n int) {
	g.mu.Lock()
	g.used -= n
	if g.wait {
		g.cond.Signal()
	}
	g.mu.Unlock()
}

// zeroes returns bytes that are zero and that nobody changes.
func (p *buffers) zeroes() []byte {
	p.once.Do(func() { p.zero = make([]byte, zeroChunk) })
	return p.zero
}
