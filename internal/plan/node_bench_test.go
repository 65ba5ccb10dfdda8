package plan_test

import (
	"fmt"
	"testing"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// threeNodes is a cluster at rest with many volumes, their copies spread, half of them attached, half of those on another node than their copy: what each node has.
func threeNodes(t testing.TB, volumes int) []plan.NodeInput {
	p := newPicture(&testing.T{}).put(catalog.ClusterKey(), catalog.Cluster{ID: "c"})
	var ins []plan.NodeInput
	for i := range 3 {
		name := fmt.Sprintf("n%d", i+1)
		p.node(name, func(w *catalog.NodeWanted, o *catalog.NodeObserved) { w.ID, o.Address, o.Port = "id-"+name, name, 100 })
		p.put(catalog.AliveKey(name), catalog.Alive{Node: name})
		ins = append(ins, plan.NodeInput{
			Node: name, Now: now, View: p.v, Busy: map[string]bool{}, Failures: map[string]plan.Failure{}, Finished: map[string]plan.Result{}, Background: new(int64),
			Joined: &plan.Joined{ClusterID: "c", NodeID: "id-" + name, Host: name, Port: 100},
			Found:  plan.Found{Known: true, API: plan.APICluster, Disks: []plan.FoundDisk{{DiskID: name + "-d", Path: "/" + name, TotalBytes: 100 * gib, FreeBytes: 50 * gib}}},
		})
	}
	for i := range volumes {
		name, at, on := fmt.Sprintf("v%d", i), i%3, (i+i/2)%3
		w := catalog.VolumeWanted{Name: name, ID: "id-" + name, SizeBytes: gib, Copies: 1, Frontend: catalog.FrontendNBD}
		w.Replicas = []catalog.Placement{{ReplicaID: "rep-" + name, Node: ins[at].Node, DiskID: ins[at].Node + "-d"}}
		d := &ins[at].Found.Disks[0]
		d.Replicas = append(d.Replicas, plan.FoundReplica{ReplicaID: "rep-" + name, VolumeID: w.ID, Volume: name, SizeBytes: gib})
		if i%2 == 0 {
			w.Tickets = []catalog.Ticket{{Node: ins[on].Node, Kind: catalog.TicketAPI}}
			ins[on].Found.Volumes = append(ins[on].Found.Volumes, plan.FoundVolume{
				VolumeID: w.ID, Volume: name, ReplicaID: "rep-" + name, State: plan.FoundOpen, Frontend: "nbd", Endpoint: "nbd://", Epoch: 1, SizeBytes: gib,
				Layers: []plan.FoundLayer{{ID: "a", Snapshot: "s1"}, {ID: "b", Parent: "a", Head: true}},
			})
		}
		p.volume(w)
		p.put(catalog.MembershipKey(w.ID), plan.OneMember(w.ID, "rep-"+name, ins[at].Node, 1))
	}
	for range 4 {
		for i := range ins {
			out := plan.OnNode(ins[i])
			for _, w := range out.Writes {
				p.put(w.Key, w.Value)
			}
			for _, a := range out.Actions {
				if c, ok := a.(plan.SetCluster); ok {
					ins[i].Found.Cluster = c.Cluster
				}
			}
		}
	}
	for i := range ins {
		if out := plan.OnNode(ins[i]); len(out.Writes)+len(out.Actions) != 0 {
			t.Fatalf("not at rest: %d writes, %d actions: %+v", len(out.Writes), len(out.Actions), out.Actions)
		}
		ins[i].Found.Index()
	}
	return ins
}

// BenchmarkOnNodeOfThree: what an event costs one of three nodes with 5,000 volumes: one that concerns everything, one that concerns a volume, one that also concerns the node's own
// record, one that concerns nothing here, and the comparison of two looks at its data process.
func BenchmarkOnNodeOfThree(b *testing.B) {
	in := threeNodes(b, 5000)[0]
	for _, c := range []struct {
		name string
		only *plan.Changed
	}{
		{"all", nil},
		{"volume", &plan.Changed{Volumes: map[string]bool{"v0": true}}},
		{"volume+node", &plan.Changed{Volumes: map[string]bool{"v0": true}, Node: true}},
		{"nothing", &plan.Changed{}},
	} {
		b.Run(c.name, func(b *testing.B) {
			in := in
			in.Only = c.only
			for b.Loop() {
				plan.OnNode(in)
			}
		})
	}
	b.Run("look", func(b *testing.B) {
		for b.Loop() {
			later := plan.Found{Known: true, API: in.Found.API, Cluster: in.Found.Cluster, Disks: in.Found.Disks, Volumes: in.Found.Volumes}
			if c := in.Found.Diff(&later); c.All || len(c.Volumes) > 0 {
				b.Fatal(c)
			}
		}
	})
}

// TestOnlyWhatChanged: a node at rest that is told what changed looks at nothing else, and finds what there is to do in what it looks at.
func TestOnlyWhatChanged(t *testing.T) {
	in := threeNodes(t, 30)[0]
	view := &picture{t: t, v: in.View, rev: 1_000_000}
	detach := func(name string) {
		w := in.View.Volumes[name].Wanted.Value
		w.Tickets = nil
		view.put(catalog.VolumeKey(catalog.Wanted, name), w)
	}
	var mine []string
	for _, f := range in.Found.Volumes {
		mine = append(mine, f.Volume)
	}
	if len(mine) < 2 {
		t.Fatal(mine)
	}
	detach(mine[0])
	detach(mine[1])
	in.Only = &plan.Changed{Volumes: map[string]bool{mine[0]: true}}
	p := plan.OnNode(in)
	if verbs(p.Actions) != "close-volume" || p.Volumes[p.Actions[0].Key()] != mine[0] || len(p.Writes) != 1 {
		t.Errorf("does %q, writes %d", verbs(p.Actions), len(p.Writes))
	}
	in.Failures[plan.FailureID(p.Actions[0])] = plan.Failure{Rev: p.Actions[0].Because(), Next: now.Add(7)}
	if p = plan.OnNode(in); !p.Wakes[mine[0]].Equal(now.Add(7)) || verbs(p.Actions) != "" {
		t.Errorf("wakes %v", p.Wakes)
	}
	in.Only = nil
	if p = plan.OnNode(in); verbs(p.Actions) != "close-volume" {
		t.Errorf("everything: does %q", verbs(p.Actions))
	}
}
