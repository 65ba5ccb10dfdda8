// Package etcd keeps the catalogue in etcd: one member inside this process that listens nowhere (Options.Dir), one of several members (Options.Member), or an
// etcd that exists already (Options.Endpoints). docs/formats/catalog.md says what the keys hold, where the catalogue lives and what each failure does; catalogtest what must be true.
//
// Read next: member.go (the embedded member and why it is tuned as it is), cluster.go (one of several), router.go (which member is asked), lease.go (holding and
// leading), catalog (the contract).
package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"ashlar/internal/catalog"
)

// Options say where the catalogue is: exactly one of Dir and Endpoints.
type Options struct {
	Dir       string       // of the embedded member; made if it is not there
	Member    *Member      // with Dir: a member that others reach; nil: it is alone and listens nowhere
	Endpoints []string     // of an existing etcd, or of voters by a node that is none; tried in this order
	Sync      bool         // Endpoints are our own voters: follow their member list
	TLS       *tls.Config  // for Endpoints; nil: none, or Files
	Files     Files        // for Endpoints instead of TLS; followed when they change
	Log       *slog.Logger // errors of etcd itself; nil: dropped
}

var (
	// ErrInUse: another process has the embedded member's directory open.
	ErrInUse = errors.New("directory is in use by another process")
	// ErrDamaged: etcd refused what it found in its directory. What it said is in the error.
	ErrDamaged = errors.New("etcd's files are damaged")
	// ErrOptions: the options contradict each other.
	ErrOptions = errors.New("bad options")
)

// Store is a catalog.Catalog on etcd. What it acknowledged survives a power cut (of a majority of the members, if there are several).
type Store struct {
	log     *slog.Logger
	member  *member // nil if the etcd is not ours
	router  *router // nil for a member that is alone
	options *Member // nil but for one of several members

	ctx     context.Context // ends when Close begins
	cancel  context.CancelFunc
	workers sync.WaitGroup // the router's goroutine

	mu     sync.Mutex // guards all below, and closed against calls.Add
	closed bool
	calls  sync.WaitGroup // every call under way
	route  *route         // nil: nobody answers
	away   error          // why nobody answers
	moved  chan struct{}  // closed and replaced when route changes
	known  []string       // URLs of the members that can be asked
}

// route is the client that calls go through, until it is over.
type route struct {
	client *clientv3.Client
	ctx    context.Context // ends when the route is over
	cancel context.CancelFunc
	inside bool // the client's calls run etcd's own code
}

var _ catalog.Catalog = (*Store)(nil)

// errStarting: no member has answered yet.
var errStarting = errors.New("no member has answered yet")

