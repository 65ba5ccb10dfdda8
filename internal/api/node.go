package api

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"ashlar/internal/catalog"
)

func (h *Handler) nodeList(c *call) (any, error) {
	nodes, err := h.loadNodesSince(c.r.Context())
	if err != nil {
		return nil, err
	}
	data := make([]Node, 0, len(nodes.wanted))
	for _, name := range nodes.names() {
		data = append(data, h.node(c, nodes, name))
	}
	return collect(c, c.noun.schema, data), nil
}

func (h *Handler) nodeGet(c *call) (any, error) {
	nodes, err := h.loadNodesSince(c.r.Context())
	if err != nil {
		return nil, err
	}
	if _, ok := nodes.wanted[c.id]; !ok {
		return nil, Failure(CodeNotFound, "node %s: there is no such node", quote(c.id))
	}
	return h.node(c, nodes, c.id), nil
}

// The states of a node.
const (
	NodeUp       = "up"
	NodeNotReady = "not ready" // it lives, and says why it is not ready
	NodeDown     = "down"      // nothing is heard of it
	NodeLeaving  = "leaving"   // it is being removed
)

// Reasons of a node's conditions, in the dialect's style.
const (
	reasonNodeDown = catalog.ReasonNodeDown
	reasonNotReady = "NotReady"
	reasonCordoned = "AllowSchedulingFalse"
	reasonNoDisk   = "NoSchedulableDisk"
	reasonNotSeen  = "NotSeen"
)

// node makes the resource.
func (h *Handler) node(c *call, nodes nodeSet, name string) Node {
	w, o := nodes.wanted[name], nodes.observed[name]
	actions := []string{"diskUpdate", "diskChange", "diskRemove", "change"}
	if name == h.cfg.Node || h.cfg.Forward != nil && !nodes.down(name) {
		actions = append(actions, "shutdown")
	}
	res := Node{
		Resource: c.resource(name, actions...), Name: name, Address: o.Address, AllowScheduling: w.AllowScheduling, EvictionRequested: w.EvictionRequested,
		Tags: tags(w.Tags), Version: o.Version, DataVersion: o.Data.Version, DataPID: o.Data.PID, Conditions: conditions(o.Conditions), Disks: map[string]Disk{},
		PlacementZone: w.Zone, NodeID: w.ID, Port: o.Port, Voter: w.Voter, Member: o.Member, APIMin: o.APIMin, APICurrent: o.APICurrent, State: nodes.state(name),
		Leads: nodes.leader == name,
	}
	if w.Deleted != nil {
		res.DeletionTimestamp = stamp(*w.Deleted)
	}
	for disk, d := range w.Disks {
		res.Disks[disk] = h.disk(d, o.Disks[disk])
	}
	down := nodes.down(name)
	if down {
		res.DataVersion, res.DataPID = "", 0
		for disk, d := range res.Disks {
			for _, cond := range []string{catalog.ConditionReady, catalog.ConditionSchedulable} {
				d.Conditions[cond] = Condition{Type: cond, Status: catalog.ConditionFalse, Reason: reasonNodeDown, Message: "node " + name + " is down"}
			}
			res.Disks[disk] = d
		}
	} else {
		res.AliveSince = stamp(nodes.alive[name].Since)
	}
	res.Conditions[catalog.ConditionReady] = nodes.readiness(name, res.Conditions[catalog.ConditionReady])
	said := res.Conditions[catalog.ConditionSchedulable]
	can := schedulable(res)
	if can.Status == said.Status {
		can.LastTransitionTime = said.LastTransitionTime
	}
	res.Conditions[catalog.ConditionSchedulable] = can
	// Of Kubernetes; clients wait for it.
	res.Conditions["MountPropagation"] = Condition{Type: "MountPropagation", Status: catalog.ConditionTrue}
	return res
}

// state is a node's, in a word.
func (n nodeSet) state(name string) string {
	switch {
	case n.wanted[name].Deleted != nil:
		return NodeLeaving
	case n.down(name):
		return NodeDown
	case !n.observed[name].Ready:
		return NodeNotReady
	}
	return NodeUp
}

