package dataplane

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/block/limit"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/image"
	"ashlar/internal/job"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
	"ashlar/internal/replica/remote"
	"ashlar/internal/volume"
)

// This file copies what is ours between disks, of this node or another: replicas (docs/decisions/0017) and images. Nothing foreign is parsed, so it is work of this process, as a job that
// looks to the agent like an import.

const (
	kindCopy = "copy"
	// copyLookEvery is how often a copy asks whether it still has the volume: somebody who opened it needs the bandwidth more.
	copyLookEvery = 2 * time.Second
	// copyOpenPatience is how long the node that has the original may take to answer, and then to let the copy in; the job is asked for again.
	copyOpenPatience = 30 * time.Second
	// copyAwayPatience is how long it may then be away, and copyReadPatience how long one read may take, at a rate that may be low on either side, before the copy is given up.
	copyAwayPatience = time.Minute
	copyReadPatience = 5 * time.Minute
)

// running is what a job of this process waits for: a work process (job.Job), or work of its own.
type running interface {
	Done() <-chan struct{}
	Progress() job.Progress
	Cancel()
	Wait() (job.Result, error)
}

// ownWork is a job that this process does itself.
type ownWork struct {
	cancel context.CancelCauseFunc
	done   chan struct{}

	mu       sync.Mutex // guards progress
	progress job.Progress
	err      error // after done
}

// startOwn starts do as soon as it is its turn among all jobs. do ends soon after its context does.
func (p *Process) startOwn(do func(ctx context.Context, tell func(job.Progress)) error) *ownWork {
	ctx, cancel := context.WithCancelCause(p.life)
	w := &ownWork{cancel: cancel, done: make(chan struct{})}
	p.wg.Go(func() {
		defer close(w.done)
		defer cancel(nil)
		select {
		case p.cfg.Job.Turns <- struct{}{}:
			defer func() { <-p.cfg.Job.Turns }()
			w.err = do(ctx, w.tell)
		case <-ctx.Done():
			w.err = context.Cause(ctx)
		}
	})
	return w
}

func (w *ownWork) tell(now job.Progress) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if now.Percent >= w.progress.Percent {
		w.progress = now
	}
}

// Done implements running.
func (w *ownWork) Done() <-chan struct{} { return w.done }

// Cancel implements running.
func (w *ownWork) Cancel() { w.cancel(context.Canceled) }

// Progress implements running.
func (w *ownWork) Progress() job.Progress {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.progress
}

// Wait implements running.
func (w *ownWork) Wait() (job.Result, error) {
	<-w.done
	return job.Result{}, w.err
}

// copyPercent is the share of a copy's work that moving bytes gets.
const copyPercent = 95

// moved is the progress of moving bytes.
func moved(done, total int64) job.Progress {
	percent := copyPercent
	if total > 0 {
		percent = int(float64(done) / float64(total) * copyPercent)
	}
	return job.Progress{DoneBytes: done, TotalBytes: total, Percent: percent}
}

// copyPace holds a copy to the rate of all background work, and ends it before the disk is full: what is there already needs room.
func (d *diskDir) copyPace(ctx context.Context, n int64) error {
	if err := d.room(); err != nil {
		return err
	}
	if d.pace == nil {
		return nil
	}
	return d.pace(ctx, n)
}

// CopyReplica implements client.Service.
func (p *Process) CopyReplica(_ context.Context, a client.CopyReplica) (client.Job, error) {
	j, err := p.copyReplica(a)
	if err != nil {
		return client.Job{}, forWire(fmt.Errorf("copy replica %s of volume %s: %w", a.From, a.Volume, err))
	}
	p.board.bump()
	return j, nil
}

