package plan_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// The states of nodes and disks, for pictures.
func evicted(w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.EvictionRequested = true }
func cordoned(w *catalog.NodeWanted, _ *catalog.NodeObserved) {
	w.AllowScheduling = false
}
func removed(w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.Deleted = &now }
func given(w *catalog.NodeWanted, _ *catalog.NodeObserved)   { w.Deleted, w.Lost = &now, true }
func silent(_ *catalog.NodeWanted, o *catalog.NodeObserved)  { o.Port = 9510 }
func notReady(_ *catalog.NodeWanted, o *catalog.NodeObserved) {
	o.Ready = false
}

func evictedDisk(w *catalog.NodeWanted, o *catalog.NodeObserved) {
	onDisk(func(w *catalog.DiskWanted, _ *catalog.DiskObserved) { w.EvictionRequested = true })(w, o)
}

func lostDisk(w *catalog.NodeWanted, o *catalog.NodeObserved) {
	brokenDisk(w, o)
	onDisk(func(w *catalog.DiskWanted, _ *catalog.DiskObserved) { w.Lost, w.AllowScheduling = true, false })(w, o)
}

func brokenDisk(w *catalog.NodeWanted, o *catalog.NodeObserved) {
	onDisk(func(_ *catalog.DiskWanted, o *catalog.DiskObserved) {
		o.Conditions = map[string]catalog.Condition{catalog.ConditionReady: {Status: catalog.ConditionFalse, Message: "rot", LastTransitionTime: now.Add(-time.Hour)}}
	})(w, o)
}

// silentFor says that it was noticed so long ago that nothing is heard of a node.
func silentFor(node string, d time.Duration) func(*picture) {
	return func(p *picture) {
		p.put(catalog.EventKey(plan.DeriveID("event", catalog.ReasonNodeDown, node)), catalog.EventRecord{Name: node, Reason: catalog.ReasonNodeDown, Time: now.Add(-d)})
	}
}

// secondDisk gives a node a disk named e, with less room.
func secondDisk(w *catalog.NodeWanted, o *catalog.NodeObserved) {
	w.Disks["e"] = catalog.DiskWanted{Path: "/e", AllowScheduling: true}
	d := o.Disks["d"]
	d.DiskID, d.FreeBytes = w.Name+"-e", 20*gib
	o.Disks["e"] = d
}

// moving is volume v with its copy on n1 and another that is to take its place on n2.
func moving(w *catalog.VolumeWanted) {
	w.Replicas = append(w.Replicas, catalog.Placement{ReplicaID: "new", Node: "n2", DiskID: "n2-d", CopyOf: "rep-v"})
}

// resting puts volume v as it is when nobody uses it, its copy on n1.
func resting(p *picture, change ...func(*catalog.VolumeWanted)) *picture {
	w := placed("v")
	for _, c := range change {
		c(&w)
	}
	return p.volume(w).put(catalog.MembershipKey("id-v"), plan.OneMember("id-v", "rep-v", "n1", 1)).
		put(catalog.VolumeKey(catalog.Observed, "v"), observed("v", catalog.VolumeDetached, true))
}

// places is what is placed: NODE, +NODE for one that is to take another's place, -NODE for one that was dropped.
func places(w catalog.VolumeWanted) string {
	var out []string
	for _, r := range w.Replicas {
		s := strings.TrimSuffix(r.DiskID, "-d")
		if r.CopyOf != "" {
			s = "+" + s
		}
		out = append(out, s)
	}
	for _, r := range w.Dropped {
		out = append(out, "-"+strings.TrimSuffix(r.DiskID, "-d"))
	}
	return strings.Join(out, " ")
}

// apply takes what is written into the picture, until nothing is written any more.
func (p *picture) apply() []plan.Write {
	p.t.Helper()
	var all []plan.Write
	for range 20 {
		ws := p.cluster()
		if len(ws) == 0 {
			return all
		}
		for _, w := range ws {
			if w.Value != nil {
				p.put(w.Key, w.Value)
				continue
			}
			p.rev++
			if err := p.v.Apply(catalog.Event{Entry: catalog.Entry{Key: w.Key, Rev: p.rev}}); err != nil {
				p.t.Fatal(err)
			}
		}
		all = append(all, ws...)
	}
	p.t.Fatalf("no end of writes: %s", keys(p.cluster()))
	return nil
}

// see changes what is observed of volume v.
func (p *picture) see(f func(*catalog.VolumeObserved)) *picture {
	o := p.v.Volumes["v"].Observed.Value
	o.Replicas = slices.Clone(o.Replicas)
	f(&o)
	return p.put(catalog.VolumeKey(catalog.Observed, "v"), o)
}

