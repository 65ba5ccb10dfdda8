//go:build integration

package testbed_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"ashlar/internal/testbed"
)

// stranger starts a node that is in no cluster with two, called what it is told, whose files are the test's.
func (w *crowd) stranger(bin, name string) *bed {
	w.Helper()
	dir := scratch(w.T)
	p := &testbed.Process{Bin: bin, Name: name, Listen: "none"}
	if err := p.Start(w.ctx, dir); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		if err := p.Stop(context.Background()); err != nil {
			w.Log(err)
		}
		noneLeft(w.T, dir)
	})
	return &bed{T: w.T, ctx: w.ctx, dir: dir, p: p}
}

// records is what a cluster holds but for what passes: who its nodes are, how they stand and what they allow, and its volumes.
func (w *crowd) records() string {
	w.Helper()
	var nodes []struct {
		Name, Address, State               string // not Member: the second one votes after a while
		AllowScheduling, EvictionRequested bool
		Tags                               []string
		Disks                              map[string]struct{ Path, DiskUUID string }
	}
	w.nodes[0].json(&nodes, "node", "list")
	var volumes []volumeView
	w.nodes[0].json(&volumes, "volume", "list")
	return fmt.Sprintf("%+v\n%+v", nodes, volumes)
}

// TestClusterRefusals asks a cluster of two for what it must refuse; afterwards it is as it was.
func TestClusterRefusals(t *testing.T) {
	w := newCrowd(t, 2, loopback)
	one, two := w.nodes[0], w.nodes[1]
	before := w.records()
	token := func() string { return strings.TrimSpace(one.cli("cluster", "token")) }
	s := w.stranger(program, "node2")
	port := 29500
	join := func(token string) []string {
		port += 10
		return []string{"node", "join", w.c.Host(0), "--token", token, "--address", "127.0.0.1:" + strconv.Itoa(port)}
	}
	good := token()
	s.refused(exitRefused, []string{"not a join token"}, join("nonsense")...)
	s.refused(exitConflict, []string{"a node called node2 already"}, join(good)...)
	s.refused(exitRefused, nil, join(good[:len(good)-4])...)
	s.cli("volume", "create", "mine", "--size", "1Mi")
	s.refused(exitConflict, []string{"volume mine"}, join(token())...)
	s.cli("volume", "delete", "mine")

	// A cluster of its own: its token is of no use here, nor its certificate, nor its data directory.
	s.cli("cluster", "init", "--address", "127.0.0.1:29900")
	theirs := strings.TrimSpace(s.cli("cluster", "token"))
	other := w.stranger(program, "node9")
	t.Log(other.refused(exitRefused, nil, join(theirs)...))
	s.refused(exitConflict, []string{"in a cluster already"}, join(good)...)
	curl := func(b *bed) (string, error) {
		pem := filepath.Join(b.p.DataDir, "cluster", "node.pem")
		out, err := exec.Command("curl", "-ksS", "-m", "5", "--cert", pem, "-H", "Ashlar-Node-Api: 1-1", "https://"+w.c.Host(0)+"/v1/nodes").CombinedOutput()
		return string(out), err
	}
	if out, err := curl(two); err != nil || !strings.Contains(out, "node2") {
		t.Errorf("with a node's own certificate: %v %s", err, out)
	}
	if out, err := curl(s); err == nil {
		t.Errorf("with another cluster's certificate: %s", out)
	}
	disk := s.path("d")
	s.tool("mkdir", disk)
	s.cli("disk", "add", "node2/d", disk)
	s.until(10*time.Second, "it is a disk of the other cluster", func() bool { return !strings.Contains(s.cli("disk", "list"), "not ready") })
	s.cli("disk", "cordon", "node2/d")
	s.cli("disk", "remove", "node2/d")
	one.cli("disk", "add", "node1/d", disk)
	one.until(20*time.Second, "a disk of another cluster is not taken", func() bool {
		return strings.Contains(one.cli("status"), "cluster") && strings.Contains(one.cli("disk", "show", "node1/d"), "cluster")
	})
	t.Log(one.cli("disk", "show", "node1/d"))
	one.cli("disk", "cordon", "node1/d")
	one.cli("disk", "remove", "node1/d")

	// Nodes of other versions; and a token is good once.
	strange := filepath.Join(buildDir, "strange")
	if text, err := exec.Command("go", "build", "-ldflags", "-X main.version=9.0.0 -X ashlar/internal/cluster.nodeWindow=7-9", "-o", strange, "ashlar/cmd/ashlar").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	late := w.stranger(strange, "node8")
	late.refused(exitFailed, []string{"7-9", "1-1", "upgrade"}, join(good)...)

	late.refused(exitFailed, []string{"7-9"}, join(good)...)
	third := w.stranger(program, "node7")
	third.cli(join(good)...)
	fourth := w.stranger(program, "node6")
	fourth.refused(exitConflict, []string{"was used by node node7"}, join(good)...)
	if tokens := one.cli("cluster", "token", "list"); !strings.Contains(tokens, "node7") {
		t.Errorf("nobody says who joined:\n%s", tokens)
	}
	taken := token()
	var names []struct{ Name, UsedBy string }
	if err := json.Unmarshal([]byte(one.cli("cluster", "token", "list", "-o", "json")), &names); err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if n.UsedBy == "" {
			one.cli("cluster", "token", "delete", n.Name)
		}
	}
	fourth.refused(exitNotFound, []string{"it was deleted"}, join(taken)...)
	third.cli("shutdown")
	if err := third.p.WaitServe(); err != nil {
		t.Log(err)
	}
	one.untilDown("node7")
	one.cli("node", "remove", "node7")
	one.until(20*time.Second, "it is forgotten", func() bool { _, ok := one.members()["node7"]; return !ok })

	// What lies here has nowhere to go; nobody who runs is removed, nor the last.
	one.cli("node", "tag", "node1", "only")
	one.cli("volume", "create", "v", "--size", "1Mi", "--node-selector", "only")
	one.refused(exitConflict, []string{"nowhere to go", "volume v", "node2"}, "node", "evict", "node1")
	one.refused(exitConflict, []string{"is running"}, "node", "remove", "node2")
	one.cli("volume", "delete", "v")
	one.cli("node", "tag", "node1", "--none")
	if after := w.records(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}
