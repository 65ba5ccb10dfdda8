package local

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
)

// Found is a replica directory as seen from outside, whether or not somebody has it open.
type Found struct {
	Dir            string
	ReplicaID      string
	VolumeID       string
	Volume         string // the name at creation
	SizeBytes      int64
	AllocatedBytes int64 // of all its files
	Writer         replica.Writer
	Record         *replica.Record // the newest membership record it was sent; nil: none, or lost
	Chain          replica.Chain
	BasePath       string
	Layers         []replica.LayerInfo // from the headers; AllocatedBytes from the files
	Failed         string              // opening needs salvage
	// RecordLost: the replica's own record is gone, and what is said here was put together from the layers' headers. Recover writes it again.
	RecordLost bool
	Unknown    []string // names that belong to nothing
	Err        error    // why less is known than should be
}

// List returns every replica on a disk. It changes nothing and takes no lock; what it says of a replica that is in use is a moment's truth. A
// replica that cannot be read is listed with its Err. Directories half made or half deleted are not listed; Sweep finishes the deletions.
func List(fsys disk.FS) ([]Found, error) {
	names, err := fsys.List(Root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list replicas: %w", err)
	}
	var list []Found
	for _, name := range names {
		if strings.HasSuffix(name, tmpSuffix) || strings.HasSuffix(name, deletedSuffix) {
			continue
		}
		list = append(list, Look(fsys, path.Join(Root, name)))
	}
	return list, nil
}

// Look describes one replica directory; see List.
func Look(fsys disk.FS, dir string) Found {
	f := Found{Dir: dir}
	st, err := readRecord(fsys, dir)
	heads, others, listErr := readHeaders(fsys, dir)
	if errors.Is(err, disk.ErrNoRecord) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, block.ErrCorrupt) {
		f.RecordLost = true
		if rebuilt, rebuildErr := rebuild(heads); rebuildErr == nil {
			st, err = rebuilt, nil
		} else {
			err = errors.Join(err, rebuildErr)
		}
	}
	f.Err = errors.Join(err, listErr)
	for name, why := range others {
		id := replica.LayerID(strings.TrimSuffix(name, layerSuffix))
		if err == nil && st.has(id) {
			f.Err = errors.Join(f.Err, why)
		} else if st.Change == nil || newLayer(*st.Change) != id {
			f.Unknown = append(f.Unknown, name)
		}
	}
	for _, h := range heads {
		if err == nil && !st.has(h.id()) && !slices.Contains(st.Dropped, h.id()) && (st.Change == nil || newLayer(*st.Change) != h.id()) {
			f.Unknown = append(f.Unknown, string(h.id())+layerSuffix)
		}
	}
	slices.Sort(f.Unknown)
	if err != nil {
		return f
	}
	f.ReplicaID, f.VolumeID, f.Volume = st.ReplicaID, st.VolumeID, st.Volume
	f.SizeBytes, f.Writer, f.Record, f.Chain, f.BasePath, f.Failed = st.SizeBytes, st.Writer, st.Record, st.chain(), st.BasePath, st.Failed
	for _, h := range heads {
		f.AllocatedBytes += h.allocated
		if h.meta.Failed && f.Failed == "" {
			f.Failed = "a flush failed on layer " + string(h.meta.ID)
		}
		if i := st.index(h.id()); i >= 0 {
			info := replica.LayerInfo{ID: h.id(), Parent: st.Layers[i].Parent, Head: h.id() == st.Head, SizeBytes: h.size, AllocatedBytes: h.allocated, Verified: h.meta.Sums}
			if h.meta.Snapshot != nil && !info.Head {
				info.Snapshot = fromLayer(*h.meta.Snapshot)
			}
			f.Layers = append(f.Layers, info)
		}
	}
	return f
}

// readRecord reads a replica's record without a lock.
func readRecord(fsys disk.FS, dir string) (state, error) {
	f, err := fsys.OpenRead(path.Join(dir, recordName))
	if err != nil {
		return state{}, err
	}
	payload, _, err := disk.OpenSlots(f, 0, slotBytes).Load()
	if err = errors.Join(err, f.Close()); err != nil {
		return state{}, err
	}
	return decodeState(payload)
}

// header is one layer file of a replica, as its superblock and header say.
type header struct {
	meta      layer.Meta
	size      int64
	allocated int64
	empty     bool // of a head: nothing was ever written to it
}

func (h header) id() replica.LayerID { return replica.LayerID(h.meta.ID) }

