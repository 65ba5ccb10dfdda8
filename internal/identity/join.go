package identity

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
)

// joinPrefix begins every join token; the digit is the version of its form (docs/formats/cluster.md, section 4).
const joinPrefix = "ashlar1"

// fingerprintDigits are how many hex digits of the authority's SHA-256 stand in a join token: 128 bits.
const fingerprintDigits = 32

var (
	// ErrJoinToken: this text is no join token.
	ErrJoinToken = errors.New("not a join token")
	// ErrFingerprint: the other side is not of the authority that a join token names.
	ErrFingerprint = errors.New("not the cluster that the join token is of")
)

// JoinToken is what lets a machine join: whom it may speak to, and what it says.
type JoinToken struct {
	Fingerprint string // the first 32 hex digits of the SHA-256 of the authority's certificate (DER)
	Secret      string
}

// NewJoinToken makes a token for joining an authority's cluster, and the SHA-256 of its secret in hex, which is what is kept. random nil means the kernel's generator.
func NewJoinToken(authority *x509.Certificate, random io.Reader) (t JoinToken, sum string, err error) {
	if random == nil {
		random = rand.Reader
	}
	var b [tokenBytes]byte
	if _, err := io.ReadFull(random, b[:]); err != nil {
		return t, "", fmt.Errorf("new join token: %w", err)
	}
	t = JoinToken{Fingerprint: Fingerprint(authority), Secret: base64.RawURLEncoding.EncodeToString(b[:])}
	return t, TokenSum(t.Secret), nil
}

// String is the token as people pass it on.
func (t JoinToken) String() string { return joinPrefix + "." + t.Fingerprint + "." + t.Secret }

// ParseJoinToken reads what String wrote; ErrJoinToken.
func ParseJoinToken(s string) (JoinToken, error) {
	prefix, rest, _ := strings.Cut(strings.TrimSpace(s), ".")
	fingerprint, secret, _ := strings.Cut(rest, ".")
	bad := func(why string) (JoinToken, error) {
		return JoinToken{}, fmt.Errorf("%w: %s (`ashlar cluster token` on a node of the cluster makes one)", ErrJoinToken, why)
	}
	if prefix != joinPrefix {
		return bad("it does not begin with " + joinPrefix + ".")
	}
	if b, err := hex.DecodeString(fingerprint); err != nil || len(b) != fingerprintDigits/2 || strings.ToLower(fingerprint) != fingerprint {
		return bad("the middle part is not 32 hex digits; was it cut?")
	}
	if b, err := base64.RawURLEncoding.Strict().DecodeString(secret); err != nil || len(b) != tokenBytes {
		return bad("the last part is not 43 letters; was it cut?")
	}
	return JoinToken{Fingerprint: fingerprint, Secret: secret}, nil
}

// Fingerprint is what a join token says of an authority.
func Fingerprint(authority *x509.Certificate) string {
	sum := sha256.Sum256(authority.Raw)
	return hex.EncodeToString(sum[:])[:fingerprintDigits]
}

// TLS is for asking a node that is known only by a join token: the other side must show a node's certificate and the authority that signed it, and that one must be the
// token's; else ErrFingerprint, before anything is said. Clocks are not looked at: the answer says what time it is there. TLS 1.3.
func (t JoinToken) TLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, // VerifyConnection does it
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return fmt.Errorf("it shows no certificate: %w", ErrFingerprint)
			}
			leaf := s.PeerCertificates[0]
			for _, c := range s.PeerCertificates[1:] {
				if subtle.ConstantTimeCompare([]byte(Fingerprint(c)), []byte(t.Fingerprint)) != 1 {
					continue
				}
				roots := x509.NewCertPool()
				roots.AddCert(c)
				// An instant at which the certificate is good (the authority outlives it): whether it is now depends on a clock that may be wrong.
				_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: leaf.NotAfter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
				if err != nil {
					return fmt.Errorf("%w: %w", ErrFingerprint, err)
				}
				_, err = NodeOf(leaf)
				return err
			}
			return fmt.Errorf("the certificate shown is of another authority: %w", ErrFingerprint)
		},
	}
}
