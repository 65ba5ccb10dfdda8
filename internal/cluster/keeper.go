package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/catalog/etcd"
	"ashlar/internal/identity"
)

// KeeperConfig is what a Keeper needs.
type KeeperConfig struct {
	Dir     Dir
	State   State
	TLS     *identity.NodeTLS
	Catalog catalog.Catalog
	// Embedded: the etcd is the nodes' own, and Etcd speaks to it.
	Embedded bool
	Etcd     Etcd
	// Rejoin makes a place for this node's member, which is to be as the State says: etcd.Rejoin.
	Rejoin func(context.Context, State) error
	// Roster is kept as the records are; nil: nobody asks it.
	Roster *Roster
	// Member is what this node's member is doing, as it knows itself.
	Member func() etcd.State
	Look   time.Duration    // how often it looks although nothing changed; zero: 10 s
	Now    func() time.Time // nil: time.Now
	Log    *slog.Logger     // nil: dropped
}

// Keeper keeps a node in its cluster as the records want it. One goroutine.
//
//	record: voter, node.json: not    key fetched, place made, node.json, ErrRestart: the member starts
//	member is a learner              promoted
//	record: not, node.json: voter    member removed, node.json, ErrRestart: its directory goes
//	record gone                      ErrRemoved
//
// The node whose member leads also removes members of nodes that are no voters (any more): those of dead nodes remove nothing themselves.
type Keeper struct {
	cfg   KeeperConfig
	state State
}

// look is how often the keeper looks although nothing changed.
const look = 10 * time.Second

// NewKeeper returns a Keeper; Run makes it work.
func NewKeeper(cfg KeeperConfig) *Keeper {
	cfg.Now = orNow(cfg.Now)
	if cfg.Look == 0 {
		cfg.Look = look
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Keeper{cfg: cfg, state: cfg.State}
}

// Run works until ctx ends (its error), the node must be built anew (ErrRestart), or it was removed (ErrRemoved). That the catalogue or other nodes are away is no reason to end.
func (k *Keeper) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	changed := make(chan struct{}, 1)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	if k.cfg.Roster != nil {
		wg.Go(func() { k.cfg.Roster.follow(ctx, k.cfg.Catalog) })
	}
	wg.Go(func() {
		_ = catalog.Follow(ctx, k.cfg.Catalog, func(b catalog.Batch) error { // it ends with ctx alone
			nodes := b.Reset || slices.ContainsFunc(b.Events, func(e catalog.Event) bool { return e.Key.Kind == catalog.KindNode && e.Key.Part == catalog.Wanted })
			if nodes {
				select {
				case changed <- struct{}{}:
				default:
				}
			}
			if k.cfg.Roster != nil && (nodes || b.Away) {
				k.cfg.Roster.ask()
			}
			return ctx.Err()
		})
	})
	tick := time.NewTicker(k.cfg.Look)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case <-tick.C:
		}
		err := k.step(ctx)
		if errors.Is(err, ErrRestart) || errors.Is(err, ErrRemoved) {
			return err
		}
		if err != nil && ctx.Err() == nil {
			k.cfg.Log.Warn("cluster: not as it should be yet; trying again", "error", err)
			tick.Reset(retry)
		} else if k.cfg.Embedded && k.cfg.Member() == etcd.StateStarting {
			tick.Reset(startingLook)
		} else {
			tick.Reset(k.cfg.Look)
		}
	}
}

// retry is the wait after a step failed.
const retry = time.Second

// startingLook is how often it looks while this node's member starts: nobody tells when it is there.
const startingLook = 50 * time.Millisecond

// runs tells whether this node's member takes part.
func (k *Keeper) runs() bool {
	state := k.cfg.Member()
	return state == etcd.StateVoter || state == etcd.StateLearner
}

