package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// imported runs one Import into memory and gives the target's bytes.
func imported(ctx context.Context, t *testing.T, req Request) (Result, []byte, error) {
	t.Helper()
	var dst *memDevice
	fsys := disk.NewMem(disk.MemOptions{})
	if req.Spool == nil {
		req.Spool, req.SpoolName = fsys, "spool"
	}
	req.Create = func(i Info) (block.Device, error) {
		dst = newMemDevice(make([]byte, i.DeviceBytes))
		return dst, nil
	}
	percent := 0
	req.Progress = func(p Progress) {
		if p.Percent < percent || p.Percent > 100 {
			t.Errorf("percent went from %d to %d", percent, p.Percent)
		}
		percent = p.Percent
	}
	r, err := Import(ctx, req)
	if ok, e := disk.Exists(req.Spool, req.SpoolName); ok || e != nil {
		t.Errorf("the spool is left behind: %v", e)
	}
	if err == nil && percent != 100 {
		t.Errorf("percent ended at %d", percent)
	}
	if dst == nil {
		return r, nil, err
	}
	return r, dst.b, err
}

// serve answers GETs with h.
func serve(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

func sha512Hex(b []byte) string {
	sum := sha512.Sum512(b)
	return hex.EncodeToString(sum[:])
}

func padded(b []byte) []byte {
	return append(bytes.Clone(b), make([]byte, int(roundUp(int64(len(b)), block.UnitBytes))-len(b))...)
}

// rawSample is a raw image of an odd length, longer than a chunk.
func rawSample() []byte {
	b := make([]byte, 3<<20+777)
	for i := range b {
		if i>>16%3 != 0 {
			b[i] = byte(i * i >> 8)
		}
	}
	return b
}

// TestImport: raw and qcow2, from a file and over HTTP, with and without an announced length, end as the same disk.
func TestImport(t *testing.T) {
	golden := goldenFiles(t)
	rawBytes := rawSample()
	sum256 := sha256.Sum256(rawBytes)
	for name, file := range map[string][]byte{"raw": rawBytes, "tiny raw": []byte("x"), "zlib": golden["v2-zlib"], "zstd": golden["v3-zstd"],
		"plain": golden["v3"], "extended": golden["v3-extended"]} {
		want := padded(file)
		if !strings.Contains(name, "raw") {
			dev, err := Open(t.Context(), memFile(t, file), Options{})
			if err != nil {
				t.Fatal(err)
			}
			want = make([]byte, dev.Size())
			if _, err := dev.ReadAt(want, 0); err != nil {
				t.Fatal(err)
			}
		}
		path := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		base := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/known" {
				w.Header().Set("Content-Length", strconv.Itoa(len(file)))
			}
			for p := file; len(p) > 0; p = p[min(len(p), 100_000):] {
				w.Write(p[:min(len(p), 100_000)])
				w.(http.Flusher).Flush()
			}
		})
		digest, err := Digest(t.Context(), newMemDevice(want))
		if err != nil {
			t.Fatal(err)
		}
		for _, source := range []string{path, base + "/known", base + "/chunked"} {
			sums := []Checksum{{}, {"sha512", sha512Hex(file)}}
			if name == "raw" {
				sums = append(sums, Checksum{"sha256", hex.EncodeToString(sum256[:])})
			}
			for _, sum := range sums {
				r, got, err := imported(t.Context(), t, Request{Source: source, Checksum: sum})
				if err != nil {
					t.Fatalf("%s from %s: %v", name, source, err)
				}
				if !bytes.Equal(got, want) || r.SHA512 != sha512Hex(file) || r.Digest != digest || r.FileBytes != int64(len(file)) {
					t.Fatalf("%s from %s: %+v", name, source, r)
				}
			}
			for _, bad := range []Checksum{{"sha512", strings.Repeat("ab", 64)}, {"sha256", strings.Repeat("ab", 32)}} {
				if _, _, err := imported(t.Context(), t, Request{Source: source, Checksum: bad}); !errors.Is(err, ErrChecksum) {
					t.Fatalf("%s from %s, wrong %s: %v", name, source, bad.Algorithm, err)
				}
			}
			if _, _, err := imported(t.Context(), t, Request{Source: source, Limits: Limits{FileBytes: int64(len(file)) - 1}}); len(file) > 1 && !errors.Is(err, ErrTooLarge) {
				t.Fatalf("%s from %s, beyond the limit: %v", name, source, err)
			}
			if _, _, err := imported(t.Context(), t, Request{Source: source, Limits: Limits{VirtualBytes: 1}}); len(file) > 1 && !errors.Is(err, ErrTooLarge) {
				t.Fatalf("%s from %s, disk beyond the limit: %v", name, source, err)
			}
		}
	}
}

