package plan_test

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// inCluster makes nodes of a cluster: those in up live, the others have been given up.
func (p *picture) inCluster(up ...string) *picture {
	p.put(catalog.ClusterKey(), catalog.Cluster{ID: "c"})
	for _, name := range []string{"n1", "n2", "n3"} {
		p.node(name, func(w *catalog.NodeWanted, o *catalog.NodeObserved) { w.ID, o.Address, o.Port = "id-"+name, name, 100 })
		if slices.Contains(up, name) {
			p.put(catalog.AliveKey(name), catalog.Alive{Node: name})
		}
	}
	return p
}

// TestHome: whose a volume is.
func TestHome(t *testing.T) {
	const all = "n1 n2 n3"
	for _, c := range []struct {
		name                  string
		up                    string
		ticket, seen, replica string
		deleted, operation    bool
		want                  string
	}{
		{"nothing", all, "", "", "", false, false, ""},
		{"wanted, not placed", all, "n2", "", "", false, false, "n2"},
		{"detached: where its copy is", all, "", "", "n1", false, false, "n1"},
		{"to be attached elsewhere", all, "n2", "", "n1", false, false, "n2"},
		{"attached elsewhere", all, "n2", "n2", "n1", false, false, "n2"},
		{"to be detached: whoever has it closes it", all, "", "n2", "n1", false, false, "n2"},
		{"to be moved: whoever has it closes it first", all, "n3", "n2", "n1", false, false, "n2"},
		{"to be moved from a node that is gone: it is not waited for", "n1 n3", "n3", "n2", "n1", false, false, "n3"},
		{"to be detached from a node that is gone", "n1 n3", "", "n2", "n1", false, false, "n1"},
		{"attached to a node that is gone: nothing moves by itself", "n1 n3", "n2", "n2", "n1", false, false, "n2"},
		{"its copy's node is gone", "n2 n3", "", "", "n1", false, false, "n1"},
		{"attached, its copy's node gone", "n2 n3", "n2", "n2", "n1", false, false, "n2"},
		{"deleted", all, "", "", "n1", true, false, "n1"},
		{"deleted, open", all, "", "n2", "n1", true, false, "n2"},
		{"deleted, tickets left", all, "n3", "n2", "n1", true, false, "n2"},
		{"deleted, open on a node that is gone", "n1 n3", "n3", "n2", "n1", true, false, "n1"},
		{"deleted, its copy's node gone: somebody says so", "n2 n3", "", "", "n1", true, false, "n2"},
		{"something to do, its copy's node gone: somebody says so", "n3", "", "", "n1", false, true, "n3"},
		{"deleted, nobody there", "", "", "", "n1", true, false, "n1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPicture(t).inCluster(strings.Fields(c.up)...)
			w := catalog.VolumeWanted{Name: "v", ID: "id-v"}
			if c.ticket != "" {
				w.Tickets = []catalog.Ticket{{Node: c.ticket}}
			}
			if c.replica != "" {
				w.Replicas = []catalog.Placement{{ReplicaID: "rep-v", Node: c.replica}}
			}
			if c.deleted {
				w = deleted(w)
			}
			p.put(catalog.VolumeKey(catalog.Wanted, "v"), w)
			p.put(catalog.VolumeKey(catalog.Observed, "v"), catalog.VolumeObserved{Name: "v", ID: "id-v", Node: c.seen})
			if c.operation {
				p.put(catalog.OperationKey("v", "o"), catalog.Operation{ID: "o", Volume: "v", VolumeID: "id-v"})
			}
			if got := p.v.Home("v"); got != c.want {
				t.Errorf("home %q, want %q", got, c.want)
			}
		})
	}
	p := newPicture(t).inCluster("n1", "n2", "n3")
	p.put(catalog.VolumeKey(catalog.Wanted, "v"), catalog.VolumeWanted{Name: "v", ID: "new", Tickets: []catalog.Ticket{{Node: "n1"}}})
	p.put(catalog.VolumeKey(catalog.Observed, "v"), catalog.VolumeObserved{Name: "v", ID: "old", Node: "n3"})
	if got := p.v.Home("v"); got != "n1" {
		t.Errorf("an earlier volume of that name decides: %q", got)
	}
}

