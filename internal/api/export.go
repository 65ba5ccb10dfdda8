package api

import (
	"cmp"
	"path"
	"slices"
	"strconv"
	"strings"

	"ashlar/internal/catalog"
)

// checkPath wants an absolute path of the node, and a connection over which one may be named: whoever may name a path may read or write any file of the node as a disk,
// and the unix socket's mode says who that is.
func checkPath(c *call, object, p, instead string) error {
	switch {
	case p == "":
		return Failure(CodeInvalid, "%s: the path is missing", object)
	case !path.IsAbs(p) || path.Clean(p) != p || len(p) > 4096 || strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return Failure(CodeInvalid, "%s: path %s must be absolute, without \"..\" and control characters", object, quote(p))
	case !overUnixSocket(c.r) && !isFromNode(c.r):
		return Failure(CodeForbidden, "%s: a path on the node can be named only over the node's unix socket; %s", object, instead)
	}
	return nil
}

type exportInput struct {
	Path     string `json:"path"`     // a new file, absolute, on the node
	Format   string `json:"format"`   // raw (when empty) or qcow2
	Compress string `json:"compress"` // of qcow2: "", zlib, zstd
	Snapshot string `json:"snapshot"` // "": the present
}

// exportFile has the node that has the volume write an image file of it. It returns the operation at once; that says how it goes.
func (h *Handler) exportFile(c *call) (any, error) {
	var in exportInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	if err := checkPath(c, "volume "+quote(c.id), in.Path, "use `ashlar volume export` on the node, or GET …/download"); err != nil {
		return nil, err
	}
	v, err := h.loadVolume(c.r.Context(), c.id)
	if err != nil {
		return nil, err
	}
	if in.Format == "" {
		in.Format = formatRaw
	}
	switch {
	case in.Format != formatRaw && in.Format != formatQcow2:
		return nil, Failure(CodeInvalid, "volume %s: there is no format %s; use raw or qcow2", c.id, quote(in.Format))
	case in.Compress != "" && in.Compress != "zlib" && in.Compress != "zstd":
		return nil, Failure(CodeInvalid, "volume %s: there is no compression %s; use zlib, zstd, or none", c.id, quote(in.Compress))
	case in.Compress != "" && in.Format != formatQcow2:
		return nil, Failure(CodeInvalid, "volume %s: only qcow2 is compressed; export raw and compress the file", c.id)
	}
	if in.Snapshot == headName {
		in.Snapshot = ""
	}
	if err := wantSnapshot(v, in.Snapshot); err != nil {
		return nil, err
	}
	if node := v.nodeOfVolume(); h.elsewhere(c.r, node) {
		return nil, Failure(CodeConflict, "volume %s: node %s has it, and would write the file there; ask that node, or download it: GET …/download", c.id, node)
	}
	op, err := h.operate(c.r.Context(), v, catalog.Operation{
		Verb: catalog.VerbExport, Snapshot: in.Snapshot, Path: in.Path, Format: in.Format, Compress: in.Compress,
	})
	if err != nil {
		return nil, err
	}
	return h.operation(c, op), nil
}

// wantSnapshot wants a snapshot of that name, if one is named; a removed one will do as long as it is there.
func wantSnapshot(v *volumeView, name string) error {
	if name == "" {
		return nil
	}
	_, err := findSnapshot(v, name)
	return err
}

// operation makes the resource.
func (h *Handler) operation(c *call, op catalog.Operation) Operation {
	res := Operation{
		Resource: Resource{ID: op.Volume + "/" + op.ID, Type: "operation", Actions: map[string]string{},
			Links: map[string]string{"self": c.url("operations", op.Volume, op.ID), "volume": c.url("volumes", op.Volume)}},
		Volume: op.Volume, Verb: op.Verb, Snapshot: op.Snapshot, Size: strconv.FormatInt(op.SizeBytes, 10), Path: op.Path, Format: op.Format, Compress: op.Compress,
		State: op.State, Progress: op.Progress, Reason: Code(op.Code), Message: op.Message, Problems: []CheckProblem{}, Created: stamp(op.Created),
	}
	for _, p := range op.Problems {
		res.Problems = append(res.Problems, CheckProblem(p))
	}
	if op.Finished != nil {
		res.Finished = stamp(*op.Finished)
	}
	return res
}

