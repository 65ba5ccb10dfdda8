//go:build integration

package dataplane

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ashlar/internal/dataplane/client"
)

func sh(t *testing.T, script string, args ...string) string {
	t.Helper()
	out, err := exec.Command("sh", append([]string{"-euc", script, "sh"}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", script, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// copying is a workload in a mounted directory: it copies a file again and again and compares what is on the device, not what the page cache still has of it (dd(1), nocache).
const copying = `i=0; while [ $i -lt $2 ]; do cp "$1/a" "$1/b"; sync "$1/b"; dd if="$1/b" iflag=nocache count=0 status=none; cmp "$1/a" "$1/b"; sync -f "$1"; i=$((i+1)); done`

// TestBlockDevice uses a volume as a host does: a file system on it, mounted while the data process is killed, snapshotted, expanded; it cannot be closed until it is unmounted.
func TestBlockDevice(t *testing.T) {
	b := newProcs(t)
	c := b.readyProcs()
	t.Cleanup(func() { os.Remove(devDirOf(b.runDir)) }) // unless something is left in it
	a := b.volume(c, 1, 256*mib)
	a.Frontend = frontendBlockdev
	st := b.open(c, a)
	dev := devDirOf(b.runDir) + "/vol1"
	if st.Endpoint != dev {
		t.Fatalf("endpoint %q, want %q", st.Endpoint, dev)
	}
	mnt := filepath.Join(filepath.Dir(b.runDir), "mnt")
	sh(t, `mkfs.ext4 -q "$1"; mkdir "$2"; mount "$1" "$2"; head -c 20000000 /dev/urandom > "$2/a"; sync`, dev, mnt)
	mounted := true
	t.Cleanup(func() {
		if mounted {
			exec.Command("umount", mnt).Run()
			if err := c.CloseVolume(context.Background(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
				t.Errorf("left behind: %v", err)
			}
		}
	})
	busy := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID})
	wantCode(t, "close while it is mounted", busy, client.CodeInUse)
	wantCode(t, "end everything while it is mounted", c.Shutdown(t.Context(), client.Shutdown{Holder: true}), client.CodeInUse)
	if st, _ := status(t, c, a.VolumeID); st.State != stateOpen || st.Endpoint != dev || st.Stats.WriteBytes == 0 {
		t.Errorf("refused, and it is %+v", st)
	}

	// Killed under a file system that is written: nobody notices.
	work := exec.Command("sh", "-euc", copying, "sh", mnt, "40")
	var said bytes.Buffer
	work.Stdout, work.Stderr = &said, &said
	if err := work.Start(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		pid := b.dataPID()
		b.kill(pid)
		eventually(t, "the volume is back", func() bool {
			if now := b.dataPID(); now == 0 || now == pid {
				return false
			}
			st, err := c.State(t.Context())
			return err == nil && len(st.Volumes) == 1 && st.Volumes[0].State == stateOpen && st.Volumes[0].Stats.WriteOps > 0
		})
	}
	if err := work.Wait(); err != nil {
		st, _ := status(t, c, a.VolumeID)
		t.Fatalf("%+v\nwork under kills: %v\n%s", st.Stats, err, said.String())
	}

	// What was written and not synced is in a snapshot all the same.
	sh(t, `cp "$1/a" "$1/c"`, mnt)
	if _, err := c.Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, Verb: verbSnapshot, Snapshot: "s", OpID: id("oper", 1)}); err != nil {
		t.Fatal(err)
	}
	src, err := c.OpenSource(t.Context(), client.OpenSource{ID: id("sour", 1), VolumeID: a.VolumeID, Snapshot: "s"})
	if err != nil {
		t.Fatal(err)
	}
	raw := filepath.Join(filepath.Dir(b.runDir), "snapshot.raw")
	sh(t, `nbdcopy "$1" "$2"; e2fsck -fy "$2" >/dev/null || [ $? -le 1 ]; debugfs -R "dump /c $2.c" "$2" 2>/dev/null; cmp "$2.c" "$3/a"`, src.URI, raw, mnt)

	// Expanded while mounted. (Growing the file system while mounted would need a capability that root in a container may lack.)
	if st, err = c.Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, Verb: verbExpand, SizeBytes: 512 * mib, OpID: id("oper", 2)}); err != nil || st.SizeBytes != 512*mib {
		t.Fatalf("expand: %+v, %v", st, err)
	}
	if got := sh(t, `blockdev --getsize64 "$(readlink -f "$1")"`, dev); got != "536870912" {
		t.Errorf("the block device has %s bytes", got)
	}
	sh(t, `cp "$2/a" "$2.a"; umount "$2"; e2fsck -fp "$1"; resize2fs "$1"; mount "$1" "$2"; cmp "$2.a" "$2/a"; cmp "$2.a" "$2/b"; head -c 300000000 /dev/zero > "$2/large"; umount "$2"; e2fsck -fn "$1"`, dev, mnt)
	mounted = false
	if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(dev); !os.IsNotExist(err) {
		t.Errorf("closed, and the device is there: %v", err)
	}
	if _, there := status(t, c, a.VolumeID); there {
		t.Error("closed, and in the state")
	}
}

// TestFarBlockDevice: a block device whose volume's replica is another node's is mounted and written while either node's data process is killed: no writer sees an error, and fsck finds nothing.
func TestFarBlockDevice(t *testing.T) {
	w := newTown(t, 2, newProcs)
	cs := w.readyProcs()
	b, c := w.beds[0], cs[0]
	t.Cleanup(func() { os.Remove(devDirOf(b.runDir)) })
	a := w.openBy(w.beds[1].volume(cs[1], 1, 128*mib), 1, 0)
	a.Frontend = frontendBlockdev
	dev := b.open(c, a).Endpoint
	mnt := filepath.Join(filepath.Dir(b.runDir), "mnt")
	sh(t, `mkfs.ext4 -q "$1"; mkdir "$2"; mount "$1" "$2"; head -c 5000000 /dev/urandom > "$2/a"; sync`, dev, mnt)
	mounted := true
	t.Cleanup(func() {
		if mounted {
			exec.Command("umount", mnt).Run()
			if err := c.CloseVolume(context.Background(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
				t.Errorf("left behind: %v", err)
			}
		}
	})
	wantCode(t, "close while it is mounted, with force", c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID, Force: true}), client.CodeInUse)
	work := exec.Command("sh", "-euc", copying, "sh", mnt, "30")
	var said bytes.Buffer
	work.Stdout, work.Stderr = &said, &said
	if err := work.Start(); err != nil {
		t.Fatal(err)
	}
	for _, node := range []int{1, 0, 1, 0} {
		pid := w.beds[node].dataPID()
		w.beds[node].kill(pid)
		eventually(t, "the volume is back", func() bool {
			if now := w.beds[node].dataPID(); now == 0 || now == pid {
				return false
			}
			st, err := c.State(t.Context())
			return err == nil && len(st.Volumes) == 1 && st.Volumes[0].State == stateOpen && st.Volumes[0].Away == "" && st.Volumes[0].Stats.WriteOps > 0
		})
	}
	if err := work.Wait(); err != nil {
		t.Fatalf("work under kills: %v\n%s", err, said.String())
	}
	sh(t, `cp "$2/a" "$2.a"; umount "$2"; e2fsck -fn "$1"; mount "$1" "$2"; cmp "$2.a" "$2/a"; cmp "$2.a" "$2/b"; umount "$2"`, dev, mnt)
	mounted = false
	if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Error(err)
	}
}
