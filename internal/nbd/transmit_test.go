package nbd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"reflect"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ashlar/internal/block"
)

// eachWay runs f for every way of driving a connection, with simple and structured replies.
func eachWay(t *testing.T, e func() Export, f func(t *testing.T, s *testServer, c *testClient)) {
	for name, wire := range wires {
		for _, structured := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/structured=%v", name, structured), func(t *testing.T) {
				s, c := serve(t, e(), wire)
				c.join(structured)
				f(t, s, c)
			})
		}
	}
}

func steps(fallback int) int {
	if n, err := strconv.Atoi(os.Getenv("ASHLAR_STEPS")); err == nil && n > 0 {
		return fallback * n
	}
	return fallback
}

const testSize = 1 << 20

func diskExport() Export { return Export{Name: "disk", Device: newMemDevice(testSize)} }

func TestCommands(t *testing.T) {
	eachWay(t, diskExport, func(t *testing.T, s *testServer, c *testClient) {
		data := bytes.Repeat([]byte("ashlar!?"), 1024)
		c.write(4096, data)
		c.wantData(4096, data)
		c.write(5000, []byte("odd"))
		copy(data[904:], "odd")
		c.wantData(4095, append([]byte{0}, data...))
		c.want(request{cmd: cmdFlush}, nil, OK)
		c.want(request{cmd: cmdWrite, flags: cmdFlagFUA, off: testSize - 2, n: 2}, []byte("ND"), OK)
		c.want(request{cmd: cmdTrim, off: 4096, n: 4096}, nil, OK)
		clear(data[:4096])
		c.wantData(4096, data)
		c.want(request{cmd: cmdWriteZeroes, off: 8192, n: 100}, nil, OK)
		clear(data[4096:4196])
		c.wantData(4096, data)
		c.want(request{cmd: cmdWriteZeroes, flags: cmdFlagNoHole | cmdFlagFUA, off: 8192, n: 4096}, nil, OK)
		clear(data)
		c.wantData(4096, data)
		// FUA has no meaning for these, and is allowed.
		c.want(request{cmd: cmdRead, flags: cmdFlagFUA, n: 10}, nil, OK)
		c.want(request{cmd: cmdFlush, flags: cmdFlagFUA}, nil, OK)
		// Nothing to do, at any place in the device.
		for _, cmd := range []uint16{cmdRead, cmdWrite, cmdTrim, cmdWriteZeroes} {
			c.want(request{cmd: cmd, off: testSize}, nil, OK)
		}
		c.start(request{cmd: cmdDisc}, nil)
		c.wantEOF()
		if err := <-s.result; err != nil {
			t.Fatal(err)
		}
		st := s.Stats()["disk"]
		if st.Conns != 0 || st.Accepted != 1 || st.Reads != 7 || st.Writes != 4 || st.Flushes != 2 || st.Zeroes != 5 ||
			st.Errors != 0 || st.WrittenBytes != 8197 || st.ZeroedBytes != 8292 || st.ReadBytes != 5*8192+11 {
			t.Fatalf("stats %+v", st)
		}
	})
}

