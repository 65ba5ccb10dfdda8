// Package replicatest is the contract of replica.Replica as a test suite: fencing and sessions, the membership record, and every change of the chain, each of them said
// twice, by the wrong writer, and across a restart. Every kind of copy passes it.
//
// Read next: package replica.
package replicatest

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/block/blocktest"
	"ashlar/internal/replica"
)

// Copy is one copy of a volume under test.
type Copy interface {
	// Connect returns a new connection: a Replica that was not fenced in yet. The suite closes it.
	Connect(t testing.TB) replica.Replica
	// Restart kills whatever holds the copy and starts it again in the same boot. Connections made before are dead.
	Restart(t testing.TB)
}

// Config says how to make copies.
type Config struct {
	// New makes an empty copy, without an image, of VolumeID, with this head. What there is to clean up it gives to t.Cleanup.
	New func(t testing.TB, head replica.LayerID, sizeBytes int64) Copy
	// Steps is the number of random operations of the model check; 0 means 150. ASHLAR_STEPS in the environment does it so many times.
	Steps int
}

// VolumeID is the volume whose copies the suite wants.
const VolumeID = "0123456789abcdef0123456789abcdef"

// size of the copies that most checks use; head is their first layer.
const (
	size = 1 << 20
	head = replica.LayerID("00000000000000000000000000000001")
)

// Run checks copies.
func Run(t *testing.T, c Config) {
	t.Run("Device", func(t *testing.T) { c.device(t) })
	for _, k := range []struct {
		name string
		run  func(*rig)
	}{
		{"NotFenced", checkNotFenced}, {"FenceOrder", checkFenceOrder}, {"FenceEndsOlder", checkFenceEndsOlder}, {"FenceWaits", checkFenceWaits},
		{"FenceDurable", checkFenceDurable}, {"SameWriterElsewhere", checkSameWriterElsewhere}, {"Keep", checkKeep}, {"KeepDurable", checkKeepDurable},
		{"Snapshot", checkSnapshot}, {"SnapshotTwice", checkSnapshotTwice}, {"Unprepared", checkUnprepared}, {"GivenUp", checkGivenUp}, {"ChainMismatch", checkChainMismatch},
		{"Expand", checkExpand}, {"Revert", checkRevert}, {"SetSnapshot", checkSetSnapshot}, {"PurgeLeaf", checkPurgeLeaf}, {"Prune", checkPrune}, {"PruneBranch", checkPruneBranch},
		{"PurgePinned", checkPurgePinned}, {"Merge", checkMerge}, {"MergeRun", checkMergeRun}, {"MergeBeside", checkMergeBeside}, {"Discard", checkDiscard}, {"OldWriter", checkOldWriter}, {"Model", checkModel},
	} {
		t.Run(k.name, func(t *testing.T) { k.run(newRig(t, c)) })
	}
}

// device runs the Device's own suite over fenced connections.
func (c Config) device(t *testing.T) {
	copies := map[block.Device]Copy{}
	connect := func(t testing.TB, cp Copy, w replica.Writer) block.Device {
		r := cp.Connect(t)
		if err := r.Fence(context.Background(), w); err != nil {
			t.Fatal(err)
		}
		copies[r] = cp
		return r
	}
	session := uint64(1)
	blocktest.Run(t, blocktest.Config{
		AlignBytes: block.UnitBytes,
		New: func(t testing.TB, sizeBytes int64) block.Device {
			return connect(t, c.New(t, head, sizeBytes), replica.Writer{Epoch: 1, Session: 1})
		},
		Reopen: func(t testing.TB, d block.Device) block.Device {
			cp := copies[d]
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			cp.Restart(t)
			session++
			return connect(t, cp, replica.Writer{Epoch: 1, Session: session})
		},
		Steps: 200,
	})
}

// rig is one copy, a connection let in as w, and what the copy should hold.
type rig struct {
	*testing.T
	conf  Config
	ctx   context.Context
	cp    Copy
	r     replica.Replica
	w     replica.Writer
	chain replica.Chain
	rand  *rand.Rand
	ids   uint64
}

