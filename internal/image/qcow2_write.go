package image

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"sync"

	"ashlar/internal/block"
)

// Qcow2Options says how a qcow2 file is written; the zero value gives clusters of 64 KiB, not compressed.
type Qcow2Options struct {
	// Compress is "", "zlib" (every QEMU reads it) or "zstd" (QEMU 5.1 and later).
	Compress string
	// ClusterBytes is a power of two from 4096 to 2 MiB; 0 means 65536.
	ClusterBytes int64
	// Progress, if not nil, is called from one goroutine at a time, never backwards.
	Progress func(doneBytes, totalBytes int64)
}

const (
	defaultClusterBytes = 64 * kib
	// minWriteClusterBytes is a unit: with less, a unit would have several entries for nothing.
	minWriteClusterBytes = block.UnitBytes
	maxWriteClusterBytes = 2 * mib
	// writeHeaderBytes is QEMU's own header_length since it has compression types.
	writeHeaderBytes = 112
	writeStrideBytes = 2 * mib
	maxRefcount      = 1<<16 - 1
	entryCopied      = uint64(1) << 63
	sectorBytes      = 512
)

// WriteQcow2 writes src as a qcow2 version 3 image to w, in order and without going back, and returns the file's length. Only what src calls Data is read. What reads as zero is not stored; where src
// says Zero and a table is there anyway it is marked as zero. The virtual size is src's, rounded up to 512 bytes.
//
// Where w cannot go back, the tables' places must be known before the data: plain images are planned from the extents, compressed ones are compressed twice, once to learn
// how long they become. src must not change meanwhile; ErrSource if it does so that it shows. See docs/formats/qcow2.md.
//
// Errors: ErrUnsupported for options nobody knows and for an empty disk, ErrTooLarge for a disk that needs larger clusters, and what src, w and ctx say.
func WriteQcow2(ctx context.Context, w io.Writer, src block.Device, o Qcow2Options) (int64, error) {
	plan, err := newQcow2Writer(src, o, qcow2Sink{})
	if err != nil {
		return 0, err
	}
	plan.measure = true
	total := 2 * plan.size
	if plan.pack == nil {
		total = plan.size // planning plain images is nothing to wait for
	} else {
		plan.report(0, total)
	}
	if err := plan.body(ctx); err != nil {
		return 0, fmt.Errorf("plan qcow2: %w", err)
	}
	q, err := newQcow2Writer(src, o, qcow2Sink{w: w})
	if err != nil {
		return 0, err
	}
	q.plan = plan
	q.report(total-q.size, total)
	if err := q.head(plan); err != nil {
		return 0, fmt.Errorf("write qcow2: %w", err)
	}
	if err := q.body(ctx); err != nil {
		return 0, fmt.Errorf("write qcow2: %w", err)
	}
	return q.out.pos, nil
}

// WriteQcow2At does as WriteQcow2, to a new empty file. Because it can go back, it reads and compresses once, and leaves out data that turns out to be zeroes.
func WriteQcow2At(ctx context.Context, w io.WriterAt, src block.Device, o Qcow2Options) (int64, error) {
	q, err := newQcow2Writer(src, o, qcow2Sink{at: w})
	if err != nil {
		return 0, err
	}
	q.findZero = true
	q.report(0, q.size)
	if err := q.body(ctx); err != nil {
		return 0, fmt.Errorf("write qcow2: %w", err)
	}
	end := q.out.pos
	q.out.pos = 0
	if err := q.head(q); err != nil {
		return 0, fmt.Errorf("write qcow2: %w", err)
	}
	return end, nil
}

// qcow2Writer writes one image:
//
//	header | L1 table | for each L2 table that maps anything: its data, the L2 table | refcount blocks | refcount table
//
// Only the L1 table's place is known from the beginning. Memory is the L1 table, one L2 table, the strides in the pipeline, and 2 bytes for each cluster of the file that shares its refcount block with compressed
// data.
type qcow2Writer struct {
	src     block.Device
	pack    func(dst, cluster []byte) []byte // nil without compression; for concurrent use
	zstd    bool
	bits    uint
	cluster int64
	size    int64 // virtual
	out     qcow2Sink
	// measure: nothing is written, and what need not be read is not. findZero: data that is all zeroes is left out; without compression and without a way back it must stay where it was planned.
	measure, findZero bool
	plan              *qcow2Writer // what was measured, if the places are fixed

	// What collect builds, in one goroutine.
	l1         []uint64
	l2         []uint64
	l2Index    int64 // which of them l2 is; -1 for none yet
	l2Data     bool  // l2 has something that is stored
	refs       refcounts
	refsOff    int64
	refsBlocks int64

	buffers sync.Pool // of *[]byte, a stride long
	arenas  sync.Pool // the same
	report  func(done, total int64)
	from    int64 // what report has before this pass
	total   int64
}

