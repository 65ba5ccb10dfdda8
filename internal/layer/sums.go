package layer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"ashlar/internal/block"
)

// sumPage keeps checksums of a region of the disk that reads needed, of whatever layer each is: above 32 bits the layer's slot, below them the checksum; 0 is none.
type sumPage struct {
	region int64
	units  [regionUnits]atomic.Uint64
}

// sumCache keeps the pages that reads needed last: 2 MiB at most, enough for 1 GiB of disk read at random, through however many layers, without a second read for checksums. It takes no lock. What
// it says is believed only where it agrees with what was read: otherwise the layer is asked.
type sumCache [256]struct {
	page atomic.Pointer[sumPage]
	last atomic.Int64 // the region that was asked for last, and 1 more
}

// sumsRead is how many checksums are read at a time.
const sumsRead = 64

// page returns the page of a region. A region that is read for the first time has none: once is no reason to drop another's.
func (c *sumCache) page(region int64) *sumPage {
	e := &c[uint64(region)%uint64(len(c))]
	if p := e.page.Load(); p != nil && p.region == region {
		return p
	}
	if e.last.Swap(region+1) != region+1 {
		return nil
	}
	p := &sumPage{region: region}
	e.page.Store(p)
	return p
}

// forget empties the cache: slots mean other layers from now on.
func (c *sumCache) forget() {
	for i := range c {
		c[i].page.Store(nil)
	}
}

// verify compares whole units, of one region, that were read from a layer with its checksums. slot is the layer's.
func (c *sumCache) verify(l *Layer, slot int, p []byte, unit int64) error {
	page := c.page(unit / regionUnits)
	for len(p) > 0 {
		n := min(len(p), int(sumsRead-unit%sumsRead)*unitBytes)
		if err := l.verify(page, uint64(slot)<<32, p[:n], unit); err != nil {
			return err
		}
		p, unit = p[n:], unit+int64(n/unitBytes)
	}
	return nil
}

// verify compares units whose checksums are read together. page may be nil.
func (l *Layer) verify(page *sumPage, slot uint64, p []byte, unit int64) error {
	var stored []byte
	for ; len(p) > 0; p, unit = p[unitBytes:], unit+1 {
		got := unitSum(p[:unitBytes])
		if page != nil && page.units[unit%regionUnits].Load() == slot|uint64(got) {
			continue
		}
		if first := unit - unit%sumsRead; stored == nil {
			stored = make([]byte, sumsRead*4)
			if err := l.readSums(first, stored); err != nil {
				return err
			}
			page.keep(slot, stored, first)
		}
		is := binary.LittleEndian.Uint32(stored[unit%sumsRead*4:])
		if got != is {
			return fmt.Errorf("layer %s: unit %d: checksum %08x, stored %08x: %w", l.sb.ID, unit, got, is, block.ErrCorrupt)
		}
		if page != nil {
			page.units[unit%regionUnits].Store(slot | uint64(is))
		}
	}
	return nil
}

// keep takes checksums for units that have none yet. Some may be hidden by other layers, which write over them when they are read.
func (p *sumPage) keep(slot uint64, stored []byte, first int64) {
	if p == nil {
		return
	}
	for i := range int64(len(stored) / 4) {
		p.units[(first+i)%regionUnits].CompareAndSwap(0, slot|uint64(binary.LittleEndian.Uint32(stored[i*4:])))
	}
}

// readSums reads checksums from a unit's on; beyond the layer's end there are none, and b is left alone.
func (l *Layer) readSums(unit int64, b []byte) error {
	off := unit * 4
	n := min(int64(len(b)), l.sb.Sums.N-off)
	if _, err := l.f.ReadAt(b[:n], l.sb.Sums.Off+off); err != nil {
		return fmt.Errorf("layer %s: read checksums: %w", l.sb.ID, mapError(err))
	}
	return nil
}

// Settle finishes a sealed layer while it is read: it frees the log and what units that are not Data still occupy, and then computes the
// checksums; from then on every read is compared. It may be cancelled and called again, and does nothing when all is done. ErrState
// if the layer is not sealed; block.ErrNoSpace if there is no room for the checksums: then the log is free and the layer stays unverified.
func (l *Layer) Settle(ctx context.Context) error {
	l.workMu.Lock()
	defer l.workMu.Unlock()
	m := l.Meta()
	if m.State != StateSealed {
		return fmt.Errorf("layer %s: settle: state %s: %w", l.sb.ID, m.State, ErrState)
	}
	if m.Sums && m.DataBytes != nil {
		return nil
	}
	if err := l.count(ctx, nil); err != nil {
		return fmt.Errorf("layer: settle: %w", err)
	}
	if m.Sums {
		return l.changeMeta(l.noteCount)
	}
	if !m.Settled {
		if err := l.f.Sync(); err != nil { // the map, which was written after the seal
			l.fail()
			return fmt.Errorf("layer %s: settle: %w", l.sb.ID, mapError(err))
		}
		err := l.changeMeta(func(m *Meta) error {
			m.Settled = true
			return l.noteCount(m)
		})
		if err != nil {
			return err
		}
		if err := l.f.Punch(l.sb.Log.Off, l.sb.Log.N); err != nil {
			return fmt.Errorf("layer %s: free log: %w", l.sb.ID, mapError(err))
		}
	}
	if err := l.trim(ctx); err != nil {
		return fmt.Errorf("layer %s: settle: %w", l.sb.ID, mapError(err))
	}
	if err := l.computeSums(ctx); err != nil {
		return fmt.Errorf("layer %s: compute checksums: %w", l.sb.ID, mapError(err))
	}
	return l.changeMeta(func(m *Meta) error {
		m.Sums = true
		return l.noteCount(m)
	})
}

