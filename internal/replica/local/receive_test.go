package local_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path"
	"reflect"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
	"ashlar/internal/replica/replicatest"
)

const (
	copyID   = "0123456789abcdef0123456789abcdef"
	baseFile = "images/debian/image.layer"
)

// receiveConfig says how to copy l as it is now, one piece after the other.
func receiveConfig(l *lab) local.ReceiveConfig {
	l.Helper()
	l.must(l.r.Count(l.ctx), "count")
	st := l.status()
	c := local.ReceiveConfig{ReplicaID: copyID, VolumeID: replicatest.VolumeID, Volume: "db1", BootID: boot, Created: time.Unix(2e9, 0), Source: st,
		Open: l.c.OpenLayer, Writer: l.w, Record: replica.Record{VolumeID: replicatest.VolumeID, Epoch: l.w.Epoch, Generation: 9}, Parallel: 1}
	if st.Chain.Base != "" {
		c.Base = &local.Base{ID: st.Chain.Base, Path: baseFile, Name: "debian"}
	}
	return c
}

// received copies l to fsys and opens the copy.
func received(l *lab, fsys *disk.Mem, c local.ReceiveConfig) *lab {
	l.Helper()
	in, err := local.Receive(l.ctx, fsys, c)
	l.must(err, "receive")
	if list, err := local.List(fsys); err != nil || len(list) != 0 {
		l.Fatalf("a copy that was not placed is listed: %v, %v", list, err)
	}
	dir, err := in.Place()
	l.must(err, "place")
	n := &lab{TB: l.TB, ctx: l.ctx, fsys: fsys, boot: boot, dir: dir}
	n.open(l.w)
	return n
}

// wantSame compares everything that can be seen of two replicas of a volume.
func wantSame(l, n *lab) {
	l.Helper()
	wantSameDevice(l, "head", l.c, n.c)
	l.must(errors.Join(l.r.Count(l.ctx), n.r.Count(l.ctx)), "count")
	a, b := l.status(), n.status()
	if !a.Chain.Equal(b.Chain) || len(a.Layers) != len(b.Layers) {
		l.Fatalf("chain is %+v with %d layers, want %+v with %d", b.Chain, len(b.Layers), a.Chain, len(a.Layers))
	}
	byID := map[replica.LayerID]replica.LayerInfo{}
	for _, i := range b.Layers {
		byID[i.ID] = i
	}
	for _, want := range a.Layers {
		got := byID[want.ID]
		got.AllocatedBytes, got.Verified, got.Pinned = want.AllocatedBytes, want.Verified, want.Pinned
		if !reflect.DeepEqual(got, want) {
			l.Fatalf("layer is %+v, want %+v", got, want)
		}
		if want.Head {
			continue
		}
		x, errX := l.r.OpenSnapshot(want.ID)
		y, errY := n.r.OpenSnapshot(want.ID)
		if errors.Is(errX, replica.ErrPruned) && errors.Is(errY, replica.ErrPruned) {
			continue
		}
		l.must(errors.Join(errX, errY), "open snapshot")
		wantSameDevice(l, "snapshot "+want.Snapshot.Name, x, y)
		l.must(errors.Join(x.Close(), y.Close()), "close snapshot")
		d := replica.Diff{From: want.ID, Max: 1000}
		p, _, errP := l.c.Changed(l.ctx, d)
		q, _, errQ := n.c.Changed(l.ctx, d)
		if !slices.Equal(p, q) || (errP == nil) != (errQ == nil) {
			l.Fatalf("changed since %s: %v (%v), want %v (%v)", want.Snapshot.Name, q, errQ, p, errP)
		}
	}
	u, err := l.r.Space(l.ctx)
	l.must(err, "space")
	v, err := n.r.Space(l.ctx)
	l.must(err, "space")
	if !reflect.DeepEqual(u.Layers, v.Layers) || u.SharedBytes != v.SharedBytes {
		l.Fatalf("space is %+v, want %+v", v, u)
	}
}

