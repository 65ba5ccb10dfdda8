package identity

import (
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// ServerFiles name a certificate (with those between it and its authority) and its key, PEM, which somebody else keeps up to date.
type ServerFiles struct {
	CertFile string
	KeyFile  string // its group may read it (0640, as keys on Debian are), nobody else, else ErrPermissions
	// Changed is told of every later attempt to take over changed files; the error is nil if it went well. Nil: nobody is told. It must not block.
	Changed func(error)
}

// ServerTLS returns the settings of a TLS server that shows the certificate in some files, and follows them: whenever a client connects and a file has changed, both
// are read again. Files that then make no pair, or no certificate at all, leave the old certificate in use, and Changed hears of it; they are looked at again when they
// change again. An expired certificate is an error here and now, and no reason to stop later: clients say so. ErrPermissions, ErrFile, or the file system's error.
func ServerTLS(f ServerFiles) (*tls.Config, error) {
	r := &reloader{files: f}
	r.stamp = r.look()
	c, err := r.read()
	if err != nil {
		return nil, err
	}
	if now := time.Now(); now.After(c.Leaf.NotAfter) || now.Before(c.Leaf.NotBefore) {
		return nil, fmt.Errorf("%s: %w: the certificate is valid from %s to %s", f.CertFile, ErrFile, c.Leaf.NotBefore.UTC().Format(time.RFC3339), c.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	r.cert = c
	return serverConfig(r.current), nil
}

// serverConfig is what all of our servers have in common.
func serverConfig(current func() (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return current() },
	}
}

// reloader keeps a certificate as its files are.
type reloader struct {
	files ServerFiles

	mu    sync.Mutex
	cert  *tls.Certificate
	stamp fileStamp // of what was read last, well or not
}

// fileStamp tells two versions of the files apart.
type fileStamp struct {
	cert, key         time.Time
	certSize, keySize int64
}

func (r *reloader) look() fileStamp {
	var s fileStamp
	if st, err := os.Stat(r.files.CertFile); err == nil {
		s.cert, s.certSize = st.ModTime(), st.Size()
	}
	if st, err := os.Stat(r.files.KeyFile); err == nil {
		s.key, s.keySize = st.ModTime(), st.Size()
	}
	return s
}

// current is the certificate to show now.
func (r *reloader) current() (*tls.Certificate, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.look()
	if now == r.stamp {
		return r.cert, nil
	}
	// The stamp is taken before reading: a change in between is found next time.
	r.stamp = now
	c, err := r.read()
	if err == nil {
		r.cert = c
	}
	if r.files.Changed != nil {
		r.files.Changed(err)
	}
	return r.cert, nil
}

func (r *reloader) read() (*tls.Certificate, error) {
	st, err := os.Stat(r.files.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("TLS key: %w", err)
	}
	if st.Mode().Perm()&0o007 != 0 {
		return nil, fmt.Errorf("%s has mode %04o: %w (0600 or 0640 is right)", r.files.KeyFile, st.Mode().Perm(), ErrPermissions)
	}
	c, err := tls.LoadX509KeyPair(r.files.CertFile, r.files.KeyFile)
	var path *os.PathError
	switch {
	case errors.As(err, &path):
		return nil, fmt.Errorf("TLS certificate: %w", err)
	case err != nil:
		return nil, fmt.Errorf("%s and %s: %w: %w", r.files.CertFile, r.files.KeyFile, ErrFile, err)
	}
	return &c, nil
}
