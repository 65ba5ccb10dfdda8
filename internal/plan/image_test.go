package plan_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// imageAt puts image i with copies by disk: "n1-d:ready n2-d:failed". A state "-" is one that nobody has said anything about; one with a minus before the disk is there, but not wanted.
func imageAt(p *picture, copies string, change ...func(*catalog.ImageWanted)) *picture {
	w := catalog.ImageWanted{Name: "i", ID: "id-i", MinCopies: 1}
	o := catalog.ImageObserved{Name: "i", ID: "id-i", Disks: map[string]catalog.ImageOnDisk{}}
	for _, c := range strings.Fields(copies) {
		disk, state, _ := strings.Cut(c, ":")
		disk, unwanted := strings.CutPrefix(disk, "-")
		if !unwanted {
			w.Disks = append(w.Disks, disk)
		}
		x := catalog.ImageOnDisk{State: state, LastTransitionTime: now.Add(-time.Hour)}
		switch state {
		case "-":
			continue
		case "retry":
			x.State, x.NextTry = catalog.ImageFailed, now.Add(time.Minute)
		case "justfailed":
			x.State, x.LastTransitionTime = catalog.ImageFailed, now.Add(-4*time.Minute)
		case catalog.ImageReady:
			o.CurrentChecksum, o.SizeBytes, x.AllocatedBytes = "sum", gib, gib
		}
		o.Disks[disk] = x
	}
	for _, f := range change {
		f(&w)
	}
	p.put(catalog.ImageKey(catalog.Wanted, "i"), w)
	if len(o.Disks) > 0 {
		p.put(catalog.ImageKey(catalog.Observed, "i"), o)
	}
	return p
}

func least(n int) func(*catalog.ImageWanted) {
	return func(w *catalog.ImageWanted) { w.MinCopies = n }
}

// unused says that nobody has used these disks' copies for so many minutes.
func unused(minutes int, disks ...string) func(*catalog.ImageWanted) {
	return func(w *catalog.ImageWanted) {
		w.UnusedSince = map[string]time.Time{}
		for i, d := range disks {
			w.UnusedSince[d] = now.Add(-time.Duration(minutes+i) * time.Minute)
		}
	}
}

// standing puts volume v from image i on these nodes' disks: NODE, -NODE for one that was dropped.
func standing(nodes ...string) func(*picture) {
	return func(p *picture) {
		w := catalog.VolumeWanted{Name: "v", Image: "i", ImageID: "id-i", DataLocality: "disabled"}
		for i, n := range nodes {
			n, dropped := strings.CutPrefix(n, "-")
			r := catalog.Placement{ReplicaID: fmt.Sprint("rep", i), Node: n, DiskID: n + "-d"}
			if dropped {
				w.Dropped = append(w.Dropped, r)
			} else {
				w.Replicas = append(w.Replicas, r)
			}
		}
		p.volume(w).put(catalog.MembershipKey("id-v"), plan.OneMember("id-v", "rep0", nodes[0], 1))
	}
}

