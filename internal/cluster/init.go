package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/identity"
)

// InitConfig is what Init needs.
type InitConfig struct {
	Dir Dir
	// Authority is the directory of the authority that issues REST's certificate, made if it is not there: it becomes the cluster's.
	Authority string
	Catalog   catalog.Catalog
	Name      string // the node's
	Host      string
	Port      int
	// External: the catalogue is in an etcd that was there before; nobody is a voter.
	External bool
	Now      func() time.Time // nil: time.Now
}

// Init opens this node's cluster of one: its authority signs the node's certificate, the node's record gets an id, nobody else's says voter any more, and node.json is there last. The node is then built anew from it.
// After a crash in between it is repeated. ErrIn, ErrAddress, and the errors of the catalogue and of files.
func Init(ctx context.Context, cfg InitConfig) (State, error) {
	if s, err := cfg.Dir.Load(); err == nil {
		return s, fmt.Errorf("%w: it is %s at %s in cluster %s", ErrIn, s.Name, Address(s.Host, s.Port, 0), s.ClusterID)
	} else if !errors.Is(err, ErrNone) {
		return s, err
	}
	if err := errors.Join(CheckName(cfg.Name), checkAddress(cfg.Host, cfg.Port)); err != nil {
		return State{}, err
	}
	if err := FreePorts(ctx, cfg.Host, cfg.Port); err != nil {
		return State{}, err
	}
	c, _, err := catalog.Read[catalog.Cluster](ctx, cfg.Catalog, catalog.ClusterKey())
	if err != nil {
		return State{}, err
	}
	authority, err := identity.OpenAuthority(cfg.Authority, cfg.Now)
	if err != nil {
		return State{}, err
	}
	if err := unseat(ctx, cfg.Catalog, cfg.Name); err != nil {
		return State{}, err
	}
	wanted, _, err := catalog.Update(ctx, cfg.Catalog, catalog.NodeKey(catalog.Wanted, cfg.Name), func(n *catalog.NodeWanted) error {
		if n.ID == "" {
			n.ID = newID()
		}
		n.Voter = !cfg.External
		return nil
	})
	if err != nil {
		return State{}, err
	}
	s := State{ClusterID: c.ID, NodeID: wanted.ID, Name: cfg.Name, Host: cfg.Host, Port: cfg.Port, Voter: !cfg.External}
	if s.Voter {
		s.Members = []Member{s.Self()}
	}
	if err := cfg.Dir.keepAuthority(authority); err != nil {
		return State{}, err
	}
	if err := cfg.Dir.certify(authority, s.Identity()); err != nil {
		return State{}, err
	}
	return s, cfg.Dir.Save(s)
}

// unseat takes their seats from all other nodes. The catalogue of a node that is in no cluster has no member of anybody else's: who is a voter by its records came with a backup, from a catalogue
// that is no more. As voters they could not be removed, and would leave this node no seat.
func unseat(ctx context.Context, c catalog.Catalog, but string) error {
	nodes, _, err := catalog.All[catalog.NodeWanted](ctx, c, catalog.KindNode, catalog.Wanted)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		if n.Key.Name == but || !n.Value.Voter {
			continue
		}
		_, _, err := catalog.Update(ctx, c, n.Key, func(w *catalog.NodeWanted) error { w.Voter = false; return nil })
		if err != nil && !errors.Is(err, catalog.ErrNotFound) {
			return err
		}
	}
	return nil
}

// keepAuthority puts the authority, with its key, into the directory.
func (d Dir) keepAuthority(a *identity.Authority) error {
	key, err := a.Bundle()
	if err != nil {
		return err
	}
	return errors.Join(d.put(caKeyFile, key, 0o600), d.put(caFile, a.CertificatePEM(), 0o644))
}

// certify has the authority sign a new certificate for this node.
func (d Dir) certify(a *identity.Authority, n identity.Node) error {
	key, request, err := identity.NewNodeRequest()
	if err != nil {
		return err
	}
	cert, err := a.SignNode(request, n)
	if err != nil {
		return err
	}
	return d.keepCertificate(key, cert)
}

// keepCertificate replaces the certificate and its key, in one file.
func (d Dir) keepCertificate(key, cert []byte) error {
	return d.put(pemFile, append(append([]byte{}, key...), cert...), 0o600)
}

// FreePorts tells whether the four ports of an address can be listened on here, before anything is changed. client.ErrInUse, or ErrAddress if it is not this machine's.
func FreePorts(ctx context.Context, host string, port int) error {
	for offset := range 4 {
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", Address(host, port, offset))
		if err != nil {
			return fmt.Errorf("%w: this node would listen on %s: %w (choose another with --address)", ErrAddress, Address(host, port, offset), err)
		}
		if err := l.Close(); err != nil {
			return err
		}
	}
	return nil
}

// MakeToken records a new join token, good for so long from now (nil: time.Now) on, and returns it: it is kept nowhere. catalog's errors.
func MakeToken(ctx context.Context, c catalog.Catalog, d Dir, life time.Duration, now func() time.Time) (token string, record catalog.Join, err error) {
	t, err := d.TLS(nil)
	if err != nil {
		return "", record, err
	}
	j, sum, err := identity.NewJoinToken(t.Authority(), nil)
	if err != nil {
		return "", record, err
	}
	if life < time.Minute || life > maxTokenLife {
		return "", record, fmt.Errorf("a join token is good for a minute to a year, not %s: %w", life, client.ErrInvalid)
	}
	made := orNow(now)().UTC()
	record = catalog.Join{Name: newID()[:8], SHA256: sum, Created: made, Expires: made.Add(life)}
	if _, err := catalog.Write(ctx, c, catalog.JoinKey(record.Name), record, 0); err != nil {
		return "", record, err
	}
	return j.String(), record, nil
}

// maxTokenLife bounds a join token's.
const maxTokenLife = 366 * 24 * time.Hour
