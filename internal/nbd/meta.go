package nbd

import (
	"strings"

	"ashlar/internal/block"
)

// metaContext is one kind of metadata that BLOCK_STATUS reports. Contexts of our own are further rows of metaContexts.
type metaContext struct {
	id   uint32 // on the wire; unique, and never 0
	name string // namespace:leaf
	// flags is what the context says of a run of bytes.
	flags func(block.State) uint32
}

// The flags of base:allocation.
const (
	stateHole = 1 << 0
	stateZero = 1 << 1
)

// metaContexts are all contexts an export can have; layerContext only where Export.States says so.
var metaContexts = []metaContext{
	{id: 1, name: allocation, flags: allocationFlags},
	{id: 2, name: layerContext, flags: layerFlags},
}

// layerContext tells the three states of block apart.
const layerContext = "ashlar:layer"

// The flags of ashlar:layer; none is Data.
const (
	layerZero   = 1 << 0
	layerAbsent = 1 << 1
)

func layerFlags(s block.State) uint32 {
	switch s {
	case block.Zero:
		return layerZero
	case block.Absent:
		return layerAbsent
	}
	return 0
}

// layerState is the inverse of layerFlags. What is not known is Data, which is read.
func layerState(flags uint32) block.State {
	switch flags {
	case layerZero:
		return block.Zero
	case layerAbsent:
		return block.Absent
	}
	return block.Data
}

// allocationState is what a client makes of base:allocation: what reads as zero is Zero.
func allocationState(flags uint32) block.State {
	if flags&stateZero != 0 {
		return block.Zero
	}
	return block.Data
}

// allocationFlags: below an export there is nothing, so Absent reads as zero just as Zero does.
func allocationFlags(s block.State) uint32 {
	if s == block.Data {
		return 0
	}
	return stateHole | stateZero
}

// metaByID finds the context that a state names.
func metaByID(id uint32) (metaContext, bool) {
	for _, m := range metaContexts {
		if m.id == id {
			return m, true
		}
	}
	return metaContext{}, false
}

// matchMeta returns the contexts that queries select, each once, in the table's order. A query with an empty leaf ("base:") names
// every context of its namespace when listing and none when selecting, and without queries all are listed and none is selected.
func (e Export) matchMeta(queries []string, listing bool) []metaContext {
	var out []metaContext
	for _, m := range metaContexts {
		if m.name == layerContext && !e.States {
			continue
		}
		namespace, _, _ := strings.Cut(m.name, ":")
		match := listing && len(queries) == 0
		for _, q := range queries {
			match = match || q == m.name || (listing && q == namespace+":")
		}
		if match {
			out = append(out, m)
		}
	}
	return out
}
