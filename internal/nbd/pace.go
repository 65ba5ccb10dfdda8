package nbd

import "time"

// The rules of pace. An operation is slow when it takes longer than a hand-over to a worker is worth: a fixed part, and a part per byte
// that a copy through memory takes.
const (
	slowFixed   = 50 * time.Microsecond
	slowPerMiB  = 250 * time.Microsecond
	windowFirst = 16   // requests given to workers after the first slow one
	windowMax   = 1024 // the same, after many probes were slow
	serialRun   = 64   // requests handled inline, slow or not, once the client proved to send one at a time
)

// paceMode is what a connection does with the next request of a kind.
//
//	         slow                      window over, requests overlapped
//	fast ----------> pooled ------------------------------------------> probe
//	 ^                ^  ^ \                                            |  |
//	 |                |  |  \ window over, one at a time                |  |
//	 |                |  |   `--------------------------> serial        |  |
//	 |                |  `-- overlap, or run over ---------'  |         |  |
//	 |                `------------------- slow, window doubled ---------'  |
//	 `------------------------- fast ---------------------------'----------'
type paceMode uint8

const (
	paceFast   paceMode = iota // inline: nothing was slow
	pacePooled                 // to the workers, for a window of requests
	paceProbe                  // one inline, to see whether it still is slow
	paceSerial                 // inline although slow: the client waits for each reply, so a worker gains nothing
)

// pace decides for one kind of request whether the reading goroutine does it itself. It is pure: the caller brings the durations.
type pace struct {
	mode    paceMode
	left    int  // requests until the mode is reconsidered
	window  int  // length of the last window
	overlap bool // in this window there was more than one request at a time
}

// pool tells whether the next request goes to the workers; more says that another is in flight or already received.
func (p *pace) pool(more bool) bool {
	switch p.mode {
	case pacePooled:
		p.overlap = p.overlap || more
		if p.left > 0 {
			p.left--
			return true
		}
		if p.overlap {
			p.mode = paceProbe
			return false
		}
		p.mode, p.left = paceSerial, serialRun
		return false
	case paceSerial:
		p.left--
		if more || p.left <= 0 {
			p.start(windowFirst)
			p.overlap = more
			p.left--
			return true
		}
	}
	return false
}

// start begins a window of n requests for the workers.
func (p *pace) start(n int) {
	p.mode, p.window, p.left, p.overlap = pacePooled, n, n, false
}

// took reports how long a request of n bytes took inline.
func (p *pace) took(d time.Duration, n uint32) {
	slow := d > slowFixed+time.Duration(n)*slowPerMiB>>20
	switch {
	case p.mode == paceSerial && slow:
	case !slow:
		p.mode, p.window = paceFast, 0
	case p.mode == paceProbe:
		p.start(min(2*p.window, windowMax))
	default:
		p.start(windowFirst)
	}
}
