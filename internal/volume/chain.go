package volume

import (
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// The rules of a chain's changes (invariant 13), pure like members.go: what may follow what, and what recovery does with a change that it finds pending.

// Next is what is to be done about a record's chain.
type Next uint8

const (
	// NextNothing: the copy has the wanted chain.
	NextNothing Next = iota
	// NextChange: carry the pending change out, then commit.
	NextChange
	// NextCommit: the change was carried out; commit it.
	NextCommit
)

// RollForward decides from what a copy has. While a change is pending either chain is in sync; any other is ErrChain.
func RollForward(rec replica.Record, have replica.Chain) (Next, error) {
	switch {
	case rec.Pending == nil && have.Equal(rec.Chain):
		return NextNothing, nil
	case rec.Pending != nil && have.Equal(rec.Pending.Chain):
		return NextCommit, nil
	case rec.Pending != nil && have.Equal(rec.Chain):
		return NextChange, nil
	}
	return NextNothing, fmt.Errorf("copy has generation %d, the record %d: %w", have.Generation, rec.Chain.Generation, replica.ErrChain)
}

// BeginChange records c as pending. The same change again is what it was; another while one is pending is ErrPending.
func BeginChange(rec replica.Record, c replica.Change, now time.Time) (replica.Record, error) {
	if rec.Pending != nil {
		if rec.Pending.Equal(c) {
			return rec, nil
		}
		return rec, fmt.Errorf("%s is pending: %w", rec.Pending.Verb, ErrPending)
	}
	if err := checkChange(rec.Chain, c); err != nil {
		return rec, err
	}
	next := step(rec, now)
	next.Pending = &c
	return next, nil
}

// CommitChange makes the pending chain the wanted one, once every member in sync has it.
func CommitChange(rec replica.Record, now time.Time) (replica.Record, error) {
	if rec.Pending == nil {
		return rec, fmt.Errorf("commit without a pending change: %w", replica.ErrChain)
	}
	next := step(rec, now)
	next.Chain, next.Pending = rec.Pending.Chain, nil
	return next, nil
}

// AbortChange gives a pending change up. The caller knows that no member in sync has carried it out.
func AbortChange(rec replica.Record, now time.Time) replica.Record {
	next := step(rec, now)
	next.Pending = nil
	return next
}

// checkChange says whether c may follow from.
func checkChange(from replica.Chain, c replica.Change) error {
	to := c.Chain
	bad := func(what string) error { return fmt.Errorf("%s: %s: %w", c.Verb, what, replica.ErrChain) }
	if to.Generation != from.Generation+1 || to.Base != from.Base || len(to.Layers) == 0 {
		return bad("not the next chain")
	}
	if to.SizeBytes < from.SizeBytes || to.SizeBytes%block.UnitBytes != 0 {
		return bad("a volume never shrinks, and has whole units")
	}
	if c.Verb == replica.VerbMerge {
		if c.Merge == nil || to.SizeBytes != from.SizeBytes || !slices.Equal(to.Layers, mergeLayers(from.Layers, *c.Merge)) {
			return bad("not the chain with those layers made one")
		}
		return nil
	}
	if slices.Contains(from.Layers, to.Layers[0]) {
		return bad("the new head's id is in use")
	}
	switch c.Verb {
	case replica.VerbSnapshot, replica.VerbExpand:
		if c.Snapshot == nil || !slices.Equal(to.Layers[1:], from.Layers) || (c.Verb == replica.VerbExpand) != (to.SizeBytes > from.SizeBytes) {
			return bad("not a new head on the old one")
		}
	case replica.VerbRevert:
		if len(to.Layers) < 2 || to.Layers[1] == from.Layers[0] || to.SizeBytes != from.SizeBytes {
			return bad("not a new head on a snapshot")
		}
	default:
		return bad("no such verb")
	}
	return nil
}

// mergeLayers is a chain's layers after a merge; the same if those it makes one are not in it.
func mergeLayers(layers []replica.LayerID, m replica.Merge) []replica.LayerID {
	old := m.Layers()
	at := slices.Index(layers, m.Upper)
	if at < 0 || at+len(old) > len(layers) || !slices.Equal(layers[at:at+len(old)], old) {
		return slices.Clone(layers)
	}
	return slices.Concat(layers[:at], []replica.LayerID{m.Into}, layers[at+len(old):])
}

// snapshotChange, expandChange, revertChange and mergeChange build the changes; BeginChange checks them.
func snapshotChange(from replica.Chain, head replica.LayerID, meta replica.SnapshotMeta) replica.Change {
	to := nextChain(from, append([]replica.LayerID{head}, from.Layers...))
	return replica.Change{Verb: replica.VerbSnapshot, Chain: to, Snapshot: &meta}
}

func expandChange(from replica.Chain, head replica.LayerID, sizeBytes int64, meta replica.SnapshotMeta) replica.Change {
	to := nextChain(from, append([]replica.LayerID{head}, from.Layers...))
	to.SizeBytes = sizeBytes
	return replica.Change{Verb: replica.VerbExpand, Chain: to, Snapshot: &meta}
}

func revertChange(from replica.Chain, head replica.LayerID, path []replica.LayerID) replica.Change {
	return replica.Change{Verb: replica.VerbRevert, Chain: nextChain(from, append([]replica.LayerID{head}, path...))}
}

func mergeChange(from replica.Chain, m replica.Merge) replica.Change {
	return replica.Change{Verb: replica.VerbMerge, Chain: nextChain(from, mergeLayers(from.Layers, m)), Merge: &m}
}

func nextChain(from replica.Chain, layers []replica.LayerID) replica.Chain {
	from.Generation++
	from.Layers = layers
	return from
}

// checkLayerID says whether id can be a layer's: 32 lower-case hex digits.
func checkLayerID(id replica.LayerID) error {
	b, err := hex.DecodeString(string(id))
	if err != nil || len(b) != 16 || hex.EncodeToString(b) != string(id) {
		return fmt.Errorf("%q is not 32 lower-case hex digits: %w", string(id), ErrInvalid)
	}
	return nil
}

// pathOf returns the layers from id down to the lowest, by the parents in layers.
func pathOf(layers []replica.LayerInfo, id replica.LayerID) ([]replica.LayerID, error) {
	parents := make(map[replica.LayerID]replica.LayerID, len(layers))
	for _, l := range layers {
		parents[l.ID] = l.Parent
	}
	var path []replica.LayerID
	for id != "" {
		parent, ok := parents[id]
		if !ok || len(path) > len(layers) {
			return nil, fmt.Errorf("layer %s has no place in the tree: %w", id, replica.ErrChain)
		}
		path = append(path, id)
		id = parent
	}
	return path, nil
}
