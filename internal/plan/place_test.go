package plan_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

var now = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

const gib = 1 << 30

// picture is a View under construction.
type picture struct {
	t   *testing.T
	v   *plan.View
	rev catalog.Rev
}

func newPicture(t *testing.T) *picture { return &picture{t: t, v: plan.NewView()} }

func (p *picture) put(k catalog.Key, value any) *picture {
	p.t.Helper()
	p.rev++
	b, err := json.Marshal(value)
	if err == nil {
		err = p.v.Apply(catalog.Event{Entry: catalog.Entry{Key: k, Value: b, Rev: p.rev}})
	}
	if err != nil {
		p.t.Fatal(err)
	}
	return p
}

// node puts a ready node with one disk of 100 GiB, half of it free.
func (p *picture) node(name string, change ...func(*catalog.NodeWanted, *catalog.NodeObserved)) *picture {
	w := catalog.NodeWanted{Name: name, AllowScheduling: true, Disks: map[string]catalog.DiskWanted{"d": {Path: "/" + name, AllowScheduling: true}}}
	o := catalog.NodeObserved{Name: name, Ready: true, Disks: map[string]catalog.DiskObserved{"d": {
		DiskID: name + "-d", TotalBytes: 100 * gib, FreeBytes: 50 * gib,
		Conditions: map[string]catalog.Condition{catalog.ConditionReady: {Status: catalog.ConditionTrue}},
	}}}
	for _, c := range change {
		c(&w, &o)
	}
	return p.put(catalog.NodeKey(catalog.Wanted, name), w).put(catalog.NodeKey(catalog.Observed, name), o)
}

func (p *picture) volume(w catalog.VolumeWanted) *picture {
	if w.ID == "" {
		w.ID = "id-" + w.Name
	}
	if w.Copies == 0 {
		w.Copies = 1
	}
	if w.SizeBytes == 0 {
		w.SizeBytes = gib
	}
	return p.put(catalog.VolumeKey(catalog.Wanted, w.Name), w)
}

// cluster plans, with ids r1, r2, …
func (p *picture) cluster() []plan.Write {
	n := 0
	return plan.Cluster(plan.ClusterInput{View: p.v, Now: now, NewID: func() string { n++; return fmt.Sprintf("r%d", n) }})
}

// keys is what is written, deletions with a minus.
func keys(ws []plan.Write) string {
	var out []string
	for _, w := range ws {
		k := w.Key.String()
		if w.Value == nil {
			k = "-" + k
		}
		out = append(out, k)
	}
	return strings.Join(out, " ")
}

func find[T any](ws []plan.Write) (v T, ok bool) {
	for _, w := range ws {
		if v, ok := w.Value.(T); ok {
			return v, true
		}
	}
	return v, false
}

func onDisk(f func(*catalog.DiskWanted, *catalog.DiskObserved)) func(*catalog.NodeWanted, *catalog.NodeObserved) {
	return func(w *catalog.NodeWanted, o *catalog.NodeObserved) {
		dw, do := w.Disks["d"], o.Disks["d"]
		f(&dw, &do)
		w.Disks["d"], o.Disks["d"] = dw, do
	}
}

func setFree(n int64) func(*catalog.NodeWanted, *catalog.NodeObserved) {
	return onDisk(func(_ *catalog.DiskWanted, o *catalog.DiskObserved) { o.FreeBytes = n })
}