// TestRefusals: bad requests are answered with the right error, change nothing, and the connection goes on.
func TestRefusals(t *testing.T) {
	const far = testSize
	eachWay(t, diskExport, func(t *testing.T, s *testServer, c *testClient) {
		refused := uint64(0)
		for i, tc := range []struct {
			r    request
			want Errno
		}{
			{request{cmd: cmdRead, off: far, n: 1}, EINVAL},
			{request{cmd: cmdRead, off: far - 1, n: 2}, EINVAL},
			{request{cmd: cmdRead, off: -1, n: 1}, EINVAL},       // 2^64-1
			{request{cmd: cmdRead, off: -1 << 63, n: 1}, EINVAL}, // 2^63
			{request{cmd: cmdRead, off: 1<<63 - 1, n: 1<<32 - 1}, EINVAL},
			{request{cmd: cmdWrite, off: far, n: 1}, ENOSPC},
			{request{cmd: cmdWrite, off: far - 1, n: 300_000}, ENOSPC},
			{request{cmd: cmdTrim, off: far - 1, n: 2}, EINVAL},
			{request{cmd: cmdTrim, off: 0, n: 1<<32 - 1}, EINVAL},
			{request{cmd: cmdWriteZeroes, off: far, n: 1}, ENOSPC},
			{request{cmd: cmdBlockStatus, off: far, n: 1}, EINVAL},
			{request{cmd: cmdBlockStatus}, EINVAL},
			{request{cmd: cmdFlush, off: 1}, EINVAL},
			{request{cmd: cmdFlush, n: 1}, EINVAL},
			{request{cmd: cmdRead, flags: cmdFlagNoHole, n: 1}, EINVAL},
			{request{cmd: cmdRead, flags: 1 << 9, n: 1}, EINVAL},
			{request{cmd: cmdWrite, flags: cmdFlagDF, n: 100}, EINVAL},
			{request{cmd: cmdWriteZeroes, flags: cmdFlagFast, n: 1}, ENOTSUP}, // not an Export with FastZero
			{request{cmd: cmdTrim, flags: cmdFlagNoHole, n: 1}, EINVAL},
			{request{cmd: cmdBlockStatus, flags: cmdFlagDF, n: 1}, EINVAL},
			{request{cmd: cmdCache, off: far, n: 1}, EINVAL},
			{request{cmd: cmdCache, flags: cmdFlagReqOne, n: 1}, EINVAL},
			{request{cmd: cmdTrim, flags: cmdFlagFast, n: 1}, EINVAL},
			{request{cmd: 8, n: 1}, EINVAL}, // RESIZE is not offered
			{request{cmd: 0xFFFF, off: 77, n: 1}, EINVAL},
		} {
			var payload []byte
			if tc.r.cmd == cmdWrite {
				payload = bytes.Repeat([]byte{0xAA}, int(tc.r.n))
			}
			if got := c.do(tc.r, payload); got.errno != tc.want {
				t.Errorf("%d: %+v: error %d, want %d", i, tc.r, got.errno, tc.want)
			}
			refused++
		}
		if !c.structured {
			c.want(request{cmd: cmdRead, flags: cmdFlagDF, n: 1}, nil, EINVAL)
			c.want(request{cmd: cmdBlockStatus, n: 1}, nil, EINVAL)
			refused += 2
		}
		c.wantData(0, make([]byte, testSize))
		if got := s.Stats()["disk"].Errors; got != refused {
			t.Errorf("%d errors counted, want %d", got, refused)
		}
	})
}

// TestPayloadLimits uses a device that is larger than the largest payload.
func TestPayloadLimits(t *testing.T) {
	big := func() Export { return Export{Name: "disk", Device: block.NewMem(128 << 20)} }
	eachWay(t, big, func(t *testing.T, s *testServer, c *testClient) {
		tooLong := EINVAL
		if c.structured {
			tooLong = EOVERFLOW
		}
		c.want(request{cmd: cmdRead, n: maxPayloadBytes + 1}, nil, tooLong)
		data := bytes.Repeat([]byte("0123456789abcdef"), maxPayloadBytes/16)
		c.write(12345, data)
		c.wantData(12345, data)
		c.want(request{cmd: cmdWrite, n: maxPayloadBytes + 1}, make([]byte, maxPayloadBytes+1), EINVAL)
		c.want(request{cmd: cmdWrite, n: maxDrainBytes}, make([]byte, maxDrainBytes), EINVAL)
		c.wantData(12345, data)
		c.want(request{cmd: cmdWriteZeroes, n: 128 << 20}, nil, OK)
		c.want(request{cmd: cmdTrim, n: 128 << 20}, nil, OK)
		c.wantData(12345, make([]byte, maxPayloadBytes))
		c.start(request{cmd: cmdWrite, n: maxDrainBytes + 1}, nil)
		c.wantEOF()
		if err := <-s.result; !errors.Is(err, ErrProtocol) {
			t.Fatal(err)
		}
	})
}

