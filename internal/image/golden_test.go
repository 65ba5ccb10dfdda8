package image

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ashlar/internal/block"

	witness "github.com/lima-vm/go-qcow2reader/image/qcow2"
	rawreader "github.com/lima-vm/go-qcow2reader/image/raw"

	qcow2reader "github.com/lima-vm/go-qcow2reader/image"
)

const (
	goldenSum   = "56dc7f4e1b4e01f3e462e4f405802032d6abb16e567453375b5305cea5cb94ed"
	snapshotSum = "4b741116201ba1308828f13623b06b5942eed204bf6484778078f65e1d99e2ff"
)

// goldenFiles gives the golden images by name.
func goldenFiles(t testing.TB) map[string][]byte {
	t.Helper()
	names, err := filepath.Glob("testdata/*.qcow2.gz")
	if err != nil || len(names) == 0 {
		t.Fatalf("no golden images: %v", err)
	}
	files := make(map[string][]byte)
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(f)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		files[strings.TrimSuffix(filepath.Base(name), ".qcow2.gz")] = b
	}
	return files
}

// TestGolden reads every golden image in several ways; what it reads was written down when they were made. Where go-qcow2reader can read an image, it is
// a second witness.
func TestGolden(t *testing.T) {
	for name, file := range goldenFiles(t) {
		t.Run(name, func(t *testing.T) {
			dev, err := Open(context.Background(), memFile(t, file), Options{})
			if err != nil {
				t.Fatal(err)
			}
			info := dev.Info()
			if info.Format != Qcow2 || info.VirtualBytes != 300<<10+512 || info.DeviceBytes != 304<<10 || dev.Size() != info.DeviceBytes {
				t.Fatalf("%+v", info)
			}
			want := make([]byte, dev.Size())
			if _, err := dev.ReadAt(want, 0); err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(want[:info.VirtualBytes])
			expected := goldenSum
			if name == "v3-snapshots" {
				expected = snapshotSum
			}
			if hex.EncodeToString(sum[:]) != expected || !allZero(want[info.VirtualBytes:]) {
				t.Fatalf("content is %x", sum)
			}
			checkExtents(t, dev, want)
			checkRandomReads(t, dev, want)
			if name != "v3-zstd" { // it needs a decoder registered in a global variable
				checkWitness(t, file, want[:info.VirtualBytes])
			}
			dst := newMemDevice(make([]byte, dev.Size()))
			digest, err := convert(context.Background(), dst, dev, nil)
			if err != nil || !bytes.Equal(dst.b, want) {
				t.Fatalf("convert: %v", err)
			}
			if d, err := Digest(context.Background(), dst); err != nil || d != digest {
				t.Fatalf("digest %v, %v; convert said %v", d, err, digest)
			}
			if err := dev.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := dev.ReadAt(want, 0); !errors.Is(err, block.ErrClosed) {
				t.Fatalf("read after close: %v", err)
			}
		})
	}
}

func checkRandomReads(t *testing.T, dev block.Device, want []byte) {
	t.Helper()
	rng := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		off := rng.IntN(len(want))
		p := make([]byte, rng.IntN(len(want)-off)+1)
		if _, err := dev.ReadAt(p, int64(off)); err != nil || !bytes.Equal(p, want[off:off+len(p)]) {
			t.Fatalf("read of %d at %d: %v", len(p), off, err)
		}
	}
}

func checkWitness(t *testing.T, file, want []byte) {
	t.Helper()
	img, err := witness.Open(bytes.NewReader(file), func(ra io.ReaderAt, _ qcow2reader.Type) (qcow2reader.Image, error) { return rawreader.Open(ra) })
	if err != nil {
		t.Fatal(err)
	}
	// In pieces, because its ReadAt takes the end of a compressed cluster for the end of the image.
	got := make([]byte, len(want))
	for off := 0; off < len(got); off += 4096 {
		if _, err := img.ReadAt(got[off:min(off+4096, len(got))], int64(off)); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got, want) {
		t.Fatal("go-qcow2reader reads something else")
	}
}

// TestRawDevice: the length is rounded up, the rest reads as zero, holes are Absent.
func TestRawDevice(t *testing.T) {
	content := make([]byte, 5*4096+700)
	for i := 8192; i < 9000; i++ {
		content[i] = 7
	}
	content[len(content)-1] = 8
	f := memFile(t, content)
	if err := f.Punch(12288, 4096); err != nil {
		t.Fatal(err)
	}
	dev, err := Open(context.Background(), f, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if i := dev.Info(); i != (Info{Format: Raw, FileBytes: 21180, VirtualBytes: 21180, DeviceBytes: 24576}) {
		t.Fatalf("%+v", i)
	}
	want := append(content, make([]byte, 24576-len(content))...)
	got := make([]byte, dev.Size())
	if _, err := dev.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("content differs: %v", err)
	}
	checkExtents(t, dev, want)
	checkRandomReads(t, dev, want)
	list, err := dev.Extents(12288, 4096)
	if err != nil || list[0].State != block.Absent {
		t.Fatalf("a hole is %v, %v", list, err)
	}
	if _, err := dev.WriteAt(got[:4096], 0); !errors.Is(err, block.ErrReadOnly) {
		t.Fatalf("write: %v", err)
	}
}