func TestPlacement(t *testing.T) {
	off := func(w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.AllowScheduling = false }
	for _, c := range []struct {
		name   string
		build  func(*picture)
		copies int
		size   int64
		image  string
		want   string // nodes in order
		why    string // part of the message of Scheduled=False
	}{
		{name: "no node", build: func(*picture) {}, why: "there is no node yet"},
		{name: "one node", build: func(p *picture) { p.node("n1") }, want: "n1"},
		{name: "two copies, two nodes", build: func(p *picture) { p.node("n1").node("n2") }, copies: 2, want: "n1", why: "1 of 2 copies have a disk; this version keeps one copy of a volume"},
		{name: "two copies, one node", build: func(p *picture) { p.node("n1") }, copies: 2, want: "n1", why: "1 of 2 copies have a disk; this version keeps one copy of a volume"},
		{name: "the one with more room", build: func(p *picture) { p.node("n1", setFree(20*gib)).node("n2", setFree(30*gib)) }, want: "n2"},
		{name: "not a disabled node", build: func(p *picture) { p.node("n1", off).node("n2", setFree(10*gib)) }, want: "n2"},
		{name: "only a disabled node", build: func(p *picture) { p.node("n1", off) }, why: "node n1: scheduling is disabled"},
		{name: "a node being emptied", build: func(p *picture) {
			p.node("n1", func(w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.EvictionRequested = true })
		}, why: "node n1: is being emptied"},
		{name: "a node that is not ready", build: func(p *picture) {
			p.node("n1", func(_ *catalog.NodeWanted, o *catalog.NodeObserved) { o.Ready = false })
		}, why: "node n1: not ready"},
		{name: "a disabled disk", build: func(p *picture) {
			p.node("n1", onDisk(func(w *catalog.DiskWanted, _ *catalog.DiskObserved) { w.AllowScheduling = false }))
		}, why: "node n1, disk d: scheduling is disabled"},
		{name: "a disk that is not ready", build: func(p *picture) {
			p.node("n1", onDisk(func(_ *catalog.DiskWanted, o *catalog.DiskObserved) {
				o.Conditions = map[string]catalog.Condition{catalog.ConditionReady: {Status: catalog.ConditionFalse, Message: "on fire"}}
			}))
		}, why: "node n1, disk d: not ready: on fire"},
		{name: "a disk not seen yet", build: func(p *picture) {
			p.node("n1", func(_ *catalog.NodeWanted, o *catalog.NodeObserved) { o.Disks = nil })
		}, why: "node n1, disk d: not in use yet"},
		{name: "too little free", build: func(p *picture) { p.node("n1", setFree(4*gib)) }, why: "only 4 GiB free; 5 GiB must stay free"},
		{name: "minimal free by setting", build: func(p *picture) {
			p.node("n1", setFree(4*gib)).put(catalog.SettingKey(catalog.SettingMinimalFree), catalog.Setting{Name: catalog.SettingMinimalFree, Value: "1"})
		}, want: "n1"},
		{name: "reserved space", build: func(p *picture) {
			p.node("n1", onDisk(func(w *catalog.DiskWanted, _ *catalog.DiskObserved) { w.StorageReservedBytes = 60 * gib }))
		}, why: "60 GiB must stay free"},
		{name: "thin: larger than the disk", build: func(p *picture) { p.node("n1") }, size: 8 << 40, want: "n1"},
		{name: "over-provisioning limited", build: func(p *picture) {
			p.node("n1").put(catalog.SettingKey(catalog.SettingOverProvisioning), catalog.Setting{Value: "200"}).
				volume(catalog.VolumeWanted{Name: "other", SizeBytes: 150 * gib, Replicas: []catalog.Placement{{ReplicaID: "x", Node: "n1", DiskID: "n1-d"}}})
		}, size: 51 * gib, why: "51 GiB asked for and 150 GiB promised already, of 200 GiB"},
		{name: "over-provisioning just enough", build: func(p *picture) {
			p.node("n1").put(catalog.SettingKey(catalog.SettingOverProvisioning), catalog.Setting{Value: "200"}).
				volume(catalog.VolumeWanted{Name: "other", SizeBytes: 150 * gib, Replicas: []catalog.Placement{{ReplicaID: "x", Node: "n1", DiskID: "n1-d"}}})
		}, size: 50 * gib, want: "n1"},
		{name: "a setting that is no number", build: func(p *picture) {
			p.node("n1").put(catalog.SettingKey(catalog.SettingOverProvisioning), catalog.Setting{Value: "lots"})
		}, size: 8 << 40, want: "n1"},
		{name: "where the image is", build: func(p *picture) {
			p.node("n1").node("n2", setFree(10*gib)).put(catalog.ImageKey(catalog.Wanted, "img"), catalog.ImageWanted{Name: "img", ID: "img", Disks: []string{"n2-d"}})
		}, image: "img", want: "n2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPicture(t)
			c.build(p)
			p.volume(catalog.VolumeWanted{Name: "v", Copies: max(1, c.copies), SizeBytes: max(gib, c.size), ImageID: c.image, Image: c.image})
			ws := p.cluster()
			var got []string
			if w, ok := find[catalog.VolumeWanted](ws); ok {
				for i, r := range w.Replicas {
					got = append(got, r.Node)
					if r.ReplicaID != fmt.Sprintf("r%d", i+1) || r.DiskID != r.Node+"-d" {
						t.Errorf("placement %+v", r)
					}
				}
			}
			if strings.Join(got, " ") != c.want {
				t.Errorf("placed on %q, want %q (%s)", got, c.want, keys(ws))
			}
			o, complained := find[catalog.VolumeObserved](ws)
			s := o.Conditions[catalog.ConditionScheduled]
			if complained != (c.why != "") || complained && (s.Status != catalog.ConditionFalse || s.Reason != catalog.ReasonSchedulingFailure || !strings.Contains(s.Message, c.why)) {
				t.Errorf("condition %+v, want one with %q", s, c.why)
			}
		})
	}
}

