package layer

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/block/blocktest"
	"ashlar/internal/disk"
)

var testBoot = BootID{1}

// small makes rare things frequent: segments fill, U overflows and the map's memory runs out all the time.
var small = limits{segmentBytes: 8 << 10, uncovered: 24, chunkUnits: 16, mapBytes: 4 << 10, maxSlots: 64}

func testMeta() Meta {
	return Meta{ID: NewID(), Kind: KindVolume, VolumeID: "v1", Volume: "vol", ReplicaID: "r1", Created: time.Unix(1e9, 0).UTC()}
}

// newHead creates a layer named after n.
func newHead(t testing.TB, fsys disk.FS, n int, sizeBytes int64, lim limits) *Layer {
	t.Helper()
	l, err := Create(fsys, fmt.Sprintf("l%d", n), testMeta(), sizeBytes, Options{BootID: testBoot, limits: lim})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// sealedLayers returns n sealed layers, lowest last, that hold nothing.
func sealedLayers(t testing.TB, fsys disk.FS, n int, sizeBytes int64, lim limits) []*Layer {
	t.Helper()
	var list []*Layer
	for i := range n {
		l := newHead(t, fsys, i, sizeBytes, lim)
		s, err := NewStack([]*Layer{l}, StackOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Seal(nil); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			if err := l.Settle(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		list = append([]*Layer{l}, list...)
	}
	return list
}

// ownedStack closes the references that the test has itself.
func ownedStack(t testing.TB, layers []*Layer, o StackOptions) *Stack {
	t.Helper()
	s, err := NewStack(layers, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// reopen closes a stack and opens its files again.
func reopen(t testing.TB, fsys disk.FS, s *Stack, o Options) *Stack {
	t.Helper()
	var names []string
	for _, l := range s.Layers() {
		names = append(names, l.Name())
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return openStack(t, fsys, names, o)
}

func openStack(t testing.TB, fsys disk.FS, names []string, o Options) *Stack {
	t.Helper()
	var layers []*Layer
	for _, name := range names {
		l, err := Open(fsys, name, o)
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, l)
	}
	return ownedStack(t, layers, StackOptions{})
}

func realFS(t testing.TB) disk.FS {
	t.Helper()
	fsys, err := disk.OpenReal(t.TempDir(), disk.RealOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fsys.Close(); err != nil {
			t.Error(err)
		}
	})
	return fsys
}

func TestConformance(t *testing.T) {
	for _, c := range []struct {
		name   string
		below  int
		limits limits
		real   bool
		base   bool
	}{
		{"mem", 0, limits{}, false, false},
		{"mem 3 layers", 2, small, false, false},
		{"mem 50 layers and an image", 50, small, false, true},
		{"real", 0, small, true, false},
		{"real 3 layers and an image", 2, limits{}, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			stores := map[block.Device]disk.FS{}
			o := Options{BootID: testBoot, limits: c.limits}
			config := blocktest.Config{
				AlignBytes: unitBytes,
				New: func(t testing.TB, sizeBytes int64) block.Device {
					var fsys disk.FS = disk.NewMem(disk.MemOptions{})
					if c.real {
						fsys = realFS(t)
					}
					layers := sealedLayers(t, fsys, c.below, sizeBytes, c.limits)
					if c.base {
						layers = append(layers, sealedBase(t, fsys, sizeBytes, c.limits))
					}
					s := ownedStack(t, append([]*Layer{newHead(t, fsys, 1000, sizeBytes, c.limits)}, layers...), StackOptions{})
					stores[s] = fsys
					return s
				},
				Reopen: func(t testing.TB, d block.Device) block.Device {
					s := reopen(t, stores[d], d.(*Stack), o)
					stores[s] = stores[d]
					return s
				},
			}
			if c.below == 0 && c.limits == (limits{}) {
				config.HugeBytes = 8 << 40
			}
			blocktest.Run(t, config)
		})
	}
}

// sealedBase is an image smaller than the volume, of zeroes that were written and discarded.
func sealedBase(t testing.TB, fsys disk.FS, sizeBytes int64, lim limits) *Layer {
	t.Helper()
	m := testMeta()
	m.Kind, m.Image, m.State = KindImage, &Image{Name: "golden", ID: "i1"}, StateBuilding
	l, err := Create(fsys, "base", m, roundUp(sizeBytes/2, unitBytes), Options{BootID: testBoot, limits: lim})
	if err != nil {
		t.Fatal(err)
	}
	s := ownedStack(t, []*Layer{l.Retain()}, StackOptions{})
	if _, err := s.WriteAt(make([]byte, 64*unitBytes), 3*unitBytes); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Zero(20*unitBytes, 20*unitBytes), s.Seal(nil), s.Close(), l.Settle(context.Background())); err != nil {
		t.Fatal(err)
	}
	return l
}
