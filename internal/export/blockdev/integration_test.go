//go:build integration

package blockdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ashlar/internal/block"
)

// steps multiplies the heavier loops.
func steps(t *testing.T, n int) int {
	t.Helper()
	if s := os.Getenv("ASHLAR_STEPS"); s != "" {
		k, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		n *= k
	}
	return n
}

// add adds volume and has it removed at the test's end.
func (b *bed) add(f *Frontend, volume string, dev block.Device, o Options) string {
	b.t.Helper()
	path, err := f.Add(b.t.Context(), volume, dev, o)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		if err := f.Remove(context.Background(), volume); err != nil {
			b.t.Errorf("%v\n%s", err, b.command("losetup", "-l"))
		}
	})
	return path
}

// mount mounts dev and returns where.
func (b *bed) mount(dev string, options ...string) string {
	b.t.Helper()
	at := filepath.Join(b.dir, "mnt")
	if err := os.MkdirAll(at, 0o700); err != nil {
		b.t.Fatal(err)
	}
	b.command("mount", append(options, dev, at)...)
	b.t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
	return at
}

// gone fails the test if a mount, loop device or link of volume is left.
func (b *bed) gone(f *Frontend, volume string) {
	b.t.Helper()
	if n, err := mountedAt(f.mountPath(volume)); n != 0 || err != nil {
		b.t.Errorf("%d mounts left, %v", n, err)
	}
	if devs, err := loopsOn(f.mountPath(volume)); len(devs) != 0 || err != nil {
		b.t.Errorf("loop devices left: %v, %v", devs, err)
	}
	for _, path := range []string{f.Path(volume), f.mountPath(volume)} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			b.t.Errorf("%s is left: %v", path, err)
		}
	}
	if b.keeper.holds(heldName(volume)) {
		b.t.Error("its descriptor is still held")
	}
}

// aligned returns n bytes that direct I/O takes.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	off := int(-uintptr(unsafe.Pointer(&b[0])) & 4095)
	return b[off : off+n : off+n]
}

func ioctlRange(f *os.File, req uintptr, off, n int64) error {
	r := [2]uint64{uint64(off), uint64(n)}
	_, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), req, uintptr(unsafe.Pointer(&r)))
	if e != 0 {
		return e
	}
	return nil
}

const (
	blkDiscard = 0x1277
	blkZeroOut = 0x127f
)

// TestModel does random I/O through the loop device, directly, against a plain byte slice, on sizes of all kinds.
func TestModel(t *testing.T) {
	for _, size := range []int64{16 << 20, 16<<20 + 512*3, 4<<20 + 4096 + 100} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			b := newBed(t)
			f := b.frontend()
			path := b.add(f, "model", b.device(b.file("disk", size)), Options{})
			d, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			end, err := d.Seek(0, 2)
			if err != nil || end != size/512*512 {
				t.Fatalf("the device has %d bytes, %v; the file %d", end, err, size)
			}
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			rnd, model, p := rand.New(rand.NewPCG(seed, 0)), make([]byte, end), aligned(2<<20)
			for range steps(t, 400) {
				n := (rnd.Int64N(1<<rnd.IntN(13)) + 1) * 512
				n = min(n, end)
				off := rnd.Int64N(end/512-n/512+1) * 512
				step(t, rnd, d, model, p, off, n)
			}
			if got := readAll(t, path, end); !bytes.Equal(got, model) {
				t.Error("the device differs from the model at the end")
			}
			if s := f.Stats()["model"]; s.Reads == 0 || s.Writes == 0 || s.Zeroes == 0 || s.Flushes == 0 || s.Errors != 0 {
				t.Errorf("stats: %+v", s)
			}
		})
	}
}

