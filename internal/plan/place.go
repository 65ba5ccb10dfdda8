package plan

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"ashlar/internal/catalog"
)

// oneCopy: the engine of this version keeps one copy of a volume, however many are asked for.
const oneCopy = 1

// Window is the versions of the wire between nodes that somebody speaks. A zero Current says nothing.
type Window struct {
	Min, Current int
}

// meets tells whether two sides have a version in common, as far as both say.
func (w Window) meets(other Window) bool {
	return w.Current == 0 || other.Current == 0 || w.Min <= other.Current && other.Min <= w.Current
}

// want is what a place is sought for.
type want struct {
	sizeBytes          int64 // what is promised: it counts against over-provisioning
	needBytes          int64 // what will be written there at once: it must be free
	have               []spot
	not                map[string]bool // disks that will not do, by id
	only               string          // the node it must be; "": any
	imageID            string          // disks that have it, or will, are preferred
	nodeTags, diskTags []string        // the node, and the disk, must have all of them
}

// spot is a disk of a node. In want.have: where the other copies are.
type spot struct {
	node, diskID string
}

// placer answers where things can go, all from one picture. It is told (promise) what was placed since.
type placer struct {
	v             *View
	promised      map[string]int64 // disk id -> sizes of the replicas placed there, those that are to go included, and of the images' copies
	coming        map[string]int64 // disk id -> bytes that are being copied there
	over, minFree int64            // per cent; over 0: no limit
	soft          struct{ nodes, zones, disks bool }
	api           Window
	images        map[string]string   // image id -> name
	rows          []nodeRow           // of all nodes, by name; made when first asked
	vain          map[string][]string // what had no place, and why
	most          *int64              // see emptiest
}

// nodeRow is a node with what does not depend on what is placed.
type nodeRow struct {
	name, zone string
	tags       []string
	unfit      string // why nothing is placed on it; "": something may be
	disks      []diskRow
}

type diskRow struct {
	name   string
	wanted catalog.DiskWanted
	is     catalog.DiskObserved
	seen   bool
}

func newPlacer(v *View) *placer {
	p := &placer{v: v, promised: map[string]int64{}, coming: map[string]int64{}, images: map[string]string{}, vain: map[string][]string{}}
	for _, vol := range v.Volumes {
		w := &vol.Wanted.Value
		for _, r := range w.Replicas {
			p.promised[r.DiskID] += w.SizeBytes
			if r.CopyOf != "" {
				p.coming[r.DiskID] += allocated(vol.Observed.Value, r.CopyOf)
			}
		}
		for _, r := range w.Dropped {
			p.promised[r.DiskID] += w.SizeBytes
		}
	}
	for name, img := range v.Images {
		p.images[img.Wanted.Value.ID] = name
		for _, disk := range img.Wanted.Value.Disks {
			bytes := imageBytes(img)
			p.promised[disk] += bytes
			if img.Observed.Value.Disks[disk].State != catalog.ImageReady {
				p.coming[disk] += bytes
			}
		}
	}
	p.over = v.number(catalog.SettingOverProvisioning, catalog.SettingOverProvisioningDefault)
	p.minFree = v.number(catalog.SettingMinimalFree, catalog.SettingMinimalFreeDefault)
	p.soft.nodes = v.text(catalog.SettingSoftNodes, catalog.SettingSoftNodesDefault) == "true"
	p.soft.zones = v.text(catalog.SettingSoftZones, catalog.SettingSoftZonesDefault) == "true"
	p.soft.disks = v.text(catalog.SettingSoftDisks, catalog.SettingSoftDisksDefault) == "true"
	return p
}

// allocated is what a replica takes on its disk, as last seen.
func allocated(o catalog.VolumeObserved, replicaID string) int64 {
	for _, r := range o.Replicas {
		if r.ReplicaID == replicaID {
			return r.AllocatedBytes
		}
	}
	return 0
}

// imageBytes is what a copy of an image takes, as far as it is known: what the largest that is ready takes, else the size of the file.
func imageBytes(img Image) int64 {
	o := img.Observed.Value
	if o.ID != img.Wanted.Value.ID {
		return 0
	}
	var n int64
	for _, d := range o.Disks {
		n = max(n, d.AllocatedBytes)
	}
	if n == 0 {
		n = o.SizeBytes
	}
	return n
}

// text reads a setting. Those that the dialect has once for each data engine are kept as an object; ours is called v1.
func (v *View) text(name, def string) string {
	value, ok := v.Settings[name]
	if !ok || value == "" {
		return def
	}
	var engines map[string]string
	if value[0] == '{' && json.Unmarshal([]byte(value), &engines) == nil {
		if value, ok = engines["v1"]; !ok {
			return def
		}
	}
	return value
}