// wantSameDevice compares bytes and states.
func wantSameDevice(l *lab, what string, a, b block.Device) {
	l.Helper()
	if a.Size() != b.Size() {
		l.Fatalf("%s: %d bytes, want %d", what, b.Size(), a.Size())
	}
	p, q := make([]byte, a.Size()), make([]byte, a.Size())
	_, errA := a.ReadAt(p, 0)
	_, errB := b.ReadAt(q, 0)
	l.must(errors.Join(errA, errB), "read "+what)
	if !bytes.Equal(p, q) {
		at := 0
		for p[at] == q[at] {
			at++
		}
		l.Fatalf("%s: byte %d of unit %d differs", what, at%block.UnitBytes, at/block.UnitBytes)
	}
	x, errA := a.Extents(0, a.Size())
	y, errB := b.Extents(0, b.Size())
	l.must(errors.Join(errA, errB), "extents of "+what)
	if !slices.Equal(x, y) {
		l.Fatalf("%s: extents %v, want %v", what, y, x)
	}
}

// grow does random things to a replica: writes, discards, snapshots, expansions, reverts, removals, purges.
func grow(l *lab, r *rand.Rand, n int) {
	l.Helper()
	layers := func() []replica.LayerInfo { // in an order that does not depend on how the replica came to be
		list := l.status().Layers
		slices.SortFunc(list, func(a, b replica.LayerInfo) int { return cmp.Compare(a.ID, b.ID) })
		return list
	}
	for i := range n {
		units := l.c.Size() / block.UnitBytes
		at := r.Int64N(units)
		run := min(1+r.Int64N(40), units-at)
		st := l.status()
		next := st.Chain
		next.Generation++
		id := replica.LayerID(fmt.Sprintf("%016x%016x", r.Uint64(), r.Uint64()))
		switch k := r.IntN(20); {
		case k < 8:
			l.fill(byte(1+r.IntN(255)), at, run)
		case k < 11:
			l.must(l.c.Zero(at*block.UnitBytes, run*block.UnitBytes), "zero")
		case k < 14:
			l.change(l.snapshotChange(fmt.Sprintf("s%d", i), id))
		case k < 15:
			next.Layers, next.SizeBytes = append([]replica.LayerID{id}, next.Layers...), next.SizeBytes+64*block.UnitBytes
			l.change(replica.Change{Verb: replica.VerbExpand, Chain: next, Snapshot: &replica.SnapshotMeta{Name: fmt.Sprintf("e%d", i)}})
		case k < 17:
			list := layers()
			growBack(l, list[r.IntN(len(list))], id)
		default:
			list := layers()
			if info := list[r.IntN(len(list))]; !info.Head {
				l.must(l.mark(info.ID), "mark")
			}
			if k == 19 {
				l.must(l.c.Purge(l.ctx, l.w, nil), "purge")
			}
		}
	}
}

// growBack reverts to a snapshot that still can be read.
func growBack(l *lab, to replica.LayerInfo, id replica.LayerID) {
	st := l.status()
	parents := map[replica.LayerID]replica.LayerID{}
	for _, i := range st.Layers {
		parents[i.ID] = i.Parent
	}
	if to.Head || to.Pruned || to.Snapshot.Removed || parents[st.Chain.Layers[0]] == "" {
		return
	}
	next := replica.Chain{Generation: st.Chain.Generation + 1, SizeBytes: st.Chain.SizeBytes, Layers: []replica.LayerID{id}, Base: st.Chain.Base}
	for at := to.ID; at != ""; at = parents[at] {
		next.Layers = append(next.Layers, at)
	}
	l.change(replica.Change{Verb: replica.VerbRevert, Chain: next})
}

