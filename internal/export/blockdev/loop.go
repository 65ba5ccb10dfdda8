package blockdev

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// sysBlock is where the kernel describes block devices, without asking whoever serves them.
	sysBlock = "/sys/block"

	// sectorBytes is the logical sector of the loop device: 512, because golden images are partitioned in such sectors.
	// Smaller parts of a unit are the engine's to merge.
	sectorBytes = 512

	// attachTries bounds how often another program may take the free loop device that was just found.
	attachTries = 64
)

// loopsOn returns the loop devices (/dev/loopN) whose backing file is path. It asks the kernel alone and never waits for a server.
func loopsOn(path string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(sysBlock, "loop*", "loop", "backing_file"))
	if err != nil {
		return nil, fmt.Errorf("blockdev: list loop devices: %w", err)
	}
	var out []string
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // detached meanwhile
		}
		if strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), " (deleted)") == path {
			out = append(out, "/dev/"+filepath.Base(filepath.Dir(filepath.Dir(name))))
		}
	}
	return out, nil
}

// loopBytes is the size of the loop device dev.
func loopBytes(dev string) (int64, error) {
	text, err := os.ReadFile(filepath.Join(sysBlock, filepath.Base(dev), "size"))
	if err != nil {
		return 0, fmt.Errorf("blockdev: size of %s: %w", dev, err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("blockdev: size of %s: %w", dev, err)
	}
	return n * sectorBytes, nil
}

// openLoop opens dev; flags are added to what it needs.
func openLoop(dev string, flags int) (*os.File, error) {
	f, err := os.OpenFile(dev, os.O_RDWR|unix.O_CLOEXEC|flags, 0)
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) {
		f, err = os.OpenFile(dev, os.O_RDONLY|unix.O_CLOEXEC|flags, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dev, err)
	}
	return f, nil
}

// attach puts a loop device on path, with direct I/O and a scan for partitions, and returns its path (loop(4), LOOP_CONFIGURE: Linux 5.8).
func attach(path string, readOnly bool) (string, error) {
	mode, flags := os.O_RDWR, uint32(unix.LO_FLAGS_DIRECT_IO|unix.LO_FLAGS_PARTSCAN)
	if readOnly {
		mode, flags = os.O_RDONLY, flags|unix.LO_FLAGS_READ_ONLY
	}
	file, err := os.OpenFile(path, mode|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open %s: %w", path, err)
	}
	defer file.Close() //nolint:errcheck // the loop device has its own
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open loop control: %w", err)
	}
	defer ctl.Close() //nolint:errcheck // nothing was written
	cfg := unix.LoopConfig{Fd: uint32(file.Fd()), Size: sectorBytes, Info: unix.LoopInfo64{Flags: flags}}
	copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], path)
	for try := 0; ; try++ {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", fmt.Errorf("find a free loop device: %w", err)
		}
		dev := "/dev/loop" + strconv.Itoa(n)
		err = configure(dev, &cfg)
		if err == nil {
			return dev, nil
		}
		if !errors.Is(err, unix.EBUSY) || try == attachTries {
			return "", err
		}
	}
}

func configure(dev string, cfg *unix.LoopConfig) error {
	f, err := openLoop(dev, 0)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	if err := unix.IoctlLoopConfigure(int(f.Fd()), cfg); err != nil {
		return fmt.Errorf("configure %s: %w", dev, err)
	}
	return nil
}

// detach takes dev off path, without any I/O: nobody needs to serve. EBUSY if it, or a partition of it, is mounted or otherwise open; then all is as
// it was.
func detach(ctx context.Context, dev, path string) error {
	// O_EXCL without O_CREAT: nobody may mount it from here on, and nobody has it mounted (open(2)).
	f, err := openLoop(dev, unix.O_EXCL)
	if err != nil {
		return err
	}
	if err := unopened(ctx, dev); err != nil {
		return errors.Join(err, f.Close())
	}
	// Nothing has to be written out: the kernel does that when the last user closes the device.
	err = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("detach %s: %w", dev, err)
	}
	// The kernel detaches when the last user closes it. One that was not seen shows now.
	if waitUnbound(ctx, dev, path) {
		return nil
	}
	if err := stayAttached(dev, path); err != nil {
		return err
	}
	if !bound(dev, path) {
		return nil
	}
	return fmt.Errorf("%s is open: %w", dev, unix.EBUSY)
}

const (
	lookEvery = 20 * time.Millisecond
	lookFor   = time.Second
)

// waitUnbound waits until dev is no longer on path; false if it still is after lookFor or when ctx ends.
func waitUnbound(ctx context.Context, dev, path string) bool {
	ctx, cancel := context.WithTimeout(ctx, lookFor)
	defer cancel()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for bound(dev, path) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return !bound(dev, path)
		}
	}
	return true
}

func bound(dev, path string) bool {
	all, err := loopsOn(path)
	if err != nil {
		return true
	}
	for _, d := range all {
		if d == dev {
			return true
		}
	}
	return false
}

// stayAttached takes back that dev goes when its last user closes it. It says the status that attach gave, rather than to ask for it, which would ask the server.
func stayAttached(dev, path string) error {
	f, err := openLoop(dev, 0)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	info := unix.LoopInfo64{Flags: unix.LO_FLAGS_PARTSCAN}
	copy(info.File_name[:len(info.File_name)-1], path)
	err = unix.IoctlLoopSetStatus64(int(f.Fd()), &info)
	if err != nil && !errors.Is(err, unix.ENXIO) { // gone after all
		return fmt.Errorf("keep %s attached: %w", dev, err)
	}
	return nil
}

// drop detaches dev now, or as soon as nobody has it open. What it has not written is lost: its server is gone.
func drop(dev string) error {
	f, err := openLoop(dev, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) {
		return nil
	}
	if err != nil {
		return err
	}
	err = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
	if errors.Is(err, unix.ENXIO) {
		err = nil // it is on nothing
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("detach %s: %w", dev, err)
	}
	return nil
}

// resize has dev take the size that path has now.
func resize(dev, path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil { // older kernels look only at what they know of the size
		return fmt.Errorf("size of %s: %w", path, err)
	}
	f, err := openLoop(dev, 0)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("set the capacity of %s: %w", dev, err)
	}
	return nil
}

// syncDevice writes out what the kernel holds for dev: first the file systems on it that are mounted in this mount namespace, then its own pages.
func syncDevice(dev string) error {
	points, err := mountsOf(dev)
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range points {
		errs = append(errs, syncFS(p))
	}
	f, err := os.OpenFile(dev, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return errors.Join(append(errs, fmt.Errorf("open %s: %w", dev, err))...)
	}
	if err := f.Sync(); err != nil {
		errs = append(errs, fmt.Errorf("sync %s: %w", dev, err))
	}
	return errors.Join(append(errs, f.Close())...)
}

func syncFS(point string) error {
	f, err := os.OpenFile(point, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // unmounted meanwhile
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", point, err)
	}
	defer f.Close() //nolint:errcheck // nothing was written
	c, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("sync %s: %w", point, err)
	}
	if ctlErr := c.Control(func(fd uintptr) { err = unix.Syncfs(int(fd)) }); ctlErr != nil {
		err = ctlErr
	}
	if err != nil {
		return fmt.Errorf("sync file system %s: %w", point, err)
	}
	return nil
}
