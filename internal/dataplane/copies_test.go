package dataplane

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/disk"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
	"ashlar/internal/volume"
	"ashlar/internal/volume/ledgertest"
)

const (
	moveUnits = 64
	moveBoot  = "2f1c7d8e-0000-4000-8000-000000000001"
	awayBoot  = "2f1c7d8e-0000-4000-8000-00000000000a"
)

// mover is a volume with one replica on a node "away", a catalogue, and a disk "here" that the replica is to move to; all in memory, and what the volume must read as.
type mover struct {
	testing.TB
	ctx        context.Context
	away, here *disk.Mem
	cat        *ledgertest.Mem
	bootHere   string
	bootAway   string
	content    map[string][]byte // by snapshot; "" is the present
	ids        int
	on         func(o origin) origin // bends the original
}

var (
	moveFrom, moveTo, moveVolume = id("repl", 1), id("repl", 2), id("volu", 1)
)

func newMover(t testing.TB) *mover {
	t.Helper()
	m := &mover{TB: t, ctx: context.Background(), away: disk.NewMem(disk.MemOptions{}), here: disk.NewMem(disk.MemOptions{}), cat: ledgertest.NewMem(), bootHere: moveBoot, bootAway: awayBoot,
		content: map[string][]byte{"": make([]byte, moveUnits*block.UnitBytes)}}
	_, err := local.Create(m.away, local.CreateConfig{ReplicaID: moveFrom, VolumeID: moveVolume, Volume: "db1", HeadID: replica.LayerID(moveFrom), SizeBytes: moveUnits * block.UnitBytes, BootID: m.bootAway})
	m.must(err, "create")
	rec := volume.NewRecord(moveVolume, []replica.Member{{ReplicaID: moveFrom, Node: "away"}}, replica.Chain{SizeBytes: moveUnits * block.UnitBytes, Layers: []replica.LayerID{replica.LayerID(moveFrom)}}, time.Unix(1e9, 0))
	_, err = m.cat.Swap(m.ctx, rec, 0)
	m.must(err, "first record")
	return m
}

func (m *mover) must(err error, what string) {
	m.Helper()
	if err != nil {
		m.Fatalf("%s: %v", what, err)
	}
}

// after is the mover that goes on with what is left.
func (m *mover) after(t testing.TB, away, here *disk.Mem, cat *ledgertest.Mem) *mover {
	n := *m
	n.TB, n.away, n.here, n.cat, n.on, n.content = t, away, here, cat.Clone(), nil, map[string][]byte{}
	for name, b := range m.content {
		n.content[name] = bytes.Clone(b)
	}
	return &n
}

// record is what the catalogue holds.
func (m *mover) record() replica.Record {
	m.Helper()
	rec, _, err := m.cat.Read(m.ctx, moveVolume)
	m.must(err, "read record")
	return rec
}

// open opens the volume at the replica that the record names, as somebody who attaches it would.
func (m *mover) open() (*volume.Volume, func()) {
	m.Helper()
	id := m.record().Members[0].ReplicaID
	fsys, boot := m.away, m.bootAway
	if id == moveTo {
		fsys, boot = m.here, m.bootHere
	}
	v, end, err := m.tryOpen(fsys, id, boot)
	m.must(err, "open the volume at "+id)
	return v, end
}

func (m *mover) tryOpen(fsys *disk.Mem, id, boot string) (*volume.Volume, func(), error) {
	m.Helper()
	dir, err := local.Find(fsys, id)
	if err != nil {
		return nil, nil, err
	}
	rep, err := local.Open(fsys, dir, local.OpenConfig{BootID: boot})
	if err != nil {
		return nil, nil, err
	}
	v, err := volume.Open(m.ctx, volume.Config{VolumeID: moveVolume, Name: "db1", Node: "node", BootID: boot, Ledger: m.cat, GuestsGone: true, Replicas: []volume.Member{{ID: id, Replica: rep.Connect()}}})
	if err != nil {
		return nil, nil, errors.Join(err, rep.Close())
	}
	return v, func() {
		m.Helper()
		m.must(errors.Join(v.Close(m.ctx), rep.Close()), "close the volume")
	}, nil
}

