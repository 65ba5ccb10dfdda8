//go:build integration

package image

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// fileDevice is a disk kept in a plain file, the cheapest target there is.
type fileDevice struct {
	disk.File
	size int64
}

func (d *fileDevice) Size() int64             { return d.size }
func (d *fileDevice) Zero(off, n int64) error { return d.Punch(off, n) }
func (d *fileDevice) Flush() error            { return d.Sync() }
func (d *fileDevice) Extents(off, n int64) ([]block.Extent, error) {
	return []block.Extent{{Off: off, N: n, State: block.Data}}, nil
}

// writeCompressible makes a disk that is five eighths full of what compresses about as well as a root file system does.
func writeCompressible(b *testing.B, path string, n int64) {
	b.Helper()
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(n); err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 1<<20)
	for off := int64(0); off < n; off += int64(len(p)) {
		if off>>20%8 >= 5 {
			continue
		}
		sum := sha256.Sum256(binary.BigEndian.AppendUint64(nil, uint64(off)))
		for i := 0; i < len(p); i += 32 {
			if i%96 == 0 {
				sum = sha256.Sum256(sum[:])
			}
			copy(p[i:], sum[:])
		}
		if _, err := f.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkImport measures Import of a local file, with its SHA-512 and digest, against qemu-img convert, which makes neither. The size comes from
// ASHLAR_BENCH_BYTES.
func BenchmarkImport(b *testing.B) {
	size := int64(256 << 20)
	if s := os.Getenv("ASHLAR_BENCH_BYTES"); s != "" {
		if _, err := fmt.Sscan(s, &size); err != nil {
			b.Fatal(err)
		}
	}
	dir := b.TempDir()
	src, img, out := filepath.Join(dir, "src"), filepath.Join(dir, "img"), filepath.Join(dir, "out")
	writeCompressible(b, src, size)
	for name, args := range map[string]string{"raw": "-O raw", "plain": "-O qcow2", "zlib": "-O qcow2 -c", "zstd": "-O qcow2 -c -o compression_type=zstd"} {
		if o, err := exec.Command("qemu-img", append(append([]string{"convert"}, strings.Fields(args)...), src, img)...).CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, o)
		}
		b.Run(name+"/ashlar", func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				fsys, err := disk.OpenReal(dir, disk.RealOptions{})
				if err != nil {
					b.Fatal(err)
				}
				_, err = Import(context.Background(), Request{Source: img, Create: func(i Info) (block.Device, error) {
					f, err := fsys.Create("out", i.DeviceBytes)
					return &fileDevice{f, i.DeviceBytes}, err
				}})
				if err != nil {
					b.Fatal(err)
				}
				if err := fsys.Remove("out"); err != nil {
					b.Fatal(err)
				}
				fsys.Close()
			}
		})
		b.Run(name+"/qemu-img", func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				if o, err := exec.Command("qemu-img", "convert", "-O", "raw", img, out).CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, o)
				}
				os.Remove(out)
			}
		})
	}
}
