package dataplane

import (
	"context"
	"errors"
	"io/fs"

	"ashlar/internal/block"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
	"ashlar/internal/disk"
	"ashlar/internal/export"
	"ashlar/internal/export/blockdev"
	"ashlar/internal/image"
	"ashlar/internal/job"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
	"ashlar/internal/replica/remote"
	"ashlar/internal/volume"
)

// wireErrors is the one table from the data path's sentinels to the wire's. The first row that matches wins: what says more stands above what it wraps.
func wireErrors() []struct{ from, to error } {
	return []struct{ from, to error }{
		{volume.ErrNeedsSalvage, client.ErrSalvage},
		{layer.ErrSalvage, client.ErrSalvage},
		{volume.ErrStaleCatalogue, client.ErrStaleCatalogue},
		{replica.ErrStale, client.ErrStaleCatalogue},
		{volume.ErrUnreachable, client.ErrUnreachable},
		{remote.ErrAway, client.ErrUnreachable},
		{remote.ErrUnknown, client.ErrNotFound},
		{remote.ErrBusy, client.ErrInUse},
		{remote.ErrVersion, client.ErrVersion},
		{errNoPeer, client.ErrUnreachable},
		{volume.ErrNoRecord, client.ErrNotFound},
		{replica.ErrNotBelow, client.ErrInvalid},
		{replica.ErrPruned, client.ErrNotFound},
		{volume.ErrExists, client.ErrExists},
		{volume.ErrRemoved, client.ErrInvalid},
		{volume.ErrInvalid, client.ErrInvalid},
		{volume.ErrSeveral, client.ErrInvalid},
		{volume.ErrLost, client.ErrFailed},
		{volume.ErrConflict, client.ErrConflict},
		{volume.ErrPending, client.ErrConflict},
		{volume.ErrStaleReplica, client.ErrFailed},
		{volume.ErrNoMember, client.ErrFailed},
		{replica.ErrRestarted, client.ErrFailed},
		{replica.ErrNoSnapshot, client.ErrNotFound},
		{replica.ErrChain, client.ErrCorrupt},
		{layer.ErrVersion, client.ErrVersion},
		{local.ErrVersion, client.ErrVersion},
		{local.ErrInvalid, client.ErrInvalid},
		{job.ErrSpec, client.ErrInvalid},
		{blockdev.ErrBusy, client.ErrInUse},
		{blockdev.ErrName, client.ErrInvalid},
		{blockdev.ErrExists, client.ErrExists},
		{blockdev.ErrUnsupported, client.ErrInvalid},
		{blockdev.ErrClosed, client.ErrUnreachable},
		{export.ErrName, client.ErrInvalid},
		{export.ErrPathTooLong, client.ErrInvalid},
		{export.ErrInUse, client.ErrInUse},
		{export.ErrExists, client.ErrExists},
		{export.ErrClosed, client.ErrUnreachable},
		{image.ErrChecksum, client.ErrChecksum},
		{image.ErrFormat, client.ErrFormat},
		{image.ErrUnsupported, client.ErrFormat},
		{image.ErrTooLarge, client.ErrFormat},
		{image.ErrSource, client.ErrSource},
		{image.ErrStalled, client.ErrSource},
		{image.ErrTruncated, client.ErrSource},
		{block.ErrNoSpace, client.ErrNoSpace},
		{disk.ErrNoSpace, client.ErrNoSpace},
		{disk.ErrTooLarge, client.ErrInvalid},
		{disk.ErrLocked, client.ErrInUse},
		{hold.ErrRunning, client.ErrInUse},
		{block.ErrCorrupt, client.ErrCorrupt},
		{disk.ErrNoRecord, client.ErrCorrupt},
		{block.ErrFenced, client.ErrFenced},
		{block.ErrFailed, client.ErrFailed},
		{block.ErrRange, client.ErrInvalid},
		{block.ErrAlign, client.ErrInvalid},
		{block.ErrClosed, client.ErrConflict},
		{fs.ErrNotExist, client.ErrNotFound},
		{fs.ErrExist, client.ErrExists},
		{fs.ErrPermission, client.ErrInvalid},
		{context.Canceled, client.ErrCancelled},
		{context.DeadlineExceeded, client.ErrCancelled},
	}
}

// wireError lets errors.Is find the wire's sentinel in an error of the data path, and leaves its text alone.
type wireError struct {
	err, sentinel error
}

func (e *wireError) Error() string   { return e.err.Error() }
func (e *wireError) Unwrap() []error { return []error{e.sentinel, e.err} }

// forWire marks err with the wire's sentinel, unless it has one already.
func forWire(err error) error {
	if err == nil || client.CodeOf(err) != client.CodeInternal && client.CodeOf(err) != client.CodeCancelled {
		return err
	}
	for _, row := range wireErrors() {
		if errors.Is(err, row.from) {
			return &wireError{err: err, sentinel: row.to}
		}
	}
	return err
}
