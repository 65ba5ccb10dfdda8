package layer

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ashlar/internal/block"
)

// writer is what a stack with a head has to write with: it owns the head's log and everything that is done in the background for it.
//
// Locks, in the order they are taken: ckptMu, backMu, flushMu, still, the stripes of pages (Stack.stripe), gate, writeLog.mu.
type writer struct {
	s     *Stack
	l     *Layer
	slot  int
	table *table
	log   *writeLog

	// gate is held shared from before the bytes of a logged write to after its record, and taken exclusively for the instant in which a
	// flush begins: docs/formats/layer.md, "Order of a write".
	gate sync.RWMutex

	// still is held shared by each step of a logged change, and taken exclusively while coverAll flushes.
	still sync.RWMutex

	reserved []atomic.Uint64 // a bit for each map page that is known to be allocated

	joinMu  sync.Mutex // guards next
	next    *flight    // the flush that has not begun; who wants one joins it
	flushMu sync.Mutex // held by the flush that runs; the others wait for it here

	backMu  sync.Mutex  // one writeBack at a time
	ckptMu  sync.Mutex  // one checkpoint or seal at a time
	stopped atomic.Bool // sealed or closed; set with all stripes held
	due     atomic.Bool // a checkpoint is due

	kicked     chan struct{} // one token: background has something to look at
	quit       chan struct{}
	quitOnce   sync.Once
	background sync.WaitGroup
}

// flight is one flush and all who wait for it.
type flight struct {
	done bool // guarded by flushMu
	err  error
}

// closeGrace is how long Close waits for background work to come back from the kernel. What is stuck there longer ends by itself.
const closeGrace = 2 * time.Second

func newWriter(s *Stack, l *Layer, slot int, t *table) (*writer, error) {
	l.logMu.Lock()
	pos := l.log
	l.log = nil
	l.logMu.Unlock()
	if pos == nil {
		return nil, fmt.Errorf("layer %s was the head of a stack before: %w", l.sb.ID, ErrState)
	}
	w := &writer{
		s: s, l: l, slot: slot, table: t, log: newWriteLog(l, *pos),
		reserved: make([]atomic.Uint64, (l.mapPages()+63)/64),
		kicked:   make(chan struct{}, 1), quit: make(chan struct{}),
	}
	if !l.limits.inline {
		w.background.Go(w.run)
	}
	return w, nil
}

// run is the background goroutine.
func (w *writer) run() {
	for {
		select {
		case <-w.quit:
			return
		case <-w.kicked:
			w.work() // an error has failed the layer, and everybody who writes hears of it
		}
	}
}

// kick has the background look for work; without one, the caller works. No locks are held.
func (w *writer) kick() {
	if w.l.limits.inline {
		w.work()
		return
	}
	select {
	case w.kicked <- struct{}{}:
	default:
	}
}

// work makes a checkpoint if one is due, and covers what is in U if that is half full.
func (w *writer) work() {
	if w.due.Swap(false) {
		if w.checkpoint() != nil {
			w.log.wake()
			return
		}
	}
	if w.log.full(w.l.limits.uncovered, 0) > 0 {
		w.coverAll() //nolint:errcheck // as above
	}
}

// writeBack takes what is dirty to the medium without beginning a flush, again and again until that is quick. From the beginning of a flush to the end of the next one whoever rewrites one of
// its units has to wait (needFlush), and an fdatasync of a second's writes takes a second; so what nobody waits for comes before what somebody may wait for. Guests that write faster than
// the medium takes it end this before it is quick: U or the log are nearly full then, and they would wait for those.
func (w *writer) writeBack() (wasQuick bool, err error) {
	const quick = 4 * time.Millisecond
	w.backMu.Lock() // two at a time would only slow each other
	defer w.backMu.Unlock()
	for range w.l.limits.writeBacks {
		start := time.Now()
		if err := w.l.f.Sync(); err != nil {
			return false, w.broke("write back", err)
		}
		if time.Since(start) < quick {
			return true, nil
		}
		if w.log.pressing(w.l.limits.uncovered) || w.usable() != nil {
			break
		}
	}
	return false, nil
}

// coverAll covers everything that was logged before it, with two flushes: the first makes it durable, the second one's mark covers it. What is logged between their beginnings would be flushed
// and not covered until somebody flushes again, and whoever rewrites a unit of it would wait for an fdatasync of all that is dirty by then, which may be a second's writes. So, if little is
// dirty now, what needs a record waits for both, which are short, and U is empty when it goes on.
func (w *writer) coverAll() error {
	wasQuick, err := w.writeBack()
	if err != nil {
		return err
	}
	w.flushMu.Lock()
	defer w.flushMu.Unlock()
	f := w.board() // these are flushes for those who wait for one, too
	if wasQuick {
		w.still.Lock()
		defer w.still.Unlock()
	}
	if err = w.flushNow(); err == nil {
		err = w.flushNow()
	}
	if f != nil {
		f.done, f.err = true, err
	}
	return err
}

// close ends the background, and waits for it a while.
func (w *writer) close() {
	w.quitOnce.Do(func() { close(w.quit) })
	w.log.wake()
	done := make(chan struct{})
	var waiter sync.WaitGroup
	waiter.Go(func() { w.background.Wait(); close(done) })
	timer := time.NewTimer(closeGrace)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	}
}

// usable returns why nothing can be written, if so.
func (w *writer) usable() error {
	switch {
	case w.s.closed.Load():
		return block.ErrClosed
	case w.l.failed.Load():
		return w.l.errFailed()
	case w.stopped.Load():
		return block.ErrReadOnly
	}
	return nil
}

