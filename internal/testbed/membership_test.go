//go:build integration

package testbed_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// TestRunbookLastOfTwo makes a cluster of two voters one of one, in order: the second is emptied and removed while it runs, gives up its member of the catalogue, and ends, all its
// processes, saying why. What it had goes on at the first, which agrees with itself.
func TestRunbookLastOfTwo(t *testing.T) {
	w := newCrowd(t, 2, loopback)
	one, two := w.nodes[0], w.nodes[1]
	one.untilVote("node1", "node2")
	one.cli("node", "tag", "node2", "n2")
	one.cli("volume", "create", "v", "--size", "64Mi", "--node-selector", "n2")
	one.cli("volume", "attach", "v", "--frontend", "nbd")
	one.qemuIO("v", "write -P 7 0 4M", "flush")
	one.refused(exitConflict, []string{"node2 is running"}, "node", "remove", "node2")
	one.cli("volume", "detach", "v")
	one.cli("node", "tag", "node1", "n2")
	one.cli("node", "drain", "node2")
	two.refused(exitConflict, []string{"ask another node"}, "node", "remove", "node2")
	began := time.Now()
	one.cli("node", "remove", "node2")
	w.Logf("removed after %v", time.Since(began).Round(time.Millisecond))
	const exitRemoved = 9 // docs/cli.md
	if ended, ok := errors.AsType[*exec.ExitError](two.p.WaitServe()); !ok || ended.ExitCode() != exitRemoved {
		w.Errorf("serve of a removed node ends with %v, want exit code %d", ended, exitRemoved)
	}
	log, err := os.ReadFile(filepath.Join(two.dir, "serve.log"))
	if err != nil {
		w.Fatal(err)
	}
	two.says(string(log), "was removed from its cluster", "to use this machine again, move")
	two.until(20*time.Second, "its other processes end", func() bool { return two.p.PID("data") == 0 && two.p.PID("hold") == 0 })
	one.untilVote("node1")
	if out := one.cli("status"); strings.Contains(out, "node2") {
		w.Errorf("what ended in order is to be looked at:\n%s", out)
	}
	one.cli("volume", "attach", "v", "--frontend", "nbd")
	one.qemuIO("v", "read -P 7 0 4M")
	// It does so by itself from now on, also after a start.
	one.stopServe()
	one.startServe()
	one.until(20*time.Second, "it answers", func() bool { return len(one.members()) == 1 })
	one.cli("volume", "detach", "v")
	if out := one.doctor(); strings.Contains(out, "node2") {
		t.Errorf("doctor still speaks of the other:\n%s", out)
	}
}

// TestRunbookNoVoterLeft loses all voters for good. A node that was none, with a guest on a volume of its own, begins a cluster with the records of a backup: the guest goes on, what the others alone
// had is said to be lost, and machines join.
func TestRunbookNoVoterLeft(t *testing.T) {
	w := newCrowd(t, 4, loopback)
	four := w.nodes[3]
	w.nodes[0].untilVote("node1", "node2", "node3")
	four.cli("node", "tag", "node4", "n4")
	four.cli("node", "tag", "node2", "n2")
	w.volumeOn("kept", "n4", four)
	w.volumeOn("lost", "n2", four)
	four.qemuIO("kept", "write -P 1 0 4M", "flush")
	file := four.path("catalogue.json")
	four.cli("cluster", "backup", file)
	for i := range 3 {
		if err := w.c.KillNode(w.ctx, i); err != nil {
			t.Fatal(err)
		}
	}
	four.qemuIO("kept", "read -P 1 0 4M", "write -P 2 0 4M", "flush")
	four.stopServe()
	four.refused(exitRefused, []string{"keeps no member", four.p.DataDir}, "cluster", "restore", file, "--data-dir", four.p.DataDir)
	four.tool("mv", filepath.Join(four.p.DataDir, "cluster"), filepath.Join(four.p.DataDir, "cluster.old"))
	four.says(four.cli("cluster", "restore", file, "--data-dir", four.p.DataDir), "records of cluster")
	four.startServe()
	four.cli("cluster", "init", "--address", w.c.Host(3))
	four.untilVote("node4")
	four.qemuIO("kept", "read -P 2 0 4M", "write -P 3 0 4M", "flush")
	four.untilDown("node1", "node2", "node3")
	for i := range 3 {
		four.cli("node", "remove", w.nodes[i].p.Name, "--force")
	}
	four.cli("volume", "detach", "lost", "--force")
	four.until(10*time.Second, "the volume that was there only is said to be lost", func() bool { return four.volume("lost").Robustness == "faulted" })
	four.cli("volume", "delete", "lost")
	w.rejoinThrough(0, 3)
	four.untilVote("node1", "node4")
	four.qemuIO("kept", "read -P 3 0 4M")
	four.cli("volume", "detach", "kept")
	w.nodes[0].cli("volume", "attach", "kept", "--frontend", "nbd")
	w.nodes[0].qemuIO("kept", "read -P 3 0 4M")
	four.stopServe() // it does so by itself from now on, also after a start
	four.startServe()
	four.untilVote("node1", "node4")
}

