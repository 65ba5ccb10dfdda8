package volume_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
	"ashlar/internal/volume"
	"ashlar/internal/volume/ledgertest"
)

const (
	volumeID  = "0123456789abcdef0123456789abcdef"
	replicaID = "abcdef0123456789abcdef0123456789"
	head      = replica.LayerID(replicaID)
	node      = "node-1"
)

// rig is a volume with its one copy on a disk in memory and its record in a catalogue in memory.
type rig struct {
	testing.TB
	ctx    context.Context
	fsys   *disk.Mem
	ledger *ledgertest.Mem
	dir    string
	boots  int
	size   int64
	ids    *atomic.Uint64
	r      *local.Replica
	v      *volume.Volume
}

func newRig(t testing.TB, sizeBytes int64, opts disk.MemOptions) *rig {
	t.Helper()
	g := &rig{TB: t, ctx: context.Background(), fsys: disk.NewMem(opts), ledger: ledgertest.NewMem(), boots: 1, size: sizeBytes, ids: new(atomic.Uint64)}
	dir, err := local.Create(g.fsys, local.CreateConfig{ReplicaID: replicaID, VolumeID: volumeID, Volume: "db1", HeadID: head, SizeBytes: sizeBytes, BootID: g.boot()})
	g.must(err, "create replica")
	g.dir = dir
	rec := volume.NewRecord(volumeID, []replica.Member{{ReplicaID: replicaID, Node: node}}, replica.Chain{SizeBytes: sizeBytes, Layers: []replica.LayerID{head}}, time.Now())
	_, err = g.ledger.Swap(g.ctx, rec, 0)
	g.must(err, "first record")
	return g
}

// boot is the host's boot id.
func (g *rig) boot() string { return fmt.Sprintf("2f1c7d8e-0000-4000-8000-%012d", g.boots) }

// must ends the test on an error, except on one that is expected.
func (g *rig) must(err error, what string, expected ...error) {
	g.Helper()
	if err != nil && !slices.ContainsFunc(expected, func(e error) bool { return errors.Is(err, e) }) {
		g.Fatalf("%s: %v", what, err)
	}
}

func (g *rig) want(err, target error, what string) {
	g.Helper()
	if !errors.Is(err, target) {
		g.Errorf("%s: error %v, want one that is %q", what, err, target)
	}
}

// id returns a fresh layer id.
func (g *rig) id() replica.LayerID { return replica.LayerID(fmt.Sprintf("%032x", g.ids.Add(1))) }

// config is for a connection of its own.
func (g *rig) config() volume.Config {
	return volume.Config{VolumeID: volumeID, Name: "db1", Node: node, BootID: g.boot(), Ledger: g.ledger, NewID: g.id,
		Replicas: []volume.Member{{ID: replicaID, Replica: g.r.Connect()}}}
}

// openReplica opens the copy's directory.
func (g *rig) openReplica(salvage bool) error {
	r, err := local.Open(g.fsys, g.dir, local.OpenConfig{BootID: g.boot(), Salvage: salvage})
	if err == nil {
		g.r = r
	}
	return err
}

// tryOpen opens copy and volume; edit may change the config.
func (g *rig) tryOpen(edit ...func(*volume.Config)) error {
	if err := g.openReplica(false); err != nil {
		return err
	}
	c := g.config()
	for _, f := range edit {
		f(&c)
	}
	v, err := volume.Open(g.ctx, c)
	if err != nil {
		return errors.Join(err, g.r.Close())
	}
	g.v = v
	return nil
}

func (g *rig) open(edit ...func(*volume.Config)) {
	g.Helper()
	g.must(g.tryOpen(edit...), "open")
}

func (g *rig) close() {
	g.Helper()
	g.must(g.v.Close(g.ctx), "close volume")
	g.must(g.r.Close(), "close replica")
}

// kill is kill -9 of the process that has the volume open.
func (g *rig) kill() {
	g.Helper()
	g.fsys = g.fsys.Clone()
	g.must(g.r.Close(), "close what was killed")
}

// power is a power cut.
func (g *rig) power(opts disk.CrashOptions) {
	g.Helper()
	g.fsys = g.fsys.CrashClone(opts)
	g.boots++
	g.must(g.r.Close(), "close what lost power")
}

