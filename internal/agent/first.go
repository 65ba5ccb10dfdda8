package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"ashlar/internal/catalog"
)

// The waits between tries to reach something that is away.
const (
	retryMin = 50 * time.Millisecond
	retryMax = 2 * time.Second
)

// first makes the cluster's and the node's records if they are not there, and waits for the catalogue as long as it takes.
func (a *Agent) first(ctx context.Context) error {
	for wait := retryMin; ; wait = min(2*wait, retryMax) {
		err := a.makeFirst(ctx)
		if err == nil || errors.Is(err, ErrFormat) || errors.Is(err, ErrOtherCluster) {
			return err
		}
		if !pause(ctx, wait) {
			return context.Cause(ctx)
		}
		a.cfg.Log.Warn("catalogue does not answer; asking again", "error", err)
	}
}

func (a *Agent) makeFirst(ctx context.Context) error {
	c, _, err := catalog.Read[catalog.Cluster](ctx, a.cfg.Catalog, catalog.ClusterKey())
	if errors.Is(err, catalog.ErrNotFound) {
		c = catalog.Cluster{ID: a.newCluster(ctx), Format: catalog.Format, Created: a.cfg.Now().UTC()}
		_, err = catalog.Write(ctx, a.cfg.Catalog, catalog.ClusterKey(), c, 0)
	}
	if err != nil {
		return err
	}
	if c.Format > catalog.Format {
		return fmt.Errorf("%w: the catalogue has format %d, this build reads up to %d; install a newer version", ErrFormat, c.Format, catalog.Format)
	}
	if f := a.cfg.Cluster; f != nil && c.ID != f.ClusterID {
		return fmt.Errorf("the catalogue is of cluster %s, this node is in %s: %w", c.ID, f.ClusterID, ErrOtherCluster)
	}
	if a.cfg.Cluster != nil {
		// The record was made when the node joined. One that is gone was removed, and must not come back by itself.
		return a.firstDisks(ctx)
	}
	if a.cfg.Cluster != nil { // its record was made when it joined; if there is none it was removed, and must not come back by itself
		if err := a.firstDisks(ctx); !errors.Is(err, catalog.ErrNotFound) {
			return err
		}
		a.cfg.Log.Warn("the cluster has no record of this node: it was removed")
		return nil
	}
	n := catalog.NodeWanted{Name: a.cfg.Node, AllowScheduling: true, Disks: maps.Clone(a.cfg.Disks)}
	if n.Disks == nil {
		n.Disks = map[string]catalog.DiskWanted{}
	}
	_, err = catalog.Write(ctx, a.cfg.Catalog, catalog.NodeKey(catalog.Wanted, a.cfg.Node), n, 0)
	if errors.Is(err, catalog.ErrConflict) {
		return a.firstDisks(ctx)
	}
	return err
}

// firstDisks adds the disks of the node's first start to a record that was made for it when it joined. Once the node has said anything of itself, which disks it has is for people to
// say.
func (a *Agent) firstDisks(ctx context.Context) error {
	if len(a.cfg.Disks) == 0 {
		return nil
	}
	if _, err := a.cfg.Catalog.Get(ctx, catalog.NodeKey(catalog.Observed, a.cfg.Node)); !errors.Is(err, catalog.ErrNotFound) {
		return err
	}
	_, _, err := catalog.Update(ctx, a.cfg.Catalog, catalog.NodeKey(catalog.Wanted, a.cfg.Node), func(n *catalog.NodeWanted) error {
		if len(n.Disks) == 0 {
			n.Disks = maps.Clone(a.cfg.Disks)
		}
		return nil
	})
	return err
}

// newCluster is the id for a new cluster record. A node that is in a cluster knows it.
func (a *Agent) newCluster(ctx context.Context) string {
	if a.cfg.Cluster != nil {
		return a.cfg.Cluster.ClusterID
	}
	return a.clusterOfDisks(ctx)
}

// clusterOfDisks is that of the disks a running data process has, if it has any, because then the catalogue was lost, not new; what is on them is
// left as it is until ashlar recover.
func (a *Agent) clusterOfDisks(ctx context.Context) string {
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	s, err := a.cfg.EnsureData(ask)
	if err != nil {
		return a.cfg.NewID()
	}
	st, err := s.State(ask)
	if err != nil || len(st.Disks) == 0 {
		return a.cfg.NewID()
	}
	for _, d := range st.Disks {
		if d.ClusterID == "" || d.ClusterID != st.Disks[0].ClusterID {
			return a.cfg.NewID()
		}
	}
	return st.Disks[0].ClusterID
}

// pause waits; not if ctx ended.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
