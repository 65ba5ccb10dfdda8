package image

import (
	"encoding/binary"
	"math/bits"
)

// kind says what an L2 entry, or a part of one, makes of the guest bytes it maps.
type kind uint8

const (
	kindAbsent     kind = iota
	kindZero            // reads as zero
	kindData            // stored as they are
	kindCompressed      // stored as one deflate or zstd stream for the whole cluster
	kindSplit           // extended L2: each of 32 subclusters is absent, zero or data
)

// entry is a decoded L2 entry.
type entry struct {
	kind        kind
	host        int64  // where in the file; for kindZero, 0 or a preallocated cluster
	stored      int64  // kindCompressed: how many bytes from host on may belong to the stream, clipped to the file
	alloc, zero uint32 // kindSplit: a bit a subcluster
}

const (
	l1OffsetMask   = uint64(0x00fffffffffffe00)
	l1ReservedMask = uint64(0x7f000000000001ff)
	l2Compressed   = uint64(1) << 62
	l2OffsetMask   = uint64(0x00fffffffffffe00)
	l2ReservedMask = uint64(0x3f000000000001fe)
	l2ZeroFlag     = uint64(1)
)

// decoder turns table entries into what they mean, refusing those that are not aligned, not in the file or contradictory. It is used when an image is
// opened and again at each read, so that a file that changes in between misleads nobody.
type decoder struct {
	*header
	fileBytes int64
}

// l2Table returns where the L2 table of an L1 entry lies, or 0 for none.
func (d decoder) l2Table(l1 uint64) (int64, error) {
	if l1&l1ReservedMask != 0 {
		return 0, refuse(ErrFormat, "L1 entry %#x has reserved bits set", l1)
	}
	off := l1 & l1OffsetMask
	if off == 0 {
		return 0, nil
	}
	return int64(off), d.checkTable("L2 table", off, d.clusterBytes(), d.fileBytes)
}

// decode reads the entry at index of an L2 table. need is how many of the cluster's bytes belong to the disk: less than a cluster only for
// the disk's last, which may also be cut off in the file.
func (d decoder) decode(table []byte, index, need int64) (entry, error) {
	raw := binary.BigEndian.Uint64(table[index*d.entryBytes():])
	var bitmap uint64
	if d.extendedL2 {
		bitmap = binary.BigEndian.Uint64(table[index*16+8:])
	}
	if raw == 0 && bitmap == 0 {
		return entry{}, nil
	}
	if raw&l2Compressed != 0 {
		if bitmap != 0 {
			return entry{}, refuse(ErrFormat, "compressed L2 entry %#x has a subcluster bitmap", raw)
		}
		return d.decodeCompressed(raw)
	}
	host := raw & l2OffsetMask
	if raw&l2ReservedMask != 0 || raw&l2ZeroFlag != 0 && (d.extendedL2 || d.version < 3) {
		return entry{}, refuse(ErrFormat, "L2 entry %#x has reserved bits set", raw)
	}
	if host%uint64(d.clusterBytes()) != 0 {
		return entry{}, refuse(ErrFormat, "L2 entry %#x does not point to the start of a cluster", raw)
	}
	e := entry{kind: kindData, host: int64(host)}
	if d.extendedL2 {
		return d.decodeSplit(e, bitmap, need)
	}
	if raw&l2ZeroFlag != 0 {
		e.kind, need = kindZero, 0
	} else if host == 0 {
		return entry{}, refuse(ErrFormat, "L2 entry %#x points to the header", raw)
	}
	return e, d.checkCluster(e.host, need)
}

// decodeSplit finishes a standard entry of an image with extended L2 entries.
func (d decoder) decodeSplit(e entry, bitmap uint64, need int64) (entry, error) {
	e.kind, e.alloc, e.zero = kindSplit, uint32(bitmap), uint32(bitmap>>32)
	if e.alloc&e.zero != 0 {
		return entry{}, refuse(ErrFormat, "subcluster bitmap %#x says both allocated and zero", bitmap)
	}
	if e.alloc != 0 && e.host == 0 {
		return entry{}, refuse(ErrFormat, "an L2 entry points to the header")
	}
	last := int64(bits.Len32(e.alloc)) * (d.clusterBytes() / 32)
	return e, d.checkCluster(e.host, min(need, last))
}

func (d decoder) checkCluster(host, need int64) error {
	if host > 0 && (host >= d.fileBytes || need > d.fileBytes-host) {
		return refuse(ErrTruncated, "an L2 entry points to %#x, the file ends at %#x", host, d.fileBytes)
	}
	return nil
}

// decodeCompressed: the low bits are the stream's place in the file, to the byte, and above them is the number of 512-byte sectors it
// touches beyond the first.
func (d decoder) decodeCompressed(raw uint64) (entry, error) {
	offsetBits := 62 - (d.clusterBits - 8)
	host := raw & (1<<offsetBits - 1)
	sectors := raw >> offsetBits & (1<<(d.clusterBits-8) - 1)
	if host >= uint64(d.fileBytes) {
		return entry{}, refuse(ErrTruncated, "compressed L2 entry %#x points to %#x, the file ends at %#x", raw, host, d.fileBytes)
	}
	end := min(int64(host/512+sectors+1)*512, d.fileBytes)
	return entry{kind: kindCompressed, host: int64(host), stored: end - int64(host)}, nil
}
