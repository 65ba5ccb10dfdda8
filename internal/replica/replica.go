// Package replica says what one copy of a volume is to the engine that keeps the copies equal: a Device of whole units, plus the verbs that
// only one writer may say (Fence, Snapshot, Revert, …), each carrying the writer's epoch and session.
//
// Read next: replicatest (the contract as a suite), local (a replica on this node's disks), volume (the engine).
package replica

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"time"

	"ashlar/internal/block"
)

// Writer names who speaks: the epoch of the volume's current writer and the number of its connection. A replica refuses a
// lower epoch, and within an epoch a lower session, with block.ErrFenced.
type Writer struct {
	Epoch   uint64 `json:"epoch"`
	Session uint64 `json:"session"`
}

// Less tells whether w is older than o.
func (w Writer) Less(o Writer) bool {
	return w.Epoch < o.Epoch || w.Epoch == o.Epoch && w.Session < o.Session
}

// LayerID names a layer: 32 hex digits, random, never used again.
type LayerID string

// Chain is the wanted stack of a volume: the head, and below it every layer down to the lowest; Base is the image's layer or empty.
// Snapshots that are not on the path of the head (after a revert) are in the replica's tree but not in the Chain.
type Chain struct {
	Generation uint64    `json:"generation"` // grows with every change
	SizeBytes  int64     `json:"sizeBytes"`  // of the head
	Layers     []LayerID `json:"layers"`     // head first
	Base       LayerID   `json:"base,omitempty"`
}

// Equal tells whether c and o are the same chain. The base counts only where both name one: whoever writes a volume's first record may not know it yet.
func (c Chain) Equal(o Chain) bool {
	return c.Generation == o.Generation && c.SizeBytes == o.SizeBytes && slices.Equal(c.Layers, o.Layers) &&
		(c.Base == o.Base || c.Base == "" || o.Base == "")
}

// Record is a volume's membership: the one record that every compare-and-swap compares whole, and of which every replica durably keeps
// the newest it was sent (design: invariants 7, 9, 13, 14).
type Record struct {
	VolumeID   string    `json:"volumeID"`
	Epoch      uint64    `json:"epoch"`      // of the current writer; only ever grows
	Opened     uint64    `json:"opened"`     // the epoch whose open completed; a member below it is stale
	Generation uint64    `json:"generation"` // raised by every compare-and-swap
	WriterNode string    `json:"writerNode,omitempty"`
	WriterBoot string    `json:"writerBoot,omitempty"` // boot id of the writer's host
	Members    []Member  `json:"members"`              // every wanted replica
	Chain      Chain     `json:"chain"`
	Pending    *Change   `json:"pending,omitempty"` // a chain change under way; recovery rolls it forward
	LastChange time.Time `json:"lastChange"`
}

// Less tells whether r is older than o: a lower epoch, or within an epoch a lower generation.
func (r Record) Less(o Record) bool {
	return r.Epoch < o.Epoch || r.Epoch == o.Epoch && r.Generation < o.Generation
}

// Equal tells whether r and o are the same record, as they are written down.
func (r Record) Equal(o Record) bool { return sameJSON(r, o) }

// Member is one wanted replica in a Record.
type Member struct {
	ReplicaID   string `json:"replicaID"`
	Node        string `json:"node"`
	InSync      bool   `json:"inSync"`
	Incarnation string `json:"incarnation,omitempty"` // host boot id when it was opened or joined
	Failed      string `json:"failed,omitempty"`      // why it left, for people
}

// Change is a pending change of the chain.
type Change struct {
	Verb     string        `json:"verb"` // VerbSnapshot, VerbExpand, VerbRevert, VerbMerge
	Chain    Chain         `json:"chain"`
	Snapshot *SnapshotMeta `json:"snapshot,omitempty"` // snapshot, expand: what the sealed head becomes
	Merge    *Merge        `json:"merge,omitempty"`    // merge: which layers become one
}

// Equal tells whether c and o are the same change, as they are written down.
func (c Change) Equal(o Change) bool { return sameJSON(c, o) }

