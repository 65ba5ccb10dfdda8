package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ashlar/internal/block"
)

// TestFlushDoesNotHoldUpTheLoop: while a flush waits for the medium, everything else on the connection goes on, also out of order.
func TestFlushDoesNotHoldUpTheLoop(t *testing.T) {
	for _, slowReq := range []request{
		{cmd: cmdFlush},
		{cmd: cmdWrite, flags: cmdFlagFUA, n: 4096},
		{cmd: cmdTrim, n: inlineZeroBytes + 1},
		{cmd: cmdTrim, flags: cmdFlagFUA, n: 4096},
		{cmd: cmdWriteZeroes, flags: cmdFlagNoHole, off: 4096, n: 4096},
	} {
		t.Run(fmt.Sprintf("command %d flags %d", slowReq.cmd, slowReq.flags), func(t *testing.T) {
			dev := newMemDevice(testSize)
			release := make(chan struct{})
			dev.hook = func(c call) error {
				if c.op == "flush" || c.op == "zero" && c.n > 4096 || c.op == "write" && c.off == 4096 {
					<-release
				}
				return nil
			}
			_, c := serve(t, Export{Name: "disk", Device: dev}, socketPair)
			c.join(false)
			sent := map[uint64]request{}
			var payload []byte
			if slowReq.cmd == cmdWrite {
				payload = make([]byte, slowReq.n)
			}
			first := c.start(slowReq, payload)
			sent[first] = slowReq
			for range 100 {
				c.write(8192, []byte("meanwhile"))
				c.wantData(8192, []byte("meanwhile"))
			}
			close(release)
			if r := c.await(sent); r.cookie != first || r.errno != OK {
				t.Fatalf("reply %+v", r)
			}
		})
	}
}

// TestMayWait: a Device that says that it may hold requests back does not hold up those behind, from the first one on.
func TestMayWait(t *testing.T) {
	dev := newMemDevice(testSize)
	release := make(chan struct{})
	dev.hook = func(c call) error {
		if c.op != "flush" && c.off == 4096 {
			<-release
		}
		return nil
	}
	_, c := serve(t, Export{Name: "disk", Device: dev, MayWait: func() bool { return true }}, socketPair)
	c.join(true)
	sent := map[uint64]request{}
	for _, r := range []request{{cmd: cmdRead, off: 4096, n: 4096}, {cmd: cmdWrite, off: 4096, n: 4096}, {cmd: cmdTrim, off: 4096, n: 4096}} {
		var payload []byte
		if r.cmd == cmdWrite {
			payload = make([]byte, r.n)
		}
		sent[c.start(r, payload)] = r
	}
	for range 50 {
		c.write(8192, []byte("meanwhile"))
		c.wantData(8192, []byte("meanwhile"))
		c.want(request{cmd: cmdFlush}, nil, OK)
	}
	close(release)
	for range 3 {
		if r := c.await(sent); r.errno != OK {
			t.Fatalf("reply %+v", r)
		}
	}
}

