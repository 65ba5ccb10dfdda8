package testbed_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"ashlar/internal/api"
	apiclient "ashlar/internal/api/client"
	"ashlar/internal/catalog"
	"ashlar/internal/nbd"
	"ashlar/internal/testbed"
)

// inside is a test with a cluster in this process.
type inside struct {
	*testing.T
	*testbed.Inside
	ctx  context.Context
	log  string          // where all of it writes its log
	made map[string]bool // volumes, for a while
}

// startInside starts n nodes that are one cluster; when the test ends nothing may be left of them, no goroutine either.
func startInside(t *testing.T, n int) *inside {
	t.Helper()
	before := goleak.IgnoreCurrent()
	dir, err := os.MkdirTemp("/tmp", "a")
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			if text, err := os.ReadFile(log.Name()); err == nil {
				t.Logf("%s", text[max(0, len(text)-20000):])
			}
		}
		log.Close()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	start := time.Now()
	c, err := testbed.StartInside(t.Context(), testbed.InsideConfig{Dir: dir, Nodes: n, Log: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelInfo}))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(context.Background()); err != nil {
			t.Error(err)
		}
		var left error
		if testbed.Until(context.Background(), 20*time.Second, func() (bool, error) { left = goleak.Find(before); return left == nil, nil }) != nil {
			t.Errorf("goroutines are left: %v", left)
		}
	})
	t.Logf("%d nodes are a cluster after %v", n, time.Since(start).Round(time.Millisecond))
	return &inside{T: t, Inside: c, ctx: t.Context(), log: log.Name(), made: map[string]bool{}}
}

// until waits until something holds.
func (c *inside) until(limit time.Duration, what string, try func() bool) {
	c.Helper()
	if err := testbed.Until(c.ctx, limit, func() (bool, error) { return try(), nil }); err != nil {
		c.Fatalf("not within %v: %s (%v)", limit, what, err)
	}
}

// whole waits until each of some nodes sees all of them up, and all voters vote.
func (c *inside) whole() {
	c.Helper()
	for _, n := range c.Nodes {
		c.until(40*time.Second, "all is well as seen by "+n.Name, func() bool {
			list, err := n.Client.Nodes(c.ctx)
			well := 0
			for _, m := range list {
				if m.State == api.NodeUp && (!m.Voter || m.Member == "voter") {
					well++
				}
			}
			return err == nil && well == len(c.Nodes)
		})
	}
}

// stored creates a volume whose copy is on one node.
func (c *inside) stored(volume string, on int) {
	c.Helper()
	cl := c.Nodes[on].Client
	tag := "only-" + volume
	if _, err := cl.ChangeNode(c.ctx, c.Nodes[on].Name, apiclient.NodeChange{Tags: []string{tag}}); err != nil {
		c.Fatal(err)
	}
	if _, err := cl.CreateVolume(c.ctx, apiclient.NewVolume{Name: volume, Size: "16Mi", NodeSelector: []string{tag}}); err != nil {
		c.Fatal(err)
	}
	c.volumeIs(on, volume, "detached")
}

// volumeIs waits for a state of a volume, as a node sees it, and returns the volume.
func (c *inside) volumeIs(i int, volume, state string) api.Volume {
	c.Helper()
	var v api.Volume
	c.until(40*time.Second, "volume "+volume+" is "+state+" for "+c.Nodes[i].Name, func() bool {
		var err error
		v, err = c.Nodes[i].Client.Volume(c.ctx, volume)
		return err == nil && v.State == state
	})
	return v
}

// attach attaches a volume on a node, asked on another, and connects to it.
func (c *inside) attach(volume string, on, through int) *nbd.Client {
	c.Helper()
	if _, err := c.Nodes[through].Client.Attach(c.ctx, volume, apiclient.Attachment{Node: c.Nodes[on].Name, Frontend: "nbd"}); err != nil {
		c.Fatal(err)
	}
	var v api.Volume
	c.until(40*time.Second, "volume "+volume+" is offered on "+c.Nodes[on].Name, func() bool {
		v = c.volumeIs(through, volume, "attached")
		return v.Controllers[0].Endpoint != ""
	})
	return c.dial(v)
}

// dial connects to where a volume is offered.
func (c *inside) dial(v api.Volume) *nbd.Client {
	c.Helper()
	ctx, cancel := context.WithTimeout(c.ctx, 20*time.Second)
	defer cancel()
	d, err := nbd.Dial(ctx, v.Controllers[0].Endpoint, nbd.ClientOptions{})
	if err != nil {
		c.Fatal(err)
	}
	return d
}

// TestInside is the life of a cluster in one process: three nodes join, a volume with its copy on one is written on another, a node is stopped in order and comes back, and all of it ends.
func TestInside(t *testing.T) {
	c := startInside(t, 3)
	c.whole()
	if _, err := c.Nodes[0].Client.SetSetting(c.ctx, catalog.SettingWarningFree, "0"); err != nil { // how full this machine is, is nobody's problem in the end
		t.Fatal(err)
	}
	c.stored("v1", 1)
	d := c.attach("v1", 0, 2)
	p := make([]byte, 1<<20)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	if _, err := d.WriteAt(p, 4096); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	read := func(d *nbd.Client) {
		t.Helper()
		got := make([]byte, len(p))
		if _, err := d.ReadAt(got, 4096); err != nil || !bytes.Equal(got, p) {
			t.Errorf("read back: %v, equal: %v", err, bytes.Equal(got, p))
		}
	}
	read(d)

	// The control plane of the volume's node goes and comes back: the connection does not notice.
	if err := c.Nodes[0].StopServe(); err != nil {
		t.Fatal(err)
	}
	read(d)
	if err := c.Nodes[0].StartServe(c.ctx); err != nil {
		t.Fatal(err)
	}
	read(d)
	if err := d.Close(); err != nil {
		t.Error(err)
	}

	// The third node is stopped in order; what the others have goes on, and it comes back.
	if err := c.Nodes[2].Stop(c.ctx); err != nil {
		t.Fatal(err)
	}
	c.until(20*time.Second, "the others see that it is down", func() bool {
		n, err := c.Nodes[0].Client.Node(c.ctx, "node3")
		return err == nil && n.State == api.NodeDown
	})
	if _, err := c.Nodes[1].Client.Detach(c.ctx, "v1", apiclient.Detachment{}); err != nil {
		t.Fatal(err)
	}
	c.volumeIs(1, "v1", "detached")
	if err := c.Nodes[2].Start(c.ctx); err != nil {
		t.Fatal(err)
	}
	c.whole()
	d = c.attach("v1", 2, 0)
	read(d)
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if problems := c.problems(0); len(problems) > 0 {
		t.Errorf("in the end: %v", problems)
	}
}

// problems are what a node says needs attention.
func (c *inside) problems(i int) (out []string) {
	c.Helper()
	o, err := c.Nodes[i].Client.Overview(c.ctx)
	if err != nil {
		c.Fatal(err)
	}
	for _, p := range o.Problems {
		out = append(out, fmt.Sprintf("%s %s: %s", p.Kind, p.Name, p.Message))
	}
	return out
}
