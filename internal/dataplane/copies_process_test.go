package dataplane

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/layer"
	"ashlar/internal/replica/local"
)

// awaitJob waits until a job has ended.
func awaitJob(t *testing.T, c *client.Client, id string) (out client.Job) {
	t.Helper()
	eventually(t, "job "+id+" ends", func() bool {
		st, err := c.State(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, j := range st.Jobs {
			if j.ID == id && j.State != jobRunning {
				out = j
				return true
			}
		}
		return false
	})
	return out
}

// golden imports an image of random bytes on a bed's disk, and returns the bytes.
func golden(t *testing.T, b *bed, c *client.Client) (client.ImportImage, []byte) {
	t.Helper()
	raw := make([]byte, 4*mib)
	r := rand.New(rand.NewPCG(11, 0))
	for i := range raw[:3*mib] {
		raw[i] = byte(r.Uint32())
	}
	file := filepath.Join(t.TempDir(), "golden.raw")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	a := client.ImportImage{DiskID: b.diskID, ImageID: id("imag", 1), Name: "golden", Source: file}
	if j := importAndWait(t, c, a); j.State != jobDone {
		t.Fatalf("import: %+v", j)
	}
	return a, raw
}

// imageOn is what a node's state says of an image.
func imageOn(t *testing.T, b *bed, c *client.Client, imageID string) (out client.ImageFound) {
	t.Helper()
	for _, d := range b.state(c).Disks {
		for _, i := range d.Images {
			if i.ImageID == imageID {
				out = i
			}
		}
	}
	return out
}

// TestCopyReplica: a volume on an image, with snapshots, moves from one node to another, with the image; it reads the same there, the old replica serves nobody and can be deleted, and jobs are told and forgotten.
func TestCopyReplica(t *testing.T) {
	w := newTown(t, 2, newBed)
	cs := w.ready()
	from, to := w.beds[0], w.beds[1]
	img, raw := golden(t, from, cs[0])

	made := client.CreateReplica{DiskID: from.diskID, ReplicaID: id("repl", 1), VolumeID: id("volu", 1), Volume: "vol1", HeadID: id("repl", 1), SizeBytes: 16 * mib, ImageID: img.ImageID, Image: "golden"}
	from.cat.create(made)
	if err := cs[0].CreateReplica(t.Context(), made); err != nil {
		t.Fatal(err)
	}
	a := client.OpenVolume{VolumeID: made.VolumeID, Volume: made.Volume, Node: from.node, DiskID: made.DiskID, ReplicaID: made.ReplicaID, Frontend: "nbd"}
	from.open(cs[0], a)
	g := guest(t, from.runDir, a.Volume)
	if err := g.write(0, page("before")); err != nil {
		t.Fatal(err)
	}
	if _, err := cs[0].Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, OpID: id("oper", 1), Verb: verbSnapshot, Snapshot: "s1"}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(g.write(0, page("after")), g.write(8*mib, page("beyond the image"))); err != nil {
		t.Fatal(err)
	}
	ask := client.CopyReplica{VolumeID: a.VolumeID, Volume: a.Volume, Node: to.node, DiskID: to.diskID, ReplicaID: id("repl", 2), From: a.ReplicaID, FromNode: from.node, ImageID: img.ImageID}
	if err := cs[0].CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	if _, err := cs[1].CopyReplica(t.Context(), ask); err != nil {
		t.Fatal(err)
	}
	if j := awaitJob(t, cs[1], ask.ReplicaID); j.State != jobFailed || j.Kind != kindCopy || j.Code != client.CodeNotFound {
		t.Errorf("without the image: %+v", j)
	}
	if rec := from.cat.record(a.VolumeID); rec.Members[0].ReplicaID != a.ReplicaID || rec.WriterNode != "" {
		t.Errorf("after a copy that failed the record is %+v", rec)
	}

	peer := client.ImportImage{DiskID: to.diskID, ImageID: img.ImageID, Name: "golden", Source: "peer://" + from.node + "/" + from.diskID}
	if j := importAndWait(t, cs[1], peer); j.State != jobDone || j.Percent != 100 {
		t.Fatalf("copy of the image: %+v", j)
	}
	was, now := imageOn(t, from, cs[0], img.ImageID), imageOn(t, to, cs[1], img.ImageID)
	now.AllocatedBytes = was.AllocatedBytes
	if was != now || was.Digest == "" || was.SHA512 == "" {
		t.Errorf("the image is %+v, and its copy %+v", was, now)
	}

	if _, err := cs[1].CopyReplica(t.Context(), ask); err != nil {
		t.Fatal(err)
	}
	if j := awaitJob(t, cs[1], ask.ReplicaID); j.State != jobDone || j.Kind != kindCopy || j.Percent != 100 || j.DoneBytes != 3*4096 || j.TotalBytes != 3*4096 {
		t.Fatalf("copy: %+v", j)
	}
	if again, err := cs[1].CopyReplica(t.Context(), ask); err != nil || again.State != jobDone {
		t.Errorf("asked for again: %+v, %v", again, err)
	}
	if err := cs[1].CancelImport(t.Context(), client.CancelImport{ImageID: ask.ReplicaID}); err != nil || len(to.state(cs[1]).Jobs) != 1 {
		t.Errorf("forgotten: %v, jobs %+v", err, to.state(cs[1]).Jobs)
	}
	if _, err := cs[1].CopyReplica(t.Context(), ask); err != nil {
		t.Fatal(err)
	}
	if j := awaitJob(t, cs[1], ask.ReplicaID); j.State != jobDone {
		t.Errorf("asked for again, by a process that does not know: %+v", j)
	}
	rec := from.cat.record(a.VolumeID)
	if len(rec.Members) != 1 || rec.Members[0].ReplicaID != ask.ReplicaID || rec.Members[0].Node != to.node || rec.WriterNode != "" {
		t.Errorf("the record is %+v", rec)
	}
	_, err := cs[0].OpenVolume(t.Context(), a)
	wantCode(t, "open at the old replica", err, client.CodeInvalid)

	b := a
	b.Node, b.DiskID, b.ReplicaID = to.node, to.diskID, ask.ReplicaID
	if st := to.open(cs[1], b); len(st.Layers) != 2 {
		t.Errorf("opened: %+v", st)
	}
	g = guest(t, to.runDir, b.Volume)
	for off, want := range map[int64][]byte{0: page("after"), 4096: raw[4096:8192], 8 * mib: page("beyond the image"), 12 * mib: make([]byte, 4096)} {
		if got, err := g.read(off, 4096); err != nil || !bytes.Equal(got, want) {
			t.Errorf("at %d it reads %.20q (%v)", off, got, err)
		}
	}
	if _, err := cs[1].Operate(t.Context(), client.Operate{VolumeID: b.VolumeID, OpID: id("oper", 3), Verb: verbRevert, Snapshot: "s1"}); client.CodeOf(err) != client.CodeFrontend {
		t.Errorf("revert: %v", err)
	}
	_, err = cs[1].CopyReplica(t.Context(), client.CopyReplica{VolumeID: a.VolumeID, Volume: a.Volume, Node: to.node, DiskID: to.diskID, ReplicaID: id("repl", 3), From: ask.ReplicaID, FromNode: to.node, ImageID: img.ImageID})
	wantCode(t, "copy of a volume that is open here", err, client.CodeInUse)
	wantCode(t, "the image is stood on", cs[1].DeleteImage(t.Context(), client.DeleteImage{DiskID: to.diskID, ImageID: img.ImageID}), client.CodeInUse)
	if err := cs[0].DeleteReplica(t.Context(), client.DeleteReplica{DiskID: from.diskID, ReplicaID: a.ReplicaID}); err != nil {
		t.Errorf("delete the old replica: %v", err)
	}
	if err := cs[0].DeleteImage(t.Context(), client.DeleteImage{DiskID: from.diskID, ImageID: img.ImageID}); err != nil {
		t.Errorf("delete the old image: %v", err)
	}
}