func TestReadOnly(t *testing.T) {
	ro := func() Export { return Export{Name: "disk", Device: newMemDevice(testSize), ReadOnly: true} }
	eachWay(t, ro, func(t *testing.T, _ *testServer, c *testClient) {
		c.want(request{cmd: cmdWrite, n: 100_000}, make([]byte, 100_000), EPERM)
		c.want(request{cmd: cmdTrim, n: 1}, nil, EPERM)
		c.want(request{cmd: cmdWriteZeroes, n: 1, flags: cmdFlagFUA}, nil, EPERM)
		c.want(request{cmd: cmdFlush}, nil, OK)
		c.wantData(0, make([]byte, 100))
	})
}

// TestErrnos drives every row of the errno table, and what is not in it, through every command, inline and by workers.
func TestErrnos(t *testing.T) {
	for _, structured := range []bool{false, true} {
		dev := newMemDevice(testSize)
		var fail error
		var mu sync.Mutex
		dev.hook = func(call) error { mu.Lock(); defer mu.Unlock(); return fail }
		_, c := serve(t, Export{Name: "disk", Device: dev}, socketPair)
		c.join(structured)
		for _, row := range []struct {
			err         error
			read, write Errno
		}{
			{block.ErrNoSpace, ENOSPC, ENOSPC},
			{block.ErrReadOnly, EPERM, EPERM},
			{block.ErrRange, EINVAL, ENOSPC},
			{block.ErrAlign, EINVAL, EINVAL},
			{block.ErrClosed, ESHUTDOWN, ESHUTDOWN},
			{block.ErrFenced, ESHUTDOWN, ESHUTDOWN},
			{block.ErrFailed, EIO, EIO},
			{block.ErrCorrupt, EIO, EIO},
			{io.ErrUnexpectedEOF, EIO, EIO},
		} {
			mu.Lock()
			fail = fmt.Errorf("disk: %w", row.err)
			mu.Unlock()
			c.want(request{cmd: cmdRead, n: 10}, nil, row.read)
			c.want(request{cmd: cmdRead, n: 600_000}, nil, row.read)
			c.want(request{cmd: cmdFlush}, nil, row.read)
			c.want(request{cmd: cmdTrim, n: 10}, nil, row.read)
			c.want(request{cmd: cmdTrim, n: 100_000}, nil, row.read)
			for _, flags := range []uint16{0, cmdFlagFUA} {
				c.want(request{cmd: cmdWrite, flags: flags, n: 10}, make([]byte, 10), row.write)
				c.want(request{cmd: cmdWrite, flags: flags, n: 600_000}, make([]byte, 600_000), row.write)
				c.want(request{cmd: cmdWriteZeroes, flags: flags, n: 10}, nil, row.write)
				c.want(request{cmd: cmdWriteZeroes, flags: flags | cmdFlagNoHole, n: 10}, nil, row.write)
			}
			if structured {
				c.want(request{cmd: cmdBlockStatus, n: 10}, nil, row.read)
			}
		}
	}
}

// TestFlushFailsFUA: a write whose flush failed is an error, although the write succeeded.
func TestFlushFailsFUA(t *testing.T) {
	dev := newMemDevice(testSize)
	dev.hook = func(c call) error {
		if c.op == "flush" {
			return block.ErrFailed
		}
		return nil
	}
	_, c := serve(t, Export{Name: "disk", Device: dev}, socketPair)
	c.join(false)
	for _, cmd := range []uint16{cmdTrim, cmdWriteZeroes} {
		c.want(request{cmd: cmd, n: 10, flags: cmdFlagFUA}, nil, EIO)
	}
	c.want(request{cmd: cmdWrite, n: 1, flags: cmdFlagFUA}, []byte("x"), EIO)
	c.want(request{cmd: cmdWrite, n: 1}, []byte("x"), OK)
}

// TestFUAFlushes checks the order of calls: the write, then the flush, then the reply.
func TestFUAFlushes(t *testing.T) {
	dev := newMemDevice(testSize)
	var mu sync.Mutex
	var ops []string
	dev.hook = func(c call) error { mu.Lock(); defer mu.Unlock(); ops = append(ops, c.op); return nil }
	_, c := serve(t, Export{Name: "disk", Device: dev}, socketPair)
	c.join(false)
	c.want(request{cmd: cmdWrite, n: 1, flags: cmdFlagFUA}, []byte("x"), OK)
	c.want(request{cmd: cmdTrim, n: 1, flags: cmdFlagFUA}, nil, OK)
	c.want(request{cmd: cmdWriteZeroes, n: 1, flags: cmdFlagFUA}, nil, OK)
	c.want(request{cmd: cmdWriteZeroes, n: 1, flags: cmdFlagFUA | cmdFlagNoHole}, nil, OK)
	mu.Lock()
	defer mu.Unlock()
	if want := []string{"write", "flush", "zero", "flush", "zero", "flush", "write", "flush"}; !reflect.DeepEqual(ops, want) {
		t.Fatalf("calls %v, want %v", ops, want)
	}
}

