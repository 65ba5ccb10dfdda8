package agent

import (
	"context"
	"errors"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/plan"
)

// The waits after an action failed, and after a write did.
const (
	failMin   = 250 * time.Millisecond
	failMax   = 30 * time.Second
	inUseMax  = 5 * time.Second
	holdWrite = 200 * time.Millisecond
)

// loop is the state of a running Agent. All of it belongs to run's goroutine; everybody else sends.
type loop struct {
	a *Agent

	view    *plan.View
	listed  bool        // the view is complete
	catAway bool        // the catalogue does not answer: the view may be old, nothing is done
	seen    catalog.Rev // how far the watch has shown the catalogue
	looked  bool        // somebody said how the data process is; before that nothing is known of it, not even that it is away
	found   plan.Found
	hello   client.Hello // of the process that found is from
	rev     uint64       // of found

	busy     map[string]bool         // action keys
	failures map[string]plan.Failure // by plan.FailureID
	waits    map[string]time.Duration
	finished map[string]plan.Result // operations carried out, by id

	writing map[catalog.Key]bool      // writes under way
	held    map[catalog.Key]time.Time // writes that failed wait until then, or until the record changes
	calm    map[catalog.Key]time.Time // when a record was last written, for those that are throttled

	background *int64                 // what the data process was told that its own work may move; nil: nothing yet
	readings   map[string]bool        // that somebody wants, as of the last plan
	uploads    map[string]plan.Upload // by image id

	changed dirty                // what is to be planned anew
	acting  map[string]string    // actions under way: which volume they are of, by key
	wakes   map[string]time.Time // volumes that are planned again then, by name
	nodeAt  time.Time            // when the node's own record is planned again; zero: when something changes
	joined  *plan.Joined         // as of the last plan
	silent  map[string]time.Time // since when other nodes are not alive, of those that were

	// inbox takes catalog.Batch, stateOrAway, result, written, uploaded, poke and func(*loop).
	inbox chan any
}

// poke asks for a plan: something that plans look at changed (Agent.downloads).
type poke struct{}

// uploaded is news of an upload: put is what was written of it, state a look after it. A nil upload says that nothing came of it.
type uploaded struct {
	imageID string
	upload  *plan.Upload
	put     []catalog.Entry
	state   *client.State
}

// stateOrAway is a look at the data process, or that it does not answer.
type stateOrAway struct {
	away  bool
	state client.State
}

func newLoop(a *Agent) *loop {
	return &loop{
		a: a, view: plan.NewView(), busy: map[string]bool{}, failures: map[string]plan.Failure{}, waits: map[string]time.Duration{},
		finished: map[string]plan.Result{}, writing: map[catalog.Key]bool{}, held: map[catalog.Key]time.Time{}, calm: map[catalog.Key]time.Time{},
		uploads: map[string]plan.Upload{}, changed: dirty{all: true}, acting: map[string]string{}, wakes: map[string]time.Time{}, silent: map[string]time.Time{},
		inbox: a.inbox,
	}
}

// run takes what happened, plans, and begins what follows, until ctx ends.
func (l *loop) run(ctx context.Context) {
	l.a.wg.Go(func() {
		_ = catalog.Follow(ctx, l.a.cfg.Catalog, func(b catalog.Batch) error { return send(ctx, l.inbox, b) })
	})
	l.a.wg.Go(func() { l.a.watchData(ctx, l.inbox) })
	timer := time.NewTimer(l.a.cfg.Resync)
	defer timer.Stop()
	nextLook := l.now().Add(l.a.cfg.Resync)
	for l.wait(ctx, timer) {
		if now := l.now(); !now.Before(nextLook) {
			nextLook = now.Add(l.a.cfg.Resync)
			l.forget(now)
			l.changed.all = true
			l.a.wg.Go(func() { l.a.look(ctx, l.inbox) })
		}
		wake := l.plan(ctx)
		if wake.IsZero() || wake.After(nextLook) {
			wake = nextLook
		}
		timer.Reset(max(0, wake.Sub(l.now())))
	}
}

func (l *loop) now() time.Time { return l.a.cfg.Now() }

