package api

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"ashlar/internal/catalog"
)

// operate asks for something to be done once to a volume: it makes the operation's record and returns it without waiting. What the record asks for happens
// even if this process ends now.
func (h *Handler) operate(ctx context.Context, v *volumeView, op catalog.Operation) (catalog.Operation, error) {
	if v.wanted.Deleted != nil {
		return op, Failure(CodeConflict, "volume %s is being deleted", v.wanted.Name)
	}
	if op.ID == "" {
		id, err := h.newID()
		if err != nil {
			return op, err
		}
		op.ID = id
	}
	op.Volume, op.VolumeID, op.State, op.Created = v.wanted.Name, v.wanted.ID, catalog.OperationPending, h.cfg.Now().UTC()
	_, err := catalog.Write(ctx, h.cfg.Catalog, catalog.OperationKey(op.Volume, op.ID), op, 0)
	return op, err
}

// operateAndWait is operate, and then waits for the end: for Config.OperationTimeout at most, a check for as long as the client does. A failure of the operation
// comes back with its code.
func (h *Handler) operateAndWait(ctx context.Context, v *volumeView, op catalog.Operation) (catalog.Operation, error) {
	op, err := h.operate(ctx, v, op)
	if err != nil {
		return op, err
	}
	if op.Verb != catalog.VerbCheck {
		short, cancel := context.WithTimeout(ctx, h.cfg.OperationTimeout)
		defer cancel()
		ctx = short
	}
	err = await(ctx, h.cfg.Catalog, catalog.OperationKey(op.Volume, op.ID), func(e catalog.Entry) (bool, error) {
		if e.Value == nil {
			return false, Failure(CodeNotFound, "volume %s was deleted before its %s was done", op.Volume, op.Verb)
		}
		item, err := catalog.Decode[catalog.Operation](e)
		op = item.Value
		return op.State == catalog.OperationDone || op.State == catalog.OperationFailed, err
	})
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return op, Because(err, CodeTimeout, "volume %s: %s is still %s after %v; it goes on, look again later (operation %s)",
			op.Volume, op.Verb, op.State, h.cfg.OperationTimeout, op.ID)
	case err != nil:
		return op, err
	case op.State == catalog.OperationFailed:
		return op, failedOperation(op)
	}
	return op, nil
}

// failedOperation gives a failed operation's code back as an error. Code.status is the table from there to HTTP.
func failedOperation(op catalog.Operation) error {
	code, message := Code(op.Code), op.Message
	if code == "" {
		code = CodeInternal
	}
	if message == "" {
		message = "failed (" + string(code) + ")"
	}
	if !strings.HasPrefix(message, op.Verb) {
		message = op.Verb + ": " + message
	}
	return Failure(code, "volume %s: %s", op.Volume, message)
}

type expandInput struct {
	Size string `json:"size"`
}

// expand makes a volume larger, attached or not. The size it has already is no error.
func (h *Handler) expand(c *call) (any, error) {
	var in expandInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	ctx := c.r.Context()
	v, err := h.loadVolume(ctx, c.id)
	if err != nil {
		return nil, err
	}
	n, err := ParseSize(in.Size)
	if err != nil {
		return nil, Because(err, CodeInvalid, "volume %s: %v", c.id, err)
	}
	n = RoundSize(n)
	switch {
	case n < v.sizeBytes():
		return nil, Failure(CodeInvalid, "volume %s has %s and cannot shrink to %s", c.id, FormatSize(v.sizeBytes()), FormatSize(n))
	case v.state() == catalog.VolumeCreating:
		return nil, Failure(CodeConflict, "volume %s is still being created; try again in a moment", c.id)
	case v.observed.Robustness == catalog.RobustnessFaulted:
		return nil, Failure(CodeSalvage, "volume %s is faulted; salvage it first", c.id)
	}
	if n > v.sizeBytes() {
		if _, err := h.operateAndWait(ctx, v, catalog.Operation{Verb: catalog.VerbExpand, SizeBytes: n}); err != nil {
			return nil, err
		}
	}
	// The record of what is wanted follows what is so: an expansion that failed (no space) must not be wanted for ever.
	_, _, err = catalog.Update(ctx, h.cfg.Catalog, catalog.VolumeKey(catalog.Wanted, c.id), func(w *catalog.VolumeWanted) error {
		if w.ID == v.wanted.ID {
			w.SizeBytes = max(w.SizeBytes, n)
		}
		return nil
	})
	if err != nil {
		return nil, h.gone(c, err)
	}
	return h.volumeGet(c)
}

// check reads all metadata of a volume's copies and reports what is wrong with it; that problems were found is no error of the check.
func (h *Handler) check(c *call) (any, error) {
	if err := c.body(&struct{}{}); err != nil {
		return nil, err
	}
	v, err := h.loadVolume(c.r.Context(), c.id)
	if err != nil {
		return nil, err
	}
	op, err := h.operateAndWait(c.r.Context(), v, catalog.Operation{Verb: catalog.VerbCheck})
	if err != nil {
		return nil, err
	}
	report := CheckReport{Resource: c.resource(c.id), Volume: c.id, Problems: []CheckProblem{}}
	report.Type = "checkReport"
	for _, p := range op.Problems {
		report.Problems = append(report.Problems, CheckProblem(p))
	}
	return report, nil
}

// headName is the pseudo snapshot that stands for the present.
const headName = "volume-head"

// snapshotName makes a name for a snapshot that was given none: when, and something that makes it unique.
func (h *Handler) snapshotName(id string) string {
	return fmt.Sprintf("%s-%s", h.cfg.Now().UTC().Format("20060102-150405"), id[:6])
}

// snapshot makes the resource.
func (h *Handler) snapshot(c *call, s catalog.SnapshotObserved) Snapshot {
	res := c.resource(c.id)
	res.ID, res.Type = s.Name, "snapshot"
	out := Snapshot{
		Resource: res, Name: s.Name, Parent: s.Parent, Children: map[string]bool{}, Removed: s.Removed, UserCreated: s.UserCreated,
		Created: stamp(s.Created), Size: strconv.FormatInt(s.SizeBytes, 10), Labels: map[string]string{}, Checksum: s.Checksum,
		Space: space(s.Space),
	}
	for _, child := range s.Children {
		out.Children[child] = true
	}
	for k, v := range s.Labels {
		out.Labels[k] = v
	}
	return out
}

// snapshotCR makes the other resource of the same thing.
func (h *Handler) snapshotCR(c *call, v *volumeView, s catalog.SnapshotObserved) SnapshotCR {
	plain := h.snapshot(c, s)
	plain.Type = "snapshotCR"
	return SnapshotCR{
		Resource: plain.Resource, Name: s.Name, Volume: v.wanted.Name, CreationTime: plain.Created, CRCreationTime: plain.Created, Parent: s.Parent,
		Children: plain.Children, MarkRemoved: s.Removed, ReadyToUse: !s.Removed, UserCreated: s.UserCreated, Size: s.SizeBytes,
		RestoreSize: v.sizeBytes(), Labels: plain.Labels, Checksum: s.Checksum, Space: plain.Space,
	}
}