func TestBlockStatus(t *testing.T) {
	_, c := serve(t, diskExport(), socketPair)
	c.join(true)
	c.write(8192, make([]byte, 4096))
	c.write(16384, make([]byte, 8192))
	c.want(request{cmd: cmdWriteZeroes, off: 16384, n: 4096}, nil, OK) // Zero next to Absent: one hole
	for _, tc := range []struct {
		off   int64
		n     uint32
		flags uint16
		want  []descriptor
	}{
		{0, testSize, 0, []descriptor{{8192, 3}, {4096, 0}, {8192, 3}, {4096, 0}, {testSize - 24576, 3}}},
		{0, testSize, cmdFlagReqOne, []descriptor{{8192, 3}}},
		{9000, 100, 0, []descriptor{{100, 0}}},
		{9000, 100, cmdFlagReqOne | cmdFlagFUA, []descriptor{{100, 0}}},
		{8191, 2, 0, []descriptor{{1, 3}, {1, 0}}},
		{testSize - 1, 1, 0, []descriptor{{1, 3}}},
	} {
		got := c.want(request{cmd: cmdBlockStatus, off: tc.off, n: tc.n, flags: tc.flags}, nil, OK)
		if !reflect.DeepEqual(got.status, tc.want) {
			t.Errorf("%d+%d flags %d: %v, want %v", tc.off, tc.n, tc.flags, got.status, tc.want)
		}
	}
}

// TestBlockStatusIsBounded: a fragmented device is described in pieces, and the pieces add up.
func TestBlockStatusIsBounded(t *testing.T) {
	const units = 3 * maxDescriptors
	dev := block.NewMem(units * block.UnitBytes)
	for u := int64(0); u < units; u += 2 {
		if _, err := dev.WriteAt([]byte("x"), u*block.UnitBytes); err != nil {
			t.Fatal(err)
		}
	}
	_, c := serve(t, Export{Name: "disk", Device: dev}, socketPair)
	c.join(true)
	at, replies := int64(0), 0
	for at < dev.Size() {
		got := c.want(request{cmd: cmdBlockStatus, off: at, n: uint32(dev.Size() - at)}, nil, OK)
		for _, d := range got.status {
			if want := uint32(at/block.UnitBytes%2) * 3; d.flags != want || d.n != block.UnitBytes {
				t.Fatalf("at %d: %+v, want flags %d", at, d, want)
			}
			at += int64(d.n)
		}
		replies++
	}
	if replies != 3 {
		t.Fatalf("%d replies, want 3", replies)
	}
}

// TestBlockStatusWindows: a device larger than a window, and one whose Extents stops short, are described whole.
func TestBlockStatusWindows(t *testing.T) {
	for _, dev := range []block.Device{block.NewMem(3*statusWindow + 4096), oneUnit{block.NewMem(1 << 20)}} {
		_, c := serve(t, Export{Name: "disk", Device: dev}, socketPair)
		c.join(true)
		for _, flags := range []uint16{0, cmdFlagReqOne} {
			got := c.want(request{cmd: cmdBlockStatus, n: uint32(dev.Size()), flags: flags}, nil, OK)
			if want := []descriptor{{uint32(dev.Size()), 3}}; !reflect.DeepEqual(got.status, want) {
				t.Fatalf("%v, want %v", got.status, want)
			}
		}
	}
}

// oneUnit describes one unit at a time.
type oneUnit struct{ block.Device }

func (d oneUnit) Extents(off, n int64) ([]block.Extent, error) {
	return d.Device.Extents(off, min(n, block.UnitBytes-off%block.UnitBytes))
}

