//go:build integration

package testbed_test

import (
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ashlar/internal/identity"
	"ashlar/internal/testbed"
)

// The tests of this file do what docs/operate/cluster.md says, with the commands that stand there.

// sub runs a part of a test on the same cluster; after one that failed there is no other.
func (w *crowd) sub(name string, f func(w *crowd)) {
	w.Helper()
	start := time.Now()
	ok := w.Run(name, func(t *testing.T) {
		c := *w
		c.T, c.nodes = t, nil
		for i := range w.c.Nodes {
			c.adopt(i)
		}
		f(&c)
	})
	if !ok {
		w.FailNow()
	}
	w.Logf("%s: %v", name, time.Since(start).Round(100*time.Millisecond))
	for i := len(w.nodes); i < len(w.c.Nodes); i++ {
		w.adopt(i)
	}
}

// doctor is what `ashlar doctor` says on a node.
func (b *bed) doctor() string {
	b.Helper()
	cmd := exec.CommandContext(b.ctx, b.p.Bin, "doctor")
	cmd.Env = append(os.Environ(), "ASHLAR_RUN_DIR="+b.p.RunDir, "ASHLAR_DATA_DIR="+b.p.DataDir)
	out, _ := cmd.CombinedOutput() // its exit code says that it found something
	return string(out)
}

// says wants words in what a command or a page of it said.
func (b *bed) says(text string, words ...string) {
	b.Helper()
	for _, word := range words {
		if !strings.Contains(text, word) {
			b.Errorf("it does not say %q:\n%s", word, text)
		}
	}
}

// volumeOn creates a volume whose copy is on a node, named by its tag, and attaches it on another.
func (w *crowd) volumeOn(volume, tag string, at *bed) {
	w.Helper()
	w.nodes[0].cli("volume", "create", volume, "--size", "64Mi", "--node-selector", tag)
	w.nodes[0].cli("volume", "attach", volume, "--node", at.p.Name, "--frontend", "nbd")
}

// stopServe stops serve as systemd does.
func (b *bed) stopServe() {
	b.Helper()
	pid := b.p.PID("serve")
	if pid == 0 {
		b.Fatal("no serve runs")
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		b.Fatal(err)
	}
	if err := b.p.WaitServe(); err != nil {
		b.Log(err)
	}
}

func (b *bed) startServe() {
	b.Helper()
	if err := b.p.StartServe(b.ctx); err != nil {
		b.Fatal(err)
	}
}

func (b *bed) etcd() string { return filepath.Join(b.p.DataDir, "etcd") }

// untilDown waits until a node is missed.
func (b *bed) untilDown(names ...string) {
	b.Helper()
	b.until(20*time.Second, strings.Join(names, ", ")+" is missed", func() bool {
		m := b.members()
		for _, n := range names {
			if m[n].State != "down" {
				return false
			}
		}
		return m != nil
	})
}

// untilVote waits until the members of these nodes vote.
func (b *bed) untilVote(names ...string) {
	b.Helper()
	b.until(40*time.Second, strings.Join(names, ", ")+" vote", func() bool {
		m := b.members()
		for _, n := range names {
			if m[n].Member != "voter" || m[n].State != "up" {
				return false
			}
		}
		return m != nil
	})
}

// TestRunbooks goes through the runbooks on one cluster of three, which is four for a while.
func TestRunbooks(t *testing.T) {
	w := newCrowd(t, 3, loopback)
	for i, b := range w.nodes {
		b.cli("node", "tag", b.p.Name, "n"+string(rune('1'+i)))
	}
	w.sub("healthy", (*crowd).runHealthy)
	w.sub("lose a node", (*crowd).runLostNode)
	w.sub("lose a disk", (*crowd).runLostDisk)
	w.sub("lose a member", (*crowd).runLostMember)
	w.sub("certificates", (*crowd).runCertificates)
	w.sub("restore the catalogue", (*crowd).runRestore)
	w.sub("stop and start everything", (*crowd).runStopAll)
	w.sub("replace a machine", (*crowd).runReplace)
	w.sub("lose the majority", (*crowd).runLostMajority)
}

