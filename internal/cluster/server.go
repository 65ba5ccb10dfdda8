package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/catalog/etcd"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/identity"
)

// Etcd is what this package asks of the catalogue's own cluster. *etcd.Store's methods do it.
type Etcd interface {
	AddLearner(ctx context.Context, name, peerURL string) (etcd.MemberInfo, error)
	Promote(ctx context.Context, name string) error
	RemoveMember(ctx context.Context, name string) error
	Members(ctx context.Context) ([]etcd.MemberInfo, error)
}

// ServerConfig is what a Server needs.
type ServerConfig struct {
	Dir     Dir
	State   State
	TLS     *identity.NodeTLS
	Catalog catalog.Catalog
	// Embedded: the etcd is the nodes' own, and Etcd speaks to it.
	Embedded bool
	Etcd     Etcd
	// Ledger is what the node's agent serves data processes; it is served to those of other nodes too.
	Ledger client.Ledger
	// REST answers what other nodes pass on (below /v1/); it need not ask who they are.
	REST http.Handler
	Now  func() time.Time // nil: time.Now
	Log  *slog.Logger     // nil: dropped
}

// Server answers other nodes, and machines that want to be one. It may be used concurrently, and keeps nothing.
type Server struct {
	cfg ServerConfig
	mux *http.ServeMux
}

// NewServer returns a Server; Serve makes it listen.
func NewServer(cfg ServerConfig) *Server {
	cfg.Now = orNow(cfg.Now)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, mux: http.NewServeMux()}
	s.mux.Handle("POST /node/v1/join", windowed(s.serveJoin))
	s.mux.Handle("POST /node/v1/rejoin", windowed(s.serveRejoin))
	s.mux.Handle("POST /node/v1/self", windowed(s.serveSelf))
	s.mux.Handle("POST /node/v1/renew", windowed(s.known(s.serveRenew)))
	s.mux.Handle("POST /node/v1/authority", windowed(s.known(s.serveAuthority)))
	// Data processes ask for these, with a window of their own.
	s.mux.Handle("/node/v1/ledger/", s.known(func(w http.ResponseWriter, r *http.Request, _ catalog.NodeWanted) {
		http.StripPrefix("/node/v1/ledger", client.LedgerHandler(cfg.Ledger)).ServeHTTP(w, r)
	}))
	s.mux.Handle("/v1/", windowed(s.known(func(w http.ResponseWriter, r *http.Request, _ catalog.NodeWanted) { cfg.REST.ServeHTTP(w, r) })))
	return s
}

// ServeHTTP implements http.Handler, for requests over TLS whose certificates, if any, NodeTLS.Server has verified.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// serveGrace is how long requests under way may take to end.
const serveGrace = time.Second

// Serve listens on the node port until ctx ends, and closes ln.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	return client.Serve(ctx, tls.NewListener(ln, s.cfg.TLS.Server(nil)), s, serveGrace)
}

// windowed refuses a side that speaks other versions, and says ours in every answer.
func windowed(next http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(HeaderWindow, thisBuild().String())
		if err := thisBuild().check(r.Header.Get(HeaderWindow)); err != nil {
			refuse(w, err)
			return
		}
		next(w, r)
	})
}

// known lets nodes of the cluster in: a certificate of the authority (which the handshake has verified) whose name and id are those of a record. The record is read each time:
// a node that was removed is out at once, though its certificate is good for months.
func (s *Server) known(next func(http.ResponseWriter, *http.Request, catalog.NodeWanted)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		n, err := s.peer(r)
		if err != nil {
			refuse(w, err)
			return
		}
		next(w, r, n)
	}
}

// peer is the record of the node that asks.
func (s *Server) peer(r *http.Request) (catalog.NodeWanted, error) {
	who, err := identity.PeerOf(r.TLS)
	if err != nil {
		return catalog.NodeWanted{}, client.Failure(client.CodeFenced, "this is for nodes of the cluster, and no certificate of one was shown")
	}
	return s.recordOf(r.Context(), who)
}

// selfAnswer is what a node of the cluster is told that asks whether it still is one.
type selfAnswer struct{}

// serveSelf tells a node whether it is one of the cluster. One whose record has no id yet is (it was made anew by `ashlar recover`, and the node itself sees to that).
func (s *Server) serveSelf(w http.ResponseWriter, r *http.Request) {
	n, err := s.peer(r)
	if errors.Is(err, client.ErrFenced) && n.Name != "" && n.ID == "" {
		err = nil
	}
	if err != nil {
		refuse(w, err)
		return
	}
	answer(w, http.StatusOK, selfAnswer{})
}

