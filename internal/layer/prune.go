package layer

import (
	"context"
	"fmt"

	"ashlar/internal/block"
)

// pruneBatch is how many map pages are pruned with two fdatasyncs: 4 GiB of disk.
const pruneBatch = 64

// prunedPage is a map page of a layer without the units that are hidden.
type prunedPage struct {
	page   int64
	codes  []byte
	hidden []unitRange
}

// Prune frees the units of l, a sealed layer of this stack, that the layers above it in this stack hide: they become Absent in it, the map first and
// durably, then the holes. The caller knows that nobody else reads through l; l is settled, and its snapshot is marked removed (ErrState). I/O goes on.
// From the first unit on the header says that l is pruned. It returns the bytes of the Data units it freed; progress, if not nil, is told how far it looked. Cancelled or
// failed half way, it has done a part of it.
func (s *Stack) Prune(ctx context.Context, l *Layer, progress func(doneBytes, totalBytes int64)) (int64, error) {
	l.workMu.Lock()
	defer l.workMu.Unlock()
	m := l.Meta()
	if !m.Settled || m.Snapshot == nil || !m.Snapshot.Removed || l.readOnly {
		return 0, fmt.Errorf("layer %s: prune: not settled and removed: %w", l.sb.ID, ErrState)
	}
	err := l.count(ctx, nil)
	freed := int64(0)
	if err == nil {
		freed, err = s.prunePages(ctx, l, progress)
	}
	if err != nil {
		return freed, fmt.Errorf("layer %s: prune: %w", l.sb.ID, mapError(err))
	}
	if l.Meta().DataBytes == nil {
		err = l.changeMeta(l.noteCount)
	}
	return freed, err
}

// prunePages is Prune in batches.
func (s *Stack) prunePages(ctx context.Context, l *Layer, progress func(doneBytes, totalBytes int64)) (int64, error) {
	freed := int64(0)
	var batch []prunedPage
	begun := false
	for page := range l.mapPages() {
		if err := ctx.Err(); err != nil {
			return freed, err
		}
		p, err := s.findHidden(l, page)
		if err != nil {
			return freed, err
		}
		if p != nil {
			batch = append(batch, *p)
		}
		if len(batch) == pruneBatch || len(batch) > 0 && page == l.mapPages()-1 {
			if !begun {
				if err := l.beginPrune(); err != nil {
					return freed, err
				}
				begun = true
			}
			n, err := s.pruneBatch(ctx, l, batch)
			freed += n
			if err != nil {
				return freed, err
			}
			batch = batch[:0]
		}
		if progress != nil {
			progress(min((page+1)*pageUnits*unitBytes, l.sb.SizeBytes), l.sb.SizeBytes)
		}
	}
	return freed, nil
}

// findHidden returns what a map page of l is without the units that the layers above l hide; nil if they hide none.
func (s *Stack) findHidden(l *Layer, page int64) (*prunedPage, error) {
	has, err := l.hasPage(page)
	if err != nil || !has {
		return nil, err
	}
	p := &prunedPage{page: page, codes: make([]byte, pageBytes)}
	if has, err = l.readPage(page, p.codes); err != nil || !has {
		return nil, err
	}
	for r := range int64(pageRegions) {
		v, reg, err := s.find(page*pageRegions + r)
		if err != nil {
			return nil, err
		}
		if s.closed.Load() {
			return nil, block.ErrClosed
		}
		for i := 0; i < regionUnits; {
			src, end := reg.at(i, regionUnits)
			if src.slot() >= len(v.layers) || v.layers[src.slot()] != l {
				p.hide(l, int(r)*regionUnits+i, end-i)
			}
			i = end
		}
	}
	if len(p.hidden) == 0 {
		return nil, nil
	}
	return p, nil
}

// hide makes Absent those of the n units from i of the page on that l has. That the stack's source of a unit l has is not l means that a layer above has it: one
// below cannot show.
func (p *prunedPage) hide(l *Layer, i, n int) {
	for u := i; u < i+n; u++ {
		if codeAt(p.codes, u) == block.Absent {
			continue
		}
		unit := p.page*pageUnits + int64(u)
		if k := len(p.hidden) - 1; k >= 0 && p.hidden[k].unit+p.hidden[k].n == unit {
			p.hidden[k].n++
		} else {
			p.hidden = append(p.hidden, unitRange{unit, 1})
		}
	}
}

// pruneBatch makes the hidden units of some pages Absent, and frees them. What hides them is flushed first: otherwise a power cut could take it
// away, and what it hid would be gone as well.
func (s *Stack) pruneBatch(ctx context.Context, l *Layer, batch []prunedPage) (int64, error) {
	hidden := int64(0)
	for _, p := range batch {
		for _, r := range p.hidden {
			hidden += r.n
		}
	}
	if err := l.paced(ctx, hidden*unitBytes); err != nil {
		return 0, err
	}
	if err := s.Flush(); err != nil {
		return 0, err
	}
	freed, err := l.dropUnits(batch)
	if err != nil {
		return freed, err
	}
	for _, p := range batch {
		for _, r := range p.hidden {
			if err := l.f.Punch(l.sb.Data.Off+r.unit*unitBytes, r.n*unitBytes); err != nil {
				return freed, err
			}
		}
	}
	return freed, nil
}

// beginPrune says in the header, durably, that units are being taken away and that its count is true no longer. Also for what it said before, because the header that says removed may have
// been found at opening, left by a process that died before it was durable.
func (l *Layer) beginPrune() error {
	if m := l.Meta(); m.Pruned && m.DataBytes == nil {
		if err := l.f.Sync(); err != nil {
			l.fail()
			return err
		}
		return nil
	}
	return l.changeMeta(func(m *Meta) error {
		m.Pruned, m.DataBytes = true, nil
		return nil
	})
}

// dropUnits makes the hidden units Absent in the map, durably, and returns the bytes of those that were Data.
func (l *Layer) dropUnits(batch []prunedPage) (int64, error) {
	l.countMu.Lock()
	defer l.countMu.Unlock()
	freed := int64(0)
	for _, p := range batch {
		before := countData(p.codes)
		for _, r := range p.hidden {
			setCodes(p.codes, int(r.unit%pageUnits), int(r.n), block.Absent)
		}
		if _, err := l.f.WriteAt(p.codes, l.sb.Map.Off+p.page*pageBytes); err != nil {
			l.startCount(0, false) // nobody knows which pages were written
			return 0, err
		}
		freed += (before - countData(p.codes)) * unitBytes
	}
	l.data.Add(-freed / unitBytes)
	if err := l.f.Sync(); err != nil {
		l.fail()
		return 0, err
	}
	return freed, nil
}
