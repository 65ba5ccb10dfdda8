//go:build integration

package testbed_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ashlar/internal/catalog"
	"ashlar/internal/testbed"
)

// TestBackupOfTheCatalogue restores a backup from before volumes were opened and written: settings and labels are back, such a volume is refused with the reason and what
// to do (never opened on what the backup believes), and after recover everything that was written is there. What was asked for before the backup is not done again.
func TestBackupOfTheCatalogue(t *testing.T) {
	b := newBed(t)
	b.cli("volume", "create", "v", "--size", "64Mi")
	b.cli("volume", "create", "rest", "--size", "16Mi") // never opened again
	b.attach("v")
	b.qemuIO("v", "write -P 1 0 4M", "flush")
	b.cli("snapshot", "create", "v", "before")
	b.cli("volume", "detach", "v")
	file := b.path("backup.json")
	b.cli("cluster", "backup", file)
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the backup is %v, %v", info.Mode(), err)
	}
	b.refused(exitConflict, []string{"serve"}, "cluster", "restore", "--data-dir", b.p.DataDir, file)

	b.attach("v")
	b.qemuIO("v", "write -P 2 1M 2M", "flush")
	b.cli("snapshot", "create", "v", "after")
	b.qemuIO("v", "write -P 3 3M 4M", "flush")
	b.cli("volume", "detach", "v")
	b.cli("volume", "create", "young", "--size", "16Mi")
	b.cli("shutdown", "--force")
	if err := b.p.WaitServe(); err != nil {
		t.Error(err)
	}
	b.refused(exitConflict, []string{"not empty", "etcd"}, "cluster", "restore", "--data-dir", b.p.DataDir, file)
	b.loseCatalogue()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.path("half.json"), text[:len(text)-30], 0o600); err != nil {
		t.Fatal(err)
	}
	b.refused(exitRefused, []string{"not a backup"}, "cluster", "restore", "--data-dir", b.p.DataDir, b.path("half.json"))
	b.later(text)
	b.loseCatalogue()
	b.cli("cluster", "restore", "--data-dir", b.p.DataDir, file)
	b.cli("cluster", "restore", "--data-dir", b.p.DataDir, file) // as after an interruption

	if err := b.p.StartServe(b.ctx); err != nil {
		t.Fatal(err)
	}
	files := len(b.files())
	_, err = b.p.Text(b.ctx, "volume", "attach", "v", "--timeout", "5s")
	if err == nil {
		t.Fatal("a volume was attached by a catalogue older than its replica")
	}
	if !strings.Contains(err.Error(), "volume v") || !strings.Contains(err.Error(), "recover") {
		t.Errorf("it does not name the volume, or not what to do: %v", err)
	}
	b.attach("rest")
	b.cli("volume", "detach", "rest")
	b.cli("volume", "detach", "v")
	if n := len(b.files()); n < files {
		t.Errorf("%d files on the disk, %d before", n, files)
	}
	b.recover()
	b.attach("v")
	b.qemuIO("v", "read -P 1 0 1M", "read -P 2 1M 2M", "read -P 3 3M 4M")
	if s := b.snapshots("v"); len(s) != 2 || s["after"].Parent != "before" {
		t.Errorf("snapshots: %+v", s)
	}
	if v := b.volume("young"); v.State != "detached" {
		t.Errorf("the volume that the backup did not know: %+v", v)
	}
	b.clean("v", "young", "rest")
	if left, _ := filepath.Glob(b.p.DataDir + "/etcd/*.tmp"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// later has a second node start on a catalogue that a later version wrote: it is refused, with what to do, and the catalogue is as it was.
func (b *bed) later(backup []byte) {
	b.Helper()
	format := func(n int) []byte { return fmt.Appendf(nil, `"format":%d,"created"`, n) } // of the cluster's record; the document has its own
	text := bytes.Replace(backup, format(catalog.Format), format(catalog.Format+1), 1)
	if bytes.Equal(text, backup) {
		b.Fatalf("no format in %s", backup)
	}
	if err := os.WriteFile(b.path("later.json"), text, 0o600); err != nil {
		b.Fatal(err)
	}
	second := &testbed.Process{Bin: b.p.Bin, DataDir: b.path("later"), RunDir: b.path("lrun")}
	b.cli("cluster", "restore", "--data-dir", second.DataDir, b.path("later.json"))
	for range 2 {
		_, err := second.Text(b.ctx, "serve", "--data-dir", second.DataDir, "--run-dir", second.RunDir, "--listen", "none", "--name", "node1")
		e, ok := errors.AsType[*testbed.CommandError](err)
		if !ok || e.Code != exitRefused || !strings.Contains(e.Stderr, "newer than this build") || !strings.Contains(e.Stderr, "install") {
			b.Errorf("serve on a catalogue of a later version: %v", err)
		}
	}
	_ = second.Stop(b.ctx) // its holder and data process go on, because guests may be on them
}
