package plan

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"ashlar/internal/catalog"
)

// How long what failed waits: 1, 2, 4 and then always 5 minutes; what failed by a wrong checksum is tried again three times.
const (
	retryMin       = time.Minute
	retryMax       = 5 * time.Minute
	limitedRetries = 3
)

// ImportImage asks for an import, after Starting was written: from Source, or from what Reading reads. Source may be another copy, of which Checksum says nothing.
type ImportImage struct {
	follows
	Image, ImageID, DiskID, Source, Checksum string
	Starting                                 Write
	Reading                                  *Reading
}

// Upload is how the upload of an image's bytes goes, as far as this node's agent has seen since it started.
type Upload struct {
	Taken  bool   // all bytes were taken; what becomes of them the import says
	Failed string // why it broke off; "" if it did not
}

// CancelImport gives an import of an image up that is being deleted.
type CancelImport struct {
	follows
	Image, ImageID, DiskID string
}

// DeleteImage destroys a copy, after a linearizable read of the tombstone, or of the record that wants it on this disk no more.
type DeleteImage struct {
	follows
	Image, ImageID, DiskID string
}

// Key implements Action.
func (a ImportImage) Key() string { return ImageKey(a.ImageID, a.DiskID) }

// Verb implements Action.
func (ImportImage) Verb() string { return "import-image" }

// Key implements Action.
func (a CancelImport) Key() string { return ImageKey(a.ImageID, a.DiskID) }

// Verb implements Action.
func (CancelImport) Verb() string { return "cancel-import" }

// Key implements Action.
func (a DeleteImage) Key() string { return ImageKey(a.ImageID, a.DiskID) }

// Verb implements Action.
func (DeleteImage) Verb() string { return "delete-image" }

// ImageKey is the Key of the actions on one copy of an image.
func ImageKey(imageID, diskID string) string { return "image/" + imageID + "@" + diskID }

// copyHere is all that this node knows of one copy of an image.
type copyHere struct {
	img    Image
	w      catalog.ImageWanted
	diskID string
	diskOK bool
	wanted bool // on this disk

	file  FoundImage
	there bool

	job    FoundJob
	jobbed bool // there is one of this image, on this disk
	other  bool // there is one of this image that runs, on another disk

	state catalog.ImageOnDisk // as recorded
	busy  bool

	reading *Reading // of an image made from a volume whose home is here; nil if there is none
	volume  string   // the node that is the home of the volume that the image is made from; "": there is no such volume
	ready   bool     // another copy is ready: this one is made from that if its source gives one copy only
	peer    string   // where one that is ready can be copied from: peer://NODE/DISKID; "": nowhere now
	wait    string   // why it is not begun: another copy is being made first; "" if it may be
}

// image plans the copies of one image on this node's disks.
func (p *planner) image(name string) {
	img := p.in.View.Images[name]
	if !img.Wanted.Is() || !p.in.Found.Known {
		return
	}
	o := freshImage(img.Observed.Value, img.Wanted.Value)
	node := p.in.View.Nodes[p.in.Node]
	var notes []catalog.EventRecord
	mine := false
	for _, disk := range sorted(node.Wanted.Value.Disks) {
		if node.Wanted.Value.Disks[disk].Lost { // control forgets what was there
			continue
		}
		c, ok := p.copyOn(img, o, node.Wanted.Value.Disks[disk].Path, node.Observed.Value.Disks[disk].DiskID)
		if !ok {
			continue
		}
		mine = true
		if p.reads(c) {
			p.read(*c.reading)
		}
		next := p.observeCopy(c, &o)
		notes = append(notes, p.imageNotes(c, next)...)
		if next.State == "" {
			delete(o.Disks, c.diskID)
		} else {
			o.Disks[c.diskID] = next
		}
		p.begin(p.imageStep(c, o))
	}
	if mine {
		w := Write{Key: catalog.ImageKey(catalog.Observed, name), Value: o, Was: img.Observed.Rev, Notes: notes}
		p.write(w, img.Observed.Value)
	}
}

