package api

import (
	"maps"
	"path"
	"slices"
	"strings"

	"ashlar/internal/catalog"
)

func (h *Handler) nodeList(c *call) (any, error) {
	l, err := list[catalog.NodeWanted, catalog.NodeObserved](c.r.Context(), h, catalog.KindNode)
	if err != nil {
		return nil, err
	}
	data := make([]Node, 0, len(l.wanted))
	for _, name := range l.names() {
		data = append(data, h.node(c, l.wanted[name], l.observed[name]))
	}
	return collect(c, c.noun.schema, data), nil
}

func (h *Handler) nodeGet(c *call) (any, error) {
	w, ok, err := find[catalog.NodeWanted](c.r.Context(), h.cfg.Catalog, catalog.NodeKey(catalog.Wanted, c.id))
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, Failure(CodeNotFound, "node %s: there is no such node", quote(c.id))
	}
	o, _, err := find[catalog.NodeObserved](c.r.Context(), h.cfg.Catalog, catalog.NodeKey(catalog.Observed, c.id))
	if err != nil {
		return nil, err
	}
	return h.node(c, w, o), nil
}

// node makes the resource.
func (h *Handler) node(c *call, w catalog.NodeWanted, o catalog.NodeObserved) Node {
	actions := []string{"diskUpdate"}
	if w.Name == h.cfg.Node {
		actions = append(actions, "shutdown")
	}
	res := Node{
		Resource: c.resource(w.Name, actions...), Name: w.Name, Address: o.Address, AllowScheduling: w.AllowScheduling, EvictionRequested: w.EvictionRequested,
		Tags: tags(w.Tags), Version: o.Version, DataVersion: o.Data.Version, DataPID: o.Data.PID, Conditions: conditions(o.Conditions), Disks: map[string]Disk{},
	}
	flag := func(name string, holds bool, reason string) {
		if _, ok := res.Conditions[name]; ok {
			return
		}
		cond := Condition{Type: name, Status: catalog.ConditionTrue}
		if !holds {
			cond.Status, cond.Reason = catalog.ConditionFalse, reason
		}
		res.Conditions[name] = cond
	}
	flag(catalog.ConditionReady, o.Ready, "NotReady")
	flag(catalog.ConditionSchedulable, w.AllowScheduling, "AllowSchedulingFalse")
	// Of Kubernetes; clients wait for it.
	flag("MountPropagation", true, "")
	for name, disk := range w.Disks {
		res.Disks[name] = h.disk(disk, o.Disks[name])
	}
	return res
}

func (h *Handler) disk(w catalog.DiskWanted, o catalog.DiskObserved) Disk {
	d := Disk{
		Path: w.Path, DiskType: "filesystem", DiskUUID: o.DiskID, AllowScheduling: w.AllowScheduling, EvictionRequested: w.EvictionRequested,
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
}

// nodeUpdate sets all three of a node's wishes: what is left out of the body becomes false or empty, as in the dialect.
func (h *Handler) nodeUpdate(c *call) (any, error) {
	var in nodeInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	what := "node " + quote(c.id)
	if in.EvictionRequested && in.AllowScheduling {
		return nil, Failure(CodeInvalid, "%s: it cannot be emptied while new copies may be placed on it; set allowScheduling to false", what)
	}
	if err := checkTags(what, in.Tags); err != nil {
		return nil, err
	}
	_, _, err := catalog.Update(c.r.Context(), h.cfg.Catalog, catalog.NodeKey(catalog.Wanted, c.id), func(w *catalog.NodeWanted) error {
		w.AllowScheduling, w.EvictionRequested, w.Tags = in.AllowScheduling, in.EvictionRequested, tags(in.Tags)
		return nil
	})
	if err != nil {
		return nil, h.gone(c, err)
	}
	return h.nodeGet(c)
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
	o, _, err := find[catalog.NodeObserved](c.r.Context(), h.cfg.Catalog, catalog.NodeKey(catalog.Observed, c.id))
	if err != nil {
		return nil, err
	}
	_, _, err = catalog.Update(c.r.Context(), h.cfg.Catalog, catalog.NodeKey(catalog.Wanted, c.id), func(w *catalog.NodeWanted) error {
		return replaceDisks(w, o, in.Disks)
	})
	if err != nil {
		return nil, h.gone(c, err)
	}
	return h.nodeGet(c)
}

// replaceDisks is the rule of diskUpdate, on the record.
func replaceDisks(w *catalog.NodeWanted, o catalog.NodeObserved, in map[string]diskInput) error {
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
		case paths[d.Path] != "":
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
		paths[d.Path] = name
		next[name] = catalog.DiskWanted{
			Path: d.Path, AllowScheduling: d.AllowScheduling, EvictionRequested: d.EvictionRequested, StorageReservedBytes: d.StorageReserved, Tags: tags(d.Tags),
		}
	}
	for _, name := range slices.Sorted(maps.Keys(w.Disks)) {
		if _, stays := next[name]; stays {
			continue
		}
		if w.Disks[name].AllowScheduling {
			return Failure(CodeConflict, "node %s: disk %s still takes new copies; set its allowScheduling to false before removing it", w.Name, name)
		}
		if d := o.Disks[name]; d.ScheduledBytes != 0 || len(d.Replicas) > 0 || len(d.Images) > 0 {
			return Failure(CodeInUse, "node %s: disk %s still holds %d replicas and %d images; remove them first", w.Name, name, len(d.Replicas), len(d.Images))
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
	if h.cfg.Extra == nil || c.id != h.cfg.Node {
		return nil, missing("shutdown of node " + quote(c.id) + " from here")
	}
	if !in.Force {
		volumes, err := list[catalog.VolumeWanted, catalog.VolumeObserved](c.r.Context(), h, catalog.KindVolume)
		if err != nil {
			return nil, err
		}
		var attached []string
		for _, name := range volumes.names() {
			if o := volumes.observed[name]; o.Node == c.id && o.State == catalog.VolumeAttached || len(volumes.wanted[name].Tickets) > 0 {
				attached = append(attached, name)
			}
		}
		if len(attached) > 0 {
			return nil, Failure(CodeInUse, "node %s has attached %s; detach first, or force it: guests would get I/O errors until the node is back",
				c.id, volumeWord(attached))
		}
	}
	if err := h.cfg.Extra.Shutdown(c.r.Context()); err != nil {
		return nil, err
	}
	return h.nodeGet(c)
}

// about says who answers.
func (h *Handler) about(c *call) (any, error) {
	res := Resource{ID: h.cfg.Node, Type: "about", Links: map[string]string{"self": c.url("about"), "node": c.url("nodes", h.cfg.Node)}, Actions: map[string]string{}}
	return About{Resource: res, Node: h.cfg.Node, Version: h.cfg.Version}, nil
}

func (h *Handler) nodeActions() map[string]verb {
	return map[string]verb{"diskUpdate": {do: h.diskUpdate, in: disksInput{}, out: Node{}}, "shutdown": {do: h.shutdown, in: shutdownInput{}, out: Node{}}}
}
