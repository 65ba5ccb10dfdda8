package dataplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/nbd"
	"ashlar/internal/replica/remote"
)

const (
	// maxPeers bounds the nodes of a cluster.
	maxPeers = 1024
	// peerDialTimeout bounds a connection to another node, with its handshake.
	peerDialTimeout = 5 * time.Second
)

// errNoPeer: the cluster, as this process was told of it last, has no such node.
var errNoPeer = errors.New("no such node in the cluster, as far as this node was told")

// errStranger: whoever is at the other end is not the node that it should be, or none of the cluster.
var errStranger = errors.New("not a node of this cluster")

// cluster is what this process knows of its cluster: where other nodes are, which of them may come, and what it serves them. The zero value knows of none.
//
//	        SetCluster, or open.json            serve: a listening socket
//	none ───────────────────────────▶ known ◀────────────────────────────▶ serving
//	                                    nodes can be reached     pause (hand-over, end)
type cluster struct {
	setting sync.Mutex // held while it changes

	mu     sync.Mutex // guards the rest
	now    client.Cluster
	certs  *certificates // nil: connections are plain
	server *remote.Server
	quit   context.CancelFunc // ends listening
	wg     sync.WaitGroup     // of Serve
	conns  map[*peerConn]struct{}
}

// look returns the cluster as it was set; State says it.
func (c *cluster) look() client.Cluster {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now
	now.Peers = slices.Clone(now.Peers)
	return now
}

// servedCluster is the cluster as it holds: one whose port cannot be listened at is none, so that the agent asks again.
func (p *Process) servedCluster() client.Cluster {
	p.cluster.mu.Lock()
	serving := p.cluster.server != nil
	p.cluster.mu.Unlock()
	if !serving {
		return client.Cluster{}
	}
	return p.cluster.look()
}

// peers returns the other nodes.
func (c *cluster) peers() []client.Peer { return c.look().Peers }

// know sets what is known, and cuts off those who are no peers any more; those who are notice nothing.
func (c *cluster) know(a client.Cluster, certs *certificates) {
	c.mu.Lock()
	c.now, c.certs = a, certs
	var strangers []*peerConn
	for pc := range c.conns {
		if !slices.ContainsFunc(a.Peers, func(p client.Peer) bool { return p.Node == pc.node && p.NodeID == pc.nodeID }) {
			strangers = append(strangers, pc)
		}
	}
	c.mu.Unlock()
	for _, pc := range strangers {
		pc.Close() //nolint:errcheck // it is cut
	}
}

// drop takes a replica from the nodes that have it open.
func (c *cluster) drop(replicaID string) {
	c.mu.Lock()
	server := c.server
	c.mu.Unlock()
	if server != nil {
		server.Drop(replicaID)
	}
}

// SetCluster implements client.Service.
func (p *Process) SetCluster(ctx context.Context, a client.Cluster) error {
	ctx, cancel := p.work(ctx)
	defer cancel()
	p.cluster.setting.Lock()
	defer p.cluster.setting.Unlock()
	if sameCluster(p.servedCluster(), a) {
		return nil
	}
	if err := p.setCluster(ctx, a); err != nil {
		return forWire(fmt.Errorf("set cluster: %w", err))
	}
	p.board.bump()
	return nil
}

