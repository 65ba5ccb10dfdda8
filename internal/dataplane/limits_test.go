package dataplane

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"ashlar/internal/dataplane/client"
)

// TestLimits: limits hold from the first request on, can be changed under waiting requests, survive the process, and hold up neither a flush, nor another volume, nor the close.
func TestLimits(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a := b.volume(c, 1, 16*mib)
	a.Limits = client.Limits{BytesPerSecond: 1} // a second request waits for more than an hour
	if st := b.open(c, a); st.Limits != a.Limits {
		t.Errorf("limits %+v", st.Limits)
	}
	same := a
	same.Limits = client.Limits{IOPS: 7}
	if st := b.open(c, same); st.Limits != a.Limits {
		t.Errorf("opening again changed the limits: %+v", st.Limits)
	}
	other := b.volume(c, 2, 16*mib)
	b.open(c, other)
	set := func(l client.Limits) {
		t.Helper()
		for range 2 {
			if err := c.SetLimits(t.Context(), client.SetLimits{VolumeID: a.VolumeID, Limits: l}); err != nil {
				t.Fatal(err)
			}
		}
		if st, _ := status(t, c, a.VolumeID); st.Limits != l {
			t.Errorf("limits %+v, want %+v", st.Limits, l)
		}
	}
	throttled := func(want uint64) {
		t.Helper()
		eventually(t, "requests are held back", func() bool { st, _ := status(t, c, a.VolumeID); return st.Stats.Throttled == want })
	}
	wait := func(what string, done <-chan error) {
		t.Helper()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	use := func() <-chan error {
		g, done := guest(t, b.runDir, a.Volume), make(chan error, 1)
		go func() { done <- g.write(0, page("held back")) }()
		return done
	}
	wait("first request", use())
	first, second := use(), use()
	throttled(2)
	g := guest(t, b.runDir, a.Volume)
	if err := g.flush(); err != nil {
		t.Errorf("flush: %v", err)
	}
	if err := guest(t, b.runDir, other.Volume).write(0, page("other")); err != nil {
		t.Errorf("another volume: %v", err)
	}
	set(client.Limits{})
	wait("first that was held back", first)
	wait("second", second)
	set(client.Limits{BytesPerSecond: 1, BurstBytesPerSecond: 2, BurstSeconds: 3})

	// The next process limits at once, and one that ends holds nobody up.
	wait("first of the burst", use())
	held := use()
	throttled(3)
	b.end()
	wait("held back when the process ended", held)
	c = b.start()
	eventually(t, "the volume is back", func() bool { st, _ := status(t, c, a.VolumeID); return st.State == stateOpen })
	if st, _ := status(t, c, a.VolumeID); st.Limits.BurstSeconds != 3 {
		t.Errorf("after a restart: %+v", st.Limits)
	}
	wait("first of the next process", use())
	held = use()
	throttled(1)
	if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	wait("held back when the volume was closed", held)
	err := c.SetLimits(t.Context(), client.SetLimits{VolumeID: a.VolumeID})
	wantCode(t, "a volume that is not open", err, client.CodeNotFound)
	err = c.SetLimits(t.Context(), client.SetLimits{VolumeID: other.VolumeID, Limits: client.Limits{IOPS: -1}})
	wantCode(t, "negative", err, client.CodeInvalid)
	a.Limits.BurstIOPS = 5
	_, err = c.OpenVolume(t.Context(), a)
	wantCode(t, "burst without a limit", err, client.CodeInvalid)
	wantCode(t, "negative background", c.SetBackground(t.Context(), client.Background{BytesPerSecond: -1}), client.CodeInvalid)
	if err := c.SetBackground(t.Context(), client.Background{BytesPerSecond: 1 << 20}); err != nil {
		t.Error(err)
	}
}

// TestSocketGroup: the group is found by name and number, and only volumes' sockets are its.
func TestSocketGroup(t *testing.T) {
	b := newBed(t)
	for group, ok := range map[string]bool{"": true, "root": true, "0": true, fmt.Sprint(os.Getegid()): true, "no-such-group": false, "-1": false} {
		cfg := b.cfg
		cfg.SocketGroup = group
		_, err := newFrontend(cfg, heldListeners{holder: b.holder})
		if ok != (err == nil) || err != nil && client.CodeOf(err) != client.CodeInvalid {
			t.Errorf("group %q: %v", group, err)
		}
	}
	gid := os.Getegid()
	if os.Geteuid() == 0 {
		gid = 65534 // root may give to any
	}
	b.cfg.SocketGroup = fmt.Sprint(gid)
	c := b.ready()
	b.open(c, b.volume(c, 1, mib))
	for name, mode := range map[string]os.FileMode{"nbd": 0o710, "nbd/vol1.sock": 0o660, "data": 0o700, "data/" + testVersion + ".sock": 0o600} {
		info, err := os.Stat(filepath.Join(b.runDir, name))
		if err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v %v, want %v", name, info.Mode(), err, mode)
		}
	}
}

// TestDevDir: the usual node's block devices have the name people type, and no two nodes' meet.
func TestDevDir(t *testing.T) {
	if got := devDirOf("/run/ashlar"); got != "/dev/ashlar" {
		t.Errorf("the usual node has %s", got)
	}
	a, b := devDirOf("/run/a"), devDirOf("/run/b")
	if a == b || len(a) != len("/dev/ashlar-01234567") {
		t.Errorf("%s and %s", a, b)
	}
}
