package plan

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"ashlar/internal/catalog"
)

// Emptying is a person's wish to empty a node, or one disk of it.
type Emptying struct {
	Node string
	Disk string // by name; "": all of the node's
	API  Window // as in ClusterInput
}

// RefuseEviction says, for each volume and image that lies there, why it would have nowhere to go if all of it left now: room, tags, selectors, nodes that are up. Empty: there is a place for
// everything. What only has to wait (a volume in use, a copy being made) is no reason. Nothing is placed by asking.
func RefuseEviction(v *View, e Emptying) []string {
	n, ok := v.Nodes[e.Node]
	if !ok {
		return nil
	}
	// The picture as it would be if it was asked for: what is to be emptied takes nothing.
	next := *v
	next.Nodes = maps.Clone(v.Nodes)
	w := n.Wanted.Value
	w.Disks = maps.Clone(w.Disks)
	if e.Disk == "" {
		w.AllowScheduling, w.EvictionRequested = false, true
	} else if d, ok := w.Disks[e.Disk]; ok {
		d.AllowScheduling, d.EvictionRequested = false, true
		w.Disks[e.Disk] = d
	}
	n.Wanted.Value = w
	next.Nodes[e.Node] = n
	c := newLeader(ClusterInput{View: &next, API: e.API})
	leaves := func(at spot) bool { return at.node == e.Node && c.evicting(at) != "" }
	var why []string
	for _, name := range sorted(next.Volumes) {
		if text := c.stuckVolume(next.Volumes[name], leaves); text != "" {
			why = append(why, "volume "+name+": "+text)
		}
	}
	for _, name := range sorted(next.Images) {
		if text := c.stuckImage(next.Images[name], leaves); text != "" {
			why = append(why, "image "+name+": "+text)
		}
	}
	return why
}

// stuckVolume says why a volume's copy that is to leave would find no place.
func (c *leader) stuckVolume(vol Volume, leaves func(spot) bool) string {
	w := vol.Wanted.Value
	moving := slices.ContainsFunc(w.Replicas, func(r catalog.Placement) bool { return r.CopyOf != "" && !leaves(spotAt(r)) })
	if !vol.Wanted.Is() || w.Deleted != nil || len(w.Replicas) == 0 || !leaves(spotAt(w.Replicas[0])) || moving {
		return ""
	}
	from := w.Replicas[0]
	to := c.wantFor(w)
	to.have, to.not, to.needBytes = nil, map[string]bool{from.DiskID: true}, allocated(vol.Observed.Value, from.ReplicaID)
	return c.stuck(to)
}

// stuckImage says why an image whose copies are all to leave would find no place.
func (c *leader) stuckImage(img Image, leaves func(spot) bool) string {
	s := c.newImageNow(img)
	if !img.Wanted.Is() || s.w.Deleted != nil || len(s.w.Disks) == 0 || slices.ContainsFunc(s.w.Disks, func(d string) bool { return !leaves(s.at(d)) }) {
		return ""
	}
	return c.stuck(s.want(nil))
}

// stuck tries a place, and keeps it taken for what is tried next.
func (c *leader) stuck(w want) string {
	to, reasons, ok := c.p.place(w)
	if !ok {
		return fmt.Sprintf("there is no other place: %s", strings.Join(reasons, "; "))
	}
	c.p.promise(to, w)
	return ""
}