// TestFormatOverride: a user can insist on raw; insisting on qcow2 does not make it one.
func TestFormatOverride(t *testing.T) {
	file := goldenFiles(t)["v3"]
	url := serve(t, func(w http.ResponseWriter, r *http.Request) { w.Write(file) })
	if _, got, err := imported(t.Context(), t, Request{Source: url, Format: Raw}); err != nil || !bytes.Equal(got, padded(file)) {
		t.Fatalf("qcow2 taken as raw: %v", err)
	}
	url = serve(t, func(w http.ResponseWriter, r *http.Request) { w.Write(rawSample()) })
	if _, _, err := imported(t.Context(), t, Request{Source: url, Format: Qcow2}); !errors.Is(err, ErrFormat) {
		t.Fatalf("raw taken as qcow2: %v", err)
	}
}

// TestBadServers: what a server may do wrong, and the sentinel for each.
func TestBadServers(t *testing.T) {
	sample := rawSample()
	golden := goldenFiles(t)["v3"]
	gone := make(chan struct{})
	t.Cleanup(func() { close(gone) })
	stall := func(r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-gone:
		}
	}
	cases := []struct {
		name string
		h    http.HandlerFunc
		want error
	}{
		{"404", http.NotFound, ErrSource},
		{"500", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500); w.Write(sample) }, ErrSource},
		{"206", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(206); w.Write(sample) }, ErrSource},
		{"204", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(204) }, ErrSource},
		{"empty", func(w http.ResponseWriter, r *http.Request) {}, ErrFormat},
		{"web page", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "\n<!DOCTYPE html><html>not found, but 200")
		}, ErrFormat},
		{"packed on the way", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			w.Write(sample)
		}, ErrSource},
		{"redirects for ever", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path+"x", http.StatusFound) }, ErrSource},
		{"redirected to a file", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
		}, ErrSource},
		{"stalls before the answer", func(w http.ResponseWriter, r *http.Request) { stall(r) }, ErrStalled},
		{"stalls at once", func(w http.ResponseWriter, r *http.Request) { w.(http.Flusher).Flush(); stall(r) }, ErrStalled},
		{"raw stalls midway", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(len(sample)))
			w.Write(sample[:2<<20])
			w.(http.Flusher).Flush()
			stall(r)
		}, ErrStalled},
		{"qcow2 stalls midway", func(w http.ResponseWriter, r *http.Request) {
			w.Write(golden[:100_000])
			w.(http.Flusher).Flush()
			stall(r)
		}, ErrStalled},
		{"closes before the end", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(len(sample)))
			w.Write(sample[:2<<20])
			panic(http.ErrAbortHandler)
		}, ErrTruncated},
		{"closes before the end, chunked", func(w http.ResponseWriter, r *http.Request) {
			w.Write(golden[:100_000])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, ErrTruncated},
		{"closes at once", func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }, ErrSource},
		{"cut qcow2 that looks whole", func(w http.ResponseWriter, r *http.Request) { w.Write(golden[:100_000]) }, ErrTruncated},
		{"says 2^62 bytes", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(1<<62))
			w.Write(sample)
		}, ErrTooLarge},
		{"VMDK", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "KDMV", strings.Repeat("x", 5000)) }, ErrUnsupported},
		{"bzip2", func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("BZh91AY&SY and so on")) }, ErrUnsupported},
		{"gzip", func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("\x1f\x8b\x08\x00 and so on")) }, ErrFormat},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			base := serve(t, c.h)
			idle := 30 * time.Second
			if c.want == ErrStalled {
				idle = 300 * time.Millisecond
			}
			_, _, err := imported(t.Context(), t, Request{Source: base + "/dir/image?token=secret", IdleTimeout: idle})
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if strings.Contains(err.Error(), "secret") {
				t.Fatalf("the query is in the message: %v", err)
			}
			t.Log(err)
		})
	}
}

