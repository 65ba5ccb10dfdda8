package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"sync"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
)

// ReceiveConfig says which replica to make as a copy of another one of the same volume, perhaps on another node. The source is fenced: nobody writes to it meanwhile.
type ReceiveConfig struct {
	ReplicaID string // of the copy: a new one
	VolumeID  string
	Volume    string // the name, for people
	Base      *Base  // the image below, on this disk; nil exactly if the source has none
	BootID    string // of this host; see OpenConfig
	Created   time.Time

	// Source is what the source said of itself, its layers counted (Replica.Count): the tree that is copied.
	Source replica.Status
	// Open opens a layer of the source: its own units, and a LayerHeader as JSON (Conn.OpenLayer, there or on another node). Receive closes it.
	Open func(ctx context.Context, id replica.LayerID) (block.Device, json.RawMessage, error)
	// Writer and Record are what the copy begins with: who fenced the source, and the record that the source keeps. The record may name the source and not yet the copy.
	Writer replica.Writer
	Record replica.Record

	// Pace, if not nil, is asked before n bytes more are moved, and may wait; its error ends the work.
	Pace     func(ctx context.Context, n int64) error
	Parallel int // pieces of up to 1 MiB in flight; 0 means 4
	// Progress, if not nil, is told of the bytes of Data taken over, and of all that there are; not twice at once.
	Progress func(doneBytes, totalBytes int64)
}

// check says whether the copy can be made of what the source said.
func (c *ReceiveConfig) check() error {
	chain := c.Source.Chain
	if len(chain.Layers) == 0 {
		return fmt.Errorf("the source has no chain: %w", replica.ErrChain)
	}
	create := CreateConfig{ReplicaID: c.ReplicaID, VolumeID: c.VolumeID, Volume: c.Volume, HeadID: chain.Layers[0], SizeBytes: chain.SizeBytes, Base: c.Base, BootID: c.BootID}
	if err := create.check(); err != nil {
		return err
	}
	var base replica.LayerID
	if c.Base != nil {
		base = c.Base.ID
	}
	switch {
	case base != chain.Base:
		return fmt.Errorf("the source stands on image %q, the copy would on %q: %w", chain.Base, base, ErrInvalid)
	case c.Source.Failed != "":
		return fmt.Errorf("the source failed: %s: %w", c.Source.Failed, layer.ErrSalvage)
	case c.Record.VolumeID != c.VolumeID:
		return fmt.Errorf("the record is of volume %q: %w", c.Record.VolumeID, replica.ErrChain)
	}
	return nil
}

// Incoming is a copy that is complete and durable, under a name that makes it no replica yet: Place makes it one, Discard removes it. A process that dies leaves it as a
// replica half made, which the next Receive, or Delete, of the same id removes.
type Incoming struct {
	fsys     disk.FS
	tmp, dir string
}

// Receive copies a replica layer by layer, from the lowest up: the whole tree with its ids, sizes and headers, and of each layer the units it has itself, in the state they are in. What is Data
// moves, and is compared with the source's checksums where it has them; the copies of sealed layers have checksums of what came. It returns once all of it would survive a power cut.
//
// fs.ErrExist if there is such a replica; ErrInvalid, also if the image is another; block.ErrCorrupt if what came is not what the source said; disk.ErrNoSpace; and what Open and the
// source's Devices say. An error, or the end of ctx, leaves nothing behind that the next attempt or Delete would not clear.
func Receive(ctx context.Context, fsys disk.FS, c ReceiveConfig) (*Incoming, error) {
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("receive replica %s: %w", c.ReplicaID, err)
	}
	if dir, err := find(fsys, c.ReplicaID); err == nil {
		return nil, fmt.Errorf("receive replica %s: it is there, in %s: %w", c.ReplicaID, dir, fs.ErrExist)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("receive replica %s: %w", c.ReplicaID, err)
	}
	in := &Incoming{fsys: fsys, dir: Dir(c.Volume, c.ReplicaID)}
	in.tmp = in.dir + tmpSuffix
	if err := in.stage(ctx, c); err != nil {
		return nil, fmt.Errorf("receive replica %s: %w", in.dir, err)
	}
	return in, nil
}

