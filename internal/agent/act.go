package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/plan"
)

// result is how an action ended.
type result struct {
	action   plan.Action
	err      error
	put      []catalog.Entry // what it wrote
	finished *plan.Result    // of an operation
	state    *client.State   // a look after it, so that nothing is planned from before it
}

// do carries one action out, and looks at the data process afterwards.
func (a *Agent) do(ctx context.Context, action plan.Action) result {
	r := result{action: action}
	s, err := a.data()
	if err != nil {
		r.err = err
		return r
	}
	switch v := action.(type) {
	case plan.AdoptDisk:
		var d client.DiskStatus
		d, r.err = s.AdoptDisk(ctx, client.Disk{Path: v.Path, ClusterID: v.ClusterID, DiskID: v.DiskID})
		if r.err == nil && d.Error != "" && d.TotalBytes == 0 {
			r.err = fmt.Errorf("disk %s: %s: %w", v.Path, d.Error, ErrDiskAway)
		}
	case plan.CreateReplica:
		r.err = s.CreateReplica(ctx, client.CreateReplica{
			DiskID: v.DiskID, ReplicaID: v.ReplicaID, VolumeID: v.VolumeID, Volume: v.Volume, HeadID: v.ReplicaID,
			SizeBytes: v.SizeBytes, ImageID: v.ImageID, Image: v.Image,
		})
	case plan.DeleteReplica:
		r.err = a.deleteReplica(ctx, s, v)
	case plan.CopyReplica:
		_, r.err = s.CopyReplica(ctx, client.CopyReplica{
			VolumeID: v.VolumeID, Volume: v.Volume, Node: a.cfg.Node, DiskID: v.DiskID, ReplicaID: v.ReplicaID, From: v.From, FromNode: v.FromNode, ImageID: v.ImageID,
		})
	case plan.EndCopy:
		r.err = a.endCopy(ctx, s, v)
	case plan.OpenVolume:
		_, r.err = s.OpenVolume(ctx, client.OpenVolume{
			VolumeID: v.VolumeID, Volume: v.Volume, Node: a.cfg.Node, DiskID: v.DiskID, ReplicaID: v.ReplicaID, ReplicaNode: replicaNode(v, a.cfg.Node), Frontend: v.Frontend, Salvage: v.Salvage,
			Limits: client.Limits(v.Limits),
		})
	case plan.CloseVolume:
		r.err = closeVolume(ctx, s, v)
	case plan.SetLimits:
		a.setLimits(ctx, s, v, &r)
	case plan.SetNetwork:
		a.setNetwork(ctx, s, v, &r)
	case plan.SetCluster:
		a.setCluster(ctx, s, v, &r)
	case plan.SetBackground:
		r.err = s.SetBackground(ctx, client.Background{BytesPerSecond: v.BytesPerSecond})
	case plan.Operate:
		a.operate(ctx, s, v, &r)
	default:
		a.doImage(ctx, s, action, &r)
	}
	if r.state == nil {
		r.state = a.lookAfter(ctx, s)
	}
	return r
}

// doImage carries out what is done to images, and what reads volumes.
func (a *Agent) doImage(ctx context.Context, s client.Service, action plan.Action, r *result) {
	switch v := action.(type) {
	case plan.StartExport:
		a.startExport(ctx, s, v, r)
	case plan.EndExport:
		if r.err = endReading(ctx, s, v.Reading); r.err == nil {
			r.finished = &v.Result
		}
	case plan.EndReading:
		if r.err = endReading(ctx, s, v.Reading); r.err == nil {
			r.finished = &plan.Result{}
		}
	case plan.DropReading:
		r.err = endReading(ctx, s, v.Reading)
	case plan.ForgetJob:
		a.forgetJob(ctx, s, v, r)
	case plan.ImportImage:
		a.importImage(ctx, s, v, r)
	case plan.CancelImport:
		r.err = s.CancelImport(ctx, client.CancelImport{ImageID: v.ImageID})
	case plan.DeleteImage:
		r.err = a.deleteImage(ctx, s, v)
	default:
		r.err = fmt.Errorf("action %T: %w", action, client.ErrInternal)
	}
}

