package dataplane

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"ashlar/internal/dataplane/client"
)

const mib = 1 << 20

func TestVolumeLife(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, 64*mib)
	st := b.open(c, a)
	if st.Epoch != 1 || st.Session != 1 || st.SizeBytes != 64*mib || st.Endpoint == "" || len(st.Layers) != 1 || !st.Layers[0].Head {
		t.Errorf("status %+v", st)
	}
	g := guest(t, b.runDir, a.Volume)
	if g.size != 64*mib {
		t.Errorf("the guest sees %d bytes", g.size)
	}
	if err := errors.Join(g.write(8192, page("hello")), g.flush()); err != nil {
		t.Fatal(err)
	}
	if got, err := g.read(8192, 4096); err != nil || !bytes.Equal(got, page("hello")) {
		t.Errorf("read back %.20q, %v", got, err)
	}
	if again := b.open(c, a); again.Epoch != 1 || again.Session != 1 {
		t.Errorf("said again it opened again: %+v", again)
	}
	other := a
	other.Frontend = ""
	_, err := c.OpenVolume(t.Context(), other)
	wantCode(t, "open with other arguments", err, client.CodeExists)
	if st, _ = status(t, c, a.VolumeID); st.Clients != 1 || st.Stats.WriteOps != 1 || st.Stats.ReadOps != 1 || st.Stats.FlushOps != 1 {
		t.Errorf("clients %d, stats %+v", st.Clients, st.Stats)
	}
	for range 2 {
		if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
			t.Fatal(err)
		}
	}
	if _, there := status(t, c, a.VolumeID); there {
		t.Error("closed, and still in the state")
	}
	if _, err := dialNBD(b.p.nbd.Path(a.Volume), a.Volume); err == nil {
		t.Error("closed, and still exported")
	}
	if rec := b.cat.record(a.VolumeID); rec.WriterNode != "" || rec.Epoch != 1 {
		t.Errorf("the record after the close: %+v", rec)
	}
	if st := b.open(c, a); st.Epoch != 2 {
		t.Errorf("opened again at epoch %d, want 2", st.Epoch)
	}
	g = guest(t, b.runDir, a.Volume)
	if got, err := g.read(8192, 4096); err != nil || !bytes.Equal(got, page("hello")) {
		t.Errorf("read back after reopening: %.20q, %v", got, err)
	}
}

