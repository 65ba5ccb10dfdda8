package blockfault

import (
	"crypto/sha256"
	"slices"
	"sync"

	"ashlar/internal/block"
)

// Entry is one call and its outcome.
type Entry struct {
	Op
	// Sum is the SHA-256 of what was written, for Write.
	Sum [sha256.Size]byte
	// Err is what the call returned.
	Err error
}

// Record is a device that remembers every call, in the order in which they returned.
type Record struct {
	around

	mu  sync.Mutex // guards log
	log []Entry
}

// NewRecord returns a device around d with an empty log.
func NewRecord(d block.Device) *Record {
	r := &Record{}
	r.around = around{dev: d, before: func(Op) error { return nil }, after: r.add}
	return r
}

// WriteAt implements io.WriterAt. It is not the common one because its entry has a sum.
func (r *Record) WriteAt(p []byte, off int64) (int, error) {
	sum := sha256.Sum256(p)
	n, err := r.dev.WriteAt(p, off)
	r.append(Entry{Op: Op{Write, off, int64(len(p))}, Sum: sum, Err: err})
	return n, err
}

func (r *Record) add(op Op, err error) { r.append(Entry{Op: op, Err: err}) }

func (r *Record) append(e Entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = append(r.log, e)
}

// Entries returns what was recorded so far.
func (r *Record) Entries() []Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.log)
}

// Count returns how many calls of kind were recorded.
func (r *Record) Count(kind Kind) int {
	n := 0
	for _, e := range r.Entries() {
		if e.Kind == kind {
			n++
		}
	}
	return n
}

// Reset forgets what was recorded.
func (r *Record) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = nil
}
