package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

const (
	// probeKey is read to learn whether a member answers; nothing is there. A linearizable read needs a leader that a majority follows.
	probeKey = "/ashlar/probe"
	// beat is how often the member in use is probed, and probePatience how long it has: a member that hangs, or was cut off, is left within 1.5 s.
	beat          = 500 * time.Millisecond
	probePatience = time.Second
	// probeWait stands between two rounds while nobody answers.
	probeWait = 200 * time.Millisecond
	// awayAfter is how long nobody may answer before the catalogue counts as away: longer than an election, which is no reason to tell anybody.
	awayAfter = 3 * time.Second
	// homeAfter is how many probes in a row our own member must answer before it is used again.
	homeAfter = 3
	// syncEvery is how often the list of members is read.
	syncEvery = 3 * time.Second
)

// dialer makes clients of one member each.
type dialer struct {
	tls *tls.Config // nil: none
	log *slog.Logger
}

func (d dialer) dial(at string) (*clientv3.Client, error) {
	tc := d.tls
	if tc != nil {
		tc = tc.Clone()
	}
	return clientv3.New(clientv3.Config{
		Endpoints: []string{at}, TLS: tc, Logger: quiet(d.log),
		DialTimeout: 5 * time.Second,
		// The time-out is the kernel's too (TCP_USER_TIMEOUT): what was sent and is not confirmed for so long ends the connection.
		DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 2 * time.Second,
		MaxUnaryRetries: 1, // Store.call knows better
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 2 * time.Second,
		})},
	})
}

