//go:build integration

package testbed_test

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// layerBytes is what a layer that takes writes has allocated before the first: its log, so that a full disk cannot stop it.
const layerBytes = 10 * mib

// TestClients uses a volume with the programs that people have.
func TestClients(t *testing.T) {
	b := newBed(t)
	golden := b.raw("golden.raw", 64*mib, 2)
	b.tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", golden, b.path("golden.qcow2"))
	b.cli("image", "import", "golden", b.path("golden.qcow2"))
	b.cli("volume", "create", "v", "--image", "golden", "--size", "128Mi")
	b.cli("volume", "create", "w", "--size", "128Mi")
	b.attach("v", "w")
	b.sub("qemu-img", func(b *bed) { b.qemuImg(golden) })
	b.sub("qemu-io", (*bed).qemuIOPatterns)
	b.sub("nbdinfo", (*bed).nbdinfo)
	b.sub("nbdcopy", func(b *bed) { b.nbdcopy() })
	b.sub("fio", (*bed).fioVerify)
	b.sub("snapshots", (*bed).contents)
	b.sub("file systems", (*bed).fileSystems)
	b.clean("v", "w")
}

// qemuImg converts out of and into a volume, compares, checks and maps.
func (b *bed) qemuImg(golden string) {
	b.same("v", golden)
	out := b.path("out.qcow2")
	b.tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", b.uri("v"), out)
	b.tool("qemu-img", "check", out)
	b.tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", out, golden)
	if size := b.onDisk(b.path("out.qcow2")); size > 36*mib {
		b.Errorf("the export has %d bytes: holes were not seen", size)
	}
	b.tool("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", b.path("golden.qcow2"), b.uri("w"))
	b.same("w", golden)
	b.tool("qemu-img", "compare", "-f", "raw", "-F", "raw", b.uri("v"), b.uri("w"))
	var runs []struct {
		Start, Length int64
		Zero, Data    bool
	}
	text := b.tool("qemu-img", "map", "--output=json", "-f", "raw", b.uri("v"))
	if err := json.Unmarshal([]byte(text), &runs); err != nil {
		b.Fatal(err)
	}
	// The golden disk has data in every even megabyte and nothing after 64 MiB.
	var end, data int64
	for _, r := range runs {
		if r.Start != end || r.Data && !r.Zero && (r.Start/mib)%2 != 0 {
			b.Errorf("qemu-img map: %+v after %d", r, end)
		}
		end = r.Start + r.Length
		if r.Data && !r.Zero {
			data += r.Length
		}
	}
	if end != 128*mib || data != 32*mib {
		b.Errorf("qemu-img map: %d bytes, %d of them data", end, data)
	}
}

// qemuIOPatterns writes, zeroes and discards in pieces of every kind, aligned or not.
func (b *bed) qemuIOPatterns() {
	b.qemuIO("w", "write -P 0xaa 0 16M", "write -P 0xbb 1000 3000", "read -P 0xaa 0 1000", "read -P 0xbb 1000 3000", "read -P 0xaa 4000 1M",
		"write -z 1M 1M", "read -P 0 1M 1M", "read -P 0xaa 2M 1M", "discard 4M 1M", "read -P 0 4M 1M", "discard 5000000 1000000", "read -P 0xaa 3M 1M",
		"write -z -u 8M 4M", "read -P 0 8M 4M", "write -f -P 0xcc 9M 4096", "read -P 0xcc 9M 4096", "read -P 0 9441280 4096", "write -z 700 700", "read -P 0 700 700",
		"read -P 0xaa 0 700", "read -P 0xbb 1400 2600", "aio_write -P 0xdd 20M 8M", "aio_write -P 0xde 28M 64k", "aio_flush", "read -P 0xdd 20M 8M", "read -P 0xde 28M 64k", "flush")
	before := b.onDisk(b.replica("w"))
	b.qemuIO("w", "discard 0 64M", "flush", "read -P 0 0 64M")
	after := b.onDisk(b.replica("w"))
	b.Logf("discard of 64 MiB: the copy went from %d to %d KiB on disk", before/kib, after/kib)
	if after > layerBytes+mib {
		b.Errorf("the discarded space did not come back: %d bytes on disk, %d before", after, before)
	}
}

func (b *bed) replica(volume string) string {
	b.Helper()
	return b.volume(volume).Replicas[0].DataPath
}

