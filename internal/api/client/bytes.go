package client

import (
	"cmp"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"

	"ashlar/internal/api"
)

// Progress is told how many bytes have gone so far; it is called often, by one goroutine, and must not block. Nil: nobody is told.
type Progress func(bytes int64)

// Upload is the bytes of an image.
type Upload struct {
	Body      io.Reader
	SizeBytes int64 // -1: not known before the end
	Progress  Progress
}

// UploadImage waits until an image made with NewImage.Upload is ready for its bytes, sends them, and returns when the node has all of them; it may still refuse them
// afterwards, so WaitImage tells how it ends. Once only: CodeConflict for a second upload, also after a failure. A failure of Body ends the upload, and is the error.
func (c *Client) UploadImage(ctx context.Context, name string, u Upload) (api.BackingImage, error) {
	var img api.BackingImage
	_, err := c.WaitImage(ctx, name, func(i api.BackingImage) (bool, error) {
		for _, f := range i.DiskFileStatusMap {
			if f.State != "" {
				return true, nil // pending, or something that the node says better than we could
			}
		}
		if i.Error != "" {
			return false, api.Failure(api.CodeConflict, "no disk can take it: %s", i.Error)
		}
		return false, nil
	})
	if err != nil {
		return img, err
	}
	body := &counted{r: u.Body, progress: u.Progress}
	r, err := c.request(ctx, http.MethodPost, at("backingimages", name, "upload"), body)
	if err != nil {
		return img, err
	}
	r.ContentLength = u.SizeBytes
	r.Header.Set("Content-Type", "application/octet-stream")
	// A refusal comes before the bytes go.
	r.Header.Set("Expect", "100-continue")
	res, err := c.http.Do(r)
	switch {
	case err != nil && body.failed() != nil:
		return img, fmt.Errorf("image %s: read what is to be uploaded: %w", name, body.failed())
	case err != nil:
		return img, c.unreachable(ctx, err)
	}
	defer res.Body.Close()
	return decode[api.BackingImage](ctx, c, res)
}

// decode reads an answer that call did not ask for.
func decode[T any](ctx context.Context, c *Client, res *http.Response) (T, error) {
	var v T
	data, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return v, c.unreachable(ctx, err)
	}
	return v, c.answer(res, data, &v)
}

// Download says what to fetch and where to put it.
type Download struct {
	Format   string // raw or qcow2; of an image also "": gzip of raw
	Snapshot string // of a volume; "": the present
	To       io.Writer
	Progress Progress
	// Size is told how many bytes will come, before the first, if the node knows. Nil: nobody is told.
	Size func(bytes int64)
}

// Downloaded is what came.
type Downloaded struct {
	SizeBytes int64
	// SHA512 is of what came, hex. Verified: the node said the same; of gzip it says only that of what is inside, and then nothing is compared.
	SHA512   string
	Verified bool
}

// DownloadImage fetches an image's content. CodeChecksum if what came is not what the node sent; CodeUnreachable if it broke off. Either way what was written is no image.
func (c *Client) DownloadImage(ctx context.Context, name string, d Download) (Downloaded, error) {
	return c.download(ctx, origin{what: "image " + name, path: at("backingimages", name, "") + "/download", zipped: d.Format == ""}, d)
}

// DownloadVolume fetches a volume's content, like DownloadImage.
func (c *Client) DownloadVolume(ctx context.Context, name string, d Download) (Downloaded, error) {
	return c.download(ctx, origin{what: "volume " + name, path: at("volumes", name, "") + "/download"}, d)
}

// origin is what a download is of.
type origin struct {
	what, path string
	zipped     bool // the body is gzip, the checksum that of what is inside
}

func (c *Client) download(ctx context.Context, from origin, d Download) (Downloaded, error) {
	var none Downloaded
	query := url.Values{}
	for name, v := range map[string]string{"format": d.Format, "snapshot": d.Snapshot} {
		if v != "" {
			query.Set(name, v)
		}
	}
	r, err := c.request(ctx, http.MethodGet, from.path+"?"+query.Encode(), nil)
	if err != nil {
		return none, err
	}
	// We read the checksum that follows the bytes.
	r.Header.Set("TE", "trailers")
	res, err := c.http.Do(r)
	if err != nil {
		return none, c.unreachable(ctx, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		_, err := decode[struct{}](ctx, c, res)
		return none, err
	}
	size := res.ContentLength
	if n, err := strconv.ParseInt(res.Header.Get(api.HeaderSize), 10, 64); err == nil {
		size = n
	}
	if d.Size != nil && size >= 0 {
		d.Size(size)
	}
	hash := sha512.New()
	body := &counted{r: res.Body, progress: d.Progress}
	n, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(hash, d.To)}, body, make([]byte, 256<<10))
	switch {
	case err != nil && body.failed() != nil:
		return none, c.unreachable(ctx, fmt.Errorf("%s broke off after %d bytes: %w", from.what, n, body.failed()))
	case err != nil:
		return none, fmt.Errorf("%s: write what was downloaded: %w", from.what, err)
	}
	got := Downloaded{SizeBytes: n, SHA512: hex.EncodeToString(hash.Sum(nil))}
	said := cmp.Or(res.Trailer.Get(api.HeaderSHA512), res.Header.Get(api.HeaderSHA512))
	if said == "" || from.zipped {
		return got, nil
	}
	if said != got.SHA512 {
		return none, api.Failure(api.CodeChecksum, "%s: what came (%d bytes) is not what the node sent: its SHA-512 is %s, and should be %s", from.what, n, got.SHA512, said)
	}
	got.Verified = true
	return got, nil
}

// counted counts what is read, and keeps the error of its source apart from those of where it goes.
type counted struct {
	r        io.Reader
	n        int64
	progress Progress
	// An upload's body may still be read when its answer is there.
	err atomic.Pointer[error]
}

// failed is the source's error, if there was one.
func (c *counted) failed() error {
	if p := c.err.Load(); p != nil {
		return *p
	}
	return nil
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if n > 0 && c.progress != nil {
		c.progress(c.n)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		c.err.Store(&err)
	}
	return n, err
}
