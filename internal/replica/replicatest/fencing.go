package replicatest

import (
	"bytes"
	"errors"
	"sync"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// wantFenced checks that no I/O and no verb of r, said as w, gets anywhere.
func (g *rig) wantFenced(r replica.Replica, w replica.Writer, when string) {
	g.Helper()
	unit := make([]byte, block.UnitBytes)
	_, err := r.ReadAt(unit, 0)
	g.want(err, block.ErrFenced, when+": read")
	_, err = r.WriteAt(unit, 0)
	g.want(err, block.ErrFenced, when+": write")
	g.want(r.Zero(0, block.UnitBytes), block.ErrFenced, when+": zero")
	g.want(r.Flush(), block.ErrFenced, when+": flush")
	_, err = r.Extents(0, block.UnitBytes)
	g.want(err, block.ErrFenced, when+": extents")
	g.want(r.Confirm(g.ctx, w), block.ErrFenced, when+": confirm")
	g.want(r.Keep(g.ctx, w, record(w, 1000, g.chain)), block.ErrFenced, when+": keep")
	c := g.snapshotChange("by an old writer")
	g.want(r.Prepare(g.ctx, w, c, nil), block.ErrFenced, when+": prepare")
	g.want(r.Change(g.ctx, w, c), block.ErrFenced, when+": change")
	g.want(r.SetSnapshot(g.ctx, w, head, *meta("x")), block.ErrFenced, when+": set snapshot")
	g.want(r.Purge(g.ctx, w, nil), block.ErrFenced, when+": purge")
}

func checkNotFenced(g *rig) {
	r := g.cp.Connect(g)
	g.wantFenced(r, replica.Writer{Epoch: 2, Session: 1}, "a connection that was never let in")
	g.must(r.Close(), "close")
	g.must(g.r.Confirm(g.ctx, g.w), "confirm of the writer that is")
}

func checkFenceOrder(g *rig) {
	for _, w := range []replica.Writer{{Epoch: 5, Session: 3}, {Epoch: 5, Session: 3}, {Epoch: 5, Session: 4}, {Epoch: 6, Session: 1}} {
		g.must(g.r.Fence(g.ctx, w), "fence")
		g.must(g.r.Confirm(g.ctx, w), "confirm")
		g.w = w
	}
	other := g.cp.Connect(g)
	for _, w := range []replica.Writer{{Epoch: 6, Session: 0}, {Epoch: 5, Session: 9}, {Epoch: 1, Session: 1}, {}} {
		g.want(g.r.Fence(g.ctx, w), block.ErrFenced, "fence with an older writer")
		g.want(g.r.Confirm(g.ctx, w), block.ErrFenced, "confirm of an older writer")
		g.want(other.Fence(g.ctx, w), block.ErrFenced, "fence of another connection with an older writer")
		g.fill(2, 0, 1) // and nothing happened to this one
	}
	g.must(other.Close(), "close")
	g.want(g.r.Confirm(g.ctx, replica.Writer{Epoch: 7, Session: 1}), block.ErrFenced, "confirm of a writer that was never let in")
	g.fill(1, 0, 1)
	if got := g.status().Writer; got != g.w {
		g.Errorf("writer is %+v, want %+v", got, g.w)
	}
}

func checkFenceEndsOlder(g *rig) {
	g.fill(7, 3, 2)
	old, oldW := g.r, g.w
	for _, w := range []replica.Writer{{Epoch: 1, Session: 2}, {Epoch: 2, Session: 1}} {
		g.r, g.w = g.connect(w), w
		g.wantFenced(old, oldW, "after a newer writer")
		g.want(old.Fence(g.ctx, oldW), block.ErrFenced, "fence again with the old writer")
		g.wantFenced(old, w, "the new writer's verbs on the old connection")
		g.wantFill(g.r, 7, 3, 2)
		old, oldW = g.r, w
	}
	g.fill(8, 3, 2)
	g.wantChain()
}

// checkFenceWaits has old writers write all the time while a new one comes: nothing of theirs arrives after the answer.
func checkFenceWaits(g *rig) {
	for epoch := uint64(2); epoch < 12; epoch++ {
		old := g.r
		var writers sync.WaitGroup
		begun := make(chan struct{}, 8)
		for u := range int64(4) {
			writers.Go(func() {
				for i := 0; ; i++ {
					_, err := old.WriteAt(bytes.Repeat([]byte{byte(i)}, 2*block.UnitBytes), u*2*block.UnitBytes)
					if i == 3 || err != nil {
						begun <- struct{}{}
					}
					if err != nil {
						if !errors.Is(err, block.ErrFenced) {
							g.Errorf("old writer: %v", err)
						}
						return
					}
				}
			})
		}
		for range 4 {
			<-begun
		}
		g.w = replica.Writer{Epoch: epoch, Session: 1}
		g.r = g.connect(g.w)
		for u := range int64(4) {
			g.fill(0xaa, u*2, 2)
		}
		writers.Wait()
		g.wantFill(g.r, 0xaa, 0, 8)
	}
}

func checkFenceDurable(g *rig) {
	g.w = replica.Writer{Epoch: 9, Session: 4}
	g.must(g.r.Fence(g.ctx, g.w), "fence")
	g.cp.Restart(g)
	r := g.cp.Connect(g)
	st, err := r.Status(g.ctx)
	g.must(err, "status")
	if st.Writer != g.w {
		g.Errorf("after a restart the writer is %+v, want %+v", st.Writer, g.w)
	}
	g.want(r.Fence(g.ctx, replica.Writer{Epoch: 9, Session: 3}), block.ErrFenced, "fence with an older session after a restart")
	g.want(r.Fence(g.ctx, replica.Writer{Epoch: 8, Session: 9}), block.ErrFenced, "fence with an older epoch after a restart")
	g.must(r.Fence(g.ctx, g.w), "fence with the same writer after a restart")
	g.must(r.Close(), "close")
}

// checkSameWriterElsewhere: two connections never both serve one writer.
func checkSameWriterElsewhere(g *rig) {
	other := g.connect(g.w)
	g.wantFenced(g.r, g.w, "after another connection was let in as the same writer")
	g.want(g.r.Fence(g.ctx, g.w), block.ErrFenced, "taking it back with the same writer")
	g.r = other
	g.fill(1, 0, 1)
}

func checkKeep(g *rig) {
	rec := record(g.w, 5, g.chain)
	g.must(g.r.Keep(g.ctx, g.w, rec), "keep")
	g.must(g.r.Keep(g.ctx, g.w, rec), "keep again")
	same := rec
	same.WriterNode = "n2"
	g.want(g.r.Keep(g.ctx, g.w, same), replica.ErrStale, "another record of the same generation")
	older := rec
	older.Generation = 4
	g.want(g.r.Keep(g.ctx, g.w, older), replica.ErrStale, "an older generation")
	foreign := rec
	foreign.VolumeID, foreign.Generation = "another volume", 6
	g.want(g.r.Keep(g.ctx, g.w, foreign), replica.ErrChain, "a record of another volume")
	if got := g.status().Record; !got.Equal(rec) {
		g.Errorf("kept %+v, want %+v", got, rec)
	}
	g.w = replica.Writer{Epoch: 2, Session: 1}
	g.must(g.r.Fence(g.ctx, g.w), "fence")
	next := record(g.w, 1, g.chain)
	g.must(g.r.Keep(g.ctx, g.w, next), "a lower generation of a higher epoch")
	rec.Generation = 99
	g.want(g.r.Keep(g.ctx, g.w, rec), replica.ErrStale, "a higher generation of an older epoch")
}

func checkKeepDurable(g *rig) {
	rec := record(g.w, 5, g.chain)
	c := g.snapshotChange("pending")
	rec.Pending = &c
	g.must(g.r.Keep(g.ctx, g.w, rec), "keep")
	g.restart()
	if got := g.status().Record; !got.Equal(rec) {
		g.Errorf("after a restart the record is %+v, want %+v", got, rec)
	}
}

// checkOldWriter: every verb of a writer that is not the one is refused and changes nothing.
func checkOldWriter(g *rig) {
	g.fill(1, 0, 4)
	id := g.snapshot("one")
	g.fill(2, 0, 4)
	before := g.status()
	for _, w := range []replica.Writer{{Epoch: 1, Session: 0}, {Epoch: 0, Session: 1}, {Epoch: 1, Session: 2}, {Epoch: 2, Session: 1}} {
		c := g.snapshotChange("two")
		g.want(g.r.Prepare(g.ctx, w, c, nil), block.ErrFenced, "prepare")
		g.want(g.r.Change(g.ctx, w, c), block.ErrFenced, "change")
		g.want(g.r.SetSnapshot(g.ctx, w, id, *meta("renamed")), block.ErrFenced, "set snapshot")
		g.want(g.r.Purge(g.ctx, w, nil), block.ErrFenced, "purge")
		g.want(g.r.Keep(g.ctx, w, record(w, 9, g.chain)), block.ErrFenced, "keep")
	}
	after := g.status()
	if !after.Chain.Equal(before.Chain) || after.Writer != before.Writer || len(after.Layers) != len(before.Layers) || g.layer(id).Snapshot.Name != "one" {
		g.Errorf("refused verbs changed the copy from %+v to %+v", before, after)
	}
	g.wantFill(g.r, 2, 0, 4)
}
