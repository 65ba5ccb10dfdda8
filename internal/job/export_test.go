package job

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/disk"
	"ashlar/internal/image"
	"ashlar/internal/nbd"
)

// serveNBD serves dev read-only and returns its URI.
func serveNBD(t testing.TB, dev block.Device) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "job") // t.TempDir's names are too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	s, err := nbd.NewServer(nbd.Config{Exports: nbd.Single{Name: "disk", Device: dev, ReadOnly: true}})
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() { s.Serve(l) })
	t.Cleanup(func() {
		s.Close()
		serving.Wait()
		os.RemoveAll(dir)
	})
	return "nbd+unix:///disk?socket=" + url.QueryEscape(sock)
}

// sampleDisk is a disk of n bytes, and its content.
func sampleDisk(t testing.TB, n int) (*block.Mem, []byte) {
	t.Helper()
	content := sample(n)
	mem := block.NewMem(int64(n))
	for off := 0; off < n; off += 64 << 10 { // holes stay holes
		p := content[off:min(n, off+64<<10)]
		if bytes.Count(p, []byte{0}) == len(p) {
			continue
		}
		if _, err := mem.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	return mem, content
}

// listenStream makes a socket for one stream.
func listenStream(t *testing.T) (*net.UnixListener, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "job")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(); os.RemoveAll(dir) })
	return l, "stream+unix://" + filepath.Join(dir, "s")
}

