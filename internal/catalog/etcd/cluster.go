package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"

	"ashlar/internal/catalog"
)

// The clock of one of several members. A leader says every heartbeat that it is there; who hears nothing for an election's length (and up to twice that, by
// chance) stands for election. 100 ms and 1 s are etcd's defaults and right for a LAN, whose round trips are below 1 ms, and on loopback: the length is for disks, not for
// the network. A leader whose fdatasync takes 300 ms, as a busy disk's does, must not lose its place; one that died is replaced within 1 to 2 s, a third of catalog.AliveTTL.
const (
	clusterTickMS     = 100
	clusterElectionMS = 1000
	// clusterCatchUp is how many entries a member may have missed and still be given one by one; more, and it gets the database as a whole.
	clusterCatchUp = 5000
	// maxLearners: one that never comes must not keep others out.
	maxLearners = 5
)

// Member says how the embedded member is reached by others: a member of several, or one that others may join. Without it (Options.Member nil) the member is
// alone and listens nowhere. A directory written alone becomes a clustered one by being opened with a Member, and keeps its records and revisions. Addresses
// and name may differ from those of the last start: the member tells the others.
type Member struct {
	Name         string // the node's
	PeerListen   string // IP:port; no IP: all
	ClientListen string // IP:port; no IP: all
	PeerURL      string // https://host:port, where the other members reach it
	ClientURL    string // https://host:port, where every node's client reaches it
	Files        Files  // certificate for both, as server and as client
	// Admit says who may connect, to either port, given a certificate that the authority signed; nil: everybody. It is asked at each handshake, which waits for it, from many
	// goroutines. It may ask the Store, for some seconds at most, but not about this member itself, whose own connections the Store needs. Store.Expel is for who is connected already.
	Admit func(*x509.Certificate) error
	// Members are the members as last seen, also this one. If Dir holds no member yet and somebody else is in it, the member joins them: AddLearner must have been
	// said of it before. Empty or only this one: it is the first, or its directory knows.
	Members []Peer
	// ForceNew makes the member the only one of its cluster, whatever its directory says of others: after the majority was lost for good. What it has is kept; what only
	// the others had is gone. Once.
	ForceNew bool
}

// Peer is a member as others know it.
type Peer struct {
	Name      string
	PeerURL   string
	ClientURL string
}

// Files are PEM files of a certificate, its key, and the authority whose certificates are believed. Certificate and key are read at every handshake, so whoever
// replaces them needs no restart; the authority's is read once.
type Files struct {
	Cert, Key, CA string
}

// MemberInfo is a member as the cluster sees it.
type MemberInfo struct {
	ID          uint64
	Name        string // "": it never started
	PeerURL     string
	ClientURLs  []string // none: it never started
	Learner     bool     // it gets everything and has no vote yet
	Alive       bool     // it answered
	Leader      bool
	DBSizeBytes int64
}

// State is what the embedded member is doing.
type State string

// The states.
const (
	StateNone     State = "none"     // the etcd is not ours
	StateAlone    State = "alone"    // a member that listens nowhere
	StateStarting State = "starting" // it has not heard from the others yet
	StateLearner  State = "learner"  // it catches up and has no vote
	StateVoter    State = "voter"
	StateFailed   State = "failed"  // it stopped by itself, for example because its disk is full; the error says why
	StateRemoved  State = "removed" // the others removed it
)

var (
	// ErrRemoved: the others do not count this member among them (any more), so its directory is of no use. Rejoin, then Open.
	ErrRemoved = errors.New("not a member of its cluster any more")
	// ErrEmptied: the others count this member among them, but its directory holds nothing: it may not vote, having forgotten what it acknowledged. Rejoin, then Open.
	ErrEmptied = errors.New("the member's directory is empty")
	// ErrLastVoter: a cluster keeps at least one voter.
	ErrLastVoter = errors.New("the last voter of a cluster cannot be removed")
	// ErrNoMember: no member has that name.
	ErrNoMember = errors.New("no such member")
	// ErrQuorum: etcd refuses the change because too few members would be there to agree. Bring members back first.
	ErrQuorum = errors.New("too few members would be left to agree")
)

// check holds what Open needs of a Member.
func (m *Member) check() error {
	bad := func(what, got string) error { return fmt.Errorf("etcd: member's %s %q: %w", what, got, ErrOptions) }
	if m.Name == "" {
		return bad("name", m.Name)
	}
	for what, u := range map[string]string{"peer URL": m.PeerURL, "client URL": m.ClientURL} {
		if p, err := url.Parse(u); err != nil || p.Scheme != "https" || p.Port() == "" {
			return bad(what, u)
		}
	}
	for what, a := range map[string]string{"address for peers": m.PeerListen, "address for clients": m.ClientListen} {
		host, port, err := net.SplitHostPort(a)
		if err != nil || port == "" || host != "" && net.ParseIP(host) == nil {
			return bad(what, a)
		}
	}
	return nil
}

