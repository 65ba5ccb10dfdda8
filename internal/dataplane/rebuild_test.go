package dataplane

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ashlar/internal/dataplane/client"
)

// TestRebuildReplica: a copy whose own record is lost, or damaged, does not open and says what to do; made again under the volume's record it opens with its content and its snapshot, and goes on under a higher epoch. One that is
// open, or sound, is left alone.
func TestRebuildReplica(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, 16<<20)
	b.open(c, a)
	g := guest(t, b.runDir, "vol1")
	if err := g.write(0, page("before")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, Verb: "snapshot", Snapshot: "one", OpID: id("oper", 1)}); err != nil {
		t.Fatal(err)
	}
	if err := g.write(0, page("after")); err != nil {
		t.Fatal(err)
	}
	g.Close()
	file := filepath.Join(b.disk, b.state(c).Disks[0].Replicas[0].DataPath, "replica")
	rebuild := func(record string) error {
		return c.RebuildReplica(t.Context(), client.RebuildReplica{DiskID: b.diskID, ReplicaID: a.ReplicaID, Record: json.RawMessage(record)})
	}
	for what, lose := range map[string]func() error{
		"gone":    func() error { return os.Remove(file) },
		"damaged": func() error { return os.WriteFile(file, []byte(strings.Repeat("nonsense", 128<<10)), 0o600) },
	} {
		if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
			t.Fatal(err)
		}
		before := b.cat.record(a.VolumeID)
		if err := lose(); err != nil {
			t.Fatal(err)
		}
		_, err := c.OpenVolume(t.Context(), a)
		wantCode(t, what+": opened", err, client.CodeCorrupt)
		if err == nil || !strings.Contains(err.Error(), "ashlar recover") {
			t.Errorf("%s: it does not say what to do: %v", what, err)
		}
		st, err := c.AdoptDisk(t.Context(), client.Disk{Path: b.disk, ClusterID: testCluster})
		if err != nil || !st.Replicas[0].RecordLost || st.Replicas[0].ReplicaID != a.ReplicaID || len(st.Replicas[0].Chain) != 2 {
			t.Fatalf("%s: found %+v, %v", what, st.Replicas, err)
		}
		text, err := json.Marshal(before)
		if err != nil {
			t.Fatal(err)
		}
		foreign := before
		foreign.Chain.Layers = slices.Clone(before.Chain.Layers[:1])
		short, err := json.Marshal(foreign)
		if err != nil {
			t.Fatal(err)
		}
		wantCode(t, what+": under a record of another chain", rebuild(string(short)), client.CodeCorrupt)
		if err := rebuild(string(text)); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil { // the attempt
			t.Fatal(err)
		}
		if st := b.open(c, a); st.Epoch <= before.Epoch || len(st.Layers) != 2 {
			t.Errorf("%s: opened as %+v, after epoch %d", what, st, before.Epoch)
		}
		g := guest(t, b.runDir, "vol1")
		if got, err := g.read(0, 4096); err != nil || string(got) != string(page("after")) {
			t.Errorf("%s: it reads %.10q, %v", what, got, err)
		}
		g.Close()
		if err := os.Rename(file, file+"-aside"); err != nil {
			t.Fatal(err)
		}
		wantCode(t, what+": made again while it is open", rebuild(""), client.CodeInUse)
		if err := os.Rename(file+"-aside", file); err != nil {
			t.Fatal(err)
		}
	}
}