func (p *Process) copyReplica(a client.CopyReplica) (client.Job, error) {
	if !validID(a.VolumeID) || !validID(a.ReplicaID) || !validID(a.From) || a.From == a.ReplicaID || a.ImageID != "" && !validID(a.ImageID) || a.Node == "" || a.FromNode == "" {
		return client.Job{}, fmt.Errorf("%w: ids are 32 hex digits, and both nodes are needed", client.ErrInvalid)
	}
	if err := checkName(a.Volume); err != nil {
		return client.Job{}, err
	}
	d, err := p.disk(a.DiskID)
	if err != nil {
		return client.Job{}, err
	}
	p.importing.Lock()
	defer p.importing.Unlock()
	p.mu.Lock()
	was := p.jobByID[a.ReplicaID]
	p.mu.Unlock()
	if was != nil {
		if was.copy == nil || *was.copy != a {
			return client.Job{}, fmt.Errorf("%w: job %s is another", client.ErrExists, a.ReplicaID)
		}
		if j := p.describeJob(was); j.State != jobFailed {
			return j, nil
		}
	}
	if s := p.slot(a.VolumeID); s != nil {
		if _, state, _ := s.look(); state != "" {
			return client.Job{}, fmt.Errorf("%w: the volume is %s here", client.ErrInUse, state)
		}
	}
	m := &move{args: a, boot: p.boot, ledger: p.ledger, disk: d, reach: p.origin, met: &p.met, look: copyLookEvery, now: time.Now}
	j := &importJob{args: client.ImportImage{ImageID: a.ReplicaID, DiskID: a.DiskID}, copy: &a, run: p.startOwn(func(ctx context.Context, tell func(job.Progress)) error {
		m.progress = func(done, total int64) { tell(moved(done, total)) }
		return m.run(ctx)
	})}
	p.mu.Lock()
	p.jobByID[a.ReplicaID] = j
	p.mu.Unlock()
	p.wg.Go(func() { p.finishCopy(j) })
	return p.describeJob(j), nil
}

// finishCopy waits for a copy, which has taken the original's place, or left everything as it was.
func (p *Process) finishCopy(j *importJob) {
	p.reportProgress(j)
	_, err := j.run.Wait()
	if err != nil {
		p.log.Warn("copy of a replica failed", "volume", j.copy.Volume, "replica", j.copy.From, "of node", j.copy.FromNode, "error", err)
	} else {
		p.log.Info("replica has taken another's place", "volume", j.copy.Volume, "replica", j.copy.ReplicaID, "instead of", j.copy.From)
	}
	p.mu.Lock()
	j.ended, j.err = time.Now(), err
	p.mu.Unlock()
	p.forgetOldJobs()
	p.board.bump()
}

// copying tells whether a replica is just being made by a copy.
func (p *Process) copying(replicaID string) bool {
	j, ok := p.job(replicaID)
	return ok && j.Kind == kindCopy && j.State == jobRunning
}

// origin is a replica that is copied: its verbs, and its layers one by one. Close gives it up.
type origin interface {
	replica.Replica
	OpenLayer(ctx context.Context, id replica.LayerID) (block.Device, json.RawMessage, error)
}

// farOrigin is one on another node.
type farOrigin struct {
	*remote.Replica
	dial remote.Dial
	id   string
}

// OpenLayer implements origin.
func (o farOrigin) OpenLayer(ctx context.Context, id replica.LayerID) (block.Device, json.RawMessage, error) {
	return remote.OpenSource(ctx, o.dial, sourceLayer+"/"+o.id+"/"+string(id))
}

// nearOrigin is one on a disk of this node, shared with whoever else has it open.
type nearOrigin struct {
	*local.Conn
	held *heldReplica
}

// Close implements origin.
func (o nearOrigin) Close() error { return errors.Join(o.Conn.Close(), o.held.release()) }

// origin opens the replica that is to be copied.
func (p *Process) origin(ctx context.Context, a client.CopyReplica) (origin, error) {
	ctx, cancel := context.WithTimeout(ctx, copyOpenPatience)
	defer cancel()
	if a.FromNode != a.Node {
		dial := p.cluster.dial(a.FromNode)
		far, err := remote.Open(ctx, remote.Config{ReplicaID: a.From, VolumeID: a.VolumeID, Dial: dial, Log: p.log})
		if err != nil {
			return nil, fmt.Errorf("replica %s on node %s: %w", a.From, a.FromNode, err)
		}
		return farOrigin{far, dial, a.From}, nil
	}
	d, err := p.diskOf(a.From)
	if err != nil {
		return nil, err
	}
	held, err := p.useReplica(ctx, d, client.OpenVolume{ReplicaID: a.From}, nil)
	if err != nil {
		return nil, err
	}
	return nearOrigin{held.Connect(), held}, nil
}

