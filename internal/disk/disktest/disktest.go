// Package disktest is the contract of disk.FS and disk.File as a test suite. The real file system and the one in memory both pass it, so
// that a proof made on the one speaks about the other.
//
// Read next: package disk.
package disktest

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"ashlar/internal/disk"
)

// Run checks the file systems that newFS returns, an empty one at each call.
func Run(t *testing.T, newFS func(t *testing.T) disk.FS) {
	tests := []struct {
		name string
		run  func(t *testing.T, fsys disk.FS)
	}{
		{"Names", testNames}, {"NamesRefused", testNamesRefused}, {"Rename", testRename}, {"Remove", testRemove},
		{"ReadWrite", testReadWrite}, {"Ends", testEnds}, {"ReadOnly", testReadOnly}, {"Closed", testClosed},
		{"Punch", testPunch}, {"Reserve", testReserve}, {"NextData", testNextData}, {"Huge", testHuge}, {"Share", testShare},
		{"Lock", testLock}, {"Usage", testUsage}, {"Concurrent", testConcurrent}, {"CloseRace", testCloseRace}, {"Model", testModel},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { tt.run(t, newFS(t)) })
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantIs(t *testing.T, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Fatalf("error is %v, want one that is %v", err, target)
	}
}

func create(t *testing.T, fsys disk.FS, name string, n int64) disk.File {
	t.Helper()
	f, err := fsys.Create(name, n)
	must(t, err)
	t.Cleanup(func() {
		if err := f.Close(); err != nil && !errors.Is(err, fs.ErrClosed) {
			t.Errorf("close %s: %v", name, err)
		}
	})
	return f
}

func write(t *testing.T, f disk.File, b []byte, off int64) {
	t.Helper()
	n, err := f.WriteAt(b, off)
	must(t, err)
	if n != len(b) {
		t.Fatalf("WriteAt wrote %d of %d bytes without an error", n, len(b))
	}
}

func wantBytes(t *testing.T, f disk.File, off int64, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := f.ReadAt(got, off); err != nil || n != len(got) {
		t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", len(got), off, n, err)
	}
	if !bytes.Equal(got, want) {
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("byte %d is %#x, want %#x", off+int64(i), got[i], want[i])
			}
		}
	}
}

func fill(n int, c byte) []byte { return bytes.Repeat([]byte{c}, n) }

func testNames(t *testing.T, fsys disk.FS) {
	create(t, fsys, "b", 4096)
	create(t, fsys, "a", 0)
	must(t, fsys.Mkdir("d/e/f"))
	must(t, fsys.Mkdir("d/e"))
	create(t, fsys, "d/e/x", 10)
	for _, dir := range []string{".", "d", "d/e"} {
		must(t, fsys.SyncDir(dir))
	}
	for dir, want := range map[string][]string{".": {"a", "b", "d"}, "d": {"e"}, "d/e": {"f", "x"}, "d/e/f": {}} {
		got, err := fsys.List(dir)
		must(t, err)
		if !slices.Equal(got, want) {
			t.Errorf("List(%s) = %v, want %v", dir, got, want)
		}
	}
	info, err := fsys.Stat("d/e/x")
	must(t, err)
	if info.Dir || info.SizeBytes != 10 || info.AllocatedBytes != 0 {
		t.Errorf("Stat of a new file of 10 bytes: %+v", info)
	}
	if info, err = fsys.Stat("d"); err != nil || !info.Dir {
		t.Errorf("Stat of a directory: %+v, %v", info, err)
	}
	f, err := fsys.Open("d/e/x")
	must(t, err)
	must(t, f.Close())
	if ok, err := disk.Exists(fsys, "nothing"); ok || err != nil {
		t.Errorf("Exists(nothing) = %v, %v", ok, err)
	}
}

