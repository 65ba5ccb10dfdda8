package layer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// MergeSpec says what Merge makes.
type MergeSpec struct {
	// Layers are those to be made one, uppermost first, each standing on the next: at least two, at most 2047, all sealed, none larger than the one above it.
	Layers []*Layer
	// Meta is the new layer's header. ID is new; State, Settled, Sums, DataBytes and Pruned are set by Merge.
	Meta     Meta
	Options  Options
	Progress func(doneBytes, totalBytes int64) // may be nil; total is the uppermost layer's size
}

// upper is the uppermost layer.
func (s *MergeSpec) upper() *Layer { return s.Layers[0] }

// check returns ErrState if the layers cannot be merged.
func (s *MergeSpec) check() error {
	if len(s.Layers) < 2 || len(s.Layers) > maxSlot {
		return fmt.Errorf("layer: merge %d layers: %w", len(s.Layers), ErrState)
	}
	for i, l := range s.Layers {
		if !l.sealed.Load() || i > 0 && l.sb.SizeBytes > s.Layers[i-1].sb.SizeBytes {
			return fmt.Errorf("layer: merge layer %s: not sealed, or larger than the one above it: %w", l.sb.ID, ErrState)
		}
	}
	return nil
}

// Merge makes one sealed and settled layer of several, durable with its name: of each unit what the uppermost layer has that has it. Extents are shared where the
// file system can, else copied and compared with their checksums (block.ErrCorrupt). The result has checksums if all have, or if it was copied;
// otherwise Settle makes them. A failure or a cancelled ctx leaves no file; a crash leaves one in state building. The layers stay as they are, and must not be pruned
// meanwhile.
func Merge(ctx context.Context, fsys disk.FS, name string, spec MergeSpec) (*Layer, error) {
	if err := spec.check(); err != nil {
		return nil, err
	}
	m := spec.Meta.clone()
	m.State, m.Settled, m.Sums, m.Failed, m.DataBytes, m.Pruned = StateBuilding, false, false, false, nil, false
	l, err := Create(fsys, name, m, spec.upper().sb.SizeBytes, spec.Options)
	if err != nil {
		return nil, err
	}
	g := &merger{ctx: ctx, spec: spec, into: l, share: true, summed: true, buf: make([]byte, sumChunk)}
	if err := g.run(); err != nil {
		err = fmt.Errorf("layer: merge %s and %d below it: %w", spec.upper().sb.ID, len(spec.Layers)-1, mapError(err))
		return nil, errors.Join(err, l.Close(), fsys.Remove(name), fsys.SyncDir(path.Dir(name)))
	}
	return l, nil
}

// merger is a Merge under way.
type merger struct {
	ctx    context.Context
	spec   MergeSpec
	into   *Layer
	share  bool // the file system has not refused to share extents yet
	summed bool // all Data so far has a checksum
	buf    []byte
	sums   [pageUnits]uint32 // of the page being made
}

func (g *merger) run() error {
	l := g.into
	for page := range l.mapPages() {
		if err := g.ctx.Err(); err != nil {
			return err
		}
		if err := g.page(page); err != nil {
			return err
		}
		if g.spec.Progress != nil {
			g.spec.Progress(min((page+1)*pageUnits*unitBytes, l.sb.SizeBytes), l.sb.SizeBytes)
		}
	}
	if err := l.f.Sync(); err != nil {
		return err
	}
	err := l.changeMeta(func(m *Meta) error {
		m.State, m.Settled, m.Sums, m.Pruned = StateSealed, true, g.summed, g.spec.upper().Meta().Pruned
		return l.noteCount(m)
	})
	if err != nil {
		return err
	}
	return l.f.Punch(l.sb.Log.Off, l.sb.Log.N)
}

