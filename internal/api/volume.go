package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"ashlar/internal/catalog"
)

// volumeView is everything a volume's resource is made of.
type volumeView struct {
	wanted   catalog.VolumeWanted
	observed catalog.VolumeObserved
	purge    *catalog.Operation // the last one
	disks    map[string]string  // disk id -> path
	nodes    nodeSet
}

// sizeBytes is the larger of what was asked for and what is: volumes only grow, and either record may lag.
func (v *volumeView) sizeBytes() int64 { return max(v.wanted.SizeBytes, v.observed.SizeBytes) }

// ticket is the API's own ticket.
func (v *volumeView) ticket() *catalog.Ticket {
	for i, t := range v.wanted.Tickets {
		if t.Kind == catalog.TicketAPI {
			return &v.wanted.Tickets[i]
		}
	}
	return nil
}

// state is the observed state, corrected by a wish that has not been seen yet, so that a client that just asked never sees the state from before.
func (v *volumeView) state() string {
	o := v.observed
	switch {
	case v.wanted.Deleted != nil:
		return catalog.VolumeDeleting
	case o.State == "":
		return catalog.VolumeCreating
	case v.orphaned() && len(v.wanted.Tickets) == 0:
		return catalog.VolumeDetached // whoever opens it next ends what that node may still do
	case v.orphaned() && v.wanted.Tickets[0].Node != o.Node:
		return catalog.VolumeAttaching
	case o.State == catalog.VolumeDetached && len(v.wanted.Tickets) > 0 && o.Robustness != catalog.RobustnessFaulted:
		return catalog.VolumeAttaching
	case o.State == catalog.VolumeAttached && len(v.wanted.Tickets) == 0:
		return catalog.VolumeDetaching
	}
	return o.State
}

// orphaned tells that the node which has the volume open, and would say how it is, is down.
func (v *volumeView) orphaned() bool {
	switch v.observed.State {
	case catalog.VolumeAttaching, catalog.VolumeAttached, catalog.VolumeDetaching:
		return v.observed.Node != "" && v.nodes.down(v.observed.Node)
	}
	return false
}

// robustness is what its node says, unless that cannot say it.
func (v *volumeView) robustness() string {
	if v.orphaned() {
		return catalog.RobustnessUnknown
	}
	return cmp.Or(v.observed.Robustness, catalog.RobustnessUnknown)
}

// trouble is why the wanted state is not reached: what its node says, or what that cannot say.
func (v *volumeView) trouble() string {
	if v.orphaned() && wantedOn(v.wanted, v.observed.Node) {
		return fmt.Sprintf("node %s, where it is attached, is down; it goes on when that is back, or elsewhere after `ashlar volume detach %s --force`", v.observed.Node, v.wanted.Name)
	}
	var away []string
	for _, r := range v.wanted.Replicas {
		if _, known := v.nodes.wanted[r.Node]; known && v.nodes.down(r.Node) { // of one that was given up the leader has said what that means
			away = append(away, r.Node)
		}
	}
	if len(away) > 0 && len(away) == len(v.wanted.Replicas) && !v.orphaned() {
		slices.Sort(away)
		return fmt.Sprintf("node %s, which has its only copy, is down", strings.Join(slices.Compact(away), ", "))
	}
	return v.observed.Error
}

func (v *volumeView) attached() bool { return v.state() == catalog.VolumeAttached }

// loadVolume reads one volume; CodeNotFound.
func (h *Handler) loadVolume(ctx context.Context, name string) (*volumeView, error) {
	w, ok, err := find[catalog.VolumeWanted](ctx, h.cfg.Catalog, catalog.VolumeKey(catalog.Wanted, name))
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, Failure(CodeNotFound, "volume %s: there is no such volume", quote(name))
	}
	o, _, err := find[catalog.VolumeObserved](ctx, h.cfg.Catalog, catalog.VolumeKey(catalog.Observed, name))
	if err != nil {
		return nil, err
	}
	side, err := h.loadSide(ctx)
	if err != nil {
		return nil, err
	}
	return side.view(w, o), nil
}

