package api

import (
	"bufio"
	"cmp"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/klauspost/compress/gzip"

	"ashlar/internal/catalog"
)

// The formats of downloads and exports.
const (
	formatRaw   = "raw"
	formatQcow2 = "qcow2"
)

// Headers of downloads.
const (
	// HeaderSHA512 is the SHA-512 of the file in hex, of what is inside where the body is gzip: a header where it is known before, else a trailer.
	HeaderSHA512 = "Ashlar-Sha512"
	// HeaderSize is the file's size in bytes where it is known and Content-Length cannot say it, because a trailer follows.
	HeaderSize = "Ashlar-Size"
)

// downloadIdle is how long a client may take none of the bytes of a download.
const downloadIdle = 2 * time.Minute

// mediaBytes is the content type of downloads, and of uploads that are not forms.
const mediaBytes = "application/octet-stream"

// download is one body to be sent.
type download struct {
	kind, name, snapshot, format string
	file                         string // what a browser shall call it
	gzip                         bool
	key                          string // under which its checksum is remembered; "": it may change
	size                         int64  // for HEAD; -1: not known
}

func (h *Handler) imageDownloadWay() way {
	return way{
		path: "/{name}/download", about: "The image's content as a file: gzip of raw, or uncompressed in a format.", do: h.imageDownload, head: true, media: []string{mediaBytes},
		query: []param{
			{name: "format", about: "nothing: gzip of raw, as the dialect has it", options: []string{formatRaw, formatQcow2}},
			{name: "forV2Creation", about: "true: raw (the dialect's name for it)", options: []string{"true", "false"}},
		},
	}
}

func (h *Handler) volumeDownloadWay() way {
	return way{
		path: "/{name}/download", about: "A volume's content as a file: that of a snapshot, or the present.", do: h.volumeDownload, head: true, media: []string{mediaBytes},
		query: []param{
			{name: "format", about: "raw when it is missing", options: []string{formatRaw, formatQcow2}},
			{name: "snapshot", about: "nothing: the present, of which a snapshot is taken for the time"},
		},
	}
}

// imageDownload sends an image's content.
func (h *Handler) imageDownload(c *call) (any, error) {
	q := c.r.URL.Query()
	format := q.Get("format")
	if format == "" && q.Get("forV2Creation") == "true" {
		format = formatRaw
	}
	if format != "" && format != formatRaw && format != formatQcow2 {
		return nil, Failure(CodeInvalid, "image %s: there is no format %s; use raw or qcow2, or nothing for gzip of raw", quote(c.id), quote(format))
	}
	v, err := h.loadImage(c.r.Context(), c.id)
	if err != nil {
		return nil, err
	}
	if v.wanted.Deleted != nil || !v.in(catalog.ImageReady) {
		return nil, Failure(CodeConflict, "image %s is not ready on any disk: there is nothing to download yet", c.id)
	}
	d := download{kind: "image", name: c.id, format: cmp.Or(format, formatRaw), gzip: format == "", file: c.id + "." + format, size: -1}
	if d.gzip {
		short, _, _ := strings.Cut(c.id, "-")
		d.file = short + ".gz"
	}
	if d.format == formatRaw {
		d.size = v.observed.VirtualSizeBytes
	}
	d.key = v.wanted.ID + "." + d.format
	node, err := h.nodeWithCopy(c.r.Context(), v, catalog.ImageReady)
	if err != nil {
		return nil, err
	}
	return h.download(c, d, node)
}

// in tells whether the image is in a state on some disk.
func (v imageView) in(state string) bool {
	for _, d := range v.observed.Disks {
		if d.State == state {
			return true
		}
	}
	return false
}

// volumeDownload sends a volume's content.
func (h *Handler) volumeDownload(c *call) (any, error) {
	q := c.r.URL.Query()
	d := download{kind: "volume", name: c.id, snapshot: q.Get("snapshot"), format: cmp.Or(q.Get("format"), formatRaw), size: -1}
	if d.format != formatRaw && d.format != formatQcow2 {
		return nil, Failure(CodeInvalid, "volume %s: there is no format %s; use raw or qcow2", quote(c.id), quote(d.format))
	}
	if d.snapshot == headName {
		d.snapshot = ""
	}
	v, err := h.loadVolume(c.r.Context(), c.id)
	if err != nil {
		return nil, err
	}
	if err := wantSnapshot(v, d.snapshot); err != nil {
		return nil, err
	}
	d.file = c.id + "." + d.format
	if d.snapshot != "" {
		d.file = c.id + "-" + d.snapshot + "." + d.format
	}
	if d.format == formatRaw && d.snapshot == "" {
		d.size = v.sizeBytes()
	}
	return h.download(c, d, v.nodeOfVolume())
}

