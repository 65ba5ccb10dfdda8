package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ashlar/internal/block"
	"ashlar/internal/export/fuse"
)

// Supported returns nil if this host and process can make block devices, else ErrUnsupported with everything that is missing.
func Supported() error {
	var errs []error
	for _, need := range []struct{ path, what string }{
		{"/dev/fuse", "the kernel's FUSE (modprobe fuse; a container needs --device /dev/fuse)"},
		{"/dev/loop-control", "loop devices (modprobe loop; a container needs them too)"},
	} {
		fd, err := unix.Open(need.path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w: needed is %s", need.path, err, need.what))
			continue
		}
		unix.Close(fd) //nolint:errcheck // nothing was written
	}
	if _, err := os.Stat("/sys/module/nbd"); err == nil {
		errs = nil // it does without those
	} else if len(errs) > 0 {
		errs = append(errs, errors.New("nor is there the kernel's nbd driver (modprobe nbd)"))
	}
	if ok, err := hasCapability(unix.CAP_SYS_ADMIN); err != nil {
		errs = append(errs, err)
	} else if !ok {
		errs = append(errs, errors.New("CAP_SYS_ADMIN is missing: run as root"))
	}
	if len(errs) > 0 {
		return fmt.Errorf("blockdev: %w: %w", ErrUnsupported, errors.Join(errs...))
	}
	return nil
}

// hasCapability looks at the effective set of this thread (proc_pid_status(5), CapEff).
func hasCapability(number int) (bool, error) {
	text, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return false, fmt.Errorf("read capabilities: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			set, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			if err != nil {
				return false, fmt.Errorf("read capabilities: %w", err)
			}
			return set>>number&1 == 1, nil
		}
	}
	return false, errors.New("read capabilities: the kernel does not tell them")
}

// Resends tells whether the kernel can send again what a dead process had read (FUSE_NOTIFY_RESEND, Linux 6.9): then block devices pause when this process
// is killed, and go on when the next one serves. Otherwise Add makes devices of the kernel's nbd driver. It finds out once, by a mount that it takes away again; false also if
// that failed.
func (f *Frontend) Resends() bool {
	f.probe.Do(func() {
		resends, err := f.probeResends()
		if err != nil {
			f.cfg.Report("", fmt.Errorf("blockdev: find out whether the kernel can resend requests: %w", err))
		}
		f.resends = resends
	})
	return f.resends
}

func (f *Frontend) probeResends() (bool, error) {
	dev := block.NewGate(nothing{})
	path := filepath.Join(f.cfg.RunDir, "fuse", ".probe."+strconv.Itoa(os.Getpid()))
	file, err := mountFile(path, true)
	if err != nil {
		return false, err
	}
	s, err := fuse.Negotiate(f.life, file, fuse.Config{Device: dev, ReadOnly: true, Buffers: f.buffers, WithoutResend: f.cfg.withoutResend})
	if err != nil {
		return false, errors.Join(err, unmount(path))
	}
	return s.Resends(), errors.Join(s.Detach(context.WithoutCancel(f.life)), unmount(path))
}

// nothing is a Device of no bytes.
type nothing struct{}

func (nothing) ReadAt([]byte, int64) (int, error)            { return 0, block.ErrRange }
func (nothing) WriteAt([]byte, int64) (int, error)           { return 0, block.ErrRange }
func (nothing) Zero(int64, int64) error                      { return block.ErrRange }
func (nothing) Flush() error                                 { return nil }
func (nothing) Extents(int64, int64) ([]block.Extent, error) { return nil, nil }
func (nothing) Size() int64                                  { return 0 }
func (nothing) Close() error                                 { return nil }
