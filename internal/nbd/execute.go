package nbd

import (
	"time"

	"ashlar/internal/block"
)

const (
	// sparseBytes is the read from which on holes are looked for, and maxHoles how many pieces such a reply may have.
	sparseBytes = 64 << 10
	maxHoles    = 8
	// After a look that found none, sparseSkipFirst large reads go without one, twice as many after the next, up to sparseSkipMax: a
	// device full of data pays next to nothing, also where asking is dear (SEEK_HOLE walks every page of a tmpfs file).
	sparseSkipFirst = 32
	sparseSkipMax   = 1024

	// maxDescriptors bounds the answer to a block status request, which may stop short of what was asked.
	maxDescriptors = 4096
	// statusWindow is how much of the device is asked about at once, so that a fragmented one cannot make a huge list.
	statusWindow = 128 << 20

	zeroChunk = 256 << 10

	// cacheChunk is how much a CACHE reads at once, and cacheBytes how much in all: it is a hint, and must not occupy a worker for long.
	cacheChunk = 64 << 10
	cacheBytes = 32 << 20
)

// execute carries out a checked request on the Device and appends its whole reply to out, which has replyRoom bytes free.
func (c *conn) execute(req request, payload []byte, out *buffer) {
	var err error
	switch req.cmd {
	case cmdRead:
		err = c.read(req, out)
	case cmdBlockStatus:
		err = c.status(req, out)
	case cmdWrite:
		_, err = c.dev.WriteAt(payload, req.off)
	case cmdTrim:
		err = c.dev.Zero(req.off, int64(req.n))
	case cmdWriteZeroes:
		err = c.zero(req)
	case cmdCache:
		err = c.cache(req)
	case cmdFlush:
		err = c.dev.Flush()
	}
	// FUA on a command that does not write has no meaning, and clients are known to set it.
	if writes := req.cmd == cmdWrite || req.cmd == cmdTrim || req.cmd == cmdWriteZeroes; err == nil && writes && req.flags&cmdFlagFUA != 0 {
		err = c.dev.Flush()
	}
	errno := c.errnoFor(err, req.cmd)
	c.stats.count(req, errno)
	switch {
	case errno != OK:
		c.appendError(out, req, errno)
	case req.cmd != cmdRead && req.cmd != cmdBlockStatus:
		putSimple(out.append(simpleBytes), req.cookie, OK)
	}
}

// dataHeader is what precedes the data in the reply to a read.
func (c *conn) dataHeader() int {
	if c.state.Structured {
		return dataChunkBytes
	}
	return simpleBytes
}

// appendError appends a reply that says errno, as a structured chunk with a text when the client knows those.
func (c *conn) appendError(out *buffer, req request, errno Errno) {
	if !c.state.Structured {
		putSimple(out.append(simpleBytes), req.cookie, errno)
		return
	}
	text := errno.text()
	putChunk(out.append(structuredBytes), chunk{done: true, typ: replyError, cookie: req.cookie, n: 6 + len(text)})
	p := out.append(6 + len(text))
	be.PutUint32(p, uint32(errno))
	be.PutUint16(p[4:], uint16(len(text)))
	copy(p[6:], text)
}

// read appends the data of req, read straight to where it is sent from. After an error nothing was appended.
func (c *conn) read(req request, out *buffer) error {
	n := int(req.n)
	if n == 0 && c.state.Structured {
		putChunk(out.append(structuredBytes), chunk{done: true, typ: replyNone, cookie: req.cookie})
		return nil
	}
	if !c.state.Structured {
		data := out.mem[out.to+simpleBytes : out.to+simpleBytes+n]
		if _, err := c.dev.ReadAt(data, req.off); err != nil {
			return err
		}
		putSimple(out.append(simpleBytes+n), req.cookie, OK)
		return nil
	}
	mark := out.to
	whole := [1]block.Extent{{Off: req.off, N: int64(n), State: block.Data}}
	extents := whole[:]
	if sparse := c.sparse(req); sparse != nil {
		extents = sparse
	}
	for i, e := range extents {
		done := i == len(extents)-1
		if e.State != block.Data {
			p := out.append(holeChunkBytes)
			putChunk(p, chunk{done: done, typ: replyOffsetHole, cookie: req.cookie, n: 12})
			be.PutUint64(p[structuredBytes:], uint64(e.Off))
			be.PutUint32(p[structuredBytes+8:], uint32(e.N))
			continue
		}
		p := out.append(dataChunkBytes + int(e.N))
		if _, err := c.dev.ReadAt(p[dataChunkBytes:], e.Off); err != nil {
			out.to = mark
			return err
		}
		putChunk(p, chunk{done: done, typ: replyOffsetData, cookie: req.cookie, n: 8 + int(e.N)})
		be.PutUint64(p[structuredBytes:], uint64(e.Off))
	}
	return nil
}

// sparse returns the extents of a large read if they cover it in few pieces and half of it or more is holes, else nil. A hole that is
// written meanwhile is written by a request that this read overlaps: either content is right.
func (c *conn) sparse(req request) []block.Extent {
	if req.n < sparseBytes || req.flags&cmdFlagDF != 0 {
		return nil
	}
	if c.holeSkip.Load() > 0 {
		c.holeSkip.Add(-1)
		return nil
	}
	start := time.Now()
	extents, err := c.dev.Extents(req.off, int64(req.n))
	dear := time.Since(start) > slowFixed
	holes := int64(0)
	if err == nil && len(extents) <= maxHoles && covers(extents, req.off, int64(req.n)) {
		for _, e := range extents {
			if e.State != block.Data {
				holes += e.N
			}
		}
	}
	found := holes >= int64(req.n)/2
	skip := int32(0)
	switch {
	case dear:
		skip = sparseSkipMax
	case !found:
		skip = min(max(2*c.holeRun.Load(), sparseSkipFirst), sparseSkipMax)
	}
	c.holeRun.Store(skip)
	c.holeSkip.Store(skip)
	if !found {
		return nil
	}
	return extents
}

// covers tells whether extents are contiguous from off on and end at off+n.
func covers(extents []block.Extent, off, n int64) bool {
	at := off
	for _, e := range extents {
		if e.Off != at || e.N <= 0 || e.N > off+n-at {
			return false
		}
		at += e.N
	}
	return at == off+n
}

// zero carries out WRITE_ZEROES. With NO_HOLE the client wants the space, so zeroes are written as data.
func (c *conn) zero(req request) error {
	if req.flags&cmdFlagNoHole == 0 {
		return c.dev.Zero(req.off, int64(req.n))
	}
	zeroes := c.pool.zeroes()
	for done := int64(0); done < int64(req.n); {
		if c.stop.Load() {
			return block.ErrClosed
		}
		m := min(int64(req.n)-done, int64(len(zeroes)))
		if _, err := c.dev.WriteAt(zeroes[:m], req.off+done); err != nil {
			return err
		}
		done += m
	}
	return nil
}

// cache carries out CACHE: what was read and thrown away is likely to be read fast the next time.
func (c *conn) cache(req request) error {
	b := c.pool.get(cacheChunk)
	defer c.pool.put(b)
	for done, n := int64(0), min(int64(req.n), cacheBytes); done < n; {
		if c.stop.Load() {
			return block.ErrClosed
		}
		m := min(n-done, cacheChunk)
		if _, err := c.dev.ReadAt(b.data(int(m)), req.off+done); err != nil {
			return err
		}
		done += m
	}
	return nil
}