// readiness is a node's condition Ready, from what it said last and whether it lives. A node that went away without a word cannot say so itself.
func (n nodeSet) readiness(name string, said Condition) Condition {
	said.Type = catalog.ConditionReady
	switch {
	case n.down(name):
		said.Status, said.Reason, said.LastTransitionTime = catalog.ConditionFalse, reasonNodeDown, stamp(n.silent[name])
		said.Message = fmt.Sprintf("nothing is heard of it for more than %d s: it is off, cut off, or its serve does not run", int(catalog.AliveTTL.Seconds()))
		if t := n.silent[name]; !t.IsZero() {
			said.Message = "nothing is heard of it since " + stamp(t) + ": it is off, cut off, or its serve does not run"
		}
	case n.observed[name].Ready:
		said.Status, said.Reason, said.Message = catalog.ConditionTrue, "", ""
	default:
		said.Status, said.Reason = catalog.ConditionFalse, cmp.Or(said.Reason, reasonNotReady)
		if said.Message == "" && n.observed[name].Name == "" {
			said.Reason, said.Message = reasonNotSeen, "it has not reported yet"
		}
	}
	return said
}

// schedulable tells whether a node takes new copies, and if not, why.
func schedulable(n Node) Condition {
	cond := Condition{Type: catalog.ConditionSchedulable, Status: catalog.ConditionFalse}
	var why []string
	for _, name := range slices.Sorted(maps.Keys(n.Disks)) {
		d := n.Disks[name]
		switch s := d.Conditions[catalog.ConditionSchedulable]; {
		case !d.AllowScheduling:
			why = append(why, "disk "+name+": cordoned")
		case s.Status != catalog.ConditionTrue:
			why = append(why, "disk "+name+": "+cmp.Or(s.Message, s.Reason, "not schedulable"))
		}
	}
	ready := n.Conditions[catalog.ConditionReady]
	switch {
	case n.State == NodeLeaving:
		cond.Reason, cond.Message = reasonNotReady, "it is being removed"
	case ready.Status != catalog.ConditionTrue:
		cond.Reason, cond.Message = ready.Reason, cmp.Or(ready.Message, "it is not ready")
	case n.EvictionRequested:
		cond.Reason, cond.Message = reasonCordoned, "it is being emptied (evictionRequested)"
	case !n.AllowScheduling:
		cond.Reason, cond.Message = reasonCordoned, "cordoned (allowScheduling is false)"
	case len(n.Disks) == 0:
		cond.Reason, cond.Message = reasonNoDisk, "it has no disk"
	case len(why) == len(n.Disks):
		cond.Reason, cond.Message = reasonNoDisk, strings.Join(why, "; ")
	default:
		cond.Status = catalog.ConditionTrue
	}
	return cond
}

func (h *Handler) disk(w catalog.DiskWanted, o catalog.DiskObserved) Disk {
	d := Disk{
		Path: w.Path, Lost: w.Lost, DiskType: "filesystem", DiskUUID: o.DiskID, AllowScheduling: w.AllowScheduling, EvictionRequested: w.EvictionRequested,
		Tags: tags(w.Tags), StorageReserved: w.StorageReservedBytes, StorageAvailable: o.FreeBytes, StorageMaximum: o.TotalBytes,
		StorageScheduled: o.ScheduledBytes, Conditions: conditions(o.Conditions), ScheduledReplica: map[string]int64{}, ScheduledBackingImage: map[string]int64{},
	}
	maps.Copy(d.ScheduledReplica, o.Replicas)
	maps.Copy(d.ScheduledBackingImage, o.Images)
	for _, name := range []string{catalog.ConditionReady, catalog.ConditionSchedulable} {
		if _, ok := d.Conditions[name]; !ok {
			d.Conditions[name] = Condition{Type: name, Status: catalog.ConditionUnknown, Reason: "NotSeen", Message: "the node has not reported this disk yet"}
		}
	}
	return d
}

func conditions(from map[string]catalog.Condition) map[string]Condition {
	out := map[string]Condition{}
	for name, c := range from {
		out[name] = condition(name, c)
	}
	return out
}

// tags sorts and deduplicates; never nil.
func tags(in []string) []string {
	out := append([]string{}, in...)
	slices.Sort(out)
	return slices.Compact(out)
}

