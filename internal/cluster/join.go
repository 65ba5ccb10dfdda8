package cluster

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/identity"
)

// This file is both ends of joining: Join on the machine that comes, Server.join on the node that answers.

// joinRequest is the body of POST /node/v1/join.
type joinRequest struct {
	Secret  string                        `json:"secret"`  // of the join token
	Name    string                        `json:"name"`    // the joiner's
	NodeID  string                        `json:"nodeID"`  // chosen by the joiner, so that it can ask again
	Request string                        `json:"request"` // for its certificate, PEM
	Host    string                        `json:"host"`
	Port    int                           `json:"port"`
	Disks   map[string]catalog.DiskWanted `json:"disks"`
	Zone    string                        `json:"zone,omitempty"`
	Time    time.Time                     `json:"time"` // on its clock
	// Passed: a node without the authority's key passed it on, and is not to get it back.
	Passed bool `json:"passed,omitempty"`

	repeated bool // its token is used, by itself
}

// joinAnswer is what is answered.
type joinAnswer struct {
	ClusterID    string    `json:"clusterID"`
	Certificate  string    `json:"certificate"`            // PEM, with the authority's
	Authority    string    `json:"authority"`              // PEM
	AuthorityKey string    `json:"authorityKey,omitempty"` // PEM, of a joiner that is to be a voter
	Voter        bool      `json:"voter"`                  // there is a place among etcd's members for it
	Members      []Member  `json:"members"`
	Time         time.Time `json:"time"` // on the clock of who answers
}

// maxSkew is how far the clocks of two nodes may be apart: certificates are good from an hour before they are made.
const maxSkew = time.Hour

// maxDisks bounds how many disks a joiner may say it has.
const maxDisks = 256

// check refuses what makes no sense, whoever says it.
func (r *joinRequest) check() error {
	err := errors.Join(CheckName(r.Name), checkAddress(r.Host, r.Port))
	switch {
	case err != nil:
	case !validID(r.NodeID):
		err = errors.New("nodeID is not 32 hex digits")
	case len(r.Secret) > 100 || len(r.Zone) > 100:
		err = errors.New("the secret or the zone is too long")
	case len(r.Disks) > maxDisks:
		err = fmt.Errorf("%d disks, at most %d are taken", len(r.Disks), maxDisks)
	}
	if err != nil {
		return client.Failure(client.CodeInvalid, fmt.Sprintf("join: %v", err))
	}
	return nil
}

// skew tells how a clock differs from ours, in words for people; "" within maxSkew.
func skew(whose string, theirs, ours time.Time) string {
	d := theirs.Sub(ours).Round(time.Second)
	if d.Abs() <= maxSkew {
		return ""
	}
	way := "ahead of"
	if d < 0 {
		way = "behind"
	}
	return fmt.Sprintf("%s clock is %s %s this one's (%s there, %s here); nodes take an hour at most: set it (and have it kept, by chrony or systemd-timesyncd), then join again",
		whose, d.Abs(), way, theirs.UTC().Format(time.RFC3339), ours.UTC().Format(time.RFC3339))
}

// JoinConfig is what Join needs.
type JoinConfig struct {
	Dir   Dir
	To    string // HOST:PORT of any node of the cluster
	Token string
	Name  string // this node's
	Host  string
	Port  int
	// Disks are this node's, all empty, and OwnID its cluster of one, which it gives up; "": it has none, because its catalogue is the cluster's already.
	Disks map[string]catalog.DiskWanted
	OwnID string
	Zone  string
	Now   func() time.Time // nil: time.Now
}

// joining is joining.json: under which id, and with which key, a join was begun, so that it can be repeated when the answer was lost.
type joining struct {
	NodeID      string `json:"nodeID"`
	Name        string `json:"name"`
	Fingerprint string `json:"fingerprint"` // of the cluster's authority
	Key         string `json:"key"`
	Request     string `json:"request"`
}

