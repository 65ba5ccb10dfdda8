package control_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/control"
)

// pausing stops whoever writes through it before its next write, when it is told to, and lets it go on when it is told to: a process that was stopped and does not know it.
type pausing struct {
	*catalog.Mem
	mu      sync.Mutex
	left    int // writes until it stops; below zero: it does not
	paused  int
	stopped bool // one waits, so all who write wait: it is the process that was stopped
	writes  int
	goOn    chan struct{}
}

func (p *pausing) wait() {
	p.mu.Lock()
	p.writes++
	stop := p.left <= 0 && p.stopped
	if p.left == 0 && !p.stopped {
		stop, p.stopped = true, true
		p.paused++
	}
	p.left--
	goOn := p.goOn
	p.mu.Unlock()
	if stop {
		<-goOn
	}
}

// after lets n more writes through before it stops.
func (p *pausing) after(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left, p.stopped, p.goOn = n, false, make(chan struct{})
}

// stops is how often it was stopped since it was asked last.
func (p *pausing) stops() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.paused
	p.paused = 0
	return n
}

func (p *pausing) resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left, p.stopped = -1, false
	close(p.goOn)
}

func (p *pausing) Put(ctx context.Context, k catalog.Key, v []byte, was catalog.Rev) (catalog.Rev, error) {
	p.wait()
	return p.Mem.Put(context.WithoutCancel(ctx), k, v, was) // it may have been on its way when the lead ended
}

func (p *pausing) Delete(ctx context.Context, k catalog.Key, was catalog.Rev) error {
	p.wait()
	return p.Mem.Delete(context.WithoutCancel(ctx), k, was)
}

// TestPausedLeader: a leader is stopped before any of its writes, another leads meanwhile and the world goes on (what was made is deleted, moved, made anew), then the first goes on with its old
// picture until it learns better; and again, by turns. Whatever the late writes were, all ends as if there had been one leader: a volume has one copy and one record that names it, what was
// deleted leaves nothing, what became known is said once.
func TestPausedLeader(t *testing.T) {
	paused := 0
	for n := range 24 {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { paused += pausedLeader(t, n) })
		})
	}
	if t.Logf("%d pauses", paused); paused < 40 {
		t.Errorf("only %d pauses", paused)
	}
}

func pausedLeader(t *testing.T, n int) (paused int) {
	c := newCluster(t)
	c.secondNode()
	leaders := [2]*pausing{{Mem: c.mem, left: -1}, {Mem: c.mem, left: -1}}
	made := 0
	for turn := range 4 {
		first, second := leaders[turn%2], leaders[1-turn%2]
		first.after(n)
		for range 3 {
			c.volume(fmt.Sprint("v", made))
			made++
		}
		put(c, catalog.ImageKey(catalog.Wanted, fmt.Sprint("i", turn)), catalog.ImageWanted{Name: fmt.Sprint("i", turn), ID: fmt.Sprint("id-i", turn), MinCopies: 1})
		c.silent(turn%2 == 0)
		if turn > 0 {
			c.bury(fmt.Sprint("v", made-4))
			c.evict(turn%2 == 1)
		}
		stop1 := start(first, nil)
		<-time.After(time.Second)
		stop2 := start(second, nil)
		<-time.After(time.Second)
		c.bury(fmt.Sprint("v", made-3))
		c.engines()
		<-time.After(time.Second)
		paused += first.stops()
		first.resume()
		<-time.After(time.Second)
		first.stops() // those after it went on do not count
		_ = stop1()
		<-time.After(time.Second)
		_ = stop2()
	}
	c.evict(false)
	stop := start(c.mem, nil)
	for range 4 {
		c.engines()
		<-time.After(time.Second)
	}
	_ = stop()
	c.checkEnd(made)
	return paused
}

// secondNode is one whose lease can end.
func (c *cluster) secondNode() {
	put(c, catalog.NodeKey(catalog.Wanted, "n2"), catalog.NodeWanted{Name: "n2", AllowScheduling: true, Disks: map[string]catalog.DiskWanted{"d": {Path: "/d", AllowScheduling: true}}})
	put(c, catalog.NodeKey(catalog.Observed, "n2"), catalog.NodeObserved{Name: "n2", Ready: true, Disks: map[string]catalog.DiskObserved{"d": {
		DiskID: "disk2", TotalBytes: 100 << 30, FreeBytes: 40 << 30, Conditions: map[string]catalog.Condition{catalog.ConditionReady: {Status: catalog.ConditionTrue}},
	}}})
	put(c, catalog.NodeKey(catalog.Wanted, "n3"), catalog.NodeWanted{Name: "n3"})
	put(c, catalog.NodeKey(catalog.Observed, "n3"), catalog.NodeObserved{Name: "n3", Ready: true, Port: 9510})
	put(c, catalog.AliveKey("n3"), catalog.Alive{Node: "n3"})
}