// TestMove: when a copy moves, when it does not, and what is said.
func TestMove(t *testing.T) {
	type mk = func(*picture)
	node := func(name string, change ...func(*catalog.NodeWanted, *catalog.NodeObserved)) mk {
		return func(p *picture) { p.node(name, change...) }
	}
	volume := func(change ...func(*catalog.VolumeWanted)) mk { return func(p *picture) { resting(p, change...) } }
	see := func(f func(*catalog.VolumeObserved)) mk { return func(p *picture) { p.see(f) } }
	op := func(state string) mk {
		return func(p *picture) {
			p.put(catalog.OperationKey("v", "o"), catalog.Operation{ID: "o", Volume: "v", VolumeID: "id-v", Verb: catalog.VerbExpand, State: state})
		}
	}
	set := func(name, value string) mk {
		return func(p *picture) { p.put(catalog.SettingKey(name), catalog.Setting{Name: name, Value: value}) }
	}
	follows := func(last string) func(*catalog.VolumeWanted) {
		return func(w *catalog.VolumeWanted) { w.DataLocality, w.LastNode = "best-effort", last }
	}
	out, n2 := node("n1", evicted), node("n2")
	for _, c := range []struct {
		name  string
		build []mk
		want  string
		says  string // status and part of the message of condition Evicting
	}{
		{"nobody wants it away", []mk{node("n1"), n2, volume()}, "n1", ""},
		{"its node is to be emptied", []mk{out, n2, volume()}, "n1 +n2", "True its copy moves to node n2, disk d"},
		{"its node is to be removed", []mk{node("n1", removed), n2, volume()}, "n1 +n2", "True node n1 is being removed"},
		{"its disk is to be emptied", []mk{node("n1", evictedDisk), n2, volume()}, "n1 +n2", "True disk d of node n1 is being emptied"},
		{"its disk is to be emptied, another on that node", []mk{node("n1", secondDisk, evictedDisk), volume()}, "n1 +n1-e", "True node n1, disk e"},
		{"its node is cordoned only", []mk{node("n1", cordoned), n2, volume()}, "n1", ""},
		{"a cordoned node to be emptied", []mk{node("n1", cordoned, evicted), n2, volume()}, "n1 +n2", "True "},
		{"attached", []mk{out, n2, volume(ticket)}, "n1", "False its copy is moved when it is at rest: it is attached to node n1; detach it"},
		{"attached elsewhere", []mk{out, n2, volume(ticket, elsewhere)}, "n1", "False it is attached to node n2"},
		{"detaching", []mk{out, n2, volume(), see(func(o *catalog.VolumeObserved) { o.State = catalog.VolumeDetaching })}, "n1", "False it is detaching"},
		{"attached still", []mk{out, n2, volume(), see(func(o *catalog.VolumeObserved) { o.State = catalog.VolumeAttached })}, "n1", "False it is attached"},
		{"still made", []mk{out, n2, volume(), see(func(o *catalog.VolumeObserved) { o.State = catalog.VolumeCreating })}, "n1", "False it is still being made"},
		{"seen of an earlier one", []mk{out, n2, volume(), see(func(o *catalog.VolumeObserved) { o.ID = "earlier" })}, "n1", "False it is still being made"},
		{"an operation waits", []mk{out, n2, volume(), op(catalog.OperationPending)}, "n1", "False its operation expand is not over"},
		{"an operation runs", []mk{out, n2, volume(), op(catalog.OperationRunning)}, "n1", "False its operation expand is not over"},
		{"an operation is done", []mk{out, n2, volume(), op(catalog.OperationDone)}, "n1 +n2", "True "},
		{"it is read", []mk{out, n2, volume(), see(func(o *catalog.VolumeObserved) {
			o.Snapshots = []catalog.SnapshotObserved{{Labels: map[string]string{catalog.LabelReading: "x"}}}
		})}, "n1", "False it is being read"},
		{"a person's snapshot", []mk{out, n2, volume(), see(func(o *catalog.VolumeObserved) { o.Snapshots = []catalog.SnapshotObserved{{Name: "mine"}} })}, "n1 +n2", "True "},
		{"it is open", []mk{out, n2, volume(), see(func(o *catalog.VolumeObserved) { o.Replicas[0].Running = true })}, "n1", "False it is being read"},
		{"an image is made from it", []mk{out, n2, volume(), func(p *picture) {
			p.put(catalog.ImageKey(catalog.Wanted, "i"), catalog.ImageWanted{Name: "i", ID: "i", SourceType: catalog.SourceVolume, Parameters: map[string]string{"volume-name": "v"}, Disks: []string{"n2-d"}})
		}}, "n1", "False image i is being made from it"},
		{"faulted", []mk{out, n2, volume(), see(func(o *catalog.VolumeObserved) { o.Robustness, o.Error = catalog.RobustnessFaulted, "rot" })}, "n1", "False its copy cannot be moved: it is faulted: rot"},
		{"its node is silent", []mk{node("n1", evicted, silent), n2, volume()}, "n1", "False node n1, which has it, is not up"},
		{"its node is not ready", []mk{node("n1", evicted, notReady), n2, volume()}, "n1", "False node n1, which has it, is not up"},
		{"its disk is broken", []mk{node("n1", evicted, brokenDisk), n2, volume()}, "n1", "False disk d of node n1 is not ready: rot"},
		{"no membership record", []mk{out, n2, func(p *picture) {
			o := observed("v", catalog.VolumeDetached, true)
			o.Epoch = 3
			p.volume(placed("v")).put(catalog.VolumeKey(catalog.Observed, "v"), o)
		}}, "n1", "False its membership record does not name it alone"},
		{"nowhere to go", []mk{out, volume()}, "n1", "False there is no other place: node n1: is being emptied"},
		{"no room", []mk{out, node("n2", setFree(0)), volume()}, "n1", "False there is no other place: node n1: is being emptied; node n2, disk d: only 0 B free"},
		{"no room for its bytes", []mk{out, n2, volume(), see(func(o *catalog.VolumeObserved) { o.Replicas[0].AllocatedBytes = 46 * gib })}, "n1", "False 46 GiB are to be copied there, of 50 GiB free"},
		{"selectors", []mk{out, n2, volume(func(w *catalog.VolumeWanted) { w.NodeSelector = []string{"fast"} })}, "n1", `False node n2: the node has no tag "fast"`},
		{"under way", []mk{out, n2, node("n3"), volume(moving)}, "n1 +n2", "True its copy moves to node n2"},
		{"under way, attached", []mk{out, n2, volume(moving, ticket)}, "n1 +n2", "False when it is at rest: it is attached to node n1"},
		{"under way, no longer to be emptied", []mk{node("n1"), n2, volume(moving)}, "n1 +n2", ""},
		{"under way, the target not ready", []mk{out, node("n2", notReady), volume(moving)}, "n1 +n2", "True "},
		{"under way, the target cordoned", []mk{out, node("n2", cordoned), volume(moving)}, "n1 +n2", "True "},
		{"the target silent for a moment", []mk{out, node("n2", silent), volume(moving)}, "n1 +n2", "True "},
		{"the target silent for less than five minutes", []mk{out, node("n2", silent), silentFor("n2", 299*time.Second), volume(moving)}, "n1 +n2", "True "},
		{"the target silent", []mk{out, node("n2", silent), silentFor("n2", 5*time.Minute), volume(moving)}, "n1 -n2", "False there is no other place"},
		{"the target was silent", []mk{out, n2, silentFor("n2", time.Hour), volume(moving)}, "n1 +n2", "True "},
		{"the target broken for a moment", []mk{out, node("n2", brokenDisk, func(_ *catalog.NodeWanted, o *catalog.NodeObserved) {
			o.Disks["d"].Conditions[catalog.ConditionReady] = catalog.Condition{Status: catalog.ConditionFalse, LastTransitionTime: now.Add(-time.Second)}
		}), volume(moving)}, "n1 +n2", "True "},
		{"the target broken", []mk{out, node("n2", brokenDisk), node("n3"), volume(moving)}, "n1 -n2", "False an earlier copy on node n2 is still being removed"},
		{"the target to be emptied", []mk{out, node("n2", evicted), volume(moving)}, "n1 -n2", "False an earlier copy on node n2"},
		{"the target gone", []mk{out, volume(moving)}, "n1", "False there is no other place"},
		{"the target silent, another", []mk{out, node("n2", silent), silentFor("n2", time.Hour), node("n3"), volume(moving)}, "n1 +n3 -n2", "True its copy moves to node n3"},
		{"a dropped one, on a node that is up", []mk{out, n2, node("n3"), volume(func(w *catalog.VolumeWanted) {
			w.Dropped = []catalog.Placement{{ReplicaID: "old", Node: "n3", DiskID: "n3-d"}}
		})}, "n1 -n3", "False an earlier copy on node n3 is still being removed"},
		{"a dropped one, on a node that is silent", []mk{out, n2, node("n3", silent), volume(func(w *catalog.VolumeWanted) {
			w.Dropped = []catalog.Placement{{ReplicaID: "old", Node: "n3", DiskID: "n3-d"}}
		})}, "n1 +n2 -n3", "True "},

		{"locality", []mk{node("n1"), n2, node("n3"), volume(follows("n3"))}, "n1 +n3", ""},
		{"locality: it is there", []mk{node("n1"), n2, volume(follows("n1"))}, "n1", ""},
		{"locality: never used", []mk{node("n1"), n2, volume(follows(""))}, "n1", ""},
		{"locality: attached", []mk{node("n1"), n2, volume(follows("n2"), ticket, elsewhere)}, "n1", ""},
		{"locality: no room", []mk{node("n1"), node("n2", setFree(0)), node("n3"), volume(follows("n2"))}, "n1", ""},
		{"locality: that node is silent", []mk{node("n1"), node("n2", silent), volume(follows("n2"))}, "n1", ""},
		{"locality, but eviction comes first", []mk{out, node("n2", setFree(0)), node("n3"), volume(follows("n2"))}, "n1 +n3", "True "},
		{"locality to a node to be emptied", []mk{node("n1"), node("n2", evicted), volume(follows("n2"))}, "n1", ""},

		{"balance is off", []mk{node("n1", setFree(10*gib)), node("n2", setFree(90*gib)), volume()}, "n1", ""},
		{"balance", []mk{set(catalog.SettingAutoBalance, "best-effort"), node("n1", setFree(10*gib)), node("n2", setFree(90*gib)), volume()}, "n1 +n2", ""},
		{"balance: not worth it", []mk{set(catalog.SettingAutoBalance, "best-effort"), node("n1", setFree(40*gib)), node("n2", setFree(54*gib)), volume()}, "n1", ""},
		{"balance: just worth it", []mk{set(catalog.SettingAutoBalance, "best-effort"), node("n1", setFree(40*gib)), node("n2", setFree(55*gib)), volume()}, "n1 +n2", ""},
		{"balance: attached", []mk{set(catalog.SettingAutoBalance, "best-effort"), node("n1", setFree(10*gib)), node("n2", setFree(90*gib)), volume(ticket)}, "n1", ""},
		{"balance: it follows its user", []mk{set(catalog.SettingAutoBalance, "best-effort"), node("n1", setFree(10*gib)), node("n2", setFree(90*gib)), volume(follows("n1"))}, "n1", ""},
		{"balance: another is on its way there", []mk{set(catalog.SettingAutoBalance, "best-effort"), node("n1", setFree(10*gib)), node("n2", setFree(90*gib)), volume(), func(p *picture) {
			p.volume(catalog.VolumeWanted{Name: "w", Replicas: []catalog.Placement{{ReplicaID: "rep-w", Node: "n1", DiskID: "n1-d"}}, Dropped: []catalog.Placement{{ReplicaID: "x", Node: "n1", DiskID: "n1-d"}}})
		}}, "n1", ""},
		{"balance: promised", []mk{set(catalog.SettingAutoBalance, "best-effort"), node("n1"), n2, volume(func(w *catalog.VolumeWanted) { w.SizeBytes = 40 * gib }), func(p *picture) {
			p.volume(catalog.VolumeWanted{Name: "w", SizeBytes: 60 * gib, Replicas: []catalog.Placement{{ReplicaID: "rep-w", Node: "n1", DiskID: "n1-d"}}})
		}}, "n1 +n2", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPicture(t)
			for _, f := range c.build {
				f(p)
			}
			ws := p.apply()
			if got := places(p.v.Volumes["v"].Wanted.Value); got != c.want {
				t.Errorf("placed %q, want %q", got, c.want)
			}
			e, ok := p.v.Volumes["v"].Observed.Value.Conditions[catalog.ConditionEvicting]
			status, text, _ := strings.Cut(c.says, " ")
			if ok != (c.says != "") || e.Status != status || !strings.Contains(e.Message, text) {
				t.Errorf("says %q %q, want %q", e.Status, e.Message, c.says)
			}
			seen := map[catalog.Key]bool{}
			for _, w := range ws {
				if w.Key.Kind == catalog.KindMembership && p.v.Memberships["id-v"].Value.Epoch > 0 && seen[w.Key] {
					t.Errorf("writes a membership record")
				}
				seen[w.Key] = true
			}
			if ws := p.cluster(); len(ws) > 0 {
				t.Errorf("not at rest: %s", keys(ws))
			}
		})
	}
}

