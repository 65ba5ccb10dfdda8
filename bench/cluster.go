package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
	"ashlar/internal/testbed"
)

// What the section cluster does at most, and for how long: on a slow machine it does less, and says how much.
const (
	clusterNodes   = 3
	clusterChanges = 200
	changesLimit   = 40 * time.Second
	// streamGap is more than the least time between two messages of a websocket (docs/rest.md, "Streams"): each change is one by itself, and nothing it waits for is the one before.
	streamGap      = 110 * time.Millisecond
	clusterVolumes = 5000
	postLimit      = 90 * time.Second // to ask for them
	oneMoreLimit   = 30 * time.Second // to create and attach six more
	clusterIdle    = 10 * time.Second
	clusterLists   = 3 // of each kind, on each node
)

// nodes are a cluster that is measured: each node with a client.
type nodes struct {
	c   *testbed.Cluster
	all []*crowd
}

// cluster measures a cluster of three nodes on loopback: how long a join takes, until a change that one node was told is seen by another, and what 5,000 volumes in the catalogue cost. Those are records
// made through REST that ask for a tag no node has, so none is placed and none has a copy: 5,000 copies take 45 GiB, of which this machine's disk would be measured. Control tries to place them again and
// again, which those with copies do not need. All nodes share this machine's disk and processors. How long a failover takes is TestClusterFailover's.
func (b *bench) cluster(ctx context.Context) error {
	fmt.Printf("\ncluster: %d nodes on this machine\n", clusterNodes)
	return b.withNodes(ctx, b.joins, b.changes, b.oneMore("1 other", "early"), b.filled)
}

// withNodes starts the first node of a cluster, does the parts, and ends all nodes.
func (b *bench) withNodes(ctx context.Context, parts ...func(context.Context, *nodes) error) (err error) {
	dir, err := os.MkdirTemp(b.dir, "c")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	w := &nodes{}
	if w.c, err = testbed.StartCluster(ctx, testbed.ClusterConfig{Bin: b.bin, Dir: dir, Nodes: 1}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.c.Stop(context.WithoutCancel(ctx))) }()
	if err := w.adopt(0); err != nil {
		return err
	}
	for _, part := range parts {
		if err := part(ctx, w); err != nil {
			return err
		}
	}
	return nil
}

// adopt makes a client of a node that was started.
func (w *nodes) adopt(i int) error {
	p := w.c.Nodes[i]
	c, err := client.New(client.Address(p.RunDir))
	if err != nil {
		return err
	}
	w.all = append(w.all, &crowd{p: p, c: c, dir: filepath.Dir(p.RunDir), node: p.Name})
	return nil
}

// joins has the other nodes join, one after the other, and notes how long that took.
func (b *bench) joins(ctx context.Context, w *nodes) error {
	for i := 1; i < clusterNodes; i++ {
		t, err := w.join(ctx, i)
		if err != nil {
			return err
		}
		name := w.all[i].node
		fmt.Printf("  %s: node join %.2f s, ready as every node sees it %.2f s, voting in the catalogue %.2f s after its begin\n", name, t.command, t.ready, t.votes)
		b.note(result{What: name + " joins: command, s", Ours: t.command, Ratio: t.command / 5, Target: "<= 5 s", Holds: t.command <= 5})
		b.note(result{What: name + " joins: ready for all nodes, s", Ours: t.ready, Ratio: t.ready / 5, Target: "<= 5 s", Holds: t.ready <= 5})
	}
	return nil
}

// joined is how many seconds after the begin of `node join` something was so.
type joined struct{ command, ready, votes float64 }

