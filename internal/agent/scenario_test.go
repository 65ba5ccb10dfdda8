package agent_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/agent"
	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
)

// deeds is a copy of how often each verb did something.
func (w *world) deeds() map[string]int {
	w.host.mu.Lock()
	defer w.host.mu.Unlock()
	m := map[string]int{}
	for k, n := range w.host.deeds {
		m[k] = n
	}
	return m
}

func (w *world) attached(names ...string) {
	w.t.Helper()
	for _, n := range names {
		w.createVolume(n, "")
		w.attach(n, catalog.Ticket{})
	}
	w.settle(0)
	for _, n := range names {
		w.wantState(n, catalog.VolumeAttached, catalog.RobustnessHealthy)
	}
}

// TestServeRestart: control and agent stopped and started again, in any state of things, do nothing to what is as wanted.
func TestServeRestart(t *testing.T) {
	run(t, func(w *world) {
		w.attached("a", "b")
		before := w.deeds()
		for range 3 {
			w.stop()
			w.start()
			w.settle(2 * time.Minute)
		}
		after := w.deeds()
		for verb, n := range after {
			w.want(verb+" again", n == before[verb], before, after)
		}
		w.want("one data process", w.host.starts == 1, w.host.starts)
		w.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.stop()
		w.detach("a")
		w.start()
		w.settle(0)
		w.wantState("a", catalog.VolumeDetached, catalog.RobustnessUnknown)
		w.wantState("b", catalog.VolumeAttached, catalog.RobustnessHealthy)
	})
}

// TestDataRestart: what the data process reopened by itself is found, not opened again.
func TestDataRestart(t *testing.T) {
	run(t, func(w *world) {
		w.attached("a", "b")
		opened := w.deeds()["open-volume"]
		w.host.kill()
		w.settle(0)
		n, _ := get[catalog.NodeObserved](w, catalog.NodeKey(catalog.Observed, node))
		w.want("not ready while it is away", !n.Ready && n.Conditions[catalog.ConditionReady].Status == catalog.ConditionFalse, n)
		w.settle(10 * time.Second)
		n, _ = get[catalog.NodeObserved](w, catalog.NodeKey(catalog.Observed, node))
		w.want("ready again", n.Ready && w.host.starts == 2 && n.Data.PID == 1002, n)
		w.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.want("not opened again", w.deeds()["open-volume"] == opened, w.deeds())
		events, _, _ := catalog.All[catalog.EventRecord](t.Context(), w.mem, catalog.KindEvent, catalog.Wanted)
		w.want("an event says so", slices.ContainsFunc(events, func(e catalog.Item[catalog.EventRecord]) bool { return e.Value.Reason == "DataProcessRestarted" }), events)
	})
}

// TestCatalogueAway: while nobody knows what is wanted nothing is done, and afterwards everything is.
func TestCatalogueAway(t *testing.T) {
	run(t, func(w *world) {
		w.attached("a", "b")
		before := w.deeds()
		w.mem.Away(true)
		w.settle(5 * time.Minute)
		w.host.kill()
		w.settle(5 * time.Minute)
		w.want("nothing was done", len(w.deeds()) == len(before), w.deeds())
		w.mem.Away(false)
		w.detach("a")
		w.settle(3 * time.Second)
		w.wantState("a", catalog.VolumeDetached, catalog.RobustnessUnknown)
		w.wantState("b", catalog.VolumeAttached, catalog.RobustnessHealthy)
	})
}

// TestSlowNeighbour: a volume whose opening hangs, and an import that takes an hour, hold nobody up.
func TestSlowNeighbour(t *testing.T) {
	run(t, func(w *world) {
		release := make(chan struct{})
		var hang atomic.Bool
		hang.Store(true)
		w.host.setFault(func(ctx context.Context, verb string, early bool) error {
			if verb == "open-volume" && early && hang.CompareAndSwap(true, false) {
				<-release
			}
			return nil
		})
		w.createImage("big", "slow")
		w.createVolume("stuck", "")
		w.attach("stuck", catalog.Ticket{})
		w.settle(0)
		w.wantState("stuck", catalog.VolumeAttaching, catalog.RobustnessUnknown)
		w.attached("quick1", "quick2")
		w.createImage("small", "ok")
		w.settle(3 * time.Second)
		w.want("other image", w.imageState("small").State == catalog.ImageReady, w.imageState("small"))
		close(release)
		w.settle(0)
		w.wantState("stuck", catalog.VolumeAttached, catalog.RobustnessHealthy)
	})
}

