package agent_test

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/agent"
	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
)

// lived is a node with an image, and volumes: a (from the image, attached, with snapshots), b (detached, was open), c (never opened).
func lived(w *world) {
	w.t.Helper()
	w.settle(0)
	w.createImage("debian", "ok")
	w.createVolume("a", "debian")
	w.createVolume("b", "")
	w.createVolume("c", "")
	w.attach("a", catalog.Ticket{})
	w.attach("b", catalog.Ticket{DisableFrontend: true})
	w.settle(3 * time.Second)
	w.operate("a", catalog.Operation{Verb: catalog.VerbSnapshot, Snapshot: "s1"})
	w.settle(0)
	w.detach("b")
	w.settle(0)
	w.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
	w.wantState("b", catalog.VolumeDetached, catalog.RobustnessUnknown)
	w.wantState("c", catalog.VolumeDetached, catalog.RobustnessUnknown)
	w.stop()
}

func (w *world) recover(into catalog.Catalog, cluster string) (agent.Recovered, error) {
	w.t.Helper()
	s, err := w.host.ensure(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	return agent.Recover(context.Background(), agent.RecoverConfig{
		Node: node, Catalog: into, Service: s, Disks: []agent.RecoverDisk{{Name: "default", Path: "/disks/default", ClusterID: cluster}},
	})
}

func (w *world) lose() {
	m := catalog.NewMem()
	w.mem, w.cat, w.host.truth = m, m, m
}

func (w *world) clusterID() string {
	c, _ := get[catalog.Cluster](w, catalog.ClusterKey())
	return c.ID
}

func bubble(t *testing.T, fn func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		w.start()
		fn(w)
	})
}

// TestRecoverLost: an empty catalogue gets everything back from the disks; what is open stays open; done again it changes nothing.
func TestRecoverLost(t *testing.T) {
	bubble(t, func(w *world) {
		lived(w)
		cluster := w.clusterID()
		old, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, "a"))
		before := w.deeds()
		w.lose()
		r, err := w.recover(w.mem, cluster)
		w.want("recovered", err == nil && slices.Equal(r.Volumes, []string{"a", "b", "c"}) && slices.Equal(r.Images, []string{"debian"}) && len(r.Conflicts) == 0 && r.Cluster == cluster, r, err)
		r, err = w.recover(w.mem, "")
		w.want("again", err == nil && len(r.Volumes)+len(r.Images)+len(r.Advanced) == 0 && r.Unchanged == 4, r, err)
		w.start()
		w.settle(time.Minute)
		o := w.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.want("snapshots", len(o.Snapshots) == 2 && o.Endpoint != "", o)
		v, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, "a"))
		w.want("the same volume", v.ID == old.ID && v.ImageID == old.ImageID && v.Image == "debian" && v.SizeBytes == old.SizeBytes && slices.Equal(v.Replicas, old.Replicas), v, old)
		w.wantState("b", catalog.VolumeDetached, catalog.RobustnessUnknown)
		w.want("image ready", w.imageState("debian").State == catalog.ImageReady, w.image("debian"))
		after := w.deeds()
		for _, verb := range []string{"create-replica", "delete-replica", "open-volume", "close-volume", "delete-image", "import-image"} {
			w.want("no "+verb, before[verb] == after[verb], before, after)
		}
		w.attach("c", catalog.Ticket{})
		w.attach("b", catalog.Ticket{})
		w.detach("a")
		w.settle(0)
		w.wantState("c", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.wantState("b", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.wantState("a", catalog.VolumeDetached, catalog.RobustnessUnknown)
	})
}

// TestRecoverNeverOpened: a volume that was never open still stands on its image, which nobody may delete.
func TestRecoverNeverOpened(t *testing.T) {
	bubble(t, func(w *world) {
		w.settle(0)
		w.createImage("debian", "ok")
		w.createVolume("v", "debian")
		w.settle(time.Minute)
		w.wantState("v", catalog.VolumeDetached, catalog.RobustnessUnknown)
		w.stop()
		cluster := w.clusterID()
		old, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, "v"))
		w.lose()
		r, err := agent.Recover(t.Context(), agent.RecoverConfig{
			Node: node, Guessed: true, Catalog: w.mem, Service: w.host.proc, Disks: []agent.RecoverDisk{{Name: "default", Path: "/disks/default", ClusterID: cluster}},
		})
		w.want("recovered", err == nil && slices.Equal(r.Volumes, []string{"v"}) && r.Guessed && r.Node == node, r, err) // no record says what the node is called
		v, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, "v"))
		w.want("its image", v.ImageID == old.ImageID && v.Image == "debian", v)
		m, _ := get[catalog.Membership](w, catalog.MembershipKey(v.ID))
		w.want("its record", m.Chain.Base == old.ImageID && slices.Equal(m.Chain.Layers, []string{v.Replicas[0].ReplicaID}), m)
	})
}

