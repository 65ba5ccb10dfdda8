package local_test

import (
	"testing"

	"ashlar/internal/disk"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
	"ashlar/internal/replica/replicatest"
)

const (
	replicaID = "abcdef0123456789abcdef0123456789"
	boot      = "2f1c7d8e-0000-4000-8000-000000000001"
)

// store is a replica on a disk as replicatest wants it.
type store struct {
	fsys disk.FS
	dir  string
	r    *local.Replica
}

func newStore(t testing.TB, fsys disk.FS, head replica.LayerID, sizeBytes int64) *store {
	t.Helper()
	dir, err := local.Create(fsys, local.CreateConfig{ReplicaID: replicaID, VolumeID: replicatest.VolumeID, Volume: "db1", HeadID: head,
		SizeBytes: sizeBytes, BootID: boot})
	if err != nil {
		t.Fatal(err)
	}
	s := &store{fsys: fsys, dir: dir}
	s.open(t)
	t.Cleanup(func() {
		if err := s.r.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s *store) open(t testing.TB) {
	t.Helper()
	r, err := local.Open(s.fsys, s.dir, local.OpenConfig{BootID: boot})
	if err != nil {
		t.Fatal(err)
	}
	s.r = r
}

// Connect implements replicatest.Copy.
func (s *store) Connect(testing.TB) replica.Replica { return s.r.Connect() }

// Restart implements replicatest.Copy. On a Mem it is kill -9; on a real disk the descriptors can only be closed.
func (s *store) Restart(t testing.TB) {
	t.Helper()
	if m, ok := s.fsys.(*disk.Mem); ok {
		s.fsys = m.Clone()
	}
	if err := s.r.Close(); err != nil {
		t.Fatal(err)
	}
	s.open(t)
}

func TestReplicaMem(t *testing.T) {
	replicatest.Run(t, replicatest.Config{New: func(t testing.TB, head replica.LayerID, sizeBytes int64) replicatest.Copy {
		return newStore(t, disk.NewMem(disk.MemOptions{}), head, sizeBytes)
	}})
}

func TestReplicaMemReflink(t *testing.T) {
	replicatest.Run(t, replicatest.Config{New: func(t testing.TB, head replica.LayerID, sizeBytes int64) replicatest.Copy {
		return newStore(t, disk.NewMem(disk.MemOptions{Reflink: true}), head, sizeBytes)
	}})
}

func TestReplicaReal(t *testing.T) {
	replicatest.Run(t, replicatest.Config{Steps: 60, New: func(t testing.TB, head replica.LayerID, sizeBytes int64) replicatest.Copy {
		fsys, err := disk.OpenReal(t.TempDir(), disk.RealOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := fsys.Close(); err != nil {
				t.Error(err)
			}
		})
		return newStore(t, fsys, head, sizeBytes)
	}})
}
