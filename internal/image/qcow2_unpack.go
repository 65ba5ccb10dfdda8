package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"ashlar/internal/block"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// maxZstdBytes bounds what a frame may ask the decoder to keep or to give. QEMU's frames need at most a cluster or 2 MiB.
const maxZstdBytes = 8 << 20

// inflater unpacks compressed clusters, several at a time. Whatever a stream claims, it never gives more than a cluster and never takes more memory
// than a few clusters.
type inflater struct {
	zstd   *zstd.Decoder // nil for deflate
	flates sync.Pool     // of flate.Resetter
	packed sync.Pool     // of *[]byte, input
}

func newInflater(h *header) (*inflater, error) {
	f := new(inflater)
	if !h.zstd {
		return f, nil
	}
	// The limit on memory also bounds the window, so it cannot be the cluster's size, which may be less than the smallest window.
	d, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(maxZstdBytes), zstd.WithDecoderMaxWindow(maxZstdBytes), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, fmt.Errorf("qcow2: start zstd: %w", err)
	}
	f.zstd = d
	return f, nil
}

// unpack fills dst, which is one cluster, with what e stands for.
func (f *inflater) unpack(dst []byte, src io.ReaderAt, e entry) error {
	packed := take(&f.packed, int(e.stored))
	defer f.packed.Put(packed)
	if _, err := src.ReadAt(*packed, e.host); err != nil {
		return readFailed("compressed cluster", err)
	}
	var err error
	if f.zstd != nil {
		err = f.unzstd(dst, *packed)
	} else {
		err = f.unflate(dst, *packed)
	}
	if err != nil {
		return fmt.Errorf("%w: %w: %w", err, block.ErrCorrupt, ErrFormat)
	}
	return nil
}

// unflate reads one cluster; what a stream holds beyond it is left alone, as QEMU does.
func (f *inflater) unflate(dst, packed []byte) error {
	r, _ := f.flates.Get().(io.ReadCloser)
	in := bytes.NewReader(packed)
	if r == nil {
		r = flate.NewReader(in)
	} else if err := r.(flate.Resetter).Reset(in, nil); err != nil {
		return err
	}
	_, err := io.ReadFull(r, dst)
	f.flates.Put(r)
	return err
}

var errShortStream = errors.New("the stream ends before the cluster is full")

// unzstd reads frames until the cluster is full: QEMU writes one, and its reader takes several. The bytes after them belong to the next cluster.
func (f *inflater) unzstd(dst, packed []byte) error {
	out := dst[:0:len(dst)]
	for len(out) < len(dst) {
		n, err := zstdFrameBytes(packed)
		if err != nil {
			return err
		}
		if out, err = f.zstd.DecodeAll(packed[:n], out); err != nil {
			return err
		}
		packed = packed[n:]
	}
	if len(out) > len(dst) {
		return errors.New("the stream holds more than a cluster")
	}
	if &out[0] != &dst[0] { // the decoder moved to a larger buffer on its way
		copy(dst, out)
	}
	return nil
}

// zstdFrameBytes finds the end of the frame that b begins with by walking its blocks.
func zstdFrameBytes(b []byte) (int, error) {
	var h zstd.Header
	if err := h.Decode(b); err != nil {
		return 0, err
	}
	n := h.HeaderSize
	if h.Skippable {
		n += int(h.SkippableSize)
		if n > len(b) {
			return 0, errShortStream
		}
		return n, nil
	}
	for last := false; !last; {
		if n+3 > len(b) {
			return 0, errShortStream
		}
		v := int(b[n]) | int(b[n+1])<<8 | int(b[n+2])<<16
		last = v&1 != 0
		if v>>1&3 == 1 { // one byte, repeated
			n += 3 + 1
		} else {
			n += 3 + v>>3
		}
	}
	if h.HasCheckSum {
		n += 4
	}
	if n > len(b) {
		return 0, errShortStream
	}
	return n, nil
}

// take gives a buffer of n bytes out of pool, or a new one.
func take(pool *sync.Pool, n int) *[]byte {
	if b, _ := pool.Get().(*[]byte); b != nil && cap(*b) >= n {
		*b = (*b)[:n]
		return b
	}
	b := make([]byte, n)
	return &b
}

// hostRefs counts, for each cluster of the file, the compressed streams that still need it, so that a spool can be freed as it is converted. A nil
// *hostRefs counts nothing.
type hostRefs struct {
	bits  uint
	bytes int64
	count []atomic.Int32
}

// maxRefs bounds hostRefs to 64 MiB; larger files are freed at the end.
const maxRefs = 16 << 20

func newHostRefs(fileBytes int64, clusterBits uint) *hostRefs {
	n := fileBytes>>clusterBits + 1
	if n > maxRefs {
		return nil
	}
	return &hostRefs{bits: clusterBits, bytes: fileBytes, count: make([]atomic.Int32, n)}
}

// add counts a stream of n bytes at off.
func (r *hostRefs) add(off, n int64) {
	if r == nil {
		return
	}
	for i := off >> r.bits; i <= (off+n-1)>>r.bits; i++ {
		r.count[i].Add(1)
	}
}

// done uncounts it and calls free for each cluster that nobody needs any more.
func (r *hostRefs) done(off, n int64, free func(off, n int64) error) error {
	if r == nil {
		return nil
	}
	for i := off >> r.bits; i <= (off+n-1)>>r.bits; i++ {
		if r.count[i].Add(-1) == 0 {
			start := i << r.bits
			if err := free(start, min(1<<r.bits, r.bytes-start)); err != nil {
				return err
			}
		}
	}
	return nil
}