// join starts one more node and has it join.
func (w *nodes) join(ctx context.Context, i int) (t joined, err error) {
	p, err := w.c.Add(ctx)
	if err != nil {
		return t, err
	}
	if err := w.adopt(i); err != nil {
		return t, err
	}
	var token struct{ Token string }
	if err := w.c.Nodes[0].Run(ctx, &token, "cluster", "token"); err != nil {
		return t, err
	}
	file := filepath.Join(p.RunDir, "join-token")
	if err := os.WriteFile(file, []byte(token.Token+"\n"), 0o600); err != nil {
		return t, err
	}
	start := time.Now()
	if err := p.Run(ctx, nil, "node", "join", w.c.Host(0), "--token-file", file, "--address", w.c.Host(i)); err != nil {
		return t, err
	}
	t.command = time.Since(start).Seconds()
	if err := w.until(ctx, isReady); err != nil {
		return t, fmt.Errorf("%s is not ready for all: %w", p.Name, err)
	}
	t.ready = time.Since(start).Seconds()
	if err := w.until(ctx, func(n api.Node) bool { return isReady(n) && n.Member == "voter" }); err != nil {
		return t, fmt.Errorf("%s does not vote: %w", p.Name, err)
	}
	t.votes = time.Since(start).Seconds()
	return t, nil
}

func isReady(n api.Node) bool { return n.Conditions["Ready"].Status == "True" }

// until waits until every node that was adopted says of all of them that they are so.
func (w *nodes) until(ctx context.Context, so func(api.Node) bool) error {
	var last error
	err := testbed.Until(ctx, time.Minute, func() (bool, error) {
		for _, n := range w.all {
			var list []api.Node
			if list, last = n.c.Nodes(ctx); last != nil {
				return false, nil // it is being built anew
			}
			if len(list) != len(w.all) || slices.ContainsFunc(list, func(n api.Node) bool { return !so(n) }) {
				return false, nil
			}
		}
		return true, nil
	})
	if err != nil {
		return errors.Join(err, last)
	}
	return nil
}

// changes tells one node a volume's limit, again and again, and waits until another node's websocket shows it.
func (b *bench) changes(ctx context.Context, w *nodes) error {
	told, watched := w.all[0], w.all[1]
	if err := told.create(ctx, client.NewVolume{Name: "seen", Size: "1Gi"}); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer stop()
	seen := make(chan int64, 4*clusterChanges)
	watching.Go(func() {
		err := client.Watch(ctx, watched.c, "volumes", func(all []api.Volume) error {
			for _, v := range all {
				if v.Name == "seen" {
					select {
					case seen <- v.Limits.IOPS:
					case <-ctx.Done():
						return ctx.Err()
					}
				}
			}
			return nil
		})
		if ctx.Err() == nil {
			fmt.Printf("  %s shows no volumes any more: %v\n", watched.node, err)
			stop()
		}
	})
	wait := func(least int64) error {
		for {
			select {
			case got := <-seen:
				if got >= least {
					return nil
				}
			case <-ctx.Done():
				return fmt.Errorf("%w: a change was not seen", errBench)
			}
		}
	}
	if err := wait(0); err != nil {
		return err
	}
	var answer, shown times
	begin := time.Now()
	for i := int64(1); i <= clusterChanges && time.Since(begin) < changesLimit; i++ {
		select {
		case <-time.After(streamGap):
		case <-ctx.Done():
			return ctx.Err()
		}
		err := shown.run(func() error {
			if err := answer.run(func() error {
				_, err := told.c.SetLimits(ctx, "seen", client.LimitChange{IOPS: strconv.FormatInt(1000+i, 10)})
				return err
			}); err != nil {
				return err
			}
			return wait(1000 + i)
		})
		if err != nil {
			return err
		}
	}
	fmt.Printf("  %d changes told to %s: answered after %.1f ms, p99 %.1f; on a websocket of %s %.1f ms after they were sent, p99 %.1f\n", len(shown.all), told.node,
		median(answer.all), answer.quantile(0.99), watched.node, median(shown.all), shown.quantile(0.99))
	b.note(result{What: "a change seen by another node, ms, median", Ours: median(shown.all), Ratio: median(shown.all) / 50, Target: "<= 50 ms", Holds: median(shown.all) <= 50})
	b.note(result{What: "a change seen by another node, ms, p99", Ours: shown.quantile(0.99), Target: "reported", Holds: true})
	return nil
}

// quantile is the value below which that part of them lies.
func (t *times) quantile(part float64) float64 {
	s := slices.Sorted(slices.Values(t.all))
	return s[min(len(s)-1, int(part*float64(len(s))))]
}

