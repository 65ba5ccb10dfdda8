package plan

import (
	"slices"

	"ashlar/internal/catalog"
)

// OpenVolume opens a volume on its replica, which is on ReplicaNode, and exports it.
type OpenVolume struct {
	follows
	Volume, VolumeID, DiskID, ReplicaID, ReplicaNode, Frontend string
	Salvage                                                    bool
	Limits                                                     catalog.Limits
}

// CloseVolume closes an open volume. What Readings read ends with it, and is begun again when the volume is open again. Force: it cannot be closed cleanly, because
// another has it by now, or because its replica's node does not answer.
type CloseVolume struct {
	follows
	Volume, VolumeID string
	Readings         []Reading
	Force            bool
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

// here is all that a volume's home knows of it.
type here struct {
	node  string // this one
	vol   Volume
	w     catalog.VolumeWanted
	place catalog.Placement // the replica that is opened

	away    string // why the replica's node cannot be reached, as far as the catalogue knows; "": it can, or is this one. Of an open volume the data process knows better
	diskOK  bool   // the replica's disk can be looked into; of another node: that node says so
	diskWhy string // why not
	givenUp string // that the disk was given up, as a sentence; "": it was not
	disk    FoundDisk
	replica FoundReplica
	there   bool // the replica is on its disk
	arrived bool // it has taken another's place, and our look at the disk is older than that

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

	unshown bool // the observed record does not show the open volume's layers as they are: once it is closed nobody sees them
}

// volume plans one volume: what its home does if that is here, what is here of its replicas, and that it is not open here if its home is elsewhere.
func (p *planner) volume(name string) {
	vol := p.in.View.Volumes[name]
	w := vol.Wanted.Value
	if !vol.Wanted.Is() || !p.in.Found.Known {
		return
	}
	home := len(w.Replicas) > 0 && p.in.View.home(vol) == p.in.Node
	found := p.found.volumes[w.ID]
	if !home && found == nil && !p.placedHere(w) {
		return
	}
	p.current = name
	defer func() { p.current = "" }()
	was := vol.Observed.Value
	o := freshObserved(was, w)
	o.Replicas = slices.DeleteFunc(slices.Clone(o.Replicas), func(r catalog.ReplicaObserved) bool { return !names(w, r.ReplicaID) })
	replicas := p.replicasHere(vol)
	for i := range replicas {
		replicas[i].observe(&o)
	}
	var h *here
	if home {
		h = p.lookAt(vol, o)
		p.observeVolume(h, &o)
		h.unshown = !sameLayers(was.Snapshots, o.Snapshots)
		p.begin(p.volumeStep(h))
		p.begin(h.limitsStep())
	} else if found != nil {
		p.begin(p.strayStep(vol, found))
	}
	for _, r := range replicas {
		p.begin(p.replicaStep(r, o))
	}
	if !home && len(replicas) == 0 {
		return
	}
	write := Write{Key: catalog.VolumeKey(catalog.Observed, name), Value: o, Was: vol.Observed.Rev}
	if home {
		write.Notes = p.volumeNotes(was, o)
	}
	if current := !p.write(write, was); home {
		p.volumeRecords(h, current)
	}
}

// names tells whether the volume's wanted record names a replica.
func names(w catalog.VolumeWanted, replicaID string) bool {
	is := func(r catalog.Placement) bool { return r.ReplicaID == replicaID }
	return slices.ContainsFunc(w.Replicas, is) || slices.ContainsFunc(w.Dropped, is)
}

// placedHere tells whether a replica of the volume belongs to this node.
func (p *planner) placedHere(w catalog.VolumeWanted) bool {
	here := func(r catalog.Placement) bool { return r.Node == p.in.Node }
	return slices.ContainsFunc(w.Replicas, here) || slices.ContainsFunc(w.Dropped, here)
}

// lookAt gathers what the home knows. o has what the nodes of the replicas have said of them.
func (p *planner) lookAt(vol Volume, o catalog.VolumeObserved) *here {
	w := vol.Wanted.Value
	h := &here{node: p.in.Node, vol: vol, w: w, member: p.in.View.Memberships[w.ID]}
	h.place = placeToOpen(w, h.member)
	if h.place.Node == p.in.Node {
		h.disk, h.diskOK = p.in.Found.disk(h.place.DiskID)
		h.diskOK = h.diskOK && h.disk.usable()
		if r := p.found.replicas[[2]string{h.place.DiskID, h.place.ReplicaID}]; r != nil {
			h.replica, h.there = *r, true
		}
		h.arrived = !h.there && (p.found.copies[h.place.ReplicaID] != nil || p.in.Busy[replicaKey(h.place.ReplicaID)])
	} else {
		p.lookThere(h, o)
	}
	if p.in.View.lostCopy(h.place) {
		h.givenUp, h.diskOK, h.there, h.arrived = p.in.View.lostText(h.place, w.Name), false, false, false
	}
	if f := p.found.volumes[w.ID]; f != nil {
		h.found, h.open = *f, true
	}
	h.op, h.todo = p.in.View.next(w.Name, w.ID, isNoExport)
	h.export, h.exporting = p.in.View.next(w.Name, w.ID, isExport)
	h.readings = p.readings[w.ID]
	h.drop, h.dropping = p.leftover(h)
	return h
}

// placeToOpen is the replica that is opened: the one that the membership record names, else the first that is no copy still to be made.
func placeToOpen(w catalog.VolumeWanted, m Half[catalog.Membership]) catalog.Placement {
	for _, r := range w.Replicas {
		if named(m.Value, r.ReplicaID) {
			return r
		}
	}
	for _, r := range w.Replicas {
		if r.CopyOf == "" {
			return r
		}
	}
	return w.Replicas[0]
}

// lookThere looks at a replica of another node through what that one said: until it has said anything, a volume that was written to has its replica.
func (p *planner) lookThere(h *here, o catalog.VolumeObserved) {
	h.away = p.away(h.place.Node)
	for _, d := range p.in.View.Nodes[h.place.Node].Observed.Value.Disks {
		if d.DiskID == h.place.DiskID {
			c := d.Conditions[catalog.ConditionReady]
			h.diskOK, h.diskWhy = c.Status != catalog.ConditionFalse, c.Message
		}
	}
	h.there = h.member.Value.Epoch > 0
	for _, r := range o.Replicas {
		if r.ReplicaID == h.place.ReplicaID {
			h.there = r.Created
		}
	}
}

// strayStep closes a volume that is open here although its home is elsewhere: its node was cut off and is back, or its data process opened it again by itself.
func (p *planner) strayStep(vol Volume, f *FoundVolume) Action {
	h := &here{node: p.in.Node, vol: vol, w: vol.Wanted.Value, found: *f, open: true, member: p.in.View.Memberships[vol.Wanted.Value.ID]}
	if len(h.w.Replicas) > 0 {
		h.place = placeToOpen(h.w, h.member)
	}
	h.readings = p.readings[h.w.ID]
	if h.stale() || !h.member.Is() || f.State == FoundOpening || f.State == FoundClosing {
		return nil
	}
	return h.closeAction()
}

// ticketed tells whether the volume is wanted open here by somebody.
func (h *here) ticketed() bool {
	return h.w.Deleted == nil && len(h.w.Tickets) > 0 && h.w.Tickets[0].Node == h.node
}

// elsewhere tells whether somebody wants the volume open on another node.
func (h *here) elsewhere() bool {
	return h.w.Deleted == nil && len(h.w.Tickets) > 0 && h.w.Tickets[0].Node != h.node
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
	return h.w.Deleted == nil && !h.elsewhere() && (h.todo && h.op.Value.Verb == catalog.VerbExpand || len(h.readings) > 0 || h.dropping)
}

// may tells whether the volume is in a state for its operation: those that need it attached do not ride on its being open for something else.
func (h *here) may() bool {
	switch h.op.Value.Verb {
	case catalog.VerbExpand, catalog.VerbCheck:
		return true
	}
	return h.ticketed() || h.op.Value.State == catalog.OperationRunning || len(h.readings) == 0 && !h.dropping
}

// lost tells whether the replica is not where it was, although something was written to it, or was given up with its disk. It is never made again: an empty one would read as zeroes.
func (h *here) lost() bool {
	return h.givenUp != "" || h.diskOK && !h.there && !h.arrived && h.member.Is() && h.member.Value.Epoch > 0
}

func (h *here) openAction() OpenVolume {
	a := OpenVolume{follows{h.vol.Wanted.Rev}, h.w.Name, h.w.ID, h.place.DiskID, h.place.ReplicaID, h.place.Node, "", h.w.Salvage, h.w.Limits}
	if h.ticketed() {
		a.Frontend = h.frontend()
	}
	return a
}

// openStep opens the volume, where there are other nodes only after it is on record that it is this one which does: the record is changed by compare-and-swap, so of two
// nodes that both take themselves for the home one opens.
func (p *planner) openStep(h *here) Action {
	if o := h.vol.Observed.Value; len(p.in.View.Nodes) > 1 && (o.ID != h.w.ID || o.Node != h.node) {
		return nil
	}
	return h.openAction()
}

func (h *here) closeAction() CloseVolume {
	force := h.fenced() || h.found.Away != "" || h.givenUp != ""
	return CloseVolume{follows{h.vol.Wanted.Rev}, h.w.Name, h.w.ID, h.readings, force}
}

// fenced tells whether another has opened the volume since.
func (h *here) fenced() bool {
	return h.open && (h.found.Code == catalog.CodeConflict || h.found.Epoch > 0 && h.member.Value.Epoch > h.found.Epoch)
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
//	replica ──open──► open ──operate──► open ──close──► replica
func (p *planner) volumeStep(h *here) Action {
	switch {
	case h.stale():
		return nil
	case h.w.Deleted != nil:
		if !h.open || h.found.State == FoundClosing {
			return nil
		}
		return h.closeAction()
	case h.todo && p.known(h.op.Value.ID), h.exporting && p.known(h.export.Value.ID):
		return nil // its end is recorded first
	case h.open:
		return p.haveStep(h)
	case h.away != "" || !h.diskOK || !h.member.Is() || !h.there:
		return nil
	case h.todo && h.op.Value.Verb == catalog.VerbCheck:
		return h.operate()
	case h.ticketed(), p.opensFor(h):
		return p.openStep(h)
	}
	return nil
}

// opensFor tells whether a detached volume is opened for something.
func (p *planner) opensFor(h *here) bool {
	return h.offline() && (!h.todo || len(h.readings) > 0 || h.dropping || p.refusedOperation(h) == "")
}

// known tells whether the operation was carried out already.
func (p *planner) known(id string) bool {
	_, ok := p.in.Finished[id]
	return ok
}

func (h *here) operate() Action {
	return Operate{follows{h.op.Rev}, h.op, h.place.DiskID, h.place.ReplicaID}
}

// haveStep is the next thing to do to a volume the data process has.
func (p *planner) haveStep(h *here) Action {
	wanted := h.ticketed() || h.offline()
	switch h.found.State {
	case FoundOpen:
		if end := p.exportEnd(h); end != nil {
			return end
		}
		switch {
		case h.todo && h.may() && p.refusedOperation(h) == "":
			return h.operate()
		case h.leaving() && h.unshown && !h.closeAction().Force:
			return nil // they are recorded first
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
		case h.givenUp != "":
			return nil
		case h.lastCopyFailed(): // it returns errors until it is detached or a person decides
			return nil
		}
		return p.openStep(h)
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
