package layer

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want one that is %q", err, want)
	}
}

// put writes n units of version id.
func put(t testing.TB, s *Stack, unit, n int64, id uint64) {
	t.Helper()
	b := make([]byte, n*unitBytes)
	for i := range n {
		fillUnit(b[i*unitBytes:(i+1)*unitBytes], unit+i, id)
	}
	_, err := s.WriteAt(b, unit*unitBytes)
	must(t, err)
}

// wantUnit checks which version a unit holds.
func wantUnit(t testing.TB, s *Stack, unit int64, id uint64) {
	t.Helper()
	b := make([]byte, unitBytes)
	_, err := s.ReadAt(b, unit*unitBytes)
	must(t, err)
	if got := readVec(b, unit); got != same(id) {
		t.Fatalf("unit %d is %x, want %x", unit, got, id)
	}
}

// sealOver seals the stack's head and puts a new one, of the given size, on top.
func sealOver(t testing.TB, fsys disk.FS, s *Stack, n int, sizeBytes int64, lim limits) {
	t.Helper()
	must(t, s.Seal(sealMeta))
	h := newHead(t, fsys, n, sizeBytes, lim)
	must(t, s.PushHead(h))
	must(t, h.Close())
}

func TestIDs(t *testing.T) {
	id := NewID()
	if again, err := ParseID(string(id)); err != nil || again != id || id == NewID() {
		t.Errorf("%q: %q %v", id, again, err)
	}
	for _, bad := range []string{"", "x", strings.Repeat("A", 32), strings.Repeat("a", 31), strings.Repeat("a", 34), "../../../../../../../../etc/passwd"} {
		if _, err := ParseID(bad); err == nil {
			t.Errorf("%q is taken for an id", bad)
		}
	}
}

func TestCreateRefuses(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	o := Options{BootID: testBoot}
	for _, n := range []int64{0, -4096, 4095, 4097, MaxSizeBytes + 4096} {
		_, err := Create(mem, "x", testMeta(), n, o)
		wantErr(t, err, block.ErrRange)
	}
	_, err := Create(mem, "x", testMeta(), 4096, Options{})
	wantErr(t, err, ErrState)
	m := testMeta()
	m.State = StateSealed
	_, err = Create(mem, "x", m, 4096, o)
	wantErr(t, err, ErrState)
	m = testMeta()
	m.ID = "nonsense"
	_, err = Create(mem, "x", m, 4096, o)
	wantErr(t, err, block.ErrCorrupt)
	l, err := Create(mem, "x", testMeta(), 4096, o)
	must(t, err)
	_, err = Create(mem, "x", testMeta(), 4096, o)
	wantErr(t, err, fs.ErrExist)
	_, err = Open(mem, "x", o)
	wantErr(t, err, disk.ErrLocked)
	must(t, l.Close())
	wantErr(t, l.Close(), block.ErrClosed)
	_, err = Open(mem, "x", Options{})
	wantErr(t, err, ErrState)
	_, err = Open(mem, "y", o)
	wantErr(t, err, fs.ErrNotExist)
}

func TestHeader(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	l := newHead(t, mem, 0, 1<<20, limits{})
	must(t, l.SetMeta(func(m *Meta) { m.Volume = "renamed"; m.Snapshot = &Snapshot{Labels: map[string]string{"a": "b"}} }))
	got := l.Meta()
	got.Snapshot.Labels["a"] = "changed by a caller"
	if l.Meta().Snapshot.Labels["a"] != "b" {
		t.Error("Meta shares memory with the layer")
	}
	wantErr(t, l.SetMeta(func(m *Meta) { m.State = StateSealed }), ErrState)
	wantErr(t, l.SetMeta(func(m *Meta) { m.ID = NewID() }), ErrState)
	wantErr(t, l.SetMeta(func(m *Meta) { m.Volume = strings.Repeat("x", 40<<10) }), disk.ErrTooLarge)
	must(t, l.SetMeta(func(m *Meta) { m.ReplicaID = "r2" })) // a refused header does not fail the layer

	// A later version's fields survive ours.
	b, err := json.Marshal(l.Meta())
	must(t, err)
	b = append(b[:len(b)-1], []byte(`,"future":{"x":[1,2]}}`)...)
	must(t, l.slots.Store(b))
	must(t, l.Close())
	l, err = Open(mem, "l0", Options{BootID: testBoot})
	must(t, err)
	must(t, l.SetMeta(func(m *Meta) { m.Volume = "again" }))
	must(t, l.Close())
	m, sb, err := Inspect(mem, "l0")
	must(t, err)
	b, err = json.Marshal(m)
	must(t, err)
	if !bytes.Contains(b, []byte(`"future":{"x":[1,2]}`)) || m.Volume != "again" || m.ReplicaID != "r2" || sb.ID != m.ID {
		t.Errorf("header is %s", b)
	}
}

