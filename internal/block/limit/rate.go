// Package limit holds requests back, so that one user leaves room for the others: a Rate says when the next request may go, and a Device is a block.Device
// behind a Rate.
//
// The rule is QEMU's throttling: each bound is a leaky bucket (util/throttle.c there, throttle_compute_wait; docs/throttle.txt tells the story). A request is let
// through while the bucket is not over its size, and only then poured in, however large: so a request larger than the bucket passes, and those after it wait until it is paid for.
// With a burst rate there is a second, small bucket that leaks at that rate.
//
// Read next: rate.go (who goes when), device.go (what counts).
package limit

import (
	"context"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"ashlar/internal/block"
)

// Limits bound requests and bytes per second; zero: no bound of that kind.
type Limits struct {
	IOPS           int64 // requests per second
	BytesPerSecond int64
	// The burst rates hold, at most, for BurstSeconds and a little more (what leaks meanwhile), then the ones above; time below those fills the reserve again. Zero: none;
	// then a tenth of a second's worth may still come at once, because traffic that is held to its rate from request to request never reaches it.
	BurstIOPS           int64 // at least IOPS
	BurstBytesPerSecond int64 // at least BytesPerSecond
	BurstSeconds        int64 // 1 to MaxBurstSeconds; zero: 1. It means nothing without a burst rate
}

// The bounds of what Limits may say: below them nothing overflows, and a wait is always a time.
const (
	MaxRate         = int64(1) << 50
	MaxBurstSeconds = 3600
)

// Check returns an error that names the first field that makes no sense.
func (l Limits) Check() error {
	for _, f := range []struct {
		name        string
		rate, burst int64
	}{{"IOPS", l.IOPS, l.BurstIOPS}, {"bytes per second", l.BytesPerSecond, l.BurstBytesPerSecond}} {
		switch {
		case f.rate < 0 || f.rate > MaxRate:
			return fmt.Errorf("limit of %d %s: it must be 0 (none) to %d", f.rate, f.name, MaxRate)
		case f.burst < 0 || f.burst > MaxRate:
			return fmt.Errorf("burst of %d %s: it must be 0 (none) to %d", f.burst, f.name, MaxRate)
		case f.burst > 0 && f.rate == 0:
			return fmt.Errorf("burst of %d %s without a limit of its kind", f.burst, f.name)
		case f.burst > 0 && f.burst < f.rate:
			return fmt.Errorf("burst of %d %s is less than the limit of %d", f.burst, f.name, f.rate)
		}
	}
	if l.BurstSeconds < 0 || l.BurstSeconds > MaxBurstSeconds {
		return fmt.Errorf("burst of %d seconds: it must be 0 (1 s) to %d", l.BurstSeconds, MaxBurstSeconds)
	}
	return nil
}

// none tells that l bounds nothing.
func (l Limits) none() bool { return l.IOPS == 0 && l.BytesPerSecond == 0 }

// bucket is QEMU's LeakyBucket: what has gone in drains at avg, and in the small one at burst. Levels are in requests or bytes.
type bucket struct {
	avg, burst    float64 // per second; avg 0: no bound, burst 0: no second bucket
	size          float64
	level, bursts float64
}

// set changes a bucket's rates. Its level stays: who changes limits again and again gains nothing by it.
func (b *bucket) set(avg, burst, seconds int64) {
	b.avg, b.burst = float64(avg), float64(burst)
	b.size = b.avg / 10
	if burst > 0 {
		b.size = b.burst * float64(max(seconds, 1))
	}
	if avg == 0 {
		b.level, b.bursts = 0, 0
	}
}

// leak lets drain what drains in d.
func (b *bucket) leak(d time.Duration) {
	b.level = max(0, b.level-b.avg*d.Seconds())
	b.bursts = max(0, b.bursts-b.burst*d.Seconds())
}

// wait is how long it takes until the next request may go.
func (b *bucket) wait() time.Duration {
	switch {
	case b.avg == 0:
		return 0
	case b.level > b.size:
		return drain(b.level-b.size, b.avg)
	case b.burst > 0 && b.bursts > b.burst/10:
		return drain(b.bursts-b.burst/10, b.burst)
	}
	return 0
}

// drain is how long extra takes to leak at rate; never zero, so that waiting gets somewhere.
func drain(extra, rate float64) time.Duration {
	ns := math.Ceil(extra / rate * float64(time.Second))
	return time.Duration(min(max(ns, 1), math.MaxInt64/2))
}

