//go:build integration

package testbed_test

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestLife walks through everything a person does with a node, in the order of the tour.
func TestLife(t *testing.T) {
	start := time.Now()
	b := newBed(t)
	t.Logf("a node is ready %d ms after its start", time.Since(start).Milliseconds())
	var s statusView
	b.json(&s, "status")
	if !s.Ready || len(s.Nodes) != 1 || s.Nodes[0].Name != "node1" || s.Nodes[0].DataPID != b.p.PID("data") || len(s.Nodes[0].Disks) != 1 {
		t.Fatalf("status: %+v", s)
	}
	empty := b.onDisk(b.disk())

	web := b.web()
	golden := b.raw("web/golden.raw", 64*mib, 1)
	b.tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", golden, b.path("web/plain.qcow2"))
	b.tool("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", golden, b.path("web/zlib.qcow2"))
	b.tool("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd", golden, b.path("web/zstd.qcow2"))
	b.tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "compat=0.10", golden, b.path("web/v2.qcow2"))
	b.sub("import", func(b *bed) { b.imports(web) })
	b.sub("volume", func(b *bed) { b.volumeLife(golden) })
	b.sub("expand", func(b *bed) { b.expandLife(golden) })
	b.sub("snapshot", func(b *bed) { b.snapshotLife(golden) })
	b.sub("output", func(b *bed) { b.outputs() })
	b.sub("delete", func(b *bed) { b.deleteAll(empty) })
}

// imports brings the same disk in from every form and place, and wants them to have the same content.
func (b *bed) imports(web string) {
	golden := b.path("web/golden.raw")
	for name, from := range map[string]string{
		"raw-file": golden, "raw-http": web + "/golden.raw", "plain": web + "/plain.qcow2", "zlib": web + "/zlib.qcow2", "zstd": b.path("web/zstd.qcow2"), "v2": web + "/v2.qcow2",
	} {
		start := time.Now()
		b.cli("image", "import", name, from)
		b.Logf("import of 64 MiB (32 MiB of data), %s: %d ms", name, time.Since(start).Milliseconds())
	}
	sum := b.sha256(b.path("web/zlib.qcow2"))
	b.cli("image", "import", "golden", web+"/zlib.qcow2", "--checksum", "sha256:"+sum)
	sum512 := strings.Fields(b.tool("sha512sum", b.path("web/zlib.qcow2")))[0]
	b.cli("image", "import", "golden512", web+"/zlib.qcow2", "--checksum", "sha512:"+sum512)
	var list []imageView
	b.json(&list, "image", "list")
	if len(list) != 8 {
		b.Errorf("%d images are listed", len(list))
	}
	for _, i := range list {
		if i.Digest != list[0].Digest || i.Digest == "" || i.VirtualSize != 64*mib {
			b.Errorf("image %s has digest %q and size %d, %s has %q", i.Name, i.Digest, i.VirtualSize, list[0].Name, list[0].Digest)
		}
	}
	var g imageView
	b.json(&g, "image", "show", "golden512")
	if g.CurrentChecksum != sum512 || g.Format != "qcow2" {
		b.Errorf("image golden512: %+v", g)
	}
	for _, i := range list {
		if i.Name != "golden" {
			b.cli("image", "delete", i.Name)
		}
	}
}

// volumeLife: created from an image in no time, attached, written, detached and attached again.
func (b *bed) volumeLife(golden string) {
	image := b.onDisk(b.disk())
	start := time.Now()
	b.cli("volume", "create", "v1", "--image", "golden", "--size", "100Mi")
	created := time.Since(start)
	b.attach("v1")
	c := b.dial("v1")
	if err := c.read(0, make([]byte, 4096)); err != nil {
		b.Fatal(err)
	}
	b.Logf("create volume from image: %d ms; with attach and first byte: %d ms (each with the start of the command)", created.Milliseconds(), time.Since(start).Milliseconds())
	b.Logf("a new volume takes %d KiB", (b.onDisk(b.disk())-image)/kib)
	if v := b.volume("v1"); v.Size != strconv.Itoa(100*mib) || v.State != "attached" || v.Robustness != "healthy" || v.BackingImage != "golden" {
		b.Errorf("volume: %+v", v)
	}
	b.same("v1", golden)
	b.qemuIO("v1", "write -P 0x31 1M 3M", "write -P 0x32 99M 1M", "flush", "read -P 0x31 1M 3M")
	b.cli("volume", "detach", "v1")
	if _, err := os.Stat(b.socket("v1")); err == nil {
		b.Error("the socket of a detached volume is there")
	}
	if v := b.volume("v1"); v.State != "detached" || v.Controllers[0].Endpoint != "" {
		b.Errorf("volume after detach: %+v", v)
	}
	b.attach("v1")
	b.qemuIO("v1", "read -P 0x31 1M 3M", "read -P 0x32 99M 1M", "read -P 0 64M 35M")
	b.cli("volume", "attach", "v1") // again: no error, nothing changes
	b.cli("volume", "create", "v2", "--image", "golden")
	b.attach("v2")
	b.same("v2", golden)
	b.clean("v1", "v2")
	b.cli("volume", "detach", "v2")
}

