package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"

	"golang.org/x/sync/errgroup"
)

// Request says what to import and where to.
type Request struct {
	// Source is an http(s) URL or the absolute path of a regular file; with Reader or Device it is only a name for messages.
	Source string
	// Reader, if not nil, is the source, already open. It gives ReaderBytes bytes (-1: any number) and then io.EOF, which means that the file is whole: whoever cannot promise that must give another
	// error. Import closes it, also to end a Read that waits when ctx ends. Less is ErrTruncated, more ErrTooLarge.
	Reader      io.ReadCloser
	ReaderBytes int64
	// Device, if not nil, is the source: a raw disk that does not change meanwhile. The sums are of its bytes, from the first to the last, holes included. It stays the caller's to close; its
	// errors come with ErrSource.
	Device block.Device
	// Checksum of the file as received, that is before it is unpacked; the zero value matches everything.
	Checksum Checksum
	// Format is Auto to go by the first bytes. Files packed with gzip, xz or zstd are unpacked first, and then Format is of what is inside; only with Raw the bytes are taken as they are.
	Format Format
	Limits Limits
	// IdleTimeout and RetryDelay: see fetchOptions.
	IdleTimeout, RetryDelay time.Duration
	// Spool and SpoolName say where content is kept that cannot be converted as it arrives: qcow2 from a URL, a raw file of unknown length, what is inside of a packed file (whose length shows only at
	// its end, and a layer has one size for ever). It must not exist, has holes where the content has zeroes, is freed as far as possible while it is converted, and is gone when Import returns.
	Spool     disk.FS
	SpoolName string
	// Create makes the device to write to, of Info.DeviceBytes and reading as zero. It is called once, after the image's header and tables were
	// checked. The device stays the caller's to flush and close, also after an error.
	Create func(Info) (block.Device, error)
	// Progress, if not nil, is called from one goroutine at a time; Percent never falls.
	Progress func(Progress)
}

// Progress says how far an import is.
type Progress struct {
	// Phase is "fetch" while bytes arrive to be kept as they are, and "convert" while the device is written.
	Phase string `json:"phase"`
	// DoneBytes and TotalBytes count the phase's bytes; TotalBytes is -1 if the source does not tell.
	DoneBytes  int64 `json:"doneBytes"`
	TotalBytes int64 `json:"totalBytes"`
	// Percent is of the whole import, 0 to 100.
	Percent int `json:"percent"`
}

// Result describes an imported image.
type Result struct {
	Info
	// SHA512 is of the file as received, in hex.
	SHA512 string `json:"sha512"`
	// Digest is of the content; see docs/formats/digest.md.
	Digest string `json:"digest"`
}

// fetchPercent is the share of the whole that fetching gets where fetching and converting are two phases.
const fetchPercent = 80

// importer is one Import under way.
type importer struct {
	Request
	limits Limits
}

// Import brings a source's content into a new device, verified. Nothing of it may be used before Import has returned nil: what a checksum
// refuses may already have been written.
//
// Errors: the sentinels of this package, what Create and the device say, and ctx's own.
func Import(ctx context.Context, req Request) (Result, error) {
	im := &importer{Request: req, limits: req.Limits.withDefaults()}
	var result Result
	var err error
	switch {
	case req.Device != nil:
		result, err = im.fromDevice(ctx)
	case req.Reader != nil:
		result, err = im.fromReader(ctx)
	case isURL(req.Source):
		result, err = im.fromURL(ctx)
	default:
		result, err = im.fromFile(ctx)
	}
	if err != nil {
		return Result{}, fmt.Errorf("import: %w", err)
	}
	return result, nil
}

func (im *importer) report(p Progress) {
	if im.Progress != nil {
		im.Progress(p)
	}
}

// converting gives a callback for a conversion of total bytes whose first percent is from.
func (im *importer) converting(total int64, from int) func(int64) {
	return func(done int64) {
		percent := from + int(float64(done)/float64(total)*float64(100-from))
		im.report(Progress{Phase: "convert", DoneBytes: done, TotalBytes: total, Percent: min(percent, 100)})
	}
}

