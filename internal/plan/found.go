package plan

import (
	"maps"
	"reflect"
	"slices"
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
	API     int // the latest version of its wire that it speaks
	Network Network
	Cluster Neighbours
	Disks   []FoundDisk
	Volumes []FoundVolume
	Jobs    []FoundJob

	x *index // of all this; Index makes it
}

// APICluster is the first version of the data process's wire that knows of other nodes.
const APICluster = 3

// Neighbours is what a data process is told of its cluster: where it listens, what it shows, and who the other nodes are. The zero value is no cluster.
type Neighbours struct {
	ClusterID, Node, Listen   string
	CertFile, KeyFile, CAFile string // paths
	Peers                     []Neighbour
}

// Neighbour is another node: where its data process is, and where its serve.
type Neighbour struct {
	Node, NodeID, Data, Ledger string
}

// Same tells whether both say the same.
func (n Neighbours) Same(m Neighbours) bool {
	peers := slices.Equal(n.Peers, m.Peers)
	n.Peers, m.Peers = nil, nil
	return peers && reflect.DeepEqual(n, m)
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
	Away                                string // since when and why the replica's node does not answer; "": it does
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

// FoundJob is an import, known by its image's id, an export, or the copying of a replica, known by the copy's id.
type FoundJob struct {
	ID, DiskID, State string
	Export, Copy      bool
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
	copies   map[string]*FoundJob        // by the copy's id
}

// Index makes f quick to look into; whoever plans from it several times does it once. f is not changed afterwards.
func (f *Found) Index() {
	if f.x != nil {
		return
	}
	x := &index{
		volumes: make(map[string]*FoundVolume, len(f.Volumes)), replicas: map[[2]string]*FoundReplica{},
		exports: map[string]*FoundJob{}, copies: map[string]*FoundJob{},
	}
	for i := range f.Jobs {
		switch j := &f.Jobs[i]; {
		case j.Export:
			x.exports[j.ID] = j
		case j.Copy:
			x.copies[j.ID] = j
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
	f.x = x
}

// Changes is what differs between two looks at a data process.
type Changes struct {
	All     bool            // another process, other disks: everything may follow from that
	Space   bool            // a disk's free space
	Images  bool            // which images are on the disks
	Things  bool            // which replicas are on the disks
	Jobs    bool            // exports or copies
	Volumes map[string]bool // by volume id: those that are open, or have replicas, otherwise than before
}

// Diff says what is different in g, the later look.
func (f *Found) Diff(g *Found) Changes {
	f.Index()
	g.Index()
	c := Changes{Volumes: map[string]bool{}}
	c.All = f.Known != g.Known || f.BootID != g.BootID || f.Version != g.Version || f.PID != g.PID || !f.Started.Equal(g.Started) || f.API != g.API ||
		f.Network != g.Network || !f.Cluster.Same(g.Cluster) || len(f.Disks) != len(g.Disks)
	for i := 0; i < len(f.Disks) && !c.All; i++ {
		a, b := &f.Disks[i], &g.Disks[i]
		c.All = a.DiskID != b.DiskID || a.Path != b.Path || a.Error != b.Error
		c.Space = c.Space || a.TotalBytes != b.TotalBytes || a.FreeBytes != b.FreeBytes
		c.Images = c.Images || !slices.Equal(a.Images, b.Images)
	}
	c.Jobs = !slices.Equal(f.Jobs, g.Jobs)
	for k, r := range g.x.replicas {
		if was := f.x.replicas[k]; was == nil || *was != *r {
			c.Volumes[r.VolumeID], c.Things = true, c.Things || was == nil
		}
	}
	for k, r := range f.x.replicas {
		if g.x.replicas[k] == nil {
			c.Volumes[r.VolumeID], c.Things = true, true
		}
	}
	for id, v := range g.x.volumes {
		if was := f.x.volumes[id]; was == nil || !was.same(v) {
			c.Volumes[id] = true
		}
	}
	for id := range f.x.volumes {
		if g.x.volumes[id] == nil {
			c.Volumes[id] = true
		}
	}
	return c
}

// same compares field by field: reflection would cost more than planning the volume does. A test holds it to the fields there are.
func (v *FoundVolume) same(w *FoundVolume) bool {
	return v.VolumeID == w.VolumeID && v.Volume == w.Volume && v.ReplicaID == w.ReplicaID && v.DiskID == w.DiskID && v.Frontend == w.Frontend &&
		v.Endpoint == w.Endpoint && v.TCPEndpoint == w.TCPEndpoint && v.SizeBytes == w.SizeBytes && v.Epoch == w.Epoch && v.State == w.State && v.Code == w.Code &&
		v.Error == w.Error && v.Space == w.Space && v.Limits == w.Limits && v.Away == w.Away && slices.EqualFunc(v.Layers, w.Layers, FoundLayer.same)
}

func (l FoundLayer) same(m FoundLayer) bool {
	return l.ID == m.ID && l.Parent == m.Parent && l.Snapshot == m.Snapshot && l.Head == m.Head && l.UserCreated == m.UserCreated && l.Removed == m.Removed &&
		l.Created.Equal(m.Created) && l.DataBytes == m.DataBytes && l.Space == m.Space && maps.Equal(l.Labels, m.Labels)
}

// job finds an import; there is at most one of an image at a time.
func (f *Found) job(imageID string) (FoundJob, bool) {
	for _, j := range f.Jobs {
		if j.ID == imageID && !j.Export && !j.Copy {
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
