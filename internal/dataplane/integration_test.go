//go:build integration

package dataplane

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ashlar/internal/dataplane/client"
)

// reconnecting puts nbdkit's reconnecting proxy in front of a volume, as a stand-in for a guest with a reconnect delay, and returns its socket.
func reconnecting(t *testing.T, b *bed, volume string) string {
	t.Helper()
	socket := filepath.Join(b.runDir, "proxy-"+volume+".sock")
	cmd := exec.Command("nbdkit", "-f", "-U", socket, "--filter=retry", "nbd",
		"socket="+filepath.Join(b.runDir, "nbd", volume+".sock"), "export="+volume, "retries=60", "retry-delay=1", "retry-exponential=no")
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatalf("nbdkit: %v", err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("nbdkit said:\n%s", said.String())
		}
	})
	eventually(t, "nbdkit listens", func() bool { _, err := os.Stat(socket); return err == nil })
	return socket
}

// killAndTime kills the data process and returns how long it took until a client of its own was answered by the next one.
func (b *bed) killAndTime(c *client.Client, a client.OpenVolume) time.Duration {
	b.t.Helper()
	pid := b.dataPID()
	began := time.Now()
	b.kill(pid)
	g := &patientGuest{t: b.t, socket: filepath.Join(b.runDir, "nbd", a.Volume+".sock"), name: a.Volume}
	defer g.close()
	// The dying process may still answer what was sent before; its successor is who counts.
	eventually(b.t, "another data process runs", func() bool { now := b.dataPID(); return now != 0 && now != pid })
	if err := g.do(nbdRead, 0, make([]byte, 4096)); err != nil {
		b.t.Fatalf("first I/O after a kill: %v", err)
	}
	took := time.Since(began)
	ctx, cancel := context.WithTimeout(b.t.Context(), time.Minute)
	defer cancel()
	if _, err := c.Hello(ctx); err != nil {
		b.t.Fatalf("control socket after a kill: %v", err)
	}
	return took
}

const kills = 5

