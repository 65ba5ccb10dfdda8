package agent

import (
	"context"
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
