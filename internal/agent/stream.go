package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/plan"
)

// This file is bytes that go through this node and are no record: uploads, downloads and differences.

// refusal is a sentinel that also has a place in the wire's table of codes.
type refusal struct {
	message string
	kind    error // one of client's sentinels
}

func (r *refusal) Error() string { return r.message }

func (r *refusal) Unwrap() error { return r.kind }

var (
	// ErrNotUpload: the image has another source.
	ErrNotUpload error = &refusal{"the image is not one that is uploaded", client.ErrInvalid}
	// ErrUploadEarly: the image does not wait for its bytes yet. Its record says when (state pending on a disk).
	ErrUploadEarly error = &refusal{"the image is not waiting for an upload yet; try again when its state is pending", client.ErrConflict}
	// ErrUploadBusy: somebody is uploading it.
	ErrUploadBusy error = &refusal{"the image is being uploaded by somebody else", client.ErrInUse}
	// ErrUploadOnce: it was uploaded, or an upload failed: to try again, delete the image and make it anew.
	ErrUploadOnce error = &refusal{"the image was uploaded already, or that failed; delete it and create it anew to upload it again", client.ErrExists}
	// ErrUploadBroken: the bytes did not come: too few, too many, too slowly, or the client went away.
	ErrUploadBroken error = &refusal{"the upload broke off", client.ErrSource}
	// ErrDownload: what was asked to be downloaded makes no sense.
	ErrDownload error = &refusal{"cannot be downloaded", client.ErrInvalid}
)

const (
	// idleTimeout bounds how long an import may take nothing of an upload.
	idleTimeout = 30 * time.Second
	// lingerTimeout is how long the end of an upload waits to hear that it was refused.
	lingerTimeout = 5 * time.Second
	// openTimeout bounds how long a download waits for a volume to be opened, or for its first byte to be asked for.
	openTimeout = time.Minute
	// uploadPiece is how much of an upload is moved at once.
	uploadPiece = 256 << 10
	// streamScheme says that a file goes over a socket (client.StreamWriter).
	streamScheme = "stream+unix://"
)

// stream is a socket that a work process connects to, once.
type stream struct {
	*net.UnixListener
	path string
}

// listenStream makes a socket below the run directory that only this user can open.
func (a *Agent) listenStream() (*stream, error) {
	if a.cfg.RunDir == "" {
		return nil, fmt.Errorf("%w: no run directory", ErrConfig)
	}
	path := filepath.Join(a.streamDir(), newID()[:16]+".sock")
	ln, err := client.Listen(path)
	if err != nil {
		return nil, err
	}
	return &stream{ln, path}, nil
}

func (a *Agent) streamDir() string { return filepath.Join(a.cfg.RunDir, "stream") }

func (s *stream) uri() string { return streamScheme + s.path }

// accept waits for the work process; nobody else can connect, and nobody a second time.
func (s *stream) accept(ctx context.Context, wait time.Duration) (net.Conn, error) {
	defer s.Close()
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if err := s.SetDeadline(time.Now().Add(wait)); err != nil {
		return nil, err
	}
	return s.Accept()
}

// Close ends the listening; content when it has ended. A connection that was accepted goes on.
func (s *stream) Close() error {
	err := s.UnixListener.Close()
	if rerr := os.Remove(s.path); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		return rerr
	}
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Upload takes the bytes of an image whose source is upload and that waits for them, sizeBytes of them (-1: as many as there are), and returns when all were taken;
// the image may still be refused afterwards, which its record says. It happens once: whatever goes wrong after the first byte makes the image failed for good.
// catalog.ErrNotFound, ErrNotUpload, ErrUploadEarly, ErrUploadBusy, ErrUploadOnce, Elsewhere (nothing was changed by these); ErrUploadBroken, and what the import failed of. It gives up
// when the import takes nothing for 30 s; that r fails when nothing comes is the caller's to see to. Run must be running.
func (a *Agent) Upload(ctx context.Context, image string, sizeBytes int64, r io.Reader) error {
	err := a.upload(ctx, image, sizeBytes, r)
	if err != nil {
		return fmt.Errorf("upload image %s: %w", image, err)
	}
	return nil
}

