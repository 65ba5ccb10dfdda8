package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// shake does a TLS handshake with a server of these settings, by a client that trusts one file's authorities, and returns the certificate shown.
func shake(t *testing.T, server *tls.Config, ca, name string) (*x509.Certificate, error) {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(must[[]byte](t)(os.ReadFile(ca))) {
		t.Fatalf("%s holds no certificate", ca)
	}
	a, b := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer a.Close()
		conn := tls.Server(a, server)
		if conn.Handshake() == nil {
			_, _ = io.Copy(io.Discard, conn)
		}
	})
	defer wg.Wait()
	defer b.Close()
	c := tls.Client(b, &tls.Config{RootCAs: pool, ServerName: name})
	if err := c.Handshake(); err != nil {
		return nil, err
	}
	return c.ConnectionState().PeerCertificates[0], nil
}

// TestAuthority makes one, opens it again, and has clients check its server's certificate by name and address.
func TestAuthority(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "identity")
	a := must[*Authority](t)(OpenAuthority(dir, nil))
	names := []string{"node1.example", "192.0.2.7", "::1", "0:0:0:0:0:0:0:1", "node1.example"} // twice is no reason for another certificate
	cfg := must[*tls.Config](t)(a.ServerTLS(names))
	for _, name := range names {
		if _, err := shake(t, cfg, a.path(caFile), name); err != nil {
			t.Errorf("as %s: %v", name, err)
		}
	}
	var host x509.HostnameError
	if _, err := shake(t, cfg, a.path(caFile), "elsewhere.example"); !errors.As(err, &host) {
		t.Errorf("as another name: %v", err)
	}
	other := must[*Authority](t)(OpenAuthority(t.TempDir(), nil))
	var unknown x509.UnknownAuthorityError
	if _, err := shake(t, cfg, other.path(caFile), "node1.example"); !errors.As(err, &unknown) {
		t.Errorf("with another authority: %v", err)
	}
	first := must[*x509.Certificate](t)(shake(t, cfg, a.path(caFile), "node1.example"))
	if again := must[*Authority](t)(OpenAuthority(dir, nil)); !again.cert.Equal(a.cert) {
		t.Error("opened again it is another authority")
	} else if c := must[*x509.Certificate](t)(shake(t, must[*tls.Config](t)(again.ServerTLS(names)), a.path(caFile), "node1.example")); !c.Equal(first) {
		t.Error("opened again it issued another certificate for the same names")
	}
	for name, want := range map[string]os.FileMode{"": 0o700, authorityFile: 0o600, serverFile: 0o600, caFile: 0o644} {
		if st := must[os.FileInfo](t)(os.Stat(filepath.Join(dir, name))); st.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", name, st.Mode().Perm(), want)
		}
	}
	if entries := must[[]os.DirEntry](t)(os.ReadDir(dir)); len(entries) != 3 {
		t.Errorf("left behind: %v", entries)
	}
}

// TestAuthorityOnce has many make the same authority at once: all of them hold the same one.
func TestAuthorityOnce(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	all := make([]*Authority, 8)
	for i := range all {
		wg.Go(func() {
			a, err := OpenAuthority(dir, nil)
			if err != nil {
				t.Error(err)
			}
			all[i] = a
		})
	}
	wg.Wait()
	for _, a := range all[1:] {
		if t.Failed() || !a.cert.Equal(all[0].cert) {
			t.Fatal("two authorities")
		}
	}
}

// TestRenewal lets time pass: the certificate is renewed by itself, before it ends.
func TestRenewal(t *testing.T) {
	now := time.Now()
	dir := t.TempDir()
	a := must[*Authority](t)(OpenAuthority(dir, func() time.Time { return now }))
	cfg := must[*tls.Config](t)(a.ServerTLS([]string{"n"}))
	shown := func() *x509.Certificate { return must[*tls.Certificate](t)(cfg.GetCertificate(nil)).Leaf }
	first := shown()
	now = now.Add(50 * 24 * time.Hour)
	if !shown().Equal(first) {
		t.Error("renewed though more than a third of its life was left")
	}
	now = now.Add(15 * 24 * time.Hour)
	second := shown()
	if second.Equal(first) || !now.Add(80*24*time.Hour).Before(second.NotAfter) {
		t.Error("not renewed")
	}
	if c := must[*tls.Certificate](t)(readServer(filepath.Join(dir, serverFile))); !c.Leaf.Equal(second) {
		t.Error("the renewed one was not kept")
	}
	// A directory that cannot be written to leaves the old one in use.
	a.dir = filepath.Join(dir, "away")
	now = now.Add(70 * 24 * time.Hour)
	if !shown().Equal(second) {
		t.Error("not the old one")
	}
	now = now.Add(70 * 24 * time.Hour)
	if _, err := cfg.GetCertificate(nil); err == nil {
		t.Error("an expired certificate is shown and nobody told")
	}
}

// TestClockSetBack sets a clock right that was ahead: clients whose clocks were right all the time would not take what was signed meanwhile.
func TestClockSetBack(t *testing.T) {
	now := time.Now().Add(100 * 24 * time.Hour)
	a := must[*Authority](t)(OpenAuthority(t.TempDir(), func() time.Time { return now }))
	cfg := must[*tls.Config](t)(a.ServerTLS([]string{"n"}))
	now = now.Add(-100 * 24 * time.Hour)
	if c := must[*tls.Certificate](t)(cfg.GetCertificate(nil)).Leaf; c.NotBefore.After(now) || c.NotAfter.Before(now) {
		t.Errorf("shown at %s: a certificate from %s to %s", now, c.NotBefore, c.NotAfter)
	}
}