func (h *Handler) operationWays() []way {
	return []way{
		{path: "/{volume}", about: "The operations of one volume.", do: h.operationList, out: Collection[Operation]{}},
		{path: "/{volume}/{id}", about: "One operation.", do: h.operationGet, out: Operation{}},
	}
}

// operationList lists the operations there are, of one volume if one is named, in the order in which they were asked for.
func (h *Handler) operationList(c *call) (any, error) {
	entries, _, err := h.cfg.Catalog.List(c.r.Context(), catalog.KindOperation)
	if err != nil {
		return nil, err
	}
	var ops []catalog.Item[catalog.Operation]
	for _, e := range entries {
		item, err := catalog.Decode[catalog.Operation](e)
		if err != nil {
			h.cfg.Log.Error("unreadable record left out", "error", err)
			continue
		}
		if volume := c.vars["volume"]; volume == "" || volume == item.Value.Volume {
			ops = append(ops, item)
		}
	}
	slices.SortFunc(ops, func(a, b catalog.Item[catalog.Operation]) int {
		return cmp.Or(a.Value.Created.Compare(b.Value.Created), cmp.Compare(a.Key.Name, b.Key.Name))
	})
	data := []Operation{}
	for _, op := range ops {
		data = append(data, h.operation(c, op.Value))
	}
	out := collect(c, c.noun.schema, data)
	if volume := c.vars["volume"]; volume != "" {
		out.Links["self"] = c.url("operations", volume)
	}
	return out, nil
}

func (h *Handler) operationGet(c *call) (any, error) {
	op, ok, err := find[catalog.Operation](c.r.Context(), h.cfg.Catalog, catalog.OperationKey(c.vars["volume"], c.vars["id"]))
	if err == nil && !ok {
		err = Failure(CodeNotFound, "volume %s has no operation %s; done ones are forgotten after an hour", quote(c.vars["volume"]), quote(c.vars["id"]))
	}
	if err != nil {
		return nil, err
	}
	return h.operation(c, op), nil
}

type diffInput struct {
	From string `json:"from"` // the older; "": what is below the oldest
	To   string `json:"to"`   // "": the present
	Off  int64  `json:"off"`  // go on from here
}

// maxDiffRanges bounds one answer; the client goes on at nextOff.
const maxDiffRanges = 16384

// snapshotDiff tells where two snapshots of an attached volume may differ.
func (h *Handler) snapshotDiff(c *call) (any, error) {
	var in diffInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	v, err := h.loadVolume(c.r.Context(), c.id)
	if err != nil {
		return nil, err
	}
	if !v.attached() {
		return nil, Failure(CodeNotAttached, "volume %s is %s; its snapshots can be compared while it is attached: attach it first", c.id, v.state())
	}
	if in.To == headName {
		in.To = ""
	}
	if err := wantSnapshot(v, in.From); err != nil {
		return nil, err
	}
	if err := wantSnapshot(v, in.To); err != nil {
		return nil, err
	}
	switch {
	case in.From == headName:
		return nil, Failure(CodeInvalid, "volume %s: from is the older one, and nothing is younger than the present", c.id)
	case in.Off < 0 || in.Off > v.sizeBytes():
		return nil, Failure(CodeInvalid, "volume %s: off is %d; 0 to %d are allowed", c.id, in.Off, v.sizeBytes())
	}
	what := "the differences of volume " + c.id
	switch node := v.nodeOfVolume(); {
	case h.elsewhere(c.r, node):
		return h.forwardBody(c, node, what, in)
	case h.cfg.Extra == nil:
		return nil, missing("snapshotDiff")
	}
	out := SnapshotDiff{Resource: c.resource(c.id), Volume: c.id, From: in.From, To: in.To, Ranges: []DiffChunk{}}
	out.Type = "snapshotDiff"
	if out.To == "" {
		out.To = headName
	}
	cut := false
	out.NextOff, out.Size, err = h.cfg.Extra.Diff(c.r.Context(), DiffRange{Volume: c.id, From: in.From, To: in.To, Off: in.Off}, func(off, n int64, zero bool) {
		if len(out.Ranges) < maxDiffRanges {
			out.Ranges = append(out.Ranges, DiffChunk{Off: off, N: n, Zero: zero})
			return
		}
		cut = true
	})
	if node := h.nodeOf(err); node != "" {
		return h.forwardBody(c, node, what, in)
	}
	if err != nil {
		return nil, err
	}
	if cut {
		last := out.Ranges[len(out.Ranges)-1]
		out.NextOff = last.Off + last.N
	}
	return out, nil
}
