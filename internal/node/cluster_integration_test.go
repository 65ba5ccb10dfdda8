//go:build integration

package node_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"ashlar/internal/testbed"
)

// Exit codes of the command line, docs/cli.md.
const (
	exitUsage       = 2
	exitConflict    = 4
	exitUnreachable = 5
	exitRefused     = 6
)

// joinLimit is how long a join may take, from the command to the node that is ready.
const joinLimit = 5 * time.Second

// program is the binary under test.
func program(t *testing.T) string {
	t.Helper()
	if bin := os.Getenv("ASHLAR_BIN"); bin != "" {
		return bin
	}
	bin := filepath.Join(t.TempDir(), "ashlar")
	if out, err := exec.Command("go", "build", "-o", bin, "ashlar/cmd/ashlar").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return bin
}

// crowd is a test with a cluster of processes.
type crowd struct {
	*testing.T
	*testbed.Cluster
	ctx context.Context
}

// member is what `node list` says of a node.
type member struct {
	Name, Address, State, Member string
}

// nodes asks one node about all of them; nil if it does not answer.
func (c *crowd) nodes(of int) map[string]member {
	var list []member
	if err := c.Nodes[of].Run(c.ctx, &list, "node", "list"); err != nil {
		return nil
	}
	out := map[string]member{}
	for _, m := range list {
		out[m.Name] = m
	}
	return out
}

func (c *crowd) until(what string, limit time.Duration, try func() bool) time.Duration {
	c.Helper()
	start := time.Now()
	if err := testbed.Until(c.ctx, limit, func() (bool, error) { return try(), nil }); err != nil {
		c.Fatalf("not within %v: %s (%v)", limit, what, err)
	}
	return time.Since(start)
}

// voters waits until exactly these nodes keep the catalogue, as one of them says.
func (c *crowd) voters(of int, want ...string) time.Duration {
	c.Helper()
	return c.until(fmt.Sprintf("the voters are %v", want), 30*time.Second, func() bool {
		var now []string
		for _, m := range c.nodes(of) {
			if m.Member == "voter" && m.State == "up" {
				now = append(now, m.Name)
			}
		}
		slices.Sort(now)
		return slices.Equal(now, want)
	})
}

// change writes something through a node, and returns how long it took until that went well.
func (c *crowd) change(through int) time.Duration {
	c.Helper()
	return c.until("a change through "+c.Nodes[through].Name, 30*time.Second, func() bool {
		return c.Nodes[through].Run(c.ctx, nil, "setting", "set", "replica-auto-balance", "disabled") == nil
	})
}

func (c *crowd) do(of int, args ...string) string {
	c.Helper()
	out, err := c.Nodes[of].Text(c.ctx, args...)
	if err != nil {
		c.Fatal(err)
	}
	return out
}

// refused runs a command that must fail with a code, saying something.
func (c *crowd) refused(of, code int, says string, args ...string) {
	c.Helper()
	_, err := c.Nodes[of].Text(c.ctx, args...)
	failed, ok := errors.AsType[*testbed.CommandError](err)
	if !ok || failed.Code != code || !strings.Contains(failed.Stderr, says) {
		c.Errorf("%s: %v; want exit code %d and %q", strings.Join(args, " "), err, code, says)
	}
}

func (c *crowd) kill(i int) {
	c.Helper()
	if err := c.Nodes[i].KillServe(); err != nil {
		c.Fatal(err)
	}
}

func (c *crowd) start(i int) {
	c.Helper()
	if err := c.Nodes[i].StartServe(c.ctx); err != nil {
		c.Fatal(err)
	}
}

// TestClusterLife walks a cluster of real processes through what happens to one: nodes join, whoever leads is killed, addresses change, a member's directory is emptied, a voter is removed and another
// takes its place, everything is off and comes back one by one.
func TestClusterLife(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for i := 1; i <= 4 && t.Failed(); i++ {
			log, _ := os.ReadFile(filepath.Join(dir, fmt.Sprint(i), "serve.log"))
			t.Logf("node%d:\n%s", i, log[max(0, len(log)-5000):])
		}
		os.RemoveAll(dir)
	})
	c := &crowd{T: t, ctx: t.Context()}
	if c.Cluster, err = testbed.StartCluster(c.ctx, testbed.ClusterConfig{Bin: program(t), Dir: dir, Nodes: 1}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(context.Background()); err != nil {
			t.Log(err)
		}
	})
	c.joins()
	c.leaderKilled()
	c.readdressed()
	c.emptied()
	c.removed()
	c.allOff()
	c.rescued()
}

