package client

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// TestPauses: whoever waits looks often at first and less often the more a look costs, so that waiting for a node of a large cluster to be empty does not keep the catalogue busy.
func TestPauses(t *testing.T) {
	for _, c := range []struct {
		look  time.Duration
		least int // looks in a minute
		most  int
	}{{0, 119, 160}, {10 * time.Millisecond, 115, 150}, {200 * time.Millisecond, 29, 31}, {2 * time.Second, 8, 9}} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			looks := 0
			err := until(ctx, func() (bool, error) {
				looks++
				<-time.After(c.look)
				return false, nil
			})
			if err == nil || looks < c.least || looks > c.most {
				t.Errorf("%d looks of %v in a minute, want %d to %d (%v)", looks, c.look, c.least, c.most, err)
			}
		})
	}
}
