package layer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// steps returns how much a loop does: ASHLAR_STEPS times the default, which is in units of a second or so.
func steps(t testing.TB, n int) int {
	t.Helper()
	factor := 1.0
	if raceEnabled {
		factor = 0.5 // ten times as slow; it looks for races, of which another seed has no more
	}
	if s := os.Getenv("ASHLAR_STEPS"); s != "" {
		f, err := strconv.ParseFloat(s, 64)
		if err != nil {
			t.Fatalf("ASHLAR_STEPS=%q: %v", s, err)
		}
		factor = f
	}
	return max(1, int(float64(n)*factor))
}

const sectors = unitBytes / 512

// vec is what a unit holds, sector by sector: the number of the write that each came from; 0 for zeroes, torn for bytes that nobody wrote.
type vec [sectors]uint64

const torn = ^uint64(0)

// fillUnit writes the bytes of write id to a unit.
func fillUnit(p []byte, unit int64, id uint64) {
	for s := range sectors {
		for w := 0; w < 512; w += 16 {
			binary.LittleEndian.PutUint64(p[s*512+w:], id)
			binary.LittleEndian.PutUint64(p[s*512+w+8:], uint64(unit)<<20|uint64(s)<<9|uint64(w))
		}
	}
}

// readVec is the reverse of fillUnit.
func readVec(p []byte, unit int64) (v vec) {
	for s := range sectors {
		id := binary.LittleEndian.Uint64(p[s*512:])
		for w := 0; w < 512; w += 16 {
			tag := uint64(unit)<<20 | uint64(s)<<9 | uint64(w)
			if id == 0 {
				tag = 0
			}
			if binary.LittleEndian.Uint64(p[s*512+w:]) != id || binary.LittleEndian.Uint64(p[s*512+w+8:]) != tag {
				id = torn
				break
			}
		}
		v[s] = id
	}
	return v
}

func same(id uint64) (v vec) {
	for i := range v {
		v[i] = id
	}
	return v
}

// unitModel is what one unit may hold: every version it was given, of which the one at acked is acknowledged, and the one at floor is on the medium for
// certain, or a later one is.
type unitModel struct {
	versions     []vec
	acked, floor int
}

// allows tells whether each sector of got is one of the versions from i on.
func (u *unitModel) allows(got vec, i int) bool {
	for s, id := range got {
		if !slices.ContainsFunc(u.versions[i:], func(v vec) bool { return v[s] == id }) {
			return false
		}
	}
	return true
}

// snapshot is a sealed chain and what it must read as for ever.
type snapshot struct {
	chain   []string
	content map[int64]vec
}

// world is a disk with a stack of layers on it, and what must be true of it. It is the model of the model check and of the crash tests.
type world struct {
	t     testing.TB
	mem   *disk.Mem
	rand  *rand.Rand
	boot  uint64
	lim   limits
	depth int // crashes that led here
	hist  []string

	stack  *Stack
	chain  []string // head first
	base   string
	snaps  []snapshot
	files  int
	nextID uint64

	mu    sync.Mutex // guards model, for histories with several writers
	model map[int64]*unitModel

	full bool // the disk may be full
}

// hot are the units a history plays with: the beginning, a border of regions, and one of map pages.
func hotUnits() []int64 {
	var list []int64
	for u := range int64(10) {
		list = append(list, u)
	}
	for u := range int64(6) {
		list = append(list, regionUnits-3+u)
	}
	for u := range int64(8) {
		list = append(list, pageUnits-4+u)
	}
	return list
}

const worldUnits = pageUnits + 64

func (w *world) options() Options {
	var b BootID
	binary.LittleEndian.PutUint64(b[:], w.boot)
	return Options{BootID: b, limits: w.lim}
}

func (w *world) fatalf(format string, args ...any) {
	w.t.Helper()
	w.t.Log(w.hist[0])
	for _, h := range w.hist[max(1, len(w.hist)-60):] {
		w.t.Log(h)
	}
	w.t.Fatalf(format, args...)
}

func (w *world) must(err error, what string) {
	w.t.Helper()
	if err != nil {
		w.fatalf("%s: %v", what, err)
	}
}

func (w *world) note(format string, args ...any) {
	w.hist = append(w.hist, fmt.Sprintf(format, args...))
}