func newQcow2Writer(src block.Device, o Qcow2Options, out qcow2Sink) (*qcow2Writer, error) {
	q := &qcow2Writer{src: src, cluster: o.ClusterBytes, size: roundUp(src.Size(), sectorBytes), out: out, l2Index: -1, zstd: o.Compress == "zstd"}
	if q.cluster == 0 {
		q.cluster = defaultClusterBytes
	}
	if q.cluster < minWriteClusterBytes || q.cluster > maxWriteClusterBytes || q.cluster&(q.cluster-1) != 0 {
		return nil, fmt.Errorf("qcow2 clusters of %d bytes: want a power of two from %d to %d: %w", q.cluster, minWriteClusterBytes, maxWriteClusterBytes, ErrUnsupported)
	}
	q.bits = uint(bits.TrailingZeros64(uint64(q.cluster)))
	if q.size == 0 {
		return nil, fmt.Errorf("a disk of 0 bytes as qcow2: %w", ErrUnsupported)
	}
	entries := (q.size + q.span() - 1) / q.span()
	if entries*8 > maxL1Bytes {
		return nil, fmt.Errorf("a disk of %d bytes as qcow2 with clusters of %d: take larger clusters: %w", q.size, q.cluster, ErrTooLarge)
	}
	var err error
	if q.pack, err = newPacker(o.Compress); err != nil {
		return nil, err
	}
	q.findZero = q.pack != nil
	q.l1, q.l2 = make([]uint64, entries), make([]uint64, q.cluster/8)
	q.refs = refcounts{perBlock: q.cluster / 2, shared: map[int64][]uint16{}, last: -1}
	q.out.pos = q.cluster + roundUp(entries*8, q.cluster)
	q.report = func(done, total int64) {
		q.from, q.total = done, total
		if o.Progress != nil {
			o.Progress(done, total)
		}
	}
	return q, nil
}

// span is how many bytes of the disk an L2 table maps.
func (q *qcow2Writer) span() int64 { return q.cluster / 8 * q.cluster }

// stride is how many bytes of the disk one step of the pipeline takes; it never crosses a span.
func (q *qcow2Writer) stride() int64 { return min(q.span(), max(writeStrideBytes, q.cluster)) }

// body writes everything behind the L1 table.
func (q *qcow2Writer) body(ctx context.Context) error {
	report, from, total := q.report, q.from, q.total
	work := ordered[*clusters]{do: q.fill, feed: q.feed, collect: func(c *clusters) error {
		defer q.recycle(c)
		if err := q.place(c); err != nil {
			return err
		}
		if total > 0 {
			report(from+min(c.off+c.count*q.cluster, q.size), total)
		}
		return nil
	}}
	if err := work.run(ctx); err != nil {
		return err
	}
	if err := q.endTable(); err != nil {
		return err
	}
	if err := q.writeRefcounts(); err != nil {
		return err
	}
	if total > 0 {
		report(from+q.size, total)
	}
	return nil
}

// clusters is a step's work: a run of clusters of one state, in one stride if it is data.
type clusters struct {
	off, count int64
	state      block.State
	buf        *[]byte  // data: the bytes
	zero       []bool   // data: which turned out to be all zeroes
	packed     [][]byte // data: compressed, nil for what does not become shorter
	arena      *[]byte  // holds them
}

// feed finds the runs.
func (q *qcow2Writer) feed(emit func(*clusters) error) error {
	return runs(q.src, q.cluster, func(r block.Extent) error {
		step := q.span()
		switch {
		case r.State == block.Absent:
			return nil
		case r.State == block.Data:
			step = q.stride()
		}
		for at := r.Off; at < r.Off+r.N; {
			end := min(r.Off+r.N, at/step*step+step)
			if err := emit(&clusters{off: at, count: (end - at + q.cluster - 1) >> q.bits, state: r.State}); err != nil {
				return err
			}
			at = end
		}
		return nil
	})
}

// fill reads, looks for zeroes and compresses, in a worker.
func (q *qcow2Writer) fill(c *clusters) error {
	if c.state != block.Data || q.measure && q.pack == nil {
		return nil
	}
	c.buf = take(&q.buffers, int(q.stride()))
	p := (*c.buf)[:c.count*q.cluster]
	inSrc := min(int64(len(p)), q.src.Size()-c.off)
	if _, err := q.src.ReadAt(p[:inSrc], c.off); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", inSrc, c.off, err)
	}
	clear(p[inSrc:])
	if !q.findZero {
		return nil
	}
	c.zero = make([]bool, c.count)
	var arena []byte
	if q.pack != nil {
		c.packed = make([][]byte, c.count)
		c.arena = take(&q.arenas, int(q.stride()))
		arena = (*c.arena)[:0]
	}
	for i := range c.count {
		one := p[i*q.cluster : (i+1)*q.cluster]
		if c.zero[i] = allZero(one); c.zero[i] || q.pack == nil {
			continue
		}
		if more := q.pack(arena, one); int64(len(more)-len(arena)) < q.cluster {
			c.packed[i] = more[len(arena):]
			arena = more
		}
	}
	return nil
}

