package client

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"time"
)

// Ledger is the catalogue's membership records as the data process sees them: a linearizable read and a compare-and-swap by revision. The agent serves one;
// LedgerClient is one, over the wire. All methods may be called concurrently.
type Ledger interface {
	// Read returns the newest record of a volume and its revision. ErrNotFound if there is none; ErrUnreachable if the catalogue could not be asked.
	Read(ctx context.Context, volumeID string) (MembershipEntry, error)
	// Swap replaces the record if its revision is still was (0: there is none) and returns the new revision. ErrConflict if it is not. With
	// ErrUnreachable it may have happened.
	Swap(ctx context.Context, a MembershipSwap) (int64, error)
}

// ledgerTimeout bounds one question; the engine above repeats or gives up, as its invariant says.
const ledgerTimeout = 10 * time.Second

// LedgerClient asks the agent for membership records. Any failure to get an answer, also within ten seconds, is ErrUnreachable.
type LedgerClient struct {
	caller
}

var _ Ledger = (*LedgerClient)(nil)

// NewLedgerClient returns a client of the ledger that listens on socket (LedgerSocket). Nothing is connected yet.
func NewLedgerClient(socket string) *LedgerClient { return &LedgerClient{caller: newCaller(socket)} }

// Read implements Ledger.
func (c *LedgerClient) Read(ctx context.Context, volumeID string) (MembershipEntry, error) {
	ctx, cancel := context.WithTimeout(ctx, ledgerTimeout)
	defer cancel()
	return call[MembershipEntry](ctx, c.caller, "read", MembershipRead{VolumeID: volumeID})
}

// Swap implements Ledger.
func (c *LedgerClient) Swap(ctx context.Context, a MembershipSwap) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, ledgerTimeout)
	defer cancel()
	return call[int64](ctx, c.caller, "swap", a)
}

// LedgerHandler serves l to LedgerClients.
func LedgerHandler(l Ledger) http.Handler { return ledgerHandler(l, ThisBuild()) }

func ledgerHandler(l Ledger, w Window) http.Handler {
	mux := http.NewServeMux()
	handle(mux, "read", func(ctx context.Context, a MembershipRead) (MembershipEntry, error) {
		if a.VolumeID == "" {
			return MembershipEntry{}, fmt.Errorf("read membership: %w: no volume named", ErrInvalid)
		}
		return l.Read(ctx, a.VolumeID)
	})
	handle(mux, "swap", func(ctx context.Context, a MembershipSwap) (int64, error) {
		if a.VolumeID == "" || !bytes.HasPrefix(a.Record, []byte("{")) {
			return 0, fmt.Errorf("swap membership: %w: no volume or no record", ErrInvalid)
		}
		return l.Swap(ctx, a)
	})
	return versioned(w, mux)
}