// remote is node n2's picture of a cluster with volume v, whose copy is on n1; n2 knows both others.
func remote(t *testing.T, up ...string) *scene {
	s := &scene{picture: newPicture(t).inCluster(up...)}
	s.in = plan.NodeInput{
		Node: "n2", Now: now, View: s.v, Busy: map[string]bool{}, Failures: map[string]plan.Failure{}, Finished: map[string]plan.Result{}, Background: new(int64),
		Found: plan.Found{Known: true, API: plan.APICluster, Disks: []plan.FoundDisk{{DiskID: "n2-d", Path: "/n2", TotalBytes: 100 * gib, FreeBytes: 50 * gib}}},
	}
	s.in.Joined = &plan.Joined{ClusterID: "c", NodeID: "id-n2", Host: "n2", Port: 100}
	s.in.Found.Cluster = plan.Neighbours{ClusterID: "c", Node: "n2", Listen: "n2:103", Peers: []plan.Neighbour{
		{Node: "n1", NodeID: "id-n1", Data: "n1:103", Ledger: "n1:100"}, {Node: "n3", NodeID: "id-n3", Data: "n3:103", Ledger: "n3:100"},
	}}
	return s
}

// seen is the record of v: open on a node, or with its replica made or not ("": not said).
func (s *scene) seen(node, state string, created ...bool) *scene {
	o := catalog.VolumeObserved{Name: "v", ID: "id-v", State: state, Node: node}
	for _, c := range created {
		o.Replicas = []catalog.ReplicaObserved{{ReplicaID: "rep-v", Node: "n1", DiskID: "n1-d", Created: c}}
	}
	s.put(catalog.VolumeKey(catalog.Observed, "v"), o)
	return s
}

func (s *scene) members(epoch uint64) *scene {
	s.put(catalog.MembershipKey("id-v"), plan.OneMember("id-v", "rep-v", "n1", epoch))
	return s
}

func ticketOn(node string) func(*catalog.VolumeWanted) {
	return func(w *catalog.VolumeWanted) { w.Tickets = []catalog.Ticket{{Node: node, Kind: catalog.TicketAPI}} }
}

// lostOn1 gives n1's disk up.
func lostOn1(s *scene) *scene {
	s.node("n1", lostDisk, func(w *catalog.NodeWanted, o *catalog.NodeObserved) { w.ID, o.Address, o.Port = "id-n1", "n1", 100 })
	return s
}

