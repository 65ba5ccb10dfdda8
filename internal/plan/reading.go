package plan

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"slices"
	"strconv"
	"strings"

	"ashlar/internal/catalog"
)

// Reading is a volume that is read through a source of its data process: for an export, an image, or a client's download. Of the present a temporary snapshot is
// taken, which says by a label what it is for. As long as somebody wants the reading the volume is open, without a frontend if nothing else wants it; a
// temporary snapshot whose reading nobody wants is removed, and the volume is opened for that if it must be: so nothing of this is remembered anywhere else, and
// every step can be repeated.
type Reading struct {
	ID        string // of the source, 32 hex digits
	Job       string // what reads it, an export's or an image's id; "" for none
	VolumeID  string
	Snapshot  string
	Temporary bool              // the snapshot is taken for this, and removed after it
	Labels    map[string]string // of the temporary snapshot
}

// NewReading makes a reading of a snapshot, or of the present (snapshot is ""), of which a temporary one is taken, with a name that begins with prefix.
func NewReading(id, volumeID, snapshot, prefix string) Reading {
	r := Reading{ID: id, Job: id, VolumeID: volumeID, Snapshot: snapshot}
	if snapshot == "" {
		r.Snapshot, r.Temporary = prefix+"-"+id[:min(8, len(id))], true
		r.Labels = map[string]string{catalog.LabelReading: id}
	}
	return r
}

// DeriveID makes an id that is always the same for the same words.
func DeriveID(words ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(words, "\x00")))
	return hex.EncodeToString(sum[:16])
}

// exportReading is what an export operation reads.
func exportReading(op catalog.Operation) Reading {
	return NewReading(op.ID, op.VolumeID, op.Snapshot, "export")
}

// imageReading is what a copy of an image is made from: each try is a reading of its own.
func imageReading(w catalog.ImageWanted, diskID string, attempts int, volumeID string) Reading {
	r := NewReading(DeriveID("image", w.ID, diskID, strconv.Itoa(attempts)), volumeID, w.Parameters["snapshot-name"], w.Name)
	r.Job = w.ID
	if r.Temporary {
		r.Labels[catalog.LabelImageExport] = w.Name
	}
	return r
}

// StartExport records an export as running, if it is not, and begins it.
type StartExport struct {
	follows
	Operation Half[catalog.Operation]
	Reading   Reading
}

// EndExport ends what an export that is over has read; then it is finished with Result.
type EndExport struct {
	follows
	Operation Half[catalog.Operation]
	Reading   Reading
	Result    Result
}

// EndReading ends what an import has read, before its end is recorded.
type EndReading struct {
	follows
	ImageID, DiskID string
	Reading         Reading
}

// DropReading removes a temporary snapshot that nobody reads any more.
type DropReading struct {
	follows
	Reading Reading
}

// ForgetJob drops what a data process keeps of an export that is over.
type ForgetJob struct {
	follows
	ID string
}

// Key implements Action.
func (a StartExport) Key() string { return VolumeKey(a.Reading.VolumeID) }

// Verb implements Action.
func (StartExport) Verb() string { return "start-export" }

// Key implements Action.
func (a EndExport) Key() string { return VolumeKey(a.Reading.VolumeID) }

// Verb implements Action.
func (EndExport) Verb() string { return "end-export" }

// Key implements Action.
func (a EndReading) Key() string { return ImageKey(a.ImageID, a.DiskID) }

// Verb implements Action.
func (EndReading) Verb() string { return "end-reading" }

// Key implements Action.
func (a DropReading) Key() string { return VolumeKey(a.Reading.VolumeID) }

// Verb implements Action.
func (DropReading) Verb() string { return "drop-reading" }

// Key implements Action.
func (a ForgetJob) Key() string { return "job/" + a.ID }

// Verb implements Action.
func (ForgetJob) Verb() string { return "forget-job" }

// findReadings gathers what exports and downloads read; images add theirs when they are planned.
func (p *planner) findReadings() {
	for volumeID, ids := range p.in.Downloads {
		for _, id := range ids {
			p.read(NewReading(id, volumeID, "", "download"))
		}
	}
	for volume := range p.in.View.Operations {
		w := p.in.View.Volumes[volume].Wanted
		if op, ok := p.in.View.next(volume, w.Value.ID, isExport); ok && w.Is() {
			p.read(exportReading(op.Value))
		}
	}
}

