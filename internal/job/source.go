package job

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/image"
	"ashlar/internal/nbd"
)

const streamScheme = "stream+unix"

// isNBD tells an NBD URI by its scheme.
func isNBD(source string) bool {
	scheme, _, found := strings.Cut(source, "://")
	scheme = strings.ToLower(scheme)
	return found && (scheme == "nbd" || strings.HasPrefix(scheme, "nbd+") || scheme == "nbds" || strings.HasPrefix(scheme, "nbds+"))
}

// isStream tells stream+unix:///PATH.
func isStream(source string) bool { return strings.HasPrefix(source, streamScheme+"://") }

// onStream tells whether somebody feeds the work, or takes what it makes, while it runs.
func (s *Spec) onStream() bool {
	return s.Import != nil && isStream(s.Import.Source) || s.Export != nil && isStream(s.Export.To)
}

// streamPath is the socket's path; ErrSpec if that is not all there is.
func streamPath(source string) (string, error) {
	u, err := url.Parse(source)
	if err != nil || u.Scheme != streamScheme || u.Host != "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || !filepath.IsAbs(u.Path) || strings.ContainsRune(u.Path, 0) {
		return "", fmt.Errorf("%.200q: want %s:///PATH: %w", source, streamScheme, ErrSpec)
	}
	return u.Path, nil
}

// dialNBD opens an export to be read. It is closed when ctx ends, so that no read waits longer; stop closes it otherwise.
func dialNBD(ctx context.Context, uri string) (dev *nbd.Client, stop func(), err error) {
	dev, err = nbd.Dial(ctx, uri, nbd.ClientOptions{ReadOnly: true})
	if err != nil {
		if ctx.Err() != nil {
			return nil, nil, context.Cause(ctx)
		}
		return nil, nil, fmt.Errorf("%s: %w: %w", image.DisplaySource(uri), err, image.ErrSource)
	}
	release := context.AfterFunc(ctx, func() { dev.Close() }) //nolint:errcheck // nothing was written
	return dev, func() {
		release()
		dev.Close() //nolint:errcheck // nothing was written
	}, nil
}

// dialStream connects to the socket of a stream.
func dialStream(ctx context.Context, address string) (net.Conn, error) {
	path, err := streamPath(address)
	if err != nil {
		return nil, err
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("stream: %w: %w", err, image.ErrSource)
	}
	return conn, nil
}

// streamSource reads a stream's file. The sender may be silent for idle.
type streamSource struct {
	conn net.Conn
	r    *client.StreamReader
	idle time.Duration
}

func newStreamSource(conn net.Conn, idle time.Duration) *streamSource {
	if idle <= 0 {
		idle = image.DefaultIdleTimeout
	}
	return &streamSource{conn: conn, r: client.NewStreamReader(conn), idle: idle}
}

// Read gives io.EOF only after the sender's end mark.
func (s *streamSource) Read(p []byte) (int, error) {
	if err := s.conn.SetReadDeadline(time.Now().Add(s.idle)); err != nil {
		return 0, fmt.Errorf("stream: %w: %w", err, image.ErrSource)
	}
	n, err := s.r.Read(p)
	switch {
	case err == nil || err == io.EOF:
		return n, err
	case errors.Is(err, client.ErrStreamCut):
		return n, fmt.Errorf("stream: the sender went away: %w: %w", err, image.ErrTruncated)
	case errors.Is(err, client.ErrStreamFormat):
		return n, fmt.Errorf("stream: %w: %w", err, image.ErrFormat)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return n, fmt.Errorf("stream: the sender sent nothing for %v: %w", s.idle, image.ErrStalled)
	}
	return n, fmt.Errorf("stream: %w: %w", err, image.ErrSource)
}

func (s *streamSource) Close() error { return s.conn.Close() }

// openSource gives request what it must read, if image does not open it by itself. stop is called when the import is over.
func (i *Import) openSource(ctx context.Context, request *image.Request) (stop func(), err error) {
	switch {
	case isNBD(i.Source):
		dev, stop, err := dialNBD(ctx, i.Source)
		if err != nil {
			return nil, err
		}
		request.Device, request.Source = dev, image.DisplaySource(i.Source)
		return stop, nil
	case isStream(i.Source):
		conn, err := dialStream(ctx, i.Source)
		if err != nil {
			return nil, err
		}
		request.Reader, request.ReaderBytes, request.Source = newStreamSource(conn, request.IdleTimeout), i.SizeBytes, "stream"
		if i.SizeBytes == 0 {
			request.ReaderBytes = -1
		}
		return func() { conn.Close() }, nil //nolint:errcheck // it was read
	}
	return func() {}, nil
}
