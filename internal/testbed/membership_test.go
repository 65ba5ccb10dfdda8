//go:build integration

package testbed_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestRunbookLastOfTwo makes a cluster of two voters one of one, in order: the second is emptied and removed while it runs, gives up its member of the catalogue, and ends, all its
// processes, saying why. What it had goes on at the first, which agrees with itself.
func TestRunbookLastOfTwo(t *testing.T) {
	w := newCrowd(t, 2, loopback)
	one, two := w.nodes[0], w.nodes[1]
	one.untilVote("node1", "node2")
	one.cli("node", "tag", "node2", "n2")
	one.cli("volume", "create", "v", "--size", "64Mi", "--node-selector", "n2")
	one.cli("volume", "attach", "v", "--frontend", "nbd")
	one.qemuIO("v", "write -P 7 0 4M", "flush")
	one.refused(exitConflict, []string{"node2 is running"}, "node", "remove", "node2")
	one.cli("volume", "detach", "v")
	one.cli("node", "tag", "node1", "n2")
	one.cli("node", "drain", "node2")
	two.refused(exitConflict, []string{"ask another node"}, "node", "remove", "node2")
	began := time.Now()
	one.cli("node", "remove", "node2")
	w.Logf("removed after %v", time.Since(began).Round(time.Millisecond))
	if err := two.p.WaitServe(); err == nil {
		w.Error("serve of a removed node ends as if it had been told to")
	}
	log, err := os.ReadFile(filepath.Join(two.dir, "serve.log"))
	if err != nil {
		w.Fatal(err)
	}
	two.says(string(log), "was removed from its cluster", "to use this machine again, move")
	two.until(20*time.Second, "its other processes end", func() bool { return two.p.PID("data") == 0 && two.p.PID("hold") == 0 })
	one.untilVote("node1")
	one.cli("volume", "attach", "v", "--frontend", "nbd")
	one.qemuIO("v", "read -P 7 0 4M")
	// It does so by itself from now on, also after a start.
	one.stopServe()
	one.startServe()
	one.until(20*time.Second, "it answers", func() bool { return len(one.members()) == 1 })
	one.cli("volume", "detach", "v")
	if out := one.doctor(); strings.Contains(out, "node2") {
		t.Errorf("doctor still speaks of the other:\n%s", out)
	}
}
