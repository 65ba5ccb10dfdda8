package dataplane

import (
	"context"
	"fmt"

	"ashlar/internal/block/limit"
	"ashlar/internal/dataplane/client"
)

// limitsOf turns the wire's limits into a Rate's.
func limitsOf(l client.Limits) limit.Limits {
	return limit.Limits{IOPS: l.IOPS, BytesPerSecond: l.BytesPerSecond, BurstIOPS: l.BurstIOPS, BurstBytesPerSecond: l.BurstBytesPerSecond, BurstSeconds: l.BurstSeconds}
}

// checkLimits refuses limits that make no sense.
func checkLimits(l client.Limits) error {
	if err := limitsOf(l).Check(); err != nil {
		return fmt.Errorf("%w: %w", client.ErrInvalid, err)
	}
	return nil
}

// SetLimits implements client.Service. It waits for no verb under way: who limits a volume wants it now. What is recorded in open.json comes first.
func (p *Process) SetLimits(_ context.Context, a client.SetLimits) error {
	if err := p.setLimits(a); err != nil {
		return forWire(fmt.Errorf("set limits: %w", err))
	}
	p.board.bump()
	return nil
}

func (p *Process) setLimits(a client.SetLimits) error {
	if err := checkLimits(a.Limits); err != nil {
		return err
	}
	s := p.slot(a.VolumeID)
	if s == nil {
		return fmt.Errorf("volume %.40q is not open here: %w", a.VolumeID, client.ErrNotFound)
	}
	s.limiting.Lock()
	defer s.limiting.Unlock()
	s.mu.Lock()
	dev, name, state := s.dev, s.args.Volume, s.state
	s.mu.Unlock()
	if dev == nil || state == stateClosing {
		return fmt.Errorf("volume %s: %w: it is %s: say it again when it is open", name, client.ErrConflict, state)
	}
	err := p.list.change(func(f *openFile) {
		if e, ok := f.Volumes[a.VolumeID]; ok {
			e.Open.Limits = a.Limits
			f.Volumes[a.VolumeID] = e
		}
	})
	if err != nil {
		return fmt.Errorf("volume %s: %w", name, err)
	}
	s.change(func(s *slot) {
		s.args.Limits, s.entry.Open.Limits = a.Limits, a.Limits
		if s.dev == dev && s.state != stateClosing {
			dev.Rate().Set(limitsOf(a.Limits))
		}
	})
	return nil
}

// liftLimits lets every request through that is held back, and those that come: their volume is being closed or handed over, and nobody should wait for a rate.
func (s *slot) liftLimits() {
	s.change(func(s *slot) {
		if s.dev != nil {
			s.dev.Rate().Set(limit.Limits{})
		}
	})
}

// restoreLimits undoes liftLimits, when the volume stays after all.
func (s *slot) restoreLimits() {
	s.change(func(s *slot) {
		if s.dev != nil {
			s.dev.Rate().Set(limitsOf(s.args.Limits))
		}
	})
}

// SetBackground implements client.Service. The rate is that of purges, merges, checksums and whatever reads sources (exports, copies) together. It holds from the next piece of work on, in this process until it ends: the agent says it again to the next.
func (p *Process) SetBackground(_ context.Context, a client.Background) error {
	l := limit.Limits{BytesPerSecond: a.BytesPerSecond}
	if err := l.Check(); err != nil {
		return fmt.Errorf("set background: %w: %w", client.ErrInvalid, err)
	}
	p.background.Set(l)
	return nil
}