// number reads a setting; one that is no number counts as its default.
func (v *View) number(name, def string) int64 {
	n, err := strconv.ParseInt(v.text(name, def), 10, 64)
	if err != nil || n < 0 {
		n, _ = strconv.ParseInt(def, 10, 64)
	}
	return n
}

// promise takes note of what was placed.
func (p *placer) promise(s spot, w want) {
	p.promised[s.diskID] += w.sizeBytes
	p.coming[s.diskID] += w.needBytes
}

// choice is a spot that would do, with what decides between several.
type choice struct {
	spot
	onNode, inZone, onDisk int // copies that are there already
	image                  int // 2: ready there, 1: on its way
	left                   int64
}

// place finds the best spot: as far from the other copies as can be, then one with the image, then the one that has most left of what it offers, then by name. If there
// is none, why says so for every node and disk.
func (p *placer) place(w want) (s spot, why []string, ok bool) {
	c, why, ok := p.choose(w)
	return c.spot, why, ok
}

func (p *placer) choose(w want) (best choice, why []string, ok bool) {
	key := fmt.Sprintf("%d %d %q %v %q %q %q", w.sizeBytes, w.needBytes, w.have, w.not, w.only, w.nodeTags, w.diskTags)
	if why := p.vain[key]; why != nil { // what had no place has none now: only more was promised since
		return choice{}, why, false
	}
	near := p.near(w)
	var choices []choice
	for _, n := range p.table() {
		if reason := p.refuseNode(n, w, near); reason != "" {
			why = append(why, fmt.Sprintf("node %s: %s", n.name, reason))
			continue
		}
		for _, d := range n.disks {
			reason := "not in use yet"
			if d.seen {
				reason = p.refuseDisk(d.wanted, d.is, w)
			}
			if onDisk := near.disks[d.is.DiskID]; reason == "" && (onDisk > 0 && !p.soft.disks || w.not[d.is.DiskID]) {
				reason = "has a copy already"
			}
			if reason != "" {
				why = append(why, fmt.Sprintf("node %s, disk %s: %s", n.name, d.name, reason))
				continue
			}
			choices = append(choices, choice{
				spot: spot{n.name, d.is.DiskID}, onNode: near.nodes[n.name], inZone: near.zones[n.zone], onDisk: near.disks[d.is.DiskID],
				image: p.hasImage(w.imageID, d.is.DiskID), left: p.left(d.wanted, d.is, w),
			})
		}
	}
	if len(p.table()) == 0 {
		why = append(why, "there is no node yet")
	}
	if len(choices) == 0 {
		p.vain[key] = why
		return choice{}, why, false
	}
	return slices.MinFunc(choices, func(a, b choice) int { // stable: the first by name among equals
		return cmp.Or(a.onNode-b.onNode, a.inZone-b.inZone, a.onDisk-b.onDisk, b.image-a.image, cmp.Compare(b.left, a.left))
	}), nil, true
}

// near counts the other copies by node, zone and disk.
type near struct {
	nodes, zones, disks map[string]int
}

func (p *placer) near(w want) near {
	n := near{map[string]int{}, map[string]int{}, map[string]int{}}
	for _, s := range w.have {
		n.nodes[s.node]++
		n.zones[p.v.Nodes[s.node].Wanted.Value.Zone]++
		n.disks[s.diskID]++
	}
	return n
}

// table is every node with what does not depend on what is placed.
func (p *placer) table() []nodeRow {
	if p.rows != nil {
		return p.rows
	}
	for _, name := range sorted(p.v.Nodes) {
		n := p.v.Nodes[name]
		row := nodeRow{name: name, zone: n.Wanted.Value.Zone, tags: n.Wanted.Value.Tags, unfit: p.unfit(name)}
		for _, disk := range sorted(n.Wanted.Value.Disks) {
			is, seen := n.Observed.Value.Disks[disk]
			row.disks = append(row.disks, diskRow{disk, n.Wanted.Value.Disks[disk], is, seen})
		}
		p.rows = append(p.rows, row)
	}
	return p.rows
}

