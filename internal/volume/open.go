package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// Open makes this node the volume's writer and returns it, serving.
//
// Ways to be refused, with nothing served: ErrNoRecord; ErrUnreachable (ask again; an epoch may have been used up); ErrConflict (somebody else claims it);
// ErrStaleCatalogue; ErrStaleReplica; ErrNeedsSalvage; ErrLost; ErrNoMember; ErrSeveral; replica.ErrChain if a copy's layers are not the record's;
// block.ErrFenced if a newer writer came in between, or since the epoch that Config.Guests names. The caller then still owns the replicas.
//
//	look at the copies ──Resume──► fence with a higher session ─────────────────────────────► serve
//	        │ not possible, or not asked for
//	        ▼
//	read the record ► judge ► CAS: claim ► fence ► keep ► carry a pending change out ► CAS: open ► keep ► serve
func Open(ctx context.Context, cfg Config) (*Volume, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("open volume %s: %w", cfg.Name, err)
	}
	v := &Volume{cfg: cfg, ranges: newRanges(), endedCh: make(chan struct{}), verbs: make(chan struct{}, 1)}
	v.edges.New = func() any { return new([block.UnitBytes]byte) }
	for _, m := range cfg.Replicas {
		v.copies = append(v.copies, m.Replica)
	}
	v.life, v.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if err := v.open(ctx); err != nil {
		v.mu.Lock()
		v.closed = true
		v.mu.Unlock()
		v.cancel()
		v.bg.Wait()
		return nil, fmt.Errorf("open volume %s: %w", cfg.Name, err)
	}
	v.gate = block.NewGate(v.newDevice())
	return v, nil
}

func (v *Volume) newDevice() *device {
	return &device{v: v, copies: v.copies, size: v.copies[0].Size(), ranges: v.ranges, edges: &v.edges}
}

func (v *Volume) self() Claimant { return Claimant{Node: v.cfg.Node, Boot: v.cfg.BootID} }

// look asks every copy for its status.
func (v *Volume) look(ctx context.Context) ([]Sighting, error) {
	var seen []Sighting
	for i, r := range v.copies {
		st, err := r.Status(ctx)
		if err != nil {
			return nil, fmt.Errorf("status of replica %s: %w", v.cfg.Replicas[i].ID, err)
		}
		seen = append(seen, Sighting{ReplicaID: v.cfg.Replicas[i].ID, Status: st})
	}
	return seen, nil
}

func (v *Volume) open(ctx context.Context) error {
	seen, err := v.look(ctx)
	if err != nil {
		return err
	}
	if v.cfg.Resume {
		err := v.resume(ctx, seen)
		if !errors.Is(err, ErrNoResume) {
			return err
		}
	}
	if err := v.claim(ctx, seen); err != nil {
		return err
	}
	if err := v.letIn(ctx); err != nil {
		return err
	}
	return v.finishOpen(ctx)
}

// resume takes the epoch up again (invariant 9). The catalogue is not asked: the book stays unsure until the first verb asks.
func (v *Volume) resume(ctx context.Context, seen []Sighting) error {
	w, err := Resume(seen, v.self())
	if err != nil {
		return err
	}
	rec := Newest(seen)
	if rec.VolumeID != v.cfg.VolumeID {
		return fmt.Errorf("the copies belong to volume %s: %w", rec.VolumeID, replica.ErrChain)
	}
	if len(rec.Members) > 1 {
		return ErrSeveral
	}
	v.writer = w
	v.adopt(rec, 0)
	v.book.unsure = true
	if err := v.fence(ctx); err != nil {
		return err
	}
	if seen, err = v.look(ctx); err != nil {
		return err
	}
	if err := CheckResumed(rec, seen); err != nil {
		return err
	}
	next, err := RollForward(rec, seen[0].Status.Chain)
	if err != nil {
		return err
	}
	if next == NextChange && rec.Pending.Verb != replica.VerbMerge { // a merge can wait; the others may have begun
		if _, err := v.carryAtOpen(ctx, *rec.Pending); err != nil {
			return err
		}
	}
	v.stats.Resumed = true
	return nil
}

// claimTries bounds how often a claim is made again because its answer was lost.
const claimTries = 3

// claim is the first of the two swaps. An answer that is lost is not waited for: whatever the catalogue holds then is claimed over, with one epoch more.
//
// Others may open the volume meanwhile. A record read after the copies were looked at cannot be older than they were; a copy looked at after the record was read cannot
// have missed what the record knows. Hence two looks.
func (v *Volume) claim(ctx context.Context, before []Sighting) error {
	var lost error
	for range claimTries {
		rec, rev, err := v.cfg.Ledger.Read(ctx, v.cfg.VolumeID)
		if err != nil {
			return fmt.Errorf("read record: %w", err)
		}
		after, err := v.look(ctx)
		if err != nil {
			return err
		}
		next, err := v.prepareClaim(rec, before, after)
		if err != nil {
			return err
		}
		newRev, err := v.cfg.Ledger.Swap(ctx, next, rev)
		if err == nil {
			v.writer = replica.Writer{Epoch: next.Epoch, Session: 1}
			v.adopt(next, newRev)
			return nil
		}
		lost = err
		if !errors.Is(err, ErrUnreachable) {
			break
		}
	}
	return fmt.Errorf("claim: %w", lost)
}

