package nbd

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"ashlar/internal/block"
)

// ErrProtocol: the peer broke the protocol in a way that loses the stream; the connection ends.
var ErrProtocol = errors.New("protocol violation")

// state is everything a connection is between two requests: what negotiation leaves behind. With what was received of the next request
// (rest) and the socket, another process can go on serving it.
type state struct {
	Export     string   // canonical name
	Structured bool     // structured replies were negotiated
	Contexts   []uint32 // ids of the meta contexts selected
	SizeBytes  int64    // what the client was told
	Flags      uint16   // the same: transmission flags
}

// rest is what was received of a request that had not arrived whole when the connection was detached.
type rest struct {
	received []byte   // its header and payload so far
	refused  *refusal // or: it is refused already, and its payload is being skipped
}

// refusal is a write that is answered with an error as soon as skip more bytes of its payload have gone by.
type refusal struct {
	req   request
	errno Errno
	skip  int
}

// Kinds of request that have a pace of their own.
const (
	kindRead = iota
	kindWrite
	kinds
)

// directBytes is the payload from which on a write that has not wholly arrived is received into a buffer of its own.
const directBytes = 32 << 10

// conn is a connection in its transmission phase. run is the reading goroutine; the fields up to the blank line are fixed, those after it
// are the reading goroutine's own, and the last group is shared with the workers.
type conn struct {
	state    state
	contexts []metaContext
	dev      block.Device
	readOnly bool
	fastZero bool
	mayWait  func() bool       // nil: never
	far      bool              // any request may wait
	errno    func(error) Errno // nil: the protocol's
	link     link
	pool     *buffers
	stats    *counters
	stop     *atomic.Bool // the owner wants the connection gone: start nothing more

	in      *buffer // receive buffer; its unparsed bytes are mem[r:w]
	r, w    int
	limit   int  // how much to read at once
	filled  bool // the last read got all it asked for
	direct  bool // since then a payload went to a buffer of its own
	out     *buffer
	paces   [kinds]pace
	jobs    chan job
	started int // workers
	alone   int // requests in a row that found nothing else to do; negative after a client overlapped with a flush
	rest    rest

	bud       budget
	send      sender
	wg        sync.WaitGroup // workers
	executing atomic.Int32   // requests that workers have not answered yet
	inflight  atomic.Int32   // the same, until the worker is done with the reply
	holeSkip  atomic.Int32   // large reads until holes are looked for again
	holeRun   atomic.Int32   // how many that were the last time
}

// transmission is what a conn is made of.
type transmission struct {
	export Export
	state  state
	link   link
	pool   *buffers
	stats  *counters
	stop   *atomic.Bool
	rest   rest // what a connection that was detached had received
}

func newConn(t transmission) *conn {
	c := &conn{
		state: t.state, dev: t.export.Device, readOnly: t.export.ReadOnly, fastZero: t.export.FastZero, mayWait: t.export.MayWait, far: t.export.Far, errno: t.export.Errno,
		link: t.link, pool: t.pool, stats: t.stats, stop: t.stop,
	}
	for _, id := range t.state.Contexts {
		if m, ok := metaByID(id); ok {
			c.contexts = append(c.contexts, m)
		}
	}
	c.bud.init()
	c.send.link, c.send.pool, c.send.bud = t.link, t.pool, &c.bud
	return c
}

