package remote

import "sync"

// unflushed knows whether anything was sent to be written since the last flush that covers it. A write counts from before it is sent, whatever becomes of it; a flush covers it
// only if no write was under way when the flush began.
type unflushed struct {
	mu      sync.Mutex
	sent    uint64 // writes that were sent
	flushed uint64 // so many of them, the oldest, are covered
	pending int    // writes under way
}

// begin is called before a write is sent, and end when it has returned.
func (u *unflushed) begin() {
	u.mu.Lock()
	u.sent++
	u.pending++
	u.mu.Unlock()
}

func (u *unflushed) end() {
	u.mu.Lock()
	u.pending--
	u.mu.Unlock()
}

// mark is called before a flush is sent; what it returns is for clean.
func (u *unflushed) mark() uint64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.pending > 0 {
		return u.flushed
	}
	return u.sent
}

// clean is called when the flush has succeeded.
func (u *unflushed) clean(mark uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.flushed = max(u.flushed, mark)
}

// dirty tells whether there may be something that a power cut at the peer takes away.
func (u *unflushed) dirty() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.flushed < u.sent
}
