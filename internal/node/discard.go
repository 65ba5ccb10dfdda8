package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/cluster"
	"ashlar/internal/dataplane/client"
)

// The names on a disk that say whose it is, docs/formats/disk.md.
const (
	diskMarker = "ashlar-disk.json"
	diskLock   = "ashlar-disk.lock"
)

// discard ends the cluster of one that this node was before it joined another: its data process (which has the disks, and nothing open), the markers of its empty disks, which are then
// formatted for the new cluster, and its catalogue. It stands in node.json until all is done, so after a crash it is done again. A disk on which there is something after all keeps its
// marker, and is shown as another cluster's.
func (n *Node) discard(ctx context.Context) error {
	if err := n.endData(ctx); err != nil {
		return fmt.Errorf("end the data process of the cluster that is given up: %w", err)
	}
	for _, dir := range n.state.Discard.Disks {
		if err := unmark(ctx, dir, n.state.Discard.ClusterID); err != nil {
			n.cfg.Log.Error("a disk could not be taken along into the cluster; it is left as it is", "disk", dir, "error", err)
		}
	}
	for _, name := range []string{n.catalogueDir(), n.authorityDir()} {
		if err := os.RemoveAll(name); err != nil {
			return err
		}
	}
	n.state.Discard = nil
	return n.dir().Save(*n.state)
}

// endData ends the data process, if there is one, and its holder, and waits for both: who comes to a holder that is about to end would believe that all is to stay stopped. What they
// would take up again are only disks.
func (n *Node) endData(ctx context.Context) error {
	hello, cancel := context.WithTimeout(ctx, helloTimeout)
	data, err := n.findData(hello)
	cancel()
	if err == nil {
		err = data.Shutdown(ctx, client.Shutdown{Holder: true})
	} else if errors.Is(err, fs.ErrNotExist) || errors.Is(err, client.ErrUnreachable) {
		err = nil
	}
	for _, lock := range []string{filepath.Join(client.DataDir(n.cfg.RunDir), "run.lock"), filepath.Join(n.cfg.RunDir, "hold.lock")} {
		if err == nil {
			err = released(ctx, lock)
		}
	}
	if err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(client.DataDir(n.cfg.RunDir), "open.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// released waits until nobody holds a lock.
func released(ctx context.Context, name string) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := flock(ctx, f); err != nil {
		return fmt.Errorf("%s is still held: %w", name, err)
	}
	return nil
}

// lockPatience is how long the data process may take to give a disk up.
const lockPatience = 20 * time.Second

// unmark makes a disk of a cluster, on which there is nothing, an empty directory again. One that is no disk of that cluster (any more) is left as it is. cluster.ErrRemains.
func unmark(ctx context.Context, dir, clusterID string) error {
	text, err := os.ReadFile(filepath.Join(dir, diskMarker))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var marker struct{ ClusterID string }
	if err == nil {
		err = json.Unmarshal(text, &marker)
	}
	if err != nil || marker.ClusterID != clusterID {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(dir, diskLock), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := flock(ctx, lock); err != nil {
		return fmt.Errorf("%s is in use: %w", dir, err)
	}
	for _, sub := range []string{"replicas", "images"} {
		inside, err := os.ReadDir(filepath.Join(dir, sub))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if len(inside) > 0 {
			return fmt.Errorf("%w: %s in %s/%s", cluster.ErrRemains, inside[0].Name(), dir, sub)
		}
	}
	if err := os.RemoveAll(filepath.Join(dir, "tmp")); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, diskMarker)); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// flock waits for a lock, at most lockPatience.
func flock(ctx context.Context, f *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}
