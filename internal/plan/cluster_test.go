package plan_test

import (
	"fmt"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

func placed(name string) catalog.VolumeWanted {
	return catalog.VolumeWanted{Name: name, Replicas: []catalog.Placement{{ReplicaID: "rep-" + name, Node: "n1", DiskID: "n1-d"}}}
}

func deleted(w catalog.VolumeWanted) catalog.VolumeWanted {
	t := now
	w.Deleted = &t
	return w
}

func observed(name, state string, created bool) catalog.VolumeObserved {
	return catalog.VolumeObserved{Name: name, ID: "id-" + name, State: state, Replicas: []catalog.ReplicaObserved{{ReplicaID: "rep-" + name, Created: created}}}
}

func membership(id string, epoch uint64) catalog.Membership {
	return catalog.Membership{VolumeID: id, Epoch: epoch, Members: []catalog.MembershipMember{{ReplicaID: "r", InSync: true}}}
}

// TestClusterVolume: what the leader writes for a volume, by what is recorded.
func TestClusterVolume(t *testing.T) {
	op := catalog.Operation{ID: "o1", Volume: "v", VolumeID: "id-v", State: catalog.OperationPending}
	for _, c := range []struct {
		name  string
		build func(*picture)
		want  string
	}{
		{"new", func(p *picture) { p.volume(catalog.VolumeWanted{Name: "v"}) }, "volume/wanted/v membership/wanted/id-v"},
		{"placed, no membership", func(p *picture) { p.volume(placed("v")) }, "membership/wanted/id-v"},
		{"placed, no membership, but it was open before", func(p *picture) {
			o := observed("v", catalog.VolumeDetached, true)
			o.Epoch = 3
			p.volume(placed("v")).put(catalog.VolumeKey(catalog.Observed, "v"), o)
		}, ""},
		{"complete", func(p *picture) { p.volume(placed("v")).put(catalog.MembershipKey("id-v"), membership("id-v", 1)) }, ""},
		{"observed only", func(p *picture) {
			p.put(catalog.VolumeKey(catalog.Observed, "v"), observed("v", catalog.VolumeDetached, true))
		}, "-volume/observed/v"},
		{"membership only: left alone", func(p *picture) { p.put(catalog.MembershipKey("id-v"), membership("id-v", 1)) }, ""},
		{"deleted, never placed", func(p *picture) { p.volume(deleted(catalog.VolumeWanted{Name: "v"})) }, "-volume/wanted/v"},
		{"deleted, nothing observed", func(p *picture) { p.volume(deleted(placed("v"))) }, ""},
		{"deleted, replica there", func(p *picture) {
			p.volume(deleted(placed("v"))).put(catalog.VolumeKey(catalog.Observed, "v"), observed("v", catalog.VolumeDeleting, true))
		}, ""},
		{"deleted, seen before the tombstone", func(p *picture) {
			p.volume(deleted(placed("v"))).put(catalog.VolumeKey(catalog.Observed, "v"), observed("v", catalog.VolumeCreating, false))
		}, ""},
		{"deleted, an earlier volume of that name is gone", func(p *picture) {
			o := observed("v", catalog.VolumeDeleting, false)
			o.ID = "other"
			p.volume(deleted(placed("v"))).put(catalog.VolumeKey(catalog.Observed, "v"), o)
		}, ""},
		{"deleted and gone", func(p *picture) {
			p.volume(deleted(placed("v"))).put(catalog.VolumeKey(catalog.Observed, "v"), observed("v", catalog.VolumeDeleting, false)).
				put(catalog.MembershipKey("id-v"), membership("id-v", 1)).put(catalog.OperationKey("v", "o1"), op)
		}, "-operation/wanted/v/o1 -membership/wanted/id-v -volume/wanted/v -volume/observed/v"},
		{"deleted and gone, half of it done", func(p *picture) {
			p.volume(deleted(placed("v"))).put(catalog.VolumeKey(catalog.Observed, "v"), observed("v", catalog.VolumeDeleting, false))
		}, "-volume/wanted/v -volume/observed/v"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPicture(t).node("n1")
			c.build(p)
			if got := keys(p.cluster()); got != c.want {
				t.Errorf("writes %q, want %q", got, c.want)
			}
		})
	}
}

func TestFirstMembership(t *testing.T) {
	p := newPicture(t).node("n1")
	p.volume(catalog.VolumeWanted{Name: "v", ImageID: "img", Image: "img", SizeBytes: 7 * gib})
	ws := p.cluster()
	m, _ := find[catalog.Membership](ws)
	w, _ := find[catalog.VolumeWanted](ws)
	if m.Epoch != 0 || m.Generation != 1 || len(m.Members) != 1 || !m.Members[0].InSync || m.Members[0].ReplicaID != w.Replicas[0].ReplicaID ||
		m.Chain.SizeBytes != 7*gib || m.Chain.Base != "img" || len(m.Chain.Layers) != 1 || m.Chain.Layers[0] != w.Replicas[0].ReplicaID {
		t.Errorf("%+v of %+v", m, w)
	}
	for _, x := range ws {
		if x.Key.Kind == catalog.KindMembership && x.Was != 0 {
			t.Error("a first record that replaces something")
		}
	}
}

