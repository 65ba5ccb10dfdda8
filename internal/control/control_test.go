package control_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/control"
)

// cluster is a catalogue with one node that is ready, and what the API and an agent would write, written by hand.
type cluster struct {
	t   *testing.T
	mem *catalog.Mem
}

func newCluster(t *testing.T) *cluster {
	c := &cluster{t, catalog.NewMem()}
	put(c, catalog.NodeKey(catalog.Wanted, "n1"), catalog.NodeWanted{Name: "n1", AllowScheduling: true, Disks: map[string]catalog.DiskWanted{"d": {Path: "/d", AllowScheduling: true}}})
	put(c, catalog.NodeKey(catalog.Observed, "n1"), catalog.NodeObserved{Name: "n1", Ready: true, Disks: map[string]catalog.DiskObserved{"d": {
		DiskID: "disk", TotalBytes: 100 << 30, FreeBytes: 50 << 30, Conditions: map[string]catalog.Condition{catalog.ConditionReady: {Status: catalog.ConditionTrue}},
	}}})
	return c
}

func put[T any](c *cluster, k catalog.Key, v T) {
	c.t.Helper()
	if _, _, err := catalog.Upsert(context.Background(), c.mem, k, func(was *T) error { *was = v; return nil }); err != nil {
		c.t.Fatal(err)
	}
}

func get[T any](c *cluster, k catalog.Key) (T, bool) {
	v, _, err := catalog.Read[T](context.Background(), c.mem, k)
	return v, err == nil
}

func (c *cluster) volume(name string) catalog.VolumeWanted {
	w := catalog.VolumeWanted{Name: name, ID: "id-" + name, SizeBytes: 1 << 30, Copies: 1}
	put(c, catalog.VolumeKey(catalog.Wanted, name), w)
	return w
}

// bury makes a tombstone, and says for the agent that the replica is gone.
func (c *cluster) bury(name string) {
	w, _ := get[catalog.VolumeWanted](c, catalog.VolumeKey(catalog.Wanted, name))
	now := time.Now()
	w.Deleted = &now
	put(c, catalog.VolumeKey(catalog.Wanted, name), w)
	o := catalog.VolumeObserved{Name: name, ID: w.ID, State: catalog.VolumeDeleting}
	for _, r := range w.Replicas {
		o.Replicas = append(o.Replicas, catalog.ReplicaObserved{ReplicaID: r.ReplicaID})
	}
	put(c, catalog.VolumeKey(catalog.Observed, name), o)
}

// start runs a control; what it returns stops it.
func start(c catalog.Catalog, l control.Leader) (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	ctl := control.New(control.Config{Catalog: c, Leader: l})
	go func() { done <- ctl.Run(ctx); close(done) }()
	return func() error { cancel(); return <-done }
}

func (c *cluster) placed(name string) bool {
	w, _ := get[catalog.VolumeWanted](c, catalog.VolumeKey(catalog.Wanted, name))
	m, ok := get[catalog.Membership](c, catalog.MembershipKey(w.ID))
	return len(w.Replicas) == 1 && ok && len(m.Members) == 1 && m.Members[0].ReplicaID == w.Replicas[0].ReplicaID
}

func (c *cluster) gone(name string) bool {
	_, w := get[catalog.VolumeWanted](c, catalog.VolumeKey(catalog.Wanted, name))
	_, o := get[catalog.VolumeObserved](c, catalog.VolumeKey(catalog.Observed, name))
	_, m := get[catalog.Membership](c, catalog.MembershipKey("id-"+name))
	return !w && !o && !m
}

// TestLife: placed at once, gone at once, and the retention of events by the clock.
func TestLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		stop := start(c.mem, nil)
		began := time.Now()
		c.volume("v")
		synctest.Wait()
		if !c.placed("v") {
			t.Fatal("not placed")
		}
		c.bury("v")
		synctest.Wait()
		if !c.gone("v") || time.Since(began) != 0 {
			t.Fatalf("not gone, after %v", time.Since(began))
		}
		events := func() int {
			items, _, _ := catalog.All[catalog.EventRecord](t.Context(), c.mem, catalog.KindEvent, catalog.Wanted)
			return len(items)
		}
		if events() != 1 {
			t.Fatalf("%d events", events())
		}
		<-time.After(24*time.Hour + time.Minute)
		synctest.Wait()
		if events() != 0 {
			t.Fatalf("%d events after a day", events())
		}
		if err := stop(); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	})
}

// TestAway: the catalogue's absence ends nothing.
func TestAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		stop := start(c.mem, nil)
		synctest.Wait()
		c.mem.Away(true)
		<-time.After(time.Hour)
		c.mem.Away(false)
		c.volume("v")
		<-time.After(3 * time.Second)
		synctest.Wait()
		if !c.placed("v") {
			t.Fatal("not placed")
		}
		_ = stop()
	})
}

// faulty fails writes, or loses their answers, as told for each.
type faulty struct {
	*catalog.Mem
	mu   sync.Mutex
	rng  *rand.Rand
	rate float64
	left int // writes until everything fails; -1: never
}

func (f *faulty) write(fn func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left == 0 {
		return catalog.ErrUnreachable
	}
	f.left--
	r := f.rng.Float64()
	if r < f.rate {
		return catalog.ErrUnreachable
	}
	err := fn()
	if r > 1-f.rate {
		return catalog.ErrUnreachable
	}
	return err
}

func (f *faulty) Put(ctx context.Context, k catalog.Key, v []byte, was catalog.Rev) (rev catalog.Rev, err error) {
	err = f.write(func() (err error) { rev, err = f.Mem.Put(ctx, k, v, was); return err })
	return rev, err
}

