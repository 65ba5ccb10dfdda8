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
	// Source is an http(s) URL or the absolute path of a regular file.
	Source string
	// Checksum of the file as received; the zero value matches everything.
	Checksum Checksum
	// Format is Auto to go by the first bytes.
	Format Format
	Limits Limits
	// IdleTimeout and RetryDelay: see FetchOptions.
	IdleTimeout, RetryDelay time.Duration
	// Spool and SpoolName say where a file is kept whose content cannot be converted as it arrives (qcow2 from a URL, or a raw file of unknown length). It must not
	// exist, is freed as far as possible while it is converted, and is gone when Import returns.
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
	if isURL(req.Source) {
		result, err = im.fromURL(ctx)
	} else {
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

// fromFile reads raw files once, from start to end. Those of other formats are converted in place, in whatever order their tables say, while
// the sums are made beside it.
func (im *importer) fromFile(ctx context.Context) (Result, error) {
	local, err := openLocal(im.Source, im.limits.FileBytes)
	if err != nil {
		return Result{}, err
	}
	defer local.Close()
	s := local.stream(ctx, im.Checksum, im.limits.FileBytes)
	defer s.Close()
	head, format, err := im.look(s)
	if err != nil {
		return Result{}, err
	}
	var result Result
	if format == Raw {
		result, err = im.streamRaw(ctx, s, head)
	} else {
		result, err = im.convertBeside(ctx, local, format, func(ctx context.Context) error {
			defer s.endWith(ctx)()
			_, err := s.copyTo(io.Discard, nil)
			return err
		})
	}
	if err == nil {
		err = s.sums.check()
	}
	if err == nil {
		err = local.unchanged()
	}
	result.SHA512 = s.sums.SHA512()
	return result, err
}

// fromURL converts raw data as it arrives, if its length is announced, and spools the rest.
func (im *importer) fromURL(ctx context.Context) (Result, error) {
	im.report(Progress{Phase: "fetch", TotalBytes: -1})
	s, err := openURL(ctx, im.Source, FetchOptions{IdleTimeout: im.IdleTimeout, RetryDelay: im.RetryDelay, MaxBytes: im.limits.FileBytes, Checksum: im.Checksum})
	if err != nil {
		return Result{}, err
	}
	defer s.Close()
	head, format, err := im.look(s)
	if err != nil {
		return Result{}, err
	}
	if format == Raw && s.total >= 0 {
		result, err := im.streamRaw(ctx, s, head)
		if err == nil {
			err = s.sums.check()
		}
		result.SHA512 = s.sums.SHA512()
		return result, err
	}
	return im.spool(ctx, s, head, format)
}

// look reads the first bytes of s and says what they are.
func (im *importer) look(s *stream) (head []byte, format Format, err error) {
	head = make([]byte, headBytes)
	n, err := io.ReadFull(s, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, Auto, err
	}
	if n == 0 {
		return nil, Auto, fmt.Errorf("%s: the file is empty: %w", s.name, ErrFormat)
	}
	format, err = resolve(im.Format, head[:n])
	if err != nil {
		return nil, Auto, fmt.Errorf("%s: %w", s.name, err)
	}
	return head[:n], format, nil
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
			return fmt.Errorf("%s: more than the announced %d bytes: %w", s.name, s.total, ErrSource)
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

// spool keeps the rest of s in a file, verifies it, and converts that.
func (im *importer) spool(ctx context.Context, s *stream, head []byte, format Format) (result Result, err error) {
	if im.Spool == nil {
		return Result{}, fmt.Errorf("%s: %s from a URL needs a place to keep the file: %w", s.name, format, ErrUnsupported)
	}
	f, err := im.Spool.Create(im.SpoolName, max(0, s.total))
	if err != nil {
		return Result{}, fmt.Errorf("spool: %w", err)
	}
	defer func() {
		// Nobody can use the spool after us, so nothing else is lost with an error here; it is reported because the disk is then worth a look.
		if e := errors.Join(f.Close(), im.Spool.Remove(im.SpoolName)); e != nil && err == nil {
			err = fmt.Errorf("remove spool: %w", e)
		}
	}()
	w := io.NewOffsetWriter(f, 0)
	if _, err := w.Write(head); err != nil {
		return Result{}, fmt.Errorf("spool: %w", err)
	}
	_, err = s.copyTo(w, func(done, total int64) {
		percent := 0
		if total > 0 {
			percent = int(float64(done) / float64(total) * fetchPercent)
		}
		im.report(Progress{Phase: "fetch", DoneBytes: done, TotalBytes: total, Percent: min(percent, fetchPercent)})
	})
	if err == nil {
		err = s.sums.check()
	}
	if err != nil {
		return Result{}, fmt.Errorf("spool: %w", err)
	}
	img, err := openAs(ctx, f, format, openOptions{limits: im.limits, freeing: true})
	if err != nil {
		return Result{}, err
	}
	result, err = im.convert(ctx, img, fetchPercent, img.free)
	result.SHA512 = s.sums.SHA512()
	return result, err
}
