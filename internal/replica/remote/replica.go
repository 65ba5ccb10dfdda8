package remote

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/nbd"
	"ashlar/internal/replica"
)

const (
	// pieceBytes is the largest read or write sent at once: each reply is a sign of life, so it bounds how slow a network may be.
	pieceBytes = 4 << 20
	// claims bounds how often a writer tries to come after another connection of its own.
	claims = 16
)

// errResized: the connection knows the size that the replica had before.
var errResized = errors.New("the replica has another size now")

// Replica is a replica on another node. It connects again by itself, and sends again what was not answered; while the peer is away calls wait, without a limit, until Close. When a newer
// writer has the replica, they return block.ErrFenced for good (but a Fence with a newer writer still is tried); when the peer's host was booted again and something was written since the last
// flush that covers it, ErrRestarted for good.
//
// Verbs end with their context too: then ErrAway, with the context's cause, if the peer did not answer.
type Replica struct {
	cfg    Config
	talker *talker
	life   context.Context
	cancel context.CancelCauseFunc

	size        atomic.Int64
	line        atomic.Pointer[line] // of the writer that was let in; nil before
	dirty       unflushed
	flushFailed atomic.Bool
	fencing     chan struct{} // capacity 1: holds a token while a Fence, or Close, is under way

	mu        sync.Mutex     // guards the rest
	writer    replica.Writer // whose line is, or is about to be made
	boot      string         // the peer's, at the last moment at which all that was written was flushed or nothing was
	restarted bool
	closed    bool
}

var _ replica.Replica = (*Replica)(nil)

func (r *Replica) wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("remote replica %s: %s: %w", r.cfg.ReplicaID, what, err)
}

// Away tells since when the peer has not answered, and why; the zero time while it does.
func (r *Replica) Away() (since time.Time, err error) {
	if l := r.line.Load(); l != nil {
		return l.away()
	}
	return time.Time{}, nil
}

// Close implements block.Device. It leaves the replica as it is where it is. Calls under way return block.ErrClosed.
func (r *Replica) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return r.wrap("close", block.ErrClosed)
	}
	r.closed = true
	r.mu.Unlock()
	r.cancel(block.ErrClosed)
	if l := r.line.Load(); l != nil {
		l.finish(block.ErrClosed)
	}
	r.fencing <- struct{}{} // a Fence under way sees that life has ended; the token stays
	if l := r.line.Load(); l != nil {
		l.close(block.ErrClosed)
	}
	r.talker.close()
	return nil
}

// lineNow is the line that I/O uses.
func (r *Replica) lineNow() (*line, error) {
	if l := r.line.Load(); l != nil {
		return l, nil
	}
	if r.life.Err() != nil {
		return nil, block.ErrClosed
	}
	return nil, fmt.Errorf("not let in yet: %w", block.ErrFenced)
}

// do makes one call on the line.
func (r *Replica) do(op func(*nbd.Client) error) error {
	l, err := r.lineNow()
	if err != nil {
		return err
	}
	return l.do(func(c *nbd.Client) error {
		if size := r.size.Load(); size != c.Size() {
			return errResized
		}
		return op(c)
	})
}

// whole says whether a range is whole units, and within the replica (invariant 6).
func (r *Replica) whole(off, n int64) error {
	if (off|n)&(block.UnitBytes-1) != 0 {
		return fmt.Errorf("[%d, +%d): %w", off, n, block.ErrAlign)
	}
	return block.CheckRange(off, n, r.size.Load())
}

// pieces calls do with pieces of [0, n).
func pieces(n int64, do func(from, to int64) error) error {
	for at := int64(0); at < n; at += pieceBytes {
		if err := do(at, min(at+pieceBytes, n)); err != nil {
			return err
		}
	}
	return nil
}

// ReadAt implements block.Device, at any offset.
func (r *Replica) ReadAt(p []byte, off int64) (int, error) {
	n := int64(len(p))
	err := block.CheckRange(off, n, r.size.Load())
	if err == nil {
		if n == 0 {
			return 0, r.wrap("read", r.empty())
		}
		err = pieces(n, func(from, to int64) error {
			return r.do(func(c *nbd.Client) error {
				_, err := c.ReadAt(p[from:to], off+from)
				return err
			})
		})
	}
	if err != nil {
		return 0, r.wrap("read", err)
	}
	return len(p), nil
}

// empty is what a call about nothing returns.
func (r *Replica) empty() error {
	l, err := r.lineNow()
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.over
}

// change makes a call that changes what is stored.
func (r *Replica) change(op func(*nbd.Client) error) error {
	return r.do(func(c *nbd.Client) error {
		r.dirty.begin()
		defer r.dirty.end()
		return op(c)
	})
}

