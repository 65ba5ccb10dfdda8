package catalog_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/catalog/catalogtest"
)

func TestMem(t *testing.T) {
	catalogtest.Run(t, func(*testing.T) catalogtest.Subject {
		m := catalog.NewMem()
		return catalogtest.Subject{Catalog: m, Compact: func(*testing.T) { m.Compact() }}
	})
}

// A follower tells that the catalogue is away, and goes on where it was when it is back; over a compaction it starts again.
func TestFollowAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		m := catalog.NewMem()
		got := make(chan catalog.Batch, 100)
		done := make(chan error, 1)
		go func() {
			done <- catalog.Follow(ctx, m, func(b catalog.Batch) error { got <- b; return nil })
		}()
		put := func() {
			if _, _, err := catalog.Upsert(ctx, m, catalog.VolumeKey(catalog.Wanted, "a"), func(n *int) error { *n++; return nil }); err != nil {
				t.Fatal(err)
			}
		}
		expect := func(what string, want ...catalog.Batch) {
			t.Helper()
			synctest.Wait()
			if len(got) < len(want) {
				t.Fatalf("%s: %d batches, want %d", what, len(got), len(want))
			}
			for i, w := range want {
				g := <-got
				if g.Reset != w.Reset || g.Away != w.Away || len(g.Events) != len(w.Events) || g.Rev != w.Rev {
					t.Fatalf("%s: batch %d is %+v, want %+v", what, i, g, w)
				}
			}
		}
		one := make([]catalog.Event, 1)
		expect("at first", catalog.Batch{Reset: true})
		put()
		expect("a change", catalog.Batch{Events: one, Rev: 1})
		m.Away(true)
		expect("away", catalog.Batch{Away: true, Rev: 1})
		<-time.After(time.Minute)
		if synctest.Wait(); len(got) != 0 {
			t.Fatal("said again that it is away")
		}
		m.Away(false)
		<-time.After(2 * time.Second)
		expect("back", catalog.Batch{Reset: true, Events: one, Rev: 1})
		put()
		expect("a change after that", catalog.Batch{Events: one, Rev: 2})
		m.Away(true)
		synctest.Wait()
		m.Away(false)
		put()
		m.Compact()
		synctest.Wait()
		<-got // away
		<-time.After(2 * time.Second)
		expect("compacted meanwhile", catalog.Batch{Reset: true, Events: one, Rev: 3})
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	})
}

func TestKeys(t *testing.T) {
	for _, k := range []catalog.Key{
		catalog.VolumeKey(catalog.Observed, "a"), catalog.ImageKey(catalog.Wanted, "a"), catalog.NodeKey(catalog.Wanted, "n"), catalog.OperationKey("v", "1"),
		catalog.MembershipKey("0"), catalog.SettingKey("s"), catalog.EventKey("e"), catalog.ClusterKey(),
	} {
		got, err := catalog.ParseKey(k.String())
		if err != nil || got != k {
			t.Errorf("%v came back as %v, %v", k, got, err)
		}
	}
	for _, s := range []string{"", "volume", "volume/wanted", "volume/wanted/", "volume/other/a", "volume/wanted/a/b/c"} {
		if k, err := catalog.ParseKey(s); !errors.Is(err, catalog.ErrKey) {
			t.Errorf("%q parsed as %v, %v", s, k, err)
		}
	}
}
