// Package catalog holds the nouns of the control plane as records, and the Catalog that keeps them: get, put-if, list, watch-from. Wanted
// records say what an operator asked for, observed records what is so; they have different keys because they have different owners. Mem is the in-memory
// twin; etcd the real one. docs/formats/catalog.md is the normative page.
//
// Read, Write, Update and Upsert put types around the bytes; Follow keeps a copy of everything up to date; Note records an event.
//
// It imports nothing of ours. Read next: plan, which decides from these records; agent, which acts on them.
package catalog

import (
	"context"
	"errors"
	"time"
)

// Rev is a revision: of one record (when it was last put) or of the whole catalogue. It only grows. Zero: does not exist.
type Rev int64

// Key names a record: Kind/Part/Name, for example volume/wanted/db1. Name may contain one slash (operation/wanted/db1/OPID). In the store it is
// Prefix + Kind/Part/Name.
type Key struct {
	Kind Kind
	Part Part
	Name string
}

// Kind is a noun.
type Kind string

// The nouns.
const (
	KindNode       Kind = "node"
	KindImage      Kind = "image"
	KindVolume     Kind = "volume"
	KindMembership Kind = "membership" // by volume id; JSON of replica.Record; owner: the engine, through its Ledger
	KindOperation  Kind = "operation"
	KindSetting    Kind = "setting"
	KindEvent      Kind = "event"
	KindCluster    Kind = "cluster" // one record: cluster id, format
	KindToken      Kind = "token"   // credentials of REST clients; never their secrets
	KindJoin       Kind = "join"    // join tokens; never their secrets
	KindAlive      Kind = "alive"   // by node: there while the node's serve lives (Catalog.Hold)
	KindLeader     Kind = "leader"  // one record: there while somebody leads (Catalog.Hold); for people, who leads is settled elsewhere
)

// Part says whose half of a noun a record is.
type Part string

// The parts. Kinds that are not split use Wanted.
const (
	Wanted   Part = "wanted"
	Observed Part = "observed"
)

// Entry is a stored record.
type Entry struct {
	Key   Key
	Value []byte // JSON
	Rev   Rev
}

// Event is one change. A deleted record has a nil Value.
type Event struct {
	Entry
}

// Catalog keeps records. All methods may be called concurrently; Get and List are linearizable, and what a Put or Delete acknowledged survives a
// power cut (etcd; Mem survives nothing). ErrUnreachable: nobody could be asked; a Put or Delete that returned it may have happened. A context that
// ends makes a call return its error, and then too a Put or Delete may have happened. ErrKey: the key or the value is malformed.
type Catalog interface {
	// Get returns one record; ErrNotFound.
	Get(ctx context.Context, k Key) (Entry, error)
	// Put writes value, which is JSON and not empty, if the record's revision is still was (0: must not exist); ErrConflict. It returns the record's new revision.
	Put(ctx context.Context, k Key, value []byte, was Rev) (Rev, error)
	// Delete removes the record if its revision is still was; ErrConflict, ErrNotFound.
	Delete(ctx context.Context, k Key, was Rev) error
	// List returns all records of a kind (both parts) and the catalogue's revision at that instant, sorted by key; the empty Kind lists everything.
	List(ctx context.Context, kind Kind) ([]Entry, Rev, error)
	// Watch calls fn for every change after from, in order, until ctx ends (its error) or fn fails (fn's error); ErrCompacted if from is too old (list
	// again); ErrUnreachable if the catalogue went away (watch again from the last revision seen). fn is called by one goroutine at a time,
	// and may call the Catalog.
	Watch(ctx context.Context, from Rev, fn func(Event) error) error
	// Hold puts a record that lasts as long as this call: it returns with ctx's error when ctx ends, after it tried to delete the record, or with ErrUnreachable when the catalogue may have given
	// it up because nobody could say for ttl (at least a second) that the holder lives. A record under the key is replaced, whoever put it; one that lost its record so learns of
	// it from Watch. No clocks are compared. held is called once, when the record is there.
	Hold(ctx context.Context, h Holding, held func(Rev)) error
	// Close ends every watch and call with ErrUnreachable, and waits for what it started.
	Close() error
}

// Holding is a record that lasts as long as somebody holds it.
type Holding struct {
	Key   Key
	Value []byte
	TTL   time.Duration
}