// condition is a state a node, or its disk, can be in, and what is said of it.
type condition struct {
	name   string
	change func(*picture, *catalog.NodeWanted, *catalog.NodeObserved)
	why    string // "": it is fit
}

// conditions are all there are.
func conditions() []condition {
	disk := func(f func(*catalog.DiskWanted, *catalog.DiskObserved)) func(*picture, *catalog.NodeWanted, *catalog.NodeObserved) {
		return func(_ *picture, w *catalog.NodeWanted, o *catalog.NodeObserved) { onDisk(f)(w, o) }
	}
	return []condition{
		{"fit", func(*picture, *catalog.NodeWanted, *catalog.NodeObserved) {}, ""},
		{"alive", func(p *picture, w *catalog.NodeWanted, o *catalog.NodeObserved) {
			o.Port, o.APIMin, o.APICurrent = 9510, 1, 3
			p.put(catalog.AliveKey(w.Name), catalog.Alive{Node: w.Name})
		}, ""},
		{"silent", func(_ *picture, _ *catalog.NodeWanted, o *catalog.NodeObserved) { o.Port = 9510 }, "is down"},
		{"not ready", func(_ *picture, _ *catalog.NodeWanted, o *catalog.NodeObserved) { o.Ready = false }, "not ready"},
		{"cordoned", func(_ *picture, w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.AllowScheduling = false }, "scheduling is disabled"},
		{"evicting", func(_ *picture, w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.EvictionRequested = true }, "is being emptied"},
		{"deleted", func(_ *picture, w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.Deleted = &now }, "is being removed"},
		{"too old", func(_ *picture, _ *catalog.NodeWanted, o *catalog.NodeObserved) { o.APIMin, o.APICurrent = 1, 2 }, "speaks versions 1 to 2 between nodes, the leader 3 to 4"},
		{"too new", func(_ *picture, _ *catalog.NodeWanted, o *catalog.NodeObserved) { o.APIMin, o.APICurrent = 5, 6 }, "speaks versions 5 to 6"},
		{"no disk", func(_ *picture, w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.Disks = nil }, "has no disk"},
		{"without the tag", func(_ *picture, w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.Tags = nil }, `the node has no tag "fast"`},
		{"disk not seen", func(_ *picture, _ *catalog.NodeWanted, o *catalog.NodeObserved) { o.Disks = nil }, "not in use yet"},
		{"disk not ready", disk(func(_ *catalog.DiskWanted, o *catalog.DiskObserved) { o.Conditions = nil }), "not ready"},
		{"disk cordoned", disk(func(w *catalog.DiskWanted, _ *catalog.DiskObserved) { w.AllowScheduling = false }), "scheduling is disabled"},
		{"disk evicting", disk(func(w *catalog.DiskWanted, _ *catalog.DiskObserved) { w.EvictionRequested = true }), "is being emptied"},
		{"disk without the tag", disk(func(w *catalog.DiskWanted, _ *catalog.DiskObserved) { w.Tags = []string{"fast"} }), `the disk has no tag "ssd"`},
		{"disk nearly full", disk(func(_ *catalog.DiskWanted, o *catalog.DiskObserved) { o.FreeBytes = 5 * gib }), "must stay free"},
		{"disk reserved", disk(func(w *catalog.DiskWanted, _ *catalog.DiskObserved) { w.StorageReservedBytes = 50 * gib }), "50 GiB must stay free"},
		{"no room for the bytes", disk(func(_ *catalog.DiskWanted, o *catalog.DiskObserved) { o.FreeBytes = 10 * gib }), "6 GiB are to be copied there, of 10 GiB free"},
		{"promised", disk(func(_ *catalog.DiskWanted, o *catalog.DiskObserved) { o.TotalBytes, o.FreeBytes = 15*gib, 14*gib }), "20 GiB asked for and 0 B promised already"},
	}
}

