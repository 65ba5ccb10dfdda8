package job

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/image"
	"ashlar/internal/layer"
)

// maxLineBytes bounds a line in either direction.
const maxLineBytes = 256 << 10

// KindImport is the kind of work that brings an image onto a disk.
const KindImport = "import"

// Spec is what a child is told: one line of JSON on its standard input, never its arguments, because a URL may hold a secret.
type Spec struct {
	Kind string `json:"kind"`
	// Import is set for KindImport.
	Import *Import `json:"import,omitempty"`
	// Export is set for KindExport.
	Export *Export `json:"export,omitempty"`
	// MemoryBytes is set by Start from its Config.
	MemoryBytes int64 `json:"memoryBytes,omitempty"`
}

// Import says which image to bring where.
type Import struct {
	// Source is an http(s) URL, the absolute path of a regular file, an NBD URI (nbd, nbds, nbd+unix, nbds+unix: a raw disk), or stream+unix:///PATH, a socket to connect to and to read a stream
	// from (docs/formats/stream.md).
	Source string `json:"source"`
	// SizeBytes is what a stream must hold; -1 or 0: any number. Other sources know theirs.
	SizeBytes int64 `json:"sizeBytes,omitempty"`
	// Checksum is of the file as received: "sha512:HEX", "sha256:HEX", bare hex, or empty.
	Checksum string `json:"checksum,omitempty"`
	// Format is "raw", "qcow2", or empty to go by the first bytes.
	Format string       `json:"format,omitempty"`
	Limits image.Limits `json:"limits"`
	// IdleTimeoutMS is how long a server or the sender of a stream may send nothing; 0 means 30 s. A disk over NBD may take its time.
	IdleTimeoutMS int64 `json:"idleTimeoutMS,omitempty"`

	// Root is the absolute directory of the disk, and Name the layer file to make in it, relative, such as "tmp/ID.layer". It must not exist, its directory
	// must. What cannot be converted as it arrives (image.Request.Spool) is kept beside it, as Name + ".spool", while it is needed.
	Root string `json:"root"`
	Name string `json:"name"`
	// LayerID, ImageID and ImageName go into the layer's header.
	LayerID   string `json:"layerID"`
	ImageID   string `json:"imageID"`
	ImageName string `json:"imageName"`
	// BootID is the layer.BootID of this host and disk, in hex.
	BootID string `json:"bootID"`
}

func (i *Import) spoolName() string { return i.Name + ".spool" }

// Progress says how far the work is. Phase is "fetch", "convert" or "settle"; or "export".
type Progress = image.Progress

// Result is what an import made: the layer file is sealed, settled (its checksums are complete) and durable. Or an export: FileBytes is the file's length, there are no sums.
type Result struct {
	image.Result
	// AllocatedBytes is what the layer file takes on the disk.
	AllocatedBytes int64 `json:"allocatedBytes"`
}

// check refuses a spec that makes no sense: ErrSpec, or image.ErrUnsupported for a checksum, format or compression nobody knows.
func (s *Spec) check() error {
	if s.Kind == "" || (s.Kind == KindImport) != (s.Import != nil) || (s.Kind == KindExport) != (s.Export != nil) {
		return fmt.Errorf("kind %q: %w", s.Kind, ErrSpec)
	}
	switch s.Kind {
	case KindImport:
		return s.Import.check()
	case KindExport:
		return s.Export.check()
	}
	return nil // whoever runs it knows whether it is a kind
}

func (i *Import) check() error {
	if _, err := image.ParseChecksum(i.Checksum); err != nil {
		return err
	}
	if _, err := image.ParseFormat(i.Format); err != nil {
		return err
	}
	if _, err := layer.ParseID(i.LayerID); err != nil {
		return fmt.Errorf("%w: %w", err, ErrSpec)
	}
	if _, err := layer.ParseID(i.BootID); err != nil { // the same 32 digits
		return fmt.Errorf("boot id: %w: %w", err, ErrSpec)
	}
	switch {
	case i.Source == "" || i.SizeBytes < -1:
		return fmt.Errorf("no source, or %d bytes of it: %w", i.SizeBytes, ErrSpec)
	case !filepath.IsAbs(i.Root) || strings.ContainsRune(i.Root, 0):
		return fmt.Errorf("root %q is no absolute directory: %w", i.Root, ErrSpec)
	case !fs.ValidPath(i.Name) || i.Name == "." || strings.ContainsRune(i.Name, 0):
		return fmt.Errorf("name %q: %w", i.Name, ErrSpec)
	}
	if isStream(i.Source) {
		_, err := streamPath(i.Source)
		return err
	}
	return nil
}

// message is one line from the child: exactly one of the three.
type message struct {
	Progress *Progress `json:"progress,omitempty"`
	Result   *Result   `json:"result,omitempty"`
	Error    *failure  `json:"error,omitempty"`
}

func (m *message) valid() bool {
	n := 0
	for _, set := range []bool{m.Progress != nil, m.Result != nil, m.Error != nil} {
		if set {
			n++
		}
	}
	return n == 1
}

// failure is an error on the wire: what it is, as codes, and what it says.
type failure struct {
	Codes   []string `json:"codes"`
	Message string   `json:"message"`
}

// sentinel is a row of the one table between errors and codes, in both directions.
type sentinel struct {
	code string
	err  error
}

func sentinels() []sentinel {
	return []sentinel{
		{"format", image.ErrFormat}, {"unsupported", image.ErrUnsupported}, {"too-large", image.ErrTooLarge}, {"checksum", image.ErrChecksum},
		{"source", image.ErrSource}, {"stalled", image.ErrStalled}, {"truncated", image.ErrTruncated},
		{"no-space", block.ErrNoSpace}, {"disk-full", disk.ErrNoSpace}, {"corrupt", block.ErrCorrupt}, {"failed", block.ErrFailed},
		{"exists", fs.ErrExist}, {"not-exist", fs.ErrNotExist}, {"permission", fs.ErrPermission},
		{"spec", ErrSpec}, {"memory", ErrMemory}, {"crashed", ErrCrashed}, {"cancelled", context.Canceled},
	}
}

// failureOf puts an error on the wire.
func failureOf(err error) *failure {
	f := &failure{Message: err.Error()}
	for _, s := range sentinels() {
		if errors.Is(err, s.err) {
			f.Codes = append(f.Codes, s.code)
		}
	}
	return f
}

// reported is an error of the child's: its message, and the sentinels it was.
type reported struct {
	message string
	is      []error
}

func (r *reported) Error() string   { return r.message }
func (r *reported) Unwrap() []error { return r.is }

// err takes an error off the wire. Codes of a newer child that mean nothing here leave the message.
func (f *failure) err() error {
	r := &reported{message: f.Message}
	for _, s := range sentinels() {
		for _, code := range f.Codes {
			if code == s.code {
				r.is = append(r.is, s.err)
			}
		}
	}
	return r
}

// decodeSpec reads a spec line. Unknown fields are ErrSpec: parent and child are the same program.
func decodeSpec(line []byte) (Spec, error) {
	var s Spec
	d := json.NewDecoder(strings.NewReader(string(line)))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return Spec{}, fmt.Errorf("%w: %w", err, ErrSpec)
	}
	return s, s.check()
}
