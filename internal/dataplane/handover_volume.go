package dataplane

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/export"
	"ashlar/internal/export/blockdev"
	"ashlar/internal/replica"
	"ashlar/internal/volume"
)

// stateGiven is a slot's state while its volume is with another process; nobody outside sees it.
const stateGiven = "given"

// maxPassedConns bounds the connections of one volume in a hand-over.
const maxPassedConns = 1 << 16

// passedVolume is a volume on its way from one process to the other. Whoever has it last closes its files.
type passedVolume struct {
	entry openEntry
	lock  *os.File // of the replica; nil if it is not open
	conns []passedConn
}

// passedConn is a client's connection, between two requests.
type passedConn struct {
	front string
	state json.RawMessage
	file  *os.File
}

// drop closes what was not taken out. To a client whose connection has no other descriptor left it is the end.
func (v *passedVolume) drop() {
	if v.lock != nil {
		v.lock.Close() //nolint:errcheck // a copy
	}
	for _, c := range v.conns {
		c.file.Close() //nolint:errcheck // a copy, or given up
	}
	v.lock, v.conns = nil, nil
}

// passVolume sends a volume and its connections. The files stay the caller's.
func (c *peer) passVolume(v *passedVolume) error {
	if err := c.send(frame{Kind: kindVolume, Entry: &v.entry, Conns: len(v.conns), file: v.lock}); err != nil {
		return err
	}
	for _, pc := range v.conns {
		if err := c.send(frame{Kind: kindConn, Front: pc.front, State: pc.state, file: pc.file}); err != nil {
			return err
		}
	}
	return nil
}

// receiveVolume receives the rest of a volume of which f is the first frame, which it owns.
func (c *peer) receiveVolume(f frame) (*passedVolume, error) {
	v := &passedVolume{lock: f.file}
	if f.Entry == nil || f.Conns < 0 || f.Conns > maxPassedConns {
		v.drop()
		return nil, fmt.Errorf("%w: a volume without an entry, or with %d connections", errFrame, f.Conns)
	}
	v.entry = *f.Entry
	if err := checkOpen(v.entry.Open); err != nil {
		v.drop()
		return nil, fmt.Errorf("%w: %w", errFrame, err)
	}
	for range f.Conns {
		pc, err := c.expect(kindConn)
		if err == nil && pc.file == nil {
			err = fmt.Errorf("%w: a connection without its descriptor", errFrame)
		}
		if err != nil {
			v.drop()
			return nil, err
		}
		v.conns = append(v.conns, passedConn{front: pc.Front, state: pc.State, file: pc.file})
	}
	return v, nil
}

// give passes a volume, whose slot's token the caller has, and returns how long nobody served it and how many connections went along. A volume that the other side
// refused, or that could not be let go, is served here again, with its connections, when give returns ErrRefused. After any other error nobody knows
// what the other side did with the connections: ours are closed, and v.out says that it has the volume.
func (p *Process) give(ctx context.Context, to *peer, v *given) (pause time.Duration, conns int, err error) {
	p.prepare(ctx, v.s)
	start := time.Now()
	if err := p.detachDevice(ctx, v.s); err != nil {
		return 0, 0, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	out, err := p.letGoOf(ctx, v.s)
	defer out.drop()
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrRefused, err)
	} else {
		v.entry = out.entry
		if err = to.passVolume(out); err == nil {
			_, err = to.expect(kindTook)
		}
	}
	switch {
	case err == nil:
		v.out = true
		return time.Since(start), len(out.conns), nil
	case !errors.Is(err, ErrRefused):
		v.out = true
		return 0, 0, err
	}
	if _, backErr := p.takeInto(ctx, v.s, out); backErr != nil {
		v.out = true // it is opened again like what the other side had
		err = errors.Join(err, backErr)
	}
	return 0, 0, err
}

// prepare does while guests still run what would take time while they wait: it makes what was written durable, as the one who opens the volume next does, and lets clients that are just
// connecting come in.
func (p *Process) prepare(ctx context.Context, s *slot) {
	s.mu.Lock()
	vol, a := s.vol, s.args
	s.mu.Unlock()
	if a.Frontend == frontendNBD {
		p.nbd.Quiesce(ctx, a.Volume)
	}
	if vol == nil || isFar(a) { // a replica that stays open where it is has nothing to make durable for this
		return
	}
	if err := vol.Device().Flush(); errors.Is(err, block.ErrFailed) {
		p.noteFailure(s, err)
	}
}