// TestEveryCondition: three nodes in every combination of states, three copies: exactly the fit ones get one, and of each other one the reason is said.
func TestEveryCondition(t *testing.T) {
	all := conditions()
	n := 0
	for a := range all {
		for b := range all {
			for c := range all {
				n++
				p := newPicture(t).put(catalog.SettingKey(catalog.SettingOverProvisioning), catalog.Setting{Value: "100"})
				var fit, reasons []string
				for i, x := range []condition{all[a], all[b], all[c]} {
					name := fmt.Sprintf("n%d", i+1)
					p.node(name, func(w *catalog.NodeWanted, o *catalog.NodeObserved) {
						w.Tags = []string{"fast", "other"}
						onDisk(func(w *catalog.DiskWanted, _ *catalog.DiskObserved) { w.Tags = []string{"ssd"} })(w, o)
						x.change(p, w, o)
					})
					if x.why == "" {
						fit = append(fit, name+"/"+name+"-d")
					} else {
						reasons = append(reasons, name+" "+x.why)
					}
				}
				at, why := plan.PlaceCopies(p.v, plan.Wish{Copies: 3, SizeBytes: 20 * gib, NeedBytes: 6 * gib, NodeTags: []string{"fast"}, DiskTags: []string{"ssd"}, API: plan.Window{Min: 3, Current: 4}})
				slices.Sort(at)
				if !slices.Equal(at, fit) {
					t.Fatalf("%s, %s, %s: placed on %v, want %v: %v", all[a].name, all[b].name, all[c].name, at, fit, why)
				}
				text := strings.Join(why, "\n")
				for _, r := range reasons {
					node, r, _ := strings.Cut(r, " ")
					if !slices.ContainsFunc(why, func(line string) bool { return strings.HasPrefix(line, "node "+node) && strings.Contains(line, r) }) {
						t.Fatalf("%s, %s, %s: %q is not said of %s: %s", all[a].name, all[b].name, all[c].name, r, node, text)
					}
				}
			}
		}
	}
	t.Logf("%d pictures", n)
}

