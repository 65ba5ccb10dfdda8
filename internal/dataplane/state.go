package dataplane

import (
	"context"
	"sync"
	"time"

	"ashlar/internal/dataplane/client"
)

// board tells whoever waits that something changed.
type board struct {
	mu      sync.Mutex // guards both
	rev     uint64
	changed chan struct{} // closed and replaced at each change
	frozen  bool          // changes are not told: a hand-over is under way
}

// newBoard starts the revisions at the clock, in microseconds: so that they grow from one process to the next, and still fit into a JSON number.
func newBoard(now time.Time) *board {
	return &board{rev: uint64(now.UnixMicro()), changed: make(chan struct{})}
}

// bump makes a new revision.
func (b *board) bump() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.frozen {
		return
	}
	b.rev++
	close(b.changed)
	b.changed = make(chan struct{})
}

// freeze keeps the revision as it is until thaw, which makes a new one.
func (b *board) freeze() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.frozen = true
}

func (b *board) thaw() {
	b.mu.Lock()
	b.frozen = false
	b.mu.Unlock()
	b.bump()
}

// now returns the revision, and what is closed when there is another.
func (b *board) now() (uint64, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rev, b.changed
}

// WaitState implements client.Service.
func (p *Process) WaitState(ctx context.Context, afterRev uint64) (client.State, error) {
	for {
		rev, changed := p.board.now()
		if rev != afterRev {
			return p.State(ctx)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return client.State{}, ctx.Err()
		case <-p.life.Done(): // askers do not hold the end of the process up
			return p.State(ctx)
		}
	}
}

// State implements client.Service. The revision is read first: what changes meanwhile makes the next one.
func (p *Process) State(ctx context.Context) (client.State, error) {
	if st := p.over.frozen.Load(); st != nil { // half of the volumes may be with a successor
		return *st, nil
	}
	rev, _ := p.board.now()
	st := client.State{Rev: rev, Hello: p.hello(), Disks: []client.DiskStatus{}, Volumes: []client.VolumeStatus{}, Jobs: p.jobs()}
	st.Network, _ = p.network.look()
	st.Cluster = p.servedCluster()
	fronts := p.nbd.Stats()
	for _, s := range p.slots() {
		if _, state, _ := s.look(); state == "" {
			continue // somebody is about to open it: there is nothing to say of it yet
		}
		st.Volumes = append(st.Volumes, p.volumeStatus(ctx, s, fronts))
	}
	for _, d := range p.disks() {
		st.Disks = append(st.Disks, p.diskStatus(d, st.Volumes))
	}
	return st, nil
}

// Hello implements client.Service.
func (p *Process) Hello(context.Context) (client.Hello, error) { return p.hello(), nil }
