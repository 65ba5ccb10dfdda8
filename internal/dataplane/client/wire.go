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
	APICurrent = 1
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
	DiskID    string `json:"diskID"` // of the one local replica
	ReplicaID string `json:"replicaID"`
	Frontend  string `json:"frontend"` // "nbd", or "" for none
	Salvage   bool   `json:"salvage,omitempty"`
}

// VolumeStatus is a volume that is open in the data process (or could not be).
type VolumeStatus struct {
	VolumeID  string  `json:"volumeID"`
	Volume    string  `json:"volume"`
	ReplicaID string  `json:"replicaID"`
	DiskID    string  `json:"diskID"`
	Frontend  string  `json:"frontend"`
	Endpoint  string  `json:"endpoint,omitempty"` // nbd+unix:///VOLUME?socket=PATH
	SizeBytes int64   `json:"sizeBytes"`
	Epoch     uint64  `json:"epoch"`
	Session   uint64  `json:"session"`
	State     string  `json:"state"` // opening, open, failed, closing
	Code      Code    `json:"code,omitempty"`
	Error     string  `json:"error,omitempty"`
	Layers    []Layer `json:"layers"`
	Clients   int     `json:"clients"` // connections of the frontend
	Stats     Stats   `json:"stats"`
}

// Stats counts what a frontend did since the volume was opened by this process.
type Stats struct {
	ReadOps, WriteOps, FlushOps, ZeroOps uint64
	ReadBytes, WriteBytes                uint64
	Errors                               uint64
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
	AllocatedBytes int64             `json:"allocatedBytes"`
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
	DiskID   string `json:"diskID"`
	ImageID  string `json:"imageID"`
	Name     string `json:"name"`
	Source   string `json:"source"`             // http(s) URL or an absolute path
	Checksum string `json:"checksum,omitempty"` // sha512:… or sha256:…
}

// Job is an import under way or ended.
type Job struct {
	ID         string      `json:"id"` // the image id
	DiskID     string      `json:"diskID"`
	State      string      `json:"state"` // running, done, failed
	DoneBytes  int64       `json:"doneBytes"`
	TotalBytes int64       `json:"totalBytes"` // 0: not known
	Percent    int         `json:"percent"`    // of the whole import; never falls
	Code       Code        `json:"code,omitempty"`
	Error      string      `json:"error,omitempty"`
	Image      *ImageFound `json:"image,omitempty"`
}

// CloseVolume names a volume to close.
type CloseVolume struct {
	VolumeID string `json:"volumeID"`
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

// Check asks for every layer of a replica to be checked: by volume if it is open, else by disk and replica.
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
	Disks   []DiskStatus   `json:"disks"`
	Volumes []VolumeStatus `json:"volumes"`
	Jobs    []Job          `json:"jobs"`
}

// Problem is one finding of a check.
type Problem struct {
	Object string `json:"object"`
	What   string `json:"what"`
}

// Problems is what a check found; none is a clean bill.
type Problems struct {
	Problems []Problem `json:"problems"`
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