// transmit serves requests until the client disconnects (nil), the stream ends in the middle of a request, breaks or is interrupted. Every
// request that was received whole has then been carried out and, where the stream allowed, answered. errWoken says that the stream is in order, and
// that rest was received of what comes next.
func transmit(t transmission) (rest, error) {
	c := newConn(t)
	err := c.resume(t.rest)
	if err == nil {
		err = c.run()
	}
	c.flush()
	c.stopWorkers()
	if errors.Is(err, errWoken) && c.in != nil {
		c.rest.received = append(c.rest.received, c.in.mem[c.r:c.w]...)
	}
	c.pool.put(c.in)
	if sendErr := c.send.failure(); sendErr != nil && (err == nil || errors.Is(err, io.EOF) || errors.Is(err, errWoken)) {
		err = sendErr
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return c.rest, err
}

// resume begins with what another process had received.
func (c *conn) resume(left rest) error {
	if left.refused == nil && len(left.received) == 0 {
		return nil
	}
	c.in, c.limit = c.pool.get(max(len(left.received), largeBuffer)), largeBuffer
	c.w = copy(c.in.mem, left.received)
	if left.refused != nil {
		if err := c.skip(*left.refused); err != nil {
			return err
		}
	}
	if err := c.requests(); err != nil {
		return err
	}
	c.flush()
	if c.in.class < 0 { // as large as the payload that came in it: not to be kept
		in := c.in
		c.in = c.pool.get(largeBuffer)
		c.r, c.w = 0, copy(c.in.mem, in.mem[c.r:c.w])
	}
	return nil
}

// run is the reading goroutine's loop. It returns io.EOF when the client is done.
func (c *conn) run() error {
	for {
		if err := c.fill(); err != nil {
			return err
		}
		if err := c.requests(); err != nil {
			return err
		}
		c.flush()
	}
}

// requests handles every whole request in the receive buffer.
func (c *conn) requests() error {
	for c.w-c.r >= requestBytes {
		if c.stop.Load() {
			return io.EOF
		}
		req, ok := parseRequest(c.in.mem[c.r:c.w])
		if !ok {
			return fmt.Errorf("nbd: request magic %#x: %w", be.Uint32(c.in.mem[c.r:]), ErrProtocol)
		}
		switch req.cmd {
		case cmdDisc:
			return io.EOF
		case cmdWrite:
			whole, err := c.write(req)
			if err != nil || !whole {
				return err
			}
		default:
			c.r += requestBytes
			if errno := c.check(req); errno != OK {
				c.refuse(req, errno)
				continue
			}
			c.handle(req, nil)
		}
	}
	return nil
}

// write takes a write request, whose header is at r, with its payload. It returns false, and consumes nothing, when the payload is worth
// waiting for in the receive buffer.
func (c *conn) write(req request) (whole bool, err error) {
	n := int(req.n)
	if n > maxDrainBytes {
		return false, fmt.Errorf("nbd: write of %d bytes: %w", n, ErrProtocol)
	}
	have := c.w - c.r - requestBytes
	errno := c.check(req)
	switch {
	case errno != OK:
		c.r += requestBytes
		if err := c.skip(refusal{req, errno, n}); err != nil {
			return false, err
		}
	case have >= n:
		c.r += requestBytes
		payload := c.in.mem[c.r : c.r+n]
		c.r += n
		c.handle(req, payload)
	case n < directBytes:
		return false, nil
	default:
		c.r += requestBytes
		b := c.take(n)
		if got, err := c.receive(b.data(n)); err != nil {
			if errors.Is(err, errWoken) {
				c.rest.received = append(appendRequest(nil, req), b.data(got)...)
			}
			c.release(b)
			return false, err
		}
		c.direct = true
		c.handleOwned(req, b)
	}
	return true, nil
}

// receive fills p with what was received already, and the rest from the link. After an error n bytes are there.
func (c *conn) receive(p []byte) (n int, err error) {
	n = copy(p, c.in.mem[c.r:c.w])
	c.r += n
	c.flush() // what was answered must not wait for the client to finish sending
	for n < len(p) {
		m, err := c.readMore(p[n:])
		if err != nil {
			return n, err
		}
		n += m
	}
	return n, nil
}

// skip skips a refused write's payload, and then answers it.
func (c *conn) skip(r refusal) error {
	for {
		m := min(r.skip, c.w-c.r)
		c.r += m
		if r.skip -= m; r.skip == 0 {
			c.refuse(r.req, r.errno)
			return nil
		}
		c.flush()
		c.r, c.w = 0, 0
		m, err := c.readMore(c.in.mem)
		if err != nil {
			if errors.Is(err, errWoken) {
				left := r
				c.rest.refused = &left
			}
			return err
		}
		c.w = m
	}
}

// readMore reads in the middle of a request, where an end is an error and idleness is the client's affair.
func (c *conn) readMore(p []byte) (int, error) {
	for {
		n, err := c.link.read(p)
		switch {
		case errors.Is(err, errIdle):
		case errors.Is(err, errWoken):
			return 0, errWoken
		case errors.Is(err, io.EOF):
			return 0, fmt.Errorf("nbd: in the middle of a request: %w", io.ErrUnexpectedEOF)
		case err != nil:
			return 0, fmt.Errorf("nbd: receive: %w", err)
		default:
			return n, nil
		}
	}
}

// fill reads once into the receive buffer, after making room.
func (c *conn) fill() error {
	c.makeRoom()
	for {
		end := min(len(c.in.mem), c.w+c.limit)
		n, err := c.link.read(c.in.mem[c.w:end])
		switch {
		case err == nil:
			c.filled, c.direct = c.w+n == end, false
			c.w += n
			return nil
		case errors.Is(err, errIdle):
			if err := c.idle(); err != nil {
				return err
			}
		case errors.Is(err, io.EOF) && c.r < c.w:
			return fmt.Errorf("nbd: in the middle of a request: %w", io.ErrUnexpectedEOF)
		case errors.Is(err, io.EOF):
			return io.EOF
		default:
			return fmt.Errorf("nbd: receive: %w", err)
		}
	}
}

// makeRoom moves the unparsed rest to the front, and chooses how much to read: much while the client fills what it is given, little after
// a large payload, so that the next one's bytes go to their place without a copy.
func (c *conn) makeRoom() {
	switch {
	case c.in == nil:
		c.in, c.limit = c.pool.get(smallReceive), smallReceive
	case c.direct:
		c.limit = smallReceive
	case c.filled:
		c.limit = largeBuffer
	}
	in := c.in
	if c.limit > len(in.mem) {
		c.in = c.pool.get(c.limit)
	}
	copy(c.in.mem, in.mem[c.r:c.w])
	c.r, c.w = 0, c.w-c.r
	if in != c.in {
		c.pool.put(in)
	}
}

// idle gives back what a connection without traffic does not need and waits for more without holding a thread.
func (c *conn) idle() error {
	if c.r < c.w || c.inflight.Load() > 0 {
		return nil
	}
	c.stopWorkers()
	c.pool.put(c.in)
	c.in, c.r, c.w = nil, 0, 0
	c.filled, c.direct = false, false
	if err := c.link.park(); err != nil {
		return err
	}
	c.makeRoom()
	return nil
}
