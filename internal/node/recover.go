package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"ashlar/internal/agent"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
)

// Recover rebuilds the catalogue of a node from the layers on its disks, or brings an old one up to what they prove; agent.Recover says how. `ashlar
// serve` must not run on the data directory (ErrInUse); the data process may, with guests on it, and is left as it was found. disks are
// directories; the node's first disk is called default again. Without a Name the node is called what it is called in its cluster, else what the records on the disks call it, else otherwise.
func Recover(ctx context.Context, cfg Config, disks []string, otherwise string) (rep agent.Recovered, err error) {
	cfg.Name = cmp.Or(cfg.Name, nameIn(cfg.DataDir))
	guessed := cfg.Name == ""
	cfg.Name = cmp.Or(cfg.Name, otherwise)
	if err := cfg.check(); err != nil {
		return rep, err
	}
	from, err := recoverFrom(cfg, disks)
	if err != nil {
		return rep, err
	}
	n := &Node{cfg: cfg}
	n.ctx, n.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	defer func() { err = errors.Join(err, n.Close()) }()
	if err := n.lock(); err != nil {
		return rep, fmt.Errorf("%w (stop it for this; guests go on)", err)
	}
	hello, cancel := context.WithTimeout(ctx, helloTimeout)
	_, missing := n.findData(hello)
	cancel()
	if n.keeper, err = hold.Keep(ctx, n.holdConfig()); err != nil {
		return rep, fmt.Errorf("start the holder: %w", err)
	}
	n.undo = append(n.undo, n.keeper.Close)
	cat, err := n.openStore(ctx)
	if err != nil {
		return rep, fmt.Errorf("open the catalogue: %w", err)
	}
	n.undo = append(n.undo, cat.Close)
	data, err := n.awaitData(ctx, readyTimeout)
	if err != nil {
		return rep, err
	}
	rep, err = agent.Recover(ctx, agent.RecoverConfig{Node: cfg.Name, Guessed: guessed, Catalog: cat, Service: data, Disks: from})
	if missing != nil { // it was started for this only
		err = errors.Join(err, data.Shutdown(context.WithoutCancel(ctx), client.Shutdown{Holder: true}))
	}
	return rep, err
}

// recoverFrom reads from each disk which cluster it says it belongs to.
func recoverFrom(cfg Config, disks []string) ([]agent.RecoverDisk, error) {
	var from []agent.RecoverDisk
	for _, dir := range disks {
		text, err := os.ReadFile(filepath.Join(dir, "ashlar-disk.json"))
		if err != nil {
			return nil, fmt.Errorf("%s is not a disk of Ashlar: %w", dir, err)
		}
		var marker struct{ ClusterID string }
		if err := json.Unmarshal(text, &marker); err != nil {
			return nil, fmt.Errorf("%s/ashlar-disk.json: %w", dir, err)
		}
		d := agent.RecoverDisk{Path: dir, ClusterID: marker.ClusterID}
		if dir == filepath.Join(cfg.DataDir, "disks", "default") {
			d.Name = "default"
		}
		from = append(from, d)
	}
	return from, nil
}

// helloTimeout bounds the question whether a data process runs; a listening socket that the holder keeps takes connections also when none does.
const helloTimeout = 2 * time.Second

// awaitData waits until the data process that the holder starts answers, at most so long.
func (n *Node) awaitData(ctx context.Context, limit time.Duration) (client.Service, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		data, err := n.ensureData(ctx)
		if err == nil {
			return data, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("the data process does not answer: %w", err)
		case <-tick.C:
		}
	}
}
