// Package catalogtest is the contract of catalog.Catalog as a suite: get, put-if, list, watch-from, concurrency, order and resumption of watches,
// compaction, closing. Every implementation runs it. Read next: catalog (the contract), catalog/etcd (the real one).
package catalogtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"ashlar/internal/catalog"
)

// Subject is a catalogue under test. Compact makes it forget every change up to now.
type Subject struct {
	catalog.Catalog
	Compact func(t *testing.T)
}

// Run runs the suite; open returns an empty catalogue each time.
func Run(t *testing.T, open func(t *testing.T) Subject) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, Subject)
	}{
		{"put if", putIf}, {"delete if", deleteIf}, {"malformed", malformed}, {"list", list}, {"values are copies", copies},
		{"typed", typed}, {"concurrent updates", concurrentUpdates}, {"watch order", watchOrder}, {"watch resumes", watchResumes},
		{"watch ends", watchEnds}, {"watch is prompt", watchPrompt}, {"compaction", compaction}, {"list then watch", listThenWatch},
		{"random against a model", model}, {"close", closing}, {"cancelled", cancelled}, {"follow", follow}, {"note", note},
		{"hold", hold}, {"hold twice", holdTwice}, {"hold ends at close", holdClosed},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := open(t)
			defer s.Close()
			c.run(t, s)
		})
	}
}

func vol(name string) catalog.Key { return catalog.VolumeKey(catalog.Wanted, name) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mustPut(t *testing.T, c catalog.Catalog, k catalog.Key, v string, was catalog.Rev) catalog.Rev {
	t.Helper()
	rev, err := c.Put(t.Context(), k, []byte(v), was)
	must(t, err)
	return rev
}

func wantErr(t *testing.T, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Fatalf("%s: error %v, want %v", what, got, want)
	}
}

func putIf(t *testing.T, s Subject) {
	ctx, k := t.Context(), vol("a")
	_, err := s.Get(ctx, k)
	wantErr(t, "get of nothing", err, catalog.ErrNotFound)
	_, err = s.Put(ctx, k, []byte(`1`), 7)
	wantErr(t, "put over a revision that is not", err, catalog.ErrConflict)
	r1 := mustPut(t, s, k, `1`, 0)
	if r1 <= 0 {
		t.Fatalf("revision %d", r1)
	}
	_, err = s.Put(ctx, k, []byte(`2`), 0)
	wantErr(t, "put as new over a record", err, catalog.ErrConflict)
	r2 := mustPut(t, s, k, `2`, r1)
	if r2 <= r1 {
		t.Fatalf("revision went from %d to %d", r1, r2)
	}
	_, err = s.Put(ctx, k, []byte(`3`), r1)
	wantErr(t, "put over an old revision", err, catalog.ErrConflict)
	e, err := s.Get(ctx, k)
	must(t, err)
	if e.Key != k || string(e.Value) != `2` || e.Rev != r2 {
		t.Fatalf("got %v %s %d", e.Key, e.Value, e.Rev)
	}
	other := mustPut(t, s, vol("b"), `1`, 0)
	if e, err := s.Get(ctx, k); err != nil || e.Rev != r2 || other <= r2 {
		t.Fatalf("another record's put (%d) changed this one: %v %v", other, e, err)
	}
}

func deleteIf(t *testing.T, s Subject) {
	ctx, k := t.Context(), vol("a")
	wantErr(t, "delete of nothing", s.Delete(ctx, k, 0), catalog.ErrNotFound)
	r1 := mustPut(t, s, k, `1`, 0)
	wantErr(t, "delete of nothing by a revision that is not", s.Delete(ctx, vol("b"), r1), catalog.ErrNotFound)
	r2 := mustPut(t, s, k, `2`, r1)
	wantErr(t, "delete of an old revision", s.Delete(ctx, k, r1), catalog.ErrConflict)
	wantErr(t, "delete as if new", s.Delete(ctx, k, 0), catalog.ErrConflict)
	must(t, s.Delete(ctx, k, r2))
	_, err := s.Get(ctx, k)
	wantErr(t, "get after delete", err, catalog.ErrNotFound)
	wantErr(t, "delete again", s.Delete(ctx, k, r2), catalog.ErrNotFound)
	_, err = s.Put(ctx, k, []byte(`3`), r2)
	wantErr(t, "put over a deleted revision", err, catalog.ErrConflict)
	if r3 := mustPut(t, s, k, `3`, 0); r3 <= r2 {
		t.Fatalf("a record made again has revision %d, the old one had %d", r3, r2)
	}
}

