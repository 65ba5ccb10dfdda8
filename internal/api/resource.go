package api

import "time"

// Resource is what every object on the wire has. Links and Actions are never null: clients of the dialect turn them into methods.
type Resource struct {
	ID      string            `json:"id"`
	Type    string            `json:"type"`
	Links   map[string]string `json:"links"`
	Actions map[string]string `json:"actions"` // verbs allowed now: name -> URL to POST to
}

// Collection is a list of resources. Data is never null.
type Collection[T any] struct {
	Type         string            `json:"type"` // "collection"
	ResourceType string            `json:"resourceType"`
	Links        map[string]string `json:"links"`
	Actions      map[string]string `json:"actions"`
	Data         []T               `json:"data"`
}

// ErrorBody is the body of every answer that is no success.
type ErrorBody struct {
	Type    string            `json:"type"` // "error"
	Links   map[string]string `json:"links"`
	Actions map[string]string `json:"actions"`
	Status  int               `json:"status"`
	Code    string            `json:"code"`   // the status in words, as the dialect has it
	Reason  Code              `json:"reason"` // ours: what programs read
	Message string            `json:"message"`
	Detail  string            `json:"detail"`
}

// Schema tells a client of the dialect what it may do with a type.
type Schema struct {
	Resource
	PluralName        string         `json:"pluralName"`
	CollectionMethods []string       `json:"collectionMethods"`
	ResourceMethods   []string       `json:"resourceMethods"`
	ResourceFields    map[string]any `json:"resourceFields"`
	CollectionFilters map[string]any `json:"collectionFilters"`
}

// Condition is a named truth about an object; Status is True, False or Unknown.
type Condition struct {
	Type               string `json:"type"`
	Status             string `json:"status"`
	Reason             string `json:"reason"`
	Message            string `json:"message"`
	LastTransitionTime string `json:"lastTransitionTime"`
}

// Volume is a volume. Fields marked constant mean nothing in Ashlar (docs/compat.md).
type Volume struct {
	Resource
	Name                    string               `json:"name"`
	Size                    string               `json:"size"` // decimal bytes
	NumberOfReplicas        int                  `json:"numberOfReplicas"`
	State                   string               `json:"state"`      // creating, detached, attaching, attached, detaching, deleting
	Robustness              string               `json:"robustness"` // healthy, degraded, faulted, unknown
	Frontend                string               `json:"frontend"`   // blockdev, nbd
	DisableFrontend         bool                 `json:"disableFrontend"`
	BackingImage            string               `json:"backingImage"`
	Created                 string               `json:"created"`
	Error                   string               `json:"error"`           // ours: why the wanted state is not reached
	Image                   string               `json:"image"`           // constant
	CurrentImage            string               `json:"currentImage"`    // constant
	RestoreRequired         bool                 `json:"restoreRequired"` // constant until backups are built
	RestoreInitiated        bool                 `json:"restoreInitiated"`
	LastBackup              string               `json:"lastBackup"`
	LastBackupAt            string               `json:"lastBackupAt"`
	BackupCompressionMethod string               `json:"backupCompressionMethod"`
	FromBackup              string               `json:"fromBackup"`
	DataEngine              string               `json:"dataEngine"`   // constant
	AccessMode              string               `json:"accessMode"`   // constant
	DataLocality            string               `json:"dataLocality"` // disabled, best-effort
	Encrypted               bool                 `json:"encrypted"`
	Standby                 bool                 `json:"standby"`
	Ready                   bool                 `json:"ready"`
	DiskSelector            []string             `json:"diskSelector"`
	NodeSelector            []string             `json:"nodeSelector"`
	Conditions              map[string]Condition `json:"conditions"`
	Controllers             []Controller         `json:"controllers"` // exactly one, also when detached
	Replicas                []Replica            `json:"replicas"`
	BackupStatus            []any                `json:"backupStatus"`
	RestoreStatus           []any                `json:"restoreStatus"`
	RebuildStatus           []any                `json:"rebuildStatus"`
	PurgeStatus             []PurgeStatus        `json:"purgeStatus"`
	Limits                  Limits               `json:"limits"` // ours
	Space                   Space                `json:"space"`  // ours
}

// Controller is the engine of a volume, on the node where it is attached.
type Controller struct {
	Name                string `json:"name"`
	HostID              string `json:"hostId"`
	Running             bool   `json:"running"`
	Endpoint            string `json:"endpoint"`
	Size                string `json:"size"` // of the head, decimal bytes
	ActualSize          string `json:"actualSize"`
	Image               string `json:"image"`
	CurrentImage        string `json:"currentImage"`
	InstanceManagerName string `json:"instanceManagerName"`
	IsExpanding         bool   `json:"isExpanding"`
	LastExpansionError  string `json:"lastExpansionError"`
}

