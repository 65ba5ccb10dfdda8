package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

// echo is a Service that answers what it was told to, and remembers what it was asked.
type echo struct {
	Service            // verbs not echoed yet
	mu      sync.Mutex // guards asked
	asked   []any
	fail    error

	state   State
	changed chan struct{} // WaitState answers when it is closed
}

func (e *echo) note(a any) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked = append(e.asked, a)
	return e.fail
}

func (e *echo) Hello(context.Context) (Hello, error) {
	return Hello{Version: "1.2.3", APIMin: APIMin, APICurrent: APICurrent, PID: 7, BootID: "b"}, e.note("hello")
}
func (e *echo) AdoptDisk(_ context.Context, a Disk) (DiskStatus, error) {
	return DiskStatus{DiskID: "d", Path: a.Path, ClusterID: a.ClusterID}, e.note(a)
}
func (e *echo) State(context.Context) (State, error) { return e.state, e.note("state") }
func (e *echo) WaitState(ctx context.Context, after uint64) (State, error) {
	if err := e.note(after); err != nil {
		return State{}, err
	}
	if e.state.Rev != after {
		return e.state, nil
	}
	select {
	case <-e.changed:
		st := e.state
		st.Rev++
		return st, nil
	case <-ctx.Done():
		return State{}, ctx.Err()
	}
}
func (e *echo) CreateReplica(_ context.Context, a CreateReplica) error   { return e.note(a) }
func (e *echo) DeleteReplica(_ context.Context, a DeleteReplica) error   { return e.note(a) }
func (e *echo) RebuildReplica(_ context.Context, a RebuildReplica) error { return e.note(a) }
func (e *echo) OpenVolume(_ context.Context, a OpenVolume) (VolumeStatus, error) {
	return VolumeStatus{VolumeID: a.VolumeID, State: "open", Epoch: 1 << 60}, e.note(a)
}
func (e *echo) CloseVolume(_ context.Context, a CloseVolume) error { return e.note(a) }
func (e *echo) Operate(_ context.Context, a Operate) (VolumeStatus, error) {
	return VolumeStatus{VolumeID: a.VolumeID, State: "open"}, e.note(a)
}
func (e *echo) ImportImage(_ context.Context, a ImportImage) (Job, error) {
	return Job{ID: a.ImageID, State: "running"}, e.note(a)
}
func (e *echo) CancelImport(_ context.Context, a CancelImport) error { return e.note(a) }
func (e *echo) DeleteImage(_ context.Context, a DeleteImage) error   { return e.note(a) }
func (e *echo) Check(_ context.Context, a Check) (Problems, error) {
	return Problems{Problems: []Problem{{Object: "layer 1", What: "rot"}}}, e.note(a)
}
func (e *echo) Shutdown(_ context.Context, a Shutdown) error { return e.note(a) }

// serve puts h behind a unix socket for the length of the test.
func serve(t *testing.T, h http.Handler) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "ashlar")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "run", "x.sock")
	ln, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, ln, h, time.Second) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return socket
}

// verbs calls every method of a Service once.
func verbs(ctx context.Context, s Service) map[string]error {
	out := map[string]error{}
	_, out["hello"] = s.Hello(ctx)
	_, out["adopt"] = s.AdoptDisk(ctx, Disk{Path: "/d", ClusterID: "c"})
	_, out["state"] = s.State(ctx)
	_, out["wait"] = s.WaitState(ctx, 0)
	out["create"] = s.CreateReplica(ctx, CreateReplica{ReplicaID: "r", SizeBytes: 1 << 40})
	out["delete"] = s.DeleteReplica(ctx, DeleteReplica{ReplicaID: "r"})
	out["rebuild"] = s.RebuildReplica(ctx, RebuildReplica{DiskID: "d", ReplicaID: "r", Record: []byte(`{"epoch":1}`)})
	_, out["open"] = s.OpenVolume(ctx, OpenVolume{VolumeID: "v", Frontend: "nbd", Salvage: true})
	out["close"] = s.CloseVolume(ctx, CloseVolume{VolumeID: "v"})
	_, out["operate"] = s.Operate(ctx, Operate{VolumeID: "v", Verb: "snapshot", Labels: map[string]string{"a": "b"}})
	_, out["import"] = s.ImportImage(ctx, ImportImage{ImageID: "i", Source: "http://x"})
	out["cancel"] = s.CancelImport(ctx, CancelImport{ImageID: "i"})
	out["delete-image"] = s.DeleteImage(ctx, DeleteImage{ImageID: "i"})
	_, out["check"] = s.Check(ctx, Check{VolumeID: "v"})
	out["shutdown"] = s.Shutdown(ctx, Shutdown{Holder: true})
	return out
}