func (f *faulty) Delete(ctx context.Context, k catalog.Key, was catalog.Rev) error {
	return f.write(func() error { return f.Mem.Delete(ctx, k, was) })
}

// TestCrashBetweenWrites: control stopped after any of its writes, the next one goes on: nothing is placed twice, nothing is left.
func TestCrashBetweenWrites(t *testing.T) {
	for n := range 12 {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCluster(t)
				c.volume("v")
				c.volume("w")
				crash := func() {
					stop := start(&faulty{Mem: c.mem, rng: rand.New(rand.NewPCG(1, 1)), left: n}, nil)
					<-time.After(time.Second)
					_ = stop()
				}
				crash()
				stop := start(c.mem, nil)
				synctest.Wait()
				_ = stop()
				if !c.placed("v") || !c.placed("w") {
					t.Fatal("not placed")
				}
				c.bury("v")
				c.bury("w")
				crash()
				stop = start(c.mem, nil)
				synctest.Wait()
				_ = stop()
				if !c.gone("v") || !c.gone("w") {
					t.Fatal("not gone")
				}
			})
		})
	}
}

// TestUnsureWrites: writes that fail, and writes whose answers are lost.
func TestUnsureWrites(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for i := range uint64(10) {
		synctest.Test(t, func(t *testing.T) {
			c := newCluster(t)
			f := &faulty{Mem: c.mem, rng: rand.New(rand.NewPCG(seed, i)), rate: 0.2, left: -1}
			stop := start(f, nil)
			for n := range 10 {
				c.volume(fmt.Sprint("v", n))
				<-time.After(50 * time.Millisecond)
			}
			<-time.After(10 * time.Second)
			synctest.Wait()
			for n := range 10 {
				if !c.placed(fmt.Sprint("v", n)) {
					t.Fatalf("v%d not placed", n)
				}
				c.bury(fmt.Sprint("v", n))
			}
			<-time.After(time.Minute)
			synctest.Wait()
			for n := range 10 {
				if !c.gone(fmt.Sprint("v", n)) {
					t.Fatalf("v%d not gone", n)
				}
			}
			_ = stop()
		})
	}
}

// turns is a Leader that gives the lead when told.
type turns struct {
	begin chan context.Context
}

func (l turns) Lead(ctx context.Context, fn func(context.Context) error) error {
	for {
		select {
		case lead := <-l.begin:
			if err := fn(lead); !errors.Is(err, context.Canceled) {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// TestLeader: it plans only while it leads, and begins afresh each time.
func TestLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		l := turns{make(chan context.Context)}
		stop := start(c.mem, l)
		c.volume("a")
		synctest.Wait()
		if c.placed("a") {
			t.Fatal("placed by one that does not lead")
		}
		for _, name := range []string{"a", "b"} {
			lead, resign := context.WithCancel(context.Background())
			l.begin <- lead
			synctest.Wait()
			if !c.placed(name) {
				t.Fatalf("%s not placed by the leader", name)
			}
			resign()
			synctest.Wait()
			if name == "a" {
				c.volume("b")
				synctest.Wait()
				if c.placed("b") {
					t.Fatal("placed by one that leads no more")
				}
			}
		}
		if err := stop(); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	})
}

// TestLeaderIsSaid: a record says who leads while it does, also after it was lost, and goes with it.
func TestLeaderIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		says := func(want string) {
			t.Helper()
			synctest.Wait()
			if l, _ := get[catalog.Leader](c, catalog.LeaderKey()); l.Node != want || want != "" && l.Since.IsZero() {
				t.Errorf("%q leads, want %q", l.Node, want)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		l := turns{make(chan context.Context)}
		done := make(chan error, 1)
		ctl := control.New(control.Config{Catalog: c.mem, Node: "n1", Leader: l})
		go func() { done <- ctl.Run(ctx) }()
		says("")
		for range 2 {
			lead, resign := context.WithCancel(t.Context())
			l.begin <- lead
			says("n1")
			c.mem.Away(true)
			<-time.After(2 * catalog.AliveTTL)
			c.mem.Away(false)
			<-time.After(2 * time.Second)
			says("n1")
			resign()
			says("")
		}
		cancel()
		<-done
	})
}

// TestTwoLeaders: two that both think they lead get in each other's way, but do no harm.
func TestTwoLeaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		stop1, stop2 := start(c.mem, nil), start(c.mem, nil)
		for n := range 20 {
			c.volume(fmt.Sprint("v", n))
		}
		<-time.After(10 * time.Second)
		for n := range 20 {
			if !c.placed(fmt.Sprint("v", n)) {
				t.Fatalf("v%d not placed", n)
			}
		}
		_, _ = stop1(), stop2()
	})
}

// TestOperationsAreKept: an operation stays an hour after its end.
func TestOperationsAreKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		stop := start(c.mem, nil)
		c.volume("v")
		now := time.Now()
		put(c, catalog.OperationKey("v", "o"), catalog.Operation{ID: "o", Volume: "v", VolumeID: "id-v", State: catalog.OperationDone, Finished: &now})
		<-time.After(59 * time.Minute)
		if _, ok := get[catalog.Operation](c, catalog.OperationKey("v", "o")); !ok {
			t.Fatal("gone too early")
		}
		<-time.After(2 * time.Minute)
		synctest.Wait()
		if _, ok := get[catalog.Operation](c, catalog.OperationKey("v", "o")); ok {
			t.Fatal("still there")
		}
		_ = stop()
	})
}
