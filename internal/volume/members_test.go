package volume

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// The rules of members.go and chain.go as stories: text files of steps, each with the record it leads to. UPDATE_STORIES=1 writes what the rules say now; read
// the difference before you keep it.
//
// A step is a verb and key=value arguments:
//
//	record members=a,b             a first record
//	see a epoch=1 session=1 boot=b1 [gen=N keepepoch=N] [chain=N] [failed=…]    what copy a says of itself (the record it keeps: the story's, unless given)
//	claim | open n1 b1 | fail a why | salvage | release
//	begin snapshot|expand|revert … | commit | abort | rollforward N
//	check                          CheckCatalogue, CheckCopies, CheckIncarnations, as an opener on n1 in boot b1 (node=, boot=, gone)
//	resume n1 b1
//	keep                           every copy seen keeps the record as it is now
type story struct {
	rec  replica.Record
	seen []Sighting
	now  time.Time
}

func TestStories(t *testing.T) {
	names, err := filepath.Glob("testdata/stories/*.txt")
	if err != nil || len(names) == 0 {
		t.Fatalf("no stories: %v", err)
	}
	for _, name := range names {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			got := tell(t, string(text))
			if got == string(text) {
				return
			}
			if os.Getenv("UPDATE_STORIES") != "" {
				if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want := strings.Split(string(text), "\n")
			for i, line := range strings.Split(got, "\n") {
				if i >= len(want) || line != want[i] {
					t.Fatalf("%s:%d: the rules say\n%s", name, i+1, line)
				}
			}
			t.Fatalf("%s says more than the rules", name)
		})
	}
}