// TestImportRetries: what may get better is tried again after 1, 2, 4, 5 minutes; a wrong checksum three times; a refused format never. A restart of serve changes nothing of that.
func TestImportRetries(t *testing.T) {
	run(t, func(w *world) {
		ids := map[string]string{}
		for _, s := range []string{"flaky", "bad", "evil"} {
			ids[s] = w.createImage(s, s).ID
		}
		tries := func(s string) int { return w.deeds()["import "+ids[s]] }
		w.settle(3 * time.Second)
		for _, s := range []string{"flaky", "bad", "evil"} {
			w.want(s+" failed", w.imageState(s).State == catalog.ImageFailed && w.imageState(s).Attempts == 1 && tries(s) == 1, w.imageState(s))
		}
		w.want("message", strings.Contains(w.imageState("evil").Message, "not tried again") && strings.Contains(w.imageState("flaky").Message, "1m0s"), w.imageState("evil"))
		w.settle(50 * time.Second)
		w.stop()
		w.start()
		w.settle(5 * time.Second)
		w.want("not before a minute has passed", tries("flaky") == 1, tries("flaky"))
		w.settle(8 * time.Second)
		w.want("second try", tries("flaky") == 2 && w.imageState("flaky").Attempts == 2 && tries("bad") == 2, w.imageState("flaky"))
		w.settle(110 * time.Second)
		w.want("third not before two minutes", tries("flaky") == 2, tries("flaky"))
		w.settle(15 * time.Second)
		w.want("ready at last", tries("flaky") == 3 && w.imageState("flaky").State == catalog.ImageReady && w.imageState("flaky").Message == "", w.imageState("flaky"))
		w.settle(2 * time.Hour)
		w.want("a wrong checksum is tried four times in all", tries("bad") == 4 && w.imageState("bad").NextTry.IsZero(), tries("bad"), w.imageState("bad"))
		w.want("a refused format once", tries("evil") == 1, tries("evil"))
	})
}

// TestImportInterrupted: an import that the data process's end interrupts begins again at once the first time.
func TestImportInterrupted(t *testing.T) {
	run(t, func(w *world) {
		id := w.createImage("i", "ok").ID
		w.settle(1500 * time.Millisecond)
		w.want("under way", w.imageState("i").State == catalog.ImageInProgress, w.imageState("i"))
		w.host.kill()
		w.settle(5 * time.Second)
		w.want("ready", w.imageState("i").State == catalog.ImageReady && w.deeds()["import "+id] == 2, w.imageState("i"), w.deeds())
	})
}

// TestDeleteImageUnderImport: an image that is deleted while it is imported leaves nothing.
func TestDeleteImageUnderImport(t *testing.T) {
	run(t, func(w *world) {
		w.createImage("i", "slow")
		w.settle(time.Second)
		w.buryImage("i")
		w.settle(time.Second)
		_, still := get[catalog.ImageWanted](w, catalog.ImageKey(catalog.Wanted, "i"))
		w.want("gone", !still && len(w.host.proc.jobs) == 0, w.image("i"), w.host.proc.jobs)
	})
}

// TestSalvage: a volume whose last copy failed is faulted and stays so, until a person decides; the decision counts once.
func TestSalvage(t *testing.T) {
	run(t, func(w *world) {
		w.attached("a")
		v, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, "a"))
		w.host.mu.Lock()
		st := w.host.proc.volumes[v.ID]
		st.State, st.Code, st.Error = "failed", client.CodeFailed, "flush failed"
		w.host.disks["/disks/default"].replicas[v.Replicas[0].ReplicaID].failed = "flush failed"
		w.host.proc.touch()
		w.host.mu.Unlock()
		w.settle(time.Minute)
		o := w.wantState("a", catalog.VolumeAttached, catalog.RobustnessFaulted)
		w.want("shown as failed", o.Replicas[0].Mode == "ERR" && o.Replicas[0].FailedAt != "" && strings.HasPrefix(o.Error, "flush failed"), o)
		id := w.operate("a", catalog.Operation{Verb: catalog.VerbSnapshot, Snapshot: "s"})
		w.settle(0)
		w.want("operation fails", w.operation("a", id).Code == catalog.CodeFailed, w.operation("a", id))

		w.detach("a")
		w.settle(time.Minute)
		w.wantState("a", catalog.VolumeDetached, catalog.RobustnessFaulted)
		w.attach("a", catalog.Ticket{})
		w.settle(time.Minute)
		o = w.wantState("a", catalog.VolumeDetached, catalog.RobustnessFaulted)
		w.want("not opened", w.host.proc.volumes[v.ID] == nil && strings.Contains(o.Error, "salvage"), o)
		w.update("a", func(v *catalog.VolumeWanted) { v.Salvage = true })
		w.settle(0)
		o = w.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		v, _ = get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, "a"))
		w.want("decided once", !v.Salvage && o.Error == "", v, o)
	})
}

