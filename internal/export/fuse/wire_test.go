package fuse

import (
	"encoding/binary"
	"errors"
	"testing"
)

// message builds a request as the kernel does.
func message(op Opcode, unique uint64, args ...any) []byte {
	b := make([]byte, inHeaderBytes)
	for _, a := range args {
		b, _ = binary.Append(b, binary.LittleEndian, a)
	}
	binary.LittleEndian.PutUint32(b, uint32(len(b)))
	binary.LittleEndian.PutUint32(b[4:], uint32(op))
	binary.LittleEndian.PutUint64(b[8:], unique)
	return b
}

// split is how a message arrives: its first bytes apart.
func split(m []byte) (head, tail []byte) {
	n := min(len(m), headBytes)
	return m[:n:n], m[n:]
}

// readIn and writeIn are struct fuse_read_in and fuse_write_in.
func rangeIn(off uint64, n uint32) []any {
	return []any{uint64(1), off, n, uint32(0), uint64(0), uint32(0), uint32(0)}
}

func TestParse(t *testing.T) {
	for _, c := range []struct {
		name string
		msg  []byte
		want Request
	}{
		{"read", message(OpRead, 6, rangeIn(4096, 512)...), Request{Op: OpRead, Unique: 6, Off: 4096, N: 512}},
		{"write", message(OpWrite, 8|resentBit, append(rangeIn(1<<40, 4), []byte("abcd"))...), Request{Op: OpWrite, Unique: 8 | resentBit, Off: 1 << 40, N: 4, Data: []byte("abcd")}},
		{"fallocate", message(OpFallocate, 2, uint64(1), uint64(8192), uint64(1<<33), uint32(3), uint32(0)), Request{Op: OpFallocate, Unique: 2, Off: 8192, N: 1 << 33, Mode: 3}},
		{"fsync", message(OpFsync, 4, uint64(1), uint64(0)), Request{Op: OpFsync, Unique: 4}},
		{"init", message(OpInit, 2, uint32(7), uint32(45), uint32(0), uint32(initExt), uint32(1<<7), make([]byte, 44)), Request{Op: OpInit, Unique: 2, Major: 7, Minor: 45, Flags: initExt | initHasResend}},
		{"old init", message(OpInit, 2, uint32(7), uint32(12), uint32(0), uint32(1)), Request{Op: OpInit, Unique: 2, Major: 7, Minor: 12, Flags: 1}},
		{"setattr, longer than a head", message(OpSetattr, 2, uint32(setattrSize), make([]byte, 84)), Request{Op: OpSetattr, Unique: 2, Valid: setattrSize}},
		{"unknown", message(999, 2), Request{Op: 999, Unique: 2}},
	} {
		got, err := Parse(split(c.msg))
		if err != nil || string(got.Data) != string(c.want.Data) {
			t.Errorf("%s: %+v, %v", c.name, got, err)
		}
		got.Data, c.want.Data = nil, nil
		if got.Op != c.want.Op || got.Unique != c.want.Unique || got.Off != c.want.Off || got.N != c.want.N || got.Mode != c.want.Mode ||
			got.Major != c.want.Major || got.Minor != c.want.Minor || got.Flags != c.want.Flags || got.Valid != c.want.Valid {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
	if !(Request{Unique: 8 | resentBit}).Resent() || (Request{Unique: 8}).Resent() {
		t.Error("what was sent again is not told by bit 63")
	}
}

func TestMalformed(t *testing.T) {
	long := message(OpRead, 6, rangeIn(0, 512)...)
	binary.LittleEndian.PutUint32(long, 4000)
	for name, m := range map[string][]byte{
		"empty": nil, "half a header": make([]byte, 20), "a length that lies": long,
		"short arguments":    message(OpRead, 2, uint64(0)),
		"too long a read":    message(OpRead, 2, rangeIn(0, MaxWriteBytes+1)...),
		"short payload":      message(OpWrite, 2, append(rangeIn(0, 8), []byte("abcd"))...),
		"long payload":       message(OpWrite, 2, append(rangeIn(0, 2), []byte("abcd"))...),
		"negative offset":    message(OpWrite, 2, append(rangeIn(1<<63, 4), []byte("abcd"))...),
		"end beyond offsets": message(OpFallocate, 2, uint64(1), uint64(1<<62), uint64(1<<62), uint64(3)),
	} {
		if r, err := Parse(split(m)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}

// FuzzParse: no message makes Parse panic, or return what does not lie within the message or the offsets there are.
func FuzzParse(f *testing.F) {
	f.Add(message(OpRead, 6, rangeIn(4096, 512)...))
	f.Add(message(OpWrite, 8|resentBit, append(rangeIn(1<<40, 4), []byte("abcd"))...))
	f.Add(message(OpFallocate, 2, uint64(1), uint64(8192), uint64(1<<33), uint32(3), uint32(0)))
	f.Add(message(OpInit, 2, uint32(7), uint32(45), uint32(0), uint32(initExt), uint32(1<<7), make([]byte, 44)))
	f.Fuzz(func(t *testing.T, m []byte) {
		r, err := Parse(split(m))
		if err != nil {
			if !errors.Is(err, ErrMalformed) || r.Data != nil {
				t.Errorf("%+v, %v", r, err)
			}
			return
		}
		if r.Off < 0 || r.N < 0 || r.Off+r.N < 0 || (r.Op == OpWrite && int64(len(r.Data)) != r.N) || (r.Op == OpRead && r.N > MaxWriteBytes) {
			t.Errorf("%+v", r)
		}
	})
}
