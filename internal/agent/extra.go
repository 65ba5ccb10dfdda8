package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

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
// its holder; then Config.Stop is called. It returns when that has begun. While a block device is mounted or open the data process refuses with client.ErrInUse, and the node
// goes on. Volumes that were attached are attached again when the node is started. Run must be running, because the data process asks for membership records until its end.
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
	refused := make(chan error, 1)
	work := context.WithoutCancel(ctx)
	a.wg.Go(func() {
		defer close(refused)
		err := s.Shutdown(work, client.Shutdown{Holder: true})
		if errors.Is(err, client.ErrInUse) {
			a.goOn(work, s, err)
			refused <- fmt.Errorf("shut down: %w", err)
			return
		}
		if err != nil {
			a.cfg.Log.Error("the data process did not end in order", "error", err)
		}
		a.cfg.Stop()
	})
	select {
	case err := <-refused:
		return err
	case <-time.After(refusalWait):
	}
	return nil
}

// refusalWait is how long whoever shuts a node down waits for a refusal. Volumes that have much to flush take longer than that to close, and nobody waits for their end.
const refusalWait = 5 * time.Second

// goOn is for a shutdown that the data process refused, because a block device is mounted: what it closed before it found that is opened again.
func (a *Agent) goOn(ctx context.Context, s client.Service, why error) {
	a.cfg.Log.Warn("the node is not shut down", "error", why)
	a.stopping.Store(false)
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if st, err := s.State(ctx); err == nil {
		_ = send(ctx, a.inbox, stateOrAway{state: st})
	}
}
