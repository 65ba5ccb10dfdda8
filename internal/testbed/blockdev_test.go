//go:build integration

package testbed_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/testbed"
)

// newBlockBed starts a node whose volumes become block devices; in the end no mount, loop device or link of it may be left.
func newBlockBed(t *testing.T) *bed {
	dir := scratch(t)
	noDevicesLeft(t, dir)
	return startIn(t, dir)
}

// noDevicesLeft registers the last look at what a node leaves on the host, after the node was stopped; what is left is taken away.
func noDevicesLeft(t *testing.T, dir string) {
	t.Cleanup(func() {
		for _, line := range mountsBelow(dir) {
			t.Errorf("a mount is left: %s", line)
			unix.Unmount(line, unix.MNT_DETACH)
		}
		files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
		for _, file := range files {
			if text, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(text), dir+"/") {
				dev := "/dev/" + strings.Split(file, "/")[3]
				t.Errorf("a loop device is left: %s on %s", dev, text)
				exec.Command("losetup", "-d", dev).Run()
			}
		}
		// The directory of this node's links, docs/formats/blockdev.md.
		sum := sha256.Sum256([]byte(filepath.Join(dir, "run")))
		links := "/dev/ashlar-" + hex.EncodeToString(sum[:4])
		if err := os.Remove(links); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("links are left: %v", err)
			os.RemoveAll(links)
		}
	})
}

// mountsBelow are the mounts below a directory, the newest first.
func mountsBelow(dir string) (out []string) {
	text, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(text)) {
		if words := strings.Fields(line); len(words) > 1 && strings.HasPrefix(words[1], dir+"/") {
			out = append(out, words[1])
		}
	}
	slices.Reverse(out)
	return out
}

// blockdev makes a volume that is a block device, attaches it and returns the device's path.
func (b *bed) blockdev(name, size string) string {
	b.Helper()
	b.cli("volume", "create", name, "--size", size, "--frontend", "blockdev")
	return b.attachDev(name)
}

func (b *bed) attachDev(name string) string {
	b.Helper()
	var v volumeView
	b.json(&v, "volume", "attach", name)
	path := v.Controllers[0].Endpoint
	if v.State != "attached" || filepath.Base(path) != name || !strings.HasPrefix(path, "/dev/ashlar") {
		b.Fatalf("volume %s after attach: %+v", name, v)
	}
	return path
}

// mountDev mounts a device on a directory of the test's, until unmounted or the test ends.
func (b *bed) mountDev(dev, name string, options ...string) string {
	b.Helper()
	at := b.path(name)
	if err := os.MkdirAll(at, 0o700); err != nil {
		b.Fatal(err)
	}
	b.tool("mount", append(options, dev, at)...)
	b.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
	return at
}

// random writes a file of random bytes and syncs it.
func (b *bed) random(path string, size int, seed byte) {
	b.Helper()
	if err := writeSynced(path, size, seed); err != nil {
		b.Fatal(err)
	}
}

// holds wants a file to be what random wrote.
func (b *bed) holds(path string, size int, seed byte) {
	b.Helper()
	p := make([]byte, size)
	rand.NewChaCha8([32]byte{seed}).Read(p)
	got, err := os.ReadFile(path)
	if err != nil || sha256.Sum256(got) != sha256.Sum256(p) {
		b.Errorf("%s: %d bytes that are not the %d written, %v", path, len(got), size, err)
	}
}

// canGrowMounted: resize2fs on a mounted ext4 needs CAP_SYS_RESOURCE (ext4's ioctl EXT4_IOC_RESIZE_FS), bit 24 of the effective set.
func canGrowMounted(b *bed) bool {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	_, line, _ := strings.Cut(string(text), "CapEff:")
	line, _, _ = strings.Cut(line, "\n")
	n, err := strconv.ParseUint(strings.TrimSpace(line), 16, 64)
	if err != nil {
		b.Fatal(err)
	}
	return n&(1<<24) != 0
}

// fileSystem is how one is made, checked, grown, and how a copy of one that is mounted is mounted.
type fileSystem struct {
	name              string
	mkfs, check, grow []string
	copyOptions       string
}

var (
	ext4 = fileSystem{"ext4", []string{"mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"}, []string{"e2fsck", "-fn"}, []string{"resize2fs"}, "loop"}
	xfs  = fileSystem{"xfs", []string{"mkfs.xfs", "-q", "-f"}, []string{"xfs_repair", "-n"}, []string{"xfs_growfs"}, "loop,nouuid"}
)

