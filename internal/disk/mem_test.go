package disk_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"ashlar/internal/disk"
)

func read(t testing.TB, f disk.File, off int64, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	_, err := f.ReadAt(b, off)
	must(t, err)
	return b
}

func write(t testing.TB, f disk.File, b []byte, off int64) {
	t.Helper()
	_, err := f.WriteAt(b, off)
	must(t, err)
}

func fill(n int, c byte) []byte { return bytes.Repeat([]byte{c}, n) }

func TestCrashKeepsWhatWasSynced(t *testing.T) {
	m := disk.NewMem(disk.MemOptions{})
	f := newFile(t, m, "f", 8192)
	write(t, f, fill(4096, 1), 0)
	must(t, f.Sync())
	write(t, f, fill(4096, 2), 0)
	write(t, f, fill(4096, 2), 4096)
	for keep, want := range map[disk.Keep][]byte{
		disk.KeepNone: slices.Concat(fill(4096, 1), make([]byte, 4096)),
		disk.KeepAll:  fill(8192, 2),
	} {
		if got := read(t, open(t, m.CrashClone(disk.CrashOptions{Keep: keep}), "f"), 0, 8192); !bytes.Equal(got, want) {
			t.Errorf("keep %d: first bytes of the pages %d, %d", keep, got[0], got[4096])
		}
	}
	c := m.Crash(disk.CrashOptions{Keep: disk.KeepAll})
	if _, err := f.WriteAt(fill(1, 1), 0); !errors.Is(err, disk.ErrPower) {
		t.Errorf("a write after the crash: %v", err)
	}
	_, err := f.ReadAt(fill(1, 1), 0)
	for _, err := range []error{err, f.Sync(), f.Close(), m.SyncDir("."), m.Remove("f")} {
		if !errors.Is(err, disk.ErrPower) {
			t.Errorf("after the crash: %v", err)
		}
	}
	if _, err := m.Open("f"); !errors.Is(err, disk.ErrPower) {
		t.Errorf("Open after the crash: %v", err)
	}
	if got := read(t, open(t, c, "f"), 0, 8192); !bytes.Equal(got, fill(8192, 2)) {
		t.Error("the machine came back with something else")
	}
}

// TestCrashOutcomes goes through every outcome of a small history and compares with the ones there must be.
func TestCrashOutcomes(t *testing.T) {
	m := disk.NewMem(disk.MemOptions{})
	f := newFile(t, m, "f", 4096)
	write(t, f, fill(1024, 'a'), 0)
	must(t, f.Sync())
	write(t, f, fill(512, 'b'), 0)
	write(t, f, fill(1024, 'c'), 0)
	seen := map[string]bool{}
	n := outcomes(m, func(c *disk.Mem) {
		b := read(t, open(t, c, "f"), 0, 4096)
		for s := range 8 {
			if !bytes.Equal(b[s*512:(s+1)*512], fill(512, b[s*512])) {
				t.Errorf("sector %d is torn", s)
			}
		}
		seen[string([]byte{b[0], b[512]})] = true
	})
	want := []string{"aa", "ac", "ba", "bc", "ca", "cc"}
	if got := slices.Sorted(maps.Keys(seen)); n != 6 || !slices.Equal(got, want) {
		t.Errorf("%d outcomes %v, want %v", n, got, want)
	}
	must(t, f.Punch(0, 4096))
	seen = map[string]bool{}
	outcomes(m, func(c *disk.Mem) {
		f := open(t, c, "f")
		b := read(t, f, 0, 1024)
		seen[fmt.Sprintf("%q", []byte{b[0], b[512]})] = true
		n, err := f.Allocated()
		must(t, err)
		if n == 0 && !bytes.Equal(b, make([]byte, 1024)) {
			t.Error("bytes without a block")
		}
	})
	if len(seen) != 12 { // a, b, c, zero × a, c, zero
		t.Errorf("after a punch: %v", slices.Sorted(maps.Keys(seen)))
	}
}

