package sim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/disk"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
	"ashlar/internal/replica/remote"
	"ashlar/internal/volume"
)

// Machine is a host: its disk, and what its data process leaves behind when it dies (open.json).
type Machine struct {
	Name   string
	net    *Net
	ledger *Access
	log    *slog.Logger
	fs     *disk.Mem
	diskID string

	mu     sync.Mutex
	lives  int
	proc   *process // nil: dead
	open   map[string]entry
	fenced int // volumes that a newer writer ended
	failed []error
}

// entry is a volume in open.json.
type entry struct {
	args   client.OpenVolume
	writer replica.Writer
}

// NewMachine returns a machine with an empty disk.
func NewMachine(name string, n *Net, ledger *Access, log *slog.Logger) *Machine {
	return &Machine{Name: name, net: n, ledger: ledger, log: log, fs: disk.NewMem(disk.MemOptions{}), diskID: fmt.Sprintf("%032x", []byte(name)), open: map[string]entry{}}
}

// boot is the host's boot; it is never rebooted.
func (m *Machine) boot() string { return "boot-" + m.Name }

// Ensure is agent.Config.EnsureData: the data process, started if it is dead.
func (m *Machine) Ensure(ctx context.Context) (client.Service, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.proc == nil {
		if err := m.start(); err != nil {
			return nil, err
		}
	}
	return m.proc, nil
}

func (m *Machine) start() error {
	m.lives++
	p := &process{
		m: m, rev: 1, changed: make(chan struct{}), slots: map[string]*slot{}, locals: map[string]*shared{}, opening: newToken(),
		hello: client.Hello{Version: "sim", APIMin: client.APIMin, APICurrent: client.APICurrent, PID: m.lives, BootID: m.boot(), Started: time.Now()},
	}
	p.life, p.end = context.WithCancel(context.Background())
	p.server = remote.NewServer(remote.ServerConfig{Host: host{p}, Log: m.log})
	ln := m.net.Listen(m.Name)
	p.wg.Go(func() {
		if err := p.server.Serve(p.life, ln); err != nil && p.life.Err() == nil {
			m.note(fmt.Errorf("serve: %w", err))
		}
	})
	for id, e := range m.open {
		s := &slot{args: e.args, state: "opening", busy: newToken()}
		p.slots[id] = s
		p.wg.Go(func() { p.reopen(s, e) })
	}
	m.proc = p
	return nil
}

// note keeps what must not happen.
func (m *Machine) note(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failed = append(m.failed, err)
}

// Kill ends the data process at once: its connections break, its files are as they were.
func (m *Machine) Kill() {
	m.mu.Lock()
	p := m.proc
	m.proc = nil
	m.mu.Unlock()
	if p == nil {
		return
	}
	m.net.Break(m.Name)
	p.kill()
	m.fs.KillProcess()
}

// Device is what a guest on this machine has of a volume, and the epoch it was opened with: nil if it is not attached here.
func (m *Machine) Device(volumeID string) (dev block.Device, epoch uint64) {
	m.mu.Lock()
	p := m.proc
	m.mu.Unlock()
	if p == nil {
		return nil, 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.slots[volumeID]; s != nil && s.vol != nil && s.args.Frontend != "" {
		return s.vol.Device(), s.w.Epoch
	}
	return nil, 0
}

// process is one life of a data process. It is a client.Service, as far as agents need one here.
type process struct {
	client.Service // whatever is not here is not asked for
	m              *Machine
	hello          client.Hello
	server         *remote.Server
	life           context.Context
	end            context.CancelFunc
	wg             sync.WaitGroup

	mu      sync.Mutex
	rev     uint64
	changed chan struct{}
	cluster client.Cluster
	cid     string
	slots   map[string]*slot
	locals  map[string]*shared
	opening token // local replicas are opened and closed one at a time
}

// slot is a volume that is open, or is to be. Its fields are guarded by the process's lock.
type slot struct {
	args  client.OpenVolume
	state string
	err   error
	vol   *volume.Volume
	w     replica.Writer
	drop  func() // the replica's release
	busy  token
}

// token is a lock that may be held while its holder waits: the bubble's clock goes on meanwhile, which it does not while anybody waits for a Mutex.
type token chan struct{}

func newToken() token { return make(token, 1) }

func (t token) Lock() { t <- struct{}{} }

func (t token) Unlock() { <-t }

// shared is an open local replica and how many use it.
type shared struct {
	rep *local.Replica
	n   int
}

// host is a process as other nodes' processes know it.
type host struct{ *process }

var (
	_ client.Service = (*process)(nil)
	_ remote.Host    = host{}
)

func (p *process) touch() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rev++
	close(p.changed)
	p.changed = make(chan struct{})
}

