//go:build integration

package testbed_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"ashlar/internal/testbed"
)

// diary is one writer's outside log across power cuts: what every unit held when it began, every write that was sent since, and how far they were flushed.
type diary struct {
	volume, socket string
	rng            *rand.Rand

	mu      sync.Mutex // guards the rest
	base    [][]byte   // by unit
	sent    [][]uint64 // by unit, in order
	acked   []uint64   // by unit: the newest write that was acknowledged
	durable []uint64   // by unit: the newest write that was acknowledged before a flush that was acknowledged too began
	next    uint64
	flushes int
}

const diaryUnits = 2048 // of 4 KiB each

// content is what write seq puts into a unit; every seventh write is a discard.
func (d *diary) content(unit int, seq uint64) []byte {
	p := make([]byte, unitBytes)
	if seq%7 == 3 {
		return p
	}
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], seq)
	binary.LittleEndian.PutUint64(seed[8:], uint64(unit))
	copy(seed[16:], d.volume)
	rand.NewChaCha8(seed).Read(p)
	return p
}

// step sends one write or discard of one to eight units, and now and then a flush.
func (d *diary) step(c *client) error {
	d.mu.Lock()
	n := 1 + d.rng.IntN(8)
	first := d.rng.IntN(diaryUnits - n)
	d.next++
	seq := d.next
	var p []byte
	for u := first; u < first+n; u++ {
		d.sent[u] = append(d.sent[u], seq)
		p = append(p, d.content(u, seq)...)
	}
	flush := d.rng.IntN(12) == 0
	d.mu.Unlock()

	var err error
	if off := int64(first) * unitBytes; seq%7 == 3 {
		err = c.do(nbdTrim, off, nil, uint32(len(p)))
	} else {
		err = c.write(off, p)
	}
	if err != nil {
		return err
	}
	d.mu.Lock()
	for u := first; u < first+n; u++ {
		d.acked[u] = seq
	}
	upTo := slices.Clone(d.acked)
	d.mu.Unlock()
	if !flush {
		return nil
	}
	if err := c.flush(); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.durable = upTo
	d.flushes++
	return nil
}

// write works until the power goes.
func (d *diary) write(ctx context.Context, c *client) error {
	for ctx.Err() == nil {
		if err := d.step(c); err != nil {
			if errors.Is(err, errNBD) {
				return err
			}
			return nil
		}
	}
	return nil
}

// verify reads every unit after a power cut: each sector must be as of a write that was sent, and not of one before what was durable. What is found begins the
// next time.
func (d *diary) verify(c *client, durable []uint64) (lost, kept int, err error) {
	got := make([]byte, unitBytes)
	for u := range diaryUnits {
		if err := c.read(int64(u)*unitBytes, got); err != nil {
			return 0, 0, err
		}
		var allowed [][]byte
		if durable[u] == 0 {
			allowed = append(allowed, d.base[u])
		}
		for _, seq := range d.sent[u] {
			if seq >= durable[u] {
				allowed = append(allowed, d.content(u, seq))
			}
		}
		for s := 0; s < unitBytes; s += 512 {
			fits := func(p []byte) bool { return bytes.Equal(got[s:s+512], p[s:s+512]) }
			if !slices.ContainsFunc(allowed, fits) {
				return 0, 0, fmt.Errorf("volume %s, unit %d, sector at %d: it is %s, and none of the writes since %d, which was flushed: %w", d.volume, u, s, d.tell(u, s, got), durable[u], errLost)
			}
		}
		if n := len(d.sent[u]); n > 0 && d.acked[u] == d.sent[u][n-1] && durable[u] != d.acked[u] {
			if bytes.Equal(got, allowed[len(allowed)-1]) {
				kept++
			} else {
				lost++
			}
		}
		d.base[u] = slices.Clone(got)
		d.sent[u] = nil
	}
	d.acked, d.durable = make([]uint64, diaryUnits), make([]uint64, diaryUnits)
	return lost, kept, nil
}

// tell says what a sector holds instead of what it should.
func (d *diary) tell(u, s int, got []byte) string {
	sector := got[s : s+512]
	if bytes.Equal(sector, d.base[u][s:s+512]) {
		return "as at the beginning"
	}
	for _, seq := range d.sent[u] {
		if bytes.Equal(sector, d.content(u, seq)[s:s+512]) {
			return fmt.Sprintf("write %d of %v", seq, d.sent[u])
		}
	}
	if bytes.Count(sector, []byte{0}) == len(sector) {
		return fmt.Sprintf("zeros, of %v", d.sent[u])
	}
	return fmt.Sprintf("none of %v", d.sent[u])
}