// TestBadFiles wants every file that is not as it should be to be refused with its name.
func TestBadFiles(t *testing.T) {
	dir := t.TempDir()
	must[*Authority](t)(OpenAuthority(dir, nil))
	name := filepath.Join(dir, authorityFile)
	good := must[[]byte](t)(os.ReadFile(name))
	for what, c := range map[string]struct {
		data []byte
		mode os.FileMode
		want error
	}{
		"readable by others": {good, 0o644, ErrPermissions},
		"empty":              {nil, 0o600, ErrFile},
		"half":               {good[:len(good)/2], 0o600, ErrFile},
		"garbage":            {[]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), 0o600, ErrFile},
	} {
		if err := errors.Join(os.WriteFile(name, c.data, 0o600), os.Chmod(name, c.mode)); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenAuthority(dir, nil); !errors.Is(err, c.want) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := errors.Join(os.WriteFile(name, good, 0o600), os.Chmod(name, 0o600)); err != nil {
		t.Fatal(err)
	}
	future := time.Now().Add(authorityLife + time.Hour)
	if _, err := OpenAuthority(dir, func() time.Time { return future }); !errors.Is(err, ErrFile) {
		t.Errorf("an authority that has ended: %v", err)
	}
}

// TestServerTLSFollowsFiles replaces a certificate's files under a running server: new connections see the new one, a broken pair changes nothing.
func TestServerTLSFollowsFiles(t *testing.T) {
	dir := t.TempDir()
	a := must[*Authority](t)(OpenAuthority(filepath.Join(dir, "identity"), nil))
	var told []error
	f := ServerFiles{CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key"), Changed: func(err error) { told = append(told, err) }}
	stamp := time.Now().Add(-time.Hour)
	put := func(cert, key []byte) {
		t.Helper()
		stamp = stamp.Add(time.Minute)
		for name, data := range map[string][]byte{f.CertFile: cert, f.KeyFile: key} {
			if err := errors.Join(os.WriteFile(name, data, 0o600), os.Chtimes(name, stamp, stamp)); err != nil {
				t.Fatal(err)
			}
		}
	}
	one, two := must[[]byte](t)(a.Issue([]string{"n"})), must[[]byte](t)(a.Issue([]string{"n"}))
	put(one, one)
	cfg := must[*tls.Config](t)(ServerTLS(f))
	shown := func() *x509.Certificate { return must[*x509.Certificate](t)(shake(t, cfg, a.path(caFile), "n")) }
	first := shown()
	put(one, two) // half-way through a replacement
	if !shown().Equal(first) || len(told) != 1 || !errors.Is(told[0], ErrFile) {
		t.Errorf("a key that is not the certificate's: %v", told)
	}
	shown() // and it is not read again and again
	put(two, two)
	if shown().Equal(first) || len(told) != 2 || told[1] != nil {
		t.Errorf("the new files are not taken over: %v", told)
	}
	second := shown()
	if err := os.Remove(f.KeyFile); err != nil {
		t.Fatal(err)
	}
	if !shown().Equal(second) || !errors.Is(told[2], os.ErrNotExist) {
		t.Errorf("without a key: %v", told)
	}
	if _, err := ServerTLS(f); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("at the start: %v", err)
	}
	put(two, two)
	if err := os.Chmod(f.KeyFile, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := ServerTLS(f); !errors.Is(err, ErrPermissions) {
		t.Errorf("a key that others can read: %v", err)
	}
	old := must[*Authority](t)(OpenAuthority(filepath.Join(dir, "old"), func() time.Time { return time.Now().Add(-2 * serverLife) }))
	expired := must[[]byte](t)(old.Issue([]string{"n"}))
	put(expired, expired)
	if _, err := ServerTLS(ServerFiles{CertFile: f.CertFile, KeyFile: f.KeyFile}); !errors.Is(err, ErrPermissions) {
		t.Errorf("mode was not kept: %v", err)
	}
	if err := os.Chmod(f.KeyFile, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := ServerTLS(f); !errors.Is(err, ErrFile) {
		t.Errorf("an expired certificate: %v", err)
	}
}

// TestToken makes tokens and tells them apart.
func TestToken(t *testing.T) {
	secret, sum, err := NewToken(nil)
	if err != nil || !LooksLikeToken(secret) || len(sum) != 64 || strings.Contains(secret, sum) {
		t.Fatal(secret, sum, err)
	}
	other, _, err := NewToken(nil)
	if err != nil || other == secret {
		t.Fatal("twice the same", err)
	}
	if !TokenMatches(secret, sum) {
		t.Error("a token does not match itself")
	}
	for _, wrong := range []string{other, "", secret + "x", secret[:len(secret)-1], sum} {
		if TokenMatches(wrong, sum) {
			t.Errorf("%q matches", wrong)
		}
	}
	if TokenMatches(secret, "") || LooksLikeToken("ashlar_") || LooksLikeToken(other[7:]) {
		t.Error("not a token")
	}
	if _, _, err := NewToken(strings.NewReader("short")); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(err)
	}
}