// side is what volumes' resources need besides their own records.
type side struct {
	disks  map[string]string
	purges map[string]catalog.Operation // by volume id
	nodes  nodeSet
}

func (h *Handler) loadSide(ctx context.Context) (side, error) {
	s := side{disks: map[string]string{}, purges: map[string]catalog.Operation{}}
	var err error
	if s.nodes, err = h.loadNodes(ctx); err != nil {
		return s, err
	}
	for name, o := range s.nodes.observed {
		for disk, d := range o.Disks {
			s.disks[d.DiskID] = s.nodes.wanted[name].Disks[disk].Path
		}
	}
	ops, err := list[catalog.Operation, struct{}](ctx, h, catalog.KindOperation)
	if err != nil {
		return s, err
	}
	for _, op := range ops.wanted {
		if last, ok := s.purges[op.VolumeID]; op.Verb == catalog.VerbPurge && (!ok || last.Created.Before(op.Created)) {
			s.purges[op.VolumeID] = op
		}
	}
	return s, nil
}

func (s side) view(w catalog.VolumeWanted, o catalog.VolumeObserved) *volumeView {
	v := &volumeView{wanted: w, disks: s.disks, nodes: s.nodes}
	// A record of an earlier volume of this name says nothing of this one.
	if o.ID == w.ID {
		v.observed = o
	}
	if op, ok := s.purges[w.ID]; ok {
		v.purge = &op
	}
	return v
}

func (h *Handler) volumeList(c *call) (any, error) {
	l, err := list[catalog.VolumeWanted, catalog.VolumeObserved](c.r.Context(), h, catalog.KindVolume)
	if err != nil {
		return nil, err
	}
	side, err := h.loadSide(c.r.Context())
	if err != nil {
		return nil, err
	}
	names := l.names()
	data := make([]Volume, len(names))
	spread(len(names), func(from, to int) {
		for i, name := range names[from:to] {
			data[from+i] = h.volume(c, side.view(l.wanted[name], l.observed[name]))
		}
	})
	return collect(c, c.noun.schema, data), nil
}

func (h *Handler) volumeGet(c *call) (any, error) {
	v, err := h.loadVolume(c.r.Context(), c.id)
	if err != nil {
		return nil, err
	}
	return h.volume(c, v), nil
}

// volume makes the resource.
func (h *Handler) volume(c *call, v *volumeView) Volume {
	w := v.wanted
	res := Volume{
		Resource: c.resource(w.Name, volumeActionsOf(v)...), Name: w.Name, Size: strconv.FormatInt(v.sizeBytes(), 10), NumberOfReplicas: w.Copies,
		State: v.state(), Robustness: v.robustness(), Frontend: w.Frontend, BackingImage: w.Image, Created: stamp(w.Created), Error: v.trouble(),
		Image: h.engineImage(), CurrentImage: h.engineImage(), BackupCompressionMethod: "lz4", DataEngine: "v1", AccessMode: "rwo", DataLocality: cmp.Or(w.DataLocality, localityDisabled),
		Ready: v.wanted.Deleted == nil && v.observed.Robustness != catalog.RobustnessFaulted, DiskSelector: tags(w.DiskSelector), NodeSelector: tags(w.NodeSelector),
		Conditions: v.conditions(), BackupStatus: []any{}, RestoreStatus: []any{}, RebuildStatus: []any{},
	}
	if t := v.ticket(); t != nil {
		res.DisableFrontend = t.DisableFrontend
	}
	res.Replicas = h.replicas(v)
	res.Controllers = []Controller{h.controller(v)}
	res.PurgeStatus = purgeStatus(v, res.Replicas)
	res.Limits, res.Space = limits(w.Limits), space(v.space())
	res.Links["download"] = res.Links["self"] + "/download"
	return res
}