// filled makes many volumes and looks at what they cost.
func (b *bench) filled(ctx context.Context, w *nodes) error {
	if _, err := w.needs(ctx, "1 volume"); err != nil {
		return err
	}
	n, err := w.fill(ctx)
	if err != nil {
		return err
	}
	with := fmt.Sprintf("%d volumes", n)
	b.note(result{What: "volumes in the catalogue, none with a copy", Ours: float64(n), Target: strconv.Itoa(clusterVolumes), Holds: n >= clusterVolumes})
	if err := b.listed(ctx, w, with, n); err != nil {
		return err
	}
	most, err := w.needs(ctx, with)
	if err != nil {
		return err
	}
	b.note(result{What: with + ": serve of the largest node, resident MiB", Ours: most.resident, Target: "reported", Holds: true})
	b.note(result{What: with + ": serve of the busiest node at rest, % of a core", Ours: most.cpu, Ratio: most.cpu / 3, Target: "<= 3 %", Holds: most.cpu <= 3})
	return b.oneMore(with+" records", "late")(ctx, w)
}

// fill asks all nodes for volumes, as fast as they take them, not for ever. n are in the catalogue.
func (w *nodes) fill(ctx context.Context) (n int, err error) {
	var names []string
	for i := range clusterVolumes {
		names = append(names, fmt.Sprintf("m%04d", i))
	}
	var post times
	start := time.Now()
	err = each(ctx, names, 32, func(ctx context.Context, name string) error {
		if time.Since(start) > postLimit {
			return nil
		}
		return post.run(func() error {
			i, err := strconv.Atoi(name[1:])
			if err != nil {
				return err
			}
			_, err = w.all[i%len(w.all)].c.CreateVolume(ctx, client.NewVolume{Name: name, Size: "1Gi", NodeSelector: []string{"absent"}})
			return err
		})
	})
	if err != nil {
		return 0, err
	}
	fmt.Printf("  %d volumes recorded (none is placed) through all nodes, 32 at once: %.1f s; one: %v\n", len(post.all), time.Since(start).Seconds(), &post)
	o, err := w.all[0].c.Overview(ctx)
	if err != nil {
		return 0, err
	}
	for _, count := range o.Volumes {
		n += count
	}
	return n, nil
}

// listed asks every node for what there is.
func (b *bench) listed(ctx context.Context, w *nodes, with string, n int) error {
	var worstStatus, worstList, worstDecoded float64
	for _, node := range w.all {
		var status, list, decoded, overview times
		for range clusterLists {
			if err := list.run(func() error { return node.get(ctx, "/v1/volumes") }); err != nil {
				return err
			}
			if err := status.run(func() error { return node.p.Run(ctx, nil, "status") }); err != nil {
				return err
			}
			if err := overview.run(func() error { _, err := node.c.Overview(ctx); return err }); err != nil {
				return err
			}
			err := decoded.run(func() error {
				all, err := node.c.Volumes(ctx)
				if err == nil && len(all) != n {
					err = fmt.Errorf("%w: %s lists %d volumes of %d", errBench, node.node, len(all), n)
				}
				return err
			})
			if err != nil {
				return err
			}
		}
		fmt.Printf("  %s: ashlar status median %.0f ms, slowest %.0f (of it REST %.0f ms); GET /v1/volumes median %.0f ms, slowest %.0f, decoded %.0f ms\n", node.node, median(status.all), status.worst(),
			median(overview.all), median(list.all), list.worst(), median(decoded.all))
		worstStatus, worstList, worstDecoded = max(worstStatus, median(status.all)), max(worstList, median(list.all)), max(worstDecoded, median(decoded.all))
	}
	b.note(result{What: with + ": ashlar status, the slowest node's median, ms", Ours: worstStatus, Ratio: worstStatus / 1000, Target: "<= 1 s", Holds: worstStatus <= 1000})
	b.note(result{What: with + ": GET /v1/volumes, the slowest node's, ms", Ours: worstList, Ratio: worstList / 250, Target: "<= 250 ms", Holds: worstList <= 250})
	b.note(result{What: with + ": the same, decoded by the client, ms", Ours: worstDecoded, Ratio: worstDecoded / 1000, Target: "<= 1 s", Holds: worstDecoded <= 1000})
	return nil
}