// newWorld makes a disk with an image and a volume on it.
func newWorld(t testing.TB, seed uint64, mo disk.MemOptions, lim limits) *world {
	w := &world{
		t: t, mem: disk.NewMem(mo), rand: rand.New(rand.NewPCG(seed, 7)), boot: 1, lim: lim, nextID: 1,
		model: map[int64]*unitModel{},
	}
	m := testMeta()
	m.Kind, m.State, m.Image = KindImage, StateBuilding, &Image{Name: "golden", ID: "i1"}
	l, err := Create(w.mem, "base", m, regionUnits*unitBytes, w.options())
	w.must(err, "create base")
	s, err := NewStack([]*Layer{l}, StackOptions{})
	w.must(err, "stack base")
	for _, u := range hotUnits() {
		w.model[u] = &unitModel{versions: []vec{same(0)}}
		if u < regionUnits && u%3 != 0 {
			b := make([]byte, unitBytes)
			fillUnit(b, u, w.nextID)
			_, err := s.WriteAt(b, u*unitBytes)
			w.must(err, "fill base")
			w.model[u].versions[0] = same(w.nextID)
			w.nextID++
		}
	}
	w.must(errors.Join(s.Seal(nil), s.Close(), l.Settle(context.Background()), l.Close()), "settle base")
	w.base = "base"
	w.chain = []string{w.create(l.ID()), w.base}
	w.open()
	return w
}

// create makes a new head's file.
func (w *world) create(parent ID) string {
	w.files++
	name := fmt.Sprintf("d%d.f%d", w.depth, w.files)
	m := testMeta()
	m.Parent = parent
	l, err := Create(w.mem, name, m, worldUnits*unitBytes, w.options())
	w.must(err, "create head")
	w.must(l.Close(), "close new head")
	return name
}

// openLayers opens files; of snapshot chains too.
func (w *world) openLayers(names []string, o Options) ([]*Layer, error) {
	var layers []*Layer
	for _, name := range names {
		l, err := Open(w.mem, name, o)
		if err != nil {
			for _, l := range layers {
				l.Close()
			}
			return nil, err
		}
		layers = append(layers, l)
	}
	return layers, nil
}

// open opens the chain for use.
func (w *world) open() {
	w.t.Helper()
	w.must(w.tryOpen(w.options()), "open "+fmt.Sprint(w.chain))
}

func (w *world) tryOpen(o Options) error {
	layers, err := w.openLayers(w.chain, o)
	if err != nil {
		return err
	}
	w.stack, err = NewStack(layers, StackOptions{})
	if err != nil {
		return err
	}
	for _, l := range layers {
		l.Close()
	}
	return nil
}

// content reads all hot units of a device.
func (w *world) content(d block.Device) map[int64]vec {
	w.t.Helper()
	got := map[int64]vec{}
	b := make([]byte, unitBytes)
	for _, u := range hotUnits() {
		if _, err := d.ReadAt(b, u*unitBytes); err != nil {
			w.fatalf("read unit %d: %v", u, err)
		}
		got[u] = readVec(b, u)
	}
	return got
}

// check compares the stack with the model: from(u) is the index of the oldest version each unit may show. What is found becomes the model, on the medium
// for certain if durable is set.
func (w *world) check(when string, from func(*unitModel) int, durable bool) {
	w.t.Helper()
	for u, got := range w.content(w.stack) {
		m := w.model[u]
		if !m.allows(got, from(m)) {
			w.fatalf("%s: unit %d is %x, allowed from %d on: %x (acked %d, floor %d)", when, u, got, from(m), m.versions, m.acked, m.floor)
		}
		if durable {
			m.versions, m.acked, m.floor = []vec{got}, 0, 0
		}
	}
}

func fromFloor(m *unitModel) int { return m.floor }
func fromAcked(m *unitModel) int { return m.acked }

