package agent

import (
	"context"
	"encoding/json"
	"testing"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/plan"
)

// TestLateOwnWrite: the watch may show an agent's write and the record's deletion before the agent hears of its own write's success. A record that is gone must
// not come back then: every later write of a new record of that name would be in conflict, for ever.
func TestLateOwnWrite(t *testing.T) {
	a, err := New(Config{Node: "n1", Catalog: catalog.NewMem(), EnsureData: func(context.Context) (client.Service, error) { return nil, ErrAway }})
	if err != nil {
		t.Fatal(err)
	}
	l := newLoop(a)
	key := catalog.ImageKey(catalog.Observed, "debian")
	put := catalog.Entry{Key: key, Value: []byte(`{"name":"debian","id":"1"}`), Rev: 10}
	l.takeBatch(catalog.Batch{Reset: true, Rev: 9})
	l.takeWritten(written{write: plan.Write{Key: key}, entry: put})
	if !l.view.Images["debian"].Observed.Is() {
		t.Fatal("its own write is not in the view before the watch shows it")
	}
	l.takeBatch(catalog.Batch{Events: []catalog.Event{{Entry: put}}, Rev: 10})
	l.takeBatch(catalog.Batch{Events: []catalog.Event{{Entry: catalog.Entry{Key: key, Rev: 12}}}, Rev: 12})
	l.takeWritten(written{write: plan.Write{Key: key}, entry: put})
	l.takeResult(result{action: plan.ImportImage{}, put: []catalog.Entry{put}})
	if l.view.Images["debian"].Observed.Is() {
		t.Error("a record that is gone came back by a late answer")
	}
}

// TestOthersVolumes: what of a volume concerns the node's own record, which is planned from all volumes, and what does not: volumes of others, and join tokens.
func TestOthersVolumes(t *testing.T) {
	a, err := New(Config{Node: "n1", Catalog: catalog.NewMem(), EnsureData: func(context.Context) (client.Service, error) { return nil, ErrAway }})
	if err != nil {
		t.Fatal(err)
	}
	on := func(node string) []catalog.Placement {
		return []catalog.Placement{{ReplicaID: "r", Node: node, DiskID: "d"}}
	}
	rev := catalog.Rev(1)
	for _, c := range []struct {
		name     string
		was, now any
		key      catalog.Key
		open     string // the id of what is open here
		want     bool
	}{
		{"made, without a place", nil, catalog.VolumeWanted{Name: "v", ID: "1"}, catalog.VolumeKey(catalog.Wanted, "v"), "", false},
		{"placed elsewhere", catalog.VolumeWanted{Name: "v", ID: "1"}, catalog.VolumeWanted{Name: "v", ID: "1", Replicas: on("n2")}, catalog.VolumeKey(catalog.Wanted, "v"), "1", false},
		{"placed here", catalog.VolumeWanted{Name: "v", ID: "1"}, catalog.VolumeWanted{Name: "v", ID: "1", Replicas: on("n1")}, catalog.VolumeKey(catalog.Wanted, "v"), "", true},
		{"dropped here, forgotten", catalog.VolumeWanted{Name: "v", ID: "1", Dropped: on("n1")}, catalog.VolumeWanted{Name: "v", ID: "1"}, catalog.VolumeKey(catalog.Wanted, "v"), "", true},
		{"larger, here", catalog.VolumeWanted{Name: "v", ID: "1", Replicas: on("n1")}, catalog.VolumeWanted{Name: "v", ID: "1", SizeBytes: 1, Replicas: on("n1")}, catalog.VolumeKey(catalog.Wanted, "v"), "", true},
		{"attached, here", catalog.VolumeWanted{Name: "v", ID: "1", Replicas: on("n1")}, catalog.VolumeWanted{Name: "v", ID: "1", Frontend: "nbd", Replicas: on("n1")}, catalog.VolumeKey(catalog.Wanted, "v"), "", false},
		{"gone, open here", catalog.VolumeWanted{Name: "v", ID: "1", Replicas: on("n2")}, nil, catalog.VolumeKey(catalog.Wanted, "v"), "1", true},
		{"made, of what is open here", nil, catalog.VolumeWanted{Name: "v", ID: "1", Replicas: on("n2")}, catalog.VolumeKey(catalog.Wanted, "v"), "1", true},
		{"a join token", nil, catalog.Join{Name: "j"}, catalog.JoinKey("j"), "", false},
	} {
		l := newLoop(a)
		if c.open != "" {
			l.found.Volumes = []plan.FoundVolume{{VolumeID: c.open}}
		}
		for _, v := range []any{c.was, c.now} {
			l.changed = dirty{}
			e := catalog.Entry{Key: c.key, Rev: rev}
			if v != nil {
				if e.Value, err = json.Marshal(v); err != nil {
					t.Fatal(err)
				}
			}
			l.apply(catalog.Event{Entry: e})
			rev++
		}
		if l.changed.node != c.want || l.changed.all {
			t.Errorf("%s: node %v, all %v", c.name, l.changed.node, l.changed.all)
		}
	}
}