func TestCrashNames(t *testing.T) {
	m := disk.NewMem(disk.MemOptions{})
	must(t, m.Mkdir("d"))
	newFile(t, m, "a", 4096)
	f, err := m.Create("d/b", 4096)
	must(t, err)
	write(t, f, fill(4096, 'b'), 0)
	must(t, f.Sync())
	if ok, err := disk.Exists(m.CrashClone(disk.CrashOptions{Keep: disk.KeepNone}), "d/b"); ok || err != nil {
		t.Error("Sync of a file made its name durable")
	}
	must(t, m.SyncDir("d"))
	_, err = m.Create("0", 0) // before the rename, so it is durable wherever that is
	must(t, err)
	must(t, m.Rename("d/b", "a"))
	must(t, m.Mkdir("e"))
	must(t, m.Remove("a"))
	seen := map[string]int{}
	outcomes(m, func(c *disk.Mem) {
		state := ""
		for _, name := range []string{"0", "a", "d/b", "e"} {
			info, err := c.Stat(name)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			must(t, err)
			state += name + " "
			if name == "a" && !info.Dir && read(t, open(t, c, "a"), 0, 1)[0] == 'b' {
				state += "(b) "
			}
		}
		seen[state]++
	})
	want := []string{"0 a (b) ", "0 a (b) e ", "0 a d/b ", "0 e ", "a d/b "}
	if got := slices.Sorted(maps.Keys(seen)); !slices.Equal(got, want) {
		t.Errorf("states after a crash: %q, want %q", got, want)
	}
	must(t, m.SyncDir("d")) // takes the rename along, in both directories
	c := m.CrashClone(disk.CrashOptions{Keep: disk.KeepNone})
	if got := read(t, open(t, c, "a"), 0, 1)[0]; got != 'b' {
		t.Errorf("a rename is durable in one directory only: a begins with %d", got)
	}
	must(t, m.SyncDir("."))
	if names, err := m.CrashClone(disk.CrashOptions{Keep: disk.KeepNone}).List("."); err != nil || !slices.Equal(names, []string{"0", "d", "e"}) {
		t.Errorf("after SyncDir: %v, %v", names, err)
	}
}

// TestCrashForgetsVersionsOnly: of a page written very often not every version is remembered, but no sector is forgotten.
func TestCrashForgetsVersionsOnly(t *testing.T) {
	m := disk.NewMem(disk.MemOptions{})
	f := newFile(t, m, "f", 4096)
	for i := range 8 {
		write(t, f, fill(512, byte(i+1)), int64(i)*512)
	}
	for i := range 40 {
		write(t, f, fill(512, byte(i+10)), 512)
	}
	c := m.CrashClone(disk.CrashOptions{Keep: disk.KeepAll})
	if !bytes.Equal(read(t, open(t, c, "f"), 0, 4096), read(t, f, 0, 4096)) {
		t.Error("a crash that keeps everything lost a sector")
	}
	if got := read(t, open(t, m.CrashClone(disk.CrashOptions{Keep: disk.KeepNone}), "f"), 0, 4096); !bytes.Equal(got, make([]byte, 4096)) {
		t.Error("the durable version was forgotten")
	}
}

// TestFailedSyncDropsPages: reads may go on to see what was written, a later Sync succeeds, and yet the power takes it away; unless the page is
// written to again, which takes all of it along.
func TestFailedSyncDropsPages(t *testing.T) {
	seenAndLost, gone := 0, 0
	for seed := range uint64(60) {
		m := disk.NewMem(disk.MemOptions{Seed: seed})
		f := newFile(t, m, "f", 4096)
		write(t, f, fill(4096, 1), 0)
		m.FailSync("f", 1)
		if f.Sync() == nil {
			t.Fatal("an injected failure did not show")
		}
		must(t, f.Sync())
		seen := read(t, f, 0, 4096)
		medium := read(t, open(t, m.CrashClone(disk.CrashOptions{Keep: disk.KeepAll}), "f"), 0, 4096)
		if !bytes.Equal(seen, medium) {
			seenAndLost++
		} else if seen[0] == 0 {
			gone++
		}
		write(t, f, fill(512, 2), 512)
		now := read(t, f, 0, 4096)
		if !bytes.Equal(now[1024:], seen[1024:]) {
			t.Fatalf("seed %d: a write changed other sectors", seed)
		}
		if got := read(t, open(t, m.CrashClone(disk.CrashOptions{Keep: disk.KeepAll}), "f"), 0, 4096); !bytes.Equal(got, now) {
			t.Fatalf("seed %d: a write after the failed Sync did not take the page along", seed)
		}
	}
	if seenAndLost < 5 || gone < 5 {
		t.Errorf("of 60 failed Syncs %d left pages that only reads see, %d dropped them", seenAndLost, gone)
	}
}