// stage makes the whole directory under its half-made name.
func (in *Incoming) stage(ctx context.Context, c ReceiveConfig) error {
	if there, err := disk.Exists(in.fsys, in.dir); err != nil {
		return err
	} else if there {
		return fmt.Errorf("the directory is another replica's: %w", fs.ErrExist)
	}
	if err := in.fsys.Mkdir(Root); err != nil {
		return err
	}
	if err := in.fsys.SyncDir("."); err != nil {
		return err
	}
	if err := removeAll(in.fsys, in.tmp); err != nil {
		return err
	}
	if err := in.fsys.Mkdir(in.tmp); err != nil {
		return err
	}
	err := in.fill(ctx, c)
	if err == nil {
		err = in.fsys.SyncDir(in.tmp)
	}
	if err != nil {
		return errors.Join(err, removeAll(in.fsys, in.tmp))
	}
	return nil
}

// fill makes the layers and the record.
func (in *Incoming) fill(ctx context.Context, c ReceiveConfig) error {
	chain := c.Source.Chain
	record := c.Record
	st := state{Version: formatVersion, ReplicaID: c.ReplicaID, VolumeID: c.VolumeID, Volume: c.Volume, Created: c.Created.UTC(), Writer: c.Writer, Record: &record,
		Generation: chain.Generation, SizeBytes: chain.SizeBytes, Head: chain.Layers[0]}
	f := &filling{c: c, in: in}
	if c.Base != nil {
		base, err := openBase(in.fsys, c.Base.ID, c.Base.Path)
		if err != nil {
			return err
		}
		f.parent = base.ID()
		if image := base.Meta().Image; image != nil {
			f.baseDigest = image.Digest
		}
		if err := base.Close(); err != nil {
			return err
		}
		st.Base, st.BasePath = c.Base.ID, c.Base.Path
	}
	order := bottomUp(c.Source.Layers)
	for _, info := range order {
		st.Layers = append(st.Layers, node{ID: info.ID, Parent: info.Parent})
		f.total += max(0, info.DataBytes)
		if info.Head != (info.ID == st.Head) || info.Head && info.SizeBytes != st.SizeBytes {
			return fmt.Errorf("layer %s of %d bytes, head %t, in a chain of %d bytes with head %s: %w", info.ID, info.SizeBytes, info.Head, st.SizeBytes, st.Head, replica.ErrChain)
		}
	}
	if err := st.check(); err != nil {
		return fmt.Errorf("the source's tree: %w", err)
	}
	if have := st.chain(); !have.Equal(chain) {
		return fmt.Errorf("the source's tree does not have its chain: %w", replica.ErrChain)
	}
	for _, info := range order {
		if err := f.layer(ctx, info); err != nil {
			return fmt.Errorf("layer %s: %w", info.ID, err)
		}
	}
	return writeRecord(in.fsys, path.Join(in.tmp, recordName), st)
}

// bottomUp orders layers so that each comes after the one it stands on; those that stand on nothing that is listed come where they are.
func bottomUp(layers []replica.LayerInfo) []replica.LayerInfo {
	var order []replica.LayerInfo
	done := map[replica.LayerID]bool{"": true}
	for left := slices.Clone(layers); len(left) > 0; {
		at := slices.IndexFunc(left, func(i replica.LayerInfo) bool { return done[i.Parent] })
		at = max(at, 0) // no tree: the record's check says so
		done[left[at].ID] = true
		order = append(order, left[at])
		left = slices.Delete(left, at, at+1)
	}
	return order
}

// filling is a copy being filled.
type filling struct {
	c          ReceiveConfig
	in         *Incoming
	parent     layer.ID // of the lowest layers: the image's layer
	baseDigest string
	total      int64

	mu   sync.Mutex // held while Progress is told; guards done
	done int64
}

