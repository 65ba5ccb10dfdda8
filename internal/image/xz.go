package image

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// xzReader unpacks an .xz file as it arrives: any number of streams and blocks, stream padding, every check (CRC-32, CRC-64, SHA-256) and every index compared. The container is read here and not by the library that
// unpacks LZMA2, because that one believes the dictionary size in a header before anybody could look at it. The format is tukaani.org's "xz-file-format.txt" 1.2.1; filters but LZMA2 are ErrUnsupported.
type xzReader struct {
	in       *bufio.Reader
	read     int64 // bytes taken from in
	check    byte  // the stream's kind of check
	block    xzBlock
	inBlock  bool
	inStream bool
	any      bool      // a stream was read
	seen     hash.Hash // over the sizes of the stream's blocks, to be compared with the index's
	blocks   uint64
}

// xzBlock is the block that is being unpacked.
type xzBlock struct {
	content      io.Reader
	sum          hash.Hash // nil for no check
	header       int64     // bytes
	start        int64     // where its compressed data began
	n            int64     // unpacked so far
	wantPacked   int64     // from the header; -1 if it does not say
	wantUnpacked int64
}

const (
	xzMagic      = "\xfd7zXZ\x00"
	xzFooter     = "YZ"
	xzLZMA2      = 0x21
	xzMaxRecords = uint64(1) << 40 // an index of more is no file anybody could have sent
)

func newXZReader(r io.Reader) *xzReader { return &xzReader{in: bufio.NewReaderSize(r, 256<<10)} }

func xzError(sentinel error, format string, args ...any) error {
	return fmt.Errorf("xz: %s: %w", fmt.Sprintf(format, args...), sentinel)
}

// Read gives io.EOF only at the end of in, when everything was compared.
func (x *xzReader) Read(p []byte) (int, error) {
	for {
		var err error
		switch {
		case len(p) == 0:
			return 0, nil
		case x.inBlock:
			n, err := x.readBlock(p)
			if n > 0 || err != nil {
				return n, err
			}
			continue
		case x.inStream:
			err = x.nextBlock()
		default:
			err = x.nextStream()
		}
		if err != nil {
			return 0, err
		}
	}
}

// ReadByte and counted reads keep the place in the file.
func (x *xzReader) ReadByte() (byte, error) {
	b, err := x.in.ReadByte()
	if err == nil {
		x.read++
	}
	return b, err
}

