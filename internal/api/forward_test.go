package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"ashlar/internal/catalog"
)

// elsewhereError is what an Extra says of what another node has.
type elsewhereError struct{ node string }

func (e *elsewhereError) Error() string { return "it is on node " + e.node }

func nodeOf(err error) string {
	var e *elsewhereError
	if errors.As(err, &e) {
		return e.node
	}
	return ""
}

// pair is two nodes over one catalogue: requests go to n1, and n2 has everything.
type pair struct {
	*server
	other *bytesExtra
	inner *httptest.Server
	mu    sync.Mutex // guards seen
	seen  []*http.Request
	away  error // of Forward
}

func servePair(t *testing.T) *pair {
	t.Helper()
	return servePairWith(t, Config{})
}

// servePairWith is servePair with what is to be said to n1.
func servePairWith(t *testing.T, cfg Config) *pair {
	t.Helper()
	p := &pair{other: &bytesExtra{}}
	base := &url.URL{}
	transport := &http.Transport{ExpectContinueTimeout: 5 * time.Second}
	cfg.NodeOf, cfg.Forward = nodeOf, func(_ context.Context, node string) (http.Handler, error) {
		if p.away != nil {
			return nil, p.away
		}
		if node != "n2" {
			t.Errorf("passed on to %q", node)
		}
		return PassTo(base, transport), nil
	}
	p.server = serve(t, cfg, nil)
	// n2 would pass on too, if it were allowed to.
	h := New(Config{Catalog: p.mem, Node: "n2", Version: "v1", Extra: p.other, NodeOf: nodeOf, Forward: func(context.Context, string) (http.Handler, error) {
		t.Error("passed on twice")
		return nil, errors.New("twice")
	}})
	p.inner = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		p.seen = append(p.seen, r)
		p.mu.Unlock()
		h.ServeHTTP(w, FromNode(r))
	}))
	u, err := url.Parse(p.inner.URL)
	if err != nil {
		t.Fatal(err)
	}
	*base = *u
	t.Cleanup(func() {
		p.inner.Close()
		transport.CloseIdleConnections()
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, name := range []string{"n1", "n2"} {
		put(p.server, catalog.NodeKey(catalog.Wanted, name), catalog.NodeWanted{Name: name})
		put(p.server, catalog.NodeKey(catalog.Observed, name), catalog.NodeObserved{Name: name, Port: 9510, Ready: true, Disks: map[string]catalog.DiskObserved{"d": {DiskID: "d" + name[1:]}}})
		put(p.server, catalog.AliveKey(name), catalog.Alive{Node: name})
	}
	return p
}

// onOther puts an image on n2's disk.
func (p *pair) onOther(name, source, state string, virtual int64) {
	put(p.server, catalog.ImageKey(catalog.Wanted, name), catalog.ImageWanted{Name: name, ID: id(name), SourceType: source, MinCopies: 1, Disks: []string{"d2"}})
	put(p.server, catalog.ImageKey(catalog.Observed, name), catalog.ImageObserved{Name: name, ID: id(name), VirtualSizeBytes: virtual, Disks: map[string]catalog.ImageOnDisk{"d2": {State: state}}})
}

// attachedTo puts a volume that is open on a node.
func (p *pair) attachedTo(name, node string) {
	put(p.server, catalog.VolumeKey(catalog.Wanted, name), catalog.VolumeWanted{Name: name, ID: id(name), SizeBytes: MinSize, Copies: 1, Tickets: []catalog.Ticket{{Node: node, Kind: catalog.TicketAPI}}})
	put(p.server, catalog.VolumeKey(catalog.Observed, name), catalog.VolumeObserved{Name: name, ID: id(name), State: catalog.VolumeAttached, Node: node, SizeBytes: MinSize})
}

// TestForwardIsAllowedHere: what a request may do is decided by the node that is asked, before anything is passed on, because the other one lets a node do everything. Nobody gets there by saying
// that he is a node, either.
func TestForwardIsAllowedHere(t *testing.T) {
	p := servePairWith(t, Config{RequireToken: true})
	p.onOther("up", catalog.SourceUpload, catalog.ImagePending, 0)
	p.onOther("ready", catalog.SourceUpload, catalog.ImageReady, 1<<20)
	p.attachedTo("db1", "n2")
	p.other.content = randomBytes(3, 1<<20)
	all, reader, old := p.grant("all", false, time.Time{}), p.grant("reader", true, time.Time{}), p.grant("old", false, time.Unix(1, 0))
	for _, c := range []struct {
		method, path, body string
		reader             int // the status for who may read
	}{
		{"POST", "/v1/backingimages/up?action=upload", "bytes", 403},
		{"POST", "/v1/nodes/n2?action=shutdown", `{"force":true}`, 403},
		{"POST", "/v1/nodes/n2?action=shutdown&action=snapshotList", `{"force":true}`, 403},
		{"POST", "/v1/volumes/db1?action=exportFile", `{"path":"/x"}`, 403},
		{"GET", "/v1/backingimages/ready/download?format=raw", "", 200},
		{"GET", "/v1/volumes/db1/download?format=raw", "", 200},
	} {
		for token, status := range map[string]int{"": 401, old: 401, "made up": 401, reader: c.reader} {
			for _, claim := range []string{"", "n2"} {
				before := len(p.seen)
				r := p.request(c.method, c.path, strings.NewReader(c.body))
				if r.Header.Set("Authorization", "Bearer "+token); claim != "" {
					r.Header.Set(HeaderForwarded, claim)
				}
				if status == 200 && claim != "" {
					continue // it is answered here or not at all
				}
				p.ask(status, r)
				if passed := len(p.seen) > before; passed != (status == 200) {
					t.Errorf("%s %s with token %q: passed on: %v", c.method, c.path, token, passed)
				}
			}
		}
	}
	if p.other.uploads+p.other.shutdowns+p.extra.uploads+p.extra.shutdowns != 0 {
		t.Error("something was changed")
	}
	r := p.request("POST", "/v1/nodes/n2?action=shutdown", strings.NewReader(`{"force":true}`))
	r.Header.Set("Authorization", "Bearer "+all)
	if p.ask(200, r); p.other.shutdowns != 1 {
		t.Error("who may do everything is not passed on")
	}
}

// TestForwardUpload: a gibibyte and more would pass without being held; here it is a form, and plain bytes, and what is refused is refused before the bytes go.
func TestForwardUpload(t *testing.T) {
	p := servePair(t)
	p.onOther("plain", catalog.SourceUpload, catalog.ImagePending, 0)
	data := randomBytes(1, 3<<20)
	r := p.request("POST", "/v1/backingimages/plain?action=upload", bytes.NewReader(data))
	r.Header.Set("Authorization", "Basic Og==")
	_, answer := p.ask(200, r)
	if !bytes.Equal(p.other.taken, data) || p.other.announce != int64(len(data)) || p.extra.uploads != 0 {
		t.Errorf("%d bytes came, %d announced", len(p.other.taken), p.other.announce)
	}
	var img BackingImage
	if err := json.Unmarshal(answer, &img); err != nil || img.Links["self"] != p.base+"/v1/backingimages/plain" {
		t.Errorf("links are %v (%v), want those of the node that was asked", img.Links, err)
	}
	if got := p.seen[0].Header; got.Get("Authorization") != "" || got.Get(HeaderForwarded) != "n1" {
		t.Errorf("passed on with %v", got)
	}
	// The records do not say which disk is whose; the agent does.
	put(p.server, catalog.ImageKey(catalog.Wanted, "late"), catalog.ImageWanted{Name: "late", ID: id("late"), SourceType: catalog.SourceUpload, Disks: []string{"d9"}})
	put(p.server, catalog.ImageKey(catalog.Observed, "late"), catalog.ImageObserved{ID: id("late"), Disks: map[string]catalog.ImageOnDisk{"d9": {State: catalog.ImagePending}}})
	p.extra.refuse = &elsewhereError{"n2"}
	p.ask(200, p.request("POST", "/v1/backingimages/late?action=upload", bytes.NewReader(data)))
	if p.other.uploads != 2 {
		t.Errorf("%d uploads came", p.other.uploads)
	}
	p.onOther("form", catalog.SourceUpload, catalog.ImagePending, 0)
	text := "--b\r\nContent-Disposition: form-data; name=\"chunk\"; filename=\"x\"\r\n\r\n" + string(data[:1024]) + "\r\n--b--\r\n"
	r = p.request("POST", "/v1/backingimages/form?action=upload&size=1024", strings.NewReader(text))
	r.Header.Set("Content-Type", "multipart/form-data; boundary=b")
	p.ask(200, r)
	if !bytes.Equal(p.other.taken, data[:1024]) {
		t.Errorf("%d bytes of the form came", len(p.other.taken))
	}
	// Refused there: the client has sent nothing yet, because it waits to be told to.
	p.http.Transport.(*http.Transport).ExpectContinueTimeout = 10 * time.Second
	body := &watched{Reader: bytes.NewReader(data)}
	r = p.request("POST", "/v1/backingimages/form?action=upload&size=7", body)
	r.ContentLength = int64(len(data))
	r.Header.Set("Expect", "100-continue")
	p.ask(400, r)
	p.away = errors.New("no route")
	r = p.request("POST", "/v1/backingimages/form?action=upload", body)
	r.ContentLength = int64(len(data))
	r.Header.Set("Expect", "100-continue")
	_, answer = p.ask(503, r)
	if body.read() || !strings.Contains(string(answer), "node n2, which has it, cannot be asked: no route") {
		t.Errorf("bytes were sent: %v; %s", body.read(), answer)
	}
}

// watched tells whether it was read.
type watched struct {
	io.Reader
	mu  sync.Mutex // guards was
	was bool
}

func (w *watched) Read(p []byte) (int, error) {
	w.mu.Lock()
	w.was = true
	w.mu.Unlock()
	return w.Reader.Read(p)
}

func (w *watched) read() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.was
}