// layer takes one layer over.
func (f *filling) layer(ctx context.Context, info replica.LayerInfo) error {
	dev, text, err := f.c.Open(ctx, info.ID)
	if err != nil {
		return err
	}
	closeOnce := sync.OnceValue(dev.Close)
	// A read that is stuck on the way must not hold up who gives up.
	stop := context.AfterFunc(ctx, func() { _ = closeOnce() })
	defer stop()
	data, err := f.receive(ctx, info, dev, text)
	if err == nil && info.DataBytes >= 0 && data != info.DataBytes {
		err = fmt.Errorf("%d bytes of data came, the source holds %d: %w", data, info.DataBytes, block.ErrCorrupt)
	}
	if ctx.Err() != nil {
		err = errors.Join(context.Cause(ctx), err)
	}
	return errors.Join(err, closeOnce())
}

func (f *filling) receive(ctx context.Context, info replica.LayerInfo, dev block.Device, text json.RawMessage) (int64, error) {
	var h LayerHeader
	if err := json.Unmarshal(text, &h); err != nil {
		return 0, fmt.Errorf("header: %w: %w", err, block.ErrCorrupt)
	}
	if err := f.checkHeader(info, h); err != nil {
		return 0, err
	}
	m := h.Meta
	m.ReplicaID, m.Parent, m.State = f.c.ReplicaID, layer.ID(info.Parent), layer.StateSealed
	if info.Parent == "" {
		m.Parent = f.parent
	}
	if info.Head {
		m.State = layer.StateHead
	}
	return layer.Receive(ctx, f.in.fsys, path.Join(f.in.tmp, string(info.ID)+layerSuffix), layer.ReceiveSpec{
		Units: dev, SizeBytes: h.SizeBytes, SumsBytes: h.SumsBytes, Meta: m, Options: layer.Options{BootID: bootID(f.c.BootID), Pace: f.c.Pace},
		Parallel: f.c.Parallel, Progress: f.progress})
}

// checkHeader compares what came with a layer with what the source said of it.
func (f *filling) checkHeader(info replica.LayerInfo, h LayerHeader) error {
	m := h.Meta
	switch {
	case h.ID != info.ID, m.ID != layer.ID(info.ID), h.Parent != info.Parent, h.Head != info.Head, h.SizeBytes != info.SizeBytes:
		return fmt.Errorf("came as layer %s on %q, head %t, of %d bytes; it is on %q, head %t, of %d: %w", h.ID, h.Parent, h.Head, h.SizeBytes, info.Parent, info.Head, info.SizeBytes, block.ErrCorrupt)
	case m.Kind != layer.KindVolume, m.VolumeID != f.c.VolumeID, info.Head != (m.State == layer.StateHead):
		return fmt.Errorf("is of kind %q, volume %q, %s: %w", m.Kind, m.VolumeID, m.State, block.ErrCorrupt)
	case h.BaseDigest != "" && f.baseDigest != "" && h.BaseDigest != f.baseDigest:
		return fmt.Errorf("the source's image has digest %s, the one here %s: %w", h.BaseDigest, f.baseDigest, block.ErrCorrupt)
	}
	return nil
}

func (f *filling) progress(bytes int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.done += bytes
	if f.c.Progress != nil {
		f.c.Progress(f.done, max(f.total, f.done))
	}
}

// Place makes the copy a replica of its disk, durably, and returns its directory. The image it stands on is there: the caller keeps it from being deleted meanwhile, and from then on the replica does.
func (in *Incoming) Place() (string, error) {
	if err := in.fsys.Rename(in.tmp, in.dir); err != nil {
		return "", fmt.Errorf("place replica %s: %w", in.dir, err)
	}
	if err := in.fsys.SyncDir(Root); err != nil {
		return in.dir, fmt.Errorf("place replica %s: %w", in.dir, err)
	}
	return in.dir, nil
}

// Discard removes a copy that was not placed.
func (in *Incoming) Discard() error {
	if err := removeAll(in.fsys, in.tmp); err != nil {
		return fmt.Errorf("discard the copy in %s: %w", in.tmp, err)
	}
	return nil
}
