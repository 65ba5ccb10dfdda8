package local

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// ErrVersion: the record has a higher version than this program knows; both are named.
var ErrVersion = errors.New("unknown replica version")

// formatVersion is the version of the record that this program writes.
const formatVersion = 1

// FormatVersion is the version of the record that this program reads and writes.
const FormatVersion = formatVersion

// state is the replica's record, docs/formats/replica.md section 2. It is a value: whoever changes it clones it first.
type state struct {
	Version    int             `json:"version"`
	ReplicaID  string          `json:"replicaID"`
	VolumeID   string          `json:"volumeID"`
	Volume     string          `json:"volume"`
	Created    time.Time       `json:"created"`
	Writer     replica.Writer  `json:"writer"`
	Record     *replica.Record `json:"record,omitempty"`
	Generation uint64          `json:"generation"`
	SizeBytes  int64           `json:"sizeBytes"`
	Head       replica.LayerID `json:"head"`
	Base       replica.LayerID `json:"base,omitempty"`
	BasePath   string          `json:"basePath,omitempty"`
	Layers     []node          `json:"layers"`
	Change     *replica.Change `json:"change,omitempty"`
	// Dropped layers have no place in the tree any more; their files may still be there.
	Dropped []replica.LayerID `json:"dropped,omitempty"`
	Failed  string            `json:"failed,omitempty"`

	unknown map[string]json.RawMessage
}

// node is a layer's place in the tree.
type node struct {
	ID     replica.LayerID `json:"id"`
	Parent replica.LayerID `json:"parent,omitempty"`
}

// plainState is state without its methods, so that encoding does not recurse.
type plainState state

// MarshalJSON writes the known fields over the unknown ones that were read.
func (s state) MarshalJSON() ([]byte, error) {
	known, err := json.Marshal(plainState(s))
	if err != nil || len(s.unknown) == 0 {
		return known, err
	}
	all := maps.Clone(s.unknown)
	if err := json.Unmarshal(known, &all); err != nil {
		return nil, err
	}
	return json.Marshal(all)
}

// UnmarshalJSON keeps what it does not know.
func (s *state) UnmarshalJSON(b []byte) error {
	var p plainState
	if err := json.Unmarshal(b, &p); err != nil {
		return err
	}
	var all map[string]json.RawMessage
	if err := json.Unmarshal(b, &all); err != nil {
		return err
	}
	for _, k := range []string{"version", "replicaID", "volumeID", "volume", "created", "writer", "record", "generation", "sizeBytes", "head", "base", "basePath",
		"layers", "change", "dropped", "failed"} {
		delete(all, k)
	}
	if len(all) > 0 {
		p.unknown = all
	}
	*s = state(p)
	return nil
}

// decodeState reads a record and checks that it can be one: ErrVersion, block.ErrCorrupt.
func decodeState(b []byte) (state, error) {
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return state{}, fmt.Errorf("replica record: %w: %w", block.ErrCorrupt, err)
	}
	if v.Version != formatVersion {
		return state{}, fmt.Errorf("replica record has version %d, this program knows %d: %w", v.Version, formatVersion, ErrVersion)
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return state{}, fmt.Errorf("replica record: %w: %w", block.ErrCorrupt, err)
	}
	if err := s.check(); err != nil {
		return state{}, fmt.Errorf("replica record: %w: %w", block.ErrCorrupt, err)
	}
	return s, nil
}

// check says whether the record is sound in itself: every file name made from it stays in the directory, and the tree is one.
func (s *state) check() error {
	if !validID(s.ReplicaID) || s.VolumeID == "" {
		return fmt.Errorf("replica id %q of volume %q: %w", s.ReplicaID, s.VolumeID, ErrInvalid)
	}
	if s.SizeBytes <= 0 || s.SizeBytes%block.UnitBytes != 0 {
		return fmt.Errorf("size of %d bytes: %w", s.SizeBytes, ErrInvalid)
	}
	if err := s.checkTree(); err != nil {
		return err
	}
	for _, id := range s.Dropped {
		if !validID(string(id)) || s.has(id) {
			return fmt.Errorf("dropped layer %q: %w", id, ErrInvalid)
		}
	}
	if s.Change != nil && !validID(string(newLayer(*s.Change))) {
		return fmt.Errorf("change to layer %q: %w", newLayer(*s.Change), ErrInvalid)
	}
	if !s.has(s.Head) || len(s.children(s.Head)) > 0 {
		return fmt.Errorf("head %q has no place or is stood on: %w", s.Head, ErrInvalid)
	}
	return nil
}

// checkTree says whether every layer has a fit id, is there once, and leads down to the bottom.
func (s *state) checkTree() error {
	parents := make(map[replica.LayerID]replica.LayerID, len(s.Layers))
	for _, n := range s.Layers {
		if _, twice := parents[n.ID]; twice || !validID(string(n.ID)) {
			return fmt.Errorf("layer id %q, or it is there twice: %w", n.ID, ErrInvalid)
		}
		parents[n.ID] = n.Parent
	}
	sound := make(map[replica.LayerID]bool, len(s.Layers)+1)
	sound[""] = true
	for id := range parents {
		var way []replica.LayerID
		for ; !sound[id]; id = parents[id] {
			if _, ok := parents[id]; !ok || len(way) == len(s.Layers) {
				return fmt.Errorf("layer %q has no place in the tree: %w", id, ErrInvalid)
			}
			way = append(way, id)
		}
		for _, id := range way {
			sound[id] = true
		}
	}
	return nil
}

// clone returns a copy whose slices may be changed.
func (s *state) clone() state {
	c := *s
	c.Layers = slices.Clone(s.Layers)
	c.Dropped = slices.Clone(s.Dropped)
	return c
}

