package disk_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"ashlar/internal/disk"
)

func openReal(t testing.TB, dir string, opts disk.RealOptions) *disk.Real {
	t.Helper()
	d, err := disk.OpenReal(dir, opts)
	if errors.Is(err, disk.ErrNotSupported) {
		t.Skipf("the temporary directory has no O_DIRECT: %v", err)
	}
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	return d
}

// TestRealStaysBelowItsRoot: a symbolic link leads nowhere outside.
func TestRealStaysBelowItsRoot(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "secret"), []byte("secret"), 0o600))
	must(t, os.Mkdir(filepath.Join(dir, "root"), 0o700))
	must(t, os.Symlink("../secret", filepath.Join(dir, "root", "link")))
	must(t, os.Symlink("..", filepath.Join(dir, "root", "up")))
	d := openReal(t, filepath.Join(dir, "root"), disk.RealOptions{})
	for _, name := range []string{"link", "up/secret"} {
		if _, err := d.OpenRead(name); err == nil {
			t.Errorf("%s leads out of the root", name)
		}
		if _, err := d.Stat(name); err == nil {
			t.Errorf("Stat of %s leads out of the root", name)
		}
	}
	if _, err := d.Create("up/new", 0); err == nil {
		t.Error("Create leads out of the root")
	}
	must(t, unix.Mkfifo(filepath.Join(dir, "root", "fifo"), 0o600))
	if _, err := d.Open("fifo"); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("Open of a FIFO: %v", err)
	}
}

// TestAdopt passes a descriptor with its lock, as one process does to the next.
func TestAdopt(t *testing.T) {
	for name, opts := range map[string]disk.RealOptions{"cached": {}, "direct": {Direct: true}} {
		t.Run(name, func(t *testing.T) {
			d := openReal(t, t.TempDir(), opts)
			f, err := d.Create("f", 1<<20)
			must(t, err)
			must(t, f.Lock())
			write(t, f, fill(4096, 1), 0)
			pass := func() *os.File {
				fd, err := unix.FcntlInt(f.(*disk.RealFile).Fd(), unix.F_DUPFD_CLOEXEC, 0)
				must(t, err)
				return os.NewFile(uintptr(fd), "passed")
			}
			other, err := d.Create("other", 0)
			must(t, err)
			must(t, other.Close())
			if _, err := d.Adopt(pass(), "other"); !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("Adopt under another file's name: %v", err)
			}
			g, err := d.Adopt(pass(), "f")
			must(t, err)
			must(t, f.Close())
			rival, err := d.Open("f")
			must(t, err)
			if err := rival.Lock(); !errors.Is(err, disk.ErrLocked) {
				t.Errorf("the lock was not passed on: %v", err)
			}
			write(t, g, fill(4096, 2), 4096)
			if b := read(t, g, 0, 8192); !bytes.Equal(b, append(fill(4096, 1), fill(4096, 2)...)) {
				t.Error("the adopted file has other content")
			}
			must(t, g.Close())
			must(t, rival.Lock())
			must(t, rival.Close())
		})
	}
}

// TestDirectBesideTheCache mixes direct and cached ways to the same bytes: whole blocks and parts, aligned memory and not.
func TestDirectBesideTheCache(t *testing.T) {
	d := openReal(t, t.TempDir(), disk.RealOptions{Direct: true})
	f, err := d.Create("f", 1<<20)
	must(t, err)
	defer func() { must(t, f.Close()) }()
	want := make([]byte, 1<<20)
	aligned := disk.AlignedBuffer(1 << 20)
	for i := range 200 {
		off := i * 5003 % (1 << 19)
		n := 1 + i*7919%(300<<10)
		b := aligned[i%3*512 : i%3*512+n]
		if i%2 == 0 {
			off, n = off/4096*4096, (n+4095)/4096*4096
			b = aligned[i%3*512 : i%3*512+n]
		}
		for j := range b {
			b[j] = byte(i + j)
		}
		write(t, f, b, int64(off))
		copy(want[off:], b)
		got := disk.AlignedBuffer(n + 8192)[i%2 : i%2+n]
		if _, err := f.ReadAt(got, int64(off)); err != nil || !bytes.Equal(got, b) {
			t.Fatalf("write %d of %d bytes at %d does not read back: %v", i, n, off, err)
		}
	}
	if got := read(t, f, 0, 1<<20); !bytes.Equal(got, want) {
		t.Error("content differs")
	}
}

// TestRealAllocatesNothing: the way of guests' bytes makes no garbage.
func TestRealAllocatesNothing(t *testing.T) {
	for name, opts := range map[string]disk.RealOptions{"cached": {}, "direct": {Direct: true}} {
		t.Run(name, func(t *testing.T) {
			d := openReal(t, t.TempDir(), opts)
			f, err := d.Create("f", 1<<20)
			must(t, err)
			defer func() { must(t, f.Close()) }()
			b := disk.AlignedBuffer(4096)
			if n := testing.AllocsPerRun(50, func() { write(t, f, b, 4096) }); n != 0 {
				t.Errorf("%v allocations in WriteAt", n)
			}
			if n := testing.AllocsPerRun(50, func() { _, _ = f.ReadAt(b, 4096) }); n != 0 {
				t.Errorf("%v allocations in ReadAt", n)
			}
		})
	}
}

func BenchmarkReal4K(b *testing.B) {
	for name, opts := range map[string]disk.RealOptions{"cached": {}, "direct": {Direct: true}} {
		d := openReal(b, b.TempDir(), opts)
		f, err := d.Create("f", 64<<20)
		must(b, err)
		buf := disk.AlignedBuffer(4096)
		b.Run(name+"/write", func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				write(b, f, buf, int64(i%16384)*4096)
			}
		})
		b.Run(name+"/read", func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				if _, err := f.ReadAt(buf, int64(i%16384)*4096); err != nil {
					b.Fatal(err)
				}
			}
		})
		must(b, f.Close())
	}
}
