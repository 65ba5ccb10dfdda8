//go:build integration

package testbed_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
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
)

// TestBadInput gives a node everything that it must refuse: each with an error that names the object and says what is wrong, a documented exit code, and nothing
// changed.
func TestBadInput(t *testing.T) {
	b := newBed(t)
	b.raw("golden.raw", 16*mib, 40)
	b.tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", b.path("golden.raw"), b.path("golden.qcow2"))
	b.cli("image", "import", "golden", b.path("golden.qcow2"))
	b.cli("volume", "create", "v", "--image", "golden", "--size", "32Mi")
	b.cli("volume", "create", "w", "--size", "32Mi")
	b.attach("v")
	b.cli("snapshot", "create", "v", "one")
	b.sub("images", (*bed).badImages)
	b.sub("sources", (*bed).badSources)
	b.sub("names", (*bed).badNames)
	b.sub("sizes", (*bed).badSizes)
	b.sub("states", (*bed).badStates)
	b.sub("usage", (*bed).badUsage)
	b.sub("rest", (*bed).badREST)
	b.sub("nbd", (*bed).badNBD)
	b.sub("processes", (*bed).badProcesses)
	b.same("v", b.path("golden.raw"))
	b.clean("v", "w")
}

// badImport wants an import to be refused, to leave nothing but a record that says why, and that gone when it is deleted.
func (b *bed) badImport(words []string, args ...string) {
	b.Helper()
	b.unchanged(func() {
		said := b.refused(exitRefused, append([]string{"image bad"}, words...), append([]string{"image", "import", "bad"}, args...)...)
		b.Logf("%s", strings.TrimSpace(said[strings.LastIndex(strings.TrimSpace(said), "\n")+1:]))
		b.p.Text(b.ctx, "image", "delete", "bad") // unless it was refused before it had a record
	})
}

// edited is the golden qcow2 with bytes replaced.
func (b *bed) edited(name string, off int, bytes ...byte) string {
	b.Helper()
	text, err := os.ReadFile(b.path("golden.qcow2"))
	if err != nil {
		b.Fatal(err)
	}
	copy(text[off:], bytes)
	if err := os.WriteFile(b.path(name), text, 0o600); err != nil {
		b.Fatal(err)
	}
	return b.path(name)
}

// badImages: files that are not what they say, or say what they must not.
func (b *bed) badImages() {
	golden := b.path("golden.qcow2")
	b.unchanged(func() {
		wrong := "sha256:" + strings.Repeat("ab", 32)
		b.refused(exitRefused, []string{"image bad", "checksum"}, "image", "import", "bad", golden, "--checksum", wrong)
		b.refused(exitFailed, []string{"volume onbad", "checksum"}, "volume", "create", "onbad", "--image", "bad", "--size", "32Mi", "--timeout", "1s")
		b.cli("volume", "delete", "onbad")
		b.cli("image", "delete", "bad")
	})
	b.badImport([]string{"checksum"}, golden, "--checksum", "sha512:"+strings.Repeat("ab", 64))
	b.badImport([]string{"checksum"}, golden, "--checksum", "md5:"+strings.Repeat("ab", 16))
	b.badImport([]string{"checksum"}, golden, "--checksum", "sha256:abc")
	text, err := os.ReadFile(golden)
	if err != nil {
		b.Fatal(err)
	}
	for _, n := range []int{50, 104, 70000, len(text) / 2} {
		name := fmt.Sprintf("cut%d.qcow2", n)
		if err := os.WriteFile(b.path(name), text[:n], 0o600); err != nil {
			b.Fatal(err)
		}
		b.badImport(nil, b.path(name))
	}
	b.tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", b.path("backed.qcow2"), "16M")
	b.badImport([]string{"backing file"}, b.path("backed.qcow2"))
	b.tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+b.path("outside.raw")+",data_file_raw=on", b.path("external.qcow2"), "16M")
	b.badImport([]string{"external data file"}, b.path("external.qcow2"))
	be := func(n int, v uint64) []byte {
		p := binary.BigEndian.AppendUint64(nil, v)
		return p[8-n:]
	}
	for name, e := range map[string]struct {
		off   int
		bytes []byte
	}{
		"version 9":                 {4, be(4, 9)},
		"encrypted":                 {32, be(4, 2)},
		"cluster bits 60":           {20, be(4, 60)},
		"cluster bits 3":            {20, be(4, 3)},
		"size 2^63":                 {24, be(8, 1<<63)},
		"size of an exabyte":        {24, be(8, 1<<60)},
		"L1 of 2^31 entries":        {36, be(4, 1<<31-1)},
		"L1 of one entry too few":   {36, be(4, 0)},
		"L1 beyond the end":         {40, be(8, 1<<50)},
		"L1 on the header":          {40, be(8, 8)},
		"unknown incompatible bits": {72, be(8, 1<<40)},
		"header of 2^31 bytes":      {100, be(4, 1<<31)},
	} {
		b.Log(name)
		b.badImport(nil, b.edited(strings.ReplaceAll(strings.ReplaceAll(name, " ", "-"), "^", "")+".qcow2", e.off, e.bytes...))
	}
	// An L1 entry that points at the L1 table itself, and one far outside.
	l1 := binary.BigEndian.Uint64(text[40:])
	b.badImport(nil, b.edited("loop.qcow2", int(l1), be(8, l1|1<<63)...))
	b.badImport(nil, b.edited("far.qcow2", int(l1), be(8, 1<<50|1<<63)...))
	// More than a volume may have, in a few kilobytes.
	b.tool("qemu-img", "create", "-q", "-f", "qcow2", b.path("giant.qcow2"), "100T")
	b.badImport(nil, b.path("giant.qcow2"))
	if err := os.WriteFile(b.path("empty.raw"), nil, 0o600); err != nil {
		b.Fatal(err)
	}
	b.badImport(nil, b.path("empty.raw"))
}

