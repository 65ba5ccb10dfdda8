// Package volume is the engine: one block.Device, of any offset and length, over the copies of a volume, with one writer at a time, and the verbs that
// change the chain of its layers (Snapshot, Revert, Expand, Purge). The membership record in the catalogue, reached through a Ledger, says who may
// write and which copies count.
//
// A write goes Gate → device (device.go: units, edges, overlaps) → replica. members.go and chain.go are the rules of the record, pure; open.go
// and close.go are the life of a writer; verbs.go and purge.go the changes; ledger.go the port, book.go how it is used.
//
// One copy, of this node or another, is what it drives for now: it then keeps no intent, confirms nothing by time, and swaps the record only at open,
// snapshot, resize, revert, merge, failure and close. Nothing has to be confirmed because every read and write goes to the one copy itself, which looks at the epoch when it does it: who opened the volume
// in between has fenced that copy, and waited for what it had under way, before his first byte. A copy on another node may make any call wait; only Abandon, and the end of a Close's context, end that. The rules and interfaces are those for several.
//
// Read next: members.go, then open.go, then verbs.go.
package volume

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

var (
	// ErrInvalid: an argument cannot be right. Nothing was changed.
	ErrInvalid = errors.New("invalid argument")
	// ErrSeveral: the volume has, or is given, more than one copy, which this version does not drive.
	ErrSeveral = errors.New("more than one copy is not built yet")
	// ErrExists: a snapshot of this name exists, perhaps marked removed. Nothing was changed.
	ErrExists = errors.New("snapshot exists")
	// ErrRemoved: the snapshot is marked removed and cannot be reverted to.
	ErrRemoved = errors.New("snapshot is marked removed")
)

// Member is a copy and its id in the record.
type Member struct {
	ID      string
	Replica replica.Replica
}

// Config says what to open. The Replicas belong to the Volume once Open succeeded: Close closes them.
type Config struct {
	VolumeID string
	Name     string // for people
	Node     string // who opens
	BootID   string // of its host
	Ledger   Ledger
	Replicas []Member
	// Resume takes up the epoch of this node's same boot again, without the catalogue, if every copy confirms it; otherwise the volume is claimed as ever.
	Resume bool
	// GuestsGone says that the volume was detached since its last writer, so that no guest remembers what was not flushed.
	GuestsGone bool
	// Guests, unless 0, is the epoch under which this node's guests were served, who still wait: the volume is not opened for them if anybody else opened it since.
	Guests uint64
	// Salvage opens the last copies although a flush on them failed: a person's decision.
	Salvage bool
	NewID   func() replica.LayerID // for layers that merging makes; nil: random
	Now     func() time.Time       // nil: time.Now
}

