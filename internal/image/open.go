package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// Image is an open image: a read-only Device over a file, which it owns. WriteAt and Zero refuse with block.ErrReadOnly.
type Image struct {
	block.Device
	info Info
	file disk.File
}

// Options says how to open an image.
type Options struct {
	// Format is Auto to go by the first bytes. Raw takes any bytes as they are.
	Format Format
	Limits Limits
}

type openOptions struct {
	limits   Limits
	freeing  bool  // keep count of what is still needed, for Image.free
	received int64 // what Limits.Expand multiplies, if it is not the file's length: the file was packed
}

// Open opens the image in f and, whatever comes of it, owns f. All of a qcow2's tables are checked before Open returns, which reads them once: the time
// is bounded by ctx. The errors are ErrFormat, ErrUnsupported, ErrTooLarge and ErrTruncated, or what reading f says.
func Open(ctx context.Context, f disk.File, o Options) (*Image, error) {
	return open(ctx, f, o.Format, openOptions{limits: o.Limits.withDefaults()})
}

func open(ctx context.Context, f disk.File, wish Format, o openOptions) (*Image, error) {
	img, err := openAs(ctx, f, wish, o)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("image: %w", err), f.Close())
	}
	return img, nil
}

func openAs(ctx context.Context, f disk.File, wish Format, o openOptions) (*Image, error) {
	n, err := f.Size()
	if err != nil {
		return nil, err
	}
	if n > o.limits.FileBytes {
		return nil, fmt.Errorf("the file is %d bytes, the limit is %d: %w", n, o.limits.FileBytes, ErrTooLarge)
	}
	head := make([]byte, min(n, headBytes))
	if _, err := f.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	format, err := resolve(wish, head)
	if err != nil {
		return nil, err
	}
	if format == Qcow2 {
		q, err := openQcow2(ctx, f, n, o)
		if err != nil {
			return nil, err
		}
		return &Image{Device: q, info: q.info, file: f}, nil
	}
	r := &raw{file: f, info: Info{Format: Raw, FileBytes: n, VirtualBytes: n}}
	if err := r.info.checkVirtual(o.limits); err != nil {
		return nil, err
	}
	return &Image{Device: r, info: r.info, file: f}, nil
}

// Info says what kind of image it is and how large.
func (i *Image) Info() Info { return i.info }

// Close closes the device and the file.
func (i *Image) Close() error {
	if err := i.Device.Close(); err != nil {
		return err
	}
	if err := i.file.Close(); err != nil {
		return fmt.Errorf("image: close: %w", err)
	}
	return nil
}

// stride is how much of the image one step of a conversion takes: whole chunks, and whole clusters, so that each is unpacked once.
func (i *Image) stride() int64 {
	if q, ok := i.Device.(*qcow2); ok {
		return max(chunkBytes, q.clusterBytes())
	}
	return chunkBytes
}

// minFreeBytes is the shortest run that free bothers with.
const minFreeBytes = block.UnitBytes

// free gives the file's space for [off, off+n) of the disk back. It is called once for each range of whole strides, after the last read of it.
func (i *Image) free(off, n int64) error {
	punch := func(off, n int64) error {
		if n < minFreeBytes {
			return nil
		}
		return i.file.Punch(off, n)
	}
	q, ok := i.Device.(*qcow2)
	if !ok {
		return punch(off, min(n, i.info.FileBytes-off))
	}
	for at := off; at < off+n; {
		r, err := q.lookup(at, off+n-at)
		if err != nil {
			return err
		}
		switch r.kind {
		case kindData:
			err = punch(r.host, r.n)
		case kindCompressed:
			err = q.refs.done(r.e.host, r.e.stored, punch)
		}
		if err != nil {
			return err
		}
		at += r.n
	}
	return nil
}

// raw is a file whose bytes are the disk's. The last unit is filled up with zeroes.
type raw struct {
	file   disk.File
	info   Info
	closed atomic.Bool
}

var _ block.Device = (*raw)(nil)

func (r *raw) check(off, n int64) error {
	if r.closed.Load() {
		return block.ErrClosed
	}
	return block.CheckRange(off, n, r.info.DeviceBytes)
}

// ReadAt fills p; what lies beyond the file's end reads as zero.
func (r *raw) ReadAt(p []byte, off int64) (int, error) {
	if err := r.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	stored := max(0, min(int64(len(p)), r.info.FileBytes-off))
	if stored > 0 {
		if n, err := r.file.ReadAt(p[:stored], off); int64(n) < stored {
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("the file shrank below %d bytes: %w", r.info.FileBytes, ErrTruncated)
			}
			return n, fmt.Errorf("raw image: %w", err)
		}
	}
	clear(p[stored:])
	return len(p), nil
}

// Extents tells the file's holes (Absent) from the rest (Data), in whole units.
func (r *raw) Extents(off, n int64) ([]block.Extent, error) {
	if err := r.check(off, n); err != nil {
		return nil, err
	}
	var list extentList
	end := off + n
	for at := off; at < end; {
		dataOff, dataN, err := r.file.NextData(at)
		if errors.Is(err, io.EOF) {
			dataOff, dataN, err = end, 0, nil
		}
		if err != nil {
			return nil, fmt.Errorf("raw image: %w", err)
		}
		dataEnd := min(end, roundUp(dataOff+dataN, block.UnitBytes))
		dataOff = max(at, min(end, dataOff-dataOff%block.UnitBytes))
		if dataOff > at && !list.add(at, dataOff-at, block.Absent) {
			break
		}
		if dataEnd > dataOff && !list.add(dataOff, dataEnd-dataOff, block.Data) {
			break
		}
		at = max(dataEnd, dataOff)
	}
	return list, nil
}

// Size is the file's length rounded up to whole units.
func (r *raw) Size() int64 { return r.info.DeviceBytes }

// WriteAt refuses with block.ErrReadOnly.
func (r *raw) WriteAt(p []byte, off int64) (int, error) { return 0, r.refuseWrite(off, int64(len(p))) }

// Zero refuses with block.ErrReadOnly.
func (r *raw) Zero(off, n int64) error { return r.refuseWrite(off, n) }

func (r *raw) refuseWrite(off, n int64) error {
	if err := r.check(off, n); err != nil || n == 0 {
		return err
	}
	return block.ErrReadOnly
}

// Flush has nothing to do.
func (r *raw) Flush() error { return r.check(0, 0) }

// Close ends the device; Image closes the file.
func (r *raw) Close() error {
	if r.closed.Swap(true) {
		return block.ErrClosed
	}
	return nil
}
