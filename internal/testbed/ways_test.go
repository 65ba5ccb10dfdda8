//go:build integration

package testbed_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ashlar/internal/testbed"
)

// send uploads a file as an image's bytes and returns the status.
func (b *bed) send(image, file string, size int64) (int, string) {
	b.Helper()
	f, err := os.Open(file)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	req, err := http.NewRequestWithContext(b.ctx, http.MethodPost, fmt.Sprintf("http://%s/v1/backingimages/%s?action=upload&size=%d", b.p.Listen, image, size), f)
	if err != nil {
		b.Fatal(err)
	}
	req.ContentLength = size
	req.Header.Set("Content-Type", "application/octet-stream")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		b.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		b.Fatal(err)
	}
	return res.StatusCode, string(text)
}

// fetch downloads a path into a file.
func (b *bed) fetch(path, file string) {
	b.Helper()
	res, err := http.Get("http://" + b.p.Listen + path)
	if err != nil {
		b.Fatal(err)
	}
	defer res.Body.Close()
	var text bytes.Buffer
	if res.StatusCode != http.StatusOK {
		_, _ = io.Copy(&text, res.Body)
		b.Fatalf("GET %s: %d %s", path, res.StatusCode, text.String())
	}
	f, err := os.Create(file)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := io.Copy(f, res.Body); err != nil {
		b.Error(err)
	}
	if err := f.Close(); err != nil {
		b.Fatal(err)
	}
}

// awaitImage waits until an image is in a state.
func (b *bed) awaitImage(name, state string) (v imageView) {
	b.Helper()
	b.until(30*time.Second, "image "+name+" "+state, func() bool {
		v = imageView{}
		b.json(&v, "image", "show", name)
		for _, d := range v.DiskFileStatusMap {
			return d.State == state
		}
		return false
	})
	return v
}

func (b *bed) create(body string) {
	b.Helper()
	if status, out := b.rest(http.MethodPost, "/v1/backingimages", body); status >= 300 {
		b.Fatalf("%s: %d %v", body, status, out)
	}
}

// onlySnapshots wants a volume to have exactly the snapshots named that are not removed.
func (b *bed) onlySnapshots(volume string, names ...string) {
	b.Helper()
	left := 0
	for name, s := range b.snapshots(volume) {
		if s.MarkRemoved {
			continue
		}
		left++
		found := false
		for _, n := range names {
			found = found || n == name
		}
		if !found {
			b.Errorf("volume %s has snapshot %+v", volume, s)
		}
	}
	if left != len(names) {
		b.Errorf("volume %s has %d snapshots, want %v", volume, left, names)
	}
}

// TestWaysIn takes content into images by upload and from volumes, attached and detached, and compares it each time; of the ways nothing is left.
func TestWaysIn(t *testing.T) {
	b := newBed(t)
	golden := b.raw("golden.raw", 32*mib, 7)
	b.create(`{"name":"up","sourceType":"upload"}`)
	b.awaitImage("up", "pending")
	if status, text := b.send("up", golden, 32*mib); status != http.StatusOK {
		t.Fatalf("upload: %d %s", status, text)
	}
	b.awaitImage("up", "ready")
	if status, text := b.send("up", golden, 32*mib); status != http.StatusConflict {
		t.Errorf("a second upload: %d %s", status, text)
	}
	b.cli("volume", "create", "v", "--image", "up")
	b.attach("v")
	b.same("v", golden)
	b.cli("snapshot", "create", "v", "s1")
	b.qemuIO("v", "write -P 9 1M 1M", "flush")

	// An image of a snapshot while the volume is attached, and of the present of a detached one.
	b.create(`{"name":"of-s1","sourceType":"export-from-volume","parameters":{"volume-name":"v","export-type":"raw","snapshot-name":"s1"}}`)
	b.awaitImage("of-s1", "ready")
	b.cli("volume", "create", "w", "--image", "of-s1")
	b.attach("w")
	b.same("w", golden)
	b.cli("volume", "detach", "v")
	b.create(`{"name":"of-v","sourceType":"export-from-volume","parameters":{"volume-name":"v","export-type":"raw"}}`)
	b.awaitImage("of-v", "ready")
	b.until(10*time.Second, "volume v detached", func() bool { return b.volume("v").State == "detached" })
	b.cli("volume", "create", "x", "--image", "of-v")
	b.attach("x", "v")
	b.qemuIO("x", "read -P 9 1M 1M")
	b.onlySnapshots("v", "s1")

	b.clean("v", "w", "x")
}

