package plan_test

import (
	"strings"
	"testing"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// newcomer is another machine of the name, which has been given up since; what it has are its own disks.
func newcomer(w *catalog.NodeWanted, o *catalog.NodeObserved) {
	w.ID = "newcomer"
	d := o.Disks["d"]
	d.DiskID = "n1-new"
	o.Disks["d"] = d
}

func joined(w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.ID = "id-" + w.Name }

// TestNodeReplaced: a volume whose only copy was on a node that was given up is lost also when another machine has joined under that name; but not before it is known what that has, nor when
// it has the disk.
func TestNodeReplaced(t *testing.T) {
	noID := func(w *catalog.NodeWanted, o *catalog.NodeObserved) {
		newcomer(w, o)
		o.Disks["d"] = catalog.DiskObserved{}
	}
	sameDisk := func(w *catalog.NodeWanted, o *catalog.NodeObserved) { w.ID = "newcomer" }
	for _, c := range []struct {
		name   string
		node   func(*catalog.NodeWanted, *catalog.NodeObserved)
		nodeID string // of the placement
		lost   bool
		then   string // the placement's afterwards
	}{
		{"the same node", joined, "id-n1", false, "id-n1"},
		{"another", newcomer, "id-n1", true, "id-n1"},
		{"another, whose disk is not known yet", noID, "id-n1", false, "id-n1"},
		{"another, with the old one's disk", sameDisk, "id-n1", false, "newcomer"},
		{"nobody noted which", joined, "", false, "id-n1"},
		{"in no cluster", func(*catalog.NodeWanted, *catalog.NodeObserved) {}, "", false, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			named := func(w *catalog.VolumeWanted) { w.Replicas[0].NodeID = c.nodeID }
			p := newPicture(t).node("n1", c.node).node("n2", joined)
			resting(p, named).apply()
			if got := p.v.Volumes["v"].Wanted.Value.Replicas[0].NodeID; got != c.then {
				t.Errorf("placed on %q, want %q", got, c.then)
			}
			s := newScene(t)
			s.node("n1", c.node).node("n2", joined)
			s.in.Found.Disks[0].DiskID = s.v.Nodes["n1"].Observed.Value.Disks["d"].DiskID
			s.volume(p.v.Volumes["v"].Wanted.Value).put(catalog.MembershipKey("id-v"), plan.OneMember("id-v", "rep-v", "n1", 1)).
				put(catalog.VolumeKey(catalog.Observed, "v"), observed("v", catalog.VolumeDetached, true))
			o := volumeOf(plan.OnNode(s.in))
			if says := o.Robustness == catalog.RobustnessFaulted && strings.Contains(o.Error, "an earlier node n1, which was given up"); says != c.lost {
				t.Errorf("n1 says %q: %q", o.Robustness, o.Error)
			}
			if c.lost && o.Replicas[0].Created {
				t.Error("its copy is still said to be there")
			}
		})
	}
}

// TestNodeReplacedHomeGone: with the home of such a volume gone too, control says that it is lost; deleted, it is forgotten at once.
func TestNodeReplacedHomeGone(t *testing.T) {
	on := func(w *catalog.VolumeWanted) { w.Replicas[0].NodeID = "id-n1" }
	p := newPicture(t).node("n1", newcomer).node("n2", given).node("n3")
	resting(p, on, ticket, func(w *catalog.VolumeWanted) { w.Tickets[0].Node = "n2" }).apply()
	if o := p.v.Volumes["v"].Observed.Value; o.Robustness != catalog.RobustnessFaulted || !strings.Contains(o.Error, "an earlier node n1, which was given up") {
		t.Errorf("%+v", o)
	}
	p = newPicture(t).node("n1", newcomer)
	if got := keys(resting(p, on, tombstone).cluster()); got != "-membership/wanted/id-v -volume/wanted/v -volume/observed/v" {
		t.Errorf("writes %q", got)
	}
}