// broke fails the layer because of err, unless the file was closed under us, and returns what the caller returns.
func (w *writer) broke(op string, err error) error {
	if errors.Is(err, fs.ErrClosed) {
		return fmt.Errorf("layer %s: %s: %w: %w", w.l.sb.ID, op, block.ErrClosed, err)
	}
	w.l.fail()
	w.log.wake()
	return fmt.Errorf("layer %s: %s: %w: %w", w.l.sb.ID, op, block.ErrFailed, err)
}

// flush returns once everything that was written before it was called is durable. Who comes while one runs shares the next.
func (w *writer) flush() error {
	w.joinMu.Lock()
	if w.next == nil {
		w.next = new(flight)
	}
	f := w.next
	w.joinMu.Unlock()

	w.flushMu.Lock()
	defer w.flushMu.Unlock()
	if f.done {
		return f.err
	}
	w.board()
	f.done, f.err = true, w.flushNow()
	return f.err
}

// board returns the flush that has not begun, which begins now: who comes later needs another. Nil if nobody waits for one; flushMu is held.
func (w *writer) board() *flight {
	w.joinMu.Lock()
	defer w.joinMu.Unlock()
	f := w.next
	w.next = nil
	return f
}

// flushNow is one flush; flushMu is held.
func (w *writer) flushNow() error {
	if w.l.failed.Load() {
		return w.l.errFailed()
	}
	if w.stopped.Load() {
		return nil // sealing made everything durable
	}
	g := w.log
	g.mu.Lock()
	marked := g.flushed
	var err error
	if len(g.intervals[marked].ranges) > 0 {
		err = g.appendMeta(kindMark, g.lastSeq)
	}
	g.mu.Unlock()
	if err != nil {
		return w.broke("append a mark", err)
	}

	w.gate.Lock()
	g.mu.Lock()
	begun, last := g.current, g.pos.nextSeq-1
	g.current = g.current%3 + 1
	g.mu.Unlock()
	w.gate.Unlock()

	if err := w.l.f.Sync(); err != nil {
		return w.broke("flush", err)
	}
	w.settle(marked)
	g.mu.Lock()
	g.flushed, g.lastSeq = begun, last
	g.mu.Unlock()
	return nil
}

// settle takes the units of an interval, which a durable mark covers, out of U.
func (w *writer) settle(code int) {
	w.log.mu.Lock()
	ranges := w.log.intervals[code].ranges
	w.log.mu.Unlock()
	regions := make([]int64, 0, len(ranges))
	for _, r := range ranges {
		for i := r.unit / regionUnits; i <= (r.unit+r.n-1)/regionUnits; i++ {
			regions = append(regions, i)
		}
	}
	slices.Sort(regions)
	for _, i := range slices.Compact(regions) {
		mu := w.s.stripe(i / pageRegions)
		mu.Lock()
		if old := w.table.region(i); old != nil {
			if now := old.settled(w.slot, code); now != old {
				w.table.put(i, now)
			}
		}
		mu.Unlock()
	}
	w.log.mu.Lock()
	w.log.intervals[code] = interval{}
	w.log.mu.Unlock()
}

// checkpoint frees the half of the log that is not in use, if it is not free: docs/formats/layer.md section 5.
func (w *writer) checkpoint() error {
	w.ckptMu.Lock()
	defer w.ckptMu.Unlock()
	g := w.log
	g.mu.Lock()
	free, half, gen := g.otherFree, 1-g.pos.current, g.pos.gen
	g.mu.Unlock()
	if free || w.stopped.Load() {
		return nil
	}
	if err := w.coverAll(); err != nil {
		return err
	}
	if err := w.writePages(g.touchedPages(half), true); err != nil {
		return w.broke("checkpoint: write map", err)
	}
	if err := w.l.f.Sync(); err != nil {
		return w.broke("checkpoint", err)
	}
	g.mu.Lock()
	err := g.appendMeta(kindCheckpoint, uint64(gen)-1)
	g.mu.Unlock()
	if err == nil {
		err = w.l.f.Sync()
	}
	if err != nil {
		return w.broke("checkpoint", err)
	}
	// If the new half's first sector rots, nobody shall take this one for current. Nobody appends to it before otherFree says so, and broke takes the
	// log's lock.
	if _, err := w.l.f.WriteAt(make([]byte, 512), w.l.halfOff(half)); err != nil {
		return w.broke("checkpoint: wipe log", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.otherFree = true
	clear(g.touchedBy[half])
	close(g.waiting)
	g.waiting = make(chan struct{})
	return nil
}

// writePages writes map pages from the map in memory, without fdatasync. With covered, units in U are written with their covered state, as a checkpoint must;
// without, with the one they have now.
func (w *writer) writePages(pages []int64, covered bool) error {
	buf := make([]byte, pageBytes)
	for _, page := range pages {
		mu := w.s.stripe(page)
		mu.RLock()
		w.table.codes(page, w.slot, covered, buf)
		mu.RUnlock()
		if _, err := w.l.f.WriteAt(buf, w.l.sb.Map.Off+page*pageBytes); err != nil {
			return err
		}
		w.l.wrotePage(page)
	}
	return nil
}

// flushAhead folds the whole log into the map while writes go on, as far as it was written when called.
func (w *writer) flushAhead() error {
	if err := w.checkpoint(); err != nil { // whatever is pending
		return err
	}
	g := w.log
	g.mu.Lock()
	var err error
	if g.otherFree && slices.ContainsFunc(g.touchedBy[g.pos.current], func(w uint64) bool { return w != 0 }) {
		err = g.switchHalf()
	}
	g.mu.Unlock()
	if err != nil {
		return w.broke("start log segment", err)
	}
	if err := w.checkpoint(); err != nil {
		return err
	}
	if _, err := w.writeBack(); err != nil {
		return err
	}
	return w.flush()
}
