package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/plan"
)

// maxDropped is how many temporary snapshots may wait, removed, for a purge before one is asked for: so that they are not more and more, and what people removed is not
// purged at every export.
const maxDropped = 4

// beginReading makes what is to be read a source: the snapshot is taken, if it is a temporary one and not there yet. Every part of it may be repeated. ErrAway if the
// volume is not open (now).
func beginReading(ctx context.Context, s client.Service, r plan.Reading) (client.Source, error) {
	l, open, err := layerOf(ctx, s, r)
	if err != nil {
		return client.Source{}, err
	}
	if !open {
		return client.Source{}, fmt.Errorf("read volume %s: it is not open: %w", r.VolumeID, ErrAway)
	}
	if r.Temporary && l == nil {
		_, err := s.Operate(ctx, client.Operate{
			VolumeID: r.VolumeID, OpID: plan.DeriveID("snapshot", r.ID), Verb: catalog.VerbSnapshot, Snapshot: r.Snapshot, Labels: r.Labels, System: true,
		})
		if err != nil {
			return client.Source{}, fmt.Errorf("snapshot %s: %w", r.Snapshot, err)
		}
	}
	return s.OpenSource(ctx, client.OpenSource{ID: r.ID, VolumeID: r.VolumeID, Snapshot: r.Snapshot})
}

// endReading ends a source, and removes its temporary snapshot if the volume is open; if it is not, plan has it opened for that. Content with what is ended already.
func endReading(ctx context.Context, s client.Service, r plan.Reading) error {
	if err := s.CloseSource(ctx, client.CloseSource{ID: r.ID}); err != nil {
		return err
	}
	if !r.Temporary {
		return nil
	}
	l, open, err := layerOf(ctx, s, r)
	if err != nil || !open || l == nil || l.Removed {
		return err
	}
	st, err := s.Operate(ctx, client.Operate{VolumeID: r.VolumeID, OpID: plan.DeriveID("remove", r.ID), Verb: catalog.VerbSnapshotRemove, Snapshot: r.Snapshot, System: true})
	if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", r.Snapshot, err)
	}
	dropped := 0
	for _, l := range st.Layers {
		if l.Snapshot == r.Snapshot && !l.Head && !l.Removed {
			return fmt.Errorf("remove snapshot %s: it is there still: %w", r.Snapshot, client.ErrInternal)
		}
		if l.Removed && !l.UserCreated && l.Labels[catalog.LabelReading] != "" {
			dropped++
		}
	}
	if dropped < maxDropped {
		return nil
	}
	if _, err := s.Operate(ctx, client.Operate{VolumeID: r.VolumeID, OpID: plan.DeriveID("purge", r.ID), Verb: catalog.VerbPurge, System: true}); err != nil {
		return fmt.Errorf("purge temporary snapshots: %w", err)
	}
	return nil
}

// layerOf finds the layer of a reading's snapshot (nil: there is none), and tells whether the volume is open.
func layerOf(ctx context.Context, s client.Service, r plan.Reading) (*client.Layer, bool, error) {
	st, err := s.State(ctx)
	if err != nil {
		return nil, false, err
	}
	for _, v := range st.Volumes {
		if v.VolumeID != r.VolumeID || v.State != plan.FoundOpen {
			continue
		}
		if i := slices.IndexFunc(v.Layers, func(l client.Layer) bool { return l.Snapshot == r.Snapshot && !l.Head }); i >= 0 {
			return &v.Layers[i], true, nil
		}
		return nil, true, nil
	}
	return nil, false, nil
}

// forgetJob drops an export that is over, and looks whether it is gone.
func (a *Agent) forgetJob(ctx context.Context, s client.Service, v plan.ForgetJob, r *result) {
	if r.err = s.CancelImport(ctx, client.CancelImport{ImageID: v.ID}); r.err != nil {
		return
	}
	if r.state = a.lookAfter(ctx, s); r.state != nil && slices.ContainsFunc(r.state.Jobs, func(j client.Job) bool { return j.ID == v.ID }) {
		r.err = fmt.Errorf("forget export %s: it is there still: %w", v.ID, client.ErrInternal)
	}
}

