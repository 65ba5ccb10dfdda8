package nbd

import (
	"testing"
	"time"
)

const (
	quick = time.Microsecond
	slow  = time.Millisecond
)

// drive puts n requests through p and returns how many went to the workers.
func drive(p *pace, n int, more bool, d time.Duration) (pooled int) {
	for range n {
		if p.pool(more) {
			pooled++
		} else {
			p.took(d, 4096)
		}
	}
	return pooled
}

func TestPace(t *testing.T) {
	var p pace
	if n := drive(&p, 1000, true, quick); n != 0 {
		t.Fatalf("fast device: %d pooled", n)
	}
	// Slow and deep: nearly everything goes to the workers, and probes get rare.
	if n := drive(&p, 100_000, true, slow); n < 99_800 {
		t.Fatalf("slow device, deep queue: only %d of 100000 pooled", n)
	}
	// Fast again: inline after the current window.
	if n := drive(&p, windowMax+1, true, quick); n > windowMax {
		t.Fatalf("fast again: %d pooled", n)
	}
	if n := drive(&p, 1000, true, quick); n != 0 {
		t.Fatalf("fast again: %d pooled", n)
	}
	// One blip costs one small window.
	drive(&p, 1, true, slow)
	if n := drive(&p, 1000, true, quick); n != windowFirst {
		t.Fatalf("a blip: %d pooled, want %d", n, windowFirst)
	}
	// Slow, but one at a time: mostly inline.
	if n := drive(&p, 10_000, false, slow); n > 10_000*windowFirst/(windowFirst+serialRun)+windowFirst {
		t.Fatalf("slow device, one at a time: %d of 10000 pooled", n)
	}
	// The client starts to overlap: at once to the workers.
	drive(&p, windowFirst+1, false, slow)
	if n := drive(&p, 1000, true, slow); n < 900 {
		t.Fatalf("slow device, overlapping: only %d of 1000 pooled", n)
	}
}

// TestPaceSize: a large request may take as long as moving it through memory does.
func TestPaceSize(t *testing.T) {
	var p pace
	p.took(slowFixed+slowPerMiB, 1<<20)
	if p.mode != paceFast {
		t.Fatal("1 MiB at the speed of memory is not slow")
	}
	p.took(slowFixed+slowPerMiB, 4096)
	if p.mode != pacePooled {
		t.Fatal("4 KiB in that time is slow")
	}
}
