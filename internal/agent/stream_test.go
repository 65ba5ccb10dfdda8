package agent_test

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"ashlar/internal/agent"
	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
)

// onSockets is a world on a real clock, whose streams go over real sockets.
func onSockets(t *testing.T) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "ashlar")
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	w.dir = dir
	w.start()
	t.Cleanup(func() {
		w.host.mu.Lock()
		p := w.host.proc
		w.host.mu.Unlock()
		w.end()
		p.wg.Wait()
		os.RemoveAll(dir)
	})
	return w
}

// upload makes an image that waits for its bytes.
func (w *world) createUpload(name string) catalog.ImageWanted {
	w.t.Helper()
	i := catalog.ImageWanted{Name: name, ID: w.id(), SourceType: catalog.SourceUpload, MinCopies: 1, Created: time.Now().UTC()}
	w.put(catalog.ImageKey(catalog.Wanted, name), i)
	w.awaitImage(name, catalog.ImagePending)
	return i
}

func (w *world) awaitImage(name, state string) catalog.ImageOnDisk {
	w.t.Helper()
	var got catalog.ImageOnDisk
	await(w.t, w.mem, catalog.ImageKey(catalog.Observed, name), func(o catalog.ImageObserved) bool {
		for _, d := range o.Disks {
			got = d
		}
		return got.State == state
	})
	return got
}

func (w *world) sockets() int {
	entries, err := os.ReadDir(w.dir + "/stream")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		w.t.Fatal(err)
	}
	return len(entries)
}