// fill writes to the volume and to the model.
func (m *mover) fill(v *volume.Volume, b byte, unit, n int64) {
	m.Helper()
	p := bytes.Repeat([]byte{b}, int(n*block.UnitBytes))
	_, err := v.Device().WriteAt(p, unit*block.UnitBytes)
	m.must(err, "write")
	copy(m.content[""][unit*block.UnitBytes:], p)
}

func (m *mover) snapshot(v *volume.Volume, name string) {
	m.Helper()
	m.must(v.Snapshot(m.ctx, m.id(), replica.SnapshotMeta{Name: name, UserCreated: true}), "snapshot")
	m.content[name] = bytes.Clone(m.content[""])
}

func (m *mover) id() replica.LayerID {
	m.ids++
	return replica.LayerID(id("laye", m.ids))
}

// build makes three snapshots, one of them beside the path of the head, and a head with data and discards.
func (m *mover) build() {
	m.Helper()
	v, end := m.open()
	m.fill(v, 1, 0, 8)
	m.snapshot(v, "one")
	m.fill(v, 2, 4, 8)
	m.snapshot(v, "two")
	m.must(v.Revert(m.ctx, m.id(), "one"), "revert")
	m.content[""] = bytes.Clone(m.content["one"])
	m.fill(v, 3, 20, 4)
	m.snapshot(v, "three")
	m.fill(v, 4, 22, 8)
	m.must(v.Device().Zero(0, 2*block.UnitBytes), "zero")
	clear(m.content[""][:2*block.UnitBytes])
	end()
}

// check opens the volume and compares everything with the model.
func (m *mover) check() {
	m.Helper()
	v, end := m.open()
	defer end()
	for name, want := range m.content {
		dev := block.Device(v.Device())
		if name != "" {
			var err error
			dev, err = v.OpenSnapshot(m.ctx, name)
			m.must(err, "open snapshot "+name)
		}
		got := make([]byte, dev.Size())
		_, err := dev.ReadAt(got, 0)
		m.must(err, "read "+name)
		if !bytes.Equal(got, want) {
			m.Fatalf("%q does not read as it was written", name)
		}
		if name != "" {
			m.must(dev.Close(), "close snapshot")
		}
	}
	layers, err := v.Layers(m.ctx)
	m.must(err, "layers")
	for _, l := range layers {
		if _, known := m.content[snapshotName(l)]; !known && !l.Snapshot.Removed && l.Snapshot.UserCreated {
			m.Fatalf("there is a snapshot %s", l.Snapshot.Name)
		}
	}
}

func snapshotName(l replica.LayerInfo) string {
	if l.Snapshot == nil {
		return ""
	}
	return l.Snapshot.Name
}

// awayOrigin is the original on the other node.
type awayOrigin struct {
	*local.Conn
	rep *local.Replica
}

func (o awayOrigin) Close() error { return errors.Join(o.Conn.Close(), o.rep.Close()) }

// move is what CopyReplica runs; one piece after the other.
func (m *mover) move() *move {
	m.Helper()
	d, err := openDisk(m.here, client.Disk{Path: "/here", ClusterID: testCluster}, time.Unix(1e9, 0))
	m.must(err, "disk")
	m.Cleanup(func() { d.close() }) //nolint:errcheck // its Mem may be gone
	return &move{args: client.CopyReplica{VolumeID: moveVolume, Volume: "db1", Node: "here", DiskID: d.DiskID, ReplicaID: moveTo, From: moveFrom, FromNode: "away"}, boot: m.bootHere, ledger: m.cat,
		disk: d, met: new(metWriters), look: time.Hour, parallel: 1, now: time.Now, reach: func(context.Context, client.CopyReplica) (origin, error) {
			dir, err := local.Find(m.away, moveFrom)
			if err != nil {
				return nil, err
			}
			rep, err := local.Open(m.away, dir, local.OpenConfig{BootID: m.bootAway})
			if err != nil {
				return nil, err
			}
			var o origin = awayOrigin{rep.Connect(), rep}
			if m.on != nil {
				o = m.on(o)
			}
			return o, nil
		}}
}

