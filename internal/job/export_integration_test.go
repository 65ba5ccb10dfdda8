//go:build integration

package job

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"ashlar/internal/image"
)

func command(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
}

// nbdkit serves a file with filters, and returns its URI.
func nbdkit(t *testing.T, args ...string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "job")
	if err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "s")
	cmd := exec.Command("nbdkit", append([]string{"-f", "-r", "-U", sock}, args...)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		os.RemoveAll(dir)
	})
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); ; <-tick.C {
		if _, err := os.Stat(sock); err == nil {
			return "nbd+unix:///?socket=" + sock
		}
		if time.Now().After(deadline) {
			t.Fatal("nbdkit does not listen")
		}
	}
}

// TestExportFromNbdkit: work processes export a disk of nbdkit's; qemu-img finds the files in order and the same disk in them; imported again, from the files, packed files and nbdkit, it has one digest.
func TestExportFromNbdkit(t *testing.T) {
	dir := t.TempDir()
	raw := filepath.Join(dir, "disk.raw")
	f, err := os.Create(raw)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(5 << 30); err != nil {
		t.Fatal(err)
	}
	for i := range int64(40) {
		if _, err := f.WriteAt(sample(400_000), i*127<<20+i*777); err != nil {
			t.Fatal(err)
		}
	}
	f.Close()
	source := nbdkit(t, "file", raw)
	digest := ""
	imported := func(source string) {
		t.Helper()
		r, err := perform(t, config(), importSpec(t, source))
		if err != nil || digest != "" && r.Digest != digest {
			t.Fatalf("%s: %+v, %v", source, r, err)
		}
		digest = r.Digest
	}
	for i, c := range [][2]string{{"raw", ""}, {"qcow2", ""}, {"qcow2", "zlib"}, {"qcow2", "zstd"}} {
		to := filepath.Join(dir, fmt.Sprint(i))
		r, err := perform(t, config(), Spec{Kind: KindExport, Export: &Export{Source: source, Format: c[0], Compress: c[1], To: to}})
		if err != nil {
			t.Fatal(err)
		}
		if c[0] == "qcow2" {
			command(t, "qemu-img", "check", "-q", to)
		}
		command(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", c[0], raw, to)
		if i == 0 {
			var du bytes.Buffer
			cmd := exec.Command("du", "-B1", to)
			cmd.Stdout = &du
			var used int64
			if err := cmd.Run(); err != nil {
				t.Fatal(err)
			} else if _, err := fmt.Sscan(du.String(), &used); err != nil || used > 64<<20 || r.FileBytes != 5<<30 {
				t.Errorf("a raw file of %d bytes takes %d, %v", r.FileBytes, used, err)
			}
		}
		if c[0] == "qcow2" {
			imported(to)
			command(t, "zstd", "-q", "-f", to)
			imported(to + ".zst")
		}
	}
	small := filepath.Join(dir, "small.raw")
	if err := os.WriteFile(small, sample(8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	digest = ""
	imported(small)
	imported(nbdkit(t, "file", small))
	imported(nbdkit(t, "--filter=delay", "file", small, "rdelay=5ms"))
	imported(nbdkit(t, "--filter=noextents", "--filter=nozero", "file", small))
	broken := nbdkit(t, "--filter=error", "file", small, "error-pread=EIO", "error-pread-rate=100%")
	if _, err := perform(t, config(), importSpec(t, broken)); err == nil {
		t.Error("a disk that cannot be read was imported")
	}
	to := filepath.Join(dir, "broken")
	if _, err := perform(t, config(), Spec{Kind: KindExport, Export: &Export{Source: broken, Format: string(image.Qcow2), To: to}}); err == nil {
		t.Error("a disk that cannot be read was exported")
	}
	for _, name := range []string{to, to + partialSuffix} {
		if _, err := os.Lstat(name); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
}