func (h *Handler) controller(v *volumeView) Controller {
	var used int64
	for _, s := range v.observed.Snapshots {
		used += s.SizeBytes
	}
	size := v.observed.SizeBytes
	if size == 0 {
		size = v.wanted.SizeBytes
	}
	ctl := Controller{
		Name: v.wanted.Name + "-e-0", Size: strconv.FormatInt(size, 10), ActualSize: strconv.FormatInt(used, 10),
		Image: h.engineImage(), CurrentImage: h.engineImage(), IsExpanding: v.observed.SizeBytes > 0 && v.observed.SizeBytes < v.wanted.SizeBytes,
	}
	if len(v.wanted.Tickets) > 0 {
		ctl.HostID = v.wanted.Tickets[0].Node
	}
	if v.observed.State == catalog.VolumeAttached && !v.orphaned() {
		ctl.Running, ctl.HostID, ctl.Endpoint = true, v.observed.Node, v.observed.Endpoint
		ctl.InstanceManagerName = instanceManagerName(v.observed.Node)
	}
	return ctl
}

// replicaName is a replica's name in the dialect.
func replicaName(volume, id string) string { return volume + "-r-" + id[:min(8, len(id))] }

// replicas lists the placed ones, and those wanted that no disk was found for.
func (h *Handler) replicas(v *volumeView) []Replica {
	found := map[string]catalog.ReplicaObserved{}
	for _, r := range v.observed.Replicas {
		found[r.ReplicaID] = r
	}
	out := make([]Replica, 0, v.wanted.Copies)
	for _, p := range v.wanted.Replicas {
		o := found[p.ReplicaID]
		r := Replica{
			Name: replicaName(v.wanted.Name, p.ReplicaID), HostID: p.Node, DiskID: p.DiskID, DiskPath: v.disks[p.DiskID], DataPath: o.DataPath,
			Running: o.Running, Mode: o.Mode, FailedAt: o.FailedAt, Image: h.engineImage(), CurrentImage: h.engineImage(),
			AllocatedBytes: strconv.FormatInt(o.AllocatedBytes, 10),
		}
		if v.nodes.down(p.Node) { // nobody can say that it runs
			r.Running, r.Mode = false, ""
		}
		if r.DataPath != "" && !path.IsAbs(r.DataPath) {
			r.DataPath = path.Join(r.DiskPath, r.DataPath)
		}
		if r.Running {
			r.InstanceManagerName = instanceManagerName(p.Node)
		}
		out = append(out, r)
	}
	for i := len(out); i < v.wanted.Copies; i++ {
		out = append(out, Replica{Name: fmt.Sprintf("%s-r-unscheduled-%d", v.wanted.Name, i), Image: h.engineImage(), CurrentImage: h.engineImage(), AllocatedBytes: "0"})
	}
	return out
}

// conditions shows what the records say, and adds those that clients of the dialect index without asking.
func (v *volumeView) conditions() map[string]Condition {
	out := map[string]Condition{}
	for name, c := range v.observed.Conditions {
		out[name] = condition(name, c)
	}
	if _, ok := out[catalog.ConditionScheduled]; !ok {
		c := Condition{Type: catalog.ConditionScheduled, Status: catalog.ConditionTrue, LastTransitionTime: stamp(v.wanted.Created)}
		if n := len(v.wanted.Replicas); n < v.wanted.Copies {
			c.Status, c.Reason = catalog.ConditionFalse, catalog.ReasonSchedulingFailure
			c.Message = fmt.Sprintf("%d of %d copies have a disk", n, v.wanted.Copies)
		}
		out[catalog.ConditionScheduled] = c
	}
	if _, ok := out[catalog.ConditionWaitForImage]; !ok && v.wanted.Image != "" {
		out[catalog.ConditionWaitForImage] = Condition{Type: catalog.ConditionWaitForImage, Status: catalog.ConditionFalse, LastTransitionTime: stamp(v.wanted.Created)}
	}
	return out
}

func condition(name string, c catalog.Condition) Condition {
	return Condition{Type: name, Status: c.Status, Reason: c.Reason, Message: c.Message, LastTransitionTime: stamp(c.LastTransitionTime)}
}

