package catalog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
)

// Item is a decoded record.
type Item[T any] struct {
	Key   Key
	Rev   Rev
	Value T
}

// Decode decodes a record; unknown fields are ignored. The error names the record.
func Decode[T any](e Entry) (Item[T], error) {
	it := Item[T]{Key: e.Key, Rev: e.Rev}
	if err := json.Unmarshal(e.Value, &it.Value); err != nil {
		return it, fmt.Errorf("record %s: %w", e.Key, err)
	}
	return it, nil
}

// Read gets and decodes one record, linearizably; ErrNotFound, ErrUnreachable.
func Read[T any](ctx context.Context, c Catalog, k Key) (T, Rev, error) {
	var none T
	e, err := c.Get(ctx, k)
	if err != nil {
		return none, 0, fmt.Errorf("read %s: %w", k, err)
	}
	it, err := Decode[T](e)
	return it.Value, it.Rev, err
}

// Write encodes and puts one record if its revision is still was (0: must not exist); ErrConflict, ErrUnreachable (it may have happened).
func Write[T any](ctx context.Context, c Catalog, k Key, v T, was Rev) (Rev, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return 0, fmt.Errorf("write %s: %w", k, err)
	}
	rev, err := c.Put(ctx, k, b, was)
	if err != nil {
		return 0, fmt.Errorf("write %s: %w", k, err)
	}
	return rev, nil
}

// Update reads a record, lets change alter it, and writes it back if it differs, again from the start as long as somebody else was faster. change may be
// called several times, each time with a fresh value; if it fails nothing is written and its error is returned. ErrNotFound if there is no such record;
// ErrUnreachable (it may have happened). It returns the record as it is afterwards.
func Update[T any](ctx context.Context, c Catalog, k Key, change func(*T) error) (T, Rev, error) {
	return update(ctx, c, k, false, change)
}

// Upsert is Update, but a record that is missing is made from the zero value.
func Upsert[T any](ctx context.Context, c Catalog, k Key, change func(*T) error) (T, Rev, error) {
	return update(ctx, c, k, true, change)
}

func update[T any](ctx context.Context, c Catalog, k Key, orMake bool, change func(*T) error) (T, Rev, error) {
	for {
		var it Item[T]
		e, err := c.Get(ctx, k)
		if err == nil {
			it, err = Decode[T](e)
		} else if orMake && errors.Is(err, ErrNotFound) {
			err = nil
		}
		if err != nil {
			return it.Value, 0, fmt.Errorf("update %s: %w", k, err)
		}
		if err := change(&it.Value); err != nil {
			return it.Value, it.Rev, err
		}
		b, err := json.Marshal(it.Value)
		if err != nil {
			return it.Value, it.Rev, fmt.Errorf("update %s: %w", k, err)
		}
		if it.Rev != 0 && bytes.Equal(b, e.Value) {
			return it.Value, it.Rev, nil
		}
		rev, err := c.Put(ctx, k, b, it.Rev)
		if err == nil {
			return it.Value, rev, nil
		}
		if !errors.Is(err, ErrConflict) {
			return it.Value, 0, fmt.Errorf("update %s: %w", k, err)
		}
	}
}

// All lists and decodes every record of one half of a kind, sorted by name, with the catalogue's revision at that instant (to Watch from).
func All[T any](ctx context.Context, c Catalog, kind Kind, part Part) ([]Item[T], Rev, error) {
	es, rev, err := c.List(ctx, kind)
	if err != nil {
		return nil, 0, fmt.Errorf("list %s: %w", kind, err)
	}
	items := []Item[T]{}
	for _, e := range es {
		if e.Key.Part != part {
			continue
		}
		it, err := Decode[T](e)
		if err != nil {
			return nil, 0, err
		}
		items = append(items, it)
	}
	return items, rev, nil
}