// unfit says why nothing is placed on a node; "" if something may be.
func (p *placer) unfit(name string) string {
	n := p.v.Nodes[name]
	w, o := &n.Wanted.Value, &n.Observed.Value
	theirs := Window{o.APIMin, o.APICurrent}
	switch {
	case !n.Wanted.Is():
		return "no longer a member"
	case w.Deleted != nil:
		return "is being removed"
	case w.EvictionRequested:
		return "is being emptied"
	case !w.AllowScheduling:
		return "scheduling is disabled"
	case n.Observed.Is() && !p.v.Up(name) && o.Ready:
		return "is down: nothing is heard of it"
	case !p.v.Up(name):
		return "not ready"
	case !p.api.meets(theirs):
		return fmt.Sprintf("speaks versions %d to %d between nodes, the leader %d to %d; upgrade the older one", theirs.Min, theirs.Current, p.api.Min, p.api.Current)
	case len(w.Disks) == 0:
		return "has no disk"
	}
	return ""
}

func (p *placer) refuseNode(n nodeRow, w want, near near) string {
	switch {
	case w.only != "" && n.name != w.only:
		return "is not the node it is sought for"
	case near.nodes[n.name] > 0 && !p.soft.nodes:
		return "has a copy already"
	case n.unfit != "":
		return n.unfit
	case near.zones[n.zone] > 0 && !p.soft.zones && n.zone == "":
		return "is in no zone, as is a node with a copy; give the nodes zones, or set " + catalog.SettingSoftZones
	case near.zones[n.zone] > 0 && !p.soft.zones:
		return fmt.Sprintf("zone %s has a copy already", n.zone)
	}
	for _, tag := range w.nodeTags {
		if !slices.Contains(n.tags, tag) {
			return fmt.Sprintf("the node has no tag %q", tag)
		}
	}
	return ""
}

func (p *placer) refuseDisk(dw catalog.DiskWanted, d catalog.DiskObserved, w want) string {
	switch {
	case dw.Lost:
		return "was given up"
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
	for _, tag := range w.diskTags {
		if !slices.Contains(dw.Tags, tag) {
			return fmt.Sprintf("the disk has no tag %q", tag)
		}
	}
	if reason := full(p.minFree, dw, d.TotalBytes, d.FreeBytes); reason != "" {
		return reason
	}
	soon := w.needBytes + p.coming[d.DiskID]
	if reason := full(p.minFree, dw, d.TotalBytes, d.FreeBytes-soon); w.needBytes > 0 && reason != "" {
		return fmt.Sprintf("%s are to be copied there, of %s free: %s", size(soon), size(d.FreeBytes), reason)
	}
	offered := max(0, d.TotalBytes-dw.StorageReservedBytes)
	if limit := offered / 100 * p.over; p.over > 0 && w.sizeBytes > 0 && p.promised[d.DiskID]+w.sizeBytes > limit {
		return fmt.Sprintf("%s asked for and %s promised already, of %s (%d %% of %s)",
			size(w.sizeBytes), size(p.promised[d.DiskID]), size(limit), p.over, size(offered))
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

// left is what a disk will have left, in parts of ten thousand of what it offers, for people who believe in sizes: free, and less what was promised and is not written yet. It
// may be below zero. Disks of different sizes so fill alike.
func (p *placer) left(dw catalog.DiskWanted, d catalog.DiskObserved, w want) int64 {
	const whole = 10000
	offered := d.TotalBytes - dw.StorageReservedBytes
	if offered <= 0 {
		return -whole
	}
	free := d.FreeBytes - p.coming[d.DiskID] - w.needBytes
	return int64(float64(min(free, offered-p.promised[d.DiskID]-w.sizeBytes)) / float64(offered) * whole)
}

// emptiest is the most that any disk has left.
func (p *placer) emptiest() int64 {
	if p.most == nil {
		most := int64(-1 << 60)
		for _, n := range p.table() {
			for _, d := range n.disks {
				if n.unfit == "" && p.refuseDisk(d.wanted, d.is, want{}) == "" {
					most = max(most, p.left(d.wanted, d.is, want{}))
				}
			}
		}
		p.most = &most
	}
	return *p.most
}

// hasImage is 2 if an image is ready on a disk, 1 if it will be, 0 if not.
func (p *placer) hasImage(imageID, diskID string) int {
	name, ok := p.images[imageID]
	if imageID == "" || !ok {
		return 0
	}
	img := p.v.Images[name]
	switch {
	case !slices.Contains(img.Wanted.Value.Disks, diskID):
		return 0
	case img.Observed.Value.ID == imageID && img.Observed.Value.Disks[diskID].State == catalog.ImageReady:
		return 2
	}
	return 1
}

// size is a number of bytes for people.
func size(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	sign := ""
	if n < 0 {
		sign, n = "-", -n
	}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	return sign + strings.TrimSuffix(strconv.FormatFloat(f, 'f', 1, 64), ".0") + " " + units[i]
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
