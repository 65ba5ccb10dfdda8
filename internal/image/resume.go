package image

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"
)

const (
	// maxFruitless is how many attempts in a row may bring less than fruitBytes before a transfer is given up. There is no limit on those that bring more.
	maxFruitless = 5
	fruitBytes   = 64 << 10
)

// resume says how a broken transfer may go on: by a range, and only if what comes is certain to be of the same file. Certain is what a strong ETag says, a Last-Modified that is older than the answer by a
// second (RFC 9110, 8.8.2.2), or, with neither, a checksum that was given, because it is compared at the end. The hash goes on where it was, so that nothing is read twice. It does not outlive the
// process: a work process that is killed begins anew.
type resume struct {
	possible  bool
	validator string // for If-Range
	total     int64  // of the file; -1 unknown
	fruitless int
	at        int64 // where the last attempt began
}

func newResume(first *http.Response, want Checksum) resume {
	r := resume{total: first.ContentLength}
	if strings.EqualFold(first.Header.Get("Accept-Ranges"), "none") {
		return r
	}
	tag := first.Header.Get("ETag")
	modified, err := http.ParseTime(first.Header.Get("Last-Modified"))
	sent, err2 := http.ParseTime(first.Header.Get("Date"))
	switch {
	case strings.HasPrefix(tag, `"`):
		r.validator = tag
	case err == nil && err2 == nil && sent.Sub(modified) >= time.Second:
		r.validator = first.Header.Get("Last-Modified")
	}
	r.possible = r.validator != "" || want.Hex != ""
	return r
}

// reconnect asks for the rest of the file until it comes, or until there is no hope.
func (h *httpBody) reconnect() error {
	if !h.resume.possible || h.ctx.Err() != nil {
		return h.broken
	}
	if h.off-h.resume.at >= fruitBytes {
		h.resume.fruitless = 0
	}
	h.resume.at = h.off
	for {
		h.drop() //nolint:errcheck // it is broken
		if h.resume.fruitless == maxFruitless {
			return fmt.Errorf("given up after %d attempts to go on at %d: %w: %w", maxFruitless, h.off, h.broken, ErrSource)
		}
		if err := h.wait(); err != nil {
			return err
		}
		h.resume.fruitless++
		err := h.get(h.resume.ask(h.off))
		var again bool
		if err == nil {
			again, err = h.resume.check(h.resp, h.off)
		} else {
			again = !errors.Is(err, ErrSource)
		}
		if err == nil {
			h.broken = nil
			return nil
		}
		h.broken = h.explain(err, ErrTruncated)
		if !again || h.ctx.Err() != nil {
			h.drop() //nolint:errcheck // the error is already there
			return h.broken
		}
	}
}

// wait waits before the next attempt, the first time not at all.
func (h *httpBody) wait() error {
	if h.resume.fruitless == 0 {
		return nil
	}
	timer := time.NewTimer(h.retryDelay << (h.resume.fruitless - 1))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-h.ctx.Done():
		return h.explain(h.ctx.Err(), ErrTruncated)
	}
}

// ask gives the headers that ask for the file from off on.
func (r *resume) ask(off int64) http.Header {
	header := http.Header{"Range": {fmt.Sprintf("bytes=%d-", off)}}
	if r.validator != "" {
		header.Set("If-Range", r.validator)
	}
	return header
}

var errBusy = errors.New("try again")

// check wants exactly the rest of the same file. A server that sends it from its start is refused: its file has changed, or it knows no ranges. again: another attempt may help.
func (r *resume) check(resp *http.Response, off int64) (again bool, err error) {
	switch code := resp.StatusCode; {
	case code == http.StatusOK:
		return false, fmt.Errorf("the transfer broke, and the server sends the file from its start again: it changed, or the server knows no ranges: %w", ErrSource)
	case code == http.StatusTooManyRequests || code >= 500:
		return true, fmt.Errorf("to the rest of the file the server answered %d %s: %w", code, http.StatusText(code), errBusy)
	case code != http.StatusPartialContent:
		return false, fmt.Errorf("the transfer broke, and to the rest of the file the server answered %d %s: %w", code, http.StatusText(code), ErrSource)
	}
	var first, last, total int64
	text := resp.Header.Get("Content-Range")
	if n, err := fmt.Sscanf(text, "bytes %d-%d/%d", &first, &last, &total); n != 3 || err != nil || first != off || last < first || last >= total || r.total >= 0 && r.total != total {
		return false, fmt.Errorf("the transfer broke, and of %d bytes from %d on the server sends %q: %w", r.total, off, text, ErrSource)
	}
	r.total = total
	return false, plainBody(resp)
}
