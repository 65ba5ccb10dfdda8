package replicatest

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strconv"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

func checkSnapshot(g *rig) {
	g.fill(1, 0, 8)
	one := g.snapshot("one")
	g.wantChain()
	g.fill(2, 0, 4)
	two := g.snapshot("two")
	g.fill(3, 0, 2)
	for range 2 {
		g.wantChain()
		g.wantFill(g.r, 3, 0, 2)
		g.wantFill(g.r, 2, 2, 2)
		g.wantFill(g.r, 1, 4, 4)
		g.wantSnapshot(one, 1, 0, 8)
		g.wantSnapshot(two, 2, 0, 4)
		g.wantSnapshot(two, 1, 4, 4)
		if s := g.layer(one).Snapshot; s == nil || s.Name != "one" || !s.UserCreated || s.Removed || !s.Created.Equal(meta("").Created) || s.Labels["for"] != "one" {
			g.Errorf("snapshot is said to be %+v", s)
		}
		g.restart()
	}
}

func checkSnapshotTwice(g *rig) {
	g.fill(1, 0, 1)
	c := g.snapshotChange("one")
	one := g.change(c)
	g.fill(2, 0, 1)
	for range 2 {
		g.must(g.r.Prepare(g.ctx, g.w, c, nil), "prepare what was done")
		g.must(g.r.Change(g.ctx, g.w, c), "the same change again")
		g.wantChain()
		g.wantFill(g.r, 2, 0, 1)
		g.wantSnapshot(one, 1, 0, 1)
		g.restart()
	}
}

func checkUnprepared(g *rig) {
	g.fill(1, 0, 1)
	c := g.snapshotChange("one")
	one := g.chain.Layers[0]
	g.must(g.r.Change(g.ctx, g.w, c), "change without prepare")
	g.chain = c.Chain
	g.fill(2, 0, 1)
	g.wantChain()
	g.wantSnapshot(one, 1, 0, 1)
}

// checkGivenUp: what was prepared and never made leaves no trace.
func checkGivenUp(g *rig) {
	g.fill(1, 0, 1)
	for i := range 3 {
		g.must(g.r.Prepare(g.ctx, g.w, g.snapshotChange("given up"), nil), "prepare")
		g.fill(2, 0, 1)
		g.wantChain()
		if i == 1 {
			g.restart()
		}
	}
	one := g.snapshot("one")
	g.must(g.r.Prepare(g.ctx, g.w, g.snapshotChange("given up"), nil), "prepare")
	g.purge()
	g.wantChain()
	g.restart()
	g.wantChain()
	g.wantSnapshot(one, 2, 0, 1)
	if n := len(g.status().Layers); n != 2 {
		g.Errorf("%d layers, want 2", n)
	}
}

func checkChainMismatch(g *rig) {
	g.snapshot("one")
	good := g.snapshotChange("two")
	for what, edit := range map[string]func(*replica.Change){
		"an old generation":           func(c *replica.Change) { c.Chain.Generation-- },
		"other layers below":          func(c *replica.Change) { c.Chain.Layers = slices.Delete(slices.Clone(c.Chain.Layers), 1, 2) },
		"a head that exists":          func(c *replica.Change) { c.Chain.Layers = append([]replica.LayerID{head}, c.Chain.Layers[1:]...) },
		"a head that is no id":        func(c *replica.Change) { c.Chain.Layers = append([]replica.LayerID{"../x"}, c.Chain.Layers[1:]...) },
		"no layers":                   func(c *replica.Change) { c.Chain.Layers = nil },
		"a smaller size":              func(c *replica.Change) { c.Chain.SizeBytes -= block.UnitBytes },
		"an unknown verb":             func(c *replica.Change) { c.Verb = "shrink" },
		"no snapshot":                 func(c *replica.Change) { c.Snapshot = nil },
		"a revert to the head":        func(c *replica.Change) { c.Verb = replica.VerbRevert },
		"a revert to nothing":         func(c *replica.Change) { c.Verb = replica.VerbRevert; c.Chain.Layers = c.Chain.Layers[:1] },
		"a merge with the head":       func(c *replica.Change) { *c = g.badMerge(head, g.chain.Layers[0]) },
		"a merge of strangers":        func(c *replica.Change) { *c = g.badMerge("00000000000000000000000000000777", head) },
		"a merge without what to do":  func(c *replica.Change) { c.Verb = replica.VerbMerge },
		"a snapshot of another chain": func(c *replica.Change) { c.Chain.Base = "00000000000000000000000000000888"; c.Chain.Generation -= 2 },
	} {
		c := good
		edit(&c)
		g.want(g.r.Prepare(g.ctx, g.w, c, nil), replica.ErrChain, "prepare with "+what)
		g.want(g.r.Change(g.ctx, g.w, c), replica.ErrChain, "change with "+what)
		g.wantChain()
	}
	g.change(good)
	g.wantChain()
}

