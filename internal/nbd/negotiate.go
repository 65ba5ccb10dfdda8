package nbd

import (
	"errors"
	"fmt"
	"io"
	"slices"
)

// errAborted: the client left the negotiation as the protocol provides.
var errAborted = errors.New("client aborted the negotiation")

// errMalformed: an option's data does not parse; the client is told and may go on.
var errMalformed = errors.New("malformed option")

// haggler is one negotiation. Every read takes exactly what an option is made of, so that nothing of the transmission phase is swallowed.
type haggler struct {
	rw       io.ReadWriter
	exports  Exports
	draining func() bool  // the server is going: choose nothing any more
	commit   func(Export) // nil, or told of the export that is chosen before the client is
	// secure, if not nil, changes over to TLS and returns the new stream; until then nothing is told or chosen.
	secure   func() (io.ReadWriter, error)
	isSecure bool

	fixed, noZeroes bool
	structured      bool
	contexts        []metaContext // of the last SET_META_CONTEXT
	contextsOf      string        // canonical name of the export they were selected for

	buf []byte // option data, then reply; kept from option to option
}

// negotiate haggles until the client has chosen an export. errAborted and io.EOF before the first option say that the client left in
// good order. It relies on the caller for a deadline.
func (h *haggler) negotiate() (Export, state, error) {
	if err := h.greet(); err != nil {
		return Export{}, state{}, err
	}
	for range maxOptions {
		opt, data, err := h.option()
		if err != nil {
			return Export{}, state{}, err
		}
		e, chosen, err := h.answer(opt, data)
		if err != nil {
			return Export{}, state{}, err
		}
		if chosen {
			return e, h.state(e), nil
		}
	}
	return Export{}, state{}, fmt.Errorf("nbd: more than %d options: %w", maxOptions, ErrProtocol)
}

// state is what is left when e was chosen. Contexts that were selected for another export do not count.
func (h *haggler) state(e Export) state {
	st := state{Export: e.Name, Structured: h.structured, SizeBytes: e.Device.Size(), Flags: e.transmissionFlags(h.structured)}
	if h.contextsOf == e.Name {
		for _, m := range h.contexts {
			st.Contexts = append(st.Contexts, m.id)
		}
	}
	return st
}

func (h *haggler) greet() error {
	var hello [18]byte
	be.PutUint64(hello[:], magicServer)
	be.PutUint64(hello[8:], magicOption)
	be.PutUint16(hello[16:], flagFixedNewstyle|flagNoZeroes)
	if err := h.write(hello[:]); err != nil {
		return err
	}
	var answer [4]byte
	if _, err := io.ReadFull(h.rw, answer[:]); err != nil {
		return fmt.Errorf("nbd: read client flags: %w", err)
	}
	flags := be.Uint32(answer[:])
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return fmt.Errorf("nbd: client flags %#x: %w", flags, ErrProtocol)
	}
	h.fixed, h.noZeroes = flags&flagFixedNewstyle != 0, flags&flagNoZeroes != 0
	return nil
}

// option reads the next option. Its data is nil, and was thrown away, when it is larger than maxOptionBytes.
func (h *haggler) option() (opt uint32, data []byte, err error) {
	var head [optionHeaderBytes]byte
	if _, err := io.ReadFull(h.rw, head[:]); err != nil {
		return 0, nil, fmt.Errorf("nbd: read option: %w", err)
	}
	if magic := be.Uint64(head[:]); magic != magicOption {
		return 0, nil, fmt.Errorf("nbd: option magic %#x: %w", magic, ErrProtocol)
	}
	opt, n := be.Uint32(head[8:]), be.Uint32(head[12:])
	switch {
	case n > maxOptionDrainBytes, n > maxOptionBytes && opt == optExportName:
		return 0, nil, fmt.Errorf("nbd: option %d with %d bytes: %w", opt, n, ErrProtocol)
	case n > maxOptionBytes:
		if _, err := io.CopyN(io.Discard, h.rw, int64(n)); err != nil {
			return 0, nil, fmt.Errorf("nbd: read option %d: %w", opt, err)
		}
		return opt, nil, nil
	}
	if cap(h.buf) < int(n) {
		h.buf = make([]byte, n)
	}
	data = h.buf[:n:n]
	if data == nil {
		data = []byte{}
	}
	if _, err := io.ReadFull(h.rw, data); err != nil {
		return 0, nil, fmt.Errorf("nbd: read option %d: %w", opt, err)
	}
	return opt, data, nil
}

