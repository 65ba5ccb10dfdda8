package agent_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
)

// host is what of a node survives its data process: the disks, and what was open. It is the in-memory twin of the data process's files.
type host struct {
	fabric
	mu     *sync.Mutex          // of all hosts of a fabric
	disks  map[string]*fakeDisk // by path
	open   map[string]client.OpenVolume
	epochs map[string]uint64 // of what is open
	ledger client.Ledger     // the agent's
	truth  *catalog.Mem      // to see what the records say at the moment of a deed
	wrongs []string          // what must never happen and did
	deeds  map[string]int
	order  []string // operations, as they took effect
	proc   *process
	starts int
	files  map[string]int // files that exports have made
	cut    int            // streams to clients end after so many pieces; 0: they do not
	refuse bool           // what is uploaded is refused
	// fault may fail a verb before it does anything (early) or after it did.
	fault func(ctx context.Context, verb string, early bool) error
}

type fakeDisk struct {
	status   client.DiskStatus
	replicas map[string]*fakeReplica
	images   map[string]client.ImageFound
}

type fakeReplica struct {
	client.CreateReplica
	layers []client.Layer // head last
	fence  uint64         // the epoch that may write
	record json.RawMessage
	failed string
	lost   bool // its own record
}

// process is one life of the data process. It is a client.Service with the idempotency the contract asks for.
type process struct {
	h          *host
	hello      client.Hello
	dead       bool
	rev        uint64
	changed    chan struct{}
	volumes    map[string]*client.VolumeStatus
	jobs       map[string]*client.Job
	timers     []*time.Timer
	sources    map[string]client.OpenSource
	background int64
	network    client.Network
	wg         sync.WaitGroup // streams
}

var _ client.Service = (*process)(nil)

func newHost(truth *catalog.Mem) *host {
	return &host{mu: new(sync.Mutex), disks: map[string]*fakeDisk{}, open: map[string]client.OpenVolume{}, epochs: map[string]uint64{}, truth: truth, deeds: map[string]int{}, files: map[string]int{}}
}

// ensure is Config.EnsureData.
func (h *host) ensure(context.Context) (client.Service, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.proc == nil || h.proc.dead {
		h.start()
	}
	return h.proc, nil
}

// start begins a life: it reopens what was open, without asking anybody (the same boot, the same epoch).
func (h *host) start() {
	h.starts++
	p := &process{
		h: h, rev: 1, changed: make(chan struct{}), volumes: map[string]*client.VolumeStatus{}, jobs: map[string]*client.Job{},
		sources: map[string]client.OpenSource{},
		hello:   client.Hello{Version: "1", APIMin: 1, APICurrent: 3, PID: 1000 + h.starts, BootID: "boot", Started: time.Now()},
	}
	h.proc = p
	for id, o := range h.open {
		if r, d := h.replica(o.ReplicaID); r != nil {
			p.volumes[id] = p.status(o, d, r, h.epochs[id])
		}
	}
}

// kill ends the life at once.
func (h *host) kill() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.proc; p != nil && !p.dead {
		p.dead = true
		for _, t := range p.timers {
			t.Stop()
		}
		close(p.changed)
	}
}

func (h *host) wrong(format string, args ...any) {
	h.wrongs = append(h.wrongs, fmt.Sprintf(format, args...))
}

func (h *host) replica(id string) (*fakeReplica, *fakeDisk) {
	for _, d := range h.disks {
		if r := d.replicas[id]; r != nil {
			return r, d
		}
	}
	for _, o := range h.others {
		for _, d := range o.disks {
			if r := d.replicas[id]; r != nil && h.reaches(o) {
				return r, d
			}
		}
	}
	return nil, nil
}

func (h *host) disk(id string) *fakeDisk {
	for _, d := range h.disks {
		if d.status.DiskID == id {
			return d
		}
	}
	return nil
}

