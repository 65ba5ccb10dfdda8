package nbd

import (
	"errors"
	"fmt"

	"ashlar/internal/block"
)

// Errno is an error value of the NBD protocol, in a reply to a request.
type Errno uint32

// The protocol's error values.
const (
	OK        Errno = 0
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// errnoTable maps a Device's failures out. The first match counts; what is not here is EIO. A write beyond the end is ENOSPC, as the
// protocol asks: see errnoOf.
var errnoTable = []struct {
	err   error
	errno Errno
}{
	{block.ErrNoSpace, ENOSPC},
	{block.ErrReadOnly, EPERM},
	{block.ErrRange, EINVAL},
	{block.ErrAlign, EINVAL},
	{block.ErrClosed, ESHUTDOWN},
	{block.ErrFenced, ESHUTDOWN},
	{block.ErrFailed, EIO},
	{block.ErrCorrupt, EIO},
}

// errnoFor is errnoOf, unless the export has a name of its own for err.
func (c *conn) errnoFor(err error, cmd uint16) Errno {
	if err != nil && c.errno != nil {
		if e := c.errno(err); e != OK {
			return e
		}
	}
	return errnoOf(err, cmd)
}

// errnoOf returns the error value for err, which a Device returned to the command cmd.
func errnoOf(err error, cmd uint16) Errno {
	if err == nil {
		return OK
	}
	for _, row := range errnoTable {
		if !errors.Is(err, row.err) {
			continue
		}
		if row.err == block.ErrRange {
			return rangeErrno(cmd)
		}
		return row.errno
	}
	return EIO
}

// rangeErrno is the answer to a request that does not lie within the export.
func rangeErrno(cmd uint16) Errno {
	if cmd == cmdWrite || cmd == cmdWriteZeroes {
		return ENOSPC
	}
	return EINVAL
}

// text is what a structured error carries for a human to read. It never holds a Device's own words: they may name paths of this host.
func (e Errno) text() string {
	switch e {
	case EPERM:
		return "the export is read-only"
	case EINVAL:
		return "invalid request: range, alignment, flags or command"
	case ENOSPC:
		return "no space left on the disk, or beyond the end of the export"
	case EOVERFLOW:
		return "request larger than the maximum payload"
	case ENOTSUP:
		return "zeroing is not fast here"
	case ESHUTDOWN:
		return "the volume was closed or another host took it over"
	}
	return "input/output error"
}

// Error names e. A Client's errors contain the Errno that the server sent.
func (e Errno) Error() string { return fmt.Sprintf("NBD error %d", uint32(e)) }

// remoteTable maps a server's errors back. What is not here is no sentinel of block's: the reason is not known. EINVAL in particular may mean
// anything: what is out of range is refused before it is sent.
var remoteTable = map[Errno]error{
	ENOSPC:    block.ErrNoSpace,
	ESHUTDOWN: ErrServerClosed,
}

// remoteError is the error for errno, which a server answered to the command cmd with a text for people.
func remoteError(errno Errno, text string, cmd uint16) error {
	if errno == OK {
		return nil
	}
	sentinel := remoteTable[errno]
	if errno == EPERM && cmd != cmdRead && cmd != cmdBlockStatus {
		sentinel = block.ErrReadOnly
	}
	err := error(errno)
	if sentinel != nil {
		err = fmt.Errorf("%w (%w)", sentinel, errno)
	}
	if text != "" {
		err = fmt.Errorf("%w, the server says: %q", err, text)
	}
	return err
}
