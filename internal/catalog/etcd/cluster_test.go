package etcd_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/catalog/etcd"
)

// authority signs the certificates of a test's nodes.
type authority struct {
	dir  string
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{dir: t.TempDir()}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	writePEM(t, filepath.Join(a.dir, "ca.crt"), "CERTIFICATE", der)
	return a
}

func writePEM(t testing.TB, name, kind string, der []byte) {
	t.Helper()
	tmp := name + ".new"
	if err := os.WriteFile(tmp, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, name); err != nil {
		t.Fatal(err)
	}
}

// issue writes a certificate for a node, as docs/formats/cluster.md describes it, in place of the one before.
func (a *authority) issue(t testing.TB, name string, life time.Duration, hosts ...net.IP) etcd.Files {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life),
		DNSNames: []string{name, "localhost"}, IPAddresses: append([]net.IP{net.IPv4(127, 0, 0, 1)}, hosts...),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	kder, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	f := etcd.Files{Cert: filepath.Join(a.dir, name+".crt"), Key: filepath.Join(a.dir, name+".key"), CA: filepath.Join(a.dir, "ca.crt")}
	writePEM(t, f.Cert, "CERTIFICATE", der)
	writePEM(t, f.Key, "EC PRIVATE KEY", kder)
	return f
}

// node is a machine of a test's cluster.
type node struct {
	dir    string
	member etcd.Member
	store  *etcd.Store
}

// cluster is several nodes in this process.
type cluster struct {
	t     testing.TB
	ca    *authority
	nodes []*node
}

// freeAddr is an address that nobody listened on a moment ago. Its port is below those that Linux gives to outgoing connections (32768 and up, ip(7)):
// one of those could be another test's connection by the time that it is listened on.
func freeAddr(t testing.TB) string {
	t.Helper()
	for range 100 {
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 10_000+mathrand.IntN(22_000))); err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal("no port is free")
	return ""
}

func newCluster(t testing.TB, n int) *cluster {
	t.Helper()
	c := &cluster{t: t, ca: newAuthority(t)}
	for i := range n {
		c.nodes = append(c.nodes, c.node(fmt.Sprintf("n%d", i+1)))
	}
	t.Cleanup(func() {
		var wg sync.WaitGroup
		for _, n := range c.nodes {
			if n.store != nil {
				wg.Go(func() { _ = n.store.Close() })
			}
		}
		wg.Wait()
	})
	return c
}

func (c *cluster) node(name string) *node {
	peer, client := freeAddr(c.t), freeAddr(c.t)
	return &node{dir: c.t.TempDir(), member: etcd.Member{
		Name: name, PeerListen: peer, ClientListen: client, PeerURL: "https://" + peer, ClientURL: "https://" + client,
		Files: c.ca.issue(c.t, name, time.Hour),
	}}
}

func (c *cluster) peers() []etcd.Peer {
	var out []etcd.Peer
	for _, n := range c.nodes {
		out = append(out, etcd.Peer{Name: n.member.Name, PeerURL: n.member.PeerURL, ClientURL: n.member.ClientURL})
	}
	return out
}

func (n *node) options(t testing.TB) etcd.Options {
	m := n.member
	return etcd.Options{Dir: n.dir, Member: &m, Log: slog.New(slog.NewTextHandler(t.Output(), nil)).With("node", m.Name)}
}

func (c *cluster) open(n *node) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	var err error
	if n.store, err = etcd.Open(ctx, n.options(c.t)); err != nil {
		c.t.Fatalf("open %s: %v", n.member.Name, err)
	}
}

// join makes n a voter, as told by another node's store.
func (c *cluster) join(by *etcd.Store, n *node) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	if _, err := by.AddLearner(ctx, n.member.Name, n.member.PeerURL); err != nil {
		c.t.Fatal(err)
	}
	c.open(n)
	if err := by.Promote(ctx, n.member.Name); err != nil {
		c.t.Fatal(err)
	}
}

// start makes the first node begin and the others join.
func (c *cluster) start() {
	c.t.Helper()
	c.open(c.nodes[0])
	for _, n := range c.nodes[1:] {
		n.member.Members = c.peers()
		c.join(c.nodes[0].store, n)
	}
	for _, n := range c.nodes {
		n.member.Members = c.peers()
	}
}