// move copies a replica and puts the copy in its place. What it leaves wherever it stops:
//
//	claim, fence, open ─▶ receive ─▶ place ─▶ open the copy ─▶ swap ─▶ the copy keeps the record
//	      the original is in charge; half a replica, or one that    │  the copy is in charge,
//	      no record names, until the next attempt removes it        │  and can be opened as it is
//
// Before the swap the copy keeps the record that the original keeps, which does not name it: so one that is left where the swap failed proves nothing against the catalogue.
type move struct {
	args     client.CopyReplica
	boot     string
	ledger   volume.Ledger
	disk     *diskDir
	reach    func(ctx context.Context, a client.CopyReplica) (origin, error)
	met      *metWriters
	look     time.Duration // between two questions whether the volume is still ours
	parallel int
	progress func(doneBytes, totalBytes int64)
	now      func() time.Time
}

// run does it; it is asked for again as often as it takes. A nil error says that the record names the copy, and that it is here.
func (m *move) run(ctx context.Context) error {
	rec, named, err := m.named(ctx)
	if named || err != nil {
		return err
	}
	if rec.WriterNode != "" && rec.WriterNode != m.args.Node && !m.met.before(rec) {
		return fmt.Errorf("%w: node %s has the volume open, or died with it open", client.ErrInUse, rec.WriterNode)
	}
	src, err := m.reach(ctx, m.args)
	if err != nil {
		return err
	}
	opening, opened := context.WithTimeout(ctx, copyOpenPatience)
	defer opened()
	// No guest remembers what was not flushed: the volume is attached nowhere.
	vol, err := volume.Open(opening, volume.Config{VolumeID: m.args.VolumeID, Name: m.args.Volume, Node: m.args.Node, BootID: m.boot, Ledger: m.ledger, GuestsGone: true,
		Replicas: []volume.Member{{ID: m.args.From, Replica: src}}, Now: m.now})
	if err != nil {
		return errors.Join(err, src.Close())
	}
	before, err := m.watched(ctx, vol, src)
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), farLastPatience)
	defer cancel()
	end := vol.Close
	if since, _ := m.away(src); err != nil && !since.IsZero() {
		end = func(context.Context) error { return vol.Abandon() } // there is nobody to say anything to
	}
	closed := end(last)
	if err == nil {
		return nil // the volume has ended, and what its old copy says to its end means nothing
	}
	if named, e := m.settle(last, before.Record); named && e == nil {
		return nil
	}
	return errors.Join(err, closed)
}

// watched makes the copy and puts it in the original's place, for as long as the volume is ours and its original not away; the volume's status is that from before.
func (m *move) watched(ctx context.Context, vol *volume.Volume, src origin) (volume.Status, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	wg.Go(func() { m.watch(ctx, vol, src, cancel) })
	before, err := vol.Status(ctx)
	if err == nil {
		err = m.replace(ctx, vol, src, before)
	}
	return before, err
}

// named tells whether the copy has taken the original's place already, in the record and on the disk.
func (m *move) named(ctx context.Context) (rec replica.Record, named bool, err error) {
	rec, _, err = m.ledger.Read(ctx, m.args.VolumeID)
	if err != nil {
		return rec, false, fmt.Errorf("read record: %w", err)
	}
	if !names(rec, m.args.ReplicaID) {
		return rec, false, nil
	}
	if _, err := local.Find(m.disk.fs, m.args.ReplicaID); err != nil {
		return rec, true, fmt.Errorf("the record names it: %w", err)
	}
	return rec, true, nil
}

// metWriters are the writers, on other nodes, that copies were refused for, by volume. A copy would end one that lives, and its guests with it; who asks for copies knows that the volume is attached nowhere, but may know it
// from before somebody attached it. So the first attempt that finds a writer is refused. Who still asks after that, and finds the same one, knows that it is dead.
type metWriters struct {
	mu    sync.Mutex // guards epoch
	epoch map[string]uint64
}

// before tells whether a record's writer was met before, and remembers it.
func (w *metWriters) before(rec replica.Record) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.epoch == nil {
		w.epoch = map[string]uint64{}
	}
	if w.epoch[rec.VolumeID] == rec.Epoch {
		delete(w.epoch, rec.VolumeID)
		return true
	}
	w.epoch[rec.VolumeID] = rec.Epoch
	return false
}