// get reads an answer of the node's REST to its end, and looks at nothing in it.
func (c *crowd) get(ctx context.Context, path string) error {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", client.Socket(c.p.RunDir))
	}}
	defer transport.CloseIdleConnections()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost"+path, nil)
	if err != nil {
		return err
	}
	res, err := (&http.Client{Transport: transport}).Do(r)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%w: GET %s of %s: %s", errBench, path, c.node, res.Status)
	}
	return nil
}

// need is what a serve has resident, in MiB, and takes of a core, in per cent.
type need struct{ resident, cpu float64 }

// needs prints what each node's processes take while nobody asks them for anything. It returns the most that a serve takes.
func (w *nodes) needs(ctx context.Context, with string) (most need, err error) {
	subs := []string{"serve", "data", "hold"}
	used := func() (all [][]float64, err error) {
		for _, node := range w.all {
			var row []float64
			for _, sub := range subs {
				cpu, err := cpuSeconds(node.p.PID(sub))
				if err != nil {
					return nil, fmt.Errorf("%s of %s: %w", sub, node.node, err)
				}
				row = append(row, cpu)
			}
			all = append(all, row)
		}
		return all, nil
	}
	before, err := used()
	if err != nil {
		return most, err
	}
	start := time.Now()
	select {
	case <-time.After(clusterIdle):
	case <-ctx.Done():
		return most, ctx.Err()
	}
	took := time.Since(start).Seconds()
	after, err := used()
	if err != nil {
		return most, err
	}
	for i, node := range w.all {
		fmt.Printf("  %s with %s, idle for %.0f s:", node.node, with, took)
		for k, sub := range subs {
			v, err := node.p.Vitals(sub)
			if err != nil {
				return most, err
			}
			cpu, resident := 100*(after[i][k]-before[i][k])/took, float64(v.ResidentBytes)/(1<<20)
			fmt.Printf("  %s %.2f %% of a core, %.0f MiB resident, %.0f private;", sub, cpu, resident, float64(v.PrivateBytes)/(1<<20))
			if sub == "serve" {
				most = need{resident: max(most.resident, resident), cpu: max(most.cpu, cpu)}
			}
		}
		fmt.Println()
	}
	return most, nil
}

// oneMore creates and attaches volumes, one after the other, in turns through each node.
func (b *bench) oneMore(with, prefix string) func(context.Context, *nodes) error {
	return func(ctx context.Context, w *nodes) error {
		var create, attach, both times
		short, cancel := context.WithTimeout(ctx, oneMoreLimit)
		defer cancel()
		for i := range 2 * len(w.all) {
			node, name := w.all[i%len(w.all)], prefix+strconv.Itoa(i)
			err := both.run(func() error {
				if err := create.run(func() error { return node.create(short, client.NewVolume{Name: name, Size: "1Gi"}) }); err != nil {
					return err
				}
				return attach.run(func() error { return node.attach(short, name) })
			})
			for _, end := range []func(context.Context, string) error{node.detach, node.remove} {
				if err == nil {
					err = end(short, name)
				}
			}
			if short.Err() != nil && ctx.Err() == nil {
				fmt.Printf("  one more volume beside %s: given up after %v: %v\n", with, oneMoreLimit, err)
				b.note(result{What: "create + attach beside " + with + ", ms", Ours: float64(oneMoreLimit.Milliseconds()), Target: "to end", Holds: false})
				return nil
			}
			if err != nil {
				return err
			}
		}
		fmt.Printf("  one more volume beside %s: create %.0f ms, attach %.0f ms (medians of %d; slowest %.0f and %.0f)\n", with, median(create.all), median(attach.all), len(both.all), create.worst(), attach.worst())
		b.note(result{What: "create + attach beside " + with + ", the slowest, ms", Ours: both.worst(), Ratio: both.worst() / 5000, Target: "<= 5 s", Holds: both.worst() <= 5000})
		return nil
	}
}
