package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"

	"ashlar/internal/catalog"
)

// Restore brings the records of a backup (catalog.Export) back into this node's empty catalogue. `ashlar serve` must not run on the data directory (ErrInUse); the data
// process may, with guests on it: it is not asked anything. In a cluster this node's member becomes the first of a new catalogue, and the other voters join it when they find that theirs is no
// more. The restored catalogue may be older than the disks: each volume then refuses to open, with
// client.ErrStaleCatalogue, until Recover continued above what its disks know. catalog.ErrNotEmpty, catalog.ErrBackup, catalog.ErrNewer: nothing was changed.
func Restore(ctx context.Context, cfg Config, backup io.Reader) (done catalog.Backed, err error) {
	cfg.Name = cmp.Or(cfg.Name, nameIn(cfg.DataDir), "restore") // outside a cluster it is not asked for
	if err := cfg.check(); err != nil {
		return done, err
	}
	n := &Node{cfg: cfg}
	n.ctx, n.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	defer func() { err = errors.Join(err, n.Close()) }()
	if err := n.lock(); err != nil {
		return done, fmt.Errorf("%w (stop it for this; guests go on)", err)
	}
	cat, err := n.openFirst(ctx)
	if err != nil {
		return done, fmt.Errorf("open the catalogue: %w", err)
	}
	n.undo = append(n.undo, cat.Close)
	return catalog.Restore(ctx, cat, backup)
}
