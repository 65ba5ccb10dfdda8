package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// receiveStack makes a stack of three layers of a size that is no whole map page: two sealed, of which the lower is settled, and a head; runs of all lengths, over the borders of pages and regions.
func receiveStack(t *testing.T, fsys *disk.Mem, r *rand.Rand) *Stack {
	t.Helper()
	const size = 3*pageUnits*unitBytes - 5*unitBytes
	create := func(i int) *Layer {
		l, err := Create(fsys, fmt.Sprint("l", i), Meta{ID: ID(fmt.Sprintf("%032x", i+1)), Kind: KindVolume, VolumeID: "v"}, size, Options{BootID: BootID{1}})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	head := create(0)
	s, err := NewStack([]*Layer{head}, StackOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		for range 25 {
			units := int64(size / unitBytes)
			unit := []int64{r.Int64N(units), pageUnits - 3, 2*pageUnits - 1, units - 4, 0}[r.IntN(5)]
			n := min(1+r.Int64N([]int64{3, 30, 600}[r.IntN(3)]), units-unit)
			var err error
			if r.IntN(4) == 0 {
				err = s.Zero(unit*unitBytes, n*unitBytes)
			} else {
				_, err = s.WriteAt(bytes.Repeat([]byte{byte(1 + r.IntN(255))}, int(n*unitBytes)), unit*unitBytes)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if i == 2 {
			break
		}
		next := create(i + 1)
		if err := errors.Join(s.Seal(func(m *Meta) { m.Snapshot = &Snapshot{Name: fmt.Sprint("s", i)} }), s.PushHead(next)); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			if err := head.Settle(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := next.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := head.Close(); err != nil {
		t.Fatal(err)
	}
	return s
}

// states returns all extents of a device up to size, and its bytes where they are Data.
func states(t *testing.T, d block.Device, size int64) (list []block.Extent, data []byte) {
	t.Helper()
	for off := int64(0); off < size; {
		part, err := d.Extents(off, size-off)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range part {
			off += e.N
			if e.State == block.Data {
				p := make([]byte, e.N)
				if _, err := d.ReadAt(p, e.Off); err != nil {
					t.Fatal(err)
				}
				data = append(data, p...)
			}
			if k := len(list) - 1; k >= 0 && list[k].State == e.State {
				list[k].N += e.N
			} else {
				list = append(list, e)
			}
		}
	}
	return list, data
}

// TestReceive: a layer that was received has the units of the original in the same states, its count, and, sealed, checksums that match; a head goes on as a head. Also after a power cut.
func TestReceive(t *testing.T) {
	for n := range 4 {
		seed := uint64(n + 1)
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			from, to := disk.NewMem(disk.MemOptions{}), disk.NewMem(disk.MemOptions{})
			s := receiveStack(t, from, rand.New(rand.NewPCG(seed, 0)))
			defer s.Close()
			for i, l := range s.Layers() {
				own, err := OpenOwn(l, s)
				if err != nil {
					t.Fatal(err)
				}
				m, name := l.Meta(), fmt.Sprint("copy", i)
				if (own.SumsBytes() > 0) != m.Sums || i == 2 && !m.Sums {
					t.Errorf("layer %d: %d bytes of checksums, sums %t", i, own.SumsBytes(), m.Sums)
				}
				var moved atomic.Int64
				data, err := Receive(t.Context(), to, name, ReceiveSpec{Units: own, SizeBytes: l.SizeBytes(), SumsBytes: own.SumsBytes(), Meta: m, Options: Options{BootID: BootID{2}}, Parallel: n, Progress: func(n int64) { moved.Add(n) }})
				if err != nil {
					t.Fatal(err)
				}
				wantList, wantData := states(t, own, l.SizeBytes())
				if data != int64(len(wantData)) || moved.Load() != data {
					t.Errorf("layer %d: %d bytes, told %d, want %d", i, data, moved.Load(), len(wantData))
				}
				cut := to.CrashClone(disk.CrashOptions{Keep: disk.KeepNone})
				got, err := Open(cut, name, Options{BootID: BootID{3}})
				if err != nil {
					t.Fatal(err)
				}
				g := got.Meta()
				if g.State != m.State || g.Sums != (m.State == StateSealed) || g.Settled != g.Sums || (m.Snapshot == nil) != (g.Snapshot == nil) || g.ID != m.ID {
					t.Errorf("layer %d has header %+v", i, g)
				}
				stack, err := NewStack([]*Layer{got}, StackOptions{})
				if err != nil {
					t.Fatal(err)
				}
				if err := stack.Count(t.Context()); err != nil {
					t.Fatal(err)
				}
				if counted, known := got.DataBytes(); !known || counted != data {
					t.Errorf("layer %d counts %d bytes (%t), want %d", i, counted, known, data)
				}
				if list, data := states(t, stack, l.SizeBytes()); !slices.Equal(list, wantList) || !bytes.Equal(data, wantData) {
					t.Errorf("layer %d is not what the original is", i)
				}
				if g.Sums {
					if bad, err := Check(t.Context(), cut, []string{name}); err != nil || len(bad) > 0 {
						t.Errorf("layer %d: Check finds %v (%v)", i, bad, err)
					}
				} else if _, err := stack.WriteAt(make([]byte, unitBytes), 0); err != nil {
					t.Errorf("the head takes no write: %v", err)
				}
				if err := errors.Join(stack.Close(), got.Close(), own.Close()); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestReceiveRefuses: a spec that makes no sense, a failure and a cancelled context leave no file.
func TestReceiveRefuses(t *testing.T) {
	from, to := disk.NewMem(disk.MemOptions{}), disk.NewMem(disk.MemOptions{})
	s := receiveStack(t, from, rand.New(rand.NewPCG(1, 1)))
	defer s.Close()
	lowest := s.Layers()[2]
	own, err := OpenOwn(lowest, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	if _, err := OpenOwn(s.Layers()[0], nil); !errors.Is(err, ErrState) {
		t.Errorf("a head without its stack: %v", err)
	}
	good := ReceiveSpec{Units: own, SizeBytes: lowest.SizeBytes(), SumsBytes: own.SumsBytes(), Meta: lowest.Meta(), Options: Options{BootID: BootID{2}}}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for what, c := range map[string]struct {
		ctx  context.Context
		edit func(*ReceiveSpec)
		want error
	}{
		"to become half an import":   {t.Context(), func(s *ReceiveSpec) { s.Meta.State = StateBuilding }, ErrState},
		"a device that is too small": {t.Context(), func(s *ReceiveSpec) { s.SizeBytes += pageUnits * unitBytes }, block.ErrCorrupt},
		"too few checksums":          {t.Context(), func(s *ReceiveSpec) { s.SumsBytes = unitBytes }, block.ErrCorrupt},
		"checksums of something else": {t.Context(), func(s *ReceiveSpec) {
			s.Units = block.NewZeroes(own.Size())
			s.Units = over2{own, s.Units}
		}, block.ErrCorrupt},
		"given up": {cancelled, func(*ReceiveSpec) {}, context.Canceled},
		"no pace":  {t.Context(), func(s *ReceiveSpec) { s.Options.Pace = func(context.Context, int64) error { return fs.ErrPermission } }, fs.ErrPermission},
	} {
		spec := good
		c.edit(&spec)
		if _, err := Receive(c.ctx, to, "copy", spec); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", what, err, c.want)
		}
		if there, err := disk.Exists(to, "copy"); there || err != nil {
			t.Errorf("%s left a file (%v)", what, err)
		}
	}
}

// over2 has the extents and checksums of one device, and the units of another.
type over2 struct {
	*Own
	units block.Device
}

func (o over2) ReadAt(p []byte, off int64) (int, error) {
	if off >= o.l.sb.SizeBytes {
		return o.Own.ReadAt(p, off)
	}
	return o.units.ReadAt(p, off)
}