func TestCrashLength(t *testing.T) {
	m := disk.NewMem(disk.MemOptions{})
	f, err := m.Create("f", 100)
	must(t, err)
	must(t, m.SyncDir("."))
	write(t, f, fill(512, 1), 1024)
	sizes := map[int64]bool{}
	outcomes(m, func(c *disk.Mem) {
		n, err := open(t, c, "f").Size()
		must(t, err)
		sizes[n] = true
	})
	if got := slices.Sorted(maps.Keys(sizes)); !slices.Equal(got, []int64{0, 100, 1536}) {
		t.Errorf("lengths after a crash: %v", got)
	}
}

// model is what a test knows of one file: for each sector the contents a crash may leave, the durable one first.
type model [][][]byte

func (s model) set(sector int, b []byte) { s[sector] = append(s[sector], b) }

func (s model) sync() {
	for i := range s {
		s[i] = s[i][len(s[i])-1:]
	}
}

func (s model) check(t *testing.T, f disk.File, op string) {
	t.Helper()
	b := read(t, f, 0, len(s)*512)
	for i, versions := range s {
		got := b[i*512 : (i+1)*512]
		if !slices.ContainsFunc(versions, func(v []byte) bool { return bytes.Equal(v, got) }) {
			t.Fatalf("%s: sector %d begins with %d and is none of its %d versions", op, i, got[0], len(versions))
		}
	}
}

// TestCrashHistories writes, punches, reserves, syncs and fails at random, takes crash clones at every change, and compares each
// sector with its history. It also adds the blocks up again.
func TestCrashHistories(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 2))
	const pages = 12
	points, lost, kept := 0, 0, 0
	for range steps(t, 30) {
		m := disk.NewMem(disk.MemOptions{Seed: r.Uint64(), CapacityBytes: (pages + 2) * 4096})
		f := newFile(t, m, "f", pages*4096)
		s := make(model, pages*8)
		for i := range s {
			s.set(i, make([]byte, 512))
		}
		m.OnOp(func(op disk.Op) {
			points++
			c := m.CrashClone(disk.CrashOptions{Rand: r})
			g := open(t, c, "f")
			s.check(t, g, op.String())
			checkUsage(t, c)
			if bytes.Equal(read(t, g, 0, pages*4096), read(t, f, 0, pages*4096)) {
				kept++
			} else {
				lost++
			}
			k := open(t, m.Clone(), "f")
			if !bytes.Equal(read(t, k, 0, pages*4096), read(t, f, 0, pages*4096)) {
				t.Fatalf("%s: kill -9 lost something", op)
			}
		})
		for i := range 40 {
			off, n := r.IntN(pages*8), 0
			n = 1 + r.IntN(min(24, pages*8-off))
			switch r.IntN(8) {
			case 0:
				must(t, f.Sync())
				s.sync()
			case 1:
				must(t, f.Reserve(int64(off*512), int64(n*512)))
			case 2, 3:
				must(t, f.Punch(int64(off*512), int64(n*512)))
				for j := range n {
					s.set(off+j, make([]byte, 512))
				}
			default:
				b := fill(n*512, byte(i+1))
				write(t, f, b, int64(off*512))
				for j := range n {
					s.set(off+j, b[:512])
				}
			}
		}
		m.FailSync("f", 1)
		if err := f.Sync(); err == nil {
			t.Fatal("an injected failure did not show")
		}
		m.OnOp(nil)
		dropped := m.CrashClone(disk.CrashOptions{Keep: disk.KeepNone})
		s.check(t, f, "failed sync")
		must(t, f.Sync()) // a later one that succeeds brings nothing back
		again := m.Crash(disk.CrashOptions{Keep: disk.KeepNone})
		if !bytes.Equal(read(t, open(t, dropped, "f"), 0, pages*4096), read(t, open(t, again, "f"), 0, pages*4096)) {
			t.Fatal("a Sync after a failed one made dropped pages durable")
		}
	}
	t.Logf("%d crash points, %d lost something", points, lost)
	if lost == 0 || kept == 0 {
		t.Errorf("%d crashes lost something, %d kept all: the dice are loaded", lost, kept)
	}
}

