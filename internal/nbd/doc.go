// Package nbd serves Devices over the NBD protocol, and is a Device over somebody's server: fixed newstyle negotiation, structured replies,
// block status.
//
// A connection has two halves that share nothing but a small plain state. negotiate (negotiate.go, meta.go) haggles until the client has
// chosen an export and leaves a state; transmit (conn.go) starts from a state and answers requests until either side ends. What a
// connection is between two requests is that state and nothing else.
//
// The transmission loop is built for few system calls: one large read yields many requests, what does not block is answered by the reading
// goroutine itself straight from or into the socket's buffers, and the replies leave in one write when no whole request is left. What may
// block (flush, FUA, large zeroes, and reads or writes of a Device that proved slow) goes to a bounded set of workers, so that it never
// holds up the loop; pace.go decides, work.go does.
//
// The Client is the other end: calls of many goroutines go out together (outgoing.go), and one goroutine takes the replies apart and puts data where
// the callers want it (receive.go). It trusts its server with nothing but the content.
//
// Read next: server.go (the outside), conn.go (the loop), client.go (the Client), docs/nbd.md (what is served, limits, the errno table).
package nbd
