package testbed

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Cluster is several nodes as processes that are one Ashlar. Without a Switch they all listen on loopback, each at ports of its own; with one, each has a network namespace and its switch's
// port. Nodes are called node1, node2, … and counted from 0. The verbs are not to be called concurrently, except Run on a node.
type Cluster struct {
	Nodes  []*Process
	Switch *Switch // nil: loopback
	hosts  []string
	bin    string
	dir    string
	args   []string
	closed bool
}

// ClusterConfig says what to start.
type ClusterConfig struct {
	Bin    string // the program
	Dir    string // short: sockets lie in it; node N has Dir/N
	Nodes  int
	Switch *Switch           // nil: loopback
	Args   []string          // more arguments of every `ashlar serve`
	Tell   func(what string) // told of every step; may be nil
}

// StartCluster starts nodes, makes the first one a cluster, and has the others join it. After an error nothing runs.
func StartCluster(ctx context.Context, cfg ClusterConfig) (_ *Cluster, err error) {
	c := &Cluster{Switch: cfg.Switch, bin: cfg.Bin, dir: cfg.Dir, args: cfg.Args}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Stop(context.WithoutCancel(ctx)))
		}
	}()
	if cfg.Tell == nil {
		cfg.Tell = func(string) {}
	}
	for i := range cfg.Nodes {
		start := time.Now()
		p, err := c.Add(ctx)
		if err != nil {
			return nil, err
		}
		cfg.Tell(fmt.Sprintf("%s is up (%v)", p.Name, time.Since(start).Round(time.Millisecond)))
		if start = time.Now(); i == 0 {
			err = c.Init(ctx)
		} else {
			err = c.Join(ctx, i, 0)
		}
		if err != nil {
			return nil, err
		}
		cfg.Tell(fmt.Sprintf("%s is in the cluster at %s (%v)", p.Name, c.hosts[i], time.Since(start).Round(time.Millisecond)))
	}
	return c, nil
}

// Add starts one more node, which is in no cluster yet.
func (c *Cluster) Add(ctx context.Context) (*Process, error) {
	i := len(c.Nodes)
	host, ports := "127.0.0.1", 0
	p := &Process{Bin: c.bin, Name: "node" + strconv.Itoa(i+1), Args: c.args}
	var err error
	if c.Switch != nil {
		host, ports, p.Namespace = c.Switch.Address(i), 9510, c.Switch.Namespace(i)
		p.Listen = "127.0.0.1:9500"
	} else if ports, err = FreePorts(nodePorts + 1); err == nil {
		p.Listen = "127.0.0.1:" + strconv.Itoa(ports+nodePorts)
	}
	if err != nil {
		return nil, err
	}
	if err := p.Start(ctx, filepath.Join(c.dir, strconv.Itoa(i+1))); err != nil {
		return nil, err
	}
	c.Nodes, c.hosts = append(c.Nodes, p), append(c.hosts, net.JoinHostPort(host, strconv.Itoa(ports)))
	return p, nil
}

// nodePorts are how many ports in a row a node of a cluster has (docs/formats/cluster.md, section 2).
const nodePorts = 4

// The ports that nodes of a loopback cluster get: below those that the kernel gives to whoever connects somewhere (ip(7), ip_local_port_range), or a node that comes back could find one of its own taken.
const (
	firstPort = 11000
	lastPort  = 31000
)

// FreePorts finds n ports in a row that nobody listens on now.
func FreePorts(n int) (int, error) {
	for range 100 {
		first := firstPort + rand.IntN(lastPort-firstPort)
		var row []net.Listener
		var err error
		for port := first; port < first+n; port++ {
			l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
			if err != nil {
				break
			}
			row = append(row, l)
		}
		for _, l := range row {
			err = errors.Join(err, l.Close())
		}
		if err != nil || len(row) == n {
			return first, err
		}
	}
	return 0, fmt.Errorf("%d ports in a row: %w", n, ErrNotReady)
}

// Host is a node's address in the cluster, HOST:PORT.
func (c *Cluster) Host(i int) string { return c.hosts[i] }

// Init makes the first node a cluster of one that others can join.
func (c *Cluster) Init(ctx context.Context) error {
	return c.Nodes[0].Run(ctx, nil, "cluster", "init", "--address", c.hosts[0])
}

// Join has a node join the cluster that another is in.
func (c *Cluster) Join(ctx context.Context, i, through int) error {
	var token struct{ Token string }
	if err := c.Nodes[through].Run(ctx, &token, "cluster", "token"); err != nil {
		return err
	}
	file := filepath.Join(c.Nodes[i].RunDir, "join-token")
	if err := os.WriteFile(file, []byte(token.Token+"\n"), 0o600); err != nil {
		return err
	}
	return c.Nodes[i].Run(ctx, nil, "node", "join", c.hosts[through], "--token-file", file, "--address", c.hosts[i])
}

// signal sends a signal to all of a node's processes.
func (c *Cluster) signal(i int, sig syscall.Signal) {
	for _, sub := range []string{"serve", "hold", "data"} {
		if pid := c.Nodes[i].PID(sub); pid != 0 {
			syscall.Kill(pid, sig) //nolint:errcheck // it ended meanwhile
		}
	}
}

// KillNode kills everything of a node, again and again until nothing has started anything else.
func (c *Cluster) KillNode(ctx context.Context, i int) error {
	p := c.Nodes[i]
	return Until(ctx, stopLimit, func() (bool, error) {
		c.signal(i, syscall.SIGKILL)
		if err := p.KillServe(); err != nil {
			return false, err
		}
		return p.PID("serve") == 0 && p.PID("hold") == 0 && p.PID("data") == 0, nil
	})
}

// Pause stops all of a node's processes in the middle of whatever they do, and Resume lets them go on.
func (c *Cluster) Pause(i int) { c.signal(i, syscall.SIGSTOP) }

// Resume ends a Pause.
func (c *Cluster) Resume(i int) { c.signal(i, syscall.SIGCONT) }

// Stop stops all nodes, the last one first. Called again it does nothing.
func (c *Cluster) Stop(ctx context.Context) error {
	if c.closed {
		return nil
	}
	c.closed = true
	var errs []error
	for i := len(c.Nodes) - 1; i >= 0; i-- {
		c.Resume(i)
		errs = append(errs, c.Nodes[i].Stop(ctx))
	}
	return errors.Join(errs...)
}