// checkSnapshots compares every snapshot with what it was.
func (w *world) checkSnapshots(when string) {
	w.t.Helper()
	for _, s := range w.snaps {
		if len(s.chain) == 0 {
			continue
		}
		var layers []*Layer
		for _, name := range s.chain {
			l, err := Open(w.mem, name, Options{ReadOnly: true, BootID: w.options().BootID})
			w.must(err, when+": open snapshot")
			layers = append(layers, l)
		}
		d, err := NewStack(layers, StackOptions{})
		w.must(err, when+": stack snapshot")
		for u, got := range w.content(d) {
			if got != s.content[u] {
				w.fatalf("%s: snapshot %v changed: unit %d is %x, was %x", when, s.chain, u, got, s.content[u])
			}
		}
		w.must(d.Close(), "close snapshot")
		for _, l := range layers {
			w.must(l.Close(), "close snapshot's layer")
		}
	}
}

// pick returns a run of hot units.
func (w *world) pick() (unit, n int64) {
	hot := hotUnits()
	i := w.rand.IntN(len(hot))
	n = 1
	for limit := 1 + w.rand.Int64N(1+w.rand.Int64N(8)); n < limit && i+int(n) < len(hot) && hot[i+int(n)] == hot[i]+n; n++ {
	}
	return hot[i], n
}

// begin adds a version to units, and returns what acknowledges it.
func (w *world) begin(unit, n int64, id uint64) func() {
	w.mu.Lock()
	defer w.mu.Unlock()
	at := map[int64]int{}
	for u := unit; u < unit+n; u++ {
		w.model[u].versions = append(w.model[u].versions, same(id))
		at[u] = len(w.model[u].versions) - 1
	}
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		for u, i := range at {
			w.model[u].acked = i
		}
	}
}

// write, zero and flush do what they say and keep the model; an error is returned when it is one of those the test reckons with.
func (w *world) write(unit, n int64) error {
	w.mu.Lock()
	w.nextID++
	id := w.nextID
	w.mu.Unlock()
	b := make([]byte, n*unitBytes)
	for i := range n {
		fillUnit(b[i*unitBytes:(i+1)*unitBytes], unit+i, id)
	}
	ack := w.begin(unit, n, id)
	_, err := w.stack.WriteAt(b, unit*unitBytes)
	if err == nil {
		ack()
	}
	return err
}

func (w *world) zero(unit, n int64) error {
	ack := w.begin(unit, n, 0)
	err := w.stack.Zero(unit*unitBytes, n*unitBytes)
	if err == nil {
		ack()
	}
	return err
}

func (w *world) flush() error {
	promised := w.promise()
	err := w.stack.Flush()
	if err == nil {
		promised()
	}
	return err
}

// promise notes what is acknowledged now, and returns what says that it is on the medium.
func (w *world) promise() func() {
	w.mu.Lock()
	defer w.mu.Unlock()
	at := map[int64]int{}
	for u, m := range w.model {
		at[u] = m.acked
	}
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		for u, i := range at {
			w.model[u].floor = max(w.model[u].floor, i)
		}
	}
}

// snap seals the head under a new one.
func (w *world) snap() error {
	head := w.stack.Layers()[0]
	name := w.create(head.ID())
	if w.rand.IntN(2) == 0 {
		if err := w.stack.FlushAhead(context.Background()); err != nil {
			return err
		}
	}
	promised := w.promise()
	if err := w.stack.Seal(sealMeta); err != nil {
		return err
	}
	promised()
	fresh, err := Open(w.mem, name, w.options())
	if err != nil {
		return err
	}
	w.must(w.stack.PushHead(fresh), "push head")
	w.must(fresh.Close(), "close")
	w.sealedAs(name)
	return nil
}

func sealMeta(m *Meta) { m.Snapshot = &Snapshot{Name: "s", Created: time.Unix(1e9, 0).UTC()} }

// sealedAs notes that the head has become a snapshot, with what it holds now, below the new head.
func (w *world) sealedAs(head string) {
	w.snaps = append(w.snaps, snapshot{chain: slices.Clone(w.chain), content: w.content(w.stack)})
	w.chain = append([]string{head}, w.chain...)
}

// remove marks the snapshot below the head removed, and prunes it.
func (w *world) prune() error {
	if len(w.chain) < 3 {
		return nil
	}
	l := w.stack.Layers()[1]
	if !l.Meta().Snapshot.Removed { // the header knows: a crash may have lost that it was said
		w.forget(w.chain[1])
		if err := l.SetMeta(func(m *Meta) { m.Snapshot.Removed = true }); err != nil {
			return err
		}
	}
	if err := l.Settle(context.Background()); err != nil && !errors.Is(err, block.ErrNoSpace) {
		return err
	}
	_, err := w.stack.Prune(context.Background(), l, nil)
	return err
}

