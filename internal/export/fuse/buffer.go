package fuse

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// bigBytes: a buffer that was used beyond this is given back to the kernel when its session is idle.
const bigBytes = 128 << 10

// buffer takes one message: its first headBytes at the end of a page, and what follows, a write's payload, from the next page on, so
// that it is aligned for direct I/O. It is memory of its own, outside the collector's, so that it can be given back.
type buffer struct {
	mem  []byte
	head []byte // headBytes
	data []byte // MaxWriteBytes, aligned to a page
	used int    // bytes of data that were touched since the last trim
	in   [2][]byte
	out  [2][]byte
}

func newBuffer() (*buffer, error) {
	mem, err := unix.Mmap(-1, 0, pageBytes+MaxWriteBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("fuse: get a buffer: %w", err)
	}
	b := &buffer{mem: mem, head: mem[pageBytes-headBytes : pageBytes : pageBytes], data: mem[pageBytes:]}
	b.in = [2][]byte{b.head, b.data}
	return b, nil
}

// trim gives the pages of a big buffer back to the kernel. Nobody may be using it.
func (b *buffer) trim() {
	if b.used > bigBytes {
		unix.Madvise(b.data, unix.MADV_DONTNEED) //nolint:errcheck // a hint
		b.used = 0
	}
}

// Buffers lends the memory that sessions read requests into and replies from: MaxWriteBytes and a page each. Sessions share one. A session that serves
// has one for each request under way, of which the kernel bounds the number, and one to wait with. All methods may be called concurrently.
type Buffers struct {
	keep int

	mu   sync.Mutex // guards free
	free []*buffer
}

// NewBuffers returns a Buffers that keeps up to keep buffers that nobody uses.
func NewBuffers(keep int) *Buffers { return &Buffers{keep: keep} }

func (p *Buffers) get() (*buffer, error) {
	p.mu.Lock()
	if n := len(p.free); n > 0 {
		b := p.free[n-1]
		p.free = p.free[:n-1]
		p.mu.Unlock()
		return b, nil
	}
	p.mu.Unlock()
	return newBuffer()
}

func (p *Buffers) put(b *buffer) {
	p.mu.Lock()
	if len(p.free) < p.keep {
		p.free = append(p.free, b)
		b = nil
	}
	p.mu.Unlock()
	if b != nil {
		unix.Munmap(b.mem) //nolint:errcheck // our own mapping
	}
}

// Close gives back what nobody uses.
func (p *Buffers) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.free {
		unix.Munmap(b.mem) //nolint:errcheck // our own mapping
	}
	p.free, p.keep = nil, 0
	return nil
}
