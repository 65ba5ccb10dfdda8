package plan_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// TestVoters: who keeps the catalogue.
func TestVoters(t *testing.T) {
	for n, want := range []int{0, 1, 2, 3, 3, 3} {
		if got := plan.Voters(n); got != want {
			t.Errorf("of %d nodes %d keep the catalogue, want %d", n, got, want)
		}
	}
	for _, c := range []struct {
		nodes string // NAME, with * a voter, m a member, e to be emptied, - removed, ! silent, ? not ready, x given up
		want  string // voters afterwards
	}{
		{"a", ""}, // an existing etcd, or a cluster of one: nobody has a seat
		{"a b c", ""},
		{"a*", "a"},
		{"a* b", "a b"},
		{"a* b!", "a"},
		{"a* be c d", "a c d"},
		{"am* bm* cm* dm*", "a b c d"}, // all are members: a change is worth nothing
		{"am* b* cm* dm*", "a c d"},
		{"a* b* c* d* e*!", "a b c"},
		{"a* b c", "a b c"},
		{"a* b c d", "a b c"},
		{"a b c d*", "a b d"},
		{"a* b! c", "a c"},
		{"a* b? c d", "a c d"},
		{"a* b! c?", "a"},
		{"a*! b* c* d", "a b c"}, // silence costs nobody a seat
		{"a*! b*! c* d e", "a b c"},
		{"a*- b* c* d", "b c d"},
		{"a*- b* c*", "b c"}, // nor does another's end
		{"a*- b*- c* d e f", "c d e"},
		{"a*x! b* c* d", "b c d"},
		{"a*-", "a"}, // the last node
		{"a*- b-", "a"},
		{"a*- b", "b"},
		{"a* b*", "a b"},
		{"a* b* c* d*", "a b c"},
		{"a* b- c", "a c"},
	} {
		p := newPicture(t)
		for _, s := range strings.Fields(c.nodes) {
			p.node(s[:1], func(w *catalog.NodeWanted, o *catalog.NodeObserved) {
				for _, x := range s[1:] {
					switch x {
					case '*':
						w.Voter = true
					case 'm':
						o.Member = "voter"
					case 'e':
						w.EvictionRequested = true
					case '-':
						w.Deleted = &now
					case 'x':
						w.Deleted, w.Lost = &now, true
					case '!':
						o.Port = 9510
					case '?':
						o.Ready = false
					}
				}
			})
			p.volume(catalog.VolumeWanted{Name: "on-" + s[:1], Replicas: []catalog.Placement{{ReplicaID: "r" + s[:1], Node: s[:1], DiskID: s[:1] + "-d"}}}) // so that its records stay
		}
		p.apply()
		var got []string
		for _, name := range strings.Fields(strings.Join(strings.Split(sortedKeys(p.v.Nodes), " "), " ")) {
			if p.v.Nodes[name].Wanted.Value.Voter {
				got = append(got, name)
			}
		}
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("%s: %q keep the catalogue, want %q", c.nodes, s, c.want)
		}
	}
}

