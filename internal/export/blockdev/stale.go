package blockdev

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"ashlar/internal/export/fuse"
)

// clean takes away what a process that is dead left of volume: loop devices, mount and link. Nobody serves it, and no descriptor is held. Who still has such a
// loop device open, or mounted, gets EIO from it until they close it. ErrExists if somebody does serve it after all.
func (f *Frontend) clean(ctx context.Context, volume string) error {
	path := f.mountPath(volume)
	n, err := mountedAt(path)
	if err != nil {
		return err
	}
	if n > 0 {
		_, err := f.tool(ctx, verbProbe, path)
		if err == nil {
			return fmt.Errorf("%s is served by another process: %w", path, ErrExists)
		}
		if !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED) {
			return fmt.Errorf("look whether %s is served: %w", path, err)
		}
	}
	return f.sweep(ctx, volume)
}

// sweep is clean without looking.
func (f *Frontend) sweep(ctx context.Context, volume string) error {
	path := f.mountPath(volume)
	devs, err := loopsOn(path)
	if err != nil {
		return err
	}
	var errs []error
	for _, dev := range devs {
		_, err := f.tool(ctx, verbDrop, dev)
		errs = append(errs, err)
	}
	return errors.Join(append(errs, f.unlink(volume), unmount(path))...)
}

// removeHeld takes away volume, which this process does not serve, but whose descriptor may be held: nobody has it open, or ErrBusy.
func (f *Frontend) removeHeld(ctx context.Context, volume string) error {
	if there, err := f.removeKernelHeld(ctx, volume, verbNBDSweep); there || err != nil {
		return err
	}
	held, err := f.cfg.Keeper.Get(ctx, heldName(volume))
	if errors.Is(err, f.cfg.NotHeld) {
		return f.clean(ctx, volume)
	}
	if err != nil {
		return fmt.Errorf("look for the held descriptor: %w", err)
	}
	// The kernel wrote out everything when the last user closed the device: whatever waits is nobody's.
	if err := errors.Join(f.detachLoops(ctx, volume), held.Close()); err != nil {
		return err
	}
	if err := f.cfg.Keeper.Drop(ctx, heldName(volume)); err != nil {
		return fmt.Errorf("drop the held descriptor: %w", err)
	}
	return f.sweep(ctx, volume)
}

// detachLoops takes the loop devices off volume's file. ErrBusy if one is used.
func (f *Frontend) detachLoops(ctx context.Context, volume string) error {
	path := f.mountPath(volume)
	devs, err := loopsOn(path)
	if err != nil {
		return err
	}
	for _, dev := range devs {
		_, err := f.tool(ctx, verbDetach, dev, path)
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%s is open or mounted; close or unmount it first: %w: %w", f.Path(volume), ErrBusy, err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// adopt goes on with the held session of volume; nil if none is held that can be.
func (f *Frontend) adopt(ctx context.Context, volume string, cfg fuse.Config) (*fuse.Session, error) {
	held, err := f.cfg.Keeper.Get(ctx, heldName(volume))
	if errors.Is(err, f.cfg.NotHeld) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for the held descriptor: %w", err)
	}
	n, err := mountedAt(f.mountPath(volume))
	if err != nil {
		return nil, errors.Join(err, held.Close())
	}
	if n == 0 {
		err = errors.Join(fmt.Errorf("%s: %w", f.mountPath(volume), fuse.ErrClosed), held.Close())
	} else {
		var s *fuse.Session
		if s, err = fuse.Adopt(held, cfg); err == nil {
			return s, nil
		}
	}
	if !errors.Is(err, fuse.ErrClosed) {
		return nil, err
	}
	// Somebody unmounted it meanwhile. What is left begins anew.
	f.cfg.Report(volume, fmt.Errorf("blockdev: the held session is of no use any more, a new one is made: %w", err))
	if err := f.cfg.Keeper.Drop(ctx, heldName(volume)); err != nil {
		return nil, fmt.Errorf("drop the held descriptor: %w", err)
	}
	return nil, nil
}

// link points DevDir/VOLUME at dev, in one step.
func (f *Frontend) link(volume, dev string) error {
	path := f.Path(volume)
	if have, err := os.Readlink(path); err == nil && have == dev {
		return nil
	}
	if err := os.MkdirAll(f.cfg.DevDir, 0o755); err != nil {
		return fmt.Errorf("make the directory for links: %w", err)
	}
	tmp := filepath.Join(f.cfg.DevDir, "."+volume)
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("link %s: %w", path, err)
	}
	if err := os.Symlink(dev, tmp); err != nil {
		return fmt.Errorf("link %s: %w", path, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("link %s: %w", path, err)
	}
	return nil
}

// unlink takes the link away; what is there and is no link stays.
func (f *Frontend) unlink(volume string) error {
	path := f.Path(volume)
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || (err == nil && info.Mode().Type() != fs.ModeSymlink) {
		return nil
	}
	if err == nil {
		err = os.Remove(path)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove link: %w", err)
	}
	return nil
}