func (c *cluster) close(n *node) {
	c.t.Helper()
	if err := n.store.Close(); err != nil {
		c.t.Fatal(err)
	}
	n.store = nil
}

// eventually tries until ok, for at most d.
func eventually(t testing.TB, d time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(d)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			t.Fatalf("after %v not yet: %s", d, what)
		case <-tick.C:
		}
	}
}

// load increments one counter from many clients and watches it from all of them.
type load struct {
	t      testing.TB
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex // guards all below
	acked   int        // increments that were acknowledged
	unknown int        // increments that may have happened
	errs    []error
	last    map[string]int // by watcher: the value last seen
	longest time.Duration  // without any acknowledgement, from all together
	when    time.Time
}

var counter = catalog.VolumeKey(catalog.Wanted, "counter")

func startLoad(t testing.TB, clients map[string]*etcd.Store) *load {
	l := loadFrom(t.Context(), clients)
	l.t = t
	return l
}

func loadFrom(ctx context.Context, clients map[string]*etcd.Store) *load {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{cancel: cancel, last: map[string]int{}, when: time.Now()}
	for name, s := range clients {
		l.wg.Go(func() { l.write(ctx, s) })
		l.watchOn(ctx, name, s)
	}
	return l
}

// watchOn watches until ctx ends or the store is closed: every value, one after the other, revisions growing.
func (l *load) watchOn(ctx context.Context, name string, s *etcd.Store) {
	l.wg.Go(func() {
		var at catalog.Rev
		value := 0
		for ctx.Err() == nil {
			err := s.Watch(ctx, at, func(ev catalog.Event) error {
				if ev.Key != counter {
					return nil
				}
				n, err := strconv.Atoi(string(ev.Value))
				if err != nil || n != value+1 || ev.Rev <= at {
					l.fail(fmt.Errorf("%s: value %s at %d after %d at %d", name, ev.Value, ev.Rev, value, at))
				}
				at, value = ev.Rev, n
				l.mu.Lock()
				l.last[name] = n
				l.mu.Unlock()
				return nil
			})
			if !errors.Is(err, catalog.ErrUnreachable) && ctx.Err() == nil {
				l.fail(fmt.Errorf("%s: watch: %w", name, err))
			}
			if ctx.Err() == nil && closed(s) {
				return
			}
		}
	})
}

// closed tells whether a store was closed; if not, it waits a little, for a catalogue that is away.
func closed(s *etcd.Store) bool {
	<-time.After(20 * time.Millisecond)
	return etcd.Closed(s)
}

func (l *load) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.errs = append(l.errs, err)
}

func (l *load) write(ctx context.Context, s *etcd.Store) {
	for ctx.Err() == nil {
		e, err := s.Get(ctx, counter)
		n := 0
		if err == nil {
			n, err = strconv.Atoi(string(e.Value))
		}
		if err != nil && !errors.Is(err, catalog.ErrNotFound) {
			if closed(s) {
				return
			}
			continue
		}
		_, err = s.Put(ctx, counter, []byte(strconv.Itoa(n+1)), e.Rev)
		l.mu.Lock()
		switch {
		case err == nil:
			now := time.Now()
			l.longest = max(l.longest, now.Sub(l.when))
			l.when = now
			l.acked++
		case errors.Is(err, catalog.ErrConflict):
		default:
			l.unknown++
		}
		l.mu.Unlock()
		if errors.Is(err, catalog.ErrUnreachable) && closed(s) {
			return
		}
	}
}

func (l *load) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.acked
}

// more waits for n more acknowledged increments.
func (l *load) more(n int) {
	l.t.Helper()
	want := l.count() + n
	eventually(l.t, time.Minute, fmt.Sprintf("%d more increments", n), func() bool { return l.count() >= want })
}

