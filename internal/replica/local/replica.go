// Package local is a replica on a disk of this node: a directory with one record (who may write, the tree of layers, the newest membership record) and one
// layer file for each layer. docs/formats/replica.md is normative.
//
// Replica is the opened directory, in one process at a time. What writers use is a Conn, which implements replica.Replica: fencing one ends the others. The record is
// the authority on the tree, and its write is the commit of every change (change.go); state.go has the rules of it, without I/O.
//
// Read next: docs/formats/replica.md, then conn.go, then change.go. inventory.go looks at a disk from outside.
package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
)

// ErrRecordLost: the replica's own record is gone or damaged. What its layers' headers say is enough to make it again (Recover), if all of them are there.
var ErrRecordLost = errors.New("the copy's record is lost; stop `ashlar serve`, run `ashlar recover` on its disk, which makes it again from its layers, and start it")

// OpenConfig says how to open a replica.
type OpenConfig struct {
	// BootID names the time during which the page cache cannot have lost anything: the host's boot, and the mount of the disk's file system if that may change
	// within it. It is also the replica's incarnation.
	BootID string
	// Salvage opens a replica on which a flush failed: a person's decision.
	Salvage bool
	// Lock, unless nil, is the record's file, open for reading and writing and locked, that another process passed (Replica.Lock there): the replica is opened under that lock, which
	// is never free in between. Open owns it, also when it fails.
	Lock *os.File
	// Pace, if not nil, is asked before background work (settling, checksums, purge, merge) moves n bytes more, and may wait; its error ends the work.
	Pace func(ctx context.Context, n int64) error
	Now  func() time.Time // nil: time.Now
}

// Replica is an open replica directory. All methods may be called concurrently.
type Replica struct {
	fsys disk.FS
	dir  string
	cfg  OpenConfig
	lock disk.File // the record's file: holds the lock, and the slots are in it

	slots *disk.Slots
	verbs chan struct{} // holds one token while a verb is under way

	life   context.Context // of settling and of verbs; cancelled by Close
	cancel context.CancelFunc
	bg     sync.WaitGroup
	wake   chan struct{} // capacity 1: there may be something to settle

	mu       sync.Mutex // guards what follows. Not held while I/O of guests is waited for
	st       state
	layers   map[replica.LayerID]*layer.Layer // of the tree; one reference each
	prepared *layer.Layer                     // of st.Change, once its file is complete
	base     *layer.Layer
	stack    *layer.Stack
	bound    *Conn   // whose writer is st.Writer and who may do I/O
	ending   []*Conn // fenced, but perhaps with calls still under way
	snaps    map[*snapshot]struct{}
	pins     map[*layer.Layer]int // how many open snapshots, and answers about differences, read it
	pruning  *layer.Layer         // units of it are being taken away
	failed   error
	closed   bool
	stopVerb context.CancelFunc // of the verb under way
	garbage  []string
}

// Open opens a replica directory and recovers it: every layer's log is replayed, a change that had passed its point of no return is completed, and half-made
// files are removed. disk.ErrLocked if somebody else has it open; layer.ErrSalvage if a flush failed before and Salvage is not given; block.ErrCorrupt; ErrVersion;
// ErrRecordLost, with disk.ErrNoRecord, if the record is.
func Open(fsys disk.FS, dir string, cfg OpenConfig) (*Replica, error) {
	if cfg.BootID == "" {
		err := fmt.Errorf("open replica %s: a boot id is needed: %w", dir, ErrInvalid)
		if cfg.Lock != nil {
			err = errors.Join(err, cfg.Lock.Close())
		}
		return nil, err
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	r := &Replica{fsys: fsys, dir: dir, cfg: cfg, verbs: make(chan struct{}, 1), wake: make(chan struct{}, 1),
		layers: map[replica.LayerID]*layer.Layer{}, snaps: map[*snapshot]struct{}{}, pins: map[*layer.Layer]int{}}
	r.life, r.cancel = context.WithCancel(context.Background())
	if err := r.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("open replica %s: %w", dir, err), r.release())
	}
	r.bg.Go(r.settleLoop)
	r.settleSoon()
	return r, nil
}

