package image

import (
	"context"
	"encoding/binary"
	"io"
	"slices"
)

// tableCheck walks every table of an image once, when it is opened, and refuses what a sane writer never makes:
//
//   - an L2 table, or a data cluster, that is used twice, or lies on the header or the L1 table. Loops are a case of this. Without snapshots' tables, which
//     are not read, each host cluster has one guest cluster in every image QEMU writes (refcounts above one are for snapshots),
//     so sharing is either damage or an amplifier: a small file that becomes a huge disk.
//   - two compressed clusters that begin at the same byte: the same amplifier. Streams that overlap without being equal are not looked for; they gain
//     nothing, because of the next rule.
//   - compressed clusters that would become more than Limits.Expand times the file, beyond a free GiB. An honest L2 entry of 8 bytes already stands for
//     up to 2 MiB, so this, and not the rule before, is what stops a decompression bomb.
//
// Its memory is a bit or two for each host cluster in the range that is used (at most 256 MiB, see maxHostClusters) and 8 bytes for each compressed cluster of a batch.
type tableCheck struct {
	decoder
	src    io.ReaderAt
	limits Limits

	exclusive  clusterSet // header, L1, L2 tables, uncompressed data: one owner each
	packed     clusterSet // clusters in which a compressed stream begins: many owners, all of them compressed
	starts     []int64    // of compressed streams, one batch
	compressed int64      // clusters
	received   int64      // bytes that came for this file
	refs       *hostRefs  // nil unless space is to be freed while converting
}

// startsBatch bounds tableCheck.starts to 32 MiB. Equal starts in different batches (of 256 GiB with the usual clusters) go unnoticed.
const startsBatch = 4 << 20

// run reads the L1 table and walks it. It returns the offset of each L2 table, 0 for none.
func (c *tableCheck) run(ctx context.Context) ([]int64, error) {
	raw := make([]byte, c.l1Entries*8)
	if _, err := c.src.ReadAt(raw, c.l1Off); err != nil {
		return nil, readFailed("L1 table", err)
	}
	c.exclusive.add(0) // the header is never longer than a cluster
	for off := c.l1Off; off < c.l1Off+c.l1Entries*8; off += c.clusterBytes() {
		c.exclusive.add(off >> c.clusterBits)
	}
	l1 := make([]int64, c.l1Entries)
	table := make([]byte, c.clusterBytes())
	for i := range l1 {
		var err error
		if l1[i], err = c.l2Table(binary.BigEndian.Uint64(raw[i*8:])); err != nil {
			return nil, err
		}
		if l1[i] == 0 {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := c.claim("L2 table", l1[i]); err != nil {
			return nil, err
		}
		if _, err := c.src.ReadAt(table, l1[i]); err != nil {
			return nil, readFailed("L2 table", err)
		}
		if err := c.walkTable(table, int64(i)*c.l2Span()); err != nil {
			return nil, err
		}
	}
	return l1, c.checkStarts()
}

// walkTable checks the entries of one L2 table, which maps the disk from guest on. Entries beyond the disk's end are left alone: no read reaches them.
func (c *tableCheck) walkTable(table []byte, guest int64) error {
	count := min(c.l2Span(), roundUp(c.size-guest, c.clusterBytes())) >> c.clusterBits
	for i := range count {
		e, err := c.decode(table, i, min(c.clusterBytes(), c.size-guest-i<<c.clusterBits))
		if err != nil {
			return err
		}
		switch {
		case e.kind == kindCompressed:
			err = c.addCompressed(e)
		case e.host != 0:
			err = c.claim("data cluster", e.host)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// claim takes a host cluster for one owner.
func (c *tableCheck) claim(what string, host int64) error {
	n := host >> c.clusterBits
	if c.packed.has(n) || !c.exclusive.add(n) {
		return refuse(ErrFormat, "the %s at %#x is used twice, or lies on another table; %s", what, host, flattenAdvice)
	}
	return nil
}

func (c *tableCheck) addCompressed(e entry) error {
	n := e.host >> c.clusterBits
	if c.exclusive.has(n) {
		return refuse(ErrFormat, "compressed data at %#x lies on a table or another cluster", e.host)
	}
	c.packed.add(n)
	c.refs.add(e.host, e.stored)
	c.compressed++
	free := freeExpandBytes >> c.clusterBits
	if c.compressed > free && (c.compressed-free) > c.received/c.clusterBytes()*c.limits.Expand+c.limits.Expand {
		return refuse(ErrTooLarge, "a file of %d bytes would unpack to more than %d times that", c.received, c.limits.Expand)
	}
	c.starts = append(c.starts, e.host)
	if len(c.starts) == startsBatch {
		return c.checkStarts()
	}
	return nil
}

// checkStarts looks for equal starts in the batch and begins a new one.
func (c *tableCheck) checkStarts() error {
	if !slices.IsSorted(c.starts) {
		slices.Sort(c.starts)
	}
	for i := 1; i < len(c.starts); i++ {
		if c.starts[i] == c.starts[i-1] {
			return refuse(ErrFormat, "the compressed cluster at %#x is used twice; %s", c.starts[i], flattenAdvice)
		}
	}
	c.starts = c.starts[:0]
	return nil
}

// clusterSet is a set of host cluster numbers, in pages so that memory follows what is used and not the file's length.
type clusterSet map[int64]*[clusterSetPage / 64]uint64

const clusterSetPage = 1 << 15

// add puts n in and tells whether it is new.
func (s clusterSet) add(n int64) bool {
	page := s[n/clusterSetPage]
	if page == nil {
		page = new([clusterSetPage / 64]uint64)
		s[n/clusterSetPage] = page
	}
	word, bit := n%clusterSetPage/64, uint64(1)<<(n%64)
	if page[word]&bit != 0 {
		return false
	}
	page[word] |= bit
	return true
}

func (s clusterSet) has(n int64) bool {
	page := s[n/clusterSetPage]
	return page != nil && page[n%clusterSetPage/64]&(1<<(n%64)) != 0
}
