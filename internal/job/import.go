package job

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/image"
	"ashlar/internal/layer"
)

// importPercent is the share of the whole that fetching and converting get; sealing and settling get the rest.
const importPercent = 95

// doImport brings an image onto a disk as a sealed layer file. When it fails it leaves nothing; when it is killed, the parent tidies up.
func doImport(ctx context.Context, spec Spec, report func(Progress)) (result Result, err error) {
	i := spec.Import
	sum, err := image.ParseChecksum(i.Checksum)
	if err != nil {
		return Result{}, err
	}
	format, err := image.ParseFormat(i.Format)
	if err != nil {
		return Result{}, err
	}
	fsys, err := disk.OpenReal(i.Root, disk.RealOptions{})
	if err != nil {
		return Result{}, err
	}
	defer fsys.Close()
	target := &target{fsys: fsys, spec: i}
	defer func() { err = errors.Join(err, target.close(err == nil)) }()
	request := image.Request{
		Source: i.Source, Checksum: sum, Format: format, Limits: i.Limits, IdleTimeout: time.Duration(i.IdleTimeoutMS) * time.Millisecond,
		Spool: fsys, SpoolName: i.spoolName(), Create: target.create,
		Progress: func(p Progress) {
			p.Percent = p.Percent * importPercent / 100
			report(p)
		},
	}
	stop, err := i.openSource(ctx, &request)
	if err != nil {
		return Result{}, err
	}
	defer stop()
	imported, err := image.Import(ctx, request)
	if err != nil {
		return Result{}, err
	}
	report(Progress{Phase: "settle", DoneBytes: 0, TotalBytes: imported.DeviceBytes, Percent: importPercent})
	return target.finish(ctx, imported)
}

// target is the layer file that an import fills.
type target struct {
	fsys  disk.FS
	spec  *Import
	layer *layer.Layer
	stack *layer.Stack
}

// create makes the layer file, marked as being built, and what writes to it.
func (t *target) create(info image.Info) (block.Device, error) {
	if ok, err := disk.Exists(t.fsys, path.Dir(t.spec.Name)); err != nil || !ok {
		return nil, errors.Join(fmt.Errorf("directory %s: %w", path.Dir(t.spec.Name), fs.ErrNotExist), err)
	}
	var boot layer.BootID
	if _, err := hex.Decode(boot[:], []byte(t.spec.BootID)); err != nil {
		return nil, fmt.Errorf("boot id: %w: %w", err, ErrSpec)
	}
	meta := layer.Meta{ID: layer.ID(t.spec.LayerID), Kind: layer.KindImage, State: layer.StateBuilding, Created: time.Now().UTC(),
		Image: &layer.Image{Name: t.spec.ImageName, ID: t.spec.ImageID, Format: string(info.Format)}}
	l, err := layer.Create(t.fsys, t.spec.Name, meta, info.DeviceBytes, layer.Options{BootID: boot})
	if err != nil {
		return nil, err
	}
	t.layer = l
	if t.stack, err = layer.NewStack([]*layer.Layer{l}, layer.StackOptions{}); err != nil {
		return nil, err
	}
	return t.stack, nil
}

// finish makes the layer what it will be for ever: sealed, with the image's description in its header, durable, and with checksums. Without room for the checksums it
// stays unverified, as the layer package allows.
func (t *target) finish(ctx context.Context, imported image.Result) (Result, error) {
	if err := t.stack.FlushAhead(ctx); err != nil {
		return Result{}, err
	}
	err := t.stack.Seal(func(m *layer.Meta) {
		m.Image.Source = image.DisplaySource(t.spec.Source)
		m.Image.FileBytes, m.Image.FileSHA512, m.Image.Digest = imported.FileBytes, imported.SHA512, imported.Digest
	})
	if err != nil {
		return Result{}, err
	}
	if err := t.layer.Settle(ctx); err != nil && !errors.Is(err, block.ErrNoSpace) {
		return Result{}, err
	}
	allocated, err := t.layer.AllocatedBytes()
	if err != nil {
		return Result{}, err
	}
	return Result{Result: imported, AllocatedBytes: allocated}, nil
}

// close lets go of the file, and removes it unless it is to be kept.
func (t *target) close(keep bool) error {
	if t.layer == nil {
		return nil
	}
	var err error
	if t.stack != nil {
		err = t.stack.Close()
	}
	err = errors.Join(err, t.layer.Close())
	if !keep {
		err = errors.Join(err, t.fsys.Remove(t.spec.Name))
	}
	return err
}
