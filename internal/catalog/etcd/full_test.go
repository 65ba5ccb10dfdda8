//go:build integration

package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/catalog/etcd"
)

// smallDisk mounts an ext4 of its own on dir.
func smallDisk(t *testing.T, dir string, mib int) {
	t.Helper()
	img := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, int64(mib)<<20); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", img}, {"mount", "-o", "loop", img, dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() {
		// Lazily: a member that failed may have files open until the process ends.
		if out, err := exec.Command("umount", "-l", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
}

// fill writes a file until the disk is full.
func fill(t *testing.T, dir string) (file string) {
	t.Helper()
	file = filepath.Join(dir, "ballast")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, n := range []int{1 << 20, 4 << 10, 512} {
		for block := make([]byte, n); err == nil; {
			_, err = f.Write(block)
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		err = nil
	}
	return file
}

// grow puts records until the catalogue refuses one; it returns how many were acknowledged.
func grow(t *testing.T, s *etcd.Store, prefix string) (acked int, err error) {
	t.Helper()
	value := []byte(`"` + strings.Repeat("x", 64<<10) + `"`)
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	for i := 0; ; i++ {
		if _, err := s.Put(ctx, catalog.VolumeKey(catalog.Wanted, fmt.Sprintf("%s%05d", prefix, i)), value, 0); err != nil {
			return i, err
		}
		if i > 20_000 {
			t.Fatal("the disk does not become full")
		}
	}
}

// TestFullDiskAlone: a lone member whose disk is full stops and says why; the process lives. With room again, another process has all that was acknowledged.
func TestFullDiskAlone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	smallDisk(t, dir, 160)
	s, err := tryOpen(t, etcd.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, "first")
	file := fill(t, dir)
	acked, err := grow(t, s, "v")
	if !errors.Is(err, catalog.ErrUnreachable) || !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("after %d records: %v", acked, err)
	}
	t.Logf("after %d records: %v", acked, err)
	select {
	case <-s.MemberFailed():
	default:
		t.Fatal("the member is not said to have failed")
	}
	if state, err := s.MemberState(); state != etcd.StateFailed || !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("state %v, %v", state, err)
	}
	begin := time.Now()
	if _, err := s.Get(t.Context(), catalog.VolumeKey(catalog.Wanted, "first")); !errors.Is(err, catalog.ErrUnreachable) || !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("get: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	t.Logf("said and closed after %v", time.Since(begin).Round(time.Millisecond))
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	s, err = tryOpen(t, etcd.Options{Dir: dir})
	if errors.Is(err, etcd.ErrInUse) {
		t.Log("the directory is in use until the process ends")
		clone := t.TempDir() // what another process would find
		if err := os.CopyFS(clone, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		s, err = tryOpen(t, etcd.Options{Dir: clone})
	}
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if n := len(strings.Fields(names(t, s))); n < acked+1 {
		t.Fatalf("%d records, %d were acknowledged", n, acked+1)
	}
	put(t, s, "last")
}

// TestFullDiskLog: the same where the log finds no room for its next file.
func TestFullDiskLog(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	smallDisk(t, dir, 170) // a log file has 64 MB, and the next one is made in advance
	s, err := tryOpen(t, etcd.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	k := catalog.VolumeKey(catalog.Wanted, "a")
	value := []byte(`"` + strings.Repeat("x", 256<<10) + `"`)
	var was catalog.Rev
	for i := 0; err == nil; i++ {
		var rev catalog.Rev
		if rev, err = s.Put(t.Context(), k, value, was); err == nil {
			was = rev
			if i%10 == 0 { // the database stays small
				err = s.Compact(t.Context())
			}
		}
		if i > 2000 {
			t.Fatal("the log does not become full")
		}
	}
	if !errors.Is(err, catalog.ErrUnreachable) || !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	t.Log(err)
	begin := time.Now()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	t.Logf("closed after %v", time.Since(begin).Round(time.Millisecond))
	clone := t.TempDir() // what a process finds when there is room
	if err := os.CopyFS(clone, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	s, err = tryOpen(t, etcd.Options{Dir: clone})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if e, err := s.Get(t.Context(), k); err != nil || e.Rev < was {
		t.Fatalf("the record is at %d, %v; %d was acknowledged", e.Rev, err, was)
	}
}

// TestFullDisk: the member on one node's full disk stops; that node goes on through the others, and nothing is lost.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	n := c.nodes[1]
	smallDisk(t, n.dir, 160)
	c.start()
	l := startLoad(t, c.stores())
	l.more(20)
	fill(t, n.dir)
	begin := time.Now()
	for i := 0; ; i++ {
		select {
		case <-n.store.MemberFailed():
		default:
			if i > 20_000 {
				t.Fatal("the disk does not become full")
			}
			// A record that was not acknowledged is nobody's loss: the leader may have been the one with the full disk.
			_, err := c.nodes[0].store.Put(t.Context(), catalog.VolumeKey(catalog.Wanted, fmt.Sprint(i)), []byte(`"`+strings.Repeat("x", 64<<10)+`"`), 0)
			if err != nil && !errors.Is(err, catalog.ErrUnreachable) {
				t.Fatal(err)
			}
			continue
		}
		break
	}
	state, err := n.store.MemberState()
	if state != etcd.StateFailed || !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("state %v, %v", state, err)
	}
	t.Logf("after %v: %v", time.Since(begin).Round(time.Millisecond), err)
	l.more(50)
	put(t, n.store, "through the others")
	l.stop(n.store, "n1", "n2", "n3")
	eventually(t, time.Minute, "the others see that it is gone", func() bool {
		ms, err := n.store.Members(t.Context())
		return err == nil && len(ms) == 3 && !ms[1].Alive
	})
}
