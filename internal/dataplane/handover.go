package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
	"ashlar/internal/layer"
	"ashlar/internal/replica/local"
)

// Hand-over to a successor, docs/formats/handover.md: this file is the giver's side, takeover.go the taker's, handover_volume.go what both do with one
// volume, handover_wire.go the frames, upgrade.go who asks for it.
//
//	         a taker connects          every verb has ended          every volume is taken
//	serving ─────────────────▶ hushed ─────────────────────▶ giving ───────────────────────▶ ending
//	   ▲                          │                             │  a volume is refused, or the taker is lost
//	   └──────────────────────────┴─────────────────────────────┘  everything is taken back

// ErrRefused: the two builds cannot hand over, or one of them could not carry it out; everything is as it was. The message says why, and names both versions.
var ErrRefused = errors.New("hand-over refused")

// ErrCurrent: the version that would take over runs already.
var ErrCurrent = errors.New("runs already")

// The window of versions of docs/formats/handover.md that this build speaks.
const (
	handoverMin     = 1
	handoverCurrent = 1
)

// handoverWindow, "MIN-CURRENT", replaces that window where a build says so (-ldflags "-X ashlar/internal/dataplane.handoverWindow=7-9"): a build that must not take over
// from, or hand over to, those that went before it.
var handoverWindow = ""

// window is [minimum, current].
type window [2]int

func (w window) String() string { return fmt.Sprintf("%d-%d", w[0], w[1]) }

// windows are what a build speaks, reads and writes.
type windows struct {
	HandOver window `json:"handover"`
	Wire     window `json:"wire"`
	Open     window `json:"open"`
	Replica  window `json:"replica"`
	Layer    window `json:"layer"`
}

// ourWindows are this build's.
func ourWindows() windows {
	w := windows{
		HandOver: window{handoverMin, handoverCurrent},
		Wire:     window{client.APIMin, client.APICurrent},
		Open:     window{openFormat, openFormat},
		Replica:  window{local.FormatVersion, local.FormatVersion},
		Layer:    window{1, layer.FormatVersion},
	}
	var other window
	if n, err := fmt.Sscanf(handoverWindow, "%d-%d", &other[0], &other[1]); n == 2 && err == nil {
		w.HandOver = other
	}
	return w
}

// party is one side of a hand-over.
type party struct {
	version string
	windows windows
}

// agree refuses a pair of builds that cannot hand over, naming both. It is said on both sides.
func agree(giver, taker party) error {
	if giver.version == taker.version {
		return fmt.Errorf("%w: %w: version %s", ErrRefused, ErrCurrent, giver.version)
	}
	g, t := giver.windows, taker.windows
	for _, w := range []struct {
		what         string
		giver, taker window
	}{{"hand-over", g.HandOver, t.HandOver}, {"wire", g.Wire, t.Wire}} {
		if w.giver[1] < w.taker[0] || w.taker[1] < w.giver[0] {
			return fmt.Errorf("%w: %s versions: the running %s speaks %v, the new %s speaks %v; they share none", ErrRefused, w.what, giver.version, w.giver, taker.version, w.taker)
		}
	}
	for _, w := range []struct {
		what         string
		giver, taker window
	}{{"open.json", g.Open, t.Open}, {"replica", g.Replica, t.Replica}, {"layer", g.Layer, t.Layer}} {
		if w.giver[1] < w.taker[0] || w.taker[1] < w.giver[1] {
			return fmt.Errorf("%w: %s format: the running %s has %v and writes the last, the new %s reads %v", ErrRefused, w.what, giver.version, w.giver, taker.version, w.taker)
		}
	}
	return nil
}

// The words of HandOverEvent.What.
const (
	EventBegan    = "began"    // a taker is here, and the builds fit
	EventVolume   = "volume"   // one volume was taken
	EventRefused  = "refused"  // nothing was touched
	EventCurrent  = "current"  // the same: the version that is to take over runs already
	EventReturned = "returned" // begun, but everything was taken back, with its connections
	EventLost     = "lost"     // the taker died; what it had is opened again
	EventDone     = "done"     // the taker has everything
)

// HandOverEvent is told to whoever watches a hand-over.
type HandOverEvent struct {
	What        string `json:"what"`
	From        string `json:"from"` // version
	To          string `json:"to"`
	Volume      string `json:"volume,omitempty"`
	PauseMicros int64  `json:"pauseMicros,omitempty"` // how long the volume was served by nobody
	Conns       int    `json:"conns,omitempty"`       // connections that went along
	Text        string `json:"text,omitempty"`
}