func names(rec replica.Record, replicaID string) bool {
	return slices.ContainsFunc(rec.Members, func(m replica.Member) bool { return m.ReplicaID == replicaID })
}

// settle finds out, after a failure, whether the swap happened all the same; was is the record it was to replace. If it did not, and cannot any more because the record was changed otherwise, the copy is removed.
// What cannot be found out now is left to the next attempt.
func (m *move) settle(ctx context.Context, was replica.Record) (bool, error) {
	rec, _, err := m.ledger.Read(ctx, m.args.VolumeID)
	if err != nil {
		return false, err
	}
	if names(rec, m.args.ReplicaID) {
		_, err := local.Find(m.disk.fs, m.args.ReplicaID)
		return true, err
	}
	if was.VolumeID == "" || !was.Less(rec) {
		return false, nil
	}
	return false, m.clear(rec)
}

// clear removes a copy that no record named; rec is the newest. volume.ErrStaleCatalogue if it was a member once: then the catalogue is an old one, and nothing is removed.
func (m *move) clear(rec replica.Record) error {
	m.disk.change.Lock()
	defer m.disk.change.Unlock()
	dir, err := local.Find(m.disk.fs, m.args.ReplicaID)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // half a replica is removed by who makes it again
	}
	if err != nil {
		return err
	}
	f := local.Look(m.disk.fs, dir)
	switch {
	case f.VolumeID != m.args.VolumeID:
		return fmt.Errorf("replica %s is there, of volume %q: %w", m.args.ReplicaID, f.VolumeID, client.ErrExists)
	case f.Record != nil && (names(*f.Record, m.args.ReplicaID) || rec.Less(*f.Record)), f.Writer.Epoch > rec.Epoch:
		return fmt.Errorf("replica %s was a member of the volume, and the catalogue does not know: %w", m.args.ReplicaID, volume.ErrStaleCatalogue)
	}
	err = local.Delete(m.disk.fs, m.args.ReplicaID)
	m.disk.lookAgain(dir)
	return err
}

// replace makes the copy and puts it in the place of the volume's. ctx ends when the volume does.
func (m *move) replace(ctx context.Context, vol *volume.Volume, src origin, st volume.Status) error {
	if err := m.clear(st.Record); err != nil {
		return err
	}
	in, err := m.receive(ctx, src, st)
	if err != nil {
		return err
	}
	dir, err := m.place(in)
	if err != nil {
		return errors.Join(err, in.Discard())
	}
	rep, err := local.Open(m.disk.fs, dir, local.OpenConfig{BootID: m.boot, Now: m.now})
	if err != nil {
		return fmt.Errorf("open the copy: %w", err)
	}
	defer m.disk.lookAgain(dir)
	return errors.Join(m.swap(ctx, vol, st.Writer, rep), rep.Close())
}

// receive copies the layers.
func (m *move) receive(ctx context.Context, src origin, st volume.Status) (*local.Incoming, error) {
	if err := src.Count(ctx); err != nil {
		return nil, err
	}
	status, err := src.Status(ctx)
	if err != nil {
		return nil, err
	}
	if !status.Chain.Equal(st.Record.Chain) {
		return nil, fmt.Errorf("the original has generation %d, the record %d: %w", status.Chain.Generation, st.Record.Chain.Generation, replica.ErrChain)
	}
	if err := m.room(status); err != nil {
		return nil, err
	}
	c := local.ReceiveConfig{ReplicaID: m.args.ReplicaID, VolumeID: m.args.VolumeID, Volume: m.args.Volume, BootID: m.boot, Created: m.now(), Source: status, Open: src.OpenLayer,
		Writer: st.Writer, Record: st.Record, Pace: m.disk.copyPace, Parallel: m.parallel, Progress: m.progress}
	if m.args.ImageID != "" {
		c.Base = &local.Base{ID: replica.LayerID(m.args.ImageID), Path: imagePath(m.args.ImageID)}
	}
	return local.Receive(ctx, m.disk.fs, c)
}