func readImage(t *testing.T, file []byte, format image.Format) []byte {
	t.Helper()
	mem := disk.NewMem(disk.MemOptions{})
	f, err := mem.Create("image", 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(file, 0); err != nil {
		t.Fatal(err)
	}
	img, err := image.Open(t.Context(), f, image.Options{Format: format})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	b := make([]byte, img.Size())
	if _, err := img.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestExportToFile: every format, through a real child; the file is there under its name alone.
func TestExportToFile(t *testing.T) {
	dev, want := sampleDisk(t, 5<<20+4096)
	source := serveNBD(t, dev)
	for _, c := range [][2]string{{"raw", ""}, {"qcow2", ""}, {"qcow2", "zlib"}, {"qcow2", "zstd"}} {
		dir := t.TempDir()
		to := filepath.Join(dir, "out")
		j, err := Start(t.Context(), config(), Spec{Kind: KindExport, Export: &Export{Source: source, Format: c[0], Compress: c[1], To: to}})
		if err != nil {
			t.Fatal(err)
		}
		r, err := j.Wait()
		if err != nil {
			t.Fatalf("%v: %v", c, err)
		}
		file, err := os.ReadFile(to)
		if err != nil || int64(len(file)) != r.FileBytes || r.VirtualBytes != int64(len(want)) || string(r.Format) != c[0] {
			t.Fatalf("%v: %+v, %d bytes, %v", c, r, len(file), err)
		}
		if !bytes.Equal(readImage(t, file, image.Format(c[0])), want) {
			t.Errorf("%v: the disk differs", c)
		}
		if p := j.Progress(); p.Phase != "export" || p.TotalBytes != int64(len(want)) || p.DoneBytes != p.TotalBytes {
			t.Errorf("%v: progress ended as %+v", c, p)
		}
		if names, err := os.ReadDir(dir); err != nil || len(names) != 1 {
			t.Errorf("%v: left %v, %v", c, names, err)
		}
		if _, err := perform(t, config(), Spec{Kind: KindExport, Export: &Export{Source: source, Format: c[0], To: to}}); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%v, a second time: %v", c, err)
		}
	}
}

// receive takes one stream and gives what came, and how it ended.
func receive(t *testing.T, l net.Listener) func() ([]byte, error) {
	t.Helper()
	var b []byte
	var err error
	var receiving sync.WaitGroup
	receiving.Go(func() {
		conn, e := l.Accept()
		if e != nil {
			err = e
			return
		}
		defer conn.Close()
		b, err = io.ReadAll(client.NewStreamReader(conn))
	})
	return func() ([]byte, error) { receiving.Wait(); return b, err }
}

// TestExportToStream: what comes out of the socket is the file, ended by its mark.
func TestExportToStream(t *testing.T) {
	dev, want := sampleDisk(t, 3<<20)
	source := serveNBD(t, dev)
	for _, c := range [][2]string{{"raw", ""}, {"raw", "gzip"}, {"qcow2", ""}, {"qcow2", "zlib"}, {"qcow2", "zstd"}} {
		l, to := listenStream(t)
		got := receive(t, l)
		r, err := perform(t, config(), Spec{Kind: KindExport, Export: &Export{Source: source, Format: c[0], Compress: c[1], To: to}})
		if err != nil {
			t.Fatalf("%v: %v", c, err)
		}
		file, err := got()
		if err != nil || r.FileBytes != int64(len(file)) {
			t.Fatalf("%v: %d of %d bytes, %v", c, len(file), r.FileBytes, err)
		}
		if c[1] == "gzip" {
			z, err := gzip.NewReader(bytes.NewReader(file))
			if err != nil {
				t.Fatal(err)
			}
			if file, err = io.ReadAll(z); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(readImage(t, file, image.Format(c[0])), want) {
			t.Errorf("%v: the disk differs", c)
		}
	}
}

// failing is a disk that cannot be read from some place on; blocking at that place, if it is told to.
type failing struct {
	*block.Mem
	from  int64
	block chan struct{}
	hit   chan struct{} // closed at the first read there
	once  sync.Once
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) <= f.from {
		return f.Mem.ReadAt(p, off)
	}
	f.once.Do(func() { close(f.hit) })
	if f.block != nil {
		<-f.block
	}
	return 0, block.ErrCorrupt
}

func newFailing(t *testing.T, blocking bool) *failing {
	t.Helper()
	mem, _ := sampleDisk(t, 16<<20)
	f := &failing{Mem: mem, from: 8 << 20, hit: make(chan struct{})}
	if blocking {
		f.block = make(chan struct{})
	}
	return f
}

// TestExportFails: a source that fails, a cancelled export, a killed one, a reader that goes away: no file is left, and no stream ends well.
func TestExportFails(t *testing.T) {
	for _, how := range []string{"fails", "cancelled", "killed"} {
		for _, format := range []string{"raw", "qcow2"} {
			for _, stream := range []bool{false, true} {
				name := fmt.Sprintf("%s %s stream=%v", how, format, stream)
				dev := newFailing(t, how != "fails")
				source := serveNBD(t, dev)
				dir := t.TempDir()
				to := filepath.Join(dir, "out")
				got := func() ([]byte, error) { return nil, client.ErrStreamCut }
				if stream {
					var l net.Listener
					l, to = listenStream(t)
					got = receive(t, l)
				}
				ctx, cancel := context.WithCancel(t.Context())
				j, err := Start(ctx, config(), Spec{Kind: KindExport, Export: &Export{Source: source, Format: format, To: to}})
				if err != nil {
					t.Fatal(err)
				}
				<-dev.hit
				want := image.ErrSource
				switch how {
				case "cancelled":
					cancel()
					want = context.Canceled
				case "killed":
					if err := j.cmd.Process.Kill(); err != nil {
						t.Fatal(err)
					}
					want = ErrDied
				}
				if _, err := j.Wait(); !errors.Is(err, want) {
					t.Errorf("%s: %v", name, err)
				}
				cancel()
				if dev.block != nil {
					close(dev.block)
				}
				if b, err := got(); !errors.Is(err, client.ErrStreamCut) {
					t.Errorf("%s: the stream ended with %v after %d bytes", name, err, len(b))
				}
				if names, err := os.ReadDir(dir); err != nil || len(names) != 0 {
					t.Errorf("%s: left %v, %v", name, names, err)
				}
			}
		}
	}
	mem, _ := sampleDisk(t, 16<<20)
	l, to := listenStream(t)
	var leaving sync.WaitGroup
	leaving.Go(func() {
		if conn, err := l.Accept(); err == nil {
			io.ReadFull(conn, make([]byte, 100))
			conn.Close()
		}
	})
	if _, err := perform(t, config(), Spec{Kind: KindExport, Export: &Export{Source: serveNBD(t, mem), Format: "raw", To: to}}); err == nil {
		t.Error("nobody read it, and all is well")
	}
	leaving.Wait()
}

// TestExportNeverReplaces: a file that appears meanwhile is kept, and one that another export is writing is not touched.
func TestExportNeverReplaces(t *testing.T) {
	dev := newFailing(t, true)
	dev.Mem.Zero(8<<20, 8<<20)
	dir := t.TempDir()
	to := filepath.Join(dir, "out")
	if err := renameNew(filepath.Join(dir, "missing"), to); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"out": "precious", "out.partial": "new"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := renameNew(to+partialSuffix, to); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("renamed over a file: %v", err)
	}
	if b, err := os.ReadFile(to); err != nil || string(b) != "precious" {
		t.Fatalf("%q, %v", b, err)
	}
	os.Remove(to)
	source := serveNBD(t, dev)
	spec := Spec{Kind: KindExport, Export: &Export{Source: source, Format: "raw", To: to}}
	if _, err := perform(t, config(), spec); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("another's partial file: %v", err)
	}
	if b, err := os.ReadFile(to + partialSuffix); err != nil || string(b) != "new" {
		t.Fatalf("%q, %v", b, err)
	}
}

