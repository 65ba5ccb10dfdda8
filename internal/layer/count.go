package layer

import (
	"context"
	"fmt"
	"math/bits"

	"ashlar/internal/block"
)

// Counting Data units. The count of a layer is kept exact with every change, page by page: a page's bit in tallied says that its units are in it. A fresh layer
// begins with all pages in; a settled one finds the count in its header; any other is counted once after opening, by whoever wants to know, and not by Open, which
// must not take longer for a fuller layer.

// DataBytes returns the guest bytes that this layer alone holds (its units in state Data), exact at this moment, without I/O. known is false from opening
// until Count, or Stack.Count for a head in use, has read the map, unless the header had it.
func (l *Layer) DataBytes() (n int64, known bool) {
	known = l.counted.Load()
	return l.data.Load() * unitBytes, known
}

// countData returns how many of a map page's units are Data.
func countData(codes []byte) int64 {
	n := 0
	for i := 0; i+8 <= len(codes); i += 8 {
		n += bits.OnesCount64(loadCodes(codes[i:]) >> 1 & evenBits)
	}
	return int64(n)
}

func (l *Layer) isTallied(page int64) bool {
	return l.counted.Load() || l.tallied[page/64].Load()>>(page%64)&1 != 0
}

// tally adds a page with these codes to the count; whoever could change its units is kept out.
func (l *Layer) tally(page int64, codes []byte) {
	if !l.isTallied(page) {
		l.data.Add(countData(codes))
		l.tallied[page/64].Or(1 << (page % 64))
	}
}

// startCount sets the count as opening finds it.
func (l *Layer) startCount(units int64, known bool) {
	l.counted.Store(false)
	for i := range l.tallied {
		l.tallied[i].Store(0)
	}
	l.data.Store(units)
	l.counted.Store(known)
}

// Count reads the map of a sealed layer, or of one opened for reading only, unless DataBytes is known. I/O goes on. ErrState for a head in use: Stack.Count.
func (l *Layer) Count(ctx context.Context) error {
	if !l.sealed.Load() && !l.readOnly && !l.counted.Load() {
		return fmt.Errorf("layer %s: count: %w", l.sb.ID, ErrState)
	}
	return l.count(ctx, nil)
}

// Count makes DataBytes known of every layer of the stack, reading maps where it is not. I/O goes on.
func (s *Stack) Count(ctx context.Context) error {
	v := s.view.Load()
	for _, slot := range v.chain {
		var w *writer
		if v.writer != nil && v.writer.slot == slot {
			w = v.writer
		}
		if err := v.layers[slot].count(ctx, w); err != nil {
			if s.closed.Load() {
				err = block.ErrClosed
			}
			return fmt.Errorf("layer: count: %w", err)
		}
	}
	return nil
}

// count tallies every page. w is the writer if the layer is a head in use; it may be sealed meanwhile.
func (l *Layer) count(ctx context.Context, w *writer) error {
	codes := make([]byte, pageBytes)
	for page := range l.mapPages() {
		if l.counted.Load() {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := l.countPage(page, w, codes); err != nil {
			return fmt.Errorf("layer %s: %w", l.sb.ID, err)
		}
	}
	l.countMu.Lock()
	defer l.countMu.Unlock()
	for page := range l.mapPages() {
		if !l.isTallied(page) {
			return nil // a prune that failed began the count anew; whoever asks next counts
		}
	}
	l.counted.Store(true)
	return nil
}

// countPage tallies one page.
func (l *Layer) countPage(page int64, w *writer, codes []byte) error {
	l.countMu.Lock() // a seal, or a prune, is not under way
	defer l.countMu.Unlock()
	if l.isTallied(page) {
		return nil
	}
	if w != nil && !l.sealed.Load() {
		mu := w.s.stripe(page)
		mu.Lock()
		defer mu.Unlock()
		if err := w.pageCodes(page, codes); err != nil {
			return err
		}
	} else if err := l.pageCodes(page, codes); err != nil {
		return err
	}
	l.tally(page, codes)
	return nil
}

// pageCodes reads the codes of a map page as they are on disk; a page beyond the layer's end, or one that was never written, is all Absent.
func (l *Layer) pageCodes(page int64, codes []byte) error {
	has, err := l.hasPage(page)
	if err == nil && has {
		_, err = l.readPage(page, codes)
	}
	if err != nil || !has {
		clear(codes[:pageBytes])
	}
	return err
}

// pageCodes is the same for a head, whose map on disk is behind that in memory wherever the log names the page; the page's stripe is held, at least shared.
func (w *writer) pageCodes(page int64, codes []byte) error {
	if w.table.region(page*pageRegions) != nil {
		w.table.codes(page, w.slot, false, codes)
		return nil
	}
	return w.l.pageCodes(page, codes)
}
