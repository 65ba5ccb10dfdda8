package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
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
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/nbd"
	"ashlar/internal/testbed"
)

// qemuTCP is qemu-nbd on TCP.
type qemuTCP struct {
	file  string
	creds string      // a directory with what GnuTLS wants, if tls
	tls   *tls.Config // the client's; nil: plain
}

// start starts it (qemu-nbd(8)) and connects to it. stop can always be called.
func (q qemuTCP) start(ctx context.Context) (peer far, stop func(), err error) {
	stop = func() {}
	port, err := freePort()
	if err != nil {
		return far{}, stop, err
	}
	args := []string{"-f", "raw", "-t", "-e", "16", "-b", "127.0.0.1", "-p", strconv.Itoa(port), "--cache=writeback", "--aio=threads", "--discard=unmap"}
	uri, o := fmt.Sprintf("nbd://127.0.0.1:%d/", port), nbd.ClientOptions{}
	if q.tls != nil {
		args = append(args, "--object", "tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir="+q.creds, "--tls-creds", "tls0")
		uri, o = fmt.Sprintf("nbds://127.0.0.1:%d/", port), nbd.ClientOptions{TLS: q.tls, DialContext: dialQuick}
	}
	cmd := exec.CommandContext(ctx, "qemu-nbd", append(args, q.file)...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return far{}, stop, err
	}
	kill := func() {
		cmd.Process.Kill() //nolint:errcheck // it ended by itself
		cmd.Wait()         //nolint:errcheck // it was killed
	}
	var dev *nbd.Client
	var last error
	err = testbed.Until(ctx, 10*time.Second, func() (bool, error) {
		dev, last = nbd.Dial(ctx, uri, o)
		return last == nil, nil
	})
	if err != nil {
		return far{}, kill, fmt.Errorf("connect to qemu-nbd at %s: %w: %w", uri, err, last)
	}
	stop = func() {
		dev.Close() //nolint:errcheck // it is not used any more
		kill()
	}
	return far{name: "qemu-nbd TCP", dev: dev, pids: []int{cmd.Process.Pid}}, stop, nil
}

// quickConn acknowledges at once what it receives (TCP_QUICKACK, tcp(7)). qemu-nbd before 8.1 does not set TCP_NODELAY and sends a reply over TLS in two records, of which the second then waits for our
// kernel's delayed acknowledgement of the first: 40 ms for every read at depth 1. That is no measure of it, and nothing that ours should win by.
type quickConn struct {
	net.Conn
	raw syscall.RawConn
}

func dialQuick(ctx context.Context, network, address string) (net.Conn, error) {
	nc, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	raw, err := nc.(*net.TCPConn).SyscallConn()
	if err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	return quickConn{nc, raw}, nil
}

// Read sets it again every time: the kernel takes it back when it likes.
func (c quickConn) Read(p []byte) (int, error) {
	var failed error
	err := c.raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1) })
	if err := errors.Join(err, failed); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

// freePort is a TCP port of loopback that nobody listens on now.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	port := l.Addr().(*net.TCPAddr).Port
	return port, l.Close()
}

// makeCertificates makes an authority and one certificate for both ends, in a directory as GnuTLS's users want it (qemu(1), "TLS setup for network services"), and returns the client's configuration.
func makeCertificates(dir string) (*tls.Config, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	for name, block := range map[string]*pem.Block{"ca-cert": {Type: "CERTIFICATE", Bytes: caDER}, "server-cert": {Type: "CERTIFICATE", Bytes: der}, "client-cert": {Type: "CERTIFICATE", Bytes: der},
		"server-key": {Type: "PRIVATE KEY", Bytes: keyDER}, "client-key": {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(filepath.Join(dir, name+".pem"), pem.EncodeToMemory(block), 0o600); err != nil {
			return nil, err
		}
	}
	root, err := x509.ParseCertificate(caDER)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, RootCAs: pool, MinVersion: tls.VersionTLS13}, nil
}