// TestMoveEnds: what follows from the membership record, and when a replica is forgotten.
func TestMoveEnds(t *testing.T) {
	drop := func(id, node, of string) func(*catalog.VolumeWanted) {
		return func(w *catalog.VolumeWanted) {
			w.Dropped = append(w.Dropped, catalog.Placement{ReplicaID: id, Node: node, DiskID: node + "-d", CopyOf: of})
		}
	}
	onN2 := func(w *catalog.VolumeWanted) {
		w.Replicas = []catalog.Placement{{ReplicaID: "new", Node: "n2", DiskID: "n2-d"}}
	}
	member := func(ids ...string) catalog.Membership {
		m := catalog.Membership{VolumeID: "id-v", Epoch: 2}
		for _, id := range ids {
			m.Members = append(m.Members, catalog.MembershipMember{ReplicaID: id, InSync: true})
		}
		return m
	}
	says := func(id string, created bool) catalog.ReplicaObserved {
		return catalog.ReplicaObserved{ReplicaID: id, Created: created}
	}
	for _, c := range []struct {
		name   string
		change []func(*catalog.VolumeWanted)
		member catalog.Membership
		seen   []catalog.ReplicaObserved
		nodes  map[string]func(*catalog.NodeWanted, *catalog.NodeObserved) // besides n1 and n2 as they are
		want   string
	}{
		{"not yet", []func(*catalog.VolumeWanted){moving}, member("rep-v"), nil, nil, "n1 +n2"},
		{"both are members", []func(*catalog.VolumeWanted){moving}, member("rep-v", "new"), nil, nil, "n1 +n2"},
		{"the new one is", []func(*catalog.VolumeWanted){moving}, member("new"), nil, nil, "n2 -n1"},
		{"the new one is, attached", []func(*catalog.VolumeWanted){moving, ticket}, member("new"), nil, nil, "n2 -n1"},
		{"neither is", []func(*catalog.VolumeWanted){moving}, member("other"), nil, nil, "n1 +n2"},
		{"taken back, but it was put in place", []func(*catalog.VolumeWanted){drop("new", "n2", "rep-v")}, member("new"), nil, nil, "n2 -n1"},
		{"dropped, nothing seen", []func(*catalog.VolumeWanted){onN2, drop("rep-v", "n1", "")}, member("new"), nil, nil, "n2 -n1"},
		{"dropped, there", []func(*catalog.VolumeWanted){onN2, drop("rep-v", "n1", "")}, member("new"), []catalog.ReplicaObserved{says("rep-v", true)}, nil, "n2 -n1"},
		{"dropped, gone", []func(*catalog.VolumeWanted){onN2, drop("rep-v", "n1", "")}, member("new"), []catalog.ReplicaObserved{says("rep-v", false)}, nil, "n2"},
		{"dropped, another gone", []func(*catalog.VolumeWanted){onN2, drop("rep-v", "n1", "")}, member("new"), []catalog.ReplicaObserved{says("x", false)}, nil, "n2 -n1"},
		{"dropped, a member still, gone", []func(*catalog.VolumeWanted){drop("new", "n2", "rep-v")}, member("new"), []catalog.ReplicaObserved{says("new", false)}, nil, "n2 -n1"},
		{"dropped, its node silent", []func(*catalog.VolumeWanted){onN2, drop("rep-v", "n1", "")}, member("new"), nil, map[string]func(*catalog.NodeWanted, *catalog.NodeObserved){"n1": silent}, "n2 -n1"},
		{"dropped, its node given up", []func(*catalog.VolumeWanted){onN2, drop("rep-v", "n1", "")}, member("new"), nil, map[string]func(*catalog.NodeWanted, *catalog.NodeObserved){"n1": given}, "n2"},
		{"dropped, no such node", []func(*catalog.VolumeWanted){onN2, drop("rep-v", "n0", "")}, member("new"), nil, nil, "n2"},
		{"dropped, its disk removed", []func(*catalog.VolumeWanted){onN2, drop("rep-v", "n1", "")}, member("new"), nil, map[string]func(*catalog.NodeWanted, *catalog.NodeObserved){
			"n1": func(w *catalog.NodeWanted, o *catalog.NodeObserved) { w.Disks, o.Disks = nil, nil }}, "n2"},
		{"dropped, its disk not seen yet", []func(*catalog.VolumeWanted){onN2, drop("rep-v", "n1", "")}, member("new"), nil, map[string]func(*catalog.NodeWanted, *catalog.NodeObserved){
			"n1": func(_ *catalog.NodeWanted, o *catalog.NodeObserved) { o.Disks = nil }}, "n2 -n1"},
		{"dropped, two", []func(*catalog.VolumeWanted){onN2, drop("a", "n1", ""), drop("b", "n1", "")}, member("new"), []catalog.ReplicaObserved{says("b", false)}, nil, "n2 -n1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPicture(t)
			for _, n := range []string{"n1", "n2"} {
				if f := c.nodes[n]; f != nil {
					p.node(n, f)
				} else {
					p.node(n)
				}
			}
			resting(p, c.change...).put(catalog.MembershipKey("id-v"), c.member).see(func(o *catalog.VolumeObserved) { o.Replicas = c.seen })
			p.apply()
			if got := places(p.v.Volumes["v"].Wanted.Value); got != c.want {
				t.Errorf("placed %q, want %q", got, c.want)
			}
		})
	}
}