func testNamesRefused(t *testing.T, fsys disk.FS) {
	create(t, fsys, "file", 0)
	must(t, fsys.Mkdir("dir"))
	_, err := fsys.Create("file", 0)
	wantIs(t, err, fs.ErrExist)
	_, err = fsys.Create("dir", 0)
	wantIs(t, err, fs.ErrExist)
	_, err = fsys.Create("no/file", 0)
	wantIs(t, err, fs.ErrNotExist)
	_, err = fsys.Open("none")
	wantIs(t, err, fs.ErrNotExist)
	_, err = fsys.OpenRead("none")
	wantIs(t, err, fs.ErrNotExist)
	_, err = fsys.List("none")
	wantIs(t, err, fs.ErrNotExist)
	_, err = fsys.Stat("none")
	wantIs(t, err, fs.ErrNotExist)
	wantIs(t, fsys.SyncDir("none"), fs.ErrNotExist)
	wantIs(t, fsys.Remove("none"), fs.ErrNotExist)
	wantIs(t, fsys.Rename("none", "other"), fs.ErrNotExist)
	for _, f := range []func() error{
		func() error { _, err := fsys.Open("dir"); return err },
		func() error { _, err := fsys.OpenRead("dir"); return err },
		func() error { return fsys.Mkdir("file") },
		func() error { return fsys.Mkdir("file/x") },
		func() error { return fsys.SyncDir("file") },
		func() error { _, err := fsys.List("file"); return err },
		func() error { _, err := fsys.Create("negative", -1); return err },
	} {
		if f() == nil {
			t.Error("a file was taken for a directory, a directory for a file, or a negative length for one")
		}
	}
	for _, name := range []string{"", "..", "../x", "/x", "a/../b", "x/", "a//b", "./x"} {
		_, err := fsys.Create(name, 0)
		wantIs(t, err, fs.ErrInvalid)
		_, err = fsys.Open(name)
		wantIs(t, err, fs.ErrInvalid)
		_, err = fsys.Stat(name)
		wantIs(t, err, fs.ErrInvalid)
		wantIs(t, fsys.Mkdir(name), fs.ErrInvalid)
		wantIs(t, fsys.Remove(name), fs.ErrInvalid)
		wantIs(t, fsys.Rename("file", name), fs.ErrInvalid)
		wantIs(t, fsys.SyncDir(name), fs.ErrInvalid)
	}
}

func testRename(t *testing.T, fsys disk.FS) {
	f := create(t, fsys, "new", 8192)
	write(t, f, fill(8192, 'n'), 0)
	old := create(t, fsys, "old", 4096)
	write(t, old, fill(4096, 'o'), 0)
	must(t, fsys.Rename("new", "old"))
	if ok, err := disk.Exists(fsys, "new"); ok || err != nil {
		t.Errorf("the old name is still there: %v, %v", ok, err)
	}
	g, err := fsys.Open("old")
	must(t, err)
	wantBytes(t, g, 0, fill(8192, 'n'))
	must(t, g.Close())
	wantBytes(t, old, 0, fill(4096, 'o')) // the file that was replaced lives as long as it is open
	must(t, fsys.Mkdir("dir/full"))
	must(t, fsys.Mkdir("sub"))
	must(t, fsys.Rename("old", "sub/here"))
	must(t, fsys.Rename("sub", "moved"))
	if ok, err := disk.Exists(fsys, "moved/here"); !ok || err != nil {
		t.Errorf("a file did not move with its directory: %v, %v", ok, err)
	}
	wantIs(t, fsys.Rename("moved", "dir"), fs.ErrExist) // not empty
	if fsys.Rename("moved", "moved/inside") == nil {
		t.Error("a directory was moved into itself")
	}
	must(t, fsys.Rename("moved/here", "moved/here"))
}

func testRemove(t *testing.T, fsys disk.FS) {
	f := create(t, fsys, "f", 4096)
	write(t, f, fill(4096, 'x'), 0)
	must(t, fsys.Remove("f"))
	wantIs(t, fsys.Remove("f"), fs.ErrNotExist)
	wantBytes(t, f, 0, fill(4096, 'x'))
	must(t, fsys.Mkdir("d/e"))
	if fsys.Remove("d") == nil {
		t.Error("a directory that is not empty was removed")
	}
	must(t, fsys.Remove("d/e"))
	must(t, fsys.Remove("d"))
	must(t, f.Close())
	g := create(t, fsys, "f", 4096)
	wantBytes(t, g, 0, make([]byte, 4096))
}

