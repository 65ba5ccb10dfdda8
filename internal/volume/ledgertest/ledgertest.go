package ledgertest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"ashlar/internal/replica"
	"ashlar/internal/volume"
)

// Config says how to make a Ledger to check.
type Config struct {
	// New returns a Ledger over an empty catalogue, and what puts a volume's first record there, as the control plane does.
	New func(t testing.TB) (l volume.Ledger, create func(rec replica.Record))
	// Cut, if set, makes the catalogue unreachable for the Ledger that New returned last, until the function it returns is called.
	Cut func(t testing.TB) (mend func())
}

// Run checks a Ledger.
func Run(t *testing.T, c Config) {
	t.Run("NoRecord", c.noRecord)
	t.Run("RoundTrip", c.roundTrip)
	t.Run("Swap", c.swap)
	t.Run("Race", c.race)
	t.Run("Volumes", c.volumes)
	t.Run("Cancelled", c.cancelled)
	t.Run("Unreachable", c.unreachable)
}

func want(t testing.TB, err, target error, what string) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Fatalf("%s: error %v, want one that is %q", what, err, target)
	}
}

// full is a record in which every field says something.
func full(id string) replica.Record {
	meta := &replica.SnapshotMeta{Name: `a "name" with ünïcode`, UserCreated: true, Removed: true, Created: time.Date(2026, 2, 3, 4, 5, 6, 789, time.UTC),
		Labels: map[string]string{"k": "v", "empty": ""}}
	layers := []replica.LayerID{replica.LayerID(strings.Repeat("a", 32)), replica.LayerID(strings.Repeat("b", 32))}
	return replica.Record{VolumeID: id, Epoch: 1<<63 + 7, Opened: 1<<63 + 6, Generation: 1<<53 + 1, WriterNode: "node-1", WriterBoot: "boot-1",
		Members: []replica.Member{{ReplicaID: "r1", Node: "n1", InSync: true, Incarnation: "b1"}, {ReplicaID: "r2", Node: "n2", Failed: "why\nso"}},
		Chain:   replica.Chain{Generation: 3, SizeBytes: 15 << 40, Layers: layers, Base: "c"},
		Pending: &replica.Change{Verb: replica.VerbMerge, Chain: replica.Chain{Generation: 4, SizeBytes: 15 << 40, Layers: layers[:1]}, Snapshot: meta,
			Merge: &replica.Merge{Lower: layers[1], Upper: layers[0], Into: "d"}},
		LastChange: time.Date(2026, 1, 2, 3, 4, 5, 123456789, time.UTC)}
}

func (c Config) noRecord(t *testing.T) {
	l, _ := c.New(t)
	_, _, err := l.Read(t.Context(), "nobody")
	want(t, err, volume.ErrNoRecord, "read of a volume that is not there")
	_, err = l.Swap(t.Context(), full("nobody"), 12345)
	if !errors.Is(err, volume.ErrNoRecord) && !errors.Is(err, volume.ErrConflict) {
		t.Errorf("swap of a record that is not there: %v", err)
	}
}

func (c Config) roundTrip(t *testing.T) {
	l, create := c.New(t)
	rec := full("v1")
	create(rec)
	got, rev, err := l.Read(t.Context(), "v1")
	if err != nil || rev == 0 {
		t.Fatalf("read: revision %d, %v", rev, err)
	}
	if !got.Equal(rec) {
		t.Errorf("read %+v\nwant %+v", got, rec)
	}
	rec.Pending = nil
	rec.Generation++
	next, err := l.Swap(t.Context(), rec, rev)
	if err != nil || next == rev || next == 0 {
		t.Fatalf("swap: revision %d after %d, %v", next, rev, err)
	}
	got, again, err := l.Read(t.Context(), "v1")
	if err != nil || again != next || !got.Equal(rec) {
		t.Errorf("read after a swap: %+v, revision %d, %v", got, again, err)
	}
}