// Open starts the embedded member, or connects to an existing etcd, and returns when it can be read and written; in a cluster also through other members, if the own one fails (MemberState).
// ErrInUse, ErrDamaged, ErrRemoved and ErrEmptied are about Dir; ErrUnreachable of catalog if ctx ended first. The caller closes it.
func Open(ctx context.Context, o Options) (*Store, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{log: o.Log, away: errStarting, moved: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	var err error
	switch {
	case o.Member != nil:
		err = s.openClustered(ctx, o)
	case o.Dir != "":
		err = s.openAlone(ctx, o)
	default:
		err = s.openEndpoints(o)
	}
	if err == nil {
		err = s.firstRead(ctx)
	}
	if err == nil && o.Member != nil {
		err = s.announce(ctx)
	}
	if err != nil {
		where := o.Dir
		if where == "" {
			where = strings.Join(o.Endpoints, ",")
		}
		return nil, errors.Join(fmt.Errorf("etcd %s: %w", where, err), s.Close())
	}
	return s, nil
}

func (o Options) check() error {
	switch {
	case (o.Dir == "") == (len(o.Endpoints) == 0):
		return fmt.Errorf("etcd: either a directory or endpoints: %w", ErrOptions)
	case o.Member != nil && o.Dir == "":
		return fmt.Errorf("etcd: a member needs a directory: %w", ErrOptions)
	case o.Member != nil:
		return o.Member.check()
	}
	return nil
}

// openAlone starts a member that calls are made to in this process.
func (s *Store) openAlone(ctx context.Context, o Options) error {
	m, err := startAlone(ctx, o.Dir, o.Log)
	if err != nil {
		return err
	}
	s.member = m
	s.follow(m)
	s.setRoute(m.client, inside, nil)
	s.workers.Go(func() {
		select {
		case <-m.failed:
			_, err := m.state()
			s.setRoute(nil, inside, err)
		case <-s.ctx.Done():
		}
	})
	return nil
}

// openEndpoints asks members that are not ours.
func (s *Store) openEndpoints(o Options) error {
	d := dialer{tls: o.TLS, log: o.Log}
	if o.TLS == nil && o.Files != (Files{}) {
		var err error
		if d.tls, err = o.Files.client(); err != nil {
			return err
		}
	}
	s.router = newRouter(s, d.dial, o.Endpoints)
	s.router.sync, s.router.why = o.Sync, d.why
	s.workers.Go(s.router.run)
	return nil
}

// firstRead waits until somebody answers a linearizable read: there is a leader.
func (s *Store) firstRead(ctx context.Context) error {
	failed := s.MemberFailed()
	for {
		r, moved, why := s.current()
		if r != nil {
			break
		}
		select {
		case <-moved:
		case <-failed:
			failed = nil
			if _, err := s.member.state(); errors.Is(err, ErrRemoved) || s.options == nil || len(s.options.others()) == 0 {
				return err
			}
		case <-ctx.Done():
			return fmt.Errorf("%w: %w: %w", catalog.ErrUnreachable, ctx.Err(), why)
		}
	}
	return s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) error {
		_, err := c.Get(ctx, probeKey, clientv3.WithCountOnly())
		return err
	})
}

// where says where a client's calls are carried out.
type where int

const (
	outside where = iota
	inside        // in this process
)

// setRoute makes calls go through c; nil: nobody answers, and why.
func (s *Store) setRoute(c *clientv3.Client, w where, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.route != nil {
		s.route.cancel()
	}
	s.route, s.away = nil, why
	if c != nil {
		r := &route{client: c, inside: w == inside}
		r.ctx, r.cancel = context.WithCancel(s.ctx)
		s.route = r
	}
	close(s.moved)
	s.moved = make(chan struct{})
}

// current returns the route, or nil and why there is none, and a channel that closes when that changes.
func (s *Store) current() (*route, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.route, s.moved, s.away
}

// begin registers a call: its context ends with ctx or with Close. The caller calls end.
func (s *Store) begin(ctx context.Context) (context.Context, func(), error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, fmt.Errorf("closed: %w", catalog.ErrUnreachable)
	}
	s.calls.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.ctx, cancel)
	return ctx, func() { stop(); cancel(); s.calls.Done() }, nil
}

// tries says whether a call may be made again when nobody knows whether it has happened.
type tries int

const (
	once  tries = iota // it changes something
	again              // it can be repeated
)

const (
	// callPatience is how long a call is tried again before the catalogue counts as unreachable: longer than an election, and than finding another member.
	callPatience = 5 * time.Second
	// changePatience is how long a change may take. etcd would wait for seven seconds for one that was on its way to a leader that died; an election takes at most two.
	changePatience = 2500 * time.Millisecond
	// callWait stands between two tries through the same member.
	callWait = 50 * time.Millisecond
)

// call makes a call through a member that answers. fn may run more than once with again, and with once too if etcd said that it did nothing. fn must not be looked
// at after an error: it may still be running.
func (s *Store) call(ctx context.Context, t tries, fn func(context.Context, *clientv3.Client) error) error {
	call, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	patience := time.NewTimer(callPatience)
	defer patience.Stop()
	for {
		r, moved, why := s.current()
		if r == nil {
			return fmt.Errorf("%w: %w", catalog.ErrUnreachable, why)
		}
		try, cancel := call, context.CancelFunc(func() {})
		if t == once && s.router != nil {
			try, cancel = context.WithTimeout(call, changePatience)
		}
		over, err := r.do(try, fn)
		cancel()
		if err == nil || call.Err() != nil || !repeat(t, over, err) {
			return s.failed(ctx, err)
		}
		s.router.kick()
		wait := time.NewTimer(callWait)
		select {
		case <-moved:
		case <-wait.C:
		case <-call.Done():
		case <-patience.C:
			wait.Stop()
			return s.failed(ctx, err)
		}
		wait.Stop()
	}
}