// TestRecoverLostRecord: a copy that has lost its own record gets it again: under the catalogue's record if there is one, and else as what its layers are. What cannot be made again is told, and no volume comes of it.
func TestRecoverLostRecord(t *testing.T) {
	bubble(t, func(w *world) {
		lived(w)
		cluster := w.clusterID()
		w.host.mu.Lock()
		w.host.open = map[string]client.OpenVolume{} // nothing is open any more
		w.host.mu.Unlock()
		w.host.kill()
		lose := func(name, failed string) *fakeReplica {
			v, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, name))
			r, _ := w.host.replica(v.Replicas[0].ReplicaID)
			r.lost, r.record, r.fence, r.failed = true, nil, 0, failed
			return r
		}
		a := lose("a", "")
		r, err := w.recover(w.mem, cluster)
		w.want("with the catalogue", err == nil && slices.Equal(r.Rebuilt, []string{"a"}) && len(r.Conflicts)+len(r.Volumes)+len(r.Advanced) == 0 && a.fence > 0 && !a.lost, r, err, a)
		r, err = w.recover(w.mem, cluster)
		w.want("again", err == nil && len(r.Rebuilt)+len(r.Conflicts)+len(r.Volumes)+len(r.Advanced) == 0, r, err)

		lose("a", "")
		lose("b", "its layers are gone")
		chain := []string{a.layers[1].ID, a.layers[0].ID}
		w.lose()
		r, err = w.recover(w.mem, cluster)
		w.want("without the catalogue", err == nil && slices.Equal(r.Rebuilt, []string{"a"}) && slices.Equal(r.Volumes, []string{"a", "c"}), r, err)
		w.want("what could not be", len(r.Conflicts) == 1 && strings.Contains(r.Conflicts[0], "volume b has lost its record"), r.Conflicts)
		v, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, "a"))
		m, _ := get[catalog.Membership](w, catalog.MembershipKey(v.ID))
		w.want("its chain and image", slices.Equal(m.Chain.Layers, chain) && m.Opened == 0 && v.ImageID != "" && v.Image == "debian", m, v)
	})
}

// TestLostAndNotNoticed: serve started with an empty catalogue while guests run touches nothing, keeps the cluster, and Recover then works.
func TestLostAndNotNoticed(t *testing.T) {
	bubble(t, func(w *world) {
		lived(w)
		cluster := w.clusterID()
		w.lose()
		w.start()
		w.settle(time.Hour)
		n, _ := get[catalog.NodeObserved](w, catalog.NodeKey(catalog.Observed, node))
		w.want("nothing was touched", len(n.Unrecorded) == 5 && len(w.host.proc.volumes) == 1 && w.clusterID() == cluster, n.Unrecorded)
		w.stop()
		r, err := w.recover(w.mem, cluster)
		w.want("recovered", err == nil && len(r.Volumes) == 3, r, err)
		w.start()
		w.settle(time.Minute)
		w.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
	})
}

// TestRecoverGuessesTheName: without a name the node is called what the records on its disks call it; a name that was given counts, and so does a guess
// when there are no records.
func TestRecoverGuessesTheName(t *testing.T) {
	bubble(t, func(w *world) {
		lived(w)
		cluster := w.clusterID()
		for _, tc := range []struct {
			name    string
			guessed bool
			want    string
		}{{"host", true, node}, {"host", false, "host"}, {node, false, node}} {
			w.lose()
			s, err := w.host.ensure(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			r, err := agent.Recover(context.Background(), agent.RecoverConfig{
				Node: tc.name, Guessed: tc.guessed, Catalog: w.mem, Service: s, Disks: []agent.RecoverDisk{{Name: "default", Path: "/disks/default", ClusterID: cluster}},
			})
			v, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, "a"))
			w.want("named", err == nil && r.Node == tc.want && !r.Guessed && v.Replicas[0].Node == tc.want, tc, r, err, v)
		}
	})
}

