package main

import (
	"context"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"ashlar/internal/api/client"
	"ashlar/internal/nbd"
	"ashlar/internal/testbed"
)

// How much there is: 200 attached volumes with 1,000 snapshots in all, and 100 imports at once.
const (
	scaleVolumes   = 200
	scaleSnapshots = 5 // of each
	scaleImports   = 100
	scaleImage     = 8 << 20
)

// scale fills a node of its own: how long things take, what the processes need, and that all of it comes back.
func (b *bench) scale(ctx context.Context) (err error) {
	w, stop, err := b.newCrowd(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if serr := stop(); err == nil {
			err = serr
		}
	}()
	fmt.Println("\nscale")
	var names []string
	for i := range scaleVolumes {
		names = append(names, fmt.Sprintf("v%03d", i))
	}
	golden := filepath.Join(w.dir, "golden.raw")
	if err := randomFile(golden, 64<<20, 1); err != nil {
		return err
	}
	// Once through everything, so that what stays for good is there already.
	if err := w.rehearse(ctx, golden); err != nil {
		return err
	}
	disk := filepath.Join(w.p.DataDir, "disks", "default")
	before, err := w.show(ctx, "nothing")
	if err != nil {
		return err
	}
	emptyBytes := onDisk(disk)
	for _, part := range []func() error{
		func() error { return b.manyVolumes(ctx, w, golden, names) },
		func() error { return b.manyBack(ctx, w, names, "") },
		func() error { return b.manySnapshots(ctx, w, names) },
		func() error { return b.manyListed(ctx, w) },
		func() error { return b.manyBack(ctx, w, names, ", 1,000 snapshots") },
		func() error { return b.manyImports(ctx, w) },
	} {
		if err := part(); err != nil {
			return err
		}
	}
	fullBytes := onDisk(disk)
	start := time.Now()
	var detach, remove times
	err = each(ctx, names, 4, func(ctx context.Context, name string) error {
		if err := detach.run(func() error { return w.detach(ctx, name) }); err != nil {
			return err
		}
		return remove.run(func() error { return w.remove(ctx, name) })
	})
	if err == nil {
		err = w.removeImage(ctx, "golden")
	}
	if err != nil {
		return err
	}
	fmt.Printf("  %d volumes detached and deleted, 4 at a time: %.1f s; detach: %v; delete: %v\n", scaleVolumes, time.Since(start).Seconds(), &detach, &remove)
	return b.allBack(ctx, w, before, [3]int64{emptyBytes, fullBytes, onDisk(disk)})
}

// rehearse does everything once.
func (w *crowd) rehearse(ctx context.Context, golden string) error {
	if _, err := w.importFile(ctx, "golden", golden, ""); err != nil {
		return err
	}
	if err := w.create(ctx, client.NewVolume{Name: "first", Size: "1Gi", Image: "golden"}); err != nil {
		return err
	}
	if err := w.attach(ctx, "first"); err != nil {
		return err
	}
	if _, err := w.c.CreateSnapshot(ctx, "first", client.NewSnapshot{Name: "s"}); err != nil {
		return err
	}
	for _, f := range []func(context.Context, string) error{w.detach, w.remove} {
		if err := f(ctx, "first"); err != nil {
			return err
		}
	}
	return w.removeImage(ctx, "golden")
}

