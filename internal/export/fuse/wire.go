package fuse

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// ErrMalformed: a message does not have the form the protocol gives it. The kernel sends none; it is checked all the same, because lengths in it become slices.
var ErrMalformed = errors.New("malformed FUSE message")

// Opcode says what the kernel asks for (enum fuse_opcode).
type Opcode uint32

// The requests that a file under a loop device gets, and those that take no reply. All others are answered with ENOSYS, which the kernel remembers.
const (
	OpForget      Opcode = 2 // no reply
	OpGetattr     Opcode = 3
	OpSetattr     Opcode = 4
	OpOpen        Opcode = 14
	OpRead        Opcode = 15
	OpWrite       Opcode = 16
	OpStatfs      Opcode = 17
	OpRelease     Opcode = 18
	OpFsync       Opcode = 20
	OpInit        Opcode = 26
	OpAccess      Opcode = 34
	OpInterrupt   Opcode = 36 // no reply is owed
	OpDestroy     Opcode = 38
	OpBatchForget Opcode = 42 // no reply
	OpFallocate   Opcode = 43
)

// Flags of INIT; those above bit 31 travel in flags2.
const (
	initAsyncRead = 1 << 0  // reads of one file may be sent at once
	initBigWrites = 1 << 5  // writes above a page
	initAsyncDIO  = 1 << 15 // direct I/O without a thread that waits: else a loop device has one request in flight
	initMaxPages  = 1 << 22 // max_pages is set
	initExt       = 1 << 30 // flags2 is there
	initHasResend = 1 << 39 // the kernel knows FUSE_NOTIFY_RESEND
)

// Flags of the reply to OPEN.
const (
	openDirectIO             = 1 << 0
	openNoFlush              = 1 << 5 // close of a descriptor sends nothing
	openParallelDirectWrites = 1 << 6
)

// Modes of FALLOCATE (linux/falloc.h).
const (
	fallocKeepSize  = 0x01
	fallocPunchHole = 0x02
	fallocZeroRange = 0x10
)

const (
	setattrSize = 1 << 3 // FATTR_SIZE

	notifyResend = 7 // enum fuse_notify_code

	// resentBit is set in the unique number of a request that was sent before, to this process or another.
	resentBit = 1 << 63

	protocolMajor = 7
	// protocolMinor is what this package was written to; minMinor has everything it needs: max_pages came with 28.
	protocolMinor = 45
	minMinor      = 28
)

const (
	inHeaderBytes  = 40
	writeInBytes   = 40
	headBytes      = inHeaderBytes + writeInBytes // what is read apart, so that a write's payload is aligned
	outHeaderBytes = 16
	attrBytes      = 88
	initOutBytes   = 64
	pageBytes      = 4096

	// MaxWriteBytes is the most that one READ or WRITE carries.
	MaxWriteBytes = 1 << 20
)

// Request is a message of the kernel, decoded. Fields that Op does not have are zero.
type Request struct {
	Op     Opcode
	Unique uint64 // a reply carries it unchanged
	Off    int64  // READ, WRITE, FALLOCATE; not negative
	N      int64  // the same: bytes; not negative, and Off+N does not overflow
	Mode   uint32 // FALLOCATE
	Valid  uint32 // SETATTR: what is to be set
	Major  uint32 // INIT
	Minor  uint32
	Flags  uint64 // INIT: flags and flags2
	Data   []byte // WRITE: the payload, within tail
}

// Resent tells whether the request was sent before: what it asks for may have been done already.
func (r Request) Resent() bool { return r.Unique&resentBit != 0 }

// Reply tells whether the kernel waits for an answer.
func (r Request) Reply() bool {
	return r.Op != OpForget && r.Op != OpBatchForget && r.Op != OpInterrupt
}

