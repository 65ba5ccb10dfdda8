//go:build integration

package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/catalog/etcd"
)

// TestFigures measures three members in processes of their own: how soon they are there, what a put takes, how soon another node sees it, what a process weighs.
func TestFigures(t *testing.T) {
	c := newCluster(t, 3)
	begin := time.Now()
	ps := c.grown(nowhere)
	t.Logf("three members grown from nothing after %v", time.Since(begin).Round(time.Millisecond))
	for _, p := range ps {
		p.kill()
	}
	begin = time.Now()
	for i, n := range c.nodes {
		ps[i] = c.spawn(n, "")
	}
	for _, p := range ps {
		c.ready(p)
	}
	t.Logf("three members back after %v", time.Since(begin).Round(time.Millisecond))
	a, b := c.guest("a"), c.guest("b")
	put, seen := watchLatency(t, a, b, 300)
	t.Logf("put p50 %v p99 %v; seen through another member p50 %v p99 %v", put[150], put[297], seen[150], seen[297])
	for i, p := range ps {
		t.Logf("n%d: %d MiB resident", i+1, resident(t, p.cmd.Process.Pid)>>10)
	}
	if seen[150] > 500*time.Millisecond { // a slow disk takes tens of milliseconds; a tick anywhere would show
		t.Errorf("a change is seen after %v", seen[150])
	}
}

// watchLatency puts n times through a and watches through b.
func watchLatency(t *testing.T, a, b *etcd.Store, n int) (put, seen []time.Duration) {
	t.Helper()
	_, at, err := b.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	began := make(chan time.Time, 1)
	next := make(chan struct{}, 1)
	enough := errors.New("enough")
	var wg sync.WaitGroup
	wg.Go(func() {
		err := b.Watch(ctx, at, func(catalog.Event) error {
			if seen = append(seen, time.Since(<-began)); len(seen) == n {
				next <- struct{}{}
				return enough
			}
			next <- struct{}{}
			return nil
		})
		if !errors.Is(err, enough) {
			t.Error(err)
		}
	})
	for i := range n {
		start := time.Now()
		began <- start
		if _, err := a.Put(ctx, catalog.VolumeKey(catalog.Wanted, fmt.Sprint(i)), []byte(`{}`), 0); err != nil {
			t.Fatal(err)
		}
		put = append(put, time.Since(start))
		select {
		case <-next:
		case <-ctx.Done():
			t.Fatal("not seen")
		}
	}
	wg.Wait()
	slices.Sort(put)
	slices.Sort(seen)
	return put, seen
}

// resident is a process's resident memory, in KiB.
func resident(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatal("no VmRSS")
	return 0
}
