//go:build integration

package testbed_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ashlar/internal/testbed"
)

// crowd is a test with a cluster of its own: a bed on every node.
type crowd struct {
	*testing.T
	ctx   context.Context
	c     *testbed.Cluster
	sw    *testbed.Switch // nil: loopback
	nodes []*bed
}

// network is where a crowd's nodes listen.
type network int

const (
	loopback   network = iota
	namespaces         // each in its own, on a switch
)

// newCrowd starts n nodes that are one cluster, each with more arguments of serve; when the test ends nothing may be left of them.
func newCrowd(t *testing.T, n int, where network, args ...string) *crowd {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "a")
	if err != nil {
		t.Fatal(err)
	}
	w := &crowd{T: t, ctx: t.Context()}
	t.Cleanup(func() {
		if t.Failed() {
			w.logs(dir)
		}
		noneLeft(t, dir)
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if where == namespaces {
		if w.sw, err = testbed.NewSwitch("ashlar-"+filepath.Base(dir), n); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := w.sw.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	w.c, err = testbed.StartCluster(w.ctx, testbed.ClusterConfig{Bin: program, Dir: dir, Nodes: n, Switch: w.sw, Args: args, Tell: func(what string) { t.Log(what) }})
	if err != nil {
		w.logs(dir)
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if w.sw != nil {
			w.sw.Heal()
		}
		if err := w.c.Stop(context.Background()); err != nil && !t.Failed() {
			t.Error(err)
		}
	})
	for i := range n {
		w.adopt(i)
	}
	w.untilWhole(n)
	return w
}

// adopt makes the bed of a node that was started.
func (w *crowd) adopt(i int) *bed {
	b := &bed{T: w.T, ctx: w.ctx, dir: filepath.Dir(w.c.Nodes[i].RunDir), p: w.c.Nodes[i]}
	w.nodes = append(w.nodes, b)
	return b
}

func (w *crowd) logs(dir string) {
	for n := range 9 {
		for _, log := range []string{"serve.log", "run/data.log", "run/hold.log"} {
			name := filepath.Join(dir, fmt.Sprint(n), log)
			if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
				w.Logf("%d/%s:\n%s", n, log, tail(name, 3000))
			}
			if died := death(name); died != "" {
				w.Logf("%d/%s: what ended a process:\n%s", n, log, died)
			}
		}
	}
}

// memberView is what node list says of a node.
type memberView struct {
	Name, State, Member string
	Conditions          map[string]struct{ Status, Reason, Message string }
}

// members asks one node about all of them.
func (b *bed) members() map[string]memberView {
	b.Helper()
	var list []memberView
	if err := b.p.Run(b.ctx, &list, "node", "list"); err != nil {
		return nil
	}
	out := map[string]memberView{}
	for _, m := range list {
		out[m.Name] = m
	}
	return out
}

// ready tells whether a node is, as another sees it.
func (b *bed) ready(node string) bool {
	return b.members()[node].Conditions["Ready"].Status == "True"
}

// untilWhole waits until every node sees n of them ready.
func (w *crowd) untilWhole(n int) {
	w.Helper()
	for _, b := range w.nodes {
		b.until(30*time.Second, "all nodes are ready for "+b.p.Name, func() bool {
			ready := 0
			for _, m := range b.members() {
				if m.Conditions["Ready"].Status == "True" {
					ready++
				}
			}
			return ready == n
		})
	}
}

// journal returns a writer of a volume that is attached on a node.
func (w *crowd) journal(b *bed, volume string, seed uint64) *journal {
	units := blocks * blockBytes / unitBytes
	return &journal{volume: volume, socket: b.socket(volume), rng: rand.New(rand.NewPCG(seed, 1)), acked: make([]uint64, units), tried: make([]uint64, units), total: &atomic.Int64{}}
}

// stored creates a volume whose copy is on one node, and attaches it on another.
func (w *crowd) stored(volume string, on, at int) {
	w.Helper()
	w.nodes[on].cli("node", "tag", w.nodes[on].p.Name, "here")
	w.nodes[on].cli("volume", "create", volume, "--size", "64Mi", "--node-selector", "here")
	w.nodes[at].cli("volume", "attach", volume, "--node", w.nodes[at].p.Name, "--frontend", "nbd")
}

// readAll is what a volume's first n bytes are for its guest.
func (b *bed) readAll(c *client, n int) []byte {
	b.Helper()
	p := make([]byte, n)
	for off := 0; off < n; off += mib {
		if err := c.read(int64(off), p[off:min(n, off+mib)]); err != nil {
			b.Fatal(err)
		}
	}
	return p
}

