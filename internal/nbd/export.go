package nbd

import (
	"errors"

	"ashlar/internal/block"
)

// ErrNoExport: there is no export of that name.
var ErrNoExport = errors.New("no such export")

// Export is a Device offered to clients.
type Export struct {
	// Name is the canonical name, at most 4096 bytes.
	Name string
	// Description is for people, at most 4096 bytes.
	Description string
	// Device takes the I/O, from many goroutines at once. It should accept any alignment, because many clients do not ask for
	// block sizes. The server never closes it.
	Device block.Device
	// ReadOnly refuses every command that writes with EPERM.
	ReadOnly bool
	// MayWait, if not nil, tells whether the Device may hold the next request back for other reasons than its medium (a rate, say): then a worker takes the request,
	// and those behind it on the connection go on. It is asked before each request, concurrently, and must be quick.
	MayWait func() bool
	// Far says that every call goes to another machine, and waits for as long as that is away: a worker takes each request, as if MayWait always said yes, unless the
	// client sends one at a time; there is nobody to be held up then, and whoever comes all the same would wait for the same machine.
	Far bool
	// FastZero says that Zero of any range costs much less than writing it. Only then are zeroes that a client wants fast or not at all
	// carried out; else they are refused with ENOTSUP, as the protocol asks.
	FastZero bool
	// States offers the context ashlar:layer, which tells Absent from Zero (docs/nbd.md, section 4).
	States bool
	// Errno, if not nil, names a Device's error for a client that knows more errors than the protocol has; OK leaves it to the protocol's own.
	Errno func(error) Errno
}

// Exports is where a Server finds what it serves. Both methods may be called concurrently.
type Exports interface {
	// Lookup returns the export that a client asks for by name; the empty name asks for the default one. An error that is not
	// ErrNoExport is told to the client as "unknown" all the same.
	Lookup(name string) (Export, error)
	// List returns what a client that asks for a list sees; only Name and Description are used.
	List() []Export
}

// Single is an Exports of one export, which is the default too.
type Single Export

// Lookup returns the export for its name and for the empty name.
func (s Single) Lookup(name string) (Export, error) {
	if name != "" && name != s.Name {
		return Export{}, ErrNoExport
	}
	return Export(s), nil
}

// List returns the export.
func (s Single) List() []Export { return []Export{Export(s)} }

// transmissionFlags are what a client is told about e.
func (e Export) transmissionFlags(structured bool) uint16 {
	// MULTI_CONN: Flush covers everything that returned before on the Device, whichever connection it came by.
	flags := uint16(flagHasFlags | flagFlush | flagFUA | flagMultiConn | flagCache)
	if e.ReadOnly {
		flags |= flagReadOnly
	} else {
		flags |= flagTrim | flagWriteZeroes | flagFastZero
	}
	if structured {
		flags |= flagDF
	}
	return flags
}
