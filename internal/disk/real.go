package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// RealOptions says how a Real does its data I/O.
type RealOptions struct {
	// Direct goes around the page cache (O_DIRECT) for data: reads, and writes of whole 4096-byte blocks. Other writes take the
	// page cache's way; the kernel keeps both views the same as long as the ranges of concurrent calls do not overlap.
	// OpenReal answers ErrNotSupported where the file system has no O_DIRECT.
	Direct bool
}

// Real is the files below one directory of this machine. No name leads out of it, not even through a symbolic link.
type Real struct {
	root   *os.Root
	opts   RealOptions
	bounce *sync.Pool // aligned memory for callers who have none
}

var _ FS = (*Real)(nil)

// OpenReal returns the file system below the existing directory root. Close frees its descriptor.
func OpenReal(root string, opts RealOptions) (*Real, error) {
	r, err := os.OpenRoot(root)
	if err != nil {
		return nil, fmt.Errorf("disk: open %s: %w", root, err)
	}
	d := &Real{root: r, opts: opts, bounce: newBouncePool()}
	if err := d.probe(); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return d, nil
}

// probe finds out whether the file system takes O_DIRECT, with a file that has no name or, where there are no such files, with one that
// is removed at once.
func (d *Real) probe() error {
	if !d.opts.Direct {
		return nil
	}
	f, err := d.root.OpenFile(".", unix.O_TMPFILE|os.O_RDWR|unix.O_DIRECT, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) {
		name := fmt.Sprintf(".direct-%d", os.Getpid())
		f, err = d.root.OpenFile(name, os.O_CREATE|os.O_RDWR|unix.O_DIRECT, 0o600)
		defer func() { _ = d.root.Remove(name) }() // may not exist; empty if it stays
	}
	if errors.Is(err, unix.EINVAL) {
		err = fmt.Errorf("%w: %w", ErrNotSupported, err)
	}
	if err != nil {
		return fmt.Errorf("disk: O_DIRECT on %s: %w", d.root.Name(), err)
	}
	return f.Close()
}

// Close frees the root's descriptor. Open files go on.
func (d *Real) Close() error {
	if err := d.root.Close(); err != nil {
		return fmt.Errorf("disk: close: %w", err)
	}
	return nil
}

// wrap names the operation, and adds ErrNoSpace to the ways the kernel says it.
func wrap(verb, name string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("disk: %s %s: %w: %w", verb, name, ErrNoSpace, err)
	}
	return fmt.Errorf("disk: %s %s: %w", verb, name, err)
}

// valid refuses names that are not plain relative ones, which os.Root alone would clean up first.
func valid(verb string, names ...string) error {
	for _, name := range names {
		if !fs.ValidPath(name) {
			return wrap(verb, name, fs.ErrInvalid)
		}
	}
	return nil
}

// Create implements FS.
func (d *Real) Create(name string, n int64) (File, error) {
	if err := valid("create", name); err != nil {
		return nil, err
	}
	if n < 0 {
		return nil, wrap("create", name, fs.ErrInvalid)
	}
	f, err := d.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, wrap("create", name, err)
	}
	err = f.Truncate(n)
	var file *RealFile
	if err == nil {
		file, err = d.file(f, name, os.O_RDWR)
	}
	if err != nil {
		// Nobody has seen the file: take it away again, so that a second try does not meet it.
		return nil, errors.Join(wrap("create", name, err), f.Close(), d.root.Remove(name))
	}
	return file, nil
}

// Open implements FS.
func (d *Real) Open(name string) (File, error) { return d.open(name, os.O_RDWR) }

// OpenRead implements FS.
func (d *Real) OpenRead(name string) (File, error) { return d.open(name, os.O_RDONLY) }

func (d *Real) open(name string, mode int) (File, error) {
	if err := valid("open", name); err != nil {
		return nil, err
	}
	f, err := d.root.OpenFile(name, mode, 0)
	if err != nil {
		return nil, wrap("open", name, err)
	}
	file, err := d.file(f, name, mode)
	if err != nil {
		return nil, errors.Join(wrap("open", name, err), f.Close())
	}
	return file, nil
}

// Adopt makes a File of a descriptor that another process opened for reading and writing, and passed with its lock. The name must lead to the
// same file. Adopt owns f from then on, also when it fails.
func (d *Real) Adopt(f *os.File, name string) (*RealFile, error) {
	file, err := d.adopt(f, name)
	if err != nil {
		return nil, errors.Join(wrap("adopt", name, err), f.Close())
	}
	return file, nil
}

func (d *Real) adopt(f *os.File, name string) (*RealFile, error) {
	if err := valid("adopt", name); err != nil {
		return nil, err
	}
	named, err := d.root.Stat(name)
	if err != nil {
		return nil, err
	}
	passed, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !os.SameFile(named, passed) {
		return nil, fmt.Errorf("the descriptor is of another file: %w", fs.ErrInvalid)
	}
	return d.file(f, name, os.O_RDWR)
}

// Mkdir implements FS.
func (d *Real) Mkdir(name string) error {
	if err := valid("mkdir", name); err != nil {
		return err
	}
	return wrap("mkdir", name, d.root.MkdirAll(name, 0o700))
}

// Rename implements FS.
func (d *Real) Rename(oldName, newName string) error {
	if err := valid("rename", oldName, newName); err != nil {
		return err
	}
	return wrap("rename", oldName+" to "+newName, d.root.Rename(oldName, newName))
}

// Remove implements FS.
func (d *Real) Remove(name string) error {
	if err := valid("remove", name); err != nil {
		return err
	}
	return wrap("remove", name, d.root.Remove(name))
}

// List implements FS.
func (d *Real) List(dir string) ([]string, error) {
	if err := valid("list", dir); err != nil {
		return nil, err
	}
	f, err := d.root.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, wrap("list", dir, err)
	}
	names, err := f.Readdirnames(-1)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, wrap("list", dir, err)
	}
	slices.Sort(names)
	return names, nil
}

// Stat implements FS.
func (d *Real) Stat(name string) (Info, error) {
	if err := valid("stat", name); err != nil {
		return Info{}, err
	}
	st, err := d.root.Stat(name)
	if err != nil {
		return Info{}, wrap("stat", name, err)
	}
	if st.IsDir() {
		return Info{Dir: true}, nil
	}
	return Info{SizeBytes: st.Size(), AllocatedBytes: allocatedBytes(st)}, nil
}

// SyncDir implements FS.
func (d *Real) SyncDir(dir string) error {
	if err := valid("sync directory", dir); err != nil {
		return err
	}
	f, err := d.root.OpenFile(path.Clean(dir), os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return wrap("sync directory", dir, err)
	}
	return wrap("sync directory", dir, errors.Join(f.Sync(), f.Close()))
}

// Usage implements FS. What is free to us is what is free to an unprivileged user: the file system's own reserve is not counted.
func (d *Real) Usage() (totalBytes, freeBytes int64, err error) {
	f, err := d.root.Open(".")
	if err != nil {
		return 0, 0, wrap("usage of", d.root.Name(), err)
	}
	var st unix.Statfs_t
	err = control(f, func(fd int) error { return unix.Fstatfs(fd, &st) })
	if err = errors.Join(err, f.Close()); err != nil {
		return 0, 0, wrap("usage of", d.root.Name(), err)
	}
	unit := int64(st.Frsize)
	return int64(st.Blocks) * unit, int64(st.Bavail) * unit, nil
}