// forget drops the snapshot whose top is name.
func (w *world) forget(name string) {
	w.snaps = slices.DeleteFunc(w.snaps, func(s snapshot) bool { return s.chain[0] == name })
}

// merge makes one layer of two or more neighbours, all but the uppermost of which are removed first.
func (w *world) merge() error {
	if len(w.chain) < 4 {
		return nil
	}
	i := 1 + w.rand.IntN(len(w.chain)-3)
	n := 2 + w.rand.IntN(len(w.chain)-2-i)
	layers := slices.Clone(w.stack.Layers()[i : i+n])
	old := slices.Clone(w.chain[i : i+n])
	for _, name := range old[1:] {
		w.forget(name)
	}
	w.files++
	name := fmt.Sprintf("d%d.m%d", w.depth, w.files)
	m := testMeta()
	m.Snapshot = layers[0].Meta().Snapshot
	merged, err := Merge(context.Background(), w.mem, name, MergeSpec{Layers: layers, Meta: m, Options: w.options()})
	if err != nil {
		return err
	}
	w.must(w.stack.ReplaceMerged(layers, merged), "replace merged")
	w.must(merged.Close(), "close")
	swap := func(chain []string) []string {
		at := slices.Index(chain, old[0])
		if at < 0 {
			return chain
		}
		return slices.Insert(slices.Delete(slices.Clone(chain), at, at+n), at, name)
	}
	w.chain = swap(w.chain)
	for k := range w.snaps {
		w.snaps[k].chain = swap(w.snaps[k].chain)
	}
	for _, name := range old {
		w.must(w.mem.Remove(name), "remove merged layer")
	}
	return w.mem.SyncDir(".")
}

// revert goes back to a snapshot: a new head on its chain.
func (w *world) revert() error {
	if len(w.snaps) == 0 {
		return nil
	}
	k := w.rand.IntN(len(w.snaps))
	s := w.snaps[k]
	w.must(w.stack.Close(), "close")
	top, _, err := Inspect(w.mem, s.chain[0])
	w.must(err, "inspect")
	name := w.create(top.ID)
	// From here on the new chain holds.
	dropped := w.chain
	w.chain = append([]string{name}, s.chain...)
	w.mu.Lock()
	for u, v := range s.content {
		w.model[u] = &unitModel{versions: []vec{v}}
	}
	w.mu.Unlock()
	w.snaps = slices.DeleteFunc(w.snaps, func(o snapshot) bool { return !slices.Contains(s.chain, o.chain[0]) })
	for _, old := range dropped {
		if !slices.Contains(w.chain, old) {
			w.must(w.mem.Remove(old), "remove dropped layer")
		}
	}
	w.open()
	return nil
}

// step does one random thing. It returns the error of a write or of a verb, for the caller to judge.
func (w *world) step() error {
	w.t.Helper()
	unit, n := w.pick()
	switch k := w.rand.IntN(100); {
	case k < 48:
		w.note("write %d+%d", unit, n)
		return w.write(unit, n)
	case k < 62:
		w.note("zero %d+%d", unit, n)
		return w.zero(unit, n)
	case k < 80:
		w.note("flush")
		return w.flush()
	case k < 84:
		w.note("flush ahead")
		promised := w.promise()
		err := w.stack.FlushAhead(context.Background())
		if err == nil {
			promised()
		}
		return err
	case k < 88 && len(w.chain) < 6:
		w.note("snapshot")
		return w.snap()
	case k < 90:
		w.note("prune")
		return w.prune()
	case k < 92:
		w.note("merge")
		return w.merge()
	case k < 94:
		w.note("settle")
		if len(w.chain) < 3 {
			return nil
		}
		return w.stack.Layers()[1].Settle(context.Background())
	case k < 95:
		w.note("revert")
		return w.revert()
	case k < 97:
		w.note("reopen")
		w.must(w.stack.Close(), "close")
		w.open()
	default:
		w.note("check")
		w.check("live", fromAcked, false)
		w.checkSnapshots("live")
		w.checkCounts("live")
	}
	return nil
}
