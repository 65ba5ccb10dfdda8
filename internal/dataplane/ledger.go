package dataplane

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/replica"
	"ashlar/internal/volume"
)

// wireLedger is the engine's port to the catalogue through the agent's socket. While no agent answers, every call is volume.ErrUnreachable, and the
// engine waits or fails as its invariant says.
type wireLedger struct {
	to client.Ledger
}

var _ volume.Ledger = wireLedger{}

// Read implements volume.Ledger.
func (l wireLedger) Read(ctx context.Context, volumeID string) (replica.Record, volume.Rev, error) {
	var rec replica.Record
	e, err := l.to.Read(ctx, volumeID)
	if err != nil {
		return rec, 0, ledgerError(err)
	}
	if err := json.Unmarshal(e.Record, &rec); err != nil {
		return rec, 0, fmt.Errorf("membership record of volume %s: %w", volumeID, err)
	}
	return rec, volume.Rev(e.Rev), nil
}

// Swap implements volume.Ledger.
func (l wireLedger) Swap(ctx context.Context, rec replica.Record, was volume.Rev) (volume.Rev, error) {
	body, err := json.Marshal(rec)
	if err != nil {
		return 0, fmt.Errorf("membership record of volume %s: %w", rec.VolumeID, err)
	}
	rev, err := l.to.Swap(ctx, client.MembershipSwap{VolumeID: rec.VolumeID, Record: body, Was: int64(was)})
	if err != nil {
		return 0, ledgerError(err)
	}
	return volume.Rev(rev), nil
}

// ledgerError turns the wire's sentinels back into the engine's. Whatever does not prove that nothing happened is unreachable.
func ledgerError(err error) error {
	to := volume.ErrUnreachable
	switch {
	case errors.Is(err, client.ErrNotFound):
		to = volume.ErrNoRecord
	case errors.Is(err, client.ErrConflict):
		to = volume.ErrConflict
	case errors.Is(err, client.ErrInvalid), errors.Is(err, client.ErrVersion):
		return err
	}
	return fmt.Errorf("%w: %w", to, err)
}
