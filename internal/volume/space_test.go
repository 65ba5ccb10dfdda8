package volume_test

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/replica"
)

// copyOf is another rig with what is on the disk and in the catalogue now, open: what is done to it, is not done to g.
func (g *rig) copyOf() *rig {
	g.Helper()
	c := *g
	c.fsys, c.ledger = g.fsys.Clone(), g.ledger.Clone()
	c.open(resume)
	return &c
}

// held is the guest data of all layers.
func (g *rig) held() int64 {
	g.Helper()
	n := int64(0)
	for _, l := range g.status().Layers {
		if l.DataBytes < 0 {
			g.Fatalf("layer %s is not counted in the volume's status", l.ID)
		}
		n += l.DataBytes
	}
	return n
}

func (g *rig) space() replica.Usage {
	g.Helper()
	u, err := g.v.Space(g.ctx)
	g.must(err, "space")
	return u
}

// checkSpace compares what Space says with what purging and deleting really free, on copies of the disk.
func (m *model) checkSpace() {
	m.Helper()
	m.awaitSettled() // what the files take does not move any more
	before, u := m.held(), m.space()
	sum, allocated := int64(0), int64(1<<20) // the record's file
	for _, l := range m.status().Layers {
		s, ok := u.Layers[l.ID]
		if !ok {
			m.Fatalf("layer %s has no space", l.ID)
		}
		sum, allocated = sum+s.ReclaimableBytes, allocated+l.AllocatedBytes
		if l.Snapshot != nil && !l.Pruned {
			if shown := m.dataOf(l.Snapshot.Name); shown != l.DataBytes+s.SharedBytes {
				m.Errorf("snapshot %s shows %d bytes of data, has %d and shares %d", l.Snapshot.Name, shown, l.DataBytes, s.SharedBytes)
			}
		}
	}
	if sum != u.ReclaimableBytes || allocated != u.ExclusiveBytes || u.SharedBytes != 0 {
		m.Errorf("the volume's space is %+v, its layers' reclaimable bytes are %d, its files take %d", u.Space, sum, allocated)
	}
	c := m.copyOf()
	m.must(c.v.Purge(c.ctx, nil), "purge")
	if freed := before - c.held(); freed != u.ReclaimableBytes {
		m.Errorf("a purge freed %d bytes, %d were reclaimable", freed, u.ReclaimableBytes)
	}
	after := c.space()
	if after.ReclaimableBytes != 0 {
		m.Errorf("after a purge %d bytes are reclaimable", after.ReclaimableBytes)
	}
	for _, l := range c.status().Layers {
		if l.Snapshot == nil || l.Snapshot.Removed {
			continue
		}
		one := c.copyOf()
		before := one.held()
		m.must(one.v.RemoveSnapshot(one.ctx, l.Snapshot.Name), "remove")
		m.must(one.v.Purge(one.ctx, nil), "purge")
		if freed := before - one.held(); freed != after.Layers[l.ID].ExclusiveBytes {
			// What stands below it may have become free with it.
			if !c.removedBelow(l) || freed < after.Layers[l.ID].ExclusiveBytes {
				m.Errorf("deleting snapshot %s freed %d bytes, %d were its own", l.Snapshot.Name, freed, after.Layers[l.ID].ExclusiveBytes)
			}
		}
		one.close()
	}
	c.close()
}

// removedBelow tells whether a removed snapshot lies right below a layer, kept only because of it.
func (g *rig) removedBelow(l replica.LayerInfo) bool {
	return slices.ContainsFunc(g.status().Layers, func(p replica.LayerInfo) bool {
		return p.ID == l.Parent && p.Snapshot != nil && p.Snapshot.Removed
	})
}

