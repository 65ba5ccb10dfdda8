package volume

import (
	"context"
	"errors"
	"fmt"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// book is what the engine knows of its record in the catalogue.
type book struct {
	rec replica.Record
	rev Rev
	// unsure: the catalogue may hold another record than rec: the epoch was resumed without asking, or a swap got no answer and may
	// have happened, or may happen yet. refresh asks.
	unsure bool
}

// errMoved: the catalogue held a newer record of our own epoch, from a swap whose answer was lost; it is in the book now, and the verb begins anew.
var errMoved = errors.New("record moved on")

// adopt puts a record that the catalogue holds into the book.
func (v *Volume) adopt(rec replica.Record, rev Rev) {
	v.book = book{rec: rec, rev: rev}
	v.mu.Lock()
	v.seen = rec
	v.mu.Unlock()
}

// refresh makes the book sure. A record of a higher epoch ends the engine; an older one than ours proves the catalogue old.
func (v *Volume) refresh(ctx context.Context) error {
	if !v.book.unsure {
		return nil
	}
	got, rev, err := v.cfg.Ledger.Read(ctx, v.cfg.VolumeID)
	if err != nil {
		return fmt.Errorf("volume %s: read record: %w", v.cfg.Name, err)
	}
	if err := v.judge(got); err != nil {
		return err
	}
	newer := v.book.rec.Less(got)
	v.adopt(got, rev)
	if newer {
		return v.keep(ctx)
	}
	return nil
}

// judge compares a record from the catalogue with the book.
func (v *Volume) judge(got replica.Record) error {
	have := v.book.rec
	switch {
	case got.Epoch > have.Epoch:
		v.end(StateFenced, fmt.Errorf("volume %s: epoch %d has begun: %w", v.cfg.Name, got.Epoch, block.ErrFenced))
		return v.down()
	case got.Less(have), !have.Less(got) && !got.Equal(have):
		return fmt.Errorf("volume %s: catalogue has epoch %d generation %d, the engine %d and %d: %w", v.cfg.Name, got.Epoch, got.Generation,
			have.Epoch, have.Generation, ErrStaleCatalogue)
	}
	return nil
}

// swap makes next the record in the catalogue. Without an answer it reads, and decides by what it finds: next itself, and it has happened; the old
// record, and it tries once more; anything newer of our epoch is errMoved. ErrUnreachable leaves the book unsure.
func (v *Volume) swap(ctx context.Context, next replica.Record) error {
	var lost error
	for range 2 {
		rev, err := v.cfg.Ledger.Swap(ctx, next, v.book.rev)
		if err == nil {
			v.adopt(next, rev)
			return nil
		}
		if !errors.Is(err, ErrUnreachable) && !errors.Is(err, ErrConflict) {
			v.book.unsure = true
			return fmt.Errorf("volume %s: swap record: %w", v.cfg.Name, err)
		}
		lost = err
		v.book.unsure = true
		got, rev, err := v.cfg.Ledger.Read(ctx, v.cfg.VolumeID)
		if err != nil {
			return fmt.Errorf("volume %s: read record after a swap: %w", v.cfg.Name, err)
		}
		if got.Equal(next) {
			v.adopt(next, rev)
			return nil
		}
		if err := v.judge(got); err != nil {
			return err
		}
		if !got.Equal(v.book.rec) {
			v.adopt(got, rev)
			return errMoved
		}
		v.book.rev = rev // still unsure: the first swap may yet arrive
	}
	return fmt.Errorf("volume %s: swap record: %w", v.cfg.Name, lost)
}

// keep has every copy make the book's record durable: nothing that depends on a swap is answered before.
func (v *Volume) keep(ctx context.Context) error {
	for i, r := range v.copies {
		if err := r.Keep(ctx, v.writer, v.book.rec); err != nil {
			return v.verbError(i, "keep the record", err)
		}
	}
	return nil
}

// verbError judges an error of a verb said to copy i: fenced ends the engine, a failed copy fails it.
func (v *Volume) verbError(i int, what string, err error) error {
	err = fmt.Errorf("volume %s: %s: %w", v.cfg.Name, what, err)
	switch {
	case errors.Is(err, block.ErrFenced):
		v.end(StateFenced, err)
	case errors.Is(err, replica.ErrRestarted):
		return v.lose(err)
	case errors.Is(err, block.ErrFailed):
		return v.fail(i, err)
	}
	return err
}