func testReadWrite(t *testing.T, fsys disk.FS) {
	f := create(t, fsys, "f", 1<<20)
	want := make([]byte, 1<<20)
	wantBytes(t, f, 0, want)
	at := func(off int, b []byte) {
		t.Helper()
		write(t, f, b, int64(off))
		copy(want[off:], b)
		wantBytes(t, f, 0, want)
		wantBytes(t, f, int64(off), b)
	}
	at(0, fill(4096, 1))
	at(4096*3+17, fill(5, 2))
	at(4095, fill(2, 3))
	at(511, fill(8192+3, 4))
	at(1<<20-1, fill(1, 5))
	at(64<<10, fill(600<<10, 6))
	at(100<<10, disk.AlignedBuffer(300<<10))
	aligned := disk.AlignedBuffer(8192)
	copy(aligned, fill(8192, 7))
	at(8192, aligned)
	must(t, f.Sync())
	wantBytes(t, f, 1, want[1:1<<20-1])
	unaligned := make([]byte, 4096*4+1)[1:]
	if n, err := f.ReadAt(unaligned, 4096); n != len(unaligned) || err != nil || !bytes.Equal(unaligned, want[4096:4096*5]) {
		t.Errorf("ReadAt into memory at an odd address: %d, %v", n, err)
	}
	g, err := fsys.Open("f")
	must(t, err)
	defer func() { must(t, g.Close()) }()
	wantBytes(t, g, 0, want)
	if n, err := f.WriteAt(nil, 0); n != 0 || err != nil {
		t.Errorf("an empty write: %d, %v", n, err)
	}
	if n, err := f.ReadAt(nil, 0); n != 0 || err != nil {
		t.Errorf("an empty read: %d, %v", n, err)
	}
}

func testEnds(t *testing.T, fsys disk.FS) {
	f := create(t, fsys, "f", 5000)
	write(t, f, fill(5000, 1), 0)
	for _, tt := range []struct{ off, n, want int64 }{{0, 5000, 5000}, {0, 8192, 5000}, {4096, 4096, 904}, {4999, 2, 1}, {5000, 1, 0}, {8192, 4096, 0}, {1 << 40, 10, 0}} {
		for _, b := range [][]byte{make([]byte, tt.n), disk.AlignedBuffer(int(tt.n))} {
			n, err := f.ReadAt(b, tt.off)
			if int64(n) != tt.want || (err == nil) != (tt.want == tt.n) || err != nil && err != io.EOF {
				t.Errorf("ReadAt(%d bytes, %d) = %d, %v; want %d and io.EOF if short", tt.n, tt.off, n, err, tt.want)
			}
			if !bytes.Equal(b[:n], fill(n, 1)) {
				t.Errorf("ReadAt(%d bytes, %d): wrong bytes", tt.n, tt.off)
			}
		}
	}
	_, err := f.ReadAt(make([]byte, 1), -1)
	wantIs(t, err, fs.ErrInvalid)
	_, err = f.WriteAt(make([]byte, 1), -1)
	wantIs(t, err, fs.ErrInvalid)
	wantIs(t, f.Punch(-1, 2), fs.ErrInvalid)
	wantIs(t, f.Reserve(0, -2), fs.ErrInvalid)
	write(t, f, fill(10, 2), 10000) // a write beyond the end makes the file longer
	if n, err := f.Size(); n != 10010 || err != nil {
		t.Errorf("Size() = %d, %v; want 10010", n, err)
	}
	wantBytes(t, f, 4990, slices.Concat(fill(10, 1), make([]byte, 5000), fill(10, 2)))
}

func testReadOnly(t *testing.T, fsys disk.FS) {
	write(t, create(t, fsys, "f", 8192), fill(4096, 1), 0)
	f, err := fsys.OpenRead("f")
	must(t, err)
	defer func() { must(t, f.Close()) }()
	_, err = f.WriteAt(fill(1, 1), 0)
	wantIs(t, err, fs.ErrPermission)
	wantIs(t, f.Punch(0, 4096), fs.ErrPermission)
	wantIs(t, f.Reserve(0, 4096), fs.ErrPermission)
	wantBytes(t, f, 0, fill(4096, 1))
	must(t, f.Lock())
}

func testClosed(t *testing.T, fsys disk.FS) {
	f := create(t, fsys, "f", 8192)
	must(t, f.Close())
	_, err := f.ReadAt(make([]byte, 10), 0)
	wantIs(t, err, fs.ErrClosed)
	_, err = f.WriteAt(make([]byte, 10), 0)
	wantIs(t, err, fs.ErrClosed)
	_, err = f.Size()
	wantIs(t, err, fs.ErrClosed)
	_, err = f.Allocated()
	wantIs(t, err, fs.ErrClosed)
	_, _, err = f.NextData(0)
	wantIs(t, err, fs.ErrClosed)
	wantIs(t, f.Sync(), fs.ErrClosed)
	wantIs(t, f.Punch(0, 10), fs.ErrClosed)
	wantIs(t, f.Reserve(0, 10), fs.ErrClosed)
	wantIs(t, f.Lock(), fs.ErrClosed)
	wantIs(t, f.Close(), fs.ErrClosed)
}

