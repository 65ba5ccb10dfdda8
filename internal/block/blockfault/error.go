package blockfault

import (
	"slices"
	"sync/atomic"

	"ashlar/internal/block"
)

// Error returns a device that fails with what when answers, before d is called; a nil answer lets the call through. Nth, Every and
// While make such functions.
//
// A failing Flush does not make later ones fail: what the contract says about that is for the device under test to keep.
func Error(d block.Device, when func(Op) error) block.Device {
	return &around{dev: d, before: when}
}

// Nth fails the n-th call of one of kinds, counted from 1, with err. No kinds means all.
func Nth(n int64, err error, kinds ...Kind) func(Op) error {
	var seen atomic.Int64
	return func(op Op) error {
		if matches(op, kinds) && seen.Add(1) == n {
			return err
		}
		return nil
	}
}

// Every fails each n-th call of one of kinds with err. No kinds means all.
func Every(n int64, err error, kinds ...Kind) func(Op) error {
	var seen atomic.Int64
	return func(op Op) error {
		if matches(op, kinds) && seen.Add(1)%n == 0 {
			return err
		}
		return nil
	}
}

// While fails the calls of one of kinds with err as long as flag is set. No kinds means all.
func While(flag *atomic.Bool, err error, kinds ...Kind) func(Op) error {
	return func(op Op) error {
		if matches(op, kinds) && flag.Load() {
			return err
		}
		return nil
	}
}

// Within fails calls that touch [off, off+n) with err: a bad spot on the medium.
func Within(off, n int64, err error, kinds ...Kind) func(Op) error {
	return func(op Op) error {
		if matches(op, kinds) && op.N > 0 && op.Off < off+n && off < op.Off+op.N {
			return err
		}
		return nil
	}
}

func matches(op Op, kinds []Kind) bool { return len(kinds) == 0 || slices.Contains(kinds, op.Kind) }
