package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/catalog/etcd"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/identity"
)

// fakeEtcd keeps members in memory.
type fakeEtcd struct {
	mu      sync.Mutex // guards the rest
	members []etcd.MemberInfo
	refuse  error // of AddLearner
	said    []string
}

func (f *fakeEtcd) AddLearner(_ context.Context, name, peerURL string) (etcd.MemberInfo, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.said = append(f.said, "learner "+name)
	if f.refuse != nil {
		return etcd.MemberInfo{}, f.refuse
	}
	m := etcd.MemberInfo{Name: name, PeerURL: peerURL, Learner: true}
	f.members = append(f.members, m)
	return m, nil
}

func (f *fakeEtcd) Promote(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.said = append(f.said, "promote "+name)
	for i := range f.members {
		if f.members[i].Name == name {
			f.members[i].Learner = false
		}
	}
	return nil
}

func (f *fakeEtcd) RemoveMember(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.said = append(f.said, "remove "+name)
	f.members = slices.DeleteFunc(f.members, func(m etcd.MemberInfo) bool { return m.Name == name })
	return nil
}

func (f *fakeEtcd) Members(context.Context) ([]etcd.MemberInfo, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.members), nil
}

func (f *fakeEtcd) heard() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.said, ", ")
}

// world is a cluster of one node that listens on loopback, with its records in memory.
type world struct {
	t     *testing.T
	cat   *catalog.Mem
	etcd  *fakeEtcd
	dir   Dir
	state State
	skew  time.Duration // of the node's clock
	at    string        // HOST:PORT
	asked []string      // paths that reached REST
	gate  *gate         // nil: none
}

// gate has a number of readers of one kind of records wait for each other, again and again: what they then write they decided from the same picture.
type gate struct {
	catalog.Catalog
	kind catalog.Kind
	n    int

	mu   sync.Mutex // guards the rest
	here int
	open chan struct{}
}

// List implements catalog.Catalog.
func (g *gate) List(ctx context.Context, kind catalog.Kind) ([]catalog.Entry, catalog.Rev, error) {
	entries, rev, err := g.Catalog.List(ctx, kind)
	g.mu.Lock()
	if kind != g.kind {
		g.mu.Unlock()
		return entries, rev, err
	}
	if g.here++; g.open == nil {
		g.open = make(chan struct{})
	}
	open := g.open
	if g.here == g.n {
		g.here, g.open = 0, nil
		close(open)
	}
	g.mu.Unlock()
	select {
	case <-open:
	case <-ctx.Done():
	}
	return entries, rev, err
}

// meet has n readers of a kind of records wait for each other from now on; the empty kind: nobody waits.
func (w *world) meet(kind catalog.Kind, n int) {
	w.gate.mu.Lock()
	defer w.gate.mu.Unlock()
	w.gate.kind, w.gate.n, w.gate.here, w.gate.open = kind, n, 0, nil
}

func (w *world) now() time.Time { return time.Now().Add(w.skew) }

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// row finds four ports in a row that nobody listens on now. They are below those that Linux gives to outgoing connections (32768 and up, ip(7)): one
// of those could be another test's connection by the time that it is listened on.
func row(t *testing.T) int {
	t.Helper()
	for range 200 {
		if port := 10_000 + rand.IntN(22_000); FreePorts(t.Context(), "127.0.0.1", port) == nil {
			return port
		}
	}
	t.Fatal("no four ports in a row are free")
	return 0
}

// found makes a cluster: what `cluster init` does, and a server on the node port.
func found(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, cat: catalog.NewMem(), etcd: &fakeEtcd{}, dir: Dir(filepath.Join(t.TempDir(), "cluster"))}
	w.gate = &gate{Catalog: w.cat, kind: "none"}
	t.Cleanup(func() { w.cat.Close() })
	put(w, catalog.ClusterKey(), catalog.Cluster{ID: strings.Repeat("c", 32), Format: 1})
	put(w, catalog.NodeKey(catalog.Wanted, "n1"), catalog.NodeWanted{Name: "n1", AllowScheduling: true})
	w.state = must[State](t)(Init(t.Context(), w.init(row(t))))
	w.etcd.members = []etcd.MemberInfo{{Name: "n1", PeerURL: w.state.Self().PeerURL, ClientURLs: []string{w.state.Self().ClientURL}, Leader: true}}
	w.observe(w.state)
	w.at = Address(w.state.Host, w.state.Port, 0)
	serve(t, w.server(w.dir, w.state), w.at)
	return w
}

func (w *world) init(port int) InitConfig {
	return InitConfig{Dir: w.dir, Authority: filepath.Join(filepath.Dir(string(w.dir)), "identity"), Catalog: w.cat, Name: "n1", Host: "127.0.0.1", Port: port}
}

// server is the node port of a node of the cluster.
func (w *world) server(d Dir, s State) *Server {
	return NewServer(ServerConfig{Dir: d, State: s, TLS: must[*identity.NodeTLS](w.t)(d.TLS(nil)), Catalog: w.gate, Embedded: true, Etcd: w.etcd, Ledger: noLedger{}, Now: w.now,
		REST: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			w.asked = append(w.asked, r.URL.Path)
			fmt.Fprint(rw, "{}")
		})})
}

func serve(t *testing.T, s *Server, at string) {
	t.Helper()
	l := must[net.Listener](t)(net.Listen("tcp", at))
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Serve(ctx, l); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
}

type noLedger struct{}

func (noLedger) Read(context.Context, string) (client.MembershipEntry, error) {
	return client.MembershipEntry{Rev: 7}, nil
}
func (noLedger) Swap(context.Context, client.MembershipSwap) (int64, error) {
	return 0, client.ErrConflict
}

func put[T any](w *world, k catalog.Key, v T) {
	w.t.Helper()
	if _, _, err := catalog.Upsert(w.t.Context(), w.cat, k, func(x *T) error { *x = v; return nil }); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) observe(s State) {
	put(w, catalog.NodeKey(catalog.Observed, s.Name), catalog.NodeObserved{Name: s.Name, Address: s.Host, Port: s.Port, Ready: true})
}

func (w *world) wanted(name string) catalog.NodeWanted {
	w.t.Helper()
	n, _, err := catalog.Read[catalog.NodeWanted](w.t.Context(), w.cat, catalog.NodeKey(catalog.Wanted, name))
	if err != nil {
		w.t.Fatal(err)
	}
	return n
}

func (w *world) rev(name string) catalog.Rev {
	w.t.Helper()
	_, rev, err := catalog.Read[catalog.NodeWanted](w.t.Context(), w.cat, catalog.NodeKey(catalog.Wanted, name))
	if err != nil {
		w.t.Fatal(err)
	}
	return rev
}