var (
	// ErrNotFound: there is no such record.
	ErrNotFound = errors.New("not found")
	// ErrConflict: the record changed meanwhile; read it again.
	ErrConflict = errors.New("changed meanwhile")
	// ErrUnreachable: the catalogue did not answer.
	ErrUnreachable = errors.New("catalogue unreachable")
	// ErrCompacted: the revision to watch from is gone; list again.
	ErrCompacted = errors.New("revision compacted")
	// ErrKey: a key or value that no record can have. Nothing was changed.
	ErrKey = errors.New("malformed record")
)

// Format is the version of the records this build reads and writes (docs/formats/catalog.md); a catalogue with a higher one is refused.
const Format = 1

// Cluster is the one record of the cluster; the first agent of an empty catalogue makes it. Disks carry the id, so that another cluster's are refused.
type Cluster struct {
	ID      string    `json:"id"` // 32 hex digits
	Format  int       `json:"format"`
	Created time.Time `json:"created"`
}

// The states of a volume.
const (
	VolumeCreating  = "creating"
	VolumeDetached  = "detached"
	VolumeAttaching = "attaching"
	VolumeAttached  = "attached"
	VolumeDetaching = "detaching"
	VolumeDeleting  = "deleting"
)

// How many good copies a volume has: all that are wanted, fewer, none, or it is not open.
const (
	RobustnessHealthy  = "healthy"
	RobustnessDegraded = "degraded"
	RobustnessFaulted  = "faulted"
	RobustnessUnknown  = "unknown"
)

// The frontends.
const (
	FrontendNBD      = "nbd"
	FrontendBlockdev = "blockdev"
)

// The kinds of tickets.
const (
	TicketAPI = "api"
)

// Labels of the system's own snapshots.
const (
	// LabelReading names, by its id, what a temporary snapshot was taken for: an export, a download, an image. One whose reader is gone is removed.
	LabelReading = "ashlar/reading"
	// LabelImageExport names the image that a temporary snapshot was taken for, as the dialect does.
	LabelImageExport = "longhorn.io/for-exporting-backing-image"
)

// The verbs of operations. Expand and export may be said of a detached volume, which is opened for it without a frontend; the others need it attached
// (CodeNotAttached), and revert needs it attached with DisableFrontend (CodeFrontend). Exports run beside the others.
const (
	VerbSnapshot       = "snapshot"
	VerbRevert         = "revert"
	VerbExpand         = "expand"
	VerbSnapshotRemove = "snapshot-remove"
	VerbPurge          = "purge"
	VerbCheck          = "check"
	VerbExport         = "export" // write a file of a snapshot, or of the present, on the node that has the volume
)

// The states of an operation.
const (
	OperationPending = "pending"
	OperationRunning = "running"
	OperationDone    = "done"
	OperationFailed  = "failed"
)

// The codes of a failed operation.
const (
	CodeNotFound     = "not-found"        // no such snapshot, or the volume is gone
	CodeExists       = "exists"           // a snapshot of that name
	CodeInvalid      = "invalid"          // the request can never succeed
	CodeConflict     = "conflict"         // not in the state the volume is in
	CodeNotAttached  = "not-attached"     // the verb needs the volume attached
	CodeFrontend     = "frontend-enabled" // revert needs it attached without a frontend
	CodeNoSpace      = "no-space"         // the disk is full
	CodeCorrupt      = "corrupt"          // checksums do not match
	CodeFailed       = "failed"           // the volume's last copy failed
	CodeNeedsSalvage = "needs-salvage"    // the last copy failed a flush; a person has to decide
	CodeStale        = "stale-catalogue"  // the disks know more than the catalogue: ashlar recover
	CodeInternal     = "internal"
)

// The states of an image on a disk.
const (
	ImagePending    = "pending"     // wanted, not begun
	ImageStarting   = "starting"    // asked for
	ImageInProgress = "in-progress" // bytes are coming
	ImageReady      = "ready"
	ImageFailed     = "failed"  // Message says why, and whether and when it is tried again
	ImageUnknown    = "unknown" // the disk or the data process is away
	ImageGone       = "gone"    // of an image that is being deleted: not on this disk any more
)

