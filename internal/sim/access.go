package sim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/replica"
	"ashlar/internal/volume"
)

// Access is one node's way to the catalogue: it can be away, calls take a while, and now and then an answer is lost although the deed was done. It is a catalog.Catalog, and the engine's
// Ledger.
type Access struct {
	mem *catalog.Mem

	mu      sync.Mutex
	rng     *rand.Rand
	lose    float64 // of answers
	away    bool
	changed chan struct{}
}

var (
	_ catalog.Catalog = (*Access)(nil)
	_ volume.Ledger   = (*Access)(nil)
)

// NewAccess returns a node's way to mem; it loses that part of its answers.
func NewAccess(mem *catalog.Mem, seed uint64, lose float64) *Access {
	return &Access{mem: mem, rng: rand.New(rand.NewPCG(seed, 0xacce55)), lose: lose, changed: make(chan struct{})}
}

// SetAway cuts the node off from the catalogue, or ends that.
func (a *Access) SetAway(away bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.away = away
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *Access) look() (away bool, changed <-chan struct{}, wait time.Duration, lost bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.away, a.changed, time.Duration(a.rng.Int64N(int64(3 * time.Millisecond))), a.rng.Float64() < a.lose
}

var errAnswerLost = errors.New("the answer was lost")

// call does something at the catalogue, or fails as calls over a network do.
func (a *Access) call(ctx context.Context, do func() error) error {
	away, changed, wait, lost := a.look()
	if away {
		select {
		case <-changed:
		case <-time.After(2 * time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
		return fmt.Errorf("cut off: %w", catalog.ErrUnreachable)
	}
	select {
	case <-time.After(wait):
	case <-ctx.Done():
		return ctx.Err()
	}
	err := do()
	if lost {
		return fmt.Errorf("%w: %w", catalog.ErrUnreachable, errAnswerLost)
	}
	return err
}

// Get implements catalog.Catalog.
func (a *Access) Get(ctx context.Context, k catalog.Key) (e catalog.Entry, err error) {
	err = a.call(ctx, func() error { e, err = a.mem.Get(ctx, k); return err })
	return e, err
}

// Put implements catalog.Catalog.
func (a *Access) Put(ctx context.Context, k catalog.Key, value []byte, was catalog.Rev) (rev catalog.Rev, err error) {
	err = a.call(ctx, func() error { rev, err = a.mem.Put(ctx, k, value, was); return err })
	return rev, err
}

// Delete implements catalog.Catalog.
func (a *Access) Delete(ctx context.Context, k catalog.Key, was catalog.Rev) error {
	return a.call(ctx, func() error { return a.mem.Delete(ctx, k, was) })
}

// List implements catalog.Catalog.
func (a *Access) List(ctx context.Context, kind catalog.Kind) (es []catalog.Entry, rev catalog.Rev, err error) {
	err = a.call(ctx, func() error { es, rev, err = a.mem.List(ctx, kind); return err })
	return es, rev, err
}

// Watch implements catalog.Catalog: it ends when the node is cut off.
func (a *Access) Watch(ctx context.Context, from catalog.Rev, fn func(catalog.Event) error) error {
	return a.while(ctx, func(ctx context.Context) error { return a.mem.Watch(ctx, from, fn) })
}

// Hold implements catalog.Catalog: the record is given up when the node was cut off for its ttl.
func (a *Access) Hold(ctx context.Context, h catalog.Holding, held func(catalog.Rev)) error {
	if away, _, _, _ := a.look(); away {
		return fmt.Errorf("cut off: %w", catalog.ErrUnreachable)
	}
	life, end := context.WithCancelCause(ctx)
	defer end(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end(nil)
	wg.Go(func() {
		for life.Err() == nil {
			away, changed, _, _ := a.look()
			var ttl <-chan time.Time
			if away {
				ttl = time.After(h.TTL)
			}
			select {
			case <-ttl:
				end(fmt.Errorf("lease: %w", catalog.ErrUnreachable))
			case <-changed:
			case <-life.Done():
			}
		}
	})
	err := a.mem.Hold(life, h, held)
	if ctx.Err() == nil && errors.Is(err, context.Canceled) {
		return context.Cause(life)
	}
	return err
}

// while does something that goes on until the node is cut off.
func (a *Access) while(ctx context.Context, do func(context.Context) error) error {
	away, changed, _, _ := a.look()
	if away {
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
		return fmt.Errorf("cut off: %w", catalog.ErrUnreachable)
	}
	life, end := context.WithCancel(ctx)
	defer end()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(stop)
	wg.Go(func() {
		select {
		case <-changed:
			end()
		case <-stop:
		}
	})
	err := do(life)
	if ctx.Err() == nil && errors.Is(err, context.Canceled) {
		return fmt.Errorf("cut off: %w", catalog.ErrUnreachable)
	}
	return err
}

// Close implements catalog.Catalog; the catalogue goes on.
func (a *Access) Close() error { return nil }

// Read implements volume.Ledger.
func (a *Access) Read(ctx context.Context, volumeID string) (rec replica.Record, rev volume.Rev, err error) {
	e, err := a.Get(ctx, catalog.MembershipKey(volumeID))
	if err != nil {
		return rec, 0, ledgerError(err)
	}
	err = json.Unmarshal(e.Value, &rec)
	return rec, volume.Rev(e.Rev), err
}

// Swap implements volume.Ledger.
func (a *Access) Swap(ctx context.Context, rec replica.Record, was volume.Rev) (volume.Rev, error) {
	value, err := json.Marshal(rec)
	if err != nil {
		return 0, err
	}
	rev, err := a.Put(ctx, catalog.MembershipKey(rec.VolumeID), value, catalog.Rev(was))
	return volume.Rev(rev), ledgerError(err)
}

func ledgerError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, catalog.ErrNotFound):
		return fmt.Errorf("%w: %w", volume.ErrNoRecord, err)
	case errors.Is(err, catalog.ErrConflict):
		return fmt.Errorf("%w: %w", volume.ErrConflict, err)
	}
	return fmt.Errorf("%w: %w", volume.ErrUnreachable, err)
}