// TestWaysInOverTLS takes a volume in from an NBD server that wants TLS and a certificate, which is this node itself; what is missing or wrong is said, and nothing comes of it.
func TestWaysInOverTLS(t *testing.T) {
	b := newBed(t)
	if err := b.p.KillServe(); err != nil {
		t.Fatal(err)
	}
	ca := newSigner(t, b.dir, "ca")
	ca.issue("server")
	ca.issue("client")
	certs := b.path("tls")
	if err := os.Mkdir(certs, 0o700); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{"ca.crt": "ca-cert.pem", "client.crt": "client-cert.pem", "client.key": "client-key.pem"} {
		if err := os.Link(b.path(from), filepath.Join(certs, to)); err != nil {
			t.Fatal(err)
		}
	}
	ports, err := testbed.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	b.p.Args = []string{"--nbd-listen", fmt.Sprintf("127.0.0.1:%d", ports), "--nbd-certificate", b.path("server.crt"), "--nbd-key", b.path("server.key"), "--nbd-client-ca", b.path("ca.crt")}
	if err := b.p.StartServe(b.ctx); err != nil {
		t.Fatal(err)
	}
	b.cli("volume", "create", "v", "--size", "32Mi")
	b.attach("v")
	b.qemuIO("v", "write -P 9 1M 1M", "flush")
	uri := fmt.Sprintf("nbds://127.0.0.1:%d/v", ports)
	b.cli("volume", "create", "w", "--from", uri+"?tls-certificates="+certs)
	b.attach("w")
	b.qemuIO("w", "read -P 9 1M 1M", "read -P 0 2M 1M")
	for wrong, says := range map[string]string{
		"": "TLS", "?tls-certificates=" + b.path("none"): "no such file", "?tls-certificates=" + certs + "/../..": "absolute", "?tls-psk-file=/x": "tls-certificates=DIR",
	} {
		b.refused(exitRefused, []string{says}, "image", "import", "x", uri+wrong)
		_, _ = b.p.Text(b.ctx, "image", "delete", "x")
	}
	b.clean("v", "w")
}

// export has the node write a file, over its own socket because that names a path, and waits for the operation's end. Each of middle
// happens once the export has written something more.
func (b *bed) export(volume, body string, middle ...func()) (state, reason string) {
	b.Helper()
	local := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", b.p.RunDir+"/api.sock")
	}}}
	defer local.CloseIdleConnections()
	var op struct {
		ID, State, Reason, Message string
		Progress                   int
	}
	read := func(res *http.Response, err error) bool {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
		defer res.Body.Close()
		if err := json.NewDecoder(res.Body).Decode(&op); err != nil || res.StatusCode >= 300 {
			b.Fatalf("export of %s: %d %+v %v", volume, res.StatusCode, op, err)
		}
		return op.State == "done" || op.State == "failed"
	}
	read(local.Post("http://node/v1/volumes/"+volume+"?action=exportFile", "application/json", strings.NewReader(body)))
	seen := 0
	b.until(time.Minute, "export of "+volume, func() bool {
		over := read(local.Get("http://node/v1/operations/" + op.ID))
		if len(middle) > 0 && op.Progress > seen && !over {
			seen = op.Progress
			middle[0]()
			middle = middle[1:]
		}
		return over
	})
	if len(middle) > 0 {
		b.Errorf("the export of %s was over before anything happened in its middle", volume)
	}
	b.Logf("export of %s: %+v", volume, op)
	return op.State, op.Reason
}

