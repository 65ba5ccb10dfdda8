package catalog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// furnished is a catalogue with a few records, put in an order that is not that of their keys.
func furnished(t testing.TB) *Mem {
	t.Helper()
	m := NewMem()
	put := func(k Key, v any) {
		t.Helper()
		if _, err := Write(t.Context(), m, k, v, 0); err != nil {
			t.Fatal(err)
		}
	}
	put(VolumeKey(Wanted, "v"), VolumeWanted{Name: "v", ID: "1", Labels: map[string]string{"a": "<&>"}})
	put(ClusterKey(), Cluster{ID: "c1", Format: Format})
	put(MembershipKey("1"), map[string]any{"volumeID": "1", "epoch": 7, "later": true})
	put(OperationKey("v", "9"), Operation{ID: "9", Volume: "v", Verb: VerbRevert, State: OperationPending})
	put(ImageKey(Wanted, "b"), ImageWanted{Name: "b"})
	put(ImageKey(Wanted, "a"), ImageWanted{Name: "a"})
	return m
}

func dump(t testing.TB, m *Mem) string {
	t.Helper()
	es, _, err := m.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, e := range es {
		fmt.Fprintf(&b, "%s %s\n", e.Key, e.Value)
	}
	return b.String()
}

// TestBackup: what is restored is what was there, byte for byte, but operations, which may have been carried out since.
func TestBackup(t *testing.T) {
	m := furnished(t)
	var doc bytes.Buffer
	did, err := Export(t.Context(), m, &doc)
	if err != nil || did.ClusterID != "c1" || did.Records != 6 || did.Revision != 6 || did.Time.IsZero() {
		t.Fatalf("%+v %v", did, err)
	}
	if n := strings.Count(doc.String(), "\n"); n != 8 {
		t.Errorf("%d lines, want one a record:\n%s", n, doc.String())
	}
	into := NewMem()
	did, err = Restore(t.Context(), into, bytes.NewReader(doc.Bytes()))
	if err != nil || did.Records != 5 || did.Operations != 1 || did.Revision != 6 {
		t.Fatalf("%+v %v", did, err)
	}
	op, _ := m.Get(t.Context(), OperationKey("v", "9"))
	if err := m.Delete(t.Context(), op.Key, op.Rev); err != nil {
		t.Fatal(err)
	}
	if got, want := dump(t, into), dump(t, m); got != want {
		t.Errorf("restored\n%swant\n%s", got, want)
	}
	a, _ := into.Get(t.Context(), ImageKey(Wanted, "a"))
	b, _ := into.Get(t.Context(), ImageKey(Wanted, "b"))
	c, _ := into.Get(t.Context(), ClusterKey())
	if c.Rev != 1 || a.Rev < b.Rev {
		t.Errorf("order: cluster %d, a %d, b %d", c.Rev, a.Rev, b.Rev)
	}
	if _, err := Restore(t.Context(), into, bytes.NewReader(doc.Bytes())); err != nil {
		t.Errorf("restored again: %v", err)
	}
}

// failing fails the nth Put.
type failing struct {
	*Mem
	left int
}

func (f *failing) Put(ctx context.Context, k Key, v []byte, was Rev) (Rev, error) {
	if f.left--; f.left < 0 {
		return 0, ErrUnreachable
	}
	return f.Mem.Put(ctx, k, v, was)
}

// TestRestoreInterrupted: stopped after any record, a restoration goes on when it is repeated.
func TestRestoreInterrupted(t *testing.T) {
	var doc bytes.Buffer
	if _, err := Export(t.Context(), furnished(t), &doc); err != nil {
		t.Fatal(err)
	}
	whole := NewMem()
	if _, err := Restore(t.Context(), whole, bytes.NewReader(doc.Bytes())); err != nil {
		t.Fatal(err)
	}
	for n := range 5 {
		into := &failing{NewMem(), n}
		if _, err := Restore(t.Context(), into, bytes.NewReader(doc.Bytes())); !errors.Is(err, ErrUnreachable) {
			t.Fatalf("after %d: %v", n, err)
		}
		if _, err := into.Get(t.Context(), ClusterKey()); n > 0 && err != nil {
			t.Errorf("after %d records: no cluster record", n)
		}
		if _, err := Restore(t.Context(), into.Mem, bytes.NewReader(doc.Bytes())); err != nil || dump(t, into.Mem) != dump(t, whole) {
			t.Errorf("after %d: %v\n%s", n, err, dump(t, into.Mem))
		}
	}
}