// startExport records an export as running, if it is not, and begins it. What follows from its job plan says.
func (a *Agent) startExport(ctx context.Context, s client.Service, v plan.StartExport, r *result) {
	op := v.Operation.Value
	again := op.State == catalog.OperationRunning
	if !again {
		op.State = catalog.OperationRunning
		if r.err = a.record(ctx, plan.Write{Key: catalog.OperationKey(op.Volume, op.ID), Value: op, Was: v.Operation.Rev}, r); r.err != nil {
			return
		}
	}
	src, err := beginReading(ctx, s, v.Reading)
	if err == nil {
		_, err = s.ExportImage(ctx, client.ExportImage{ID: op.ID, Source: src.URI, Format: op.Format, Compress: op.Compress, To: op.Path})
	}
	r.state = a.lookAfter(ctx, s)
	switch {
	case err == nil:
	case catalogCode(err) == "", errors.Is(err, client.ErrNotFound) && !isOpen(r.state, op.VolumeID):
		r.err = err // said again later, under the same id
	default:
		if r.err = endReading(ctx, s, v.Reading); r.err == nil {
			r.finished = &plan.Result{Code: catalogCode(err), Message: err.Error()}
			if again && errors.Is(err, client.ErrExists) { // the data process may have ended after it wrote it; nobody can tell from somebody else's file
				r.finished.Message += " (the export was interrupted; the file may be whole, if nobody else made it: remove it and export again)"
			}
		}
		r.state = a.lookAfter(ctx, s)
	}
}

// closeVolume closes a volume, and then gives up what was read of it: it is begun anew, from the same snapshot, when the volume is open again. A volume that could not be
// closed is read on.
func closeVolume(ctx context.Context, s client.Service, v plan.CloseVolume) error {
	err := s.CloseVolume(ctx, client.CloseVolume{VolumeID: v.VolumeID, Force: v.Force})
	if errors.Is(err, client.ErrInUse) {
		return err
	}
	for _, r := range v.Readings {
		if r.Job != "" {
			err = errors.Join(err, s.CancelImport(ctx, client.CancelImport{ImageID: r.Job}))
		}
		err = errors.Join(err, s.CloseSource(ctx, client.CloseSource{ID: r.ID}))
	}
	return err
}

// setLimits changes limits and looks whether the data process took them, because saying so again and again would help nobody.
func (a *Agent) setLimits(ctx context.Context, s client.Service, v plan.SetLimits, r *result) {
	want := client.Limits(v.Limits)
	if r.err = s.SetLimits(ctx, client.SetLimits{VolumeID: v.VolumeID, Limits: want}); r.err != nil {
		return
	}
	if r.state = a.lookAfter(ctx, s); r.state == nil {
		return
	}
	for _, st := range r.state.Volumes {
		if st.VolumeID == v.VolumeID && st.State == plan.FoundOpen && st.Limits != want {
			r.err = fmt.Errorf("limits of volume %s: the data process has %+v: %w", v.Volume, st.Limits, client.ErrInternal)
		}
	}
}

// setNetwork changes the offer over TCP, and looks whether it was taken, as setLimits does.
func (a *Agent) setNetwork(ctx context.Context, s client.Service, v plan.SetNetwork, r *result) {
	want := client.Network(v.Network)
	if r.err = s.SetNetwork(ctx, want); r.err != nil {
		return
	}
	if r.state = a.lookAfter(ctx, s); r.state != nil && r.state.Network != want {
		r.err = fmt.Errorf("offer volumes at %q: the data process has %+v: %w", want.Address, r.state.Network, client.ErrInternal)
	}
}

// setCluster tells who the other nodes are, and looks whether it was taken, as setLimits does.
func (a *Agent) setCluster(ctx context.Context, s client.Service, v plan.SetCluster, r *result) {
	if r.err = s.SetCluster(ctx, clusterOf(v.Cluster)); r.err != nil {
		return
	}
	if r.state = a.lookAfter(ctx, s); r.state != nil && !v.Cluster.Same(neighbours(r.state.Cluster)) {
		r.err = fmt.Errorf("tell the data process of the cluster: it has %+v: %w", r.state.Cluster, client.ErrInternal)
	}
}

// downloads are the readings of volumes for clients of this process. The zero value has none.
type downloads struct {
	mu  sync.Mutex
	ids map[string]string // reading -> volume id
}

func (d *downloads) begin(id, volumeID string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ids == nil {
		d.ids = map[string]string{}
	}
	d.ids[id] = volumeID
}

func (d *downloads) end(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.ids, id)
}

func (d *downloads) byVolume() map[string][]string {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := map[string][]string{}
	for id, v := range d.ids {
		out[v] = append(out[v], id)
	}
	return out
}

// uploading are the images whose bytes are coming in. The zero value has none.
type uploading struct {
	mu     sync.Mutex
	images map[string]bool
}

// take claims an image; false if somebody has it.
func (u *uploading) take(image string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.images[image] {
		return false
	}
	if u.images == nil {
		u.images = map[string]bool{}
	}
	u.images[image] = true
	return true
}

func (u *uploading) give(image string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.images, image)
}
