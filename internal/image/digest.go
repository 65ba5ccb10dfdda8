package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"runtime"
	"sync"

	"ashlar/internal/block"

	"golang.org/x/sync/errgroup"
)

// chunkBytes is the piece of a disk that has a hash of its own; see docs/formats/digest.md.
const chunkBytes = mib

// digestPrefix names the digest's version.
const digestPrefix = "a1:"

// Digest describes a device's content and nothing else: not its format, holes, or where it is kept. Two devices have the same digest exactly if they have the
// same size and read the same. It reads what Extents calls Data, with all processors, and stops early when ctx is cancelled.
// The device must not be written meanwhile.
func Digest(ctx context.Context, dev block.Device) (string, error) {
	c := converter{size: dev.Size(), stride: chunkBytes, fill: fillFrom(dev)}
	d, err := c.run(ctx, func(ctx context.Context, emit emitter) error { return feedDevice(dev, chunkBytes, emit) })
	if err != nil {
		return "", fmt.Errorf("digest: %w", err)
	}
	return d, nil
}

// converter moves a disk's content through a pipeline: a feeder says which strides may hold data, in order; workers fill,
// hash and write them in any order; a collector puts the hashes together in order. Memory is a few strides a worker.
type converter struct {
	dst      block.Device // nil if only the digest is wanted
	size     int64
	stride   int64                           // bytes one step takes; a multiple of chunkBytes
	fill     func(p []byte, off int64) error // reads a stride in a worker; nil if the feeder brings the bytes
	release  func(off, n int64) error        // called after a stride was written; may be nil
	progress func(doneBytes int64)           // may be nil
	buffers  sync.Pool                       // of *[]byte, stride long
}

// emitter takes the next stride at off, which must be larger than the last. p is nil, or the bytes, in a buffer from converter.buffer.
type emitter func(off int64, p *[]byte) error

// strideWork is one step's work.
type strideWork struct {
	off    int64
	buf    *[]byte
	leaves []leaf
	done   chan struct{} // closed by the worker when leaves is complete
}

// leaf is the hash of a chunk that is not all zeroes.
type leaf struct {
	index int64
	sum   [sha256.Size]byte
}

func (c *converter) buffer() *[]byte { return take(&c.buffers, int(c.stride)) }

// run does it all and returns the digest. The feeder must watch its ctx only if it waits for something else than emit.
func (c *converter) run(ctx context.Context, feed func(context.Context, emitter) error) (string, error) {
	workers := runtime.GOMAXPROCS(0)
	work := make(chan *strideWork)
	order := make(chan *strideWork, 2*workers)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(work)
		defer close(order)
		return feed(gctx, func(off int64, p *[]byte) error {
			s := &strideWork{off: off, buf: p, done: make(chan struct{})}
			for _, queue := range []chan *strideWork{order, work} {
				select {
				case queue <- s:
				case <-gctx.Done():
					return context.Cause(gctx)
				}
			}
			return nil
		})
	})
	for range workers {
		g.Go(func() error {
			for s := range work {
				if err := c.step(s); err != nil {
					return err
				}
				close(s.done)
			}
			return nil
		})
	}
	root := newRoot(c.size)
	g.Go(func() error { return c.collect(gctx, order, root) })
	if err := g.Wait(); err != nil {
		return "", err
	}
	if err := context.Cause(ctx); err != nil {
		return "", err
	}
	return root.digest(), nil
}

func (c *converter) collect(ctx context.Context, order <-chan *strideWork, root root) error {
	for s := range order {
		select {
		case <-s.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		for _, l := range s.leaves {
			root.add(l)
		}
		if c.progress != nil {
			c.progress(min(s.off+c.stride, c.size))
		}
	}
	if c.progress != nil {
		c.progress(c.size)
	}
	return nil
}

// step does one stride: read, hash, write, release.
func (c *converter) step(s *strideWork) error {
	if s.buf == nil {
		s.buf = c.buffer()
	}
	defer c.buffers.Put(s.buf)
	p := (*s.buf)[:min(c.stride, c.size-s.off)]
	if c.fill != nil {
		if err := c.fill(p, s.off); err != nil {
			return err
		}
	}
	for at := int64(0); at < int64(len(p)); at += chunkBytes {
		chunk := p[at:min(at+chunkBytes, int64(len(p)))]
		if allZero(chunk) {
			continue
		}
		s.leaves = append(s.leaves, leaf{index: (s.off + at) / chunkBytes, sum: sha256.Sum256(chunk)})
		if err := c.write(chunk, s.off+at); err != nil {
			return err
		}
	}
	if c.release != nil {
		return c.release(s.off, int64(len(p)))
	}
	return nil
}

// write writes the units of p that are not all zeroes, in runs as long as possible.
func (c *converter) write(p []byte, off int64) error {
	if c.dst == nil {
		return nil
	}
	for at := 0; at < len(p); {
		n := 0
		for at+n < len(p) && !allZero(p[at+n:min(at+n+block.UnitBytes, len(p))]) {
			n += block.UnitBytes
		}
		n = min(n, len(p)-at)
		if n == 0 {
			at += block.UnitBytes
			continue
		}
		if _, err := c.dst.WriteAt(p[at:at+n], off+int64(at)); err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", n, off+int64(at), err)
		}
		at += n
	}
	return nil
}

func fillFrom(dev block.Device) func([]byte, int64) error {
	return func(p []byte, off int64) error {
		if _, err := dev.ReadAt(p, off); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
		}
		return nil
	}
}

// feedDevice emits each stride of dev that holds any Data.
func feedDevice(dev block.Device, stride int64, emit emitter) error {
	size := dev.Size()
	next := int64(0) // the first stride that was not emitted
	for off := int64(0); off < size; {
		list, err := dev.Extents(off, size-off)
		if err != nil {
			return fmt.Errorf("extents at %d: %w", off, err)
		}
		if len(list) == 0 {
			return fmt.Errorf("extents at %d: none: %w", off, io.ErrNoProgress)
		}
		for _, e := range list {
			off = e.Off + e.N
			if e.State != block.Data {
				continue
			}
			for at := max(next, e.Off/stride*stride); at < off; at += stride {
				if err := emit(at, nil); err != nil {
					return err
				}
				next = at + stride
			}
		}
	}
	return nil
}

// feedReader emits the size bytes of r, and the zeroes up to c.size.
func (c *converter) feedReader(r io.Reader, size int64, emit emitter) error {
	for off := int64(0); off < size; off += c.stride {
		p := c.buffer()
		n := min(c.stride, size-off)
		if _, err := io.ReadFull(r, (*p)[:n]); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return fmt.Errorf("the source ended before its %d bytes: %w", size, ErrTruncated)
			}
			return err
		}
		clear((*p)[n:])
		if err := emit(off, p); err != nil {
			return err
		}
	}
	return nil
}

// zeroes is compared against; bytes.Equal is several times faster than a loop.
var zeroes [64 << 10]byte

func allZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeroes))
		if !bytes.Equal(p[:n], zeroes[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

// root is the hash over the leaves.
type root struct{ hash.Hash }

func newRoot(size int64) root {
	r := root{sha256.New()}
	r.Write([]byte("ashlar digest a1\n"))
	r.Write(binary.BigEndian.AppendUint64(nil, uint64(size)))
	return r
}

// add takes the leaves in order of index.
func (r root) add(l leaf) {
	r.Write(binary.BigEndian.AppendUint64(nil, uint64(l.index)))
	r.Write(l.sum[:])
}

func (r root) digest() string { return digestPrefix + hex.EncodeToString(r.Sum(nil)) }
