package etcd

import (
	"context"
	"errors"
)

// Member says how the embedded member is reached by others: a member of several, or one that others may join. Without it (Options.Member nil) the member is
// alone and listens nowhere. A directory written alone becomes a clustered one by being opened with a Member, and keeps its records and revisions. Addresses
// and name may differ from those of the last start: the member tells the others.
type Member struct {
	Name         string // the node's
	PeerListen   string // host:port
	ClientListen string // host:port
	PeerURL      string // https://host:port, where the other members reach it
	ClientURL    string // https://host:port, where every node's client reaches it
	Files        Files  // certificate for both, as server and as client
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
	StateNone    State = "none"    // the etcd is not ours
	StateAlone   State = "alone"   // a member that listens nowhere
	StateLearner State = "learner" // it catches up and has no vote
	StateVoter   State = "voter"
	StateFailed  State = "failed"  // it stopped by itself, for example because its disk is full; the error says why
	StateRemoved State = "removed" // the others removed it
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

// Rejoin makes a place for a member that Open refused with ErrRemoved or ErrEmptied: it asks o.Member.Members to forget what they have under its name, empties
// o.Dir of what a removed member left, and says AddLearner. Then Open (which joins) and Promote. It may be repeated. ErrQuorum; ErrUnreachable of catalog.
func Rejoin(ctx context.Context, o Options) error { return errors.ErrUnsupported }

// AddLearner makes a place for a member that will start with this name and peer URL (Options.Member.Members not empty) and catch up without a vote. Said again with the
// same name and URL it returns the same member; a member of that name that never started is replaced if the URL differs. ErrQuorum.
func (s *Store) AddLearner(ctx context.Context, name, peerURL string) (MemberInfo, error) {
	return MemberInfo{}, errors.ErrUnsupported
}

// Promote gives a learner its vote; it waits, until ctx ends, for it to start and catch up. One that has a vote already is no error. ErrNoMember.
func (s *Store) Promote(ctx context.Context, name string) error { return errors.ErrUnsupported }

// RemoveMember removes a member, dead or alive; one that is not there is no error. ErrLastVoter, ErrQuorum.
func (s *Store) RemoveMember(ctx context.Context, name string) error { return errors.ErrUnsupported }

// Members returns all members, voters and learners, sorted by name; who does not answer within a second is not Alive.
func (s *Store) Members(ctx context.Context) ([]MemberInfo, error) { return nil, errors.ErrUnsupported }

// MemberState tells what the embedded member is doing, and of a failed one why.
func (s *Store) MemberState() (State, error) { return StateNone, nil }

// MemberFailed is closed when the embedded member stopped by itself; nil if there is none. In a cluster the Store goes on through the other members. The directory
// may stay in use until the process ends.
func (s *Store) MemberFailed() <-chan struct{} { return nil }

// Lead implements control.Leader, among all who call it on stores of the same catalogue: it waits for its turn and calls fn with a context that ends, at the latest, when others may
// believe that this leader is gone (catalog.AliveTTL after it last reached the catalogue). It calls fn again when it leads again, until fn returns although its context had not ended (its
// error is returned, nil too) or ctx ends. It resigns at the end.
func (s *Store) Lead(ctx context.Context, fn func(context.Context) error) error {
	return errors.ErrUnsupported
}
