package nbd

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"ashlar/internal/block"
)

// boundedDevice fails the test when the server asks for something outside the device, which it must have refused itself.
type boundedDevice struct {
	*block.Mem
	t *testing.T
}

func (d boundedDevice) check(off, n int64) {
	if block.CheckRange(off, n, d.Size()) != nil {
		d.t.Errorf("the device is asked for %d+%d of %d", off, n, d.Size())
	}
}

func (d boundedDevice) ReadAt(p []byte, off int64) (int, error) {
	d.check(off, int64(len(p)))
	return d.Mem.ReadAt(p, off)
}

func (d boundedDevice) WriteAt(p []byte, off int64) (int, error) {
	d.check(off, int64(len(p)))
	return d.Mem.WriteAt(p, off)
}

func (d boundedDevice) Zero(off, n int64) error {
	d.check(off, n)
	return d.Mem.Zero(off, n)
}

func (d boundedDevice) Extents(off, n int64) ([]block.Extent, error) {
	d.check(off, n)
	return d.Mem.Extents(off, n)
}

// feed sends p to a server over nc, reads whatever it answers, and checks that the connection ends.
func feed(t *testing.T, nc net.Conn, p []byte, served <-chan struct{}) {
	if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := io.Copy(io.Discard, nc); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the server neither answers nor ends the connection")
		}
	})
	if _, err := nc.Write(p); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the server does not take what it is sent")
	}
	if u, ok := nc.(*net.UnixConn); ok {
		_ = u.CloseWrite()
	} else {
		_ = nc.Close()
	}
	<-served
	_ = nc.Close()
	wg.Wait()
}

// FuzzNegotiate sends arbitrary bytes from the start of a connection.
func FuzzNegotiate(f *testing.F) {
	for _, structured := range []bool{false, true} {
		p, _ := script(structured)
		f.Add(p)
		f.Add(p[:len(p)/3])
	}
	for _, opt := range []uint32{optExportName, optAbort, optList, optStartTLS, optInfo, optGo, optStructuredReply, optListMetaContext, optSetMetaContext, 11} {
		p := append([]byte{0, 0, 0, 3}, optionBytes(optStructuredReply, nil)...)
		f.Add(append(p, optionBytes(opt, nil)...))
		f.Add(append(p, optionBytes(opt, infoData("disk", 0, 1, 2, 3))...))
		f.Add(append(p, optionBytes(opt, metaData("disk", "base:", "base:allocation"))...))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		dev := boundedDevice{block.NewMem(64 << 10), t}
		s, err := NewServer(Config{Exports: Single{Name: "disk", Description: "d", Device: dev}, NegotiationTimeout: patience / 2})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		a, b := net.Pipe()
		served := make(chan struct{})
		go func() { defer close(served); _ = s.ServeConn(b) }()
		feed(t, a, p, served)
	})
}

// FuzzTransmission sends arbitrary bytes as requests, over both kinds of link, with every combination of what was negotiated.
func FuzzTransmission(f *testing.F) {
	req := func(rs ...request) (p []byte) {
		for _, r := range rs {
			p = append(p, requestWire(r, make([]byte, map[bool]uint32{true: r.n}[r.cmd == cmdWrite]))...)
		}
		return p
	}
	for mode := range uint8(8) {
		f.Add(mode, req(request{cmd: cmdWrite, off: 4096, n: 5000}, request{cmd: cmdRead, n: 64 << 10}, request{cmd: cmdFlush}, request{cmd: cmdDisc}))
		f.Add(mode, req(request{cmd: cmdTrim, n: 64 << 10, flags: cmdFlagFUA}, request{cmd: cmdWriteZeroes, n: 100, flags: cmdFlagNoHole}, request{cmd: cmdBlockStatus, n: 64 << 10}))
		f.Add(mode, req(request{cmd: cmdWrite, n: 70_000}, request{cmd: cmdBlockStatus, n: 1, flags: cmdFlagReqOne}, request{cmd: cmdCache, n: 9999}, request{cmd: cmdWriteZeroes, n: 99, flags: cmdFlagFast}, request{cmd: 77}))
		f.Add(mode, req(request{cmd: cmdRead, off: -1, n: 1<<32 - 1}, request{cmd: cmdRead, off: 65535, n: 1, flags: cmdFlagDF}))
	}
	f.Fuzz(func(t *testing.T, mode uint8, p []byte) {
		dev := boundedDevice{block.NewMem(64 << 10), t}
		e := Export{Name: "disk", Device: dev, ReadOnly: mode&4 != 0}
		st := state{Export: "disk", Structured: mode&2 != 0}
		if st.Structured {
			st.Contexts = []uint32{1}
		}
		a, b := net.Pipe()
		if mode&1 != 0 {
			a, b = socketPair(t)
		}
		l, err := newLink(b, idleAfter)
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan struct{})
		go func() {
			defer close(served)
			ss := &session{link: l}
			_, _ = transmit(transmission{export: e, state: st, link: l, pool: new(buffers), stats: new(counters), stop: &ss.stop})
			l.close()
		}()
		feed(t, a, p, served)
	})
}

// FuzzOption takes arbitrary option data apart without a connection, which is much faster.
func FuzzOption(f *testing.F) {
	f.Add(uint32(optGo), infoData("disk", 0, 3))
	f.Add(uint32(optSetMetaContext), metaData("disk", "base:allocation"))
	f.Add(uint32(optListMetaContext), []byte{0, 0, 0, 0, 0, 0, 0, 1, 255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, opt uint32, data []byte) {
		if len(data) > maxOptionBytes || opt == optExportName {
			return
		}
		var out recorder
		h := &haggler{rw: &out, exports: Single{Name: "disk", Device: block.NewMem(4096)}, draining: func() bool { return false }, fixed: true, structured: true}
		_, chosen, err := h.answer(opt, data)
		if err != nil && !errors.Is(err, errAborted) {
			t.Fatal(err)
		}
		// Whatever was asked, the answer is a series of well-formed replies of which only the last is final.
		for p := []byte(out); ; {
			if len(p) < 20 || binary.BigEndian.Uint64(p) != magicOptionReply || binary.BigEndian.Uint32(p[8:]) != opt {
				t.Fatalf("reply %x", p)
			}
			typ, n := binary.BigEndian.Uint32(p[12:]), int(binary.BigEndian.Uint32(p[16:]))
			if p = p[20:]; n > len(p) {
				t.Fatalf("reply of %d bytes, %d there", n, len(p))
			}
			p = p[n:]
			if final := typ == repAck || typ>>31 != 0; final != (len(p) == 0) {
				t.Fatalf("reply %#x with %d bytes after it", typ, len(p))
			} else if final {
				if chosen && (opt != optGo || typ != repAck) {
					t.Fatal("chosen without GO")
				}
				return
			}
		}
	})
}

// recorder keeps what is written to it.
type recorder []byte

func (r *recorder) Write(p []byte) (int, error) {
	*r = append(*r, p...)
	return len(p), nil
}

func (r *recorder) Read([]byte) (int, error) { return 0, io.EOF }
