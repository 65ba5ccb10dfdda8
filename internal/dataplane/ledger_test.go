package dataplane

import (
	"encoding/json"
	"errors"
	"testing"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/replica"
	"ashlar/internal/volume"
	"ashlar/internal/volume/ledgertest"
)

// TestLedgerOverTheWire runs the ledger's conformance suite through both ends of the wire.
func TestLedgerOverTheWire(t *testing.T) {
	var cat *catalogue
	ledgertest.Run(t, ledgertest.Config{
		New: func(t testing.TB) (volume.Ledger, func(replica.Record)) {
			cat = newCatalogue(t, shortDir(t))
			return wireLedger{to: client.NewLedgerClient(client.LedgerSocket(cat.runDir))}, func(rec replica.Record) {
				text, err := json.Marshal(rec)
				if err == nil {
					_, err = cat.Swap(t.Context(), client.MembershipSwap{VolumeID: rec.VolumeID, Record: text})
				}
				if err != nil {
					t.Fatal(err)
				}
			}
		},
		Cut: func(testing.TB) func() {
			cat.away()
			return cat.back
		},
	})
}

// TestLedgerErrors: whatever does not prove that nothing happened is unreachable.
func TestLedgerErrors(t *testing.T) {
	for code, want := range map[client.Code]error{
		client.CodeNotFound: volume.ErrNoRecord, client.CodeConflict: volume.ErrConflict, client.CodeUnreachable: volume.ErrUnreachable,
		client.CodeInternal: volume.ErrUnreachable, client.CodeCancelled: volume.ErrUnreachable,
	} {
		if got := ledgerError(client.Failure(code, "x")); !errors.Is(got, want) {
			t.Errorf("%s became %v, want %v", code, got, want)
		}
	}
	for _, code := range []client.Code{client.CodeVersion, client.CodeInvalid} {
		if got := ledgerError(client.Failure(code, "x")); errors.Is(got, volume.ErrUnreachable) {
			t.Errorf("%s became %v: asking again will not help", code, got)
		}
	}
}
