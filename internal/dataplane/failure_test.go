package dataplane

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"

	"ashlar/internal/block"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/disk"
)

// onMem puts the bed's disk into memory, where it can fail and fill up.
func (b *bed) onMem(o disk.MemOptions) *disk.Mem {
	m := disk.NewMem(o)
	b.cfg.OpenFS = func(string) (disk.FS, error) { return m, nil }
	return m
}

// TestFailedFlush lets one flush fail, on a disk that otherwise works again at once: the guest has the error, and neither a later flush, nor a restart, nor a
// detach turns it into success. Only salvage does.
func TestFailedFlush(t *testing.T) {
	for name, tc := range map[string]struct {
		mute bool // the disk takes no note of the failure either, and the catalogue is away: open.json alone knows
	}{"disk works": {}, "nothing else can record it": {mute: true}} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			m := b.onMem(disk.MemOptions{Seed: 1})
			c := b.ready()
			a := b.volume(c, 1, mib)
			b.open(c, a)
			g := guest(t, b.runDir, a.Volume)
			if err := errors.Join(g.write(0, page("safe")), g.flush(), g.write(0, page("lost"))); err != nil {
				t.Fatal(err)
			}
			if tc.mute {
				b.cat.away()
				m.Fail(disk.FailOptions{Kind: disk.OpWrite, Pattern: "replicas/*/*", Nth: 1, Times: -1})
				m.Fail(disk.FailOptions{Kind: disk.OpSync, Pattern: "replicas/*/*", Nth: 1, Times: -1})
			} else {
				m.FailSync("replicas/*/*.layer", 1)
			}
			if err := g.flush(); !errors.Is(err, errnoIO) {
				t.Fatalf("the flush that failed: %v, want EIO", err)
			}
			if e, _ := b.p.list.volume(a.VolumeID); e.Failed == "" {
				t.Error("the guest was told, and open.json was not")
			}
			m.ClearFaults()
			for _, err := range []error{g.flush(), g.write(4096, page("more"))} {
				if !errors.Is(err, errnoIO) {
					t.Errorf("after the failure: %v, want EIO", err)
				}
			}
			if st, _ := status(t, c, a.VolumeID); st.State != stateFailed || st.Code != client.CodeFailed || st.Error == "" {
				t.Errorf("state %q, code %q, %q", st.State, st.Code, st.Error)
			}
			_, err := c.Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, Verb: "snapshot", Snapshot: "s", OpID: id("oper", 1)})
			wantCode(t, "a verb on a failed volume", err, client.CodeFailed)

			b.end()
			m.KillProcess()
			c = b.start()
			eventually(t, "the volume is failed again", func() bool { st, _ := status(t, c, a.VolumeID); return st.State == stateFailed })
			if st, _ := status(t, c, a.VolumeID); st.Code != client.CodeSalvage || st.SizeBytes != mib {
				t.Errorf("after a restart: %+v", st)
			}
			g = guest(t, b.runDir, a.Volume)
			if g.size != mib {
				t.Errorf("its guest sees %d bytes", g.size)
			}
			if _, err := g.read(0, 4096); !errors.Is(err, errnoIO) {
				t.Errorf("its guest reads: %v, want EIO", err)
			}
			if err := g.flush(); !errors.Is(err, errnoIO) {
				t.Errorf("its guest flushes: %v, want EIO", err)
			}
			_, err = c.OpenVolume(t.Context(), a)
			wantCode(t, "open before it was detached", err, client.CodeSalvage)
			if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil && !errors.Is(err, client.ErrUnreachable) {
				t.Errorf("close: %v", err)
			}
			if tc.mute {
				b.cat.back()
			}
			b.end()
			m.KillProcess()
			c = b.ready()
			_, err = c.OpenVolume(t.Context(), a)
			wantCode(t, "open without salvage", err, client.CodeSalvage)
			if _, there := status(t, c, a.VolumeID); there {
				t.Error("refused, and in the state")
			}
			a.Salvage = true
			b.open(c, a)
			g = guest(t, b.runDir, a.Volume)
			got, err := g.read(0, 4096)
			if err != nil || !bytes.Equal(got, page("safe")) && !bytes.Equal(got, page("lost")) {
				t.Errorf("salvaged, it reads %.10q, %v", got, err)
			}
			if err := errors.Join(g.write(0, page("new")), g.flush()); err != nil {
				t.Errorf("salvaged: %v", err)
			}
			if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
				t.Fatal(err)
			}
			a.Salvage = false
			b.open(c, a)
		})
	}
}

