// Package identity makes and checks what proves who somebody is: the cluster's certificate authority with the certificates it issues, TLS settings that follow
// their files, and the secrets of REST clients' tokens. It keeps no records and decides nothing about who may do what: api does, and node wires both together.
//
// It imports nothing of ours. Read next: authority.go (the authority and its server certificate), server.go (certificates from files), node.go (nodes and their TLS), join.go (join
// tokens), token.go (clients' tokens).
package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
)

var (
	// ErrPermissions: a file with a private key can be read by others than its owner. Whatever it protected may be known: make it anew.
	ErrPermissions = errors.New("a private key that others can read")
	// ErrFile: a file does not hold what it should.
	ErrFile = errors.New("not what this file should hold")
)

// The types of PEM blocks.
const (
	pemCertificate = "CERTIFICATE"
	pemKey         = "PRIVATE KEY"
)

// newKey makes a private key: ECDSA on P-256, which every TLS client of today understands.
func newKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// serial makes a serial number: 128 random bits, more than RFC 5280 4.1.2.2 asks for.
func serial() (*big.Int, error) { return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128)) }

// bundle is a private key and its certificate as one file's content. One file, so that a crash cannot leave a key without its certificate.
func bundle(key *ecdsa.PrivateKey, der []byte) ([]byte, error) {
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: k}), pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: der})...), nil
}

// checkMode wants a file that nobody but its owner can read; ErrPermissions.
func checkMode(name string) error {
	st, err := os.Stat(name)
	if err == nil && st.Mode().Perm()&0o077 != 0 {
		err = fmt.Errorf("%s has mode %04o: %w (0600 is right)", name, st.Mode().Perm(), ErrPermissions)
	}
	return err
}

// readBundle is the inverse of bundle, for a file that only its owner may read; ErrPermissions, ErrFile, or the file system's error.
func readBundle(name string) (*ecdsa.PrivateKey, *x509.Certificate, error) {
	bad := func(err error) error { return fmt.Errorf("%s: %w: %w", name, ErrFile, err) }
	if err := checkMode(name); err != nil {
		return nil, nil, err
	}
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, nil, err
	}
	var key *ecdsa.PrivateKey
	var cert *x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		switch block.Type {
		case pemKey:
			k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, nil, bad(err)
			}
			key, _ = k.(*ecdsa.PrivateKey)
		case pemCertificate:
			if cert, err = x509.ParseCertificate(block.Bytes); err != nil {
				return nil, nil, bad(err)
			}
		}
	}
	if key == nil || cert == nil || !key.PublicKey.Equal(cert.PublicKey) {
		return nil, nil, bad(errors.New("an ECDSA key and the certificate of that key are wanted"))
	}
	return key, cert, nil
}

// writeFile puts a file in place as a whole, durably: a temporary one beside it, synced, then what place does with it (a rename or a link), then the directory.
func writeFile(name string, data []byte, mode fs.FileMode, place func(from, to string) error) error {
	dir := filepath.Dir(name)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(name)+".*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(data)
	err = errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close())
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := place(tmp.Name(), name); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