// watch ends a copy whose volume somebody else opened, or whose original is away for long.
func (m *move) watch(ctx context.Context, vol *volume.Volume, src origin, cancel context.CancelCauseFunc) {
	tick := time.NewTicker(m.look)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-vol.Ended():
			cancel(vol.Err())
			return
		case <-tick.C:
		}
		if since, err := m.away(src); !since.IsZero() && time.Since(since) > copyAwayPatience {
			cancel(fmt.Errorf("node %s does not answer since %s: %w: %w", m.args.FromNode, since.UTC().Format(time.RFC3339), remote.ErrAway, err))
			return
		}
		ask, end := context.WithTimeout(ctx, farAskPatience)
		vol.Confirm(ask) //nolint:errcheck // if it is over, it has ended
		end()
	}
}

// away tells since when, and why, the original's node has not answered; the zero time while it does, or is this one.
func (m *move) away(src origin) (time.Time, error) {
	if far, ok := src.(interface{ Away() (time.Time, error) }); ok {
		return far.Away()
	}
	return time.Time{}, nil
}

// room refuses a copy that would fill the disk, before a byte of it is moved.
func (m *move) room(st replica.Status) error {
	need := int64(0)
	for _, l := range st.Layers {
		need += max(0, l.DataBytes)
	}
	return m.disk.roomForCopy(need)
}

// roomForCopy refuses to begin what needs more than is free, with what is there already in mind: client.ErrNoSpace. What the disk cannot tell is no reason.
func (d *diskDir) roomForCopy(need int64) error {
	total, free, err := d.fs.Usage()
	if err != nil || need+reserveOf(total) <= free {
		return nil
	}
	return fmt.Errorf("disk %s: %w: the copy needs %d bytes, what is there %d, and %d are free", d.path, client.ErrNoSpace, need, reserveOf(total), free)
}

// place makes what was received a replica, while its image is there to stay.
func (m *move) place(in *local.Incoming) (string, error) {
	m.disk.change.Lock()
	defer m.disk.change.Unlock()
	if m.args.ImageID != "" {
		if _, _, err := layer.Inspect(m.disk.fs, imagePath(m.args.ImageID)); err != nil {
			return "", fmt.Errorf("image %s: %w", m.args.ImageID, err)
		}
	}
	return in.Place()
}

// swap puts the copy, which is open, in the original's place.
func (m *move) swap(ctx context.Context, vol *volume.Volume, w replica.Writer, rep *local.Replica) error {
	st, err := rep.Status()
	if err != nil {
		return err
	}
	conn := rep.Connect()
	if err := conn.Fence(ctx, w); err != nil {
		return err
	}
	rec, err := vol.Replace(ctx, replica.Member{ReplicaID: m.args.ReplicaID, Node: m.args.Node, Incarnation: m.boot}, st.Chain)
	if err != nil {
		return err
	}
	// Whoever opens it next has it keep a later one before anything rests on it.
	return conn.Keep(context.WithoutCancel(ctx), w, rec)
}

// The first words of the names of what other nodes may read; docs/formats/remote.md.
const (
	sourceImage = "image"
	sourceLayer = "layer"
)

// openPeerSource opens what another node asks to read, at the rate of background work; info is a local.LayerHeader. fs.ErrNotExist.
func (p *Process) openPeerSource(ctx context.Context, name string) (block.Device, json.RawMessage, error) {
	dev, info, err := p.peerSource(ctx, name)
	if errors.Is(err, client.ErrNotFound) {
		err = fmt.Errorf("%w: %w", fs.ErrNotExist, err) // which other nodes know
	}
	if err != nil {
		return nil, nil, fmt.Errorf("source %.100q: %w", name, err)
	}
	return limit.Behind(dev, p.background), info, nil
}

func (p *Process) peerSource(ctx context.Context, name string) (block.Device, json.RawMessage, error) {
	parts := strings.Split(name, "/")
	if len(parts) != 3 || !validID(parts[1]) || !validID(parts[2]) {
		return nil, nil, fmt.Errorf("%w: there are %s/DISKID/IMAGEID and %s/REPLICAID/LAYERID", client.ErrInvalid, sourceImage, sourceLayer)
	}
	switch parts[0] {
	case sourceImage:
		d, err := p.disk(parts[1])
		if err != nil {
			return nil, nil, err
		}
		return d.imageSource(parts[2])
	case sourceLayer:
		return p.layerSource(ctx, parts[1], replica.LayerID(parts[2]))
	}
	return nil, nil, fmt.Errorf("%w: no such kind of source", client.ErrInvalid)
}

