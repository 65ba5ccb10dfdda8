package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/catalog"
)

// inCluster runs f with a fixture whose catalogue has only the records it is given: n1 (which answers), n2 and n3 live, n4 is silent, n5 lives and is not ready, n6 has joined and
// not reported. Each but n6 has a disk, whose id is that of its name.
func inCluster(t *testing.T, cfg Config, f func(*fixture)) {
	synctest.Test(t, func(t *testing.T) {
		mem := catalog.NewMem()
		defer mem.Close()
		cfg.Catalog, cfg.Node, cfg.Version, cfg.Random = mem, "n1", "v0.1.0", &counter{}
		x := &fixture{t: t, mem: mem, h: New(cfg)}
		var err error
		if x.schema, err = theDocument(); err != nil {
			t.Fatal(err)
		}
		yes := catalog.Condition{Status: catalog.ConditionTrue, LastTransitionTime: time.Now()}
		for i := range 6 {
			name := fmt.Sprintf("n%d", i+1)
			record(x, catalog.NodeKey(catalog.Wanted, name), catalog.NodeWanted{Name: name, ID: id("node" + name), Voter: i < 3, AllowScheduling: true, Zone: "z" + name,
				Disks: map[string]catalog.DiskWanted{"default": {Path: "/d", AllowScheduling: true}}})
			if name == "n6" {
				continue
			}
			o := catalog.NodeObserved{Name: name, Address: "192.0.2." + name[1:], Port: 9510, Member: map[bool]string{true: "voter"}[i < 3], Ready: name != "n5", Version: "v1",
				Data:       catalog.DataObserved{Version: "v1", PID: 7},
				Conditions: map[string]catalog.Condition{catalog.ConditionReady: {Status: catalog.ConditionTrue, LastTransitionTime: time.Now()}},
				Disks:      map[string]catalog.DiskObserved{"default": {DiskID: id(name), Conditions: map[string]catalog.Condition{catalog.ConditionReady: yes, catalog.ConditionSchedulable: yes}}}}
			if name == "n5" {
				o.Conditions[catalog.ConditionReady] = catalog.Condition{Status: catalog.ConditionFalse, Reason: "DataProcessAway", Message: "no data process"}
			}
			record(x, catalog.NodeKey(catalog.Observed, name), o)
			if name != "n4" {
				record(x, catalog.AliveKey(name), catalog.Alive{Node: name, Since: time.Now()})
			}
		}
		f(x)
	})
}

func record[T any](x *fixture, k catalog.Key, v T) {
	x.t.Helper()
	if _, _, err := catalog.Upsert(x.t.Context(), x.mem, k, func(was *T) error { *was = v; return nil }); err != nil {
		x.t.Fatal(err)
	}
}

// placed makes a volume with its copy on a node, attached to another ("": detached).
func (x *fixture) placed(name, copyOn, attachedTo string) {
	x.t.Helper()
	w := catalog.VolumeWanted{Name: name, ID: id(name), SizeBytes: MinSize, Copies: 1, Frontend: catalog.FrontendNBD,
		Replicas: []catalog.Placement{{ReplicaID: id("r" + name), Node: copyOn, DiskID: id(copyOn)}}}
	o := catalog.VolumeObserved{Name: name, ID: id(name), SizeBytes: MinSize, State: catalog.VolumeDetached, Robustness: catalog.RobustnessUnknown,
		Replicas: []catalog.ReplicaObserved{{ReplicaID: id("r" + name), Node: copyOn, DiskID: id(copyOn), DataPath: "replicas/" + name, Created: true}}}
	if attachedTo != "" {
		w.Tickets = []catalog.Ticket{{Node: attachedTo, Kind: catalog.TicketAPI}}
		o.State, o.Node, o.Robustness, o.Endpoint, o.Replicas[0].Running, o.Replicas[0].Mode = catalog.VolumeAttached, attachedTo, catalog.RobustnessHealthy, "nbd+unix:///x?socket=/x", true, "RW"
	}
	record(x, catalog.VolumeKey(catalog.Wanted, name), w)
	record(x, catalog.VolumeKey(catalog.Observed, name), o)
}

// copied makes an image with copies on nodes.
func (x *fixture) copied(name string, min int, nodes ...string) {
	x.t.Helper()
	w := catalog.ImageWanted{Name: name, ID: id(name), SourceType: catalog.SourceUpload, MinCopies: min}
	o := catalog.ImageObserved{Name: name, ID: id(name), CurrentChecksum: "c", VirtualSizeBytes: 1 << 20, Disks: map[string]catalog.ImageOnDisk{}}
	for _, n := range nodes {
		w.Disks = append(w.Disks, id(n))
		o.Disks[id(n)] = catalog.ImageOnDisk{State: catalog.ImageReady, Progress: 100}
	}
	record(x, catalog.ImageKey(catalog.Wanted, name), w)
	record(x, catalog.ImageKey(catalog.Observed, name), o)
}

