//go:build integration

package testbed_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestDepth takes 200 snapshots one on top of the other, reads through all of them, survives the death of the data process with them, goes back to one in the middle, and deletes them.
func TestDepth(t *testing.T) {
	b := newBed(t)
	const depth = 200
	b.cli("volume", "create", "deep", "--size", "64Mi")
	b.attach("deep")
	c := b.dial("deep")
	content := func(n int) []byte { return bytes.Repeat([]byte{byte(n), byte(n >> 8), 0x5a, 0xa5}, 64*kib/4) }
	var slowest time.Duration
	start := time.Now()
	for n := range depth {
		if err := c.write(int64(n)*256*kib, content(n)); err != nil {
			t.Fatal(err)
		}
		if err := c.write(0, content(1000+n)); err != nil {
			t.Fatal(err)
		}
		before := time.Now()
		if code, got := b.rest("POST", "/v1/volumes/deep?action=snapshotCreate", fmt.Sprintf(`{"name":"s%d"}`, n)); code != 200 {
			t.Fatalf("snapshot %d: %d %v", n, code, got)
		}
		slowest = max(slowest, time.Since(before))
	}
	t.Logf("%d snapshots over REST in %.1f s, the slowest %d ms; they take %d KiB each on disk", depth, time.Since(start).Seconds(), slowest.Milliseconds(), b.onDisk(b.replica("deep"))/kib/depth)
	reads := func(c *client) time.Duration {
		t.Helper()
		start, got := time.Now(), make([]byte, 64*kib)
		for n := 1; n < depth; n++ {
			if err := c.read(int64(n)*256*kib, got); err != nil || !bytes.Equal(got, content(n)) {
				t.Fatalf("block %d at depth %d: wrong content, %v", n, depth-n, err)
			}
		}
		if err := c.read(0, got); err != nil || !bytes.Equal(got, content(1000+depth-1)) {
			t.Fatalf("block 0: wrong content, %v", err)
		}
		return time.Since(start)
	}
	took := reads(c)
	start = time.Now()
	b.kill("data")
	c = b.dial("deep")
	again := reads(c)
	t.Logf("200 reads of 64 KiB through all layers: %d ms; %d ms after the data process was killed, with the opening of all layers", took.Milliseconds(), time.Since(start).Milliseconds())
	t.Logf("the same reads alone: %d ms; the data process has %d MiB resident", again.Milliseconds(), b.resident("data")/mib)
	b.clean("deep")
	if n := len(b.snapshots("deep")); n != depth {
		t.Errorf("%d snapshots are listed", n)
	}
	start = time.Now()
	b.cli("volume", "detach", "deep")
	b.cli("snapshot", "revert", "deep", "s100")
	b.attach("deep")
	t.Logf("detach, revert to the hundredth and attach: %d ms", time.Since(start).Milliseconds())
	b.qemuIO("deep", "read -P 0 26M 30M")
	c, got := b.dial("deep"), make([]byte, 64*kib)
	for _, n := range []int{1, 50, 100} {
		if err := c.read(int64(n)*256*kib, got); err != nil || !bytes.Equal(got, content(n)) {
			t.Errorf("block %d after the revert: wrong content, %v", n, err)
		}
	}
	if err := c.read(0, got); err != nil || !bytes.Equal(got, content(1100)) {
		t.Errorf("block 0 after the revert: wrong content, %v", err)
	}
	start = time.Now()
	names := []string{"snapshot", "delete", "deep"}
	for n := range depth {
		names = append(names, "s"+strconv.Itoa(n))
	}
	before := b.onDisk(b.replica("deep"))
	b.cli(names...)
	t.Logf("all deleted in %.1f s: %d KiB on disk before, %d KiB after", time.Since(start).Seconds(), before/kib, b.onDisk(b.replica("deep"))/kib)
	if err := c.read(0, got); err != nil || !bytes.Equal(got, content(1100)) {
		t.Errorf("block 0 after the deletion: wrong content, %v", err)
	}
	if n := len(b.snapshots("deep")); n > 1 {
		t.Errorf("%d snapshots are left", n)
	}
	b.clean("deep")
}

// resident is the memory of a process of the node.
func (b *bed) resident(sub string) int64 {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.p.PID(sub)))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "VmRSS:") {
			n, err := strconv.ParseInt(strings.Fields(line)[1], 10, 64)
			if err != nil {
				b.Fatal(err)
			}
			return n * kib
		}
	}
	b.Fatalf("no VmRSS of ashlar %s", sub)
	return 0
}