// step does one random thing to d and model.
func step(t *testing.T, rnd *rand.Rand, d *os.File, model, p []byte, off, n int64) {
	t.Helper()
	q := p[:min(n, int64(len(p)))]
	n = int64(len(q))
	var err error
	switch rnd.IntN(8) {
	case 0, 1, 2:
		for i := range q {
			q[i] = byte(rnd.Uint32())
		}
		_, err = d.WriteAt(q, off)
		copy(model[off:], q)
	case 3, 4, 5:
		_, err = d.ReadAt(q, off)
		if !bytes.Equal(q, model[off:off+n]) {
			t.Fatalf("read of %d bytes at %d differs", n, off)
		}
	case 6:
		req := uintptr(blkDiscard)
		if rnd.IntN(2) == 0 {
			req = blkZeroOut
		}
		err = ioctlRange(d, req, off, n)
		clear(model[off : off+n])
	case 7:
		err = d.Sync()
	}
	if err != nil {
		t.Fatalf("%d bytes at %d: %v", n, off, err)
	}
}

func readAll(t *testing.T, path string, n int64) []byte {
	t.Helper()
	d, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	p := aligned(int(n))
	if _, err := d.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// fileSystems are what is made, checked and grown on the device.
var fileSystems = []struct{ name, mkfs, check, grow, offline string }{
	{"ext4", "mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 DEV", "e2fsck -fn DEV", "resize2fs DEV", "e2fsck -fp DEV"},
	{"xfs", "mkfs.xfs -q DEV", "xfs_repair -n DEV", "xfs_growfs MNT", ""},
}

func (b *bed) shell(line, dev, mnt string) string {
	b.t.Helper()
	words := strings.Fields(strings.NewReplacer("DEV", dev, "MNT", mnt).Replace(line))
	return b.command(words[0], words[1:]...)
}

func used(t testing.TB, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// TestFileSystems makes, mounts, trims, grows while mounted, and checks each file system; the device refuses to go while it is mounted.
func TestFileSystems(t *testing.T) {
	for _, fs := range fileSystems {
		t.Run(fs.name, func(t *testing.T) {
			b := newBed(t)
			f := b.frontend()
			file := b.file("disk", 400<<20)
			dev := b.device(file)
			gate := block.NewGate(dev)
			path := b.add(f, "fs", gate, Options{})
			b.shell(fs.mkfs, path, "")
			at := b.mount(path)
			b.command("dd", "if=/dev/urandom", "of="+at+"/big", "bs=1M", "count=100", "conv=fsync", "status=none")
			if err := f.Remove(t.Context(), "fs"); !errors.Is(err, ErrBusy) {
				t.Fatalf("removing a mounted device: %v", err)
			}
			full := used(t, file)
			os.Remove(at + "/big")
			b.trims(at, file, full-90<<20)
			growGate(t, gate, b.device(grown(t, file, 800<<20)))
			if err := f.Resize(t.Context(), "fs"); err != nil {
				t.Fatal(err)
			}
			if ok, _ := hasCapability(unix.CAP_SYS_RESOURCE); !ok && fs.offline != "" {
				t.Log("without CAP_SYS_RESOURCE it grows only while it is not mounted")
				b.command("umount", at)
				b.shell(fs.offline, path, "")
				b.shell(fs.grow, path, "")
				at = b.mount(path)
			} else {
				b.shell(fs.grow, path, at)
			}
			b.command("dd", "if=/dev/urandom", "of="+at+"/bigger", "bs=1M", "count=500", "conv=fsync", "status=none")
			b.command("umount", at)
			b.shell(fs.check, path, "")
		})
	}
}

// trims runs fstrim until the disk's file takes at most n bytes: a file system frees in the background what was deleted.
func (b *bed) trims(at, file string, n int64) {
	b.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; {
		b.command("sync", "-f", at)
		b.command("fstrim", at)
		have := used(b.t, file)
		if have <= n {
			return
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("after fstrim the disk takes %d bytes, more than %d", have, n)
		}
	}
}

func grown(t *testing.T, file string, n int64) string {
	t.Helper()
	if err := os.Truncate(file, n); err != nil {
		t.Fatal(err)
	}
	return file
}

func growGate(t *testing.T, g *block.Gate, next block.Device) {
	t.Helper()
	if err := g.Hold(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.Swap(next)
	g.Release()
}

// fioVerify starts fio, which writes every block of dev once with random sizes, at a rate that gives it the seconds, reads it back and compares.
func (b *bed) fioVerify(dev string, seconds int) *exec.Cmd {
	b.t.Helper()
	const bytes = 96 << 20
	cmd := exec.Command("fio", "--name=v", "--filename="+dev, "--direct=1", "--ioengine=libaio", "--iodepth=16", "--rw=randwrite",
		"--bssplit=4k/70:16k/20:256k/10", "--size="+strconv.Itoa(bytes), "--rate="+strconv.Itoa(bytes/seconds), "--verify=crc32c", "--verify_fatal=1",
		"--fsync=32", "--do_verify=1", "--output-format=terse", "--randrepeat=0", "--norandommap=0")
	cmd.Dir = b.dir
	return cmd
}

// TestFioVerifyAcrossKills kills the serving process again and again under fio, which notices nothing.
func TestFioVerifyAcrossKills(t *testing.T) {
	b := newBed(t)
	b.needsResend()
	file := b.file("disk", 128<<20)
	c := b.start("vol", file)
	cmd := b.fioVerify(filepath.Join(b.devs, "vol"), 5)
	out := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kills, err := b.killUntil(&c, file, cmd.Wait)
	if err != nil {
		t.Errorf("fio: %v\n%s", err, out)
	}
	if kills < 10 {
		t.Errorf("only %d kills while fio ran", kills)
	}
	t.Logf("%d kills", kills)
	c.handOver()
	b.remove("vol")
}

// killUntil kills the server every 250 ms, and starts another at once, until done returns.
func (b *bed) killUntil(c **child, file string, done func() error) (kills int, err error) {
	b.t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- done() }()
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(2 * time.Minute)
	for {
		select {
		case err := <-ended:
			return kills, err
		case <-limit:
			b.t.Fatal("it hangs")
		case <-tick.C:
			(*c).kill()
			kills++
			*c = b.start("vol", file)
		}
	}
}

// remove takes away what a server that is gone left with the keeper.
func (b *bed) remove(volume string) {
	b.t.Helper()
	f := b.frontend()
	if err := f.Remove(b.t.Context(), volume); err != nil {
		b.t.Error(err)
	}
	b.gone(f, volume)
}

func (b *bed) needsResend() {
	b.t.Helper()
	if !b.frontend().Resends() {
		b.t.Skip("this kernel cannot send requests again (needs 6.9): killing the server is EIO here")
	}
}

// TestMountedAcrossKills kills the server under a mounted ext4 with a workload, at least ten times.
func TestMountedAcrossKills(t *testing.T) {
	b := newBed(t)
	b.needsResend()
	file := b.file("disk", 256<<20)
	c := b.start("vol", file)
	path := filepath.Join(b.devs, "vol")
	b.shell(fileSystems[0].mkfs, path, "")
	at := b.mount(path, "-o", "errors=remount-ro,discard")
	// In a process of its own: a child of this one that is to become the server would inherit the workload's files, and wait for the device to close them.
	cmd := exec.Command(os.Args[0], "workload", at, "4s")
	out := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kills, err := b.killUntil(&c, file, cmd.Wait)
	if err != nil {
		t.Errorf("workload: %v\n%s", err, out)
	}
	if kills < 10 {
		t.Errorf("only %d kills", kills)
	}
	t.Logf("%d kills", kills)
	b.command("umount", at)
	b.shell(fileSystems[0].check, path, "")
	c.handOver()
	b.remove("vol")
}

// TestHandOver passes the device from process to process under fio.
func TestHandOver(t *testing.T) {
	b := newBed(t)
	file := b.file("disk", 128<<20)
	c := b.start("vol", file)
	cmd := b.fioVerify(filepath.Join(b.devs, "vol"), 2)
	out := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var longest time.Duration
	times := 0
	for done := false; !done; {
		select {
		case err := <-ended:
			if done = true; err != nil {
				t.Errorf("fio: %v\n%s", err, out)
			}
		case <-time.After(200 * time.Millisecond):
			begin := time.Now()
			c.handOver()
			c = b.start("vol", file)
			longest = max(longest, time.Since(begin))
			times++
		}
	}
	if times < 5 {
		t.Errorf("only %d hand-overs", times)
	}
	t.Logf("%d hand-overs, the longest in %v with the start of a process", times, longest)
	c.handOver()
	b.remove("vol")
}
