package client

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ashlar/internal/api"
	"ashlar/internal/catalog"
	"ashlar/internal/catalog/catalogtest"
)

// node serves the API over a unix socket in a fresh run directory, with a stand-in for control and agent behind it.
func node(t *testing.T) (runDir string) {
	runDir = t.TempDir()
	mem := catalog.NewMem()
	standIn := &catalogtest.StandIn{Catalog: mem, Node: "n1", RunDir: runDir}
	ctx, cancel := context.WithCancel(context.Background())
	l, err := net.Listen("unix", Socket(runDir))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: api.New(api.Config{Catalog: mem, Node: "n1", Version: "v1", OperationTimeout: 5 * time.Second})}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(l) })
	wg.Go(func() { _ = standIn.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		srv.Close()
		wg.Wait()
		mem.Close()
	})
	return runDir
}

func connect(t *testing.T, address string) (*Client, context.Context) {
	c, err := New(address)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	t.Cleanup(func() { c.Close() })
	return c, ctx
}

func state(want string) func(api.Volume) (bool, error) {
	return func(v api.Volume) (bool, error) { return v.State == want, nil }
}

// TestStory says everything once, in the order in which a person would.
func TestStory(t *testing.T) {
	c, ctx := connect(t, Address(node(t)))
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ok(until(ctx, func() (bool, error) { return c.Ready(ctx) == nil, nil }))
	about, err := c.About(ctx)
	ok(err)
	if about.Node != "n1" || about.Version != "v1" {
		t.Errorf("about: %+v", about)
	}
	nodes, err := c.Nodes(ctx)
	ok(err)
	if len(nodes) != 1 || nodes[0].Disks["disk1"].StorageMaximum == 0 {
		t.Errorf("nodes: %+v", nodes)
	}
	_, err = c.ImportImage(ctx, NewImage{Name: "debian", Path: "/srv/debian.qcow2", Copies: 1})
	ok(err)
	img, err := c.WaitImage(ctx, "debian", func(i api.BackingImage) (bool, error) { return i.VirtualSize > 0, nil })
	ok(err)
	_, err = c.CreateVolume(ctx, NewVolume{Name: "db1", Image: img.Name, Copies: 1})
	ok(err)
	_, err = c.WaitVolume(ctx, "db1", state("detached"))
	ok(err)
	_, err = c.Attach(ctx, "db1", Attachment{Node: "n1", DisableFrontend: true})
	ok(err)
	_, err = c.WaitVolume(ctx, "db1", state("attached"))
	ok(err)
	s, err := c.CreateSnapshot(ctx, "db1", NewSnapshot{Name: "before", Labels: map[string]string{"a": "b"}})
	ok(err)
	if s.Labels["a"] != "b" || !s.Children["volume-head"] {
		t.Errorf("snapshot: %+v", s)
	}
	ok(c.Revert(ctx, "db1", "before"))
	ok(c.DeleteSnapshot(ctx, "db1", "before"))
	_, err = c.Purge(ctx, "db1")
	ok(err)
	v, err := c.WaitVolume(ctx, "db1", func(v api.Volume) (bool, error) { return len(v.PurgeStatus) == 1 && !v.PurgeStatus[0].IsPurging, nil })
	ok(err)
	if v.PurgeStatus[0].State != "complete" {
		t.Errorf("purge: %+v", v.PurgeStatus)
	}
	list, err := c.Snapshots(ctx, "db1")
	ok(err)
	records, err := c.SnapshotRecords(ctx, "db1")
	ok(err)
	if len(list) != 2 || len(records) != 1 || !records[0].MarkRemoved {
		t.Errorf("snapshots: %+v, %+v", list, records)
	}
	_, err = c.SnapshotRecord(ctx, "db1", "before")
	ok(err)
	report, err := c.Check(ctx, "db1")
	ok(err)
	if len(report.Problems) != 0 {
		t.Errorf("check: %+v", report)
	}
	if v, err = c.Expand(ctx, "db1", "1Gi"); err != nil || v.Size != "1073741824" {
		t.Errorf("expand: %+v, %v", v, err)
	}
	_, err = c.Detach(ctx, "db1", Detachment{})
	ok(err)
	_, err = c.WaitVolume(ctx, "db1", state("detached"))
	ok(err)
	if err := c.DeleteImage(ctx, "debian"); api.CodeOf(err) != api.CodeInUse {
		t.Errorf("delete an image in use: %v", err)
	}
	ok(c.DeleteVolume(ctx, "db1"))
	ok(c.WaitVolumeGone(ctx, "db1"))
	ok(c.DeleteImage(ctx, "debian"))
	ok(c.WaitImageGone(ctx, "debian"))
	volumes, err := c.Volumes(ctx)
	ok(err)
	images, err := c.Images(ctx)
	ok(err)
	events, err := c.Events(ctx)
	ok(err)
	if len(volumes)+len(images)+len(events) != 0 {
		t.Errorf("left over: %v %v %v", volumes, images, events)
	}
}

