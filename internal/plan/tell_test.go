package plan_test

import (
	"fmt"
	"testing"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// TestTellsLast: what is done stands before what only tells why something is not done, and a volume that is too large does not keep a smaller one from its place.
func TestTellsLast(t *testing.T) {
	p := newPicture(t).node("n1").put(catalog.SettingKey(catalog.SettingOverProvisioning), catalog.Setting{Value: "100"}).
		volume(catalog.VolumeWanted{Name: "a", SizeBytes: 1000 * gib}).volume(catalog.VolumeWanted{Name: "b", SizeBytes: gib}).
		put(catalog.ImageKey(catalog.Wanted, "i"), catalog.ImageWanted{Name: "i", ID: "id-i", MinCopies: 1})
	if got, want := keys(p.cluster()), "volume/wanted/b membership/wanted/id-b image/wanted/i volume/observed/a"; got != want {
		t.Fatalf("writes %q, want %q", got, want)
	}
	purpose := func(want plan.Purpose) {
		t.Helper()
		for _, w := range p.apply() {
			if w.Key == catalog.VolumeKey(catalog.Observed, "a") {
				if w.For != want {
					t.Errorf("told for %d, want %d", w.For, want)
				}
				return
			}
		}
		t.Error("not told")
	}
	purpose(plan.Tells)
	p.volume(catalog.VolumeWanted{Name: "c", SizeBytes: gib}) // less is left for "a"
	purpose(plan.Retell)
	w := p.v.Volumes["a"].Wanted.Value
	w.Replicas = []catalog.Placement{{ReplicaID: "r", Node: "gone", DiskID: "gone"}}
	p.put(catalog.VolumeKey(catalog.Wanted, "a"), w)
	purpose(plan.Tells) // it is lost
}

// TestFewComplaints: however many volumes have no place, events say so of some, and leave room for others.
func TestFewComplaints(t *testing.T) {
	p := newPicture(t).node("n1", setFree(0))
	notes := 0
	told := func(from, n int) (writes int) {
		for i := range n {
			p.volume(catalog.VolumeWanted{Name: fmt.Sprintf("v%04d", from+i)})
		}
		for _, w := range p.cluster() {
			p.put(w.Key, w.Value)
			writes++
			for _, ev := range w.Notes {
				p.put(catalog.EventKey(fmt.Sprint("e", notes)), ev)
				notes++
			}
		}
		return writes
	}
	for from, n := range map[int]int{0: 150, 1000: 1000} {
		if got := told(from, n); got != n {
			t.Errorf("%d of %d volumes are told", got, n)
		}
	}
	if notes != 200 {
		t.Errorf("%d events", notes)
	}
}