// badSources: places that do not deliver.
func (b *bed) badSources() {
	text, err := os.ReadFile(b.path("golden.qcow2"))
	if err != nil {
		b.Fatal(err)
	}
	hang := make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/missing", http.NotFound)
	mux.HandleFunc("/forbidden", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusForbidden) })
	mux.HandleFunc("/broken", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusInternalServerError) })
	mux.HandleFunc("/page", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "") })
	mux.HandleFunc("/loop", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/loop", http.StatusFound) })
	mux.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
	})
	mux.HandleFunc("/half", func(w http.ResponseWriter, r *http.Request) { // promises all, sends half, closes; whatever is asked for
		w.Header().Set("Content-Length", fmt.Sprint(len(text)))
		w.Write(text[:len(text)/2])
		panic(http.ErrAbortHandler)
	})
	mux.HandleFunc("/stall", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(text)))
		w.Write(text[:len(text)/2])
		w.(http.Flusher).Flush()
		<-hang
	})
	s := httptest.NewServer(mux)
	defer s.Close()
	defer close(hang)
	b.badImport([]string{"404"}, s.URL+"/missing")
	b.badImport([]string{"403"}, s.URL+"/forbidden")
	b.badImport([]string{"500"}, s.URL+"/broken")
	b.badImport(nil, s.URL+"/page")
	b.badImport(nil, s.URL+"/loop")
	b.badImport(nil, s.URL+"/file")
	b.badImport(nil, s.URL+"/half")
	b.badImport(nil, "http://127.0.0.1:1/nobody.qcow2")
	b.badImport(nil, "http://no-such-host.invalid/x.qcow2")
	b.badImport([]string{"http://"}, "ftp://127.0.0.1/x.qcow2")
	b.badImport(nil, "http://user:secret@127.0.0.1/x.qcow2")
	b.unchanged(func() {
		b.refused(exitNotFound, []string{"image bad", "nothing.raw"}, "image", "import", "bad", b.path("nothing.raw"))
		b.refused(exitRefused, []string{"image bad"}, "image", "import", "bad", b.dir)
	})
	// A server that stalls holds nobody up: the import is given up on request at once (by itself after 30 s without a byte: package image).
	b.unchanged(func() {
		b.cli("image", "import", "bad", s.URL+"/stall", "--no-wait")
		start := time.Now()
		b.cli("image", "delete", "bad")
		b.Logf("an import from a server that stalls: deleted in %d ms", time.Since(start).Milliseconds())
	})
}