func TestBadArguments(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	good := b.volume(c, 1, mib)
	for name, tc := range map[string]struct {
		edit func(*client.OpenVolume)
		code client.Code
	}{
		"no id":            {func(a *client.OpenVolume) { a.VolumeID = "" }, client.CodeInvalid},
		"upper case":       {func(a *client.OpenVolume) { a.ReplicaID = "ABCDEF" + a.ReplicaID[6:] }, client.CodeInvalid},
		"slash in name":    {func(a *client.OpenVolume) { a.Volume = "../x" }, client.CodeInvalid},
		"control in name":  {func(a *client.OpenVolume) { a.Volume = "a\nb" }, client.CodeInvalid},
		"dot first":        {func(a *client.OpenVolume) { a.Volume = ".a" }, client.CodeInvalid},
		"no node":          {func(a *client.OpenVolume) { a.Node = "" }, client.CodeInvalid},
		"other frontend":   {func(a *client.OpenVolume) { a.Frontend = "iscsi" }, client.CodeInvalid},
		"unknown disk":     {func(a *client.OpenVolume) { a.DiskID = id("disk", 9) }, client.CodeNotFound},
		"unknown replica":  {func(a *client.OpenVolume) { a.ReplicaID = id("repl", 9) }, client.CodeNotFound},
		"unknown volume":   {func(a *client.OpenVolume) { a.VolumeID = id("volu", 9) }, client.CodeNotFound},
		"too long a name":  {func(a *client.OpenVolume) { a.Volume = string(bytes.Repeat([]byte("x"), 129)) }, client.CodeInvalid},
		"space in a name":  {func(a *client.OpenVolume) { a.Volume = "a b" }, client.CodeInvalid},
		"no ASCII":         {func(a *client.OpenVolume) { a.Volume = "gr\u00fc\u00df" }, client.CodeInvalid},
		"socket too long?": {func(a *client.OpenVolume) { a.Volume = string(bytes.Repeat([]byte("x"), 120)) }, client.CodeInvalid},
	} {
		a := good
		tc.edit(&a)
		_, err := c.OpenVolume(t.Context(), a)
		wantCode(t, name, err, tc.code)
		if _, there := status(t, c, a.VolumeID); there {
			t.Errorf("%s: refused, and in the state", name)
		}
		if _, there := b.p.list.volume(a.VolumeID); there {
			t.Errorf("%s: refused, and in open.json", name)
		}
	}
	for name, a := range map[string]client.CreateReplica{
		"size 0":       {ReplicaID: id("repl", 2), VolumeID: id("volu", 2), Volume: "v", DiskID: b.diskID},
		"odd size":     {ReplicaID: id("repl", 2), VolumeID: id("volu", 2), Volume: "v", DiskID: b.diskID, SizeBytes: 4097},
		"beyond limit": {ReplicaID: id("repl", 2), VolumeID: id("volu", 2), Volume: "v", DiskID: b.diskID, SizeBytes: 1 << 60},
		"bad name":     {ReplicaID: id("repl", 2), VolumeID: id("volu", 2), Volume: "a/b", DiskID: b.diskID, SizeBytes: mib},
		"bad id":       {ReplicaID: "..", VolumeID: id("volu", 2), Volume: "v", DiskID: b.diskID, SizeBytes: mib},
	} {
		wantCode(t, "create replica: "+name, c.CreateReplica(t.Context(), a), client.CodeInvalid)
	}
	wantCode(t, "image that is not there", c.CreateReplica(t.Context(), client.CreateReplica{ReplicaID: id("repl", 2), VolumeID: id("volu", 2), Volume: "v",
		DiskID: b.diskID, SizeBytes: mib, ImageID: id("imag", 1)}), client.CodeNotFound)
	_, err := c.Operate(t.Context(), client.Operate{VolumeID: good.VolumeID, Verb: "snapshot"})
	wantCode(t, "operate on a closed volume", err, client.CodeNotFound)
	b.open(c, good)
	for name, tc := range map[string]struct {
		op   client.Operate
		code client.Code
	}{
		"unknown verb":       {client.Operate{Verb: "fly"}, client.CodeInvalid},
		"no op id":           {client.Operate{Verb: "snapshot", Snapshot: "a"}, client.CodeInvalid},
		"bad snapshot name":  {client.Operate{Verb: "snapshot", Snapshot: "a/b", OpID: id("oper", 1)}, client.CodeInvalid},
		"name of the head":   {client.Operate{Verb: "snapshot", Snapshot: "volume-head", OpID: id("oper", 1)}, client.CodeInvalid},
		"no such snapshot":   {client.Operate{Verb: "snapshot-remove", Snapshot: "a"}, client.CodeNotFound},
		"shrink":             {client.Operate{Verb: "expand", SizeBytes: 4096, OpID: id("oper", 1)}, client.CodeInvalid},
		"grow beyond limits": {client.Operate{Verb: "expand", SizeBytes: 1 << 60, OpID: id("oper", 1)}, client.CodeInvalid},
		"revert while used":  {client.Operate{Verb: "revert", Snapshot: "a", OpID: id("oper", 1)}, client.CodeFrontend},
	} {
		tc.op.VolumeID = good.VolumeID
		_, err := c.Operate(t.Context(), tc.op)
		wantCode(t, name, err, tc.code)
	}
}