func (g *rig) badMerge(lower, upper replica.LayerID) replica.Change {
	m := replica.Merge{Lower: lower, Upper: upper, Into: g.newID()}
	return replica.Change{Verb: replica.VerbMerge, Chain: g.next(m.Into), Merge: &m}
}

func checkExpand(g *rig) {
	units := int64(size / block.UnitBytes)
	g.fill(1, units-2, 2)
	c := g.snapshotChange("expand")
	c.Verb, c.Chain.SizeBytes = replica.VerbExpand, 3*size
	old := g.change(c)
	for range 2 {
		g.wantChain()
		g.wantFill(g.r, 1, units-2, 2)
		g.wantFill(g.r, 0, units, 2*units)
		g.must(g.r.Change(g.ctx, g.w, c), "the same expansion again")
		g.restart()
	}
	g.fill(2, 3*units-1, 1)
	g.wantFill(g.r, 2, 3*units-1, 1)
	if got := g.layer(old).SizeBytes; got != size {
		g.Errorf("the sealed layer has %d bytes, want %d", got, size)
	}
	_, err := g.r.WriteAt(make([]byte, block.UnitBytes), 3*size)
	g.want(err, block.ErrRange, "write beyond the end")
	c.Chain.Layers = append([]replica.LayerID{g.newID()}, c.Chain.Layers...)
	c.Chain.Generation++
	c.Chain.SizeBytes -= block.UnitBytes
	g.want(g.r.Change(g.ctx, g.w, c), replica.ErrChain, "shrinking")
}

func checkRevert(g *rig) {
	var ids []replica.LayerID
	for i := range 3 {
		g.fill(byte(i+1), 0, 4)
		ids = append(ids, g.snapshot(strconv.Itoa(i+1)))
	}
	g.fill(9, 0, 8)
	gone := g.chain.Layers[0]
	c := g.revert(ids[1])
	g.wantChain()
	g.wantFill(g.r, 2, 0, 4)
	g.wantFill(g.r, 0, 4, 4)
	g.fill(5, 0, 2)
	for range 2 { // a revert that is repeated takes nothing back
		g.must(g.r.Prepare(g.ctx, g.w, c, nil), "prepare what was done")
		g.must(g.r.Change(g.ctx, g.w, c), "the same revert again")
		g.wantChain()
		g.wantFill(g.r, 5, 0, 2)
		g.wantFill(g.r, 2, 2, 2)
		g.wantSnapshot(ids[2], 3, 0, 4)
		if g.hasLayer(gone) {
			g.Error("the old head is still there")
		}
		if p := g.layer(ids[2]).Parent; p != ids[1] {
			g.Errorf("snapshot 3 stands on %q", p)
		}
		g.restart()
	}
	g.revert(ids[2]) // and forward again, to the leaf
	g.wantFill(g.r, 3, 0, 4)
	g.wantChain()
}

