package plan

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"ashlar/internal/catalog"
)

// volumeHead is the name of the present among snapshots.
const volumeHead = "volume-head"

// observeVolume says what its home sees of a volume. Node is there while the volume is open here, or about to be.
func (p *planner) observeVolume(h *here, o *catalog.VolumeObserved) {
	o.State = volumeState(p, h, o.State)
	o.Error = p.volumeError(h)
	o.Node, o.Endpoint, o.TCPEndpoint = "", "", ""
	opens := h.w.Deleted == nil && h.away == "" && h.diskOK && h.there && h.member.Is() && p.opensFor(h)
	if h.open || opens || o.State == catalog.VolumeAttached || o.State == catalog.VolumeAttaching {
		o.Node = h.node
	}
	if o.State == catalog.VolumeAttached {
		o.Endpoint, o.TCPEndpoint = h.found.Endpoint, h.found.TCPEndpoint
	}
	o.Robustness = p.robustness(h, o.State)
	o.Epoch = max(o.Epoch, h.member.Value.Epoch, h.found.Epoch)
	o.SizeBytes = h.size(o.SizeBytes)
	p.observeModes(h, o)
	if h.open && len(h.found.Layers) > 0 {
		o.Snapshots = snapshots(h.found.Layers)
		o.Space = h.found.Space
	}
	p.volumeConditions(h, o.Conditions)
}

// volumeState is drawn in docs/formats/catalog.md. was tells what the volume was wanted for before, which is all that is left of a ticket that is gone.
func volumeState(p *planner, h *here, was string) string {
	leaving := catalog.VolumeDetached // opened for an operation only
	if was == catalog.VolumeAttached || was == catalog.VolumeAttaching || was == catalog.VolumeDetaching {
		leaving = catalog.VolumeDetaching
	}
	switch {
	case h.w.Deleted != nil:
		return catalog.VolumeDeleting
	case h.open && !h.ticketed() && !h.leaving():
		return catalog.VolumeDetached // it stays open for something else; that it was closed in between need not have been seen
	case h.open && !h.ticketed():
		return leaving
	case h.open && h.found.State == FoundOpen:
		if h.found.Frontend != h.frontend() {
			return leaving
		}
		return catalog.VolumeAttached
	case h.open && h.found.State == FoundClosing:
		return leaving
	case h.lastCopyFailed() && (h.found.Endpoint != "" || h.found.Frontend == ""):
		return catalog.VolumeAttached // it is there, and returns errors
	case h.lost(), h.open && needsPerson(h.found.Code), p.refused(h):
		return catalog.VolumeDetached
	case !h.there && h.diskOK && !(h.arrived && h.member.Value.Epoch > 0) || !h.member.Is():
		return catalog.VolumeCreating
	case h.ticketed():
		return catalog.VolumeAttaching
	}
	return catalog.VolumeDetached
}

// needsPerson tells whether opening is refused until somebody does something about it.
func needsPerson(code string) bool {
	switch code {
	case catalog.CodeFailed, catalog.CodeNeedsSalvage, catalog.CodeCorrupt, catalog.CodeStale:
		return true
	}
	return false
}

// refused tells whether the volume was to be opened and that needs a person.
func (p *planner) refused(h *here) bool {
	f, ok := p.failure(h.openAction())
	return ok && !h.open && h.ticketed() && needsPerson(f.Code)
}

func (p *planner) robustness(h *here, state string) string {
	failed := h.open && h.found.State == FoundFailed && needsPerson(h.found.Code)
	switch {
	case h.w.Deleted != nil:
		return catalog.RobustnessUnknown
	case h.lost(), failed, p.refused(h), h.there && h.replica.Failed != "":
		return catalog.RobustnessFaulted
	case h.away != "" && !h.open, h.found.Away != "": // it comes back by itself
		return catalog.RobustnessUnknown
	case h.open && !h.diskOK:
		return catalog.RobustnessFaulted
	case state != catalog.VolumeAttached:
		return catalog.RobustnessUnknown
	}
	inSync := 0
	for _, m := range h.member.Value.Members {
		if m.InSync {
			inSync++
		}
	}
	switch {
	case inSync == 0:
		return catalog.RobustnessFaulted
	case inSync < h.w.Copies:
		return catalog.RobustnessDegraded
	}
	return catalog.RobustnessHealthy
}

