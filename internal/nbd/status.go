package nbd

import (
	"fmt"

	"ashlar/internal/block"
)

// status appends one chunk per meta context with the descriptors of req's range; they may stop short of it, and there is at least one.
// After an error nothing was appended.
func (c *conn) status(req request, out *buffer) error {
	mark := out.to
	for i, m := range c.contexts {
		head := out.append(structuredBytes + 4)
		first := out.to
		if err := c.describe(req, m, out); err != nil {
			out.to = mark
			return err
		}
		done := i == len(c.contexts)-1
		putChunk(head, chunk{done: done, typ: replyBlockStatus, cookie: req.cookie, n: 4 + out.to - first})
		be.PutUint32(head[structuredBytes:], m.id)
	}
	return nil
}

// describe appends the descriptors that context m has for req's range; neighbours with equal flags are one.
func (c *conn) describe(req request, m metaContext, out *buffer) error {
	d := descriptors{out: out, limit: maxDescriptors}
	if req.flags&cmdFlagReqOne != 0 {
		d.limit = 1
	}
	end := req.off + int64(req.n)
	for at := req.off; at < end; {
		extents, err := c.dev.Extents(at, min(end-at, statusWindow))
		if err != nil {
			return err
		}
		before := at
		for _, e := range extents {
			if e.Off != at || e.N <= 0 || e.N > end-at {
				return fmt.Errorf("nbd: device describes %d+%d when asked about %d: %w", e.Off, e.N, at, block.ErrCorrupt)
			}
			if !d.add(uint32(e.N), m.flags(e.State)) {
				return nil
			}
			at += e.N
		}
		if at == before {
			return fmt.Errorf("nbd: device describes nothing at %d: %w", at, block.ErrCorrupt)
		}
	}
	return nil
}

// descriptors appends block descriptors to out, at most limit.
type descriptors struct {
	out   *buffer
	limit int
	last  []byte // the newest descriptor
}

// add appends n bytes with flags, and returns false when there is no room for another descriptor.
func (d *descriptors) add(n, flags uint32) bool {
	if d.last != nil && be.Uint32(d.last[4:]) == flags {
		be.PutUint32(d.last, be.Uint32(d.last)+n)
		return true
	}
	if d.limit == 0 {
		return false
	}
	d.limit--
	d.last = d.out.append(8)
	be.PutUint32(d.last, n)
	be.PutUint32(d.last[4:], flags)
	return true
}