// TestFar: requests that go to another machine do not hold each other up, from the first one on; of a client that sends one at a time they are carried out where they are read,
// until it overlaps with one.
func TestFar(t *testing.T) {
	dev := newMemDevice(testSize)
	entered, release := make(chan struct{}), make(chan struct{})
	dev.hook = func(c call) error {
		if (c.op == "read" || c.op == "write") && c.off == 4096 {
			entered <- struct{}{}
			<-release
		}
		return nil
	}
	s, c := serve(t, Export{Name: "disk", Device: dev, Far: true}, socketPair)
	c.join(true)
	reqs := map[uint64]request{}
	start := func(r request) uint64 {
		var payload []byte
		if r.cmd == cmdWrite {
			payload = make([]byte, r.n)
		}
		r.cookie = c.start(r, payload)
		reqs[r.cookie] = r
		return r.cookie
	}
	overlap := func(r request, behind bool) {
		t.Helper()
		stuck := start(r)
		<-entered
		next := start(request{cmd: cmdRead, off: 8192, n: 4096})
		want := []uint64{next, stuck}
		if behind {
			want = []uint64{stuck, next}
			release <- struct{}{}
		}
		for i, cookie := range want {
			if got := c.await(reqs); got.cookie != cookie || got.errno != OK {
				t.Fatalf("command %d, reply %d: %+v, want cookie %d", r.cmd, i, got, cookie)
			}
			if i == 0 && !behind {
				release <- struct{}{}
			}
		}
	}
	stuck := []request{{cmd: cmdRead, off: 4096, n: 4096}, {cmd: cmdWrite, off: 4096, n: 4096}, {cmd: cmdRead, off: 4096, n: 256 << 10}}
	for _, r := range stuck {
		overlap(r, false)
	}
	for _, r := range stuck {
		for range aloneBackoff + aloneRun + 2 {
			c.want(request{cmd: cmdFlush}, nil, OK)
		}
		overlap(r, true)
		for range aloneRun + 2 {
			overlap(r, false)
		}
	}
	if st := s.Stats()["disk"]; st.Errors != 0 {
		t.Errorf("%+v", st)
	}
}

// TestSlowReadsOverlap: once a read proved slow, those behind it run at the same time.
func TestSlowReadsOverlap(t *testing.T) {
	dev := newMemDevice(testSize)
	gate := make(chan struct{})
	var slow atomic.Bool
	dev.hook = func(c call) error {
		if c.op != "read" {
			return nil
		}
		if slow.Swap(true) {
			<-gate
			return nil
		}
		// The first read is the slow one that is noticed.
		for start := time.Now(); time.Since(start) < 4*slowFixed; {
			runtime.Gosched()
		}
		return nil
	}
	_, c := serve(t, Export{Name: "disk", Device: dev}, socketPair)
	c.join(true)
	sent := map[uint64]request{}
	for range windowFirst + 1 {
		r := request{cmd: cmdRead, n: 4096}
		sent[c.start(r, nil)] = r
	}
	until(t, "the reads to overlap", func() bool { return dev.running.Load() == windowFirst })
	close(gate)
	for range windowFirst + 1 {
		c.await(sent)
	}
}

// TestBackPressure: a client that sends without reading replies is stopped by the bounds, costs bounded memory, and does not hold up Close.
func TestBackPressure(t *testing.T) {
	for name, r := range map[string]request{
		"reads":        {cmd: cmdRead, n: 4 << 20},
		"small reads":  {cmd: cmdRead, n: 4096},
		"writes":       {cmd: cmdWrite, n: 4096},
		"flushes":      {cmd: cmdFlush},
		"fua":          {cmd: cmdWrite, flags: cmdFlagFUA, n: 1 << 20},
		"block status": {cmd: cmdBlockStatus, n: 4 << 20},
		"refusals":     {cmd: 99},
	} {
		for kind, wire := range wires {
			t.Run(name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				s, c := serve(t, Export{Name: "disk", Device: newMemDevice(4 << 20)}, wire)
				c.join(true)
				p := requestWire(r, nil)
				if r.cmd == cmdWrite {
					p = append(p, make([]byte, r.n)...)
				}
				p = bytes.Repeat(p, 1+(256<<10)/len(p))
				if err := c.conn.SetWriteDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
					t.Fatal(err)
				}
				for {
					if _, err := c.conn.Write(p); errors.Is(err, os.ErrDeadlineExceeded) {
						break
					} else if err != nil {
						t.Fatal(err)
					}
				}
				within(t, "Close", func() { _ = s.Close() })
				if err := <-s.result; !errors.Is(err, ErrServerClosed) {
					t.Fatal(err)
				}
			})
		}
	}
}

