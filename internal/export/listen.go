package export

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrPathTooLong: a unix socket's path does not fit what the kernel takes.
var ErrPathTooLong = errors.New("socket path too long")

// ErrInUse: somebody else serves at a socket's path, or there is something that is no socket.
var ErrInUse = errors.New("socket path in use")

// MaxPathBytes is the longest path of a unix socket: sun_path has 108 bytes, one of them for the final NUL.
const MaxPathBytes = 107

// Listeners keeps listening sockets by name. Both methods may be called concurrently for different names.
type Listeners interface {
	// Listen returns a listener on the unix socket at path: the one kept under name, with the connections that wait in it, if clients
	// can still find it at path; else a new one (see Access.Bind), which is kept from then on. Closing what it returns ends neither the
	// socket that is kept nor its path.
	Listen(ctx context.Context, name, path string) (net.Listener, error)
	// Forget stops keeping the socket; the caller removes its path. A name that is not kept is no error.
	Forget(ctx context.Context, name string) error
}

// Access says who may connect to a socket beside its owner and root. The zero Access is nobody.
type Access struct {
	// GroupID, unless 0, is a group that may: sockets are 0660, and their directory 0710, which lets it reach them but not look around.
	GroupID int
}

func (a Access) modes() (dir, socket fs.FileMode) {
	if a.GroupID == 0 {
		return 0o700, 0o600
	}
	return 0o710, 0o660
}

// grant gives path to the group, and only then the group its rights. What is right already is left alone.
func (a Access) grant(path string, mode fs.FileMode) error {
	info, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("export: protect %s: %w", path, err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); a.GroupID != 0 && (!ok || int(st.Gid) != a.GroupID) {
		if err := os.Lchown(path, -1, a.GroupID); err != nil {
			return fmt.Errorf("export: give %s to group %d: %w", path, a.GroupID, err)
		}
	} else if info.Mode().Perm() == mode {
		return nil
	}
	if err := os.Chmod(path, mode); err != nil {
		return fmt.Errorf("export: protect %s: %w", path, err)
	}
	return nil
}

// Bind listens on a new unix socket at path, for its owner alone or with a group whatever the umask, in a directory that is made for it. A socket there whose process is
// gone is replaced in one step, so that path is never missing; the listener does not remove it when it is closed.
// It returns ErrPathTooLong, or ErrInUse when a process listens there or path is something else; then nothing was changed.
func (a Access) Bind(path string) (*net.UnixListener, error) {
	if err := checkPath(path); err != nil {
		return nil, err
	}
	dirMode, mode := a.modes()
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("export: make socket directory: %w", err)
	}
	if err := a.grant(dir, dirMode); err != nil {
		return nil, err
	}
	if err := checkStale(path); err != nil {
		return nil, err
	}
	l, tmp, err := bindNew(dir, len(filepath.Base(path)))
	if err != nil {
		return nil, err
	}
	if err := a.grant(tmp, mode); err != nil {
		return nil, errors.Join(err, l.Close(), os.Remove(tmp))
	}
	if err := os.Rename(tmp, path); err != nil {
		return nil, errors.Join(fmt.Errorf("export: put socket in place: %w", err), l.Close(), os.Remove(tmp))
	}
	return l, nil
}

func checkPath(path string) error {
	if len(path) > MaxPathBytes {
		return fmt.Errorf("export: socket path %s has %d bytes, the kernel takes %d; use a shorter run directory or volume name: %w",
			path, len(path), MaxPathBytes, ErrPathTooLong)
	}
	return nil
}

// bindNew listens on a socket with a name of its own in dir, of at most maxName bytes.
func bindNew(dir string, maxName int) (*net.UnixListener, string, error) {
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
		var modeErr error
		// The kernel gives the file the mode that the unbound socket has, less the umask: there is no moment at which others may connect.
		err := rc.Control(func(fd uintptr) { modeErr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, modeErr)
	}}
	for try := 0; ; try++ {
		name := ("." + rand.Text())[:min(10, maxName)]
		path := filepath.Join(dir, name)
		l, err := lc.Listen(context.Background(), "unix", path)
		if errors.Is(err, unix.EADDRINUSE) && try < 100 {
			continue
		}
		if err != nil {
			return nil, "", fmt.Errorf("export: bind: %w", err)
		}
		ul := l.(*net.UnixListener)
		ul.SetUnlinkOnClose(false)
		// A umask that takes even the owner's rights is put right now that the file exists.
		if err := os.Chmod(path, 0o600); err != nil {
			return nil, "", errors.Join(fmt.Errorf("export: protect socket: %w", err), ul.Close(), os.Remove(path))
		}
		return ul, path, nil
	}
}

