package plan_test

import (
	"strings"
	"testing"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// again is a disk that was given up, added again under another name, because it was only away; n is the same directory with a new disk in it.
func again(w *catalog.NodeWanted, o *catalog.NodeObserved) {
	w.Disks["e"] = catalog.DiskWanted{Path: "/" + w.Name, AllowScheduling: true}
	d := o.Disks["d"]
	d.Conditions = map[string]catalog.Condition{catalog.ConditionReady: {Status: catalog.ConditionTrue}}
	o.Disks["e"] = d
}

func replaced(w *catalog.NodeWanted, o *catalog.NodeObserved) {
	again(w, o)
	d := o.Disks["e"]
	d.DiskID = w.Name + "-e"
	o.Disks["e"] = d
}

// TestLostDiskEnds: what the leader makes of what lay on a disk that was given up, and when the disk itself is forgotten.
func TestLostDiskEnds(t *testing.T) {
	gone := func(o *catalog.VolumeObserved) { o.State, o.Node = catalog.VolumeDeleting, "" }
	for _, c := range []struct {
		name   string
		node   []func(*catalog.NodeWanted, *catalog.NodeObserved)
		change []func(*catalog.VolumeWanted)
		see    func(*catalog.VolumeObserved)
		want   string
	}{
		{"a volume's only copy: its home says so", nil, nil, nil, ""},
		{"deleted, not said yet", nil, []func(*catalog.VolumeWanted){tombstone}, nil, ""},
		{"deleted, still open", nil, []func(*catalog.VolumeWanted){tombstone}, func(o *catalog.VolumeObserved) { o.State, o.Node = catalog.VolumeDeleting, "n1" }, ""},
		{"deleted, closed", nil, []func(*catalog.VolumeWanted){tombstone}, gone, "-membership/wanted/id-v -volume/wanted/v -volume/observed/v"},
		{"deleted, closed, another disk in its place", []func(*catalog.NodeWanted, *catalog.NodeObserved){replaced}, []func(*catalog.VolumeWanted){tombstone}, gone,
			"-membership/wanted/id-v -volume/wanted/v -volume/observed/v"},
		{"deleted, closed, but the disk is back", []func(*catalog.NodeWanted, *catalog.NodeObserved){again}, []func(*catalog.VolumeWanted){tombstone}, gone, ""},
		{"dropped there", nil, []func(*catalog.VolumeWanted){func(w *catalog.VolumeWanted) {
			w.Dropped, w.Replicas = w.Replicas, []catalog.Placement{{ReplicaID: "new", Node: "n2", DiskID: "n2-d"}}
		}}, nil, "volume/wanted/v"},
		{"on its way there", nil, []func(*catalog.VolumeWanted){func(w *catalog.VolumeWanted) {
			w.Replicas = []catalog.Placement{{ReplicaID: "rep-v", Node: "n2", DiskID: "n2-d"}, {ReplicaID: "new", Node: "n1", DiskID: "n1-d", CopyOf: "rep-v"}}
		}}, nil, "volume/wanted/v"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPicture(t).node("n1", append([]func(*catalog.NodeWanted, *catalog.NodeObserved){lostDisk}, c.node...)...).node("n2")
			resting(p, c.change...)
			if p.put(catalog.MembershipKey("id-v"), plan.OneMember("id-v", p.v.Volumes["v"].Wanted.Value.Replicas[0].ReplicaID, "n1", 1)); c.see != nil {
				p.see(c.see)
			}
			ws := p.cluster()
			if got := keys(ws); got != c.want {
				t.Errorf("writes %q, want %q", got, c.want)
			}
			if _, is := find[catalog.NodeWanted](ws); is {
				t.Error("the disk is forgotten while a record names it")
			}
			if w := p.v.Nodes["n1"].Wanted.Value; !strings.HasPrefix(c.want, "-") || !w.Disks["d"].Lost {
				return
			}
			p.apply()
			if w := p.v.Nodes["n1"].Wanted.Value; w.Disks["d"].Lost || len(w.Disks) != len(c.node) {
				t.Errorf("the disk is still there: %+v", w.Disks)
			}
		})
	}
}

// TestLostDiskHomeGone: with the home of a volume gone too, control says that it is faulted.
func TestLostDiskHomeGone(t *testing.T) {
	p := newPicture(t).node("n1", lostDisk).node("n2", given).node("n3")
	resting(p, ticket, elsewhere).apply()
	if o := p.v.Volumes["v"].Observed.Value; o.Robustness != catalog.RobustnessFaulted || !strings.Contains(o.Error, "disk d of node n1, which was given up") {
		t.Errorf("%+v", o)
	}
}

// TestLostDiskImages: copies of images on a disk that was given up are forgotten, and others are made.
func TestLostDiskImages(t *testing.T) {
	p := imageAt(newPicture(t).node("n1", lostDisk).node("n2").node("n3"), "n1-d:ready n2-d:ready", least(2))
	p.apply()
	i := p.v.Images["i"]
	if got := sortedKeys(i.Observed.Value.Disks); got != "n2-d" {
		t.Errorf("observed on %s", got)
	}
	if got := strings.Join(i.Wanted.Value.Disks, " "); got != "n2-d n3-d" {
		t.Errorf("wanted on %s", got)
	}
	if w := p.v.Nodes["n1"].Wanted.Value; len(w.Disks) != 0 {
		t.Errorf("the disk is still there: %+v", w.Disks)
	}
	p = imageAt(newPicture(t).node("n1", lostDisk).node("n2"), "n1-d:ready n2-d:gone", func(w *catalog.ImageWanted) { w.Deleted = &now })
	if got := keys(p.apply()); got != "-image/wanted/i -image/observed/i node/wanted/n1" {
		t.Errorf("writes %q", got)
	}
}

// TestLostDiskOnNode: its node uses a disk no more that was given up, says so, and takes what is in its directory for another.
func TestLostDiskOnNode(t *testing.T) {
	s := newScene(t).replica().file("sum")
	s.put(catalog.ClusterKey(), catalog.Cluster{ID: "c"}).node("n1", lostDisk)
	s.want().epoch(1).put(catalog.VolumeKey(catalog.Observed, "v"), observed("v", catalog.VolumeDetached, true))
	for _, there := range []bool{true, false} { // whatever the data process still says of it
		if !there {
			s.in.Found.Disks = nil
		}
		p := plan.OnNode(s.in)
		if got := verbs(p.Actions); got != "" {
			t.Errorf("does %q", got)
		}
		o := volumeOf(p)
		if o.Robustness != catalog.RobustnessFaulted || o.State != catalog.VolumeDetached || !strings.Contains(o.Error, "disk d of node n1, which was given up") || o.Replicas[0].Created {
			t.Errorf("%+v", o)
		}
		n, _ := find[catalog.NodeObserved](p.Writes)
		if c := n.Disks["d"].Conditions[catalog.ConditionReady]; c.Status != catalog.ConditionFalse || !strings.Contains(c.Message, "given up") || n.Disks["d"].DiskID != "n1-d" {
			t.Errorf("disk %+v", n.Disks["d"])
		}
	}
}
