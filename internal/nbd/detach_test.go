package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ashlar/internal/block"
)

// pairServers are two servers of the same export that connections can wander between.
func pairServers(t testing.TB, e Export) [2]*Server {
	t.Helper()
	var out [2]*Server
	for i := range out {
		s, err := NewServer(Config{Exports: Single(e), Report: func(err error) { t.Logf("server %d: %v", i, err) }})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { within(t, "Close", func() { _ = s.Close() }) })
		out[i] = s
	}
	return out
}

// attach makes a connection to s.
func attach(t testing.TB, s *Server) net.Conn {
	t.Helper()
	a, b := socketPair(t)
	s.wg.Go(func() { _ = s.ServeConn(b) })
	return a
}

func mustDetach(t testing.TB, s *Server, export string, n int) []Detached {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := s.Detach(ctx, export)
	if err != nil || len(out) != n {
		t.Fatalf("Detach: %d connections, %v; want %d", len(out), err, n)
	}
	if len(s.Conns()) != 0 {
		until(t, "the server to forget its connections", func() bool { return len(s.Conns()) == 0 })
	}
	return out
}

func mustAdopt(t testing.TB, s *Server, conns []Detached) {
	t.Helper()
	for _, d := range conns {
		if err := s.Adopt(d.File, d.State); err != nil {
			t.Fatalf("Adopt: %v\n%.300s", err, d.State)
		}
	}
}

// TestDetachUnderLoad hands connections to and fro while clients with many requests in flight compare every byte with a model. Each
// request reaches the device exactly once.
func TestDetachUnderLoad(t *testing.T) {
	const conns, workers, each = 3, 4, 256 << 10
	dev := newMemDevice(conns * workers * each)
	var writes, wrote, finished atomic.Int64
	dev.hook = func(c call) error {
		if c.op == "write" {
			writes.Add(1)
		}
		return nil
	}
	servers := pairServers(t, Export{Name: "v", Device: dev})
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for i := range conns {
		c, err := NewClient(t.Context(), attach(t, servers[0]), "v", ClientOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		for w := range workers {
			wg.Go(func() {
				defer finished.Add(1)
				r := rand.New(rand.NewPCG(seed, uint64(i*workers+w)))
				load(t, c, r, int64(i*workers+w)*each, stop, &wrote)
			})
		}
	}
	var slowest time.Duration
	rounds := 60
	for round := range rounds {
		if finished.Load() > 0 {
			break
		}
		was := wrote.Load()
		until(t, "writes between hand-overs", func() bool { return wrote.Load() > was+5 || finished.Load() > 0 })
		start := time.Now()
		mustAdopt(t, servers[(round+1)%2], mustDetach(t, servers[round%2], "v", conns))
		slowest = max(slowest, time.Since(start))
		servers[round%2].Resume("v")
	}
	close(stop)
	wg.Wait()
	if writes.Load() != wrote.Load() {
		t.Errorf("the device saw %d writes, the clients made %d", writes.Load(), wrote.Load())
	}
	t.Logf("%d writes over %d hand-overs of %d connections, the slowest took %v", wrote.Load(), rounds, conns, slowest)
}

// load writes and reads [base, base+256 KiB) of c until stop is closed.
func load(t *testing.T, c *Client, r *rand.Rand, base int64, stop <-chan struct{}, wrote *atomic.Int64) {
	model := make([]byte, 256<<10)
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		off := r.IntN(len(model))
		p := model[off:min(len(model), off+1+r.IntN(100<<10))]
		if r.IntN(2) == 0 {
			for j := range p {
				p[j] = byte(r.Uint32())
			}
			if _, err := c.WriteAt(p, base+int64(off)); err != nil {
				t.Errorf("write: %v", err)
				return
			}
			wrote.Add(1)
			continue
		}
		got := make([]byte, len(p))
		if _, err := c.ReadAt(got, base+int64(off)); err != nil || !bytes.Equal(got, p) {
			t.Errorf("read %d bytes at %d: wrong, %v", len(p), base+int64(off), err)
			return
		}
	}
}

