package etcd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"syscall"
	"testing"
	"time"
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