// TestNodeEnds: the records of a removed node go when nothing lies on it, or at once if it was given up.
func TestNodeEnds(t *testing.T) {
	gone := "-node/wanted/n1 -node/observed/n1"
	for _, c := range []struct {
		name   string
		change func(*catalog.NodeWanted, *catalog.NodeObserved)
		build  func(*picture)
		want   string // of the writes that concern nodes
	}{
		{"it stays", func(*catalog.NodeWanted, *catalog.NodeObserved) {}, func(*picture) {}, ""},
		{"nothing is on it", removed, func(*picture) {}, gone},
		{"a copy", removed, func(p *picture) { resting(p, ticket, elsewhere) }, "node/observed/n1"},
		{"a copy that was dropped", removed, func(p *picture) {
			resting(p, func(w *catalog.VolumeWanted) {
				w.Replicas[0].Node, w.Replicas[0].DiskID, w.Dropped = "n2", "n2-d", w.Replicas
			})
			w := p.v.Volumes["v"].Wanted.Value
			w.Dropped = []catalog.Placement{{ReplicaID: "old", Node: "n1", DiskID: "n1-d"}}
			p.volume(w)
		}, "node/observed/n1"},
		{"a copy of a volume that is being deleted", removed, func(p *picture) { resting(p, tombstone) }, "node/observed/n1"},
		{"a ticket", removed, func(p *picture) {
			resting(p, ticket, func(w *catalog.VolumeWanted) { w.Replicas[0].Node, w.Replicas[0].DiskID = "n2", "n2-d" })
		}, "node/observed/n1"},
		{"an image's copy", removed, func(p *picture) { imageAt(p, "n1-d:ready") }, "node/observed/n1"},
		{"an image's copy that is still to be deleted", removed, func(p *picture) { imageAt(p, "-n1-d:ready n2-d:ready") }, "node/observed/n1"},
		{"an image's copy that is gone", removed, func(p *picture) {
			imageAt(p, "n1-d:gone n2-d:gone", func(w *catalog.ImageWanted) { w.Deleted = &now })
		}, "node/observed/n1 " + gone},
		{"it votes", func(w *catalog.NodeWanted, o *catalog.NodeObserved) { removed(w, o); w.Voter = true }, func(*picture) {}, "node/wanted/n1 node/observed/n1 node/wanted/n2 " + gone},
		{"it votes, and lives", func(w *catalog.NodeWanted, o *catalog.NodeObserved) {
			removed(w, o)
			w.Voter, o.Member = true, "voter"
		}, func(p *picture) { p.put(catalog.AliveKey("n1"), catalog.Alive{Node: "n1"}) }, "node/wanted/n1 node/observed/n1 node/wanted/n2"},
		{"it gave its vote up, and lives", func(w *catalog.NodeWanted, o *catalog.NodeObserved) { removed(w, o); o.Member = "client" },
			func(p *picture) { p.put(catalog.AliveKey("n1"), catalog.Alive{Node: "n1"}) }, gone},
		{"its vote died with it", func(w *catalog.NodeWanted, o *catalog.NodeObserved) { removed(w, o); o.Member = "voter" }, func(*picture) {}, gone},
		{"given up, with a copy", given, func(p *picture) { resting(p) }, gone},
		{"given up, with a ticket and an image", given, func(p *picture) { resting(p, ticket); imageAt(p, "n1-d:ready") }, gone},
		{"seen only", func(*catalog.NodeWanted, *catalog.NodeObserved) {}, func(p *picture) {
			p.put(catalog.NodeKey(catalog.Observed, "n0"), catalog.NodeObserved{Name: "n0"})
		}, "-node/observed/n0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPicture(t).node("n1", c.change).node("n2")
			c.build(p)
			var got []string
			for _, k := range strings.Fields(keys(p.apply())) {
				if strings.Contains(k, "node/") {
					got = append(got, k)
				}
			}
			if s := strings.Join(got, " "); s != c.want && (c.want != "node/observed/n1" || strings.Contains(s, "-node/")) {
				t.Errorf("writes %q, want %q", s, c.want)
			}
		})
	}
	p := newPicture(t).node("n1", given)
	if got := keys(p.apply()); strings.Contains(got, "-node") {
		t.Errorf("the last node is forgotten: %s", got)
	}
}