// TestDeletionWithMoves: every prefix of what must be gone: the copy, the one that was to take its place, and what was dropped.
func TestDeletionWithMoves(t *testing.T) {
	for mask := range 8 {
		p := newPicture(t).node("n1").node("n2").node("n3")
		resting(p, moving, func(w *catalog.VolumeWanted) {
			w.Dropped = []catalog.Placement{{ReplicaID: "old", Node: "n3", DiskID: "n3-d"}}
			*w = deleted(*w)
		}).see(func(o *catalog.VolumeObserved) {
			o.State, o.Replicas = catalog.VolumeDeleting, nil
			for i, id := range []string{"rep-v", "new", "old"} {
				o.Replicas = append(o.Replicas, catalog.ReplicaObserved{ReplicaID: id, Created: mask&(1<<i) == 0})
			}
		})
		if got := p.v.Volumes["v"].Wanted.Value; places(got) != "n1 +n2 -n3" {
			t.Fatal(places(got))
		}
		ws := p.cluster()
		if ended := strings.Contains(keys(ws), "-volume/wanted/v"); ended != (mask == 7) || len(ws) > 0 != ended {
			t.Errorf("gone %03b: writes %q", mask, keys(ws))
		}
	}
	p := newPicture(t).node("n1", given).node("n2") // the node of its only copy was given up
	resting(p, func(w *catalog.VolumeWanted) { *w = deleted(*w) })
	if ws := p.apply(); !strings.Contains(keys(ws), "-membership/wanted/id-v -volume/wanted/v -volume/observed/v") {
		t.Errorf("writes %q", keys(ws))
	}
}

