//go:build integration

package nbd

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ashlar/internal/block"
)

// These tests drive the server with the clients that users have. A program that is missing is a failure.

// listen serves e on a unix socket and returns the URI.
func listen(t *testing.T, e Export) (*Server, string) {
	t.Helper()
	s, err := NewServer(Config{Exports: Single(e), Report: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		until(t, "the clients to leave", func() bool { return len(s.Conns()) == 0 })
		if err := errors.Join(s.Close(), <-served); err != nil {
			t.Error(err)
		}
	})
	return s, "nbd+unix:///" + e.Name + "?socket=" + path
}

// run runs a program that has to succeed and returns its standard output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}

func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return v
}

const diskBytes = 64 << 20

// sparseDisk is a device with data in some places, and its content.
func sparseDisk(t *testing.T) (*block.Mem, []byte) {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	dev, model := block.NewMem(diskBytes), make([]byte, diskBytes)
	for _, off := range []int{0, 1 << 20, 5<<20 + 4096, 40<<20 + 512, diskBytes - 100_000} {
		p := model[off : off+100_000]
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		if _, err := dev.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	return dev, model
}

func content(t *testing.T, dev block.Device) []byte {
	t.Helper()
	p := make([]byte, dev.Size())
	if _, err := dev.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// dataBytes is how much of dev is Data.
func dataBytes(t *testing.T, dev block.Device) (n int64) {
	t.Helper()
	for at := int64(0); at < dev.Size(); {
		extents, err := dev.Extents(at, dev.Size()-at)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range extents {
			if e.State == block.Data {
				n += e.N
			}
			at += e.N
		}
	}
	return n
}

func TestNbdinfo(t *testing.T) {
	dev, _ := sparseDisk(t)
	_, uri := listen(t, Export{Name: "vol", Description: "a volume", Device: dev})
	type export struct {
		Name        string   `json:"export-name"`
		Description string   `json:"description"`
		Content     string   `json:"content"`
		Size        int64    `json:"export-size"`
		Contexts    []string `json:"contexts"`
		ReadOnly    bool     `json:"is_read_only"`
		Flush       bool     `json:"can_flush"`
		FUA         bool     `json:"can_fua"`
		Trim        bool     `json:"can_trim"`
		Zero        bool     `json:"can_zero"`
		FastZero    bool     `json:"can_fast_zero"`
		MultiConn   bool     `json:"can_multi_conn"`
		DF          bool     `json:"can_df"`
		Cache       bool     `json:"can_cache"`
	}
	type info struct {
		Protocol   string           `json:"protocol"`
		Structured bool             `json:"structured"`
		Exports    []map[string]any `json:"exports"`
	}
	for _, args := range [][]string{{"--json", uri}, {"--json", "--list", uri}} {
		text := run(t, "nbdinfo", args...)
		got := decode[info](t, text)
		if got.Protocol != "newstyle-fixed" || !got.Structured || len(got.Exports) != 1 {
			t.Fatalf("%s", text)
		}
		raw, err := json.Marshal(got.Exports[0])
		if err != nil {
			t.Fatal(err)
		}
		e := decode[export](t, string(raw))
		e.Content = ""
		want := export{Name: "vol", Description: "a volume", Size: diskBytes, Contexts: []string{"base:allocation"},
			Flush: true, FUA: true, Trim: true, Zero: true, MultiConn: true, DF: true, FastZero: true, Cache: true}
		if fmt.Sprint(e) != fmt.Sprint(want) {
			t.Fatalf("got  %+v\nwant %+v", e, want)
		}
		x := got.Exports[0]
		if x["block_size_minimum"] != 1.0 || x["block_size_preferred"] != 4096.0 || x["block_size_maximum"] != float64(32<<20) {
			t.Fatalf("block sizes %v %v %v", x["block_size_minimum"], x["block_size_preferred"], x["block_size_maximum"])
		}
	}
	if got := strings.TrimSpace(run(t, "nbdinfo", "--size", uri)); got != fmt.Sprint(diskBytes) {
		t.Fatalf("size %s", got)
	}
	type extent struct {
		Offset, Length int64
		Type           int
	}
	covered, data := int64(0), int64(0)
	for _, e := range decode[[]extent](t, run(t, "nbdinfo", "--map", "--json", uri)) {
		if e.Offset != covered || (e.Type != 0 && e.Type != 3) {
			t.Fatalf("extent %+v at %d", e, covered)
		}
		covered += e.Length
		if e.Type == 0 {
			data += e.Length
		}
	}
	if covered != diskBytes || data != dataBytes(t, dev) {
		t.Fatalf("map covers %d with %d data, want %d with %d", covered, data, diskBytes, dataBytes(t, dev))
	}
}

func TestNbdcopy(t *testing.T) {
	src, model := sparseDisk(t)
	_, uri := listen(t, Export{Name: "vol", Device: src})
	file := filepath.Join(t.TempDir(), "out.img")
	run(t, "nbdcopy", uri, file)
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, model) {
		t.Fatalf("the copy out differs: %v", err)
	}
	dst := block.NewMem(diskBytes)
	s, to := listen(t, Export{Name: "copy", Device: dst})
	run(t, "nbdcopy", "--flush", file, to)
	if !bytes.Equal(content(t, dst), model) {
		t.Fatal("the copy in differs")
	}
	if n := dataBytes(t, dst); n > diskBytes/4 {
		t.Fatalf("%d bytes of data: the holes were filled", n)
	}
	if st := s.Stats()["copy"]; st.Accepted < 2 || st.Flushes == 0 {
		t.Fatalf("no multi-conn, or no flush: %+v", st)
	}
	third := block.NewMem(diskBytes)
	_, last := listen(t, Export{Name: "third", Device: third})
	run(t, "nbdcopy", "--synchronous", to, last)
	if !bytes.Equal(content(t, third), model) {
		t.Fatal("the copy from server to server differs")
	}
}

func TestQemuImg(t *testing.T) {
	src, model := sparseDisk(t)
	_, uri := listen(t, Export{Name: "vol", Device: src})
	dir := t.TempDir()
	type info struct {
		Size   int64  `json:"virtual-size"`
		Format string `json:"format"`
	}
	if got := decode[info](t, run(t, "qemu-img", "info", "--output=json", "-f", "raw", uri)); got != (info{diskBytes, "raw"}) {
		t.Fatalf("%+v", got)
	}
	type extent struct {
		Start, Length    int64
		Zero, Data       bool
		Depth            int
		Present          bool
		Offset           int64
		Compressed, Last bool
	}
	covered, data := int64(0), int64(0)
	for _, e := range decode[[]extent](t, run(t, "qemu-img", "map", "--output=json", "-f", "raw", uri)) {
		if e.Start != covered || e.Zero == e.Data {
			t.Fatalf("extent %+v", e)
		}
		covered += e.Length
		if e.Data {
			data += e.Length
		}
	}
	if covered != diskBytes || data != dataBytes(t, src) {
		t.Fatalf("map covers %d with %d data, want %d with %d", covered, data, diskBytes, dataBytes(t, src))
	}
	qcow := filepath.Join(dir, "out.qcow2")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, qcow)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, qcow)
	if st, err := os.Stat(qcow); err != nil || st.Size() > diskBytes/8 {
		t.Fatalf("the image has %d bytes: holes were not seen", st.Size())
	}

	dst := block.NewMem(diskBytes)
	s, to := listen(t, Export{Name: "copy", Device: dst})
	for _, args := range [][]string{{}, {"-W", "-m", "8"}, {"-t", "writethrough"}} {
		if err := dst.Zero(0, diskBytes); err != nil {
			t.Fatal(err)
		}
		run(t, "qemu-img", append(append([]string{"convert", "-n", "-f", "qcow2", "-O", "raw"}, args...), qcow, to)...)
		if !bytes.Equal(content(t, dst), model) {
			t.Fatalf("convert %v: the copy differs", args)
		}
		run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri, to)
	}
	if _, err := dst.WriteAt([]byte{model[7] ^ 1}, 7); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := exec.Command("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, to).Run(); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Fatalf("compare does not see a difference: %v", err)
	}
	if st := s.Stats()["copy"]; st.Errors != 0 || st.Statuses == 0 {
		t.Fatalf("%+v", st)
	}
}