func (p *Process) setCluster(ctx context.Context, a client.Cluster) error {
	a.Peers = slices.Clone(a.Peers)
	if isZeroCluster(a) {
		if err := p.list.setCluster(client.Cluster{}); err != nil {
			return err
		}
		p.stopCluster()
		p.cluster.know(client.Cluster{}, nil)
		return p.listeners.Forget(ctx, heldCluster)
	}
	if err := checkCluster(a); err != nil {
		return err
	}
	certs := clusterCertificates(a, p.cfg.Now)
	if certs != nil {
		if _, err := certs.config(); err != nil {
			return fmt.Errorf("cluster %s: %w: %w", a.ClusterID, client.ErrInvalid, err)
		}
	}
	was := p.cluster.look()
	p.cluster.mu.Lock()
	serving := p.cluster.server != nil
	if p.cluster.certs != nil && certs != nil && p.cluster.certs.same(certs) {
		certs = p.cluster.certs // it may have what the files do not say any more, half written
	}
	p.cluster.mu.Unlock()
	var ln net.Listener
	if !serving || was.Listen != a.Listen {
		var err error
		if ln, err = p.listeners.listenTCP(ctx, heldCluster, a.Listen); err != nil {
			return err
		}
	}
	if err := p.list.setCluster(a); err != nil {
		if ln != nil {
			err = errors.Join(err, ln.Close())
		}
		return err
	}
	if ln != nil {
		p.stopCluster()
	}
	p.cluster.know(a, certs)
	if ln != nil {
		p.serveCluster(ln, a)
	}
	return nil
}

// sameCluster tells whether a and b are the same, and are one.
func sameCluster(a, b client.Cluster) bool {
	peers := slices.Equal(a.Peers, b.Peers)
	a.Peers, b.Peers = nil, nil
	return peers && !isZeroCluster(a) && reflect.DeepEqual(a, b)
}

// isZeroCluster tells of the Cluster that ends it.
func isZeroCluster(a client.Cluster) bool {
	return a.ClusterID+a.Node+a.Listen+a.CertFile+a.KeyFile+a.CAFile == "" && len(a.Peers) == 0
}

// checkCluster refuses what cannot be right, before any of it is used. client.ErrInvalid.
func checkCluster(a client.Cluster) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("cluster %.40q: %w: %s", a.ClusterID, client.ErrInvalid, fmt.Sprintf(format, args...))
	}
	if a.ClusterID == "" || strings.ContainsAny(a.ClusterID, "/?# \x00") {
		return bad("not a cluster's id")
	}
	if checkName(a.Node) != nil {
		return bad("node %.40q", a.Node)
	}
	if len(a.Peers) > maxPeers {
		return bad("%d other nodes, at most %d", len(a.Peers), maxPeers)
	}
	plain := a.CertFile+a.KeyFile+a.CAFile == ""
	if !plain && (a.CertFile == "" || a.KeyFile == "" || a.CAFile == "") {
		return bad("a certificate, its key and the authority are needed together")
	}
	checkAddress := func(what, address string) error {
		host, port, err := net.SplitHostPort(address)
		if n, e := strconv.ParseUint(port, 10, 16); err != nil || e != nil || n == 0 || host == "" {
			return bad("%s: address %.80q must be HOST:PORT, with a port from 1 to 65535", what, address)
		}
		if plain && !isLoopback(host) {
			return bad("%s: %s: beyond loopback certificates are needed", what, address)
		}
		return nil
	}
	if err := checkAddress("listen", a.Listen); err != nil {
		return err
	}
	names, ids := map[string]bool{a.Node: true}, map[string]bool{}
	for _, peer := range a.Peers {
		if checkName(peer.Node) != nil || !validID(peer.NodeID) || names[peer.Node] || ids[peer.NodeID] {
			return bad("node %.40q with id %.40q: ids are 32 hex digits, and a name or an id stands for one node", peer.Node, peer.NodeID)
		}
		names[peer.Node], ids[peer.NodeID] = true, true
		if err := checkAddress("data of node "+peer.Node, peer.Data); err != nil {
			return err
		}
		if err := checkAddress("ledger of node "+peer.Node, peer.Ledger); err != nil {
			return err
		}
	}
	return nil
}

// clusterCertificates returns the files of a Cluster; nil if its connections are plain.
func clusterCertificates(a client.Cluster, now func() time.Time) *certificates {
	if a.CertFile == "" {
		return nil
	}
	return &certificates{cert: a.CertFile, key: a.KeyFile, authority: a.CAFile, clock: now, make: func(pair tls.Certificate, authorities *x509.CertPool) *tls.Config {
		return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert,
			ClientCAs: authorities, RootCAs: authorities, SessionTicketsDisabled: true, Time: now}
	}}
}

