package dataplane

import (
	"os"
	"path/filepath"
	"testing"

	"ashlar/internal/dataplane/client"
)

// TestDiskAway: a disk whose files are gone says so; it is given up when it is asked for again, unless a volume is open on it, and taken back when it is there again. An
// empty directory in its place is not.
func TestDiskAway(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	marker, aside := filepath.Join(b.disk, markerName), filepath.Join(filepath.Dir(b.disk), "aside")
	ask := client.Disk{Path: b.disk, ClusterID: testCluster, DiskID: b.diskID}
	status := func() client.DiskStatus {
		t.Helper()
		st, err := c.State(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range st.Disks {
			if d.DiskID == b.diskID {
				return d
			}
		}
		return client.DiskStatus{}
	}
	if err := os.Rename(marker, aside); err != nil {
		t.Fatal(err)
	}
	if d := status(); d.Error == "" || d.TotalBytes != 0 {
		t.Errorf("a disk without its marker: %+v", d)
	}
	_, err := c.AdoptDisk(t.Context(), ask)
	wantCode(t, "not there", err, client.CodeNotFound)
	if d := status(); d.DiskID != "" {
		t.Errorf("still in use: %+v", d)
	}
	if err := os.Rename(aside, marker); err != nil {
		t.Fatal(err)
	}
	if d, err := c.AdoptDisk(t.Context(), ask); err != nil || d.DiskID != b.diskID || d.Error != "" {
		t.Errorf("back: %+v, %v", d, err)
	}
	if d := status(); d.Error != "" || d.TotalBytes == 0 {
		t.Errorf("back: %+v", d)
	}
}