// qemuIO runs qemu-io commands; pattern mismatches do not show in its exit code on their own.
func qemuIO(t *testing.T, uri string, opts []string, commands ...string) string {
	t.Helper()
	args := append([]string{"-f", "raw"}, opts...)
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out := run(t, "qemu-io", append(args, uri)...)
	for _, bad := range []string{"verification failed", "failed", "rror"} {
		if strings.Contains(out, bad) {
			t.Fatalf("qemu-io %v:\n%s", commands, out)
		}
	}
	return out
}

func TestQemuIO(t *testing.T) {
	dev := block.NewMem(diskBytes)
	s, uri := listen(t, Export{Name: "vol", Device: dev})
	for _, cache := range []string{"none", "writeback", "writethrough"} {
		opts := []string{"-t", cache, "-d", "unmap"}
		qemuIO(t, uri, opts,
			"write -P 0xa1 0 1M", "write -P 0xa2 1M 100k", "write -P 0xa3 513 7", // unaligned too
			"read -P 0xa1 520 1000k", "read -P 0xa3 513 7", "read -P 0xa1 0 513",
			"discard 64k 64k", "read -P 0 64k 64k", "read -P 0xa1 128k 64k",
			"write -z 256k 64k", "read -P 0 256k 64k", "write -z -u 320k 64k", "read -P 0 256k 128k",
			"write -f -P 0xa4 400k 4k", "read -P 0xa4 400k 4k", "flush")
		qemuIO(t, uri, opts,
			"aio_write -P 0xb1 2M 512k", "aio_write -P 0xb2 4M 3M", "aio_flush",
			"aio_read -P 0xb1 2M 512k", "aio_read -P 0xb2 4M 3M", "aio_read -P 0 20M 2M", "aio_flush", "read -P 0xa4 400k 4k")
		qemuIO(t, uri, opts, "write -P 0xc1 8M 32M", "read -P 0xc1 8M 32M", "write -z 8M 56M", "read -P 0 8M 56M")
	}
	st := s.Stats()["vol"]
	if st.Errors != 0 || st.Flushes == 0 || st.Zeroes == 0 {
		t.Fatalf("%+v", st)
	}
	// qemu-io -z without -u asks for NO_HOLE: that is data, and stays allocated.
	if out := qemuIO(t, uri, nil, "map"); !strings.Contains(out, "allocated") {
		t.Fatal(out)
	}
	ro, roURI := listen(t, Export{Name: "ro", Device: dev, ReadOnly: true})
	qemuIO(t, roURI, []string{"-r"}, "read -P 0xa4 400k 4k")
	if err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 4k", roURI).Run(); err == nil {
		t.Fatal("a read-only export can be opened for writing")
	}
	if w := ro.Stats()["ro"].Writes; w != 0 {
		t.Fatalf("%d writes", w)
	}
}

