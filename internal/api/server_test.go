package api

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha512"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"mime/multipart"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/klauspost/compress/gzip"

	"ashlar/internal/catalog"
	"ashlar/internal/identity"
)

// server is a Handler behind a real listener, over an in-memory catalogue that the test itself writes.
type server struct {
	t     *testing.T
	mem   *catalog.Mem
	h     *Handler
	extra *bytesExtra
	base  string
	http  *http.Client
}

// serve starts one on loopback; with settings over TLS.
func serve(t *testing.T, cfg Config, settings *tls.Config) *server {
	t.Helper()
	s := &server{t: t, mem: catalog.NewMem(), extra: &bytesExtra{}}
	cfg.Catalog, cfg.Node, cfg.Version, cfg.Extra = s.mem, "n1", "v1", s.extra
	if cfg.Heartbeat == 0 {
		cfg.Heartbeat = time.Minute
	}
	s.h = New(cfg)
	l, err := Listen("127.0.0.1:0", settings)
	if err != nil {
		t.Fatal(err)
	}
	s.base = "http://" + l.Addr().String()
	transport := &http.Transport{}
	if settings != nil {
		s.base = "https://" + l.Addr().String()
		transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	}
	s.http = &http.Client{Transport: transport}
	srv := &http.Server{Handler: s.h}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(l) })
	t.Cleanup(func() {
		s.http.CloseIdleConnections()
		if err := errors.Join(s.h.Close(), srv.Close()); err != nil {
			t.Error(err)
		}
		wg.Wait()
		s.mem.Close()
	})
	return s
}

func (s *server) request(method, path string, body io.Reader) *http.Request {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	s.t.Cleanup(cancel)
	r, err := http.NewRequestWithContext(ctx, method, s.base+path, body)
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

func (s *server) do(r *http.Request) *http.Response {
	s.t.Helper()
	res, err := s.http.Do(r)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { res.Body.Close() })
	return res
}

// ask sends a request and wants an answer with a status; the error's text is returned with the body.
func (s *server) ask(status int, r *http.Request) (*http.Response, []byte) {
	s.t.Helper()
	res := s.do(r)
	data, err := io.ReadAll(res.Body)
	if err != nil {
		s.t.Fatalf("%s %s: %v", r.Method, r.URL.Path, err)
	}
	if res.StatusCode != status {
		s.t.Fatalf("%s %s: %d, want %d: %s", r.Method, r.URL, res.StatusCode, status, data)
	}
	return res, data
}

func put[T any](s *server, k catalog.Key, v T) {
	s.t.Helper()
	if _, _, err := catalog.Upsert(s.t.Context(), s.mem, k, func(was *T) error { *was = v; return nil }); err != nil {
		s.t.Fatal(err)
	}
}

func (s *server) note(name, reason string) {
	s.t.Helper()
	ev := catalog.EventRecord{Time: time.Unix(1700000000, 0), Type: catalog.Normal, Kind: catalog.KindVolume, Name: name, Reason: reason}
	if err := catalog.Note(s.t.Context(), s.mem, ev); err != nil {
		s.t.Fatal(err)
	}
}

func (s *server) volume(name string) {
	put(s, catalog.VolumeKey(catalog.Wanted, name), catalog.VolumeWanted{Name: name, ID: id(name), SizeBytes: MinSize, Copies: 1})
	put(s, catalog.VolumeKey(catalog.Observed, name), catalog.VolumeObserved{Name: name, ID: id(name), State: catalog.VolumeDetached, SizeBytes: MinSize})
}

func (s *server) image(name, source, state string, virtual int64) {
	put(s, catalog.ImageKey(catalog.Wanted, name), catalog.ImageWanted{Name: name, ID: id(name), SourceType: source, MinCopies: 1, Disks: []string{"d1"}})
	put(s, catalog.ImageKey(catalog.Observed, name), catalog.ImageObserved{Name: name, ID: id(name), VirtualSizeBytes: virtual,
		Disks: map[string]catalog.ImageOnDisk{"d1": {State: state}}})
}

func id(name string) string { return fmt.Sprintf("%032x", name) }

// bytesExtra takes uploads into memory and serves downloads from there.
type bytesExtra struct {
	Extra
	mu       sync.Mutex
	taken    []byte
	announce int64
	uploads  int
	refuse   error         // of Upload
	content  []byte        // of Download
	breaks   int           // after so many bytes a download breaks off; 0: never
	noSize   bool          // a download does not know its size
	stopped  chan struct{} // closed when a download's body is closed, if set

	elsewhere error // of Download
	shutdowns int
}

func (e *bytesExtra) VolumeCounters(context.Context, func(string, map[string]uint64)) error {
	return nil
}

