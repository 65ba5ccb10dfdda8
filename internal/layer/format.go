package layer

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"

	"ashlar/internal/block"
)

// The layout of a layer file: docs/formats/layer.md section 2.
const (
	superMagic   = "ASHLAYER"
	version      = 1
	superBytes   = 4096
	slotsOff     = 64 << 10
	slotBytes    = 32 << 10
	logOff       = 1 << 20
	segmentBytes = 4 << 20
	mapOff       = 16 << 20
	regionAlign  = 1 << 20

	// MaxSizeBytes is the largest disk a layer can describe.
	MaxSizeBytes = 15 << 40

	unitBytes   = block.UnitBytes
	pageBytes   = 4096          // a map page
	pageUnits   = pageBytes * 4 // the units whose states it holds
	regionUnits = 1024          // the units of one region of the map in memory, and of one page of sums
	pageRegions = pageUnits / regionUnits
	regionCodes = regionUnits / 4 // bytes of a map page that a region takes
)

// castagnoli is made once by the library and never changes.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Range is a part of a file.
type Range struct {
	Off int64 `json:"off"`
	N   int64 `json:"n"`
}

func (r Range) end() int64 { return r.Off + r.N }

// FormatVersion is the highest version of a layer file that this program reads, and the one it writes; it reads those below as well.
const FormatVersion = version

// Superblock is the first 4096 bytes of a layer file, written once: section 2 of docs/formats/layer.md.
type Superblock struct {
	Version   uint32 `json:"version"`
	ID        ID     `json:"id"`
	SizeBytes int64  `json:"sizeBytes"`
	Slots     Range  `json:"slots"`
	Log       Range  `json:"log"`
	Map       Range  `json:"map"`
	Sums      Range  `json:"sums"`
	Data      Range  `json:"data"`
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }

// newSuperblock lays out a file for a disk of sizeBytes.
func newSuperblock(id ID, sizeBytes, segBytes int64) Superblock {
	units := sizeBytes / unitBytes
	sb := Superblock{Version: version, ID: id, SizeBytes: sizeBytes}
	sb.Slots = Range{slotsOff, 2 * slotBytes}
	sb.Log = Range{logOff, 2 * segBytes}
	sb.Map = Range{mapOff, roundUp((units+3)/4, regionAlign)}
	sb.Sums = Range{sb.Map.end(), roundUp(units*4, regionAlign)}
	sb.Data = Range{sb.Sums.end(), sizeBytes}
	return sb
}

func (sb *Superblock) units() int64 { return sb.SizeBytes / unitBytes }

func (sb *Superblock) fileBytes() int64 { return sb.Data.end() }

func (sb *Superblock) segBytes() int64 { return sb.Log.N / 2 }

func (sb *Superblock) ranges() []*Range {
	return []*Range{&sb.Slots, &sb.Log, &sb.Map, &sb.Sums, &sb.Data}
}

func (sb *Superblock) encode() []byte {
	b := make([]byte, superBytes)
	copy(b, superMagic)
	binary.LittleEndian.PutUint32(b[8:], sb.Version)
	binary.LittleEndian.PutUint32(b[12:], superBytes)
	raw, err := hex.DecodeString(string(sb.ID))
	if err != nil || len(raw) != 16 {
		panic("layer: superblock with a malformed id")
	}
	copy(b[16:], raw)
	binary.LittleEndian.PutUint64(b[32:], uint64(sb.SizeBytes))
	at := 40
	for _, r := range sb.ranges() {
		binary.LittleEndian.PutUint64(b[at:], uint64(r.Off))
		binary.LittleEndian.PutUint64(b[at+8:], uint64(r.N))
		at += 16
	}
	binary.LittleEndian.PutUint32(b[superBytes-4:], crc32.Checksum(b[:superBytes-4], castagnoli))
	return b
}