// manyVolumes creates and attaches them, one after the other, half of them on an image.
func (b *bench) manyVolumes(ctx context.Context, w *crowd, golden string, names []string) error {
	if _, err := w.importFile(ctx, "golden", golden, ""); err != nil {
		return err
	}
	var create, attach, use times
	start := time.Now()
	for i, name := range names {
		n := client.NewVolume{Name: name, Size: "1Gi"}
		if i%2 == 1 {
			n.Image = "golden"
		}
		if err := create.run(func() error { return w.create(ctx, n) }); err != nil {
			return err
		}
		if err := attach.run(func() error { return w.attach(ctx, name) }); err != nil {
			return err
		}
		if err := use.run(func() error { return w.use(ctx, name, mark(int64(i))) }); err != nil {
			return err
		}
	}
	took := time.Since(start).Seconds()
	fmt.Printf("  %d volumes, half of them on an image, one after the other: %.1f s; create: %v; attach: %v; connect, write 64 KiB, flush: %v\n", len(names), took, &create, &attach, &use)
	b.note(result{What: fmt.Sprintf("%d volumes created, attached, written: s", len(names)), Ours: took, Ratio: took / 60, Target: "<= 60 s", Holds: took <= 60})
	b.note(result{What: "attach, the 200th beside the first ones", Ours: attach.drift(), Ratio: attach.drift() / 3, Target: "<= 3 x", Holds: attach.drift() <= 3})
	now, err := w.show(ctx, fmt.Sprintf("%d volumes attached", len(names)))
	if err != nil {
		return err
	}
	each := float64(now["data"].ResidentBytes) / float64(len(names)) / (1 << 20)
	b.note(result{What: "data, resident MiB per attached volume", Ours: each, Ratio: each / 4, Target: "<= 4 MiB", Holds: each <= 4})
	return nil
}

// mark writes 64 KiB that tell the volumes from each other, durably.
func mark(seed int64) func(*nbd.Client) error {
	return func(c *nbd.Client) error {
		if _, err := c.WriteAt(marked(seed), 0); err != nil {
			return err
		}
		return c.Flush()
	}
}

func marked(seed int64) []byte {
	p := make([]byte, 64<<10)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 7}).Read(p) //nolint:errcheck // it cannot fail
	return p
}