func TestReplicas(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, 16*mib)
	create := client.CreateReplica{DiskID: b.diskID, ReplicaID: a.ReplicaID, VolumeID: a.VolumeID, Volume: a.Volume, SizeBytes: 16 * mib}
	if err := c.CreateReplica(t.Context(), create); err != nil {
		t.Errorf("said again: %v", err)
	}
	create.VolumeID = id("volu", 7)
	wantCode(t, "the same replica for another volume", c.CreateReplica(t.Context(), create), client.CodeExists)
	st, err := c.State(t.Context())
	if err != nil || len(st.Disks) != 1 || len(st.Disks[0].Replicas) != 1 {
		t.Fatalf("state %+v, %v", st, err)
	}
	r := st.Disks[0].Replicas[0]
	if r.ReplicaID != a.ReplicaID || r.VolumeID != a.VolumeID || r.Volume != a.Volume || r.SizeBytes != 16*mib || r.Open || r.AllocatedBytes == 0 {
		t.Errorf("replica found: %+v", r)
	}
	b.open(c, a)
	del := client.DeleteReplica{DiskID: b.diskID, ReplicaID: a.ReplicaID}
	wantCode(t, "delete while open", c.DeleteReplica(t.Context(), del), client.CodeInUse)
	if st, err = c.State(t.Context()); err != nil || !st.Disks[0].Replicas[0].Open {
		t.Errorf("open replica: %+v, %v", st.Disks[0].Replicas, err)
	}
	if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	if st, err = c.State(t.Context()); err != nil || st.Disks[0].Replicas[0].Open || len(st.Disks[0].Replicas[0].Record) == 0 {
		t.Errorf("closed replica: %+v, %v", st.Disks[0].Replicas, err)
	}
	for range 2 {
		if err := c.DeleteReplica(t.Context(), del); err != nil {
			t.Fatal(err)
		}
	}
	if st, err = c.State(t.Context()); err != nil || len(st.Disks[0].Replicas) != 0 {
		t.Errorf("deleted, and found: %+v, %v", st.Disks[0].Replicas, err)
	}
	if left, err := os.ReadDir(filepath.Join(b.disk, "replicas")); err != nil || len(left) != 0 {
		t.Errorf("deleted, and left: %v, %v", left, err)
	}
}

func TestOperate(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, 16*mib)
	b.open(c, a)
	g := guest(t, b.runDir, a.Volume)
	do := func(verb string, edit func(*client.Operate)) client.VolumeStatus {
		t.Helper()
		op := client.Operate{VolumeID: a.VolumeID, Verb: verb}
		if edit != nil {
			edit(&op)
		}
		var st client.VolumeStatus
		for range 2 { // everything may be said again
			var err error
			if st, err = c.Operate(t.Context(), op); err != nil {
				t.Fatalf("%s: %v", verb, err)
			}
		}
		return st
	}
	if err := g.write(0, page("first")); err != nil {
		t.Fatal(err)
	}
	st := do("snapshot", func(o *client.Operate) {
		o.Snapshot, o.OpID, o.Labels = "s1", id("oper", 1), map[string]string{"why": "test"}
	})
	if len(st.Layers) != 2 {
		t.Fatalf("layers after a snapshot: %+v", st.Layers)
	}
	for _, l := range st.Layers {
		if l.Head != (l.ID == id("oper", 1)) || !l.Head && (l.Snapshot != "s1" || !l.UserCreated || l.Labels["why"] != "test" || l.Created.IsZero()) {
			t.Errorf("layer %+v", l)
		}
	}
	if err := g.write(0, page("second")); err != nil {
		t.Fatal(err)
	}
	_, err := c.Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, Verb: "snapshot", Snapshot: "s1", OpID: id("oper", 2)})
	wantCode(t, "another snapshot of the same name", err, client.CodeExists)
	if st = do("expand", func(o *client.Operate) { o.SizeBytes, o.OpID = 32*mib, id("oper", 3) }); st.SizeBytes != 32*mib {
		t.Errorf("expanded to %d", st.SizeBytes)
	}
	if e, _ := b.p.list.volume(a.VolumeID); e.SizeBytes != 32*mib {
		t.Errorf("open.json says %d bytes", e.SizeBytes)
	}
	if g2 := guest(t, b.runDir, a.Volume); g2.size != 32*mib {
		t.Errorf("a guest that connects anew sees %d bytes", g2.size)
	}
	if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	a.Frontend = ""
	b.open(c, a)
	do("revert", func(o *client.Operate) { o.Snapshot, o.OpID = "s1", id("oper", 4) })
	do("snapshot-remove", func(o *client.Operate) { o.Snapshot = "s1" })
	do("purge", nil)
	if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	a.Frontend = "nbd"
	b.open(c, a)
	g = guest(t, b.runDir, a.Volume)
	if got, err := g.read(0, 4096); err != nil || !bytes.Equal(got, page("first")) {
		t.Errorf("after the revert: %.20q, %v", got, err)
	}
}

