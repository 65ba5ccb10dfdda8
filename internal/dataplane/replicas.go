package dataplane

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"sort"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/disk"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
)

// imageLayer is the name of an image's layer file in its directory.
const imageLayer = "image.layer"

func imagePath(imageID string) string { return path.Join(imagesDir, imageID, imageLayer) }

// inventory is what was found on a disk: what its files say, not what is open.
type inventory struct {
	replicas map[string]client.ReplicaFound // by directory
	images   map[string]client.ImageFound   // by id
	broken   map[string]error               // what could not be read, by name
}

// scan reads the headers of everything on the disk, and finishes deletions that were cut short.
func (d *diskDir) scan() error {
	if err := local.Sweep(d.fs); err != nil {
		return err
	}
	found := inventory{replicas: map[string]client.ReplicaFound{}, images: map[string]client.ImageFound{}, broken: map[string]error{}}
	replicas, err := local.List(d.fs)
	if err != nil {
		return err
	}
	for _, f := range replicas {
		found.addReplica(f)
	}
	names, err := d.fs.List(imagesDir)
	if err != nil {
		return err
	}
	for _, id := range names {
		found.addImage(d.fs, id)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.found = found
	return nil
}

func (i *inventory) addReplica(f local.Found) {
	delete(i.broken, f.Dir)
	if f.Err != nil {
		i.broken[f.Dir] = f.Err
	}
	r := client.ReplicaFound{ReplicaID: f.ReplicaID, VolumeID: f.VolumeID, Volume: f.Volume, DataPath: f.Dir, SizeBytes: f.SizeBytes,
		AllocatedBytes: f.AllocatedBytes, Failed: f.Failed}
	if f.Record != nil {
		if text, err := json.Marshal(f.Record); err == nil {
			r.Record = text
		}
	} else {
		r.Base, r.RecordLost = string(f.Chain.Base), f.RecordLost
		for _, id := range f.Chain.Layers {
			r.Chain = append(r.Chain, string(id))
		}
	}
	i.replicas[f.Dir] = r
}

func (i *inventory) addImage(fsys disk.FS, id string) {
	delete(i.broken, imagePath(id))
	delete(i.images, id)
	meta, super, err := layer.Inspect(fsys, imagePath(id))
	if err == nil && (meta.Kind != layer.KindImage || meta.State != layer.StateSealed || meta.Image == nil || meta.Image.ID != id) {
		err = fmt.Errorf("it is not image %s: %w", id, block.ErrCorrupt)
	}
	var info disk.Info
	if err == nil {
		info, err = fsys.Stat(imagePath(id))
	}
	if err != nil {
		i.broken[imagePath(id)] = err
		return
	}
	i.images[id] = client.ImageFound{ImageID: id, Name: meta.Image.Name, SizeBytes: meta.Image.FileBytes, VirtualSizeBytes: super.SizeBytes,
		AllocatedBytes: info.AllocatedBytes, SHA512: meta.Image.FileSHA512, Digest: meta.Image.Digest, Format: meta.Image.Format, Source: meta.Image.Source}
}

// lookAgain refreshes what is known of one replica directory; one that is gone is forgotten.
func (d *diskDir) lookAgain(dir string) {
	there, err := disk.Exists(d.fs, dir)
	f := local.Found{}
	if there {
		f = local.Look(d.fs, dir)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if there {
		d.found.addReplica(f)
	} else if err == nil {
		delete(d.found.replicas, dir)
		delete(d.found.broken, dir)
	}
}

// lookAtAll refreshes what is known of every replica: an open one changes its record whenever it is opened, and with every membership record it is sent.
func (d *diskDir) lookAtAll() {
	d.mu.Lock()
	dirs := slices.Collect(maps.Keys(d.found.replicas))
	d.mu.Unlock()
	for _, dir := range dirs {
		d.lookAgain(dir)
	}
}

// rescan refreshes what is known of the replicas of a disk, after one of them changed.
func (p *Process) rescan(diskID, replicaID string) {
	d, err := p.disk(diskID)
	if err != nil {
		return
	}
	if dir, err := local.Find(d.fs, replicaID); err == nil {
		d.lookAgain(dir)
	}
}

// status describes the disk; open are the volumes that are open, which know more about their replicas than the disk's inventory.
func (d *diskDir) status(open []client.VolumeStatus) client.DiskStatus {
	st := client.DiskStatus{DiskID: d.DiskID, Path: d.path, ClusterID: d.ClusterID, Replicas: []client.ReplicaFound{}, Images: []client.ImageFound{}}
	var errs []error
	var err error
	if st.TotalBytes, st.FreeBytes, err = d.fs.Usage(); err != nil {
		errs = append(errs, err)
	}
	if err := d.away(); err != nil {
		errs, st.TotalBytes, st.FreeBytes = append(errs, err), 0, 0
	}
	live := map[string]client.VolumeStatus{}
	for _, v := range open {
		live[v.ReplicaID] = v
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, err := range d.found.broken {
		errs = append(errs, fmt.Errorf("%s: %w", name, err))
	}
	for _, r := range d.found.replicas {
		if v, ok := live[r.ReplicaID]; ok && len(v.Layers) > 0 {
			r.Open, r.SizeBytes, r.AllocatedBytes = true, v.SizeBytes, 0
			for _, l := range v.Layers {
				r.AllocatedBytes += l.AllocatedBytes
			}
		}
		st.Replicas = append(st.Replicas, r)
	}
	for _, i := range d.found.images {
		st.Images = append(st.Images, i)
	}
	sort.Slice(st.Replicas, func(i, j int) bool { return st.Replicas[i].DataPath < st.Replicas[j].DataPath })
	sort.Slice(st.Images, func(i, j int) bool { return st.Images[i].ImageID < st.Images[j].ImageID })
	if err := errors.Join(errs...); err != nil {
		st.Error = err.Error()
	}
	return st
}

// diskStatus describes a disk; open are the volumes that are.
func (p *Process) diskStatus(d *diskDir, open []client.VolumeStatus) client.DiskStatus {
	st := d.status(open)
	for i := range st.Replicas {
		r := &st.Replicas[i]
		rep := p.open.look(r.ReplicaID)
		if rep == nil || r.Open {
			continue
		}
		now, err := rep.Status() // other nodes have it open
		if err != nil {
			continue // it is being closed
		}
		r.Open, r.SizeBytes, r.AllocatedBytes = true, now.Chain.SizeBytes, 0
		for _, l := range now.Layers {
			r.AllocatedBytes += l.AllocatedBytes
		}
	}
	return st
}

// image returns what is known of an image on the disk.
func (d *diskDir) image(id string) (client.ImageFound, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	i, ok := d.found.images[id]
	return i, ok
}

// A process that dies closes its files one after the other: whoever saw the first of its locks free waits so long for the others.
const (
	lockPatience = 2 * time.Second
	lockPoll     = 2 * time.Millisecond
)

// openReplica opens the replica that is to be a volume's, under the lock that was passed, unless that is nil.
func (d *diskDir) openReplica(a client.OpenVolume, bootID string, lock *os.File) (*local.Replica, error) {
	dir, err := local.Find(d.fs, a.ReplicaID)
	if err != nil {
		if lock != nil {
			err = errors.Join(err, lock.Close())
		}
		return nil, err
	}
	for deadline := time.Now().Add(lockPatience); ; <-time.After(lockPoll) {
		rep, err := local.Open(d.fs, dir, local.OpenConfig{BootID: bootID, Salvage: a.Salvage, Pace: d.pace, Lock: lock})
		if lock != nil || !errors.Is(err, disk.ErrLocked) || time.Now().After(deadline) {
			return rep, err
		}
	}
}

// CreateReplica implements client.Service.
func (p *Process) CreateReplica(_ context.Context, a client.CreateReplica) error {
	if err := p.createReplica(a); err != nil {
		return forWire(fmt.Errorf("create replica %s of volume %s: %w", a.ReplicaID, a.Volume, err))
	}
	p.board.bump()
	return nil
}

func (p *Process) createReplica(a client.CreateReplica) error {
	if !validID(a.VolumeID) || !validID(a.ReplicaID) || a.ImageID != "" && !validID(a.ImageID) {
		return fmt.Errorf("%w: ids are 32 hex digits", client.ErrInvalid)
	}
	if err := checkName(a.Volume); err != nil {
		return err
	}
	if a.SizeBytes > maxVolumeBytes {
		return fmt.Errorf("%w: %d bytes, at most %d", client.ErrInvalid, a.SizeBytes, int64(maxVolumeBytes))
	}
	if a.HeadID == "" {
		a.HeadID = a.ReplicaID
	}
	d, err := p.disk(a.DiskID)
	if err != nil {
		return err
	}
	if _, err := local.Find(d.fs, a.ReplicaID); errors.Is(err, fs.ErrNotExist) {
		if err := d.room(); err != nil {
			return err
		}
	}
	d.change.Lock()
	defer d.change.Unlock()
	c := local.CreateConfig{ReplicaID: a.ReplicaID, VolumeID: a.VolumeID, Volume: a.Volume, HeadID: replica.LayerID(a.HeadID), SizeBytes: a.SizeBytes,
		BootID: p.boot, Created: time.Now()}
	if a.ImageID != "" {
		if _, ok := d.image(a.ImageID); !ok {
			return fmt.Errorf("image %s is not on disk %s: %w", a.ImageID, a.DiskID, client.ErrNotFound)
		}
		c.Base = &local.Base{ID: replica.LayerID(a.ImageID), Path: imagePath(a.ImageID), Name: a.Image}
	}
	dir, err := local.Create(d.fs, c)
	if errors.Is(err, fs.ErrExist) {
		err = fmt.Errorf("%w: %w", client.ErrExists, err)
	}
	if err != nil {
		return err
	}
	f := local.Look(d.fs, dir)
	if f.Err == nil && (f.VolumeID != a.VolumeID || f.Chain.Base != replica.LayerID(a.ImageID)) {
		return fmt.Errorf("%w: it is of volume %s over image %q", client.ErrExists, f.VolumeID, f.Chain.Base)
	}
	d.lookAgain(dir)
	return nil
}

// RebuildReplica implements client.Service.
func (p *Process) RebuildReplica(_ context.Context, a client.RebuildReplica) error {
	if err := p.rebuildReplica(a); err != nil {
		return forWire(fmt.Errorf("make the record of replica %s again: %w", a.ReplicaID, err))
	}
	p.board.bump()
	return nil
}

func (p *Process) rebuildReplica(a client.RebuildReplica) error {
	if !validID(a.ReplicaID) {
		return fmt.Errorf("%w: ids are 32 hex digits", client.ErrInvalid)
	}
	var rec *replica.Record
	if len(a.Record) > 0 {
		rec = new(replica.Record)
		if err := json.Unmarshal(a.Record, rec); err != nil {
			return fmt.Errorf("%w: its volume's record: %w", client.ErrInvalid, err)
		}
	}
	d, err := p.disk(a.DiskID)
	if err != nil {
		return err
	}
	if p.copying(a.ReplicaID) || p.open.look(a.ReplicaID) != nil {
		return fmt.Errorf("%w: it is open; detach its volume first", client.ErrInUse)
	}
	d.change.Lock()
	defer d.change.Unlock()
	dir, err := local.Find(d.fs, a.ReplicaID)
	if err != nil {
		return err
	}
	base := ""
	if id := local.Look(d.fs, dir).Chain.Base; id != "" {
		base = imagePath(string(id))
	}
	if err := local.Recover(d.fs, dir, base, rec); err != nil {
		return err
	}
	d.lookAgain(dir)
	return nil
}

// DeleteReplica implements client.Service.
func (p *Process) DeleteReplica(ctx context.Context, a client.DeleteReplica) error {
	ctx, cancel := p.work(ctx)
	defer cancel()
	if err := p.deleteReplica(ctx, a); err != nil {
		return forWire(fmt.Errorf("delete replica %s: %w", a.ReplicaID, err))
	}
	p.board.bump()
	return nil
}

func (p *Process) deleteReplica(ctx context.Context, a client.DeleteReplica) error {
	if !validID(a.ReplicaID) {
		return fmt.Errorf("%w: ids are 32 hex digits", client.ErrInvalid)
	}
	d, err := p.disk(a.DiskID)
	if err != nil {
		return err
	}
	for _, s := range p.slots() {
		if args, state, _ := s.look(); args.ReplicaID == a.ReplicaID && state != "" && !isFar(args) {
			return fmt.Errorf("%w: volume %s has it %s", client.ErrInUse, args.Volume, state)
		}
	}
	if p.copying(a.ReplicaID) {
		return fmt.Errorf("%w: it is being made by a copy; give that up first", client.ErrInUse)
	}
	// What only other nodes have open is taken from them: whoever asks knows that no record names it any more (invariant 15).
	free, err := p.seize(ctx, a.ReplicaID)
	if err != nil {
		return err
	}
	defer free()
	d.change.Lock()
	defer d.change.Unlock()
	dir, err := local.Find(d.fs, a.ReplicaID)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := local.Delete(d.fs, a.ReplicaID); err != nil {
		return err
	}
	if dir != "" {
		d.lookAgain(dir)
	}
	return nil
}
