package ledgertest_test

import (
	"testing"

	"ashlar/internal/replica"
	"ashlar/internal/volume"
	"ashlar/internal/volume/ledgertest"
)

func TestMem(t *testing.T) {
	var last *ledgertest.Mem
	ledgertest.Run(t, ledgertest.Config{
		New: func(t testing.TB) (volume.Ledger, func(replica.Record)) {
			m := ledgertest.NewMem()
			last = m
			return m, func(rec replica.Record) {
				if _, err := m.Swap(t.Context(), rec, 0); err != nil {
					t.Fatal(err)
				}
			}
		},
		Cut: func(testing.TB) func() {
			last.OnCall(func(ledgertest.Call) ledgertest.Fault { return ledgertest.LostBefore })
			return func() { last.OnCall(nil) }
		},
	})
}