// Join makes this machine a node of the cluster that a token is of. On a node of that very cluster it does nothing, or, if its certificate has ended, gets it another: the node goes on as it
// is (ErrRemoved if it was removed). The caller has seen to it that nothing is on it (ErrRemains). Afterwards node.json says who the node is, and
// the node is built anew from it; until then nothing has changed here. It may be repeated after a failure, with the same token. identity.ErrJoinToken, ErrFingerprint; ErrAddress; ErrIn; ErrClock;
// client.ErrVersion, ErrUnreachable, and what the cluster refuses: ErrNotFound, ErrConflict (the token), ErrExists (the name), ErrInvalid.
func Join(ctx context.Context, cfg JoinConfig) (State, error) {
	cfg.Now = orNow(cfg.Now)
	token, err := identity.ParseJoinToken(cfg.Token)
	if err != nil {
		return State{}, err
	}
	if s, err := cfg.Dir.Load(); err == nil {
		return s, joinAgain(ctx, cfg, s, token)
	} else if !errors.Is(err, ErrNone) {
		return s, err
	}
	if err := errors.Join(CheckName(cfg.Name), checkAddress(cfg.Host, cfg.Port)); err != nil {
		return State{}, err
	}
	if err := FreePorts(ctx, cfg.Host, cfg.Port); err != nil {
		return State{}, err
	}
	host, port, err := ParseAddress(cfg.To)
	if err != nil {
		return State{}, err
	}
	begun, err := cfg.Dir.begin(cfg.Name, token.Fingerprint)
	if err != nil {
		return State{}, err
	}
	a, err := askToJoin(ctx, cfg, token, joinRequest{
		Secret: token.Secret, Name: cfg.Name, NodeID: begun.NodeID, Request: begun.Request, Host: cfg.Host, Port: cfg.Port, Disks: cfg.Disks, Zone: cfg.Zone, Time: cfg.Now().UTC(),
	}, Address(host, port, 0))
	if err != nil {
		return State{}, err
	}
	s := State{
		ClusterID: a.ClusterID, NodeID: begun.NodeID, Name: cfg.Name, Host: cfg.Host, Port: cfg.Port, Voter: a.Voter, Members: a.Members,
	}
	if cfg.OwnID != "" {
		s.Discard = &Discard{ClusterID: cfg.OwnID}
		for _, name := range slices.Sorted(maps.Keys(cfg.Disks)) {
			s.Discard.Disks = append(s.Discard.Disks, cfg.Disks[name].Path)
		}
	}
	return s, cfg.Dir.take(s, begun, a)
}

// askToJoin asks the node at an address, once it is known to be of the token's cluster.
func askToJoin(ctx context.Context, cfg JoinConfig, token identity.JoinToken, in joinRequest, address string) (joinAnswer, error) {
	var a joinAnswer
	via := &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: token.TLS(), TLSHandshakeTimeout: dialTimeout,
		DialContext: (&net.Dialer{Timeout: dialTimeout}).DialContext,
	}
	if err := ask(ctx, via, address, question{"/node/v1/join", in, &a}); err != nil {
		return a, fmt.Errorf("join: %w", err)
	}
	if words := skew("the other node's", a.Time, cfg.Now()); words != "" {
		return a, fmt.Errorf("%w: %s", ErrClock, words)
	}
	authority, err := identity.ParseCertificate([]byte(a.Authority))
	if err == nil && identity.Fingerprint(authority) != token.Fingerprint {
		err = identity.ErrFingerprint
	}
	if err == nil && !validID(a.ClusterID) {
		err = fmt.Errorf("cluster id %.40q", a.ClusterID)
	}
	if err != nil {
		return a, fmt.Errorf("join: what %s answered: %w", address, err)
	}
	return a, nil
}

// begin returns what a join is to be repeated with, and makes it the first time.
func (d Dir) begin(name, fingerprint string) (joining, error) {
	var j joining
	data, err := os.ReadFile(d.Path(joiningFile))
	if err == nil && json.Unmarshal(data, &j) == nil && j.Name == name && j.Fingerprint == fingerprint && validID(j.NodeID) {
		return j, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return j, err
	}
	key, request, err := identity.NewNodeRequest()
	if err != nil {
		return j, err
	}
	j = joining{NodeID: newID(), Name: name, Fingerprint: fingerprint, Key: string(key), Request: string(request)}
	if data, err = json.Marshal(j); err != nil {
		return j, err
	}
	return j, d.put(joiningFile, data, 0o600)
}

// take puts what was answered in place; node.json, which makes it so, comes last.
func (d Dir) take(s State, begun joining, a joinAnswer) error {
	if a.AuthorityKey != "" {
		if err := d.put(caKeyFile, []byte(a.AuthorityKey), 0o600); err != nil {
			return err
		}
	}
	if err := errors.Join(d.put(caFile, []byte(a.Authority), 0o644), d.keepCertificate([]byte(begun.Key), []byte(a.Certificate))); err != nil {
		return err
	}
	if _, err := d.TLS(nil); err != nil {
		return fmt.Errorf("join: what was answered is of no use: %w", err)
	}
	return errors.Join(d.Save(s), d.remove(joiningFile))
}