// joins adds three nodes, with what is refused on the way.
func (c *crowd) joins() {
	for i := 1; i <= 3; i++ {
		if _, err := c.Add(c.ctx); err != nil {
			c.Fatal(err)
		}
	}
	token := strings.TrimSpace(c.do(0, "cluster", "token"))
	join := []string{"node", "join", c.Host(0), "--token", token, "--address", c.Host(1)}
	c.do(1, "volume", "create", "mine", "--size", "1Mi")
	c.refused(1, exitConflict, "volume mine", join...)
	c.do(1, "volume", "delete", "mine")
	c.refused(0, exitConflict, "in a cluster already", "cluster", "init", "--address", c.Host(0))
	c.refused(1, exitRefused, "not a join token", "node", "join", c.Host(0), "--token", "x", "--address", c.Host(1))
	for i := 1; i <= 3; i++ {
		start := time.Now()
		if err := c.Join(c.ctx, i, max(0, i-2)); err != nil {
			c.Fatal(err)
		}
		took := time.Since(start)
		c.Logf("%s joined in %v", c.Nodes[i].Name, took.Round(time.Millisecond))
		if took > joinLimit {
			c.Errorf("it took more than %v", joinLimit)
		}
	}
	c.do(2, append(join[:4:4], token, "--address", c.Host(2))...) // who did not hear that it went well
	c.voters(3, "node1", "node2", "node3")
	if _, err := os.Stat(filepath.Join(c.Nodes[3].DataDir, "cluster", "ca.key")); err == nil {
		c.Error("a node that is no voter has the authority's key")
	}
	// What lies on a disk that came along is the cluster's.
	c.do(3, "volume", "create", "v", "--size", "1Mi")
	c.until("the volume is placed", 20*time.Second, func() bool {
		var v struct{ State string }
		return c.Nodes[2].Run(c.ctx, &v, "volume", "show", "v") == nil && v.State == "detached"
	})
	c.do(2, "volume", "delete", "v")
}

// leaderKilled kills the first node's serve: the others go on.
func (c *crowd) leaderKilled() {
	c.kill(0)
	c.Logf("a change %v after the first node's serve was killed", c.change(1).Round(time.Millisecond))
	c.until("it is missed", 20*time.Second, func() bool { return c.nodes(3)["node1"].State == "down" })
	c.start(0)
	c.voters(0, "node1", "node2", "node3")
}

// readdressed gives two nodes the other name of loopback: one whose serve runs, and one whose does not.
func (c *crowd) readdressed() {
	port := func(i int) string { return c.Host(i)[strings.LastIndex(c.Host(i), ":")+1:] }
	c.refused(2, exitRefused, "not this machine's", "cluster", "readdress", "--address", "192.0.2.1")
	c.do(2, "cluster", "readdress", "--address", "localhost:"+port(2))
	c.kill(3)
	c.do(3, "cluster", "readdress", "--address", "localhost:"+port(3), "--data-dir", c.Nodes[3].DataDir)
	c.start(3)
	for _, i := range []int{2, 3} {
		c.until("the new address is known", 20*time.Second, func() bool { return c.nodes(0)[c.Nodes[i].Name].Address == "localhost" })
	}
	c.voters(0, "node1", "node2", "node3")
	c.change(3)
}

// emptied takes a voter's member away: it never votes without what it acknowledged, and comes back as a learner.
func (c *crowd) emptied() {
	c.kill(1)
	if err := os.RemoveAll(filepath.Join(c.Nodes[1].DataDir, "etcd")); err != nil {
		c.Fatal(err)
	}
	c.start(1)
	c.Logf("a member with an emptied directory votes again after %v", c.voters(0, "node1", "node2", "node3").Round(time.Millisecond))
}

