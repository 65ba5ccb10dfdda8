package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/block/blocktest"
)

// connect serves e and returns a Client of it.
func connect(t testing.TB, e Export, o ClientOptions) *Client {
	t.Helper()
	_, c := connectServer(t, e, o)
	return c
}

func connectServer(t testing.TB, e Export, o ClientOptions) (*Server, *Client) {
	t.Helper()
	s, err := NewServer(Config{Exports: Single(e), Report: func(err error) { t.Log(err) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { within(t, "Close of the server", func() { _ = s.Close() }) })
	a, b := socketPair(t)
	s.wg.Go(func() { _ = s.ServeConn(b) })
	c, err := NewClient(t.Context(), a, e.Name, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { within(t, "Close of the client", func() { _ = c.Close() }) })
	return s, c
}

// TestClientKeepsTheContract runs the suite of block.Device over a socket, with every way a server may be.
func TestClientKeepsTheContract(t *testing.T) {
	blocktest.Run(t, blocktest.Config{
		New: func(t testing.TB, n int64) block.Device {
			return connect(t, Export{Device: block.NewMem(n)}, ClientOptions{})
		},
		HugeBytes: 8 << 40,
	})
}

// TestClientOfAPlainServer: without structured replies, block status and write zeroes, and with blocks of 4096 bytes and small payloads.
func TestClientOfAPlainServer(t *testing.T) {
	blocktest.Run(t, blocktest.Config{
		AlignBytes: block.UnitBytes,
		New: func(t testing.TB, n int64) block.Device {
			a, b := socketPair(t)
			mem := block.NewMem(n)
			var wg sync.WaitGroup
			wg.Go(func() { plainServer(t, b, mem) })
			c, err := NewClient(t.Context(), a, "x", ClientOptions{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = c.Close(); _ = b.Close(); wg.Wait() })
			return c
		},
	})
}

// plainServer refuses every option but GO and serves what is left, one request after the other. It fails the test when the client asks
// for what it was not granted.
func plainServer(t testing.TB, nc net.Conn, mem *block.Mem) {
	h := &haggler{rw: nc}
	if err := h.greet(); err != nil {
		t.Error(err)
		return
	}
	for {
		opt, _, err := h.option()
		if err != nil {
			t.Error(err)
			return
		}
		if opt != optGo {
			_ = h.reply(opt, repErrUnsup, nil)
			continue
		}
		info := be.AppendUint64(be.AppendUint16(nil, infoExport), uint64(mem.Size()))
		_ = h.reply(opt, repInfo, be.AppendUint16(info, flagHasFlags|flagFlush))
		blocks := be.AppendUint32(be.AppendUint16(nil, infoBlockSize), 4096)
		_ = h.reply(opt, repInfo, be.AppendUint32(be.AppendUint32(blocks, 8192), 70_000))
		_ = h.reply(opt, repAck, nil)
		break
	}
	for {
		var head [requestBytes]byte
		if _, err := io.ReadFull(nc, head[:]); err != nil {
			return
		}
		req, _ := parseRequest(head[:])
		p := make([]byte, req.n)
		if req.n > 69632 || req.off%4096 != 0 || req.n%4096 != 0 {
			t.Errorf("command %d asks for %d bytes at %d", req.cmd, req.n, req.off)
		}
		out := make([]byte, simpleBytes)
		putSimple(out, req.cookie, OK)
		switch req.cmd {
		case cmdRead:
			_, _ = mem.ReadAt(p, req.off)
			out = append(out, p...)
		case cmdWrite:
			if _, err := io.ReadFull(nc, p); err != nil {
				return
			}
			_, _ = mem.WriteAt(p, req.off)
		case cmdFlush:
		default:
			return
		}
		if _, err := nc.Write(out); err != nil {
			return
		}
	}
}

func TestClientReadOnly(t *testing.T) {
	blocktest.RunReadOnly(t, blocktest.ReadOnlyConfig{New: func(t testing.TB, content []byte) block.Device {
		mem := block.NewMem(int64(len(content)))
		if _, err := mem.WriteAt(content, 0); err != nil {
			t.Fatal(err)
		}
		return connect(t, Export{Device: mem, ReadOnly: true}, ClientOptions{})
	}})
	c := connect(t, Export{Device: block.NewMem(4096)}, ClientOptions{ReadOnly: true})
	if _, err := c.WriteAt([]byte{1}, 0); !errors.Is(err, block.ErrReadOnly) || !c.ReadOnly() {
		t.Errorf("a write through a read-only client: %v", err)
	}
}

// TestClientLarge: requests beyond the maximum payload are several.
func TestClientLarge(t *testing.T) {
	c := connect(t, Export{Device: block.NewMem(128 << 20)}, ClientOptions{})
	p := make([]byte, maxPayloadBytes*2+12345)
	for i := range p {
		p[i] = byte(i >> 12)
	}
	got := make([]byte, len(p))
	if _, err := c.WriteAt(p, 777); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ReadAt(got, 777); err != nil || !bytes.Equal(got, p) {
		t.Fatalf("read back: %v", err)
	}
}

// TestClientErrors: what the server's Device says comes back as the same sentinel, and the connection goes on.
func TestClientErrors(t *testing.T) {
	dev := newMemDevice(1 << 20)
	var failing atomic.Pointer[error]
	fails := func(err error) { failing.Store(&err) }
	fails(nil)
	dev.hook = func(call) error { return *failing.Load() }
	c := connect(t, Export{Device: dev}, ClientOptions{})
	for _, tt := range []struct{ fail, want error }{
		{block.ErrNoSpace, block.ErrNoSpace}, {block.ErrReadOnly, block.ErrReadOnly}, {block.ErrFenced, ErrServerClosed},
		{block.ErrCorrupt, EIO}, {block.ErrAlign, EINVAL}, {errors.New("odd"), EIO},
	} {
		fails(tt.fail)
		if _, err := c.WriteAt([]byte{1}, 0); !errors.Is(err, tt.want) {
			t.Errorf("write: %v, want %v", err, tt.want)
		}
		if err := c.Zero(0, 1); !errors.Is(err, tt.want) {
			t.Errorf("zero: %v, want %v", err, tt.want)
		}
	}
	if _, err := c.ReadAt(make([]byte, 1), 0); !errors.Is(err, EIO) {
		t.Errorf("read: %v", err)
	}
	if err := c.Flush(); !errors.Is(err, EIO) {
		t.Errorf("flush: %v", err)
	}
	fails(nil)
	if err := c.Flush(); !errors.Is(err, block.ErrFailed) {
		t.Errorf("flush after a failed one: %v", err)
	}
	if _, err := c.ReadAt(make([]byte, 1), 0); err != nil {
		t.Errorf("the connection did not survive errors: %v", err)
	}
}

// TestClientDisconnected: a server that goes away fails every call, those in flight too, and Close still works.
func TestClientDisconnected(t *testing.T) {
	dev := newMemDevice(1 << 20)
	stuck := make(chan struct{})
	dev.hook = func(c call) error {
		if c.op == "write" {
			<-stuck
		}
		return nil
	}
	s, c := connectServer(t, Export{Device: dev}, ClientOptions{})
	defer close(stuck)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := c.WriteAt(make([]byte, 4096), 0); !errors.Is(err, ErrDisconnected) {
				t.Errorf("a write in flight: %v", err)
			}
		})
	}
	until(t, "a write in the device", func() bool { return dev.running.Load() > 0 })
	for _, ss := range s.snapshot() {
		ss.interrupt()
	}
	within(t, "a call after the connection is gone", wg.Wait)
	if err := c.Flush(); !errors.Is(err, ErrDisconnected) {
		t.Errorf("flush: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Flush(); !errors.Is(err, block.ErrClosed) {
		t.Errorf("flush after Close: %v", err)
	}
}

