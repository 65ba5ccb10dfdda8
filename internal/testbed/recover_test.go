//go:build integration

package testbed_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// recover stops serve, rebuilds the catalogue from the disk, and starts serve again.
func (b *bed) recover() {
	b.Helper()
	if err := b.p.KillServe(); err != nil {
		b.Fatal(err)
	}
	start := time.Now()
	b.Logf("%s", b.cli("recover", "--data-dir", b.p.DataDir, b.disk()))
	b.Logf("recovered in %d ms", time.Since(start).Milliseconds())
	if err := b.p.StartServe(b.ctx); err != nil {
		b.Fatal(err)
	}
}

func (b *bed) loseCatalogue() {
	b.Helper()
	if err := os.RemoveAll(filepath.Join(b.p.DataDir, "etcd")); err != nil {
		b.Fatal(err)
	}
}

// TestLostCatalogue deletes etcd's files while everything is stopped; a node that starts then touches nothing and says so; recover brings all back: images, volumes, snapshots,
// with content and names. A second recover changes nothing.
func TestLostCatalogue(t *testing.T) {
	b := newBed(t)
	b.furnish()
	b.cli("volume", "detach", "one")
	b.cli("volume", "detach", "bare")
	files := len(b.files())
	b.cli("shutdown", "--force")
	if err := b.p.WaitServe(); err != nil {
		t.Error(err)
	}
	b.loseCatalogue()

	// Recover refuses while serve runs, and serve without a catalogue touches nothing.
	if err := b.p.StartServe(b.ctx); err != nil {
		t.Fatal(err)
	}
	var s statusView
	b.json(&s, "status")
	if len(s.Volumes) != 0 || len(s.Images) != 0 {
		t.Errorf("status without a catalogue: %+v", s)
	}
	t.Logf("status after the loss:\n%s", b.cli("status"))
	b.refused(exitConflict, []string{b.p.DataDir}, "recover", "--data-dir", b.p.DataDir, b.disk())
	if n := len(b.files()); n != files {
		t.Errorf("%d files on the disk, %d before the catalogue was lost", n, files)
	}
	b.recover()
	b.furniture()
	for _, v := range []string{"one", "two", "three", "bare"} {
		if v := b.volume(v); v.State != "detached" {
			t.Errorf("volume after the recovery: %+v", v)
		}
	}
	b.unchanged(b.recover)
	b.furniture()
	// Everything can be done with what was recovered.
	b.attach("one")
	b.cli("snapshot", "create", "one", "after")
	b.cli("snapshot", "delete", "one", "first")
	b.cli("volume", "expand", "one", "--size", "80Mi")
	b.cli("volume", "create", "new", "--image", "golden")
	b.attach("new")
	b.same("new", b.path("golden.raw"))
	b.refused(exitConflict, []string{"golden"}, "image", "delete", "golden")
	b.cli("volume", "delete", "one", "two", "three", "bare", "new")
	b.cli("image", "delete", "golden")
	if left := b.onDisk(b.disk()); left > 256*kib {
		t.Errorf("%d bytes are left after everything was deleted", left)
	}
}