// StillThere asks the other nodes that keep the catalogue whether a node still is one of the cluster: for who cannot ask the catalogue itself, which refuses a node that was removed.
// ErrRemoved if one says so; nil if one says that it is, or nobody can say.
func StillThere(ctx context.Context, t *identity.NodeTLS, s State) error {
	for _, m := range s.Members {
		at, ok := m.nodePort()
		if m.Name == s.Name || !ok {
			continue
		}
		err := ask(ctx, transport(t, Peer{Name: m.Name, Address: at}), at, question{"/node/v1/self", struct{}{}, &selfAnswer{}})
		if errors.Is(err, client.ErrFenced) {
			return fmt.Errorf("node %s (%s), says node %s: %w", s.Name, s.NodeID, m.Name, ErrRemoved)
		}
		if err == nil {
			return nil
		}
	}
	return nil
}

func (s *Server) serveJoin(w http.ResponseWriter, r *http.Request) {
	var in joinRequest
	if err := decode(r, &in); err != nil {
		refuse(w, err)
		return
	}
	out, err := s.join(r.Context(), in)
	if errors.Is(err, errNoKey) && !in.Passed {
		in.Passed = true
		err = s.elsewhere(r.Context(), question{"/node/v1/join", in, &out})
	}
	if err != nil {
		s.cfg.Log.Warn("a machine may not join", "name", in.Name, "host", in.Host, "error", err)
		refuse(w, err)
		return
	}
	s.cfg.Log.Info("a node joined", "node", in.Name, "address", Address(in.Host, in.Port, 0), "voter", out.Voter)
	answer(w, http.StatusOK, out)
}

// renewRequest is the body of POST /node/v1/renew; the name and id are those of the certificate that is shown.
type renewRequest struct {
	Request string `json:"request"` // PEM
	Host    string `json:"host"`
}

type renewAnswer struct {
	Certificate string `json:"certificate"` // PEM, with the authority's
}

func (s *Server) serveRenew(w http.ResponseWriter, r *http.Request, n catalog.NodeWanted) {
	var in renewRequest
	err := decode(r, &in)
	if err == nil && checkAddress(in.Host, DefaultPort) != nil {
		err = client.Failure(client.CodeInvalid, fmt.Sprintf("renew: host %.80q is none", in.Host))
	}
	if err == nil {
		err = s.hostIsFree(r.Context(), in.Host, n.Name)
	}
	var cert []byte
	if err == nil {
		cert, err = s.sign(in, n)
	}
	if err != nil {
		refuse(w, err)
		return
	}
	answer(w, http.StatusOK, renewAnswer{Certificate: string(cert)})
}

// sign signs for the node that asks.
func (s *Server) sign(in renewRequest, n catalog.NodeWanted) ([]byte, error) {
	authority, err := s.cfg.Dir.Authority(s.cfg.Now)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, client.Failure(client.CodeUnreachable, "renew: "+errNoKey.Error()+"; ask a voter")
	}
	if err != nil {
		return nil, err
	}
	return authority.SignNode([]byte(in.Request), identity.Node{ClusterID: s.cfg.State.ClusterID, NodeID: n.ID, Name: n.Name, Host: in.Host})
}

// hostIsFree refuses a host that is another node's name: certificates name hosts too, and nobody shall show one with the name of somebody else.
func (s *Server) hostIsFree(ctx context.Context, host, name string) error {
	nodes, _, err := catalog.All[catalog.NodeWanted](ctx, s.cfg.Catalog, catalog.KindNode, catalog.Wanted)
	if err == nil && slices.ContainsFunc(nodes, func(n catalog.Item[catalog.NodeWanted]) bool {
		return strings.EqualFold(n.Key.Name, host) && n.Key.Name != name
	}) {
		err = client.Failure(client.CodeInvalid, fmt.Sprintf("%s is another node's name, and cannot be the host of node %s; use its address", host, name))
	}
	return err
}

// authorityAnswer is what a voter is given.
type authorityAnswer struct {
	AuthorityKey string `json:"authorityKey"` // PEM, with the certificate
}

func (s *Server) serveAuthority(w http.ResponseWriter, _ *http.Request, n catalog.NodeWanted) {
	if !n.Voter || n.Deleted != nil {
		refuse(w, client.Failure(client.CodeFenced, fmt.Sprintf("node %s is no voter, and only voters have the authority's key", n.Name)))
		return
	}
	authority, err := s.cfg.Dir.Authority(s.cfg.Now)
	if errors.Is(err, fs.ErrNotExist) {
		err = client.Failure(client.CodeUnreachable, errNoKey.Error()+"; ask a voter")
	}
	var key []byte
	if err == nil {
		key, err = authority.Bundle()
	}
	if err != nil {
		refuse(w, err)
		return
	}
	answer(w, http.StatusOK, authorityAnswer{AuthorityKey: string(key)})
}

