// Package layer keeps units on a disk. A Layer is one sparse file: units at fixed places, a map of two bits a unit, and a log that makes
// first writes survive a crash (docs/formats/layer.md, which is normative). A Stack is layers over each other, read as one block.Device; its top may be a
// head, which takes writes of whole units.
//
// The way of a write: Stack.WriteAt (write.go) looks the unit up in the map in memory (table.go, region.go); a covered unit is
// overwritten in place; anything else goes through the head's log (log.go, record.go), which a flush makes durable and a checkpoint
// folds into the map on disk (writer.go). recover.go is what opening does after a crash. seal.go, prune.go and merge.go are the life
// of a layer after it was head; sums.go finds rot; check.go and dump.go look at files from outside.
//
// Read next: docs/formats/layer.md section 5, then write.go.
package layer