func malformed(t *testing.T, s Subject) {
	for _, k := range []catalog.Key{
		{}, {Kind: "volume", Part: "wanted"}, {Kind: "vol/ume", Part: "wanted", Name: "a"}, {Kind: "volume", Part: "mine", Name: "a"},
		{Kind: "volume", Part: "wanted", Name: "a/b/c"}, {Kind: "volume", Part: "wanted", Name: "/a"}, {Kind: "volume", Part: "wanted", Name: "a\x00"},
	} {
		_, err := s.Put(t.Context(), k, []byte(`1`), 0)
		wantErr(t, "put of key "+k.String(), err, catalog.ErrKey)
	}
	for _, v := range []string{"", "{", "hello"} {
		_, err := s.Put(t.Context(), vol("a"), []byte(v), 0)
		wantErr(t, "put of value "+v, err, catalog.ErrKey)
	}
	es, _, err := s.List(t.Context(), "")
	must(t, err)
	if len(es) != 0 {
		t.Fatalf("malformed puts left %v", es)
	}
}

func list(t *testing.T, s Subject) {
	keys := []catalog.Key{
		vol("b"), vol("a"), vol("a-b"), catalog.VolumeKey(catalog.Observed, "a"), catalog.OperationKey("b", "1"), catalog.OperationKey("a", "2"),
		{Kind: "volumes", Part: catalog.Wanted, Name: "x"}, catalog.ImageKey(catalog.Wanted, "ü"), catalog.ClusterKey(),
	}
	var last catalog.Rev
	for _, k := range keys {
		last = mustPut(t, s, k, `{}`, 0)
	}
	names := func(kind catalog.Kind) (out []string) {
		es, rev, err := s.List(t.Context(), kind)
		must(t, err)
		if rev != last {
			t.Fatalf("list at revision %d, last put made %d", rev, last)
		}
		for _, e := range es {
			out = append(out, e.Key.String())
		}
		return out
	}
	if got, want := names(catalog.KindVolume), []string{"volume/observed/a", "volume/wanted/a", "volume/wanted/a-b", "volume/wanted/b"}; !slices.Equal(got, want) {
		t.Fatalf("volumes %v, want %v", got, want)
	}
	if got, want := names(catalog.KindOperation), []string{"operation/wanted/a/2", "operation/wanted/b/1"}; !slices.Equal(got, want) {
		t.Fatalf("operations %v, want %v", got, want)
	}
	all := names("")
	if len(all) != len(keys) || !slices.IsSorted(all) {
		t.Fatalf("everything: %v", all)
	}
}

func copies(t *testing.T, s Subject) {
	v := []byte(`"mine"`)
	_, err := s.Put(t.Context(), vol("a"), v, 0)
	must(t, err)
	v[1] = 'X'
	for range 2 {
		e, err := s.Get(t.Context(), vol("a"))
		must(t, err)
		if string(e.Value) != `"mine"` {
			t.Fatalf("value %s", e.Value)
		}
		e.Value[1] = 'Y'
		es, _, err := s.List(t.Context(), catalog.KindVolume)
		must(t, err)
		es[0].Value[1] = 'Z'
	}
}

func typed(t *testing.T, s Subject) {
	ctx, k := t.Context(), catalog.SettingKey("x")
	_, _, err := catalog.Read[catalog.Setting](ctx, s, k)
	wantErr(t, "read of nothing", err, catalog.ErrNotFound)
	_, _, err = catalog.Update(ctx, s, k, func(*catalog.Setting) error { return nil })
	wantErr(t, "update of nothing", err, catalog.ErrNotFound)
	_, r1, err := catalog.Upsert(ctx, s, k, func(v *catalog.Setting) error { v.Name, v.Value = "x", "1"; return nil })
	must(t, err)
	_, err = catalog.Write(ctx, s, k, catalog.Setting{}, 0)
	wantErr(t, "write as new", err, catalog.ErrConflict)
	_, r2, err := catalog.Update(ctx, s, k, func(*catalog.Setting) error { return nil })
	must(t, err)
	if r2 != r1 {
		t.Fatal("an update that changes nothing was written")
	}
	mine := errors.New("mine")
	_, _, err = catalog.Update(ctx, s, k, func(v *catalog.Setting) error { v.Value = "2"; return mine })
	wantErr(t, "update that fails", err, mine)
	calls := 0
	v, _, err := catalog.Update(ctx, s, k, func(v *catalog.Setting) error {
		if calls++; calls == 1 { // somebody is faster
			_, _, err := catalog.Update(ctx, s, k, func(v *catalog.Setting) error { v.Value += "2"; return nil })
			must(t, err)
		}
		v.Value += "3"
		return nil
	})
	must(t, err)
	if v.Value != "123" || calls != 2 {
		t.Fatalf("value %q after %d calls", v.Value, calls)
	}
	items, _, err := catalog.All[catalog.Setting](ctx, s, catalog.KindSetting, catalog.Wanted)
	must(t, err)
	if len(items) != 1 || items[0].Value != v {
		t.Fatalf("all: %v", items)
	}
}