func checkTags(what string, list []string) error {
	for _, t := range list {
		if t == "" || len(t) > maxName || strings.ContainsFunc(t, func(r rune) bool { return r <= ' ' || r == 0x7f || r == ',' }) {
			return Failure(CodeInvalid, "%s: tag %s: a tag has 1 to %d characters, no spaces and no commas", what, quote(t), maxName)
		}
	}
	return nil
}

type nodeInput struct {
	AllowScheduling   bool     `json:"allowScheduling"`
	EvictionRequested bool     `json:"evictionRequested"`
	Tags              []string `json:"tags"`
	PlacementZone     *string  `json:"placementZone"` // ours: stays as it is when it is left out
}

// nodeUpdate sets all three of a node's wishes: what is left out of the body becomes false or empty, as in the dialect.
func (h *Handler) nodeUpdate(c *call) (any, error) {
	var in nodeInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	return h.changeNode(c, nodeChangeInput{
		AllowScheduling: &in.AllowScheduling, EvictionRequested: &in.EvictionRequested, Tags: append([]string{}, in.Tags...), PlacementZone: in.PlacementZone,
	})
}

// nodeChangeInput changes what it has.
type nodeChangeInput struct {
	AllowScheduling   *bool    `json:"allowScheduling"`
	EvictionRequested *bool    `json:"evictionRequested"`
	Tags              []string `json:"tags"`          // [] takes them all away
	PlacementZone     *string  `json:"placementZone"` // copies are kept in different zones where there are enough
}

// nodeChange is ours: it changes what is named and nothing else, so that two people who change different things do not undo each other.
func (h *Handler) nodeChange(c *call) (any, error) {
	var in nodeChangeInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	return h.changeNode(c, in)
}

func (h *Handler) changeNode(c *call, in nodeChangeInput) (any, error) {
	what := "node " + quote(c.id)
	if err := checkTags(what, in.Tags); err != nil {
		return nil, err
	}
	if err := checkZone(what, in.PlacementZone); err != nil {
		return nil, err
	}
	if in.EvictionRequested != nil && *in.EvictionRequested {
		was, ok, err := find[catalog.NodeWanted](c.r.Context(), h.cfg.Catalog, catalog.NodeKey(catalog.Wanted, c.id))
		if err != nil {
			return nil, err
		}
		allow := was.AllowScheduling
		if in.AllowScheduling != nil {
			allow = *in.AllowScheduling
		}
		if ok && !was.EvictionRequested && !allow {
			if err := h.canEvict(c.r.Context(), c.id, ""); err != nil {
				return nil, err
			}
		}
	}
	_, _, err := catalog.Update(c.r.Context(), h.cfg.Catalog, catalog.NodeKey(catalog.Wanted, c.id), func(w *catalog.NodeWanted) error {
		return in.apply(what, w)
	})
	if err != nil {
		return nil, h.gone(c, err)
	}
	return h.nodeGet(c)
}

// checkZone wants a zone's name, or none; nil is nothing said.
func checkZone(what string, zone *string) error {
	letter := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_'
	}
	switch {
	case zone == nil || *zone == "":
		return nil
	case len(*zone) > maxName:
		return Failure(CodeInvalid, "%s: zone %s is %d bytes long; at most %d are allowed", what, quote(*zone), len(*zone), maxName)
	}
	return checkLetters("zone", *zone, letter, "letters, digits, '_', '-' and '.'")
}

// apply is the rule of changing a node, on the record.
func (in nodeChangeInput) apply(what string, w *catalog.NodeWanted) error {
	if in.AllowScheduling != nil {
		w.AllowScheduling = *in.AllowScheduling
	}
	if in.EvictionRequested != nil {
		w.EvictionRequested = *in.EvictionRequested
	}
	if in.Tags != nil {
		w.Tags = tags(in.Tags)
	}
	if in.PlacementZone != nil {
		w.Zone = *in.PlacementZone
	}
	switch {
	case w.Deleted != nil:
		return Failure(CodeConflict, "%s is being removed", what)
	case w.EvictionRequested && w.AllowScheduling:
		return Failure(CodeInvalid, "%s: it cannot be emptied while new copies may be placed on it; set allowScheduling to false", what)
	}
	return nil
}

