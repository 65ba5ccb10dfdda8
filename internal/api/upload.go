package api

import (
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"strconv"
	"time"

	"ashlar/internal/catalog"
)

const (
	// uploadIdle is how long a client may send nothing, as in the dialect.
	uploadIdle = 30 * time.Second
	// sectorSize is what the dialect's uploads are a multiple of.
	sectorSize = 512
	// chunkName is the part of the form that has the bytes.
	chunkName = "chunk"
	// maxUpload bounds an image file.
	maxUpload = 64 << 40
)

// imageUpload takes the bytes of an image that waits for them: a form with one part "chunk" and ?size=N, as the dialect has it, or ours: the bytes as they are, with or
// without a length. It answers when all were taken. The reader that Extra gets ends with io.EOF only after exactly what was announced.
func (h *Handler) imageUpload(c *call) (any, error) {
	v, err := h.loadImage(c.r.Context(), c.id)
	if err != nil {
		return nil, err
	}
	switch {
	case v.wanted.SourceType != catalog.SourceUpload:
		return nil, Failure(CodeConflict, "image %s comes from %s: it takes no upload", c.id, v.wanted.SourceType)
	case v.wanted.Deleted != nil:
		return nil, Failure(CodeConflict, "image %s is being deleted", c.id)
	case !v.in(catalog.ImagePending):
		return nil, Failure(CodeConflict, "upload server for backing image %s has not been initiated: the image is %s, and takes one upload while it is pending", c.id, v.said())
	}
	node, err := h.nodeWithCopy(c.r.Context(), v, catalog.ImagePending)
	switch {
	case err != nil:
		return nil, err
	case h.elsewhere(c.r, node):
		return h.forward(c, node, "the upload of image "+c.id)
	case h.cfg.Extra == nil:
		return nil, missing("upload")
	}
	u, err := h.openUpload(c)
	if err != nil {
		return nil, err
	}
	err = h.cfg.Extra.Upload(c.r.Context(), c.id, u.size, u)
	if node := h.nodeOf(err); node != "" && u.n == 0 && u.rest == nil { // the records did not say so, and nothing was read yet
		return h.forward(c, node, "the upload of image "+c.id)
	}
	if err == nil {
		err = u.finish()
	}
	// What the client did wrong says more than what the taker made of it.
	if u.err != nil && !errors.Is(u.err, io.EOF) {
		err = u.err
	}
	_ = u.rc.SetReadDeadline(time.Time{})
	if err != nil {
		return nil, err
	}
	return h.imageGet(c)
}

// said is the image's state in words, for messages.
func (v imageView) said() string {
	for _, d := range v.observed.Disks {
		return strconv.Quote(d.State)
	}
	return "not on any disk yet"
}

// openUpload finds the bytes in the request's body.
func (h *Handler) openUpload(c *call) (*upload, error) {
	u := &upload{image: c.id, size: -1, rc: http.NewResponseController(c.w)}
	bad := func(format string, args ...any) error {
		return Failure(CodeInvalid, "image "+c.id+": "+format, args...)
	}
	text := c.r.URL.Query().Get("size")
	if text != "" {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n <= 0 || n > maxUpload {
			return nil, bad("size %s must be the number of bytes to come, 1 to %d", quote(text), int64(maxUpload))
		}
		u.size = n
	}
	media, _, err := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	switch {
	case err == nil && media == "multipart/form-data":
		return u, u.openForm(c, bad)
	case c.r.Header.Get("Content-Type") != "" && media != mediaBytes:
		return nil, bad("content type %s: send multipart/form-data with a part %q, or %s", quote(c.r.Header.Get("Content-Type")), chunkName, mediaBytes)
	}
	if n := c.r.ContentLength; n >= 0 {
		if u.size >= 0 && u.size != n {
			return nil, bad("size says %d bytes, Content-Length %d", u.size, n)
		}
		u.size = n
	}
	if u.size == 0 || u.size > maxUpload {
		return nil, bad("an upload of %d bytes; 1 to %d are allowed", u.size, int64(maxUpload))
	}
	u.r = c.r.Body
	return u, nil
}