func testPunch(t *testing.T, fsys disk.FS) {
	f := create(t, fsys, "f", 1<<20)
	want := fill(1<<20, 9)
	write(t, f, want, 0)
	must(t, f.Sync())
	before, err := f.Allocated()
	must(t, err)
	punch := func(off, n int64) {
		t.Helper()
		must(t, f.Punch(off, n))
		clear(want[off:min(off+n, int64(len(want)))])
		wantBytes(t, f, 0, want)
	}
	punch(0, 0)
	punch(4096, 8192)
	punch(100, 50)
	punch(20000, 5000)
	punch(300<<10, 500<<10+17)
	punch(4096, 8192)
	punch(1<<20-4096, 1<<20)
	must(t, f.Sync())
	after, err := f.Allocated()
	must(t, err)
	if before-after < 400<<10 {
		t.Errorf("punching over 500 KiB took Allocated from %d to %d", before, after)
	}
	if n, err := f.Size(); n != 1<<20 || err != nil {
		t.Errorf("Size() = %d, %v after Punch beyond the end", n, err)
	}
	write(t, f, fill(4096, 3), 4096)
	copy(want[4096:], fill(4096, 3))
	wantBytes(t, f, 0, want)
}

func testReserve(t *testing.T, fsys disk.FS) {
	f := create(t, fsys, "f", 1<<20)
	write(t, f, fill(4096, 1), 8192)
	must(t, f.Reserve(0, 256<<10))
	must(t, f.Reserve(0, 0))
	must(t, f.Sync())
	want := make([]byte, 1<<20)
	copy(want[8192:], fill(4096, 1))
	wantBytes(t, f, 0, want)
	if n, err := f.Allocated(); n < 256<<10 || err != nil {
		t.Errorf("Allocated() = %d, %v after reserving 256 KiB", n, err)
	}
	if n, err := f.Size(); n != 1<<20 || err != nil {
		t.Errorf("Size() = %d, %v after Reserve", n, err)
	}
	must(t, f.Punch(0, 256<<10))
	must(t, f.Sync())
	if n, err := f.Allocated(); n > 64<<10 || err != nil {
		t.Errorf("Allocated() = %d, %v after punching what was reserved", n, err)
	}
	wantBytes(t, f, 0, make([]byte, 1<<20))
}

func testNextData(t *testing.T, fsys disk.FS) {
	f := create(t, fsys, "f", 64<<20)
	_, _, err := f.NextData(0)
	wantIs(t, err, io.EOF)
	write(t, f, fill(128<<10, 1), 1<<20)
	write(t, f, fill(4096, 1), 32<<20)
	must(t, f.Sync())
	for _, tt := range []struct{ off, want, n int64 }{{0, 1 << 20, 128 << 10}, {1 << 20, 1 << 20, 128 << 10}, {1<<20 + 64<<10, 1<<20 + 64<<10, 64 << 10}, {1<<20 + 128<<10, 32 << 20, 4096}} {
		off, n, err := f.NextData(tt.off)
		if off != tt.want || n != tt.n || err != nil {
			t.Errorf("NextData(%d) = %d, %d, %v; want %d, %d", tt.off, off, n, err, tt.want, tt.n)
		}
	}
	for _, off := range []int64{32<<20 + 4096, 64 << 20, 1 << 40} {
		_, _, err := f.NextData(off)
		wantIs(t, err, io.EOF)
	}
	must(t, f.Punch(1<<20, 64<<10))
	must(t, f.Sync())
	if off, n, err := f.NextData(0); off != 1<<20+64<<10 || n != 64<<10 || err != nil {
		t.Errorf("NextData(0) = %d, %d, %v after Punch", off, n, err)
	}
}

func testHuge(t *testing.T, fsys disk.FS) {
	const size = 8 << 40
	f := create(t, fsys, "huge", size)
	for _, off := range []int64{0, 1 << 40, size - 4096} {
		write(t, f, fill(4096, 7), off)
		wantBytes(t, f, off, fill(4096, 7))
	}
	must(t, f.Punch(4096, size-8192))
	wantBytes(t, f, 1<<40, make([]byte, 4096))
	wantBytes(t, f, size-4096, fill(4096, 7))
	must(t, f.Sync())
	if n, err := f.Allocated(); n > 1<<20 || err != nil {
		t.Errorf("two pages of an 8 TiB file occupy %d bytes, %v", n, err)
	}
}