// TestClientCloseWhileStuck: Close lets go of calls that the server does not answer, also of one that it does not even take.
func TestClientCloseWhileStuck(t *testing.T) {
	dev := newMemDevice(64 << 20)
	stuck := make(chan struct{})
	dev.hook = func(call) error { <-stuck; return nil }
	c := connect(t, Export{Device: dev}, ClientOptions{})
	defer close(stuck)
	var wg sync.WaitGroup
	for i := range maxCalls + 20 { // more than may be in flight
		wg.Go(func() {
			if _, err := c.WriteAt(make([]byte, 256<<10), int64(i)); !errors.Is(err, block.ErrClosed) {
				t.Errorf("a stuck write: %v", err)
			}
		})
	}
	until(t, "a write in the device", func() bool { return dev.running.Load() > 0 })
	within(t, "Close", func() { _ = c.Close() })
	within(t, "a call after Close", wg.Wait)
}

// TestClientDialRefused: each reason has its own error.
func TestClientDialRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		server func(*haggler) error
		want   error
	}{
		"no such export": {func(h *haggler) error { return answerAll(h, optGo, repErrUnknown) }, ErrNoExport},
		"going":          {func(h *haggler) error { return answerAll(h, optGo, repErrShutdown) }, ErrServerClosed},
		"wants TLS":      {func(h *haggler) error { return answerAll(h, 0, repErrTLSReqd) }, ErrTLS},
		"no GO":          {func(h *haggler) error { return answerAll(h, optGo, repErrUnsup) }, ErrRefused},
		"hangs up":       {func(h *haggler) error { _, _, err := h.option(); return err }, io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := net.Pipe()
			var wg sync.WaitGroup
			wg.Go(func() {
				defer b.Close()
				h := &haggler{rw: b}
				if h.greet() == nil {
					_ = tt.server(h)
				}
			})
			_, err := NewClient(t.Context(), a, "x", ClientOptions{})
			if !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
			wg.Wait()
		})
	}
	a, b := net.Pipe()
	defer b.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	cancel(cause)
	if _, err := NewClient(ctx, a, "", ClientOptions{}); !errors.Is(err, cause) {
		t.Errorf("with a context that ended: %v", err)
	}
}