// manyBack kills the data process and waits until every volume reads what was written.
func (b *bench) manyBack(ctx context.Context, w *crowd, names []string, with string) error {
	start := time.Now()
	if err := w.p.Kill("data"); err != nil {
		return err
	}
	err := each(ctx, names, 8, func(ctx context.Context, name string) error {
		i, err := strconv.ParseInt(name[1:], 10, 64)
		if err != nil {
			return err
		}
		return w.use(ctx, name, func(c *nbd.Client) error {
			got := make([]byte, 64<<10)
			if _, err := c.ReadAt(got, 0); err != nil {
				return err
			}
			if string(got) != string(marked(i)) {
				return fmt.Errorf("%w: volume %s reads wrong after a kill", errBench, name)
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	took := time.Since(start).Seconds()
	fmt.Printf("  data killed with %d volumes attached%s: all answer with what was written after %.2f s\n", len(names), with, took)
	b.note(result{What: fmt.Sprintf("kill -9 of data, %d volumes%s: all back, s", len(names), with), Ours: took, Ratio: took / 10, Target: "<= 10 s", Holds: took <= 10})
	_, err = w.show(ctx, "after the kill")
	return err
}

// manySnapshots takes them in turns, with a write between.
func (b *bench) manySnapshots(ctx context.Context, w *crowd, names []string) error {
	var snap times
	start := time.Now()
	for round := range scaleSnapshots {
		for i, name := range names {
			err := w.use(ctx, name, func(c *nbd.Client) error {
				_, err := c.WriteAt(marked(int64(round+i)), int64(round+1)<<20)
				return err
			})
			if err != nil {
				return err
			}
			err = snap.run(func() error {
				_, err := w.c.CreateSnapshot(ctx, name, client.NewSnapshot{Name: "s" + strconv.Itoa(round)})
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	n, took := len(names)*scaleSnapshots, time.Since(start).Seconds()
	fmt.Printf("  %d snapshots of %d volumes, 64 KiB written before each: %.1f s; snapshot: %v\n", n, len(names), took, &snap)
	b.note(result{What: fmt.Sprintf("%d snapshots, %d volumes: median ms", n, len(names)), Ours: median(snap.all), Ratio: median(snap.all) / 100, Target: "<= 100 ms", Holds: median(snap.all) <= 100})
	b.note(result{What: "snapshot, the 1,000th beside the first ones", Ours: snap.drift(), Ratio: snap.drift() / 3, Target: "<= 3 x", Holds: snap.drift() <= 3})
	_, err := w.show(ctx, fmt.Sprintf("%d volumes, %d snapshots", len(names), n))
	return err
}

// manyListed asks for lists.
func (b *bench) manyListed(ctx context.Context, w *crowd) error {
	var list, status, snapshots times
	for range 20 {
		err := list.run(func() error {
			all, err := w.c.Volumes(ctx)
			if err == nil && len(all) != scaleVolumes {
				err = fmt.Errorf("%w: %d volumes are listed", errBench, len(all))
			}
			return err
		})
		if err != nil {
			return err
		}
		if err := snapshots.run(func() error { _, err := w.c.Snapshots(ctx, "v000"); return err }); err != nil {
			return err
		}
	}
	for range 5 {
		if err := status.run(func() error { return w.p.Run(ctx, nil, "status") }); err != nil {
			return err
		}
	}
	fmt.Printf("  GET /v1/volumes: %v; a volume's snapshots: %v; ashlar status: %v\n", &list, &snapshots, &status)
	b.note(result{What: "GET /v1/volumes of 200, ms", Ours: median(list.all), Ratio: median(list.all) / 200, Target: "<= 200 ms", Holds: median(list.all) <= 200})
	b.note(result{What: "ashlar status with 200 volumes, ms", Ours: median(status.all), Ratio: median(status.all) / 500, Target: "<= 500 ms", Holds: median(status.all) <= 500})
	return nil
}

// small is an image to be imported.
type small struct{ name, path, sum string }

// smallImages makes pairs of a raw and a qcow2 file of the same content.
func smallImages(ctx context.Context, dir string) (all []small, err error) {
	for i := range scaleImports / 2 {
		raw := filepath.Join(dir, fmt.Sprintf("small%d.raw", i))
		qcow2 := filepath.Join(dir, fmt.Sprintf("small%d.qcow2", i))
		if err := randomFile(raw, scaleImage, byte(i+2)); err != nil {
			return nil, err
		}
		if err := command(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2); err != nil {
			return nil, err
		}
		for kind, path := range map[string]string{"r": raw, "q": qcow2} {
			sum, err := fileSum(path)
			if err != nil {
				return nil, err
			}
			all = append(all, small{name: kind + strconv.Itoa(i), path: path, sum: sum})
		}
	}
	return all, nil
}

// workers watches the work processes: how many there are at a time, and their memory with and without the data process's.
type workers struct{ most, data, sum int64 }

func (s *workers) watch(ctx context.Context, p *testbed.Process) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		pids := p.Workers()
		s.most = max(s.most, int64(len(pids)))
		var sum int64
		for _, pid := range pids {
			if v, err := testbed.VitalsOf(pid); err == nil { // else it has ended
				sum += v.ResidentBytes
			}
		}
		s.sum = max(s.sum, sum)
		if v, err := p.Vitals("data"); err == nil {
			s.data = max(s.data, v.ResidentBytes)
		}
	}
}

// manyImports asks for all of them at once, wants the right content in each, and deletes them.
func (b *bench) manyImports(ctx context.Context, w *crowd) error {
	all, err := smallImages(ctx, w.dir)
	if err != nil {
		return err
	}
	var seen workers
	var watching sync.WaitGroup
	short, stop := context.WithCancel(ctx)
	watching.Go(func() { seen.watch(short, w.p) })
	var mu sync.Mutex // guards digests
	digests := map[string]string{}
	var took times
	start := time.Now()
	byName, names := map[string]small{}, []string{}
	for _, s := range all {
		byName[s.name], names = s, append(names, s.name)
	}
	err = each(ctx, names, len(names), func(ctx context.Context, name string) error {
		return took.run(func() error {
			img, err := w.importFile(ctx, name, byName[name].path, "sha512:"+byName[name].sum)
			mu.Lock()
			defer mu.Unlock()
			digests[name] = img.Digest
			return err
		})
	})
	total := time.Since(start).Seconds()
	stop()
	watching.Wait()
	if err != nil {
		return err
	}
	distinct := map[string]bool{}
	for i := range scaleImports / 2 {
		raw, qcow2 := digests["r"+strconv.Itoa(i)], digests["q"+strconv.Itoa(i)]
		if raw == "" || raw != qcow2 || distinct[raw] {
			return fmt.Errorf("%w: image r%d has digest %q, q%d %q", errBench, i, raw, i, qcow2)
		}
		distinct[raw] = true
	}
	fmt.Printf("  %d imports of %d MiB at once, raw and qcow2: all ready and right after %.1f s (%v); at most %d work processes at a time with %.0f MiB together; data at most %.0f MiB\n",
		scaleImports, scaleImage>>20, total, &took, seen.most, float64(seen.sum)/(1<<20), float64(seen.data)/(1<<20))
	b.note(result{What: "100 imports at once: all ready, s", Ours: total, Ratio: total / 120, Target: "<= 120 s", Holds: total <= 120})
	b.note(result{What: "100 imports at once: work processes at a time", Ours: float64(seen.most), Ratio: float64(seen.most) / 4, Target: "<= 4", Holds: seen.most <= 4})
	start = time.Now()
	if err := each(ctx, names, 4, w.removeImage); err != nil {
		return err
	}
	fmt.Printf("  %d images deleted: %.1f s\n", scaleImports, time.Since(start).Seconds())
	return nil
}

// allBack wants descriptors, goroutines, memory and space to be as before, or nearly. bytes are those on the disk: before, with everything, now.
func (b *bench) allBack(ctx context.Context, w *crowd, before map[string]testbed.Vitals, bytes [3]int64) error {
	after, err := w.settle(ctx, before)
	if err != nil {
		return err
	}
	for _, sub := range []string{"serve", "data", "hold"} {
		files, routines := after[sub].Files-before[sub].Files, after[sub].Goroutines-before[sub].Goroutines
		heap := float64(after[sub].HeapBytes-before[sub].HeapBytes) / (1 << 20)
		b.note(result{What: sub + ": descriptors left over", Ours: float64(files), Target: "<= 2", Holds: files <= 2})
		if sub != "hold" {
			b.note(result{What: sub + ": goroutines left over", Ours: float64(routines), Target: "<= 5", Holds: routines <= 5})
			b.note(result{What: sub + ": heap left over, MiB", Ours: heap, Target: "<= 16 MiB", Holds: heap <= 16})
		}
	}
	left := float64(bytes[2]-bytes[0]) / (1 << 20)
	fmt.Printf("  on the disk: %.1f MiB at first, %.0f with everything, %.1f when all was deleted\n", float64(bytes[0])/(1<<20), float64(bytes[1])/(1<<20), float64(bytes[2])/(1<<20))
	b.note(result{What: "disk space left over, MiB", Ours: left, Target: "<= 1 MiB", Holds: left <= 1})
	return nil
}

// settle waits, not for long, until descriptors and goroutines are those of before; connections end and are collected when they like.
func (w *crowd) settle(ctx context.Context, before map[string]testbed.Vitals) (map[string]testbed.Vitals, error) {
	w.c.Close()
	short, cancel := context.WithTimeout(ctx, 40*time.Second)
	defer cancel()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for back := false; !back && short.Err() == nil; {
		back = true
		for _, sub := range []string{"serve", "data"} {
			now, err := w.p.Inside(ctx, sub)
			if err != nil {
				return nil, err
			}
			back = back && now.Files <= before[sub].Files && now.Goroutines <= before[sub].Goroutines
		}
		select {
		case <-short.Done():
		case <-tick.C:
		}
	}
	return w.show(ctx, "all deleted")
}

// randomFile writes a file that does not pack.
func randomFile(path string, n int64, seed byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyN(f, rand.NewChaCha8([32]byte{seed}), n)
	return err
}

func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha512.New()
	_, err = io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), err
}