// same tells whether two read the same files.
func (c *certificates) same(o *certificates) bool {
	return c.cert == o.cert && c.key == o.key && c.authority == o.authority
}

// restoreCluster serves other nodes as open.json says. What cannot be (a port that is taken meanwhile) is missing in the State, and the agent asks for it again.
func (p *Process) restoreCluster(ctx context.Context, a client.Cluster) {
	if isZeroCluster(a) {
		return
	}
	p.cluster.setting.Lock()
	defer p.cluster.setting.Unlock()
	p.knowCluster(a)
	if err := p.resumeCluster(ctx); err != nil {
		p.log.Error("other nodes are not served", "address", a.Listen, "error", err)
	}
}

// knowCluster makes other nodes reachable as open.json says, before anything is listened to: volumes that are opened first may need them.
func (p *Process) knowCluster(a client.Cluster) {
	if isZeroCluster(a) {
		return
	}
	if err := checkCluster(a); err != nil {
		p.log.Error("open.json", "error", err)
		return
	}
	p.cluster.know(a, clusterCertificates(a, p.cfg.Now))
}

// resumeCluster listens and serves, if a cluster is known and it does not already.
func (p *Process) resumeCluster(ctx context.Context) error {
	a := p.cluster.look()
	p.cluster.mu.Lock()
	serving := p.cluster.server != nil
	p.cluster.mu.Unlock()
	if serving || a.Listen == "" {
		return nil
	}
	ln, err := p.listeners.listenTCP(ctx, heldCluster, a.Listen)
	if err != nil {
		return err
	}
	p.serveCluster(ln, a)
	return nil
}

// serveCluster serves whoever connects to ln.
func (p *Process) serveCluster(ln net.Listener, a client.Cluster) {
	c := &p.cluster
	server := remote.NewServer(remote.ServerConfig{Host: farHost{p}, Codes: farCodes(), Log: p.log})
	ctx, quit := context.WithCancel(context.WithoutCancel(p.life))
	c.mu.Lock()
	c.server, c.quit, c.conns = server, quit, map[*peerConn]struct{}{}
	c.mu.Unlock()
	c.wg.Go(func() {
		if err := server.Serve(ctx, peerListener{Listener: ln, c: c}); err != nil && ctx.Err() == nil {
			p.log.Error("other nodes are not served any more", "error", err)
		}
	})
	p.log.Info("other nodes are served", "address", a.Listen, "tls", a.CertFile != "")
}

// stopCluster ends serving other nodes and closes the replicas that only they have open, with their locks, before it returns. The listening socket stays with the holder: nodes that connect wait in it. What
// is known of the nodes stays known.
func (p *Process) stopCluster() {
	c := &p.cluster
	c.mu.Lock()
	server, quit := c.server, c.quit
	c.server, c.quit = nil, nil
	c.mu.Unlock()
	if server == nil {
		return
	}
	quit()
	if err := server.Close(); err != nil {
		p.log.Error("end serving other nodes", "error", err)
	}
	c.wg.Wait()
}

// dial returns how a node's data process is reached: at its address as of then, and nobody but it.
func (c *cluster) dial(node string) remote.Dial {
	return func(ctx context.Context) (net.Conn, error) {
		for _, peer := range c.peers() {
			if peer.Node == node {
				return c.connect(ctx, peer, peer.Data)
			}
		}
		return nil, fmt.Errorf("node %s: %w", node, errNoPeer)
	}
}

// dialLedger reaches a node's ledger.
func (c *cluster) dialLedger(ctx context.Context, peer client.Peer) (net.Conn, error) {
	return c.connect(ctx, peer, peer.Ledger)
}