func (a *Agent) upload(ctx context.Context, image string, sizeBytes int64, r io.Reader) error {
	if !a.uploading.take(image) {
		return ErrUploadBusy
	}
	defer a.uploading.give(image)
	s, err := a.data()
	if err != nil {
		return err
	}
	sock, err := a.listenStream()
	if err != nil {
		return err
	}
	defer sock.Close()
	var up target
	err = catalog.ErrConflict
	for tries := 0; tries < 5 && errors.Is(err, catalog.ErrConflict); tries++ { // the loop writes the same record
		if up, err = a.uploadTarget(ctx, s, image); err == nil {
			err = a.beginUpload(ctx, up)
		}
	}
	if err != nil {
		return err
	}
	in := client.ImportImage{
		DiskID: up.diskID, ImageID: up.w.ID, Name: image, Source: sock.uri(), Checksum: up.w.ExpectedChecksum, SizeBytes: sizeBytes,
	}
	if _, err = s.ImportImage(ctx, in); err == nil {
		err = a.feed(ctx, sock, sizeBytes, r)
	}
	ctx = context.WithoutCancel(ctx)
	if err != nil && !errors.Is(err, ErrUploadBroken) {
		endOfImport(ctx, s, up.w.ID)
	}
	st := a.lookAfter(ctx, s)
	if err != nil {
		err = importError(st, up.w.ID, err)
		a.tell(ctx, uploaded{imageID: up.w.ID, upload: &plan.Upload{Failed: err.Error()}, state: st})
		return err
	}
	a.tell(ctx, uploaded{imageID: up.w.ID, upload: &plan.Upload{Taken: true}, state: st})
	return nil
}

// endOfImport waits, not for ever, until an import whose stream broke has ended: the work process closes its socket a moment before the data process knows what it refused.
func endOfImport(ctx context.Context, s client.Service, imageID string) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	st, err := s.State(ctx)
	for err == nil && slices.ContainsFunc(st.Jobs, func(j client.Job) bool { return j.ID == imageID && j.Kind != jobExport && j.State == plan.JobRunning }) {
		st, err = s.WaitState(ctx, st.Rev)
	}
}

// importError is why an upload failed: what the import says, if it failed of itself, else what was seen here.
func importError(st *client.State, imageID string, err error) error {
	if st == nil {
		return err
	}
	for _, j := range st.Jobs {
		if j.ID == imageID && j.Kind != jobExport && j.State == plan.JobFailed && !errors.Is(err, ErrUploadBroken) {
			return client.Failure(j.Code, j.Error)
		}
	}
	return err
}

// tell puts news into the loop's inbox, unless it is not running.
func (a *Agent) tell(ctx context.Context, news any) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := send(ctx, a.inbox, news); err != nil {
		a.cfg.Log.Warn("the agent's loop takes no news", "error", err)
	}
}

// target is a copy of an image that waits for its bytes.
type target struct {
	w      catalog.ImageWanted
	o      catalog.ImageObserved
	rev    catalog.Rev // of o
	diskID string
}