// WriteAt implements block.Device, in whole units.
func (r *Replica) WriteAt(p []byte, off int64) (int, error) {
	n := int64(len(p))
	err := r.whole(off, n)
	if err == nil {
		if n == 0 {
			return 0, r.wrap("write", r.empty())
		}
		err = pieces(n, func(from, to int64) error {
			return r.change(func(c *nbd.Client) error {
				_, err := c.WriteAt(p[from:to], off+from)
				return err
			})
		})
	}
	if err != nil {
		return 0, r.wrap("write", err)
	}
	return len(p), nil
}

// Zero implements block.Device, in whole units.
func (r *Replica) Zero(off, n int64) error {
	err := r.whole(off, n)
	if err == nil && n == 0 {
		err = r.empty()
	} else if err == nil {
		err = r.change(func(c *nbd.Client) error { return c.Zero(off, n) })
	}
	return r.wrap("zero", err)
}

// Flush implements block.Device.
func (r *Replica) Flush() error {
	if r.flushFailed.Load() {
		return r.wrap("flush", block.ErrFailed)
	}
	var mark uint64
	err := r.do(func(c *nbd.Client) error {
		mark = r.dirty.mark()
		return c.Flush()
	})
	switch {
	case err == nil:
		r.dirty.clean(mark)
	case !errors.Is(err, block.ErrFenced) && !errors.Is(err, block.ErrClosed):
		r.flushFailed.Store(true)
	}
	return r.wrap("flush", err)
}

// Extents implements block.Device.
func (r *Replica) Extents(off, n int64) (list []block.Extent, err error) {
	if err = block.CheckRange(off, n, r.size.Load()); err == nil && n == 0 {
		err = r.empty()
	} else if err == nil {
		err = r.do(func(c *nbd.Client) error {
			list, err = c.Extents(off, n)
			return err
		})
	}
	return list, r.wrap("extents", err)
}

// Size implements block.Device.
func (r *Replica) Size() int64 { return r.size.Load() }

// Fence implements replica.Replica. It tries until ctx ends.
func (r *Replica) Fence(ctx context.Context, w replica.Writer) error {
	select {
	case r.fencing <- struct{}{}:
		defer func() { <-r.fencing }()
	case <-ctx.Done():
		return r.wrap("fence", context.Cause(ctx))
	case <-r.life.Done():
		return r.wrap("fence", block.ErrClosed)
	}
	again, err := r.admit(w)
	switch {
	case err != nil:
	case again:
		return r.Confirm(ctx, w)
	default:
		err = r.letIn(ctx, w)
	}
	return r.wrap("fence", err)
}

// admit decides whether w may be let in, or was already, and ends the I/O of the one before.
func (r *Replica) admit(w replica.Writer) (again bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.line.Load()
	switch {
	case r.closed:
		return false, block.ErrClosed
	case r.restarted:
		return false, ErrRestarted
	case w.Less(r.writer):
		return false, fmt.Errorf("epoch %d session %d, held by %d and %d: %w", w.Epoch, w.Session, r.writer.Epoch, r.writer.Session, block.ErrFenced)
	case w == r.writer && old != nil:
		return true, nil
	}
	return false, nil
}

// letIn makes w's line, and then w the writer: a writer that is refused leaves the one before as it was.
func (r *Replica) letIn(ctx context.Context, w replica.Writer) error {
	f := &fencer{r: r, w: w, first: true}
	l := newLine(r.cfg, "replica "+r.cfg.ReplicaID, f.connect)
	defer context.AfterFunc(r.life, func() { l.finish(block.ErrClosed) })()
	if err := l.open(ctx); err != nil {
		l.close(err)
		return err
	}
	r.mu.Lock()
	old := r.line.Swap(l)
	r.writer = w
	closed := r.closed
	r.mu.Unlock()
	if old != nil {
		old.close(block.ErrFenced)
	}
	if closed {
		l.close(block.ErrClosed)
		return block.ErrClosed
	}
	return nil
}

// fencer makes the connections of one writer's line.
type fencer struct {
	r     *Replica
	w     replica.Writer
	turn  uint64 // the number of the next connection
	first bool   // the writer was not let in yet
}

