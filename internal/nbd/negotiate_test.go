package nbd

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"
)

func joinless(t *testing.T) (*testServer, *testClient) {
	t.Helper()
	s, c := serve(t, Export{Name: "disk", Description: "a disk", Device: newMemDevice(1 << 20)}, socketPair)
	return s, c
}

func single(typ uint32) []optReply { return []optReply{{typ: typ}} }

func infoExportData(flags string) string {
	return "\x00\x00" + "\x00\x00\x00\x00\x00\x10\x00\x00" + flags
}

func TestOptions(t *testing.T) {
	const ack, invalid = repAck, repErrInvalid
	blockSize := "\x00\x03\x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00"
	info := func(flags string) optReply { return optReply{repInfo, infoExportData(flags)} }
	const simple, structured = "\x0d\x6d", "\x0d\xed"
	allocation := optReply{repMetaContext, "\x00\x00\x00\x00base:allocation"}
	for _, tc := range []struct {
		name       string
		structured bool
		opt        uint32
		data       []byte
		want       []optReply
	}{
		{"list", false, optList, nil, []optReply{{repServer, "\x00\x00\x00\x04diska disk"}, {typ: ack}}},
		{"list with data", false, optList, []byte("x"), single(invalid)},
		{"info", false, optInfo, infoData("disk"), []optReply{info(simple), {typ: ack}}},
		{"info default", true, optInfo, infoData(""), []optReply{info(structured), {typ: ack}}},
		{"info all", false, optInfo, infoData("", 0, 1, 2, 3, 77), []optReply{
			info(simple), {repInfo, "\x00\x01disk"}, {repInfo, "\x00\x02a disk"}, {repInfo, blockSize}, {typ: ack}}},
		{"info unknown export", false, optInfo, infoData("tape"), single(repErrUnknown)},
		{"info empty", false, optInfo, nil, single(invalid)},
		{"info short list", false, optInfo, infoData("disk", 1, 2)[:13], single(invalid)},
		{"info long", false, optInfo, append(infoData("disk"), 0), single(invalid)},
		{"info name beyond data", false, optInfo, []byte{255, 255, 255, 255, 0, 0}, single(invalid)},
		{"info name too long", false, optInfo, infoData(string(make([]byte, maxNameBytes+1))), single(invalid)},
		{"go unknown export", false, optGo, infoData("tape"), single(repErrUnknown)},
		{"go malformed", false, optGo, []byte{0}, single(invalid)},
		{"structured", false, optStructuredReply, nil, single(ack)},
		{"structured with data", false, optStructuredReply, []byte("x"), single(invalid)},
		{"list contexts unstructured", false, optListMetaContext, metaData(""), single(invalid)},
		{"list contexts", true, optListMetaContext, metaData("disk"), []optReply{allocation, {typ: ack}}},
		{"list contexts wildcard", true, optListMetaContext, metaData("", "base:"), []optReply{allocation, {typ: ack}}},
		{"list contexts exact", true, optListMetaContext, metaData("", "x-a:b", "base:allocation", "base:"), []optReply{allocation, {typ: ack}}},
		{"list contexts foreign", true, optListMetaContext, metaData("", "qemu:", "nocolon", ""), single(ack)},
		{"list contexts unknown export", true, optListMetaContext, metaData("tape"), single(repErrUnknown)},
		{"set contexts unstructured", false, optSetMetaContext, metaData("", "base:allocation"), single(invalid)},
		{"set contexts none", true, optSetMetaContext, metaData(""), single(ack)},
		{"set contexts wildcard", true, optSetMetaContext, metaData("", "base:"), single(ack)},
		{"set contexts", true, optSetMetaContext, metaData("", "base:allocation", "base:allocation"),
			[]optReply{{repMetaContext, "\x00\x00\x00\x01base:allocation"}, {typ: ack}}},
		{"set contexts malformed", true, optSetMetaContext, metaData("", "base:allocation")[:12], single(invalid)},
		{"set contexts too many queries", true, optSetMetaContext, []byte{0, 0, 0, 0, 255, 255, 255, 255}, single(invalid)},
		{"starttls", false, optStartTLS, nil, single(repErrPolicy)},
		{"starttls with data", false, optStartTLS, []byte("x"), single(invalid)},
		{"peek", false, 4, nil, single(repErrUnsup)},
		{"extended headers", false, 11, nil, single(repErrUnsup)},
		{"unknown", false, 0xDEADBEEF, make([]byte, 1000), single(repErrUnsup)},
		{"too big", false, optInfo, make([]byte, maxOptionBytes+1), single(repErrTooBig)},
		{"largest drained", false, 99, make([]byte, maxOptionDrainBytes), single(repErrTooBig)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, c := joinless(t)
			c.hello(3)
			if tc.structured {
				c.option(optStructuredReply, nil)
			}
			if got := c.option(tc.opt, tc.data); !reflect.DeepEqual(got, tc.want) {
				t.Fatalf("got %+v\nwant %+v", got, tc.want)
			}
			// Whatever the answer, the negotiation goes on.
			if got := c.option(optAbort, []byte("ignored")); !reflect.DeepEqual(got, single(ack)) {
				t.Fatalf("abort: %v", got)
			}
			c.wantEOF()
			if err := <-s.result; err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestExportName(t *testing.T) {
	for _, noZeroes := range []bool{false, true} {
		for _, name := range []string{"", "disk"} {
			s, c := joinless(t)
			flags := uint32(1)
			if noZeroes {
				flags = 3
			}
			c.hello(flags)
			c.send(optionBytes(optExportName, []byte(name)))
			want := infoExportData("\x0d\x6d")[2:]
			if !noZeroes {
				want += string(make([]byte, 124))
			}
			if got := c.recv(len(want)); string(got) != want {
				t.Fatalf("noZeroes %v: %x", noZeroes, got)
			}
			c.write(0, []byte("hello"))
			c.wantData(0, []byte("hello"))
			c.start(request{cmd: cmdDisc}, nil)
			c.wantEOF()
			if err := <-s.result; err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestReadOnlyFlags(t *testing.T) {
	_, c := serve(t, Export{Name: "ro", Device: newMemDevice(4096), ReadOnly: true}, socketPair)
	c.join(true)
	if want := uint16(flagHasFlags | flagReadOnly | flagFlush | flagFUA | flagDF | flagMultiConn | flagCache); c.flags != want {
		t.Fatalf("flags %#x, want %#x", c.flags, want)
	}
}

// TestBadNegotiations are those that end the connection.
func TestBadNegotiations(t *testing.T) {
	for name, tc := range map[string]struct {
		flags uint32
		send  []byte
		want  error
	}{
		"unknown client flag":       {4, nil, ErrProtocol},
		"wrong magic":               {3, make([]byte, 16), ErrProtocol},
		"unknown export name":       {3, optionBytes(optExportName, []byte("tape")), ErrNoExport},
		"long export name":          {3, optionBytes(optExportName, make([]byte, maxOptionBytes+1)), ErrProtocol},
		"huge option":               {3, optionBytes(optInfo, make([]byte, maxOptionDrainBytes+1))[:16], ErrProtocol},
		"option without newstyle":   {2, optionBytes(optList, nil), ErrProtocol},
		"abort without newstyle":    {0, optionBytes(optAbort, nil), nil},
		"many options":              {3, bytes.Repeat(optionBytes(77, nil), maxOptions), ErrProtocol},
		"leave in an option":        {3, optionBytes(optInfo, make([]byte, 100))[:50], errAny},
		"leave before client flags": {0xFFFFFFFF, nil, ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			s, c := joinless(t)
			c.hello(tc.flags)
			if tc.send != nil {
				c.send(tc.send)
			}
			if tc.want == errAny {
				_ = c.conn.Close()
			}
			err := <-s.result
			if tc.want == errAny && err == nil || tc.want != errAny && !errors.Is(err, tc.want) {
				t.Fatalf("got %v, want %v", err, tc.want)
			}
		})
	}
}

var errAny = errors.New("any error")

func TestLeaveBetweenOptions(t *testing.T) {
	s, c := joinless(t)
	c.hello(3)
	c.option(optList, nil)
	_ = c.conn.Close()
	if err := <-s.result; err != nil {
		t.Fatal(err)
	}
}

// TestContextsBelongToTheirExport: contexts selected for one export are not there for another, and a failed selection clears an earlier one.
func TestContextsBelongToTheirExport(t *testing.T) {
	exports := pair{"a": newMemDevice(4096), "b": newMemDevice(4096)}
	for i, sets := range [][][]byte{
		{metaData("a", "base:allocation")},
		{metaData("b", "base:allocation"), metaData("a", "base:allocation")},
		{metaData("b", "base:allocation"), metaData("b")},
		{metaData("b", "base:allocation"), metaData("tape", "base:allocation")},
		{metaData("b", "base:allocation"), []byte("malformed")},
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			s, err := NewServer(Config{Exports: exports})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			a, b := socketPair(t)
			go s.ServeConn(b)
			c := newTestClient(t, a)
			c.hello(3)
			c.option(optStructuredReply, nil)
			c.structured = true
			for _, set := range sets {
				c.option(optSetMetaContext, set)
			}
			c.option(optGo, infoData("b"))
			c.want(request{cmd: cmdBlockStatus, n: 4096}, nil, EINVAL)
		})
	}
}

// pair is an Exports by name.
type pair map[string]*memDevice

func (p pair) Lookup(name string) (Export, error) {
	if d, ok := p[name]; ok {
		return Export{Name: name, Device: d}, nil
	}
	return Export{}, fmt.Errorf("pair: %w", ErrNoExport)
}

func (p pair) List() []Export {
	return []Export{{Name: "a"}, {Name: "b"}}
}

func TestNegotiationTimeout(t *testing.T) {
	s, err := NewServer(Config{Exports: pair{}, NegotiationTimeout: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, polite := range []bool{false, true} {
		a, b := socketPair(t)
		c := newTestClient(t, a)
		result := make(chan error, 1)
		go func() { result <- s.ServeConn(b) }()
		if polite {
			c.hello(3)
			c.send(optionBytes(optGo, infoData("a"))[:7]) // and never the rest
		}
		var timeout interface{ Timeout() bool }
		if err := <-result; !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Fatalf("got %v", err)
		}
	}
}

// TestPeerThatReadsNothing negotiates without reading replies; the deadline covers writing too.
func TestPeerThatReadsNothing(t *testing.T) {
	s, err := NewServer(Config{Exports: pair{}, NegotiationTimeout: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	a, b := wires["conn"](t)
	defer a.Close()
	if err := b.(hideType).Conn.(interface{ SetWriteBuffer(int) error }).SetWriteBuffer(1); err != nil {
		t.Fatal(err)
	}
	result := make(chan error, 1)
	go func() { result <- s.ServeConn(b) }()
	p := []byte{0, 0, 0, 3}
	for range maxOptions {
		p = append(p, optionBytes(optList, nil)...)
	}
	if _, err := a.Write(p); err != nil {
		t.Fatal(err)
	}
	if err := <-result; err == nil {
		t.Fatal("no error")
	}
}