func (e *bytesExtra) Upload(_ context.Context, _ string, size int64, r io.Reader) error {
	if e.refuse != nil {
		return e.refuse
	}
	data, err := io.ReadAll(r)
	if err != nil {
		return fmt.Errorf("taking the bytes: %w", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.taken, e.announce = data, size
	e.uploads++
	return nil
}

type body struct {
	io.Reader
	closed func()
}

func (b body) Close() error { b.closed(); return nil }

func (e *bytesExtra) Shutdown(context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.shutdowns++
	return nil
}

func (e *bytesExtra) Download(_ context.Context, _, _, _, _ string) (io.ReadCloser, int64, error) {
	if e.elsewhere != nil {
		return nil, 0, e.elsewhere
	}
	r, size := io.Reader(bytes.NewReader(e.content)), int64(len(e.content))
	if e.breaks > 0 {
		r = io.MultiReader(bytes.NewReader(e.content[:e.breaks]), iotest.ErrReader(errors.New("the source is gone")))
	}
	if e.noSize {
		size = -1
	}
	return body{r, func() {
		if e.stopped != nil {
			close(e.stopped)
		}
	}}, size, nil
}

func (e *bytesExtra) Diff(_ context.Context, r DiffRange, each func(off, n int64, zero bool)) (int64, int64, error) {
	each(r.Off, 4096, false)
	each(8192, 4096, true)
	return MinSize, MinSize, nil
}

// randomBytes are the same for a seed.
func randomBytes(seed uint64, n int) []byte {
	out := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed)}).Read(out)
	return out
}

// lines reads a stream line by line in the background, so that a test can wait for one.
func (s *server) lines(r io.Reader) func() string {
	ch := make(chan string, 100)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(ch)
		scan := bufio.NewScanner(r)
		scan.Buffer(nil, 1<<20)
		for scan.Scan() {
			ch <- scan.Text()
		}
	})
	s.t.Cleanup(wg.Wait)
	return func() string {
		select {
		case l, ok := <-ch:
			if !ok {
				return "(the stream ended)"
			}
			return l
		case <-time.After(time.Minute):
			s.t.Error("the stream said nothing for a minute")
			return ""
		}
	}
}

// TestEventsAsServerSent follows events as a browser's EventSource does, breaks off, and goes on where it was.
func TestEventsAsServerSent(t *testing.T) {
	s := serve(t, Config{}, nil)
	s.note("db1", "First")
	follow := func(last string) (next func() string, end func()) {
		r := s.request("GET", "/v1/events", nil)
		r.Header.Set("Accept", "text/event-stream")
		if last != "" {
			r.Header.Set("Last-Event-ID", last)
		}
		res := s.do(r)
		if res.StatusCode != 200 || res.Header.Get("Content-Type") != mediaSSE {
			t.Fatal(res.Status, res.Header)
		}
		return s.lines(res.Body), func() { res.Body.Close() }
	}
	read := func(next func() string) (id string, e Event) {
		t.Helper()
		data := ""
		for data == "" && !t.Failed() { // signs of life have an id and no data
			for line := next(); line != "" && !t.Failed(); line = next() {
				name, value, _ := strings.Cut(line, ": ")
				switch name {
				case "id":
					id = value
				case "data":
					data = value
				}
			}
		}
		if err := json.Unmarshal([]byte(data), &e); err != nil {
			t.Fatalf("%q: %v", data, err)
		}
		if e.Revision != id || e.Type != "event" {
			t.Errorf("id %s of %+v", id, e)
		}
		return id, e
	}
	next, end := follow("")
	if _, e := read(next); e.Reason != "First" || e.ObjectName != "db1" {
		t.Errorf("%+v", e)
	}
	s.note("db2", "Second")
	seen, e := read(next)
	if e.Reason != "Second" {
		t.Errorf("%+v", e)
	}
	end()
	s.note("db3", "Third")
	s.note("db1", "First") // again: the same event, counted
	next, end = follow(seen)
	defer end()
	if _, e := read(next); e.Reason != "Third" {
		t.Errorf("%+v", e)
	}
	if _, e := read(next); e.Reason != "First" || e.Count != 2 {
		t.Errorf("%+v", e)
	}
	// A revision of another catalogue, from before a restore, begins with everything.
	next, end = follow("999999")
	defer end()
	if _, e := read(next); e.Reason != "Second" {
		t.Errorf("%+v", e)
	}
}

// TestEventsAsLines follows events as newline-delimited JSON, with signs of life, from now on.
func TestEventsAsLines(t *testing.T) {
	s := serve(t, Config{Heartbeat: 20 * time.Millisecond}, nil)
	s.note("db1", "Old")
	res := s.do(s.request("GET", "/v1/events?follow=true&after=now", nil))
	if res.Header.Get("Content-Type") != mediaNDJSON {
		t.Fatal(res.Header)
	}
	next := s.lines(res.Body)
	type line struct{ Type, Reason, Revision string }
	var l line
	if err := json.Unmarshal([]byte(next()), &l); err != nil || l.Type != "heartbeat" || l.Revision == "" {
		t.Errorf("%+v %v", l, err)
	}
	s.note("db1", "New")
	for l.Type == "heartbeat" && !t.Failed() {
		if err := json.Unmarshal([]byte(next()), &l); err != nil {
			t.Fatal(err)
		}
	}
	if l.Reason != "New" {
		t.Errorf("%+v", l)
	}
	// Without asking for a stream it is the collection, and each of it is where it says.
	_, data := s.ask(200, s.request("GET", "/v1/events", nil))
	var all Collection[Event]
	if err := json.Unmarshal(data, &all); err != nil || len(all.Data) != 2 {
		t.Fatalf("%s: %v", data, err)
	}
	_, data = s.ask(200, s.request("GET", strings.TrimPrefix(all.Data[1].Links["self"], s.base), nil))
	var one Event
	if err := json.Unmarshal(data, &one); err != nil || one.Revision != all.Data[1].Revision || one.Reason != all.Data[1].Reason {
		t.Errorf("%s: %v", data, err)
	}
	s.ask(404, s.request("GET", "/v1/events/nothing", nil))
}

