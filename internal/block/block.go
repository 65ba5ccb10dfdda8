// Package block says what a disk is to Ashlar: a Device, and the few things that are done to every
// Device without knowing which one it is: hold it (Gate), copy it (Copy), and name its failures (the sentinels).
//
// A golden image, a layer, a replica, a volume and a socket's export are all Devices, and everything done to
// bytes on the way is a Device around a Device. The package imports nothing of ours.
//
// Read next: blocktest (the contract as a test suite), blockfault (devices that misbehave on request),
// layer (the Device that keeps bytes on a disk).
package block

import (
	"errors"
	"io"
)

// UnitBytes is the size of a unit: the smallest run of a disk that has a state of its own.
const UnitBytes = 4096

// Device is anything that holds guest bytes.
//
// Every method may be called concurrently. A read or write that succeeds is whole. A nil error from WriteAt
// promises nothing about a power cut; a nil error from Flush promises that everything which returned before Flush
// was called survives one. After an error each unit of the range is old or new. There is no context: the owner
// gives up on a device by closing it, and then later calls return ErrClosed; Close never waits for a call that is
// stuck in the kernel, and such a call keeps its buffer until it returns.
//
// Offsets and lengths are bytes. A range that does not lie within [0, Size) is refused with ErrRange before
// anything is changed: ReadAt never returns io.EOF and never a short count without an error. A length of zero is a
// successful no-op. A Device may require that writes and zeroes are multiples of UnitBytes (its constructor says so) and
// then refuses others with ErrAlign; reads are accepted at any offset.
type Device interface {
	io.ReaderAt
	io.WriterAt
	// Zero makes [off, off+n) read as zero. It may free the space, and never shows what lies below.
	Zero(off, n int64) error
	// Flush returns once everything that returned before it was called survives a power cut.
	// After a Flush failed, no later Flush on the same Device succeeds (ErrFailed): what was lost is not known.
	Flush() error
	// Extents describes the bytes from off on: contiguous, at least one extent when n > 0, clipped to
	// [off, off+n); it may stop short of off+n.
	Extents(off, n int64) ([]Extent, error)
	// Size is constant while the device is open; a Gate swaps devices to resize.
	Size() int64
	io.Closer
}

// State says what a run of bytes is.
type State uint8

const (
	// Absent bytes are held nowhere in this device: what is below shows, and with nothing below they read as zero.
	Absent State = iota
	// Zero bytes read as zero and hide what is below.
	Zero
	// Data bytes are stored.
	Data
)

// String returns the glossary's word for s.
func (s State) String() string {
	switch s {
	case Absent:
		return "absent"
	case Zero:
		return "zero"
	case Data:
		return "data"
	}
	return "invalid"
}

// Extent is a run of bytes of one State.
type Extent struct {
	Off, N int64
	State  State
}

// The ways a Device fails, as values; everything else is an error from below, wrapped. Each boundary (NBD errno,
// HTTP status, the data process's wire) has one table that maps them out and, where the far side is ours, back.
var (
	// ErrRange: the range does not lie within the device. Nothing was changed.
	ErrRange = errors.New("out of range")
	// ErrAlign: the device takes whole units only. Nothing was changed.
	ErrAlign = errors.New("not aligned to 4096 bytes")
	// ErrReadOnly: the device takes no writes. Nothing was changed.
	ErrReadOnly = errors.New("read-only")
	// ErrClosed: the device was closed.
	ErrClosed = errors.New("closed")
	// ErrNoSpace: the disk underneath is full. Each unit of the range is old or new; flushed data is safe, and
	// reads, flushes and overwrites of existing data go on.
	ErrNoSpace = errors.New("no space left on disk")
	// ErrCorrupt: stored bytes do not match their checksum or their format. They are never returned as data.
	ErrCorrupt = errors.New("corrupt")
	// ErrFenced: a newer writer (higher epoch or session) owns this device; this one will never succeed again.
	ErrFenced = errors.New("fenced by a newer writer")
	// ErrFailed: a flush or write-back failed before; the device stays failed until it is opened again.
	ErrFailed = errors.New("failed, must be reopened")
)

// CheckRange returns ErrRange unless [off, off+n) lies within [0, size).
func CheckRange(off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return ErrRange
	}
	return nil
}