// TestCopyReplicaNear: from one disk of a node to another, with the image; a process of no cluster does it.
func TestCopyReplicaNear(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	img, _ := golden(t, b, c)
	a := b.volume(c, 1, 8*mib)
	b.open(c, a)
	g := guest(t, b.runDir, a.Volume)
	if err := errors.Join(g.write(4096, page("moves")), c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID})); err != nil {
		t.Fatal(err)
	}
	second := filepath.Join(shortDir(t), "second")
	if err := os.Mkdir(second, 0o700); err != nil {
		t.Fatal(err)
	}
	st, err := c.AdoptDisk(t.Context(), client.Disk{Path: second, ClusterID: testCluster})
	if err != nil {
		t.Fatal(err)
	}
	ask := client.CopyReplica{VolumeID: a.VolumeID, Volume: a.Volume, Node: testNode, DiskID: st.DiskID, ReplicaID: id("repl", 2), From: a.ReplicaID, FromNode: testNode}
	if _, err := c.CopyReplica(t.Context(), ask); err != nil {
		t.Fatal(err)
	}
	if j := awaitJob(t, c, ask.ReplicaID); j.State != jobDone {
		t.Fatalf("copy: %+v", j)
	}
	n := a
	n.DiskID, n.ReplicaID = st.DiskID, ask.ReplicaID
	b.open(c, n)
	if got, err := guest(t, b.runDir, n.Volume).read(4096, 4096); err != nil || !bytes.Equal(got, page("moves")) {
		t.Errorf("it reads %.20q (%v)", got, err)
	}
	peer := client.ImportImage{DiskID: st.DiskID, ImageID: img.ImageID, Name: "golden", Source: "peer://" + testNode + "/" + b.diskID}
	if j := importAndWait(t, c, peer); j.State != jobDone {
		t.Errorf("image from the other disk: %+v", j)
	}
}

