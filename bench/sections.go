package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"ashlar/internal/testbed"
)

// table runs loads on servers in interleaved rounds and returns the median per load and server.
func (b *bench) table(ctx context.Context, title string, servers []*server, list []load) (map[string]map[string]measure, error) {
	runs := map[string]map[string][]measure{}
	for _, l := range list {
		runs[l.name] = map[string][]measure{}
	}
	for range b.rounds {
		for _, l := range list {
			for _, s := range servers {
				m, err := fio(ctx, s.uri, s.pid, l, b.seconds)
				if err != nil {
					return nil, err
				}
				runs[l.name][s.name] = append(runs[l.name][s.name], m)
			}
		}
	}
	fmt.Printf("\n%s (median of %d rounds; IOPS or MB/s, in brackets server CPU per I/O in µs)\n", title, b.rounds)
	out := map[string]map[string]measure{}
	for _, l := range list {
		out[l.name] = map[string]measure{}
		fmt.Printf("  %-42s", l.name)
		for _, s := range servers {
			var iops, mbps, cpu []float64
			for _, m := range runs[l.name][s.name] {
				iops, mbps, cpu = append(iops, m.iops), append(mbps, m.mbps), append(cpu, m.cpuUS)
			}
			m := measure{iops: median(iops), mbps: median(mbps), cpuUS: median(cpu)}
			out[l.name][s.name] = m
			fmt.Printf("  %s %.0f (%.0f)", s.name, m.value(l), m.cpuUS)
		}
		fmt.Println()
	}
	return out, nil
}

// peerFunc starts a peer.
type peerFunc func(context.Context) (*server, error)

// against measures a fresh volume of ours beside peers and notes the ratio to each; targets has the ratio wanted by peer name's first word.
func (b *bench) against(ctx context.Context, title string, list []load, peers []peerFunc, targets []float64) error {
	us, err := b.ours(ctx, "bench")
	if err != nil {
		return err
	}
	defer us.stop()
	servers := []*server{us}
	for _, start := range peers {
		p, err := start(ctx)
		if err != nil {
			return err
		}
		defer p.stop()
		servers = append(servers, p)
	}
	for _, s := range servers {
		if err := prefill(ctx, s.uri); err != nil {
			return err
		}
	}
	got, err := b.table(ctx, title, servers, list)
	if err != nil {
		return err
	}
	for _, l := range list {
		mine := got[l.name]["ashlar"].value(l)
		for i, p := range servers[1:] {
			theirs := got[l.name][p.name].value(l)
			b.note(result{What: title + ": " + l.name, Ours: mine, Peer: theirs, PeerName: p.name, Ratio: mine / theirs,
				Target: fmt.Sprintf(">= %.1f x", targets[i]), Holds: mine >= targets[i]*theirs})
		}
	}
	return nil
}

func (b *bench) cache(ctx context.Context) error {
	qemu := func(ctx context.Context) (*server, error) { return b.qemuNBD(ctx, "writeback", "threads") }
	return b.against(ctx, "one copy, page cache", loads, []peerFunc{b.nbdkit, qemu}, []float64{1, 2})
}

// direct compares two that go around the page cache: a node of its own, configured so (data.direct), and the peer's fastest way.
func (b *bench) direct(ctx context.Context) (err error) {
	const variable = "ASHLAR_DIRECT" // its data process inherits it
	dir, err := os.MkdirTemp("", "abench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Setenv(variable, "1"); err != nil {
		return err
	}
	node, err := testbed.StartProcess(ctx, b.bin, dir)
	if err = errors.Join(err, os.Unsetenv(variable)); err != nil {
		return err
	}
	cached := b.node
	b.node = node
	defer func() {
		b.node = cached
		err = errors.Join(err, node.Stop(context.WithoutCancel(ctx)))
	}()
	qemu := func(ctx context.Context) (*server, error) { return b.qemuNBD(ctx, "none", "io_uring") }
	return b.against(ctx, "one copy, O_DIRECT", loads, []peerFunc{qemu}, []float64{1})
}

func (b *bench) flush(ctx context.Context) error {
	qemu := func(ctx context.Context) (*server, error) { return b.qemuNBD(ctx, "writeback", "threads") }
	return b.against(ctx, "one copy, flushed", flushLoads, []peerFunc{b.nbdkit, qemu}, []float64{1, 1})
}