// fromFile reads raw and packed files once, from start to end. Those of other formats are converted in place, in whatever order their tables say, while
// the sums are made beside it.
func (im *importer) fromFile(ctx context.Context) (Result, error) {
	local, err := openLocal(im.Source, im.limits.FileBytes)
	if err != nil {
		return Result{}, err
	}
	defer local.Close()
	s := local.stream(ctx, im.Checksum, im.limits.FileBytes)
	defer s.Close()
	result, err := im.fromStream(ctx, s, local)
	if err == nil {
		err = local.unchanged()
	}
	return result, err
}

// fromURL reads what a server has.
func (im *importer) fromURL(ctx context.Context) (Result, error) {
	im.report(Progress{Phase: "fetch", TotalBytes: -1})
	s, err := openURL(ctx, im.Source, fetchOptions{IdleTimeout: im.IdleTimeout, RetryDelay: im.RetryDelay, MaxBytes: im.limits.FileBytes, Checksum: im.Checksum})
	if err != nil {
		return Result{}, err
	}
	defer s.Close()
	return im.fromStream(ctx, s, nil)
}

// fromReader reads what the caller has opened.
func (im *importer) fromReader(ctx context.Context) (Result, error) {
	rctx, cancel := context.WithCancelCause(ctx)
	s := &stream{name: im.Source, total: max(-1, im.ReaderBytes), sums: newSums(im.Checksum), max: im.limits.FileBytes, abort: cancel,
		close: func() error { cancel(nil); return nil },
		read: func(p []byte) (int, error) {
			n, err := im.Reader.Read(p)
			if err != nil && rctx.Err() != nil {
				err = context.Cause(rctx)
			}
			return n, err
		}}
	defer context.AfterFunc(rctx, func() { im.Reader.Close() })() //nolint:errcheck // it is read, and after its end nothing can be lost
	defer s.Close()
	if s.total > s.max {
		return Result{}, fmt.Errorf("%s: %d bytes are announced, the limit is %d: %w", s.name, s.total, s.max, ErrTooLarge)
	}
	return im.fromStream(ctx, s, nil)
}

// fromStream imports s: packed files are unpacked, raw data is converted as it arrives if its length is known, other formats are converted in local, if there is one, and what is left is spooled.
func (im *importer) fromStream(ctx context.Context, s *stream, local *localFile) (result Result, err error) {
	head, err := readHead(s, s.name)
	if err != nil {
		return Result{}, err
	}
	if wrapper := DetectWrapper(head); wrapper != Unwrapped && im.Format != Raw {
		return im.wrapped(ctx, s, head, wrapper)
	}
	format, err := resolve(im.Format, head)
	switch {
	case err != nil:
		return Result{}, fmt.Errorf("%s: %w", s.name, err)
	case format == Raw && s.total >= 0:
		result, err = im.streamRaw(ctx, s, head)
	case local != nil:
		result, err = im.convertBeside(ctx, local, format, func(ctx context.Context) error {
			defer s.endWith(ctx)()
			_, err := io.Copy(io.Discard, s)
			return err
		})
	default:
		return im.spool(ctx, s, io.MultiReader(bytes.NewReader(head), s), format)
	}
	if err == nil {
		err = s.sums.check()
	}
	result.SHA512 = s.sums.SHA512()
	return result, err
}

// wrapped imports what is inside of s.
func (im *importer) wrapped(ctx context.Context, s *stream, head []byte, wrapper Wrapper) (Result, error) {
	u, err := newUnwrapper(s, io.MultiReader(bytes.NewReader(head), s), wrapper, im.limits)
	if err != nil {
		return Result{}, err
	}
	defer u.close()
	name := fmt.Sprintf("%s: inside the %s file", s.name, wrapper)
	inner, err := readHead(u, name)
	if err != nil {
		return Result{}, err
	}
	format, err := resolve(im.Format, inner)
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", name, err)
	}
	return im.spool(ctx, s, io.MultiReader(bytes.NewReader(inner), u), format)
}

