package volume

import (
	"context"
	"errors"

	"ashlar/internal/replica"
)

// Rev is a revision of a membership record in the catalogue; zero means "there is none".
type Rev int64

// Ledger is the engine's one port to the catalogue: a linearizable read and a compare-and-swap of a volume's membership record. It is called at
// open, snapshot, resize, revert, failure and close, never per write.
type Ledger interface {
	// Read returns the newest record. ErrNoRecord if there is none; ErrUnreachable if nobody could be asked (the caller waits or fails, as its
	// invariant says).
	Read(ctx context.Context, volumeID string) (replica.Record, Rev, error)
	// Swap replaces the record if its revision is still was. ErrConflict if it is not. When ErrUnreachable is returned the swap may
	// have happened: the caller reads before it decides.
	Swap(ctx context.Context, rec replica.Record, was Rev) (Rev, error)
}

var (
	// ErrNoRecord: the catalogue knows no such volume.
	ErrNoRecord = errors.New("no membership record")
	// ErrConflict: the record changed meanwhile.
	ErrConflict = errors.New("membership record changed meanwhile")
	// ErrUnreachable: the catalogue did not answer.
	ErrUnreachable = errors.New("catalogue unreachable")
	// ErrStaleCatalogue: a replica holds a newer record than the catalogue, which must be an old copy; `ashlar recover` continues above the highest.
	ErrStaleCatalogue = errors.New("catalogue is older than the replicas")
	// ErrNeedsSalvage: the last copy failed a flush; attaching again needs a person's decision (salvage).
	ErrNeedsSalvage = errors.New("the last copy failed; attaching again needs salvage")
)