func (w *crowd) runHealthy() {
	for _, b := range w.nodes {
		b.says(b.cli("status"), "State:    ready", "3 (3 up); 3 of 3 members of the catalogue vote")
		out := b.doctor()
		b.says(out, "3 nodes, all up", "3 of 3 members of the catalogue vote", "ca.crt until", "node.pem until")
		if strings.Contains(out, "problem") {
			b.Errorf("doctor on a healthy cluster:\n%s", out)
		}
	}
	if out := w.nodes[1].cli("events"); strings.Contains(out, "nothing is heard") {
		w.Errorf("a node that becomes a voter is taken for dead:\n%s", out)
	}
}

// runLostNode: what lies elsewhere goes on; what was attached on the node is taken from it; what lies on it waits.
func (w *crowd) runLostNode() {
	one := w.nodes[0]
	w.volumeOn("elsewhere", "n2", one)
	w.volumeOn("there", "n1", w.nodes[2])
	w.volumeOn("waits", "n3", one)
	for _, v := range []string{"elsewhere", "waits"} {
		one.qemuIO(v, "write -P 5 0 4M", "flush")
	}
	w.nodes[2].qemuIO("there", "write -P 6 0 4M", "flush")
	if err := w.c.KillNode(w.ctx, 2); err != nil {
		w.Fatal(err)
	}
	one.untilDown("node3")
	one.says(one.cli("status"), "3 (1 down, 2 up); 2 of 3 members of the catalogue vote", "node node3: down", "volume there:", "volume waits:")
	one.says(one.doctor(), "node node3 is down", "2 of 3 members of the catalogue vote: if one more fails")
	one.says(one.cli("events"), "nothing is heard") // which nobody says who only changes what he is, here and in TestRunbookAddress
	one.qemuIO("elsewhere", "read -P 5 0 4M", "write -P 7 0 4M", "flush")
	one.until(10*time.Second, "it says why a volume waits", func() bool {
		v := one.volume("waits")
		return v.State == "attached" && v.Robustness == "unknown" && strings.Contains(v.Error, "node3")
	})
	var guest sync.WaitGroup
	defer guest.Wait()
	guest.Go(func() {
		if out, err := one.tryQemuIO(one.uri("waits"), "read -P 5 0 4M"); err != nil {
			w.Errorf("a guest whose copy was away for a while: %v%s", err, out)
		}
	})
	one.cli("volume", "detach", "there", "--force")
	one.cli("volume", "attach", "there", "--node", "node1", "--frontend", "nbd")
	one.qemuIO("there", "read -P 6 0 4M", "write -P 8 0 4M", "flush")
	one.cli("volume", "create", "new", "--size", "16Mi")
	one.cli("volume", "delete", "new")
	w.nodes[2].startServe()
	w.untilWhole(3)
	guest.Wait()
	one.until(10*time.Second, "the volume is healthy again", func() bool { return one.volume("waits").Robustness == "healthy" })
	one.untilVote("node1", "node2", "node3")
	one.qemuIO("there", "read -P 8 0 4M")
	if _, err := os.Stat(w.nodes[2].socket("there")); err == nil {
		w.Error("the node that is back still serves the volume that was taken from it")
	}
	for _, v := range []string{"elsewhere", "there", "waits"} {
		one.cli("volume", "detach", v)
		one.cli("volume", "delete", v)
	}
}