func (x *xzReader) full(p []byte) error {
	n, err := io.ReadFull(x.in, p)
	x.read += int64(n)
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// packed is what the LZMA2 reader reads: no more than it asks for, counted.
type xzPacked struct{ *xzReader }

func (x xzPacked) Read(p []byte) (int, error) {
	n, err := x.in.Read(p)
	x.read += int64(n)
	return n, err
}

// nextStream reads padding and a stream's header; io.EOF if there is none.
func (x *xzReader) nextStream() error {
	b := make([]byte, 12)
	for {
		if _, err := x.in.Peek(1); err == io.EOF && x.any {
			return io.EOF
		}
		if err := x.full(b[:4]); err != nil {
			return err
		}
		if !x.any || [4]byte(b) != [4]byte{} {
			break
		}
	}
	if err := x.full(b[4:]); err != nil {
		return err
	}
	switch {
	case string(b[:6]) != xzMagic:
		return xzError(ErrFormat, "something else follows the file, at %d", x.read-12)
	case crc32.ChecksumIEEE(b[6:8]) != binary.LittleEndian.Uint32(b[8:]):
		return xzError(ErrFormat, "the stream's header is damaged")
	case b[6] != 0 || b[7] > 15:
		return xzError(ErrUnsupported, "unknown stream flags %#x", b[6:8])
	}
	x.check, x.any, x.inStream, x.seen, x.blocks = b[7], true, true, sha256.New(), 0
	if _, err := xzSum(x.check); err != nil {
		return err
	}
	return nil
}

// xzSum is the hash of a check; nil for none.
func xzSum(check byte) (hash.Hash, error) {
	switch check {
	case 0:
		return nil, nil
	case 1:
		return crc32.NewIEEE(), nil
	case 4:
		return crc64.New(crc64.MakeTable(crc64.ECMA)), nil
	case 10:
		return sha256.New(), nil
	}
	return nil, xzError(ErrUnsupported, "unknown check %d", check)
}

// nextBlock reads a block's header, or the index and the footer, which end the stream.
func (x *xzReader) nextBlock() error {
	first, err := x.ReadByte()
	if err != nil {
		return err
	}
	if first == 0 {
		return x.endStream()
	}
	b := make([]byte, (int(first)+1)*4)
	b[0] = first
	if err := x.full(b[1:]); err != nil {
		return err
	}
	body := b[:len(b)-4]
	if crc32.ChecksumIEEE(body) != binary.LittleEndian.Uint32(b[len(body):]) {
		return xzError(ErrFormat, "a block's header is damaged")
	}
	dict, err := x.parseBlock(body)
	if err != nil {
		return err
	}
	x.block.header, x.block.start, x.block.n = int64(len(b)), x.read, 0
	x.block.sum, _ = xzSum(x.check) //nolint:errcheck // nextStream knew it
	x.block.content, err = lzma.Reader2Config{DictCap: max(dict, lzma.MinDictCap)}.NewReader2(xzPacked{x})
	x.inBlock = true
	return err
}

// parseBlock reads a block's header behind its size and gives the dictionary's size.
func (x *xzReader) parseBlock(b []byte) (dict int, err error) {
	flags := b[1]
	r := bytes.NewReader(b[2:])
	x.block.wantPacked, x.block.wantUnpacked = -1, -1
	if flags&0x40 != 0 {
		x.block.wantPacked = xzVarint(r)
	}
	if flags&0x80 != 0 {
		x.block.wantUnpacked = xzVarint(r)
	}
	if flags&0x3f != 0 {
		return 0, xzError(ErrUnsupported, "a block has more than one filter (flags %#x); unpack it first", flags)
	}
	if id := xzVarint(r); id != xzLZMA2 {
		return 0, xzError(ErrUnsupported, "a block has the filter %#x, known is LZMA2; unpack it first", id)
	}
	n, size := xzVarint(r), byte(0xff)
	if n == 1 {
		size, err = r.ReadByte()
	}
	rest := b[len(b)-r.Len():]
	if n != 1 || err != nil || size > 40 || !allZero(rest) || flags&0x40 != 0 && x.block.wantPacked <= 0 || flags&0x80 != 0 && x.block.wantUnpacked < 0 {
		return 0, xzError(ErrFormat, "a block's header makes no sense")
	}
	bytes := int64(1)<<32 - 1
	if size < 40 {
		bytes = (2 | int64(size&1)) << (size/2 + 11)
	}
	if bytes > maxWindowBytes {
		return 0, xzError(ErrTooLarge, "unpacking takes a dictionary of %d bytes, the limit is %d; pack it with a smaller one", bytes, maxWindowBytes)
	}
	return int(bytes), nil
}

// xzVarint reads a number of up to 63 bits, -1 if there is none.
func xzVarint(r io.ByteReader) int64 {
	var v uint64
	for shift := 0; shift < 63; shift += 7 {
		b, err := r.ReadByte()
		if err != nil || b == 0 && shift > 0 {
			return -1
		}
		v |= uint64(b&0x7f) << shift
		if b&0x80 == 0 {
			return int64(v)
		}
	}
	return -1
}

// readBlock reads on in the block, and ends it.
func (x *xzReader) readBlock(p []byte) (int, error) {
	n, err := x.block.content.Read(p)
	x.block.n += int64(n)
	if x.block.sum != nil {
		x.block.sum.Write(p[:n])
	}
	if err != io.EOF {
		return n, err
	}
	return n, x.endBlock()
}

// endBlock compares what the block's header and check say.
func (x *xzReader) endBlock() error {
	x.inBlock = false
	packed := x.read - x.block.start
	if w := x.block.wantPacked; w >= 0 && w != packed {
		return xzError(ErrFormat, "a block has %d packed bytes, its header says %d", packed, w)
	}
	if w := x.block.wantUnpacked; w >= 0 && w != x.block.n {
		return xzError(ErrFormat, "a block unpacks to %d bytes, its header says %d", x.block.n, w)
	}
	tail := make([]byte, roundUp(packed, 4)-packed)
	if err := x.full(tail); err != nil {
		return err
	}
	sumBytes := 0
	if x.block.sum != nil {
		sumBytes = x.block.sum.Size()
	}
	stored := make([]byte, sumBytes)
	if err := x.full(stored); err != nil {
		return err
	}
	if x.block.sum != nil {
		got := x.block.sum.Sum(nil)
		if sumBytes < sha256.Size { // Go's are big-endian, the format's are not
			for i, j := 0, len(got)-1; i < j; i, j = i+1, j-1 {
				got[i], got[j] = got[j], got[i]
			}
		}
		if !bytes.Equal(got, stored) {
			return xzError(ErrFormat, "a block's check does not match its content")
		}
	}
	if !allZero(tail) {
		return xzError(ErrFormat, "a block's padding is not zero")
	}
	x.blocks++
	xzRecord(x.seen, x.block.header+packed+int64(sumBytes), x.block.n)
	return nil
}

func xzRecord(h hash.Hash, unpadded, unpacked int64) {
	h.Write(binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, uint64(unpadded)), uint64(unpacked)))
}