// others returns the members that are not this one.
func (m *Member) others() []Peer {
	return slices.DeleteFunc(slices.Clone(m.Members), func(p Peer) bool { return p.Name == m.Name || p.PeerURL == m.PeerURL })
}

func (f Files) info() transport.TLSInfo {
	return transport.TLSInfo{
		CertFile: f.Cert, KeyFile: f.Key, TrustedCAFile: f.CA, ClientCertAuth: true,
		MinVersion:          tls.VersionTLS13,
		SkipClientSANVerify: true, // a certificate names a node, and a node may have more addresses than its certificate says
	}
}

// client is the configuration of a client that shows the certificate; changed files count at the next handshake.
func (f Files) client() (*tls.Config, error) {
	c, err := f.info().ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("certificate %s: %w", f.Cert, err)
	}
	return c, nil
}

// openClustered starts the member and asks all.
func (s *Store) openClustered(ctx context.Context, o Options) error {
	m := o.Member
	tc, err := m.Files.client()
	if err != nil {
		return err
	}
	d := dialer{tls: tc, log: o.Log}
	others := m.others()
	mem := newMember(o.Log)
	err = mem.startClustered(ctx, o, d)
	switch {
	case err == nil:
		s.follow(mem)
	case errors.Is(err, ErrRemoved) || errors.Is(err, ErrEmptied) || errors.Is(err, ErrInUse) || len(others) == 0:
		return err
	default: // the others are there
		o.Log.Error("the catalogue's member on this node does not start", "error", err)
		mem.gaveUp(err)
		close(mem.stopped)
		mem.begun = true
	}
	s.member = mem
	urls := []string{m.ClientURL}
	for _, p := range others {
		urls = append(urls, p.ClientURL)
	}
	s.router = newRouter(s, d.dial, urls)
	s.router.own, s.router.sync, s.router.why = m.ClientURL, true, d.why
	s.options = m
	s.workers.Go(s.router.run)
	return nil
}

const (
	// joinTries and joinWait are for a member that joins while another does: etcd asks any member who is one, and that one may not know yet what was agreed.
	joinTries = 20
	joinWait  = 250 * time.Millisecond
)

// startClustered starts the member; it may not be ready yet.
func (m *member) startClustered(ctx context.Context, o Options, d dialer) error {
	for tries := 1; ; tries++ {
		joins := !started(o.Dir) && len(o.Member.others()) > 0
		err := m.startOnce(ctx, o, d)
		select {
		case <-m.failed: // it gave up by itself
			return err
		default:
		}
		if err == nil || !joins || started(o.Dir) || tries == joinTries || errors.Is(err, ErrRemoved) || errors.Is(err, ErrEmptied) || errors.Is(err, ErrInUse) {
			return err
		}
		o.Log.Warn("the catalogue's member on this node cannot join yet; trying again", "error", err)
		again := time.NewTimer(joinWait)
		select {
		case <-ctx.Done():
			again.Stop()
			return err
		case <-again.C:
		}
	}
}

func (m *member) startOnce(ctx context.Context, o Options, d dialer) error {
	cfg, err := clusteredConfig(o)
	if err != nil {
		return err
	}
	if !started(o.Dir) && len(o.Member.others()) > 0 {
		cfg.ClusterState = embed.ClusterStateFlagExisting
		if cfg.InitialCluster, err = joining(ctx, o.Member, o.Member.others(), d); err != nil {
			return err
		}
	}
	if m.ports, err = listen(o.Member); err != nil {
		return err
	}
	if err := m.start(o.Dir, cfg); err != nil {
		m.ports.close()
		return err
	}
	m.ports.serve(m.etcd.Server)
	return nil
}

func clusteredConfig(o Options) (*embed.Config, error) {
	m := o.Member
	cfg := config(o.Dir)
	cfg.Name = m.Name
	cfg.ListenPeerUrls, cfg.ListenClientUrls = nil, nil // ports.go
	for _, a := range []struct {
		to   *[]url.URL
		from string
	}{{&cfg.AdvertisePeerUrls, m.PeerURL}, {&cfg.AdvertiseClientUrls, m.ClientURL}} {
		u, err := url.Parse(a.from)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrOptions, err)
		}
		*a.to = []url.URL{*u}
	}
	cfg.InitialCluster = m.Name + "=" + m.PeerURL
	cfg.PeerTLSInfo = m.Files.info() // what it shows the others when it asks them
	cfg.TickMs, cfg.ElectionMs = clusterTickMS, clusterElectionMS
	cfg.SnapshotCatchUpEntries = clusterCatchUp
	cfg.MaxLearners = maxLearners
	cfg.StrictReconfigCheck = false // RemoveMember checks what matters
	cfg.ForceNewCluster = m.ForceNew
	return cfg, nil
}

