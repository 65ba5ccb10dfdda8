//go:build integration

package dataplane

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ashlar/internal/dataplane/client"
)

// TestCopyThroughput moves a volume of random bytes between two data processes' worth of this process over TLS on loopback, beside cp of the same file, both on the medium at the end; ASHLAR_STEPS above 1
// makes it 1 GiB instead of 128 MiB.
func TestCopyThroughput(t *testing.T) {
	size := 128 * mib
	if steps(1) > 1 {
		size = 1024 * mib
	}
	w := newTown(t, 2, newBed)
	cs := w.ready()
	from, to := w.beds[0], w.beds[1]
	a, _ := filled(t, from, cs[0], size)
	var file string
	err := filepath.WalkDir(from.disk, func(name string, _ os.DirEntry, err error) error {
		if strings.HasSuffix(name, ".layer") {
			file = name
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	ids := []string{a.ReplicaID, id("repl", 2), id("repl", 3), id("repl", 4), id("repl", 5)}
	beds := []*bed{from, to}
	for round := range 4 { // there and back
		src, dst := beds[round%2], beds[(round+1)%2]
		began := time.Now()
		ask := client.CopyReplica{VolumeID: a.VolumeID, Volume: a.Volume, Node: dst.node, DiskID: dst.diskID, ReplicaID: ids[round+1], From: ids[round], FromNode: src.node}
		if _, err := cs[(round+1)%2].CopyReplica(t.Context(), ask); err != nil {
			t.Fatal(err)
		}
		if j := awaitJob(t, cs[(round+1)%2], ask.ReplicaID); j.State != jobDone {
			t.Fatalf("copy: %+v", j)
		}
		ours := time.Since(began)
		if err := cs[round%2].DeleteReplica(t.Context(), client.DeleteReplica{DiskID: src.diskID, ReplicaID: ids[round]}); err != nil {
			t.Fatal(err)
		}
		err := filepath.WalkDir(dst.disk, func(name string, _ os.DirEntry, err error) error {
			if strings.HasSuffix(name, ".layer") {
				file = name
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		began = time.Now()
		out := filepath.Join(src.disk, "copy")
		if text, err := exec.Command("sh", "-c", `cp --sparse=always --reflink=never "$0" "$1" && sync "$1"`, file, out).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v: %s", err, text)
		}
		theirs := time.Since(began)
		if err := os.Remove(out); err != nil {
			t.Fatal(err)
		}
		load, _ := os.ReadFile("/proc/loadavg")
		t.Logf("%d MiB: moved in %v (%.0f MiB/s), cp and sync in %v (%.0f MiB/s); load %s", size/mib, ours.Round(time.Millisecond), float64(size)/mib/ours.Seconds(),
			theirs.Round(time.Millisecond), float64(size)/mib/theirs.Seconds(), strings.TrimSpace(string(load)))
	}
}

// TestCopySlowSource: an original whose node gives background work so little that one read takes longer than a node may be silent is copied all the same.
func TestCopySlowSource(t *testing.T) {
	w := newTown(t, 2, newBed)
	cs := w.ready()
	from, to := w.beds[0], w.beds[1]
	a, _ := filled(t, from, cs[0], 2*mib)
	if err := cs[0].SetBackground(t.Context(), client.Background{BytesPerSecond: 170 << 10}); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	ask := client.CopyReplica{VolumeID: a.VolumeID, Volume: a.Volume, Node: to.node, DiskID: to.diskID, ReplicaID: id("repl", 2), From: a.ReplicaID, FromNode: from.node}
	if _, err := cs[1].CopyReplica(t.Context(), ask); err != nil {
		t.Fatal(err)
	}
	if j := awaitJob(t, cs[1], ask.ReplicaID); j.State != jobDone {
		t.Fatalf("copy: %+v", j)
	}
	if took := time.Since(began); took < 5*time.Second || took > time.Minute {
		t.Errorf("2 MiB at 170 KiB/s took %v", took)
	}
}
