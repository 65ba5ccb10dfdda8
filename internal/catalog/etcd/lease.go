package etcd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"ashlar/internal/catalog"
)

const (
	// leaderKey is there while somebody leads. It lies beside the records, not among them.
	leaderKey = "/ashlar/leader"
	// byeWait bounds the attempt to give a lease back; it runs out by itself.
	byeWait = time.Second
)

// A lease is kept by saying every quarter of its time that we live. It may have run out when the time, less a tenth for clocks that run unequally and for goroutines that
// run late, is over since the last of these was *sent*: etcd begins to count later than that. Nobody's clock is compared with anybody else's.
func leaseBeat(ttl time.Duration) time.Duration { return ttl / 4 }
func leaseSure(ttl time.Duration) time.Duration { return ttl - ttl/10 }

// lease is time that etcd gives us.
type lease struct {
	s     *Store
	id    clientv3.LeaseID
	ttl   time.Duration
	until time.Time // it has not run out before
}

func (s *Store) grant(ctx context.Context, ttl time.Duration) (*lease, error) {
	l := &lease{s: s, ttl: ttl}
	sent := time.Now()
	err := s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) error {
		r, err := c.Grant(ctx, max(1, int64((ttl+time.Second-1)/time.Second)))
		if err == nil {
			l.id = r.ID
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	l.until = sent.Add(leaseSure(ttl))
	return l, nil
}

// keep keeps the lease; it returns when ctx ends (its error), or when the lease may have run out.
func (l *lease) keep(ctx context.Context) error {
	next := leaseBeat(l.ttl)
	for {
		wait := time.NewTimer(min(next, time.Until(l.until)))
		select {
		case <-ctx.Done():
			wait.Stop()
			return ctx.Err()
		case <-l.s.ctx.Done():
			wait.Stop()
			return fmt.Errorf("closed: %w", catalog.ErrUnreachable)
		case <-wait.C:
		}
		sent := time.Now()
		if !sent.Before(l.until) {
			return catalog.ErrUnreachable
		}
		next = leaseBeat(l.ttl)
		err := l.beat(ctx)
		switch {
		case err == nil:
			l.until = sent.Add(leaseSure(l.ttl))
		case errors.Is(err, rpctypes.ErrLeaseNotFound):
			return fmt.Errorf("%w: %w", catalog.ErrUnreachable, err)
		default:
			next = leaseBeat(l.ttl) / 4
		}
	}
}

// beat says once that we live.
func (l *lease) beat(ctx context.Context) error {
	ctx, cancel := context.WithDeadline(ctx, l.until)
	defer cancel()
	return l.s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) error {
		conn := c.ActiveConnection()
		if conn == nil { // in this process
			_, err := c.KeepAliveOnce(ctx, l.id)
			return err
		}
		// The client's own KeepAliveOnce tries again without a pause while its member is away.
		stream, err := pb.NewLeaseClient(conn).LeaseKeepAlive(clientv3.WithRequireLeader(ctx))
		if err != nil {
			return rpctypes.Error(err)
		}
		if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: int64(l.id)}); err != nil {
			return rpctypes.Error(err)
		}
		r, err := stream.Recv()
		if err != nil {
			return rpctypes.Error(err)
		}
		if err := stream.CloseSend(); err != nil {
			return rpctypes.Error(err)
		}
		if r.TTL <= 0 {
			return rpctypes.ErrLeaseNotFound
		}
		return nil
	})
}

// giveUp gives the lease back, and with it goes what hangs on it.
func (l *lease) giveUp(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), byeWait)
	defer cancel()
	_ = l.s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) error { // else it runs out by itself
		_, err := c.Revoke(ctx, l.id)
		return err
	})
}