// expandLife: attached and detached; who connects anew sees the new size, who is connected keeps working.
func (b *bed) expandLife(golden string) {
	old := b.dial("v1")
	b.cli("volume", "expand", "v1", "--size", "200Mi")
	if err := old.read(50*mib, make([]byte, 4096)); err != nil {
		b.Errorf("a client that was connected when the volume grew: %v", err)
	}
	size := func(want int) {
		b.Helper()
		if got := strings.TrimSpace(b.tool("nbdinfo", "--size", b.uri("v1"))); got != strconv.Itoa(want) {
			b.Errorf("nbdinfo --size: %s, want %d", got, want)
		}
		var info struct {
			VirtualSize int `json:"virtual-size"`
		}
		if err := json.Unmarshal([]byte(b.tool("qemu-img", "info", "--output=json", "-f", "raw", b.uri("v1"))), &info); err != nil || info.VirtualSize != want {
			b.Errorf("qemu-img info: %d, %v, want %d", info.VirtualSize, err, want)
		}
	}
	size(200 * mib)
	b.qemuIO("v1", "read -P 0x32 99M 1M", "read -P 0 100M 100M", "write -P 0x33 199M 1M")
	b.cli("volume", "detach", "v1")
	b.cli("volume", "expand", "v1", "--size", "300Mi")
	if v := b.volume("v1"); v.State != "detached" || v.Size != strconv.Itoa(300*mib) || v.Controllers[0].Size != v.Size {
		b.Errorf("volume after an expansion while detached: %+v", v)
	}
	b.attach("v1")
	size(300 * mib)
	b.qemuIO("v1", "read -P 0x31 1M 3M", "read -P 0x32 99M 1M", "read -P 0x33 199M 1M", "read -P 0 200M 100M", "write -P 0x34 299M 1M")
	b.clean("v1")
	for name, s := range b.snapshots("v1") {
		if s.UserCreated {
			b.Errorf("the expansion made snapshot %s as if a person had", name)
		}
	}
}

// snapshotLife: taken attached and detached, listed, shown, reverted to, deleted.
func (b *bed) snapshotLife(golden string) {
	b.cli("volume", "create", "s", "--image", "golden")
	b.attach("s")
	for n := 1; n <= 3; n++ {
		b.qemuIO("s", fmt.Sprintf("write -P %d 8M 4M", n))
		start := time.Now()
		b.cli("snapshot", "create", "s", "snap"+strconv.Itoa(n), "--label", "n="+strconv.Itoa(n))
		b.Logf("snapshot %d, attached: %d ms (with the start of the command)", n, time.Since(start).Milliseconds())
	}
	b.qemuIO("s", "write -P 9 8M 4M")
	tree := func(want string) {
		b.Helper()
		var lines []string
		for _, s := range b.snapshots("s") {
			var children []string
			for c := range s.Children {
				children = append(children, c)
			}
			slices.Sort(children)
			line := s.Name + "<" + s.Parent + ">" + strings.Join(children, ",")
			if s.MarkRemoved {
				line += " removed"
			}
			lines = append(lines, line)
		}
		slices.Sort(lines)
		if got := strings.Join(lines, "; "); got != want {
			b.Errorf("the tree is %s\nwant %s", got, want)
		}
	}
	tree("snap1<>snap2; snap2<snap1>snap3; snap3<snap2>volume-head")
	var shown snapshotView
	b.json(&shown, "snapshot", "show", "s", "snap2")
	if shown.Name != "snap2" || shown.Labels["n"] != "2" || !shown.UserCreated || shown.Size < 4*mib {
		b.Errorf("snapshot show: %+v", shown)
	}
	// Not while a guest can use it.
	b.refused(exitConflict, []string{"volume s", "detach"}, "snapshot", "revert", "s", "snap2")
	b.cli("volume", "detach", "s")
	start := time.Now()
	b.cli("snapshot", "revert", "s", "snap2")
	b.Logf("revert of a detached volume: %d ms", time.Since(start).Milliseconds())
	if v := b.volume("s"); v.State != "detached" {
		b.Errorf("volume after revert: %+v", v)
	}
	tree("snap1<>snap2; snap2<snap1>snap3,volume-head; snap3<snap2>")
	b.attach("s")
	b.qemuIO("s", "read -P 2 8M 4M", "write -P 20 12M 1M")
	b.cli("volume", "detach", "s")
	b.cli("snapshot", "revert", "s", "snap3")
	tree("snap1<>snap2; snap2<snap1>snap3; snap3<snap2>volume-head")
	b.attach("s")
	b.qemuIO("s", "read -P 3 8M 4M")
	b.cli("snapshot", "create", "s", "detached-soon")
	b.cli("volume", "detach", "s")
	b.cli("snapshot", "create", "s", "while-detached")
	b.cli("snapshot", "revert", "s", "snap2")
	tree("detached-soon<snap3>while-detached; snap1<>snap2; snap2<snap1>snap3,volume-head; snap3<snap2>detached-soon; while-detached<detached-soon>")
	b.cli("snapshot", "delete", "s", "while-detached", "detached-soon")
	tree("snap1<>snap2; snap2<snap1>snap3,volume-head; snap3<snap2>")
	b.attach("s")
	// 4.3: snapshots 1 and 2 deleted; 1 is merged away; 2 is the head's parent and, with another child, stays, marked removed; 3 stays.
	b.cli("snapshot", "delete", "s", "snap1", "snap2")
	tree("snap2<>snap3,volume-head removed; snap3<snap2>")
	b.qemuIO("s", "read -P 2 8M 4M")
	b.cli("snapshot", "delete", "s", "snap3")
	tree("snap2<>volume-head removed")
	b.qemuIO("s", "read -P 2 8M 4M")
	// A removed snapshot cannot be gone back to.
	b.cli("volume", "detach", "s")
	b.refused(exitConflict, []string{"snap2"}, "snapshot", "revert", "s", "snap2")
	b.refused(exitNotFound, []string{"snap1"}, "snapshot", "revert", "s", "snap1")
	b.attach("s")
	// What the head overwrites is punched out of the removed snapshot.
	b.qemuIO("s", "write -P 40 8M 4M", "flush")
	b.cli("snapshot", "create", "s", "last")
	b.cli("snapshot", "delete", "s", "last")
	b.qemuIO("s", "read -P 40 8M 4M")
	b.clean("s")
	b.cli("volume", "detach", "s")
	b.attach("s")
	b.qemuIO("s", "read -P 40 8M 4M", "write -P 0 8M 4M", "read -P 0 8M 4M")
}

