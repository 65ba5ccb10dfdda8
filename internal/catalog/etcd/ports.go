package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"sync"
	"time"

	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/etcdhttp"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

// This file is where a member of several is listened for: embed is told of no listeners, and what it would serve on them is served here, because it would ask a certificate
// for its authority alone, and keep a connection whatever becomes of the node at its other end.

const (
	// handshakePatience bounds a handshake, with what Admit takes of it.
	handshakePatience = 10 * time.Second
	// peerBodyPatience bounds the reading of a peer's request: a database as a whole is sent in one. It is embed's.
	peerBodyPatience = 5 * time.Minute
	// clientPingsMin is how often a client may ask whether the connection lives (dialer does every 10 s); pingClients is how long we hear nothing before we ask, pingPatience how long
	// an answer may take.
	clientPingsMin = 5 * time.Second
	pingClients    = 30 * time.Second
	pingPatience   = 10 * time.Second
)

// ports are those of a member that others reach: one for the other members (raft, over HTTP), one for clients (gRPC).
type ports struct {
	guard *guard

	peerLn, clientLn net.Listener
	peerTLS          *tls.Config
	clientTLS        *tls.Config

	ending  context.Context // ends when streams are to end
	end     context.CancelFunc
	workers sync.WaitGroup

	mu      sync.Mutex // guards all below
	closed  bool
	peers   *http.Server
	clients *grpc.Server
}

// listen opens both ports; nobody is answered before serve.
func listen(m *Member) (*ports, error) {
	p := &ports{guard: &guard{admit: m.Admit, conns: map[*conn]*x509.Certificate{}}}
	base, err := m.Files.info().ServerConfig()
	if err != nil {
		return nil, err
	}
	base.SessionTicketsDisabled = true // a session that is taken up again would carry a certificate from before
	p.peerTLS, p.clientTLS = p.guard.config(base, "http/1.1"), p.guard.config(base, "h2")
	if p.peerLn, err = net.Listen("tcp", m.PeerListen); err != nil {
		return nil, err
	}
	if p.clientLn, err = net.Listen("tcp", m.ClientListen); err != nil {
		return nil, errors.Join(err, p.peerLn.Close())
	}
	p.ending, p.end = context.WithCancel(context.Background())
	return p, nil
}

// serve answers the other members at once, and clients when the member knows where it stands.
func (p *ports) serve(s *etcdserver.EtcdServer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.peers = &http.Server{
		Handler: etcdhttp.NewPeerHandler(zap.NewNop(), s), ReadHeaderTimeout: handshakePatience, ReadTimeout: peerBodyPatience,
		ErrorLog: stdlog.New(io.Discard, "", 0), // what peers do wrong is theirs to say
	}
	p.clients = v3rpc.Server(s, p.clientTLS, nil, append(p.streams(),
		grpc.ConnectionTimeout(handshakePatience),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: clientPingsMin}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingClients, Timeout: pingPatience}))...)
	peers, clients := p.peers, p.clients
	p.workers.Go(func() {
		// Both end when close was called, and say so.
		_ = peers.Serve(tls.NewListener(listener{p.peerLn, p.guard, rafthttp.ConnReadTimeout, rafthttp.ConnWriteTimeout}, p.peerTLS))
	})
	p.workers.Go(func() {
		select {
		case <-s.ReadyNotify():
			_ = clients.Serve(listener{Listener: p.clientLn, guard: p.guard})
		case <-p.ending.Done():
		}
	})
}

// endStreams ends what clients follow, and refuses what they ask from now on, or etcd would wait for them.
func (p *ports) endStreams() { p.end() }

// close ends everything. What runs in etcd for somebody who asked is not waited for.
func (p *ports) close() {
	p.end()
	p.guard.close() // first: gRPC waits for handshakes
	p.mu.Lock()
	p.closed = true
	peers, clients := p.peers, p.clients
	p.mu.Unlock()
	_, _ = p.peerLn.Close(), p.clientLn.Close() // that they were closed below is no news
	if peers != nil {
		_ = peers.Close()
		clients.Stop()
	}
	p.workers.Wait()
}

