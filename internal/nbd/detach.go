package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrState: the state of a detached connection cannot be used: it is of another version, damaged, too large, or promises its client what
// is not so any more. The connection has to be closed, and the client connects again.
var ErrState = errors.New("unusable state of a connection")

// Detached is a connection that a Server has given away in the middle of its life, between two requests: every request that had arrived
// whole is carried out and answered, and none of the next is begun. Adopt, here or in another process, serves it on.
type Detached struct {
	// File is the client's socket. Closing it without an Adopt ends the client's connection.
	File *os.File
	// State is docs/nbd.md's "state of a connection": JSON, below 64 KiB, or below 45 MiB when a large write has arrived in part.
	State []byte
}

const (
	stateVersion  = 1
	maxStateBytes = 48 << 20
	// nudgeFirst is how long Detach waits before it interrupts reads again, nudgeMost how long at most.
	nudgeFirst = time.Millisecond
	nudgeMost  = 32 * time.Millisecond
)

// stateFile is a state on its way to another process: docs/nbd.md, "state of a connection".
type stateFile struct {
	Version    int            `json:"version"`
	Export     string         `json:"export"`
	Remote     string         `json:"remote,omitempty"`
	SizeBytes  int64          `json:"sizeBytes"`
	Flags      uint16         `json:"flags"`
	Structured bool           `json:"structured"`
	Contexts   []stateContext `json:"contexts,omitempty"`
	Received   []byte         `json:"received,omitempty"`
	Refused    *stateRefusal  `json:"refused,omitempty"`
}

type stateContext struct {
	ID   uint32 `json:"id"`
	Name string `json:"name"`
}

type stateRefusal struct {
	Cookie    uint64 `json:"cookie"`
	Errno     Errno  `json:"errno"`
	SkipBytes int    `json:"skipBytes"`
}

// Detach gives away the connections of the export with this canonical name. Each is read no further, what arrived whole is carried out and
// answered, and then the server forgets it without a word to its client. Connections that cannot be given away end in good order, and their
// clients connect again: those over TLS or a net.Conn that is no socket of the kernel, once what they sent is answered; those that are still
// negotiating, whatever they would have chosen, at once. Until Resume nobody can choose the export.
//
// The Device is not touched and must take calls until Detach returns: a Gate that is held keeps Detach waiting. When ctx ends first, connections that are not ready (a client that
// takes no replies, a Device that is stuck) are cut, and an error says how many; the others are returned with it.
func (s *Server) Detach(ctx context.Context, export string) ([]Detached, error) {
	waiting := s.startDetach(export)
	var out []Detached
	take := func(ss *session) {
		if d := ss.takeGiven(); d != nil {
			out = append(out, *d)
		}
	}
	wait := nudgeFirst
	timer := time.NewTimer(0)
	defer timer.Stop()
	for len(waiting) > 0 {
		select {
		case <-waiting[0].ended:
			take(waiting[0])
			waiting = waiting[1:]
		case <-timer.C:
			if err := nudge(); err != nil { // without it they are ready when they fall idle
				s.cfg.Report(err)
			}
			timer.Reset(wait)
			wait = min(2*wait, nudgeMost)
		case <-ctx.Done():
			cut := 0
			for _, ss := range waiting {
				if ss.cutUnlessGiven() {
					cut++
				}
				take(ss)
			}
			if cut > 0 {
				return out, fmt.Errorf("nbd: detach %q: %d connections were cut: %w", export, cut, context.Cause(ctx))
			}
			return out, nil
		}
	}
	return out, nil
}

// Resume lets clients choose the export again after a Detach: for a hand-over that failed. Connections come back by Adopt.
func (s *Server) Resume(export string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.away, export)
}

// startDetach makes the export unavailable and returns the sessions that now end.
func (s *Server) startDetach(export string) []*session {
	s.mu.Lock()
	s.away[export] = true
	s.mu.Unlock()
	// A session that comes now asks Lookup, and is refused. One that asked before is in the snapshot.
	var out []*session
	for _, ss := range s.snapshot() {
		if ss.startDetach(export) {
			out = append(out, ss)
		}
	}
	return out
}