// readHead reads the first bytes of r.
func readHead(r io.Reader, name string) ([]byte, error) {
	head := make([]byte, headBytes)
	n, err := io.ReadFull(r, head)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF { // these two themselves are the end; what wraps them is an error
		return nil, err
	}
	if n == 0 {
		return nil, fmt.Errorf("%s: the file is empty: %w", name, ErrFormat)
	}
	return head[:n], nil
}

// create makes the target and checks that it is what was asked for.
func (im *importer) create(info Info) (block.Device, error) {
	dst, err := im.Create(info)
	if err != nil {
		return nil, fmt.Errorf("create target: %w", err)
	}
	if dst.Size() != info.DeviceBytes {
		return nil, fmt.Errorf("create target: it has %d bytes, want %d: %w", dst.Size(), info.DeviceBytes, block.ErrRange)
	}
	return dst, nil
}

// streamRaw writes the bytes of s, of known length, as they come.
func (im *importer) streamRaw(ctx context.Context, s *stream, head []byte) (Result, error) {
	info := Info{Format: Raw, FileBytes: s.total, VirtualBytes: s.total}
	if err := info.checkVirtual(im.limits); err != nil {
		return Result{}, err
	}
	dst, err := im.create(info)
	if err != nil {
		return Result{}, err
	}
	c := converter{dst: dst, size: info.DeviceBytes, stride: chunkBytes, progress: im.converting(info.DeviceBytes, 0)}
	r := io.MultiReader(bytes.NewReader(head), s)
	digest, err := c.run(ctx, func(ctx context.Context, emit emitter) error {
		defer s.endWith(ctx)()
		if err := c.feedReader(r, s.total, emit); err != nil {
			return err
		}
		// The end, or more than was announced, shows only now.
		if n, err := io.ReadFull(s, make([]byte, 1)); n > 0 {
			return fmt.Errorf("%s: more than the announced %d bytes: %w", s.name, s.total, ErrTooLarge)
		} else if !errors.Is(err, io.EOF) {
			return err
		}
		return nil
	})
	return Result{Info: info, Digest: digest}, err
}

// convertBeside converts the image in f while sum runs.
func (im *importer) convertBeside(ctx context.Context, f disk.File, wish Format, sum func(context.Context) error) (Result, error) {
	img, err := openAs(ctx, f, wish, openOptions{limits: im.limits})
	if err != nil {
		return Result{}, err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return sum(ctx) })
	var result Result
	g.Go(func() (err error) {
		result, err = im.convert(ctx, img, 0, nil)
		return err
	})
	err = g.Wait()
	return result, err
}

// convert writes all of img to a new target.
func (im *importer) convert(ctx context.Context, img *Image, from int, release func(off, n int64) error) (Result, error) {
	dst, err := im.create(img.info)
	if err != nil {
		return Result{}, err
	}
	c := converter{dst: dst, size: img.Size(), stride: img.stride(), fill: fillFrom(img), release: release, progress: im.converting(img.Size(), from)}
	digest, err := c.run(ctx, func(ctx context.Context, emit emitter) error { return feedDevice(img, c.stride, emit) })
	return Result{Info: img.info, Digest: digest}, err
}

// spool keeps content, which is s or what is inside of it, in a file, verifies s, and converts the file.
func (im *importer) spool(ctx context.Context, s *stream, content io.Reader, format Format) (result Result, err error) {
	if im.Spool == nil {
		return Result{}, fmt.Errorf("%s: the content has to be kept, and there is no place given: %w", s.name, ErrUnsupported)
	}
	f, err := im.Spool.Create(im.SpoolName, 0)
	if err != nil {
		return Result{}, fmt.Errorf("spool: %w", err)
	}
	defer func() {
		// Nobody can use the spool after us, so nothing else is lost with an error here; it is reported because the disk is then worth a look.
		if e := errors.Join(f.Close(), im.Spool.Remove(im.SpoolName)); e != nil && err == nil {
			err = fmt.Errorf("remove spool: %w", e)
		}
	}()
	err = keep(f, content, func() {
		percent := 0
		if s.total > 0 {
			percent = int(float64(s.done) / float64(s.total) * fetchPercent)
		}
		im.report(Progress{Phase: "fetch", DoneBytes: s.done, TotalBytes: s.total, Percent: min(percent, fetchPercent)})
	})
	if err == nil {
		err = s.sums.check()
	}
	if err != nil {
		return Result{}, fmt.Errorf("spool: %w", err)
	}
	img, err := openAs(ctx, f, format, openOptions{limits: im.limits, freeing: true, received: s.done})
	if err != nil {
		return Result{}, err
	}
	result, err = im.convert(ctx, img, fetchPercent, img.free)
	result.FileBytes, result.SHA512 = s.done, s.sums.SHA512()
	return result, err
}

