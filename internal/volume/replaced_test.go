package volume_test

import (
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/replica"
	"ashlar/internal/volume"
	"ashlar/internal/volume/ledgertest"
)

const replacement = "fedcba9876543210fedcba9876543210"

// TestReplace: the volume ends with the swap, also if its answer is lost; its copy was told, and opens it no more. Where the swap cannot be, or is not known to have been, the volume is as it was.
func TestReplace(t *testing.T) {
	to := replica.Member{ReplicaID: replacement, Node: "node-2", Incarnation: "boot-2"}
	for what, s := range map[string]struct {
		fault ledgertest.Fault
		edit  func(c *replica.Chain)
		other bool // somebody opens the volume meanwhile
		want  error
	}{
		"it goes well":              {fault: ledgertest.OK},
		"the answer is lost":        {fault: ledgertest.LostAfter},
		"the question is lost":      {fault: ledgertest.LostBefore, want: volume.ErrUnreachable},
		"another chain":             {edit: func(c *replica.Chain) { c.Generation++ }, want: replica.ErrChain},
		"somebody opens the volume": {other: true, want: block.ErrFenced},
	} {
		t.Run(what, func(t *testing.T) {
			g := newRig(t, 1<<20, disk.MemOptions{})
			g.open()
			g.fill(1, 0, 8192)
			before, err := g.v.Status(g.ctx)
			g.must(err, "status")
			chain := before.Record.Chain
			if s.edit != nil {
				s.edit(&chain)
			}
			if s.other {
				o, err := volume.Open(g.ctx, g.config())
				g.must(err, "open elsewhere")
				defer o.Close(g.ctx) //nolint:errcheck // the replica goes first
			}
			g.ledger.OnCall(func(c ledgertest.Call) ledgertest.Fault {
				if !c.Swap || c.Rec.Members[0].ReplicaID != replacement {
					return ledgertest.OK
				}
				return s.fault
			})
			rec, err := g.v.Replace(g.ctx, to, chain)
			g.ledger.OnCall(nil)
			now, _, readErr := g.ledger.Read(g.ctx, volumeID)
			g.must(readErr, "read")
			if s.want != nil {
				g.want(err, s.want, "replace")
				if now.Members[0].ReplicaID != replicaID {
					t.Errorf("the record names %+v", now.Members)
				}
				if s.other {
					g.must(g.v.Close(g.ctx), "close")
					return
				}
				g.fill(2, 0, 4096)
				g.close()
				g.open()
				g.close()
				return
			}
			g.must(err, "replace")
			if !now.Equal(rec) || now.Members[0].ReplicaID != replacement || now.WriterNode != "" || now.Epoch != before.Record.Epoch {
				t.Errorf("the record is %+v, and %+v was said", now, rec)
			}
			if _, err := g.v.Device().WriteAt(make([]byte, 4096), 0); err == nil {
				t.Error("it is written to")
			}
			kept, err := g.r.Status()
			g.must(err, "status of the old copy")
			if !kept.Record.Equal(now) {
				t.Errorf("the old copy keeps %+v", kept.Record)
			}
			g.close()
			if after, _, err := g.ledger.Read(g.ctx, volumeID); err != nil || !after.Equal(now) {
				t.Errorf("closing it made %+v (%v)", after, err)
			}
			g.want(g.tryOpen(), volume.ErrInvalid, "the old copy is no member")
			g.want(g.tryOpen(resume), volume.ErrInvalid, "the old copy is no member")
		})
	}
}

// TestReplaceSilent: a copy whose node goes away right after the swap, and does not come back because it is in charge of nothing any more, is not waited for.
func TestReplaceSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, 1<<20, disk.MemOptions{})
		var c *farCopy
		g.open(far(&c))
		before, err := g.v.Status(g.ctx)
		g.must(err, "status")
		g.ledger.OnCall(func(call ledgertest.Call) ledgertest.Fault {
			if call.Swap {
				c.set(func() { c.silent = make(chan struct{}) })
			}
			return ledgertest.OK
		})
		began := time.Now()
		rec, err := g.v.Replace(g.ctx, replica.Member{ReplicaID: replacement, Node: "node-2", Incarnation: "boot-2"}, before.Record.Chain)
		g.must(err, "replace")
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("it took %v", took)
		}
		if now := g.record(); !now.Equal(rec) || now.Members[0].ReplicaID != replacement {
			t.Errorf("the record is %+v, and %+v was said", now, rec)
		}
		g.close()
	})
}