// copyOn gathers what is known of the copy on a disk; not ok if there is, was and shall be none.
func (p *planner) copyOn(img Image, o catalog.ImageObserved, path, diskID string) (copyHere, bool) {
	disk, ok := p.in.Found.diskAt(path)
	if ok {
		diskID = disk.DiskID
	}
	c := copyHere{img: img, w: img.Wanted.Value, diskID: diskID, diskOK: ok && disk.usable(), state: o.Disks[diskID]}
	c.wanted = slices.Contains(c.w.Disks, diskID)
	c.file, c.there = disk.image(c.w.ID)
	c.job, c.jobbed = p.in.Found.job(c.w.ID)
	if c.jobbed && c.job.DiskID != diskID {
		c.jobbed, c.other = false, c.job.State == JobRunning
	}
	c.busy = p.in.Busy[ImageKey(c.w.ID, diskID)]
	if diskID == "" || !c.wanted && c.state.State == "" {
		return c, false
	}
	p.others(&c, o)
	if c.w.SourceType == catalog.SourceVolume {
		vol := p.in.View.Volumes[c.w.Parameters["volume-name"]]
		if v := vol.Wanted; v.Is() && v.Value.Deleted == nil {
			c.volume = p.in.View.home(vol)
			if r := imageReading(c.w, diskID, c.state.Attempts, v.Value.ID); c.volume == p.in.Node && !c.ready {
				c.reading = &r
			}
		}
	}
	return c, true
}

// others looks at the image's other copies: one is made from the source, and the rest from it. A copy that is being made on a node that is gone is not waited for; one that
// is ready there is, if its source cannot be asked again.
func (p *planner) others(c *copyHere, o catalog.ImageObserved) {
	once := c.w.SourceType == catalog.SourceVolume || c.w.SourceType == catalog.SourceUpload
	begun := c.state.State == catalog.ImageStarting || c.state.State == catalog.ImageInProgress
	if o.Digest != "" { // by which a copy is checked
		c.peer = p.in.View.imageSource(c.w.Name, c.diskID)
	}
	for _, id := range sorted(o.Disks) {
		d := o.Disks[id]
		if c.ready = c.ready || id != c.diskID && d.State == catalog.ImageReady; id == c.diskID || c.peer != "" {
			continue
		}
		node := p.in.View.nodeOf(id)
		switch {
		case d.State == catalog.ImageReady && once:
			c.wait = "its source gives one copy; waiting for that on node " + node
		case (d.State == catalog.ImageStarting || d.State == catalog.ImageInProgress) && p.in.View.Up(node) && (!begun || id < c.diskID):
			c.wait = "waiting for the copy on node " + node
		}
	}
}

// nodeOf finds the node that has a disk; "" if nobody does.
func (v *View) nodeOf(diskID string) string {
	for name, n := range v.Nodes {
		for _, d := range n.Observed.Value.Disks {
			if d.DiskID == diskID {
				return name
			}
		}
	}
	return ""
}