// TestBadExports are refused before a process is started, or by it, with the right word.
func TestBadExports(t *testing.T) {
	mem, _ := sampleDisk(t, 1<<20)
	source := serveNBD(t, mem)
	for name, c := range map[string]struct {
		edit func(*Export)
		want error
	}{
		"no source":         {func(e *Export) { e.Source = "" }, ErrSpec},
		"a file":            {func(e *Export) { e.Source = "/etc/passwd" }, ErrSpec},
		"nobody there":      {func(e *Export) { e.Source = "nbd+unix:///?socket=/no/such" }, image.ErrSource},
		"another export":    {func(e *Export) { e.Source = strings.Replace(e.Source, "/disk?", "/tape?", 1) }, image.ErrSource},
		"vmdk":              {func(e *Export) { e.Format = "vmdk" }, ErrSpec},
		"raw zstd":          {func(e *Export) { e.Compress = "zstd" }, image.ErrUnsupported},
		"raw gzip, file":    {func(e *Export) { e.Compress = "gzip" }, image.ErrUnsupported},
		"qcow2 gzip":        {func(e *Export) { e.Format, e.Compress = "qcow2", "gzip" }, image.ErrUnsupported},
		"relative":          {func(e *Export) { e.To = "out" }, ErrSpec},
		"the root":          {func(e *Export) { e.To = "/" }, ErrSpec},
		"not clean":         {func(e *Export) { e.To += "/../x" }, ErrSpec},
		"no directory":      {func(e *Export) { e.To = "/no/such/dir/x" }, fs.ErrNotExist},
		"NUL":               {func(e *Export) { e.To += "\x00" }, ErrSpec},
		"stream and a host": {func(e *Export) { e.To = "stream+unix://host/x" }, ErrSpec},
		"stream to nobody":  {func(e *Export) { e.To = "stream+unix:///no/such" }, image.ErrSource},
	} {
		spec := Spec{Kind: KindExport, Export: &Export{Source: source, Format: "raw", To: filepath.Join(t.TempDir(), "out")}}
		c.edit(spec.Export)
		if _, err := perform(t, config(), spec); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Start(t.Context(), config(), Spec{Kind: KindExport}); !errors.Is(err, ErrSpec) {
		t.Errorf("no export: %v", err)
	}
	if _, err := Start(t.Context(), config(), Spec{Kind: KindImport, Export: &Export{}}); !errors.Is(err, ErrSpec) {
		t.Errorf("both: %v", err)
	}
}

// TestImportFromNBD: a disk of a server becomes a layer; one that fails on the way does not.
func TestImportFromNBD(t *testing.T) {
	dev, content := sampleDisk(t, 5<<20+4096)
	spec := importSpec(t, serveNBD(t, dev))
	spec.Import.Checksum = sha512Hex(content)
	r, err := perform(t, config(), spec)
	if err != nil || r.SHA512 != sha512Hex(content) || r.FileBytes != int64(len(content)) || r.Format != image.Raw {
		t.Fatalf("%+v, %v", r, err)
	}
	checkLayer(t, spec, content, r)
	spec = importSpec(t, serveNBD(t, newFailing(t, false)))
	if _, err := perform(t, config(), spec); !errors.Is(err, image.ErrSource) {
		t.Error(err)
	}
	wantEmpty(t, spec)
	spec = importSpec(t, "nbd+unix:///x?socket=/no/such/socket")
	if _, err := perform(t, config(), spec); !errors.Is(err, image.ErrSource) {
		t.Error(err)
	}
	stuck := newFailing(t, true)
	spec = importSpec(t, serveNBD(t, stuck))
	ctx, cancel := context.WithCancel(t.Context())
	j, err := Start(ctx, config(), spec)
	if err != nil {
		t.Fatal(err)
	}
	<-stuck.hit
	cancel()
	if _, err := j.Wait(); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled while the server is stuck: %v", err)
	}
	close(stuck.block)
	wantEmpty(t, spec)
}

