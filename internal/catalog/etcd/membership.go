package etcd

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// memberPrefix + name holds the peer URL that the member of that name was last added with. etcd itself learns the name only when the member starts.
	memberPrefix = "/ashlar/member/"
	// promoteWait stands between two attempts to promote a learner.
	promoteWait = 100 * time.Millisecond
	// sameIDWait is how long the clock of etcd's ids may show the same time.
	sameIDWait = time.Second
	// aliveWait is how long a member may take to say that it is there.
	aliveWait = time.Second
	// removePatience is how long one attempt to remove a member may take.
	removePatience = time.Second
)

// AddLearner makes a place for a member that will start with this name and peer URL (Options.Member.Members not empty) and catch up without a vote. Said again with the
// same name and URL it returns the same member, also when it has a vote by now; a member of that name that never started is replaced if the URL differs; one that
// started is only moved by itself. ErrQuorum; ErrOptions if another member has the name or the URL.
func (s *Store) AddLearner(ctx context.Context, name, peerURL string) (MemberInfo, error) {
	m, err := s.addLearner(ctx, name, peerURL)
	if err != nil {
		return MemberInfo{}, fmt.Errorf("add member %s: %w", name, membershipError(err))
	}
	return m, nil
}

func (s *Store) addLearner(ctx context.Context, name, peerURL string) (MemberInfo, error) {
	list, added, err := s.list(ctx)
	if err != nil {
		return MemberInfo{}, err
	}
	for _, x := range list {
		mine, here := x.Name == name, slices.Contains(x.PeerURLs, peerURL)
		for other, url := range added {
			if x.Name == "" && here && other != name && url == peerURL {
				return MemberInfo{}, fmt.Errorf("member %q was added at %s: %w", other, url, ErrOptions)
			}
		}
		switch {
		case here && (mine || x.Name == ""):
			return info(x), s.recordMember(ctx, name, peerURL)
		case here || mine:
			return MemberInfo{}, fmt.Errorf("member %q is at %v: %w", x.Name, x.PeerURLs, ErrOptions)
		case x.Name == "" && slices.Contains(x.PeerURLs, added[name]): // it never started, and never will
			if err := s.remove(ctx, x.ID); err != nil {
				return MemberInfo{}, err
			}
		}
	}
	// First whose URL it is, then the member: between the two nothing is there that nobody knows.
	if err := s.recordMember(ctx, name, peerURL); err != nil {
		return MemberInfo{}, err
	}
	for {
		var r *clientv3.MemberAddResponse
		err = s.call(ctx, once, func(ctx context.Context, c *clientv3.Client) (err error) {
			r, err = c.MemberAddAsLearner(ctx, []string{peerURL})
			return err
		})
		if err == nil {
			return info(r.Member), nil
		}
		// etcd makes a member's id of its URL and the time in seconds, and refuses one that was removed: one that was there a moment ago.
		if !errors.Is(err, rpctypes.ErrMemberNotFound) {
			return MemberInfo{}, err
		}
		wait := time.NewTimer(sameIDWait)
		select {
		case <-ctx.Done():
			wait.Stop()
			return MemberInfo{}, ctx.Err()
		case <-wait.C:
		}
	}
}

// Promote gives a learner its vote; it waits, until ctx ends, for it to start and catch up. One that has a vote already is no error. ErrNoMember.
func (s *Store) Promote(ctx context.Context, name string) error {
	for {
		err := s.promote(ctx, name)
		// Not ready is what etcd says also when the learner, or the leader's knowledge of it, is not there yet.
		if err == nil || !errors.Is(err, rpctypes.ErrMemberLearnerNotReady) && !errors.Is(err, rpctypes.ErrUnhealthy) {
			if err != nil {
				return fmt.Errorf("promote member %s: %w", name, membershipError(err))
			}
			return nil
		}
		wait := time.NewTimer(promoteWait)
		select {
		case <-ctx.Done():
			wait.Stop()
			return fmt.Errorf("promote member %s: %w: %w", name, ctx.Err(), err)
		case <-wait.C:
		}
	}
}

