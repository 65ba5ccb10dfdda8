package agent_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/agent"
	"ashlar/internal/catalog"
	"ashlar/internal/control"
)

// gate is a node's way to the catalogue, which can be shut.
type gate struct {
	*catalog.Mem
	mu   sync.Mutex
	shut chan struct{} // closed while it is shut
	puts int
	lie  func(catalog.Event) catalog.Event // what watches show; nil: the truth
}

func newGate(m *catalog.Mem) *gate { return &gate{Mem: m, shut: make(chan struct{})} }

func (g *gate) set(open bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.shut:
		if open {
			g.shut = make(chan struct{})
		}
	default:
		if !open {
			close(g.shut)
		}
	}
}

func (g *gate) ask() (chan struct{}, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.shut:
		return nil, catalog.ErrUnreachable
	default:
		return g.shut, nil
	}
}

func (g *gate) Get(ctx context.Context, k catalog.Key) (catalog.Entry, error) {
	if _, err := g.ask(); err != nil {
		return catalog.Entry{}, err
	}
	return g.Mem.Get(ctx, k)
}

func (g *gate) Put(ctx context.Context, k catalog.Key, v []byte, was catalog.Rev) (catalog.Rev, error) {
	if _, err := g.ask(); err != nil {
		return 0, err
	}
	g.mu.Lock()
	g.puts++
	g.mu.Unlock()
	return g.Mem.Put(ctx, k, v, was)
}

func (g *gate) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.puts
}

func (g *gate) Delete(ctx context.Context, k catalog.Key, was catalog.Rev) error {
	if _, err := g.ask(); err != nil {
		return err
	}
	return g.Mem.Delete(ctx, k, was)
}

func (g *gate) List(ctx context.Context, kind catalog.Kind) ([]catalog.Entry, catalog.Rev, error) {
	if _, err := g.ask(); err != nil {
		return nil, 0, err
	}
	return g.Mem.List(ctx, kind)
}

func (g *gate) Watch(ctx context.Context, from catalog.Rev, fn func(catalog.Event) error) error {
	shut, err := g.ask()
	if err != nil {
		return err
	}
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		select {
		case <-shut:
			cancel()
		case <-inner.Done():
		}
	})
	err = g.Mem.Watch(inner, from, func(ev catalog.Event) error {
		if g.lie != nil {
			ev = g.lie(ev)
		}
		return fn(ev)
	})
	if ctx.Err() == nil && inner.Err() != nil {
		err = catalog.ErrUnreachable
	}
	cancel()
	return err
}

// member is a node of a fleet.
type member struct {
	f     *fleet
	name  string
	host  *host
	cat   *gate
	agent *agent.Agent
	stop  func()
}

// fleet is nodes n1, n2, … on one catalogue, with one control, in a synctest bubble. It is a world for what tests say to the catalogue; the world's own node is not started.
type fleet struct {
	*world
	nodes []*member
	wg    sync.WaitGroup
	end   func()
}

func withFleet(t *testing.T, n int, fn func(f *fleet)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, n)
		defer f.close()
		f.settle(time.Second)
		fn(f)
	})
}