// TestVolumeElsewhere: what a node does about a volume whose copy, or home, is on another.
func TestVolumeElsewhere(t *testing.T) {
	all := []string{"n1", "n2", "n3"}
	const (
		attached  = catalog.VolumeAttached
		attaching = catalog.VolumeAttaching
		detached  = catalog.VolumeDetached
	)
	away := func(s *scene) *scene { s.in.Found.Volumes[0].Away = "since noon"; return s }
	for _, c := range []struct {
		name  string
		up    []string
		scene func(*scene) *scene
		do    string
		shows string // "": nothing is written
		error string
	}{
		{"to be attached: it says so before it opens", all, func(s *scene) *scene { return s.want(ticketOn("n2")).members(1).seen("", detached, true) }, "", "attaching unknown n2", ""},
		{"to be attached, said", all, func(s *scene) *scene { return s.want(ticketOn("n2")).members(1).seen("n2", attaching, true) }, "open-volume(nbd)@n1", "attaching unknown n2", ""},
		{"its replica is not made yet", all, func(s *scene) *scene { return s.want(ticketOn("n2")).members(0).seen("n2", catalog.VolumeCreating) }, "", "creating unknown ", ""},
		{"its replica is lost", all, func(s *scene) *scene { return s.want(ticketOn("n2")).members(1).seen("n2", attaching, false) }, "", "detached faulted ", "not on disk"},
		{"nobody said anything of a replica that was written to", all, func(s *scene) *scene { return s.want(ticketOn("n2")).members(1).seen("n2", attaching) }, "open-volume(nbd)@n1", "attaching unknown n2", ""},
		{"its copy's node is gone", []string{"n2", "n3"}, func(s *scene) *scene {
			s.in.Silent = map[string]time.Time{"n1": now}
			return s.want(ticketOn("n2")).members(1).seen("n2", attaching, true)
		}, "", "attaching unknown n2", "its copy is on node n1, which does not answer since " + now.UTC().Format(time.RFC3339)},
		{"its copy's node is no peer yet", all, func(s *scene) *scene {
			s.in.Found.Cluster.Peers = nil
			return s.want(ticketOn("n2")).members(1).seen("n2", attaching, true)
		}, "set-cluster", "attaching unknown n2", "does not know yet"},
		{"an old data process", all, func(s *scene) *scene {
			s.in.Found.API = 2
			return s.want(ticketOn("n2")).members(1).seen("n2", attaching, true)
		}, "", "attaching unknown n2", "upgrade it"},
		{"open", all, func(s *scene) *scene {
			return s.want(ticketOn("n2")).members(1).seen("n2", attaching, true).open(plan.FoundOpen, "nbd", "")
		}, "", "attached healthy n2", ""},
		{"open, its copy away", all, func(s *scene) *scene {
			return away(s.want(ticketOn("n2")).members(1).seen("n2", attached, true).open(plan.FoundOpen, "nbd", ""))
		}, "", "attached unknown n2", "does not answer: since noon"},
		{"open, the serve of its copy's node gone", []string{"n2", "n3"}, func(s *scene) *scene {
			return s.want(ticketOn("n2")).members(1).seen("n2", attached, true).open(plan.FoundOpen, "nbd", "")
		}, "", "attached healthy n2", ""},
		{"to be detached", all, func(s *scene) *scene {
			return s.want().members(1).seen("n2", attached, true).open(plan.FoundOpen, "nbd", "")
		}, "close-volume", "detaching unknown n2", ""},
		{"to be detached, its copy away", all, func(s *scene) *scene {
			return away(s.want().members(1).seen("n2", attached, true).open(plan.FoundOpen, "nbd", ""))
		}, "close-volume!", "detaching unknown n2", "does not answer"},
		{"wanted on another node", all, func(s *scene) *scene {
			return s.want(ticketOn("n3")).members(1).seen("n2", attached, true).open(plan.FoundOpen, "nbd", "")
		}, "close-volume", "detaching unknown n2", ""},
		{"wanted on another node, closed", all, func(s *scene) *scene {
			return s.want(ticketOn("n3")).members(1).seen("n2", catalog.VolumeDetaching, true)
		}, "", "detached unknown ", ""},
		{"another has it", all, func(s *scene) *scene {
			return s.want(ticketOn("n3")).members(2).seen("n3", attached, true).open(plan.FoundOpen, "nbd", "")
		}, "close-volume!", "", ""},
		{"another has it, and it knows", all, func(s *scene) *scene {
			return s.want(ticketOn("n3")).members(2).seen("n3", attached, true).open(plan.FoundFailed, "nbd", catalog.CodeConflict)
		}, "close-volume!", "", ""},
		{"another is about to have it", all, func(s *scene) *scene {
			return s.want(ticketOn("n3")).members(1).seen("n3", attaching, true).open(plan.FoundOpen, "nbd", "")
		}, "close-volume", "", ""},
		{"another has it, this one closes", all, func(s *scene) *scene {
			return s.want(ticketOn("n3")).members(2).seen("n3", attached, true).open(plan.FoundClosing, "nbd", "")
		}, "", "", ""},
		{"the catalogue is older than what runs here", all, func(s *scene) *scene {
			return s.want(ticketOn("n3")).members(0).seen("n3", attached, true).open(plan.FoundOpen, "nbd", "")
		}, "", "", ""},
		{"no membership record", all, func(s *scene) *scene {
			return s.want(ticketOn("n3")).seen("n3", attached, true).open(plan.FoundOpen, "nbd", "")
		}, "", "", ""},
		{"not this node's", all, func(s *scene) *scene { return s.want(ticketOn("n3")).members(1).seen("n3", attached, true) }, "", "", ""},
		{"a snapshot of it is", all, func(s *scene) *scene {
			return s.want(ticketOn("n2")).members(1).seen("n2", attached, true).open(plan.FoundOpen, "nbd", "").op(catalog.VerbSnapshot, catalog.OperationPending)
		}, "operate", "attached healthy n2", ""},
		{"deleted, its copy's node gone", []string{"n2", "n3"}, func(s *scene) *scene { return s.want(tombstone).members(1).seen("", detached, true) }, "", "deleting unknown ", "is deleted when that node is back"},
		{"its copy's disk was given up", all, func(s *scene) *scene {
			return lostOn1(s).want(ticketOn("n2")).members(1).seen("n2", attaching, true)
		}, "", "detached faulted ", "its only copy was on disk d of node n1, which was given up; `ashlar volume delete v` forgets it"},
		{"open, its copy's disk was given up", all, func(s *scene) *scene {
			return lostOn1(s).want(ticketOn("n2")).members(1).seen("n2", attached, true).open(plan.FoundFailed, "nbd", catalog.CodeInternal)
		}, "", "detached faulted n2", "was given up"},
		{"to be detached, its copy's disk was given up", all, func(s *scene) *scene {
			return lostOn1(s).want().members(1).seen("n2", attached, true).open(plan.FoundOpen, "nbd", "")
		}, "close-volume!", "detaching faulted n2", "was given up"},
		{"deleted, open, its copy's disk was given up", all, func(s *scene) *scene {
			return lostOn1(s).want(tombstone).members(1).seen("n2", attached, true).open(plan.FoundOpen, "nbd", "")
		}, "close-volume!", "deleting unknown n2", ""},
		{"deleted, open", all, func(s *scene) *scene {
			return s.want(tombstone).members(1).seen("n2", attached, true).open(plan.FoundOpen, "nbd", "")
		}, "close-volume", "deleting unknown n2", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := c.scene(remote(t, c.up...))
			p := plan.OnNode(s.in)
			got := verbs(p.Actions)
			for _, a := range p.Actions {
				if o, ok := a.(plan.OpenVolume); ok {
					got += "@" + o.ReplicaNode
				}
				if x, ok := a.(plan.CloseVolume); ok && x.Force {
					got += "!"
				}
			}
			if got != c.do {
				t.Errorf("does %q, want %q", got, c.do)
			}
			o, wrote := find[catalog.VolumeObserved](p.Writes)
			if !wrote && c.shows != "" {
				o = s.v.Volumes["v"].Observed.Value
			}
			if shows := fmt.Sprintf("%s %s %s", o.State, o.Robustness, o.Node); c.shows != "" && shows != c.shows || c.shows == "" && wrote {
				t.Errorf("shows %q, want %q", shows, c.shows)
			}
			if (c.error == "") != (o.Error == "") || !strings.Contains(o.Error, c.error) {
				t.Errorf("error %q, want %q", o.Error, c.error)
			}
		})
	}
}