// The sources of images.
const (
	SourceDownload = "download"           // Parameters["url"]: http, https, nbd or nbds
	SourceFile     = "file"               // Parameters["path"]: absolute, on the node
	SourceUpload   = "upload"             // the bytes come by the upload action; tried once
	SourceVolume   = "export-from-volume" // Parameters["volume-name"], ["export-type"] raw or qcow2, and ours: ["snapshot-name"]
)

// The ports of a node that is in a cluster, counted from the one of its address (docs/formats/cluster.md).
const (
	PortNode       = 0
	PortEtcdPeer   = 1
	PortEtcdClient = 2
	PortData       = 3
)

// AliveTTL is how long a node may be silent before its record under KindAlive is gone.
const AliveTTL = 6 * time.Second

// Alive says that a node's serve runs and reaches the catalogue. Owner: that node, through Hold.
type Alive struct {
	Node    string    `json:"node"`
	NodeID  string    `json:"nodeID,omitempty"`
	BootID  string    `json:"bootID"`
	Version string    `json:"version"`
	Since   time.Time `json:"since"`
}

// Leader says which node's control plans for the cluster. Owner: that control, through Hold.
type Leader struct {
	Node  string    `json:"node"`
	Since time.Time `json:"since"`
}

// Join is a join token. Owner: the API; Used…: the node that answered the joiner, by compare-and-swap.
type Join struct {
	Name       string    `json:"name"`
	SHA256     string    `json:"sha256"` // of the secret, hex
	Created    time.Time `json:"created"`
	Expires    time.Time `json:"expires"`
	Used       time.Time `json:"used,omitzero"`
	UsedBy     string    `json:"usedBy,omitempty"`     // node name
	UsedNodeID string    `json:"usedNodeID,omitempty"` // its id: a repeat by it is answered again
}

// The names of conditions, and their statuses.
const (
	ConditionScheduled          = "Scheduled"                // of a volume; owner: control
	ConditionWaitForImage       = "WaitForBackingImage"      // of a volume with an image
	ConditionImageIncompatible  = "BackingImageIncompatible" // of a volume smaller than its image
	ConditionInUse              = "InUse"                    // of a volume that is to be detached, and whose block device is mounted or open
	ConditionReady              = "Ready"                    // of a node, a disk
	ConditionSchedulable        = "Schedulable"              // of a node, a disk
	ConditionNetwork            = "Network"                  // of a node that is to offer volumes over TCP
	ConditionNearlyFull         = "NearlyFull"               // of a disk
	ConditionEvicting           = "Evicting"                 // of a volume, node or disk that is to be emptied: True: under way, False: something is in the way; absent: not asked for; owner: control
	ConditionTrue               = "True"
	ConditionFalse              = "False"
	ConditionUnknown            = "Unknown"
	ReasonSchedulingFailure     = "ReplicaSchedulingFailure"
	ReasonWaiting               = "Waiting"
	ReasonGetBackingImageFailed = "GetBackingImageFailed"
	ReasonNearlyFull            = "DiskNearlyFull" // of the condition, and of the event when it becomes true
	ReasonNotAdoptedYet         = "NotAdoptedYet"  // of a disk's condition Ready: its node has not tried to use it yet, or not again
	ReasonDiskAway              = "DiskAway"       // of the event when a disk cannot be used any more
	ReasonDiskBack              = "DiskBack"
	ReasonNodeDown              = "NodeDown" // of the event when a node is silent
	ReasonNodeUp                = "NodeUp"
	ReasonFailedDeleting        = "FailedDeleting" // of the event when an image's copy cannot leave its disk: it is the only good one
)

