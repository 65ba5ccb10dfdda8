package node

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"ashlar/internal/cluster"
)

// TestUnmark takes an empty disk along into another cluster, and leaves alone whatever has something on it, is another's, or is none.
func TestUnmark(t *testing.T) {
	format := func(clusterID string) string {
		dir := t.TempDir()
		for _, sub := range []string{"replicas", "images", "tmp"} {
			if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		text, err := json.Marshal(map[string]any{"format": 1, "diskID": "d", "clusterID": clusterID})
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, diskMarker), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		return dir
	}
	marked := func(dir string) bool {
		_, err := os.Stat(filepath.Join(dir, diskMarker))
		return !errors.Is(err, fs.ErrNotExist)
	}
	empty := format("mine")
	for range 2 { // the second time it is done already
		if err := unmark(t.Context(), empty, "mine"); err != nil || marked(empty) {
			t.Errorf("an empty disk: %v", err)
		}
	}
	for _, sub := range []string{"replicas", "images"} {
		dir := format("mine")
		if err := os.Mkdir(filepath.Join(dir, sub, "x"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unmark(t.Context(), dir, "mine"); !errors.Is(err, cluster.ErrRemains) || !marked(dir) {
			t.Errorf("a disk with something in %s: %v, want ErrRemains", sub, err)
		}
	}
	other := format("other")
	if err := unmark(t.Context(), other, "mine"); err != nil || !marked(other) {
		t.Errorf("another cluster's disk: %v", err)
	}
	if err := os.WriteFile(filepath.Join(other, diskMarker), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unmark(t.Context(), other, "mine"); err == nil || !marked(other) {
		t.Error("a marker that cannot be read was taken for ours")
	}
}