// volumeError says why the wanted state is not there yet, if that is worth a sentence.
func (p *planner) volumeError(h *here) string {
	if h.w.Deleted != nil {
		return p.deleteError(h)
	}
	if h.givenUp != "" {
		return h.givenUp
	}
	if h.open && h.found.State == FoundFailed {
		return h.found.Error + advice(h.found.Code, h.w.Name)
	}
	if h.open && h.found.State == FoundOpen {
		return p.openError(h)
	}
	switch {
	case h.away != "":
		return "its copy is on " + h.away
	case !h.member.Is() && h.vol.Observed.Value.Epoch > 0:
		return "its membership record is missing; ashlar recover makes it again from the disks"
	case h.lost() && h.disk.Error != "":
		return "replica " + h.place.ReplicaID + " cannot be found on disk " + h.place.DiskID + ": " + h.disk.Error
	case h.lost():
		return "replica " + h.place.ReplicaID + " is not on disk " + h.place.DiskID + " any more"
	case !h.diskOK:
		return p.diskAway(h)
	}
	for _, a := range []Action{createAction(h.vol, h.place), h.openAction()} {
		if f, ok := p.failure(a); ok && (h.ticketed() || !h.there) {
			return f.Message + advice(f.Code, h.w.Name)
		}
	}
	return ""
}

// deleteError says why a volume that is being deleted is not gone.
func (p *planner) deleteError(h *here) string {
	if why := p.notClosed(h); why != "" {
		return why
	}
	for _, r := range slices.Concat(h.w.Replicas, h.w.Dropped) {
		there := slices.ContainsFunc(h.vol.Observed.Value.Replicas, func(x catalog.ReplicaObserved) bool { return x.ReplicaID == r.ReplicaID && !x.Created })
		if why := p.away(r.Node); why != "" && !p.in.View.Up(r.Node) && !there {
			return "its copy " + r.ReplicaID + " is on " + why + "; it is deleted when that node is back, or removed"
		}
		if f, ok := p.failure(DeleteReplica{follows: follows{h.vol.Wanted.Rev}, ReplicaID: r.ReplicaID}); ok {
			return f.Message
		}
	}
	if !h.diskOK && h.away == "" && h.givenUp == "" {
		return strings.TrimSuffix("its disk "+h.place.DiskID+" is not there: "+cmp.Or(h.diskWhy, h.disk.Error), ": ")
	}
	return ""
}

// diskAway says that a volume's disk cannot be used, and why, as far as anybody knows.
func (p *planner) diskAway(h *here) string {
	if h.place.Node != h.node {
		return strings.TrimSuffix("disk "+h.place.DiskID+" of node "+h.place.Node+" cannot be used: "+h.diskWhy, ": ")
	}
	why := h.disk.Error
	node := p.in.View.Nodes[p.in.Node]
	for name, d := range node.Observed.Value.Disks {
		if why == "" && d.DiskID == h.place.DiskID {
			why = p.in.Failures[FailureID(AdoptDisk{Path: node.Wanted.Value.Disks[name].Path})].Message
		}
	}
	return strings.TrimSuffix("disk "+h.place.DiskID+" cannot be used: "+why, ": ")
}

// openError says what is wrong with a volume that is open.
func (p *planner) openError(h *here) string {
	switch {
	case h.found.Away != "":
		return "its copy is on node " + h.place.Node + ", which does not answer: " + h.found.Away
	case !h.diskOK:
		return p.diskAway(h)
	}
	if why := p.notClosed(h); why != "" {
		return why
	}
	if f, ok := p.failure(h.limitsAction()); ok && h.found.Limits != h.w.Limits {
		return "its limits are not in force: " + f.Message
	}
	return ""
}

// notClosed says why a volume that is to be closed is not.
func (p *planner) notClosed(h *here) string {
	f, ok := p.failure(h.closeAction())
	switch {
	case !ok || !h.open || !h.leaving():
		return ""
	case f.InUse && h.found.Endpoint != "":
		return h.found.Endpoint + " is mounted or open; unmount it"
	case f.InUse:
		return "it is mounted or open; unmount it"
	}
	return f.Message
}

// advice says what a person can do about what needs one.
func advice(code, volume string) string {
	switch code {
	case catalog.CodeStale:
		return "; the catalogue is an old copy: stop `ashlar serve`, run `ashlar recover` on the node's disks, and start it again"
	case catalog.CodeFailed, catalog.CodeNeedsSalvage:
		return "; `ashlar volume salvage " + volume + "` goes on with what is left"
	}
	return ""
}

func (h *here) size(was int64) int64 {
	switch {
	case h.open && h.found.SizeBytes > 0:
		return h.found.SizeBytes
	case h.there && h.replica.SizeBytes > 0:
		return h.replica.SizeBytes
	}
	return was
}

// observeModes shows which replicas are in use. What else there is to see of them their own nodes show (replicaHere.observe).
func (p *planner) observeModes(h *here, o *catalog.VolumeObserved) {
	for i := range o.Replicas {
		r := &o.Replicas[i]
		failedAt := r.FailedAt
		r.Running, r.Mode, r.FailedAt = false, "", ""
		if r.ReplicaID != h.place.ReplicaID {
			continue
		}
		if h.open && h.found.State == FoundOpen {
			r.Running, r.Mode = true, "RW"
		}
		if o.Robustness == catalog.RobustnessFaulted {
			r.Running, r.Mode, r.FailedAt = false, "ERR", cmp.Or(failedAt, p.in.Now.UTC().Format(time.RFC3339))
		}
	}
}