func TestVerbsArrive(t *testing.T) {
	there, here := &echo{state: State{Rev: 3}}, &echo{state: State{Rev: 3}}
	c := New(serve(t, Handler(there)))
	ctx := t.Context()
	for verb, err := range verbs(ctx, c) {
		if err != nil {
			t.Errorf("%s: %v", verb, err)
		}
	}
	verbs(ctx, here)
	if !reflect.DeepEqual(there.asked, here.asked) {
		t.Errorf("over the wire:\n%+v\nin process:\n%+v", there.asked, here.asked)
	}
	st, err := c.OpenVolume(ctx, OpenVolume{VolumeID: "v"})
	if err != nil || st.Epoch != 1<<60 {
		t.Errorf("a 64-bit epoch came back as %d, %v", st.Epoch, err)
	}
}

func TestEveryCodeComesBackAsItsSentinel(t *testing.T) {
	all := []Code{CodeNotFound, CodeExists, CodeInUse, CodeInvalid, CodeConflict, CodeNoSpace, CodeCorrupt, CodeFenced, CodeFailed, CodeSalvage,
		CodeStale, CodeForeignDisk, CodeVersion, CodeUnreachable, CodeChecksum, CodeFormat, CodeSource, CodeFrontend, CodeCancelled, CodeInternal}
	if len(codes()) != len(all) {
		t.Fatalf("the table has %d rows for %d codes", len(codes()), len(all))
	}
	e := &echo{}
	c := New(serve(t, Handler(e)))
	for _, code := range all {
		e.fail = fmt.Errorf("volume db1: do the thing: %w", Sentinel(code))
		for verb, err := range verbs(t.Context(), c) {
			if !errors.Is(err, Sentinel(code)) || CodeOf(err) != code {
				t.Errorf("%s: code %s came back as %v (%s)", verb, code, err, CodeOf(err))
			}
			if err.Error() != e.fail.Error() {
				t.Errorf("%s: message came back as %q, want %q", verb, err, e.fail)
			}
		}
	}
}

func TestCodeOf(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want Code
	}{
		{nil, ""},
		{errors.New("odd"), CodeInternal},
		{context.Canceled, CodeCancelled},
		{Failure(CodeSalvage, "the last copy failed"), CodeSalvage},
		{Failure("from-the-future", "?"), CodeInternal},
	} {
		if got := CodeOf(tc.err); got != tc.want {
			t.Errorf("CodeOf(%v) = %q, want %q", tc.err, got, tc.want)
		}
	}
	if Failure("", "x") != nil || Sentinel("") != nil {
		t.Error("the empty code is an error")
	}
}

func TestUnreachable(t *testing.T) {
	c := New(filepath.Join(t.TempDir(), "nobody.sock"))
	for verb, err := range verbs(t.Context(), c) {
		if !errors.Is(err, ErrUnreachable) {
			t.Errorf("%s: %v, want ErrUnreachable", verb, err)
		}
	}
	// A peer that takes the connection and goes away.
	socket := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			conn.Close()
		}
	}))
	if _, err := New(socket).Hello(t.Context()); !errors.Is(err, ErrUnreachable) {
		t.Errorf("closed in the middle: %v, want ErrUnreachable", err)
	}
}

func TestVersionWindows(t *testing.T) {
	for _, tc := range []struct {
		ours, theirs Window
		ok           bool
	}{
		{Window{1, 1}, Window{1, 1}, true},
		{Window{1, 3}, Window{3, 5}, true},
		{Window{3, 5}, Window{1, 3}, true},
		{Window{2, 3}, Window{1, 1}, false},
		{Window{1, 1}, Window{2, 2}, false},
	} {
		e := &echo{}
		c := New(serve(t, handler(e, tc.theirs)))
		c.window = tc.ours
		_, err := c.Hello(t.Context())
		if tc.ok {
			if err != nil {
				t.Errorf("%v asks %v: %v", tc.ours, tc.theirs, err)
			}
			continue
		}
		if !errors.Is(err, ErrVersion) {
			t.Errorf("%v asks %v: %v, want ErrVersion", tc.ours, tc.theirs, err)
		} else if !strings.Contains(err.Error(), tc.ours.String()) || !strings.Contains(err.Error(), tc.theirs.String()) {
			t.Errorf("the refusal does not name both windows %v and %v: %v", tc.ours, tc.theirs, err)
		}
		if len(e.asked) != 0 {
			t.Errorf("%v asks %v: refused, and yet it reached the service", tc.ours, tc.theirs)
		}
	}
}