// run moves the replica, as often as somebody asks for it, and gives the disk up.
func (m *mover) run(ctx context.Context) error {
	m.Helper()
	mv := m.move()
	err := mv.run(ctx)
	return errors.Join(err, mv.disk.close())
}

// wantMoved checks that the record names the copy alone, that the copy is whole, and that the original opens the volume no more.
func (m *mover) wantMoved() {
	m.Helper()
	rec := m.record()
	if len(rec.Members) != 1 || rec.Members[0].ReplicaID != moveTo || !rec.Members[0].InSync || rec.Members[0].Node != "here" || rec.WriterNode != "" {
		m.Fatalf("the record is %+v", rec)
	}
	if _, end, err := m.tryOpen(m.away, moveFrom, m.bootAway); err == nil {
		end()
		m.Fatalf("the original opens the volume")
	}
	m.check()
	list, err := local.List(m.here)
	m.must(err, "list")
	if len(list) != 1 || list[0].Err != nil || len(list[0].Unknown) > 0 {
		m.Fatalf("on the disk: %+v", list)
	}
}

// TestMove: any volume reads the same at its new place, lives on there (purge too), and the original cannot be written to any more, also with an old catalogue.
func TestMove(t *testing.T) {
	for n := range 12 / sparse(6) {
		seed := uint64(7000 + n)
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			m := newMover(t)
			r := rand.New(rand.NewPCG(seed, 0))
			grow := func(steps int) {
				v, end := m.open()
				defer end()
				for range steps {
					m.grow(v, r)
				}
			}
			grow(40)
			old := m.cat.Clone()
			m.must(m.run(m.ctx), "move")
			m.wantMoved()
			m.must(m.run(m.ctx), "move again")
			grow(30)
			v, end := m.open()
			m.must(v.Purge(m.ctx, nil), "purge")
			end()
			m.check()
			restored := m.after(t, m.away, m.here, old)
			if _, _, err := restored.tryOpen(m.away, moveFrom, m.bootAway); !errors.Is(err, volume.ErrStaleCatalogue) {
				t.Errorf("the original, with a catalogue from before: %v", err)
			}
		})
	}
}

// grow does something random to the volume.
func (m *mover) grow(v *volume.Volume, r *rand.Rand) {
	m.Helper()
	units := v.Device().Size() / block.UnitBytes
	at := r.Int64N(units)
	n := min(1+r.Int64N(12), units-at)
	var names []string
	for name := range m.content {
		if name != "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	switch k := r.IntN(16); {
	case k < 7:
		m.fill(v, byte(1+r.IntN(255)), at, n)
	case k < 9:
		m.must(v.Device().Zero(at*block.UnitBytes, n*block.UnitBytes), "zero")
		clear(m.content[""][at*block.UnitBytes : (at+n)*block.UnitBytes])
	case k < 12:
		m.snapshot(v, fmt.Sprintf("s%d", m.ids))
	case k < 13:
		m.must(v.Expand(m.ctx, m.id(), (units+16)*block.UnitBytes), "expand")
		m.content[""] = append(m.content[""], make([]byte, 16*block.UnitBytes)...)
	case len(names) == 0:
	case k < 14:
		name := names[r.IntN(len(names))]
		size := len(m.content[""])
		m.must(v.Revert(m.ctx, m.id(), name), "revert")
		m.content[""] = append(bytes.Clone(m.content[name]), make([]byte, size-len(m.content[name]))...)
	default:
		name := names[r.IntN(len(names))]
		m.must(v.RemoveSnapshot(m.ctx, name), "remove")
		delete(m.content, name)
		if k == 15 {
			m.must(v.Purge(m.ctx, nil), "purge")
		}
	}
}

