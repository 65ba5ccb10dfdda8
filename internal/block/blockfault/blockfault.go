// Package blockfault is Devices that misbehave on request, around Devices that do not: fail (Error), wait (Delay, Pause), remember (Record),
// and compare (Twin, Compare). They are for tests, and for finding faults in the field.
//
// All are safe for concurrent use, pass Size through, and close what they wrap on Close.
//
// Read next: package block.
package blockfault

import (
	"fmt"

	"ashlar/internal/block"
)

// Kind is a method of Device.
type Kind uint8

// The methods of Device that do something.
const (
	Read Kind = iota
	Write
	Zero
	Flush
	Extents
	Close
)

// String returns the method's name.
func (k Kind) String() string {
	names := [...]string{"ReadAt", "WriteAt", "Zero", "Flush", "Extents", "Close"}
	if int(k) < len(names) {
		return names[k]
	}
	return "invalid"
}

// Op is one call of a Device. Off and N are its range in bytes; Flush and Close have none.
type Op struct {
	Kind   Kind
	Off, N int64
}

// String describes op for a test's log.
func (op Op) String() string { return fmt.Sprintf("%v[%d,+%d)", op.Kind, op.Off, op.N) }

// around is a Device that asks before each call and tells after it. Its parts are what the exported wrappers are made of.
type around struct {
	dev    block.Device
	before func(Op) error  // an error is the answer, and dev is not called
	after  func(Op, error) // may be nil
}

var _ block.Device = (*around)(nil)

func (a *around) call(op Op, do func() error) error {
	err := a.before(op)
	if err == nil {
		err = do()
	}
	if a.after != nil {
		a.after(op, err)
	}
	return err
}

func (a *around) ReadAt(p []byte, off int64) (n int, err error) {
	err = a.call(Op{Read, off, int64(len(p))}, func() error {
		n, err = a.dev.ReadAt(p, off)
		return err
	})
	return n, err
}

func (a *around) WriteAt(p []byte, off int64) (n int, err error) {
	err = a.call(Op{Write, off, int64(len(p))}, func() error {
		n, err = a.dev.WriteAt(p, off)
		return err
	})
	return n, err
}

func (a *around) Zero(off, n int64) error {
	return a.call(Op{Zero, off, n}, func() error { return a.dev.Zero(off, n) })
}

func (a *around) Flush() error {
	return a.call(Op{Kind: Flush}, a.dev.Flush)
}

func (a *around) Extents(off, n int64) (e []block.Extent, err error) {
	err = a.call(Op{Extents, off, n}, func() error {
		e, err = a.dev.Extents(off, n)
		return err
	})
	return e, err
}

func (a *around) Size() int64 { return a.dev.Size() }

func (a *around) Close() error {
	return a.call(Op{Kind: Close}, a.dev.Close)
}
