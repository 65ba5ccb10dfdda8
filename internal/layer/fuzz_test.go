package layer

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

func FuzzSuperblock(f *testing.F) {
	sb := newSuperblock("000102030405060708090a0b0c0d0e0f", 1<<30, segmentBytes)
	f.Add(sb.encode(), sb.fileBytes())
	f.Add(sb.encode(), sb.fileBytes()-1)
	sb.Version = 2
	f.Add(sb.encode(), sb.fileBytes())
	f.Add([]byte(superMagic), int64(1<<20))
	f.Fuzz(func(t *testing.T, b []byte, fileBytes int64) {
		// The checksum is made right, so that what lies behind it is tried too.
		if len(b) >= superBytes {
			b = bytes.Clone(b[:superBytes])
			binary.LittleEndian.PutUint32(b[superBytes-4:], unitSum(b[:superBytes-4]))
		}
		sb, err := decodeSuperblock(b, fileBytes)
		if err != nil {
			if !errors.Is(err, block.ErrCorrupt) && !errors.Is(err, ErrVersion) {
				t.Fatalf("error without a sentinel: %v", err)
			}
			return
		}
		last := int64(superBytes)
		for _, r := range sb.ranges() {
			if r.Off < last || r.N <= 0 || r.end() > fileBytes || r.end() < r.Off {
				t.Fatalf("accepted %+v in a file of %d bytes", sb, fileBytes)
			}
			last = r.end()
		}
		if again, err := decodeSuperblock(sb.encode(), fileBytes); err != nil || again != sb {
			t.Fatalf("%+v became %+v: %v", sb, again, err)
		}
	})
}

func FuzzHeader(f *testing.F) {
	m := testMeta()
	m.Snapshot = &Snapshot{Name: "s", Labels: map[string]string{"a": "b"}}
	b, err := json.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"id":"000102030405060708090a0b0c0d0e0f","kind":"image","state":"sealed","settled":true,"future":{"x":[1]},"image":{"name":"i"}}`))
	f.Add([]byte(`{"id":"x"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeMeta(b)
		if err != nil {
			if !errors.Is(err, block.ErrCorrupt) {
				t.Fatalf("error without a sentinel: %v", err)
			}
			return
		}
		once, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		again, err := decodeMeta(once)
		if err != nil {
			t.Fatalf("%s became %s: %v", b, once, err)
		}
		twice, err := json.Marshal(again)
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%s became %s: %v", once, twice, err)
		}
	})
}

const fuzzSegment = 8 << 10

// FuzzLog opens a layer whose log is any bytes.
func FuzzLog(f *testing.F) {
	b, seed := appendRecord(nil, &record{gen: 1, seq: 1, kind: kindStart, payload: make([]byte, startPayload)}, 0)
	b, _ = appendRecord(b, &record{gen: 1, seq: 2, kind: kindCheckpoint}, seed)
	f.Add(b)
	b, _ = appendRecord(b, &record{gen: 1, seq: 3, kind: kindWrite, unit: 3, count: 2, payload: make([]byte, 8)}, seed)
	b, _ = appendRecord(b, &record{gen: 1, seq: 4, kind: kindMark, unit: 3}, seed)
	b, _ = appendRecord(b, &record{gen: 1, seq: 5, kind: kindZero, unit: 4, count: 1, covered: block.Data}, seed)
	f.Add(b)
	f.Add(append(append(bytes.Clone(b), make([]byte, fuzzSegment-len(b))...), b...))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) { openFuzzed(t, b) })
}

// FuzzRecords opens a layer whose log is made of records with right checksums and any fields: 16 bytes of input each.
func FuzzRecords(f *testing.F) {
	f.Add([]byte("\x02\x00\x01\x00\x00\x00\x00\x01\x02\x00\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x03\x02\xff\x00\x00\x00\x00\x01\x02\x00\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x01\x03\x00\x00\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, in []byte) {
		b, seed := appendRecord(nil, &record{gen: 1, seq: 1, kind: kindStart, payload: make([]byte, startPayload)}, 0)
		b, _ = appendRecord(b, &record{gen: 1, seq: 2, kind: kindCheckpoint}, seed)
		seq := uint64(2)
		for ; len(in) >= 16 && len(b) < fuzzSegment-200; in = in[16:] {
			seq += uint64(in[7])
			r := record{gen: 1 + uint32(in[6]>>6), seq: seq, kind: recordKind(in[0]), covered: block.State(in[1]),
				count: uint32(binary.LittleEndian.Uint16(in[2:])), unit: binary.LittleEndian.Uint64(in[8:])}
			if r.kind == kindWrite {
				r.payload = make([]byte, 4*min(r.count, 8))
			}
			b, _ = appendRecord(b, &r, seed)
		}
		openFuzzed(t, b)
	})
}

// openFuzzed opens a layer with that log in every way, and uses it.
func openFuzzed(t *testing.T, log []byte) {
	mem := disk.NewMem(disk.MemOptions{})
	o := Options{BootID: testBoot, limits: limits{segmentBytes: fuzzSegment, inline: true}}
	l, err := Create(mem, "x", testMeta(), 2*pageUnits*unitBytes, o)
	if err != nil {
		t.Fatal(err)
	}
	b := append(log[:min(len(log), 2*fuzzSegment):min(len(log), 2*fuzzSegment)], make([]byte, 2*fuzzSegment)...)[:2*fuzzSegment]
	if _, err := l.f.WriteAt(b, l.sb.Log.Off); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, o := range []Options{{ReadOnly: true}, {ReadOnly: true, BootID: BootID{}}, {BootID: BootID{7}, limits: o.limits}} {
		l, err := Open(mem, "x", o)
		if err != nil {
			if !errors.Is(err, block.ErrCorrupt) {
				t.Fatalf("error without a sentinel: %v", err)
			}
			continue
		}
		s := ownedStack(t, []*Layer{l}, StackOptions{})
		p := make([]byte, 64*unitBytes)
		if _, err := s.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
		if !o.ReadOnly {
			if _, err := s.WriteAt(p, 8*unitBytes); err != nil {
				t.Fatal(err)
			}
			if err := s.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
