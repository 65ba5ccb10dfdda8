package block

import (
	"bytes"
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"
)

// CopyOptions says how Copy works. The zero value copies everything, with four chunks of 1 MiB at a time.
type CopyOptions struct {
	// Parallel is how many chunks are in flight; 0 means 4. ChunkBytes is their size, rounded up to whole units; 0 means 1 MiB.
	Parallel   int
	ChunkBytes int64
	// DstIsZero says that dst reads as zeros, so that zeros need not be written.
	DstIsZero bool
	// KeepAbsent leaves dst alone where src is Absent, instead of zeroing it: for copies between layers.
	KeepAbsent bool
	// Flush flushes dst at the end.
	Flush bool
	// Progress is called after each chunk with the bytes dealt with so far and the bytes in all, never twice at once.
	Progress func(doneBytes, totalBytes int64)
}

// CopyStats says what Copy did. The sum is the size of src, rounded up to whole units where dst reaches so far.
type CopyStats struct {
	DataBytes    int64 // written to dst
	ZeroBytes    int64 // zeroed in dst
	SkippedBytes int64 // left alone in dst
}

// zeroBytes is the largest range that Copy zeroes in one call, so that it can be cancelled.
const zeroBytes = 256 << 20

// copier is one Copy at work.
type copier struct {
	dst, src Device
	opts     CopyOptions
	endBytes int64 // where the copy ends in dst; in src everything beyond its size is zeros

	mu    sync.Mutex // guards stats, and that Progress is called once at a time
	stats CopyStats
}

// Copy copies src to the beginning of dst. It reads only what src says is Data, finds zeros in it unit by unit, and writes and zeroes
// whole units: where src ends within a unit and dst does not, the rest of that unit is zeroed too. What lies beyond in dst is left
// alone. ErrRange if dst is smaller than src.
//
// The first error, or the end of ctx, stops it; then any units of dst may be copied. Calls in flight are waited for: who
// cannot wait closes the devices. Neither device may be changed by others meanwhile.
func Copy(ctx context.Context, dst, src Device, opts CopyOptions) (CopyStats, error) {
	if dst.Size() < src.Size() {
		return CopyStats{}, fmt.Errorf("block: copy %d bytes to a device of %d: %w", src.Size(), dst.Size(), ErrRange)
	}
	if opts.Parallel <= 0 {
		opts.Parallel = 4
	}
	if opts.ChunkBytes <= 0 {
		opts.ChunkBytes = 1 << 20
	}
	opts.ChunkBytes = roundUp(opts.ChunkBytes)
	c := &copier{dst: dst, src: src, opts: opts, endBytes: min(dst.Size(), roundUp(src.Size()))}
	g, ctx := errgroup.WithContext(ctx)
	jobs := make(chan Extent)
	g.Go(func() error {
		defer close(jobs)
		return c.plan(ctx, jobs)
	})
	for range opts.Parallel {
		g.Go(func() error { return c.work(ctx, jobs) })
	}
	err := g.Wait()
	if err == nil && opts.Flush {
		if err = dst.Flush(); err != nil {
			err = fmt.Errorf("block: copy: flush: %w", err)
		}
	}
	return c.stats, err
}

func roundUp(n int64) int64   { return roundDown(n + UnitBytes - 1) }
func roundDown(n int64) int64 { return n / UnitBytes * UnitBytes }

