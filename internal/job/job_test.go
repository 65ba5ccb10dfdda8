package job

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/image"
	"ashlar/internal/layer"

	"golang.org/x/sys/unix"
)

const childEnvName = "ASHLAR_JOB_TEST_CHILD"

// TestMain makes the test binary a work process when it is started as one, with a few kinds of work that misbehave.
func TestMain(m *testing.M) {
	if os.Getenv(childEnvName) == "" {
		os.Exit(m.Run())
	}
	os.Exit(mainWith(context.Background(), os.Stdin, os.Stdout, map[string]doer{
		KindImport: doImport, KindExport: doExport,
		"panic":    func(context.Context, Spec, func(Progress)) (Result, error) { panic("a fault") },
		"exit":     func(context.Context, Spec, func(Progress)) (Result, error) { os.Exit(9); return Result{}, nil },
		"nonsense": func(context.Context, Spec, func(Progress)) (Result, error) { fmt.Println("hello?"); select {} },
		"endless": func(context.Context, Spec, func(Progress)) (Result, error) {
			os.Stdout.Write(make([]byte, 1<<20))
			select {}
		},
		"deaf":        func(context.Context, Spec, func(Progress)) (Result, error) { select {} },
		"limits":      tellLimits,
		"eats slowly": eatSlowly,
		"eats at once": func(context.Context, Spec, func(Progress)) (Result, error) {
			b := make([]byte, 4<<30)
			b[len(b)-1] = 1
			return Result{}, nil
		},
	}))
}

// eatSlowly takes memory until somebody stops it.
func eatSlowly(ctx context.Context, _ Spec, _ func(Progress)) (Result, error) {
	var all [][]byte
	for ctx.Err() == nil {
		b := make([]byte, 1<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		all = append(all, b)
	}
	return Result{AllocatedBytes: int64(len(all))}, ctx.Err()
}

// tellLimits reports what the child sees of itself, as a digest.
func tellLimits(context.Context, Spec, func(Progress)) (Result, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return Result{}, err
	}
	var core, data unix.Rlimit
	if err := errors.Join(unix.Getrlimit(unix.RLIMIT_CORE, &core), unix.Getrlimit(unix.RLIMIT_DATA, &data)); err != nil {
		return Result{}, err
	}
	prio, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	var r Result
	r.Digest = fmt.Sprintf("core %d data %d nice %d privs %v secret %q args %d", core.Max, data.Max, 20-prio,
		!bytes.Contains(status, []byte("NoNewPrivs:\t1")), os.Getenv("ASHLAR_JOB_TEST_SECRET"), len(os.Args))
	return r, err
}

func config() Config {
	return Config{Env: []string{childEnvName + "=1"}, MemoryBytes: testMemoryBytes}
}

// importSpec makes a disk's directory and a spec for it.
func importSpec(t *testing.T, source string) Spec {
	t.Helper()
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "tmp"), 0o700); err != nil {
		t.Fatal(err)
	}
	id := string(layer.NewID())
	return Spec{Kind: KindImport, Import: &Import{Source: source, Root: root, Name: "tmp/" + id + ".layer", LayerID: id, ImageID: "i", ImageName: "golden",
		BootID: string(layer.NewID())}}
}

// wantEmpty checks that nothing is left in the disk's tmp.
func wantEmpty(t *testing.T, spec Spec) {
	t.Helper()
	names, err := os.ReadDir(filepath.Join(spec.Import.Root, "tmp"))
	if err != nil || len(names) != 0 {
		t.Errorf("left behind: %v, %v", names, err)
	}
}

func perform(t *testing.T, cfg Config, spec Spec) (Result, error) {
	t.Helper()
	j, err := Start(t.Context(), cfg, spec)
	if err != nil {
		return Result{}, err
	}
	return j.Wait()
}

func sample(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		if i>>15%3 != 0 {
			b[i] = byte(i * i >> 7)
		}
	}
	return b
}

func sha512Hex(b []byte) string {
	sum := sha512.Sum512(b)
	return hex.EncodeToString(sum[:])
}

