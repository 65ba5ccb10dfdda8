package control

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// retold is n records that say something already, called after first.
func retold(n int, first string) []plan.Write {
	var out []plan.Write
	for i := range n {
		out = append(out, plan.Write{Key: catalog.VolumeKey(catalog.Observed, fmt.Sprintf("%s%04d", first, i)), For: plan.Retell})
	}
	return out
}

// TestPick: records are written in other words retellMost times in retellEvery, counted from the first of them, however they come; and it is said when there is more.
func TestPick(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	tell := telling{last: map[catalog.Key]time.Time{}}
	for _, step := range []struct {
		at        time.Duration
		asked     int
		told      int
		wait      time.Duration
		whatFirst string
	}{
		{0, retellMost - 28, retellMost - 28, -1, "a"},
		{20 * time.Second, 50, 28, 5 * time.Second, "b"},
		{24 * time.Second, 22, 0, time.Second, "c"},
		{25 * time.Second, 22, 22, -1, "c"},
		{49 * time.Second, retellMost, retellMost - 22, time.Second, "d"},
		{50 * time.Second, 22, 22, -1, "e"},
		{time.Hour, 1, 1, -1, "f"},
		{time.Hour + 24*time.Second, retellMost, retellMost - 1, time.Second, "g"},
		{time.Hour + 25*time.Second, retellMost + 1, retellMost, 0, "h"}, // as many as one round tells
		{time.Hour + 26*time.Second, 1, 0, 24 * time.Second, "i"},
	} {
		some, wait := tell.pick(retold(step.asked, step.whatFirst), start.Add(step.at))
		if len(some) != step.told || wait != step.wait {
			t.Errorf("after %v: of %d told %d, wait %v; want %d, %v", step.at, step.asked, len(some), wait, step.told, step.wait)
		}
	}
}

// TestPickOrder: what was never said comes before what is said in other words, of which what was said longest ago comes first.
func TestPickOrder(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	old := retold(3, "old")
	tell := telling{last: map[catalog.Key]time.Time{old[0].Key: now.Add(-time.Minute), old[1].Key: now.Add(-time.Hour), old[2].Key: now.Add(-time.Second)}}
	fresh := plan.Write{Key: catalog.VolumeKey(catalog.Observed, "z"), For: plan.Tells}
	some, wait := tell.pick(append(slices.Clone(old), fresh), now)
	var got []string
	for _, w := range some {
		got = append(got, w.Key.Name)
	}
	if want := []string{"z", "old0001", "old0000", "old0002"}; !slices.Equal(got, want) || wait != -1 {
		t.Errorf("%v, wait %v, want %v", got, wait, want)
	}
}
