package dataplane

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/disk"
)

// TestSpace: what a volume and its layers take is told soon after it changed, and what a purge would free.
func TestSpace(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, 64*mib)
	b.open(c, a)
	g := guest(t, b.runDir, a.Volume)
	operate := func(verb string, n int) {
		t.Helper()
		if _, err := c.Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, Verb: verb, Snapshot: "s", OpID: id("oper", n)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(g.write(0, bytes.Repeat(page("a"), 1024)), g.flush()); err != nil {
		t.Fatal(err)
	}
	operate(verbSnapshot, 1)
	if err := errors.Join(g.write(0, bytes.Repeat(page("b"), 256)), g.flush()); err != nil {
		t.Fatal(err)
	}
	wait := func(what string, ok func(st client.VolumeStatus, snapshot, head client.Layer) bool) {
		t.Helper()
		var st client.VolumeStatus
		defer func() {
			if t.Failed() {
				t.Logf("it is %+v", st)
			}
		}()
		eventually(t, what, func() bool {
			b.p.measureSoon() // and not every quarter of a minute
			st, _ = status(t, c, a.VolumeID)
			var snapshot, head client.Layer
			for _, l := range st.Layers {
				if l.Head {
					head = l
				} else {
					snapshot = l
				}
			}
			return ok(st, snapshot, head)
		})
	}
	wait("a snapshot of 4 MiB and a head of 1", func(st client.VolumeStatus, snapshot, head client.Layer) bool {
		return snapshot.DataBytes == 4*mib && head.DataBytes == mib && st.Space.ExclusiveBytes >= 5*mib && st.Space.ReclaimableBytes == 0 && snapshot.Space.ExclusiveBytes == mib
	})
	operate(verbSnapshotRemove, 0)
	wait("a MiB that a purge would free", func(st client.VolumeStatus, snapshot, _ client.Layer) bool {
		return st.Space.ReclaimableBytes == mib && snapshot.Space.ReclaimableBytes == mib
	})
	operate(verbPurge, 0)
	wait("nothing more to free", func(st client.VolumeStatus, snapshot, _ client.Layer) bool {
		return st.Space.ReclaimableBytes == 0 && snapshot.Space == (client.Space{}) && snapshot.DataBytes == 3*mib
	})
}

// TestRoom: nothing new is begun on a disk that is as good as full, and what was done already is not refused.
func TestRoom(t *testing.T) {
	b := newBed(t)
	m := b.onMem(disk.MemOptions{CapacityBytes: 512 * mib})
	c := b.ready()
	a := b.volume(c, 1, 1024*mib)
	b.open(c, a)
	op := client.Operate{VolumeID: a.VolumeID, Verb: verbSnapshot, Snapshot: "s", OpID: id("oper", 1)}
	if _, err := c.Operate(t.Context(), op); err != nil {
		t.Fatal(err)
	}
	g := guest(t, b.runDir, a.Volume)
	free := func() int64 {
		_, free, err := m.Usage()
		if err != nil {
			t.Fatal(err)
		}
		return free
	}
	for off := int64(0); free() >= reserveOf(512*mib); off += mib / 2 {
		if err := g.write(off, make([]byte, mib/2)); err != nil {
			t.Fatal(err)
		}
	}
	before := free()
	if _, err := c.Operate(t.Context(), op); err != nil {
		t.Errorf("what was done, said again: %v", err)
	}
	for verb, edit := range map[string]func(*client.Operate){verbSnapshot: func(o *client.Operate) { o.Snapshot = "t" }, verbExpand: func(o *client.Operate) { o.SizeBytes = 2048 * mib }} {
		o := client.Operate{VolumeID: a.VolumeID, Verb: verb, OpID: id("oper", 2)}
		edit(&o)
		_, err := c.Operate(t.Context(), o)
		wantCode(t, verb, err, client.CodeNoSpace)
	}
	create := client.CreateReplica{DiskID: b.diskID, ReplicaID: id("repl", 2), VolumeID: id("volu", 2), Volume: "vol2", SizeBytes: mib}
	wantCode(t, "a replica", c.CreateReplica(t.Context(), create), client.CodeNoSpace)
	again := client.CreateReplica{DiskID: b.diskID, ReplicaID: a.ReplicaID, VolumeID: a.VolumeID, Volume: a.Volume, SizeBytes: 1024 * mib}
	if err := c.CreateReplica(t.Context(), again); err != nil {
		t.Errorf("a replica that is there: %v", err)
	}
	_, err := c.ImportImage(t.Context(), client.ImportImage{DiskID: b.diskID, ImageID: id("imag", 1), Name: "i", Source: "/dev/null"})
	wantCode(t, "an import", err, client.CodeNoSpace)
	if after := free(); after != before {
		t.Errorf("refusals wrote: %d bytes were free, and are %d", before, after)
	}
	if err := g.write(0, page("overwrite")); err != nil {
		t.Errorf("a write where there is room: %v", err)
	}
}

