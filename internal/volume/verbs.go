package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// A change of the chain (invariant 13), as every verb here makes it:
//
//	CAS: pending ► keep ► prepare (writes go on) ► hold ► change ► release ► CAS: commit ► keep ► answer
//
// Wherever it stops, the copy has the old chain or the new one and the record, if it says pending, names both; the next verb, open or close rolls it
// forward. The id of the new head is the caller's, and a verb that finds a layer of this id has been done before.

// verbTries bounds how often a verb begins anew because the record moved on under it, from a swap of our own whose answer had been lost.
const verbTries = 4

// verb runs do with the token, a sure book and no change pending. Close cancels its context.
func (v *Volume) verb(ctx context.Context, name string, do func(ctx context.Context, layers []replica.LayerInfo) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(v.life, cancel)()
	if err := v.acquire(ctx); err != nil {
		return err
	}
	defer v.release()
	var err error
	for range verbTries {
		if err = v.down(); err != nil {
			break
		}
		if err = v.settle(ctx); err == nil {
			var st replica.Status
			if st, err = v.copies[0].Status(ctx); err == nil {
				err = do(ctx, st.Layers)
			}
		}
		if !errors.Is(err, errMoved) {
			break
		}
		if err = v.keep(ctx); err != nil {
			break
		}
	}
	if err != nil && v.life.Err() != nil {
		err = errors.Join(block.ErrClosed, err) // that is why
	}
	if err != nil {
		return fmt.Errorf("volume %s: %s: %w", v.cfg.Name, name, err)
	}
	return nil
}

// settle makes the book sure, names this writer in it, and finishes a change that is pending in it.
func (v *Volume) settle(ctx context.Context) error {
	if err := v.refresh(ctx); err != nil {
		return err
	}
	if v.book.rec.WriterNode == "" {
		if err := v.swap(ctx, Retaken(v.book.rec, v.self(), v.cfg.Now())); err != nil {
			return err
		}
		if err := v.keep(ctx); err != nil {
			return err
		}
	}
	rec := v.book.rec
	if rec.Pending == nil {
		return nil
	}
	st, err := v.copies[0].Status(ctx)
	if err != nil {
		return err
	}
	todo, err := RollForward(rec, st.Chain)
	if err != nil {
		return err
	}
	if todo == NextChange {
		return v.finish(ctx, *rec.Pending)
	}
	if err := v.fit(ctx); err != nil { // carried out, and nobody here was told
		return err
	}
	return v.commit(ctx)
}

// fit puts a device of the copies' size into the Gate, where a change was carried out and its answer was lost.
func (v *Volume) fit(ctx context.Context) error {
	if v.copies[0].Size() == v.gate.Size() {
		return nil
	}
	if err := v.gate.Hold(ctx); err != nil {
		return fmt.Errorf("hold I/O: %w", err)
	}
	defer v.gate.Release()
	v.gate.Swap(v.newDevice())
	return nil
}

// change makes c, which follows from the book's chain, from its beginning.
func (v *Volume) change(ctx context.Context, c replica.Change) error {
	return v.changeTelling(ctx, c, nil)
}

// changeTelling is change for a merge, with progress.
func (v *Volume) changeTelling(ctx context.Context, c replica.Change, progress func(doneBytes, totalBytes int64)) error {
	if c.Verb == replica.VerbMerge { // whole and durable before any record names it
		if err := v.prepare(ctx, c, progress); err != nil {
			return err
		}
	}
	next, err := BeginChange(v.book.rec, c, v.cfg.Now())
	if err != nil {
		return err
	}
	if err := v.swap(ctx, next); err != nil {
		return err
	}
	if err := v.keep(ctx); err != nil {
		return err
	}
	return v.finish(ctx, c)
}