func (b *bed) on(dev string, command []string) {
	b.Helper()
	b.tool(command[0], append(slices.Clone(command[1:]), dev)...)
}

// TestBlockdevFileSystems lives with ext4 and xfs on a block device: made, written, trimmed, grown, in a snapshot while mounted, gone back to, checked.
func TestBlockdevFileSystems(t *testing.T) {
	b := newBlockBed(t)
	for _, fs := range []fileSystem{ext4, xfs} {
		b.sub(fs.name, func(b *bed) { b.fileSystemLife(fs) })
	}
}

func (b *bed) fileSystemLife(fs fileSystem) {
	dev := b.blockdev(fs.name, "320Mi")
	b.on(dev, fs.mkfs)
	at := b.mountDev(dev, "mnt")
	b.random(at+"/stays", 10*mib, 1)
	b.random(at+"/goes", 100*mib, 2)
	full := b.onDisk(b.disk())
	if err := os.Remove(at + "/goes"); err != nil {
		b.Fatal(err)
	}
	var left int64
	b.until(20*time.Second, "fstrim frees what was deleted", func() bool { // a file system deletes in the background
		b.tool("sync", "-f", at)
		b.tool("fstrim", at)
		left = b.onDisk(b.disk())
		return left <= full-95*mib
	})
	b.Logf("100 MiB deleted: %d MiB on disk before fstrim, %d after", full/mib, left/mib)
	b.growFS(fs, dev, at)
	b.random(at+"/bigger", 400*mib, 3)
	b.snapshotWhileMounted(fs, at)
	b.tool("umount", at)
	b.on(dev, fs.check)
	b.cli("volume", "detach", fs.name)
	if _, err := os.Lstat(dev); !errors.Is(err, os.ErrNotExist) {
		b.Errorf("%s after detach: %v", dev, err)
	}
	b.cli("snapshot", "revert", fs.name, "s")
	dev = b.attachDev(fs.name)
	b.mountDev(dev, "mnt")
	b.holds(at+"/stays", 10*mib, 1)
	b.holds(at+"/unsynced", len(unsynced), 0)
	if _, err := os.Stat(at + "/later"); !errors.Is(err, os.ErrNotExist) {
		b.Errorf("a file from after the snapshot: %v", err)
	}
	b.tool("umount", at)
	b.on(dev, fs.check)
	b.clean(fs.name)
	b.cli("volume", "detach", fs.name)
	b.cli("volume", "delete", fs.name)
}

// growFS expands the volume under a mounted file system, and then the file system.
func (b *bed) growFS(fs fileSystem, dev, at string) {
	b.Helper()
	b.cli("volume", "expand", fs.name, "--size", "640Mi")
	if got := strings.TrimSpace(b.tool("blockdev", "--getsize64", dev)); got != strconv.Itoa(640*mib) {
		b.Errorf("%s has %s bytes after the expansion", dev, got)
	}
	if fs.name == "ext4" && !canGrowMounted(b) {
		b.Log("without CAP_SYS_RESOURCE ext4 grows only while it is not mounted")
		b.tool("umount", at)
		b.repair(dev)
		b.on(dev, fs.grow)
		b.mountDev(dev, "mnt")
	} else if fs.name == "ext4" {
		b.on(dev, fs.grow)
	} else {
		b.on(at, fs.grow)
	}
	b.holds(at+"/stays", 10*mib, 1)
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err != nil || int64(st.Blocks)*st.Bsize < 480*mib {
		b.Errorf("the file system has %d MiB after it was grown, %v", int64(st.Blocks)*st.Bsize/mib, err)
	}
}

var unsynced = make([]byte, 3*mib)

// snapshotWhileMounted takes one right after a file was closed and not synced; a copy of the snapshot has the file.
func (b *bed) snapshotWhileMounted(fs fileSystem, at string) {
	b.Helper()
	rand.NewChaCha8([32]byte{0}).Read(unsynced)
	if err := os.WriteFile(at+"/unsynced", unsynced, 0o600); err != nil {
		b.Fatal(err)
	}
	start := time.Now()
	b.cli("snapshot", "create", fs.name, "s")
	b.Logf("a snapshot under a mounted file system with 3 MiB to write out: %d ms", time.Since(start).Milliseconds())
	b.random(at+"/later", 2*mib, 4)
	b.cli("volume", "export", fs.name, b.path("copy.raw"), "--snapshot", "s", "--format", "raw")
	cp := b.mountDev(b.path("copy.raw"), "copy", "-o", fs.copyOptions)
	b.holds(cp+"/stays", 10*mib, 1)
	b.holds(cp+"/bigger", 400*mib, 3)
	b.holds(cp+"/unsynced", len(unsynced), 0)
	if _, err := os.Stat(cp + "/later"); !errors.Is(err, os.ErrNotExist) {
		b.Errorf("a file from after the snapshot is in it: %v", err)
	}
	b.tool("umount", cp)
	if err := os.Remove(b.path("copy.raw")); err != nil {
		b.Error(err)
	}
}