func send(ctx context.Context, c chan<- any, v any) error {
	select {
	case c <- v:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// wait takes everything that has happened, at least one thing; false when all is over.
func (l *loop) wait(ctx context.Context, timer *time.Timer) bool {
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
	case news := <-l.inbox:
		l.take(news)
	}
	for {
		select {
		case news := <-l.inbox:
			l.take(news)
		default:
			return ctx.Err() == nil
		}
	}
}

func (l *loop) take(news any) {
	switch v := news.(type) {
	case catalog.Batch:
		l.takeBatch(v)
	case stateOrAway:
		l.takeState(v)
	case result:
		l.takeResult(v)
	case written:
		l.takeWritten(v)
	case uploaded:
		l.takeUploaded(v)
	case func(*loop): // a question
		v(l)
	}
}

// takeUploaded takes what an upload wrote and saw together with how it goes, so that nothing is planned from the one without the other.
func (l *loop) takeUploaded(u uploaded) {
	if u.state != nil {
		l.takeState(stateOrAway{state: *u.state})
	}
	for _, e := range u.put {
		l.applyOwn(e)
	}
	if u.upload == nil {
		delete(l.uploads, u.imageID)
	} else {
		l.uploads[u.imageID] = *u.upload
	}
}

func (l *loop) takeBatch(b catalog.Batch) {
	if l.catAway = b.Away; !b.Away {
		l.seen = b.Rev
	}
	if b.Reset {
		l.view.Reset()
		l.listed, l.changed.all = true, true
	}
	for _, ev := range b.Events {
		l.apply(ev)
	}
}

// applyOwn applies what this agent wrote before the watch shows it. If the watch is past it already, it may also have shown that the record is gone since,
// and the view must not have it again.
func (l *loop) applyOwn(e catalog.Entry) {
	if e.Rev > l.seen {
		l.apply(catalog.Event{Entry: e})
	}
}

func (l *loop) apply(ev catalog.Event) {
	delete(l.held, ev.Key)
	before := l.glance(ev)
	if err := l.view.Apply(ev); err != nil {
		l.a.cfg.Log.Error("record cannot be read", "error", err)
	}
	l.markRecord(ev, before)
}

// takeState keeps the newest look at the newest process. Looks arrive in any order.
func (l *loop) takeState(s stateOrAway) {
	l.looked = true
	if s.away {
		l.found, l.background, l.changed.all = plan.Found{}, nil, true
		return
	}
	h := s.state.Hello
	switch {
	case h.Started.Before(l.hello.Started):
		return
	case h.Started.Equal(l.hello.Started) && h.PID == l.hello.PID && s.state.Rev < l.rev:
		return
	case h.PID != l.hello.PID && l.hello.PID != 0:
		l.a.note(catalog.EventRecord{
			Time: l.now().UTC(), Type: catalog.Warning, Kind: catalog.KindNode, Name: l.a.cfg.Node, Reason: "DataProcessRestarted", Message: "the data process was started again",
		})
	}
	if !h.Started.Equal(l.hello.Started) || h.PID != l.hello.PID {
		l.background = nil
	}
	now := found(s.state)
	l.markFound(l.found.Diff(&now))
	l.hello, l.rev, l.found = h, s.state.Rev, now
}

// takeResult ends an action.
func (l *loop) takeResult(r result) {
	delete(l.busy, r.action.Key())
	l.markAction(r.action)
	if r.state != nil {
		l.takeState(stateOrAway{state: *r.state})
	}
	for _, e := range r.put {
		l.applyOwn(e)
	}
	if r.finished != nil {
		l.finished[finishes(r.action)] = *r.finished
	}
	if b, ok := r.action.(plan.SetBackground); ok && r.err == nil {
		l.background = &b.BytesPerSecond
	}
	id := plan.FailureID(r.action)
	if r.err == nil {
		delete(l.failures, id)
		delete(l.waits, id)
		return
	}
	if l.failures[id].Rev != r.action.Because() {
		delete(l.waits, id) // something else was wanted before
	}
	inUse := errors.Is(r.err, client.ErrInUse)
	l.waits[id] = min(max(failMin, 2*l.waits[id]), failMax)
	if inUse { // somebody unmounts it, and waits
		l.waits[id] = min(l.waits[id], inUseMax)
	}
	l.failures[id] = plan.Failure{Code: catalogCode(r.err), Message: r.err.Error(), Rev: r.action.Because(), Next: l.now().Add(l.waits[id]), InUse: inUse}
	l.a.cfg.Log.Warn("action failed", "action", id, "error", r.err)
}

// forget drops failures that nobody asked about for long.
func (l *loop) forget(now time.Time) {
	for id, f := range l.failures {
		if now.Sub(f.Next) > 10*failMax {
			delete(l.failures, id)
			delete(l.waits, id)
		}
	}
	for _, img := range l.view.Images {
		id := img.Wanted.Value.ID
		if u, ok := l.uploads[id]; ok && (u.Taken || u.Failed != "") && !underWay(img) {
			delete(l.uploads, id)
		}
	}
	for key, t := range l.calm {
		if now.Sub(t) > failMax {
			delete(l.calm, key)
		}
	}
}

func underWay(img plan.Image) bool {
	for _, d := range img.Observed.Value.Disks {
		if d.State == catalog.ImageStarting || d.State == catalog.ImageInProgress {
			return true
		}
	}
	return false
}

// plan asks plan and begins what it says.
func (l *loop) plan(ctx context.Context) (wake time.Time) {
	if !l.listed || !l.looked || l.catAway || l.a.stopping.Load() || ctx.Err() != nil {
		return time.Time{}
	}
	l.forgetFinished()
	if now := l.a.joined(); now != nil && (l.joined == nil || *now != *l.joined) {
		l.joined, l.changed.node = now, true
	}
	in := plan.NodeInput{
		Node: l.a.cfg.Node, Address: l.a.cfg.Address, Now: l.now(), View: l.view, Found: l.found, Busy: l.busy, Failures: l.failures, Finished: l.finished,
		Background: l.background, Network: plan.Network(l.a.cfg.Network), Joined: l.joined, Silent: l.silent, Downloads: l.a.downloads.byVolume(), Uploads: l.uploads,
		Only: l.due(),
	}
	p := plan.OnNode(in)
	l.planned(p)
	for _, action := range p.Actions {
		if !l.busy[action.Key()] {
			l.begin(ctx, action, p.Volumes[action.Key()])
		}
	}
	wake = p.Wake
	for _, w := range p.Writes {
		if t := l.put(ctx, w); !t.IsZero() {
			l.later(w.Key, t)
			wake = earlier(wake, t)
		}
	}
	for _, t := range l.wakes {
		wake = earlier(wake, t)
	}
	return earlier(wake, l.nodeAt)
}

// finishes is the id under which an action's result is kept until it is recorded.
func finishes(action plan.Action) string {
	switch v := action.(type) {
	case plan.Operate:
		return v.Operation.Value.ID
	case plan.StartExport:
		return v.Operation.Value.ID
	case plan.EndExport:
		return v.Operation.Value.ID
	case plan.EndReading:
		return v.Reading.ID
	}
	return ""
}

// forgetFinished drops what is recorded, or has no record any more.
func (l *loop) forgetFinished() {
	if len(l.finished) == 0 {
		return
	}
	open := map[string]bool{}
	for _, ops := range l.view.Operations {
		for id, op := range ops {
			open[id] = op.Value.State != catalog.OperationDone && op.Value.State != catalog.OperationFailed
		}
	}
	for id := range l.finished {
		if !open[id] && !l.readings[id] {
			delete(l.finished, id)
		}
	}
}

// begin carries an action out on a goroutine of its own: one per volume, image and disk at most.
func (l *loop) begin(ctx context.Context, action plan.Action, volume string) {
	l.busy[action.Key()], l.acting[action.Key()] = true, volume
	l.a.wg.Go(func() {
		r := l.a.do(ctx, action)
		_ = send(ctx, l.inbox, r)
	})
}

// watchData keeps the connection to the data process and sends every state, and when it is away.
func (a *Agent) watchData(ctx context.Context, out chan<- any) {
	wait := retryMin
	for ctx.Err() == nil {
		s, err := a.cfg.EnsureData(ctx)
		if err == nil {
			a.service.Store(&s)
			var answered bool
			if answered, err = pollStates(ctx, s, out); answered {
				wait = retryMin
			}
			a.service.Store(nil)
		}
		if ctx.Err() != nil || a.stopping.Load() || send(ctx, out, stateOrAway{away: true}) != nil {
			return // when the node is shut down, nobody starts the data process again
		}
		a.cfg.Log.Warn("data process does not answer", "error", err)
		if errors.Is(err, client.ErrVersion) {
			wait = retryMax
		}
		pause(ctx, wait)
		wait = min(2*wait, retryMax)
	}
}

func pollStates(ctx context.Context, s client.Service, out chan<- any) (answered bool, err error) {
	st, err := s.State(ctx)
	for err == nil {
		answered = true
		if err := send(ctx, out, stateOrAway{state: st}); err != nil {
			return answered, err
		}
		st, err = s.WaitState(ctx, st.Rev)
	}
	return answered, err
}

// look asks for the state although nothing happened: sizes change by writes, which are no news.
func (a *Agent) look(ctx context.Context, out chan<- any) {
	s, err := a.data()
	if err != nil {
		return
	}
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if st, err := s.State(ask); err == nil {
		_ = send(ctx, out, stateOrAway{state: st})
	}
}