// TestReceive: any tree, also over an image, reads the same after it was copied, is counted the same, and lives on the same, also after a power cut right after it was placed.
func TestReceive(t *testing.T) {
	for n := range 4 * (1 + thorough()) {
		seed := uint64(4000 + n)
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			l := &lab{TB: t, ctx: t.Context(), fsys: disk.NewMem(disk.MemOptions{Reflink: n%2 == 0}), boot: boot}
			to := disk.NewMem(disk.MemOptions{})
			c := createConfig()
			if n%3 == 0 {
				makeImage(l, baseFile, newID("image"), 5, 200)
				makeImage(&lab{TB: t, ctx: t.Context(), fsys: to}, baseFile, newID("image"), 5, 200)
				l.must(errors.Join(to.SyncDir("."), to.SyncDir("images"), to.SyncDir("images/debian")), "sync")
				c.Base = &local.Base{ID: newID("image"), Path: baseFile, Name: "debian"}
			}
			var err error
			l.dir, err = local.Create(l.fsys, c)
			l.must(err, "create")
			l.open(replica.Writer{Epoch: 4, Session: 2})
			grow(l, r, 50)
			rc := receiveConfig(l)
			rc.Parallel = 1 + n%4
			var done, total int64
			rc.Progress = func(d, of int64) {
				if d < done {
					t.Errorf("progress went from %d to %d", done, d)
				}
				done, total = d, of
			}
			o := received(l, to, rc)
			if done != total {
				t.Errorf("progress ended at %d of %d", done, total)
			}
			wantSame(l, o)
			if st := o.status(); st.Writer != l.w || st.Record.Generation != 9 {
				t.Errorf("the copy has writer %+v and keeps %+v", st.Writer, st.Record)
			}
			o.close()
			cut := to.CrashClone(disk.CrashOptions{Keep: disk.KeepNone})
			o = &lab{TB: t, ctx: t.Context(), fsys: cut, boot: "2f1c7d8e-0000-4000-8000-000000000002", dir: o.dir}
			o.open(l.w)
			wantSame(l, o)
			grow(l, rand.New(rand.NewPCG(seed, 1)), 40)
			grow(o, rand.New(rand.NewPCG(seed, 1)), 40)
			l.must(errors.Join(l.c.Purge(l.ctx, l.w, nil), o.c.Purge(o.ctx, o.w, nil)), "purge")
			wantSame(l, o)
			l.close()
			o.close()
			o.wantTidy()
		})
	}
}

// TestReceiveCrash: a copy that a machine stopped in, at any change of the disk, is no replica or a whole one; what is half made is cleared by the next attempt, and by Delete.
func TestReceiveCrash(t *testing.T) {
	l := newLab(t, disk.MemOptions{})
	three(l)
	l.must(l.mark(layerTwo), "mark")
	c := receiveConfig(l)
	to := disk.NewMem(disk.MemOptions{})
	list, err := crashes(to, 1, func() error {
		in, err := local.Receive(l.ctx, to, c)
		if err == nil {
			_, err = in.Place()
		}
		return err
	})
	l.must(err, "receive")
	whole := 0
	for i, e := range list {
		n := &lab{TB: failing{t, e.String()}, ctx: l.ctx, fsys: e.fsys, boot: boot}
		if e.power {
			n.boot = "2f1c7d8e-0000-4000-8000-000000000002"
		}
		found, err := local.List(e.fsys)
		n.must(err, "list")
		if len(found) > 1 || len(found) == 0 && e.done || len(found) == 1 && (found[0].Err != nil || found[0].RecordLost || found[0].ReplicaID != copyID) {
			n.Fatalf("found %+v", found)
		}
		if len(found) == 1 && i%4 != 0 {
			whole++
			n.dir = found[0].Dir
			n.open(l.w)
			wantThree(n, n.c)
			n.wantSnapshot(layerOne, 0, 8, 1)
			n.wantSnapshot(layerThree, 8, 8, 3)
			n.close()
			n.wantTidy()
			continue
		}
		if len(found) == 1 || i%2 == 0 {
			n.must(local.Delete(e.fsys, copyID), "delete")
			names, err := e.fsys.List(local.Root)
			if err != nil && !errors.Is(err, fs.ErrNotExist) || len(names) > 0 {
				n.Fatalf("left behind: %v, %v", names, err)
			}
		}
		if i%8 != 0 {
			continue
		}
		again := received(l, e.fsys, c)
		wantSame(l, again)
		again.close()
	}
	l.close()
	t.Logf("%d crash points, %d with a whole copy", len(list), whole)
}