// TestReplicaElsewhere: what a node does for its replicas, wherever the volume's home is, and what it says of them.
func TestReplicaElsewhere(t *testing.T) {
	all := []string{"n1", "n2", "n3"}
	home := func(s *scene) *scene { // n1's picture instead of n2's
		s.in.Node, s.in.Joined = "n1", &plan.Joined{ClusterID: "c", NodeID: "id-n1", Host: "n1", Port: 100}
		s.in.Found.Disks = []plan.FoundDisk{{DiskID: "n1-d", Path: "/n1", TotalBytes: 100 * gib, FreeBytes: 50 * gib}}
		s.in.Found.Cluster = plan.Neighbours{ClusterID: "c", Node: "n1", Listen: "n1:103", Peers: []plan.Neighbour{
			{Node: "n2", NodeID: "id-n2", Data: "n2:103", Ledger: "n2:100"}, {Node: "n3", NodeID: "id-n3", Data: "n3:103", Ledger: "n3:100"},
		}}
		return s
	}
	copied := func(w *catalog.VolumeWanted) {
		w.Replicas = append(w.Replicas, catalog.Placement{ReplicaID: "copy", Node: "n1", DiskID: "n1-d", CopyOf: "rep-v"})
		w.Replicas[0].Node, w.Replicas[0].DiskID = "n3", "n3-d"
	}
	dropped := func(w *catalog.VolumeWanted) {
		w.Dropped = []catalog.Placement{{ReplicaID: "old", Node: "n1", DiskID: "n1-d"}}
		w.Replicas[0].Node, w.Replicas[0].DiskID = "n3", "n3-d"
	}
	has := func(s *scene, id string) *scene {
		d := &s.in.Found.Disks[0]
		d.Replicas = append(d.Replicas, plan.FoundReplica{ReplicaID: id, VolumeID: "id-v", Volume: "v", DataPath: "/x", SizeBytes: gib, AllocatedBytes: 4096})
		return s
	}
	job := func(s *scene, state string) *scene {
		s.in.Found.Jobs = append(s.in.Found.Jobs, plan.FoundJob{ID: "copy", Copy: true, State: state, Code: catalog.CodeConflict, Error: "no"})
		return s
	}
	for _, c := range []struct {
		name  string
		scene func(*scene) *scene
		do    string
		says  string // of the replica here: made, not made, or nothing
	}{
		{"to be made, attached elsewhere", func(s *scene) *scene { return s.want(ticketOn("n2")).members(0) }, "create-replica", ""},
		{"made", func(s *scene) *scene { return s.want(ticketOn("n2")).members(0).replica() }, "", "made"},
		{"written to, and gone", func(s *scene) *scene { return s.want(ticketOn("n2")).members(1) }, "", "not made"},
		{"its disk is away", func(s *scene) *scene { s.in.Found.Disks = nil; return s.want(ticketOn("n2")).members(1) }, "adopt-disk", "made"},
		{"deleted, still open elsewhere", func(s *scene) *scene {
			return s.want(tombstone).members(1).replica().seen("n2", catalog.VolumeDetaching, true)
		}, "", "made"},
		{"deleted", func(s *scene) *scene {
			return s.want(tombstone).members(1).replica().seen("", catalog.VolumeDeleting, true)
		}, "delete-replica", "made"},
		{"deleted and gone", func(s *scene) *scene { return s.want(tombstone).members(1).seen("", catalog.VolumeDeleting, true) }, "", "not made"},
		{"deleted while it is made", func(s *scene) *scene {
			s.in.Busy["replica/rep-v"] = true
			return s.want(tombstone).members(0).seen("", catalog.VolumeDeleting)
		}, "", "made"},
		{"deleted, its disk away", func(s *scene) *scene {
			s.in.Found.Disks = nil
			return s.want(tombstone).members(1).seen("", catalog.VolumeDeleting, false)
		}, "adopt-disk", "made"},

		{"a copy to be made", func(s *scene) *scene { return s.want(copied).members(1) }, "copy-replica", ""},
		{"a copy to be made, image missing", func(s *scene) *scene { return s.want(copied, fromImage).members(1) }, "", ""},
		{"a copy to be made, attached", func(s *scene) *scene { return s.want(copied, ticketOn("n2")).members(1) }, "", ""},
		{"a copy to be made, still open", func(s *scene) *scene { return s.want(copied).members(1).seen("n2", catalog.VolumeDetaching) }, "", ""},
		{"a copy to be made, something to do first", func(s *scene) *scene {
			return s.want(copied).members(1).op(catalog.VerbExpand, catalog.OperationPending)
		}, "", ""},
		{"a copy being made", func(s *scene) *scene { return job(s.want(copied).members(1), plan.JobRunning) }, "", "made"},
		{"a copy that failed", func(s *scene) *scene { return job(s.want(copied).members(1), plan.JobFailed) }, "end-copy", "made"},
		{"a copy that failed lately", func(s *scene) *scene {
			s.want(copied).members(1)
			s.in.Failures["end-copy replica/copy"] = plan.Failure{Rev: s.v.Volumes["v"].Wanted.Rev, Next: now.Add(1)}
			return s
		}, "", ""},
		{"a copy that was interrupted, in parts on the disk", func(s *scene) *scene { return has(s.want(copied).members(1), "copy") }, "copy-replica", "made"},
		{"a copy that has taken its place", func(s *scene) *scene {
			s.put(catalog.MembershipKey("id-v"), plan.OneMember("id-v", "copy", "n1", 2))
			return job(has(s.want(copied), "copy"), plan.JobDone)
		}, "end-copy", "made"},
		{"deleted under the copying", func(s *scene) *scene { return job(s.want(copied, tombstone).members(1), plan.JobRunning) }, "end-copy", "made"},

		{"dropped", func(s *scene) *scene { return has(s.want(dropped).members(1), "old") }, "delete-replica", "made"},
		{"dropped and gone", func(s *scene) *scene { return s.want(dropped).members(1) }, "", "not made"},
		{"dropped, and yet a member", func(s *scene) *scene {
			s.put(catalog.MembershipKey("id-v"), plan.OneMember("id-v", "old", "n1", 2))
			return has(s.want(dropped), "old")
		}, "", "made"},
		{"a copy that nobody wants any more", func(s *scene) *scene {
			return job(s.want(func(w *catalog.VolumeWanted) { w.Replicas[0].Node = "n3" }).members(1), plan.JobRunning)
		}, "forget-job", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := c.scene(home(remote(t, all...)))
			p := plan.OnNode(s.in)
			if got := verbs(p.Actions); got != c.do {
				t.Errorf("does %q, want %q", got, c.do)
			}
			o, ok := find[catalog.VolumeObserved](p.Writes)
			if !ok {
				o = s.v.Volumes["v"].Observed.Value
			}
			says := ""
			for _, r := range o.Replicas {
				if r.Node == "n1" {
					says = map[bool]string{true: "made", false: "not made"}[r.Created]
					for _, d := range s.in.Found.Disks {
						for _, f := range d.Replicas {
							if f.ReplicaID == r.ReplicaID && (r.DataPath != f.DataPath || r.AllocatedBytes != f.AllocatedBytes) {
								t.Errorf("says that it is at %q with %d bytes, found at %q with %d", r.DataPath, r.AllocatedBytes, f.DataPath, f.AllocatedBytes)
							}
						}
					}
				}
			}
			if says != c.says {
				t.Errorf("says %q, want %q", says, c.says)
			}
		})
	}
}

