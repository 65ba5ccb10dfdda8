package agent_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"ashlar/internal/agent"
	"ashlar/internal/catalog"
	"ashlar/internal/control"
	"ashlar/internal/dataplane/client"
)

// TestOverTheWire: the same loop over real sockets and a real clock: the data process is asked over HTTP, and asks back for membership records. Nothing on the
// way from a record to an endpoint waits for a tick.
func TestOverTheWire(t *testing.T) {
	dir, err := os.MkdirTemp("", "ashlar")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	mem := catalog.NewMem()
	h := newHost(mem)
	h.ledger = client.NewLedgerClient(client.LedgerSocket(dir))
	s, err := h.ensure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ln, err := client.Listen(filepath.Join(dir, "data.sock"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer h.kill()
	defer cancel()
	a, err := agent.New(agent.Config{
		Node: node, Catalog: mem, RunDir: dir, Disks: map[string]catalog.DiskWanted{"default": {Path: "/disks/default", AllowScheduling: true}},
		EnsureData: func(context.Context) (client.Service, error) { return client.New(filepath.Join(dir, "data.sock")), nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	wg.Go(func() { _ = client.Serve(ctx, ln, client.Handler(s), 0) })
	wg.Go(func() {
		if err := a.Run(ctx); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	wg.Go(func() { _ = control.New(control.Config{Catalog: mem}).Run(ctx) })

	// A tick anywhere would show in every volume after the first; that the machine stalled does not show in all of them.
	least := time.Hour
	for i, name := range []string{"first", "second", "third", "fourth", "fifth"} {
		if i > 0 && least < time.Second {
			break
		}
		start := time.Now()
		w := catalog.VolumeWanted{
			Name: name, ID: name, SizeBytes: 1 << 24, Copies: 1, Frontend: catalog.FrontendNBD, Tickets: []catalog.Ticket{{Node: node, Kind: catalog.TicketAPI}},
		}
		if _, err := catalog.Write(ctx, mem, catalog.VolumeKey(catalog.Wanted, name), w, 0); err != nil {
			t.Fatal(err)
		}
		await(t, mem, catalog.VolumeKey(catalog.Observed, name), func(o catalog.VolumeObserved) bool { return o.Endpoint != "" })
		t.Logf("%s volume: endpoint %v after the record", name, time.Since(start))
		if i > 0 {
			least = min(least, time.Since(start))
		}
		await(t, mem, catalog.VolumeKey(catalog.Observed, name), func(o catalog.VolumeObserved) bool { return o.State == catalog.VolumeAttached })
	}
	if least >= time.Second {
		t.Errorf("endpoint %v after the record", least)
	}
}

// await returns when a record is as wanted; a test that waits longer than a minute has failed.
func await[T any](t *testing.T, c catalog.Catalog, k catalog.Key, ok func(T) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	seen := errors.New("seen")
	err := catalog.Follow(ctx, c, func(b catalog.Batch) error {
		for _, ev := range b.Events {
			if ev.Key != k || ev.Value == nil {
				continue
			}
			it, err := catalog.Decode[T](ev.Entry)
			if err != nil {
				return err
			}
			if ok(it.Value) {
				return seen
			}
		}
		return nil
	})
	if !errors.Is(err, seen) {
		t.Fatalf("waiting for %s: %v", k, err)
	}
}
