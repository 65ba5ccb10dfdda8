package dataplane

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
	"ashlar/internal/disk"
	"ashlar/internal/replica"
)

// side is a data process of some version, in this process, with its locks.
type side struct {
	version string
	p       *Process
	ended   chan error
	stop    context.CancelFunc
}

// startSide runs a data process of a version that has the run directory.
func (b *bed) startSide(version string) *side {
	b.t.Helper()
	s := b.newSide(version)
	locks, err := hold.LockData(b.runDir, version)
	if err != nil {
		b.t.Fatal(err)
	}
	s.p.locks = locks
	b.runSide(s, func(ctx context.Context) error { return s.p.serve(ctx) })
	eventually(b.t, "the data process answers", func() bool { _, err := b.clientOf(version).Hello(b.t.Context()); return err == nil })
	return s
}

// succeedSide runs a data process that takes over.
func (b *bed) succeedSide(version string, edit ...func(*Config)) *side {
	b.t.Helper()
	s := b.newSide(version, edit...)
	b.runSide(s, func(ctx context.Context) error {
		from, err := greet(ctx, s.p.cfg)
		if err != nil {
			return err
		}
		if s.p.locks, err = hold.LockVersion(b.runDir, version); err != nil {
			return err
		}
		return s.p.takeOver(ctx, from)
	})
	return s
}

func (b *bed) newSide(version string, edit ...func(*Config)) *side {
	b.t.Helper()
	cfg, err := b.cfg.check()
	if err != nil {
		b.t.Fatal(err)
	}
	cfg.Version = version
	for _, f := range edit {
		f(&cfg)
	}
	p, err := newProcess(cfg, b.holder)
	if err != nil {
		b.t.Fatal(err)
	}
	return &side{version: version, p: p, ended: make(chan error, 1)}
}

func (b *bed) runSide(s *side, run func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	s.stop = cancel
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := run(ctx)
		if s.p.locks != nil {
			s.p.locks.Close()
		}
		s.ended <- err
	}()
	b.t.Cleanup(func() { cancel(); <-done })
}

// end waits for the side's end and returns how.
func (s *side) end(t *testing.T) error {
	t.Helper()
	select {
	case err := <-s.ended:
		return err
	case <-time.After(time.Minute):
		t.Fatalf("data process %s does not end", s.version)
		return nil
	}
}

func (b *bed) clientOf(version string) *client.Client {
	return client.New(client.DataSocket(b.runDir, version))
}

// answers waits until a version answers verbs.
func (b *bed) answers(version string) *client.Client {
	b.t.Helper()
	c := b.clientOf(version)
	eventually(b.t, version+" answers", func() bool {
		ctx, cancel := context.WithTimeout(b.t.Context(), time.Second)
		defer cancel()
		h, err := c.Hello(ctx)
		return err == nil && h.Version == version
	})
	return c
}

// settled waits until no hand-over is under way: until then State says what it said before.
func (s *side) settled(t *testing.T) {
	t.Helper()
	eventually(t, "the hand-over has ended", func() bool {
		s.p.over.mu.Lock()
		defer s.p.over.mu.Unlock()
		return !s.p.over.busy
	})
}

// one wants exactly one process to have a volume's replica: nobody else can lock it, and the version's state says it is open there.
func (b *bed) one(a client.OpenVolume, version string) client.VolumeStatus {
	b.t.Helper()
	var st client.VolumeStatus
	eventually(b.t, a.Volume+" is open at "+version, func() bool {
		st, _ = status(b.t, b.clientOf(version), a.VolumeID)
		return st.State == stateOpen
	})
	f, err := os.Open(b.recordOf(a))
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		b.t.Errorf("the replica of %s is not locked: %v", a.Volume, err)
	}
	return st
}

// recordOf is the file that has a replica's lock.
func (b *bed) recordOf(a client.OpenVolume) string {
	return filepath.Join(b.disk, replicasDir, a.Volume+"-"+a.ReplicaID[:8], "replica")
}

// volumes makes n volumes with a guest each, who has written who he is.
func (b *bed) volumesWithGuests(c *client.Client, n int) (list []client.OpenVolume, guests []*nbdConn) {
	b.t.Helper()
	for i := range n {
		a := b.volume(c, i+1, 4*mib)
		b.open(c, a)
		g := guest(b.t, b.runDir, a.Volume)
		if err := g.write(0, page(a.Volume)); err != nil {
			b.t.Fatal(err)
		}
		list, guests = append(list, a), append(guests, g)
	}
	return list, guests
}