// TestRecoverOld: a catalogue restored from a backup gets the newer membership records and the volumes it does not know; what it knows better stays.
func TestRecoverOld(t *testing.T) {
	bubble(t, func(w *world) {
		w.attached("a", "gone")
		w.detach("a")
		w.settle(0)
		es, _, _ := w.mem.List(t.Context(), "")
		w.attach("a", catalog.Ticket{}) // epoch 2
		w.createVolume("new", "")
		w.settle(0)
		w.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.stop()
		cluster := w.clusterID()
		w.lose()
		for _, e := range es {
			if _, err := w.mem.Put(t.Context(), e.Key, e.Value, 0); err != nil {
				t.Fatal(err)
			}
		}
		v, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, "a"))
		r, err := w.recover(w.mem, cluster)
		w.want("recovered", err == nil && slices.Equal(r.Volumes, []string{"new"}) && slices.Equal(r.Advanced, []string{"a"}), r, err)
		m, _ := get[catalog.Membership](w, catalog.MembershipKey(v.ID))
		w.want("membership is the newest", m.Epoch == 2, m)
		w.start()
		w.settle(time.Minute)
		w.wantState("a", catalog.VolumeAttached, catalog.RobustnessHealthy)
		w.wantState("new", catalog.VolumeDetached, catalog.RobustnessUnknown)
	})
}

// TestRecoverConflicts: two volumes of one name, a replica that is no member, a copied disk, bytes that are no record, another cluster.
func TestRecoverConflicts(t *testing.T) {
	bubble(t, func(w *world) {
		lived(w)
		cluster := w.clusterID()
		d := w.host.disks["/disks/default"]
		add := func(volumeID, name, record string) string {
			id := w.id()
			c := client.CreateReplica{DiskID: d.status.DiskID, ReplicaID: id, VolumeID: volumeID, Volume: name, SizeBytes: 1 << 20}
			d.replicas[id] = &fakeReplica{CreateReplica: c, layers: []client.Layer{{ID: id, Head: true, SizeBytes: 1 << 20}}, record: json.RawMessage(record)}
			return id
		}
		v, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, "a"))
		other := w.id()
		add(other, "a", "")                                                     // another volume a
		add(v.ID, "a", `{"volumeID":"`+v.ID+`","epoch":0,"members":[]}`)        // an old copy of a, not a member
		add(w.id(), "x", `{"volumeID":"someone else's","epoch":7,"members":0}`) // nonsense
		w.lose()
		r, err := w.recover(w.mem, cluster)
		w.want("recovered", err == nil && len(r.Volumes) == 4, r, err)
		all := strings.Join(r.Conflicts, "\n")
		for _, part := range []string{"a-" + other[:8], "is not in its newest record", "keeps a record that is not its volume's"} {
			w.want("conflict: "+part, strings.Contains(all, part), all)
		}
		for _, name := range r.Volumes {
			got, _ := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, name))
			w.want("names", got.Name == name && len(got.Replicas) == 1, got)
		}

		strange := catalog.NewMem()
		if _, err := catalog.Write(t.Context(), strange, catalog.ClusterKey(), catalog.Cluster{ID: "another", Format: 1}, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := catalog.Write(t.Context(), strange, catalog.VolumeKey(catalog.Wanted, "z"), catalog.VolumeWanted{Name: "z", ID: "z"}, 0); err != nil {
			t.Fatal(err)
		}
		_, err = w.recover(strange, cluster)
		w.want("another cluster's catalogue", errors.Is(err, agent.ErrOtherCluster), err)
		_, err = agent.Recover(t.Context(), agent.RecoverConfig{Node: node, Catalog: strange, Service: w.host.proc, Disks: []agent.RecoverDisk{{Path: "disks"}}})
		w.want("a relative path", errors.Is(err, agent.ErrConfig), err)
	})
}

// TestRecoverCrash: killed after any of its writes and run again, Recover gets there.
func TestRecoverCrash(t *testing.T) {
	bubble(t, func(w *world) {
		lived(w)
		cluster := w.clusterID()
		for n := 0; ; n++ {
			w.lose()
			_, err := w.recover(&limited{Mem: w.mem, left: n}, cluster)
			if err == nil {
				w.want("several writes", n > 5, n)
				break
			}
			r, err := w.recover(w.mem, cluster)
			w.want("the second time", err == nil && len(r.Conflicts) == 0, r, err)
			for _, name := range []string{"a", "b", "c"} {
				v, ok := get[catalog.VolumeWanted](w, catalog.VolumeKey(catalog.Wanted, name))
				m, has := get[catalog.Membership](w, catalog.MembershipKey(v.ID))
				w.want("volume "+name, ok && has && m.VolumeID == v.ID, n)
			}
			i, ok := get[catalog.ImageWanted](w, catalog.ImageKey(catalog.Wanted, "debian"))
			w.want("image", ok && len(i.Disks) == 1 && strings.HasPrefix(i.ExpectedChecksum, "sha512:"), i)
		}
	})
}

// limited fails after some writes.
type limited struct {
	*catalog.Mem
	left int
}

func (l *limited) Put(ctx context.Context, k catalog.Key, v []byte, was catalog.Rev) (catalog.Rev, error) {
	if l.left--; l.left < 0 {
		return 0, errInjected
	}
	return l.Mem.Put(ctx, k, v, was)
}
