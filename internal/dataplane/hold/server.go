package hold

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxHeld bounds the descriptors kept, maxConns the clients connected at once.
	maxHeld  = 16384
	maxConns = 64
	// sendTimeout bounds how long a client may leave a reply unread.
	sendTimeout = 10 * time.Second
)

// Status is what a holder says of itself.
type Status struct {
	PID     int        `json:"pid"`
	Started time.Time  `json:"started"`
	Held    int        `json:"held"` // descriptors
	Data    DataStatus `json:"data"`
}

// Run is the holder: it keeps descriptors and the data process until a client says STOP or ctx ends, and then returns nil. It leaves the data
// process running. ErrRunning if another holder has this run directory.
func Run(ctx context.Context, cfg Config) error {
	named := cfg.Log != nil
	cfg, err := cfg.check()
	if err != nil {
		return err
	}
	if !named {
		log, end, err := Logger(cfg.HoldLog())
		if err != nil {
			return fmt.Errorf("holder: %w", err)
		}
		defer end()
		cfg.Log = log
	}
	lock, err := lockFile(cfg.holdLock(), fmt.Sprintf("holder, pid %d", os.Getpid()))
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := os.Remove(cfg.stopped()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("holder: %w", err)
	}
	raiseFiles()
	ln, err := listen(cfg.Socket())
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	h := &holder{cfg: cfg, stop: stop, started: time.Now(), held: map[string]int{}, super: &supervisor{cfg: cfg}}
	var wg sync.WaitGroup
	wg.Go(func() { h.super.run(ctx) })
	wg.Go(func() { h.accept(ctx, ln) })
	cfg.Log.Info("holder ready", "pid", os.Getpid())
	<-ctx.Done()
	// The socket's name goes first: who finds none knows that nobody holds, and may start another holder, which waits for the lock.
	err = errors.Join(os.Remove(cfg.Socket()), ln.Close())
	wg.Wait()
	for _, fd := range h.held {
		unix.Close(fd) //nolint:errcheck // the process ends
	}
	return err
}

// listen replaces whatever socket a dead holder left; the lock says it is dead.
func listen(path string) (*net.UnixListener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("holder: listen: %w", err)
	}
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("holder: listen: %w", err)
	}
	ln.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("holder: listen: %w", err), ln.Close())
	}
	return ln, nil
}

// raiseFiles allows as many descriptors as are held at most; without the privilege the limit stays as it is, and PUT fails there.
func raiseFiles() {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil && l.Max < 2*maxHeld {
		unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 2 * maxHeld, Max: 2 * maxHeld}) //nolint:errcheck // see above
	}
}

// holder is the state of one Run.
type holder struct {
	cfg     Config
	stop    context.CancelFunc
	started time.Time
	super   *supervisor

	mu   sync.Mutex     // guards held
	held map[string]int // raw descriptors, so that the runtime's poller never touches them
}

// accept serves every client until ctx ends, and waits for them.
func (h *holder) accept(ctx context.Context, ln *net.UnixListener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, maxConns)
	for {
		conn, err := ln.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			h.cfg.Log.Error("accept failed", "error", err)
			if !wait(ctx, firstDelay) { // out of descriptors, perhaps: do not spin
				return
			}
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			h.serve(ctx, conn)
		})
	}
}

// serve answers one client's requests in order.
func (h *holder) serve(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Now()) })() //nolint:errcheck // a closed connection needs none
	if err := trusted(conn); err != nil {
		h.cfg.Log.Warn("client refused", "error", err)
		return
	}
	buf := make([]byte, maxRequest+1)
	for greeted := false; ; {
		p, fds, err := receive(conn, buf)
		var r request
		switch {
		case err == nil:
			r, err = parseRequest(p)
		case !errors.Is(err, errRequest):
			return
		}
		rep, fd := reply{code: codeInvalid}, -1
		if err != nil {
			rep.text = err.Error()
		} else if rep = greet(r, greeted); rep.ok {
			greeted = true
			rep, fd = h.do(r, fds)
		}
		closeAll(fds)
		conn.SetWriteDeadline(time.Now().Add(sendTimeout)) //nolint:errcheck // the send below fails then
		err = send(conn, rep.packet(), fd)
		if fd >= 0 {
			unix.Close(fd) //nolint:errcheck // our copy; the other side has its own
		}
		if r.verb == verbStop && rep.ok {
			h.cfg.Log.Info("asked to stop")
			h.stop()
		}
		if err != nil {
			return
		}
	}
}