func (r *Replica) open() error {
	if err := r.openRecord(); err != nil {
		return err
	}
	if r.st.Failed != "" && !r.cfg.Salvage {
		return fmt.Errorf("%s: %w", r.st.Failed, layer.ErrSalvage)
	}
	if err := r.openLayers(); err != nil {
		return err
	}
	if err := r.completeChange(); err != nil {
		return err
	}
	if err := r.buildStack(); err != nil {
		return err
	}
	if r.st.Failed != "" {
		if err := r.update(func(st *state) { st.Failed = "" }); err != nil {
			return err
		}
	}
	return r.tidy()
}

// openRecord takes the lock and reads the record.
func (r *Replica) openRecord() error {
	f, err := r.recordFile()
	if errors.Is(err, fs.ErrNotExist) && Look(r.fsys, r.dir).ReplicaID != "" {
		return fmt.Errorf("%w: %w: %w", ErrRecordLost, disk.ErrNoRecord, err)
	}
	if err != nil {
		return err
	}
	r.lock = f
	if err := f.Lock(); err != nil {
		return err
	}
	r.slots = disk.OpenSlots(f, 0, slotBytes)
	payload, seq, err := r.slots.Load()
	if errors.Is(err, disk.ErrNoRecord) {
		return fmt.Errorf("%w: %w", ErrRecordLost, err)
	}
	if err != nil {
		return err
	}
	// It may have been written by a process that was killed before its sync; whatever is answered from here on rests on it.
	if err := f.Sync(); err != nil {
		return err
	}
	r.slots.Synced(seq)
	if r.st, err = decodeState(payload); errors.Is(err, block.ErrCorrupt) {
		return fmt.Errorf("%w: %w", ErrRecordLost, err)
	}
	return err
}

// recordFile opens the record, or takes over the one that another process passed.
func (r *Replica) recordFile() (disk.File, error) {
	name := path.Join(r.dir, recordName)
	if r.cfg.Lock == nil {
		return r.fsys.Open(name)
	}
	fsys, ok := r.fsys.(interface {
		Adopt(f *os.File, name string) (*disk.RealFile, error)
	})
	if !ok {
		return nil, errors.Join(fmt.Errorf("use a lock that was passed: %w", disk.ErrNotSupported), r.cfg.Lock.Close())
	}
	return fsys.Adopt(r.cfg.Lock, name)
}

// Lock returns a copy of the descriptor that has the replica's lock, to be passed to another process (OpenConfig.Lock): the lock is held until the Replica and
// every copy are closed. disk.ErrNotSupported on a file system that has none; block.ErrClosed.
func (r *Replica) Lock() (*os.File, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, fmt.Errorf("replica %s: lock: %w", r.dir, block.ErrClosed)
	}
	f, ok := r.lock.(interface{ Fd() uintptr })
	if !ok {
		return nil, fmt.Errorf("replica %s: pass the lock: %w", r.dir, disk.ErrNotSupported)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("replica %s: pass the lock: %w", r.dir, err)
	}
	return os.NewFile(uintptr(fd), recordName), nil
}

func (r *Replica) file(id replica.LayerID) string { return path.Join(r.dir, string(id)+layerSuffix) }

func (r *Replica) layerOptions() layer.Options {
	return layer.Options{BootID: bootID(r.cfg.BootID), Salvage: r.cfg.Salvage, Pace: r.cfg.Pace}
}

// openLayers opens the image and every layer of the tree.
func (r *Replica) openLayers() error {
	if r.st.BasePath != "" {
		base, err := openBase(r.fsys, r.st.Base, r.st.BasePath)
		if err != nil {
			return err
		}
		r.base = base
	}
	for _, n := range r.st.Layers {
		l, err := layer.Open(r.fsys, r.file(n.ID), r.layerOptions())
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", block.ErrCorrupt, err)
		}
		if err != nil {
			return fmt.Errorf("layer %s: %w", n.ID, err)
		}
		r.layers[n.ID] = l
		m := l.Meta()
		switch {
		case m.ID != layer.ID(n.ID), m.State == layer.StateBuilding, m.ReplicaID != r.st.ReplicaID:
			return fmt.Errorf("layer %s says it is layer %s of replica %s, %s: %w", n.ID, m.ID, m.ReplicaID, m.State, block.ErrCorrupt)
		case n.ID != r.st.Head && m.State != layer.StateSealed:
			return fmt.Errorf("layer %s is %s, but not the head: %w", n.ID, m.State, block.ErrCorrupt)
		}
		if err := r.reparent(n); err != nil {
			return err
		}
	}
	return nil
}

