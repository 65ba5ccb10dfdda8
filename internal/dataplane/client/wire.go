// Package client is both ends of the data process's wire: HTTP with JSON bodies on unix sockets, never on a network. The agent says verbs to the
// data process on <run-dir>/data/<version>.sock (Client, and Handler for the other end); the data process asks the agent for the catalogue's membership
// records on <run-dir>/ledger.sock (LedgerClient, LedgerHandler). Error codes cross the wire as values. It imports nothing of ours, so that both
// halves of the house may use it.
//
// Read next: dataplane (who answers), agent (who asks).
package client

import (
	"encoding/json"
	"time"
)

// APIMin and APICurrent are the window of wire versions this build speaks; a side refuses a peer outside its window and names both.
const (
	APIMin     = 1
	APICurrent = 3
)

// Hello is what a data process says of itself.
type Hello struct {
	Version    string    `json:"version"`
	APIMin     int       `json:"apiMin"`
	APICurrent int       `json:"apiCurrent"`
	PID        int       `json:"pid"`
	BootID     string    `json:"bootID"`
	Started    time.Time `json:"started"`
	IOFlusher  bool      `json:"ioFlusher"` // PR_SET_IO_FLUSHER holds
}

// Disk asks the data process to use a directory as a disk; it is formatted if it is empty, and refused (CodeForeignDisk) if it belongs to another cluster.
type Disk struct {
	Path      string `json:"path"`
	ClusterID string `json:"clusterID"`
	// DiskID, unless empty, must be the disk that is there (CodeNotFound): so that a directory whose file system is not mounted is not taken for a new disk.
	DiskID string `json:"diskID,omitempty"`
}

// DiskStatus is a disk in use.
type DiskStatus struct {
	DiskID     string         `json:"diskID"`
	Path       string         `json:"path"`
	ClusterID  string         `json:"clusterID"`
	TotalBytes int64          `json:"totalBytes"`
	FreeBytes  int64          `json:"freeBytes"`
	Error      string         `json:"error,omitempty"`
	Replicas   []ReplicaFound `json:"replicas"`
	Images     []ImageFound   `json:"images"`
}

// ReplicaFound is a replica directory on a disk.
type ReplicaFound struct {
	ReplicaID      string          `json:"replicaID"`
	VolumeID       string          `json:"volumeID"`
	Volume         string          `json:"volume"`
	DataPath       string          `json:"dataPath"`
	SizeBytes      int64           `json:"sizeBytes"`
	AllocatedBytes int64           `json:"allocatedBytes"`
	Open           bool            `json:"open"`
	Failed         string          `json:"failed,omitempty"`
	Record         json.RawMessage `json:"record,omitempty"` // newest membership record it was sent
	// Chain and Base are said of a replica that keeps no membership record: its layers, head first, and the id of the image below them.
	Chain []string `json:"chain,omitempty"`
	Base  string   `json:"base,omitempty"`
	// RecordLost: its own record is gone or damaged, and what is said here was put together from its layers' headers. It opens again after RebuildReplica.
	RecordLost bool `json:"recordLost,omitempty"`
}

// ImageFound is an image's layer on a disk.
type ImageFound struct {
	ImageID          string `json:"imageID"`
	Name             string `json:"name"`
	SizeBytes        int64  `json:"sizeBytes"`
	VirtualSizeBytes int64  `json:"virtualSizeBytes"`
	AllocatedBytes   int64  `json:"allocatedBytes"`
	SHA512           string `json:"sha512"`
	Digest           string `json:"digest"`
	Format           string `json:"format"`
	Source           string `json:"source"`
}

// RebuildReplica makes the own record of a replica again from its layers' headers, if that is lost (ReplicaFound.RecordLost); otherwise it changes nothing.
type RebuildReplica struct {
	DiskID    string `json:"diskID"`
	ReplicaID string `json:"replicaID"`
	// Record is the volume's membership record, of which the replica is a member: it goes on under that epoch, if it has the chain that is recorded or pending there (else CodeCorrupt). Empty: nothing is known of
	// a writer, and whoever has the replica opened next continues above every epoch there was.
	Record json.RawMessage `json:"record,omitempty"`
}