// TestBudget: whatever is in flight, a connection's buffers stay within the budget and the little that replies without data take.
func TestBudget(t *testing.T) {
	dev := newMemDevice(64 << 20)
	gate := make(chan struct{})
	dev.hook = func(c call) error {
		if c.op == "flush" {
			<-gate
		}
		return nil
	}
	a, b := socketPair(t)
	l, err := newLink(b, 0)
	if err != nil {
		t.Fatal(err)
	}
	var pool buffers
	var stop atomic.Bool
	cn := newConn(transmission{export: Export{Device: dev}, link: l, pool: &pool, stats: &counters{}, stop: &stop})
	ran := make(chan error, 1)
	go func() { ran <- cn.run() }()
	c := newTestClient(t, a)
	var wg sync.WaitGroup
	const n, each = 100, 2 << 20
	wg.Go(func() {
		for i := range n {
			if _, err := a.Write(requestWire(request{cmd: cmdWrite, flags: cmdFlagFUA, n: each, cookie: uint64(i)}, make([]byte, each))); err != nil {
				t.Error(err)
			}
		}
	})
	used := func() int { cn.bud.mu.Lock(); defer cn.bud.mu.Unlock(); return cn.bud.used }
	until(t, "the budget to be used", func() bool {
		if used() > budgetBytes {
			t.Fatalf("%d bytes used, budget %d", used(), budgetBytes)
		}
		cn.bud.mu.Lock()
		defer cn.bud.mu.Unlock()
		return cn.bud.wait
	})
	until(t, "the requests of 2 MiB that there is room for", func() bool { return dev.running.Load() >= 15 })
	if got := dev.running.Load(); got > 16 {
		t.Fatalf("%d requests in flight, want about 16 of 2 MiB", got)
	}
	close(gate)
	sent := map[uint64]request{}
	for i := range n {
		sent[uint64(i)] = request{cmd: cmdWrite}
	}
	for range n {
		c.await(sent)
	}
	wg.Wait()
	_ = a.Close()
	<-ran
	cn.stopWorkers()
	if used() != 0 {
		t.Fatalf("%d bytes never given back", used())
	}
	l.close()
}

