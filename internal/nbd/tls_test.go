package nbd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/block/blocktest"
)

// authority issues certificates for tests.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	next int64
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{t: t, next: 1}
	now := time.Now()
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "test authority"}, SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true,
		NotBefore: now.Add(-48 * time.Hour), NotAfter: now.Add(48 * time.Hour), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	a.cert, a.key = a.sign(template, nil)
	return a
}

func (a *authority) sign(template *x509.Certificate, parent *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	signer := a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(crand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

// issue returns a certificate for localhost that ends at notAfter.
func (a *authority) issue(notAfter time.Time) tls.Certificate {
	a.next++
	cert, key := a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "localhost"}, SerialNumber: big.NewInt(a.next), DNSNames: []string{"localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: notAfter,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.cert)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

func (a *authority) good() tls.Certificate { return a.issue(time.Now().Add(24 * time.Hour)) }

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// server requires clients' certificates of the same authority.
func (a *authority) server(cert tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: a.pool(), ClientAuth: tls.RequireAndVerifyClientCert}
}

func (a *authority) client(certs ...tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: certs, RootCAs: a.pool(), ServerName: "localhost"}
}

// export writes the files that gnutls programs expect to a directory.
func (a *authority) export(side string, cert tls.Certificate) string {
	a.t.Helper()
	dir := a.t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		a.t.Fatal(err)
	}
	for name, b := range map[string]pem.Block{
		"ca-cert.pem":      {Type: "CERTIFICATE", Bytes: a.cert.Raw},
		side + "-cert.pem": {Type: "CERTIFICATE", Bytes: cert.Certificate[0]},
		side + "-key.pem":  {Type: "PRIVATE KEY", Bytes: key},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&b), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	return dir
}

// secureServer serves e on a connection over TLS; its result is what ServeConn returned.
func secureServer(t testing.TB, e Export, cfg *tls.Config) (*Server, net.Conn, <-chan error) {
	t.Helper()
	s, err := NewServer(Config{Exports: Single(e), TLS: cfg})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { within(t, "Close", func() { _ = s.Close() }) })
	a, b := socketPair(t)
	result := make(chan error, 1)
	s.wg.Go(func() { result <- s.ServeConn(b) })
	return s, a, result
}

// TestClientOverTLS runs the suite of block.Device over TLS with certificates on both sides.
func TestClientOverTLS(t *testing.T) {
	a := newAuthority(t)
	server, client := a.server(a.good()), a.client(a.good())
	blocktest.Run(t, blocktest.Config{
		Steps: 100,
		New: func(t testing.TB, n int64) block.Device {
			s, nc, _ := secureServer(t, Export{Device: block.NewMem(n)}, server)
			c, err := NewClient(t.Context(), nc, "", ClientOptions{TLS: client})
			if err != nil {
				t.Fatal(err)
			}
			until(t, "a connection over TLS", func() bool { conns := s.Conns(); return len(conns) == 1 && conns[0].TLS })
			return c
		},
	})
}

