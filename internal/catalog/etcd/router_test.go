package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// TestWhy asks those who do not answer as they should for their reasons: nobody listens, its authority is another, it wants another certificate, it speaks no TLS. Of one that takes connections nothing
// is said.
func TestWhy(t *testing.T) {
	start := func(clients tls.ClientAuthType) (*httptest.Server, *x509.CertPool) {
		s := httptest.NewUnstartedServer(http.NotFoundHandler())
		s.TLS = &tls.Config{ClientAuth: clients, MinVersion: tls.VersionTLS13}
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		s.EnableHTTP2 = true // as etcd has it
		s.StartTLS()
		t.Cleanup(s.Close)
		pool := x509.NewCertPool()
		pool.AddCert(s.Certificate())
		return s, pool
	}
	open, trust := start(tls.NoClientCert)
	strict, trustStrict := start(tls.RequireAnyClientCert)
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	why := func(trusted *x509.CertPool, url string) error {
		began := time.Now()
		err := dialer{tls: &tls.Config{RootCAs: trusted}}.why(t.Context(), url)
		t.Logf("%s after %v: %v", url, time.Since(began).Round(time.Millisecond), err)
		return err
	}
	if err := why(trust, open.URL); err != nil {
		t.Errorf("one that takes connections: %v", err)
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](why(x509.NewCertPool(), open.URL)); !ok {
		t.Error("another authority is not named")
	}
	if refused, ok := errors.AsType[*net.OpError](why(trustStrict, strict.URL)); !ok || refused.Op != "remote error" {
		t.Error("who wants a certificate does not say so")
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](why(trust, "https"+plain.URL[len("http"):])); !ok {
		t.Error("one without TLS is not told")
	}
	plain.Close()
	if err := why(nil, plain.URL); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("nobody: %v", err)
	}
	if err := why(nil, "kvm1:2379"); err != nil {
		t.Errorf("an address without a scheme: %v", err)
	}
}

// standIn is a member that is only asked whether it answers, also while nobody waits for the answer any more.
type standIn struct {
	clientv3.KV
	away    atomic.Bool
	cluster atomic.Uint64
}

func (m *standIn) Get(context.Context, string, ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if m.away.Load() {
		return nil, errors.New("away")
	}
	return &clientv3.GetResponse{Header: &pb.ResponseHeader{ClusterId: m.cluster.Load()}}, nil
}

// TestGoesHome: a store whose own member did not answer goes on through another, and back to its own when that has answered three times in a row, not before and not later.
func TestGoesHome(t *testing.T) {
	own, other := new(standIn), new(standIn)
	own.away.Store(true)
	own.cluster.Store(1)
	other.cluster.Store(1)
	s := &Store{log: slog.New(slog.DiscardHandler), moved: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(t.Context())
	r := newRouter(s, func(url string) (*clientv3.Client, error) {
		c := clientv3.NewCtxClient(s.ctx)
		c.KV = map[string]*standIn{"own": own, "other": other}[url]
		return c, nil
	}, []string{"own", "other"})
	r.own = "own"
	round := func(want string) {
		t.Helper()
		if !r.round(s.ctx) {
			t.Fatal("nobody answers")
		}
		if r.using.url != want {
			t.Fatalf("%s is used, want %s", r.using.url, want)
		}
		if s.route.client != r.using.client {
			t.Fatal("calls go elsewhere")
		}
	}
	round("other")
	own.away.Store(false)
	round("other")
	round("other")
	own.away.Store(true) // it begins anew
	round("other")
	own.away.Store(false)
	round("other")
	round("other")
	own.cluster.Store(2) // it was left behind, and made a cluster of its own
	round("other")
	own.cluster.Store(1)
	round("other")
	round("other")
	round("own")
	round("own")
	own.away.Store(true)
	round("other")
	other.away.Store(true)
	if r.round(s.ctx) {
		t.Fatal("somebody answers")
	}
	own.away.Store(false)
	round("own")
	s.cancel()
	s.workers.Wait()
}
