package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// member is a node's identity in files, as a cluster keeps them.
type member struct {
	files NodeFiles
	node  Node
}

const (
	clusterA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	clusterB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

// enrol has an authority sign for a node and puts its files into a directory of its own.
func enrol(t *testing.T, a *Authority, n Node) member {
	t.Helper()
	dir := t.TempDir()
	m := member{node: n, files: NodeFiles{CertFile: filepath.Join(dir, "node.pem"), KeyFile: filepath.Join(dir, "node.pem"), CAFile: filepath.Join(dir, "ca.crt")}}
	m.sign(t, a)
	if err := WriteFile(m.files.CAFile, a.CertificatePEM(), 0o644); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m member) sign(t *testing.T, a *Authority) {
	t.Helper()
	key, request, err := NewNodeRequest()
	if err != nil {
		t.Fatal(err)
	}
	cert := must[[]byte](t)(a.SignNode(request, m.node))
	if err := WriteFile(m.files.CertFile, append(key, cert...), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (m member) tls(t *testing.T) *NodeTLS {
	t.Helper()
	return must[*NodeTLS](t)(OpenNodeTLS(m.files))
}

// meet connects a client to a server, and returns what each side's handshake said; the server's includes that of reading the client's certificate.
func meet(server, client *tls.Config) (atServer, atClient error) {
	a, b := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer a.Close()
		conn := tls.Server(a, server)
		if atServer = conn.Handshake(); atServer == nil {
			_, _ = conn.Write([]byte("x"))
		}
	})
	conn := tls.Client(b, client)
	if atClient = conn.Handshake(); atClient == nil {
		// In TLS 1.3 a client learns with its first read that it was refused.
		_, atClient = io.ReadFull(conn, make([]byte, 1))
	}
	b.Close()
	wg.Wait()
	return atServer, atClient
}

// TestNodeCertificate looks at what the authority signs: the names are the authority's, whatever the request asks for.
func TestNodeCertificate(t *testing.T) {
	a := must[*Authority](t)(OpenAuthority(t.TempDir(), nil))
	key := must[*ecdsa.PrivateKey](t)(newKey())
	der := must[[]byte](t)(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "root"}, DNSNames: []string{"other"}, IPAddresses: []net.IP{net.IPv4(192, 0, 2, 9)}, URIs: []*url.URL{{Scheme: "ashlar", Host: clusterB, Path: "/1"}},
	}, key))
	n := Node{ClusterID: clusterA, NodeID: strings.Repeat("1", 32), Name: "n1", Host: "192.0.2.1"}
	data := must[[]byte](t)(a.SignNode(pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: der}), n))
	c := must[*x509.Certificate](t)(ParseCertificate(data))
	who := must[Node](t)(NodeOf(c))
	if who.ClusterID != n.ClusterID || who.NodeID != n.NodeID || who.Name != n.Name {
		t.Errorf("the certificate is of %+v", who)
	}
	for _, name := range []string{"n1", "192.0.2.1", "localhost", "127.0.0.1", "::1"} {
		if err := c.VerifyHostname(name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"other", "192.0.2.9", "root"} {
		if c.VerifyHostname(name) == nil {
			t.Errorf("it has the name %s, which was only asked for", name)
		}
	}
	if life := c.NotAfter.Sub(c.NotBefore); life != serverLife+backdate || time.Since(c.NotBefore) < backdate {
		t.Errorf("valid from %s to %s", c.NotBefore, c.NotAfter)
	}
	if !c.PublicKey.(*ecdsa.PublicKey).Equal(&key.PublicKey) || c.IsCA {
		t.Error("not the requested key, or an authority")
	}
}

// TestBadRequests wants nothing signed for what is no request.
func TestBadRequests(t *testing.T) {
	a := must[*Authority](t)(OpenAuthority(t.TempDir(), nil))
	_, good, err := NewNodeRequest()
	if err != nil {
		t.Fatal(err)
	}
	weak := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
	foreign := must[[]byte](t)(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, weak))
	block, _ := pem.Decode(good)
	forged := bytes.Clone(block.Bytes)
	forged[len(forged)-1] ^= 1
	for what, request := range map[string][]byte{
		"empty": nil, "no PEM": []byte("x"), "a certificate": a.CertificatePEM(), "half": good[:len(good)/2], "too long": bytes.Repeat([]byte("x"), maxRequest+1),
		"an RSA key":       pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: foreign}),
		"not signed by it": pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: forged}),
	} {
		if _, err := a.SignNode(request, Node{ClusterID: clusterA, NodeID: "1", Name: "n"}); !errors.Is(err, ErrRequest) {
			t.Errorf("%s: %v, want ErrRequest", what, err)
		}
	}
}