// verb does what a verb does, under the lock, with faults on both sides of it.
func (p *process) verb(ctx context.Context, name string, fn func() error) error {
	p.h.mu.Lock()
	f := p.h.fault
	p.h.mu.Unlock()
	if f != nil {
		if err := f(ctx, name, true); err != nil {
			return err
		}
	}
	p.h.mu.Lock()
	if p.dead {
		p.h.mu.Unlock()
		return fmt.Errorf("%s: %w", name, client.ErrUnreachable)
	}
	err := fn()
	if err == nil {
		p.h.deeds[name]++
	}
	p.touch()
	p.h.mu.Unlock()
	if f != nil && err == nil {
		return f(ctx, name, false)
	}
	return err
}

// setFault changes fault while the process lives.
func (h *host) setFault(f func(ctx context.Context, verb string, early bool) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fault = f
}

// touch is called with the host's lock held.
func (p *process) touch() {
	if p.dead {
		return
	}
	p.rev++
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *process) Hello(context.Context) (client.Hello, error) { return p.hello, nil }

func (p *process) AdoptDisk(ctx context.Context, a client.Disk) (st client.DiskStatus, err error) {
	err = p.verb(ctx, "adopt-disk", func() error {
		d := p.h.disks[a.Path]
		if d == nil && a.DiskID != "" {
			return fmt.Errorf("disk %s: %w", a.DiskID, client.ErrNotFound)
		}
		if d == nil {
			d = &fakeDisk{replicas: map[string]*fakeReplica{}, images: map[string]client.ImageFound{}}
			d.status = client.DiskStatus{
				DiskID: fmt.Sprintf("%032x", p.h.salt+len(p.h.disks)+1), Path: a.Path, ClusterID: a.ClusterID, TotalBytes: 1 << 40, FreeBytes: 1 << 39,
			}
			p.h.disks[a.Path] = d
		}
		if d.status.ClusterID != a.ClusterID {
			return fmt.Errorf("disk of cluster %s: %w", d.status.ClusterID, client.ErrForeignDisk)
		}
		st = d.status
		return nil
	})
	return st, err
}

func (p *process) State(ctx context.Context) (client.State, error) { return p.WaitState(ctx, 0) }

func (p *process) WaitState(ctx context.Context, after uint64) (client.State, error) {
	for {
		p.h.mu.Lock()
		if p.dead {
			p.h.mu.Unlock()
			return client.State{}, fmt.Errorf("state: %w", client.ErrUnreachable)
		}
		if p.rev != after {
			st := p.state()
			p.h.mu.Unlock()
			return st, nil
		}
		changed := p.changed
		p.h.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return client.State{}, ctx.Err()
		}
	}
}

func (p *process) state() client.State {
	st := client.State{Rev: p.rev, Hello: p.hello, Network: p.network, Cluster: p.h.cluster}
	for _, path := range slices.Sorted(maps.Keys(p.h.disks)) {
		d := p.h.disks[path]
		s := d.status
		for _, id := range slices.Sorted(maps.Keys(d.replicas)) {
			r := d.replicas[id]
			_, open := p.volumes[r.VolumeID]
			f := client.ReplicaFound{
				ReplicaID: id, VolumeID: r.VolumeID, Volume: r.Volume, DataPath: path + "/replicas/" + id, SizeBytes: r.layers[len(r.layers)-1].SizeBytes,
				Open: open, Failed: r.failed, Record: r.record, RecordLost: r.lost,
			}
			if r.record == nil {
				f.Base = r.ImageID
				for _, l := range slices.Backward(r.layers) {
					f.Chain = append(f.Chain, l.ID)
				}
			}
			s.Replicas = append(s.Replicas, f)
		}
		for _, id := range slices.Sorted(maps.Keys(d.images)) {
			s.Images = append(s.Images, d.images[id])
		}
		st.Disks = append(st.Disks, s)
	}
	for _, id := range slices.Sorted(maps.Keys(p.volumes)) {
		v := *p.volumes[id]
		if r, _ := p.h.replica(v.ReplicaID); r != nil {
			v.Layers = slices.Clone(r.layers)
			if r.fence > v.Epoch && v.State == "open" {
				v.State, v.Code, v.Error = "failed", client.CodeFenced, "another node has it"
			}
		} else if p.h.open[id].ReplicaNode != "" {
			v.Away = "since 12:00:00: no answer"
		}
		st.Volumes = append(st.Volumes, v)
	}
	for _, id := range slices.Sorted(maps.Keys(p.jobs)) {
		st.Jobs = append(st.Jobs, *p.jobs[id])
	}
	return st
}

