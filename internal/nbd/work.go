package nbd

import (
	"time"

	"ashlar/internal/block"
)

const (
	// maxWorkers is how many requests of a connection are carried out at once beside the reading goroutine.
	maxWorkers = 32
	// inlineZeroBytes is the largest zeroing that the reading goroutine does itself.
	inlineZeroBytes = 64 << 10
	// aloneRun is how many requests have to come one at a time before one that may wait is carried out by the reading goroutine, and
	// aloneBackoff how many more after one that held up others.
	aloneRun     = 64
	aloneBackoff = 1024
	// errorRoom holds any reply without data: a structured error with its text.
	errorRoom = 512
)

// job is a request for a worker. What it needs in memory was taken by the reading goroutine, which is the one that may wait for it.
type job struct {
	req     request
	payload *buffer // of a write
	reply   *buffer // of a request that is answered with data
}

// check refuses what the protocol or the export does not allow, before anything is done.
func (c *conn) check(req request) Errno {
	flags := uint16(cmdFlagFUA)
	writes := false
	switch req.cmd {
	case cmdRead:
		if c.state.Structured {
			flags |= cmdFlagDF
		}
	case cmdWrite, cmdTrim:
		writes = true
	case cmdWriteZeroes:
		writes = true
		flags |= cmdFlagNoHole | cmdFlagFast
	case cmdFlush:
		if req.off != 0 || req.n != 0 {
			return EINVAL
		}
	case cmdCache:
	case cmdBlockStatus:
		flags |= cmdFlagReqOne
		if len(c.contexts) == 0 || req.n == 0 {
			return EINVAL
		}
	default:
		return EINVAL
	}
	switch {
	case req.flags&^flags != 0:
		return EINVAL
	case writes && c.readOnly:
		return EPERM
	case block.CheckRange(req.off, int64(req.n), c.dev.Size()) != nil:
		return rangeErrno(req.cmd)
	case req.flags&cmdFlagFast != 0 && (!c.fastZero || req.flags&cmdFlagNoHole != 0):
		return ENOTSUP // zeroes that take space are written, which is what the client would rather do itself
	case req.cmd == cmdWrite && req.n > maxPayloadBytes:
		return EINVAL
	case req.cmd == cmdRead && req.n > maxPayloadBytes && c.state.Structured:
		return EOVERFLOW
	case req.cmd == cmdRead && req.n > maxPayloadBytes:
		return EINVAL
	}
	return OK
}

// mayBlock tells of requests that never run in the reading goroutine: they wait for a medium, or take long.
func mayBlock(req request) bool {
	switch req.cmd {
	case cmdFlush, cmdCache:
		return true
	case cmdTrim, cmdWriteZeroes:
		return req.flags&^cmdFlagFast != 0 || req.n > inlineZeroBytes // FUA, or NO_HOLE: real writes
	case cmdWrite:
		return req.flags&cmdFlagFUA != 0
	}
	return false
}

func kindOf(cmd uint16) int {
	if cmd == cmdRead || cmd == cmdBlockStatus {
		return kindRead
	}
	return kindWrite
}

// replyRoom is the most bytes that the answer to req takes.
func (c *conn) replyRoom(req request) int {
	switch req.cmd {
	case cmdRead:
		return max(errorRoom, int(req.n)+maxHoles*dataChunkBytes)
	case cmdBlockStatus:
		return errorRoom + len(c.contexts)*(structuredBytes+4+8*maxDescriptors)
	}
	return errorRoom
}

// pooled decides whether the workers get req.
func (c *conn) pooled(req request) bool {
	more := c.w-c.r >= requestBytes || c.executing.Load() > 0
	if more {
		c.alone = min(c.alone, 0)
	}
	c.alone++
	switch {
	case c.far:
		return !c.syncsInline(req)
	case c.mayWait != nil && c.mayWait():
		return true
	case mayBlock(req):
		return !c.syncsInline(req)
	}
	return c.paces[kindOf(req.cmd)].pool(more)
}

// handle carries out a checked request, or has it carried out. payload lies in the receive buffer.
func (c *conn) handle(req request, payload []byte) {
	if !c.pooled(req) {
		c.inline(req, payload)
		return
	}
	j := job{req: req}
	if payload != nil {
		j.payload = c.take(len(payload))
		copy(j.payload.data(len(payload)), payload)
	}
	c.dispatch(j)
}

// handleOwned is handle for a write whose payload has a buffer of its own.
func (c *conn) handleOwned(req request, b *buffer) {
	if c.pooled(req) {
		c.dispatch(job{req: req, payload: b})
		return
	}
	c.inline(req, b.data(int(req.n)))
	c.release(b)
}