// imageStep is the next thing to do to a copy; nil: nothing, or wait. o is what will be recorded of the image.
func (p *planner) imageStep(c copyHere, o catalog.ImageObserved) Action {
	rev := follows{c.img.Wanted.Rev}
	switch {
	case !c.diskOK:
		return nil
	case c.w.Deleted != nil && p.imageUsed(c.w.ID):
		return nil
	case c.w.Deleted != nil && c.jobbed, c.jobbed && c.job.State == JobRunning && c.w.SourceType == catalog.SourceUpload && c.state.State == catalog.ImageFailed:
		return CancelImport{rev, c.w.Name, c.w.ID, c.diskID}
	case c.w.Deleted != nil && c.there, !c.wanted && c.there && !p.usedOn(c.w.ID, c.diskID):
		return DeleteImage{rev, c.w.Name, c.w.ID, c.diskID}
	case p.endsReading(c):
		return EndReading{rev, c.w.ID, c.diskID, *c.reading}
	case c.w.Deleted != nil, !c.wanted, c.there, c.wait != "", c.other, c.jobbed && c.job.State != JobFailed:
		return nil
	}
	switch c.state.State { // as recorded: what failed is recorded before it is tried again, and nothing is begun before it is pending
	case catalog.ImageFailed:
		if c.state.NextTry.IsZero() {
			return nil
		}
		if p.in.Now.Before(c.state.NextTry) {
			p.wake(c.state.NextTry)
			return nil
		}
	case catalog.ImagePending: // on record: a write of it and that of starting would be in each other's way
	case catalog.ImageStarting:
		if c.jobbed {
			return nil
		}
	default:
		return nil
	}
	if c.peer != "" {
		node, _, _ := strings.Cut(strings.TrimPrefix(c.peer, "peer://"), "/")
		if p.away(node) != "" { // the data process is told of the node first
			return nil
		}
		return ImportImage{rev, c.w.Name, c.w.ID, c.diskID, c.peer, "", p.starting(c), nil}
	}
	if c.reading != nil { // the volume is opened for it
		if v := p.found.volumes[c.reading.VolumeID]; v == nil || v.State != FoundOpen {
			return nil
		}
		return ImportImage{rev, c.w.Name, c.w.ID, c.diskID, "", c.w.ExpectedChecksum, p.starting(c), c.reading}
	}
	source, ok := sourceOf(c.w)
	if !ok {
		return nil
	}
	return ImportImage{rev, c.w.Name, c.w.ID, c.diskID, source, c.w.ExpectedChecksum, p.starting(c), nil}
}

// reads tells whether a copy is to be made, or is being made, from a volume that has to be open for it. What is being begun reads until that has ended, wanted or not.
func (p *planner) reads(c copyHere) bool {
	if c.reading == nil || !c.busy && (c.w.Deleted != nil || !c.wanted || !c.diskOK) {
		return false
	}
	switch c.state.State {
	case catalog.ImageStarting, catalog.ImageInProgress:
		return !p.known(c.reading.ID)
	case catalog.ImagePending:
		return c.busy || !c.there && c.wait == ""
	case catalog.ImageFailed:
		return c.busy || !c.there && c.wait == "" && !c.state.NextTry.IsZero() && !p.in.Now.Before(c.state.NextTry)
	}
	return c.busy
}

// endsReading tells whether a copy's import is over and what it read is still to be ended: that comes first, so that it is not forgotten.
func (p *planner) endsReading(c copyHere) bool {
	begun := c.state.State == catalog.ImageStarting || c.state.State == catalog.ImageInProgress
	return begun && p.reads(c) && !c.busy && (c.there || c.jobbed && c.job.State == JobFailed)
}

// starting is the record that is written before an import is asked for, so that its failure is counted once.
func (p *planner) starting(c copyHere) Write {
	o := freshImage(c.img.Observed.Value, c.w)
	d := o.Disks[c.diskID]
	o.Disks[c.diskID] = catalog.ImageOnDisk{State: catalog.ImageStarting, Attempts: d.Attempts, LastTransitionTime: stamp(p.in.Now)}
	return Write{Key: catalog.ImageKey(catalog.Observed, c.w.Name), Value: o, Was: c.img.Observed.Rev}
}

func stamp(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }

func sourceOf(w catalog.ImageWanted) (string, bool) {
	switch w.SourceType {
	case catalog.SourceDownload:
		return w.Parameters["url"], true
	case catalog.SourceFile:
		return w.Parameters["path"], true
	}
	return "", false
}

// imageUsed tells whether a volume stands on the image, one that is being deleted too.
func (p *planner) imageUsed(imageID string) bool {
	for _, v := range p.in.View.Volumes {
		if v.Wanted.Value.ImageID == imageID {
			return true
		}
	}
	return false
}

// usedOn tells whether a replica on the disk stands on the image.
func (p *planner) usedOn(imageID, diskID string) bool {
	for _, v := range p.in.View.Volumes {
		if v.Wanted.Value.ImageID != imageID {
			continue
		}
		if slices.ContainsFunc(v.Wanted.Value.Replicas, func(r catalog.Placement) bool { return r.DiskID == diskID }) {
			return true
		}
	}
	return false
}

