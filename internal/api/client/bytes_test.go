package client

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"ashlar/internal/api"
	"ashlar/internal/catalog"
	"ashlar/internal/identity"
)

// store is an Extra that keeps one image's bytes in memory.
type store struct {
	api.Extra
	mu     sync.Mutex
	bytes  []byte
	breaks int // after so many bytes a download breaks off; 0: never
}

func (s *store) Upload(_ context.Context, _ string, _ int64, r io.Reader) error {
	data, err := io.ReadAll(r)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.bytes = data
	}
	return err
}

func (s *store) Download(context.Context, string, string, string, string) (io.ReadCloser, int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := io.Reader(bytes.NewReader(s.bytes))
	if s.breaks > 0 {
		r = io.MultiReader(bytes.NewReader(s.bytes[:s.breaks]), iotest.ErrReader(errors.New("gone")))
	}
	return io.NopCloser(r), int64(len(s.bytes)), nil
}

func (s *store) Diff(_ context.Context, r api.DiffRange, each func(off, n int64, zero bool)) (int64, int64, error) {
	each(r.Off, 4096, r.Off > 0)
	return r.Off + 4<<20, 10 << 20, nil
}

// world is a node that a test takes up and down at one address.
type world struct {
	t       *testing.T
	mem     *catalog.Mem
	extra   *store
	wrap    func(http.Handler) http.Handler
	address string // host:port
	down    func()
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, mem: catalog.NewMem(), extra: &store{}, wrap: func(h http.Handler) http.Handler { return h }, address: "127.0.0.1:0", down: func() {}}
	t.Cleanup(func() { w.down(); w.mem.Close() })
	return w
}

// up serves until down is called.
func (w *world) up(settings *tls.Config) {
	w.t.Helper()
	h := api.New(api.Config{Catalog: w.mem, Extra: w.extra, Node: "n1", Version: "v1", Heartbeat: 50 * time.Millisecond})
	l, err := api.Listen(w.address, settings)
	if err != nil {
		w.t.Fatal(err)
	}
	w.address = l.Addr().String()
	srv := &http.Server{Handler: w.wrap(h), ErrorLog: nil}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(l) })
	w.down = func() {
		if err := errors.Join(h.Close(), srv.Close()); err != nil {
			w.t.Error(err)
		}
		wg.Wait()
		w.down = func() {}
	}
}

func put[T any](w *world, k catalog.Key, v T) {
	w.t.Helper()
	if _, _, err := catalog.Upsert(w.t.Context(), w.mem, k, func(was *T) error { *was = v; return nil }); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) image(name, source, state string) {
	id := fmt.Sprintf("%032x", name)
	put(w, catalog.ImageKey(catalog.Wanted, name), catalog.ImageWanted{Name: name, ID: id, SourceType: source})
	put(w, catalog.ImageKey(catalog.Observed, name), catalog.ImageObserved{Name: name, ID: id, Disks: map[string]catalog.ImageOnDisk{"d": {State: state}}})
}

func (w *world) volume(name, state string) {
	id := fmt.Sprintf("%032x", name)
	put(w, catalog.VolumeKey(catalog.Wanted, name), catalog.VolumeWanted{Name: name, ID: id, SizeBytes: 10 << 20, Copies: 1, Tickets: []catalog.Ticket{{Node: "n1", Kind: catalog.TicketAPI}}})
	put(w, catalog.VolumeKey(catalog.Observed, name), catalog.VolumeObserved{Name: name, ID: id, State: state, SizeBytes: 10 << 20})
}

func (w *world) note(reason string) {
	w.t.Helper()
	ev := catalog.EventRecord{Time: time.Unix(1700000000, 0), Type: catalog.Normal, Kind: catalog.KindNode, Name: "n1", Reason: reason}
	if err := catalog.Note(w.t.Context(), w.mem, ev); err != nil {
		w.t.Fatal(err)
	}
}