// answer replies to one option; chosen means that the transmission phase begins with e.
func (h *haggler) answer(opt uint32, data []byte) (e Export, chosen bool, err error) {
	plain := h.secure != nil && !h.isSecure
	switch {
	case opt == optExportName && plain:
		return Export{}, false, fmt.Errorf("nbd: export %q is asked for without %w", data, ErrTLS)
	case opt == optExportName:
		e, err := h.exportName(string(data))
		return e, err == nil, err
	case opt == optAbort:
		// The client need not wait for the reply: an error while sending it means nothing.
		_ = h.reply(opt, repAck, nil)
		return Export{}, false, errAborted
	case !h.fixed:
		return Export{}, false, fmt.Errorf("nbd: option %d without fixed newstyle: %w", opt, ErrProtocol)
	case h.draining():
		return Export{}, false, h.reply(opt, repErrShutdown, nil)
	case plain && opt != optStartTLS:
		return Export{}, false, h.reply(opt, repErrTLSReqd, nil)
	case data == nil:
		return Export{}, false, h.reply(opt, repErrTooBig, nil)
	}
	switch opt {
	case optList:
		err = h.list(data)
	case optInfo, optGo:
		return h.info(opt, data)
	case optStructuredReply:
		err = h.structuredReply(data)
	case optListMetaContext, optSetMetaContext:
		err = h.metaContext(opt, data)
	case optStartTLS:
		err = h.startTLS(data)
	default:
		err = h.reply(opt, repErrUnsup, nil)
	}
	return Export{}, false, err
}

func (h *haggler) write(p []byte) error {
	if _, err := h.rw.Write(p); err != nil {
		return fmt.Errorf("nbd: negotiate: %w", err)
	}
	return nil
}

// startTLS changes over to TLS. The options are read to the byte, so nothing that came in plain text is taken for what comes after it; and
// what was agreed on before is forgotten, though nothing could be.
func (h *haggler) startTLS(data []byte) error {
	switch {
	case len(data) > 0, h.isSecure:
		return h.reply(optStartTLS, repErrInvalid, nil)
	case h.secure == nil:
		return h.reply(optStartTLS, repErrPolicy, nil)
	}
	if err := h.reply(optStartTLS, repAck, nil); err != nil {
		return err
	}
	rw, err := h.secure()
	if err != nil {
		return err
	}
	h.rw, h.isSecure = rw, true
	h.structured, h.contexts, h.contextsOf = false, nil, ""
	return nil
}

// appendReply appends the reply rep to option opt with data.
func appendReply(p []byte, opt, rep uint32, data []byte) []byte {
	p = be.AppendUint64(p, magicOptionReply)
	p = be.AppendUint32(p, opt)
	p = be.AppendUint32(p, rep)
	p = be.AppendUint32(p, uint32(len(data)))
	return append(p, data...)
}

func (h *haggler) reply(opt, rep uint32, data []byte) error {
	return h.write(appendReply(nil, opt, rep, data))
}

// chose says that e is chosen, unless the reply cannot be sent.
func (h *haggler) chose(e Export) {
	if h.commit != nil {
		h.commit(e)
	}
}

// exportName ends the negotiation the old way, in which a refusal can only be a disconnect.
func (h *haggler) exportName(name string) (Export, error) {
	if h.draining() {
		return Export{}, ErrServerClosed
	}
	e, err := h.exports.Lookup(name)
	if err != nil {
		return Export{}, fmt.Errorf("nbd: export %q: %w", name, err)
	}
	h.chose(e)
	p := be.AppendUint64(nil, uint64(e.Device.Size()))
	p = be.AppendUint16(p, e.transmissionFlags(h.structured))
	if !h.noZeroes {
		p = append(p, make([]byte, noZeroesBytes)...)
	}
	return e, h.write(p)
}

func (h *haggler) list(data []byte) error {
	if len(data) > 0 {
		return h.reply(optList, repErrInvalid, nil)
	}
	var p []byte
	for _, e := range h.exports.List() {
		item := be.AppendUint32(nil, uint32(len(e.Name)))
		item = append(item, e.Name...)
		item = append(item, e.Description...)
		p = appendReply(p, optList, repServer, item)
	}
	return h.write(appendReply(p, optList, repAck, nil))
}