// tell runs a story and returns it with the outcomes as they are.
func tell(t *testing.T, text string) string {
	s := &story{now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	var out strings.Builder
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		line := lines.Text()
		if strings.HasPrefix(line, "  ") {
			continue // an outcome
		}
		fmt.Fprintln(&out, line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		s.now = s.now.Add(time.Second)
		said, err := s.do(t, strings.Fields(line))
		if err != nil {
			said = "! " + sentinel(err)
		}
		if said != "" {
			fmt.Fprintln(&out, "  "+said)
		}
	}
	return out.String()
}

func (s *story) do(t *testing.T, f []string) (string, error) {
	args := map[string]string{}
	var plain []string
	for _, a := range f[1:] {
		if k, v, ok := strings.Cut(a, "="); ok {
			args[k] = v
		} else {
			plain = append(plain, a)
		}
	}
	arg := func(i int) string {
		if i < len(plain) {
			return plain[i]
		}
		return ""
	}
	var next replica.Record
	var err error
	switch f[0] {
	case "record":
		var members []replica.Member
		for _, id := range strings.Split(args["members"], ",") {
			members = append(members, replica.Member{ReplicaID: id, Node: "n-" + id})
		}
		next = NewRecord("v", members, replica.Chain{SizeBytes: 1 << 20, Layers: []replica.LayerID{"h1"}}, s.now)
	case "see":
		s.see(t, arg(0), args)
		return "", nil
	case "unsee":
		s.seen = slices.DeleteFunc(s.seen, func(x Sighting) bool { return x.ReplicaID == arg(0) })
		return "", nil
	case "keep":
		for i := range s.seen {
			s.seen[i].Status.Record = s.rec
		}
		return "", nil
	case "claim":
		next, err = Claim(s.rec, s.now)
	case "open":
		next, err = Opened(s.rec, Claimant{arg(0), arg(1)}, s.seen, s.now)
	case "fail":
		next, err = FailMember(s.rec, arg(0), strings.Join(plain[1:], " "), s.now)
	case "salvage":
		next = Salvage(s.rec, s.now)
	case "release":
		next = Released(s.rec, s.now)
	case "begin":
		next, err = BeginChange(s.rec, s.changeOf(plain, args), s.now)
	case "commit":
		next, err = CommitChange(s.rec, s.now)
	case "abort":
		next = AbortChange(s.rec, s.now)
	case "rollforward":
		todo, err := RollForward(s.rec, chainOf(s, arg(0)))
		return map[Next]string{NextNothing: "nothing", NextChange: "change", NextCommit: "commit"}[todo], err
	case "resume":
		w, err := Resume(s.seen, Claimant{arg(0), arg(1)})
		return fmt.Sprintf("epoch %d session %d", w.Epoch, w.Session), err
	case "check":
		next, err = s.check(args, slices.Contains(plain, "gone"))
	default:
		t.Fatalf("no step %q", f[0])
	}
	if err != nil {
		return "", err
	}
	s.rec = next
	return describe(next), nil
}

func (s *story) see(t *testing.T, id string, args map[string]string) {
	number := func(k string) uint64 {
		n, err := strconv.ParseUint(args[k], 10, 64)
		if err != nil && args[k] != "" {
			t.Fatal(err)
		}
		return n
	}
	st := replica.Status{Writer: replica.Writer{Epoch: number("epoch"), Session: number("session")}, BootID: args["boot"], Failed: args["failed"], Record: s.rec}
	if args["gen"] != "" {
		st.Record.Generation = number("gen")
	}
	if args["keepepoch"] != "" {
		st.Record.Epoch = number("keepepoch")
	}
	st.Chain = s.rec.Chain
	s.seen = slices.DeleteFunc(s.seen, func(x Sighting) bool { return x.ReplicaID == id })
	s.seen = append(s.seen, Sighting{ReplicaID: id, Status: st})
}

// check is what an opener does before it claims.
func (s *story) check(args map[string]string, gone bool) (replica.Record, error) {
	if err := CheckCatalogue(s.rec, s.seen); err != nil {
		return s.rec, err
	}
	rec, err := CheckCopies(s.rec, s.seen, s.now)
	if err != nil {
		return rec, err
	}
	if NeedsSalvage(rec) {
		return rec, ErrNeedsSalvage
	}
	return CheckIncarnations(rec, s.seen, Attachment{GuestsGone: gone, Reopener: Claimant{args["node"], args["boot"]}}, s.now)
}

func (s *story) changeOf(plain []string, args map[string]string) replica.Change {
	from, id := s.rec.Chain, replica.LayerID(args["head"])
	meta := replica.SnapshotMeta{Name: "s"}
	switch plain[0] {
	case "snapshot":
		return snapshotChange(from, id, meta)
	case "expand":
		n, _ := strconv.ParseInt(args["size"], 10, 64)
		return expandChange(from, id, n, meta)
	case "revert":
		var path []replica.LayerID
		for _, l := range strings.Split(args["to"], ",") {
			path = append(path, replica.LayerID(l))
		}
		return revertChange(from, id, path)
	default:
		return mergeChange(from, replica.Merge{Lower: replica.LayerID(args["lower"]), Upper: replica.LayerID(args["upper"]), Into: replica.LayerID(args["into"])})
	}
}

// chainOf is a chain a copy may have: "old", "new", or something else.
func chainOf(s *story, which string) replica.Chain {
	switch {
	case which == "old":
		return s.rec.Chain
	case which == "new" && s.rec.Pending != nil:
		return s.rec.Pending.Chain
	}
	return replica.Chain{Generation: 77, Layers: []replica.LayerID{"x"}}
}

func describe(r replica.Record) string {
	var b strings.Builder
	fmt.Fprintf(&b, "epoch %d opened %d gen %d", r.Epoch, r.Opened, r.Generation)
	if r.WriterNode != "" {
		fmt.Fprintf(&b, " writer %s/%s", r.WriterNode, r.WriterBoot)
	}
	for _, m := range r.Members {
		mark := "-"
		if m.InSync {
			mark = "+"
		}
		fmt.Fprintf(&b, " %s%s", mark, m.ReplicaID)
		if m.Incarnation != "" {
			fmt.Fprintf(&b, "@%s", m.Incarnation)
		}
		if m.Failed != "" {
			fmt.Fprintf(&b, "(%s)", m.Failed)
		}
	}
	fmt.Fprintf(&b, " chain %d:%v", r.Chain.Generation, r.Chain.Layers)
	if r.Pending != nil {
		fmt.Fprintf(&b, " pending %s %d:%v", r.Pending.Verb, r.Pending.Chain.Generation, r.Pending.Chain.Layers)
	}
	return b.String()
}

// sentinel names the error value that err is.
func sentinel(err error) string {
	for name, target := range map[string]error{"ErrStaleReplica": ErrStaleReplica, "ErrStaleCatalogue": ErrStaleCatalogue, "ErrNoMember": ErrNoMember, "ErrLost": ErrLost,
		"ErrNoResume": ErrNoResume, "ErrPending": ErrPending, "ErrChain": replica.ErrChain, "ErrNeedsSalvage": ErrNeedsSalvage} {
		if errors.Is(err, target) {
			return name
		}
	}
	return "an unknown error"
}

// TestRulesLeaveTheirArgument: no rule changes the record it was given.
func TestRulesLeaveTheirArgument(t *testing.T) {
	now := time.Unix(1e9, 0)
	rec := NewRecord("v", []replica.Member{{ReplicaID: "a"}, {ReplicaID: "b"}}, replica.Chain{SizeBytes: 1 << 20, Layers: []replica.LayerID{"h"}}, now)
	rec.Opened, rec.Epoch, rec.WriterNode = 2, 2, "n"
	rec.Members[0].Incarnation, rec.Members[1].Incarnation = "b1", "b1"
	seen := []Sighting{{"a", replica.Status{Writer: replica.Writer{Epoch: 1}, BootID: "b2"}}, {"b", replica.Status{Writer: replica.Writer{Epoch: 2}, BootID: "b1"}}}
	before := describe(rec)
	_, errs := Claim(rec, now)
	for _, f := range []func() (replica.Record, error){
		func() (replica.Record, error) { return Opened(rec, Claimant{"x", "y"}, seen[:1], now) },
		func() (replica.Record, error) { return FailMember(rec, "a", "why", now) },
		func() (replica.Record, error) { return CheckCopies(rec, seen, now) },
		func() (replica.Record, error) { return CheckIncarnations(rec, seen, Attachment{}, now) },
		func() (replica.Record, error) {
			return BeginChange(rec, snapshotChange(rec.Chain, "n", replica.SnapshotMeta{}), now)
		},
		func() (replica.Record, error) { return Salvage(rec, now), nil },
		func() (replica.Record, error) { return Released(rec, now), nil },
		func() (replica.Record, error) { return Retaken(rec, Claimant{"x", "y"}, now), nil },
	} {
		next, err := f()
		errs = errors.Join(errs, err)
		if next.Generation <= rec.Generation {
			t.Errorf("generation went from %d to %d", rec.Generation, next.Generation)
		}
		for i := range next.Members {
			next.Members[i].Failed = "scribbled"
		}
		if next.Chain.Layers = append(next.Chain.Layers, "x"); describe(rec) != before {
			t.Fatalf("a rule changed its argument to %s", describe(rec))
		}
	}
	if errs != nil {
		t.Error(errs)
	}
}

// TestSetNeverEmpty: whatever fails, in whatever order, somebody stays in sync.
func TestSetNeverEmpty(t *testing.T) {
	now := time.Unix(1e9, 0)
	for _, order := range [][]string{{"a", "b", "c"}, {"c", "a", "b"}, {"b", "b", "a", "c", "a"}} {
		rec := NewRecord("v", []replica.Member{{ReplicaID: "a"}, {ReplicaID: "b"}, {ReplicaID: "c"}}, replica.Chain{SizeBytes: 1 << 20, Layers: []replica.LayerID{"h"}}, now)
		for _, id := range order {
			var err error
			if rec, err = FailMember(rec, id, "why", now); err != nil {
				t.Fatal(err)
			}
			if len(inSync(rec)) == 0 {
				t.Fatalf("%v: nobody is in sync", order)
			}
		}
		if !NeedsSalvage(rec) {
			t.Errorf("%v: all failed and no salvage is needed: %s", order, describe(rec))
		}
	}
}

// TestChangeRules: what may not follow a chain.
func TestChangeRules(t *testing.T) {
	now := time.Unix(1e9, 0)
	rec := NewRecord("v", []replica.Member{{ReplicaID: "a"}}, replica.Chain{SizeBytes: 1 << 20, Layers: []replica.LayerID{"h", "s2", "s1"}}, now)
	good := snapshotChange(rec.Chain, "n", replica.SnapshotMeta{Name: "s3"})
	for what, edit := range map[string]func(*replica.Change){
		"a generation too many":      func(c *replica.Change) { c.Chain.Generation++ },
		"the same generation":        func(c *replica.Change) { c.Chain.Generation-- },
		"another base":               func(c *replica.Change) { c.Chain.Base = "other" },
		"no layers":                  func(c *replica.Change) { c.Chain.Layers = nil },
		"a smaller size":             func(c *replica.Change) { c.Chain.SizeBytes -= block.UnitBytes },
		"a size that is no unit":     func(c *replica.Change) { c.Verb = replica.VerbExpand; c.Chain.SizeBytes++ },
		"a snapshot that grows":      func(c *replica.Change) { c.Chain.SizeBytes += block.UnitBytes },
		"an expansion that does not": func(c *replica.Change) { c.Verb = replica.VerbExpand },
		"an id in use":               func(c *replica.Change) { c.Chain.Layers[0] = "s2" },
		"a lost layer":               func(c *replica.Change) { c.Chain.Layers = c.Chain.Layers[:3] },
		"no snapshot":                func(c *replica.Change) { c.Snapshot = nil },
		"an unknown verb":            func(c *replica.Change) { c.Verb = "shrink" },
		"a revert to the head":       func(c *replica.Change) { c.Verb = replica.VerbRevert },
		"a merge of nothing":         func(c *replica.Change) { c.Verb = replica.VerbMerge },
		"a merge of others": func(c *replica.Change) {
			*c = mergeChange(rec.Chain, replica.Merge{Lower: "s1", Upper: "s2", Into: "m"})
			c.Chain.Layers = rec.Chain.Layers
		},
	} {
		c := good
		c.Chain.Layers = slices.Clone(good.Chain.Layers)
		edit(&c)
		if _, err := BeginChange(rec, c, now); !errors.Is(err, replica.ErrChain) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, c := range []replica.Change{good, expandChange(rec.Chain, "n", 2<<20, replica.SnapshotMeta{}), revertChange(rec.Chain, "n", []replica.LayerID{"s1"}),
		mergeChange(rec.Chain, replica.Merge{Lower: "s1", Upper: "s2", Into: "m"}), mergeChange(rec.Chain, replica.Merge{Lower: "x1", Upper: "x2", Into: "m"})} {
		next, err := BeginChange(rec, c, now)
		if err != nil {
			t.Errorf("%s: %v", c.Verb, err)
			continue
		}
		if again, err := BeginChange(next, c, now); err != nil || again.Generation != next.Generation {
			t.Errorf("%s again: %v", c.Verb, err)
		}
		if _, err := BeginChange(next, snapshotChange(rec.Chain, "q", replica.SnapshotMeta{}), now); !errors.Is(err, ErrPending) {
			t.Errorf("another change while %s is pending: %v", c.Verb, err)
		}
	}
}