// TestBrokenExtents: what a broken device says is an error, not an endless loop or a wrong map.
func TestBrokenExtents(t *testing.T) {
	for i, e := range [][]block.Extent{
		nil,
		{{Off: 0, N: 0, State: block.Data}},
		{{Off: 1, N: 10, State: block.Data}},
		{{Off: 0, N: testSize + 1, State: block.Data}},
		{{Off: 0, N: 4096, State: block.Data}, {Off: 0, N: 4096, State: block.Data}},
	} {
		_, c := serve(t, Export{Name: "disk", Device: liar{block.NewMem(testSize), e}}, socketPair)
		c.join(true)
		if got := c.do(request{cmd: cmdBlockStatus, n: testSize}, nil); got.errno != EIO {
			t.Errorf("%d: error %d", i, got.errno)
		}
		c.wantData(0, make([]byte, testSize)) // looks for holes, and does not trust what it hears
	}
}

type liar struct {
	block.Device
	extents []block.Extent
}

func (d liar) Extents(int64, int64) ([]block.Extent, error) { return d.extents, nil }

func TestHoles(t *testing.T) {
	dev := newMemDevice(testSize)
	var rotten atomic.Bool
	dev.hook = func(c call) error {
		if rotten.Load() && c.op == "read" {
			return block.ErrCorrupt
		}
		return nil
	}
	_, c := serve(t, Export{Name: "disk", Device: dev}, socketPair)
	c.join(true)
	data := make([]byte, testSize)
	copy(data[300_000:], bytes.Repeat([]byte{7}, 10_000))
	c.write(300_000, data[300_000:310_000])

	got := c.want(request{cmd: cmdRead, n: testSize}, nil, OK)
	if !bytes.Equal(got.data, data) || got.chunks != 3 || got.holes != 2 {
		t.Fatalf("%d chunks, %d holes, equal %v", got.chunks, got.holes, bytes.Equal(got.data, data))
	}
	got = c.want(request{cmd: cmdRead, flags: cmdFlagDF, n: testSize}, nil, OK)
	if !bytes.Equal(got.data, data) || got.chunks != 1 || got.holes != 0 {
		t.Fatalf("with DF: %d chunks, %d holes", got.chunks, got.holes)
	}
	// An error after a hole was found takes the whole reply back.
	rotten.Store(true)
	if got := c.want(request{cmd: cmdRead, n: testSize}, nil, EIO); got.chunks != 0 {
		t.Fatalf("%d chunks before an error", got.chunks)
	}
}

// TestHolesAreLookedForRarely: on a device full of data, asking for extents must not become part of every large read.
func TestHolesAreLookedForRarely(t *testing.T) {
	dev := newMemDevice(testSize)
	var extents atomic.Int32
	dev.hook = func(c call) error {
		if c.op == "extents" {
			extents.Add(1)
		}
		return nil
	}
	_, c := serve(t, Export{Name: "disk", Device: dev}, socketPair)
	c.join(true)
	data := bytes.Repeat([]byte{1}, testSize)
	c.write(0, data)
	for range 1 + sparseSkipFirst + 1 + 2*sparseSkipFirst {
		c.wantData(0, data[:sparseBytes])
	}
	if n := extents.Load(); n < 1 || n > 2 { // once if asking took long
		t.Fatalf("asked %d times, want 2", n)
	}
}

// script is a whole conversation as bytes, negotiation included, and what it asks by cookie.
func script(structured bool) ([]byte, map[uint64]request) {
	sent := map[uint64]request{}
	p := []byte{0, 0, 0, 3}
	if structured {
		p = append(p, optionBytes(optStructuredReply, nil)...)
		p = append(p, optionBytes(optSetMetaContext, metaData("", "base:allocation"))...)
	}
	p = append(p, optionBytes(optList, nil)...)
	p = append(p, optionBytes(optGo, infoData("disk", 3))...)
	for i, r := range []request{
		{cmd: cmdWrite, off: 10, n: 20},
		{cmd: cmdRead, off: 0, n: 40},
		{cmd: cmdWrite, off: 20_000, n: 5}, // out of range: the payload is skipped
		{cmd: cmdTrim, off: 4096, n: 3},    // not where anything is read: workers may answer out of order
		{cmd: cmdBlockStatus, n: 4096},
		{cmd: 99, n: 1},
		{cmd: cmdRead, off: 8, n: 30},
		{cmd: cmdDisc},
	} {
		r.cookie = uint64(i + 1)
		sent[r.cookie] = r
		var payload []byte
		if r.cmd == cmdWrite {
			payload = []byte("abcdefghijklmnopqrstuvwxyz")[:r.n]
		}
		p = append(p, requestWire(r, payload)...)
	}
	return p, sent
}