func newRig(t *testing.T, c Config) *rig {
	g := &rig{T: t, conf: c, ctx: t.Context(), cp: c.New(t, head, size), w: replica.Writer{Epoch: 1, Session: 1}, rand: rand.New(rand.NewPCG(1, 2)), ids: 1}
	g.chain = replica.Chain{Generation: 1, SizeBytes: size, Layers: []replica.LayerID{head}}
	g.r = g.connect(g.w)
	return g
}

// connect returns a connection that was let in as w; it is closed when the test ends.
func (g *rig) connect(w replica.Writer) replica.Replica {
	g.Helper()
	r := g.cp.Connect(g)
	g.Cleanup(func() { _ = r.Close() })
	g.must(r.Fence(g.ctx, w), "fence")
	return r
}

// restart kills the copy and connects again with the next session.
func (g *rig) restart() {
	g.Helper()
	g.cp.Restart(g)
	g.w.Session++
	g.r = g.connect(g.w)
}

func (g *rig) must(err error, what string) {
	g.Helper()
	if err != nil {
		g.Fatalf("%s: %v", what, err)
	}
}

func (g *rig) want(err, target error, what string) {
	g.Helper()
	if !errors.Is(err, target) {
		g.Errorf("%s: error %v, want one that is %q", what, err, target)
	}
}

func (g *rig) newID() replica.LayerID {
	g.ids++
	var b [16]byte
	b[14], b[15] = byte(g.ids>>8), byte(g.ids)
	return replica.LayerID(hex.EncodeToString(b[:]))
}

func (g *rig) next(layers ...replica.LayerID) replica.Chain {
	c := g.chain
	c.Generation++
	c.Layers = layers
	return c
}

func meta(name string) *replica.SnapshotMeta {
	return &replica.SnapshotMeta{Name: name, UserCreated: true, Created: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), Labels: map[string]string{"for": name}}
}

func (g *rig) snapshotChange(name string) replica.Change {
	return replica.Change{Verb: replica.VerbSnapshot, Chain: g.next(append([]replica.LayerID{g.newID()}, g.chain.Layers...)...), Snapshot: meta(name)}
}

// change prepares and makes c, and returns the layer that was the head.
func (g *rig) change(c replica.Change) replica.LayerID {
	g.Helper()
	was := g.chain.Layers[0]
	g.must(g.r.Prepare(g.ctx, g.w, c, nil), "prepare "+c.Verb)
	g.must(g.r.Change(g.ctx, g.w, c), c.Verb)
	g.chain = c.Chain
	return was
}

// snapshot makes one and returns its layer.
func (g *rig) snapshot(name string) replica.LayerID {
	g.Helper()
	return g.change(g.snapshotChange(name))
}

// revert goes back to a snapshot's layer.
func (g *rig) revert(to replica.LayerID) replica.Change {
	g.Helper()
	path := []replica.LayerID{g.newID()}
	for id := to; id != ""; id = g.layer(id).Parent {
		path = append(path, id)
	}
	c := replica.Change{Verb: replica.VerbRevert, Chain: g.next(path...)}
	g.change(c)
	return c
}

// merge makes one layer of two or, with those between them, uppermost first, of more.
func (g *rig) merge(lower, upper replica.LayerID, between ...replica.LayerID) replica.LayerID {
	g.Helper()
	m := replica.Merge{Lower: lower, Upper: upper, Between: between, Into: g.newID()}
	layers := slices.Clone(g.chain.Layers)
	if i := slices.Index(layers, upper); i >= 0 {
		layers = slices.Replace(layers, i, i+len(m.Layers()), m.Into)
	}
	g.change(replica.Change{Verb: replica.VerbMerge, Chain: g.next(layers...), Merge: &m})
	return m.Into
}

func (g *rig) remove(id replica.LayerID) {
	g.Helper()
	m := *g.layer(id).Snapshot
	m.Removed = true
	g.must(g.r.SetSnapshot(g.ctx, g.w, id, m), "remove snapshot")
}

func (g *rig) purge() {
	g.Helper()
	last := int64(-1)
	g.must(g.r.Purge(g.ctx, g.w, func(done, total int64) {
		if done < last {
			g.Errorf("purge's progress went back from %d to %d", last, done)
		}
		last = done
	}), "purge")
}

