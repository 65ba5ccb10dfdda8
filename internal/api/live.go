package api

import (
	"context"
	"slices"
	"sync"
	"time"

	"ashlar/internal/catalog"
)

// The bounds of streams: events as they happen, and collections over websockets.
const (
	// heartbeat is how often a quiet stream shows that it lives; Config.Heartbeat may say otherwise.
	heartbeat = 15 * time.Second
	// liveGap is the least time between two answers on one stream, however much changes.
	liveGap = 100 * time.Millisecond
	// liveWrite is how long a client may take to take one answer; slower ones are dropped.
	liveWrite = 10 * time.Second
	// liveEnd is how long it has when everything ends.
	liveEnd = time.Second
	// maxStreams bounds how many there may be at once.
	maxStreams = 256
)

// live wakes streams when records change. It says that something changed, never what: a stream then looks at what is so and sends what its client does not know
// yet. So nothing queues up for a slow client, and one that comes back after a while has missed nothing. One Follow serves all streams, and runs while there are any.
type live struct {
	cat   catalog.Catalog
	ended context.Context // ends when close is called
	end   context.CancelFunc
	wg    sync.WaitGroup // streams, and Follow

	mu      sync.Mutex // guards what is below
	streams map[*stream]struct{}
	stop    context.CancelFunc // of Follow; nil while it does not run
}

// stream is one client that is told of changes.
type stream struct {
	kinds []catalog.Kind
	wake  chan struct{} // holds at most one
}

func newLive(cat catalog.Catalog) *live {
	l := &live{cat: cat, streams: map[*stream]struct{}{}}
	l.ended, l.end = context.WithCancel(context.Background())
	return l
}

// join makes a stream that is woken when a record of some kinds changes, and once at the beginning. Who joins leaves.
func (l *live) join(kinds []catalog.Kind) (*stream, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.ended.Err() != nil:
		return nil, Failure(CodeUnreachable, "this node is stopping; ask another, or again later")
	case len(l.streams) >= maxStreams:
		return nil, Failure(CodeUnreachable, "there are %d streams already, which is the limit; end some", maxStreams)
	}
	s := &stream{kinds: kinds, wake: make(chan struct{}, 1)}
	s.wake <- struct{}{}
	l.streams[s] = struct{}{}
	l.wg.Add(1)
	if l.stop == nil {
		ctx, cancel := context.WithCancel(l.ended)
		l.stop = cancel
		// It ends when ctx does, and has no other way to fail.
		l.wg.Go(func() { _ = catalog.Follow(ctx, l.cat, l.changed) })
	}
	return s, nil
}

func (l *live) leave(s *stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.streams, s)
	if len(l.streams) == 0 && l.stop != nil {
		l.stop()
		l.stop = nil
	}
	l.wg.Done()
}

// changed wakes the streams that a batch is of interest to. The first batch of a Follow holds everything, and so wakes everybody: what changed between a stream's look and
// the begin of Follow is not missed.
func (l *live) changed(b catalog.Batch) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for s := range l.streams {
		if b.Away || !b.Reset && !slices.ContainsFunc(b.Events, func(e catalog.Event) bool { return slices.Contains(s.kinds, e.Key.Kind) }) {
			continue
		}
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
	return nil
}

// close ends all streams and waits for them.
func (l *live) close() {
	l.mu.Lock()
	l.end()
	l.mu.Unlock()
	l.wg.Wait()
}

// ending is why a stream's loop ends.
type ending int

const (
	endGone     ending = iota // the client went, or is too slow
	endStopping               // the node stops
	endRefused                // its token is not good any more
)

// pump runs a stream until it ends: show sends what is new (an error ends the stream), alive shows that the stream lives. Between two shows passes gap at least.
type pump struct {
	h     *Handler
	c     *call
	s     *stream
	gap   time.Duration
	gone  <-chan struct{}
	show  func() error
	alive func() error
}

func (p *pump) run() ending {
	beat := time.NewTicker(p.h.cfg.Heartbeat)
	defer beat.Stop()
	pause := time.NewTimer(0)
	defer pause.Stop()
	wake := (<-chan struct{})(nil) // while a pause lasts nobody is listened to
	for {
		var err error
		select {
		case <-p.gone:
			return endGone
		case <-p.h.live.ended.Done():
			return endStopping
		case <-pause.C:
			wake = p.s.wake
			continue
		case <-wake:
			if !p.allowed() {
				return endRefused
			}
			err = p.show()
			wake = nil
			pause.Reset(p.gap)
		case <-beat.C:
			if !p.allowed() {
				return endRefused
			}
			err = p.alive()
		}
		if err != nil {
			return endGone
		}
	}
}

// allowed tells whether the client's token is still good. While the catalogue does not answer it is: nothing can be shown then anyway.
func (p *pump) allowed() bool {
	_, err := p.h.admit(p.c.r)
	return !isUnauthorized(err)
}
