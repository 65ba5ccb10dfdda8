package nbd

import (
	"net"
	"sync"
)

const (
	// copyBytes is the payload up to which a copy costs less than a piece of its own in a write.
	copyBytes = 16 << 10
	// keepBytes is the largest gathering buffer that is kept.
	keepBytes = 1 << 20
)

// outgoing sends a Client's requests. As with the server's sender, whoever brings one while nobody writes becomes the writer and also
// writes what others bring meanwhile.
type outgoing struct {
	mu      sync.Mutex
	queue   []*exchange // guarded by mu
	spare   []*exchange // guarded by mu: the array that queue had before
	writing bool        // guarded by mu: somebody is in send's loop

	gather []byte      // only the writer uses it
	iov    net.Buffers // the same
}

// send sends cl, or leaves it to who is sending; the sending party lets go of it afterwards, whatever happened.
func (o *outgoing) send(c *Client, cl *exchange) {
	o.mu.Lock()
	o.queue = append(o.queue, cl)
	if o.writing {
		o.mu.Unlock()
		return
	}
	o.writing = true
	for len(o.queue) > 0 {
		batch := o.queue
		o.queue = o.spare[:0]
		o.mu.Unlock()
		if err := o.write(c, batch); err != nil {
			c.broke(err)
		}
		for i, cl := range batch {
			cl.leave()
			batch[i] = nil
		}
		o.mu.Lock()
		o.spare = batch
	}
	o.writing = false
	o.mu.Unlock()
}

// last sends p when nobody is writing, which then nobody does any more.
func (o *outgoing) last(c *Client, p []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.writing {
		_, _ = c.nc.Write(p)
	}
}

// write sends batch with as few system calls as there are reasons for. Small payloads are copied beside their headers.
func (o *outgoing) write(c *Client, batch []*exchange) error {
	buf, bufs, mark, n := o.gather[:0], o.iov[:0], 0, 0
	for _, cl := range batch {
		n += requestBytes + len(cl.payload)
		buf = appendRequest(buf, cl.request)
		if len(cl.payload) <= copyBytes {
			buf = append(buf, cl.payload...)
			continue
		}
		bufs = append(bufs, buf[mark:], cl.payload) // buf may move when it grows; what was cut from it stays right
		mark = len(buf)
	}
	if mark < len(buf) {
		bufs = append(bufs, buf[mark:])
	}
	if cap(buf) <= keepBytes {
		o.gather = buf
	}
	o.iov = bufs
	err := c.cork.together(n, func() error {
		_, err := bufs.WriteTo(c.nc)
		return err
	})
	clear(o.iov) // keep nobody's payload alive
	return err
}
