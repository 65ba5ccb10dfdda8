package dataplane

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/disk"
	"ashlar/internal/replica"
)

func TestAdoptDisk(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	again, err := c.AdoptDisk(t.Context(), client.Disk{Path: b.disk + "/", ClusterID: testCluster})
	if err != nil || again.DiskID != b.diskID || again.TotalBytes == 0 || again.FreeBytes == 0 {
		t.Errorf("adopted again: %+v, %v", again, err)
	}
	_, err = c.AdoptDisk(t.Context(), client.Disk{Path: b.disk, ClusterID: "cluster-b"})
	wantCode(t, "in use, for another cluster", err, client.CodeForeignDisk)

	mk := func(name string, files map[string]string) string {
		dir := filepath.Join(filepath.Dir(b.disk), name)
		for f, text := range files {
			if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(f)), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, f), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	marker := func(format int, cluster string) string {
		return fmt.Sprintf(`{"format":%d,"diskID":"%s","clusterID":%q,"created":"2026-01-01T00:00:00Z","later":1}`, format, id("disk", 5), cluster)
	}
	for _, tc := range []struct {
		name string
		ask  client.Disk
		code client.Code
	}{
		{"relative path", client.Disk{Path: "x", ClusterID: testCluster}, client.CodeInvalid},
		{"no cluster", client.Disk{Path: mk("e0", nil)}, client.CodeInvalid},
		{"nothing there", client.Disk{Path: "/nonexistent/x", ClusterID: testCluster}, client.CodeNotFound},
		{"a file", client.Disk{Path: filepath.Join(mk("e1", map[string]string{"f": ""}), "f"), ClusterID: testCluster}, client.CodeInvalid},
		{"not empty", client.Disk{Path: mk("e2", map[string]string{"holiday.jpg": "x"}), ClusterID: testCluster}, client.CodeInvalid},
		{"not empty below", client.Disk{Path: mk("e3", map[string]string{"images/x": "x"}), ClusterID: testCluster}, client.CodeInvalid},
		{"foreign", client.Disk{Path: mk("e4", map[string]string{"ashlar-disk.json": marker(1, "cluster-b")}), ClusterID: testCluster}, client.CodeForeignDisk},
		{"newer", client.Disk{Path: mk("e5", map[string]string{"ashlar-disk.json": marker(2, testCluster)}), ClusterID: testCluster}, client.CodeVersion},
		{"broken", client.Disk{Path: mk("e6", map[string]string{"ashlar-disk.json": "{"}), ClusterID: testCluster}, client.CodeCorrupt},
		{"huge", client.Disk{Path: mk("e7", map[string]string{"ashlar-disk.json": strings.Repeat(" ", maxMarkerBytes+1)}), ClusterID: testCluster}, client.CodeCorrupt},
		{"another disk", client.Disk{Path: mk("e8", map[string]string{"ashlar-disk.json": marker(1, testCluster)}), ClusterID: testCluster, DiskID: id("disk", 6)}, client.CodeNotFound},
		{"not mounted", client.Disk{Path: mk("e9", nil), ClusterID: testCluster, DiskID: id("disk", 6)}, client.CodeNotFound},
	} {
		_, err := c.AdoptDisk(t.Context(), tc.ask)
		wantCode(t, tc.name, err, tc.code)
	}
	for i := range 10 {
		names, err := os.ReadDir(filepath.Join(filepath.Dir(b.disk), fmt.Sprintf("e%d", i)))
		if err != nil || len(names) > 1 {
			t.Errorf("e%d: refused, and written to: %v, %v", i, names, err)
		}
	}
	// A new file system, and an interrupted format, are empty.
	for _, dir := range []string{mk("ok1", map[string]string{"lost+found/x": ""}), mk("ok2", map[string]string{"ashlar-disk.json.new": "{"})} {
		if _, err := c.AdoptDisk(t.Context(), client.Disk{Path: dir, ClusterID: testCluster}); err != nil {
			t.Errorf("%s: %v", filepath.Base(dir), err)
		}
	}
	// A copy of a disk is not a second one.
	text, err := os.ReadFile(filepath.Join(b.disk, "ashlar-disk.json"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.AdoptDisk(t.Context(), client.Disk{Path: mk("copy", map[string]string{"ashlar-disk.json": string(text)}), ClusterID: testCluster})
	wantCode(t, "a copy", err, client.CodeExists)
}

// TestOneProcessPerDisk: a second data process, of another run directory, does not get the disk.
// TestAdoptAgainIsUpToDate: the answer to an adoption shows the membership record that an open replica keeps now; a catalogue is rebuilt from it.
func TestAdoptAgainIsUpToDate(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, 16<<20)
	b.open(c, a)
	st, err := c.AdoptDisk(t.Context(), client.Disk{Path: b.disk, ClusterID: testCluster})
	if err != nil || len(st.Replicas) != 1 {
		t.Fatalf("adopted again: %+v, %v", st, err)
	}
	var rec replica.Record
	if err := json.Unmarshal(st.Replicas[0].Record, &rec); err != nil {
		t.Fatal(err)
	}
	if want := b.cat.record(a.VolumeID); rec.Epoch != want.Epoch || rec.Generation != want.Generation || rec.Epoch == 0 {
		t.Errorf("the replica shows epoch %d generation %d, the catalogue has %d, %d", rec.Epoch, rec.Generation, want.Epoch, want.Generation)
	}
	if again := b.state(c).Disks[0].Replicas[0]; string(again.Record) != string(st.Replicas[0].Record) {
		t.Errorf("the state shows %s", again.Record)
	}
}

func TestOneProcessPerDisk(t *testing.T) {
	a, b := newBed(t), newBed(t)
	a.ready()
	c := b.start()
	_, err := c.AdoptDisk(t.Context(), client.Disk{Path: a.disk, ClusterID: testCluster})
	wantCode(t, "a disk another process has", err, client.CodeInUse)
	a.end()
	if _, err := c.AdoptDisk(t.Context(), client.Disk{Path: a.disk, ClusterID: testCluster}); err != nil {
		t.Errorf("once the other is gone: %v", err)
	}
}

// TestFormatSurvivesPowerCuts stops the format of a disk at every change: whatever is left is formatted, or is the disk.
func TestFormatSurvivesPowerCuts(t *testing.T) {
	want := client.Disk{Path: "/d", ClusterID: testCluster}
	for stop := 0; ; stop++ {
		m := disk.NewMem(disk.MemOptions{})
		n, cut := 0, (*disk.Mem)(nil)
		m.OnOp(func(disk.Op) {
			if n++; n == stop+1 {
				cut = m.CrashClone(disk.CrashOptions{Keep: disk.KeepAll})
			}
		})
		d, err := openDisk(m, want, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		for _, keep := range []disk.Keep{disk.KeepAll, disk.KeepNone} {
			whole, err := openDisk(m.CrashClone(disk.CrashOptions{Keep: keep}), want, time.Now())
			if err != nil || whole.DiskID != d.DiskID {
				t.Fatalf("after the format and a power cut that keeps %v: %v", keep, err)
			}
		}
		if cut == nil {
			t.Logf("%d places to stop at", stop)
			return
		}
		if _, err := openDisk(cut.CrashClone(disk.CrashOptions{Keep: disk.KeepNone}), want, time.Now()); err != nil {
			t.Errorf("power cut before change %d, nothing unflushed kept: %v", stop+1, err)
		}
		if _, err := openDisk(cut, want, time.Now()); err != nil {
			t.Errorf("power cut before change %d, everything kept: %v", stop+1, err)
		}
	}
}

// TestSweep removes what dead writers left, and nothing else.
func TestSweep(t *testing.T) {
	m := disk.NewMem(disk.MemOptions{})
	want := client.Disk{Path: "/d", ClusterID: testCluster}
	d, err := openDisk(m, want, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"dead.layer", "alive.layer", "dead.layer.spool"} {
		f, err := m.Create("tmp/"+n, 10)
		if err != nil {
			t.Fatal(err)
		}
		if n == "alive.layer" {
			if err := f.Lock(); err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			continue
		}
		f.Close()
	}
	if err := m.Mkdir("tmp/x.deleted"); err != nil {
		t.Fatal(err)
	}
	if f, err := m.Create("tmp/x.deleted/image.layer", 10); err != nil || f.Close() != nil {
		t.Fatal(err)
	}
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	if d, err = openDisk(m, want, time.Now()); err != nil {
		t.Fatal(err)
	}
	defer d.close()
	if names, err := m.List("tmp"); err != nil || len(names) != 1 || names[0] != "alive.layer" {
		t.Errorf("left in tmp: %v, %v", names, err)
	}
}

func FuzzMarker(f *testing.F) {
	f.Add([]byte(`{"format":1,"diskID":"00000000000000000000000000000001","clusterID":"c","created":"2026-01-01T00:00:00Z"}`))
	f.Add([]byte(`{"format":2}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := parseMarker(text)
		if err == nil && (m.Format != diskFormat || !validID(m.DiskID) || m.ClusterID == "") {
			t.Errorf("%q passed as %+v", text, m)
		}
		if err != nil && !errors.Is(err, client.ErrCorrupt) && !errors.Is(err, client.ErrVersion) {
			t.Errorf("%q: %v", text, err)
		}
	})
}

func FuzzOpenFile(f *testing.F) {
	good := emptyOpenFile("boot")
	a := client.OpenVolume{VolumeID: id("volu", 1), Volume: "v", Node: "n", DiskID: id("disk", 1), ReplicaID: id("repl", 1), Frontend: "nbd"}
	good.Volumes[a.VolumeID] = openEntry{Open: a, Epoch: 1, Session: 2, SizeBytes: 4096}
	text, err := json.Marshal(good)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"format":1,"bootID":"b","volumes":{"x":{}},"salvage":{}}`))
	f.Add([]byte(`{"format":1,"bootID":"b","volumes":null,"salvage":{}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := parseOpenFile(text)
		if err != nil {
			if !errors.Is(err, errOpenList) {
				t.Errorf("%q: %v is not errOpenList", text, err)
			}
			return
		}
		for _, e := range got.Volumes {
			if err := checkOpen(e.Open); err != nil {
				t.Errorf("%q passed with %v", text, err)
			}
		}
	})
}