// TestNodeTLS has nodes meet: only those of one cluster, of the name that is meant, and whom the hooks know, can.
func TestNodeTLS(t *testing.T) {
	a := must[*Authority](t)(OpenAuthority(t.TempDir(), nil))
	other := must[*Authority](t)(OpenAuthority(t.TempDir(), nil))
	old := must[*Authority](t)(OpenAuthority(a.dir, func() time.Time { return time.Now().Add(-2 * serverLife) }))
	n1 := enrol(t, a, Node{ClusterID: clusterA, NodeID: "1", Name: "n1"}).tls(t)
	n2 := enrol(t, a, Node{ClusterID: clusterA, NodeID: "2", Name: "n2"}).tls(t)
	stranger := enrol(t, other, Node{ClusterID: clusterA, NodeID: "2", Name: "n2"}).tls(t)
	foreign := enrol(t, a, Node{ClusterID: clusterB, NodeID: "2", Name: "n2"}).tls(t)
	ended := enrol(t, old, Node{ClusterID: clusterA, NodeID: "2", Name: "n2"}).tls(t)
	if s, c := meet(n1.Server(nil), n2.Client("n1", nil)); s != nil || c != nil {
		t.Fatal(s, c)
	}
	refuse := func(n Node) error {
		if n.NodeID != "2" && n.NodeID != "1" || n.ClusterID != clusterA {
			t.Errorf("asked about %+v", n)
		}
		return ErrPeer
	}
	for what, pair := range map[string]struct{ server, client *tls.Config }{
		"another name is meant":          {n1.Server(nil), n2.Client("n3", nil)},
		"the client's hook refuses":      {n1.Server(nil), n2.Client("n1", refuse)},
		"the server's hook refuses":      {n1.Server(refuse), n2.Client("n1", nil)},
		"client of another authority":    {n1.Server(nil), stranger.Client("n1", nil)},
		"server of another authority":    {stranger.Server(nil), n1.Client("n2", nil)},
		"client of another cluster":      {n1.Server(nil), foreign.Client("n1", nil)},
		"server of another cluster":      {foreign.Server(nil), n1.Client("n2", nil)},
		"client's certificate has ended": {n1.Server(nil), ended.Client("n1", nil)},
		"server's certificate has ended": {ended.Server(nil), n1.Client("n2", nil)},
		"TLS 1.2":                        {n1.Server(nil), &tls.Config{MaxVersion: tls.VersionTLS12, InsecureSkipVerify: true}},
	} {
		if s, c := meet(pair.server, pair.client); s == nil && c == nil {
			t.Errorf("%s: they met", what)
		}
	}
	// Who joins has no certificate yet.
	if s, c := meet(n1.Server(refuse), &tls.Config{InsecureSkipVerify: true}); s != nil || c != nil {
		t.Errorf("without a certificate: %v, %v", s, c)
	}
}

// TestNodeTLSFollowsFiles renews a certificate under a running server and client.
func TestNodeTLSFollowsFiles(t *testing.T) {
	a := must[*Authority](t)(OpenAuthority(t.TempDir(), nil))
	m := enrol(t, a, Node{ClusterID: clusterA, NodeID: "1", Name: "n1"})
	var told []error
	m.files.Changed = func(err error) { told = append(told, err) }
	n := m.tls(t)
	server := n.Server(nil)
	before := must[*x509.Certificate](t)(n.Leaf())
	m.sign(t, a)
	later := time.Now().Add(time.Minute)
	if err := os.Chtimes(m.files.CertFile, later, later); err != nil {
		t.Fatal(err)
	}
	var shown *x509.Certificate
	look := n.Client("n1", nil)
	check := look.VerifyConnection
	look.VerifyConnection = func(s tls.ConnectionState) error { shown = s.PeerCertificates[0]; return check(s) }
	if s, c := meet(server, look); s != nil || c != nil {
		t.Fatal(s, c)
	}
	if shown.Equal(before) || len(told) != 1 || told[0] != nil {
		t.Errorf("the renewed certificate is not shown: %v", told)
	}
}

// TestBadNodeFiles wants files that are no node's identity refused.
func TestBadNodeFiles(t *testing.T) {
	a := must[*Authority](t)(OpenAuthority(t.TempDir(), nil))
	good := enrol(t, a, Node{ClusterID: clusterA, NodeID: "1", Name: "n1"})
	server := must[[]byte](t)(a.Issue([]string{"n1"}))
	for what, c := range map[string]struct {
		spoil func(NodeFiles) error
		want  error
	}{
		"no certificate":           {func(f NodeFiles) error { return os.Remove(f.CertFile) }, os.ErrNotExist},
		"no authority":             {func(f NodeFiles) error { return os.Remove(f.CAFile) }, os.ErrNotExist},
		"half an authority":        {func(f NodeFiles) error { return os.WriteFile(f.CAFile, []byte("-----BEGIN"), 0o644) }, ErrFile},
		"readable by others":       {func(f NodeFiles) error { return os.Chmod(f.KeyFile, 0o644) }, ErrPermissions},
		"a certificate of no node": {func(f NodeFiles) error { return os.WriteFile(f.CertFile, server, 0o600) }, ErrPeer},
	} {
		m := enrol(t, a, good.node)
		if err := c.spoil(m.files); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenNodeTLS(m.files); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", what, err, c.want)
		}
	}
}