// qcow2File is the smallest qcow2 image that holds p: clusters of 64 KiB, nothing compressed. p is at most 512 MiB.
func qcow2File(p []byte) []byte {
	const cluster = 64 << 10
	n := (len(p) + cluster - 1) / cluster
	b := make([]byte, (4+n)*cluster)
	copy(b, "QFI\xfb\x00\x00\x00\x03")
	put := func(off int, v uint64, bytes int) {
		for i := range bytes {
			b[off+i] = byte(v >> (8 * (bytes - 1 - i)))
		}
	}
	put(20, 16, 4)
	put(24, uint64(len(p)), 8)
	put(36, 1, 4)
	put(40, 1*cluster, 8)
	put(48, 2*cluster, 8)
	put(56, 1, 4)
	put(96, 4, 4)
	put(100, 104, 4)
	put(cluster, 3*cluster, 8)
	for i := range n {
		put(3*cluster+i*8, uint64((4+i)*cluster), 8)
		copy(b[(4+i)*cluster:], p[i*cluster:])
	}
	return b
}

// TestImportMakesALayer: raw and qcow2, from a file and over HTTP, through a real child, end as a sealed layer that reads as the image.
func TestImportMakesALayer(t *testing.T) {
	content := sample(5<<20 + 4096)
	for name, file := range map[string][]byte{"raw": content, "qcow2": qcow2File(content)} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(file))
		}))
		defer server.Close()
		path := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, source := range []string{path, server.URL + "/image?token=secret"} {
			spec := importSpec(t, source)
			spec.Import.Checksum = "sha512:" + sha512Hex(file)
			r, err := perform(t, config(), spec)
			if err != nil {
				t.Fatalf("%s from %s: %v", name, source, err)
			}
			mem := block.NewMem(int64(len(content)))
			if _, err := mem.WriteAt(content, 0); err != nil {
				t.Fatal(err)
			}
			digest, err := image.Digest(t.Context(), mem)
			if err != nil {
				t.Fatal(err)
			}
			if string(r.Format) != name || r.FileBytes != int64(len(file)) || r.VirtualBytes != int64(len(content)) || r.SHA512 != sha512Hex(file) || r.Digest != digest || r.AllocatedBytes == 0 {
				t.Fatalf("%s from %s: %+v", name, source, r)
			}
			checkLayer(t, spec, content, r)
		}
	}
}

// checkLayer opens what an import made.
func checkLayer(t *testing.T, spec Spec, content []byte, r Result) {
	t.Helper()
	fsys, err := disk.OpenReal(spec.Import.Root, disk.RealOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer fsys.Close()
	names, err := fsys.List("tmp")
	if err != nil || len(names) != 1 {
		t.Fatalf("in tmp: %v, %v", names, err)
	}
	l, err := layer.Open(fsys, spec.Import.Name, layer.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	m := l.Meta()
	if m.Kind != layer.KindImage || m.State != layer.StateSealed || !m.Settled || !m.Sums || string(m.ID) != spec.Import.LayerID {
		t.Fatalf("%+v", m)
	}
	want := layer.Image{Name: "golden", ID: "i", Format: string(r.Format), Source: image.DisplaySource(spec.Import.Source), FileBytes: r.FileBytes, FileSHA512: r.SHA512, Digest: r.Digest}
	if *m.Image != want || strings.Contains(m.Image.Source, "secret") {
		t.Fatalf("%+v", m.Image)
	}
	s, err := layer.NewStack([]*layer.Layer{l}, layer.StackOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got := make([]byte, s.Size())
	if _, err := s.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("the layer reads differently: %v", err)
	}
}

// TestErrorsComeBack: what image, disk and layer say in the child is the same sentinel here, and nothing is left on the disk.
func TestErrorsComeBack(t *testing.T) {
	good := sample(1 << 20)
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	backed := qcow2File(good)
	backed[15] = 200
	cut := filepath.Join(t.TempDir(), "cut")
	lying := filepath.Join(t.TempDir(), "lying")
	for name, b := range map[string][]byte{cut: qcow2File(good)[:500_000], lying: backed} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	gone := make(chan struct{})
	defer close(gone)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/cut":
			w.Header().Set("Content-Length", "10000000")
			w.Write(good)
		case "/stall":
			w.Header().Set("Content-Length", "10000000")
			w.Write(qcow2File(good)[:300_000])
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
			case <-gone:
			}
		default:
			http.NotFound(w, r)
		}
	}))
	defer server.Close()
	for name, c := range map[string]struct {
		edit func(*Import)
		want error
	}{
		"wrong checksum": {func(i *Import) { i.Checksum = strings.Repeat("ab", 64) }, image.ErrChecksum},
		"no file":        {func(i *Import) { i.Source = "/no/such/file" }, image.ErrSource},
		"404":            {func(i *Import) { i.Source = server.URL }, image.ErrSource},
		"cut":            {func(i *Import) { i.Source = server.URL + "/cut" }, image.ErrTruncated},
		"stall":          {func(i *Import) { i.Source, i.IdleTimeoutMS = server.URL+"/stall", 300 }, image.ErrStalled},
		"cut qcow2":      {func(i *Import) { i.Source = cut }, image.ErrTruncated},
		"backing file":   {func(i *Import) { i.Source = lying }, image.ErrUnsupported},
		"not qcow2":      {func(i *Import) { i.Format = "qcow2" }, image.ErrFormat},
		"too large":      {func(i *Import) { i.Limits.VirtualBytes = 4096 }, image.ErrTooLarge},
		"no directory":   {func(i *Import) { i.Name = "nowhere/x" }, fs.ErrNotExist},
	} {
		t.Run(name, func(t *testing.T) {
			spec := importSpec(t, path)
			c.edit(spec.Import)
			_, err := perform(t, config(), spec)
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			t.Log(err)
			wantEmpty(t, spec)
		})
	}
}

