package plan

import (
	"cmp"
	"maps"
	"slices"

	"ashlar/internal/catalog"
)

// Half is one record, decoded. A zero Rev says that there is none.
type Half[T any] struct {
	Rev   catalog.Rev
	Value T
}

// Is tells whether the record exists.
func (h Half[T]) Is() bool { return h.Rev != 0 }

// Pair is the wanted and the observed half of a noun.
type Pair[W, O any] struct {
	Wanted   Half[W]
	Observed Half[O]
}

// The nouns in two halves.
type (
	Volume = Pair[catalog.VolumeWanted, catalog.VolumeObserved]
	Image  = Pair[catalog.ImageWanted, catalog.ImageObserved]
	Node   = Pair[catalog.NodeWanted, catalog.NodeObserved]
)

// View is a copy of the catalogue, decoded. It is fed with changes (Apply) and read by the plans; one goroutine at a time.
type View struct {
	Cluster     Half[catalog.Cluster]
	Nodes       map[string]Node
	Images      map[string]Image
	Volumes     map[string]Volume
	Memberships map[string]Half[catalog.Membership]           // by volume id
	Operations  map[string]map[string]Half[catalog.Operation] // by volume name, then id
	Settings    map[string]string
	Events      map[string]Half[catalog.EventRecord]
	Alive       map[string]Half[catalog.Alive] // by node: those that live
	Joins       map[string]Half[catalog.Join]

	names map[string]string // of volumes, by their ids
}

// VolumeName finds a volume by its id; "" if there is none.
func (v *View) VolumeName(id string) string {
	name := v.names[id]
	if v.Volumes[name].Wanted.Value.ID != id {
		return ""
	}
	return name
}

// NewView returns a View of an empty catalogue.
func NewView() *View {
	v := &View{}
	v.Reset()
	return v
}

// Reset empties the view.
func (v *View) Reset() {
	*v = View{
		Nodes: map[string]Node{}, Images: map[string]Image{}, Volumes: map[string]Volume{}, Memberships: map[string]Half[catalog.Membership]{},
		Operations: map[string]map[string]Half[catalog.Operation]{}, Settings: map[string]string{}, Events: map[string]Half[catalog.EventRecord]{}, Alive: map[string]Half[catalog.Alive]{},
		Joins: map[string]Half[catalog.Join]{},
		names: map[string]string{},
	}
}

// Apply takes a change into the view. Changes older than what the view has of that record are ignored, so that one's own writes can be applied before
// the watch shows them. The error says which record cannot be decoded; the view then keeps what it had of it.
func (v *View) Apply(ev catalog.Event) error {
	name := ev.Key.Name
	switch ev.Key.Kind {
	case catalog.KindCluster:
		return apply(&v.Cluster, ev)
	case catalog.KindNode:
		return applyPair(v.Nodes, ev)
	case catalog.KindImage:
		return applyPair(v.Images, ev)
	case catalog.KindVolume:
		return v.applyVolume(ev)
	case catalog.KindMembership:
		return applyMap(v.Memberships, name, ev)
	case catalog.KindOperation:
		return v.applyOperation(ev)
	case catalog.KindSetting:
		var h Half[catalog.Setting]
		err := apply(&h, ev)
		if v.Settings[name] = h.Value.Value; !h.Is() {
			delete(v.Settings, name)
		}
		return err
	case catalog.KindEvent:
		return applyMap(v.Events, name, ev)
	case catalog.KindAlive:
		return applyMap(v.Alive, name, ev)
	case catalog.KindJoin:
		return applyMap(v.Joins, name, ev)
	}
	return nil // of a later version
}

func (v *View) applyVolume(ev catalog.Event) error {
	was := v.Volumes[ev.Key.Name].Wanted.Value.ID
	err := applyPair(v.Volumes, ev)
	if id := v.Volumes[ev.Key.Name].Wanted.Value.ID; id != was {
		if v.names[was] == ev.Key.Name {
			delete(v.names, was)
		}
		if id != "" {
			v.names[id] = ev.Key.Name
		}
	}
	return err
}

func (v *View) applyOperation(ev catalog.Event) error {
	volume, id := splitOperation(ev.Key.Name)
	m := v.Operations[volume]
	if m == nil {
		m = map[string]Half[catalog.Operation]{}
		v.Operations[volume] = m
	}
	err := applyMap(m, id, ev)
	if len(m) == 0 {
		delete(v.Operations, volume)
	}
	return err
}

func apply[T any](h *Half[T], ev catalog.Event) error {
	if ev.Rev <= h.Rev {
		return nil
	}
	if ev.Value == nil {
		*h = Half[T]{}
		return nil
	}
	it, err := catalog.Decode[T](ev.Entry)
	if err == nil {
		*h = Half[T]{Rev: it.Rev, Value: it.Value}
	}
	return err
}

func applyMap[T any](m map[string]Half[T], name string, ev catalog.Event) error {
	h := m[name]
	err := apply(&h, ev)
	if m[name] = h; !h.Is() {
		delete(m, name)
	}
	return err
}

func applyPair[W, O any](m map[string]Pair[W, O], ev catalog.Event) (err error) {
	p := m[ev.Key.Name]
	if ev.Key.Part == catalog.Observed {
		err = apply(&p.Observed, ev)
	} else {
		err = apply(&p.Wanted, ev)
	}
	if m[ev.Key.Name] = p; !p.Wanted.Is() && !p.Observed.Is() {
		delete(m, ev.Key.Name)
	}
	return err
}

// Write is a record to put (or, without a Value, to delete) if its revision is still Was. Whoever carries it out stops with the rest of its Group when
// it fails: what changed meanwhile is planned anew. Notes are recorded once it succeeded.
type Write struct {
	Group string
	Key   catalog.Key
	Value any
	Was   catalog.Rev
	Notes []catalog.EventRecord
	For   Purpose
}

// Purpose is what a write is good for. Writes of a higher one may wait for all others.
type Purpose int

// The purposes.
const (
	Does   Purpose = iota // something follows from it
	Tells                 // it tells people why something is not done, and nothing follows from it
	Retell                // as Tells, but it says the same as the record does, in other words: other figures, other disks
)

// sorted iterates over a map by key: plans are the same for the same picture.
func sorted[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