// alive wants a guest's connection to go on, with what was written there.
func alive(t *testing.T, g *nbdConn, a client.OpenVolume) {
	t.Helper()
	got, err := g.read(0, 4096)
	if err != nil || !bytes.Equal(got, page(a.Volume)) {
		t.Errorf("the connection of %s: %v, %.30q", a.Volume, err, got)
	}
}

// TestHandOver passes three volumes back and forth under writers whose connections must never end, and looks at what stays the same and what grows.
func TestHandOver(t *testing.T) {
	b := newBed(t)
	old := b.startSide("1.0")
	c := b.clientOf("1.0")
	b.adopt(c)
	list, guests := b.volumesWithGuests(c, 3)
	bare := b.volume(c, 9, mib)
	bare.Frontend = ""
	b.open(c, bare)

	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	said := make([]int, len(guests))
	for i, g := range guests {
		wg.Go(func() {
			for n := 1; ctx.Err() == nil; n++ {
				if err := g.write(4096*int64(1+n%8), page(fmt.Sprint(n))); err != nil {
					t.Errorf("%s, write %d: %v", list[i].Volume, n, err)
					return
				}
				said[i] = n
			}
		})
	}
	before := b.one(list[0], "1.0")
	for round, version := range []string{"1.1", "1.0", "2.0", "1.0", "1.1"} {
		next := b.succeedSide(version)
		if err := old.end(t); err != nil {
			t.Fatalf("round %d: the giver ended with %v", round, err)
		}
		b.answers(version)
		for _, a := range append(list, bare) {
			st := b.one(a, version)
			if st.Epoch != before.Epoch || st.Session != before.Session+uint64(round)+1 {
				t.Errorf("round %d: %s is written by epoch %d session %d, was %d, %d", round, a.Volume, st.Epoch, st.Session, before.Epoch, before.Session)
			}
		}
		if sockets, err := client.DataSockets(b.runDir); err != nil || len(sockets) != 1 {
			t.Errorf("sockets: %v, %v", sockets, err)
		}
		old = next
	}
	cancel()
	wg.Wait()
	for i, g := range guests {
		alive(t, g, list[i])
		n := said[i]
		if got, err := g.read(4096*int64(1+n%8), 4096); err != nil || !bytes.Equal(got, page(fmt.Sprint(n))) {
			t.Errorf("%s: the last write is not there: %v", list[i].Volume, err)
		}
		if st := b.one(list[i], "1.1"); st.Clients != 1 {
			t.Errorf("%s has %d connections", list[i].Volume, st.Clients)
		}
	}
	// It is a data process like any other: verbs, and the next process of this boot.
	c = b.clientOf("1.1")
	if _, err := c.Operate(t.Context(), client.Operate{VolumeID: list[0].VolumeID, OpID: id("oper", 1), Verb: verbSnapshot, Snapshot: "s1"}); err != nil {
		t.Error(err)
	}
	if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: bare.VolumeID}); err != nil {
		t.Error(err)
	}
	old.stop()
	if err := old.end(t); err != nil {
		t.Error(err)
	}
}

// TestHandOverOfFailedVolume: a volume whose flush failed goes on answering errors to the connections that it had.
func TestHandOverOfFailedVolume(t *testing.T) {
	b := newBed(t)
	old := b.startSide("1.0")
	c := b.clientOf("1.0")
	b.adopt(c)
	list, guests := b.volumesWithGuests(c, 2)
	old.p.noteFailure(old.p.slot(list[0].VolumeID), errors.New("the medium is gone"))
	b.succeedSide("1.1")
	if err := old.end(t); err != nil {
		t.Fatal(err)
	}
	c = b.answers("1.1")
	if err := guests[0].write(0, page("x")); !errors.Is(err, errnoIO) {
		t.Errorf("a write to the failed volume: %v", err)
	}
	if st, _ := status(t, c, list[0].VolumeID); st.State != stateFailed || st.Code != client.CodeSalvage {
		t.Errorf("the failed volume: %+v", st)
	}
	alive(t, guests[1], list[1])
}