// TestNotTwice: what was written is not written again, and a complaint is an event once.
func TestNotTwice(t *testing.T) {
	p := newPicture(t)
	p.volume(catalog.VolumeWanted{Name: "v"})
	ws := p.cluster()
	if len(ws) != 1 || len(ws[0].Notes) != 1 {
		t.Fatalf("writes %q", keys(ws))
	}
	p.put(ws[0].Key, ws[0].Value)
	if ws := p.cluster(); len(ws) != 0 {
		t.Fatalf("again %q", keys(ws))
	}
	p.node("n1", setFree(0))
	ws = p.cluster()
	if len(ws) != 1 || len(ws[0].Notes) != 0 {
		t.Fatalf("for another reason: %q, %d events", keys(ws), len(ws[0].Notes))
	}
}

// TestClusterImage: where images are wanted, and when their records end.
func TestClusterImage(t *testing.T) {
	img := func(disks ...string) catalog.ImageWanted {
		return catalog.ImageWanted{Name: "i", ID: "id-i", MinCopies: 1, Disks: disks}
	}
	gone := func(w catalog.ImageWanted) catalog.ImageWanted { t := now; w.Deleted = &t; return w }
	state := func(s string) catalog.ImageObserved {
		return catalog.ImageObserved{Name: "i", ID: "id-i", Disks: map[string]catalog.ImageOnDisk{"n1-d": {State: s}}}
	}
	user := placed("v")
	user.ImageID, user.Image = "id-i", "i"
	for _, c := range []struct {
		name  string
		build func(*picture)
		want  string
		disks string
	}{
		{"new", func(p *picture) { p.put(catalog.ImageKey(catalog.Wanted, "i"), img()) }, "image/wanted/i", "[n1-d]"},
		{"three copies, two nodes", func(p *picture) {
			w := img()
			w.MinCopies = 3
			p.node("n2").put(catalog.ImageKey(catalog.Wanted, "i"), w)
		}, "image/wanted/i", "[n1-d]"},
		{"there", func(p *picture) { p.put(catalog.ImageKey(catalog.Wanted, "i"), img("n1-d")) }, "", ""},
		{"a replica goes elsewhere", func(p *picture) {
			p.node("n2").put(catalog.ImageKey(catalog.Wanted, "i"), img("n2-d")).volume(user).put(catalog.MembershipKey("id-v"), membership("id-v", 0))
		}, "image/wanted/i", "[n2-d n1-d]"},
		{"no disk", func(p *picture) { p.node("n1", setFree(0)).put(catalog.ImageKey(catalog.Wanted, "i"), img()) }, "image/observed/i", ""},
		{"observed only", func(p *picture) { p.put(catalog.ImageKey(catalog.Observed, "i"), state(catalog.ImageReady)) }, "-image/observed/i", ""},
		{"deleted, nowhere", func(p *picture) { p.put(catalog.ImageKey(catalog.Wanted, "i"), gone(img())) }, "-image/wanted/i", ""},
		{"deleted, nothing observed", func(p *picture) { p.put(catalog.ImageKey(catalog.Wanted, "i"), gone(img("n1-d"))) }, "", ""},
		{"deleted, still there", func(p *picture) {
			p.put(catalog.ImageKey(catalog.Wanted, "i"), gone(img("n1-d"))).put(catalog.ImageKey(catalog.Observed, "i"), state(catalog.ImageReady))
		}, "", ""},
		{"deleted, gone", func(p *picture) {
			p.put(catalog.ImageKey(catalog.Wanted, "i"), gone(img("n1-d"))).put(catalog.ImageKey(catalog.Observed, "i"), state(catalog.ImageGone))
		}, "-image/wanted/i -image/observed/i", ""},
		{"deleted, gone, but a volume names it", func(p *picture) {
			p.put(catalog.ImageKey(catalog.Wanted, "i"), gone(img("n1-d"))).put(catalog.ImageKey(catalog.Observed, "i"), state(catalog.ImageGone)).
				volume(user).put(catalog.MembershipKey("id-v"), membership("id-v", 0))
		}, "", ""},
		{"deleted, gone, but a volume that is being deleted names it", func(p *picture) {
			p.put(catalog.ImageKey(catalog.Wanted, "i"), gone(img("n1-d"))).put(catalog.ImageKey(catalog.Observed, "i"), state(catalog.ImageGone)).volume(deleted(user))
		}, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPicture(t).node("n1")
			c.build(p)
			ws := p.cluster()
			if got := keys(ws); got != c.want {
				t.Errorf("writes %q, want %q", got, c.want)
			}
			if w, ok := find[catalog.ImageWanted](ws); ok && fmt.Sprint(w.Disks) != c.disks {
				t.Errorf("disks %v, want %s", w.Disks, c.disks)
			}
		})
	}
}