// runLostDisk: its file system is not there after a boot; it comes back; and then it is lost for good.
func (w *crowd) runLostDisk() {
	one, two := w.nodes[0], w.nodes[1]
	at := two.path("second")
	if err := os.Mkdir(at, 0o700); err != nil {
		w.Fatal(err)
	}
	one.tool("truncate", "-s", "200M", two.path("second.img"))
	one.tool("mkfs.ext4", "-q", two.path("second.img"))
	mount := func() { one.tool("mount", "-o", "loop", two.path("second.img"), at) }
	mount()
	w.Cleanup(func() { syscall.Unmount(at, syscall.MNT_DETACH) })
	one.cli("disk", "add", "node2/second", at, "--tag", "second")
	one.cli("volume", "create", "d", "--size", "64Mi", "--disk-selector", "second")
	one.cli("volume", "attach", "d", "--node", "node1", "--frontend", "nbd")
	one.qemuIO("d", "write -P 3 0 8M", "flush")
	without := func() {
		if err := w.c.KillNode(w.ctx, 1); err != nil {
			w.Fatal(err)
		}
		one.until(10*time.Second, "the file system is unmounted", func() bool { return syscall.Unmount(at, 0) == nil }) // a killed process takes a moment to let go
		two.startServe()
		w.untilWhole(3)
	}
	without()
	one.until(10*time.Second, "the disk is said to be away", func() bool {
		return strings.Contains(one.cli("disk", "list"), "not ready")
	})
	one.until(20*time.Second, "and why", func() bool { return strings.Contains(one.cli("status"), "is it mounted?") })
	one.says(one.doctor(), "volume d")
	if left, err := os.ReadDir(at); err != nil || len(left) != 0 {
		w.Errorf("the empty mount point has %v, %v", left, err)
	}
	mount()
	one.until(20*time.Second, "the disk is ready again", func() bool { return !strings.Contains(one.cli("disk", "list"), "not ready") })
	one.qemuIO("d", "read -P 3 0 8M", "write -P 4 0 8M")
	without()
	one.cli("volume", "detach", "d", "--force")
	one.until(20*time.Second, "the disk is given up", func() bool { // not before its node has tried it
		_, err := one.p.Text(one.ctx, "disk", "remove", "node2/second", "--force")
		return err == nil
	})
	one.until(20*time.Second, "the volume that was there only is said to be lost", func() bool { return one.volume("d").Robustness == "faulted" })
	one.cli("volume", "delete", "d")
	one.until(20*time.Second, "the disk is forgotten", func() bool { return !strings.Contains(one.cli("disk", "list"), "node2/second") })
}

// rejoinThrough has a machine that was removed join again through another, with an empty data directory.
func (w *crowd) rejoinThrough(i, through int) {
	w.Helper()
	b := w.nodes[i]
	b.tool("rm", "-rf", b.p.DataDir)
	b.tool("mkdir", b.p.DataDir)
	b.startServe()
	if err := w.c.Join(w.ctx, i, through); err != nil {
		w.Fatal(err)
	}
}

// runLostMember damages the files of one member, and has it begin anew.
func (w *crowd) runLostMember() {
	one, two := w.nodes[0], w.nodes[1]
	two.stopServe()
	if err := os.WriteFile(filepath.Join(two.etcd(), "member", "snap", "db"), make([]byte, 64*kib), 0o600); err != nil {
		w.Fatal(err)
	}
	two.startServe()
	one.until(20*time.Second, "the member is said to have failed", func() bool { return strings.HasPrefix(one.members()["node2"].Member, "failed") })
	w.Log(one.cli("node", "list"))
	one.says(one.doctor(), "the member of the catalogue on node node2 failed")
	two.cli("setting", "set", "replica-auto-balance", "disabled")
	two.stopServe()
	one.tool("mv", two.etcd(), two.etcd()+".bad")
	two.startServe()
	one.untilVote("node1", "node2", "node3")
	one.tool("rm", "-rf", two.etcd()+".bad")
}

// stale replaces a node's certificate by one that was made so long ago. Its serve must not run.
func (w *crowd) stale(b *bed, ago time.Duration) {
	w.Helper()
	old := func() time.Time { return time.Now().Add(-ago) }
	ca, err := identity.ReadAuthority(filepath.Join(w.nodes[0].p.DataDir, "cluster", "ca.key"), old)
	if err != nil {
		w.Fatal(err)
	}
	leaf := b.certificate()
	key, request, err := identity.NewNodeRequest()
	if err != nil {
		w.Fatal(err)
	}
	path := strings.Split(strings.Trim(leaf.URIs[0].Path, "/"), "/")
	cert, err := ca.SignNode(request, identity.Node{ClusterID: leaf.URIs[0].Host, NodeID: path[0], Name: leaf.Subject.CommonName, Host: "127.0.0.1"})
	if err != nil {
		w.Fatal(err)
	}
	if err := identity.WriteFile(b.pem(), append(key, cert...), 0o600); err != nil {
		w.Fatal(err)
	}
}

func (b *bed) pem() string { return filepath.Join(b.p.DataDir, "cluster", "node.pem") }

// certificate is that which a node shows.
func (b *bed) certificate() *x509.Certificate {
	b.Helper()
	data, err := os.ReadFile(b.pem())
	if err != nil {
		b.Fatal(err)
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		leaf, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			b.Fatal(err)
		}
		return leaf
	}
	b.Fatal("no certificate")
	return nil
}

const day = 24 * time.Hour