// overState is what a Process knows of hand-overs.
type overState struct {
	frozen atomic.Pointer[client.State] // what State says while a hand-over is under way; nil while none is

	mu      sync.Mutex // guards the rest
	busy    bool
	events  []HandOverEvent // of the hand-over under way, or the last one
	total   int             // of all
	told    chan struct{}   // closed and replaced at each event; nil at first
	parting *peer           // the taker that has everything: told by its end that this process is done
}

// claim lets one hand-over at a time begin.
func (o *overState) claim() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.busy {
		return false
	}
	o.busy, o.events = true, nil
	return true
}

func (o *overState) tell(e HandOverEvent) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.events = append(o.events, e)
	o.total++
	if o.told != nil {
		close(o.told)
	}
	o.told = make(chan struct{})
}

// after returns the events after the first n of all, and what is closed when there is another.
func (o *overState) after(n int) ([]HandOverEvent, int, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.told == nil {
		o.told = make(chan struct{})
	}
	if n < 0 {
		return nil, o.total, o.told
	}
	fresh := min(o.total-n, len(o.events))
	return append([]HandOverEvent(nil), o.events[len(o.events)-fresh:]...), o.total, o.told
}

// part keeps the connection to the taker until this process is done.
func (o *overState) part(to *peer) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.parting = to
}

// parted tells the taker, if there is one, that this process is done.
func (o *overState) parted() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.parting != nil {
		o.parting.close()
	}
}

// meetSuccessors answers those that connect to handover.sock, until ctx ends.
func (p *Process) meetSuccessors(ctx context.Context, ln *net.UnixListener) {
	defer context.AfterFunc(ctx, func() { ln.Close() })() //nolint:errcheck // it wakes Accept
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := ln.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			p.log.Error("hand-over: accept", "error", err)
			select {
			case <-time.After(firstRetry):
			case <-ctx.Done():
			}
			continue
		}
		wg.Go(func() {
			if err := p.meet(ctx, conn); err != nil && !errors.Is(err, io.EOF) {
				p.log.Warn("hand-over", "error", err)
			}
		})
	}
}

// meet serves one connection.
func (p *Process) meet(ctx context.Context, conn *net.UnixConn) error {
	to, err := newPeer(conn)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, to.close)
	hello, err := to.expect(kindHello)
	stop() // from here on it ends by itself: a taker would be taken for dead, and a watcher is told the end
	if err != nil {
		to.close()
		return err
	}
	hello.drop()
	to.version = hello.Version
	if hello.Role == roleWatch {
		defer to.close()
		return p.watched(ctx, to)
	}
	return p.handOver(ctx, to, hello)
}

// watched tells a watcher of hand-overs until it goes, or this process ends.
func (p *Process) watched(ctx context.Context, to *peer) error {
	ours := ourWindows()
	_, seen, more := p.over.after(-1)
	if err := to.send(frame{Kind: kindHello, Version: p.cfg.Version, PID: os.Getpid(), Windows: &ours}); err != nil {
		return err
	}
	var events []HandOverEvent
	for {
		last := false
		select {
		case <-more:
		case <-ctx.Done():
			last = true // the end of the process is the end of a hand-over: what there is to say is said
		}
		events, seen, more = p.over.after(seen)
		for _, e := range events {
			if err := to.send(frame{Kind: kindEvent, Event: &e}); err != nil {
				return err
			}
		}
		if last {
			return nil
		}
	}
}

// giver is a hand-over under way, in the process that gives.
type giver struct {
	p     *Process
	to    *peer
	given []*given // this process has their slots' tokens
}

// given is a volume of which this process has let go.
type given struct {
	s     *slot
	entry openEntry
	state string // its state before, and why
	why   error
	out   bool // it was passed, and the taker has it
}

