package plan

import "fmt"

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

// lostDiskText says of a volume that its only copy was on a disk that was given up.
func (v *View) lostDiskText(at spot, volume string) string {
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