// wantNothing checks that a failed copy left nothing.
func wantNothing(t *testing.T, fsys *disk.Mem) {
	t.Helper()
	if names, err := fsys.List(local.Root); err != nil && !errors.Is(err, fs.ErrNotExist) || len(names) > 0 {
		t.Errorf("left behind: %v, %v", names, err)
	}
}

// bent is a layer on its way, with something done to it.
type bent struct {
	block.Device
	read    func(p []byte, off int64) error // after the read
	extents func([]block.Extent) []block.Extent
}

func (b bent) ReadAt(p []byte, off int64) (int, error) {
	n, err := b.Device.ReadAt(p, off)
	if err == nil && b.read != nil {
		err = b.read(p, off)
	}
	return n, err
}

func (b bent) Extents(off, n int64) ([]block.Extent, error) {
	list, err := b.Device.Extents(off, n)
	if b.extents != nil {
		list = b.extents(list)
	}
	return list, err
}

// TestReceiveRefuses: what cannot be right, or does not come as it was sent, becomes no copy and leaves nothing.
func TestReceiveRefuses(t *testing.T) {
	bend := func(l *lab, b bent) func(context.Context, replica.LayerID) (block.Device, json.RawMessage, error) {
		return func(ctx context.Context, id replica.LayerID) (block.Device, json.RawMessage, error) {
			dev, h, err := l.c.OpenLayer(ctx, id)
			b.Device = dev
			return b, h, err
		}
	}
	errGone := errors.New("gone")
	for name, s := range map[string]struct {
		do   func(l *lab, c *local.ReceiveConfig)
		want error
		to   disk.MemOptions
	}{
		"an image here and none there": {func(_ *lab, c *local.ReceiveConfig) { c.Base = &local.Base{ID: newID("x"), Path: baseFile} }, local.ErrInvalid, disk.MemOptions{}},
		"a source that failed":         {func(_ *lab, c *local.ReceiveConfig) { c.Source.Failed = "fsync" }, layer.ErrSalvage, disk.MemOptions{}},
		"a record of another volume":   {func(_ *lab, c *local.ReceiveConfig) { c.Record.VolumeID = "other" }, replica.ErrChain, disk.MemOptions{}},
		"a tree without a layer": {func(_ *lab, c *local.ReceiveConfig) {
			c.Source.Layers = slices.DeleteFunc(c.Source.Layers, func(i replica.LayerInfo) bool { return i.ID == layerTwo })
		}, local.ErrInvalid, disk.MemOptions{}},
		"another chain": {func(_ *lab, c *local.ReceiveConfig) { c.Source.Chain.SizeBytes *= 2 }, replica.ErrChain, disk.MemOptions{}},
		"another layer": {func(l *lab, c *local.ReceiveConfig) {
			c.Open = func(ctx context.Context, _ replica.LayerID) (block.Device, json.RawMessage, error) {
				return l.c.OpenLayer(ctx, layerTwo)
			}
		}, block.ErrCorrupt, disk.MemOptions{}},
		"a full disk": {func(*lab, *local.ReceiveConfig) {}, disk.ErrNoSpace, disk.MemOptions{CapacityBytes: 9 << 20}},
		"the source dies": {func(l *lab, c *local.ReceiveConfig) {
			c.Open = bend(l, bent{read: func([]byte, int64) error { return errGone }})
		}, errGone, disk.MemOptions{}},
		"a bit turns on the way": {func(l *lab, c *local.ReceiveConfig) {
			c.Open = bend(l, bent{read: func(p []byte, off int64) error {
				if off < crashSize {
					p[len(p)-1] ^= 4
				}
				return nil
			}})
		}, block.ErrCorrupt, disk.MemOptions{}},
		"data is kept back": {func(l *lab, c *local.ReceiveConfig) {
			c.Open = bend(l, bent{extents: func(list []block.Extent) []block.Extent {
				for i := range list {
					list[i].State = block.Absent
				}
				return list
			}})
		}, block.ErrCorrupt, disk.MemOptions{}},
		"extents of no sense": {func(l *lab, c *local.ReceiveConfig) {
			c.Open = bend(l, bent{extents: func(list []block.Extent) []block.Extent { list[0].N++; return list }})
		}, block.ErrCorrupt, disk.MemOptions{}},
		"rot in the source": {func(l *lab, _ *local.ReceiveConfig) {
			name := path.Join(l.dir, string(layerOne)+".layer")
			_, sb, err := layer.Inspect(l.fsys, name)
			l.must(err, "inspect")
			f, err := l.fsys.Open(name)
			l.must(err, "open")
			_, err = f.WriteAt([]byte{0xee}, sb.Data.Off+3*block.UnitBytes)
			l.must(errors.Join(err, f.Close()), "rot")
		}, block.ErrCorrupt, disk.MemOptions{}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, disk.MemOptions{})
			three(l)
			to := disk.NewMem(s.to)
			c := receiveConfig(l)
			s.do(l, &c)
			if _, err := local.Receive(l.ctx, to, c); !errors.Is(err, s.want) {
				t.Errorf("%v, want %v", err, s.want)
			}
			wantNothing(t, to)
			if name != "rot in the source" {
				wantThree(l, l.c)
			}
			l.close()
		})
	}
}

