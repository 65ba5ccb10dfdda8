package plan_test

import (
	"strings"
	"testing"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// TestRefuseEviction: what lies on n1, or on its disk d, and has nowhere to go.
func TestRefuseEviction(t *testing.T) {
	sized := func(name string, size int64, change ...func(*catalog.VolumeWanted)) func(*picture) {
		return func(p *picture) {
			w := placed(name)
			w.SizeBytes = size
			for _, c := range change {
				c(&w)
			}
			p.volume(w)
		}
	}
	image := func(copies string) func(*picture) { return func(p *picture) { imageAt(p, copies) } }
	over := func(p *picture) {
		p.put(catalog.SettingKey(catalog.SettingOverProvisioning), catalog.Setting{Name: catalog.SettingOverProvisioning, Value: "100"})
	}
	free := setFree(50 * gib)
	for name, c := range map[string]struct {
		disk  string
		nodes func(*picture)
		with  []func(*picture)
		want  []string // parts of the reasons, one each; none: it can be emptied
	}{
		"nothing is there":          {nodes: func(p *picture) { p.node("n1") }},
		"another node has room":     {nodes: func(p *picture) { p.node("n1").node("n2") }, with: []func(*picture){sized("v", gib)}},
		"there is no other node":    {nodes: func(p *picture) { p.node("n1") }, with: []func(*picture){sized("v", gib)}, want: []string{"volume v: there is no other place"}},
		"the other is cordoned":     {nodes: func(p *picture) { p.node("n1").node("n2", cordoned) }, with: []func(*picture){sized("v", gib)}, want: []string{"n2"}},
		"the other is not ready":    {nodes: func(p *picture) { p.node("n1").node("n2", notReady) }, with: []func(*picture){sized("v", gib)}, want: []string{"n2"}},
		"another disk of the node":  {disk: "d", nodes: func(p *picture) { p.node("n1", secondDisk) }, with: []func(*picture){sized("v", gib)}},
		"which leaves with it":      {nodes: func(p *picture) { p.node("n1", secondDisk) }, with: []func(*picture){sized("v", gib)}, want: []string{"volume v"}},
		"another disk is emptied":   {disk: "e", nodes: func(p *picture) { p.node("n1", secondDisk) }, with: []func(*picture){sized("v", gib)}},
		"a tag that only it has":    {nodes: func(p *picture) { p.node("n1").node("n2") }, with: []func(*picture){sized("v", gib, func(w *catalog.VolumeWanted) { w.NodeSelector = []string{"ssd"} })}, want: []string{"ssd"}},
		"room for one of two":       {nodes: func(p *picture) { p.node("n1").node("n2", free) }, with: []func(*picture){over, sized("v", 60*gib), sized("w", 60*gib)}, want: []string{"volume w"}},
		"what is deleted goes":      {nodes: func(p *picture) { p.node("n1") }, with: []func(*picture){func(p *picture) { p.volume(deleted(placed("v"))) }}},
		"it is moving already":      {nodes: func(p *picture) { p.node("n1").node("n2", cordoned) }, with: []func(*picture){sized("v", gib, moving)}},
		"an image with another":     {nodes: func(p *picture) { p.node("n1").node("n2", cordoned) }, with: []func(*picture){image("n1-d:ready n2-d:ready")}},
		"an image's only copy":      {nodes: func(p *picture) { p.node("n1").node("n2", cordoned) }, with: []func(*picture){image("n1-d:ready")}, want: []string{"image i: there is no other place"}},
		"an image that finds place": {nodes: func(p *picture) { p.node("n1").node("n2") }, with: []func(*picture){image("n1-d:ready")}},
		"a node that is not there":  {nodes: func(p *picture) { p.node("n2") }},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPicture(t)
			c.nodes(p)
			for _, f := range c.with {
				f(p)
			}
			before := p.v.Nodes["n1"].Wanted.Value.EvictionRequested
			got := plan.RefuseEviction(p.v, plan.Emptying{Node: "n1", Disk: c.disk})
			if len(got) != len(c.want) {
				t.Fatalf("%q, want %d", got, len(c.want))
			}
			for i, part := range c.want {
				if !strings.Contains(got[i], part) {
					t.Errorf("%q does not say %q", got[i], part)
				}
			}
			if p.v.Nodes["n1"].Wanted.Value.EvictionRequested != before || p.v.Nodes["n1"].Wanted.Value.Disks["d"].EvictionRequested {
				t.Error("asking changed the picture")
			}
		})
	}
}
