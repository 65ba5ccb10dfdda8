package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"ashlar/internal/testbed"
)

// handover measures how long volumes pause while another build's data process takes over from the one that runs, to and fro: 20 volumes, one of them under random writes on one
// connection, which ends fio if it breaks.
func (b *bench) handover(ctx context.Context) (err error) {
	const volumes, seconds = 20, 6
	dir := filepath.Join(b.dir, "h")
	bin, other := filepath.Join(dir, "ashlar"), filepath.Join(dir, "second")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "go", "build", "-ldflags", "-X main.version=1.1.0-second", "-o", other, "ashlar/cmd/ashlar").CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w: %s", err, out)
	}
	if err := install(b.bin, bin); err != nil {
		return err
	}
	node, err := testbed.StartProcess(ctx, bin, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.Stop(context.WithoutCancel(ctx))) }()
	for i := range volumes {
		name := "v" + strconv.Itoa(i)
		for _, args := range [][]string{{"volume", "create", name, "--size", "1Gi"}, {"volume", "attach", name}} {
			if err := node.Run(ctx, nil, args...); err != nil {
				return err
			}
		}
	}
	uri := "nbd+unix:///v0?socket=" + filepath.Join(node.RunDir, "nbd", "v0.sock")
	var pauses, busy, slowest []float64
	for round := range 2 * b.rounds {
		var g errgroup.Group
		var m measure
		g.Go(func() (err error) {
			m, err = fio(ctx, uri, os.Getpid(), loads[1], seconds) // whose processor time it takes is not asked: two processes do it
			return err
		})
		select {
		case <-time.After(2 * time.Second): // in the middle of the load
		case <-ctx.Done():
		}
		next := [...]string{other, b.bin}[round%2]
		took, err := replace(ctx, node, next)
		if err = errors.Join(err, g.Wait()); err != nil {
			return err
		}
		slowest = append(slowest, m.maxMS)
		for volume, pause := range took {
			if pauses = append(pauses, pause); volume == "v0" {
				busy = append(busy, pause)
			}
		}
	}
	longest := 0.0
	for _, p := range pauses {
		longest = max(longest, p)
	}
	fmt.Printf("hand-over of %d volumes, %d times: a volume pauses %.0f ms (median), %.0f ms at most, the one that is written to %.0f ms; its slowest write %.0f ms (medians)\n",
		volumes, 2*b.rounds, median(pauses), longest, median(busy), median(slowest))
	b.note(result{What: "hand-over, pause of a volume, median, ms", Ours: median(pauses), Ratio: median(pauses) / 100, Target: "<= 100 ms", Holds: median(pauses) <= 100})
	b.note(result{What: "hand-over, pause of a volume, longest, ms", Ours: longest, Ratio: longest / 100, Target: "<= 100 ms", Holds: longest <= 100})
	b.note(result{What: "hand-over, slowest write, median of hand-overs, ms", Ours: median(slowest), Ratio: median(slowest) / 100, Target: "reported", Holds: true})
	return nil
}

// replace installs a build and has its data process take over; it returns the pauses in ms, by volume.
func replace(ctx context.Context, node *testbed.Process, build string) (map[string]float64, error) {
	if err := install(build, node.Bin); err != nil {
		return nil, err
	}
	var up struct {
		From, To string
		Volumes  []struct {
			Volume      string
			PauseMicros int64
		}
	}
	if err := node.Run(ctx, &up, "upgrade"); err != nil {
		return nil, err
	}
	if up.From == up.To || len(up.Volumes) == 0 {
		return nil, fmt.Errorf("from %s to %s, %d volumes: %w", up.From, up.To, len(up.Volumes), errBench)
	}
	out := map[string]float64{}
	for _, v := range up.Volumes {
		out[v.Volume] = float64(v.PauseMicros) / 1e3
	}
	return out, nil
}

// install puts a program in another's place, as a package manager does: in one step.
func install(from, to string) error {
	text, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.WriteFile(to+".new", text, 0o755); err != nil {
		return err
	}
	return os.Rename(to+".new", to)
}
