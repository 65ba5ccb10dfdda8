package sim

import (
	"context"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"ashlar/internal/block"
)

// What the volumes of a simulation are like: small, so that guests meet.
const (
	sizeBytes = 16 << 20
	units     = 6
	diskPath  = "/disks/default"
)

// Deed is one request of a guest, for the judge: when it was sent and answered (virtual nanoseconds), by whom, of which unit, and which value it wrote or read. One that was not answered well
// may have happened at any time since.
type Deed struct {
	Guest, Unit    int
	Epoch          uint64 // of the engine that was asked
	Write          bool
	Value          uint64
	Sent, Answered int64
	Unknown        bool
}

// History is what all guests of a volume did.
type History struct {
	mu    sync.Mutex
	start time.Time
	next  uint64
	deeds []Deed
}

// NewHistory begins one.
func NewHistory() *History { return &History{start: time.Now()} }

// value is a new one, never used before.
func (h *History) value() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.next++
	return h.next
}

func (h *History) add(d Deed) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.deeds = append(h.deeds, d)
}

// Deeds returns what was done so far.
func (h *History) Deeds() []Deed {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]Deed{}, h.deeds...)
}

func (h *History) now() int64 { return int64(time.Since(h.start)) }

// Guest is a virtual machine that has a volume, wherever its machine says: it sends one request after the other until ctx ends. A request that is not answered for very long is given up.
type Guest struct {
	ID       int
	Machine  *Machine
	VolumeID string
	History  *History
	Seed     uint64
}

// Run works until ctx ends, and returns when no request is under way any more.
func (g *Guest) Run(ctx context.Context) {
	rng := rand.New(rand.NewPCG(g.Seed, uint64(g.ID)))
	for ctx.Err() == nil {
		select {
		case <-time.After(time.Duration(rng.Int64N(int64(80 * time.Millisecond)))):
		case <-ctx.Done():
			return
		}
		if dev, epoch := g.Machine.Device(g.VolumeID); dev != nil {
			g.do(dev, Deed{Guest: g.ID, Unit: rng.IntN(units), Epoch: epoch}, rng.IntN(5))
		}
	}
}

// do sends one request: a read, a write, or a write and a flush.
func (g *Guest) do(dev block.Device, d Deed, what int) {
	if d.Write = what > 1; !d.Write {
		d.Sent = g.History.now()
		v, err := ReadUnit(dev, d.Unit)
		if d.Value, d.Answered = v, g.History.now(); err == nil {
			g.History.add(d)
		}
		return
	}
	d.Value = g.History.value()
	d.Sent = g.History.now()
	buf := make([]byte, block.UnitBytes)
	for at := 0; at < len(buf); at += 8 {
		binary.LittleEndian.PutUint64(buf[at:], d.Value)
	}
	_, err := dev.WriteAt(buf, int64(d.Unit)*block.UnitBytes)
	if err == nil && what == 4 {
		err = dev.Flush()
	}
	if d.Answered = g.History.now(); err != nil {
		d.Unknown, d.Answered = true, math.MaxInt64
	}
	g.History.add(d)
}

// ReadUnit reads a unit's value. Half of one value and half of another are no value: math.MaxUint64.
func ReadUnit(dev block.Device, unit int) (uint64, error) {
	buf := make([]byte, block.UnitBytes)
	if _, err := dev.ReadAt(buf, int64(unit)*block.UnitBytes); err != nil {
		return 0, err
	}
	v := binary.LittleEndian.Uint64(buf)
	for at := 8; at < len(buf); at += 8 {
		if binary.LittleEndian.Uint64(buf[at:]) != v {
			return math.MaxUint64, nil
		}
	}
	return v, nil
}
