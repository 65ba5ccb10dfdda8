//go:build integration

package image

import (
	"bytes"
	"crypto/sha512"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// TestRealPackers imports what gzip, xz and zstd themselves make of a raw disk and of a qcow2 of it.
func TestRealPackers(t *testing.T) {
	for name, size := range map[string]int64{"xz": 6<<20 + 512, "gzip zstd": 140<<20 + 512} { // a large window wants a large file; xz is slow
		t.Run(name, func(t *testing.T) { realPackers(t, name, size) })
	}
}

func realPackers(t *testing.T, names string, size int64) {
	dir := t.TempDir()
	raw, qcow2 := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "disk.qcow2")
	writeSample(t, raw, size)
	command(t, "qemu-img", "convert", "-O", "qcow2", raw, qcow2)
	want, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := Digest(t.Context(), newMemDevice(padded(want)))
	if err != nil {
		t.Fatal(err)
	}
	for _, how := range []string{"gzip -c", "gzip -1 -c", "xz -c", "xz -T2 --block-size=1MiB -c", "xz -9 -C sha256 -c", "xz -C crc32 -c", "xz -C none -c", "zstd -c", "zstd -19 --long=27 -c", "zstd --no-check -1 -c", "zstd -T2 -c"} {
		if !strings.Contains(names, strings.Fields(how)[0]) {
			continue
		}
		for _, in := range []string{raw, qcow2} {
			if in == qcow2 && strings.Contains(how, "-19") {
				continue
			}
			t.Run(how+" "+filepath.Base(in), func(t *testing.T) {
				packed := filepath.Join(dir, "packed")
				args := strings.Fields(how)
				out, err := exec.Command(args[0], append(args[1:], in)...).Output()
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(packed, out, 0o600); err != nil {
					t.Fatal(err)
				}
				sum := sha512.Sum512(out)
				r, err := Import(t.Context(), Request{Source: packed, Checksum: Checksum{"sha512", hex.EncodeToString(sum[:])}, Spool: disk.NewMem(disk.MemOptions{}), SpoolName: "s",
					Create: func(i Info) (block.Device, error) { return block.NewMem(i.DeviceBytes), nil }})
				if err != nil || r.Digest != digest || r.FileBytes != int64(len(out)) {
					t.Fatalf("%+v, %v", r, err)
				}
			})
		}
	}
	for _, name := range strings.Fields(names) { // cat a.xz b.xz
		a, b := exec.Command(name, "-c"), exec.Command(name, "-c")
		a.Stdin, b.Stdin = bytes.NewReader(want[:1<<20]), bytes.NewReader(want[1<<20:])
		first, err := a.Output()
		if err != nil {
			t.Fatal(err)
		}
		second, err := b.Output()
		if err != nil {
			t.Fatal(err)
		}
		_, got, err := fromReader(t, append(first, second...), -1)
		if err != nil || !bytes.Equal(got, padded(want)) {
			t.Errorf("two files of %s: %v", name, err)
		}
	}
}
