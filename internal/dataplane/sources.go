package dataplane

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"ashlar/internal/block"
	"ashlar/internal/block/limit"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/export"
	"ashlar/internal/layer"
	"ashlar/internal/volume"
)

// maxSources bounds how many sources are open at one time: each holds layers, and purge passes them by.
const maxSources = 256

// sources are what is open to be read: snapshots and images, each on a socket of its own that lives as long as this process.
type sources struct {
	front *export.NBD
	local *export.Local

	mu   sync.Mutex // held while one is opened or closed; guards byID
	byID map[string]*source
}

type source struct {
	args client.OpenSource
	dev  block.Device
}

// newSources removes the sockets that a process left which is gone.
func newSources(cfg Config) (*sources, error) {
	dir := filepath.Join(cfg.RunDir, "source")
	if err := export.SweepStale(dir); err != nil {
		return nil, err
	}
	s := &sources{local: export.NewLocal(export.Access{}), byID: map[string]*source{}}
	var err error
	s.front, err = export.NewNBD(export.NBDConfig{Dir: dir, Listeners: s.local, Report: func(id string, err error) {
		cfg.Log.Debug("NBD connection ended", "source", id, "error", err)
	}})
	return s, err
}

// OpenSource implements client.Service.
func (p *Process) OpenSource(ctx context.Context, a client.OpenSource) (client.Source, error) {
	src, err := p.openSource(ctx, a)
	if err != nil {
		return client.Source{}, forWire(fmt.Errorf("open source %.40q: %w", a.ID, err))
	}
	return src, nil
}

func (p *Process) openSource(ctx context.Context, a client.OpenSource) (client.Source, error) {
	ofVolume, ofImage := a.VolumeID != "" && a.Snapshot != "", validID(a.DiskID) && validID(a.ImageID)
	if !validID(a.ID) || ofVolume == ofImage || ofVolume && a.DiskID+a.ImageID != "" || ofImage && a.VolumeID+a.Snapshot != "" {
		return client.Source{}, fmt.Errorf("%w: an id of 32 hex digits, and either a volume and a snapshot or a disk and an image are needed", client.ErrInvalid)
	}
	s := p.sources
	s.mu.Lock()
	defer s.mu.Unlock()
	if was := s.byID[a.ID]; was != nil {
		if was.args != a {
			return client.Source{}, fmt.Errorf("%w: as another", client.ErrExists)
		}
		return s.describe(a.ID), nil
	}
	if len(s.byID) >= maxSources {
		return client.Source{}, fmt.Errorf("%w: %d are open; close one", client.ErrInUse, len(s.byID))
	}
	read, err := p.sourceDevice(ctx, a)
	if err != nil {
		return client.Source{}, err
	}
	dev := limit.Behind(read, p.background) // reading everything is background work, whoever does it
	if _, err := s.front.Add(ctx, a.ID, dev, export.Options{ReadOnly: true, MayWait: dev.MayWait}); err != nil {
		return client.Source{}, errors.Join(err, dev.Close())
	}
	s.byID[a.ID] = &source{args: a, dev: dev}
	return s.describe(a.ID), nil
}

// describe says where a source can be read; mu is held.
func (s *sources) describe(id string) client.Source {
	return client.Source{ID: id, URI: s.front.URI(id), SizeBytes: s.byID[id].dev.Size()}
}

// sourceDevice opens what is to be read. Who closes a volume says so in its slot first, and then waits for the sources' lock: so none is opened for it too late.
func (p *Process) sourceDevice(ctx context.Context, a client.OpenSource) (block.Device, error) {
	if a.VolumeID == "" {
		d, err := p.disk(a.DiskID)
		if err != nil {
			return nil, err
		}
		return d.openImage(a.ImageID)
	}
	s := p.slot(a.VolumeID)
	if s == nil {
		return nil, fmt.Errorf("volume %.40q is not open here: %w", a.VolumeID, client.ErrNotFound)
	}
	s.mu.Lock()
	vol, rep, state, name := s.vol, s.rep, s.state, s.args.Volume
	s.mu.Unlock()
	if vol == nil || state != stateOpen {
		return nil, fmt.Errorf("volume %s is not open here: %w", name, client.ErrNotFound)
	}
	if rep.far != nil {
		return p.openFarSnapshot(ctx, vol, rep, a.Snapshot)
	}
	return vol.OpenSnapshot(ctx, a.Snapshot)
}

// openFarSnapshot opens a snapshot of a volume whose replica is another node's, and waits for that no longer than for any question: others want sources too.
func (p *Process) openFarSnapshot(ctx context.Context, vol *volume.Volume, rep *member, snapshot string) (block.Device, error) {
	ctx, cancel := rep.patient(ctx, p.cfg.far.ask)
	defer cancel()
	type opened struct {
		dev block.Device
		err error
	}
	got := make(chan opened) // taken by who waits, or by nobody any more
	p.wg.Go(func() {
		dev, err := vol.OpenSnapshot(ctx, snapshot) // ends with the volume at the latest
		select {
		case got <- opened{dev, err}:
		case <-ctx.Done():
			if err == nil {
				dev.Close() //nolint:errcheck // read by nobody
			}
		}
	})
	select {
	case o := <-got:
		return o.dev, rep.blame(o.err)
	case <-ctx.Done():
		return nil, rep.blame(context.Cause(ctx))
	}
}

// openImage returns an image's content as a Device. No image is deleted meanwhile: its caller and deleteImage both have the sources' lock.
func (d *diskDir) openImage(imageID string) (block.Device, error) {
	if _, ok := d.image(imageID); !ok {
		return nil, fmt.Errorf("image %s is not on disk %s: %w", imageID, d.DiskID, client.ErrNotFound)
	}
	l, err := layer.Open(d.fs, imagePath(imageID), layer.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	stack, err := layer.NewStack([]*layer.Layer{l}, layer.StackOptions{})
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return stack, l.Close() // the stack has its own hold on it
}

// CloseSource implements client.Service.
func (p *Process) CloseSource(ctx context.Context, a client.CloseSource) error {
	p.sources.mu.Lock()
	defer p.sources.mu.Unlock()
	if err := p.sources.closeLocked(ctx, a.ID); err != nil {
		return forWire(fmt.Errorf("close source %.40q: %w", a.ID, err))
	}
	return nil
}

// closeLocked ends a source, after what its readers asked for; one that is not open is none.
func (s *sources) closeLocked(ctx context.Context, id string) error {
	src := s.byID[id]
	if src == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	err := s.front.Remove(ctx, id)
	delete(s.byID, id)
	return errors.Join(err, src.dev.Close())
}

// closeOf ends a volume's sources: the volume is being closed.
func (s *sources) closeOf(ctx context.Context, volumeID string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for id, src := range s.byID {
		if src.args.VolumeID == volumeID {
			errs = append(errs, s.closeLocked(ctx, id))
		}
	}
	return errors.Join(errs...)
}

// ofImage finds a source that reads an image; mu is held.
func (s *sources) ofImage(diskID, imageID string) (id string, found bool) {
	for id, src := range s.byID {
		if src.args.DiskID == diskID && src.args.ImageID == imageID {
			return id, true
		}
	}
	return "", false
}

// close ends all sources, and takes their sockets away.
func (s *sources) close(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for id := range s.byID {
		errs = append(errs, s.closeLocked(ctx, id))
	}
	return errors.Join(append(errs, s.front.Close(), s.local.Close())...)
}