// connect fences with the next number, and connects to exactly that export. It is the line's connect.
func (f *fencer) connect(ctx context.Context) (*wireEnd, error) {
	for range claims {
		wire, ok := onWire(f.w, f.turn)
		if !ok {
			return nil, final{fmt.Errorf("epoch %d session %d has no more connections: %w", f.w.Epoch, f.w.Session, block.ErrFenced)}
		}
		f.turn++ // whatever becomes of this one, the next comes after it
		a, err := f.r.talker.ask(ctx, "fence", question{Replica: f.r.cfg.ReplicaID, Writer: &wire}, nil)
		var far *farError
		switch {
		case err == nil:
			return f.enter(ctx, wire, a)
		case !errors.As(err, &far):
			return nil, err
		case !errors.Is(far, block.ErrFenced) && f.first, errors.Is(far, block.ErrFailed):
			if errors.Is(far, block.ErrClosed) {
				return nil, err // the peer is about to open it again, or to go
			}
			return nil, final{err}
		case !errors.Is(far, block.ErrFenced):
			return nil, err // the peer may have only begun: its owner sees why, in Away
		}
		// Refused: the replica knows a number at least as high. Before we were let in it may be that of another connection of the same writer, closed or not, which we come after.
		held := a.Failure.Held
		if !f.first || held == nil || fromWire(*held) != f.w {
			return nil, final{err}
		}
		f.turn = turnAfter(f.w, *held)
	}
	return nil, final{fmt.Errorf("others come in as the same writer: %w", block.ErrFenced)}
}

// enter connects the bytes of a writer that was fenced.
func (f *fencer) enter(ctx context.Context, wire replica.Writer, a answer) (*wireEnd, error) {
	r := f.r
	if a.Status == nil || a.Status.BootID == "" || a.Size <= 0 {
		return nil, final{fmt.Errorf("fence: an answer without what was asked: %w", errFar)}
	}
	if err := r.sameBoot(a.Status.BootID, f.first); err != nil {
		return nil, final{err}
	}
	c, err := r.talker.export(ctx, exportName{kind: kindReplica, replica: r.cfg.ReplicaID, writer: wire})
	if err != nil {
		return nil, err
	}
	if c.Size() != a.Size || c.ReadOnly() {
		return nil, errors.Join(fmt.Errorf("an export of %d bytes, read-only %t, of a replica of %d: %w", c.Size(), c.ReadOnly(), a.Size, errFar), c.Close())
	}
	r.size.Store(a.Size)
	f.first = false
	return newEnd(c, wire), nil
}

// sameBoot decides what becomes of the replica when its peer answers from a boot.
func (r *Replica) sameBoot(boot string, first bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case first && !r.dirty.dirty(), boot == r.boot:
	case r.dirty.dirty():
		r.restarted = true
		return fmt.Errorf("boot %s, was %s: %w", boot, r.boot, ErrRestarted)
	}
	r.boot = boot
	return nil
}

// say says a verb as w, again on the next connection when its answer is lost: a verb that may still be under way at the peer must not take effect after a later one.
func (r *Replica) say(ctx context.Context, w replica.Writer, verb string, q question, progress func(done, total int64)) (answer, error) {
	for {
		l, err := r.lineNow()
		if err != nil {
			return answer{}, err
		}
		end, err := l.wait(ctx)
		if err != nil {
			return answer{}, err
		}
		if fromWire(end.writer) != w {
			return answer{}, fmt.Errorf("epoch %d session %d, let in as %d and %d: %w", w.Epoch, w.Session, end.writer.Epoch, end.writer.Session>>turnBits, block.ErrFenced)
		}
		q.Replica, q.Writer = r.cfg.ReplicaID, &end.writer
		inner, stop := l.within(ctx)
		a, err := r.talker.ask(inner, verb, q, progress)
		stop()
		switch {
		case err == nil:
			return a, nil
		case ctx.Err() != nil && verb == "confirm": // nothing that could take effect late
			return answer{}, fmt.Errorf("%w: %w", ErrAway, err)
		case errors.Is(err, errLost), errors.Is(err, block.ErrFenced), errors.Is(err, block.ErrClosed):
			l.giveUp(end, err)
			if ctx.Err() != nil {
				return answer{}, fmt.Errorf("%w: %w", context.Cause(ctx), err)
			}
		default:
			return answer{}, err
		}
	}
}

// look says a verb that changes nothing and needs no writer, until it is answered or ctx ends.
func (r *Replica) look(ctx context.Context, verb string, q question, progress func(done, total int64)) (answer, error) {
	q.Replica = r.cfg.ReplicaID
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(r.life, func() { cancel(block.ErrClosed) })()
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		a, err := r.talker.ask(ctx, verb, q, progress)
		if err == nil || !errors.Is(err, errLost) && !errors.Is(err, block.ErrClosed) {
			return a, err
		}
		if cause := rest(ctx, wait); cause != nil {
			if errors.Is(cause, block.ErrClosed) {
				return answer{}, cause
			}
			return answer{}, fmt.Errorf("%w: %w: %w", ErrAway, cause, err)
		}
	}
}