// Parse decodes one message, which was read into head (headBytes at most; less only if tail is empty) and on into tail.
// After ErrMalformed, Unique and Op are set if the message had a whole header: the request can be refused.
func Parse(head, tail []byte) (Request, error) {
	var r Request
	total := len(head) + len(tail)
	if len(head) < inHeaderBytes || len(head) > headBytes || (len(head) < headBytes && len(tail) > 0) {
		return r, fmt.Errorf("fuse: message of %d bytes: %w", total, ErrMalformed)
	}
	le := binary.LittleEndian
	r.Op, r.Unique = Opcode(le.Uint32(head[4:])), le.Uint64(head[8:])
	if n := le.Uint32(head); uint64(n) != uint64(total) {
		return r, fmt.Errorf("fuse: message of %d bytes says it has %d: %w", total, n, ErrMalformed)
	}
	args := head[inHeaderBytes:]
	if need := argBytes(r.Op); len(args) < need {
		return r, fmt.Errorf("fuse: request %d with %d bytes of arguments: %w", r.Op, len(args), ErrMalformed)
	}
	switch r.Op {
	case OpInit:
		r.Major, r.Minor = le.Uint32(args), le.Uint32(args[4:])
		r.Flags = uint64(le.Uint32(args[12:]))
		if r.Flags&initExt != 0 && len(args) >= 20 {
			r.Flags |= uint64(le.Uint32(args[16:])) << 32
		}
	case OpSetattr:
		r.Valid = le.Uint32(args)
	case OpRead, OpWrite:
		r.N = int64(le.Uint32(args[16:]))
		if err := r.place(le.Uint64(args[8:]), uint64(r.N)); err != nil {
			return r, err
		}
		if r.N > MaxWriteBytes || (r.Op == OpWrite && r.N != int64(len(tail))) {
			return r, fmt.Errorf("fuse: request %d of %d bytes with a payload of %d: %w", r.Op, r.N, len(tail), ErrMalformed)
		}
		if r.Op == OpWrite {
			r.Data = tail
		}
	case OpFallocate:
		r.Mode = le.Uint32(args[24:])
		return r, r.place(le.Uint64(args[8:]), le.Uint64(args[16:]))
	}
	return r, nil
}

// argBytes is how many bytes of arguments, of those in head, a request must have. INIT grew: 16 bytes is its oldest form.
func argBytes(op Opcode) int {
	switch op {
	case OpInit, OpFsync:
		return 16
	case OpFallocate:
		return 32
	case OpRead, OpWrite, OpSetattr:
		return 40
	}
	return 0
}

// place sets Off and N if they and their sum are offsets.
func (r *Request) place(off, n uint64) error {
	if off > math.MaxInt64 || n > math.MaxInt64-off {
		return fmt.Errorf("fuse: request %d for %d bytes at %d: %w", r.Op, n, off, ErrMalformed)
	}
	r.Off, r.N = int64(off), int64(n)
	return nil
}

// putOutHeader writes the header of a reply whose body has n bytes. A notification has a code in errno's place and unique 0.
func putOutHeader(b []byte, unique uint64, errno int32, n int) {
	le := binary.LittleEndian
	le.PutUint32(b, uint32(outHeaderBytes+n))
	le.PutUint32(b[4:], uint32(errno))
	le.PutUint64(b[8:], unique)
}

// putAttr writes attr_out: the file's attributes, which the kernel keeps for no time at all, so that a stat after a resize tells the new size.
func putAttr(b []byte, size int64, perm uint32) int {
	const at = 16 // attr_valid, attr_valid_nsec, dummy
	clear(b[:at+attrBytes])
	le := binary.LittleEndian
	le.PutUint64(b[at:], 1) // ino
	le.PutUint64(b[at+8:], uint64(size))
	le.PutUint64(b[at+16:], uint64((size+511)/512))
	const regular = 0o100000
	le.PutUint32(b[at+60:], regular|perm)
	le.PutUint32(b[at+64:], 1) // nlink
	le.PutUint32(b[at+80:], pageBytes)
	return at + attrBytes
}

// putInit writes the answer to INIT: background requests the kernel may have under way at once, and what was agreed on.
func putInit(b []byte, minor uint32, flags uint64, background int) int {
	clear(b[:initOutBytes])
	le := binary.LittleEndian
	le.PutUint32(b, protocolMajor)
	le.PutUint32(b[4:], min(minor, protocolMinor))
	le.PutUint32(b[12:], uint32(flags))
	le.PutUint16(b[16:], uint16(background))
	le.PutUint16(b[18:], uint16(background*3/4)) // congestion_threshold: the kernel's own proportion
	le.PutUint32(b[20:], MaxWriteBytes)
	le.PutUint32(b[24:], 1) // time_gran
	le.PutUint16(b[28:], MaxWriteBytes/pageBytes)
	le.PutUint32(b[32:], uint32(flags>>32))
	return initOutBytes
}