// get decodes an answer.
func get[T any](x *fixture, path string) T {
	x.t.Helper()
	var v T
	if err := json.Unmarshal(x.want(200, "GET", path, "").raw, &v); err != nil {
		x.t.Fatal(err)
	}
	return v
}

// TestWhoLeads: the node whose control plans for all is shown, among the nodes and in the overview.
func TestWhoLeads(t *testing.T) {
	inCluster(t, Config{}, func(x *fixture) {
		for _, want := range []string{"", "n2", "n3"} {
			if want != "" {
				record(x, catalog.LeaderKey(), catalog.Leader{Node: want})
			}
			o := get[Overview](x, "/v1/overview")
			if o.Leader != want {
				t.Errorf("the overview says %q leads, not %q", o.Leader, want)
			}
			for _, n := range o.Nodes {
				if leads := n.Name == want; n.Leads != leads || get[Node](x, "/v1/nodes/"+n.Name).Leads != leads {
					t.Errorf("%s leads: %v", n.Name, n.Leads)
				}
			}
		}
	})
}

// TestNodesOfACluster: what a node cannot say itself is said for it.
func TestNodesOfACluster(t *testing.T) {
	inCluster(t, Config{}, func(x *fixture) {
		x.copied("debian", 2, "n2", "n4")
		x.placed("db4", "n4", "")
		type row struct{ state, ready, reason, schedulable, why string }
		check := func(name string, want row) {
			t.Helper()
			n := get[Node](x, "/v1/nodes/"+name)
			r, s := n.Conditions["Ready"], n.Conditions["Schedulable"]
			if got := (row{n.State, r.Status, r.Reason, s.Status, s.Reason}); got != want {
				t.Errorf("%s: %+v, want %+v (%s; %s)", name, got, want, r.Message, s.Message)
			}
			if n.Conditions["MountPropagation"].Status != "True" || n.Zone != "" || n.Region != "" || n.PlacementZone != "z"+name {
				t.Errorf("%s: %+v", name, n)
			}
			if r.Status == "False" && r.Message == "" || s.Status == "False" && s.Message == "" {
				t.Errorf("%s says no reason: %+v", name, n.Conditions)
			}
		}
		check("n1", row{NodeUp, "True", "", "True", ""})
		check("n4", row{NodeDown, "False", "NodeDown", "False", "NodeDown"})
		check("n5", row{NodeNotReady, "False", "DataProcessAway", "False", "DataProcessAway"})
		check("n6", row{NodeNotReady, "False", "NotSeen", "False", "NotSeen"})
		x.want(200, "PUT", "/v1/nodes/n2", `{"allowScheduling":false}`)
		check("n2", row{NodeUp, "True", "", "False", "AllowSchedulingFalse"})
		x.want(200, "POST", "/v1/nodes/n3?action=diskChange", `{"disk":"default","allowScheduling":false}`)
		check("n3", row{NodeUp, "True", "", "False", "NoSchedulableDisk"})
		now := time.Now().UTC()
		record(x, catalog.NodeKey(catalog.Wanted, "n6"), catalog.NodeWanted{Name: "n6", Zone: "zn6", Deleted: &now})
		if n := get[Node](x, "/v1/nodes/n6"); n.State != NodeLeaving || n.DeletionTimestamp != stamp(now) {
			t.Errorf("%+v", n)
		}
		if d := get[Node](x, "/v1/nodes/n4"); d.Disks["default"].Conditions["Ready"].Status != "False" || d.DataPID != 0 {
			t.Errorf("disks of a silent node: %+v", d.Disks)
		}
		// Since when is known once control has noted it.
		record(x, catalog.EventKey("e"), catalog.EventRecord{ID: "e", Kind: catalog.KindNode, Name: "n4", Reason: catalog.ReasonNodeDown, Time: now, Type: catalog.Warning})
		if r := get[Node](x, "/v1/nodes/n4").Conditions["Ready"]; r.LastTransitionTime != stamp(now) || !strings.Contains(r.Message, stamp(now)) {
			t.Errorf("%+v", r)
		}
		images := get[Collection[EngineImage]](x, "/v1/engineimages").Data
		if m := images[0].NodeDeploymentMap; len(m) != 6 || !m["n1"] || m["n4"] || m["n5"] {
			t.Errorf("%v", m)
		}
		states := ""
		for _, m := range get[Collection[InstanceManager]](x, "/v1/instancemanagers").Data {
			states += m.NodeID + " " + m.CurrentState + ", "
		}
		if states != "n1 running, n2 running, n3 running, n4 unknown, n5 unknown, n6 unknown, " {
			t.Error(states)
		}
		img := get[BackingImage](x, "/v1/backingimages/debian").DiskFileStatusMap
		if img[id("n2")].State != "ready" || img[id("n4")].State != "unknown" || !strings.Contains(img[id("n4")].Message, "n4 is down") {
			t.Errorf("%+v", img)
		}
		if v := x.volume("db4"); !strings.Contains(v.Error, "n4") || v.Replicas[0].HostID != "n4" || v.Replicas[0].DiskPath != "/d" || v.Replicas[0].DataPath != "/d/replicas/db4" {
			t.Errorf("%+v", v)
		}
	})
}