// startDetach tells the session to end if it is one of export's, or may become one.
func (ss *session) startDetach(export string) bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	switch {
	case !ss.chosen:
		ss.interruptLocked()
	case ss.info.Export != export:
		return false
	case !ss.entered:
		ss.leaving = true
	default:
		ss.leave()
	}
	return true
}

// leave makes a connection in transmission end so that it can be given away, or in good order. It is called with mu held.
func (ss *session) leave() {
	if l, ok := ss.link.(*socket); ok {
		l.wake()
		return
	}
	ss.drained = true
	ss.link.closeRead()
}

// give makes the session's connection a Detached. It does nothing when the server has ended the connection meanwhile.
func (ss *session) give(t transmission, left rest) error {
	data, err := encodeState(t.state, left, ss.info.Remote)
	if err != nil {
		return err
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if l, ok := t.link.(*socket); ok && !ss.cut && !ss.drained {
		ss.given = &Detached{File: os.NewFile(uintptr(l.release()), "nbd client"), State: data}
	}
	return nil
}

func (ss *session) takeGiven() *Detached {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	d := ss.given
	ss.given = nil
	return d
}

// cutUnlessGiven ends the connection, unless it was given away already.
func (ss *session) cutUnlessGiven() bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.given != nil {
		return false
	}
	ss.interruptLocked()
	return true
}

func encodeState(st state, left rest, remote string) ([]byte, error) {
	f := stateFile{
		Version: stateVersion, Export: st.Export, Remote: remote, SizeBytes: st.SizeBytes, Flags: st.Flags, Structured: st.Structured,
		Received: left.received,
	}
	for _, id := range st.Contexts {
		if m, ok := metaByID(id); ok {
			f.Contexts = append(f.Contexts, stateContext{ID: id, Name: m.name})
		}
	}
	if r := left.refused; r != nil {
		f.Refused = &stateRefusal{Cookie: r.req.cookie, Errno: r.errno, SkipBytes: r.skip}
	}
	data, err := json.Marshal(f)
	if err != nil {
		return nil, fmt.Errorf("nbd: state of a connection to %q: %w", st.Export, err)
	}
	return data, nil
}

// decodeState takes a state apart. Every error is an ErrState.
func decodeState(data []byte) (stateFile, error) {
	bad := func(format string, args ...any) (stateFile, error) {
		return stateFile{}, fmt.Errorf("nbd: %w: %w", ErrState, fmt.Errorf(format, args...))
	}
	if len(data) > maxStateBytes {
		return bad("%d bytes, at most %d can be", len(data), maxStateBytes)
	}
	var version struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &version); err != nil {
		return bad("%w", err)
	}
	if version.Version != stateVersion {
		return bad("version %d, this build reads %d", version.Version, stateVersion)
	}
	var f stateFile
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return bad("%w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return bad("something follows it")
	}
	switch r := f.Refused; {
	case len(f.Export) > maxNameBytes || len(f.Remote) > maxNameBytes:
		return bad("a name of more than %d bytes", maxNameBytes)
	case len(f.Received) > requestBytes+maxPayloadBytes:
		return bad("%d bytes of a request", len(f.Received))
	case r != nil && (r.Errno == OK || r.SkipBytes <= 0 || r.SkipBytes > maxDrainBytes || len(f.Received) > 0):
		return bad("a refused write of %d bytes with error %d", r.SkipBytes, r.Errno)
	case f.Structured != (f.Flags&flagDF != 0), len(f.Contexts) > 0 && !f.Structured:
		return bad("structured %t with flags %#x and %d contexts", f.Structured, f.Flags, len(f.Contexts))
	}
	for i, c := range f.Contexts {
		if m, ok := metaByID(c.ID); !ok || m.name != c.Name || i > 0 && f.Contexts[i-1].ID >= c.ID {
			return bad("context %d %q", c.ID, c.Name)
		}
	}
	return f, nil
}

// Adopt serves a connection on that Detach gave away, here or in another process of ours, as if nothing had happened to it. On success the file is taken
// over and closed; after an error it is the caller's as before, unchanged, and may be adopted elsewhere, also by the server it came from.
//
// Errors: ErrState, also when the export is smaller than the client was told or lacks what it was promised; what Exports.Lookup says
// (ErrNoExport); ErrServerClosed; ErrTooMany.
func (s *Server) Adopt(file *os.File, data []byte) error {
	serve, err := s.adopt(file, data)
	if err != nil {
		return err
	}
	s.wg.Go(func() {
		if err := serve(); err != nil && !errors.Is(err, ErrServerClosed) {
			s.cfg.Report(err)
		}
	})
	return nil
}

