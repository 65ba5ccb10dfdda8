package volume

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// This file is the law of a volume's membership (design: invariants 7, 8, 9, 13, 14 and 16) and nothing else: functions from a Record, what
// happened, and the time, to the next Record. No I/O, no clock, no lock; every rule works for any number of members, although the engine drives one for now.
//
//	           Claim              Opened                 BeginChange
//	closed ───────────► claimed ──────────► open ◄──────────────────────► changing
//	   ▲                   │ Claim           │  CommitChange, AbortChange
//	   └───────────────────┴─────────────────┘
//	             Released, Replace
//
// Every function leaves its argument as it is, and every Record that differs has a higher Generation, so that no two swapped Records with the
// same (Epoch, Generation) differ unless a catalogue was restored from a backup.

var (
	// ErrStaleReplica: a copy's epoch is below the one that last opened: it is an old copy, and no longer in sync.
	ErrStaleReplica = errors.New("copy is older than the record")
	// ErrNoMember: no copy that is in sync could be reached and fenced.
	ErrNoMember = errors.New("no copy in sync could be fenced")
	// ErrLost: every copy's host restarted under a writer that did not, so that what it had not flushed is gone while its guest lives on. Detach, then attach.
	ErrLost = errors.New("every copy restarted under a running guest; detach first")
	// ErrNoResume: the writer's epoch cannot be taken up again without the catalogue.
	ErrNoResume = errors.New("epoch cannot be resumed")
	// ErrPending: another change of the chain is under way.
	ErrPending = errors.New("another change is under way")
)

// Claimant is who opens a volume: a node, and the boot of its host.
type Claimant struct {
	Node, Boot string
}

// Sighting is what one copy said of itself.
type Sighting struct {
	ReplicaID string
	Status    replica.Status
}

// NewRecord is a volume's first record, as the control plane makes it (plan.firstMembership): no writer yet, all members in sync because all are empty. Tests of the data path begin with it.
func NewRecord(volumeID string, members []replica.Member, chain replica.Chain, now time.Time) replica.Record {
	rec := replica.Record{VolumeID: volumeID, Generation: 1, Members: slices.Clone(members), Chain: chain, LastChange: now.UTC()}
	for i := range rec.Members {
		rec.Members[i].InSync = true
	}
	if rec.Chain.Generation == 0 {
		rec.Chain.Generation = 1
	}
	return rec
}

// step returns a copy of rec with the next generation.
func step(rec replica.Record, now time.Time) replica.Record {
	rec.Members = slices.Clone(rec.Members)
	rec.Generation++
	rec.LastChange = now.UTC()
	return rec
}

// Claim takes the next epoch: the first compare-and-swap of an open. The record goes on naming the writer that last opened, whose guests CheckIncarnations is about: a claimant
// has served nobody yet.
func Claim(rec replica.Record, now time.Time) (replica.Record, error) {
	if rec.VolumeID == "" || len(rec.Members) == 0 || len(rec.Chain.Layers) == 0 {
		return rec, fmt.Errorf("record without id, members or chain: %w", replica.ErrChain)
	}
	next := step(rec, now)
	next.Epoch++
	return next, nil
}

// Opened is the second compare-and-swap of an open, by the claimant: the members that were fenced stay in sync and are recorded with their incarnation; one in
// sync that was not fenced leaves. ErrNoMember if none in sync was.
func Opened(rec replica.Record, by Claimant, fenced []Sighting, now time.Time) (replica.Record, error) {
	next := step(rec, now)
	next.Opened = next.Epoch
	next.WriterNode, next.WriterBoot = by.Node, by.Boot
	kept := 0
	for i := range next.Members {
		m := &next.Members[i]
		if !m.InSync {
			continue
		}
		at := slices.IndexFunc(fenced, func(s Sighting) bool { return s.ReplicaID == m.ReplicaID })
		if at < 0 {
			m.InSync, m.Failed = false, fmt.Sprintf("not reached when epoch %d opened", next.Epoch)
			continue
		}
		m.Incarnation = fenced[at].Status.BootID
		kept++
	}
	if kept == 0 {
		return rec, ErrNoMember
	}
	return next, nil
}