func concurrentUpdates(t *testing.T, s Subject) {
	const workers, each = 8, 20
	var wg sync.WaitGroup
	errs := make([]error, workers)
	for w := range workers {
		wg.Go(func() {
			for range each {
				if _, _, err := catalog.Upsert(t.Context(), s, vol("n"), func(n *int) error { *n++; return nil }); err != nil {
					errs[w] = err
				}
			}
		})
	}
	wg.Wait()
	must(t, errors.Join(errs...))
	n, _, err := catalog.Read[int](t.Context(), s, vol("n"))
	must(t, err)
	if n != workers*each {
		t.Fatalf("%d increments, want %d", n, workers*each)
	}
}

// collect watches from and returns the first n changes.
func collect(t *testing.T, s Subject, from catalog.Rev, n int) []catalog.Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	enough := errors.New("enough")
	var got []catalog.Event
	err := s.Watch(ctx, from, func(ev catalog.Event) error {
		if got = append(got, ev); len(got) == n {
			return enough
		}
		return nil
	})
	wantErr(t, fmt.Sprintf("watch for %d changes, saw %d", n, len(got)), err, enough)
	return got
}

func watchOrder(t *testing.T, s Subject) {
	_, from, err := s.List(t.Context(), "")
	must(t, err)
	r1 := mustPut(t, s, vol("a"), `1`, 0)
	r2 := mustPut(t, s, vol("b"), `2`, 0)
	r3 := mustPut(t, s, vol("a"), `3`, r1)
	must(t, s.Delete(t.Context(), vol("b"), r2))
	got := collect(t, s, from, 4)
	for i, want := range []catalog.Entry{{Key: vol("a"), Value: []byte(`1`), Rev: r1}, {Key: vol("b"), Value: []byte(`2`), Rev: r2}, {Key: vol("a"), Value: []byte(`3`), Rev: r3}} {
		if g := got[i]; g.Key != want.Key || string(g.Value) != string(want.Value) || g.Rev != want.Rev {
			t.Fatalf("change %d is %s=%s at %d, want %s=%s at %d", i, g.Key, g.Value, g.Rev, want.Key, want.Value, want.Rev)
		}
	}
	if d := got[3]; d.Key != vol("b") || d.Value != nil || d.Rev <= r3 {
		t.Fatalf("deletion shown as %s=%q at %d", d.Key, d.Value, d.Rev)
	}
	_, now, err := s.List(t.Context(), "")
	must(t, err)
	if now != got[3].Rev {
		t.Fatalf("catalogue at %d, last change at %d", now, got[3].Rev)
	}
}

func watchResumes(t *testing.T, s Subject) {
	_, from, err := s.List(t.Context(), "")
	must(t, err)
	const n = 300
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for i := range n {
			if _, err := s.Put(t.Context(), vol(fmt.Sprint(i)), fmt.Append(nil, i), 0); err != nil {
				t.Error(err)
			}
		}
	})
	seen := 0
	for seen < n { // watch in short pieces, resuming at the last revision seen
		for _, ev := range collect(t, s, from, min(7, n-seen)) {
			if string(ev.Value) != fmt.Sprint(seen) || ev.Rev <= from {
				t.Fatalf("change %d is %s at %d, after %d", seen, ev.Value, ev.Rev, from)
			}
			from = ev.Rev
			seen++
		}
	}
}

func watchEnds(t *testing.T, s Subject) {
	_, from, err := s.List(t.Context(), "")
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { done <- s.Watch(ctx, from, func(catalog.Event) error { cancel(); return nil }) })
	mustPut(t, s, vol("a"), `1`, 0)
	select {
	case err := <-done:
		wantErr(t, "watch after its context ended", err, context.Canceled)
	case <-time.After(10 * time.Second):
		t.Fatal("watch outlives its context")
	}
}

