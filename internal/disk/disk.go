// Package disk is the kernel's side of storage behind one seam: FS and File. Real goes to the kernel; Mem is a file system
// in memory that can lose power (Crash): it drops any subset of what was not flushed, tears writes at 512 bytes, fails an fsync and
// drops its pages, and runs out of space on request. Everything that keeps bytes on a disk takes an FS, so that every
// proof about power cuts runs against the code that ships.
//
// It imports nothing of ours. Read next: layer, which keeps units in Files.
package disk

import (
	"errors"
	"io"
	"io/fs"
)

// FS is the files below one directory, the root of a disk. Names are slash-separated and relative, without "..".
// All methods may be called concurrently. Errors from the operating system are wrapped and satisfy errors.Is
// with fs.ErrNotExist, fs.ErrExist, ErrNoSpace where they apply.
//
// A name (made by Create, Mkdir, Rename, Remove) survives a power cut only after SyncDir of its directory.
type FS interface {
	// Create makes a new file of n bytes, all holes, open for reading and writing; fs.ErrExist if the name is taken.
	Create(name string, n int64) (File, error)
	// Open opens a file for reading and writing.
	Open(name string) (File, error)
	// OpenRead opens a file for reading only.
	OpenRead(name string) (File, error)
	// Mkdir makes a directory and its missing parents, and is content if it exists.
	Mkdir(name string) error
	// Rename moves oldName over newName atomically.
	Rename(oldName, newName string) error
	// Remove removes a file or an empty directory.
	Remove(name string) error
	// List returns the names in a directory, sorted.
	List(dir string) ([]string, error)
	// Stat says whether a name exists and is a directory, its size and its allocated bytes.
	Stat(name string) (Info, error)
	// SyncDir makes the names in dir durable.
	SyncDir(dir string) error
	// Usage returns the file system's size and what is free to us, in bytes.
	Usage() (totalBytes, freeBytes int64, err error)
}

// Info is what Stat tells of a name.
type Info struct {
	Dir                       bool
	SizeBytes, AllocatedBytes int64
}

// File is one open file. ReadAt, WriteAt, Punch, Reserve and Sync may be called concurrently. A WriteAt that returned survives
// the death of the process; only Sync makes it survive a power cut. After a failed Sync the pages may be gone: callers never retry into
// success.
type File interface {
	io.ReaderAt
	// WriteAt writes through the page cache (or O_DIRECT where the file was opened so). ErrNoSpace when the disk is full; then any
	// prefix of sectors may have been written.
	io.WriterAt
	// Punch frees [off, off+n): it reads as zero after. Whole file-system blocks are freed, edges are zeroed. The size stays.
	Punch(off, n int64) error
	// Reserve allocates [off, off+n) so that later writes to it cannot fail for lack of space. Content is unchanged,
	// holes read as zero. Survives a power cut after the next Sync.
	Reserve(off, n int64) error
	// NextData returns the first range at or after off that is not a hole, and io.EOF if there is none (SEEK_DATA/SEEK_HOLE).
	NextData(off int64) (dataOff, n int64, err error)
	// ShareFrom makes [off, off+n) share src's blocks at srcOff where the file system can (reflink), else ErrNotSupported.
	ShareFrom(src File, srcOff, off, n int64) error
	// Sync makes content, allocation and size durable (fdatasync), not the name.
	Sync() error
	// Size returns the file's length in bytes.
	Size() (int64, error)
	// Allocated returns the bytes the file occupies on the disk.
	Allocated() (int64, error)
	// Lock takes the file's advisory lock (flock) without waiting: exclusively, or ErrLocked. Closing the last descriptor frees it.
	Lock() error
	io.Closer
}

var (
	// ErrNoSpace: the disk is full.
	ErrNoSpace = errors.New("no space left on disk")
	// ErrLocked: another descriptor, perhaps of another process, holds the lock.
	ErrLocked = errors.New("locked by another process")
	// ErrNotSupported: this file system cannot do it.
	ErrNotSupported = errors.New("not supported by this file system")
	// ErrPower: the simulated machine lost power; only a Mem made by Crash continues.
	ErrPower = errors.New("power is off")
)

// Exists tells whether name exists; an error other than absence is returned.
func Exists(fsys FS, name string) (bool, error) {
	_, err := fsys.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