func checkSetSnapshot(g *rig) {
	one := g.snapshot("one")
	m := *meta("one")
	m.Removed, m.Labels = true, map[string]string{"a": "b"}
	for range 2 {
		g.must(g.r.SetSnapshot(g.ctx, g.w, one, m), "set snapshot")
		g.restart()
		if s := g.layer(one).Snapshot; !s.Removed || s.Labels["a"] != "b" || len(s.Labels) != 1 || s.Name != "one" {
			g.Errorf("snapshot is said to be %+v", s)
		}
	}
	g.want(g.r.SetSnapshot(g.ctx, g.w, g.chain.Layers[0], m), replica.ErrNoSnapshot, "of the head")
	g.want(g.r.SetSnapshot(g.ctx, g.w, g.newID(), m), replica.ErrNoSnapshot, "of nothing")
	_, err := g.r.OpenSnapshot(g.chain.Layers[0])
	g.want(err, replica.ErrNoSnapshot, "open the head as a snapshot")
	_, err = g.r.OpenSnapshot(g.newID())
	g.want(err, replica.ErrNoSnapshot, "open nothing as a snapshot")
}

// checkPurgeLeaf is 4.3 of the dialect: snapshots 1, 2, 3; back to 2; 3 is a leaf.
func checkPurgeLeaf(g *rig) {
	var ids []replica.LayerID
	for i := range 4 {
		g.fill(byte(i+1), 0, 4)
		ids = append(ids, g.snapshot(strconv.Itoa(i+1)))
	}
	g.revert(ids[1])
	g.fill(7, 0, 1)
	g.purge()
	if n := len(g.status().Layers); n != 5 {
		g.Fatalf("purge without anything removed left %d layers, want 5", n)
	}
	g.remove(ids[3])
	g.remove(ids[2])
	g.remove(ids[0])
	g.purge()
	g.restart()
	g.wantChain()
	if g.hasLayer(ids[3]) || g.hasLayer(ids[2]) || !g.hasLayer(ids[0]) || !g.hasLayer(ids[1]) {
		g.Errorf("after the purge there are %+v", g.status().Layers)
	}
	g.wantSnapshot(ids[1], 2, 0, 4)
	g.wantFill(g.r, 7, 0, 1)
	g.wantFill(g.r, 2, 1, 3)
}

func checkPrune(g *rig) {
	g.fill(1, 0, 200)
	one := g.snapshot("one")
	g.must(g.r.Count(g.ctx), "count")
	g.wantData(one, 200)
	g.fill(2, 0, 100)
	g.must(g.r.Zero(150*block.UnitBytes, 20*block.UnitBytes), "zero")
	g.remove(one)
	g.wantSnapshot(one, 1, 0, 200)
	g.purge()
	for range 2 {
		g.wantChain()
		g.wantFill(g.r, 2, 0, 100)
		g.wantFill(g.r, 1, 100, 50)
		g.wantFill(g.r, 0, 150, 20)
		g.wantFill(g.r, 1, 170, 30)
		g.must(g.r.Count(g.ctx), "count")
		g.wantData(one, 80)
		g.wantData(g.chain.Layers[0], 100)
		_, err := g.r.OpenSnapshot(one)
		g.want(err, replica.ErrPruned, "open what was pruned")
		g.restart()
	}
}

// checkPruneBranch: what the head hides is still read by another snapshot, and stays.
func checkPruneBranch(g *rig) {
	g.fill(1, 0, 8)
	one := g.snapshot("one")
	g.fill(2, 0, 2)
	two := g.snapshot("two")
	g.revert(one)
	g.fill(3, 0, 8)
	g.must(g.r.Flush(), "flush")
	g.remove(one)
	g.purge()
	for range 2 {
		g.wantSnapshot(two, 2, 0, 2)
		g.wantSnapshot(two, 1, 2, 6)
		g.wantFill(g.r, 3, 0, 8)
		g.restart()
	}
}