// idle measures a node that has nothing to do.
func (b *bench) idle(ctx context.Context) error {
	const watch = 15 * time.Second
	names := []string{"serve", "data", "hold"}
	var before, after float64
	var rss int64
	for i := range 2 {
		for _, n := range names {
			pid := b.node.PID(n)
			cpu, err := cpuSeconds(pid)
			if err != nil {
				return err
			}
			if i == 0 {
				before += cpu
				continue
			}
			after += cpu
			r, err := rssBytes(pid)
			if err != nil {
				return err
			}
			fmt.Printf("  idle %s: %.1f MiB resident\n", n, float64(r)/(1<<20))
			rss += r
		}
		if i == 0 {
			select {
			case <-time.After(watch):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	mib, percent := float64(rss)/(1<<20), 100*(after-before)/watch.Seconds()
	fmt.Printf("idle node, no volumes: %.0f MiB resident, %.2f %% of a core\n", mib, percent)
	b.note(result{What: "idle node, resident MiB", Ours: mib, Ratio: mib / 150, Target: "<= 150 MiB", Holds: mib <= 150})
	b.note(result{What: "idle node, % of a core", Ours: percent, Ratio: percent / 2, Target: "< 2 %", Holds: percent < 2})
	return nil
}

// create times a new volume from an image until its first bytes were read over NBD, beside an overlay on qemu-nbd.
func (b *bench) create(ctx context.Context) error {
	raw, err := rawFile(b.dir, "image.raw", 256<<20)
	if err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "dd", "if=/dev/urandom", "of="+raw, "bs=1M", "count=64", "conv=notrunc", "status=none").CombinedOutput(); err != nil {
		return fmt.Errorf("dd: %w: %s", err, out)
	}
	if err := b.node.Run(ctx, nil, "image", "import", "base", raw); err != nil {
		return err
	}
	var ours, theirs []float64
	for i := range max(5, b.rounds) {
		name := "new" + strconv.Itoa(i)
		start := time.Now()
		for _, args := range [][]string{{"volume", "create", name, "--size", "10Gi", "--image", "base"}, {"volume", "attach", name}} {
			if err := b.node.Run(ctx, nil, args...); err != nil {
				return err
			}
		}
		if err := firstByte(ctx, b.uri(name)); err != nil {
			return err
		}
		ours = append(ours, ms(start))
		start = time.Now()
		over := filepath.Join(b.dir, name+".qcow2")
		if out, err := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", over, "10G").CombinedOutput(); err != nil {
			return fmt.Errorf("qemu-img: %w: %s", err, out)
		}
		sock := filepath.Join(b.dir, name+".sock")
		p, err := startPeer(ctx, "qemu-nbd", sock, "nbd+unix:///?socket="+sock, "qemu-nbd", "-f", "qcow2", "-k", sock, over)
		if err != nil {
			return err
		}
		if err := firstByte(ctx, p.uri); err != nil {
			return err
		}
		theirs = append(theirs, ms(start))
		p.stop()
		for _, args := range [][]string{{"volume", "detach", name}, {"volume", "delete", name}} {
			if err := b.node.Run(ctx, nil, args...); err != nil {
				return err
			}
		}
	}
	mine, peer := median(ours), median(theirs)
	fmt.Printf("volume from an image: create, attach, first byte: %.0f ms (two commands and a reader included); qemu-img + qemu-nbd %.0f ms\n", mine, peer)
	b.note(result{What: "create from image, attach, first byte, ms", Ours: mine, Peer: peer, PeerName: "qemu-img + qemu-nbd", Ratio: mine / peer, Target: "<= 150 ms", Holds: mine <= 150})
	return b.node.Run(ctx, nil, "image", "delete", "base")
}

func ms(start time.Time) float64 { return float64(time.Since(start).Microseconds()) / 1000 }

// firstByte reads one sector through a real client.
func firstByte(ctx context.Context, uri string) error {
	out, err := exec.CommandContext(ctx, "qemu-io", "-r", "-f", "raw", "-c", "read 0 512", uri).CombinedOutput()
	if err != nil {
		return fmt.Errorf("qemu-io %s: %w: %s", uri, err, out)
	}
	return nil
}

// syncMS is the median fdatasync of another file on this disk after a 4 KiB write, in milliseconds.
func (b *bench) syncMS() (float64, error) {
	f, err := os.Create(filepath.Join(b.dir, "sync"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var all []float64
	for i := range 50 {
		if _, err := f.WriteAt(make([]byte, 4096), int64(i)*4096); err != nil {
			return 0, err
		}
		start := time.Now()
		if err := f.Sync(); err != nil {
			return 0, err
		}
		all = append(all, ms(start))
	}
	return median(all), nil
}

// snapshot takes snapshots under random writes; the pause is the slowest write the client saw.
func (b *bench) snapshot(ctx context.Context) error {
	us, err := b.ours(ctx, "snap")
	if err != nil {
		return err
	}
	defer us.stop()
	if err := prefill(ctx, us.uri); err != nil {
		return err
	}
	const n = 10
	var g errgroup.Group
	var quiet, busy measure
	g.Go(func() (err error) {
		quiet, err = fio(ctx, us.uri, us.pid, loads[1], b.seconds)
		return err
	})
	sync, err := b.syncMS() // under the same load, because that is when a snapshot has to sync
	if err != nil {
		return err
	}
	if err := g.Wait(); err != nil {
		return err
	}
	g.Go(func() (err error) {
		busy, err = fio(ctx, us.uri, us.pid, loads[1], 8)
		return err
	})
	var took []float64
	for i := range n {
		start := time.Now()
		if err := b.node.Run(ctx, nil, "snapshot", "create", "snap", "s"+strconv.Itoa(i)); err != nil {
			return err
		}
		took = append(took, ms(start))
	}
	if err := g.Wait(); err != nil {
		return err
	}
	limit := 20 + 3*sync
	fmt.Printf("snapshot under 4 KiB random writes at depth 1: slowest write %.1f ms during %d snapshots (%.1f ms without); command %.0f ms; fdatasync of this disk under that load %.2f ms\n",
		busy.maxMS, n, quiet.maxMS, median(took), sync)
	b.note(result{What: "snapshot, slowest write seen by the client, ms", Ours: busy.maxMS, Peer: quiet.maxMS, PeerName: "no snapshot", Ratio: busy.maxMS / limit,
		Target: fmt.Sprintf("<= 20 + 3 fdatasync = %.1f ms", limit), Holds: busy.maxMS <= limit})
	return nil
}

// depth compares reads through 200 snapshots with reads through none.
func (b *bench) depth(ctx context.Context) error {
	flat, err := b.ours(ctx, "flat")
	if err != nil {
		return err
	}
	defer flat.stop()
	deep, err := b.ours(ctx, "deep")
	if err != nil {
		return err
	}
	defer deep.stop()
	deep.name = "200 snapshots"
	for _, s := range []*server{flat, deep} {
		if err := prefill(ctx, s.uri); err != nil {
			return err
		}
	}
	scatter := load{name: "scatter", rw: "randwrite", bs: "4k", depth: 32}
	start := time.Now()
	for i := range 200 {
		if err := b.node.Run(ctx, nil, "snapshot", "create", "deep", "s"+strconv.Itoa(i)); err != nil {
			return err
		}
		out, err := exec.CommandContext(ctx, "fio", "--name=s", "--ioengine=nbd", "--uri="+deep.uri, "--rw="+scatter.rw, "--bs=4k", "--iodepth=32", "--size="+working,
			"--io_size=2M", "--norandommap", "--randrepeat=0").CombinedOutput()
		if err != nil {
			return fmt.Errorf("fio: %w: %s", err, out)
		}
	}
	fmt.Printf("200 snapshots with 2 MiB of scattered writes after each: %.0f s\n", time.Since(start).Seconds())
	if err := prefillRead(ctx, deep.uri); err != nil {
		return err
	}
	got, err := b.table(ctx, "reads through 200 snapshots", []*server{flat, deep}, []load{loads[0], loads[2], loads[4]})
	if err != nil {
		return err
	}
	for _, l := range []load{loads[0], loads[2], loads[4]} {
		d, f := got[l.name]["200 snapshots"].value(l), got[l.name]["ashlar"].value(l)
		b.note(result{What: "200 snapshots: " + l.name, Ours: d, Peer: f, PeerName: "ashlar, no snapshot", Ratio: d / f, Target: ">= 0.9 x", Holds: d >= 0.9*f})
	}
	return nil
}

func prefillRead(ctx context.Context, uri string) error {
	out, err := exec.CommandContext(ctx, "fio", "--name=fill", "--ioengine=nbd", "--uri="+uri, "--rw=read", "--bs=1M", "--iodepth=4", "--size="+working).CombinedOutput()
	if err != nil {
		return fmt.Errorf("fio fill %s: %w: %s", uri, err, out)
	}
	return nil
}

var memoryLine = regexp.MustCompile(`map of 1 TiB, ([^:]+): ([0-9.]+) MiB`)

// memory asks the layer's own test for the heap that the map of an open TiB takes: the map is built, the bytes need not exist.
func (b *bench) memory(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-run", "^TestMemory$", "-v", "./internal/layer")
	cmd.Env = append(os.Environ(), "ASHLAR_STEPS=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("go test: %w: %s", err, out)
	}
	found := memoryLine.FindAllSubmatch(out, -1)
	if len(found) == 0 {
		return fmt.Errorf("%w: no figure in %s", errBench, out)
	}
	for _, m := range found {
		mib, err := strconv.ParseFloat(string(m[2]), 64)
		if err != nil {
			return err
		}
		fmt.Printf("memory per open TiB, %s: %.1f MiB\n", m[1], mib)
		b.note(result{What: "memory per open TiB, " + string(m[1]) + ", MiB", Ours: mib, Ratio: mib / 32, Target: "<= 32 MiB", Holds: mib <= 32})
	}
	return nil
}
