package limit

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/block/blocktest"
)

func TestConformance(t *testing.T) {
	for name, l := range map[string]Limits{"unlimited": {}, "limited": {IOPS: 1 << 30, BytesPerSecond: 1 << 45}} {
		t.Run(name, func(t *testing.T) {
			blocktest.Run(t, blocktest.Config{New: func(_ testing.TB, n int64) block.Device { return NewDevice(block.NewMem(n), l) }})
		})
	}
}

// pass has n requests of size bytes go, one after the other, and returns when each went, counted from the first call.
func pass(t *testing.T, r *Rate, n int, size int64) []time.Duration {
	t.Helper()
	start := time.Now()
	out := make([]time.Duration, n)
	for i := range out {
		if err := r.Wait(context.Background(), size); err != nil {
			t.Fatal(err)
		}
		out[i] = time.Since(start)
	}
	return out
}

const ms = time.Millisecond

// near allows for the rounding up of each wait to a nanosecond.
func near(got, want time.Duration) bool { return got >= want && got <= want+time.Microsecond }

// TestRates has exact figures: without a burst rate a tenth of a second's worth goes at once (QEMU: avg/10), then each request waits for the one before; one more goes
// at once, because a bucket that is just full is not over.
func TestRates(t *testing.T) {
	for name, tc := range map[string]struct {
		l    Limits
		n    int
		size int64
		want map[int]time.Duration // by request, from 0
	}{
		"none": {Limits{}, 1000, 1 << 30, map[int]time.Duration{999: 0}},
		"iops": {Limits{IOPS: 100}, 511, 4096, map[int]time.Duration{0: 0, 10: 0, 11: 10 * ms, 12: 20 * ms, 510: 5000 * ms}},
		"bytes": {Limits{BytesPerSecond: 1 << 20}, 1200, 4096,
			map[int]time.Duration{25: 0, 1199: 4583593750}},
		"both, requests bind": {Limits{IOPS: 10, BytesPerSecond: 1 << 20}, 31, 512, map[int]time.Duration{1: 0, 2: 100 * ms, 30: 2900 * ms}},
		"both, bytes bind":    {Limits{IOPS: 1000, BytesPerSecond: 1 << 20}, 11, 1 << 20, map[int]time.Duration{0: 0, 1: 900 * ms, 2: 1900 * ms, 10: 9900 * ms}},
		// A burst of 1000 for 2 s fills 2000; 100 leak each second meanwhile: it lasts 2000/900 s.
		"burst": {Limits{IOPS: 100, BurstIOPS: 1000, BurstSeconds: 2}, 2424, 4096,
			map[int]time.Duration{100: 0, 101: 1 * ms, 1100: 1000 * ms, 2211: 2111 * ms, 2222: 2220 * ms, 2322: 3220 * ms, 2422: 4220 * ms}},
		"larger than the bucket": {Limits{BytesPerSecond: 1000}, 3, 10000, map[int]time.Duration{0: 0, 1: 9900 * ms, 2: 19900 * ms}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				got := pass(t, NewRate(tc.l), tc.n, tc.size)
				for i, want := range tc.want {
					if !near(got[i], want) {
						t.Errorf("request %d went after %v, want %v", i, got[i], want)
					}
				}
			})
		})
	}
}

// TestCatchUp: what was not used is there later, but no more than the bucket holds.
func TestCatchUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRate(Limits{IOPS: 10, BurstIOPS: 100, BurstSeconds: 1})
		first := pass(t, r, 200, 0)
		<-time.After(time.Hour)
		second := pass(t, r, 200, 0)
		if !near(second[199], first[199]) {
			t.Errorf("after an hour 200 requests took %v, the first %v", second[199], first[199])
		}
	})
}

// TestOrder: requests go in the order in which they came, large and small, and nothing overtakes.
func TestOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRate(Limits{BytesPerSecond: 1000})
		if err := r.Wait(t.Context(), 1100); err != nil { // the next one waits a second
			t.Fatal(err)
		}
		var mu sync.Mutex
		var got []int
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				if err := r.Wait(t.Context(), int64(1+i%7*300)); err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				got = append(got, i)
			})
			synctest.Wait()
		}
		wg.Wait()
		for i, g := range got {
			if i != g {
				t.Fatalf("order %v", got)
			}
		}
		if r.Waited() != 50 {
			t.Errorf("%d waited", r.Waited())
		}
	})
}

// TestSet: new limits hold for those who wait too, and changing them back and forth gains nothing.
func TestSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRate(Limits{IOPS: 1})
		start := time.Now()
		var wg sync.WaitGroup
		var took [3]time.Duration
		pass(t, r, 1, 0)
		for i := range took {
			wg.Go(func() {
				if err := r.Wait(t.Context(), 0); err != nil {
					t.Error(err)
				}
				took[i] = time.Since(start)
			})
			synctest.Wait()
		}
		<-time.After(100 * ms)
		r.Set(Limits{IOPS: 10}) // of 1, a tenth has leaked, a tenth may stay: 800 ms at 1, now 80; with a bucket of 1 nothing
		wg.Wait()
		for i, want := range []time.Duration{100 * ms, 190 * ms, 290 * ms} {
			if !near(took[i], want) {
				t.Errorf("request %d went after %v, want %v", i, took[i], want)
			}
		}
		pass(t, r, 10, 0)
		for range 100 {
			r.Set(Limits{IOPS: 11})
			r.Set(Limits{IOPS: 10})
		}
		if got := pass(t, r, 1, 0); got[0] < 90*ms {
			t.Errorf("after new limits a request went after %v", got[0])
		}
		r.Set(Limits{})
		if r.Limited() || pass(t, r, 1000, 1<<40)[999] != 0 {
			t.Error("no limits, and held back")
		}
	})
}