// The settings that plan reads, and their defaults.
const (
	// SettingOverProvisioning: the sizes of the replicas scheduled to a disk may add up to this many per cent of what it offers; 0: no limit.
	SettingOverProvisioning        = "storage-over-provisioning-percentage"
	SettingOverProvisioningDefault = "0"
	// SettingMinimalFree: a disk with less than this per cent free takes no new replica or image.
	SettingMinimalFree        = "storage-minimal-available-percentage"
	SettingMinimalFreeDefault = "5"
	// SettingWarningFree: a disk with less than this per cent free is reported (condition, event), before it takes nothing more.
	SettingWarningFree        = "storage-warning-available-percentage"
	SettingWarningFreeDefault = "15"
	// SettingBackgroundRate: what a node does for itself (purge, merge, checksums, imports, exports) moves at most this many MiB per second; 0: no limit.
	SettingBackgroundRate        = "background-bandwidth-mib"
	SettingBackgroundRateDefault = "0"
	// SettingSoftNodes: two copies of a volume may be on one node when there is no other ("true").
	SettingSoftNodes        = "replica-soft-anti-affinity"
	SettingSoftNodesDefault = "false"
	// SettingSoftZones: two copies of a volume may be in one zone when there is no other ("true").
	SettingSoftZones        = "replica-zone-soft-anti-affinity"
	SettingSoftZonesDefault = "true"
	// SettingSoftDisks: two copies of a volume on one node may be on one disk ("true").
	SettingSoftDisks        = "replica-disk-soft-anti-affinity"
	SettingSoftDisksDefault = "true"
	// SettingAutoBalance: detached volumes are moved when one disk is much fuller than another ("best-effort"), or not ("disabled").
	SettingAutoBalance        = "replica-auto-balance"
	SettingAutoBalanceDefault = "disabled"
	// SettingImageCleanup: a copy of an image beyond MinCopies that no replica has stood on for so many minutes goes; 0: at once.
	SettingImageCleanup        = "backing-image-cleanup-wait-interval"
	SettingImageCleanupDefault = "60"
	// SettingReplenish: 0: images get no further copies by themselves. Other numbers mean: they do, one at a time.
	SettingReplenish        = "concurrent-backing-image-replenish-per-node-limit"
	SettingReplenishDefault = "5"
)

// Ticket is one reason for a volume to be attached to a node. The volume is attached while it has tickets.
type Ticket struct {
	ID              string    `json:"id"`   // "" for the REST API's own
	Node            string    `json:"node"` // where
	Kind            string    `json:"kind"` // "api", "operation"
	DisableFrontend bool      `json:"disableFrontend,omitempty"`
	Created         time.Time `json:"created"`
}

// Placement is a replica of a volume, placed on a disk of a node by plan.
type Placement struct {
	ReplicaID string `json:"replicaID"` // 32 hex digits, never used again
	Node      string `json:"node"`
	DiskID    string `json:"diskID"`
	// NodeID is the node's id (NodeWanted.ID), which tells it from a later node of its name; "": not known, or in no cluster. Set by control.
	NodeID string `json:"nodeID,omitempty"`
	// CopyOf is the replica that this one is to take the place of (docs/decisions/0017); "": none. Cleared by control when the membership names this one.
	CopyOf string `json:"copyOf,omitempty"`
}

// VolumeWanted is what was asked for. Owners: the API (all but the following), control (Replicas, Dropped, LastNode).
type VolumeWanted struct {
	Name      string      `json:"name"`
	ID        string      `json:"id"` // 32 hex digits
	SizeBytes int64       `json:"sizeBytes"`
	Image     string      `json:"image,omitempty"`   // its name
	ImageID   string      `json:"imageID,omitempty"` // its id
	Copies    int         `json:"copies"`
	Frontend  string      `json:"frontend"` // "nbd", "blockdev"
	Limits    Limits      `json:"limits,omitzero"`
	Created   time.Time   `json:"created"`
	Deleted   *time.Time  `json:"deleted,omitempty"` // tombstone: the agent deletes replicas after a linearizable read of it
	Tickets   []Ticket    `json:"tickets,omitempty"`
	Replicas  []Placement `json:"replicas,omitempty"`
	// Dropped are replicas whose place another has taken: their nodes destroy them (invariant 15), and control takes them out when they are gone. Owner: control.
	Dropped []Placement `json:"dropped,omitempty"`
	// NodeSelector and DiskSelector: only nodes, and disks, with all these tags; DataLocality "best-effort": the copy is moved, when the volume is detached, to the node that used it last.
	NodeSelector []string          `json:"nodeSelector,omitempty"`
	DiskSelector []string          `json:"diskSelector,omitempty"`
	DataLocality string            `json:"dataLocality,omitempty"`
	LastNode     string            `json:"lastNode,omitempty"` // with DataLocality: the node of its last ticket. Owner: control
	Salvage      bool              `json:"salvage,omitempty"`  // a person decided to open the last copy though a flush failed
	Labels       map[string]string `json:"labels,omitempty"`
}

