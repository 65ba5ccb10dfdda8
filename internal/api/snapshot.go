package api

import (
	"errors"

	"ashlar/internal/catalog"
)

type snapshotInput struct {
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels"`
}

// snapshotCall is what every verb of snapshots begins with: the body, and the volume, which must be attached because only an open volume knows its snapshots
// as they are.
func (h *Handler) snapshotCall(c *call) (snapshotInput, *volumeView, error) {
	var in snapshotInput
	if err := c.body(&in); err != nil {
		return in, nil, err
	}
	v, err := h.loadVolume(c.r.Context(), c.id)
	if err != nil {
		return in, nil, err
	}
	if !v.attached() {
		return in, nil, Failure(CodeNotAttached, "volume %s is %s; its snapshots can be used while it is attached: attach it first", c.id, v.state())
	}
	return in, v, nil
}

// findSnapshot finds a snapshot by name; removed ones and volume-head count.
func findSnapshot(v *volumeView, name string) (catalog.SnapshotObserved, error) {
	for _, s := range v.observed.Snapshots {
		if s.Name == name {
			return s, nil
		}
	}
	if name == "" {
		return catalog.SnapshotObserved{}, Failure(CodeInvalid, "volume %s: the snapshot's name is missing", v.wanted.Name)
	}
	return catalog.SnapshotObserved{}, Failure(CodeNotFound, "volume %s has no snapshot %s", v.wanted.Name, quote(name))
}

// takeSnapshot makes a snapshot and returns it as it then is.
func (h *Handler) takeSnapshot(c *call) (catalog.SnapshotObserved, *volumeView, error) {
	none := catalog.SnapshotObserved{}
	in, v, err := h.snapshotCall(c)
	if err != nil {
		return none, nil, err
	}
	id, err := h.newID()
	if err != nil {
		return none, nil, err
	}
	if in.Name == "" {
		in.Name = h.snapshotName(id)
	}
	if err := errors.Join(checkSnapshotName(in.Name), checkLabels(in.Labels)); err != nil {
		return none, nil, err
	}
	if _, err := findSnapshot(v, in.Name); err == nil {
		return none, nil, Failure(CodeExists, "volume %s has a snapshot %s already; choose another name", c.id, in.Name)
	}
	op := catalog.Operation{ID: id, Verb: catalog.VerbSnapshot, Snapshot: in.Name, Labels: in.Labels}
	if _, err := h.operateAndWait(c.r.Context(), v, op); err != nil {
		return none, nil, err
	}
	// The observed record shows the effect before the operation is done.
	if v, err = h.loadVolume(c.r.Context(), c.id); err != nil {
		return none, nil, err
	}
	s, err := findSnapshot(v, in.Name)
	return s, v, err
}

func (h *Handler) snapshotCreate(c *call) (any, error) {
	s, _, err := h.takeSnapshot(c)
	if err != nil {
		return nil, err
	}
	return h.snapshot(c, s), nil
}

func (h *Handler) snapshotCRCreate(c *call) (any, error) {
	s, v, err := h.takeSnapshot(c)
	if err != nil {
		return nil, err
	}
	return h.snapshotCR(c, v, s), nil
}

func (h *Handler) snapshotList(c *call) (any, error) {
	_, v, err := h.snapshotCall(c)
	if err != nil {
		return nil, err
	}
	var data []Snapshot
	for _, s := range v.observed.Snapshots {
		data = append(data, h.snapshot(c, s))
	}
	return collect(c, "snapshot", data), nil
}

// snapshotCRList works on a detached volume too: it shows the snapshots as they were when the volume was last open, which is as they are.
func (h *Handler) snapshotCRList(c *call) (any, error) {
	if err := c.body(&snapshotInput{}); err != nil {
		return nil, err
	}
	v, err := h.loadVolume(c.r.Context(), c.id)
	if err != nil {
		return nil, err
	}
	var data []SnapshotCR
	for _, s := range v.observed.Snapshots {
		if s.Name != headName {
			data = append(data, h.snapshotCR(c, v, s))
		}
	}
	return collect(c, "snapshotCR", data), nil
}

