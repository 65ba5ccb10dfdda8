//go:build integration

package disk_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"ashlar/internal/disk"
	"ashlar/internal/disk/disktest"
)

// mount makes a file system of its own and returns where it is mounted.
func mount(t *testing.T, kind string) string {
	t.Helper()
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
	}
	dir := filepath.Join(t.TempDir(), "mnt")
	must(t, os.Mkdir(dir, 0o700))
	image := dir + ".img"
	switch kind {
	case "tmpfs":
		run("mount", "-t", "tmpfs", "-o", "size=320m", "ashlar-test", dir)
	default:
		f, err := os.Create(image)
		must(t, err)
		must(t, f.Truncate(320<<20))
		must(t, f.Close())
		args := map[string][]string{"ext4": {"-q", "-b", "4096", image}, "xfs": {"-q", image}} // a small ext4 would get 1 KiB blocks
		run("mkfs."+kind, args[kind]...)
		run("mount", "-o", "loop", image, dir)
	}
	t.Cleanup(func() { run("umount", dir) })
	return dir
}

// TestFileSystems runs the contract, and a disk that gets full, on the file systems people have, with and without O_DIRECT. XFS shares
// extents, ext4 does not.
func TestFileSystems(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "tmpfs"} {
		dir := mount(t, kind)
		for name, opts := range map[string]disk.RealOptions{"cached": {}, "direct": {Direct: true}} {
			t.Run(kind+"/"+name, func(t *testing.T) {
				d, err := disk.OpenReal(dir, opts)
				must(t, err)
				defer func() { must(t, d.Close()) }()
				t.Run("Full", func(t *testing.T) { fullDisk(t, d) })
				disktest.Run(t, func(t *testing.T) disk.FS {
					below, err := os.MkdirTemp(dir, "")
					must(t, err)
					d, err := disk.OpenReal(below, opts)
					must(t, err)
					t.Cleanup(func() { must(t, errors.Join(d.Close(), os.RemoveAll(below))) })
					return d
				})
			})
		}
	}
}

// TestReflink checks that ShareFrom works where the file system can, and takes no space.
func TestReflink(t *testing.T) {
	d, err := disk.OpenReal(mount(t, "xfs"), disk.RealOptions{})
	must(t, err)
	defer func() { must(t, d.Close()) }()
	src, err := d.Create("src", 64<<20)
	must(t, err)
	dst, err := d.Create("dst", 64<<20)
	must(t, err)
	write(t, src, fill(64<<20, 1), 0)
	must(t, src.Sync())
	_, before, err := d.Usage()
	must(t, err)
	must(t, dst.ShareFrom(src, 0, 0, 64<<20))
	must(t, dst.Sync())
	_, after, err := d.Usage()
	must(t, err)
	if before-after > 1<<20 {
		t.Errorf("sharing 64 MiB took %d bytes", before-after)
	}
	must(t, errors.Join(src.Close(), dst.Close()))
}

// fullDisk fills d: ErrNoSpace comes, what was reserved can still be written, and the space comes back.
func fullDisk(t *testing.T, d *disk.Real) {
	reserved, err := d.Create("reserved", 64<<20)
	must(t, err)
	must(t, reserved.Reserve(0, 8<<20))
	must(t, reserved.Sync())
	_, before, err := d.Usage()
	must(t, err)
	filler, err := d.Create("filler", 1<<30)
	must(t, err)
	chunk := disk.AlignedBuffer(1 << 20)
	copy(chunk, fill(1<<20, 7))
	var full error
	var filled int64
	for off := int64(0); off < 1<<30 && full == nil; off += 1 << 20 {
		if _, full = filler.WriteAt(chunk, off); full == nil {
			filled = off + 1<<20
		}
	}
	if !errors.Is(full, disk.ErrNoSpace) || filled < 16<<20 {
		t.Fatalf("after %d bytes: %v", filled, full)
	}
	must(t, filler.Sync())
	if err := filler.Reserve(1<<29, 64<<20); !errors.Is(err, disk.ErrNoSpace) {
		t.Errorf("Reserve on a full disk: %v", err)
	}
	for off := int64(0); off < 8<<20; off += 1 << 20 {
		write(t, reserved, chunk, off)
	}
	must(t, reserved.Sync())
	if got := read(t, reserved, 0, 1<<20); !bytes.Equal(got, chunk) {
		t.Error("what was written into reserved space does not read back")
	}
	write(t, filler, chunk, 0) // overwriting goes on
	must(t, filler.Sync())
	must(t, filler.Punch(0, filled))
	must(t, filler.Sync())
	_, after, err := d.Usage()
	must(t, err)
	if after < before-4<<20 {
		t.Errorf("%d bytes were free, %d are after everything was punched", before, after)
	}
	must(t, errors.Join(filler.Close(), reserved.Close(), d.Remove("filler"), d.Remove("reserved")))
}
