package hold

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Conn is a connection to a holder. Its methods may be called concurrently; one request is under way at a time. After a failure of the
// connection every method returns ErrClosed.
type Conn struct {
	conn    *net.UnixConn
	pid     int        // the holder's, as it said
	mu      sync.Mutex // guards one request and its reply
	replies chan answer
	quit    context.CancelFunc
	ended   context.Context // of the connection: ends by quit, or because the holder went away
	wg      sync.WaitGroup
}

// answer is a reply and the descriptor that came with it, or -1.
type answer struct {
	reply reply
	fd    int
}

// Dial connects to the holder of a run directory and greets it. ErrVersion if it speaks no version of ours; other errors mean that nobody holds there.
func Dial(ctx context.Context, cfg Config) (*Conn, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unixpacket", cfg.Socket())
	if err != nil {
		return nil, fmt.Errorf("connect to the holder: %w", err)
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		panic("hold: a unixpacket connection is not a UnixConn")
	}
	c := &Conn{conn: uc, replies: make(chan answer)}
	c.ended, c.quit = context.WithCancel(context.WithoutCancel(ctx))
	if err := trusted(uc); err != nil {
		uc.Close()
		c.quit()
		return nil, err
	}
	c.wg.Go(c.read)
	if err := c.greet(ctx); err != nil {
		c.Close()
		return nil, fmt.Errorf("greet the holder: %w", err)
	}
	return c, nil
}

// greet says HELLO and learns the holder's pid.
func (c *Conn) greet(ctx context.Context) error {
	text, err := c.askText(ctx, fmt.Sprintf("%s %d %d", verbHello, protoMin, protoCurrent), -1)
	if err != nil {
		return err
	}
	var lo, hi int
	if _, err := fmt.Sscanf(text, "%d %d %d", &lo, &hi, &c.pid); err != nil {
		return fmt.Errorf("%w: it said %.40q", ErrRefused, text)
	}
	return nil
}

// Closed is closed when the connection is gone: the holder died, or Close was called.
func (c *Conn) Closed() <-chan struct{} { return c.ended.Done() }

// Close ends the connection. What is held stays held.
func (c *Conn) Close() error {
	c.quit()
	c.conn.Close() //nolint:errcheck // the reader may have closed it already
	c.wg.Wait()
	return nil
}

// read delivers replies until the connection ends. A reply nobody asked for ends it.
func (c *Conn) read() {
	defer c.quit()
	defer c.conn.Close() //nolint:errcheck // Close may have been faster
	buf := make([]byte, maxReply+1)
	for {
		p, fds, err := receive(c.conn, buf)
		if err != nil {
			return
		}
		a := answer{fd: -1}
		if len(fds) > 0 {
			a.fd, fds = fds[0], fds[1:]
			closeAll(fds)
		}
		if a.reply, err = parseReply(p); err != nil {
			closeAll([]int{a.fd})
			return
		}
		select {
		case c.replies <- a:
		case <-c.ended.Done():
			closeAll([]int{a.fd})
			return
		}
	}
}

// ask sends one request and waits for its reply. If ctx ends first the connection is given up, because the reply would be taken for the next one's.
func (c *Conn) ask(ctx context.Context, packet string, fd int) (answer, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	none := answer{fd: -1}
	if err := send(c.conn, []byte(packet), fd); err != nil {
		return none, fmt.Errorf("%w: %w", ErrClosed, err)
	}
	select {
	case a := <-c.replies:
		if err := a.reply.err(); err != nil {
			closeAll([]int{a.fd})
			return none, err
		}
		return a, nil
	case <-c.ended.Done():
		return none, ErrClosed
	case <-ctx.Done():
		c.quit()
		c.conn.Close() //nolint:errcheck // given up
		return none, ctx.Err()
	}
}

// askText asks a question whose answer carries no descriptor.
func (c *Conn) askText(ctx context.Context, packet string, fd int) (string, error) {
	a, err := c.ask(ctx, packet, fd)
	closeAll([]int{a.fd})
	return a.reply.text, err
}

// Put has the holder keep a copy of f's descriptor under name, in place of what was there. The caller keeps f.
func (c *Conn) Put(ctx context.Context, name string, f *os.File) error {
	fd, err := dup(f)
	if err != nil {
		return fmt.Errorf("put %s: %w", name, err)
	}
	defer unix.Close(fd) //nolint:errcheck // our copy
	if _, err := c.askText(ctx, verbPut+" "+name, fd); err != nil {
		return fmt.Errorf("put %s: %w", name, err)
	}
	return nil
}

// Get returns a copy of the descriptor kept under name. ErrNotHeld.
func (c *Conn) Get(ctx context.Context, name string) (*os.File, error) {
	a, err := c.ask(ctx, verbGet+" "+name, -1)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", name, err)
	}
	if a.fd < 0 {
		return nil, fmt.Errorf("get %s: %w: no descriptor came", name, ErrRefused)
	}
	return os.NewFile(uintptr(a.fd), name), nil
}

// Drop has the holder close what it keeps under name; content if there is nothing.
func (c *Conn) Drop(ctx context.Context, name string) error {
	if _, err := c.askText(ctx, verbDrop+" "+name, -1); err != nil {
		return fmt.Errorf("drop %s: %w", name, err)
	}
	return nil
}

// List returns the names kept, sorted.
func (c *Conn) List(ctx context.Context) ([]string, error) {
	var names []string
	packet := verbList
	for {
		text, err := c.askText(ctx, packet, -1)
		if err != nil {
			return nil, fmt.Errorf("list: %w", err)
		}
		if text == "" {
			return names, nil
		}
		names = append(names, strings.Split(text, "\n")...)
		packet = verbList + " " + names[len(names)-1]
	}
}

// Status returns what the holder says of itself.
func (c *Conn) Status(ctx context.Context) (Status, error) {
	var st Status
	text, err := c.askText(ctx, verbStatus, -1)
	if err == nil {
		err = json.Unmarshal([]byte(text), &st)
	}
	if err != nil {
		return st, fmt.Errorf("holder's status: %w", err)
	}
	return st, nil
}

// Start has the holder start the newest installed data process beside the one that runs, to take over from it, and returns its pid. ErrStart if it cannot be
// started; ErrRefused if the holder is older than this request (StartSuccessor does it without one).
func (c *Conn) Start(ctx context.Context) (pid int, err error) {
	text, err := c.askText(ctx, verbStart, -1)
	if err == nil {
		pid, err = strconv.Atoi(text)
	}
	if err != nil {
		return 0, fmt.Errorf("start a successor: %w", err)
	}
	return pid, nil
}

// Stop ends the holder: what it keeps is closed, and the data process, if it dies, stays dead.
// Keepers do not start it again.
func (c *Conn) Stop(ctx context.Context) error {
	if _, err := c.askText(ctx, verbStop, -1); err != nil {
		return fmt.Errorf("stop the holder: %w", err)
	}
	select {
	case <-c.Closed():
		return nil
	case <-ctx.Done():
		return errors.Join(errors.New("stop the holder: it does not go"), ctx.Err())
	}
}
