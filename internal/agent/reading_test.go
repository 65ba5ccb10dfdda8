package agent_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
)

// temporaries are the temporary snapshots of a volume that are not removed, and the sources that are open.
func (w *world) temporaries(name string) (snapshots []string, sources int) {
	v, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, name))
	w.host.mu.Lock()
	defer w.host.mu.Unlock()
	for _, l := range w.host.disks["/disks/default"].replicas[v.Replicas[0].ReplicaID].layers {
		if l.Labels[catalog.LabelReading] != "" && !l.Removed {
			snapshots = append(snapshots, l.Snapshot)
		}
	}
	return snapshots, len(w.host.proc.sources)
}

func (w *world) wantNothingLeft(name string) {
	w.t.Helper()
	snapshots, sources := w.temporaries(name)
	w.want("nothing of a reading is left", len(snapshots) == 0 && sources == 0, snapshots, sources)
	w.host.mu.Lock()
	defer w.host.mu.Unlock()
	for _, j := range w.host.proc.jobs {
		w.want("no export is remembered", j.Kind != "export", *j)
	}
}

// createVolumeImage is an image made from a volume, as the API records it.
func (w *world) createVolumeImage(name, volume, snapshot string) catalog.ImageWanted {
	i := catalog.ImageWanted{
		Name: name, ID: w.id(), SourceType: catalog.SourceVolume, MinCopies: 1, Created: time.Now().UTC(),
		Parameters: map[string]string{"volume-name": volume, "export-type": "raw"},
	}
	if snapshot != "" {
		i.Parameters["snapshot-name"] = snapshot
	}
	w.put(catalog.ImageKey(catalog.Wanted, name), i)
	return i
}

// TestLimits: limits hold from the first request on, change while the volume is open, and are said again to a process that forgot them.
func TestLimits(t *testing.T) {
	run(t, func(w *world) {
		w.createVolume("a", "")
		w.update("a", func(v *catalog.VolumeWanted) { v.Limits.IOPS = 100 })
		w.attach("a", catalog.Ticket{})
		w.settle(0)
		now := func() client.Limits {
			w.host.mu.Lock()
			defer w.host.mu.Unlock()
			for _, v := range w.host.proc.volumes {
				return v.Limits
			}
			return client.Limits{}
		}
		w.want("opened with limits", now().IOPS == 100 && w.deeds()["set-limits"] == 0, now(), w.deeds())
		w.update("a", func(v *catalog.VolumeWanted) { v.Limits = catalog.Limits{BytesPerSecond: 5, BurstSeconds: 3} })
		w.settle(0)
		w.want("changed", now() == client.Limits{BytesPerSecond: 5, BurstSeconds: 3} && w.deeds()["open-volume"] == 1, now(), w.deeds())
		w.host.kill()
		w.settle(5 * time.Second)
		w.want("said again", now() == client.Limits{BytesPerSecond: 5, BurstSeconds: 3} && w.deeds()["set-limits"] == 2, now(), w.deeds())
		w.settle(time.Hour)
		w.want("and not again and again", w.deeds()["set-limits"] == 2, w.deeds())
	})
}

// TestBackgroundRate: every data process knows what its own work may move.
func TestBackgroundRate(t *testing.T) {
	run(t, func(w *world) {
		rate := func() int64 {
			w.host.mu.Lock()
			defer w.host.mu.Unlock()
			return w.host.proc.background
		}
		w.put(catalog.SettingKey(catalog.SettingBackgroundRate), catalog.Setting{Name: catalog.SettingBackgroundRate, Value: "7"})
		w.settle(0)
		w.want("said", rate() == 7<<20, rate())
		w.host.kill()
		w.settle(5 * time.Second)
		w.want("said again", w.host.starts == 2 && rate() == 7<<20, rate())
		_, rev, _ := catalog.Read[catalog.Setting](t.Context(), w.mem, catalog.SettingKey(catalog.SettingBackgroundRate))
		w.want("default again", w.mem.Delete(t.Context(), catalog.SettingKey(catalog.SettingBackgroundRate), rev) == nil)
		w.settle(0)
		w.want("no limit", rate() == 0, rate())
	})
}

// TestNetwork: every data process offers volumes over TCP as the node is configured, and the node says when it cannot.
func TestNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		w.net = client.Network{Address: "127.0.0.1:10809"}
		var taken atomic.Bool
		taken.Store(true)
		w.host.setFault(func(_ context.Context, verb string, early bool) error {
			if verb == "set-network" && early && taken.Load() {
				return fmt.Errorf("listen: %w", client.ErrInUse)
			}
			return nil
		})
		w.start()
		w.settle(time.Minute)
		condition := func() catalog.Condition {
			n, _ := get[catalog.NodeObserved](w, catalog.NodeKey(catalog.Observed, node))
			return n.Conditions[catalog.ConditionNetwork]
		}
		w.want("says so", condition().Status == catalog.ConditionFalse && strings.Contains(condition().Message, "in use"), condition())
		taken.Store(false)
		w.settle(10 * time.Second)
		w.want("offered", condition().Status == catalog.ConditionTrue && w.host.proc.network == w.net, condition())
		w.host.kill()
		w.settle(10 * time.Second)
		w.want("offered again", w.host.starts == 2 && w.host.proc.network == w.net, w.host.proc.network)
		w.stop()
		w.net = client.Network{}
		w.start()
		w.settle(time.Second)
		w.want("no more", condition().Status == "" && w.host.proc.network == w.net, condition())
	})
}

