package plan

import (
	"bytes"
	"encoding/json"
	"reflect"
)

// write adds a record to write if it differs from what is there. It tells whether it does.
func (p *planner) write(w Write, was any) bool {
	if w.Was != 0 && same(w.Value, was) {
		return false
	}
	p.out.Writes = append(p.out.Writes, w)
	return true
}

// same tells whether two records are the same once they are written down.
func same(a, b any) bool {
	if reflect.DeepEqual(a, b) {
		return true
	}
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}