// leftover is what a stop at one instant left.
type leftover struct {
	away, here *disk.Mem
	cat        *ledgertest.Mem
	bootHere   string
	bootAway   string
	how        string
}

// built is a mover after build, to be cloned: making it takes longer than moving it.
func built(t testing.TB) *mover {
	m := newMover(t)
	m.build()
	return m
}

// clone is the same volume for another attempt.
func (m *mover) clone(t testing.TB) *mover {
	return m.after(t, m.away.Clone(), m.here.Clone(), m.cat)
}

// sparse is how many steps a quick run takes at a time, where a thorough one (ASHLAR_STEPS above 1) takes every one.
func sparse(n int) int {
	if s := os.Getenv("ASHLAR_STEPS"); s != "" && s != "1" {
		return 1
	}
	return n
}

// stops lists what is left if the node here, or the one away, stops before op.
func (m *mover) stops(op disk.Op, side string) []leftover {
	at := fmt.Sprintf("before %v on the disk %s", op, side)
	cat := m.cat.Clone()
	list := []leftover{{m.away.Clone(), m.here.Clone(), cat, m.bootHere, m.bootAway, "kill -9 " + at}}
	rebooted := "2f1c7d8e-0000-4000-8000-0000000000ff"
	random := func() disk.CrashOptions { return disk.CrashOptions{Rand: rand.New(rand.NewPCG(op.Seq, 1))} }
	if side == "here" {
		return append(list, leftover{m.away.Clone(), m.here.CrashClone(disk.CrashOptions{Keep: disk.KeepNone}), cat, rebooted, m.bootAway, "power cut " + at},
			leftover{m.away.Clone(), m.here.CrashClone(random()), cat, rebooted, m.bootAway, "power cut that keeps something " + at})
	}
	return append(list, leftover{m.away.CrashClone(random()), m.here.Clone(), cat, m.bootHere, rebooted, "power cut " + at})
}

// TestMoveCrash: a machine stops before any change of either disk. Whatever is left, the record names a replica that is there and reads as it was written; if it is the
// original it can be written to, and the next attempt moves all of it.
func TestMoveCrash(t *testing.T) {
	m := newMover(t)
	m.build()
	var mu sync.Mutex
	var list []leftover
	ops := 0
	hook := func(side string) func(disk.Op) {
		return func(op disk.Op) {
			mu.Lock()
			defer mu.Unlock()
			if rec := m.record(); ops%sparse(47) == 0 || rec.Members[0].ReplicaID == moveTo {
				list = append(list, m.stops(op, side)...)
			}
			ops++
		}
	}
	m.away.OnOp(hook("away"))
	m.here.OnOp(hook("here"))
	m.must(m.run(m.ctx), "move")
	m.away.OnOp(nil)
	m.here.OnOp(nil)
	m.wantMoved()
	moved := 0
	for i, l := range list {
		n := m.after(labelled{t, l.how}, l.away, l.here, l.cat)
		n.bootHere, n.bootAway = l.bootHere, l.bootAway
		if i%3 == 0 {
			n.check()
		}
		if n.record().Members[0].ReplicaID == moveFrom {
			if i%3 == 1 {
				v, end := n.open()
				n.fill(v, 9, 30, 4)
				end()
			}
		} else {
			moved++
		}
		n.must(n.run(n.ctx), "move again")
		n.wantMoved()
	}
	t.Logf("%d stops, %d of them after the swap", len(list), moved)
	if moved == 0 {
		t.Error("none after the swap")
	}
}

// labelled says with every failure what was done before.
type labelled struct {
	testing.TB
	how string
}

// Fatalf implements testing.TB.
func (l labelled) Fatalf(format string, args ...any) {
	l.Helper()
	l.TB.Fatalf(l.how+": "+format, args...)
}