// connect connects to an address at which a node should be, and makes sure that it is that node.
func (c *cluster) connect(ctx context.Context, peer client.Peer, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, peerDialTimeout)
	defer cancel()
	c.mu.Lock()
	certs, clusterID := c.certs, c.now.ClusterID
	c.mu.Unlock()
	var config *tls.Config
	if certs != nil {
		base, err := certs.config()
		if err != nil {
			return nil, fmt.Errorf("node %s: %w", peer.Node, err)
		}
		config = base.Clone()
		config.ServerName = peer.Node
		config.VerifyConnection = func(state tls.ConnectionState) error {
			node, id, err := nodeOf(state, clusterID)
			if err == nil && (node != peer.Node || id != peer.NodeID) {
				err = fmt.Errorf("%w: it is node %s with id %s, not %s with %s", errStranger, node, id, peer.Node, peer.NodeID)
			}
			return err
		}
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", peer.Node, err)
	}
	if config == nil {
		return conn, nil
	}
	secure := tls.Client(nbd.Prompt(conn), config)
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("node %s at %s: %w", peer.Node, address, errors.Join(err, conn.Close()))
	}
	return secure, nil
}

// nodeOf says which node of a cluster is at the other end of a connection, by the certificate it showed, which the authority signed (docs/formats/cluster.md, section 1).
func nodeOf(state tls.ConnectionState, clusterID string) (node, nodeID string, err error) {
	if len(state.PeerCertificates) == 0 {
		return "", "", fmt.Errorf("%w: it showed no certificate", errStranger)
	}
	leaf := state.PeerCertificates[0]
	for _, u := range leaf.URIs {
		if id, ok := nodeIDOf(u, clusterID); ok {
			return leaf.Subject.CommonName, id, nil
		}
	}
	return "", "", fmt.Errorf("%w: the certificate of %q is of no node of cluster %s", errStranger, leaf.Subject.CommonName, clusterID)
}

// nodeIDOf reads ashlar://CLUSTERID/NODEID.
func nodeIDOf(u *url.URL, clusterID string) (string, bool) {
	id, ok := strings.CutPrefix(u.String(), "ashlar://"+clusterID+"/")
	return id, ok && validID(id)
}

// peerListener lets in the nodes of the cluster, and nobody else; the handshake happens with the first byte that is read, so that no one holds up the next.
type peerListener struct {
	net.Listener
	c *cluster
}

// peerConn is a connection of another node.
type peerConn struct {
	net.Conn
	c            *cluster
	node, nodeID string // guarded by c.mu; "" before the handshake
}

// Accept implements net.Listener.
func (l peerListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		l.c.mu.Lock()
		certs := l.c.certs
		l.c.mu.Unlock()
		if certs == nil {
			return conn, nil // loopback
		}
		base, err := certs.config()
		if err != nil {
			conn.Close() //nolint:errcheck // nobody was told anything
			continue
		}
		pc := &peerConn{c: l.c}
		config := base.Clone()
		config.VerifyConnection = pc.admit
		pc.Conn = tls.Server(nbd.Prompt(conn), config)
		return pc, nil
	}
}

// admit ends a handshake: the other end must be one of the peers as of now, by name and by id.
func (pc *peerConn) admit(state tls.ConnectionState) error {
	c := pc.c
	c.mu.Lock()
	defer c.mu.Unlock()
	node, id, err := nodeOf(state, c.now.ClusterID)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(c.now.Peers, func(p client.Peer) bool { return p.Node == node && p.NodeID == id }) {
		return fmt.Errorf("%w: node %s with id %s", errStranger, node, id)
	}
	pc.node, pc.nodeID = node, id
	c.conns[pc] = struct{}{}
	return nil
}

// NetConn returns what it is made of, as that of crypto/tls does: whoever serves it sets up the socket.
func (pc *peerConn) NetConn() net.Conn { return pc.Conn }

// Close implements net.Conn.
func (pc *peerConn) Close() error {
	pc.c.mu.Lock()
	delete(pc.c.conns, pc)
	pc.c.mu.Unlock()
	return pc.Conn.Close()
}
