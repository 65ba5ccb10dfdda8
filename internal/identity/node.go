package identity

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// ErrRequest: a certificate signing request that nothing is signed for.
var ErrRequest = errors.New("bad certificate request")

// ErrPeer: the other side of a connection is not the node that was meant, or none of the cluster.
var ErrPeer = errors.New("not a node of this cluster")

// Node is who a node's certificate is of. In the certificate the name is the common name and one of the DNS names, ids are the URI ashlar://ClusterID/NodeID.
type Node struct {
	ClusterID, NodeID string // 32 lower-case hex digits each
	Name              string
	Host              string // where others reach it, a name or an address; it proves nothing
}

// uriScheme is that of the URI that names a node.
const uriScheme = "ashlar"

// NewNodeRequest makes a node's private key and a request (PKCS #10) for its certificate, both PEM. The request says nothing but the key.
func NewNodeRequest() (keyPEM, requestPEM []byte, err error) {
	key, err := newKey()
	if err != nil {
		return nil, nil, err
	}
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: k}), pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: der}), nil
}

// pemRequest is the type of a request's PEM block (RFC 7468 7).
const pemRequest = "CERTIFICATE REQUEST"

// maxRequest bounds a request; one of P-256 has some 400 bytes.
const maxRequest = 8 << 10

// SignNode answers a request with a certificate for a node: for TLS servers and clients, 90 days, valid from an hour ago. What names the request holds does not matter: they
// are n's, and beside Name and Host those of loopback. The authority's own certificate follows in the PEM. ErrRequest.
func (a *Authority) SignNode(requestPEM []byte, n Node) ([]byte, error) {
	bad := func(err error) ([]byte, error) { return nil, fmt.Errorf("node %s: %w: %w", n.Name, ErrRequest, err) }
	if len(requestPEM) > maxRequest {
		return bad(fmt.Errorf("%d bytes", len(requestPEM)))
	}
	block, _ := pem.Decode(requestPEM)
	if block == nil || block.Type != pemRequest {
		return bad(errors.New("no request in PEM"))
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err == nil {
		err = request.CheckSignature()
	}
	if err != nil {
		return bad(err)
	}
	key, ok := request.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return bad(errors.New("an ECDSA key is wanted"))
	}
	number, err := serial()
	if err != nil {
		return nil, err
	}
	now := a.now()
	end := now.Add(serverLife)
	if end.After(a.cert.NotAfter) {
		end = a.cert.NotAfter
	}
	c := &x509.Certificate{
		SerialNumber: number, Subject: pkix.Name{CommonName: n.Name}, NotBefore: now.Add(-backdate), NotAfter: end, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs: []*url.URL{{Scheme: uriScheme, Host: n.ClusterID, Path: "/" + n.NodeID}},
	}
	for _, name := range []string{n.Name, n.Host, "localhost", "127.0.0.1", "::1"} {
		switch ip := net.ParseIP(name); {
		case name == "":
		case ip == nil && !slices.Contains(c.DNSNames, name):
			c.DNSNames = append(c.DNSNames, name)
		case ip != nil && !slices.ContainsFunc(c.IPAddresses, ip.Equal):
			c.IPAddresses = append(c.IPAddresses, ip)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, key, a.key)
	if err != nil {
		return bad(err)
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: der}), a.CertificatePEM()...), nil
}

// NodeOf reads who a certificate is of, without Host; ErrPeer if it is not a node's. It verifies nothing.
func NodeOf(c *x509.Certificate) (Node, error) {
	if len(c.URIs) == 1 && c.URIs[0].Scheme == uriScheme {
		n := Node{ClusterID: c.URIs[0].Host, NodeID: strings.TrimPrefix(c.URIs[0].Path, "/"), Name: c.Subject.CommonName}
		if n.ClusterID != "" && n.NodeID != "" && n.Name != "" {
			return n, nil
		}
	}
	return Node{}, fmt.Errorf("the certificate of %q: %w", c.Subject.CommonName, ErrPeer)
}

// NodeFiles are the files of a node's identity, PEM: its certificate (the authority's may follow), its key (0600), and the one authority trusted.
type NodeFiles struct {
	CertFile, KeyFile, CAFile string
	// Changed is told when the first two changed and were read again, or could not be; see ServerFiles.
	Changed func(error)
	// Now tells the time; nil: time.Now.
	Now func() time.Time
}

// NodeTLS makes the TLS settings of a node for both roles. They follow the files of the certificate and its key. It may be used concurrently.
type NodeTLS struct {
	reload    *reloader
	pool      *x509.CertPool
	authority *x509.Certificate
	clusterID string
	now       func() time.Time
}