// TestMoveLedger: the catalogue loses any question or answer, or says no; nothing is lost, and the next attempt moves the replica.
func TestMoveLedger(t *testing.T) {
	base := built(t)
	calls := func() int {
		m := base.clone(t)
		before := m.cat.Calls()
		m.must(m.run(m.ctx), "move")
		return m.cat.Calls() - before
	}()
	for _, fault := range []ledgertest.Fault{ledgertest.LostBefore, ledgertest.LostAfter, ledgertest.Conflict} {
		for n := 1; n <= calls; n++ {
			for _, length := range []int{1, 100} { // from there on once, or for good
				how := fmt.Sprintf("fault %d at call %d, %d times", fault, n, length)
				if (length > 1 || fault == ledgertest.LostBefore) && n%sparse(2) != calls%sparse(2) { // always at the last, the swap
					continue
				}
				m := base.clone(labelled{t, how})
				begin := m.cat.Calls()
				m.cat.OnCall(func(c ledgertest.Call) ledgertest.Fault {
					if at := c.N - begin; at >= n && at < n+length {
						return fault
					}
					return ledgertest.OK
				})
				err := m.run(m.ctx)
				m.cat.OnCall(nil)
				if rec := m.record(); err == nil && rec.Members[0].ReplicaID != moveTo {
					t.Fatalf("%s: it went well, and the record names %s", how, rec.Members[0].ReplicaID)
				}
				m.check()
				m.must(m.run(m.ctx), "move again after "+fmt.Sprint(err))
				m.wantMoved()
			}
		}
	}
	t.Logf("%d calls", calls)
}

// TestMoveFenced: somebody opens the volume in the middle: the copy fails and leaves nothing, what was written then is there, and the next attempt moves it.
func TestMoveFenced(t *testing.T) {
	base := built(t)
	for step := 0; step < 12; step += sparse(4) {
		m := base.clone(labelled{t, fmt.Sprintf("step %d", step)})
		var once sync.Once
		var shared *local.Replica
		m.on = func(o origin) origin { shared = o.(awayOrigin).rep; return o }
		ops := 0
		meddle := func() {
			v, err := volume.Open(m.ctx, volume.Config{VolumeID: moveVolume, Name: "db1", Node: "away", BootID: m.bootAway, Ledger: m.cat, GuestsGone: true, Replicas: []volume.Member{{ID: moveFrom, Replica: shared.Connect()}}})
			m.must(err, "open in between")
			m.fill(v, 7, 40, 5)
			m.must(v.Close(m.ctx), "close in between")
		}
		m.here.OnOp(func(op disk.Op) {
			if strings.HasPrefix(op.Name, local.Root+"/") {
				if ops++; ops == 1+3*step {
					once.Do(meddle)
				}
			}
		})
		err := m.run(m.ctx)
		m.here.OnOp(nil)
		if !errors.Is(err, block.ErrFenced) && !errors.Is(err, layer.ErrState) {
			t.Errorf("step %d: opened in between: %v", step, err)
		}
		if list, err := local.List(m.here); err != nil || len(list) > 0 {
			t.Errorf("step %d: left behind: %v %v", step, list, err)
		}
		m.check()
		m.must(m.run(m.ctx), "move again")
		m.wantMoved()
	}
}

// TestMoveWatch: a copy notices by itself that somebody opened the volume, also while nothing comes.
func TestMoveWatch(t *testing.T) {
	m := newMover(t)
	m.build()
	mv := m.move()
	mv.look = time.Millisecond
	m.on = func(o origin) origin { return opener{o.(awayOrigin), m} }
	if err := mv.run(m.ctx); !errors.Is(err, block.ErrFenced) {
		t.Errorf("opened while a read is stuck: %v", err)
	}
	m.must(mv.disk.close(), "disk")
	m.on = nil
	m.check()
}

// opener is an original whose layers never answer, and that somebody opens when they are asked for.
type opener struct {
	awayOrigin
	m *mover
}