// TestWaysOut takes content out of volumes, snapshots and images by every way of one node, from attached and detached volumes, and compares it each time; of the ways
// nothing is left.
func TestWaysOut(t *testing.T) {
	b := newBed(t)
	golden := b.raw("golden.raw", 32*mib, 7)
	b.cli("image", "import", "up", golden)
	b.cli("volume", "create", "v", "--image", "up")
	b.attach("v")
	b.cli("snapshot", "create", "v", "s1")
	b.qemuIO("v", "write -P 9 1M 1M", "flush")
	// Downloads of a snapshot, the present and an image.
	b.fetch("/v1/volumes/v/download?snapshot=s1", b.path("s1.raw"))
	b.tool("cmp", golden, b.path("s1.raw"))
	b.fetch("/v1/volumes/v/download?format=qcow2", b.path("v.qcow2"))
	b.tool("qemu-img", "check", b.path("v.qcow2"))
	b.tool("qemu-img", "convert", "-O", "raw", b.path("v.qcow2"), b.path("v.raw"))
	b.same("v", b.path("v.raw"))
	b.fetch("/v1/backingimages/up/download?format=raw", b.path("up.raw"))
	b.tool("cmp", golden, b.path("up.raw"))
	b.until(10*time.Second, "temporary snapshots removed", func() bool {
		for name, s := range b.snapshots("v") {
			if name != "s1" && !s.MarkRemoved {
				return false
			}
		}
		return true
	})

	for _, from := range []string{"attached", "detached"} {
		raw, qcow2 := b.path(from+".raw"), b.path(from+".qcow2")
		if state, reason := b.export("v", fmt.Sprintf(`{"path":%q,"format":"raw","snapshot":"s1"}`, raw)); state != "done" {
			t.Errorf("export of a snapshot, %s: %s %s", from, state, reason)
		}
		b.tool("cmp", golden, raw)
		if state, reason := b.export("v", fmt.Sprintf(`{"path":%q,"format":"qcow2","compress":"zstd"}`, qcow2)); state != "done" {
			t.Errorf("export of the present, %s: %s %s", from, state, reason)
		}
		b.tool("qemu-img", "check", qcow2)
		b.tool("qemu-img", "compare", qcow2, b.path("v.raw"))
		if state, reason := b.export("v", fmt.Sprintf(`{"path":%q,"format":"raw"}`, raw)); state != "failed" || reason != "exists" {
			t.Errorf("export onto a file that is there: %s %s", state, reason)
		}
		if from == "attached" {
			b.cli("volume", "detach", "v")
		}
	}
	b.until(10*time.Second, "volume v detached", func() bool { return b.volume("v").State == "detached" })
	b.attach("v")
	b.onlySnapshots("v", "s1")
	b.clean("v")
}

// TestExportInterrupted ends serve, and then the data process, in the middle of an export: it goes on, or begins anew, and the file is whole.
func TestExportInterrupted(t *testing.T) {
	b := newBed(t)
	golden := b.raw("golden.raw", 64*mib, 7)
	b.cli("image", "import", "up", golden)
	b.cli("volume", "create", "v", "--image", "up")
	b.attach("v")
	if status, out := b.rest(http.MethodPut, "/v1/settings/background-bandwidth-mib", `{"value":"16"}`); status >= 300 {
		t.Fatalf("setting: %d %v", status, out)
	}
	serve := func() {
		if err := b.p.KillServe(); err != nil {
			t.Fatal(err)
		}
		b.restartServe("v")
	}
	for name, middle := range map[string]func(){"serve": serve, "data": func() { b.kill("data") }} {
		file := b.path(name + ".raw")
		if state, reason := b.export("v", fmt.Sprintf(`{"path":%q,"format":"raw"}`, file), middle); state != "done" {
			t.Errorf("%s ended in the middle of an export: %s %s", name, state, reason)
			continue
		}
		b.tool("cmp", golden, file)
		if _, err := os.Stat(file + ".partial"); err == nil {
			t.Error("a half file is left")
		}
	}
	b.onlySnapshots("v")
	b.clean("v")
}
