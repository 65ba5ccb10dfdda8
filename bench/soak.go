package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
	"ashlar/internal/nbd"
	"ashlar/internal/testbed"
)

const (
	soakVolumes = 4                    // under steady I/O
	soakPause   = 5 * time.Millisecond // between two requests of a volume
	soakKept    = 5                    // snapshots of each volume
	soakSample  = 5 * time.Second      // between two samples
)

// errGrows: something was more at the end of the soak than noise explains.
var errGrows = errors.New("something grows without bound")

// soak keeps a node of its own busy with everything at a moderate rate, and fails if what it needs grows. It is not run unless it is picked.
func (b *bench) soak(ctx context.Context) (err error) {
	w, stop, err := b.newCrowd(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if serr := stop(); err == nil {
			err = serr
		}
	}()
	golden := filepath.Join(w.dir, "golden.raw")
	if err := randomFile(golden, scaleImage, 1); err != nil {
		return err
	}
	var names []string
	for i := range soakVolumes {
		name := "busy" + strconv.Itoa(i)
		names = append(names, name)
		if err := w.create(ctx, client.NewVolume{Name: name, Size: "1Gi"}); err != nil {
			return err
		}
		if err := w.attach(ctx, name); err != nil {
			return err
		}
	}
	fmt.Printf("\nsoak of %v: %d volumes with a request of 4 KiB each %v and a flush each 100, a snapshot and a deletion each 2 s, an import, a volume of it, and their deletion each 3 s, event streams, lists each second\n",
		b.soakFor, soakVolumes, soakPause)
	var did [5]int // I/O, snapshots, imports, streams, lists: each has one writer
	g, gctx := errgroup.WithContext(ctx)
	load, end := context.WithCancel(gctx)
	ios := make([]int, soakVolumes)
	for i, name := range names {
		g.Go(func() error { return ended(load, w.busy(load, name, &ios[i])) })
	}
	g.Go(func() error { return ended(load, w.snapshots(load, names, &did[1])) })
	g.Go(func() error { return ended(load, w.comings(load, golden, &did[2])) })
	g.Go(func() error { return ended(load, w.followed(load, &did[3])) })
	g.Go(func() error {
		return ended(load, every(load, time.Second, func(int) error { did[4]++; _, err := w.c.Volumes(load); return err }))
	})
	var samples []sample
	g.Go(func() (err error) {
		defer end()
		samples, err = w.sample(load, b.soakFor)
		return err
	})
	if err := g.Wait(); err != nil {
		return err
	}
	for _, n := range ios {
		did[0] += n
	}
	fmt.Printf("  done: %d reads and writes, verified; %d snapshots taken; %d images and volumes made and deleted; %d event streams; %d lists\n", did[0], did[1], did[2], did[3], did[4])
	return b.judge(samples)
}

// ended forgives what was broken off because the load is over.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// every calls f at a rate until it fails or ctx ends; when it is late it does not catch up.
func every(ctx context.Context, pause time.Duration, f func(n int) error) error {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := f(n); err != nil {
			return err
		}
	}
}

// busy writes and reads back, in random places, at a steady rate.
func (w *crowd) busy(ctx context.Context, name string, n *int) error {
	const places = 4096 // of 64 KiB: a quarter of the volume
	return w.use(ctx, name, func(c *nbd.Client) error {
		rng := rand.New(rand.NewPCG(uint64(len(name)), uint64(name[len(name)-1])))
		written := map[int64]byte{}
		p := make([]byte, 4096)
		return every(ctx, soakPause, func(i int) error {
			*n++
			off := rng.Int64N(places) << 16
			if was, ok := written[off]; ok && i%2 == 0 {
				if _, err := c.ReadAt(p, off); err != nil {
					return err
				}
				if p[0] != was || p[4095] != was {
					return fmt.Errorf("%w: volume %s reads %d, %d at %d, want %d", errBench, name, p[0], p[4095], off, was)
				}
				return nil
			}
			fill := byte(rng.IntN(256))
			for k := range p {
				p[k] = fill
			}
			if _, err := c.WriteAt(p, off); err != nil {
				return err
			}
			written[off] = fill
			if i%100 == 0 {
				return c.Flush()
			}
			return nil
		})
	})
}