func (s *Store) promote(ctx context.Context, name string) error {
	x, err := s.find(ctx, name)
	if err != nil {
		return err
	}
	if x == nil {
		return ErrNoMember
	}
	if !x.IsLearner {
		return nil
	}
	m := info(x)
	if s.ask(ctx, &m); !m.Alive { // etcd would say the same, and log it as an error every time
		return rpctypes.ErrMemberLearnerNotReady
	}
	err = s.call(ctx, once, func(ctx context.Context, c *clientv3.Client) error {
		_, err := c.MemberPromote(ctx, x.ID)
		return err
	})
	if errors.Is(err, rpctypes.ErrMemberNotLearner) { // an attempt before succeeded
		return nil
	}
	return err
}

// RemoveMember removes a member, dead or alive; one that is not there is no error. ErrLastVoter, ErrQuorum.
func (s *Store) RemoveMember(ctx context.Context, name string) error {
	if err := s.removeMember(ctx, name); err != nil {
		return fmt.Errorf("remove member %s: %w", name, membershipError(err))
	}
	return nil
}

func (s *Store) removeMember(ctx context.Context, name string) error {
	list, _, err := s.list(ctx)
	if err != nil {
		return err
	}
	x, err := s.find(ctx, name)
	if err != nil {
		return err
	}
	if x != nil {
		if err := s.mayRemove(ctx, list, x); err != nil {
			return err
		}
		if err := s.remove(ctx, x.ID); err != nil {
			return err
		}
	}
	return s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) error {
		_, err := c.Delete(ctx, memberPrefix+name)
		return err
	})
}

// mayRemove holds that those who are left can agree. etcd's own check (StrictReconfigCheck) asks for five seconds of peace before, also when a learner is added, which
// changes nothing about who agrees.
func (s *Store) mayRemove(ctx context.Context, list []*pb.Member, x *pb.Member) error {
	if x.IsLearner {
		return nil
	}
	var left []MemberInfo
	for _, y := range list {
		if !y.IsLearner && y.ID != x.ID {
			left = append(left, info(y))
		}
	}
	if len(left) == 0 {
		return ErrLastVoter
	}
	s.askAll(ctx, left)
	alive := 0
	for _, m := range left {
		if m.Alive {
			alive++
		}
	}
	if alive <= len(left)/2 {
		return fmt.Errorf("%d of the other %d voters answer: %w", alive, len(left), ErrQuorum)
	}
	return nil
}

// remove removes a member. When another does so at the same time etcd's raft makes nothing of the second change, and whoever asked for it is never answered (stepLeader in go.etcd.io/raft,
// "ignoring conf change"): so it waits for a while only, and looks whether it is done before it asks again.
func (s *Store) remove(ctx context.Context, id uint64) error {
	var asked atomic.Bool
	err := s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) error {
		ctx, cancel := context.WithTimeout(ctx, removePatience)
		defer cancel()
		if asked.Swap(true) {
			list, err := c.MemberList(ctx)
			if err != nil || !slices.ContainsFunc(list.Members, func(m *pb.Member) bool { return m.ID == id }) {
				return err
			}
		}
		_, err := c.MemberRemove(ctx, id)
		return err
	})
	if errors.Is(err, rpctypes.ErrMemberNotFound) { // an attempt before succeeded
		return nil
	}
	return err
}