// snapshots turns layers into what the dialect shows: parents and children by name.
func snapshots(layers []FoundLayer) []catalog.SnapshotObserved {
	names := map[string]string{}
	for _, l := range layers {
		switch {
		case l.Head:
			names[l.ID] = volumeHead
		case l.Snapshot != "":
			names[l.ID] = l.Snapshot
		default:
			names[l.ID] = l.ID
		}
	}
	out := make([]catalog.SnapshotObserved, 0, len(layers))
	for _, l := range layers {
		s := catalog.SnapshotObserved{
			Name: names[l.ID], LayerID: l.ID, Parent: names[l.Parent], Children: []string{}, Removed: l.Removed, UserCreated: l.UserCreated,
			Created: l.Created.UTC(), SizeBytes: l.DataBytes, Space: l.Space, Labels: l.Labels,
		}
		for _, c := range layers {
			if c.Parent == l.ID {
				s.Children = append(s.Children, names[c.ID])
			}
		}
		slices.Sort(s.Children)
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b catalog.SnapshotObserved) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.LayerID, b.LayerID))
	})
	return out
}

// sameLayers tells whether both are the same snapshots of the same layers, whatever their sizes.
func sameLayers(a, b []catalog.SnapshotObserved) bool {
	return slices.EqualFunc(a, b, func(x, y catalog.SnapshotObserved) bool {
		return x.LayerID == y.LayerID && x.Name == y.Name && x.Parent == y.Parent && x.Removed == y.Removed
	})
}

// volumeConditions: that copies are missing is control's to say, that all are placed is said here.
func (p *planner) volumeConditions(h *here, m map[string]catalog.Condition) {
	if copies(h.w) >= h.w.Copies {
		setCondition(m, catalog.ConditionScheduled, catalog.Condition{Status: catalog.ConditionTrue}, p.in.Now)
	}
	if f, ok := p.failure(h.closeAction()); ok && f.InUse && h.open && h.leaving() {
		setCondition(m, catalog.ConditionInUse, catalog.Condition{Status: catalog.ConditionTrue, Message: p.notClosed(h)}, p.in.Now)
	} else {
		delete(m, catalog.ConditionInUse)
	}
	if h.w.ImageID == "" || h.w.Deleted != nil {
		return
	}
	wait := catalog.Condition{Status: catalog.ConditionFalse}
	fits := catalog.Condition{Status: catalog.ConditionFalse}
	bytes, ready := p.imageAt(h)
	if ready && bytes > h.w.SizeBytes && !h.there {
		fits = catalog.Condition{
			Status: catalog.ConditionTrue, Reason: "TooSmall",
			Message: "the image has " + size(bytes) + ", the volume " + size(h.w.SizeBytes),
		}
	}
	if !ready && !h.there && h.diskOK {
		wait = catalog.Condition{Status: catalog.ConditionTrue, Reason: catalog.ReasonWaiting}
		o := p.in.View.Images[h.w.Image].Observed.Value
		if d := o.Disks[h.place.DiskID]; o.ID == h.w.ImageID && d.State == catalog.ImageFailed {
			wait.Reason, wait.Message = catalog.ReasonGetBackingImageFailed, d.Message
		}
	}
	setCondition(m, catalog.ConditionWaitForImage, wait, p.in.Now)
	setCondition(m, catalog.ConditionImageIncompatible, fits, p.in.Now)
}

// imageAt tells whether the volume's image is ready where its replica is, and how large it is.
func (p *planner) imageAt(h *here) (bytes int64, ready bool) {
	if h.place.Node == h.node {
		img, ok := h.disk.image(h.w.ImageID)
		return img.VirtualSizeBytes, ok
	}
	o := p.in.View.Images[h.w.Image].Observed.Value
	return o.VirtualSizeBytes, o.ID == h.w.ImageID && o.Disks[h.place.DiskID].State == catalog.ImageReady
}

// volumeNotes tells people what changed.
func (p *planner) volumeNotes(was, o catalog.VolumeObserved) []catalog.EventRecord {
	var out []catalog.EventRecord
	add := func(typ, reason, message string) {
		ev := note(p.in.Now, typ, catalog.KindVolume, o.Name, reason)
		ev.Message = message
		out = append(out, ev)
	}
	if was.ID != o.ID {
		was = catalog.VolumeObserved{State: catalog.VolumeCreating}
	}
	if o.State == catalog.VolumeAttached && was.State != o.State {
		add(catalog.Normal, "Attached", "to node "+o.Node)
	}
	if o.State == catalog.VolumeDetached && (was.State == catalog.VolumeAttached || was.State == catalog.VolumeDetaching) {
		add(catalog.Normal, "Detached", "")
	}
	if o.Robustness == catalog.RobustnessFaulted && was.Robustness != o.Robustness {
		add(catalog.Warning, "Faulted", o.Error)
	}
	return out
}