// TestDetachAnywhere cuts a stream of requests at every kind of place, hands the connection over there, and sends the rest to the other server.
func TestDetachAnywhere(t *testing.T) {
	for name, readOnly := range map[string]bool{"writable": false, "read-only": true} {
		t.Run(name, func(t *testing.T) {
			mem := block.NewMem(64 << 20)
			servers := pairServers(t, Export{Name: "v", Device: mem, ReadOnly: readOnly})
			c := newTestClient(t, attach(t, servers[0]))
			c.join(true)
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			r := rand.New(rand.NewPCG(seed, 0))
			for round, n := range []int{1, 4096, 20_000, 70_000, 300_000, 5 << 20, 32 << 20, 100, 33_000} {
				payload := bytes.Repeat([]byte{byte(round + 1)}, n)
				reqs := map[uint64]request{}
				var stream []byte
				for cookie := range uint64(3) { // a write between two reads of its last byte
					req := request{cmd: cmdRead, cookie: cookie, off: int64(n) - 1, n: 1}
					if cookie == 1 {
						req = request{cmd: cmdWrite, cookie: 1, n: uint32(n)}
					}
					reqs[cookie] = req
					stream = append(stream, requestWire(req, payload[:map[bool]int{true: n}[cookie == 1]])...)
				}
				for _, at := range cuts(r, len(stream)) {
					sent := make(chan struct{})
					go func() { defer close(sent); c.send(stream[:at]) }()
					answers := readsBefore(at, n)
					for range answers {
						checkAnswer(t, c, reqs, readOnly)
					}
					<-sent
					mustAdopt(t, servers[1], mustDetach(t, servers[0], "v", 1))
					servers[0].Resume("v")
					servers[0], servers[1] = servers[1], servers[0]
					go func() { c.send(stream[at:]) }()
					for range 3 - answers {
						checkAnswer(t, c, reqs, readOnly)
					}
					if !readOnly {
						c.wantData(0, payload)
					}
				}
			}
		})
	}
}

// cuts are places in a stream of n bytes: in and around each header, and in the payload.
func cuts(r *rand.Rand, n int) []int {
	within := 56 + r.IntN(n-84+1)
	if n > 1<<20 {
		return []int{within}
	}
	return []int{1, 27, 28, 29, 28 + 27, 28 + 28, n - 28, n - 1, within}
}

// readsBefore is how many whole requests are in the first at bytes of a read, a write of n bytes, and a read.
func readsBefore(at, n int) (whole int) {
	for _, end := range []int{28, 56 + n, 84 + n} {
		if at >= end {
			whole++
		}
	}
	return whole
}

func checkAnswer(t *testing.T, c *testClient, reqs map[uint64]request, readOnly bool) {
	t.Helper()
	got := c.await(reqs)
	want := OK
	if readOnly && reqs[got.cookie].cmd == cmdWrite {
		want = EPERM
	}
	if got.errno != want {
		t.Fatalf("request %d: error %d, want %d", got.cookie, got.errno, want)
	}
}

// TestDetachParked: connections that hold no thread are handed over too, and answer afterwards.
func TestDetachParked(t *testing.T) {
	servers := pairServers(t, Export{Name: "v", Device: block.NewMem(1 << 20)})
	servers[0].idle, servers[1].idle = time.Millisecond, time.Millisecond
	var clients []*testClient
	for range 20 {
		c := newTestClient(t, attach(t, servers[0]))
		c.join(true)
		c.write(0, []byte{7})
		clients = append(clients, c)
	}
	for round := range 4 {
		from, to := servers[round%2], servers[(round+1)%2]
		until(t, "all to be parked", func() bool { return parked(from) == len(clients) })
		mustAdopt(t, to, mustDetach(t, from, "v", len(clients)))
		from.Resume("v")
		for _, c := range clients[:10*(round%2)] { // some have traffic, others are parked again at once
			c.wantData(0, []byte{7})
		}
	}
	for _, c := range clients {
		c.wantData(0, []byte{7})
	}
}

func parked(s *Server) (n int) {
	for _, ss := range s.snapshot() {
		ss.mu.Lock()
		if l, ok := ss.link.(*socket); ok {
			l.mu.Lock()
			if l.parked != nil {
				n++
			}
			l.mu.Unlock()
		}
		ss.mu.Unlock()
	}
	return n
}

// TestDetachInBlockingRead: a connection whose thread sits in the kernel comes out of it without a byte from its client.
func TestDetachInBlockingRead(t *testing.T) {
	servers := pairServers(t, Export{Name: "v", Device: block.NewMem(1 << 20)})
	servers[0].idle, servers[1].idle = time.Hour, time.Hour // nothing else ends a read
	c := newTestClient(t, attach(t, servers[0]))
	c.join(false)
	for round := range 20 {
		c.write(int64(round), []byte{byte(round)})
		mustAdopt(t, servers[(round+1)%2], mustDetach(t, servers[round%2], "v", 1))
		servers[round%2].Resume("v")
	}
	c.wantData(19, []byte{19})
}