// Members returns all members, voters and learners, sorted by name; who does not answer within a second is not Alive. A member that never started has the name it was
// added with.
func (s *Store) Members(ctx context.Context) ([]MemberInfo, error) {
	list, added, err := s.list(ctx)
	if err != nil {
		return nil, fmt.Errorf("members: %w", err)
	}
	out := make([]MemberInfo, len(list))
	for i, x := range list {
		out[i] = info(x)
		for name, url := range added {
			if x.Name == "" && url == out[i].PeerURL {
				out[i].Name = name
			}
		}
	}
	s.askAll(ctx, out)
	slices.SortFunc(out, func(a, b MemberInfo) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return out, nil
}

// askAll asks members how they are.
func (s *Store) askAll(ctx context.Context, ms []MemberInfo) {
	var wg sync.WaitGroup
	for i := range ms {
		wg.Go(func() { s.ask(ctx, &ms[i]) })
	}
	wg.Wait()
}

// ask asks a member how it is.
func (s *Store) ask(ctx context.Context, m *MemberInfo) {
	ctx, cancel := context.WithTimeout(ctx, aliveWait)
	defer cancel()
	urls := m.ClientURLs
	if s.router == nil {
		urls = []string{""} // in this process
	}
	for _, u := range urls {
		var r *clientv3.StatusResponse
		if err := s.call(ctx, once, func(ctx context.Context, c *clientv3.Client) (err error) {
			r, err = c.Status(ctx, u)
			return err
		}); err == nil && r.Header.MemberId == m.ID {
			m.Alive, m.Leader, m.DBSizeBytes = true, r.Leader == m.ID, r.DbSize
			return
		}
	}
}

// list returns etcd's members, and by name the URLs that members were added with.
func (s *Store) list(ctx context.Context) (list []*pb.Member, added map[string]string, err error) {
	err = s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) error {
		names, err := c.Get(ctx, memberPrefix, clientv3.WithPrefix())
		if err != nil {
			return err
		}
		r, err := c.MemberList(ctx)
		if err != nil {
			return err
		}
		added = map[string]string{}
		for _, kv := range names.Kvs {
			added[string(kv.Key[len(memberPrefix):])] = string(kv.Value)
		}
		list = r.Members
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	return list, added, nil
}

// find returns the member with a name, or nil.
func (s *Store) find(ctx context.Context, name string) (*pb.Member, error) {
	list, added, err := s.list(ctx)
	if err != nil {
		return nil, err
	}
	for _, x := range list {
		if x.Name == name || x.Name == "" && slices.Contains(x.PeerURLs, added[name]) {
			return x, nil
		}
	}
	return nil, nil
}

func (s *Store) recordMember(ctx context.Context, name, peerURL string) error {
	return s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) error {
		_, err := c.Put(ctx, memberPrefix+name, peerURL)
		return err
	})
}

func info(x *pb.Member) MemberInfo {
	m := MemberInfo{ID: x.ID, Name: x.Name, ClientURLs: x.ClientURLs, Learner: x.IsLearner}
	if len(x.PeerURLs) > 0 {
		m.PeerURL = x.PeerURLs[0]
	}
	return m
}

// membershipError turns what etcd says of a change of members into our errors. What is about the catalogue not answering stays so.
func membershipError(err error) error {
	for _, e := range []error{rpctypes.ErrUnhealthy, rpctypes.ErrMemberNotEnoughStarted, rpctypes.ErrTooManyLearners} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", ErrQuorum, e)
		}
	}
	if errors.Is(err, rpctypes.ErrMemberNotFound) {
		return ErrNoMember
	}
	return err
}

// MemberState tells what the embedded member is doing, and of one that stopped why.
func (s *Store) MemberState() (State, error) {
	if s.member == nil {
		return StateNone, nil
	}
	return s.member.state()
}

// MemberFailed is closed when the embedded member stopped by itself; nil if there is none. In a cluster the Store goes on through the other members; alone every call
// returns ErrUnreachable with the reason. The directory may stay in use until the process ends.
func (s *Store) MemberFailed() <-chan struct{} {
	if s.member == nil {
		return nil
	}
	return s.member.failed
}

// Expel closes the connections that others have to this node's member, if it has one, and for whose certificates refused returns an error. Admit refuses them when they come again.
func (s *Store) Expel(refused func(*x509.Certificate) error) {
	if s.member != nil && s.member.ports != nil {
		s.member.ports.guard.expel(refused)
	}
}
