package nbd

import (
	"errors"
	"reflect"
	"testing"
	"time"

	"ashlar/internal/block"
)

// threeStates has a unit of each state, over and over.
type threeStates struct{ block.Device }

func (d threeStates) Extents(off, _ int64) ([]block.Extent, error) {
	unit := off / block.UnitBytes
	return []block.Extent{{Off: off, N: (unit+1)*block.UnitBytes - off, State: block.State(unit % 3)}}, nil
}

// TestClientLayerContext: Absent crosses the wire where both sides want it, and becomes Zero elsewhere.
func TestClientLayerContext(t *testing.T) {
	dev := threeStates{block.NewMem(6 * block.UnitBytes)}
	states := func(export, client bool) (got []block.State) {
		c := connect(t, Export{Name: "layer", Device: dev, States: export}, ClientOptions{States: client})
		for at := int64(0); at < c.Size(); {
			e, err := c.Extents(at, c.Size()-at)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range e {
				for n := int64(0); n < e.N; n += block.UnitBytes {
					got = append(got, e.State)
				}
				at += e.N
			}
		}
		return got
	}
	full := []block.State{block.Absent, block.Zero, block.Data, block.Absent, block.Zero, block.Data}
	less := []block.State{block.Zero, block.Zero, block.Data, block.Zero, block.Zero, block.Data}
	for _, c := range []struct {
		export, client bool
		want           []block.State
	}{{true, true, full}, {true, false, less}, {false, true, less}, {false, false, less}} {
		if got := states(c.export, c.client); !reflect.DeepEqual(got, c.want) {
			t.Errorf("offered %t, asked for %t: %v, want %v", c.export, c.client, got, c.want)
		}
	}
}

// TestClientOwnErrnos: an export may name more errors than the protocol has.
func TestClientOwnErrnos(t *testing.T) {
	const fenced = Errno(0x41000001)
	d := newMemDevice(1 << 20)
	d.hook = func(c call) error {
		if c.op == "read" {
			return block.ErrFenced
		}
		return block.ErrNoSpace
	}
	c := connect(t, Export{Name: "e", Device: d, Errno: func(err error) Errno {
		if errors.Is(err, block.ErrFenced) {
			return fenced
		}
		return OK
	}}, ClientOptions{})
	var errno Errno
	if _, err := c.ReadAt(make([]byte, 512), 0); !errors.As(err, &errno) || errno != fenced {
		t.Errorf("read: %v, want the export's own error", err)
	}
	if _, err := c.WriteAt(make([]byte, 512), 0); !errors.Is(err, block.ErrNoSpace) {
		t.Errorf("write: %v, want the protocol's error", err)
	}
}

// TestClientPing: a server is asked whether it is there without its device being touched, also when no request more may be in flight.
func TestClientPing(t *testing.T) {
	d := newMemDevice(1 << 20)
	stuck := make(chan struct{})
	d.hook = func(c call) error {
		if c.op == "flush" {
			<-stuck
		}
		return nil
	}
	c := connect(t, Export{Name: "e", Device: d}, ClientOptions{})
	done := make(chan error, maxCalls)
	for range 31 { // fewer than the server has workers
		go func() { done <- c.Flush() }()
	}
	before, calls := c.Heard(), d.calls.Load()
	for range 3 {
		within(t, "ping", func() {
			if err := c.Ping(); err != nil {
				t.Error(err)
			}
		})
	}
	if c.Heard() < before+3 {
		t.Errorf("heard %d times after three pings, %d before", c.Heard(), before)
	}
	if n := d.calls.Load(); n-calls > 31 {
		t.Errorf("pings made %d calls", n-calls)
	}
	close(stuck)
	for range 31 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := c.Ping(); !errors.Is(err, block.ErrClosed) {
		t.Errorf("ping after Close: %v", err)
	}
	select {
	case <-c.Dead():
	case <-time.After(time.Minute):
		t.Error("a closed Client is not dead")
	}
}