// TestServerRefusesByItself proves the other direction: the serving end does not trust the asking end to check.
func TestServerRefusesByItself(t *testing.T) {
	e := &echo{}
	socket := serve(t, handler(e, Window{4, 6}))
	for _, sent := range []string{"", "1-3", "7-9", "x", "0-9", "9-4", "-", "4", "99999999999999999999-1"} {
		status, body := post(t, socket, "hello", sent, "{}")
		if status != http.StatusUpgradeRequired || !strings.Contains(body, "4-6") || !strings.Contains(body, string(CodeVersion)) {
			t.Errorf("window %q: status %d, %s", sent, status, body)
		}
	}
	if len(e.asked) != 0 {
		t.Error("a refused request reached the service")
	}
	// And the asking end refuses a server that does not say its window.
	mute := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") }))
	if _, err := New(mute).Hello(t.Context()); !errors.Is(err, ErrVersion) {
		t.Errorf("a server without a window: %v, want ErrVersion", err)
	}
}

// post sends a raw body, as a peer that is not our Client might.
func post(t *testing.T, socket, verb, window, body string) (int, string) {
	t.Helper()
	c := newCaller(socket)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://x/"+verb, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if window != "" {
		req.Header.Set(windowHeader, window)
	}
	res, err := c.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(data)
}

func TestBadRequests(t *testing.T) {
	e := &echo{}
	socket := serve(t, Handler(e))
	w := ThisBuild().String()
	for name, tc := range map[string]struct {
		verb, body string
		status     int
	}{
		"no JSON":       {"open-volume", "", http.StatusBadRequest},
		"half":          {"open-volume", `{"volumeID":`, http.StatusBadRequest},
		"wrong type":    {"open-volume", `{"volumeID":7}`, http.StatusBadRequest},
		"two values":    {"open-volume", `{} {}`, http.StatusBadRequest},
		"too long":      {"open-volume", `{"volumeID":"` + strings.Repeat("x", maxRequestBytes) + `"}`, http.StatusBadRequest},
		"unknown verb":  {"fly", `{}`, http.StatusNotFound},
		"unknown field": {"close-volume", `{"volumeID":"v","later":1}`, http.StatusOK},
	} {
		if status, body := post(t, socket, tc.verb, w, tc.body); status != tc.status {
			t.Errorf("%s: status %d, want %d: %s", name, status, tc.status, body)
		}
	}
	if want := []any{CloseVolume{VolumeID: "v"}}; !reflect.DeepEqual(e.asked, want) {
		t.Errorf("reached the service: %v, want %v", e.asked, want)
	}
	if _, err := call[Hello](t.Context(), New(socket).caller, "fly", nothing{}); !errors.Is(err, ErrInternal) {
		t.Errorf("a verb nobody knows: %v, want ErrInternal", err)
	}
}

func TestWaitState(t *testing.T) {
	e := &echo{state: State{Rev: 9}, changed: make(chan struct{})}
	c := New(serve(t, Handler(e)))
	if st, err := c.WaitState(t.Context(), 8); err != nil || st.Rev != 9 {
		t.Fatalf("wait after 8: %v, %v", st.Rev, err)
	}
	got := make(chan State, 1)
	go func() {
		st, err := c.WaitState(t.Context(), 9)
		if err != nil {
			t.Errorf("wait after 9: %v", err)
		}
		got <- st
	}()
	close(e.changed)
	if st := <-got; st.Rev != 10 {
		t.Errorf("woke with revision %d, want 10", st.Rev)
	}
	e.changed = make(chan struct{})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.WaitState(ctx, 9); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a wait that was given up: %v, want the context's error", err)
	}
}

func TestSocketsArePrivate(t *testing.T) {
	socket := serve(t, Handler(&echo{}))
	for path, want := range map[string]os.FileMode{socket: 0o600, filepath.Dir(socket): 0o700} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %o, want %o", path, info.Mode().Perm(), want)
		}
	}
	if _, err := Listen(filepath.Join(t.TempDir(), strings.Repeat("x", 200))); !errors.Is(err, ErrInvalid) {
		t.Errorf("a path no socket can have: %v, want ErrInvalid", err)
	}
}

func TestListenReplacesADeadSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	for range 2 {
		ln, err := Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		ln.Close()
	}
}

