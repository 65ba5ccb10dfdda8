package layer

import (
	"context"
	"errors"
	"io"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// This file is the exported surface before its parts are built; each declaration moves to its own file as it is.

var errNotBuilt = errors.New("not built yet")

var (
	// ErrVersion: the file has a higher version than this program knows; both are named.
	ErrVersion = errors.New("unknown format version")
	// ErrSalvage: a flush on this layer failed; it opens only with Options.Salvage, a person's decision.
	ErrSalvage = errors.New("a flush failed on this layer: what it had not flushed may be gone; opening needs salvage")
	// ErrState: the layer's state does not allow this (a head where a sealed one is needed, or the other way round).
	ErrState = errors.New("layer is in the wrong state for this")
)

// BootID names the time during which the page cache cannot have lost anything: the host's boot, and the file system's mount if that may change within it.
type BootID [16]byte

// Options say how to create or open a layer.
type Options struct {
	BootID   BootID // required unless ReadOnly
	ReadOnly bool   // Open: take no lock, write nothing; recovery happens in memory
	Salvage  bool   // Open: also open a layer whose flush failed
}

// Layer is one open layer file. It is counted: Create, Open and Retain each give a reference that Close gives back.
type Layer struct{}

// Create makes a layer file of sizeBytes (a positive multiple of 4096, at most 15 TiB), durable with its name. m.ID and m.Kind are required; m.State "" means head.
func Create(fsys disk.FS, name string, m Meta, sizeBytes int64, o Options) (*Layer, error) {
	return nil, errNotBuilt
}

// Open opens a layer file and recovers it.
func Open(fsys disk.FS, name string, o Options) (*Layer, error) { return nil, errNotBuilt }

// Retain takes one more reference.
func (l *Layer) Retain() *Layer { return l }

// Close gives a reference back; the last closes the file.
func (l *Layer) Close() error { return errNotBuilt }

// Name is the file's name in its FS.
func (l *Layer) Name() string { return "" }

// ID is Meta().ID.
func (l *Layer) ID() ID { return "" }

// Meta returns a copy of the header.
func (l *Layer) Meta() Meta { return Meta{} }

// SetMeta changes the header durably. It must not change ID, State, Settled, Sums or Failed.
func (l *Layer) SetMeta(edit func(*Meta)) error { return errNotBuilt }

// SizeBytes is the size of the disk the layer describes; it never changes.
func (l *Layer) SizeBytes() int64 { return 0 }

// AllocatedBytes is the space the file takes on its disk.
func (l *Layer) AllocatedBytes() (int64, error) { return 0, errNotBuilt }

// Settle finishes a sealed layer in the background of its use: frees its log, then computes its checksums. Idempotent; may be cancelled and called again.
func (l *Layer) Settle(ctx context.Context) error { return errNotBuilt }

// Damage is a run of units whose bytes do not match their checksums.
type Damage struct{ Off, N int64 }

// Scrub reads all Data of a layer with checksums and returns what does not match. ErrState if the layer has no checksums yet.
func (l *Layer) Scrub(ctx context.Context) ([]Damage, error) { return nil, errNotBuilt }

// StackOptions say how a Stack behaves.
type StackOptions struct {
	// RecordZeroes logs a Zero even where nothing lies below: for a stack whose lower layers are still being filled.
	RecordZeroes bool
}

// Stack is layers over each other, read as one Device. If the top is a head, writes and zeroes of whole units (block.ErrAlign) are taken; else block.ErrReadOnly.
type Stack struct{}

var _ block.Device = (*Stack)(nil)

// NewStack retains the layers, head first, and returns their stack. Only the first may be a head, and a head may be in one stack only, once.
func NewStack(layers []*Layer, o StackOptions) (*Stack, error) { return nil, errNotBuilt }

// ReadAt implements block.Device, at any offset and length.
func (s *Stack) ReadAt(p []byte, off int64) (int, error) { return 0, errNotBuilt }

// WriteAt implements block.Device.
func (s *Stack) WriteAt(p []byte, off int64) (int, error) { return 0, errNotBuilt }

// Zero implements block.Device.
func (s *Stack) Zero(off, n int64) error { return errNotBuilt }

// Flush implements block.Device.
func (s *Stack) Flush() error { return errNotBuilt }

// Extents implements block.Device.
func (s *Stack) Extents(off, n int64) ([]block.Extent, error) { return nil, errNotBuilt }

// Size implements block.Device.
func (s *Stack) Size() int64 { return 0 }

// Close implements block.Device: releases the layers. It does not flush.
func (s *Stack) Close() error { return errNotBuilt }

// Layers returns the layers, head first; they are valid while the stack is open.
func (s *Stack) Layers() []*Layer { return nil }

// FlushAhead flushes and folds the log into the map while writes go on, so that the Seal that follows is short.
func (s *Stack) FlushAhead(ctx context.Context) error { return errNotBuilt }

// Seal makes the head a sealed layer, durable with everything written to it, with one fdatasync. The caller holds writes; until PushHead the
// stack is read-only. edit (may be nil) sets Snapshot and Image in the same stroke.
func (s *Stack) Seal(edit func(*Meta)) error { return errNotBuilt }

// PushHead puts a fresh head (created beforehand, of at least the same size) on top of a sealed stack, in memory only, and retains it.
// Size is the new head's from then on: the caller holds I/O with a Gate.
func (s *Stack) PushHead(h *Layer) error { return errNotBuilt }

// ReplaceMerged puts merged in the place of upper and lower, which are next to each other in the stack, and releases them. I/O goes on.
func (s *Stack) ReplaceMerged(upper, lower, merged *Layer) error { return errNotBuilt }

// Prune frees the units of l, a sealed and settled layer of this stack, which the layers above it in this stack hide. The caller knows that nobody
// else reads through l: l is marked removed and has one child. I/O goes on. Returns the bytes of units freed.
func (s *Stack) Prune(ctx context.Context, l *Layer) (int64, error) { return 0, errNotBuilt }

// MergeSpec says what Merge makes.
type MergeSpec struct {
	Upper, Lower *Layer // sealed; Lower is Upper's parent
	Meta         Meta   // ID is new; State, Settled and Sums are set by Merge
	Options      Options
	Progress     func(doneBytes, totalBytes int64) // may be nil
}

// Merge makes one sealed layer of two, durable with its name. A failure or a cancelled ctx leaves no file; a crash leaves one in state building.
func Merge(ctx context.Context, fsys disk.FS, name string, spec MergeSpec) (*Layer, error) {
	return nil, errNotBuilt
}

// Superblock is the first 4096 bytes of a layer file, section 2 of docs/formats/layer.md.
type Superblock struct {
	Version   uint32
	ID        ID
	SizeBytes int64
}

// Inspect reads a file's superblock and header, and changes nothing. It takes no lock.
func Inspect(fsys disk.FS, name string) (Meta, Superblock, error) {
	return Meta{}, Superblock{}, errNotBuilt
}

// Problem is something Check found.
type Problem struct {
	Name string `json:"name"`           // the file
	Unit int64  `json:"unit,omitempty"` // where, if it is about units
	N    int64  `json:"n,omitempty"`
	Text string `json:"text"`
}

// Check looks deeply at layer files, head first if they form a stack, and changes nothing. The error is for what kept it from looking.
func Check(ctx context.Context, fsys disk.FS, names []string) ([]Problem, error) {
	return nil, errNotBuilt
}

// DumpOptions say what Dump prints.
type DumpOptions struct {
	JSON bool // one JSON document instead of text
	Map  bool // also every run of the map
	Log  bool // also every record of the log
}

// Dump prints what a layer file holds. It changes nothing and goes on past damage, which it prints.
func Dump(w io.Writer, fsys disk.FS, name string, o DumpOptions) error { return errNotBuilt }