// The verbs of a Change.
const (
	VerbSnapshot = "snapshot"
	VerbExpand   = "expand"
	VerbRevert   = "revert"
	VerbMerge    = "merge"
)

// Merge makes one layer of neighbouring sealed ones, each the only child of the one below it, of which all but Upper are marked removed. Into is a new id and
// carries Upper's snapshot. Prepare builds it while I/O goes on; Change swaps it in and then drops those it was made of.
type Merge struct {
	Lower   LayerID   `json:"lower"`
	Upper   LayerID   `json:"upper"`
	Between []LayerID `json:"between,omitempty"` // if there are more than two: those between Upper and Lower, uppermost first
	Into    LayerID   `json:"into"`
}

// Layers returns all that become one, uppermost first.
func (m Merge) Layers() []LayerID {
	return append(append([]LayerID{m.Upper}, m.Between...), m.Lower)
}

// SnapshotMeta is what is said of a snapshot.
type SnapshotMeta struct {
	Name        string            `json:"name"`
	UserCreated bool              `json:"userCreated"`
	Removed     bool              `json:"removed"`
	Created     time.Time         `json:"created"`
	Labels      map[string]string `json:"labels,omitempty"`
}

// LayerInfo is one layer of a replica's tree, as found on disk.
type LayerInfo struct {
	ID             LayerID       `json:"id"`
	Parent         LayerID       `json:"parent,omitempty"`
	Head           bool          `json:"head"`
	Snapshot       *SnapshotMeta `json:"snapshot,omitempty"` // nil for the head
	SizeBytes      int64         `json:"sizeBytes"`
	AllocatedBytes int64         `json:"allocatedBytes"` // of the file, metadata included
	DataBytes      int64         `json:"dataBytes"`      // guest data this layer alone holds: units in state Data. -1: not counted yet since it was opened (Replica.Count)
	Pinned         bool          `json:"pinned"`         // an open snapshot reads it: purge and merge pass it by
	Pruned         bool          `json:"pruned"`         // a purge took away what the present hides: it cannot be read by itself any more
	Verified       bool          `json:"verified"`       // sealed and its checksums are complete
}

// Space is what something takes on its disk, in bytes.
type Space struct {
	ExclusiveBytes   int64 `json:"exclusiveBytes"`   // freed if it alone were deleted, and purged
	SharedBytes      int64 `json:"sharedBytes"`      // read from others (an image, older snapshots), which keep them
	ReclaimableBytes int64 `json:"reclaimableBytes"` // freed by a purge now
}

// Usage is the space of a replica: all its files, metadata included, with the image's data that it still reads as Shared; and of each of its layers, where only guest data counts.
// The layers' ReclaimableBytes add up to the replica's.
type Usage struct {
	Space
	Layers map[LayerID]Space `json:"layers"`
}

// Diff asks for what changed between two layers.
type Diff struct {
	From, To LayerID // From empty: the image, or nothing. To empty: the head
	Off      int64   // where to begin: a multiple of 4096
	Max      int     // ranges in one answer, at least 1
}

// Range is a range of whole units that differ.
type Range struct {
	Off  int64 `json:"off"`
	N    int64 `json:"n"`
	Zero bool  `json:"zero,omitempty"` // reads as zero in the newer of the two
}

// Status is what a replica knows of itself.
type Status struct {
	Writer Writer      `json:"writer"`
	Record Record      `json:"record"` // the newest membership record it was sent
	Chain  Chain       `json:"chain"`  // what it has
	Layers []LayerInfo `json:"layers"`
	Failed string      `json:"failed,omitempty"`
	BootID string      `json:"bootID"`
}