// TestForwardDownload: whole, with its checksum behind it; one that breaks off is broken off here too.
func TestForwardDownload(t *testing.T) {
	p := servePair(t)
	p.other.content = randomBytes(2, 2<<20)
	p.onOther("debian", catalog.SourceDownload, catalog.ImageReady, 2<<20)
	r := p.request("GET", "/v1/backingimages/debian/download?format=raw", nil)
	r.Header.Set("TE", "trailers")
	res, data := p.ask(200, r)
	if !bytes.Equal(data, p.other.content) || res.Trailer.Get(HeaderSHA512) == "" || res.Header.Get(HeaderSize) != fmt.Sprint(2<<20) {
		t.Errorf("%d bytes, %v, %v", len(data), res.Header, res.Trailer)
	}
	if res, _ := p.ask(200, p.request("HEAD", "/v1/backingimages/debian/download?format=raw", nil)); res.ContentLength != 2<<20 {
		t.Errorf("HEAD: %v", res.Header)
	}
	// The records say that it is here; the agent knows better.
	p.attachedTo("db1", "n1")
	p.extra.elsewhere = &elsewhereError{"n2"}
	if _, data := p.ask(200, p.request("GET", "/v1/volumes/db1/download", nil)); !bytes.Equal(data, p.other.content) {
		t.Errorf("%d bytes", len(data))
	}
	// n2 says that n1 has it after all: nobody passes it on again.
	p.other.elsewhere = &elsewhereError{"n1"}
	if _, data := p.ask(503, p.request("GET", "/v1/volumes/db1/download", nil)); !strings.Contains(string(data), "asked node n2, and only node n1 can answer") {
		t.Errorf("%s", data)
	}
	p.other.elsewhere, p.other.breaks = nil, 1<<20
	res = p.do(p.request("GET", "/v1/volumes/db1/download", nil))
	if n, err := io.Copy(io.Discard, res.Body); err == nil {
		t.Errorf("%d bytes came, and nothing said that it was not all", n)
	}
}