// badNames: names that could mean something to a file system, a terminal or nobody.
func (b *bed) badNames() {
	names := []string{"", ".", "..", "a/b", "../etc/passwd", "/abs", "a\nb", "a\x00b"[:1] + "\x01", "a\x1b[31mred", "-dash", ".hidden", "sp ace", "UPPER/../x", strings.Repeat("n", 300), "ä\xff", "a\u202eb"}
	for _, name := range names {
		b.unchanged(func() {
			b.refused(exitRefused, []string{"volume"}, "volume", "create", "--size", "16Mi", "--", name)
			b.refused(exitRefused, []string{"image"}, "image", "import", "--", name, b.path("golden.raw"))
			if name != "" {
				b.refused(exitRefused, []string{"snapshot"}, "snapshot", "create", "--", "v", name)
			}
		})
	}
	b.unchanged(func() {
		b.refused(exitRefused, []string{"volume-head"}, "snapshot", "create", "v", "volume-head")
	})
}

// badSizes: none, negative, too large, too small for the image; odd ones are rounded up.
func (b *bed) badSizes() {
	for _, size := range []string{"0", "-1", "-10Gi", "16Ti", "1000000Ti", "9223372036854775808", "99999999999999999999999", "ten", "10Xi", "0x10", "1e400", "NaN", "", " ", "1.5.2Gi"} {
		b.unchanged(func() {
			b.refused(exitRefused, []string{"volume odd"}, "volume", "create", "odd", "--size="+size)
			if size != "" {
				b.refused(exitRefused, []string{"volume v"}, "volume", "expand", "v", "--size="+size)
			}
		})
	}
	b.unchanged(func() {
		b.refused(exitRefused, []string{"volume small", "image golden"}, "volume", "create", "small", "--image", "golden", "--size", "12Mi")
		b.refused(exitRefused, []string{"volume v", "32"}, "volume", "expand", "v", "--size", "16Mi") // it cannot shrink
		b.refused(exitRefused, []string{"volume"}, "volume", "create", "none")
		b.refused(exitRefused, []string{"volume none", "nothere"}, "volume", "create", "none", "--image", "nothere")
	})
	for size, want := range map[string]string{"1": "10485760", "10485761": "12582912", "12000001": "12582912", "20M": "20971520"} {
		b.cli("volume", "create", "odd", "--size", size)
		if v := b.volume("odd"); v.Size != want {
			b.Errorf("a size of %s became %s, want %s", size, v.Size, want)
		}
		b.cli("volume", "delete", "odd")
	}
}

// badStates: what cannot be done now, or with what is not there.
func (b *bed) badStates() {
	b.unchanged(func() {
		b.refused(exitConflict, []string{"volume v", "exists"}, "volume", "create", "v", "--size", "16Mi")
		b.refused(exitConflict, []string{"image golden", "exists"}, "image", "import", "golden", b.path("golden.raw"))
		b.refused(exitConflict, []string{"snapshot one"}, "snapshot", "create", "v", "one")
		b.refused(exitConflict, []string{"image golden", "volume v"}, "image", "delete", "golden")
		b.refused(exitConflict, []string{"volume v", "detach"}, "snapshot", "revert", "v", "one") // its frontend is enabled
		b.refused(exitNotFound, []string{"nowhere"}, "volume", "attach", "w", "--node", "nowhere")
		b.refused(exitNotFound, []string{"nothere"}, "snapshot", "revert", "w", "nothere")
		b.refused(exitNotFound, []string{"nothere"}, "snapshot", "delete", "v", "nothere")
		b.refused(exitNotFound, []string{"nothere"}, "snapshot", "show", "v", "nothere")
		for _, args := range [][]string{{"volume", "show"}, {"volume", "attach"}, {"volume", "detach"}, {"volume", "delete"}, {"volume", "expand", "--size", "1Gi"}, {"volume", "salvage"},
			{"image", "show"}, {"image", "delete"}, {"snapshot", "list"}, {"snapshot", "create"}, {"check"}} {
			b.refused(exitNotFound, []string{"nothere"}, append(args, "nothere")...)
		}
		b.refused(exitNotBuilt, []string{"volume w", "iscsi"}, "volume", "attach", "w", "--frontend", "iscsi")
		b.refused(exitRefused, []string{"volume w", "floppy"}, "volume", "attach", "w", "--frontend", "floppy")
		b.refused(exitConflict, []string{"v"}, "shutdown")
	})
	// Reverting with the frontend enabled is refused by REST too.
	b.unchanged(func() {
		if code, got := b.rest("POST", "/v1/volumes/v?action=snapshotRevert", `{"name":"one"}`); code != http.StatusConflict || got["reason"] != "frontend-enabled" {
			b.Errorf("revert with the frontend enabled: %d %v", code, got)
		}
	})
}