// lookAfter looks; nil if nobody answers, which watchData finds too.
func (a *Agent) lookAfter(ctx context.Context, s client.Service) *client.State {
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	st, err := s.State(ask)
	if err != nil {
		return nil
	}
	return &st
}

// replicaNode names another node; "" is this one, which also an earlier data process understands.
func replicaNode(v plan.OpenVolume, here string) string {
	if v.ReplicaNode == here {
		return ""
	}
	return v.ReplicaNode
}

// endCopy forgets the copying of a replica. What failed is returned as this action's own failure, so that the next try waits, ever longer.
func (a *Agent) endCopy(ctx context.Context, s client.Service, v plan.EndCopy) error {
	if err := s.CancelImport(ctx, client.CancelImport{ImageID: v.ReplicaID}); err != nil || v.Code == "" {
		return err
	}
	a.note(catalog.EventRecord{
		Time: a.cfg.Now().UTC(), Type: catalog.Warning, Kind: catalog.KindVolume, Name: v.Volume, Reason: "CopyFailed",
		Message: fmt.Sprintf("the copy to node %s failed (%s) and is tried again: %s", a.cfg.Node, v.Code, v.Error),
	})
	return fmt.Errorf("copy replica %s: %s: %w", v.ReplicaID, v.Error, errCopy)
}

// errCopy: a copy ended without taking its place.
var errCopy = errors.New("the copy failed")

// deleteReplica destroys a replica only after the records themselves, read now, say that this volume is deleted and that this replica is one of its, or that another
// has taken its place (design: invariant 15).
func (a *Agent) deleteReplica(ctx context.Context, s client.Service, v plan.DeleteReplica) error {
	w, _, err := catalog.Read[catalog.VolumeWanted](ctx, a.cfg.Catalog, catalog.VolumeKey(catalog.Wanted, v.Volume))
	if err != nil {
		return fmt.Errorf("delete replica %s: %w", v.ReplicaID, err)
	}
	is := func(p catalog.Placement) bool {
		return p.ReplicaID == v.ReplicaID && p.Node == a.cfg.Node && p.DiskID == v.DiskID
	}
	dropped := slices.ContainsFunc(w.Dropped, is)
	if w.ID != v.VolumeID || !dropped && (w.Deleted == nil || !slices.ContainsFunc(w.Replicas, is)) {
		return fmt.Errorf("delete replica %s of volume %s: %w", v.ReplicaID, v.Volume, ErrNoTombstone)
	}
	if w.Deleted == nil {
		m, _, err := catalog.Read[catalog.Membership](ctx, a.cfg.Catalog, catalog.MembershipKey(v.VolumeID))
		if err != nil {
			return fmt.Errorf("delete replica %s: %w", v.ReplicaID, err)
		}
		if slices.ContainsFunc(m.Members, func(x catalog.MembershipMember) bool { return x.ReplicaID == v.ReplicaID }) {
			return fmt.Errorf("delete replica %s of volume %s: it is a member: %w", v.ReplicaID, v.Volume, ErrNoTombstone)
		}
	}
	return s.DeleteReplica(ctx, client.DeleteReplica{DiskID: v.DiskID, ReplicaID: v.ReplicaID})
}

// deleteImage destroys a copy only after the records, read now, say that this image is deleted and no volume stands on it; or that it is wanted on this disk no
// more and no volume stands on it there.
func (a *Agent) deleteImage(ctx context.Context, s client.Service, v plan.DeleteImage) error {
	w, _, err := catalog.Read[catalog.ImageWanted](ctx, a.cfg.Catalog, catalog.ImageKey(catalog.Wanted, v.Image))
	if err != nil {
		return fmt.Errorf("delete image %s: %w", v.Image, err)
	}
	if w.ID != v.ImageID || w.Deleted == nil && slices.Contains(w.Disks, v.DiskID) {
		return fmt.Errorf("delete image %s on disk %s: %w", v.Image, v.DiskID, ErrNoTombstone)
	}
	volumes, _, err := catalog.All[catalog.VolumeWanted](ctx, a.cfg.Catalog, catalog.KindVolume, catalog.Wanted)
	if err != nil {
		return fmt.Errorf("delete image %s: %w", v.Image, err)
	}
	for _, vol := range volumes {
		onDisk := slices.ContainsFunc(vol.Value.Replicas, func(p catalog.Placement) bool { return p.DiskID == v.DiskID })
		if vol.Value.ImageID == v.ImageID && (w.Deleted != nil || onDisk) {
			return fmt.Errorf("delete image %s: volume %s stands on it: %w", v.Image, vol.Value.Name, client.ErrInUse)
		}
	}
	return s.DeleteImage(ctx, client.DeleteImage{DiskID: v.DiskID, ImageID: v.ImageID})
}

