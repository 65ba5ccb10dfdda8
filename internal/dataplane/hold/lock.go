package hold

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lockFile takes the flock of path without waiting and writes who holds it into the file. The lock is free again when the file, and every copy
// of its descriptor, is closed, or the process dies. ErrRunning if another process has it; the message says who.
func lockFile(path, who string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	if err := flock(f, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder, _ := os.ReadFile(path) // only for the message
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w: %s", path, ErrRunning, strings.TrimSpace(string(holder)))
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	if err := f.Truncate(0); err == nil {
		_, err = f.WriteAt([]byte(who+"\n"), 0)
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
	}
	return f, nil
}

// flock calls the system call on f's descriptor.
func flock(f *os.File, how int) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var lockErr error
	err = raw.Control(func(fd uintptr) { lockErr = unix.Flock(int(fd), how) })
	return errors.Join(err, lockErr)
}

// lockPatience is how long a data process waits for a lock that a holder may be trying at that moment.
const lockPatience = 300 * time.Millisecond

// LockData takes a data process's locks: data/VERSION.lock, and data/run.lock, which every data process of the run directory shares the name of: while it is
// held, no holder starts another. The caller keeps what it returns open for as long as it lives. ErrRunning, naming the other, if a data process has one of them.
func LockData(runDir, version string) (io.Closer, error) {
	who := fmt.Sprintf("data %s, pid %d", version, os.Getpid())
	mine, err := lockPatiently(filepath.Join(runDir, "data", version+".lock"), who)
	if err != nil {
		return nil, err
	}
	all, err := lockPatiently(dataLock(runDir), who)
	if err != nil {
		return nil, errors.Join(err, mine.Close())
	}
	return locks{mine, all}, nil
}

// locks are files whose locks end together.
type locks []*os.File

// Close gives the locks up.
func (l locks) Close() error {
	var errs []error
	for _, f := range l {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

func lockPatiently(path, who string) (*os.File, error) {
	deadline := time.Now().Add(lockPatience)
	for {
		f, err := lockFile(path, who)
		if err == nil || !errors.Is(err, ErrRunning) || time.Now().After(deadline) {
			return f, err
		}
		<-time.After(5 * time.Millisecond)
	}
}

// dataAlive tells whether some process has the data lock, and what that wrote about itself.
func dataAlive(runDir string) (bool, string, error) {
	path := dataLock(runDir)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, "", nil
	}
	if err != nil {
		return false, "", fmt.Errorf("look at the data lock: %w", err)
	}
	defer f.Close()
	// Shared: two that look do not disturb each other.
	err = flock(f, unix.LOCK_SH|unix.LOCK_NB)
	if err == nil {
		return false, "", nil
	}
	if !errors.Is(err, unix.EWOULDBLOCK) {
		return false, "", fmt.Errorf("look at the data lock: %w", err)
	}
	who, err := os.ReadFile(path)
	if err != nil {
		return true, "", nil //nolint:nilerr // who it is matters to people only
	}
	return true, strings.TrimSpace(string(who)), nil
}
