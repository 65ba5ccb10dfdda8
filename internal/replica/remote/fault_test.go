package remote

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/replica"
	"ashlar/internal/replica/replicatest"
)

// rounds is how often a random test is done.
func rounds(n int) int {
	if k, err := strconv.Atoi(os.Getenv("ASHLAR_STEPS")); err == nil && k > 1 {
		n *= k
	}
	return n
}

// bubble runs a test whose time is not real.
func bubble(t *testing.T, test func(*testing.T)) {
	synctest.Test(t, func(t *testing.T) {
		t.Cleanup(func() { pass(time.Minute) }) // for what ends by itself
		test(t)
	})
}

// pass lets a bubble's time pass.
func pass(d time.Duration) { <-time.After(d) }

// lane is a part of the disk that one goroutine writes and reads: it knows what has to be there.
type lane struct {
	off  int64
	have [8]byte // by unit: what was acknowledged last
	err  error
}

func (l *lane) unit(i int) int64 { return l.off + int64(i)*block.UnitBytes }

// run writes, zeroes, flushes and reads. Every call has to succeed, and every read to see what was acknowledged last.
func (l *lane) run(r block.Device, rnd *rand.Rand, steps int) error {
	buf := make([]byte, 3*block.UnitBytes)
	for range steps {
		i := rnd.IntN(len(l.have))
		n := 1 + rnd.IntN(min(3, len(l.have)-i))
		p := buf[:n*block.UnitBytes]
		switch k := rnd.IntN(10); {
		case k < 5:
			b := byte(1 + rnd.IntN(255))
			for j := range p {
				p[j] = b
			}
			if _, err := r.WriteAt(p, l.unit(i)); err != nil {
				return err
			}
			for j := range n {
				l.have[i+j] = b
			}
		case k < 6:
			if err := r.Zero(l.unit(i), int64(len(p))); err != nil {
				return err
			}
			for j := range n {
				l.have[i+j] = 0
			}
		case k < 7:
			if err := r.Flush(); err != nil {
				return err
			}
		default:
			if err := l.check(r, i, n); err != nil {
				return err
			}
		}
	}
	return l.check(r, 0, len(l.have))
}

var errStaleRead = errors.New("a read saw something else than what was acknowledged last")

func (l *lane) check(r block.Device, i, n int) error {
	p := make([]byte, n*block.UnitBytes)
	if _, err := r.ReadAt(p, l.unit(i)); err != nil {
		return err
	}
	for j := range n {
		if got := p[j*block.UnitBytes : (j+1)*block.UnitBytes]; !bytes.Equal(got, bytes.Repeat([]byte{l.have[i+j]}, block.UnitBytes)) {
			return errors.Join(errStaleRead, errors.New("unit "+strconv.Itoa(i+j)+" has "+strconv.Itoa(int(got[0]))+", wanted "+strconv.Itoa(int(l.have[i+j]))))
		}
	}
	return nil
}

// lanes runs n of them at once.
func lanes(r block.Device, rnd *rand.Rand, list []*lane, steps int) error {
	var wg sync.WaitGroup
	for _, l := range list {
		mine := rand.New(rand.NewPCG(rnd.Uint64(), 3))
		wg.Go(func() { l.err = l.run(r, mine, steps) })
	}
	wg.Wait()
	for _, l := range list {
		if l.err != nil {
			return l.err
		}
	}
	return nil
}

func newLanes(n int) []*lane {
	var list []*lane
	for i := range n {
		list = append(list, &lane{off: int64(i) * 8 * block.UnitBytes})
	}
	return list
}

// TestFaultyNetwork: connections are cut at any byte, stall for good and are slow, while several callers write and read. No call fails, no acknowledged write is lost, and no
// write comes after one that followed it.
func TestFaultyNetwork(t *testing.T) {
	rnd := seeded(t)
	for range rounds(12) {
		seed := rnd.Uint64()
		bubble(t, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			f := newFar(t, testHead, testSize)
			f.net.next = func() fate {
				return fate{after: 1 + rnd.Int64N(1<<(8+rnd.IntN(12))), hole: rnd.IntN(4) == 0, delay: time.Duration(rnd.IntN(3)) * time.Millisecond}
			}
			var r *Replica
			for r == nil { // the first question may meet its fate too
				r, _ = Open(t.Context(), f.config())
			}
			defer r.Close()
			if err := r.Fence(t.Context(), replica.Writer{Epoch: 3, Session: 2}); err != nil {
				t.Fatal(err)
			}
			if err := lanes(r, rand.New(rand.NewPCG(seed, 2)), newLanes(4), 40); err != nil {
				t.Errorf("seed %d: %v", seed, err)
			}
			t.Logf("%d connections", f.net.dialed())
		})
	}
}