// page makes one map page of the result, with its units and checksums.
func (g *merger) page(page int64) error {
	ld := loaders.Get().(*loader)
	defer loaders.Put(ld)
	ld.reset()
	found := false
	for i, l := range g.spec.Layers {
		has, err := l.hasPage(page)
		if err == nil && has {
			has, err = l.readPage(page, ld.codes[:])
		}
		if err != nil {
			return err
		}
		if has {
			found = true
			ld.overlay(i+1, l.sb.units()-page*pageUnits)
		}
	}
	if !found {
		return nil
	}
	clear(g.sums[:])
	var codes [pageBytes]byte
	units := int(min(pageUnits, g.into.sb.units()-page*pageUnits))
	for i := 0; i < units; {
		src, n := ld.sources[i], 1
		for i+n < units && ld.sources[i+n] == src {
			n++
		}
		if state := src.state(); state != block.Absent {
			setCodes(codes[:], i, n, state)
			if state == block.Data {
				if err := g.copy(g.spec.Layers[src.slot()-1], page*pageUnits+int64(i), int64(n)); err != nil {
					return err
				}
			}
		}
		i += n
	}
	if _, err := g.into.f.WriteAt(codes[:], g.into.sb.Map.Off+page*pageBytes); err != nil {
		return err
	}
	g.into.data.Add(countData(codes[:]))
	return g.into.writeSums(page, g.sums[:])
}

// copy takes n Data units of a layer over.
func (g *merger) copy(from *Layer, unit, n int64) error {
	src, dst := from.sb.Data.Off+unit*unitBytes, g.into.sb.Data.Off+unit*unitBytes
	if g.share {
		err := g.into.f.ShareFrom(from.f, src, dst, n*unitBytes)
		if err == nil {
			return g.takeSums(from, unit, n)
		}
		if !errors.Is(err, disk.ErrNotSupported) {
			return err
		}
		g.share = false
	}
	for n > 0 {
		p := g.buf[:min(n*unitBytes, int64(len(g.buf)))]
		if err := g.into.paced(g.ctx, 2*int64(len(p))); err != nil {
			return err
		}
		if _, err := from.f.ReadAt(p, from.sb.Data.Off+unit*unitBytes); err != nil {
			return err
		}
		if err := g.sum(from, unit, p); err != nil {
			return err
		}
		if _, err := g.into.f.WriteAt(p, g.into.sb.Data.Off+unit*unitBytes); err != nil {
			return err
		}
		done := int64(len(p)) / unitBytes
		unit, n = unit+done, n-done
	}
	return nil
}

// takeSums takes the checksums of shared units over; without them the result has none.
func (g *merger) takeSums(from *Layer, unit, n int64) error {
	if !from.summed.Load() {
		g.summed = false
		return nil
	}
	b := make([]byte, n*4)
	if _, err := from.f.ReadAt(b, from.sb.Sums.Off+unit*4); err != nil {
		return err
	}
	for i := range n {
		g.sums[(unit+i)%pageUnits] = binary.LittleEndian.Uint32(b[i*4:])
	}
	return nil
}

// sum notes the checksums of copied units, and compares them with those of their layer, so that rot is not made true.
func (g *merger) sum(from *Layer, unit int64, p []byte) error {
	var stored []byte
	if from.summed.Load() {
		stored = make([]byte, len(p)/unitBytes*4)
		if _, err := from.f.ReadAt(stored, from.sb.Sums.Off+unit*4); err != nil {
			return err
		}
	}
	for i := 0; i*unitBytes < len(p); i++ {
		got := unitSum(p[i*unitBytes : (i+1)*unitBytes])
		if stored != nil && got != binary.LittleEndian.Uint32(stored[i*4:]) {
			return fmt.Errorf("layer %s: unit %d: checksum %08x, stored %08x: %w", from.sb.ID, unit+int64(i), got, binary.LittleEndian.Uint32(stored[i*4:]), block.ErrCorrupt)
		}
		g.sums[(unit+int64(i))%pageUnits] = got
	}
	return nil
}

// writeSums writes the checksums of a map page, region by region, where there are any.
func (l *Layer) writeSums(page int64, sums []uint32) error {
	for r := range pageRegions {
		var b [regionUnits * 4]byte
		any := uint32(0)
		for i, s := range sums[r*regionUnits : (r+1)*regionUnits] {
			binary.LittleEndian.PutUint32(b[i*4:], s)
			any |= s
		}
		if any == 0 {
			continue
		}
		if _, err := l.f.WriteAt(b[:], l.sb.Sums.Off+(page*pageRegions+int64(r))*regionUnits*4); err != nil {
			return err
		}
	}
	return nil
}
