package api

import (
	"slices"
	"strings"

	"ashlar/internal/catalog"
)

// diskGiveUp has the cluster give up a disk that cannot be read any more, with what lay on it: copies of images are forgotten, volumes whose only copy it had are faulted until
// somebody deletes them. It is never asked of a disk that might be good: its node must be up and say that it cannot use it. Asking again is no error.
func (h *Handler) diskGiveUp(c *call, disk string) (any, error) {
	nodes, err := h.loadNodes(c.r.Context())
	if err != nil {
		return nil, err
	}
	was, ok := nodes.wanted[c.id].Disks[disk]
	ready := nodes.observed[c.id].Disks[disk].Conditions[catalog.ConditionReady]
	switch {
	case !ok:
		return nil, Failure(CodeNotFound, "node %s has no disk %s", quote(c.id), quote(disk))
	case was.Lost:
		return h.nodeGet(c)
	case nodes.down(c.id):
		return nil, Failure(CodeConflict, "node %s is down, and nobody else can tell whether its disk %s is lost; start it, or, if all of it is lost for good, `ashlar node remove %s --force`", c.id, disk, c.id)
	case ready.Status == catalog.ConditionTrue:
		return nil, Failure(CodeConflict, "node %s: disk %s can be read: nothing on it is given up; evict it (`ashlar disk evict %s/%s`), then remove it", c.id, disk, c.id, disk)
	case ready.Status != catalog.ConditionFalse, ready.Reason == catalog.ReasonNotAdoptedYet:
		return nil, Failure(CodeConflict, "node %s has not said yet whether disk %s can be read; try again when it has (`ashlar disk show %s/%s`)", c.id, disk, c.id, disk)
	}
	_, _, err = catalog.Update(c.r.Context(), h.cfg.Catalog, catalog.NodeKey(catalog.Wanted, c.id), func(w *catalog.NodeWanted) error {
		d, ok := w.Disks[disk]
		if !ok || d.Path != was.Path {
			return Failure(CodeConflict, "node %s: disk %s was removed meanwhile", c.id, disk)
		}
		d.Lost, d.AllowScheduling, d.EvictionRequested = true, false, false
		w.Disks[disk] = d
		return nil
	})
	if err != nil {
		return nil, h.gone(c, err)
	}
	return h.nodeGet(c)
}

// orForce says, of a disk that cannot be read, what would be given up by force.
func orForce(w *catalog.NodeWanted, o catalog.NodeObserved, disk string, on held) string {
	if w.Disks[disk].Lost {
		return "; it was given up, and goes when the volumes whose only copy it had are deleted: " + few(unique(on.volumes))
	}
	if o.Disks[disk].Conditions[catalog.ConditionReady].Status != catalog.ConditionFalse {
		return ""
	}
	var what []string
	if len(on.volumes) > 0 {
		what = append(what, "the copies of volumes "+few(unique(on.volumes)))
	}
	if len(on.images) > 0 {
		what = append(what, "the copies of images "+few(unique(on.images)))
	}
	return "; it cannot be read: if it is lost for good, `ashlar disk remove " + w.Name + "/" + disk + " --force` gives up " + strings.Join(what, " and ")
}

func unique(names []string) []string {
	names = slices.Sorted(slices.Values(names))
	return slices.Compact(names)
}