// Released records a clean close: everything is flushed and nobody writes.
func Released(rec replica.Record, now time.Time) replica.Record {
	next := step(rec, now)
	next.WriterNode, next.WriterBoot = "", ""
	return next
}

// Retaken names the writer again in a record that says released: the process was killed after the swap of its close and before it could note that anywhere else, and resumed.
func Retaken(rec replica.Record, by Claimant, now time.Time) replica.Record {
	next := step(rec, now)
	next.WriterNode, next.WriterBoot = by.Node, by.Boot
	return next
}

// Replace puts a copy in the place of a member, by the writer that opened last and has it alone in sync: to has all that from has, and nobody writes any more. ErrNoMember if from is not in sync or has failed;
// ErrPending; ErrInvalid if to is a member already, or nobody opened under this epoch.
func Replace(rec replica.Record, from string, to replica.Member, now time.Time) (replica.Record, error) {
	at := slices.IndexFunc(rec.Members, func(m replica.Member) bool { return m.ReplicaID == from })
	switch {
	case at < 0 || !rec.Members[at].InSync || rec.Members[at].Failed != "":
		return rec, fmt.Errorf("replace member %s: not in sync: %w", from, ErrNoMember)
	case rec.Pending != nil:
		return rec, fmt.Errorf("replace member %s: %s is pending: %w", from, rec.Pending.Verb, ErrPending)
	case to.ReplicaID == "" || to.Node == "" || to.Incarnation == "" || slices.ContainsFunc(rec.Members, func(m replica.Member) bool { return m.ReplicaID == to.ReplicaID }):
		return rec, fmt.Errorf("replace member %s by %q on %q: %w", from, to.ReplicaID, to.Node, ErrInvalid)
	case rec.Epoch == 0 || rec.Opened != rec.Epoch:
		return rec, fmt.Errorf("replace member %s: epoch %d was not opened: %w", from, rec.Epoch, ErrInvalid)
	}
	next := Released(rec, now)
	next.Members[at] = replica.Member{ReplicaID: to.ReplicaID, Node: to.Node, InSync: true, Incarnation: to.Incarnation}
	return next, nil
}

// inSync returns the indexes of the members in sync.
func inSync(rec replica.Record) []int {
	var in []int
	for i, m := range rec.Members {
		if m.InSync {
			in = append(in, i)
		}
	}
	return in
}

// FailMember takes a failed member out of the set. The set never becomes empty: the last one in sync stays, marked as failed, and opening
// then needs salvage.
func FailMember(rec replica.Record, replicaID, why string, now time.Time) (replica.Record, error) {
	at := slices.IndexFunc(rec.Members, func(m replica.Member) bool { return m.ReplicaID == replicaID })
	if at < 0 {
		return rec, fmt.Errorf("fail member %s: %w", replicaID, ErrNoMember)
	}
	next := step(rec, now)
	next.Members[at].Failed = why
	if in := inSync(rec); len(in) > 1 || !rec.Members[at].InSync {
		next.Members[at].InSync = false
	}
	return next, nil
}

// NeedsSalvage tells whether every member in sync has failed, so that only a person may decide to go on with what is left.
func NeedsSalvage(rec replica.Record) bool {
	for _, i := range inSync(rec) {
		if rec.Members[i].Failed == "" {
			return false
		}
	}
	return true
}

// Salvage goes on with the last set as it is: what is left of it is what there is. It never brings back one that left the set.
func Salvage(rec replica.Record, now time.Time) replica.Record {
	next := step(rec, now)
	for _, i := range inSync(rec) {
		next.Members[i].Failed = ""
	}
	return next
}

// CheckCatalogue says whether the catalogue can be as new as its copies. A copy that holds a higher (epoch, generation), another record under the same, or
// a writer of an epoch that the catalogue never gave out, proves that it is not: ErrStaleCatalogue.
func CheckCatalogue(rec replica.Record, seen []Sighting) error {
	for _, s := range seen {
		kept := s.Status.Record
		switch {
		case kept.VolumeID != "" && kept.VolumeID != rec.VolumeID:
			return fmt.Errorf("replica %s belongs to volume %s: %w", s.ReplicaID, kept.VolumeID, replica.ErrChain)
		case rec.Less(kept), s.Status.Writer.Epoch > rec.Epoch:
			return fmt.Errorf("catalogue has epoch %d generation %d, replica %s has %d, %d and writer epoch %d: %w", rec.Epoch, rec.Generation,
				s.ReplicaID, kept.Epoch, kept.Generation, s.Status.Writer.Epoch, ErrStaleCatalogue)
		case kept.VolumeID != "" && !kept.Less(rec) && !kept.Equal(rec):
			return fmt.Errorf("catalogue and replica %s differ at epoch %d generation %d: %w", s.ReplicaID, rec.Epoch, rec.Generation, ErrStaleCatalogue)
		}
	}
	return nil
}