// finish makes c, which is pending in the book: from there on it is carried out and committed, or given up.
func (v *Volume) finish(ctx context.Context, c replica.Change) error {
	changeErr := v.prepare(ctx, c, nil)
	if changeErr == nil {
		changeErr = v.carry(ctx, c)
	}
	if changeErr == nil {
		return v.commit(ctx)
	}
	if v.down() != nil {
		return changeErr
	}
	carried, err := v.carried(ctx, c)
	switch {
	case err != nil && !errors.Is(err, block.ErrFailed) && !errors.Is(err, replica.ErrChain):
		return errors.Join(changeErr, err) // the copy could not be asked: it stays pending, and whatever comes next finishes it
	case err != nil:
		return v.fail(0, errors.Join(changeErr, err))
	case carried:
		return v.commit(ctx)
	}
	if err := v.swap(ctx, AbortChange(v.book.rec, v.cfg.Now())); err != nil {
		return errors.Join(changeErr, err)
	}
	return errors.Join(changeErr, v.keep(ctx))
}

func (v *Volume) commit(ctx context.Context) error {
	next, err := CommitChange(v.book.rec, v.cfg.Now())
	if err != nil {
		return err
	}
	if err := v.swap(ctx, next); err != nil {
		return err
	}
	return v.keep(ctx)
}

func (v *Volume) prepare(ctx context.Context, c replica.Change, progress func(doneBytes, totalBytes int64)) error {
	for i, r := range v.copies {
		if err := r.Prepare(ctx, v.writer, c, progress); err != nil {
			return v.verbError(i, "prepare "+c.Verb, err)
		}
	}
	return nil
}

