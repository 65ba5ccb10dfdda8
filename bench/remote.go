package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"ashlar/internal/block"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/nbd"
	"ashlar/internal/testbed"
)

// A disk of remoteSize of which the first remoteWorking bytes are used: written once and read once before anything is measured.
const (
	remoteSize    = 1 << 30
	remoteWorking = 512 << 20
)

// far is a disk whose bytes lie behind a TCP connection on loopback.
type far struct {
	name string
	dev  *nbd.Client
	pids []int // of all who have a part in it
}

// remote measures a volume attached on one node of a cluster whose only copy is on another, beside qemu-nbd on TCP: the same load from the same client (package nbd's, in this process), files on one file
// system, through the page cache, first with TLS 1.3 and both certificates, then without. Ours is reached as a guest reaches it, on a unix socket of the node where it is attached, so there is one hop more
// than to qemu-nbd.
func (b *bench) remote(ctx context.Context) (err error) {
	dir := filepath.Join(b.dir, "r")
	if err := os.Setenv("ASHLAR_PPROF", "1"); err != nil {
		return err
	}
	c, err := testbed.StartCluster(ctx, testbed.ClusterConfig{Bin: b.bin, Dir: dir, Nodes: 2})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Stop(context.WithoutCancel(ctx)), os.RemoveAll(dir)) }()
	for _, cmd := range []struct {
		node int
		args []string
	}{
		{1, []string{"node", "tag", "node2", "store"}},
		{0, []string{"volume", "create", "far", "--size", strconv.Itoa(remoteSize), "--node-selector", "store"}},
		{0, []string{"volume", "attach", "far", "--node", "node1"}},
	} {
		if err := c.Nodes[cmd.node].Run(ctx, nil, cmd.args...); err != nil {
			return err
		}
	}
	creds := filepath.Join(b.dir, "creds")
	config, err := makeCertificates(creds)
	if err != nil {
		return err
	}
	file, err := rawFile(b.dir, "far.raw", remoteSize)
	if err != nil {
		return err
	}
	defer os.Remove(file)
	fmt.Println("\nremote: a volume of node1 whose copy is on node2, TCP on loopback; one client for all, package nbd's, in this process")
	worst, err := b.remoteTable(ctx, c, qemuTCP{file: file, creds: creds, tls: config})
	if err != nil {
		return err
	}
	if worst != nil {
		if err := b.profileRemote(ctx, c, *worst); err != nil {
			return err
		}
	}
	back, err := makePlain(ctx, c)
	if err == nil {
		_, err = b.remoteTable(ctx, c, qemuTCP{file: file})
	}
	return errors.Join(err, back(context.WithoutCancel(ctx)))
}

// remoteTable measures ours and the peer in interleaved rounds. It returns the load in which ours is furthest behind qemu-nbd, nil if in none.
func (b *bench) remoteTable(ctx context.Context, c *testbed.Cluster, q qemuTCP) (worst *load, err error) {
	title := "remote, plain"
	if q.tls != nil {
		title = "remote, TLS"
	}
	peer, stop, err := q.start(ctx)
	defer stop()
	if err != nil {
		return nil, err
	}
	us, err := ours(ctx, c)
	if err != nil {
		return nil, err
	}
	defer us.dev.Close()
	all := []far{us, peer}
	for _, f := range all {
		if err := fill(ctx, f.dev); err != nil {
			return nil, fmt.Errorf("%s: %w", f.name, err)
		}
	}
	got := make([][][]measure, len(loads)) // by load and server
	for i := range loads {
		got[i] = make([][]measure, len(all))
	}
	for range b.rounds {
		for i, l := range loads {
			for k, f := range all {
				m, err := f.run(ctx, l, b.remoteRun())
				if err != nil {
					return nil, fmt.Errorf("%s, %s: %w", f.name, l.name, err)
				}
				got[i][k] = append(got[i][k], m)
			}
		}
	}
	fmt.Printf("%s (median of %d rounds of %v; IOPS or MB/s, in brackets CPU of all server processes per I/O in µs)\n", title, b.rounds, b.remoteRun())
	behind := 1.0
	for i, l := range loads {
		fmt.Printf("  %-28s", l.name)
		value := make([]float64, len(all))
		for k, f := range all {
			var values, cpu []float64
			for _, m := range got[i][k] {
				values, cpu = append(values, m.value(l)), append(cpu, m.cpuUS)
			}
			value[k] = median(values)
			fmt.Printf("  %s %.0f (%.0f)", f.name, value[k], median(cpu))
		}
		ratio := value[0] / value[1]
		fmt.Printf("  ratio %.2f\n", ratio)
		b.note(result{What: title + ": " + l.name, Ours: value[0], Peer: value[1], PeerName: all[1].name, Ratio: ratio, Target: ">= 1.0 x", Holds: ratio >= 1})
		if ratio < behind {
			behind, worst = ratio, &loads[i]
		}
	}
	return worst, nil
}