// TestTermAndBack ends the Process as SIGTERM does, and starts another: volumes come back without the catalogue, with the session raised.
func TestTermAndBack(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	var as []client.OpenVolume
	for n := range 3 {
		as = append(as, b.volume(c, n, 16*mib))
		b.open(c, as[n])
		if err := guest(t, b.runDir, as[n].Volume).write(0, page(as[n].Volume)); err != nil {
			t.Fatal(err)
		}
	}
	b.end()
	b.cat.away()
	waiting := guestLater(as[0].Volume, b.runDir)
	c = b.start()
	for _, a := range as {
		eventually(t, a.Volume+" is back", func() bool {
			st, ok := status(t, c, a.VolumeID)
			return ok && st.State == stateOpen
		})
		st, _ := status(t, c, a.VolumeID)
		if st.Epoch != 1 || st.Session != 2 {
			t.Errorf("%s came back as epoch %d, session %d, want 1 and 2", a.Volume, st.Epoch, st.Session)
		}
		if got, err := guest(t, b.runDir, a.Volume).read(0, 4096); err != nil || !bytes.Equal(got, page(a.Volume)) {
			t.Errorf("%s reads %.20q, %v", a.Volume, got, err)
		}
	}
	if err := <-waiting; err != nil {
		t.Errorf("a client that came while nobody served: %v", err)
	}
}

// guestLater connects now, and reads when somebody answers.
func guestLater(name, runDir string) <-chan error {
	done := make(chan error, 1)
	go func() {
		g, err := dialNBD(filepath.Join(runDir, "nbd", name+".sock"), name)
		if err == nil {
			_, err = g.read(0, 4096)
			g.Close()
		}
		done <- err
	}()
	return done
}

// TestOtherBoot proves that open.json of another boot is forgotten: its guests are gone.
func TestOtherBoot(t *testing.T) {
	b := newBed(t)
	b.cfg.BootID = "11111111-1111-1111-1111-111111111111"
	c := b.ready()
	a := b.volume(c, 1, 16*mib)
	b.open(c, a)
	if err := guest(t, b.runDir, a.Volume).write(0, page("x")); err != nil {
		t.Fatal(err)
	}
	b.end()
	b.cfg.BootID = "22222222-2222-2222-2222-222222222222"
	c = b.start()
	st, err := c.State(t.Context())
	if err != nil || len(st.Volumes) != 0 || len(st.Disks) != 0 {
		t.Errorf("after a reboot: %+v, %v", st, err)
	}
	if _, err := dialNBD(b.p.nbd.Path(a.Volume), a.Volume); err == nil {
		t.Error("the socket of another boot's volume is still there")
	}
	b.adopt(c)
	if st := b.open(c, a); st.Epoch != 2 || st.Session != 1 {
		t.Errorf("opened as epoch %d, session %d, want 2 and 1", st.Epoch, st.Session)
	}
	if got, err := guest(t, b.runDir, a.Volume).read(0, 4096); err != nil || !bytes.Equal(got, page("x")) {
		t.Errorf("reads %.20q, %v", got, err)
	}
}

// TestOpenListThatCannotBeRead starts with garbage, a newer format, and nonsense: nothing is opened, the file is put aside, and the agent opens as ever.
func TestOpenListThatCannotBeRead(t *testing.T) {
	for name, text := range map[string]string{
		"garbage":  "{\x00",
		"empty":    "",
		"newer":    `{"format":2,"bootID":"b","volumes":{},"salvage":{}}`,
		"nonsense": fmt.Sprintf(`{"format":1,"bootID":"b","volumes":{"%s":{"open":{"volume":"../../etc"}}},"salvage":{}}`, id("volu", 1)),
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			c := b.ready()
			a := b.volume(c, 1, mib)
			b.open(c, a)
			b.end()
			path := filepath.Join(client.DataDir(b.runDir), "open.json")
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			c = b.start()
			if st, err := c.State(t.Context()); err != nil || len(st.Volumes) != 0 {
				t.Errorf("volumes %+v, %v", st.Volumes, err)
			}
			if got, err := os.ReadFile(path + ".bad"); err != nil || string(got) != text {
				t.Errorf("put aside: %q, %v", got, err)
			}
			b.adopt(c)
			b.open(c, a)
		})
	}
}