func watchPrompt(t *testing.T, s Subject) {
	_, from, err := s.List(t.Context(), "")
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	seen := make(chan catalog.Rev, 1)
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Watch(ctx, from, func(ev catalog.Event) error { seen <- ev.Rev; return nil }) })
	defer wg.Wait()
	defer cancel()
	var was catalog.Rev
	for i := range 20 {
		was = mustPut(t, s, vol("a"), fmt.Sprint(i), was)
		select {
		case rev := <-seen:
			if rev != was {
				t.Fatalf("saw %d after putting %d", rev, was)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("a change was not seen within 5 s")
		}
	}
}

func compaction(t *testing.T, s Subject) {
	_, from, err := s.List(t.Context(), "")
	must(t, err)
	var was catalog.Rev
	for i := range 5 {
		was = mustPut(t, s, vol("a"), fmt.Sprint(i), was)
	}
	s.Compact(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	err = s.Watch(ctx, from, func(catalog.Event) error { return nil })
	wantErr(t, "watch from a forgotten revision", err, catalog.ErrCompacted)
	e, err := s.Get(t.Context(), vol("a"))
	must(t, err)
	if e.Rev != was {
		t.Fatalf("compaction changed the record's revision from %d to %d", was, e.Rev)
	}
	_, now, err := s.List(t.Context(), "")
	must(t, err)
	was = mustPut(t, s, vol("a"), `9`, was)
	if got := collect(t, s, now, 1); got[0].Rev != was {
		t.Fatalf("after listing again: %v", got)
	}
}

// listThenWatch: a list and a watch from its revision together miss nothing and show nothing twice, whatever goes on meanwhile.
func listThenWatch(t *testing.T, s Subject) {
	const n = 200
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for i := range n {
			if _, err := s.Put(t.Context(), vol(fmt.Sprint(i)), []byte(`0`), 0); err != nil {
				t.Error(err)
			}
		}
	})
	es, rev, err := s.List(t.Context(), catalog.KindVolume)
	must(t, err)
	seen := map[string]int{}
	for _, e := range es {
		seen[e.Key.Name]++
		if e.Rev > rev {
			t.Fatalf("list at %d shows a record of %d", rev, e.Rev)
		}
	}
	if len(es) < n {
		for _, ev := range collect(t, s, rev, n-len(es)) {
			seen[ev.Key.Name]++
		}
	}
	for i := range n {
		if seen[fmt.Sprint(i)] != 1 {
			t.Fatalf("record %d was seen %d times", i, seen[fmt.Sprint(i)])
		}
	}
}

func model(t *testing.T, s Subject) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	want := map[catalog.Key]catalog.Entry{}
	_, start, err := s.List(t.Context(), "")
	must(t, err)
	changes := 0
	for i := range 300 {
		k := vol(fmt.Sprint(rng.IntN(5)))
		was := want[k].Rev
		if rng.IntN(4) == 0 {
			was += catalog.Rev(rng.IntN(3) - 1)
		}
		if rng.IntN(3) > 0 {
			v := fmt.Appendf(nil, "%d", i)
			rev, err := s.Put(t.Context(), k, v, was)
			if (err == nil) != (was == want[k].Rev) {
				t.Fatalf("step %d: put %s if %d (is %d): %v", i, k, was, want[k].Rev, err)
			}
			if err == nil {
				want[k] = catalog.Entry{Key: k, Value: v, Rev: rev}
				changes++
			}
			continue
		}
		err := s.Delete(t.Context(), k, was)
		if (err == nil) != (want[k].Rev != 0 && was == want[k].Rev) {
			t.Fatalf("step %d: delete %s if %d (is %d): %v", i, k, was, want[k].Rev, err)
		}
		if err == nil {
			delete(want, k)
			changes++
		}
	}
	es, _, err := s.List(t.Context(), "")
	must(t, err)
	if len(es) != len(want) {
		t.Fatalf("%d records, want %d", len(es), len(want))
	}
	replay := map[catalog.Key]catalog.Entry{}
	for _, ev := range collect(t, s, start, changes) {
		if ev.Value == nil {
			delete(replay, ev.Key)
		} else {
			replay[ev.Key] = ev.Entry
		}
	}
	for _, e := range es {
		for what, m := range map[string]map[catalog.Key]catalog.Entry{"model": want, "watch": replay} {
			if w := m[e.Key]; string(w.Value) != string(e.Value) || w.Rev != e.Rev {
				t.Fatalf("%s: list has %s at %d, the %s %s at %d", e.Key, e.Value, e.Rev, what, w.Value, w.Rev)
			}
		}
	}
}