// Replica is one copy of a volume; one that no disk was found for yet has no HostID.
type Replica struct {
	Name                string `json:"name"`
	HostID              string `json:"hostId"`
	Running             bool   `json:"running"`
	Mode                string `json:"mode"` // "", RW, WO, ERR
	FailedAt            string `json:"failedAt"`
	DataPath            string `json:"dataPath"`
	DiskID              string `json:"diskID"`
	DiskPath            string `json:"diskPath"`
	Image               string `json:"image"`
	CurrentImage        string `json:"currentImage"`
	InstanceManagerName string `json:"instanceManagerName"`
	AllocatedBytes      string `json:"allocatedBytes"` // ours, decimal
}

// PurgeStatus is how the last purge went, for one replica.
type PurgeStatus struct {
	Replica   string `json:"replica"`
	State     string `json:"state"` // in_progress, complete, error
	Progress  int    `json:"progress"`
	IsPurging bool   `json:"isPurging"`
	Error     string `json:"error"`
}

// Snapshot is one layer of a volume as snapshotList shows it; volume-head is the present.
type Snapshot struct {
	Resource
	Name        string            `json:"name"`
	Parent      string            `json:"parent"`
	Children    map[string]bool   `json:"children"`
	Removed     bool              `json:"removed"`
	UserCreated bool              `json:"usercreated"` // the dialect's spelling
	Created     string            `json:"created"`
	Size        string            `json:"size"` // guest's bytes that this layer alone holds, decimal
	Labels      map[string]string `json:"labels"`
	Checksum    string            `json:"checksum"`
	Space       Space             `json:"space"` // ours
}

// SnapshotCR is a snapshot as snapshotCRList shows it; volume-head is not among them.
type SnapshotCR struct {
	Resource
	Name           string            `json:"name"`
	Volume         string            `json:"volume"`
	CreationTime   string            `json:"creationTime"`
	CRCreationTime string            `json:"crCreationTime"`
	Parent         string            `json:"parent"`
	Children       map[string]bool   `json:"children"`
	MarkRemoved    bool              `json:"markRemoved"`
	ReadyToUse     bool              `json:"readyToUse"`
	UserCreated    bool              `json:"userCreated"`
	Size           int64             `json:"size"`
	RestoreSize    int64             `json:"restoreSize"`
	Labels         map[string]string `json:"labels"`
	Checksum       string            `json:"checksum"`
	Error          string            `json:"error"`
	Space          Space             `json:"space"` // ours
}

// BackingImage is an image.
type BackingImage struct {
	Resource
	Name              string              `json:"name"`
	UUID              string              `json:"uuid"`
	SourceType        string              `json:"sourceType"` // download, upload, export-from-volume, or ours: file
	Parameters        map[string]string   `json:"parameters"`
	ExpectedChecksum  string              `json:"expectedChecksum"`
	CurrentChecksum   string              `json:"currentChecksum"` // sha512 of the file as received; "" until known
	MinNumberOfCopies int                 `json:"minNumberOfCopies"`
	NodeSelector      []string            `json:"nodeSelector"`
	DiskSelector      []string            `json:"diskSelector"`
	DataEngine        string              `json:"dataEngine"`
	DiskFileStatusMap map[string]DiskFile `json:"diskFileStatusMap"`
	Size              int64               `json:"size"`
	VirtualSize       int64               `json:"virtualSize"`
	Secret            string              `json:"secret"`
	SecretNamespace   string              `json:"secretNamespace"`
	DeletionTimestamp string              `json:"deletionTimestamp"` // "" when live
	Created           string              `json:"created"`           // ours
	Format            string              `json:"format"`            // ours: raw, qcow2
	Digest            string              `json:"digest"`            // ours: of the content
	Error             string              `json:"error"`             // ours: why no disk can take it
	Space             Space               `json:"space"`             // ours: of all copies
}

// DiskFile is one copy of an image, on one disk.
type DiskFile struct {
	State                   string `json:"state"` // "", pending, starting, in-progress, ready, failed, unknown
	Progress                int    `json:"progress"`
	Message                 string `json:"message"`
	LastStateTransitionTime string `json:"lastStateTransitionTime"`
	DataEngine              string `json:"dataEngine"`
	AllocatedBytes          int64  `json:"allocatedBytes"` // ours
}

