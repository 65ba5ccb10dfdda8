package etcd

import "slices"

// Knows tells whether a store would ask the member at url.
func Knows(s *Store, url string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Contains(s.known, url)
}

// Closed tells whether a store was closed.
func Closed(s *Store) bool { return s.ctx.Err() != nil }