// TestFewMovesAtATime: of many volumes on a node that is to be emptied two move; the node and the disk say what is left; when all have moved nothing is.
func TestFewMovesAtATime(t *testing.T) {
	p := newPicture(t).node("n1", evicted).node("n2").node("n3")
	const many = 9
	for i := range many {
		name := fmt.Sprint("v", i)
		p.volume(placed(name)).put(catalog.MembershipKey("id-"+name), plan.OneMember("id-"+name, "rep-"+name, "n1", 1)).
			put(catalog.VolumeKey(catalog.Observed, name), observed(name, catalog.VolumeDetached, true))
	}
	condition := func() catalog.Condition {
		return p.v.Nodes["n1"].Observed.Value.Conditions[catalog.ConditionEvicting]
	}
	for rounds := 0; ; rounds++ {
		p.apply()
		from, to := map[string]int{}, map[string]int{}
		for _, v := range p.v.Volumes {
			for _, r := range v.Wanted.Value.Replicas {
				if r.CopyOf != "" {
					from["n1"]++
					to[r.Node]++
				}
			}
		}
		if from["n1"] > 2 || to["n2"] > 2 || to["n3"] > 2 {
			t.Fatalf("too many at a time: %v", to)
		}
		if from["n1"] == 0 {
			break
		}
		if c := condition(); !strings.Contains(c.Message, "copies of volumes") || rounds < 4 && !strings.Contains(c.Message, "waits for its turn") {
			t.Fatalf("node says %+v", c)
		}
		for name, v := range p.v.Volumes { // the engine puts one in place, the agent destroys the other
			for _, r := range v.Wanted.Value.Replicas {
				if r.CopyOf != "" {
					p.put(catalog.MembershipKey("id-"+name), plan.OneMember("id-"+name, r.ReplicaID, r.Node, 2))
					o := v.Observed.Value
					o.Replicas = []catalog.ReplicaObserved{{ReplicaID: r.ReplicaID, Created: true}, {ReplicaID: r.CopyOf}}
					p.put(catalog.VolumeKey(catalog.Observed, name), o)
				}
			}
		}
	}
	for name, v := range p.v.Volumes {
		w := v.Wanted.Value
		if len(w.Replicas) != 1 || w.Replicas[0].Node == "n1" || len(w.Dropped) > 0 {
			t.Errorf("%s: %s", name, places(w))
		}
		if _, ok := v.Observed.Value.Conditions[catalog.ConditionEvicting]; ok {
			t.Errorf("%s is still to go", name)
		}
	}
	if c := condition(); c.Status != catalog.ConditionTrue || c.Message != "nothing is left" {
		t.Errorf("node says %+v", c)
	}
	p.node("n1").apply()
	if _, ok := p.v.Nodes["n1"].Observed.Value.Conditions[catalog.ConditionEvicting]; ok {
		t.Error("still says how it is emptied")
	}
}