// purgeStatus shows the last purge for each placed replica.
func purgeStatus(v *volumeView, replicas []Replica) []PurgeStatus {
	out := []PurgeStatus{}
	if v.purge == nil {
		return out
	}
	for _, r := range replicas {
		if r.HostID == "" {
			continue
		}
		p := PurgeStatus{Replica: r.Name, State: "in_progress", Progress: v.purge.Progress, IsPurging: true}
		switch v.purge.State {
		case catalog.OperationDone:
			p.State, p.Progress, p.IsPurging = "complete", 100, false
		case catalog.OperationFailed:
			p.State, p.Error, p.IsPurging = "error", v.purge.Message, false
		}
		out = append(out, p)
	}
	return out
}

// volumeInput is what a client may ask of a new volume. Fields that are not here are ignored.
type volumeInput struct {
	Name             string      `json:"name"`
	Size             string      `json:"size"`
	NumberOfReplicas int         `json:"numberOfReplicas"`
	BackingImage     string      `json:"backingImage"`
	Frontend         string      `json:"frontend"`
	DataEngine       string      `json:"dataEngine"`
	AccessMode       string      `json:"accessMode"`
	FromBackup       string      `json:"fromBackup"`
	DataSource       string      `json:"dataSource"`
	Encrypted        bool        `json:"encrypted"`
	Standby          bool        `json:"standby"`
	DiskSelector     []string    `json:"diskSelector"`
	NodeSelector     []string    `json:"nodeSelector"`
	DataLocality     string      `json:"dataLocality"` // disabled, best-effort; "": the setting's
	Limits           limitsInput `json:"limits"`       // ours
}

func (h *Handler) volumeCreate(c *call) (any, error) {
	var in volumeInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	if err := checkName("volume", in.Name); err != nil {
		return nil, err
	}
	if err := in.check(); err != nil {
		return nil, err
	}
	ctx := c.r.Context()
	w := catalog.VolumeWanted{
		Name: in.Name, Copies: in.NumberOfReplicas, Frontend: cmp.Or(in.Frontend, h.cfg.Frontend), Created: h.cfg.Now().UTC(),
		NodeSelector: selector(in.NodeSelector), DiskSelector: selector(in.DiskSelector),
	}
	var err error
	if w.DataLocality, err = h.locality(ctx, in.DataLocality); err != nil {
		return nil, err
	}
	if err := in.Limits.apply(w.Name, &w.Limits); err != nil {
		return nil, err
	}
	if w.Copies == 0 {
		n, err := h.settingNumber(ctx, "default-replica-count")
		if err != nil {
			return nil, err
		}
		w.Copies = n
	}
	if err := h.baseVolume(ctx, &w, in); err != nil {
		return nil, err
	}
	id, err := h.newID()
	if err != nil {
		return nil, err
	}
	w.ID = id
	if err := h.putVolume(ctx, w); err != nil {
		return nil, err
	}
	// What it was made of is all there is to say of it: nothing has a volume of this id yet.
	return h.volume(c, side{}.view(w, catalog.VolumeObserved{})), nil
}

// checkFrontend refuses frontends that this build does not have.
func checkFrontend(volume, frontend string) error {
	switch frontend {
	case "", catalog.FrontendNBD, catalog.FrontendBlockdev:
		return nil
	case "iscsi":
		return Failure(CodeNotBuilt, `volume %s: frontend "iscsi" (use "blockdev" or "nbd"): not built yet`, volume)
	}
	return Failure(CodeInvalid, "volume %s: there is no frontend %s; use %q or %q", volume, quote(frontend), catalog.FrontendBlockdev, catalog.FrontendNBD)
}

