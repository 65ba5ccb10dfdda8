package local

import (
	"context"
	"encoding/json"
	"fmt"

	"ashlar/internal/block"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
)

// LayerHeader goes with the units of one layer of a replica when it is copied: what the bytes do not say.
type LayerHeader struct {
	ID        replica.LayerID `json:"id"`
	Parent    replica.LayerID `json:"parent,omitempty"` // the layer of the replica below it
	Head      bool            `json:"head"`
	SizeBytes int64           `json:"sizeBytes"`
	// SumsBytes is the length of the layer's checksums, which lie behind its SizeBytes in the same Device (layer.Own); 0: it has none yet.
	SumsBytes int64 `json:"sumsBytes,omitempty"`
	// BaseDigest is the digest of the image that the replica stands on, if it has one and it is known.
	BaseDigest string `json:"baseDigest,omitempty"`
	// Meta is the layer file's header, of a version that may be later than ours.
	Meta layer.Meta `json:"meta"`
}

// OpenLayer returns the own units of one layer, the head's too, as a read-only Device (layer.Own: Absent where the layer has nothing; its checksums behind its units), and what else is to be
// known of it. While it is open the layer is Pinned: no purge and no merge changes it. It needs no writer; but only who fenced the others out knows that the head stays as it is. Closing the
// Replica closes it; a head that is sealed or dropped answers errors. replica.ErrNoSnapshot if there is no such layer.
func (r *Replica) OpenLayer(id replica.LayerID) (block.Device, LayerHeader, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, LayerHeader{}, fmt.Errorf("layer %s: %w", id, block.ErrClosed)
	}
	l := r.layers[id]
	if l == nil {
		return nil, LayerHeader{}, fmt.Errorf("layer %s: %w", id, replica.ErrNoSnapshot)
	}
	if l == r.pruning {
		return nil, LayerHeader{}, fmt.Errorf("layer %s is being purged: %w", id, replica.ErrPruned)
	}
	own, err := layer.OpenOwn(l, r.stack)
	if err != nil {
		return nil, LayerHeader{}, err
	}
	h := LayerHeader{ID: id, Parent: r.st.Layers[r.st.index(id)].Parent, Head: id == r.st.Head, SizeBytes: l.SizeBytes(), SumsBytes: own.SumsBytes(), Meta: l.Meta()}
	if r.base != nil {
		if image := r.base.Meta().Image; image != nil {
			h.BaseDigest = image.Digest
		}
	}
	s := &snapshot{Device: own, r: r, pins: []*layer.Layer{l}}
	r.snaps[s] = struct{}{}
	r.pin(s.pins)
	return s, h, nil
}

// OpenLayer is Replica.OpenLayer with the header as JSON: what a Receive takes, also from another node.
func (c *Conn) OpenLayer(_ context.Context, id replica.LayerID) (block.Device, json.RawMessage, error) {
	dev, h, err := c.r.OpenLayer(id)
	if err != nil {
		return nil, nil, fmt.Errorf("replica %s: %w", c.r.dir, err)
	}
	text, err := json.Marshal(h)
	if err != nil {
		return nil, nil, fmt.Errorf("replica %s: layer %s: %w", c.r.dir, id, err)
	}
	return dev, text, nil
}