// letGoOf stops a volume's frontends between two requests and closes its engine and replica, but keeps the replica's lock. When it fails the volume is closed all the same, and
// what it returns can be opened again.
func (p *Process) letGoOf(ctx context.Context, s *slot) (*passedVolume, error) {
	s.mu.Lock()
	vol, rep := s.vol, s.rep
	out := &passedVolume{entry: s.entry}
	out.entry.Open = s.args
	s.mu.Unlock()
	var lockErr error
	if vol != nil {
		out.lock, lockErr = rep.lock()
	}
	s.liftLimits()
	out.conns = p.detachFronts(ctx, out.entry.Open)
	err := lockErr
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	ctx, cancelFar := rep.patient(ctx, p.cfg.far.last)
	defer cancelFar()
	s.change(func(s *slot) { s.vol, s.rep, s.dev, s.state = nil, nil, nil, stateGiven })
	if vol != nil {
		endErr := vol.HandOver(ctx)
		if endErr != nil && rep.far != nil { // requests that waited for its node are asked again, by clients whose connections were cut
			p.log.Warn("a volume is handed over without its replica's node", "volume", out.entry.Open.Volume, "error", endErr)
			endErr = nil
		}
		err = errors.Join(err, endErr, rep.close())
	}
	// A failure that was noted meanwhile goes along.
	s.mu.Lock()
	out.entry.Failed = s.entry.Failed
	s.mu.Unlock()
	return out, err
}

// takeInto opens a volume that was passed, exports it, and goes on with its connections; the caller has the slot's token. When it fails the connections are still in v, and no byte of
// them was touched.
func (p *Process) takeInto(ctx context.Context, s *slot, v *passedVolume) (replica.Writer, error) {
	e := v.entry
	e.Open.Salvage = false // was for once
	if e.Failed != "" {
		s.change(func(s *slot) { s.args = e.Open })
		p.failSlot(ctx, s, e, fmt.Errorf("%s: %w", e.Failed, volume.ErrNeedsSalvage))
	} else {
		s.change(func(s *slot) { s.lock = v.lock })
		v.lock = nil
		err := p.bringUp(ctx, s, e)
		if left := s.inherited(); left != nil {
			err = errors.Join(err, left.Close())
		}
		if isFar(e.Open) && isAway(err) {
			return p.takeLater(s, v, err), nil
		}
		if err != nil {
			return replica.Writer{}, err
		}
	}
	conns := v.conns
	v.conns = nil
	p.adoptFronts(ctx, e.Open, conns)
	s.mu.Lock()
	defer s.mu.Unlock()
	return replica.Writer{Epoch: s.entry.Epoch, Session: s.entry.Session}, nil
}

// takeLater takes a volume whose replica's node is away: it is opened when that answers, as after a death of the giver; its clients connect again, and wait.
func (p *Process) takeLater(s *slot, v *passedVolume, why error) replica.Writer {
	v.drop()
	e := v.entry
	e.Open.Salvage = false
	s.change(func(s *slot) { s.err = why })
	p.wg.Go(func() {
		if s.take(p.life) != nil {
			return
		}
		if _, state, _ := s.look(); state != stateOpening { // given back, or closed
			s.give()
			return
		}
		p.reopenSlot(s, e)
	})
	return replica.Writer{Epoch: e.Epoch, Session: e.Session}
}

// inherited returns the replica's lock that was passed, once.
func (s *slot) inherited() *os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.lock
	s.lock = nil
	return f
}

// detachPatience bounds how long a client that takes no replies, or a disk that is stuck, may keep the others of its volume waiting.
const detachPatience = 5 * time.Second

// detachDevice ends serving a volume's block device: its users wait in the kernel, and the holder has the descriptor that the next one goes on with. It comes before anything is let
// go: a device that cannot be detached is served on here, and two processes must never answer the requests of one descriptor.
func (p *Process) detachDevice(ctx context.Context, s *slot) error {
	a, _, _ := s.look()
	if a.Frontend != frontendBlockdev {
		return nil
	}
	s.liftLimits()
	ctx, cancel := context.WithTimeout(ctx, detachPatience)
	defer cancel()
	err := p.blockdev.Detach(ctx, a.Volume)
	if err != nil && !errors.Is(err, blockdev.ErrNotFound) {
		s.restoreLimits()
		return err
	}
	return nil
}

// detachFronts stops a volume's NBD export between two requests, and returns its connections. Afterwards the volume is not exported here. Connections that cannot be passed on
// are cut, which is no reason to keep the volume.
func (p *Process) detachFronts(ctx context.Context, a client.OpenVolume) (out []passedConn) {
	ctx, cancel := context.WithTimeout(ctx, detachPatience)
	defer cancel()
	var err error
	if a.Frontend == frontendNBD {
		var conns []export.Passed
		conns, err = p.nbd.Detach(ctx, a.Volume)
		for _, c := range conns {
			out = append(out, passedConn{front: frontendNBD, state: c.State, file: c.File})
		}
	}
	if err != nil {
		p.log.Warn("clients that cannot be handed over connect again", "volume", a.Volume, "error", err)
	}
	return out
}

// adoptFronts goes on with connections of a volume that is exported. One that cannot be gone on with is closed: its client connects again.
func (p *Process) adoptFronts(_ context.Context, a client.OpenVolume, conns []passedConn) {
	for _, c := range conns {
		var err error
		switch c.front {
		case frontendNBD:
			err = p.nbd.Adopt(a.Volume, c.file, c.state)
		default:
			err = errors.Join(fmt.Errorf("%w: a connection of %.20q", errFrame, c.front), c.file.Close())
		}
		if err != nil {
			p.log.Warn("a connection was not taken over; its client connects again", "volume", a.Volume, "error", err)
		}
	}
}
