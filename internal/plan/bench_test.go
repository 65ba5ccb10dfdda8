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

// BenchmarkCluster: one plan of the leader with many volumes and nothing to do.
func BenchmarkCluster(b *testing.B) {
	p := newPicture(&testing.T{}).node("n1")
	for i := range 5000 {
		name := fmt.Sprintf("v%d", i)
		p.volume(placed(name)).put(catalog.MembershipKey("id-"+name), membership("id-"+name, 1))
	}
	for b.Loop() {
		p.cluster()
	}
}