func TestVersions(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	l := newHead(t, mem, 0, 1<<20, limits{})
	sb := l.sb
	sb.Version = 7
	_, err := l.f.WriteAt(sb.encode(), 0)
	must(t, err)
	must(t, l.Close())
	_, err = Open(mem, "l0", Options{BootID: testBoot})
	wantErr(t, err, ErrVersion)
	if !strings.Contains(err.Error(), "version 7") || !strings.Contains(err.Error(), "up to 1") {
		t.Errorf("%v does not name both versions", err)
	}
}

// TestRot flips a byte at a time in every region of a file; nothing wrong is ever read.
func TestRot(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	lim := limits{segmentBytes: 8 << 10, inline: true}
	l := newHead(t, mem, 0, 4<<20, lim)
	s := ownedStack(t, []*Layer{l.Retain()}, StackOptions{})
	for i := range int64(40) {
		put(t, s, i*3, 2, uint64(i+1))
		must(t, s.Flush())
	}
	must(t, s.Seal(nil))
	must(t, s.Close())
	want := map[string]error{}
	try := func(what string, off int64, found func(s *Stack, err error) error) {
		f, err := mem.Open("l0")
		must(t, err)
		var b [1]byte
		_, err = f.ReadAt(b[:], off)
		must(t, err)
		b[0] ^= 0x10
		_, err = f.WriteAt(b[:], off)
		must(t, err)
		l, err := Open(mem, "l0", Options{ReadOnly: true, BootID: testBoot})
		if err == nil {
			s := ownedStack(t, []*Layer{l}, StackOptions{})
			_, err = s.ReadAt(make([]byte, 4<<20), 0)
			err = found(s, err)
			must(t, s.Close())
		}
		if !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("rot in the %s at %d: %v, want ErrCorrupt", what, off, err)
		}
		problems, cerr := Check(context.Background(), mem, []string{"l0"})
		if cerr != nil || len(problems) == 0 {
			t.Errorf("rot in the %s: Check finds %v, %v", what, problems, cerr)
		}
		b[0] ^= 0x10
		_, err = f.WriteAt(b[:], off)
		must(t, errors.Join(err, f.Close()))
		want[what] = err
	}
	asRead := func(_ *Stack, err error) error { return err }
	try("superblock", 33, asRead)
	try("log's start", l.sb.Log.Off+40, asRead)
	try("log's middle", l.sb.Log.Off+startBytes+200, asRead)
	must(t, l.Settle(context.Background()))
	try("data", l.sb.Data.Off+3*unitBytes+777, asRead)
	try("data of a unit read in part", l.sb.Data.Off+unitBytes+5, func(s *Stack, _ error) error {
		_, err := s.ReadAt(make([]byte, 10), unitBytes+100)
		return err
	})
	try("sums", l.sb.Sums.Off+2*3*4, asRead)
	if list, err := Check(t.Context(), mem, []string{"l0"}); err != nil || len(list) != 0 {
		t.Errorf("a sound layer: Check finds %v, %v", list, err)
	}
	_, err := l.f.WriteAt([]byte{1}, l.sb.Data.Off+4*unitBytes)
	must(t, err)
	if list, err := Check(t.Context(), mem, []string{"l0"}); err != nil || len(list) != 1 || list[0].Unit != 4 || list[0].Units != 1 {
		t.Errorf("a damaged unit: Check finds %v, %v", list, err)
	}
	must(t, l.Close())
}