// TestPlaceCopies: several copies, by zones, anti-affinity, capacity and what is where already.
func TestPlaceCopies(t *testing.T) {
	type nodes = func(*picture)
	// spread puts nodes by name:zone:freeGiB:disks.
	spread := func(specs ...string) nodes {
		return func(p *picture) {
			for _, s := range specs {
				f := strings.Split(s, ":")
				var free, disks int64
				_, _ = fmt.Sscan(f[2], &free)
				_, _ = fmt.Sscan(f[3], &disks)
				p.node(f[0], setFree(free*gib), func(w *catalog.NodeWanted, o *catalog.NodeObserved) {
					w.Zone = f[1]
					for i := int64(1); i < disks; i++ {
						w.Disks[fmt.Sprint("d", i)] = w.Disks["d"]
						d := o.Disks["d"]
						d.DiskID = fmt.Sprint(f[0], "-d", i)
						o.Disks[fmt.Sprint("d", i)] = d
					}
				})
			}
		}
	}
	set := func(name, value string) nodes {
		return func(p *picture) { p.put(catalog.SettingKey(name), catalog.Setting{Name: name, Value: value}) }
	}
	const softNodes, softZones, softDisks = catalog.SettingSoftNodes, catalog.SettingSoftZones, catalog.SettingSoftDisks
	for _, c := range []struct {
		name  string
		build []nodes
		wish  plan.Wish
		want  string
		why   string
	}{
		{"a zone each first", []nodes{spread("a:z1:50:1", "b:z1:50:1", "c:z2:10:1")}, plan.Wish{Copies: 2}, "a c", ""},
		{"then the rest", []nodes{spread("a:z1:50:1", "b:z1:50:1", "c:z2:10:1")}, plan.Wish{Copies: 3}, "a c b", ""},
		{"zones are hard", []nodes{spread("a:z1:50:1", "b:z1:50:1", "c:z2:10:1"), set(softZones, "false")}, plan.Wish{Copies: 3}, "a c", "node b: zone z1 has a copy already"},
		{"no zones, and they are hard", []nodes{spread("a::50:1", "b::40:1"), set(softZones, "false")}, plan.Wish{Copies: 2}, "a", "node b: is in no zone, as is a node with a copy"},
		{"one zone none, and they are hard", []nodes{spread("a::50:1", "b:z:40:1"), set(softZones, "false")}, plan.Wish{Copies: 2}, "a b", ""},
		{"nodes are hard", []nodes{spread("a::50:3")}, plan.Wish{Copies: 2}, "a", "node a: has a copy already"},
		{"nodes are soft: another disk", []nodes{spread("a::50:3"), set(softNodes, "true")}, plan.Wish{Copies: 3}, "a a/a-d1 a/a-d2", ""},
		{"nodes are soft: as the dialect says it", []nodes{spread("a::50:2"), set(softNodes, `{"v1":"true"}`)}, plan.Wish{Copies: 2}, "a a/a-d1", ""},
		{"nodes are soft for another engine", []nodes{spread("a::50:2"), set(softNodes, `{"v2":"true"}`)}, plan.Wish{Copies: 2}, "a", "has a copy already"},
		{"nodes are soft: another node first", []nodes{spread("a::50:2", "b::10:1"), set(softNodes, "true")}, plan.Wish{Copies: 3}, "a b a/a-d1", ""},
		{"disks are soft: the same one again", []nodes{spread("a::50:1"), set(softNodes, "true")}, plan.Wish{Copies: 3}, "a a a", ""},
		{"disks are hard", []nodes{spread("a::50:2"), set(softNodes, "true"), set(softDisks, "false")}, plan.Wish{Copies: 3}, "a a/a-d1", "node a, disk d1: has a copy already"},
		{"five copies, two zones, soft: evenly", []nodes{spread("a:x:50:1", "b:y:50:1", "c:y:40:1"), set(softNodes, "true")}, plan.Wish{Copies: 5}, "a b c a b", ""},
		{"an unused node before an unused zone's used one", []nodes{spread("a:x:50:1", "b:y:50:1", "c:y:20:1", "d:y:10:1"), set(softNodes, "true")}, plan.Wish{Copies: 4}, "a b c d", ""},
		{"most left, not most free", []nodes{spread("a::60:1", "b::50:1"), func(p *picture) {
			p.volume(catalog.VolumeWanted{Name: "other", SizeBytes: 70 * gib, Replicas: []catalog.Placement{{ReplicaID: "x", Node: "a", DiskID: "a-d"}}})
		}}, plan.Wish{Copies: 1, SizeBytes: gib}, "b", ""},
		{"what is to go counts too", []nodes{spread("a::60:1", "b::50:1"), func(p *picture) {
			p.volume(catalog.VolumeWanted{Name: "other", SizeBytes: 70 * gib, Dropped: []catalog.Placement{{ReplicaID: "x", Node: "a", DiskID: "a-d"}}})
		}}, plan.Wish{Copies: 1, SizeBytes: gib}, "b", ""},
		{"images count too", []nodes{spread("a::60:1", "b::50:1"), func(p *picture) {
			p.put(catalog.ImageKey(catalog.Wanted, "i"), catalog.ImageWanted{Name: "i", ID: "i", Disks: []string{"a-d"}}).
				put(catalog.ImageKey(catalog.Observed, "i"), catalog.ImageObserved{Name: "i", ID: "i", SizeBytes: 70 * gib})
		}}, plan.Wish{Copies: 1, SizeBytes: gib}, "b", ""},
		{"what is on its way there counts", []nodes{spread("a::60:1", "b::50:1"), func(p *picture) {
			w := catalog.VolumeWanted{Name: "other", Replicas: []catalog.Placement{{ReplicaID: "x", Node: "b", DiskID: "b-d"}, {ReplicaID: "y", Node: "a", DiskID: "a-d", CopyOf: "x"}}}
			p.volume(w).put(catalog.VolumeKey(catalog.Observed, "other"), catalog.VolumeObserved{ID: "id-other", Replicas: []catalog.ReplicaObserved{{ReplicaID: "x", AllocatedBytes: 54 * gib}}})
		}}, plan.Wish{Copies: 2, NeedBytes: gib}, "b", "node a, disk d: 55 GiB are to be copied there, of 60 GiB free"},
		{"so does an image on its way, and not one that is there", []nodes{spread("a::60:1", "b::50:1"), func(p *picture) {
			p.put(catalog.ImageKey(catalog.Wanted, "i"), catalog.ImageWanted{Name: "i", ID: "i", Disks: []string{"a-d", "b-d"}}).
				put(catalog.ImageKey(catalog.Observed, "i"), catalog.ImageObserved{Name: "i", ID: "i", Disks: map[string]catalog.ImageOnDisk{"b-d": {State: catalog.ImageReady, AllocatedBytes: 54 * gib}}})
		}}, plan.Wish{Copies: 2, NeedBytes: gib}, "b", "node a, disk d: 55 GiB are to be copied there, of 60 GiB free"},
		{"disks of different sizes fill alike", []nodes{spread("b::90:1"), func(p *picture) {
			p.node("a", onDisk(func(_ *catalog.DiskWanted, o *catalog.DiskObserved) { o.TotalBytes, o.FreeBytes = 1000*gib, 800*gib }))
		}}, plan.Wish{Copies: 1, SizeBytes: 20 * gib}, "a", ""},
		{"reserved is not offered", []nodes{spread("a::50:1", "b::50:1"), func(p *picture) {
			p.node("a", onDisk(func(w *catalog.DiskWanted, o *catalog.DiskObserved) {
				w.StorageReservedBytes, o.FreeBytes = 20*gib, 90*gib
			})).node("b", setFree(90*gib))
		}}, plan.Wish{Copies: 1, SizeBytes: 50 * gib}, "b", ""},
		{"reserved counts against over-provisioning", []nodes{spread("a::90:1"), set(catalog.SettingOverProvisioning, "100"), func(p *picture) {
			p.node("a", onDisk(func(w *catalog.DiskWanted, o *catalog.DiskObserved) {
				w.StorageReservedBytes, o.FreeBytes = 40*gib, 90*gib
			}))
		}}, plan.Wish{Copies: 1, SizeBytes: 61 * gib}, "", "61 GiB asked for and 0 B promised already, of 60 GiB (100 % of 60 GiB)"},
		{"copies count against each other", []nodes{spread("a::50:1"), set(softNodes, "true"), set(catalog.SettingOverProvisioning, "100")}, plan.Wish{Copies: 3, SizeBytes: 40 * gib}, "a a", "40 GiB asked for and 80 GiB promised already"},
		{"ready image before one on its way before none", []nodes{spread("a::60:1", "b::50:1", "c::40:1"), func(p *picture) {
			p.put(catalog.ImageKey(catalog.Wanted, "i"), catalog.ImageWanted{Name: "i", ID: "i", Disks: []string{"b-d", "c-d"}}).
				put(catalog.ImageKey(catalog.Observed, "i"), catalog.ImageObserved{Name: "i", ID: "i", Disks: map[string]catalog.ImageOnDisk{"c-d": {State: catalog.ImageReady}}})
		}}, plan.Wish{Copies: 3, ImageID: "i"}, "c b a", ""},
		{"far from the others before the image", []nodes{spread("a:x:60:1", "b:x:50:1", "c:y:40:1"), func(p *picture) {
			p.put(catalog.ImageKey(catalog.Wanted, "i"), catalog.ImageWanted{Name: "i", ID: "i", Disks: []string{"a-d", "b-d"}})
		}}, plan.Wish{Copies: 2, ImageID: "i"}, "a c", ""},
		{"a node's tag is no disk's", []nodes{func(p *picture) {
			p.node("a", func(w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.Tags = []string{"ssd"} })
		}}, plan.Wish{Copies: 1, DiskTags: []string{"ssd"}}, "", `node a, disk d: the disk has no tag "ssd"`},
		{"a disk's tag is no node's", []nodes{func(p *picture) {
			p.node("a", onDisk(func(w *catalog.DiskWanted, _ *catalog.DiskObserved) { w.Tags = []string{"fast"} }))
		}}, plan.Wish{Copies: 1, NodeTags: []string{"fast"}}, "", `node a: the node has no tag "fast"`},
		{"all tags", []nodes{func(p *picture) {
			p.node("a", func(w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.Tags = []string{"x"} })
			p.node("b", func(w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.Tags = []string{"y", "x"} })
		}}, plan.Wish{Copies: 2, NodeTags: []string{"x", "y"}}, "b", `node a: the node has no tag "y"`},
		{"a window that nobody says", []nodes{spread("a::50:1")}, plan.Wish{Copies: 1, API: plan.Window{Min: 7, Current: 7}}, "a", ""},
		{"a leader that says none", []nodes{func(p *picture) {
			p.node("a", func(_ *catalog.NodeWanted, o *catalog.NodeObserved) { o.APIMin, o.APICurrent = 9, 9 })
		}}, plan.Wish{Copies: 1}, "a", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPicture(t)
			for _, f := range c.build {
				f(p)
			}
			at, why := plan.PlaceCopies(p.v, c.wish)
			var short []string
			for _, s := range at {
				node, disk, _ := strings.Cut(s, "/")
				if disk == node+"-d" {
					s = node
				}
				short = append(short, s)
			}
			if got := strings.Join(short, " "); got != c.want {
				t.Errorf("placed on %q, want %q (%v)", got, c.want, why)
			}
			if text := strings.Join(why, "; "); !strings.Contains(text, c.why) || (c.why == "") != (text == "") {
				t.Errorf("because %q, want %q", text, c.why)
			}
		})
	}
}

