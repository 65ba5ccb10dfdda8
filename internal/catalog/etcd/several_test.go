//go:build integration

package etcd_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/catalog/etcd"
)

// TestAddressChanges: a member comes back elsewhere and the others learn of it; one that is alone too.
func TestAddressChanges(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	a, b := c.nodes[0], c.nodes[1]
	c.open(a)
	c.close(a)
	move := func(n *node) {
		peer, client := freeAddr(t), freeAddr(t)
		n.member.PeerListen, n.member.ClientListen, n.member.PeerURL, n.member.ClientURL = peer, client, "https://"+peer, "https://"+client
	}
	move(a)
	c.start()
	put(t, a.store, "a")
	c.close(b)
	move(b)
	c.open(b)
	put(t, b.store, "b")
	eventually(t, time.Minute, "the member is known at its new address", func() bool {
		ms, err := a.store.Members(t.Context())
		return err == nil && ms[1].Alive && ms[1].PeerURL == b.member.PeerURL && slices.Equal(ms[1].ClientURLs, []string{b.member.ClientURL})
	})
	if got := names(t, b.store); got != "a b" {
		t.Fatalf("records %q", got)
	}
}

// TestCertificates: who has none of the authority is refused, also by name; replaced files are used without a restart.
func TestCertificates(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	a, b := c.nodes[0], c.nodes[1]
	var mu sync.Mutex
	refused := ""
	a.member.Admit = func(cert *x509.Certificate) error {
		mu.Lock()
		defer mu.Unlock()
		if cert.Subject.CommonName == refused {
			return errors.New("not any more")
		}
		return nil
	}
	a.member.Files = c.ca.issue(t, "n1", 8*time.Second) // it will have run out
	began := time.Now()
	c.start()
	client := func(f etcd.Files, patience time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		s, err := etcd.Open(ctx, etcd.Options{Endpoints: []string{a.member.ClientURL}, Files: f})
		if err != nil {
			return err
		}
		return s.Close()
	}
	guest := c.ca.issue(t, "guest", time.Hour)
	if err := client(guest, time.Minute); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	refused = "guest"
	mu.Unlock()
	if err := client(guest, 2*time.Second); !errors.Is(err, catalog.ErrUnreachable) {
		t.Fatalf("a client that is refused by name: %v", err)
	}
	foreign := newAuthority(t).issue(t, "guest", time.Hour)
	foreign.CA = guest.CA
	if err := client(foreign, 2*time.Second); !errors.Is(err, catalog.ErrUnreachable) {
		t.Fatalf("a client of another authority: %v", err)
	}
	if _, err := etcd.Open(t.Context(), etcd.Options{Endpoints: []string{a.member.ClientURL}, Files: etcd.Files{Cert: "nowhere", Key: "nowhere", CA: guest.CA}}); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a client without a file: %v", err)
	}
	c.ca.issue(t, "n1", time.Hour)
	eventually(t, time.Minute, "the first certificate has run out", func() bool { return time.Since(began) > 8*time.Second })
	if err := client(c.ca.issue(t, "other", time.Hour), time.Minute); err != nil {
		t.Fatalf("the new certificate is not shown: %v", err)
	}
	c.close(b) // and as a client and peer it shows the new one to somebody who begins
	c.open(b)
	put(t, b.store, "b")
	put(t, a.store, "a")
}