// answerAll answers every option with "unsupported", and opt (0: every one) with rep.
func answerAll(h *haggler, opt, rep uint32) error {
	for {
		got, _, err := h.option()
		if err != nil {
			return err
		}
		r := uint32(repErrUnsup)
		if opt == 0 || got == opt {
			r = rep
		}
		if err := h.reply(got, r, nil); err != nil {
			return err
		}
	}
}

func TestParseURI(t *testing.T) {
	for uri, want := range map[string]Target{
		"nbd://host":                         {Network: "tcp", Address: "host:10809"},
		"nbd://host:99/vol%20a":              {Network: "tcp", Address: "host:99", Export: "vol a"},
		"nbd://[::1]:5/a/b":                  {Network: "tcp", Address: "[::1]:5", Export: "a/b"},
		"nbds:///x":                          {Network: "tcp", Address: "localhost:10809", Export: "x", TLS: true},
		"nbd+unix:///v?socket=/run/a%20b":    {Network: "unix", Address: "/run/a b", Export: "v"},
		"nbds+unix:///?socket=s":             {Network: "unix", Address: "s", TLS: true},
		"nbd+unix:////v?socket=/x":           {Network: "unix", Address: "/x", Export: "/v"},
		"":                                   {},
		"http://host/":                       {},
		"nbd+unix:///v":                      {},
		"nbd+unix://host/v?socket=/x":        {},
		"nbd://host/v?socket=/x":             {},
		"nbds://host/v?tls-certificates=/x":  {Network: "tcp", Address: "host:10809", Export: "v", TLS: true, Certificates: "/x"},
		"nbds://host/v?tls-certificates=x":   {},
		"nbds://host/v?tls-certificates=":    {},
		"nbd://host/v?tls-certificates=/x":   {},
		"nbd+vsock:///v":                     {},
		"nbd:unix:/x":                        {},
		"nbd:/x":                             {},
		"nbd+unix:/v?socket=/x":              {},
		"NBD://host":                         {Network: "tcp", Address: "host:10809"},
		"nbd://host:port/":                   {},
		"nbd+unix:///v?socket=/x&socket=/y":  {},
		"nbd+unix:///v?socket=/x&tls-psk=/y": {},
	} {
		got, err := ParseURI(uri)
		if got != want || (err == nil) != (want != Target{}) || err != nil && !errors.Is(err, ErrURI) {
			t.Errorf("%q: %+v, %v; want %+v", uri, got, err, want)
		}
	}
}