// TestReceiveImages: the image on the disk must be the one that the source stands on.
func TestReceiveImages(t *testing.T) {
	l := &lab{TB: t, ctx: t.Context(), fsys: disk.NewMem(disk.MemOptions{}), boot: boot}
	makeImage(l, baseFile, newID("image"), 5, 16)
	c := createConfig()
	c.Base = &local.Base{ID: newID("image"), Path: baseFile, Name: "debian"}
	var err error
	l.dir, err = local.Create(l.fsys, c)
	l.must(err, "create")
	l.open(replica.Writer{Epoch: 1, Session: 1})
	defer l.close()
	rc := receiveConfig(l)
	to := disk.NewMem(disk.MemOptions{})
	if _, err := local.Receive(l.ctx, to, rc); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no image: %v", err)
	}
	makeImage(&lab{TB: t, ctx: l.ctx, fsys: to}, baseFile, newID("other"), 5, 16)
	if _, err := local.Receive(l.ctx, to, rc); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("another image: %v", err)
	}
	rc.Base = nil
	if _, err := local.Receive(l.ctx, to, rc); !errors.Is(err, local.ErrInvalid) {
		t.Errorf("without the image: %v", err)
	}
	wantNothing(t, to)
}

// TestReceiveGivenUp: who gives up does not wait for a read that is stuck, and nothing is left.
func TestReceiveGivenUp(t *testing.T) {
	l := newLab(t, disk.MemOptions{})
	three(l)
	defer l.close()
	ctx, cancel := context.WithCancel(l.ctx)
	closed := make(chan struct{})
	c := receiveConfig(l)
	c.Open = func(ctx context.Context, id replica.LayerID) (block.Device, json.RawMessage, error) {
		dev, h, err := l.c.OpenLayer(ctx, id)
		return stuck{dev, cancel, closed}, h, err
	}
	to := disk.NewMem(disk.MemOptions{})
	if _, err := local.Receive(ctx, to, c); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	wantNothing(t, to)
	for _, i := range l.status().Layers {
		if i.Pinned {
			t.Errorf("layer %s is still pinned", i.ID)
		}
	}
}

// stuck is a layer whose reads never answer, until it is closed.
type stuck struct {
	block.Device
	begun  func()
	closed chan struct{}
}

func (s stuck) ReadAt([]byte, int64) (int, error) {
	s.begun()
	<-s.closed
	return 0, block.ErrClosed
}

func (s stuck) Close() error {
	close(s.closed)
	return s.Device.Close()
}

