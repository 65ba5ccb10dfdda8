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
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// The lives of certificates. A server's is renewed when less than a third of its life is left.
const (
	authorityLife = 20 * 365 * 24 * time.Hour
	serverLife    = 90 * 24 * time.Hour
	// backdate makes a new certificate valid for clients whose clock is behind.
	backdate = time.Hour
)

// The files of an authority, in its directory.
const (
	authorityFile = "authority.pem" // key and certificate, 0600: whoever has it can be anybody
	caFile        = "ca.crt"        // the certificate alone, 0644: what clients are given
	serverFile    = "server.pem"    // key and certificate of this node's server, 0600
)

// Authority is the cluster's certificate authority, kept in a directory. It may be used concurrently.
type Authority struct {
	dir  string
	now  func() time.Time
	key  *ecdsa.PrivateKey
	cert *x509.Certificate

	mu     sync.Mutex
	server *tls.Certificate // what ServerTLS shows now
}

// OpenAuthority opens the authority in a directory and makes it the first time (directory 0700, keys 0600): once, whoever else does the same at the same time, and
// as a whole: after a crash there is all of it or nothing. now nil means time.Now. ErrPermissions, ErrFile, or the file system's error.
func OpenAuthority(dir string, now func() time.Time) (*Authority, error) {
	if now == nil {
		now = time.Now
	}
	a := &Authority{dir: dir, now: now}
	wrap := func(err error) error { return fmt.Errorf("certificate authority in %s: %w", dir, err) }
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, wrap(err)
	}
	var err error
	a.key, a.cert, err = readBundle(a.path(authorityFile))
	if errors.Is(err, fs.ErrNotExist) {
		if err = a.found(); err == nil {
			a.key, a.cert, err = readBundle(a.path(authorityFile))
		}
	}
	if err != nil {
		return nil, wrap(err)
	}
	if !a.cert.IsCA || now().After(a.cert.NotAfter) {
		return nil, wrap(fmt.Errorf("%s: %w: a certificate authority that is valid is wanted; this one ends %s", authorityFile, ErrFile, a.cert.NotAfter.UTC().Format(time.DateOnly)))
	}
	if err := a.publish(); err != nil {
		return nil, wrap(err)
	}
	return a, nil
}

func (a *Authority) path(name string) string { return filepath.Join(a.dir, name) }

// found makes the authority. Somebody else who was faster wins: a link never replaces.
func (a *Authority) found() error {
	key, err := newKey()
	if err != nil {
		return err
	}
	number, err := serial()
	if err != nil {
		return err
	}
	now := a.now()
	ca := &x509.Certificate{
		SerialNumber: number, Subject: pkix.Name{CommonName: fmt.Sprintf("Ashlar authority %x", number.Bytes()[:4])},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(authorityLife), IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	if err != nil {
		return err
	}
	data, err := bundle(key, der)
	if err != nil {
		return err
	}
	err = writeFile(a.path(authorityFile), data, 0o600, os.Link)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// publish writes the certificate that clients are given, if it is not there.
func (a *Authority) publish() error {
	want := a.CertificatePEM()
	if have, err := os.ReadFile(a.path(caFile)); err == nil && slices.Equal(have, want) {
		return nil
	}
	return writeFile(a.path(caFile), want, 0o644, os.Rename)
}

// CertificatePEM is the authority's certificate, which is no secret.
func (a *Authority) CertificatePEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: a.cert.Raw})
}

// Issue makes a key and a certificate for a server that is reached by these names and addresses (of which there must be one), and returns them with the
// authority's own certificate as PEM for one file. The certificate serves for TLS servers, and clients between nodes; it is valid for 90 days.
func (a *Authority) Issue(names []string) ([]byte, error) {
	if len(names) == 0 {
		return nil, errors.New("issue a certificate: no name and no address was given")
	}
	key, err := newKey()
	if err != nil {
		return nil, err
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
		SerialNumber: number, Subject: pkix.Name{CommonName: names[0]}, NotBefore: now.Add(-backdate), NotAfter: end, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			c.IPAddresses = append(c.IPAddresses, ip)
		} else {
			c.DNSNames = append(c.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, &key.PublicKey, a.key)
	if err != nil {
		return nil, fmt.Errorf("issue a certificate for %v: %w", names, err)
	}
	data, err := bundle(key, der)
	return append(data, a.CertificatePEM()...), err
}

// ServerTLS returns the settings of a TLS server that shows this authority's certificate for some names and addresses. The certificate is kept in the directory, made
// anew when the names change, and renewed by itself: whenever a client connects and less than a third of its life is left. A renewal that fails (a full disk) leaves
// the old one in use as long as it is valid. TLS 1.2 at least; HTTP/1.1 only, because connections are taken over for websockets.
func (a *Authority) ServerTLS(names []string) (*tls.Config, error) {
	names = slices.Clone(names)
	if _, err := a.current(names); err != nil {
		return nil, err
	}
	return serverConfig(func() (*tls.Certificate, error) { return a.current(names) }), nil
}

// current is the certificate to show now.
func (a *Authority) current(names []string) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fresh(a.server, names) {
		return a.server, nil
	}
	if c, err := readServer(a.path(serverFile)); err == nil && a.fresh(c, names) {
		a.server = c
		return c, nil
	}
	err := a.renew(names)
	if err != nil && a.server != nil && a.now().Before(a.server.Leaf.NotAfter) {
		return a.server, nil
	}
	return a.server, err
}

func (a *Authority) renew(names []string) error {
	data, err := a.Issue(names)
	if err != nil {
		return err
	}
	if err := writeFile(a.path(serverFile), data, 0o600, os.Rename); err != nil {
		return fmt.Errorf("keep the server's certificate: %w", err)
	}
	c, err := readServer(a.path(serverFile))
	if err == nil {
		a.server = c
	}
	return err
}

// readServer reads what renew wrote; a key that others can read is not used again.
func readServer(name string) (*tls.Certificate, error) {
	if err := checkMode(name); err != nil {
		return nil, err
	}
	c, err := tls.LoadX509KeyPair(name, name)
	return &c, err
}

// fresh tells whether a certificate is this authority's, for exactly these names, good already (it may be from when the clock was ahead), with a third of its life left.
func (a *Authority) fresh(c *tls.Certificate, names []string) bool {
	if c == nil || c.Leaf == nil || c.Leaf.CheckSignatureFrom(a.cert) != nil {
		return false
	}
	have := slices.Clone(c.Leaf.DNSNames)
	for _, ip := range c.Leaf.IPAddresses {
		have = append(have, ip.String())
	}
	want := slices.Clone(names)
	for i, n := range want {
		if ip := net.ParseIP(n); ip != nil {
			want[i] = ip.String()
		}
	}
	slices.Sort(have)
	slices.Sort(want)
	life := c.Leaf.NotAfter.Sub(c.Leaf.NotBefore)
	return !a.now().Before(c.Leaf.NotBefore) && slices.Equal(slices.Compact(have), slices.Compact(want)) && a.now().Add(life/3).Before(c.Leaf.NotAfter)
}