// recorded tells what the records say of a volume at this moment.
func (h *host) recorded(volumeID string) (w catalog.VolumeWanted, ok bool) {
	items, _, err := catalog.All[catalog.VolumeWanted](context.Background(), h.truth, catalog.KindVolume, catalog.Wanted)
	if err != nil {
		panic(err)
	}
	for _, it := range items {
		if it.Value.ID == volumeID {
			return it.Value, true
		}
	}
	return w, false
}

func (p *process) CreateReplica(ctx context.Context, a client.CreateReplica) error {
	return p.verb(ctx, "create-replica", func() error {
		d := p.h.disk(a.DiskID)
		if d == nil {
			return fmt.Errorf("disk: %w", client.ErrNotFound)
		}
		if r := d.replicas[a.ReplicaID]; r != nil {
			if r.CreateReplica != a {
				return client.ErrExists
			}
			return nil
		}
		if a.ImageID != "" {
			if _, ok := d.images[a.ImageID]; !ok {
				return fmt.Errorf("image: %w", client.ErrNotFound)
			}
		}
		if m, _, err := catalog.Read[catalog.Membership](context.Background(), p.h.truth, catalog.MembershipKey(a.VolumeID)); err != nil || m.Epoch > 0 {
			p.h.wrong("replica %s was made again although its volume was written to (%v)", a.ReplicaID, err)
		}
		d.replicas[a.ReplicaID] = &fakeReplica{CreateReplica: a, layers: []client.Layer{{ID: a.HeadID, Head: true, SizeBytes: a.SizeBytes, Created: time.Now()}}}
		return nil
	})
}

func (p *process) RebuildReplica(ctx context.Context, a client.RebuildReplica) error {
	return p.verb(ctx, "rebuild-replica", func() error {
		r, _ := p.h.replica(a.ReplicaID)
		var m catalog.Membership
		if r == nil || r.failed != "" || len(a.Record) > 0 && json.Unmarshal(a.Record, &m) != nil {
			return client.ErrCorrupt
		}
		if r.lost {
			r.lost, r.fence = false, m.Epoch
		}
		return nil
	})
}

func (p *process) DeleteReplica(ctx context.Context, a client.DeleteReplica) error {
	return p.verb(ctx, "delete-replica", func() error {
		d := p.h.disk(a.DiskID)
		if d == nil || d.replicas[a.ReplicaID] == nil {
			return nil
		}
		if p.volumes[d.replicas[a.ReplicaID].VolumeID] != nil || p.h.served(d.replicas[a.ReplicaID]) {
			return client.ErrInUse
		}
		w, ok := p.h.recorded(d.replicas[a.ReplicaID].VolumeID)
		if !ok || w.Deleted == nil && !p.h.mayDrop(w, a.ReplicaID) {
			p.h.wrong("replica %s of volume %s destroyed without a tombstone", a.ReplicaID, w.Name)
		}
		delete(d.replicas, a.ReplicaID)
		return nil
	})
}

func (p *process) status(a client.OpenVolume, d *fakeDisk, r *fakeReplica, epoch uint64) *client.VolumeStatus {
	st := &client.VolumeStatus{
		VolumeID: a.VolumeID, Volume: a.Volume, ReplicaID: a.ReplicaID, DiskID: d.status.DiskID, Frontend: a.Frontend, State: "open",
		SizeBytes: r.layers[len(r.layers)-1].SizeBytes, Epoch: epoch, Session: 1, Limits: a.Limits,
	}
	if a.Frontend != "" {
		st.Endpoint = "nbd+unix:///" + a.Volume + "?socket=/run/nbd/" + a.Volume + ".sock"
	}
	return st
}

