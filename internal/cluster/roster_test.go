package cluster

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/identity"
)

// guarded is a voter's roster, and the records that it is kept by.
type guarded struct {
	t      *testing.T
	cat    *catalog.Mem
	dir    Dir
	roster *Roster
	expels int // how often Changed was called
}

const rosterCluster = "cccccccccccccccccccccccccccccccc"

func (g *guarded) open() {
	g.roster = OpenRoster(RosterConfig{Dir: g.dir, State: State{ClusterID: rosterCluster, NodeID: nodeID("n1"), Name: "n1"}, Changed: func() { g.expels++ }})
}

// run follows the records until the returned function is called.
func (g *guarded) run() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { g.roster.follow(ctx, g.cat) })
	synctest.Wait()
	return func() { cancel(); wg.Wait() }
}

func (g *guarded) put(name, id string) {
	g.t.Helper()
	if _, _, err := catalog.Upsert(g.t.Context(), g.cat, catalog.NodeKey(catalog.Wanted, name), func(n *catalog.NodeWanted) error {
		*n = catalog.NodeWanted{Name: name, ID: id}
		return nil
	}); err != nil {
		g.t.Fatal(err)
	}
}

func (g *guarded) drop(name string) {
	g.t.Helper()
	e, err := g.cat.Get(g.t.Context(), catalog.NodeKey(catalog.Wanted, name))
	if err == nil {
		err = g.cat.Delete(g.t.Context(), e.Key, e.Rev)
	}
	if err != nil {
		g.t.Fatal(err)
	}
}

// changed is what the keeper does when it hears that records changed.
func (g *guarded) changed() {
	g.roster.ask()
	synctest.Wait()
}

// nodeID is an id that a test's node has: the name's last letter, again and again.
func nodeID(name string) string { return strings.Repeat(name[len(name)-1:], 32) }

// showing is a certificate with a name and an id.
func showing(name, id string) *x509.Certificate {
	return &x509.Certificate{Subject: pkix.Name{CommonName: name}, URIs: []*url.URL{{Scheme: "ashlar", Host: rosterCluster, Path: "/" + id}}}
}

// comes tells whether somebody is let in, and how long that took.
func (g *guarded) comes(name, id string) (bool, time.Duration) {
	g.t.Helper()
	began := time.Now()
	err := g.roster.Admit(showing(name, id))
	if err != nil && !errors.Is(err, identity.ErrPeer) {
		g.t.Fatal(err)
	}
	return err == nil, time.Since(began)
}

func (g *guarded) want(what, name, id string, want bool) {
	g.t.Helper()
	if in, took := g.comes(name, id); in != want || took > 0 {
		g.t.Errorf("%s: comes in %v after %s, want %v at once", what, in, took, want)
	}
}

// TestRoster: who is a node comes in, who was removed stays out whether the catalogue answers or not, and whom the records have only just is found there.
func TestRoster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &guarded{t: t, cat: catalog.NewMem(), dir: Dir(t.TempDir())}
		defer g.cat.Close()
		for _, name := range []string{"n1", "n2", "n3"} {
			g.put(name, nodeID(name))
		}
		g.open()
		g.want("before anything was read, a node", "n2", nodeID("n2"), true)
		g.want("before anything was read, a stranger", "n9", nodeID("n9"), true)
		if err := g.roster.Knows(showing("n9", nodeID("n9"))); err != nil {
			t.Errorf("before anything was read a stranger is thrown out: %v", err)
		}
		stop := g.run()
		if g.expels == 0 || g.roster.Knows(showing("n9", nodeID("n9"))) == nil || g.roster.Knows(showing("n2", nodeID("n2"))) != nil {
			t.Errorf("after the first reading: %d calls of Changed; the stranger: %v, the node: %v", g.expels, g.roster.Knows(showing("n9", nodeID("n9"))), g.roster.Knows(showing("n2", nodeID("n2"))))
		}
		g.want("a stranger", "n9", nodeID("n9"), false)
		g.want("a node's name with another id", "n2", nodeID("n9"), false)
		if err := g.roster.Admit(&x509.Certificate{Subject: pkix.Name{CommonName: "n2"}}); !errors.Is(err, identity.ErrPeer) {
			t.Errorf("a certificate that is no node's: %v", err)
		}
		g.put("n4", nodeID("n4")) // and nobody told the roster
		g.want("one that has just joined", "n4", nodeID("n4"), true)
		g.drop("n3")
		g.changed()
		g.want("a removed one", "n3", nodeID("n3"), false)
		g.put("n3", nodeID("x")) // another machine of that name
		g.changed()
		g.want("the new one", "n3", nodeID("x"), true)
		g.want("the old one", "n3", nodeID("n3"), false)
		g.put("n2", "") // its record was made anew
		g.changed()
		g.want("one whose record has no id yet", "n2", nodeID("n2"), true)
		stop()
	})
}

// TestRosterAway: without the catalogue those are refused who were removed, also by the next start, and nobody else: he may be who is needed to reach it.
func TestRosterAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &guarded{t: t, cat: catalog.NewMem(), dir: Dir(t.TempDir())}
		defer g.cat.Close()
		for _, name := range []string{"n1", "n2", "n3"} {
			g.put(name, nodeID(name))
		}
		g.open()
		stop := g.run()
		g.drop("n3")
		g.changed()
		g.cat.Away(true)
		g.want("a removed one", "n3", nodeID("n3"), false)
		g.want("a node", "n2", nodeID("n2"), true)
		g.want("a stranger, who may have joined meanwhile", "n4", nodeID("n4"), true)
		stop()
		g.open()
		stop = g.run()
		g.want("a removed one, after a start", "n3", nodeID("n3"), false)
		g.want("a node, after a start", "n2", nodeID("n2"), true)
		g.want("a stranger, after a start", "n4", nodeID("n4"), true)
		before := g.expels
		g.cat.Away(false)
		<-time.After(retry) // of the bubble
		synctest.Wait()
		if g.expels == before || g.roster.Knows(showing("n4", nodeID("n4"))) == nil {
			t.Errorf("the catalogue is back: Changed called %d times, the stranger who came in: %v", g.expels-before, g.roster.Knows(showing("n4", nodeID("n4"))))
		}
		g.want("a stranger, when the catalogue is back", "n4", nodeID("n4"), false)
		stop()
		if err := os.WriteFile(g.dir.Path(rosterName), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		g.cat.Away(true)
		g.open()
		g.want("anybody, where the file is damaged", "n3", nodeID("n3"), true)
	})
}

// hangs is a catalogue that takes its time.
type hangs struct{ catalog.Catalog }

func (hangs) List(ctx context.Context, _ catalog.Kind) ([]catalog.Entry, catalog.Rev, error) {
	<-ctx.Done()
	return nil, 0, ctx.Err()
}

// TestRosterHangs: a catalogue that neither answers nor fails holds a handshake up for two seconds, and then keeps nobody out.
func TestRosterHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &guarded{t: t, cat: catalog.NewMem(), dir: Dir(t.TempDir())}
		defer g.cat.Close()
		g.put("n1", nodeID("n1"))
		g.open()
		g.run()()
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		g.roster.fresh = true
		wg.Go(func() { g.roster.follow(ctx, hangs{g.cat}) })
		if in, took := g.comes("n4", nodeID("n4")); !in || took > rosterPatience {
			t.Errorf("a stranger: comes in %v after %s", in, took)
		}
		cancel()
		wg.Wait()
	})
}
