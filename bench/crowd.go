package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
	"ashlar/internal/nbd"
	"ashlar/internal/testbed"
)

// crowd is a node of its own that gets much to do at once, and is watched.
type crowd struct {
	p    *testbed.Process
	c    *client.Client
	dir  string
	node string
}

// patience bounds whatever is waited for.
const patience = 5 * time.Minute

// newCrowd starts a node that shows its profiles.
func (b *bench) newCrowd(ctx context.Context) (w *crowd, stop func() error, err error) {
	dir, err := os.MkdirTemp("", "acrowd")
	if err != nil {
		return nil, nil, err
	}
	if err := os.Setenv("ASHLAR_PPROF", "1"); err != nil {
		return nil, nil, err
	}
	w = &crowd{dir: dir}
	if w.p, err = testbed.StartProcess(ctx, b.bin, dir); err != nil {
		return nil, nil, err
	}
	stop = func() error {
		err := w.p.Stop(context.WithoutCancel(ctx))
		if rerr := os.RemoveAll(dir); err == nil {
			err = rerr
		}
		return err
	}
	w.c, err = client.New(client.Address(w.p.RunDir))
	if err == nil {
		var about api.About
		about, err = w.c.About(ctx)
		w.node = about.Node
	}
	if err != nil {
		stop() //nolint:errcheck // the first error counts
		return nil, nil, err
	}
	return w, stop, nil
}

func (w *crowd) uri(volume string) string {
	return "nbd+unix:///" + volume + "?socket=" + filepath.Join(w.p.RunDir, "nbd", volume+".sock")
}

func (w *crowd) create(ctx context.Context, n client.NewVolume) error {
	if _, err := w.c.CreateVolume(ctx, n); err != nil {
		return err
	}
	_, err := w.c.WaitVolume(ctx, n.Name, func(v api.Volume) (bool, error) { return v.State != "creating", nil })
	return err
}

func (w *crowd) attach(ctx context.Context, name string) error {
	if _, err := w.c.Attach(ctx, name, client.Attachment{Node: w.node}); err != nil {
		return err
	}
	_, err := w.c.WaitVolume(ctx, name, func(v api.Volume) (bool, error) {
		if v.Robustness == "faulted" {
			return false, fmt.Errorf("%w: volume %s is faulted: %s", errBench, name, v.Error)
		}
		return v.State == "attached" && v.Controllers[0].Endpoint != "", nil
	})
	return err
}

func (w *crowd) detach(ctx context.Context, name string) error {
	if _, err := w.c.Detach(ctx, name, client.Detachment{}); err != nil {
		return err
	}
	_, err := w.c.WaitVolume(ctx, name, func(v api.Volume) (bool, error) { return v.State == "detached", nil })
	return err
}

func (w *crowd) remove(ctx context.Context, name string) error {
	if err := w.c.DeleteVolume(ctx, name); err != nil {
		return err
	}
	return w.c.WaitVolumeGone(ctx, name)
}

// forget deletes a snapshot and frees its space.
func (w *crowd) forget(ctx context.Context, volume, name string) error {
	if err := w.c.DeleteSnapshot(ctx, volume, name); err != nil {
		return err
	}
	if _, err := w.c.Purge(ctx, volume); err != nil {
		return err
	}
	_, err := w.c.WaitVolume(ctx, volume, func(v api.Volume) (bool, error) {
		for _, p := range v.PurgeStatus {
			if p.IsPurging {
				return false, nil
			}
		}
		return true, nil
	})
	return err
}

// importFile imports a file of this machine and waits until it is ready.
func (w *crowd) importFile(ctx context.Context, name, path, checksum string) (api.BackingImage, error) {
	if _, err := w.c.ImportImage(ctx, client.NewImage{Name: name, Path: path, ExpectedChecksum: checksum, Copies: 1}); err != nil {
		return api.BackingImage{}, err
	}
	return w.c.WaitImage(ctx, name, func(img api.BackingImage) (bool, error) {
		for _, d := range img.DiskFileStatusMap {
			if d.State == "failed" {
				return false, fmt.Errorf("%w: image %s: %s", errBench, name, d.Message)
			}
			if d.State == "ready" {
				return true, nil
			}
		}
		return false, nil
	})
}

func (w *crowd) removeImage(ctx context.Context, name string) error {
	if err := w.c.DeleteImage(ctx, name); err != nil {
		return err
	}
	return w.c.WaitImageGone(ctx, name)
}

// dial connects to a volume, as often as it takes.
func (w *crowd) dial(ctx context.Context, volume string) (c *nbd.Client, err error) {
	var last error
	err = testbed.Until(ctx, patience, func() (bool, error) {
		c, last = nbd.Dial(ctx, w.uri(volume), nbd.ClientOptions{})
		return last == nil, nil
	})
	if err != nil {
		return nil, fmt.Errorf("connect to volume %s: %w: %w", volume, err, last)
	}
	return c, nil
}

// use runs f on a connection to a volume.
func (w *crowd) use(ctx context.Context, volume string, f func(*nbd.Client) error) error {
	c, err := w.dial(ctx, volume)
	if err != nil {
		return err
	}
	err = f(c)
	if cerr := c.Close(); err == nil {
		err = cerr
	}
	return err
}

// onDisk is what the files below a directory occupy.
func onDisk(dir string) (sum int64) {
	filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error { //nolint:errcheck // what goes away meanwhile has no size
		if err != nil {
			return nil
		}
		if info, err := d.Info(); err == nil {
			sum += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	return sum
}

// show prints what the processes need now, and returns it.
func (w *crowd) show(ctx context.Context, when string) (map[string]testbed.Vitals, error) {
	out := map[string]testbed.Vitals{}
	fmt.Printf("  %-42s", when)
	for _, sub := range []string{"serve", "data", "hold"} {
		look := w.p.Vitals
		if sub != "hold" {
			look = func(sub string) (testbed.Vitals, error) { return w.p.Inside(ctx, sub) }
		}
		v, err := look(sub)
		if err != nil {
			return nil, err
		}
		out[sub] = v
		fmt.Printf("  %s %.0f MiB, heap %.0f, %d files, %d threads, %d goroutines;", sub, float64(v.ResidentBytes)/(1<<20), float64(v.HeapBytes)/(1<<20), v.Files, v.Threads, v.Goroutines)
	}
	fmt.Println()
	return out, nil
}

// times collects how long many alike things took; it may be used concurrently.
type times struct {
	mu  sync.Mutex // guards all
	all []float64  // milliseconds, in the order of their ends
}

func (t *times) run(f func() error) error {
	start := time.Now()
	err := f()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.all = append(t.all, ms(start))
	return err
}

// drift is the median of the last tenth over that of the first: 1 when it does not matter how many there are.
func (t *times) drift() float64 {
	n := max(1, len(t.all)/10)
	return median(t.all[len(t.all)-n:]) / median(t.all[:n])
}

func (t *times) worst() (w float64) {
	for _, x := range t.all {
		w = max(w, x)
	}
	return w
}

func (t *times) String() string {
	return fmt.Sprintf("median %.0f ms, slowest %.0f ms, last tenth %.1f x the first", median(t.all), t.worst(), t.drift())
}

// each runs f for many names, some at one time.
func each(ctx context.Context, names []string, atOnce int, f func(context.Context, string) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for _, name := range names {
		g.Go(func() error { return f(ctx, name) })
	}
	return g.Wait()
}