func (p *process) OpenVolume(ctx context.Context, a client.OpenVolume) (st client.VolumeStatus, err error) {
	p.h.mu.Lock()
	ledger := p.h.ledger
	r, _ := p.h.replica(a.ReplicaID)
	failed := r != nil && r.failed != "" && !a.Salvage
	if v := p.volumes[a.VolumeID]; v != nil && v.Frontend == a.Frontend && v.ReplicaID == a.ReplicaID {
		defer p.h.mu.Unlock()
		return *v, nil
	}
	p.h.mu.Unlock()
	if r == nil && a.ReplicaNode != "" {
		return st, fmt.Errorf("replica on node %s: %w", a.ReplicaNode, client.ErrUnreachable)
	}
	if r == nil {
		return st, fmt.Errorf("replica: %w", client.ErrNotFound)
	}
	if failed {
		return st, fmt.Errorf("open: %w", client.ErrSalvage)
	}
	e, err := ledger.Read(ctx, a.VolumeID)
	if err != nil {
		return st, err
	}
	var m catalog.Membership
	if err := json.Unmarshal(e.Record, &m); err != nil {
		return st, err
	}
	m.Epoch, m.Generation, m.WriterNode = m.Epoch+1, m.Generation+1, a.Node
	m.Opened = m.Epoch
	rec, _ := json.Marshal(m)
	if _, err := ledger.Swap(ctx, client.MembershipSwap{VolumeID: a.VolumeID, Record: rec, Was: e.Rev}); err != nil {
		return st, err
	}
	err = p.verb(ctx, "open-volume", func() error {
		r, d := p.h.replica(a.ReplicaID)
		if r == nil {
			return fmt.Errorf("replica: %w", client.ErrNotFound)
		}
		if v := p.volumes[a.VolumeID]; v != nil {
			if v.Frontend != a.Frontend || v.ReplicaID != a.ReplicaID {
				return client.ErrExists
			}
			st = *v
			return nil
		}
		if w, ok := p.h.recorded(a.VolumeID); !ok || w.Deleted != nil && len(w.Tickets) > 0 {
			p.h.wrong("volume %s opened although no record wants it", a.Volume)
		}
		if r.fence >= m.Epoch {
			return fmt.Errorf("epoch %d, %d was there: %w", m.Epoch, r.fence, client.ErrFenced)
		}
		p.h.soleOpener(a)
		r.record, r.failed, r.fence = rec, "", m.Epoch
		p.volumes[a.VolumeID] = p.status(a, d, r, m.Epoch)
		p.h.open[a.VolumeID] = a
		p.h.epochs[a.VolumeID] = m.Epoch
		st = *p.volumes[a.VolumeID]
		return nil
	})
	return st, err
}

func (p *process) CloseVolume(ctx context.Context, a client.CloseVolume) error {
	return p.verb(ctx, "close-volume", func() error {
		if p.volumes[a.VolumeID] == nil {
			return nil
		}
		if r, _ := p.h.replica(p.volumes[a.VolumeID].ReplicaID); r == nil && p.h.open[a.VolumeID].ReplicaNode != "" && !a.Force {
			return client.ErrUnreachable
		}
		if _, ok := p.h.recorded(a.VolumeID); !ok {
			p.h.wrong("volume %s closed although no record names it", a.VolumeID)
		}
		delete(p.volumes, a.VolumeID)
		delete(p.h.open, a.VolumeID)
		delete(p.h.given, a.VolumeID)
		maps.DeleteFunc(p.sources, func(_ string, s client.OpenSource) bool { return s.VolumeID == a.VolumeID })
		return nil
	})
}

