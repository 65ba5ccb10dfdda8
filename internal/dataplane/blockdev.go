package dataplane

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
	"ashlar/internal/export/blockdev"
)

// frontendBlockdev makes a volume a block device of this host.
const frontendBlockdev = "blockdev"

// heldFUSE is what sessions of block devices are called at the holder.
const heldFUSE = "fuse/"

// The directory of the one node that a host normally runs has the name that people type; that of any other is told apart by its run directory, so that two nodes on a host never meet.
const (
	usualRunDir = "/run/ashlar"
	devDir      = "/dev/ashlar"
)

// devDirOf returns where the block devices of the node with this run directory are.
func devDirOf(runDir string) string {
	if runDir == usualRunDir {
		return devDir
	}
	sum := sha256.Sum256([]byte(runDir))
	return devDir + "-" + hex.EncodeToString(sum[:4])
}

// newBlockdev returns the block devices of this process; a host that cannot have any says so when one is added.
func newBlockdev(cfg Config, h holder) (*blockdev.Frontend, error) {
	return blockdev.New(blockdev.Config{RunDir: cfg.RunDir, DevDir: devDirOf(cfg.RunDir), Keeper: h, NotHeld: hold.ErrNotHeld, Tool: cfg.BlockTool,
		Report: func(volume string, err error) { cfg.Log.Warn("block device", "volume", volume, "error", err) }})
}

// giveUpBlockdev takes away the block device of a volume that is about to be closed. It is refused with client.ErrInUse while it is mounted or open, and then the volume is as it was: what
// is in it could not be written out any more.
func (p *Process) giveUpBlockdev(ctx context.Context, s *slot) error {
	args, _, _ := s.look()
	if args.Frontend != frontendBlockdev {
		return nil
	}
	s.liftLimits()
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	err := p.blockdev.Remove(ctx, args.Volume)
	if errors.Is(err, blockdev.ErrBusy) {
		s.restoreLimits()
		return fmt.Errorf("close volume %s: %w: unmount %s first, and end whatever has it open", args.Volume, err, p.blockdev.Path(args.Volume))
	}
	if err != nil { // its device may be gone, and what it had not written out is told by the close that follows
		p.log.Warn("block device of a volume that is being closed", "volume", args.Volume, "error", err)
	}
	return nil
}

// settleBlockdev has the kernel write out what it holds of a volume that is about to be sealed, so that the snapshot has it.
func (p *Process) settleBlockdev(ctx context.Context, a client.OpenVolume) error {
	if a.Frontend != frontendBlockdev {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	return p.blockdev.Sync(ctx, a.Volume)
}

// resizeBlockdev shows a volume's new size to who uses it.
func (p *Process) resizeBlockdev(ctx context.Context, a client.OpenVolume) error {
	if a.Frontend != frontendBlockdev {
		return nil
	}
	if err := p.blockdev.Resize(ctx, a.Volume); err != nil {
		return fmt.Errorf("the volume is expanded, its block device is not yet: %w", err)
	}
	return nil
}

// closeBlockdevs closes every volume that is a block device, before anything else is ended: if one is in use, everything stays.
func (p *Process) closeBlockdevs(ctx context.Context) error {
	for _, s := range p.slots() {
		if args, _, _ := s.look(); args.Frontend != frontendBlockdev {
			continue
		}
		if err := s.take(ctx); err != nil {
			return err
		}
		err := p.closedAllTheSame(p.closeSlot(ctx, s, closeForced))
		s.give()
		if errors.Is(err, blockdev.ErrBusy) {
			return err
		}
		if err != nil {
			p.log.Error("a volume did not close in order", "error", err)
		}
	}
	return nil
}

// detachBlockdevs ends serving every block device, whose users wait for the next process.
func (p *Process) detachBlockdevs(ctx context.Context) error {
	var errs []error
	for _, s := range p.slots() {
		if args, _, _ := s.look(); args.Frontend == frontendBlockdev {
			if err := p.blockdev.Detach(ctx, args.Volume); err != nil && !errors.Is(err, blockdev.ErrNotFound) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// sweepBlockdev takes away a block device that the holder keeps for a volume that is not to be reopened: nobody will ever answer its users.
func (p *Process) sweepBlockdev(ctx context.Context, held string) error {
	volume := strings.TrimPrefix(held, heldFUSE)
	err := p.blockdev.Remove(ctx, volume)
	if errors.Is(err, blockdev.ErrBusy) {
		p.log.Warn("a block device is in use whose volume is not open; its users get errors", "volume", volume)
		err = p.blockdev.Force(ctx, volume)
	}
	return err
}