// parentID is what a layer's header says of the layer below: for the lowest, the image's layer.
func (r *Replica) parentID(parent replica.LayerID) layer.ID {
	if parent == "" && r.base != nil {
		return r.base.ID()
	}
	return layer.ID(parent)
}

// reparent makes a layer's header agree with the tree.
func (r *Replica) reparent(n node) error {
	l, want := r.layers[n.ID], r.parentID(n.Parent)
	if l.Meta().Parent == want {
		return nil
	}
	if err := l.SetMeta(func(m *layer.Meta) { m.Parent = want }); err != nil {
		return fmt.Errorf("layer %s: new parent: %w", n.ID, err)
	}
	return nil
}

// completeChange finishes a snapshot or expansion whose head is found sealed: sealing cannot be undone, and everything that the change needs was durable before it.
func (r *Replica) completeChange() error {
	if r.layers[r.st.Head].Meta().State != layer.StateSealed {
		return nil
	}
	c := r.st.Change
	if c == nil || c.Verb != replica.VerbSnapshot && c.Verb != replica.VerbExpand {
		return fmt.Errorf("head %s is sealed and nothing says what follows it: %w", r.st.Head, block.ErrCorrupt)
	}
	l, err := layer.Open(r.fsys, r.file(newLayer(*c)), r.layerOptions())
	if err != nil {
		return fmt.Errorf("head %s is sealed, and the next: %w", r.st.Head, err)
	}
	r.prepared = l
	if err := r.startsHere(*c); err != nil {
		return err
	}
	if err := r.update(func(st *state) { st.carry(*c) }); err != nil {
		return err
	}
	r.layers[r.st.Head], r.prepared = l, nil
	return nil
}

func (r *Replica) startsHere(c replica.Change) error { return r.st.startsHere(c) }

// stackOf returns the open layers from id down, the image last.
func (r *Replica) stackOf(id replica.LayerID) ([]*layer.Layer, error) {
	path, err := r.st.path(id)
	if err != nil {
		return nil, err
	}
	var list []*layer.Layer
	for _, id := range path {
		list = append(list, r.layers[id])
	}
	if r.base != nil {
		list = append(list, r.base)
	}
	return list, nil
}

func (r *Replica) buildStack() error {
	list, err := r.stackOf(r.st.Head)
	if err != nil {
		return err
	}
	if size := list[0].SizeBytes(); size != r.st.SizeBytes {
		return fmt.Errorf("head %s has %d bytes, the record says %d: %w", r.st.Head, size, r.st.SizeBytes, block.ErrCorrupt)
	}
	r.stack, err = layer.NewStack(list, layer.StackOptions{})
	return err
}

// tidy removes what is provably half made or dropped, and notes what nobody knows.
func (r *Replica) tidy() error {
	names, err := r.fsys.List(r.dir)
	if err != nil {
		return err
	}
	removed := false
	for _, name := range names {
		id := replica.LayerID(strings.TrimSuffix(name, layerSuffix))
		switch {
		case name == recordName, r.st.has(id), r.st.Change != nil && newLayer(*r.st.Change) == id:
		case strings.HasSuffix(name, tmpSuffix), slices.Contains(r.st.Dropped, id) && strings.HasSuffix(name, layerSuffix):
			if err := r.fsys.Remove(path.Join(r.dir, name)); err != nil {
				return err
			}
			removed = true
		default:
			r.garbage = append(r.garbage, name)
		}
	}
	if removed {
		if err := r.fsys.SyncDir(r.dir); err != nil {
			return err
		}
	}
	r.st.Dropped = nil // the next record written says so too
	return nil
}

// Garbage returns the names in the directory that belong to nothing; they are left alone.
func (r *Replica) Garbage() []string { return r.garbage }