// join answers a machine that wants to be a node.
func (s *Server) join(ctx context.Context, in joinRequest) (joinAnswer, error) {
	var none joinAnswer
	if err := in.check(); err != nil {
		return none, err
	}
	now := s.cfg.Now().UTC()
	token, err := s.findToken(ctx, in, now)
	if err != nil {
		return none, err
	}
	in.repeated = !token.Value.Used.IsZero()
	if words := skew("node "+in.Name+"'s", in.Time, now); words != "" {
		return none, client.Failure(client.CodeConflict, "join: "+words)
	}
	authority, err := s.cfg.Dir.Authority(s.cfg.Now)
	if errors.Is(err, fs.ErrNotExist) {
		return none, errNoKey
	}
	if err != nil {
		return none, err
	}
	if err := s.nameIsFree(ctx, in); err != nil {
		return none, err
	}
	if err := s.hostIsFree(ctx, in.Host, in.Name); err != nil {
		return none, err
	}
	cert, err := authority.SignNode([]byte(in.Request), identity.Node{ClusterID: s.cfg.State.ClusterID, NodeID: in.NodeID, Name: in.Name, Host: in.Host})
	if err != nil {
		return none, err
	}
	if err := s.useToken(ctx, token, in, now); err != nil {
		return none, err
	}
	voter, err := s.admit(ctx, in)
	if err != nil {
		return none, err
	}
	a := joinAnswer{ClusterID: s.cfg.State.ClusterID, Certificate: string(cert), Authority: string(authority.CertificatePEM()), Time: now}
	if voter {
		key, err := authority.Bundle()
		if err != nil {
			return none, err
		}
		a.AuthorityKey = string(key)
		a.Voter = s.makePlace(ctx, in)
	}
	a.Members, err = s.members(ctx)
	return a, err
}

// errNoKey: this node cannot sign.
var errNoKey = client.Failure(client.CodeUnreachable, "this node does not have the authority's key")

// findToken finds the join token that a secret is of, and refuses one that is not good for this joiner.
func (s *Server) findToken(ctx context.Context, in joinRequest, now time.Time) (catalog.Item[catalog.Join], error) {
	tokens, _, err := catalog.All[catalog.Join](ctx, s.cfg.Catalog, catalog.KindJoin, catalog.Wanted)
	if err != nil {
		return catalog.Item[catalog.Join]{}, err
	}
	var found catalog.Item[catalog.Join]
	for _, t := range tokens { // all are compared, always
		if identity.TokenMatches(in.Secret, t.Value.SHA256) {
			found = t
		}
	}
	refused := func(code client.Code, format string, args ...any) (catalog.Item[catalog.Join], error) {
		return found, client.Failure(code, "join: "+fmt.Sprintf(format, args...)+"; make another with `ashlar cluster token`")
	}
	t := found.Value
	switch {
	case found.Rev == 0:
		return refused(client.CodeNotFound, "the token is of this cluster, but not known (any more): it was deleted, or it expired long ago")
	case !now.Before(t.Expires):
		return refused(client.CodeConflict, "the token expired at %s (it is %s here)", t.Expires.Format(time.RFC3339), now.Format(time.RFC3339))
	case t.Used.IsZero() || t.UsedNodeID == in.NodeID && t.UsedBy == in.Name:
		return found, nil
	}
	return refused(client.CodeConflict, "the token was used by node %s at %s, and a token is good once", t.UsedBy, t.Used.Format(time.RFC3339))
}

// useToken records who used a token, before anything is done for it. Who is slower than another with the same token is refused.
func (s *Server) useToken(ctx context.Context, token catalog.Item[catalog.Join], in joinRequest, now time.Time) error {
	t := token.Value
	if !t.Used.IsZero() {
		return nil // by the same, as findToken saw
	}
	t.Used, t.UsedBy, t.UsedNodeID = now, in.Name, in.NodeID
	_, err := catalog.Write(ctx, s.cfg.Catalog, token.Key, t, token.Rev)
	if errors.Is(err, catalog.ErrConflict) {
		return client.Failure(client.CodeConflict, "join: the token was used by somebody else just now")
	}
	return err
}