// dataOf adds up the data that a snapshot shows.
func (g *rig) dataOf(name string) int64 {
	g.Helper()
	d, err := g.v.OpenSnapshot(g.ctx, name)
	g.must(err, "open snapshot")
	n := int64(0)
	for off := int64(0); off < d.Size(); {
		list, err := d.Extents(off, d.Size()-off)
		g.must(err, "extents")
		for _, e := range list {
			if e.State == block.Data {
				n += e.N
			}
			off = e.Off + e.N
		}
	}
	g.must(d.Close(), "close")
	return n
}

// checkChanged compares two layers of which one stands on the other, or the lowest with nothing: the older one, patched where Changed says, is the newer one.
func (m *model) checkChanged() {
	m.Helper()
	layers := m.status().Layers
	to := layers[m.rand.IntN(len(layers))]
	if to.Pruned {
		_, _, err := m.v.Changed(m.ctx, "", to.ID, 0, 1)
		m.want(err, replica.ErrPruned, "changes of what was pruned")
		return
	}
	from := replica.LayerInfo{ID: to.Parent}
	for range m.rand.IntN(3) {
		if i := slices.IndexFunc(layers, func(l replica.LayerInfo) bool { return l.ID == from.ID }); i >= 0 {
			from.ID = layers[i].Parent
		}
	}
	want := m.contentOf(to)
	got := make([]byte, len(want))
	if i := slices.IndexFunc(layers, func(l replica.LayerInfo) bool { return l.ID == from.ID }); i >= 0 {
		if layers[i].Pruned {
			return
		}
		copy(got, m.contentOf(layers[i]))
	}
	limit, last := 1+m.rand.IntN(4), replica.Range{Off: -1}
	for off := int64(0); off < int64(len(want)); {
		list, next, err := m.v.Changed(m.ctx, from.ID, to.ID, off, limit)
		m.must(err, "changed")
		if next <= off || len(list) > limit {
			m.Fatalf("changes from %d on end at %d, %d of them", off, next, len(list))
		}
		for _, c := range list {
			if c.Off < off || c.Off < last.Off+last.N || (c.Off|c.N)%block.UnitBytes != 0 || c.N <= 0 || c.Off+c.N > next || c.Off == last.Off+last.N && c.Zero == last.Zero && c.Off != off {
				m.Fatalf("change %+v after %+v, from %d to %d", c, last, off, next)
			}
			copy(got[c.Off:], want[c.Off:c.Off+c.N])
			if c.Zero && !bytes.Equal(want[c.Off:c.Off+c.N], make([]byte, c.N)) {
				m.Errorf("%+v is said to be zero", c)
			}
			last = c
		}
		off = next
	}
	if !bytes.Equal(got, want) {
		m.Errorf("layer %s, patched with what changed up to %s, is another", from.ID, to.ID)
	}
}

// contentOf reads all of a layer's content.
func (m *model) contentOf(l replica.LayerInfo) []byte {
	m.Helper()
	p := make([]byte, l.SizeBytes)
	var d block.Device = m.v.Device()
	if !l.Head {
		var err error
		d, err = m.v.OpenSnapshot(m.ctx, l.Snapshot.Name)
		m.must(err, "open snapshot")
		defer func() { m.must(d.Close(), "close") }()
	}
	_, err := d.ReadAt(p, 0)
	m.must(err, "read")
	return p
}

// TestSpaceModel: in random histories, what Space says is what purging and deleting frees, and what Changed says leads from one content to another.
func TestSpaceModel(t *testing.T) {
	const steps = 160
	for _, seed := range seeds(t, 2, steps) {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			m := &model{rig: newRig(t, mib, disk.MemOptions{Reflink: seed%2 == 0}), rand: seeded(seed), now: make([]byte, mib), safe: make([]byte, mib),
				since: map[int64][][]byte{}, snaps: map[string][]byte{}}
			m.open()
			for i := range steps {
				switch k := m.rand.IntN(40); {
				case k == 0:
					m.checkSpace()
				case k < 4:
					m.checkChanged()
				case k == 4: // one that the system made
					m.next++
					meta := meta(fmt.Sprint("system", m.next))
					meta.UserCreated = false
					m.must(m.v.Snapshot(m.ctx, m.id(), meta), "snapshot")
					m.flushed()
				default:
					m.step()
				}
				if t.Failed() {
					t.Fatalf("seed %d, step %d", seed, i)
				}
			}
			m.checkSpace()
			m.checkChanged()
			m.close()
		})
	}
}