// TestLostReplica: a replica that was written to and is gone is never made again, because an empty one would read as zeroes.
func TestLostReplica(t *testing.T) {
	run(t, func(w *world) {
		w.attached("a")
		w.detach("a")
		w.settle(0)
		v, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, "a"))
		w.host.mu.Lock()
		delete(w.host.disks["/disks/default"].replicas, v.Replicas[0].ReplicaID)
		w.host.proc.touch()
		w.host.mu.Unlock()
		w.attach("a", catalog.Ticket{})
		w.settle(time.Hour)
		o := w.wantState("a", catalog.VolumeDetached, catalog.RobustnessFaulted)
		w.want("made once only", w.deeds()["create-replica"] == 1 && strings.Contains(o.Error, "not on disk"), o)
		w.bury("a")
		w.settle(time.Minute)
		_, still := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, "a"))
		w.want("can be deleted", !still)
	})
}

// TestForeignDisk: a disk of another cluster is refused, and said to be.
func TestForeignDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		w.host.fault = func(_ context.Context, verb string, early bool) error {
			if verb == "adopt-disk" && early {
				return client.ErrForeignDisk
			}
			return nil
		}
		w.start()
		w.createVolume("a", "")
		w.settle(time.Minute)
		n, _ := get[catalog.NodeObserved](w, catalog.NodeKey(catalog.Observed, node))
		c := n.Disks["default"].Conditions[catalog.ConditionReady]
		w.want("disk refused", c.Status == catalog.ConditionFalse && strings.Contains(c.Message, "another cluster"), n)
		o := w.volume("a")
		s := o.Conditions[catalog.ConditionScheduled]
		w.want("volume not placed", o.State == catalog.VolumeCreating && s.Status == catalog.ConditionFalse && s.Reason == catalog.ReasonSchedulingFailure && strings.Contains(s.Message, "n1"), o)
	})
}

// TestScheduledLater: a volume that finds no disk is placed as soon as there is one.
func TestScheduledLater(t *testing.T) {
	run(t, func(w *world) {
		w.settle(0)
		allow := func(ok bool) {
			_, _, err := catalog.Update(t.Context(), w.mem, catalog.NodeKey(catalog.Wanted, node), func(n *catalog.NodeWanted) error { n.AllowScheduling = ok; return nil })
			if err != nil {
				t.Fatal(err)
			}
		}
		allow(false)
		w.createVolume("a", "")
		w.settle(0)
		s := w.volume("a").Conditions[catalog.ConditionScheduled]
		w.want("not placed", s.Status == catalog.ConditionFalse && strings.Contains(s.Message, "scheduling is disabled"), s)
		allow(true)
		w.settle(0)
		o := w.wantState("a", catalog.VolumeDetached, catalog.RobustnessUnknown)
		w.want("placed", o.Conditions[catalog.ConditionScheduled].Status == catalog.ConditionTrue, o)
	})
}

// TestDegraded: three copies wanted, one node: one copy, degraded, and said why.
func TestDegraded(t *testing.T) {
	run(t, func(w *world) {
		w.settle(0)
		w.put(catalog.VolumeKey(catalog.Wanted, "a"), catalog.VolumeWanted{Name: "a", ID: w.id(), SizeBytes: 1 << 24, Copies: 3, Frontend: "nbd",
			Tickets: []catalog.Ticket{{Node: node, Kind: catalog.TicketAPI}}})
		w.settle(time.Minute)
		o := w.wantState("a", catalog.VolumeAttached, catalog.RobustnessDegraded)
		w.want("why", o.Conditions[catalog.ConditionScheduled].Status == catalog.ConditionFalse, o)
	})
}

