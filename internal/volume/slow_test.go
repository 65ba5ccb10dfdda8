package volume_test

import (
	"runtime"
	"sync/atomic"

	"ashlar/internal/replica"
)

// slowWrites is a copy one of whose writes waits to be resumed.
type slowWrites struct {
	replica.Replica
	armed           atomic.Bool
	entered, resume chan struct{}
}

// WriteAt implements block.Device.
func (s *slowWrites) WriteAt(p []byte, off int64) (int, error) {
	if s.armed.CompareAndSwap(true, false) {
		close(s.entered)
		<-s.resume
	}
	return s.Replica.WriteAt(p, off)
}

func runtimeYield() { runtime.Gosched() }
