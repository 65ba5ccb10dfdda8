package dataplane

import (
	"context"
	"fmt"
	"slices"
	"time"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/replica"
	"ashlar/internal/volume"
)

// How often the space of volumes that changed is measured, and by how much it must have changed for a new revision of the State.
const (
	measureEvery   = 15 * time.Second
	tellSpaceBytes = 64 << 20
)

// reserveOf is what has to be free on a disk of totalBytes for anything new to be begun there: what is open needs room for its own metadata, and people need time to act.
func reserveOf(totalBytes int64) int64 { return min(64<<20, totalBytes/256) }

// room refuses to begin anything on a disk that is as good as full: client.ErrNoSpace, before a byte is written. What the disk cannot tell is no reason.
func (d *diskDir) room() error {
	total, free, err := d.fs.Usage()
	if err != nil || free >= reserveOf(total) {
		return nil
	}
	return fmt.Errorf("disk %s: %w: %d bytes are free, and the last %d are for what is there; delete something, or purge volumes", d.path, client.ErrNoSpace, free, reserveOf(total))
}

// roomFor is room for a verb that makes a layer, unless the layer is there: said again, what was done is done.
func (p *Process) roomFor(ctx context.Context, s *slot, a client.Operate) error {
	if isFar(s.args) {
		return nil // its node refuses it (farConn.Prepare)
	}
	d, err := p.disk(s.args.DiskID)
	if err != nil {
		return err
	}
	if err = d.room(); err == nil {
		return nil
	}
	layers, e := s.vol.Layers(ctx)
	if e == nil && slices.ContainsFunc(layers, func(l replica.LayerInfo) bool { return string(l.ID) == a.OpID }) {
		return nil
	}
	return err
}

// measured is what was found out of a volume's space, and of what: a look at it tells whether it still holds.
type measured struct {
	of    string // "" before the first time
	usage replica.Usage
}

// fingerprint changes whenever a volume's space may have: its chain, or how much its layers hold.
func fingerprint(layers []replica.LayerInfo) string {
	text := ""
	for _, l := range layers {
		text += fmt.Sprintf("%s %d %d %t %t;", l.ID, l.AllocatedBytes, l.DataBytes, l.Snapshot != nil && l.Snapshot.Removed, l.Pruned)
	}
	return text
}

// measureSpaces keeps every open volume's space up to date, in the background: soon after it was opened or a verb was done, and every now and then while it is written. It ends
// with the process.
func (p *Process) measureSpaces() {
	tick := time.NewTicker(measureEvery)
	defer tick.Stop()
	for {
		select {
		case <-p.life.Done():
			return
		case <-tick.C:
		case <-p.measure:
		}
		for _, s := range p.slots() {
			s.mu.Lock()
			vol, was, rep := s.vol, s.space, s.rep
			s.mu.Unlock()
			if vol == nil || rep.away() != "" {
				continue
			}
			ctx, cancel := rep.patient(p.life, p.cfg.far.open)
			now, err := measureSpace(ctx, vol, was)
			cancel()
			if err == nil && now.of != was.of { // one that is ending is told by others
				s.change(func(s *slot) { s.space = now })
				p.tellSpace(was, now)
			}
		}
	}
}

// tellSpace makes a new revision if what changed is worth one.
func (p *Process) tellSpace(was, now measured) {
	moved := now.usage.ExclusiveBytes - was.usage.ExclusiveBytes
	if was.of == "" || len(now.usage.Layers) != len(was.usage.Layers) || moved >= tellSpaceBytes || -moved >= tellSpaceBytes {
		p.board.bump()
	}
}

// measureSpace measures a volume, unless nothing changed since it was.
func measureSpace(ctx context.Context, vol *volume.Volume, was measured) (measured, error) {
	st, err := vol.Status(ctx)
	if err != nil {
		return was, err
	}
	now := measured{of: fingerprint(st.Layers)}
	if now.of == was.of {
		return was, nil
	}
	now.usage, err = vol.Space(ctx)
	return now, err
}

// measureSoon has spaces measured at once, in the background.
func (p *Process) measureSoon() {
	select {
	case p.measure <- struct{}{}:
	default: // it will be
	}
}

func spaceOf(s replica.Space) client.Space {
	return client.Space{ExclusiveBytes: s.ExclusiveBytes, SharedBytes: s.SharedBytes, ReclaimableBytes: s.ReclaimableBytes}
}

// maxChanges is how many ranges one answer to Diff has.
const maxChanges = 65536

// Diff implements client.Service.
func (p *Process) Diff(ctx context.Context, a client.Diff) (client.Changes, error) {
	out, err := p.diff(ctx, a)
	if err != nil {
		return client.Changes{}, forWire(fmt.Errorf("diff: %w", err))
	}
	return out, nil
}

// diff asks the engine; it waits for no verb, and one that merges a layer away meanwhile makes it fail.
func (p *Process) diff(ctx context.Context, a client.Diff) (client.Changes, error) {
	s := p.slot(a.VolumeID)
	if s == nil {
		return client.Changes{}, fmt.Errorf("volume %.40q is not open here: %w", a.VolumeID, client.ErrNotFound)
	}
	s.mu.Lock()
	vol, name := s.vol, s.args.Volume
	s.mu.Unlock()
	if vol == nil {
		return client.Changes{}, fmt.Errorf("volume %s is not open here: %w", name, client.ErrNotFound)
	}
	layers, err := vol.Layers(ctx)
	if err != nil {
		return client.Changes{}, err
	}
	if a.From == volume.HeadName {
		return client.Changes{}, fmt.Errorf("volume %s: %w: the present is not older than anything", name, client.ErrInvalid)
	}
	from, _, err := layerOf(layers, a.From)
	if err != nil {
		return client.Changes{}, fmt.Errorf("volume %s: %w", name, err)
	}
	to, size, err := layerOf(layers, a.To)
	if err != nil {
		return client.Changes{}, fmt.Errorf("volume %s: %w", name, err)
	}
	list, next, err := vol.Changed(ctx, from, to, a.Off, maxChanges)
	if err != nil {
		return client.Changes{}, err
	}
	out := client.Changes{Ranges: make([]client.Change, 0, len(list)), NextOff: next, SizeBytes: size}
	for _, r := range list {
		out.Ranges = append(out.Ranges, client.Change{Off: r.Off, N: r.N, Zero: r.Zero})
	}
	return out, nil
}

// layerOf finds a snapshot's layer; the empty name, and that of the present, is none, with the head's size.
func layerOf(layers []replica.LayerInfo, snapshot string) (id replica.LayerID, sizeBytes int64, err error) {
	present := snapshot == "" || snapshot == volume.HeadName
	at := slices.IndexFunc(layers, func(l replica.LayerInfo) bool {
		return present && l.Head || l.Snapshot != nil && l.Snapshot.Name == snapshot && !present
	})
	if at < 0 {
		return "", 0, fmt.Errorf("%s: %w", snapshot, replica.ErrNoSnapshot)
	}
	if present {
		return "", layers[at].SizeBytes, nil
	}
	return layers[at].ID, layers[at].SizeBytes, nil
}