// TestPlaceAtRandom: whatever the nodes, zones and rules, no copy is where a rule forbids it, as many are placed as the rules allow (greedily: nodes), the best spread is taken where rules
// are soft, and the same picture, put together in another order, gives the same places.
func TestPlaceAtRandom(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 500 {
		n, zones, copies := 1+rng.IntN(6), 1+rng.IntN(3), 1+rng.IntN(5)
		softNodes, softZones := rng.IntN(2) == 0, rng.IntN(2) == 0
		zoneOf, frees := map[string]string{}, map[string]int64{}
		var names []string
		for i := range n {
			name := fmt.Sprint("n", i)
			names = append(names, name)
			zoneOf[name], frees[name] = fmt.Sprint("z", rng.IntN(zones)), 6+rng.Int64N(90)
		}
		build := func() []string {
			p := newPicture(t).put(catalog.SettingKey(catalog.SettingSoftNodes), catalog.Setting{Value: fmt.Sprint(softNodes)}).
				put(catalog.SettingKey(catalog.SettingSoftZones), catalog.Setting{Value: fmt.Sprint(softZones)})
			for _, name := range names {
				p.node(name, setFree(frees[name]*gib), func(w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.Zone = zoneOf[name] })
			}
			at, _ := plan.PlaceCopies(p.v, plan.Wish{Copies: copies, SizeBytes: gib})
			return at
		}
		at := build()
		rng.Shuffle(n, func(i, j int) { names[i], names[j] = names[j], names[i] })
		if again := build(); !slices.Equal(at, again) {
			t.Fatalf("%v, in another order %v", at, again)
		}
		onNode, inZone, used := map[string]int{}, map[string]int{}, map[string]bool{}
		for _, z := range zoneOf {
			used[z] = true
		}
		for _, s := range at {
			node, _, _ := strings.Cut(s, "/")
			onNode[node]++
			inZone[zoneOf[node]]++
		}
		want := copies
		if !softNodes {
			want = min(want, n)
		}
		if !softZones {
			want = min(want, len(used))
		}
		if len(at) != want {
			t.Fatalf("%d copies of %d on %d nodes in %d zones (soft nodes %v, zones %v): %v", len(at), copies, n, len(used), softNodes, softZones, at)
		}
		if len(inZone) != min(want, len(used)) || softZones && len(onNode) != min(want, n) {
			t.Fatalf("%v are on %d nodes in %d zones, of %d in %d", at, len(onNode), len(inZone), n, len(used))
		}
	}
}