// TestLift: no limits any more lets everybody who waits go at once.
func TestLift(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRate(Limits{IOPS: 1})
		start := time.Now()
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if err := r.Wait(t.Context(), 0); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		r.Set(Limits{})
		wg.Wait()
		if d := time.Since(start); d != 0 {
			t.Errorf("it took %v", d)
		}
	})
}

// TestGiveUp: who gives up counts for nothing, also the first, and the next goes when it may.
func TestGiveUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRate(Limits{BytesPerSecond: 1000})
		start := time.Now()
		if err := r.Wait(t.Context(), 1100); err != nil {
			t.Fatal(err)
		}
		why := errors.New("no time")
		var wg sync.WaitGroup
		for range 3 {
			ctx, cancel := context.WithCancelCause(t.Context())
			wg.Go(func() {
				if err := r.Wait(ctx, 1<<40); !errors.Is(err, why) {
					t.Error(err)
				}
			})
			wg.Go(func() {
				<-time.After(500 * ms)
				cancel(why)
			})
			synctest.Wait()
		}
		if err := r.Wait(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); !near(d, time.Second) {
			t.Errorf("it went after %v", d)
		}
		wg.Wait()
	})
}

// TestClose: who waits is released, who comes is refused, whether there are limits or not.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := NewDevice(block.NewMem(1<<20), Limits{IOPS: 1})
		p := make([]byte, 4096)
		if _, err := d.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if _, err := d.WriteAt(p, 0); !errors.Is(err, block.ErrClosed) {
					t.Errorf("a write that waited: %v", err)
				}
				if err := d.Zero(0, 4096); !errors.Is(err, block.ErrClosed) {
					t.Errorf("a zero that came later: %v", err)
				}
			})
		}
		synctest.Wait()
		if !d.MayWait() {
			t.Error("it does not say that calls may wait")
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		if time.Since(start) != 0 {
			t.Error("it took time")
		}
		d.Rate().Set(Limits{})
		if err := d.Rate().Wait(t.Context(), 1); !errors.Is(err, block.ErrClosed) {
			t.Errorf("closed, then set: %v", err)
		}
	})
}

// TestWhatCounts: flushes, extents and nothing at all never wait; a Zero is a request without bytes.
func TestWhatCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := NewDevice(block.NewMem(1<<20), Limits{BytesPerSecond: 1000})
		start := time.Now()
		p := make([]byte, 100)
		for range 50 {
			if err := d.Zero(0, 1<<20); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			if _, err := d.WriteAt(p, 0); err != nil {
				t.Fatal(err)
			}
		}
		if time.Since(start) != 0 {
			t.Error("zeroes counted as bytes")
		}
		d.Rate().Set(Limits{IOPS: 1})
		if err := d.Zero(0, 4096); err != nil {
			t.Fatal(err)
		}
		_, readErr := d.ReadAt(nil, 0)
		_, writeErr := d.WriteAt(nil, 0)
		_, extentsErr := d.Extents(0, 4096)
		if err := errors.Join(readErr, writeErr, extentsErr, d.Zero(0, 0), d.Flush()); err != nil {
			t.Fatal(err)
		}
		if time.Since(start) != 0 {
			t.Error("something waited that should not")
		}
		if err := d.Zero(0, 4096); err != nil {
			t.Fatal(err)
		}
		if got := time.Since(start); !near(got, 900*ms) {
			t.Errorf("the second zero went after %v", got)
		}
		if d.Rate().Waited() != 1 {
			t.Errorf("%d waited", d.Rate().Waited())
		}
	})
}

func TestCheck(t *testing.T) {
	for _, l := range []Limits{{}, {IOPS: 1}, {BytesPerSecond: MaxRate}, {IOPS: 5, BurstIOPS: 5, BurstSeconds: 3600}, {BurstSeconds: 9}} {
		if err := l.Check(); err != nil {
			t.Errorf("%+v: %v", l, err)
		}
	}
	for _, l := range []Limits{{IOPS: -1}, {BytesPerSecond: MaxRate + 1}, {BurstIOPS: 5}, {IOPS: 5, BurstIOPS: 4}, {BytesPerSecond: 5, BurstBytesPerSecond: -1},
		{IOPS: 1, BurstSeconds: 3601}, {BurstSeconds: -1}} {
		if l.Check() == nil {
			t.Errorf("%+v is taken", l)
		}
	}
}

// BenchmarkUnlimited shows what a device without limits costs.
func BenchmarkUnlimited(b *testing.B) {
	d := NewDevice(block.NewMem(1<<20), Limits{})
	p := make([]byte, 512)
	for b.Loop() {
		if _, err := d.ReadAt(p, 0); err != nil {
			b.Fatal(err)
		}
	}
}
