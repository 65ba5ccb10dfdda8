package local

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"time"
	"unicode"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
)

// ErrInvalid: an argument, or a record, cannot be right. Nothing was changed.
var ErrInvalid = errors.New("invalid replica")

// Names on a disk, docs/formats/replica.md section 1.
const (
	// Root is the directory of a disk's replicas.
	Root          = "replicas"
	recordName    = "replica"
	layerSuffix   = ".layer"
	tmpSuffix     = ".tmp"
	deletedSuffix = ".deleted"
	slotBytes     = 512 << 10
)

// Base is the image below a volume: ID is what the chain calls it (the image's id), Path its layer file, both for ever.
type Base struct {
	ID   replica.LayerID
	Path string // from the disk's root
	Name string // of the image, for people
}

// CreateConfig says what replica to make. Ids are 32 lower-case hex digits.
type CreateConfig struct {
	ReplicaID string
	VolumeID  string
	Volume    string          // the name, for people; no slash, no control characters
	HeadID    replica.LayerID // of the first head
	SizeBytes int64           // a positive multiple of 4096, at least the image's
	Base      *Base           // nil: no image
	BootID    string          // of this host; see OpenConfig
	Created   time.Time
}

func (c *CreateConfig) check() error {
	switch {
	case !validID(c.ReplicaID), !validID(string(c.HeadID)), c.VolumeID == "", c.BootID == "":
		return fmt.Errorf("replica %q, head %q, volume %q: ids and boot id are needed: %w", c.ReplicaID, c.HeadID, c.VolumeID, ErrInvalid)
	case c.Volume == "" || len(c.Volume) > 200 || strings.Contains(c.Volume, "/") || strings.HasPrefix(c.Volume, ".") || strings.ContainsFunc(c.Volume, unicode.IsControl):
		return fmt.Errorf("volume name %q cannot be part of a file's name: %w", c.Volume, ErrInvalid)
	case c.SizeBytes <= 0 || c.SizeBytes%block.UnitBytes != 0:
		return fmt.Errorf("size of %d bytes: %w", c.SizeBytes, ErrInvalid)
	case c.Base != nil && (c.Base.ID == "" || !fs.ValidPath(c.Base.Path)):
		return fmt.Errorf("image %q at %q: %w", c.Base.ID, c.Base.Path, ErrInvalid)
	}
	return nil
}

// Dir returns the directory that a replica is made in.
func Dir(volume, replicaID string) string {
	return path.Join(Root, volume+"-"+replicaID[:min(8, len(replicaID))])
}

// Create makes an empty replica and returns its directory once it survives a power cut. Idempotent by ReplicaID: one that is there is left as it is. fs.ErrExist if the
// directory belongs to another replica; ErrInvalid; disk.ErrNoSpace, with nothing left behind that the next attempt or Delete would not clear.
func Create(fsys disk.FS, c CreateConfig) (string, error) {
	if err := c.check(); err != nil {
		return "", fmt.Errorf("create replica: %w", err)
	}
	if dir, err := find(fsys, c.ReplicaID); err == nil {
		return dir, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("create replica %s: %w", c.ReplicaID, err)
	}
	dir := Dir(c.Volume, c.ReplicaID)
	if err := c.create(fsys, dir); err != nil {
		return "", fmt.Errorf("create replica %s: %w", dir, err)
	}
	return dir, nil
}

func (c *CreateConfig) create(fsys disk.FS, dir string) error {
	if there, err := disk.Exists(fsys, dir); err != nil {
		return err
	} else if there {
		return fmt.Errorf("the directory is another replica's: %w", fs.ErrExist)
	}
	if err := fsys.Mkdir(Root); err != nil {
		return err
	}
	if err := fsys.SyncDir("."); err != nil {
		return err
	}
	tmp := dir + tmpSuffix
	if err := removeAll(fsys, tmp); err != nil {
		return err
	}
	if err := fsys.Mkdir(tmp); err != nil {
		return err
	}
	st, err := c.fill(fsys, tmp)
	if err != nil {
		return errors.Join(err, removeAll(fsys, tmp))
	}
	if err := writeRecord(fsys, path.Join(tmp, recordName), st); err != nil {
		return errors.Join(err, removeAll(fsys, tmp))
	}
	if err := fsys.SyncDir(tmp); err != nil {
		return err
	}
	if err := fsys.Rename(tmp, dir); err != nil {
		return err
	}
	return fsys.SyncDir(Root)
}

