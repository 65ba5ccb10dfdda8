package volume_test

import (
	"context"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
	"ashlar/internal/volume"
	"ashlar/internal/volume/ledgertest"
)

// null is a copy whose I/O does nothing: what is measured over it is the engine alone.
type null struct {
	replica.Replica
	size  int64
	chain replica.Chain
	rec   replica.Record
	w     replica.Writer
}

func (n *null) ReadAt(p []byte, _ int64) (int, error)           { return len(p), nil }
func (n *null) WriteAt(p []byte, _ int64) (int, error)          { return len(p), nil }
func (n *null) Flush() error                                    { return nil }
func (n *null) Zero(int64, int64) error                         { return nil }
func (n *null) Size() int64                                     { return n.size }
func (n *null) Close() error                                    { return nil }
func (n *null) Fence(_ context.Context, w replica.Writer) error { n.w = w; return nil }
func (n *null) Confirm(context.Context, replica.Writer) error   { return nil }
func (n *null) Keep(_ context.Context, _ replica.Writer, r replica.Record) error {
	n.rec = r
	return nil
}
func (n *null) Status(context.Context) (replica.Status, error) {
	return replica.Status{Writer: n.w, Record: n.rec, Chain: n.chain, BootID: "b"}, nil
}

func openNull(tb testing.TB) *volume.Volume {
	tb.Helper()
	chain := replica.Chain{Generation: 1, SizeBytes: 64 * mib, Layers: []replica.LayerID{head}}
	l := ledgertest.NewMem()
	if _, err := l.Swap(tb.Context(), volume.NewRecord(volumeID, []replica.Member{{ReplicaID: replicaID}}, chain, time.Now()), 0); err != nil {
		tb.Fatal(err)
	}
	v, err := volume.Open(tb.Context(), volume.Config{VolumeID: volumeID, Name: "b", Node: node, BootID: "b", Ledger: l,
		Replicas: []volume.Member{{ID: replicaID, Replica: &null{size: 64 * mib, chain: chain}}}})
	if err != nil {
		tb.Fatal(err)
	}
	return v
}

// TestNoAllocations: the hot path of the engine allocates nothing.
func TestNoAllocations(t *testing.T) {
	d := openNull(t).Device()
	p := make([]byte, block.UnitBytes)
	for what, f := range map[string]func() error{
		"read":          func() error { _, err := d.ReadAt(p, 8192); return err },
		"write":         func() error { _, err := d.WriteAt(p, 8192); return err },
		"partial write": func() error { _, err := d.WriteAt(p[:512], 8192+512); return err },
		"zero":          func() error { return d.Zero(8192, 8192) },
		"flush":         d.Flush,
	} {
		if n := testing.AllocsPerRun(500, func() {
			if err := f(); err != nil {
				t.Fatal(err)
			}
		}); n >= 1 { // a pool may be emptied once in a while
			t.Errorf("%s: %v allocations", what, n)
		}
	}
}

func BenchmarkEngineRead(b *testing.B)  { benchEngine(b, false) }
func BenchmarkEngineWrite(b *testing.B) { benchEngine(b, true) }

func benchEngine(b *testing.B, write bool) {
	d := openNull(b).Device()
	p := make([]byte, block.UnitBytes)
	b.ReportAllocs()
	for i := range b.N {
		var err error
		off := int64(i%1000) * block.UnitBytes
		if write {
			_, err = d.WriteAt(p, off)
		} else {
			_, err = d.ReadAt(p, off)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}