// TestSelectors: a volume goes where its own selectors and its image's let it.
func TestSelectors(t *testing.T) {
	for _, c := range []struct {
		node, disk, imageNode, imageDisk []string // selectors
		want                             string   // or part of the reason
	}{
		{nil, nil, nil, nil, "n1"},
		{[]string{"fast"}, nil, nil, nil, "n2"},
		{nil, []string{"ssd"}, nil, nil, "n3"},
		{nil, nil, []string{"fast"}, nil, "n2"},
		{nil, nil, nil, []string{"ssd"}, "n3"},
		{[]string{"fast"}, nil, nil, []string{"ssd"}, "n4"},
		{nil, []string{"ssd"}, []string{"fast"}, nil, "n4"},
		{[]string{"fast"}, []string{"ssd"}, []string{"fast"}, []string{"ssd"}, "n4"},
		{[]string{"ssd"}, nil, nil, nil, `node n4: the node has no tag "ssd"`},
		{nil, []string{"fast"}, nil, nil, `node n4, disk d: the disk has no tag "fast"`},
		{nil, nil, nil, []string{"gold"}, `node n1, disk d: the disk has no tag "gold"`},
	} {
		tags := func(node, disk []string) func(*catalog.NodeWanted, *catalog.NodeObserved) {
			return func(w *catalog.NodeWanted, o *catalog.NodeObserved) {
				w.Tags = node
				onDisk(func(w *catalog.DiskWanted, _ *catalog.DiskObserved) { w.Tags = disk })(w, o)
			}
		}
		p := newPicture(t).node("n1").node("n2", tags([]string{"fast"}, nil)).node("n3", tags(nil, []string{"ssd"})).node("n4", setFree(20*gib), tags([]string{"fast"}, []string{"ssd"}))
		p.put(catalog.ImageKey(catalog.Wanted, "i"), catalog.ImageWanted{Name: "i", ID: "id-i", NodeSelector: c.imageNode, DiskSelector: c.imageDisk})
		p.volume(catalog.VolumeWanted{Name: "v", Image: "i", ImageID: "id-i", NodeSelector: c.node, DiskSelector: c.disk})
		ws := p.cluster()
		got := ""
		if w, ok := find[catalog.VolumeWanted](ws); ok {
			got = w.Replicas[0].Node
		} else if o, ok := find[catalog.VolumeObserved](ws); ok {
			got = o.Conditions[catalog.ConditionScheduled].Message
		}
		if got != c.want && !strings.Contains(got, c.want+";") && !strings.HasSuffix(got, c.want) {
			t.Errorf("selectors %v: %q, want %q", c, got, c.want)
		}
	}
}
