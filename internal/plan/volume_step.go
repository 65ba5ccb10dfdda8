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
	Limits                                        catalog.Limits
}

// CloseVolume closes an open volume. What Readings read ends with it, and is begun again when the volume is open again.
type CloseVolume struct {
	follows
	Volume, VolumeID string
	Readings         []Reading
}

// SetLimits changes the limits of an open volume.
type SetLimits struct {
	follows
	Volume, VolumeID string
	Limits           catalog.Limits
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

// Key implements Action: a change of limits waits for nothing that takes long.
func (a SetLimits) Key() string { return "limits/" + a.VolumeID }

// Verb implements Action.
func (SetLimits) Verb() string { return "set-limits" }

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
	op     Half[catalog.Operation] // the one to be done now, exports apart
	todo   bool                    // there is one

	export    Half[catalog.Operation] // the export to be done now
	exporting bool                    // there is one
	readings  []Reading               // that somebody wants, the export's included
	drop      Reading                 // a temporary snapshot that nobody reads
	dropping  bool                    // there is one
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
	h.op, h.todo = p.in.View.next(name, w.ID, isNoExport)
	h.export, h.exporting = p.in.View.next(name, w.ID, isExport)
	h.readings = p.readings[w.ID]
	h.drop, h.dropping = p.leftover(h)

	current := !p.observeVolume(h)
	p.begin(p.volumeStep(h))
	p.begin(h.limitsStep())
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

// offline tells whether something is to be done for which a detached volume is opened.
func (h *here) offline() bool {
	return h.w.Deleted == nil && (h.todo && h.op.Value.Verb == catalog.VerbExpand || len(h.readings) > 0 || h.dropping)
}

// may tells whether the volume is in a state for its operation: those that need it attached do not ride on its being open for something else.
func (h *here) may() bool {
	switch h.op.Value.Verb {
	case catalog.VerbExpand, catalog.VerbCheck:
		return true
	}
	return h.ticketed() || h.op.Value.State == catalog.OperationRunning || len(h.readings) == 0 && !h.dropping
}

// lost tells whether the replica is not where it was, although something was written to it. It is never made again: an empty one would read as zeroes.
func (h *here) lost() bool {
	return h.diskOK && !h.there && h.member.Is() && h.member.Value.Epoch > 0
}

func (h *here) openAction() OpenVolume {
	a := OpenVolume{follows{h.vol.Wanted.Rev}, h.w.Name, h.w.ID, h.place.DiskID, h.place.ReplicaID, "", h.w.Salvage, h.w.Limits}
	if h.ticketed() {
		a.Frontend = h.frontend()
	}
	return a
}

func (h *here) closeAction() CloseVolume {
	return CloseVolume{follows{h.vol.Wanted.Rev}, h.w.Name, h.w.ID, h.readings}
}

// limitsStep keeps the limits of an open volume as they are wanted.
func (h *here) limitsStep() Action {
	if !h.open || h.found.State != FoundOpen || h.w.Deleted != nil || h.stale() || h.found.Limits == h.w.Limits {
		return nil
	}
	return h.limitsAction()
}

func (h *here) limitsAction() SetLimits {
	return SetLimits{follows{h.vol.Wanted.Rev}, h.w.Name, h.w.ID, h.w.Limits}
}

// leaving tells whether the open volume is to be closed: it is wanted open no more, or with another frontend.
func (h *here) leaving() bool {
	return h.w.Deleted != nil || !h.ticketed() && !h.offline() || h.found.Frontend != h.openAction().Frontend
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
	case h.todo && p.known(h.op.Value.ID), h.exporting && p.known(h.export.Value.ID):
		return nil // its end is recorded first
	case h.open:
		return p.openStep(h)
	case !h.diskOK || !h.member.Is():
		return nil
	case !h.there:
		return p.createStep(h)
	case h.todo && h.op.Value.Verb == catalog.VerbCheck:
		return h.operate()
	case h.ticketed(), h.offline() && (!h.todo || len(h.readings) > 0 || h.dropping || p.refusedOperation(h) == ""):
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
		if end := p.exportEnd(h); end != nil {
			return end
		}
		switch {
		case h.todo && h.may() && p.refusedOperation(h) == "":
			return h.operate()
		case h.leaving():
			return h.closeAction()
		case h.dropping:
			return DropReading{follows{h.vol.Wanted.Rev}, h.drop}
		}
		return p.exportStep(h)
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
	if h.todo {
		p.operationRecord(h, h.op, current)
	}
	if h.exporting {
		p.operationRecord(h, h.export, current)
	}
}

// operationRecord writes that an operation ended, or how far it is.
func (p *planner) operationRecord(h *here, op Half[catalog.Operation], current bool) {
	r, over := p.in.Finished[op.Value.ID]
	if over && !current && r.Code == "" {
		return // whoever waits for the end may look at once
	}
	if !over && !p.in.Busy[VolumeKey(h.w.ID)] {
		r, over = p.hopeless(h, op.Value)
	}
	w := Write{Key: catalog.OperationKey(h.w.Name, op.Value.ID), Was: op.Rev}
	if percent := p.progress(h, op.Value); over {
		w.Value = finish(op.Value, r, p.in)
	} else if op.Value.State == catalog.OperationRunning && percent > op.Value.Progress {
		op.Value.Progress = percent
		w.Value = op.Value
	} else {
		return
	}
	p.out.Writes = append(p.out.Writes, w)
}

// progress is how far a running operation is, in per cent, as far as it is known; 100 is said when it has ended.
func (p *planner) progress(h *here, op catalog.Operation) int {
	if job := p.found.exports[op.ID]; op.Verb == catalog.VerbExport && job != nil {
		return min(99, job.Percent)
	}
	return 0
}

// hopeless tells whether an operation cannot be carried out in the state the volume is in, and will not be by waiting.
func (p *planner) hopeless(h *here, op catalog.Operation) (Result, bool) {
	verb := op.Verb
	if h.lost() {
		return Result{Code: catalog.CodeFailed, Message: "the volume's copy is missing"}, true
	}
	if h.diskOK && !h.there && h.member.Is() {
		return Result{Code: catalog.CodeConflict, Message: "the volume is still being created"}, true
	}
	if verb == catalog.VerbCheck {
		return Result{}, false
	}
	if why := p.refusedRoom(h, op); why != "" {
		return Result{Code: catalog.CodeNoSpace, Message: why}, true
	}
	if h.open && h.found.State == FoundFailed && h.found.Code != "" {
		return Result{Code: h.found.Code, Message: h.found.Error}, true
	}
	if f, ok := p.failure(h.openAction()); ok && f.Code != "" && !h.open {
		return Result{Code: f.Code, Message: f.Message}, true
	}
	if verb != catalog.VerbExport && (!h.open && !h.ticketed() && verb != catalog.VerbExpand || h.open && !h.may()) {
		return Result{Code: catalog.CodeNotAttached, Message: "the volume is not attached"}, true
	}
	return Result{}, false
}

// refusedRoom says why an operation that makes a layer is not begun on a disk that is full; "" if it is. What was begun goes on.
func (p *planner) refusedRoom(h *here, op catalog.Operation) string {
	switch {
	case op.Verb == catalog.VerbExport && p.found.exports[op.ID] == nil && h.open:
		return p.exportRefused(h)
	case op.State == catalog.OperationPending && (op.Verb == catalog.VerbSnapshot || op.Verb == catalog.VerbExpand):
		return p.noRoom(h)
	}
	return ""
}

// refusedOperation is refusedRoom of the operation to be done now.
func (p *planner) refusedOperation(h *here) string { return p.refusedRoom(h, h.op.Value) }