// TestMounted: a block device that is mounted is not taken away; it is asked for now and then, and gone when it is unmounted.
func TestMounted(t *testing.T) {
	run(t, func(w *world) {
		w.createVolume("a", "")
		w.update("a", func(v *catalog.VolumeWanted) { v.Frontend = catalog.FrontendBlockdev })
		w.attach("a", catalog.Ticket{})
		w.settle(0)
		w.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		var mounted atomic.Bool
		var asked atomic.Int32
		mounted.Store(true)
		w.host.setFault(func(_ context.Context, verb string, early bool) error {
			if verb == "close-volume" && early && mounted.Load() {
				asked.Add(1)
				return fmt.Errorf("close: %w", client.ErrInUse)
			}
			return nil
		})
		w.detach("a")
		w.settle(time.Minute)
		o := w.wantState("a", catalog.VolumeDetaching, catalog.RobustnessUnknown)
		w.want("why", strings.HasSuffix(o.Error, "is mounted or open; unmount it"), o.Error)
		w.want("for programs", o.Conditions[catalog.ConditionInUse].Status == catalog.ConditionTrue, o.Conditions)
		w.want("asked now and then", asked.Load() > 5 && asked.Load() < 30, asked.Load())
		w.attach("a", catalog.Ticket{})
		w.settle(0)
		o = w.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.want("wanted again", o.Error == "" && o.Conditions[catalog.ConditionInUse].Status == "", o)
		w.detach("a")
		w.settle(time.Minute)
		mounted.Store(false)
		w.settle(6 * time.Second)
		o = w.wantState("a", catalog.VolumeDetached, catalog.RobustnessUnknown)
		w.want("nothing to complain of", o.Error == "" && o.Conditions[catalog.ConditionInUse].Status == "", o)
	})
}

