package volume_test

import (
	"bytes"
	"errors"
	"slices"
	"sync"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/block/blocktest"
	"ashlar/internal/disk"
	"ashlar/internal/replica"
	"ashlar/internal/volume"
	"ashlar/internal/volume/ledgertest"
)

const mib = 1 << 20

// exported closes the copy's directory together with the volume, as a data process does.
type exported struct {
	*block.Gate
	g    *rig
	once sync.Once
}

// Close implements block.Device.
func (e *exported) Close() error {
	err := block.ErrClosed
	e.once.Do(func() { err = errors.Join(e.g.v.Close(e.g.ctx), e.g.r.Close()) })
	return err
}

func TestVolumeDevice(t *testing.T) {
	rigs := map[block.Device]*rig{}
	export := func(g *rig) block.Device {
		e := &exported{Gate: g.v.Device(), g: g}
		rigs[e] = g
		return e
	}
	blocktest.Run(t, blocktest.Config{
		AlignBytes: 1,
		Steps:      300,
		HugeBytes:  8 << 40,
		New: func(t testing.TB, sizeBytes int64) block.Device {
			g := newRig(t, sizeBytes, disk.MemOptions{})
			g.open()
			return export(g)
		},
		Reopen: func(t testing.TB, d block.Device) block.Device {
			g := rigs[d]
			g.must(d.Close(), "close")
			g.open()
			return export(g)
		},
	})
}

func TestOpenClose(t *testing.T) {
	g := newRig(t, mib, disk.MemOptions{})
	first := g.record()
	for i := range uint64(3) {
		swaps := len(g.ledger.History())
		g.open()
		g.wantSettled()
		if n := len(g.ledger.History()) - swaps; n != 2 {
			t.Errorf("open swapped %d times, want 2: claim and open", n)
		}
		if rec := g.record(); rec.Epoch != first.Epoch+i+1 || rec.Members[0].Incarnation != g.boot() {
			t.Errorf("record %+v", rec)
		}
		g.fill(byte(i+1), 0, mib)
		if n := len(g.ledger.History()) - swaps; n != 2 {
			t.Error("a write touched the catalogue")
		}
		d := g.v.Device()
		g.close()
		rec := g.record()
		if rec.WriterNode != "" || rec.WriterBoot != "" || rec.Pending != nil {
			t.Errorf("after a close the record is %+v", rec)
		}
		_, err := d.ReadAt(make([]byte, 1), 0)
		g.want(err, block.ErrClosed, "read after close")
		g.must(g.v.Close(g.ctx), "close again")
		select {
		case <-g.v.Ended():
		default:
			t.Error("a closed volume has not ended")
		}
		g.fsys = g.fsys.CrashClone(disk.CrashOptions{Keep: disk.KeepNone}) // close flushed
		g.boots++
		g.open()
		g.wantFill(g.v.Device(), byte(i+1), 0, mib)
		g.close()
		first.Epoch++
	}
}