// checkUsage adds up what the files occupy and compares with what the file system says.
func checkUsage(t testing.TB, m *disk.Mem) {
	t.Helper()
	total, free, err := m.Usage()
	must(t, err)
	names, err := m.List(".")
	must(t, err)
	var used int64
	for _, name := range names {
		info, err := m.Stat(name)
		must(t, err)
		used += info.AllocatedBytes
	}
	if used > total || total-free != used {
		t.Fatalf("files occupy %d bytes, %d of %d are free", used, free, total)
	}
}

func TestFullDisk(t *testing.T) {
	m := disk.NewMem(disk.MemOptions{CapacityBytes: 16 * 4096})
	f := newFile(t, m, "f", 1<<20)
	must(t, f.Reserve(0, 8*4096))
	n, err := f.WriteAt(fill(16*4096, 1), 4*4096)
	if n != 12*4096 || !errors.Is(err, disk.ErrNoSpace) {
		t.Fatalf("a write into a disk that gets full: %d, %v", n, err)
	}
	write(t, f, fill(8*4096, 2), 0) // reserved or written: cannot fail
	must(t, f.Sync())
	must(t, f.Punch(0, 4*4096))
	write(t, f, fill(4*4096, 3), 20*4096) // what was punched is free again, although not synced
	must(t, f.Punch(20*4096, 4096))
	g := newFile(t, m, "g", 1<<20)
	if err := g.Reserve(0, 2*4096); !errors.Is(err, disk.ErrNoSpace) {
		t.Errorf("Reserve of more than there is: %v", err)
	}
	checkUsage(t, m)
	must(t, m.Remove("f"))
	if _, err := g.WriteAt(fill(4*4096, 1), 0); !errors.Is(err, disk.ErrNoSpace) {
		t.Errorf("space of an open file was given out: %v", err)
	}
	must(t, f.Close())
	write(t, g, fill(16*4096, 4), 0)
	checkUsage(t, m)
	c := m.Crash(disk.CrashOptions{Keep: disk.KeepNone})
	checkUsage(t, c)
	if ok, err := disk.Exists(c, "f"); ok || err != nil {
		t.Errorf("a removed file came back after its space was used: %v, %v", ok, err)
	}
}

func TestFailOptions(t *testing.T) {
	m := disk.NewMem(disk.MemOptions{})
	f, g := newFile(t, m, "one.x", 4096), newFile(t, m, "two.y", 4096)
	mine := errors.New("mine")
	m.Fail(disk.FailOptions{Kind: disk.OpWrite, Pattern: "*.x", Nth: 2, Times: 2, Err: mine})
	var failed []int
	for i := range 5 {
		write(t, g, fill(1, 1), 0)
		if _, err := f.WriteAt(fill(1, 1), 0); err != nil {
			if !errors.Is(err, mine) {
				t.Fatal(err)
			}
			failed = append(failed, i)
		}
	}
	if !slices.Equal(failed, []int{1, 2}) {
		t.Errorf("writes %v failed, want 1 and 2", failed)
	}
	m.Fail(disk.FailOptions{Kind: disk.OpCreate, Times: -1})
	for range 2 {
		if _, err := m.Create("three", 0); err == nil {
			t.Error("Create did not fail")
		}
	}
	m.ClearFaults()
	newFile(t, m, "three", 0)
}