func newFleet(t *testing.T, n int) *fleet {
	f := &fleet{world: newWorld(t)}
	f.put(catalog.ClusterKey(), catalog.Cluster{ID: "c", Format: catalog.Format})
	mu := new(sync.Mutex)
	for i := range n {
		m := &member{f: f, name: fmt.Sprintf("n%d", i+1), host: newHost(f.mem), cat: newGate(f.mem)}
		m.host.mu, m.host.name, m.host.salt = mu, m.name, 0x100*(i+1)
		f.nodes = append(f.nodes, m)
	}
	for _, m := range f.nodes {
		for _, o := range f.nodes {
			if o != m {
				m.host.others = append(m.host.others, o.host)
			}
		}
		f.put(catalog.NodeKey(catalog.Wanted, m.name), catalog.NodeWanted{
			Name: m.name, ID: "id-" + m.name, AllowScheduling: true, Disks: map[string]catalog.DiskWanted{"d": {Path: "/" + m.name, AllowScheduling: true}},
		})
		m.alive(true)
		m.start()
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := control.New(control.Config{Catalog: f.mem, Log: slog.New(slog.DiscardHandler)})
	f.wg.Go(func() { _ = c.Run(ctx) })
	f.end = cancel
	return f
}

func (f *fleet) close() {
	f.t.Helper()
	for _, m := range f.nodes {
		m.stop()
	}
	f.end()
	f.wg.Wait()
	for _, m := range f.nodes {
		m.host.kill()
		for _, wrong := range m.host.wrongs {
			f.t.Error(wrong)
		}
	}
	f.mem.Close()
}

func (m *member) start() {
	ctx, cancel := context.WithCancel(context.Background())
	a, err := agent.New(agent.Config{
		Node: m.name, Address: m.name, Catalog: m.cat, EnsureData: m.host.ensure, Log: slog.New(slog.NewTextHandler(m.f.t.Output(), &slog.HandlerOptions{Level: slog.LevelError})),
		Cluster: &agent.ClusterFiles{ClusterID: "c", NodeID: "id-" + m.name, Host: m.name, Port: 100, APICurrent: 1, APIMin: 1},
		Member:  func() string { return "voter" },
		Resync:  24 * time.Hour, // what follows from a change follows without another look at everything
	})
	if err != nil {
		m.f.t.Fatal(err)
	}
	m.agent = a
	m.host.mu.Lock()
	m.host.ledger = a.Ledger()
	m.host.mu.Unlock()
	done := make(chan struct{})
	m.f.wg.Go(func() { _ = a.Run(ctx); close(done) })
	m.stop = func() { cancel(); <-done }
}

// alive makes or drops the record of a node's lease.
func (m *member) alive(on bool) {
	if !on {
		m.host.mu.Lock()
		m.host.given = map[string]bool{}
		for id := range m.host.open {
			m.host.given[id] = true
		}
		m.host.mu.Unlock()
		_ = m.f.mem.Drop(catalog.AliveKey(m.name))
		return
	}
	if _, _, err := catalog.Upsert(context.Background(), m.f.mem, catalog.AliveKey(m.name), func(a *catalog.Alive) error { a.Node = m.name; return nil }); err != nil {
		m.f.t.Fatal(err)
	}
}

// vanish cuts a node off from everything but its guests, and is long enough for its lease to end.
func (m *member) vanish() {
	m.cat.set(false)
	m.host.connect(false)
	m.alive(false)
}

func (m *member) back() {
	m.cat.set(true)
	m.host.connect(true)
	m.alive(true)
}

func (m *member) disk() string { return fmt.Sprintf("%032x", m.host.salt+1) }

func (m *member) has(volumeID string) bool {
	m.host.mu.Lock()
	defer m.host.mu.Unlock()
	return m.host.proc.volumes[volumeID] != nil
}

// volumeOn makes a volume whose one copy is on a node.
func (f *fleet) volumeOn(name string, m *member) catalog.VolumeWanted {
	f.t.Helper()
	v := catalog.VolumeWanted{
		Name: name, ID: f.id(), SizeBytes: 16 << 20, Copies: 1, Frontend: catalog.FrontendNBD, Created: time.Now().UTC(),
		Replicas: []catalog.Placement{{ReplicaID: f.id(), Node: m.name, DiskID: m.disk()}},
	}
	f.put(catalog.VolumeKey(catalog.Wanted, name), v)
	return v
}

func (f *fleet) on(name string, m *member) {
	f.t.Helper()
	f.attach(name, catalog.Ticket{Node: m.name})
}

// TestAttachElsewhere: a volume is attached on another node than its copy's, used, moved, and taken back, and every step is its home's.
func TestAttachElsewhere(t *testing.T) {
	withFleet(t, 3, func(f *fleet) {
		n1, n2, n3 := f.nodes[0], f.nodes[1], f.nodes[2]
		n, _ := get[catalog.NodeObserved](f.world, catalog.NodeKey(catalog.Observed, "n1"))
		f.want("node in its cluster", n.Port == 100 && n.Address == "n1" && n.APICurrent == 1 && n.Member == "voter" && n.Ready, n)
		peers := n1.host.cluster.Peers
		f.want("peers", len(peers) == 2 && peers[0].Node == "n2" && peers[0].NodeID == "id-n2" && peers[0].Data == "n2:103" && peers[0].Ledger == "n2:100" && n1.host.cluster.Listen == "n1:103", n1.host.cluster)

		v := f.volumeOn("a", n1)
		f.on("a", n2)
		f.settle(time.Second)
		o := f.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		f.want("on n2", o.Node == "n2" && n2.has(v.ID) && !n1.has(v.ID) && n2.host.writes(v.ID), o)
		f.want("replica of n1", len(o.Replicas) == 1 && o.Replicas[0].Node == "n1" && o.Replicas[0].Created && o.Replicas[0].Running && o.Replicas[0].DataPath != "", o.Replicas)
		id := f.operate("a", catalog.Operation{Verb: catalog.VerbSnapshot, Snapshot: "s"})
		f.settle(time.Second)
		f.want("snapshot by its home", f.operation("a", id).State == catalog.OperationDone && n2.host.deeds[id] == 1 && len(f.volume("a").Snapshots) == 2, f.operation("a", id))

		f.on("a", n3)
		f.settle(time.Second)
		o = f.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		f.want("moved", o.Node == "n3" && !n2.has(v.ID) && n3.host.writes(v.ID), o)
		f.detach("a")
		f.settle(time.Second)
		o = f.wantState("a", catalog.VolumeDetached, catalog.RobustnessUnknown)
		f.want("nobody has it", o.Node == "" && !n3.has(v.ID), o)
		id = f.operate("a", catalog.Operation{Verb: catalog.VerbExpand, SizeBytes: 32 << 20})
		f.settle(time.Second)
		f.want("expanded where the copy is", f.operation("a", id).State == catalog.OperationDone && n1.host.deeds[id] == 1 && f.volume("a").SizeBytes == 32<<20, f.operation("a", id))
		f.bury("a")
		f.settle(time.Second)
		_, still := get[catalog.VolumeWanted](f.world, catalog.VolumeKey(catalog.Wanted, "a"))
		f.want("gone", !still && len(n1.host.disks["/n1"].replicas) == 0)
	})
}

// TestTakeOver: a node that has a volume open is cut off; another takes it over, and the one that comes back closes what it has and writes nothing in between.
func TestTakeOver(t *testing.T) {
	withFleet(t, 3, func(f *fleet) {
		n1, n2, n3 := f.nodes[0], f.nodes[1], f.nodes[2]
		v := f.volumeOn("a", n1)
		f.on("a", n2)
		f.settle(time.Second)
		n2.vanish()
		f.settle(time.Second)
		f.want("still n2's: nothing moves by itself", f.volume("a").Node == "n2" && n2.has(v.ID), f.volume("a"))
		f.on("a", n3)
		f.settle(2 * time.Second)
		o := f.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		f.want("taken over", o.Node == "n3" && n3.host.writes(v.ID) && !n2.host.writes(v.ID), o)
		f.settle(time.Minute)
		f.want("nobody told n2 yet", n2.has(v.ID))
		n2.back()
		f.settle(5 * time.Second)
		f.want("closed", !n2.has(v.ID) && n3.host.writes(v.ID) && f.volume("a").Node == "n3", f.volume("a"))
		f.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
	})
}

// TestTakeOverData: the same, when only the agent is cut off and its data process writes on: the next writer ends that.
func TestTakeOverData(t *testing.T) {
	withFleet(t, 2, func(f *fleet) {
		n1, n2 := f.nodes[0], f.nodes[1]
		v := f.volumeOn("a", n1)
		f.on("a", n1)
		f.settle(time.Second)
		n1.cat.set(false)
		f.settle(time.Second)
		f.want("goes on writing", n1.host.writes(v.ID))
		n1.alive(false)
		f.on("a", n2)
		f.settle(2 * time.Second)
		f.want("n2 waits: it needs n1's data process to be on record as up", n1.host.writes(v.ID) && strings.Contains(f.volume("a").Error, "n1, which does not answer since"), f.volume("a"))
		n1.cat.set(true)
		n1.alive(true)
		f.settle(5 * time.Second)
		o := f.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		f.want("then it has it", o.Node == "n2" && n2.host.writes(v.ID) && !n1.has(v.ID) && o.Error == "", o)
	})
}

// TestReplicaAway: the node of the copy goes away under an attached volume, and comes back.
func TestReplicaAway(t *testing.T) {
	withFleet(t, 2, func(f *fleet) {
		n1, n2 := f.nodes[0], f.nodes[1]
		v := f.volumeOn("a", n1)
		w := f.volumeOn("b", n1)
		f.settle(time.Second)
		f.on("a", n2)
		f.settle(time.Second)
		n1.vanish()
		f.on("b", n2)
		f.settle(10 * time.Second)
		o := f.wantState("a", catalog.VolumeAttached, catalog.RobustnessUnknown)
		f.want("says so", strings.Contains(o.Error, "node n1, which does not answer"), o)
		o = f.wantState("b", catalog.VolumeAttaching, catalog.RobustnessUnknown)
		f.want("cannot be attached, and says so", strings.Contains(o.Error, "its copy is on node n1, which does not answer since") && !n2.has(w.ID), o)
		n1.back()
		f.settle(5 * time.Second)
		f.wantState("b", catalog.VolumeAttached, catalog.RobustnessHealthy)
		o = f.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		f.want("by itself", o.Error == "" && n2.host.writes(v.ID), o)
		n1.vanish()
		f.settle(time.Second)
		f.detach("a")
		f.settle(5 * time.Second)
		f.want("detached although its copy is away", !n2.has(v.ID) && f.volume("a").State == catalog.VolumeDetached, f.volume("a"))
		n1.back()
		f.settle(time.Second)
	})
}

// TestDeleteWhileAway: a volume whose copy's node is down is deleted when that is back, and says what it waits for.
func TestDeleteWhileAway(t *testing.T) {
	withFleet(t, 2, func(f *fleet) {
		n1 := f.nodes[0]
		f.volumeOn("a", n1)
		f.settle(time.Second)
		n1.vanish()
		f.bury("a")
		f.settle(time.Minute)
		o := f.wantState("a", catalog.VolumeDeleting, catalog.RobustnessUnknown)
		f.want("says what it waits for", strings.Contains(o.Error, "node n1, which does not answer") && len(n1.host.disks["/n1"].replicas) == 1, o)
		n1.back()
		f.settle(5 * time.Second)
		_, still := get[catalog.VolumeWanted](f.world, catalog.VolumeKey(catalog.Wanted, "a"))
		f.want("gone", !still && len(n1.host.disks["/n1"].replicas) == 0, f.volume("a"))
	})
}

// TestMoveCopy: a copy is moved to another node, and a ticket that comes in between goes first.
func TestMoveCopy(t *testing.T) {
	withFleet(t, 2, func(f *fleet) {
		n1, n2 := f.nodes[0], f.nodes[1]
		v := f.volumeOn("a", n1)
		f.on("a", n1)
		f.settle(time.Second)
		f.detach("a")
		f.settle(time.Second)
		to := f.id()
		f.update("a", func(w *catalog.VolumeWanted) {
			w.Replicas = append(w.Replicas, catalog.Placement{ReplicaID: to, Node: "n2", DiskID: n2.disk(), CopyOf: v.Replicas[0].ReplicaID})
		})
		f.settle(time.Second)
		f.want("copying", n2.host.proc.jobs[to] != nil, n2.host.deeds)
		f.on("a", n1)
		f.settle(3 * time.Second)
		f.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		f.want("the ticket went first", n1.host.writes(v.ID) && n2.host.proc.jobs[to] == nil && len(n2.host.disks["/n2"].replicas) == 0, n2.host.proc.jobs)
		f.detach("a")
		f.settle(time.Minute)
		w, _ := get[catalog.VolumeWanted](f.world, catalog.VolumeKey(catalog.Wanted, "a"))
		m, _ := get[catalog.Membership](f.world, catalog.MembershipKey(v.ID))
		f.want("moved", len(m.Members) == 1 && m.Members[0].ReplicaID == to && len(n2.host.disks["/n2"].replicas) == 1, m, w)
		f.want("the old copy is gone, by record and from its disk", len(w.Replicas) == 1 && w.Replicas[0].CopyOf == "" && len(w.Dropped) == 0 && len(n1.host.disks["/n1"].replicas) == 0, w, n1.host.disks["/n1"])
		f.want("and the job is forgotten", len(n2.host.proc.jobs) == 0, n2.host.proc.jobs)
		f.on("a", n1)
		f.settle(time.Second)
		o := f.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		f.want("used from the other side now", o.Node == "n1" && o.Replicas[0].Node == "n2" && n1.host.writes(v.ID), o)
	})
}

// TestImageFromPeer: a second copy comes from the first, whatever the source, also one that can be asked only once.
func TestImageFromPeer(t *testing.T) {
	withFleet(t, 2, func(f *fleet) {
		n1, n2 := f.nodes[0], f.nodes[1]
		ready := func(name string) bool {
			o := f.image(name)
			return o.Disks[n1.disk()].State == catalog.ImageReady && o.Disks[n2.disk()].State == catalog.ImageReady
		}
		i := f.createImage("web", "ok")
		f.wantOn("web", n1, n2)
		f.settle(time.Minute)
		f.want("both ready", ready("web"), f.image("web"))
		f.want("asked its source once", n1.host.deeds["from http://ok"]+n2.host.deeds["from http://ok"] == 1, n1.host.deeds, n2.host.deeds)
		f.want("the same", n1.host.disks["/n1"].images[i.ID] == n2.host.disks["/n2"].images[i.ID])

		v := f.volumeOn("v", n1)
		f.settle(time.Second)
		f.put(catalog.ImageKey(catalog.Wanted, "made"), catalog.ImageWanted{Name: "made", ID: f.id(), SourceType: catalog.SourceVolume, Parameters: map[string]string{"volume-name": "v"},
			MinCopies: 2, Created: time.Now().UTC(), Disks: []string{n2.disk()}}) // control sees where the volume is
		f.settle(2 * time.Minute)
		f.want("made from a volume, on both", ready("made"), f.image("made"))
		o := f.wantState("v", catalog.VolumeDetached, catalog.RobustnessUnknown)
		f.want("the volume is closed, and not where the second copy is", o.Node == "" && !n1.has(v.ID) && n2.host.deeds["open-volume"] == 0, o, n2.host.deeds)

		n1.vanish()
		f.update("v", func(*catalog.VolumeWanted) {})
		f.settle(5 * time.Second)
		f.put(catalog.ImageKey(catalog.Wanted, "later"), catalog.ImageWanted{Name: "later", ID: f.id(), SourceType: catalog.SourceDownload, Parameters: map[string]string{"url": "http://slow"},
			MinCopies: 1, Created: time.Now().UTC(), Disks: []string{n1.disk(), n2.disk()}})
		f.settle(10 * time.Second)
		f.want("a node that is away is not waited for", f.image("later").Disks[n2.disk()].State != catalog.ImagePending, f.image("later"))
		n1.back()
		f.settle(time.Second)
	})
}

// wantOn has an image on these nodes, as control does.
func (f *fleet) wantOn(image string, nodes ...*member) {
	f.t.Helper()
	_, _, err := catalog.Update(context.Background(), f.mem, catalog.ImageKey(catalog.Wanted, image), func(i *catalog.ImageWanted) error {
		i.Disks = nil
		for _, m := range nodes {
			i.Disks = append(i.Disks, m.disk())
		}
		return nil
	})
	if err != nil {
		f.t.Fatal(err)
	}
}

// TestCatalogueAwayOnOne: a node that does not reach the catalogue does nothing; what is asked of the others goes on.
func TestCatalogueAwayOnOne(t *testing.T) {
	withFleet(t, 2, func(f *fleet) {
		n1, n2 := f.nodes[0], f.nodes[1]
		v := f.volumeOn("a", n1)
		f.on("a", n1)
		f.settle(time.Second)
		n1.cat.set(false)
		f.settle(0)
		f.detach("a")
		w := f.volumeOn("b", n2)
		f.on("b", n2)
		f.settle(time.Minute)
		f.want("n1 does nothing", n1.has(v.ID))
		f.want("n2 does", n2.has(w.ID))
		n1.cat.set(true)
		f.settle(5 * time.Second)
		f.want("n1 catches up", !n1.has(v.ID) && f.volume("a").State == catalog.VolumeDetached, f.volume("a"))
	})
}

// TestPeersFollow: a node that is removed vanishes from the others' lists, one whose address changes is found again, and a data process that was started again is told.
func TestPeersFollow(t *testing.T) {
	withFleet(t, 3, func(f *fleet) {
		n1, n3 := f.nodes[0], f.nodes[2]
		peers := func() (out []string) {
			n1.host.mu.Lock()
			defer n1.host.mu.Unlock()
			for _, p := range n1.host.cluster.Peers {
				out = append(out, p.Data)
			}
			return out
		}
		f.want("all", slices.Equal(peers(), []string{"n2:103", "n3:103"}), peers())
		change := func(part catalog.Part, fn func(*catalog.NodeWanted, *catalog.NodeObserved)) {
			var err error
			if part == catalog.Wanted {
				_, _, err = catalog.Update(t.Context(), f.mem, catalog.NodeKey(part, "n3"), func(n *catalog.NodeWanted) error { fn(n, nil); return nil })
			} else {
				_, _, err = catalog.Update(t.Context(), f.mem, catalog.NodeKey(part, "n3"), func(n *catalog.NodeObserved) error { fn(nil, n); return nil })
			}
			f.want("update", err == nil, err)
			f.settle(0)
		}
		n3.stop()
		n3.stop = func() {}
		change(catalog.Observed, func(_ *catalog.NodeWanted, o *catalog.NodeObserved) { o.Address, o.Port = "fd00::3", 200 })
		f.want("moved", slices.Equal(peers(), []string{"n2:103", "[fd00::3]:203"}), peers())
		n1.host.mu.Lock()
		n1.host.cluster.Peers = nil
		n1.host.mu.Unlock()
		n1.host.kill()
		f.settle(5 * time.Second)
		f.want("told again", len(peers()) == 2, peers())
		now := time.Now()
		change(catalog.Wanted, func(w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.Deleted = &now })
		f.want("removed", slices.Equal(peers(), []string{"n2:103"}), peers())
	})
}

// TestElsewhere: what only another node can do is refused with its name.
func TestElsewhere(t *testing.T) {
	withFleet(t, 2, func(f *fleet) {
		n1, n2 := f.nodes[0], f.nodes[1]
		f.volumeOn("a", n1)
		f.createImage("i", "ok")
		f.wantOn("i", n1)
		up := catalog.ImageWanted{Name: "u", ID: f.id(), SourceType: catalog.SourceUpload, MinCopies: 1, Disks: []string{n1.disk()}}
		f.put(catalog.ImageKey(catalog.Wanted, "u"), up)
		f.settle(5 * time.Second)
		at := func(err error) string {
			var e agent.Elsewhere
			errors.As(err, &e)
			return e.Node
		}
		a := n2.agent
		_, err := a.Check(t.Context(), "a")
		f.want("check", at(err) == "n1" && errors.Is(err, agent.ErrNotHere), err)
		_, _, err = a.Download(t.Context(), "volume", "a", "", "raw")
		f.want("download of a volume", at(err) == "n1", err)
		_, _, err = a.Download(t.Context(), "image", "i", "", "raw")
		f.want("download of an image", at(err) == "n1", err)
		_, _, err = a.Diff(t.Context(), struct {
			Volume, From, To string
			Off              int64
		}{Volume: "a"}, nil)
		f.want("diff", at(err) == "n1", err)
	})
}

// TestIdle: agents that have nothing to do write nothing, and another node's volumes cost them no plan.
func TestIdle(t *testing.T) {
	withFleet(t, 3, func(f *fleet) {
		for i := range 30 {
			name := fmt.Sprintf("v%d", i)
			f.volumeOn(name, f.nodes[i%3])
			f.on(name, f.nodes[i%2])
		}
		f.settle(time.Minute)
		before := 0
		for _, m := range f.nodes {
			before += m.cat.count()
		}
		f.settle(10 * time.Minute)
		after := 0
		for _, m := range f.nodes {
			after += m.cat.count()
		}
		f.want("no writes", after == before, before, after)
	})
}

// TestFirstStartOfJoined: a node whose record was made for it when it joined gets its disks; another cluster's catalogue is refused.
func TestFirstStartOfJoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		w.put(catalog.ClusterKey(), catalog.Cluster{ID: "c", Format: catalog.Format})
		w.put(catalog.NodeKey(catalog.Wanted, node), catalog.NodeWanted{Name: node, ID: "x", Voter: true, AllowScheduling: true})
		w.start()
		w.settle(0)
		n, _ := get[catalog.NodeWanted](w, catalog.NodeKey(catalog.Wanted, node))
		w.want("disks", len(n.Disks) == 1 && n.ID == "x" && n.Voter, n)
		_, _, err := catalog.Update(t.Context(), w.mem, catalog.NodeKey(catalog.Wanted, node), func(n *catalog.NodeWanted) error { n.Disks = nil; return nil })
		w.want("removed", err == nil, err)
		w.stop()
		w.start()
		w.settle(0)
		n, _ = get[catalog.NodeWanted](w, catalog.NodeKey(catalog.Wanted, node))
		w.want("not again", len(n.Disks) == 0, n)

		a, err := agent.New(agent.Config{Node: node, Catalog: w.mem, EnsureData: w.host.ensure, Cluster: &agent.ClusterFiles{ClusterID: "other"}})
		w.want("agent", err == nil, err)
		w.want("refused", errors.Is(a.Run(t.Context()), agent.ErrOtherCluster))
	})
}