// TestUpAndDown uploads an image and downloads it in every form.
func TestUpAndDown(t *testing.T) {
	w := newWorld(t)
	w.up(nil)
	c, ctx := connect(t, "http://"+w.address)
	content := make([]byte, 3<<20+77)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(content)
	w.image("up", catalog.SourceUpload, catalog.ImagePending)
	for _, size := range []int64{int64(len(content)), -1} {
		var seen int64
		_, err := c.UploadImage(ctx, "up", Upload{Body: bytes.NewReader(content), SizeBytes: size, Progress: func(n int64) { seen = n }})
		if err != nil || seen != int64(len(content)) || !bytes.Equal(w.extra.bytes, content) {
			t.Fatalf("size %d: %v, progress %d, %d bytes arrived", size, err, seen, len(w.extra.bytes))
		}
		w.extra.bytes = nil
	}
	if _, err := c.UploadImage(ctx, "up", Upload{Body: iotest.ErrReader(io.ErrNoProgress), SizeBytes: -1}); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("a body that cannot be read: %v", err)
	}
	if _, err := c.UploadImage(ctx, "up", Upload{Body: strings.NewReader(""), SizeBytes: 0}); api.CodeOf(err) != api.CodeInvalid {
		t.Errorf("nothing: %v", err)
	}
	w.image("done", catalog.SourceUpload, catalog.ImageReady)
	if _, err := c.UploadImage(ctx, "done", Upload{Body: bytes.NewReader(make([]byte, 64<<20)), SizeBytes: 64 << 20}); api.CodeOf(err) != api.CodeConflict {
		t.Errorf("twice: %v", err)
	}
	w.extra.bytes = content
	for _, d := range []Download{{Format: "raw"}, {Format: "qcow2"}} {
		var got bytes.Buffer
		var size, seen int64
		d.To, d.Size, d.Progress = &got, func(n int64) { size = n }, func(n int64) { seen = n }
		for range 2 { // the second time the node knows the checksum before
			got.Reset()
			res, err := c.DownloadImage(ctx, "done", d)
			if err != nil || !res.Verified || res.SizeBytes != int64(len(content)) || size != res.SizeBytes || seen != size || !bytes.Equal(got.Bytes(), content) {
				t.Errorf("%s: %+v, %v; size %d, progress %d", d.Format, res, err, size, seen)
			}
		}
	}
	var zipped bytes.Buffer
	if _, err := c.DownloadImage(ctx, "done", Download{To: &zipped}); err != nil {
		t.Error(err)
	} else if z, err := gzip.NewReader(&zipped); err != nil {
		t.Error(err)
	} else if inside, err := io.ReadAll(z); err != nil || !bytes.Equal(inside, content) {
		t.Errorf("%d bytes in the gzip, %v", len(inside), err)
	}
	w.volume("db1", catalog.VolumeDetached)
	if res, err := c.DownloadVolume(ctx, "db1", Download{Format: "raw", To: io.Discard}); err != nil || !res.Verified {
		t.Errorf("%+v %v", res, err)
	}
	if _, err := c.DownloadVolume(ctx, "nothing", Download{To: io.Discard}); api.CodeOf(err) != api.CodeNotFound {
		t.Error(err)
	}
	full := errors.New("disk full")
	if _, err := c.DownloadVolume(ctx, "db1", Download{To: brokenWriter{full}}); !errors.Is(err, full) {
		t.Error(err)
	}
}

type brokenWriter struct{ err error }

func (b brokenWriter) Write([]byte) (int, error) { return 0, b.err }

// TestBadDownloads wants a download that broke off, or whose bytes were changed on the way, never to count.
func TestBadDownloads(t *testing.T) {
	w := newWorld(t)
	w.extra.bytes = make([]byte, 2<<20)
	w.image("i", catalog.SourceDownload, catalog.ImageReady)
	w.wrap = func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.URL.Query().Get("format") == "qcow2" {
				rw = &flipper{ResponseWriter: rw}
			}
			h.ServeHTTP(rw, r)
		})
	}
	w.up(nil)
	c, ctx := connect(t, "http://"+w.address)
	if _, err := c.DownloadImage(ctx, "i", Download{Format: "qcow2", To: io.Discard}); api.CodeOf(err) != api.CodeChecksum {
		t.Errorf("a bit was turned: %v", err)
	}
	w.extra.breaks = 1 << 20
	for _, format := range []string{"", "raw"} {
		if _, err := c.DownloadImage(ctx, "i", Download{Format: format, To: io.Discard}); api.CodeOf(err) != api.CodeUnreachable {
			t.Errorf("%q broke off: %v", format, err)
		}
	}
}

// flipper turns a bit in what is written.
type flipper struct {
	http.ResponseWriter
	done bool
}

func (f *flipper) Write(p []byte) (int, error) {
	if !f.done && len(p) > 100 {
		f.done = true
		p = bytes.Clone(p)
		p[99] ^= 1
	}
	return f.ResponseWriter.Write(p)
}

