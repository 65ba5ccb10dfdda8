package agent

import (
	"context"
	"fmt"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
)

// This file is what is no record and still has to be asked of a node.

// VolumeCounters calls each once for every volume that is open on this node, with what its frontend did since it was opened: readOps, writeOps, flushOps, zeroOps,
// readBytes, writeBytes, errors, clients. ErrAway.
func (a *Agent) VolumeCounters(ctx context.Context, each func(volume string, counters map[string]uint64)) error {
	s, err := a.data()
	if err != nil {
		return err
	}
	st, err := s.State(ctx)
	if err != nil {
		return fmt.Errorf("counters: %w", err)
	}
	for _, v := range st.Volumes {
		each(v.Volume, map[string]uint64{
			"readOps": v.Stats.ReadOps, "writeOps": v.Stats.WriteOps, "flushOps": v.Stats.FlushOps, "zeroOps": v.Stats.ZeroOps,
			"readBytes": v.Stats.ReadBytes, "writeBytes": v.Stats.WriteBytes, "errors": v.Stats.Errors, "clients": uint64(max(0, v.Clients)),
		})
	}
	return nil
}

// Check verifies the layers of a volume's replica on this node, open or not, and returns what is wrong with them. catalog.ErrNotFound, Elsewhere, ErrNotHere, ErrAway.
func (a *Agent) Check(ctx context.Context, volume string) ([]catalog.Problem, error) {
	w, _, err := catalog.Read[catalog.VolumeWanted](ctx, a.cfg.Catalog, catalog.VolumeKey(catalog.Wanted, volume))
	if err != nil {
		return nil, fmt.Errorf("check volume %s: %w", volume, err)
	}
	s, err := a.data()
	if err != nil {
		return nil, fmt.Errorf("check volume %s: %w", volume, err)
	}
	for _, r := range w.Replicas {
		if r.Node == a.cfg.Node {
			return check(ctx, s, client.Check{VolumeID: w.ID, DiskID: r.DiskID, ReplicaID: r.ReplicaID})
		}
	}
	err = ErrNotHere
	if len(w.Replicas) > 0 {
		err = Elsewhere{w.Replicas[0].Node}
	}
	return nil, fmt.Errorf("check volume %s: %w", volume, err)
}

// Shutdown begins to stop this node, guests' I/O included: from now on the agent does nothing new; the data process flushes and closes every volume and ends, with
// its holder; then Config.Stop is called. It returns when that has begun. Volumes that were attached are attached again when the node is started. Run must
// be running, because the data process asks for membership records until its end.
func (a *Agent) Shutdown(ctx context.Context) error {
	if !a.stopping.CompareAndSwap(false, true) {
		return nil
	}
	s, err := a.data()
	if err != nil { // it may be starting; whoever starts it knows
		s, err = a.cfg.EnsureData(ctx)
	}
	if err != nil {
		a.stopping.Store(false)
		return fmt.Errorf("shut down: %w", err)
	}
	ctx = context.WithoutCancel(ctx)
	a.wg.Go(func() {
		if err := s.Shutdown(ctx, client.Shutdown{Holder: true}); err != nil {
			a.cfg.Log.Error("the data process did not end in order", "error", err)
		}
		a.cfg.Stop()
	})
	return nil
}
