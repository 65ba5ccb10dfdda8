package plan

import (
	"slices"

	"ashlar/internal/catalog"
)

// CreateReplica makes an empty replica. It is only ever said of a volume nothing was written to.
type CreateReplica struct {
	follows
	Volume, VolumeID, DiskID, ReplicaID, Image, ImageID string
	SizeBytes                                           int64
}

// DeleteReplica destroys a replica, after a linearizable read of the tombstone.
type DeleteReplica struct {
	follows
	Volume, VolumeID, DiskID, ReplicaID string
}

// OpenVolume opens a volume on its replica and exports it.
type OpenVolume struct {
	follows
	Volume, VolumeID, DiskID, ReplicaID, Frontend string
	Salvage                                       bool
}

// CloseVolume closes an open volume.
type CloseVolume struct {
	follows
	Volume, VolumeID string
}

// Operate carries an operation out, after it was recorded as running.
type Operate struct {
	follows
	Operation         Half[catalog.Operation]
	DiskID, ReplicaID string
}

// Key implements Action.
func (a CreateReplica) Key() string { return VolumeKey(a.VolumeID) }

// Verb implements Action.
func (CreateReplica) Verb() string { return "create-replica" }

// Key implements Action.
func (a DeleteReplica) Key() string { return VolumeKey(a.VolumeID) }

// Verb implements Action.
func (DeleteReplica) Verb() string { return "delete-replica" }

// Key implements Action.
func (a OpenVolume) Key() string { return VolumeKey(a.VolumeID) }

// Verb implements Action.
func (OpenVolume) Verb() string { return "open-volume" }

// Key implements Action.
func (a CloseVolume) Key() string { return VolumeKey(a.VolumeID) }

// Verb implements Action.
func (CloseVolume) Verb() string { return "close-volume" }

// Key implements Action.
func (a Operate) Key() string { return VolumeKey(a.Operation.Value.VolumeID) }

// Verb implements Action.
func (Operate) Verb() string { return "operate" }

// VolumeKey is the Key of the actions on a volume: they are done one at a time.
func VolumeKey(volumeID string) string { return "volume/" + volumeID }

// here is all that one node knows of a volume with a replica on it.
type here struct {
	vol   Volume
	w     catalog.VolumeWanted
	place catalog.Placement

	diskOK  bool // the replica's disk can be looked into
	disk    FoundDisk
	replica FoundReplica
	there   bool // the replica is on its disk

	found FoundVolume
	open  bool // the data process has the volume, in whatever state

	member Half[catalog.Membership]
	op     Half[catalog.Operation] // the one to be done now
	todo   bool                    // there is one
}

// volume plans one volume, if a replica of it belongs here.
func (p *planner) volume(name string) {
	vol := p.in.View.Volumes[name]
	w := vol.Wanted.Value
	i := slices.IndexFunc(w.Replicas, func(r catalog.Placement) bool { return r.Node == p.in.Node })
	if !vol.Wanted.Is() || i < 0 || !p.in.Found.Known {
		return
	}
	h := &here{vol: vol, w: w, place: w.Replicas[i], member: p.in.View.Memberships[w.ID]}
	h.disk, h.diskOK = p.in.Found.disk(h.place.DiskID)
	h.diskOK = h.diskOK && h.disk.usable()
	if r := p.found.replicas[[2]string{h.place.DiskID, h.place.ReplicaID}]; r != nil {
		h.replica, h.there = *r, true
	}
	if f := p.found.volumes[w.ID]; f != nil {
		h.found, h.open = *f, true
	}
	h.op, h.todo = p.in.View.next(name, w.ID)

	current := !p.observeVolume(h)
	p.begin(p.volumeStep(h))
	p.volumeRecords(h, current)
}

// ticketed tells whether the volume is wanted open here by somebody.
func (h *here) ticketed() bool {
	return h.w.Deleted == nil && len(h.w.Tickets) > 0 && h.w.Tickets[0].Node == h.place.Node
}

// frontend is what the volume is wanted open with.
func (h *here) frontend() string {
	for _, t := range h.w.Tickets {
		if !t.DisableFrontend {
			return h.w.Frontend
		}
	}
	return ""
}

// offline tells whether an operation is waiting for which a detached volume is opened.
func (h *here) offline() bool {
	return h.w.Deleted == nil && h.todo && h.op.Value.Verb == catalog.VerbExpand
}

// lost tells whether the replica is not where it was, although something was written to it. It is never made again: an empty one would read as zeroes.
func (h *here) lost() bool {
	return h.diskOK && !h.there && h.member.Is() && h.member.Value.Epoch > 0
}

func (h *here) openAction() OpenVolume {
	a := OpenVolume{follows{h.vol.Wanted.Rev}, h.w.Name, h.w.ID, h.place.DiskID, h.place.ReplicaID, "", h.w.Salvage}
	if h.ticketed() {
		a.Frontend = h.frontend()
	}
	return a
}

func (h *here) closeAction() CloseVolume {
	return CloseVolume{follows{h.vol.Wanted.Rev}, h.w.Name, h.w.ID}
}

