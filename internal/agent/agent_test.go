package agent_test

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/agent"
	"ashlar/internal/catalog"
	"ashlar/internal/control"
	"ashlar/internal/dataplane/client"
)

const node = "n1"

// world is one node: catalogue, control, agent and a data process, in a synctest bubble.
type world struct {
	t    *testing.T
	mem  *catalog.Mem
	cat  catalog.Catalog // as control and agent see it
	host *host
	ids  int
	dir  string // the run directory; "": none
	net  client.Network
	calm time.Duration // Config.Resync

	agent *agent.Agent
	up    atomic.Bool // control and agent run
	stop  func()      // stops them
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, mem: catalog.NewMem(), stop: func() {}}
	w.cat, w.host = w.mem, newHost(w.mem)
	return w
}

func (w *world) id() string {
	w.ids++
	return fmt.Sprintf("%032x", 0xabc000+w.ids)
}

// start starts control and agent; what it returns stops them.
func (w *world) start() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	log := slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelError}))
	a, err := agent.New(agent.Config{
		Node: node, Address: "127.0.0.1", Catalog: w.cat, EnsureData: w.host.ensure, NewID: nil, Log: log, RunDir: w.dir, Network: w.net, Resync: w.calm,
		Disks: map[string]catalog.DiskWanted{"default": {Path: "/disks/default", AllowScheduling: true}},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.agent = a
	w.host.mu.Lock()
	w.host.ledger = unsureLedger{a.Ledger(), w}
	w.host.mu.Unlock()
	c := control.New(control.Config{Catalog: w.cat, Log: log})
	done := make(chan struct{}, 2)
	go func() { _ = a.Run(ctx); done <- struct{}{} }()
	go func() { _ = c.Run(ctx); done <- struct{}{} }()
	w.up.Store(true)
	w.stop = func() {
		w.up.Store(false)
		cancel()
		<-done
		<-done
		w.stop = func() {}
	}
}

// end stops everything and tells what must never have happened.
func (w *world) end() {
	w.t.Helper()
	w.stop()
	w.host.kill()
	w.mem.Close()
	for _, wrong := range w.host.wrongs {
		w.t.Error(wrong)
	}
}

func run(t *testing.T, fn func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		w.start()
		fn(w)
	})
}

func (w *world) settle(d time.Duration) {
	if d > 0 {
		<-time.After(d)
	}
	synctest.Wait()
}

func get[T any](w *world, k catalog.Key) (v T, ok bool) {
	v, rev, _ := catalog.Read[T](context.Background(), w.mem, k)
	return v, rev != 0
}

func (w *world) volume(name string) catalog.VolumeObserved {
	v, _ := get[catalog.VolumeObserved](w, catalog.VolumeKey(catalog.Observed, name))
	return v
}

func (w *world) image(name string) catalog.ImageObserved {
	v, _ := get[catalog.ImageObserved](w, catalog.ImageKey(catalog.Observed, name))
	return v
}

func (w *world) imageState(name string) catalog.ImageOnDisk {
	for _, d := range w.image(name).Disks {
		return d
	}
	return catalog.ImageOnDisk{}
}

// createVolume is what the API does.
func (w *world) createVolume(name, image string) catalog.VolumeWanted {
	v := catalog.VolumeWanted{Name: name, ID: w.id(), SizeBytes: 16 << 20, Copies: 1, Frontend: catalog.FrontendNBD, Created: time.Now().UTC()}
	if image != "" {
		img, _ := get[catalog.ImageWanted](w, catalog.ImageKey(catalog.Wanted, image))
		v.Image, v.ImageID = image, img.ID
	}
	w.put(catalog.VolumeKey(catalog.Wanted, name), v)
	return v
}