// TestHuge uses an 8 TiB volume at both ends and at random, on an ordinary file system.
func TestHuge(t *testing.T) {
	b := newBed(t)
	start := time.Now()
	b.cli("volume", "create", "huge", "--size", "8Ti")
	b.attach("huge")
	t.Logf("an 8 TiB volume: created and attached in %d ms, %d KiB on disk", time.Since(start).Milliseconds(), b.onDisk(b.replica("huge"))/kib)
	end := int64(8*tib - 64*kib)
	b.qemuIO("huge", "write -P 1 0 64k", fmt.Sprintf("write -P 2 %d 64k", end), fmt.Sprintf("write -P 3 %d 64k", int64(4*tib)), "flush")
	check := func() {
		t.Helper()
		b.qemuIO("huge", "read -P 1 0 64k", fmt.Sprintf("read -P 2 %d 64k", end), fmt.Sprintf("read -P 3 %d 64k", int64(4*tib)), "read -P 0 64k 1M")
	}
	check()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng, c, p := rand.New(rand.NewPCG(seed, 0)), b.dial("huge"), bytes.Repeat([]byte{7}, 4096)
	for range 2000 {
		if err := c.write((rng.Int64N(8*tib-2*mib)/4096)*4096+mib, p); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.flush(); err != nil {
		t.Fatal(err)
	}
	b.qemuIO("huge", "write -P 1 0 64k", fmt.Sprintf("write -P 2 %d 64k", end), fmt.Sprintf("write -P 3 %d 64k", int64(4*tib)), "write -z 64k 1M")
	t.Logf("2,000 writes of 4 KiB all over it: %d KiB on disk; the data process has %d MiB resident", b.onDisk(b.replica("huge"))/kib, b.resident("data")/mib)
	if used := b.onDisk(b.replica("huge")); used > 128*mib {
		t.Errorf("%d bytes on disk", used)
	}
	start = time.Now()
	runs := strings.Count(b.tool("nbdinfo", "--map", b.uri("huge")), "\n")
	t.Logf("nbdinfo --map over 8 TiB: %d extents in %d ms", runs, time.Since(start).Milliseconds())
	if runs < 3000 {
		t.Errorf("%d extents", runs)
	}
	start = time.Now()
	b.cli("snapshot", "create", "huge", "one")
	t.Logf("snapshot: %d ms", time.Since(start).Milliseconds())
	start = time.Now()
	b.kill("data")
	check()
	t.Logf("killed and read at both ends and in the middle again after %d ms", time.Since(start).Milliseconds())
	start = time.Now()
	b.qemuIO("huge", "discard 0 1G", "read -P 0 0 64k")
	for off := int64(0); off < 8*tib; off += gib {
		if err := redialed(b, &c).do(nbdZero, off, nil, gib); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("8 TiB discarded in pieces of 1 GiB: %d ms", time.Since(start).Milliseconds())
	b.qemuIO("huge", fmt.Sprintf("read -P 0 %d 64k", end))
	b.cli("volume", "detach", "huge")
	b.cli("snapshot", "revert", "huge", "one")
	b.attach("huge")
	check()
	start = time.Now()
	b.clean("huge")
	t.Logf("check: %d ms", time.Since(start).Milliseconds())
	b.cli("volume", "expand", "huge", "--size", "15Ti")
	b.qemuIO("huge", fmt.Sprintf("write -P 9 %d 64k", int64(15*tib-64*kib)), fmt.Sprintf("read -P 9 %d 64k", int64(15*tib-64*kib)))
	check()
	start = time.Now()
	b.cli("volume", "delete", "huge")
	t.Logf("deleted in %d ms", time.Since(start).Milliseconds())
}

// redialed is the connection, made anew if it is broken.
func redialed(b *bed, c **client) *client {
	if err := (*c).read(0, make([]byte, 512)); err != nil {
		*c = b.dial("huge")
	}
	return *c
}

// TestDirect runs a node that goes around the page cache (data.direct): layers are open with O_DIRECT, requests of every size and place are right, fio verifies, and what was acknowledged survives the
// death of the data process, which comes back the same way.
func TestDirect(t *testing.T) {
	t.Setenv("ASHLAR_DIRECT", "1")
	b := newBed(t)
	golden := b.raw("golden.raw", 16*mib, 8)
	b.cli("image", "import", "golden", golden)
	b.cli("volume", "create", "v", "--image", "golden", "--size", "128Mi")
	b.attach("v")
	direct := func() {
		t.Helper()
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", b.p.PID("data")))
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, fd := range fds {
			name, err := os.Readlink(fd)
			if err != nil || filepath.Dir(name) != b.replica("v") {
				continue // it was closed meanwhile, or is another
			}
			text, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(fd)), "fdinfo", filepath.Base(fd)))
			if err != nil {
				t.Fatal(err)
			}
			var flags int64
			for line := range strings.Lines(string(text)) {
				if rest, ok := strings.CutPrefix(line, "flags:"); ok {
					if flags, err = strconv.ParseInt(strings.TrimSpace(rest), 8, 64); err != nil {
						t.Fatal(err)
					}
				}
			}
			found = found || flags&syscall.O_DIRECT != 0
		}
		if !found {
			t.Error("no layer of the volume is open with O_DIRECT")
		}
	}
	direct()
	b.same("v", golden)
	b.qemuIO("v", "write -P 1 20M 8M", "write -P 2 21000001 5000", "write -P 3 20971520 512", "write -P 4 24M 4096", "write -z 25M 1M", "discard 26M 1M", "flush")
	want := []string{"read -P 3 20971520 512", "read -P 1 20972032 27969", "read -P 2 21000001 5000", "read -P 1 21005001 100000", "read -P 4 24M 4096", "read -P 0 25M 2M", "read -P 1 27M 1M", "read -P 0 28M 1M"}
	b.qemuIO("v", want...)
	b.kill("data")
	b.dial("v")
	direct()
	b.qemuIO("v", want...)
	b.cli("snapshot", "create", "v", "one")
	ops, worst := b.startFio(b.uri("v"), 64*mib, 0).wait()
	t.Logf("fio verified %d operations, the slowest took %v", ops, worst.Round(time.Millisecond))
	b.clean("v")
}