func checkPurgePinned(g *rig) {
	g.fill(1, 0, 4)
	one := g.snapshot("one")
	g.fill(2, 0, 4)
	two := g.snapshot("two")
	g.revert(one)
	g.fill(3, 0, 4)
	d, err := g.r.OpenSnapshot(two)
	g.must(err, "open snapshot")
	e, err := g.r.OpenSnapshot(one)
	g.must(err, "open snapshot")
	g.remove(one)
	g.remove(two)
	g.purge()
	g.wantFill(d, 2, 0, 4)
	g.wantFill(e, 1, 0, 4)
	g.must(d.Close(), "close")
	g.want(d.Close(), block.ErrClosed, "close again")
	g.purge() // two goes, and now only the head stands on one, which is still open
	g.wantFill(e, 1, 0, 4)
	g.must(e.Close(), "close")
	g.purge()
	if g.hasLayer(two) || !g.hasLayer(one) {
		g.Errorf("after the purge there are %+v", g.status().Layers)
	}
	g.wantFill(g.r, 3, 0, 4)
	g.wantChain()
}

func checkMerge(g *rig) {
	g.fill(1, 0, 8)
	one := g.snapshot("one")
	g.fill(2, 2, 4)
	g.must(g.r.Zero(3*block.UnitBytes, block.UnitBytes), "zero")
	two := g.snapshot("two")
	g.fill(3, 4, 8)
	three := g.snapshot("three")
	g.fill(4, 5, 1)
	g.remove(one)
	d, err := g.r.OpenSnapshot(two) // a snapshot that is being read does not mind
	g.must(err, "open snapshot")
	into := g.merge(one, two)
	g.wantFill(d, 1, 0, 2)
	g.wantFill(d, 0, 3, 1)
	g.must(d.Close(), "close")
	g.fill(4, 6, 1)
	for range 2 {
		g.wantChain()
		if g.hasLayer(one) || g.hasLayer(two) || g.layer(into).Snapshot.Name != "two" || g.layer(three).Parent != into || g.layer(into).Parent != "" {
			g.Fatalf("after the merge there are %+v", g.status().Layers)
		}
		for _, d := range []replica.LayerID{into, three} {
			g.wantSnapshot(d, 1, 0, 2)
			g.wantSnapshot(d, 2, 2, 1)
			g.wantSnapshot(d, 0, 3, 1)
		}
		g.wantFill(g.r, 3, 4, 1)
		g.wantFill(g.r, 4, 5, 2)
		g.wantFill(g.r, 3, 7, 5)
		g.must(g.r.Change(g.ctx, g.w, replica.Change{Verb: replica.VerbMerge, Chain: g.chain, Merge: &replica.Merge{Lower: one, Upper: two, Into: into}}), "the same merge again")
		g.restart()
	}
	g.merge(into, three) // right below the head
	g.wantChain()
	g.wantFill(g.r, 2, 2, 1)
	g.wantFill(g.r, 4, 5, 2)
}

// checkMergeRun makes one layer of four.
func checkMergeRun(g *rig) {
	g.fill(9, 0, 16)
	bottom := g.snapshot("bottom")
	var run []replica.LayerID // uppermost first
	for i := range 4 {
		g.fill(byte(i+1), int64(i), 6)
		g.must(g.r.Zero(int64(i+10)*block.UnitBytes, block.UnitBytes), "zero")
		run = append([]replica.LayerID{g.snapshot(strconv.Itoa(i + 1))}, run...)
	}
	g.fill(7, 15, 1)
	for _, id := range run[1:] {
		g.remove(id)
	}
	c := g.badMerge(run[3], run[0])
	g.want(g.r.Change(g.ctx, g.w, c), replica.ErrChain, "merge that leaves out what is between")
	c.Merge.Between = []replica.LayerID{run[2], run[1]}
	g.want(g.r.Change(g.ctx, g.w, c), replica.ErrChain, "merge in the wrong order")
	into := g.merge(run[3], run[0], run[1], run[2])
	for range 2 {
		g.wantChain()
		if n := len(g.status().Layers); n != 3 || g.layer(into).Parent != bottom || g.layer(into).Snapshot.Name != "4" {
			g.Fatalf("after the merge there are %+v", g.status().Layers)
		}
		g.must(g.r.Count(g.ctx), "count")
		g.wantData(into, 9)
		for i := range int64(4) {
			g.wantSnapshot(into, byte(i+1), i, 1)
			g.wantSnapshot(into, 0, i+10, 1)
		}
		g.wantSnapshot(into, 4, 4, 5)
		g.wantSnapshot(into, 9, 9, 1)
		g.wantFill(g.r, 9, 14, 1)
		g.wantFill(g.r, 7, 15, 1)
		g.restart()
	}
}