// started tells whether a member has ever begun in dir.
func started(dir string) bool {
	logs, _ := filepath.Glob(filepath.Join(dir, "member", "wal", "*.wal")) // the pattern is well-formed
	return len(logs) > 0
}

// joining asks the others who they are, in the form in which etcd wants to hear it again, and checks that this member was added.
func joining(ctx context.Context, m *Member, others []Peer, d dialer) (string, error) {
	list, err := askMembers(ctx, others, d)
	if err != nil {
		return "", fmt.Errorf("join: %w", err)
	}
	added := false
	var all []string
	for _, x := range list {
		name := x.Name
		mine := slices.Contains(x.PeerURLs, m.PeerURL)
		if (mine || name == m.Name) && name != "" {
			return "", fmt.Errorf("join: member %s at %s has begun before: %w", name, strings.Join(x.PeerURLs, ","), ErrEmptied)
		}
		if mine {
			added, name = true, m.Name
		} else if name == "" {
			name = fmt.Sprintf("%x", x.ID)
		}
		for _, u := range x.PeerURLs {
			all = append(all, name+"="+u)
		}
	}
	if !added {
		return "", fmt.Errorf("join: no member with peer URL %s was added: %w", m.PeerURL, ErrRemoved)
	}
	return strings.Join(all, ","), nil
}

// askMembers asks peers, in turn until ctx ends, for the list of members.
func askMembers(ctx context.Context, peers []Peer, d dialer) ([]*pb.Member, error) {
	var r *clientv3.MemberListResponse
	err := asOther(ctx, peers, d, func(ctx context.Context, c *clientv3.Client) (err error) {
		r, err = c.MemberList(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	return r.Members, nil
}

// asOther runs fn through the first of peers that carries it out, and tries them again until ctx ends.
func asOther(ctx context.Context, peers []Peer, d dialer, fn func(context.Context, *clientv3.Client) error) error {
	var last error
	for {
		for _, p := range peers {
			if p.ClientURL == "" {
				continue
			}
			c, err := d.dial(p.ClientURL)
			if err == nil {
				try, cancel := context.WithTimeout(ctx, 2*time.Second)
				err = fn(try, c)
				cancel()
				_ = c.Close()
			}
			if err == nil {
				return nil
			}
			last = fmt.Errorf("%s: %w", p.ClientURL, err)
		}
		wait := time.NewTimer(probeWait)
		select {
		case <-ctx.Done():
			wait.Stop()
			return fmt.Errorf("%w: %w: %w", catalog.ErrUnreachable, ctx.Err(), last)
		case <-wait.C:
		}
	}
}

// announce makes the cluster know this member's address, and learns whether it still is a member.
func (s *Store) announce(ctx context.Context) error {
	m := s.member
	if m.etcd == nil {
		return nil // it did not start
	}
	var list []*pb.Member
	if err := s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) error {
		r, err := c.MemberList(ctx)
		if err == nil {
			list = r.Members
		}
		return err
	}); err != nil {
		return err
	}
	id := uint64(m.etcd.Server.MemberID())
	i := slices.IndexFunc(list, func(x *pb.Member) bool { return x.ID == id })
	if i < 0 {
		return fmt.Errorf("member %x is not in the list of members: %w", id, ErrRemoved)
	}
	if slices.Equal(list[i].PeerURLs, []string{s.options.PeerURL}) {
		return nil
	}
	return s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) error {
		_, err := c.MemberUpdate(ctx, id, []string{s.options.PeerURL})
		return err
	})
}

// Rejoin makes a place for a member that Open refused with ErrRemoved or ErrEmptied: it asks o.Member.Members to forget what they have under its name, empties
// o.Dir of what a removed member left, and says AddLearner. Then Open (which joins) and Promote. It may be repeated. ErrInUse, ErrQuorum; ErrUnreachable of catalog.
func Rejoin(ctx context.Context, o Options) error {
	if err := o.check(); err != nil {
		return err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Member == nil || len(o.Member.others()) == 0 {
		return fmt.Errorf("etcd: rejoin whom: %w", ErrOptions)
	}
	others := o.Member.others()
	if err := rejoin(ctx, o, others); err != nil {
		return fmt.Errorf("etcd %s: rejoin: %w", o.Dir, err)
	}
	return nil
}

func rejoin(ctx context.Context, o Options, others []Peer) error {
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return err
	}
	lock, err := lockDir(o.Dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	var urls []string
	for _, p := range others {
		urls = append(urls, p.ClientURL)
	}
	s, err := Open(ctx, Options{Endpoints: urls, Files: o.Member.Files, Log: o.Log})
	if err != nil {
		return err
	}
	defer s.Close()
	// The removal comes first: as long as the others count it, what it acknowledged may be in its directory alone.
	if err := s.RemoveMember(ctx, o.Member.Name); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(o.Dir, "member")); err != nil {
		return err
	}
	_, err = s.AddLearner(ctx, o.Member.Name, o.Member.PeerURL)
	return err
}
