package plan

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"ashlar/internal/catalog"
)

// want is what a place is sought for.
type want struct {
	sizeBytes int64           // what it will count against over-provisioning; 0: only free space matters
	notNodes  map[string]bool // nodes that have one already: two copies on one node would die together
	imageID   string          // disks that have it, or will, are preferred
	tags      []string        // the node's and the disk's together must have all of them
}

// spot is a disk of a node.
type spot struct {
	node, diskID string
}

// placer answers where things can go, all from one picture.
type placer struct {
	v         *View
	scheduled map[string]int64 // disk id -> bytes of the replicas placed there
	over      int64            // per cent; 0: no limit
	minFree   int64            // per cent
}

func newPlacer(v *View) *placer {
	p := &placer{v: v, scheduled: map[string]int64{}}
	for _, vol := range v.Volumes {
		for _, r := range vol.Wanted.Value.Replicas {
			p.scheduled[r.DiskID] += vol.Wanted.Value.SizeBytes
		}
	}
	p.over = v.number(catalog.SettingOverProvisioning, catalog.SettingOverProvisioningDefault)
	p.minFree = v.number(catalog.SettingMinimalFree, catalog.SettingMinimalFreeDefault)
	return p
}

// number reads a setting; one that is no number counts as its default.
func (v *View) number(name, def string) int64 {
	n, err := strconv.ParseInt(v.Settings[name], 10, 64)
	if err != nil || n < 0 {
		n, _ = strconv.ParseInt(def, 10, 64)
	}
	return n
}

// choice is a spot that would do, with what decides between several.
type choice struct {
	spot
	hasImage bool
	free     int64
}

// place finds the best spot: one with the image before one without, then the one with the most room, then by name. If there is none, why says so for
// every node and disk.
func (p *placer) place(w want) (s spot, why []string, ok bool) {
	var choices []choice
	for _, name := range sorted(p.v.Nodes) {
		n := p.v.Nodes[name]
		if reason := refuseNode(name, n, w); reason != "" {
			why = append(why, fmt.Sprintf("node %s: %s", name, reason))
			continue
		}
		for _, disk := range sorted(n.Wanted.Value.Disks) {
			d, seen := n.Observed.Value.Disks[disk]
			if reason := p.refuseDisk(n.Wanted.Value, n.Wanted.Value.Disks[disk], d, w); reason != "" || !seen {
				if !seen {
					reason = "not in use yet"
				}
				why = append(why, fmt.Sprintf("node %s, disk %s: %s", name, disk, reason))
				continue
			}
			choices = append(choices, choice{spot{name, d.DiskID}, p.v.imageWantedOn(w.imageID, d.DiskID), p.room(d)})
		}
	}
	if len(p.v.Nodes) == 0 {
		why = append(why, "there is no node yet")
	}
	if len(choices) == 0 {
		return spot{}, why, false
	}
	best := slices.MinFunc(choices, func(a, b choice) int { // stable: the first by name among equals
		switch {
		case a.hasImage != b.hasImage && a.hasImage, a.hasImage == b.hasImage && a.free > b.free:
			return -1
		case a.hasImage == b.hasImage && a.free == b.free:
			return 0
		}
		return 1
	})
	return best.spot, nil, true
}

// room is what is left of a disk for people who believe in sizes: free now, and less what was promised there lately and is not written yet.
func (p *placer) room(d catalog.DiskObserved) int64 {
	return min(d.FreeBytes, d.TotalBytes-p.scheduled[d.DiskID])
}

func refuseNode(name string, n Node, w want) string {
	switch {
	case !n.Wanted.Is():
		return "no longer a member"
	case w.notNodes[name]:
		return "has a copy already"
	case n.Wanted.Value.EvictionRequested:
		return "is being emptied"
	case !n.Wanted.Value.AllowScheduling:
		return "scheduling is disabled"
	case !n.Observed.Value.Ready:
		return "not ready"
	case len(n.Wanted.Value.Disks) == 0:
		return "has no disk"
	}
	return ""
}

func (p *placer) refuseDisk(n catalog.NodeWanted, dw catalog.DiskWanted, d catalog.DiskObserved, w want) string {
	offered := max(0, d.TotalBytes-dw.StorageReservedBytes)
	switch {
	case dw.EvictionRequested:
		return "is being emptied"
	case !dw.AllowScheduling:
		return "scheduling is disabled"
	case d.DiskID == "" || d.Conditions[catalog.ConditionReady].Status != catalog.ConditionTrue:
		if m := d.Conditions[catalog.ConditionReady].Message; m != "" {
			return "not ready: " + m
		}
		return "not ready"
	}
	for _, tag := range w.tags {
		if !slices.Contains(n.Tags, tag) && !slices.Contains(dw.Tags, tag) {
			return fmt.Sprintf("has no tag %q", tag)
		}
	}
	if reason := full(p.minFree, dw, d.TotalBytes, d.FreeBytes); reason != "" {
		return reason
	}
	if p.over > 0 && w.sizeBytes > 0 && p.scheduled[d.DiskID]+w.sizeBytes > offered/100*p.over {
		return fmt.Sprintf("%s asked for and %s promised already, of %s (%d %% of %s)",
			size(w.sizeBytes), size(p.scheduled[d.DiskID]), size(offered/100*p.over), p.over, size(offered))
	}
	return ""
}

// full says why a disk takes nothing more; "" if it does.
func full(minFree int64, dw catalog.DiskWanted, total, free int64) string {
	if limit := total / 100 * minFree; free <= limit || free <= dw.StorageReservedBytes {
		return fmt.Sprintf("only %s free; %s must stay free", size(free), size(max(limit, dw.StorageReservedBytes)))
	}
	return ""
}

func (v *View) imageWantedOn(imageID, diskID string) bool {
	if imageID == "" {
		return false
	}
	for _, img := range v.Images {
		if img.Wanted.Value.ID == imageID {
			return slices.Contains(img.Wanted.Value.Disks, diskID)
		}
	}
	return false
}

// size is a number of bytes for people.
func size(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	return strings.TrimSuffix(strconv.FormatFloat(f, 'f', 1, 64), ".0") + " " + units[i]
}

// copies is how many copies of a volume have a disk. One that is to take another's place is none yet.
func copies(w catalog.VolumeWanted) int {
	n := 0
	for _, r := range w.Replicas {
		if r.CopyOf == "" {
			n++
		}
	}
	return n
}
