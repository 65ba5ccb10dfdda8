package etcd_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/catalog/etcd"
)

// dialPort makes a connection to a port of a member, which shows a certificate.
func dialPort(t *testing.T, f etcd.Files, at, protocol string) *tls.Conn {
	t.Helper()
	cert, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(f.CA)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", at, &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool, ServerName: "localhost", NextProtos: []string{protocol}})
	if err != nil {
		t.Fatal(err) // the server looks at the certificate after the client is content (TLS 1.3)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c
}

// version asks for a member's version at its port for peers, on a connection that stays.
func version(c *tls.Conn) error {
	if _, err := io.WriteString(c, "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		return err
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	if _, err = io.Copy(io.Discard, res.Body); err == nil && res.StatusCode != http.StatusOK {
		err = errors.New(res.Status)
	}
	return err
}

// TestExpelled: who is shut out is refused at both ports, and what it had open is closed, while all others go on.
func TestExpelled(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	a := c.nodes[0]
	var mu sync.Mutex
	out := ""
	refused := func(cert *x509.Certificate) error {
		mu.Lock()
		defer mu.Unlock()
		if cert.Subject.CommonName == out {
			return errors.New("not any more")
		}
		return nil
	}
	a.member.Admit = refused
	c.start()
	guest := c.ca.issue(t, "guest", time.Hour)
	s, err := etcd.Open(t.Context(), etcd.Options{Endpoints: []string{a.member.ClientURL}, Files: guest})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, rev, err := s.List(t.Context(), catalog.KindNode)
	if err != nil {
		t.Fatal(err)
	}
	watched := make(chan error, 1)
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	wg.Go(func() { watched <- s.Watch(ctx, rev, func(catalog.Event) error { return nil }) })
	peer := dialPort(t, guest, a.member.PeerListen, "http/1.1")
	if err := version(peer); err != nil {
		t.Fatal(err)
	}
	silent := dialPort(t, c.ca.issue(t, "silent", time.Hour), a.member.PeerListen, "http/1.1")
	if err := version(silent); err != nil {
		t.Fatal(err)
	}

	mu.Lock()
	out = "guest"
	mu.Unlock()
	a.store.Expel(refused)
	if _, err := peer.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("its connection to the port for peers: %v", err)
	}
	select {
	case err := <-watched:
		if !errors.Is(err, catalog.ErrUnreachable) {
			t.Errorf("what it watched: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("it goes on watching")
	}
	for _, p := range []struct{ at, protocol string }{{a.member.PeerListen, "http/1.1"}, {a.member.ClientListen, "h2"}} {
		if n, err := dialPort(t, guest, p.at, p.protocol).Read(make([]byte, 1)); n > 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("it comes again to %s: %d bytes, %v", p.at, n, err)
		}
	}
	if err := version(silent); err != nil {
		t.Errorf("another's connection: %v", err)
	}
	put(t, c.nodes[1].store, "b") // a and its peer are still connected
	put(t, a.store, "a")
}