// TestImportFromStream: whole, short, long, cut, silent and no stream at all.
func TestImportFromStream(t *testing.T) {
	content := sample(3<<20 + 512)
	send := func(p []byte, finish bool) func(net.Conn) {
		return func(c net.Conn) {
			w := client.NewStreamWriter(c)
			w.Write(p)
			if finish {
				w.Finish()
			}
		}
	}
	n := int64(len(content))
	packed := qcow2File(content)
	for name, c := range map[string]struct {
		send      func(net.Conn)
		announced int64
		want      error
	}{
		"whole":            {send(content, true), n, nil},
		"whole, unknown":   {send(content, true), -1, nil},
		"whole, not said":  {send(content, true), 0, nil},
		"qcow2":            {send(packed, true), int64(len(packed)), nil},
		"short":            {send(content[:n-512], true), n, image.ErrTruncated},
		"long":             {send(content, true), n - 512, image.ErrTooLarge},
		"cut":              {send(content[:n-512], false), n, image.ErrTruncated},
		"cut, unknown":     {send(content, false), -1, image.ErrTruncated},
		"whole but a mark": {send(content, false), n, image.ErrTruncated},
		"no bytes":         {send(nil, true), -1, image.ErrFormat},
		"nothing":          {func(net.Conn) {}, n, image.ErrTruncated},
		"no stream":        {func(c net.Conn) { io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n") }, n, image.ErrFormat},
		"silent":           {func(c net.Conn) { send(content[:1000], false)(c); c.Read(make([]byte, 1)) }, n, image.ErrStalled},
	} {
		t.Run(name, func(t *testing.T) {
			l, source := listenStream(t)
			var sending sync.WaitGroup
			sending.Go(func() {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				c.send(conn)
				conn.Close()
			})
			defer sending.Wait()
			spec := importSpec(t, source)
			spec.Import.SizeBytes = c.announced
			if c.want == image.ErrStalled {
				spec.Import.IdleTimeoutMS = 200
			}
			r, err := perform(t, config(), spec)
			if c.want != nil {
				if !errors.Is(err, c.want) {
					t.Errorf("got %v, want %v", err, c.want)
				}
				wantEmpty(t, spec)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			checkLayer(t, spec, append(bytes.Clone(content), make([]byte, (4096-n%4096)%4096)...), r)
		})
	}
}

// proxy is an HTTP proxy that asks one server whatever name it is asked for, and tunnels CONNECT to another.
type proxy struct {
	plain, tls string // host:port
	mu         sync.Mutex
	seen       []string
	wg         sync.WaitGroup
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	p.seen = append(p.seen, r.Method+" "+r.URL.Host)
	p.mu.Unlock()
	if r.Method != http.MethodConnect {
		resp, err := http.Get("http://" + p.plain + r.URL.Path)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		w.Header().Set("Content-Length", resp.Header.Get("Content-Length"))
		io.Copy(w, resp.Body)
		return
	}
	far, err := net.Dial("tcp", p.tls)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	near, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	io.WriteString(near, "HTTP/1.1 200 Connection established\r\n\r\n")
	p.wg.Go(func() { io.Copy(far, near); far.Close() })
	p.wg.Go(func() { io.Copy(near, far); near.Close() })
}

// TestProxies: a work process goes through the proxies of its environment, http and https (CONNECT, with the certificates of SSL_CERT_FILE), and not for what NO_PROXY names.
func TestProxies(t *testing.T) {
	content := sample(1 << 20)
	serve := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	})
	plain, secure := httptest.NewServer(serve), httptest.NewTLSServer(serve)
	defer plain.Close()
	defer secure.Close()
	p := &proxy{plain: plain.Listener.Addr().String(), tls: secure.Listener.Addr().String()}
	front := httptest.NewServer(p)
	defer p.wg.Wait()
	defer front.Close()
	defer secure.CloseClientConnections()
	cfg := config()
	cfg.Env = append(cfg.Env, "HTTP_PROXY="+front.URL, "HTTPS_PROXY="+front.URL, "NO_PROXY=direct.invalid", "SSL_CERT_FILE="+writeCertificate(t, secure))
	for source, want := range map[string]string{"http://images.example/disk": "GET images.example", "https://example.com/disk": "CONNECT example.com:443"} {
		spec := importSpec(t, source)
		r, err := perform(t, cfg, spec)
		if err != nil {
			t.Fatalf("%s: %v", source, err)
		}
		checkLayer(t, spec, content, r)
		p.mu.Lock()
		if len(p.seen) != 1 || strings.TrimSuffix(p.seen[0], ":443") != strings.TrimSuffix(want, ":443") {
			t.Errorf("%s: the proxy saw %v", source, p.seen)
		}
		p.seen = nil
		p.mu.Unlock()
	}
	if _, err := perform(t, cfg, importSpec(t, "http://direct.invalid/disk")); !errors.Is(err, image.ErrSource) || len(p.seen) != 0 {
		t.Errorf("NO_PROXY: %v, the proxy saw %v", err, p.seen)
	}
	cfg = config()
	cfg.Env = append(cfg.Env, "HTTPS_PROXY="+front.URL)
	if _, err := perform(t, cfg, importSpec(t, "https://example.com/disk")); !errors.Is(err, image.ErrSource) {
		t.Errorf("a certificate nobody signed: %v", err)
	}
}

// writeCertificate writes the server's certificate, which is its own authority and is for example.com.
func writeCertificate(t *testing.T, s *httptest.Server) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