// checkMergeBeside merges layers that the head does not stand on, and ones with several children.
func checkMergeBeside(g *rig) {
	g.fill(1, 0, 4)
	one := g.snapshot("one")
	g.fill(2, 0, 2)
	two := g.snapshot("two")
	g.fill(3, 0, 1)
	three := g.snapshot("three")
	g.revert(two)
	g.fill(4, 0, 1)
	four := g.snapshot("four")
	g.revert(one)
	g.fill(9, 3, 1)
	g.wantChain()
	g.want(g.r.Change(g.ctx, g.w, g.badMerge(two, three)), replica.ErrChain, "merge of a layer with two children")
	g.must(g.r.Purge(g.ctx, g.w, nil), "purge")
	g.remove(four)
	g.purge()
	g.remove(two)
	into := g.merge(two, three)
	g.restart()
	g.wantChain()
	g.wantSnapshot(into, 3, 0, 1)
	g.wantSnapshot(into, 2, 1, 1)
	g.wantSnapshot(into, 1, 2, 2)
	g.wantFill(g.r, 9, 3, 1)
	g.wantFill(g.r, 1, 0, 3)
}

// checkDiscard: what was discarded does not come back, whatever becomes of the layers.
func checkDiscard(g *rig) {
	g.fill(1, 0, 16)
	one := g.snapshot("one")
	g.must(g.r.Zero(0, 8*block.UnitBytes), "zero")
	two := g.snapshot("two")
	g.fill(2, 4, 1)
	g.must(g.r.Flush(), "flush")
	g.remove(one)
	g.remove(two)
	g.purge()
	g.merge(one, two)
	g.purge()
	for range 2 {
		g.wantFill(g.r, 0, 0, 4)
		g.wantFill(g.r, 2, 4, 1)
		g.wantFill(g.r, 0, 5, 3)
		g.wantFill(g.r, 1, 8, 8)
		g.restart()
	}
}

// model is what a copy should hold.
type model struct {
	*rig
	now   []byte
	snaps map[replica.LayerID][]byte
	marks map[replica.LayerID]bool // removed: their content is nobody's business any more
	names int
}

// checkModel does random things and compares everything with plain bytes.
func checkModel(g *rig) {
	seed := g.rand.Uint64()
	steps := g.conf.Steps
	if steps == 0 {
		steps = 150
	}
	if n, err := strconv.Atoi(os.Getenv("ASHLAR_STEPS")); err == nil && n > 1 {
		steps *= n
	}
	g.Logf("seed %d, %d steps", seed, steps)
	m := &model{rig: g, now: make([]byte, size), snaps: map[replica.LayerID][]byte{}, marks: map[replica.LayerID]bool{}}
	for range steps {
		m.step()
		if g.Failed() {
			return
		}
	}
	m.compare()
}