// badUsage: command lines that make no sense.
func (b *bed) badUsage() {
	b.unchanged(func() {
		for _, args := range [][]string{{"volume", "create"}, {"volume", "create", "a", "b", "--size", "1Gi"}, {"volume", "expand", "v"}, {"volume", "show", "v", "--nonsense"}, {"image", "import", "x"},
			{"nonsense"}, {"volume", "nonsense"}, {"recover"}, {"check"}, {"snapshot", "create"}, {"status", "extra"}} {
			b.refused(exitUsage, nil, args...)
		}
		b.refused(exitRefused, []string{"xml"}, "volume", "list", "-o", "xml")
	})
	if err := os.WriteFile(b.path("no.layer"), bytes.Repeat([]byte("nonsense"), 4096), 0o600); err != nil {
		b.Fatal(err)
	}
	b.refused(exitFailed, []string{"no.layer", "no layer file"}, "dump", "layer", b.path("no.layer"))
	b.refused(exitNotFound, []string{"missing.layer"}, "dump", "layer", b.path("missing.layer"))
}

// badREST: wrong types, wrong methods, no JSON, too much; unknown fields are ignored.
func (b *bed) badREST() {
	want := func(status int, words []string, method, path, body string) {
		b.Helper()
		code, got := b.rest(method, path, body)
		message, _ := got["message"].(string)
		if code != status || got["type"] != "error" || got["status"] != float64(status) || message == "" {
			b.Errorf("%s %s %.80s: %d %v, want %d", method, path, body, code, got, status)
		}
		for _, w := range words {
			if !strings.Contains(message, w) {
				b.Errorf("%s %s %.80s: does not say %q: %s", method, path, body, w, message)
			}
		}
	}
	b.unchanged(func() {
		want(400, []string{"name"}, "POST", "/v1/volumes", `{"name":5,"size":"16Mi"}`)
		want(400, []string{"size"}, "POST", "/v1/volumes", `{"name":"r","size":true}`)
		want(400, []string{"numberOfReplicas"}, "POST", "/v1/volumes", `{"name":"r","size":"16Mi","numberOfReplicas":"two"}`)
		want(400, nil, "POST", "/v1/volumes", `{"name":"r","size":"16Mi","numberOfReplicas":-1}`)
		want(400, nil, "POST", "/v1/volumes", `{"name":"r"`)
		want(400, nil, "POST", "/v1/volumes", `[1,2]`)
		want(400, nil, "POST", "/v1/volumes", `"text"`)
		want(400, nil, "POST", "/v1/volumes", `{}`)
		want(400, []string{".."}, "POST", "/v1/volumes", `{"name":"..","size":"16Mi"}`)
		want(400, nil, "POST", "/v1/volumes", `{"name":"a\u0000b","size":"16Mi"}`)
		want(400, nil, "POST", "/v1/volumes", `{"name":"r","size":"16Mi","frontend":"floppy"}`)
		want(501, []string{"iscsi"}, "POST", "/v1/volumes", `{"name":"r","size":"16Mi","frontend":"iscsi"}`)
		want(400, nil, "POST", "/v1/volumes/v?action=expand", `{"size":[]}`)
		want(400, nil, "POST", "/v1/volumes/v?action=expand", `{"size":"0"}`)
		want(400, nil, "POST", "/v1/volumes/v?action=snapshotCreate", `{"name":"a/b"}`)
		want(400, nil, "POST", "/v1/volumes/v?action=snapshotCreate", `{"labels":"none"}`)
		want(404, nil, "POST", "/v1/volumes/v?action=nonsense", `{}`)
		want(404, nil, "GET", "/v1/nonsense", "")
		want(404, []string{"nothere"}, "GET", "/v1/volumes/nothere", "")
		want(404, nil, "GET", "/", "")
		want(405, nil, "PATCH", "/v1/volumes", "")
		want(405, nil, "DELETE", "/v1/volumes", "")
		want(404, []string{"nowhere"}, "POST", "/v1/volumes/w?action=attach", `{"hostId":"nowhere"}`)
		want(413, nil, "POST", "/v1/volumes", `{"name":"`+strings.Repeat("x", 2*mib)+`"}`)
		want(400, nil, "POST", "/v1/backingimages", `{"name":"r","sourceType":"download","parameters":{"url":5}}`)
		want(400, nil, "POST", "/v1/backingimages", `{"name":"r","sourceType":"magic"}`)
		want(403, nil, "POST", "/v1/backingimages", `{"name":"r","sourceType":"file","parameters":{"path":"/etc/passwd"}}`) // over TCP nobody names files of the node
		want(409, []string{"golden"}, "DELETE", "/v1/backingimages/golden", "")
		want(400, nil, "PUT", "/v1/settings/default-replica-count", `{"value":"many"}`)
	})
	code, got := b.rest("POST", "/v1/volumes", `{"name":"r","size":"16Mi","frontend":"","nonsense":{"a":[1,2]},"replicaAutoBalance":7,"numberOfReplicas":1}`)
	if code != 200 && code != 201 || got["name"] != "r" || got["frontend"] != "blockdev" { // what clients of the dialect expect
		b.Errorf("unknown fields: %d %v", code, got)
	}
	b.until(10*time.Second, "the volume is there", func() bool { return b.volume("r").State == "detached" })
	b.cli("volume", "delete", "r")
}