func (w *world) token() string {
	w.t.Helper()
	token, _, err := MakeToken(w.t.Context(), w.cat, w.dir, time.Hour, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return token
}

// joiner is a machine that wants to join.
func (w *world) joiner(name string) JoinConfig {
	return JoinConfig{Dir: Dir(filepath.Join(w.t.TempDir(), "cluster")), To: w.at, Token: w.token(), Name: name, Host: "127.0.0.1", Port: row(w.t),
		Disks: map[string]catalog.DiskWanted{"default": {Path: "/d", AllowScheduling: true}}, OwnID: strings.Repeat("0", 32)}
}

func (w *world) join(c JoinConfig) State {
	w.t.Helper()
	s, err := Join(w.t.Context(), c)
	if err != nil {
		w.t.Fatal(err)
	}
	w.observe(s)
	return s
}

// TestInit opens a cluster of one: its authority is the one that there was, its files are private, and it does so once.
func TestInit(t *testing.T) {
	w := found(t)
	for name, mode := range map[string]fs.FileMode{caFile: 0o644, caKeyFile: 0o600, pemFile: 0o600, stateFile: 0o600} {
		if st := must[os.FileInfo](t)(os.Stat(w.dir.Path(name))); st.Mode().Perm() != mode {
			t.Errorf("%s has mode %v, want %v", name, st.Mode().Perm(), mode)
		}
	}
	rest := must[[]byte](t)(os.ReadFile(filepath.Join(filepath.Dir(string(w.dir)), "identity", "ca.crt")))
	if ours := must[[]byte](t)(os.ReadFile(w.dir.Path(caFile))); !bytes.Equal(rest, ours) {
		t.Error("the cluster has another authority than REST's certificate")
	}
	if n := w.wanted("n1"); n.ID != w.state.NodeID || !n.Voter {
		t.Errorf("the node's record is %+v", n)
	}
	if _, err := Init(t.Context(), w.init(row(t))); !errors.Is(err, ErrIn) {
		t.Errorf("again: %v, want ErrIn", err)
	}
	if s := must[State](t)(w.dir.Load()); s.NodeID != w.state.NodeID || len(s.Members) != 1 {
		t.Errorf("node.json is %+v", s)
	}
}

// TestInitRestored opens a cluster on a catalogue whose records came from another cluster's backup: who voted there has no seat here, and only this node has one.
func TestInitRestored(t *testing.T) {
	cat := catalog.NewMem()
	defer cat.Close()
	w := &world{t: t, cat: cat, etcd: &fakeEtcd{}, dir: Dir(filepath.Join(t.TempDir(), "cluster"))}
	put(w, catalog.ClusterKey(), catalog.Cluster{ID: strings.Repeat("c", 32), Format: 1})
	id := strings.Repeat("4", 32)
	for _, n := range []catalog.NodeWanted{{Name: "n0", Voter: true}, {Name: "n1", ID: id, Zone: "z"}, {Name: "n2", Voter: true, Zone: "y"}, {Name: "n3", Voter: true}, {Name: "n5"}} {
		put(w, catalog.NodeKey(catalog.Wanted, n.Name), n)
	}
	idle := w.rev("n5")
	s, err := Init(t.Context(), w.init(row(t)))
	if err != nil {
		t.Fatal(err)
	}
	if n := w.wanted("n1"); s.NodeID != id || !s.Voter || !n.Voter || n.ID != id || n.Zone != "z" {
		t.Errorf("this node became %+v, its record %+v", s, n)
	}
	for _, name := range []string{"n0", "n2", "n3", "n5"} {
		if w.wanted(name).Voter {
			t.Errorf("%s has a seat in a catalogue that it has no member of", name)
		}
	}
	if w.wanted("n2").Zone != "y" {
		t.Error("more than the seat was taken from n2")
	}
	if now := w.rev("n5"); now != idle {
		t.Error("a record was written that said nothing wrong")
	}
}

// TestInitAfterCrash stops Init before each file that it writes; said again it ends as if nothing had been, with the same ids.
func TestInitAfterCrash(t *testing.T) {
	for _, last := range []string{stateFile, pemFile, caFile, caKeyFile} {
		w := found(t)
		id := w.state.NodeID
		for _, name := range []string{stateFile, pemFile, caFile, caKeyFile} {
			if err := os.Remove(w.dir.Path(name)); err != nil {
				t.Fatal(err)
			}
			if name == last {
				break
			}
		}
		if _, err := w.dir.Load(); !errors.Is(err, ErrNone) {
			t.Fatalf("without node.json: %v", err)
		}
		before := must[[]byte](t)(os.ReadFile(filepath.Join(filepath.Dir(string(w.dir)), "identity", "ca.crt")))
		s, err := Init(t.Context(), w.init(row(t)))
		if err != nil || s.NodeID != id {
			t.Errorf("after a crash before %s: %v, id %s, want %s", last, err, s.NodeID, id)
		}
		if after := must[[]byte](t)(os.ReadFile(w.dir.Path(caFile))); !bytes.Equal(before, after) {
			t.Errorf("after a crash before %s there is another authority", last)
		}
	}
}

// TestJoin brings machines in: the first three are voters and get the authority's key, the fourth is none.
func TestJoin(t *testing.T) {
	w := found(t)
	for i, name := range []string{"n2", "n3", "n4"} {
		c := w.joiner(name)
		s := w.join(c)
		voter := i < 2
		if s.Voter != voter || s.ClusterID != w.state.ClusterID || s.Discard == nil || s.Discard.Disks[0] != "/d" || len(s.Members) != min(i+2, 3) {
			t.Errorf("%s became %+v", name, s)
		}
		if _, err := os.Stat(c.Dir.Path(caKeyFile)); (err == nil) != voter {
			t.Errorf("%s: the authority's key: %v", name, err)
		}
		n := w.wanted(name)
		if n.ID != s.NodeID || n.Voter != voter || !n.AllowScheduling || n.Disks["default"].Path != "/d" {
			t.Errorf("%s has the record %+v", name, n)
		}
		if who := whoIs(t, c.Dir); who.NodeID != s.NodeID || who.Name != name {
			t.Errorf("%s has the certificate of %+v", name, who)
		}
	}
}

// whoIs reads a node's own certificate.
func whoIs(t *testing.T, d Dir) identity.Node {
	t.Helper()
	leaf, err := must[*identity.NodeTLS](t)(d.TLS(nil)).Leaf()
	if err != nil {
		t.Fatal(err)
	}
	return must[identity.Node](t)(identity.NodeOf(leaf))
}

// TestJoinRefused wants each reason to refuse a machine named, and nothing changed by it, here or there.
func TestJoinRefused(t *testing.T) {
	type spoil func(w *world, c *JoinConfig)
	for what, tc := range map[string]struct {
		spoil spoil
		want  error
		says  string
	}{
		"no token":          {func(_ *world, c *JoinConfig) { c.Token = "" }, identity.ErrJoinToken, "not a join token"},
		"a cut token":       {func(_ *world, c *JoinConfig) { c.Token = c.Token[:60] }, identity.ErrJoinToken, "was it cut"},
		"another secret":    {func(w *world, c *JoinConfig) { c.Token = c.Token[:len(c.Token)-43] + strings.Repeat("A", 43) }, client.ErrNotFound, "not known"},
		"another cluster's": {func(_ *world, c *JoinConfig) { c.Token = found(t).token() }, identity.ErrFingerprint, ""},
		"a deleted token":   {func(w *world, c *JoinConfig) { w.dropTokens() }, client.ErrNotFound, "deleted"},
		"an expired token": {func(w *world, _ *JoinConfig) {
			w.skew = 59*time.Minute + 59*time.Second + 900*time.Millisecond
			w.expire()
		}, client.ErrConflict, "expired at"},
		"a used token":       {func(w *world, c *JoinConfig) { d := w.joiner("n2"); d.Token = c.Token; w.join(d) }, client.ErrConflict, "used by node n2"},
		"a name that exists": {func(_ *world, c *JoinConfig) { c.Name = "n1" }, client.ErrExists, "n1 already"},
		"a name on its way out": {func(w *world, c *JoinConfig) {
			now := time.Now()
			put(w, catalog.NodeKey(catalog.Wanted, "nx"), catalog.NodeWanted{Name: "nx", ID: "1", Deleted: &now})
		}, client.ErrExists, "being removed"},
		"no name": {func(_ *world, c *JoinConfig) { c.Name = "-" }, nil, "not a node's name"},
		"another node's host": {func(w *world, _ *JoinConfig) {
			put(w, catalog.NodeKey(catalog.Wanted, "LOCALHOST"), catalog.NodeWanted{})
		}, client.ErrInvalid, "another node's name"},
		"a zone without end":     {func(_ *world, c *JoinConfig) { c.Zone = strings.Repeat("z", 101) }, client.ErrInvalid, "too long"},
		"every interface":        {func(_ *world, c *JoinConfig) { c.Host = "0.0.0.0" }, ErrAddress, "no address that another machine could use"},
		"not its address":        {func(_ *world, c *JoinConfig) { c.Host = "192.0.2.1" }, ErrAddress, "would listen on"},
		"no room for four ports": {func(_ *world, c *JoinConfig) { c.Port = 65533 }, ErrAddress, "four ports"},
		"nobody there":           {func(_ *world, c *JoinConfig) { c.To = "127.0.0.1:1" }, client.ErrUnreachable, "127.0.0.1:1"},
		"this clock is behind":   {func(_ *world, c *JoinConfig) { c.Now = clock(-72 * time.Minute) }, client.ErrConflict, "node nx's clock is 1h12m0s behind"},
		"this clock is ahead":    {func(_ *world, c *JoinConfig) { c.Now = clock(26 * time.Hour) }, client.ErrConflict, "node nx's clock is 26h0m0s ahead"},
		"a cluster of its own":   {func(w *world, c *JoinConfig) { c.Dir = found(t).dir }, ErrIn, "not of the cluster that the token is of"},
		"the catalogue is away":  {func(w *world, _ *JoinConfig) { w.cat.Away(true) }, client.ErrUnreachable, ""},
	} {
		t.Run(what, func(t *testing.T) {
			w := found(t)
			c := w.joiner("nx")
			if what == "another node's host" {
				c.Host = "localhost"
			}
			tc.spoil(w, &c)
			_, err := Join(t.Context(), c)
			if err == nil || tc.want != nil && !errors.Is(err, tc.want) || !strings.Contains(fmt.Sprint(err), tc.says) {
				t.Fatalf("%v, want %v saying %q", err, tc.want, tc.says)
			}
			w.cat.Away(false)
			if s, err := c.Dir.Load(); err == nil && s.Name == "nx" {
				t.Error("refused, and yet there is a node.json")
			}
			if _, err := w.cat.Get(t.Context(), catalog.NodeKey(catalog.Wanted, "nx")); err == nil && what != "a name on its way out" {
				t.Error("refused, and yet there is a record")
			}
			if strings.Contains(w.etcd.heard(), "nx") {
				t.Error("refused, and yet there is a place for its member")
			}
		})
	}
}

// clock is one that is wrong.
func clock(by time.Duration) func() time.Time { return func() time.Time { return time.Now().Add(by) } }

func (w *world) tokens() []catalog.Item[catalog.Join] {
	w.t.Helper()
	all, _, err := catalog.All[catalog.Join](w.t.Context(), w.cat, catalog.KindJoin, catalog.Wanted)
	if err != nil {
		w.t.Fatal(err)
	}
	return all
}

func (w *world) dropTokens() {
	for _, k := range w.tokens() {
		if err := w.cat.Delete(w.t.Context(), k.Key, k.Rev); err != nil {
			w.t.Fatal(err)
		}
	}
}

// expire ends every token's life now.
func (w *world) expire() {
	for _, k := range w.tokens() {
		k.Value.Expires = w.now()
		put(w, k.Key, k.Value)
	}
}

// TestJoinWithSkew lets a machine join whose clock is minutes off, either way.
func TestJoinWithSkew(t *testing.T) {
	w := found(t)
	for name, by := range map[string]time.Duration{"n2": -12 * time.Minute, "n3": 45 * time.Minute} {
		c := w.joiner(name)
		c.Now = clock(by)
		w.join(c)
	}
}

// TestJoinTwice uses a token once: the answer to who used it can be had again, nobody else gets one.
func TestJoinTwice(t *testing.T) {
	w := found(t)
	c := w.joiner("n2")
	c.Name = "n2"
	begun := must[joining](t)(c.Dir.begin("n2", identity.Fingerprint(must[*identity.NodeTLS](t)(w.dir.TLS(nil)).Authority())))
	first := w.join(c)
	if first.NodeID != begun.NodeID {
		t.Errorf("a join that was begun goes on as %s, not %s", first.NodeID, begun.NodeID)
	}
	// The answer was lost: nothing but what was begun is there.
	for _, name := range []string{stateFile, pemFile, caFile, caKeyFile} {
		if err := os.Remove(c.Dir.Path(name)); err != nil {
			t.Fatal(err)
		}
	}
	data := must[[]byte](t)(json.Marshal(begun))
	if err := c.Dir.put(joiningFile, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if again := w.join(c); again.NodeID != first.NodeID || !again.Voter {
		t.Errorf("%+v, then %+v", first, again)
	}
	// And once more by somebody who did not hear that it went well.
	if again := w.join(c); again.NodeID != first.NodeID {
		t.Errorf("%+v, then %+v", first, again)
	}
	if len(w.tokens()) != 1 || w.tokens()[0].Value.UsedNodeID != first.NodeID {
		t.Errorf("the token's record is %+v", w.tokens())
	}
	// The same id under another name, and another id under the same name, are others.
	for what, d := range map[string]JoinConfig{"another name": w.joiner("n3"), "another id": w.joiner("n2")} {
		d.Token = c.Token
		if what == "another name" {
			other := begun
			other.Name = "n3"
			if err := d.Dir.put(joiningFile, must[[]byte](t)(json.Marshal(other)), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Join(t.Context(), d); !errors.Is(err, client.ErrConflict) {
			t.Errorf("%s: %v, want ErrConflict", what, err)
		}
	}
	w.skew = 30 * time.Minute
	w.expire()
	os.Remove(c.Dir.Path(stateFile))
	if err := c.Dir.put(joiningFile, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Join(t.Context(), c); !errors.Is(err, client.ErrConflict) {
		t.Errorf("a repeat after the token's end: %v, want ErrConflict", err)
	}
}

// TestJoinAtOnce has many machines use one token, and many with tokens of their own come at once: one of the first kind gets in; of the others all do, and there are no more than three voters.
func TestJoinAtOnce(t *testing.T) {
	w := found(t)
	const n = 4
	run := func(same string) (in int) {
		errs := make([]error, n)
		var wg sync.WaitGroup
		for i := range n {
			c := w.joiner(fmt.Sprintf("m%s%d", same, i))
			if same != "" {
				c.Token = same
				c.Name = fmt.Sprintf("s%d", i)
			}
			wg.Go(func() { _, errs[i] = Join(context.Background(), c) })
		}
		wg.Wait()
		for _, err := range errs {
			if err == nil {
				in++
			} else if !errors.Is(err, client.ErrConflict) {
				t.Error(err)
			}
		}
		return in
	}
	token := w.token()
	w.meet(catalog.KindJoin, n)
	if in := run(token); in != 1 {
		t.Errorf("%d machines got in with one token", in)
	}
	w.forget("s") // whoever got in
	w.meet(catalog.KindNode, n)
	if in := run(""); in != n {
		t.Errorf("%d of %d machines got in", in, n)
	}
	voters := 0
	nodes, _, err := catalog.All[catalog.NodeWanted](t.Context(), w.cat, catalog.KindNode, catalog.Wanted)
	for _, x := range nodes {
		if x.Value.Voter {
			voters++
		}
	}
	if err != nil || len(nodes) != n+1 || voters != MaxVoters {
		t.Errorf("%d voters among %d nodes, %v", voters, len(nodes), err)
	}
}

// forget removes the records of nodes whose names begin so.
func (w *world) forget(prefix string) {
	w.t.Helper()
	entries, _, err := w.cat.List(w.t.Context(), catalog.KindNode)
	for _, e := range entries {
		if strings.HasPrefix(e.Key.Name, prefix) {
			err = errors.Join(err, w.cat.Delete(w.t.Context(), e.Key, e.Rev))
		}
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// TestJoinThroughAnybody asks a node that has no key: it asks one that has.
func TestJoinThroughAnybody(t *testing.T) {
	w := found(t)
	for _, name := range []string{"n2", "n3"} {
		w.join(w.joiner(name))
	}
	c := w.joiner("n4")
	s := w.join(c)
	serve(t, w.server(c.Dir, s), Address(s.Host, s.Port, 0))
	d := w.joiner("n5")
	d.To = Address(s.Host, s.Port, 0)
	w.join(d)
	// A refusal comes through as it is.
	e := w.joiner("n5")
	e.To = d.To
	if _, err := Join(t.Context(), e); !errors.Is(err, client.ErrExists) {
		t.Errorf("a name that exists, through another node: %v", err)
	}
}

// TestJoinExternal joins nodes whose catalogue was there before: the record that a node's serve made gets its id, nobody votes, nothing is given up.
func TestJoinExternal(t *testing.T) {
	w := found(t)
	put(w, catalog.NodeKey(catalog.Wanted, "n2"), catalog.NodeWanted{Name: "n2", Disks: map[string]catalog.DiskWanted{"d": {Path: "/x"}}})
	srv := w.server(w.dir, w.state)
	srv.cfg.Embedded = false
	at := Address("127.0.0.1", row(t), 0)
	serve(t, srv, at)
	c := w.joiner("n2")
	if _, err := Join(t.Context(), c); !errors.Is(err, client.ErrExists) {
		t.Errorf("with an etcd of its own: %v, want ErrExists", err)
	}
	c.To, c.OwnID, c.Disks = at, "", nil
	s := w.join(c)
	if n := w.wanted("n2"); n.ID != s.NodeID || n.Voter || n.Disks["d"].Path != "/x" || s.Voter || s.Discard != nil || len(s.Members) > 0 {
		t.Errorf("%+v with the record %+v", s, n)
	}
}

// TestNoPlaceYet lets a voter in for which there is no place among the members now: it becomes one later.
func TestNoPlaceYet(t *testing.T) {
	w := found(t)
	w.etcd.refuse = etcd.ErrQuorum
	c := w.joiner("n2")
	if s := w.join(c); s.Voter || !w.wanted("n2").Voter {
		t.Errorf("it became %+v with the record %+v", s, w.wanted("n2"))
	}
}

// TestVersions refuses a side of another age in both directions, and names both windows.
func TestVersions(t *testing.T) {
	for _, tc := range []struct {
		sent string
		ok   bool
	}{{"1-1", true}, {"1-9", true}, {"2-9", false}, {"", false}, {"x", false}, {"0-1", false}, {"3-2", false}, {"1", false}, {strings.Repeat("1", 30) + "-1", false}} {
		err := thisBuild().check(tc.sent)
		if (err == nil) != tc.ok || err != nil && (!errors.Is(err, client.ErrVersion) || !strings.Contains(err.Error(), "1-1")) {
			t.Errorf("%q: %v", tc.sent, err)
		}
	}
	w := found(t)
	token := must[identity.JoinToken](t)(identity.ParseJoinToken(w.token()))
	for _, path := range []string{"/node/v1/join", "/node/v1/renew", "/node/v1/authority", "/v1/volumes"} {
		r := must[*http.Request](t)(http.NewRequest(http.MethodPost, "https://"+w.at+path, strings.NewReader("{}")))
		r.Header.Set(HeaderWindow, "7-9")
		res := must[*http.Response](t)((&http.Transport{TLSClientConfig: token.TLS(), DisableKeepAlives: true}).RoundTrip(r))
		text, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if res.StatusCode != http.StatusUpgradeRequired || !strings.Contains(string(text), "7-9") || !strings.Contains(string(text), "1-1") || res.Header.Get(HeaderWindow) != "1-1" {
			t.Errorf("%s: %d %s", path, res.StatusCode, text)
		}
	}
	// A node of a later age answers us.
	later := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	srv := &http.Server{TLSConfig: must[*identity.NodeTLS](t)(w.dir.TLS(nil)).Server(nil), Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set(HeaderWindow, "4-6")
		fmt.Fprint(rw, "{}")
	})}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(tls.NewListener(later, srv.TLSConfig)) })
	t.Cleanup(func() { srv.Close(); wg.Wait() })
	c := w.joiner("n2")
	c.To = later.Addr().String()
	if _, err := Join(t.Context(), c); !errors.Is(err, client.ErrVersion) || !strings.Contains(err.Error(), "4-6") || !strings.Contains(err.Error(), "1-1") {
		t.Errorf("a later node: %v", err)
	}
}

// TestKnown lets nodes of the cluster in, and nobody else: not without a certificate, not removed ones, not those whose name another has now.
func TestKnown(t *testing.T) {
	w := found(t)
	c := w.joiner("n2")
	s := w.join(c)
	me := Peer{Name: "n1", NodeID: w.state.NodeID, Address: w.at}
	try := func(t2 *identity.NodeTLS) map[string]error {
		out := map[string]error{}
		for _, path := range []string{"/node/v1/self", "/node/v1/renew", "/node/v1/authority", "/v1/volumes", "/node/v1/ledger/read"} {
			in := any(renewRequest{Request: "x", Host: "127.0.0.1"})
			if path == "/node/v1/ledger/read" {
				continue // it speaks its own words: below
			}
			var answer any
			out[path] = ask(t.Context(), transport(t2, me), me.Address, question{path, in, &answer})
		}
		return out
	}
	mine := must[*identity.NodeTLS](t)(c.Dir.TLS(nil))
	got := try(mine)
	if got["/node/v1/self"] != nil || !errors.Is(got["/node/v1/renew"], client.ErrInvalid) || got["/node/v1/authority"] != nil || got["/v1/volumes"] != nil {
		t.Errorf("a node of the cluster: %v", got)
	}
	refused := func(what string, got map[string]error) {
		t.Helper()
		for path, err := range got {
			if !errors.Is(err, client.ErrFenced) {
				t.Errorf("%s, %s: %v, want ErrFenced", what, path, err)
			}
		}
	}
	// Another machine of the same name, with a good certificate of before.
	n := w.wanted("n2")
	n.ID = strings.Repeat("9", 32)
	put(w, catalog.NodeKey(catalog.Wanted, "n2"), n)
	refused("another id", try(mine))
	e := must[catalog.Entry](t)(w.cat.Get(t.Context(), catalog.NodeKey(catalog.Wanted, "n2")))
	if err := w.cat.Delete(t.Context(), e.Key, e.Rev); err != nil {
		t.Fatal(err)
	}
	refused("a removed node", try(mine))
	res := ledgerRead(t, &http.Transport{TLSClientConfig: mine.Client("n1", nil), DisableKeepAlives: true}, w.at)
	if res != http.StatusForbidden {
		t.Errorf("membership records for a removed node: %d", res)
	}
	put(w, e.Key, catalog.NodeWanted{Name: "n2", ID: s.NodeID})
	if res := ledgerRead(t, &http.Transport{TLSClientConfig: mine.Client("n1", nil), DisableKeepAlives: true}, w.at); res != http.StatusOK {
		t.Errorf("membership records for a node: %d", res)
	}
	if err := try(mine)["/node/v1/authority"]; !errors.Is(err, client.ErrFenced) {
		t.Errorf("the key for a node that is no voter: %v, want ErrFenced", err)
	}
	token := must[identity.JoinToken](t)(identity.ParseJoinToken(w.token()))
	var answer any
	if err := ask(t.Context(), &http.Transport{TLSClientConfig: token.TLS()}, w.at, question{"/v1/volumes", struct{}{}, &answer}); !errors.Is(err, client.ErrFenced) {
		t.Errorf("without a certificate: %v, want ErrFenced", err)
	}
	if err := ask(t.Context(), transport(must[*identity.NodeTLS](t)(found(t).dir.TLS(nil)), me), w.at, question{"/v1/volumes", struct{}{}, &answer}); !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("a foreign certificate: %v, want no connection", err)
	}
	if !slices.Equal(w.asked, []string{"/v1/volumes", "/v1/volumes"}) { // as a node, twice
		t.Errorf("REST was asked %v", w.asked)
	}
}

// ledgerRead asks for a membership record as a data process does, and returns the status.
func ledgerRead(t *testing.T, via *http.Transport, at string) int {
	t.Helper()
	r := must[*http.Request](t)(http.NewRequest(http.MethodPost, "https://"+at+"/node/v1/ledger/read", strings.NewReader(`{"volumeID":"v"}`)))
	r.Header.Set("Ashlar-Api-Window", client.ThisBuild().String())
	res := must[*http.Response](t)(via.RoundTrip(r))
	res.Body.Close()
	return res.StatusCode
}

// keeper is a node's Keeper.
func (w *world) keeper(d Dir, s State) *Keeper {
	return NewKeeper(KeeperConfig{Dir: d, State: s, TLS: must[*identity.NodeTLS](w.t)(d.TLS(nil)), Catalog: w.cat, Embedded: true, Etcd: w.etcd, Now: w.now,
		Rejoin: func(_ context.Context, s State) error {
			_, err := w.etcd.AddLearner(context.Background(), s.Name, s.Self().PeerURL)
			return err
		},
		Member: func() etcd.State { return etcd.StateVoter }})
}

// TestRenewal lets two months pass: voters sign for themselves, others have a voter sign; the certificate keeps its node.
func TestRenewal(t *testing.T) {
	w := found(t)
	for _, name := range []string{"n2", "n3"} {
		w.join(w.joiner(name))
	}
	c := w.joiner("n4")
	s := w.join(c)
	for _, tc := range []struct {
		who string
		d   Dir
		s   State
	}{{"a node without the key", c.Dir, s}, {"a voter", w.dir, w.state}} {
		before := must[[]byte](t)(os.ReadFile(tc.d.Path(pemFile)))
		k := w.keeper(tc.d, tc.s)
		w.skew = 50 * 24 * time.Hour
		if err := k.renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		if now := must[[]byte](t)(os.ReadFile(tc.d.Path(pemFile))); !bytes.Equal(now, before) {
			t.Errorf("%s renewed though more than a third was left", tc.who)
		}
		w.skew = 61 * 24 * time.Hour
		if err := k.renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		leaf, err := must[*identity.NodeTLS](t)(tc.d.TLS(nil)).Leaf()
		if err != nil || leaf.NotAfter.Before(w.now().Add(80*24*time.Hour)) || whoIs(t, tc.d).NodeID != tc.s.NodeID {
			t.Errorf("%s: good until %s, %v", tc.who, leaf.NotAfter, err)
		}
		w.skew = 0
	}
}

// TestClockSetBack renews a certificate that a voter signed for itself while its clock was far ahead, as soon as the clock is right again: nobody else takes it before its time.
func TestClockSetBack(t *testing.T) {
	w := found(t)
	for what, renew := range map[string]func() error{
		"while it runs":  func() error { return w.keeper(w.dir, w.state).renew(t.Context()) },
		"when it starts": func() error { return Refresh(w.dir, w.state, w.now) },
	} {
		w.skew = 200 * 24 * time.Hour
		if err := renew(); err != nil {
			t.Fatal(err)
		}
		w.skew = 0
		if err := renew(); err != nil {
			t.Fatal(err)
		}
		leaf, err := must[*identity.NodeTLS](t)(w.dir.TLS(nil)).Leaf()
		if err != nil || leaf.NotBefore.After(w.now()) || leaf.NotAfter.Before(w.now().Add(80*24*time.Hour)) {
			t.Errorf("%s: good from %s until %s, %v", what, leaf.NotBefore, leaf.NotAfter, err)
		}
	}
}

// TestRenewalByWrongClock has a voter whose clock is weeks or months off sign for a node: what would be good for nobody else is not taken in place of what is good still.
func TestRenewalByWrongClock(t *testing.T) {
	w := found(t)
	for _, name := range []string{"n2", "n3"} {
		w.join(w.joiner(name))
	}
	c := w.joiner("n4")
	s := w.join(c)
	before := must[[]byte](t)(os.ReadFile(c.Dir.Path(pemFile)))
	const age = 61 * 24 * time.Hour
	k := w.keeper(c.Dir, s)
	k.cfg.Now = func() time.Time { return time.Now().Add(age) }
	for _, off := range []time.Duration{15 * 24 * time.Hour, -100 * 24 * time.Hour} {
		w.skew = age + off
		if err := k.renew(t.Context()); !errors.Is(err, ErrClock) {
			t.Errorf("signed by a clock %s off: %v", off, err)
		}
		if now := must[[]byte](t)(os.ReadFile(c.Dir.Path(pemFile))); !bytes.Equal(now, before) {
			t.Errorf("a certificate of a clock %s off is taken", off)
		}
	}
	w.skew = age
	if err := k.renew(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestReaddress gives a node another host: node.json, its place among the members, its certificate.
func TestReaddress(t *testing.T) {
	w := found(t)
	if err := Readdress(w.dir, "localhost:19510"); err != nil {
		t.Fatal(err)
	}
	s := must[State](t)(w.dir.Load())
	if s.Host != "localhost" || s.Port != 19510 || !slices.Equal(s.Members, []Member{s.Self()}) || s.NodeID != w.state.NodeID {
		t.Errorf("node.json is %+v", s)
	}
	if err := Readdress(w.dir, "n1.example"); err != nil {
		t.Fatal(err)
	}
	leaf, err := must[*identity.NodeTLS](t)(w.dir.TLS(nil)).Leaf()
	if err != nil || leaf.VerifyHostname("n1.example") != nil {
		t.Errorf("the certificate has %v, %v", leaf.DNSNames, err)
	}
	for _, bad := range []string{"", "0.0.0.0", "a b", "1.2.3", "h:0", "h:65534", "h:x", "-h", "h..x", "[fe80::1%eth0]:1", "224.0.0.1"} {
		if err := Readdress(w.dir, bad); !errors.Is(err, ErrAddress) {
			t.Errorf("%q: %v, want ErrAddress", bad, err)
		}
	}
	if err := Readdress(Dir(t.TempDir()), "h"); !errors.Is(err, ErrNone) {
		t.Errorf("in no cluster: %v", err)
	}
	// A node without the key has a new certificate signed when it looks.
	for _, name := range []string{"n2", "n3"} {
		w.join(w.joiner(name))
	}
	c := w.joiner("n4")
	w.join(c)
	if err := Readdress(c.Dir, "n4.example:9510"); err != nil {
		t.Fatal(err)
	}
	if err := w.keeper(c.Dir, must[State](t)(c.Dir.Load())).renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if leaf, err = must[*identity.NodeTLS](t)(c.Dir.TLS(nil)).Leaf(); err != nil || leaf.VerifyHostname("n4.example") != nil {
		t.Errorf("the certificate has %v, %v", leaf.DNSNames, err)
	}
}

// TestKeeper walks a node through its record: promoted, resigned, a voter again, removed.
func TestKeeper(t *testing.T) {
	w := found(t)
	c := w.joiner("n2")
	s := w.join(c)
	k := w.keeper(c.Dir, s)
	step := func(what string, want error, heard string) State {
		t.Helper()
		w.etcd.said = nil
		if err := k.step(t.Context()); !errors.Is(err, want) || w.etcd.heard() != heard {
			t.Fatalf("%s: %v (want %v), etcd heard %q (want %q)", what, err, want, w.etcd.heard(), heard)
		}
		now := must[State](t)(c.Dir.Load())
		k = w.keeper(c.Dir, now)
		return now
	}
	set := func(change func(*catalog.NodeWanted)) {
		n := w.wanted("n2")
		change(&n)
		put(w, catalog.NodeKey(catalog.Wanted, "n2"), n)
	}
	step("a learner", nil, "promote n2")
	step("nothing to do", nil, "")
	set(func(n *catalog.NodeWanted) { n.Voter = false })
	if now := step("no voter any more", ErrRestart, "remove n2"); now.Voter || slices.ContainsFunc(now.Members, func(m Member) bool { return m.Name == "n2" }) {
		t.Errorf("node.json is %+v", now)
	}
	if _, err := os.Stat(c.Dir.Path(caKeyFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Error("it still has the authority's key")
	}
	step("nothing to do", nil, "")
	set(func(n *catalog.NodeWanted) { n.Voter = true })
	if now := step("a voter again", ErrRestart, "learner n2"); !now.Voter {
		t.Errorf("node.json is %+v", now)
	}
	if _, err := c.Dir.Authority(nil); err != nil {
		t.Error("it has no authority's key:", err)
	}
	set(func(n *catalog.NodeWanted) { n.ID = "" }) // made anew by `ashlar recover`
	step("a record without an id", nil, "")
	if n := w.wanted("n2"); n.ID != s.NodeID {
		t.Errorf("the record has id %q", n.ID)
	}
	set(func(n *catalog.NodeWanted) { n.ID = strings.Repeat("8", 32) })
	step("another has its name", ErrRemoved, "")
	e := must[catalog.Entry](t)(w.cat.Get(t.Context(), catalog.NodeKey(catalog.Wanted, "n2")))
	if err := w.cat.Delete(t.Context(), e.Key, e.Rev); err != nil {
		t.Fatal(err)
	}
	step("removed", ErrRemoved, "")
}

// TestJoinAgain: a node whose certificate ended while it was off gets another for a token, and is who it was; not for a bad or used token, not who was removed, not for another's certificate,
// and a join with a node's name and id is none that its certificate is given for.
func TestJoinAgain(t *testing.T) {
	w := found(t)
	c := w.joiner("n2")
	s := w.join(c)
	before := must[[]byte](t)(os.ReadFile(c.Dir.Path(pemFile)))
	c.Token = w.token()
	unused := func(k catalog.Item[catalog.Join]) bool { return k.Value.Used.IsZero() } // tokens come by their random names
	if again := w.join(c); again.NodeID != s.NodeID || !bytes.Equal(before, must[[]byte](t)(os.ReadFile(c.Dir.Path(pemFile)))) || !slices.ContainsFunc(w.tokens(), unused) {
		t.Error("a node whose certificate is good is given another")
	}
	w.skew = 100 * day
	c.Now = clock(w.skew)
	late := func(what string, c JoinConfig, want error) {
		t.Helper()
		if _, err := Join(t.Context(), c); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
		if !bytes.Equal(before, must[[]byte](t)(os.ReadFile(c.Dir.Path(pemFile)))) {
			t.Errorf("%s: there is another certificate", what)
		}
	}
	late("an expired token", c, client.ErrConflict)
	w.dropTokens()
	late("a token that is not known", c, client.ErrNotFound)
	fresh := func() string {
		token, _, err := MakeToken(t.Context(), w.cat, w.dir, time.Hour, w.now)
		return must[string](t)(token, err)
	}
	other := c
	other.Token = found(t).token()
	late("another cluster's token", other, ErrIn)
	c.Token = fresh()
	fast := c
	fast.Now = clock(w.skew + 3*time.Hour)
	late("a clock hours ahead", fast, client.ErrConflict)

	// A token and a name and id that are known to all are not enough.
	me := Peer{Name: "n1", NodeID: w.state.NodeID, Address: w.at}
	token := must[identity.JoinToken](t)(identity.ParseJoinToken(c.Token))
	_, request, err := identity.NewNodeRequest()
	if err != nil {
		t.Fatal(err)
	}
	say := func(path string, in any) error {
		var answer any
		return ask(t.Context(), &http.Transport{TLSClientConfig: token.TLS(), DisableKeepAlives: true}, me.Address, question{path, in, &answer})
	}
	if err := say("/node/v1/join", joinRequest{Secret: token.Secret, Name: "n2", NodeID: s.NodeID, Request: string(request), Host: s.Host, Port: s.Port, Time: w.now()}); !errors.Is(err, client.ErrExists) {
		t.Errorf("a join with a node's name and id: %v, want ErrExists", err)
	}
	cert, signature, err := must[*identity.NodeTLS](t)(c.Dir.TLS(nil)).Vouch(request)
	if err != nil {
		t.Fatal(err)
	}
	good := rejoinRequest{Secret: token.Secret, Name: "n2", NodeID: s.NodeID, Host: s.Host, Request: string(request), Certificate: string(cert), Signature: signature, Time: w.now()}
	for what, change := range map[string]func(*rejoinRequest){
		"without a signature":        func(r *rejoinRequest) { r.Signature = nil },
		"another request's":          func(r *rejoinRequest) { r.Request += "\n" },
		"another node's name and id": func(r *rejoinRequest) { r.Name, r.NodeID = "n1", w.state.NodeID },
		"no certificate":             func(r *rejoinRequest) { r.Certificate = "" },
	} {
		r := good
		change(&r)
		if err := say("/node/v1/rejoin", r); !errors.Is(err, client.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", what, err)
		}
	}

	if _, err := Join(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	leaf, err := must[*identity.NodeTLS](t)(c.Dir.TLS(nil)).Leaf()
	if who := whoIs(t, c.Dir); err != nil || leaf.NotAfter.Before(w.now().Add(80*day)) || who.NodeID != s.NodeID || who.Name != "n2" || w.wanted("n2").ID != s.NodeID {
		t.Errorf("the new certificate is good until %s, of %+v (%v)", leaf.NotAfter, who, err)
	}
	before = must[[]byte](t)(os.ReadFile(c.Dir.Path(pemFile)))
	w.skew = 200 * day
	c.Now = clock(w.skew)
	late("the token of before", c, client.ErrConflict)
	c.Token = fresh()
	n := w.wanted("n2")
	n.ID = strings.Repeat("9", 32)
	put(w, catalog.NodeKey(catalog.Wanted, "n2"), n)
	late("a removed node, whose name another has", c, ErrRemoved)
}

const day = 24 * time.Hour

// TestStillThere: a node that was removed, and that the catalogue therefore refuses, hears it from another node; one that nobody speaks to goes on asking.
func TestStillThere(t *testing.T) {
	w := found(t)
	c := w.joiner("n2")
	s := w.join(c)
	away := catalog.NewMem() // what n2 has of the catalogue
	defer away.Close()
	k := w.keeper(c.Dir, s)
	k.cfg.Catalog = away
	away.Away(true)
	if err := k.step(t.Context()); !errors.Is(err, catalog.ErrUnreachable) || errors.Is(err, ErrRemoved) {
		t.Errorf("a node without a catalogue: %v", err)
	}
	n := w.wanted("n2")
	n.ID = "" // as `ashlar recover` makes it
	put(w, catalog.NodeKey(catalog.Wanted, "n2"), n)
	if err := StillThere(t.Context(), k.cfg.TLS, s); err != nil {
		t.Errorf("a node whose record has no id: %v", err)
	}
	e := must[catalog.Entry](t)(w.cat.Get(t.Context(), catalog.NodeKey(catalog.Wanted, "n2")))
	if err := w.cat.Delete(t.Context(), e.Key, e.Rev); err != nil {
		t.Fatal(err)
	}
	if err := k.step(t.Context()); !errors.Is(err, ErrRemoved) {
		t.Errorf("a removed node: %v, want ErrRemoved", err)
	}
	w.cat.Away(true)
	if err := StillThere(t.Context(), k.cfg.TLS, s); err != nil {
		t.Errorf("where nobody can say: %v", err)
	}
}

// TestTidy has the node whose member leads remove the members of nodes that are gone, and only it.
func TestTidy(t *testing.T) {
	w := found(t)
	gone := func() {
		w.etcd.members = append(w.etcd.members, etcd.MemberInfo{Name: "dead", PeerURL: "https://192.0.2.1:9511"}, etcd.MemberInfo{PeerURL: "https://192.0.2.2:9511", Learner: true})
	}
	gone()
	if err := w.keeper(w.dir, w.state).step(t.Context()); err != nil || w.etcd.heard() != "remove dead" {
		t.Errorf("%v, etcd heard %q", err, w.etcd.heard())
	}
	w.etcd.members[0].Leader, w.etcd.said = false, nil
	gone()
	if err := w.keeper(w.dir, w.state).step(t.Context()); err != nil || w.etcd.heard() != "" {
		t.Errorf("who does not lead: %v, etcd heard %q", err, w.etcd.heard())
	}
}

// TestKeeperRuns follows the records: what changes is done without anybody looking.
func TestKeeperRuns(t *testing.T) {
	w := found(t)
	c := w.joiner("n2")
	k := w.keeper(c.Dir, w.join(c))
	k.cfg.Look = time.Hour
	done := make(chan error, 1)
	var wg sync.WaitGroup
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	wg.Go(func() { done <- k.Run(ctx) })
	defer wg.Wait()
	e := must[catalog.Entry](t)(w.cat.Get(t.Context(), catalog.NodeKey(catalog.Wanted, "n2")))
	if err := w.cat.Delete(t.Context(), e.Key, e.Rev); err != nil && !errors.Is(err, catalog.ErrConflict) {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, ErrRemoved) {
		t.Errorf("%v, want ErrRemoved", err)
	}
}

// TestKeeperTellsOfVote: a member that starts is promoted as soon as it is there, and that it votes is told when it knows so itself: its node's agent, which looks then, records it.
func TestKeeperTellsOfVote(t *testing.T) {
	w := found(t)
	c := w.joiner("n2")
	s := w.join(c)
	synctest.Test(t, func(t *testing.T) {
		cat := catalog.NewMem() // the world's is not of the bubble
		defer cat.Close()
		if _, err := catalog.Write(t.Context(), cat, catalog.NodeKey(catalog.Wanted, "n2"), w.wanted("n2"), 0); err != nil {
			t.Fatal(err)
		}
		began := time.Now() // the bubble's
		there, knows := began.Add(3*time.Second), began.Add(3500*time.Millisecond)
		k := w.keeper(c.Dir, s)
		k.cfg.Catalog, k.cfg.Etcd = cat, &fakeEtcd{members: []etcd.MemberInfo{{Name: "n2", Learner: true}}}
		k.cfg.Member = func() etcd.State {
			switch now := time.Now(); {
			case now.Before(there):
				return etcd.StateStarting
			case now.Before(knows):
				return etcd.StateLearner
			}
			return etcd.StateVoter
		}
		told := make(chan time.Time, 1)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			_ = cat.Watch(ctx, 0, func(e catalog.Event) error {
				if e.Key.Kind == catalog.KindEvent {
					told <- time.Now()
				}
				return nil
			})
		})
		wg.Go(func() { _ = k.Run(ctx) })
		if at := <-told; at.Before(knows) || at.After(knows.Add(votesTick)) {
			t.Errorf("told %s after its member knew", at.Sub(knows))
		}
		cancel()
		wg.Wait()
	})
}

// TestState refuses a node.json that is none.
func TestState(t *testing.T) {
	d := Dir(filepath.Join(t.TempDir(), "cluster"))
	good := State{ClusterID: strings.Repeat("c", 32), NodeID: strings.Repeat("1", 32), Name: "n", Host: "h", Port: 9510}
	if _, err := d.Load(); !errors.Is(err, ErrNone) {
		t.Errorf("without one: %v", err)
	}
	if err := d.Save(good); err != nil {
		t.Fatal(err)
	}
	text := string(must[[]byte](t)(os.ReadFile(d.Path(stateFile))))
	for what, bad := range map[string]string{
		"empty": "", "half": text[:len(text)/2], "a later format": strings.Replace(text, `"format": 1`, `"format": 2`, 1), "no format": strings.Replace(text, `"format": 1`, `"format": 0`, 1),
		"no cluster": strings.Replace(text, good.ClusterID, "", 1), "an upper-case id": strings.Replace(text, good.NodeID, strings.Repeat("A", 32), 1),
		"no name": strings.Replace(text, `"n"`, `""`, 1), "no host": strings.Replace(text, `"h"`, `""`, 1), "a port too high": strings.Replace(text, "9510", "65533", 1),
		"too long": text + strings.Repeat(" ", maxState),
	} {
		if err := d.put(stateFile, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Load(); !errors.Is(err, ErrState) {
			t.Errorf("%s: %v, want ErrState", what, err)
		}
	}
	if err := d.Save(State{}); !errors.Is(err, ErrState) {
		t.Errorf("an empty one was written: %v", err)
	}
}

func TestParseAddress(t *testing.T) {
	for in, want := range map[string]string{"h": "h:9510", "h:1": "h:1", "192.0.2.1": "192.0.2.1:9510", "::1": "[::1]:9510", "[::1]:7": "[::1]:7", "[::1]": "[::1]:9510", "kvm-1.example": "kvm-1.example:9510"} {
		host, port, err := ParseAddress(in)
		if err != nil || Address(host, port, 0) != want {
			t.Errorf("%q is %s:%d, %v; want %s", in, host, port, err, want)
		}
	}
}

// manyDisks is so many of a joiner's, each with a comma after it.
func manyDisks(n int) string {
	var text strings.Builder
	for i := range n {
		fmt.Fprintf(&text, `"d%d":{},`, i)
	}
	return text.String()
}

// FuzzJoinRequest reads anything as a request to join; what passes the checks can be put into records and certificates.
func FuzzJoinRequest(f *testing.F) {
	f.Add([]byte(`{"secret":"s","name":"n2","nodeID":"11111111111111111111111111111111","request":"x","host":"192.0.2.1","port":9510,"disks":{"default":{"path":"/d"}},"time":"2026-01-02T03:04:05Z"}`))
	f.Add([]byte(`{"host":"::1","port":-1}`))
	f.Add([]byte(`{} {}`))
	f.Add([]byte(`{"name":"\u0000/x"}`))
	for _, long := range []string{`"secret":"` + strings.Repeat("s", 101) + `"`, `"zone":"` + strings.Repeat("z", 101) + `"`, `"disks":{` + strings.TrimSuffix(manyDisks(maxDisks+1), ",") + `}`} {
		f.Add([]byte(`{"name":"n2","nodeID":"11111111111111111111111111111111","host":"192.0.2.1","port":9510,` + long + `}`))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var in joinRequest
		if parse(data, &in) != nil || in.check() != nil {
			return
		}
		if len(in.Secret) > 100 || len(in.Zone) > 100 || len(in.Disks) > maxDisks {
			t.Errorf("a secret of %d bytes, a zone of %d, %d disks", len(in.Secret), len(in.Zone), len(in.Disks))
		}
		if err := catalog.NodeKey(catalog.Wanted, in.Name).Check(); err != nil {
			t.Error(err)
		}
		if err := (&State{Format: 1, ClusterID: strings.Repeat("c", 32), NodeID: in.NodeID, Name: in.Name, Host: in.Host, Port: in.Port}).check(); err != nil {
			t.Error(err)
		}
		if host, port, err := ParseAddress(Address(in.Host, in.Port, 0)); err != nil || host != in.Host || port != in.Port {
			t.Errorf("address %q %d came back as %q %d, %v", in.Host, in.Port, host, port, err)
		}
	})
}
