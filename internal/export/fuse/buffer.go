package fuse

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// buffer takes one message: its first headBytes at the end of a page, and what follows, a write's payload, from the next page on, so
// that it is aligned for direct I/O.
//
// Its pages are there from the beginning, and locked where this process may: a process that is killed while the kernel copies a request to a page that is
// not there yet does not get the page any more, and then the kernel fails the request with EIO instead of keeping it for the next process
// (fuse_dev_do_read and, in its depth, fatal_signal_pending in __get_user_pages).
type buffer struct {
	mem  []byte
	head []byte // headBytes
	data []byte // MaxWriteBytes, aligned to a page
	in   [2][]byte
	out  [2][]byte
}

func newBuffer() (*buffer, error) {
	mem, err := unix.Mmap(-1, 0, pageBytes+MaxWriteBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("fuse: get a buffer: %w", err)
	}
	unix.Mlock(mem) //nolint:errcheck // needs a capability or a limit; without, pages go only when memory is short
	b := &buffer{mem: mem, head: mem[pageBytes-headBytes : pageBytes : pageBytes], data: mem[pageBytes:]}
	b.in = [2][]byte{b.head, b.data}
	return b, nil
}

// newSmall returns a buffer of the collector's memory that is enough for req, which is not big, and moves its payload there. Nothing is read into it, so its pages may come when
// they are touched; replies are sent from pages that were just written.
func newSmall(req *Request) *buffer {
	n := int64(outHeaderBytes)
	if req.Op == OpRead || req.Op == OpWrite {
		n = max(n, req.N)
	}
	b := &buffer{head: make([]byte, headBytes), data: make([]byte, n)}
	if req.Op == OpWrite {
		req.Data = b.data[:copy(b.data, req.Data)]
	}
	return b
}

// Buffers lends the memory that sessions read requests into and replies from: MaxWriteBytes and a page each. Sessions share one. A session
// has one for each reader that is not waiting, and one for each big request under way, of which there are bigAtOnce at most. All methods may be called concurrently.
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

// put takes b back; nil is nothing.
func (p *Buffers) put(b *buffer) {
	if b == nil {
		return
	}
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