// Hold implements catalog.Catalog, with a lease of etcd's. A record that another Hold replaced hangs on that one's lease, so the first one's end leaves it alone.
func (s *Store) Hold(ctx context.Context, h catalog.Holding, held func(catalog.Rev)) error {
	if err := catalog.CheckRecord(h.Key, h.Value); err != nil {
		return err
	}
	l, err := s.grant(ctx, max(time.Second, h.TTL))
	if err != nil {
		return err
	}
	defer l.giveUp(ctx) // also if nobody knows whether the record was put
	var r *clientv3.PutResponse
	if err := s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) (err error) {
		r, err = c.Put(ctx, storeKey(h.Key), string(h.Value), clientv3.WithLease(l.id))
		return err
	}); err != nil {
		return err
	}
	held(catalog.Rev(r.Header.Revision))
	if err := l.keep(ctx); ctx.Err() == nil {
		return fmt.Errorf("%s was given up: %w", h.Key, err)
	}
	return ctx.Err()
}

// Lead implements control.Leader, among all who call it on stores of the same catalogue: it waits for its turn and calls fn with a context that ends, at the latest, when others may
// believe that this leader is gone (catalog.AliveTTL after it last reached the catalogue). It calls fn again when it leads again, until fn returns although its context had not ended (its
// error is returned, nil too) or ctx ends (ctx's error). It resigns at the end. That the catalogue is away is no reason to end; that the Store was closed is (ErrUnreachable).
func (s *Store) Lead(ctx context.Context, fn func(context.Context) error) error {
	for {
		done, err := s.leadOnce(ctx, fn)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case s.ctx.Err() != nil:
			return fmt.Errorf("lead: closed: %w", catalog.ErrUnreachable)
		case done:
			return err
		}
		if err == nil {
			continue
		}
		wait := time.NewTimer(probeWait)
		select {
		case <-ctx.Done():
		case <-s.ctx.Done():
		case <-wait.C:
		}
		wait.Stop()
	}
}

// leadOnce waits until nobody leads and tries to. done tells that fn ended by itself, with err.
func (s *Store) leadOnce(ctx context.Context, fn func(context.Context) error) (done bool, err error) {
	if err := s.nobodyLeads(ctx); err != nil {
		return false, err
	}
	l, err := s.grant(ctx, catalog.AliveTTL)
	if err != nil {
		return false, err
	}
	defer l.giveUp(ctx)
	var r *clientv3.TxnResponse
	if err := s.call(clientv3.WithRequireLeader(ctx), once, func(ctx context.Context, c *clientv3.Client) (err error) {
		r, err = c.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(leaderKey), "=", 0)).Then(clientv3.OpPut(leaderKey, rand.Text(), clientv3.WithLease(l.id))).Commit()
		return err
	}); err != nil || !r.Succeeded {
		return false, err // if nobody knows, the lease goes, and with it the key
	}
	lead, end := context.WithCancel(ctx)
	defer end()
	var wg sync.WaitGroup
	defer wg.Wait() // before the lease is given up: nobody leads then
	wg.Go(func() {
		_ = l.keep(lead)
		end()
	})
	err = fn(lead)
	done = lead.Err() == nil
	end()
	return done, err
}

// nobodyLeads waits until the leader's key is gone. Other errors than ctx's mean that it is worth another look.
func (s *Store) nobodyLeads(ctx context.Context) error {
	var at int64
	if err := s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) error {
		r, err := c.Get(ctx, leaderKey)
		at = 0
		if err == nil && len(r.Kvs) > 0 {
			at = r.Header.Revision
		}
		return err
	}); err != nil || at == 0 {
		return err
	}
	return s.call(ctx, again, func(ctx context.Context, c *clientv3.Client) error {
		for resp := range c.Watch(clientv3.WithRequireLeader(ctx), leaderKey, clientv3.WithRev(at+1)) {
			if err := resp.Err(); err != nil {
				return err
			}
			for _, ev := range resp.Events {
				if ev.Type == mvccpb.Event_DELETE {
					return nil
				}
			}
		}
		return errWatchEnded
	})
}
