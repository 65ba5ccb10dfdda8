package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"ashlar/internal/disk"
)

const (
	// DefaultIdleTimeout is how long a source may send nothing.
	DefaultIdleTimeout = 30 * time.Second
	// DefaultRetryDelay is what is waited before the second attempt to go on with a broken transfer; it doubles with each further one.
	DefaultRetryDelay = 500 * time.Millisecond
)

// fetchOptions says how to treat a server.
type fetchOptions struct {
	// IdleTimeout is how long the server may send nothing, at the start and in between; there is no limit on the whole. 0 means DefaultIdleTimeout.
	IdleTimeout time.Duration
	// RetryDelay: see DefaultRetryDelay, which 0 means.
	RetryDelay time.Duration
	// MaxBytes is the most that is taken; 0 means the default of Limits.FileBytes.
	MaxBytes int64
	// Checksum is compared at the end; the zero value matches everything.
	Checksum Checksum
}

// stream is an open source, hashed as it is read.
type stream struct {
	name  string // for messages: no password, no query
	total int64  // announced length, -1 if unknown
	sums  *sums
	max   int64
	done  int64
	read  func([]byte) (int, error)
	abort context.CancelCauseFunc // ends a Read that waits; it then fails with the cause
	close func() error
}

// Read gives ErrTooLarge when more than the limit arrives, and ErrTruncated when less than was announced does.
func (s *stream) Read(p []byte) (int, error) {
	n, err := s.read(p)
	s.done += int64(n)
	s.sums.Write(p[:n])
	switch {
	case s.total >= 0 && s.done > s.total:
		return n, fmt.Errorf("%s: more than the announced %d bytes: %w", s.name, s.total, ErrTooLarge)
	case s.done > s.max:
		return n, fmt.Errorf("%s: more than %d bytes: %w", s.name, s.max, ErrTooLarge)
	case err == io.ErrUnexpectedEOF, err == io.EOF && s.total >= 0 && s.done < s.total:
		return n, fmt.Errorf("%s: the source ended after %d of %d bytes: %w", s.name, s.done, s.total, ErrTruncated)
	}
	return n, err
}

// Close ends the transfer.
func (s *stream) Close() error { return s.close() }

// endWith makes a Read that waits give up when ctx ends; the result takes that back.
func (s *stream) endWith(ctx context.Context) (stop func() bool) {
	return context.AfterFunc(ctx, func() { s.abort(context.Cause(ctx)) })
}

// isURL tells a URL from a path: a path never has "://" before its first slash.
func isURL(source string) bool {
	scheme, _, found := strings.Cut(source, "://")
	return found && !strings.Contains(scheme, "/")
}

// parseURL takes http and https only.
func parseURL(address string) (*url.URL, error) {
	u, err := url.Parse(address)
	if err != nil {
		var e *url.Error
		if errors.As(err, &e) {
			err = e.Err // without the URL, which may hold a password
		}
		return nil, fmt.Errorf("image URL: %w: %w", err, ErrSource)
	}
	if u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("image URL with scheme %q: want http or https: %w", u.Scheme, ErrUnsupported)
	}
	if u.Host == "" {
		return nil, fmt.Errorf("image URL %s names no host: %w", displayURL(u), ErrSource)
	}
	return u, nil
}

// displayURL is a URL without what may be secret: user, password, query (signed URLs) and fragment.
func displayURL(u *url.URL) string {
	shown := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}
	return shown.String()
}

// localFile is a file of this machine that a user named.
type localFile struct {
	disk.File
	path string
	info fs.FileInfo
}

// openLocal opens a regular file by its absolute path; symbolic links are followed, by name once.
func openLocal(path string, maxBytes int64) (*localFile, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("image file %q: want an absolute path, or an http(s) URL: %w", path, ErrSource)
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("image file: %w: %w", err, ErrSource)
	}
	info, err := os.Lstat(real)
	if err != nil {
		return nil, fmt.Errorf("image file: %w: %w", err, ErrSource)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("image file %s is no regular file (%s): %w", path, info.Mode().Type(), ErrSource)
	}
	if info.Size() > maxBytes {
		return nil, fmt.Errorf("image file %s is %d bytes, the limit is %d: %w", path, info.Size(), maxBytes, ErrTooLarge)
	}
	dir, err := disk.OpenReal(filepath.Dir(real), disk.RealOptions{})
	if err != nil {
		return nil, fmt.Errorf("image file: %w: %w", err, ErrSource)
	}
	f, err := dir.OpenRead(filepath.Base(real))
	if err := errors.Join(err, dir.Close()); err != nil {
		return nil, fmt.Errorf("image file: %w: %w", err, ErrSource)
	}
	return &localFile{File: f, path: real, info: info}, nil
}

// unchanged is asked after everything was read: the sums and the content were read at different times and must belong together.
func (l *localFile) unchanged() error {
	now, err := os.Lstat(l.path)
	if err != nil {
		return fmt.Errorf("image file: %w: %w", err, ErrSource)
	}
	if !os.SameFile(now, l.info) || now.Size() != l.info.Size() || !now.ModTime().Equal(l.info.ModTime()) {
		return fmt.Errorf("image file %s changed while it was read: %w", l.path, ErrSource)
	}
	return nil
}

// stream reads the file from its start.
func (l *localFile) stream(ctx context.Context, want Checksum, maxBytes int64) *stream {
	ctx, cancel := context.WithCancelCause(ctx)
	r := io.NewSectionReader(l.File, 0, l.info.Size())
	return &stream{name: l.path, total: l.info.Size(), sums: newSums(want), max: maxBytes, abort: cancel,
		close: func() error { cancel(nil); return nil },
		read: func(p []byte) (int, error) {
			if err := context.Cause(ctx); err != nil {
				return 0, err
			}
			return r.Read(p)
		}}
}

// DisplaySource is a source as it may be shown and stored: a URL without user, password, query and fragment, where signed URLs keep their secrets; a path
// as it is; nothing for a URL that makes no sense.
func DisplaySource(source string) string {
	if !isURL(source) {
		return source
	}
	u, err := url.Parse(source)
	if err != nil {
		return ""
	}
	return displayURL(u)
}