// TestFullDisk fills a small file system through a volume: writers get ENOSPC and nothing else happens; what was written stays, overwrites and
// flushes go on, and when something is deleted writes go on too.
func TestFullDisk(t *testing.T) {
	dir := scratch(t)
	disk := filepath.Join(dir, "data", "disks", "default")
	mountNew(t, dir, disk, "256M", "mkfs.ext4", "-q", "-m", "0", "-F")
	b := startIn(t, dir)
	b.cli("volume", "create", "keep", "--size", "64Mi")
	b.cli("volume", "create", "fill", "--size", "1Gi")
	b.cli("volume", "create", "other", "--size", "64Mi")
	b.attach("keep", "fill", "other")
	b.tool("nbdcopy", "--flush", b.raw("keep.raw", 32*mib, 20), b.uri("keep"))
	b.cli("snapshot", "create", "keep", "one")
	c := b.dial("fill")
	filled, err := fill(c, 0)
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("writing on after %d MiB: %v, want ENOSPC", filled/mib, err)
	}
	t.Logf("a 256 MiB file system took %d MiB through one volume beside 16 MiB of another, then ENOSPC", filled/mib)
	patterns := func(c *client) {
		t.Helper()
		got, want := make([]byte, mib), make([]byte, mib)
		for off := int64(0); off < filled; off += mib {
			if err := c.read(off, got); err != nil || !bytes.Equal(got, pattern(want, off)) {
				t.Fatalf("what was acknowledged at %d MiB reads wrong: %v", off/mib, err)
			}
		}
	}
	patterns(c)
	for _, v := range []string{"keep", "fill", "other"} { // nobody failed
		if v := b.volume(v); v.State != "attached" || v.Robustness != "healthy" {
			t.Errorf("volume on a full disk: %+v", v)
		}
	}
	// Overwrites need no space, nor do flushes, discards of what is there, and the connection goes on.
	buf := make([]byte, mib)
	for off := int64(0); off < min(filled, 16*mib); off += mib {
		if err := c.write(off, pattern(buf, off)); err != nil {
			t.Errorf("an overwrite on a full disk: %v", err)
		}
	}
	if err := c.flush(); err != nil {
		t.Errorf("a flush on a full disk: %v", err)
	}
	b.same("keep", b.path("keep.raw"))
	// A snapshot needs a new head: either it is taken, or it is refused with a reason and nothing changed.
	if out, err := b.p.Text(b.ctx, "snapshot", "create", "fill", "full"); err == nil {
		t.Logf("a snapshot on a full disk was taken: %s", strings.TrimSpace(out))
	} else {
		t.Logf("a snapshot on a full disk: %v", err)
		if !strings.Contains(err.Error(), "space") {
			t.Errorf("the reason does not say that there is no space: %v", err)
		}
		if len(b.snapshots("fill")) != 0 {
			t.Errorf("a snapshot that was refused is listed: %v", b.snapshots("fill"))
		}
	}
	patterns(c)
	if out, err := b.p.Text(b.ctx, "volume", "create", "late", "--size", "64Mi", "--timeout", "5s"); err == nil {
		t.Logf("a volume was created on a full disk: %s", strings.TrimSpace(out))
	} else {
		t.Logf("a volume on a full disk: %v", err)
	}
	b.p.Text(b.ctx, "volume", "delete", "late")
	b.kill("data")
	c = b.dial("fill")
	patterns(c)
	b.clean("keep", "fill", "other")
	// Space returns when something is deleted, and writes go on at once.
	b.cli("volume", "delete", "keep")
	more, err := fill(c, filled)
	if more < filled+8*mib || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("after a volume of 16 MiB was deleted: %d MiB more, %v", (more-filled)/mib, err)
	}
	filled = more
	patterns(c)
	if err := c.do(nbdTrim, 0, nil, uint32(filled/2)); err != nil {
		t.Errorf("a discard on a full disk: %v", err)
	}
	if err := c.flush(); err != nil {
		t.Error(err)
	}
	b.qemuIO("other", "write -P 0x42 0 32M", "flush", "read -P 0x42 0 32M")
	b.qemuIO("fill", fmt.Sprintf("read -P 0 0 %d", filled/2/mib*mib))
	b.cli("volume", "detach", "fill")
	b.attach("fill")
	b.qemuIO("fill", fmt.Sprintf("read -P 0 0 %d", filled/2/mib*mib), "write -P 0x43 0 32M", "flush")
	b.clean("fill", "other")
	b.raw("big.raw", 512*mib, 21)
	b.unchanged(func() {
		said := b.refused(exitRefused, []string{"image big", "space"}, "image", "import", "big", b.path("big.raw"))
		t.Logf("an image that does not fit: %s", strings.TrimSpace(said))
		b.cli("image", "delete", "big")
	})
	b.qemuIO("fill", "write -P 0x44 0 32M", "flush")
	b.clean("fill", "other")
	b.cli("volume", "delete", "fill", "other")
	var st syscall.Statfs_t
	if err := syscall.Statfs(disk, &st); err != nil {
		t.Fatal(err)
	}
	t.Logf("everything deleted: %d of %d MiB are free", int64(st.Bfree)*st.Bsize/mib, int64(st.Blocks)*st.Bsize/mib)
	if int64(st.Blocks-st.Bfree)*st.Bsize > 4*mib {
		t.Errorf("space did not return: %d of %d blocks are free", st.Bfree, st.Blocks)
	}
}

