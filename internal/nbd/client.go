package nbd

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"ashlar/internal/block"
)

// ErrDisconnected: the connection to the server is gone. What was not answered may or may not have been done, and what was written since
// the last Flush may be lost. A Client does not connect again: dial a new one.
var ErrDisconnected = errors.New("connection to the NBD server is gone")

// ErrNoFlush: the server offers no flush, so that nobody can promise that what was written survives a power cut.
var ErrNoFlush = errors.New("the NBD server cannot flush")

const (
	// maxCalls is how many requests one Client has in flight; more wait.
	maxCalls = 255
	// receiveBytes is the receive buffer: small replies are read many at once, the data of large ones goes straight to its place.
	receiveBytes = 64 << 10
	// zeroBytes bounds one WRITE_ZEROES, so that a server which has to write them answers in time; statusBytes one BLOCK_STATUS.
	zeroBytes   = 256 << 20
	statusBytes = 1 << 30
	// farewell is how long a Client that closes in good order tries to say so.
	farewell = time.Second
)

// Client is an export of an NBD server as a Device. Requests of all callers go over one connection, up to 256 at once, and are answered
// in any order.
//
// It takes the alignment that the server asks for (AlignBytes, mostly 1) at any place but the end: others get block.ErrAlign; reads are
// accepted anywhere. Requests larger than the server's maximum payload are sent as several. The server's errors come back as
// block.ErrReadOnly, block.ErrNoSpace, ErrServerClosed and, all of them, as the Errno that was sent. When the connection is lost every call, also those
// in flight, returns ErrDisconnected; after Close, block.ErrClosed. There is no time limit: a server that is stuck is given up by Close.
type Client struct {
	agreed
	name     string // for errors
	raw, nc  net.Conn
	br       *bufio.Reader         // of who has the seat
	head     [structuredBytes]byte // the same
	prompt   *promptConn           // what is read from, at the bottom; nil if it is no socket
	cork     *promptConn           // the same of what is written to, when it is TLS that writes there
	readOnly bool

	slots chan uint8    // numbers of calls that are free
	heard atomic.Uint64 // replies, or pieces of them, that began to arrive
	dead  chan struct{} // closed once err is set
	turn  chan struct{} // capacity 1: the seat is the receiver's again
	wg    sync.WaitGroup
	out   outgoing

	pinging chan struct{} // capacity 1: holds a token while the call of Ping is under way

	written     atomic.Bool // something was written, so that a Flush has to be one
	flushFailed atomic.Bool

	mu     sync.Mutex              // guards the rest
	calls  [maxCalls + 1]*exchange // the last is Ping's
	serial uint64                  // makes every request's cookie another
	flying int                     // how many calls there are
	alone  int                     // calls in a row that found no other
	seat   seat                    // who reads
	err    error                   // why nothing more can be called
	closed bool
}

var _ block.Device = (*Client)(nil)

// exchange is a request in flight. Two parties let go of it before it is done: who sends it, and who receives its reply. Only then may the
// caller's buffer be used again, whatever a server answers before it was asked.
type exchange struct {
	request
	p       []byte // where the data of a read goes
	payload []byte // of a write
	got     spans  // of p
	extents []block.Extent
	errno   Errno
	text    string

	parties atomic.Int32
	err     error         // of the connection; written before the receiving party lets go
	done    chan struct{} // capacity 1
}

// leave is called by each party.
func (cl *exchange) leave() {
	if cl.parties.Add(-1) == 0 {
		cl.done <- struct{}{}
	}
}

func newClient(n *negotiator, raw net.Conn, a agreed, readOnly bool) *Client {
	c := &Client{
		agreed: a, name: n.export, raw: raw, nc: n.nc, br: n.br, readOnly: readOnly || a.flags&flagReadOnly != 0,
		slots: make(chan uint8, maxCalls), dead: make(chan struct{}), turn: make(chan struct{}, 1), pinging: make(chan struct{}, 1),
		prompt: promptOf(n.in), cork: promptOf(n.nc),
	}
	for i := range uint8(maxCalls) {
		c.slots <- i
	}
	c.wg.Go(c.receive)
	return c
}

// Size implements block.Device.
func (c *Client) Size() int64 { return c.sizeBytes }

// AlignBytes is what offset and length of writes and zeroes must be multiples of, except at the end of the device: a power of two,
// at most block.UnitBytes unless the Client is read-only.
func (c *Client) AlignBytes() int64 { return c.minBlock }