// step does what is to be done now.
func (k *Keeper) step(ctx context.Context) error {
	if err := k.renew(ctx); err != nil {
		k.cfg.Log.Warn("the node's certificate is not renewed yet", "error", err)
	}
	me, _, err := catalog.Read[catalog.NodeWanted](ctx, k.cfg.Catalog, catalog.NodeKey(catalog.Wanted, k.state.Name))
	switch {
	case err == nil && me.ID == "": // made anew from what is on the disks (`ashlar recover`), where no node's id stands
		_, _, err := catalog.Update(ctx, k.cfg.Catalog, catalog.NodeKey(catalog.Wanted, k.state.Name), func(n *catalog.NodeWanted) error {
			if n.ID == "" {
				n.ID = k.state.NodeID
				n.Voter = n.Voter || k.state.Voter
			}
			return nil
		})
		return err
	case errors.Is(err, catalog.ErrNotFound), err == nil && me.ID != k.state.NodeID:
		return fmt.Errorf("node %s (%s): %w", k.state.Name, k.state.NodeID, ErrRemoved)
	case err != nil && k.cfg.Embedded: // a node that was removed is refused, and would never read it
		return errors.Join(err, StillThere(ctx, k.cfg.TLS, k.state))
	case err != nil || !k.cfg.Embedded:
		return err
	}
	members, err := k.cfg.Etcd.Members(ctx)
	if err != nil {
		return err
	}
	if err := k.keepMembers(members); err != nil {
		return err
	}
	wanted := me.Voter && me.Deleted == nil
	i := slices.IndexFunc(members, func(m etcd.MemberInfo) bool { return m.Name == k.state.Name })
	switch {
	case wanted && !k.state.Voter:
		return k.become(ctx)
	case wanted && k.runs() && (i < 0 || members[i].Learner): // nameless until the others know that it has started
		k.cfg.Log.Info("this node's member of the catalogue gets its vote when it has caught up")
		return k.promote(ctx)
	case !wanted && k.state.Voter:
		return k.resign(ctx)
	}
	if i >= 0 && members[i].Leader {
		return k.tidy(ctx, members)
	}
	return nil
}

// keepMembers keeps etcd's members for the next start.
func (k *Keeper) keepMembers(members []etcd.MemberInfo) error {
	now := slices.DeleteFunc(fromEtcd(members), func(m Member) bool { return m.Name == "" })
	if len(now) == 0 || slices.Equal(now, k.state.Members) {
		return nil
	}
	k.state.Members = now
	return k.cfg.Dir.Save(k.state)
}

// become makes this node a voter: the authority's key, a place among the members, node.json.
func (k *Keeper) become(ctx context.Context) error {
	if _, err := k.cfg.Dir.Authority(k.cfg.Now); errors.Is(err, fs.ErrNotExist) {
		peers, err := Peers(ctx, k.cfg.Catalog, k.state.Name)
		if err != nil {
			return err
		}
		var a authorityAnswer
		if err := askVoters(ctx, k.cfg.TLS, peers, question{"/node/v1/authority", struct{}{}, &a}); err != nil {
			return fmt.Errorf("fetch the authority's key: %w", err)
		}
		if err := k.cfg.Dir.put(caKeyFile, []byte(a.AuthorityKey), 0o600); err != nil {
			return err
		}
	}
	s := k.state
	s.Voter = true
	if err := k.cfg.Rejoin(ctx, s); err != nil {
		return fmt.Errorf("make a place for this node's member of the catalogue: %w", err)
	}
	if err := k.cfg.Dir.Save(s); err != nil {
		return err
	}
	return fmt.Errorf("it becomes a voter: %w", ErrRestart)
}

// promoteLimit bounds one wait for a learner to catch up: what the records want meanwhile may be something else.
const promoteLimit = 20 * time.Second

// votesTick is how often a member that was promoted is looked at until it knows.
const votesTick = 10 * time.Millisecond

// promote gets this node's member its vote, as soon as it has caught up. The event is for people, and has every agent look again.
func (k *Keeper) promote(ctx context.Context) error {
	short, cancel := context.WithTimeout(ctx, promoteLimit)
	defer cancel()
	if err := k.cfg.Etcd.Promote(short, k.state.Name); err != nil {
		return err
	}
	if err := k.knows(short); err != nil {
		return err
	}
	k.cfg.Log.Info("this node is a voter")
	return catalog.Note(ctx, k.cfg.Catalog, catalog.EventRecord{
		Time: k.cfg.Now().UTC(), Type: catalog.Normal, Kind: catalog.KindNode, Name: k.state.Name, Reason: "Voter", Message: "its member of the catalogue votes",
	})
}

// knows waits until this node's member knows of its vote. Every agent looks when it hears of it, this node's own too: it shall see then what it is to record, or it would look again after many
// seconds only.
func (k *Keeper) knows(ctx context.Context) error {
	tick := time.NewTicker(votesTick)
	defer tick.Stop()
	for k.cfg.Member() != etcd.StateVoter {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("this node's member votes, and does not know it yet: %w", ctx.Err())
		}
	}
	return nil
}

// resign ends this node's membership: the others forget its member, and the next start removes what it has of it.
func (k *Keeper) resign(ctx context.Context) error {
	if err := k.cfg.Etcd.RemoveMember(ctx, k.state.Name); err != nil {
		return fmt.Errorf("give up this node's member of the catalogue: %w", err)
	}
	s := k.state
	s.Voter = false
	s.Members = slices.DeleteFunc(slices.Clone(s.Members), func(m Member) bool { return m.Name == s.Name })
	if err := errors.Join(k.cfg.Dir.Save(s), k.cfg.Dir.remove(caKeyFile)); err != nil {
		return err
	}
	return fmt.Errorf("it is no voter any more: %w", ErrRestart)
}

