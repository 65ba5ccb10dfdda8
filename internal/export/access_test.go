package export

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAccess: with a group its members reach the sockets, whatever the umask, also those that were kept from when it was another; without one nobody does.
func TestAccess(t *testing.T) {
	gid := os.Getegid()
	if os.Geteuid() == 0 {
		gid = 65534 // root may give to any
	}
	dir := filepath.Join(t.TempDir(), "run", "nbd")
	held := newLocal(t)
	for _, umask := range []int{0, 0o077} {
		old := unix.Umask(umask)
		defer unix.Umask(old)
		for _, a := range []Access{{}, {GroupID: gid}, {}, {GroupID: gid}} {
			held.access = a
			n := newFrontend(t, dir, held)
			if _, err := n.Add(context.Background(), "kept", disk(t, "kept"), Options{}); err != nil {
				t.Fatal(err)
			}
			if _, err := n.Add(context.Background(), "new", disk(t, "new"), Options{}); err != nil {
				t.Fatal(err)
			}
			want := map[string]fs.FileMode{dir: fs.ModeDir | 0o700, n.Path("kept"): fs.ModeSocket | 0o600, n.Path("new"): fs.ModeSocket | 0o600}
			if a.GroupID != 0 {
				want = map[string]fs.FileMode{dir: fs.ModeDir | 0o710, n.Path("kept"): fs.ModeSocket | 0o660, n.Path("new"): fs.ModeSocket | 0o660}
			}
			for path, mode := range want {
				info, err := os.Lstat(path)
				if err != nil || info.Mode() != mode {
					t.Errorf("%+v: %s: %v %v, want %v", a, path, info.Mode(), err, mode)
				}
				if got := int(info.Sys().(*syscall.Stat_t).Gid); a.GroupID != 0 && got != gid {
					t.Errorf("%s belongs to group %d, want %d", path, got, gid)
				}
			}
			wantVisit(t, n.Path("kept"), "kept", "kept")
			if err := n.Remove(context.Background(), "new"); err != nil {
				t.Fatal(err)
			}
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}
