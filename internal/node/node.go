// Package node is the composition root of `ashlar serve`: Start builds one node from the bottom up (its lock, the holder and the data process, the catalogue,
// control, the agent, REST), Close takes it down in reverse. Nothing else in the house knows all of these. The data process is not a part of it: it is
// found, or started through the holder, and outlives it.
//
// Read next: agent (what a node does), control (what a cluster decides), cluster.go (what it is in its cluster), ../../docs/tour.md.
package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/agent"
	"ashlar/internal/api"
	apiclient "ashlar/internal/api/client"
	"ashlar/internal/catalog"
	"ashlar/internal/catalog/etcd"
	"ashlar/internal/cluster"
	"ashlar/internal/control"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
	"ashlar/internal/export/blockdev"
	"ashlar/internal/identity"
	"ashlar/internal/plan"
)

// Config says what a node is.
type Config struct {
	// DataDir keeps the catalogue (etcd/) and the first disk (disks/default/); absolute.
	DataDir string
	// RunDir keeps sockets and what belongs to one boot; absolute and short, because a socket's path holds at most 108 bytes.
	RunDir string
	// Listen is REST's TCP address; empty: only <run-dir>/api.sock. Beyond loopback it speaks TLS and asks for tokens.
	Listen string
	// RequireToken has REST ask for tokens on plain loopback too.
	RequireToken bool
	// TLSCertificate and TLSKey are files of what REST shows, then on loopback too; empty: beyond loopback the cluster's own authority (<data-dir>/identity) issues it.
	TLSCertificate, TLSKey string
	// NBD is where volumes are offered over TCP; the zero value: nowhere.
	NBD client.Network
	// Name is the node's name in the cluster.
	Name string
	// Version is this build's.
	Version string
	// Etcd are the endpoints of an existing etcd; empty: one is embedded. EtcdFiles are shown to it, and say whom to believe; the zero value: nothing.
	Etcd      []string
	EtcdFiles etcd.Files
	// Binary is started as holder and data process; empty: this program.
	Binary string
	// Systemd: holder and data process are units of systemd's; see hold.Config.
	Systemd bool
	// StartHolder starts the holder in place of Binary; see hold.Config. Nil: Binary is started.
	StartHolder func(context.Context) error
	// Now tells the time of this node's clock; nil: time.Now. Durations and leases do not follow it.
	Now func() time.Time
	// Log takes what a record cannot; nil: dropped.
	Log *slog.Logger
}

var (
	// ErrConfig: something is missing or wrong.
	ErrConfig = errors.New("bad configuration")
	// ErrInUse: another `ashlar serve` has the data directory, or the run directory.
	ErrInUse = errors.New("the directory is in use by another ashlar serve")
	// ErrFormat: the catalogue is of a later version. Nothing was changed.
	ErrFormat = agent.ErrFormat
)