// OpenNodeTLS reads a node's files. ErrPermissions, ErrFile, or the file system's error.
func OpenNodeTLS(f NodeFiles) (*NodeTLS, error) {
	if f.Now == nil {
		f.Now = time.Now
	}
	t := &NodeTLS{reload: &reloader{files: ServerFiles{CertFile: f.CertFile, KeyFile: f.KeyFile, Changed: f.Changed}}, now: f.Now}
	data, err := os.ReadFile(f.CAFile)
	if err != nil {
		return nil, err
	}
	if t.authority, err = ParseCertificate(data); err != nil {
		return nil, fmt.Errorf("%s: %w", f.CAFile, err)
	}
	t.pool = x509.NewCertPool()
	t.pool.AddCert(t.authority)
	t.reload.stamp = t.reload.look()
	if t.reload.cert, err = t.reload.read(); err != nil {
		return nil, err
	}
	me, err := NodeOf(t.reload.cert.Leaf)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", f.CertFile, ErrFile, err)
	}
	t.clusterID = me.ClusterID
	return t, nil
}

// ParseCertificate reads the first certificate in PEM; ErrFile.
func ParseCertificate(data []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != pemCertificate {
		return nil, fmt.Errorf("%w: a certificate in PEM is wanted", ErrFile)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFile, err)
	}
	return c, nil
}

// Authority is the authority's certificate.
func (t *NodeTLS) Authority() *x509.Certificate { return t.authority }

// Leaf is the certificate shown now.
func (t *NodeTLS) Leaf() (*x509.Certificate, error) {
	c, err := t.reload.current()
	if err != nil {
		return nil, err
	}
	return c.Leaf, nil
}

// Server is for listening: TLS 1.3, with the certificate as its files are. Clients may come without a certificate; one that is shown must be of a node of this cluster, and
// pass verify (nil: no more is asked).
func (t *NodeTLS) Server(verify func(Node) error) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"}, ClientAuth: tls.RequestClientCert, ClientCAs: t.pool,
		// A session that is taken up again would carry a certificate from before.
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return t.reload.current() },
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return nil
			}
			return t.check(s, "", x509.ExtKeyUsageClientAuth, verify)
		},
	}
}

// Client is for asking a node by its name, wherever it is: TLS 1.3, showing this node's certificate. The other side must show that of the node with this name in this cluster
// and pass verify (nil: no more is asked); else the handshake fails with ErrPeer, or x509's errors.
func (t *NodeTLS) Client(name string, verify func(Node) error) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: name, RootCAs: t.pool,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return t.reload.current() },
		// The standard check asks for a DNS name, which is not what proves who a node is; ours follows.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			return t.check(s, name, x509.ExtKeyUsageServerAuth, verify)
		},
	}
}

// check verifies the other side of a connection: authority, life, use, cluster, and that it is the node called name (if one is meant).
func (t *NodeTLS) check(s tls.ConnectionState, name string, usage x509.ExtKeyUsage, verify func(Node) error) error {
	if len(s.PeerCertificates) == 0 {
		return fmt.Errorf("it shows no certificate: %w", ErrPeer)
	}
	leaf := s.PeerCertificates[0]
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: t.pool, CurrentTime: t.now(), KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
		return err
	}
	n, err := NodeOf(leaf)
	switch {
	case err != nil:
		return err
	case n.ClusterID != t.clusterID:
		return fmt.Errorf("node %s is of cluster %s, this one of %s: %w", n.Name, n.ClusterID, t.clusterID, ErrPeer)
	case name != "" && n.Name != name:
		return fmt.Errorf("node %s answers where %s should be: %w", n.Name, name, ErrPeer)
	case verify != nil:
		return verify(n)
	}
	return nil
}

// PeerOf is the node at the other end of a connection whose handshake is done; ErrPeer if it showed no certificate.
func PeerOf(s *tls.ConnectionState) (Node, error) {
	if s == nil || len(s.PeerCertificates) == 0 {
		return Node{}, fmt.Errorf("no certificate was shown: %w", ErrPeer)
	}
	return NodeOf(s.PeerCertificates[0])
}

// ReadAuthority opens the authority whose key and certificate are in a file (0600), as Bundle gives them. now nil means time.Now. ErrPermissions, ErrFile, or the file
// system's error.
func ReadAuthority(name string, now func() time.Time) (*Authority, error) {
	if now == nil {
		now = time.Now
	}
	a := &Authority{dir: filepath.Dir(name), now: now}
	var err error
	if a.key, a.cert, err = readBundle(name); err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	if !a.cert.IsCA || now().After(a.cert.NotAfter) {
		return nil, fmt.Errorf("certificate authority: %s: %w: it ended %s", name, ErrFile, a.cert.NotAfter.UTC().Format(time.DateOnly))
	}
	return a, nil
}

// Bundle is the authority's key and certificate, PEM: whoever has it can be anybody.
func (a *Authority) Bundle() ([]byte, error) { return bundle(a.key, a.cert.Raw) }

// Certificate is the authority's certificate.
func (a *Authority) Certificate() *x509.Certificate { return a.cert }

// WriteFile puts a file in place as a whole, durably: a crash leaves the old one or the new one.
func WriteFile(name string, data []byte, mode fs.FileMode) error {
	return writeFile(name, data, mode, os.Rename)
}
