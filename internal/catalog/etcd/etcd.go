// Package etcd keeps the catalogue in etcd: one member inside this process that listens nowhere (Options.Dir), or an etcd that exists already
// (Options.Endpoints). docs/formats/catalog.md says what the keys hold; catalogtest what must be true.
//
// Read next: member.go (the embedded member and why it is tuned as it is), catalog (the contract).
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

// Store is a catalog.Catalog on etcd. What it acknowledged survives a power cut.
type Store struct {
	client *clientv3.Client
	member *member // nil if the etcd is not ours

	ctx    context.Context // ends when Close begins
	cancel context.CancelFunc

	mu     sync.Mutex // guards closed against calls.Add
	closed bool
	calls  sync.WaitGroup // every call under way
}

var _ catalog.Catalog = (*Store)(nil)

// Open starts the embedded member, or connects to an existing etcd, and returns when it can be read and written. ErrInUse and ErrDamaged are about Dir;
// ErrUnreachable of catalog if ctx ended first. The caller closes it.
func Open(ctx context.Context, o Options) (*Store, error) {
	if (o.Dir == "") == (len(o.Endpoints) == 0) {
		return nil, fmt.Errorf("etcd: either a directory or endpoints: %w", ErrOptions)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{}
	if o.Dir != "" {
		m, err := startMember(ctx, o.Dir, o.Log)
		if err != nil {
			return nil, fmt.Errorf("etcd %s: %w", o.Dir, err)
		}
		s.member, s.client = m, m.client
	} else {
		c, err := dial(o)
		if err != nil {
			return nil, fmt.Errorf("etcd %s: %w", strings.Join(o.Endpoints, ","), err)
		}
		s.client = c
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if _, err := s.client.Get(ctx, catalog.Prefix); err != nil { // linearizable: a leader answered
		err = s.failed(ctx, err)
		return nil, errors.Join(fmt.Errorf("etcd: first read: %w", err), s.Close())
	}
	return s, nil
}

func dial(o Options) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints: o.Endpoints, TLS: o.TLS, Logger: quiet(o.Log),
		DialTimeout: 5 * time.Second, DialKeepAliveTime: 5 * time.Second, DialKeepAliveTimeout: 5 * time.Second,
	})
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

// failed turns what the client said into the contract's errors. ctx is the caller's.
func (s *Store) failed(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, rpctypes.ErrCompacted):
		return catalog.ErrCompacted
	default:
		return fmt.Errorf("%w: %w", catalog.ErrUnreachable, err)
	}
}

func storeKey(k catalog.Key) string { return catalog.Prefix + k.String() }

func entry(kv *mvccpb.KeyValue) (catalog.Entry, error) {
	k, err := catalog.ParseKey(strings.TrimPrefix(string(kv.Key), catalog.Prefix))
	return catalog.Entry{Key: k, Value: kv.Value, Rev: catalog.Rev(kv.ModRevision)}, err
}

// Get implements catalog.Catalog.
func (s *Store) Get(ctx context.Context, k catalog.Key) (catalog.Entry, error) {
	call, end, err := s.begin(ctx)
	if err != nil {
		return catalog.Entry{}, err
	}
	defer end()
	r, err := s.client.Get(call, storeKey(k))
	if err != nil {
		return catalog.Entry{}, s.failed(ctx, err)
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
	call, end, err := s.begin(ctx)
	if err != nil {
		return 0, err
	}
	defer end()
	key := storeKey(k)
	r, err := s.client.Txn(call).If(clientv3.Compare(clientv3.ModRevision(key), "=", int64(was))).Then(clientv3.OpPut(key, string(value))).Commit()
	if err != nil {
		return 0, s.failed(ctx, err)
	}
	if !r.Succeeded {
		return 0, catalog.ErrConflict
	}
	return catalog.Rev(r.Header.Revision), nil
}

// Delete implements catalog.Catalog.
func (s *Store) Delete(ctx context.Context, k catalog.Key, was catalog.Rev) error {
	call, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	key := storeKey(k)
	r, err := s.client.Txn(call).If(clientv3.Compare(clientv3.ModRevision(key), "=", int64(was))).
		Then(clientv3.OpDelete(key)).Else(clientv3.OpGet(key, clientv3.WithCountOnly())).Commit()
	switch {
	case err != nil:
		return s.failed(ctx, err)
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
	call, end, err := s.begin(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer end()
	prefix := catalog.Prefix
	if kind != "" {
		prefix += string(kind) + "/"
	}
	r, err := s.client.Get(call, prefix, clientv3.WithPrefix())
	if err != nil {
		return nil, 0, s.failed(ctx, err)
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

// Watch implements catalog.Catalog.
func (s *Store) Watch(ctx context.Context, from catalog.Rev, fn func(catalog.Event) error) error {
	call, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	opts := []clientv3.OpOption{clientv3.WithPrefix(), clientv3.WithRev(int64(from) + 1)}
	for r := range s.client.Watch(clientv3.WithRequireLeader(call), catalog.Prefix, opts...) {
		if err := r.Err(); err != nil {
			return s.failed(ctx, err)
		}
		for _, ev := range r.Events {
			e, err := entry(ev.Kv)
			if err != nil {
				continue
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			if ev.Type == mvccpb.Event_DELETE {
				e.Value = nil
			}
			if err := fn(catalog.Event{Entry: e}); err != nil {
				return err
			}
		}
	}
	return s.failed(ctx, errWatchEnded)
}

var errWatchEnded = errors.New("watch ended")

// Hold implements catalog.Catalog, with a lease of etcd's.
func (s *Store) Hold(ctx context.Context, h catalog.Holding, held func(catalog.Rev)) error {
	if err := catalog.CheckRecord(h.Key, h.Value); err != nil {
		return err
	}
	call, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	lease, err := s.client.Grant(call, max(1, int64(h.TTL/time.Second)))
	if err != nil {
		return s.failed(ctx, err)
	}
	r, err := s.client.Put(call, storeKey(h.Key), string(h.Value), clientv3.WithLease(lease.ID))
	if err != nil {
		return s.failed(ctx, err)
	}
	beats, err := s.client.KeepAlive(call, lease.ID)
	if err != nil {
		return s.failed(ctx, err)
	}
	held(catalog.Rev(r.Header.Revision))
	for range beats {
	}
	if ctx.Err() != nil {
		bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_, _ = s.client.Revoke(bye, lease.ID) // the lease runs out by itself
		return ctx.Err()
	}
	return fmt.Errorf("%s was given up: %w", h.Key, catalog.ErrUnreachable)
}

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
	err := s.client.Close()
	if errors.Is(err, context.Canceled) { // the in-process client's way to say that it ended
		err = nil
	}
	if s.member != nil {
		err = errors.Join(err, s.member.close())
	}
	return err
}

// Compact forgets every change up to now: a watch from before must list again. The embedded member does so by itself; this is for tests and for
// making room at once.
func (s *Store) Compact(ctx context.Context) error {
	call, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	r, err := s.client.Get(call, catalog.Prefix, clientv3.WithCountOnly())
	if err == nil {
		_, err = s.client.Compact(call, r.Header.Revision)
	}
	if err != nil {
		return s.failed(ctx, err)
	}
	return nil
}
