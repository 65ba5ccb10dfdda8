//go:build integration

package testbed_test

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"testing"
	"time"
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
