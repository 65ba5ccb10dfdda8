package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// directBytes is the alignment that O_DIRECT gets, in offset, length and memory: no disk asks for more.
const directBytes = 4096

// bounceBytes is the size of the aligned buffers for callers whose memory is not.
const bounceBytes = 256 << 10

// RealFile is one open file of a Real. os.File counts the calls in flight: Close makes later ones fail with
// fs.ErrClosed at once, does not wait for one that is stuck in the kernel, and gives the descriptor back when the last has returned.
type RealFile struct {
	name     string
	f        *os.File
	direct   *os.File // the same file with O_DIRECT; nil without RealOptions.Direct
	readOnly bool
	bounce   *sync.Pool
}

var _ File = (*RealFile)(nil)

// newBouncePool makes a source of aligned buffers of bounceBytes. It holds no more than the calls in flight need, and the
// collector empties it.
func newBouncePool() *sync.Pool {
	return &sync.Pool{New: func() any { b := AlignedBuffer(bounceBytes); return &b }}
}

// AlignedBuffer returns n bytes of zeros at an address that O_DIRECT takes without a copy.
func AlignedBuffer(n int) []byte {
	b := make([]byte, n+directBytes)
	skip := (directBytes - int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))%directBytes)) % directBytes
	return b[skip : skip+n : skip+n]
}

func alignedMemory(b []byte) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(b)))%directBytes == 0
}

// file makes a RealFile of f, whose mode is O_RDWR or O_RDONLY, and checks that it is a regular file.
func (d *Real) file(f *os.File, name string, mode int) (*RealFile, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.IsDir() {
		return nil, unix.EISDIR
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("not a regular file: %w", fs.ErrInvalid)
	}
	r := &RealFile{name: name, f: f, readOnly: mode == os.O_RDONLY, bounce: d.bounce}
	if !d.opts.Direct {
		return r, nil
	}
	if r.direct, err = d.root.OpenFile(name, mode|unix.O_DIRECT, 0); err != nil {
		return nil, err
	}
	again, err := r.direct.Stat()
	if err == nil && !os.SameFile(st, again) {
		err = fmt.Errorf("was replaced while it was opened: %w", fs.ErrInvalid)
	}
	if err != nil {
		return nil, errors.Join(err, r.direct.Close())
	}
	return r, nil
}

// Fd returns the descriptor that holds the lock, to be passed to another process. It is valid until Close.
func (f *RealFile) Fd() uintptr { return f.f.Fd() }

// ReadAt implements io.ReaderAt.
func (f *RealFile) ReadAt(b []byte, off int64) (int, error) {
	if off < 0 {
		return 0, wrap("read", f.name, fs.ErrInvalid)
	}
	if len(b) == 0 {
		return 0, nil
	}
	var n int
	var err error
	if f.direct == nil {
		n, err = f.f.ReadAt(b, off)
	} else {
		n, err = f.readDirect(b, off)
	}
	if err == nil || err == io.EOF {
		return n, err
	}
	return n, wrap("read", f.name, err)
}

func (f *RealFile) readDirect(b []byte, off int64) (n int, err error) {
	if (off|int64(len(b)))%directBytes == 0 && alignedMemory(b) {
		n, err = f.direct.ReadAt(b, off)
		return f.readTail(b, off, n, err)
	}
	p := f.bounce.Get().(*[]byte)
	defer f.bounce.Put(p)
	for n < len(b) {
		skip := int((off + int64(n)) % directBytes)
		want := min(len(b)-n, bounceBytes-skip)
		whole := (skip + want + directBytes - 1) / directBytes * directBytes
		got, err := f.direct.ReadAt((*p)[:whole], off+int64(n-skip))
		got, err = f.readTail((*p)[:whole], off+int64(n-skip), got, err)
		if got < skip+want {
			if err == nil {
				err = io.ErrUnexpectedEOF
			}
			if got > skip {
				n += copy(b[n:], (*p)[skip:got])
			}
			return n, err
		}
		n += copy(b[n:n+want], (*p)[skip:])
	}
	return n, nil
}

// readTail goes on after a direct read that ended at a file's odd end, where the kernel refuses to continue with EINVAL.
func (f *RealFile) readTail(b []byte, off int64, n int, err error) (int, error) {
	if err == nil || !errors.Is(err, unix.EINVAL) {
		return n, err
	}
	m, err := f.f.ReadAt(b[n:], off+int64(n))
	return n + m, err
}

// WriteAt implements File.
func (f *RealFile) WriteAt(b []byte, off int64) (n int, err error) {
	switch {
	case f.readOnly:
		return 0, wrap("write", f.name, fs.ErrPermission)
	case off < 0:
		return 0, wrap("write", f.name, fs.ErrInvalid)
	case len(b) == 0:
		return 0, nil
	case f.direct == nil || (off|int64(len(b)))%directBytes != 0:
		n, err = f.f.WriteAt(b, off)
	case alignedMemory(b):
		n, err = f.direct.WriteAt(b, off)
	default:
		n, err = f.writeBounced(b, off)
	}
	if err != nil {
		return n, wrap("write", f.name, err)
	}
	return n, nil
}