// TestFollowsMembers: a node that is no member finds members that came after the one that it was told of, when that one goes.
func TestFollowsMembers(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.open(c.nodes[0])
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s, err := etcd.Open(ctx, etcd.Options{Endpoints: []string{c.nodes[0].member.ClientURL}, Sync: true, Files: c.ca.issue(t, "guest", time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, n := range c.nodes[1:] {
		n.member.Members = c.peers()
		c.join(c.nodes[0].store, n)
	}
	if state, err := s.MemberState(); state != etcd.StateNone || err != nil || s.MemberFailed() != nil {
		t.Fatalf("state %v, %v", state, err)
	}
	l := startLoad(t, map[string]*etcd.Store{"guest": s})
	l.more(20)
	eventually(t, time.Minute, "the list of members is read", func() bool { return etcd.Knows(s, c.nodes[2].member.ClientURL) })
	c.close(c.nodes[0])
	l.more(20)
	l.stop(c.nodes[1].store, "guest")
}

// TestLeaderCutOff: a leader that reaches nobody stops leading before another may begin.
func TestLeaderCutOff(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.open(c.nodes[0])
	s := c.guest("leader")
	lead := make(chan context.Context, 1)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		_ = s.Lead(ctx, func(ctx context.Context) error { lead <- ctx; <-ctx.Done(); return nil })
	})
	l := <-lead
	c.close(c.nodes[0])
	begin := time.Now()
	select {
	case <-l.Done():
	case <-time.After(catalog.AliveTTL):
		t.Fatal("it leads for longer than its time")
	}
	t.Logf("it stopped after %v", time.Since(begin).Round(time.Millisecond))
	c.open(c.nodes[0])
	select {
	case <-lead: // and it leads again
	case <-time.After(time.Minute):
		t.Fatal("nobody leads when the catalogue is back")
	}
}

// TestForceNew: the majority is gone for good; the one that is left goes on alone with what it has, and others join it again.
func TestForceNew(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.start()
	put(t, c.nodes[1].store, "a")
	if got := names(t, c.nodes[0].store); got != "a" {
		t.Fatalf("records %q", got)
	}
	for _, n := range c.nodes {
		c.close(n)
	}
	left := c.nodes[0]
	left.member.ForceNew, left.member.Members = true, nil
	c.open(left)
	if got := names(t, left.store); got != "a" {
		t.Fatalf("records %q", got)
	}
	ms, err := left.store.Members(t.Context())
	if err != nil || len(ms) != 1 {
		t.Fatalf("members %+v, %v", ms, err)
	}
	left.member.ForceNew = false
	c.close(left)
	c.open(left)
	if err := etcd.Rejoin(t.Context(), c.nodes[1].options(t)); err != nil {
		t.Fatal(err)
	}
	c.open(c.nodes[1])
	if err := left.store.Promote(t.Context(), "n2"); err != nil {
		t.Fatal(err)
	}
	put(t, c.nodes[1].store, "b")
	if got := names(t, left.store); got != "a b" {
		t.Fatalf("records %q", got)
	}
}

// TestDamagedMember: a member whose files are damaged does not keep its node from going on through the others.
func TestDamagedMember(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.start()
	n := c.nodes[2]
	put(t, n.store, "a")
	c.close(n)
	if err := os.WriteFile(filepath.Join(n.dir, "member", "snap", "db"), bytes.Repeat([]byte{0xA5}, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	c.open(n)
	if state, err := n.store.MemberState(); state != etcd.StateFailed || !errors.Is(err, etcd.ErrDamaged) {
		t.Fatalf("state %v, %v", state, err)
	}
	put(t, n.store, "b")
	c.close(n)
	if err := etcd.Rejoin(t.Context(), n.options(t)); err != nil {
		t.Fatal(err)
	}
	c.open(n)
	if err := n.store.Promote(t.Context(), "n3"); err != nil {
		t.Fatal(err)
	}
	if got := names(t, n.store); got != "a b" {
		t.Fatalf("records %q", got)
	}
}

// TestLeaderDies: one that says nothing any more is followed when its time is over.
func TestLeaderDies(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.open(c.nodes[0])
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	turns := make(chan context.Context, 2)
	lead := func(s *etcd.Store) {
		wg.Go(func() {
			_ = s.Lead(ctx, func(ctx context.Context) error { turns <- ctx; <-ctx.Done(); return ctx.Err() })
		})
	}
	first := c.guest("first")
	lead(first)
	l := <-turns
	lead(c.guest("second"))
	begin := time.Now()
	if err := first.Close(); err != nil { // nothing is given back
		t.Fatal(err)
	}
	if l.Err() == nil {
		t.Fatal("a store that is closed leads")
	}
	select {
	case <-turns:
		d := time.Since(begin)
		t.Logf("followed after %v", d.Round(time.Millisecond))
		if d < time.Second { // what the dead one holds ends after some seconds, and not before
			t.Errorf("another leads %v after the first one, which said nothing, died", d)
		}
	case <-time.After(catalog.AliveTTL + 20*time.Second):
		t.Fatal("nobody leads")
	}
}
