package layer

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"ashlar/internal/block"
)

// The log's records: docs/formats/layer.md section 5.
const (
	recordMagic  = 0x474f4c41 // "ALOG"
	recordBytes  = 40         // a record's header
	startPayload = 32         // boot id and salt
	startBytes   = recordBytes + startPayload
	// logReserve is the end of a segment that writers leave to marks and the checkpoint record: two marks at most are made after
	// the last record that fits before it, because a mark is made only if it covers something.
	logReserve = 512
)

type recordKind uint8

const (
	kindStart recordKind = 1 + iota
	kindWrite
	kindZero
	kindMark
	kindCheckpoint
)

func (k recordKind) String() string {
	switch k {
	case kindStart:
		return "start"
	case kindWrite:
		return "write"
	case kindZero:
		return "zero"
	case kindMark:
		return "mark"
	case kindCheckpoint:
		return "checkpoint"
	}
	return "invalid"
}

// record is one record. For a mark unit is a seq, for a checkpoint a generation.
type record struct {
	gen     uint32
	seq     uint64
	kind    recordKind
	covered block.State
	count   uint32
	unit    uint64
	payload []byte
}

// paddedBytes is what a record with a payload of n bytes takes.
func paddedBytes(n int) int { return (recordBytes + n + 7) &^ 7 }

// appendRecord encodes r behind b. seed is the header CRC of the segment's start record, 0 for that record itself; the header CRC
// of r is returned.
func appendRecord(b []byte, r *record, seed uint32) ([]byte, uint32) {
	at := len(b)
	b = append(b, make([]byte, paddedBytes(len(r.payload)))...)
	h := b[at:]
	binary.LittleEndian.PutUint32(h, recordMagic)
	binary.LittleEndian.PutUint32(h[4:], r.gen)
	binary.LittleEndian.PutUint64(h[8:], r.seq)
	h[16], h[17] = byte(r.kind), byte(r.covered)
	binary.LittleEndian.PutUint32(h[20:], r.count)
	binary.LittleEndian.PutUint64(h[24:], r.unit)
	if len(r.payload) > 0 {
		binary.LittleEndian.PutUint32(h[32:], crc32.Checksum(r.payload, castagnoli))
	}
	sum := crc32.Update(seed, castagnoli, h[:36])
	binary.LittleEndian.PutUint32(h[36:], sum)
	copy(h[recordBytes:], r.payload)
	return b, sum
}

// decodeRecord reads the record that b begins with; ok says whether it is whole and obeys every rule that can be checked without knowing
// what came before it. units bounds the units it may name.
func decodeRecord(b []byte, seed uint32, units int64) (r record, sum uint32, ok bool) {
	if len(b) < recordBytes || binary.LittleEndian.Uint32(b) != recordMagic {
		return r, 0, false
	}
	sum = binary.LittleEndian.Uint32(b[36:])
	if crc32.Update(seed, castagnoli, b[:36]) != sum {
		return r, 0, false
	}
	r = record{
		gen: binary.LittleEndian.Uint32(b[4:]), seq: binary.LittleEndian.Uint64(b[8:]),
		kind: recordKind(b[16]), covered: block.State(b[17]),
		count: binary.LittleEndian.Uint32(b[20:]), unit: binary.LittleEndian.Uint64(b[24:]),
	}
	n := 0
	switch r.kind {
	case kindStart:
		n = startPayload
		ok = r.count == 0 && r.unit == 0
	case kindWrite, kindZero:
		ok = r.count > 0 && r.count <= pageUnits && r.unit < uint64(units) && uint64(r.count) <= uint64(units)-r.unit &&
			r.unit/pageUnits == (r.unit+uint64(r.count)-1)/pageUnits && r.covered <= block.Data
		if r.kind == kindWrite {
			n = int(r.count) * 4
		}
	case kindMark:
		ok = r.unit < r.seq
	case kindCheckpoint:
		ok = r.unit < uint64(r.gen)
	}
	if !ok || len(b) < paddedBytes(n) || b[18]|b[19] != 0 {
		return r, 0, false
	}
	payloadSum := uint32(0)
	if n > 0 {
		r.payload = b[recordBytes : recordBytes+n : recordBytes+n]
		payloadSum = crc32.Checksum(r.payload, castagnoli)
	}
	return r, sum, payloadSum == binary.LittleEndian.Uint32(b[32:])
}