// badNBD: requests that no client should send. What is refused is refused with the right errno, and the connection and everybody else's go on.
func (b *bed) badNBD() {
	c := b.dial("v")
	whole := func() []byte {
		b.Helper()
		p := make([]byte, 32*mib)
		for off := 0; off < len(p); off += mib {
			if err := c.read(int64(off), p[off:off+mib]); err != nil {
				b.Fatal(err)
			}
		}
		return p
	}
	was := whole()
	buf := make([]byte, 8192)
	for what, try := range map[string]func() error{
		"read past the end":             func() error { return c.read(32*mib-4096, buf) },
		"read far outside":              func() error { return c.read(1<<62, buf) },
		"read at a negative offset":     func() error { return c.read(-4096, buf) },
		"write past the end":            func() error { return c.write(32*mib-4096, buf) },
		"write far outside":             func() error { return c.write(1<<62, buf) },
		"write around the end of int64": func() error { return c.write(-1, buf) },
		"trim past the end":             func() error { return c.do(nbdTrim, 32*mib-4096, nil, 8192) },
		"zero past the end":             func() error { return c.do(nbdZero, 32*mib-4096, nil, 8192) },
		"zero of 4 GiB":                 func() error { return c.do(nbdZero, 0, nil, 1<<32-1) },
		"an unknown command":            func() error { return c.do(77, 0, nil, 0) },
	} {
		err := try()
		if !errors.Is(err, errNBD) || !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOSPC) {
			b.Errorf("%s: %v, want EINVAL or ENOSPC", what, err)
		}
		if err := c.read(0, buf); err != nil {
			b.Fatalf("the connection after %s: %v", what, err)
		}
	}
	if !bytes.Equal(whole(), was) {
		b.Error("something was written")
	}
	// A request that is too large to answer: refused, or the connection ends; not the process.
	data := b.p.PID("data")
	big := b.dial("v")
	if err := big.do(nbdRead, 0, nil, 1<<31); err == nil {
		b.Error("a read of 2 GiB was answered")
	}
	// Garbage instead of a greeting, and instead of a request.
	for _, after := range []bool{false, true} {
		conn, err := net.Dial("unix", b.socket("v"))
		if err != nil {
			b.Fatal(err)
		}
		if after {
			g := b.dial("v")
			conn.Close()
			conn = g.conn
		}
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		conn.Write(bytes.Repeat([]byte("garbage!"), 4096))
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			b.Error("garbage does not end the connection")
		}
		conn.Close()
	}
	if _, err := dial(b.ctx, b.socket("v"), "w", 5*time.Second); !errors.Is(err, errNBD) {
		b.Errorf("another volume's name on this volume's socket: %v", err)
	}
	b.sameData(data)
	if err := c.read(0, buf); err != nil {
		b.Errorf("a good connection beside the bad ones: %v", err)
	}
}

