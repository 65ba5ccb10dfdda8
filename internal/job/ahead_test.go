package job

import (
	"errors"
	"testing"

	"ashlar/internal/disk"
)

// forgetful fails its first Sync and no other, as the kernel does with pages it has lost.
type forgetful struct {
	disk.File
	syncs int
	err   error
}

func (f *forgetful) Sync() error {
	f.syncs++
	if f.syncs == 1 {
		return f.err
	}
	return f.File.Sync()
}

// TestAheadKeepsTheError: a file whose flush failed while it was written is not durable, although the last flush says so.
func TestAheadKeepsTheError(t *testing.T) {
	mem, err := disk.NewMem(disk.MemOptions{}).Create("f", 0)
	if err != nil {
		t.Fatal(err)
	}
	lost := errors.New("lost pages")
	for _, flushes := range []int{0, 1} {
		f := &forgetful{File: mem, err: lost}
		a := newAheadFile(f)
		for range flushes {
			if _, err := a.WriteAt(make([]byte, aheadBytes), 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := a.finish(nil); !errors.Is(err, lost) || f.syncs != flushes+1 {
			t.Errorf("%d flushes ahead: %v after %d", flushes, err, f.syncs)
		}
	}
	f := &forgetful{File: mem, err: lost}
	if err := newAheadFile(f).finish(errors.ErrUnsupported); !errors.Is(err, errors.ErrUnsupported) || f.syncs != 0 {
		t.Errorf("a file nobody wants was flushed: %v", err)
	}
}