// check refuses what this build does not do, rather than to ignore it.
func (in *volumeInput) check() error {
	refuse := func(what string) error { return Failure(CodeNotBuilt, "volume %s: %s: not built yet", in.Name, what) }
	if err := checkFrontend(in.Name, in.Frontend); err != nil {
		return err
	}
	switch {
	case in.NumberOfReplicas < 0 || in.NumberOfReplicas > 20:
		return Failure(CodeInvalid, "volume %s: numberOfReplicas is %d; 1 to 20 are allowed", in.Name, in.NumberOfReplicas)
	case in.DataEngine != "" && in.DataEngine != "v1":
		return Failure(CodeNotSupported, "volume %s: data engine %s is not supported; leave it out", in.Name, quote(in.DataEngine))
	case in.AccessMode != "" && in.AccessMode != "rwo":
		return refuse("access mode " + quote(in.AccessMode))
	case in.FromBackup != "":
		return refuse("restoring a backup")
	case in.DataSource != "":
		return refuse("cloning")
	case in.Encrypted:
		return refuse("encryption")
	case in.Standby:
		return refuse("standby volumes")
	}
	if err := checkLocality(in.Name, in.DataLocality); err != nil {
		return err
	}
	return checkSelectors("volume "+in.Name, in.NodeSelector, in.DiskSelector)
}

// checkSelectors wants lists of tags.
func checkSelectors(what string, node, disk []string) error {
	if err := checkTags(what+": nodeSelector", node); err != nil {
		return err
	}
	return checkTags(what+": diskSelector", disk)
}

// selector is the form in which one is kept.
func selector(in []string) []string {
	if len(in) == 0 {
		return nil
	}
	return tags(in)
}

// The localities of the dialect that Ashlar has.
const (
	localityDisabled   = "disabled"
	localityBestEffort = "best-effort"
)

func checkLocality(volume, locality string) error {
	switch locality {
	case "", localityDisabled, localityBestEffort:
		return nil
	case "strict-local":
		return Failure(CodeNotSupported, "volume %s: dataLocality %q is not supported; with %q the copy is moved to the node that used it last", volume, locality, localityBestEffort)
	}
	return Failure(CodeInvalid, "volume %s: there is no dataLocality %s; use %q or %q", volume, quote(locality), localityDisabled, localityBestEffort)
}

// locality is the record's form of what was asked for, or of the setting where nothing was.
func (h *Handler) locality(ctx context.Context, asked string) (string, error) {
	if asked == "" {
		rec, ok, err := find[catalog.Setting](ctx, h.cfg.Catalog, catalog.SettingKey(settingLocality))
		if err != nil {
			return "", err
		}
		if ok {
			asked = rec.Value
		}
	}
	if asked == localityDisabled {
		asked = ""
	}
	return asked, nil
}

type localityInput struct {
	DataLocality string `json:"dataLocality"` // disabled, best-effort
}

// updateLocality changes a volume's locality; a copy moves when the volume is detached.
func (h *Handler) updateLocality(c *call) (any, error) {
	var in localityInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	if in.DataLocality == "" {
		return nil, Failure(CodeInvalid, "volume %s: dataLocality is missing; use %q or %q", quote(c.id), localityDisabled, localityBestEffort)
	}
	if err := checkLocality(quote(c.id), in.DataLocality); err != nil {
		return nil, err
	}
	locality, err := h.locality(c.r.Context(), in.DataLocality)
	if err != nil {
		return nil, err
	}
	_, _, err = catalog.Update(c.r.Context(), h.cfg.Catalog, catalog.VolumeKey(catalog.Wanted, c.id), func(w *catalog.VolumeWanted) error {
		w.DataLocality = locality
		return nil
	})
	if err != nil {
		return nil, h.gone(c, err)
	}
	return h.volumeGet(c)
}