// imageSource opens an image with its checksums. It may be deleted meanwhile; who has it open reads on.
func (d *diskDir) imageSource(imageID string) (block.Device, json.RawMessage, error) {
	if _, ok := d.image(imageID); !ok {
		return nil, nil, fmt.Errorf("image %s is not on disk %s: %w", imageID, d.DiskID, client.ErrNotFound)
	}
	l, err := layer.Open(d.fs, imagePath(imageID), layer.Options{ReadOnly: true})
	if err != nil {
		return nil, nil, err
	}
	own, err := layer.OpenOwn(l, nil)
	if err != nil {
		return nil, nil, errors.Join(err, l.Close())
	}
	h := local.LayerHeader{ID: replica.LayerID(l.ID()), SizeBytes: l.SizeBytes(), SumsBytes: own.SumsBytes(), Meta: l.Meta()}
	info, err := json.Marshal(h)
	if err = errors.Join(err, l.Close()); err != nil { // own has its own hold on it
		return nil, nil, errors.Join(err, own.Close())
	}
	return own, info, nil
}

// layerSource opens a layer of a replica of this node, and the replica for as long as that is read.
func (p *Process) layerSource(ctx context.Context, replicaID string, id replica.LayerID) (block.Device, json.RawMessage, error) {
	if p.open.isBarred(replicaID) {
		return nil, nil, fmt.Errorf("replica %s: %w", replicaID, errBarred)
	}
	d, err := p.diskOf(replicaID)
	if err != nil {
		return nil, nil, err
	}
	held, err := p.useReplica(ctx, d, client.OpenVolume{ReplicaID: replicaID}, nil)
	if err != nil {
		return nil, nil, err
	}
	dev, info, err := held.Connect().OpenLayer(ctx, id)
	if err != nil {
		return nil, nil, errors.Join(err, held.release())
	}
	return &heldLayer{Device: dev, held: held}, info, nil
}

// heldLayer is a layer of a replica that is open for its sake.
type heldLayer struct {
	block.Device
	held *heldReplica
}

// Close implements block.Device.
func (h *heldLayer) Close() error { return errors.Join(h.Device.Close(), h.held.release()) }

// peerScheme begins the sources of images that another disk has.
const peerScheme = "peer://"

// peerOf reads peer://NODE/DISKID.
func peerOf(source string) (node, diskID string, ok bool) {
	rest, ok := strings.CutPrefix(source, peerScheme)
	if !ok {
		return "", "", false
	}
	node, diskID, _ = strings.Cut(rest, "/")
	return node, diskID, true
}

// openPeerImage opens an image on another node's disk, or another one of this node.
func (p *Process) openPeerImage(ctx context.Context, a client.ImportImage) (block.Device, json.RawMessage, error) {
	node, diskID, _ := peerOf(a.Source)
	if checkName(node) != nil || !validID(diskID) {
		return nil, nil, fmt.Errorf("source %.100q: %w: there is %sNODE/DISKID", a.Source, client.ErrInvalid, peerScheme)
	}
	if diskID == a.DiskID {
		return nil, nil, fmt.Errorf("source %s: %w: that is the disk it is to come to", a.Source, client.ErrInvalid)
	}
	if d, err := p.disk(diskID); err == nil {
		return d.imageSource(a.ImageID)
	}
	ctx, cancel := context.WithTimeout(ctx, copyOpenPatience)
	defer cancel()
	dev, info, err := remote.OpenSource(ctx, p.cluster.dial(node), sourceImage+"/"+diskID+"/"+a.ImageID)
	if err != nil {
		return nil, nil, fmt.Errorf("image %s on node %s: %w", a.Name, node, err)
	}
	return dev, info, nil
}