// Node is a node.
type Node struct {
	Resource
	Name              string               `json:"name"`
	Address           string               `json:"address"`
	AllowScheduling   bool                 `json:"allowScheduling"`
	EvictionRequested bool                 `json:"evictionRequested"`
	Tags              []string             `json:"tags"`
	Region            string               `json:"region"`        // constant
	Zone              string               `json:"zone"`          // constant: the dialect's is Kubernetes'
	PlacementZone     string               `json:"placementZone"` // ours: copies are kept in different zones where there are enough
	State             string               `json:"state"`         // ours: up, not ready, down, leaving
	AliveSince        string               `json:"aliveSince"`    // ours: when its serve began; "" while it is down or in no cluster
	NodeID            string               `json:"nodeID"`        // ours: never used again; "" in no cluster
	Port              int                  `json:"port"`          // ours: the first of its four ports; 0 in no cluster
	Voter             bool                 `json:"voter"`         // ours: it is to keep a member of the catalogue
	Leads             bool                 `json:"leads"`         // ours: its control plans for the whole cluster
	Member            string               `json:"member"`        // ours: that member: "", learner, voter, or why it failed
	APIMin            int                  `json:"apiMin"`        // ours: the versions it speaks to other nodes
	APICurrent        int                  `json:"apiCurrent"`
	DeletionTimestamp string               `json:"deletionTimestamp"` // ours: "" unless it is being removed
	Version           string               `json:"version"`           // ours
	DataVersion       string               `json:"dataVersion"`       // ours: of its data process, "" while there is none
	DataPID           int                  `json:"dataPID"`           // ours
	Conditions        map[string]Condition `json:"conditions"`
	Disks             map[string]Disk      `json:"disks"` // by name
}

// Disk is a directory of a node that holds layers and images.
type Disk struct {
	Path                  string               `json:"path"`
	DiskType              string               `json:"diskType"`
	DiskDriver            string               `json:"diskDriver"`
	DiskUUID              string               `json:"diskUUID"`
	Lost                  bool                 `json:"lost"` // ours: it was given up
	AllowScheduling       bool                 `json:"allowScheduling"`
	EvictionRequested     bool                 `json:"evictionRequested"`
	Tags                  []string             `json:"tags"`
	StorageReserved       int64                `json:"storageReserved"`
	StorageAvailable      int64                `json:"storageAvailable"`
	StorageMaximum        int64                `json:"storageMaximum"`
	StorageScheduled      int64                `json:"storageScheduled"`
	Conditions            map[string]Condition `json:"conditions"`
	ScheduledReplica      map[string]int64     `json:"scheduledReplica"`
	ScheduledBackingImage map[string]int64     `json:"scheduledBackingImage"`
}

// Setting is a setting with its definition.
type Setting struct {
	Resource
	Name       string            `json:"name"`
	Value      string            `json:"value"`
	Applied    bool              `json:"applied"`
	Definition SettingDefinition `json:"definition"`
}

// SettingDefinition says what a setting is.
type SettingDefinition struct {
	DisplayName string   `json:"displayName"`
	Description string   `json:"description"`
	Category    string   `json:"category"`
	Type        string   `json:"type"` // string, int, bool
	Required    bool     `json:"required"`
	ReadOnly    bool     `json:"readOnly"`
	Default     string   `json:"default"`
	Options     []string `json:"options,omitempty"`
}

// EngineImage is a constant of the dialect: Ashlar has one engine, this build's.
type EngineImage struct {
	Resource
	Name                    string          `json:"name"`
	Image                   string          `json:"image"`
	Default                 bool            `json:"default"`
	State                   string          `json:"state"`
	RefCount                int             `json:"refCount"`
	NoRefSince              string          `json:"noRefSince"`
	NodeDeploymentMap       map[string]bool `json:"nodeDeploymentMap"`
	CLIAPIVersion           int             `json:"cliAPIVersion"`
	CLIAPIMinVersion        int             `json:"cliAPIMinVersion"`
	ControllerAPIVersion    int             `json:"controllerAPIVersion"`
	ControllerAPIMinVersion int             `json:"controllerAPIMinVersion"`
	DataFormatVersion       int             `json:"dataFormatVersion"`
	DataFormatMinVersion    int             `json:"dataFormatMinVersion"`
	Incompatible            bool            `json:"incompatible"`
	Version                 string          `json:"version"`
}

// InstanceManager is the dialect's name for what runs volumes on a node: here its data process.
type InstanceManager struct {
	Resource
	Name             string              `json:"name"`
	NodeID           string              `json:"nodeID"`
	CurrentState     string              `json:"currentState"`
	Image            string              `json:"image"`
	ManagerType      string              `json:"managerType"`
	DataEngine       string              `json:"dataEngine"`
	Instances        map[string]Instance `json:"instances"`
	InstanceEngines  map[string]Instance `json:"instanceEngines"`
	InstanceReplicas map[string]Instance `json:"instanceReplicas"`
}