// ReadOnly tells whether writes are refused, by the server or by ClientOptions.
func (c *Client) ReadOnly() bool { return c.readOnly }

// Close implements block.Device: it lets every call return, and leaves in good order when there is none. It does not flush. A server that
// neither answers nor takes anything delays it by at most a second.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return block.ErrClosed
	}
	c.closed = true
	orderly := c.err == nil
	if orderly {
		close(c.dead)
	}
	c.err = block.ErrClosed
	for _, cl := range c.calls {
		orderly = orderly && cl == nil
	}
	c.mu.Unlock()
	if orderly {
		_ = c.raw.SetDeadline(time.Now().Add(farewell))
		c.out.last(c, appendRequest(nil, request{cmd: cmdDisc})) // that it was sent is all there is to know
		_ = c.nc.Close()
	}
	_ = c.raw.Close()
	c.wg.Wait()
	return nil
}

// broke ends the connection for a reason, of which the first counts.
func (c *Client) broke(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = fmt.Errorf("%w: %w", ErrDisconnected, err)
		close(c.dead)
	}
	_ = c.raw.Close()
}

// failure is why nothing can be called.
func (c *Client) failure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// check is what every call begins with.
func (c *Client) check(off, n int64) error {
	select {
	case <-c.dead:
		return c.failure()
	default:
		return block.CheckRange(off, n, c.sizeBytes)
	}
}

// checkWrite is check for what changes the device.
func (c *Client) checkWrite(off, n int64) error {
	if err := c.check(off, n); err != nil || n == 0 {
		return err
	}
	switch end := off + n; {
	case c.readOnly:
		return block.ErrReadOnly
	case off%c.minBlock != 0, end%c.minBlock != 0 && end != c.sizeBytes:
		return fmt.Errorf("the server takes blocks of %d bytes: %w", c.minBlock, block.ErrAlign)
	}
	return nil
}

// do sends cl and waits for its answer.
func (c *Client) do(cl *exchange) error {
	var slot uint8
	select {
	case slot = <-c.slots:
	case <-c.dead:
		return c.failure()
	}
	defer func() { c.slots <- slot }()
	if err := c.exchange(cl, slot); err != nil {
		return err
	}
	return remoteError(cl.errno, cl.text, cl.cmd)
}

// exchange sends cl as the call of a slot, and waits until it was answered, or the connection was lost.
func (c *Client) exchange(cl *exchange, slot uint8) error {
	cl.parties.Store(2)
	cl.done = make(chan struct{}, 1)
	c.mu.Lock()
	if err := c.err; err != nil {
		c.mu.Unlock()
		return err
	}
	c.serial++
	cl.cookie = c.serial<<8 | uint64(slot)
	c.calls[slot] = cl
	reads := c.begin()
	c.mu.Unlock()
	c.out.send(c, cl)
	if reads {
		c.readUntil(cl)
	}
	<-cl.done
	return cl.err
}

// Ping returns once the server answered something that touches no device (a block status of nothing, which every server refuses), or the connection is lost. It goes out behind the
// requests that were sent before, but waits for no place among those in flight.
func (c *Client) Ping() error {
	select {
	case c.pinging <- struct{}{}:
	case <-c.dead:
		return fmt.Errorf("nbd: export %q: ping: %w", c.name, c.failure())
	}
	defer func() { <-c.pinging }()
	if err := c.exchange(&exchange{request: request{cmd: cmdBlockStatus}}, maxCalls); err != nil {
		return fmt.Errorf("nbd: export %q: ping: %w", c.name, err)
	}
	return nil
}

// Heard grows whenever something arrives from the server.
func (c *Client) Heard() uint64 { return c.heard.Load() }

// Dead is closed once nothing can be called any more: the connection was lost, or the Client closed.
func (c *Client) Dead() <-chan struct{} { return c.dead }

// wrap says what failed.
func (c *Client) wrap(err error, what string, off, n int64) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("nbd: export %q: %s %d bytes at %d: %w", c.name, what, n, off, err)
}

// ReadAt implements io.ReaderAt.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	n := int64(len(p))
	if err := c.check(off, n); err != nil {
		return 0, c.wrap(err, "read", off, n)
	}
	for done := int64(0); done < n; {
		m := c.piece(off+done, n-done, c.maxPayload)
		if err := c.read(p[done:done+m], off+done); err != nil {
			return int(done), c.wrap(err, "read", off, n)
		}
		done += m
	}
	return int(n), nil
}