// runCertificates: one that has little left is renewed while the node runs; one that ended is renewed at the start by a voter, and by another node with a join token.
func (w *crowd) runCertificates() {
	four := w.fourth()
	one, two := w.nodes[0], w.nodes[1]
	four.says(four.doctor(), "node.pem until")
	w.stale(four, 70*day)
	four.says(four.doctor(), "should have been renewed by now")
	w.stale(two, 70*day)
	for _, b := range []*bed{two, four} {
		b.until(25*time.Second, b.p.Name+" renews its certificate", func() bool { return time.Until(b.certificate().NotAfter) > 80*day })
	}

	two.stopServe()
	four.stopServe()
	w.stale(two, 100*day)
	w.stale(four, 100*day)
	two.says(two.doctor(), "node.pem ended on")
	two.startServe()
	if left := time.Until(two.certificate().NotAfter); left < 80*day {
		w.Errorf("a voter's certificate that had ended is good for %v", left)
	}
	one.untilVote("node1", "node2", "node3")

	cmd := exec.Command(four.p.Bin, "serve", "--data-dir", four.p.DataDir, "--run-dir", four.p.RunDir, "--listen", four.p.Listen, "--name", four.p.Name)
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		w.Fatal(err)
	}
	four.until(20*time.Second, "it says that it waits", func() bool {
		_, err := four.p.Text(w.ctx, "volume", "list")
		return err != nil && strings.Contains(err.Error(), "waiting for a majority")
	})
	four.says(four.doctor(), "node.pem ended on")
	token := strings.TrimSpace(one.cli("cluster", "token"))
	four.cli("node", "join", w.c.Host(0), "--token", token)
	one.until(20*time.Second, "it is back", func() bool { return one.ready("node4") })
	if left := time.Until(four.certificate().NotAfter); left < 80*day {
		w.Errorf("the certificate of a node that joined again is good for %v", left)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	cmd.Wait()
	w.Log(said.String())
	four.startServe()
	one.until(20*time.Second, "it is back", func() bool { return one.ready("node4") })
	four.says(four.doctor(), "node.pem until")
}

// fourth is a node that keeps no member of the catalogue, added when it is asked for first.
func (w *crowd) fourth() *bed {
	w.Helper()
	if len(w.nodes) > 3 {
		return w.nodes[3]
	}
	if _, err := w.c.Add(w.ctx); err != nil {
		w.Fatal(err)
	}
	if err := w.c.Join(w.ctx, 3, 1); err != nil {
		w.Fatal(err)
	}
	four := w.adopt(3)
	w.untilWhole(4)
	four.cli("node", "tag", "node4", "n4")
	return four
}

// runRestore loses the catalogue on all nodes, and brings a backup back that is older than one of the volumes and knows nothing of another.
func (w *crowd) runRestore() {
	one := w.nodes[0]
	w.fourth()
	w.volumeOn("old", "n2", one)
	one.qemuIO("old", "write -P 1 0 4M", "flush")
	one.cli("volume", "detach", "old")
	w.volumeOn("still", "n3", one)
	one.qemuIO("still", "write -P 4 0 4M", "flush")
	file := one.path("catalogue.json")
	one.cli("cluster", "backup", file)
	one.cli("volume", "attach", "old", "--node", "node4", "--frontend", "nbd")
	w.nodes[3].qemuIO("old", "write -P 2 1M 1M", "flush")
	one.cli("volume", "detach", "old")
	w.volumeOn("young", "n2", one)
	one.qemuIO("young", "write -P 3 0 4M", "flush")
	one.cli("volume", "detach", "young")

	for _, b := range w.nodes {
		b.stopServe()
	}
	for _, b := range w.nodes[:3] {
		one.tool("mv", b.etcd(), b.etcd()+".old")
	}
	one.says(one.cli("cluster", "restore", file, "--data-dir", one.p.DataDir), "records of cluster")
	one.startServe()
	for _, b := range w.nodes[1:] {
		b.startServe()
	}
	one.untilVote("node1", "node2", "node3")
	w.untilWhole(4)
	one.qemuIO("still", "read -P 4 0 4M", "write -P 5 0 4M") // it was attached all the time
	if _, err := one.p.Text(w.ctx, "volume", "attach", "old", "--timeout", "5s", "--frontend", "nbd"); err == nil || !strings.Contains(err.Error(), "recover") {
		w.Errorf("a volume that was opened after the backup: %v", err)
	}
	one.p.Text(w.ctx, "volume", "detach", "old", "--force")
	for _, b := range w.nodes {
		b.stopServe()
		w.Log(b.cli("recover", b.disk(), "--data-dir", b.p.DataDir))
		b.startServe()
	}
	w.untilWhole(4)
	one.cli("volume", "attach", "old", "--frontend", "nbd")
	one.qemuIO("old", "read -P 1 0 1M", "read -P 2 1M 1M", "read -P 1 2M 2M")
	one.cli("volume", "attach", "young", "--frontend", "nbd")
	one.qemuIO("young", "read -P 3 0 4M")
	one.qemuIO("still", "read -P 5 0 4M")
	for _, v := range []string{"old", "young", "still"} {
		one.cli("volume", "detach", v)
		one.cli("volume", "delete", v)
	}
	for _, b := range w.nodes[:3] {
		one.tool("rm", "-rf", b.etcd()+".old")
	}
}