// TestClientConcurrent compares many writers and readers on one connection with a slice each.
func TestClientConcurrent(t *testing.T) {
	const each, workers = 1 << 20, 16
	c := connect(t, Export{Device: block.NewMem(each * workers)}, ClientOptions{})
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(w)))
			model, base := make([]byte, each), int64(w*each)
			for i := range 150 {
				off := r.IntN(each)
				p := model[off:min(each, off+1+r.IntN(100<<10))]
				var err error
				switch r.IntN(4) {
				case 0:
					clear(p)
					err = c.Zero(base+int64(off), int64(len(p)))
				case 1:
					for j := range p {
						p[j] = byte(i + j)
					}
					_, err = c.WriteAt(p, base+int64(off))
				default:
					got := make([]byte, len(p))
					if _, err = c.ReadAt(got, base+int64(off)); err == nil && !bytes.Equal(got, p) {
						err = fmt.Errorf("wrong data at %d", off)
					}
				}
				if err != nil {
					t.Errorf("worker %d: %v", w, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestSpans(t *testing.T) {
	for _, tt := range []struct {
		add   []span // from, length
		ok    bool
		whole bool
	}{
		{[]span{{0, 10}, {10, 20}, {30, 5}}, true, true},
		{[]span{{10, 20}, {0, 10}, {30, 5}}, true, true},
		{[]span{{0, 10}, {20, 10}, {10, 15}}, false, false},
		{[]span{{0, 10}, {9, 1}}, false, false},
		{[]span{{5, 10}, {0, 6}}, false, false},
		{[]span{{0, 34}}, true, false},
	} {
		var s spans
		ok := true
		for _, a := range tt.add {
			ok = ok && s.add(a.from, a.to)
		}
		if ok != tt.ok || ok && s.whole(35) != tt.whole {
			t.Errorf("%v: %v %v", tt.add, ok, s.whole(35))
		}
	}
}

// TestClientDistrusts: replies that do not fit what was asked end the connection, and no call returns what was not read.
func TestClientDistrusts(t *testing.T) {
	data := func(done bool, off uint64, n int) []byte {
		p := make([]byte, structuredBytes)
		putChunk(p, chunk{done: done, typ: replyOffsetData, cookie: 1 << 8, n: 8 + n})
		return append(be.AppendUint64(p, off), make([]byte, n)...)
	}
	simple := func(cookie uint64) []byte {
		p := make([]byte, simpleBytes)
		putSimple(p, cookie, OK)
		return p
	}
	for name, p := range map[string][]byte{
		"half":               data(true, 0, 4096),
		"the second half":    data(true, 4096, 4096),
		"twice":              append(data(false, 0, 4096), data(true, 0, 4096)...),
		"overlapping":        append(data(false, 0, 4097), data(true, 4096, 4096)...),
		"beyond":             data(true, 4096, 8192),
		"before":             data(true, 1<<64-4096, 8192),
		"far out":            data(true, 1<<63, 4096),
		"another's":          simple(77 << 8),
		"a simple reply":     append(simple(1<<8), make([]byte, 8192)...),
		"another's answered": append(simple(1<<8|1), make([]byte, 8192)...),
	} {
		t.Run(name, func(t *testing.T) {
			a, b := net.Pipe()
			var wg sync.WaitGroup
			wg.Go(func() { _, _ = io.Copy(io.Discard, b) })
			wg.Go(func() {
				greeting := be.AppendUint16(be.AppendUint64(be.AppendUint64(nil, magicServer), magicOption), 3)
				_, _ = b.Write(append(append(greeting, negotiated(1<<20)...), p...))
			})
			defer wg.Wait()
			defer b.Close()
			c, err := NewClient(t.Context(), a, "x", ClientOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := c.ReadAt(make([]byte, 8192), 0); !errors.Is(err, ErrDisconnected) || !errors.Is(err, ErrProtocol) {
				t.Errorf("read: %v", err)
			}
		})
	}
}