// nameIsFree refuses a name that another node has.
func (s *Server) nameIsFree(ctx context.Context, in joinRequest) error {
	n, _, err := catalog.Read[catalog.NodeWanted](ctx, s.cfg.Catalog, catalog.NodeKey(catalog.Wanted, in.Name))
	switch {
	case errors.Is(err, catalog.ErrNotFound):
		return nil
	case err != nil:
		return err
	case n.Deleted == nil && (n.ID == in.NodeID && (in.repeated || !s.seen(ctx, in.Name)) || n.ID == "" && !s.cfg.Embedded): // with an etcd that was there before, its serve made the record
		return nil
	case n.Deleted != nil:
		return client.Failure(client.CodeExists, fmt.Sprintf("join: a node called %s is being removed; wait until it is gone, or give this one another name (serve --name)", in.Name))
	}
	return client.Failure(client.CodeExists, fmt.Sprintf("join: there is a node called %s already; give this one another name (serve --name), or remove that one first (`ashlar node remove %s`)", in.Name, in.Name))
}

// seen tells whether a node was ever there. The id of one that was is known to others, and its certificate is for nobody who has no more than a token: see rejoin.
func (s *Server) seen(ctx context.Context, name string) bool {
	_, _, err := catalog.Read[catalog.NodeObserved](ctx, s.cfg.Catalog, catalog.NodeKey(catalog.Observed, name))
	return !errors.Is(err, catalog.ErrNotFound)
}

// admit makes the node's record, and decides whether it is to be a voter: while there are fewer than MaxVoters. Of two that are admitted at once the later one gives way.
func (s *Server) admit(ctx context.Context, in joinRequest) (voter bool, err error) {
	key := catalog.NodeKey(catalog.Wanted, in.Name)
	n := catalog.NodeWanted{Name: in.Name, ID: in.NodeID, AllowScheduling: true, Zone: in.Zone, Disks: in.Disks}
	if n.Disks == nil {
		n.Disks = map[string]catalog.DiskWanted{}
	}
	ahead, err := s.voters(ctx, key)
	if err != nil {
		return false, err
	}
	n.Voter = s.cfg.Embedded && len(ahead) < MaxVoters
	rev, err := catalog.Write(ctx, s.cfg.Catalog, key, n, 0)
	if errors.Is(err, catalog.ErrConflict) {
		if err := s.nameIsFree(ctx, in); err != nil {
			return false, err
		}
		n, rev, err = catalog.Update(ctx, s.cfg.Catalog, key, func(n *catalog.NodeWanted) error {
			if n.ID == "" {
				n.ID = in.NodeID
			}
			return nil
		})
	}
	if err != nil || !n.Voter {
		return false, err
	}
	if ahead, err = s.voters(ctx, key); err != nil {
		return false, err
	}
	before := 0
	for _, v := range ahead {
		if v.Rev < rev {
			before++
		}
	}
	if before < MaxVoters {
		return true, nil
	}
	_, _, err = catalog.Update(ctx, s.cfg.Catalog, key, func(n *catalog.NodeWanted) error { n.Voter = false; return nil })
	return false, err
}

// voters are the nodes that are to keep the catalogue, but one.
func (s *Server) voters(ctx context.Context, but catalog.Key) ([]catalog.Item[catalog.NodeWanted], error) {
	nodes, _, err := catalog.All[catalog.NodeWanted](ctx, s.cfg.Catalog, catalog.KindNode, catalog.Wanted)
	return slices.DeleteFunc(nodes, func(n catalog.Item[catalog.NodeWanted]) bool {
		return n.Key == but || !n.Value.Voter || n.Value.Deleted != nil
	}), err
}

// makePlace has the joiner's member admitted as a learner, so that it can start as one at once. That it cannot be done now (another learner is under way) is no failure: the
// joiner sees to it later.
func (s *Server) makePlace(ctx context.Context, in joinRequest) bool {
	place := State{Name: in.Name, Host: in.Host, Port: in.Port}.Self()
	if _, err := s.cfg.Etcd.AddLearner(ctx, place.Name, place.PeerURL); err != nil {
		s.cfg.Log.Warn("no place yet for a member of the catalogue; the node asks again", "node", in.Name, "error", err)
		return false
	}
	return true
}

// members are etcd's, for a node that starts.
func (s *Server) members(ctx context.Context) ([]Member, error) {
	if !s.cfg.Embedded {
		return nil, nil
	}
	members, err := s.cfg.Etcd.Members(ctx)
	return fromEtcd(members), err
}

func orNow(now func() time.Time) func() time.Time {
	if now == nil {
		return time.Now
	}
	return now
}

// byName sorts members.
func byName(a, b Member) int { return cmp.Compare(a.Name, b.Name) }