// TestUnfinishedOpenIsForgotten: an entry without an epoch was written before an open that never ended, so nobody was served.
func TestUnfinishedOpenIsForgotten(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, mib)
	if err := b.p.list.put(openEntry{Open: a}); err != nil {
		t.Fatal(err)
	}
	b.end()
	c = b.start()
	if _, there := status(t, c, a.VolumeID); there {
		t.Error("a volume that nobody had open was opened")
	}
	b.open(c, a)
}

// TestCatalogueAway opens and closes while the agent does not answer.
func TestCatalogueAway(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a1, a2 := b.volume(c, 1, mib), b.volume(c, 2, mib)
	b.open(c, a1)
	b.cat.away()
	_, err := c.OpenVolume(t.Context(), a2)
	wantCode(t, "open without the catalogue", err, client.CodeUnreachable)
	if _, there := status(t, c, a2.VolumeID); there {
		t.Error("refused, and in the state")
	}
	_, err = c.Operate(t.Context(), client.Operate{VolumeID: a1.VolumeID, Verb: "snapshot", Snapshot: "s", OpID: id("oper", 1)})
	wantCode(t, "snapshot without the catalogue", err, client.CodeUnreachable)
	g := guest(t, b.runDir, a1.Volume)
	if err := errors.Join(g.write(0, page("x")), g.flush()); err != nil {
		t.Errorf("a guest's I/O without the catalogue: %v", err)
	}
	wantCode(t, "close without the catalogue", c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a1.VolumeID}), client.CodeUnreachable)
	if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a1.VolumeID}); err != nil {
		t.Errorf("it was closed all the same: %v", err)
	}
	b.cat.back()
	if st := b.open(c, a1); st.Epoch != 2 {
		t.Errorf("epoch %d, want 2", st.Epoch)
	}
	b.open(c, a2)
}

func TestShutdown(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, mib)
	b.open(c, a)
	if err := guest(t, b.runDir, a.Volume).write(0, page("x")); err != nil {
		t.Fatal(err)
	}
	if err := c.Shutdown(t.Context(), client.Shutdown{Holder: true}); err != nil {
		t.Fatal(err)
	}
	b.end()
	if !b.holder.stopped || len(b.holder.held) != 0 {
		t.Errorf("holder stopped %v, holds %v", b.holder.stopped, b.holder.held)
	}
	if f, err := loadOpenList(b.runDir, b.cfg.BootID); err != nil || len(f.snapshot().Volumes) != 0 {
		t.Errorf("open.json after a shutdown: %+v, %v", f.snapshot(), err)
	}
	if rec := b.cat.record(a.VolumeID); rec.WriterNode != "" {
		t.Errorf("record after a shutdown: %+v", rec)
	}
	for _, p := range []string{client.DataSocket(b.runDir, testVersion), filepath.Join(b.runDir, "nbd", "vol1.sock")} {
		if _, err := os.Stat(p); err == nil {
			t.Errorf("%s is still there", p)
		}
	}
}

// TestReopenTriesItsFrontendAgain: a volume whose socket's place is taken for a moment when it is reopened is not failed for that.
func TestReopenTriesItsFrontendAgain(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, mib)
	b.open(c, a)
	if err := c.Shutdown(t.Context(), client.Shutdown{}); err != nil {
		t.Fatal(err)
	}
	b.end()
	socket := filepath.Join(b.runDir, "nbd", a.Volume+".sock")
	if err := errors.Join(os.Remove(socket), os.WriteFile(socket, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	c = b.start()
	eventually(t, "it was tried", func() bool {
		f, err := loadOpenList(b.runDir, b.cfg.BootID)
		return err == nil && f.snapshot().Volumes[a.VolumeID].Session > 2
	})
	if err := os.Remove(socket); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the volume is back", func() bool { st, ok := status(t, c, a.VolumeID); return ok && st.State == stateOpen })
	if err := guest(t, b.runDir, a.Volume).write(0, page("x")); err != nil {
		t.Error(err)
	}
}

// TestRestartByVerb: without Holder the volumes are left for the next process.
func TestRestartByVerb(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, mib)
	b.open(c, a)
	if err := c.Shutdown(t.Context(), client.Shutdown{}); err != nil {
		t.Fatal(err)
	}
	b.end()
	c = b.start()
	eventually(t, "the volume is back", func() bool { st, ok := status(t, c, a.VolumeID); return ok && st.State == stateOpen })
	if st, _ := status(t, c, a.VolumeID); st.Epoch != 1 || st.Session != 2 {
		t.Errorf("came back as epoch %d, session %d, want 1 and 2", st.Epoch, st.Session)
	}
}