// TestFioVerify writes and verifies with checksums, on a fast device and on one that is slow at times, so that both paces are used.
func TestFioVerify(t *testing.T) {
	for name, hook := range map[string]func(*atomic.Uint64) func(call) error{
		"fast": func(*atomic.Uint64) func(call) error { return nil },
		"slow at times": func(calls *atomic.Uint64) func(call) error {
			return func(call) error {
				if n := calls.Add(1); n/500%2 == 1 && n%3 == 0 {
					for start := time.Now(); time.Since(start) < 2*slowFixed; {
						runtime.Gosched()
					}
				}
				return nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dev := newMemDevice(diskBytes)
			var calls atomic.Uint64
			dev.hook = hook(&calls)
			s, uri := listen(t, Export{Name: "vol", Device: dev})
			out := run(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+uri, "--rw=randrw", "--bsrange=512-64k", "--blockalign=512",
				"--size=64m", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--fsync=32", "--randseed=7", "--verify_state_save=0", "--output-format=json")
			type result struct {
				Jobs []struct {
					Error int
					Read  struct {
						TotalIOs int64 `json:"total_ios"`
					}
					Write struct {
						TotalIOs int64 `json:"total_ios"`
					}
				}
			}
			got := decode[result](t, out[strings.Index(out, "{"):])
			if len(got.Jobs) != 1 || got.Jobs[0].Error != 0 || got.Jobs[0].Read.TotalIOs == 0 || got.Jobs[0].Write.TotalIOs == 0 {
				t.Fatalf("%s", out)
			}
			if st := s.Stats()["vol"]; st.Errors != 0 || st.Writes == 0 || st.Flushes == 0 {
				t.Fatalf("%+v", st)
			}
		})
	}
}

// TestNbdkitRetry: a client behind nbdkit's retry filter lives through a server that goes away and comes back at the same path.
func TestNbdkitRetry(t *testing.T) {
	dev := block.NewMem(diskBytes)
	path := filepath.Join(t.TempDir(), "s")
	start := func() (stop func()) {
		s, err := NewServer(Config{Exports: Single{Name: "vol", Device: dev}})
		if err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- s.Serve(l) }()
		return func() {
			if err := errors.Join(s.Close(), <-served); err != nil {
				t.Error(err)
			}
		}
	}
	stop := start()
	out := make(chan error, 1)
	sock := filepath.Join(t.TempDir(), "k")
	cmd := exec.CommandContext(t.Context(), "nbdkit", "-f", "-U", sock, "--filter=retry", "nbd", "uri=nbd+unix:///vol?socket="+path, "retry-delay=1", "retries=20", "retry-exponential=no")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { out <- cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill(); <-out }()
	until(t, "nbdkit", func() bool { _, err := os.Stat(sock); return err == nil })
	uri := "nbd+unix:///?socket=" + sock
	qemuIO(t, uri, nil, "write -P 0x11 0 1M", "flush")
	client := exec.CommandContext(t.Context(), "qemu-io", "-f", "raw", "-c", "read -P 0x11 0 1M", "-c", "sleep 500", "-c", "write -P 0x22 1M 1M", "-c", "flush", "-c", "read -P 0x22 1M 1M", uri)
	text := make(chan string, 1)
	go func() { b, err := client.CombinedOutput(); text <- fmt.Sprint(string(b), err) }()
	stop()
	stop = start()
	defer func() { stop() }()
	if s := <-text; strings.Contains(s, "failed") || !strings.Contains(s, "wrote 1048576/1048576") {
		t.Fatal(s)
	}
	if p := content(t, dev)[1<<20 : 2<<20]; !bytes.Equal(p, bytes.Repeat([]byte{0x22}, 1<<20)) {
		t.Fatal("the write was lost")
	}
}