// TestRemovedNode: a node of a cluster that has no record any more was removed, and does not make itself one.
func TestRemovedNode(t *testing.T) {
	withFleet(t, 2, func(f *fleet) {
		n2 := f.nodes[1]
		n2.stop()
		for _, part := range []catalog.Part{catalog.Wanted, catalog.Observed} {
			e, err := f.mem.Get(t.Context(), catalog.NodeKey(part, "n2"))
			f.want("record", err == nil, err)
			f.want("removed", f.mem.Delete(t.Context(), e.Key, e.Rev) == nil)
		}
		n2.start()
		f.settle(time.Minute)
		es, _, err := f.mem.List(t.Context(), catalog.KindNode)
		f.want("not made again", err == nil && len(es) == 2, es)
		f.want("no peer", len(f.nodes[0].host.cluster.Peers) == 0, f.nodes[0].host.cluster)
	})
}

// TestShutdownServing: a node is shut down while another uses a replica on it: that one waits, and goes on when the node is started again.
func TestShutdownServing(t *testing.T) {
	withFleet(t, 2, func(f *fleet) {
		n1, n2 := f.nodes[0], f.nodes[1]
		v := f.volumeOn("a", n1)
		f.on("a", n2)
		f.settle(time.Second)
		f.want("shut down", n1.agent.Shutdown(t.Context()) == nil)
		f.settle(time.Second)
		n1.stop()
		n1.alive(false)
		n2.host.connect(true) // its process sees that nobody answers
		f.settle(10 * time.Second)
		o := f.wantState("a", catalog.VolumeAttached, catalog.RobustnessUnknown)
		f.want("waits", n2.has(v.ID) && !n2.host.writes(v.ID) && strings.Contains(o.Error, "n1"), o)
		n1.start()
		n1.alive(true)
		f.settle(time.Second)
		n2.host.connect(true)
		f.settle(time.Second)
		f.want("goes on", n2.host.writes(v.ID))
		f.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
	})
}

