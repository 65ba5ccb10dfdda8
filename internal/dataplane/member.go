package dataplane

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
	"ashlar/internal/replica/remote"
	"ashlar/internal/volume"
)

// How long another node is waited for when there is nothing to be gained by more: at the end of something, and by a question how it is.
const (
	farLastPatience = 3 * time.Second
	farAskPatience  = 2 * time.Second
)

// farTimes are how long a replica on another node is waited for, and how often it is looked at.
type farTimes struct {
	beat, silence time.Duration // see remote.Config; zero: its own
	open          time.Duration // to be opened; then it is tried again
	close         time.Duration // by a close, which is done all the same afterwards
	last          time.Duration // by a close that is forced, a suspension, a hand-over
	ask           time.Duration // by questions how it is
	look, confirm time.Duration // how often it is looked whether it answers, and it is asked whether this is still its writer
}

// defaults fills in what is not given.
func (f farTimes) defaults() farTimes {
	d := farTimes{beat: f.beat, silence: f.silence, open: 10 * time.Second, close: 30 * time.Second, last: farLastPatience, ask: farAskPatience, look: time.Second, confirm: 5 * time.Second}
	for _, t := range []struct {
		given time.Duration
		to    *time.Duration
	}{{f.open, &d.open}, {f.close, &d.close}, {f.last, &d.last}, {f.ask, &d.ask}, {f.look, &d.look}, {f.confirm, &d.confirm}} {
		if t.given > 0 {
			*t.to = t.given
		}
	}
	return d
}

// member is the one replica that a volume stands on: this node's, shared with whoever else has it open, or another node's.
type member struct {
	replica.Replica              // the connection of the volume
	held            *heldReplica // nil: another node's
	far             *remote.Replica
	node            string // of far
}

// isFar tells whether a volume's replica is another node's.
func isFar(a client.OpenVolume) bool { return a.ReplicaNode != "" && a.ReplicaNode != a.Node }

// reach opens a volume's replica, here or on its node.
func (p *Process) reach(ctx context.Context, s *slot, a client.OpenVolume) (*member, error) {
	if isFar(a) {
		ctx, cancel := context.WithTimeout(ctx, p.cfg.far.open)
		defer cancel()
		far, err := remote.Open(ctx, remote.Config{ReplicaID: a.ReplicaID, VolumeID: a.VolumeID, Dial: p.cluster.dial(a.ReplicaNode), Beat: p.cfg.far.beat, Silence: p.cfg.far.silence,
			Codes: farCodes(), Log: p.log})
		if err == nil && a.Salvage {
			// Only the process that opens its files can go on with what is left of them; once it did, the decision holds for everybody.
			var st replica.Status
			if st, err = far.Status(ctx); err == nil && st.Failed != "" {
				err = fmt.Errorf("%s: %w", st.Failed, layer.ErrSalvage)
			}
			if err != nil {
				err = errors.Join(err, far.Close())
			}
		}
		if errors.Is(err, layer.ErrSalvage) {
			err = fmt.Errorf("attach the volume once on that node, with salvage: %w", err)
		}
		if err != nil {
			return nil, fmt.Errorf("replica %s on node %s: %w", a.ReplicaID, a.ReplicaNode, err)
		}
		return &member{Replica: far, far: far, node: a.ReplicaNode}, nil
	}
	d, err := p.disk(a.DiskID)
	if err != nil {
		return nil, err
	}
	held, err := p.useReplica(ctx, d, a, s.inherited())
	if err != nil {
		return nil, err
	}
	return &member{Replica: held.Connect(), held: held}, nil
}

// close gives the replica up, once its volume has ended. The connection may be closed already.
func (m *member) close() error {
	if m.held == nil {
		m.Replica.Close() //nolint:errcheck // there is nothing behind it that could fail
		return nil
	}
	m.Replica.Close() //nolint:errcheck // it only ends the connection
	return m.held.release()
}

// lock returns a copy of the descriptor that has the replica's lock, to be passed to another process; nil for another node's, which has none here.
func (m *member) lock() (*os.File, error) {
	if m.held == nil {
		return nil, nil
	}
	return m.held.Lock()
}

// away says since when and why the replica's node does not answer; "" while it does.
func (m *member) away() string {
	if m == nil || m.far == nil {
		return ""
	}
	since, err := m.far.Away()
	if since.IsZero() {
		return ""
	}
	return fmt.Sprintf("node %s does not answer since %s: %v", m.node, since.UTC().Format(time.RFC3339), err)
}

// patient bounds what is done at a replica that may be away for as long as it likes; another's ctx is as it was.
func (m *member) patient(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if m == nil || m.far == nil {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, d)
}

// flush flushes a volume; a replica whose node falls silent meanwhile is given up when ctx ends.
func (m *member) flush(ctx context.Context, vol *volume.Volume) error {
	defer context.AfterFunc(ctx, func() { m.Replica.Close() })() //nolint:errcheck // whoever called closes the volume
	err := vol.Device().Flush()
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// blame says of an error that came of patience which had run out that the node is away.
func (m *member) blame(err error) error {
	if m.far == nil || err == nil || !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("replica's node %s: %w: %w", m.node, remote.ErrAway, err)
}

// isAway tells of errors that pass by themselves when the catalogue, or a replica's node, answers again.
func isAway(err error) bool {
	return errors.Is(err, volume.ErrUnreachable) || errors.Is(err, remote.ErrAway) || errors.Is(err, remote.ErrBusy)
}

// watchFar follows a replica on another node until its volume ends: State tells whether it answers, what it said last of itself, and that another writer came, also while no guest asks for anything.
func (p *Process) watchFar(s *slot, vol *volume.Volume, m *member) {
	args, _, _ := s.look()
	tick := time.NewTicker(p.cfg.far.look)
	defer tick.Stop()
	told := ""
	for asked := time.Now(); ; {
		select {
		case <-p.life.Done():
			return
		case <-vol.Ended():
			return
		case <-tick.C:
		}
		now := m.away()
		if (now == "") != (told == "") {
			p.log.Warn("replica's node", "volume", args.Volume, "node", m.node, "away", now)
			p.board.bump()
		}
		if told = now; now != "" || time.Since(asked) < p.cfg.far.confirm {
			continue
		}
		ctx, cancel := context.WithTimeout(p.life, p.cfg.far.ask)
		if vol.Confirm(ctx) == nil {
			p.lookFar(ctx, s, vol)
		}
		cancel()
		asked = time.Now()
	}
}

// lookFar keeps what the replica says of itself, for State, which never asks another node.
func (p *Process) lookFar(ctx context.Context, s *slot, vol *volume.Volume) {
	if st, err := vol.Status(ctx); err == nil {
		s.change(func(s *slot) {
			if s.vol == vol {
				s.seen = st
			}
		})
	}
}
