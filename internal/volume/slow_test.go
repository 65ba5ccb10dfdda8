package volume_test

import (
	"context"
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

// stuckPrepare is a copy that prepares for ever, until it is told to stop, the first time.
type stuckPrepare struct {
	replica.Replica
	again   atomic.Bool
	entered chan struct{}
}

// Prepare implements replica.Replica.
func (s *stuckPrepare) Prepare(ctx context.Context, w replica.Writer, c replica.Change, progress func(done, total int64)) error {
	if s.again.Swap(true) {
		return s.Replica.Prepare(ctx, w, c, progress)
	}
	close(s.entered)
	<-ctx.Done()
	return context.Cause(ctx)
}

func runtimeYield() { runtime.Gosched() }