func TestStateRevisions(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, mib)
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
		return len(st.Layers) == 2 && !slices.ContainsFunc(st.Layers, func(l client.Layer) bool { return !l.Head && !l.Verified })
	})
	g.Close()
	if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	b.open(c, a)
	// What it takes on the disk is told a moment later.
	eventually(t, "its space is known", func() bool { st, _ := status(t, c, a.VolumeID); return st.Space.ExclusiveBytes > 0 })
	var st client.State
	eventually(t, "the state is still", func() bool {
		was := st.Rev
		st = b.state(c)
		return st.Rev == was
	})
	g = guest(t, b.runDir, a.Volume)
	if err := errors.Join(g.write(0, page("y")), g.flush()); err != nil {
		t.Fatal(err)
	}
	if now, err := c.State(t.Context()); err != nil || now.Rev != st.Rev {
		t.Errorf("revision %d became %d by plain I/O, %v", st.Rev, now.Rev, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	woke := make(chan client.State, 1)
	go func() {
		now, err := c.WaitState(ctx, st.Rev)
		if err != nil {
			t.Errorf("wait: %v", err)
		}
		woke <- now
	}()
	// Of a snapshot that is marked removed nothing else tells; when layers come or go, what they take is measured, and that is news by itself.
	if _, err := c.Operate(ctx, client.Operate{VolumeID: a.VolumeID, Verb: verbSnapshotRemove, Snapshot: "s", OpID: id("oper", 2)}); err != nil {
		t.Fatal(err)
	}
	if now, err := c.State(t.Context()); err != nil || now.Rev <= st.Rev {
		t.Fatalf("a snapshot was marked removed, and the revision is %d, it was %d: %v", now.Rev, st.Rev, err)
	}
	if now := <-woke; now.Rev <= st.Rev {
		t.Errorf("woke with revision %d after %d", now.Rev, st.Rev)
	}
	rev := st.Rev
	b.end()
	c = b.start()
	if now, err := c.State(t.Context()); err != nil || now.Rev <= rev {
		t.Errorf("the next process begins at revision %d, not beyond %d: %v", now.Rev, rev, err)
	}
}

// TestCheck looks at a volume open and closed, and finds what was damaged.
func TestCheck(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, 16*mib)
	b.open(c, a)
	g := guest(t, b.runDir, a.Volume)
	if err := g.write(mib, bytes.Repeat(page("rot"), 16)); err != nil {
		t.Fatal(err)
	}
	st, err := c.Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, Verb: "snapshot", Snapshot: "s", OpID: id("oper", 1)})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the snapshot has its checksums", func() bool {
		st, _ = status(t, c, a.VolumeID)
		for _, l := range st.Layers {
			if !l.Head && !l.Verified {
				return false
			}
		}
		return true
	})
	check := func(what string, ask client.Check, want bool) {
		t.Helper()
		got, err := c.Check(t.Context(), ask)
		if err != nil || (len(got.Problems) > 0) != want || (len(got.LeftOut) == 1) != (ask.VolumeID != "") {
			t.Errorf("%s: %+v, %v", what, got, err)
		}
	}
	closed := client.Check{DiskID: b.diskID, ReplicaID: a.ReplicaID}
	check("open", client.Check{VolumeID: a.VolumeID}, false)
	if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	check("closed", closed, false)
	_, err = c.Check(t.Context(), client.Check{VolumeID: a.VolumeID})
	wantCode(t, "a closed volume without its replica", err, client.CodeNotFound)
	file := filepath.Join(b.disk, b.state(c).Disks[0].Replicas[0].DataPath, a.ReplicaID+".layer")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(text, page("rot"))
	text[at+100] ^= 1
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	check("damaged and closed", closed, true)
	b.open(c, a)
	check("damaged and open", client.Check{VolumeID: a.VolumeID}, true)
	if _, err := guest(t, b.runDir, a.Volume).read(mib, 4096); !errors.Is(err, errnoIO) {
		t.Errorf("rot was read as data: %v", err)
	}
}