// TestEverySentinelCrosses holds the table: each comes back as itself, alone and in company, and means nothing else.
func TestEverySentinelCrosses(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range sentinels() {
		if seen[s.code] {
			t.Errorf("code %s stands for two things", s.code)
		}
		seen[s.code] = true
		b, err := json.Marshal(failureOf(fmt.Errorf("what: %w", s.err)))
		if err != nil {
			t.Fatal(err)
		}
		var f failure
		if err := json.Unmarshal(b, &f); err != nil {
			t.Fatal(err)
		}
		for _, other := range sentinels() {
			if errors.Is(f.err(), other.err) != (other.err == s.err) {
				t.Errorf("%s came back as %v", s.code, f.err())
			}
		}
	}
	both := failureOf(errors.Join(image.ErrFormat, block.ErrCorrupt)).err()
	if !errors.Is(both, image.ErrFormat) || !errors.Is(both, block.ErrCorrupt) {
		t.Errorf("two at once: %v", both)
	}
	if newer := (&failure{Codes: []string{"unheard-of"}, Message: "m"}).err(); newer.Error() != "m" {
		t.Errorf("an unknown code: %v", newer)
	}
}

// TestBadSpecs are refused before a process is started.
func TestBadSpecs(t *testing.T) {
	for name, c := range map[string]struct {
		edit func(*Spec)
		want error
	}{
		"no kind":       {func(s *Spec) { s.Kind = "" }, ErrSpec},
		"other kind":    {func(s *Spec) { s.Kind = "dance" }, ErrSpec},
		"no import":     {func(s *Spec) { s.Import = nil }, ErrSpec},
		"no source":     {func(s *Spec) { s.Import.Source = "" }, ErrSpec},
		"relative root": {func(s *Spec) { s.Import.Root = "x" }, ErrSpec},
		"no root":       {func(s *Spec) { s.Import.Root = "/no/such/dir" }, fs.ErrNotExist},
		"name up":       {func(s *Spec) { s.Import.Name = "../x" }, ErrSpec},
		"absolute name": {func(s *Spec) { s.Import.Name = "/x" }, ErrSpec},
		"name with NUL": {func(s *Spec) { s.Import.Name = "a\x00b" }, ErrSpec},
		"layer id":      {func(s *Spec) { s.Import.LayerID = "7" }, ErrSpec},
		"boot id":       {func(s *Spec) { s.Import.BootID = "" }, ErrSpec},
		"checksum":      {func(s *Spec) { s.Import.Checksum = "md5:1" }, image.ErrUnsupported},
		"format":        {func(s *Spec) { s.Import.Format = "vmdk" }, image.ErrUnsupported},
		"taken": {func(s *Spec) {
			if err := os.WriteFile(filepath.Join(s.Import.Root, s.Import.Name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, fs.ErrExist},
	} {
		spec := importSpec(t, "/x")
		c.edit(&spec)
		if j, err := Start(t.Context(), config(), spec); !errors.Is(err, c.want) || j != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Start(t.Context(), Config{Exe: "/no/such/program"}, Spec{Kind: "deaf"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no program: %v", err)
	}
}

// TestMalformedInput is what a child does with lines no parent of ours sends.
func TestMalformedInput(t *testing.T) {
	for name, line := range map[string]string{
		"nothing": "", "no end": `{"kind":"import"}`, "not JSON": "hello\n", "an array": "[]\n", "wrong type": `{"kind":7}` + "\n",
		"unknown field": `{"kind":"deaf","colour":1}` + "\n", "too long": strings.Repeat("x", maxLineBytes+9) + "\n", "no kind": "{}\n", "unknown kind": `{"kind":"dance"}` + "\n",
	} {
		cmd := childCommand(t)
		cmd.Stdin = strings.NewReader(line)
		out, err := cmd.Output()
		var m message
		if e := json.Unmarshal(out, &m); e != nil || m.Error == nil || !errors.Is(m.Error.err(), ErrSpec) || err == nil {
			t.Errorf("%s: said %q, %v", name, out, err)
		}
	}
}

// childCommand is a child that is spoken to by hand.
func childCommand(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "work")
	cmd.Env = append(childEnv(config().Env), fmt.Sprintf("%s=%d", memoryEnv, int64(testMemoryBytes)))
	return cmd
}

// TestFaults: children that die, rave, fall silent or panic.
func TestFaults(t *testing.T) {
	for kind, want := range map[string]error{"panic": ErrCrashed, "exit": ErrDied, "nonsense": ErrDied, "endless": ErrDied} {
		_, err := perform(t, config(), Spec{Kind: kind})
		if !errors.Is(err, want) {
			t.Errorf("%s: got %v", kind, err)
		}
		t.Log(err)
	}
	cfg := config()
	cfg.Grace = 50 * time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	j, err := Start(ctx, cfg, Spec{Kind: "deaf"})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := j.Wait(); !errors.Is(err, context.Canceled) {
		t.Errorf("deaf: %v", err)
	}
	if _, err := Start(ctx, cfg, Spec{Kind: "deaf"}); !errors.Is(err, context.Canceled) {
		t.Errorf("started with a dead context: %v", err)
	}
}

// TestMemoryLimit: work that eats memory ends with an error that says so, and this process is none the worse.
func TestMemoryLimit(t *testing.T) {
	if testMemoryBytes < 0 {
		t.Log("the race detector maps more than any limit: only the plain run shows this")
		return
	}
	cfg := config()
	cfg.MemoryBytes = 512 << 20
	if _, err := perform(t, cfg, Spec{Kind: "eats slowly"}); !errors.Is(err, ErrMemory) {
		t.Errorf("slowly: %v", err)
	} else {
		t.Log(err)
	}
	if _, err := perform(t, cfg, Spec{Kind: "eats at once"}); !errors.Is(err, ErrDied) {
		t.Errorf("at once: %v", err)
	} else {
		t.Log(err)
	}
}

// TestLimits: what the child sees of itself.
func TestLimits(t *testing.T) {
	t.Setenv("ASHLAR_JOB_TEST_SECRET", "of the parent")
	r, err := perform(t, config(), Spec{Kind: "limits"})
	if err != nil {
		t.Fatal(err)
	}
	data := fmt.Sprint(int64(testMemoryBytes))
	if testMemoryBytes < 0 {
		var none unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_DATA, &none); err != nil {
			t.Fatal(err)
		}
		data = fmt.Sprint(none.Max)
	}
	if want := "core 0 data " + data + ` nice 10 privs false secret "" args 2`; r.Digest != want {
		t.Errorf("got  %s\nwant %s", r.Digest, want)
	}
}

// slowServer sends the head of a large image and then a little at a time, until the client goes.
func slowServer(t *testing.T, head []byte) (url string) {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "100000000")
		w.Write(head)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}))
	t.Cleanup(server.Close)
	return server.URL
}

