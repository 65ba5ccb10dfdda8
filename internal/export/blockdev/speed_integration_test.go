//go:build integration

package blockdev

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// speedOf runs fio for a second and returns I/Os per second.
func speedOf(b *testing.B, dev, rw, bs, depth string) float64 {
	b.Helper()
	out, err := exec.Command("fio", "--name=s", "--filename="+dev, "--direct=1", "--ioengine=io_uring", "--iodepth="+depth, "--rw="+rw, "--bs="+bs,
		"--size=512m", "--runtime=1", "--time_based", "--output-format=json").Output()
	if err != nil {
		b.Fatalf("fio: %v\n%s", err, out)
	}
	var said struct {
		Jobs []struct{ Read, Write struct{ Iops float64 } }
	}
	if err := json.Unmarshal(out, &said); err != nil || len(said.Jobs) != 1 {
		b.Fatalf("fio: %v\n%s", err, out)
	}
	return said.Jobs[0].Read.Iops + said.Jobs[0].Write.Iops
}

// nbdfuse starts the peer, nbdkit and nbdfuse with a loop device, on file, and returns the loop device.
func (b *bed) nbdfuse(file string) string {
	at, sock := filepath.Join(b.dir, "peer"), filepath.Join(b.dir, "peer.sock")
	b.file("peer", 0)
	kit := exec.Command("nbdkit", "-f", "--exit-with-parent", "-U", sock, "file", file)
	if err := kit.Start(); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { kit.Process.Kill(); kit.Wait() })
	b.until("nbdkit", func() bool { return unix.Access(sock, unix.R_OK) == nil })
	fuse := exec.Command("nbdfuse", at, "nbd+unix:///?socket="+sock)
	if err := fuse.Start(); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { fuse.Wait() })
	b.t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
	b.until("nbdfuse", func() bool { n, _ := mountedAt(at); return n == 1 })
	dev := strings.TrimSpace(b.command("losetup", "--show", "-f", "--direct-io=on", at))
	b.t.Cleanup(func() { b.command("losetup", "-d", dev) })
	return dev
}

// until waits for ok.
func (b *bed) until(what string, ok func() bool) {
	b.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range 1000 {
		if ok() {
			return
		}
		<-tick.C
	}
	b.t.Fatalf("%s: it does not come", what)
}

// BenchmarkNbdfuse compares the block device with nbdfuse and nbdkit under a loop device, on the same file in memory: medians of rounds that take turns.
func BenchmarkNbdfuse(b *testing.B) {
	bed := newBed(b)
	file := bed.file("disk", 512<<20)
	bed.command("dd", "if=/dev/urandom", "of="+file, "bs=1M", "count=512", "conv=notrunc", "status=none")
	ours := bed.start("vol", file)
	defer func() { ours.handOver(); bed.remove("vol") }()
	devs := [2]string{filepath.Join(bed.devs, "vol"), bed.nbdfuse(file)}
	for _, w := range [][3]string{{"randread", "4k", "1"}, {"randwrite", "4k", "1"}, {"randread", "4k", "16"}, {"randwrite", "4k", "16"}, {"read", "1m", "4"}, {"write", "1m", "4"}} {
		b.Run(fmt.Sprintf("%s-%s-qd%s", w[0], w[1], w[2]), func(b *testing.B) {
			var got [2][]float64
			for range 3 {
				for i, dev := range devs {
					got[i] = append(got[i], speedOf(b, dev, w[0], w[1], w[2]))
				}
			}
			for i := range got {
				slices.Sort(got[i])
			}
			b.ReportMetric(got[0][1], "ours/s")
			b.ReportMetric(got[1][1], "nbdfuse/s")
			b.ReportMetric(got[0][1]/got[1][1], "ratio")
			b.ReportMetric(0, "ns/op")
		})
	}
}
