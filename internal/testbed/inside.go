package testbed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"ashlar/internal/api/client"
	"ashlar/internal/dataplane"
	"ashlar/internal/dataplane/hold"
	"ashlar/internal/node"
)

// Inside is several whole nodes in this process, that are one Ashlar: each with its holder, data process, catalogue, control loop, agent, REST and cluster ports, on loopback. What the processes of
// `ashlar serve`, `ashlar data` and `ashlar hold` do, goroutines do here, with the same sockets and files between them; so the race detector sees all of it, no root is needed, and a node can
// have a clock of its own. Nodes are called node1, node2, … and counted from 0. The verbs are not to be called concurrently.
//
// A goroutine can neither be killed nor paused, and loopback not be cut: Cluster does that. Imports and exports need a work process, of which this process has no program. Etcd, and TLS on its
// ports, follow the machine's clock.
type Inside struct {
	Nodes []*Inner
	cfg   InsideConfig
}

// InsideConfig says what to start.
type InsideConfig struct {
	Dir   string // short: sockets lie in it; node N has Dir/N
	Nodes int
	Log   *slog.Logger // nil: dropped
}

// StartInside starts nodes, makes the first one a cluster, and has the others join it. After an error nothing runs.
func StartInside(ctx context.Context, cfg InsideConfig) (_ *Inside, err error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Inside{cfg: cfg}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Stop(context.WithoutCancel(ctx)))
		}
	}()
	for i := range cfg.Nodes {
		n, err := c.Add(ctx)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			_, err = n.Client.InitCluster(ctx, n.Host)
		} else {
			err = c.Join(ctx, i, 0)
		}
		if err == nil {
			err = n.member(ctx)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", n.Name, err)
		}
	}
	return c, nil
}

// Add starts one more node, which is in no cluster yet.
func (c *Inside) Add(ctx context.Context) (*Inner, error) {
	ports, err := FreePorts(nodePorts)
	if err != nil {
		return nil, err
	}
	number := strconv.Itoa(len(c.Nodes) + 1)
	dir := filepath.Join(c.cfg.Dir, number)
	n := &Inner{Name: "node" + number, Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(ports)), DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run")}
	n.log = c.cfg.Log.With("on", n.Name)
	n.cfg = node.Config{
		DataDir: n.DataDir, RunDir: n.RunDir, Name: n.Name, Version: insideVersion, Binary: n.nothing(), StartHolder: n.startBelow,
		Log: n.log, Now: n.Now,
	}
	if n.Client, err = client.New("unix://" + client.Socket(n.RunDir)); err != nil {
		return nil, err
	}
	c.Nodes = append(c.Nodes, n)
	return n, n.Start(ctx)
}

// Join has a node join the cluster that another is in; it returns as soon as that is decided, and the node is built anew.
func (c *Inside) Join(ctx context.Context, i, through int) error {
	token, err := c.Nodes[through].Client.CreateJoinToken(ctx, 0)
	if err != nil {
		return err
	}
	_, err = c.Nodes[i].Client.JoinCluster(ctx, client.NewMember{To: c.Nodes[through].Host, Token: token.Token, Address: c.Nodes[i].Host})
	return err
}

// Jump moves a node's wall clock forward, or back. Durations and leases go by another clock, which does not jump (clock_gettime(2), CLOCK_MONOTONIC).
func (c *Inside) Jump(i int, d time.Duration) { c.Nodes[i].ahead.Add(int64(d)) }

// Stop stops all nodes, the last one first. Called again it does nothing.
func (c *Inside) Stop(ctx context.Context) error {
	var errs []error
	for i := len(c.Nodes) - 1; i >= 0; i-- {
		errs = append(errs, c.Nodes[i].Stop(ctx), c.Nodes[i].Client.Close())
	}
	c.Nodes = nil
	return errors.Join(errs...)
}

// Inner is one node of Inside.
type Inner struct {
	Name            string
	Host            string // in the cluster, HOST:PORT
	DataDir, RunDir string
	Client          *client.Client // of its REST

	cfg   node.Config
	log   *slog.Logger
	ahead atomic.Int64   // by how much its clock is
	wg    sync.WaitGroup // of all tasks

	mu           sync.Mutex // guards the rest
	holder, data *task      // nil: never started
	serve        *task      // nil: does not run
}

// insideVersion is what nodes of Inside call their build.
const insideVersion = "inside"

// nothing is the program that must not be started: what it would be runs here already, or is a failure.
func (n *Inner) nothing() string { return filepath.Join(n.RunDir, "no-program") }