// TestFullMachine is the same where catalogue, logs and disk share one file system, as they do by default: serve may suffer, guests do not, and a person gets
// out of it.
func TestFullMachine(t *testing.T) {
	dir := scratch(t)
	mountNew(t, dir, filepath.Join(dir, "data"), "512M", "mkfs.ext4", "-q", "-m", "0", "-F")
	b := startIn(t, dir)
	b.cli("volume", "create", "victim", "--size", "64Mi")
	b.cli("volume", "create", "fill", "--size", "1Gi")
	b.attach("victim", "fill")
	b.qemuIO("victim", "write -P 0x21 0 32M", "flush")
	c := b.dial("fill")
	filled, err := fill(c, 0)
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("writing on after %d MiB: %v, want ENOSPC", filled/mib, err)
	}
	b.qemuIO("victim", "write -P 0x22 0 32M", "flush", "read -P 0x22 0 32M")
	b.cli("volume", "delete", "victim")
	more, err := fill(c, filled)
	if more < filled+16*mib || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("after a volume of 32 MiB was deleted: %d MiB more, %v", (more-filled)/mib, err)
	}
	if err := b.p.KillServe(); err != nil {
		t.Fatal(err)
	}
	b.restartServe("fill")
	b.clean("fill")
	b.cli("volume", "delete", "fill")
}

// pattern is what fill writes at an offset.
func pattern(p []byte, off int64) []byte {
	rand.NewChaCha8([32]byte{byte(off >> 20), byte(off >> 28), 1}).Read(p)
	return p
}

// fill writes megabytes from an offset on until the first error; all before the offset it returns were acknowledged.
func fill(c *client, off int64) (int64, error) {
	p := make([]byte, mib)
	for ; off+mib <= c.size; off += mib {
		if err := c.write(off, pattern(p, off)); err != nil {
			return off, err
		}
	}
	return off, nil
}