// Dir is the replica's directory on its disk.
func (r *Replica) Dir() string { return r.dir }

// update replaces the record, durably; r.mu is held (or nobody else knows r yet). disk.ErrTooLarge changes nothing; after any other error nobody knows which record is on the disk,
// and the replica has failed.
func (r *Replica) update(edit func(*state)) error {
	next := r.st.clone()
	edit(&next)
	if err := next.check(); err != nil {
		panic(fmt.Sprintf("local: a change of replica %s would break its record: %v", r.dir, err))
	}
	payload, err := json.Marshal(next)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	err = r.slots.Store(payload)
	switch {
	case errors.Is(err, disk.ErrTooLarge):
		return fmt.Errorf("too many layers: %w", err)
	case err != nil:
		return r.failLocked(fmt.Errorf("write record: %w", err))
	}
	r.st = next
	return nil
}

// failLocked fails the replica until it is opened again; r.mu is held.
func (r *Replica) failLocked(why error) error {
	if r.failed == nil {
		r.failed = fmt.Errorf("replica %s: %w: %w", r.dir, block.ErrFailed, why)
		if r.bound != nil {
			r.bound.end(r.failed)
		}
	}
	return r.failed
}

// fail is failLocked for a failed flush: the record says so, as far as that still works (the layer's header does too), and opening then needs salvage.
func (r *Replica) fail(why error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failed == nil && !r.closed {
		next := r.st.clone()
		next.Failed = why.Error()
		if payload, err := json.Marshal(next); err == nil && r.slots.Store(payload) == nil {
			r.st = next
		}
		return r.failLocked(why)
	}
	if r.failed == nil {
		return why
	}
	return r.failed
}

// settleSoon has the background look for layers to settle.
func (r *Replica) settleSoon() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// settleLoop counts what the layers hold, and then settles sealed layers, one at a time, until Close. What fails is tried again when there is a new reason to look.
func (r *Replica) settleLoop() {
	_ = r.Count(r.life) // whoever needs a count that is missing counts
	for {
		select {
		case <-r.life.Done():
			return
		case <-r.wake:
		}
		tried := map[replica.LayerID]bool{}
		for l := r.nextToSettle(tried); l != nil; l = r.nextToSettle(tried) {
			// A layer that could not be settled stays unverified, which Status says.
			_ = errors.Join(l.Settle(r.life), l.Close())
		}
	}
}

// nextToSettle returns a sealed layer without checksums, or without a count in its header, with a reference, or nil.
func (r *Replica) nextToSettle(tried map[replica.LayerID]bool) *layer.Layer {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	for _, n := range r.st.Layers {
		l := r.layers[n.ID]
		if l == nil || tried[n.ID] {
			continue
		}
		if m := l.Meta(); m.State == layer.StateSealed && (!m.Sums || m.DataBytes == nil) {
			tried[n.ID] = true
			return l.Retain()
		}
	}
	return nil
}

// Close ends every connection and open snapshot, waits for verbs and settling to stop, and closes the files. It does not flush. Called again it does nothing.
func (r *Replica) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	bound, snaps := r.bound, r.snaps
	r.snaps = map[*snapshot]struct{}{}
	r.mu.Unlock()
	r.cancel()
	var errs []error
	if bound != nil {
		bound.end(fmt.Errorf("replica %s: %w", r.dir, block.ErrClosed))
	}
	for s := range snaps {
		errs = append(errs, s.Device.Close())
	}
	r.verbs <- struct{}{} // a verb under way sees that life has ended
	r.bg.Wait()
	errs = append(errs, r.release())
	<-r.verbs
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close replica %s: %w", r.dir, err)
	}
	return nil
}

// release closes the files.
func (r *Replica) release() error {
	r.cancel()
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	if r.stack != nil {
		errs = append(errs, r.stack.Close())
	}
	for _, l := range r.layers {
		errs = append(errs, l.Close())
	}
	for _, l := range []*layer.Layer{r.prepared, r.base} {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	if r.lock != nil {
		errs = append(errs, r.lock.Close())
	}
	return errors.Join(errs...)
}