// CreateReplica makes an empty replica of a volume. Idempotent by ReplicaID.
type CreateReplica struct {
	DiskID    string `json:"diskID"`
	ReplicaID string `json:"replicaID"`
	VolumeID  string `json:"volumeID"`
	Volume    string `json:"volume"`
	HeadID    string `json:"headID"` // layer id of the first head; the replica id serves
	SizeBytes int64  `json:"sizeBytes"`
	ImageID   string `json:"imageID,omitempty"` // must be ready on the same disk
	Image     string `json:"image,omitempty"`
}

// DeleteReplica removes a replica's directory. Idempotent. CodeInUse while it is open.
type DeleteReplica struct {
	DiskID    string `json:"diskID"`
	ReplicaID string `json:"replicaID"`
}

// OpenVolume makes this node the volume's writer: claim, fence, open, and export it. Idempotent while it is open with the same arguments.
type OpenVolume struct {
	VolumeID  string `json:"volumeID"`
	Volume    string `json:"volume"`
	Node      string `json:"node"`
	DiskID    string `json:"diskID"` // of the one replica, on its node
	ReplicaID string `json:"replicaID"`
	// ReplicaNode is the node that has the replica; "" or Node: this one. Another's is reached through the Cluster's peers.
	ReplicaNode string `json:"replicaNode,omitempty"`
	Frontend    string `json:"frontend"` // "nbd", "blockdev", or "" for none
	// Salvage opens a replica on which a flush failed: a person's decision. Of another node's replica it has to be carried out there first, by opening the volume once on that node (CodeSalvage until then).
	Salvage bool `json:"salvage,omitempty"`
	// Limits hold from the first request on. They do not count when it is asked whether the volume is open with the same arguments: SetLimits changes them.
	Limits Limits `json:"limits,omitzero"`
}

// Limits bound what a volume's clients may ask per second, reads and writes together; zero: no limit. A request counts as one however large; bytes count those read
// and written. Up to BurstSeconds the burst rates hold, as in QEMU's throttling: a client that used less than its rate may catch up.
type Limits struct {
	IOPS                int64 `json:"iops,omitempty"`
	BytesPerSecond      int64 `json:"bytesPerSecond,omitempty"`
	BurstIOPS           int64 `json:"burstIOPS,omitempty"` // zero: as IOPS; else at least IOPS
	BurstBytesPerSecond int64 `json:"burstBytesPerSecond,omitempty"`
	BurstSeconds        int64 `json:"burstSeconds,omitempty"` // zero: 1; at most 3600
}

// SetLimits changes a volume's limits while it is open. Idempotent.
type SetLimits struct {
	VolumeID string `json:"volumeID"`
	Limits   Limits `json:"limits"`
}

// Background bounds what the node does for itself (purge, merge, checksums, imports, exports), each a rate for all of them together; zero: no limit.
type Background struct {
	BytesPerSecond int64 `json:"bytesPerSecond"`
}

// Network says where volumes are offered over TCP beside their sockets: every open volume whose frontend is nbd, under its name. Beyond loopback both certificates are
// needed: the server shows its own, and clients must show one that ClientCA signed. Recorded in open.json, so that a restarted process listens again. An empty
// Address ends it. Files are paths of PEM, read at the call and whenever they change.
type Network struct {
	Address  string `json:"address"` // HOST:PORT
	CertFile string `json:"certFile,omitempty"`
	KeyFile  string `json:"keyFile,omitempty"`
	ClientCA string `json:"clientCA,omitempty"`
}

// Cluster is what a data process is told of the cluster its node is in: where it listens for other nodes' data processes, which of them may come, and where they are. Recorded in
// open.json, so that a restarted process needs nobody to go on. A zero Cluster ends it: nothing is listened to, and remote replicas cannot be reached.
type Cluster struct {
	ClusterID string `json:"clusterID"`
	Node      string `json:"node"`
	Listen    string `json:"listen"` // HOST:PORT (catalog.PortData)
	// Paths of PEM, read at the call and whenever they change: this node's certificate, its key, and the one authority trusted (docs/formats/cluster.md).
	CertFile string `json:"certFile"`
	KeyFile  string `json:"keyFile"`
	CAFile   string `json:"caFile"`
	Peers    []Peer `json:"peers"` // every node of the cluster but this one, sorted by name
}

