package volume_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/replica"
)

// model is a volume beside plain bytes. After a power cut each sector may be what was flushed or anything written since.
type model struct {
	*rig
	rand  *rand.Rand
	now   []byte
	safe  []byte             // as of the last flush
	since map[int64][][]byte // per sector: what was written since the last flush
	snaps map[string][]byte  // of snapshots that are not removed
	next  int
}

const sector = 512

// maxModelBytes bounds how far the model's volume grows.
const maxModelBytes = 3 * mib

// seeds returns which seeds to run, each with how many steps: a few by default, ASHLAR_STEPS times as many, one with ASHLAR_SEED.
func seeds(t testing.TB, quick, steps int) []uint64 {
	if s, err := strconv.ParseUint(os.Getenv("ASHLAR_SEED"), 10, 64); err == nil {
		return []uint64{s}
	}
	n := quick
	if want, err := strconv.Atoi(os.Getenv("ASHLAR_STEPS")); err == nil && want > 0 {
		n = quick * want
	}
	var list []uint64
	for i := range n {
		list = append(list, uint64(i+1))
	}
	t.Logf("seeds 1 to %d, %d steps each; ASHLAR_SEED picks one", n, steps)
	return list
}

func TestModel(t *testing.T) {
	const steps = 400
	for _, seed := range seeds(t, 2, steps) {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			m := &model{rig: newRig(t, mib, disk.MemOptions{Reflink: seed%2 == 0}), rand: seeded(seed), now: make([]byte, mib), safe: make([]byte, mib),
				since: map[int64][][]byte{}, snaps: map[string][]byte{}}
			m.open()
			for i := range steps {
				m.step()
				if t.Failed() {
					t.Fatalf("seed %d, step %d", seed, i)
				}
			}
			m.compare()
			m.close()
		})
	}
}

func (m *model) step() {
	d := m.v.Device()
	off := m.rand.Int64N(int64(len(m.now)))
	n := 1 + m.rand.Int64N(min(int64(len(m.now))-off, 5*block.UnitBytes))
	if m.rand.IntN(3) == 0 {
		off, n = off&^(block.UnitBytes-1), min(n|(block.UnitBytes-1)+1, int64(len(m.now))-off)&^(block.UnitBytes-1)
	}
	switch k := m.rand.IntN(1000); {
	case k < 450:
		p := bytes.Repeat([]byte{byte(1 + m.rand.IntN(255))}, int(n))
		_, err := d.WriteAt(p, off)
		m.must(err, "write")
		m.wrote(off, p)
	case k < 600:
		m.must(d.Zero(off, n), "zero")
		m.wrote(off, make([]byte, n))
	case k < 700:
		got := make([]byte, n)
		_, err := d.ReadAt(got, off)
		m.must(err, "read")
		if !bytes.Equal(got, m.now[off:off+n]) {
			m.Fatalf("read of %d bytes at %d differs", n, off)
		}
	case k < 760:
		m.flush()
		m.flushed()
	default:
		m.event(k - 760)
	}
}

func (m *model) wrote(off int64, p []byte) {
	copy(m.now[off:], p)
	for s := off / sector; len(p) > 0 && s <= (off+int64(len(p))-1)/sector; s++ {
		m.since[s] = append(m.since[s], slices.Clone(m.now[s*sector:(s+1)*sector]))
	}
}

func (m *model) flushed() {
	m.safe = slices.Clone(m.now)
	clear(m.since)
}

// event is everything that is no plain I/O; k is below 240.
func (m *model) event(k int) {
	switch {
	case k < 70:
		m.next++
		name := strconv.Itoa(m.next)
		m.snapshot(name)
		m.flushed()
		m.snaps[name] = slices.Clone(m.now)
	case k < 90:
		if name, ok := m.pick(); ok {
			m.must(m.v.Revert(m.ctx, m.id(), name), "revert")
			copy(m.now, m.snaps[name])
			clear(m.now[len(m.snaps[name]):])
			m.flushed()
		}
	case k < 130:
		if name, ok := m.pick(); ok {
			m.must(m.v.RemoveSnapshot(m.ctx, name), "remove")
			delete(m.snaps, name)
		}
	case k < 155:
		m.must(m.v.Purge(m.ctx, nil), "purge")
	case k < 160:
		if size := int64(len(m.now)) + 64*block.UnitBytes; size <= maxModelBytes {
			m.must(m.v.Expand(m.ctx, m.id(), size), "expand")
			m.now = append(m.now, make([]byte, 64*block.UnitBytes)...)
			m.flushed()
		}
	case k < 175:
		m.close()
		m.flushed()
		m.open()
	case k < 195:
		m.kill()
		m.open(resume)
	case k < 205:
		m.kill()
		m.open()
	case k < 220:
		m.power(disk.CrashOptions{Rand: m.rand})
		m.open()
		m.survived()
	default:
		m.compare()
	}
}

// pick returns a snapshot that is not removed.
func (m *model) pick() (string, bool) {
	var names []string
	for name := range m.snaps {
		names = append(names, name)
	}
	if len(names) == 0 {
		return "", false
	}
	slices.Sort(names)
	return names[m.rand.IntN(len(names))], true
}

// survived checks what a power cut left and goes on from there.
func (m *model) survived() {
	got := make([]byte, len(m.now))
	_, err := m.v.Device().ReadAt(got, 0)
	m.must(err, "read")
	for s := range int64(len(got) / sector) {
		p := got[s*sector : (s+1)*sector]
		if bytes.Equal(p, m.safe[s*sector:(s+1)*sector]) {
			continue
		}
		if !slices.ContainsFunc(m.since[s], func(w []byte) bool { return bytes.Equal(p, w) }) {
			m.Fatalf("after a power cut sector %d is neither what was flushed nor any of %d versions since", s, len(m.since[s]))
		}
	}
	// What a power cut left on the medium may still be lost by the next one until it is flushed; recovery has made it durable.
	m.now = got
	m.flushed()
	m.flush()
}

func (m *model) compare() {
	got := make([]byte, len(m.now))
	_, err := m.v.Device().ReadAt(got, 0)
	m.must(err, "read")
	if !bytes.Equal(got, m.now) {
		m.Fatal("the present differs")
	}
	m.wantSettled()
	for name, want := range m.snaps {
		d, err := m.v.OpenSnapshot(m.ctx, name)
		m.must(err, "open snapshot")
		got := make([]byte, d.Size())
		_, err = d.ReadAt(got, 0)
		m.must(err, "read snapshot")
		if !bytes.Equal(got, want[:min(len(got), len(want))]) || len(got) > len(want) {
			m.Fatalf("snapshot %s of %d bytes differs", name, len(got))
		}
		m.must(d.Close(), "close")
	}
	if st := m.status(); !slices.ContainsFunc(st.Layers, func(l replica.LayerInfo) bool { return l.Head }) {
		m.Fatal("no head")
	}
}