// TestUnframedBody: a body that ends with the connection, without length or chunks, is taken only with a checksum.
func TestUnframedBody(t *testing.T) {
	sample := rawSample()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var server sync.WaitGroup
	server.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Read(make([]byte, 4096))
			io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\n")
			c.Write(sample)
			c.Close()
		}
	})
	defer server.Wait()
	defer l.Close()
	source := "http://" + l.Addr().String() + "/image"
	if _, _, err := imported(t.Context(), t, Request{Source: source}); !errors.Is(err, ErrSource) {
		t.Fatalf("without checksum: %v", err)
	}
	_, got, err := imported(t.Context(), t, Request{Source: source, Checksum: Checksum{"sha512", sha512Hex(sample)}})
	if err != nil || !bytes.Equal(got, padded(sample)) {
		t.Fatalf("with checksum: %v", err)
	}
}

// TestRedirects: ten are followed, and the new place does not hear of the old one.
func TestRedirects(t *testing.T) {
	var referer atomic.Bool
	var hops atomic.Int32
	base := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Referer") != "" {
			referer.Store(true)
		}
		if hops.Add(1) <= 10 {
			http.Redirect(w, r, "/next", http.StatusTemporaryRedirect)
			return
		}
		w.Write(rawSample())
	})
	if _, _, err := imported(t.Context(), t, Request{Source: base + "/?signed=1"}); err != nil || referer.Load() {
		t.Fatalf("referer sent %v: %v", referer.Load(), err)
	}
}

// TestBadSources: names that lead nowhere, or where they must not.
func TestBadSources(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("/dev/zero", filepath.Join(dir, "zero")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "empty"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	closed := serve(t, http.NotFound)
	for source, want := range map[string]error{
		"":                             ErrSource,
		"relative/path":                ErrSource,
		dir:                            ErrSource,
		dir + "/missing":               ErrSource,
		dir + "/zero":                  ErrSource,
		dir + "/empty":                 ErrFormat,
		dir + "/a\x00b":                ErrSource,
		"ftp://example.org/image":      ErrUnsupported,
		"file:///etc/passwd":           ErrUnsupported,
		"http://":                      ErrSource,
		"http://host\x01/":             ErrSource,
		"http://user:secret@[::1/x":    ErrSource,
		"http://127.0.0.1:1/image":     ErrSource,
		"http://no.such.host.invalid/": ErrSource,
		closed + "/gone":               ErrSource,
	} {
		_, _, err := imported(t.Context(), t, Request{Source: source, IdleTimeout: 5 * time.Second})
		if !errors.Is(err, want) {
			t.Errorf("%q: got %v, want %v", source, err, want)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("a password is in the message: %v", err)
		}
	}
}

// TestSourceChanges: a file that is touched or replaced while it is read is refused, because its sum and its content may not belong together.
func TestSourceChanges(t *testing.T) {
	for name, file := range map[string][]byte{"raw": rawSample(), "qcow2": goldenFiles(t)["v3"]} {
		path := filepath.Join(t.TempDir(), "image")
		for what, change := range map[string]func() error{
			"touched":  func() error { return os.Chtimes(path, time.Time{}, time.Unix(1, 0)) },
			"replaced": func() error { return errors.Join(os.WriteFile(path+"2", file, 0o600), os.Rename(path+"2", path)) },
			"removed":  func() error { return os.Remove(path) },
		} {
			if err := os.WriteFile(path, file, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Import(t.Context(), Request{Source: path, Create: func(i Info) (block.Device, error) {
				return newMemDevice(make([]byte, i.DeviceBytes)), change()
			}})
			if !errors.Is(err, ErrSource) {
				t.Errorf("%s, %s: %v", name, what, err)
			}
		}
	}
}

// TestCancelledImport ends while the server is silent, and while the target is full.
func TestCancelledImport(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	asked := make(chan struct{})
	base := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(8<<20))
		w.Write(rawSample())
		w.(http.Flusher).Flush()
		close(asked)
		<-r.Context().Done()
	})
	var waiting sync.WaitGroup
	waiting.Go(func() { <-asked; cancel() })
	defer waiting.Wait()
	if _, _, err := imported(ctx, t, Request{Source: base}); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}

	// A target that fails ends an import whose server has nothing to say.
	base = serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(8<<20))
		w.Write(rawSample())
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	_, err := Import(t.Context(), Request{Source: base, Create: func(i Info) (block.Device, error) {
		dst := newMemDevice(make([]byte, i.DeviceBytes))
		dst.fail = func(int64) error { return block.ErrNoSpace }
		return dst, nil
	}})
	if !errors.Is(err, block.ErrNoSpace) {
		t.Fatalf("got %v", err)
	}
}