// TestSumsKept reads one region through three layers with checksums: each unit's is kept after the second time, of the layer it is read from, and is no reason to believe what does not agree with it. When the
// slots begin anew nothing of it is left.
func TestSumsKept(t *testing.T) {
	const units, sizeBytes = 200, 4 << 20
	mem := disk.NewMem(disk.MemOptions{})
	lim := limits{maxSlots: 5}
	s := ownedStack(t, []*Layer{newHead(t, mem, 0, sizeBytes, lim)}, StackOptions{})
	put(t, s, 0, units, 1)
	for n := int64(1); n < 4; n++ {
		sealOver(t, mem, s, int(n), sizeBytes, lim)
		for u := n; u < units && n < 3; u += 3 {
			put(t, s, u, 1, uint64(n+1))
		}
	}
	for _, l := range s.Layers()[1:] {
		must(t, l.Settle(t.Context()))
	}
	all := func() {
		t.Helper()
		for u := range int64(units) {
			wantUnit(t, s, u, uint64(u%3+1))
		}
	}
	all()
	all()
	page := s.sums.page(0)
	for u := range int64(units) {
		if kept := page.units[u].Load(); kept>>32 != uint64(u%3+1) {
			t.Fatalf("unit %d: a checksum of slot %d is kept", u, kept>>32)
		}
	}
	lowest := s.Layers()[3]
	for _, bytes := range [][]byte{{99}, {98}} {
		_, err := lowest.f.WriteAt(bytes, lowest.sb.Data.Off+3*unitBytes)
		must(t, err)
		_, err = s.ReadAt(make([]byte, 1<<16), 0)
		wantErr(t, err, block.ErrCorrupt)
	}
	b := make([]byte, unitBytes)
	fillUnit(b, 3, 1)
	_, err := lowest.f.WriteAt(b, lowest.sb.Data.Off+3*unitBytes)
	must(t, err)
	all()
	above := s.Layers()[1:3]
	merged, err := Merge(t.Context(), mem, "m", MergeSpec{Layers: above, Meta: testMeta(), Options: Options{BootID: testBoot, limits: lim}})
	must(t, err)
	must(t, s.ReplaceMerged(above, merged))
	must(t, merged.Close())
	all()
	for n := 4; n < 6; n++ {
		sealOver(t, mem, s, n, sizeBytes, lim)
	}
	if s.sums[0].page.Load() != nil {
		t.Error("checksums are kept although the slots began anew")
	}
	all()
	must(t, s.Close())
}

// TestMergeRot does not make rot true: a merge that copies compares.
func TestMergeRot(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	s := ownedStack(t, []*Layer{newHead(t, mem, 0, 1<<20, limits{})}, StackOptions{})
	put(t, s, 3, 4, 1)
	sealOver(t, mem, s, 1, 1<<20, limits{})
	sealOver(t, mem, s, 2, 1<<20, limits{})
	upper, lower := s.Layers()[1], s.Layers()[2]
	must(t, lower.Settle(context.Background()))
	_, err := lower.f.WriteAt([]byte{99}, lower.sb.Data.Off+4*unitBytes)
	must(t, err)
	_, err = Merge(context.Background(), mem, "m", MergeSpec{Layers: []*Layer{upper, lower}, Meta: testMeta(), Options: Options{BootID: testBoot}})
	wantErr(t, err, block.ErrCorrupt)
	if ok, err := disk.Exists(mem, "m"); ok || err != nil {
		t.Error("a failed merge left its file")
	}
	must(t, s.Close())
}

// TestDepth reads through 200 snapshots, the head's size growing on the way.
func TestDepth(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	lim := limits{segmentBytes: 8 << 10, inline: true, maxSlots: 230}
	size := int64(32 << 20)
	s := ownedStack(t, []*Layer{newHead(t, mem, 0, size, lim)}, StackOptions{})
	model := map[int64]uint64{}
	rnd := rand.New(rand.NewPCG(5, 5))
	for i := 1; i <= 200; i++ {
		for k := range int64(8) {
			u := rnd.Int64N(size / unitBytes)
			id := uint64(i)*10 + uint64(k)
			put(t, s, u, 1, id)
			model[u] = id
		}
		if i%50 == 0 {
			size += 64 << 20
		}
		sealOver(t, mem, s, i, size, lim)
	}
	if n := len(s.Layers()); n != 201 || s.Size() != size {
		t.Fatalf("%d layers, %d bytes", n, s.Size())
	}
	for range 2 {
		for u, id := range model {
			wantUnit(t, s, u, id)
		}
		wantUnit(t, s, size/unitBytes-1, 0)
		s = reopen(t, mem, s, Options{BootID: testBoot, limits: lim})
	}
	must(t, s.Close())
}

