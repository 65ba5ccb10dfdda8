package blockfault

import (
	"sync"

	"ashlar/internal/block"
)

// Delay returns a device that calls wait before each call of d. wait blocks as it likes: on a channel, on a timer (in a synctest
// bubble the clock is the bubble's).
func Delay(d block.Device, wait func(Op)) block.Device {
	return &around{dev: d, before: func(op Op) error { wait(op); return nil }}
}

// Pause is a device whose calls wait while it is paused, as if they were stuck in the kernel: also across Close, which itself never
// waits. The zero value is not usable; see NewPause.
type Pause struct {
	around

	mu      sync.Mutex    // guards what follows
	gate    chan struct{} // closed by Resume; nil while not paused
	kinds   []Kind        // what is paused; none means all
	waiting int
	changed chan struct{} // closed and renewed whenever waiting grows
}

// NewPause returns a device around d that is not paused.
func NewPause(d block.Device) *Pause {
	p := &Pause{changed: make(chan struct{})}
	p.around = around{dev: d, before: func(op Op) error { p.wait(op); return nil }}
	return p
}

// Pause makes calls of kinds wait from now on; no kinds means all but Close.
func (p *Pause) Pause(kinds ...Kind) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kinds = kinds
	if p.gate == nil {
		p.gate = make(chan struct{})
	}
}

// Resume lets waiting calls and later ones go on.
func (p *Pause) Resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gate != nil {
		close(p.gate)
		p.gate = nil
	}
}

// Waiting returns how many calls wait.
func (p *Pause) Waiting() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.waiting
}

// AwaitWaiting returns once n calls wait.
func (p *Pause) AwaitWaiting(n int) {
	for {
		p.mu.Lock()
		enough, changed := p.waiting >= n, p.changed
		p.mu.Unlock()
		if enough {
			return
		}
		<-changed
	}
}

func (p *Pause) wait(op Op) {
	p.mu.Lock()
	gate := p.gate
	if gate == nil || op.Kind == Close || !matches(op, p.kinds) {
		p.mu.Unlock()
		return
	}
	p.waiting++
	close(p.changed)
	p.changed = make(chan struct{})
	p.mu.Unlock()
	<-gate
	p.mu.Lock()
	p.waiting--
	p.mu.Unlock()
}