func closing(t *testing.T, s Subject) {
	_, from, err := s.List(t.Context(), "")
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	up := make(chan struct{}, 1)
	done := make(chan error, 1)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { done <- s.Watch(ctx, from, func(catalog.Event) error { up <- struct{}{}; return nil }) })
	mustPut(t, s, vol("a"), `1`, 0)
	<-up
	must(t, s.Close())
	wantErr(t, "watch over a close", <-done, catalog.ErrUnreachable)
	_, err = s.Get(ctx, vol("a"))
	wantErr(t, "get after close", err, catalog.ErrUnreachable)
	_, err = s.Put(ctx, vol("a"), []byte(`1`), 0)
	wantErr(t, "put after close", err, catalog.ErrUnreachable)
	_, _, err = s.List(ctx, "")
	wantErr(t, "list after close", err, catalog.ErrUnreachable)
	wantErr(t, "delete after close", s.Delete(ctx, vol("a"), 1), catalog.ErrUnreachable)
	wantErr(t, "watch after close", s.Watch(ctx, from, func(catalog.Event) error { return nil }), catalog.ErrUnreachable)
}

func cancelled(t *testing.T, s Subject) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Get(ctx, vol("a"))
	wantErr(t, "get", err, context.Canceled)
	_, err = s.Put(ctx, vol("a"), []byte(`1`), 0)
	wantErr(t, "put", err, context.Canceled)
	_, _, err = s.List(ctx, "")
	wantErr(t, "list", err, context.Canceled)
	wantErr(t, "watch", s.Watch(ctx, 0, func(catalog.Event) error { return nil }), context.Canceled)
	_, err = s.Get(t.Context(), vol("a"))
	wantErr(t, "a cancelled context starts nothing", err, catalog.ErrNotFound)
}

// follow: a copy kept by Follow becomes equal, over a compaction too.
func follow(t *testing.T, s Subject) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r := mustPut(t, s, vol("a"), `1`, 0)
	copied := map[catalog.Key]catalog.Rev{}
	seen := make(chan map[catalog.Key]catalog.Rev)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		_ = catalog.Follow(ctx, s, func(b catalog.Batch) error {
			if b.Reset {
				clear(copied)
			}
			for _, ev := range b.Events {
				copied[ev.Key] = ev.Rev
				if ev.Value == nil {
					delete(copied, ev.Key)
				}
			}
			m := map[catalog.Key]catalog.Rev{}
			for k, r := range copied {
				m[k] = r
			}
			select {
			case seen <- m:
			case <-ctx.Done():
			}
			return nil
		})
	})
	until := func(what string, ok func(map[catalog.Key]catalog.Rev) bool) {
		t.Helper()
		for {
			select {
			case m := <-seen:
				if ok(m) {
					return
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("follow never showed %s", what)
			}
		}
	}
	until("what was there", func(m map[catalog.Key]catalog.Rev) bool { return m[vol("a")] == r })
	r = mustPut(t, s, vol("a"), `2`, r)
	until("a change", func(m map[catalog.Key]catalog.Rev) bool { return m[vol("a")] == r })
	must(t, s.Delete(t.Context(), vol("a"), r))
	until("a deletion", func(m map[catalog.Key]catalog.Rev) bool { return m[vol("a")] == 0 })
}

func note(t *testing.T, s Subject) {
	now := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	ev := catalog.EventRecord{Time: now, Type: catalog.Normal, Kind: catalog.KindVolume, Name: "a", Reason: "Attached", Message: "to n1"}
	must(t, catalog.Note(t.Context(), s, ev))
	ev.Time = now.Add(time.Minute)
	must(t, catalog.Note(t.Context(), s, ev))
	ev.Reason = "Detached"
	must(t, catalog.Note(t.Context(), s, ev))
	items, _, err := catalog.All[catalog.EventRecord](t.Context(), s, catalog.KindEvent, catalog.Wanted)
	must(t, err)
	counts := map[string]int{}
	for _, it := range items {
		counts[it.Value.Reason] = it.Value.Count
		if it.Value.ID != it.Key.Name || it.Value.Time.Before(ev.Time) {
			t.Fatalf("event %+v", it)
		}
	}
	if len(items) != 2 || counts["Attached"] != 2 || counts["Detached"] != 1 {
		t.Fatalf("events %v", items)
	}
}