// recycle takes a step's buffers back once they are written.
func (q *qcow2Writer) recycle(c *clusters) {
	if c.buf != nil {
		q.buffers.Put(c.buf)
	}
	if c.arena != nil {
		q.arenas.Put(c.arena)
	}
}

// place gives the clusters their places and writes them: what is compressed first, because a compressed one may begin anywhere, and then the others, each at the start of a cluster.
func (q *qcow2Writer) place(c *clusters) error {
	if index := c.off / q.span(); index != q.l2Index {
		if err := q.endTable(); err != nil {
			return err
		}
		q.l2Index, q.l2Data = index, false
		clear(q.l2)
	}
	first := c.off % q.span() >> q.bits
	for i := range c.count {
		switch {
		case c.state == block.Zero || c.zero != nil && c.zero[i]:
			q.l2[first+i] = l2ZeroFlag
		case c.packed != nil && c.packed[i] != nil:
			if err := q.placePacked(first+i, c.packed[i]); err != nil {
				return err
			}
		}
	}
	if c.state == block.Zero {
		return nil
	}
	for i := int64(0); i < c.count; {
		n := int64(0) // a run that is stored as it is
		for i+n < c.count && (c.zero == nil || !c.zero[i+n]) && (c.packed == nil || c.packed[i+n] == nil) {
			n++
		}
		if n == 0 {
			i++
			continue
		}
		if err := q.placePlain(c, first, i, n); err != nil {
			return err
		}
		i += n
	}
	return nil
}

// placePacked writes a compressed cluster where the last one ended.
func (q *qcow2Writer) placePacked(index int64, packed []byte) error {
	n := int64(len(packed))
	if q.refs.of(q.out.pos>>q.bits) == maxRefcount || q.refs.of((q.out.pos+n-1)>>q.bits) == maxRefcount {
		if err := q.out.skipTo(roundUp(q.out.pos, q.cluster)); err != nil {
			return err
		}
	}
	off := q.out.pos
	q.refs.share(off>>q.bits, (off+n-1)>>q.bits)
	sectors := (off+n-1)/sectorBytes - off/sectorBytes
	q.l2[index], q.l2Data = l2Compressed|uint64(sectors)<<(62-(q.bits-8))|uint64(off), true
	return q.out.write(packed)
}

// placePlain writes n clusters of c from the i-th on, whose first has the entry first in the table.
func (q *qcow2Writer) placePlain(c *clusters, first, i, n int64) error {
	if err := q.out.skipTo(roundUp(q.out.pos, q.cluster)); err != nil {
		return err
	}
	for k := range n {
		q.l2[first+i+k] = uint64(q.out.pos+k<<q.bits) | entryCopied
	}
	q.l2Data = true
	if c.buf == nil { // measured only
		return q.out.skipTo(q.out.pos + n<<q.bits)
	}
	return q.out.write((*c.buf)[i<<q.bits : (i+n)<<q.bits])
}

// endTable writes the L2 table that place has filled, if it maps anything that is stored.
func (q *qcow2Writer) endTable() error {
	if q.l2Index < 0 || !q.l2Data {
		if q.l2Index >= 0 && q.plan != nil && q.plan.l1[q.l2Index] != 0 {
			return q.changed()
		}
		return nil
	}
	at := roundUp(q.out.pos, q.cluster)
	if q.plan != nil && q.plan.l1[q.l2Index] != uint64(at)|entryCopied {
		return q.changed()
	}
	if err := q.out.skipTo(at); err != nil {
		return err
	}
	q.l1[q.l2Index] = uint64(at) | entryCopied
	q.l2Data = false
	return q.out.writeTable(q.l2)
}

func (q *qcow2Writer) changed() error {
	return fmt.Errorf("the disk changed while it was read (at %d): %w", q.l2Index*q.span(), ErrSource)
}