func (p *process) Operate(ctx context.Context, a client.Operate) (st client.VolumeStatus, err error) {
	err = p.verb(ctx, "operate", func() error {
		v := p.volumes[a.VolumeID]
		if v == nil || v.State != "open" {
			return fmt.Errorf("volume not open: %w", client.ErrNotFound)
		}
		r, _ := p.h.replica(v.ReplicaID)
		if r == nil {
			return client.ErrUnreachable
		}
		if slices.ContainsFunc(r.layers, func(l client.Layer) bool { return l.ID == a.OpID }) {
			st = *v
			return nil
		}
		err := p.effect(a, v, r)
		st = *v
		st.Layers = slices.Clone(r.layers)
		return err
	})
	return st, err
}

func (p *process) effect(a client.Operate, v *client.VolumeStatus, r *fakeReplica) error {
	at := slices.IndexFunc(r.layers, func(l client.Layer) bool { return l.Snapshot == a.Snapshot && !l.Head })
	head := &r.layers[len(r.layers)-1]
	switch a.Verb {
	case catalog.VerbSnapshot, catalog.VerbExpand:
		if at >= 0 && a.Verb == catalog.VerbSnapshot {
			return fmt.Errorf("snapshot %s: %w", a.Snapshot, client.ErrExists)
		}
		next := client.Layer{ID: a.OpID, Head: true, Parent: head.ID, SizeBytes: max(head.SizeBytes, a.SizeBytes), Created: time.Now()}
		if head.Head = false; a.Verb == catalog.VerbSnapshot {
			head.Snapshot, head.UserCreated, head.Labels = a.Snapshot, !a.System, a.Labels
		} else {
			head.Snapshot = "expand-" + a.OpID[:8]
		}
		r.layers = append(r.layers, next)
		v.SizeBytes = next.SizeBytes
	case catalog.VerbRevert:
		if v.Frontend != "" {
			return client.ErrFrontend
		}
		if at < 0 {
			return fmt.Errorf("snapshot %s: %w", a.Snapshot, client.ErrNotFound)
		}
		*head = client.Layer{ID: a.OpID, Head: true, Parent: r.layers[at].ID, SizeBytes: head.SizeBytes, Created: time.Now()} // the size stays
	case catalog.VerbSnapshotRemove:
		if at < 0 {
			return fmt.Errorf("snapshot %s: %w", a.Snapshot, client.ErrNotFound)
		}
		r.layers[at].Removed = true
	case catalog.VerbPurge:
		r.layers = slices.DeleteFunc(r.layers, func(l client.Layer) bool { return l.Removed && l.Labels[catalog.LabelReading] != "" })
	default:
		return client.ErrInvalid
	}
	p.h.deeds[a.OpID]++
	p.h.order = append(p.h.order, a.OpID)
	return nil
}

// ImportImage: the source's host says how it goes. ok: done after 2 s. flaky: fails twice, then is ok. bad: wrong checksum. evil: refused format. slow: takes an hour.
func (p *process) ImportImage(ctx context.Context, a client.ImportImage) (job client.Job, err error) {
	err = p.verb(ctx, "import-image", func() error {
		d := p.h.disk(a.DiskID)
		if d == nil {
			return client.ErrNotFound
		}
		if img, ok := d.images[a.ImageID]; ok {
			job = client.Job{ID: a.ImageID, DiskID: a.DiskID, State: "done", Image: &img}
			return nil
		}
		if j := p.jobs[a.ImageID]; j != nil && j.State == "running" {
			job = *j
			return nil
		}
		if err := p.readable(a.Source); err != nil {
			return err
		}
		p.h.deeds["import "+a.ImageID]++
		p.h.deeds["from "+a.Source]++
		j := &client.Job{ID: a.ImageID, DiskID: a.DiskID, State: "running", TotalBytes: 100}
		p.jobs[a.ImageID] = j
		if path, ok := strings.CutPrefix(a.Source, "stream+unix://"); ok {
			p.wg.Go(func() { p.receive(j, a, path) })
			job = *j
			return nil
		}
		after := 2 * time.Second
		if strings.HasPrefix(a.Source, "http://slow") {
			after = time.Hour
		}
		p.timers = append(p.timers, time.AfterFunc(after/2, func() { p.progress(j) }), time.AfterFunc(after, func() { p.end(j, a) }))
		job = *j
		return nil
	})
	return job, err
}