func (f *RealFile) writeBounced(b []byte, off int64) (n int, err error) {
	p := f.bounce.Get().(*[]byte)
	defer f.bounce.Put(p)
	for n < len(b) {
		part := copy(*p, b[n:])
		done, err := f.direct.WriteAt((*p)[:part], off+int64(n))
		n += done
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// control runs do with f's descriptor, which stays open meanwhile, again when a signal interrupted it.
func control(f *os.File, do func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = raw.Control(func(fd uintptr) {
		for {
			if result = do(int(fd)); result != unix.EINTR {
				return
			}
		}
	})
	if err != nil {
		return fs.ErrClosed // the one reason Control has, in words that errors.Is does not know
	}
	return result
}

// fallocate checks the range and calls the kernel.
func (f *RealFile) fallocate(verb string, mode uint32, off, n int64) error {
	switch {
	case f.readOnly:
		return wrap(verb, f.name, fs.ErrPermission)
	case off < 0 || n < 0:
		return wrap(verb, f.name, fs.ErrInvalid)
	case n == 0:
		return nil
	}
	err := control(f.f, func(fd int) error { return unix.Fallocate(fd, mode, off, n) })
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = fmt.Errorf("%w: %w", ErrNotSupported, err)
	}
	return wrap(verb, f.name, err)
}

// Punch implements File.
func (f *RealFile) Punch(off, n int64) error {
	return f.fallocate("punch", unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// Reserve implements File.
func (f *RealFile) Reserve(off, n int64) error {
	return f.fallocate("reserve", unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// NextData implements File. It moves the descriptor's file position, which nothing else uses.
func (f *RealFile) NextData(off int64) (dataOff, n int64, err error) {
	if off < 0 {
		return 0, 0, wrap("next data", f.name, fs.ErrInvalid)
	}
	var end int64
	err = control(f.f, func(fd int) (err error) {
		if dataOff, err = unix.Seek(fd, off, unix.SEEK_DATA); err == nil {
			end, err = unix.Seek(fd, dataOff, unix.SEEK_HOLE)
		}
		return err
	})
	if errors.Is(err, unix.ENXIO) {
		return 0, 0, io.EOF
	}
	if err != nil {
		return 0, 0, wrap("next data", f.name, err)
	}
	return dataOff, end - dataOff, nil
}

// ShareFrom implements File with FICLONERANGE.
func (f *RealFile) ShareFrom(src File, srcOff, off, n int64) error {
	from, ok := src.(*RealFile)
	switch {
	case !ok:
		return wrap("share", f.name, ErrNotSupported)
	case f.readOnly:
		return wrap("share", f.name, fs.ErrPermission)
	case srcOff < 0 || off < 0 || n < 0:
		return wrap("share", f.name, fs.ErrInvalid)
	case n == 0:
		return nil // to the kernel 0 would mean "to the end"
	}
	err := control(from.f, func(srcFd int) error {
		return control(f.f, func(fd int) error {
			return unix.IoctlFileCloneRange(fd, &unix.FileCloneRange{
				Src_fd: int64(srcFd), Src_offset: uint64(srcOff), Src_length: uint64(n), Dest_offset: uint64(off),
			})
		})
	})
	for _, no := range []error{unix.EOPNOTSUPP, unix.ENOTTY, unix.EXDEV, unix.ENOSYS} {
		if errors.Is(err, no) {
			err = fmt.Errorf("%w: %w", ErrNotSupported, err)
			break
		}
	}
	return wrap("share", f.name, err)
}

// Sync implements File with fdatasync, which also writes back what went through the page cache and empties the disk's own.
func (f *RealFile) Sync() error {
	return wrap("sync", f.name, control(f.f, unix.Fdatasync))
}

// Size implements File.
func (f *RealFile) Size() (int64, error) {
	st, err := f.f.Stat()
	if err != nil {
		return 0, wrap("size", f.name, err)
	}
	return st.Size(), nil
}

// Allocated implements File.
func (f *RealFile) Allocated() (int64, error) {
	st, err := f.f.Stat()
	if err != nil {
		return 0, wrap("allocated", f.name, err)
	}
	return allocatedBytes(st), nil
}

// allocatedBytes is st_blocks, which counts 512 bytes whatever the file system's block is.
func allocatedBytes(st os.FileInfo) int64 {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return sys.Blocks * 512
	}
	return st.Size()
}

// Lock implements File with flock, which belongs to the open file and is passed on with its descriptor.
func (f *RealFile) Lock() error {
	err := control(f.f, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrLocked
	}
	return wrap("lock", f.name, err)
}

// Close implements File.
func (f *RealFile) Close() error {
	err := f.f.Close()
	if f.direct != nil {
		err = errors.Join(err, f.direct.Close())
	}
	return wrap("close", f.name, err)
}