// stop ends the load and holds that nothing was lost.
func (l *load) stop(s *etcd.Store, watchers ...string) {
	l.t.Helper()
	e, err := s.Get(l.t.Context(), counter)
	if err != nil {
		l.t.Fatal(err)
	}
	n, _ := strconv.Atoi(string(e.Value))
	for _, w := range watchers { // before the watches end
		eventually(l.t, time.Minute, "watch on "+w+" sees what was put", func() bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.last[w] >= n
		})
	}
	l.cancel()
	l.wg.Wait()
	if e, err = s.Get(l.t.Context(), counter); err != nil {
		l.t.Fatal(err)
	}
	n, _ = strconv.Atoi(string(e.Value))
	l.t.Logf("%d increments, %d acknowledged, %d unknown; longest pause %v", n, l.acked, l.unknown, l.longest.Round(time.Millisecond))
	if n < l.acked || n > l.acked+l.unknown {
		l.t.Errorf("the counter is %d after %d acknowledged and %d unknown increments", n, l.acked, l.unknown)
	}
	if err := errors.Join(l.errs...); err != nil {
		l.t.Error(err)
	}
}

func (c *cluster) stores() map[string]*etcd.Store {
	m := map[string]*etcd.Store{}
	for _, n := range c.nodes {
		if n.store != nil {
			m[n.member.Name] = n.store
		}
	}
	return m
}

// TestThreeMembers: a lone member becomes the first of three with what it has; members see each other; one that stops is not missed; all stop and come back.
func TestThreeMembers(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	alone := open(t, c.nodes[0].dir)
	put(t, alone, "before")
	before, _, err := alone.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := alone.Close(); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	c.start()
	t.Logf("three members after %v", time.Since(begin).Round(time.Millisecond))
	after, _, err := c.nodes[2].store.List(t.Context(), "")
	if err != nil || len(after) != 1 || after[0].Rev != before[0].Rev {
		t.Fatalf("records %v became %v, %v", before, after, err)
	}
	ms, err := c.nodes[1].store.Members(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	leaders := 0
	for i, m := range ms {
		n := c.nodes[i].member
		if m.Name != n.Name || m.PeerURL != n.PeerURL || !slices.Equal(m.ClientURLs, []string{n.ClientURL}) || m.Learner || !m.Alive || m.DBSizeBytes == 0 {
			t.Errorf("member %d: %+v", i, m)
		}
		if m.Leader {
			leaders++
		}
	}
	if len(ms) != 3 || leaders != 1 {
		t.Fatalf("%d members, %d leaders", len(ms), leaders)
	}

	l := startLoad(t, c.stores())
	l.more(50)
	i := slices.IndexFunc(ms, func(m etcd.MemberInfo) bool { return m.Leader })
	c.close(c.nodes[i]) // the leader
	l.more(50)
	c.open(c.nodes[i])
	l.more(10)
	l.stop(c.nodes[i].store, c.nodes[(i+1)%3].member.Name, c.nodes[(i+2)%3].member.Name)

	for _, n := range c.nodes {
		c.close(n)
	}
	var wg sync.WaitGroup
	begin = time.Now()
	for _, n := range c.nodes {
		wg.Go(func() { c.open(n) })
	}
	wg.Wait()
	t.Logf("all three back after %v", time.Since(begin).Round(time.Millisecond))
	e, err := c.nodes[0].store.Get(t.Context(), counter)
	if n, _ := strconv.Atoi(string(e.Value)); err != nil || n < l.acked {
		t.Fatalf("after all stopped: %s, %v; %d were acknowledged", e.Value, err, l.acked)
	}
}

// TestRemovedAtOnce: a member that many remove at the same time, from every node, is removed, and all of them hear so.
func TestRemovedAtOnce(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.start()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			if err := c.nodes[i%2].store.RemoveMember(ctx, "n3"); err != nil {
				t.Errorf("%d: %v", i, err)
			}
		})
	}
	wg.Wait()
	ms, err := c.nodes[0].store.Members(ctx)
	if err != nil || len(ms) != 2 {
		t.Fatalf("members %+v, %v", ms, err)
	}
	put(t, c.nodes[1].store, "a")
}

