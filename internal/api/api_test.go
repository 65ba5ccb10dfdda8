package api

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/catalog/catalogtest"
)

// fixture is a Handler over an in-memory catalogue in which a stand-in does what control and the agent would. It lives in a synctest bubble: after settle
// everything has happened that was going to.
type fixture struct {
	t       *testing.T
	h       *Handler
	mem     *catalog.Mem
	standIn *catalogtest.StandIn
	schema  *document
}

// counter makes ids 1, 2, 3, so that recorded exchanges stay the same. It may be read concurrently.
type counter struct{ n atomic.Uint64 }

func (c *counter) Read(p []byte) (int, error) {
	clear(p)
	binary.BigEndian.PutUint64(p[:8], c.n.Add(1))
	return len(p), nil
}

// extra is an Extra that counts.
type extra struct {
	Extra     // what no test asks for yet
	shutdowns atomic.Int32
}

func (e *extra) VolumeCounters(_ context.Context, each func(string, map[string]uint64)) error {
	each("db1", map[string]uint64{"readOps": 3, "writeBytes": 4096, "clients": 1})
	return nil
}

func (e *extra) Diff(_ context.Context, r DiffRange, each func(off, n int64, zero bool)) (int64, int64, error) {
	for off := r.Off; off < 3<<20; off += 8192 {
		each(off, 4096, off%16384 == 0)
	}
	return 1 << 30, 1 << 30, nil
}

func (e *extra) Shutdown(context.Context) error {
	e.shutdowns.Add(1)
	return nil
}

// inBubble runs f with a fixture on one node, n1.
func inBubble(t *testing.T, f func(*fixture)) {
	synctest.Test(t, func(t *testing.T) {
		mem := catalog.NewMem()
		x := &fixture{t: t, mem: mem, standIn: &catalogtest.StandIn{Catalog: mem, Node: "n1", RunDir: "/run/ashlar", Delay: time.Millisecond, VirtualBytes: map[string]int64{"huge": 16 << 40}}}
		x.h = New(Config{Catalog: mem, Extra: &extra{}, Node: "n1", Version: "v0.1.0", Random: &counter{}})
		var err error
		if x.schema, err = theDocument(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := x.standIn.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		x.settle()
		f(x)
		cancel()
		wg.Wait()
		mem.Close()
	})
}

// settle lets a second pass, which in a bubble takes no time and is more than the stand-in needs.
func (x *fixture) settle() { <-time.After(time.Second) }

// answer is a decoded answer.
type answer struct {
	status int
	header http.Header
	raw    []byte
	obj    map[string]any // nil if the body was empty
}

func (a answer) str(key string) string { s, _ := a.obj[key].(string); return s }

// send sends one request as a client over loopback would, and checks that the answer can be read by clients of the dialect.
func (x *fixture) send(method, path, body string) answer {
	x.t.Helper()
	return x.sendFrom(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9500}, method, path, body)
}

// sendSocket sends one request as over the node's unix socket.
func (x *fixture) sendSocket(method, path, body string) answer {
	x.t.Helper()
	return x.sendFrom(&net.UnixAddr{Name: "/run/ashlar/api.sock", Net: "unix"}, method, path, body)
}

func (x *fixture) sendFrom(local net.Addr, method, path, body string) answer {
	x.t.Helper()
	r := httptest.NewRequest(method, "http://node1:9500"+path, strings.NewReader(body))
	r.Header.Set("Authorization", "Basic Og==")
	r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, local))
	w := httptest.NewRecorder()
	x.h.ServeHTTP(w, r)
	a := answer{status: w.Code, header: w.Header(), raw: w.Body.Bytes()}
	if problems := checkAnswer(w.Code, w.Header(), a.raw); len(problems) > 0 {
		x.t.Errorf("%s %s: clients cannot read the answer: %s\n%s", method, path, strings.Join(problems, "; "), a.raw)
	}
	for _, problem := range x.schema.check(method, path, w.Code, a.raw) {
		x.t.Errorf("%s %s: not as the OpenAPI document says: %s\n%s", method, path, problem, a.raw)
	}
	if len(a.raw) > 0 {
		// checkAnswer has said what is wrong if this fails.
		_ = json.Unmarshal(a.raw, &a.obj)
	}
	return a
}

// want sends a request, wants a status, and lets what it sets off happen.
func (x *fixture) want(status int, method, path, body string) answer {
	x.t.Helper()
	a := x.send(method, path, body)
	if a.status != status {
		x.t.Fatalf("%s %s %s: status %d, want %d: %s", method, path, body, a.status, status, a.raw)
	}
	x.settle()
	return a
}

// refused is want for an error with a code, whose message must contain some words.
func (x *fixture) refused(code Code, method, path, body string, words ...string) answer {
	x.t.Helper()
	a := x.send(method, path, body)
	if a.str("reason") != string(code) || a.status != code.status() {
		x.t.Errorf("%s %s %s: status %d, reason %q, want %q: %s", method, path, body, a.status, a.str("reason"), code, a.raw)
	}
	for _, w := range words {
		if !strings.Contains(a.str("message"), w) {
			x.t.Errorf("%s %s %s: message %q does not say %q", method, path, body, a.str("message"), w)
		}
	}
	x.settle()
	return a
}

// volume reads a volume.
func (x *fixture) volume(name string) Volume {
	x.t.Helper()
	a := x.want(http.StatusOK, "GET", "/v1/volumes/"+name, "")
	var v Volume
	if err := json.Unmarshal(a.raw, &v); err != nil {
		x.t.Fatal(err)
	}
	return v
}

// attached makes a volume and attaches it.
func (x *fixture) attached(name string) {
	x.t.Helper()
	x.want(200, "POST", "/v1/volumes", `{"name":"`+name+`","size":"1Gi","numberOfReplicas":1}`)
	x.want(200, "POST", "/v1/volumes/"+name+"?action=attach", `{"hostId":"n1"}`)
}

// everything is the whole catalogue, to tell whether anything changed.
func (x *fixture) everything() string {
	x.t.Helper()
	entries, _, err := x.mem.List(x.t.Context(), "")
	if err != nil {
		x.t.Fatal(err)
	}
	var all strings.Builder
	for _, e := range entries {
		all.WriteString(e.Key.String() + " " + string(e.Value) + "\n")
	}
	return all.String()
}

func TestMain(m *testing.M) { os.Exit(m.Run()) }