func TestVerbs(t *testing.T) {
	g := newRig(t, mib, disk.MemOptions{})
	g.open()
	g.fill(1, 0, mib)
	one := g.id()
	for range 3 { // repeated with the same id it changes nothing
		g.must(g.v.Snapshot(g.ctx, one, meta("one")), "snapshot")
		g.wantSettled()
	}
	g.fill(2, 100, 5000)
	g.must(g.v.Snapshot(g.ctx, one, meta("one")), "the same snapshot after a write")
	g.want(g.v.Snapshot(g.ctx, g.id(), meta("one")), volume.ErrExists, "another snapshot of the same name")
	g.want(g.v.Snapshot(g.ctx, g.id(), meta(volume.HeadName)), volume.ErrInvalid, "a snapshot called volume-head")
	g.want(g.v.Snapshot(g.ctx, g.id(), meta("")), volume.ErrInvalid, "a snapshot without a name")
	g.want(g.v.Snapshot(g.ctx, "short", meta("x")), volume.ErrInvalid, "an operation without a proper id")
	g.snapshot("two")
	g.fill(3, 0, 10)
	g.wantSnapshot("one", 1, 0, mib)
	g.wantSnapshot("two", 2, 100, 5000)

	grow := g.id()
	for range 2 {
		g.must(g.v.Expand(g.ctx, grow, 2*mib), "expand")
		g.wantSettled()
	}
	g.must(g.v.Expand(g.ctx, g.id(), 2*mib), "expand to the size it has")
	g.want(g.v.Expand(g.ctx, g.id(), mib), volume.ErrInvalid, "shrink")
	g.want(g.v.Expand(g.ctx, g.id(), 2*mib+1), volume.ErrInvalid, "expand to part of a unit")
	g.wantFill(g.v.Device(), 0, mib, mib)
	g.wantFill(g.v.Device(), 3, 0, 10)
	g.fill(4, 2*mib-7, 7)
	if l, ok := g.layer("expand-2097152"); !ok || l.Snapshot.UserCreated || l.SizeBytes != mib {
		t.Errorf("expanding left %+v", l)
	}

	back := g.id()
	g.must(g.v.Revert(g.ctx, back, "one"), "revert")
	g.wantFill(g.v.Device(), 1, 0, mib)
	g.wantFill(g.v.Device(), 0, mib, mib)
	g.fill(5, 0, 50)
	g.must(g.v.Revert(g.ctx, back, "one"), "the same revert after a write")
	g.wantFill(g.v.Device(), 5, 0, 50)
	g.wantSettled()
	g.want(g.v.Revert(g.ctx, g.id(), "nine"), replica.ErrNoSnapshot, "revert to nothing")
	g.must(g.v.RemoveSnapshot(g.ctx, "two"), "remove")
	g.must(g.v.RemoveSnapshot(g.ctx, "two"), "remove again")
	g.want(g.v.RemoveSnapshot(g.ctx, "nine"), replica.ErrNoSnapshot, "remove nothing")
	g.want(g.v.Revert(g.ctx, g.id(), "two"), volume.ErrRemoved, "revert to a removed snapshot")
	g.wantSnapshot("two", 2, 100, 5000)
	g.must(g.v.Purge(g.ctx, nil), "purge")
	g.wantSettled()
	if got := g.names(); !slices.Equal(got, []string{"one"}) {
		t.Errorf("after the purge there are %v", got)
	}
	g.wantFill(g.v.Device(), 5, 0, 50)
	g.wantFill(g.v.Device(), 1, 50, mib-50)
	if st := g.status().Stats; st.Changes == 0 || st.LastPause <= 0 || st.MaxPause < st.LastPause {
		t.Errorf("stats are %+v", st)
	}
	g.close()
	g.open()
	g.wantFill(g.v.Device(), 5, 0, 50)
	g.close()
}

// TestPurgeDialect is 4.3 and 4.4 of the dialect.
func TestPurgeDialect(t *testing.T) {
	g := newRig(t, 8*mib, disk.MemOptions{})
	g.open()
	g.fill(1, mib, 4*mib)
	g.snapshot("snap1")
	g.fill(2, mib, 4*mib)
	g.must(g.v.RemoveSnapshot(g.ctx, "snap1"), "remove")
	g.must(g.v.Purge(g.ctx, nil), "purge")
	l, ok := g.layer("snap1")
	if !ok || !l.Snapshot.Removed {
		t.Fatalf("the snapshot below the head is %+v", l)
	}
	h := g.status().Layers[0]
	if l.DataBytes != 0 || h.DataBytes != 4*mib {
		t.Errorf("the overwritten snapshot has %d bytes of data, the head %d; want 0 and 4 MiB", l.DataBytes, h.DataBytes)
	}
	g.must(g.v.Expand(g.ctx, g.id(), 16*mib), "expand")
	if e, ok := g.layer("expand-16777216"); !ok || e.Snapshot.UserCreated || e.DataBytes != h.DataBytes || e.Parent != l.ID || g.status().Layers[0].Parent != e.ID {
		t.Errorf("the system snapshot is %+v", e)
	}
	g.fill(3, 2*mib, 2*mib)
	var last, total int64
	g.must(g.v.Purge(g.ctx, func(done, of int64) {
		if done < last || of < total || done > of {
			t.Errorf("progress went from %d of %d to %d of %d", last, total, done, of)
		}
		last, total = done, of
	}), "purge")
	if last != total || total == 0 {
		t.Errorf("progress ended at %d of %d", last, total)
	}
	if got := g.names(); !slices.Equal(got, []string{"expand-16777216"}) {
		t.Errorf("the system snapshot was not merged with the removed one: %v", got)
	}
	l, _ = g.layer("expand-16777216")
	if h := g.status().Layers[0]; l.DataBytes != 2*mib || h.DataBytes != 2*mib {
		t.Errorf("the merged and pruned snapshot has %d bytes of data, the head %d, want 2 MiB each", l.DataBytes, h.DataBytes)
	}
	g.wantFill(g.v.Device(), 2, mib, mib)
	g.wantFill(g.v.Device(), 3, 2*mib, 2*mib)
	g.wantFill(g.v.Device(), 2, 4*mib, mib)
	g.wantFill(g.v.Device(), 0, 5*mib, 11*mib)
	g.wantSettled()
	g.close()
}