// do runs fn with a context that ends with the route; over tells that it did.
func (r *route) do(ctx context.Context, fn func(context.Context, *clientv3.Client) error) (over bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)()
	if !r.inside {
		err = fn(ctx, r.client)
		return r.ctx.Err() != nil, err
	}
	// etcd's own code runs here: if it gives up, this goroutine ends in it, or hangs.
	done := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		err := errMemberStopped
		defer func() { done <- err }()
		err = fn(ctx, r.client)
	})
	select {
	case err = <-done:
		return r.ctx.Err() != nil, err
	case <-r.ctx.Done():
		return true, errMemberStopped
	}
}

var errMemberStopped = errors.New("the member stopped")

// repeat tells whether a call that failed is worth another try: it did nothing, or may be repeated and somebody else may answer.
func repeat(t tries, over bool, err error) bool {
	if errors.Is(err, rpctypes.ErrNoLeader) { // refused before anything was done
		return true
	}
	if t == once {
		return false
	}
	switch code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Internal:
		return true
	}
	return over
}

func code(err error) codes.Code {
	var e rpctypes.EtcdError
	if errors.As(err, &e) {
		return e.Code()
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	}
	return status.Code(err)
}

// failed turns what the client said into the contract's errors. ctx is the caller's.
func (s *Store) failed(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, rpctypes.ErrCompacted):
		return catalog.ErrCompacted
	}
	if _, _, why := s.current(); why != nil {
		err = why
	}
	return fmt.Errorf("%w: %w", catalog.ErrUnreachable, err)
}

func storeKey(k catalog.Key) string { return catalog.Prefix + k.String() }

func entry(kv *mvccpb.KeyValue) (catalog.Entry, error) {
	k, err := catalog.ParseKey(strings.TrimPrefix(string(kv.Key), catalog.Prefix))
	return catalog.Entry{Key: k, Value: kv.Value, Rev: catalog.Rev(kv.ModRevision)}, err
}

// Get implements catalog.Catalog.
func (s *Store) Get(ctx context.Context, k catalog.Key) (catalog.Entry, error) {
	var r *clientv3.GetResponse
	if err := s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) (err error) {
		r, err = c.Get(ctx, storeKey(k))
		return err
	}); err != nil {
		return catalog.Entry{}, err
	}
	if len(r.Kvs) == 0 {
		return catalog.Entry{}, catalog.ErrNotFound
	}
	return entry(r.Kvs[0])
}

// Put implements catalog.Catalog.
func (s *Store) Put(ctx context.Context, k catalog.Key, value []byte, was catalog.Rev) (catalog.Rev, error) {
	if err := catalog.CheckRecord(k, value); err != nil {
		return 0, err
	}
	key := storeKey(k)
	var r *clientv3.TxnResponse
	if err := s.call(clientv3.WithRequireLeader(ctx), once, func(ctx context.Context, c *clientv3.Client) (err error) {
		r, err = c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", int64(was))).Then(clientv3.OpPut(key, string(value))).Commit()
		return err
	}); err != nil {
		return 0, err
	}
	if !r.Succeeded {
		return 0, catalog.ErrConflict
	}
	return catalog.Rev(r.Header.Revision), nil
}