// Limits bound what a volume's clients may ask per second, reads and writes together; zero: no limit. Up to BurstSeconds the burst rates hold.
type Limits struct {
	IOPS                int64 `json:"iops,omitempty"`
	BytesPerSecond      int64 `json:"bytesPerSecond,omitempty"`
	BurstIOPS           int64 `json:"burstIOPS,omitempty"`
	BurstBytesPerSecond int64 `json:"burstBytesPerSecond,omitempty"`
	BurstSeconds        int64 `json:"burstSeconds,omitempty"`
}

// Space is what something takes on its disk: Exclusive would be freed if it alone were deleted, Shared is what it reads from others, Reclaimable
// is what a purge would free now.
type Space struct {
	ExclusiveBytes   int64 `json:"exclusiveBytes"`
	SharedBytes      int64 `json:"sharedBytes"`
	ReclaimableBytes int64 `json:"reclaimableBytes"`
}

// Token is a credential of REST clients. Owner: the API. The secret itself is shown once, when the token is made, and kept nowhere.
type Token struct {
	Name     string    `json:"name"`
	SHA256   string    `json:"sha256"`             // of the secret, hex
	ReadOnly bool      `json:"readOnly,omitempty"` // GET, HEAD, and those actions that change nothing
	Created  time.Time `json:"created"`
	Expires  time.Time `json:"expires,omitzero"` // zero: never
}

// VolumeObserved is what is so. Owner: the agent of the node that has (or had last) the volume attached, else that of its first replica.
type VolumeObserved struct {
	Name       string `json:"name"`
	ID         string `json:"id"`
	State      string `json:"state"`      // creating, detached, attaching, attached, detaching, deleting
	Robustness string `json:"robustness"` // healthy, degraded, faulted, unknown
	Node       string `json:"node,omitempty"`
	SizeBytes  int64  `json:"sizeBytes"` // of the head
	Endpoint   string `json:"endpoint,omitempty"`
	// TCPEndpoint is where an attached volume is offered over TCP too, if the node offers volumes so.
	TCPEndpoint string               `json:"tcpEndpoint,omitempty"`
	Epoch       uint64               `json:"epoch,omitempty"`
	Space       Space                `json:"space"`
	Replicas    []ReplicaObserved    `json:"replicas"`
	Snapshots   []SnapshotObserved   `json:"snapshots"` // as of the last look while attached or opened
	Conditions  map[string]Condition `json:"conditions"`
	Error       string               `json:"error,omitempty"` // why the wanted state could not be reached, for people
}

// ReplicaObserved is one replica as found. Created stays true until it was deleted, also while its disk is away.
type ReplicaObserved struct {
	ReplicaID      string `json:"replicaID"`
	Node           string `json:"node"`
	DiskID         string `json:"diskID"`
	DataPath       string `json:"dataPath"`
	Created        bool   `json:"created"`
	Running        bool   `json:"running"`
	Mode           string `json:"mode"` // "", RW, WO, ERR
	FailedAt       string `json:"failedAt,omitempty"`
	AllocatedBytes int64  `json:"allocatedBytes"`
}

// SnapshotObserved is one layer of a volume as the dialect shows it; Name volume-head is the present.
type SnapshotObserved struct {
	Name        string            `json:"name"`
	LayerID     string            `json:"layerID"`
	Parent      string            `json:"parent"` // name, "" at the bottom
	Children    []string          `json:"children"`
	Removed     bool              `json:"removed"`
	UserCreated bool              `json:"userCreated"`
	Created     time.Time         `json:"created"`
	SizeBytes   int64             `json:"sizeBytes"` // guest bytes this layer alone holds, without metadata
	Space       Space             `json:"space"`
	Labels      map[string]string `json:"labels,omitempty"`
	Checksum    string            `json:"checksum,omitempty"`
}

// Condition is a named truth about an object.
type Condition struct {
	Status             string    `json:"status"` // True, False, Unknown
	Reason             string    `json:"reason,omitempty"`
	Message            string    `json:"message,omitempty"`
	LastTransitionTime time.Time `json:"lastTransitionTime"`
}

