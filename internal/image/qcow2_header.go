package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Numbers of the qcow2 format; see "docs/interop/qcow2.txt" in QEMU's source.
const (
	v2HeaderBytes = 72
	v3HeaderBytes = 104
	// headerReadBytes covers all fields known here: the last is the compression type at 104.
	headerReadBytes = 112

	minClusterBits    = 9
	maxClusterBits    = 21
	minExtL2Bits      = 14 // an extended L2 entry has 32 subclusters of at least 512 bytes
	maxL1Bytes        = 32 << 20
	maxHostClusters   = int64(1) << 30 // bounds the memory of the table check at 128 MiB
	maxExtensions     = 256
	maxExtensionBytes = 64 << 10

	incompatDirty       = 1 << 0
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4
	incompatKnown       = incompatDirty | incompatCorrupt | incompatDataFile | incompatCompression | incompatExtendedL2

	extEnd        = 0
	extEncryption = 0x0537be77
	extDataFile   = 0x44415441
)

const flattenAdvice = `make one whole file of it first: "qemu-img convert -O qcow2 IN OUT"`

// header is the part of a qcow2 header that reading needs, after every field was checked.
type header struct {
	version     uint32
	clusterBits uint
	size        int64 // virtual, bytes
	l1Off       int64
	l1Entries   int64 // those that map the virtual disk; later ones hold VM state and are not read
	extendedL2  bool
	zstd        bool // compressed clusters are zstd, not deflate
}

func (h *header) clusterBytes() int64 { return 1 << h.clusterBits }

// entryBytes is the size of an L2 entry.
func (h *header) entryBytes() int64 {
	if h.extendedL2 {
		return 16
	}
	return 8
}

// l2Span is how many bytes of the disk one L2 table maps.
func (h *header) l2Span() int64 { return h.clusterBytes() / h.entryBytes() * h.clusterBytes() }

// refuse makes every error of this file and the next.
func refuse(sentinel error, format string, args ...any) error {
	return fmt.Errorf("qcow2: %s: %w", fmt.Sprintf(format, args...), sentinel)
}

// readHeader reads and checks a qcow2 header in a file of fileBytes. Nothing beyond the header's cluster is looked at.
//
// Dirty images (an unclean shutdown with lazy refcounts) are accepted, because refcounts are not needed to read. Images marked corrupt
// are refused: their tables are known to be wrong. Internal snapshots and bitmaps are ignored; the active disk is what is read.
func readHeader(src io.ReaderAt, fileBytes int64, limits Limits) (*header, error) {
	b := make([]byte, headerReadBytes)
	n, err := src.ReadAt(b[:min(int64(len(b)), fileBytes)], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("qcow2: read header: %w", err)
	}
	if n < v2HeaderBytes {
		return nil, refuse(ErrTruncated, "the file is %d bytes, a header is at least %d", fileBytes, v2HeaderBytes)
	}
	if string(b[:4]) != qcowMagic {
		return nil, refuse(ErrFormat, "the magic is missing")
	}
	h := &header{version: binary.BigEndian.Uint32(b[4:])}
	headerBytes := int64(v2HeaderBytes)
	switch h.version {
	case 2:
	case 3:
		if headerBytes, err = h.readV3(b[:n]); err != nil {
			return nil, err
		}
	default:
		return nil, refuse(ErrUnsupported, "version is %d, known are 2 and 3; %s", h.version, convertAdvice)
	}
	if err := h.readCommon(b, fileBytes, limits); err != nil {
		return nil, err
	}
	if headerBytes > h.clusterBytes() {
		return nil, refuse(ErrFormat, "header_length is %d, more than a cluster (%d)", headerBytes, h.clusterBytes())
	}
	if h.extendedL2 && h.clusterBits < minExtL2Bits {
		return nil, refuse(ErrFormat, "extended L2 entries need clusters of 16 KiB or more, these are %d bytes", h.clusterBytes())
	}
	if err := h.locateL1(b, fileBytes); err != nil {
		return nil, err
	}
	return h, checkExtensions(src, headerBytes, min(h.clusterBytes(), fileBytes))
}

// readV3 checks the fields that version 3 added and returns the header's length.
func (h *header) readV3(b []byte) (int64, error) {
	if len(b) < v3HeaderBytes {
		return 0, refuse(ErrTruncated, "the file ends inside its header")
	}
	incompatible := binary.BigEndian.Uint64(b[72:])
	length := int64(binary.BigEndian.Uint32(b[100:]))
	switch {
	case incompatible&incompatDataFile != 0:
		return 0, refuse(ErrUnsupported, "the data is in another file (external data file); %s", flattenAdvice)
	case incompatible&incompatCorrupt != 0:
		return 0, refuse(ErrFormat, `the image is marked corrupt; repair it first: "qemu-img check -r all FILE"`)
	case incompatible&^uint64(incompatKnown) != 0:
		return 0, refuse(ErrUnsupported, "unknown incompatible features %#x; %s", incompatible&^uint64(incompatKnown), convertAdvice)
	case length < v3HeaderBytes || length%8 != 0:
		return 0, refuse(ErrFormat, "header_length is %d, want a multiple of 8 from %d on", length, v3HeaderBytes)
	}
	if order := binary.BigEndian.Uint32(b[96:]); order > 6 {
		return 0, refuse(ErrFormat, "refcount_order is %d, the most is 6", order)
	}
	h.extendedL2 = incompatible&incompatExtendedL2 != 0
	var compression byte
	if length > v3HeaderBytes {
		if len(b) <= v3HeaderBytes {
			return 0, refuse(ErrTruncated, "the file ends inside its header")
		}
		compression = b[104]
	}
	if compression > 1 {
		return 0, refuse(ErrUnsupported, "unknown compression type %d; %s", compression, convertAdvice)
	}
	h.zstd = compression == 1
	if h.zstd != (incompatible&incompatCompression != 0) {
		return 0, refuse(ErrFormat, "compression type %d and incompatible features %#x contradict each other", compression, incompatible)
	}
	return length, nil
}

