package catalog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// Mem is the in-memory twin: it passes the same suite (catalogtest) as etcd, and can go away (Away) and forget (Compact) on demand. It survives nothing.
type Mem struct {
	mu      sync.Mutex // guards all below
	records map[Key]Entry
	rev     Rev
	history []Event       // every change with a revision above base, oldest first
	base    Rev           // changes up to here are forgotten
	changed chan struct{} // closed and replaced at every change of anything here
	away    bool
	closed  bool
}

var _ Catalog = (*Mem)(nil)

// memHistory bounds what Mem remembers for watchers.
const memHistory = 100_000

// NewMem returns an empty catalogue.
func NewMem() *Mem {
	return &Mem{records: map[Key]Entry{}, changed: make(chan struct{})}
}

// Away makes every call and watch fail with ErrUnreachable, until it is called with false.
func (m *Mem) Away(away bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.away = away
	m.wake()
}

// Compact forgets the history, so that watches from before now fail with ErrCompacted.
func (m *Mem) Compact() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.history, m.base = nil, m.rev
}

// wake is called with mu held.
func (m *Mem) wake() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// ready is called with mu held.
func (m *Mem) ready(ctx context.Context) error {
	if m.away || m.closed {
		return ErrUnreachable
	}
	return ctx.Err()
}

// Get implements Catalog.
func (m *Mem) Get(ctx context.Context, k Key) (Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.ready(ctx); err != nil {
		return Entry{}, err
	}
	e, ok := m.records[k]
	if !ok {
		return Entry{}, ErrNotFound
	}
	return e.clone(), nil
}

// Put implements Catalog.
func (m *Mem) Put(ctx context.Context, k Key, value []byte, was Rev) (Rev, error) {
	if err := CheckRecord(k, value); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.ready(ctx); err != nil {
		return 0, err
	}
	if m.records[k].Rev != was {
		return 0, ErrConflict
	}
	e := Entry{Key: k, Value: slices.Clone(value), Rev: m.rev + 1}
	m.records[k] = e
	m.append(Event{e})
	return e.Rev, nil
}

// Delete implements Catalog.
func (m *Mem) Delete(ctx context.Context, k Key, was Rev) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.ready(ctx); err != nil {
		return err
	}
	e, ok := m.records[k]
	if !ok {
		return ErrNotFound
	}
	if e.Rev != was {
		return ErrConflict
	}
	delete(m.records, k)
	m.append(Event{Entry{Key: k, Rev: m.rev + 1}})
	return nil
}

// append is called with mu held.
func (m *Mem) append(ev Event) {
	m.rev = ev.Rev
	m.history = append(m.history, ev)
	if len(m.history) > memHistory {
		m.base = m.history[len(m.history)/2].Rev
		m.history = slices.Clone(m.history[len(m.history)/2+1:])
	}
	m.wake()
}

// List implements Catalog.
func (m *Mem) List(ctx context.Context, kind Kind) ([]Entry, Rev, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.ready(ctx); err != nil {
		return nil, 0, err
	}
	es := []Entry{}
	for k, e := range m.records {
		if kind == "" || k.Kind == kind {
			es = append(es, e.clone())
		}
	}
	slices.SortFunc(es, func(a, b Entry) int { return strings.Compare(a.Key.String(), b.Key.String()) })
	return es, m.rev, nil
}

// Watch implements Catalog.
func (m *Mem) Watch(ctx context.Context, from Rev, fn func(Event) error) error {
	for {
		evs, changed, err := m.after(ctx, from)
		if err != nil {
			return err
		}
		for _, ev := range evs {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := fn(Event{ev.clone()}); err != nil {
				return err
			}
			from = ev.Rev
		}
		if len(evs) > 0 {
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// after returns the changes after from, and a channel that closes when there may be more.
func (m *Mem) after(ctx context.Context, from Rev) ([]Event, <-chan struct{}, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.ready(ctx); err != nil {
		return nil, nil, err
	}
	if from < m.base {
		return nil, nil, ErrCompacted
	}
	i, _ := slices.BinarySearchFunc(m.history, from+1, func(ev Event, r Rev) int { return int(ev.Rev - r) })
	return m.history[i:len(m.history):len(m.history)], m.changed, nil
}

// Hold implements Catalog. Nothing but ctx, Drop and Close ends it: whoever wants a holder to be given up for dead calls Drop.
func (m *Mem) Hold(ctx context.Context, h Holding, held func(Rev)) error {
	if err := CheckRecord(h.Key, h.Value); err != nil {
		return err
	}
	var rev Rev
	for {
		e, err := m.Get(ctx, h.Key)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		if rev, err = m.Put(ctx, h.Key, h.Value, e.Rev); err == nil {
			break
		}
		if !errors.Is(err, ErrConflict) {
			return err
		}
	}
	held(rev)
	gone := errors.New("given up")
	mine := true // until another holder replaces the record
	err := m.Watch(ctx, rev, func(ev Event) error {
		if ev.Key == h.Key && mine {
			if ev.Value == nil {
				return gone
			}
			mine = false
		}
		return nil
	})
	if errors.Is(err, gone) {
		return fmt.Errorf("%s was given up: %w", h.Key, ErrUnreachable)
	}
	_ = m.Delete(context.WithoutCancel(ctx), h.Key, rev) // somebody else's by now, perhaps
	return err
}

// Drop gives a held record up, as if nobody had heard of its holder for its ttl.
func (m *Mem) Drop(k Key) error {
	ctx := context.Background()
	e, err := m.Get(ctx, k)
	if err != nil {
		return err
	}
	return m.Delete(ctx, k, e.Rev)
}

// Close implements Catalog.
func (m *Mem) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	m.wake()
	return nil
}

func (e Entry) clone() Entry {
	e.Value = slices.Clone(e.Value)
	return e
}

// CheckRecord tells whether a record can have this key and value; ErrKey if not. Every Catalog checks so before a Put.
func CheckRecord(k Key, value []byte) error {
	if err := k.Check(); err != nil {
		return err
	}
	if !json.Valid(value) {
		return fmt.Errorf("value of %s is not JSON: %w", k, ErrKey)
	}
	return nil
}