// SweepStale removes the sockets in dir at which nobody listens: what processes left that are gone. A directory that is missing is empty.
func SweepStale(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("export: sweep sockets: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if e.Type() != fs.ModeSocket || checkStale(path) != nil {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("export: sweep sockets: %w", err)
		}
	}
	return nil
}

// checkStale returns nil if path is free, or a socket at which nobody listens.
func checkStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("export: look at socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("export: %s is not a socket: %w", path, ErrInUse)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("export: look at socket: %w", err)
	}
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	if closeErr := unix.Close(fd); closeErr != nil {
		return fmt.Errorf("export: look at socket: %w", closeErr)
	}
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	// Connected, or the backlog is full (EAGAIN), or we may not ask: somebody has it.
	return fmt.Errorf("export: %s: %w", path, ErrInUse)
}

// Adopt makes a listener of a kept descriptor, which it takes over, provided that path still is a socket that clients find; who may connect is made what a says. It does not
// remove path when it is closed.
func (a Access) Adopt(f *os.File, path string) (*net.UnixListener, error) {
	l, err := a.adopt(f, path)
	if closeErr := f.Close(); closeErr != nil && err == nil {
		return nil, errors.Join(fmt.Errorf("export: use kept socket: %w", closeErr), l.Close())
	}
	return l, err
}

// adopt is Adopt with a duplicate of f.
func (a Access) adopt(f *os.File, path string) (*net.UnixListener, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("export: look at kept socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("export: %s is not a socket: %w", path, ErrInUse)
	}
	dirMode, mode := a.modes()
	if err := errors.Join(a.grant(filepath.Dir(path), dirMode), a.grant(path, mode)); err != nil {
		return nil, err
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("export: use kept socket: %w", err)
	}
	ul, ok := l.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("export: kept descriptor for %s listens on %s: %w", path, l.Addr().Network(), ErrInUse), l.Close())
	}
	ul.SetUnlinkOnClose(false)
	return ul, nil
}

// Local is a Listeners that keeps sockets in this process. It survives what uses it, but not the process.
type Local struct {
	access Access

	mu   sync.Mutex          // guards kept
	kept map[string]*os.File // by name
}

var _ Listeners = (*Local)(nil)

// NewLocal returns a Local that keeps nothing yet, and lets in whom a says.
func NewLocal(a Access) *Local { return &Local{access: a, kept: map[string]*os.File{}} }

// Listen implements Listeners.
func (h *Local) Listen(_ context.Context, name, path string) (net.Listener, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if f := h.kept[name]; f != nil {
		// FileListener duplicates the descriptor itself; f.Fd is not used, because it would make the socket blocking for everybody.
		if l, err := h.access.adopt(f, path); err == nil {
			return l, nil
		}
		// Nobody finds it any more: its path is gone. A new one takes its place.
		delete(h.kept, name)
		if err := f.Close(); err != nil {
			return nil, fmt.Errorf("export: close lost socket: %w", err)
		}
	}
	l, err := h.access.Bind(path)
	if err != nil {
		return nil, err
	}
	f, err := l.File()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("export: keep socket: %w", err), l.Close())
	}
	h.kept[name] = f
	return l, nil
}

// Forget implements Listeners.
func (h *Local) Forget(_ context.Context, name string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	f := h.kept[name]
	if f == nil {
		return nil
	}
	delete(h.kept, name)
	if err := f.Close(); err != nil {
		return fmt.Errorf("export: forget socket: %w", err)
	}
	return nil
}

// Close forgets everything.
func (h *Local) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var errs []error
	for name, f := range h.kept {
		errs = append(errs, f.Close())
		delete(h.kept, name)
	}
	return errors.Join(errs...)
}