// Delete implements catalog.Catalog.
func (s *Store) Delete(ctx context.Context, k catalog.Key, was catalog.Rev) error {
	key := storeKey(k)
	var r *clientv3.TxnResponse
	err := s.call(clientv3.WithRequireLeader(ctx), once, func(ctx context.Context, c *clientv3.Client) (err error) {
		r, err = c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", int64(was))).
			Then(clientv3.OpDelete(key)).Else(clientv3.OpGet(key, clientv3.WithCountOnly())).Commit()
		return err
	})
	switch {
	case err != nil:
		return err
	case r.Succeeded && r.Responses[0].GetResponseDeleteRange().GetDeleted() == 1:
		return nil
	case r.Succeeded || r.Responses[0].GetResponseRange().GetCount() == 0:
		return catalog.ErrNotFound
	default:
		return catalog.ErrConflict
	}
}

// List implements catalog.Catalog.
func (s *Store) List(ctx context.Context, kind catalog.Kind) ([]catalog.Entry, catalog.Rev, error) {
	prefix := catalog.Prefix
	if kind != "" {
		prefix += string(kind) + "/"
	}
	var r *clientv3.GetResponse
	if err := s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) (err error) {
		r, err = c.Get(ctx, prefix, clientv3.WithPrefix())
		return err
	}); err != nil {
		return nil, 0, err
	}
	es := make([]catalog.Entry, 0, len(r.Kvs))
	for _, kv := range r.Kvs {
		e, err := entry(kv)
		if err != nil {
			continue // not a record of ours, perhaps of a later version: it is nobody's here
		}
		es = append(es, e)
	}
	return es, catalog.Rev(r.Header.Revision), nil
}

// Watch implements catalog.Catalog. When its member fails it goes on through another, where it was.
func (s *Store) Watch(ctx context.Context, from catalog.Rev, fn func(catalog.Event) error) error {
	call, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	next := int64(from) + 1
	for {
		r, moved, why := s.current()
		if r == nil {
			return s.failed(ctx, fmt.Errorf("watch ended: %w", why))
		}
		stop, err := s.watch(call, r, &next, fn)
		switch {
		case stop:
			return err
		case call.Err() != nil || s.router == nil || errors.Is(err, rpctypes.ErrCompacted):
			return s.failed(ctx, err)
		}
		s.router.kick()
		wait := time.NewTimer(callWait)
		select {
		case <-moved:
		case <-wait.C:
		case <-call.Done():
		}
		wait.Stop()
	}
}

// watch watches through one member from *next on, and moves it. stop tells that err is for the caller as it is: fn's, or the context's.
func (s *Store) watch(ctx context.Context, r *route, next *int64, fn func(catalog.Event) error) (stop bool, err error) {
	here, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)()
	for resp := range r.client.Watch(here, catalog.Prefix, clientv3.WithPrefix(), clientv3.WithRev(*next)) {
		if err := resp.Err(); err != nil {
			return false, err
		}
		for _, ev := range resp.Events {
			e, err := entry(ev.Kv)
			if err != nil {
				continue
			}
			if ctx.Err() != nil {
				return false, errWatchEnded
			}
			if ev.Type == mvccpb.Event_DELETE {
				e.Value = nil
			}
			if err := fn(catalog.Event{Entry: e}); err != nil {
				return true, err
			}
		}
		if n := len(resp.Events); n > 0 { // a response holds whole revisions
			*next = resp.Events[n-1].Kv.ModRevision + 1
		}
	}
	return false, errWatchEnded
}

var errWatchEnded = errors.New("watch ended")

// Close implements catalog.Catalog: it ends every call, waits for them, and stops the embedded member.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.calls.Wait()
	s.workers.Wait()
	var err error
	if s.router != nil {
		err = s.router.close()
	}
	if s.member != nil {
		err = errors.Join(err, s.member.close())
	}
	return err
}

// Compact forgets every change up to now: a watch from before must list again. The embedded member does so by itself; this is for tests and for
// making room at once.
func (s *Store) Compact(ctx context.Context) error {
	return s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) error {
		r, err := c.Get(ctx, catalog.Prefix, clientv3.WithCountOnly())
		if err == nil {
			_, err = c.Compact(ctx, r.Header.Revision)
		}
		if errors.Is(err, rpctypes.ErrCompacted) { // somebody else did
			err = nil
		}
		return err
	})
}