// pour counts a request that goes.
func (b *bucket) pour(n float64) {
	if b.avg > 0 {
		b.level += n
	}
	if b.burst > 0 {
		b.bursts += n
	}
}

// Rate lets requests through at no more than its Limits, in the order in which they came. All methods may be called concurrently. It starts no goroutine:
// of those who wait, the first has a timer, and wakes the next when it goes.
type Rate struct {
	on     atomic.Bool // there are limits, or it is closed
	waited atomic.Uint64

	mu     sync.Mutex // guards the rest
	limits Limits
	closed bool
	last   time.Time // when the buckets drained last
	ops    bucket
	bytes  bucket
	queue  []*waiter // of those who wait, in order
}

// waiter is a request that waits. wake gets a message, capacity 1, when it may have become the first, or the limits changed, or it is over.
type waiter struct{ wake chan struct{} }

// NewRate returns a Rate with limits, which have been checked; the zero Limits let everything through.
func NewRate(l Limits) *Rate {
	r := &Rate{last: time.Now()}
	r.Set(l)
	return r
}

// Set changes the limits, which have been checked, for everybody, also those who wait. What has gone through still counts.
func (r *Rate) Set(l Limits) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l == r.limits {
		return
	}
	r.leak()
	r.limits = l
	r.ops.set(l.IOPS, l.BurstIOPS, l.BurstSeconds)
	r.bytes.set(l.BytesPerSecond, l.BurstBytesPerSecond, l.BurstSeconds)
	r.on.Store(r.closed || !l.none())
	r.wakeFirst()
}

// Limits returns what holds now.
func (r *Rate) Limits() Limits {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.limits
}

// Limited tells, with one atomic load, whether the next request may have to wait.
func (r *Rate) Limited() bool { return r.on.Load() }

// Waited counts the requests that had to wait.
func (r *Rate) Waited() uint64 { return r.waited.Load() }

// Close lets nothing through any more: who waits, and whoever comes, gets block.ErrClosed. Again it does nothing.
func (r *Rate) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.on.Store(true)
	for _, w := range r.queue {
		w.signal()
	}
}

func (w *waiter) signal() {
	select {
	case w.wake <- struct{}{}:
	default: // it has one already, and looks at everything when it takes it
	}
}

func (r *Rate) wakeFirst() {
	if len(r.queue) > 0 {
		r.queue[0].signal()
	}
}

// Wait returns when a request of n bytes may go, and counts it then. block.ErrClosed after Close, and ctx's error when that ends first: then it was not counted. Without limits it costs one atomic load.
func (r *Rate) Wait(ctx context.Context, n int64) error {
	if !r.on.Load() {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return block.ErrClosed
	}
	if len(r.queue) == 0 && r.due() == 0 {
		r.pour(n)
		return nil
	}
	r.waited.Add(1)
	w := &waiter{wake: make(chan struct{}, 1)}
	r.queue = append(r.queue, w)
	return r.wait(ctx, w, n)
}

// wait waits for w's turn; the caller holds mu, and holds it again when it returns.
func (r *Rate) wait(ctx context.Context, w *waiter, n int64) error {
	defer r.leave(w)
	for {
		var due <-chan time.Time
		var timer *time.Timer
		switch {
		case r.closed:
			return block.ErrClosed
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case r.queue[0] == w:
			d := r.due()
			if d == 0 {
				r.pour(n)
				return nil
			}
			timer = time.NewTimer(d)
			due = timer.C
		}
		r.mu.Unlock()
		select {
		case <-due:
		case <-w.wake:
		case <-ctx.Done():
		}
		if timer != nil {
			timer.Stop()
		}
		r.mu.Lock()
	}
}

// leave takes w out of the queue, and lets the next look.
func (r *Rate) leave(w *waiter) {
	for i, o := range r.queue {
		if o == w {
			r.queue = append(r.queue[:i], r.queue[i+1:]...)
			break
		}
	}
	if len(r.queue) == 0 {
		r.queue = nil // what it held is not held for ever
	}
	r.wakeFirst()
}

// leak lets the buckets drain up to now.
func (r *Rate) leak() {
	now := time.Now()
	d := now.Sub(r.last)
	r.last = now
	r.ops.leak(d)
	r.bytes.leak(d)
}

// due is how long it is until the next request may go.
func (r *Rate) due() time.Duration {
	r.leak()
	return max(r.ops.wait(), r.bytes.wait())
}

func (r *Rate) pour(n int64) {
	r.ops.pour(1)
	r.bytes.pour(float64(n))
}
