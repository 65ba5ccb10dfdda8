package nbd

import (
	"fmt"
	"io"

	"ashlar/internal/block"
)

const (
	// maxExtents bounds what one answer to BLOCK_STATUS is remembered of; the rest is skipped, and asked for again.
	maxExtents = 4096
	// maxStatusBytes and maxErrorBytes bound the chunks that are listened to.
	maxStatusBytes = 16 << 20
	maxErrorBytes  = 8 << 10
	// maxSpans bounds how scattered the pieces of a read may arrive.
	maxSpans = 1024
)

// receive is the goroutine that takes replies apart, where callers do not do it themselves, until the connection ends, and then lets every call go.
func (c *Client) receive() {
	err := c.replies()
	c.broke(err)
	c.mu.Lock()
	calls, err := c.calls, c.err
	c.calls = [maxCalls + 1]*exchange{}
	c.mu.Unlock()
	for _, cl := range calls {
		if cl != nil {
			cl.err = err
			cl.leave()
		}
	}
}

// replies reads replies while the seat is the receiver's; its error is never nil.
func (c *Client) replies() error {
	for {
		done, err := c.reply()
		if err != nil {
			return err
		}
		if done == nil {
			continue
		}
		vacant := c.end(done)
		done.leave()
		if vacant {
			c.rest()
		}
	}
}

// reply reads one reply, or one chunk of one, and returns the call that is answered with it, nil while there is more to come.
func (c *Client) reply() (*exchange, error) {
	head := c.head[:]
	if _, err := io.ReadFull(c.br, head[:simpleBytes]); err != nil {
		return nil, err
	}
	c.heard.Add(1)
	cookie := be.Uint64(head[8:])
	cl := c.awaited(cookie)
	if cl == nil {
		return nil, fmt.Errorf("reply to a request %#x that was not sent: %w", cookie, ErrProtocol)
	}
	done := true
	var err error
	switch magic := be.Uint32(head); {
	case magic == magicSimple:
		err = c.simple(cl, Errno(be.Uint32(head[4:])))
	case magic == magicStructured && c.structured:
		if _, err = io.ReadFull(c.br, head[simpleBytes:]); err == nil {
			done = be.Uint16(head[4:])&replyFlagDone != 0
			err = c.chunk(cl, be.Uint16(head[6:]), be.Uint32(head[16:]))
		}
		if err == nil && done {
			err = cl.complete()
		}
	default:
		err = fmt.Errorf("reply magic %#x: %w", magic, ErrProtocol)
	}
	if err != nil || !done {
		return nil, err
	}
	return cl, nil
}

// awaited returns the call that cookie belongs to.
func (c *Client) awaited(cookie uint64) *exchange {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cl := c.calls[uint8(cookie)]; cl != nil && cl.cookie == cookie {
		return cl
	}
	return nil
}

// simple takes a simple reply. A read's data follows it, unless structured replies were agreed on: then only errors may come so.
func (c *Client) simple(cl *exchange, errno Errno) error {
	if errno != OK {
		cl.errno = errno
		return nil
	}
	switch {
	case cl.cmd == cmdBlockStatus, cl.cmd == cmdRead && c.structured:
		return fmt.Errorf("simple reply to command %d: %w", cl.cmd, ErrProtocol)
	case cl.cmd == cmdRead:
		_, err := io.ReadFull(c.br, cl.p)
		return err
	}
	return nil
}

// chunk takes the n bytes of a structured chunk that follow its header.
func (c *Client) chunk(cl *exchange, typ uint16, n uint32) error {
	switch {
	case typ == replyNone && n == 0:
		return nil
	case typ == replyOffsetData && cl.cmd == cmdRead && n > 8:
		return c.dataChunk(cl, n-8)
	case typ == replyOffsetHole && cl.cmd == cmdRead && n == 12:
		return c.holeChunk(cl)
	case typ == replyBlockStatus && cl.cmd == cmdBlockStatus && n >= 12 && n%8 == 4 && n <= maxStatusBytes:
		return c.statusChunk(cl, n)
	case typ&replyErrorBit != 0 && n >= 6 && n <= maxErrorBytes:
		return c.errorChunk(cl, n)
	}
	return fmt.Errorf("chunk of type %d and %d bytes to command %d: %w", typ, n, cl.cmd, ErrProtocol)
}

