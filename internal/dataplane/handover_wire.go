package dataplane

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
)

// The hand-over's wire, normative in docs/formats/handover.md.
const (
	maxFrameBytes    = 64 << 20
	frameHeaderBytes = 8

	// stepTimeout bounds each step of the other side: guests wait meanwhile.
	stepTimeout = 20 * time.Second
)

// The kinds of frames.
const (
	kindHello    = "hello"
	kindRefused  = "refused"
	kindBegin    = "begin"
	kindDisk     = "disk"
	kindReady    = "ready"
	kindVolume   = "volume"
	kindConn     = "conn"
	kindTook     = "took"
	kindReturn   = "return"
	kindReturned = "returned"
	kindCommit   = "commit"
	kindMine     = "mine"
	kindEvent    = "event"
)

// The roles of who connects.
const (
	roleTake  = "take"
	roleWatch = "watch"
)

// errFrame: what came is no frame of a hand-over.
var errFrame = errors.New("not a frame of a hand-over")

// frame is one message. Only the fields of its kind are set.
type frame struct {
	Kind    string          `json:"kind"`
	Role    string          `json:"role,omitempty"`
	Version string          `json:"version,omitempty"`
	PID     int             `json:"pid,omitempty"`
	Windows *windows        `json:"windows,omitempty"`
	Text    string          `json:"text,omitempty"`
	Disks   int             `json:"disks,omitempty"`
	Disk    *client.Disk    `json:"disk,omitempty"`
	Entry   *openEntry      `json:"entry,omitempty"`
	Conns   int             `json:"conns,omitempty"`
	Front   string          `json:"frontend,omitempty"`
	State   json.RawMessage `json:"state,omitempty"`
	Epoch   uint64          `json:"epoch,omitempty"`
	Session uint64          `json:"session,omitempty"`
	Event   *HandOverEvent  `json:"event,omitempty"`

	file *os.File // the descriptor beside it, or nil
}

// handoverSocket is where the process that has the run directory waits for a successor.
func handoverSocket(runDir string) string {
	return filepath.Join(runDir, "handover.sock")
}

// peer is the other side of a hand-over. One goroutine reads; writes may come from several.
type peer struct {
	conn    *net.UnixConn
	pid     int
	version string // once it said hello

	mu sync.Mutex // guards writing
}

// newPeer trusts the process at the other end, or closes conn.
func newPeer(conn *net.UnixConn) (*peer, error) {
	pid, err := hold.Peer(conn)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("hand-over: %w", err), conn.Close())
	}
	return &peer{conn: conn, pid: pid}, nil
}

// dialHandover connects to the process that has the run directory.
func dialHandover(ctx context.Context, runDir string) (*peer, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", handoverSocket(runDir))
	if err != nil {
		return nil, fmt.Errorf("hand-over: %w", err)
	}
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		panic("dataplane: a unix connection is not a UnixConn")
	}
	return newPeer(uc)
}

func (c *peer) close() { c.conn.Close() } //nolint:errcheck // it may be closed already

// send writes a frame, within stepTimeout. The frame's file stays the caller's.
func (c *peer) send(f frame) error {
	body, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("hand-over: send %s: %w", f.Kind, err)
	}
	if len(body) > maxFrameBytes {
		return fmt.Errorf("hand-over: send %s: %w: %d bytes", f.Kind, errFrame, len(body))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.conn.SetWriteDeadline(time.Now().Add(stepTimeout)); err != nil {
		return fmt.Errorf("hand-over: send %s: %w", f.Kind, err)
	}
	head := binary.BigEndian.AppendUint32(nil, uint32(len(body)))
	if f.file == nil {
		_, err = c.conn.Write(append(binary.BigEndian.AppendUint32(head, 0), body...))
	} else {
		err = c.sendWith(f.file, binary.BigEndian.AppendUint32(head, 1))
		if err == nil {
			_, err = c.conn.Write(body)
		}
	}
	if err != nil {
		return fmt.Errorf("hand-over: send %s: %w", f.Kind, err)
	}
	return nil
}

// sendWith writes a frame's head with a descriptor beside it. The file's blocking mode is left alone, which os.File.Fd would not.
func (c *peer) sendWith(f *os.File, head []byte) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	n, sendErr := 0, error(nil)
	err = raw.Control(func(fd uintptr) { n, _, sendErr = c.conn.WriteMsgUnix(head, unix.UnixRights(int(fd)), nil) })
	if err = errors.Join(err, sendErr); err != nil {
		return err
	}
	_, err = c.conn.Write(head[n:])
	return err
}