// syncsInline tells whether the reading goroutine carries out req, which may wait, itself: a flush, a write with FUA, what goes to another
// machine. The client has been sending one request at a time for a while, so that nothing is behind it, and a hand-over would only cost time.
func (c *conn) syncsInline(req request) bool {
	_, canPeek := c.link.(peeker)
	return canPeek && c.alone > aloneRun && (req.cmd == cmdFlush || req.cmd == cmdWrite || req.cmd == cmdRead)
}

// sync carries out req, which may wait, in the reading goroutine. A client that sent more before it had the answer is not what it seemed: what may
// wait goes to the workers for a long while.
func (c *conn) sync(req request, payload []byte) {
	c.flush()
	out := c.gather(c.replyRoom(req))
	c.execute(req, payload, out)
	if out != c.out {
		c.send.deliver(out)
	}
	if p, ok := c.link.(peeker); ok && p.pending() {
		c.alone = -aloneBackoff
	}
}

// inline carries out req in the reading goroutine; the reply waits with others for flush, unless it is large.
func (c *conn) inline(req request, payload []byte) {
	if c.far || mayBlock(req) {
		c.sync(req, payload)
		return
	}
	pace := &c.paces[kindOf(req.cmd)]
	if pace.mode != paceFast {
		c.flush() // this one may take its time: what is answered must not wait for it
	}
	out := c.gather(c.replyRoom(req))
	start := time.Now()
	c.execute(req, payload, out)
	pace.took(time.Since(start), req.n)
	if out != c.out {
		c.flush()
		c.send.deliver(out)
	}
}

// refuse answers req with an error.
func (c *conn) refuse(req request, errno Errno) {
	c.stats.count(req, errno)
	c.appendError(c.gather(errorRoom), req, errno)
}

// gather returns the buffer that gathers replies, with room bytes free, or a buffer of its own for a larger reply.
func (c *conn) gather(room int) *buffer {
	if room > gatherBytes {
		b := c.take(room)
		b.from, b.to = dataAt-c.dataHeader(), dataAt-c.dataHeader() // the data begins on a page
		return b
	}
	if c.out != nil && c.out.free() < room {
		c.flush()
	}
	if c.out == nil {
		c.out = c.take(gatherBytes)
	}
	return c.out
}

// flush sends the gathered replies.
func (c *conn) flush() {
	if b := c.out; b != nil {
		c.out = nil
		c.send.deliver(b)
	}
}

// take gets a buffer within the budget. When that has to wait, what was answered goes out first: the client may be waiting for it.
func (c *conn) take(n int) *buffer {
	b := c.pool.get(n)
	if !c.bud.try(len(b.mem)) {
		c.flush()
		c.bud.take(len(b.mem))
	}
	b.charged = len(b.mem)
	return b
}

// release gives back a buffer that will not be sent.
func (c *conn) release(b *buffer) {
	if b == nil {
		return
	}
	n := b.charged
	c.pool.put(b)
	c.bud.give(n)
}

// dispatch hands j to an idle worker, a new one, or whoever is free first.
func (c *conn) dispatch(j job) {
	if j.req.cmd == cmdRead || j.req.cmd == cmdBlockStatus {
		j.reply = c.take(c.replyRoom(j.req))
		j.reply.from, j.reply.to = dataAt-c.dataHeader(), dataAt-c.dataHeader()
	} else if !c.bud.try(0) {
		c.flush()
		c.bud.take(0)
	}
	c.executing.Add(1)
	c.inflight.Add(1)
	if c.jobs == nil {
		c.jobs = make(chan job)
	}
	select {
	case c.jobs <- j:
		return
	default:
	}
	if c.started < maxWorkers {
		c.started++
		jobs := c.jobs
		c.wg.Go(func() { c.worker(jobs, j) })
		return
	}
	c.flush()
	c.jobs <- j
}

// stopWorkers waits until every request that was handed out is answered.
func (c *conn) stopWorkers() {
	if c.jobs != nil {
		close(c.jobs)
		c.jobs, c.started = nil, 0
	}
	c.wg.Wait()
}

// worker carries out j and then what comes by jobs.
func (c *conn) worker(jobs <-chan job, j job) {
	scratch := c.pool.get(errorRoom)
	defer c.pool.put(scratch)
	for ok := true; ok; j, ok = <-jobs {
		out := j.reply
		if out == nil {
			out = scratch
			out.from, out.to = 0, 0
		}
		var payload []byte
		if j.payload != nil {
			payload = j.payload.data(int(j.req.n))
		}
		c.execute(j.req, payload, out)
		c.release(j.payload)
		c.executing.Add(-1)
		if j.reply != nil {
			c.send.deliver(j.reply)
		} else {
			c.send.deliverCopy(scratch.mem[:scratch.to])
		}
		c.inflight.Add(-1)
	}
}