func (o opener) OpenLayer(ctx context.Context, id replica.LayerID) (block.Device, json.RawMessage, error) {
	dev, info, err := o.awayOrigin.OpenLayer(ctx, id)
	if err == nil {
		err = o.rep.Connect().Fence(ctx, replica.Writer{Epoch: 1000, Session: 1})
		rec, rev, readErr := o.m.cat.Read(ctx, moveVolume)
		rec.Epoch, rec.Generation = 1001, rec.Generation+1
		_, swapErr := o.m.cat.Swap(ctx, rec, rev)
		err = errors.Join(err, readErr, swapErr)
	}
	return mute{dev, make(chan struct{})}, info, err
}

// mute is a Device that does not answer until it is closed.
type mute struct {
	block.Device
	closed chan struct{}
}

func (d mute) Extents(int64, int64) ([]block.Extent, error) {
	<-d.closed
	return nil, block.ErrClosed
}

func (d mute) Close() error {
	close(d.closed)
	return d.Device.Close()
}

// TestMoveGivenUp: given up at any step, it either has happened or left nothing but what the next attempt clears.
func TestMoveGivenUp(t *testing.T) {
	done := false
	base := built(t)
	for step := 1; !done; step += sparse(19) {
		m := base.clone(labelled{t, fmt.Sprintf("step %d", step)})
		ctx, cancel := context.WithCancel(m.ctx)
		ops := 0
		m.here.OnOp(func(disk.Op) {
			if ops++; ops == step {
				cancel()
			}
		})
		err := m.run(ctx)
		m.here.OnOp(nil)
		done = ops < step
		cancel()
		if moved := m.record().Members[0].ReplicaID == moveTo; err != nil == moved {
			t.Errorf("step %d: moved %t, %v", step, moved, err)
		}
		if names, e := m.here.List(local.Root); e != nil && !errors.Is(e, fs.ErrNotExist) || err != nil && len(names) > 0 {
			t.Errorf("step %d: left behind %v (%v)", step, names, e)
		}
		m.check()
		m.must(m.run(m.ctx), "move again")
		m.wantMoved()
	}
}

// TestMoveRefuses: what cannot be moved stays where it is, and nothing is left of the attempt.
func TestMoveRefuses(t *testing.T) {
	for what, s := range map[string]struct {
		do   func(m *mover, mv *move)
		want error
	}{
		"another image":    {func(_ *mover, mv *move) { mv.args.ImageID = id("imag", 9) }, local.ErrInvalid},
		"no such original": {func(_ *mover, mv *move) { mv.args.From = id("repl", 8) }, volume.ErrInvalid},
		"rot in a snapshot": {func(m *mover, _ *move) {
			dir, err := local.Find(m.away, moveFrom)
			m.must(err, "find")
			name := path.Join(dir, moveFrom+".layer")
			rep, err := local.Open(m.away, dir, local.OpenConfig{BootID: m.bootAway})
			m.must(err, "open")
			eventually(m.TB.(*testing.T), "it has checksums", func() bool {
				st, err := rep.Status()
				m.must(err, "status")
				return !slices.ContainsFunc(st.Layers, func(l replica.LayerInfo) bool { return !l.Head && !l.Verified })
			})
			m.must(rep.Close(), "close")
			_, sb, err := layer.Inspect(m.away, name)
			m.must(err, "inspect")
			f, err := m.away.Open(name)
			m.must(err, "open")
			_, err = f.WriteAt([]byte{99}, sb.Data.Off+5)
			m.must(errors.Join(err, f.Close()), "rot")
		}, block.ErrCorrupt},
		"the original's node is gone": {func(_ *mover, mv *move) {
			mv.reach = func(context.Context, client.CopyReplica) (origin, error) { return nil, client.ErrUnreachable }
		}, client.ErrUnreachable},
		"a copy that was a member once, which the catalogue does not know": {func(m *mover, mv *move) {
			old := m.cat.Clone()
			m.must(mv.run(m.ctx), "move")
			v, end := m.open()
			m.fill(v, 6, 1, 1)
			end()
			m.cat.Restore(old)
			m.away = disk.NewMem(disk.MemOptions{}) // and an original that does not know either
			_, err := local.Create(m.away, local.CreateConfig{ReplicaID: moveFrom, VolumeID: moveVolume, Volume: "db1", HeadID: replica.LayerID(moveFrom), SizeBytes: moveUnits * block.UnitBytes, BootID: m.bootAway})
			m.must(err, "create")
			first := volume.NewRecord(moveVolume, []replica.Member{{ReplicaID: moveFrom, Node: "away"}}, replica.Chain{SizeBytes: moveUnits * block.UnitBytes, Layers: []replica.LayerID{replica.LayerID(moveFrom)}}, time.Unix(1e9, 0))
			_, rev, err := m.cat.Read(m.ctx, moveVolume)
			m.must(err, "read")
			_, err = m.cat.Swap(m.ctx, first, rev)
			m.must(err, "an old record")
		}, volume.ErrStaleCatalogue},
	} {
		t.Run(what, func(t *testing.T) {
			m := newMover(t)
			m.build()
			mv := m.move()
			s.do(m, mv)
			err := mv.run(m.ctx)
			if !errors.Is(err, s.want) {
				t.Errorf("%v, want %v", err, s.want)
			}
			m.must(mv.disk.close(), "disk")
			names, e := m.here.List(local.Root)
			if kept := errors.Is(s.want, volume.ErrStaleCatalogue); e != nil && !errors.Is(e, fs.ErrNotExist) || len(names) > 0 != kept {
				t.Errorf("on the disk are %v (%v)", names, e)
			}
			if m.record().Members[0].ReplicaID != moveFrom {
				t.Error("the record was changed")
			}
		})
	}
}