// TestSlotsRunOut snapshots and merges for ever with few slots.
func TestSlotsRunOut(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{Reflink: true})
	lim := limits{segmentBytes: 8 << 10, inline: true, maxSlots: 6}
	size := int64(8 << 20)
	s := ownedStack(t, []*Layer{newHead(t, mem, 0, size, lim)}, StackOptions{})
	model := map[int64]uint64{}
	rnd := rand.New(rand.NewPCG(6, 6))
	for i := 1; i <= 40; i++ {
		for k := range int64(20) {
			u := rnd.Int64N(60)
			model[u] = uint64(i)*100 + uint64(k)
			put(t, s, u, 1, model[u])
		}
		sealOver(t, mem, s, i, size, lim)
		if layers := s.Layers(); len(layers) > 3 {
			merged, err := Merge(context.Background(), mem, fmt.Sprintf("m%d", i), MergeSpec{Layers: []*Layer{layers[1], layers[2]}, Meta: testMeta(), Options: Options{BootID: testBoot, limits: lim}})
			must(t, err)
			must(t, s.ReplaceMerged([]*Layer{layers[1], layers[2]}, merged))
			must(t, merged.Close())
		}
		for u, id := range model {
			wantUnit(t, s, u, id)
		}
	}
	must(t, s.Close())
}

// TestSpace checks what a discard, a prune and a merge give back, to the unit.
func TestSpace(t *testing.T) {
	for _, reflink := range []bool{false, true} {
		mem := disk.NewMem(disk.MemOptions{Reflink: reflink})
		lim := limits{inline: true}
		size := int64(16 << 20)
		s := ownedStack(t, []*Layer{newHead(t, mem, 0, size, lim)}, StackOptions{})
		allocated := func() int64 {
			n := int64(0)
			for _, l := range s.Layers() {
				a, err := l.AllocatedBytes()
				must(t, err)
				n += a
			}
			return n
		}
		empty := allocated()
		put(t, s, 0, 100, 1)
		if got, want := allocated()-empty, int64(101*unitBytes); got != want { // and a map page
			t.Errorf("100 units take %d bytes, want %d", got, want)
		}
		must(t, s.Zero(0, 40*unitBytes))
		if got, want := allocated()-empty, int64(61*unitBytes); got != want {
			t.Errorf("after a discard of 40 they take %d, want %d", got, want)
		}
		before := allocated()
		must(t, s.Zero(2000*unitBytes, 1000*unitBytes)) // nothing is there: nothing is to be noted
		if allocated() != before || s.view.Load().writer.log.touched(1) {
			t.Error("discarding nothing left something")
		}
		sealOver(t, mem, s, 1, size, lim)
		lower := s.Layers()[1]
		must(t, lower.Settle(context.Background()))
		put(t, s, 30, 40, 2) // hides 10 zeroes and 30 data
		must(t, lower.SetMeta(func(m *Meta) { m.Snapshot.Removed = true }))
		before, err := lower.AllocatedBytes()
		must(t, err)
		freed, err := s.Prune(context.Background(), lower, nil)
		must(t, err)
		after, err := lower.AllocatedBytes()
		must(t, err)
		if freed != 30*unitBytes || before-after != freed {
			t.Errorf("pruning freed %d, and the file shrank by %d, want 30 units", freed, before-after)
		}
		for u, id := range map[int64]uint64{0: 0, 29: 0, 30: 2, 69: 2, 70: 1, 99: 1, 100: 0} {
			wantUnit(t, s, u, id)
		}
		problems, err := Check(context.Background(), mem, []string{"l0"})
		if err != nil || len(problems) > 0 {
			t.Errorf("check: %v %v", problems, err)
		}
		must(t, s.Close())
	}
}