// baseVolume settles size and image, which depend on each other.
func (h *Handler) baseVolume(ctx context.Context, w *catalog.VolumeWanted, in volumeInput) error {
	var virtual int64
	if in.BackingImage != "" {
		img, ok, err := find[catalog.ImageWanted](ctx, h.cfg.Catalog, catalog.ImageKey(catalog.Wanted, in.BackingImage))
		if err != nil {
			return err
		}
		if !ok || img.Deleted != nil {
			return Failure(CodeInvalid, "volume %s: there is no image %s; import it first", w.Name, quote(in.BackingImage))
		}
		o, _, err := find[catalog.ImageObserved](ctx, h.cfg.Catalog, catalog.ImageKey(catalog.Observed, in.BackingImage))
		if err != nil {
			return err
		}
		if o.ID == img.ID {
			virtual = o.VirtualSizeBytes
		}
		w.Image, w.ImageID = img.Name, img.ID
	}
	if in.Size == "" {
		switch {
		case w.Image == "":
			return Failure(CodeInvalid, "volume %s: a size is missing", w.Name)
		case virtual == 0:
			return Failure(CodeConflict, "volume %s: a size is missing, and image %s does not have one yet; give a size, or wait for the import", w.Name, w.Image)
		case virtual > MaxSize:
			return Failure(CodeInvalid, "volume %s: image %s has %s, over the limit of 15 TiB", w.Name, w.Image, FormatSize(virtual))
		}
		w.SizeBytes = RoundSize(virtual)
		return nil
	}
	n, err := ParseSize(in.Size)
	if err != nil {
		return Because(err, CodeInvalid, "volume %s: %v", w.Name, err)
	}
	w.SizeBytes = RoundSize(n)
	if w.SizeBytes < virtual {
		return Failure(CodeInvalid, "volume %s: its size of %s is less than the %s of image %s; ask for at least that",
			w.Name, FormatSize(w.SizeBytes), FormatSize(virtual), w.Image)
	}
	return nil
}

// putVolume creates the record. The deletion of its image may be asked for at the same time; if it is found to have been, the volume is taken back. (If it comes
// later still, the image's bytes stay until the volume is gone: docs/formats/catalog.md.)
func (h *Handler) putVolume(ctx context.Context, w catalog.VolumeWanted) error {
	key := catalog.VolumeKey(catalog.Wanted, w.Name)
	if _, err := catalog.Write(ctx, h.cfg.Catalog, key, w, 0); errors.Is(err, catalog.ErrConflict) {
		old, ok, err := find[catalog.VolumeWanted](ctx, h.cfg.Catalog, key)
		if err == nil && ok && old.Deleted != nil {
			return Failure(CodeExists, "volume %s: one of this name is being deleted; try again when it is gone", w.Name)
		}
		return Failure(CodeExists, "volume %s exists already; choose another name", w.Name)
	} else if err != nil {
		return err
	}
	if w.Image == "" {
		return nil
	}
	img, ok, err := find[catalog.ImageWanted](ctx, h.cfg.Catalog, catalog.ImageKey(catalog.Wanted, w.Image))
	if err != nil || ok && img.Deleted == nil && img.ID == w.ImageID {
		return err
	}
	if _, _, err := catalog.Update(ctx, h.cfg.Catalog, key, func(v *catalog.VolumeWanted) error { return h.bury(v, w.ID) }); err != nil {
		return err
	}
	return Failure(CodeConflict, "volume %s: image %s was deleted meanwhile", w.Name, w.Image)
}

// bury makes a volume's record a tombstone. Whoever owns its replicas deletes them, and then the record.
func (h *Handler) bury(v *catalog.VolumeWanted, id string) error {
	if v.Deleted != nil || v.ID != id {
		return nil
	}
	now := h.cfg.Now().UTC()
	v.Deleted, v.Tickets = &now, nil
	return nil
}

// volumeDelete asks for the volume's end and returns at once; attached or not. Asking again is no error; when all is gone the volume is not found.
func (h *Handler) volumeDelete(c *call) (any, error) {
	_, _, err := catalog.Update(c.r.Context(), h.cfg.Catalog, catalog.VolumeKey(catalog.Wanted, c.id), func(v *catalog.VolumeWanted) error { return h.bury(v, v.ID) })
	if errors.Is(err, catalog.ErrNotFound) {
		return nil, Failure(CodeNotFound, "volume %s: there is no such volume", quote(c.id))
	}
	return nil, err
}

