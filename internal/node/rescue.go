package node

import (
	"context"
	"errors"
	"fmt"

	"ashlar/internal/catalog/etcd"
	"ashlar/internal/cluster"
)

// Rescue makes this node's member the only one of the catalogue, after the majority of the voters was lost for good: what this member has is kept, and what only the others
// had is gone. The others must never run again as they are: they would go on with a catalogue of their own. `ashlar serve` must not run on the data directory (ErrInUse). ErrConfig if this node
// keeps no member, cluster.ErrNone.
func Rescue(ctx context.Context, cfg Config) (err error) {
	n, err := offline(ctx, &cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	options := n.clusterOptions(n.state.Alone())
	options.Member.ForceNew = true
	s, err := etcd.Open(ctx, options)
	if err != nil {
		return fmt.Errorf("go on with this node's member alone: %w", err)
	}
	return errors.Join(s.Close(), n.dir().Save(n.state.Alone()))
}

// offline takes the directories of a node that is in a cluster, and whose serve does not run.
func offline(ctx context.Context, cfg *Config) (*Node, error) {
	s, err := cluster.Dir(dirOf(cfg.DataDir)).Load()
	if err != nil {
		return nil, err
	}
	cfg.Name = s.Name
	if err := cfg.check(); err != nil {
		return nil, err
	}
	n := &Node{cfg: *cfg}
	n.ctx, n.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	if err = n.lock(); err == nil {
		err = n.loadCluster()
	}
	if err == nil && !n.state.Voter {
		err = fmt.Errorf("%w: node %s keeps no member of the catalogue; do this on one that does", ErrConfig, s.Name)
	}
	if err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// nameIn is what the node with a data directory is called in its cluster; "" if it is in none, or that cannot be read now.
func nameIn(dataDir string) string {
	s, err := cluster.Dir(dirOf(dataDir)).Load()
	if err != nil {
		return ""
	}
	return s.Name
}

// openFirst opens an empty catalogue: in a cluster, of which this node's member is the first.
func (n *Node) openFirst(ctx context.Context) (*etcd.Store, error) {
	if err := n.loadCluster(); err != nil {
		return nil, err
	}
	if n.state != nil && !n.state.Voter && n.embedded() { // it would ask members that are not there, for ever
		return nil, fmt.Errorf("%w: node %s keeps no member of the catalogue; do this on one that does, or, if none is left, move %s away first: this node begins a new cluster with the records then", ErrConfig,
			n.state.Name, n.dir())
	}
	if n.state == nil || !n.embedded() {
		return etcd.Open(ctx, n.options())
	}
	s, err := etcd.Open(ctx, n.clusterOptions(n.state.Alone()))
	if err != nil {
		return nil, err
	}
	if err := n.dir().Save(n.state.Alone()); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}
