//go:build integration

package image

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

func command(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// writeSample makes a raw disk of n bytes with data, zeroes, holes and repetitive runs, ragged at its edges.
func writeSample(t *testing.T, path string, n int64) {
	t.Helper()
	rng := rand.New(rand.NewPCG(7, uint64(n)))
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(n); err != nil {
		t.Fatal(err)
	}
	for range 40 {
		off := rng.Int64N(n)
		p := make([]byte, min(1+rng.Int64N(700_000), n-off))
		switch rng.IntN(3) {
		case 0:
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
		case 1:
			for i := range p {
				p[i] = byte(i / 100)
			}
		}
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	// The last byte must come through as well.
	if _, err := f.WriteAt([]byte{9}, n-1); err != nil {
		t.Fatal(err)
	}
}

// TestQemuImages compares what we read with what qemu-img reads, for every kind of qcow2 that qemu-img makes.
func TestQemuImages(t *testing.T) {
	dir := t.TempDir()
	cases := []struct {
		name, args string
		size       int64
		after      [][]string // commands run on the image, which takes the place of the last word
	}{
		{name: "v2", args: "-o compat=0.10", size: 9 << 20},
		{name: "v3", args: "-o compat=1.1", size: 9<<20 + 512},
		{name: "v2-zlib", args: "-c -o compat=0.10", size: 9<<20 + 4096 + 512},
		{name: "v3-zlib", args: "-c", size: 9 << 20},
		{name: "v3-zlib-outoforder", args: "-c -W -m 8", size: 9 << 20},
		{name: "v3-zstd", args: "-c -o compression_type=zstd", size: 9<<20 + 512},
		{name: "v3-zstd-2M", args: "-c -o compression_type=zstd,cluster_size=2M", size: 9<<20 + 512},
		{name: "v3-zlib-2M", args: "-c -o cluster_size=2M", size: 9<<20 + 512},
		{name: "v3-zlib-512", args: "-c -o cluster_size=512", size: 3<<20 + 512},
		{name: "v3-zstd-512", args: "-c -o compression_type=zstd,cluster_size=512", size: 3<<20 + 512},
		{name: "extended", args: "-o extended_l2=on", size: 9<<20 + 512},
		{name: "extended-16k", args: "-o extended_l2=on,cluster_size=16k", size: 9<<20 + 512},
		{name: "extended-2M", args: "-o extended_l2=on,cluster_size=2M", size: 9<<20 + 512},
		{name: "extended-zstd", args: "-c -o extended_l2=on,compression_type=zstd", size: 9<<20 + 512},
		{name: "zeroes-kept", args: "-S 0", size: 9 << 20},
		{name: "lazy", args: "-o lazy_refcounts=on,refcount_bits=1", size: 5 << 20},
		{name: "refcount64", args: "-o refcount_bits=64", size: 5 << 20},
		{name: "metadata", args: "-n", size: 9 << 20, after: nil},
		{name: "snapshots", size: 9 << 20, after: [][]string{
			{"qemu-img", "snapshot", "-c", "one", "IMG"},
			{"qemu-io", "-c", "write -P 7 1M 3M", "-c", "write -z 5M 1M", "-c", "discard 6M 1M", "IMG"},
			{"qemu-img", "snapshot", "-c", "two", "IMG"},
			{"qemu-io", "-c", "write -P 8 70000 100", "IMG"},
		}},
		{name: "grown", size: 5 << 20, after: [][]string{{"sh", "-c", `qemu-img resize -q "$0" 900M`, "IMG"}, {"qemu-io", "-c", "write -P 3 800M 5000", "IMG"}}},
		{name: "shrunk", size: 9 << 20, after: [][]string{{"sh", "-c", `qemu-img resize -q --shrink "$0" 3M`, "IMG"}}},
		{name: "extended-patched", args: "-o extended_l2=on", size: 5 << 20, after: [][]string{
			{"qemu-io", "-c", "write -P 3 2048 2048", "-c", "write -z 6144 2048", "-c", "discard 65536 4096", "-c", "write -z 1M 10k", "IMG"}}},
		{name: "zero-clusters", args: "-o cluster_size=512", size: 1 << 20, after: [][]string{
			{"qemu-io", "-c", "write -z 512 1024", "-c", "discard 4096 512", "-c", "write -P 1 8192 512", "IMG"}}},
	}
	for _, size := range []string{"512", "1k", "2k", "4k", "8k", "16k", "32k", "128k", "256k", "512k", "1M", "2M"} {
		cases = append(cases, struct {
			name, args string
			size       int64
			after      [][]string
		}{name: "cluster-" + size, args: "-o cluster_size=" + size, size: 4<<20 + 1536})
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			src, img, back := filepath.Join(dir, "src"), filepath.Join(dir, c.name+".qcow2"), filepath.Join(dir, "back")
			writeSample(t, src, c.size)
			if c.name == "metadata" {
				for _, how := range []string{"metadata", "falloc", "full"} {
					for _, ext := range []string{"on", "off"} {
						command(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation="+how+",extended_l2="+ext, img, fmt.Sprint(c.size))
						checkSame(t, img, back)
						command(t, "qemu-img", "convert", "-n", "-O", "qcow2", src, img)
						checkSame(t, img, back)
					}
				}
				return
			}
			command(t, append(append([]string{"qemu-img", "convert", "-f", "raw", "-O", "qcow2"}, strings.Fields(c.args)...), src, img)...)
			for _, args := range c.after {
				command(t, append(args[:len(args)-1:len(args)-1], img)...)
			}
			checkSame(t, img, back)
		})
	}
}

// checkSame compares an image with qemu-img's reading of it: opened in place, imported from the file and imported over HTTP.
func checkSame(t *testing.T, img, back string) {
	t.Helper()
	command(t, "qemu-img", "convert", "-O", "raw", img, back)
	want, err := os.ReadFile(back)
	if err != nil {
		t.Fatal(err)
	}
	want = append(want, make([]byte, (block.UnitBytes-len(want)%block.UnitBytes)%block.UnitBytes)...)

	f := openReal(t, img)
	dev, err := Open(context.Background(), f, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	got := make([]byte, dev.Size())
	if _, err := dev.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("content differs from qemu-img's")
	}
	checkExtents(t, dev, want)
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		off := rng.Int64N(dev.Size())
		p := make([]byte, rng.Int64N(min(dev.Size()-off, 200_000))+1)
		if _, err := dev.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, want[off:off+int64(len(p))]) {
			t.Fatalf("read of %d at %d differs", len(p), off)
		}
	}
	digest, err := Digest(context.Background(), newMemDevice(want))
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha512.Sum512(file)
	server := httptest.NewServer(http.FileServer(http.Dir(filepath.Dir(img))))
	defer server.Close()
	for _, source := range []string{img, server.URL + "/" + filepath.Base(img)} {
		spool := disk.NewMem(disk.MemOptions{})
		var dst *memDevice
		r, err := Import(context.Background(), Request{Source: source, Checksum: Checksum{"sha512", hex.EncodeToString(sum[:])},
			Spool: spool, SpoolName: "spool", Create: func(i Info) (block.Device, error) {
				dst = newMemDevice(make([]byte, i.DeviceBytes))
				return dst, nil
			}})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(dst.b, want) || r.Digest != digest || r.SHA512 != hex.EncodeToString(sum[:]) {
			t.Fatalf("import of %s differs", source)
		}
		if ok, err := disk.Exists(spool, "spool"); ok || err != nil {
			t.Fatalf("the spool is still there: %v", err)
		}
	}
}

func openReal(t *testing.T, path string) disk.File {
	t.Helper()
	d, err := disk.OpenReal(filepath.Dir(path), disk.RealOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	f, err := d.OpenRead(filepath.Base(path))
	if err != nil {
		t.Fatal(err)
	}
	return f
}