// TestGivenUp: a volume whose only copy was on a node that was given up is faulted, with the reason, and stays; one that somebody can still say something about is left to it.
func TestGivenUp(t *testing.T) {
	for _, c := range []struct {
		name   string
		change []func(*catalog.VolumeWanted)
		see    func(*catalog.VolumeObserved)
		want   string
	}{
		{"at rest", nil, func(*catalog.VolumeObserved) {}, catalog.RobustnessFaulted},
		{"attached there", []func(*catalog.VolumeWanted){ticket}, func(o *catalog.VolumeObserved) { o.State, o.Node = catalog.VolumeAttached, "n1" }, catalog.RobustnessFaulted},
		{"attached elsewhere", []func(*catalog.VolumeWanted){ticket, elsewhere}, func(o *catalog.VolumeObserved) { o.State, o.Node = catalog.VolumeAttached, "n2" }, ""},
		{"wanted elsewhere", []func(*catalog.VolumeWanted){ticket, elsewhere}, func(*catalog.VolumeObserved) {}, ""},
		{"on its way elsewhere", []func(*catalog.VolumeWanted){moving}, func(*catalog.VolumeObserved) {}, ""},
	} {
		p := newPicture(t).node("n1", given).node("n2")
		resting(p, c.change...).see(c.see)
		events := 0
		for _, w := range p.apply() {
			for _, ev := range w.Notes {
				if ev.Reason == "Faulted" {
					events++
				}
			}
		}
		v := p.v.Volumes["v"]
		o := v.Observed.Value
		if o.Robustness != c.want || c.want != "" && (events != 1 || o.State != catalog.VolumeDetached || !strings.Contains(o.Error, "its only copy was on node n1, which was given up")) {
			t.Errorf("%s: %s %s %q, %d events", c.name, o.State, o.Robustness, o.Error, events)
		}
		if !v.Wanted.Is() || !p.v.Memberships["id-v"].Is() {
			t.Errorf("%s: its records are gone", c.name)
		}
	}
}

// TestLiveness: that a node is silent, and heard again, is said once each, and counted; of nodes in no cluster, or removed, nothing is said; that one is down is not forgotten after a day.
func TestLiveness(t *testing.T) {
	p := newPicture(t).node("n1").node("n2", silent)
	says := func(n int) string {
		var out []string
		for _, w := range p.apply() {
			if ev, ok := w.Value.(catalog.EventRecord); ok {
				out = append(out, fmt.Sprint(ev.Name, ev.Reason, ev.Count))
			} else if w.Key.Kind == catalog.KindEvent {
				out = append(out, "-")
			}
		}
		if len(p.v.Events) != n {
			t.Errorf("%d events, want %d", len(p.v.Events), n)
		}
		return strings.Join(out, " ")
	}
	alive := func(is bool) {
		p.rev++
		e := catalog.Event{Entry: catalog.Entry{Key: catalog.AliveKey("n2"), Rev: p.rev}}
		if is {
			e.Value = []byte(`{"node":"n2"}`)
		}
		if err := p.v.Apply(e); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range []struct {
		alive bool
		want  string
	}{{false, "n2NodeDown1"}, {false, ""}, {true, "n2NodeUp1"}, {true, ""}, {false, "n2NodeDown2"}, {true, "n2NodeUp2"}} {
		alive(c.alive)
		if got := says(min(1+i/2, 2)); got != c.want {
			t.Errorf("%d: says %q, want %q", i, got, c.want)
		}
	}
	alive(false)
	says(2)
	for id, ev := range p.v.Events { // a day later
		ev.Value.Time = now.Add(-25 * time.Hour)
		p.v.Events[id] = ev
	}
	if got := says(1); got != "-" {
		t.Errorf("a day later: %q", got)
	}
	alive(true)
	if got := says(1); got != "n2NodeUp1 -" {
		t.Errorf("heard again: %q", got)
	}
	p.node("n2", silent, removed)
	alive(false)
	if got := says(1); strings.Contains(got, "Down") {
		t.Errorf("removed: %q", got)
	}
}

// TestOrphanedMembership: a first record of a volume that is not there goes, one that was used stays.
func TestOrphanedMembership(t *testing.T) {
	p := newPicture(t).node("n1").put(catalog.MembershipKey("late"), plan.OneMember("late", "r", "n1", 0)).put(catalog.MembershipKey("used"), plan.OneMember("used", "r", "n1", 1))
	p.volume(placed("v")).put(catalog.MembershipKey("id-v"), plan.OneMember("id-v", "rep-v", "n1", 0))
	if got := keys(p.apply()); got != "-membership/wanted/late" {
		t.Errorf("writes %q", got)
	}
}
