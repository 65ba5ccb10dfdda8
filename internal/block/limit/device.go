package limit

import (
	"context"

	"ashlar/internal/block"
)

// Device is a Device whose reads, writes and zeroes go at no more than a Rate: each call is one request, and a read or write its bytes; a Zero moves none. Flush, Extents, Size and
// calls for nothing never wait. Waiting calls go in the order in which they came. Without limits a call costs one atomic load more.
type Device struct {
	dev  block.Device
	rate *Rate
	// shared says that the rate outlives the device.
	shared bool
}

var _ block.Device = (*Device)(nil)

// NewDevice returns d behind limits, which have been checked. It owns d: Close closes it.
func NewDevice(d block.Device, l Limits) *Device { return &Device{dev: d, rate: NewRate(l)} }

// Behind returns d behind a Rate that others share; Close closes d, and the Rate is its owner's.
func Behind(d block.Device, r *Rate) *Device { return &Device{dev: d, rate: r, shared: true} }

// Rate is what holds calls back: to change its limits, and see what they did.
func (d *Device) Rate() *Rate { return d.rate }

// MayWait tells whether the next call may be held back: whoever serves others too has a goroutine of its own make it.
func (d *Device) MayWait() bool { return d.rate.Limited() }

// ReadAt implements io.ReaderAt.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	if len(p) > 0 {
		if err := d.admit(int64(len(p))); err != nil {
			return 0, err
		}
	}
	return d.dev.ReadAt(p, off)
}

// WriteAt implements io.WriterAt.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	if len(p) > 0 {
		if err := d.admit(int64(len(p))); err != nil {
			return 0, err
		}
	}
	return d.dev.WriteAt(p, off)
}

// Zero implements block.Device.
func (d *Device) Zero(off, n int64) error {
	if n > 0 {
		if err := d.admit(0); err != nil {
			return err
		}
	}
	return d.dev.Zero(off, n)
}

// admit waits for as long as it takes: a Device has no context.
func (d *Device) admit(n int64) error { return d.rate.Wait(context.Background(), n) }

// Flush implements block.Device.
func (d *Device) Flush() error { return d.dev.Flush() }

// Extents implements block.Device.
func (d *Device) Extents(off, n int64) ([]block.Extent, error) { return d.dev.Extents(off, n) }

// Size implements block.Device.
func (d *Device) Size() int64 { return d.dev.Size() }

// Close implements block.Device: calls that wait, and later ones, return block.ErrClosed; then it closes the device behind.
func (d *Device) Close() error {
	if !d.shared {
		d.rate.Close()
	}
	return d.dev.Close()
}