// TestAgree: which pairs of builds hand over.
func TestAgree(t *testing.T) {
	build := func(version string, edit func(*windows)) party {
		w := ourWindows()
		if edit != nil {
			edit(&w)
		}
		return party{version: version, windows: w}
	}
	giver := build("1.0", nil)
	for what, c := range map[string]struct {
		taker party
		words string // of the refusal; "": none
	}{
		"the next build":                  {build("1.1", nil), ""},
		"the same version":                {build("1.0", nil), "runs already"},
		"another hand-over":               {build("2.0", func(w *windows) { w.HandOver = window{7, 9} }), "hand-over versions: the running 1.0 speaks 1-1, the new 2.0 speaks 7-9"},
		"a wider hand-over":               {build("2.0", func(w *windows) { w.HandOver = window{1, 9} }), ""},
		"another wire":                    {build("2.0", func(w *windows) { w.Wire = window{90, 91} }), "wire versions"},
		"layers it cannot read":           {build("0.9", func(w *windows) { w.Layer = window{0, 0} }), "layer format"},
		"layers that it has left behind":  {build("9.0", func(w *windows) { w.Layer = window{8, 9} }), "layer format"},
		"replicas it cannot read":         {build("9.0", func(w *windows) { w.Replica = window{8, 9} }), "replica format"},
		"another open.json":               {build("9.0", func(w *windows) { w.Open = window{8, 9} }), "open.json format"},
		"a peer that says no windows":     {party{version: "3.0"}, "hand-over versions"},
		"layers of which it reads both":   {build("9.0", func(w *windows) { w.Layer[1]++ }), ""},
		"a hand-over that starts with it": {build("9.0", func(w *windows) { w.HandOver = window{1, 2} }), ""},
	} {
		err := agree(giver, c.taker)
		if c.words == "" {
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
			continue
		}
		if !errors.Is(err, ErrRefused) || !strings.Contains(fmt.Sprint(err), c.words) || !strings.Contains(fmt.Sprint(err), "1.0") {
			t.Errorf("%s: %v, want words %q", what, err, c.words)
		}
	}
}

// TestHandOverRefused: a pair that does not fit changes nothing, and both windows are named to the taker, to the giver's log and to who watches.
func TestHandOverRefused(t *testing.T) {
	b := newBed(t)
	b.startSide("1.0")
	c := b.clientOf("1.0")
	b.adopt(c)
	list, guests := b.volumesWithGuests(c, 1)
	before := b.one(list[0], "1.0")
	w, err := watchHandOver(t.Context(), b.runDir)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	f := b.fakeTaker("2.0", func(w *windows) { w.HandOver = window{7, 9} })
	got, err := f.peer.receive(stepTimeout)
	if err != nil || got.Kind != kindRefused || !strings.Contains(got.Text, "1-1") || !strings.Contains(got.Text, "7-9") {
		t.Errorf("the taker was told %+v, %v", got, err)
	}
	if e := <-w.events; e.What != EventRefused || e.Text != got.Text {
		t.Errorf("the watcher was told %+v", e)
	}
	f.die()
	alive(t, guests[0], list[0])
	if st := b.one(list[0], "1.0"); st.Session != before.Session || st.Clients != 1 {
		t.Errorf("after the refusal: %+v", st)
	}
}

// fakeTaker is a taker of which a test is in control.
type fakeTaker struct {
	b     *bed
	peer  *peer
	locks *hold.DataLocks
	files []*os.File // what was passed to it
}

// fakeTaker connects and says hello.
func (b *bed) fakeTaker(version string, edit func(*windows)) *fakeTaker {
	b.t.Helper()
	locks, err := hold.LockVersion(b.runDir, version)
	if err != nil {
		b.t.Fatal(err)
	}
	from, err := dialHandover(b.t.Context(), b.runDir)
	if err != nil {
		b.t.Fatal(err)
	}
	w := ourWindows()
	if edit != nil {
		edit(&w)
	}
	f := &fakeTaker{b: b, peer: from, locks: locks}
	if err := from.send(frame{Kind: kindHello, Role: roleTake, Version: version, PID: os.Getpid(), Windows: &w}); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(f.die)
	return f
}

// next receives a frame of a kind and keeps its descriptor.
func (f *fakeTaker) next(kind string) frame {
	f.b.t.Helper()
	got, err := f.peer.expect(kind)
	if err != nil {
		f.b.t.Fatal(err)
	}
	if got.file != nil {
		f.files = append(f.files, got.file)
	}
	return got
}

// hangUp closes the connection; die is all that the kernel does for a process that is killed.
func (f *fakeTaker) hangUp() { f.peer.close() }

