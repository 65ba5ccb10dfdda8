package volume

import (
	"errors"
	"testing"
	"time"

	"ashlar/internal/replica"
)

// TestReplaceRule: what a copy that takes another's place makes of a record, and where none may.
func TestReplaceRule(t *testing.T) {
	now := time.Unix(1e9, 0)
	rec := NewRecord("v", []replica.Member{{ReplicaID: "a", Node: "n1"}}, replica.Chain{SizeBytes: 1 << 20, Layers: []replica.LayerID{"h"}}, now)
	rec, err := Claim(rec, now)
	if err == nil {
		rec, err = Opened(rec, Claimant{Node: "n2", Boot: "b2"}, []Sighting{{ReplicaID: "a", Status: replica.Status{BootID: "b1"}}}, now)
	}
	if err != nil {
		t.Fatal(err)
	}
	to := replica.Member{ReplicaID: "b", Node: "n2", Incarnation: "b2", Failed: "said by nobody"}
	next, err := Replace(rec, "a", to, now)
	want := replica.Member{ReplicaID: "b", Node: "n2", InSync: true, Incarnation: "b2"}
	if err != nil || len(next.Members) != 1 || next.Members[0] != want || next.WriterNode != "" || next.WriterBoot != "" ||
		next.Generation <= rec.Generation || next.Epoch != rec.Epoch || next.Opened != rec.Epoch || !next.Chain.Equal(rec.Chain) {
		t.Errorf("replaced: %+v (%v)", next, err)
	}
	if rec.Members[0].ReplicaID != "a" || rec.WriterNode != "n2" {
		t.Errorf("the argument was changed: %+v", rec)
	}
	// The old copy, with all it knows, opens nothing any more; the new one, with what it began with, does.
	old, fresh := Sighting{ReplicaID: "a", Status: replica.Status{Writer: replica.Writer{Epoch: rec.Epoch}, Record: rec}}, Sighting{ReplicaID: "b", Status: replica.Status{Writer: replica.Writer{Epoch: rec.Epoch}, Record: rec, BootID: "b2"}}
	if err := CheckCatalogue(next, []Sighting{fresh}); err != nil {
		t.Errorf("the copy: %v", err)
	}
	if _, err := CheckCopies(next, []Sighting{fresh}, now); err != nil {
		t.Errorf("the copy: %v", err)
	}
	if _, err := Resume([]Sighting{old}, Claimant{Node: "n2", Boot: "other"}); !errors.Is(err, ErrNoResume) {
		t.Errorf("the old copy is resumed: %v", err)
	}
	if _, err := Resume([]Sighting{fresh}, Claimant{Node: "n2", Boot: "b2"}); !errors.Is(err, ErrNoResume) {
		t.Errorf("a copy that is not known to be a member is resumed: %v", err)
	}
	edit := func(f func(*replica.Record)) replica.Record {
		r := step(rec, now)
		f(&r)
		return r
	}
	for what, s := range map[string]struct {
		rec  replica.Record
		from string
		to   replica.Member
		want error
	}{
		"no such member":         {rec, "c", to, ErrNoMember},
		"one that left":          {edit(func(r *replica.Record) { r.Members[0].InSync = false }), "a", to, ErrNoMember},
		"one that failed":        {edit(func(r *replica.Record) { r.Members[0].Failed = "fsync" }), "a", to, ErrNoMember},
		"a pending change":       {edit(func(r *replica.Record) { r.Pending = &replica.Change{Verb: replica.VerbSnapshot} }), "a", to, ErrPending},
		"claimed and not opened": {edit(func(r *replica.Record) { r.Epoch++ }), "a", to, ErrInvalid},
		"never opened":           {edit(func(r *replica.Record) { r.Epoch, r.Opened = 0, 0 }), "a", to, ErrInvalid},
		"by itself":              {rec, "a", replica.Member{ReplicaID: "a", Node: "n2", Incarnation: "b2"}, ErrInvalid},
		"on no node":             {rec, "a", replica.Member{ReplicaID: "b", Incarnation: "b2"}, ErrInvalid},
		"of no incarnation":      {rec, "a", replica.Member{ReplicaID: "b", Node: "n2"}, ErrInvalid},
		"by nothing":             {rec, "a", replica.Member{Node: "n2", Incarnation: "b2"}, ErrInvalid},
	} {
		if got, err := Replace(s.rec, s.from, s.to, now); !errors.Is(err, s.want) || !got.Equal(s.rec) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