// piece is how much of [off, off+n) goes into one request of at most limit bytes, with the blocks at its ends.
func (c *Client) piece(off, n, limit int64) int64 {
	return min(n, limit-off%c.minBlock)
}

// around is the whole blocks that [off, off+n) lies in.
func (c *Client) around(off, n int64) (from, to int64) {
	from = off - off%c.minBlock
	to = (off + n + c.minBlock - 1) / c.minBlock * c.minBlock
	return from, min(to, c.sizeBytes)
}

func (c *Client) read(p []byte, off int64) error {
	from, to := c.around(off, int64(len(p)))
	buf := p
	if to-from != int64(len(p)) {
		buf = make([]byte, to-from)
	}
	cl := &exchange{request: request{cmd: cmdRead, off: from, n: uint32(len(buf))}, p: buf}
	if err := c.do(cl); err != nil {
		return err
	}
	if to-from != int64(len(p)) {
		copy(p, buf[off-from:])
	}
	return nil
}

// WriteAt implements io.WriterAt.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	n := int64(len(p))
	if err := c.checkWrite(off, n); err != nil {
		return 0, c.wrap(err, "write", off, n)
	}
	for done := int64(0); done < n; {
		m := min(n-done, c.maxPayload)
		if err := c.write(p[done:done+m], off+done); err != nil {
			return int(done), c.wrap(err, "write", off, n)
		}
		done += m
	}
	return int(n), nil
}

func (c *Client) write(p []byte, off int64) error {
	c.written.Store(true)
	return c.do(&exchange{request: request{cmd: cmdWrite, off: off, n: uint32(len(p))}, payload: p})
}

// Zero implements block.Device, with WRITE_ZEROES, which may free the space, or by writing zeroes where the server has none. TRIM is not
// used: the protocol does not promise what is read after it.
func (c *Client) Zero(off, n int64) error {
	if err := c.checkWrite(off, n); err != nil {
		return c.wrap(err, "zero", off, n)
	}
	for done := int64(0); done < n; {
		m, err := c.zeroPiece(off+done, n-done)
		if err != nil {
			return c.wrap(err, "zero", off, n)
		}
		done += m
	}
	return nil
}

// zeroPiece zeroes up to n bytes at off and returns how many.
func (c *Client) zeroPiece(off, n int64) (int64, error) {
	if c.flags&flagWriteZeroes == 0 {
		n = min(n, c.maxPayload, zeroChunk)
		return n, c.write(make([]byte, n), off)
	}
	c.written.Store(true)
	n = min(n, zeroBytes)
	return n, c.do(&exchange{request: request{cmd: cmdWriteZeroes, off: off, n: uint32(n)}})
}

// Flush implements block.Device. ErrNoFlush when the server has no flush and something was written.
func (c *Client) Flush() error {
	err := c.check(0, 0)
	switch {
	case err != nil:
	case c.flushFailed.Load():
		err = block.ErrFailed
	case c.flags&flagFlush != 0:
		if err = c.do(&exchange{request: request{cmd: cmdFlush}}); err != nil {
			c.flushFailed.Store(true)
		}
	case c.written.Load():
		err = ErrNoFlush
	}
	if err != nil {
		return fmt.Errorf("nbd: export %q: flush: %w", c.name, err)
	}
	return nil
}

// Extents implements block.Device, from base:allocation: what the server says reads as zero is Zero, all else Data; or from
// ashlar:layer (ClientOptions.States). A server without such a context has Data only.
func (c *Client) Extents(off, n int64) ([]block.Extent, error) {
	if err := c.check(off, n); err != nil || n == 0 {
		return nil, c.wrap(err, "extents of", off, n)
	}
	if c.contextID == 0 {
		return []block.Extent{{Off: off, N: n, State: block.Data}}, nil
	}
	n = c.piece(off, n, statusBytes)
	from, to := c.around(off, n)
	cl := &exchange{request: request{cmd: cmdBlockStatus, off: from, n: uint32(to - from)}}
	if err := c.do(cl); err != nil {
		return nil, c.wrap(err, "extents of", off, n)
	}
	out := cl.extents[:0]
	for _, e := range cl.extents {
		end := min(e.Off+e.N, off+n)
		if e.Off = max(e.Off, off); e.Off < end {
			e.N = end - e.Off
			out = append(out, e)
		}
	}
	if len(out) == 0 { // the server described only what comes before off in its block
		return []block.Extent{{Off: off, N: n, State: block.Data}}, nil
	}
	return out, nil
}