// TestReadAuthority passes an authority on and reads it back.
func TestReadAuthority(t *testing.T) {
	a := must[*Authority](t)(OpenAuthority(t.TempDir(), nil))
	name := filepath.Join(t.TempDir(), "ca.key")
	if err := WriteFile(name, must[[]byte](t)(a.Bundle()), 0o600); err != nil {
		t.Fatal(err)
	}
	b := must[*Authority](t)(ReadAuthority(name, nil))
	if !b.Certificate().Equal(a.Certificate()) || Fingerprint(b.Certificate()) != Fingerprint(a.Certificate()) {
		t.Error("another authority")
	}
	if _, err := ReadAuthority(name+"x", nil); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	future := time.Now().Add(authorityLife + time.Hour)
	if _, err := ReadAuthority(name, func() time.Time { return future }); !errors.Is(err, ErrFile) {
		t.Error(err)
	}
}

// TestJoinToken makes join tokens and reads them, whole and spoilt.
func TestJoinToken(t *testing.T) {
	a := must[*Authority](t)(OpenAuthority(t.TempDir(), nil))
	token, sum, err := NewJoinToken(a.Certificate(), nil)
	if err != nil || !TokenMatches(token.Secret, sum) || strings.Contains(token.String(), sum) {
		t.Fatal(token, sum, err)
	}
	s := token.String()
	if back := must[JoinToken](t)(ParseJoinToken(" " + s + "\n")); back != token {
		t.Errorf("%+v came back as %+v", token, back)
	}
	for _, bad := range []string{"", "ashlar1", "ashlar1..", "ashlar2" + s[7:], s[:len(s)-1], s + "x", s[1:], strings.ToUpper(s), strings.Replace(s, ".", "", 1),
		strings.Replace(s, token.Fingerprint, token.Fingerprint[1:]+"g", 1), "ashlar_" + token.Secret} {
		if _, err := ParseJoinToken(bad); !errors.Is(err, ErrJoinToken) {
			t.Errorf("%q: %v, want ErrJoinToken", bad, err)
		}
	}
	if _, _, err := NewJoinToken(a.Certificate(), strings.NewReader("short")); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(err)
	}
}

// TestJoinTokenTLS lets a joiner speak to a node of the token's cluster only, whatever its own clock says.
func TestJoinTokenTLS(t *testing.T) {
	long := func() time.Time { return time.Now().Add(-2 * serverLife) }
	dir := t.TempDir()
	old := must[*Authority](t)(OpenAuthority(dir, long))
	a := must[*Authority](t)(OpenAuthority(dir, nil))
	other := must[*Authority](t)(OpenAuthority(t.TempDir(), nil))
	token, _, err := NewJoinToken(a.Certificate(), nil)
	if err != nil {
		t.Fatal(err)
	}
	node := Node{ClusterID: clusterA, NodeID: "1", Name: "n1"}
	for what, signer := range map[string]*Authority{"now": a, "ended long ago": old} {
		if s, c := meet(enrol(t, signer, node).tls(t).Server(nil), token.TLS()); s != nil || c != nil {
			t.Errorf("%s: %v, %v", what, s, c)
		}
	}
	if _, c := meet(enrol(t, other, node).tls(t).Server(nil), token.TLS()); !errors.Is(c, ErrFingerprint) {
		t.Errorf("another cluster: %v, want ErrFingerprint", c)
	}
	// The right authority's certificate, shown by somebody whom it did not sign.
	m := enrol(t, other, node)
	data := must[[]byte](t)(os.ReadFile(m.files.CertFile))
	i := bytes.LastIndex(data, []byte("-----BEGIN CERTIFICATE-----"))
	if err := WriteFile(m.files.CertFile, append(bytes.Clone(data[:i]), a.CertificatePEM()...), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, c := meet(m.tls(t).Server(nil), token.TLS()); !errors.Is(c, ErrFingerprint) {
		t.Errorf("a borrowed authority: %v, want ErrFingerprint", c)
	}
}

// FuzzJoinToken parses anything; what is taken is a token again.
func FuzzJoinToken(f *testing.F) {
	f.Add("ashlar1." + strings.Repeat("0a", 16) + "." + strings.Repeat("A", 43))
	f.Add("ashlar1..")
	f.Add("")
	f.Add("ashlar1." + strings.Repeat("0", 31) + "." + strings.Repeat("-", 44))
	f.Fuzz(func(t *testing.T, s string) {
		token, err := ParseJoinToken(s)
		if err != nil {
			return
		}
		if again, err := ParseJoinToken(token.String()); err != nil || again != token {
			t.Errorf("%q: %+v, then %+v, %v", s, token, again, err)
		}
	})
}
