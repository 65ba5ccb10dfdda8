package plan_test

import (
	"encoding/json"
	"fmt"
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
		{name: "two copies, two nodes", build: func(p *picture) { p.node("n1").node("n2") }, copies: 2, want: "n1 n2"},
		{name: "two copies, one node: anti-affinity", build: func(p *picture) { p.node("n1") }, copies: 2, want: "n1", why: "node n1: has a copy already"},
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

func TestTags(t *testing.T) {
	p := newPicture(t).node("n1", func(w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.Tags = []string{"fast"} })
	for tags, want := range map[string]bool{"": true, "fast": true, "fast ssd": false} {
		if got := plan.CanPlaceTagged(p.v, strings.Fields(tags)); got != want {
			t.Errorf("tags %q: %v, want %v", tags, got, want)
		}
	}
}