// TestSpoolIsFreed: while a spooled image is converted, the space of what was converted is given back.
func TestSpoolIsFreed(t *testing.T) {
	for _, name := range []string{"v3", "v3-zlib", "v3-zstd", "v2-zlib", "v3-extended"} {
		f := memFile(t, goldenFiles(t)[name])
		img, err := openAs(t.Context(), f, Auto, openOptions{limits: Limits{}.withDefaults(), freeing: true})
		if err != nil {
			t.Fatal(err)
		}
		im := importer{Request: Request{Create: func(i Info) (block.Device, error) { return newMemDevice(make([]byte, i.DeviceBytes)), nil }}}
		if _, err := im.convert(t.Context(), img, 0, img.free); err != nil {
			t.Fatal(err)
		}
		q, freed := img.Device.(*qcow2), int64(0)
		for off := int64(0); off < q.size; {
			r, err := q.lookup(off, q.size-off)
			if err != nil {
				t.Fatal(err)
			}
			off += r.n
			if r.kind == kindCompressed {
				r.host, r.n = r.e.host, r.e.stored
			} else if r.kind != kindData || r.n < minFreeBytes {
				continue
			}
			p := make([]byte, r.n)
			if _, err := f.ReadAt(p, r.host); err != nil || !allZero(p) {
				t.Errorf("%s: %d bytes at %#x were not freed: %v", name, r.n, r.host, err)
			}
			freed += r.n
		}
		if freed == 0 {
			t.Errorf("%s: nothing was freed", name)
		}
	}
}

// TestSpoolWithoutSpace: a full disk is ErrNoSpace, and the spool goes.
func TestSpoolWithoutSpace(t *testing.T) {
	file := goldenFiles(t)["v3"]
	base := serve(t, func(w http.ResponseWriter, r *http.Request) { w.Write(file) })
	_, _, err := imported(t.Context(), t, Request{Source: base, Spool: disk.NewMem(disk.MemOptions{CapacityBytes: 64 << 10}), SpoolName: "spool"})
	if !errors.Is(err, disk.ErrNoSpace) {
		t.Fatalf("got %v", err)
	}
}

// TestParseChecksum takes what users paste and nothing else.
func TestParseChecksum(t *testing.T) {
	a, b := strings.Repeat("aB", 64), strings.Repeat("01", 32)
	for s, want := range map[string]string{"": "", a: "sha512:" + strings.ToLower(a), "SHA512:" + a: "sha512:" + strings.ToLower(a), b: "sha256:" + b, "sha256:" + b: "sha256:" + b} {
		if c, err := ParseChecksum(s); err != nil || c.String() != want {
			t.Errorf("%q: %v, %v", s, c, err)
		}
	}
	for _, s := range []string{"x", "sha512:", "sha512:" + b, "sha256:" + a, "md5:" + strings.Repeat("0", 32), a[1:], a + " ", ":" + a, strings.Repeat("zz", 64)} {
		if c, err := ParseChecksum(s); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%q: %v, %v", s, c, err)
		}
	}
}