// outputs wants every command that prints something to print JSON when asked.
func (b *bed) outputs() {
	b.cli("volume", "create", "j", "--size", "16Mi")
	for _, args := range [][]string{
		{"version"}, {"status"}, {"image", "list"}, {"image", "show", "golden"}, {"volume", "list"}, {"volume", "show", "j"},
		{"volume", "create", "j2", "--size", "16Mi"}, {"volume", "attach", "j"}, {"volume", "expand", "j", "--size", "20Mi"}, {"snapshot", "create", "j", "one"},
		{"snapshot", "list", "j"}, {"snapshot", "show", "j", "one"}, {"check", "j"}, {"snapshot", "delete", "j", "one"}, {"volume", "detach", "j"},
		{"snapshot", "create", "j", "two"}, {"snapshot", "revert", "j", "two"}, {"image", "import", "j", b.path("web/plain.qcow2")}, {"image", "delete", "j"}, {"volume", "delete", "j", "j2"},
	} {
		var v any
		if err := b.p.Run(b.ctx, &v, args...); err != nil {
			b.Error(err)
		}
		if text, err := json.Marshal(v); err != nil || len(text) < 2 {
			b.Errorf("%q -o json: %s", args, text)
		}
	}
}

// deleteAll wants all space back.
func (b *bed) deleteAll(empty int64) {
	var layer string
	b.cli("volume", "attach", "v1")
	v := b.volume("v1")
	for _, e := range b.list(v.Replicas[0].DataPath) {
		if strings.HasSuffix(e, ".layer") {
			layer = e
		}
	}
	if text := b.cli("dump", "layer", layer); !strings.Contains(text, "volume") {
		b.Errorf("dump layer: %s", text)
	}
	var dumped any
	b.json(&dumped, "dump", "layer", layer)
	b.refused(exitConflict, []string{"image golden", "volume"}, "image", "delete", "golden")
	b.cli("volume", "delete", "v1") // attached
	b.cli("volume", "delete", "v2", "s")
	b.cli("image", "delete", "golden")
	if left := b.onDisk(b.disk()); left > empty+256*kib {
		b.Errorf("%d bytes are left on the disk, %d when it was empty", left, empty)
	} else {
		b.Logf("left on the disk after everything was deleted: %d KiB", (left-empty)/kib)
	}
	var s statusView
	b.json(&s, "status")
	if d := s.Nodes[0].Disks["default"]; len(s.Volumes) != 0 || len(s.Images) != 0 {
		b.Errorf("status: %+v %+v", s, d)
	}
	b.until(20*time.Second, "scheduled space back to zero", func() bool {
		b.json(&s, "status")
		return s.Nodes[0].Disks["default"].StorageScheduled == 0
	})
}

// list is what a directory holds.
func (b *bed) list(dir string) (out []string) {
	b.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		b.Fatal(err)
	}
	for _, e := range entries {
		out = append(out, dir+"/"+e.Name())
	}
	return out
}
