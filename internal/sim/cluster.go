package sim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"ashlar/internal/agent"
	"ashlar/internal/catalog"
	"ashlar/internal/control"
)

// Cluster is some machines, each with a node on it, and one catalogue.
type Cluster struct {
	Net      *Net
	Mem      *catalog.Mem
	Machines []*Machine
	nodes    []*node
	election *election
}

// node is what `ashlar serve` is on a machine: agent, control and the lease.
type node struct {
	c       *Cluster
	machine *Machine
	access  *Access
	log     *slog.Logger
	stop    func() // nil: not running
}

// NewCluster returns a cluster whose nodes do not run yet. lose is the part of the catalogue's answers that is lost.
func NewCluster(names []string, seed uint64, lose float64, log *slog.Logger) (*Cluster, error) {
	c := &Cluster{Net: NewNet(), Mem: catalog.NewMem(), election: &election{}}
	for i, name := range names {
		a := NewAccess(c.Mem, seed+uint64(i), lose)
		l := log.With("on", name)
		m := NewMachine(name, c.Net, a, l)
		c.Machines = append(c.Machines, m)
		c.nodes = append(c.nodes, &node{c: c, machine: m, access: a, log: l})
		w := catalog.NodeWanted{Name: name, ID: m.diskID, AllowScheduling: true, Disks: map[string]catalog.DiskWanted{"default": {Path: diskPath, AllowScheduling: true}}}
		if _, err := catalog.Write(context.Background(), c.Mem, catalog.NodeKey(catalog.Wanted, name), w, 0); err != nil {
			return nil, err
		}
	}
	_, err := catalog.Write(context.Background(), c.Mem, catalog.ClusterKey(), catalog.Cluster{ID: "c1", Format: catalog.Format}, 0)
	return c, err
}

// StartServe starts a node's agent and control.
func (c *Cluster) StartServe(i int) error {
	n := c.nodes[i]
	if n.stop != nil {
		return nil
	}
	a, err := agent.New(agent.Config{
		Node: n.machine.Name, Address: n.machine.Name, Catalog: n.access, EnsureData: n.machine.Ensure, Log: n.log,
		Cluster: &agent.ClusterFiles{ClusterID: "c1", NodeID: n.machine.diskID, Host: n.machine.Name, Port: 9510},
	})
	if err != nil {
		return err
	}
	ctl := control.New(control.Config{Catalog: n.access, Leader: leader{c.election, n.machine.Name}, Log: n.log})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{a.Run, ctl.Run, n.live} {
		wg.Go(func() {
			if err := run(ctx); ctx.Err() == nil {
				n.machine.note(fmt.Errorf("%s ended by itself: %w", n.machine.Name, err))
			}
		})
	}
	n.stop = func() { cancel(); wg.Wait(); n.stop = nil }
	return nil
}

// StopServe ends a node's agent and control, as a kill does: its data process goes on.
func (c *Cluster) StopServe(i int) {
	if n := c.nodes[i]; n.stop != nil {
		n.stop()
	}
}

// SetAway cuts a node off from the catalogue.
func (c *Cluster) SetAway(i int, away bool) { c.nodes[i].access.SetAway(away) }

// Unseat makes another node lead, while the one that leads believes for a while that it still does, as one that was paused.
func (c *Cluster) Unseat(believes time.Duration) { c.election.unseat(believes) }

// live keeps the node's lease.
func (n *node) live(ctx context.Context) error {
	value, err := json.Marshal(catalog.Alive{Node: n.machine.Name, NodeID: n.machine.diskID, BootID: n.machine.boot()})
	if err != nil {
		return err
	}
	for ctx.Err() == nil {
		err := n.access.Hold(ctx, catalog.Holding{Key: catalog.AliveKey(n.machine.Name), Value: value, TTL: catalog.AliveTTL}, func(catalog.Rev) {})
		if err != nil && !errors.Is(err, catalog.ErrUnreachable) && ctx.Err() == nil {
			return err
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

// Close ends everything, and returns what went wrong on the machines.
func (c *Cluster) Close() error {
	c.Net.Heal()
	var errs []error
	for i := range c.nodes {
		c.SetAway(i, false)
		c.StopServe(i)
	}
	c.election.close()
	for _, m := range c.Machines {
		m.Kill()
		errs = append(errs, m.failed...)
	}
	c.Net.Close()
	return errors.Join(append(errs, c.Mem.Close())...)
}

// election gives the lead to one node at a time, except that one who lost it may believe a while longer that it has it: what etcd's leases allow.
type election struct {
	mu      sync.Mutex
	seat    *seat // nil: free
	changed chan struct{}
	wg      sync.WaitGroup
}

type seat struct {
	end context.CancelFunc
}

// leader is one node's part in an election; a control.Leader.
type leader struct {
	e    *election
	node string
}

// Lead implements control.Leader.
func (l leader) Lead(ctx context.Context, fn func(context.Context) error) error {
	for ctx.Err() == nil {
		mine, end := context.WithCancel(ctx)
		s := &seat{end: end}
		l.e.mu.Lock()
		if l.e.changed == nil {
			l.e.changed = make(chan struct{})
		}
		free, changed := l.e.seat == nil, l.e.changed
		if free {
			l.e.seat = s
		}
		l.e.mu.Unlock()
		if free {
			err := fn(mine)
			end()
			l.e.leave(s)
			if ctx.Err() == nil && mine.Err() == nil {
				return err
			}
			continue
		}
		end()
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

// leave frees the seat if it is still s's.
func (e *election) leave(s *seat) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.seat == s {
		e.seat = nil
		e.wake()
	}
}

func (e *election) wake() {
	if e.changed != nil {
		close(e.changed)
	}
	e.changed = make(chan struct{})
}

func (e *election) unseat(believes time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.seat
	if s == nil {
		return
	}
	e.seat = nil
	e.wake()
	e.wg.Go(func() {
		<-time.After(believes)
		s.end()
	})
}

func (e *election) close() { e.wg.Wait() }
