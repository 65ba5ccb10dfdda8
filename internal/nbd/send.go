package nbd

import "sync"

// sender writes a connection's replies. Whoever brings one while nobody writes becomes the writer, and also writes what others bring
// meanwhile: replies gather by themselves while the socket is busy, and no goroutine waits for another.
type sender struct {
	link link
	pool *buffers
	bud  *budget

	mu      sync.Mutex
	queue   []*buffer // guarded by mu: complete replies, in order of arrival
	spare   []*buffer // guarded by mu: the array that queue had before
	writing bool      // guarded by mu: somebody is in run
	err     error     // guarded by mu: the first failure; nothing is sent after it

	iov [iovMax][]byte // only the writer uses it
}

// deliver sends b, a whole number of replies, and gives the buffer back when it is sent. It may return before that.
func (s *sender) deliver(b *buffer) {
	s.mu.Lock()
	s.queue = append(s.queue, b)
	s.run()
}

// deliverCopy sends p, one small reply, which the caller keeps.
func (s *sender) deliverCopy(p []byte) {
	s.mu.Lock()
	var tail *buffer
	if n := len(s.queue); n > 0 {
		tail = s.queue[n-1]
	}
	if tail == nil || !tail.shared || tail.free() < len(p) {
		tail = s.pool.get(len(p))
		tail.shared = true
		tail.charged = len(tail.mem)
		s.bud.force(tail.charged)
		s.queue = append(s.queue, tail)
	}
	copy(tail.append(len(p)), p)
	s.run()
}

// run writes the queue until it is empty, unless somebody else does. It is called with mu held and releases it.
func (s *sender) run() {
	if s.writing {
		s.mu.Unlock()
		return
	}
	s.writing = true
	for len(s.queue) > 0 {
		batch, err := s.queue, s.err
		s.queue = s.spare[:0]
		s.mu.Unlock()
		if err == nil {
			if err = s.write(batch); err != nil {
				s.link.interrupt() // the stream is torn: the reader must not go on
			}
		}
		for i, b := range batch {
			n := b.charged
			s.pool.put(b)
			s.bud.give(n)
			batch[i] = nil
		}
		s.mu.Lock()
		s.spare = batch
		s.err = err
	}
	s.writing = false
	s.mu.Unlock()
}

// write sends batch, iovMax buffers at a time.
func (s *sender) write(batch []*buffer) error {
	for len(batch) > 0 {
		n := min(len(batch), iovMax)
		for i, b := range batch[:n] {
			s.iov[i] = b.mem[b.from:b.to]
		}
		if err := s.link.write(s.iov[:n]); err != nil {
			return err
		}
		batch = batch[n:]
	}
	return nil
}

// failure is the error that ended sending, if any.
func (s *sender) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}