// TestCloseWhileDeviceBlocks: Close cuts the clients off at once and waits for the calls to return.
func TestCloseWhileDeviceBlocks(t *testing.T) {
	for _, op := range []string{"read", "flush"} {
		dev := newMemDevice(testSize)
		entered, release := make(chan struct{}, 8), make(chan struct{})
		dev.hook = func(c call) error {
			if c.op == op {
				entered <- struct{}{}
				<-release
			}
			return nil
		}
		s, c := serve(t, Export{Name: "disk", Device: dev}, socketPair)
		c.join(false)
		c.start(request{cmd: cmdRead, n: 1}, nil)
		c.start(request{cmd: cmdFlush}, nil)
		<-entered
		closed := make(chan struct{})
		go func() { _ = s.Close(); close(closed) }()
		if op == "read" {
			c.wantEOF()
		}
		select {
		case <-closed:
			t.Fatal("Close returned while a call was running")
		default:
		}
		close(release)
		within(t, "Close", func() { <-closed })
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDrain: what was received is carried out and answered, then the connection ends; new ones are refused.
func TestDrain(t *testing.T) {
	for kind, wire := range wires {
		t.Run(kind, func(t *testing.T) {
			dev := newMemDevice(testSize)
			entered, release := make(chan struct{}), make(chan struct{})
			dev.hook = func(c call) error {
				if c.op == "flush" {
					close(entered)
					<-release
				}
				return nil
			}
			s, c := serve(t, Export{Name: "disk", Device: dev}, wire)
			c.join(false)
			idleA, idleB := wire(t)
			idle := newTestClient(t, idleA)
			idleResult := make(chan error, 1)
			go func() { idleResult <- s.ServeConn(idleB) }()
			idle.hello(3) // still negotiating when the server drains

			first := c.start(request{cmd: cmdFlush}, nil)
			<-entered
			drained := make(chan error, 1)
			go func() { drained <- s.Drain(context.Background()) }()
			if err := <-idleResult; !errors.Is(err, ErrServerClosed) {
				t.Fatalf("the negotiation ended with %v", err)
			}
			select {
			case err := <-drained:
				t.Fatalf("drained with a request in flight: %v", err)
			default:
			}
			close(release)
			if r := c.await(map[uint64]request{first: {cmd: cmdFlush}}); r.errno != OK {
				t.Fatal(r.errno)
			}
			c.wantEOF()
			if err := <-drained; err != nil {
				t.Fatal(err)
			}
			if err := <-s.result; err != nil {
				t.Fatal(err)
			}
			_, late := wire(t)
			if err := s.ServeConn(late); !errors.Is(err, ErrServerClosed) {
				t.Fatal(err)
			}
		})
	}
}

// TestDrainGivesUp: when the context ends, connections are cut off and Drain does not wait for a stuck device.
func TestDrainGivesUp(t *testing.T) {
	dev := newMemDevice(testSize)
	entered, release := make(chan struct{}), make(chan struct{})
	dev.hook = func(call) error { close(entered); <-release; return nil }
	s, c := serve(t, Export{Name: "disk", Device: dev}, socketPair)
	c.join(false)
	c.start(request{cmd: cmdFlush}, nil)
	<-entered
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	within(t, "Drain", func() {
		if err := s.Drain(ctx); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	c.wantEOF()
	close(release)
}

// parkLink tells when the connection parks, and looks at it then: in the connection's own goroutine.
type parkLink struct {
	link
	look   func() error
	parked chan error
}

func (l *parkLink) park() error {
	l.parked <- l.look()
	return l.link.park()
}

// TestIdle: a quiet connection gives back its buffers and workers, waits without a thread, and goes on as before.
func TestIdle(t *testing.T) {
	a, b := socketPair(t)
	l, err := newLink(b, time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	pl := &parkLink{link: l, parked: make(chan error)}
	var pool buffers
	var stop atomic.Bool
	cn := newConn(transmission{export: diskExport(), link: pl, pool: &pool, stats: &counters{}, stop: &stop})
	pl.look = func() error {
		if cn.in != nil || cn.out != nil || cn.jobs != nil || cn.started != 0 || cn.bud.used != 0 {
			return fmt.Errorf("parked with in %v out %v jobs %v workers %d used %d", cn.in, cn.out, cn.jobs, cn.started, cn.bud.used)
		}
		return nil
	}
	ran := make(chan error, 1)
	go func() { ran <- cn.run() }()
	c := newTestClient(t, a)
	if err := <-pl.parked; err != nil {
		t.Fatal(err)
	}
	for range 3 {
		c.want(request{cmd: cmdFlush}, nil, OK)
		c.write(100, []byte("xyz"))
		c.wantData(100, []byte("xyz"))
		if err := <-pl.parked; err != nil {
			t.Fatal(err)
		}
	}
	_ = a.Close()
	if err := <-ran; !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	l.close()
}

// TestCloseWhileParked covers the server ending a connection that waits in the poller.
func TestCloseWhileParked(t *testing.T) {
	for _, how := range []string{"close", "drain"} {
		s, err := NewServer(Config{Exports: Single(diskExport())})
		if err != nil {
			t.Fatal(err)
		}
		s.idle = time.Millisecond
		a, b := socketPair(t)
		result := make(chan error, 1)
		go func() { result <- s.ServeConn(b) }()
		c := newTestClient(t, a)
		c.join(false)
		until(t, "the connection to park", func() bool { return stackHas("(*socket).park") })
		within(t, how, func() {
			if how == "close" {
				_ = s.Close()
			} else if err := s.Drain(context.Background()); err != nil {
				t.Error(err)
			}
		})
		c.wantEOF()
		<-result
	}
}

func stackHas(what string) bool {
	buf := make([]byte, 1<<20)
	return bytes.Contains(buf[:runtime.Stack(buf, true)], []byte(what))
}

// history drives one connection with random overlapping requests, each range used by one request at a time, against a model.
type history struct {
	c     *testClient
	rnd   *rand.Rand
	model []byte
	sent  map[uint64]request
	data  map[uint64][]byte // payload of a write, expected content of a read
	busy  []request
}

func (h *history) overlaps(r request) bool {
	for _, b := range h.busy {
		if r.off < b.off+int64(b.n) && b.off < r.off+int64(r.n) {
			return true
		}
	}
	return false
}

func (h *history) start() {
	n := 1 + h.rnd.Uint32N(16<<10)
	if h.rnd.IntN(20) == 0 {
		n = 1 + h.rnd.Uint32N(600<<10)
	}
	r := request{n: n, off: h.rnd.Int64N(int64(len(h.model)) - int64(n))}
	switch k := h.rnd.IntN(20); {
	case k < 8:
		r.cmd = cmdRead
	case k < 15:
		r.cmd = cmdWrite
	case k < 16:
		r.cmd = cmdTrim
	case k < 17:
		r.cmd = cmdWriteZeroes
	case k < 18:
		r.cmd, r.flags = cmdWriteZeroes, cmdFlagNoHole
	case k < 19 && h.c.structured:
		r.cmd = cmdBlockStatus
	default:
		r.cmd, r.off, r.n = cmdFlush, 0, 0
	}
	if h.rnd.IntN(10) == 0 {
		r.flags |= cmdFlagFUA
	}
	if h.overlaps(r) {
		return
	}
	var payload []byte
	at := h.model[r.off : r.off+int64(r.n)]
	want := []byte(nil)
	switch r.cmd {
	case cmdWrite:
		for i := range at {
			at[i] = byte(h.rnd.Uint32())
		}
		payload = bytes.Clone(at)
	case cmdTrim, cmdWriteZeroes:
		clear(at)
	case cmdRead:
		want = bytes.Clone(at)
	}
	r.cookie = h.c.start(r, payload)
	h.sent[r.cookie], h.data[r.cookie] = r, want
	h.busy = append(h.busy, r)
}

func (h *history) finish() {
	got := h.c.await(h.sent)
	r := h.sent[got.cookie]
	if got.errno != OK {
		h.c.t.Fatalf("%+v: error %d", r, got.errno)
	}
	if r.cmd == cmdRead && !bytes.Equal(got.data, h.data[got.cookie]) {
		h.c.t.Fatalf("%+v: wrong data", r)
	}
	delete(h.sent, got.cookie)
	delete(h.data, got.cookie)
	for i, b := range h.busy {
		if b.cookie == got.cookie {
			h.busy = append(h.busy[:i], h.busy[i+1:]...)
			break
		}
	}
}

// asyncConn writes in the background: a client that pipelines must not wait with reading until it has sent everything.
type asyncConn struct {
	net.Conn
	queue chan []byte
}

func newAsyncConn(t *testing.T, nc net.Conn) asyncConn {
	a := asyncConn{nc, make(chan []byte, 64)}
	var wg sync.WaitGroup
	wg.Go(func() {
		for p := range a.queue {
			if _, err := nc.Write(p); err != nil {
				t.Errorf("send: %v", err)
				return
			}
		}
	})
	t.Cleanup(func() { close(a.queue); wg.Wait() })
	return a
}

func (a asyncConn) Write(p []byte) (int, error) {
	a.queue <- p
	return len(p), nil
}

// TestModel checks random pipelined histories byte for byte, with a device that is sometimes slow so that requests change between the
// reading goroutine and the workers all the time.
func TestModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for name, wire := range wires {
		for _, structured := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/structured=%v", name, structured), func(t *testing.T) {
				dev := newMemDevice(4 << 20)
				var calls atomic.Uint64
				dev.hook = func(call) error {
					if n := calls.Add(1); n/200%2 == 1 && n%3 == 0 {
						for start := time.Now(); time.Since(start) < 2*slowFixed; {
							runtime.Gosched()
						}
					}
					return nil
				}
				s, c := serve(t, Export{Name: "disk", Device: dev}, wire)
				c.join(structured)
				c.conn = newAsyncConn(t, c.conn)
				h := &history{c: c, rnd: rand.New(rand.NewPCG(seed, 1)), model: make([]byte, 4<<20), sent: map[uint64]request{}, data: map[uint64][]byte{}}
				for range steps(2000) {
					for len(h.sent) < 1+h.rnd.IntN(12) {
						h.start()
					}
					for len(h.sent) > h.rnd.IntN(12) {
						h.finish()
					}
				}
				for len(h.sent) > 0 {
					h.finish()
				}
				h.c.wantData(0, h.model)
				if e := s.Stats()["disk"].Errors; e != 0 {
					t.Fatalf("%d errors", e)
				}
			})
		}
	}
}

// TestManyConnections runs clients that come, work on their own part of one Device and go, over a listening socket.
func TestManyConnections(t *testing.T) {
	const conns, part = 40, 64 << 10
	dev := newMemDevice(conns * part)
	var reports atomic.Int32
	s, err := NewServer(Config{Exports: Single{Name: "disk", Device: dev}, Report: func(err error) { t.Log(err); reports.Add(1) }})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	var wg sync.WaitGroup
	for i := range conns {
		wg.Go(func() {
			for round := range 3 {
				nc, err := net.Dial("unix", l.Addr().String())
				if err != nil {
					t.Error(err)
					return
				}
				c := &testClient{t: t, conn: nc}
				c.join(i%2 == 0)
				data := bytes.Repeat([]byte{byte(i), byte(round)}, part/2)
				c.write(int64(i*part), data)
				c.want(request{cmd: cmdFlush}, nil, OK)
				c.wantData(int64(i*part), data)
				if round == 1 {
					c.start(request{cmd: cmdDisc}, nil)
				}
				_ = nc.Close()
			}
		})
	}
	wg.Wait()
	until(t, "the connections to end", func() bool { return s.Stats()["disk"].Conns == 0 })
	if got := s.Stats()["disk"]; got.Accepted != 3*conns || got.WrittenBytes != 3*conns*part {
		t.Errorf("stats %+v", got)
	}
	within(t, "Close", func() { _ = s.Close() })
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	if reports.Load() != 0 {
		t.Fatalf("%d connections ended badly", reports.Load())
	}
	if err := s.Serve(l); !errors.Is(err, ErrServerClosed) {
		t.Fatalf("serving after Close: %v", err)
	}
}

// TestMaxConns: one connection too many is closed at once, and the others go on.
func TestMaxConns(t *testing.T) {
	s, err := NewServer(Config{Exports: Single(diskExport()), MaxConns: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var cs []*testClient
	for range 2 {
		a, b := socketPair(t)
		go s.ServeConn(b)
		c := newTestClient(t, a)
		c.join(true)
		cs = append(cs, c)
	}
	a, b := socketPair(t)
	if err := s.ServeConn(b); !errors.Is(err, ErrTooMany) {
		t.Fatal(err)
	}
	newTestClient(t, a).wantEOF()
	for _, c := range cs {
		c.wantData(0, make([]byte, 10))
	}
	infos := s.Conns()
	if s.Refused() != 1 || len(infos) != 2 || infos[0].Export != "disk" || !infos[0].Structured || infos[0].ID == infos[1].ID {
		t.Fatalf("refused %d, connections %+v", s.Refused(), infos)
	}
}

// TestTCP covers the socket link on TCP.
func TestTCP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewServer(Config{Exports: Single(diskExport())})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := newTestClient(t, nc)
	c.join(true)
	data := bytes.Repeat([]byte("tcp"), 100_000)
	c.write(0, data)
	c.wantData(0, data)
	within(t, "Close", func() { _ = s.Close() })
	c.wantEOF()
	if err := <-served; err != nil {
		t.Fatal(err)
	}
}

// TestNoAllocation: a connection in steady state allocates nothing per request, inline and by workers.
func TestNoAllocation(t *testing.T) {
	if raceEnabled {
		t.Skip("pools drop buffers at random under the race detector")
	}
	for name, r := range map[string]request{
		"read": {cmd: cmdRead, n: 4096}, "large read": {cmd: cmdRead, n: 1 << 20, flags: cmdFlagDF},
		"write": {cmd: cmdWrite, n: 4096}, "large write": {cmd: cmdWrite, n: 1 << 20},
		"fua": {cmd: cmdWrite, n: 4096, flags: cmdFlagFUA}, "flush": {cmd: cmdFlush}, "zero": {cmd: cmdWriteZeroes, n: 4096},
	} {
		t.Run(name, func(t *testing.T) {
			dev := block.NewMem(1 << 20)
			if _, err := dev.WriteAt(make([]byte, 1<<20), 0); err != nil {
				t.Fatal(err)
			}
			_, c := serve(t, Export{Name: "disk", Device: dev}, socketPair)
			c.join(true)
			var payload []byte
			if r.cmd == cmdWrite {
				payload = make([]byte, r.n)
			}
			out := requestWire(r, payload)
			in := make([]byte, simpleBytes)
			if r.cmd == cmdRead {
				in = make([]byte, dataChunkBytes+r.n)
			}
			once := func() {
				if _, err := c.conn.Write(out); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(c.conn, in); err != nil {
					t.Fatal(err)
				}
			}
			for range 50 {
				once()
			}
			if n := testing.AllocsPerRun(200, once); n > 0 {
				t.Fatalf("%v allocations per request", n)
			}
		})
	}
}

// TestSerialFlush: a client that sends one request at a time has its flushes carried out where they are read; once it overlaps with one, the workers
// get them for long.
func TestSerialFlush(t *testing.T) {
	dev := newMemDevice(1 << 20)
	entered, release := make(chan struct{}), make(chan struct{})
	var stuck atomic.Bool
	dev.hook = func(c call) error {
		if c.op == "flush" && stuck.Load() {
			entered <- struct{}{}
			<-release
		}
		return nil
	}
	s, c := serve(t, Export{Name: "disk", Device: dev}, socketPair)
	c.join(true)
	for range aloneRun + 2 {
		c.want(request{cmd: cmdFlush}, nil, OK)
	}
	reqs := map[uint64]request{}
	start := func(r request) uint64 {
		r.cookie = c.start(r, nil)
		reqs[r.cookie] = r
		return r.cookie
	}
	stuck.Store(true)
	flush := start(request{cmd: cmdFlush})
	<-entered
	read := start(request{cmd: cmdRead, n: 1}) // is held up, this once
	release <- struct{}{}
	if got := c.await(reqs); got.cookie != flush {
		t.Fatal("the read was answered before the flush: a worker had the flush")
	}
	if got := c.await(reqs); got.cookie != read {
		t.Fatal("no reply to the read")
	}
	for range aloneRun + 2 { // not yet
		flush = start(request{cmd: cmdFlush})
		<-entered
		read = start(request{cmd: cmdRead, n: 1})
		if got := c.await(reqs); got.cookie != read {
			t.Fatal("a flush holds up a client that overlaps")
		}
		release <- struct{}{}
		if got := c.await(reqs); got.cookie != flush {
			t.Fatal("no reply to the flush")
		}
	}
	stuck.Store(false)
	if st := s.Stats()["disk"]; st.Errors != 0 {
		t.Errorf("%+v", st)
	}
}