func TestDataSockets(t *testing.T) {
	run := t.TempDir()
	if got, err := DataSockets(run); err != nil || len(got) != 0 {
		t.Fatalf("nothing there: %v, %v", got, err)
	}
	for _, v := range []string{"2.0", "1.0"} {
		ln, err := Listen(DataSocket(run, v))
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
	}
	if err := os.WriteFile(filepath.Join(DataDir(run), "x.lock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := DataSockets(run)
	if want := []string{DataSocket(run, "1.0"), DataSocket(run, "2.0")}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, %v; want %v", got, err, want)
	}
}

// memLedger is the records in memory.
type memLedger struct {
	mu   sync.Mutex // guards recs
	recs map[string]MembershipEntry
}

func (m *memLedger) Read(_ context.Context, id string) (MembershipEntry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.recs[id]
	if !ok {
		return e, fmt.Errorf("read membership of %s: %w", id, ErrNotFound)
	}
	return e, nil
}

func (m *memLedger) Swap(_ context.Context, a MembershipSwap) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.recs[a.VolumeID].Rev != a.Was {
		return 0, fmt.Errorf("swap membership of %s: %w", a.VolumeID, ErrConflict)
	}
	m.recs[a.VolumeID] = MembershipEntry{Record: a.Record, Rev: a.Was + 1}
	return a.Was + 1, nil
}

func TestLedger(t *testing.T) {
	socket := serve(t, LedgerHandler(&memLedger{recs: map[string]MembershipEntry{}}))
	l, ctx := NewLedgerClient(socket), t.Context()
	if _, err := l.Read(ctx, "v"); !errors.Is(err, ErrNotFound) {
		t.Errorf("no record: %v, want ErrNotFound", err)
	}
	rec := json.RawMessage(`{"volumeID":"v","epoch":18446744073709551615}`)
	if rev, err := l.Swap(ctx, MembershipSwap{VolumeID: "v", Record: rec}); err != nil || rev != 1 {
		t.Fatalf("first swap: %d, %v", rev, err)
	}
	if _, err := l.Swap(ctx, MembershipSwap{VolumeID: "v", Record: rec}); !errors.Is(err, ErrConflict) {
		t.Errorf("a swap from an old revision: %v, want ErrConflict", err)
	}
	if e, err := l.Read(ctx, "v"); err != nil || e.Rev != 1 || string(e.Record) != string(rec) {
		t.Errorf("read back %+v, %v", e, err)
	}
	for _, bad := range []MembershipSwap{{Record: rec}, {VolumeID: "v"}} {
		if _, err := l.Swap(ctx, bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("swap of %+v: %v, want ErrInvalid", bad, err)
		}
	}
	if _, err := l.Read(ctx, ""); !errors.Is(err, ErrInvalid) {
		t.Errorf("read of no volume: %v, want ErrInvalid", err)
	}
	gone := NewLedgerClient(socket + "x")
	if _, err := gone.Read(ctx, "v"); !errors.Is(err, ErrUnreachable) {
		t.Errorf("no agent: %v, want ErrUnreachable", err)
	}
	if _, err := gone.Swap(ctx, MembershipSwap{VolumeID: "v", Record: rec}); !errors.Is(err, ErrUnreachable) {
		t.Errorf("no agent: %v, want ErrUnreachable", err)
	}
	old := NewLedgerClient(serve(t, ledgerHandler(&memLedger{}, Window{8, 9})))
	if _, err := old.Read(ctx, "v"); !errors.Is(err, ErrVersion) {
		t.Errorf("an agent of another age: %v, want ErrVersion", err)
	}
}

func FuzzHandler(f *testing.F) {
	f.Add("open-volume", "1-1", `{"volumeID":"v"}`)
	f.Add("operate", "1-2", `{"labels":{"a":"b"},"sizeBytes":-1}`)
	f.Add("", "", "")
	f.Add("wait-state", "1-1", `{"afterRev":18446744073709551615}`)
	f.Fuzz(func(t *testing.T, verb, window, body string) {
		h := Handler(&echo{state: State{Rev: 1}, fail: nil, changed: closed()})
		req, err := http.NewRequest(http.MethodPost, "http://x/", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.URL.Path = "/" + verb
		req.Header = http.Header{windowHeader: {window}}
		h.ServeHTTP(&sink{header: http.Header{}}, req)
	})
}

func closed() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

// sink takes an answer and drops it.
type sink struct{ header http.Header }

func (s *sink) Header() http.Header         { return s.header }
func (s *sink) Write(p []byte) (int, error) { return len(p), nil }
func (s *sink) WriteHeader(int)             {}