// handOver gives everything to the taker, or nothing.
func (p *Process) handOver(ctx context.Context, to *peer, hello frame) error {
	event := func(what string, err error) {
		e := HandOverEvent{What: what, From: p.cfg.Version, To: to.version}
		if err != nil {
			e.Text = err.Error()
		}
		p.over.tell(e)
	}
	refuse := func(err error) error {
		defer to.close()
		return errors.Join(err, to.send(frame{Kind: kindRefused, Version: p.cfg.Version, Text: err.Error()}))
	}
	if !p.over.claim() {
		return refuse(fmt.Errorf("%w: another hand-over is under way", ErrRefused))
	}
	unclaim := func() {
		p.over.mu.Lock()
		p.over.busy = false
		p.over.mu.Unlock()
	}
	taker := party{version: to.version}
	if hello.Windows != nil {
		taker.windows = *hello.Windows
	}
	ours := ourWindows()
	if err := agree(party{version: p.cfg.Version, windows: ours}, taker); err != nil {
		if errors.Is(err, ErrCurrent) {
			event(EventCurrent, err)
		} else {
			event(EventRefused, err)
		}
		unclaim()
		return refuse(err)
	}
	event(EventBegan, nil)
	g := &giver{p: p, to: to}
	err := to.send(frame{Kind: kindHello, Version: p.cfg.Version, PID: os.Getpid(), Windows: &ours})
	what := EventRefused
	if err == nil {
		if err = p.hush(ctx); err == nil {
			what, err = g.run(ctx)
			if err == nil {
				event(EventDone, nil)
				p.over.part(to)
				p.admit.end()
				p.board.thaw() // long polls are answered
				p.finished()
				return nil
			}
			p.speak()
		} else {
			err = errors.Join(err, to.send(frame{Kind: kindRefused, Text: err.Error()}))
		}
	}
	to.close()
	unclaim()
	event(what, err)
	return err
}

// finished ends this process in order, as if it had been told to.
func (p *Process) finished() {
	select {
	case p.asked <- client.Shutdown{}:
	default: // somebody else asked
	}
}