// fill makes the first head in the directory and returns the record that goes with it.
func (c *CreateConfig) fill(fsys disk.FS, dir string) (state, error) {
	st := state{Version: formatVersion, ReplicaID: c.ReplicaID, VolumeID: c.VolumeID, Volume: c.Volume, Created: c.Created.UTC(), Generation: 1,
		SizeBytes: c.SizeBytes, Head: c.HeadID, Layers: []node{{ID: c.HeadID}}}
	meta := layer.Meta{ID: layer.ID(c.HeadID), Kind: layer.KindVolume, State: layer.StateHead, VolumeID: c.VolumeID, Volume: c.Volume,
		ReplicaID: c.ReplicaID, Created: st.Created}
	if c.Base != nil {
		base, err := openBase(fsys, c.Base.ID, c.Base.Path)
		if err != nil {
			return st, err
		}
		size := base.SizeBytes()
		meta.Parent = base.ID()
		meta.Image = &layer.Image{Name: c.Base.Name, ID: string(c.Base.ID)}
		if err := base.Close(); err != nil {
			return st, err
		}
		if size > c.SizeBytes {
			return st, fmt.Errorf("a volume of %d bytes is smaller than its image of %d: %w", c.SizeBytes, size, ErrInvalid)
		}
		st.Base, st.BasePath = c.Base.ID, c.Base.Path
	}
	head, err := layer.Create(fsys, path.Join(dir, string(c.HeadID)+layerSuffix), meta, c.SizeBytes, layer.Options{BootID: bootID(c.BootID)})
	if err != nil {
		return st, err
	}
	return st, head.Close()
}

// openBase opens an image's layer and makes sure that it is that image.
func openBase(fsys disk.FS, id replica.LayerID, name string) (*layer.Layer, error) {
	base, err := layer.Open(fsys, name, layer.Options{ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", id, err)
	}
	m := base.Meta()
	if m.Kind != layer.KindImage || m.State != layer.StateSealed || string(m.ID) != string(id) && (m.Image == nil || m.Image.ID != string(id)) {
		return nil, errors.Join(fmt.Errorf("%s is not image %s: %w", name, id, block.ErrCorrupt), base.Close())
	}
	return base, nil
}

// writeRecord makes a record file, allocated in full and durable, at a name where there is none.
func writeRecord(fsys disk.FS, name string, st state) error {
	f, err := fsys.Create(name, 2*slotBytes)
	if err != nil {
		return err
	}
	if err := fillRecord(f, st); err != nil {
		return errors.Join(err, f.Close())
	}
	return f.Close()
}

func fillRecord(f disk.File, st state) error {
	if err := f.Reserve(0, 2*slotBytes); err != nil {
		return err
	}
	payload, err := json.Marshal(st)
	if err != nil {
		return err
	}
	return disk.OpenSlots(f, 0, slotBytes).Store(payload)
}

// LayerBoot is what layers are told of a host's boot id (OpenConfig.BootID), for those that are no replica's.
func LayerBoot(hostBootID string) layer.BootID { return bootID(hostBootID) }

// bootID turns a host's boot id (a UUID, or anything else that changes with every boot and mount) into a layer's.
func bootID(s string) layer.BootID {
	var id layer.BootID
	if b, err := hex.DecodeString(strings.ReplaceAll(s, "-", "")); err == nil && len(b) == len(id) {
		copy(id[:], b)
		return id
	}
	sum := sha256.Sum256([]byte(s))
	copy(id[:], sum[:])
	return id
}

// removeAll removes a directory and the files in it; none is fine.
func removeAll(fsys disk.FS, dir string) error {
	names, err := fsys.List(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := fsys.Remove(path.Join(dir, n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return fsys.Remove(dir)
}

// Delete removes a replica for good. Idempotent: also a deletion that was cut short, or a creation that was, is finished, and what is not there is fine. disk.ErrLocked while somebody has the
// replica open.
func Delete(fsys disk.FS, replicaID string) error {
	dir, err := find(fsys, replicaID)
	switch {
	case err == nil:
		err = bury(fsys, dir)
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	}
	if err == nil {
		err = sweep(fsys, replicaID)
	}
	if err != nil {
		return fmt.Errorf("delete replica %s: %w", replicaID, err)
	}
	return nil
}

// bury renames a replica that nobody has open to its deleted name, durably.
func bury(fsys disk.FS, dir string) error {
	f, err := fsys.Open(path.Join(dir, recordName))
	if err != nil {
		return err
	}
	if err := f.Lock(); err != nil {
		return errors.Join(err, f.Close())
	}
	err = fsys.Rename(dir, dir+deletedSuffix)
	if err == nil {
		err = fsys.SyncDir(Root)
	}
	return errors.Join(err, f.Close())
}

// sweep removes what creations and deletions of this replica left half done.
func sweep(fsys disk.FS, replicaID string) error {
	names, err := fsys.List(Root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	swept := false
	for _, n := range names {
		for _, suffix := range []string{tmpSuffix, deletedSuffix} {
			if strings.HasSuffix(n, "-"+replicaID[:min(8, len(replicaID))]+suffix) && !others(fsys, path.Join(Root, n), replicaID) {
				if err := removeAll(fsys, path.Join(Root, n)); err != nil {
					return err
				}
				swept = true
			}
		}
	}
	if !swept {
		return nil
	}
	return fsys.SyncDir(Root)
}

// others tells whether a directory is provably another replica's, whose id begins the same.
func others(fsys disk.FS, dir, replicaID string) bool {
	st, err := readRecord(fsys, dir)
	return err == nil && st.ReplicaID != replicaID
}