// stale is a catalogue whose watch shows tombstones that are not there, as a follower's of an old leader could.
type stale struct {
	*catalog.Mem
	lie func(catalog.Event) catalog.Event
}

func (s stale) Watch(ctx context.Context, from catalog.Rev, fn func(catalog.Event) error) error {
	return s.Mem.Watch(ctx, from, func(ev catalog.Event) error { return fn(s.lie(ev)) })
}

// TestTombstoneIsReadAgain: what the watch says is not enough to destroy anything.
func TestTombstoneIsReadAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		var lying atomic.Bool
		w.cat = stale{w.mem, func(ev catalog.Event) catalog.Event {
			if lying.Load() && ev.Key.Part == catalog.Wanted && (ev.Key.Kind == catalog.KindVolume || ev.Key.Kind == catalog.KindImage) && ev.Value != nil {
				ev.Value = append([]byte(`{"deleted":"2030-01-01T00:00:00Z",`), ev.Value[1:]...)
			}
			return ev
		}}
		w.start()
		w.settle(0)
		w.createImage("i", "ok")
		w.createVolume("a", "")
		w.settle(3 * time.Second)
		lying.Store(true)
		w.update("a", func(v *catalog.VolumeWanted) { v.Labels = map[string]string{"x": "y"} })
		_, _, err := catalog.Update(t.Context(), w.mem, catalog.ImageKey(catalog.Wanted, "i"), func(v *catalog.ImageWanted) error { v.MinCopies = 2; return nil })
		w.want("update", err == nil, err)
		w.settle(time.Minute)
		d := w.host.disks["/disks/default"]
		w.want("all is there", len(d.replicas) == 1 && len(d.images) == 1, d)
	})
}

// TestUsersAreReadAgain: an image is not destroyed under a volume the watch does not show.
func TestUsersAreReadAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		var lying atomic.Bool
		w.cat = stale{w.mem, func(ev catalog.Event) catalog.Event {
			if lying.Load() && ev.Key.Part == catalog.Wanted && ev.Key.Kind == catalog.KindVolume {
				ev.Value = bytes.Replace(ev.Value, []byte(`"imageID"`), []byte(`"hidden"`), 1)
			}
			return ev
		}}
		w.start()
		w.settle(0)
		w.createImage("i", "ok")
		w.createVolume("a", "i")
		w.settle(3 * time.Second)
		lying.Store(true)
		w.update("a", func(v *catalog.VolumeWanted) { v.Labels = map[string]string{"x": "y"} })
		w.settle(0)
		w.buryImage("i")
		w.settle(time.Minute)
		w.want("all is there", len(w.host.disks["/disks/default"].images) == 1)
	})
}

// TestUnrecorded: what no record names goes on, and is reported once.
func TestUnrecorded(t *testing.T) {
	run(t, func(w *world) {
		w.settle(0)
		h := &history{world: w}
		h.strays()
		w.settle(time.Hour)
		n, _ := get[catalog.NodeObserved](w, catalog.NodeKey(catalog.Observed, node))
		w.want("reported", len(n.Unrecorded) == 3, n.Unrecorded)
		w.want("left alone", len(w.host.proc.volumes) == 1 && len(w.host.disks["/disks/default"].images) == 1, w.host.proc.volumes)
		events, _, _ := catalog.All[catalog.EventRecord](t.Context(), w.mem, catalog.KindEvent, catalog.Wanted)
		count := 0
		for _, e := range events {
			if e.Value.Reason == "Unrecorded" {
				count += e.Value.Count
			}
		}
		w.want("one event each", count == 3, events)
	})
}

// TestOldCatalogue: a volume that runs with a later epoch than the catalogue knows is left as it is, whatever the catalogue wants.
func TestOldCatalogue(t *testing.T) {
	run(t, func(w *world) {
		w.attached("a")
		v, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, "a"))
		w.host.mu.Lock()
		w.host.proc.volumes[v.ID].Epoch = 9
		w.host.proc.touch()
		w.host.mu.Unlock()
		w.settle(0)
		w.detach("a")
		w.settle(time.Hour)
		w.want("still open", w.host.proc.volumes[v.ID] != nil)
	})
}