// TestVolumeOnASilentNode: nobody can say how it is; it can be taken from there, and attached elsewhere.
func TestVolumeOnASilentNode(t *testing.T) {
	inCluster(t, Config{}, func(x *fixture) {
		x.placed("db1", "n2", "n4")
		v := x.volume("db1")
		if v.State != "attached" || v.Robustness != "unknown" || v.Controllers[0].Running || v.Controllers[0].HostID != "n4" || v.Controllers[0].Endpoint != "" || !strings.Contains(v.Error, "n4") {
			t.Errorf("%+v", v)
		}
		x.refused(CodeConflict, "POST", "/v1/volumes/db1?action=attach", `{"hostId":"n2"}`, "n4, which is down", "detach db1 --force")
		x.want(200, "POST", "/v1/volumes/db1?action=detach", `{"hostId":"n4"}`)
		if v := x.volume("db1"); v.State != "detached" || v.Error != "" {
			t.Errorf("%+v", v)
		}
		x.want(200, "POST", "/v1/volumes/db1?action=attach", `{"hostId":"n2"}`)
		if v := x.volume("db1"); v.State != "attaching" || v.Controllers[0].HostID != "n2" || v.Controllers[0].Running {
			t.Errorf("%+v", v)
		}
		x.placed("db2", "n1", "n2")
		x.refused(CodeConflict, "POST", "/v1/volumes/db2?action=attach", `{"hostId":"n3"}`, "attached to node n2")
		x.placed("db3", "n1", "")
		x.refused(CodeUnreachable, "POST", "/v1/volumes/db3?action=attach", `{"hostId":"n4"}`, "n4 is down")
		x.refused(CodeUnreachable, "POST", "/v1/volumes/db3?action=attach", `{"hostId":"n5"}`, "n5 is not ready")
		x.refused(CodeNotFound, "POST", "/v1/volumes/db3?action=attach", `{"hostId":"n9"}`, "no node", "n1, n2")
		record(x, catalog.VolumeKey(catalog.Wanted, "db4"), catalog.VolumeWanted{Name: "db4", ID: id("db4"), Copies: 1})
		record(x, catalog.VolumeKey(catalog.Observed, "db4"), catalog.VolumeObserved{Name: "db4", ID: id("db4"), State: catalog.VolumeDetached,
			Conditions: map[string]catalog.Condition{catalog.ConditionScheduled: {Status: catalog.ConditionFalse, Message: "no disk has room"}}})
		x.refused(CodeConflict, "POST", "/v1/volumes/db4?action=attach", `{"hostId":"n1"}`, "no scheduled replicas", "no disk has room")
		// The node comes back: its word counts again.
		x.placed("db5", "n4", "n4")
		record(x, catalog.AliveKey("n4"), catalog.Alive{Node: "n4"})
		if v := x.volume("db5"); v.State != "attached" || v.Robustness != "healthy" || !v.Controllers[0].Running || v.Error != "" {
			t.Errorf("%+v", v)
		}
	})
}

// TestRemoveRunningNode: a node that runs is removed when it was emptied, by another one, and while those who are left can agree.
func TestRemoveRunningNode(t *testing.T) {
	inCluster(t, Config{}, func(x *fixture) {
		emptied := func(name string) {
			record(x, catalog.NodeKey(catalog.Wanted, name), catalog.NodeWanted{Name: name, ID: id("node" + name), Voter: true, EvictionRequested: true})
		}
		emptied("n1")
		x.refused(CodeConflict, "DELETE", "/v1/nodes/n1", "", "ask another node")
		emptied("n2")
		x.refused(CodeConflict, "DELETE", "/v1/nodes/n2?force=true", "", "n2 is running")
		x.placed("db1", "n2", "")
		x.refused(CodeInUse, "DELETE", "/v1/nodes/n2", "", "copies of volumes: db1")
		x.clear(catalog.KindVolume)
		e, err := x.mem.Get(t.Context(), catalog.AliveKey("n3"))
		if err == nil {
			err = x.mem.Delete(t.Context(), e.Key, e.Rev)
		}
		if err != nil {
			t.Fatal(err)
		}
		x.refused(CodeConflict, "DELETE", "/v1/nodes/n2", "", "too few could agree", "n3")
		record(x, catalog.AliveKey("n3"), catalog.Alive{Node: "n3"})
		x.want(200, "DELETE", "/v1/nodes/n2", "")
		if w, _, err := catalog.Read[catalog.NodeWanted](t.Context(), x.mem, catalog.NodeKey(catalog.Wanted, "n2")); err != nil || w.Deleted == nil || w.Lost {
			t.Errorf("%+v %v", w, err)
		}
	})
}