// TestClusterFailover cuts a node off while it writes to a volume whose copy is elsewhere. Another node takes the volume over; everything acknowledged is there, and the old writer, whose processes all
// live, never writes again, also not when the network is back.
func TestClusterFailover(t *testing.T) {
	w := newCrowd(t, 3, namespaces)
	w.stored("v1", 1, 0)
	old, next := w.nodes[0], w.nodes[2]
	j := w.journal(old, "v1", 7)
	c := old.dial("v1")
	stuck := make(chan error, 1)
	var busy sync.WaitGroup
	busy.Go(func() {
		for {
			if err := j.step(c); err != nil {
				stuck <- err
				return
			}
		}
	})
	defer busy.Wait()
	old.until(10*time.Second, "the writer writes", func() bool { return j.total.Load() > 500 })

	w.sw.Isolate(0)
	start := time.Now()
	next.until(20*time.Second, "the others see that it is gone", func() bool { return !next.ready("node1") })
	gone := time.Since(start)
	next.cli("volume", "detach", "v1", "--force")
	next.cli("volume", "attach", "v1", "--node", "node3", "--frontend", "nbd")
	after := w.journal(next, "v1", 8)
	d := next.dial("v1")
	if err := d.write(32*mib, make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	t.Logf("cut off while writing: seen after %d ms, another node writes after %d ms", gone.Milliseconds(), time.Since(start).Milliseconds())
	if took := time.Since(start); took > 15*time.Second {
		t.Errorf("it took %v", took)
	}

	// The network comes back, and with it whatever the old writer had under way: it must be told that it is over, and nothing of it may land.
	before := next.readAll(d, blocks*blockBytes)
	w.sw.Heal()
	select {
	case err := <-stuck:
		t.Logf("the old writer was told: %v", err)
	case <-time.After(30 * time.Second):
		t.Error("the old writer was not told within 30 s that it is over")
	}
	c.close()
	if !bytes.Equal(next.readAll(d, blocks*blockBytes), before) {
		t.Error("something of the old writer landed after another had opened the volume")
	}
	copy(after.acked, j.acked)
	copy(after.tried, j.tried)
	if err := after.verify(d); err != nil {
		t.Error(err)
	}
	t.Logf("%d acknowledged before, none lost", j.total.Load())
	for range 200 {
		if err := after.step(d); err != nil {
			t.Fatal(err)
		}
	}
	if err := after.verify(d); err != nil {
		t.Error(err)
	}
	old.until(20*time.Second, "the old node is back, and has let go of the volume", func() bool {
		var v volumeView
		if old.p.Run(old.ctx, &v, "volume", "show", "v1") != nil { // its catalogue may still be catching up
			return false
		}
		_, err := net.Dial("unix", old.socket("v1"))
		return old.ready("node1") && v.State == "attached" && err != nil
	})
	if out := next.cli("volume", "show", "v1"); !strings.Contains(out, "node3") {
		t.Errorf("it is not attached on node3: %s", out)
	}
}

// TestClusterKilled kills the process that has the copy, and the one that serves the volume, under a writer that logs outside what was acknowledged.
func TestClusterKilled(t *testing.T) {
	w := newCrowd(t, 3, loopback)
	w.stored("v1", 1, 0)
	at := w.nodes[0]
	j := w.journal(at, "v1", 9)
	ctx, cancel := context.WithCancel(w.ctx)
	failed := make(chan error, 1)
	var busy sync.WaitGroup
	busy.Go(func() { failed <- j.write(ctx) })
	for n := range 6 {
		had := j.total.Load()
		at.until(30*time.Second, "the writer goes on", func() bool {
			if len(failed) > 0 {
				t.Fatal(<-failed)
			}
			return j.total.Load() > had+300
		})
		switch n % 3 {
		case 0:
			w.nodes[1].kill("data")
		case 1:
			at.kill("data")
		case 2:
			for _, b := range w.nodes {
				b.p.KillServe()
			}
			for _, b := range w.nodes {
				busy.Go(func() {
					if err := b.p.StartServe(w.ctx); err != nil {
						t.Error(err)
					}
				})
			}
		}
	}
	had := j.total.Load()
	at.until(30*time.Second, "the writer goes on", func() bool { return j.total.Load() > had+300 || len(failed) > 0 })
	cancel()
	busy.Wait()
	if err := <-failed; err != nil {
		t.Error(err)
	}
	t.Logf("%d acknowledged, none lost; %d connections broken, the longest wait %v", j.total.Load(), j.broke, j.longest.Round(time.Millisecond))
	w.untilWhole(3)
}