// observeCopy is what is to be recorded of a copy; no State: nothing. The first copy that is ready says what the image is.
func (p *planner) observeCopy(c copyHere, o *catalog.ImageObserved) catalog.ImageOnDisk {
	to := func(state string) catalog.ImageOnDisk {
		next := c.state
		if next.State != state {
			next = catalog.ImageOnDisk{State: state, Attempts: c.state.Attempts, LastTransitionTime: stamp(p.in.Now)}
		}
		return next
	}
	switch {
	case !c.diskOK && c.state.State == catalog.ImageGone, c.busy && !c.there:
		return c.state
	case !c.diskOK:
		return to(catalog.ImageUnknown)
	case p.endsReading(c):
		return c.state
	case c.there:
		return p.readyCopy(c, o, to)
	case c.w.Deleted != nil && !c.jobbed:
		return to(catalog.ImageGone)
	case !c.wanted:
		return catalog.ImageOnDisk{}
	case c.w.SourceType == catalog.SourceUpload && !c.ready && (!c.jobbed || c.job.State != JobRunning || c.state.State == catalog.ImageFailed):
		return p.uploadCopy(c, to)
	case c.jobbed && c.job.State == JobRunning:
		next := to(catalog.ImageStarting)
		if c.job.DoneBytes > 0 {
			next = to(catalog.ImageInProgress)
		}
		next.Progress = min(99, c.job.Percent)
		return next
	case c.jobbed && c.job.State == JobFailed && c.state.State != catalog.ImageFailed:
		return p.failedCopy(c, c.job.Failure, c.job.Error)
	case c.jobbed:
		return c.state
	}
	return p.idleCopy(c, to)
}

// idleCopy is a copy that is not there, with nothing under way.
func (p *planner) idleCopy(c copyHere, to func(string) catalog.ImageOnDisk) catalog.ImageOnDisk {
	once := c.w.SourceType == catalog.SourceVolume || c.w.SourceType == catalog.SourceUpload && c.ready
	if _, ok := sourceOf(c.w); !ok && !once {
		if c.state.State == catalog.ImageFailed {
			return c.state
		}
		return p.failedCopy(c, Final, fmt.Sprintf("source type %q is not known", c.w.SourceType))
	}
	if f, ok := p.failure(ImportImage{follows: follows{c.img.Wanted.Rev}, ImageID: c.w.ID, DiskID: c.diskID}); ok && f.Code != "" && c.state.State == catalog.ImageStarting {
		if c.w.SourceType == catalog.SourceVolume || c.ready { // there may be such a snapshot, or more room, later
			return p.failedCopy(c, Transient, f.Message)
		}
		return p.failedCopy(c, Final, f.Message)
	}
	if c.w.SourceType == catalog.SourceVolume && (c.state.State == catalog.ImagePending || c.state.State == catalog.ImageStarting) {
		return p.volumeCopy(c, to)
	}
	switch c.state.State {
	case catalog.ImagePending:
		next := c.state
		next.Message = c.wait
		return next
	case catalog.ImageStarting, catalog.ImageFailed:
		return c.state
	case catalog.ImageInProgress: // the data process ended under it
		if c.state.Attempts > 0 {
			return p.failedCopy(c, Transient, "the import was interrupted")
		}
		next := to(catalog.ImagePending)
		next.Attempts, next.Message = 1, "the import was interrupted"
		return next
	}
	return to(catalog.ImagePending)
}

