package layer

import (
	"context"
	"errors"
	"io"

	"ashlar/internal/disk"
)

// This file is the exported surface before its parts are built; each declaration moves to its own file as it is.

var errNotBuilt = errors.New("not built yet")

// Problem is something Check found.
type Problem struct {
	Name string `json:"name"`           // the file
	Unit int64  `json:"unit,omitempty"` // where, if it is about units
	N    int64  `json:"n,omitempty"`
	Text string `json:"text"`
}

// Check looks deeply at layer files, head first if they form a stack, and changes nothing. The error is for what kept it from looking.
func Check(ctx context.Context, fsys disk.FS, names []string) ([]Problem, error) {
	return nil, errNotBuilt
}

// DumpOptions say what Dump prints.
type DumpOptions struct {
	JSON bool // one JSON document instead of text
	Map  bool // also every run of the map
	Log  bool // also every record of the log
}

// Dump prints what a layer file holds. It changes nothing and goes on past damage, which it prints.
func Dump(w io.Writer, fsys disk.FS, name string, o DumpOptions) error { return errNotBuilt }