// canEvict refuses to empty a node, or one disk of it, when what lies there has nowhere to go.
func (h *Handler) canEvict(ctx context.Context, node, disk string) error {
	if h.cfg.CanEvict == nil {
		return nil
	}
	err := h.cfg.CanEvict(ctx, node, disk)
	if err == nil || CodeOf(err) != CodeInternal {
		return err
	}
	where := "node " + node
	if disk != "" {
		where += ": disk " + disk
	}
	return Because(err, CodeConflict, "%s cannot be emptied: %v", where, err)
}

type diskInput struct {
	Path              string   `json:"path"`
	DiskType          string   `json:"diskType"`
	AllowScheduling   bool     `json:"allowScheduling"`
	EvictionRequested bool     `json:"evictionRequested"`
	StorageReserved   int64    `json:"storageReserved"`
	Tags              []string `json:"tags"`
}

type disksInput struct {
	Disks map[string]diskInput `json:"disks"`
}

// diskUpdate replaces the whole map of a node's disks.
func (h *Handler) diskUpdate(c *call) (any, error) {
	var in disksInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	if in.Disks == nil {
		return nil, Failure(CodeInvalid, "node %s: disks is missing; it replaces all disks of the node", quote(c.id))
	}
	return h.changeDisks(c, func(map[string]diskInput) (map[string]diskInput, error) { return in.Disks, nil })
}

// diskChangeInput changes one disk, or adds it: then it needs a path, and takes copies unless something else is said.
type diskChangeInput struct {
	Disk              string   `json:"disk"` // its name
	Path              string   `json:"path"` // of a new one: a directory of the node, absolute
	AllowScheduling   *bool    `json:"allowScheduling"`
	EvictionRequested *bool    `json:"evictionRequested"`
	StorageReserved   *int64   `json:"storageReserved"` // bytes that are left alone
	Tags              []string `json:"tags"`            // [] takes them all away
}

// diskChange is ours: it changes one disk and leaves the others as they are.
func (h *Handler) diskChange(c *call) (any, error) {
	var in diskChangeInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	return h.changeDisks(c, func(disks map[string]diskInput) (map[string]diskInput, error) {
		d, known := disks[in.Disk]
		switch {
		case known && in.Path != "" && in.Path != d.Path:
			return nil, Failure(CodeExists, "node %s has a disk %s already, at %s", c.id, quote(in.Disk), d.Path)
		case !known && in.Path == "":
			return nil, Failure(CodeNotFound, "node %s has no disk %s; with a path it is added", quote(c.id), quote(in.Disk))
		case !known:
			d = diskInput{Path: in.Path, AllowScheduling: true}
		}
		if in.AllowScheduling != nil {
			d.AllowScheduling = *in.AllowScheduling
		}
		if in.EvictionRequested != nil {
			d.EvictionRequested = *in.EvictionRequested
		}
		if in.StorageReserved != nil {
			d.StorageReserved = *in.StorageReserved
		}
		if in.Tags != nil {
			d.Tags = in.Tags
		}
		disks[in.Disk] = d
		return disks, nil
	})
}

type diskRemoveInput struct {
	Disk  string `json:"disk"`  // its name
	Force bool   `json:"force"` // also one that cannot be read and has something: that is given up
}

// diskRemove is ours: it takes one disk away that takes no copies and has none; with force one that is lost for good.
func (h *Handler) diskRemove(c *call) (any, error) {
	var in diskRemoveInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	if in.Force {
		return h.diskGiveUp(c, in.Disk)
	}
	return h.changeDisks(c, func(disks map[string]diskInput) (map[string]diskInput, error) {
		if _, ok := disks[in.Disk]; !ok {
			return nil, Failure(CodeNotFound, "node %s has no disk %s", quote(c.id), quote(in.Disk))
		}
		delete(disks, in.Disk)
		return disks, nil
	})
}