// keep writes r to f, leaving holes for zeroes.
func keep(f disk.File, r io.Reader, progress func()) error {
	buf := make([]byte, len(zeroes))
	off, end := int64(0), int64(0) // read, and written
	for {
		n, err := io.ReadFull(r, buf)
		if n > 0 && !allZero(buf[:n]) {
			if _, err := f.WriteAt(buf[:n], off); err != nil {
				return err
			}
			end = off + int64(n)
		}
		off += int64(n)
		progress()
		switch {
		case err == nil:
		case err != io.EOF && err != io.ErrUnexpectedEOF: // as in readHead
			return err
		case end < off:
			_, err := f.WriteAt([]byte{0}, off-1) // a hole at the end has to be given its length
			return err
		default:
			return nil
		}
	}
}

// fromDevice imports a disk. Pieces are read several at a time, hashed in order, and handed to the converter.
func (im *importer) fromDevice(ctx context.Context) (Result, error) {
	src := SourceDevice(im.Device)
	info := Info{Format: Raw, FileBytes: src.Size(), VirtualBytes: src.Size()}
	if info.FileBytes > im.limits.FileBytes {
		return Result{}, fmt.Errorf("%s: %d bytes, the limit is %d: %w", im.Source, info.FileBytes, im.limits.FileBytes, ErrTooLarge)
	}
	if im.Format == Qcow2 {
		return Result{}, fmt.Errorf("%s: asked for qcow2, but a device is raw: %w", im.Source, ErrFormat)
	}
	if err := info.checkVirtual(im.limits); err != nil {
		return Result{}, err
	}
	dst, err := im.create(info)
	if err != nil {
		return Result{}, err
	}
	sums := newSums(im.Checksum)
	c := converter{dst: dst, size: info.DeviceBytes, stride: chunkBytes, progress: im.converting(info.DeviceBytes, 0)}
	digest, err := c.run(ctx, func(ctx context.Context, emit emitter) error { return c.feedOrdered(ctx, src, sums, emit) })
	if err == nil {
		err = sums.check()
	}
	return Result{Info: info, Digest: digest, SHA512: sums.SHA512()}, err
}

// SourceDevice is dev, whose reading errors say that the source failed: ErrSource.
func SourceDevice(dev block.Device) block.Device { return sourceDevice{dev} }

type sourceDevice struct{ block.Device }

func (s sourceDevice) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.Device.ReadAt(p, off)
	if err != nil {
		err = fmt.Errorf("%w: %w", err, ErrSource)
	}
	return n, err
}

func (s sourceDevice) Extents(off, n int64) ([]block.Extent, error) {
	list, err := s.Device.Extents(off, n)
	if err != nil {
		err = fmt.Errorf("%w: %w", err, ErrSource)
	}
	return list, err
}

// feedOrdered emits the strides of src that hold data, and hashes all of src in order.
func (c *converter) feedOrdered(ctx context.Context, src block.Device, sums *sums, emit emitter) error {
	r := &rawWriter{src: src, w: sums}
	work := ordered[*rawPiece]{feed: r.feed,
		do: func(p *rawPiece) error {
			if p.zero {
				return nil
			}
			p.buf = c.buffer()
			clear((*p.buf)[p.n:])
			if _, err := src.ReadAt((*p.buf)[:p.n], p.off); err != nil {
				return fmt.Errorf("read %d bytes at %d: %w", p.n, p.off, err)
			}
			return nil
		},
		collect: func(p *rawPiece) error {
			if err := r.put(p); err != nil || p.zero {
				return err
			}
			return emit(p.off, p.buf)
		},
	}
	return work.run(ctx)
}