// TestMoveFull: a disk that is too small is refused before a byte is moved, and one that fills up meanwhile ends the copy; nothing is left.
func TestMoveFull(t *testing.T) {
	m := newMover(t)
	m.build()
	m.here = disk.NewMem(disk.MemOptions{CapacityBytes: 9 << 20})
	if err := m.run(m.ctx); !errors.Is(err, block.ErrNoSpace) && !errors.Is(err, disk.ErrNoSpace) && !errors.Is(err, client.ErrNoSpace) {
		t.Errorf("a disk that fills up: %v", err)
	}
	if names, err := m.here.List(local.Root); err != nil && !errors.Is(err, fs.ErrNotExist) || len(names) > 0 {
		t.Errorf("left behind: %v, %v", names, err)
	}
	m.here = disk.NewMem(disk.MemOptions{CapacityBytes: 96 << 10})
	wrote := false
	mv := m.move()
	m.here.OnOp(func(op disk.Op) { wrote = wrote || strings.HasPrefix(op.Name, local.Root+"/") })
	if err := mv.run(m.ctx); !errors.Is(err, client.ErrNoSpace) || wrote {
		t.Errorf("a disk that is too small: %v, written to: %t", err, wrote)
	}
	m.must(mv.disk.close(), "disk")
	m.check()
	m.here = disk.NewMem(disk.MemOptions{})
	m.must(m.run(m.ctx), "move to a larger one")
	m.wantMoved()
}

// TestMoveMeetsWriter: the first attempt that finds a writer on another node leaves it alone; one that is asked for again although nothing changed ends it.
func TestMoveMeetsWriter(t *testing.T) {
	m := built(t)
	v, end := m.open()
	mv := m.move()
	if err := mv.run(m.ctx); !errors.Is(err, client.ErrInUse) {
		t.Errorf("somebody has it open: %v", err)
	}
	m.fill(v, 5, 50, 3)
	end()
	v, end = m.open() // a later one
	if err := mv.run(m.ctx); !errors.Is(err, client.ErrInUse) {
		t.Errorf("somebody else has it open: %v", err)
	}
	m.must(v.Suspend(m.ctx), "die")
	end()
	m.must(mv.run(m.ctx), "move from under a dead writer")
	m.must(mv.disk.close(), "disk")
	m.wantMoved()
}
