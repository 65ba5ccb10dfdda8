package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// LedgerPath is where a node's serve answers other nodes for membership records, below its node address (docs/formats/cluster.md, section 3).
const LedgerPath = "/node/v1/ledger/"

const (
	// nodeAPIHeader and nodeAPIWindow are what nodes say to each other on every request.
	nodeAPIHeader = "Ashlar-Node-Api"
	nodeAPIWindow = "1-1"
	// peerTimeout bounds one question to another node: the next may know.
	peerTimeout = 4 * time.Second
)

// errNotSent: nobody was there to be asked, so that nothing can have been done.
var errNotSent = errors.New("nobody listens")

// PeerLedger asks this node's agent for membership records, and while that is down other nodes', in turn. It is a Ledger; see there. A Swap goes to another node only if it certainly did not
// reach the one before: a second one, blindly, could undo what somebody else did in between.
type PeerLedger struct {
	local Ledger
	peers func() []Peer
	dial  func(ctx context.Context, p Peer) (net.Conn, error)
}

var _ Ledger = (*PeerLedger)(nil)

// NewPeerLedger returns a Ledger that asks local first, and then the nodes that peers names at that time. dial connects to a node's Ledger address, past the TLS handshake, and makes sure that it is that node.
func NewPeerLedger(local Ledger, peers func() []Peer, dial func(ctx context.Context, p Peer) (net.Conn, error)) *PeerLedger {
	return &PeerLedger{local: local, peers: peers, dial: dial}
}

// Read implements Ledger. Whoever could be asked and had no answer is no reason not to ask the next.
func (l *PeerLedger) Read(ctx context.Context, volumeID string) (MembershipEntry, error) {
	e, err := l.local.Read(ctx, volumeID)
	for _, p := range l.rest(err, ErrUnreachable) {
		var next error
		ask, cancel := context.WithTimeout(ctx, peerTimeout)
		e, next = call[MembershipEntry](ask, l.at(p), "read", MembershipRead{VolumeID: volumeID})
		cancel()
		if err = errors.Join(err, next); next == nil {
			return e, nil
		}
		if !errors.Is(next, ErrUnreachable) {
			return e, next
		}
	}
	return e, err
}

// Swap implements Ledger.
func (l *PeerLedger) Swap(ctx context.Context, a MembershipSwap) (int64, error) {
	rev, err := l.local.Swap(ctx, a)
	for _, p := range l.rest(err, errNotSent) {
		var next error
		ask, cancel := context.WithTimeout(ctx, peerTimeout)
		rev, next = call[int64](ask, l.at(p), "swap", a)
		cancel()
		if next == nil {
			return rev, nil
		}
		if !errors.Is(next, errNotSent) {
			return rev, next
		}
		err = errors.Join(err, next)
	}
	return rev, err
}

// rest returns whom to ask next, after an error: nobody unless it is what says that it may be done.
func (l *PeerLedger) rest(err, may error) []Peer {
	if !errors.Is(err, may) {
		return nil
	}
	return l.peers()
}

// at returns who asks a node.
func (l *PeerLedger) at(p Peer) caller {
	c := newDialer(fmt.Sprintf("node %s at %s", p.Node, p.Ledger), LedgerPath, func(ctx context.Context) (net.Conn, error) { return l.dial(ctx, p) })
	c.header = http.Header{nodeAPIHeader: {nodeAPIWindow}}
	return c
}