// TestOthersReplicas: what other nodes said of their replicas stays as they said it.
func TestOthersReplicas(t *testing.T) {
	s := remote(t, "n1", "n2", "n3").want(ticketOn("n2")).members(1).open(plan.FoundOpen, "nbd", "")
	s.put(catalog.VolumeKey(catalog.Observed, "v"), catalog.VolumeObserved{Name: "v", ID: "id-v", Node: "n2", State: catalog.VolumeAttaching, Replicas: []catalog.ReplicaObserved{
		{ReplicaID: "rep-v", Node: "n1", DiskID: "n1-d", DataPath: "/there", AllocatedBytes: 7, Created: true}, {ReplicaID: "forgotten", Node: "n3"},
	}})
	o := volumeOf(plan.OnNode(s.in))
	if len(o.Replicas) != 1 || o.Replicas[0].DataPath != "/there" || o.Replicas[0].AllocatedBytes != 7 || !o.Replicas[0].Running || o.Replicas[0].Mode != "RW" {
		t.Errorf("%+v", o.Replicas)
	}
	was := s.v.Volumes["v"].Observed.Value.Replicas
	if len(was) != 2 || was[0].Running {
		t.Errorf("the picture was changed: %+v", was)
	}
}

// TestPeers: whom the data process is told of.
func TestPeers(t *testing.T) {
	told := func(s *scene) string {
		for _, a := range plan.OnNode(s.in).Actions {
			if c, ok := a.(plan.SetCluster); ok {
				out := c.Cluster.Listen
				for _, p := range c.Cluster.Peers {
					out += " " + p.Node + "/" + p.NodeID + "/" + p.Data + "/" + p.Ledger
				}
				return out
			}
		}
		return "nothing"
	}
	all := []string{"n1", "n2"} // who lives does not matter: who is away is still a member
	change := func(s *scene, node string, fn func(*catalog.NodeWanted, *catalog.NodeObserved)) *scene {
		n := s.v.Nodes[node]
		fn(&n.Wanted.Value, &n.Observed.Value)
		s.put(catalog.NodeKey(catalog.Wanted, node), n.Wanted.Value).put(catalog.NodeKey(catalog.Observed, node), n.Observed.Value)
		return s
	}
	for name, c := range map[string]struct {
		scene *scene
		want  string
	}{
		"as told": {remote(t, all...), "nothing"},
		"a node was removed": {change(remote(t, all...), "n3", func(w *catalog.NodeWanted, _ *catalog.NodeObserved) { w.Deleted = &now }),
			"n2:103 n1/id-n1/n1:103/n1:100"},
		"a node moved": {change(remote(t, all...), "n3", func(_ *catalog.NodeWanted, o *catalog.NodeObserved) { o.Address, o.Port = "::3", 7 }),
			"n2:103 n1/id-n1/n1:103/n1:100 n3/id-n3/[::3]:10/[::3]:7"},
		"a node that is in no cluster": {change(remote(t, all...), "n3", func(_ *catalog.NodeWanted, o *catalog.NodeObserved) { o.Port = 0 }), "n2:103 n1/id-n1/n1:103/n1:100"},
		"started again": {func() *scene { s := remote(t, all...); s.in.Found.Cluster = plan.Neighbours{}; return s }(),
			"n2:103 n1/id-n1/n1:103/n1:100 n3/id-n3/n3:103/n3:100"},
		"too old to be told": {func() *scene {
			s := remote(t, all...)
			s.in.Found.Cluster, s.in.Found.API = plan.Neighbours{}, 2
			return s
		}(), "nothing"},
		"no cluster any more": {func() *scene { s := remote(t, all...); s.in.Joined = nil; return s }(), ""},
	} {
		if got := told(c.scene); got != c.want {
			t.Errorf("%s: told %q, want %q", name, got, c.want)
		}
	}
}