// tidy removes the members of nodes that are no voters (any more) and do not do it themselves. It never removes its own, nor the last.
func (k *Keeper) tidy(ctx context.Context, members []etcd.MemberInfo) error {
	nodes, _, err := catalog.All[catalog.NodeWanted](ctx, k.cfg.Catalog, catalog.KindNode, catalog.Wanted)
	if err != nil {
		return err
	}
	voter := map[string]bool{}
	for _, n := range nodes {
		voter[n.Key.Name] = n.Value.Voter && n.Value.Deleted == nil
	}
	for _, m := range members {
		if m.Name == "" || m.Name == k.state.Name || voter[m.Name] {
			continue
		}
		k.cfg.Log.Info("removing a member of the catalogue whose node is no voter", "node", m.Name)
		if err := k.cfg.Etcd.RemoveMember(ctx, m.Name); err != nil {
			return fmt.Errorf("remove the member of node %s: %w", m.Name, err)
		}
	}
	return nil
}

// renew sees to the certificate: made anew when less than a third of its life is left, when its time has not come, or when it does not name the node's host.
func (k *Keeper) renew(ctx context.Context) error {
	leaf, err := k.cfg.TLS.Leaf()
	if err != nil || !stale(leaf.NotBefore, leaf.NotAfter, k.cfg.Now()) && names(leaf.DNSNames, leaf.IPAddresses, k.state.Host) {
		return err
	}
	done, err := k.cfg.Dir.renewOwn(k.state, k.cfg.Now)
	if done || err != nil {
		return err
	}
	key, request, err := identity.NewNodeRequest()
	if err != nil {
		return err
	}
	peers, err := Peers(ctx, k.cfg.Catalog, k.state.Name)
	if err != nil {
		return err
	}
	var a renewAnswer
	if err := askVoters(ctx, k.cfg.TLS, peers, question{"/node/v1/renew", renewRequest{Request: string(request), Host: k.state.Host}, &a}); err != nil {
		return err
	}
	c, err := identity.ParseCertificate([]byte(a.Certificate))
	if err != nil {
		return err
	}
	// A voter whose clock is wrong signs what nobody else takes; the one that is shown now is good for weeks yet.
	if now := k.cfg.Now(); stale(c.NotBefore, c.NotAfter, now) {
		return fmt.Errorf("%w: a voter signed a certificate that is good from %s to %s, and it is %s here: set the clock that is wrong", ErrClock,
			c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return k.cfg.Dir.keepCertificate(key, []byte(a.Certificate))
}

// stale tells whether less than a third of a certificate's life is left, or its time has not come: it was signed while a clock was ahead.
func stale(from, to, now time.Time) bool {
	return now.Before(from) || now.Add(to.Sub(from)/3).After(to)
}

// names tells whether a host is among a certificate's names and addresses.
func names(dns []string, ips []net.IP, host string) bool {
	if ip := net.ParseIP(host); ip != nil {
		return slices.ContainsFunc(ips, ip.Equal)
	}
	return slices.Contains(dns, host)
}

// Refresh sees to the certificate of a node that starts and has the authority's key: one that cannot be read, has ended, or does not name the node's host is made anew. Who has no
// key asks others when the catalogue answers.
func Refresh(d Dir, s State, now func() time.Time) error {
	if t, err := d.TLS(nil); err == nil {
		leaf, err := t.Leaf()
		if err == nil && !stale(leaf.NotBefore, leaf.NotAfter, now()) && names(leaf.DNSNames, leaf.IPAddresses, s.Host) {
			return nil
		}
	}
	_, err := d.renewOwn(s, now)
	return err
}

// renewOwn signs a new certificate with the authority's key, if this node has it.
func (d Dir) renewOwn(s State, now func() time.Time) (done bool, err error) {
	authority, err := d.Authority(now)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, d.certify(authority, s.Identity())
}

// Readdress changes where this node is reached: node.json, and its certificate if it has the authority's key (else the keeper has a new one signed when others are asked). The node is
// then built anew, and tells the others. ErrNone, ErrAddress, and the errors of files.
func Readdress(d Dir, address string) error {
	s, err := d.Load()
	if err != nil {
		return err
	}
	old := s.Self()
	if s.Host, s.Port, err = ParseAddress(address); err != nil {
		return err
	}
	for i, m := range s.Members {
		if m == old || m.Name == s.Name {
			s.Members[i] = s.Self()
		}
	}
	// The certificate first: it may name a host that the node does not have yet, but not lack one that it has.
	if _, err := d.renewOwn(s, time.Now); err != nil {
		return err
	}
	return d.Save(s)
}