// Replica is one copy of a volume. As a Device it takes whole units only (block.ErrAlign). Its reads, writes, zeroes and flushes belong
// to the writer that fenced it last; once a newer writer did, they return block.ErrFenced for good. All methods may be called concurrently,
// but the caller of Snapshot, Revert and Expand holds writes (a Gate), and the verbs are said one at a time.
//
// Every verb is idempotent: said again with the same arguments after a crash or a lost answer it succeeds and changes nothing more.
type Replica interface {
	block.Device
	// Fence makes w durable, ends the I/O of every older writer, and then answers. block.ErrFenced if w is older than what is held.
	// The same writer may fence again.
	Fence(ctx context.Context, w Writer) error
	// Confirm answers whether w is still the writer (a lease's heartbeat); block.ErrFenced if not.
	Confirm(ctx context.Context, w Writer) error
	// Keep makes rec durable as the newest membership record; one with a lower (epoch, generation) is refused with ErrStale.
	Keep(ctx context.Context, w Writer, rec Record) error
	// Change carries out a chain change: flush, seal the head under the snapshot's name (snapshot, expand) or leave it (revert drops it), and start the new head
	// c.Chain.Layers[0] with c.Chain.SizeBytes. The old chain or the new one survives a crash, never a mixture. After it the Device's
	// Size is c.Chain.SizeBytes.
	Change(ctx context.Context, w Writer, c Change) error
	// Prepare does whatever of Change can be done while writes go on (creates the new head's file, flushes ahead, merges); optional to call, idempotent. progress, of a merge, may be nil.
	Prepare(ctx context.Context, w Writer, c Change, progress func(doneBytes, totalBytes int64)) error
	// SetSnapshot rewrites what is said of a snapshot (removed, labels). ErrNoSnapshot if there is none of that layer.
	SetSnapshot(ctx context.Context, w Writer, id LayerID, m SnapshotMeta) error
	// Purge deletes removed snapshots that nothing stands on, and prunes from a removed snapshot whose only child is the head what the head
	// hides. It changes no id of the chain (a Change "merge" does). progress may be nil.
	Purge(ctx context.Context, w Writer, progress func(doneBytes, totalBytes int64)) error
	// OpenSnapshot returns a snapshot's content as a read-only Device; the caller closes it. Until then the layers it reads are Pinned, and neither Purge nor a merge
	// changes a byte of it. ErrNoSnapshot; ErrPruned.
	OpenSnapshot(id LayerID) (block.Device, error)
	// Status may be called by anybody at any time; it is cheap.
	Status(ctx context.Context) (Status, error)
	// Count returns once every layer's DataBytes is known, as they are from then on: after opening that may take a reading of maps.
	Count(ctx context.Context) error
	// Space measures, reading maps and no data. What is written meanwhile is counted or not; pins are not counted with.
	Space(ctx context.Context) (Usage, error)
	// Changed returns the ranges in which the content of the layer to (empty: the head, as of now) may differ from that of from, which lies below it (empty: from the image, or from nothing):
	// ascending, merged, from Off on, at most Max of them; next is where to go on, or to's size if that was all. A range that does not differ was written with the same bytes. No data is read.
	// ErrNoSnapshot; ErrNotBelow; ErrPruned if to is; block.ErrRange.
	Changed(ctx context.Context, d Diff) (list []Range, next int64, err error)
}

var (
	// ErrStale: the record is older than the one the replica holds (a catalogue restored from a backup, perhaps). Nothing was changed; `ashlar recover` continues above the highest.
	ErrStale = errors.New("membership record is older than the replica's")
	// ErrNoSnapshot: there is no such snapshot.
	ErrNoSnapshot = errors.New("no such snapshot")
	// ErrPruned: a purge has taken away what the present hides of this removed snapshot, so that it cannot be read by itself any more.
	ErrPruned = errors.New("snapshot was removed and purged, and cannot be read any more")
	// ErrNotBelow: the older of two snapshots to be compared is not one that the newer one stands on.
	ErrNotBelow = errors.New("snapshot does not lie below the other")
	// ErrRestarted: the replica's host was booted again while its writer lived on, so that what was written and not flushed may be gone (invariant 8). Nothing it says counts until it is fenced anew.
	ErrRestarted = errors.New("the replica's host was booted again under its writer")
	// ErrChain: the replica's chain is neither the one the change starts from nor the one it leads to.
	ErrChain = errors.New("chain does not match")
)

// sameJSON compares two values as they are written down: nothing else survives a catalogue or a crash.
func sameJSON(a, b any) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}