// greet refuses clients of another age, and those that do not greet first.
func greet(r request, greeted bool) reply {
	ours := fmt.Sprintf("the holder speaks versions %d-%d", protoMin, protoCurrent)
	switch {
	case r.verb != verbHello && !greeted:
		return reply{code: codeVersion, text: "HELLO comes first; " + ours}
	case r.verb == verbHello && (r.max < protoMin || r.min > protoCurrent):
		return reply{code: codeVersion, text: fmt.Sprintf("%s, the client %d-%d", ours, r.min, r.max)}
	}
	return reply{ok: true}
}

// do carries out one request. It takes fds[0] out of fds (leaving -1) if it keeps it. The descriptor it returns, unless negative, goes with the
// reply and is the caller's to close.
func (h *holder) do(r request, fds []int) (reply, int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	fd := -1
	switch r.verb {
	case verbHello:
		return reply{ok: true, text: fmt.Sprintf("%d %d %d", protoMin, protoCurrent, os.Getpid())}, -1
	case verbPut:
		return h.put(r.name, fds), -1
	case verbGet:
		held, ok := h.held[r.name]
		if !ok {
			return reply{code: codeNotFound, text: r.name}, -1
		}
		var err error
		// A copy: the reply is written without the lock, and the name may be dropped meanwhile.
		if fd, err = unix.FcntlInt(uintptr(held), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return reply{code: codeFull, text: err.Error()}, -1
		}
	case verbDrop:
		if old, ok := h.held[r.name]; ok {
			delete(h.held, r.name)
			unix.Close(old) //nolint:errcheck // nobody else knows it
		}
	case verbList:
		return reply{ok: true, text: h.list(r.name)}, -1
	case verbStart:
		pid, err := h.super.startSuccessor()
		if err != nil {
			return reply{code: codeFailed, text: err.Error()}, -1
		}
		return reply{ok: true, text: strconv.Itoa(pid)}, -1
	case verbStop:
		if err := os.WriteFile(h.cfg.stopped(), nil, 0o600); err != nil {
			return reply{code: codeInvalid, text: err.Error()}, -1
		}
	case verbStatus:
		text, err := json.Marshal(Status{PID: os.Getpid(), Started: h.started, Held: len(h.held), Data: h.super.status()})
		if err != nil {
			return reply{code: codeInvalid, text: err.Error()}, -1
		}
		return reply{ok: true, text: string(text)}, -1
	}
	return reply{ok: true}, fd
}

// put keeps fds[0] under name, in place of what was there. Callers hold mu.
func (h *holder) put(name string, fds []int) reply {
	if len(fds) != 1 {
		return reply{code: codeInvalid, text: fmt.Sprintf("PUT takes one descriptor, has %d", len(fds))}
	}
	old, replaces := h.held[name]
	if !replaces && len(h.held) >= maxHeld {
		return reply{code: codeFull, text: fmt.Sprintf("%d descriptors are held, which is all there may be", maxHeld)}
	}
	h.held[name] = fds[0]
	fds[0] = -1
	if replaces {
		unix.Close(old) //nolint:errcheck // nobody else knows it
	}
	return reply{ok: true}
}

// list returns names after the given one, sorted, one a line, as many as fit. Callers hold mu.
func (h *holder) list(after string) string {
	names := make([]string, 0, len(h.held))
	for n := range h.held {
		if n > after {
			names = append(names, n)
		}
	}
	sort.Strings(names)
	size := len("OK ")
	for i, n := range names {
		if size += len(n) + 1; size > maxReply {
			names = names[:i]
			break
		}
	}
	return strings.Join(names, "\n")
}

// trusted tells whether the client is this user or root.
func trusted(conn *net.UnixConn) error {
	_, err := Peer(conn)
	return err
}

// Peer returns the process at the other end of a unix socket, as it was when it connected or listened (SO_PEERCRED, unix(7)). ErrRefused unless it is of this user or
// root.
func Peer(conn *net.UnixConn) (pid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	if int(cred.Uid) != os.Geteuid() && cred.Uid != 0 {
		return 0, fmt.Errorf("%w: client's user %d is neither %d nor root", ErrRefused, cred.Uid, os.Geteuid())
	}
	return int(cred.Pid), nil
}