// plan cuts src into jobs of whole units. A unit that is only partly a hole is data.
func (c *copier) plan(ctx context.Context, jobs chan<- Extent) error {
	var pos int64 // up to here everything is given out; always whole units
	give := func(end int64, s State) error {
		limit := c.opts.ChunkBytes
		if s != Data {
			limit = max(limit, zeroBytes)
		}
		for pos < end {
			job := Extent{Off: pos, N: min(end-pos, limit), State: s}
			select {
			case jobs <- job:
			case <-ctx.Done():
				return fmt.Errorf("block: copy: %w", context.Cause(ctx))
			}
			pos += job.N
		}
		return nil
	}
	size := c.src.Size()
	for off := int64(0); off < size; {
		extents, err := c.src.Extents(off, size-off)
		if err != nil {
			return fmt.Errorf("block: copy: extents at %d: %w", off, err)
		}
		if len(extents) == 0 {
			return fmt.Errorf("block: copy: no extents at %d: %w", off, ErrCorrupt)
		}
		for _, e := range extents {
			if e.Off != off || e.N <= 0 || e.N > size-off {
				return fmt.Errorf("block: copy: extent [%d,+%d) at %d: %w", e.Off, e.N, off, ErrCorrupt)
			}
			off += e.N
			end := roundDown(off)
			if off == size {
				end = c.endBytes
			}
			if e.State != Data {
				if err := give(min(roundUp(e.Off), end), Data); err != nil {
					return err
				}
			}
			if err := give(end, e.State); err != nil {
				return err
			}
		}
	}
	return nil
}

// work does jobs until there are no more.
func (c *copier) work(ctx context.Context, jobs <-chan Extent) error {
	var buf []byte // made when there is data
	for job := range jobs {
		if ctx.Err() != nil {
			return fmt.Errorf("block: copy: %w", context.Cause(ctx))
		}
		var err error
		var stats CopyStats
		switch {
		case job.State == Data:
			if buf == nil {
				buf = make([]byte, c.opts.ChunkBytes)
			}
			stats, err = c.copyChunk(buf[:job.N], job.Off)
		case job.State == Absent && c.opts.KeepAbsent:
			stats.SkippedBytes = job.N
		default:
			stats, err = c.zero(job.Off, job.N)
		}
		if err != nil {
			return err
		}
		c.report(stats)
	}
	return nil
}

// copyChunk copies the units from off on through buf, and zeroes those that are zeros.
func (c *copier) copyChunk(buf []byte, off int64) (CopyStats, error) {
	inSrc := min(int64(len(buf)), c.src.Size()-off)
	if _, err := c.src.ReadAt(buf[:inSrc], off); err != nil {
		return CopyStats{}, fmt.Errorf("block: copy: read %d bytes at %d: %w", inSrc, off, err)
	}
	clear(buf[inSrc:])
	var total CopyStats
	for len(buf) > 0 {
		n, zero := run(buf)
		var did CopyStats
		var err error
		if zero {
			did, err = c.zero(off, int64(n))
		} else if _, err = c.dst.WriteAt(buf[:n], off); err != nil {
			err = fmt.Errorf("block: copy: write %d bytes at %d: %w", n, off, err)
		} else {
			did.DataBytes = int64(n)
		}
		if err != nil {
			return total, err
		}
		total.DataBytes += did.DataBytes
		total.ZeroBytes += did.ZeroBytes
		total.SkippedBytes += did.SkippedBytes
		buf, off = buf[n:], off+int64(n)
	}
	return total, nil
}

// run returns the length of the longest run of units that b begins with and that are all zeros, or all not.
func run(b []byte) (n int, zero bool) {
	zero = isZero(b[:min(len(b), UnitBytes)])
	for n = min(len(b), UnitBytes); n < len(b); {
		unit := b[n:min(len(b), n+UnitBytes)]
		if isZero(unit) != zero {
			break
		}
		n += len(unit)
	}
	return n, zero
}

// isZero tells whether b, at most a unit, is all zeros: compared with itself a byte further, which is the fastest there is in
// plain Go.
func isZero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}

func (c *copier) zero(off, n int64) (CopyStats, error) {
	if c.opts.DstIsZero {
		return CopyStats{SkippedBytes: n}, nil
	}
	if err := c.dst.Zero(off, n); err != nil {
		return CopyStats{}, fmt.Errorf("block: copy: zero %d bytes at %d: %w", n, off, err)
	}
	return CopyStats{ZeroBytes: n}, nil
}

func (c *copier) report(s CopyStats) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stats.DataBytes += s.DataBytes
	c.stats.ZeroBytes += s.ZeroBytes
	c.stats.SkippedBytes += s.SkippedBytes
	if c.opts.Progress != nil {
		c.opts.Progress(c.stats.DataBytes+c.stats.ZeroBytes+c.stats.SkippedBytes, c.endBytes)
	}
}