// TestBlockdevInUse: partitions, and a volume that is mounted is not detached, goes on as if nothing had been said, and goes once it is unmounted.
func TestBlockdevInUse(t *testing.T) {
	b := newBlockBed(t)
	dev := b.blockdev("v", "128Mi")
	b.tool("sh", "-c", `printf 'label: gpt\nstart=2048, size=131072\n' | sfdisk -q "$1"`, "sfdisk", dev)
	loop, err := filepath.EvalSymlinks(dev)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(loop + "p1"); err != nil {
		t.Log("this kernel knows no partition tables; they are told to it")
		b.tool("partx", "-a", loop)
	}
	b.on(loop+"p1", ext4.mkfs)
	at := b.mountDev(loop+"p1", "mnt")
	start := time.Now()
	said := b.refused(exitConflict, []string{"volume v", dev, "mounted", "unmount"}, "volume", "detach", "v")
	t.Logf("refused after %d ms: %s", time.Since(start).Milliseconds(), strings.TrimSpace(said))
	if v := b.volume("v"); v.State != "attached" || v.Controllers[0].Endpoint != dev || v.Error != "" {
		t.Errorf("after a detach that was refused: %+v", v)
	}
	b.random(at+"/file", 4*mib, 5)
	b.cli("snapshot", "create", "v", "s")
	b.cli("volume", "expand", "v", "--size", "256Mi")
	b.refused(exitConflict, []string{"v"}, "shutdown")
	data := b.p.PID("data")
	b.refused(exitConflict, []string{dev, "mounted", "unmount"}, "shutdown", "--force")
	b.until(10*time.Second, "the node is as before", func() bool { return b.volume("v").State == "attached" && b.p.PID("data") == data })
	b.refused(exitConflict, []string{dev, "mounted"}, "volume", "detach", "v", "--force")
	b.cli("volume", "attach", "v")
	b.holds(at+"/file", 4*mib, 5)
	// As a wish, it waits for whoever has it mounted.
	b.cli("volume", "detach", "v", "--no-wait")
	b.until(10*time.Second, "the volume says why it is not detached", func() bool { return strings.Contains(b.volume("v").Error, dev) })
	b.random(at+"/more", 4*mib, 6)
	b.tool("umount", at)
	start = time.Now()
	b.until(20*time.Second, "it is detached", func() bool { return b.volume("v").State == "detached" })
	t.Logf("detached %d ms after it was unmounted", time.Since(start).Milliseconds())
	if _, err := os.Lstat(dev); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s after detach: %v", dev, err)
	}
	b.clean("v")
	// Everything that was written before, between and after the refusals is there, not only in the page cache.
	if loop, err = filepath.EvalSymlinks(b.attachDev("v")); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(loop + "p1"); err != nil {
		b.tool("partx", "-a", loop)
	}
	b.mountDev(loop+"p1", "mnt")
	b.holds(at+"/file", 4*mib, 5)
	b.holds(at+"/more", 4*mib, 6)
	b.tool("umount", at)
	b.cli("volume", "detach", "v")
}