// TestForwardVerbs: differences, a node's counters, and its end.
func TestForwardVerbs(t *testing.T) {
	p := servePair(t)
	p.attachedTo("db2", "n2")
	_, data := p.ask(200, p.request("POST", "/v1/volumes/db2?action=snapshotDiff", strings.NewReader(`{"off":4096}`)))
	var d SnapshotDiff
	if err := json.Unmarshal(data, &d); err != nil || len(d.Ranges) != 2 || d.Ranges[0].Off != 4096 {
		t.Errorf("%s %v", data, err)
	}
	_, data = p.ask(200, p.request("GET", "/v1/nodes/n2/metrics", nil))
	if !strings.Contains(string(data), `ashlar_build_info{version="v1",node="n2"} 1`) {
		t.Errorf("%.300s", data)
	}
	if res, _ := p.ask(200, p.request("HEAD", "/v1/nodes/n2/metrics", nil)); res.Header.Get("Date") == "" {
		t.Error("no time")
	}
	if _, data = p.ask(200, p.request("GET", "/v1/nodes/n1/metrics", nil)); !strings.Contains(string(data), `node="n1"} 1`) {
		t.Errorf("%.300s", data)
	}
	p.ask(404, p.request("GET", "/v1/nodes/n9/metrics", nil))
	// The volume that is attached there is in the way; forced, it is not.
	p.ask(409, p.request("POST", "/v1/nodes/n2?action=shutdown", strings.NewReader(`{}`)))
	p.ask(200, p.request("POST", "/v1/nodes/n2?action=shutdown", strings.NewReader(`{"FORCE":true}`)))
	if p.other.shutdowns != 1 || p.extra.shutdowns != 0 {
		t.Errorf("n2 was stopped %d times, n1 %d", p.other.shutdowns, p.extra.shutdowns)
	}
	p.ask(404, p.request("POST", "/v1/nodes/n9?action=shutdown", nil))
	// It does not answer any more.
	p.inner.Close()
	_, data = p.ask(503, p.request("POST", "/v1/volumes/db2?action=snapshotDiff", nil))
	if !strings.Contains(string(data), "did not answer") || !strings.Contains(string(data), string(CodeUnreachable)) {
		t.Errorf("%s", data)
	}
	// A file would be written on the other machine.
	h := New(Config{Catalog: p.mem, Node: "n1"})
	w := httptest.NewRecorder()
	h.ServeHTTP(w, FromNode(httptest.NewRequest("POST", "/v1/volumes/db2?action=exportFile", strings.NewReader(`{"path":"/tmp/x.raw"}`))))
	if w.Code != 409 || !strings.Contains(w.Body.String(), "node n2 has it") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	// Without a cluster there is nobody to ask.
	w = httptest.NewRecorder()
	h.ServeHTTP(w, onLoopback(httptest.NewRequest("POST", "/v1/volumes/db2?action=snapshotDiff", nil)))
	if w.Code != 501 || !strings.Contains(w.Body.String(), "only node n2") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// TestFromNode: another node's request may do everything; a header that says so is nobody's.
func TestFromNode(t *testing.T) {
	mem := catalog.NewMem()
	defer mem.Close()
	h := New(Config{Catalog: mem, Node: "n1"})
	for _, c := range []struct {
		mark func(*http.Request) *http.Request
		want int
	}{
		{func(r *http.Request) *http.Request { return r }, http.StatusForbidden},
		{func(r *http.Request) *http.Request { r.Header.Set(HeaderForwarded, "n2"); return r }, http.StatusForbidden},
		{FromNode, http.StatusOK},
	} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, c.mark(httptest.NewRequest("GET", "/v1/volumes", nil)))
		if w.Code != c.want {
			t.Errorf("%d, want %d: %s", w.Code, c.want, w.Body)
		}
	}
}
