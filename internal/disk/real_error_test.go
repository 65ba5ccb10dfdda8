package disk

import (
	"errors"
	"io/fs"
	"testing"

	"golang.org/x/sys/unix"
)

// TestKernelErrors: what the kernel says keeps its meaning, and both of its ways to say that there is no space get our name for it.
func TestKernelErrors(t *testing.T) {
	if err := wrap("write", "f", nil); err != nil {
		t.Error(err)
	}
	for _, tc := range []struct {
		kernel error
		full   bool
		also   error
	}{
		{unix.ENOSPC, true, unix.ENOSPC},
		{unix.EDQUOT, true, unix.EDQUOT},
		{&fs.PathError{Op: "write", Path: "f", Err: unix.ENOSPC}, true, unix.ENOSPC},
		{unix.EIO, false, unix.EIO},
		{unix.ENOENT, false, fs.ErrNotExist},
		{unix.EEXIST, false, fs.ErrExist},
	} {
		err := wrap("write", "f", tc.kernel)
		if errors.Is(err, ErrNoSpace) != tc.full || !errors.Is(err, tc.also) {
			t.Errorf("%v became %v", tc.kernel, err)
		}
	}
}