// listen takes in all the server says to a script.
func (c *testClient) listen(sent map[uint64]request) map[uint64]reply {
	c.recv(18)
	opts := []uint32{optList, optGo}
	if c.structured {
		opts = []uint32{optStructuredReply, optSetMetaContext, optList, optGo}
	}
	for _, opt := range opts {
		c.optionReplies(opt)
	}
	out := map[uint64]reply{}
	for {
		r, err := c.tryAwait(sent)
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			c.t.Fatal(err)
		}
		out[r.cookie] = r
	}
}

// TestEveryByteBoundary splits a conversation in two at every byte, and also sends it byte by byte: the answer is always the same.
func TestEveryByteBoundary(t *testing.T) {
	for _, structured := range []bool{false, true} {
		whole, sent := script(structured)
		converse := func(cuts ...int) map[uint64]reply {
			s, err := NewServer(Config{Exports: Single{Name: "disk", Device: newMemDevice(8192)}})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			a, b := net.Pipe() // a write returns when it was read, so a cut in the writes is a cut in the reads
			if err := a.SetDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- s.ServeConn(b) }()
			var wg sync.WaitGroup
			wg.Go(func() {
				from := 0
				for _, cut := range append(cuts, len(whole)) {
					if _, err := a.Write(whole[from:cut]); err != nil {
						t.Errorf("write [%d:%d]: %v", from, cut, err)
					}
					from = cut
				}
			})
			c := &testClient{t: t, conn: a, structured: structured}
			out := c.listen(sent)
			wg.Wait()
			if err := <-done; err != nil {
				t.Errorf("cuts %v: %v", cuts, err)
			}
			return out
		}
		want := converse()
		all := make([]int, 0, len(whole))
		for i := 1; i < len(whole); i++ {
			all = append(all, i)
			if got := converse(i); !reflect.DeepEqual(got, want) {
				t.Fatalf("structured %v: cut at %d: %v\nwant %v", structured, i, got, want)
			}
		}
		if got := converse(all...); !reflect.DeepEqual(got, want) {
			t.Fatalf("structured %v: byte by byte: %v\nwant %v", structured, got, want)
		}
	}
}

// TestPartialPayloads sends writes of sizes around every limit of the receive path in pieces.
func TestPartialPayloads(t *testing.T) {
	const size = 4 << 20
	dev := func() Export { return Export{Name: "disk", Device: block.NewMem(size)} }
	eachWay(t, dev, func(t *testing.T, _ *testServer, c *testClient) {
		rnd := rand.New(rand.NewPCG(1, 2))
		model := make([]byte, size)
		for _, n := range []int{1, 4096, smallReceive - 1, smallReceive, 12_260, 12_288, directBytes - 1, directBytes, largeBuffer - 28, largeBuffer, largeBuffer + 4096, 1 << 20} {
			for _, cut := range []int{0, 1, 27, 28, 29, n / 2, n + 27} {
				data := make([]byte, n)
				for i := range data {
					data[i] = byte(rnd.Uint32())
				}
				off := rnd.Int64N(size - int64(n) + 1)
				copy(model[off:], data)
				c.next++
				r := request{cmd: cmdWrite, off: off, n: uint32(n), cookie: c.next}
				p := requestWire(r, data)
				cut = min(cut, len(p))
				c.send(p[:cut])
				c.send(p[cut:])
				if got := c.await(map[uint64]request{r.cookie: r}); got.errno != OK {
					t.Fatal(got.errno)
				}
			}
		}
		c.wantData(0, model)
	})
}

