package job

import (
	"errors"
	"sync"
	"sync/atomic"

	"ashlar/internal/disk"
)

// aheadBytes is how much is written before the disk is made to begin with it.
const aheadBytes = 64 << 20

// aheadFile is a new file that is made durable while it is written, because the kernel alone would begin only when a tenth of the memory is dirty, and the whole of it would wait for the end.
type aheadFile struct {
	disk.File
	dirty atomic.Int64
	kick  chan struct{}
	work  sync.WaitGroup
	err   error // of the flusher; read after work is done
}

func newAheadFile(f disk.File) *aheadFile {
	a := &aheadFile{File: f, kick: make(chan struct{}, 1)}
	a.work.Go(func() {
		for range a.kick {
			// The kernel tells of lost pages once: an error here is the file's end, whatever a later Sync says.
			a.err = errors.Join(a.err, f.Sync())
		}
	})
	return a
}

// WriteAt may be called concurrently, and not after finish.
func (a *aheadFile) WriteAt(p []byte, off int64) (int, error) {
	n, err := a.File.WriteAt(p, off)
	if a.dirty.Add(int64(n)) >= aheadBytes {
		a.dirty.Store(0)
		select {
		case a.kick <- struct{}{}:
		default: // it is at it
		}
	}
	return n, err
}

// finish makes the rest durable, or only waits for the flusher if nobody wants the file any more.
func (a *aheadFile) finish(err error) error {
	close(a.kick)
	a.work.Wait()
	if err == nil {
		err = errors.Join(a.err, a.Sync())
	}
	return err
}