// TestLostRecord takes the own records of copies away, by removing and by overwriting them: such a volume does not open and says what to do, and recover makes the records again from the layers, with the catalogue
// and without it: names, content, snapshots, also those beside the present.
func TestLostRecord(t *testing.T) {
	b := newBed(t)
	b.furnish()
	b.cli("volume", "detach", "one")
	b.cli("volume", "detach", "bare")
	lose := func() {
		t.Helper()
		b.cli("shutdown", "--force")
		if err := b.p.WaitServe(); err != nil {
			t.Error(err)
		}
		n := 0
		b.each(b.disk(), func(path string, info os.FileInfo) {
			if filepath.Base(path) != "replica" {
				return
			}
			err := os.Remove(path)
			if n++; err == nil && n%2 == 0 {
				err = os.WriteFile(path, make([]byte, info.Size()), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		})
		if n != 4 {
			t.Fatalf("%d copies have a record, want 4", n)
		}
	}
	lose()
	if err := b.p.StartServe(b.ctx); err != nil {
		t.Fatal(err)
	}
	for _, v := range []string{"one", "two"} {
		b.refused(exitConflict, []string{"volume " + v, "record is lost", "ashlar recover"}, "volume", "attach", v)
	}
	b.recover()
	b.furniture("one", "two")
	for _, v := range []string{"one", "two"} {
		b.cli("volume", "detach", v)
	}
	lose()
	b.loseCatalogue()
	t.Logf("%s", b.cli("recover", "--data-dir", b.p.DataDir, "--name", "node1", b.disk()))
	if err := b.p.StartServe(b.ctx); err != nil {
		t.Fatal(err)
	}
	b.furniture()
}

// files are all files on the node's disk.
func (b *bed) files() (out []string) {
	b.each(b.disk(), func(path string, _ os.FileInfo) { out = append(out, path) })
	return out
}

// TestLostCatalogueUnderIO loses the catalogue while guests use their volumes: fio never sees it, neither the loss nor the recovery, and the volumes stay attached.
func TestLostCatalogueUnderIO(t *testing.T) {
	b := newBed(t)
	attached := b.furnish()
	b.cli("volume", "create", "busy", "--size", "128Mi")
	b.attach("busy")
	data := b.p.PID("data")
	f := b.startFio(b.uri("busy"), 64*mib, 2500)
	if err := b.p.KillServe(); err != nil {
		t.Fatal(err)
	}
	b.loseCatalogue()
	if err := b.p.StartServe(b.ctx); err != nil {
		t.Fatal(err)
	}
	b.qemuIO("one", "read -P 0x20 6M 4M")
	b.sameData(data)
	f.running()
	b.recover()
	b.sameData(data)
	f.running()
	b.furniture(append(attached, "busy")...)
	b.cli("snapshot", "create", "busy", "during")
	ops, worst := f.wait()
	t.Logf("fio verified %d operations over the loss of the catalogue and its recovery; the slowest took %v", ops, worst.Round(time.Millisecond))
	b.kill("data")
	b.dial("busy")
	b.furniture(append(attached, "busy")...)
	b.clean("busy")
}

// TestLostCatalogueAndReboot loses the catalogue and every process.
func TestLostCatalogueAndReboot(t *testing.T) {
	b := newBed(t)
	b.furnish()
	b.crash()
	b.loseCatalogue()
	b.recover()
	b.furniture()
}

// TestOldCatalogue puts a backup of the catalogue from before volumes were opened and written in place of the newer one: such a volume is refused, with the
// reason and what to do, until recover; then everything written is there.
func TestOldCatalogue(t *testing.T) {
	b := newBed(t)
	b.cli("volume", "create", "v", "--size", "64Mi")
	b.attach("v")
	b.qemuIO("v", "write -P 1 0 4M", "flush")
	b.cli("snapshot", "create", "v", "before")
	b.cli("volume", "detach", "v")
	b.cli("shutdown", "--force")
	if err := b.p.WaitServe(); err != nil {
		t.Error(err)
	}
	b.tool("cp", "-a", filepath.Join(b.p.DataDir, "etcd"), b.path("backup"))

	if err := b.p.StartServe(b.ctx); err != nil {
		t.Fatal(err)
	}
	b.attach("v")
	b.qemuIO("v", "write -P 2 1M 2M", "flush")
	b.cli("snapshot", "create", "v", "after")
	b.qemuIO("v", "write -P 3 3M 4M", "flush")
	b.cli("volume", "detach", "v")
	b.cli("volume", "create", "young", "--size", "16Mi") // unknown to the backup
	b.cli("shutdown", "--force")
	if err := b.p.WaitServe(); err != nil {
		t.Error(err)
	}
	b.loseCatalogue()
	b.tool("cp", "-a", b.path("backup"), filepath.Join(b.p.DataDir, "etcd"))

	if err := b.p.StartServe(b.ctx); err != nil {
		t.Fatal(err)
	}
	files := len(b.files())
	_, err := b.p.Text(b.ctx, "volume", "attach", "v", "--timeout", "5s")
	if err == nil {
		t.Fatal("a volume was attached by a catalogue older than its replica")
	}
	t.Logf("attach by an old catalogue: %v", err)
	if !strings.Contains(err.Error(), "volume v") || !strings.Contains(err.Error(), "recover") {
		t.Errorf("it does not name the volume, or not what to do: %v", err)
	}
	b.cli("volume", "detach", "v")
	if n := len(b.files()); n != files {
		t.Errorf("%d files on the disk, %d before", n, files)
	}
	b.recover()
	b.attach("v")
	b.qemuIO("v", "read -P 1 0 1M", "read -P 2 1M 2M", "read -P 3 3M 4M")
	if s := b.snapshots("v"); len(s) != 2 || s["after"].Parent != "before" || !s["after"].Children["volume-head"] {
		t.Errorf("snapshots: %+v", s)
	}
	if v := b.volume("young"); v.State != "detached" {
		t.Errorf("the volume that the backup did not know: %+v", v)
	}
	b.clean("v", "young")
}