// TestFleetHistory: whatever is asked for while nodes vanish and come back, no two nodes write, and in the end everything is as wanted.
func TestFleetHistory(t *testing.T) {
	runs := 6
	if s, err := strconv.Atoi(os.Getenv("ASHLAR_STEPS")); err == nil {
		runs *= max(1, s)
	}
	first := rand.Uint64()
	if s, err := strconv.ParseUint(os.Getenv("ASHLAR_SEED"), 10, 64); err == nil {
		first, runs = s, 1
	}
	for i := range runs {
		seed := first + uint64(i)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Logf("seed %d: repeat with ASHLAR_SEED", seed)
			withFleet(t, 3, func(f *fleet) { f.live(rand.New(rand.NewPCG(seed, 3))) })
		})
	}
}

func (f *fleet) live(rng *rand.Rand) {
	wanted := map[string]catalog.VolumeWanted{}
	names := []string{"a", "b", "c", "d"}
	any := func() *member { return f.nodes[rng.IntN(len(f.nodes))] }
	var down *member
	for range 60 {
		name := names[rng.IntN(len(names))]
		v, ok := wanted[name]
		_, recorded := get[catalog.VolumeWanted](f.world, catalog.VolumeKey(catalog.Wanted, name))
		switch r := rng.IntN(20); {
		case !ok && !recorded:
			wanted[name] = f.volumeOn(name, any())
		case !ok:
		case r < 8:
			f.on(name, any())
		case r < 12:
			f.detach(name)
		case r < 13:
			f.bury(name)
			delete(wanted, name)
		case r < 15 && down == nil:
			down = any()
			down.vanish()
		case r < 17 && down != nil:
			down.back()
			down = nil
		case r < 18:
			any().host.kill()
		case r < 19:
			f.operate(name, catalog.Operation{Verb: catalog.VerbExpand, SizeBytes: v.SizeBytes + int64(rng.IntN(9))<<20})
		}
		f.settle(time.Duration(rng.IntN(3000)) * time.Millisecond)
		for name, v := range wanted {
			writers := 0
			for _, m := range f.nodes {
				if m.host.writes(v.ID) {
					writers++
				}
			}
			f.want(name+" has one writer at most", writers <= 1, writers)
		}
	}
	if down != nil {
		down.back()
	}
	f.settle(3 * time.Minute)
	for name := range wanted {
		v, _ := get[catalog.VolumeWanted](f.world, catalog.VolumeKey(catalog.Wanted, name))
		o := f.volume(name)
		for _, m := range f.nodes {
			ticket := len(v.Tickets) > 0 && v.Tickets[0].Node == m.name
			f.want(fmt.Sprintf("%s on %s", name, m.name), m.has(v.ID) == ticket && m.host.writes(v.ID) == ticket, o, v)
			f.want(fmt.Sprintf("%s shown on %s", name, m.name), (o.State == catalog.VolumeAttached && o.Node == m.name) == ticket, o, v)
		}
	}
	for _, name := range names {
		if _, ok := wanted[name]; !ok {
			_, still := get[catalog.VolumeWanted](f.world, catalog.VolumeKey(catalog.Wanted, name))
			f.want(name+" is gone", !still, f.volume(name))
		}
	}
	f.audit()
}

