package api

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"ashlar/internal/catalog"
)

// manyVolumes puts records as those of volumes in use are: attached, with three snapshots, on three nodes.
func manyVolumes(t testing.TB, mem *catalog.Mem, n int) {
	t.Helper()
	put := func(k catalog.Key, v any) {
		if _, err := catalog.Write(t.Context(), mem, k, v, 0); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Unix(1700000000, 0).UTC()
	yes := catalog.Condition{Status: catalog.ConditionTrue, LastTransitionTime: now}
	for i := range 3 {
		name := fmt.Sprintf("n%d", i+1)
		put(catalog.NodeKey(catalog.Wanted, name), catalog.NodeWanted{Name: name, AllowScheduling: true, Disks: map[string]catalog.DiskWanted{"default": {Path: "/d", AllowScheduling: true}}})
		put(catalog.NodeKey(catalog.Observed, name), catalog.NodeObserved{Name: name, Port: 9510, Ready: true, Disks: map[string]catalog.DiskObserved{"default": {DiskID: id(name),
			Conditions: map[string]catalog.Condition{catalog.ConditionReady: yes, catalog.ConditionSchedulable: yes}}}})
		put(catalog.AliveKey(name), catalog.Alive{Node: name, Since: now})
	}
	for i := range n {
		name, node := fmt.Sprintf("volume-%05d", i), fmt.Sprintf("n%d", i%3+1)
		p := catalog.Placement{ReplicaID: id("r" + name), Node: node, DiskID: id(node)}
		put(catalog.VolumeKey(catalog.Wanted, name), catalog.VolumeWanted{Name: name, ID: id(name), SizeBytes: 20 << 30, Copies: 1, Frontend: catalog.FrontendNBD, Created: now,
			Tickets: []catalog.Ticket{{Node: node, Kind: catalog.TicketAPI, Created: now}}, Replicas: []catalog.Placement{p}})
		o := catalog.VolumeObserved{Name: name, ID: id(name), State: catalog.VolumeAttached, Robustness: catalog.RobustnessHealthy, Node: node, SizeBytes: 20 << 30,
			Endpoint: "nbd+unix:///" + name + "?socket=/run/ashlar/nbd/" + name + ".sock", Epoch: 7,
			Replicas:   []catalog.ReplicaObserved{{ReplicaID: p.ReplicaID, Node: node, DiskID: p.DiskID, DataPath: "replicas/" + p.ReplicaID, Created: true, Running: true, Mode: "RW", AllocatedBytes: 1 << 30}},
			Conditions: map[string]catalog.Condition{catalog.ConditionScheduled: yes}}
		for s := range 4 {
			o.Snapshots = append(o.Snapshots, catalog.SnapshotObserved{Name: fmt.Sprintf("daily-%d", s), LayerID: id(name + fmt.Sprint(s)), Created: now, SizeBytes: 1 << 28, Children: []string{"x"}})
		}
		put(catalog.VolumeKey(catalog.Observed, name), o)
	}
}

// TestOverviewOfMany: its size does not grow with the number of volumes, and it counts all of them.
func TestOverviewOfMany(t *testing.T) {
	mem := catalog.NewMem()
	defer mem.Close()
	manyVolumes(t, mem, 2500) // more than one goroutine decodes at once
	h := New(Config{Catalog: mem, Node: "n1", Version: "v1"})
	w := httptest.NewRecorder()
	h.ServeHTTP(w, onLoopback(httptest.NewRequest(http.MethodGet, "/v1/overview", nil)))
	var o Overview
	if err := json.Unmarshal(w.Body.Bytes(), &o); err != nil || o.Volumes[catalog.VolumeAttached] != 2500 || o.Health[catalog.RobustnessHealthy] != 2500 || w.Body.Len() > 8192 {
		t.Errorf("%v, %v, %v, %d bytes", err, o.Volumes, o.Health, w.Body.Len())
	}
	w = httptest.NewRecorder()
	h.ServeHTTP(w, onLoopback(httptest.NewRequest(http.MethodGet, "/v1/volumes", nil)))
	var all Collection[Volume]
	if err := json.Unmarshal(w.Body.Bytes(), &all); err != nil || len(all.Data) != 2500 || !slices.IsSortedFunc(all.Data, func(a, b Volume) int { return strings.Compare(a.Name, b.Name) }) {
		t.Errorf("%v, %d volumes", err, len(all.Data))
	}
}

// TestLongCollection: however long a list is, it is encoded as json.Marshal does it.
func TestLongCollection(t *testing.T) {
	for _, n := range []int{0, 1, chunk - 1, chunk, chunk + 1, 2*chunk - 1, 2 * chunk, 3*chunk + 7} {
		c := Collection[Token]{Type: "collection", ResourceType: "token", Links: map[string]string{"self": "<]}>"}, Data: []Token{}}
		for i := range n {
			c.Data = append(c.Data, Token{Name: fmt.Sprint("t]}<", i)})
		}
		got, err := encode(c)
		want, wantErr := json.Marshal(c)
		if err != nil || wantErr != nil || !bytes.Equal(got, want) {
			t.Errorf("%d: %d bytes, %v; want %d, %v", n, len(got), err, len(want), wantErr)
		}
	}
}

// BenchmarkVolumes is GET /v1/volumes of 5,000 volumes, BenchmarkOverview what `ashlar status` asks for.
func BenchmarkVolumes(b *testing.B)  { benchmarkGet(b, "/v1/volumes") }
func BenchmarkOverview(b *testing.B) { benchmarkGet(b, "/v1/overview") }

func benchmarkGet(b *testing.B, path string) {
	mem := catalog.NewMem()
	defer mem.Close()
	manyVolumes(b, mem, 5000)
	h := New(Config{Catalog: mem, Node: "n1", Version: "v1"})
	for b.Loop() {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, onLoopback(httptest.NewRequest(http.MethodGet, path, nil)))
		if w.Code != http.StatusOK {
			b.Fatal(w.Code)
		}
		b.ReportMetric(float64(w.Body.Len()), "bytes")
	}
}