// TestRestartUnderLoad: the peer's process is killed again and again in the middle of everything. No call fails and nothing acknowledged is lost; and what was flushed at the end
// survives a power cut, also what an earlier process had written.
func TestRestartUnderLoad(t *testing.T) {
	rnd := seeded(t)
	for range rounds(3) {
		f := newFar(t, testHead, testSize)
		r := f.writer(t, replica.Writer{Epoch: 1, Session: 1})
		list, mine := newLanes(3), rand.New(rand.NewPCG(rnd.Uint64(), 1))
		done := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			defer close(done)
			if err := lanes(r, mine, list, 150); err != nil {
				t.Error(err)
			}
		})
		for kills := 0; kills < 6; kills++ {
			select {
			case <-done:
				kills = 6
			case <-time.After(time.Duration(rnd.IntN(30)) * time.Millisecond):
				f.Restart(t)
			}
		}
		wg.Wait()
		f.Restart(t)
		if err := r.Flush(); err != nil {
			t.Fatal(err)
		}
		f.restart(true, disk.CrashOptions{Keep: disk.KeepNone})
		for _, l := range list {
			if err := l.check(r, 0, len(l.have)); err != nil {
				t.Errorf("after a power cut that followed a flush: %v", err)
			}
		}
		_ = r.Close()
	}
}

// TestBootChanged: a peer that was booted again is used on only if everything was flushed; else every call fails for good.
func TestBootChanged(t *testing.T) {
	unit := bytes.Repeat([]byte{7}, block.UnitBytes)
	for _, c := range []struct {
		name string
		do   func(*Replica) error
		lost bool
	}{
		{"nothing written", func(*Replica) error { return nil }, false},
		{"written", func(r *Replica) error { _, err := r.WriteAt(unit, 0); return err }, true},
		{"zeroed", func(r *Replica) error { return r.Zero(0, block.UnitBytes) }, true},
		{"written and flushed", func(r *Replica) error {
			_, err := r.WriteAt(unit, 0)
			return errors.Join(err, r.Flush())
		}, false},
		{"written, flushed and written", func(r *Replica) error {
			_, err := r.WriteAt(unit, 0)
			err = errors.Join(err, r.Flush())
			_, err2 := r.WriteAt(unit, block.UnitBytes)
			return errors.Join(err, err2)
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFar(t, testHead, testSize)
			w := replica.Writer{Epoch: 1, Session: 1}
			r := f.writer(t, w)
			if err := c.do(r); err != nil {
				t.Fatal(err)
			}
			f.restart(true, disk.CrashOptions{Keep: disk.KeepAll})
			_, err := r.WriteAt(unit, 2*block.UnitBytes)
			if lost := errors.Is(err, ErrRestarted) && errors.Is(err, block.ErrFailed); lost != c.lost || err != nil && !lost {
				t.Fatalf("write: %v, want it lost: %t", err, c.lost)
			}
			if !c.lost {
				if err := r.Flush(); err != nil {
					t.Fatal(err)
				}
				f.restart(true, disk.CrashOptions{Keep: disk.KeepNone})
				got := make([]byte, block.UnitBytes)
				if _, err := r.ReadAt(got, 2*block.UnitBytes); err != nil || !bytes.Equal(got, unit) {
					t.Fatalf("read in the third boot: %v", err)
				}
				return
			}
			_, readErr := r.ReadAt(make([]byte, 512), 0)
			for what, err := range map[string]error{"read": readErr, "flush": r.Flush(), "confirm": r.Confirm(t.Context(), w), "fence": r.Fence(t.Context(), w), "fence of a newer": r.Fence(t.Context(), replica.Writer{Epoch: 2})} {
				if !errors.Is(err, block.ErrFailed) {
					t.Errorf("%s: %v, want a failure for good", what, err)
				}
			}
		})
	}
}

