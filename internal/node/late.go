package node

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"ashlar/internal/catalog"
	"ashlar/internal/catalog/etcd"
)

// late is a catalogue that is still being opened: in a cluster that takes as long as a majority of its voters needs to come up. Until then every call says why it is unreachable.
type late struct {
	mu    sync.Mutex // guards store, why and closed
	store *etcd.Store
	why   error
	done  bool
	ready chan struct{} // closed when store is there
}

var _ catalog.Catalog = (*late)(nil)

// errOpening: nobody has answered yet.
var errOpening = errors.New("it is being opened")

func newLate() *late { return &late{why: errOpening, ready: make(chan struct{})} }

// set hands the store over; it is closed at once if late was closed before.
func (l *late) set(s *etcd.Store) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.done {
		return s.Close()
	}
	l.store = s
	close(l.ready)
	return nil
}

// waits says what is waited for.
func (l *late) waits(why error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.why = why
}

func (l *late) get() (*etcd.Store, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.store == nil {
		return nil, fmt.Errorf("%w: %w", catalog.ErrUnreachable, l.why)
	}
	return l.store, nil
}

// opened waits for the store.
func (l *late) opened(ctx context.Context) (*etcd.Store, error) {
	select {
	case <-l.ready:
		return l.get()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// after is fn, once the catalogue is there.
func (l *late) after(fn func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		if _, err := l.opened(ctx); err != nil {
			return err
		}
		return fn(ctx)
	}
}

// Get implements catalog.Catalog.
func (l *late) Get(ctx context.Context, k catalog.Key) (catalog.Entry, error) {
	s, err := l.get()
	if err != nil {
		return catalog.Entry{}, err
	}
	return s.Get(ctx, k)
}

// Put implements catalog.Catalog.
func (l *late) Put(ctx context.Context, k catalog.Key, value []byte, was catalog.Rev) (catalog.Rev, error) {
	s, err := l.get()
	if err != nil {
		return 0, err
	}
	return s.Put(ctx, k, value, was)
}

// Delete implements catalog.Catalog.
func (l *late) Delete(ctx context.Context, k catalog.Key, was catalog.Rev) error {
	s, err := l.get()
	if err != nil {
		return err
	}
	return s.Delete(ctx, k, was)
}

// List implements catalog.Catalog.
func (l *late) List(ctx context.Context, kind catalog.Kind) ([]catalog.Entry, catalog.Rev, error) {
	s, err := l.get()
	if err != nil {
		return nil, 0, err
	}
	return s.List(ctx, kind)
}

// Watch implements catalog.Catalog.
func (l *late) Watch(ctx context.Context, from catalog.Rev, fn func(catalog.Event) error) error {
	s, err := l.get()
	if err != nil {
		return err
	}
	return s.Watch(ctx, from, fn)
}

// Hold implements catalog.Catalog.
func (l *late) Hold(ctx context.Context, h catalog.Holding, held func(catalog.Rev)) error {
	s, err := l.get()
	if err != nil {
		return err
	}
	return s.Hold(ctx, h, held)
}

// Close implements catalog.Catalog.
func (l *late) Close() error {
	l.mu.Lock()
	s, was := l.store, l.done
	l.done = true
	l.mu.Unlock()
	if s == nil || was {
		return nil
	}
	return s.Close()
}

// Lead implements control.Leader.
func (l *late) Lead(ctx context.Context, fn func(context.Context) error) error {
	s, err := l.get()
	if err != nil {
		return err
	}
	return s.Lead(ctx, fn)
}

// AddLearner implements cluster.Etcd.
func (l *late) AddLearner(ctx context.Context, name, peerURL string) (etcd.MemberInfo, error) {
	s, err := l.get()
	if err != nil {
		return etcd.MemberInfo{}, err
	}
	return s.AddLearner(ctx, name, peerURL)
}

// Promote implements cluster.Etcd.
func (l *late) Promote(ctx context.Context, name string) error {
	s, err := l.get()
	if err != nil {
		return err
	}
	return s.Promote(ctx, name)
}

// RemoveMember implements cluster.Etcd.
func (l *late) RemoveMember(ctx context.Context, name string) error {
	s, err := l.get()
	if err != nil {
		return err
	}
	return s.RemoveMember(ctx, name)
}

// Members implements cluster.Etcd.
func (l *late) Members(ctx context.Context) ([]etcd.MemberInfo, error) {
	s, err := l.get()
	if err != nil {
		return nil, err
	}
	return s.Members(ctx)
}
