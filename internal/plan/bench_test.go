package plan_test

import (
	"fmt"
	"testing"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// BenchmarkOnNode: one plan of a node with many volumes, half of them attached, nothing to do: what every event costs.
func BenchmarkOnNode(b *testing.B) {
	for _, n := range []int{200, 5000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := newScene(&testing.T{})
			for i := range n {
				name := fmt.Sprintf("v%d", i)
				w := placed(name)
				w.Frontend = catalog.FrontendNBD
				d := &s.in.Found.Disks[0]
				d.Replicas = append(d.Replicas, plan.FoundReplica{ReplicaID: "rep-" + name, VolumeID: "id-" + name, Volume: name, SizeBytes: gib})
				if i%2 == 0 {
					ticket(&w)
					s.in.Found.Volumes = append(s.in.Found.Volumes, plan.FoundVolume{
						VolumeID: "id-" + name, Volume: name, State: plan.FoundOpen, Frontend: "nbd", Endpoint: "nbd://", Epoch: 1, SizeBytes: gib,
						Layers: []plan.FoundLayer{{ID: "a", Snapshot: "s1"}, {ID: "b", Parent: "a", Head: true}},
					})
				}
				s.volume(w)
				s.put(catalog.MembershipKey("id-"+name), membership("id-"+name, 1))
			}
			for range 2 {
				for _, w := range plan.OnNode(s.in).Writes {
					s.put(w.Key, w.Value)
				}
			}
			if p := plan.OnNode(s.in); len(p.Writes)+len(p.Actions) != 0 {
				b.Fatalf("not at rest: %d writes, %d actions", len(p.Writes), len(p.Actions))
			}
			for b.Loop() {
				plan.OnNode(s.in)
			}
		})
	}
}

// BenchmarkCluster: one plan of the leader with 5,000 volumes (all from 20 images) on 30 nodes. At rest: what every event costs; new: all are placed; evicting: half of the nodes
// are to be emptied and there is no room.
func BenchmarkCluster(b *testing.B) {
	for _, kind := range []string{"rest", "new", "evicting", "balance"} {
		b.Run(kind, func(b *testing.B) {
			p := manyVolumes(&testing.T{}, kind)
			for b.Loop() {
				p.cluster()
			}
		})
	}
}

func manyVolumes(t *testing.T, kind string) *picture {
	p := newPicture(t)
	for n := range 30 {
		p.node(fmt.Sprintf("n%d", n), func(w *catalog.NodeWanted, o *catalog.NodeObserved) {
			w.EvictionRequested = kind == "evicting" && n%2 == 0
			if kind == "evicting" {
				setFree(0)(w, o)
			}
			o.Disks["e"] = o.Disks["d"]
		})
	}
	if kind == "balance" {
		p.put(catalog.SettingKey(catalog.SettingAutoBalance), catalog.Setting{Value: "best-effort"})
	}
	for i := range 20 {
		w := catalog.ImageWanted{Name: fmt.Sprintf("i%d", i), ID: fmt.Sprintf("id-i%d", i), MinCopies: 1}
		o := catalog.ImageObserved{Name: w.Name, ID: w.ID, CurrentChecksum: "x", Disks: map[string]catalog.ImageOnDisk{}}
		for n := range 30 {
			if kind != "new" || n == 0 {
				w.Disks = append(w.Disks, fmt.Sprintf("n%d-d", n))
				o.Disks[w.Disks[n]] = catalog.ImageOnDisk{State: catalog.ImageReady}
			}
		}
		p.put(catalog.ImageKey(catalog.Wanted, w.Name), w).put(catalog.ImageKey(catalog.Observed, w.Name), o)
	}
	for i := range 5000 {
		name, node := fmt.Sprintf("v%d", i), fmt.Sprintf("n%d", i%30)
		w := catalog.VolumeWanted{Name: name, ImageID: fmt.Sprintf("id-i%d", i%20), Image: fmt.Sprintf("i%d", i%20)}
		if kind != "new" {
			w.Replicas = []catalog.Placement{{ReplicaID: "rep-" + name, Node: node, DiskID: node + "-d"}}
			p.put(catalog.MembershipKey("id-"+name), plan.OneMember("id-"+name, "rep-"+name, node, 1))
			p.put(catalog.VolumeKey(catalog.Observed, name), observed(name, catalog.VolumeDetached, true))
		}
		p.volume(w)
	}
	if kind == "rest" {
		for _, w := range p.cluster() {
			p.put(w.Key, w.Value)
		}
		if ws := p.cluster(); len(ws) > 0 {
			t.Fatalf("not at rest: %s", keys(ws))
		}
	}
	return p
}