// room mounts a small disk of its own where a node has its member of the catalogue, whose serve is stopped.
func (b *bed) room(mib int) {
	b.Helper()
	img := filepath.Join(b.dir, "small")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		b.Fatal(err)
	}
	if err := os.Truncate(img, int64(mib)<<20); err != nil {
		b.Fatal(err)
	}
	b.tool("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", img)
	b.tool("mv", b.etcd(), b.etcd()+".was")
	b.tool("mkdir", "-m", "700", b.etcd())
	b.tool("mount", "-o", "loop", img, b.etcd())
	b.Cleanup(func() {
		if out, err := exec.Command("umount", "-l", b.etcd()).CombinedOutput(); err != nil {
			b.Errorf("umount: %v: %s", err, out)
		}
	})
	b.tool("cp", "-a", b.etcd()+".was/.", b.etcd())
	b.tool("rm", "-rf", b.etcd()+".was")
}

// fill writes a file until there is no room left beside it.
func (b *bed) fill(file string) {
	b.Helper()
	f, err := os.Create(file)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	for _, n := range []int{1 << 20, 4 << 10, 512} {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, n))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			b.Fatal(err)
		}
	}
}

// stuff makes the catalogue grow by what is no record, through one node's member, until stop says so.
func (b *bed) stuff(at string, stop func() bool) {
	b.Helper()
	dir := filepath.Join(b.p.DataDir, "cluster")
	info := transport.TLSInfo{CertFile: b.pem(), KeyFile: b.pem(), TrustedCAFile: filepath.Join(dir, "ca.crt")}
	settings, err := info.ClientConfig()
	if err != nil {
		b.Fatal(err)
	}
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{at}, TLS: settings, Logger: zap.NewNop()})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(b.ctx, 40*time.Second)
	defer cancel()
	for i := 0; !stop(); i++ {
		try, end := context.WithTimeout(ctx, 5*time.Second)
		_, err := c.Put(try, fmt.Sprintf("/stuff/%05d", i), strings.Repeat("x", 256<<10))
		end()
		if ctx.Err() != nil {
			b.Fatalf("the disk does not become full: %v", err)
		}
	}
}

// TestRunbookFullDisk fills the disk that has one node's member of the catalogue: the member fails and says why, the node goes on through the others, its guests' I/O does not notice, and when there
// is room again the member votes again by itself.
func TestRunbookFullDisk(t *testing.T) {
	w := newCrowd(t, 3, loopback)
	one, two := w.nodes[0], w.nodes[1]
	one.untilVote("node1", "node2", "node3")
	two.stopServe()
	two.room(320)
	two.startServe()
	one.untilVote("node1", "node2", "node3")
	one.cli("node", "tag", "node2", "n2")
	w.volumeOn("v", "n2", two)
	guests, stop := two.steadyGuests([]string{"v"})
	ballast := filepath.Join(two.etcd(), "ballast")
	two.fill(ballast)
	host, port, err := net.SplitHostPort(w.c.Host(0))
	if err != nil {
		t.Fatal(err)
	}
	first, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	one.stuff("https://"+net.JoinHostPort(host, strconv.Itoa(first+2)), func() bool { return strings.HasPrefix(one.members()["node2"].Member, "failed") })
	t.Logf("failed after %v: %s", time.Since(began).Round(time.Millisecond), one.members()["node2"].Member)
	one.says(one.doctor(), "the member of the catalogue on node node2 failed", "no space left")
	two.says(two.cli("status"), "2 of 3 members of the catalogue vote")
	two.cli("setting", "set", "replica-auto-balance", "disabled")
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	one.untilVote("node1", "node2", "node3")
	t.Logf("votes again %v after there was room", time.Since(began).Round(time.Millisecond))
	stop()
	for _, g := range guests {
		t.Logf("%d operations, the longest %v", g.ops.Load(), time.Duration(g.worst.Load()).Round(time.Millisecond))
		if g.err != nil || g.ops.Load() == 0 {
			t.Errorf("a guest meanwhile: %v", g.err)
		}
	}
}