// TestRevertTree: after a revert to 2, snapshot 3 stays beside the head; removed and purged 1 and 3 go, 2 stays.
func TestRevertTree(t *testing.T) {
	g := newRig(t, mib, disk.MemOptions{})
	g.open()
	for i, name := range []string{"1", "2", "3"} {
		g.fill(byte(i+1), 0, 8192)
		g.snapshot(name)
	}
	g.must(g.v.Revert(g.ctx, g.id(), "2"), "revert")
	two, _ := g.layer("2")
	three, _ := g.layer("3")
	h := g.status().Layers[0]
	if three.Parent != two.ID || !h.Head || h.Parent != two.ID {
		t.Fatalf("tree is %+v", g.status().Layers)
	}
	for _, name := range []string{"1", "2", "3"} {
		g.must(g.v.RemoveSnapshot(g.ctx, name), "remove")
	}
	g.must(g.v.Purge(g.ctx, nil), "purge")
	if got := g.names(); !slices.Equal(got, []string{"2"}) {
		t.Errorf("after the purge there are %v", got)
	}
	g.wantFill(g.v.Device(), 2, 0, 8192)
	g.close()
}

// TestSnapshotIsAnInstant: while a writer goes on, a snapshot holds everything that was acknowledged before it was asked for, nothing torn, and nothing from after it was answered.
func TestSnapshotIsAnInstant(t *testing.T) {
	g := newRig(t, mib, disk.MemOptions{})
	g.open()
	stop := make(chan struct{})
	var acked [2]byte // of the two halves, in this order
	var mu sync.Mutex
	var writer sync.WaitGroup
	writer.Go(func() {
		for i := byte(1); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			for half := range int64(2) {
				if _, err := g.v.Device().WriteAt(bytes.Repeat([]byte{i}, 6000), half*512<<10+123); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				acked[half] = i
				mu.Unlock()
			}
		}
	})
	now := func() [2]byte { mu.Lock(); defer mu.Unlock(); return acked }
	for i := range 20 {
		before := now()
		name := string(rune('a' + i))
		g.snapshot(name)
		after := now()
		d, err := g.v.OpenSnapshot(g.ctx, name)
		g.must(err, "open snapshot")
		var got [2]byte
		for half := range int64(2) {
			var b [1]byte
			_, err := d.ReadAt(b[:], half*512<<10+123)
			g.must(err, "read")
			got[half] = b[0]
			g.wantFill(d, b[0], half*512<<10+123, 6000)
		}
		// The second half is written after the first: never ahead of it, and one behind at most.
		if got[0] != got[1] && got[0] != got[1]+1 {
			t.Errorf("the snapshot has %v, which never was", got)
		}
		for half := range 2 {
			if got[half]-before[half] > after[half]+1-before[half] {
				t.Errorf("half %d: the snapshot has %d, acknowledged were %d before and %d after", half, got[half], before[half], after[half])
			}
		}
		g.must(d.Close(), "close")
	}
	close(stop)
	writer.Wait()
	g.close()
}

