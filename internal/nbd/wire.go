package nbd

import (
	"encoding/binary"
	"math"
)

// Magic numbers of the protocol.
const (
	magicServer      = 0x4e42444d41474943 // NBDMAGIC
	magicOption      = 0x49484156454F5054 // IHAVEOPT
	magicOptionReply = 0x0003e889045565a9
	magicRequest     = 0x25609513
	magicSimple      = 0x67446698
	magicStructured  = 0x668e33ef
)

// Handshake flags; the client's have the same bits.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Transmission flags.
const (
	flagHasFlags    = 1 << 0
	flagReadOnly    = 1 << 1
	flagFlush       = 1 << 2
	flagFUA         = 1 << 3
	flagTrim        = 1 << 5
	flagWriteZeroes = 1 << 6
	flagDF          = 1 << 7
	flagMultiConn   = 1 << 8
	flagCache       = 1 << 10
	flagFastZero    = 1 << 11
)

// Options of the negotiation.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10
)

// Replies to options.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4
	repErrUnsup    = 1<<31 + 1
	repErrPolicy   = 1<<31 + 2
	repErrInvalid  = 1<<31 + 3
	repErrTLSReqd  = 1<<31 + 5
	repErrUnknown  = 1<<31 + 6
	repErrShutdown = 1<<31 + 7
	repErrTooBig   = 1<<31 + 9
)

// Information about an export.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Commands of the transmission phase.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
)

// Command flags.
const (
	cmdFlagFUA    = 1 << 0
	cmdFlagNoHole = 1 << 1
	cmdFlagDF     = 1 << 2
	cmdFlagReqOne = 1 << 3
	cmdFlagFast   = 1 << 4
)

// Structured replies.
const (
	replyFlagDone = 1

	replyNone        = 0
	replyOffsetData  = 1
	replyOffsetHole  = 2
	replyBlockStatus = 5
	replyErrorBit    = 1 << 15 // in the type of every chunk that tells of an error
	replyError       = replyErrorBit + 1
)

// Sizes of fixed parts, bytes.
const (
	optionHeaderBytes = 16
	optionReplyBytes  = 20
	requestBytes      = 28
	simpleBytes       = 16
	structuredBytes   = 20
	dataChunkBytes    = structuredBytes + 8  // what precedes the data of an OFFSET_DATA chunk
	holeChunkBytes    = structuredBytes + 12 // a whole OFFSET_HOLE chunk
	noZeroesBytes     = 124                  // the padding after EXPORT_NAME when NO_ZEROES was not negotiated
)

// Limits: what this server grants a client.
const (
	// maxPayloadBytes is the largest read or write, advertised as the maximum payload.
	maxPayloadBytes = 32 << 20
	// maxDrainBytes is the largest payload that is read and thrown away to answer with an error; beyond it the connection ends.
	maxDrainBytes = 64 << 20
	// preferredBytes is the advertised block size: below it devices do more work.
	preferredBytes = 4096
	// maxNameBytes is the protocol's limit for a name.
	maxNameBytes = 4096
	// maxOptionBytes is the largest option that is looked at; up to maxOptionDrainBytes it is refused, beyond that the connection ends.
	maxOptionBytes      = 32 << 10
	maxOptionDrainBytes = 1 << 20
	// maxOptions is how many options one connection may send before it has to choose an export.
	maxOptions = 64
)

var be = binary.BigEndian

// request is a request's header. off is -1 when the wire's offset does not fit an int64, which is out of range of any device.
type request struct {
	cookie     uint64
	off        int64
	n          uint32
	cmd, flags uint16
}

// parseRequest reads a header of requestBytes; false means the magic is wrong and the stream is lost.
func parseRequest(p []byte) (request, bool) {
	if be.Uint32(p) != magicRequest {
		return request{}, false
	}
	r := request{
		flags:  be.Uint16(p[4:]),
		cmd:    be.Uint16(p[6:]),
		cookie: be.Uint64(p[8:]),
		n:      be.Uint32(p[24:]),
	}
	if off := be.Uint64(p[16:]); off <= math.MaxInt64 {
		r.off = int64(off)
	} else {
		r.off = -1
	}
	return r, true
}

// appendRequest appends r as it goes over the wire: the inverse of parseRequest.
func appendRequest(p []byte, r request) []byte {
	p = be.AppendUint32(p, magicRequest)
	p = be.AppendUint16(p, r.flags)
	p = be.AppendUint16(p, r.cmd)
	p = be.AppendUint64(p, r.cookie)
	p = be.AppendUint64(p, uint64(r.off))
	return be.AppendUint32(p, r.n)
}

// putSimple writes a simple reply's header to p.
func putSimple(p []byte, cookie uint64, errno Errno) {
	be.PutUint32(p, magicSimple)
	be.PutUint32(p[4:], uint32(errno))
	be.PutUint64(p[8:], cookie)
}

// chunk is the header of a structured reply's chunk.
type chunk struct {
	done   bool
	typ    uint16
	cookie uint64
	n      int // payload bytes
}

func putChunk(p []byte, c chunk) {
	be.PutUint32(p, magicStructured)
	flags := uint16(0)
	if c.done {
		flags = replyFlagDone
	}
	be.PutUint16(p[4:], flags)
	be.PutUint16(p[6:], c.typ)
	be.PutUint64(p[8:], c.cookie)
	be.PutUint32(p[16:], uint32(c.n))
}