// TestLastNode: a volume that is to follow its user remembers where it was; others do not.
func TestLastNode(t *testing.T) {
	p := newPicture(t).node("n1").node("n2")
	resting(p, ticket, elsewhere).apply()
	if got := p.v.Volumes["v"].Wanted.Value.LastNode; got != "" {
		t.Errorf("remembers %q", got)
	}
	resting(p, ticket, elsewhere, func(w *catalog.VolumeWanted) { w.DataLocality = "best-effort" }).apply()
	w := p.v.Volumes["v"].Wanted.Value
	if w.LastNode != "n2" || places(w) != "n1" {
		t.Errorf("remembers %q, %s", w.LastNode, places(w))
	}
	w.Tickets = nil
	p.volume(w).apply()
	if got := places(p.v.Volumes["v"].Wanted.Value); got != "n1 +n2" {
		t.Errorf("placed %s", got)
	}
}

// TestMovesAtRandom: volumes, tickets, nodes that come, go and are emptied, engines and agents that do their part late, twice or not at all. What must hold at every step: a volume's member is
// placed and not dropped; a replica is dropped only when the record does not name it; a move begins only from a volume at rest; records of a volume are removed only when all of it is gone; no
// plan writes a record twice; planning comes to rest.
func TestMovesAtRandom(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	steps, moved := 0, 0
	for i := range uint64(30) {
		r := &randomCluster{picture: newPicture(t), rng: rand.New(rand.NewPCG(seed, i)), exist: map[string]bool{}, over: map[string]bool{}}
		for n := range 4 {
			r.node(fmt.Sprint("n", n+1))
		}
		for range 150 {
			r.step()
			r.plan()
			steps++
		}
		moved += r.moved
	}
	t.Logf("%d steps, %d moves", steps, moved)
	if moved < 10 {
		t.Errorf("only %d moves in %d steps", moved, steps)
	}
}