// runStopAll shuts everything down with a volume attached, and starts it again.
func (w *crowd) runStopAll() {
	one := w.nodes[0]
	w.fourth()
	w.volumeOn("a", "n2", one)
	one.qemuIO("a", "write -P 1 0 4M", "flush")
	one.refused(exitConflict, []string{"volume"}, "shutdown")
	for i := len(w.nodes) - 1; i >= 0; i-- {
		w.nodes[i].cli("shutdown", "--force")
		if err := w.nodes[i].p.WaitServe(); err != nil {
			w.Log(err)
		}
	}
	var busy sync.WaitGroup
	for _, b := range w.nodes {
		busy.Go(func() {
			if err := b.p.StartServe(w.ctx); err != nil {
				w.Error(err)
			}
		})
	}
	busy.Wait()
	w.untilWhole(4)
	one.cli("status", "--until-attached")
	one.qemuIO("a", "read -P 1 0 4M")
	one.cli("volume", "detach", "a")
	one.cli("volume", "delete", "a")
}

// runLostMajority loses two of three voters for good.
func (w *crowd) runLostMajority() {
	one, four := w.nodes[0], w.fourth()
	w.volumeOn("kept", "n1", four)
	w.volumeOn("lost", "n2", one)
	four.qemuIO("kept", "write -P 1 0 4M", "flush")
	for _, i := range []int{1, 2} {
		if err := w.c.KillNode(w.ctx, i); err != nil {
			w.Fatal(err)
		}
	}
	one.until(30*time.Second, "a change is refused", func() bool {
		_, err := one.p.Text(w.ctx, "setting", "set", "replica-auto-balance", "disabled")
		return err != nil
	})
	w.Log(one.refused(exitUnreachable, []string{"the catalogue did not answer", "connection refused"}, "status"))
	one.says(one.doctor(), "node node1 answers, and the catalogue does not")
	four.qemuIO("kept", "read -P 1 0 4M", "write -P 2 0 4M", "flush")
	one.refused(exitConflict, []string{"serve"}, "cluster", "rescue", "--others-are-lost", "--data-dir", one.p.DataDir)
	one.stopServe()
	one.says(one.cli("cluster", "rescue", "--others-are-lost", "--data-dir", one.p.DataDir), "keeps the catalogue alone")
	one.startServe()
	one.untilDown("node2", "node3")
	one.refused(exitConflict, []string{"copies of volumes", "lost"}, "node", "remove", "node2")
	one.cli("node", "remove", "node2", "--force")
	one.cli("node", "remove", "node3", "--force")
	one.untilVote("node1", "node4")
	four.qemuIO("kept", "read -P 2 0 4M", "write -P 3 0 4M", "flush")
	one.cli("volume", "detach", "lost", "--force")
	one.until(10*time.Second, "the volume that was there only is said to be lost", func() bool { return one.volume("lost").Robustness == "faulted" })
	one.cli("volume", "delete", "lost")
	four.cli("volume", "detach", "kept")
	four.cli("volume", "delete", "kept")
}