// TestClientCertificatesOfURI: a URI names the directory with what a client over TLS needs, with the names that other NBD clients give the files.
func TestClientCertificatesOfURI(t *testing.T) {
	a, stranger := newAuthority(t), newAuthority(t)
	s, err := NewServer(Config{Exports: Single(Export{Device: block.NewMem(1 << 20)}), TLS: a.server(a.good())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { within(t, "Close", func() { _ = s.Close() }) })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.wg.Go(func() { _ = s.Serve(l) })
	dial := func(dir string) error {
		c, err := Dial(t.Context(), "nbds://"+l.Addr().String()+"/?tls-certificates="+dir, ClientOptions{ReadOnly: true})
		if err != nil {
			return err
		}
		_, err = c.ReadAt(make([]byte, 4096), 0)
		return errors.Join(err, c.Close())
	}
	without := func(dir string, names ...string) string {
		for _, name := range names {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	if err := dial(a.export("client", a.good())); err != nil {
		t.Error(err)
	}
	mixed := a.export("client", a.good())
	if err := os.Rename(filepath.Join(stranger.export("client", stranger.good()), "ca-cert.pem"), filepath.Join(mixed, "ca-cert.pem")); err != nil {
		t.Fatal(err)
	}
	for name, dir := range map[string]string{
		"no such directory":               filepath.Join(t.TempDir(), "none"),
		"no authority":                    without(a.export("client", a.good()), "ca-cert.pem"),
		"no certificate":                  without(a.export("client", a.good()), "client-cert.pem", "client-key.pem"),
		"a certificate and no key":        without(a.export("client", a.good()), "client-key.pem"),
		"an expired certificate":          a.export("client", a.issue(time.Now().Add(-time.Hour))),
		"another authority":               stranger.export("client", stranger.good()),
		"another authority of the server": mixed,
		"another authority's certificate": a.export("client", stranger.good()),
	} {
		if err := dial(dir); !errors.Is(err, ErrTLS) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err = Dial(t.Context(), "nbds://"+l.Addr().String()+"/?tls-certificates="+a.export("client", a.good()), ClientOptions{TLS: a.client(a.good())})
	if !errors.Is(err, ErrTLS) {
		t.Errorf("certificates from both sides: %v", err)
	}
}

// TestTLSRefused: both sides say why, as values, and nothing is served.
func TestTLSRefused(t *testing.T) {
	a, stranger := newAuthority(t), newAuthority(t)
	expired := a.issue(time.Now().Add(-time.Hour))
	type reason func(error) bool
	unknown := func(err error) bool { var e x509.UnknownAuthorityError; return errors.As(err, &e) }
	tooOld := func(err error) bool {
		var e x509.CertificateInvalidError
		return errors.As(err, &e) && e.Reason == x509.Expired
	}
	isTLS := func(err error) bool { return errors.Is(err, ErrTLS) }
	for name, tt := range map[string]struct {
		server, client     *tls.Config
		atServer, atClient reason
	}{
		"the server's authority is unknown": {stranger.server(stranger.good()), a.client(a.good()), isTLS, unknown},
		"the server's certificate expired":  {a.server(expired), a.client(a.good()), isTLS, tooOld},
		"the client's authority is unknown": {a.server(a.good()), a.client(stranger.good()), isTLS, isTLS},
		"the client's certificate expired":  {a.server(a.good()), a.client(expired), tooOld, isTLS},
		"the client has no certificate":     {a.server(a.good()), a.client(), isTLS, isTLS},
		"the client has no TLS":             {a.server(a.good()), nil, func(err error) bool { return err == nil }, isTLS},
		"the server has no TLS":             {nil, a.client(a.good()), func(err error) bool { return err == nil }, isTLS},
	} {
		t.Run(name, func(t *testing.T) {
			dev := newMemDevice(4096)
			_, nc, result := secureServer(t, Export{Device: dev}, tt.server)
			c, err := NewClient(t.Context(), nc, "", ClientOptions{TLS: tt.client})
			if err == nil {
				t.Error("the client is connected", c.Close())
			} else if !tt.atClient(err) || !isTLS(err) {
				t.Errorf("client: %v", err)
			}
			served := <-result
			if !tt.atServer(served) {
				t.Errorf("server: %v", served)
			}
			t.Logf("client: %v; server: %v", err, served)
			if dev.calls.Load() != 0 {
				t.Error("the device was used")
			}
		})
	}
}

// TestTLSRequired: before STARTTLS every option but ABORT is refused, and what came before it is forgotten.
func TestTLSRequired(t *testing.T) {
	a := newAuthority(t)
	e := Export{Name: "v", Description: "secret", Device: block.NewMem(4096)}
	_, nc, result := secureServer(t, e, a.server(a.good()))
	c := newTestClient(t, nc)
	c.hello(3)
	for _, opt := range []uint32{optList, optInfo, optGo, optStructuredReply, optListMetaContext, optSetMetaContext, 11, 12345} {
		if r := c.option(opt, infoData("v")); len(r) != 1 || r[0].typ != repErrTLSReqd || r[0].data != "" {
			t.Errorf("option %d before STARTTLS: %v", opt, r)
		}
	}
	if r := c.option(optStartTLS, []byte{1}); r[0].typ != repErrInvalid {
		t.Errorf("STARTTLS with data: %v", r)
	}
	if r := c.option(optStartTLS, nil); r[0].typ != repAck {
		t.Fatalf("STARTTLS: %v", r)
	}
	tc := tls.Client(nc, a.client(a.good()))
	c.conn = tc
	if r := c.option(optStartTLS, nil); r[0].typ != repErrInvalid {
		t.Errorf("STARTTLS again: %v", r)
	}
	if r := c.option(optSetMetaContext, metaData("v", allocation)); r[0].typ != repErrInvalid {
		t.Errorf("structured replies were agreed on in plain text: %v", r)
	}
	if r := c.option(optAbort, nil); r[0].typ != repAck {
		t.Errorf("ABORT: %v", r)
	}
	if err := <-result; err != nil {
		t.Error(err)
	}

	_, nc, result = secureServer(t, e, a.server(a.good()))
	c = newTestClient(t, nc)
	c.hello(3)
	c.send(optionBytes(optExportName, []byte("v")))
	c.wantEOF()
	if err := <-result; !errors.Is(err, ErrTLS) {
		t.Errorf("EXPORT_NAME without TLS: %v", err)
	}
}

// TestTLSInjection: plain bytes sent behind STARTTLS, by whoever sits on the wire, are never taken for what the other side said in TLS.
func TestTLSInjection(t *testing.T) {
	a := newAuthority(t)
	_, nc, result := secureServer(t, Export{Device: block.NewMem(4096)}, a.server(a.good()))
	c := newTestClient(t, nc)
	c.hello(3)
	c.send(append(optionBytes(optStartTLS, nil), optionBytes(optGo, infoData(""))...))
	if err := <-result; !errors.Is(err, ErrTLS) {
		t.Errorf("server: %v", err)
	}

	near, far := net.Pipe()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		defer far.Close()
		h := &haggler{rw: far}
		if h.greet() != nil {
			return
		}
		if _, _, err := h.option(); err == nil {
			_ = h.write(appendReply(appendReply(nil, optStartTLS, repAck, nil), optStructuredReply, repAck, nil))
		}
	})
	if _, err := NewClient(t.Context(), near, "", ClientOptions{TLS: a.client()}); !errors.Is(err, ErrProtocol) {
		t.Errorf("client: %v", err)
	}
}

// TestTLSDetach: connections over TLS end in good order on Detach, and their clients are told so.
func TestTLSDetach(t *testing.T) {
	a := newAuthority(t)
	s, nc, _ := secureServer(t, Export{Name: "v", Device: block.NewMem(1 << 20)}, a.server(a.good()))
	c, err := NewClient(t.Context(), nc, "v", ClientOptions{TLS: a.client(a.good())})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.WriteAt([]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	mustDetachOnly(t, s, "v")
	if _, err := c.WriteAt([]byte{1}, 0); !errors.Is(err, ErrDisconnected) {
		t.Errorf("a write after Detach: %v", err)
	}
}