// TestUnitLock: writes that share a unit do not undo each other, and a discard's edges are zeroes.
func TestUnitLock(t *testing.T) {
	g := newRig(t, mib, disk.MemOptions{})
	g.open()
	const writers, each = 16, 200
	var all sync.WaitGroup
	for i := range writers {
		all.Go(func() {
			for n := range each {
				// Every writer has 512 bytes of a unit that is shared by eight.
				if _, err := g.v.Device().WriteAt(bytes.Repeat([]byte{byte(n)}, 512), int64(i)*512); err != nil {
					t.Error(err)
					return
				}
			}
			if _, err := g.v.Device().WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 512), int64(i)*512); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for i := range writers {
		g.wantFill(g.v.Device(), byte(i+1), int64(i)*512, 512)
	}
	g.fill(9, 0, 4*block.UnitBytes)
	g.must(g.v.Device().Zero(100, 3*block.UnitBytes), "zero")
	g.wantFill(g.v.Device(), 9, 0, 100)
	g.wantFill(g.v.Device(), 0, 100, 3*block.UnitBytes)
	g.wantFill(g.v.Device(), 9, 100+3*block.UnitBytes, block.UnitBytes-100)
	list, err := g.v.Device().Extents(block.UnitBytes, 2*block.UnitBytes)
	if err != nil || list[0].State == block.Data {
		t.Errorf("whole units of a discard are %+v, %v", list, err)
	}
	g.close()
}

// TestReadWaitsForWrite: a read that overlaps a write under way waits for it, and others do not.
func TestReadWaitsForWrite(t *testing.T) {
	g := newRig(t, mib, disk.MemOptions{})
	must(t, g.openReplica(false))
	c := g.config()
	slow := &slowWrites{Replica: c.Replicas[0].Replica, entered: make(chan struct{}), resume: make(chan struct{})}
	c.Replicas[0].Replica = slow
	v, err := volume.Open(g.ctx, c)
	g.must(err, "open")
	g.v = v
	g.fill(1, 0, mib)
	slow.armed.Store(true)
	written, read := make(chan error, 1), make(chan byte, 1)
	var all sync.WaitGroup
	all.Go(func() {
		_, err := v.Device().WriteAt(bytes.Repeat([]byte{2}, block.UnitBytes), 0)
		written <- err
	})
	<-slow.entered
	g.wantFill(v.Device(), 1, block.UnitBytes, 8) // does not overlap: does not wait
	all.Go(func() {
		var b [1]byte
		if _, err := v.Device().ReadAt(b[:], block.UnitBytes-1); err != nil {
			t.Error(err)
		}
		read <- b[0]
	})
	for range 100 {
		select {
		case b := <-read:
			t.Fatalf("a read that overlaps a write under way answered %d", b)
		default:
			runtimeYield()
		}
	}
	close(slow.resume)
	g.must(<-written, "write")
	if b := <-read; b != 2 {
		t.Errorf("the read answered %d, want what the write wrote", b)
	}
	all.Wait()
	g.close()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestHandOver: a successor resumes at once what was written, without a flush and without the catalogue, and the one before it serves nothing any more.
func TestHandOver(t *testing.T) {
	g := newRig(t, mib, disk.MemOptions{})
	g.open()
	epoch := g.status().Writer.Epoch
	for i := range uint64(3) {
		g.fill(byte(i+1), 0, 5000)
		calls, old := g.ledger.Calls(), g.v
		g.must(g.v.HandOver(g.ctx), "hand over")
		_, err := old.Device().WriteAt(make([]byte, 4096), 0)
		g.want(err, block.ErrClosed, "a write after the hand-over")
		g.must(g.r.Close(), "close")
		g.open(resume)
		if st := g.status(); st.Writer != (replica.Writer{Epoch: epoch, Session: 2 + i}) || !st.Stats.Resumed || g.ledger.Calls() != calls {
			t.Errorf("resumed as %+v, %+v, with %d calls to the catalogue", st.Writer, st.Stats, g.ledger.Calls()-calls)
		}
		g.wantFill(g.v.Device(), byte(i+1), 0, 5000)
	}
	g.close()
}

// TestResume: the same boot takes its epoch up again without the catalogue; another boot, node or a newer epoch cannot.
func TestResume(t *testing.T) {
	g := newRig(t, mib, disk.MemOptions{})
	g.open()
	g.fill(1, 0, 5000)
	epoch := g.status().Writer.Epoch
	for i := range uint64(3) {
		g.kill()
		calls := g.ledger.Calls()
		g.open(resume)
		if st := g.status(); st.Writer != (replica.Writer{Epoch: epoch, Session: 2 + i}) || !st.Stats.Resumed {
			t.Errorf("resumed as %+v, %+v", st.Writer, st.Stats)
		}
		if g.ledger.Calls() != calls {
			t.Error("resuming asked the catalogue")
		}
		g.wantFill(g.v.Device(), 1, 0, 5000)
		g.wantSettled()
		g.snapshot(string(rune('a' + i))) // asks the catalogue now
		g.wantSettled()
	}
	g.must(g.v.Suspend(g.ctx), "suspend")
	g.must(g.r.Close(), "close")
	g.open(resume)
	if !g.status().Stats.Resumed {
		t.Error("a suspended volume was not resumed")
	}

	// Somebody else claims it, and cannot reach the copy.
	rec, rev, err := g.ledger.Read(g.ctx, volumeID)
	must(t, err)
	rec.Epoch++
	rec.Generation++
	rec.WriterNode = "node-2"
	_, err = g.ledger.Swap(g.ctx, rec, rev)
	must(t, err)
	g.kill()
	g.open(resume) // allowed: the copy is what counts, and no other can have been let in
	g.want(g.v.Snapshot(g.ctx, g.id(), meta("late")), block.ErrFenced, "a verb after a higher epoch")
	_, err = g.v.Device().ReadAt(make([]byte, 1), 0)
	g.want(err, block.ErrFenced, "I/O after a higher epoch was seen")
	if st := g.status(); st.State != volume.StateFenced {
		t.Errorf("state is %s", st.State)
	}
	g.close()
	if rec := g.record(); rec.WriterNode != "node-2" {
		t.Errorf("a fenced writer's close wrote %+v", rec)
	}

	// After a reboot there is nothing to resume: it is claimed.
	g.boots++
	g.open(resume)
	if st := g.status(); st.Stats.Resumed || st.Writer.Epoch != rec.Epoch+1 {
		t.Errorf("after a reboot: %+v", st)
	}
	g.close()
}

// TestFenced: the second to open a volume has it; the first gets ErrFenced from then on, without any answer to the second's data.
func TestFenced(t *testing.T) {
	g := newRig(t, mib, disk.MemOptions{})
	g.open()
	first := g.v
	g.fill(1, 0, 4096)
	c := g.config()
	second, err := volume.Open(g.ctx, c)
	g.must(err, "open a second time")
	_, err = first.Device().WriteAt(make([]byte, 4096), 0)
	g.want(err, block.ErrFenced, "write by the first")
	_, err = first.Device().ReadAt(make([]byte, 1), 0)
	g.want(err, block.ErrFenced, "read by the first")
	g.want(first.Device().Flush(), block.ErrFenced, "flush by the first")
	g.want(first.Snapshot(g.ctx, g.id(), meta("x")), block.ErrFenced, "snapshot by the first")
	<-first.Ended()
	g.wantFill(second.Device(), 1, 0, 4096)
	g.must(first.Close(g.ctx), "close the first")
	g.wantFill(second.Device(), 1, 0, 4096)
	if rec := g.record(); rec.WriterNode == "" {
		t.Error("closing the first released the second's record")
	}
	g.v = second
	g.snapshot("by the second")
	g.wantSettled()
	g.close()
}

// TestCloseCancelsVerb: closing does not wait for a long verb, and leaves nothing pending.
func TestCloseCancelsVerb(t *testing.T) {
	g := newRig(t, mib, disk.MemOptions{})
	must(t, g.openReplica(false))
	c := g.config()
	slow := &stuckPrepare{Replica: c.Replicas[0].Replica, entered: make(chan struct{})}
	c.Replicas[0].Replica = slow
	v, err := volume.Open(g.ctx, c)
	g.must(err, "open")
	g.v = v
	g.fill(1, 0, 5000)
	var verb sync.WaitGroup
	verb.Go(func() {
		g.want(v.Snapshot(g.ctx, g.id(), meta("one")), block.ErrClosed, "a snapshot while the volume is closed")
	})
	<-slow.entered
	g.must(v.Close(g.ctx), "close")
	verb.Wait()
	g.must(g.r.Close(), "close")
	if rec := g.record(); rec.WriterNode != "" {
		t.Errorf("record %+v", rec)
	}
	g.open()
	g.wantFill(g.v.Device(), 1, 0, 5000)
	g.wantSettled()
	g.close()
}

// TestRefusals: every way in which opening is refused, and that nothing changed.
func TestRefusals(t *testing.T) {
	other := func(t *testing.T, edit func(*rig), open func(*volume.Config), want error) {
		t.Helper()
		g := newRig(t, mib, disk.MemOptions{})
		g.open()
		g.fill(1, 0, 4096)
		g.snapshot("one")
		g.close()
		edit(g)
		if want == volume.ErrNoRecord {
			g.want(g.tryOpen(open), want, t.Name())
			return
		}
		before := g.record()
		g.want(g.tryOpen(open), want, t.Name())
		if after := g.record(); !after.Equal(before) && after.Opened != before.Opened {
			t.Errorf("a refused open changed the record from %+v to %+v", before, after)
		}
	}
	swap := func(edit func(*replica.Record)) func(*rig) {
		return func(g *rig) {
			rec, rev, err := g.ledger.Read(g.ctx, volumeID)
			g.must(err, "read")
			edit(&rec)
			_, err = g.ledger.Swap(g.ctx, rec, rev)
			g.must(err, "swap")
		}
	}
	none := func(*volume.Config) {}
	for name, c := range map[string]struct {
		edit func(*rig)
		open func(*volume.Config)
		want error
	}{
		"no record":        {func(g *rig) { g.ledger.Delete(volumeID) }, none, volume.ErrNoRecord},
		"another volume's": {func(*rig) {}, func(c *volume.Config) { c.VolumeID = "x" }, volume.ErrNoRecord},
		"not a member":     {func(*rig) {}, func(c *volume.Config) { c.Replicas[0].ID = "stranger" }, volume.ErrInvalid},
		"two copies given": {func(*rig) {}, func(c *volume.Config) { c.Replicas = append(c.Replicas, c.Replicas[0]) }, volume.ErrSeveral},
		"no copy given":    {func(*rig) {}, func(c *volume.Config) { c.Replicas = nil }, volume.ErrNoMember},
		"no node":          {func(*rig) {}, func(c *volume.Config) { c.Node = "" }, volume.ErrInvalid},
		"two members": {swap(func(r *replica.Record) {
			r.Members = append(r.Members, replica.Member{ReplicaID: "r2"})
			r.Generation++
		}), none, volume.ErrSeveral},
		"an old catalogue":       {swap(func(r *replica.Record) { r.Generation-- }), none, volume.ErrStaleCatalogue},
		"another history":        {swap(func(r *replica.Record) { r.LastChange = r.LastChange.Add(1) }), none, volume.ErrStaleCatalogue},
		"an older epoch":         {swap(func(r *replica.Record) { r.Epoch = 0; r.Generation = 99 }), none, volume.ErrStaleCatalogue},
		"an old copy":            {swap(func(r *replica.Record) { r.Epoch += 2; r.Opened = r.Epoch }), none, volume.ErrStaleReplica},
		"a failed copy":          {swap(func(r *replica.Record) { r.Members[0].Failed = "flush"; r.Generation++ }), none, volume.ErrNeedsSalvage},
		"no copy in sync":        {swap(func(r *replica.Record) { r.Members[0].InSync = false; r.Generation++ }), none, volume.ErrStaleReplica},
		"another chain":          {swap(func(r *replica.Record) { r.Chain.Generation++; r.Generation++ }), none, replica.ErrChain},
		"a claim that conflicts": {func(g *rig) { g.ledger.OnCall(onSwap(1, ledgertest.Conflict)) }, none, volume.ErrConflict},
		"nobody to ask":          {func(g *rig) { g.ledger.OnCall(func(ledgertest.Call) ledgertest.Fault { return ledgertest.LostBefore }) }, none, volume.ErrUnreachable},
	} {
		t.Run(name, func(t *testing.T) {
			other(t, c.edit, c.open, c.want)
		})
	}
}

// onSwap makes the nth swap from now on fail.
func onSwap(nth int, f ledgertest.Fault) func(ledgertest.Call) ledgertest.Fault {
	n := 0
	return func(c ledgertest.Call) ledgertest.Fault {
		if c.Swap {
			n++
			if n == nth {
				return f
			}
		}
		return ledgertest.OK
	}
}

// TestFlushFails: the last copy fails, the guest gets errors until it is detached, and attaching again takes a person's decision.
func TestFlushFails(t *testing.T) {
	for _, when := range []string{"flush", "close", "kill"} {
		t.Run(when, func(t *testing.T) {
			g := newRig(t, mib, disk.MemOptions{})
			g.open()
			g.fill(1, 0, 8192)
			g.flush()
			g.fill(2, 0, 4096)
			g.fsys.Fail(disk.FailOptions{Kind: disk.OpSync, Pattern: g.dir + "/*.layer"})
			if when == "close" {
				g.want(g.v.Close(g.ctx), block.ErrFailed, "close with a failing flush")
			} else {
				g.want(g.v.Device().Flush(), block.ErrFailed, "flush")
				g.want(g.v.Device().Flush(), block.ErrFailed, "flush again")
				_, err := g.v.Device().ReadAt(make([]byte, 1), 0)
				g.want(err, block.ErrFailed, "read")
				_, err = g.v.Device().WriteAt(make([]byte, 1), 0)
				g.want(err, block.ErrFailed, "write")
				g.want(g.v.Snapshot(g.ctx, g.id(), meta("x")), block.ErrFailed, "snapshot")
				<-g.v.Ended()
				if st := g.status(); st.State != volume.StateFailed || !errors.Is(st.Err, block.ErrFailed) {
					t.Errorf("status %+v", st)
				}
				if when == "flush" {
					g.must(g.v.Close(g.ctx), "close")
				}
			}
			if when == "kill" {
				g.kill()
			} else {
				g.must(g.r.Close(), "close replica")
				if rec := g.record(); rec.Members[0].Failed == "" || !rec.Members[0].InSync || rec.WriterNode != "" {
					t.Errorf("record %+v", rec)
				}
			}
			if err := g.tryOpen(); err == nil {
				t.Fatal("opened without salvage")
			}
			g.must(g.openReplica(true), "open replica with salvage")
			if when != "kill" {
				_, err := volume.Open(g.ctx, g.config())
				g.want(err, volume.ErrNeedsSalvage, "open without salvage")
			}
			c := g.config()
			c.Salvage = true
			v, err := volume.Open(g.ctx, c)
			g.must(err, "salvage")
			g.v = v
			g.wantFill(v.Device(), 1, 4096, 4096)
			if rec := g.record(); rec.Members[0].Failed != "" {
				t.Errorf("after salvage the record is %+v", rec)
			}
			g.fill(3, 0, 4096)
			g.close()
			g.open()
			g.wantFill(g.v.Device(), 3, 0, 4096)
			g.close()
		})
	}
}

// TestLostAnswers loses the answer of every call to the catalogue, before and after it happened: the verb may fail, and said again it is done, once.
func TestLostAnswers(t *testing.T) {
	for _, fault := range []ledgertest.Fault{ledgertest.LostBefore, ledgertest.LostAfter} {
		for _, times := range []int{1, 2, 3} {
			for nth := 1; ; nth++ {
				g := newRig(t, mib, disk.MemOptions{})
				n, hit := 0, false
				g.ledger.OnCall(func(ledgertest.Call) ledgertest.Fault {
					n++
					if n >= nth && n < nth+times {
						hit = true
						return fault
					}
					return ledgertest.OK
				})
				retry := func(what string, do func() error) {
					t.Helper()
					var err error
					for range 8 {
						if err = do(); err == nil {
							return
						}
						if !errors.Is(err, volume.ErrUnreachable) {
							t.Fatalf("%s with call %d (%d times, fault %d) lost: %v", what, nth, times, fault, err)
						}
					}
					t.Fatalf("%s with call %d lost: %v", what, nth, err)
				}
				retry("open", func() error { return g.tryOpen() })
				g.fill(1, 0, 4096)
				one, grow, back := g.id(), g.id(), g.id()
				retry("snapshot", func() error { return g.v.Snapshot(g.ctx, one, meta("one")) })
				g.fill(2, 0, 4096)
				retry("expand", func() error { return g.v.Expand(g.ctx, grow, 2*mib) })
				retry("revert", func() error { return g.v.Revert(g.ctx, back, "one") })
				g.wantFill(g.v.Device(), 1, 0, 4096)
				g.fill(3, 0, 4096)
				retry("purge", func() error { return g.v.Purge(g.ctx, nil) })
				g.wantFill(g.v.Device(), 3, 0, 4096)
				g.wantSettled()
				st := g.status()
				if st.Record.Chain.Generation != 4 || st.SizeBytes != 2*mib {
					t.Errorf("call %d lost: generation %d, want 4", nth, st.Record.Chain.Generation)
				}
				err := g.v.Close(g.ctx)
				if err != nil && !errors.Is(err, volume.ErrUnreachable) {
					t.Errorf("close: %v", err)
				}
				g.must(g.r.Close(), "close")
				g.ledger.OnCall(nil)
				g.open()
				g.wantFill(g.v.Device(), 3, 0, 4096)
				g.close()
				if !hit {
					t.Logf("fault %d, %d times in a row: %d calls", fault, times, nth-1)
					break
				}
			}
		}
	}
}

// TestCatalogueAway: guests' I/O never asks the catalogue, and verbs fail rather than wait.
func TestCatalogueAway(t *testing.T) {
	g := newRig(t, mib, disk.MemOptions{})
	g.open()
	g.ledger.OnCall(func(ledgertest.Call) ledgertest.Fault { return ledgertest.LostBefore })
	g.fill(1, 0, 5000)
	g.flush()
	one := g.id()
	g.want(g.v.Snapshot(g.ctx, one, meta("one")), volume.ErrUnreachable, "snapshot")
	g.want(g.v.Expand(g.ctx, g.id(), 2*mib), volume.ErrUnreachable, "expand")
	g.wantFill(g.v.Device(), 1, 0, 5000)
	g.ledger.OnCall(nil)
	g.must(g.v.Snapshot(g.ctx, one, meta("one")), "snapshot")
	g.wantSettled()
	backup := g.ledger.Clone()
	g.snapshot("two")
	g.ledger.Restore(backup) // the catalogue goes back in time under a running engine
	g.want(g.v.Snapshot(g.ctx, g.id(), meta("three")), volume.ErrStaleCatalogue, "snapshot with an old catalogue")
	g.fill(2, 0, 5000)
	g.flush()
	g.want(g.v.Close(g.ctx), volume.ErrStaleCatalogue, "close with an old catalogue")
	g.must(g.r.Close(), "close")
	g.want(g.tryOpen(), volume.ErrStaleCatalogue, "open with an old catalogue")
}

// TestNoSpaceForHead: a change that has no room is given up, and everything goes on.
func TestNoSpaceForHead(t *testing.T) {
	g := newRig(t, 4*mib, disk.MemOptions{CapacityBytes: 24 << 20})
	g.open()
	g.fill(1, 0, 4*mib)
	g.snapshot("a")
	g.awaitSettled() // its log is free now: what is missing is really missing
	g.fill(2, 0, 4*mib)
	layers := len(g.status().Layers)
	for range 2 {
		g.want(g.v.Snapshot(g.ctx, g.id(), meta("b")), block.ErrNoSpace, "snapshot on a full disk")
		g.want(g.v.Expand(g.ctx, g.id(), 8*mib), block.ErrNoSpace, "expand on a full disk")
		g.want(g.v.Revert(g.ctx, g.id(), "a"), block.ErrNoSpace, "revert on a full disk")
		g.wantSettled()
	}
	g.fill(3, 0, mib) // in place
	g.flush()
	g.wantFill(g.v.Device(), 3, 0, mib)
	g.wantFill(g.v.Device(), 2, mib, 3*mib)
	if n := len(g.status().Layers); n != layers {
		t.Errorf("%d layers, want %d", n, layers)
	}
	g.kill()
	g.open(resume)
	g.wantFill(g.v.Device(), 3, 0, mib)
	g.must(g.v.RemoveSnapshot(g.ctx, "a"), "remove")
	g.must(g.v.Purge(g.ctx, nil), "purge") // the space comes back
	g.snapshot("b")
	g.close()
	g.open()
	g.wantSettled()
	g.close()
}

// TestDepth: a volume under 210 snapshots reads what was written, opens again, and gets its depth back by purging.
func TestDepth(t *testing.T) {
	g := newRig(t, mib, disk.MemOptions{})
	g.open()
	const depth = 210
	for i := range depth {
		g.fill(byte(i), int64(i)*block.UnitBytes, 2*block.UnitBytes)
		g.snapshot(string(g.id()))
	}
	check := func() {
		t.Helper()
		for i := range depth {
			g.wantFill(g.v.Device(), byte(i), int64(i)*block.UnitBytes, block.UnitBytes)
		}
		g.wantSettled()
	}
	check()
	g.close()
	g.open()
	check()
	layers := g.status().Layers
	for _, l := range layers[1:31] {
		g.must(g.v.RemoveSnapshot(g.ctx, l.Snapshot.Name), "remove")
	}
	g.must(g.v.Purge(g.ctx, nil), "purge")
	if n := len(g.status().Layers); n != depth+1-29 { // of the 30 removed, the one below the head stays
		t.Errorf("%d layers are left", n)
	}
	check()
	g.close()
}