type randomCluster struct {
	*picture
	rng   *rand.Rand
	ids   int
	made  int
	moved int
	exist map[string]bool // replica id: is on its disk
	over  map[string]bool // its node has said that it is gone, after it knew that it is to be destroyed: nothing makes it any more
}

// step is something that somebody else does.
func (r *randomCluster) step() {
	node := fmt.Sprint("n", 1+r.rng.IntN(4))
	switch r.rng.IntN(12) {
	case 0:
		r.made++
		r.volume(catalog.VolumeWanted{Name: fmt.Sprint("v", r.made), ID: fmt.Sprint("id-v", r.made)})
	case 1:
		r.node(node, []func(*catalog.NodeWanted, *catalog.NodeObserved){evicted, evictedDisk, silent, cordoned, brokenDisk}[r.rng.IntN(5)])
	case 2:
		r.node(node)
	case 3, 4:
		r.anyVolume(func(name string, v plan.Volume) {
			w := v.Wanted.Value
			if w.Tickets = []catalog.Ticket{{Node: node}}; r.rng.IntN(4) > 0 {
				w.Tickets = nil
			}
			if r.rng.IntN(12) == 0 {
				w.Deleted = &now
			}
			r.volume(w)
		})
	case 5, 6, 7: // an engine puts a copy in place, whatever became of it meanwhile
		r.anyVolume(func(name string, v plan.Volume) {
			m := r.v.Memberships[v.Wanted.Value.ID]
			for _, p := range slices.Concat(v.Wanted.Value.Replicas, v.Wanted.Value.Dropped) {
				if p.CopyOf != "" && !r.over[p.ReplicaID] && m.Is() && m.Value.Members[0].ReplicaID == p.CopyOf {
					r.exist[p.ReplicaID] = true
					r.put(catalog.MembershipKey(v.Wanted.Value.ID), plan.OneMember(v.Wanted.Value.ID, p.ReplicaID, p.Node, m.Value.Epoch+1))
					r.moved++
					return
				}
			}
		})
	default:
		r.anyVolume(r.agents)
	}
}

func (r *randomCluster) anyVolume(f func(string, plan.Volume)) {
	var names []string
	for name, v := range r.v.Volumes {
		if v.Wanted.Is() {
			names = append(names, name)
		}
	}
	if slices.Sort(names); len(names) > 0 {
		name := names[r.rng.IntN(len(names))]
		f(name, r.v.Volumes[name])
	}
}