func (g *rig) status() replica.Status {
	g.Helper()
	st, err := g.r.Status(g.ctx)
	g.must(err, "status")
	return st
}

// layer returns a layer of the tree.
func (g *rig) layer(id replica.LayerID) replica.LayerInfo {
	g.Helper()
	for _, l := range g.status().Layers {
		if l.ID == id {
			return l
		}
	}
	g.Fatalf("no layer %s", id)
	return replica.LayerInfo{}
}

// wantData checks how many units a layer alone holds.
func (g *rig) wantData(id replica.LayerID, units int64) {
	g.Helper()
	if got := g.layer(id).DataBytes; got != units*block.UnitBytes {
		g.Errorf("layer %s holds %d bytes of data, want %d units", id, got, units)
	}
}

func (g *rig) hasLayer(id replica.LayerID) bool {
	return slices.ContainsFunc(g.status().Layers, func(l replica.LayerInfo) bool { return l.ID == id })
}

// wantChain checks what the copy says it has, and that its tree agrees.
func (g *rig) wantChain() {
	g.Helper()
	st := g.status()
	if !st.Chain.Equal(g.chain) {
		g.Fatalf("chain is %+v, want %+v", st.Chain, g.chain)
	}
	if got := g.r.Size(); got != g.chain.SizeBytes {
		g.Errorf("size is %d, want %d", got, g.chain.SizeBytes)
	}
	heads := 0
	for _, l := range st.Layers {
		if l.Head {
			heads++
			if l.ID != g.chain.Layers[0] || l.Snapshot != nil {
				g.Errorf("head is %+v, want %s", l, g.chain.Layers[0])
			}
		} else if l.Snapshot == nil {
			g.Errorf("layer %s is no head and no snapshot", l.ID)
		}
		if i := slices.Index(g.chain.Layers, l.ID); i >= 0 && i+1 < len(g.chain.Layers) && l.Parent != g.chain.Layers[i+1] {
			g.Errorf("layer %s stands on %q, want %s", l.ID, l.Parent, g.chain.Layers[i+1])
		}
	}
	if heads != 1 {
		g.Errorf("%d heads", heads)
	}
}

// fill writes n units of one byte at unit u.
func (g *rig) fill(b byte, u, n int64) {
	g.Helper()
	_, err := g.r.WriteAt(bytes.Repeat([]byte{b}, int(n*block.UnitBytes)), u*block.UnitBytes)
	g.must(err, "write")
}

// wantFill checks that n units from u on are all of one byte.
func (g *rig) wantFill(d block.Device, b byte, u, n int64) {
	g.Helper()
	p := make([]byte, n*block.UnitBytes)
	_, err := d.ReadAt(p, u*block.UnitBytes)
	g.must(err, "read")
	for i, x := range p {
		if x != b {
			g.Fatalf("byte %d of unit %d is %#x, want %#x", i%block.UnitBytes, u+int64(i/block.UnitBytes), x, b)
		}
	}
}

// wantSnapshot opens a snapshot and checks units of it.
func (g *rig) wantSnapshot(id replica.LayerID, b byte, u, n int64) {
	g.Helper()
	d, err := g.r.OpenSnapshot(id)
	g.must(err, "open snapshot")
	g.wantFill(d, b, u, n)
	_, err = d.WriteAt(make([]byte, block.UnitBytes), 0)
	g.want(err, block.ErrReadOnly, "write to a snapshot")
	g.must(d.Close(), "close snapshot")
}

func record(w replica.Writer, generation uint64, chain replica.Chain) replica.Record {
	return replica.Record{VolumeID: VolumeID, Epoch: w.Epoch, Opened: w.Epoch, Generation: generation, WriterNode: "n1", WriterBoot: "b1",
		Members: []replica.Member{{ReplicaID: "r1", Node: "n1", InSync: true, Incarnation: "b1"}}, Chain: chain, LastChange: time.Date(2026, 1, 1, 0, 0, 0, 7, time.UTC)}
}
