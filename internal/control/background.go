package control

import "sync"

// background runs fn and returns what waits for its end.
func background(fn func()) (wait func()) {
	var wg sync.WaitGroup
	wg.Go(fn)
	return wg.Wait
}