// TestCopiesOfImages: where a copy comes from when there are others.
func TestCopiesOfImages(t *testing.T) {
	w := func(source string) catalog.ImageWanted {
		return catalog.ImageWanted{Name: "i", ID: "id-i", SourceType: source, Parameters: map[string]string{"url": "http://x", "volume-name": "v"}, Disks: []string{"n1-d", "n2-d"}}
	}
	is := func(state string) catalog.ImageOnDisk { return catalog.ImageOnDisk{State: state} }
	for _, c := range []struct {
		name, source, here, there, digest string
		up                                []string
		do, from, says                    string
	}{
		{"the other is ready", catalog.SourceDownload, "pending", "ready", "d", []string{"n1", "n2"}, "import-image", "peer://n1/n1-d", ""},
		{"the other is ready, its content's digest not known", catalog.SourceDownload, "pending", "ready", "", []string{"n1", "n2"}, "import-image", "http://x", ""},
		{"the other is ready on a node that is gone", catalog.SourceDownload, "pending", "ready", "d", []string{"n2"}, "import-image", "http://x", ""},
		{"the other is being made", catalog.SourceDownload, "pending", "in-progress", "", []string{"n1", "n2"}, "", "", "waiting for the copy on node n1"},
		{"the other was being made on a node that is gone", catalog.SourceDownload, "pending", "starting", "", []string{"n2"}, "import-image", "http://x", ""},
		{"both were begun, the first goes on", catalog.SourceDownload, "starting", "starting", "", []string{"n1", "n2"}, "", "", ""},
		{"uploaded there", catalog.SourceUpload, "pending", "ready", "d", []string{"n1", "n2"}, "import-image", "peer://n1/n1-d", ""},
		{"uploaded there, interrupted here", catalog.SourceUpload, "starting", "ready", "d", []string{"n1", "n2"}, "import-image", "peer://n1/n1-d", ""},
		{"uploaded there, which is gone", catalog.SourceUpload, "pending", "ready", "d", []string{"n2"}, "", "", "waiting for that on node n1"},
		{"being uploaded there", catalog.SourceUpload, "pending", "starting", "", []string{"n1", "n2"}, "", "", "waiting for the copy on node n1"},
		{"made there from a volume", catalog.SourceVolume, "pending", "ready", "d", []string{"n1", "n2"}, "import-image", "peer://n1/n1-d", ""},
		{"to be made from a volume that is there", catalog.SourceVolume, "pending", "pending", "", []string{"n1", "n2"}, "", "", "volume v is on node n1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := remote(t, c.up...).want().members(1)
			s.put(catalog.ImageKey(catalog.Wanted, "i"), w(c.source)).put(catalog.ImageKey(catalog.Observed, "i"), catalog.ImageObserved{
				Name: "i", ID: "id-i", Digest: c.digest, Disks: map[string]catalog.ImageOnDisk{"n1-d": is(c.there), "n2-d": is(c.here)},
			})
			p := plan.OnNode(s.in)
			from := ""
			for _, a := range p.Actions {
				if i, ok := a.(plan.ImportImage); ok {
					from = i.Source
				}
			}
			if got := verbs(p.Actions); got != c.do || from != c.from {
				t.Errorf("does %q from %q, want %q from %q", got, from, c.do, c.from)
			}
			o, ok := find[catalog.ImageObserved](p.Writes)
			if !ok {
				o = s.v.Images["i"].Observed.Value
			}
			if says := o.Disks["n2-d"].Message; (says == "") != (c.says == "") || !strings.Contains(says, c.says) {
				t.Errorf("says %q, want %q", says, c.says)
			}
		})
	}
}