// changeDisks gives change a node's disks, and records what it makes of them.
func (h *Handler) changeDisks(c *call, change func(map[string]diskInput) (map[string]diskInput, error)) (any, error) {
	ctx := c.r.Context()
	o, _, err := find[catalog.NodeObserved](ctx, h.cfg.Catalog, catalog.NodeKey(catalog.Observed, c.id))
	if err != nil {
		return nil, err
	}
	held, err := h.heldDisks(ctx)
	if err != nil {
		return nil, err
	}
	_, _, err = catalog.Update(ctx, h.cfg.Catalog, catalog.NodeKey(catalog.Wanted, c.id), func(w *catalog.NodeWanted) error {
		now := map[string]diskInput{}
		for name, d := range w.Disks {
			now[name] = diskInput{Path: d.Path, AllowScheduling: d.AllowScheduling, EvictionRequested: d.EvictionRequested, StorageReserved: d.StorageReservedBytes, Tags: d.Tags}
		}
		next, err := change(now)
		if err != nil {
			return err
		}
		was := w.Disks
		if err := replaceDisks(w, o, held, next); err != nil {
			return err
		}
		for _, name := range slices.Sorted(maps.Keys(w.Disks)) {
			if w.Disks[name].EvictionRequested && !was[name].EvictionRequested {
				if err := h.canEvict(ctx, w.Name, name); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, h.gone(c, err)
	}
	return h.nodeGet(c)
}

// heldDisks counts what the records want on each disk, or do not know to be gone from it, by the disk's id.
func (h *Handler) heldDisks(ctx context.Context) (map[string]held, error) {
	out := map[string]held{}
	volumes, err := list[catalog.VolumeWanted, struct{}](ctx, h, catalog.KindVolume)
	if err != nil {
		return nil, err
	}
	for _, v := range volumes.wanted {
		for _, r := range slices.Concat(v.Replicas, v.Dropped) {
			on := out[r.DiskID]
			on.replicas, on.volumes = on.replicas+1, append(on.volumes, v.Name)
			out[r.DiskID] = on
		}
	}
	images, err := list[catalog.ImageWanted, catalog.ImageObserved](ctx, h, catalog.KindImage)
	if err != nil {
		return nil, err
	}
	for name, w := range images.wanted {
		for _, disk := range newImageView(w, images.observed[name]).onDisks() {
			on := out[disk]
			on.images = append(on.images, name)
			out[disk] = on
		}
	}
	return out, nil
}

// held is how much the records have on a disk.
type held struct {
	replicas        int
	volumes, images []string // their names
}

// replaceDisks is the rule of diskUpdate, on the record.
func replaceDisks(w *catalog.NodeWanted, o catalog.NodeObserved, on map[string]held, in map[string]diskInput) error {
	next := map[string]catalog.DiskWanted{}
	paths := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(in)) {
		d := in[name]
		what := "node " + w.Name + ": disk " + quote(name)
		if err := checkName("disk", name); err != nil {
			return err
		}
		was, existed := w.Disks[name]
		switch {
		case !path.IsAbs(d.Path) || path.Clean(d.Path) != d.Path || len(d.Path) > 4096:
			return Failure(CodeInvalid, "%s: path %s must be absolute and without \"..\"", what, quote(d.Path))
		case existed && was.Lost && (d.AllowScheduling || d.EvictionRequested):
			return Failure(CodeConflict, "%s was given up: nothing is placed there, and nothing leaves it; if it can be read again add it under another name", what)
		case paths[d.Path] != "" && !was.Lost:
			return Failure(CodeInvalid, "%s and disk %s have the same path", what, paths[d.Path])
		case existed && was.Path != d.Path:
			return Failure(CodeInvalid, "%s: its path %s cannot be changed; remove the disk and add another", what, was.Path)
		case d.DiskType != "" && d.DiskType != "filesystem":
			return Failure(CodeNotSupported, "%s: disk type %s is not supported; a disk is a directory (filesystem)", what, quote(d.DiskType))
		case d.EvictionRequested && d.AllowScheduling:
			return Failure(CodeInvalid, "%s: it cannot be emptied while new copies may be placed on it; set allowScheduling to false", what)
		case d.StorageReserved < 0:
			return Failure(CodeInvalid, "%s: storageReserved is negative", what)
		}
		if err := checkTags(what, d.Tags); err != nil {
			return err
		}
		if !was.Lost { // in its place there may be another
			paths[d.Path] = name
		}
		next[name] = catalog.DiskWanted{
			Path: d.Path, Lost: was.Lost, AllowScheduling: d.AllowScheduling, EvictionRequested: d.EvictionRequested, StorageReservedBytes: d.StorageReserved, Tags: tags(d.Tags),
		}
	}
	for _, name := range slices.Sorted(maps.Keys(w.Disks)) {
		if _, stays := next[name]; stays {
			continue
		}
		if w.Disks[name].AllowScheduling {
			return Failure(CodeConflict, "node %s: disk %s still takes new copies; set its allowScheduling to false before removing it", w.Name, name)
		}
		d := o.Disks[name]
		replicas, images := max(len(d.Replicas), on[d.DiskID].replicas), max(len(d.Images), len(on[d.DiskID].images))
		if d.DiskID != "" && replicas+images > 0 || d.ScheduledBytes != 0 {
			return Failure(CodeInUse, "node %s: disk %s still holds %d replicas and %d images; evict it first (`ashlar disk evict %s/%s`)%s", w.Name, name, replicas, images, w.Name, name, orForce(w, o, name, on[d.DiskID]))
		}
	}
	w.Disks = next
	return nil
}

type shutdownInput struct {
	Force bool `json:"force"`
}

// shutdown stops the node that answers, guests' I/O included; without force only while no volume is attached to it.
func (h *Handler) shutdown(c *call) (any, error) {
	var in shutdownInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	if c.id != h.cfg.Node {
		if _, err := h.nodeGet(c); err != nil {
			return nil, err
		}
		return h.forwardBody(c, c.id, "shutdown of node "+c.id, in)
	}
	if h.cfg.Extra == nil {
		return nil, missing("shutdown of node " + quote(c.id) + " from here")
	}
	if !in.Force {
		volumes, err := list[catalog.VolumeWanted, catalog.VolumeObserved](c.r.Context(), h, catalog.KindVolume)
		if err != nil {
			return nil, err
		}
		var attached []string
		for _, name := range volumes.names() {
			if o := volumes.observed[name]; o.Node == c.id && o.State == catalog.VolumeAttached || wantedOn(volumes.wanted[name], c.id) {
				attached = append(attached, name)
			}
		}
		if len(attached) > 0 {
			return nil, Failure(CodeInUse, "node %s has attached %s; detach first, or force it: guests would get I/O errors until the node is back",
				c.id, volumeWord(attached))
		}
	}
	last := h.lastLook(c)
	if err := h.cfg.Extra.Shutdown(c.r.Context()); err != nil {
		return nil, err
	}
	return last, nil
}

// lastLookTimeout bounds what a node that is shut down by force asks of a catalogue that may have gone before it, as it has for the last nodes of a cluster.
const lastLookTimeout = 2 * time.Second

// lastLook is this node as it is shown to whoever shuts it down; if the catalogue does not answer, its name.
func (h *Handler) lastLook(c *call) any {
	ctx, cancel := context.WithTimeout(c.r.Context(), lastLookTimeout)
	defer cancel()
	short := *c
	short.r = c.r.WithContext(ctx)
	if res, err := h.nodeGet(&short); err == nil {
		return res
	}
	return Node{Resource: c.resource(c.id), Name: c.id, Tags: []string{}, Conditions: map[string]Condition{}, Disks: map[string]Disk{}}
}

// about says who answers.
func (h *Handler) about(c *call) (any, error) {
	res := Resource{ID: h.cfg.Node, Type: "about", Links: map[string]string{"self": c.url("about"), "node": c.url("nodes", h.cfg.Node)}, Actions: map[string]string{}}
	return About{Resource: res, Node: h.cfg.Node, Version: h.cfg.Version}, nil
}

// wantedOn tells whether a volume is to be attached to a node.
func wantedOn(v catalog.VolumeWanted, node string) bool {
	return slices.ContainsFunc(v.Tickets, func(t catalog.Ticket) bool { return t.Node == node })
}

func (h *Handler) nodeActions() map[string]verb {
	return map[string]verb{
		"diskUpdate": {do: h.diskUpdate, in: disksInput{}, out: Node{}}, "diskChange": {do: h.diskChange, in: diskChangeInput{}, out: Node{}},
		"diskRemove": {do: h.diskRemove, in: diskRemoveInput{}, out: Node{}}, "change": {do: h.nodeChange, in: nodeChangeInput{}, out: Node{}},
		"shutdown": {do: h.shutdown, in: shutdownInput{}, out: Node{}},
	}
}
