package etcd_test

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/catalog/etcd"
	"ashlar/internal/control"
)

var _ control.Leader = (*etcd.Store)(nil)

// guest opens a store that asks a cluster's members and is none.
func (c *cluster) guest(name string) *etcd.Store {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	o := etcd.Options{Sync: true, Files: c.ca.issue(c.t, name, time.Hour), Log: slog.New(slog.NewTextHandler(c.t.Output(), nil)).With("node", name)}
	for _, n := range c.nodes {
		o.Endpoints = append(o.Endpoints, n.member.ClientURL)
	}
	s, err := etcd.Open(ctx, o)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = s.Close() })
	return s
}

// TestHolderDies: the record of a holder that says nothing any more is gone after its ttl, not before, and one that lives keeps its record.
func TestHolderDies(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.open(c.nodes[0])
	s, dead := c.nodes[0].store, c.guest("dead")
	all, cancelAll := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancelAll()
	hold := func(s *etcd.Store, name string) <-chan error {
		held, done := make(chan struct{}), make(chan error, 1)
		wg.Go(func() {
			done <- s.Hold(all, catalog.Holding{Key: catalog.AliveKey(name), Value: []byte(`1`), TTL: 2 * time.Second}, func(catalog.Rev) { close(held) })
		})
		<-held
		return done
	}
	hold(s, "lives")
	done := hold(dead, "dead")
	_, at, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := dead.Close(); err != nil { // it does not say goodbye
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, catalog.ErrUnreachable) {
		t.Fatal(err)
	}
	gone := errors.New("gone")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err = s.Watch(ctx, at, func(ev catalog.Event) error {
		if ev.Key == catalog.AliveKey("dead") && ev.Value == nil {
			return gone
		}
		t.Errorf("%s changed", ev.Key)
		return nil
	})
	if d := time.Since(begin); !errors.Is(err, gone) || d < time.Second || d > 20*time.Second { // an hour, if nobody looked at the ttl; a machine may stall for some seconds
		t.Fatalf("%v after %v", err, d)
	}
}

// TestLead: one leads at a time; one that resigns is followed by another; what fn returns counts.
func TestLead(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	c.open(c.nodes[0])
	mine := errors.New("mine")
	if err := c.nodes[0].store.Lead(t.Context(), func(context.Context) error { return mine }); !errors.Is(err, mine) {
		t.Fatalf("lead returned %v, fn its own error", err)
	}
	type leads struct {
		name string
		ctx  context.Context
		end  chan struct{}
	}
	turns := make(chan leads, 10)
	var mu sync.Mutex
	leading := 0
	var wg sync.WaitGroup
	defer wg.Wait()
	all, cancelAll := context.WithCancel(t.Context())
	defer cancelAll()
	stores := map[string]*etcd.Store{"a": c.guest("a"), "b": c.guest("b"), "c": c.guest("c")}
	for name, s := range stores { // all at once: nobody leads yet
		wg.Go(func() {
			err := s.Lead(all, func(ctx context.Context) error {
				mu.Lock()
				if leading++; leading > 1 {
					t.Errorf("%d lead", leading)
				}
				mu.Unlock()
				l := leads{name, ctx, make(chan struct{})}
				turns <- l
				select {
				case <-ctx.Done():
				case <-l.end:
				}
				mu.Lock()
				leading--
				mu.Unlock()
				return ctx.Err()
			})
			if !errors.Is(err, context.Canceled) && !errors.Is(err, catalog.ErrUnreachable) && err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	next := func(within time.Duration) leads {
		t.Helper()
		select {
		case l := <-turns:
			return l
		case <-time.After(within):
			t.Fatalf("nobody leads after %v", within)
			return leads{}
		}
	}
	first := next(time.Minute)
	close(first.end) // resigns
	begin := time.Now()
	second := next(time.Minute)
	t.Logf("%s after %s, which resigned: %v", second.name, first.name, time.Since(begin).Round(time.Millisecond))
	if second.name == first.name {
		t.Fatal("it leads again")
	}
	cancelAll()
	<-second.ctx.Done()
}
