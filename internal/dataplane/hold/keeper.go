package hold

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Keeper is a client that keeps the holder alive: when the holder's socket closes, and nobody asked it to stop, it starts another and hands every
// descriptor in again. The data process has one, and so has serve, which holds nothing but notices too. All methods may be called concurrently; they wait for a holder for as long as their
// ctx allows.
type Keeper struct {
	cfg    Config
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu   sync.Mutex // guards the rest
	fds  map[string]int
	conn *Conn         // nil while there is none
	up   chan struct{} // closed when conn is set; replaced when it is lost
	done bool
}

// Keep connects to the holder, starting it if there is none, and keeps it until Close.
func Keep(ctx context.Context, cfg Config) (*Keeper, error) {
	cfg, err := cfg.check()
	if err != nil {
		return nil, err
	}
	conn, err := Ensure(ctx, cfg)
	if err != nil {
		return nil, err
	}
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	k := &Keeper{cfg: cfg, cancel: cancel, fds: map[string]int{}, conn: conn, up: make(chan struct{})}
	close(k.up)
	k.wg.Go(func() { k.watch(life, conn) })
	return k, nil
}

// watch waits for the connection's end and gets another, until life ends.
func (k *Keeper) watch(life context.Context, conn *Conn) {
	for {
		select {
		case <-life.Done():
			conn.Close()
			return
		case <-conn.Closed():
		}
		conn.Close()
		if k.lost() {
			return
		}
		k.cfg.Log.Warn("the holder is gone; starting it again")
		for conn = nil; conn == nil; {
			next, err := k.reconnect(life)
			switch {
			case err == nil:
				conn = next
			case life.Err() != nil:
				return
			default:
				k.cfg.Log.Error("the holder could not be started again", "error", err)
				if !wait(life, retryDelay) {
					return
				}
			}
		}
	}
}

// lost notes that there is no connection, and tells whether that is for good because the holder was asked to stop.
func (k *Keeper) lost() bool {
	_, err := os.Stat(k.cfg.stopped())
	k.mu.Lock()
	defer k.mu.Unlock()
	if err == nil {
		k.done = true
		return true
	}
	k.conn, k.up = nil, make(chan struct{})
	return false
}

// reconnect gets a holder and gives it everything.
func (k *Keeper) reconnect(ctx context.Context) (*Conn, error) {
	conn, err := Ensure(ctx, k.cfg)
	if err != nil {
		return nil, err
	}
	// Under the lock: a Put or Drop meanwhile would be overtaken.
	k.mu.Lock()
	defer k.mu.Unlock()
	for name, fd := range k.fds {
		if _, err := conn.askText(ctx, verbPut+" "+name, fd); err != nil {
			return nil, errors.Join(fmt.Errorf("hand %s in again: %w", name, err), conn.Close())
		}
	}
	k.cfg.Log.Info("the holder is back", "descriptors", len(k.fds))
	k.conn = conn
	close(k.up)
	return conn, nil
}

// with calls fn with a live connection, again if that one is lost meanwhile.
func (k *Keeper) with(ctx context.Context, fn func(*Conn) error) error {
	for {
		k.mu.Lock()
		conn, up, done := k.conn, k.up, k.done
		k.mu.Unlock()
		if done {
			return ErrClosed
		}
		if conn == nil {
			select {
			case <-up:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		err := fn(conn)
		if !errors.Is(err, ErrClosed) {
			return err
		}
		// The watcher sees the same; wait until it has.
		select {
		case <-conn.Closed():
		case <-ctx.Done():
			return ctx.Err()
		}
		if !wait(ctx, dialDelay) {
			return ctx.Err()
		}
	}
}

// Put has the holder keep a copy of f's descriptor under name, now and whenever the holder is started again. The caller keeps f.
func (k *Keeper) Put(ctx context.Context, name string, f *os.File) error {
	fd, err := dup(f)
	if err != nil {
		return fmt.Errorf("put %s: %w", name, err)
	}
	k.mu.Lock()
	if k.done {
		k.mu.Unlock()
		unix.Close(fd) //nolint:errcheck // our copy
		return ErrClosed
	}
	if old, ok := k.fds[name]; ok {
		unix.Close(old) //nolint:errcheck // our copy
	}
	k.fds[name] = fd
	k.mu.Unlock()
	return k.with(ctx, func(c *Conn) error { return c.Put(ctx, name, f) })
}

// Get returns a copy of the descriptor the holder has under name, which it goes on keeping, now and whenever it is started again. ErrNotHeld.
func (k *Keeper) Get(ctx context.Context, name string) (*os.File, error) {
	var f *os.File
	err := k.with(ctx, func(c *Conn) (err error) {
		f, err = c.Get(ctx, name)
		return err
	})
	if err != nil {
		return nil, err
	}
	fd, err := dup(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("get %s: %w", name, err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if old, ok := k.fds[name]; ok {
		unix.Close(old) //nolint:errcheck // our copy
	}
	k.fds[name] = fd
	return f, nil
}

// Drop has the holder close what it keeps under name; content if there is nothing.
func (k *Keeper) Drop(ctx context.Context, name string) error {
	k.mu.Lock()
	if fd, ok := k.fds[name]; ok {
		delete(k.fds, name)
		unix.Close(fd) //nolint:errcheck // our copy
	}
	k.mu.Unlock()
	return k.with(ctx, func(c *Conn) error { return c.Drop(ctx, name) })
}

// List returns the names the holder keeps, whoever handed them in.
func (k *Keeper) List(ctx context.Context) (names []string, err error) {
	err = k.with(ctx, func(c *Conn) (err error) {
		names, err = c.List(ctx)
		return err
	})
	return names, err
}

// Status returns what the holder says of itself.
func (k *Keeper) Status(ctx context.Context) (st Status, err error) {
	err = k.with(ctx, func(c *Conn) (err error) {
		st, err = c.Status(ctx)
		return err
	})
	return st, err
}

// Stop ends the holder. Neither this nor any other Keeper starts it again; every one of their methods returns ErrClosed from then on.
func (k *Keeper) Stop(ctx context.Context) error {
	return k.with(ctx, func(c *Conn) error { return c.Stop(ctx) })
}

// Close stops watching. The holder lives on with all it keeps.
func (k *Keeper) Close() error {
	k.cancel()
	k.wg.Wait()
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, fd := range k.fds {
		unix.Close(fd) //nolint:errcheck // our copy
	}
	k.fds, k.done = nil, true
	return nil
}
