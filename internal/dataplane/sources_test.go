package dataplane

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"ashlar/internal/dataplane/client"
)

// reader connects to a source as its reader.
func reader(t *testing.T, b *bed, id string) *nbdConn {
	t.Helper()
	c, err := dialNBD(filepath.Join(b.runDir, "source", id+".sock"), id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestSnapshotSource: a snapshot can be read while its volume goes on, and written by nobody; it ends when asked, with its volume, and with the process.
func TestSnapshotSource(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, 16*mib)
	b.open(c, a)
	g := guest(t, b.runDir, a.Volume)
	if err := g.write(0, page("then")); err != nil {
		t.Fatal(err)
	}
	op := client.Operate{VolumeID: a.VolumeID, Verb: verbSnapshot, Snapshot: "s", OpID: id("oper", 1)}
	if _, err := c.Operate(t.Context(), op); err != nil {
		t.Fatal(err)
	}
	if err := g.write(0, page("now")); err != nil {
		t.Fatal(err)
	}
	ask := client.OpenSource{ID: id("sour", 1), VolumeID: a.VolumeID, Snapshot: "s"}
	path := filepath.Join(b.runDir, "source", ask.ID+".sock")
	for range 2 {
		src, err := c.OpenSource(t.Context(), ask)
		if want := (client.Source{ID: ask.ID, URI: "nbd+unix:///" + ask.ID + "?socket=" + path, SizeBytes: 16 * mib}); err != nil || src != want {
			t.Fatalf("source %+v, %v", src, err)
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket %v, %v", info, err)
	}
	r := reader(t, b, ask.ID)
	if got, err := r.read(0, 4096); err != nil || !bytes.Equal(got, page("then")) {
		t.Errorf("the source reads %.10q, %v", got, err)
	}
	if err := r.write(0, page("x")); !errors.Is(err, errNBD(1)) {
		t.Errorf("a write to a source: %v", err)
	}
	// Its layers stay as they are, though the snapshot is deleted and purged.
	for _, verb := range []string{verbSnapshotRemove, verbPurge} {
		if _, err := c.Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, Verb: verb, Snapshot: "s"}); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := r.read(0, 4096); err != nil || !bytes.Equal(got, page("then")) {
		t.Errorf("after a purge the source reads %.10q, %v", got, err)
	}
	other := ask
	other.Snapshot = "t"
	_, err := c.OpenSource(t.Context(), other)
	wantCode(t, "the same id for another", err, client.CodeExists)
	for range 2 {
		if err := c.CloseSource(t.Context(), client.CloseSource{ID: ask.ID}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.read(0, 4096); err == nil {
		t.Error("closed, and read")
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("closed, and its socket is there: %v", err)
	}

	op.Snapshot, op.OpID = "u", id("oper", 2)
	if _, err := c.Operate(t.Context(), op); err != nil {
		t.Fatal(err)
	}
	ask.Snapshot = "u"
	if _, err := c.OpenSource(t.Context(), ask); err != nil {
		t.Fatal(err)
	}
	b.end()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the process ended, and a source's socket is there: %v", err)
	}
	c = b.start()
	eventually(t, "the volume is back", func() bool { st, _ := status(t, c, a.VolumeID); return st.State == stateOpen })
	if _, err := c.OpenSource(t.Context(), ask); err != nil {
		t.Fatal(err)
	}
	r = reader(t, b, ask.ID)
	if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.read(0, 4096); err == nil {
		t.Error("the volume is closed, and its source reads")
	}
}

// TestImageSource: an image can be read, and is not deleted meanwhile.
func TestImageSource(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	file := filepath.Join(filepath.Dir(b.disk), "golden.raw")
	if err := os.WriteFile(file, bytes.Repeat(page("image"), 256), 0o600); err != nil {
		t.Fatal(err)
	}
	imp := client.ImportImage{DiskID: b.diskID, ImageID: id("imag", 1), Name: "golden", Source: file}
	if j := importAndWait(t, c, imp); j.State != jobDone {
		t.Fatalf("import: %+v", j)
	}
	ask := client.OpenSource{ID: id("sour", 1), DiskID: b.diskID, ImageID: imp.ImageID}
	src, err := c.OpenSource(t.Context(), ask)
	if err != nil || src.SizeBytes != mib {
		t.Fatalf("source %+v, %v", src, err)
	}
	r := reader(t, b, ask.ID)
	if got, err := r.read(mib-4096, 4096); err != nil || !bytes.Equal(got, page("image")) {
		t.Errorf("the source reads %.10q, %v", got, err)
	}
	del := client.DeleteImage{DiskID: b.diskID, ImageID: imp.ImageID}
	wantCode(t, "delete an image that is read", c.DeleteImage(t.Context(), del), client.CodeInUse)
	if err := c.CloseSource(t.Context(), client.CloseSource{ID: ask.ID}); err != nil {
		t.Fatal(err)
	}
	if err := c.DeleteImage(t.Context(), del); err != nil {
		t.Error(err)
	}
	_, err = c.OpenSource(t.Context(), ask)
	wantCode(t, "an image that is gone", err, client.CodeNotFound)
}

func TestSourceRefusals(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, mib)
	ok := client.OpenSource{ID: id("sour", 1), VolumeID: a.VolumeID, Snapshot: "s"}
	for name, tc := range map[string]struct {
		edit func(*client.OpenSource)
		code client.Code
	}{
		"not open":           {func(*client.OpenSource) {}, client.CodeNotFound},
		"no id":              {func(a *client.OpenSource) { a.ID = "" }, client.CodeInvalid},
		"an id that escapes": {func(a *client.OpenSource) { a.ID = "../../x" }, client.CodeInvalid},
		"no snapshot":        {func(a *client.OpenSource) { a.Snapshot = "" }, client.CodeInvalid},
		"both":               {func(a *client.OpenSource) { a.DiskID, a.ImageID = b.diskID, id("imag", 1) }, client.CodeInvalid},
		"no such image":      {func(s *client.OpenSource) { *s = client.OpenSource{ID: s.ID, DiskID: b.diskID, ImageID: id("imag", 1)} }, client.CodeNotFound},
		"no such disk": {func(s *client.OpenSource) {
			*s = client.OpenSource{ID: s.ID, DiskID: id("disk", 7), ImageID: id("imag", 1)}
		}, client.CodeNotFound},
	} {
		ask := ok
		tc.edit(&ask)
		_, err := c.OpenSource(t.Context(), ask)
		wantCode(t, name, err, tc.code)
	}
	b.open(c, a)
	_, err := c.OpenSource(t.Context(), ok)
	wantCode(t, "no such snapshot", err, client.CodeNotFound)
	if _, err := c.Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, Verb: verbSnapshot, Snapshot: "s", OpID: id("oper", 1)}); err != nil {
		t.Fatal(err)
	}
	for i := range maxSources {
		ok.ID = fmt.Sprintf("%032x", i)
		if _, err := c.OpenSource(t.Context(), ok); err != nil {
			t.Fatal(err)
		}
	}
	ok.ID = id("sour", 2)
	_, err = c.OpenSource(t.Context(), ok)
	wantCode(t, "one too many", err, client.CodeInUse)
	if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(b.runDir, "source")); err != nil || len(left) != 0 {
		t.Errorf("left: %d, %v", len(left), err)
	}
}