// TestSilence: a peer that says nothing any more, without an end, is given up within a beat more than the silence, and only then.
func TestSilence(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFar(t, testHead, testSize)
		r := f.writer(t, replica.Writer{Epoch: 1, Session: 1})
		dials := f.net.dialed()
		pass(time.Hour) // an idle connection is kept
		if since, err := r.Away(); f.net.dialed() != dials || !since.IsZero() {
			t.Fatalf("after an idle hour: %d connections more, away since %v: %v", f.net.dialed()-dials, since, err)
		}
		f.net.swallow()
		f.net.away()
		start := time.Now()
		done := make(chan error, 1)
		go func() {
			_, err := r.WriteAt(make([]byte, block.UnitBytes), 0)
			done <- err
		}()
		pass(2500 * time.Millisecond)
		if since, _ := r.Away(); !since.IsZero() {
			t.Fatal("given up too early")
		}
		pass(3 * time.Second)
		since, err := r.Away()
		if since.IsZero() || err == nil || since.Sub(start) > 5*time.Second {
			t.Fatalf("away since %v after the silence began: %v", since.Sub(start), err)
		}
		pass(time.Hour)
		select {
		case err := <-done:
			t.Fatalf("a call returned while the peer was away: %v", err)
		default:
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := r.Confirm(ctx, replica.Writer{Epoch: 1, Session: 1}); !errors.Is(err, ErrAway) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a verb's end of patience: %v", err)
		}
		if _, err := Open(ctx, f.config()); !errors.Is(err, ErrAway) {
			t.Errorf("open: %v", err)
		}
		f.net.cut()
		_ = f.srv.Close()
		f.start()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if since, err := r.Away(); !since.IsZero() {
			t.Errorf("still away: %v", err)
		}
		_ = r.Close()
	})
}

// TestCloseWhileAway: Close waits for nobody, and lets every call return.
func TestCloseWhileAway(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFar(t, testHead, testSize)
		r := f.writer(t, replica.Writer{Epoch: 1, Session: 1})
		f.net.swallow()
		f.net.away()
		errs := make(chan error, 5)
		go func() { _, err := r.WriteAt(make([]byte, block.UnitBytes), 0); errs <- err }()
		go func() { errs <- r.Flush() }()
		go func() { errs <- r.Confirm(context.Background(), replica.Writer{Epoch: 1, Session: 1}) }()
		go func() { _, err := r.Status(context.Background()); errs <- err }()
		go func() { errs <- r.Fence(context.Background(), replica.Writer{Epoch: 2, Session: 1}) }()
		pass(30 * time.Second)
		start := time.Now()
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("Close took %v", took)
		}
		for range cap(errs) {
			if err := <-errs; !errors.Is(err, block.ErrClosed) {
				t.Errorf("a call that waited: %v", err)
			}
		}
		if err := r.Close(); !errors.Is(err, block.ErrClosed) {
			t.Errorf("Close again: %v", err)
		}
		f.net.cut()
	})
}