// TestPruneNeedsConsent refuses to prune what is not removed.
func TestPruneNeedsConsent(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	s := ownedStack(t, []*Layer{newHead(t, mem, 0, 1<<20, limits{})}, StackOptions{})
	_, err := s.Prune(context.Background(), s.Layers()[0], nil)
	wantErr(t, err, ErrState)
	sealOver(t, mem, s, 1, 1<<20, limits{})
	must(t, s.Layers()[1].Settle(context.Background()))
	_, err = s.Prune(context.Background(), s.Layers()[1], nil)
	wantErr(t, err, ErrState)
	must(t, s.Close())
}

// TestMergeCancelled leaves no file.
func TestMergeCancelled(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	layers := sealedLayers(t, mem, 2, 1<<20, limits{})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := Merge(ctx, mem, "m", MergeSpec{Layers: []*Layer{layers[0], layers[1]}, Meta: testMeta(), Options: Options{BootID: testBoot}})
	wantErr(t, err, context.Canceled)
	if ok, err := disk.Exists(mem, "m"); ok || err != nil {
		t.Error("a cancelled merge left its file")
	}
	for _, l := range layers {
		must(t, l.Close())
	}
}

// TestStackRefuses checks what NewStack, Seal, PushHead and ReplaceMerged do not take.
func TestStackRefuses(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	a, b := newHead(t, mem, 0, 1<<20, limits{}), newHead(t, mem, 1, 1<<20, limits{})
	_, err := NewStack(nil, StackOptions{})
	wantErr(t, err, ErrState)
	_, err = NewStack([]*Layer{a, b}, StackOptions{})
	wantErr(t, err, ErrState)
	s := ownedStack(t, []*Layer{a}, StackOptions{})
	_, err = NewStack([]*Layer{a}, StackOptions{})
	wantErr(t, err, ErrState)
	wantErr(t, s.PushHead(b), ErrState)
	wantErr(t, s.Seal(func(m *Meta) { m.ID = NewID() }), ErrState)
	wantErr(t, s.Seal(func(m *Meta) { m.Volume = strings.Repeat("x", 40<<10) }), disk.ErrTooLarge)
	put(t, s, 0, 1, 1) // a refused seal leaves a head
	must(t, s.Seal(nil))
	wantErr(t, s.Seal(nil), ErrState)
	_, err = s.WriteAt(make([]byte, 4096), 0)
	wantErr(t, err, block.ErrReadOnly)
	wantErr(t, s.Zero(0, 4096), block.ErrReadOnly)
	must(t, s.Flush())
	wantErr(t, s.ReplaceMerged([]*Layer{a, b}, a), ErrState)
	tiny := newHead(t, mem, 2, 1<<19, limits{})
	wantErr(t, s.PushHead(tiny), ErrState)
	must(t, tiny.Close())
	must(t, s.PushHead(b))
	wantUnit(t, s, 0, 1)
	must(t, b.Close())
	must(t, s.Close())
}

// TestSnapshotExport reads a snapshot through a stack of its own while the head goes on, shares the layers, and closes in any order.
func TestSnapshotExport(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	s := ownedStack(t, []*Layer{newHead(t, mem, 0, 1<<20, limits{})}, StackOptions{})
	put(t, s, 3, 4, 1)
	sealOver(t, mem, s, 1, 1<<20, limits{})
	snap, err := NewStack(s.Layers()[1:], StackOptions{})
	must(t, err)
	put(t, s, 3, 2, 2)
	must(t, s.Layers()[1].Settle(context.Background())) // under readers
	wantUnit(t, snap, 3, 1)
	wantUnit(t, s, 3, 2)
	must(t, s.Close())
	wantUnit(t, snap, 4, 1)
	must(t, snap.Close())
	_, err = snap.ReadAt(make([]byte, 1), 0)
	wantErr(t, err, block.ErrClosed)
	reopened := openStack(t, mem, []string{"l1", "l0"}, Options{BootID: testBoot}) // all locks are free
	wantUnit(t, reopened, 3, 2)
	must(t, reopened.Close())
}