func TestNoDiskForImage(t *testing.T) {
	p := newPicture(t).put(catalog.ImageKey(catalog.Wanted, "i"), catalog.ImageWanted{Name: "i", ID: "id-i", MinCopies: 1})
	ws := p.cluster()
	o, ok := find[catalog.ImageObserved](ws)
	if !ok || o.Error != "there is no node yet" {
		t.Fatalf("%q %+v", keys(ws), o)
	}
	p.put(ws[0].Key, ws[0].Value)
	if ws := p.cluster(); len(ws) != 0 {
		t.Fatalf("again %q", keys(ws))
	}
	p.node("n1")
	ws = p.cluster()
	p.put(ws[0].Key, ws[0].Value)
	if o, _ := find[catalog.ImageObserved](p.cluster()); o.Error != "" || o.Name != "i" {
		t.Fatalf("still complains: %+v", o)
	}
}

// TestOld: operations go an hour after their end, or with their volume; events after a day, or when there are too many; join tokens a day after they expired.
func TestOld(t *testing.T) {
	p := newPicture(t).node("n1").volume(placed("v")).put(catalog.MembershipKey("id-v"), membership("id-v", 1))
	at := func(d time.Duration) *time.Time { t := now.Add(-d); return &t }
	for id, op := range map[string]catalog.Operation{
		"old":     {VolumeID: "id-v", State: catalog.OperationDone, Finished: at(time.Hour)},
		"young":   {VolumeID: "id-v", State: catalog.OperationFailed, Finished: at(59 * time.Minute)},
		"waiting": {VolumeID: "id-v", State: catalog.OperationPending},
		"other":   {VolumeID: "an earlier one", State: catalog.OperationPending},
	} {
		op.ID, op.Volume = id, "v"
		p.put(catalog.OperationKey("v", id), op)
	}
	p.put(catalog.OperationKey("w", "orphan"), catalog.Operation{ID: "orphan", Volume: "w"})
	p.put(catalog.EventKey("yesterday"), catalog.EventRecord{Time: *at(24 * time.Hour)})
	for name, expired := range map[string]time.Duration{"old": 24 * time.Hour, "young": 24*time.Hour - time.Second, "good": -time.Hour} {
		p.put(catalog.JoinKey(name), catalog.Join{Name: name, Expires: *at(expired), UsedBy: "n1"})
	}
	if got, want := keys(p.cluster()), "-operation/wanted/v/old -operation/wanted/v/other -operation/wanted/w/orphan -join/wanted/old -event/wanted/yesterday"; got != want {
		t.Errorf("writes %q, want %q", got, want)
	}
	p = newPicture(t)
	for i := range 1003 {
		p.put(catalog.EventKey(fmt.Sprintf("%04d", i)), catalog.EventRecord{Time: *at(time.Duration(i) * time.Second)})
	}
	if got, want := keys(p.cluster()), "-event/wanted/1002 -event/wanted/1001 -event/wanted/1000"; got != want {
		t.Errorf("writes %q, want %q", got, want)
	}
}

// TestView: late, repeated and unreadable changes.
func TestView(t *testing.T) {
	v := plan.NewView()
	k := catalog.VolumeKey(catalog.Wanted, "v")
	ev := func(value string, rev catalog.Rev) error {
		e := catalog.Event{Entry: catalog.Entry{Key: k, Rev: rev}}
		if value != "" {
			e.Value = []byte(value)
		}
		return v.Apply(e)
	}
	if err := ev(`{"name":"v","sizeBytes":2}`, 5); err != nil {
		t.Fatal(err)
	}
	if err := ev(`{"name":"v","sizeBytes":1}`, 4); err != nil || v.Volumes["v"].Wanted.Value.SizeBytes != 2 {
		t.Errorf("an older change was taken: %v %v", v.Volumes["v"], err)
	}
	if err := ev(`{"name":7}`, 6); err == nil || v.Volumes["v"].Wanted.Rev != 5 {
		t.Errorf("unreadable: %v %v", v.Volumes["v"], err)
	}
	if err := ev("", 3); err != nil || !v.Volumes["v"].Wanted.Is() {
		t.Errorf("an older deletion was taken: %v", err)
	}
	if err := ev("", 7); err != nil || len(v.Volumes) != 0 {
		t.Errorf("deletion: %v %v", v.Volumes, err)
	}
	if err := v.Apply(catalog.Event{Entry: catalog.Entry{Key: catalog.Key{Kind: "later", Part: catalog.Wanted, Name: "x"}, Value: []byte("{}"), Rev: 8}}); err != nil {
		t.Error(err)
	}
}