// kill ends everything without a flush.
func (p *process) kill() {
	p.end()
	p.mu.Lock()
	slots := slices.Collect(maps.Values(p.slots))
	p.mu.Unlock()
	_ = p.server.Close() // what it says of broken connections is no news
	for _, s := range slots {
		p.mu.Lock()
		vol := s.vol
		p.mu.Unlock()
		if vol != nil {
			_ = vol.Abandon()
		}
	}
	p.touch()
	p.wg.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.locals {
		_ = l.rep.Close() // its flush is the kernel's, which goes on
	}
}

func (p *process) alive() error {
	if p.life.Err() != nil {
		return fmt.Errorf("killed: %w", client.ErrUnreachable)
	}
	return nil
}

// Hello implements client.Service.
func (p *process) Hello(context.Context) (client.Hello, error) { return p.hello, p.alive() }

// AdoptDisk implements client.Service.
func (p *process) AdoptDisk(_ context.Context, a client.Disk) (client.DiskStatus, error) {
	p.mu.Lock()
	p.cid = a.ClusterID
	p.mu.Unlock()
	p.touch()
	return p.disk(a.Path), p.alive()
}

func (p *process) disk(path string) client.DiskStatus {
	d := client.DiskStatus{DiskID: p.m.diskID, Path: path, ClusterID: p.cid, TotalBytes: 1 << 40, FreeBytes: 1 << 39}
	found, err := local.List(p.m.fs)
	if err != nil {
		d.Error, d.TotalBytes = err.Error(), 0
	}
	for _, f := range found {
		rec, _ := json.Marshal(f.Record)
		d.Replicas = append(d.Replicas, client.ReplicaFound{
			ReplicaID: f.ReplicaID, VolumeID: f.VolumeID, Volume: f.Volume, DataPath: path + "/" + f.Dir, SizeBytes: f.SizeBytes, Failed: f.Failed, Record: rec,
		})
	}
	return d
}

// State implements client.Service.
func (p *process) State(ctx context.Context) (client.State, error) { return p.WaitState(ctx, 0) }

// WaitState implements client.Service.
func (p *process) WaitState(ctx context.Context, after uint64) (client.State, error) {
	for {
		if err := p.alive(); err != nil {
			return client.State{}, err
		}
		p.mu.Lock()
		if p.rev != after {
			defer p.mu.Unlock()
			return p.stateLocked(ctx), nil
		}
		changed := p.changed
		p.mu.Unlock()
		select {
		case <-changed:
		case <-p.life.Done():
		case <-ctx.Done():
			return client.State{}, ctx.Err()
		}
	}
}

func (p *process) stateLocked(ctx context.Context) client.State {
	st := client.State{Rev: p.rev, Hello: p.hello, Cluster: p.cluster}
	if p.cid != "" {
		st.Disks = []client.DiskStatus{p.disk(diskPath)}
	}
	for _, id := range slices.Sorted(maps.Keys(p.slots)) {
		st.Volumes = append(st.Volumes, p.status(ctx, p.slots[id]))
	}
	return st
}

func (p *process) status(ctx context.Context, s *slot) client.VolumeStatus {
	st := client.VolumeStatus{
		VolumeID: s.args.VolumeID, Volume: s.args.Volume, ReplicaID: s.args.ReplicaID, DiskID: s.args.DiskID, Frontend: s.args.Frontend, State: s.state, SizeBytes: sizeBytes,
	}
	if s.err != nil {
		st.Code, st.Error = client.CodeOf(wireError(s.err)), s.err.Error()
	}
	if s.vol != nil {
		st.Epoch, st.Session = s.w.Epoch, s.w.Session
		if st.State == "open" && s.args.Frontend != "" {
			st.Endpoint = "nbd+unix:///" + s.args.Volume
		}
	}
	return st
}

// wireError is an error as the data process's wire has it.
func wireError(err error) error {
	for from, to := range map[error]error{block.ErrFenced: client.ErrFenced, block.ErrFailed: client.ErrFailed, volume.ErrUnreachable: client.ErrUnreachable, remote.ErrAway: client.ErrUnreachable,
		volume.ErrConflict: client.ErrConflict, fs.ErrNotExist: client.ErrNotFound, volume.ErrStaleCatalogue: client.ErrStaleCatalogue} {
		if errors.Is(err, from) {
			return fmt.Errorf("%w: %w", to, err)
		}
	}
	return err
}