func (p *planner) read(r Reading) {
	p.readings[r.VolumeID] = append(p.readings[r.VolumeID], r)
	p.out.Readings[r.ID] = true
	if name := p.in.View.VolumeName(r.VolumeID); name != "" {
		p.out.Reading[name] = true
	}
}

// forgetJobs has exports forgotten that are over and that nobody will ask about.
func (p *planner) forgetJobs() {
	for _, id := range slices.Sorted(maps.Keys(p.found.exports)) {
		if j := p.found.exports[id]; j.State != JobRunning && !p.out.Readings[id] {
			p.begin(ForgetJob{ID: id})
		}
	}
	if p.in.Only != nil || len(p.found.copies) == 0 {
		return
	}
	placed := map[string]bool{}
	for _, v := range p.in.View.Volumes {
		for _, r := range slices.Concat(v.Wanted.Value.Replicas, v.Wanted.Value.Dropped) {
			placed[r.ReplicaID] = placed[r.ReplicaID] || r.Node == p.in.Node
		}
	}
	for _, id := range slices.Sorted(maps.Keys(p.found.copies)) {
		if !placed[id] { // nobody wants the copy any more
			p.begin(ForgetJob{ID: id})
		}
	}
}

// leftover is a temporary snapshot of the volume that nobody reads. Only what the system took is one, whatever labels people use.
func (p *planner) leftover(h *here) (Reading, bool) {
	found := func(id, name string, present, user, removed bool) (Reading, bool) {
		r := Reading{ID: id, VolumeID: h.w.ID, Snapshot: name, Temporary: true}
		return r, id != "" && name != "" && !present && !user && !removed && !p.out.Readings[id]
	}
	if h.open && len(h.found.Layers) > 0 {
		for _, l := range h.found.Layers {
			if r, ok := found(l.Labels[catalog.LabelReading], l.Snapshot, l.Head, l.UserCreated, l.Removed); ok {
				return r, true
			}
		}
		return Reading{}, false
	}
	if o := h.vol.Observed.Value; o.ID == h.w.ID {
		for _, s := range o.Snapshots {
			if r, ok := found(s.Labels[catalog.LabelReading], s.Name, s.Name == volumeHead, s.UserCreated, s.Removed); ok {
				return r, true
			}
		}
	}
	return Reading{}, false
}

// exportStep is the next thing to do for a volume's export.
func (p *planner) exportStep(h *here) Action {
	if !h.exporting || p.known(h.export.Value.ID) {
		return nil
	}
	job := p.found.exports[h.export.Value.ID]
	switch {
	case job == nil && p.exportRefused(h) == "":
		return StartExport{follows{h.export.Rev}, h.export, exportReading(h.export.Value)}
	case job == nil, job.State == JobRunning:
		return nil
	}
	return p.exportEnd(h)
}

// exportEnd ends an export whose job is over; nil if it is not.
func (p *planner) exportEnd(h *here) Action {
	if !h.exporting || p.known(h.export.Value.ID) {
		return nil
	}
	job := p.found.exports[h.export.Value.ID]
	if job == nil || job.State == JobRunning {
		return nil
	}
	r := Result{}
	if job.State == JobFailed {
		if r = (Result{Code: job.Code, Message: job.Error}); r.Code == "" {
			r.Code = catalog.CodeInternal
		}
	}
	return EndExport{follows{h.export.Rev}, h.export, exportReading(h.export.Value), r}
}

// exportRefused says why no temporary snapshot is taken for an export; "" if none is needed, or there is one, or there is room.
func (p *planner) exportRefused(h *here) string {
	r := exportReading(h.export.Value)
	for _, l := range h.found.Layers {
		if l.Labels[catalog.LabelReading] == r.ID {
			return ""
		}
	}
	if !r.Temporary {
		return ""
	}
	return p.noRoom(h)
}

// noRoom says why the replica's disk takes no new layer; "" if it does.
func (p *planner) noRoom(h *here) string {
	if !h.diskOK {
		return ""
	}
	node := p.in.View.Nodes[h.place.Node]
	for name, dw := range node.Wanted.Value.Disks {
		total, free := h.disk.TotalBytes, h.disk.FreeBytes
		if dw.Lost {
			continue
		}
		if h.place.Node != h.node {
			d := node.Observed.Value.Disks[name]
			if total, free = d.TotalBytes, d.FreeBytes; d.DiskID != h.place.DiskID {
				continue
			}
		} else if dw.Path != h.disk.Path {
			continue
		}
		if reason := full(p.minFree, dw, total, free); reason != "" {
			return "disk " + name + " has " + reason + "; make room first"
		}
	}
	return ""
}
