package image

import (
	"fmt"
	"io"

	"ashlar/internal/block"
)

// runs walks dev's extents in pieces of a granule each (a power of two), merged: each piece once, in order, as the highest state that any of its bytes has (Absent < Zero < Data). The last may be
// shorter than the granule. What is Absent is told too.
func runs(dev block.Device, granule int64, emit func(block.Extent) error) error {
	m := runMerger{granule: granule, size: dev.Size(), emit: emit}
	for off := int64(0); off < m.size; {
		list, err := dev.Extents(off, m.size-off)
		if err != nil {
			return fmt.Errorf("extents at %d: %w", off, err)
		}
		if len(list) == 0 {
			return fmt.Errorf("extents at %d: none: %w", off, io.ErrNoProgress)
		}
		for _, e := range list {
			if e.Off != off || e.N <= 0 || e.N > m.size-off {
				return fmt.Errorf("extent [%d,+%d) at %d: %w", e.Off, e.N, off, block.ErrCorrupt)
			}
			off += e.N
			if err := m.add(e); err != nil {
				return err
			}
		}
	}
	return m.end()
}

// runMerger rounds extents to granules.
type runMerger struct {
	granule, size int64
	emit          func(block.Extent) error
	run           block.Extent // complete granules that were not told yet
	open          block.Extent // the granule in which the last extent ended; N is 0 for none
}

// add takes the next extent.
func (m *runMerger) add(e block.Extent) error {
	end := e.Off + e.N
	if m.open.N > 0 {
		m.open.State = max(m.open.State, e.State)
		granuleEnd := min(m.open.Off+m.granule, m.size)
		m.open.N = min(end, granuleEnd) - m.open.Off
		if end < granuleEnd {
			return nil
		}
		if err := m.push(m.open); err != nil {
			return err
		}
		m.open.N = 0
		e.Off = granuleEnd
	}
	whole := end / m.granule * m.granule
	if end == m.size {
		whole = end
	}
	if whole > e.Off {
		if err := m.push(block.Extent{Off: e.Off, N: whole - e.Off, State: e.State}); err != nil {
			return err
		}
		e.Off = whole
	}
	if end > e.Off {
		m.open = block.Extent{Off: e.Off, N: end - e.Off, State: e.State}
	}
	return nil
}

// push merges e into the run before it, or tells that and begins a new one.
func (m *runMerger) push(e block.Extent) error {
	if m.run.N > 0 && m.run.State == e.State {
		m.run.N += e.N
		return nil
	}
	run := m.run
	m.run = e
	if run.N == 0 {
		return nil
	}
	return m.emit(run)
}

func (m *runMerger) end() error {
	if m.run.N == 0 {
		return nil
	}
	return m.emit(m.run)
}