// TestChangesUnderLoad snapshots, prunes and merges while several goroutines read and write; each unit has one owner who knows what it must hold.
func TestChangesUnderLoad(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{Reflink: true})
	lim := limits{segmentBytes: 16 << 10, uncovered: 40, chunkUnits: 16, mapBytes: 8 << 10}
	const size, owners = 80 << 20, 4
	s := ownedStack(t, []*Layer{newHead(t, mem, 0, size, lim)}, StackOptions{})
	var all sync.WaitGroup
	done := make(chan struct{})
	var gate sync.RWMutex // as a Gate would: held for a seal
	for o := range int64(owners) {
		all.Go(func() {
			rnd := rand.New(rand.NewPCG(3, uint64(o)))
			model := map[int64]uint64{}
			b := make([]byte, unitBytes)
			for id := uint64(1); ; id++ {
				select {
				case <-done:
					return
				default:
				}
				u := rnd.Int64N(40)*400 + o
				if rnd.IntN(3) > 0 {
					if _, err := s.ReadAt(b, u*unitBytes); err != nil || readVec(b, u) != same(model[u]) {
						t.Errorf("owner %d: unit %d is %x, want %x: %v", o, u, readVec(b, u), model[u], err)
						return
					}
					continue
				}
				fillUnit(b, u, id)
				gate.RLock()
				_, err := s.WriteAt(b, u*unitBytes)
				gate.RUnlock()
				if err != nil {
					t.Errorf("owner %d: %v", o, err)
					return
				}
				model[u] = id
			}
		})
	}
	for i := 1; i <= 25 && !t.Failed(); i++ {
		h := newHead(t, mem, i, size, lim)
		must(t, s.FlushAhead(context.Background()))
		gate.Lock()
		err := s.Seal(sealMeta)
		if err == nil {
			err = s.PushHead(h)
		}
		gate.Unlock()
		must(t, err)
		must(t, h.Close())
		layers := s.Layers()
		must(t, layers[1].SetMeta(func(m *Meta) { m.Snapshot.Removed = true }))
		must(t, layers[1].Settle(context.Background()))
		_, err = s.Prune(context.Background(), layers[1], nil)
		must(t, err)
		if len(layers) > 3 {
			k := 1 + i%(len(layers)-2)
			merged, err := Merge(context.Background(), mem, fmt.Sprintf("m%d", i), MergeSpec{Layers: []*Layer{layers[k], layers[k+1]}, Meta: testMeta(), Options: Options{BootID: testBoot, limits: lim}})
			must(t, err)
			must(t, merged.SetMeta(func(m *Meta) { m.Snapshot = &Snapshot{Name: "m"} }))
			must(t, s.ReplaceMerged([]*Layer{layers[k], layers[k+1]}, merged))
			must(t, merged.Close())
		}
	}
	close(done)
	all.Wait()
	must(t, s.Close())
}

// TestExtentsOfStack checks states across layers, regions and map pages.
func TestExtentsOfStack(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	s := ownedStack(t, []*Layer{newHead(t, mem, 0, 128<<20, limits{})}, StackOptions{})
	put(t, s, 1020, 8, 1)
	sealOver(t, mem, s, 1, 128<<20, limits{})
	must(t, s.Zero(1022*unitBytes, 2*unitBytes))
	put(t, s, pageUnits-2, 4, 2)
	got, err := s.Extents(100, 128<<20-100)
	must(t, err)
	want := []block.Extent{
		{Off: 100, N: 1020*unitBytes - 100, State: block.Absent}, {Off: 1020 * unitBytes, N: 2 * unitBytes, State: block.Data},
		{Off: 1022 * unitBytes, N: 2 * unitBytes, State: block.Zero}, {Off: 1024 * unitBytes, N: 4 * unitBytes, State: block.Data},
		{Off: 1028 * unitBytes, N: (pageUnits - 2 - 1028) * unitBytes, State: block.Absent}, {Off: (pageUnits - 2) * unitBytes, N: 4 * unitBytes, State: block.Data},
		{Off: (pageUnits + 2) * unitBytes, N: 128<<20 - (pageUnits+2)*unitBytes, State: block.Absent},
	}
	if !slices.Equal(got, want) {
		t.Errorf("extents\n%v, want\n%v", got, want)
	}
	must(t, s.Close())
}