// elsewhere has a node that may have the authority's key answer.
func (s *Server) elsewhere(ctx context.Context, q question) error {
	peers, err := Peers(ctx, s.cfg.Catalog, s.cfg.State.Name)
	if err != nil {
		return err
	}
	return askVoters(ctx, s.cfg.TLS, peers, q)
}

// askVoters asks the nodes that may have the authority's key, voters first, until one answers.
func askVoters(ctx context.Context, t *identity.NodeTLS, peers []KnownPeer, q question) error {
	var failed []error
	for _, voter := range []bool{true, false} {
		for _, p := range peers {
			if p.Voter != voter {
				continue
			}
			err := ask(ctx, transport(t, p.Peer), p.Address, q)
			if err == nil || !errors.Is(err, client.ErrUnreachable) {
				return err
			}
			failed = append(failed, err)
		}
	}
	if len(failed) == 0 {
		return fmt.Errorf("no node with the authority's key is known: %w", client.ErrUnreachable)
	}
	return errors.Join(failed...)
}

// KnownPeer is another node as its records say.
type KnownPeer struct {
	Peer
	Voter bool
}

// Peers are the other nodes of the cluster whose address is known, sorted by name.
func Peers(ctx context.Context, c catalog.Catalog, self string) ([]KnownPeer, error) {
	entries, _, err := c.List(ctx, catalog.KindNode)
	if err != nil {
		return nil, err
	}
	wanted, at := map[string]catalog.NodeWanted{}, map[string]string{}
	for _, e := range entries {
		if e.Key.Part == catalog.Wanted {
			it, err := catalog.Decode[catalog.NodeWanted](e)
			if err != nil {
				return nil, err
			}
			wanted[e.Key.Name] = it.Value
			continue
		}
		it, err := catalog.Decode[catalog.NodeObserved](e)
		if err != nil {
			return nil, err
		}
		if it.Value.Port != 0 {
			at[e.Key.Name] = Address(it.Value.Address, it.Value.Port, catalog.PortNode)
		}
	}
	var out []KnownPeer
	for _, name := range slices.Sorted(maps.Keys(wanted)) {
		if n := wanted[name]; name != self && n.ID != "" && n.Deleted == nil && at[name] != "" {
			out = append(out, KnownPeer{Peer{Name: name, NodeID: n.ID, Address: at[name]}, n.Voter})
		}
	}
	return out, nil
}

// PeerOf is another node as its records say: catalog.ErrNotFound if there is none, or it was never seen.
func PeerOf(ctx context.Context, c catalog.Catalog, name string) (Peer, error) {
	n, _, err := catalog.Read[catalog.NodeWanted](ctx, c, catalog.NodeKey(catalog.Wanted, name))
	if err != nil {
		return Peer{}, err
	}
	o, _, err := catalog.Read[catalog.NodeObserved](ctx, c, catalog.NodeKey(catalog.Observed, name))
	if err == nil && (o.Port == 0 || n.ID == "") {
		err = fmt.Errorf("node %s is in no cluster: %w", name, catalog.ErrNotFound)
	}
	return Peer{Name: name, NodeID: n.ID, Address: Address(o.Address, o.Port, catalog.PortNode)}, err
}

// Transport carries requests to one other node, whatever host they name, showing this node's certificate and asking for that one's.
func Transport(t *identity.NodeTLS, p Peer) http.RoundTripper {
	return windowTransport{transport(t, p)}
}

// windowTransport says our window in every request, and refuses a side without ours.
type windowTransport struct{ to *http.Transport }

// RoundTrip implements http.RoundTripper.
func (t windowTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(HeaderWindow, thisBuild().String())
	res, err := t.to.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if err := thisBuild().check(res.Header.Get(HeaderWindow)); err != nil {
		return nil, errors.Join(err, res.Body.Close())
	}
	return res, nil
}

// fromEtcd turns etcd's members into what nodes keep of them: those that started, and those with a place by their address.
func fromEtcd(members []etcd.MemberInfo) []Member {
	var out []Member
	for _, m := range members {
		x := Member{Name: m.Name, PeerURL: m.PeerURL}
		if len(m.ClientURLs) > 0 {
			x.ClientURL = m.ClientURLs[0]
		}
		out = append(out, x)
	}
	slices.SortFunc(out, byName)
	return out
}