func (m *model) step() {
	units := int64(len(m.now) / block.UnitBytes)
	u := m.rand.Int64N(units)
	n := 1 + m.rand.Int64N(min(units-u, 8))
	switch k := m.rand.IntN(100); {
	case k < 45:
		b := byte(1 + m.rand.IntN(255))
		m.fill(b, u, n)
		copy(m.now[u*block.UnitBytes:], bytes.Repeat([]byte{b}, int(n*block.UnitBytes)))
	case k < 60:
		m.must(m.r.Zero(u*block.UnitBytes, n*block.UnitBytes), "zero")
		clear(m.now[u*block.UnitBytes : (u+n)*block.UnitBytes])
	case k < 66:
		m.must(m.r.Flush(), "flush")
	case k < 74:
		m.names++
		m.snaps[m.snapshot(strconv.Itoa(m.names))] = slices.Clone(m.now)
	case k < 79:
		m.randomRevert()
	case k < 86:
		m.randomRemove()
	case k < 92:
		m.randomMerge()
	case k < 95:
		m.purge()
		m.forget()
	case k < 97:
		m.restart()
	default:
		m.compare()
	}
}

// kept returns the snapshots that were not removed, in the order of the tree.
func (m *model) kept() []replica.LayerID {
	var ids []replica.LayerID
	for _, l := range m.status().Layers {
		if l.Snapshot != nil && !m.marks[l.ID] {
			ids = append(ids, l.ID)
		}
	}
	return ids
}

func (m *model) randomRevert() {
	if ids := m.kept(); len(ids) > 0 {
		id := ids[m.rand.IntN(len(ids))]
		m.revert(id)
		m.now = slices.Clone(m.snaps[id])
	}
}

func (m *model) randomRemove() {
	if ids := m.kept(); len(ids) > 0 {
		id := ids[m.rand.IntN(len(ids))]
		m.remove(id)
		m.marks[id] = true
	}
}

func (m *model) randomMerge() {
	children := map[replica.LayerID][]replica.LayerInfo{}
	layers := m.status().Layers
	for _, l := range layers {
		children[l.Parent] = append(children[l.Parent], l)
	}
	for _, l := range layers {
		c := children[l.ID]
		if l.Snapshot == nil || !l.Snapshot.Removed || len(c) != 1 || c[0].Head {
			continue
		}
		upper := c[0].ID
		var between []replica.LayerID
		for m.rand.IntN(3) > 0 { // further up, as far as that goes
			c := children[upper]
			if !m.marks[upper] || len(c) != 1 || c[0].Head {
				break
			}
			between = append([]replica.LayerID{upper}, between...)
			upper = c[0].ID
		}
		into := m.merge(l.ID, upper, between...)
		m.snaps[into], m.marks[into] = m.snaps[upper], m.marks[upper]
		m.forget()
		return
	}
}

// forget drops what is no longer in the tree.
func (m *model) forget() {
	for id := range m.snaps {
		if !m.hasLayer(id) {
			if !m.marks[id] && m.snaps[id] != nil && !m.merged(id) {
				m.Errorf("snapshot %s is gone although nobody removed it", id)
			}
			delete(m.snaps, id)
		}
	}
}

// merged tells whether a snapshot lives on in another layer.
func (m *model) merged(id replica.LayerID) bool {
	for other, content := range m.snaps {
		if other != id && m.hasLayer(other) && len(content) > 0 && len(m.snaps[id]) > 0 && &content[0] == &m.snaps[id][0] {
			return true
		}
	}
	return false
}

func (m *model) compare() {
	m.wantChain()
	got := make([]byte, len(m.now))
	_, err := m.r.ReadAt(got, 0)
	m.must(err, "read")
	m.same(got, m.now, "the present")
	for id, want := range m.snaps {
		if m.marks[id] {
			continue
		}
		d, err := m.r.OpenSnapshot(id)
		if errors.Is(err, replica.ErrNoSnapshot) {
			m.Errorf("snapshot %s is gone", id)
			continue
		}
		m.must(err, "open snapshot")
		_, err = d.ReadAt(got, 0)
		m.must(err, "read snapshot")
		m.same(got, want, "snapshot "+string(id))
		m.must(d.Close(), "close snapshot")
	}
}

func (m *model) same(got, want []byte, what string) {
	m.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			m.Fatalf("%s: byte %d of unit %d is %#x, want %#x", what, i%block.UnitBytes, i/block.UnitBytes, got[i], want[i])
		}
	}
}
