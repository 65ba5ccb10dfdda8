package remote

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/nbd"
	"ashlar/internal/replica"
)

// How long to wait between attempts to connect.
const (
	retryFirst = 20 * time.Millisecond
	retryMost  = time.Second
)

var (
	// errSilent: nothing was heard from the peer for too long.
	errSilent = errors.New("the other node is silent")
	// errEnded: the peer let this connection do nothing more: another one of ours has taken its place, a newer writer came, or the replica was closed there.
	errEnded = errors.New("the other node ended the connection's use")
)

// final is an error after which a line is not connected again.
type final struct{ error }

// Unwrap returns what it is.
func (f final) Unwrap() error { return f.error }

// wireEnd is one connection of a line.
type wireEnd struct {
	c      *nbd.Client
	writer replica.Writer // as on the wire; of a Replica's line

	once  sync.Once
	given chan struct{} // closed once it was given up
	why   error         // written before given is closed
}

func newEnd(c *nbd.Client, w replica.Writer) *wireEnd {
	return &wireEnd{c: c, writer: w, given: make(chan struct{})}
}

// line is an NBD connection that is made anew when it breaks or falls silent.
//
//	          open                      broken, silent, given up
//	(none) ─────────▶ connected ────────────────────────────────▶ away ──┐
//	                      ▲                                        │  ▲  │ connect failed: wait, again
//	                      └──────────── connected ─────────────────┤  └──┘
//	                                                               ▼
//	                      close, or connect said final: over, for good
//
// Calls wait while it is away, and are made again on the next connection when theirs breaks.
type line struct {
	// connect makes a connection; a final error ends the line. It is never called twice at once.
	connect       func(ctx context.Context) (*wireEnd, error)
	name          string // for the log
	beat, silence time.Duration
	log           *slog.Logger

	cur    atomic.Pointer[wireEnd] // nil while away or over
	life   context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex    // guards the rest
	over   error         // why nothing can be called any more
	turned chan struct{} // closed, and replaced, whenever cur or over changed
	since  time.Time     // away since; zero while connected
	why    error         // the last reason for being away
}

func newLine(cfg Config, name string, connect func(ctx context.Context) (*wireEnd, error)) *line {
	l := &line{connect: connect, name: name, beat: cfg.Beat, silence: cfg.Silence, log: cfg.Log, turned: make(chan struct{})}
	l.life, l.cancel = context.WithCancel(context.Background())
	return l
}

// open connects for the first time, trying until ctx ends, and keeps the line from then on.
func (l *line) open(ctx context.Context) error {
	ctx, stop := l.within(ctx)
	defer stop()
	end, err := l.persist(ctx)
	if err != nil {
		l.finish(err)
		return err
	}
	l.wg.Go(func() { l.keep(end) })
	return nil
}

// within is ctx, ended by close too.
func (l *line) within(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(l.life, func() { cancel(block.ErrClosed) })
	return ctx, func() { stop(); cancel(nil) }
}

// persist connects until it succeeds, a final error comes, or ctx ends.
func (l *line) persist(ctx context.Context) (*wireEnd, error) {
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		end, err := l.connect(ctx)
		if err == nil {
			l.turn(end, nil)
			return end, nil
		}
		var f final
		if errors.As(err, &f) {
			return nil, f.error
		}
		if ctx.Err() == nil {
			l.turn(nil, err)
		}
		if err := rest(ctx, wait); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrAway, errors.Join(err, l.reason()))
		}
	}
}

// rest waits for d, or until ctx ends.
func rest(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// turn makes end the connection, or says why there is none.
func (l *line) turn(end *wireEnd, why error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.turnLocked(end, why)
}

// turnLocked is turn for who holds mu.
func (l *line) turnLocked(end *wireEnd, why error) {
	if l.over != nil {
		return // whoever has end closes it
	}
	l.cur.Store(end)
	switch {
	case end != nil:
		l.since, l.why = time.Time{}, nil
	case l.since.IsZero():
		l.since = time.Now()
		fallthrough
	default:
		l.why = why
	}
	close(l.turned)
	l.turned = make(chan struct{})
}

// finish ends the line for good; the first reason counts.
func (l *line) finish(why error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over == nil {
		l.over = why
		l.cur.Store(nil)
		close(l.turned)
	}
	l.cancel()
}

// close ends the line and waits until its connection is closed.
func (l *line) close(why error) {
	l.finish(why)
	l.wg.Wait()
}

// reason is why the line is away.
func (l *line) reason() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.why
}

