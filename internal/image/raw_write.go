package image

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"

	"ashlar/internal/block"

	"github.com/klauspost/compress/gzip"
)

// RawOptions says how raw bytes are written; the zero value writes them as they are.
type RawOptions struct {
	// Compress is "" or "gzip" (streams only).
	Compress string
	// Progress, if not nil, is called from one goroutine at a time, never backwards.
	Progress func(doneBytes, totalBytes int64)
}

// WriteRaw writes all bytes of src to w, in order, holes as zeroes, and returns how many were written. With gzip, each MiB is a member of its own (RFC 1952 says a file may have several, and
// that their contents follow one another), so that all processors pack and a hole costs nothing. Errors: ErrUnsupported for a compression nobody knows, and what src, w and ctx say.
func WriteRaw(ctx context.Context, w io.Writer, src block.Device, o RawOptions) (int64, error) {
	r := &rawWriter{src: src, w: w}
	switch o.Compress {
	case "":
	case "gzip":
		r.zip = newGzipper()
		r.zeroMember = r.zip.pack(nil, make([]byte, chunkBytes))
	default:
		return 0, fmt.Errorf("compression %q of a raw image: want gzip: %w", o.Compress, ErrUnsupported)
	}
	work := ordered[*rawPiece]{do: r.fill, feed: r.feed, collect: func(p *rawPiece) error {
		defer r.recycle(p)
		if err := r.put(p); err != nil {
			return fmt.Errorf("at %d: %w", r.written, err)
		}
		if o.Progress != nil {
			o.Progress(p.off+p.n, src.Size())
		}
		return nil
	}}
	if err := work.run(ctx); err != nil {
		return r.written, fmt.Errorf("write raw: %w", err)
	}
	if r.zip != nil && src.Size() == 0 {
		return r.written, r.write(r.zip.pack(nil, nil))
	}
	return r.written, nil
}

// WriteRawAt writes src to w, a new file of src's size that reads as zero: only what is not zero, several pieces at a time, in any order.
func WriteRawAt(ctx context.Context, w io.WriterAt, src block.Device, o RawOptions) error {
	if o.Compress != "" {
		return fmt.Errorf("compression %q of a raw image that is a file: %w", o.Compress, ErrUnsupported)
	}
	_, err := block.Copy(ctx, rawTarget{w, block.NewZeroes(src.Size())}, src, block.CopyOptions{DstIsZero: true, ChunkBytes: writeStrideBytes, Progress: o.Progress})
	if err != nil {
		return fmt.Errorf("write raw: %w", err)
	}
	return nil
}

// rawTarget is as much of a device as block.Copy asks of a target that is zero.
type rawTarget struct {
	io.WriterAt
	*block.Zeroes
}

func (t rawTarget) WriteAt(p []byte, off int64) (int, error) { return t.WriterAt.WriteAt(p, off) }

// rawWriter is one WriteRaw.
type rawWriter struct {
	src        block.Device
	w          io.Writer
	zip        *gzipper
	zeroMember []byte // a chunk of zeroes, packed
	written    int64
	buffers    sync.Pool // of *[]byte, a chunk long
}

// rawPiece is a chunk of data, or any run of zeroes.
type rawPiece struct {
	off, n int64
	zero   bool
	buf    *[]byte
	packed *bytes.Buffer
}

func (r *rawWriter) feed(emit func(*rawPiece) error) error {
	return runs(r.src, chunkBytes, func(e block.Extent) error {
		if e.State != block.Data {
			return emit(&rawPiece{off: e.Off, n: e.N, zero: true})
		}
		for at := e.Off; at < e.Off+e.N; at += chunkBytes {
			if err := emit(&rawPiece{off: at, n: min(chunkBytes, e.Off+e.N-at)}); err != nil {
				return err
			}
		}
		return nil
	})
}

// fill reads and packs, in a worker.
func (r *rawWriter) fill(p *rawPiece) error {
	if p.zero {
		return nil
	}
	p.buf = take(&r.buffers, int(chunkBytes))
	b := (*p.buf)[:p.n]
	if _, err := r.src.ReadAt(b, p.off); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", p.n, p.off, err)
	}
	if r.zip == nil {
		return nil
	}
	if allZero(b) {
		p.zero = true
		return nil
	}
	p.packed = r.zip.buffer()
	r.zip.packTo(p.packed, b)
	return nil
}

func (r *rawWriter) recycle(p *rawPiece) {
	if p.buf != nil {
		r.buffers.Put(p.buf)
	}
	if p.packed != nil {
		r.zip.buffers.Put(p.packed)
	}
}

// put writes a piece.
func (r *rawWriter) put(p *rawPiece) error {
	switch {
	case p.packed != nil:
		return r.write(p.packed.Bytes())
	case !p.zero:
		return r.write((*p.buf)[:p.n])
	}
	for left := p.n; left > 0; {
		if r.zip == nil {
			n := min(left, int64(len(zeroes)))
			if err := r.write(zeroes[:n]); err != nil {
				return err
			}
			left -= n
			continue
		}
		member, n := r.zeroMember, min(left, chunkBytes)
		if n < chunkBytes {
			member = r.zip.pack(nil, make([]byte, n))
		}
		if err := r.write(member); err != nil {
			return err
		}
		left -= n
	}
	return nil
}

func (r *rawWriter) write(b []byte) error {
	n, err := r.w.Write(b)
	r.written += int64(n)
	return err
}

// gzipper packs members, several at a time.
type gzipper struct {
	writers sync.Pool // of *gzip.Writer
	buffers sync.Pool // of *bytes.Buffer
}

func newGzipper() *gzipper { return new(gzipper) }

func (g *gzipper) buffer() *bytes.Buffer {
	if b, _ := g.buffers.Get().(*bytes.Buffer); b != nil {
		b.Reset()
		return b
	}
	return bytes.NewBuffer(make([]byte, 0, chunkBytes))
}

func (g *gzipper) pack(dst, p []byte) []byte {
	out := bytes.NewBuffer(dst)
	g.packTo(out, p)
	return out.Bytes()
}

// packTo writes p as a member. A bytes.Buffer takes everything.
func (g *gzipper) packTo(out *bytes.Buffer, p []byte) {
	w, _ := g.writers.Get().(*gzip.Writer)
	if w == nil {
		w, _ = gzip.NewWriterLevel(out, gzip.BestSpeed) //nolint:errcheck // the level is a constant
	} else {
		w.Reset(out)
	}
	w.Write(p) //nolint:errcheck
	w.Close()  //nolint:errcheck
	g.writers.Put(w)
}