// TestBlockdevClients: QEMU's tools on the block device, and a very large thin one.
func TestBlockdevClients(t *testing.T) {
	b := newBlockBed(t)
	dev := b.blockdev("v", "64Mi")
	golden := b.raw("golden.raw", 64*mib, 70)
	b.tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "host_device", "-t", "none", golden, dev)
	b.tool("qemu-img", "compare", "-f", "raw", "-F", "host_device", golden, dev)
	b.tool("qemu-img", "convert", "-f", "host_device", "-O", "qcow2", dev, b.path("back.qcow2"))
	b.tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", golden, b.path("back.qcow2"))
	for _, cache := range []string{"none", "writeback"} {
		args := []string{"-f", "host_device", "-t", cache, "-d", "unmap"}
		for _, c := range []string{"write -P 1 4096 8192", "write -P 2 512 512", "write -z 1M 1M", "discard 3M 1M", "flush", "read -P 1 4096 8192", "read -P 2 512 512", "read -P 0 1M 1M", "read -P 0 3M 1M"} {
			args = append(args, "-c", c)
		}
		if out, err := b.try("qemu-io", append(args, dev)...); err != nil || strings.Contains(out, "failed") {
			t.Errorf("qemu-io, cache %s: %v\n%s", cache, err, out)
		}
	}
	b.cli("volume", "detach", "v")

	dev = b.blockdev("huge", "8Ti")
	start := time.Now()
	b.on(dev, xfs.mkfs)
	made := time.Since(start)
	at := b.mountDev(dev, "mnt")
	b.random(at+"/file", 8*mib, 7)
	b.tool("fstrim", at)
	b.tool("umount", at) // and with it the page cache
	b.mountDev(dev, "mnt")
	b.holds(at+"/file", 8*mib, 7)
	b.tool("umount", at)
	b.on(dev, xfs.check)
	used := b.onDisk(filepath.Join(b.disk(), "replicas"))
	t.Logf("mkfs.xfs of 8 TiB took %d ms; with 16 MiB in it both volumes take %d MiB on disk", made.Milliseconds(), used/mib)
	if used > 256*mib {
		t.Errorf("%d bytes on disk: not thin", used)
	}
	b.cli("volume", "detach", "huge")
}

// awhile waits for users of a device after a failure, but not for ever: nobody may answer them before the node is stopped.
func awhile(wg *sync.WaitGroup) {
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
	}
}

// devFio runs fio's verified random writes on a device, again and again, until it is told to stop.
type devFio struct {
	b    *bed
	stop atomic.Bool
	wg   sync.WaitGroup
	ops  int64
	runs int
	slow time.Duration
}

// startDevFio starts it on the device's first bytes; the test has to call wait.
func (b *bed) startDevFio(dev string, size int) *devFio {
	f := &devFio{b: b}
	b.Cleanup(func() { f.stop.Store(true); awhile(&f.wg) })
	f.wg.Go(func() {
		for !f.stop.Load() && !b.Failed() {
			r := b.fioOn(dev, size, f.runs)
			if r == nil {
				return
			}
			for _, j := range r.Jobs {
				f.ops += j.Read.TotalIOs + j.Write.TotalIOs
				f.slow = max(f.slow, time.Duration(max(j.Read.ClatNS.Max, j.Write.ClatNS.Max)))
				if j.Error != 0 || j.TotalErr != 0 {
					b.Errorf("fio saw errors: %d, %d in all", j.Error, j.TotalErr)
				}
			}
			f.runs++
		}
	})
	return f
}

func (f *devFio) wait() {
	f.b.Helper()
	f.stop.Store(true)
	f.wg.Wait()
	if f.runs == 0 {
		f.b.Error("fio did not end a single run")
	}
}

// fioOn runs fio once, for about two seconds: nil after an error, which it reports.
func (b *bed) fioOn(dev string, size, seed int) *fioReport {
	var r fioReport
	out, err := b.try("fio", "--name=verify", "--filename="+dev, "--direct=1", "--ioengine=libaio", "--iodepth=16", "--rw=randrw", "--rwmixread=30", "--bssplit=4k/70:16k/20:128k/10",
		fmt.Sprintf("--size=%d", size), fmt.Sprintf("--rate=%d", size/2), "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=256", "--fsync=64", fmt.Sprintf("--randseed=%d", seed+1),
		"--output-format=json", "--verify_state_save=0")
	if err == nil {
		err = json.Unmarshal([]byte(out[max(0, strings.Index(out, "{")):]), &r)
	}
	if err != nil {
		b.Errorf("fio on %s: %v", dev, err)
		return nil
	}
	return &r
}

// pulse writes a page of the device directly, again and again, and keeps how long the slowest took.
type pulse struct {
	ops, worst atomic.Int64
	stop       atomic.Bool
	wg         sync.WaitGroup
	err        error
}