// TestMembership: what may be said again, what is refused, what a removed and an emptied member are told, and how they come back.
func TestMembership(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	a, b := c.nodes[0], c.nodes[1]
	c.open(a)
	ctx, s := t.Context(), a.store
	if err := s.RemoveMember(ctx, "n1"); !errors.Is(err, etcd.ErrLastVoter) {
		t.Fatalf("remove the last voter: %v", err)
	}
	if err := s.Promote(ctx, "n2"); !errors.Is(err, etcd.ErrNoMember) {
		t.Fatalf("promote nobody: %v", err)
	}
	if err := s.RemoveMember(ctx, "n2"); err != nil {
		t.Fatalf("remove nobody: %v", err)
	}
	b.member.Members = c.peers()
	if _, err := etcd.Open(ctx, b.options(t)); !errors.Is(err, etcd.ErrRemoved) {
		t.Fatalf("join without having been added: %v", err)
	}

	stale, err := s.AddLearner(ctx, "n2", "https://127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.AddLearner(ctx, "n2", b.member.PeerURL)
	if err != nil || m.ID == stale.ID {
		t.Fatalf("add with another URL: %+v, %v", m, err)
	}
	if same, err := s.AddLearner(ctx, "n2", b.member.PeerURL); err != nil || same.ID != m.ID {
		t.Fatalf("add again: %+v, %v", same, err)
	}
	if _, err := s.AddLearner(ctx, "n3", b.member.PeerURL); !errors.Is(err, etcd.ErrOptions) {
		t.Fatalf("another's URL: %v", err)
	}
	if ms, err := s.Members(ctx); err != nil || len(ms) != 2 || ms[1].Name != "n2" || !ms[1].Learner || ms[1].Alive || ms[1].PeerURL != b.member.PeerURL {
		t.Fatalf("members %+v, %v", ms, err)
	}
	c.open(b)
	eventually(t, time.Minute, "it knows what it is", func() bool { state, err := b.store.MemberState(); return state == etcd.StateLearner && err == nil })
	put(t, b.store, "from a learner's node")
	for range 2 {
		if err := s.Promote(ctx, "n2"); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, time.Minute, "it knows what it is", func() bool { state, err := b.store.MemberState(); return state == etcd.StateVoter && err == nil })
	if same, err := s.AddLearner(ctx, "n2", b.member.PeerURL); err != nil || same.ID != m.ID || same.Learner {
		t.Fatalf("add a voter: %+v, %v", same, err)
	}
	d := c.nodes[2]
	d.member.Members = c.peers()
	c.join(s, d)

	c.close(b)
	if err := os.RemoveAll(b.dir); err != nil {
		t.Fatal(err)
	}
	if _, err := etcd.Open(ctx, b.options(t)); !errors.Is(err, etcd.ErrEmptied) {
		t.Fatalf("open with an emptied directory: %v", err)
	}
	for range 2 {
		if err := etcd.Rejoin(ctx, b.options(t)); err != nil {
			t.Fatal(err)
		}
	}
	c.open(b)
	if err := s.Promote(ctx, "n2"); err != nil {
		t.Fatal(err)
	}
	put(t, b.store, "with an emptied directory")

	if err := s.RemoveMember(ctx, "n2"); err != nil { // while it runs
		t.Fatal(err)
	}
	select {
	case <-b.store.MemberFailed():
	case <-time.After(time.Minute):
		t.Fatal("a removed member does not notice")
	}
	if state, err := b.store.MemberState(); state != etcd.StateRemoved || !errors.Is(err, etcd.ErrRemoved) {
		t.Fatalf("state %v, %v", state, err)
	}
	put(t, b.store, "from a node whose member was removed")
	c.close(b)
	if _, err := etcd.Open(ctx, b.options(t)); !errors.Is(err, etcd.ErrRemoved) {
		t.Fatalf("open a removed member: %v", err)
	}
	if err := etcd.Rejoin(ctx, b.options(t)); err != nil {
		t.Fatal(err)
	}
	c.open(b)
	if err := s.Promote(ctx, "n2"); err != nil {
		t.Fatal(err)
	}
	if n := len(names(t, b.store)); n == 0 {
		t.Fatal("no records")
	}
	c.close(d)
	if err := s.RemoveMember(ctx, "n2"); !errors.Is(err, etcd.ErrQuorum) {
		t.Fatalf("remove one of two that are left of three: %v", err)
	}
	if err := s.RemoveMember(ctx, "n3"); err != nil {
		t.Fatalf("remove the dead one of three: %v", err)
	}
}