// uploadTarget finds the disk of this node where the image waits.
func (a *Agent) uploadTarget(ctx context.Context, s client.Service, image string) (up target, err error) {
	if up.w, _, err = catalog.Read[catalog.ImageWanted](ctx, a.cfg.Catalog, catalog.ImageKey(catalog.Wanted, image)); err != nil {
		return up, err
	}
	if up.w.SourceType != catalog.SourceUpload {
		return up, ErrNotUpload
	}
	up.o, up.rev, err = catalog.Read[catalog.ImageObserved](ctx, a.cfg.Catalog, catalog.ImageKey(catalog.Observed, image))
	if errors.Is(err, catalog.ErrNotFound) || err == nil && up.o.ID != up.w.ID || up.w.Deleted != nil {
		return up, ErrUploadEarly
	}
	if err != nil {
		return up, err
	}
	st, err := s.State(ctx)
	if err != nil {
		return up, err
	}
	for _, id := range up.w.Disks {
		switch up.o.Disks[id].State {
		case catalog.ImagePending:
			if slices.ContainsFunc(st.Disks, func(d client.DiskStatus) bool { return d.DiskID == id }) && up.diskID == "" {
				up.diskID = id
			}
		case catalog.ImageStarting, catalog.ImageInProgress, catalog.ImageReady, catalog.ImageFailed:
			return up, ErrUploadOnce
		}
	}
	if up.diskID == "" {
		waits := func(id string) bool {
			return slices.Contains(up.w.Disks, id) && up.o.Disks[id].State == catalog.ImagePending
		}
		return up, a.diskElsewhere(ctx, waits, ErrUploadEarly)
	}
	return up, nil
}

// beginUpload records that the bytes are coming. The loop hears of it before the record can show it, or it would take it for an upload of a process that is gone.
func (a *Agent) beginUpload(ctx context.Context, up target) error {
	if err := send(ctx, a.inbox, uploaded{imageID: up.w.ID, upload: &plan.Upload{}}); err != nil {
		return err
	}
	up.o.Disks[up.diskID] = catalog.ImageOnDisk{State: catalog.ImageStarting, LastTransitionTime: a.cfg.Now().UTC().Truncate(time.Second)}
	_, err := catalog.Write(ctx, a.cfg.Catalog, catalog.ImageKey(catalog.Observed, up.w.Name), up.o, up.rev)
	if err != nil { // it may have happened: then it is an upload of which nobody knows, and that broke off
		a.tell(context.WithoutCancel(ctx), uploaded{imageID: up.w.ID})
	}
	return err
}

