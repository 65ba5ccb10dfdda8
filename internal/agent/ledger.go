package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
)

// ledger is the catalogue's membership records as the data process sees them.
type ledger struct {
	c catalog.Catalog
}

var _ client.Ledger = ledger{}

// Ledger returns what LedgerHandler serves to the data process. It makes no record: the first version is control's, or ashlar recover's.
func (a *Agent) Ledger() client.Ledger { return ledger{a.cfg.Catalog} }

// Read implements client.Ledger.
func (l ledger) Read(ctx context.Context, volumeID string) (client.MembershipEntry, error) {
	e, err := l.c.Get(ctx, catalog.MembershipKey(volumeID))
	if err != nil {
		return client.MembershipEntry{}, fmt.Errorf("membership of volume %s: %w", volumeID, ledgerError(err))
	}
	return client.MembershipEntry{Record: e.Value, Rev: int64(e.Rev)}, nil
}

// Swap implements client.Ledger. The record is stored byte for byte.
func (l ledger) Swap(ctx context.Context, s client.MembershipSwap) (int64, error) {
	var m struct {
		VolumeID string `json:"volumeID"`
	}
	if err := json.Unmarshal(s.Record, &m); err != nil || m.VolumeID != s.VolumeID {
		return 0, fmt.Errorf("membership of volume %s: the record is of volume %q: %w", s.VolumeID, m.VolumeID, client.ErrInvalid)
	}
	if s.Was == 0 {
		return 0, fmt.Errorf("membership of volume %s: a first record is not the engine's to make: %w", s.VolumeID, client.ErrNotFound)
	}
	rev, err := l.c.Put(ctx, catalog.MembershipKey(s.VolumeID), s.Record, catalog.Rev(s.Was))
	if err != nil {
		return 0, fmt.Errorf("membership of volume %s: %w", s.VolumeID, ledgerError(err))
	}
	return int64(rev), nil
}

// ledgerError turns the catalogue's errors into the wire's. Whatever is not an answer is ErrUnreachable: it may have happened.
func ledgerError(err error) error {
	switch {
	case errors.Is(err, catalog.ErrNotFound):
		return fmt.Errorf("%w: %w", client.ErrNotFound, err)
	case errors.Is(err, catalog.ErrConflict):
		return fmt.Errorf("%w: %w", client.ErrConflict, err)
	case errors.Is(err, catalog.ErrKey):
		return fmt.Errorf("%w: %w", client.ErrInvalid, err)
	}
	return fmt.Errorf("%w: %w", client.ErrUnreachable, err)
}