// TestDetachOverTCP and over a listening unix socket: with the listeners that users have.
func TestDetachRealSockets(t *testing.T) {
	for network, address := range map[string]string{"tcp": "127.0.0.1:0", "unix": filepath.Join(t.TempDir(), "s")} {
		t.Run(network, func(t *testing.T) {
			servers := pairServers(t, Export{Name: "v", Device: block.NewMem(1 << 20)})
			l, err := net.Listen(network, address)
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			wg.Go(func() { _ = servers[0].Serve(l) })
			defer wg.Wait()
			defer l.Close()
			nc, err := net.Dial(network, l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			c := newTestClient(t, nc)
			c.join(true)
			c.write(5, []byte("hello"))
			before := servers[0].Conns()[0].Remote
			mustAdopt(t, servers[1], mustDetach(t, servers[0], "v", 1))
			c.wantData(5, []byte("hello"))
			if got := servers[1].Conns()[0].Remote; got != before {
				t.Errorf("the client's address was %q and is %q", before, got)
			}
		})
	}
}

// TestDetachGivesUp: when the context ends, what is stuck is cut and the rest is returned.
func TestDetachGivesUp(t *testing.T) {
	dev := newMemDevice(1 << 20)
	stuck := make(chan struct{})
	dev.hook = func(c call) error {
		if c.off == 4096 {
			<-stuck
		}
		return nil
	}
	servers := pairServers(t, Export{Name: "v", Device: dev})
	defer close(stuck)
	good, bad := newTestClient(t, attach(t, servers[0])), newTestClient(t, attach(t, servers[0]))
	good.join(false)
	bad.join(false)
	bad.start(request{cmd: cmdRead, off: 4096, n: 1}, nil)
	until(t, "a read in the device", func() bool { return dev.running.Load() == 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	out, err := servers[0].Detach(ctx, "v")
	if len(out) != 1 || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Detach with a stuck device: %d connections, %v", len(out), err)
	}
	bad.wantEOF()
	mustAdopt(t, servers[1], out)
	good.write(0, []byte{1})
}

// TestDetachClosesOthers: who negotiates or cannot be passed on is cut, other exports go on, and nobody comes to the export until Resume.
func TestDetachClosesOthers(t *testing.T) {
	s, err := NewServer(Config{Exports: table{"a": block.NewMem(4096), "b": block.NewMem(4096)}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	other, haggling, generic := newTestClient(t, attach(t, s)), newTestClient(t, attach(t, s)), &testClient{}
	other.hello(3)
	other.option(optGo, infoData("b"))
	near, far := socketPair(t)
	s.wg.Go(func() { _ = s.ServeConn(hideType{far}) })
	generic = newTestClient(t, near)
	generic.hello(3)
	generic.option(optGo, infoData("a"))
	until(t, "both to be served", func() bool { return len(s.Stats()) == 2 })
	haggling.hello(3)
	mustDetachOnly(t, s, "a")
	haggling.wantEOF()
	generic.wantEOF()
	other.write(0, []byte{1})
	late := newTestClient(t, attach(t, s))
	late.hello(3)
	if r := late.option(optGo, infoData("a")); r[0].typ != repErrShutdown {
		t.Errorf("GO for an export that was detached: %v", r)
	}
	s.Resume("a")
	if r := late.option(optGo, infoData("a")); r[len(r)-1].typ != repAck {
		t.Errorf("GO after Resume: %v", r)
	}
}

func mustDetachOnly(t *testing.T, s *Server, export string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if out, err := s.Detach(ctx, export); err != nil || len(out) != 0 {
		t.Fatalf("Detach: %v, %v", out, err)
	}
}

// table is an Exports of several, by name.
type table map[string]block.Device

func (e table) Lookup(name string) (Export, error) {
	if d := e[name]; d != nil {
		return Export{Name: name, Device: d}, nil
	}
	return Export{}, ErrNoExport
}

func (e table) List() []Export { return nil }

// TestAdoptRefuses: a successor that cannot keep what the client was told refuses, and the connection goes on where it was.
func TestAdoptRefuses(t *testing.T) {
	e := Export{Name: "v", Device: block.NewMem(1 << 20)}
	servers := pairServers(t, e)
	c := newTestClient(t, attach(t, servers[0]))
	c.join(true)
	c.write(9, []byte{9})
	d := mustDetach(t, servers[0], "v", 1)[0]
	change := func(with map[string]any) []byte {
		var f map[string]any
		if err := json.Unmarshal(d.State, &f); err != nil {
			t.Fatal(err)
		}
		for k, v := range with {
			f[k] = v
		}
		out, err := json.Marshal(f)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	smaller, readOnly, closed := e, e, pairServers(t, e)[0]
	smaller.Device, readOnly.ReadOnly = block.NewMem(1<<20-1), true
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		s     *Server
		state []byte
		want  error
	}{
		"a smaller device":     {pairServers(t, smaller)[0], d.State, ErrState},
		"read-only now":        {pairServers(t, readOnly)[0], d.State, ErrState},
		"another export":       {servers[1], change(map[string]any{"export": "w"}), ErrNoExport},
		"a newer version":      {servers[1], change(map[string]any{"version": 2}), ErrState},
		"an unknown field":     {servers[1], change(map[string]any{"x": 2}), ErrState},
		"an unknown context":   {servers[1], change(map[string]any{"contexts": []map[string]any{{"id": 9, "name": "x:y"}}}), ErrState},
		"a refusal of nothing": {servers[1], change(map[string]any{"refused": map[string]any{"errno": 1}}), ErrState},
		"a closed server":      {closed, d.State, ErrServerClosed},
		"no JSON":              {servers[1], []byte("{"), ErrState},
		"two documents":        {servers[1], append(bytes.Clone(d.State), "{}"...), ErrState},
	} {
		if err := tt.s.Adopt(d.File, tt.state); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if err := servers[1].Adopt(null, d.State); !errors.Is(err, ErrState) {
		t.Errorf("a file that is no socket: %v", err)
	}
	servers[0].Resume("v")
	mustAdopt(t, servers[0], []Detached{d})
	c.wantData(9, []byte{9})
}

// TestStateGolden: version 1 of the state, as any later build has to read it, or to refuse it by its version.
func TestStateGolden(t *testing.T) {
	const golden = `{"version":1,"export":"v","remote":"@","sizeBytes":1048576,"flags":493,"structured":true,` +
		`"contexts":[{"id":1,"name":"base:allocation"}],"received":"JWCVEwAA","refused":null}`
	f, err := decodeState([]byte(golden))
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(f); !strings.Contains(got, "[{1 base:allocation}] [37 96 149 19 0 0]") {
		t.Error(got)
	}
	again, err := encodeState(f.state(), f.rest(), f.Remote)
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.Replace(golden, `,"refused":null`, "", 1); string(again) != want {
		t.Errorf("\n%s, want\n%s", again, want)
	}
}

// FuzzAdopt gives arbitrary states to a server: none may make it panic, hang or ask its device for what it has not.
func FuzzAdopt(f *testing.F) {
	st := state{Export: "disk", Structured: true, Contexts: []uint32{1}, SizeBytes: 64 << 10, Flags: flagHasFlags | flagDF}
	for _, left := range []rest{
		{}, {received: requestWire(request{cmd: cmdWrite, n: 9000}, make([]byte, 100))[:60]},
		{received: requestWire(request{cmd: cmdRead, n: 9000}, nil)},
		{refused: &refusal{req: request{cookie: 5}, errno: EPERM, skip: 10}},
	} {
		data, err := encodeState(st, left, "client")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, requestWire(request{cmd: cmdFlush}, nil))
	}
	f.Fuzz(func(t *testing.T, data, sent []byte) {
		s, err := NewServer(Config{Exports: Single{Name: "disk", Device: boundedDevice{block.NewMem(64 << 10), t}}})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		a, b := socketPair(t)
		file, err := b.(*net.UnixConn).File()
		if err != nil {
			t.Fatal(err)
		}
		_ = b.Close()
		if err := s.Adopt(file, data); err != nil {
			_ = file.Close()
			_ = a.Close()
			if errors.Is(err, ErrState) || errors.Is(err, ErrNoExport) {
				return
			}
			t.Fatal(err)
		}
		served := make(chan struct{})
		go func() { defer close(served); s.wg.Wait() }()
		feed(t, a, sent, served)
	})
}