func (w *world) put(k catalog.Key, v any) {
	w.t.Helper()
	if _, err := catalog.Write(context.Background(), w.mem, k, v, 0); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) update(name string, fn func(*catalog.VolumeWanted)) {
	w.t.Helper()
	_, _, err := catalog.Update(context.Background(), w.mem, catalog.VolumeKey(catalog.Wanted, name), func(v *catalog.VolumeWanted) error { fn(v); return nil })
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) attach(name string, t catalog.Ticket) {
	w.t.Helper()
	if t.Node == "" {
		t.Node = node
	}
	t.Kind = catalog.TicketAPI
	w.update(name, func(v *catalog.VolumeWanted) { v.Tickets = []catalog.Ticket{t} })
}

func (w *world) detach(name string) {
	w.t.Helper()
	w.update(name, func(v *catalog.VolumeWanted) { v.Tickets = nil })
}

func (w *world) bury(name string) {
	w.t.Helper()
	now := time.Now().UTC()
	w.update(name, func(v *catalog.VolumeWanted) { v.Deleted, v.Tickets = &now, nil })
}

func (w *world) createImage(name, source string) catalog.ImageWanted {
	i := catalog.ImageWanted{
		Name: name, ID: w.id(), SourceType: catalog.SourceDownload, Parameters: map[string]string{"url": "http://" + source}, MinCopies: 1, Created: time.Now().UTC(),
	}
	w.put(catalog.ImageKey(catalog.Wanted, name), i)
	return i
}

func (w *world) buryImage(name string) {
	w.t.Helper()
	now := time.Now().UTC()
	_, _, err := catalog.Update(context.Background(), w.mem, catalog.ImageKey(catalog.Wanted, name), func(v *catalog.ImageWanted) error { v.Deleted = &now; return nil })
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) operate(volume string, op catalog.Operation) string {
	w.t.Helper()
	v, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, volume))
	op.ID, op.Volume, op.VolumeID, op.State, op.Created = w.id(), volume, v.ID, catalog.OperationPending, time.Now().UTC()
	w.put(catalog.OperationKey(volume, op.ID), op)
	return op.ID
}

func (w *world) operation(volume, id string) catalog.Operation {
	op, _ := get[catalog.Operation](w, catalog.OperationKey(volume, id))
	return op
}

func (w *world) want(what string, ok bool, got ...any) {
	w.t.Helper()
	if !ok {
		w.t.Fatalf("%s: got %+v", what, got)
	}
}

func (w *world) wantState(name, state, robustness string) catalog.VolumeObserved {
	w.t.Helper()
	v := w.volume(name)
	w.want(fmt.Sprintf("volume %s should be %s, %s", name, state, robustness), v.State == state && v.Robustness == robustness, v)
	return v
}