// TestResume: a process that was killed on the engine's side comes back as the same epoch with the next session, as volume.Resume does, and its predecessor, which may live on, gets nowhere.
func TestResume(t *testing.T) {
	f := newFar(t, testHead, testSize)
	unit := bytes.Repeat([]byte{1}, block.UnitBytes)
	w := replica.Writer{Epoch: 4, Session: 1}
	for range 3 {
		old := f.writer(t, w)
		if _, err := old.WriteAt(unit, 0); err != nil {
			t.Fatal(err)
		}
		f.net.cut() // its session on the wire has moved on
		if _, err := old.WriteAt(unit, 0); err != nil {
			t.Fatal(err)
		}
		next := f.client(t)
		st, err := next.Status(t.Context())
		if err != nil || st.Writer != w {
			t.Fatalf("writer %+v, %v, want %+v", st.Writer, err, w)
		}
		w.Session = st.Writer.Session + 1
		if err := next.Fence(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		if _, err := old.WriteAt(unit, 0); !errors.Is(err, block.ErrFenced) {
			t.Fatalf("the process before: %v", err)
		}
		_ = next.Close()
	}
}

// TestFencingOrders has two engines say fence, write and confirm in every order of steps, with a lost connection at every place: the higher epoch always ends the lower one for good, and what the
// higher one wrote stays.
func TestFencingOrders(t *testing.T) {
	f := newFar(t, testHead, testSize)
	epoch := uint64(10)
	var orders [][]int // who does the next step
	var grow func(prefix []int, a, b int)
	grow = func(prefix []int, a, b int) {
		if a == 0 && b == 0 {
			orders = append(orders, append([]int(nil), prefix...))
		}
		if a > 0 {
			grow(append(prefix, 0), a-1, b)
		}
		if b > 0 {
			grow(append(prefix, 1), a, b-1)
		}
	}
	grow(nil, 3, 3)
	for _, order := range orders {
		for cut := range len(order) {
			runOrder(t, f, order, cut, epoch)
			epoch += 2
		}
	}
	t.Logf("%d orders", len(orders)*6)
}

// runOrder has the lower epoch (0) and the higher one (1) take their steps in an order, with every connection lost before step cut.
func runOrder(t *testing.T, f *far, order []int, cut int, epoch uint64) {
	t.Helper()
	w := [2]replica.Writer{{Epoch: epoch, Session: 1}, {Epoch: epoch + 1, Session: 1}}
	var r [2]*Replica
	for i := range r {
		r[i] = f.client(t)
		defer r[i].Close()
	}
	step, fenced := [2]int{}, [2]bool{}
	for at, who := range order {
		if at == cut {
			f.net.cut()
		}
		var err error
		switch step[who] {
		case 0:
			err = r[who].Fence(t.Context(), w[who])
		case 1:
			_, err = r[who].WriteAt(bytes.Repeat([]byte{byte(epoch) + byte(who)}, block.UnitBytes), 0)
		case 2:
			err = r[who].Confirm(t.Context(), w[who])
		}
		step[who]++
		switch {
		case err == nil && !(who == 0 && fenced[1]):
			fenced[who] = true
		case who == 0 && fenced[1] && errors.Is(err, block.ErrFenced):
		default:
			t.Fatalf("order %v, cut before %d: step %d of %d: %v", order, cut, at, who, err)
		}
	}
	p := make([]byte, 1)
	if _, err := r[1].ReadAt(p, 0); err != nil || p[0] != byte(epoch)+1 {
		t.Fatalf("order %v, cut before %d: read %d, %v, want what the higher epoch wrote, %d", order, cut, p[0], err, byte(epoch)+1)
	}
}

// held is a connection to a replica whose writes wait.
type held struct {
	replica.Replica
	hold func()
}

func (h held) WriteAt(p []byte, off int64) (int, error) {
	h.hold()
	return h.Replica.WriteAt(p, off)
}

// TestOldCopyOfAWrite: a write that hangs at the peer when its connection is lost is sent again, and the old copy, which goes on later, changes nothing any more: on its way to the replica it is
// refused; in the disk, nothing is let in before it has ended.
func TestOldCopyOfAWrite(t *testing.T) {
	for _, inDisk := range []bool{false, true} {
		f := newFar(t, testHead, testSize)
		stuck, let := make(chan struct{}), make(chan struct{})
		var armed atomic.Bool
		hold := func() {
			if armed.CompareAndSwap(true, false) {
				close(stuck)
				<-let
			}
		}
		if inDisk {
			f.fsys.OnOp(func(op disk.Op) {
				if op.Kind == disk.OpWrite {
					hold()
				}
			})
		} else {
			f.wrap = func(r replica.Replica) replica.Replica { return held{r, hold} }
		}
		r := f.writer(t, replica.Writer{Epoch: 1, Session: 1})
		write := func(b byte) error {
			_, err := r.WriteAt(bytes.Repeat([]byte{b}, block.UnitBytes), 0)
			return err
		}
		if err := write(9); err != nil { // the unit is mapped: from here on a write is one write of the disk
			t.Fatal(err)
		}
		if err := r.Flush(); err != nil {
			t.Fatal(err)
		}
		armed.Store(true)
		done := make(chan error, 1)
		var wg sync.WaitGroup
		wg.Go(func() { done <- write(1) })
		<-stuck
		f.net.cut()
		if inDisk {
			close(let)
		}
		if err := <-done; err != nil { // sent again on the next connection
			t.Fatal(err)
		}
		if err := write(2); err != nil {
			t.Fatal(err)
		}
		if !inDisk {
			close(let)
		}
		wg.Wait()
		_ = r.Close()
		f.srv.Drop(testReplica) // now the old copy has ended too
		again := f.writer(t, replica.Writer{Epoch: 2, Session: 1})
		p := make([]byte, 1)
		if _, err := again.ReadAt(p, 0); err != nil || p[0] != 2 {
			t.Fatalf("in the disk %t: read %d, %v, want what was written last", inDisk, p[0], err)
		}
	}
}

// SetSnapshot implements replica.Replica.
func (h held) SetSnapshot(ctx context.Context, w replica.Writer, id replica.LayerID, m replica.SnapshotMeta) error {
	h.hold()
	return h.Replica.SetSnapshot(ctx, w, id, m)
}

// TestOldCopyOfAVerb: a verb that hangs at the peer, and whose connection alone falls silent, is said again; the old copy, which goes on after a later verb, changes nothing any more.
func TestOldCopyOfAVerb(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFar(t, testHead, testSize)
		stuck, let := make(chan struct{}), make(chan struct{})
		var armed atomic.Bool
		f.wrap = func(r replica.Replica) replica.Replica {
			return held{r, func() {
				if armed.CompareAndSwap(true, false) {
					close(stuck)
					<-let
				}
			}}
		}
		w := replica.Writer{Epoch: 1, Session: 1}
		r := f.writer(t, w)
		c := replica.Change{Verb: replica.VerbSnapshot, Chain: replica.Chain{Generation: 2, SizeBytes: testSize, Layers: []replica.LayerID{"00000000000000000000000000000002", testHead}},
			Snapshot: &replica.SnapshotMeta{Name: "one"}}
		if err := r.Change(t.Context(), w, c); err != nil {
			t.Fatal(err)
		}
		armed.Store(true)
		done := make(chan error, 1)
		go func() {
			done <- r.SetSnapshot(context.Background(), w, testHead, replica.SnapshotMeta{Name: "one", Labels: map[string]string{"n": "1"}})
		}()
		<-stuck
		f.net.each(func(p *pipe) { p.swallowIf(preambleVerbs) })
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if err := r.SetSnapshot(t.Context(), w, testHead, replica.SnapshotMeta{Name: "one", Labels: map[string]string{"n": "2"}}); err != nil {
			t.Fatal(err)
		}
		close(let)
		pass(time.Second)
		st, err := r.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range st.Layers {
			if l.ID == testHead && l.Snapshot.Labels["n"] != "2" {
				t.Errorf("the snapshot has %+v, want what was said last", l.Snapshot)
			}
		}
		_ = r.Close()
		f.net.cut()
	})
}

