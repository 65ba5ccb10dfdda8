package layer

import (
	"errors"
	"fmt"
	"slices"
)

// Seal makes the head a sealed layer, durable with everything that was written to it, in one fdatasync. edit (may be nil) sets the header's
// Snapshot or Image in the same stroke; it must not change ID, State, Settled, Sums or Failed. The caller holds writes: one that comes all the same is refused with
// block.ErrReadOnly, until PushHead. If Seal fails the layer has failed (block.ErrFailed), and after it is opened again it is a head or sealed.
func (s *Stack) Seal(edit func(*Meta)) error {
	if err := s.lock(); err != nil {
		return fmt.Errorf("layer: seal: %w", err)
	}
	defer s.unlock()
	v := s.view.Load()
	w := v.writer
	if w == nil {
		return fmt.Errorf("layer: seal: no head: %w", ErrState)
	}
	if err := w.seal(edit); err != nil {
		return fmt.Errorf("layer: seal: %w", err)
	}
	sealed := *v
	sealed.writer = nil
	s.view.Store(&sealed)
	w.close()
	return nil
}

// seal stops all writing and makes the header say sealed.
func (w *writer) seal(edit func(*Meta)) error {
	w.ckptMu.Lock()
	defer w.ckptMu.Unlock()
	w.flushMu.Lock()
	defer w.flushMu.Unlock()
	if err := w.usable(); err != nil {
		return err
	}
	w.l.countMu.Lock()
	defer w.l.countMu.Unlock()
	w.stop()
	err := w.l.changeMeta(func(m *Meta) error {
		before := *m
		if edit != nil {
			edit(m)
		}
		if m.ID != before.ID || m.State != before.State || m.Settled || m.Sums || m.Failed || m.Pruned || m.DataBytes != nil {
			return ErrState
		}
		m.State = StateSealed
		return nil
	})
	switch {
	case err == nil:
		// Only now: a map page that reached the medium before the log records behind it would promise units that are not there.
		if err := w.writePages(w.log.touchedPages(-1), false); err != nil {
			return w.broke("seal: write map", err)
		}
		w.log.wake()
	case w.l.failed.Load():
		return w.broke("seal", err)
	default:
		w.stopped.Store(false) // the header was refused: the head goes on
	}
	return err
}

// stop refuses all further writes, and returns when none is under way.
func (w *writer) stop() {
	for i := range w.s.stripes {
		w.s.stripes[i].Lock()
	}
	w.stopped.Store(true)
	for i := range w.s.stripes {
		w.s.stripes[i].Unlock()
	}
}

// PushHead puts a fresh head, created beforehand and at least as large, on top of a sealed stack, in memory only, and retains it. Size is the
// new head's from then on; the caller holds I/O with a Gate. ErrState if the top is not sealed, or h is no fresh head.
func (s *Stack) PushHead(h *Layer) error {
	if err := s.lock(); err != nil {
		return fmt.Errorf("layer: push head: %w", err)
	}
	defer s.unlock()
	v := s.view.Load()
	if v.writer != nil || h.readOnly || h.sealed.Load() || h.sb.SizeBytes < v.sizeBytes || !v.layers[v.chain[0]].sealed.Load() {
		return fmt.Errorf("layer: push head %s of %d bytes on %d: %w", h.sb.ID, h.sb.SizeBytes, v.sizeBytes, ErrState)
	}
	if len(v.layers) > s.limits.maxSlots {
		return s.renumber(v, h)
	}
	n := &view{layers: append(slices.Clip(v.layers), h), chain: append([]int{len(v.layers)}, v.chain...), table: v.table, sizeBytes: h.sb.SizeBytes}
	if n.sizeBytes > v.sizeBytes {
		n.table = v.table.grown(n.sizeBytes)
	}
	w, err := newWriter(s, h, n.chain[0], n.table)
	if err != nil {
		return err
	}
	n.writer = w
	h.Retain()
	s.view.Store(n)
	return nil
}

// renumber is PushHead when all slots have been used: the layers get new ones, and the map in memory is loaded afresh, which is
// possible now because the maps of all sealed layers on disk are complete.
func (s *Stack) renumber(v *view, h *Layer) error {
	layers := []*Layer{h}
	for _, slot := range v.chain {
		layers = append(layers, v.layers[slot])
	}
	if len(layers) > s.limits.maxSlots {
		return fmt.Errorf("layer: push head: stack of %d layers; at most %d: %w", len(layers), s.limits.maxSlots, ErrState)
	}
	n, err := s.newView(layers)
	if err != nil {
		return err
	}
	h.Retain()
	s.view.Store(n)
	s.sums.forget()
	return nil
}

// ReplaceMerged puts merged in the place of those it was made of, uppermost first and neighbours in this stack, and releases them. I/O goes on. The headers stay as they are: the
// caller gives the uppermost one's children their new Parent.
func (s *Stack) ReplaceMerged(old []*Layer, merged *Layer) error {
	if err := s.lock(); err != nil {
		return fmt.Errorf("layer: replace merged layers: %w", err)
	}
	defer s.unlock()
	v := s.view.Load()
	at := slices.IndexFunc(v.chain, func(slot int) bool { return v.layers[slot] == old[0] })
	ok := at >= 0 && at+len(old) <= len(v.chain) && merged.sealed.Load() && merged.sb.SizeBytes == old[0].sb.SizeBytes
	for i := 0; ok && i < len(old); i++ {
		ok = v.layers[v.chain[at+i]] == old[i]
	}
	if !ok {
		return fmt.Errorf("layer: replace %s and %d below it by %s: not neighbours, or not sealed: %w", old[0].sb.ID, len(old)-1, merged.sb.ID, ErrState)
	}
	n := *v
	n.layers = slices.Clone(v.layers)
	for slot, l := range n.layers {
		if slices.Contains(old, l) {
			n.layers[slot] = merged
		}
	}
	n.chain = slices.Delete(slices.Clone(v.chain), at+1, at+len(old))
	merged.Retain()
	s.view.Store(&n)
	var errs []error
	for _, l := range old {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}