// snapshots takes one after the other in turns and deletes the oldest.
func (w *crowd) snapshots(ctx context.Context, names []string, n *int) error {
	return every(ctx, 2*time.Second, func(i int) error {
		name, round := names[i%len(names)], i/len(names)
		if _, err := w.c.CreateSnapshot(ctx, name, client.NewSnapshot{Name: "s" + strconv.Itoa(round)}); err != nil {
			return err
		}
		*n++
		if round < soakKept {
			return nil
		}
		return w.forget(ctx, name, "s"+strconv.Itoa(round-soakKept))
	})
}

// comings imports an image, attaches a volume that stands on it, uses it, and takes all away again.
func (w *crowd) comings(ctx context.Context, golden string, n *int) error {
	return every(ctx, 3*time.Second, func(i int) error {
		image, volume := "i"+strconv.Itoa(i), "t"+strconv.Itoa(i)
		if _, err := w.importFile(ctx, image, golden, ""); err != nil {
			return err
		}
		for _, f := range []func() error{
			func() error { return w.create(ctx, client.NewVolume{Name: volume, Size: "64Mi", Image: image}) },
			func() error { return w.attach(ctx, volume) },
			func() error { return w.use(ctx, volume, mark(int64(i))) },
			func() error { return w.detach(ctx, volume) },
			func() error { return w.remove(ctx, volume) },
			func() error { return w.removeImage(ctx, image) },
		} {
			if err := f(); err != nil {
				return fmt.Errorf("round %d: %w", i, err)
			}
		}
		*n++
		return nil
	})
}

// followed keeps one event stream open all the time, and others for a second each.
func (w *crowd) followed(ctx context.Context, n *int) error {
	each := func(api.Event) error { return nil }
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return ended(ctx, w.c.FollowEvents(ctx, "", each, nil)) })
	g.Go(func() error {
		return every(ctx, 5*time.Second, func(int) error {
			*n++
			short, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			return ended(short, w.c.FollowEvents(short, "now", each, nil))
		})
	})
	return g.Wait()
}

// sample is what was seen at one time.
type sample struct {
	Seconds                        float64
	Serve, Data, Hold              testbed.Vitals
	RunBytes, DiskBytes, EtcdBytes int64
}