func (c *Config) check() error {
	if c.VolumeID == "" || c.Node == "" || c.BootID == "" || c.Ledger == nil {
		return fmt.Errorf("volume id, node, boot id and ledger are needed: %w", ErrInvalid)
	}
	if len(c.Replicas) == 0 {
		return fmt.Errorf("no copy given: %w", ErrNoMember)
	}
	if len(c.Replicas) > 1 {
		return ErrSeveral
	}
	if c.NewID == nil {
		c.NewID = randomID
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return nil
}

func randomID() replica.LayerID {
	var b [16]byte
	rand.Read(b[:]) //nolint:errcheck // never fails: crypto/rand ends the program instead
	return replica.LayerID(hex.EncodeToString(b[:]))
}

// State says how an open volume is.
type State string

// The states. Only StateOpen serves I/O; the others end with Close.
const (
	StateOpen   State = "open"
	StateFailed State = "failed" // the last copy failed; its error is answered until the volume is detached
	StateFenced State = "fenced" // a newer writer owns the volume
	StateLost   State = "lost"   // the last copy's host was booted again under the guests: ErrLost until the volume is detached
	StateClosed State = "closed"
)

// Volume is an open volume. All methods may be called concurrently; verbs wait for each other.
type Volume struct {
	cfg    Config
	gate   *block.Gate
	ranges *ranges
	edges  sync.Pool
	writer replica.Writer
	copies []replica.Replica // of cfg.Replicas

	ended   atomic.Pointer[ending] // nil while I/O is served
	endedCh chan struct{}          // closed when ended is set

	verbs chan struct{} // holds one token while a verb, or a change of the book, is under way
	book  book          // guarded by verbs

	life   context.Context // of background work; cancelled by Close
	cancel context.CancelFunc
	bg     sync.WaitGroup

	mu     sync.Mutex // guards what follows
	closed bool
	seen   replica.Record // the book's record, for Status
	stats  Stats
}

// ending is why a volume serves no I/O any more.
type ending struct {
	state State
	err   error
}

// Stats counts what the engine did since the volume was opened.
type Stats struct {
	Changes   int           // snapshots, reverts, expansions and merges carried out
	LastPause time.Duration // how long the last of them held guests' I/O
	MaxPause  time.Duration
	Resumed   bool // the epoch was resumed without the catalogue
	Passed    int  // removed snapshots that the last purge passed by, because somebody was reading them or what stands on them
}

// Status is what a volume knows of itself.
type Status struct {
	State     State
	Err       error // why it is not open
	Writer    replica.Writer
	SizeBytes int64
	Record    replica.Record // as last swapped
	Layers    []replica.LayerInfo
	Stats     Stats
}

// Device is what exports serve. It is one Gate for the volume's whole life; its size changes when the volume is expanded.
func (v *Volume) Device() *block.Gate { return v.gate }

// Ended is closed when the volume stops to serve I/O: it failed, was fenced, or was closed. Status says which.
func (v *Volume) Ended() <-chan struct{} { return v.endedCh }

// Err is why the volume serves no I/O any more; nil while it does. It asks nobody, unlike Status.
func (v *Volume) Err() error { return v.down() }

// Status asks the first copy for its layers; an error is the copy's. It is cheap, but for the first time after opening, when it may read a map to count (LayerInfo.DataBytes).
func (v *Volume) Status(ctx context.Context) (Status, error) {
	v.mu.Lock()
	st := Status{State: StateOpen, Writer: v.writer, Record: v.seen, Stats: v.stats}
	v.mu.Unlock()
	if e := v.ended.Load(); e != nil {
		st.State, st.Err = e.state, e.err
	}
	st.SizeBytes = v.gate.Size()
	if st.State == StateClosed {
		return st, nil
	}
	rs, err := v.copies[0].Status(ctx)
	if err == nil && slices.ContainsFunc(rs.Layers, func(l replica.LayerInfo) bool { return l.DataBytes < 0 }) {
		if err = v.copies[0].Count(ctx); err == nil { // once, soon after opening
			rs, err = v.copies[0].Status(ctx)
		}
	}
	if err != nil {
		return st, fmt.Errorf("volume %s: status: %w", v.cfg.Name, err)
	}
	st.Layers = rs.Layers
	return st, nil
}

// Space measures what the volume and each of its layers take, share, and would give back: maps are read, no data. It is for when somebody asks, not for every status.
func (v *Volume) Space(ctx context.Context) (replica.Usage, error) {
	if err := v.down(); err != nil {
		return replica.Usage{}, fmt.Errorf("volume %s: space: %w", v.cfg.Name, err)
	}
	u, err := v.copies[0].Space(ctx)
	if err != nil {
		return u, fmt.Errorf("volume %s: space: %w", v.cfg.Name, err)
	}
	return u, nil
}

// Changed returns where the content of the layer to (empty: the present, as of now) may differ from that of from, which it stands on (empty: from the image, or from nothing): whole units,
// ascending, merged, from off on, at most limit ranges. next is where to go on; to's size if that was all. Where from is the smaller one, it counts as followed by zeroes.
// No data is read. A range that does not differ was written with the same bytes.
//
// A layer that a purge has merged away in the meantime is replica.ErrNoSnapshot, also half way through. replica.ErrNotBelow; replica.ErrPruned; block.ErrRange.
func (v *Volume) Changed(ctx context.Context, from, to replica.LayerID, off int64, limit int) (list []replica.Range, next int64, err error) {
	if err := v.down(); err != nil {
		return nil, off, fmt.Errorf("volume %s: changed: %w", v.cfg.Name, err)
	}
	list, next, err = v.copies[0].Changed(ctx, replica.Diff{From: from, To: to, Off: off, Max: limit})
	if err != nil {
		return nil, off, fmt.Errorf("volume %s: changed: %w", v.cfg.Name, err)
	}
	return list, next, nil
}

// Layers returns the volume's tree as found on disk: every snapshot and the head.
func (v *Volume) Layers(ctx context.Context) ([]replica.LayerInfo, error) {
	if err := v.down(); err != nil {
		return nil, fmt.Errorf("volume %s: layers: %w", v.cfg.Name, err)
	}
	st, err := v.Status(ctx)
	return st.Layers, err
}

// OpenSnapshot returns a snapshot's content as a read-only Device, which the caller closes. replica.ErrNoSnapshot if there is none of that name.
func (v *Volume) OpenSnapshot(ctx context.Context, name string) (block.Device, error) {
	layers, err := v.Layers(ctx)
	if err != nil {
		return nil, err
	}
	info, err := findSnapshot(layers, name)
	if err != nil {
		return nil, fmt.Errorf("volume %s: open snapshot: %w", v.cfg.Name, err)
	}
	dev, err := v.copies[0].OpenSnapshot(info.ID)
	if err != nil {
		return nil, fmt.Errorf("volume %s: open snapshot %s: %w", v.cfg.Name, name, err)
	}
	return dev, nil
}

// down returns the error that I/O is to be answered with, or nil.
func (v *Volume) down() error {
	if e := v.ended.Load(); e != nil {
		return e.err
	}
	return nil
}

// end stops I/O for good, once; it returns whether it was this call.
func (v *Volume) end(state State, err error) bool {
	if !v.ended.CompareAndSwap(nil, &ending{state, err}) {
		return false
	}
	close(v.endedCh)
	return true
}

// note looks at an error of the data path: one that is for good ends the volume. It returns the error for the guest.
func (v *Volume) note(err error) error {
	switch {
	case errors.Is(err, block.ErrFenced):
		v.end(StateFenced, fmt.Errorf("volume %s: %w", v.cfg.Name, block.ErrFenced))
	case errors.Is(err, replica.ErrRestarted):
		return v.lose(err)
	case errors.Is(err, block.ErrFailed):
		return v.fail(0, err)
	}
	return err
}

// lose ends the volume because its copy's host was booted again while its guests lived on: what they wrote and did not flush may be gone (invariant 8). The record says so as it is: it names this writer, and
// an incarnation that the copy no longer has; so no restart of this process takes the guests on again, and the next attach, whose guests are new, finds what a power cut leaves. It returns the error
// for the guest.
func (v *Volume) lose(why error) error {
	v.end(StateLost, fmt.Errorf("volume %s: %w: %v", v.cfg.Name, ErrLost, why)) // not what it wraps: it needs no salvage
	return v.down()
}

// Confirm asks every copy whether this writer is still the one it lets in. block.ErrFenced, and the volume has ended, if a newer one came; a copy whose host lost something ends it too (ErrLost). Any other error
// tells nothing. A copy whose host was booted again when everything was flushed has lost nothing: the record learns of its new incarnation.
func (v *Volume) Confirm(ctx context.Context) error {
	for i, r := range v.copies {
		err := r.Confirm(ctx, v.writer)
		if err == nil {
			err = v.reincarnate(ctx, i)
		}
		if err != nil && v.down() == nil {
			return v.note(err)
		}
	}
	return v.down()
}

// reincarnate has the record say in which boot of its host copy i is, if that is another than it says.
func (v *Volume) reincarnate(ctx context.Context, i int) error {
	st, err := v.copies[i].Status(ctx)
	if err != nil {
		return err
	}
	id := v.cfg.Replicas[i].ID
	v.mu.Lock()
	same := Reincarnated(v.seen, id, st.BootID, v.cfg.Now()).Equal(v.seen)
	v.mu.Unlock()
	if same {
		return nil
	}
	return v.verb(ctx, "note that a copy's host was booted again", func(ctx context.Context, _ []replica.LayerInfo) error {
		next := Reincarnated(v.book.rec, id, st.BootID, v.cfg.Now())
		if next.Equal(v.book.rec) {
			return nil
		}
		if err := v.swap(ctx, next); err != nil {
			return err
		}
		return v.keep(ctx)
	})
}

// fail ends the volume because its copy i failed and no other is left, and has the record say so, in the background and before the next open can
// begin without it. It returns the error for the guest.
func (v *Volume) fail(i int, why error) error {
	err := fmt.Errorf("volume %s: %w: %w", v.cfg.Name, block.ErrFailed, why)
	if !v.end(StateFailed, err) {
		return v.down()
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.closed {
		v.bg.Go(func() { v.recordFailure(v.cfg.Replicas[i].ID, why) })
	}
	return err
}

// recordFailure swaps the member's failure into the record, as often as it takes. Close does it if this could not.
func (v *Volume) recordFailure(replicaID string, why error) {
	wait := 100 * time.Millisecond
	for {
		if err := v.tryRecordFailure(replicaID, why); err == nil || errors.Is(err, block.ErrFenced) || errors.Is(err, ErrNoRecord) {
			return
		}
		timer := time.NewTimer(wait)
		select {
		case <-v.life.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		wait = min(2*wait, 5*time.Second)
	}
}

func (v *Volume) tryRecordFailure(replicaID string, why error) error {
	if err := v.acquire(v.life); err != nil {
		return err
	}
	defer v.release()
	if err := v.refresh(v.life); err != nil {
		return err
	}
	next, err := FailMember(v.book.rec, replicaID, why.Error(), v.cfg.Now())
	if err != nil {
		return err
	}
	return v.swap(v.life, next)
}

// acquire takes the token of the verbs.
func (v *Volume) acquire(ctx context.Context) error {
	select {
	case v.verbs <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("volume %s: wait for another verb: %w", v.cfg.Name, context.Cause(ctx))
	}
}

func (v *Volume) release() { <-v.verbs }
