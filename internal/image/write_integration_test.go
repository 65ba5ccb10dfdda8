//go:build integration

package image

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"ashlar/internal/block"
)

// TestQemuReadsWhatWeWrite: qemu-img finds no error and no leak in what we write, and the same disk as in the raw file we write.
func TestQemuReadsWhatWeWrite(t *testing.T) {
	dir := t.TempDir()
	huge := block.NewMem(6 << 40)
	for i := range int64(20) {
		if _, err := huge.WriteAt([]byte(fmt.Sprintf("written %d", i)), i*300<<30); err != nil {
			t.Fatal(err)
		}
	}
	full := block.NewMem(32 << 20)
	rng := rand.New(rand.NewPCG(1, 9))
	noise := make([]byte, full.Size())
	for i := range noise {
		noise[i] = byte(rng.Uint32())
	}
	if _, err := full.WriteAt(noise, 0); err != nil {
		t.Fatal(err)
	}
	constant := block.NewMem(300 << 20) // thousands of compressed clusters in each cluster of the file
	for off := int64(0); off < constant.Size(); off += 1 << 20 {
		p := make([]byte, 1<<20)
		for i := range p {
			p[i] = 7
		}
		if _, err := constant.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	for name, dev := range map[string]block.Device{
		"empty": block.NewMem(1 << 30), "full": full, "constant": constant, "huge": huge,
		"sparse": patchwork(t, rng, 200<<20, 60), "odd": patchwork(t, rng, 9<<20+513, 30), "tiny": patchwork(t, rng, 1, 1), "over 4 GiB": patchwork(t, rng, 5<<30+4096, 60),
	} {
		raw := filepath.Join(dir, "raw")
		f, err := os.Create(raw)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(dev.Size()); err != nil {
			t.Fatal(err)
		}
		if name != "huge" {
			if err := WriteRawAt(t.Context(), f, dev, RawOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		f.Close()
		for _, o := range []Qcow2Options{{}, {Compress: "zlib"}, {Compress: "zstd"}, {ClusterBytes: 2 << 20, Compress: "zstd"}, {ClusterBytes: 4096}, {ClusterBytes: 8192, Compress: "zlib"}} {
			for _, way := range []string{"file", "stream"} {
				if name == "huge" && o.ClusterBytes == 4096 || name != "odd" && name != "sparse" && o.ClusterBytes != 0 {
					continue
				}
				t.Run(fmt.Sprintf("%s %s%d %s", name, o.Compress, o.ClusterBytes, way), func(t *testing.T) {
					img := filepath.Join(dir, "img")
					f, err := os.Create(img)
					if err != nil {
						t.Fatal(err)
					}
					defer f.Close()
					var n int64
					if way == "file" {
						n, err = WriteQcow2At(t.Context(), f, dev, o)
					} else {
						w := bufio.NewWriter(f)
						n, err = WriteQcow2(t.Context(), w, dev, o)
						if e := w.Flush(); err == nil {
							err = e
						}
					}
					if info, e := f.Stat(); err != nil || e != nil || info.Size() != n {
						t.Fatalf("%d bytes: %v, %v", n, err, e)
					}
					command(t, "qemu-img", "check", "-q", "-f", "qcow2", img)
					if name == "huge" {
						for i := range 20 {
							command(t, "qemu-io", "-r", "-f", "qcow2", "-c", fmt.Sprintf("read -P %d %dG 1", 'w', i*300), img)
						}
						return
					}
					command(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", raw, img)
				})
			}
		}
	}
}