// Peer is another node. Its certificate has its name and its id.
type Peer struct {
	Node   string `json:"node"`
	NodeID string `json:"nodeID"`
	Data   string `json:"data"`   // HOST:PORT of its data process
	Ledger string `json:"ledger"` // HOST:PORT of its serve, for membership records while this node's own is down
}

// CopyReplica starts a job that copies a replica of a volume, which nobody has open, from another node (or another disk of this one) and puts the copy in its place
// (docs/decisions/0017): claim the next epoch, copy every layer, make it durable, swap the membership record. Idempotent by ReplicaID while it runs and once it is done. CancelImport (with
// ImageID = ReplicaID) gives it up and forgets it; what was swapped stays swapped.
type CopyReplica struct {
	VolumeID  string `json:"volumeID"`
	Volume    string `json:"volume"`
	Node      string `json:"node"`      // this one
	DiskID    string `json:"diskID"`    // where the copy goes
	ReplicaID string `json:"replicaID"` // the copy's
	From      string `json:"from"`      // the replica that is copied
	FromNode  string `json:"fromNode"`
	ImageID   string `json:"imageID,omitempty"` // must be on the disk
}

// OpenSource asks for something to be readable as a read-only NBD export on a socket of its own: a snapshot of an open volume (VolumeID and Snapshot), or an image
// (DiskID and ImageID). While it is open, purge and merge pass its layers by. It ends with CloseSource and with the process. Idempotent by ID.
type OpenSource struct {
	ID       string `json:"id"` // 32 hex digits
	VolumeID string `json:"volumeID,omitempty"`
	Snapshot string `json:"snapshot,omitempty"`
	DiskID   string `json:"diskID,omitempty"`
	ImageID  string `json:"imageID,omitempty"`
}

// Source is something that can be read: nbd+unix:///ID?socket=PATH.
type Source struct {
	ID        string `json:"id"`
	URI       string `json:"uri"`
	SizeBytes int64  `json:"sizeBytes"`
}

// CloseSource names a source nobody reads any more.
type CloseSource struct {
	ID string `json:"id"`
}

// ExportImage starts a work process that reads a source and writes an image file of it. Idempotent by ID while it runs or once it is done; its Job says how far it is
// and stays until CancelImport forgets it. To is an absolute path (a new file: made as NAME.partial beside it, then renamed; CodeExists if there is one), or
// stream+unix:///PATH: a socket that the work process connects to and writes the file's bytes into, in order.
type ExportImage struct {
	ID       string `json:"id"`                 // 32 hex digits
	Source   string `json:"source"`             // an NBD URI
	Format   string `json:"format"`             // raw, qcow2
	Compress string `json:"compress,omitempty"` // qcow2: "", "zstd", "zlib"; raw to a stream: "", "gzip"
	To       string `json:"to"`
}

// Diff asks for what changed between two snapshots of an open volume, From (empty: the image below, or nothing) older than To (empty: the head, as of now).
type Diff struct {
	VolumeID string `json:"volumeID"`
	From     string `json:"from,omitempty"`
	To       string `json:"to,omitempty"`
	Off      int64  `json:"off"` // where to go on
}

// Changes are the ranges in which two snapshots may differ, ascending, merged, whole units; at most 65536 of them in one answer.
type Changes struct {
	Ranges    []Change `json:"ranges"`
	NextOff   int64    `json:"nextOff"` // SizeBytes: that was all
	SizeBytes int64    `json:"sizeBytes"`
}

// Change is one range.
type Change struct {
	Off  int64 `json:"off"`
	N    int64 `json:"n"`
	Zero bool  `json:"zero,omitempty"` // reads as zero in To
}

// Space is what something takes on its disk, in bytes.
type Space struct {
	// Exclusive would be freed if the object, alone, were deleted (and purged); Shared is what it reads from others (an image, older snapshots) and they keep; Reclaimable is what
	// a purge would free now. Metadata counts in Exclusive of the volume, in no snapshot.
	ExclusiveBytes   int64 `json:"exclusiveBytes"`
	SharedBytes      int64 `json:"sharedBytes"`
	ReclaimableBytes int64 `json:"reclaimableBytes"`
}