// TestChangedRefuses: what Changed does not take.
func TestChangedRefuses(t *testing.T) {
	g := newRig(t, mib, disk.MemOptions{})
	g.open()
	g.snapshot("one")
	g.snapshot("two")
	g.must(g.v.Revert(g.ctx, g.id(), "one"), "revert")
	one, _ := g.layer("one")
	two, _ := g.layer("two")
	for _, c := range []struct {
		from, to replica.LayerID
		off      int64
		limit    int
		want     error
	}{
		{two.ID, "", 0, 1, replica.ErrNotBelow}, {two.ID, one.ID, 0, 1, replica.ErrNotBelow}, {one.ID, one.ID, 0, 1, replica.ErrNotBelow},
		{"", g.id(), 0, 1, replica.ErrNoSnapshot}, {g.id(), "", 0, 1, replica.ErrNoSnapshot},
		{one.ID, two.ID, 1, 1, block.ErrRange}, {one.ID, two.ID, mib + 4096, 1, block.ErrRange}, {one.ID, two.ID, 0, 0, block.ErrRange},
	} {
		_, _, err := g.v.Changed(g.ctx, c.from, c.to, c.off, c.limit)
		g.want(err, c.want, fmt.Sprintf("changed from %q to %q at %d", c.from, c.to, c.off))
	}
	if list, next, err := g.v.Changed(g.ctx, one.ID, "", mib, 1); err != nil || next != mib || len(list) != 0 {
		t.Errorf("changes at the end: %v, %d, %v", list, next, err)
	}
	g.close()
}

// TestPurgePassesReaders: a purge leaves everything that an open snapshot reads as it is, says so, and frees it when nobody reads it any more.
func TestPurgePassesReaders(t *testing.T) {
	g := newRig(t, mib, disk.MemOptions{})
	g.open()
	for i := range 5 {
		g.fill(byte(i+1), int64(i)*block.UnitBytes, 10*block.UnitBytes)
		g.snapshot(fmt.Sprint(i + 1))
	}
	g.fill(6, 0, 16*block.UnitBytes)
	for _, name := range []string{"1", "2", "3", "4", "5"} {
		g.must(g.v.RemoveSnapshot(g.ctx, name), "remove")
	}
	for _, open := range []struct {
		name         string
		left, passed int
	}{{"5", 5, 5}, {"3", 4, 3}, {"2", 3, 2}, {"", 1, 0}} {
		if open.name == "" {
			g.must(g.v.Purge(g.ctx, nil), "purge")
		} else {
			d, err := g.v.OpenSnapshot(g.ctx, open.name)
			g.must(err, "open snapshot")
			before := make([]byte, mib)
			_, err = d.ReadAt(before, 0)
			g.must(err, "read")
			g.must(g.v.Purge(g.ctx, nil), "purge")
			after := make([]byte, mib)
			_, err = d.ReadAt(after, 0)
			g.must(err, "read")
			if !bytes.Equal(before, after) {
				t.Errorf("a purge changed snapshot %s while it was read", open.name)
			}
			g.must(d.Close(), "close")
		}
		st := g.status()
		if len(st.Layers) != open.left+1 || st.Stats.Passed != open.passed {
			t.Errorf("a purge while %q was read left %v and passed %d by, want %d and %d", open.name, g.names(), st.Stats.Passed, open.left, open.passed)
		}
	}
	if n := g.held(); n != 16*block.UnitBytes {
		t.Errorf("when nobody reads, %d bytes of data are left, want 16 units", n)
	}
	_, err := g.v.OpenSnapshot(g.ctx, "5")
	g.want(err, replica.ErrPruned, "open what was pruned")
	g.close()
}