// TestImageCopies: which disks an image is wanted on next, and what is said.
func TestImageCopies(t *testing.T) {
	type mk = func(*picture)
	node := func(name string, change ...func(*catalog.NodeWanted, *catalog.NodeObserved)) mk {
		return func(p *picture) { p.node(name, change...) }
	}
	image := func(copies string, change ...func(*catalog.ImageWanted)) mk {
		return func(p *picture) { imageAt(p, copies, change...) }
	}
	set := func(name, value string) mk {
		return func(p *picture) { p.put(catalog.SettingKey(name), catalog.Setting{Name: name, Value: value}) }
	}
	zone := func(z string) func(*catalog.NodeWanted, *catalog.NodeObserved) {
		return func(w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.Zone = z }
	}
	tags := func(node, disk string) func(*catalog.NodeWanted, *catalog.NodeObserved) {
		return func(w *catalog.NodeWanted, o *catalog.NodeObserved) {
			w.Tags = strings.Fields(node)
			onDisk(func(w *catalog.DiskWanted, _ *catalog.DiskObserved) { w.Tags = strings.Fields(disk) })(w, o)
		}
	}
	n1, n2, n3 := node("n1"), node("n2"), node("n3")
	for _, c := range []struct {
		name  string
		build []mk
		want  string // disks, by node where the disk is d
		says  string // part of ImageObserved.Error
	}{
		{"new", []mk{n1, n2, image("")}, "n1", ""},
		{"new, three copies: one first", []mk{n1, n2, n3, image("", least(3))}, "n1", ""},
		{"nobody has begun", []mk{n1, n2, image("n1-d:-", least(3))}, "n1", ""},
		{"pending", []mk{n1, n2, image("n1-d:pending", least(3))}, "n1", ""},
		{"in progress", []mk{n1, n2, image("n1-d:in-progress", least(3))}, "n1", ""},
		{"the first failed", []mk{n1, n2, image("n1-d:retry", least(3))}, "n1", ""},
		{"the first is ready: the second", []mk{n1, n2, n3, image("n1-d:ready", least(3))}, "n1 n2", ""},
		{"the second is under way", []mk{n1, n2, n3, image("n1-d:ready n2-d:in-progress", least(3))}, "n1 n2", ""},
		{"two are ready: the third", []mk{n1, n2, n3, image("n1-d:ready n2-d:ready", least(3))}, "n1 n2 n3", ""},
		{"as many as wanted", []mk{n1, n2, n3, image("n1-d:ready n2-d:ready", least(2))}, "n1 n2", ""},
		{"more than there are nodes", []mk{n1, n2, image("n1-d:ready n2-d:ready", least(3))}, "n1 n2", ""},
		{"replenishing is off", []mk{n1, n2, image("n1-d:ready", least(3)), set(catalog.SettingReplenish, "0")}, "n1", ""},
		{"one failed: another beside it", []mk{n1, n2, n3, image("n1-d:ready n2-d:retry", least(2))}, "n1 n2 n3", ""},
		{"one is unknown: it counts", []mk{n1, node("n2", silent), n3, image("n1-d:ready n2-d:unknown", least(2))}, "n1 n2", ""},
		{"the ready one is on a silent node", []mk{node("n1", silent), n2, image("n1-d:ready", least(2))}, "n1", ""},
		{"another zone first", []mk{node("n1", zone("x")), node("n2", zone("x")), node("n3", zone("y"), setFree(20*gib)), image("n1-d:ready", least(2))}, "n1 n3", ""},
		{"zones are hard", []mk{node("n1", zone("x")), node("n2", zone("x")), set(catalog.SettingSoftZones, "false"), image("n1-d:ready", least(2))}, "n1", ""},
		{"another disk of that node, if nodes are soft", []mk{node("n1", secondDisk), set(catalog.SettingSoftNodes, "true"), image("n1-d:ready", least(2))}, "n1 n1-e", ""},
		{"not another disk of that node", []mk{node("n1", secondDisk), image("n1-d:ready", least(2))}, "n1", ""},
		{"selectors", []mk{n1, node("n2", tags("fast", "")), node("n3", tags("fast", "ssd"), setFree(10*gib)), image("", func(w *catalog.ImageWanted) { w.NodeSelector, w.DiskSelector = []string{"fast"}, []string{"ssd"} })}, "n3", ""},
		{"no disk has the tag", []mk{n1, image("", func(w *catalog.ImageWanted) { w.DiskSelector = []string{"ssd"} })}, "", `node n1, disk d: the disk has no tag "ssd"`},
		{"no room", []mk{node("n1", setFree(0)), image("")}, "", "node n1, disk d: only 0 B free"},
		{"no room for its size", []mk{n1, node("n2", setFree(6*gib)), image("n1-d:ready", least(2))}, "n1", ""},

		{"where a replica is", []mk{n1, n2, image("n1-d:ready"), standing("n2")}, "n1 n2", ""},
		{"where one is to be", []mk{n1, n2, n3, image("n1-d:ready"), func(p *picture) {
			resting(p, moving, fromImage)
		}}, "n1 n2", ""},
		{"where one is to be, before the image is ready anywhere", []mk{n1, n2, image("n1-d:pending"), standing("n2")}, "n1 n2", ""},
		{"where one is that is to go, it is not brought", []mk{n1, n2, image("n1-d:ready"), standing("n1", "-n2")}, "n1", ""},
		{"where one is on a node that is to be emptied", []mk{n1, node("n2", evicted), image("n1-d:ready"), standing("n2")}, "n1 n2", ""},

		{"its node is to be emptied, no other copy", []mk{node("n1", evicted), image("n1-d:ready")}, "n1", "Failed to evict backing image copy on disk n1-d for now since there is no other healthy backing image copy"},
		{"its node is to be emptied: another first", []mk{node("n1", evicted), n2, image("n1-d:ready")}, "n1 n2", "Failed to evict"},
		{"its node is to be removed: another first", []mk{node("n1", removed), n2, image("n1-d:ready")}, "n1 n2", "Failed to evict"},
		{"the other is under way", []mk{node("n1", evicted), n2, image("n1-d:ready n2-d:in-progress")}, "n1 n2", "Failed to evict"},
		{"the other failed", []mk{node("n1", evicted), n2, image("n1-d:ready n2-d:retry")}, "n1 n2", "Failed to evict"},
		{"the other is ready", []mk{node("n1", evicted), n2, image("n1-d:ready n2-d:ready")}, "n2", ""},
		{"the other is ready, on a silent node", []mk{node("n1", evicted), node("n2", silent), image("n1-d:ready n2-d:ready")}, "n1 n2", "Failed to evict"},
		{"the other is to go too", []mk{node("n1", evicted), node("n2", evicted), image("n1-d:ready n2-d:ready")}, "n1 n2", "Failed to evict"},
		{"its disk is to be emptied", []mk{node("n1", evictedDisk), n2, image("n1-d:ready n2-d:ready")}, "n2", ""},
		{"a replica stands on it", []mk{node("n1", evicted), n2, image("n1-d:ready n2-d:ready"), standing("n1")}, "n1 n2", ""},
		{"a dropped replica stands on it", []mk{node("n1", evicted), n2, image("n1-d:ready n2-d:ready"), standing("n2", "-n1")}, "n1 n2", ""},
		{"not begun, and it is to go", []mk{node("n1", evicted), n2, image("n1-d:pending")}, "n2", ""},
		{"failed, and it is to go", []mk{node("n1", evicted), n2, image("n1-d:retry")}, "n2", ""},
		{"not begun, it is to go, no other place", []mk{node("n1", evicted), image("n1-d:pending")}, "n1", "Failed to evict"},
		{"bytes are coming, and it is to go", []mk{node("n1", evicted), n2, image("n1-d:in-progress")}, "n1", "Failed to evict"},

		{"unused, beyond what is wanted", []mk{n1, n2, image("n1-d:ready n2-d:ready", unused(60, "n1-d", "n2-d"))}, "n1", ""},
		{"unused, not long enough", []mk{n1, n2, image("n1-d:ready n2-d:ready", unused(58, "n1-d", "n2-d"))}, "n1 n2", ""},
		{"unused, by setting", []mk{n1, n2, set(catalog.SettingImageCleanup, "5"), image("n1-d:ready n2-d:ready", unused(5, "n2-d"))}, "n1", ""},
		{"unused, at once", []mk{n1, n2, set(catalog.SettingImageCleanup, "0"), image("n1-d:ready n2-d:ready")}, "n2", ""},
		{"unused, but wanted", []mk{n1, n2, image("n1-d:ready n2-d:ready", least(2), unused(600, "n1-d", "n2-d"))}, "n1 n2", ""},
		{"the last one, unused", []mk{n1, image("n1-d:ready", least(0), unused(600, "n1-d"))}, "n1", ""},
		{"unused, the other is not good", []mk{n1, node("n2", silent), image("n1-d:ready n2-d:ready", unused(600, "n1-d"))}, "n1 n2", ""},
		{"unused, one failed: that goes first", []mk{n1, n2, n3, image("n1-d:ready n2-d:retry n3-d:ready", least(2), unused(600, "n1-d", "n2-d"))}, "n1 n3", ""},
		{"used", []mk{n1, n2, image("n1-d:ready n2-d:ready", unused(600, "n2-d")), standing("n2")}, "n1 n2", ""},

		{"failed for good: made again from another", []mk{n1, n2, image("n1-d:ready n2-d:failed")}, "n1", ""},
		{"failed for good, lately", []mk{n1, n2, image("n1-d:ready n2-d:justfailed")}, "n1 n2", ""},
		{"failed for good, the only one", []mk{n1, n2, image("n1-d:failed")}, "n1", ""},
		{"failed for good, a replica stands on it", []mk{n1, n2, image("n1-d:ready n2-d:failed"), standing("n2")}, "n1 n2", ""},

		{"its node was removed", []mk{n2, image("n1-d:ready n2-d:ready")}, "n2", ""},
		{"its node was given up", []mk{node("n1", given), n2, image("n1-d:ready n2-d:ready")}, "n2", ""},
		{"its node was given up, the only copy", []mk{node("n1", given), n2, image("n1-d:ready")}, "n2", ""},
		{"its disk was removed", []mk{node("n1", func(w *catalog.NodeWanted, o *catalog.NodeObserved) { w.Disks, o.Disks = nil, nil }), n2, image("n1-d:ready n2-d:ready")}, "n2", ""},
		{"a disk is not known yet", []mk{node("n1", func(_ *catalog.NodeWanted, o *catalog.NodeObserved) { o.Disks = nil }), n2, image("n1-d:ready n2-d:ready", least(2))}, "n1 n2", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPicture(t)
			for _, f := range c.build {
				f(p)
			}
			p.apply()
			var got []string
			for _, d := range p.v.Images["i"].Wanted.Value.Disks {
				got = append(got, strings.TrimSuffix(d, "-d"))
			}
			slices.Sort(got)
			if s := strings.Join(got, " "); s != c.want {
				t.Errorf("wanted on %q, want %q", s, c.want)
			}
			if e := p.v.Images["i"].Observed.Value.Error; !strings.Contains(e, c.says) || (e == "") != (c.says == "") {
				t.Errorf("says %q, want %q", e, c.says)
			}
			if ws := p.cluster(); len(ws) > 0 {
				t.Errorf("not at rest: %s", keys(ws))
			}
		})
	}
}