func (f *fakeTaker) die() {
	f.peer.close()
	for _, file := range f.files {
		file.Close()
	}
	f.files = nil
	f.locks.Close()
}

// takeSteps are what a taker goes through; the giver has n volumes of one connection each.
func (f *fakeTaker) takeSteps(n int) []func() {
	say := func(kind string) func() {
		return func() {
			if err := f.peer.send(frame{Kind: kind}); err != nil {
				f.b.t.Fatal(err)
			}
		}
	}
	steps := []func(){
		func() { f.next(kindHello) },
		func() { f.next(kindBegin) },
		func() { f.next(kindDisk) },
		say(kindReady),
	}
	for range n {
		steps = append(steps, func() { f.next(kindVolume) }, func() { f.next(kindConn) }, say(kindTook))
	}
	return append(steps, func() { f.next(kindCommit) })
}

// TestTakerDiesAtEveryStep kills the taker after each of its steps. The giver serves everything in the end; a connection that was passed is cut, because nobody knows what the taker
// did with it, and one that was not goes on.
func TestTakerDiesAtEveryStep(t *testing.T) {
	b := newBed(t)
	giver := b.startSide("1.0")
	c := b.clientOf("1.0")
	b.adopt(c)
	list, guests := b.volumesWithGuests(c, 2)
	steps := len((&fakeTaker{b: b}).takeSteps(len(list)))
	for died := range steps {
		f := b.fakeTaker(fmt.Sprintf("2.%d", died), nil)
		passed, perhaps := map[int]bool{}, -1
		for i, step := range f.takeSteps(len(list))[:died+1] {
			step()
			if i >= 4 && (i-4)/3 < len(list) {
				passed[(i-4)/3] = true
			}
		}
		// The giver stops a volume as soon as the one before is taken, so it may be on its way already, or not.
		if died >= 3 && (died-3)%3 == 0 {
			perhaps = (died - 3) / 3
		}
		f.die()
		giver.settled(t)
		for i, a := range list {
			b.one(a, "1.0")
			if !passed[i] && i != perhaps {
				alive(t, guests[i], a)
				continue
			}
			if _, err := guests[i].read(0, 4096); err == nil && i != perhaps {
				t.Errorf("died after step %d: the connection of %s, which was passed, is used again", died, a.Volume)
			}
			guests[i] = guest(t, b.runDir, a.Volume)
			alive(t, guests[i], a)
		}
		// Verbs are let in again.
		if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: id("volu", 77)}); err != nil {
			t.Errorf("died after step %d: a verb: %v", died, err)
		}
	}
}

// TestGiverWaitsForTheDeath: a taker whose connection broke may live. What it has is opened again only when it is dead.
func TestGiverWaitsForTheDeath(t *testing.T) {
	b := newBed(t)
	old := b.startSide("1.0")
	c := b.clientOf("1.0")
	b.adopt(c)
	list, guests := b.volumesWithGuests(c, 1)
	f := b.fakeTaker("2.0", nil)
	for _, step := range f.takeSteps(1)[:7] {
		step()
	}
	conn := f.files[len(f.files)-1] // the guest's, which the taker may be reading from
	f.hangUp()
	// The giver saw the end: nobody takes what the taker may have.
	select {
	case err := <-old.ended:
		t.Fatal(err)
	case <-time.After(100 * time.Millisecond):
	}
	if s := old.p.slot(list[0].VolumeID); s != nil {
		if _, state, _ := s.look(); state != stateGiven {
			t.Errorf("while the taker lives the volume is %q at the giver", state)
		}
	}
	if _, err := guests[0].Write(make([]byte, 28)); err != nil {
		t.Fatal(err)
	}
	if n, err := io.ReadFull(conn, make([]byte, 28)); err != nil {
		t.Errorf("somebody else read the taker's connection: %d, %v", n, err)
	}
	f.die()
	old.settled(t)
	b.one(list[0], "1.0")
	g := guest(t, b.runDir, list[0].Volume)
	alive(t, g, list[0])
}