// receive reads one frame, within d; zero waits for ever. The caller owns its file. io.EOF: the other side has closed the connection, or died.
func (c *peer) receive(d time.Duration) (frame, error) {
	deadline := time.Time{}
	if d > 0 {
		deadline = time.Now().Add(d)
	}
	if err := c.conn.SetReadDeadline(deadline); err != nil {
		return frame{}, fmt.Errorf("hand-over: receive: %w", err)
	}
	f, err := readFrame(c.conn)
	if err != nil {
		return frame{}, fmt.Errorf("hand-over: receive: %w", err)
	}
	return f, nil
}

// expect reads a frame of one of the kinds. A refusal that is none of them is an error with what the other side said.
func (c *peer) expect(kinds ...string) (frame, error) {
	f, err := c.receive(stepTimeout)
	if err != nil {
		return f, err
	}
	for _, k := range kinds {
		if f.Kind == k {
			return f, nil
		}
	}
	f.drop()
	if f.Kind == kindRefused {
		return f, fmt.Errorf("%w: %s", ErrRefused, f.Text)
	}
	return f, fmt.Errorf("hand-over: %w: %.20q, wanted %q", errFrame, f.Kind, kinds)
}

// drop closes the descriptor of a frame that nobody wants.
func (f frame) drop() {
	if f.file != nil {
		f.file.Close() //nolint:errcheck // nobody wants it
	}
}

// rightsConn is what frames are read from: a UnixConn, or bytes in a test.
type rightsConn interface {
	io.Reader
	ReadMsgUnix(b, oob []byte) (n, oobn, flags int, addr *net.UnixAddr, err error)
}

// readFrame reads a frame. Whatever the bytes, it does not panic, keeps no descriptor it does not return, and takes no more memory than came.
func readFrame(conn rightsConn) (f frame, err error) {
	var head [frameHeaderBytes]byte
	file, err := readHead(conn, head[:])
	if err != nil {
		return f, err
	}
	defer func() {
		if err != nil && file != nil {
			file.Close() //nolint:errcheck // nobody wants it
		}
	}()
	size, with := binary.BigEndian.Uint32(head[:]), binary.BigEndian.Uint32(head[4:])
	if size > maxFrameBytes || with > 1 || (file != nil) != (with == 1) {
		return f, fmt.Errorf("%w: %d bytes, %d descriptors, one came: %v", errFrame, size, with, file != nil)
	}
	body, err := io.ReadAll(io.LimitReader(conn, int64(size)))
	if err == nil && len(body) < int(size) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return f, err
	}
	if err = json.Unmarshal(body, &f); err != nil {
		return frame{}, fmt.Errorf("%w: %w", errFrame, err)
	}
	if f.Kind == "" {
		return frame{}, fmt.Errorf("%w: no kind", errFrame)
	}
	f.file = file
	return f, nil
}

// readHead reads a frame's head and the descriptor that came with it; more than one are closed.
func readHead(conn rightsConn, head []byte) (file *os.File, err error) {
	oob := make([]byte, unix.CmsgSpace(4*8))
	var fds []int
	for n := 0; n < len(head) && err == nil; {
		var m, oobn, flags int
		m, oobn, flags, _, err = conn.ReadMsgUnix(head[n:], oob)
		msgs, parseErr := unix.ParseSocketControlMessage(oob[:oobn])
		for _, msg := range msgs {
			if got, e := unix.ParseUnixRights(&msg); e == nil {
				fds = append(fds, got...)
			}
		}
		switch n += m; {
		case err != nil:
		case parseErr != nil || flags&unix.MSG_CTRUNC != 0:
			err = fmt.Errorf("%w: descriptors were cut off", errFrame)
		case m == 0 && n > 0:
			err = io.ErrUnexpectedEOF
		case m == 0:
			err = io.EOF
		}
	}
	if err == nil && len(fds) > 1 {
		err = fmt.Errorf("%w: %d descriptors", errFrame, len(fds))
	}
	for _, fd := range fds {
		if err != nil {
			unix.Close(fd) //nolint:errcheck // nobody wants it
			continue
		}
		file = os.NewFile(uintptr(fd), "handed over")
	}
	return file, err
}