// TestExtra: counters, check and shutdown.
func TestExtra(t *testing.T) {
	run(t, func(w *world) {
		w.attached("a")
		seen := map[string]bool{}
		err := w.agent.VolumeCounters(t.Context(), func(v string, c map[string]uint64) { _, seen[v] = c["readOps"] })
		w.want("counters", err == nil && seen["a"], err, seen)
		p, err := w.agent.Check(t.Context(), "a")
		w.want("check", err == nil && len(p) == 1, err, p)
		_, err = w.agent.Check(t.Context(), "nobody")
		w.want("check of nothing", errors.Is(err, catalog.ErrNotFound), err)
		w.want("shutdown", w.agent.Shutdown(t.Context()) == nil)
		w.want("shutdown again", w.agent.Shutdown(t.Context()) == nil)
		w.settle(time.Hour)
		w.want("not started again", w.host.starts == 1, w.host.starts)
		w.stop()
		w.start()
		w.settle(5 * time.Second)
		w.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
	})
}

// TestFormatOfTheFuture: a catalogue of a later version is refused.
func TestFormatOfTheFuture(t *testing.T) {
	m := catalog.NewMem()
	if _, err := catalog.Write(t.Context(), m, catalog.ClusterKey(), catalog.Cluster{ID: "x", Format: catalog.Format + 1}, 0); err != nil {
		t.Fatal(err)
	}
	a, err := agent.New(agent.Config{Node: node, Catalog: m, EnsureData: newHost(m).ensure})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Run(t.Context()); !errors.Is(err, agent.ErrFormat) {
		t.Fatal(err)
	}
}

// TestLedger: the engine's port to the catalogue.
func TestLedger(t *testing.T) {
	m := catalog.NewMem()
	a, err := agent.New(agent.Config{Node: node, Catalog: m, EnsureData: newHost(m).ensure})
	if err != nil {
		t.Fatal(err)
	}
	l, ctx := a.Ledger(), t.Context()
	check := func(what string, got, want error) {
		t.Helper()
		if !errors.Is(got, want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	_, err = l.Read(ctx, "v")
	check("read of nothing", err, client.ErrNotFound)
	_, err = l.Swap(ctx, client.MembershipSwap{VolumeID: "v", Record: []byte(`{"volumeID":"v"}`)})
	check("making a record", err, client.ErrNotFound)
	rev, err := catalog.Write(ctx, m, catalog.MembershipKey("v"), catalog.Membership{VolumeID: "v"}, 0)
	check("first record", err, nil)
	odd := []byte(`{ "volumeID":"v", "later":1 }`)
	_, err = l.Swap(ctx, client.MembershipSwap{VolumeID: "v", Record: []byte(`{"volumeID":"w"}`), Was: int64(rev)})
	check("another volume's record", err, client.ErrInvalid)
	next, err := l.Swap(ctx, client.MembershipSwap{VolumeID: "v", Record: odd, Was: int64(rev)})
	check("swap", err, nil)
	_, err = l.Swap(ctx, client.MembershipSwap{VolumeID: "v", Record: odd, Was: int64(rev)})
	check("swap again", err, client.ErrConflict)
	e, err := l.Read(ctx, "v")
	if err != nil || string(e.Record) != string(odd) || e.Rev != next {
		t.Errorf("read %s at %d: %v", e.Record, e.Rev, err)
	}
	m.Away(true)
	_, err = l.Read(ctx, "v")
	check("read while away", err, client.ErrUnreachable)
	_, err = l.Swap(ctx, client.MembershipSwap{VolumeID: "v", Record: odd, Was: next})
	check("swap while away", err, client.ErrUnreachable)
}

// TestRunningIsRecordedFirst: an operation is on record as running before it does anything.
func TestRunningIsRecordedFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		states := make(chan string, 9)
		w.host.fault = func(_ context.Context, verb string, early bool) error {
			if verb == "operate" && early {
				ops, _, _ := catalog.All[catalog.Operation](context.Background(), w.mem, catalog.KindOperation, catalog.Wanted)
				states <- ops[0].Value.State
			}
			return nil
		}
		w.start()
		w.attached("a")
		id := w.operate("a", catalog.Operation{Verb: catalog.VerbSnapshot, Snapshot: "s"})
		w.settle(0)
		close(states)
		var got []string
		for s := range states {
			got = append(got, s)
		}
		w.want("running, then done", slices.Equal(got, []string{catalog.OperationRunning}) && w.operation("a", id).State == catalog.OperationDone, got)
	})
}