// why connects to a member as dial's client does, to learn why it does not answer: of a certificate that is refused, on either side, that client says only that time has passed. nil: it could be
// connected to.
func (d dialer) why(ctx context.Context, at string) error {
	u, err := url.Parse(at)
	if err != nil || u.Host == "" {
		return nil //nolint:nilerr // an address without a scheme: it is for the client to understand
	}
	ctx, cancel := context.WithTimeout(ctx, probePatience)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", u.Host)
	if err != nil || d.tls == nil || u.Scheme != "https" {
		if err == nil {
			err = conn.Close()
		}
		return err
	}
	tc := d.tls.Clone()
	tc.NextProtos = []string{"h2"}
	if tc.ServerName == "" {
		tc.ServerName = u.Hostname()
	}
	c := tls.Client(conn, tc)
	defer c.Close()
	if err := c.HandshakeContext(ctx); err != nil {
		return err
	}
	// In TLS 1.3 a server refuses a client's certificate after the client's side of the handshake is done (RFC 8446, 4.4.2.4); who takes it waits for what the client says.
	if err := c.SetReadDeadline(time.Now().Add(refusalPatience)); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// refusalPatience is how long a refusal of a certificate is waited for.
const refusalPatience = 300 * time.Millisecond

// end is a member that can be asked.
type end struct {
	url    string
	client *clientv3.Client
}

// router keeps a Store on one member that answers: its own if there is one and it does, else any. One member at a time, and not a balance between all, so that what hangs is found by
// one probe and left by everything at once.
type router struct {
	store *Store
	dial  func(url string) (*clientv3.Client, error)
	why   func(ctx context.Context, url string) error // may tell why a member does not answer; nil: nobody can
	own   string                                      // URL; "": none
	sync  bool                                        // follow the list of members
	kicks chan struct{}

	// Below is the goroutine's (run), and newRouter's and close's.
	ends    []*end
	using   *end
	heard   time.Time // when somebody answered last
	synced  time.Time
	cluster uint64    // id of the cluster; 0: nobody has answered yet
	home    int       // answers of our own member in a row, while another is used
	told    bool      // that nobody answers is said
	looked  time.Time // when it was found out why
}

func newRouter(s *Store, dial func(string) (*clientv3.Client, error), urls []string) *router {
	r := &router{store: s, dial: dial, kicks: make(chan struct{}, 1), heard: time.Now()}
	r.set(urls)
	return r
}

// kick makes the router look at once. A nil router has nothing to look for.
func (r *router) kick() {
	if r == nil {
		return
	}
	select {
	case r.kicks <- struct{}{}:
	default:
	}
}

// set makes urls the members that can be asked.
func (r *router) set(urls []string) {
	var ends []*end
	for _, u := range urls {
		if slices.ContainsFunc(ends, func(e *end) bool { return e.url == u }) {
			continue
		}
		if i := slices.IndexFunc(r.ends, func(e *end) bool { return e.url == u }); i >= 0 {
			ends = append(ends, r.ends[i])
			continue
		}
		c, err := r.dial(u)
		if err != nil {
			r.store.log.Error("catalogue member cannot be asked", "url", u, "error", err)
			continue
		}
		ends = append(ends, &end{url: u, client: c})
	}
	if len(ends) == 0 {
		return
	}
	for _, e := range r.ends {
		switch {
		case slices.Contains(ends, e):
		case e == r.using: // until it does not answer any more, which is soon if it was removed
			ends = append(ends, e)
		default:
			_ = e.client.Close()
		}
	}
	r.ends = ends
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	r.store.known = r.store.known[:0:0]
	for _, e := range ends {
		r.store.known = append(r.store.known, e.url)
	}
}

// run is the router's goroutine.
func (r *router) run() {
	ctx := r.store.ctx
	for ctx.Err() == nil {
		wait := beat
		if !r.round(ctx) {
			wait = probeWait
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-r.kicks:
			// Not more often than this, whatever is asked for.
			short := time.NewTimer(callWait / 2)
			select {
			case <-ctx.Done():
			case <-short.C:
			}
			short.Stop()
		case <-timer.C:
		}
		timer.Stop()
	}
}

// round looks whether the member in use answers, and finds another if not; it tells whether one does.
func (r *router) round(ctx context.Context) bool {
	if r.using != nil && r.ask(ctx, r.using) == nil {
		r.heard = time.Now()
		r.goHome(ctx)
	} else if e, err := r.anybody(ctx); e != nil {
		r.heard = time.Now()
		r.use(e)
	} else {
		if ctx.Err() == nil && time.Since(r.heard) > awayAfter && (r.using != nil || r.cluster == 0) {
			r.using = nil
			r.tell(ctx, err)
		}
		return false
	}
	if r.sync && time.Since(r.synced) > syncEvery {
		r.readMembers(ctx)
	}
	return true
}

// use makes e the member in use.
func (r *router) use(e *end) {
	if e == r.using {
		return
	}
	r.using, r.home, r.synced, r.told = e, 0, time.Time{}, false
	r.store.setRoute(e.client, outside, nil)
}

// goHome goes back to our own member when it has answered for a while.
func (r *router) goHome(ctx context.Context) {
	i := slices.IndexFunc(r.ends, func(e *end) bool { return e.url == r.own })
	if i < 0 || r.ends[i] == r.using {
		return
	}
	if r.ask(ctx, r.ends[i]) != nil {
		r.home = 0
		return
	}
	if r.home++; r.home >= homeAfter {
		r.use(r.ends[i])
	}
}

// anybody asks all members at once and returns the first that answers; our own is preferred as long as nobody was asked before.
func (r *router) anybody(ctx context.Context) (*end, error) {
	type answer struct {
		e       *end
		cluster uint64
		err     error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan answer, len(r.ends))
	for _, e := range r.ends {
		r.store.workers.Go(func() {
			id, err := probe(ctx, e)
			answers <- answer{e, id, err}
		})
	}
	var errs []error
	for range r.ends {
		a := <-answers
		if a.err == nil {
			a.err = r.same(a.cluster)
		}
		if a.err == nil {
			return a.e, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", a.e.url, a.err))
	}
	return nil, errors.Join(errs...)
}

// tell says that nobody answers, and why; now and then again, for the reason may become another.
func (r *router) tell(ctx context.Context, err error) {
	if r.told && time.Since(r.looked) < awayAfter {
		return
	}
	err = r.reasons(ctx, err)
	if !r.told {
		r.store.log.Warn("the catalogue does not answer; trying on", "error", err)
	}
	r.told, r.looked = true, time.Now()
	r.store.setRoute(nil, outside, err)
}

// reasons is why no member answers, where that can be told; else what anybody said.
func (r *router) reasons(ctx context.Context, err error) error {
	if r.why == nil || errors.Is(err, errForeign) {
		return err
	}
	all := make([]error, len(r.ends))
	var asked sync.WaitGroup
	for i, e := range r.ends {
		asked.Go(func() {
			if err := r.why(ctx, e.url); err != nil {
				all[i] = fmt.Errorf("%s: %w", e.url, err)
			}
		})
	}
	asked.Wait()
	if known := errors.Join(all...); known != nil {
		return known
	}
	return err
}

// ask probes a member.
func (r *router) ask(ctx context.Context, e *end) error {
	id, err := probe(ctx, e)
	if err != nil {
		return err
	}
	return r.same(id)
}

// probe reads nothing from a member, linearizably, and returns the id of its cluster.
func probe(ctx context.Context, e *end) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, probePatience)
	defer cancel()
	resp, err := e.client.Get(ctx, probeKey, clientv3.WithCountOnly())
	if err != nil {
		return 0, err
	}
	return resp.Header.ClusterId, nil
}

var errForeign = errors.New("it belongs to another cluster")

// same holds that all answers come from one cluster: a member that was left behind and made one of its own must not be taken for the others.
func (r *router) same(cluster uint64) error {
	if r.cluster == 0 {
		r.cluster = cluster
	}
	if r.cluster != cluster {
		return errForeign
	}
	return nil
}

// readMembers follows the list of members: those with a vote, for a learner answers nobody, and our own whatever it is.
func (r *router) readMembers(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, probePatience)
	defer cancel()
	list, err := r.using.client.MemberList(ctx)
	if err != nil {
		return // the next round
	}
	r.synced = time.Now()
	var urls []string
	if r.own != "" {
		urls = append(urls, r.own)
	}
	for _, m := range list.Members {
		if !m.IsLearner {
			urls = append(urls, m.ClientURLs...)
		}
	}
	r.set(urls)
}

// close ends the clients; the goroutine has ended.
func (r *router) close() error {
	var errs []error
	for _, e := range r.ends {
		if err := e.client.Close(); err != nil && !errors.Is(err, context.Canceled) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