// runReplace takes a machine out and puts another of its name in.
func (w *crowd) runReplace() {
	one, four := w.nodes[0], w.fourth()
	four.cli("node", "tag", "node4", "n4")
	one.cli("volume", "create", "moved", "--size", "64Mi", "--node-selector", "n4")
	one.cli("volume", "attach", "moved", "--frontend", "nbd")
	one.qemuIO("moved", "write -P 1 0 4M", "flush")
	one.cli("volume", "detach", "moved")
	one.refused(exitConflict, []string{"nowhere to go", "moved", "node1"}, "node", "drain", "node4")
	one.cli("node", "tag", "node1", "n1", "n4")
	one.cli("node", "drain", "node4")
	one.cli("node", "remove", "node4")
	if err := four.p.WaitServe(); err == nil {
		w.Error("serve of a removed node ends as if it had been told to")
	}
	four.until(20*time.Second, "its other processes end", func() bool { return four.p.PID("data") == 0 && four.p.PID("hold") == 0 })
	w.rejoinThrough(3, 0)
	w.untilWhole(4)
	one.cli("volume", "attach", "moved", "--frontend", "nbd", "--node", "node4")
	four.qemuIO("moved", "read -P 1 0 4M")
	one.cli("volume", "detach", "moved")
	one.cli("volume", "delete", "moved")
}

// TestRunbookUpgrade puts another version on every node, one after the other, under a guest whose copy is on another node.
func TestRunbookUpgrade(t *testing.T) {
	next := build(t, secondVersion, "")
	defer func(was string) { program = was }(program)
	place := &bed{T: t, ctx: t.Context(), p: &testbed.Process{Bin: filepath.Join(buildDir, "installed")}}
	place.install(program)
	program = place.p.Bin
	w := newCrowd(t, 3, loopback)
	one := w.nodes[0]
	one.cli("node", "tag", "node2", "n2")
	w.volumeOn("v", "n2", one)
	guests, stop := one.steadyGuests([]string{"v"})
	place.install(next)
	for _, b := range w.nodes {
		b.stopServe()
		b.startServe()
		b.cli("upgrade")
		b.dataState(secondVersion) // it is that version's that answers
		one.untilVote("node1", "node2", "node3")
	}
	stop()
	for _, g := range guests {
		t.Logf("%d operations, the longest %v", g.ops.Load(), time.Duration(g.worst.Load()).Round(time.Millisecond))
		if g.err != nil || g.ops.Load() == 0 {
			t.Errorf("a guest under upgrades: %v", g.err)
		}
	}
	w.untilWhole(3)
	if out := one.cli("node", "list"); strings.Count(out, secondVersion) != 3 {
		t.Errorf("not all nodes are upgraded:\n%s", out)
	}
	one.cli("volume", "detach", "v")
}

// TestRunbookAddress gives a node another address: with its serve running while it has both, forgotten, and with its serve stopped.
func TestRunbookAddress(t *testing.T) {
	w := newCrowd(t, 3, namespaces)
	one, three := w.nodes[0], w.nodes[2]
	ip := func(args ...string) { one.tool("ip", append([]string{"-n", w.sw.Namespace(2)}, args...)...) }
	one.tool("nsenter", "--net=/var/run/netns/"+w.sw.Namespace(2), "sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/all/promote_secondaries") // or the second address goes with the first
	ip("addr", "add", "10.83.0.53/24", "dev", "tap0")
	three.cli("cluster", "readdress", "--address", "10.83.0.53")
	ip("addr", "del", "10.83.0.3/24", "dev", "tap0")
	moved := func(to string) {
		one.until(30*time.Second, "node3 is up at "+to, func() bool { return one.ready("node3") && strings.Contains(one.cli("node", "list"), to+":9510") })
		one.untilVote("node1", "node2", "node3")
	}
	moved("10.83.0.53")
	if out := one.cli("events"); strings.Contains(out, "nothing is heard") {
		t.Errorf("a node that changes its address in order is taken for dead:\n%s", out)
	}

	three.refused(exitRefused, []string{"10.83.0.63"}, "cluster", "readdress", "--address", "10.83.0.63") // not this machine's yet
	three.stopServe()
	ip("addr", "add", "10.83.0.63/24", "dev", "tap0")
	ip("addr", "del", "10.83.0.53/24", "dev", "tap0")
	cmd := exec.CommandContext(w.ctx, "nsenter", "--net=/var/run/netns/"+three.p.Namespace, three.p.Bin, "serve", "--data-dir", three.p.DataDir, "--run-dir", three.p.RunDir, "--listen", three.p.Listen, "--name", three.p.Name)
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Error("serve starts with an address that is gone")
	}
	three.says(string(out), "cluster readdress")
	three.cli("cluster", "readdress", "--address", "10.83.0.63", "--data-dir", three.p.DataDir)
	three.startServe()
	moved("10.83.0.63")
}
