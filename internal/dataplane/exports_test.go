package dataplane

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"ashlar/internal/dataplane/client"
)

// TestExport: a snapshot becomes an image file through a source, its job tells how it went until it is forgotten, and imports take what a source offers.
func TestExport(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, 8*mib)
	b.open(c, a)
	g := guest(t, b.runDir, a.Volume)
	if err := errors.Join(g.write(mib, page("exported")), g.flush()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, Verb: verbSnapshot, Snapshot: "s", OpID: id("oper", 1)}); err != nil {
		t.Fatal(err)
	}
	src, err := c.OpenSource(t.Context(), client.OpenSource{ID: id("sour", 1), VolumeID: a.VolumeID, Snapshot: "s"})
	if err != nil {
		t.Fatal(err)
	}
	find := func(jobID string) (out client.Job) {
		t.Helper()
		for _, j := range b.state(c).Jobs {
			if j.ID == jobID {
				out = j
			}
		}
		return out
	}
	run := func(ask client.ExportImage) (out client.Job) {
		t.Helper()
		for range 2 {
			if _, err := c.ExportImage(t.Context(), ask); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "the export ends", func() bool { out = find(ask.ID); return out.State != jobRunning })
		return out
	}
	ask := client.ExportImage{ID: id("expo", 1), Source: src.URI, Format: "raw", To: filepath.Join(filepath.Dir(b.disk), "out.raw")}
	if j := run(ask); j.State != jobDone || j.Kind != kindExport || j.Percent != 100 || j.DoneBytes == 0 || j.Image != nil {
		t.Errorf("job %+v", j)
	}
	text, err := os.ReadFile(ask.To)
	if err != nil || len(text) != 8*mib || !bytes.Equal(text[mib:mib+4096], page("exported")) || len(bytes.Trim(text[:mib], "\x00")) != 0 {
		t.Errorf("exported %d bytes, %v", len(text), err)
	}
	other := ask
	other.Format = "qcow2"
	_, err = c.ExportImage(t.Context(), other)
	wantCode(t, "the same id for another", err, client.CodeExists)
	for range 2 {
		if err := c.CancelImport(t.Context(), client.CancelImport{ImageID: ask.ID}); err != nil {
			t.Fatal(err)
		}
	}
	if j := find(ask.ID); j.State != "" {
		t.Errorf("forgotten, and there: %+v", j)
	}
	ask.ID = id("expo", 2)
	if _, err = c.ExportImage(t.Context(), ask); err == nil { // found by whoever starts it, or by the work itself
		eventually(t, "the export ends", func() bool { return find(ask.ID).State != jobRunning })
		err = client.Failure(find(ask.ID).Code, find(ask.ID).Error)
	}
	wantCode(t, "a file that is there", err, client.CodeExists)
	for name, bad := range map[string]client.ExportImage{
		"no id":     {Source: src.URI, Format: "raw", To: "/tmp/x"},
		"no source": {ID: id("expo", 3), Format: "raw", To: "/tmp/x"},
		"no format": {ID: id("expo", 3), Source: src.URI, To: "/tmp/x"},
		"no target": {ID: id("expo", 3), Source: src.URI, Format: "raw", To: "x"},
	} {
		_, err := c.ExportImage(t.Context(), bad)
		wantCode(t, name, err, client.CodeInvalid)
	}

	// The same source, imported over NBD.
	if j := importAndWait(t, c, client.ImportImage{DiskID: b.diskID, ImageID: id("imag", 1), Name: "i", Source: src.URI}); j.State != jobDone || j.Image.VirtualSizeBytes != 8*mib {
		t.Errorf("import over NBD: %+v", j)
	}
	if err := c.CloseSource(t.Context(), client.CloseSource{ID: id("sour", 1)}); err != nil {
		t.Fatal(err)
	}
	ask.ID, ask.To = id("expo", 4), ask.To+"2"
	if j := run(ask); j.State != jobFailed || j.Code == "" {
		t.Errorf("a source that is gone: %+v", j)
	}
	if _, err := os.Stat(ask.To); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("failed, and there is a file: %v", err)
	}
}