// CheckCopies says whether the copies in sync are as new as the record. One whose writer is below the epoch that last opened missed that open: it is an
// old copy brought back, and leaves. ErrStaleReplica if none is left.
func CheckCopies(rec replica.Record, seen []Sighting, now time.Time) (replica.Record, error) {
	stale := map[string]uint64{}
	for _, s := range seen {
		if s.Status.Writer.Epoch < rec.Opened {
			stale[s.ReplicaID] = s.Status.Writer.Epoch
		}
	}
	next, left := rec, 0
	for _, i := range inSync(rec) {
		epoch, old := stale[rec.Members[i].ReplicaID]
		if !old {
			left++
			continue
		}
		if next.Generation == rec.Generation {
			next = step(rec, now)
		}
		next.Members[i].InSync = false
		next.Members[i].Failed = fmt.Sprintf("has epoch %d, and epoch %d opened since", epoch, rec.Opened)
	}
	if left == 0 {
		return rec, fmt.Errorf("epoch %d opened since: %w", rec.Opened, ErrStaleReplica)
	}
	return next, nil
}

// FirstChain takes what is not known at creation, the chain's generation and base, from the copies while no open ever completed.
func FirstChain(rec replica.Record, seen []Sighting) replica.Record {
	if rec.Opened != 0 || rec.Pending != nil || len(seen) == 0 {
		return rec
	}
	have := seen[0].Status.Chain
	if slices.Equal(have.Layers, rec.Chain.Layers) && have.SizeBytes == rec.Chain.SizeBytes {
		rec.Chain = have
	}
	return rec
}

// allFailed tells whether every copy in sync says that it failed, although the record may not know yet.
func allFailed(rec replica.Record, seen []Sighting) bool {
	for _, i := range inSync(rec) {
		for _, s := range seen {
			if s.ReplicaID == rec.Members[i].ReplicaID && s.Status.Failed == "" {
				return false
			}
		}
	}
	return len(seen) > 0
}

// Attachment says what the opener knows of the guests of the volume's last writer.
type Attachment struct {
	// GuestsGone: the volume was detached since, so no guest remembers what the last writer had not flushed.
	GuestsGone bool
	// Reopener opens; it is the last writer's host in its same boot if both agree with the record.
	Reopener Claimant
	// Epoch is the one that the opener's guests were served under and still wait for; 0: there are none.
	Epoch uint64
}

// CheckGuests refuses to go on for guests who were served under an epoch that is over: somebody else opened the volume since, and wrote what they do not know of (invariant 9). block.ErrFenced. An epoch that
// was only claimed served nobody, and one that this very host opened in this boot was opened for them.
func CheckGuests(rec replica.Record, a Attachment) error {
	if a.Epoch == 0 || rec.Opened <= a.Epoch || a.Reopener == (Claimant{Node: rec.WriterNode, Boot: rec.WriterBoot}) {
		return nil
	}
	return fmt.Errorf("its guests were served under epoch %d, and epoch %d opened since: %w: detach them", a.Epoch, rec.Opened, block.ErrFenced)
}