// openForm finds the part in a form; those before it are passed over.
func (u *upload) openForm(c *call, bad func(string, ...any) error) error {
	if u.size < 0 {
		return bad("size is missing: say how many bytes the part %q has, …?action=upload&size=BYTES", chunkName)
	}
	if u.size%sectorSize != 0 {
		return bad("the uploaded file size %d should be a multiple of %d bytes", u.size, sectorSize)
	}
	form, err := c.r.MultipartReader()
	if err != nil {
		return bad("the form cannot be read: %v", err)
	}
	u.deadline()
	part, err := nextChunk(form)
	switch {
	case errors.Is(err, io.EOF):
		return bad("cannot get the uploaded data since the upload request doesn't contain form '%s'", chunkName)
	case err != nil:
		return bad("the form cannot be read: %v", err)
	}
	u.r = part
	u.rest = func() error {
		if _, err := nextChunk(form); err == nil {
			return bad("the form has a second part %q; send one", chunkName)
		} else if !errors.Is(err, io.EOF) {
			return bad("the form's end cannot be read: %v", err)
		}
		return nil
	}
	return nil
}

// nextChunk passes parts of other names over, which must be small; io.EOF at the form's end.
func nextChunk(form *multipart.Reader) (*multipart.Part, error) {
	for left := int64(maxBody); ; {
		part, err := form.NextPart()
		if err != nil || part.FormName() == chunkName {
			return part, err
		}
		n, err := io.Copy(io.Discard, io.LimitReader(part, left))
		if err != nil {
			return nil, err
		}
		if left -= n; left <= 0 {
			return nil, fmt.Errorf("over 1 MiB that is not in the part %q", chunkName)
		}
	}
}

// upload reads what a client sends and holds it to what it announced.
type upload struct {
	image string
	r     io.Reader
	size  int64        // announced; -1: not
	rest  func() error // checks what follows the bytes; nil: nothing can
	rc    *http.ResponseController
	n     int64 // came
	err   error // for ever
}

// deadline gives the client its time for the next bytes.
func (u *upload) deadline() {
	// A reader without deadlines is a test's.
	_ = u.rc.SetReadDeadline(time.Now().Add(uploadIdle))
}

// Read passes bytes on. io.EOF comes only when all has come and nothing else.
func (u *upload) Read(p []byte) (int, error) {
	if u.err != nil {
		return 0, u.err
	}
	u.deadline()
	n, err := u.r.Read(p)
	u.n += int64(n)
	switch {
	case u.size >= 0 && u.n > u.size:
		over := u.n - u.size
		u.err = Failure(CodeInvalid, "image %s: more came than the %d bytes that were announced", u.image, u.size)
		return max(0, n-int(over)), u.err
	case errors.Is(err, io.EOF) && u.size >= 0 && u.n < u.size:
		u.err = Failure(CodeInvalid, "image %s: the upload ended after %d of %d bytes", u.image, u.n, u.size)
	case errors.Is(err, io.EOF) && u.n == 0:
		u.err = Failure(CodeInvalid, "image %s: the upload had no bytes", u.image)
	case errors.Is(err, io.EOF):
		if u.err = io.EOF; u.rest != nil {
			if bad := u.rest(); bad != nil {
				u.err = bad
			}
		}
	case err != nil:
		u.err = Because(err, CodeInvalid, "image %s: the upload broke off after %d bytes: %v", u.image, u.n, err)
	}
	return n, u.err
}

// finish reads to the end, in case that the taker stopped at the last byte.
func (u *upload) finish() error {
	if _, err := io.Copy(io.Discard, struct{ io.Reader }{u}); err != nil {
		return err
	}
	return nil
}