// head writes the header and the L1 table, whose contents made has.
func (q *qcow2Writer) head(made *qcow2Writer) error {
	b := make([]byte, q.cluster)
	be := binary.BigEndian
	copy(b, qcowMagic)
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], uint32(q.bits))
	be.PutUint64(b[24:], uint64(q.size))
	be.PutUint32(b[36:], uint32(len(q.l1)))
	be.PutUint64(b[40:], uint64(q.cluster))
	be.PutUint64(b[48:], uint64(made.refsOff))
	be.PutUint32(b[56:], uint32((made.refsBlocks*8+q.cluster-1)>>q.bits))
	if q.zstd {
		be.PutUint64(b[72:], incompatCompression)
		b[104] = 1
	}
	be.PutUint32(b[96:], 4) // refcounts of 16 bits
	be.PutUint32(b[100:], writeHeaderBytes)
	pos := q.out.pos
	q.out.pos = 0
	if err := q.out.write(b); err != nil {
		return err
	}
	if err := q.out.writeTable(made.l1); err != nil {
		return err
	}
	return q.out.skipTo(max(pos, roundUp(q.out.pos, q.cluster)))
}

// writeRefcounts writes the blocks and the table that points to them, which count themselves too.
func (q *qcow2Writer) writeRefcounts() error {
	if err := q.out.skipTo(roundUp(q.out.pos, q.cluster)); err != nil {
		return err
	}
	used, total, blocks := q.out.pos>>q.bits, int64(0), int64(0)
	for {
		total = used + blocks + (blocks*8+q.cluster-1)>>q.bits
		need := (total + q.refs.perBlock - 1) / q.refs.perBlock
		if need == blocks {
			break
		}
		blocks = need
	}
	q.refsBlocks = blocks
	table := make([]uint64, blocks)
	for i := range blocks {
		table[i] = uint64(q.out.pos)
		if err := q.out.write(q.refs.block(i, total)); err != nil {
			return err
		}
	}
	q.refsOff = q.out.pos
	if q.plan != nil && (q.plan.refsOff != q.refsOff || q.plan.refsBlocks != blocks) {
		return q.changed()
	}
	if err := q.out.writeTable(table); err != nil {
		return err
	}
	return q.out.fillTo(roundUp(q.out.pos, q.cluster))
}

// refcounts counts the uses of each host cluster: one, unless compressed clusters share it.
type refcounts struct {
	perBlock int64
	shared   map[int64][]uint16 // blocks in which anything is shared, by number
	last     int64              // the last cluster that holds compressed data
}

// of is the count of a cluster that holds compressed data, or is next to.
func (r *refcounts) of(cluster int64) int {
	if block := r.shared[cluster/r.perBlock]; block != nil && cluster <= r.last {
		return int(block[cluster%r.perBlock])
	}
	return 1
}

// share counts a compressed cluster that lies in [first, last]; they come in order.
func (r *refcounts) share(first, last int64) {
	for c := first; c <= last; c++ {
		if c > r.last {
			r.last = c // its one use
			continue
		}
		block := r.shared[c/r.perBlock]
		if block == nil {
			block = make([]uint16, r.perBlock)
			for i := range block {
				block[i] = 1
			}
			r.shared[c/r.perBlock] = block
		}
		block[c%r.perBlock]++
	}
}

// block is a refcount block as it is stored, of a file of total clusters.
func (r *refcounts) block(i, total int64) []byte {
	b := make([]byte, r.perBlock*2)
	shared := r.shared[i]
	for k := range min(r.perBlock, total-i*r.perBlock) {
		count := uint16(1)
		if shared != nil {
			count = shared[k]
		}
		binary.BigEndian.PutUint16(b[k*2:], count)
	}
	return b
}

// qcow2Sink is where the file goes: at for one that can be written anywhere, w for one that cannot, neither to count only.
type qcow2Sink struct {
	at  io.WriterAt
	w   io.Writer
	pos int64
}

func (s *qcow2Sink) write(p []byte) (err error) {
	var n int
	switch {
	case s.at != nil:
		n, err = s.at.WriteAt(p, s.pos)
	case s.w != nil:
		n, err = s.w.Write(p)
	}
	if err != nil {
		return fmt.Errorf("at %d: %w", s.pos+int64(n), err)
	}
	s.pos += int64(len(p))
	return nil
}

// writeTable writes entries, big-endian.
func (s *qcow2Sink) writeTable(entries []uint64) error {
	b := make([]byte, 0, 64*kib)
	for len(entries) > 0 {
		b = b[:0]
		for _, e := range entries[:min(len(entries), cap(b)/8)] {
			b = binary.BigEndian.AppendUint64(b, e)
		}
		entries = entries[len(b)/8:]
		if err := s.write(b); err != nil {
			return err
		}
	}
	return nil
}

// skipTo leaves zeroes up to off: holes, where it can.
func (s *qcow2Sink) skipTo(off int64) error {
	if s.w == nil {
		s.pos = off
		return nil
	}
	return s.fillTo(off)
}

// fillTo writes zeroes up to off.
func (s *qcow2Sink) fillTo(off int64) error {
	for s.pos < off {
		if err := s.write(zeroes[:min(off-s.pos, int64(len(zeroes)))]); err != nil {
			return err
		}
	}
	return nil
}