// decodeSuperblock reads a superblock of a file of fileBytes. ErrCorrupt or ErrVersion.
func decodeSuperblock(b []byte, fileBytes int64) (Superblock, error) {
	var sb Superblock
	if len(b) < superBytes || string(b[:8]) != superMagic {
		return sb, fmt.Errorf("superblock: no layer file: %w", block.ErrCorrupt)
	}
	sb.Version = binary.LittleEndian.Uint32(b[8:])
	if sb.Version > version {
		return sb, fmt.Errorf("superblock: file has version %d, this program knows up to %d: %w", sb.Version, version, ErrVersion)
	}
	if got, want := crc32.Checksum(b[:superBytes-4], castagnoli), binary.LittleEndian.Uint32(b[superBytes-4:]); got != want {
		return sb, fmt.Errorf("superblock: checksum %08x, stored %08x: %w", got, want, block.ErrCorrupt)
	}
	sb.ID = ID(hex.EncodeToString(b[16:32]))
	sb.SizeBytes = int64(binary.LittleEndian.Uint64(b[32:]))
	at := 40
	for _, r := range sb.ranges() {
		r.Off = int64(binary.LittleEndian.Uint64(b[at:]))
		r.N = int64(binary.LittleEndian.Uint64(b[at+8:]))
		at += 16
	}
	if err := sb.check(binary.LittleEndian.Uint32(b[12:]), fileBytes); err != nil {
		return sb, fmt.Errorf("superblock: %w: %w", err, block.ErrCorrupt)
	}
	return sb, nil
}

// check holds every number of a superblock against the others and the file's length.
func (sb *Superblock) check(headerBytes uint32, fileBytes int64) error {
	if sb.Version == 0 || headerBytes != superBytes {
		return fmt.Errorf("version %d with a header of %d bytes", sb.Version, headerBytes)
	}
	if sb.SizeBytes < unitBytes || sb.SizeBytes > MaxSizeBytes || sb.SizeBytes%unitBytes != 0 {
		return fmt.Errorf("size %d", sb.SizeBytes)
	}
	after := int64(superBytes)
	for i, r := range sb.ranges() {
		if r.Off < after || r.N <= 0 || r.Off%pageBytes != 0 || r.N%pageBytes != 0 || r.N > fileBytes || r.Off > fileBytes-r.N {
			return fmt.Errorf("region %d at %d, %d bytes, in a file of %d", i, r.Off, r.N, fileBytes)
		}
		after = r.end()
	}
	units := sb.units()
	switch {
	case sb.Slots.N != 2*slotBytes:
		return fmt.Errorf("slots of %d bytes", sb.Slots.N)
	case sb.Log.N%(2*pageBytes) != 0 || sb.Log.N > 1<<30:
		return fmt.Errorf("log of %d bytes", sb.Log.N)
	case sb.Map.N < (units+3)/4:
		return fmt.Errorf("map of %d bytes for %d units", sb.Map.N, units)
	case sb.Sums.N < units*4:
		return fmt.Errorf("sums of %d bytes for %d units", sb.Sums.N, units)
	case sb.Data.N != sb.SizeBytes:
		return fmt.Errorf("data of %d bytes for a size of %d", sb.Data.N, sb.SizeBytes)
	}
	return nil
}

// codeAt returns the state of unit i of a map page or a part of one; 3 is invalid.
func codeAt(codes []byte, i int) block.State {
	return block.State(codes[i>>2] >> (uint(i) & 3 * 2) & 3)
}

// setCode sets it.
func setCode(codes []byte, i int, s block.State) {
	shift := uint(i) & 3 * 2
	codes[i>>2] = codes[i>>2]&^(3<<shift) | byte(s)<<shift
}

// setCodes sets n units from i on.
func setCodes(codes []byte, i, n int, s block.State) {
	for ; n > 0 && i&3 != 0; i, n = i+1, n-1 {
		setCode(codes, i, s)
	}
	for ; n >= 4; i, n = i+4, n-4 {
		codes[i>>2] = byte(s) * 0x55
	}
	for ; n > 0; i, n = i+1, n-1 {
		setCode(codes, i, s)
	}
}
