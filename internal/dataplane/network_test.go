package dataplane

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/nbd"
)

// authority makes certificates for tests.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	n    int64
	uris []*url.URL // of the next certificates: what they stand for
}

func newAuthority(t testing.TB) *authority {
	a := &authority{t: t}
	a.cert, a.key = a.issue("authority", time.Now().Add(time.Hour))
	return a
}

// issue makes a certificate; the first one is the authority's own.
func (a *authority) issue(name string, notAfter time.Time) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	a.n++
	c := &x509.Certificate{SerialNumber: big.NewInt(a.n), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: notAfter,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost", name}, URIs: a.uris, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	parent, signer := a.cert, a.key
	if parent == nil {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage, c.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err == nil {
		c, err = x509.ParseCertificate(der)
	}
	if err != nil {
		a.t.Fatal(err)
	}
	return c, key
}

// write puts a certificate and its key into files of PEM, replacing what is there as a careful program does.
func (a *authority) write(dir, name string, notAfter time.Time) (certFile, keyFile string) {
	a.t.Helper()
	cert, key := a.issue(name, notAfter)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: cert.Raw}, keyFile: {Type: "PRIVATE KEY", Bytes: der}} {
		err := os.WriteFile(file+".new", pem.EncodeToMemory(block), 0o600)
		if err == nil {
			err = os.Rename(file+".new", file)
		}
		if err != nil {
			a.t.Fatal(err)
		}
	}
	return certFile, keyFile
}

// file writes the authority's own certificate.
func (a *authority) file(dir, name string) string {
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

// freeAddress is a port of loopback that nobody listens at. It is below those that Linux gives to outgoing connections (32768 and up, ip(7)): one of
// those could be another test's connection by the time that it is listened on.
func freeAddress(t testing.TB) string {
	for range 100 {
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 10_000+mathrand.IntN(22_000))); err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal("no port is free")
	return ""
}

func overTCP(t *testing.T, address, name string) (*nbdConn, error) {
	t.Helper()
	conn, err := net.DialTimeout("tcp", address, time.Minute)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { conn.Close() })
	c := &nbdConn{Conn: conn}
	return c, c.negotiate(name)
}