// VolumeStatus is a volume that is open in the data process (or could not be).
type VolumeStatus struct {
	VolumeID  string `json:"volumeID"`
	Volume    string `json:"volume"`
	ReplicaID string `json:"replicaID"`
	DiskID    string `json:"diskID"`
	// ReplicaNode is as in OpenVolume. What is said of layers and space of another node's replica is what it said last.
	ReplicaNode string `json:"replicaNode,omitempty"`
	// Away says since when and why the replica's node does not answer; I/O waits. Empty: it answers.
	Away     string `json:"away,omitempty"`
	Frontend string `json:"frontend"`
	Endpoint string `json:"endpoint,omitempty"` // nbd+unix:///VOLUME?socket=PATH
	// TCPEndpoint, while there is a Network, is where it is offered over TCP: nbd://HOST:PORT/VOLUME, or nbds with TLS.
	TCPEndpoint string  `json:"tcpEndpoint,omitempty"`
	SizeBytes   int64   `json:"sizeBytes"`
	Epoch       uint64  `json:"epoch"`
	Session     uint64  `json:"session"`
	State       string  `json:"state"` // opening, open, failed, closing
	Code        Code    `json:"code,omitempty"`
	Error       string  `json:"error,omitempty"`
	Layers      []Layer `json:"layers"`
	Space       Space   `json:"space"`
	Limits      Limits  `json:"limits,omitzero"`
	Clients     int     `json:"clients"` // connections of the frontend
	Stats       Stats   `json:"stats"`
}

// Stats counts what a frontend did since the volume was opened by this process.
type Stats struct {
	ReadOps, WriteOps, FlushOps, ZeroOps uint64
	ReadBytes, WriteBytes                uint64
	Errors                               uint64
	Throttled                            uint64 // requests that waited for the limits
}

// Layer is one layer of an open volume; exactly one is the head.
type Layer struct {
	ID             string            `json:"id"`
	Parent         string            `json:"parent,omitempty"` // a layer of the volume; the image below is not listed
	Head           bool              `json:"head"`
	Snapshot       string            `json:"snapshot,omitempty"`
	UserCreated    bool              `json:"userCreated"`
	Removed        bool              `json:"removed"`
	Created        time.Time         `json:"created"`
	SizeBytes      int64             `json:"sizeBytes"`
	AllocatedBytes int64             `json:"allocatedBytes"` // on the disk, metadata included
	DataBytes      int64             `json:"dataBytes"`      // guest bytes this layer alone holds: units in state Data
	Space          Space             `json:"space"`
	Verified       bool              `json:"verified"`
	Labels         map[string]string `json:"labels,omitempty"`
}