// hush lets verbs wait, ends those under way, and has State say what it says now until speak.
func (p *Process) hush(ctx context.Context) error {
	if err := p.admit.shut(ctx); err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	p.board.freeze()
	st, err := p.State(ctx)
	if err == nil {
		p.over.frozen.Store(&st)
		err = p.list.share()
	}
	if err != nil {
		p.speak()
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return nil
}

// speak ends what hush began.
func (p *Process) speak() {
	if err := p.list.unshare(); err != nil {
		p.log.Error("open.json after a hand-over that was not", "error", err)
	}
	p.over.frozen.Store(nil)
	p.board.thaw()
	p.admit.open()
}

// run does steps 3 to 10. When it fails everything is back, or being opened again, and it says which event that is.
func (g *giver) run(ctx context.Context) (string, error) {
	if err := g.begin(); err != nil {
		return EventRefused, err
	}
	g.p.stopCluster() // the locks of replicas that other nodes have open are free from here on; their volumes wait for whoever serves them next
	err := g.giveAll(ctx)
	if err == nil {
		if err = g.to.send(frame{Kind: kindCommit}); err == nil {
			_, err = g.to.expect(kindMine)
		}
		if err == nil {
			g.letGo()
			return EventDone, nil
		}
	}
	return g.takeBack(ctx, err)
}

// begin passes the run directory's lock and the disks.
func (g *giver) begin() error {
	p := g.p
	disks := p.disks()
	if p.locks == nil {
		return fmt.Errorf("%w: this process has no lock of its run directory to pass", ErrRefused)
	}
	if err := g.to.send(frame{Kind: kindBegin, Disks: len(disks), file: p.locks.Run()}); err != nil {
		return err
	}
	for _, d := range disks {
		lock, err := d.passLock()
		if err != nil {
			return err
		}
		err = g.to.send(frame{Kind: kindDisk, Disk: &client.Disk{Path: d.path, ClusterID: d.ClusterID, DiskID: d.DiskID}, file: lock})
		if err = errors.Join(err, lock.Close()); err != nil {
			return err
		}
	}
	_, err := g.to.expect(kindReady)
	return err
}

// giveAll passes every volume that is served, one after the other, and lets go of the others, which stand in open.json.
func (g *giver) giveAll(ctx context.Context) error {
	var rest []*given
	for _, s := range g.p.slots() {
		if err := s.take(ctx); err != nil {
			return err
		}
		s.mu.Lock()
		v := &given{s: s, entry: s.entry, state: s.state, why: s.err}
		served := s.vol != nil || s.state == stateFailed && s.entry.Failed != ""
		s.mu.Unlock()
		g.given = append(g.given, v)
		if !served {
			rest = append(rest, v)
			continue
		}
		pause, conns, err := g.p.give(ctx, g.to, v)
		if err != nil {
			return fmt.Errorf("volume %s: %w", v.entry.Open.Volume, err)
		}
		g.p.over.tell(HandOverEvent{What: EventVolume, From: g.p.cfg.Version, To: g.to.version, Volume: v.entry.Open.Volume, PauseMicros: pause.Microseconds(), Conns: conns})
	}
	for _, v := range rest {
		v.s.change(func(s *slot) { s.state = stateGiven })
	}
	return nil
}

// letGo forgets what the taker has.
func (g *giver) letGo() {
	for _, v := range g.given {
		g.p.forget(v.entry.Open.VolumeID)
		v.s.give()
	}
}

// takeBack has everything served here again. If the taker lives it gives back what it has, with the connections. Otherwise what it had is opened again, once it is dead.
func (g *giver) takeBack(ctx context.Context, why error) (string, error) {
	what := EventReturned
	if err := g.askBack(ctx, why); err != nil {
		what = EventLost
		if errors.Is(why, ErrRefused) { // it was lost only when it was asked to give back
			why = fmt.Errorf("%w, and then was lost: %w", why, err)
		}
		g.to.close()
		g.p.awaitDeath(g.to)
	}
	if err := g.p.resumeCluster(ctx); err != nil {
		g.p.log.Error("other nodes are not served", "error", err)
	}
	for _, v := range g.given {
		switch {
		case v.out || v.state == stateOpening:
			v.s.change(func(s *slot) { s.state, s.entry = stateOpening, v.entry })
			g.p.wg.Go(func() { g.p.reopenSlot(v.s, g.p.current(v.entry)) }) // with the token
		default:
			v.s.change(func(s *slot) {
				if s.state == stateGiven {
					s.state, s.err = v.state, v.why
				}
			})
			v.s.give()
		}
	}
	return what, why
}

// askBack has a taker that refused something give back all it has; an error means that it is lost.
func (g *giver) askBack(ctx context.Context, why error) error {
	if !errors.Is(why, ErrRefused) {
		return why
	}
	if err := g.to.send(frame{Kind: kindReturn}); err != nil {
		return err
	}
	for {
		f, err := g.to.expect(kindVolume, kindReturned)
		if err != nil {
			return err
		}
		if f.Kind == kindReturned {
			f.drop()
			return nil
		}
		if err := g.takeOneBack(ctx, f); err != nil {
			return err
		}
	}
}

// takeOneBack serves a volume again that the taker gives back. What cannot be opened at once is opened later, without its connections.
func (g *giver) takeOneBack(ctx context.Context, f frame) error {
	got, err := g.to.receiveVolume(f)
	if err != nil {
		return err
	}
	defer got.drop()
	for _, v := range g.given {
		if !v.out || v.entry.Open.VolumeID != got.entry.Open.VolumeID {
			continue
		}
		v.entry = got.entry
		w, err := g.p.takeInto(ctx, v.s, got)
		if err != nil {
			return g.to.send(frame{Kind: kindRefused, Text: err.Error()})
		}
		v.out = false
		return g.to.send(frame{Kind: kindTook, Epoch: w.Epoch, Session: w.Session})
	}
	return fmt.Errorf("%w: volume %.40q was not given", errFrame, got.entry.Open.VolumeID)
}

// current is what open.json says of a volume now, for another process may have written it.
func (p *Process) current(e openEntry) openEntry {
	if err := p.list.reload(); err != nil {
		p.log.Error("open.json cannot be read again", "error", err)
	}
	if now, ok := p.list.volume(e.Open.VolumeID); ok {
		return now
	}
	return e
}

// awaitDeath returns when the other process is dead, for only then what it had is free. One that does not go within stepTimeout is ended: this process has the run directory.
func (p *Process) awaitDeath(of *peer) {
	deadline := time.Now().Add(stepTimeout)
	for !hold.VersionEnded(p.cfg.RunDir, of.version) {
		if time.Now().After(deadline) {
			p.log.Error("the data process that was to take over does not go; it is killed", "pid", of.pid, "version", of.version)
			if err := syscall.Kill(of.pid, syscall.SIGKILL); err != nil {
				p.log.Error("kill it", "error", err)
			}
			deadline = time.Now().Add(stepTimeout)
		}
		<-time.After(deathPoll)
	}
}

// deathPoll is how often it is looked whether another process is dead.
const deathPoll = 2 * time.Millisecond
