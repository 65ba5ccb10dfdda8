package volume

import (
	"context"
	"fmt"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// farewell is how long a copy that was replaced may take to hear it. Its node may be gone for good by then: nothing of the volume is there any more, which is what whoever removes it waits for.
const farewell = 3 * time.Second

// Replace ends the volume by putting another copy in the place of its own (docs/decisions/0017): one swap, after which the record names to instead, in sync, and nobody as its writer. to has, durably, all
// that this volume's copy has, and chain: replica.ErrChain if that is not the record's. The caller has written nothing since he began to make it. The record returned is the new one, which to is to keep
// before anything rests on it.
//
// With nil the volume serves nothing any more, and the copy that was replaced was told, if it answers soon. With an error the volume is as it was; but after ErrUnreachable, or if ctx ended, the swap may have
// happened, or may happen yet until the record is changed otherwise: whoever made to asks the catalogue before he destroys it. block.ErrFenced: somebody opened the volume meanwhile.
func (v *Volume) Replace(ctx context.Context, to replica.Member, chain replica.Chain) (replica.Record, error) {
	var rec replica.Record
	err := v.verb(ctx, "replace its copy", func(ctx context.Context, _ []replica.LayerInfo) error {
		if !chain.Equal(v.book.rec.Chain) {
			return fmt.Errorf("copy %s has generation %d, the record %d: %w", to.ReplicaID, chain.Generation, v.book.rec.Chain.Generation, replica.ErrChain)
		}
		if err := v.gate.Hold(ctx); err != nil {
			return err
		}
		defer v.gate.Release()
		next, err := Replace(v.book.rec, v.cfg.Replicas[0].ID, to, v.cfg.Now())
		if err != nil {
			return err
		}
		if err := v.swap(ctx, next); err != nil {
			return err
		}
		rec = next
		// It is no member any more, whether it hears that or not; if it does, an old catalogue does not bring it back.
		last, cancel := context.WithTimeout(ctx, farewell)
		defer cancel()
		_ = v.copies[0].Keep(last, v.writer, next)
		v.end(StateFenced, fmt.Errorf("volume %s: copy %s has taken its place: %w", v.cfg.Name, to.ReplicaID, block.ErrFenced))
		return nil
	})
	return rec, err
}
