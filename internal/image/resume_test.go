package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// breaker is a server of one file that breaks each answer after some bytes.
type breaker struct {
	file      []byte
	each      int    // bytes of an answer; 0: all
	etag      string // for the first answers
	modified  time.Time
	noRanges  bool
	changes   bool              // the file is another from the second answer on
	length    bool              // the first answer says its length; else it is chunked
	answer    func(i int) int   // status of the i-th answer, 0: as usual
	rangeText func(off int) int // where a range begins that was asked for at off
	stall     bool              // instead of breaking

	mu   sync.Mutex // guards from
	from []int      // where each answer began
	gone chan struct{}
}

func (b *breaker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	i := len(b.from)
	off := 0
	if text := r.Header.Get("Range"); text != "" {
		if n, err := fmt.Sscanf(text, "bytes=%d-", &off); n != 1 || err != nil {
			panic(text)
		}
	}
	b.from = append(b.from, off)
	b.mu.Unlock()
	if b.answer != nil {
		if code := b.answer(i); code != 0 {
			w.WriteHeader(code)
			return
		}
	}
	tag := b.etag
	if b.changes && i > 0 {
		tag = `"other"`
	}
	if tag != "" {
		w.Header().Set("ETag", tag)
	}
	if !b.modified.IsZero() {
		w.Header().Set("Last-Modified", b.modified.UTC().Format(http.TimeFormat))
	}
	condition := r.Header.Get("If-Range")
	if off > 0 && !b.noRanges && (condition == "" || condition == tag || condition == w.Header().Get("Last-Modified")) {
		if b.rangeText != nil {
			off = b.rangeText(off)
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, len(b.file)-1, len(b.file)))
		w.Header().Set("Content-Length", strconv.Itoa(len(b.file)-off))
		w.WriteHeader(http.StatusPartialContent)
	} else {
		off = 0
		if b.length {
			w.Header().Set("Content-Length", strconv.Itoa(len(b.file)))
		}
	}
	rest := b.file[off:]
	if b.each == 0 || len(rest) <= b.each {
		w.Write(rest)
		return
	}
	w.Write(rest[:b.each])
	w.(http.Flusher).Flush()
	if b.stall {
		select {
		case <-r.Context().Done():
		case <-b.gone:
		}
	}
	panic(http.ErrAbortHandler)
}

// TestResume: a transfer that breaks, or stalls, goes on where it broke, if the file is certain to be the same, and otherwise ends with an error, never silently from the start.
func TestResume(t *testing.T) {
	file := rawSample()
	qcow2 := goldenFiles(t)["v3"]
	sum := Checksum{"sha512", sha512Hex(file)}
	old := time.Now().Add(-time.Hour)
	for _, c := range []struct {
		name    string
		b       *breaker
		sum     Checksum
		answers int // how many it takes
		want    []error
	}{
		{"etag", &breaker{file: file, each: 1 << 20, etag: `"a"`, length: true}, Checksum{}, 4, nil},
		{"etag and checksum", &breaker{file: file, each: 1 << 20, etag: `"a"`, length: true}, sum, 4, nil},
		{"wrong checksum", &breaker{file: file, each: 1 << 20, etag: `"a"`, length: true}, Checksum{"sha512", strings.Repeat("ab", 64)}, 4, []error{ErrChecksum}},
		{"chunked", &breaker{file: file, each: 1 << 20, etag: `"a"`}, Checksum{}, 4, nil},
		{"spooled", &breaker{file: qcow2, each: 100_000, etag: `"a"`, length: true}, Checksum{}, (len(qcow2) + 99_999) / 100_000, nil},
		{"last-modified", &breaker{file: file, each: 1 << 20, modified: old, length: true}, Checksum{}, 4, nil},
		{"modified just now", &breaker{file: file, each: 1 << 20, modified: time.Now().Add(time.Minute), length: true}, Checksum{}, 1, []error{ErrTruncated}},
		{"weak etag", &breaker{file: file, each: 1 << 20, etag: `W/"a"`, length: true}, Checksum{}, 1, []error{ErrTruncated}},
		{"checksum only", &breaker{file: file, each: 1 << 20, length: true}, sum, 4, nil},
		{"nothing", &breaker{file: file, each: 1 << 20, length: true}, Checksum{}, 1, []error{ErrTruncated}},
		{"stalls", &breaker{file: file, each: 2 << 20, etag: `"a"`, length: true, stall: true}, Checksum{}, 2, nil},
		{"changes", &breaker{file: file, each: 1 << 20, etag: `"a"`, length: true, changes: true}, Checksum{}, 2, []error{ErrSource}},
		{"no ranges", &breaker{file: file, each: 1 << 20, etag: `"a"`, length: true, noRanges: true}, sum, 2, []error{ErrSource}},
		{"another range", &breaker{file: file, each: 1 << 20, etag: `"a"`, length: true, rangeText: func(off int) int { return off - 4096 }}, sum, 2, []error{ErrSource}},
		{"gone", &breaker{file: file, each: 1 << 20, etag: `"a"`, length: true, answer: func(i int) int { return []int{0, 404}[min(i, 1)] }}, sum, 2, []error{ErrSource}},
		{"busy for a while", &breaker{file: file, each: 2 << 20, etag: `"a"`, length: true, answer: func(i int) int { return []int{0, 503, 429, 0}[min(i, 3)] }}, sum, 4, nil},
		{"busy for ever", &breaker{file: file, each: 1 << 20, etag: `"a"`, length: true, answer: func(i int) int { return []int{0, 503}[min(i, 1)] }}, sum, 1 + maxFruitless, []error{ErrSource, ErrTruncated}},
		{"a few bytes each time", &breaker{file: file, each: 100, etag: `"a"`, length: true}, sum, 1 + maxFruitless, []error{ErrSource, ErrTruncated}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.b.gone = make(chan struct{})
			base := serve(t, c.b.ServeHTTP)
			defer close(c.b.gone)
			_, got, err := imported(t.Context(), t, Request{Source: base, Checksum: c.sum, RetryDelay: time.Millisecond, IdleTimeout: map[bool]time.Duration{true: 300 * time.Millisecond}[c.b.stall]})
			if len(c.want) == 0 && err != nil {
				t.Fatal(err)
			}
			for _, want := range c.want {
				if !errors.Is(err, want) {
					t.Errorf("got %v, want %v", err, want)
				}
			}
			if err == nil && c.name != "spooled" && !bytes.Equal(got, padded(file)) {
				t.Error("the disk differs")
			}
			if len(c.b.from) != c.answers {
				t.Errorf("answers from %v, want %d of them", c.b.from, c.answers)
			}
			for i := 1; i < len(c.b.from); i++ {
				if c.b.from[i] == 0 {
					t.Errorf("asked from the start again: %v", c.b.from)
				}
			}
		})
	}
}

// TestResumeCancelled: the wait before an attempt ends with the caller.
func TestResumeCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var answers atomic.Int32
	b := &breaker{file: rawSample(), each: 1 << 20, etag: `"a"`, length: true, answer: func(i int) int {
		if answers.Add(1) == 2 {
			cancel()
			return 503
		}
		return 0
	}}
	_, _, err := imported(ctx, t, Request{Source: serve(t, b.ServeHTTP), RetryDelay: time.Hour})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}