func TestKillProcess(t *testing.T) {
	m := disk.NewMem(disk.MemOptions{})
	f := newFile(t, m, "f", 4096)
	must(t, f.Lock())
	write(t, f, fill(4096, 1), 0)
	m.KillProcess()
	if _, err := f.WriteAt(fill(1, 1), 0); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("a dead process wrote: %v", err)
	}
	g := open(t, m, "f")
	must(t, g.Lock())
	if !bytes.Equal(read(t, g, 0, 4096), fill(4096, 1)) {
		t.Error("kill -9 lost a write")
	}
	if got := read(t, open(t, m.Crash(disk.CrashOptions{Keep: disk.KeepNone}), "f"), 0, 1)[0]; got != 0 {
		t.Error("kill -9 made a write durable")
	}
}

// TestCloneIsApart checks that a clone and its original do not see each other's changes, names and unsynced state included.
func TestCloneIsApart(t *testing.T) {
	m := disk.NewMem(disk.MemOptions{CapacityBytes: 1 << 20})
	f := newFile(t, m, "f", 8192)
	write(t, f, fill(8192, 1), 0)
	must(t, m.Mkdir("d"))
	must(t, m.Rename("f", "d/f"))
	c := m.Clone()
	g := open(t, c, "d/f")
	write(t, f, fill(4096, 2), 0)
	write(t, g, fill(4096, 3), 4096)
	must(t, f.Sync())
	if got := read(t, g, 0, 8192); got[0] != 1 || got[4096] != 3 {
		t.Errorf("the clone begins its pages with %d, %d", got[0], got[4096])
	}
	if got := read(t, f, 0, 8192); got[0] != 2 || got[4096] != 1 {
		t.Errorf("the original begins its pages with %d, %d", got[0], got[4096])
	}
	must(t, m.SyncDir("."))
	after := c.Crash(disk.CrashOptions{Keep: disk.KeepNone})
	if got := read(t, open(t, after, "f"), 0, 1)[0]; got != 0 {
		t.Errorf("what the original synced is durable in the clone")
	}
	if got := read(t, open(t, m.Crash(disk.CrashOptions{Keep: disk.KeepNone}), "d/f"), 0, 1)[0]; got != 2 {
		t.Errorf("the original lost a synced page: %d", got)
	}
}

// TestHookMayCrash cuts the power from within the hook, concurrently with other changes.
func TestHookMayCrash(t *testing.T) {
	m := disk.NewMem(disk.MemOptions{})
	f := newFile(t, m, "f", 1<<20)
	var once sync.Once
	m.OnOp(func(op disk.Op) {
		if op.Seq > 50 {
			once.Do(func() { m.Crash(disk.CrashOptions{Rand: rand.New(rand.NewPCG(1, 2))}) })
		}
	})
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for {
				if _, err := f.WriteAt(fill(4096, 1), int64(w)*4096); err != nil {
					if !errors.Is(err, disk.ErrPower) {
						t.Error(err)
					}
					return
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkMemWrite4K(b *testing.B) {
	m := disk.NewMem(disk.MemOptions{})
	f := newFile(b, m, "f", 8<<40)
	buf := fill(4096, 1)
	for i := 0; b.Loop(); i++ {
		write(b, f, buf, int64(i%4096)*4096)
	}
}

func BenchmarkMemCrashClone(b *testing.B) {
	m := disk.NewMem(disk.MemOptions{})
	f := newFile(b, m, "f", 8<<40)
	write(b, f, fill(1<<20, 1), 0)
	must(b, f.Sync())
	write(b, f, fill(64<<10, 2), 0)
	r := rand.New(rand.NewPCG(1, 2))
	for b.Loop() {
		m.CrashClone(disk.CrashOptions{Rand: r})
	}
}