// started waits until the child's file, or spool, is there.
func started(t *testing.T, j *Job, spec Spec, suffix string) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		if _, err := os.Stat(filepath.Join(spec.Import.Root, spec.Import.Name+suffix)); err == nil {
			return
		}
		select {
		case <-j.Done():
			_, err := j.Wait()
			t.Fatalf("ended early: %v", err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("the child does not begin")
		}
	}
}

// TestCancelAndKill: an import that is cancelled, or killed, while its file is half written, leaves nothing.
func TestCancelAndKill(t *testing.T) {
	content := sample(3 << 20)
	for name, c := range map[string]struct {
		head   []byte
		suffix string
	}{"raw": {content, ""}, "qcow2": {qcow2File(content), ".spool"}} {
		spec := importSpec(t, slowServer(t, c.head))
		j, err := Start(t.Context(), config(), spec)
		if err != nil {
			t.Fatal(err)
		}
		started(t, j, spec, c.suffix)
		j.Cancel()
		if _, err := j.Wait(); !errors.Is(err, context.Canceled) {
			t.Errorf("%s cancelled: %v", name, err)
		}
		wantEmpty(t, spec)

		spec = importSpec(t, slowServer(t, c.head))
		if j, err = Start(t.Context(), config(), spec); err != nil {
			t.Fatal(err)
		}
		started(t, j, spec, c.suffix)
		if err := j.cmd.Process.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if _, err := j.Wait(); !errors.Is(err, ErrDied) {
			t.Errorf("%s killed: %v", name, err)
		} else {
			t.Log(err)
		}
		wantEmpty(t, spec)
	}
}