// removed takes a voter out; the fourth node becomes one, and what was removed is not let in again.
func (c *crowd) removed() {
	c.do(1, "shutdown")
	if err := c.Nodes[1].WaitServe(); err != nil {
		c.Error(err)
	}
	c.until("it is missed", 20*time.Second, func() bool { return c.nodes(0)["node2"].State == "down" })
	start := time.Now()
	c.do(0, "node", "remove", "node2")
	c.voters(0, "node1", "node3", "node4")
	c.Logf("another voter in place of the removed one after %v", time.Since(start).Round(time.Millisecond))
	for offset := 1; offset <= 2; offset++ { // etcd's ports, peers and clients
		if err := c.answers(0, offset, 1); err == nil {
			c.Errorf("a removed node is let in at port + %d", offset)
		}
		if err := c.answers(0, offset, 2); err != nil {
			c.Errorf("a node is not let in at port + %d: %v", offset, err)
		}
	}
	ctx, cancel := context.WithTimeout(c.ctx, 20*time.Second)
	defer cancel()
	p := c.Nodes[1]
	out, err := exec.CommandContext(ctx, p.Bin, "serve", "--data-dir", p.DataDir, "--run-dir", p.RunDir, "--listen", p.Listen, "--name", p.Name).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "was removed from its cluster") {
		c.Errorf("a removed node started: %v\n%s", err, out)
	}
	if _, ok := c.nodes(0)["node2"]; ok {
		c.Error("a removed node has a record again")
	}
}

// answers connects to a port of a node's, counted from its first, as another node, and says something: what comes back is an answer, or the end.
func (c *crowd) answers(of, offset, as int) error {
	c.Helper()
	file := filepath.Join(c.Nodes[as].DataDir, "cluster", "node.pem")
	cert, err := tls.LoadX509KeyPair(file, file)
	if err != nil {
		c.Fatal(err)
	}
	host, port, err := net.SplitHostPort(c.Host(of))
	if err != nil {
		c.Fatal(err)
	}
	first, err := strconv.Atoi(port)
	if err != nil {
		c.Fatal(err)
	}
	protocol, says := "http/1.1", "GET /version HTTP/1.0\r\n\r\n"
	if offset == 2 {
		protocol, says = "h2", "" // it is the server that begins
	}
	// Whom it speaks to is not what is asked here.
	d := tls.Dialer{Config: &tls.Config{Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true, NextProtos: []string{protocol}}}
	conn, err := d.DialContext(c.ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(first+offset)))
	if err != nil {
		c.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		c.Fatal(err)
	}
	if _, err := conn.Write([]byte(says)); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	return err
}

// allOff ends every serve. The first that comes back waits for the others, and says so.
func (c *crowd) allOff() {
	for _, i := range []int{0, 2, 3} {
		c.kill(i)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.Nodes[0].StartServe(c.ctx); err != nil {
			c.Error(err)
		}
	})
	c.until("the API answers without a majority", 10*time.Second, func() bool {
		_, err := c.Nodes[0].Text(c.ctx, "volume", "list")
		failed, ok := errors.AsType[*testbed.CommandError](err)
		return ok && failed.Code == exitUnreachable && strings.Contains(failed.Stderr, "waiting for a majority")
	})
	c.start(2)
	wg.Wait()
	c.start(3)
	c.voters(2, "node1", "node3", "node4")
	c.change(0)
}

// rescued loses two of three voters for good: the last one goes on alone once somebody says so.
func (c *crowd) rescued() {
	for _, i := range []int{2, 3} {
		if err := c.KillNode(c.ctx, i); err != nil {
			c.Fatal(err)
		}
	}
	c.kill(0)
	c.refused(0, exitUsage, "--others-are-lost", "cluster", "rescue", "--data-dir", c.Nodes[0].DataDir)
	c.do(0, "cluster", "rescue", "--others-are-lost", "--data-dir", c.Nodes[0].DataDir)
	c.start(0)
	c.change(0)
	c.until("they are missed", 20*time.Second, func() bool { n := c.nodes(0); return n["node3"].State == "down" && n["node4"].State == "down" })
	for _, node := range []string{"node3", "node4"} {
		c.do(0, "node", "remove", node, "--force")
	}
	c.voters(0, "node1")
}
