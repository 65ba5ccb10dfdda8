package dataplane

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/replica"
	"ashlar/internal/volume"
)

// The verbs of Operate.
const (
	verbSnapshot       = "snapshot"
	verbRevert         = "revert"
	verbExpand         = "expand"
	verbSnapshotRemove = "snapshot-remove"
	verbPurge          = "purge"
)

// Operate implements client.Service.
func (p *Process) Operate(ctx context.Context, a client.Operate) (client.VolumeStatus, error) {
	ctx, cancel := p.operation(ctx)
	defer cancel()
	s := p.slot(a.VolumeID)
	if s == nil {
		return client.VolumeStatus{}, fmt.Errorf("%s: volume %.40q is not open here: %w", a.Verb, a.VolumeID, client.ErrNotFound)
	}
	if err := s.take(ctx); err != nil {
		return client.VolumeStatus{}, forWire(err)
	}
	defer s.give()
	if err := p.operate(ctx, s, a); err != nil {
		return client.VolumeStatus{}, forWire(err)
	}
	if s.rep != nil && s.rep.far != nil {
		ask, cancel := context.WithTimeout(ctx, p.cfg.far.ask)
		p.lookFar(ask, s, s.vol)
		cancel()
	}
	p.board.bump()
	p.measureSoon()
	return p.volumeStatus(ctx, s, p.nbd.Stats()), nil
}

// operate does one verb; the caller has the slot's token, so that the volume stays open meanwhile.
func (p *Process) operate(ctx context.Context, s *slot, a client.Operate) error {
	args, state, why := s.look()
	switch {
	case state == stateFailed:
		return fmt.Errorf("%s of volume %s: %w: %w", a.Verb, args.Volume, client.ErrFailed, why)
	case state != stateOpen:
		return fmt.Errorf("%s: volume %s is not open here: %w", a.Verb, args.Volume, client.ErrNotFound)
	case a.Verb == verbRevert && args.Frontend != "":
		return fmt.Errorf("revert volume %s: %w: detach it, and attach it without one", args.Volume, client.ErrFrontend)
	}
	if a.Verb == verbSnapshot || a.Verb == verbExpand {
		if err := p.roomFor(ctx, s, a); err != nil {
			return fmt.Errorf("%s of volume %s: %w", a.Verb, args.Volume, err)
		}
	}
	opID := replica.LayerID(a.OpID)
	var err error
	switch a.Verb {
	case verbSnapshot:
		if err = checkSnapshotName(a.Snapshot); err == nil {
			err = p.settleBlockdev(ctx, args)
		}
		if err == nil {
			err = s.vol.Snapshot(ctx, opID, replica.SnapshotMeta{Name: a.Snapshot, UserCreated: !a.System, Labels: a.Labels})
		}
	case verbRevert:
		err = s.vol.Revert(ctx, opID, a.Snapshot)
	case verbExpand:
		if a.SizeBytes > maxVolumeBytes {
			return fmt.Errorf("expand volume %s: %w: %d bytes, at most %d", args.Volume, client.ErrInvalid, a.SizeBytes, int64(maxVolumeBytes))
		}
		if err = s.vol.Expand(ctx, opID, a.SizeBytes); err == nil {
			err = errors.Join(p.recordSize(ctx, s), p.resizeBlockdev(ctx, args))
		}
	case verbSnapshotRemove:
		err = s.vol.RemoveSnapshot(ctx, a.Snapshot)
	case verbPurge:
		err = s.vol.Purge(ctx, nil)
	default:
		return fmt.Errorf("volume %s: %w: unknown verb %.40q", args.Volume, client.ErrInvalid, a.Verb)
	}
	p.rescan(args.DiskID, args.ReplicaID)
	return err
}

// recordSize has open.json know the volume's new size, which a failed volume shows to its guests.
func (p *Process) recordSize(ctx context.Context, s *slot) error {
	st, err := s.vol.Status(ctx)
	if err != nil {
		return err
	}
	s.change(func(s *slot) { s.entry.SizeBytes = st.SizeBytes })
	return p.list.change(func(f *openFile) {
		if e, ok := f.Volumes[s.args.VolumeID]; ok {
			e.SizeBytes = st.SizeBytes
			f.Volumes[s.args.VolumeID] = e
		}
	})
}

// checkSnapshotName refuses names that nobody could say again.
func checkSnapshotName(name string) error {
	if name == "" || len(name) > 250 || name == volume.HeadName || strings.Contains(name, "/") || strings.ContainsFunc(name, unicode.IsControl) {
		return fmt.Errorf("snapshot name %.40q: %w", name, client.ErrInvalid)
	}
	return nil
}