// Instance is a running engine or replica.
type Instance struct {
	Spec   map[string]string `json:"spec"`
	Status map[string]string `json:"status"`
}

// BackupTarget is a constant until backups are built: one target, "default", that is not configured.
type BackupTarget struct {
	Resource
	Name             string `json:"name"`
	BackupTargetURL  string `json:"backupTargetURL"`
	CredentialSecret string `json:"credentialSecret"`
	PollInterval     string `json:"pollInterval"`
	Available        bool   `json:"available"`
	Message          string `json:"message"`
}

// Event is something that happened, for people. The dialect's "type" is taken, so Normal or Warning is EventType.
type Event struct {
	Resource
	EventType  string `json:"eventType"`
	ObjectKind string `json:"objectKind"`
	ObjectName string `json:"objectName"`
	Reason     string `json:"reason"`
	Message    string `json:"message"`
	Count      int    `json:"count"`
	Time       string `json:"time"`
	Revision   string `json:"revision"` // of the catalogue when it last changed; streams go on after it
}

// Token is a credential for clients that come over TLS.
type Token struct {
	Resource
	Name     string `json:"name"`
	ReadOnly bool   `json:"readOnly"` // good for reading only, guests' data included
	Created  string `json:"created"`
	Expires  string `json:"expires"` // "": never
	Expired  bool   `json:"expired"`
	Token    string `json:"token,omitempty"` // the secret, shown once: in the answer that made it
}

// Operation is something that is done once to a volume: its id is VOLUME/ID. Done ones are forgotten after an hour.
type Operation struct {
	Resource
	Volume   string         `json:"volume"`
	Verb     string         `json:"verb"`     // snapshot, revert, expand, snapshot-remove, purge, check, export
	Snapshot string         `json:"snapshot"` // "": the present, or none
	Size     string         `json:"size"`     // of an expansion, decimal bytes
	Path     string         `json:"path"`     // of an export
	Format   string         `json:"format"`   // of an export
	Compress string         `json:"compress"` // of an export
	State    string         `json:"state"`    // pending, running, done, failed
	Progress int            `json:"progress"` // per cent
	Reason   Code           `json:"reason"`   // of a failure
	Message  string         `json:"message"`
	Problems []CheckProblem `json:"problems"` // of a check
	Created  string         `json:"created"`
	Finished string         `json:"finished"`
}

// Limits bound what a volume's clients may do in a second, reads and writes together; 0 is no limit. Byte rates are decimal strings, as sizes are.
type Limits struct {
	IOPS                int64  `json:"iops"`
	BytesPerSecond      string `json:"bytesPerSecond"`
	BurstIOPS           int64  `json:"burstIOPS"` // for burstSeconds; 0: as iops
	BurstBytesPerSecond string `json:"burstBytesPerSecond"`
	BurstSeconds        int64  `json:"burstSeconds"` // how long the burst rates hold after a rest; 0: 1
}

// Space is what something takes on disk, in decimal bytes.
type Space struct {
	Exclusive   string `json:"exclusive"`   // would be free if it alone were deleted
	Shared      string `json:"shared"`      // is read from others, who keep it
	Reclaimable string `json:"reclaimable"` // a purge would free now
}

// SnapshotDiff is where two snapshots of a volume may differ, from an offset on.
type SnapshotDiff struct {
	Resource
	Volume  string      `json:"volume"`
	From    string      `json:"from"`    // the older; "": what is below the oldest
	To      string      `json:"to"`      // "volume-head": the present
	Size    int64       `json:"size"`    // of the volume
	NextOff int64       `json:"nextOff"` // ask again from here; the size at the end
	Ranges  []DiffChunk `json:"ranges"`  // ascending, whole units of 4096 bytes
}

// DiffChunk is one range, in bytes.
type DiffChunk struct {
	Off  int64 `json:"off"`
	N    int64 `json:"n"`
	Zero bool  `json:"zero"` // reads as zero in the newer one
}

// CheckReport is what `check` found in a volume.
type CheckReport struct {
	Resource
	Volume   string         `json:"volume"`
	Problems []CheckProblem `json:"problems"`
}

// CheckProblem is one finding.
type CheckProblem struct {
	Object string `json:"object"`
	What   string `json:"what"`
}

// About says who answers.
type About struct {
	Resource
	Node    string `json:"node"`
	Version string `json:"version"`
}

// Health is the answer of /healthz and /readyz.
type Health struct {
	Type   string            `json:"type"`
	Status string            `json:"status"` // ok, not ready
	Checks map[string]string `json:"checks"` // what was looked at, and "ok" or what is wrong
}

// stamp is a time on the wire; the zero time is "".
func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}