// TestOrphan: a child whose parent is gone, which it sees as the end of its input, gives up and tidies up.
func TestOrphan(t *testing.T) {
	spec := importSpec(t, slowServer(t, sample(3<<20)))
	spec.Import.IdleTimeoutMS = 8_000 // the server would end it too, but much later
	cmd := childCommand(t)
	var out bytes.Buffer
	cmd.Stdout = &out
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := json.NewEncoder(in).Encode(spec); err != nil {
		t.Fatal(err)
	}
	started(t, &Job{done: make(chan struct{})}, spec, "")
	in.Close()
	if err := cmd.Wait(); err == nil {
		t.Error("it said it had finished")
	}
	lines := bytes.Split(bytes.TrimSpace(out.Bytes()), []byte("\n"))
	var last message
	if err := json.Unmarshal(lines[len(lines)-1], &last); err != nil || last.Error == nil || !errors.Is(last.Error.err(), context.Canceled) {
		t.Errorf("it ended with %s (%v), want to hear that it was cancelled", lines[len(lines)-1], err)
	}
	wantEmpty(t, spec)
}

// TestProgress: percent never falls, ends at the whole, and passes through every phase.
func TestProgress(t *testing.T) {
	file := qcow2File(sample(12 << 20))
	step := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(file)))
		half := len(file) / 2
		w.Write(file[:half])
		w.(http.Flusher).Flush()
		<-step
		w.Write(file[half:])
	}))
	defer server.Close()
	j, err := Start(t.Context(), config(), importSpec(t, server.URL))
	if err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	var last Progress
	released := false
	for running := true; running; {
		select {
		case <-j.Done():
			running = false
		case <-tick.C:
		}
		p := j.Progress()
		if p.Percent < last.Percent || p.Percent > 100 {
			t.Fatalf("from %+v to %+v", last, p)
		}
		last = p
		if !released && p.Phase == "fetch" && p.DoneBytes > int64(len(file)/4) {
			if p.TotalBytes != int64(len(file)) {
				t.Errorf("%+v", p)
			}
			released = true
			close(step)
		}
	}
	if _, err := j.Wait(); err != nil || last.Phase != "settle" || last.Percent < 95 {
		t.Fatalf("last %+v, %v", last, err)
	}
}