// unitSum returns the CRC that a write record holds of its i-th unit.
func (r *record) unitSum(i int) uint32 { return binary.LittleEndian.Uint32(r.payload[4*i:]) }

// segment is what a half of the log holds.
type segment struct {
	gen        uint32
	boot       BootID
	seed       uint32
	first      uint64   // seq of its start record
	last       uint64   // seq of its last record
	tail       int64    // bytes up to the end of its last record
	records    []record // kinds write and zero, in order
	mark       uint64   // the highest mark; 0 if none
	checkpoint int64    // the highest generation a checkpoint record names; -1 if none
}

// parseSegment reads a half of the log. nil if it does not begin with a start record. ErrCorrupt if a record is broken of which a later
// mark says that it was on the medium: then it is rot, and no torn tail.
func parseSegment(b []byte, units int64) (*segment, error) {
	r, seed, ok := decodeRecord(b, 0, units)
	if !ok || r.kind != kindStart || r.gen == 0 {
		return nil, nil
	}
	s := &segment{gen: r.gen, seed: seed, first: r.seq, last: r.seq, tail: startBytes, checkpoint: -1}
	copy(s.boot[:], r.payload)
	for {
		r, _, ok := decodeRecord(b[s.tail:], seed, units)
		if !ok || r.kind == kindStart || r.gen != s.gen || r.seq != s.last+1 {
			break
		}
		s.last = r.seq
		s.tail += int64(paddedBytes(len(r.payload)))
		switch r.kind {
		case kindWrite, kindZero:
			s.records = append(s.records, r)
		case kindMark:
			s.mark = max(s.mark, r.unit)
		case kindCheckpoint:
			s.checkpoint = max(s.checkpoint, int64(r.unit))
		}
	}
	magic := binary.LittleEndian.AppendUint32(nil, recordMagic)
	for at := s.tail; at+recordBytes <= int64(len(b)); at += 8 {
		next := bytes.Index(b[at:], magic) // a log is nearly all zeroes, and this passes over them many at a time
		if next < 0 {
			break
		}
		if at += int64(next) &^ 7; next%8 != 0 || at+recordBytes > int64(len(b)) { // records begin at multiples of 8
			continue
		}
		r, _, ok := decodeRecord(b[at:], seed, units)
		if ok && r.kind == kindMark && r.gen == s.gen && r.unit > s.last {
			return nil, fmt.Errorf("log: record %d is broken, but was on the medium before record %d: %w", s.last+1, r.seq, block.ErrCorrupt)
		}
	}
	return s, nil
}

// chooseSegments returns what must be replayed, oldest first: docs/formats/layer.md section 5, opening, step 1. s0 and s1 are the halves.
func chooseSegments(s0, s1 *segment) ([]*segment, error) {
	newer, older := s0, s1
	if newer == nil || older != nil && older.gen > newer.gen {
		newer, older = older, newer
	}
	if newer == nil {
		return nil, fmt.Errorf("log: neither segment has a start: %w", block.ErrCorrupt)
	}
	if newer.complete() {
		return []*segment{newer}, nil
	}
	if older == nil || !older.complete() || older.gen+1 != newer.gen {
		return nil, fmt.Errorf("log: generation %d begins where another has ended, which is not there: %w", newer.gen, block.ErrCorrupt)
	}
	if newer.first != older.last+1 {
		if newer.mark > older.last {
			return nil, fmt.Errorf("log: record %d is broken, but was on the medium before generation %d: %w", older.last+1, newer.gen, block.ErrCorrupt)
		}
		return []*segment{older}, nil // the older one's tail was lost, so nothing in the newer was ever flushed
	}
	return []*segment{older, newer}, nil
}

// complete says that nothing before s is needed.
func (s *segment) complete() bool { return s.checkpoint >= int64(s.gen)-1 }
