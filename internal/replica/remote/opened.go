package remote

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// opened is a replica that the Host has open for us.
//
//	                 users > 0                  users == 0, for the linger
//	opening ──▶ in use ◀────────▶ lingering ──────────────────────────────▶ ending ──▶ gone
//	   │          └────────────────── Drop, Close ────────────────────────────▲
//	   └─ the Host failed: gone
type opened struct {
	id     string
	life   context.Context // of verbs; ended by end
	cancel context.CancelFunc
	ready  chan struct{} // closed once the Host answered
	gone   chan struct{} // closed once it was released, or was never open

	served Served          // written before ready is closed, and what follows
	watch  replica.Replica // a connection that is never let in: status, snapshots
	err    error

	// Guarded by the Server's mu.
	users   int
	linger  *time.Timer
	ending  bool
	quiet   chan struct{}  // closed when it is ending and has no users
	highest replica.Writer // the newest that came to be let in
	seat    *seat          // of the writer that was let in last; nil before
}

// seat is one writer's connection to a replica. It is closed only when no call on it is under way: a closed one counts as given up, and fencing does not wait for it.
type seat struct {
	w     replica.Writer // as on the wire
	r     replica.Replica
	users int  // guarded by the Server's mu
	over  bool // guarded by the Server's mu: somebody newer was let in, or the replica is ending
}

// acquire returns a replica, opened if it is not. Release gives it back.
func (s *Server) acquire(ctx context.Context, id string) (*opened, error) {
	if !validID(id) {
		return nil, fmt.Errorf("replica %q: %w", id, ErrUnknown)
	}
	for {
		o, how, err := s.enlist(id)
		switch {
		case err != nil:
			return nil, err
		case how == enlistFirst:
			s.open(o)
		case how == enlistLate:
			select {
			case <-o.gone:
				continue
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
		select {
		case <-o.ready:
		case <-ctx.Done():
			s.release(o)
			return nil, context.Cause(ctx)
		}
		if o.err != nil {
			s.release(o)
			return nil, o.err
		}
		return o, nil
	}
}

// enlisted is how somebody comes to use a replica.
type enlisted uint8

const (
	enlistFirst enlisted = iota // and opens it
	enlistNext
	enlistLate // it is ending: not counted in
)

// enlist finds or makes the entry of a replica, and counts the caller in unless it is ending.
func (s *Server) enlist(id string) (o *opened, how enlisted, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, enlistLate, fmt.Errorf("replica %s: the server is: %w", id, block.ErrClosed)
	}
	o, how = s.opened[id], enlistNext
	switch {
	case o == nil:
		o = &opened{id: id, ready: make(chan struct{}), gone: make(chan struct{}), quiet: make(chan struct{})}
		o.life, o.cancel = context.WithCancel(s.life)
		s.opened[id], how = o, enlistFirst
	case o.ending:
		return o, enlistLate, nil
	case o.linger != nil:
		o.linger.Stop()
	}
	o.users++
	return o, how, nil
}

// open has the Host open a replica.
func (s *Server) open(o *opened) {
	o.served, o.err = s.cfg.Host.OpenReplica(o.life, o.id)
	if o.err == nil {
		o.watch = o.served.Connect()
	} else {
		s.mu.Lock()
		delete(s.opened, o.id)
		s.mu.Unlock()
		o.cancel()
		close(o.gone)
	}
	close(o.ready)
}

// release gives a replica back.
func (s *Server) release(o *opened) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o.users--
	switch {
	case o.users > 0:
	case o.ending:
		close(o.quiet)
	case o.err == nil:
		o.linger = time.AfterFunc(s.cfg.Linger, func() { s.expire(o) })
	}
}

// expire ends a replica that nobody uses.
func (s *Server) expire(o *opened) {
	s.mu.Lock()
	idle := o.users == 0 && !o.ending && !s.closed
	s.mu.Unlock()
	if idle {
		s.cfg.Log.Debug("nobody uses a replica any more", "replica", o.id)
		s.end(o)
	}
}

// end ends every use of a replica and releases it; it returns when that is done, whoever does it.
func (s *Server) end(o *opened) {
	<-o.ready
	s.mu.Lock()
	if o.err != nil || o.ending {
		s.mu.Unlock()
		<-o.gone
		return
	}
	o.ending = true
	if o.linger != nil {
		o.linger.Stop()
	}
	if o.users == 0 {
		close(o.quiet)
	}
	for b := range s.bytes {
		if b.uses(o) {
			b.cut()
		}
	}
	s.mu.Unlock()
	o.cancel()
	<-o.quiet
	if o.seat != nil { // nobody is left who could change it
		_ = o.seat.r.Close()
	}
	_ = o.watch.Close()
	o.served.Release()
	s.mu.Lock()
	delete(s.opened, o.id)
	s.mu.Unlock()
	close(o.gone)
}

// fence lets w in, if it is newer than any that came before, and ends the connections of older ones. A refusal comes with the newest that is known.
func (s *Server) fence(ctx context.Context, o *opened, w replica.Writer) (answer, error) {
	st, err := o.watch.Status(ctx)
	if err != nil {
		return answer{}, err
	}
	s.mu.Lock()
	if o.highest.Less(st.Writer) {
		o.highest = st.Writer
	}
	if held := o.highest; !held.Less(w) {
		s.mu.Unlock()
		err := fmt.Errorf("fence with epoch %d session %d, held by %d and %d: %w", w.Epoch, w.Session, held.Epoch, held.Session, block.ErrFenced)
		f := failureOf(err, s.cfg.Codes)
		f.Held = &held
		return answer{Failure: f}, nil
	}
	o.highest = w
	s.mu.Unlock()
	r := o.served.Connect()
	if err := r.Fence(ctx, w); err != nil {
		return answer{}, errors.Join(err, r.Close())
	}
	if st, err = r.Status(ctx); err != nil {
		return answer{}, errors.Join(err, r.Close())
	}
	size := r.Size()
	if !s.sit(o, &seat{w: w, r: r}) {
		return answer{}, errors.Join(fmt.Errorf("fence with epoch %d session %d: %w", w.Epoch, w.Session, block.ErrFenced), r.Close())
	}
	return answer{Status: &st, Size: size}, nil
}

// sit makes a writer's seat the one that is used; false if a newer one was faster.
func (s *Server) sit(o *opened, next *seat) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := o.seat
	if old != nil && next.w.Less(old.w) {
		return false
	}
	o.seat = next
	if old == nil {
		return true
	}
	old.over = true
	if old.users == 0 {
		_ = old.r.Close()
	}
	for b := range s.bytes {
		if b.sitsOn(old) {
			b.cut()
		}
	}
	return true
}

// use returns the connection of exactly the writer w, until leave. block.ErrFenced if another has the replica, or none.
func (s *Server) use(o *opened, w replica.Writer) (*seat, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o.seat == nil || o.seat.w != w {
		return nil, fmt.Errorf("replica %s: epoch %d session %d is not let in: %w", o.id, w.Epoch, w.Session, block.ErrFenced)
	}
	o.seat.users++
	return o.seat, nil
}

// leave ends the use of a seat.
func (s *Server) leave(t *seat) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t.users--
	if t.over && t.users == 0 {
		_ = t.r.Close()
	}
}
