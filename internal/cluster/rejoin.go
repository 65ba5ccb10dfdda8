package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/identity"
)

// This file is both ends of coming back: a node whose certificate ended while it was off, and that has no key to sign another with, is given one for a join token. It keeps its name, its id
// and all it has.

// rejoinRequest is the body of POST /node/v1/rejoin.
type rejoinRequest struct {
	Secret  string `json:"secret"` // of the join token
	Name    string `json:"name"`
	NodeID  string `json:"nodeID"`
	Host    string `json:"host"`
	Request string `json:"request"` // for its new certificate, PEM
	// Certificate is the one that ended, PEM, and Signature what its key says of Request (identity.NodeTLS.Vouch): a token alone makes nobody another node.
	Certificate string    `json:"certificate"`
	Signature   []byte    `json:"signature"`
	Time        time.Time `json:"time"` // on its clock
	// Passed: see joinRequest.
	Passed bool `json:"passed,omitempty"`
}

// rejoinAnswer is what is answered.
type rejoinAnswer struct {
	Certificate string    `json:"certificate"` // PEM, with the authority's
	Time        time.Time `json:"time"`        // on the clock of who answers
}

// Ended tells whether a node's certificate has ended, so that only Join with a new token helps a node that has no key of the authority's.
func Ended(t *identity.NodeTLS, now func() time.Time) bool {
	leaf, err := t.Leaf()
	return err == nil && orNow(now)().After(leaf.NotAfter)
}

// joinAgain is Join on a node that is in the token's cluster: nothing is to be done, or its certificate has ended.
func joinAgain(ctx context.Context, cfg JoinConfig, s State, token identity.JoinToken) error {
	t, err := cfg.Dir.TLS(nil)
	if err != nil || identity.Fingerprint(t.Authority()) != token.Fingerprint {
		return fmt.Errorf("%w: it is %s at %s in cluster %s, and not of the cluster that the token is of", ErrIn, s.Name, Address(s.Host, s.Port, 0), s.ClusterID)
	}
	if !Ended(t, cfg.Now) {
		return nil // also: the answer was taken, and whoever asked did not hear of it
	}
	host, port, err := ParseAddress(cfg.To)
	if err != nil {
		return err
	}
	key, request, err := identity.NewNodeRequest()
	if err != nil {
		return err
	}
	cert, signature, err := t.Vouch(request)
	if err != nil {
		return err
	}
	via := &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: token.TLS(), TLSHandshakeTimeout: dialTimeout,
		DialContext: (&net.Dialer{Timeout: dialTimeout}).DialContext,
	}
	var a rejoinAnswer
	err = ask(ctx, via, Address(host, port, 0), question{"/node/v1/rejoin", rejoinRequest{
		Secret: token.Secret, Name: s.Name, NodeID: s.NodeID, Host: s.Host, Request: string(request), Certificate: string(cert), Signature: signature, Time: cfg.Now().UTC(),
	}, &a})
	switch {
	case errors.Is(err, client.ErrFenced):
		return fmt.Errorf("join again: %w: %w", ErrRemoved, err)
	case err != nil:
		return fmt.Errorf("join again: %w", err)
	}
	if words := skew("the other node's", a.Time, cfg.Now()); words != "" {
		return fmt.Errorf("%w: %s", ErrClock, words)
	}
	return cfg.Dir.keepCertificate(key, []byte(a.Certificate))
}

func (s *Server) serveRejoin(w http.ResponseWriter, r *http.Request) {
	var in rejoinRequest
	if err := decode(r, &in); err != nil {
		refuse(w, err)
		return
	}
	out, err := s.rejoin(r.Context(), in)
	if errors.Is(err, errNoKey) && !in.Passed {
		in.Passed = true
		err = s.elsewhere(r.Context(), question{"/node/v1/rejoin", in, &out})
	}
	if err != nil {
		s.cfg.Log.Warn("a node may not come back", "name", in.Name, "host", in.Host, "error", err)
		refuse(w, err)
		return
	}
	s.cfg.Log.Info("a node whose certificate had ended came back", "node", in.Name)
	answer(w, http.StatusOK, out)
}

// rejoin answers a node whose certificate has ended.
func (s *Server) rejoin(ctx context.Context, in rejoinRequest) (rejoinAnswer, error) {
	var none rejoinAnswer
	as := joinRequest{Secret: in.Secret, Name: in.Name, NodeID: in.NodeID, Host: in.Host, Port: DefaultPort}
	if err := as.check(); err != nil {
		return none, err
	}
	now := s.cfg.Now().UTC()
	token, err := s.findToken(ctx, as, now)
	if err != nil {
		return none, err
	}
	if words := skew("node "+in.Name+"'s", in.Time, now); words != "" {
		return none, client.Failure(client.CodeConflict, "join again: "+words)
	}
	authority, err := s.cfg.Dir.Authority(s.cfg.Now)
	if errors.Is(err, fs.ErrNotExist) {
		return none, errNoKey
	}
	if err != nil {
		return none, err
	}
	who, err := authority.Vouched([]byte(in.Request), []byte(in.Certificate), in.Signature)
	if err != nil {
		return none, err
	}
	n, err := s.recordOf(ctx, who)
	if err == nil && (who.Name != in.Name || who.NodeID != in.NodeID) {
		err = client.Failure(client.CodeInvalid, fmt.Sprintf("join again: the certificate is of node %s (%s), and node %s (%s) asks", who.Name, who.NodeID, in.Name, in.NodeID))
	}
	if err == nil && n.Deleted != nil {
		err = client.Failure(client.CodeConflict, fmt.Sprintf("join again: node %s is being removed", in.Name))
	}
	if err == nil {
		err = s.hostIsFree(ctx, in.Host, in.Name)
	}
	if err != nil {
		return none, err
	}
	cert, err := authority.SignNode([]byte(in.Request), identity.Node{ClusterID: s.cfg.State.ClusterID, NodeID: n.ID, Name: n.Name, Host: in.Host})
	if err != nil {
		return none, err
	}
	return rejoinAnswer{Certificate: string(cert), Time: now}, s.useToken(ctx, token, as, now)
}

// recordOf is the record of a node whose certificate was verified, whoever showed it: client.ErrFenced if it is none of the cluster.
func (s *Server) recordOf(ctx context.Context, who identity.Node) (catalog.NodeWanted, error) {
	n, _, err := catalog.Read[catalog.NodeWanted](ctx, s.cfg.Catalog, catalog.NodeKey(catalog.Wanted, who.Name))
	switch {
	case errors.Is(err, catalog.ErrNotFound):
	case err != nil:
		return n, err
	case n.ID == who.NodeID && who.ClusterID == s.cfg.State.ClusterID:
		return n, nil
	}
	return n, client.Failure(client.CodeFenced, fmt.Sprintf("node %s (%s) is none of this cluster: it was removed, or another has its name", who.Name, who.NodeID))
}