// readHeaders reads the headers of all complete layer files in a directory, and says of all other names but the record's why they are none.
func readHeaders(fsys disk.FS, dir string) (heads []header, others map[string]error, err error) {
	names, err := fsys.List(dir)
	if err != nil {
		return nil, nil, err
	}
	others = map[string]error{}
	for _, name := range names {
		if name == recordName {
			continue
		}
		h, err := readHeader(fsys, dir, name)
		if err != nil {
			others[name] = fmt.Errorf("%s: %w", name, err)
			continue
		}
		heads = append(heads, h)
	}
	return heads, others, nil
}

func readHeader(fsys disk.FS, dir, name string) (header, error) {
	id, isLayer := strings.CutSuffix(name, layerSuffix)
	if !isLayer || !validID(id) {
		return header{}, fmt.Errorf("no layer's name: %w", ErrInvalid)
	}
	info, err := fsys.Stat(path.Join(dir, name))
	if err != nil {
		return header{}, err
	}
	meta, super, err := layer.Inspect(fsys, path.Join(dir, name))
	if err != nil {
		return header{}, err
	}
	if string(meta.ID) != id {
		return header{}, fmt.Errorf("says it is layer %s: %w", meta.ID, block.ErrCorrupt)
	}
	return header{meta: meta, size: super.SizeBytes, allocated: info.AllocatedBytes}, nil
}

// find returns the directory of a replica by its record; fs.ErrNotExist.
func find(fsys disk.FS, replicaID string) (string, error) {
	names, err := fsys.List(Root)
	if err != nil {
		return "", err
	}
	for _, name := range names {
		// The directory ends with the id's first digits; the record says the rest.
		if !strings.HasSuffix(name, "-"+replicaID[:min(8, len(replicaID))]) {
			continue
		}
		dir := path.Join(Root, name)
		st, err := readRecord(fsys, dir)
		if err == nil && st.ReplicaID == replicaID || err != nil && Look(fsys, dir).ReplicaID == replicaID {
			return dir, nil
		}
	}
	return "", fmt.Errorf("replica %s: %w", replicaID, fs.ErrNotExist)
}

// Find returns the directory of a replica; fs.ErrNotExist if the disk has none of this id.
func Find(fsys disk.FS, replicaID string) (string, error) { return find(fsys, replicaID) }

// Sweep finishes every deletion that was cut short. What was half made stays for whoever makes it again.
func Sweep(fsys disk.FS) error {
	names, err := fsys.List(Root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("sweep replicas: %w", err)
	}
	for _, name := range names {
		if !strings.HasSuffix(name, deletedSuffix) {
			continue
		}
		if err := removeAll(fsys, path.Join(Root, name)); err != nil {
			return fmt.Errorf("sweep replicas: %w", err)
		}
	}
	return nil
}

// Recover writes a replica's record again from the headers of its layers, if it is lost; otherwise it changes nothing. Nobody has the replica open. Files that are no whole layer are left alone: one that
// was half made is not missed, and without one that was, the rest makes no chain (block.ErrCorrupt). basePath is the image's layer file, if the volume has an image.
//
// rec is the volume's membership record, which has the replica as a member; the replica goes on under its epoch, with the generation of its chain. A replica that has neither that chain nor the pending one is none that
// the record knows, and is left alone: replica.ErrChain. Without it nothing is known of a writer: epoch 0, generation 1.
func Recover(fsys disk.FS, dir, basePath string, rec *replica.Record) error {
	if f := Look(fsys, dir); !f.RecordLost {
		return nil
	}
	if err := makeRecord(fsys, dir, basePath, rec); err != nil {
		return fmt.Errorf("recover replica %s: %w", dir, err)
	}
	return nil
}

func makeRecord(fsys disk.FS, dir, basePath string, rec *replica.Record) error {
	heads, _, err := readHeaders(fsys, dir)
	if err != nil {
		return err
	}
	for i := range heads {
		if heads[i].meta.State == layer.StateHead {
			if heads[i].empty, err = isEmpty(fsys, path.Join(dir, string(heads[i].meta.ID)+layerSuffix)); err != nil {
				return err
			}
		}
	}
	st, err := rebuild(heads)
	if err != nil {
		return err
	}
	if st.Base != "" {
		st.BasePath = basePath
	}
	if rec != nil {
		if err := st.underRecord(*rec); err != nil {
			return err
		}
	}
	tmp, name := path.Join(dir, recordName+tmpSuffix), path.Join(dir, recordName)
	if err := fsys.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := writeRecord(fsys, tmp, st); err != nil {
		return err
	}
	if err := fsys.Rename(tmp, name); err != nil {
		return err
	}
	return fsys.SyncDir(dir)
}