// SetCluster implements client.Service.
func (p *process) SetCluster(_ context.Context, a client.Cluster) error {
	p.mu.Lock()
	p.cluster = a
	p.mu.Unlock()
	p.touch()
	return p.alive()
}

// SetBackground implements client.Service.
func (p *process) SetBackground(context.Context, client.Background) error { return p.alive() }

// SetLimits implements client.Service.
func (p *process) SetLimits(context.Context, client.SetLimits) error { return p.alive() }

// CreateReplica implements client.Service.
func (p *process) CreateReplica(_ context.Context, a client.CreateReplica) error {
	if err := p.alive(); err != nil {
		return err
	}
	_, err := local.Create(p.m.fs, local.CreateConfig{
		ReplicaID: a.ReplicaID, VolumeID: a.VolumeID, Volume: a.Volume, HeadID: replica.LayerID(a.ReplicaID), SizeBytes: a.SizeBytes, BootID: p.m.boot(), Created: time.Now(),
	})
	p.touch()
	return err
}

// OpenVolume implements client.Service.
func (p *process) OpenVolume(ctx context.Context, a client.OpenVolume) (client.VolumeStatus, error) {
	p.mu.Lock()
	s := p.slots[a.VolumeID]
	if s == nil {
		s = &slot{args: a, state: "opening", busy: newToken()}
		p.slots[a.VolumeID] = s
	}
	p.mu.Unlock()
	s.busy.Lock()
	defer s.busy.Unlock()
	p.mu.Lock()
	same, open := s.args == a, s.vol != nil
	st := p.status(ctx, s)
	p.mu.Unlock()
	if open {
		if !same {
			return st, client.ErrExists
		}
		return st, nil
	}
	p.m.mu.Lock()
	e, known := p.m.open[a.VolumeID]
	p.m.mu.Unlock()
	e.args = a
	err := p.bringUp(ctx, s, e)
	if err != nil && !known {
		p.mu.Lock()
		delete(p.slots, a.VolumeID)
		p.mu.Unlock()
	}
	p.touch()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status(ctx, s), wireError(err)
}

// reopen brings a volume of open.json up again, as often as it takes.
func (p *process) reopen(s *slot, e entry) {
	for wait := 50 * time.Millisecond; p.life.Err() == nil; wait = min(2*wait, 2*time.Second) {
		s.busy.Lock()
		err := error(nil)
		p.mu.Lock()
		done := s.vol != nil || p.slots[e.args.VolumeID] != s
		p.mu.Unlock()
		if !done {
			err = p.bringUp(p.life, s, e)
		}
		s.busy.Unlock()
		p.touch()
		if err == nil || !errors.Is(err, volume.ErrUnreachable) && !errors.Is(err, remote.ErrAway) && !errors.Is(err, context.DeadlineExceeded) {
			return
		}
		select {
		case <-time.After(wait):
		case <-p.life.Done():
		}
	}
}

