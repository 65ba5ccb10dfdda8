package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mountInfo is a line of /proc/self/mountinfo (proc_pid_mountinfo(5)), as far as it matters here.
type mountInfo struct {
	dev, point, fsType, source string
}

func mounts() ([]mountInfo, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return parseMounts(string(text)), nil
}

func parseMounts(text string) []mountInfo {
	var out []mountInfo
	for line := range strings.Lines(text) {
		left, right, ok := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 5 || len(r) < 2 {
			continue
		}
		out = append(out, mountInfo{dev: l[2], point: unescape(l[4]), fsType: r[0], source: unescape(r[1])})
	}
	return out
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountsOf returns where dev, or a partition of it, is mounted in this mount namespace: one point for each file system.
func mountsOf(dev string) ([]string, error) {
	numbers := map[string]bool{}
	base := filepath.Base(dev)
	for _, pattern := range []string{filepath.Join(sysBlock, base, "dev"), filepath.Join(sysBlock, base, base+"p*", "dev")} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			return nil, fmt.Errorf("find partitions of %s: %w", dev, err)
		}
		for _, name := range files {
			if text, err := os.ReadFile(name); err == nil { // else the partition went
				numbers[strings.TrimSpace(string(text))] = true
			}
		}
	}
	all, err := mounts()
	if err != nil {
		return nil, err
	}
	var points []string
	seen := map[string]bool{}
	for _, m := range all {
		// btrfs has device numbers of its own; there the source tells.
		source, err := filepath.EvalSymlinks(m.source)
		here := numbers[m.dev] || (err == nil && (source == dev || strings.HasPrefix(source, dev+"p")))
		if here && !seen[m.dev] {
			seen[m.dev] = true
			points = append(points, m.point)
		}
	}
	return points, nil
}

// mountedAt counts what is mounted on path.
func mountedAt(path string) (int, error) {
	all, err := mounts()
	if err != nil {
		return 0, err
	}
	n := 0
	for _, m := range all {
		if m.point == path {
			n++
		}
	}
	return n, nil
}

// mountFile mounts a new FUSE session on path, a regular file that is made if need be, and returns the session's descriptor, whose INIT waits to be answered.
func mountFile(path string, readOnly bool) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make the place for mounts: %w", err)
	}
	at, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make mount point: %w", err)
	}
	if err := at.Close(); err != nil {
		return nil, fmt.Errorf("make mount point: %w", err)
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/fuse: %w", err)
	}
	f := os.NewFile(uintptr(fd), "/dev/fuse")
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME)
	if readOnly {
		flags |= unix.MS_RDONLY
	}
	// Without allow_other nobody but this user reaches the file; the loop device has its own permissions.
	options := fmt.Sprintf("fd=%d,rootmode=100600,user_id=%d,group_id=%d", fd, os.Geteuid(), os.Getegid())
	if err := unix.Mount("ashlar", path, "fuse.ashlar", flags, options); err != nil {
		return nil, errors.Join(fmt.Errorf("mount on %s: %w", path, err), f.Close())
	}
	return f, nil
}

// unmount takes away what is mounted on path and the mount point. A mount that is in use goes when its last user does.
func unmount(path string) error {
	for {
		n, err := mountedAt(path)
		if err != nil {
			return err
		}
		if n == 0 {
			break
		}
		err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: gone meanwhile
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove mount point: %w", err)
	}
	return nil
}

// abort ends the session that is mounted on path: requests that wait, and later ones, get an error.
func abort(path string) error {
	err := unix.Unmount(path, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("abort %s: %w", path, err)
	}
	return nil
}
