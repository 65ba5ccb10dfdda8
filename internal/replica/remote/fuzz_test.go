package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/nbd"
	"ashlar/internal/replica"
)

func FuzzExportName(f *testing.F) {
	for _, s := range []string{"replica/a1/1/4294967296", "snapshot/a1/b2/c3", "source/image/d/e", "source/layer/a/b", "replica/../1/1", "replica/a/01/1", "replica/a/1/18446744073709551616", "source/image/.x/e", "", "///"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, ok := parseName(s)
		if !ok {
			return
		}
		if n.String() != s {
			t.Fatalf("%q is taken for %q", s, n)
		}
		for _, id := range []string{n.replica, string(n.layer), n.token} {
			if strings.ContainsAny(id, "/\x00") || strings.HasPrefix(id, ".") {
				t.Fatalf("%q has an id %q", s, id)
			}
		}
		if n.kind == kindSource && strings.Count(n.source, "/") != 2 {
			t.Fatalf("%q has a source %q", s, n.source)
		}
	})
}

func FuzzQuestion(f *testing.F) {
	w := replica.Writer{Epoch: 1, Session: 1 << 32}
	for _, q := range []question{{Replica: "a"}, {Replica: "a", Writer: &w}, {Replica: "a", Writer: &w, Change: &replica.Change{Verb: replica.VerbMerge, Merge: &replica.Merge{}}}, {Replica: "a", Diff: &diff{Off: -1, Max: -1}},
		{Replica: "a", Writer: &w, Record: &replica.Record{VolumeID: "v"}}, {Replica: "a", Writer: &w, Layer: "l", Snapshot: &replica.SnapshotMeta{Labels: map[string]string{"a": "b"}}}} {
		p, _ := json.Marshal(q)
		f.Add(p)
	}
	f.Add([]byte(`{"replica":"a"} {"replica":"b"}`))
	f.Add([]byte(`{"replica":"a","strange":1}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		q, err := readQuestion(bytes.NewReader(p))
		if err != nil {
			if !errors.Is(err, errQuestion) {
				t.Fatal(err)
			}
			return
		}
		again, err := json.Marshal(q)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := readQuestion(bytes.NewReader(again)); err != nil {
			t.Fatalf("%s was understood, %s is not: %v", p, again, err)
		}
	})
}

// FuzzConnection says anything to a server, which goes on serving others.
func FuzzConnection(f *testing.F) {
	f.Add([]byte(preambleBytes))
	f.Add([]byte(preambleVerbs + "POST /1/status HTTP/1.1\r\nHost: a\r\nContent-Length: 15\r\n\r\n{\"replica\":\"a\"}"))
	f.Add([]byte(preambleVerbs + "POST /1/fence HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"))
	f.Add([]byte(preambleBytes + "\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x11\x00\x00\x00\x0breplica/a/1"))
	f.Add([]byte("ashlar-bytes/2\n"))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	far := newFar(f, testHead, testSize)
	client := far.client(f)
	f.Fuzz(func(t *testing.T, p []byte) {
		nc, err := far.net.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = nc.Write(p)
		_ = nc.SetReadDeadline(time.Now().Add(time.Millisecond))
		_, _ = io.Copy(io.Discard, nc)
		_ = nc.Close()
		if _, err := client.Status(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzAnswer has a client listen to anything.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{\"answer\":{}}\n{}"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n{}{\"done\":1,\"total\":2}{\"answer\":{\"failure\":{\"words\":[\"fenced\",\"?\"],\"message\":\"m\",\"held\":{\"epoch\":1,\"session\":2}}}}"))
	f.Add([]byte("HTTP/1.1 503 No\r\n\r\n"))
	f.Add([]byte("ashlar-no/2-3\n"))
	f.Fuzz(func(t *testing.T, p []byte) {
		p2 := newPipe()
		go func() {
			_, _ = p2.b.Write(p)
			_, _ = io.CopyN(io.Discard, p2.b, 64)
			_ = p2.b.Close()
		}()
		talk := newTalker(Config{Dial: func(context.Context) (net.Conn, error) { return p2.a, nil }}.defaults())
		defer talk.close()
		a, err := talk.ask(t.Context(), "fence", question{Replica: "a"}, nil)
		if err == nil && a.Failure != nil {
			t.Fatal("a failure without an error")
		}
		_ = p2.a.Close()
	})
}

// TestVersionRefused: a server of another version says so, and both are told.
func TestVersionRefused(t *testing.T) {
	f := newFar(t, testHead, testSize)
	nc, err := f.net.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(nc, "ashlar-bytes/2\n")
	if got, _ := io.ReadAll(nc); string(got) != refusalPrefix+"1-1\n" {
		t.Errorf("the server says %q", got)
	}
	_ = nc.Close()
	n := newNetwork()
	ln := n.listen()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for { // as often as it is asked
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.ReadFull(nc, make([]byte, len(preambleVerbs)))
			_, _ = io.WriteString(nc, refusalPrefix+"2-3\n")
			_ = nc.Close()
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second) // who does not understand the refusal asks again for ever
	defer cancel()
	if _, err := Open(ctx, Config{ReplicaID: "a", Dial: n.dial}); !errors.Is(err, ErrVersion) || ctx.Err() != nil {
		t.Errorf("open at a server of another version: %v", err)
	}
	_ = ln.Close()
	<-done
}

// TestNames are the export names, and what is none.
func TestNames(t *testing.T) {
	for _, n := range []exportName{{kind: kindReplica, replica: "a", writer: replica.Writer{Epoch: 1, Session: 7 << 32}}, {kind: kindSnapshot, replica: "a", layer: "b", token: "c"}, {kind: kindSource, source: "layer/a/b"}} {
		if got, ok := parseName(n.String()); !ok || got != n {
			t.Errorf("%v became %v, %t", n, got, ok)
		}
	}
	for _, s := range []string{"replica/a/1/01", "replica/a/1/-1", "replica/a/1", "replica/a/1/2/3", "replica//1/2", "replica/../1/2", "source/volume/a/b", "source/image/../b", "snapshot/a/b/", "x/a/b/c"} {
		if n, ok := parseName(s); ok {
			t.Errorf("%q is taken for %v", s, n)
		}
	}
}

// TestSource: images and layers are read, with their states, over connections that break; what is not there is not there.
func TestSource(t *testing.T) {
	f := newFar(t, testHead, testSize)
	mem := block.NewMem(3 * block.UnitBytes)
	if _, err := mem.WriteAt(bytes.Repeat([]byte{5}, 2*block.UnitBytes), 0); err != nil {
		t.Fatal(err)
	}
	f.extra["layer/a/b"] = ownUnits{mem}
	dev, info, err := OpenSource(t.Context(), f.net.dial, "layer/a/b")
	if err != nil {
		t.Fatal(err)
	}
	if string(info) != `{"name":"layer/a/b"}` || dev.Size() != mem.Size() {
		t.Errorf("info %s, %d bytes", info, dev.Size())
	}
	for range 3 {
		f.net.cut()
		p := make([]byte, 2*block.UnitBytes)
		if _, err := dev.ReadAt(p, 100); err != nil || !bytes.Equal(p[:100], bytes.Repeat([]byte{5}, 100)) {
			t.Fatalf("read: %v", err)
		}
		var states []block.State
		for at := int64(0); at < dev.Size(); {
			e, err := dev.Extents(at, dev.Size()-at)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range e {
				states = append(states, e.State)
				at = e.Off + e.N
			}
		}
		if len(states) != 3 || states[0] != block.Data || states[1] != block.Zero || states[2] != block.Absent {
			t.Errorf("states %v", states)
		}
	}
	if _, err := dev.WriteAt(make([]byte, block.UnitBytes), 0); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("write: %v", err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := dev.ReadAt(make([]byte, 1), 0); !errors.Is(err, block.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
	for _, name := range []string{"layer/a/c", "image/../x", "nothing"} {
		if _, _, err := OpenSource(t.Context(), f.net.dial, name); !errors.Is(err, ErrUnknown) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// ownUnits has one unit of each state.
type ownUnits struct{ block.Device }

func (ownUnits) Extents(off, n int64) ([]block.Extent, error) {
	state := []block.State{block.Data, block.Zero, block.Absent}[off/block.UnitBytes]
	end := min((off/block.UnitBytes+1)*block.UnitBytes, off+n)
	return []block.Extent{{Off: off, N: end - off, State: state}}, nil
}

// TestSnapshotOverBreaks: a snapshot is read on over a connection that broke; one that is gone fails.
func TestSnapshotOverBreaks(t *testing.T) {
	f := newFar(t, testHead, testSize)
	w := replica.Writer{Epoch: 1, Session: 1}
	r := f.writer(t, w)
	unit := bytes.Repeat([]byte{3}, block.UnitBytes)
	if _, err := r.WriteAt(unit, 0); err != nil {
		t.Fatal(err)
	}
	next := replica.LayerID("00000000000000000000000000000002")
	c := replica.Change{Verb: replica.VerbSnapshot, Chain: replica.Chain{Generation: 2, SizeBytes: testSize, Layers: []replica.LayerID{next, testHead}}, Snapshot: &replica.SnapshotMeta{Name: "one"}}
	if err := r.Change(t.Context(), w, c); err != nil {
		t.Fatal(err)
	}
	dev, err := r.OpenSnapshot(testHead)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.WriteAt(make([]byte, block.UnitBytes), 0); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		f.Restart(t)
		got := make([]byte, block.UnitBytes)
		if _, err := dev.ReadAt(got, 0); err != nil || !bytes.Equal(got, unit) {
			t.Fatalf("read: %v", err)
		}
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.OpenSnapshot("00000000000000000000000000000009"); !errors.Is(err, replica.ErrNoSnapshot) {
		t.Errorf("a snapshot that is none: %v", err)
	}
}

// TestLimits: more connections than there may be are closed at once.
func TestLimits(t *testing.T) {
	var said bytes.Buffer // whoever writes it has ended when it is read
	srv := NewServer(ServerConfig{Host: &host{}, MaxConns: 2, Patience: time.Minute, Log: slog.New(slog.NewTextHandler(&said, nil))})
	n := newNetwork()
	ln := n.listen()
	done := make(chan error, 1)
	go func() { done <- srv.Serve(t.Context(), ln) }()
	var list []net.Conn
	for range 3 {
		nc, err := n.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, nc)
	}
	if _, err := list[2].Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the third of two: %v", err)
	}
	if err := errors.Join(srv.Close(), <-done); err != nil {
		t.Fatal(err)
	}
	if refused := strings.Count(said.String(), "as many as there may be"); refused != 1 {
		t.Errorf("that one of three was refused is said %d times: %s", refused, said.String())
	}
	if err := srv.Serve(t.Context(), n.listen()); !errors.Is(err, block.ErrClosed) {
		t.Errorf("serve after Close: %v", err)
	}
}

// TestPatience: a connection that does not say what it is for is ended.
func TestPatience(t *testing.T) {
	srv := NewServer(ServerConfig{Host: &host{}, Patience: 50 * time.Millisecond})
	n := newNetwork()
	ln := n.listen()
	done := make(chan error, 1)
	go func() { done <- srv.Serve(t.Context(), ln) }()
	nc, err := n.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nc.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("one that says nothing: %v", err)
	}
	if err := errors.Join(srv.Close(), <-done); err != nil {
		t.Fatal(err)
	}
}

// TestCloseWhileConnecting: a Server that is closed waits for nobody to say what a connection is for.
func TestCloseWhileConnecting(t *testing.T) {
	start := time.Now()
	for range 200 {
		srv := NewServer(ServerConfig{Host: &host{}, Patience: time.Minute})
		n := newNetwork()
		ln := n.listen()
		done := make(chan error, 1)
		go func() { done <- srv.Serve(t.Context(), ln) }()
		for range 4 {
			if _, err := n.dial(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		for taken := 0; taken == 0; runtime.Gosched() {
			srv.mu.Lock()
			taken = len(srv.conns)
			srv.mu.Unlock()
		}
		if err := srv.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil && !errors.Is(err, block.ErrClosed) {
			t.Fatal(err)
		}
	}
	if took := time.Since(start); took > 50*time.Second {
		t.Errorf("took %v", took)
	}
}

// TestWireWriter: the engine's writers and their connections are ordered as the engine's writers are, and then by turn.
func TestWireWriter(t *testing.T) {
	order := []struct {
		w    replica.Writer
		turn uint64
	}{{replica.Writer{Epoch: 1, Session: 1}, 0}, {replica.Writer{Epoch: 1, Session: 1}, 1}, {replica.Writer{Epoch: 1, Session: 1}, 1<<32 - 1}, {replica.Writer{Epoch: 1, Session: 2}, 0},
		{replica.Writer{Epoch: 1, Session: 1<<32 - 1}, 5}, {replica.Writer{Epoch: 2}, 0}}
	for i := 1; i < len(order); i++ {
		a, okA := onWire(order[i-1].w, order[i-1].turn)
		b, okB := onWire(order[i].w, order[i].turn)
		if !okA || !okB || !a.Less(b) || fromWire(a) != order[i-1].w {
			t.Errorf("%v and %v became %v and %v", order[i-1], order[i], a, b)
		}
	}
	if _, ok := onWire(replica.Writer{Session: 1 << 32}, 0); ok {
		t.Error("a session that does not fit")
	}
	w := replica.Writer{Epoch: 1, Session: 1}
	held, _ := onWire(w, 3)
	if got := turnAfter(w, held); got != takeOver {
		t.Errorf("after turn 3 comes %d", got)
	}
	if got := turnAfter(replica.Writer{Epoch: 2, Session: 1}, held); got != 0 {
		t.Errorf("a new writer begins with %d", got)
	}
	if e, ok := fromErrno(nbd.EIO); ok {
		t.Errorf("EIO is taken for %v", e)
	}
}