// TestUnusedSince: the time begins when the last replica has gone, and ends when one comes.
func TestUnusedSince(t *testing.T) {
	p := imageAt(newPicture(t).node("n1").node("n2"), "n1-d:ready n2-d:ready", least(2))
	standing("n1")(p)
	p.apply()
	if got := p.v.Images["i"].Wanted.Value.UnusedSince; len(got) != 1 || !got["n2-d"].Equal(now) {
		t.Fatalf("unused since %v", got)
	}
	standing("n2", "-n1")(p)
	p.apply()
	if got := p.v.Images["i"].Wanted.Value.UnusedSince; len(got) != 0 {
		t.Fatalf("one is used, the other was: %v", got)
	}
	standing("n2")(p)
	p.apply()
	if got := p.v.Images["i"].Wanted.Value.UnusedSince; len(got) != 1 || !got["n1-d"].Equal(now) {
		t.Fatalf("unused since %v", got)
	}
}

// TestUsedIsNotCleanedUp: not even for one plan.
func TestUsedIsNotCleanedUp(t *testing.T) {
	for _, nodes := range [][]string{{"n2"}, {"n1", "-n2"}} {
		p := imageAt(newPicture(t).node("n1").node("n2"), "n1-d:ready n2-d:ready", unused(600, "n2-d"))
		standing(nodes...)(p)
		if w, ok := find[catalog.ImageWanted](p.cluster()); !ok || len(w.Disks) != 2 || len(w.UnusedSince) > 1 || !w.UnusedSince["n2-d"].IsZero() {
			t.Errorf("volume on %v: image wanted on %v, unused since %v", nodes, w.Disks, w.UnusedSince)
		}
	}
}

