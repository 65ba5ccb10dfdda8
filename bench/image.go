package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"ashlar/internal/job"
	"ashlar/internal/layer"

	"golang.org/x/sys/unix"
)

// imageBytes is the disk that is exported and imported; seven eighths of it are data.
const imageBytes = 2 << 30

// images times exports and imports of 2 GiB beside qemu-img convert: the same NBD export, the same files, and both durable at the end (qemu-img with -t writeback, which flushes). Ours are work processes as the data process
// starts them. Imports also make the file's SHA-512, the content's digest and the layer's checksums, which qemu-img does not.
func (b *bench) images(ctx context.Context) error {
	dir := filepath.Join(b.dir, "images")
	if err := os.MkdirAll(filepath.Join(dir, "tmp"), 0o700); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	raw, qcow2 := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "disk.qcow2")
	if err := writeDisk(raw); err != nil {
		return err
	}
	if err := command(ctx, "qemu-img", "convert", "-O", "qcow2", raw, qcow2); err != nil {
		return err
	}
	source, stop, err := b.diskVolume(ctx, raw)
	if err != nil {
		return err
	}
	defer stop()
	out := filepath.Join(dir, "out")
	for _, c := range []struct {
		what         string
		target       float64
		ours, theirs func() error
	}{
		{"export 2 GiB raw", 1.5, b.export(ctx, source, "raw", "", out), convert(ctx, source, out, "-O", "raw")},
		{"export 2 GiB qcow2", 0.5, b.export(ctx, source, "qcow2", "", out), convert(ctx, source, out, "-O", "qcow2")},
		{"export 2 GiB qcow2, zstd", 0.5, b.export(ctx, source, "qcow2", "zstd", out), convert(ctx, source, out, "-O", "qcow2", "-c", "-o", "compression_type=zstd")},
		{"import 2 GiB raw, file", 1.5, b.importFile(ctx, raw, dir), convert(ctx, raw, out, "-O", "raw")},
		{"import 2 GiB qcow2, file", 0.5, b.importFile(ctx, qcow2, dir), convert(ctx, qcow2, out, "-O", "raw")},
		{"import 2 GiB raw, NBD", 1.5, b.importFile(ctx, source, dir), convert(ctx, source, out, "-O", "raw")},
	} {
		var ours, theirs []float64
		for range b.rounds {
			for _, side := range []struct {
				run  func() error
				took *[]float64
			}{{c.ours, &ours}, {c.theirs, &theirs}} {
				unix.Sync() // what the other left to be written, and freed, is not charged to this one
				start := time.Now()
				if err := side.run(); err != nil {
					return fmt.Errorf("%s: %w", c.what, err)
				}
				*side.took = append(*side.took, time.Since(start).Seconds())
				if err := os.Remove(out); err != nil && !errors.Is(err, os.ErrNotExist) {
					return err
				}
			}
		}
		mine, peer := imageBytes/1e6/median(ours), imageBytes/1e6/median(theirs)
		fmt.Printf("%s: %.0f MB/s, qemu-img convert %.0f MB/s\n", c.what, mine, peer)
		b.note(result{What: c.what + ", MB/s", Ours: mine, Peer: peer, PeerName: "qemu-img convert", Ratio: mine / peer, Target: fmt.Sprintf(">= %.1f x", c.target), Holds: mine >= c.target*peer})
	}
	return nil
}

// writeDisk writes a disk of data that does not pack well, with a hole of 32 MiB in each 256.
func writeDisk(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(imageBytes); err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(1, 2))
	w := bufio.NewWriterSize(f, 1<<20)
	var word [8]byte
	for off := int64(0); off < imageBytes; off += 32 << 20 {
		if off>>25%8 == 7 {
			continue
		}
		if _, err := f.Seek(off, 0); err != nil {
			return err
		}
		for i := range 32 << 20 / 8 {
			binary.LittleEndian.PutUint64(word[:], rng.Uint64()>>(i>>9&1*24)) // half of the sectors have some zero bytes
			if _, err := w.Write(word[:]); err != nil {
				return err
			}
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	return f.Sync()
}

// diskVolume makes an attached volume with the disk's content.
func (b *bench) diskVolume(ctx context.Context, raw string) (uri string, stop func(), err error) {
	const name = "images"
	for _, args := range [][]string{{"volume", "create", name, "--size", "2Gi"}, {"volume", "attach", name}} {
		if err := b.node.Run(ctx, nil, args...); err != nil {
			return "", nil, err
		}
	}
	if err := command(ctx, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", raw, b.uri(name)); err != nil {
		return "", nil, err
	}
	return b.uri(name), func() {
		for _, args := range [][]string{{"volume", "detach", name}, {"volume", "delete", name}} {
			if err := b.node.Run(context.WithoutCancel(ctx), nil, args...); err != nil {
				fmt.Fprintln(os.Stderr, "bench:", err)
			}
		}
	}, nil
}

func (b *bench) work(ctx context.Context, spec job.Spec) error {
	j, err := job.Start(ctx, job.Config{Exe: b.bin}, spec)
	if err != nil {
		return err
	}
	_, err = j.Wait()
	return err
}

func (b *bench) export(ctx context.Context, source, format, compress, to string) func() error {
	return func() error {
		return b.work(ctx, job.Spec{Kind: job.KindExport, Export: &job.Export{Source: source, Format: format, Compress: compress, To: to}})
	}
}

func (b *bench) importFile(ctx context.Context, source, root string) func() error {
	return func() error {
		id := string(layer.NewID())
		name := "tmp/" + id
		err := b.work(ctx, job.Spec{Kind: job.KindImport, Import: &job.Import{Source: source, Root: root, Name: name, LayerID: id, ImageID: id, ImageName: "bench", BootID: id}})
		return errors.Join(err, os.Remove(filepath.Join(root, name)))
	}
}

// convert runs qemu-img until the result is on the disk, as nice as work processes are.
func convert(ctx context.Context, from, to string, args ...string) func() error {
	return func() error {
		return command(ctx, "nice", append(append([]string{"-n", "10", "qemu-img", "convert", "-t", "writeback"}, args...), from, to)...)
	}
}

func command(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}