// feed gives the work process the bytes and returns when it has taken all.
func (a *Agent) feed(ctx context.Context, sock *stream, sizeBytes int64, r io.Reader) error {
	conn, err := sock.accept(ctx, idleTimeout)
	if err != nil {
		return fmt.Errorf("the import did not begin: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := a.pump(conn, sizeBytes, r); err != nil {
		return err
	}
	// It closes its end when it has read everything and is content. If it is slow to close, all is in its hands nevertheless, and what it finds its record says.
	if err := conn.SetReadDeadline(time.Now().Add(lingerTimeout)); err != nil {
		return err
	}
	var b [1]byte
	if _, err := conn.Read(b[:]); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}

// pump moves exactly sizeBytes (-1: all there are) and the mark that they are all.
func (a *Agent) pump(conn net.Conn, sizeBytes int64, r io.Reader) error {
	buf, w, total := make([]byte, uploadPiece), client.NewStreamWriter(conn), int64(0)
	for {
		n, rerr := r.Read(buf)
		if total += int64(n); sizeBytes >= 0 && total > sizeBytes {
			return fmt.Errorf("%w: more than the %d bytes that were announced", ErrUploadBroken, sizeBytes)
		}
		if err := conn.SetWriteDeadline(time.Now().Add(idleTimeout)); err != nil {
			return err
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return fmt.Errorf("the import takes no more after %d bytes: %w", total, err)
		}
		switch {
		case rerr == nil:
		case !errors.Is(rerr, io.EOF):
			return fmt.Errorf("%w after %d bytes: %w", ErrUploadBroken, total, rerr)
		case sizeBytes >= 0 && total < sizeBytes:
			return fmt.Errorf("%w: %d of %d bytes came", ErrUploadBroken, total, sizeBytes)
		default:
			return w.Finish()
		}
	}
}

// Download returns the bytes of an image file (format raw or qcow2) of a volume's snapshot (kind "volume"; an empty snapshot is the present, of which one is taken for the
// time; a detached volume is opened without a frontend meanwhile), or of an image (kind "image"), and how many they are, -1 if that is not known before the end. A body
// that breaks off ends with an error, never with io.EOF. The caller closes the body, also when it did not read it to its end; the end of ctx breaks it off.
// catalog.ErrNotFound, client.ErrNotFound (no such snapshot, no copy of the image), Elsewhere, ErrNotHere, ErrDownload, ErrAway.
func (a *Agent) Download(ctx context.Context, kind, name, snapshot, format string) (io.ReadCloser, int64, error) {
	body, size, err := a.download(ctx, kind, name, snapshot, format)
	if err != nil {
		return nil, 0, fmt.Errorf("download %s %s: %w", kind, name, err)
	}
	return body, size, nil
}

func (a *Agent) download(ctx context.Context, kind, name, snapshot, format string) (io.ReadCloser, int64, error) {
	if format != "raw" && format != "qcow2" {
		return nil, 0, fmt.Errorf("%w as %q; formats are raw and qcow2", ErrDownload, format)
	}
	s, err := a.data()
	if err != nil {
		return nil, 0, err
	}
	d := &download{a: a, s: s, id: a.cfg.NewID()}
	src, err := d.source(ctx, kind, name, snapshot)
	if err == nil {
		err = d.begin(ctx, src, format)
	}
	if err != nil {
		return nil, 0, errors.Join(err, d.Close())
	}
	if format != "raw" {
		return d, -1, nil
	}
	return d, src.SizeBytes, nil
}

// download is a body on its way to a client.
type download struct {
	a    *Agent
	s    client.Service
	id   string // of the reading, and of the job
	sock *stream
	conn net.Conn
	in   *client.StreamReader
	stop func() bool
	once sync.Once
	err  error // of Close
}

// source opens what is to be read.
func (d *download) source(ctx context.Context, kind, name, snapshot string) (client.Source, error) {
	switch kind {
	case "image":
		w, _, err := catalog.Read[catalog.ImageWanted](ctx, d.a.cfg.Catalog, catalog.ImageKey(catalog.Wanted, name))
		if err != nil {
			return client.Source{}, err
		}
		st, err := d.s.State(ctx)
		if err != nil {
			return client.Source{}, err
		}
		for _, disk := range st.Disks {
			if slices.ContainsFunc(disk.Images, func(i client.ImageFound) bool { return i.ImageID == w.ID }) {
				return d.s.OpenSource(ctx, client.OpenSource{ID: d.id, DiskID: disk.DiskID, ImageID: w.ID})
			}
		}
		return client.Source{}, d.imageElsewhere(ctx, w)
	case "volume":
		w, err := d.a.volumeHere(ctx, name)
		if err != nil {
			return client.Source{}, err
		}
		d.a.downloads.begin(d.id, w.ID)
		d.a.tell(ctx, poke{})
		if err := d.opened(ctx, w); err != nil {
			return client.Source{}, err
		}
		return beginReading(ctx, d.s, plan.NewReading(d.id, w.ID, snapshot, "download"))
	}
	return client.Source{}, fmt.Errorf("%w: %q is neither volume nor image", ErrDownload, kind)
}

// imageElsewhere names the node that has the image.
func (d *download) imageElsewhere(ctx context.Context, w catalog.ImageWanted) error {
	o, _, err := catalog.Read[catalog.ImageObserved](ctx, d.a.cfg.Catalog, catalog.ImageKey(catalog.Observed, w.Name))
	if err != nil {
		return err
	}
	none := fmt.Errorf("no copy of it is ready on a node that is up: %w", client.ErrNotFound)
	return d.a.diskElsewhere(ctx, func(id string) bool { return o.ID == w.ID && o.Disks[id].State == catalog.ImageReady }, none)
}

// opened waits until the volume is open: the loop sees to that, because of the reading.
func (d *download) opened(ctx context.Context, w catalog.VolumeWanted) error {
	wait, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	st, err := d.s.State(wait)
	for err == nil {
		for _, v := range st.Volumes {
			if v.VolumeID == w.ID && v.State == plan.FoundOpen {
				return nil
			}
		}
		st, err = d.s.WaitState(wait, st.Rev)
	}
	if ctx.Err() == nil && wait.Err() != nil {
		o, _, _ := catalog.Read[catalog.VolumeObserved](ctx, d.a.cfg.Catalog, catalog.VolumeKey(catalog.Observed, w.Name))
		return fmt.Errorf("it could not be opened within %v (%s): %w", openTimeout, o.Error, client.ErrConflict)
	}
	return err
}

// begin starts the work process and waits for it to connect.
func (d *download) begin(ctx context.Context, src client.Source, format string) (err error) {
	if d.sock, err = d.a.listenStream(); err != nil {
		return err
	}
	if _, err := d.s.ExportImage(ctx, client.ExportImage{ID: d.id, Source: src.URI, Format: format, To: d.sock.uri()}); err != nil {
		return err
	}
	if d.conn, err = d.sock.accept(ctx, openTimeout); err != nil {
		return d.reason(ctx, err)
	}
	d.in = client.NewStreamReader(d.conn)
	d.stop = context.AfterFunc(ctx, func() { d.conn.Close() })
	return nil
}

// reason is why the export failed, if it says so, else what was seen here.
func (d *download) reason(ctx context.Context, err error) error {
	if st := d.a.lookAfter(context.WithoutCancel(ctx), d.s); st != nil {
		for _, j := range st.Jobs {
			if j.ID == d.id && j.Kind == jobExport && j.State == plan.JobFailed {
				return client.Failure(j.Code, j.Error)
			}
		}
	}
	return err
}

// Read gives io.EOF only after the last byte of the file.
func (d *download) Read(p []byte) (int, error) {
	n, err := d.in.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = d.reason(context.Background(), fmt.Errorf("download broke off: %w", err))
	}
	return n, err
}