// Operation is something to be done once to a volume; the API makes it (in state pending, and never writes it again) and waits for its result, the agent
// does it. Those of a volume are done one at a time (exports one at a time too, beside the others): a running one first, then the pending in the order of their records' revisions,
// which is the order in which they were put. ID is 32 random hex digits and becomes the id of the new head layer where there is one, which is what makes repeating it
// harmless. Its record's name is VOLUME/ID.
type Operation struct {
	ID        string            `json:"id"`
	Volume    string            `json:"volume"`
	VolumeID  string            `json:"volumeID"`
	Verb      string            `json:"verb"`
	Snapshot  string            `json:"snapshot,omitempty"`
	SizeBytes int64             `json:"sizeBytes,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	Path      string            `json:"path,omitempty"`     // export: a new file, absolute, on the node
	Format    string            `json:"format,omitempty"`   // export: raw, qcow2
	Compress  string            `json:"compress,omitempty"` // export of qcow2: "", zlib, zstd
	Created   time.Time         `json:"created"`
	State     string            `json:"state"`
	Progress  int               `json:"progress"`       // per cent
	Code      string            `json:"code,omitempty"` // of the failure; one table in agent maps it from the data process's
	Message   string            `json:"message,omitempty"`
	Problems  []Problem         `json:"problems,omitempty"` // of a check, which is done also when it found some
	Finished  *time.Time        `json:"finished,omitempty"` // done operations are deleted an hour later
}

// Problem is one finding of a check.
type Problem struct {
	Object string `json:"object"`
	What   string `json:"what"`
}

// ImageWanted is an image as asked for. Owners: the API (all but the following), control (Disks, UnusedSince).
type ImageWanted struct {
	Name             string            `json:"name"`
	ID               string            `json:"id"`         // 32 hex digits; also the id of its layer
	SourceType       string            `json:"sourceType"` // download (url) ; ours: file (path on the node)
	Parameters       map[string]string `json:"parameters"`
	ExpectedChecksum string            `json:"expectedChecksum,omitempty"` // "sha512:…" or "sha256:…"
	MinCopies        int               `json:"minCopies"`
	NodeSelector     []string          `json:"nodeSelector,omitempty"`
	DiskSelector     []string          `json:"diskSelector,omitempty"`
	Disks            []string          `json:"disks,omitempty"` // wanted disks, by id
	// UnusedSince tells, by disk id, since when no replica there stands on the image. Owner: control.
	UnusedSince map[string]time.Time `json:"unusedSince,omitempty"`
	Created     time.Time            `json:"created"`
	Deleted     *time.Time           `json:"deleted,omitempty"`
}

// ImageObserved is an image as found. Owner: the agents, each its own disks.
type ImageObserved struct {
	Name             string                 `json:"name"`
	ID               string                 `json:"id"`
	SizeBytes        int64                  `json:"sizeBytes"`        // of the file as received
	VirtualSizeBytes int64                  `json:"virtualSizeBytes"` // of the content
	CurrentChecksum  string                 `json:"currentChecksum"`  // sha512 of the file as received, hex; immutable once set
	Digest           string                 `json:"digest"`           // of the content
	Format           string                 `json:"format"`
	Disks            map[string]ImageOnDisk `json:"disks"`
	Error            string                 `json:"error,omitempty"` // why no disk can take it, or why a copy cannot leave its disk; owner: control
}

// ImageOnDisk is one copy's state.
type ImageOnDisk struct {
	State              string    `json:"state"`
	Progress           int       `json:"progress"`
	Message            string    `json:"message,omitempty"`
	Attempts           int       `json:"attempts,omitempty"`
	AllocatedBytes     int64     `json:"allocatedBytes,omitempty"`
	NextTry            time.Time `json:"nextTry,omitzero"` // when failed: zero means never
	LastTransitionTime time.Time `json:"lastTransitionTime"`
}

// NodeWanted is a node's settings. Owners: the API; Voter: control. Made by the agent at first start, or by the node that answered its join.
type NodeWanted struct {
	Name              string                `json:"name"`
	ID                string                `json:"id,omitempty"`      // of a node that joined or ran cluster init: 32 hex digits, never used again
	Deleted           *time.Time            `json:"deleted,omitempty"` // the node is to be forgotten: set when nothing lies on it any more, or by force
	Lost              bool                  `json:"lost,omitempty"`    // with Deleted: by force; what lies on the node is given up
	Voter             bool                  `json:"voter,omitempty"`   // it keeps a member of the embedded etcd
	Zone              string                `json:"zone,omitempty"`
	AllowScheduling   bool                  `json:"allowScheduling"`
	EvictionRequested bool                  `json:"evictionRequested,omitempty"`
	Tags              []string              `json:"tags,omitempty"`
	Disks             map[string]DiskWanted `json:"disks"` // by name
}

// DiskWanted is a directory on a node that holds layers and images.
type DiskWanted struct {
	Path                 string   `json:"path"`
	Lost                 bool     `json:"lost,omitempty"` // what lies on it is given up, for good; the entry goes when no record names the disk any more
	AllowScheduling      bool     `json:"allowScheduling"`
	EvictionRequested    bool     `json:"evictionRequested,omitempty"`
	StorageReservedBytes int64    `json:"storageReservedBytes"`
	Tags                 []string `json:"tags,omitempty"`
}

// NodeObserved is a node as it is. Owner: its agent.
type NodeObserved struct {
	Name       string                  `json:"name"`
	Address    string                  `json:"address"`        // host; in a cluster, where others reach it
	Port       int                     `json:"port,omitempty"` // the first of its four ports; 0: it is in no cluster
	APIMin     int                     `json:"apiMin,omitempty"`
	APICurrent int                     `json:"apiCurrent,omitempty"` // the window of versions it speaks to other nodes
	Member     string                  `json:"member,omitempty"`     // its etcd member: "" (the etcd is not ours), client (none), starting, learner, voter, or why it failed
	BootID     string                  `json:"bootID"`
	Version    string                  `json:"version"`
	Ready      bool                    `json:"ready"`
	Conditions map[string]Condition    `json:"conditions"`
	Disks      map[string]DiskObserved `json:"disks"` // by name
	Data       DataObserved            `json:"data"`  // its data process
	Unrecorded []Unrecorded            `json:"unrecorded,omitempty"`
}

// Unrecorded is something on a node's disks, or open there, that no record names. It is left alone: it may be all that is left of something.
type Unrecorded struct {
	Kind   string `json:"kind"` // replica, image, volume
	ID     string `json:"id"`
	Name   string `json:"name"`
	DiskID string `json:"diskID,omitempty"`
	Bytes  int64  `json:"bytes"`
}

// DataObserved is what the agent knows of the data process.
type DataObserved struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
}

// DiskObserved is a disk as it is.
type DiskObserved struct {
	DiskID         string               `json:"diskID"`
	TotalBytes     int64                `json:"totalBytes"`
	FreeBytes      int64                `json:"freeBytes"`
	ScheduledBytes int64                `json:"scheduledBytes"`
	Conditions     map[string]Condition `json:"conditions"`
	Replicas       map[string]int64     `json:"replicas"` // replica id -> scheduled bytes
	Images         map[string]int64     `json:"images"`   // image id -> bytes
}

// Setting is one changed setting; those at their default have no record.
type Setting struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// EventRecord is something that happened, for people; kept for a day, bounded in number.
type EventRecord struct {
	ID      string    `json:"id"`
	Time    time.Time `json:"time"`
	Type    string    `json:"type"` // Normal, Warning
	Kind    Kind      `json:"kind"`
	Name    string    `json:"name"`
	Reason  string    `json:"reason"`
	Message string    `json:"message"`
	Count   int       `json:"count"`
}

// Membership has the JSON shape of replica.Record (a test in node holds the two together): the control plane reads it and never writes it, except at creation and recovery.
type Membership struct {
	VolumeID   string             `json:"volumeID"`
	Epoch      uint64             `json:"epoch"`
	Opened     uint64             `json:"opened"`
	Generation uint64             `json:"generation"`
	WriterNode string             `json:"writerNode,omitempty"`
	WriterBoot string             `json:"writerBoot,omitempty"`
	Members    []MembershipMember `json:"members"`
	Chain      MembershipChain    `json:"chain"`
	Pending    any                `json:"pending,omitempty"`
	LastChange time.Time          `json:"lastChange"`
}

// MembershipMember is one wanted replica in a Membership.
type MembershipMember struct {
	ReplicaID   string `json:"replicaID"`
	Node        string `json:"node"`
	InSync      bool   `json:"inSync"`
	Incarnation string `json:"incarnation,omitempty"`
	Failed      string `json:"failed,omitempty"`
}

// MembershipChain is the wanted stack.
type MembershipChain struct {
	Generation uint64   `json:"generation"`
	SizeBytes  int64    `json:"sizeBytes"`
	Layers     []string `json:"layers"`
	Base       string   `json:"base,omitempty"`
}