// TestFollow follows events and volumes over a node that goes away and comes back: nothing is missed, no event comes twice.
func TestFollow(t *testing.T) {
	w := newWorld(t)
	w.up(nil)
	c, ctx := connect(t, "http://"+w.address)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events, volumes, aways := make(chan string, 100), make(chan int, 1000), make(chan bool, 100)
	var wg sync.WaitGroup
	wg.Go(func() {
		err := c.FollowEvents(ctx, "now", func(e api.Event) error { events <- e.Reason; return nil }, func(err error) { aways <- err != nil })
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	wg.Go(func() {
		err := Watch(ctx, c, "volumes", func(v []api.Volume) error { volumes <- len(v); return nil })
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	want(t, volumes, 0)
	// What happens before the stream begins is not sent, and nothing says when it begins: say it until it comes.
	for begun := time.After(time.Minute); len(events) == 0; {
		w.note("Ready")
		select {
		case <-begun:
			t.Fatal("the stream of events did not begin within a minute")
		case <-time.After(5 * time.Millisecond):
		}
	}
	w.down()
	w.note("Down1")
	w.note("Down2")
	w.volume("db1", catalog.VolumeDetached)
	want(t, aways, true)
	w.up(nil)
	for e := next(t, events); e != "Down1"; e = next(t, events) {
		if e != "Ready" {
			t.Errorf("%s came", e)
		}
	}
	want(t, events, "Down2")
	want(t, aways, false)
	want(t, volumes, 1)
	w.note("Up")
	want(t, events, "Up")
	cancel()
	wg.Wait()
	ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := Watch(ctx, c, "nothing", func([]api.Volume) error { return nil }); api.CodeOf(err) != api.CodeNotFound {
		t.Errorf("a collection that is not: %v", err)
	}
	stop := errors.New("enough")
	if err := c.FollowEvents(ctx, "", func(api.Event) error { return stop }, nil); !errors.Is(err, stop) {
		t.Error(err)
	}
	if err := c.FollowEvents(ctx, "x", nil, nil); api.CodeOf(err) != api.CodeInvalid {
		t.Error(err)
	}
}

func next[T any](t *testing.T, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(time.Minute):
		t.Fatal("nothing came for a minute")
		panic("not reached")
	}
}

func want[T comparable](t *testing.T, ch <-chan T, what T) {
	t.Helper()
	if got := next(t, ch); got != what {
		t.Errorf("%v came, not %v", got, what)
	}
}

// TestBeyondLoopback speaks TLS with a token, and wants every mistake in it to be told from the others.
func TestBeyondLoopback(t *testing.T) {
	dir := t.TempDir()
	authority, err := identity.OpenAuthority(filepath.Join(dir, "identity"), nil)
	if err != nil {
		t.Fatal(err)
	}
	settings, err := authority.ServerTLS([]string{"127.0.0.1", "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	// The first token is made on the node, here over loopback.
	w.up(nil)
	local, ctx := connect(t, "http://"+w.address)
	made, err := local.CreateToken(ctx, NewToken{Name: "laptop", Expires: time.Now().Add(time.Hour)})
	if err != nil || made.Token == "" {
		t.Fatal(made, err)
	}
	if list, err := local.Tokens(ctx); err != nil || len(list) != 1 || list[0].Token != "" {
		t.Errorf("%+v %v", list, err)
	}
	w.down()
	w.up(settings)
	file := filepath.Join(dir, "token")
	if err := os.WriteFile(file, []byte(made.Token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	good := Options{TokenFile: file, CAFile: filepath.Join(dir, "identity", "ca.crt")}
	about := func(address string, o Options) error {
		c, err := Open(address, o)
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.About(ctx)
		return err
	}
	https := "https://" + w.address
	if err := about(https, good); err != nil {
		t.Error(err)
	}
	if err := about(https, Options{Token: made.Token, CAFile: good.CAFile}); err != nil {
		t.Errorf("from the environment: %v", err)
	}
	_, port, _ := net.SplitHostPort(w.address)
	loose := filepath.Join(dir, "loose")
	if err := os.WriteFile(loose, []byte(made.Token), 0o644); err != nil {
		t.Fatal(err)
	}
	for what, m := range map[string]struct {
		address string
		o       Options
		code    api.Code
		words   string
	}{
		"no token":           {https, Options{CAFile: good.CAFile}, api.CodeUnauthorized, "token is needed"},
		"no authority":       {https, Options{TokenFile: file}, api.CodeUnreachable, "not trusted"},
		"authority is none":  {https, Options{TokenFile: file, CAFile: file}, api.CodeInvalid, "no certificate"},
		"authority is away":  {https, Options{TokenFile: file, CAFile: file + "x"}, api.CodeInvalid, "authority"},
		"another name":       {"https://127.0.0.2:" + port, good, api.CodeUnreachable, ""},
		"token file is away": {https, Options{TokenFile: file + "x"}, api.CodeInvalid, "token file"},
		"others can read it": {https, Options{TokenFile: loose}, api.CodeInvalid, "0644"},
		"a token of two":     {https, Options{Token: "a b"}, api.CodeInvalid, "is none"},
		"plain text":         {"http://192.0.2.1:9500", good, api.CodeInvalid, "plain text"},
		"HTTP to TLS":        {"http://" + w.address, good, api.CodeInternal, ""},
		"no address":         {"ftp://x", good, api.CodeInvalid, "https://"},
	} {
		err := about(m.address, m.o)
		if api.CodeOf(err) != m.code || !strings.Contains(err.Error(), m.words) || strings.Contains(err.Error(), made.Token) {
			t.Errorf("%s: %v (%s)", what, err, api.CodeOf(err))
		}
	}
	c, err := Open(https, good)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	enough := errors.New("enough")
	if err := Watch(ctx, c, "nodes", func([]api.Node) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("a websocket over TLS: %v", err)
	}
	if err := c.DeleteToken(ctx, "laptop"); err != nil {
		t.Error(err)
	}
	if err := c.FollowEvents(ctx, "", nil, nil); api.CodeOf(err) != api.CodeUnauthorized {
		t.Errorf("a deleted token: %v", err)
	}
}

// TestVerbs says the verbs that are new, once each.
func TestVerbs(t *testing.T) {
	w := newWorld(t)
	w.up(nil)
	c, ctx := connect(t, "http://"+w.address)
	w.volume("db1", catalog.VolumeAttached)
	if v, err := c.SetLimits(ctx, "db1", LimitChange{IOPS: "500", BytesPerSecond: "100Mi"}); err != nil || v.Limits.IOPS != 500 || v.Limits.BytesPerSecond != "104857600" {
		t.Errorf("%+v %v", v.Limits, err)
	}
	if v, err := c.SetLimits(ctx, "db1", LimitChange{IOPS: "0"}); err != nil || v.Limits.IOPS != 0 || v.Limits.BytesPerSecond != "104857600" {
		t.Errorf("%+v %v", v.Limits, err)
	}
	var offs []int64
	err := c.SnapshotDiff(ctx, "db1", "", "", func(r api.DiffChunk) error { offs = append(offs, r.Off); return nil })
	if err != nil || fmt.Sprint(offs) != "[0 4194304 8388608]" {
		t.Errorf("%v %v", offs, err)
	}
	if _, err := c.ExportFile(ctx, "db1", NewExport{Path: "/x"}); api.CodeOf(err) != api.CodeForbidden {
		t.Error(err)
	}
	op := catalog.Operation{ID: "1", Volume: "db1", Verb: catalog.VerbExport, State: catalog.OperationRunning, Progress: 40}
	put(w, catalog.OperationKey("db1", "1"), op)
	var seen []int
	op.State, op.Progress = catalog.OperationDone, 100
	done, err := c.WaitOperation(ctx, "db1/1", func(now api.Operation) {
		seen = append(seen, now.Progress)
		put(w, catalog.OperationKey("db1", "1"), op)
	})
	if err != nil || done.State != "done" || fmt.Sprint(seen) != "[40 100]" {
		t.Errorf("%+v %v %v", done, seen, err)
	}
	op.State, op.Code, op.Message = catalog.OperationFailed, catalog.CodeNoSpace, "the disk is full"
	put(w, catalog.OperationKey("db1", "1"), op)
	if _, err := c.WaitOperation(ctx, "db1/1", nil); api.CodeOf(err) != api.CodeNoSpace || !strings.Contains(err.Error(), "volume db1: export: the disk is full") {
		t.Error(err)
	}
	for _, n := range []NewImage{{Name: "a", Volume: "db1", ExportType: "qcow2", Copies: 1}, {Name: "b", Upload: true, Copies: 1}, {Name: "c", URL: "nbd://h/x", Copies: 1}} {
		if _, err := c.ImportImage(ctx, n); err != nil {
			t.Errorf("%+v: %v", n, err)
		}
	}
	if v, err := c.CreateVolume(ctx, NewVolume{Name: "x", Size: "1Gi", Copies: 1, Frontend: "blockdev", Limits: LimitChange{IOPS: "7"}}); err != nil || v.Frontend != "blockdev" || v.Limits.IOPS != 7 {
		t.Errorf("%+v %v", v, err)
	}
}