// carry is the instant of a change: guests' I/O is held (a merge needs no instant), the copies change, and a device of the new size is in the Gate when it opens
// again.
func (v *Volume) carry(ctx context.Context, c replica.Change) error {
	start := time.Now()
	if c.Verb != replica.VerbMerge {
		if err := v.gate.Hold(ctx); err != nil {
			return fmt.Errorf("hold I/O: %w", err)
		}
		defer v.gate.Release()
	}
	// From here on it is the disk that decides how long it takes, not the caller.
	ctx = context.WithoutCancel(ctx)
	for i, r := range v.copies {
		if err := r.Change(ctx, v.writer, c); err != nil {
			if carried, _ := v.carried(ctx, c); !carried {
				return v.verbError(i, c.Verb, err)
			}
		}
	}
	if v.copies[0].Size() != v.gate.Size() {
		v.gate.Swap(v.newDevice())
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.stats.Changes++
	if c.Verb != replica.VerbMerge {
		v.stats.LastPause = time.Since(start)
		v.stats.MaxPause = max(v.stats.MaxPause, v.stats.LastPause)
	}
	return nil
}

// Snapshot seals the present under meta.Name and goes on with a new head of id opID. Everything written before it was called, and acknowledged, is in the
// snapshot; a flush is part of it. Repeated with the same opID it changes nothing. ErrExists if the name is taken; ErrUnreachable if the catalogue could not be asked: it may be done or
// not, and is finished or undone by whatever comes next; block.ErrNoSpace with nothing changed. Guests' I/O is held for about two fdatasyncs.
func (v *Volume) Snapshot(ctx context.Context, opID replica.LayerID, meta replica.SnapshotMeta) error {
	if err := checkLayerID(opID); err != nil {
		return fmt.Errorf("volume %s: snapshot: %w", v.cfg.Name, err)
	}
	if meta.Name == "" || meta.Name == HeadName {
		return fmt.Errorf("volume %s: snapshot name %q: %w", v.cfg.Name, meta.Name, ErrInvalid)
	}
	if meta.Created.IsZero() {
		meta.Created = v.cfg.Now()
	}
	meta.Created = meta.Created.UTC()
	return v.verb(ctx, "snapshot", func(ctx context.Context, layers []replica.LayerInfo) error {
		if hasLayer(layers, opID) {
			return nil
		}
		if _, err := findSnapshot(layers, meta.Name); err == nil {
			return fmt.Errorf("%s: %w", meta.Name, ErrExists)
		}
		return v.change(ctx, snapshotChange(v.book.rec.Chain, opID, meta))
	})
}

// HeadName is how the present is called where snapshots are listed; no snapshot may have it.
const HeadName = "volume-head"

// Expand makes the volume newSizeBytes, a multiple of 4096, by sealing the present as a system snapshot expand-SIZE and starting a larger head of id opID. The
// size it already has is no error; a smaller one is ErrInvalid.
func (v *Volume) Expand(ctx context.Context, opID replica.LayerID, newSizeBytes int64) error {
	if err := checkLayerID(opID); err != nil {
		return fmt.Errorf("volume %s: expand: %w", v.cfg.Name, err)
	}
	if newSizeBytes <= 0 || newSizeBytes%block.UnitBytes != 0 {
		return fmt.Errorf("volume %s: expand to %d bytes: %w", v.cfg.Name, newSizeBytes, ErrInvalid)
	}
	return v.verb(ctx, "expand", func(ctx context.Context, layers []replica.LayerInfo) error {
		size := v.book.rec.Chain.SizeBytes
		if newSizeBytes == size || hasLayer(layers, opID) {
			return nil
		}
		if newSizeBytes < size {
			return fmt.Errorf("from %d to %d bytes: a volume never shrinks: %w", size, newSizeBytes, ErrInvalid)
		}
		meta := replica.SnapshotMeta{Name: fmt.Sprintf("expand-%d", newSizeBytes), Created: v.cfg.Now().UTC()}
		if _, err := findSnapshot(layers, meta.Name); err == nil {
			meta.Name += "-" + string(opID[:8])
		}
		return v.change(ctx, expandChange(v.book.rec.Chain, opID, newSizeBytes, meta))
	})
}

// Revert makes the present what the snapshot reads, with a new head of id opID; what was written since the last snapshot is dropped, all snapshots stay, and the size stays. The caller
// has seen to it that no guest uses the volume. replica.ErrNoSnapshot; ErrRemoved if it is marked removed.
func (v *Volume) Revert(ctx context.Context, opID replica.LayerID, snapshot string) error {
	if err := checkLayerID(opID); err != nil {
		return fmt.Errorf("volume %s: revert: %w", v.cfg.Name, err)
	}
	return v.verb(ctx, "revert", func(ctx context.Context, layers []replica.LayerInfo) error {
		if hasLayer(layers, opID) {
			return nil
		}
		info, err := findSnapshot(layers, snapshot)
		if err != nil {
			return err
		}
		if info.Snapshot.Removed {
			return fmt.Errorf("%s: %w", snapshot, ErrRemoved)
		}
		path, err := pathOf(layers, info.ID)
		if err != nil {
			return err
		}
		return v.change(ctx, revertChange(v.book.rec.Chain, opID, path))
	})
}

// RemoveSnapshot marks a snapshot removed; Purge frees its space. It stays readable until then. Once removed it is no error; replica.ErrNoSnapshot if there is none.
func (v *Volume) RemoveSnapshot(ctx context.Context, name string) error {
	return v.verb(ctx, "remove snapshot", func(ctx context.Context, layers []replica.LayerInfo) error {
		info, err := findSnapshot(layers, name)
		if err != nil {
			return err
		}
		return v.markRemoved(ctx, info)
	})
}

// markRemoved says it to the copies also if they show it already: that may not be durable, when whoever said it was killed.
func (v *Volume) markRemoved(ctx context.Context, info replica.LayerInfo) error {
	meta := *info.Snapshot
	meta.Removed = true
	for i, r := range v.copies {
		if err := r.SetSnapshot(ctx, v.writer, info.ID, meta); err != nil {
			return v.verbError(i, "mark snapshot "+meta.Name+" removed", err)
		}
	}
	return nil
}

func hasLayer(layers []replica.LayerInfo, id replica.LayerID) bool {
	return slices.ContainsFunc(layers, func(l replica.LayerInfo) bool { return l.ID == id })
}

func findSnapshot(layers []replica.LayerInfo, name string) (replica.LayerInfo, error) {
	at := slices.IndexFunc(layers, func(l replica.LayerInfo) bool { return l.Snapshot != nil && l.Snapshot.Name == name })
	if at < 0 {
		return replica.LayerInfo{}, fmt.Errorf("%s: %w", name, replica.ErrNoSnapshot)
	}
	return layers[at], nil
}
