package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	maxRedirects = 10
	userAgent    = "ashlar"
)

// httpBody is a file on a server, through as many answers as it takes.
type httpBody struct {
	*stream
	ctx        context.Context // ended by stream.abort
	url        *url.URL
	transport  *http.Transport
	idle       time.Duration
	retryDelay time.Duration

	resp   *http.Response
	end    context.CancelCauseFunc // of the answer that is being read; ErrStalled if it was the watch
	answer context.Context         // what end ends
	watch  *time.Timer             // calls end; runs only while we wait for the server, not while it waits for us
	off    int64                   // read so far
	broken error                   // why the answer ended early; nil while it goes on
	resume resume
}

// openURL sends the request and checks the answer's head. Proxies are taken from the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY), at most 10 redirects are followed, and no Referer is sent to the new place. A
// transfer that breaks is continued where it broke, if the server can and the file is certain to be the same (see resume.go).
//
// Errors, here and while it is read: ErrSource if there is no connection, the answer is not 200 with a plain body, or a broken transfer cannot be continued, ErrStalled, ErrTruncated if the body ends early, ErrTooLarge,
// and ctx's own.
func openURL(ctx context.Context, address string, o fetchOptions) (*stream, error) {
	u, err := parseURL(address)
	if err != nil {
		return nil, err
	}
	s := &stream{name: displayURL(u), sums: newSums(o.Checksum), max: Limits{FileBytes: o.MaxBytes}.withDefaults().FileBytes}
	h := &httpBody{stream: s, url: u, transport: newTransport(), idle: o.IdleTimeout, retryDelay: o.RetryDelay}
	if h.idle <= 0 {
		h.idle = DefaultIdleTimeout
	}
	if h.retryDelay <= 0 {
		h.retryDelay = DefaultRetryDelay
	}
	h.ctx, s.abort = context.WithCancelCause(ctx)
	s.close, s.read = h.close, h.read
	if err = h.get(nil); err == nil {
		err = s.accept(h.resp)
	}
	if err != nil {
		err = h.explain(err, ErrSource)
		h.close()
		return nil, err
	}
	h.resume = newResume(h.resp, s.sums.want)
	return s, nil
}

func (h *httpBody) close() error {
	err := h.drop()
	h.abort(nil)
	h.transport.CloseIdleConnections()
	return err
}

// drop ends the answer that is being read.
func (h *httpBody) drop() (err error) {
	if h.end == nil {
		return nil
	}
	h.watch.Stop()
	h.end(nil) // first: closing a body would otherwise wait for some of the rest
	if h.resp != nil {
		err = h.resp.Body.Close()
	}
	h.end, h.resp = nil, nil
	return err
}

// read reads on; where the answer broke it asks for the rest.
func (h *httpBody) read(p []byte) (int, error) {
	for {
		if h.broken != nil {
			if err := h.reconnect(); err != nil {
				return 0, err
			}
		}
		h.watch.Reset(h.idle)
		n, err := h.resp.Body.Read(p)
		h.watch.Stop()
		h.off += int64(n)
		if err == io.EOF && h.resume.total >= 0 && h.off < h.resume.total {
			err = io.ErrUnexpectedEOF
		}
		if err == nil || err == io.EOF {
			return n, err
		}
		h.broken = h.explain(err, ErrTruncated)
		if n > 0 {
			return n, nil
		}
	}
}

// explain finds the reason behind an error of net/http: a stall, the caller's cancellation, or otherwise.
func (h *httpBody) explain(err error, otherwise error) error {
	cause := context.Cause(h.ctx)
	switch {
	case cause == nil && h.answer != nil && context.Cause(h.answer) == ErrStalled:
		return fmt.Errorf("%s: no data for %v, after %d bytes: %w", h.name, h.idle, h.off, ErrStalled)
	case errors.Is(err, ErrSource), errors.Is(err, ErrTooLarge), errors.Is(err, ErrUnsupported):
		return fmt.Errorf("%s: %w", h.name, err)
	case cause != nil:
		return fmt.Errorf("%s: %w", h.name, cause)
	}
	var e *url.Error
	if errors.As(err, &e) {
		err = e.Err // its own message repeats the whole URL
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) { // readers above us must not take it for the file's end
		return fmt.Errorf("%s: the connection ended after %d bytes: %w", h.name, h.off, otherwise)
	}
	return fmt.Errorf("%s: after %d bytes: %w: %w", h.name, h.off, err, otherwise)
}

func newTransport() *http.Transport {
	return &http.Transport{
		Proxy:              http.ProxyFromEnvironment,
		DialContext:        (&net.Dialer{KeepAlive: 15 * time.Second}).DialContext,
		ForceAttemptHTTP2:  true,
		DisableCompression: true, // the checksum is of the file, not of what it becomes on the way
	}
}

// get asks for the file, with more headers, under a watch of its own.
func (h *httpBody) get(more http.Header) error {
	h.answer, h.end = context.WithCancelCause(h.ctx)
	end := h.end
	h.watch = time.AfterFunc(h.idle, func() { end(ErrStalled) })
	defer h.watch.Stop()
	req, err := http.NewRequestWithContext(h.answer, http.MethodGet, h.url.String(), nil)
	if err != nil {
		return fmt.Errorf("%w: %w", err, ErrSource)
	}
	for name, values := range more {
		req.Header[name] = values
	}
	req.Header.Set("User-Agent", userAgent)
	client := http.Client{Transport: h.transport, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) > maxRedirects {
			return fmt.Errorf("more than %d redirects: %w", maxRedirects, ErrSource)
		}
		req.Header.Del("Referer") // it would carry our URL, perhaps a signed one, to somebody else
		if req.URL.Scheme != "http" && req.URL.Scheme != "https" {
			return fmt.Errorf("redirected to scheme %q: %w", req.URL.Scheme, ErrSource)
		}
		return nil
	}}
	h.resp, err = client.Do(req)
	return err
}

// accept wants an answer of 200 with a body whose end can be recognised.
func (s *stream) accept(resp *http.Response) error {
	s.total = resp.ContentLength
	chunked := len(resp.TransferEncoding) > 0 || resp.ProtoMajor >= 2
	switch {
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("the server answered %d %s: %w", resp.StatusCode, http.StatusText(resp.StatusCode), ErrSource)
	case s.total > s.max:
		return fmt.Errorf("the file is %d bytes, the limit is %d: %w", s.total, s.max, ErrTooLarge)
	case s.total < 0 && !chunked && s.sums.want.Hex == "":
		return fmt.Errorf("the server does not tell the file's length, so that a cut cannot be seen; give a checksum: %w", ErrSource)
	}
	return plainBody(resp)
}

// plainBody wants the file's bytes and not what they were made into for the way.
func plainBody(resp *http.Response) error {
	if encoding := resp.Header.Get("Content-Encoding"); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return fmt.Errorf("the server packs the file on the way (Content-Encoding %q): %w", encoding, ErrSource)
	}
	return nil
}