// startPulse starts it at an offset that nobody else writes.
func (b *bed) startPulse(dev string, off int64) *pulse {
	b.Helper()
	f, err := os.OpenFile(dev, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		b.Fatal(err)
	}
	page, err := unix.Mmap(-1, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		b.Fatal(err)
	}
	p := &pulse{}
	b.Cleanup(func() { p.stop.Store(true); awhile(&p.wg) })
	p.wg.Go(func() {
		defer f.Close()
		defer unix.Munmap(page)
		for n := int64(1); p.err == nil && !p.stop.Load(); n++ {
			p.err = p.once(f, page, off, n)
			<-time.After(time.Millisecond)
		}
	})
	return p
}

func (p *pulse) once(f *os.File, page []byte, off, n int64) error {
	start := time.Now()
	w, r := page[:4096], page[4096:]
	copy(w, fmt.Sprintf("%-64d", n))
	if _, err := f.WriteAt(w, off); err != nil {
		return err
	}
	if _, err := f.ReadAt(r, off); err != nil {
		return err
	}
	if string(r) != string(w) {
		return fmt.Errorf("page %d reads as %.20q: %w", n, r, errLost)
	}
	p.worst.Store(max(p.worst.Load(), int64(time.Since(start))))
	p.ops.Add(1)
	return nil
}

func (p *pulse) wait(b *bed) {
	b.Helper()
	p.stop.Store(true)
	p.wg.Wait()
	if p.err != nil {
		b.Errorf("a reader and writer of the device, after %d rounds: %v", p.ops.Load(), p.err)
	}
}

// paused waits for n more operations counted by ops, does something, waits for n more, and returns how long the slowest took meanwhile.
func (b *bed) paused(ops, worst *atomic.Int64, do func()) time.Duration {
	b.Helper()
	const n = 20
	for _, step := range []func(){func() {}, do} {
		had := ops.Load()
		if worst.Store(0); step != nil {
			step()
		}
		b.until(30*time.Second, "users of the device go on", func() bool { return ops.Load() > had+n || b.Failed() })
	}
	return time.Duration(worst.Load()).Round(time.Millisecond)
}

const blockKills = 10

// TestBlockdevKilledUnderFio kills the data process ten times under fio verify with direct I/O: no error, and nothing reads wrong.
func TestBlockdevKilledUnderFio(t *testing.T) {
	b := newBlockBed(t)
	dev := b.blockdev("v", "128Mi")
	f := b.startDevFio(dev, 32*mib)
	p := b.startPulse(dev, 100*mib)
	var pauses []time.Duration
	for range blockKills {
		pauses = append(pauses, b.paused(&p.ops, &p.worst, func() { b.kill("data") }))
	}
	p.wait(b)
	f.wait()
	t.Logf("%d kills under %d runs of fio, %d operations verified, no error; pauses %v, the longest %v; fio's slowest %v", blockKills, f.runs, f.ops, pauses, slices.Max(pauses), f.slow.Round(time.Millisecond))
	if worst := slices.Max(pauses); worst > comeBack {
		t.Errorf("the device did not answer for %v", worst)
	}
	b.until(10*time.Second, "the volume is attached", func() bool { return b.volume("v").State == "attached" })
	b.clean("v")
	b.cli("volume", "detach", "v")
}

// fsWriter writes files: each whole, synced, renamed over the one before; and reads others again from the device.
type fsWriter struct {
	dir        string
	rng        *rand.Rand
	sure, last map[string][32]byte // what was synced and renamed; what was begun
	load       *fsLoad
}

// fsLoad is several of them.
type fsLoad struct {
	b          *bed
	ops, worst atomic.Int64
	stop       atomic.Bool
	wg         sync.WaitGroup
	writers    []*fsWriter
	failed     chan error
}

func (b *bed) startFSLoad(at string) *fsLoad {
	b.Helper()
	seed := uint64(time.Now().UnixNano())
	b.Logf("seed %d", seed)
	l := &fsLoad{b: b, failed: make(chan error, 4)}
	b.Cleanup(func() { l.stop.Store(true); awhile(&l.wg) })
	for n := range 4 {
		w := &fsWriter{dir: filepath.Join(at, fmt.Sprint("w", n)), rng: rand.New(rand.NewPCG(seed, uint64(n))), sure: map[string][32]byte{}, last: map[string][32]byte{}, load: l}
		if err := os.Mkdir(w.dir, 0o700); err != nil {
			b.Fatal(err)
		}
		l.writers = append(l.writers, w)
		l.wg.Go(func() {
			for !l.stop.Load() {
				start := time.Now()
				if err := w.once(); err != nil {
					l.failed <- err
					return
				}
				l.worst.Store(max(l.worst.Load(), int64(time.Since(start))))
				l.ops.Add(1)
				<-time.After(2 * time.Millisecond)
			}
		})
	}
	return l
}

