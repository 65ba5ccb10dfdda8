//go:build integration

package job

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"ashlar/internal/disk"
	"ashlar/internal/image"
	"ashlar/internal/layer"
)

// TestHugeSparseImage: a disk of 8 TiB with a few writes, made by QEMU, goes through a work process under its ordinary memory limit.
func TestHugeSparseImage(t *testing.T) {
	img := filepath.Join(t.TempDir(), "huge.qcow2")
	args := []string{"-f", "qcow2"}
	for i := range 40 {
		args = append(args, "-c", fmt.Sprintf("write -P %d %dG 200k", i+1, i*204))
	}
	for _, cmd := range [][]string{{"qemu-img", "create", "-q", "-f", "qcow2", img, "8T"}, append(append([]string{"qemu-io"}, args...), img)} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", cmd[0], err, out)
		}
	}
	spec := importSpec(t, img)
	r, err := perform(t, config(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if r.DeviceBytes != 8<<40 || r.AllocatedBytes > 64<<20 {
		t.Errorf("%+v", r)
	}
	fsys, err := disk.OpenReal(spec.Import.Root, disk.RealOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer fsys.Close()
	l, err := layer.Open(fsys, spec.Import.Name, layer.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s, err := layer.NewStack([]*layer.Layer{l}, layer.StackOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if d, err := image.Digest(t.Context(), s); err != nil || d != r.Digest {
		t.Errorf("digest %s, %v; the import said %s", d, err, r.Digest)
	}
	p := make([]byte, 1)
	for i := range 40 {
		if _, err := s.ReadAt(p, int64(i)*204<<30+200<<10-1); err != nil || p[0] != byte(i+1) {
			t.Errorf("write %d reads %d, %v", i, p[0], err)
		}
	}
}

// BenchmarkImport measures a whole import, process, hashes, layer, seal and checksums included, against qemu-img convert to raw, which does none of that. The
// image is ASHLAR_BENCH_IMAGE.
func BenchmarkImport(b *testing.B) {
	img := os.Getenv("ASHLAR_BENCH_IMAGE")
	if img == "" {
		b.Skip("ASHLAR_BENCH_IMAGE names no image")
	}
	b.Run("ashlar", func(b *testing.B) {
		for b.Loop() {
			root := b.TempDir()
			id := string(layer.NewID())
			if err := os.Mkdir(filepath.Join(root, "tmp"), 0o700); err != nil {
				b.Fatal(err)
			}
			j, err := Start(b.Context(), config(), Spec{Kind: KindImport, Import: &Import{Source: img, Root: root, Name: "tmp/x", LayerID: id, ImageID: "i", ImageName: "i", BootID: id}})
			if err != nil {
				b.Fatal(err)
			}
			if _, err := j.Wait(); err != nil {
				b.Fatal(err)
			}
			if err := os.RemoveAll(root); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("qemu-img", func(b *testing.B) {
		out := filepath.Join(b.TempDir(), "out")
		for b.Loop() {
			if o, err := exec.Command("qemu-img", "convert", "-O", "raw", img, out).CombinedOutput(); err != nil {
				b.Fatalf("%v: %s", err, o)
			}
			if err := exec.Command("sync", out).Run(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