func (p *process) progress(j *client.Job) {
	p.h.mu.Lock()
	defer p.h.mu.Unlock()
	if j.State == "running" {
		j.DoneBytes, j.Percent = 50, 50
		p.touch()
	}
}

func (p *process) end(j *client.Job, a client.ImportImage) {
	p.h.mu.Lock()
	defer p.h.mu.Unlock()
	if p.dead || j.State != "running" {
		return
	}
	fail := func(c client.Code) { j.State, j.Code, j.Error = "failed", c, "import failed: "+string(c) }
	switch kind := strings.TrimPrefix(a.Source, "http://"); {
	case strings.HasPrefix(kind, "peer://"):
		p.fetch(j, a)
	case kind == "bad":
		fail(client.CodeChecksum)
	case kind == "evil":
		fail(client.CodeFormat)
	case p.readable(a.Source) != nil:
		fail(client.CodeSource)
	case kind == "flaky" && p.h.deeds["import "+a.ImageID] < 3:
		fail(client.CodeSource)
	default:
		j.State = "done"
		d := p.h.disk(a.DiskID)
		d.images[a.ImageID] = client.ImageFound{
			ImageID: a.ImageID, Name: a.Name, SizeBytes: 100, VirtualSizeBytes: 10 << 20, SHA512: "sum of " + a.Source, Digest: "digest", Format: "qcow2", Source: a.Source,
		}
	}
	p.touch()
}

func (p *process) CancelImport(ctx context.Context, a client.CancelImport) error {
	return p.verb(ctx, "cancel-import", func() error {
		if j := p.jobs[a.ImageID]; j != nil {
			j.State = "failed"
			delete(p.jobs, a.ImageID)
		}
		return nil
	})
}

func (p *process) DeleteImage(ctx context.Context, a client.DeleteImage) error {
	return p.verb(ctx, "delete-image", func() error {
		d := p.h.disk(a.DiskID)
		if d == nil {
			return nil
		}
		if _, ok := d.images[a.ImageID]; !ok {
			return nil
		}
		items, _, err := catalog.All[catalog.VolumeWanted](context.Background(), p.h.truth, catalog.KindVolume, catalog.Wanted)
		if err != nil {
			return err
		}
		for _, v := range items {
			if v.Value.ImageID == a.ImageID {
				p.h.wrong("image %s destroyed under volume %s", a.ImageID, v.Value.Name)
			}
		}
		images, _, err := catalog.All[catalog.ImageWanted](context.Background(), p.h.truth, catalog.KindImage, catalog.Wanted)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(images, func(i catalog.Item[catalog.ImageWanted]) bool {
			return i.Value.ID == a.ImageID && (i.Value.Deleted != nil || !slices.Contains(i.Value.Disks, a.DiskID))
		}) {
			p.h.wrong("image %s destroyed without a tombstone", a.ImageID)
		}
		delete(d.images, a.ImageID)
		delete(p.jobs, a.ImageID)
		return nil
	})
}

func (p *process) Check(ctx context.Context, a client.Check) (out client.Problems, err error) {
	err = p.verb(ctx, "check", func() error {
		r, _ := p.h.replica(a.ReplicaID)
		if r == nil {
			return client.ErrNotFound
		}
		out.Problems = []client.Problem{{Object: a.ReplicaID, What: "smells"}}
		return nil
	})
	return out, err
}

func (p *process) Shutdown(ctx context.Context, _ client.Shutdown) error {
	err := p.verb(ctx, "shutdown", func() error { return nil })
	if !errors.Is(err, client.ErrInUse) { // a block device is mounted
		p.h.kill()
	}
	return err
}

var errInjected = errors.New("injected")