// TestPeerImageRefusals: what is not the image, not whole, or not to be had becomes none, and leaves nothing.
func TestPeerImageRefusals(t *testing.T) {
	w := newTown(t, 2, newBed)
	cs := w.ready()
	from, to := w.beds[0], w.beds[1]
	img, _ := golden(t, from, cs[0])
	good := client.ImportImage{DiskID: to.diskID, ImageID: img.ImageID, Name: "golden", Source: "peer://" + from.node + "/" + from.diskID}
	refused := func(what string, a client.ImportImage, code client.Code) {
		t.Helper()
		if j := importAndWait(t, cs[1], a); j.State != jobFailed || j.Code != code {
			t.Errorf("%s: %+v, want code %s", what, j, code)
		}
		if names, err := os.ReadDir(filepath.Join(to.disk, tmpDir)); err != nil || len(names) > 0 {
			t.Errorf("%s left %v (%v)", what, names, err)
		}
	}
	edit := func(f func(*client.ImportImage)) client.ImportImage {
		a := good
		f(&a)
		return a
	}
	refused("no such image", edit(func(a *client.ImportImage) { a.ImageID = id("imag", 2) }), client.CodeNotFound)
	refused("no such disk", edit(func(a *client.ImportImage) { a.Source = "peer://node1/" + id("disk", 7) }), client.CodeNotFound)
	refused("no such node", edit(func(a *client.ImportImage) { a.Source = "peer:///" + from.diskID }), client.CodeInvalid)
	refused("no disk", edit(func(a *client.ImportImage) { a.Source = "peer://node1" }), client.CodeInvalid)
	refused("the disk itself", edit(func(a *client.ImportImage) { a.Source = "peer://node2/" + to.diskID }), client.CodeInvalid)
	refused("another checksum", edit(func(a *client.ImportImage) { a.Checksum = "sha512:" + strings.Repeat("0", 128) }), client.CodeChecksum)

	file := filepath.Join(from.disk, imagePath(img.ImageID))
	d := from.p.disks()[0]
	_, sb, err := layer.Inspect(d.fs, imagePath(img.ImageID))
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	turn := func() {
		t.Helper()
		var p [1]byte
		_, err := f.ReadAt(p[:], sb.Data.Off+4242)
		p[0] ^= 1
		_, e := f.WriteAt(p[:], sb.Data.Off+4242)
		if err = errors.Join(err, e); err != nil {
			t.Fatal(err)
		}
	}
	turn()
	refused("rot", good, client.CodeCorrupt)
	turn()
	lie := func(digest string) {
		t.Helper()
		l, err := layer.Open(d.fs, imagePath(img.ImageID), layer.Options{BootID: local.LayerBoot("x")})
		if err == nil {
			err = errors.Join(l.SetMeta(func(m *layer.Meta) { m.Image.Digest = digest }), l.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	real := imageOn(t, from, cs[0], img.ImageID).Digest
	lie("a1:" + strings.Repeat("0", 64))
	refused("another digest", good, client.CodeCorrupt)
	lie("")
	refused("no digest", good, client.CodeCorrupt)
	lie(real)
	if j := importAndWait(t, cs[1], good); j.State != jobDone {
		t.Errorf("all is well again: %+v", j)
	}
}

// filled makes a volume of random bytes on a bed, closed, and returns it with its bytes.
func filled(t *testing.T, b *bed, c *client.Client, sizeBytes int) (client.OpenVolume, []byte) {
	t.Helper()
	a := b.volume(c, 1, int64(sizeBytes))
	a.Node = b.node
	b.open(c, a)
	g := guest(t, b.runDir, a.Volume)
	raw := make([]byte, sizeBytes)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(raw) //nolint:errcheck // never fails
	for off := 0; off < sizeBytes; off += mib {
		if err := g.write(int64(off), raw[off:off+mib]); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	return a, raw
}

// TestCopyReplicaSourceRestarts: the original's data process goes away in the middle: given up meanwhile the copy ends at once and leaves nothing; otherwise it goes on when the process is back.
func TestCopyReplicaSourceRestarts(t *testing.T) {
	w := newTown(t, 2, newBed)
	cs := w.ready()
	from, to := w.beds[0], w.beds[1]
	a, raw := filled(t, from, cs[0], 4*mib)
	ask := client.CopyReplica{VolumeID: a.VolumeID, Volume: a.Volume, Node: to.node, DiskID: to.diskID, ReplicaID: id("repl", 2), From: a.ReplicaID, FromNode: from.node}
	begin := func() {
		t.Helper()
		if err := cs[0].SetBackground(t.Context(), client.Background{BytesPerSecond: 2 * mib}); err != nil {
			t.Fatal(err)
		}
		if _, err := cs[1].CopyReplica(t.Context(), ask); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the copy moves", func() bool {
			jobs := to.state(cs[1]).Jobs
			return len(jobs) == 1 && jobs[0].DoneBytes > 0 && jobs[0].State == jobRunning
		})
		wantCode(t, "delete what is being copied", cs[1].DeleteReplica(t.Context(), client.DeleteReplica{DiskID: to.diskID, ReplicaID: ask.ReplicaID}), client.CodeInUse)
		from.end()
	}
	again := func() {
		t.Helper()
		cs[0] = from.start()
	}
	begin()
	if err := cs[1].CancelImport(t.Context(), client.CancelImport{ImageID: ask.ReplicaID}); err != nil {
		t.Fatal(err)
	}
	if names, err := os.ReadDir(filepath.Join(to.disk, replicasDir)); err != nil || len(names) > 0 || len(to.state(cs[1]).Jobs) > 0 {
		t.Errorf("given up, left %v (%v), jobs %+v", names, err, to.state(cs[1]).Jobs)
	}
	again()
	begin()
	again()
	if j := awaitJob(t, cs[1], ask.ReplicaID); j.State != jobDone {
		t.Fatalf("copy: %+v", j)
	}
	b := a
	b.Node, b.DiskID, b.ReplicaID = to.node, to.diskID, ask.ReplicaID
	to.open(cs[1], b)
	g := guest(t, to.runDir, b.Volume)
	for off := 0; off < len(raw); off += mib {
		if got, err := g.read(int64(off), mib); err != nil || !bytes.Equal(got, raw[off:off+mib]) {
			t.Fatalf("at %d it reads something else (%v)", off, err)
		}
	}
}

// TestCopyReplicaNodeGone: the original's node falls silent with the swap, for good: the copy has taken its place, the job ends, and the volume is opened while the other node is as silent as before.
func TestCopyReplicaNodeGone(t *testing.T) {
	w := newTown(t, 2, newBed)
	x := w.through(1, 0)
	cs := w.ready()
	from, to := w.beds[0], w.beds[1]
	a, raw := filled(t, from, cs[0], mib)
	ask := client.CopyReplica{VolumeID: a.VolumeID, Volume: a.Volume, Node: to.node, DiskID: to.diskID, ReplicaID: id("repl", 2), From: a.ReplicaID, FromNode: from.node}
	cut := sync.OnceFunc(x.cut)
	from.cat.mu.Lock()
	from.cat.onSwap = func(s client.MembershipSwap) {
		if bytes.Contains(s.Record, []byte(ask.ReplicaID)) {
			cut()
		}
	}
	from.cat.mu.Unlock()
	if _, err := cs[1].CopyReplica(t.Context(), ask); err != nil {
		t.Fatal(err)
	}
	if j := awaitJob(t, cs[1], ask.ReplicaID); j.State != jobDone {
		t.Fatalf("copy: %+v", j)
	}
	b := a
	b.Node, b.DiskID, b.ReplicaID = to.node, to.diskID, ask.ReplicaID
	to.open(cs[1], b)
	if got, err := guest(t, to.runDir, b.Volume).read(0, mib); err != nil || !bytes.Equal(got, raw) {
		t.Errorf("it reads something else (%v)", err)
	}
}