// CheckIncarnations compares where the members in sync are now with where the record saw them last (invariant 8). After a clean close nothing was unflushed and nothing can be
// lost. Otherwise a member whose host restarted leaves, unless all did: then, if the writer's host did not restart and its guests may live on, ErrLost; if its
// guests are gone, the new incarnations count (Opened records them).
func CheckIncarnations(rec replica.Record, seen []Sighting, a Attachment, now time.Time) (replica.Record, error) {
	if rec.WriterNode == "" {
		return rec, nil
	}
	boots := map[string]string{}
	for _, s := range seen {
		boots[s.ReplicaID] = s.Status.BootID
	}
	var differ []int
	in := inSync(rec)
	for _, i := range in {
		m := rec.Members[i]
		if boot, ok := boots[m.ReplicaID]; ok && m.Incarnation != "" && m.Incarnation != boot {
			differ = append(differ, i)
		}
	}
	switch {
	case len(differ) == 0:
		return rec, nil
	case len(differ) < len(in):
		next := step(rec, now)
		for _, i := range differ {
			next.Members[i].InSync = false
			next.Members[i].Failed = "its host restarted before everything was flushed"
		}
		return next, nil
	case a.Reopener.Node == rec.WriterNode && a.Reopener.Boot == rec.WriterBoot && !a.GuestsGone:
		return rec, ErrLost
	}
	return rec, nil
}

// Reincarnated records that a copy's host was booted again while the volume was open, and that nothing was lost by it, because everything had been flushed: from now on it is this boot that must not end unseen. The
// same record if it says so already.
func Reincarnated(rec replica.Record, replicaID, boot string, now time.Time) replica.Record {
	at := slices.IndexFunc(rec.Members, func(m replica.Member) bool { return m.ReplicaID == replicaID && m.InSync })
	if at < 0 || boot == "" || rec.Members[at].Incarnation == boot {
		return rec
	}
	next := step(rec, now)
	next.Members[at].Incarnation = boot
	return next
}

// CheckResumed looks once more at copies that have let the resumed writer in: one whose host was booted again since Resume looked is lost to the guests (ErrLost).
func CheckResumed(rec replica.Record, seen []Sighting) error {
	for _, s := range seen {
		if slices.ContainsFunc(rec.Members, func(m replica.Member) bool {
			return m.ReplicaID == s.ReplicaID && m.InSync && m.Incarnation != s.Status.BootID
		}) {
			return fmt.Errorf("replica %s restarted while the epoch was resumed: %w", s.ReplicaID, ErrLost)
		}
	}
	return nil
}

// Newest returns the newest record that any of the copies keeps.
func Newest(seen []Sighting) replica.Record {
	var rec replica.Record
	for _, s := range seen {
		if rec.Less(s.Status.Record) {
			rec = s.Status.Record
		}
	}
	return rec
}

// Resume decides whether by, restarted on the same boot, may take up its epoch again without the catalogue, and with which writer: every member of the newest record that
// the copies keep must confirm exactly that epoch, from the incarnation it had. ErrNoResume says why not; then the volume is claimed anew.
func Resume(seen []Sighting, by Claimant) (replica.Writer, error) {
	rec := Newest(seen)
	switch {
	case rec.VolumeID == "":
		return replica.Writer{}, fmt.Errorf("no copy keeps a record: %w", ErrNoResume)
	case rec.WriterNode != by.Node || rec.WriterBoot != by.Boot:
		return replica.Writer{}, fmt.Errorf("the writer was %s in boot %q: %w", rec.WriterNode, rec.WriterBoot, ErrNoResume)
	case rec.Opened != rec.Epoch:
		return replica.Writer{}, fmt.Errorf("epoch %d never opened: %w", rec.Epoch, ErrNoResume)
	}
	w := replica.Writer{Epoch: rec.Epoch}
	for _, m := range rec.Members {
		at := slices.IndexFunc(seen, func(s Sighting) bool { return s.ReplicaID == m.ReplicaID })
		if at < 0 {
			return replica.Writer{}, fmt.Errorf("replica %s was not reached: %w", m.ReplicaID, ErrNoResume)
		}
		st := seen[at].Status
		switch {
		case st.Writer.Epoch != rec.Epoch:
			return replica.Writer{}, fmt.Errorf("replica %s has epoch %d, not %d: %w", m.ReplicaID, st.Writer.Epoch, rec.Epoch, ErrNoResume)
		case m.InSync && (m.Failed != "" || st.Failed != ""):
			return replica.Writer{}, fmt.Errorf("replica %s failed: %w", m.ReplicaID, ErrNoResume)
		case m.InSync && m.Incarnation != st.BootID:
			return replica.Writer{}, fmt.Errorf("replica %s restarted: %w", m.ReplicaID, ErrNoResume)
		}
		w.Session = max(w.Session, st.Writer.Session)
	}
	w.Session++
	return w, nil
}