// TestFenceOnce: a number lets in one connection, the first that comes with it, and the refusal tells the newest.
func TestFenceOnce(t *testing.T) {
	f := newFar(t, testHead, testSize)
	talk := newTalker(f.config().defaults())
	defer talk.close()
	low, _ := onWire(replica.Writer{Epoch: 1, Session: 1}, 4)
	wire, _ := onWire(replica.Writer{Epoch: 1, Session: 1}, 5)
	if _, err := talk.ask(t.Context(), "fence", question{Replica: testReplica, Writer: &wire}, nil); err != nil {
		t.Fatal(err)
	}
	for _, w := range []replica.Writer{wire, low} {
		a, err := talk.ask(t.Context(), "fence", question{Replica: testReplica, Writer: &w}, nil)
		if !errors.Is(err, block.ErrFenced) || a.Failure == nil || a.Failure.Held == nil || *a.Failure.Held != wire {
			t.Errorf("fence with %+v: %v, %+v", w, err, a.Failure)
		}
	}
	if _, err := talk.ask(t.Context(), "confirm", question{Replica: testReplica, Writer: &wire}, nil); err != nil {
		t.Errorf("the one that was let in: %v", err)
	}
}

// TestUnflushed: only a flush that began when no write was under way covers those before it.
func TestUnflushed(t *testing.T) {
	var u unflushed
	if u.dirty() {
		t.Error("dirty at first")
	}
	u.begin()
	early := u.mark() // a write is under way
	u.end()
	u.clean(early)
	if !u.dirty() {
		t.Error("clean after a flush that began before the write had returned")
	}
	late := u.mark()
	u.begin()
	u.clean(late)
	if !u.dirty() {
		t.Error("clean although a write began after the flush")
	}
	u.end()
	u.clean(u.mark())
	u.clean(early) // one that was slow
	if u.dirty() {
		t.Error("dirty after a flush of everything")
	}
}

