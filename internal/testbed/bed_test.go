//go:build integration

package testbed_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"ashlar/internal/testbed"
)

// Exit codes of the command line, docs/cli.md.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitConflict    = 4
	exitUnreachable = 5
	exitRefused     = 6
	exitNotBuilt    = 8
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
	tib = 1 << 40
)

// program is the binary under test; builds made by tests are in buildDir.
var program, buildDir string

// TestMain takes the program from ASHLAR_BIN, or builds it.
func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	var err error
	if buildDir, err = os.MkdirTemp("", "a"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	defer os.RemoveAll(buildDir)
	program = os.Getenv("ASHLAR_BIN")
	if program == "" {
		program = filepath.Join(buildDir, "ashlar")
		cmd := exec.Command("go", "build", "-o", program, "ashlar/cmd/ashlar")
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "build:", err)
			return 2
		}
	}
	return m.Run()
}

// bed is a test with a node of its own, in a scratch directory that is short because sockets lie in it.
type bed struct {
	*testing.T
	ctx context.Context
	dir string
	p   *testbed.Process
}

// scratch makes a short directory; when the test ends nothing may use it any more, and it is removed.
func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, log := range []string{"serve.log", "run/data.log", "run/hold.log"} {
				t.Logf("%s:\n%s", log, tail(filepath.Join(dir, log), 4000))
				if died := death(filepath.Join(dir, log)); died != "" {
					t.Logf("%s: what ended a process:\n%s", log, died)
				}
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// newBed starts a node.
func newBed(t *testing.T) *bed { return startIn(t, scratch(t)) }

// startIn starts a node in a directory; when the test ends it is shut down and must leave no process behind.
func startIn(t *testing.T, dir string) *bed { return startBin(t, dir, program) }

// startBin is startIn with a program.
func startBin(t *testing.T, dir, bin string) *bed {
	t.Helper()
	p, err := testbed.StartProcess(context.Background(), bin, dir)
	if err != nil {
		t.Fatalf("start: %v\n%s", err, tail(filepath.Join(dir, "serve.log"), 4000))
	}
	t.Cleanup(func() {
		if err := p.Stop(context.Background()); err != nil && !t.Failed() {
			t.Error(err)
		}
		noneLeft(t, dir)
	})
	return &bed{T: t, ctx: t.Context(), dir: dir, p: p}
}

// sub runs a part of a test on the same node.
func (b *bed) sub(name string, f func(b *bed)) {
	b.Helper()
	b.Run(name, func(t *testing.T) {
		c := *b
		c.T = t
		f(&c)
	})
}

// death is the beginning of what Go says when a program dies, or of a data race.
func death(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	for _, mark := range []string{"fatal error: ", "panic: ", "WARNING: DATA RACE", "SIGSEGV", "SIGBUS", "checkptr:"} {
		if at := bytes.Index(text, []byte(mark)); at >= 0 {
			return string(text[at:min(len(text), at+4000)])
		}
	}
	return ""
}

func tail(path string, n int) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-n):])
}

// users are the processes that name a directory in their command line or have something open in it.
func users(dir string) (out []string) {
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, proc := range procs {
		pid, err := strconv.Atoi(filepath.Base(proc))
		if err != nil || pid == os.Getpid() {
			continue
		}
		line, err := os.ReadFile(filepath.Join(proc, "cmdline"))
		if err != nil || len(line) == 0 {
			continue
		}
		using := bytes.Contains(line, []byte(dir+"/"))
		fds, _ := filepath.Glob(filepath.Join(proc, "fd", "*"))
		for _, fd := range fds {
			to, err := os.Readlink(fd)
			using = using || err == nil && strings.HasPrefix(to, dir+"/")
		}
		if using {
			out = append(out, fmt.Sprintf("%d %s", pid, strings.ReplaceAll(string(line), "\x00", " ")))
		}
	}
	return out
}

