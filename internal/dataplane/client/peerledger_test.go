package client

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
)

// standIn is a Ledger of the tests.
type standIn struct {
	err   error
	asked atomic.Int32
}

func (l *standIn) Read(context.Context, string) (MembershipEntry, error) {
	l.asked.Add(1)
	return MembershipEntry{Record: []byte(`{}`), Rev: 7}, l.err
}

func (l *standIn) Swap(context.Context, MembershipSwap) (int64, error) {
	l.asked.Add(1)
	return 8, l.err
}

// node is another node's ledger behind a listener of its own, asked at the path that nodes use.
type node struct {
	ledger standIn
	ln     net.Listener
	rude   atomic.Bool // takes requests, and hangs up without an answer
}

func newNode(t *testing.T) *node {
	n := &node{}
	var err error
	if n.ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(LedgerPath, http.StripPrefix(strings.TrimSuffix(LedgerPath, "/"), LedgerHandler(&n.ledger)))
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n.rude.Load() {
			n.ledger.asked.Add(1)
			panic(http.ErrAbortHandler)
		}
		if r.Header.Get("Ashlar-Node-Api") == "" {
			t.Error("no version of the nodes' protocol")
		}
		mux.ServeHTTP(w, r)
	})}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(n.ln) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return n
}

// TestPeerLedger: the own agent is asked first, others only while it is not there; and a swap that somebody may have done is never said to anybody else.
func TestPeerLedger(t *testing.T) {
	a, b := newNode(t), newNode(t)
	var nobody atomic.Bool // at the first of the peers
	peers := []Peer{{Node: "a", Ledger: a.ln.Addr().String()}, {Node: "b", Ledger: b.ln.Addr().String()}}
	dial := func(ctx context.Context, p Peer) (net.Conn, error) {
		if p.Node == "a" && nobody.Load() {
			return nil, io.ErrClosedPipe
		}
		var d net.Dialer
		return d.DialContext(ctx, "tcp", p.Ledger)
	}
	swap := MembershipSwap{VolumeID: "v", Record: []byte(`{}`), Was: 7}
	counts := func(what string, own *standIn, wantOwn, wantA, wantB int32) {
		t.Helper()
		gotA, gotB := a.ledger.asked.Swap(0), b.ledger.asked.Swap(0)
		if got := own.asked.Swap(0); got != wantOwn || gotA != wantA || gotB != wantB {
			t.Errorf("%s: asked own %d, a %d, b %d times; want %d, %d, %d", what, got, gotA, gotB, wantOwn, wantA, wantB)
		}
	}
	with := func(own *standIn) *PeerLedger { return NewPeerLedger(own, func() []Peer { return peers }, dial) }
	ctx := t.Context()

	well := &standIn{}
	_, err := with(well).Read(ctx, "v")
	_, swapErr := with(well).Swap(ctx, swap)
	if err := errors.Join(err, swapErr); err != nil {
		t.Error(err)
	}
	counts("the own answers", well, 2, 0, 0)

	refuses := &standIn{err: ErrConflict}
	if _, err := with(refuses).Swap(ctx, swap); !errors.Is(err, ErrConflict) {
		t.Errorf("refused: %v", err)
	}
	counts("the own refuses", refuses, 1, 0, 0)

	lost := &standIn{err: ErrUnreachable} // it was asked, and said nothing
	if e, err := with(lost).Read(ctx, "v"); err != nil || e.Rev != 7 {
		t.Errorf("read: %+v, %v", e, err)
	}
	counts("a read without an answer", lost, 1, 1, 0)
	if _, err := with(lost).Swap(ctx, swap); !errors.Is(err, ErrUnreachable) {
		t.Errorf("swap: %v", err)
	}
	counts("a swap without an answer", lost, 1, 0, 0)

	gone := NewLedgerClient(t.TempDir() + "/none.sock")
	own := &standIn{}
	if rev, err := NewPeerLedger(gone, func() []Peer { return peers }, dial).Swap(ctx, swap); err != nil || rev != 8 {
		t.Errorf("swap: %d, %v", rev, err)
	}
	counts("nobody at the own socket", own, 0, 1, 0)
	nobody.Store(true)
	if rev, err := NewPeerLedger(gone, func() []Peer { return peers }, dial).Swap(ctx, swap); err != nil || rev != 8 {
		t.Errorf("swap: %d, %v", rev, err)
	}
	counts("nobody at the first peer's either", own, 0, 0, 1)
	nobody.Store(false)
	a.rude.Store(true)
	if _, err := NewPeerLedger(gone, func() []Peer { return peers }, dial).Swap(ctx, swap); !errors.Is(err, ErrUnreachable) {
		t.Errorf("swap: %v", err)
	}
	counts("a peer that hangs up may have done it", own, 0, 1, 0)
	if _, err := NewPeerLedger(gone, func() []Peer { return peers }, dial).Read(ctx, "v"); err != nil {
		t.Errorf("read: %v", err)
	}
	counts("and a read goes to the next", own, 0, 1, 1)
}