// audit tells whether a plan of everything would do something that the plans of what changed did not.
func (f *fleet) audit() {
	f.t.Helper()
	for _, m := range f.nodes {
		if p := m.agent.PlanAll(f.t.Context()); len(p.Actions) > 0 || len(p.Writes) > 0 {
			f.t.Errorf("node %s missed %d actions and %d writes: %+v %+v", m.name, len(p.Actions), len(p.Writes), p.Actions, p.Writes)
		}
	}
}

// TestDroppedIsReadAgain: what the watch says is not enough to destroy a replica whose place another is said to have taken.
func TestDroppedIsReadAgain(t *testing.T) {
	withFleet(t, 2, func(f *fleet) {
		n1, n2 := f.nodes[0], f.nodes[1]
		v := f.volumeOn("a", n1)
		f.on("a", n1)
		f.settle(time.Second)
		f.detach("a")
		f.settle(time.Second)
		// The watch lies about who is a member: it shows the other replica, the record names this one.
		n1.cat.lie = func(ev catalog.Event) catalog.Event {
			if ev.Key.Kind == catalog.KindMembership {
				ev.Value = []byte(strings.ReplaceAll(string(ev.Value), v.Replicas[0].ReplicaID, "other"))
			}
			return ev
		}
		f.end() // control would take it back
		_, _, err := catalog.Update(t.Context(), f.mem, catalog.MembershipKey(v.ID), func(m *catalog.Membership) error { m.Generation++; return nil })
		f.want("touched", err == nil, err)
		f.update("a", func(w *catalog.VolumeWanted) {
			w.Dropped, w.Replicas = w.Replicas, []catalog.Placement{{ReplicaID: "other", Node: "n2", DiskID: n2.disk()}}
		})
		f.settle(time.Minute)
		f.want("still there", len(n1.host.disks["/n1"].replicas) == 1 && n1.host.deeds["delete-replica"] == 0, n1.host.deeds)
	})
}

// TestTriedAgain: what failed is tried again when it is time, though nothing else happens.
func TestTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		w.calm = 24 * time.Hour
		w.start()
		w.createVolume("a", "")
		w.settle(time.Second)
		failures := 4
		w.host.setFault(func(_ context.Context, verb string, early bool) error {
			if verb == "open-volume" && early && failures > 0 {
				failures--
				return errInjected
			}
			return nil
		})
		w.attach("a", catalog.Ticket{})
		w.settle(30 * time.Second)
		w.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
	})
}
