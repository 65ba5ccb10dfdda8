package dataplane

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"
)

// certificates are files of PEM, read again when they change. A new set that makes no sense is not used: the old one goes on. All methods may be called concurrently.
type certificates struct {
	cert, key, authority string // paths; authority may be empty
	// make builds what connections are made with.
	make  func(pair tls.Certificate, authorities *x509.CertPool) *tls.Config
	clock func() time.Time // nil: time.Now

	mu    sync.Mutex // guards the rest
	now   *tls.Config
	stamp [3]stamp
}

// stamp tells one content of a file from the next: whoever replaces it makes a new inode or a new time.
type stamp struct {
	inode uint64
	size  int64
	mtime time.Time
}

func stampOf(path string) (stamp, error) {
	info, err := os.Stat(path)
	if err != nil {
		return stamp{}, err
	}
	s := stamp{size: info.Size(), mtime: info.ModTime()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		s.inode = st.Ino
	}
	return s, nil
}

// config returns what the files say now. An error only if they never said anything that can be used.
func (c *certificates) config() (*tls.Config, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.now == nil {
		err := c.read()
		return c.now, err
	}
	for i, path := range []string{c.cert, c.key, c.authority} {
		if path == "" {
			continue
		}
		if now, err := stampOf(path); err == nil && now != c.stamp[i] {
			if err := c.read(); err != nil {
				break // half written, perhaps: the next connection looks again
			}
		}
	}
	return c.now, nil
}

// read reads the files; mu is held.
func (c *certificates) read() error {
	var stamps [3]stamp
	for i, path := range []string{c.cert, c.key, c.authority} {
		if path == "" {
			continue
		}
		var err error
		if stamps[i], err = stampOf(path); err != nil {
			return err
		}
	}
	pair, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err != nil {
		return fmt.Errorf("certificate %s and key %s: %w", c.cert, c.key, err)
	}
	now := time.Now()
	if c.clock != nil {
		now = c.clock()
	}
	if leaf := pair.Leaf; leaf != nil && (now.After(leaf.NotAfter) || now.Before(leaf.NotBefore)) {
		return fmt.Errorf("certificate %s: %w: it is valid from %s to %s", c.cert, errNotValid, leaf.NotBefore.Format(time.RFC3339), leaf.NotAfter.Format(time.RFC3339))
	}
	var authorities *x509.CertPool
	if c.authority != "" {
		if authorities, err = readAuthorities(c.authority, now); err != nil {
			return err
		}
	}
	c.now, c.stamp = c.make(pair, authorities), stamps
	return nil
}

// errNotValid: a certificate's time has not come, or is over.
var errNotValid = errors.New("not valid now")

// readAuthorities reads the authorities whose certificates count.
func readAuthorities(path string, now time.Time) (*x509.CertPool, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("authority: %w", err)
	}
	pool := x509.NewCertPool()
	valid := false
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("authority %s: %w", path, err)
		}
		pool.AddCert(cert)
		valid = valid || now.After(cert.NotBefore) && now.Before(cert.NotAfter)
	}
	if !valid { // nobody would get in
		return nil, fmt.Errorf("authority %s: %w: it holds no certificate, or none whose time it is", path, errNotValid)
	}
	return pool, nil
}