// streams are what ends clients' calls.
func (p *ports) streams() []grpc.ServerOption {
	stops := status.Error(codes.Unavailable, "this member stops")
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			if p.ending.Err() != nil {
				return nil, stops
			}
			return h(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			if p.ending.Err() != nil {
				return stops
			}
			ctx, cancel := context.WithCancel(ss.Context())
			defer cancel()
			defer context.AfterFunc(p.ending, cancel)()
			err := h(srv, stream{ss, ctx})
			if p.ending.Err() != nil {
				return stops
			}
			return err
		}),
	}
}

// stream is a stream with a context of ours.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (s stream) Context() context.Context { return s.ctx }

// guard knows every connection and whose it is, and lets in who may.
type guard struct {
	admit func(*x509.Certificate) error // nil: everybody

	mu     sync.Mutex // guards all below
	closed bool
	conns  map[*conn]*x509.Certificate // nil: in its handshake
}

// errNotOurs: a handshake on a connection that no listener of ours accepted.
var errNotOurs = errors.New("a connection that was not accepted here")

// config is base for one protocol, with the question who it is at the end of each handshake.
func (g *guard) config(base *tls.Config, protocol string) *tls.Config {
	base = base.Clone()
	base.NextProtos = []string{protocol}
	out := base.Clone()
	out.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		c, ok := hello.Conn.(*conn)
		if !ok {
			return nil, errNotOurs
		}
		one := base.Clone()
		one.VerifyConnection = func(s tls.ConnectionState) error { return g.enter(c, s.PeerCertificates[0]) } // RequireAndVerifyClientCert saw to it
		return one, nil
	}
	return out
}

// enter notes whose a connection is, and then asks whether that one may: whoever is shut out meanwhile is found by expel.
func (g *guard) enter(c *conn, cert *x509.Certificate) error {
	g.mu.Lock()
	_, open := g.conns[c]
	if open {
		g.conns[c] = cert
	}
	g.mu.Unlock()
	switch {
	case !open:
		return net.ErrClosed
	case g.admit == nil:
		return nil
	}
	return g.admit(cert)
}

// expel closes the connections of those who are refused.
func (g *guard) expel(refused func(*x509.Certificate) error) {
	g.mu.Lock()
	var out []*conn
	for c, cert := range g.conns {
		if cert != nil && refused(cert) != nil {
			out = append(out, c)
		}
	}
	g.mu.Unlock()
	for _, c := range out {
		_ = c.Close() // it is gone either way
	}
}

// close closes all connections, and lets nobody in any more.
func (g *guard) close() {
	g.mu.Lock()
	g.closed = true
	var out []*conn
	for c := range g.conns {
		out = append(out, c)
	}
	g.mu.Unlock()
	for _, c := range out {
		_ = c.Close() // as above
	}
}

// listener accepts connections that a guard knows.
type listener struct {
	net.Listener
	guard       *guard
	read, write time.Duration // how long each may take; 0: for ever
}

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: raw, guard: l.guard, read: l.read, write: l.write}
	l.guard.mu.Lock()
	defer l.guard.mu.Unlock()
	if l.guard.closed {
		return nil, errors.Join(net.ErrClosed, raw.Close())
	}
	l.guard.conns[c] = nil
	return c, nil
}

// conn is a connection that its guard knows until it is closed.
type conn struct {
	net.Conn
	guard       *guard
	read, write time.Duration
}

// Read implements net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	if c.read > 0 {
		if err := c.SetReadDeadline(time.Now().Add(c.read)); err != nil {
			return 0, err
		}
	}
	return c.Conn.Read(p)
}

// Write implements net.Conn.
func (c *conn) Write(p []byte) (int, error) {
	if c.write > 0 {
		if err := c.SetWriteDeadline(time.Now().Add(c.write)); err != nil {
			return 0, err
		}
	}
	return c.Conn.Write(p)
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.guard.mu.Lock()
	delete(c.guard.conns, c)
	c.guard.mu.Unlock()
	return c.Conn.Close()
}