// holding holds a record until its end is called, which returns what Hold returned.
func holding(t *testing.T, s Subject, k catalog.Key, value string) (rev catalog.Rev, end func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	held := make(chan catalog.Rev, 2)
	done := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		done <- s.Hold(ctx, catalog.Holding{Key: k, Value: []byte(value), TTL: 2 * time.Second}, func(r catalog.Rev) { held <- r })
	})
	select {
	case rev = <-held:
	case err := <-done:
		t.Fatalf("hold %s: %v", k, err)
	case <-time.After(10 * time.Second):
		t.Fatalf("hold %s: not held after 10 s", k)
	}
	return rev, func() error {
		cancel()
		wg.Wait()
		if len(held) > 0 {
			t.Errorf("held was called twice")
		}
		return <-done
	}
}

// hold: the record is there as long as the call lasts, and longer than its ttl.
func hold(t *testing.T, s Subject) {
	k := catalog.AliveKey("n1")
	for _, v := range []string{"", "{"} {
		err := s.Hold(t.Context(), catalog.Holding{Key: k, Value: []byte(v), TTL: time.Second}, func(catalog.Rev) { t.Error("held") })
		wantErr(t, "hold of value "+v, err, catalog.ErrKey)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	wantErr(t, "hold with a context that ended", s.Hold(ended, catalog.Holding{Key: k, Value: []byte(`1`), TTL: time.Second}, func(catalog.Rev) { t.Error("held") }), context.Canceled)

	old := mustPut(t, s, k, `"somebody's"`, 0)
	rev, end := holding(t, s, k, `1`)
	if got := collect(t, s, old, 1); got[0].Key != k || string(got[0].Value) != `1` || got[0].Rev != rev {
		t.Fatalf("holding shows as %v, held says %d", got, rev)
	}
	<-time.After(2500 * time.Millisecond) // its ttl is 2 s
	e, err := s.Get(t.Context(), k)
	must(t, err)
	if string(e.Value) != `1` || e.Rev != rev {
		t.Fatalf("the record is %s at %d, held at %d", e.Value, e.Rev, rev)
	}
	wantErr(t, "hold after its context ended", end(), context.Canceled)
	_, err = s.Get(t.Context(), k)
	wantErr(t, "get after the hold ended", err, catalog.ErrNotFound)
	if got := collect(t, s, rev, 1); got[0].Key != k || got[0].Value != nil {
		t.Fatalf("the end shows as %v", got)
	}
	_, end = holding(t, s, k, `2`)
	wantErr(t, "hold again", end(), context.Canceled)
}

// holdTwice: a second holder replaces the record, and the first one's end leaves it alone.
func holdTwice(t *testing.T, s Subject) {
	k := catalog.AliveKey("n1")
	r1, end1 := holding(t, s, k, `1`)
	r2, end2 := holding(t, s, k, `2`)
	if r2 <= r1 {
		t.Fatalf("revisions %d, then %d", r1, r2)
	}
	_, other := holding(t, s, catalog.AliveKey("n2"), `3`)
	wantErr(t, "first hold after its context ended", end1(), context.Canceled)
	e, err := s.Get(t.Context(), k)
	must(t, err)
	if string(e.Value) != `2` || e.Rev != r2 {
		t.Fatalf("the first holder's end made the second one's record %s at %d", e.Value, e.Rev)
	}
	wantErr(t, "second hold after its context ended", end2(), context.Canceled)
	_, err = s.Get(t.Context(), k)
	wantErr(t, "get after both ended", err, catalog.ErrNotFound)
	if _, err := s.Get(t.Context(), catalog.AliveKey("n2")); err != nil {
		t.Fatalf("another record: %v", err)
	}
	wantErr(t, "third hold", other(), context.Canceled)
}

func holdClosed(t *testing.T, s Subject) {
	held := make(chan catalog.Rev, 1)
	done := make(chan error, 1)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		done <- s.Hold(t.Context(), catalog.Holding{Key: catalog.AliveKey("n1"), Value: []byte(`1`), TTL: time.Second}, func(r catalog.Rev) { held <- r })
	})
	<-held
	must(t, s.Close())
	select {
	case err := <-done:
		wantErr(t, "hold of a closed catalogue", err, catalog.ErrUnreachable)
	case <-time.After(10 * time.Second):
		t.Fatal("hold outlives its catalogue")
	}
}