// volumeStep is the one next thing to do to a volume; nil: nothing, or wait.
//
//	no replica ──create──► replica ──open──► open ──operate──► open ──close──► replica ──delete──► no replica
func (p *planner) volumeStep(h *here) Action {
	switch {
	case h.stale():
		return nil
	case h.w.Deleted != nil:
		return deleteStep(h)
	case h.todo && p.known(h.op.Value.ID):
		return nil // its end is recorded first
	case h.open:
		return p.openStep(h)
	case !h.diskOK || !h.member.Is():
		return nil
	case !h.there:
		return p.createStep(h)
	case h.todo && h.op.Value.Verb == catalog.VerbCheck:
		return h.operate()
	case h.ticketed() || h.offline():
		return h.openAction()
	}
	return nil
}

// known tells whether the operation was carried out already.
func (p *planner) known(id string) bool {
	_, ok := p.in.Finished[id]
	return ok
}

func (h *here) operate() Action {
	return Operate{follows{h.op.Rev}, h.op, h.place.DiskID, h.place.ReplicaID}
}

func deleteStep(h *here) Action {
	switch {
	case h.open && h.found.State == FoundClosing:
		return nil
	case h.open:
		return h.closeAction()
	case h.there:
		return DeleteReplica{follows{h.vol.Wanted.Rev}, h.w.Name, h.w.ID, h.place.DiskID, h.place.ReplicaID}
	}
	return nil
}

// openStep is the next thing to do to a volume the data process has.
func (p *planner) openStep(h *here) Action {
	wanted := h.ticketed() || h.offline()
	switch h.found.State {
	case FoundOpen:
		switch {
		case h.todo:
			return h.operate()
		case !wanted, h.found.Frontend != h.frontend():
			return h.closeAction()
		}
		return nil
	case FoundFailed:
		switch {
		case h.todo && h.op.Value.Verb == catalog.VerbCheck:
			return h.operate()
		case !wanted, h.lastCopyFailed() && h.w.Salvage, h.found.Code == catalog.CodeConflict:
			return h.closeAction()
		case h.lastCopyFailed(): // it returns errors until it is detached or a person decides
			return nil
		}
		return h.openAction()
	}
	return nil // opening or closing: its end is seen
}

// stale tells whether the data process serves a later epoch than the catalogue knows of. Mostly the watch is a moment behind; if it stays so the catalogue is an
// old copy, and what it wants may be long over: nothing is done to the volume until ashlar recover.
func (h *here) stale() bool {
	return h.open && h.member.Is() && h.found.Epoch > h.member.Value.Epoch
}

// lastCopyFailed tells whether a flush of the last copy failed (design: invariant 8).
func (h *here) lastCopyFailed() bool {
	return h.open && h.found.State == FoundFailed && (h.found.Code == catalog.CodeFailed || h.found.Code == catalog.CodeNeedsSalvage)
}

// createStep makes the replica once its image is there.
func (p *planner) createStep(h *here) Action {
	if h.lost() {
		return nil
	}
	if h.w.ImageID != "" {
		img, ok := h.disk.image(h.w.ImageID)
		if !ok || img.VirtualSizeBytes > h.w.SizeBytes {
			return nil
		}
	}
	return h.createAction()
}

func (h *here) createAction() CreateReplica {
	return CreateReplica{follows{h.vol.Wanted.Rev}, h.w.Name, h.w.ID, h.place.DiskID, h.place.ReplicaID, h.w.Image, h.w.ImageID, h.w.SizeBytes}
}

// volumeRecords writes what follows from the volume's state besides the observed record: the end of operations, and salvage taken back. current tells
// that the observed record shows everything there is to see.
func (p *planner) volumeRecords(h *here, current bool) {
	if h.w.Deleted != nil {
		return
	}
	if h.open && h.found.State == FoundOpen && h.w.Salvage {
		w := h.w
		w.Salvage = false // one decision, one opening
		p.out.Writes = append(p.out.Writes, Write{Key: catalog.VolumeKey(catalog.Wanted, w.Name), Value: w, Was: h.vol.Wanted.Rev})
	}
	if !h.todo {
		return
	}
	r, over := p.in.Finished[h.op.Value.ID]
	if over && !current && r.Code == "" {
		return // whoever waits for the end may look at once
	}
	if !over && !p.in.Busy[VolumeKey(h.w.ID)] {
		r, over = p.hopeless(h)
	}
	if over {
		key := catalog.OperationKey(h.w.Name, h.op.Value.ID)
		p.out.Writes = append(p.out.Writes, Write{Key: key, Value: finish(h.op.Value, r, p.in), Was: h.op.Rev})
	}
}

// hopeless tells whether an operation cannot be carried out in the state the volume is in, and will not be by waiting.
func (p *planner) hopeless(h *here) (Result, bool) {
	verb := h.op.Value.Verb
	if h.lost() {
		return Result{Code: catalog.CodeFailed, Message: "the volume's copy is missing"}, true
	}
	if h.diskOK && !h.there && h.member.Is() {
		return Result{Code: catalog.CodeConflict, Message: "the volume is still being created"}, true
	}
	if verb == catalog.VerbCheck {
		return Result{}, false
	}
	if h.open && h.found.State == FoundFailed && h.found.Code != "" {
		return Result{Code: h.found.Code, Message: h.found.Error}, true
	}
	if f, ok := p.failure(h.openAction()); ok && f.Code != "" && !h.open {
		return Result{Code: f.Code, Message: f.Message}, true
	}
	if !h.open && !h.ticketed() && !h.offline() {
		return Result{Code: catalog.CodeNotAttached, Message: "the volume is not attached"}, true
	}
	return Result{}, false
}