// TestNetwork: every open volume is offered at one address, under limits as on its socket; the next process listens again, and clients wait for it.
func TestNetwork(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	a, other := b.volume(c, 1, 16*mib), b.volume(c, 2, mib)
	b.open(c, a)
	n := client.Network{Address: freeAddress(t)}
	for range 2 {
		if err := c.SetNetwork(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	if st := b.open(c, other); st.TCPEndpoint != "nbd://"+n.Address+"/vol2" {
		t.Errorf("endpoint %q", st.TCPEndpoint)
	}
	if st := b.state(c); st.Network != n {
		t.Errorf("state %+v", st.Network)
	}
	g, err := overTCP(t, n.Address, "vol1")
	if err != nil || g.size != 16*mib {
		t.Fatal(g.size, err)
	}
	if err := errors.Join(g.write(0, page("over TCP")), g.flush()); err != nil {
		t.Fatal(err)
	}
	if got, err := guest(t, b.runDir, "vol1").read(0, 4096); err != nil || !bytes.Equal(got, page("over TCP")) {
		t.Errorf("the volume reads %.10q, %v", got, err)
	}
	if st, _ := status(t, c, a.VolumeID); st.Stats.WriteOps != 1 || st.Stats.ReadOps != 1 || st.Clients < 1 {
		t.Errorf("status %+v", st)
	}
	if _, err := overTCP(t, n.Address, "vol3"); err == nil {
		t.Error("a volume that is not there is served")
	}
	// A connection that came while nobody served waits.
	b.end()
	waiting, err := net.Dial("tcp", n.Address)
	if err != nil {
		t.Fatalf("between two processes: %v", err)
	}
	defer waiting.Close()
	c = b.start()
	if _, err := io.ReadFull(waiting, make([]byte, 18)); err != nil {
		t.Errorf("who waited is not served: %v", err)
	}
	eventually(t, "the volume is offered again", func() bool {
		g, err = overTCP(t, n.Address, "vol1")
		return err == nil
	})
	if got, err := g.read(0, 4096); err != nil || !bytes.Equal(got, page("over TCP")) {
		t.Errorf("after a restart it reads %.10q, %v", got, err)
	}
	// A close ends the volume's connections, and no others.
	var g2 *nbdConn
	eventually(t, "the other is offered again", func() bool {
		g2, err = overTCP(t, n.Address, "vol2")
		return err == nil
	})
	if err := c.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	if _, err := g.read(0, 4096); err == nil {
		t.Error("closed, and read over TCP")
	}
	if _, err := g2.read(0, 4096); err != nil {
		t.Errorf("another volume: %v", err)
	}
	// Somewhere else, then nowhere.
	was := n.Address
	n.Address = freeAddress(t)
	if err := c.SetNetwork(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	if _, err := overTCP(t, was, "vol2"); err == nil {
		t.Error("the old address is served")
	}
	if _, err := overTCP(t, n.Address, "vol2"); err != nil {
		t.Errorf("the new address: %v", err)
	}
	for range 2 {
		if err := c.SetNetwork(t.Context(), client.Network{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := overTCP(t, n.Address, "vol2"); err == nil {
		t.Error("it is served nowhere, and there")
	}
	if names, err := b.holder.List(t.Context()); err != nil || fmt.Sprint(names) != "[control/"+testVersion+" nbd/vol2]" {
		t.Errorf("kept: %v, %v", names, err)
	}
	if st, _ := status(t, c, other.VolumeID); st.TCPEndpoint != "" {
		t.Errorf("endpoint %q", st.TCPEndpoint)
	}
}

// TestNetworkRefusals: what cannot be served safely is refused by name, and what was served goes on.
func TestNetworkRefusals(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	b.open(c, b.volume(c, 1, mib))
	good := client.Network{Address: freeAddress(t)}
	if err := c.SetNetwork(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ca := newAuthority(t)
	caFile := ca.file(dir, "ca.crt")
	cert, key := ca.write(dir, "server", time.Now().Add(time.Hour))
	late, lateKey := ca.write(dir, "late", time.Now().Add(-time.Minute))
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	free := freeAddress(t)
	for name, tc := range map[string]struct {
		n    client.Network
		code client.Code
	}{
		"port taken":          {client.Network{Address: taken.Addr().String()}, client.CodeInUse},
		"no port":             {client.Network{Address: "127.0.0.1"}, client.CodeInvalid},
		"any port":            {client.Network{Address: "127.0.0.1:0"}, client.CodeInvalid},
		"not ours":            {client.Network{Address: "192.0.2.1:10809", CertFile: cert, KeyFile: key, ClientCA: caFile}, client.CodeInvalid},
		"everywhere, plain":   {client.Network{Address: ":10809"}, client.CodeInvalid},
		"beyond, plain":       {client.Network{Address: "0.0.0.0:10809"}, client.CodeInvalid},
		"beyond, anybody":     {client.Network{Address: "[::]:10809", CertFile: cert, KeyFile: key}, client.CodeInvalid},
		"certificate alone":   {client.Network{Address: free, CertFile: cert}, client.CodeInvalid},
		"authority alone":     {client.Network{Address: free, ClientCA: caFile}, client.CodeInvalid},
		"files without place": {client.Network{CertFile: cert, KeyFile: key, ClientCA: caFile}, client.CodeInvalid},
		"not there":           {client.Network{Address: free, CertFile: cert + "x", KeyFile: key, ClientCA: caFile}, client.CodeInvalid},
		"not a certificate":   {client.Network{Address: free, CertFile: empty, KeyFile: key, ClientCA: caFile}, client.CodeInvalid},
		"expired":             {client.Network{Address: free, CertFile: late, KeyFile: lateKey, ClientCA: caFile}, client.CodeInvalid},
		"another's key":       {client.Network{Address: free, CertFile: cert, KeyFile: lateKey, ClientCA: caFile}, client.CodeInvalid},
		"authority not there": {client.Network{Address: free, CertFile: cert, KeyFile: key, ClientCA: caFile + "x"}, client.CodeInvalid},
		"no authority":        {client.Network{Address: free, CertFile: cert, KeyFile: key, ClientCA: empty}, client.CodeInvalid},
		"expired authority":   {client.Network{Address: free, CertFile: cert, KeyFile: key, ClientCA: late}, client.CodeInvalid},
	} {
		err := c.SetNetwork(t.Context(), tc.n)
		wantCode(t, name, err, tc.code)
		if st := b.state(c); st.Network != good {
			t.Fatalf("%s: refused, and the network is %+v", name, st.Network)
		}
	}
	if _, err := overTCP(t, good.Address, "vol1"); err != nil {
		t.Errorf("after all refusals: %v", err)
	}
	if f := b.p.list.snapshot(); f.Network != good {
		t.Errorf("open.json: %+v", f.Network)
	}
}

// TestCertificatesChange: new files are used by the next client; files that make no sense are not, and the old ones go on.
func TestCertificatesChange(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t)
	n := client.Network{Address: "127.0.0.1:10809", ClientCA: ca.file(dir, "ca.crt")}
	n.CertFile, n.KeyFile = ca.write(dir, "server", time.Now().Add(time.Hour))
	config, err := networkTLS(n)
	if err != nil {
		t.Fatal(err)
	}
	serial := func() int64 {
		t.Helper()
		now, err := config.GetConfigForClient(&tls.ClientHelloInfo{})
		if err != nil || now.ClientAuth != tls.RequireAndVerifyClientCert || now.ClientCAs == nil {
			t.Fatalf("config %+v, %v", now, err)
		}
		return now.Certificates[0].Leaf.SerialNumber.Int64()
	}
	first := serial()
	ca.write(dir, "server", time.Now().Add(time.Hour))
	second := serial()
	if second == first {
		t.Error("new files are not used")
	}
	if err := os.WriteFile(n.KeyFile, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if serial() != second {
		t.Error("a broken file was used")
	}
	ca.write(dir, "server", time.Now().Add(-time.Second))
	if serial() != second {
		t.Error("an expired certificate was used")
	}
	ca.write(dir, "server", time.Now().Add(time.Hour))
	if now := serial(); now == second || now == first {
		t.Error("good files after bad ones are not used")
	}
}

// TestNetworkTLS: beyond loopback only clients get in whose certificate the authority signed, in this process and the next.
func TestNetworkTLS(t *testing.T) {
	b := newBed(t)
	c := b.ready()
	b.open(c, b.volume(c, 1, mib))
	dir := t.TempDir()
	ca, stranger := newAuthority(t), newAuthority(t)
	_, port, err := net.SplitHostPort(freeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	n := client.Network{Address: "0.0.0.0:" + port, ClientCA: ca.file(dir, "ca.crt")}
	n.CertFile, n.KeyFile = ca.write(dir, "server", time.Now().Add(time.Hour))
	if err := c.SetNetwork(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	if st, _ := status(t, c, id("volu", 1)); st.TCPEndpoint != "nbds://"+net.JoinHostPort(host, port)+"/vol1" {
		t.Errorf("endpoint %q", st.TCPEndpoint)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	config := func(signer *authority, name string) *tls.Config {
		cfg := &tls.Config{RootCAs: roots, ServerName: "localhost"}
		if signer != nil {
			pair, err := tls.LoadX509KeyPair(signer.write(dir, name, time.Now().Add(time.Hour)))
			if err != nil {
				t.Fatal(err)
			}
			cfg.Certificates = []tls.Certificate{pair}
		}
		return cfg
	}
	use := func(cfg *tls.Config) error {
		scheme := "nbds"
		if cfg == nil {
			scheme = "nbd"
		}
		dev, err := nbd.Dial(t.Context(), scheme+"://127.0.0.1:"+port+"/vol1", nbd.ClientOptions{TLS: cfg})
		if err != nil {
			return err
		}
		_, err = dev.WriteAt(page("over TLS"), 0)
		return errors.Join(err, dev.Close())
	}
	good := config(ca, "client")
	if err := use(good); err != nil {
		t.Errorf("with a good certificate: %v", err)
	}
	for name, cfg := range map[string]*tls.Config{"plain": nil, "no certificate": config(nil, ""), "a stranger's certificate": config(stranger, "stranger")} {
		if err := use(cfg); err == nil {
			t.Errorf("%s got in", name)
		}
	}
	b.end()
	b.start()
	eventually(t, "the next process serves it too", func() bool { return use(good) == nil })
	if err := use(nil); err == nil {
		t.Error("plain got into the next process")
	}
	// A new certificate is shown to the next client, and nobody is cut for it.
	ca.write(dir, "server", time.Now().Add(2*time.Hour))
	if err := use(good); err != nil {
		t.Errorf("after a new certificate: %v", err)
	}
	if got, err := guest(t, b.runDir, "vol1").read(0, 4096); err != nil || !bytes.Equal(got, page("over TLS")) {
		t.Errorf("the volume reads %.10q, %v", got, err)
	}
}
