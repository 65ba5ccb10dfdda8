package hold

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The protocol, normative in docs/formats/hold.md: one packet a request, one packet a reply, in order, text, with at most one descriptor.
const (
	// protoMin and protoCurrent are the window of protocol versions of this build.
	protoMin     = 1
	protoCurrent = 1
	// maxRequest and maxReply bound a packet.
	maxRequest = 512
	maxReply   = 32 << 10
	maxName    = 200
	// maxRights is how many descriptors of one packet are received (and, beyond the first, closed).
	maxRights = 8
)

// The verbs.
const (
	verbHello  = "HELLO"
	verbPut    = "PUT"
	verbGet    = "GET"
	verbDrop   = "DROP"
	verbList   = "LIST"
	verbStatus = "STATUS"
	verbStop   = "STOP"
	verbStart  = "START" // added to version 1 later: an older holder answers ERR invalid
)

// The codes of an ERR reply.
const (
	codeInvalid  = "invalid"
	codeVersion  = "version"
	codeNotFound = "not-found"
	codeFull     = "full"
	codeFailed   = "failed"
)

// request is one parsed request packet.
type request struct {
	verb     string
	name     string // PUT, GET, DROP; LIST: names after this one, may be empty
	min, max int    // HELLO
}

// errRequest: the packet is not a request of this protocol.
var errRequest = errors.New("not a request of this protocol")

// parseRequest reads a request packet. It never panics, whatever the bytes.
func parseRequest(p []byte) (request, error) {
	if len(p) > maxRequest {
		return request{}, fmt.Errorf("%w: %d bytes, at most %d", errRequest, len(p), maxRequest)
	}
	fields := strings.Split(string(p), " ")
	r, args := request{verb: fields[0]}, fields[1:]
	want := 0
	switch r.verb {
	case verbHello:
		want = 2
	case verbPut, verbGet, verbDrop:
		want = 1
	case verbList:
		want = min(1, len(args))
	case verbStatus, verbStop, verbStart:
	default:
		return request{}, fmt.Errorf("%w: unknown verb %.20q", errRequest, r.verb)
	}
	if len(args) != want {
		return request{}, fmt.Errorf("%w: %s takes %d arguments, has %d", errRequest, r.verb, want, len(args))
	}
	if r.verb == verbHello {
		var err error
		r.min, r.max, err = parseWindow(args[0], args[1])
		return r, err
	}
	if want == 1 {
		if !validName(args[0]) {
			return request{}, fmt.Errorf("%w: bad name %.40q", errRequest, args[0])
		}
		r.name = args[0]
	}
	return r, nil
}

func parseWindow(lo, hi string) (minimum, current int, err error) {
	minimum, err = strconv.Atoi(lo)
	if err == nil {
		current, err = strconv.Atoi(hi)
	}
	if err != nil || minimum < 1 || current < minimum {
		return 0, 0, fmt.Errorf("%w: bad version window %.20q %.20q", errRequest, lo, hi)
	}
	return minimum, current, nil
}

// validName tells whether s can name a descriptor: 1 to 200 of the letters A-Z a-z, digits, and . _ : / -
func validName(s string) bool {
	if s == "" || len(s) > maxName {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case c == '.', c == '_', c == ':', c == '/', c == '-':
		default:
			return false
		}
	}
	return true
}

// reply is one parsed reply packet.
type reply struct {
	ok   bool
	code string // of a failure
	text string
}

// parseReply reads a reply packet. It never panics, whatever the bytes.
func parseReply(p []byte) (reply, error) {
	head, rest, _ := bytes.Cut(p, []byte(" "))
	switch string(head) {
	case "OK":
		return reply{ok: true, text: string(rest)}, nil
	case "ERR":
		code, text, _ := bytes.Cut(rest, []byte(" "))
		return reply{code: string(code), text: string(text)}, nil
	}
	return reply{}, fmt.Errorf("%w: holder answered %.40q", ErrRefused, p)
}

// packet is what this reply looks like on the wire.
func (r reply) packet() []byte {
	p := "OK"
	if !r.ok {
		p = "ERR " + r.code
	}
	if r.text != "" {
		p += " " + r.text
	}
	return []byte(p[:min(len(p), maxReply)])
}

// err is the failure this reply carries, as an error.
func (r reply) err() error {
	if r.ok {
		return nil
	}
	switch r.code {
	case codeNotFound:
		return fmt.Errorf("%w: %s", ErrNotHeld, r.text)
	case codeVersion:
		return fmt.Errorf("%w: %s", ErrVersion, r.text)
	case codeFailed:
		return fmt.Errorf("%w: %s", ErrStart, r.text)
	}
	return fmt.Errorf("%w: %s: %s", ErrRefused, r.code, r.text)
}

// receive reads one packet and the descriptors that came with it, close-on-exec. A packet that did not fit is an error.
func receive(c *net.UnixConn, buf []byte) (p []byte, fds []int, err error) {
	oob := make([]byte, unix.CmsgSpace(maxRights*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, nil, err
	}
	fds = rightsIn(oob[:oobn])
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		closeAll(fds)
		return nil, nil, fmt.Errorf("%w: packet too long", errRequest)
	}
	return buf[:n], fds, nil
}

// rightsIn takes the descriptors out of control messages; what is not SCM_RIGHTS is passed by.
func rightsIn(oob []byte) (fds []int) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range msgs {
		if got, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, got...)
		}
	}
	return fds
}

// send writes one packet, with a descriptor unless fd is negative.
func send(c *net.UnixConn, p []byte, fd int) error {
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	_, _, err := c.WriteMsgUnix(p, oob, nil)
	return err
}

// closeAll closes descriptors nobody wants; negative ones are none.
func closeAll(fds []int) {
	for _, fd := range fds {
		if fd >= 0 {
			unix.Close(fd) //nolint:errcheck // nothing can be done about it
		}
	}
}

// dup returns a copy of f's descriptor without touching its blocking mode, which os.File.Fd would.
func dup(f *os.File) (int, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd, dupErr := -1, error(nil)
	err = raw.Control(func(p uintptr) { fd, dupErr = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0) })
	return fd, errors.Join(err, dupErr)
}