func testShare(t *testing.T, fsys disk.FS) {
	src, dst := create(t, fsys, "src", 64<<10), create(t, fsys, "dst", 64<<10)
	write(t, src, fill(64<<10, 1), 0)
	err := dst.ShareFrom(src, 8192, 4096, 16384)
	if errors.Is(err, disk.ErrNotSupported) {
		wantBytes(t, dst, 0, make([]byte, 64<<10))
		return
	}
	must(t, err)
	wantBytes(t, dst, 0, slices.Concat(make([]byte, 4096), fill(16384, 1), make([]byte, 4096)))
	write(t, src, fill(64<<10, 2), 0)
	wantBytes(t, dst, 4096, fill(16384, 1))
}

func testLock(t *testing.T, fsys disk.FS) {
	a := create(t, fsys, "f", 0)
	must(t, a.Lock())
	must(t, a.Lock())
	b, err := fsys.Open("f")
	must(t, err)
	wantIs(t, b.Lock(), disk.ErrLocked)
	must(t, a.Close())
	must(t, b.Lock())
	must(t, b.Close())
}

func testUsage(t *testing.T, fsys disk.FS) {
	total, free, err := fsys.Usage()
	if err != nil || total <= 0 || free <= 0 || free > total {
		t.Errorf("Usage() = %d, %d, %v", total, free, err)
	}
}

func testConcurrent(t *testing.T, fsys disk.FS) {
	const workers, each = 8, 64 << 10
	f := create(t, fsys, "f", workers*each)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range 16 {
				b := fill(4096, byte(w+1))
				off := int64(w*each + i*4096)
				if _, err := f.WriteAt(b, off); err != nil {
					t.Error(err)
				}
				got := make([]byte, 4096)
				if _, err := f.ReadAt(got, off); err != nil || !bytes.Equal(got, b) {
					t.Errorf("read back at %d: %v", off, err)
				}
				if i%8 == 7 {
					if err := errors.Join(f.Sync(), f.Punch(int64(w*each), 4096)); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	for w := range workers {
		wantBytes(t, f, int64(w*each), slices.Concat(make([]byte, 4096), fill(each-4096, byte(w+1))))
	}
}

// testCloseRace closes a file under calls: each succeeds whole or says fs.ErrClosed, and none hits another file's descriptor.
func testCloseRace(t *testing.T, fsys disk.FS) {
	victim := create(t, fsys, "victim", 64<<10)
	for range 20 {
		f, err := fsys.Create("f", 64<<10)
		must(t, err)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for {
					if _, err := f.WriteAt(fill(4096, 0xff), 4096); err != nil {
						if !errors.Is(err, fs.ErrClosed) {
							t.Errorf("a write that raced with Close: %v", err)
						}
						return
					}
				}
			})
		}
		must(t, f.Close())
		other, err := fsys.Open("victim") // likely to get the descriptor's number
		must(t, err)
		wg.Wait()
		must(t, other.Close())
		must(t, fsys.Remove("f"))
	}
	wantBytes(t, victim, 0, make([]byte, 64<<10))
}

// testModel compares random changes with a plain byte slice.
func testModel(t *testing.T, fsys disk.FS) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	const size = 256 << 10
	f := create(t, fsys, "f", size)
	want := make([]byte, size)
	for range 300 {
		off := r.IntN(size)
		n := r.IntN(min(size-off, 40<<10)) + 1
		if r.IntN(2) == 0 {
			off, n = off/4096*4096, (n+4095)/4096*4096
		}
		n = min(n, size-off)
		switch r.IntN(6) {
		case 0:
			must(t, f.Punch(int64(off), int64(n)))
			clear(want[off : off+n])
		case 1:
			must(t, f.Reserve(int64(off), int64(n)))
		case 2:
			must(t, f.Sync())
		default:
			b := make([]byte, n+1)[r.IntN(2):][:n]
			for i := range b {
				b[i] = byte(r.Uint32())
			}
			write(t, f, b, int64(off))
			copy(want[off:], b)
		}
		wantBytes(t, f, int64(off), want[off:off+n])
	}
	wantBytes(t, f, 0, want)
	for off := int64(0); ; {
		at, n, err := f.NextData(off)
		if err == io.EOF {
			at = size
		} else {
			must(t, err)
		}
		if !bytes.Equal(want[off:at], make([]byte, at-off)) {
			t.Fatalf("NextData(%d) skips data before %d", off, at)
		}
		if off = at + n; at == size {
			break
		}
	}
}