// TestUpload: bytes that a client brings become an image, once.
func TestUpload(t *testing.T) {
	w := onSockets(t)
	ctx := t.Context()
	content := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
	for _, size := range []int64{int64(len(content)), -1} {
		name := fmt.Sprint("good", size)
		w.createUpload(name)
		if err := w.agent.Upload(ctx, name, size, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		w.awaitImage(name, catalog.ImageReady)
		sum := sha512.Sum512(content)
		if got := w.image(name); got.CurrentChecksum != hex.EncodeToString(sum[:]) || got.SizeBytes != int64(len(content)) {
			t.Errorf("image %+v", got)
		}
		if err := w.agent.Upload(ctx, name, size, bytes.NewReader(content)); !errors.Is(err, agent.ErrUploadOnce) || !errors.Is(err, client.ErrExists) {
			t.Errorf("a second upload: %v", err)
		}
	}
	w.createImage("down", "ok")
	for name, want := range map[string]error{"nobody": catalog.ErrNotFound, "down": agent.ErrNotUpload} {
		if err := w.agent.Upload(ctx, name, 1, strings.NewReader("x")); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	w.put(catalog.ImageKey(catalog.Wanted, "early"), catalog.ImageWanted{Name: "early", ID: w.id(), SourceType: catalog.SourceUpload})
	if err := w.agent.Upload(ctx, "early", 1, strings.NewReader("x")); err != nil && !errors.Is(err, agent.ErrUploadEarly) {
		t.Errorf("before it waits: %v", err)
	}
	if n := w.sockets(); n != 0 {
		t.Errorf("%d sockets are left", n)
	}
}

// TestUploadFails: too few bytes, too many, a client that goes away, an import that refuses: the image is failed for good, with the reason, and takes no other upload.
func TestUploadFails(t *testing.T) {
	w := onSockets(t)
	broken := errors.New("connection reset")
	for name, c := range map[string]struct {
		size int64
		r    io.Reader
		want error
		says string
	}{
		"short":   {100, strings.NewReader("x"), agent.ErrUploadBroken, "1 of 100 bytes came"},
		"long":    {1, strings.NewReader("xyz"), agent.ErrUploadBroken, "more than the 1 bytes"},
		"gone":    {100, io.MultiReader(strings.NewReader("x"), errReader{broken}), broken, "connection reset"},
		"refused": {-1, strings.NewReader(strings.Repeat("x", 8<<20)), client.ErrFormat, "backing file"},
	} {
		w.createUpload(name)
		w.host.mu.Lock()
		w.host.refuse = name == "refused"
		w.host.mu.Unlock()
		err := w.agent.Upload(t.Context(), name, c.size, c.r)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if d := w.awaitImage(name, catalog.ImageFailed); !strings.Contains(d.Message, c.says) || !d.NextTry.IsZero() || !strings.Contains(d.Message, "not tried again") {
			t.Errorf("%s: %+v", name, d)
		}
		if err := w.agent.Upload(t.Context(), name, 1, strings.NewReader("x")); !errors.Is(err, agent.ErrUploadOnce) {
			t.Errorf("%s, uploaded again: %v", name, err)
		}
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

// TestUploadInTheMiddle: two clients at once; serve, and the data process, end in the middle.
func TestUploadInTheMiddle(t *testing.T) {
	for name, stop := range map[string]func(w *world, cancel func()){
		"serve stops":           func(w *world, cancel func()) { cancel(); w.stop(); w.start() },
		"the data process ends": func(w *world, cancel func()) { w.host.kill(); cancel() },
	} {
		t.Run(name, func(t *testing.T) {
			w := onSockets(t)
			w.createUpload("i")
			r, in := io.Pipe()
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			defer wg.Wait()
			defer cancel()
			was := w.agent
			wg.Go(func() {
				if err := was.Upload(ctx, "i", 1<<20, r); err == nil {
					t.Error("half an upload succeeded")
				}
			})
			if _, err := in.Write([]byte("half")); err != nil {
				t.Fatal(err)
			}
			w.awaitImage("i", catalog.ImageInProgress)
			if err := was.Upload(ctx, "i", 1, strings.NewReader("x")); !errors.Is(err, agent.ErrUploadBusy) {
				t.Errorf("at the same time: %v", err)
			}
			stop(w, func() { in.CloseWithError(errors.New("gone")) })
			d := w.awaitImage("i", catalog.ImageFailed)
			if !d.NextTry.IsZero() || !strings.Contains(d.Message, "upload") {
				t.Errorf("%+v", d)
			}
		})
	}
}

// TestDownload: what a client reads is whole or ends with an error, and nothing is left of it.
func TestDownload(t *testing.T) {
	w := onSockets(t)
	ctx := t.Context()
	w.createImage("img", "ok")
	w.awaitImage("img", catalog.ImageReady)
	for _, v := range []string{"det", "att"} {
		w.createVolume(v, "")
	}
	w.attach("att", catalog.Ticket{})
	state := func(name, want string) {
		t.Helper()
		await(t, w.mem, catalog.VolumeKey(catalog.Observed, name), func(o catalog.VolumeObserved) bool { return o.State == want })
	}
	state("att", catalog.VolumeAttached)
	state("det", catalog.VolumeDetached)
	nothing := func(name string) { // the loop tidies up in its own time
		t.Helper()
		await(t, w.mem, catalog.VolumeKey(catalog.Observed, name), func(catalog.VolumeObserved) bool {
			snapshots, sources := w.temporaries(name)
			return len(snapshots) == 0 && sources == 0
		})
		if n := w.sockets(); n != 0 {
			t.Errorf("%d sockets are left", n)
		}
	}
	for _, c := range []struct{ kind, name, format string }{{"volume", "att", "raw"}, {"volume", "det", "qcow2"}, {"image", "img", "raw"}} {
		body, size, err := w.agent.Download(ctx, c.kind, c.name, "", c.format)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(body)
		if err != nil || len(got) != 1<<20 || got[0] != 'a' || got[len(got)-1] != 'p' || (c.format == "raw") != (size > 0) {
			t.Errorf("%+v: %d bytes of %d, %v", c, len(got), size, err)
		}
		if err := errors.Join(body.Close(), body.Close()); err != nil {
			t.Error(err)
		}
		nothing("att")
	}
	state("det", catalog.VolumeDetached)
	nothing("det")

	body, _, err := w.agent.Download(ctx, "volume", "att", "", "raw") // the reader goes away
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(body, make([]byte, 10)); err != nil {
		t.Error(err)
	}
	if err := body.Close(); err != nil {
		t.Error(err)
	}
	nothing("att")
	w.host.mu.Lock()
	w.host.cut = 3 // the work process ends in the middle
	w.host.mu.Unlock()
	body, _, err = w.agent.Download(ctx, "volume", "att", "", "raw")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, body); err == nil || n >= 1<<20 {
		t.Errorf("%d bytes, and no error", n)
	}
	body.Close()
	nothing("att")
	for _, c := range []struct {
		kind, name, snapshot, format string
		want                         error
	}{
		{"volume", "nobody", "", "raw", catalog.ErrNotFound}, {"image", "nobody", "", "raw", catalog.ErrNotFound}, {"volume", "att", "none", "raw", client.ErrNotFound},
		{"volume", "att", "", "vmdk", agent.ErrDownload}, {"pod", "att", "", "raw", agent.ErrDownload},
	} {
		if _, _, err := w.agent.Download(ctx, c.kind, c.name, c.snapshot, c.format); !errors.Is(err, c.want) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	nothing("att")
}

// TestDiff: differences are passed through as they come.
func TestDiff(t *testing.T) {
	run(t, func(w *world) {
		w.attached("a")
		var got []string
		next, size, err := w.agent.Diff(t.Context(), struct {
			Volume, From, To string
			Off              int64
		}{"a", "s1", "", 4096}, func(off, n int64, zero bool) { got = append(got, fmt.Sprint(off, n, zero)) })
		w.want("ranges", err == nil && next == 16384 && size == 1<<24 && strings.Join(got, ",") == "4096 4096 false,8192 4096 true", got, next, size, err)
		w.detach("a")
		w.settle(0)
		_, _, err = w.agent.Diff(t.Context(), struct {
			Volume, From, To string
			Off              int64
		}{Volume: "a"}, nil)
		w.want("not attached", errors.Is(err, client.ErrNotFound), err)
	})
}
