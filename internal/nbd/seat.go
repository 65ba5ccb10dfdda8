package nbd

import "time"

// seat says who reads a Client's replies. A caller that is alone reads its own: to be woken by a goroutine that is woken itself costs as much as all else that a small request costs here.
//
//	            aloneCalls in a row found no other              the next call
//	receiving ─────────────────────────────────────▶ vacant ────────────────────▶ calling ─┐
//	    ▲                                             │  ▲                                │  │
//	    ├──── nothing was called for aloneIdle ───────┘  └──── answered, no other ────────┘  │
//	    └──── answered, and others wait; the connection is lost; closed ─────────────────────┘
//
// While the seat is vacant nobody hears that the connection is lost, for twice aloneIdle at most.
type seat uint8

const (
	seatReceiving seat = iota // the receiver reads
	seatVacant                // nobody does: no call waits for anything, and the receiver for its turn
	seatCalling               // a caller does, until it has its answer; the receiver waits for its turn
)

const (
	aloneCalls = 64
	aloneIdle  = 50 * time.Millisecond
)

// begin counts a call in, and tells whether it is to read its reply itself. mu is held.
func (c *Client) begin() (reads bool) {
	c.flying++
	if c.flying > 1 {
		c.alone = 0
		return false
	}
	c.alone++
	if c.seat != seatVacant {
		return false
	}
	c.seat = seatCalling
	return true
}

// end counts an answered call out, whose place is free then, and tells whether the seat is vacant now.
func (c *Client) end(cl *exchange) (vacant bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls[uint8(cl.cookie)] = nil
	c.flying--
	if c.flying > 0 || c.alone < aloneCalls || c.err != nil {
		return false
	}
	c.seat = seatVacant
	return true
}

// readUntil reads replies, in the caller's goroutine, until cl is answered or the connection lost.
func (c *Client) readUntil(cl *exchange) {
	c.prompt.hurry(true)
	defer c.prompt.hurry(false)
	for {
		done, err := c.reply()
		if err != nil {
			c.broke(err) // the receiver finds the same, and lets go of all calls
		}
		vacant := false
		if done != nil {
			vacant = c.end(done)
			done.leave()
		}
		if err == nil && done != cl {
			continue
		}
		if !vacant {
			c.yield()
		}
		return
	}
}

// yield gives the seat to the receiver.
func (c *Client) yield() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seat = seatReceiving
	c.turn <- struct{}{}
}

// rest waits, in the receiver, until the seat is its own: a caller gave it up, or nobody has had it for a while, or the Client ended.
func (c *Client) rest() {
	tick := time.NewTicker(aloneIdle)
	defer tick.Stop()
	dead, last := c.dead, uint64(0)
	for {
		select {
		case <-c.turn:
			return
		case <-dead:
			dead = nil // who has the seat gives it up
		case <-tick.C:
		}
		c.mu.Lock()
		take := c.seat == seatVacant && (dead == nil || c.serial == last)
		if take {
			c.seat = seatReceiving
		}
		last = c.serial
		c.mu.Unlock()
		if take {
			return
		}
	}
}