// TestOpenLayer: a layer by itself has what it has and no more; it is pinned while it is open, a head is gone once it is sealed, and closing the replica closes it.
func TestOpenLayer(t *testing.T) {
	l := newLab(t, disk.MemOptions{})
	three(l)
	l.must(l.c.Zero(20*block.UnitBytes, 4*block.UnitBytes), "zero") // of nothing: no state
	l.must(l.c.Zero(0, 2*block.UnitBytes), "zero")
	two, h, err := l.r.OpenLayer(layerTwo)
	l.must(err, "open layer")
	want := []block.Extent{{N: 4 * block.UnitBytes, State: block.Absent}, {Off: 4 * block.UnitBytes, N: 8 * block.UnitBytes, State: block.Data}, {Off: 12 * block.UnitBytes, N: crashSize - 12*block.UnitBytes, State: block.Absent}}
	if got, err := two.Extents(0, crashSize); err != nil || !slices.Equal(got, want) {
		t.Errorf("extents are %v (%v)", got, err)
	}
	l.want(two, 0, 4, 0)
	l.want(two, 4, 8, 2)
	if h.SumsBytes != block.UnitBytes || two.Size() != crashSize+h.SumsBytes || h.Head || h.Parent != layerOne || h.Meta.Snapshot.Name != "two" {
		t.Errorf("header %+v, device of %d bytes", h, two.Size())
	}
	if _, err := two.WriteAt(make([]byte, block.UnitBytes), 0); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("write: %v", err)
	}
	head, h, err := l.r.OpenLayer(layerHead)
	l.must(err, "open head")
	want = []block.Extent{{N: 2 * block.UnitBytes, State: block.Zero}, {Off: 2 * block.UnitBytes, N: 10 * block.UnitBytes, State: block.Absent}, {Off: 12 * block.UnitBytes, N: 8 * block.UnitBytes, State: block.Data},
		{Off: 20 * block.UnitBytes, N: crashSize - 20*block.UnitBytes, State: block.Absent}}
	if got, err := head.Extents(0, head.Size()); err != nil || !slices.Equal(got, want) {
		t.Errorf("extents of the head are %v (%v)", got, err)
	}
	l.want(head, 2, 10, 0)
	l.want(head, 12, 8, 4)
	if !h.Head || h.SumsBytes != 0 || h.Meta.State != layer.StateHead {
		t.Errorf("header of the head %+v", h)
	}
	if n := slices.IndexFunc(l.status().Layers, func(i replica.LayerInfo) bool { return i.ID == layerTwo }); !l.status().Layers[n].Pinned {
		t.Error("not pinned")
	}
	l.snapshotNow("four")
	if _, err := head.Extents(0, crashSize); !errors.Is(err, layer.ErrState) {
		t.Errorf("the head was sealed: %v", err)
	}
	if _, _, err := l.r.OpenLayer(newID("none")); !errors.Is(err, replica.ErrNoSnapshot) {
		t.Errorf("no layer: %v", err)
	}
	l.must(head.Close(), "close head")
	l.close()
	if _, err := two.ReadAt(make([]byte, 512), 0); !errors.Is(err, block.ErrClosed) {
		t.Errorf("after the replica was closed: %v", err)
	}
}

// TestReceivePaced: every byte of data is asked for, and an answer of no ends the copy.
func TestReceivePaced(t *testing.T) {
	l := newLab(t, disk.MemOptions{})
	three(l)
	defer l.close()
	var asked atomic.Int64
	c := receiveConfig(l)
	c.Pace = func(_ context.Context, n int64) error { asked.Add(n); return nil }
	in, err := local.Receive(l.ctx, disk.NewMem(disk.MemOptions{}), c)
	l.must(err, "receive")
	l.must(in.Discard(), "discard")
	if want := int64(4 * 8 * block.UnitBytes); asked.Load() != want {
		t.Errorf("asked for %d bytes, want %d", asked.Load(), want)
	}
	c.Pace = func(context.Context, int64) error { return disk.ErrNoSpace }
	to := disk.NewMem(disk.MemOptions{})
	if _, err := local.Receive(l.ctx, to, c); !errors.Is(err, disk.ErrNoSpace) {
		t.Errorf("no room: %v", err)
	}
	wantNothing(t, to)
}
