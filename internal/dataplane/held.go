package dataplane

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"ashlar/internal/block"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/disk"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
	"ashlar/internal/replica/remote"
)

// openReplicas are this node's replicas that are open in this process, each once, whoever uses it: a volume that is open here, and the data processes of other nodes. Each user has connections of its own,
// and the replica lets in whose epoch is the newest: so another node can fence a volume that is open here, and the other way round.
//
// All methods may be called concurrently.
type openReplicas struct {
	mu   sync.Mutex // guards all
	byID map[string]*openReplica
}

// openReplica is one of them.
type openReplica struct {
	turn chan struct{} // capacity 1: held while it is opened or closed, and while nobody may open it
	refs int           // users, and those who wait; at 0 it is forgotten

	// guarded by openReplicas.mu, changed by who has the turn
	rep    *local.Replica // nil: not open
	disk   *diskDir
	users  int
	barred int // how many want other nodes kept out
}

// heldReplica is one user's hold on an open replica.
type heldReplica struct {
	*local.Replica
	id      string
	release func() error // once
}

// errBarred: a replica is not open to other nodes for a moment.
var errBarred = fmt.Errorf("it is being deleted, or opened with salvage: %w", remote.ErrBusy)

// farCodes are the errors of this process that cross to other nodes' data processes, beside those of replica and block.
func farCodes() []remote.Code {
	return []remote.Code{{Word: "salvage", Err: layer.ErrSalvage}, {Word: "no-record", Err: disk.ErrNoRecord}, {Word: "version", Err: local.ErrVersion}}
}

// forFar adds what the other end understands: nothing of that name is here, or it has to wait.
func forFar(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %w", remote.ErrUnknown, err)
	case errors.Is(err, disk.ErrLocked):
		return fmt.Errorf("%w: %w", remote.ErrBusy, err)
	}
	return err
}

// entry returns a replica's entry, with a reference.
func (t *openReplicas) entry(id string) *openReplica {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byID == nil {
		t.byID = map[string]*openReplica{}
	}
	o := t.byID[id]
	if o == nil {
		o = &openReplica{turn: make(chan struct{}, 1)}
		t.byID[id] = o
	}
	o.refs++
	return o
}

// leave gives a reference back.
func (t *openReplicas) leave(id string, o *openReplica) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if o.refs--; o.refs == 0 {
		delete(t.byID, id)
	}
}

// use returns a replica, opened by open unless it is.
func (t *openReplicas) use(ctx context.Context, id string, d *diskDir, open func() (*local.Replica, error)) (*heldReplica, error) {
	o := t.entry(id)
	select {
	case o.turn <- struct{}{}:
	case <-ctx.Done():
		t.leave(id, o)
		return nil, fmt.Errorf("open replica %s: %w", id, context.Cause(ctx))
	}
	rep := o.rep
	if rep == nil {
		var err error
		if rep, err = open(); err != nil {
			<-o.turn
			t.leave(id, o)
			return nil, err
		}
	}
	t.mu.Lock()
	o.rep, o.disk = rep, d
	o.users++
	t.mu.Unlock()
	<-o.turn
	return &heldReplica{Replica: rep, id: id, release: sync.OnceValue(func() error { return t.unuse(id, o) })}, nil
}

// unuse ends one use; the last one closes the replica before it returns.
func (t *openReplicas) unuse(id string, o *openReplica) error {
	defer t.leave(id, o)
	o.turn <- struct{}{}
	defer func() { <-o.turn }()
	t.mu.Lock()
	rep := o.rep
	if o.users--; o.users > 0 {
		t.mu.Unlock()
		return nil
	}
	o.rep, o.disk = nil, nil
	t.mu.Unlock()
	return rep.Close()
}

// look returns an open replica, for its status; nil if it is not open.
func (t *openReplicas) look(id string) *local.Replica {
	t.mu.Lock()
	defer t.mu.Unlock()
	if o := t.byID[id]; o != nil {
		return o.rep
	}
	return nil
}

// isBarred tells whether other nodes may not open a replica now.
func (t *openReplicas) isBarred(id string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	o := t.byID[id]
	return o != nil && o.barred > 0
}

// on returns the ids of the replicas of a disk that are open.
func (t *openReplicas) on(d *diskDir) (ids []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, o := range t.byID {
		if o.disk == d {
			ids = append(ids, id)
		}
	}
	return ids
}

// bar lets no other node open a replica until the returned function is called, and takes it from those that have it.
func (p *Process) bar(id string) (unbar func()) {
	o := p.open.entry(id)
	count := func(n int) {
		p.open.mu.Lock()
		defer p.open.mu.Unlock()
		o.barred += n
	}
	count(1)
	p.cluster.drop(id)
	return func() { count(-1); p.open.leave(id, o) }
}