// TestFioVerifyAcrossKills runs fio with verify on a volume through nbdkit's reconnecting proxy while the data process is killed again and again: fio sees no
// error and no wrong byte, and the volume is back within five seconds each time.
func TestFioVerifyAcrossKills(t *testing.T) {
	b := newProcs(t)
	c := b.readyProcs()
	a := b.volume(c, 1, 256*mib)
	b.open(c, a)
	b.cat.away()
	proxy := reconnecting(t, b, a.Volume)
	fio := exec.Command("fio", "--name=verify", "--ioengine=nbd", "--uri=nbd+unix:///?socket="+proxy, "--rw=randwrite", "--bs=4k", "--iodepth=16",
		"--size=128m", "--io_size=64m", "--verify=crc32c", "--verify_backlog=256", "--verify_fatal=1", "--fsync=64", "--time_based", "--runtime=20", "--randrepeat=0",
		"--rate_iops=1500")
	var said bytes.Buffer
	fio.Stdout, fio.Stderr = &said, &said
	if err := fio.Start(); err != nil {
		t.Fatalf("fio: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- fio.Wait() }()
	var times []time.Duration
	for range kills {
		select {
		case err := <-done:
			t.Fatalf("fio ended before the last kill: %v\n%s", err, said.String())
		case <-time.After(2500 * time.Millisecond):
		}
		times = append(times, b.killAndTime(c, a).Round(time.Millisecond))
	}
	if err := <-done; err != nil || !strings.Contains(said.String(), "err= 0") {
		t.Errorf("fio: %v\n%s", err, said.String())
	}
	t.Logf("back after %v; fio said:\n%s", times, said.String())
	for _, d := range times {
		if d > 5*time.Second {
			t.Errorf("a volume was back after %v", d)
		}
	}
	if st, _ := status(t, c, a.VolumeID); st.Session != kills+1 || st.Epoch != 1 {
		t.Errorf("epoch %d, session %d", st.Epoch, st.Session)
	}
}

// TestOutsideLogAcrossKills keeps a log, outside of everything that is killed, of what several volumes' guests were told is written, some through the reconnecting proxy and some directly; after
// each kill, and at the end, every block holds what its guest was told last.
func TestOutsideLogAcrossKills(t *testing.T) {
	b := newProcs(t)
	c := b.readyProcs()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	type writer struct {
		g   *patientGuest
		l   *ackedLog
		err error
	}
	var writers []*writer
	var first client.OpenVolume
	for n := range 4 {
		a := b.volume(c, n, 16*mib)
		b.open(c, a)
		w := &writer{g: &patientGuest{t: t, socket: filepath.Join(b.runDir, "nbd", a.Volume+".sock"), name: a.Volume}, l: &ackedLog{acked: map[int64]uint64{}, pending: map[int64]uint64{}}}
		if n%2 == 0 {
			w.g.socket, w.g.name = reconnecting(t, b, a.Volume), ""
		} else {
			first = a
		}
		defer w.g.close()
		writers = append(writers, w)
	}
	b.cat.away()
	rng := rand.New(rand.NewPCG(seed, 1))
	var times []time.Duration
	for range kills {
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for i, w := range writers {
			own := rand.New(rand.NewPCG(rng.Uint64(), uint64(i)))
			wg.Go(func() { w.err = w.g.writeSome(w.l, own, stop) })
		}
		<-time.After(time.Duration(500+rng.IntN(1000)) * time.Millisecond)
		times = append(times, b.killAndTime(c, first).Round(time.Millisecond))
		close(stop)
		wg.Wait()
		for i, w := range writers {
			if w.err != nil {
				t.Fatalf("guest %d was answered: %v", i, w.err)
			}
			w.g.verify(w.l)
		}
	}
	total := uint64(0)
	for _, w := range writers {
		total += w.l.seq
	}
	t.Logf("%d kills, back after %v; %d writes acknowledged, none lost", kills, times, total)
	for _, d := range times {
		if d > 5*time.Second {
			t.Errorf("a volume was back after %v", d)
		}
	}
}

// TestManyVolumesComeBack kills a data process with fifty volumes open.
func TestManyVolumesComeBack(t *testing.T) {
	b := newProcs(t)
	c := b.readyProcs()
	const volumes = 50
	var last client.OpenVolume
	for n := range volumes {
		last = b.volume(c, n, 1<<30)
		b.open(c, last)
	}
	b.cat.away()
	began := time.Now()
	first := b.killAndTime(c, last)
	eventually(t, "all are open", func() bool {
		st, err := c.State(t.Context())
		if err != nil || len(st.Volumes) != volumes {
			return false
		}
		for _, v := range st.Volumes {
			if v.State != stateOpen {
				return false
			}
		}
		return true
	})
	all := time.Since(began)
	t.Logf("%d volumes: one answered after %v, all open after %v", volumes, first.Round(time.Millisecond), all.Round(time.Millisecond))
	if all > 5*time.Second {
		t.Errorf("all volumes were back after %v", all)
	}
}

// TestRealClientsAreAnswered has qemu-img, nbdinfo and nbdcopy look at an export of this process.
func TestRealClientsAreAnswered(t *testing.T) {
	b := newProcs(t)
	c := b.readyProcs()
	a := b.volume(c, 1, 64*mib)
	st := b.open(c, a)
	if err := guest(t, b.runDir, a.Volume).write(mib, page("x")); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"nbdinfo", st.Endpoint},
		{"qemu-img", "info", "--output=json", st.Endpoint},
		{"nbdcopy", st.Endpoint, filepath.Join(b.runDir, "copy.raw")},
		{"qemu-img", "compare", st.Endpoint, filepath.Join(b.runDir, "copy.raw")},
	} {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	raw, err := os.ReadFile(filepath.Join(b.runDir, "copy.raw"))
	if err != nil || len(raw) != 64*mib || !bytes.Equal(raw[mib:mib+4096], page("x")) {
		t.Errorf("the copy: %d bytes, %v", len(raw), err)
	}
	var exitErr *exec.ExitError
	if out, err := exec.Command("nbdinfo", fmt.Sprintf("nbd+unix:///other?socket=%s", filepath.Join(b.runDir, "nbd", a.Volume+".sock"))).CombinedOutput(); !errors.As(err, &exitErr) {
		t.Errorf("an export that is not there: %v\n%s", err, out)
	}
}

// TestIOFlusher has the program become an I/O flusher in a virtual machine, where it surely is allowed to: every thread has the mark after it executed itself.
func TestIOFlusher(t *testing.T) {
	dir := t.TempDir()
	binary := filepath.Join(dir, "init")
	build := exec.Command("go", "test", "-c", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	program, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	initrd := filepath.Join(dir, "initrd")
	if err := os.WriteFile(initrd, cpioOf(map[string][]byte{"init": program}), 0o600); err != nil {
		t.Fatal(err)
	}
	kernels, err := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
	if err != nil || len(kernels) == 0 {
		t.Fatalf("no kernel /boot/vmlinuz-*-cloud-amd64 (package linux-image-cloud-amd64): %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-m", "512", "-display", "none", "-nodefaults", "-serial", "stdio",
		"-no-reboot", "-kernel", kernels[len(kernels)-1], "-initrd", initrd, "-append", "console=ttyS0 panic=-1 quiet mitigations=off nokaslr ASHLAR_TEST_GUEST=1").CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("FLUSHER ON ALL 32 THREADS")) || !bytes.Contains(out, []byte("GUEST DONE <nil>")) {
		t.Errorf("qemu: %v\n%s", err, out)
	}
}

// cpioOf packs executable files as a kernel wants its first file system.
func cpioOf(files map[string][]byte) []byte {
	var b bytes.Buffer
	add := func(name string, mode int, content []byte) {
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", b.Len()+1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0)
		b.WriteString(name + "\x00")
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
		b.Write(content)
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
	}
	for name, content := range files {
		add(name, 0o100755, content)
	}
	add("TRAILER!!!", 0, nil)
	return b.Bytes()
}