// sample looks again and again for a time.
func (w *crowd) sample(ctx context.Context, length time.Duration) (all []sample, err error) {
	start := time.Now()
	disk := filepath.Join(w.p.DataDir, "disks")
	for len(all) == 0 || time.Since(start) < length {
		s := sample{Seconds: time.Since(start).Seconds(), RunBytes: onDisk(w.p.RunDir), DiskBytes: onDisk(disk)}
		s.EtcdBytes = onDisk(w.p.DataDir) - s.DiskBytes
		if s.Serve, err = w.p.Inside(ctx, "serve"); err != nil {
			return nil, err
		}
		if s.Data, err = w.p.Inside(ctx, "data"); err != nil {
			return nil, err
		}
		if s.Hold, err = w.p.Vitals("hold"); err != nil {
			return nil, err
		}
		all = append(all, s)
		if len(all)%6 == 1 {
			fmt.Printf("  %4.0f s  serve %.0f MiB, heap %.1f, %d goroutines, %d files;  data %.0f MiB, heap %.1f, %d goroutines, %d files;  hold %.0f MiB, %d files;  run-dir %.1f, disk %.0f, catalogue %.1f MiB\n",
				s.Seconds, mib(s.Serve.ResidentBytes), mib(s.Serve.HeapBytes), s.Serve.Goroutines, s.Serve.Files, mib(s.Data.ResidentBytes), mib(s.Data.HeapBytes), s.Data.Goroutines, s.Data.Files,
				mib(s.Hold.ResidentBytes), s.Hold.Files, mib(s.RunBytes), mib(s.DiskBytes), mib(s.EtcdBytes))
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(soakSample):
		}
	}
	return all, nil
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

// judge compares the second minute with the last; in the first, snapshots and caches fill up. It wants four minutes at least. What a process keeps for an hour or a number of times, such as ended operations, is in the slack.
func (b *bench) judge(all []sample) error {
	n := int(time.Minute / soakSample)
	if len(all) < 4*n*9/10 { // a sample takes its time, too
		return fmt.Errorf("%w: %d samples are too few to judge; let it run for four minutes", errBench, len(all))
	}
	mean := func(part []sample, f func(sample) float64) (sum float64) {
		for _, s := range part {
			sum += f(s)
		}
		return sum / float64(len(part))
	}
	var grown []error
	fmt.Printf("  %-34s %12s %12s\n", "averages of a minute", "second", "last")
	for _, r := range []struct {
		what          string
		f             func(sample) float64
		factor, slack float64 // what noise may add; 0: only shown
	}{
		{"serve: goroutines", func(s sample) float64 { return float64(s.Serve.Goroutines) }, 1.1, 10},
		{"serve: descriptors", func(s sample) float64 { return float64(s.Serve.Files) }, 1.1, 5},
		{"serve: heap, MiB", func(s sample) float64 { return mib(s.Serve.HeapBytes) }, 1.25, 8},
		{"serve: private memory, MiB", func(s sample) float64 { return mib(s.Serve.PrivateBytes) }, 1.25, 16},
		{"serve: resident, MiB", func(s sample) float64 { return mib(s.Serve.ResidentBytes) }, 0, 0},
		{"serve: threads", func(s sample) float64 { return float64(s.Serve.Threads) }, 1.2, 4},
		{"data: goroutines", func(s sample) float64 { return float64(s.Data.Goroutines) }, 1.1, 10},
		{"data: descriptors", func(s sample) float64 { return float64(s.Data.Files) }, 1.1, 5},
		{"data: heap, MiB", func(s sample) float64 { return mib(s.Data.HeapBytes) }, 1.25, 8},
		{"data: private memory, MiB", func(s sample) float64 { return mib(s.Data.PrivateBytes) }, 1.25, 16},
		{"data: resident, MiB", func(s sample) float64 { return mib(s.Data.ResidentBytes) }, 0, 0},
		{"data: threads", func(s sample) float64 { return float64(s.Data.Threads) }, 1.2, 4},
		{"hold: descriptors", func(s sample) float64 { return float64(s.Hold.Files) }, 1.1, 3},
		{"hold: resident, MiB", func(s sample) float64 { return mib(s.Hold.ResidentBytes) }, 1.25, 8},
		{"run directory, MiB", func(s sample) float64 { return mib(s.RunBytes) }, 1.25, 4},
		{"disk, MiB", func(s sample) float64 { return mib(s.DiskBytes) }, 0, 0},
		{"catalogue, MiB", func(s sample) float64 { return mib(s.EtcdBytes) }, 0, 0},
	} {
		first, last := mean(all[n:2*n], r.f), mean(all[len(all)-n:], r.f)
		verdict := ""
		if r.factor > 0 {
			limit := first*r.factor + r.slack
			b.note(result{What: "soak, " + r.what + ": last minute beside the second", Ours: last, Peer: first, PeerName: "second minute", Ratio: last / first,
				Target: fmt.Sprintf("<= %.1f", limit), Holds: last <= limit})
			if last > limit {
				verdict = "GROWS"
				grown = append(grown, fmt.Errorf("%w: %s: %.1f, then %.1f", errGrows, r.what, first, last))
			}
		}
		fmt.Printf("  %-34s %12.1f %12.1f  %s\n", r.what, first, last, verdict)
	}
	return errors.Join(grown...)
}
