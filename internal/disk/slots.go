package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"
)

// ErrNoRecord: neither slot holds a whole record. Nothing was ever stored there, or what was is destroyed.
var ErrNoRecord = errors.New("no valid record in either slot")

// ErrTooLarge: the record does not fit into a slot. Nothing was changed.
var ErrTooLarge = errors.New("record too large for its slot")

// SlotHeaderBytes is what a slot needs besides its payload.
const SlotHeaderBytes = 32

// slotMagic begins a slot that was ever written.
const slotMagic = "ASHSLOT1"

// Slots keeps one record in two places of a file so that a power cut never takes both: the newest is never overwritten, and
// the other place is used only once the newest is known to be durable. Format: docs/formats/slots.md.
//
// A slot is, with all integers little-endian:
//
//	 0  8  "ASHSLOT1"
//	 8  8  sequence number, from 1; the valid slot with the higher one is the record
//	16  4  n, the length of the payload
//	20  4  CRC-32C of bytes 0 to 20, 8 zero bytes and the payload
//	24  8  zero
//	32  n  payload
//	    …  zeros to the next multiple of 4096
//
// Methods may be called concurrently; a Store and another's Sync of the file too.
type Slots struct {
	f         File
	off       int64
	slotBytes int64

	mu      sync.Mutex // guards what follows
	seq     uint64     // of the newest record written or loaded; 0 if none
	loaded  bool
	current int   // the slot the newest record is in
	durable bool  // the newest record is known to be on the medium
	hasBase bool  // the slot other than current holds a record that is on the medium
	torn    bool  // the last write to current failed half done
	failed  error // a Sync failed: what the medium has is not known until the file is opened again
}

// OpenSlots gives access to the record kept in [off, off + 2*slotBytes) of f. Both must be multiples of 4096, so that no sector,
// page or disk block is shared with anything else. It does no I/O.
func OpenSlots(f File, off, slotBytes int64) *Slots {
	if off < 0 || off%4096 != 0 || slotBytes <= 0 || slotBytes%4096 != 0 {
		panic(fmt.Sprintf("disk: slots of %d bytes at %d are not multiples of 4096", slotBytes, off))
	}
	return &Slots{f: f, off: off, slotBytes: slotBytes}
}

// MaxPayload returns how long a record may be.
func (s *Slots) MaxPayload() int { return int(s.slotBytes) - SlotHeaderBytes }

// Load returns the newest whole record and its sequence number, or ErrNoRecord. The record may not be durable yet, when the
// process that wrote it died before its Sync. An I/O error on either slot is returned: the newest record may be in it.
func (s *Slots) Load() (payload []byte, seq uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.load()
}

func (s *Slots) load() (payload []byte, seq uint64, err error) {
	current := 0
	for i := range 2 {
		b := make([]byte, s.slotBytes)
		if _, err := s.f.ReadAt(b, s.place(i)); err != nil && !errors.Is(err, io.EOF) {
			return nil, 0, fmt.Errorf("disk: read slot %d: %w", i, err)
		}
		if p, q, ok := DecodeSlot(b); ok && q > seq {
			payload, seq, current = p, q, i
		}
	}
	if !s.loaded {
		s.loaded, s.seq, s.current = true, seq, current
	}
	if seq == 0 {
		return nil, 0, fmt.Errorf("disk: slots at %d: %w", s.off, ErrNoRecord)
	}
	return payload, seq, nil
}

func (s *Slots) place(slot int) int64 { return s.off + int64(slot)*s.slotBytes }

// Store replaces the record and returns once the new one survives a power cut. Until then either the previous or the new one is there.
// After an error the previous or the new one is there, and after a failed Sync every later Store fails with the same error.
func (s *Slots) Store(payload []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.write(payload); err != nil {
		return err
	}
	if err := s.sync(); err != nil {
		return err
	}
	s.durable = true
	return nil
}

// Write is Store without the Sync at its end, for a caller who syncs the file anyway and then calls Synced with the sequence number that
// Write returned. Until then further Writes replace the same slot, so that the last durable record stays.
func (s *Slots) Write(payload []byte) (seq uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.write(payload); err != nil {
		return 0, err
	}
	return s.seq, nil
}

// Synced says that a Sync of the file, begun after the Write that returned seq, has succeeded. It means nothing if another Write came between.
func (s *Slots) Synced(seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if seq == s.seq && !s.torn {
		s.durable = true
	}
}

// sync makes the file durable; the lock is held.
func (s *Slots) sync() error {
	if err := s.f.Sync(); err != nil {
		s.failed = fmt.Errorf("disk: slots at %d: %w", s.off, err)
		return s.failed
	}
	return nil
}

func (s *Slots) write(payload []byte) error {
	if s.failed != nil {
		return s.failed
	}
	if len(payload) > s.MaxPayload() {
		return fmt.Errorf("disk: store %d bytes in a slot of %d: %w", len(payload), s.slotBytes, ErrTooLarge)
	}
	if !s.loaded {
		if _, _, err := s.load(); err != nil && !errors.Is(err, ErrNoRecord) {
			return err
		}
	}
	target := s.current
	switch {
	case s.seq == 0, !s.durable && s.hasBase:
		// Nothing there yet, or our own last record, which is not durable: the durable one is in the other slot.
	case !s.durable:
		// Found at opening. Its writer may have died before its Sync: if it were not durable and the other slot were torn now, a
		// power cut would leave neither.
		if err := s.sync(); err != nil {
			return err
		}
		fallthrough
	default:
		target = 1 - s.current
	}
	s.hasBase = s.hasBase || target != s.current
	s.current, s.durable = target, false
	s.seq++
	_, err := s.f.WriteAt(EncodeSlot(payload, s.seq), s.place(target))
	s.torn = err != nil
	if err != nil {
		return fmt.Errorf("disk: write slot %d: %w", target, err)
	}
	return nil
}

// slotSum returns the checksum of the slot that b begins with; its length field must have been checked.
func slotSum(b []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli) // made once by the library
	sum := crc32.Update(0, table, b[:20])
	sum = crc32.Update(sum, table, make([]byte, 8))
	return crc32.Update(sum, table, b[SlotHeaderBytes:SlotHeaderBytes+int(binary.LittleEndian.Uint32(b[16:]))])
}

// EncodeSlot returns the bytes of a slot, a multiple of 4096.
func EncodeSlot(payload []byte, seq uint64) []byte {
	b := make([]byte, (SlotHeaderBytes+len(payload)+4095)/4096*4096)
	copy(b, slotMagic)
	binary.LittleEndian.PutUint64(b[8:], seq)
	binary.LittleEndian.PutUint32(b[16:], uint32(len(payload)))
	copy(b[SlotHeaderBytes:], payload)
	binary.LittleEndian.PutUint32(b[20:], slotSum(b))
	return b
}

// DecodeSlot returns the payload and the sequence number of the slot that b begins with, or false when it holds no whole record.
// The payload is part of b.
func DecodeSlot(b []byte) (payload []byte, seq uint64, ok bool) {
	if len(b) < SlotHeaderBytes || string(b[:8]) != slotMagic || !bytes.Equal(b[24:32], make([]byte, 8)) {
		return nil, 0, false
	}
	n := binary.LittleEndian.Uint32(b[16:])
	if int64(n) > int64(len(b)-SlotHeaderBytes) || slotSum(b) != binary.LittleEndian.Uint32(b[20:]) {
		return nil, 0, false
	}
	seq = binary.LittleEndian.Uint64(b[8:])
	return b[SlotHeaderBytes : SlotHeaderBytes+int(n)], seq, seq != 0
}