// ServeAdopted is Adopt that returns when the connection has ended and no call of it to the Device is running, with what ServeConn would return; ErrServerClosed also when it
// was given away again. The file stays the caller's to close if one of Adopt's errors is returned, and is closed otherwise.
func (s *Server) ServeAdopted(file *os.File, data []byte) error {
	serve, err := s.adopt(file, data)
	if err != nil {
		return err
	}
	return serve()
}

// FreshState is the state, for Adopt, of a connection that has begun with the transmission phase: whoever made its client told it the size and the flags that are
// returned, and simple replies. Linux's nbd driver is such a client.
func FreshState(e Export) (data []byte, flags uint16, err error) {
	flags = e.transmissionFlags(false)
	data, err = encodeState(state{Export: e.Name, SizeBytes: e.Device.Size(), Flags: flags}, rest{}, "")
	return data, flags, err
}

// adopt takes the connection over and returns what serves it, which must be called.
func (s *Server) adopt(file *os.File, data []byte) (serve func() error, err error) {
	f, err := decodeState(data)
	if err != nil {
		return nil, err
	}
	e, err := s.cfg.Exports.Lookup(f.Export)
	if err != nil {
		return nil, fmt.Errorf("nbd: adopt a connection to %q: %w", f.Export, err)
	}
	missing := f.Flags &^ e.transmissionFlags(f.Structured)
	if e.Name != f.Export || e.Device.Size() < f.SizeBytes || missing != 0 {
		return nil, fmt.Errorf("nbd: adopt a connection to %q: was promised %d bytes and flags %#x; there are %d bytes, and %#x is missing: %w",
			f.Export, f.SizeBytes, f.Flags, e.Device.Size(), missing, ErrState)
	}
	l, err := adoptSocket(file, s.idle)
	if err != nil {
		return nil, err
	}
	ss, err := s.addSession(l, f.Remote)
	if err != nil {
		l.close()
		return nil, fmt.Errorf("nbd: adopt a connection to %q: %w", f.Export, err)
	}
	_ = file.Close() // the duplicate has the connection
	t := transmission{export: e, state: f.state(), link: l, rest: f.rest()}
	ss.enter(l, t.state)
	return func() error {
		defer s.removeSession(ss)
		return s.reason(ss, ss.transmit(s, t))
	}, nil
}

func (f stateFile) state() state {
	st := state{Export: f.Export, Structured: f.Structured, SizeBytes: f.SizeBytes, Flags: f.Flags}
	for _, c := range f.Contexts {
		st.Contexts = append(st.Contexts, c.ID)
	}
	return st
}

func (f stateFile) rest() rest {
	left := rest{received: f.Received}
	if r := f.Refused; r != nil {
		left.refused = &refusal{req: request{cmd: cmdWrite, cookie: r.Cookie}, errno: r.Errno, skip: r.SkipBytes}
	}
	return left
}

// adoptSocket makes a link of a duplicate of file, which must be a stream socket.
func adoptSocket(file *os.File, idle time.Duration) (*socket, error) {
	fd, err := dupConn(file)
	if err != nil {
		return nil, fmt.Errorf("nbd: adopt: %w", err)
	}
	s := &socket{fd: fd}
	if typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || typ != unix.SOCK_STREAM {
		s.close()
		return nil, fmt.Errorf("nbd: adopt: what was passed is no stream socket: %w", errors.Join(ErrState, err))
	}
	if err := s.block(idle); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// present is a server's exports without those that were detached.
type present struct{ s *Server }

func (p present) Lookup(name string) (Export, error) {
	e, err := p.s.cfg.Exports.Lookup(name)
	if err != nil {
		return e, err
	}
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	if p.s.away[e.Name] {
		return Export{}, ErrServerClosed
	}
	return e, nil
}

func (p present) List() []Export { return p.s.cfg.Exports.List() }