// nbdinfo asks what the server offers.
func (b *bed) nbdinfo() {
	var info struct {
		Protocol string
		Exports  []struct {
			Name      string          `json:"export-name"`
			Size      int64           `json:"export-size"`
			Contexts  []string        `json:"contexts"`
			ReadOnly  bool            `json:"is_read_only"`
			CanFlush  bool            `json:"can_flush"`
			CanFUA    bool            `json:"can_fua"`
			CanTrim   bool            `json:"can_trim"`
			CanZero   bool            `json:"can_zero"`
			MultiConn bool            `json:"can_multi_conn"`
			DF        json.RawMessage `json:"can_df"`
		}
	}
	for _, args := range [][]string{{"--json", b.uri("v")}, {"--list", "--json", b.uri("v")}} {
		if err := json.Unmarshal([]byte(b.tool("nbdinfo", args...)), &info); err != nil || len(info.Exports) != 1 {
			b.Fatalf("nbdinfo %v: %v %+v", args, err, info)
		}
		e := info.Exports[0]
		if info.Protocol != "newstyle-fixed" || e.Name != "v" || e.Size != 128*mib || e.ReadOnly || !e.CanFlush || !e.CanFUA || !e.CanTrim || !e.CanZero || !e.MultiConn ||
			!strings.Contains(strings.Join(e.Contexts, " "), "base:allocation") {
			b.Errorf("nbdinfo %v: %+v", args, info)
		}
	}
	lines := strings.Split(strings.TrimSpace(b.tool("nbdinfo", "--map", b.uri("v"))), "\n")
	if len(lines) < 64 {
		b.Errorf("nbdinfo --map: %d extents\n%s", len(lines), strings.Join(lines[:min(8, len(lines))], "\n"))
	}
	if out, err := b.try("nbdinfo", "nbd+unix:///nothere?socket="+b.socket("v")); err == nil {
		b.Errorf("an export that does not exist: %s", out)
	}
}

// nbdcopy copies both ways, and from volume to volume.
func (b *bed) nbdcopy() {
	in := b.raw("in.raw", 128*mib, 3)
	start := time.Now()
	b.tool("nbdcopy", in, b.uri("w"))
	b.Logf("nbdcopy of 128 MiB in: %d ms", time.Since(start).Milliseconds())
	b.same("w", in)
	start = time.Now()
	b.tool("nbdcopy", b.uri("w"), b.path("out.raw"))
	b.Logf("nbdcopy of 128 MiB out: %d ms", time.Since(start).Milliseconds())
	if b.sha256(in) != b.sha256(b.path("out.raw")) {
		b.Error("nbdcopy out differs")
	}
	b.cli("volume", "create", "x", "--size", "128Mi")
	b.attach("x")
	b.tool("nbdcopy", "--flush", b.uri("w"), b.uri("x"))
	b.same("x", in)
	b.tool("nbdcopy", "--flush", "--connections=4", "--requests=32", b.uri("v"), b.uri("x"))
	b.tool("qemu-img", "compare", "-f", "raw", "-F", "raw", b.uri("v"), b.uri("x"))
	b.clean("x")
	b.cli("volume", "delete", "x")
}

// fioVerify has fio write at random and verify, with one client and several.
func (b *bed) fioVerify() {
	start := time.Now()
	ops, worst := b.startFio(b.uri("w"), 96*mib, 0).wait()
	b.Logf("fio randrw, crc32c: %d operations verified in %.1f s, the slowest %v", ops, time.Since(start).Seconds(), worst.Round(time.Microsecond))
}

// contents compares what a volume holds after detach and attach, and what its snapshots hold when it goes back to them.
func (b *bed) contents() {
	var sums []string
	for n := range 4 {
		b.tool("nbdcopy", b.raw(fmt.Sprintf("c%d.raw", n), 128*mib, uint64(10+n)), b.uri("w"))
		b.qemuIO("w", fmt.Sprintf("write -P %d %dM 512k", n, 3*n+1), "discard 80M 1M")
		sums = append(sums, b.content("w"))
		b.cli("snapshot", "create", "w", fmt.Sprintf("c%d", n))
		os.Remove(b.path(fmt.Sprintf("c%d.raw", n)))
	}
	b.qemuIO("w", "write -P 0x77 0 128M")
	for _, n := range []int{1, 3, 0, 2} {
		b.cli("volume", "detach", "w")
		b.cli("snapshot", "revert", "w", fmt.Sprintf("c%d", n))
		b.attach("w")
		if got := b.content("w"); got != sums[n] {
			b.Errorf("snapshot c%d has %s, had %s", n, got, sums[n])
		}
		b.qemuIO("w", "write -P 0x55 0 1M")
	}
	b.cli("volume", "detach", "w")
	b.attach("w")
	b.cli("snapshot", "delete", "w", "c0", "c1", "c3")
	b.cli("volume", "detach", "w")
	b.cli("snapshot", "revert", "w", "c2")
	b.attach("w")
	if got := b.content("w"); got != sums[2] {
		b.Errorf("after the others were deleted snapshot c2 has %s, had %s", got, sums[2])
	}
}

// content is the checksum of a volume's bytes.
func (b *bed) content(volume string) string {
	b.Helper()
	out := b.path("content.raw")
	b.tool("nbdcopy", b.uri(volume), out)
	defer os.Remove(out)
	return b.sha256(out)
}

// fileSystems puts file systems with files on a volume and takes them out again; fsck must be content.
func (b *bed) fileSystems() {
	if err := os.MkdirAll(b.path("tree/dir"), 0o755); err != nil {
		b.Fatal(err)
	}
	b.raw("tree/dir/file", 20*mib, 4)
	fs := b.path("fs.raw")
	b.tool("mkfs.ext4", "-q", "-F", "-d", b.path("tree"), fs, "128M")
	b.tool("nbdcopy", fs, b.uri("w"))
	b.cli("volume", "detach", "w")
	b.attach("w")
	b.tool("nbdcopy", b.uri("w"), b.path("back.raw"))
	b.tool("e2fsck", "-fn", b.path("back.raw"))
	if b.sha256(fs) != b.sha256(b.path("back.raw")) {
		b.Error("the file system came back different")
	}
}