// prepareClaim puts the rules together that stand between a record and a claim.
func (v *Volume) prepareClaim(rec replica.Record, before, seen []Sighting) (replica.Record, error) {
	now := v.cfg.Now()
	if rec.VolumeID != v.cfg.VolumeID {
		return rec, fmt.Errorf("the record is of volume %s: %w", rec.VolumeID, ErrInvalid)
	}
	for _, s := range seen {
		if !slices.ContainsFunc(rec.Members, func(m replica.Member) bool { return m.ReplicaID == s.ReplicaID }) {
			return rec, fmt.Errorf("replica %s is no member: %w", s.ReplicaID, ErrInvalid)
		}
	}
	if len(rec.Members) > 1 {
		return rec, ErrSeveral
	}
	if err := CheckCatalogue(rec, before); err != nil {
		return rec, err
	}
	rec = FirstChain(rec, seen)
	rec, err := CheckCopies(rec, seen, now)
	if err != nil {
		return rec, err
	}
	if NeedsSalvage(rec) || allFailed(rec, seen) {
		if !v.cfg.Salvage {
			return rec, ErrNeedsSalvage
		}
		rec = Salvage(rec, now)
	}
	if err := CheckGuests(rec, v.guests()); err != nil {
		return rec, err
	}
	rec, err = CheckIncarnations(rec, seen, v.guests(), now)
	if err != nil {
		return rec, err
	}
	return Claim(rec, now)
}

// guests is what this opener knows of the volume's guests.
func (v *Volume) guests() Attachment {
	return Attachment{GuestsGone: v.cfg.GuestsGone || v.cfg.Salvage, Reopener: v.self(), Epoch: v.cfg.Guests}
}

// letIn fences the copies and has them keep the claim.
func (v *Volume) letIn(ctx context.Context) error {
	if err := v.fence(ctx); err != nil {
		return err
	}
	return v.keep(ctx)
}

func (v *Volume) fence(ctx context.Context) error {
	for i, r := range v.copies {
		if err := r.Fence(ctx, v.writer); err != nil {
			return fmt.Errorf("fence replica %s: %w", v.cfg.Replicas[i].ID, err)
		}
	}
	return nil
}

// finishOpen carries a pending change out, and is the second swap. Nobody older can change the copies any more, so what they say now is what counts.
func (v *Volume) finishOpen(ctx context.Context) error {
	seen, err := v.look(ctx)
	if err != nil {
		return err
	}
	rec, now := v.book.rec, v.cfg.Now()
	// A host that was booted again since the claim looked is as one that was before.
	if _, err := CheckIncarnations(rec, seen, v.guests(), now); err != nil {
		return err
	}
	todo, err := RollForward(rec, seen[0].Status.Chain)
	if err != nil {
		return err
	}
	if todo == NextChange {
		if todo, err = v.carryAtOpen(ctx, *rec.Pending); err != nil {
			return err
		}
	}
	next, err := Opened(rec, v.self(), seen, now)
	if err != nil {
		return err
	}
	switch {
	case todo == NextCommit:
		if next, err = CommitChange(next, now); err != nil {
			return err
		}
	case rec.Pending != nil:
		next = AbortChange(next, now)
	}
	if err := v.swap(ctx, next); err != nil {
		return err
	}
	return v.keep(ctx)
}

// carryAtOpen carries a pending change out before anything is served. One that cannot be (a full disk, say) and has left the old chain is given up
// rather than keep the volume from opening: NextNothing.
func (v *Volume) carryAtOpen(ctx context.Context, c replica.Change) (Next, error) {
	changeErr := v.copies[0].Change(ctx, v.writer, c)
	if changeErr == nil {
		return NextCommit, nil
	}
	carried, err := v.carried(ctx, c)
	if err != nil {
		return NextNothing, errors.Join(changeErr, err)
	}
	if carried {
		return NextCommit, nil
	}
	return NextNothing, nil
}

// carried asks the copy, after an error, whether it has c's chain or still the old one; anything else, or a failed copy, is an error.
func (v *Volume) carried(ctx context.Context, c replica.Change) (bool, error) {
	st, err := v.copies[0].Status(context.WithoutCancel(ctx))
	if err != nil {
		return false, err
	}
	if st.Failed != "" {
		return false, fmt.Errorf("%s: %w", st.Failed, block.ErrFailed)
	}
	rec := v.book.rec
	if rec.Pending == nil { // a merge is made ready before it is recorded
		rec.Pending = &c
	}
	todo, err := RollForward(rec, st.Chain)
	return todo == NextCommit, err
}
