package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// How long verbs under way may go on when a hand-over begins: those that can be cut short (a purge) the first, the others the second.
const (
	verbGrace    = time.Second
	verbPatience = 30 * time.Second
)

// errCutShort is why a verb's context ended.
var errCutShort = errors.New("the data process is being replaced")

// admission lets verbs in, and makes them wait while a hand-over is under way. The zero value is open.
type admission struct {
	mu      sync.Mutex      // guards the rest
	under   int             // verbs under way
	ended   bool            // the successor has everything: nobody is let in any more
	shutCh  chan struct{}   // closed when it opens again, or ends; nil while it is open
	idle    chan struct{}   // closed when the last verb under way has ended; nil while nobody waits for that
	cut     context.Context // of operations; ends when they are to be cut short
	cutting context.CancelCauseFunc
}

// enter waits until verbs are let in; it fails when they will not be, or ctx ends.
func (a *admission) enter(ctx context.Context) (cut context.Context, err error) {
	for {
		a.mu.Lock()
		shut := a.shutCh
		if a.ended {
			a.mu.Unlock()
			return nil, errCutShort
		}
		if shut == nil {
			a.under++
			if a.cut == nil {
				a.cut, a.cutting = context.WithCancelCause(context.Background())
			}
			cut = a.cut
			a.mu.Unlock()
			return cut, nil
		}
		a.mu.Unlock()
		select {
		case <-shut:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (a *admission) leave() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.under--
	a.signal()
}

// signal is called with mu held.
func (a *admission) signal() {
	if a.idle != nil && a.under == 0 {
		close(a.idle)
		a.idle = nil
	}
}

// shut lets nobody in any more and returns when those that are in have left. When they do not in time it is open again, and an error says so.
func (a *admission) shut(ctx context.Context) error {
	a.mu.Lock()
	idle := make(chan struct{})
	a.shutCh, a.idle = make(chan struct{}), idle
	a.signal()
	a.mu.Unlock()
	grace, patience := time.NewTimer(verbGrace), time.NewTimer(verbPatience)
	defer grace.Stop()
	defer patience.Stop()
	for {
		select {
		case <-idle:
			return nil
		case <-grace.C:
			a.mu.Lock()
			if a.cutting != nil {
				a.cutting(errCutShort)
			}
			a.cut, a.cutting = nil, nil
			a.mu.Unlock()
		case <-patience.C:
			a.open()
			return fmt.Errorf("a verb is under way and did not end within %v: try again when nothing is being changed", verbPatience)
		case <-ctx.Done():
			a.open()
			return ctx.Err()
		}
	}
}

// open lets verbs in again.
func (a *admission) open() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.idle = nil
	if a.shutCh != nil {
		close(a.shutCh)
		a.shutCh = nil
	}
}

// end turns everybody away for good, those that wait too.
func (a *admission) end() {
	a.mu.Lock()
	a.ended = true
	a.mu.Unlock()
	a.open()
}

// operation returns p.work's context of a verb that may be cut short, because saying it again takes it up where it was.
func (p *Process) operation(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := p.work(ctx)
	if cut := cutOf(ctx); cut != nil {
		stop := context.AfterFunc(cut, cancel)
		return ctx, func() { stop(); cancel() }
	}
	return ctx, cancel
}

// cutKey is the key of an admission's cut in a request's context.
type cutKey struct{}

func cutOf(ctx context.Context) context.Context {
	cut, _ := ctx.Value(cutKey{}).(context.Context)
	return cut
}

// doorkeeper serves next, whose questions are always answered, and whose verbs pass admission. A verb that was cut short, or cannot be let in any more, gets no answer but a closed connection: whoever said
// it says it again, to the successor.
func (p *Process) doorkeeper(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/hello", "/state", "/wait-state":
			next.ServeHTTP(w, r)
			return
		}
		cut, err := p.admit.enter(r.Context())
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		defer p.admit.leave()
		ctx, cancel := context.WithCancel(context.WithValue(r.Context(), cutKey{}, cut))
		defer cancel()
		defer context.AfterFunc(cut, cancel)()
		next.ServeHTTP(w, r.WithContext(ctx))
		if cut.Err() != nil {
			panic(http.ErrAbortHandler)
		}
	})
}