func (h *haggler) structuredReply(data []byte) error {
	if len(data) > 0 {
		return h.reply(optStructuredReply, repErrInvalid, nil)
	}
	h.structured = true
	return h.reply(optStructuredReply, repAck, nil)
}

// info answers INFO, and GO, which differs only in that it chooses.
func (h *haggler) info(opt uint32, data []byte) (Export, bool, error) {
	r := optionReader{p: data}
	name := r.name()
	wanted := make([]uint16, 0, 8)
	for range r.uint16() {
		wanted = append(wanted, r.uint16())
		if r.failed {
			break
		}
	}
	if r.err() != nil {
		return Export{}, false, h.reply(opt, repErrInvalid, nil)
	}
	e, err := h.exports.Lookup(name)
	if err != nil {
		return Export{}, false, h.reply(opt, lookupReply(err), nil)
	}
	item := be.AppendUint16(nil, infoExport)
	item = be.AppendUint64(item, uint64(e.Device.Size()))
	item = be.AppendUint16(item, e.transmissionFlags(h.structured))
	p := appendReply(nil, opt, repInfo, item)
	if slices.Contains(wanted, infoName) {
		p = appendReply(p, opt, repInfo, append(be.AppendUint16(nil, infoName), e.Name...))
	}
	if slices.Contains(wanted, infoDescription) && e.Description != "" {
		p = appendReply(p, opt, repInfo, append(be.AppendUint16(nil, infoDescription), e.Description...))
	}
	if slices.Contains(wanted, infoBlockSize) {
		item := be.AppendUint16(nil, infoBlockSize)
		item = be.AppendUint32(item, 1)
		item = be.AppendUint32(item, preferredBytes)
		p = appendReply(p, opt, repInfo, be.AppendUint32(item, maxPayloadBytes))
	}
	if opt == optGo {
		h.chose(e)
	}
	if err := h.write(appendReply(p, opt, repAck, nil)); err != nil {
		return Export{}, false, err
	}
	return e, opt == optGo, nil
}

// lookupReply tells of an export that is not to be had.
func lookupReply(err error) uint32 {
	if errors.Is(err, ErrServerClosed) {
		return repErrShutdown
	}
	return repErrUnknown
}

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT. Setting forgets what was set before, also when it fails.
func (h *haggler) metaContext(opt uint32, data []byte) error {
	if opt == optSetMetaContext {
		h.contexts, h.contextsOf = nil, ""
	}
	r := optionReader{p: data}
	name := r.name()
	var queries []string
	for range r.uint32() {
		queries = append(queries, r.name())
		if r.failed {
			break
		}
	}
	if r.err() != nil || !h.structured {
		return h.reply(opt, repErrInvalid, nil)
	}
	e, err := h.exports.Lookup(name)
	if err != nil {
		return h.reply(opt, lookupReply(err), nil)
	}
	found := e.matchMeta(queries, opt == optListMetaContext)
	if opt == optSetMetaContext {
		h.contexts, h.contextsOf = found, e.Name
	}
	var p []byte
	for _, m := range found {
		id := m.id
		if opt == optListMetaContext {
			id = 0 // reserved
		}
		p = appendReply(p, opt, repMetaContext, append(be.AppendUint32(nil, id), m.name...))
	}
	return h.write(appendReply(p, opt, repAck, nil))
}

// optionReader takes an option's data apart. After a failure everything is zero.
type optionReader struct {
	p      []byte
	failed bool
}

func (r *optionReader) take(n uint32) []byte {
	if r.failed || uint64(n) > uint64(len(r.p)) {
		r.failed = true
		return nil
	}
	p := r.p[:n]
	r.p = r.p[n:]
	return p
}

func (r *optionReader) uint16() uint16 {
	if p := r.take(2); p != nil {
		return be.Uint16(p)
	}
	return 0
}

func (r *optionReader) uint32() uint32 {
	if p := r.take(4); p != nil {
		return be.Uint32(p)
	}
	return 0
}

// name reads a string with its length in front.
func (r *optionReader) name() string {
	n := r.uint32()
	if n > maxNameBytes {
		r.failed = true
	}
	return string(r.take(n))
}

// err says whether the data was exactly what was read of it.
func (r *optionReader) err() error {
	if r.failed || len(r.p) > 0 {
		return errMalformed
	}
	return nil
}
