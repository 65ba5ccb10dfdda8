//go:build integration

package testbed_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestPlaces works on every file system that a disk may be, and around the page cache: real clients write, discard, compare, snapshot, go back, and see it
// all again after the data process was killed.
func TestPlaces(t *testing.T) {
	for name, place := range map[string]struct {
		mount  func(t *testing.T, dir, at string)
		direct string
	}{
		"ext4 direct": {func(*testing.T, string, string) {}, "1"},
		"xfs": {func(t *testing.T, dir, at string) {
			mountNew(t, dir, at, "1G", "mkfs.xfs", "-q", "-m", "reflink=1")
		}, ""},
		"xfs direct": {func(t *testing.T, dir, at string) {
			mountNew(t, dir, at, "1G", "mkfs.xfs", "-q", "-m", "reflink=1")
		}, "1"},
		"tmpfs": {func(t *testing.T, dir, at string) {
			mountAt(t, dir, at, "-t", "tmpfs", "-o", "size=1G", "none")
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("ASHLAR_DIRECT", place.direct)
			dir := scratch(t)
			disk := filepath.Join(dir, "data", "disks", "default")
			if err := os.MkdirAll(disk, 0o700); err != nil {
				t.Fatal(err)
			}
			place.mount(t, dir, disk)
			b := startIn(t, dir)
			b.workload(place.direct == "1")
		})
	}
}

// workload is a short life with everything in it.
func (b *bed) workload(direct bool) {
	golden := b.raw("golden.raw", 32*mib, 60)
	b.tool("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", golden, b.path("golden.qcow2"))
	b.cli("image", "import", "golden", b.path("golden.qcow2"))
	b.cli("volume", "create", "v", "--image", "golden", "--size", "128Mi")
	b.attach("v")
	b.same("v", golden)
	if got := b.direct(); got != direct {
		b.Errorf("files are open with O_DIRECT: %v, want %v", got, direct)
	}
	start := time.Now()
	ops, worst := b.startFio(b.uri("v"), 64*mib, 0).wait()
	b.Logf("fio verified %d operations in %.1f s, the slowest %v", ops, time.Since(start).Seconds(), worst.Round(time.Microsecond))
	b.qemuIO("v", "write -P 1 1000 5000", "write -P 2 8M 8M", "discard 9M 1M", "write -z 700 300", "read -P 1 1000 5000", "read -P 0 9M 1M", "read -P 0 700 300")
	b.cli("snapshot", "create", "v", "s")
	sum := b.content("v")
	b.qemuIO("v", "write -P 3 0 64M")
	b.kill("data")
	b.dial("v").close()
	b.qemuIO("v", "read -P 3 0 64M")
	b.cli("volume", "detach", "v")
	b.cli("snapshot", "revert", "v", "s")
	b.attach("v")
	if got := b.content("v"); got != sum {
		b.Errorf("after the revert: %s, want %s", got, sum)
	}
	b.qemuIO("v", "discard 32M 96M", "flush", "read -P 0 32M 96M")
	b.clean("v")
	b.cli("snapshot", "delete", "v", "s")
	b.qemuIO("v", "read -P 2 8M 1M", "read -P 0 9M 1M")
	b.cli("volume", "delete", "v")
	b.cli("image", "delete", "golden")
	if left := b.onDisk(b.disk()); left > 256*kib {
		b.Errorf("%d bytes are left after everything was deleted", left)
	}
}

// direct tells whether the data process has a file on the disk open with O_DIRECT.
func (b *bed) direct() bool {
	b.Helper()
	fds, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(b.p.PID("data")), "fd", "*"))
	if err != nil {
		b.Fatal(err)
	}
	for _, fd := range fds {
		to, err := os.Readlink(fd)
		if err != nil || !strings.HasPrefix(to, b.disk()) {
			continue
		}
		info, err := os.ReadFile(strings.Replace(fd, "/fd/", "/fdinfo/", 1))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(info)) {
			if text, ok := strings.CutPrefix(line, "flags:"); ok {
				flags, err := strconv.ParseInt(strings.TrimSpace(text), 8, 64)
				if err == nil && flags&syscall.O_DIRECT != 0 {
					return true
				}
			}
		}
	}
	return false
}

// mountNew mounts a new file system of a size, in a file, on a directory until the test ends.
func mountNew(t *testing.T, dir, at, size string, mkfs ...string) {
	t.Helper()
	b := &bed{T: t, ctx: t.Context(), dir: dir}
	b.tool("truncate", "-s", size, b.path("small.img"))
	b.tool(mkfs[0], append(mkfs[1:], b.path("small.img"))...)
	mountAt(t, dir, at, "-o", "loop", b.path("small.img"))
}

// mountAt mounts something on a directory until the test ends.
func mountAt(t *testing.T, dir, at string, args ...string) {
	t.Helper()
	b := &bed{T: t, ctx: t.Context(), dir: dir}
	if err := os.MkdirAll(at, 0o700); err != nil {
		t.Fatal(err)
	}
	b.tool("mount", append(args, at)...)
	t.Cleanup(func() {
		if err := syscall.Unmount(at, 0); err != nil {
			t.Errorf("unmount %s: %v; used by %s", at, err, strings.Join(users(at), "; "))
			syscall.Unmount(at, syscall.MNT_DETACH)
		}
	})
}