// once writes one file, and reads another.
func (w *fsWriter) once() error {
	name := fmt.Sprintf("f%02d", w.rng.IntN(30))
	p := make([]byte, 1+w.rng.IntN(128*kib))
	for i := range p {
		p[i] = byte(w.rng.Uint32())
	}
	w.last[name] = sha256.Sum256(p)
	if err := w.write(name, p); err != nil {
		return err
	}
	w.sure[name] = w.last[name]
	return w.look(fmt.Sprintf("f%02d", w.rng.IntN(30)))
}

func (w *fsWriter) write(name string, p []byte) error {
	f, err := os.Create(filepath.Join(w.dir, "new"))
	if err != nil {
		return err
	}
	_, err = f.Write(p)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(w.dir, "new"), filepath.Join(w.dir, name)); err != nil {
		return err
	}
	d, err := os.Open(w.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// look reads a file, not from the page cache, which must be what was synced last, or the one begun after that.
func (w *fsWriter) look(name string) error {
	want, ok := w.sure[name]
	f, err := os.Open(filepath.Join(w.dir, name))
	if !ok && errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if got := [32]byte(h.Sum(nil)); got != want && got != w.last[name] {
		return fmt.Errorf("file %s of %s is neither what was synced last nor what was begun: %w", name, w.dir, errLost)
	}
	return nil
}

// wait ends it; every error counts.
func (l *fsLoad) wait() {
	l.b.Helper()
	l.stop.Store(true)
	l.wg.Wait()
	for len(l.failed) > 0 {
		l.b.Errorf("a writer on the mounted file system: %v", <-l.failed)
	}
}

// verify reads everything.
func (l *fsLoad) verify() {
	l.b.Helper()
	files := 0
	for _, w := range l.writers {
		for name := range w.sure {
			if err := w.look(name); err != nil {
				l.b.Error(err)
			}
			files++
		}
	}
	l.b.Logf("%d files are as they were synced", files)
}

// TestBlockdevKilledUnderExt4 kills the data process ten times, the holder, serve, and pairs of them, under a mounted ext4 with writers; nobody sees an error. Holder and data process
// together take the session with them: then the mounted file system gets EIO, and what was synced is there when the device is back.
func TestBlockdevKilledUnderExt4(t *testing.T) {
	b := newBlockBed(t)
	dev := b.blockdev("v", "256Mi")
	b.on(dev, ext4.mkfs)
	at := b.mountDev(dev, "mnt", "-o", "errors=remount-ro,discard")
	l := b.startFSLoad(at)
	var pauses []time.Duration
	for range blockKills {
		pauses = append(pauses, b.paused(&l.ops, &l.worst, func() { b.kill("data") }))
	}
	t.Logf("%d kills of the data process under 4 writers with fsync: the slowest write, sync and rename of each took %v, the longest %v", blockKills, pauses, slices.Max(pauses))
	if worst := slices.Max(pauses); worst > comeBack {
		t.Errorf("the file system did not answer for %v", worst)
	}
	hold := b.paused(&l.ops, &l.worst, func() { b.kill("hold") })
	after := b.paused(&l.ops, &l.worst, func() { b.kill("data") })
	t.Logf("kill of the holder: %v; of the data process under the new holder: %v", hold, after)
	serve := b.paused(&l.ops, &l.worst, func() {
		if err := b.p.KillServe(); err != nil {
			t.Error(err)
		}
	})
	both := b.paused(&l.ops, &l.worst, func() { b.kill("data") })
	if err := b.p.StartServe(b.ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("kill of serve: %v; of the data process while there is no serve: %v", serve, both)
	l.wait()
	t.Logf("%d files written, synced, renamed and read", l.ops.Load())
	b.tool("umount", at)
	b.on(dev, ext4.check)
	b.mountDev(dev, "mnt")
	l.verify()
	b.tool("umount", at)
	b.until(20*time.Second, "the volume is attached", func() bool { return b.volume("v").State == "attached" })
	b.clean("v")
	b.sub("hold and data", func(b *bed) { b.sessionLost(dev) })
}

// sessionLost kills holder and data process at once under writers.
func (b *bed) sessionLost(dev string) {
	at := b.mountDev(dev, "mnt", "-o", "errors=remount-ro")
	if err := os.Mkdir(at+"/again", 0o700); err != nil {
		b.Fatal(err)
	}
	old, err := filepath.EvalSymlinks(dev)
	if err != nil {
		b.Fatal(err)
	}
	l := b.startFSLoad(at + "/again")
	b.paused(&l.ops, &l.worst, func() {})
	hold, data := b.p.PID("hold"), b.p.PID("data")
	start := time.Now()
	if err := errors.Join(syscall.Kill(hold, syscall.SIGKILL), syscall.Kill(data, syscall.SIGKILL)); err != nil {
		b.Fatal(err)
	}
	for range l.writers {
		select {
		case err := <-l.failed:
			b.Logf("a writer, %d ms after both were killed: %v", time.Since(start).Milliseconds(), err)
		case <-time.After(20 * time.Second):
			b.Fatal("a writer neither gets an error nor goes on")
		}
	}
	l.wg.Wait()
	b.until(20*time.Second, "a new device", func() bool {
		now, err := filepath.EvalSymlinks(dev)
		pid := b.p.PID("data")
		return err == nil && now != old && pid != 0 && pid != data
	})
	b.Logf("the link shows a new loop device after %d ms, while the file system is mounted on the old one", time.Since(start).Milliseconds())
	b.tool("umount", at)
	b.repair(dev)
	b.on(dev, ext4.check)
	b.mountDev(dev, "mnt")
	l.verify()
	b.tool("umount", at)
	b.clean("v")
	b.cli("volume", "detach", "v")
}

// repair has e2fsck play back the journal of an ext4 that was cut off; exit code 1 says that it did. It may find nothing that needs a person.
func (b *bed) repair(dev string) {
	b.Helper()
	_, err := b.try("e2fsck", "-fp", dev)
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || exit.ExitCode() != 1) {
		b.Error(err)
	}
}

// TestBlockdevKilledInVerbs kills the data process in the middle of snapshots and expansions of a mounted file system, when it may be waiting for the kernel that waits for it.
func TestBlockdevKilledInVerbs(t *testing.T) {
	b := newBlockBed(t)
	dev := b.blockdev("v", "320Mi")
	b.on(dev, xfs.mkfs)
	at := b.mountDev(dev, "mnt")
	l := b.startFSLoad(at)
	var pauses []time.Duration
	for n := range 8 {
		verb := []string{"snapshot", "create", "v", fmt.Sprint("s", n)}
		if n%2 == 1 {
			verb = []string{"volume", "expand", "v", "--size", fmt.Sprintf("%dMi", 320+16*n)}
		}
		pauses = append(pauses, b.paused(&l.ops, &l.worst, func() {
			var wg sync.WaitGroup
			wg.Go(func() {
				if err := b.p.Run(b.ctx, nil, verb...); err != nil {
					b.Errorf("ashlar %s, with the data process killed meanwhile: %v", strings.Join(verb, " "), err)
				}
			})
			<-time.After(time.Duration(10+10*n) * time.Millisecond) // it falls somewhere into the verb, or before, or after
			b.kill("data")
			wg.Wait()
		}))
	}
	l.wait()
	t.Logf("8 kills during snapshots and expansions: the slowest file %v", pauses)
	if got := strings.TrimSpace(b.tool("blockdev", "--getsize64", dev)); got != strconv.Itoa((320+16*7)*mib) {
		t.Errorf("%s has %s bytes after the expansions", dev, got)
	}
	b.on(at, xfs.grow)
	b.tool("umount", at)
	b.on(dev, xfs.check)
	b.mountDev(dev, "mnt")
	l.verify()
	b.tool("umount", at)
	for n := 0; n < 8; n += 2 {
		if s := b.snapshots("v")[fmt.Sprint("s", n)]; !s.UserCreated {
			t.Errorf("snapshot s%d: %+v", n, s)
		}
	}
	b.clean("v")
	b.cli("volume", "detach", "v")
}

// TestBlockdevUpgrade hands the block device over to another build and back, under fio verify and under a mounted ext4: no error.
func TestBlockdevUpgrade(t *testing.T) {
	first, second := program, build(t, secondVersion, "")
	dir := scratch(t)
	noDevicesLeft(t, dir)
	b := &bed{T: t, ctx: t.Context(), dir: dir, p: &testbed.Process{Bin: filepath.Join(dir, "ashlar")}}
	b.install(first)
	b = startBin(t, dir, b.p.Bin)
	dev := b.blockdev("v", "128Mi")
	fsDev := b.blockdev("fs", "128Mi")
	b.on(fsDev, ext4.mkfs)
	at := b.mountDev(fsDev, "mnt")
	l := b.startFSLoad(at)
	f := b.startDevFio(dev, 32*mib)
	p := b.startPulse(dev, 100*mib)
	pid := b.dataPID()
	var took, seen, seenFS []time.Duration
	for round := range 4 {
		b.install([]string{second, first}[round%2])
		l.worst.Store(0)
		var up upgrade
		seen = append(seen, b.paused(&p.ops, &p.worst, func() { b.json(&up, "upgrade") }))
		if len(up.Volumes) != 2 || up.PID == pid || up.PID != b.dataPID() {
			t.Fatalf("round %d: %+v; the data process was %d", round, up, pid)
		}
		pid = up.PID
		for _, v := range up.Volumes {
			took = append(took, time.Duration(v.PauseMicros)*time.Microsecond)
		}
		had := l.ops.Load()
		b.until(30*time.Second, "writers go on", func() bool { return l.ops.Load() > had+20 || len(l.failed) > 0 })
		seenFS = append(seenFS, time.Duration(l.worst.Load()).Round(time.Millisecond))
	}
	b.kill("data") // what took over is what any data process is
	p.wait(b)
	f.wait()
	l.wait()
	t.Logf("%d hand-overs of 2 volumes under fio (%d runs, %d operations) and ext4 (%d files): pauses as told %v; slowest direct write and read %v; slowest file %v",
		4, f.runs, f.ops, l.ops.Load(), took, seen, seenFS)
	b.tool("umount", at)
	b.on(fsDev, ext4.check)
	b.mountDev(fsDev, "mnt")
	l.verify()
	b.tool("umount", at)
	b.clean("v", "fs")
}

// TestBlockdevFull fills the disk below a mounted ext4: it gets an error, what it had synced stays, and it goes on when something else is deleted.
func TestBlockdevFull(t *testing.T) {
	dir := scratch(t)
	noDevicesLeft(t, dir)
	disk := filepath.Join(dir, "data", "disks", "default")
	mountNew(t, dir, disk, "256M", "mkfs.ext4", "-q", "-m", "0", "-F")
	b := startIn(t, dir)
	b.cli("volume", "create", "other", "--size", "128Mi")
	b.attach("other")
	b.qemuIO("other", "write -P 7 0 96M", "flush")
	dev := b.blockdev("v", "512Mi")
	b.on(dev, ext4.mkfs)
	at := b.mountDev(dev, "mnt", "-o", "errors=remount-ro")
	b.random(at+"/kept", 16*mib, 8)
	synced := 0
	var failed error
	for ; failed == nil && synced < 500; synced++ {
		failed = writeSynced(filepath.Join(at, fmt.Sprint("f", synced)), 2*mib, byte(synced))
	}
	synced-- // the last one failed
	t.Logf("after %d MiB: %v", synced*2+16, failed)
	if !errors.Is(failed, syscall.ENOSPC) && !errors.Is(failed, syscall.EIO) && !errors.Is(failed, syscall.EROFS) {
		t.Fatalf("a full disk below a mounted file system: %v after %d files", failed, synced)
	}
	if v := b.volume("v"); v.State != "attached" || v.Robustness != "healthy" {
		t.Errorf("volume on a full disk: %+v", v)
	}
	b.cli("volume", "delete", "other")
	again := func() error { return writeSynced(at+"/again", 4*mib, 99) }
	err := again()
	t.Logf("the mounted file system, after a volume was deleted: %v", err)
	b.tool("umount", at)
	if err != nil {
		b.repair(dev)
	}
	b.on(dev, ext4.check)
	b.mountDev(dev, "mnt")
	b.holds(at+"/kept", 16*mib, 8)
	for n := range synced {
		b.holds(filepath.Join(at, fmt.Sprint("f", n)), 2*mib, byte(n))
	}
	if err := again(); err != nil {
		t.Errorf("after it was mounted again: %v", err)
	}
	b.tool("umount", at)
	b.on(dev, ext4.check)
	b.clean("v")
	b.cli("volume", "detach", "v")
}

// writeSynced is random, with its error.
func writeSynced(path string, size int, seed byte) error {
	p := make([]byte, size)
	rand.NewChaCha8([32]byte{seed}).Read(p)
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(p)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}
