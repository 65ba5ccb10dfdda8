package job

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"ashlar/internal/block"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/disk"
	"ashlar/internal/image"
	"ashlar/internal/nbd"

	"golang.org/x/sys/unix"
)

// KindExport is the kind of work that writes an image file.
const KindExport = "export"

// Export says what to write where.
type Export struct {
	// Source is the URI of an NBD export that does not change meanwhile: a snapshot or an image.
	Source string `json:"source"`
	// Format is "raw" or "qcow2".
	Format string `json:"format"`
	// Compress is "", "zlib" or "zstd" for qcow2, "" or "gzip" for raw to a stream.
	Compress string `json:"compress,omitempty"`
	// To is the absolute path of a new file, or stream+unix:///PATH. A file is written as To + ".partial", which must not exist either, made durable, and only then gets its name, which never replaces
	// another file. Its mode is 0600. A stream is ended by its end mark (docs/formats/stream.md) only if it is whole.
	To string `json:"to"`
}

const partialSuffix = ".partial"

func (e *Export) check() error {
	if _, err := nbd.ParseURI(e.Source); err != nil {
		return fmt.Errorf("%w: %w", err, ErrSpec)
	}
	allowed := map[string]string{"raw": " ", "qcow2": " zlib zstd "}[e.Format]
	if isStream(e.To) {
		if _, err := streamPath(e.To); err != nil {
			return err
		}
		if e.Format == "raw" {
			allowed = " gzip "
		}
	} else if !filepath.IsAbs(e.To) || filepath.Clean(e.To) != e.To || e.To == "/" || strings.ContainsRune(e.To, 0) {
		return fmt.Errorf("target %q is no absolute path of a file, and no %s:///PATH: %w", e.To, streamScheme, ErrSpec)
	}
	switch {
	case allowed == "":
		return fmt.Errorf("format %q: want raw or qcow2: %w", e.Format, ErrSpec)
	case e.Compress != "" && !strings.Contains(allowed, " "+e.Compress+" "):
		return fmt.Errorf("compression %q of %s to %s: %w", e.Compress, e.Format, e.To, image.ErrUnsupported)
	}
	return nil
}

// exporter is one export under way.
type exporter struct {
	*Export
	src    block.Device
	report func(Progress)
}

// doExport writes a device as an image file. When it fails it leaves nothing; when it is killed, the parent tidies up. The result has no SHA-512 and no digest: nobody needs them before the bytes are there, and they cost more
// than the export.
func doExport(ctx context.Context, spec Spec, report func(Progress)) (Result, error) {
	e := &exporter{Export: spec.Export, report: report}
	dev, stop, err := dialNBD(ctx, e.Source)
	if err != nil {
		return Result{}, err
	}
	defer stop()
	e.src = image.SourceDevice(dev)
	var n int64
	if isStream(e.To) {
		n, err = e.toStream(ctx)
	} else {
		n, err = e.toFile(ctx)
	}
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return Result{}, fmt.Errorf("export %s: %w", image.DisplaySource(e.Source), err)
	}
	size := dev.Size()
	info := image.Info{Format: image.Format(e.Format), FileBytes: n, VirtualBytes: size, DeviceBytes: (size + block.UnitBytes - 1) / block.UnitBytes * block.UnitBytes}
	return Result{Result: image.Result{Info: info}, AllocatedBytes: n}, nil
}

// progress counts the disk's bytes; compressing to a stream goes over them twice.
func (e *exporter) progress(done, total int64) {
	size := e.src.Size()
	share := float64(done) / float64(max(1, total))
	e.report(Progress{Phase: "export", DoneBytes: int64(share * float64(size)), TotalBytes: size, Percent: min(99, int(share*100))})
}

// toStream writes the file to the socket. The end mark is what says that it is whole.
func (e *exporter) toStream(ctx context.Context) (int64, error) {
	conn, err := dialStream(ctx, e.To)
	if err != nil {
		return 0, err
	}
	defer conn.Close()                                      //nolint:errcheck // the end mark counts
	defer context.AfterFunc(ctx, func() { conn.Close() })() //nolint:errcheck // who does not read would hold us
	stream := client.NewStreamWriter(conn)
	w := bufio.NewWriterSize(stream, client.MaxStreamChunk)
	var n int64
	if e.Format == "raw" {
		n, err = image.WriteRaw(ctx, w, e.src, image.RawOptions{Compress: e.Compress, Progress: e.progress})
	} else {
		n, err = image.WriteQcow2(ctx, w, e.src, image.Qcow2Options{Compress: e.Compress, Progress: e.progress})
	}
	if err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = stream.Finish()
	}
	return n, err
}

// toFile writes the file beside its name, and gives it that when it is whole and durable.
func (e *exporter) toFile(ctx context.Context) (n int64, err error) {
	if _, err := os.Lstat(e.To); err == nil {
		return 0, fmt.Errorf("target %s: %w", e.To, fs.ErrExist)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	dir, err := disk.OpenReal(filepath.Dir(e.To), disk.RealOptions{})
	if err != nil {
		return 0, err
	}
	defer dir.Close() //nolint:errcheck // only names were made through it, and they were synced
	partial := filepath.Base(e.To) + partialSuffix
	size := int64(0)
	if e.Format == "raw" {
		size = e.src.Size()
	}
	f, err := dir.Create(partial, size)
	if err != nil {
		return 0, err
	}
	ahead := newAheadFile(f)
	n, err = e.fill(ctx, ahead)
	err = errors.Join(ahead.finish(err), f.Close())
	if err == nil {
		err = renameNew(e.To+partialSuffix, e.To)
	}
	if err != nil {
		return 0, errors.Join(err, dir.Remove(partial))
	}
	return n, dir.SyncDir(".")
}

func (e *exporter) fill(ctx context.Context, f disk.File) (int64, error) {
	if e.Format == "raw" {
		return e.src.Size(), image.WriteRawAt(ctx, f, e.src, image.RawOptions{Progress: e.progress})
	}
	return image.WriteQcow2At(ctx, f, e.src, image.Qcow2Options{Compress: e.Compress, Progress: e.progress})
}

// renameNew renames, and never replaces. File systems without RENAME_NOREPLACE (NFS) say EINVAL; there a second link fails if the name is taken.
func renameNew(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) {
		if err = unix.Link(from, to); err == nil {
			err = unix.Unlink(from)
		}
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}
