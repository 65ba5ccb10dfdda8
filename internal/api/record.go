package api

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"

	"ashlar/internal/catalog"
)

// find reads a record that may be missing.
func find[T any](ctx context.Context, cat catalog.Catalog, k catalog.Key) (v T, ok bool, err error) {
	v, _, err = catalog.Read[T](ctx, cat, k)
	if errors.Is(err, catalog.ErrNotFound) {
		return v, false, nil
	}
	return v, err == nil, err
}

// listed are all records of a kind, by name.
type listed[W, O any] struct {
	wanted   map[string]W
	observed map[string]O
}

// names are the wanted ones, sorted.
func (l listed[W, O]) names() []string { return slices.Sorted(maps.Keys(l.wanted)) }

// list reads all records of a kind. One that cannot be decoded is reported and left out: a single bad record must not hide all the others.
func list[W, O any](ctx context.Context, h *Handler, kind catalog.Kind) (listed[W, O], error) {
	l := listed[W, O]{wanted: map[string]W{}, observed: map[string]O{}}
	entries, _, err := h.cfg.Catalog.List(ctx, kind)
	if err != nil {
		return l, err
	}
	parts := make([]listed[W, O], (len(entries)+listChunk-1)/listChunk)
	var wg sync.WaitGroup
	for i := range parts {
		chunk := entries[i*listChunk : min(len(entries), (i+1)*listChunk)]
		if len(parts) == 1 {
			l.decode(h, chunk)
			return l, nil
		}
		parts[i] = listed[W, O]{wanted: map[string]W{}, observed: map[string]O{}}
		wg.Go(func() { parts[i].decode(h, chunk) })
	}
	wg.Wait()
	for _, p := range parts {
		maps.Copy(l.wanted, p.wanted)
		maps.Copy(l.observed, p.observed)
	}
	return l, nil
}

// listChunk is how many records one goroutine decodes: thousands of volumes are worth all cores.
const listChunk = 1000

func (l listed[W, O]) decode(h *Handler, entries []catalog.Entry) {
	for _, e := range entries {
		var err error
		if e.Key.Part == catalog.Observed {
			err = decodeInto(l.observed, e)
		} else {
			err = decodeInto(l.wanted, e)
		}
		if err != nil {
			h.cfg.Log.Error("unreadable record left out", "error", err)
		}
	}
}

func decodeInto[T any](m map[string]T, e catalog.Entry) error {
	item, err := catalog.Decode[T](e)
	if err == nil {
		m[e.Key.Name] = item.Value
	}
	return err
}

// await blocks until done says that it has seen what it waits for in a record (a nil Value: there is none), or fails. It watches; it does not ask again and again.
func await(ctx context.Context, cat catalog.Catalog, k catalog.Key, done func(catalog.Entry) (bool, error)) error {
	for {
		// The revision comes first, so that no change falls between the look and the watch. Settings are the kind that is cheapest to list.
		_, rev, err := cat.List(ctx, catalog.KindSetting)
		if err != nil {
			return err
		}
		e, err := cat.Get(ctx, k)
		if err != nil && !errors.Is(err, catalog.ErrNotFound) {
			return err
		}
		if ok, err := done(e); ok || err != nil {
			return err
		}
		ok := false
		err = cat.Watch(ctx, rev, func(ev catalog.Event) error {
			if ev.Key != k {
				return nil
			}
			var err error
			if ok, err = done(ev.Entry); err == nil && ok {
				err = errSeen
			}
			return err
		})
		if ok && errors.Is(err, errSeen) {
			return nil
		}
		if !errors.Is(err, catalog.ErrCompacted) {
			return err
		}
	}
}

// errSeen ends a watch that has seen enough.
var errSeen = errors.New("seen")