// volumeActionsOf lists the verbs that make sense in a volume's state.
func volumeActionsOf(v *volumeView) []string {
	actions := []string{"attach", "detach", "check", "updateLimits", "updateDataLocality"}
	switch {
	case v.observed.Robustness == catalog.RobustnessFaulted:
		return append(actions, "salvage")
	case v.attached():
		return append(actions, "expand", "snapshotCRCreate", "snapshotCRGet", "snapshotCRList", "snapshotCRDelete",
			"snapshotCreate", "snapshotGet", "snapshotList", "snapshotDelete", "snapshotRevert", "snapshotPurge", "snapshotDiff", "exportFile")
	}
	return append(actions, "expand", "snapshotCRGet", "snapshotCRList", "exportFile")
}

// volumeActions lists every verb of the dialect, built or not.
func (h *Handler) volumeActions() map[string]verb {
	all := map[string]verb{
		"attach": {do: h.attach, in: attachInput{}, out: Volume{}}, "detach": {do: h.detach, in: detachInput{}, out: Volume{}},
		"salvage": {do: h.salvage, in: salvageInput{}, out: Volume{}}, "expand": {do: h.expand, in: expandInput{}, out: Volume{}},
		"check": {do: h.check, out: CheckReport{}}, "updateLimits": {do: h.updateLimits, in: limitsInput{}, out: Volume{}},
		"updateDataLocality": {do: h.updateLocality, in: localityInput{}, out: Volume{}},
		"exportFile":         {do: h.exportFile, in: exportInput{}, out: Operation{}}, "snapshotDiff": {do: h.snapshotDiff, in: diffInput{}, out: SnapshotDiff{}, reads: true},
		"snapshotCreate": {do: h.snapshotCreate, in: snapshotInput{}, out: Snapshot{}}, "snapshotList": {do: h.snapshotList, out: Collection[Snapshot]{}, reads: true},
		"snapshotGet": {do: h.snapshotGet, in: snapshotInput{}, out: Snapshot{}, reads: true}, "snapshotDelete": {do: h.snapshotDelete, in: snapshotInput{}, out: Volume{}},
		"snapshotRevert": {do: h.snapshotRevert, in: snapshotInput{}}, "snapshotPurge": {do: h.snapshotPurge, out: Volume{}},
		"snapshotCRCreate": {do: h.snapshotCRCreate, in: snapshotInput{}, out: SnapshotCR{}}, "snapshotCRList": {do: h.snapshotCRList, out: Collection[SnapshotCR]{}, reads: true},
		"snapshotCRGet": {do: h.snapshotCRGet, in: snapshotInput{}, out: SnapshotCR{}, reads: true}, "snapshotCRDelete": {do: h.snapshotCRDelete, in: snapshotInput{}, out: struct{}{}},
	}
	for what, verbs := range map[string]string{
		"backups":                       "snapshotBackup",
		"replication":                   "replicaRemove updateReplicaCount updateReplicaAutoBalance updateReplicaSoftAntiAffinity updateReplicaZoneSoftAntiAffinity updateReplicaDiskSoftAntiAffinity",
		"upgrade by engine image":       "engineUpgrade",
		"standby volumes":               "activate",
		"recurring jobs":                "recurringJobAdd recurringJobDelete recurringJobList",
		"trimming a mounted filesystem": "trimFilesystem",
		"giving up an expansion":        "cancelExpansion",
		"shared access":                 "updateAccessMode",
		"Kubernetes objects":            "pvCreate pvcCreate",
		"this setting of a volume":      "updateSnapshotDataIntegrity updateSnapshotMaxCount updateSnapshotMaxSize updateUnmapMarkSnapChainRemoved updateBackupCompressionMethod updateFreezeFilesystemForSnapshot updateOfflineRebuilding",
	} {
		for verb := range strings.SplitSeq(verbs, " ") {
			all[verb] = unbuilt(verb + " (" + what + ")")
		}
	}
	return all
}

// nodeNames lists the known nodes for messages.
func nodeNames(nodes map[string]catalog.NodeWanted) string {
	if len(nodes) == 0 {
		return "none yet"
	}
	return strings.Join(slices.Sorted(maps.Keys(nodes)), ", ")
}