// TestShutdownMounted: a node whose block device is mounted is not shut down: whoever asks is told, and it goes on as before; unmounted, it is.
func TestShutdownMounted(t *testing.T) {
	run(t, func(w *world) {
		w.attached("a")
		var mounted atomic.Bool
		mounted.Store(true)
		w.host.setFault(func(_ context.Context, verb string, early bool) error {
			if verb == "shutdown" && early && mounted.Load() {
				return fmt.Errorf("close: %w", client.ErrInUse)
			}
			return nil
		})
		err := w.agent.Shutdown(t.Context())
		w.want("refused", errors.Is(err, client.ErrInUse), err)
		w.createVolume("b", "")
		w.attach("b", catalog.Ticket{})
		w.settle(5 * time.Second)
		w.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.wantState("b", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.want("the same data process", w.host.starts == 1, w.host.starts)
		mounted.Store(false)
		w.want("unmounted", w.agent.Shutdown(t.Context()) == nil)
		w.settle(time.Minute)
		w.want("it ended", w.host.starts == 1, w.host.starts)
	})
}

// TestImageFromVolume: an image of a volume's present or of a snapshot of it; the volume is as before, and nothing of it is left, whatever stops in the middle.
func TestImageFromVolume(t *testing.T) {
	run(t, func(w *world) {
		w.createVolume("det", "")
		w.attached("att")
		w.settle(0)
		s := w.operate("att", catalog.Operation{Verb: catalog.VerbSnapshot, Snapshot: "s1"})
		w.settle(0)
		w.want("snapshot", w.operation("att", s).State == catalog.OperationDone)
		ready := func(names ...string) {
			t.Helper()
			for _, n := range names {
				w.want(n+" ready", w.imageState(n).State == catalog.ImageReady && w.image(n).CurrentChecksum != "", w.image(n))
			}
		}
		w.createVolumeImage("i1", "det", "")
		w.createVolumeImage("i2", "att", "")
		w.createVolumeImage("i3", "att", "s1")
		w.settle(time.Second)
		w.wantState("det", catalog.VolumeDetached, catalog.RobustnessUnknown)
		snapshots, sources := w.temporaries("det")
		w.want("under way", len(snapshots) == 1 && strings.HasPrefix(snapshots[0], "i1-") && sources == 3, snapshots, sources)
		o := w.volume("det").Snapshots
		w.want("shown as the system's", slices.ContainsFunc(o, func(s catalog.SnapshotObserved) bool {
			return !s.UserCreated && s.Labels[catalog.LabelImageExport] == "i1"
		}), o)
		w.settle(5 * time.Second)
		ready("i1", "i2", "i3")
		w.wantState("det", catalog.VolumeDetached, catalog.RobustnessUnknown)
		w.wantState("att", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.want("closed again", len(w.host.proc.volumes) == 1, w.host.proc.volumes)
		w.wantNothingLeft("det")
		w.wantNothingLeft("att")

		// serve stops in the middle; the data process ends in the middle; the volume is attached and detached in the middle
		w.createVolumeImage("i4", "det", "")
		w.settle(time.Second)
		w.stop()
		w.start()
		w.settle(5 * time.Second)
		ready("i4")
		w.createVolumeImage("i5", "det", "")
		w.settle(time.Second)
		w.host.kill()
		w.settle(10 * time.Second)
		ready("i5")
		w.createVolumeImage("i6", "det", "")
		w.settle(time.Second)
		w.attach("det", catalog.Ticket{})
		w.settle(0)
		w.wantState("det", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.settle(5 * time.Second)
		ready("i6")
		w.detach("det")
		w.settle(5 * time.Second)
		w.wantState("det", catalog.VolumeDetached, catalog.RobustnessUnknown)
		w.wantNothingLeft("det")

		// what it is made from is not there yet
		w.createVolumeImage("i7", "later", "")
		w.createVolumeImage("i8", "att", "nosuch")
		w.settle(5 * time.Second)
		w.want("no volume", w.imageState("i7").State == catalog.ImageFailed && strings.Contains(w.imageState("i7").Message, "no volume later"), w.imageState("i7"))
		w.want("no snapshot", w.imageState("i8").State == catalog.ImageFailed && !w.imageState("i8").NextTry.IsZero(), w.imageState("i8"))
		w.createVolume("later", "")
		w.settle(2 * time.Minute)
		ready("i7")
		w.wantNothingLeft("later")

		// deleted in the middle
		w.createVolumeImage("i9", "det", "")
		w.settle(time.Second)
		w.buryImage("i9")
		w.settle(time.Second)
		w.wantState("det", catalog.VolumeDetached, catalog.RobustnessUnknown)
		_, still := get[catalog.ImageWanted](w, catalog.ImageKey(catalog.Wanted, "i9"))
		w.want("gone", !still && len(w.host.proc.volumes) == 1, w.host.proc.volumes)
		w.wantNothingLeft("det")
	})
}

// TestExport: a file of a volume or a snapshot, from whatever state it is in, through whatever stops in the middle.
func TestExport(t *testing.T) {
	run(t, func(w *world) {
		w.createVolume("det", "")
		w.attached("att")
		export := func(volume, snapshot, path string) string {
			return w.operate(volume, catalog.Operation{Verb: catalog.VerbExport, Snapshot: snapshot, Path: path, Format: "raw"})
		}
		done := func(volume, id string) {
			t.Helper()
			w.want("done", w.operation(volume, id).State == catalog.OperationDone && w.operation(volume, id).Progress == 100, w.operation(volume, id))
			w.wantNothingLeft(volume)
		}
		a, d := export("att", "", "/a1"), export("det", "", "/d1")
		w.settle(1500 * time.Millisecond)
		w.want("under way", w.operation("att", a).Progress == 50 && w.operation("det", d).State == catalog.OperationRunning, w.operation("att", a))
		s := w.operate("att", catalog.Operation{Verb: catalog.VerbSnapshot, Snapshot: "s1"})
		w.settle(0)
		w.want("a snapshot meanwhile", w.operation("att", s).State == catalog.OperationDone, w.operation("att", s))
		w.settle(time.Second)
		done("att", a)
		done("det", d)
		w.wantState("det", catalog.VolumeDetached, catalog.RobustnessUnknown)
		w.want("closed again", len(w.host.proc.volumes) == 1, w.host.proc.volumes)

		for name, c := range map[string]struct{ snapshot, path, code string }{
			"there already": {"", "/a1", catalog.CodeExists}, "disk full": {"", "/full", catalog.CodeNoSpace}, "no such snapshot": {"none", "/a2", catalog.CodeNotFound},
		} {
			id := export("att", c.snapshot, c.path)
			w.settle(3 * time.Second)
			w.want(name, w.operation("att", id).Code == c.code && w.operation("att", id).Message != "", w.operation("att", id))
			w.wantNothingLeft("att")
		}
		middle := func(volume, path string, what func()) {
			t.Helper()
			id := export(volume, "", path)
			w.settle(time.Second)
			what()
			w.settle(10 * time.Second)
			done(volume, id)
			w.want("one file", w.host.files[path] == 1, w.host.files)
		}
		middle("att", "/m1", func() { w.stop(); w.start() })
		middle("att", "/m2", w.host.kill)
		middle("att", "/m3", func() { w.stop(); w.settle(time.Minute); w.start() })
		middle("det", "/m4", func() {
			w.attach("det", catalog.Ticket{})
			w.settle(0)
			w.wantState("det", catalog.VolumeAttached, catalog.RobustnessHealthy)
		})
		middle("det", "/m5", func() {
			w.detach("det")
			w.settle(0)
			w.wantState("det", catalog.VolumeDetached, catalog.RobustnessUnknown)
		})
		w.settle(0)
		w.wantState("det", catalog.VolumeDetached, catalog.RobustnessUnknown)
		id := export("det", "", "/gone")
		w.settle(time.Second)
		w.bury("det")
		w.settle(time.Minute)
		_, still := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, "det"))
		w.want("deleted under it", !still && w.operation("det", id).ID == "" && w.host.files["/gone"] == 0, w.host.files)
		w.wantNothingLeft("att")
	})
}

// TestTemporarySnapshotsAreBounded: however often the present is exported, removed temporary snapshots do not pile up.
func TestTemporarySnapshotsAreBounded(t *testing.T) {
	run(t, func(w *world) {
		w.attached("a")
		for i := range 20 {
			w.operate("a", catalog.Operation{Verb: catalog.VerbExport, Path: fmt.Sprintf("/%d", i), Format: "raw"})
			w.settle(3 * time.Second)
		}
		n := len(w.volume("a").Snapshots)
		w.want("few layers", n < 6 && len(w.host.files) == 20, n, w.host.files)
	})
}

// TestDiskAway: a disk that cannot be read any more makes its volumes faulted or unknown, with the reason; nothing is deleted or made; when it is back all is as before.
func TestDiskAway(t *testing.T) {
	run(t, func(w *world) {
		w.createImage("i", "ok")
		w.createVolume("det", "")
		w.settle(3 * time.Second)
		w.attached("att")
		before := w.deeds()
		set := func(total int64, text string) {
			w.host.mu.Lock()
			defer w.host.mu.Unlock()
			d := w.host.disks["/disks/default"]
			d.status.TotalBytes, d.status.Error = total, text
			w.host.proc.touch()
		}
		set(0, "statfs: input/output error")
		w.settle(time.Minute)
		n, _ := get[catalog.NodeObserved](w, catalog.NodeKey(catalog.Observed, node))
		c := n.Disks["default"].Conditions[catalog.ConditionReady]
		w.want("disk not ready", c.Status == catalog.ConditionFalse && strings.Contains(c.Message, "input/output"), c)
		o := w.wantState("att", catalog.VolumeAttached, catalog.RobustnessFaulted)
		w.want("why", strings.Contains(o.Error, "input/output"), o.Error)
		o = w.wantState("det", catalog.VolumeDetached, catalog.RobustnessUnknown)
		w.want("why", strings.Contains(o.Error, "input/output"), o.Error)
		w.want("image unknown", w.imageState("i").State == catalog.ImageUnknown, w.imageState("i"))
		w.attach("det", catalog.Ticket{})
		w.settle(time.Minute)
		w.wantState("det", catalog.VolumeAttaching, catalog.RobustnessUnknown)
		w.detach("det")
		w.settle(0)
		set(1<<40, "")
		w.settle(0)
		o = w.wantState("att", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.want("forgotten", o.Error == "" && o.Replicas[0].FailedAt == "", o)
		w.wantState("det", catalog.VolumeDetached, catalog.RobustnessUnknown)
		w.want("image ready", w.imageState("i").State == catalog.ImageReady, w.imageState("i"))
		for verb, n := range w.deeds() {
			w.want("nothing was done: "+verb, n == before[verb] || verb == "adopt-disk" && n < 30, before, w.deeds())
		}

		// The data process ends, and its directory is an empty one meanwhile: nobody formats it.
		w.host.mu.Lock()
		d := w.host.disks["/disks/default"]
		delete(w.host.disks, "/disks/default")
		w.host.mu.Unlock()
		w.host.kill()
		w.settle(time.Minute)
		n, _ = get[catalog.NodeObserved](w, catalog.NodeKey(catalog.Observed, node))
		c = n.Disks["default"].Conditions[catalog.ConditionReady]
		w.want("not adopted", c.Status == catalog.ConditionFalse && c.Reason == "NotAdopted" && len(w.host.disks) == 0, c)
		w.wantState("det", catalog.VolumeDetached, catalog.RobustnessUnknown)
		w.host.mu.Lock()
		w.host.disks["/disks/default"] = d
		w.host.proc.touch()
		w.host.mu.Unlock()
		w.settle(time.Minute)
		w.wantState("att", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.want("nothing was made", w.deeds()["create-replica"] == 2, w.deeds())
	})
}