// download sends a body. What goes wrong before the first byte is an answer like any other; afterwards the connection is broken, so that no client takes a part for the
// whole. node has it, as far as the records say; the agent may know better.
func (h *Handler) download(c *call, d download, node string) (any, error) {
	what := "the download of " + d.kind + " " + d.name
	switch {
	case h.elsewhere(c.r, node):
		return h.forward(c, node, what)
	case h.cfg.Extra == nil:
		return nil, missing("download")
	}
	header := c.w.Header()
	sum := h.sums.get(d.key)
	if c.r.Method == http.MethodHead {
		d.describe(header, sum)
		if d.size >= 0 && !d.gzip {
			header.Set("Content-Length", strconv.FormatInt(d.size, 10))
		}
		c.w.WriteHeader(http.StatusOK)
		return sent{}, nil
	}
	body, size, err := h.cfg.Extra.Download(c.r.Context(), d.kind, d.name, d.snapshot, d.format)
	if err != nil {
		return h.orForward(c, err, what)
	}
	// What was read is checked by what came, not by how its source closes.
	defer body.Close()
	in := bufio.NewReaderSize(body, 256<<10)
	if _, err := in.Peek(1); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	d.describe(header, sum)
	trailer := sum == "" && (d.gzip || size < 0 || wantsTrailer(c.r))
	switch {
	case trailer:
		header.Set("Trailer", HeaderSHA512)
	case size >= 0 && !d.gzip:
		header.Set("Content-Length", strconv.FormatInt(size, 10))
	}
	if size >= 0 && (trailer || d.gzip) {
		header.Set(HeaderSize, strconv.FormatInt(size, 10))
	}
	c.w.WriteHeader(http.StatusOK)
	got, err := copyOut(c.w, in, size, d.gzip)
	if err != nil {
		h.cfg.Log.Warn("a download broke off", "kind", d.kind, "name", d.name, "format", d.format, "error", err)
		panic(http.ErrAbortHandler)
	}
	if trailer {
		header.Set(HeaderSHA512, got)
	}
	h.sums.put(d.key, got)
	// The deadline would stay with the connection, which may serve another request.
	_ = http.NewResponseController(c.w).SetWriteDeadline(time.Time{})
	return sent{}, nil
}

// describe sets the headers that do not depend on how the body is sent.
func (d download) describe(header http.Header, sum string) {
	header.Set("Content-Type", mediaBytes)
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Content-Disposition", "attachment; filename="+d.file)
	header.Set("Accept-Ranges", "none")
	if sum != "" {
		header.Set(HeaderSHA512, sum)
	}
}

// wantsTrailer tells whether a client said that it reads trailers (RFC 9110 6.5.1). To others Content-Length is worth more.
func wantsTrailer(r *http.Request) bool {
	for te := range strings.SplitSeq(r.Header.Get("TE"), ",") {
		if strings.EqualFold(strings.TrimSpace(te), "trailers") {
			return true
		}
	}
	return false
}

// copyOut sends a body of size bytes (-1: not known) and returns the SHA-512 of what was read.
func copyOut(w http.ResponseWriter, in io.Reader, size int64, zip bool) (string, error) {
	var out io.Writer = &deadlineWriter{w: w, rc: http.NewResponseController(w)}
	end := func() error { return nil }
	if zip {
		z, err := gzip.NewWriterLevel(out, gzip.BestSpeed)
		if err != nil {
			return "", err
		}
		out, end = z, z.Close
	}
	hash := sha512.New()
	n, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(hash, out)}, struct{ io.Reader }{in}, make([]byte, 256<<10))
	if err == nil && size >= 0 && n != size {
		err = fmt.Errorf("%d bytes came of %d", n, size)
	}
	if err == nil {
		err = end()
	}
	return hex.EncodeToString(hash.Sum(nil)), err
}

// deadlineWriter gives every write its time.
type deadlineWriter struct {
	w  io.Writer
	rc *http.ResponseController
}

func (d *deadlineWriter) Write(p []byte) (int, error) {
	// A writer without deadlines is a test's.
	_ = d.rc.SetWriteDeadline(time.Now().Add(downloadIdle))
	return d.w.Write(p)
}

// maxSums bounds how many checksums are remembered.
const maxSums = 1024

// sums remembers the checksums of downloads that were sent whole, by what was sent: an image's bytes never change.
type sums struct {
	mu sync.Mutex // guards of
	of map[string]string
}

func (s *sums) get(key string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.of[key]
}

func (s *sums) put(key, sum string) {
	if key == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.of) >= maxSums {
		clear(s.of)
	}
	s.of[key] = sum
}