// readCommon checks the fields that both versions have.
func (h *header) readCommon(b []byte, fileBytes int64, limits Limits) error {
	be := binary.BigEndian
	if off := be.Uint64(b[8:]); off != 0 {
		// The reason this check is ours and comes first: following the name would read any file of this host into the guest.
		return refuse(ErrUnsupported, "the image names a backing file, and no other file is ever read; %s", flattenAdvice)
	}
	if method := be.Uint32(b[32:]); method != 0 {
		return refuse(ErrUnsupported, "the image is encrypted (method %d); decrypt it first", method)
	}
	bits := be.Uint32(b[20:])
	if bits < minClusterBits || bits > maxClusterBits {
		return refuse(ErrFormat, "cluster_bits is %d, want %d to %d", bits, minClusterBits, maxClusterBits)
	}
	h.clusterBits = uint(bits)
	size := be.Uint64(b[24:])
	if size == 0 {
		return refuse(ErrFormat, "the disk is empty (0 bytes)")
	}
	if size > uint64(limits.VirtualBytes) {
		return refuse(ErrTooLarge, "the disk is %d bytes, the limit is %d", size, limits.VirtualBytes)
	}
	h.size = int64(size)
	if fileBytes>>h.clusterBits > maxHostClusters {
		return refuse(ErrTooLarge, "a file of %d bytes with clusters of %d; %s", fileBytes, h.clusterBytes(), flattenAdvice)
	}
	table := be.Uint64(b[48:])
	tableBytes := int64(be.Uint32(b[56:])) << h.clusterBits
	// Refcounts are not used, but a header that lies about one table is not believed about the others.
	return h.checkTable("refcount table", table, tableBytes, fileBytes)
}

// locateL1 checks that the L1 table is large enough for the disk and lies in the file.
func (h *header) locateL1(b []byte, fileBytes int64) error {
	entries := int64(binary.BigEndian.Uint32(b[36:]))
	h.l1Entries = (h.size + h.l2Span() - 1) / h.l2Span()
	if h.l1Entries*8 > maxL1Bytes || entries*8 > maxL1Bytes {
		return refuse(ErrTooLarge, "the L1 table has %d entries and needs %d, the limit is %d; use larger clusters: "+
			`"qemu-img convert -O qcow2 -o cluster_size=65536 IN OUT"`, entries, h.l1Entries, maxL1Bytes/8)
	}
	if entries < h.l1Entries {
		return refuse(ErrFormat, "l1_size is %d, a disk of %d bytes needs %d", entries, h.size, h.l1Entries)
	}
	off := binary.BigEndian.Uint64(b[40:])
	if err := h.checkTable("L1 table", off, entries*8, fileBytes); err != nil {
		return err
	}
	if off == 0 {
		return refuse(ErrFormat, "the L1 table lies on the header")
	}
	h.l1Off = int64(off)
	return nil
}

// checkTable wants a table to begin at a cluster and end in the file.
func (h *header) checkTable(what string, off uint64, n, fileBytes int64) error {
	if off%uint64(h.clusterBytes()) != 0 {
		return refuse(ErrFormat, "the %s's offset %#x is not a multiple of the cluster size", what, off)
	}
	if off > uint64(fileBytes) || n > fileBytes-int64(off) {
		return refuse(ErrTruncated, "the %s, %d bytes at %#x, ends beyond the file's %d bytes", what, n, off, fileBytes)
	}
	return nil
}

// checkExtensions walks the header extensions in [off, end) and refuses those that would make the content something else. The
// others (feature names, bitmaps, a backing format without a backing file) may be ignored by definition.
func checkExtensions(src io.ReaderAt, off, end int64) error {
	var b [8]byte
	for count := 0; off+8 <= end; count++ {
		if count == maxExtensions {
			return refuse(ErrFormat, "more than %d header extensions", maxExtensions)
		}
		if _, err := src.ReadAt(b[:], off); err != nil {
			return readFailed("header extensions", err)
		}
		kind, n := binary.BigEndian.Uint32(b[:]), int64(binary.BigEndian.Uint32(b[4:]))
		switch kind {
		case extEnd:
			return nil
		case extEncryption:
			return refuse(ErrUnsupported, "the image is encrypted (LUKS header); decrypt it first")
		case extDataFile:
			return refuse(ErrUnsupported, "the image names an external data file; %s", flattenAdvice)
		}
		if n > maxExtensionBytes || n > end-off-8 {
			return refuse(ErrFormat, "header extension %#x claims %d bytes at %#x, beyond its cluster", kind, n, off)
		}
		off += 8 + roundUp(n, 8)
	}
	return nil
}

// readFailed wraps an error of reading inside the file's known length: an end there means that the file shrank.
func readFailed(what string, err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return refuse(ErrTruncated, "the %s could not be read whole", what)
	}
	return fmt.Errorf("qcow2: read %s: %w", what, err)
}
