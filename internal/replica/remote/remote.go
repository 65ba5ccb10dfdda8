package remote

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// errUnfinished: this end is being written.
var errUnfinished = errors.New("remote replicas are not finished")

// ErrAway: nobody answers on the other node.
var ErrAway = errors.New("the node that has it does not answer")

// ErrRestarted: the other node's host was booted again, so that what was written and not flushed may be gone. It is a replica.ErrRestarted (by which the engine knows it) and a block.ErrFailed.
var ErrRestarted error = errors.Join(replica.ErrRestarted, block.ErrFailed)

// Dial connects to the node that has the replica. The connection is past its TLS handshake, and nothing was said on it yet.
type Dial func(ctx context.Context) (net.Conn, error)

// Config says which replica, and how to reach it.
type Config struct {
	ReplicaID, VolumeID string
	Dial                Dial
	// Beat is how long the peer may be quiet before it is asked whether it is there; Silence how long it may take to answer before the connection is given up. Zero: 1 s and 3 s.
	Beat, Silence time.Duration
	Log           *slog.Logger // nil: none
}

// Replica is a replica on another node.
type Replica struct{}

var _ replica.Replica = (*Replica)(nil)

// Open connects to the replica; ErrAway when nobody answers before ctx ends.
func Open(ctx context.Context, cfg Config) (*Replica, error) { return nil, errUnfinished }

// Away tells since when the peer has not answered, and why; the zero time while it does.
func (r *Replica) Away() (since time.Time, err error) { return time.Time{}, nil }

// ReadAt implements block.Device.
func (r *Replica) ReadAt(p []byte, off int64) (int, error) { return 0, errUnfinished }

// WriteAt implements block.Device.
func (r *Replica) WriteAt(p []byte, off int64) (int, error) { return 0, errUnfinished }

// Zero implements block.Device.
func (r *Replica) Zero(off, n int64) error { return errUnfinished }

// Flush implements block.Device.
func (r *Replica) Flush() error { return errUnfinished }

// Extents implements block.Device.
func (r *Replica) Extents(off, n int64) ([]block.Extent, error) { return nil, errUnfinished }

// Size implements block.Device.
func (r *Replica) Size() int64 { return 0 }

// Close implements block.Device. It leaves the replica open where it is.
func (r *Replica) Close() error { return nil }

// Fence implements replica.Replica.
func (r *Replica) Fence(ctx context.Context, w replica.Writer) error { return errUnfinished }

// Confirm implements replica.Replica.
func (r *Replica) Confirm(ctx context.Context, w replica.Writer) error { return errUnfinished }

// Keep implements replica.Replica.
func (r *Replica) Keep(ctx context.Context, w replica.Writer, rec replica.Record) error {
	return errUnfinished
}

// Change implements replica.Replica.
func (r *Replica) Change(ctx context.Context, w replica.Writer, c replica.Change) error {
	return errUnfinished
}

// Prepare implements replica.Replica.
func (r *Replica) Prepare(ctx context.Context, w replica.Writer, c replica.Change, progress func(doneBytes, totalBytes int64)) error {
	return errUnfinished
}

// SetSnapshot implements replica.Replica.
func (r *Replica) SetSnapshot(ctx context.Context, w replica.Writer, id replica.LayerID, m replica.SnapshotMeta) error {
	return errUnfinished
}

// Purge implements replica.Replica.
func (r *Replica) Purge(ctx context.Context, w replica.Writer, progress func(doneBytes, totalBytes int64)) error {
	return errUnfinished
}

// OpenSnapshot implements replica.Replica.
func (r *Replica) OpenSnapshot(id replica.LayerID) (block.Device, error) { return nil, errUnfinished }

// Status implements replica.Replica.
func (r *Replica) Status(ctx context.Context) (replica.Status, error) {
	return replica.Status{}, errUnfinished
}

// Count implements replica.Replica.
func (r *Replica) Count(ctx context.Context) error { return errUnfinished }

// Space implements replica.Replica.
func (r *Replica) Space(ctx context.Context) (replica.Usage, error) {
	return replica.Usage{}, errUnfinished
}

// Changed implements replica.Replica.
func (r *Replica) Changed(ctx context.Context, d replica.Diff) ([]replica.Range, int64, error) {
	return nil, 0, errUnfinished
}

// OpenSource opens something that is only read, an image or a layer's own units: "image/DISKID/IMAGEID", "layer/REPLICAID/LAYERID". Its info says what it is.
func OpenSource(ctx context.Context, dial Dial, name string) (block.Device, json.RawMessage, error) {
	return nil, nil, errUnfinished
}