// remoteRun is how long one run takes: two tables of six loads and two servers are to be done in two minutes.
func (b *bench) remoteRun() time.Duration { return time.Duration(b.seconds) * time.Second / 3 }

// ours connects to the volume as a guest does.
func ours(ctx context.Context, c *testbed.Cluster) (far, error) {
	var dev *nbd.Client
	var last error
	uri := "nbd+unix:///far?socket=" + filepath.Join(c.Nodes[0].RunDir, "nbd", "far.sock")
	err := testbed.Until(ctx, time.Minute, func() (bool, error) {
		dev, last = nbd.Dial(ctx, uri, nbd.ClientOptions{})
		return last == nil, nil
	})
	if err != nil {
		return far{}, fmt.Errorf("connect to our volume: %w: %w", err, last)
	}
	return far{name: "ashlar", dev: dev, pids: []int{c.Nodes[0].PID("data"), c.Nodes[1].PID("data")}}, nil
}

// fill writes the working set with bytes that do not compress and reads it once.
func fill(ctx context.Context, d block.Device) error {
	p, source := make([]byte, 1<<20), rand.NewChaCha8([32]byte{3})
	for _, op := range []func([]byte, int64) (int, error){d.WriteAt, d.ReadAt} {
		for at := int64(0); at < remoteWorking; at += int64(len(p)) {
			source.Read(p) //nolint:errcheck // it cannot fail
			if _, err := op(p, at); err != nil {
				return err
			}
			if err := ctx.Err(); err != nil {
				return err
			}
		}
	}
	return d.Flush()
}