// TestImageEvictionIsSaidOnce: the event of the dialect, once; and the node says what it waits for.
func TestImageEvictionIsSaidOnce(t *testing.T) {
	p := imageAt(newPicture(t).node("n1", evicted), "n1-d:ready")
	events := 0
	for _, w := range p.apply() {
		for _, ev := range w.Notes {
			if ev.Reason == catalog.ReasonFailedDeleting && ev.Type == catalog.Normal && strings.HasPrefix(ev.Message, "Failed to evict backing image copy on disk n1-d") {
				events++
			}
		}
	}
	if events != 1 {
		t.Errorf("%d events", events)
	}
	c := p.v.Nodes["n1"].Observed.Value.Conditions[catalog.ConditionEvicting]
	if c.Status != catalog.ConditionFalse || c.Message != "left: 0 copies of volumes, 1 of images; image i: there is no other good copy" {
		t.Errorf("node says %+v", c)
	}
	p = imageAt(newPicture(t).node("n1", evictedDisk).node("n2"), "n1-d:ready n2-d:ready")
	standing("n1")(p)
	p.apply()
	d := p.v.Nodes["n1"].Observed.Value.Disks["d"].Conditions[catalog.ConditionEvicting]
	if d.Status != catalog.ConditionFalse || !strings.Contains(d.Message, "image i: a volume's copy there stands on it") || !strings.Contains(d.Message, "1 copies of volumes, 1 of images") {
		t.Errorf("disk says %+v", d)
	}
	if _, ok := p.v.Nodes["n1"].Observed.Value.Conditions[catalog.ConditionEvicting]; ok {
		t.Error("the whole node is not to be emptied")
	}
}

