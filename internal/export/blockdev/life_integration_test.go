//go:build integration

package blockdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/block"
)

// TestInUse: a device that somebody has open stays, as it was; then it goes, and all that belongs to it.
func TestInUse(t *testing.T) {
	b := newBed(t)
	f := b.frontend()
	path, err := f.Add(t.Context(), "vol", b.device(b.file("disk", 8<<20)), Options{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Remove(t.Context(), "vol"); !errors.Is(err, ErrBusy) {
		t.Errorf("removing an open device: %v", err)
	} else {
		t.Log(err)
	}
	if _, err := d.WriteAt([]byte("still here"), 0); err != nil {
		t.Error(err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		t.Error(err)
	}
	if p, err := os.ReadFile(path); err != nil || len(p) != 8<<20 || !bytes.HasPrefix(p, []byte("still here")) {
		t.Errorf("after a refused removal it is not as it was: %d bytes, %v", len(p), err)
	}
	if _, err := f.Add(t.Context(), "vol", nil, Options{}); !errors.Is(err, ErrExists) {
		t.Errorf("adding it twice: %v", err)
	}
	for range 2 {
		if err := f.Remove(t.Context(), "vol"); err != nil {
			t.Error(err)
		}
	}
	b.gone(f, "vol")
}

// TestPartitions: an image partitioned in sectors of 512 bytes shows its partitions.
func TestPartitions(t *testing.T) {
	b := newBed(t)
	f := b.frontend()
	file := b.file("disk", 64<<20)
	cmd := exec.Command("sfdisk", "-q", file)
	cmd.Stdin = bytes.NewBufferString("label: gpt\nstart=2048, size=4096\nstart=63489, size=101\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	path := b.add(f, "vol", b.device(file), Options{})
	dev, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(sysBlock, filepath.Base(dev), filepath.Base(dev)+"p1")); err != nil {
		t.Log("this kernel knows no partition tables; they are told to it")
		b.command("partx", "-a", dev)
	}
	for part, want := range map[string]int64{"p1": 4096 * 512, "p2": 101 * 512} {
		got, err := os.ReadFile(filepath.Join(sysBlock, filepath.Base(dev), filepath.Base(dev)+part, "size"))
		if n, _ := strconv.ParseInt(string(bytes.TrimSpace(got)), 10, 64); err != nil || n*512 != want {
			t.Errorf("%s%s: %s, %v", dev, part, got, err)
		}
	}
	b.command("mkfs.ext4", "-q", dev+"p1")
	at := b.mount(dev + "p1")
	if err := f.Remove(t.Context(), "vol"); !errors.Is(err, ErrBusy) {
		t.Errorf("removing a device with a mounted partition: %v", err)
	}
	if err := f.Sync(t.Context(), "vol"); err != nil {
		t.Error(err)
	}
	b.command("umount", at)
}

// TestStale: what a process left that died together with its keeper is cleaned away, by Add and by Remove, also under a mount.
func TestStale(t *testing.T) {
	for _, mounted := range []bool{false, true} {
		t.Run(fmt.Sprint("mounted=", mounted), func(t *testing.T) {
			b := newBed(t)
			file := b.file("disk", 64<<20)
			c := b.start("vol", file)
			path := filepath.Join(b.devs, "vol")
			b.command("mkfs.ext4", "-q", path)
			old, err := os.Readlink(path)
			if err != nil {
				t.Fatal(err)
			}
			if mounted {
				b.mount(path)
			}
			b.keeper.Drop(t.Context(), heldName("vol"))
			c.kill()
			f := b.frontend()
			if b.add(f, "vol", b.device(file), Options{}); mounted {
				b.command("umount", filepath.Join(b.dir, "mnt"))
				b.until("the old loop device's end", func() bool { _, err := os.Stat(filepath.Join(sysBlock, filepath.Base(old), "loop")); return err != nil })
			}
			b.command("e2fsck", "-fp", path)
			if n, err := mountedAt(f.mountPath("vol")); n != 1 || err != nil {
				t.Errorf("%d mounts, %v", n, err)
			}
		})
	}
	t.Run("remove", func(t *testing.T) {
		b := newBed(t)
		c := b.start("vol", b.file("disk", 8<<20))
		b.keeper.Drop(t.Context(), heldName("vol"))
		c.kill()
		b.remove("vol")
	})
}

// TestServedElsewhere: a volume that another living process serves is left alone.
func TestServedElsewhere(t *testing.T) {
	b := newBed(t)
	c := b.start("vol", b.file("disk", 8<<20))
	other := *b
	other.keeper = newKeeper(t)
	f := other.frontend()
	if _, err := f.Add(t.Context(), "vol", b.device(b.file("other", 8<<20)), Options{}); !errors.Is(err, ErrExists) {
		t.Errorf("add: %v", err)
	}
	if err := f.Remove(t.Context(), "vol"); !errors.Is(err, ErrExists) {
		t.Errorf("remove: %v", err)
	}
	b.command("dd", "if="+filepath.Join(b.devs, "vol"), "of=/dev/null", "bs=1M", "status=none")
	c.handOver()
	b.remove("vol")
}

// TestForce: a Device that does not answer, under a reader, is got rid of, and the reader gets an error.
func TestForce(t *testing.T) {
	b := newBed(t)
	f := b.frontend()
	gate := block.NewGate(b.device(b.file("disk", 8<<20)))
	dev := &arrivals{Device: gate, arrived: make(chan struct{}, 1)}
	path, err := f.Add(t.Context(), "vol", dev, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := gate.Hold(t.Context()); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dd", "if="+path, "of=/dev/null", "bs=1M", "iflag=direct", "status=none")
	dev.watch.Store(true)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-dev.arrived
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := f.Force(ctx, "vol"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("force while the Device holds a request: %v", err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the reader got no error")
	}
	gate.Release()
	if err := f.Force(t.Context(), "vol"); err != nil {
		t.Error(err)
	}
	b.gone(f, "vol")
}

// arrivals tells when a read has come, once watch is set.
type arrivals struct {
	block.Device
	watch   atomic.Bool
	arrived chan struct{}
}

func (d *arrivals) ReadAt(p []byte, off int64) (int, error) {
	if d.watch.CompareAndSwap(true, false) {
		d.arrived <- struct{}{}
	}
	return d.Device.ReadAt(p, off)
}

// TestReadOnly: the kernel refuses what the Device would.
func TestReadOnly(t *testing.T) {
	b := newBed(t)
	f := b.frontend()
	path := b.add(f, "vol", b.device(b.file("disk", 8<<20)), Options{ReadOnly: true})
	if got := b.command("blockdev", "--getro", path); got != "1\n" {
		t.Errorf("read-only: %q", got)
	}
	b.command("dd", "if="+path, "of=/dev/null", "bs=1M", "status=none")
	if d, err := os.OpenFile(path, os.O_RDWR, 0); err == nil {
		_, err = d.Write(make([]byte, 512))
		if err = errors.Join(err, d.Sync()); err == nil {
			t.Error("it takes writes")
		}
		d.Close()
	}
}

// TestSync: what was written through the kernel's cache, to the device and to a file system on it, is in the Device after Sync.
func TestSync(t *testing.T) {
	b := newBed(t)
	f := b.frontend()
	file := b.file("disk", 64<<20)
	path := b.add(f, "vol", b.device(file), Options{})
	b.command("mkfs.ext4", "-q", path)
	at := b.mount(path)
	want := bytes.Repeat([]byte("what a guest wrote and did not sync. "), 1000)
	if err := os.WriteFile(at+"/file", want, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(t.Context(), "vol"); err != nil {
		t.Fatal(err)
	}
	if f.Stats()["vol"].Flushes == 0 {
		t.Error("nothing was flushed")
	}
	copied, err := os.ReadFile(file)
	if err != nil || !bytes.Contains(copied, want[:4096]) {
		t.Errorf("the Device does not have it, %v", err)
	}
	b.command("umount", at)
}

// TestOlderKernel does as on a kernel that cannot resend: the descriptor is kept only between processes, a hand-over works, a kill is EIO.
func TestOlderKernel(t *testing.T) {
	b := newBed(t)
	dev := b.device(b.file("disk", 8<<20))
	older := func() *Frontend {
		f := b.frontend()
		f.cfg.withoutResend = true
		return f
	}
	first := older()
	if first.Resends() {
		t.Fatal("it says it can resend")
	}
	path, err := first.Add(t.Context(), "vol", dev, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if b.keeper.holds(heldName("vol")) {
		t.Error("the descriptor is held: after a kill, requests would wait for ever")
	}
	d, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := first.Detach(t.Context(), "vol"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := d.WriteAt(aligned(4096), 4096); err != nil {
			t.Errorf("a write while nobody served: %v", err)
		}
	})
	second := older()
	if _, err := second.Add(t.Context(), "vol", dev, Options{}); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if b.keeper.holds(heldName("vol")) {
		t.Error("the descriptor is held after the hand-over")
	}
	d.Close()
	if err := second.Remove(t.Context(), "vol"); err != nil {
		t.Error(err)
	}
	b.gone(second, "vol")
}

// TestHeldAndUnused: what is held for a volume that nobody adds any more can be removed without anybody serving it, unless it is in use.
func TestHeldAndUnused(t *testing.T) {
	b := newBed(t)
	b.needsResend()
	c := b.start("vol", b.file("disk", 8<<20))
	d, err := os.OpenFile(filepath.Join(b.devs, "vol"), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	c.kill()
	f := b.frontend()
	if err := f.Remove(t.Context(), "vol"); !errors.Is(err, ErrBusy) {
		t.Errorf("removing what is in use: %v", err)
	}
	d.Close()
	if err := f.Remove(t.Context(), "vol"); err != nil {
		t.Error(err)
	}
	b.gone(f, "vol")
}

// TestManyVolumes says what many block devices cost.
func TestManyVolumes(t *testing.T) {
	b := newBed(t)
	f := b.frontend()
	n := steps(t, 40)
	dev := b.device(b.file("disk", 8<<20))
	before := resident(t)
	begin := time.Now()
	for i := range n {
		b.add(f, "vol"+strconv.Itoa(i), dev, Options{})
	}
	added := time.Since(begin)
	begin = time.Now()
	for i := range n {
		if err := f.Detach(t.Context(), "vol"+strconv.Itoa(i)); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Add(t.Context(), "vol"+strconv.Itoa(i), dev, Options{}); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d volumes: %v each to add, %v each to hand over; %d KiB each", n, added/time.Duration(n), time.Since(begin)/time.Duration(n), (resident(t)-before)/int64(n)>>10)
}

func resident(t *testing.T) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseInt(string(bytes.Fields(text)[1]), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n * 4096
}