// Now is what its clock says.
func (n *Inner) Now() time.Time { return time.Now().Add(time.Duration(n.ahead.Load())) }

// task is what would be a process.
type task struct {
	cancel context.CancelFunc
	done   chan struct{} // closed when it has ended; err is set then
	err    error
}

func (n *Inner) run(what string, fn func(context.Context) error) *task {
	ctx, cancel := context.WithCancel(context.Background())
	t := &task{cancel: cancel, done: make(chan struct{})}
	n.wg.Go(func() {
		defer close(t.done)
		defer cancel()
		if err := fn(ctx); err != nil {
			t.err = fmt.Errorf("%s: %s: %w", n.Name, what, err)
		}
	})
	return t
}

// end waits until it has ended by itself; at the end of ctx it is told to.
func (t *task) end(ctx context.Context) error {
	if t == nil {
		return nil
	}
	select {
	case <-t.done:
	case <-ctx.Done():
		t.cancel()
		<-t.done
	}
	return t.err
}

// startBelow starts the holder, and with it the data process, as `ashlar hold --detach` does.
func (n *Inner) startBelow(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	// Those that were told to end (a node that joins ends them) may be about to.
	if err := errors.Join(n.data.end(ctx), n.holder.end(ctx)); err != nil {
		return err
	}
	// A holder starts the data process when nobody has its lock. Here it is never to: the lock is held until the data process takes it. (In between the holder may see it free, and find no
	// program; it looks again.)
	locks, err := hold.LockData(n.RunDir, insideVersion)
	if err != nil {
		return err
	}
	cfg := hold.Config{RunDir: n.RunDir, Binary: n.nothing(), Log: n.log}
	n.holder = n.run("holder", func(ctx context.Context) error { return hold.Run(ctx, cfg) })
	err = Until(ctx, readyLimit, func() (bool, error) {
		conn, err := hold.Dial(ctx, cfg)
		if err != nil {
			return false, nil //nolint:nilerr // not yet
		}
		return true, conn.Close()
	})
	if err = errors.Join(err, locks.Close()); err != nil {
		n.holder.cancel()
		return err
	}
	n.data = n.run("data process", func(ctx context.Context) error {
		return dataplane.Run(ctx, dataplane.Config{RunDir: n.RunDir, Version: insideVersion, Binary: n.nothing(), NoExec: true, Now: n.Now, Log: n.log})
	})
	return nil
}

// Start starts the node (again), all of it, and waits until it is ready.
func (n *Inner) Start(ctx context.Context) error { return n.StartServe(ctx) }

// StartServe starts what is `ashlar serve`, and what that needs, and waits until it is ready.
func (n *Inner) StartServe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	n.serve = n.run("serve", func(life context.Context) error {
		defer cancel() // nobody needs to wait for it
		return n.live(life)
	})
	if err := Until(ctx, readyLimit, func() (bool, error) { return n.Client.Ready(ctx) == nil, nil }); err != nil {
		return errors.Join(fmt.Errorf("%s: %w: %w", n.Name, ErrNotReady, err), n.StopServe())
	}
	return nil
}

// live is a node built anew as often as it asks for it.
func (n *Inner) live(ctx context.Context) error {
	for {
		running, err := node.Start(ctx, n.cfg)
		if err != nil {
			return err
		}
		err = running.Wait(ctx)
		ended := running.Close()
		if !errors.Is(err, node.ErrRestart) || ctx.Err() != nil {
			return errors.Join(err, ended)
		}
		if ended != nil {
			n.log.Warn("not everything ended in order", "error", ended)
		}
	}
}

// member waits until the node is what it has become by InitCluster or Join.
func (n *Inner) member(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	_, err := n.Client.WaitCluster(ctx, "")
	return err
}

// StopServe stops what is `ashlar serve`, as a signal does: volumes stay open.
func (n *Inner) StopServe() error {
	if n.serve == nil {
		return nil
	}
	n.serve.cancel()
	err := n.serve.end(context.Background())
	n.serve = nil
	return err
}

// Stop shuts the node down in order, volumes that are attached included. Of one that does not run there is nothing to stop.
func (n *Inner) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	var err error
	if n.serve != nil {
		err = n.Client.Shutdown(ctx, n.Name, client.ShutdownOptions{Force: true})
	}
	if n.serve == nil || err != nil { // nobody else tells them
		cancel()
	}
	err = errors.Join(err, n.serve.end(ctx))
	n.serve = nil
	n.mu.Lock()
	defer n.mu.Unlock()
	err = errors.Join(err, n.data.end(ctx), n.holder.end(ctx))
	n.data, n.holder = nil, nil
	n.wg.Wait()
	return err
}
