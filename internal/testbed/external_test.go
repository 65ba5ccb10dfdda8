//go:build integration

package testbed_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ashlar/internal/testbed"
)

// signer is an authority that is not ours.
type signer struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// newSigner makes an authority, and its certificate's file.
func newSigner(t *testing.T, dir, name string) *signer {
	t.Helper()
	s := &signer{t: t, dir: dir}
	s.cert = &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	s.sign(name, s.cert)
	return s
}

// sign makes a certificate, and files of it and its key.
func (s *signer) sign(name string, c *x509.Certificate) {
	s.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	if s.key == nil {
		s.key = key
	}
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(crand.Reader, c, s.cert, key.Public(), s.key)
	if err != nil {
		s.t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		s.t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{name + ".crt": {Type: "CERTIFICATE", Bytes: der}, name + ".key": {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(filepath.Join(s.dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
}

// issue makes a certificate for both sides of a connection on loopback.
func (s *signer) issue(name string) {
	s.t.Helper()
	s.sign(name, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
}

// foreignEtcd is Debian's etcd as a process: older than ours, with an authority of its own, and closed to who shows none of its certificates.
type foreignEtcd struct {
	t        *testing.T
	dir, bin string
	port     int
	cmd      *exec.Cmd
}

func newForeignEtcd(t *testing.T) *foreignEtcd {
	t.Helper()
	// Where `make deps` has put it; it is there in a moment if that was not said.
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("make", "-s", "-C", root, "bin/etcd").CombinedOutput(); err != nil {
		t.Fatalf("Debian's etcd: %v\n%s", err, out)
	}
	e := &foreignEtcd{t: t, dir: t.TempDir(), bin: filepath.Join(root, "bin", "etcd")}
	if e.port, err = testbed.FreePorts(2); err != nil {
		t.Fatal(err)
	}
	ca := newSigner(t, e.dir, "ca")
	ca.issue("etcd")
	ca.issue("ashlar")
	newSigner(t, e.dir, "other").issue("stranger")
	out, err := exec.Command(e.bin, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	version, _, _ := strings.Cut(string(out), "\n")
	t.Log(version)
	e.start()
	t.Cleanup(e.kill)
	return e
}

func (e *foreignEtcd) url() string { return fmt.Sprintf("https://127.0.0.1:%d", e.port) }

func (e *foreignEtcd) file(name string) string { return filepath.Join(e.dir, name) }

// start starts it (again).
func (e *foreignEtcd) start() {
	e.t.Helper()
	log, err := os.OpenFile(e.file("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		e.t.Fatal(err)
	}
	defer log.Close()
	peer := fmt.Sprintf("http://127.0.0.1:%d", e.port+1)
	e.cmd = exec.Command(e.bin, "--name", "e", "--data-dir", e.file("data"), "--listen-client-urls", e.url(), "--advertise-client-urls", e.url(),
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "e="+peer,
		"--cert-file", e.file("etcd.crt"), "--key-file", e.file("etcd.key"), "--trusted-ca-file", e.file("ca.crt"), "--client-cert-auth")
	e.cmd.Stdout, e.cmd.Stderr = log, log
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
}

// kill kills it; nothing if it does not run.
func (e *foreignEtcd) kill() {
	if e.cmd == nil {
		return
	}
	_ = e.cmd.Process.Kill()
	_ = e.cmd.Wait()
	e.cmd = nil
}

// args are how serve finds it, with an authority and who it says it is.
func (e *foreignEtcd) args(ca, who string) []string {
	return []string{"--etcd", e.url(), "--etcd-ca", e.file(ca + ".crt"), "--etcd-certificate", e.file(who + ".crt"), "--etcd-key", e.file(who + ".key")}
}

// exitInterrupted is the exit code of who was told to end before it was done.
const exitInterrupted = 130

// refuses starts a serve in a directory that must not get at the etcd, and must say why.
func (e *foreignEtcd) refuses(dir, ca, who string, words ...string) {
	p := &testbed.Process{Bin: program, Name: "stranger", DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run")}
	cmd := exec.Command(program, append([]string{"serve", "--data-dir", p.DataDir, "--run-dir", p.RunDir, "--listen", "none", "--name", p.Name}, e.args(ca, who)...)...)
	var said locked
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		e.t.Error(err)
		return
	}
	err := testbed.Until(context.Background(), 20*time.Second, func() (bool, error) {
		for _, w := range append(words, e.url()) {
			if !strings.Contains(said.String(), w) {
				return false, nil
			}
		}
		return true, nil
	})
	if err != nil {
		e.t.Errorf("with %s and %s: does not say %q: %s", ca, who, words, said.String())
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	err = cmd.Wait()
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || exit.ExitCode() != exitInterrupted {
		e.t.Errorf("with %s and %s: ended with %v", ca, who, err)
	}
	e.t.Logf("with authority %s and certificate %s: %s", ca, who, said.String())
	err = testbed.Until(context.Background(), 20*time.Second, func() (bool, error) {
		for _, sub := range []string{"hold", "data"} {
			if pid := p.PID(sub); pid != 0 {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		return p.PID("hold") == 0 && p.PID("data") == 0, nil
	})
	if err != nil {
		e.t.Error(err)
	}
}

// locked is a buffer that is read while it is written.
type locked struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

// Write implements io.Writer.
func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *locked) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// TestExternalEtcd has three nodes use an etcd that is not theirs: cluster init and node join over it, a volume on one and used on another. The etcd is killed and comes back under a writer, and while it
// is away a serve and both data processes are killed as well.
func TestExternalEtcd(t *testing.T) {
	e := newForeignEtcd(t)
	w := newCrowd(t, 3, loopback, e.args("ca", "ashlar")...)
	var strangers sync.WaitGroup
	defer strangers.Wait()
	first, second := scratch(t), scratch(t)
	strangers.Go(func() { e.refuses(first, "other", "ashlar", "certificate signed by unknown authority") })
	strangers.Go(func() { e.refuses(second, "ca", "stranger", "remote error: tls: bad certificate") })
	at, third := w.nodes[0], w.nodes[2]
	for _, m := range at.members() {
		if m.Member != "" {
			t.Errorf("node %s says of a member of the catalogue: %q", m.Name, m.Member)
		}
	}
	w.stored("v1", 1, 0)
	j := w.journal(at, "v1", 3)
	ctx, cancel := context.WithCancel(w.ctx)
	defer cancel()
	failed := make(chan error, 1)
	var busy sync.WaitGroup
	busy.Go(func() { failed <- j.write(ctx) })
	goesOn := func(what string) {
		t.Helper()
		had := j.total.Load()
		at.until(30*time.Second, what+": the writer goes on", func() bool {
			if len(failed) > 0 {
				t.Fatal(<-failed)
			}
			return j.total.Load() > had+300
		})
	}
	goesOn("at first")
	strangers.Wait() // they ask the etcd
	e.kill()
	goesOn("etcd is killed")
	away := time.Now()
	at.until(20*time.Second, "it is said that the catalogue is away", func() bool {
		_, err := at.p.Text(w.ctx, "status")
		failed, ok := errors.AsType[*testbed.CommandError](err)
		return ok && failed.Code == exitUnreachable && strings.Contains(failed.Stderr, "the catalogue did not answer") && strings.Contains(failed.Stderr, e.url()) &&
			strings.Contains(failed.Stderr, "connection refused")
	})
	t.Logf("etcd is killed: said with its reason after %v: %s", time.Since(away).Round(time.Millisecond), at.refused(exitUnreachable, []string{e.url()}, "volume", "create", "no", "--size", "1Mi"))
	w.nodes[1].kill("data")
	goesOn("the copy's process is killed, too")
	at.kill("data")
	goesOn("the volume's process is killed, too")
	third.p.KillServe()
	busy.Go(func() { // it is ready when the catalogue is there
		if err := third.p.StartServe(w.ctx); err != nil {
			t.Error(err)
		}
	})
	third.until(20*time.Second, "a serve that was started without it says what it waits for", func() bool {
		_, err := third.p.Text(w.ctx, "status")
		failed, ok := errors.AsType[*testbed.CommandError](err)
		return ok && strings.Contains(failed.Stderr, "waiting for the catalogue's etcd: "+e.url())
	})
	start := time.Now()
	e.start()
	at.until(30*time.Second, "changes are made again", func() bool {
		_, err := at.p.Text(w.ctx, "volume", "create", "v2", "--size", "1Mi")
		return err == nil
	})
	t.Logf("etcd is started: a volume is created after %v", time.Since(start).Round(time.Millisecond))
	w.untilWhole(3)
	t.Logf("etcd is started: all is well after %v", time.Since(start).Round(time.Millisecond))
	goesOn("all is well")
	cancel()
	busy.Wait()
	if err := <-failed; err != nil {
		t.Error(err)
	}
	t.Logf("%d acknowledged, none lost; %d connections broken, the longest wait %v", j.total.Load(), j.broke, j.longest.Round(time.Millisecond))
	backup := e.file("backup.json")
	at.cli("cluster", "backup", backup)
	if text, err := os.ReadFile(backup); err != nil || !bytes.Contains(text, []byte("volume/wanted/v1")) {
		t.Errorf("the backup has no v1: %v", err)
	}
	at.cli("volume", "detach", "v1")
	third.cli("volume", "attach", "v1", "--frontend", "nbd")
	if err := j.verify(third.dial("v1")); err != nil {
		t.Error(err)
	}
	w.restoreExternal(e, backup)
	third.cli("volume", "attach", "v1", "--frontend", "nbd")
	if err := j.verify(third.dial("v1")); err != nil {
		t.Error(err)
	}
}

// restoreExternal brings a backup back into an etcd that lost everything. Volume v1 was opened since, and its copy is on the second node.
func (w *crowd) restoreExternal(e *foreignEtcd, backup string) {
	w.Helper()
	one, two := w.nodes[0], w.nodes[1]
	with := func(b *bed, args ...string) []string {
		return append(append(args, "--data-dir", b.p.DataDir), e.args("ca", "ashlar")...)
	}
	one.refused(exitConflict, []string{"serve"}, with(one, "cluster", "restore", backup)...)
	for _, b := range w.nodes {
		b.stopServe()
	}
	one.refused(exitConflict, []string{"etcdctl", e.url()}, with(one, "cluster", "restore", backup)...)
	e.kill()
	if err := os.Rename(e.file("data"), e.file("lost")); err != nil {
		w.Fatal(err)
	}
	e.start()
	one.says(one.cli(with(one, "cluster", "restore", backup)...), "records of cluster")
	for _, b := range w.nodes {
		b.startServe()
	}
	w.untilWhole(3)
	one.until(20*time.Second, "the volume says that the catalogue is old", func() bool { return strings.Contains(one.volume("v1").Error, "recover") })
	one.p.Text(w.ctx, "volume", "detach", "v1", "--force")
	two.stopServe()
	two.says(two.cli(with(two, "recover", two.disk())...), "brought up to date")
	two.startServe()
	for _, b := range w.nodes {
		if _, err := os.Stat(b.etcd()); !errors.Is(err, os.ErrNotExist) {
			w.Errorf("node %s has a catalogue of its own now: %v", b.p.Name, err)
		}
	}
	w.untilWhole(3)
}