// TestFullDisk fills the disk: writers are told, what is there goes on, and space comes back.
func TestFullDisk(t *testing.T) {
	b := newBed(t)
	m := b.onMem(disk.MemOptions{CapacityBytes: 64 * mib})
	c := b.ready()
	a, other := b.volume(c, 1, 256*mib), b.volume(c, 2, mib)
	b.open(c, a)
	g := guest(t, b.runDir, a.Volume)
	chunk := bytes.Repeat(page("x"), 256)
	last := int64(0)
	var err error
	for last = 0; last < 256; last++ {
		if err = g.write(last*mib, chunk); err != nil {
			break
		}
	}
	if !errors.Is(err, errnoNoSpace) {
		t.Fatalf("after %d MiB on a disk of 64: %v, want ENOSPC", last, err)
	}
	if err := errors.Join(g.flush(), g.write(0, page("over")), g.flush()); err != nil {
		t.Errorf("flush and overwrite on a full disk: %v", err)
	}
	for off := int64(0); off < last*mib; off += mib {
		want := page("x")
		if off == 0 {
			want = page("over")
		}
		if got, err := g.read(off, 4096); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("at %d on a full disk: %.10q, %v", off, got, err)
		}
	}
	_, err = c.Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, Verb: "snapshot", Snapshot: "s", OpID: id("oper", 1)})
	wantCode(t, "a snapshot on a full disk", err, client.CodeNoSpace)
	create := client.CreateReplica{DiskID: b.diskID, ReplicaID: id("repl", 3), VolumeID: id("volu", 3), Volume: "vol3", SizeBytes: mib}
	wantCode(t, "a replica on a full disk", c.CreateReplica(t.Context(), create), client.CodeNoSpace)
	// Ended and started again on the full disk, it goes on.
	b.end()
	m.KillProcess()
	c = b.start()
	eventually(t, "the volume is back", func() bool { st, _ := status(t, c, a.VolumeID); return st.State == stateOpen })
	g = guest(t, b.runDir, a.Volume)
	if got, err := g.read(0, 4096); err != nil || !bytes.Equal(got, page("over")) {
		t.Errorf("started again on a full disk: %.10q, %v", got, err)
	}
	if err := c.DeleteReplica(t.Context(), client.DeleteReplica{DiskID: b.diskID, ReplicaID: other.ReplicaID}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Operate(t.Context(), client.Operate{VolumeID: a.VolumeID, Verb: "snapshot", Snapshot: "s", OpID: id("oper", 1)}); err != nil {
		t.Errorf("a snapshot once there is space: %v", err)
	}
	if err := g.write(last*mib, page("more")); err != nil {
		t.Errorf("a write once there is space: %v", err)
	}
}

// TestCloseFlushes: the detach is a flush, and its failure is reported and needs salvage, even if nothing but open.json can know of it.
func TestCloseFlushes(t *testing.T) {
	for name, mute := range map[string]bool{"disk works": false, "nothing else can record it": true} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			m := b.onMem(disk.MemOptions{Seed: 1})
			c := b.ready()
			a := b.volume(c, 1, mib)
			b.open(c, a)
			if err := guest(t, b.runDir, a.Volume).write(0, page("x")); err != nil {
				t.Fatal(err)
			}
			if mute {
				b.cat.away()
				m.Fail(disk.FailOptions{Kind: disk.OpWrite, Pattern: "replicas/*/*", Nth: 1, Times: -1})
				m.Fail(disk.FailOptions{Kind: disk.OpSync, Pattern: "replicas/*/*", Nth: 1, Times: -1})
			} else {
				m.FailSync("replicas/*/*.layer", 1)
			}
			err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID})
			if err == nil {
				t.Error("a close whose flush failed succeeded")
			}
			if !mute {
				wantCode(t, "a close whose flush failed", err, client.CodeFailed)
			}
			m.ClearFaults()
			if mute {
				b.cat.back()
			}
			if _, there := status(t, c, a.VolumeID); there {
				t.Error("closed, and in the state")
			}
			_, err = c.OpenVolume(t.Context(), a)
			wantCode(t, "open without salvage", err, client.CodeSalvage)
		})
	}
}

// brokenDevice fails every flush as a volume does whose last copy failed.
type brokenDevice struct{ block.Device }

func (brokenDevice) Flush() error { return fmt.Errorf("volume: %w", block.ErrFailed) }

// TestFailureIsOnRecordFirst: no client hears of a failure before it is on record.
func TestFailureIsOnRecordFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		record := make(chan struct{})
		w := &witness{Device: brokenDevice{}, failed: func(error) { <-record }}
		answered := make(chan error, 1)
		go func() { answered <- w.Flush() }()
		synctest.Wait()
		if len(answered) != 0 {
			t.Error("the client was answered before the failure was on record")
		}
		close(record)
		if err := <-answered; !errors.Is(err, block.ErrFailed) {
			t.Errorf("the client was answered %v", err)
		}
	})
}