// TestDiffSeesEveryField: whatever differs in what a data process has, what it concerns is planned again.
func TestDiffSeesEveryField(t *testing.T) {
	base := func() plan.Found {
		return plan.Found{Known: true, Disks: []plan.FoundDisk{{DiskID: "d", Replicas: []plan.FoundReplica{{ReplicaID: "r", VolumeID: "v"}}, Images: []plan.FoundImage{{ImageID: "i"}}}},
			Volumes: []plan.FoundVolume{{VolumeID: "v", Layers: []plan.FoundLayer{{ID: "l"}}}}, Jobs: []plan.FoundJob{{ID: "j"}}}
	}
	differ := func(at string, pick func(*plan.Found) any, skip ...string) {
		typ := reflect.TypeOf(pick(new(plan.Found))).Elem()
		for i := range typ.NumField() {
			f := typ.Field(i)
			if !f.IsExported() || slices.Contains(skip, f.Name) {
				continue
			}
			a, b := base(), base()
			alter(t, reflect.ValueOf(pick(&b)).Elem().Field(i))
			if c := a.Diff(&b); !c.All && !c.Space && !c.Images && !c.Jobs && !c.Things && len(c.Volumes) == 0 {
				t.Errorf("%s.%s makes no difference", at, f.Name)
			}
			if c := b.Diff(&b); c.All || c.Space || c.Images || c.Jobs || c.Things || len(c.Volumes) > 0 {
				t.Errorf("%s.%s: the same differs: %+v", at, f.Name, c)
			}
		}
	}
	first := func(f *plan.Found) *plan.Found {
		if len(f.Disks) == 0 {
			*f = base()
		}
		return f
	}
	differ("Found", func(f *plan.Found) any { return first(f) }, "Disks", "Volumes", "Jobs")
	differ("FoundDisk", func(f *plan.Found) any { return &first(f).Disks[0] }, "Replicas", "Images")
	differ("FoundReplica", func(f *plan.Found) any { return &first(f).Disks[0].Replicas[0] })
	differ("FoundImage", func(f *plan.Found) any { return &first(f).Disks[0].Images[0] })
	differ("FoundVolume", func(f *plan.Found) any { return &first(f).Volumes[0] }, "Layers")
	differ("FoundLayer", func(f *plan.Found) any { return &first(f).Volumes[0].Layers[0] })
	differ("FoundJob", func(f *plan.Found) any { return &first(f).Jobs[0] })
}

// alter makes a value another than it is.
func alter(t *testing.T, v reflect.Value) {
	t.Helper()
	switch v.Kind() {
	case reflect.String:
		v.SetString(v.String() + "x")
	case reflect.Bool:
		v.SetBool(!v.Bool())
	case reflect.Int, reflect.Int64:
		v.SetInt(v.Int() + 1)
	case reflect.Uint64:
		v.SetUint(v.Uint() + 1)
	case reflect.Map:
		v.Set(reflect.ValueOf(map[string]string{"x": "y"}))
	case reflect.Struct:
		if _, ok := v.Interface().(time.Time); ok {
			v.Set(reflect.ValueOf(now))
			return
		}
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() && v.Field(i).Kind() != reflect.Slice {
				alter(t, v.Field(i))
				return
			}
		}
	default:
		t.Fatalf("cannot alter a %v", v.Kind())
	}
}
