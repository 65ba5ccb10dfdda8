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
// It returns the bytes of the Data units it freed. Cancelled or failed half way, it has done a part of it.
func (s *Stack) Prune(ctx context.Context, l *Layer) (int64, error) {
	l.workMu.Lock()
	defer l.workMu.Unlock()
	m := l.Meta()
	if !m.Settled || m.Snapshot == nil || !m.Snapshot.Removed || l.readOnly {
		return 0, fmt.Errorf("layer %s: prune: not settled and removed: %w", l.sb.ID, ErrState)
	}
	// The header that says removed may have been found at opening, left by a process that died before it was durable.
	if err := l.f.Sync(); err != nil {
		l.fail()
		return 0, fmt.Errorf("layer %s: prune: %w", l.sb.ID, mapError(err))
	}
	freed := int64(0)
	var batch []prunedPage
	for page := int64(0); page < l.mapPages(); page++ {
		if err := ctx.Err(); err != nil {
			return freed, err
		}
		p, err := s.findHidden(l, page)
		if err != nil {
			return freed, fmt.Errorf("layer %s: prune: %w", l.sb.ID, err)
		}
		if p != nil {
			batch = append(batch, *p)
		}
		if len(batch) == pruneBatch || len(batch) > 0 && page == l.mapPages()-1 {
			n, err := s.pruneBatch(l, batch)
			freed += n
			if err != nil {
				return freed, fmt.Errorf("layer %s: prune: %w", l.sb.ID, mapError(err))
			}
			batch = batch[:0]
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
func (s *Stack) pruneBatch(l *Layer, batch []prunedPage) (int64, error) {
	if err := s.Flush(); err != nil {
		return 0, err
	}
	freed := int64(0)
	for _, p := range batch {
		for _, r := range p.hidden {
			for u := r.unit; u < r.unit+r.n; u++ {
				if codeAt(p.codes, int(u%pageUnits)) == block.Data {
					freed += unitBytes
				}
			}
			setCodes(p.codes, int(r.unit%pageUnits), int(r.n), block.Absent)
		}
		if _, err := l.f.WriteAt(p.codes, l.sb.Map.Off+p.page*pageBytes); err != nil {
			return 0, err
		}
	}
	if err := l.f.Sync(); err != nil {
		l.fail()
		return 0, err
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