// underRecord lets a rebuilt replica go on where the membership record says that it was.
func (s *state) underRecord(rec replica.Record) error {
	if rec.VolumeID != s.VolumeID {
		return fmt.Errorf("the record is of volume %q: %w", rec.VolumeID, replica.ErrChain)
	}
	known := []replica.Chain{rec.Chain}
	if rec.Pending != nil {
		known = append(known, rec.Pending.Chain)
	}
	have := s.chain()
	for _, c := range known {
		if have.Generation = c.Generation; have.Equal(c) {
			s.Writer.Epoch, s.Generation = rec.Epoch, max(1, c.Generation)
			return nil
		}
	}
	return fmt.Errorf("its layers are %v, those of the volume's record %v: %w", have.Layers, rec.Chain.Layers, replica.ErrChain)
}

// isEmpty tells whether nothing was ever written to a layer.
func isEmpty(fsys disk.FS, name string) (bool, error) {
	l, err := layer.Open(fsys, name, layer.Options{ReadOnly: true})
	if err != nil {
		return false, err
	}
	stack, err := layer.NewStack([]*layer.Layer{l}, layer.StackOptions{})
	if err != nil {
		return false, errors.Join(err, l.Close())
	}
	empty := true
	for off := int64(0); empty && off < stack.Size() && err == nil; {
		var extents []block.Extent
		extents, err = stack.Extents(off, stack.Size()-off)
		for _, e := range extents {
			empty = empty && e.State == block.Absent
			off = e.Off + e.N
		}
	}
	return empty, errors.Join(err, stack.Close(), l.Close())
}

// rebuild makes a record from the headers of a replica's layers. Layers still being built are left out. If there are several heads, a change was under way: one that stands on
// another was never used, and of two that stand beside each other an empty one was not, or is worth less.
func rebuild(heads []header) (state, error) {
	var st state
	byID := map[layer.ID]header{}
	for _, h := range heads {
		if h.meta.State != layer.StateBuilding && h.meta.Kind == layer.KindVolume {
			byID[h.meta.ID] = h
		}
	}
	var tops []header
	for _, h := range byID {
		if h.meta.State == layer.StateHead && byID[h.meta.Parent].meta.State != layer.StateHead {
			tops = append(tops, h)
		}
	}
	if len(tops) == 0 {
		return st, fmt.Errorf("no head among %d layers: %w", len(heads), block.ErrCorrupt)
	}
	slices.SortFunc(tops, func(a, b header) int {
		if a.empty != b.empty {
			return map[bool]int{false: -1, true: 1}[a.empty]
		}
		return cmp.Or(a.meta.Created.Compare(b.meta.Created), cmp.Compare(a.meta.ID, b.meta.ID))
	})
	head := tops[0]
	st = state{Version: formatVersion, ReplicaID: head.meta.ReplicaID, VolumeID: head.meta.VolumeID, Volume: head.meta.Volume, Created: head.meta.Created,
		Generation: 1, SizeBytes: head.size, Head: head.id()}
	for _, h := range byID {
		if h.meta.State == layer.StateHead && h.meta.ID != head.meta.ID {
			st.Dropped = append(st.Dropped, h.id())
			continue
		}
		n := node{ID: h.id(), Parent: replica.LayerID(h.meta.Parent)}
		if _, ok := byID[h.meta.Parent]; !ok {
			n.Parent = "" // the image's layer
			if h.meta.Image != nil {
				st.Base = replica.LayerID(h.meta.Image.ID)
			} else if h.meta.Parent != "" {
				return st, fmt.Errorf("layer %s stands on %s, which is missing: %w", h.meta.ID, h.meta.Parent, block.ErrCorrupt)
			}
		}
		st.Layers = append(st.Layers, n)
	}
	slices.SortFunc(st.Layers, func(a, b node) int {
		return cmp.Or(byID[layer.ID(a.ID)].meta.Created.Compare(byID[layer.ID(b.ID)].meta.Created), cmp.Compare(a.ID, b.ID))
	})
	slices.Sort(st.Dropped)
	if err := st.check(); err != nil {
		return st, fmt.Errorf("%w: %w", block.ErrCorrupt, err)
	}
	return st, nil
}
