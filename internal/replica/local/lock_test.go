package local_test

import (
	"errors"
	"testing"

	"ashlar/internal/disk"
	"ashlar/internal/replica/local"
)

// TestLockPasses: from one open to the next the lock goes along with its descriptor, and at no moment in between can anybody else open the replica.
func TestLockPasses(t *testing.T) {
	for name, opts := range map[string]disk.RealOptions{"cache": {}, "direct": {Direct: true}} {
		t.Run(name, func(t *testing.T) {
			fsys, err := disk.OpenReal(t.TempDir(), opts)
			if errors.Is(err, disk.ErrNotSupported) {
				t.Skip(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer fsys.Close()
			dir, err := local.Create(fsys, createConfig())
			if err != nil {
				t.Fatal(err)
			}
			locked := func(when string) {
				t.Helper()
				if r, err := local.Open(fsys, dir, local.OpenConfig{BootID: boot}); !errors.Is(err, disk.ErrLocked) {
					t.Errorf("%s: another opens it: %v", when, err)
					if err == nil {
						r.Close()
					}
				}
			}
			r, err := local.Open(fsys, dir, local.OpenConfig{BootID: boot})
			for range 3 {
				if err != nil {
					t.Fatal(err)
				}
				passed, lockErr := r.Lock()
				if lockErr != nil {
					t.Fatal(lockErr)
				}
				locked("before")
				if err := r.Close(); err != nil {
					t.Fatal(err)
				}
				locked("between")
				r, err = local.Open(fsys, dir, local.OpenConfig{BootID: boot, Lock: passed})
				locked("after")
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := r.Lock(); err == nil {
				t.Error("a closed replica passes its lock")
			}
			r, err = local.Open(fsys, dir, local.OpenConfig{BootID: boot}) // nobody has it now
			if err != nil {
				t.Fatal(err)
			}
			r.Close()
		})
	}
}

// TestLockOfAnotherReplica: a descriptor that is not the record's is refused, and closed.
func TestLockOfAnotherReplica(t *testing.T) {
	fsys, err := disk.OpenReal(t.TempDir(), disk.RealOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer fsys.Close()
	c := createConfig()
	dir, err := local.Create(fsys, c)
	if err != nil {
		t.Fatal(err)
	}
	c.ReplicaID, c.HeadID = "11"+c.ReplicaID[2:], "22"+c.HeadID[2:]
	other, err := local.Create(fsys, c)
	if err != nil {
		t.Fatal(err)
	}
	r, err := local.Open(fsys, other, local.OpenConfig{BootID: boot})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	lock, err := r.Lock()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := local.Open(fsys, dir, local.OpenConfig{BootID: boot, Lock: lock}); err == nil {
		got.Close()
		t.Error("opened under another replica's lock")
	}
	if _, err := lock.Stat(); err == nil {
		t.Error("the descriptor is left open")
	}
}