func (c Config) swap(t *testing.T) {
	l, create := c.New(t)
	rec := full("v1")
	create(rec)
	_, rev, err := l.Read(t.Context(), "v1")
	if err != nil {
		t.Fatal(err)
	}
	_, err = l.Swap(t.Context(), rec, 0)
	want(t, err, volume.ErrConflict, "swap as if there were no record")
	rec.Epoch++
	second, err := l.Swap(t.Context(), rec, rev)
	if err != nil {
		t.Fatal(err)
	}
	stale := rec
	stale.WriterNode = "somebody else"
	_, err = l.Swap(t.Context(), stale, rev)
	want(t, err, volume.ErrConflict, "swap of an old revision")
	if got, now, err := l.Read(t.Context(), "v1"); err != nil || now != second || !got.Equal(rec) {
		t.Errorf("a refused swap left %+v at revision %d, %v", got, now, err)
	}
}

// race has several swap the same record: at each revision one wins, and nobody's win is lost.
func (c Config) race(t *testing.T) {
	l, create := c.New(t)
	first := full("v1")
	first.Generation = 0
	create(first)
	const swappers, wins = 4, 20
	var all sync.WaitGroup
	for i := range swappers {
		all.Go(func() {
			for won := 0; won < wins; {
				rec, rev, err := l.Read(t.Context(), "v1")
				if err != nil {
					t.Error(err)
					return
				}
				rec.Generation++
				rec.WriterNode = fmt.Sprint("swapper ", i)
				switch _, err := l.Swap(t.Context(), rec, rev); {
				case err == nil:
					won++
				case !errors.Is(err, volume.ErrConflict):
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	rec, _, err := l.Read(t.Context(), "v1")
	if err != nil || rec.Generation != swappers*wins {
		t.Errorf("generation %d after %d swaps, %v", rec.Generation, swappers*wins, err)
	}
}

func (c Config) volumes(t *testing.T) {
	l, create := c.New(t)
	one, two := full("v1"), full("v2")
	create(one)
	create(two)
	_, rev, err := l.Read(t.Context(), "v1")
	if err != nil {
		t.Fatal(err)
	}
	one.Epoch++
	if _, err := l.Swap(t.Context(), one, rev); err != nil {
		t.Fatal(err)
	}
	if got, _, err := l.Read(t.Context(), "v2"); err != nil || !got.Equal(two) {
		t.Errorf("a swap of one volume left the other %+v, %v", got, err)
	}
}

func (c Config) cancelled(t *testing.T) {
	l, create := c.New(t)
	rec := full("v1")
	create(rec)
	_, rev, err := l.Read(t.Context(), "v1")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := l.Read(ctx, "v1"); err == nil {
		t.Error("a read with a cancelled context succeeded")
	}
	if _, err := l.Swap(ctx, rec, rev); !errors.Is(err, volume.ErrUnreachable) {
		t.Errorf("a swap with a cancelled context: %v, want ErrUnreachable: it may have happened", err)
	}
}

func (c Config) unreachable(t *testing.T) {
	if c.Cut == nil {
		t.Skip("this Ledger cannot be cut off")
	}
	l, create := c.New(t)
	rec := full("v1")
	create(rec)
	_, rev, err := l.Read(t.Context(), "v1")
	if err != nil {
		t.Fatal(err)
	}
	mend := c.Cut(t)
	_, _, err = l.Read(t.Context(), "v1")
	want(t, err, volume.ErrUnreachable, "read while cut off")
	rec.Epoch++
	_, err = l.Swap(t.Context(), rec, rev)
	want(t, err, volume.ErrUnreachable, "swap while cut off")
	mend()
	got, rev, err := l.Read(t.Context(), "v1")
	if err != nil {
		t.Fatalf("read after the cut: %v", err)
	}
	got.Epoch = 1<<63 + 9
	if _, err := l.Swap(t.Context(), got, rev); err != nil {
		t.Fatalf("swap after the cut: %v", err)
	}
}