// Operate does one verb on an open volume. OpID (32 hex digits) makes it idempotent: it becomes the id of the new head.
type Operate struct {
	VolumeID  string            `json:"volumeID"`
	OpID      string            `json:"opID"`
	Verb      string            `json:"verb"` // snapshot, revert, expand, snapshot-remove, purge
	Snapshot  string            `json:"snapshot,omitempty"`
	SizeBytes int64             `json:"sizeBytes,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	System    bool              `json:"system,omitempty"` // a snapshot made by the system, not a user
}

// ImportImage starts a work process that fetches, verifies and converts an image onto a disk. Idempotent by ImageID while it runs or once it is ready.
type ImportImage struct {
	DiskID  string `json:"diskID"`
	ImageID string `json:"imageID"`
	Name    string `json:"name"`
	// Source is an http(s) or nbd(s) URL, an absolute path, stream+unix:///PATH (a socket to connect to and read the file's bytes from), or peer://NODE/DISKID: the same image, ready on
	// a disk of another node or of this one, whose content is copied, checked against its digest, and goes on saying what the original says of the file as received.
	Source   string `json:"source"`
	Checksum string `json:"checksum,omitempty"` // sha512:… or sha256:…
	// SizeBytes is what a stream must hold; -1: not known. Other sources know theirs.
	SizeBytes int64 `json:"sizeBytes,omitempty"`
}

// Job is an import or an export under way or ended.
type Job struct {
	ID         string      `json:"id"`             // the image's, or the export's
	Kind       string      `json:"kind,omitempty"` // "" or "import", "export", "copy" (of a replica)
	DiskID     string      `json:"diskID"`
	State      string      `json:"state"` // running, done, failed
	DoneBytes  int64       `json:"doneBytes"`
	TotalBytes int64       `json:"totalBytes"` // 0: not known
	Percent    int         `json:"percent"`    // of the whole import; never falls
	Code       Code        `json:"code,omitempty"`
	Error      string      `json:"error,omitempty"`
	Image      *ImageFound `json:"image,omitempty"`
}

// CloseVolume names a volume to close. What its guests wrote is flushed, and the record says that nobody writes any more, before it answers.
type CloseVolume struct {
	VolumeID string `json:"volumeID"`
	// Force waits for neither a flush nor a clean release that cannot be had, because the replica's node does not answer: the connection to it is ended, and the volume is closed here. What was
	// acknowledged is in that node's memory or on its disk; what was not flushed is lost only if that node restarts before it has written it out, or never comes back. The record goes on naming this
	// writer, which whoever opens next takes as one that died. Without Force such a volume is not closed, with CodeUnreachable. A Force comes through while a close without it waits.
	Force bool `json:"force,omitempty"`
}

// WaitState asks for the state as soon as its revision is another than AfterRev.
type WaitState struct {
	AfterRev uint64 `json:"afterRev"`
}

// CancelImport names an import to give up.
type CancelImport struct {
	ImageID string `json:"imageID"`
}

// DeleteImage removes an image's layer from a disk. Idempotent. CodeInUse while a replica on the disk stands on it.
type DeleteImage struct {
	DiskID  string `json:"diskID"`
	ImageID string `json:"imageID"`
}

// Check asks for every layer of a replica to be checked: by volume if it is open, else by disk and replica. The data process that has the replica answers: of a volume whose replica is another node's
// that one is asked, by disk and replica (CodeInvalid here).
type Check struct {
	VolumeID  string `json:"volumeID"`
	DiskID    string `json:"diskID,omitempty"`
	ReplicaID string `json:"replicaID,omitempty"`
}

// Shutdown ends the data process in order: every volume flushed and closed, its sockets gone. Without Holder it is started again.
type Shutdown struct {
	Holder bool `json:"holder"` // end the holder too, so that nothing starts again by itself
}

// State is everything a data process has, with a revision that grows with every change (not with every write).
type State struct {
	Rev     uint64         `json:"rev"`
	Hello   Hello          `json:"hello"`
	Network Network        `json:"network,omitzero"`
	Cluster Cluster        `json:"cluster,omitzero"`
	Disks   []DiskStatus   `json:"disks"`
	Volumes []VolumeStatus `json:"volumes"`
	Jobs    []Job          `json:"jobs"`
}

// Problem is one finding of a check.
type Problem struct {
	Object string `json:"object"`
	What   string `json:"what"`
}

// Problems is what a check found; none is a clean bill, but for what it left out.
type Problems struct {
	Problems []Problem `json:"problems"`
	LeftOut  []string  `json:"leftOut,omitempty"` // what was not looked at, and why
}

// MembershipRead asks for a volume's membership record.
type MembershipRead struct {
	VolumeID string `json:"volumeID"`
}

// MembershipSwap asks for a membership record to be replaced if its revision is still Was (0: there is none).
type MembershipSwap struct {
	VolumeID string          `json:"volumeID"`
	Record   json.RawMessage `json:"record"`
	Was      int64           `json:"was"`
}

// MembershipEntry is a membership record (JSON of replica.Record) and its revision.
type MembershipEntry struct {
	Record json.RawMessage `json:"record"`
	Rev    int64           `json:"rev"`
}

// Code is an error as it crosses the wire.
type Code string

// The codes. Each maps to a sentinel of this package (errors.go) and back.
const (
	CodeNotFound    Code = "not-found"
	CodeExists      Code = "exists"
	CodeInUse       Code = "in-use"
	CodeInvalid     Code = "invalid"
	CodeConflict    Code = "conflict"
	CodeNoSpace     Code = "no-space"
	CodeCorrupt     Code = "corrupt"
	CodeFenced      Code = "fenced"
	CodeFailed      Code = "failed"
	CodeSalvage     Code = "needs-salvage"
	CodeStale       Code = "stale-catalogue"
	CodeForeignDisk Code = "foreign-disk"
	CodeVersion     Code = "version"
	CodeUnreachable Code = "unreachable"
	CodeChecksum    Code = "checksum"
	CodeFormat      Code = "format"
	CodeSource      Code = "source"
	CodeFrontend    Code = "frontend-enabled"
	CodeCancelled   Code = "cancelled"
	CodeInternal    Code = "internal"
)