// dial opens a websocket.
func (s *server) dial(path string, header http.Header) (*websocket.Conn, *http.Response, error) {
	d := websocket.Dialer{HandshakeTimeout: 10 * time.Second, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	conn, res, err := d.DialContext(s.t.Context(), "ws"+strings.TrimPrefix(s.base, "http")+path, header)
	if err == nil {
		s.t.Cleanup(func() { conn.Close() })
		if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			s.t.Fatal(err)
		}
	}
	return conn, res, err
}

func names(t *testing.T, conn *websocket.Conn) string {
	t.Helper()
	var c Collection[Volume]
	if err := conn.ReadJSON(&c); err != nil {
		t.Fatal(err)
	}
	if c.Type != "collection" || c.ResourceType != "volume" {
		t.Errorf("%+v", c)
	}
	var out []string
	for _, v := range c.Data {
		out = append(out, v.Name+" "+v.State)
	}
	return strings.Join(out, ", ")
}

// TestSocket watches a collection: at once, after a change, not after one that it does not show, and no more often than the period.
func TestSocket(t *testing.T) {
	s := serve(t, Config{}, nil)
	s.volume("db1")
	conn, _, err := s.dial("/v1/ws/volumes", nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := names(t, conn); got != "db1 detached" {
		t.Errorf("at first: %s", got)
	}
	s.note("db1", "NothingToSee")
	put(s, catalog.SettingKey("x"), catalog.Setting{Name: "x"})
	s.volume("db2")
	for got := ""; got != "db1 detached, db2 detached"; {
		// The second of two records may come a moment after the first was shown.
		if got = names(t, conn); !strings.HasPrefix(got, "db1 detached, db2 ") {
			t.Fatalf("then: %s", got)
		}
	}
	slow, _, err := s.dial("/v1/ws/300ms/volumes", nil)
	if err != nil {
		t.Fatal(err)
	}
	names(t, slow)
	begin := time.Now()
	for i := range 20 {
		s.volume("v" + strconv.Itoa(i))
	}
	told := 0
	for got := ""; strings.Count(got, ",") != 21; told++ { // once, unless the machine was so slow that a period ended in between
		got = names(t, slow)
	}
	if took := time.Since(begin); took < 200*time.Millisecond || told > 2+int(took/(300*time.Millisecond)) {
		t.Errorf("%d times in %v", told, took)
	}
}

// TestSocketKeepsAlive has the server ping, and end a client that does not answer.
func TestSocketKeepsAlive(t *testing.T) {
	s := serve(t, Config{Heartbeat: 300 * time.Millisecond}, nil)
	if _, _, err := s.dial("/v1/ws/1s/images", nil); err == nil {
		t.Fatal("there is a collection images")
	}
	conn, _, err := s.dial("/v1/ws/1s/backingimages", nil)
	if err != nil {
		t.Fatal(err)
	}
	pings := 0
	conn.SetPingHandler(func(string) error { // and no pong
		pings++
		return nil
	})
	for err == nil {
		_, _, err = conn.ReadMessage()
	}
	if pings < 2 || pings > 10 {
		t.Errorf("%d pings, then %v", pings, err)
	}
	s.h.live.mu.Lock()
	defer s.h.live.mu.Unlock()
	if len(s.h.live.streams) > 1 {
		t.Errorf("%d streams are left", len(s.h.live.streams))
	}
}

// TestSocketRefusals wants an answer in JSON to what is no websocket or must not be one.
func TestSocketRefusals(t *testing.T) {
	s := serve(t, Config{}, nil)
	for _, c := range []struct {
		path   string
		header http.Header
		status int
		words  string
	}{
		{"/v1/ws/nothing", nil, 404, "volumes"},
		{"/v1/ws/soon/volumes", nil, 400, "soon"},
		{"/v1/ws/volumes", http.Header{"Origin": {"http://elsewhere.example"}}, 403, "another"},
		{"/v1/ws/volumes", http.Header{"Origin": {"null"}}, 403, "another"},
		{"/v1/ws/volumes?token=x", nil, 401, "token in the wrong place"},
	} {
		_, res, err := s.dial(c.path, c.header)
		if err == nil {
			t.Fatalf("%s %v: open", c.path, c.header)
		}
		data, _ := io.ReadAll(res.Body)
		var e ErrorBody
		if err := json.Unmarshal(data, &e); err != nil || res.StatusCode != c.status || !strings.Contains(e.Message, c.words) {
			t.Errorf("%s %v: %d %s", c.path, c.header, res.StatusCode, data)
		}
	}
	if conn, _, err := s.dial("/v1/ws/volumes", http.Header{"Origin": {s.base}}); err != nil {
		t.Errorf("from our own page: %v", err)
	} else {
		names(t, conn)
	}
}

// TestCloseEndsStreams closes a Handler that streams to clients of which one does not read: all end, soon, and later ones are refused.
func TestCloseEndsStreams(t *testing.T) {
	s := serve(t, Config{}, nil)
	for i := range 300 {
		s.volume("volume-with-a-long-name-" + strconv.Itoa(i))
	}
	conn, _, err := s.dial("/v1/ws/volumes", nil)
	if err != nil {
		t.Fatal(err)
	}
	names(t, conn)
	deaf, err := net.Dial("tcp", strings.TrimPrefix(s.base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	if err := deaf.(*net.TCPConn).SetReadBuffer(4096); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(deaf, "GET /v1/ws/volumes HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
	events := s.lines(s.do(s.request("GET", "/v1/events?follow=true", nil)).Body)
	s.note("x", "Begun")
	for l := events(); !strings.Contains(l, "Begun") && !t.Failed(); l = events() {
	}
	begin := time.Now()
	if err := s.h.Close(); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begin); d > 20*time.Second {
		t.Errorf("closing took %v", d)
	}
	_, _, err = conn.ReadMessage()
	if !websocket.IsCloseError(err, websocket.CloseGoingAway) {
		t.Errorf("the websocket ended with %v", err)
	}
	if l := events(); l != "(the stream ended)" {
		t.Errorf("the events went on: %s", l)
	}
	s.ask(503, s.request("GET", "/v1/events?follow=true", nil))
	s.ask(200, s.request("GET", "/v1/volumes", nil))
}

// TestStreamsAreBounded refuses one stream too many, and takes it when another has ended.
func TestStreamsAreBounded(t *testing.T) {
	s := serve(t, Config{}, nil)
	var joined []*stream
	for range maxStreams {
		x, err := s.h.live.join(nil)
		if err != nil {
			t.Fatal(err)
		}
		joined = append(joined, x)
	}
	s.ask(503, s.request("GET", "/v1/events?follow=true", nil))
	for _, x := range joined {
		s.h.live.leave(x)
	}
	if res := s.do(s.request("GET", "/v1/events?follow=true", nil)); res.StatusCode != 200 {
		t.Error(res.Status)
	}
}

// tlsServer serves over TLS with a certificate of an authority of its own.
func tlsServer(t *testing.T, cfg Config) *server {
	a, err := identity.OpenAuthority(filepath.Join(t.TempDir(), "identity"), nil)
	if err != nil {
		t.Fatal(err)
	}
	settings, err := a.ServerTLS([]string{"127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	return serve(t, cfg, settings)
}

// grant makes a token directly in the catalogue, as the node's own command would over the socket.
func (s *server) grant(name string, readOnly bool, expires time.Time) string {
	s.t.Helper()
	secret, sum, err := identity.NewToken(nil)
	if err != nil {
		s.t.Fatal(err)
	}
	put(s, tokenKey(name), catalog.Token{Name: name, SHA256: sum, ReadOnly: readOnly, Expires: expires})
	return secret
}

// TestTokens asks over TLS with every kind of credential.
func TestTokens(t *testing.T) {
	now := time.Now()
	s := tlsServer(t, Config{Now: func() time.Time { return now }})
	s.volume("db1")
	all, reader, old := s.grant("all", false, time.Time{}), s.grant("reader", true, now.Add(time.Hour)), s.grant("old", false, now)
	type credential struct{ header, value string }
	bearer := func(secret string) credential { return credential{"Authorization", "Bearer " + secret} }
	basic := func(user, secret string) credential {
		r, _ := http.NewRequest("GET", "/", nil)
		r.SetBasicAuth(user, secret)
		return credential{"Authorization", r.Header.Get("Authorization")}
	}
	for _, c := range []struct {
		what   string
		cred   credential
		method string
		path   string
		status int
		words  string
	}{
		{"none", credential{}, "GET", "/v1/volumes", 401, "a token is needed"},
		{"the dialect's empty one", credential{"Authorization", "Basic Og=="}, "GET", "/v1/volumes", 401, "a token is needed"},
		{"bearer", bearer(all), "GET", "/v1/volumes", 200, ""},
		{"scheme in capitals", credential{"Authorization", "BEARER " + all}, "GET", "/v1/volumes", 200, ""},
		{"basic", basic("anybody", all), "GET", "/v1/volumes", 200, ""},
		{"basic, as the user", basic(all, ""), "GET", "/v1/volumes", 401, ""},
		{"wrong", bearer(all[:len(all)-1] + "_"), "GET", "/v1/volumes", 401, "not known"},
		{"too long", bearer(all + "x"), "GET", "/v1/volumes", 401, "not known"},
		{"expired", bearer(old), "GET", "/v1/volumes", 401, "token old expired"},
		{"reader reads", bearer(reader), "GET", "/v1/volumes/db1", 200, ""},
		{"reader lists snapshots", bearer(reader), "POST", "/v1/volumes/db1?action=snapshotCRList", 200, ""},
		{"reader attaches", bearer(reader), "POST", "/v1/volumes/db1?action=attach", 403, "only reads"},
		{"reader creates", bearer(reader), "POST", "/v1/volumes", 403, "only reads"},
		{"reader deletes", bearer(reader), "DELETE", "/v1/volumes/db1", 403, "only reads"},
		{"reader changes", bearer(reader), "PUT", "/v1/settings/default-replica-count", 403, "only reads"},
		{"reader makes a token", bearer(reader), "POST", "/v1/tokens", 403, "only reads"},
		{"metrics, none", credential{}, "GET", "/metrics", 401, "a token is needed"},
		{"metrics", bearer(reader), "GET", "/metrics", 200, ""},
		{"health, none", credential{}, "GET", "/healthz", 200, ""},
		{"readiness, none", credential{}, "GET", "/readyz", 503, "node"},
		{"in the URL", bearer(all), "GET", "/v1/volumes?token=" + all, 401, "token in the wrong place"},
		{"in the URL under any name", bearer(all), "GET", "/v1/volumes?x=" + all, 401, "token in the wrong place"},
		{"in a cookie", credential{"Cookie", "session=" + all}, "GET", "/v1/volumes", 401, "token in the wrong place"},
		{"another cookie", credential{"Cookie", "token=abc"}, "GET", "/v1/volumes", 401, "a token is needed"},
		{"what is not there, none", credential{}, "GET", "/v2", 401, "a token is needed"},
	} {
		r := s.request(c.method, c.path, nil)
		if c.cred.header != "" {
			r.Header.Set(c.cred.header, c.cred.value)
		}
		res, data := s.ask(c.status, r)
		if !bytes.Contains(data, []byte(c.words)) || bytes.Contains(data, []byte(all)) {
			t.Errorf("%s: %s", c.what, data)
		}
		if challenges := res.Header.Values("WWW-Authenticate"); (len(challenges) == 2) != (c.status == 401) {
			t.Errorf("%s: WWW-Authenticate is %q", c.what, challenges)
		}
	}
	// One that is deleted stops working at once.
	r := s.request("DELETE", "/v1/tokens/all", nil)
	r.Header.Set("Authorization", "Bearer "+all)
	s.ask(200, r)
	s.ask(401, r.Clone(t.Context()))
}

// TestTokenLife makes a token through the API: the secret is shown once and kept nowhere.
func TestTokenLife(t *testing.T) {
	s := serve(t, Config{}, nil)
	end := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	res, data := s.ask(200, s.request("POST", "/v1/tokens", strings.NewReader(`{"name":"ci","readOnly":true,"expires":"`+end.Format(time.RFC3339)+`"}`)))
	var made Token
	if err := json.Unmarshal(data, &made); err != nil || !identity.LooksLikeToken(made.Token) || !made.ReadOnly || made.Expires != stamp(end) {
		t.Fatalf("%s %v", data, err)
	}
	if res.Header.Get("Cache-Control") != "no-store" {
		t.Error("the secret may be kept by a cache")
	}
	for _, path := range []string{"/v1/tokens", "/v1/tokens/ci"} {
		if _, data := s.ask(200, s.request("GET", path, nil)); bytes.Contains(data, []byte(made.Token)) || bytes.Contains(data, []byte(identity.TokenSum(made.Token))) {
			t.Errorf("%s shows the secret: %s", path, data)
		}
	}
	entries, _, err := s.mem.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if bytes.Contains(e.Value, []byte(made.Token)) {
			t.Errorf("the secret is kept in %s", e.Key)
		}
	}
	s.ask(409, s.request("POST", "/v1/tokens", strings.NewReader(`{"name":"ci"}`)))
	s.ask(200, s.request("DELETE", "/v1/tokens/ci", nil))
	s.ask(404, s.request("DELETE", "/v1/tokens/ci", nil))
}

// TestLoopback asks for no token on plain loopback, unless it is told to; a browser must come by a name that cannot be rebound.
func TestLoopback(t *testing.T) {
	s := serve(t, Config{}, nil)
	r := s.request("GET", "/v1/volumes", nil)
	r.Header.Set("Authorization", "Basic Og==")
	s.ask(200, r)
	r = s.request("GET", "/v1/volumes", nil)
	r.Header.Set("Authorization", "Bearer nonsense")
	s.ask(200, r)
	r = s.request("GET", "/v1/volumes", nil)
	r.Host = "rebound.example"
	s.ask(200, r) // no browser
	r.Header.Set("Sec-Fetch-Site", "same-origin")
	if _, data := s.ask(403, r); !bytes.Contains(data, []byte("rebound.example")) {
		t.Errorf("%s", data)
	}
	r.Host = "localhost:9500"
	s.ask(200, r)
	strict := serve(t, Config{RequireToken: true}, nil)
	strict.ask(401, strict.request("GET", "/v1/volumes", nil))
	r = strict.request("GET", "/v1/volumes", nil)
	r.Header.Set("Authorization", "Bearer "+strict.grant("t", true, time.Time{}))
	strict.ask(200, r)
}

// TestStreamEndsWithItsToken opens streams over TLS with a token that only reads, and deletes the token.
func TestStreamEndsWithItsToken(t *testing.T) {
	s := tlsServer(t, Config{Heartbeat: 500 * time.Millisecond}) // who does not answer for three of them is taken for gone, on a slow machine too
	secret := s.grant("reader", true, time.Time{})
	header := http.Header{"Authorization": {"Bearer " + secret}}
	if _, res, err := s.dial("/v1/ws/volumes", nil); err == nil || res.StatusCode != 401 {
		t.Fatal("a websocket without a token", err)
	}
	conn, _, err := s.dial("/v1/ws/volumes", header)
	if err != nil {
		t.Fatal(err)
	}
	names(t, conn)
	ended := make(chan error, 1)
	var reader sync.WaitGroup
	defer reader.Wait()
	defer conn.Close()
	reader.Go(func() { // all the while: a client that does not read is soon taken for deaf
		for {
			if _, _, err := conn.ReadMessage(); err != nil {
				ended <- err
				return
			}
		}
	})
	r := s.request("GET", "/v1/events?follow=true", nil)
	r.Header = header
	events := s.lines(s.do(r).Body)
	events() // a sign of life
	e, err := s.mem.Get(t.Context(), tokenKey("reader"))
	if err == nil {
		err = s.mem.Delete(t.Context(), e.Key, e.Rev)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !websocket.IsCloseError(err, websocket.ClosePolicyViolation) {
		t.Errorf("the websocket ended with %v", err)
	}
	for l := events(); l != "(the stream ended)"; l = events() {
		if t.Failed() {
			return
		}
	}
}

// form makes an upload of the dialect: parts in order, name and content.
func form(parts ...string) (io.Reader, string) {
	var b bytes.Buffer
	w := multipart.NewWriter(&b)
	for i := 0; i < len(parts); i += 2 {
		p, err := w.CreateFormFile(parts[i], "disk.img")
		if err != nil {
			panic(err)
		}
		_, _ = io.WriteString(p, parts[i+1])
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return &b, w.FormDataContentType()
}

// TestUpload sends images as the dialect does and as they are.
func TestUpload(t *testing.T) {
	s := serve(t, Config{}, nil)
	content := string(randomBytes(1, 3<<20))
	s.image("up", catalog.SourceUpload, catalog.ImagePending, 0)
	send := func(query, media string, body io.Reader) {
		t.Helper()
		r := s.request("POST", "/v1/backingimages/up?action=upload"+query, body)
		if media != "" {
			r.Header.Set("Content-Type", media)
		}
		_, data := s.ask(200, r)
		if string(s.extra.taken) != content || !bytes.Contains(data, []byte(`"backingImage"`)) {
			t.Errorf("%s %s: %d bytes came; %.200s", query, media, len(s.extra.taken), data)
		}
		s.extra.taken = nil
	}
	size := "&size=" + strconv.Itoa(len(content))
	b, media := form("ignored", "something", "chunk", content, "ignored", "else")
	send(size, media, b)
	if s.extra.announce != int64(len(content)) {
		t.Errorf("announced: %d", s.extra.announce)
	}
	send("", mediaBytes, strings.NewReader(content))
	send(size, "", strings.NewReader(content))
	send("", mediaBytes, struct{ io.Reader }{strings.NewReader(content)}) // chunked
	if s.extra.announce != -1 {
		t.Errorf("announced: %d", s.extra.announce)
	}
	content = content[:1000] // ours needs no multiple of 512
	send("", mediaBytes, strings.NewReader(content))
}

// TestBadUploads sends what must not become an image: each is refused with a sentence, and what was taken before never looks whole.
func TestBadUploads(t *testing.T) {
	s := serve(t, Config{}, nil)
	s.image("up", catalog.SourceUpload, catalog.ImagePending, 0)
	s.image("busy", catalog.SourceUpload, catalog.ImageInProgress, 0)
	s.image("done", catalog.SourceUpload, catalog.ImageReady, 512)
	s.image("failed", catalog.SourceUpload, catalog.ImageFailed, 0)
	s.image("web", catalog.SourceDownload, catalog.ImagePending, 0)
	put(s, catalog.ImageKey(catalog.Wanted, "new"), catalog.ImageWanted{Name: "new", ID: id("new"), SourceType: catalog.SourceUpload})
	k := strings.Repeat("k", 1024)
	for _, c := range []struct {
		what, image, query, media string
		parts                     []string // of a form
		body                      string   // else
		status                    int
		words                     string
	}{
		{"short", "up", "&size=1024", "", []string{"chunk", k[:512]}, "", 400, "ended after 512 of 1024 bytes"},
		{"long", "up", "&size=512", "", []string{"chunk", k}, "", 400, "more came than the 512 bytes"},
		{"no multiple of 512", "up", "&size=1000", "", []string{"chunk", k[:1000]}, "", 400, "the uploaded file size 1000 should be a multiple of 512 bytes"},
		{"wrong part", "up", "&size=1024", "", []string{"file", k}, "", 400, "doesn't contain form 'chunk'"},
		{"two parts", "up", "&size=1024", "", []string{"chunk", k, "chunk", k}, "", 400, "second part"},
		{"a long part before", "up", "&size=1024", "", []string{"x", strings.Repeat("x", 2<<20), "chunk", k}, "", 400, "over 1 MiB"},
		{"no size", "up", "", "", []string{"chunk", k}, "", 400, "size is missing"},
		{"size zero", "up", "&size=0", "", []string{"chunk", ""}, "", 400, `size "0"`},
		{"size negative", "up", "&size=-512", "", []string{"chunk", k}, "", 400, `size "-512"`},
		{"size too large", "up", "&size=99999999999999999999", "", []string{"chunk", k}, "", 400, "size"},
		{"size no number", "up", "&size=1Mi", "", []string{"chunk", k}, "", 400, `"1Mi"`},
		{"nothing", "up", "", mediaBytes, nil, "", 400, "0 bytes"},
		{"another length", "up", "&size=512", mediaBytes, nil, k, 400, "size says 512 bytes, Content-Length 1024"},
		{"JSON", "up", "", "application/json", nil, "{}", 400, "multipart/form-data"},
		{"a form without an end", "up", "&size=1024", "multipart/form-data; boundary=b", nil, "--b\r\nContent-Disposition: form-data; name=\"chunk\"\r\n\r\n" + k, 400, "broke off"},
		{"a form without a boundary", "up", "&size=1024", "multipart/form-data", nil, k, 400, "form cannot be read"},
		{"no form at all", "up", "&size=1024", "multipart/form-data; boundary=b", nil, k, 400, "form"},
		{"repeated, while it runs", "busy", "&size=1024", "", []string{"chunk", k}, "", 409, `upload server for backing image busy has not been initiated: the image is "in-progress"`},
		{"repeated, afterwards", "done", "&size=1024", "", []string{"chunk", k}, "", 409, `"ready"`},
		{"repeated, after a failure", "failed", "&size=1024", "", []string{"chunk", k}, "", 409, `"failed"`},
		{"too early", "new", "&size=1024", "", []string{"chunk", k}, "", 409, "not on any disk yet"},
		{"another source", "web", "&size=1024", "", []string{"chunk", k}, "", 409, "takes no upload"},
		{"no such image", "nothing", "&size=1024", "", []string{"chunk", k}, "", 404, "no such image"},
	} {
		body, media := io.Reader(strings.NewReader(c.body)), c.media
		if c.parts != nil {
			body, media = form(c.parts...)
		}
		r := s.request("POST", "/v1/backingimages/"+c.image+"?action=upload"+c.query, body)
		r.Header.Set("Content-Type", media)
		_, data := s.ask(c.status, r)
		if !bytes.Contains(data, []byte(strings.ReplaceAll(c.words, `"`, `\"`))) {
			t.Errorf("%s: %s", c.what, data)
		}
	}
	if s.extra.uploads != 0 {
		t.Errorf("%d of them were taken", s.extra.uploads)
	}
	// What the taker refuses comes back with its code.
	s.extra.refuse = Failure(CodeNoSpace, "the disk is full")
	s.ask(507, s.request("POST", "/v1/backingimages/up?action=upload&size=1024", strings.NewReader(k)))
}

// TestUploadBreaksOff has the client go away in the middle: the taker sees an error, not an end.
func TestUploadBreaksOff(t *testing.T) {
	s := serve(t, Config{}, nil)
	s.image("up", catalog.SourceUpload, catalog.ImagePending, 0)
	failed := make(chan error, 1)
	s.h.cfg.Extra = uploadFunc(func(r io.Reader) error {
		_, err := io.Copy(io.Discard, r)
		failed <- err
		return err
	})
	for _, header := range []string{"Content-Length: 1048576", "Transfer-Encoding: chunked"} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.base, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST /v1/backingimages/up?action=upload HTTP/1.1\r\nHost: h\r\n%s\r\n\r\n400\r\n%s", header, strings.Repeat("x", 1024))
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-failed:
			if CodeOf(err) != CodeInvalid {
				t.Errorf("%s: the taker saw %v", header, err)
			}
		case <-time.After(time.Minute):
			t.Fatalf("%s: the taker saw nothing", header)
		}
	}
}

type uploadFunc func(io.Reader) error

func (uploadFunc) VolumeCounters(context.Context, func(string, map[string]uint64)) error { return nil }
func (f uploadFunc) Upload(_ context.Context, _ string, _ int64, r io.Reader) error      { return f(r) }
func (uploadFunc) Download(context.Context, string, string, string, string) (io.ReadCloser, int64, error) {
	return nil, 0, nil
}
func (uploadFunc) Diff(context.Context, DiffRange, func(int64, int64, bool)) (int64, int64, error) {
	return 0, 0, nil
}
func (uploadFunc) Shutdown(context.Context) error { return nil }

// TestDownload fetches an image in every form, and checks bytes and headers.
func TestDownload(t *testing.T) {
	s := serve(t, Config{}, nil)
	s.extra.content = randomBytes(2, 3<<20)
	sum := sha512.Sum512(s.extra.content)
	want := hex.EncodeToString(sum[:])
	size := strconv.Itoa(len(s.extra.content))
	s.image("deb-12", catalog.SourceDownload, catalog.ImageReady, int64(len(s.extra.content)))
	s.volume("db1")
	// With trailers, as our own client asks.
	r := s.request("GET", "/v1/backingimages/deb-12/download?format=raw", nil)
	r.Header.Set("TE", "trailers")
	res, data := s.ask(200, r)
	if !bytes.Equal(data, s.extra.content) || res.Trailer.Get(HeaderSHA512) != want || res.Header.Get(HeaderSize) != size || res.ContentLength != -1 {
		t.Errorf("%d bytes, header %v, trailer %v", len(data), res.Header, res.Trailer)
	}
	if got := res.Header.Get("Content-Disposition"); got != "attachment; filename=deb-12.raw" {
		t.Error(got)
	}
	// As the dialect does: gzip, named up to the first "-". The checksum is known by now.
	res, data = s.ask(200, s.request("GET", "/v1/backingimages/deb-12/download", nil))
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	if inside, err := io.ReadAll(z); err != nil || !bytes.Equal(inside, s.extra.content) {
		t.Errorf("the gzip holds %d bytes, %v", len(inside), err)
	}
	if res.Header.Get("Content-Disposition") != "attachment; filename=deb.gz" || res.Header.Get("Content-Type") != mediaBytes || res.Header.Get(HeaderSHA512) != want {
		t.Errorf("%v", res.Header)
	}
	// Without trailers a length, of another format that was not fetched before.
	res, data = s.ask(200, s.request("GET", "/v1/backingimages/deb-12/download?format=qcow2", nil))
	if res.ContentLength != int64(len(data)) || !bytes.Equal(data, s.extra.content) || res.Header.Get(HeaderSHA512) != "" {
		t.Errorf("%d of %d bytes, %v", len(data), res.ContentLength, res.Header)
	}
	res, data = s.ask(200, s.request("HEAD", "/v1/backingimages/deb-12/download?forV2Creation=true", nil))
	if len(data) != 0 || res.ContentLength != int64(len(s.extra.content)) || res.Header.Get(HeaderSHA512) != want {
		t.Errorf("HEAD: %v", res.Header)
	}
	// A volume changes: nothing is remembered. Its size may not be known before.
	s.extra.noSize = true
	for range 2 {
		res, data = s.ask(200, s.request("GET", "/v1/volumes/db1/download?format=qcow2", nil))
		if !bytes.Equal(data, s.extra.content) || res.Trailer.Get(HeaderSHA512) != want || res.Header.Get(HeaderSHA512) != "" {
			t.Errorf("header %v, trailer %v", res.Header, res.Trailer)
		}
	}
}

// TestDownloadBreaksOff has the source fail in the middle: no client may take what came for the whole.
func TestDownloadBreaksOff(t *testing.T) {
	s := serve(t, Config{}, nil)
	s.extra.content = randomBytes(3, 3<<20)
	s.image("deb", catalog.SourceDownload, catalog.ImageReady, int64(len(s.extra.content)))
	for _, noSize := range []bool{false, true} {
		for _, query := range []string{"", "?format=raw", "?format=qcow2"} {
			s.extra.noSize, s.extra.breaks = noSize, 2<<20
			r := s.request("GET", "/v1/backingimages/deb/download"+query, nil)
			r.Header.Set("TE", "trailers")
			res, err := s.http.Do(r)
			if err != nil {
				continue // broken before the header was through
			}
			n, err := io.Copy(io.Discard, res.Body)
			res.Body.Close()
			if err == nil {
				t.Errorf("%q: %d bytes and no error; trailer %v", query, n, res.Trailer)
			}
		}
	}
	if len(s.h.sums.of) != 0 {
		t.Errorf("the checksum of a part is remembered: %v", s.h.sums.of)
	}
	// Before the first byte it is an answer like any other.
	s.h.cfg.Extra = failingDownload{}
	_, data := s.ask(507, s.request("GET", "/v1/backingimages/deb/download", nil))
	if !bytes.Contains(data, []byte("no-space")) {
		t.Errorf("%s", data)
	}
}

type failingDownload struct{ Extra }

func (failingDownload) Download(context.Context, string, string, string, string) (io.ReadCloser, int64, error) {
	return io.NopCloser(iotest.ErrReader(Failure(CodeNoSpace, "the disk is full"))), 5, nil
}

// TestDownloadClientGoes has the client go away: the body is closed, so that what it holds can be given up.
func TestDownloadClientGoes(t *testing.T) {
	s := serve(t, Config{}, nil)
	s.extra.content = make([]byte, 64<<20)
	s.extra.stopped = make(chan struct{})
	s.image("deb", catalog.SourceDownload, catalog.ImageReady, int64(len(s.extra.content)))
	res := s.do(s.request("GET", "/v1/backingimages/deb/download?format=raw", nil))
	if _, err := io.ReadFull(res.Body, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	select {
	case <-s.extra.stopped:
	case <-time.After(time.Minute):
		t.Error("the body is still open")
	}
}