// TestWholeLife: image, volume, attach, snapshot, expand, detach, delete: the main job, and nothing of it takes any time but the import.
func TestWholeLife(t *testing.T) {
	run(t, func(w *world) {
		w.settle(0)
		n, _ := get[catalog.NodeObserved](w, catalog.NodeKey(catalog.Observed, node))
		w.want("node ready", n.Ready && n.Disks["default"].DiskID != "" && n.Disks["default"].Conditions[catalog.ConditionSchedulable].Status == catalog.ConditionTrue, n)

		w.createImage("debian", "ok")
		v := w.createVolume("db1", "debian")
		w.attach("db1", catalog.Ticket{})
		w.settle(0)
		w.wantState("db1", catalog.VolumeCreating, catalog.RobustnessUnknown)
		c := w.volume("db1").Conditions[catalog.ConditionWaitForImage]
		w.want("waiting for the image", c.Status == catalog.ConditionTrue && c.Reason == catalog.ReasonWaiting, c)
		w.settle(1500 * time.Millisecond)
		w.want("progress", w.imageState("debian").State == catalog.ImageInProgress && w.imageState("debian").Progress == 50, w.image("debian"))
		w.settle(time.Second)
		w.want("image ready", w.imageState("debian").State == catalog.ImageReady && w.image("debian").CurrentChecksum != "", w.image("debian"))
		o := w.wantState("db1", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.want("endpoint", strings.Contains(o.Endpoint, "db1.sock") && o.Node == node && len(o.Snapshots) == 1 && o.Snapshots[0].Name == "volume-head", o)
		c = o.Conditions[catalog.ConditionWaitForImage]
		w.want("waiting no more", c.Status == catalog.ConditionFalse, c)

		start := time.Now()
		w.createVolume("db2", "debian")
		w.attach("db2", catalog.Ticket{})
		w.settle(0)
		w.wantState("db2", catalog.VolumeAttached, catalog.RobustnessHealthy)
		id := w.operate("db1", catalog.Operation{Verb: catalog.VerbSnapshot, Snapshot: "s1"})
		w.settle(0)
		o = w.volume("db1")
		w.want("snapshot", w.operation("db1", id).State == catalog.OperationDone && len(o.Snapshots) == 2 && o.Snapshots[0].Name == "s1" && o.Snapshots[0].Children[0] == "volume-head", o)
		id = w.operate("db1", catalog.Operation{Verb: catalog.VerbSnapshot, Snapshot: "s1"})
		w.settle(0)
		w.want("same name again", w.operation("db1", id).Code == catalog.CodeExists, w.operation("db1", id))
		id = w.operate("db1", catalog.Operation{Verb: catalog.VerbRevert, Snapshot: "s1"})
		w.settle(0)
		w.want("revert with a frontend", w.operation("db1", id).Code == catalog.CodeFrontend, w.operation("db1", id))
		w.detach("db1")
		w.settle(0)
		w.wantState("db1", catalog.VolumeDetached, catalog.RobustnessUnknown)

		id = w.operate("db1", catalog.Operation{Verb: catalog.VerbSnapshot, Snapshot: "s2"})
		w.settle(0)
		w.want("snapshot of a detached volume", w.operation("db1", id).Code == catalog.CodeNotAttached, w.operation("db1", id))
		id = w.operate("db1", catalog.Operation{Verb: catalog.VerbExpand, SizeBytes: 32 << 20})
		w.settle(0)
		o = w.wantState("db1", catalog.VolumeDetached, catalog.RobustnessUnknown)
		w.want("expanded", w.operation("db1", id).State == catalog.OperationDone && o.SizeBytes == 32<<20, o, w.operation("db1", id))
		w.want("closed again", w.host.open[v.ID].VolumeID == "", w.host.open)
		id = w.operate("db1", catalog.Operation{Verb: catalog.VerbCheck})
		w.settle(0)
		w.want("check", w.operation("db1", id).State == catalog.OperationDone && len(w.operation("db1", id).Problems) == 1, w.operation("db1", id))

		w.attach("db1", catalog.Ticket{DisableFrontend: true})
		id = w.operate("db1", catalog.Operation{Verb: catalog.VerbRevert, Snapshot: "s1"})
		w.settle(0)
		o = w.wantState("db1", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.want("reverted", o.Endpoint == "" && w.operation("db1", id).State == catalog.OperationDone, o, w.operation("db1", id))

		w.buryImage("debian")
		w.bury("db1")
		w.settle(0)
		_, still := get[catalog.ImageWanted](w, catalog.ImageKey(catalog.Wanted, "debian"))
		w.want("image in use", still && w.imageState("debian").State == catalog.ImageReady, w.image("debian"))
		w.bury("db2")
		w.settle(0)
		w.want("nothing took time", time.Since(start) == 0, time.Since(start))
		w.settle(31 * time.Second)
		es, _, _ := w.mem.List(t.Context(), "")
		for _, e := range es {
			switch e.Key.Kind {
			case catalog.KindVolume, catalog.KindMembership, catalog.KindOperation, catalog.KindImage:
				t.Errorf("left over: %s", e.Key)
			}
		}
		d := w.host.disks["/disks/default"]
		w.want("disk empty", len(d.replicas) == 0 && len(d.images) == 0, d)
	})
}