// importImage records that an import is asked for, and asks for it.
func (a *Agent) importImage(ctx context.Context, s client.Service, v plan.ImportImage, r *result) {
	if r.err = a.record(ctx, v.Starting, r); r.err != nil {
		return
	}
	in := client.ImportImage{DiskID: v.DiskID, ImageID: v.ImageID, Name: v.Image, Source: v.Source, Checksum: v.Checksum}
	if v.Reading != nil {
		src, err := beginReading(ctx, s, *v.Reading)
		if r.err = err; err != nil {
			return
		}
		in.Source = src.URI
	}
	_, r.err = s.ImportImage(ctx, in)
}

// record carries a write out in the course of an action.
func (a *Agent) record(ctx context.Context, w plan.Write, r *result) error {
	value, err := json.Marshal(w.Value)
	if err != nil {
		return err
	}
	rev, err := a.cfg.Catalog.Put(ctx, w.Key, value, w.Was)
	if err != nil {
		return fmt.Errorf("write %s: %w", w.Key, err)
	}
	r.put = append(r.put, catalog.Entry{Key: w.Key, Value: value, Rev: rev})
	return nil
}

// operate records an operation as running, if it is not, and carries it out under its id. How it ended is recorded later (plan.OnNode), once the observed
// record shows its effect.
func (a *Agent) operate(ctx context.Context, s client.Service, v plan.Operate, r *result) {
	op := v.Operation.Value
	again := op.State == catalog.OperationRunning
	if !again {
		op.State = catalog.OperationRunning
		if r.err = a.record(ctx, plan.Write{Key: catalog.OperationKey(op.Volume, op.ID), Value: op, Was: v.Operation.Rev}, r); r.err != nil {
			return
		}
	}
	var problems []catalog.Problem
	var err error
	if op.Verb == catalog.VerbCheck {
		problems, err = check(ctx, s, client.Check{VolumeID: op.VolumeID, DiskID: v.DiskID, ReplicaID: v.ReplicaID})
	} else {
		_, err = s.Operate(ctx, client.Operate{
			VolumeID: op.VolumeID, OpID: op.ID, Verb: op.Verb, Snapshot: op.Snapshot, SizeBytes: op.SizeBytes, Labels: op.Labels,
			System: op.Verb == catalog.VerbExpand,
		})
	}
	r.state = a.lookAfter(ctx, s)
	switch {
	case err == nil, again && op.Verb == catalog.VerbSnapshotRemove && errors.Is(err, client.ErrNotFound) && isOpen(r.state, op.VolumeID):
		r.finished = &plan.Result{Problems: problems} // a snapshot that is gone was removed the first time
	case catalogCode(err) == "", op.Verb != catalog.VerbCheck && errors.Is(err, client.ErrNotFound) && !isOpen(r.state, op.VolumeID):
		r.err = err // the data process went away under it, or was: said again later, under the same id
	default:
		r.finished = &plan.Result{Code: catalogCode(err), Message: err.Error()}
	}
}

func isOpen(st *client.State, volumeID string) bool {
	return st != nil && slices.ContainsFunc(st.Volumes, func(v client.VolumeStatus) bool { return v.VolumeID == volumeID && v.State == plan.FoundOpen })
}

func check(ctx context.Context, s client.Service, c client.Check) ([]catalog.Problem, error) {
	got, err := s.Check(ctx, c)
	var out []catalog.Problem
	for _, p := range got.Problems {
		out = append(out, catalog.Problem(p))
	}
	return out, err
}