func TestDump(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	s := ownedStack(t, []*Layer{newHead(t, mem, 0, 1<<20, limits{})}, StackOptions{})
	put(t, s, 3, 4, 1)
	must(t, s.Zero(5*unitBytes, unitBytes))
	must(t, s.Close())
	var text, doc bytes.Buffer
	must(t, Dump(&text, mem, "l0", DumpOptions{Map: true, Log: true}))
	for _, want := range []string{"version 1", "units 3 to 6, before: absent", "zero  units 5 to 5", "data  units 3 to 4", "3 data, 1 zero, 252 absent", `"volumeID": "v1"`} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("dump lacks %q:\n%s", want, text.String())
		}
	}
	must(t, Dump(&doc, mem, "l0", DumpOptions{JSON: true, Map: true, Log: true}))
	var d dumped
	must(t, json.Unmarshal(doc.Bytes(), &d))
	if d.Units["data"] != 3 || len(d.Log) != 1 || len(d.Log[0].Records) != 2 || d.Header.Kind != KindVolume || len(d.Map) != 3 {
		t.Errorf("dump is %s", doc.String())
	}
	// It goes on past damage.
	f, err := mem.Open("l0")
	must(t, err)
	_, err = f.WriteAt(binary.LittleEndian.AppendUint64(nil, 0), logOff)
	must(t, err)
	text.Reset()
	must(t, Dump(&text, mem, "l0", DumpOptions{}))
	if !strings.Contains(text.String(), "PROBLEM") || !strings.Contains(text.String(), "superblock") {
		t.Errorf("dump of a damaged file:\n%s", text.String())
	}
	_, err = f.WriteAt([]byte{0xff}, 20)
	must(t, errors.Join(err, f.Close()))
	text.Reset()
	wantErr(t, Dump(&text, mem, "l0", DumpOptions{}), block.ErrCorrupt)
	if !strings.Contains(text.String(), "PROBLEM") {
		t.Errorf("dump of a file without a superblock:\n%s", text.String())
	}
}

// TestPace: background work asks before it moves bytes, about all that it moves, and ends when it is told to.
func TestPace(t *testing.T) {
	mem := disk.NewMem(disk.MemOptions{})
	asked, refuse := int64(0), false
	stop := errors.New("stop")
	o := Options{BootID: testBoot, Pace: func(_ context.Context, n int64) error {
		if refuse {
			return stop
		}
		asked += n
		return nil
	}}
	want := func(what string, units int64) {
		t.Helper()
		if asked != units*unitBytes {
			t.Errorf("%s asked for %d bytes, want %d units", what, asked, units)
		}
		asked = 0
	}
	var layers []*Layer
	var s *Stack
	for i := range 3 {
		l, err := Create(mem, fmt.Sprintf("l%d", i), testMeta(), 64*unitBytes, o)
		must(t, err)
		if s == nil {
			s, err = NewStack([]*Layer{l}, StackOptions{})
		} else {
			err = s.PushHead(l)
		}
		must(t, err)
		put(t, s, int64(i)*8, 16, uint64(i+1))
		layers = append([]*Layer{l}, layers...)
		if i < 2 {
			must(t, s.Seal(func(m *Meta) { m.Snapshot = &Snapshot{Name: "s", Removed: true} }))
			want("writing", 0)
			refuse = true
			wantErr(t, l.Settle(context.Background()), stop)
			refuse = false
			must(t, l.Settle(context.Background()))
			want("settling", 16)
		}
	}
	refuse = true
	_, err := Merge(context.Background(), mem, "m", MergeSpec{Layers: layers[1:], Meta: testMeta(), Options: o})
	wantErr(t, err, stop)
	_, err = s.Prune(context.Background(), layers[1], nil)
	wantErr(t, err, stop)
	refuse = false
	m, err := Merge(context.Background(), mem, "m", MergeSpec{Layers: layers[1:], Meta: testMeta(), Options: o})
	must(t, err)
	want("merging", 2*24) // read and written
	freed, err := s.Prune(context.Background(), layers[1], nil)
	must(t, err)
	want("pruning", freed/unitBytes)
	if freed != 8*unitBytes {
		t.Errorf("pruning freed %d bytes, want 8 units", freed)
	}
	must(t, errors.Join(m.Close(), s.Close()))
	for _, l := range layers {
		must(t, l.Close())
	}
}