// seize waits until nobody has a replica open and lets nobody open it until free is called. Other nodes lose it; client.ErrInUse while a volume has it open here.
func (p *Process) seize(ctx context.Context, id string) (free func(), err error) {
	unbar := p.bar(id)
	o := p.open.entry(id)
	undo := func() { p.open.leave(id, o); unbar() }
	select {
	case o.turn <- struct{}{}:
	case <-ctx.Done():
		undo()
		return nil, fmt.Errorf("replica %s: %w", id, context.Cause(ctx))
	}
	p.open.mu.Lock()
	users := o.users
	p.open.mu.Unlock()
	free = func() { <-o.turn; undo() }
	if users > 0 {
		free()
		return nil, fmt.Errorf("replica %s: %w: it is open", id, client.ErrInUse)
	}
	return free, nil
}

// useReplica opens a replica of a disk, or shares it if it is open. It owns lock, which may be nil: the replica's, passed by another process.
func (p *Process) useReplica(ctx context.Context, d *diskDir, a client.OpenVolume, lock *os.File) (*heldReplica, error) {
	if rep := p.open.look(a.ReplicaID); a.Salvage && rep != nil {
		// Others may have it open, failed as it is: only who opens it afresh can go on with what is left.
		defer p.bar(a.ReplicaID)()
	}
	opened := false
	h, err := p.open.use(ctx, a.ReplicaID, d, func() (*local.Replica, error) {
		opened = true
		return d.openReplica(a, p.boot, lock)
	})
	if !opened && lock != nil {
		err = errors.Join(err, lock.Close()) // a copy: the replica is open under its own
	}
	return h, err
}

// farHost is the replicas and sources of this node as other nodes' data processes use them.
type farHost struct{ p *Process }

var _ remote.Host = farHost{}

// OpenReplica implements remote.Host.
func (h farHost) OpenReplica(ctx context.Context, replicaID string) (remote.Served, error) {
	p := h.p
	if !validID(replicaID) {
		return remote.Served{}, fmt.Errorf("replica %.40q: %w", replicaID, remote.ErrUnknown)
	}
	if p.open.isBarred(replicaID) {
		return remote.Served{}, fmt.Errorf("replica %s: %w", replicaID, errBarred)
	}
	d, err := p.diskOf(replicaID)
	if err != nil {
		return remote.Served{}, forFar(err)
	}
	held, err := p.useReplica(ctx, d, client.OpenVolume{ReplicaID: replicaID}, nil)
	if err != nil {
		return remote.Served{}, forFar(err)
	}
	p.board.bump()
	p.log.Info("replica is open to other nodes", "replica", replicaID)
	return remote.Served{
		Connect: func() replica.Replica { return &farConn{Conn: held.Connect(), p: p, d: d, id: replicaID} },
		Release: func() {
			if err := held.release(); err != nil {
				p.log.Error("close a replica that was open to other nodes", "replica", replicaID, "error", err)
			}
			p.rescan(d.DiskID, replicaID)
			p.board.bump()
		},
	}, nil
}

// OpenSource implements remote.Host.
func (h farHost) OpenSource(ctx context.Context, name string) (block.Device, json.RawMessage, error) {
	dev, info, err := h.p.openPeerSource(ctx, name)
	return dev, info, forFar(err)
}

// diskOf finds the disk in use that has a replica. fs.ErrNotExist.
func (p *Process) diskOf(replicaID string) (*diskDir, error) {
	for _, d := range p.disks() {
		_, err := local.Find(d.fs, replicaID)
		if err == nil {
			return d, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("replica %s is on no disk in use here: %w", replicaID, fs.ErrNotExist)
}

// farConn is a connection of another node to a replica of this one.
type farConn struct {
	*local.Conn
	p  *Process
	d  *diskDir
	id string
}

// Fence implements replica.Replica. A volume that is open here, and whose writer that ended, is told at once: its guests may not ask for anything for a long time.
func (c *farConn) Fence(ctx context.Context, w replica.Writer) error {
	if err := c.Conn.Fence(ctx, w); err != nil {
		return err
	}
	for _, s := range c.p.slots() {
		s.mu.Lock()
		vol, mine := s.vol, s.args.ReplicaID == c.id && s.rep != nil && s.rep.held != nil
		s.mu.Unlock()
		if vol != nil && mine {
			vol.Confirm(ctx) //nolint:errcheck // what it finds it acts upon
		}
	}
	return nil
}

// Prepare implements replica.Replica. Nothing that makes a layer is begun on a disk that is as good as full.
func (c *farConn) Prepare(ctx context.Context, w replica.Writer, change replica.Change, progress func(doneBytes, totalBytes int64)) error {
	if change.Verb == replica.VerbSnapshot || change.Verb == replica.VerbExpand {
		if err := c.d.room(); err != nil {
			return fmt.Errorf("%w: %w", block.ErrNoSpace, err)
		}
	}
	return c.Conn.Prepare(ctx, w, change, progress)
}

// Change implements replica.Replica.
func (c *farConn) Change(ctx context.Context, w replica.Writer, change replica.Change) error {
	err := c.Conn.Change(ctx, w, change)
	c.p.board.bump()
	return err
}