// TestCopyThatForgot: a copy that does not know the writer this process had (its directory was put back from a copy, say) is not served.
func TestCopyThatForgot(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, mib)
	b.open(c, a)
	err := b.p.list.change(func(f *openFile) {
		e := f.Volumes[a.VolumeID]
		e.Session += 5 // as if sessions had come and gone that the copy knows nothing of
		f.Volumes[a.VolumeID] = e
	})
	if err != nil {
		t.Fatal(err)
	}
	b.end()
	c = b.start()
	eventually(t, "the volume is refused", func() bool { st, _ := status(t, c, a.VolumeID); return st.State == stateFailed })
	if st, _ := status(t, c, a.VolumeID); st.Code != client.CodeFenced {
		t.Errorf("code %q: %s", st.Code, st.Error)
	}
	if _, err := dialNBD(b.p.nbd.Path(a.Volume), a.Volume); err == nil {
		t.Error("and yet it is exported")
	}
}

// TestOpenListComesFirst looks at open.json at the moment the catalogue is asked for the first time.
func TestOpenListComesFirst(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, mib)
	asked := false
	b.cat.onRead = func() {
		asked = true
		text, err := os.ReadFile(filepath.Join(client.DataDir(b.runDir), "open.json"))
		if err != nil {
			t.Error(err)
		}
		f, err := parseOpenFile(text)
		if err != nil || f.Volumes[a.VolumeID].Open != a {
			t.Errorf("a volume is being opened, and open.json says %s, %v", text, err)
		}
	}
	b.open(c, a)
	if !asked {
		t.Error("the catalogue was not asked")
	}
}

// TestOpenListIsReplacedWhole: a reader, or a successor, finds the old list or the new one.
func TestOpenListIsReplacedWhole(t *testing.T) {
	dir := shortDir(t)
	if err := os.MkdirAll(client.DataDir(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := loadOpenList(dir, "boot")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.useDisk(client.Disk{Path: "/d", ClusterID: "c"}); err != nil {
		t.Fatal(err)
	}
	old, err := os.Open(l.path)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	before, err := os.ReadFile(l.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.put(openEntry{Open: client.OpenVolume{VolumeID: id("volu", 1)}}); err != nil {
		t.Fatal(err)
	}
	still := make([]byte, len(before)+1)
	if n, _ := old.ReadAt(still, 0); !bytes.Equal(still[:n], before) {
		t.Error("the file that a reader had open was written to")
	}
	if again, err := loadOpenList(dir, "boot"); !errors.Is(err, errOpenList) && (err != nil || len(again.snapshot().Volumes) != 1) {
		t.Errorf("read again: %+v, %v", again.snapshot(), err)
	}
	if _, err := os.Stat(l.path + ".new"); err == nil {
		t.Error("the new file is left beside it")
	}
}

// TestStateNamesNoEmptyPlace: a place that somebody has just made for a volume he is about to open is no volume yet; told without a name it would be reported as one that
// no record names.
func TestStateNamesNoEmptyPlace(t *testing.T) {
	list, err := loadOpenList(t.TempDir(), "boot")
	if err != nil {
		t.Fatal(err)
	}
	p := &Process{board: newBoard(time.Now()), list: list, slotByID: map[string]*slot{}, diskByID: map[string]*diskDir{}, jobByID: map[string]*importJob{}}
	if p.nbd, err = newFrontend(Config{RunDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}, heldListeners{}); err != nil {
		t.Fatal(err)
	}
	defer p.nbd.Close()
	if _, err := p.newSlot(id("volu", 1)); err != nil {
		t.Fatal(err)
	}
	if st, err := p.State(t.Context()); err != nil || len(st.Volumes) != 0 {
		t.Errorf("%+v, %v", st.Volumes, err)
	}
}

func TestProcessors(t *testing.T) {
	for _, c := range []struct{ now, cached, direct int }{{1, 8, 8}, {2, 8, 8}, {4, 8, 16}, {12, 12, 48}, {16, 16, 64}, {48, 48, 64}, {96, 96, 96}} {
		if cached, direct := processors(c.now, false), processors(c.now, true); cached != c.cached || direct != c.direct {
			t.Errorf("with %d: %d and %d, want %d and %d", c.now, cached, direct, c.cached, c.direct)
		}
	}
}