// otherBoots has programs started through what program then is see another boot of the machine than others: they run in a mount namespace where the kernel's boot id is
// a file. What it returns begins a boot. (On the boot that wrote it, a node trusts the page cache; that is not what is tested here.)
func otherBoots(t *testing.T, dir string) (boot func(n int)) {
	t.Helper()
	id, script, real := filepath.Join(dir, "boot_id"), filepath.Join(dir, "ashlar"), program
	text := "#!/bin/sh\nexec unshare -m --propagation private /bin/sh -c 'mount --bind " + id + " /proc/sys/kernel/random/boot_id && exec \"$0\" \"$@\"' " + real + " \"$@\"\n"
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	program = script
	t.Cleanup(func() { program = real })
	return func(n int) {
		if err := os.WriteFile(id, []byte(fmt.Sprintf("%08x-0000-4000-8000-000000000000\n", n)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestPowerCut cuts the power: the file system with everything of a node on it lies in a file, which is cloned at one instant under load, and put in the original's
// place after all processes were killed. So all that the node had not flushed, and its page cache still had, is gone; what was flushed must be there, for guests
// and for the catalogue, and the node starts without help.
func TestPowerCut(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	dir := scratch(t)
	outer, data := filepath.Join(dir, "outer"), filepath.Join(dir, "data")
	mountNew(t, dir, outer, "3G", "mkfs.xfs", "-q", "-m", "reflink=1")
	m := &bed{T: t, ctx: t.Context(), dir: dir}
	image := filepath.Join(outer, "0.img")
	m.tool("mkfs.ext4", "-q", "-F", image, "512M")
	if err := os.MkdirAll(data, 0o700); err != nil {
		t.Fatal(err)
	}
	m.tool("mount", "-o", "loop", image, data)
	mounted := true
	t.Cleanup(func() {
		if mounted {
			m.ctx = context.Background()
			m.tool("umount", data)
		}
	})
	boot := otherBoots(t, dir)
	boot(0)
	b := startIn(t, dir)
	var diaries []*diary
	for n, v := range []string{"one", "two"} {
		b.cli("volume", "create", v, "--size", "32Mi")
		b.attach(v)
		d := &diary{volume: v, socket: b.socket(v), rng: rand.New(rand.NewPCG(seed, uint64(n))), sent: make([][]uint64, diaryUnits), acked: make([]uint64, diaryUnits), durable: make([]uint64, diaryUnits)}
		for range diaryUnits {
			d.base = append(d.base, make([]byte, unitBytes))
		}
		diaries = append(diaries, d)
	}
	snapshots := map[string]bool{}
	gone := 0
	for round := range 5 {
		ctx, cancel := context.WithCancel(b.ctx)
		var wg sync.WaitGroup
		failed := make(chan error, len(diaries))
		for _, d := range diaries {
			c := b.dial(d.volume)
			wg.Go(func() { failed <- d.write(ctx, c); c.close() })
		}
		wrote := func() (n uint64) {
			for _, d := range diaries {
				d.mu.Lock()
				n += d.next
				d.mu.Unlock()
			}
			return n
		}
		had := wrote()
		b.until(20*time.Second, "writes", func() bool { return wrote() > had+1500 })
		name := fmt.Sprintf("r%d", round)
		b.cli("snapshot", "create", "one", name)
		snapshots[name] = true
		b.cli("volume", "create", "v"+name, "--size", "10Mi")
		b.until(20*time.Second, "more writes", func() bool { return wrote() > had+3000+uint64(round)*111 })

		var durable [][]uint64
		for _, d := range diaries {
			d.mu.Lock()
			durable = append(durable, slices.Clone(d.durable))
			d.mu.Unlock()
		}
		next := filepath.Join(outer, fmt.Sprintf("%d.img", round+1))
		b.tool("cp", "--reflink=always", image, next) // the power goes
		cancel()
		b.crash()
		wg.Wait()
		for range diaries {
			if err := <-failed; err != nil {
				t.Error(err)
			}
		}
		b.until(10*time.Second, "nobody uses the file system", func() bool { return syscall.Unmount(data, 0) == nil })
		mounted = false
		if err := os.Remove(image); err != nil {
			t.Fatal(err)
		}
		image = next
		b.tool("mount", "-o", "loop", image, data)
		mounted = true

		boot(round + 1)
		start := time.Now()
		if err := b.p.StartServe(b.ctx); err != nil {
			t.Fatal(err)
		}
		lost, kept := 0, 0
		for n, d := range diaries {
			c := b.dial(d.volume)
			l, k, err := d.verify(c, durable[n])
			if err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
			lost, kept = lost+l, kept+k
			c.close()
		}
		gone += lost
		b.Logf("power cut %d: %d ms to everything read back; of what was acknowledged and not flushed %d units were lost and %d kept, of what was flushed none was lost", round,
			time.Since(start).Milliseconds(), lost, kept)
		have := b.snapshots("one")
		for name := range snapshots {
			if _, ok := have[name]; !ok {
				t.Errorf("snapshot %s, which was acknowledged, is gone: %v", name, have)
			}
			b.volume("v" + name)
		}
		b.clean("one", "two")
	}
	if gone == 0 { // then the page cache was written out each time, and what was flushed would be there without a flush, too
		t.Error("no power cut lost anything: they were none")
	}
	flushes := 0
	for _, d := range diaries {
		flushes += d.flushes
	}
	t.Logf("%d power cuts, %d writes and discards, %d flushes", 5, diaries[0].next+diaries[1].next, flushes)
	if left := users(data); len(left) == 0 {
		t.Error("nobody uses the disk")
	}
	if err := testbed.Until(b.ctx, 10*time.Second, func() (bool, error) { return b.volume("one").State == "attached", nil }); err != nil {
		t.Error(err)
	}
}