// TestEndsInARequest: a stream that stops in the middle is told from one that ends between requests.
func TestEndsInARequest(t *testing.T) {
	for n, p := range map[string][]byte{
		"header":        requestWire(request{cmd: cmdRead}, nil)[:27],
		"small payload": requestWire(request{cmd: cmdWrite, n: 100}, nil),
		"large payload": requestWire(request{cmd: cmdWrite, n: 100_000}, make([]byte, 50_000)),
		"refused":       requestWire(request{cmd: cmdWrite, n: 100_000, flags: 1 << 8}, make([]byte, 50_000)),
	} {
		for name, wire := range wires {
			t.Run(n+"/"+name, func(t *testing.T) {
				s, c := serve(t, diskExport(), wire)
				c.join(false)
				c.send(p)
				_ = c.conn.Close()
				if err := <-s.result; !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("got %v", err)
				}
				if w := s.Stats()["disk"].Writes; n != "refused" && w != 0 {
					t.Fatalf("%d writes", w)
				}
			})
		}
	}
}

func TestBadMagic(t *testing.T) {
	s, c := serve(t, diskExport(), socketPair)
	c.join(false)
	p := requestWire(request{cmd: cmdRead, n: 10, cookie: 1}, nil)
	q := requestWire(request{cmd: cmdRead, n: 10, cookie: 2}, nil)
	q[0] ^= 1
	c.send(append(p, q...))
	c.await(map[uint64]request{1: {cmd: cmdRead, n: 10}}) // what came before is answered
	c.wantEOF()
	if err := <-s.result; !errors.Is(err, ErrProtocol) {
		t.Fatal(err)
	}
}

// TestHalfClose: a client that has sent everything and closed its sending side still gets every reply.
func TestHalfClose(t *testing.T) {
	s, c := serve(t, diskExport(), socketPair)
	c.join(true)
	sent := map[uint64]request{}
	for i := range 100 {
		r := request{cmd: cmdRead, n: 4096}
		if i%10 == 0 {
			r = request{cmd: cmdFlush}
		}
		sent[c.start(r, nil)] = r
	}
	if err := c.conn.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		r := c.await(sent)
		delete(sent, r.cookie)
	}
	c.wantEOF()
	if err := <-s.result; err != nil {
		t.Fatal(err)
	}
}

// TestFastZero: what is asked for fast or not at all is done where it is cheap, and makes holes.
func TestFastZero(t *testing.T) {
	fast := func() Export { e := diskExport(); e.FastZero = true; return e }
	eachWay(t, fast, func(t *testing.T, s *testServer, c *testClient) {
		if c.flags&flagFastZero == 0 {
			t.Error("fast zeroes are not offered")
		}
		c.write(0, bytes.Repeat([]byte{1}, 8192))
		c.want(request{cmd: cmdWriteZeroes, flags: cmdFlagFast, n: 4096}, nil, OK)
		c.want(request{cmd: cmdWriteZeroes, flags: cmdFlagFast | cmdFlagNoHole, off: 4096, n: 4096}, nil, ENOTSUP)
		c.wantData(0, append(make([]byte, 4096), bytes.Repeat([]byte{1}, 4096)...))
		if st := s.Stats()["disk"]; st.ZeroedBytes != 4096 {
			t.Errorf("%+v", st)
		}
	})
}

// TestCache: the device is read up to a bound, and nothing comes back but a success or the device's error.
func TestCache(t *testing.T) {
	dev := newMemDevice(128 << 20)
	var read atomic.Int64
	dev.hook = func(c call) error {
		if c.off >= 64<<20 {
			return block.ErrCorrupt
		}
		read.Add(c.n)
		return nil
	}
	_, c := serve(t, Export{Device: dev, ReadOnly: true}, socketPair)
	c.join(true)
	if c.flags&flagCache == 0 {
		t.Error("caching is not offered")
	}
	for n, want := range map[uint32]int64{0: 0, 1: 1, 100_000: 100_000, 64 << 20: cacheBytes} {
		read.Store(0)
		c.want(request{cmd: cmdCache, n: n}, nil, OK)
		if read.Load() != want {
			t.Errorf("%d bytes were read for a cache of %d", read.Load(), n)
		}
	}
	c.want(request{cmd: cmdCache, off: 64 << 20, n: 1}, nil, EIO)
}
