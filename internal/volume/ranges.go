package volume

import (
	"sync"
	"sync/atomic"
)

// ranges orders the I/O of a volume where it overlaps: of two writes to one unit the second waits, and a read waits for a write under way (invariants 6 and 10). It
// counts in units. A read that meets no write costs one atomic load; nothing allocates once the list has grown to the depth in use.
type ranges struct {
	writing atomic.Int32 // writes under way or about to be

	mu      sync.Mutex // guards what follows
	free    sync.Cond  // a range was unlocked; L is mu
	waiting int        // goroutines in free.Wait
	held    []span
}

// span is the units [from, to).
type span struct{ from, to int64 }

func newRanges() *ranges {
	r := &ranges{held: make([]span, 0, 64)}
	r.free.L = &r.mu
	return r
}

// lock waits until no range that overlaps s is locked, and locks it.
func (r *ranges) lock(s span) {
	r.writing.Add(1)
	r.mu.Lock()
	r.wait(s)
	r.held = append(r.held, s)
	r.mu.Unlock()
}

// unlock ends a lock.
func (r *ranges) unlock(s span) {
	r.mu.Lock()
	for i := range r.held {
		if r.held[i] == s {
			last := len(r.held) - 1
			r.held[i] = r.held[last]
			r.held = r.held[:last]
			break
		}
	}
	if r.waiting > 0 {
		r.free.Broadcast()
	}
	r.mu.Unlock()
	r.writing.Add(-1)
}

// pass waits until no range that overlaps s is locked. Whatever is locked later began later than the caller.
func (r *ranges) pass(s span) {
	if r.writing.Load() == 0 {
		return
	}
	r.mu.Lock()
	r.wait(s)
	r.mu.Unlock()
}

// wait is the loop of lock and pass; r.mu is held.
func (r *ranges) wait(s span) {
	for r.overlaps(s) {
		r.waiting++
		r.free.Wait()
		r.waiting--
	}
}

func (r *ranges) overlaps(s span) bool {
	for _, h := range r.held {
		if h.from < s.to && s.from < h.to {
			return true
		}
	}
	return false
}