// badProcesses: a second of everything, and places that cannot be used.
func (b *bed) badProcesses() {
	data, hold := b.p.PID("data"), b.p.PID("hold")
	other := b.path("other")
	run := func(code int, words []string, args ...string) {
		b.Helper()
		ctx, cancel := context.WithTimeout(b.ctx, 20*time.Second)
		defer cancel()
		out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok || exit.ExitCode() != code {
			b.Errorf("ashlar %q: %v, want exit code %d: %s", args, err, code, out)
		}
		for _, w := range words {
			if !bytes.Contains(out, []byte(w)) {
				b.Errorf("ashlar %q: does not say %q: %s", args, w, out)
			}
		}
	}
	b.unchanged(func() {
		run(exitConflict, []string{b.p.DataDir, "serve"}, "serve", "--data-dir", b.p.DataDir, "--run-dir", other+"/run", "--listen", "127.0.0.1:0", "--name", "node1")
		run(exitConflict, nil, "serve", "--data-dir", other+"/data", "--run-dir", b.p.RunDir, "--listen", "127.0.0.1:0", "--name", "node1")
		run(exitConflict, nil, "data", "--run-dir", b.p.RunDir)
		run(exitConflict, nil, "hold", "--run-dir", b.p.RunDir)
		run(exitFailed, []string{b.p.Listen}, "serve", "--data-dir", other+"/data2", "--run-dir", other+"/run2", "--listen", b.p.Listen, "--name", "node2")
		run(exitFailed, []string{"192.0.2.7:9500"}, "serve", "--data-dir", other+"/data2", "--run-dir", other+"/run2", "--listen", "192.0.2.7:9500", "--name", "node2") // of another machine
		for _, wrong := range [][]string{{"--listen", "nonsense"}, {"--listen", "127.0.0.1:99999"}, {"--listen", "127.0.0.1:0", "--tls-key", "/nowhere/key.pem"}, {"--nbd-listen", "0.0.0.0:0"},
			{"--log-level", "loud"}, {"--name", "a/b"}, {"--config", other + "/missing.toml"}} {
			run(exitRefused, []string{"bad configuration"}, append([]string{"serve", "--data-dir", other + "/data3", "--run-dir", other + "/run3"}, wrong...)...)
		}
		run(exitRefused, []string{"107 bytes"}, "serve", "--data-dir", other+"/data4", "--run-dir", filepath.Join(other, strings.Repeat("long", 40)), "--listen", "127.0.0.1:0")
	})
	if d, h := b.p.PID("data"), b.p.PID("hold"); d != data || h != hold {
		b.Errorf("data %d became %d, hold %d became %d", data, d, hold, h)
	}
	for _, u := range users(other) {
		b.Errorf("a process that was refused left one behind: %s", u)
	}
	if v := b.volume("v"); v.State != "attached" {
		b.Errorf("volume v: %+v", v)
	}
}

// TestRequireToken: asked for, a token is wanted on plain loopback too, and not on the socket.
func TestRequireToken(t *testing.T) {
	b := newBed(t)
	get := func(token string) int {
		t.Helper()
		req, err := http.NewRequestWithContext(b.ctx, http.MethodGet, "http://"+b.p.Listen+"/v1/volumes", nil)
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		return res.StatusCode
	}
	if got := get(""); got != http.StatusOK {
		t.Errorf("not asked for: %d", got)
	}
	if err := b.p.KillServe(); err != nil {
		t.Fatal(err)
	}
	b.p.Args = []string{"--require-token"}
	if err := b.p.StartServe(b.ctx); err != nil {
		t.Fatal(err)
	}
	if got := get(""); got != http.StatusUnauthorized {
		t.Errorf("without a token: %d", got)
	}
	if got := get(strings.TrimSpace(b.cli("token", "create", "mine"))); got != http.StatusOK {
		t.Errorf("with one: %d", got)
	}
}