// TestImageOnRemovedDisks: what was seen there is forgotten, and a tombstoned image ends without them.
func TestImageOnRemovedDisks(t *testing.T) {
	p := imageAt(newPicture(t).node("n2"), "-n1-d:ready n2-d:ready")
	p.apply()
	if got := sortedKeys(p.v.Images["i"].Observed.Value.Disks); got != "n2-d" {
		t.Errorf("observed on %s", got)
	}
	p = imageAt(newPicture(t).node("n2"), "n1-d:ready n2-d:gone", func(w *catalog.ImageWanted) { w.Deleted = &now })
	if got := keys(p.apply()); got != "-image/wanted/i -image/observed/i" {
		t.Errorf("writes %q", got)
	}
}

func sortedKeys[V any](m map[string]V) string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// TestImageSource: from a ready copy on a node that is up, not always the same; else from the image's own source.
func TestImageSource(t *testing.T) {
	p := newPicture(t).node("n1").node("n2", silent).node("n3", notReady).node("n4", brokenDisk).node("n5")
	imageAt(p, "n1-d:ready n2-d:ready n3-d:ready n4-d:ready n5-d:ready n6-d:in-progress")
	seen := map[string]bool{}
	for i := range 50 {
		disk := fmt.Sprint("disk", i)
		from := plan.ImageSource(p.v, "i", disk)
		if from != plan.ImageSource(p.v, "i", disk) {
			t.Fatal("not always the same for one disk")
		}
		seen[from] = true
	}
	if got := sortedKeys(seen); got != "peer://n1/n1-d peer://n5/n5-d" {
		t.Errorf("from %s", got)
	}
	if got := plan.ImageSource(p.v, "i", "n1-d"); got != "peer://n5/n5-d" {
		t.Errorf("from itself: %s", got)
	}
	imageAt(p, "n1-d:in-progress n2-d:ready")
	if got := plan.ImageSource(p.v, "i", "x"); got != "" {
		t.Errorf("from %s", got)
	}
	if got := plan.ImageSource(p.v, "none", "x"); got != "" {
		t.Errorf("of no image from %s", got)
	}
}
