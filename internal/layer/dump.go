package layer

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

// DumpOptions say what Dump prints.
type DumpOptions struct {
	JSON bool // one JSON document instead of text
	Map  bool // also every run of the map
	Log  bool // also every record of the log
}

// dumped is what Dump prints: the JSON document.
type dumped struct {
	Name           string           `json:"name"`
	FileBytes      int64            `json:"fileBytes"`
	AllocatedBytes int64            `json:"allocatedBytes"`
	Superblock     *Superblock      `json:"superblock,omitempty"`
	Header         *Meta            `json:"header,omitempty"`
	Log            []dumpedSegment  `json:"log,omitempty"`
	Units          map[string]int64 `json:"units,omitempty"` // by state, as the map on disk and the log say together
	Map            []dumpedRun      `json:"map,omitempty"`
	Problems       []string         `json:"problems,omitempty"`

	foreign error // why it is no layer file at all
}

type dumpedSegment struct {
	Half       int            `json:"half"`
	Generation uint32         `json:"generation"`
	BootID     string         `json:"bootID"`
	FirstSeq   uint64         `json:"firstSeq"`
	LastSeq    uint64         `json:"lastSeq"`
	Bytes      int64          `json:"bytes"`
	Mark       uint64         `json:"mark"`       // the highest; 0 if none
	Checkpoint int64          `json:"checkpoint"` // the highest generation; -1 if none
	Records    []dumpedRecord `json:"records,omitempty"`
}

type dumpedRecord struct {
	Seq     uint64 `json:"seq"`
	Kind    string `json:"kind"`
	Covered string `json:"coveredState"`
	Unit    uint64 `json:"unit"`
	Count   uint32 `json:"count"`
}

type dumpedRun struct {
	Unit  int64  `json:"unit"`
	N     int64  `json:"n"`
	State string `json:"state"`
}

// Dump prints what a layer file holds. It changes nothing, takes no lock, and goes on past damage, which it prints. The error is for what kept it from
// reading or printing, and block.ErrCorrupt or ErrVersion for a file that is no layer file of a known version, once that little is printed.
func Dump(w io.Writer, fsys disk.FS, name string, o DumpOptions) error {
	f, err := fsys.OpenRead(name)
	if err != nil {
		return fmt.Errorf("layer: dump: %w", err)
	}
	d := &dumped{Name: name}
	err = errors.Join(d.file(f, o), f.Close())
	if err == nil && d.Superblock != nil {
		err = d.units(fsys, name, o)
	}
	if err == nil && o.JSON {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		err = enc.Encode(d)
	} else if err == nil {
		err = d.print(w)
	}
	if err == nil {
		err = d.foreign
	}
	if err != nil {
		return fmt.Errorf("layer: dump %s: %w", name, err)
	}
	return nil
}

func (d *dumped) problem(err error) { d.Problems = append(d.Problems, err.Error()) }

// file reads superblock, header and log.
func (d *dumped) file(f disk.File, o DumpOptions) error {
	var err error
	if d.FileBytes, err = f.Size(); err != nil {
		return err
	}
	if d.AllocatedBytes, err = f.Allocated(); err != nil {
		return err
	}
	sb, m, err := readHeader(f)
	if err != nil {
		d.problem(err)
	}
	if sb.Data.N == 0 {
		d.foreign = err // not even a superblock
		return nil
	}
	d.Superblock = &sb
	if m.ID == "" {
		return nil
	}
	if d.Header = &m; m.Settled {
		return nil
	}
	for half := range 2 {
		b := make([]byte, sb.segBytes())
		if _, err := f.ReadAt(b, sb.Log.Off+int64(half)*sb.segBytes()); err != nil {
			return err
		}
		s, err := parseSegment(b, sb.units())
		if err != nil {
			d.problem(err)
		}
		if s != nil {
			d.Log = append(d.Log, dumpSegment(half, s, o.Log))
		}
	}
	return nil
}

func dumpSegment(half int, s *segment, records bool) dumpedSegment {
	out := dumpedSegment{
		Half: half, Generation: s.gen, BootID: hex.EncodeToString(s.boot[:]), FirstSeq: s.first, LastSeq: s.last,
		Bytes: s.tail, Mark: s.mark, Checkpoint: s.checkpoint,
	}
	for i := 0; records && i < len(s.records); i++ {
		r := &s.records[i]
		out.Records = append(out.Records, dumpedRecord{Seq: r.seq, Kind: r.kind.String(), Covered: r.covered.String(), Unit: r.unit, Count: r.count})
	}
	return out
}

// units reads the states of all units, as recovery would find them.
func (d *dumped) units(fsys disk.FS, name string, o DumpOptions) error {
	l, err := Open(fsys, name, Options{ReadOnly: true, Salvage: true})
	if err != nil {
		d.problem(err)
		return nil
	}
	d.Units = map[string]int64{}
	err = l.eachRun(0, l.sb.units(), func(unit, n int64, s block.State) error {
		d.Units[s.String()] += n
		if k := len(d.Map) - 1; k >= 0 && d.Map[k].Unit+d.Map[k].N == unit && d.Map[k].State == s.String() {
			d.Map[k].N += n
		} else if o.Map && s != block.Absent {
			d.Map = append(d.Map, dumpedRun{unit, n, s.String()})
		}
		return nil
	})
	if err != nil {
		d.problem(err)
	}
	return l.Close()
}

// print writes d for people.
func (d *dumped) print(w io.Writer) error {
	p := &printer{w: w}
	p.f("file        %s\nlength      %d bytes, of which %d are allocated\n", d.Name, d.FileBytes, d.AllocatedBytes)
	if sb := d.Superblock; sb != nil {
		p.f("superblock  version %d, layer %s, %d bytes in %d units\n", sb.Version, sb.ID, sb.SizeBytes, sb.units())
		for i, r := range sb.ranges() {
			p.f("  %-9s %d bytes at %d\n", [...]string{"slots", "log", "map", "sums", "data"}[i], r.N, r.Off)
		}
	}
	if d.Header != nil {
		b, err := json.MarshalIndent(d.Header, "            ", "  ")
		if err != nil {
			return err
		}
		p.f("header      %s\n", b)
	}
	for _, s := range d.Log {
		p.f("log         half %d: generation %d, boot %s, records %d to %d in %d bytes, mark %d, checkpoint %d\n", s.Half, s.Generation, s.BootID, s.FirstSeq, s.LastSeq, s.Bytes, s.Mark, s.Checkpoint)
		for _, r := range s.Records {
			p.f("  %8d  %-5s units %d to %d, before: %s\n", r.Seq, r.Kind, r.Unit, r.Unit+uint64(r.Count)-1, r.Covered)
		}
	}
	if d.Units != nil {
		p.f("units       %d data, %d zero, %d absent\n", d.Units["data"], d.Units["zero"], d.Units["absent"])
	}
	for _, r := range d.Map {
		p.f("  %-5s units %d to %d\n", r.State, r.Unit, r.Unit+r.N-1)
	}
	for _, text := range d.Problems {
		p.f("PROBLEM     %s\n", text)
	}
	return p.err
}

// printer remembers the first error.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) f(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, args...)
	}
}