// Close ends everything, also the work process in the middle of its work. The temporary snapshot is removed by the loop, which sees that nobody reads it any more.
func (d *download) Close() error {
	d.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
		defer cancel()
		if d.stop != nil {
			d.stop()
			d.conn.Close()
		}
		if d.sock != nil {
			d.err = d.sock.Close()
		}
		d.err = errors.Join(d.err, d.s.CancelImport(ctx, client.CancelImport{ImageID: d.id}), d.s.CloseSource(ctx, client.CloseSource{ID: d.id}))
		d.a.downloads.end(d.id)
		d.a.tell(ctx, poke{})
	})
	return d.err
}

// Diff calls each for every range in which two snapshots of an attached volume may differ, ascending, from off on, and returns where to go on; that is sizeBytes at the
// end. From (empty: what is below the oldest) is older than To (empty: the present). catalog.ErrNotFound, client.ErrNotFound (not attached, no such snapshot),
// client.ErrInvalid (From is not below To), Elsewhere, ErrAway.
func (a *Agent) Diff(ctx context.Context, r struct {
	Volume, From, To string
	Off              int64
}, each func(off, n int64, zero bool)) (nextOff, sizeBytes int64, err error) {
	w, err := a.volumeHere(ctx, r.Volume)
	if err != nil {
		return 0, 0, fmt.Errorf("differences of volume %s: %w", r.Volume, err)
	}
	s, err := a.data()
	if err != nil {
		return 0, 0, fmt.Errorf("differences of volume %s: %w", r.Volume, err)
	}
	c, err := s.Diff(ctx, client.Diff{VolumeID: w.ID, From: r.From, To: r.To, Off: r.Off})
	if err != nil {
		return 0, 0, fmt.Errorf("differences of volume %s: %w", r.Volume, err)
	}
	for _, x := range c.Ranges {
		each(x.Off, x.N, x.Zero)
	}
	return c.NextOff, c.SizeBytes, nil
}
