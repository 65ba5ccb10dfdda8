package layer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// Problem is something Check found.
type Problem struct {
	Name  string `json:"name"`            // the file
	Unit  int64  `json:"unit,omitempty"`  // where, if it is about units: the first of
	Units int64  `json:"units,omitempty"` // so many
	Text  string `json:"text"`
}

// String says it in a line.
func (p Problem) String() string {
	if p.Units > 0 {
		return fmt.Sprintf("%s: units %d to %d: %s", p.Name, p.Unit, p.Unit+p.Units-1, p.Text)
	}
	return fmt.Sprintf("%s: %s", p.Name, p.Text)
}

// maxProblems bounds what Check lists of one file.
const maxProblems = 1000

// Check looks deeply at layer files, head first if there are several, and changes nothing: superblock, header, log, every code of the map, every checksum,
// and whether the files fit over each other. It returns what is wrong; the error is for what kept it from looking. It takes no lock: the
// sealed layers of a stack in use can be checked, its head only while nobody writes.
func Check(ctx context.Context, fsys disk.FS, names []string) ([]Problem, error) {
	c := &checker{ctx: ctx, fsys: fsys}
	for i, name := range names {
		if err := c.file(name, i == 0); err != nil {
			return c.list, fmt.Errorf("layer: check %s: %w", name, err)
		}
	}
	return c.list, nil
}

// checker is a Check under way.
type checker struct {
	ctx   context.Context
	fsys  disk.FS
	list  []Problem
	count int // problems of this file

	above  string // the file above this one
	parent ID     // its parent
	size   int64  // its size
}

func (c *checker) add(p Problem) {
	if c.count++; c.count <= maxProblems {
		c.list = append(c.list, p)
	}
}

// file checks one file.
func (c *checker) file(name string, top bool) error {
	c.count = 0
	l, err := Open(c.fsys, name, Options{ReadOnly: true, Salvage: true})
	if errors.Is(err, block.ErrCorrupt) || errors.Is(err, ErrVersion) {
		c.add(Problem{Name: name, Text: err.Error()})
		c.above, c.parent = "", ""
		return nil
	}
	if err != nil {
		return err
	}
	c.header(l, top)
	err = c.units(l)
	return errors.Join(err, l.Close())
}

// header checks what a header says of itself and of its neighbours.
func (c *checker) header(l *Layer, top bool) {
	m := l.meta
	if m.Failed {
		c.add(Problem{Name: l.name, Text: "a flush failed on it: opening needs salvage"})
	}
	if m.State == StateBuilding {
		c.add(Problem{Name: l.name, Text: "its making was not completed"})
	}
	if !top && m.State != StateSealed {
		c.add(Problem{Name: l.name, Text: fmt.Sprintf("lies below another layer and is %s", m.State)})
	}
	if c.above != "" && c.parent != m.ID {
		c.add(Problem{Name: c.above, Text: fmt.Sprintf("its parent is %q, and below it lies %s", c.parent, m.ID)})
	}
	if c.above != "" && c.size < l.sb.SizeBytes {
		c.add(Problem{Name: l.name, Text: fmt.Sprintf("has %d bytes, the layer above it only %d", l.sb.SizeBytes, c.size)})
	}
	c.above, c.parent, c.size = l.name, m.Parent, l.sb.SizeBytes
}

// units checks the map, and all Data units against their checksums.
func (c *checker) units(l *Layer) error {
	codes := make([]byte, pageBytes)
	for page := range l.mapPages() {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		has, err := l.hasPage(page)
		if err != nil {
			return err
		}
		if !has {
			continue
		}
		if _, err = l.readPage(page, codes); errors.Is(err, block.ErrCorrupt) {
			c.add(Problem{Name: l.name, Text: err.Error()})
			continue
		}
		if err != nil {
			return err
		}
		for u := l.sb.units() - page*pageUnits; u >= 0 && u < pageUnits; u++ {
			if codeAt(codes, int(u)) != block.Absent {
				c.add(Problem{Name: l.name, Unit: page*pageUnits + u, Units: 1, Text: "has a state beyond the layer's end"})
				break
			}
		}
		if err := c.sums(l, page); err != nil {
			return err
		}
	}
	return nil
}

// sums compares the Data units of a map page with their checksums; without checksums they are only read.
func (c *checker) sums(l *Layer, page int64) error {
	buf := make([]byte, sumChunk)
	for r := page * pageRegions; r < (page+1)*pageRegions && r*regionUnits < l.sb.units(); r++ {
		var sums [regionUnits * 4]byte
		if l.summed.Load() {
			if err := l.readSums(r*regionUnits, sums[:]); err != nil {
				return err
			}
		}
		var bad Problem
		err := l.eachData(r, buf, func(unit int64, p []byte) error {
			for ; len(p) > 0; p, unit = p[unitBytes:], unit+1 {
				if !l.summed.Load() || unitSum(p[:unitBytes]) == binary.LittleEndian.Uint32(sums[unit%regionUnits*4:]) {
					continue
				}
				if bad.Units > 0 && bad.Unit+bad.Units == unit {
					bad.Units++
					continue
				}
				if bad.Units > 0 {
					c.add(bad)
				}
				bad = Problem{Name: l.name, Unit: unit, Units: 1, Text: "bytes do not match their checksum"}
			}
			return c.ctx.Err()
		})
		if bad.Units > 0 {
			c.add(bad)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