func (h *Handler) snapshotGet(c *call) (any, error) {
	in, v, err := h.snapshotCall(c)
	if err != nil {
		return nil, err
	}
	s, err := findSnapshot(v, in.Name)
	if err != nil {
		return nil, err
	}
	return h.snapshot(c, s), nil
}

func (h *Handler) snapshotCRGet(c *call) (any, error) {
	var in snapshotInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	v, err := h.loadVolume(c.r.Context(), c.id)
	if err != nil {
		return nil, err
	}
	s, err := findSnapshot(v, in.Name)
	if err != nil {
		return nil, err
	}
	if s.Name == headName {
		return nil, Failure(CodeNotFound, "volume %s: %s is the present, not a snapshot", c.id, headName)
	}
	return h.snapshotCR(c, v, s), nil
}

// removeSnapshot marks a snapshot removed. Its space returns with the next purge.
func (h *Handler) removeSnapshot(c *call) (*volumeView, error) {
	in, v, err := h.snapshotCall(c)
	if err != nil {
		return nil, err
	}
	s, err := findSnapshot(v, in.Name)
	if err != nil {
		return nil, err
	}
	if s.Name == headName {
		return nil, Failure(CodeInvalid, "volume %s: %s is the present and cannot be deleted", c.id, headName)
	}
	if !s.Removed {
		_, err = h.operateAndWait(c.r.Context(), v, catalog.Operation{Verb: catalog.VerbSnapshotRemove, Snapshot: s.Name})
	}
	return v, err
}

func (h *Handler) snapshotDelete(c *call) (any, error) {
	if _, err := h.removeSnapshot(c); err != nil {
		return nil, err
	}
	return h.volumeGet(c)
}

// snapshotCRDelete marks and purges, as deleting the object does in the dialect; the purge goes on after the answer.
func (h *Handler) snapshotCRDelete(c *call) (any, error) {
	v, err := h.removeSnapshot(c)
	if err == nil {
		err = h.purge(c, v)
	}
	if err != nil {
		return nil, err
	}
	return struct{}{}, nil
}

// snapshotRevert makes a snapshot's content the present. Nobody may be using the volume: it has to be attached with its frontend disabled.
func (h *Handler) snapshotRevert(c *call) (any, error) {
	in, v, err := h.snapshotCall(c)
	if err != nil {
		return nil, err
	}
	s, err := findSnapshot(v, in.Name)
	if err != nil {
		return nil, err
	}
	switch {
	case s.Name == headName:
		return nil, Failure(CodeInvalid, "volume %s: %s is the present; there is nothing to revert to", c.id, headName)
	case s.Removed:
		return nil, Failure(CodeConflict, "volume %s: snapshot %s is marked removed and cannot be reverted to", c.id, s.Name)
	}
	for _, t := range v.wanted.Tickets {
		if !t.DisableFrontend {
			return nil, Failure(CodeFrontend, "volume %s: its frontend is enabled, and a guest may be using it; "+
				"stop the guest, detach the volume, attach it with disableFrontend, then revert", c.id)
		}
	}
	_, err = h.operateAndWait(c.r.Context(), v, catalog.Operation{Verb: catalog.VerbRevert, Snapshot: s.Name})
	return nil, err
}

// snapshotPurge begins to free what removed snapshots hold and answers at once; purgeStatus tells how it goes.
func (h *Handler) snapshotPurge(c *call) (any, error) {
	_, v, err := h.snapshotCall(c)
	if err != nil {
		return nil, err
	}
	if err := h.purge(c, v); err != nil {
		return nil, err
	}
	return h.volumeGet(c)
}

// purge asks for a purge unless one is already waiting to begin; one that runs may have passed what was just removed.
func (h *Handler) purge(c *call, v *volumeView) error {
	if v.purge != nil && v.purge.State == catalog.OperationPending {
		return nil
	}
	_, err := h.operate(c.r.Context(), v, catalog.Operation{Verb: catalog.VerbPurge})
	return err
}