// TestErrors wants errors back as values.
func TestErrors(t *testing.T) {
	runDir := node(t)
	c, ctx := connect(t, Address(runDir))
	var e *api.Error
	if _, err := c.Volume(ctx, "a/../b"); !errors.As(err, &e) || e.Code != api.CodeNotFound || e.Status != 404 || !strings.Contains(e.Message, `"a/../b"`) {
		t.Errorf("not found: %v", err)
	}
	if _, err := c.Salvage(ctx, "nothing"); api.CodeOf(err) != api.CodeNotFound {
		t.Errorf("salvage: %v", err)
	}
	if err := c.Shutdown(ctx, "n1", ShutdownOptions{}); api.CodeOf(err) != api.CodeNotBuilt {
		t.Errorf("shutdown: %v", err)
	}
	if _, err := c.SetSetting(ctx, "v2-data-engine", "true"); api.CodeOf(err) != api.CodeNotSupported {
		t.Errorf("setting: %v", err)
	}
	if s, err := c.Settings(ctx); err != nil || len(s) == 0 {
		t.Errorf("settings: %v", err)
	}
	if _, err := c.Node(ctx, "n1"); err != nil {
		t.Errorf("node: %v", err)
	}
	nobody, ctx := connect(t, "unix://"+filepath.Join(runDir, "nobody.sock"))
	if _, err := nobody.Volumes(ctx); !errors.As(err, &e) || e.Code != api.CodeUnreachable || e.Status != 0 || !strings.Contains(e.Message, "nobody.sock") {
		t.Errorf("unreachable: %v", err)
	}
	over, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := c.WaitVolume(over, "x", state("never")); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	for _, bad := range []string{"", "ftp://x", "unix://", "http://", "127.0.0.1:9500", ":"} {
		if _, err := New(bad); api.CodeOf(err) != api.CodeInvalid {
			t.Errorf("New(%q): %v", bad, err)
		}
	}
	if got := Address(filepath.Join(runDir, "none")); got != "http://"+DefaultListen {
		t.Errorf("address without a socket: %s", got)
	}
}

// TestForeignAnswers meets servers that are not ours.
func TestForeignAnswers(t *testing.T) {
	for body, status := range map[string]int{"<html>": 200, "": 500, "nope": 404} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			_, _ = w.Write([]byte(body))
		}))
		c, ctx := connect(t, srv.URL)
		if _, err := c.Volumes(ctx); api.CodeOf(err) != api.CodeInternal {
			t.Errorf("%d %q: %v", status, body, err)
		}
		srv.Close()
	}
}

// TestNodeTimeRefused wants the reason when a node cannot be asked for the time: the question's own answer has no body.
func TestNodeTimeRefused(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = w.Write([]byte(`{"type":"error","reason":"unreachable","message":"its certificate is not good yet"}`))
	}))
	defer srv.Close()
	c, ctx := connect(t, srv.URL)
	if _, err := c.NodeTime(ctx, "n2"); api.CodeOf(err) != api.CodeUnreachable {
		t.Errorf("without its reason: %v", err)
	} else {
		t.Log(err)
	}
}