func (c *Config) check() error {
	for what, dir := range map[string]string{"data directory": c.DataDir, "run directory": c.RunDir} {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("%w: the %s %q is not an absolute path", ErrConfig, what, dir)
		}
	}
	for _, socket := range []string{apiclient.Socket(c.RunDir), client.DataSocket(c.RunDir, c.Version)} {
		if len(socket) > maxSocketPath {
			return fmt.Errorf("%w: the run directory %s is too long: a socket's path has at most %d bytes, and %s has %d", ErrConfig, c.RunDir, maxSocketPath, socket, len(socket))
		}
	}
	if c.Name == "" {
		return fmt.Errorf("%w: a node needs a name", ErrConfig)
	}
	if c.Listen != "" {
		// Beyond loopback it is TLS, with the cluster's own authority if nothing else was said.
		if err := api.CheckListen(c.Listen, api.OverTLS); err != nil {
			return fmt.Errorf("%w: --listen %s: %w", ErrConfig, c.Listen, err)
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return nil
}

// Node is a running node.
type Node struct {
	cfg    Config
	undo   []func() error // what Close does, last first
	ctx    context.Context
	cancel context.CancelCauseFunc
	loops  sync.WaitGroup
	leases sync.WaitGroup // end with loops, or when the catalogue is closed
	keeper *hold.Keeper

	state    *cluster.State             // who it is in its cluster; nil: a cluster of one that listens nowhere
	tls      *identity.NodeTLS          // nil with state
	roster   *cluster.Roster            // nil with state
	store    atomic.Pointer[etcd.Store] // in a cluster: nil until it is open
	member   atomic.Pointer[memberNote] // what is said of this node's etcd member instead of what store says
	farewell atomic.Pointer[error]      // why the node is shut down by itself; nil: it is not
}

// errStopped ends the loops without blame.
var errStopped = errors.New("stopped")

// maxSocketPath is what the kernel takes, with its zero byte, in 108 bytes.
const maxSocketPath = 107

// readyTimeout bounds each step of Start.
const readyTimeout = 30 * time.Second

// Start builds the node and returns when its REST API answers. ErrConfig, ErrInUse, and the errors of what it builds. The caller calls Close.
func Start(ctx context.Context, cfg Config) (*Node, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	n := &Node{cfg: cfg}
	n.ctx, n.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := n.build(ctx); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// build starts everything, lowest first; each step leaves behind how it is undone.
func (n *Node) build(ctx context.Context) error {
	if err := n.lock(); err != nil {
		return err
	}
	if err := n.loadCluster(); err != nil {
		return err
	}
	listeners, err := n.listen()
	if err != nil {
		return err
	}
	if err := n.settle(ctx); err != nil {
		return err
	}
	port, err := n.listenNode()
	if err != nil {
		return err
	}
	if n.keeper, err = hold.Keep(ctx, n.holdConfig()); err != nil {
		return fmt.Errorf("start the holder: %w", err)
	}
	n.undo = append(n.undo, n.keeper.Close)
	cat, leader, err := n.openCatalogue(ctx)
	if err != nil {
		return fmt.Errorf("open the catalogue: %w", err)
	}
	n.undo = append(n.undo, func() error { n.leases.Wait(); return nil }, cat.Close)
	ag, err := agent.New(agent.Config{
		Node: n.cfg.Name, Address: n.address(), Catalog: cat, EnsureData: n.startData, RunDir: n.cfg.RunDir, Log: n.cfg.Log, Network: n.cfg.NBD,
		Disks:   map[string]catalog.DiskWanted{"default": {Path: n.diskDir(), AllowScheduling: true}},
		Cluster: n.clusterFiles(), Member: n.memberState, Stop: n.stop, Now: n.cfg.Now,
	})
	if err != nil {
		return err
	}
	n.undo = append(n.undo, func() error { n.cancel(errStopped); n.loops.Wait(); return nil })
	after := func(fn func(context.Context) error) func(context.Context) error { return fn }
	if l, ok := cat.(*late); ok {
		n.loop("the catalogue", func(ctx context.Context) error { return n.openLate(ctx, l) })
		after = l.after
	}
	n.loop("agent", after(ag.Run))
	n.loop("control", after(control.New(control.Config{Catalog: cat, Node: n.cfg.Name, Leader: leader, API: plan.Window{Min: cluster.APIMin, Current: cluster.APICurrent}, Now: n.cfg.Now, Log: n.cfg.Log}).Run))
	n.loop("alive", after(func(ctx context.Context) error { return n.hold(ctx, cat) }))
	handler := n.handler(cat, ag)
	// Streams have no end of their own, and would hold up the shutdown of what serves them.
	n.undo = append(n.undo, handler.Close)
	if port != nil {
		n.startCluster(cat.(*late), port, ag, handler)
	}
	for _, l := range listeners {
		n.loop("REST on "+l.Addr().String(), func(ctx context.Context) error { return client.Serve(ctx, l, handler, time.Second) })
	}
	return nil
}

// handler is REST.
func (n *Node) handler(cat catalog.Catalog, ag *agent.Agent) *api.Handler {
	frontend := catalog.FrontendNBD
	if err := blockdev.Supported(); err == nil {
		frontend = catalog.FrontendBlockdev
	} else {
		n.cfg.Log.Info("no block devices on this machine; volumes whose creator names no frontend get nbd", "why", err)
	}
	return api.New(api.Config{
		Catalog: cat, Extra: ag, Node: n.cfg.Name, Version: n.cfg.Version, Frontend: frontend, CodeOf: codeOf, Now: n.cfg.Now, Log: n.cfg.Log,
		RequireToken: n.cfg.RequireToken, Cluster: membership{n, cat}, Forward: n.forward(cat), NodeOf: nodeOf, CanEvict: canEvict(cat),
	})
}

// listenNode opens the node port, if the node is in a cluster.
func (n *Node) listenNode() (net.Listener, error) {
	if n.state == nil {
		return nil, nil
	}
	address := cluster.Address(n.state.Host, n.state.Port, catalog.PortNode)
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen for other nodes (if this machine's address changed: `ashlar cluster readdress`): %w", err)
	}
	n.undo = append(n.undo, func() error { return ignoreClosed(l.Close()) })
	return l, nil
}

// address is what others reach this node by.
func (n *Node) address() string {
	if n.state != nil {
		return n.state.Host
	}
	return "127.0.0.1"
}

// nodeOf tells from an agent's error which node has what was asked for.
func nodeOf(err error) string {
	if e, ok := errors.AsType[agent.Elsewhere](err); ok {
		return e.Node
	}
	return ""
}

// codeOf is the API's code for what the agent could not answer; the words are those of the data process's wire.
func codeOf(err error) string {
	switch {
	case errors.Is(err, agent.ErrAway):
		return string(api.CodeUnreachable)
	case errors.Is(err, agent.ErrNotHere):
		return string(api.CodeNotFound)
	case errors.Is(err, cluster.ErrAddress), errors.Is(err, identity.ErrJoinToken), errors.Is(err, identity.ErrFingerprint):
		return string(api.CodeInvalid)
	case errors.Is(err, cluster.ErrRemains):
		return string(api.CodeInUse)
	case errors.Is(err, cluster.ErrIn), errors.Is(err, cluster.ErrNone), errors.Is(err, cluster.ErrClock), errors.Is(err, cluster.ErrRemoved):
		return string(api.CodeConflict)
	}
	return string(client.CodeOf(err))
}

// loop runs fn until the node is closed; if it ends by itself the node ends with it.
func (n *Node) loop(what string, fn func(context.Context) error) {
	n.loops.Go(func() {
		err := fn(n.ctx)
		if n.ctx.Err() == nil {
			n.cancel(fmt.Errorf("%s ended: %w", what, err))
		}
	})
}

func (n *Node) catalogueDir() string { return filepath.Join(n.cfg.DataDir, "etcd") }

func (n *Node) diskDir() string { return filepath.Join(n.cfg.DataDir, "disks", "default") }

// lock takes the data directory for this process, and the run directory, whose sockets a second node would take over.
func (n *Node) lock() error {
	dirs := []string{n.cfg.DataDir, n.cfg.RunDir}
	_, old := os.Stat(n.catalogueDir())
	if _, joined := os.Stat(string(n.dir())); errors.Is(old, fs.ErrNotExist) && errors.Is(joined, fs.ErrNotExist) {
		// Only at the first start: a disk that disappears later is missed, not replaced by an empty one.
		dirs = append(dirs, n.diskDir())
	}
	for _, d := range dirs {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	for _, name := range []string{filepath.Join(n.cfg.DataDir, "serve.lock"), filepath.Join(n.cfg.RunDir, "node.lock")} {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			return fmt.Errorf("%s: %w", filepath.Dir(name), ErrInUse)
		}
		n.undo = append(n.undo, f.Close)
	}
	return nil
}

// listen opens REST's sockets before anything is started, so that a port that is taken is found first.
func (n *Node) listen() ([]net.Listener, error) {
	sock, err := client.Listen(apiclient.Socket(n.cfg.RunDir))
	if err != nil {
		return nil, err
	}
	n.undo = append(n.undo, func() error { return ignoreClosed(sock.Close()) })
	if n.cfg.Listen == "" {
		return []net.Listener{sock}, nil
	}
	settings, err := n.serverTLS()
	if err != nil {
		return nil, fmt.Errorf("%w: REST's certificate: %w", ErrConfig, err)
	}
	tcp, err := api.Listen(n.cfg.Listen, settings)
	if err != nil {
		return nil, fmt.Errorf("listen for REST (choose another address with --listen): %w", err)
	}
	n.undo = append(n.undo, func() error { return ignoreClosed(tcp.Close()) })
	return []net.Listener{sock, tcp}, nil
}

// serverTLS is what REST's TCP listener shows; nil: plain HTTP, on loopback only.
func (n *Node) serverTLS() (*tls.Config, error) {
	if n.cfg.TLSCertificate != "" {
		return identity.ServerTLS(identity.ServerFiles{CertFile: n.cfg.TLSCertificate, KeyFile: n.cfg.TLSKey, Changed: func(err error) {
			if err != nil {
				n.cfg.Log.Error("REST's certificate files changed and cannot be used; the old certificate stays", "error", err)
			} else {
				n.cfg.Log.Info("REST shows the new certificate")
			}
		}})
	}
	if api.CheckListen(n.cfg.Listen, api.Plain) == nil {
		return nil, nil
	}
	var authority *identity.Authority
	var err error
	if n.state == nil {
		authority, err = identity.OpenAuthority(n.authorityDir(), n.cfg.Now)
	} else if authority, err = n.dir().Authority(n.cfg.Now); errors.Is(err, fs.ErrNotExist) {
		// No key to sign with: REST shows what other nodes know it by, which names its host.
		f := n.dir().Files()
		return identity.ServerTLS(identity.ServerFiles{CertFile: f.CertFile, KeyFile: f.KeyFile})
	}
	if err != nil {
		return nil, err
	}
	return authority.ServerTLS(n.names())
}

// names are what clients may call this node: its name, the host's, and every address that Listen covers.
func (n *Node) names() []string {
	names := []string{n.cfg.Name, "localhost"}
	if host, err := os.Hostname(); err == nil && host != n.cfg.Name {
		names = append(names, host)
	}
	host, _, _ := net.SplitHostPort(n.cfg.Listen)
	if ip := net.ParseIP(host); host != "" && (ip == nil || !ip.IsUnspecified()) {
		return append(names, host)
	}
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		n.cfg.Log.Warn("the node's addresses cannot be listed; its certificate has names only", "error", err)
	}
	for _, a := range addresses {
		if ip, ok := a.(*net.IPNet); ok {
			names = append(names, ip.IP.String())
		}
	}
	return names
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (n *Node) holdConfig() hold.Config {
	return hold.Config{RunDir: n.cfg.RunDir, Binary: n.cfg.Binary, Systemd: n.cfg.Systemd, Start: n.cfg.StartHolder, Log: n.cfg.Log}
}

// openCatalogue opens the catalogue, and says who leads. In a cluster it is opened later, because that may take long: openLate does it.
func (n *Node) openCatalogue(ctx context.Context) (catalog.Catalog, control.Leader, error) {
	if n.state != nil {
		l := newLate()
		return l, l, nil
	}
	s, err := etcd.Open(ctx, n.options())
	if err != nil {
		return nil, nil, err
	}
	if n.embedded() {
		return s, nil, nil
	}
	return s, s, nil
}

// openStore opens the catalogue for a command, and waits for it.
func (n *Node) openStore(ctx context.Context) (*etcd.Store, error) {
	if err := n.loadCluster(); err != nil {
		return nil, err
	}
	return etcd.Open(ctx, n.options())
}

// startPatience is how long the data process may take to come up before the node says that it is away.
const startPatience = 5 * time.Second

// startData returns the data process; while it is coming up it waits, or every start of a node would say first that it is away.
func (n *Node) startData(ctx context.Context) (client.Service, error) {
	return n.awaitData(ctx, startPatience)
}

// ensureData returns the data process that answers. The keeper sees to the holder, and the holder to the data process, so all there is to do is to ask whoever listens.
func (n *Node) ensureData(ctx context.Context) (client.Service, error) {
	if _, err := n.keeper.Status(ctx); err != nil {
		return nil, err
	}
	return n.findData(ctx)
}

// findData returns the data process that answers, whoever started it.
func (n *Node) findData(ctx context.Context) (client.Service, error) {
	sockets, err := client.DataSockets(n.cfg.RunDir)
	if err != nil {
		return nil, err
	}
	last := fmt.Errorf("no data process listens in %s: %w", client.DataDir(n.cfg.RunDir), os.ErrNotExist)
	for _, s := range sockets {
		c := client.New(s)
		if _, err := c.Hello(ctx); err != nil {
			last = err
			continue
		}
		return c, nil
	}
	return nil, last
}

// Wait returns when the node has stopped: nil after an orderly shutdown, ErrRestart when it is to be built anew, otherwise why.
func (n *Node) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-n.ctx.Done():
	}
	if err := context.Cause(n.ctx); !errors.Is(err, errStopped) {
		return err
	}
	return nil
}

// Close takes the node down, last built first. The data process, the holder and every guest's I/O go on.
func (n *Node) Close() error {
	n.cancel(errStopped)
	var errs []error
	for i := len(n.undo) - 1; i >= 0; i-- {
		errs = append(errs, n.undo[i]())
	}
	n.undo = nil
	return errors.Join(errs...)
}