// TestRemoveNode: only who is stopped and has nothing; by force who is dead.
func TestRemoveNode(t *testing.T) {
	inCluster(t, Config{}, func(x *fixture) {
		x.refused(CodeConflict, "DELETE", "/v1/nodes/n2", "", "n2 is running", "drain n2", "shutdown --node n2")
		x.refused(CodeConflict, "DELETE", "/v1/nodes/n2?force=true", "", "n2 is running")
		x.refused(CodeConflict, "DELETE", "/v1/nodes/n5?force=true", "", "n5 is running") // its serve lives, though its data process is away
		for what, c := range map[string]struct {
			put  func()
			word string
		}{
			"a copy":       {func() { x.placed("db1", "n4", "") }, "copies of volumes: db1"},
			"an image":     {func() { x.copied("debian", 1, "n4") }, "copies of images: debian"},
			"an attached":  {func() { x.placed("db2", "n1", "n4") }, "attached there: db2"},
			"a dropped":    {func() { x.dropped("db3", "n4") }, "copies of volumes: db3"},
			"a dead image": {func() { x.goneImage("dead", "n4") }, "copies of images: dead"},
		} {
			c.put()
			x.refused(CodeInUse, "DELETE", "/v1/nodes/n4", "", "n4 still has", c.word)
			if w, _, err := catalog.Read[catalog.NodeWanted](t.Context(), x.mem, catalog.NodeKey(catalog.Wanted, "n4")); err != nil || w.Deleted != nil {
				t.Errorf("%s: %+v %v", what, w, err)
			}
			for _, k := range []catalog.Kind{catalog.KindVolume, catalog.KindImage} {
				x.clear(k)
			}
		}
		// What is on it is given up by force, and what was to be attached there is not.
		x.placed("db1", "n4", "n4")
		x.want(200, "DELETE", "/v1/nodes/n4?force=true", "")
		w, _, err := catalog.Read[catalog.NodeWanted](t.Context(), x.mem, catalog.NodeKey(catalog.Wanted, "n4"))
		if err != nil || w.Deleted == nil || !w.Lost || w.AllowScheduling {
			t.Errorf("%+v %v", w, err)
		}
		v, _, err := catalog.Read[catalog.VolumeWanted](t.Context(), x.mem, catalog.VolumeKey(catalog.Wanted, "db1"))
		if err != nil || len(v.Tickets) != 0 || len(v.Replicas) != 1 {
			t.Errorf("%+v %v", v, err)
		}
		x.want(200, "DELETE", "/v1/nodes/n4", "") // again
		x.refused(CodeConflict, "POST", "/v1/nodes/n4?action=change", `{"allowScheduling":true}`, "being removed")
		// An empty dead node goes without force, and is not lost.
		x.want(200, "DELETE", "/v1/nodes/n6", "")
		w, _, err = catalog.Read[catalog.NodeWanted](t.Context(), x.mem, catalog.NodeKey(catalog.Wanted, "n6"))
		if err != nil || w.Deleted == nil || w.Lost {
			t.Errorf("%+v %v", w, err)
		}
	})
	// The last member of the catalogue stays, and so does the last node.
	inCluster(t, Config{}, func(x *fixture) {
		for _, n := range []string{"n2", "n3"} {
			if err := x.mem.Drop(catalog.AliveKey(n)); err != nil {
				t.Fatal(err)
			}
		}
		x.want(200, "DELETE", "/v1/nodes/n2", "") // n1 votes
		if err := x.mem.Drop(catalog.AliveKey("n1")); err != nil {
			t.Fatal(err)
		}
		x.refused(CodeConflict, "DELETE", "/v1/nodes/n3?force=true", "", "last member")
		for _, n := range []string{"n1", "n2", "n4", "n5", "n6"} {
			e, err := x.mem.Get(t.Context(), catalog.NodeKey(catalog.Wanted, n))
			if err == nil {
				err = x.mem.Delete(t.Context(), e.Key, e.Rev)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		x.refused(CodeConflict, "DELETE", "/v1/nodes/n3?force=true", "", "the last of the cluster")
	})
}

func (x *fixture) dropped(name, node string) {
	x.placed(name, "n1", "")
	_, _, err := catalog.Update(x.t.Context(), x.mem, catalog.VolumeKey(catalog.Wanted, name), func(w *catalog.VolumeWanted) error {
		w.Dropped = []catalog.Placement{{ReplicaID: id("old" + name), Node: node, DiskID: id(node)}}
		return nil
	})
	if err != nil {
		x.t.Fatal(err)
	}
}

// goneImage makes an image that is not wanted on a node any more, and still there.
func (x *fixture) goneImage(name, node string) {
	x.copied(name, 1, "n1", node)
	_, _, err := catalog.Update(x.t.Context(), x.mem, catalog.ImageKey(catalog.Wanted, name), func(w *catalog.ImageWanted) error {
		w.Disks = w.Disks[:1]
		return nil
	})
	if err != nil {
		x.t.Fatal(err)
	}
}

func (x *fixture) clear(kind catalog.Kind) {
	entries, _, err := x.mem.List(x.t.Context(), kind)
	for _, e := range entries {
		err = errors.Join(err, x.mem.Delete(x.t.Context(), e.Key, e.Rev))
	}
	if err != nil {
		x.t.Fatal(err)
	}
}

// TestEvict: refused with the reason when what is there has nowhere to go; asked once, not of what is wanted already.
func TestEvict(t *testing.T) {
	var asked []string
	full := errors.New("volume db1: no other disk has 20 GiB free")
	answer := error(nil)
	can := func(_ context.Context, node, disk string) error {
		asked = append(asked, node+"/"+disk)
		return answer
	}
	inCluster(t, Config{CanEvict: can}, func(x *fixture) {
		answer = full
		before := x.everything()
		x.refused(CodeConflict, "PUT", "/v1/nodes/n2", `{"evictionRequested":true}`, "n2 cannot be emptied", "20 GiB")
		x.refused(CodeConflict, "POST", "/v1/nodes/n2?action=change", `{"allowScheduling":false,"evictionRequested":true}`, "20 GiB")
		x.refused(CodeConflict, "POST", "/v1/nodes/n2?action=diskChange", `{"disk":"default","allowScheduling":false,"evictionRequested":true}`, "n2: disk default cannot be emptied")
		x.refused(CodeConflict, "POST", "/v1/nodes/n2?action=diskUpdate", `{"disks":{"default":{"path":"/d","evictionRequested":true}}}`, "20 GiB")
		if x.everything() != before {
			t.Error("a refusal changed something")
		}
		answer = catalog.ErrUnreachable
		x.refused(CodeUnreachable, "PUT", "/v1/nodes/n2", `{"evictionRequested":true}`)
		answer = nil
		x.want(200, "PUT", "/v1/nodes/n2", `{"evictionRequested":true}`)
		x.want(200, "POST", "/v1/nodes/n3?action=diskChange", `{"disk":"default","allowScheduling":false,"evictionRequested":true}`)
		answer, asked = full, nil
		x.want(200, "PUT", "/v1/nodes/n2", `{"evictionRequested":true,"tags":["a"]}`) // it is already
		x.want(200, "POST", "/v1/nodes/n3?action=diskChange", `{"disk":"default","tags":["a"]}`)
		if len(asked) > 0 {
			t.Errorf("asked %v", asked)
		}
		x.refused(CodeInvalid, "PUT", "/v1/nodes/n3", `{"evictionRequested":true,"allowScheduling":true}`, "cannot be emptied while")
	})
}

// TestNodeUpdateOfTheDialect: what its clients leave out becomes false or empty, but for what is ours; what they send back whole is taken.
func TestNodeUpdateOfTheDialect(t *testing.T) {
	inCluster(t, Config{}, func(x *fixture) {
		x.want(200, "PUT", "/v1/nodes/n2", `{"allowScheduling":true,"tags":["b","a","b"],"placementZone":"room-a"}`)
		if n := get[Node](x, "/v1/nodes/n2"); !slices.Equal(n.Tags, []string{"a", "b"}) || n.PlacementZone != "room-a" || n.Zone != "" {
			t.Errorf("%+v", n)
		}
		x.want(200, "PUT", "/v1/nodes/n2", `{}`)
		if n := get[Node](x, "/v1/nodes/n2"); len(n.Tags) != 0 || n.AllowScheduling || n.PlacementZone != "room-a" {
			t.Errorf("%+v", n)
		}
		x.want(200, "PUT", "/v1/nodes/n2", `{"tags":null,"allowScheduling":true,"placementZone":""}`)
		if n := get[Node](x, "/v1/nodes/n2"); n.Tags == nil || !n.AllowScheduling || n.PlacementZone != "" {
			t.Errorf("%+v", n)
		}
		// A whole object, with all that is read-only, and one disk more.
		n := get[Node](x, "/v1/nodes/n2")
		d := n.Disks["default"]
		d.Tags = []string{"ssd", "fast"}
		n.Disks["default"] = d
		n.Disks["more"] = Disk{Path: "/more", AllowScheduling: true}
		data, err := json.Marshal(map[string]any{"disks": n.Disks})
		if err != nil {
			t.Fatal(err)
		}
		x.want(200, "POST", "/v1/nodes/n2?action=diskUpdate", string(data))
		n = get[Node](x, "/v1/nodes/n2")
		if len(n.Disks) != 2 || !slices.Equal(n.Disks["default"].Tags, []string{"fast", "ssd"}) || n.Disks["default"].DiskUUID != id("n2") {
			t.Errorf("%+v", n.Disks)
		}
		// Ours changes one thing and leaves the rest.
		x.want(200, "POST", "/v1/nodes/n2?action=diskChange", `{"disk":"more","storageReserved":4096}`)
		x.want(200, "POST", "/v1/nodes/n2?action=change", `{"placementZone":"b"}`)
		n = get[Node](x, "/v1/nodes/n2")
		if m := n.Disks["more"]; m.StorageReserved != 4096 || !m.AllowScheduling || m.Path != "/more" || len(n.Disks["default"].Tags) != 2 || !n.AllowScheduling || n.PlacementZone != "b" {
			t.Errorf("%+v", n)
		}
	})
}

// TestRemoveDisk: refused while the records have something on it, also what its node has not seen yet.
func TestRemoveDisk(t *testing.T) {
	inCluster(t, Config{}, func(x *fixture) {
		x.want(200, "POST", "/v1/nodes/n2?action=diskChange", `{"disk":"default","allowScheduling":false}`)
		x.placed("db1", "n2", "")
		x.refused(CodeInUse, "POST", "/v1/nodes/n2?action=diskRemove", `{"disk":"default"}`, "1 replicas and 0 images", "ashlar disk evict n2/default")
		x.refused(CodeInUse, "POST", "/v1/nodes/n2?action=diskUpdate", `{"disks":{}}`, "1 replicas")
		x.clear(catalog.KindVolume)
		x.copied("debian", 1, "n2")
		x.refused(CodeInUse, "POST", "/v1/nodes/n2?action=diskRemove", `{"disk":"default"}`, "0 replicas and 1 images")
		x.clear(catalog.KindImage)
		x.want(200, "POST", "/v1/nodes/n2?action=diskRemove", `{"disk":"default"}`)
		if n := get[Node](x, "/v1/nodes/n2"); len(n.Disks) != 0 || n.Conditions["Schedulable"].Reason != "NoSchedulableDisk" {
			t.Errorf("%+v", n)
		}
	})
}

// TestDiskIsReady: a disk that is away, and one of a node that is, can be alarmed about: neither is a matter of the node's own readiness.
func TestDiskIsReady(t *testing.T) {
	inCluster(t, Config{}, func(x *fixture) {
		_, _, err := catalog.Update(t.Context(), x.mem, catalog.NodeKey(catalog.Observed, "n2"), func(o *catalog.NodeObserved) error {
			o.Disks["default"].Conditions[catalog.ConditionReady] = catalog.Condition{Status: catalog.ConditionFalse, Message: "not mounted"}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		w := newRecorder()
		x.h.ServeHTTP(w, onLoopback(httptest.NewRequest("GET", "/metrics", nil)))
		text := w.Body.String()
		for _, line := range []string{`ashlar_disk_ready{node="n1",disk="default"} 1`, `ashlar_disk_ready{node="n2",disk="default"} 0`, `ashlar_disk_ready{node="n4",disk="default"} 0`, `ashlar_node_ready{node="n2"} 1`} {
			if !strings.Contains(text, line+"\n") {
				t.Errorf("no line %s", line)
			}
		}
	})
}

// TestGiveUpDisk: by force a disk is given up that its node cannot use, and no other; the refusal without force says what would be lost.
func TestGiveUpDisk(t *testing.T) {
	inCluster(t, Config{}, func(x *fixture) {
		const remove = "/v1/nodes/n2?action=diskRemove"
		force, why := `{"disk":"default","force":true}`, ""
		ready := func(node, status string) {
			_, _, err := catalog.Update(t.Context(), x.mem, catalog.NodeKey(catalog.Observed, node), func(o *catalog.NodeObserved) error {
				o.Disks["default"].Conditions[catalog.ConditionReady] = catalog.Condition{Status: status, Reason: why, Message: "rot"}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		x.placed("db1", "n2", "")
		x.copied("debian", 1, "n2")
		x.refused(CodeConflict, "POST", remove, force, "can be read", "ashlar disk evict n2/default")
		x.refused(CodeNotFound, "POST", remove, `{"disk":"other","force":true}`)
		ready("n4", catalog.ConditionFalse)
		x.refused(CodeConflict, "POST", "/v1/nodes/n4?action=diskRemove", force, "node n4 is down")
		ready("n4", catalog.ConditionTrue)
		ready("n2", catalog.ConditionUnknown)
		x.refused(CodeConflict, "POST", remove, force, "not said yet")
		why = catalog.ReasonNotAdoptedYet
		ready("n2", catalog.ConditionFalse)
		x.refused(CodeConflict, "POST", remove, force, "not said yet")
		why = "NotAdopted"
		ready("n2", catalog.ConditionFalse)
		x.refused(CodeConflict, "POST", remove, `{"disk":"default"}`, "still takes new copies")
		x.want(200, "POST", "/v1/nodes/n2?action=diskChange", `{"disk":"default","allowScheduling":false}`)
		x.refused(CodeInUse, "POST", remove, `{"disk":"default"}`, "`ashlar disk remove n2/default --force` gives up the copies of volumes db1 and the copies of images debian")
		if get[Node](x, "/v1/nodes/n2").Disks["default"].Lost {
			t.Fatal("given up by a refusal")
		}
		for range 2 { // asking again is no error
			x.want(200, "POST", remove, force)
		}
		if d := get[Node](x, "/v1/nodes/n2").Disks["default"]; !d.Lost || d.AllowScheduling || d.EvictionRequested {
			t.Errorf("%+v", d)
		}
		x.refused(CodeConflict, "POST", "/v1/nodes/n2?action=diskChange", `{"disk":"default","allowScheduling":true}`, "was given up")
		x.refused(CodeInUse, "POST", remove, `{"disk":"default"}`, "it was given up, and goes when", "db1")
		x.want(200, "POST", "/v1/nodes/n2?action=diskChange", `{"disk":"again","path":"/d"}`) // the same directory: a new disk in its place
		x.refused(CodeInvalid, "POST", "/v1/nodes/n2?action=diskChange", `{"disk":"more","path":"/d"}`, "the same path")
		if n := get[Node](x, "/v1/nodes/n2"); !n.Disks["default"].Lost || n.Disks["again"].Lost || len(n.Disks) != 2 {
			t.Errorf("%+v", n.Disks)
		}
	})
}

// TestImageCleanup: of the copies on several nodes those go that nothing needs, and that leave enough.
func TestImageCleanup(t *testing.T) {
	inCluster(t, Config{}, func(x *fixture) {
		x.copied("debian", 1, "n1", "n2", "n4")
		clean := func(node string) string { return `{"disks":["` + id(node) + `","unknown"]}` }
		x.placed("db1", "n2", "")
		_, _, err := catalog.Update(t.Context(), x.mem, catalog.VolumeKey(catalog.Wanted, "db1"), func(w *catalog.VolumeWanted) error {
			w.Image, w.ImageID = "debian", id("debian")
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		x.refused(CodeInUse, "POST", "/v1/backingimages/debian?action=backingImageCleanup", clean("n2"), "in use by volume db1")
		x.want(200, "POST", "/v1/backingimages/debian?action=updateMinNumberOfCopies", `{"minNumberOfCopies":2}`)
		// n4's copy does not count: nobody can say that it is good.
		x.refused(CodeConflict, "POST", "/v1/backingimages/debian?action=backingImageCleanup", clean("n1"), "1 ready copies would be left, fewer than the 2")
		x.want(200, "POST", "/v1/backingimages/debian?action=backingImageCleanup", clean("n4"))
		w, _, err := catalog.Read[catalog.ImageWanted](t.Context(), x.mem, catalog.ImageKey(catalog.Wanted, "debian"))
		if err != nil || !slices.Equal(w.Disks, []string{id("n1"), id("n2")}) {
			t.Errorf("%v %v", w.Disks, err)
		}
		x.refused(CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"upload","nodeSelector":["x y"]}`, "nodeSelector")
		x.want(200, "POST", "/v1/backingimages", `{"name":"a","sourceType":"upload","nodeSelector":["b","a"],"diskSelector":["ssd"]}`)
		if i := get[BackingImage](x, "/v1/backingimages/a"); !slices.Equal(i.NodeSelector, []string{"a", "b"}) || !slices.Equal(i.DiskSelector, []string{"ssd"}) {
			t.Errorf("%+v", i)
		}
		a := x.sendSocket("POST", "/v1/backingimages", `{"name":"f","sourceType":"file","parameters":{"path":"/x.raw"}}`)
		if a.str("reason") != string(CodeConflict) || !strings.Contains(a.str("message"), "6 nodes") {
			t.Errorf("%s", a.raw)
		}
	})
}

// TestOverview counts, and names what is wrong.
func TestOverview(t *testing.T) {
	inCluster(t, Config{}, func(x *fixture) {
		x.placed("db1", "n2", "n1")
		x.placed("db2", "n2", "n4")
		x.placed("db3", "n4", "")
		x.copied("debian", 1, "n1")
		o := get[Overview](x, "/v1/overview")
		if o.Volumes["attached"] != 2 || o.Volumes["detached"] != 1 || o.Images != 1 || len(o.Nodes) != 6 || o.Nodes[0].Attached != 1 || o.Nodes[1].Copies != 2 || o.Nodes[3].Copies != 1 {
			t.Errorf("%+v", o)
		}
		said := ""
		for _, p := range o.Problems {
			said += p.Kind + " " + p.Name + "|"
		}
		if said != "node n4|node n5|node n6|volume db2|volume db3|" {
			t.Errorf("%s %+v", said, o.Problems)
		}
		if err := x.mem.Drop(catalog.AliveKey("n3")); err != nil {
			t.Fatal(err)
		}
		for i := range maxProblems {
			x.placed(fmt.Sprintf("v%03d", i), "n4", "")
		}
		o = get[Overview](x, "/v1/overview")
		if !slices.ContainsFunc(o.Problems, func(p ObjectProblem) bool {
			return p.Kind == "cluster" && strings.Contains(p.Message, "2 of 3 members vote")
		}) {
			t.Errorf("%+v", o.Problems)
		}
		if len(o.Problems) != maxProblems || o.More != 7 {
			t.Errorf("%d problems, %d more", len(o.Problems), o.More)
		}
	})
}

// TestContents: what a node has, and what its copies wait for.
func TestContents(t *testing.T) {
	inCluster(t, Config{}, func(x *fixture) {
		x.placed("db1", "n2", "n1")
		x.placed("db2", "n2", "")
		x.placed("db3", "n1", "n2")
		x.copied("debian", 1, "n1", "n2")
		_, _, err := catalog.Update(t.Context(), x.mem, catalog.VolumeKey(catalog.Observed, "db2"), func(o *catalog.VolumeObserved) error {
			o.Conditions = map[string]catalog.Condition{catalog.ConditionEvicting: {Status: catalog.ConditionFalse, Message: "no room"}}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = catalog.Update(t.Context(), x.mem, catalog.NodeKey(catalog.Observed, "n2"), func(o *catalog.NodeObserved) error {
			o.Disks["default"].Conditions[catalog.ConditionEvicting] = catalog.Condition{Status: catalog.ConditionFalse, Message: "debian stays"}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		c := get[NodeContents](x, "/v1/nodes/n2/contents")
		if !slices.Equal(c.Attached, []string{"db3"}) || len(c.Copies) != 2 || c.Copies[0].Volume != "db1" || !strings.Contains(c.Copies[0].Waits, "attached to node n1") ||
			c.Copies[1].Waits != "no room" || c.Copies[1].Disk != "default" || !slices.Equal(c.Images, []ImageOn{{Image: "debian", Disk: "default", State: "ready", Waits: "debian stays"}}) {
			t.Errorf("%+v", c)
		}
		if c := get[NodeContents](x, "/v1/nodes/n3/contents"); len(c.Attached)+len(c.Copies)+len(c.Images) != 0 {
			t.Errorf("%+v", c)
		}
		x.refused(CodeNotFound, "GET", "/v1/nodes/n9/contents", "")
	})
}

// TestReadyInACluster: a node that the others take for dead is not ready, nor one whose data process does not answer.
func TestReadyInACluster(t *testing.T) {
	e := &awayExtra{}
	inCluster(t, Config{Extra: e}, func(x *fixture) {
		x.want(200, "GET", "/readyz", "")
		e.err = errors.New("no answer")
		if a := x.want(503, "GET", "/readyz", ""); !strings.Contains(string(a.raw), `"data":"the data process does not answer: no answer"`) {
			t.Errorf("%s", a.raw)
		}
		e.err = nil
		if err := x.mem.Drop(catalog.AliveKey("n1")); err != nil {
			t.Fatal(err)
		}
		if a := x.want(503, "GET", "/readyz", ""); !strings.Contains(string(a.raw), "lease ran out") {
			t.Errorf("%s", a.raw)
		}
	})
}

type awayExtra struct {
	Extra
	err error
}

func (e *awayExtra) VolumeCounters(context.Context, func(string, map[string]uint64)) error {
	return e.err
}
