package nbd

import "sync/atomic"

// Stats counts what an export did since the server began. Requests that were refused count too, as errors.
type Stats struct {
	Conns    int    // connections open now
	Accepted uint64 // connections that reached this export

	Reads, Writes, Flushes, Zeroes, Statuses, Others uint64 // requests
	ReadBytes, WrittenBytes, ZeroedBytes             uint64 // of requests that succeeded
	Errors                                           uint64 // requests answered with an error
}

// counters is the live form of Stats.
type counters struct {
	conns                                            atomic.Int64
	accepted                                         atomic.Uint64
	reads, writes, flushes, zeroes, statuses, others atomic.Uint64
	readBytes, writtenBytes, zeroedBytes             atomic.Uint64
	errors                                           atomic.Uint64
}

// count records one request.
func (s *counters) count(req request, errno Errno) {
	ops, bytes := &s.others, (*atomic.Uint64)(nil)
	switch req.cmd {
	case cmdRead:
		ops, bytes = &s.reads, &s.readBytes
	case cmdWrite:
		ops, bytes = &s.writes, &s.writtenBytes
	case cmdTrim, cmdWriteZeroes:
		ops, bytes = &s.zeroes, &s.zeroedBytes
	case cmdFlush:
		ops = &s.flushes
	case cmdBlockStatus:
		ops = &s.statuses
	}
	ops.Add(1)
	if errno != OK {
		s.errors.Add(1)
	} else if bytes != nil {
		bytes.Add(uint64(req.n))
	}
}

func (s *counters) stats() Stats {
	return Stats{
		Conns: int(s.conns.Load()), Accepted: s.accepted.Load(),
		Reads: s.reads.Load(), Writes: s.writes.Load(), Flushes: s.flushes.Load(), Zeroes: s.zeroes.Load(),
		Statuses: s.statuses.Load(), Others: s.others.Load(),
		ReadBytes: s.readBytes.Load(), WrittenBytes: s.writtenBytes.Load(), ZeroedBytes: s.zeroedBytes.Load(),
		Errors: s.errors.Load(),
	}
}
