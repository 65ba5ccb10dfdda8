package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Wrapper names what a whole image file is packed in.
type Wrapper string

const (
	// Unwrapped files are their content.
	Unwrapped Wrapper = ""
	// Gzip files have one member or several.
	Gzip Wrapper = "gzip"
	// XZ files have one stream or several, and may be padded.
	XZ Wrapper = "xz"
	// Zstd files have one frame or several.
	Zstd Wrapper = "zstd"
)

// maxWindowBytes is the history an unpacker may keep: what "xz -9" takes twice, and what "zstd --long" takes.
const maxWindowBytes = 128 << 20

// DetectWrapper tells by its first bytes what a file is packed in.
func DetectWrapper(head []byte) Wrapper {
	for _, w := range []struct {
		magic   string
		wrapper Wrapper
	}{{"\x1f\x8b", Gzip}, {xzMagic, XZ}, {"\x28\xb5\x2f\xfd", Zstd}} {
		if bytes.HasPrefix(head, []byte(w.magic)) {
			return w.wrapper
		}
	}
	return Unwrapped
}

// unwrapper reads the content of a packed stream. It is not believed: it may become no more than Limits.Expand times what was received, beyond the first GiB, and the file's own checks
// are compared. Everything of the stream is read: what follows the packed file is an error, not left behind.
type unwrapper struct {
	s       *stream
	wrapper Wrapper
	limits  Limits
	read    io.Reader
	close   func()
	wireErr error // what the stream said, other than its end
	done    int64 // content so far
	free    int64 // of it, does not count for Limits.Expand
}

// newUnwrapper unpacks r, which is all of s from its first byte on.
func newUnwrapper(s *stream, r io.Reader, wrapper Wrapper, limits Limits) (*unwrapper, error) {
	u := &unwrapper{s: s, wrapper: wrapper, limits: limits, close: func() {}, free: freeExpandBytes}
	wire := wireReader{u, r}
	var err error
	switch wrapper {
	case Gzip:
		u.read, err = gzip.NewReader(wire)
	case XZ:
		u.read = newXZReader(wire)
	case Zstd:
		var d *zstd.Decoder
		// One at a time means: in our goroutine. With more it would read the stream in another, while we look at how far that is.
		d, err = zstd.NewReader(wire, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxWindowBytes), zstd.WithDecoderMaxWindow(maxWindowBytes))
		if err == nil {
			u.read, u.close = d, d.Close
		}
	}
	if err != nil {
		return nil, u.explain(err)
	}
	return u, nil
}

// wireReader remembers why the stream failed, because unpackers make other errors of it.
type wireReader struct {
	u *unwrapper
	r io.Reader
}

func (w wireReader) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if err != nil && err != io.EOF {
		w.u.wireErr = err
	}
	return n, err
}

// Read gives the content; io.EOF only when the packed file was whole and nothing follows it.
func (u *unwrapper) Read(p []byte) (int, error) {
	n, err := u.read.Read(p)
	u.done += int64(n)
	if over := u.done - u.free; over > 0 && over/u.limits.Expand > max(u.s.total, u.s.done) {
		return n, fmt.Errorf("%s: it unpacks to more than %d times its %d bytes: %w", u.s.name, u.limits.Expand, max(u.s.total, u.s.done), ErrTooLarge)
	}
	if u.done > u.limits.FileBytes {
		return n, fmt.Errorf("%s: it unpacks to more than %d bytes: %w", u.s.name, u.limits.FileBytes, ErrTooLarge)
	}
	if err == nil || err == io.EOF {
		return n, err
	}
	return n, u.explain(err)
}

// explain makes a sentinel of what an unpacker says.
func (u *unwrapper) explain(err error) error {
	var sentinel error
	switch {
	case u.wireErr != nil:
		return u.wireErr
	case errors.Is(err, ErrFormat), errors.Is(err, ErrUnsupported), errors.Is(err, ErrTooLarge):
		return fmt.Errorf("%s: %w", u.s.name, err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF): // not passed on: readers above us must not take it for an end
		return fmt.Errorf("%s: the %s data ends after %d bytes, before its own end: %w", u.s.name, u.wrapper, u.s.done, ErrTruncated)
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		sentinel = ErrTooLarge
	default:
		sentinel = ErrFormat
	}
	return fmt.Errorf("%s: unpack %s at %d: %w: %w", u.s.name, u.wrapper, u.s.done, err, sentinel)
}