// place is where [off, off+n) of the device goes in a read's buffer; each byte may come once.
func (cl *exchange) place(off uint64, n uint32) ([]byte, error) {
	from := off - uint64(cl.off)
	if from > uint64(len(cl.p)) || uint64(n) > uint64(len(cl.p))-from || n == 0 {
		return nil, fmt.Errorf("%d bytes at %d in reply to a read of %d at %d: %w", n, off, cl.n, cl.off, ErrProtocol)
	}
	if !cl.got.add(uint32(from), n) {
		return nil, fmt.Errorf("%d bytes at %d come twice, or in too many pieces: %w", n, off, ErrProtocol)
	}
	return cl.p[from : from+uint64(n)], nil
}

func (c *Client) dataChunk(cl *exchange, n uint32) error {
	var off [8]byte
	if _, err := io.ReadFull(c.br, off[:]); err != nil {
		return err
	}
	p, err := cl.place(be.Uint64(off[:]), n)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(c.br, p)
	return err
}

func (c *Client) holeChunk(cl *exchange) error {
	var hole [12]byte
	if _, err := io.ReadFull(c.br, hole[:]); err != nil {
		return err
	}
	p, err := cl.place(be.Uint64(hole[:]), be.Uint32(hole[8:]))
	clear(p)
	return err
}

// statusChunk takes the descriptors of the context that was selected; the last may reach beyond what was asked about.
func (c *Client) statusChunk(cl *exchange, n uint32) error {
	var word [8]byte
	if _, err := io.ReadFull(c.br, word[:4]); err != nil {
		return err
	}
	n -= 4
	if be.Uint32(word[:]) != c.contextID || len(cl.extents) > 0 {
		return fmt.Errorf("block status of a context that was not selected, or twice: %w", ErrProtocol)
	}
	at, end := cl.off, cl.off+int64(cl.n)
	for ; n > 0; n -= 8 {
		if _, err := io.ReadFull(c.br, word[:]); err != nil {
			return err
		}
		size, state := int64(be.Uint32(word[:])), c.state(be.Uint32(word[4:]))
		if size == 0 {
			return fmt.Errorf("block status of nothing at %d: %w", at, ErrProtocol)
		}
		size = min(size, end-at)
		last := len(cl.extents) - 1
		switch {
		case size == 0:
		case last >= 0 && cl.extents[last].State == state && cl.extents[last].Off+cl.extents[last].N == at:
			cl.extents[last].N += size
		case len(cl.extents) == maxExtents:
			end = at // what follows is not listened to
			continue
		default:
			cl.extents = append(cl.extents, block.Extent{Off: at, N: size, State: state})
		}
		at += size
	}
	return nil
}

func (c *Client) errorChunk(cl *exchange, n uint32) error {
	p := make([]byte, n)
	if _, err := io.ReadFull(c.br, p); err != nil {
		return err
	}
	errno, size := Errno(be.Uint32(p)), int(be.Uint16(p[4:]))
	if errno == OK || size > len(p)-6 {
		return fmt.Errorf("error chunk %x: %w", p[:6], ErrProtocol)
	}
	if cl.errno == OK {
		cl.errno, cl.text = errno, string(p[6:6+size])
	}
	return nil
}

// complete checks, at the last chunk, that what was asked for came.
func (cl *exchange) complete() error {
	switch {
	case cl.errno != OK:
	case cl.cmd == cmdRead && !cl.got.whole(cl.n):
		return fmt.Errorf("a read of %d bytes at %d was answered in part: %w", cl.n, cl.off, ErrProtocol)
	case cl.cmd == cmdBlockStatus && len(cl.extents) == 0:
		return fmt.Errorf("block status without the context that was selected: %w", ErrProtocol)
	}
	return nil
}

// spans is a set of bytes, as ranges that do not overlap. Pieces that come in order are one.
type spans []span

type span struct{ from, to uint32 }

// add adds n bytes at from. It returns false, and the set is void, when one of them is there already, or there are too many ranges.
func (s *spans) add(from, n uint32) bool {
	to, next := from+n, (*span)(nil)
	for i := range *s {
		r := &(*s)[i]
		if from < r.to && r.from < to {
			return false
		}
		if r.to == from {
			next = r
		}
	}
	if next != nil {
		next.to = to
		return true
	}
	*s = append(*s, span{from, to})
	return len(*s) <= maxSpans
}

// whole tells whether the set is [0, n): ranges do not overlap, so it is enough to count.
func (s spans) whole(n uint32) bool {
	sum := uint64(0)
	for _, r := range s {
		sum += uint64(r.to - r.from)
	}
	return sum == uint64(n)
}