// TestDiff: what changed between two snapshots, from a snapshot to the present, and since ever.
func TestDiff(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, 16*mib)
	b.open(c, a)
	g := guest(t, b.runDir, a.Volume)
	for n, name := range []string{"s", "t"} {
		if err := errors.Join(g.write(int64(n)*mib, page(name)), g.write(8*mib, page(name))); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, Verb: verbSnapshot, Snapshot: name, OpID: id("oper", n)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.write(3*mib, page("now")); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		ask  client.Diff
		want string
	}{
		"all of s":        {client.Diff{To: "s"}, "[{0 4096 false} {8388608 4096 false}]"},
		"s to t":          {client.Diff{From: "s", To: "t"}, "[{1048576 4096 false} {8388608 4096 false}]"},
		"s to t, go on":   {client.Diff{From: "s", To: "t", Off: 2 * mib}, "[{8388608 4096 false}]"},
		"t to now":        {client.Diff{From: "t"}, "[{3145728 4096 false}]"},
		"t to its head":   {client.Diff{From: "t", To: "volume-head"}, "[{3145728 4096 false}]"},
		"nothing changed": {client.Diff{From: "t", Off: 4 * mib}, "[]"},
	} {
		tc.ask.VolumeID = a.VolumeID
		got, err := c.Diff(t.Context(), tc.ask)
		if err != nil || fmt.Sprint(got.Ranges) != tc.want || got.NextOff != 16*mib || got.SizeBytes != 16*mib {
			t.Errorf("%s: %+v, %v, want %s", name, got, err, tc.want)
		}
	}
	for name, tc := range map[string]struct {
		ask  client.Diff
		code client.Code
	}{
		"backwards":   {client.Diff{VolumeID: a.VolumeID, From: "t", To: "s"}, client.CodeInvalid},
		"no snapshot": {client.Diff{VolumeID: a.VolumeID, From: "u"}, client.CodeNotFound},
		"of the head": {client.Diff{VolumeID: a.VolumeID, From: "volume-head"}, client.CodeInvalid},
		"no volume":   {client.Diff{VolumeID: id("volu", 9)}, client.CodeNotFound},
		"beyond":      {client.Diff{VolumeID: a.VolumeID, Off: 17 * mib}, client.CodeInvalid},
	} {
		_, err := c.Diff(t.Context(), tc.ask)
		wantCode(t, name, err, tc.code)
	}
}

// TestBackground: who reads sources shares the background's rate, and guests do not.
func TestBackground(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, 16*mib)
	b.open(c, a)
	g := guest(t, b.runDir, a.Volume)
	if err := g.write(0, page("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, Verb: verbSnapshot, Snapshot: "s", OpID: id("oper", 1)}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the snapshot has its checksums", func() bool {
		st, _ := status(t, c, a.VolumeID)
		return len(st.Layers) == 2 && (st.Layers[0].Verified || st.Layers[1].Verified)
	})
	ask := client.OpenSource{ID: id("sour", 1), VolumeID: a.VolumeID, Snapshot: "s"}
	if _, err := c.OpenSource(t.Context(), ask); err != nil {
		t.Fatal(err)
	}
	set := func(n int64) {
		t.Helper()
		if err := c.SetBackground(t.Context(), client.Background{BytesPerSecond: n}); err != nil {
			t.Fatal(err)
		}
	}
	set(1) // a second read waits for more than an hour
	r := reader(t, b, ask.ID)
	if _, err := r.read(0, 4096); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { _, err := r.read(0, 4096); done <- err }()
	eventually(t, "the reader is held back", func() bool { return b.p.background.Waited() > 0 })
	if got, err := g.read(0, 4096); err != nil || !bytes.Equal(got, page("x")) {
		t.Errorf("the guest reads %.10q, %v", got, err)
	}
	set(0)
	if err := <-done; err != nil {
		t.Error(err)
	}
}
