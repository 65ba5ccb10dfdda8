package api

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

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
	if len(entries) <= chunk {
		l.decode(h, entries)
		return l, nil
	}
	parts := make([]listed[W, O], (len(entries)+chunk-1)/chunk)
	spread(len(entries), func(from, to int) {
		p := listed[W, O]{wanted: make(map[string]W, to-from), observed: make(map[string]O, to-from)}
		p.decode(h, entries[from:to])
		parts[from/chunk] = p
	})
	for _, p := range parts {
		maps.Copy(l.wanted, p.wanted)
		maps.Copy(l.observed, p.observed)
	}
	return l, nil
}

// chunk is how much of a long list one goroutine does at a time: thousands of volumes are worth all cores.
const chunk = 500

// spread calls fn for all of 0 to n, in chunks, several of them at a time.
func spread(n int, fn func(from, to int)) {
	if n <= chunk {
		fn(0, n)
		return
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), (n+chunk-1)/chunk) {
		wg.Go(func() {
			for from := int(next.Add(chunk)) - chunk; from < n; from = int(next.Add(chunk)) - chunk {
				fn(from, min(n, from+chunk))
			}
		})
	}
	wg.Wait()
}

// encode is json.Marshal, with several goroutines where it is worth that.
func encode(v any) ([]byte, error) {
	if long, ok := v.(interface{ encode() ([]byte, error) }); ok {
		return long.encode()
	}
	return json.Marshal(v)
}

// encode is json.Marshal: the frame, and in it the pieces of Data, which is the last field.
func (c Collection[T]) encode() ([]byte, error) {
	if len(c.Data) <= chunk {
		return json.Marshal(c)
	}
	pieces := make([][]byte, (len(c.Data)+chunk-1)/chunk)
	errs := make([]error, len(pieces))
	spread(len(c.Data), func(from, to int) {
		pieces[from/chunk], errs[from/chunk] = json.Marshal(c.Data[from:to])
	})
	frame := c
	frame.Data = []T{}
	around, err := json.Marshal(frame)
	if err = errors.Join(append(errs, err)...); err != nil {
		return nil, err
	}
	const end = "]}"
	size := len(around)
	for _, p := range pieces {
		size += len(p)
	}
	out := append(make([]byte, 0, size), around[:len(around)-len(end)]...)
	for i, p := range pieces {
		if i > 0 {
			out = append(out, ',')
		}
		out = append(out, p[1:len(p)-1]...)
	}
	return append(out, end...), nil
}

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