// noteCount puts the count into a header that is to be settled; workMu is held.
func (l *Layer) noteCount(m *Meta) error {
	m.DataBytes = nil
	if n, known := l.DataBytes(); known {
		m.DataBytes = &n
	}
	return nil
}

// trim frees what writes that failed, or a kill, left in units that are not Data.
func (l *Layer) trim(ctx context.Context) error {
	for at := l.sb.Data.Off; at < l.sb.Data.end(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		off, n, err := l.f.NextData(at)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		from, to := (off-l.sb.Data.Off)/unitBytes, (off+n-l.sb.Data.Off+unitBytes-1)/unitBytes
		err = l.eachRun(from, min(to, l.sb.units()), func(unit, n int64, s block.State) error {
			if s == block.Data {
				return nil
			}
			return l.f.Punch(l.sb.Data.Off+unit*unitBytes, n*unitBytes)
		})
		if err != nil {
			return err
		}
		at = off + n
	}
	return nil
}

// eachRun calls f for the runs of units of one state in [from, to), as the map on disk says. A run may be told in pieces, at map pages.
func (l *Layer) eachRun(from, to int64, f func(unit, n int64, s block.State) error) error {
	codes := make([]byte, pageBytes)
	for at := from; at < to; {
		page := at / pageUnits
		end := min(to, (page+1)*pageUnits)
		has, err := l.hasPage(page)
		if err == nil && has {
			has, err = l.readPage(page, codes)
		}
		if err != nil {
			return err
		}
		if !has {
			clear(codes)
		}
		for at < end {
			s := codeAt(codes, int(at%pageUnits))
			n := int64(1)
			for at+n < end && codeAt(codes, int((at+n)%pageUnits)) == s {
				n++
			}
			if err := f(at, n, s); err != nil {
				return err
			}
			at += n
		}
	}
	return nil
}

// sumChunk is how much is read at a time to be summed or compared.
const sumChunk = 1 << 20

// eachData reads all Data units of a region in pieces and calls f with them.
func (l *Layer) eachData(region int64, buf []byte, f func(unit int64, p []byte) error) error {
	from := region * regionUnits
	return l.eachRun(from, min(from+regionUnits, l.sb.units()), func(unit, n int64, s block.State) error {
		for s == block.Data && n > 0 {
			p := buf[:min(n*unitBytes, int64(len(buf)))]
			if _, err := l.f.ReadAt(p, l.sb.Data.Off+unit*unitBytes); err != nil {
				return err
			}
			if err := f(unit, p); err != nil {
				return err
			}
			unit, n = unit+int64(len(p))/unitBytes, n-int64(len(p))/unitBytes
		}
		return nil
	})
}

// eachRegion calls f for the regions that may have Data.
func (l *Layer) eachRegion(ctx context.Context, f func(region int64) error) error {
	for page := range l.mapPages() {
		if err := ctx.Err(); err != nil {
			return err
		}
		has, err := l.hasPage(page)
		if err != nil {
			return err
		}
		for r := range int64(pageRegions) {
			if !has || (page*pageRegions+r)*regionUnits >= l.sb.units() {
				break
			}
			if err := f(page*pageRegions + r); err != nil {
				return err
			}
		}
	}
	return nil
}

// computeSums writes the checksums of all Data units and makes them durable.
func (l *Layer) computeSums(ctx context.Context) error {
	buf := make([]byte, sumChunk)
	err := l.eachRegion(ctx, func(region int64) error {
		var sums [regionUnits * 4]byte
		found := false
		err := l.eachData(region, buf, func(unit int64, p []byte) error {
			found = true
			if err := l.paced(ctx, int64(len(p))); err != nil {
				return err
			}
			for ; len(p) > 0; p, unit = p[unitBytes:], unit+1 {
				binary.LittleEndian.PutUint32(sums[unit%regionUnits*4:], unitSum(p[:unitBytes]))
			}
			return nil
		})
		if err != nil || !found {
			return err
		}
		_, err = l.f.WriteAt(sums[:], l.sb.Sums.Off+region*regionUnits*4)
		return err
	})
	if err != nil {
		return err
	}
	if err := l.f.Sync(); err != nil {
		l.fail()
		return err
	}
	return nil
}
