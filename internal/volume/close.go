package volume

import (
	"context"
	"errors"
	"fmt"

	"ashlar/internal/block"
)

// Close cancels a verb under way (it is finished or undone by whatever comes next), stops I/O, flushes, records that nobody writes any more (the detach), and closes the copies. It is done even when it returns an error: nothing is
// served afterwards. With ErrUnreachable, or after a crash in between, the record still names this writer, which the next open takes as a writer that died.
// Once ctx has ended it waits for no copy any more, whatever that is doing. Called again it does nothing.
func (v *Volume) Close(ctx context.Context) error {
	return v.stop(ctx, leaveForGood)
}

// Suspend is Close without the detach: the record keeps its writer, so that this node, in the same boot, can Resume without the catalogue while its guests wait.
func (v *Volume) Suspend(ctx context.Context) error {
	return v.stop(ctx, leaveFlushed)
}

// HandOver is Suspend without the flush, for a successor on this boot that Resumes at once: what was not flushed stays so, as when this process is killed, except that no
// I/O is cut off in the middle.
func (v *Volume) HandOver(ctx context.Context) error {
	return v.stop(ctx, leaveToSuccessor)
}

// Abandon is Close without anything that would wait: I/O and verbs under way end with block.ErrClosed, nothing is flushed, and the record goes on naming this writer, which the next open takes as one that died.
// It is for a copy that does not answer; a Close that waits for that ends with block.ErrClosed.
func (v *Volume) Abandon() error {
	return v.stop(context.Background(), leaveAtOnce)
}

// leaving is how a volume is given up.
type leaving int

const (
	leaveForGood     leaving = iota // flushed and detached
	leaveFlushed                    // to whoever resumes it some time
	leaveToSuccessor                // to one that resumes it now
	leaveAtOnce                     // as if killed
)

func (v *Volume) stop(ctx context.Context, how leaving) error {
	detach := how == leaveForGood
	v.mu.Lock()
	if v.closed {
		v.mu.Unlock()
		if how == leaveAtOnce { // whoever closes it waits no longer
			for _, r := range v.copies {
				r.Close() //nolint:errcheck // he closes it, too
			}
		}
		return nil
	}
	v.closed = true
	v.mu.Unlock()
	v.cancel()
	v.bg.Wait()
	if how == leaveAtOnce {
		return v.closeCopies(nil)
	}
	// A copy that does not answer would hold up verbs, I/O and the flush for as long as that lasts.
	defer context.AfterFunc(ctx, func() {
		for _, r := range v.copies {
			r.Close() //nolint:errcheck // it is closed below, too
		}
	})()

	var errs []error
	token := v.acquire(ctx)
	if token == nil {
		defer v.release()
	}
	errs = append(errs, token)
	if detach && token == nil && v.down() == nil {
		errs = append(errs, v.settleForGood(ctx))
	}
	drained := v.drain(ctx, how)
	errs = append(errs, drained)
	if detach && token == nil && (drained == nil || v.down() != nil) {
		errs = append(errs, v.detach(ctx))
	}
	return v.closeCopies(errs)
}

// closeCopies is the end of every way to stop; errs are what went wrong before.
func (v *Volume) closeCopies(errs []error) error {
	v.end(StateClosed, fmt.Errorf("volume %s: %w", v.cfg.Name, block.ErrClosed))
	errs = append(errs, v.gate.Close())
	for _, r := range v.copies {
		if err := r.Close(); !errors.Is(err, block.ErrClosed) { // it may have been closed because ctx ended
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close volume %s: %w", v.cfg.Name, err)
	}
	return nil
}

// settleForGood finishes what is pending, so that a detached volume's record has one chain.
func (v *Volume) settleForGood(ctx context.Context) error {
	err := v.settle(ctx)
	for range verbTries {
		if !errors.Is(err, errMoved) {
			break
		}
		if err = v.keep(ctx); err == nil {
			err = v.settle(ctx)
		}
	}
	return err
}

// drain lets the I/O under way end, flushes unless a successor goes on, and answers ErrClosed to what comes later. A volume that has ended otherwise is left as it is.
func (v *Volume) drain(ctx context.Context, how leaving) error {
	if v.down() != nil {
		return nil
	}
	if err := v.gate.Hold(ctx); err != nil {
		return fmt.Errorf("wait for I/O under way: %w", err)
	}
	defer v.gate.Release()
	if how != leaveToSuccessor {
		for i, r := range v.copies {
			err := r.Flush()
			if errors.Is(err, block.ErrClosed) { // by who gave it up: that it failed nobody said
				return fmt.Errorf("not flushed: replica %s did not answer: %w", v.cfg.Replicas[i].ID, errors.Join(err, context.Cause(ctx)))
			}
			if err != nil {
				return v.verbError(i, "flush", fmt.Errorf("%w: %w", block.ErrFailed, err))
			}
		}
	}
	v.end(StateClosed, fmt.Errorf("volume %s: %w", v.cfg.Name, block.ErrClosed))
	return nil
}

// detach swaps the writer out of the record, and a failure into it.
func (v *Volume) detach(ctx context.Context) error {
	var failure error
	if e := v.ended.Load(); e != nil && e.state == StateFenced {
		return nil // the record is another writer's
	} else if e != nil && e.state == StateLost {
		return nil // the next open finds a writer that died and a copy that was booted again, and that is how it was
	} else if e != nil && e.state == StateFailed {
		failure = e.err
	}
	var err error
	for range verbTries {
		if err = v.refresh(ctx); err != nil {
			return err
		}
		next := v.book.rec
		if failure != nil {
			if next, err = FailMember(next, v.cfg.Replicas[0].ID, failure.Error(), v.cfg.Now()); err != nil {
				return err
			}
		}
		if err = v.swap(ctx, Released(next, v.cfg.Now())); !errors.Is(err, errMoved) {
			break
		}
	}
	if err != nil {
		return err
	}
	if err := v.keep(ctx); err != nil && failure == nil {
		return err
	}
	return nil
}