// TestProxy: the child reaches the world through the proxy of the parent's environment.
func TestProxy(t *testing.T) {
	content := sample(1 << 20)
	asked := make(chan string, 1)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL.String()
		w.Write(content)
	}))
	defer proxy.Close()
	t.Setenv("http_proxy", proxy.URL)
	t.Setenv("HTTP_PROXY", proxy.URL)
	t.Setenv("no_proxy", "")
	t.Setenv("NO_PROXY", "")
	r, err := perform(t, config(), importSpec(t, "http://images.invalid/golden.raw"))
	if err != nil || r.SHA512 != sha512Hex(content) {
		t.Fatalf("%+v, %v", r, err)
	}
	if got := <-asked; got != "http://images.invalid/golden.raw" {
		t.Errorf("the proxy was asked for %s", got)
	}
}

// FuzzWire: no line, from either side, does more than be refused.
func FuzzWire(f *testing.F) {
	spec, err := json.Marshal(Spec{Kind: KindImport, Import: &Import{Source: "/x", Root: "/r", Name: "tmp/x", LayerID: string(layer.NewID()), BootID: string(layer.NewID())}})
	if err != nil {
		f.Fatal(err)
	}
	export := `{"kind":"export","export":{"source":"nbd+unix:///x?socket=/s","format":"raw","to":"/x"}}`
	for _, s := range []string{string(spec), export, strings.Replace(export, ":///", ":/", 1), strings.Replace(export, "nbd+", "NBD+", 1), `{"progress":{"percent":7}}`, `{"error":{"codes":["format"],"message":"m"}}`, `{"result":{"digest":"a1:"}}`, `{}`, `null`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := decodeSpec(b); err == nil && s.Kind == KindImport {
			if !filepath.IsAbs(s.Import.Root) || !filepath.IsLocal(s.Import.Name) {
				t.Fatalf("accepted %+v", s.Import)
			}
		}
		if s, err := decodeSpec(b); err == nil && s.Kind == KindExport && !isNBD(s.Export.Source) {
			t.Fatalf("accepted %+v", s.Export)
		}
		var m message
		if json.Unmarshal(b, &m) == nil && m.valid() && m.Error != nil {
			_ = m.Error.err().Error()
		}
	})
}

// TestTurns: of jobs that share two turns two have a process; the others wait without one, can be cancelled, and begin when it is their turn. A stream does not wait.
func TestTurns(t *testing.T) {
	cfg := config()
	cfg.Turns = make(chan struct{}, 2)
	source := slowServer(t, sample(3<<20))
	var specs []Spec
	var jobs []*Job
	for range 4 {
		spec := importSpec(t, source)
		j, err := Start(t.Context(), cfg, spec)
		if err != nil {
			t.Fatal(err)
		}
		specs, jobs = append(specs, spec), append(jobs, j)
	}
	started(t, jobs[0], specs[0], "")
	started(t, jobs[1], specs[1], "")
	jobs[2].Cancel()
	if _, err := jobs[2].Wait(); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled while it waited: %v", err)
	}
	if jobs[2].cmd != nil {
		t.Error("a job that waited had a process")
	}
	wantEmpty(t, specs[2])
	wantEmpty(t, specs[3])
	if p := jobs[3].Progress(); p.DoneBytes != 0 || p.Percent != 0 {
		t.Errorf("a job that waits is at %+v", p)
	}

	spec := importSpec(t, "")
	path := filepath.Join(spec.Import.Root, "s.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	spec.Import.Source = streamScheme + "://" + path
	j, err := Start(t.Context(), cfg, spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := ln.(*net.UnixListener).SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	conn, err := ln.Accept() // while no turn is free
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if _, err := j.Wait(); err == nil {
		t.Error("an empty stream made an image")
	}

	jobs[0].Cancel()
	started(t, jobs[3], specs[3], "")
	for _, j := range jobs {
		j.Cancel()
		if _, err := j.Wait(); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	if len(cfg.Turns) != 0 {
		t.Errorf("%d turns were not given back", len(cfg.Turns))
	}
	cfg.Exe = filepath.Join(spec.Import.Root, "none")
	if _, err := perform(t, cfg, importSpec(t, source)); !errors.Is(err, fs.ErrNotExist) || len(cfg.Turns) != 0 {
		t.Errorf("no such program: %v; %d turns are taken", err, len(cfg.Turns))
	}
}
