package nbd

import (
	"sync/atomic"

	"ashlar/internal/block"
)

// call is a Device call as a test sees it before it is carried out.
type call struct {
	op     string // read, write, zero, flush, extents
	off, n int64
}

// memDevice is a Device in memory whose calls a test can delay and fail.
type memDevice struct {
	*block.Mem
	hook func(call) error // nil, or asked before each call; may block

	calls, running, most atomic.Int64
}

func newMemDevice(size int64) *memDevice { return &memDevice{Mem: block.NewMem(size)} }

var _ block.Device = (*memDevice)(nil)

func (d *memDevice) enter(op string, off, n int64) error {
	d.calls.Add(1)
	now := d.running.Add(1)
	defer d.running.Add(-1)
	for most := d.most.Load(); now > most && !d.most.CompareAndSwap(most, now); most = d.most.Load() {
	}
	if d.hook != nil {
		return d.hook(call{op, off, n})
	}
	return nil
}

func (d *memDevice) ReadAt(p []byte, off int64) (int, error) {
	if err := d.enter("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	return d.Mem.ReadAt(p, off)
}

func (d *memDevice) WriteAt(p []byte, off int64) (int, error) {
	if err := d.enter("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	return d.Mem.WriteAt(p, off)
}

func (d *memDevice) Zero(off, n int64) error {
	if err := d.enter("zero", off, n); err != nil {
		return err
	}
	return d.Mem.Zero(off, n)
}

func (d *memDevice) Flush() error {
	if err := d.enter("flush", 0, 0); err != nil {
		return err
	}
	return d.Mem.Flush()
}

func (d *memDevice) Extents(off, n int64) ([]block.Extent, error) {
	if err := d.enter("extents", off, n); err != nil {
		return nil, err
	}
	return d.Mem.Extents(off, n)
}