// TestRefusedVolumeGoesBack: a taker takes the first volume and cannot take the second: both are served by the giver again, on the connections they had.
func TestRefusedVolumeGoesBack(t *testing.T) {
	b := newBed(t)
	b.startSide("1.0")
	c := b.clientOf("1.0")
	b.adopt(c)
	list, guests := b.volumesWithGuests(c, 3)
	w, err := watchHandOver(t.Context(), b.runDir)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	taker := b.succeedSide("1.1", func(cfg *Config) {
		cfg.OpenFS = func(path string) (disk.FS, error) {
			real, err := disk.OpenReal(path, disk.RealOptions{})
			return brokenFS{real, list[1].ReplicaID}, err
		}
	})
	if err := taker.end(t); !errors.Is(err, ErrRefused) {
		t.Errorf("the taker ended with %v", err)
	}
	var told []string
	for e := range w.events {
		told = append(told, e.What)
		if e.What == EventReturned {
			if !strings.Contains(e.Text, errBroken.Error()) || !strings.Contains(e.Text, list[1].Volume) {
				t.Errorf("told %q", e.Text)
			}
			break
		}
	}
	if got := strings.Join(told, " "); got != "began volume returned" {
		t.Errorf("told %q", got)
	}
	for i, a := range list {
		if st := b.one(a, "1.0"); st.Clients != 1 {
			t.Errorf("%s has %d connections", a.Volume, st.Clients)
		}
		alive(t, guests[i], a)
	}
	if text, err := os.ReadFile(filepath.Join(b.runDir, "data", "run.lock")); err != nil || !strings.Contains(string(text), "1.0") {
		t.Errorf("run.lock says %s, %v", text, err)
	}
	// And it can be tried again.
	b.succeedSide("1.2")
	b.answers("1.2")
	for i, a := range list {
		b.one(a, "1.2")
		alive(t, guests[i], a)
	}
}

var errBroken = errors.New("this layer cannot be read today")

// brokenFS cannot open the layers of one replica.
type brokenFS struct {
	*disk.Real
	replicaID string
}

func (f brokenFS) Open(name string) (disk.File, error) {
	if strings.HasSuffix(name, f.replicaID+".layer") {
		return nil, errBroken
	}
	return f.Real.Open(name)
}

// fakeGiver is a giver of which a test is in control. It has no engine, only what passes.
type fakeGiver struct {
	b     *bed
	ln    *net.UnixListener
	peer  *peer
	locks *hold.DataLocks
	files []*os.File
}

func (b *bed) fakeGiver(version string) *fakeGiver {
	b.t.Helper()
	locks, err := hold.LockData(b.runDir, version)
	if err != nil {
		b.t.Fatal(err)
	}
	ln, err := client.Listen(handoverSocket(b.runDir))
	if err != nil {
		b.t.Fatal(err)
	}
	f := &fakeGiver{b: b, ln: ln, locks: locks}
	b.t.Cleanup(f.die)
	return f
}

func (f *fakeGiver) die() {
	f.ln.Close()
	if f.peer != nil {
		f.peer.close()
	}
	for _, file := range f.files {
		file.Close()
	}
	f.files = nil
	f.locks.Close()
}

func (f *fakeGiver) must(err error) {
	f.b.t.Helper()
	if err != nil {
		f.b.t.Fatal(err)
	}
}

// locked opens and locks a file as the process had it that goes.
func (f *fakeGiver) locked(path string) *os.File {
	f.b.t.Helper()
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	f.must(err)
	f.must(unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB))
	f.files = append(f.files, file)
	return file
}

// giveSteps are what a giver goes through with volumes without connections.
func (f *fakeGiver) giveSteps(list []client.OpenVolume) []func() {
	b := f.b
	expect := func(kind string) func() {
		return func() { _, err := f.peer.expect(kind); f.must(err) }
	}
	steps := []func(){
		func() {
			for _, a := range list {
				f.locked(b.recordOf(a))
			}
			conn, err := f.ln.AcceptUnix()
			f.must(err)
			f.peer, err = newPeer(conn)
			f.must(err)
			expect(kindHello)()
		},
		func() { w := ourWindows(); f.must(f.peer.send(frame{Kind: kindHello, Version: "1.0", Windows: &w})) },
		func() { f.must(f.peer.send(frame{Kind: kindBegin, Disks: 1, file: f.locks.Run()})) },
		func() {
			lock := f.locked(filepath.Join(b.disk, diskLockName))
			f.must(f.peer.send(frame{Kind: kindDisk, Disk: &client.Disk{Path: b.disk, ClusterID: testCluster, DiskID: b.diskID}, file: lock}))
		},
		expect(kindReady),
	}
	for i, a := range list {
		steps = append(steps, func() {
			text, err := os.ReadFile(filepath.Join(client.DataDir(b.runDir), "open.json"))
			f.must(err)
			open, err := parseOpenFile(text)
			f.must(err)
			e := open.Volumes[a.VolumeID]
			f.must(f.peer.send(frame{Kind: kindVolume, Entry: &e, file: f.files[i]}))
		}, expect(kindTook))
	}
	return append(steps, func() { f.must(f.peer.send(frame{Kind: kindCommit})) }, expect(kindMine))
}