// chain is what the replica has.
func (s *state) chain() replica.Chain {
	path, _ := s.path(s.Head) // check has made sure
	return replica.Chain{Generation: s.Generation, SizeBytes: s.SizeBytes, Layers: path, Base: s.Base}
}

// path returns the layers from id down to the lowest.
func (s *state) path(id replica.LayerID) ([]replica.LayerID, error) {
	parents := make(map[replica.LayerID]replica.LayerID, len(s.Layers))
	for _, n := range s.Layers {
		parents[n.ID] = n.Parent
	}
	var path []replica.LayerID
	for id != "" {
		parent, ok := parents[id]
		if !ok || len(path) == len(s.Layers) {
			return nil, fmt.Errorf("layer %q has no place in the tree: %w", id, ErrInvalid)
		}
		path = append(path, id)
		id = parent
	}
	return path, nil
}

func (s *state) index(id replica.LayerID) int {
	return slices.IndexFunc(s.Layers, func(n node) bool { return n.ID == id })
}

func (s *state) has(id replica.LayerID) bool { return s.index(id) >= 0 }

func (s *state) children(id replica.LayerID) []replica.LayerID {
	var c []replica.LayerID
	for _, n := range s.Layers {
		if n.Parent == id {
			c = append(c, n.ID)
		}
	}
	return c
}

// newLayer is the layer that a change makes a file for.
func newLayer(c replica.Change) replica.LayerID {
	switch {
	case c.Verb == replica.VerbMerge && c.Merge != nil:
		return c.Merge.Into
	case len(c.Chain.Layers) > 0:
		return c.Chain.Layers[0]
	}
	return ""
}

// done tells whether c has been carried out.
func (s *state) done(c replica.Change) bool {
	return c.Chain.Equal(s.chain()) && s.has(newLayer(c))
}

// startsHere returns replica.ErrChain unless c leads on from this state.
func (s *state) startsHere(c replica.Change) error {
	have, id := s.chain(), newLayer(c)
	bad := func(what string) error {
		return fmt.Errorf("%s to layer %s from generation %d: %s: %w", c.Verb, id, have.Generation, what, replica.ErrChain)
	}
	if c.Chain.Generation <= have.Generation || c.Chain.Base != have.Base && c.Chain.Base != "" && have.Base != "" {
		return bad("generation or base")
	}
	if !validID(string(id)) || s.has(id) || slices.Contains(s.Dropped, id) {
		return bad("the new layer's id is not fit or in use")
	}
	switch c.Verb {
	case replica.VerbSnapshot, replica.VerbExpand:
		if c.Snapshot == nil || !slices.Equal(c.Chain.Layers[1:], have.Layers) || c.Chain.SizeBytes < have.SizeBytes || c.Chain.SizeBytes%block.UnitBytes != 0 {
			return bad("not a new head on the old one")
		}
	case replica.VerbRevert:
		if len(c.Chain.Layers) < 2 || c.Chain.Layers[1] == s.Head || c.Chain.SizeBytes < have.SizeBytes {
			return bad("not a new head on a snapshot")
		}
		path, err := s.path(c.Chain.Layers[1])
		if err != nil || !slices.Equal(path, c.Chain.Layers[1:]) {
			return bad("no such snapshot")
		}
	case replica.VerbMerge:
		return s.mergeable(c, bad)
	default:
		return bad("no such verb")
	}
	return nil
}

func (s *state) mergeable(c replica.Change, bad func(string) error) error {
	if c.Merge == nil {
		return bad("no layers to merge")
	}
	list := c.Merge.Layers()
	if slices.Contains(list, s.Head) {
		return bad("one of the layers is the head")
	}
	for i, id := range list[1:] {
		if above := s.children(id); !s.has(id) || len(above) != 1 || above[0] != list[i] {
			return bad("a layer is not the only child of the one below it")
		}
	}
	after := s.clone()
	after.carry(c)
	if !c.Chain.Equal(after.chain()) {
		return bad("not the chain that the merge makes")
	}
	return nil
}

// carry makes the state what c makes of it; startsHere has agreed. It is the commit of every change, and of nothing else.
func (s *state) carry(c replica.Change) {
	id := newLayer(c)
	switch c.Verb {
	case replica.VerbSnapshot, replica.VerbExpand:
		s.Layers = append(s.Layers, node{ID: id, Parent: s.Head})
		s.Head = id
	case replica.VerbRevert:
		s.drop(s.Head)
		s.Layers = append(s.Layers, node{ID: id, Parent: c.Chain.Layers[1]})
		s.Head = id
	case replica.VerbMerge:
		parent := s.Layers[s.index(c.Merge.Lower)].Parent
		for _, id := range c.Merge.Layers() {
			s.drop(id)
		}
		for i := range s.Layers {
			if s.Layers[i].Parent == c.Merge.Upper {
				s.Layers[i].Parent = id
			}
		}
		s.Layers = append(s.Layers, node{ID: id, Parent: parent})
	}
	s.Generation, s.SizeBytes = c.Chain.Generation, c.Chain.SizeBytes
	s.Change = nil
}

// drop takes a layer out of the tree; its file is to be removed.
func (s *state) drop(id replica.LayerID) {
	i := s.index(id)
	s.Layers = slices.Delete(s.Layers, i, i+1)
	s.Dropped = append(s.Dropped, id)
}

// abandon gives an intent up; its file, if it came to be, is to be removed.
func (s *state) abandon() {
	if s.Change != nil {
		s.Dropped = append(s.Dropped, newLayer(*s.Change))
		s.Change = nil
	}
}

// validID says whether s can be the id of a replica or layer: 32 lower-case hex digits.
func validID(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 16 && hex.EncodeToString(b) == s
}
