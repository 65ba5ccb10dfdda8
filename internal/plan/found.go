package plan

import (
	"time"

	"ashlar/internal/catalog"
)

// Found is what a node's data process has, as far as plans care: the agent makes it from the data process's State. The zero Found is no answer.
type Found struct {
	Known   bool // a data process answered
	BootID  string
	Version string
	PID     int
	Started time.Time
	Network Network
	Disks   []FoundDisk
	Volumes []FoundVolume
	Jobs    []FoundJob
}

// Network is where a node's volumes are offered over TCP, beside their sockets; the zero value is nowhere. Files are paths.
type Network struct {
	Address, CertFile, KeyFile, ClientCA string
}

// FoundDisk is a disk in use. Error says what is wrong with it or with things on it; those are not listed.
type FoundDisk struct {
	DiskID, Path, Error   string
	TotalBytes, FreeBytes int64
	Replicas              []FoundReplica
	Images                []FoundImage
}

// FoundReplica is a replica on a disk.
type FoundReplica struct {
	ReplicaID, VolumeID, Volume, DataPath, Failed string
	SizeBytes, AllocatedBytes                     int64
	Open                                          bool
}

// FoundImage is an image that is complete on a disk.
type FoundImage struct {
	ImageID, Name, SHA512, Digest, Format       string
	SizeBytes, VirtualSizeBytes, AllocatedBytes int64
}

// The states of a FoundVolume.
const (
	FoundOpening = "opening"
	FoundOpen    = "open"
	FoundFailed  = "failed"
	FoundClosing = "closing"
)

// FoundVolume is a volume the data process has open, or could not open, or whose last copy failed.
type FoundVolume struct {
	VolumeID, Volume, ReplicaID, DiskID string
	Frontend, Endpoint, TCPEndpoint     string
	SizeBytes                           int64
	Epoch                               uint64
	State                               string
	Code                                string // one of catalog's codes of operations
	Error                               string
	Layers                              []FoundLayer
	Space                               catalog.Space
	Limits                              catalog.Limits
}

// FoundLayer is one layer of an open volume.
type FoundLayer struct {
	ID, Parent, Snapshot       string
	Head, UserCreated, Removed bool
	Created                    time.Time
	DataBytes                  int64 // guest bytes that this layer alone holds
	Space                      catalog.Space
	Labels                     map[string]string
}

// The states of a FoundJob.
const (
	JobRunning = "running"
	JobDone    = "done"
	JobFailed  = "failed"
)

// FoundJob is an import, known by its image's id, or an export.
type FoundJob struct {
	ID, DiskID, State string
	Export            bool
	DoneBytes         int64
	Percent           int
	Failure           Patience
	Code              string // one of catalog's codes of operations
	Error             string
}

// Patience says whether what failed is worth another try.
type Patience int

// The patiences.
const (
	Transient Patience = iota // tried again for ever, ever more slowly
	Limited                   // tried again a few times
	Final                     // never tried again
)

// usable tells whether what is on the disk is known: what is not listed is not there.
func (d *FoundDisk) usable() bool { return d.Error == "" || d.TotalBytes > 0 }

// disk finds a disk by its id.
func (f *Found) disk(id string) (FoundDisk, bool) {
	for _, d := range f.Disks {
		if d.DiskID == id && id != "" {
			return d, true
		}
	}
	return FoundDisk{}, false
}

// diskAt finds a disk by its path.
func (f *Found) diskAt(path string) (FoundDisk, bool) {
	for _, d := range f.Disks {
		if d.Path == path {
			return d, true
		}
	}
	return FoundDisk{}, false
}

// index makes what is looked up for every volume quick to find.
type index struct {
	volumes  map[string]*FoundVolume     // by volume id
	replicas map[[2]string]*FoundReplica // by disk id and replica id
	exports  map[string]*FoundJob        // by id
}

func newIndex(f *Found) index {
	x := index{volumes: make(map[string]*FoundVolume, len(f.Volumes)), replicas: map[[2]string]*FoundReplica{}, exports: map[string]*FoundJob{}}
	for i := range f.Jobs {
		if f.Jobs[i].Export {
			x.exports[f.Jobs[i].ID] = &f.Jobs[i]
		}
	}
	for i := range f.Volumes {
		x.volumes[f.Volumes[i].VolumeID] = &f.Volumes[i]
	}
	for _, d := range f.Disks {
		for i := range d.Replicas {
			x.replicas[[2]string{d.DiskID, d.Replicas[i].ReplicaID}] = &d.Replicas[i]
		}
	}
	return x
}

// job finds an import; there is at most one of an image at a time.
func (f *Found) job(imageID string) (FoundJob, bool) {
	for _, j := range f.Jobs {
		if j.ID == imageID && !j.Export {
			return j, true
		}
	}
	return FoundJob{}, false
}

func (d *FoundDisk) image(id string) (FoundImage, bool) {
	for _, i := range d.Images {
		if i.ImageID == id {
			return i, true
		}
	}
	return FoundImage{}, false
}
