package hold

import (
	"errors"
	"fmt"
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
func LockData(runDir, version string) (*DataLocks, error) {
	l, err := LockVersion(runDir, version)
	if err != nil {
		return nil, err
	}
	if l.run, err = lockPatiently(dataLock(runDir), whoIs(version)); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// DataLocks are a data process's locks: of its version and, unless it is only about to take over, of the run directory. Not for concurrent use.
type DataLocks struct {
	version   string
	mine, run *os.File
}

func whoIs(version string) string { return fmt.Sprintf("data %s, pid %d", version, os.Getpid()) }

func versionLock(runDir, version string) string {
	return filepath.Join(runDir, "data", version+".lock")
}

// LockVersion takes data/VERSION.lock alone: a successor has it before data/run.lock is passed to it. ErrRunning.
func LockVersion(runDir, version string) (*DataLocks, error) {
	mine, err := lockPatiently(versionLock(runDir, version), whoIs(version))
	if err != nil {
		return nil, err
	}
	return &DataLocks{version: version, mine: mine}, nil
}

// VersionEnded tells whether no process has data/VERSION.lock: the data process of that version that was known to live is dead. Its other descriptors are closed in the
// same moment, but perhaps a little later.
func VersionEnded(runDir, version string) bool {
	f, err := os.Open(versionLock(runDir, version))
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	defer f.Close()
	return flock(f, unix.LOCK_SH|unix.LOCK_NB) == nil
}

// Run returns the locked file data/run.lock, for its descriptor to be passed on; nil before Inherit.
func (l *DataLocks) Run() *os.File { return l.run }

// Inherit takes over data/run.lock, locked by the process that passes it: the lock is held from here on until both have closed it. ErrRunning if f has no lock and
// somebody else has it. l owns f from then on.
func (l *DataLocks) Inherit(f *os.File) error {
	if l.run != nil {
		return errors.Join(fmt.Errorf("inherit the run directory's lock: it is held already: %w", ErrRunning), f.Close())
	}
	if err := flock(f, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrRunning
		}
		return errors.Join(fmt.Errorf("inherit the run directory's lock: %w", err), f.Close())
	}
	l.run = f
	return nil
}

// Sign writes into data/run.lock that this process has it now.
func (l *DataLocks) Sign() error {
	if err := l.run.Truncate(0); err != nil {
		return fmt.Errorf("sign the run directory's lock: %w", err)
	}
	if _, err := l.run.WriteAt([]byte(whoIs(l.version)+"\n"), 0); err != nil {
		return fmt.Errorf("sign the run directory's lock: %w", err)
	}
	return nil
}

// Close gives the locks up.
func (l *DataLocks) Close() error {
	err := l.mine.Close()
	if l.run != nil {
		err = errors.Join(err, l.run.Close())
	}
	return err
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