// TestSharing: a replica is opened once for all connections, stays open while somebody may come back, and is released then; Drop takes it from everybody at once.
func TestSharing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f := newFar(t, testHead, testSize)
		r := f.writer(t, replica.Writer{Epoch: 1, Session: 1})
		other := f.client(t)
		if f.openedTimes() != 1 {
			t.Errorf("opened %d times", f.openedTimes())
		}
		pass(time.Hour)
		if !f.isOpen() {
			t.Error("released while it was used")
		}
		f.srv.Drop(testReplica)
		f.srv.Drop("nothing")
		if _, err := r.WriteAt(make([]byte, block.UnitBytes), 0); err != nil { // comes back by itself
			t.Fatal(err)
		}
		if f.openedTimes() != 2 {
			t.Errorf("opened %d times, want twice", f.openedTimes())
		}
		_, _ = r.Close(), other.Close()
		pass(5 * time.Second)
		if !f.isOpen() {
			t.Error("released at once")
		}
		pass(10 * time.Second)
		if f.isOpen() {
			t.Error("never released")
		}
		r = f.writer(t, replica.Writer{Epoch: 2, Session: 1})
		if f.openedTimes() != 3 {
			t.Errorf("opened %d times, want three", f.openedTimes())
		}
		_ = r.Close()
	})
}

// TestErrors: what a Host or a replica says comes back as what it is.
func TestErrors(t *testing.T) {
	own := errors.New("something of the host's own")
	for _, want := range []error{ErrUnknown, ErrBusy, block.ErrFailed, block.ErrCorrupt, own} {
		f := newFar(t, testHead, testSize)
		f.fail = want
		f.srv.cfg.Codes = []Code{{"own", own}}
		cfg := f.config()
		cfg.Codes = []Code{{"own", own}}
		if _, err := Open(t.Context(), cfg); !errors.Is(err, want) {
			t.Errorf("open: %v, want %v", err, want)
		}
	}
	f := newFar(t, testHead, testSize)
	f.fail = errors.New("nobody's")
	if _, err := Open(t.Context(), f.config()); !errors.Is(err, errFar) {
		t.Errorf("open: %v", err)
	}
	f.fail = nil
	cfg := f.config()
	cfg.VolumeID = "ffffffffffffffffffffffffffffffff"
	r := f.writer(t, replica.Writer{Epoch: 1, Session: 1})
	if err := r.Keep(t.Context(), replica.Writer{Epoch: 1, Session: 1}, replica.Record{VolumeID: replicatest.VolumeID, Epoch: 1, Generation: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), cfg); !errors.Is(err, replica.ErrChain) {
		t.Errorf("open as another volume's: %v", err)
	}
}

// broken is a connection to a replica whose I/O fails.
type broken struct {
	replica.Replica
	err error
}

func (b broken) WriteAt([]byte, int64) (int, error) { return 0, b.err }
func (b broken) ReadAt([]byte, int64) (int, error)  { return 0, b.err }
func (b broken) Flush() error                       { return b.err }

// TestIOErrors: errors of reads, writes and flushes come back as every sentinel that they are, and a flush that failed never succeeds again.
func TestIOErrors(t *testing.T) {
	for _, want := range []error{block.ErrNoSpace, block.ErrFailed, block.ErrCorrupt, errors.Join(block.ErrFailed, block.ErrNoSpace)} {
		f := newFar(t, testHead, testSize)
		f.wrap = func(r replica.Replica) replica.Replica { return broken{r, want} }
		r := f.writer(t, replica.Writer{Epoch: 1, Session: 1})
		_, readErr := r.ReadAt(make([]byte, 512), 0)
		_, writeErr := r.WriteAt(make([]byte, block.UnitBytes), 0)
		for _, c := range codes {
			for what, err := range map[string]error{"read": readErr, "write": writeErr} {
				if errors.Is(err, c.err) != errors.Is(want, c.err) {
					t.Errorf("%s that failed with %v: %v", what, want, err)
				}
			}
		}
		if err := r.Flush(); err == nil {
			t.Errorf("flush that failed with %v succeeded", want)
		}
		f.net.cut()
		if err := r.Flush(); !errors.Is(err, block.ErrFailed) {
			t.Errorf("flush after one that failed: %v", err)
		}
	}
}
