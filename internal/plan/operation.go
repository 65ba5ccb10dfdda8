package plan

import (
	"slices"
	"strings"

	"ashlar/internal/catalog"
)

// splitOperation takes VOLUME/ID apart.
func splitOperation(name string) (volume, id string) {
	volume, id, _ = strings.Cut(name, "/")
	return volume, id
}

func ended(op catalog.Operation) bool {
	return op.State == catalog.OperationDone || op.State == catalog.OperationFailed
}

// oldOperations deletes what ended an hour ago, and what belongs to no volume that is there.
func oldOperations(in ClusterInput) []Write {
	var out []Write
	for _, volume := range sorted(in.View.Operations) {
		w := in.View.Volumes[volume].Wanted
		for _, id := range sorted(in.View.Operations[volume]) {
			op := in.View.Operations[volume][id]
			over := ended(op.Value) && op.Value.Finished != nil && in.Now.Sub(*op.Value.Finished) >= keepOperations
			if over || !w.Is() || w.Value.ID != op.Value.VolumeID {
				out = append(out, Write{Key: catalog.OperationKey(volume, id), Was: op.Rev})
			}
		}
	}
	return out
}

// isExport and isNoExport tell the two queues of a volume's operations apart: an export takes long and stands in nobody's way.
func isExport(op catalog.Operation) bool   { return op.Verb == catalog.VerbExport }
func isNoExport(op catalog.Operation) bool { return op.Verb != catalog.VerbExport }

// next is the operation of a volume's queue that is to be done now: the one that runs, else the first that was put.
func (v *View) next(volume, volumeID string, queue func(catalog.Operation) bool) (Half[catalog.Operation], bool) {
	if len(v.Operations[volume]) == 0 {
		return Half[catalog.Operation]{}, false
	}
	var todo []Half[catalog.Operation]
	for _, op := range v.Operations[volume] {
		if op.Value.VolumeID == volumeID && !ended(op.Value) && queue(op.Value) {
			todo = append(todo, op)
		}
	}
	if len(todo) == 0 {
		return Half[catalog.Operation]{}, false
	}
	return slices.MinFunc(todo, func(a, b Half[catalog.Operation]) int {
		if ra, rb := a.Value.State == catalog.OperationRunning, b.Value.State == catalog.OperationRunning; ra != rb {
			if ra {
				return -1
			}
			return 1
		}
		return int(a.Rev - b.Rev) // of a pending one: when it was put
	}), true
}

// Result is how an operation ended that the agent carried out and has not recorded yet.
type Result struct {
	Code     string // "": done
	Message  string
	Problems []catalog.Problem
}

// finish is the record of an operation that ended.
func finish(op catalog.Operation, r Result, in NodeInput) catalog.Operation {
	now := in.Now.UTC()
	op.State, op.Finished, op.Code, op.Message, op.Problems = catalog.OperationDone, &now, r.Code, r.Message, r.Problems
	if r.Code != "" {
		op.State = catalog.OperationFailed
	} else {
		op.Progress = 100
	}
	return op
}