func resume(c *volume.Config) { c.Resume = true }

func (g *rig) fill(b byte, off, n int64) {
	g.Helper()
	_, err := g.v.Device().WriteAt(bytes.Repeat([]byte{b}, int(n)), off)
	g.must(err, "write")
}

func (g *rig) flush() { g.Helper(); g.must(g.v.Device().Flush(), "flush") }

// wantFill checks that [off, off+n) is all of one byte.
func (g *rig) wantFill(d block.Device, b byte, off, n int64) {
	g.Helper()
	p := make([]byte, n)
	_, err := d.ReadAt(p, off)
	g.must(err, "read")
	if bytes.Equal(p, bytes.Repeat([]byte{b}, len(p))) {
		return // what follows takes long with the race detector
	}
	for i, x := range p {
		if x != b {
			g.Fatalf("byte %d is %#x, want %#x", off+int64(i), x, b)
		}
	}
}

func (g *rig) wantSnapshot(name string, b byte, off, n int64) {
	g.Helper()
	d, err := g.v.OpenSnapshot(g.ctx, name)
	g.must(err, "open snapshot")
	g.wantFill(d, b, off, n)
	g.must(d.Close(), "close snapshot")
}

func meta(name string) replica.SnapshotMeta {
	return replica.SnapshotMeta{Name: name, UserCreated: true, Created: time.Unix(1e9, 7)}
}

func (g *rig) snapshot(name string) replica.LayerID {
	g.Helper()
	id := g.id()
	g.must(g.v.Snapshot(g.ctx, id, meta(name)), "snapshot")
	return id
}

func (g *rig) status() volume.Status {
	g.Helper()
	st, err := g.v.Status(g.ctx)
	g.must(err, "status")
	return st
}

// record is what the catalogue has.
func (g *rig) record() replica.Record {
	g.Helper()
	rec, _, err := g.ledger.Clone().Read(g.ctx, volumeID) // without the faults
	g.must(err, "read record")
	return rec
}

// layer finds a snapshot's layer.
func (g *rig) layer(name string) (replica.LayerInfo, bool) {
	g.Helper()
	for _, l := range g.status().Layers {
		if l.Snapshot != nil && l.Snapshot.Name == name {
			return l, true
		}
	}
	return replica.LayerInfo{}, false
}

// names returns the names of all snapshots, sorted.
func (g *rig) names() []string {
	g.Helper()
	var names []string
	for _, l := range g.status().Layers {
		if l.Snapshot != nil {
			names = append(names, l.Snapshot.Name)
		}
	}
	slices.Sort(names)
	return names
}

// wantSettled checks that record, copy and device agree, that nothing is pending, and that the copy keeps the catalogue's record.
func (g *rig) wantSettled() {
	g.Helper()
	rec := g.record()
	st, err := g.r.Status()
	g.must(err, "status of the replica")
	if rec.Pending != nil || !rec.Chain.Equal(st.Chain) || rec.Chain.SizeBytes != g.v.Device().Size() {
		g.Fatalf("record %+v, copy %+v, size %d", rec, st.Chain, g.v.Device().Size())
	}
	if !st.Record.Equal(rec) {
		g.Fatalf("the copy keeps %+v\nthe catalogue has %+v", st.Record, rec)
	}
	if rec.Opened != rec.Epoch || rec.WriterNode != node || rec.WriterBoot != g.boot() {
		g.Fatalf("open volume's record is %+v", rec)
	}
	if st.Writer.Epoch != rec.Epoch {
		g.Fatalf("writer %+v, epoch %d", st.Writer, rec.Epoch)
	}
}

// awaitSettled waits until the copy has settled every snapshot in the background.
func (g *rig) awaitSettled() {
	g.Helper()
	ctx, cancel := context.WithTimeout(g.ctx, 30*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		if !slices.ContainsFunc(g.status().Layers, func(l replica.LayerInfo) bool { return !l.Head && !l.Verified }) {
			return
		}
		runtime.Gosched()
	}
	g.Fatal("snapshots were not settled")
}

func seeded(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0x766f6c)) }
