package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must happen.
const patience = time.Minute

// until polls cond, for what cannot be waited for otherwise.
func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	end := time.Now().Add(patience)
	for !cond() {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
		<-tick.C
	}
}

// within fails the test when f takes longer than patience.
func within(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s takes for ever", what)
	}
}

// wires are the two ways a connection is driven: blocking system calls, and net.Conn.
var wires = map[string]func(testing.TB) (client, server net.Conn){
	"socket": socketPair,
	"conn": func(t testing.TB) (net.Conn, net.Conn) {
		a, b := socketPair(t)
		return a, hideType{b}
	},
}

// hideType makes a socket look like any other net.Conn.
type hideType struct{ net.Conn }

func socketPair(t testing.TB) (net.Conn, net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var out [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		if out[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return out[0], out[1]
}

// testServer is a server with one connection to it.
type testServer struct {
	*Server
	result chan error // of ServeConn
}

func serve(t testing.TB, e Export, wire func(testing.TB) (net.Conn, net.Conn)) (*testServer, *testClient) {
	t.Helper()
	s, err := NewServer(Config{Exports: Single(e)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { within(t, "Close", func() { _ = s.Close() }) })
	ts := &testServer{Server: s, result: make(chan error, 1)}
	a, b := wire(t)
	go func() { ts.result <- s.ServeConn(b) }()
	c := newTestClient(t, a)
	return ts, c
}

// testClient is a client for tests: it sends what it is told, right or wrong, and takes replies apart strictly.
type testClient struct {
	t    testing.TB
	conn net.Conn

	structured bool
	size       uint64
	flags      uint16
	next       uint64
}

func newTestClient(t testing.TB, conn net.Conn) *testClient {
	t.Helper()
	c := &testClient{t: t, conn: conn}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *testClient) send(p []byte) {
	c.t.Helper()
	if _, err := c.conn.Write(p); err != nil {
		c.t.Fatalf("send: %v", err)
	}
}

func (c *testClient) recv(n int) []byte {
	c.t.Helper()
	p := make([]byte, n)
	if _, err := io.ReadFull(c.conn, p); err != nil {
		c.t.Fatalf("receive %d bytes: %v", n, err)
	}
	return p
}

// wantEOF checks that the server ends the connection and sends nothing more.
func (c *testClient) wantEOF() {
	c.t.Helper()
	var p [1]byte
	n, err := c.conn.Read(p[:])
	if n != 0 || errors.Is(err, os.ErrDeadlineExceeded) || err == nil {
		c.t.Fatalf("read %d %v, want the connection to end", n, err)
	}
}

func (c *testClient) hello(flags uint32) {
	c.t.Helper()
	p := c.recv(18)
	if binary.BigEndian.Uint64(p) != magicServer || binary.BigEndian.Uint64(p[8:]) != magicOption || binary.BigEndian.Uint16(p[16:]) != 3 {
		c.t.Fatalf("greeting %x", p)
	}
	c.send(binary.BigEndian.AppendUint32(nil, flags))
}

func optionBytes(opt uint32, data []byte) []byte {
	p := binary.BigEndian.AppendUint64(nil, magicOption)
	p = binary.BigEndian.AppendUint32(p, opt)
	p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
	return append(p, data...)
}

// optReply is one reply to an option.
type optReply struct {
	typ  uint32
	data string
}

// option sends an option and returns its replies up to the final one.
func (c *testClient) option(opt uint32, data []byte) []optReply {
	c.t.Helper()
	c.send(optionBytes(opt, data))
	return c.optionReplies(opt)
}

func (c *testClient) optionReplies(opt uint32) []optReply {
	c.t.Helper()
	var out []optReply
	for {
		p := c.recv(20)
		if binary.BigEndian.Uint64(p) != magicOptionReply || binary.BigEndian.Uint32(p[8:]) != opt {
			c.t.Fatalf("reply to option %d: %x", opt, p)
		}
		r := optReply{typ: binary.BigEndian.Uint32(p[12:])}
		r.data = string(c.recv(int(binary.BigEndian.Uint32(p[16:]))))
		out = append(out, r)
		if r.typ == repAck || r.typ>>31 != 0 {
			return out
		}
	}
}

func infoData(name string, infos ...uint16) []byte {
	p := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	p = append(p, name...)
	p = binary.BigEndian.AppendUint16(p, uint16(len(infos)))
	for _, i := range infos {
		p = binary.BigEndian.AppendUint16(p, i)
	}
	return p
}

func metaData(name string, queries ...string) []byte {
	p := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	p = append(p, name...)
	p = binary.BigEndian.AppendUint32(p, uint32(len(queries)))
	for _, q := range queries {
		p = binary.BigEndian.AppendUint32(p, uint32(len(q)))
		p = append(p, q...)
	}
	return p
}

// join negotiates with the default export.
func (c *testClient) join(structured bool) {
	c.t.Helper()
	c.hello(3)
	if structured {
		c.structured = true
		c.option(optStructuredReply, nil)
		r := c.option(optSetMetaContext, metaData("", "base:allocation"))
		if len(r) != 2 || r[0].data != "\x00\x00\x00\x01base:allocation" {
			c.t.Fatalf("set meta context: %v", r)
		}
	}
	r := c.option(optGo, infoData(""))
	if len(r) != 2 || r[0].typ != repInfo || r[1].typ != repAck {
		c.t.Fatalf("go: %v", r)
	}
	c.size = binary.BigEndian.Uint64([]byte(r[0].data[2:]))
	c.flags = binary.BigEndian.Uint16([]byte(r[0].data[10:]))
}

func requestWire(r request, payload []byte) []byte {
	p := binary.BigEndian.AppendUint32(nil, magicRequest)
	p = binary.BigEndian.AppendUint16(p, r.flags)
	p = binary.BigEndian.AppendUint16(p, r.cmd)
	p = binary.BigEndian.AppendUint64(p, r.cookie)
	p = binary.BigEndian.AppendUint64(p, uint64(r.off))
	p = binary.BigEndian.AppendUint32(p, r.n)
	return append(p, payload...)
}

// start sends a request and returns its cookie.
func (c *testClient) start(r request, payload []byte) uint64 {
	c.t.Helper()
	c.next++
	r.cookie = c.next
	c.send(requestWire(r, payload))
	return r.cookie
}

// reply is a whole answer to a request.
type reply struct {
	cookie uint64
	errno  Errno
	text   string
	data   []byte // of a read, with holes filled in
	chunks int    // content chunks
	holes  int    // of them holes
	status []descriptor
}

type descriptor struct{ n, flags uint32 }

// await reads the next whole answer; sent says what was asked, by cookie, because a simple reply does not tell how long it is.
func (c *testClient) await(sent map[uint64]request) reply {
	c.t.Helper()
	r, err := c.tryAwait(sent)
	if err != nil {
		c.t.Fatalf("reply: %v", err)
	}
	return r
}

func (c *testClient) tryAwait(sent map[uint64]request) (reply, error) {
	var out reply
	for first := true; ; first = false {
		var head [simpleBytes]byte
		if _, err := io.ReadFull(c.conn, head[:]); err != nil {
			return out, err
		}
		switch binary.BigEndian.Uint32(head[:]) {
		case magicSimple:
			out.cookie, out.errno = binary.BigEndian.Uint64(head[8:]), Errno(binary.BigEndian.Uint32(head[4:]))
			req, ok := sent[out.cookie]
			if !ok || !first {
				return out, fmt.Errorf("simple reply to %d, which is not awaited", out.cookie)
			}
			if c.structured && (req.cmd == cmdRead || req.cmd == cmdBlockStatus) {
				return out, fmt.Errorf("simple reply to command %d", req.cmd)
			}
			if req.cmd == cmdRead && out.errno == OK {
				out.data, out.chunks = make([]byte, req.n), 1
				if _, err := io.ReadFull(c.conn, out.data); err != nil {
					return out, err
				}
			}
			return out, nil
		case magicStructured:
			cookie := binary.BigEndian.Uint64(head[8:])
			req, ok := sent[cookie]
			if !c.structured || !ok || (!first && out.cookie != cookie) {
				return out, fmt.Errorf("structured reply to %d, which is not awaited", cookie)
			}
			out.cookie = cookie
			done, err := c.chunk(head[:], req, &out)
			if err != nil || done {
				return out, err
			}
		default:
			return out, fmt.Errorf("reply magic %x", head[:4])
		}
	}
}

// chunk reads the rest of a structured chunk.
func (c *testClient) chunk(head []byte, req request, out *reply) (done bool, err error) {
	var length [4]byte
	if _, err := io.ReadFull(c.conn, length[:]); err != nil {
		return false, err
	}
	p := make([]byte, binary.BigEndian.Uint32(length[:]))
	if _, err := io.ReadFull(c.conn, p); err != nil {
		return false, err
	}
	done = binary.BigEndian.Uint16(head[4:])&replyFlagDone != 0
	switch typ := binary.BigEndian.Uint16(head[6:]); typ {
	case replyNone:
		if !done || len(p) != 0 {
			return done, fmt.Errorf("chunk NONE: done %v, %d bytes", done, len(p))
		}
	case replyOffsetData, replyOffsetHole:
		if len(p) < 9 || req.cmd != cmdRead {
			return done, fmt.Errorf("content chunk of %d bytes to command %d", len(p), req.cmd)
		}
		off, n := int64(binary.BigEndian.Uint64(p)), int64(len(p)-8)
		if typ == replyOffsetHole {
			n = int64(binary.BigEndian.Uint32(p[8:]))
			out.holes++
		}
		if off < req.off || n <= 0 || off+n > req.off+int64(req.n) {
			return done, fmt.Errorf("content chunk %d+%d outside the request %d+%d", off, n, req.off, req.n)
		}
		if out.chunks++; out.chunks == 1 {
			out.data = bytes.Repeat([]byte{0xEE}, int(req.n)) // what no chunk covers shows
		}
		at := out.data[off-req.off:][:n]
		if typ == replyOffsetHole {
			clear(at)
		} else {
			copy(at, p[8:])
		}
	case replyBlockStatus:
		if len(p) < 12 || len(p)%8 != 4 || binary.BigEndian.Uint32(p) != 1 || req.cmd != cmdBlockStatus {
			return done, fmt.Errorf("block status chunk %x", p)
		}
		for q := p[4:]; len(q) > 0; q = q[8:] {
			out.status = append(out.status, descriptor{binary.BigEndian.Uint32(q), binary.BigEndian.Uint32(q[4:])})
		}
	case replyError:
		out.errno = Errno(binary.BigEndian.Uint32(p))
		out.text = string(p[6:])
		if int(binary.BigEndian.Uint16(p[4:])) != len(out.text) || out.errno == OK {
			return done, fmt.Errorf("error chunk %x", p)
		}
	default:
		return done, fmt.Errorf("chunk type %d", typ)
	}
	return done, nil
}

// do sends one request and returns the answer.
func (c *testClient) do(r request, payload []byte) reply {
	c.t.Helper()
	r.cookie = c.start(r, payload)
	return c.await(map[uint64]request{r.cookie: r})
}

// want does r and checks the error value.
func (c *testClient) want(r request, payload []byte, errno Errno) reply {
	c.t.Helper()
	got := c.do(r, payload)
	if got.errno != errno {
		c.t.Fatalf("command %d flags %#x %d+%d: error %d, want %d", r.cmd, r.flags, r.off, r.n, got.errno, errno)
	}
	if got.errno != OK && c.structured && got.text == "" {
		c.t.Fatalf("error %d without a text", got.errno)
	}
	return got
}

func (c *testClient) wantData(off int64, data []byte) {
	c.t.Helper()
	got := c.want(request{cmd: cmdRead, off: off, n: uint32(len(data))}, nil, OK)
	if !bytes.Equal(got.data, data) {
		c.t.Fatalf("read %d+%d: wrong data", off, len(data))
	}
}

func (c *testClient) write(off int64, data []byte) {
	c.t.Helper()
	c.want(request{cmd: cmdWrite, off: off, n: uint32(len(data))}, data, OK)
}