// bringUp is what dataplane's does: the replica, the engine, open.json, the frontend.
func (p *process) bringUp(ctx context.Context, s *slot, e entry) (err error) {
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if err != nil {
			s.state, s.err = "failed", err
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	defer context.AfterFunc(p.life, cancel)()
	rep, drop, err := p.connect(ctx, e.args)
	if err != nil {
		return err
	}
	p.m.mu.Lock()
	p.m.open[e.args.VolumeID] = e
	p.m.mu.Unlock()
	vol, err := volume.Open(ctx, volume.Config{
		VolumeID: e.args.VolumeID, Name: e.args.Volume, Node: p.m.Name, BootID: p.m.boot(), Ledger: p.m.ledger,
		Replicas: []volume.Member{{ID: e.args.ReplicaID, Replica: rep}}, Resume: e.writer.Epoch > 0, GuestsGone: e.writer.Epoch == 0, Guests: e.writer.Epoch,
	})
	if err != nil {
		err = errors.Join(err, rep.Close())
		drop()
		if e.writer.Epoch == 0 {
			p.forget(e.args.VolumeID)
		}
		return err
	}
	now, _ := vol.Status(ctx) // an error is about its layers
	e.writer = now.Writer
	p.m.mu.Lock()
	p.m.open[e.args.VolumeID] = e
	p.m.mu.Unlock()
	p.mu.Lock()
	s.args, s.state, s.err, s.vol, s.w, s.drop = e.args, "open", nil, vol, e.writer, drop
	p.mu.Unlock()
	p.wg.Go(func() { p.watch(s, vol) })
	return nil
}

func (p *process) forget(volumeID string) {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	delete(p.m.open, volumeID)
}

// watch notes when a volume ends by itself.
func (p *process) watch(s *slot, vol *volume.Volume) {
	select {
	case <-p.life.Done():
		return
	case <-vol.Ended():
	}
	st, _ := vol.Status(p.life)
	if st.State == volume.StateClosed {
		return
	}
	p.m.mu.Lock()
	p.m.fenced++
	p.m.mu.Unlock()
	p.mu.Lock()
	s.state, s.err = "failed", st.Err
	p.mu.Unlock()
	p.touch()
}

// connect returns a connection to a volume's replica, here or there.
func (p *process) connect(ctx context.Context, a client.OpenVolume) (replica.Replica, func(), error) {
	if a.ReplicaNode == "" || a.ReplicaNode == p.m.Name {
		l, err := p.share(a.ReplicaID)
		if err != nil {
			return nil, nil, err
		}
		return l.rep.Connect(), func() { p.unshare(a.ReplicaID) }, nil
	}
	rep, err := remote.Open(ctx, remote.Config{
		ReplicaID: a.ReplicaID, VolumeID: a.VolumeID, Log: p.m.log,
		Dial: func(ctx context.Context) (net.Conn, error) { return p.m.net.Dial(ctx, p.m.Name, a.ReplicaNode) },
	})
	return rep, func() {}, err
}

// share opens a local replica, or joins those who have it open.
func (p *process) share(replicaID string) (*shared, error) {
	p.opening.Lock()
	defer p.opening.Unlock()
	p.mu.Lock()
	l := p.locals[replicaID]
	p.mu.Unlock()
	if l == nil {
		if err := p.alive(); err != nil {
			return nil, err
		}
		dir, err := local.Find(p.m.fs, replicaID)
		if err != nil {
			return nil, err
		}
		rep, err := local.Open(p.m.fs, dir, local.OpenConfig{BootID: p.m.boot()})
		if err != nil {
			return nil, err
		}
		l = &shared{rep: rep}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	l.n++
	p.locals[replicaID] = l
	return l, nil
}

func (p *process) unshare(replicaID string) {
	p.opening.Lock()
	defer p.opening.Unlock()
	p.mu.Lock()
	l := p.locals[replicaID]
	last := false
	if l != nil {
		l.n--
		if last = l.n == 0 && p.life.Err() == nil; last {
			delete(p.locals, replicaID)
		}
	}
	p.mu.Unlock()
	if last {
		if err := l.rep.Close(); err != nil {
			p.m.note(fmt.Errorf("close replica %s: %w", replicaID, err))
		}
	}
}

// OpenReplica implements remote.Host.
func (p host) OpenReplica(_ context.Context, replicaID string) (remote.Served, error) {
	l, err := p.share(replicaID)
	if err != nil {
		return remote.Served{}, err
	}
	return remote.Served{Connect: func() replica.Replica { return l.rep.Connect() }, Release: func() { p.unshare(replicaID) }}, nil
}

// OpenSource implements remote.Host: nobody asks.
func (p host) OpenSource(context.Context, string) (block.Device, json.RawMessage, error) {
	return nil, nil, fs.ErrNotExist
}

// CloseVolume implements client.Service.
func (p *process) CloseVolume(ctx context.Context, a client.CloseVolume) error {
	if err := p.alive(); err != nil {
		return err
	}
	p.mu.Lock()
	s := p.slots[a.VolumeID]
	p.mu.Unlock()
	if s == nil {
		return nil
	}
	s.busy.Lock()
	defer s.busy.Unlock()
	p.mu.Lock()
	vol, drop := s.vol, s.drop
	p.mu.Unlock()
	var err error
	if vol != nil && a.Force {
		err = vol.Abandon()
	} else if vol != nil {
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		err = vol.Close(ctx)
	}
	if drop != nil {
		drop()
	}
	p.forget(a.VolumeID)
	p.mu.Lock()
	delete(p.slots, a.VolumeID)
	p.mu.Unlock()
	p.touch()
	return wireError(err)
}
