package catalogtest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"ashlar/internal/catalog"
)

// StandIn does to the records of a catalogue what control and one node's agent do, without any bytes: it places volumes on one disk, attaches and detaches them, imports images and
// carries out operations, each at once. It is for tests of what sits in front of the catalogue; what control and agent really do is tested with them.
type StandIn struct {
	Catalog catalog.Catalog
	Node    string
	RunDir  string // where an endpoint's socket is said to be
	// VirtualBytes is the size of an image's content; an image without an entry has 64 MiB.
	VirtualBytes map[string]int64
	// Delay is how long it waits before each step. In a synctest bubble any delay makes it wait until everything else has come to rest.
	Delay time.Duration
	// Halt names verbs that are left pending.
	Halt []string
	// Problems is what a check finds.
	Problems []catalog.Problem
}

// standInSize is an image's size where nothing else is said, and what a disk is said to hold a thousand times.
const standInSize = 64 << 20

// Run makes the node's records and then follows the catalogue until ctx ends. A URL or path with "broken" in it makes an import fail, one with "slow" keeps it at 50 %.
func (s *StandIn) Run(ctx context.Context) error {
	if err := s.node(ctx); err != nil {
		return err
	}
	err := catalog.Follow(ctx, s.Catalog, func(b catalog.Batch) error {
		if b.Away {
			return nil
		}
		select {
		case <-time.After(s.Delay):
			return s.step(ctx)
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// DiskID is the id of the stand-in's one disk.
func (s *StandIn) DiskID() string { return standInID("disk", s.Node) }

func standInID(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "/")))
	return hex.EncodeToString(sum[:16])
}

func (s *StandIn) node(ctx context.Context) error {
	_, _, err := catalog.Upsert(ctx, s.Catalog, catalog.NodeKey(catalog.Wanted, s.Node), func(w *catalog.NodeWanted) error {
		*w = catalog.NodeWanted{Name: s.Node, AllowScheduling: true, Disks: map[string]catalog.DiskWanted{"disk1": {Path: "/var/lib/ashlar/disk1", AllowScheduling: true}}}
		return nil
	})
	if err != nil {
		return err
	}
	yes := catalog.Condition{Status: catalog.ConditionTrue, LastTransitionTime: time.Now().UTC()}
	_, _, err = catalog.Upsert(ctx, s.Catalog, catalog.NodeKey(catalog.Observed, s.Node), func(o *catalog.NodeObserved) error {
		*o = catalog.NodeObserved{
			Name: s.Node, Address: "127.0.0.1", Version: "test", Ready: true, Data: catalog.DataObserved{Version: "test", PID: 4711, Started: time.Now().UTC()},
			Conditions: map[string]catalog.Condition{catalog.ConditionReady: yes, catalog.ConditionSchedulable: yes},
			Disks: map[string]catalog.DiskObserved{"disk1": {
				DiskID: s.DiskID(), TotalBytes: 1000 * standInSize, FreeBytes: 900 * standInSize,
				Conditions: map[string]catalog.Condition{catalog.ConditionReady: yes, catalog.ConditionSchedulable: yes},
			}},
		}
		return nil
	})
	return err
}

// step brings every record one step further; what it writes calls it again.
func (s *StandIn) step(ctx context.Context) error {
	images, _, err := catalog.All[catalog.ImageWanted](ctx, s.Catalog, catalog.KindImage, catalog.Wanted)
	if err != nil {
		return err
	}
	volumes, _, err := catalog.All[catalog.VolumeWanted](ctx, s.Catalog, catalog.KindVolume, catalog.Wanted)
	if err != nil {
		return err
	}
	for _, v := range volumes {
		if err := s.volume(ctx, v.Value); err != nil {
			return fmt.Errorf("stand-in: volume %s: %w", v.Value.Name, err)
		}
	}
	for _, img := range images {
		used := slices.ContainsFunc(volumes, func(v catalog.Item[catalog.VolumeWanted]) bool { return v.Value.ImageID == img.Value.ID })
		if err := s.image(ctx, img.Value, used); err != nil {
			return fmt.Errorf("stand-in: image %s: %w", img.Value.Name, err)
		}
	}
	return s.operations(ctx)
}

// drop removes records that are there.
func (s *StandIn) drop(ctx context.Context, keys ...catalog.Key) error {
	for _, k := range keys {
		e, err := s.Catalog.Get(ctx, k)
		if err == nil {
			err = s.Catalog.Delete(ctx, k, e.Rev)
		}
		if err != nil && !errors.Is(err, catalog.ErrNotFound) {
			return err
		}
	}
	return nil
}

func (s *StandIn) image(ctx context.Context, w catalog.ImageWanted, used bool) error {
	if w.Deleted != nil {
		if used {
			return nil
		}
		return s.drop(ctx, catalog.ImageKey(catalog.Observed, w.Name), catalog.ImageKey(catalog.Wanted, w.Name))
	}
	_, _, err := catalog.Update(ctx, s.Catalog, catalog.ImageKey(catalog.Wanted, w.Name), func(w *catalog.ImageWanted) error {
		if len(w.Disks) == 0 {
			w.Disks = []string{s.DiskID()}
		}
		return nil
	})
	if errors.Is(err, catalog.ErrNotFound) {
		return nil
	} else if err != nil {
		return err
	}
	size := int64(standInSize)
	if n, ok := s.VirtualBytes[w.Name]; ok {
		size = n
	}
	source := w.Parameters["url"] + w.Parameters["path"]
	_, _, err = catalog.Upsert(ctx, s.Catalog, catalog.ImageKey(catalog.Observed, w.Name), func(o *catalog.ImageObserved) error {
		if o.ID == w.ID {
			return nil
		}
		*o = catalog.ImageObserved{Name: w.Name, ID: w.ID, Disks: map[string]catalog.ImageOnDisk{}}
		d := catalog.ImageOnDisk{State: catalog.ImageReady, Progress: 100, AllocatedBytes: size / 2, LastTransitionTime: w.Created}
		switch {
		case strings.Contains(source, "broken"):
			d = catalog.ImageOnDisk{State: catalog.ImageFailed, Message: "GET " + source + ": 404 Not Found", Attempts: 1, LastTransitionTime: w.Created}
		case strings.Contains(source, "slow"):
			d = catalog.ImageOnDisk{State: catalog.ImageInProgress, Progress: 50, LastTransitionTime: w.Created}
		default:
			o.SizeBytes, o.VirtualSizeBytes, o.Format = size/4, size, "qcow2"
			o.CurrentChecksum, o.Digest = strings.Repeat("0123456789abcdef", 8), strings.Repeat("fedcba9876543210", 4)
		}
		o.Disks[s.DiskID()] = d
		return nil
	})
	return err
}

func (s *StandIn) volume(ctx context.Context, w catalog.VolumeWanted) error {
	if w.Deleted != nil {
		ops, _, err := catalog.All[catalog.Operation](ctx, s.Catalog, catalog.KindOperation, catalog.Wanted)
		if err != nil {
			return err
		}
		for _, op := range ops {
			if op.Value.VolumeID == w.ID {
				if err := s.drop(ctx, op.Key); err != nil {
					return err
				}
			}
		}
		return s.drop(ctx, catalog.VolumeKey(catalog.Observed, w.Name), catalog.VolumeKey(catalog.Wanted, w.Name))
	}
	replica := standInID("replica", w.ID)
	_, _, err := catalog.Update(ctx, s.Catalog, catalog.VolumeKey(catalog.Wanted, w.Name), func(w *catalog.VolumeWanted) error {
		if len(w.Replicas) == 0 {
			w.Replicas = []catalog.Placement{{ReplicaID: replica, Node: s.Node, DiskID: s.DiskID()}}
		}
		return nil
	})
	if errors.Is(err, catalog.ErrNotFound) {
		return nil
	} else if err != nil {
		return err
	}
	_, _, err = catalog.Upsert(ctx, s.Catalog, catalog.VolumeKey(catalog.Observed, w.Name), func(o *catalog.VolumeObserved) error {
		if o.ID != w.ID {
			*o = catalog.VolumeObserved{
				Name: w.Name, ID: w.ID, State: catalog.VolumeDetached, Robustness: catalog.RobustnessUnknown, SizeBytes: w.SizeBytes,
				Snapshots: []catalog.SnapshotObserved{{Name: "volume-head", LayerID: replica, UserCreated: false, Created: w.Created, Children: []string{}}},
			}
		}
		s.openOrClose(w, o, replica)
		return nil
	})
	return err
}

func (s *StandIn) openOrClose(w catalog.VolumeWanted, o *catalog.VolumeObserved, replica string) {
	r := catalog.ReplicaObserved{ReplicaID: replica, Node: s.Node, DiskID: s.DiskID(), DataPath: "replicas/" + replica, Created: true, AllocatedBytes: 1 << 20}
	o.State, o.Node, o.Endpoint = catalog.VolumeDetached, "", ""
	if o.Robustness != catalog.RobustnessFaulted || w.Salvage {
		o.Robustness = catalog.RobustnessUnknown
	}
	if len(w.Tickets) > 0 && o.Robustness != catalog.RobustnessFaulted {
		o.State, o.Node, r.Running, r.Mode, o.Epoch = catalog.VolumeAttached, s.Node, true, "RW", 1
		o.Robustness = catalog.RobustnessHealthy
		if w.Copies > 1 {
			o.Robustness = catalog.RobustnessDegraded
		}
		if slices.ContainsFunc(w.Tickets, func(t catalog.Ticket) bool { return !t.DisableFrontend }) {
			o.Endpoint = "nbd+unix:///" + w.Name + "?socket=" + s.RunDir + "/nbd/" + w.Name + ".sock"
		}
	}
	o.Replicas = []catalog.ReplicaObserved{r}
}

func (s *StandIn) operations(ctx context.Context) error {
	ops, _, err := catalog.All[catalog.Operation](ctx, s.Catalog, catalog.KindOperation, catalog.Wanted)
	if err != nil {
		return err
	}
	slices.SortFunc(ops, func(a, b catalog.Item[catalog.Operation]) int { return int(a.Rev - b.Rev) })
	for _, op := range ops {
		if op.Value.State != catalog.OperationPending || slices.Contains(s.Halt, op.Value.Verb) {
			continue
		}
		var result catalog.Operation
		_, _, err := catalog.Update(ctx, s.Catalog, catalog.VolumeKey(catalog.Observed, op.Value.Volume), func(o *catalog.VolumeObserved) error {
			result = op.Value
			s.operate(&result, o)
			return nil
		})
		if errors.Is(err, catalog.ErrNotFound) {
			continue
		} else if err != nil {
			return err
		}
		if _, err := catalog.Write(ctx, s.Catalog, op.Key, result, op.Rev); err != nil && !errors.Is(err, catalog.ErrConflict) {
			return err
		}
	}
	return nil
}

func (s *StandIn) operate(op *catalog.Operation, o *catalog.VolumeObserved) {
	now := op.Created
	op.State, op.Progress, op.Finished = catalog.OperationDone, 100, &now
	fail := func(code, message string) {
		op.State, op.Progress, op.Code, op.Message = catalog.OperationFailed, 0, code, message
	}
	if op.Verb != catalog.VerbExpand && op.Verb != catalog.VerbCheck && o.State != catalog.VolumeAttached {
		fail(catalog.CodeNotAttached, "the volume is not attached")
		return
	}
	switch op.Verb {
	case catalog.VerbSnapshot:
		snapshotHead(o, op, op.Snapshot, true)
	case catalog.VerbExpand:
		if op.SizeBytes >= 1000*standInSize {
			fail(catalog.CodeNoSpace, "no space left on disk")
			return
		}
		snapshotHead(o, op, fmt.Sprintf("expand-%d", op.SizeBytes), false)
		o.SizeBytes = op.SizeBytes
	case catalog.VerbRevert:
		moveHead(o, op)
	case catalog.VerbSnapshotRemove:
		find(o, op.Snapshot).Removed = true
	case catalog.VerbPurge:
		for purgeOne(o) {
		}
	case catalog.VerbCheck:
		op.Problems = s.Problems
	}
}

func find(o *catalog.VolumeObserved, name string) *catalog.SnapshotObserved {
	i := slices.IndexFunc(o.Snapshots, func(s catalog.SnapshotObserved) bool { return s.Name == name })
	if i < 0 {
		return &catalog.SnapshotObserved{}
	}
	return &o.Snapshots[i]
}

func rename(list []string, from, to string) []string {
	out := []string{}
	for _, s := range list {
		if s != from {
			out = append(out, s)
		} else if to != "" {
			out = append(out, to)
		}
	}
	return out
}

func snapshotHead(o *catalog.VolumeObserved, op *catalog.Operation, name string, user bool) {
	head := find(o, "volume-head")
	parent := find(o, head.Parent)
	parent.Children = rename(parent.Children, "volume-head", name)
	sealed := *head
	sealed.Name, sealed.Children, sealed.UserCreated, sealed.Labels, sealed.Created = name, []string{"volume-head"}, user, op.Labels, op.Created
	sealed.SizeBytes = 1 << 20
	head.Parent, head.LayerID, head.Created = name, op.ID, op.Created
	o.Snapshots = slices.Insert(o.Snapshots, len(o.Snapshots)-1, sealed)
}

func moveHead(o *catalog.VolumeObserved, op *catalog.Operation) {
	head := find(o, "volume-head")
	old := find(o, head.Parent)
	old.Children = rename(old.Children, "volume-head", "")
	head.Parent, head.LayerID, head.Created = op.Snapshot, op.ID, op.Created
	to := find(o, op.Snapshot)
	to.Children = append(to.Children, "volume-head")
}

// purgeOne deletes or merges one removed snapshot; false when there is none.
func purgeOne(o *catalog.VolumeObserved) bool {
	for i, s := range o.Snapshots {
		if !s.Removed || len(s.Children) > 1 || len(s.Children) == 1 && s.Children[0] == "volume-head" {
			continue
		}
		heir := ""
		if len(s.Children) == 1 {
			heir = s.Children[0]
			find(o, heir).Parent = s.Parent
		}
		parent := find(o, s.Parent)
		parent.Children = rename(parent.Children, s.Name, heir)
		o.Snapshots = slices.Delete(o.Snapshots, i, i+1)
		return true
	}
	return false
}
