package disk_test

import (
	"errors"
	"testing"

	"ashlar/internal/disk"
	"ashlar/internal/disk/disktest"
)

func TestMem(t *testing.T) {
	for name, opts := range map[string]disk.MemOptions{"plain": {}, "reflink": {Reflink: true}, "limited": {CapacityBytes: 1 << 30}} {
		t.Run(name, func(t *testing.T) {
			disktest.Run(t, func(*testing.T) disk.FS { return disk.NewMem(opts) })
		})
	}
}

// TestMemAfterCrash checks that what a crash or a clone leaves is as good a file system as a new one.
func TestMemAfterCrash(t *testing.T) {
	disktest.Run(t, func(*testing.T) disk.FS {
		return disk.NewMem(disk.MemOptions{}).Crash(disk.CrashOptions{Keep: disk.KeepAll})
	})
	disktest.Run(t, func(*testing.T) disk.FS { return disk.NewMem(disk.MemOptions{}).Clone() })
}

func TestReal(t *testing.T) {
	for name, opts := range map[string]disk.RealOptions{"cached": {}, "direct": {Direct: true}} {
		t.Run(name, func(t *testing.T) {
			disktest.Run(t, func(t *testing.T) disk.FS {
				d, err := disk.OpenReal(t.TempDir(), opts)
				if errors.Is(err, disk.ErrNotSupported) {
					t.Skipf("the temporary directory has no O_DIRECT: %v", err)
				}
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := d.Close(); err != nil {
						t.Error(err)
					}
				})
				return d
			})
		})
	}
}
