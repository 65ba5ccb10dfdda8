//go:build integration

package testbed_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// furnish makes a node with an image, volumes from it and without one, snapshots, some attached and some not. It returns the volumes that are attached.
func (b *bed) furnish() []string {
	b.Helper()
	golden := b.raw("golden.raw", 32*mib, 30)
	b.tool("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", golden, b.path("golden.qcow2"))
	b.cli("image", "import", "golden", b.path("golden.qcow2"), "--checksum", "sha256:"+b.sha256(b.path("golden.qcow2")))
	for _, v := range []string{"one", "two", "three"} {
		b.cli("volume", "create", v, "--image", "golden", "--size", "64Mi")
	}
	b.cli("volume", "create", "bare", "--size", "48Mi")
	b.attach("one", "two", "three", "bare")
	for n, v := range []string{"one", "two", "bare"} {
		b.qemuIO(v, fmt.Sprintf("write -P %d 4M 4M", 0x10+n), "flush")
		b.cli("snapshot", "create", v, "first", "--label", "of="+v)
		b.qemuIO(v, fmt.Sprintf("write -P %d 6M 4M", 0x20+n), "discard 4M 512k")
		b.cli("snapshot", "create", v, "second")
		b.qemuIO(v, fmt.Sprintf("write -P %d 40M 1M", 0x30+n), "flush")
	}
	b.cli("volume", "detach", "two")
	b.cli("snapshot", "revert", "two", "first")
	b.cli("volume", "detach", "three")
	return []string{"one", "bare"}
}

// furniture wants what furnish made.
func (b *bed) furniture(attached ...string) {
	b.Helper()
	b.until(20*time.Second, "what was attached is attached again", func() bool {
		for _, v := range attached {
			if b.volume(v).State != "attached" {
				return false
			}
		}
		for _, v := range []string{"one", "two", "three", "bare"} { // a node that has just started may not have looked at all of them
			if state := b.volume(v).State; state != "attached" && state != "detached" {
				return false
			}
		}
		return true
	})
	b.contentsOfFurniture()
	var g imageView
	b.json(&g, "image", "show", "golden")
	if g.CurrentChecksum == "" && g.Digest == "" || g.VirtualSize != 32*mib {
		b.Errorf("image: %+v", g)
	}
	for _, v := range []string{"one", "bare"} {
		s := b.snapshots(v)
		if len(s) != 2 || s["second"].Parent != "first" || s["first"].Labels["of"] != v || !s["first"].UserCreated || !s["second"].Children["volume-head"] {
			b.Errorf("snapshots of %s: %+v", v, s)
		}
	}
	if s := b.snapshots("two"); len(s) != 2 || !s["first"].Children["volume-head"] || !s["first"].Children["second"] {
		b.Errorf("snapshots of two: %+v", s)
	}
	b.clean("one", "two", "three", "bare")
}

// contentsOfFurniture reads every volume; those that were detached are again afterwards.
func (b *bed) contentsOfFurniture() {
	b.Helper()
	for n, v := range []string{"one", "two", "bare"} {
		was := b.volume(v)
		b.attach(v)
		b.qemuIO(v, fmt.Sprintf("read -P %d 5M 1M", 0x10+n))
		switch v {
		case "two": // at its first snapshot again
			b.qemuIO(v, fmt.Sprintf("read -P %d 4M 4M", 0x10+n))
			b.tool("sh", "-c", `qemu-img compare -f raw -F raw "$1" "$2" | grep -q "offset 4194304"`, "compare", b.path("golden.raw"), b.uri(v))
		default:
			b.qemuIO(v, fmt.Sprintf("read -P %d 6M 4M", 0x20+n), fmt.Sprintf("read -P %d 40M 1M", 0x30+n), "read -P 0 4M 512k")
		}
		if was.State == "detached" {
			b.cli("volume", "detach", v)
		}
	}
	three := b.volume("three").State
	b.attach("three")
	b.same("three", b.path("golden.raw"))
	if three == "detached" {
		b.cli("volume", "detach", "three")
	}
}

// TestShutdown stops a node in order: no process is left, and the next start attaches again what was attached.
func TestShutdown(t *testing.T) {
	b := newBed(t)
	attached := b.furnish()
	b.refused(exitConflict, []string{"one", "bare"}, "shutdown")
	if b.volume("one").State != "attached" {
		t.Fatal("a shutdown that was refused detached a volume")
	}
	for round := range 2 {
		start := time.Now()
		b.cli("shutdown", "--force")
		if err := b.p.WaitServe(); err != nil {
			t.Errorf("serve ended with %v", err)
		}
		b.until(20*time.Second, "no process of the node is left", func() bool { return len(users(b.p.RunDir)) == 0 && len(users(b.p.DataDir)) == 0 })
		t.Logf("shut down in %d ms", time.Since(start).Milliseconds())
		if round == 1 {
			for n := range 2 { // serve alone, to and fro, finds everything
				if err := b.p.StartServe(b.ctx); err != nil {
					t.Fatal(n, err)
				}
				if err := b.p.KillServe(); err != nil {
					t.Fatal(err)
				}
			}
		}
		start = time.Now()
		if err := b.p.StartServe(b.ctx); err != nil {
			t.Fatal(err)
		}
		b.dial("one")
		b.dial("bare")
		t.Logf("started, and what was attached serves again, after %d ms", time.Since(start).Milliseconds())
		b.furniture(attached...)
	}
}

// crash kills every process of a node at once, and takes away what a reboot takes away. (What was not flushed stays in the page cache here; that a power cut
// loses it is proved on a disk in memory, in packages layer, replica/local and volume.)
func (b *bed) crash() {
	b.Helper()
	for _, sub := range []string{"hold", "data"} {
		if err := b.p.Kill(sub); err != nil {
			b.Error(err)
		}
	}
	if err := b.p.KillServe(); err != nil {
		b.Error(err)
	}
	b.until(10*time.Second, "all are dead", func() bool {
		for _, sub := range []string{"hold", "data"} { // whoever was quick enough to start the other again
			if pid := b.p.PID(sub); pid != 0 {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		return len(users(b.p.RunDir)) == 0
	})
	if err := os.RemoveAll(b.p.RunDir); err != nil {
		b.Fatal(err)
	}
}

// TestHostRestart kills everything and empties the run directory, as a reboot does: the next start opens everything again.
func TestHostRestart(t *testing.T) {
	b := newBed(t)
	attached := b.furnish()
	for range 2 {
		b.crash()
		start := time.Now()
		if err := b.p.StartServe(b.ctx); err != nil {
			t.Fatal(err)
		}
		b.dial("one")
		b.dial("bare")
		t.Logf("after a restart of the host, volumes serve again %d ms after the start of serve", time.Since(start).Milliseconds())
		b.furniture(attached...)
	}
	// A verb that was under way is finished or given up; nothing hangs.
	b.cli("snapshot", "create", "one", "third", "--label", "x=y")
	b.cli("volume", "delete", "three", "--no-wait")
	b.crash()
	if err := b.p.StartServe(b.ctx); err != nil {
		t.Fatal(err)
	}
	b.until(20*time.Second, "the deletion is finished", func() bool {
		_, err := b.p.Text(b.ctx, "volume", "show", "three")
		failed, ok := errors.AsType[interface{ error }](err)
		return ok && failed != nil
	})
	left, err := filepath.Glob(filepath.Join(b.disk(), "replicas", "three-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left of a deleted volume: %v %v", left, err)
	}
	if s := b.snapshots("one"); len(s) != 3 {
		t.Errorf("snapshots: %+v", s)
	}
}
