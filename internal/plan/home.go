package plan

import (
	"fmt"

	"ashlar/internal/catalog"
)

// Up tells whether a node can be counted on now: it says that it is ready and, in a cluster, its lease holds. Nothing that must be safe depends on it; epochs see to that.
func (v *View) Up(node string) bool {
	n := v.Nodes[node]
	return n.Wanted.Is() && n.Observed.Value.Ready && (n.Observed.Value.Port == 0 || v.Alive[node].Is())
}

// lostDisk tells whether a disk was given up. Its directory may hold another disk by now; and when it was only away, and was added again under another name, it is not lost.
func (v *View) lostDisk(at spot) bool {
	n, lost := v.Nodes[at.node], false
	for name, d := range n.Wanted.Value.Disks {
		if at.diskID == "" || n.Observed.Value.Disks[name].DiskID != at.diskID {
			continue
		}
		if !d.Lost {
			return false
		}
		lost = true
	}
	return lost
}

// replaced tells whether the node of a copy is another machine than the one it was placed on, which was given up since: it has another id, and not the disk. Until all its disks are known
// it may still bring that.
func (v *View) replaced(r catalog.Placement) bool {
	n := v.Nodes[r.Node]
	id := n.Wanted.Value.ID
	if r.NodeID == "" || id == "" || id == r.NodeID || !n.Observed.Is() {
		return false
	}
	for disk := range n.Wanted.Value.Disks {
		if have := n.Observed.Value.Disks[disk].DiskID; have == "" || have == r.DiskID {
			return false
		}
	}
	return true
}

// lostCopy tells whether a copy was given up with its disk, or with a node whose name another has now.
func (v *View) lostCopy(r catalog.Placement) bool { return v.lostDisk(spotAt(r)) || v.replaced(r) }

// lostText says of a volume that its only copy was given up with its disk, or with the node that had it.
func (v *View) lostText(r catalog.Placement, volume string) string {
	if v.replaced(r) {
		return fmt.Sprintf("its only copy was on an earlier node %s, which was given up; `ashlar volume delete %s` forgets it", r.Node, volume)
	}
	at := spotAt(r)
	disk := at.diskID
	n := v.Nodes[at.node]
	for _, name := range sorted(n.Wanted.Value.Disks) {
		if n.Wanted.Value.Disks[name].Lost && n.Observed.Value.Disks[name].DiskID == at.diskID {
			disk = name
		}
	}
	return fmt.Sprintf("its only copy was on disk %s of node %s, which was given up; `ashlar volume delete %s` forgets it", disk, at.node, volume)
}

// Home is the node whose agent opens, closes, operates on and describes a volume (docs/formats/catalog.md, section 3); "" while the volume has neither a place nor a ticket.
func (v *View) Home(volume string) string { return v.home(v.Volumes[volume]) }

func (v *View) home(vol Volume) string {
	w, o := vol.Wanted.Value, vol.Observed.Value
	wanted := ""
	if w.Deleted == nil && len(w.Tickets) > 0 {
		wanted = w.Tickets[0].Node
	}
	switch {
	case o.ID == w.ID && o.Node != "" && (o.Node == wanted || v.Up(o.Node)):
		return o.Node // it closes it before another opens it
	case wanted != "":
		return wanted
	case len(w.Replicas) == 0:
		return ""
	}
	first := w.Replicas[0].Node
	if v.Up(first) || w.Deleted == nil && len(v.Operations[w.Name]) == 0 {
		return first
	}
	for _, name := range sorted(v.Nodes) { // somebody has to say why nothing happens
		if v.Up(name) {
			return name
		}
	}
	return first
}