// agents make what is placed, destroy what is dropped or deleted and is no member, and say what there is.
func (r *randomCluster) agents(name string, v plan.Volume) {
	w, m := v.Wanted.Value, r.v.Memberships[v.Wanted.Value.ID]
	if !m.Is() {
		return
	}
	o := catalog.VolumeObserved{Name: name, ID: w.ID, State: catalog.VolumeDetached}
	if len(w.Tickets) > 0 {
		o.State = catalog.VolumeAttached
	}
	member := m.Value.Members[0].ReplicaID
	for _, p := range w.Replicas {
		r.exist[p.ReplicaID] = w.Deleted == nil && (p.CopyOf == "" || r.exist[p.ReplicaID])
		if w.Deleted == nil && !r.exist[p.ReplicaID] {
			continue // it may be made any moment
		}
		r.over[p.ReplicaID] = w.Deleted != nil
		o.Replicas = append(o.Replicas, catalog.ReplicaObserved{ReplicaID: p.ReplicaID, Created: r.exist[p.ReplicaID]})
	}
	for _, p := range w.Dropped {
		if member != p.ReplicaID || w.Deleted != nil {
			r.exist[p.ReplicaID], r.over[p.ReplicaID] = false, true
		}
		o.Replicas = append(o.Replicas, catalog.ReplicaObserved{ReplicaID: p.ReplicaID, Created: r.exist[p.ReplicaID]})
	}
	if w.Deleted != nil {
		o.State = catalog.VolumeDeleting
	}
	r.put(catalog.VolumeKey(catalog.Observed, name), o)
}

// plan carries plans out, sometimes in part, and checks every write.
func (r *randomCluster) plan() {
	for range 30 {
		ws := plan.Cluster(plan.ClusterInput{View: r.v, Now: now.Add(time.Duration(r.rev) * time.Second), NewID: func() string { r.ids++; return fmt.Sprint("r", r.ids) }})
		if len(ws) == 0 {
			return
		}
		seen := map[catalog.Key]bool{}
		for _, w := range ws {
			if seen[w.Key] {
				r.t.Fatalf("%s is written twice in one plan", w.Key)
			}
			seen[w.Key] = true
			r.check(w)
		}
		n := len(ws)
		if r.rng.IntN(3) == 0 {
			n = r.rng.IntN(n + 1) // the leader is lost
		}
		for _, w := range ws[:n] {
			e := catalog.Entry{Key: w.Key}
			if w.Value != nil {
				r.put(w.Key, w.Value)
				continue
			}
			r.rev++
			e.Rev = r.rev
			if err := r.v.Apply(catalog.Event{Entry: e}); err != nil {
				r.t.Fatal(err)
			}
		}
		if n < len(ws) {
			return
		}
	}
	r.t.Fatalf("no rest: %s", keys(r.cluster()))
}

func (r *randomCluster) check(w plan.Write) {
	if w.Key.Kind != catalog.KindVolume || w.Key.Part != catalog.Wanted {
		return
	}
	was := r.v.Volumes[w.Key.Name]
	old := was.Wanted.Value
	member := ""
	if m := r.v.Memberships[old.ID]; m.Is() {
		member = m.Value.Members[0].ReplicaID
	}
	if w.Value == nil {
		for _, p := range slices.Concat(old.Replicas, old.Dropped) {
			if r.exist[p.ReplicaID] {
				r.t.Fatalf("%s is forgotten while %s is there", w.Key, p.ReplicaID)
			}
		}
		return
	}
	next := w.Value.(catalog.VolumeWanted)
	for _, p := range next.Dropped {
		if p.ReplicaID == member {
			r.t.Fatalf("%s drops its member", w.Key)
		}
	}
	if member != "" && !slices.ContainsFunc(next.Replicas, func(p catalog.Placement) bool { return p.ReplicaID == member }) {
		r.t.Fatalf("%s: its member %s is not placed: %s", w.Key, member, places(next))
	}
	all := slices.Concat(next.Replicas, next.Dropped)
	for _, p := range slices.Concat(old.Replicas, old.Dropped) {
		if r.exist[p.ReplicaID] && !slices.ContainsFunc(all, func(x catalog.Placement) bool { return x.ReplicaID == p.ReplicaID }) {
			r.t.Fatalf("%s: %s is there and named no more", w.Key, p.ReplicaID)
		}
	}
	begun := len(next.Replicas) > len(old.Replicas) && next.Replicas[len(next.Replicas)-1].CopyOf != ""
	if begun && (len(old.Tickets) > 0 || was.Observed.Value.State != catalog.VolumeDetached) {
		r.t.Fatalf("%s: a move begins while it is %s with %d tickets", w.Key, was.Observed.Value.State, len(old.Tickets))
	}
}