// endStream reads the index behind its first byte, and the footer. The records are hashed and not kept: there may be any number of them.
func (x *xzReader) endStream() error {
	start := x.read - 1
	sum := crc32.NewIEEE()
	sum.Write([]byte{0})
	index := xzSummed{x, sum}
	n := xzVarint(index)
	if n < 0 || uint64(n) != x.blocks || uint64(n) > xzMaxRecords {
		return x.orCut(xzError(ErrFormat, "the index has %d blocks, the stream %d", n, x.blocks))
	}
	listed := sha256.New()
	for range n {
		xzRecord(listed, xzVarint(index), xzVarint(index))
	}
	if !bytes.Equal(listed.Sum(nil), x.seen.Sum(nil)) {
		return x.orCut(xzError(ErrFormat, "the index does not match the blocks"))
	}
	for (x.read-start)%4 != 0 {
		if b, err := index.ReadByte(); err != nil || b != 0 {
			return x.orCut(xzError(ErrFormat, "the index's padding is not zero"))
		}
	}
	indexBytes := x.read - start + 4
	b := make([]byte, 16)
	if err := x.full(b); err != nil {
		return err
	}
	le := binary.LittleEndian
	switch {
	case le.Uint32(b) != sum.Sum32():
		return xzError(ErrFormat, "the index is damaged")
	case string(b[14:]) != xzFooter || le.Uint32(b[4:]) != crc32.ChecksumIEEE(b[8:14]):
		return xzError(ErrFormat, "the stream's footer is damaged")
	case (int64(le.Uint32(b[8:]))+1)*4 != indexBytes || b[12] != 0 || b[13] != x.check:
		return xzError(ErrFormat, "the stream's footer contradicts it")
	}
	x.inStream = false
	return nil
}

// orCut is err, or that the file ended, if that is why.
func (x *xzReader) orCut(err error) error {
	if _, e := x.in.Peek(1); e != nil {
		if e == io.EOF {
			return io.ErrUnexpectedEOF
		}
		return e
	}
	return err
}

// xzSummed sums the bytes of the index.
type xzSummed struct {
	x   *xzReader
	sum hash.Hash32
}

func (s xzSummed) ReadByte() (byte, error) {
	b, err := s.x.ReadByte()
	if err == nil {
		s.sum.Write([]byte{b})
	}
	return b, err
}