// noneLeft wants no process to use a directory, and kills those that do.
func noneLeft(t *testing.T, dir string) {
	t.Helper()
	err := testbed.Until(context.Background(), 10*time.Second, func() (bool, error) { return len(users(dir)) == 0, nil })
	if err == nil {
		return
	}
	for _, u := range users(dir) {
		t.Errorf("a process is left: %s", u)
		if pid, err := strconv.Atoi(strings.Fields(u)[0]); err == nil {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// cli runs the command line, which must succeed.
func (b *bed) cli(args ...string) string {
	b.Helper()
	out, err := b.p.Text(b.ctx, args...)
	if err != nil {
		b.Fatal(err)
	}
	return out
}

// json runs the command line for JSON, which must succeed and be JSON.
func (b *bed) json(out any, args ...string) {
	b.Helper()
	if err := b.p.Run(b.ctx, out, args...); err != nil {
		b.Fatal(err)
	}
}

// refused runs the command line, which must end with an exit code and say all of the words on standard error. It returns what it said.
func (b *bed) refused(code int, words []string, args ...string) string {
	b.Helper()
	_, err := b.p.Text(b.ctx, args...)
	failed, ok := errors.AsType[*testbed.CommandError](err)
	if !ok {
		b.Errorf("ashlar %q: succeeded, want exit code %d: %v", args, code, err)
		return ""
	}
	if failed.Code != code {
		b.Errorf("ashlar %q: exit code %d, want %d: %s", args, failed.Code, code, failed.Stderr)
	}
	for _, w := range words {
		if !strings.Contains(failed.Stderr, w) {
			b.Errorf("ashlar %q: does not say %q: %s", args, w, failed.Stderr)
		}
	}
	return failed.Stderr
}

// until waits for something to become so.
func (b *bed) until(limit time.Duration, what string, try func() bool) {
	b.Helper()
	if err := testbed.Until(b.ctx, limit, func() (bool, error) { return try(), nil }); err != nil {
		b.Fatalf("%s: not within %v: %v", what, limit, err)
	}
}

// tool runs another program, which must succeed, and returns what it printed.
func (b *bed) tool(name string, args ...string) string {
	b.Helper()
	out, err := b.try(name, args...)
	if err != nil {
		b.Fatal(err)
	}
	return out
}

// try runs another program.
func (b *bed) try(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(b.ctx, 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

// path is a file of the test's.
func (b *bed) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bed) socket(volume string) string { return filepath.Join(b.p.RunDir, "nbd", volume+".sock") }

func (b *bed) uri(volume string) string {
	return "nbd+unix:///" + volume + "?socket=" + b.socket(volume)
}

// disk is the directory of the node's disk.
func (b *bed) disk() string { return filepath.Join(b.p.DataDir, "disks", "default") }

// web serves the test's directory web/ and returns its URL.
func (b *bed) web() string {
	b.Helper()
	dir := b.path("web")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	s := httptest.NewServer(http.FileServer(http.Dir(dir)))
	b.Cleanup(s.Close)
	return s.URL
}

// What the tests read of the command line's JSON and of REST.
type (
	volumeView struct {
		Name, Size, State, Robustness, BackingImage, Error string
		Controllers                                        []struct{ Endpoint, HostID, Size string }
		Replicas                                           []struct{ Name, DataPath, DiskPath, AllocatedBytes string }
		PurgeStatus                                        []struct{ State, Error string }
	}
	imageView struct {
		Name, UUID, CurrentChecksum, Format, Digest string
		Size, VirtualSize                           int64
		DiskFileStatusMap                           map[string]struct {
			State, Message string
			AllocatedBytes int64
		}
	}
	snapshotView struct {
		Name, Parent string
		Children     map[string]bool
		MarkRemoved  bool
		UserCreated  bool
		Size         int64
		Labels       map[string]string
	}
	statusView struct {
		Ready   bool
		Nodes   []nodeView
		Volumes []volumeView
		Images  []imageView
	}
	nodeView struct {
		Name    string
		DataPID int
		Disks   map[string]struct {
			Path, DiskUUID                                     string
			StorageAvailable, StorageMaximum, StorageScheduled int64
		}
	}
)

func (b *bed) volume(name string) (v volumeView) {
	b.Helper()
	b.json(&v, "volume", "show", name)
	return v
}

// attached attaches a volume and returns its URI.
func (b *bed) attach(names ...string) {
	b.Helper()
	for _, name := range names {
		var v volumeView
		b.json(&v, "volume", "attach", name)
		if v.State != "attached" || v.Controllers[0].Endpoint != b.uri(name) {
			b.Fatalf("volume %s after attach: %+v", name, v)
		}
	}
}

func (b *bed) snapshots(volume string) map[string]snapshotView {
	b.Helper()
	var list []snapshotView
	b.json(&list, "snapshot", "list", volume)
	out := map[string]snapshotView{}
	for _, s := range list {
		out[s.Name] = s
	}
	return out
}

// clean wants check to find nothing.
func (b *bed) clean(volumes ...string) {
	b.Helper()
	for _, v := range volumes {
		b.cli("check", v)
	}
}

// rest sends a request to REST over TCP and returns the status and the JSON object it answered.
func (b *bed) rest(method, path, body string) (int, map[string]any) {
	b.Helper()
	req, err := http.NewRequestWithContext(b.ctx, method, "http://"+b.p.Listen+path, strings.NewReader(body))
	if err != nil {
		b.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		b.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		b.Fatal(err)
	}
	var out map[string]any
	if len(bytes.TrimSpace(text)) > 0 {
		if err := json.Unmarshal(text, &out); err != nil {
			b.Fatalf("%s %s: status %d, and no JSON object: %v: %q", method, path, res.StatusCode, err, text)
		}
	}
	return res.StatusCode, out
}

// state is everything a person can see of volumes, snapshots and images, and the files on the disk: what a refused request must leave as it was.
func (b *bed) state() string {
	b.Helper()
	var sb strings.Builder
	var volumes []volumeView
	var images []imageView
	b.json(&volumes, "volume", "list")
	b.json(&images, "image", "list")
	for _, v := range volumes {
		fmt.Fprintf(&sb, "%s %s %s %s %s %s\n", v.Name, v.Size, v.State, v.Robustness, v.BackingImage, v.Error)
		for _, s := range b.snapshots(v.Name) {
			v.Error += fmt.Sprintf("%s<-%s %v;", s.Parent, s.Name, s.MarkRemoved)
		}
		words := strings.Split(v.Error, ";")
		slices.Sort(words)
		fmt.Fprintln(&sb, words)
	}
	for _, i := range images {
		fmt.Fprintf(&sb, "%s %s %s %d\n", i.Name, i.UUID, i.CurrentChecksum, i.VirtualSize)
	}
	b.each(b.disk(), func(path string, _ fs.FileInfo) { fmt.Fprintln(&sb, path) })
	return sb.String()
}

// unchanged runs what must change nothing.
func (b *bed) unchanged(what func()) {
	b.Helper()
	before := b.state()
	what()
	if after := b.state(); after != before {
		b.Errorf("something changed; before:\n%s\nafter:\n%s", before, after)
	}
}

// each calls f for every file below a directory.
func (b *bed) each(dir string, f func(path string, info fs.FileInfo)) {
	b.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil {
			f(path, info)
		}
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
}

// onDisk adds up what the files below a directory occupy.
func (b *bed) onDisk(dir string) (sum int64) {
	b.Helper()
	b.each(dir, func(_ string, info fs.FileInfo) { sum += info.Sys().(*syscall.Stat_t).Blocks * 512 })
	return sum
}

// raw makes a disk of a size whose even megabytes hold random bytes and whose odd ones are holes.
func (b *bed) raw(name string, size int64, seed uint64) string {
	b.Helper()
	path := b.path(name)
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	rng := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	buf := make([]byte, mib)
	for off := int64(0); off < size; off += 2 * mib {
		rng.Read(buf)
		if _, err := f.WriteAt(buf[:min(mib, size-off)], off); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		b.Fatal(err)
	}
	return path
}

func (b *bed) sha256(path string) string {
	b.Helper()
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		b.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// same wants a volume's content to be that of a raw file, which may be shorter if the rest reads as zeros.
func (b *bed) same(volume, raw string) {
	b.Helper()
	b.tool("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, b.uri(volume))
}

// qemuIO runs qemu-io commands on a volume; a pattern that does not match fails.
func (b *bed) qemuIO(volume string, commands ...string) {
	b.Helper()
	if out, err := b.tryQemuIO(b.uri(volume), commands...); err != nil {
		b.Fatalf("%v%s", err, out)
	}
}

func (b *bed) tryQemuIO(uri string, commands ...string) (string, error) {
	args := []string{"-f", "raw", "-d", "unmap"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := b.try("qemu-io", append(args, uri)...)
	// qemu-io says so and exits with zero in some versions.
	if err == nil && (strings.Contains(out, "Pattern verification failed") || strings.Contains(out, "failed: ")) {
		err = errors.New("qemu-io: " + out)
	}
	return out, err
}

// fioArgs are those of a verified random load on an NBD URI: it writes everything once, in random order, verifying what it wrote a while ago, and in the end everything.
func fioArgs(uri string, size, rate int) []string {
	args := []string{"--name=verify", "--ioengine=nbd", "--uri=" + uri, "--rw=randrw", "--rwmixread=40", "--bs=4k", "--iodepth=16", fmt.Sprintf("--size=%d", size),
		"--verify=crc32c", "--verify_fatal=1", "--verify_backlog=512", "--fsync=200", "--randseed=7", "--output-format=json", "--error_dump=1"}
	if rate > 0 {
		args = append(args, fmt.Sprintf("--rate_iops=%d", rate))
	}
	return args
}

// fioReport is what is read of fio's JSON.
type fioReport struct {
	Jobs []struct {
		Error       int
		TotalErr    int `json:"total_err"`
		Read, Write struct {
			TotalIOs int64                 `json:"total_ios"`
			LatNS    struct{ Max float64 } `json:"lat_ns"`
			ClatNS   struct{ Max float64 } `json:"clat_ns"`
		}
	}
}

// fio is a running fio.
type fio struct {
	b     *bed
	cmd   *exec.Cmd
	out   bytes.Buffer
	err   bytes.Buffer
	ended chan error
}

// startFio starts it; it is ended with the test.
func (b *bed) startFio(uri string, size, rate int) *fio {
	b.Helper()
	f := &fio{b: b, ended: make(chan error, 1)}
	f.cmd = exec.CommandContext(b.ctx, "fio", fioArgs(uri, size, rate)...)
	f.cmd.Dir = b.dir // it leaves a state file behind
	f.cmd.Stdout, f.cmd.Stderr = &f.out, &f.err
	if err := f.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	go func() { f.ended <- f.cmd.Wait() }()
	return f
}

// running wants it to be under way still.
func (f *fio) running() {
	f.b.Helper()
	select {
	case err := <-f.ended:
		f.b.Fatalf("fio ended too early: %v\n%s%s", err, f.out.String(), f.err.String())
	default:
	}
}

// wait wants it to end without an error, and returns its longest latency.
func (f *fio) wait() (ops int64, worst time.Duration) {
	f.b.Helper()
	if err := <-f.ended; err != nil {
		f.b.Fatalf("fio: %v\n%s%s", err, f.out.String(), f.err.String())
	}
	text := f.out.String()
	var r fioReport
	if err := json.Unmarshal([]byte(text[max(0, strings.Index(text, "{")):]), &r); err != nil || len(r.Jobs) != 1 {
		f.b.Fatalf("fio's JSON: %v: %s", err, text)
	}
	j := r.Jobs[0]
	if j.Error != 0 || j.TotalErr != 0 {
		f.b.Fatalf("fio saw errors: %d, %d in all\n%s", j.Error, j.TotalErr, f.err.String())
	}
	return j.Read.TotalIOs + j.Write.TotalIOs, time.Duration(max(j.Read.ClatNS.Max, j.Write.ClatNS.Max))
}