// TestGiverDiesAtEveryStep kills the giver after each of its steps. From the moment the taker has the run directory's lock it has everything in the end; before, whoever is started next has it.
func TestGiverDiesAtEveryStep(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	list, guests := b.volumesWithGuests(c, 2)
	for _, g := range guests {
		g.flush()
	}
	b.end()
	const begun = 2 // the step that passes the lock
	writer := replica.Writer{}
	for died := range (&fakeGiver{b: b}).giveSteps(list) {
		f := b.fakeGiver("1.0")
		taker := b.succeedSide(fmt.Sprintf("2.%d", died))
		for _, step := range f.giveSteps(list)[:died+1] {
			step()
		}
		f.die()
		if died < begun {
			if err := taker.end(t); err == nil {
				t.Errorf("died after step %d: the taker has nothing, and is content", died)
			}
			continue
		}
		b.answers(taker.version)
		for _, a := range list {
			st := b.one(a, taker.version)
			if now := (replica.Writer{Epoch: st.Epoch, Session: st.Session}); !writer.Less(now) {
				t.Errorf("died after step %d: %s is written by %v, after %v", died, a.Volume, now, writer)
			}
			alive(t, guest(t, b.runDir, a.Volume), a)
		}
		if text, err := os.ReadFile(filepath.Join(b.runDir, "data", "run.lock")); err != nil || !strings.Contains(string(text), taker.version) {
			t.Errorf("died after step %d: run.lock says %s, %v", died, text, err)
		}
		taker.stop()
		if err := taker.end(t); err != nil {
			t.Errorf("died after step %d: the taker ended with %v", died, err)
		}
	}
}

// TestTakerGivesUp: a giver that only closes the connection lives, and a taker lets go of all it has.
func TestTakerGivesUp(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	list, _ := b.volumesWithGuests(c, 2)
	b.end()
	f := b.fakeGiver("1.0")
	taker := b.succeedSide("2.0")
	for _, step := range f.giveSteps(list)[:7] { // the first volume is taken
		step()
	}
	f.peer.close()
	for _, file := range f.files {
		file.Close()
	}
	f.files = nil
	if err := taker.end(t); err == nil {
		t.Error("the taker is content although the giver lives")
	}
	if !hold.VersionEnded(b.runDir, "2.0") {
		t.Error("the taker's lock is held")
	}
	f.locked(b.recordOf(list[0])) // it is free
}

// TestVerbsDuringHandOver: one that comes waits; what it becomes is up to the outcome.
func TestVerbsDuringHandOver(t *testing.T) {
	b := newBed(t)
	giver := b.startSide("1.0")
	c := b.clientOf("1.0")
	b.adopt(c)
	list, _ := b.volumesWithGuests(c, 1)
	for _, taken := range []bool{false, true} {
		f := b.fakeTaker(fmt.Sprintf("2.%t", taken), nil)
		for _, step := range f.takeSteps(1) {
			step()
		}
		st := b.state(c) // questions are answered, as if nothing were
		if len(st.Volumes) != 1 || st.Volumes[0].State != stateOpen || st.Volumes[0].Endpoint == "" {
			t.Errorf("during the hand-over: %+v", st.Volumes)
		}
		answer := make(chan error, 1)
		go func() {
			answer <- c.CloseVolume(context.Background(), client.CloseVolume{VolumeID: id("volu", 77)})
		}()
		select {
		case err := <-answer:
			t.Fatalf("a verb was answered in the middle of a hand-over: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
		if !taken {
			f.die()
			if err := <-answer; err != nil {
				t.Errorf("a verb after a hand-over that was not: %v", err)
			}
			giver.settled(t)
			b.one(list[0], "1.0")
			guest(t, b.runDir, list[0].Volume) // that of before is cut
			continue
		}
		if err := f.peer.send(frame{Kind: kindMine}); err != nil {
			t.Fatal(err)
		}
		wantCode(t, "a verb that waited for a process that has nothing any more", <-answer, client.CodeUnreachable)
	}
}