// TestRestoreRefused: a catalogue in use is not touched, and only a whole backup is one.
func TestRestoreRefused(t *testing.T) {
	var doc bytes.Buffer
	if _, err := Export(t.Context(), furnished(t), &doc); err != nil {
		t.Fatal(err)
	}
	text := doc.String()
	for name, c := range map[string]struct {
		text string
		into *Mem
		want error
	}{
		"another catalogue": {text, func() *Mem {
			m := NewMem()
			_, _ = Write(t.Context(), m, ClusterKey(), Cluster{ID: "other"}, 0)
			return m
		}(), ErrNotEmpty},
		"one record more": {text, func() *Mem { m := NewMem(); _, _ = Write(t.Context(), m, SettingKey("x"), Setting{}, 0); return m }(), ErrNotEmpty},
		"nothing":         {"", NewMem(), ErrBackup},
		"another file":    {`{"name":"x"}`, NewMem(), ErrBackup},
		"a line less":     {text[:strings.LastIndex(text, `,{"key"`)] + `],"count":6}`, NewMem(), ErrBackup},
		"broken off":      {text[:len(text)-20], NewMem(), ErrBackup},
		"a bad key":       {strings.Replace(text, `"image/wanted/a"`, `"image/wanted/"`, 1), NewMem(), ErrBackup},
		"twice":           {strings.Replace(text, `"image/wanted/a"`, `"image/wanted/b"`, 1), NewMem(), ErrBackup},
		"no cluster":      {strings.Replace(text, `"cluster/wanted/cluster"`, `"cluster/wanted/x"`, 1), NewMem(), ErrBackup},
		"newer document":  {strings.Replace(text, `Backup":1`, `Backup":2`, 1), NewMem(), ErrNewer},
		"newer records":   {strings.Replace(text, `"format":1`, `"format":9`, 1), NewMem(), ErrNewer},
	} {
		before := dump(t, c.into)
		if _, err := Restore(t.Context(), c.into, strings.NewReader(c.text)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if got := dump(t, c.into); got != before {
			t.Errorf("%s: changed to\n%s", name, got)
		}
	}
	if _, err := Export(t.Context(), NewMem(), &doc); !errors.Is(err, ErrNotFound) {
		t.Errorf("backup of nothing: %v", err)
	}
}

// FuzzRestore: whatever is read, either nothing is put or a catalogue with a cluster record.
func FuzzRestore(f *testing.F) {
	var doc bytes.Buffer
	if _, err := Export(f.Context(), furnished(f), &doc); err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{doc.String(), doc.String()[:200], `{"ashlarCatalogueBackup":1,"clusterID":"x","records":[],"count":0}`, `[`, ``} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		m := NewMem()
		_, err := Restore(t.Context(), m, bytes.NewReader(text))
		if _, gerr := m.Get(t.Context(), ClusterKey()); (err == nil) != (gerr == nil) {
			t.Errorf("%v, %v", err, gerr)
		}
	})
}

// TestRestoreHeld: what was there only while somebody held it is not restored, where nobody does.
func TestRestoreHeld(t *testing.T) {
	m := furnished(t)
	for _, k := range []Key{AliveKey("n1"), LeaderKey()} {
		if _, err := Write(t.Context(), m, k, Alive{Node: "n1"}, 0); err != nil {
			t.Fatal(err)
		}
	}
	var doc bytes.Buffer
	if did, err := Export(t.Context(), m, &doc); err != nil || did.Records != 8 {
		t.Fatalf("%+v %v", did, err)
	}
	into := NewMem()
	for range 2 { // it can be repeated
		if did, err := Restore(t.Context(), into, bytes.NewReader(doc.Bytes())); err != nil || did.Records != 5 || did.Operations != 1 {
			t.Fatalf("%+v %v", did, err)
		}
	}
	if got := dump(t, into); strings.Contains(got, "alive/") || strings.Contains(got, "leader/") {
		t.Errorf("restored:\n%s", got)
	}
}