// run does a load for a time, with as many callers as its depth.
func (f far) run(ctx context.Context, l load, length time.Duration) (measure, error) {
	before, err := f.cpu()
	if err != nil {
		return measure{}, err
	}
	size := int64(4096)
	if l.byBytes {
		size = 1 << 20
	}
	op := f.dev.ReadAt
	if strings.Contains(l.rw, "write") {
		op = f.dev.WriteAt
	}
	var done, next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	start := time.Now()
	for lane := range l.depth {
		g.Go(func() error {
			p, dice := make([]byte, size), rand.New(rand.NewPCG(uint64(lane), uint64(start.UnixNano())))
			for time.Since(start) < length {
				unit := next.Add(1)
				if strings.HasPrefix(l.rw, "rand") {
					unit = dice.Int64N(remoteWorking / size)
				}
				if _, err := op(p, unit%(remoteWorking/size)*size); err != nil {
					return err
				}
				done.Add(1)
				if err := ctx.Err(); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return measure{}, err
	}
	took := time.Since(start).Seconds()
	after, err := f.cpu()
	n := float64(done.Load())
	return measure{iops: n / took, mbps: n * float64(size) / took / 1e6, cpuUS: (after - before) * 1e6 / max(1, n), totalN: n}, err
}

// cpu is what all its processes have used, in seconds.
func (f far) cpu() (sum float64, err error) {
	for _, pid := range f.pids {
		s, err := cpuSeconds(pid)
		if err != nil {
			return 0, err
		}
		sum += s
	}
	return sum, nil
}

// profileRemote takes a CPU profile of the data process that has the volume attached, and of the one that has its copy, while the load runs, keeps it in bench/out, and prints its top.
func (b *bench) profileRemote(ctx context.Context, c *testbed.Cluster, l load) error {
	us, err := ours(ctx, c)
	if err != nil {
		return err
	}
	defer us.dev.Close()
	if err := os.MkdirAll("bench/out", 0o755); err != nil {
		return err
	}
	const length = 5 * time.Second
	var files [2]string
	var g errgroup.Group
	for i, node := range c.Nodes {
		files[i] = filepath.Join("bench/out", "remote-"+node.Name+".pprof")
		g.Go(func() error {
			return node.Profile(ctx, "data", fmt.Sprintf("profile?seconds=%d", int(length.Seconds())-1), func(r io.Reader) error {
				f, err := os.Create(files[i])
				if err != nil {
					return err
				}
				_, err = io.Copy(f, r)
				return errors.Join(err, f.Close())
			})
		})
	}
	_, err = us.run(ctx, l, length)
	if err := errors.Join(err, g.Wait()); err != nil {
		return err
	}
	for i, what := range []string{"has it attached", "has its copy"} {
		out, err := exec.CommandContext(ctx, "go", "tool", "pprof", "-top", "-nodecount=15", b.bin, files[i]).Output()
		if err != nil {
			return fmt.Errorf("go tool pprof %s: %w", files[i], err)
		}
		fmt.Printf("  CPU of the data process that %s, under %s (%s):\n", what, l.name, files[i])
		for line := range strings.Lines(string(out)) {
			fmt.Print("    ", line)
		}
	}
	return nil
}

// makePlain has the nodes speak without TLS to each other, which no configuration of a cluster allows and its data processes do, on loopback: their `serve` are killed, because they would take it back, both
// data processes are told, and the one with the copy is killed, so that the other connects to it again. back starts what was killed; it can always be called.
func makePlain(ctx context.Context, c *testbed.Cluster) (back func(context.Context) error, err error) {
	var killed []*testbed.Process
	back = func(ctx context.Context) error {
		g, ctx := errgroup.WithContext(ctx) // together: neither is ready without the other
		for _, p := range killed {
			g.Go(func() error { return p.StartServe(ctx) })
		}
		return g.Wait()
	}
	for _, p := range c.Nodes {
		if err := p.KillServe(); err != nil {
			return back, err
		}
		killed = append(killed, p)
	}
	for _, p := range c.Nodes {
		data, err := dataOf(p)
		if err != nil {
			return back, err
		}
		state, err := data.State(ctx)
		if err != nil {
			return back, err
		}
		plain := state.Cluster
		plain.CertFile, plain.KeyFile, plain.CAFile = "", "", ""
		if err := data.SetCluster(ctx, plain); err != nil {
			return back, err
		}
	}
	was := c.Nodes[1].PID("data")
	if err := c.Nodes[1].Kill("data"); err != nil {
		return back, err
	}
	return back, testbed.Until(ctx, time.Minute, func() (bool, error) {
		now := c.Nodes[1].PID("data")
		if now == 0 || now == was {
			return false, nil
		}
		for _, p := range c.Nodes {
			data, err := dataOf(p)
			if err != nil {
				return false, nil
			}
			if state, err := data.State(ctx); err != nil || state.Cluster.Listen == "" {
				return false, nil
			} else if state.Cluster.CertFile != "" {
				return false, fmt.Errorf("%w: %s still speaks TLS", errBench, p.Name)
			}
		}
		return true, nil
	})
}

// dataOf is a node's data process.
func dataOf(p *testbed.Process) (*client.Client, error) {
	sockets, err := client.DataSockets(p.RunDir)
	if err == nil && len(sockets) != 1 {
		err = fmt.Errorf("%w: %s has %d data processes", errBench, p.Name, len(sockets))
	}
	if err != nil {
		return nil, err
	}
	return client.New(sockets[0]), nil
}