// silent ends or begins the lease of n3.
func (c *cluster) silent(is bool) {
	if !is {
		put(c, catalog.AliveKey("n3"), catalog.Alive{Node: "n3"})
		return
	}
	e, err := c.mem.Get(context.Background(), catalog.AliveKey("n3"))
	if err == nil {
		err = c.mem.Delete(context.Background(), e.Key, e.Rev)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// evict empties n1, or lets it be filled again.
func (c *cluster) evict(is bool) {
	w, _ := get[catalog.NodeWanted](c, catalog.NodeKey(catalog.Wanted, "n1"))
	w.EvictionRequested = is
	put(c, catalog.NodeKey(catalog.Wanted, "n1"), w)
}

// engines do what data processes and agents do: put copies in place, destroy what was dropped, and say what there is.
func (c *cluster) engines() {
	volumes, _, err := catalog.All[catalog.VolumeWanted](context.Background(), c.mem, catalog.KindVolume, catalog.Wanted)
	if err != nil {
		c.t.Fatal(err)
	}
	for _, it := range volumes {
		w := it.Value
		m, ok := get[catalog.Membership](c, catalog.MembershipKey(w.ID))
		if !ok || len(m.Members) == 0 {
			continue
		}
		o := catalog.VolumeObserved{Name: w.Name, ID: w.ID, State: catalog.VolumeDetached}
		if w.Deleted != nil {
			o.State = catalog.VolumeDeleting
		}
		for _, r := range w.Replicas {
			if r.CopyOf == m.Members[0].ReplicaID && w.Deleted == nil {
				m.Epoch, m.Members[0].ReplicaID, m.Members[0].Node = m.Epoch+1, r.ReplicaID, r.Node
				put(c, catalog.MembershipKey(w.ID), m)
			}
			o.Replicas = append(o.Replicas, catalog.ReplicaObserved{ReplicaID: r.ReplicaID, Created: w.Deleted == nil})
		}
		for _, r := range w.Dropped {
			o.Replicas = append(o.Replicas, catalog.ReplicaObserved{ReplicaID: r.ReplicaID, Created: r.ReplicaID == m.Members[0].ReplicaID && w.Deleted == nil})
		}
		put(c, catalog.VolumeKey(catalog.Observed, w.Name), o)
	}
}

// checkEnd compares everything there is with what should be.
func (c *cluster) checkEnd(made int) {
	c.t.Helper()
	es, _, err := c.mem.List(context.Background(), "")
	if err != nil {
		c.t.Fatal(err)
	}
	alive, records, said := map[string]string{}, map[string]int{}, map[string]int{}
	for _, e := range es {
		records[string(e.Key.Kind)+"/"+string(e.Key.Part)]++
		switch {
		case e.Key.Kind == catalog.KindVolume && e.Key.Part == catalog.Wanted:
			it, err := catalog.Decode[catalog.VolumeWanted](e)
			if err != nil || it.Value.Deleted != nil || len(it.Value.Replicas) != 1 || it.Value.Replicas[0].CopyOf != "" || len(it.Value.Dropped) > 0 {
				c.t.Fatalf("%+v: %v", it.Value, err)
			}
			alive[it.Value.ID] = it.Value.Replicas[0].ReplicaID
		case e.Key.Kind == catalog.KindEvent:
			it, err := catalog.Decode[catalog.EventRecord](e)
			if err != nil {
				c.t.Fatal(err)
			}
			said[it.Value.Reason] += it.Value.Count
		}
	}
	for _, e := range es {
		if e.Key.Kind != catalog.KindMembership {
			continue
		}
		if it, err := catalog.Decode[catalog.Membership](e); err != nil || it.Value.Members[0].ReplicaID != alive[it.Value.VolumeID] {
			c.t.Errorf("membership %+v, but placed is %q: %v", it.Value, alive[it.Value.VolumeID], err)
		}
	}
	deleted := 4 + 3 // at each turn the first of its volumes, and at all but the first one the last of the turn before
	want := fmt.Sprintf("%d volumes, %d seen, %d memberships, 4 images", made-deleted, made-deleted, made-deleted)
	got := fmt.Sprintf("%d volumes, %d seen, %d memberships, %d images", records["volume/wanted"], records["volume/observed"], records["membership/wanted"], records["image/wanted"])
	if got != want {
		c.t.Errorf("%s; want %s", got, want)
	}
	if said[catalog.ReasonNodeDown] != 2 || said[catalog.ReasonNodeUp] != 2 {
		c.t.Errorf("that a node is down or up was said %v times", said)
	}
	if said["Deleted"] != deleted {
		c.t.Errorf("that a volume was deleted was said %d times, want %d", said["Deleted"], deleted)
	}
}

// TestBurst: a hundred changes, a millisecond apart, among 2,000 volumes cost few plans, and all is done soon.
func TestBurst(t *testing.T) {
	c := newCluster(t)
	for n := range 2000 {
		name := fmt.Sprint("old", n)
		put(c, catalog.VolumeKey(catalog.Wanted, name), catalog.VolumeWanted{Name: name, ID: "id-" + name, SizeBytes: 1 << 30, Copies: 1, Replicas: []catalog.Placement{{ReplicaID: "rep-" + name, Node: "n1", DiskID: "disk"}}})
		put(c, catalog.MembershipKey("id-"+name), catalog.Membership{VolumeID: "id-" + name, Epoch: 1, Members: []catalog.MembershipMember{{ReplicaID: "rep-" + name, Node: "n1"}}})
	}
	var plans atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	ctl := control.New(control.Config{Catalog: c.mem, Now: func() time.Time { plans.Add(1); return time.Now() }})
	var done sync.WaitGroup
	done.Go(func() { _ = ctl.Run(ctx) })
	defer done.Wait()
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	began := time.Now()
	for n := range 100 {
		c.volume(fmt.Sprint("v", n))
		<-tick.C
	}
	came := time.Since(began)
	for n := range 100 {
		for !c.placed(fmt.Sprint("v", n)) {
			if <-tick.C; time.Since(began) > time.Minute {
				t.Fatalf("v%d is not placed", n)
			}
		}
	}
	t.Logf("%d plans in %v, the changes came in %v", plans.Load(), time.Since(began), came)
	if plans.Load() > 80 && came < time.Second { // on a machine that stalls they come one by one
		t.Errorf("%d plans for 100 changes", plans.Load())
	}
}