// copyImage copies an image from another disk into tmp, and checks its content against its digest.
func (p *Process) copyImage(ctx context.Context, d *diskDir, a client.ImportImage, tmp string, tell func(job.Progress)) error {
	dev, info, err := p.openPeerImage(ctx, a)
	if err != nil {
		return err
	}
	closeOnce := sync.OnceValue(dev.Close)
	// A read that is stuck on the way must not hold up who gives up.
	stop := context.AfterFunc(ctx, func() { _ = closeOnce() })
	defer stop()
	err = d.receiveImage(ctx, peerImage{args: a, dev: patient{dev, func() { _ = closeOnce() }}, info: info, boot: p.boot}, tmp, tell)
	if ctx.Err() != nil {
		err = errors.Join(context.Cause(ctx), err)
	}
	return errors.Join(err, closeOnce())
}

// patient is a source that is given up when it does not answer at all: its own end waits for its node for as long as it takes.
type patient struct {
	block.Device
	giveUp func()
}

// ReadAt implements io.ReaderAt.
func (d patient) ReadAt(p []byte, off int64) (int, error) {
	defer time.AfterFunc(copyReadPatience, d.giveUp).Stop()
	return d.Device.ReadAt(p, off)
}

// Extents implements block.Device.
func (d patient) Extents(off, n int64) ([]block.Extent, error) {
	defer time.AfterFunc(copyReadPatience, d.giveUp).Stop()
	return d.Device.Extents(off, n)
}

// peerImage is an image that is copied.
type peerImage struct {
	args client.ImportImage
	dev  block.Device
	info json.RawMessage
	boot string
}

// header reads and checks what came with the image: client.ErrCorrupt if it is not what was asked for, image.ErrChecksum if the file that was received for it once is not the one that is wanted.
func (i *peerImage) header() (local.LayerHeader, error) {
	var h local.LayerHeader
	if err := json.Unmarshal(i.info, &h); err != nil {
		return h, fmt.Errorf("image %s: header: %w: %w", i.args.Name, err, block.ErrCorrupt)
	}
	m := h.Meta
	if m.Kind != layer.KindImage || m.State != layer.StateSealed || m.Image == nil || m.Image.ID != i.args.ImageID || m.Image.Digest == "" {
		return h, fmt.Errorf("what came is not image %s with its digest: %w", i.args.ImageID, block.ErrCorrupt)
	}
	if sum, ok := strings.CutPrefix(i.args.Checksum, "sha512:"); ok && !strings.EqualFold(sum, m.Image.FileSHA512) {
		return h, fmt.Errorf("image %s: the file received had SHA-512 %s, wanted is %s: %w", i.args.Name, m.Image.FileSHA512, sum, image.ErrChecksum)
	}
	return h, nil
}

// receiveImage makes the layer and compares its digest; what is wrong is removed.
func (d *diskDir) receiveImage(ctx context.Context, i peerImage, tmp string, tell func(job.Progress)) error {
	h, err := i.header()
	if err != nil {
		return err
	}
	total, done := int64(0), int64(0)
	if h.Meta.DataBytes != nil {
		total = *h.Meta.DataBytes
	}
	if err := d.roomForCopy(total); err != nil {
		return err
	}
	var mu sync.Mutex
	boot := local.LayerBoot(i.boot)
	_, err = layer.Receive(ctx, d.fs, tmp, layer.ReceiveSpec{Units: i.dev, SizeBytes: h.SizeBytes, SumsBytes: h.SumsBytes, Meta: h.Meta, Options: layer.Options{BootID: boot, Pace: d.copyPace},
		Progress: func(n int64) {
			mu.Lock()
			defer mu.Unlock()
			done += n
			tell(moved(done, max(total, done)))
		}})
	if err != nil {
		return err
	}
	if err = d.checkDigest(ctx, tmp, h.Meta.Image.Digest); err != nil {
		return errors.Join(err, d.fs.Remove(tmp))
	}
	return nil
}

// checkDigest reads all of a layer and compares its digest with what it should be: block.ErrCorrupt.
func (d *diskDir) checkDigest(ctx context.Context, name, want string) error {
	l, err := layer.Open(d.fs, name, layer.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	stack, err := layer.NewStack([]*layer.Layer{l}, layer.StackOptions{})
	if err != nil {
		return errors.Join(err, l.Close())
	}
	got, err := image.Digest(ctx, stack)
	if err == nil && got != want {
		err = fmt.Errorf("the copy has digest %s, the original %s: %w", got, want, block.ErrCorrupt)
	}
	return errors.Join(err, stack.Close(), l.Close())
}