// volumeCopy is a copy that waits for the volume it is made from.
func (p *planner) volumeCopy(c copyHere, to func(string) catalog.ImageOnDisk) catalog.ImageOnDisk {
	name := c.w.Parameters["volume-name"]
	v := p.in.View.Volumes[name].Observed.Value
	switch {
	case c.ready:
		next := to(c.state.State)
		next.Message = c.wait
		return next
	case c.volume != "" && c.volume != p.in.Node:
		next := to(c.state.State)
		next.Message = "volume " + name + " is on node " + c.volume + "; the first copy is made there"
		return next
	case c.reading == nil:
		return p.failedCopy(c, Transient, "there is no volume "+name)
	case v.ID == c.reading.VolumeID && v.Robustness == catalog.RobustnessFaulted:
		return p.failedCopy(c, Transient, "volume "+name+" is faulted: "+v.Error)
	}
	next := to(c.state.State)
	open := p.found.volumes[c.reading.VolumeID]
	if c.state.State == catalog.ImagePending && (open == nil || open.State != FoundOpen) { // else it begins, and two writes would be in each other's way
		next.Message = "waiting for volume " + name + " to be open"
	}
	if c.wait != "" {
		next.Message = c.wait
	}
	return next
}

// uploadCopy is a copy whose bytes a client brings, once: nothing of it is tried again.
func (p *planner) uploadCopy(c copyHere, to func(string) catalog.ImageOnDisk) catalog.ImageOnDisk {
	up, known := p.in.Uploads[c.w.ID]
	begun := c.state.State == catalog.ImageStarting || c.state.State == catalog.ImageInProgress
	switch {
	case c.state.State == catalog.ImageFailed:
		return c.state
	case begun && up.Failed != "":
		return p.failedCopy(c, Final, up.Failed)
	case begun && known && !up.Taken: // under way: whoever brings the bytes says how it ends
		return c.state
	case begun && c.jobbed && c.job.State == JobFailed && known:
		return p.failedCopy(c, Final, c.job.Error)
	case begun && c.jobbed && c.job.State == JobDone: // it is seen on the disk next
		return c.state
	case begun:
		return p.failedCopy(c, Final, "the upload was interrupted")
	}
	next := to(catalog.ImagePending)
	if next.Message = "waiting for the upload"; c.wait != "" {
		next.Message = c.wait
	}
	return next
}

func (p *planner) failedCopy(c copyHere, patience Patience, message string) catalog.ImageOnDisk {
	d := catalog.ImageOnDisk{State: catalog.ImageFailed, Attempts: c.state.Attempts + 1, LastTransitionTime: stamp(p.in.Now)}
	if patience == Final || patience == Limited && d.Attempts > limitedRetries {
		d.Message = message + " (not tried again; delete the image and import it anew)"
		return d
	}
	wait := min(retryMin<<min(d.Attempts-1, 10), retryMax)
	d.NextTry = d.LastTransitionTime.Add(wait)
	d.Message = fmt.Sprintf("%s (attempt %d; tried again after %v)", message, d.Attempts, wait)
	return d
}

// readyCopy compares a copy that is there with what the image is known to be.
func (p *planner) readyCopy(c copyHere, o *catalog.ImageObserved, to func(string) catalog.ImageOnDisk) catalog.ImageOnDisk {
	if o.CurrentChecksum == "" {
		o.SizeBytes, o.VirtualSizeBytes = c.file.SizeBytes, c.file.VirtualSizeBytes
		o.CurrentChecksum, o.Digest, o.Format = c.file.SHA512, c.file.Digest, c.file.Format
	}
	if o.CurrentChecksum != c.file.SHA512 || o.Digest != "" && c.file.Digest != "" && o.Digest != c.file.Digest {
		next := to(catalog.ImageFailed)
		next.Message = "differs from the image's other copies"
		return next
	}
	next := to(catalog.ImageReady)
	next.Progress, next.Attempts, next.Message, next.AllocatedBytes = 100, 0, "", c.file.AllocatedBytes
	return next
}

func (p *planner) imageNotes(c copyHere, next catalog.ImageOnDisk) []catalog.EventRecord {
	if next.State == c.state.State {
		return nil
	}
	switch next.State {
	case catalog.ImageReady:
		return []catalog.EventRecord{note(p.in.Now, catalog.Normal, catalog.KindImage, c.w.Name, "Ready")}
	case catalog.ImageFailed:
		ev := note(p.in.Now, catalog.Warning, catalog.KindImage, c.w.Name, "Failed")
		ev.Message = next.Message
		return []catalog.EventRecord{ev}
	}
	return nil
}