// away tells since when there has been no connection.
func (l *line) away() (time.Time, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.since, l.why
}

// keep watches the line's connection, and makes another when it breaks.
func (l *line) keep(end *wireEnd) {
	for {
		why := l.watch(end)
		l.giveUp(end, why)
		_ = end.c.Close() // that it was lost already is what brought us here
		if l.life.Err() != nil {
			return
		}
		l.log.Info("connection to another node lost", "name", l.name, "why", why)
		var err error
		if end, err = l.persist(l.life); err != nil {
			l.finish(err)
			return
		}
		if l.life.Err() != nil { // closed meanwhile
			_ = end.c.Close()
			return
		}
	}
}

// giveUp ends the use of a connection, so that calls wait for the next one.
func (l *line) giveUp(end *wireEnd, why error) {
	end.once.Do(func() {
		end.why = why
		close(end.given)
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cur.Load() == end {
		l.turnLocked(nil, why)
	}
}

// watch returns why the connection cannot be used any more. When nothing was heard for a beat the peer is asked for a sign of life.
func (l *line) watch(end *wireEnd) error {
	tick := time.NewTicker(l.beat)
	defer tick.Stop()
	heard, since := end.c.Heard(), time.Now()
	asked := false
	for {
		select {
		case <-l.life.Done():
			return block.ErrClosed
		case <-end.given:
			return end.why
		case <-end.c.Dead():
			return nbd.ErrDisconnected
		case <-tick.C:
		}
		now := time.Now()
		switch h := end.c.Heard(); {
		case h != heard:
			heard, since, asked = h, now, false
		case !asked:
			since, asked = now, true
			l.wg.Go(func() { _ = end.c.Ping() }) // what it brings is heard
		case now.Sub(since) >= l.silence:
			return fmt.Errorf("for %v: %w", now.Sub(since), errSilent)
		}
	}
}

// wait returns the connection, waiting for one until ctx ends.
func (l *line) wait(ctx context.Context) (*wireEnd, error) {
	for {
		if end := l.cur.Load(); end != nil {
			return end, nil
		}
		l.mu.Lock()
		over, turned, end := l.over, l.turned, l.cur.Load()
		l.mu.Unlock()
		switch {
		case over != nil:
			return nil, over
		case end != nil:
			return end, nil
		}
		select {
		case <-turned:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", ErrAway, errors.Join(context.Cause(ctx), l.reason()))
		}
	}
}

// do calls op with a connection, again with the next one when it breaks, and returns what the peer answered at last.
func (l *line) do(op func(*nbd.Client) error) error {
	for {
		end := l.cur.Load()
		if end == nil {
			var err error
			if end, err = l.wait(context.Background()); err != nil { // the line's end ends the wait
				return err
			}
		}
		err := op(end.c)
		if err == nil {
			return nil
		}
		err, again := judge(err)
		if !again {
			return err
		}
		l.giveUp(end, err)
	}
}

// judge tells an error that the peer answered, in our words, from one that only ends a connection.
func judge(err error) (error, bool) {
	var errno nbd.Errno
	if !errors.As(err, &errno) {
		switch {
		case errors.Is(err, block.ErrRange), errors.Is(err, block.ErrAlign), errors.Is(err, block.ErrReadOnly), errors.Is(err, block.ErrFailed):
			return err, false // never sent
		}
		return err, true
	}
	far, ours := fromErrno(errno)
	switch {
	case !ours && errno == nbd.ESHUTDOWN:
		return errEnded, true
	case !ours:
		return fmt.Errorf("%w: %w", errFar, err), false
	case errors.Is(far, block.ErrFenced), errors.Is(far, block.ErrClosed):
		return errEnded, true // whether for good, the next connection finds out
	}
	return far, false
}
