//go:build integration

package remote

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/nbd"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
	"ashlar/internal/replica/replicatest"

	"golang.org/x/sys/unix"
)

const speedSize = 1 << 30

// scratch is a directory in memory, so that what is measured is the way there.
func scratch(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ashlar-remote-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// realHost has one replica on a disk.
type realHost struct {
	fsys disk.FS
	dir  string
}

func (h realHost) OpenReplica(context.Context, string) (Served, error) {
	r, err := local.Open(h.fsys, h.dir, local.OpenConfig{BootID: "2f1c7d8e-0000-4000-8000-000000000001"})
	if err != nil {
		return Served{}, err
	}
	return Served{Connect: func() replica.Replica { return r.Connect() }, Release: func() { _ = r.Close() }}, nil
}

func (realHost) OpenSource(context.Context, string) (block.Device, json.RawMessage, error) {
	return nil, nil, ErrUnknown
}

// certificates makes an authority and a certificate for both ends, where GnuTLS (qemu-nbd, libnbd) finds them.
func certificates(t testing.TB, dir string) (server, client *tls.Config) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	must(err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
	must(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(err)
	for name, block := range map[string]*pem.Block{"ca-cert": {Type: "CERTIFICATE", Bytes: caDER}, "server-cert": {Type: "CERTIFICATE", Bytes: der}, "client-cert": {Type: "CERTIFICATE", Bytes: der},
		"server-key": {Type: "PRIVATE KEY", Bytes: keyDER}, "client-key": {Type: "PRIVATE KEY", Bytes: keyDER}} {
		must(os.WriteFile(filepath.Join(dir, name+".pem"), pem.EncodeToMemory(block), 0o600))
	}
	root, err := x509.ParseCertificate(caDER)
	must(err)
	pool := x509.NewCertPool()
	pool.AddCert(root)
	pair := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13},
		&tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool, ServerName: "localhost", MinVersion: tls.VersionTLS13}
}

// prompts is a listener as that of the data process is.
type prompts struct{ net.Listener }

func (l prompts) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return nbd.Prompt(nc), nil
}

// realClient is a replica on a disk in memory behind TCP on loopback, with TLS if dir has certificates.
func realClient(t testing.TB, dir string, server, client *tls.Config) *Replica {
	t.Helper()
	fsys, err := disk.OpenReal(dir, disk.RealOptions{})
	if err != nil {
		t.Fatal(err)
	}
	name, err := local.Create(fsys, local.CreateConfig{ReplicaID: testReplica, VolumeID: replicatest.VolumeID, Volume: "db1", HeadID: testHead, SizeBytes: speedSize,
		BootID: "2f1c7d8e-0000-4000-8000-000000000001"})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	if server != nil {
		ln = tls.NewListener(prompts{ln}, server)
	}
	srv := NewServer(ServerConfig{Host: realHost{fsys, name}})
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(context.Background(), ln) })
	dial := func(ctx context.Context) (net.Conn, error) {
		nc, err := new(net.Dialer).DialContext(ctx, "tcp", address)
		if err != nil || client == nil {
			return nc, err
		}
		return tls.Client(nbd.Prompt(nc), client), nil
	}
	r, err := Open(t.Context(), Config{ReplicaID: testReplica, Dial: dial})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Fence(t.Context(), replica.Writer{Epoch: 1, Session: 1}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = r.Close()
		_ = srv.Close()
		wg.Wait()
		_ = fsys.Close()
	})
	return r
}

// exported is r as an NBD export on a unix socket, as a guest has a volume.
func exported(t testing.TB, dir string, r *Replica) string {
	t.Helper()
	sock := filepath.Join(dir, "nbd.sock")
	ln, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	srv, err := nbd.NewServer(nbd.Config{Exports: nbd.Single{Name: "v", Device: r, FastZero: true}})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(ln) })
	t.Cleanup(func() {
		_ = srv.Close()
		wg.Wait()
	})
	return "nbd+unix:///v?socket=" + sock
}

// qemuTCP is qemu-nbd on TCP, with TLS if creds is a directory of certificates.
func qemuTCP(t testing.TB, dir, creds string) string {
	t.Helper()
	file := filepath.Join(dir, "raw")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, speedSize)); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := ln.Addr().(*net.TCPAddr).Port
	_ = ln.Close()
	args := []string{"-f", "raw", "-t", "-e", "16", "-b", "127.0.0.1", "-p", fmt.Sprint(port), "--cache=writeback", "--aio=threads", "--discard=unmap"}
	uri := fmt.Sprintf("nbd://127.0.0.1:%d/", port)
	if creds != "" {
		args = append(args, "--object", "tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir="+creds, "--tls-creds", "tls0")
		uri = fmt.Sprintf("nbds://localhost:%d/?tls-certificates=%s", port, creds)
	}
	cmd := exec.Command("qemu-nbd", append(args, file)...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for until := time.Now().Add(time.Minute); ; {
		nc, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			_ = nc.Close()
			return uri
		}
		if time.Now().After(until) {
			t.Fatal(err)
		}
		<-time.After(20 * time.Millisecond)
	}
}

type speedLoad struct{ name, rw, bs, depth string }

var speedLoads = []speedLoad{
	{"4 KiB read, depth 1", "randread", "4k", "1"}, {"4 KiB write, depth 1", "randwrite", "4k", "1"},
	{"4 KiB read, depth 32", "randread", "4k", "32"}, {"4 KiB write, depth 32", "randwrite", "4k", "32"},
	{"1 MiB read, depth 4", "read", "1M", "4"}, {"1 MiB write, depth 4", "write", "1M", "4"},
}

// fio returns the IOPS of one second of a load.
func fio(t testing.TB, uri string, l speedLoad, seconds string) float64 {
	t.Helper()
	out, err := exec.Command("fio", "--name=x", "--ioengine=nbd", "--uri="+uri, "--rw="+l.rw, "--bs="+l.bs, "--iodepth="+l.depth, "--size=512M", "--time_based",
		"--runtime="+seconds, "--output-format=json", "--thread", "--randrepeat=0").Output()
	if err != nil {
		t.Fatalf("fio %s: %v\n%s", uri, err, out)
	}
	var rep struct {
		Jobs []struct {
			Read, Write struct {
				IOPS float64 `json:"iops"`
			}
		} `json:"jobs"`
	}
	text := string(out)
	if err := json.Unmarshal([]byte(text[strings.Index(text, "{"):]), &rep); err != nil || len(rep.Jobs) == 0 {
		t.Fatalf("fio's report: %v", err)
	}
	return rep.Jobs[0].Read.IOPS + rep.Jobs[0].Write.IOPS
}

// rate returns how often a second a load is done on a device, by as many goroutines as its depth.
func rate(t testing.TB, d block.Device, l speedLoad, length time.Duration) float64 {
	t.Helper()
	depth, size := 1, int64(4096)
	if l.bs == "1M" {
		size = 1 << 20
	}
	_, _ = fmt.Sscan(l.depth, &depth)
	var done atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for lane := range depth {
		wg.Go(func() {
			p := make([]byte, size)
			var err error
			for i := uint64(lane); err == nil && time.Since(start) < length; i += uint64(depth) {
				off := int64(i*2654435761%(512<<20)) / size * size
				if strings.Contains(l.rw, "write") {
					_, err = d.WriteAt(p, off)
				} else {
					_, err = d.ReadAt(p, off)
				}
				done.Add(1)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	return float64(done.Load()) / time.Since(start).Seconds()
}

// TestSpeed prints two tables against qemu-nbd over TCP, both on loopback and with their files in memory. Direct: a Replica, and the same kind of Client on qemu-nbd, under the same load, with and without
// TLS. As a guest: fio through a unix socket, and then to the other node, against fio straight to qemu-nbd, which is a hop less.
func TestSpeed(t *testing.T) {
	rounds, length, loads := 1, 200*time.Millisecond, speedLoads[2:4] // that it runs at all
	if os.Getenv("ASHLAR_BENCH") != "" {
		rounds, length, loads = 5, 2*time.Second, speedLoads
	}
	say := func(table string, l speedLoad, a, b []float64) {
		slices.Sort(a)
		slices.Sort(b)
		t.Logf("%-12s %-22s ashlar %8.0f/s  qemu-nbd %8.0f/s  %.2f x", table, l.name, a[len(a)/2], b[len(b)/2], a[len(a)/2]/b[len(b)/2])
	}
	for _, encrypted := range []bool{false, true} {
		dir, table, creds := scratch(t), "direct", ""
		var server, client *tls.Config
		if encrypted {
			table, creds = "direct, TLS", dir
			server, client = certificates(t, dir)
		}
		ours, uri := realClient(t, dir, server, client), qemuTCP(t, dir, creds)
		plainURI, _, _ := strings.Cut(uri, "?")
		theirs, err := nbd.Dial(t.Context(), plainURI, nbd.ClientOptions{TLS: client})
		if err != nil {
			t.Fatal(err)
		}
		defer theirs.Close()
		for _, d := range []block.Device{ours, theirs} {
			for p, at := make([]byte, 1<<20), int64(0); at < 512<<20; at += 1 << 20 {
				p[0] = byte(at >> 20)
				if _, err := d.WriteAt(p, at); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, l := range loads {
			var a, b []float64
			for range rounds {
				a, b = append(a, rate(t, ours, l, length)), append(b, rate(t, theirs, l, length))
			}
			say(table, l, a, b)
		}
		if encrypted {
			continue // fio's NBD engine cannot be told where certificates are
		}
		guest := exported(t, dir, ours)
		for _, l := range loads {
			var a, b []float64
			for range rounds {
				a, b = append(a, fio(t, guest, l, "1")), append(b, fio(t, uri, l, "1"))
			}
			say("as a guest", l, a, b)
		}
	}
}

// BenchmarkRemote is the replica itself: no export, no engine.
func BenchmarkRemote(b *testing.B) {
	for _, encrypted := range []bool{false, true} {
		dir := scratch(b)
		var server, client *tls.Config
		if encrypted {
			server, client = certificates(b, dir)
		}
		r := realClient(b, dir, server, client)
		fill := make([]byte, 1<<20)
		for at := int64(0); at < 64<<20; at += 1 << 20 {
			if _, err := r.WriteAt(fill, at); err != nil {
				b.Fatal(err)
			}
		}
		for _, l := range []struct {
			name  string
			size  int64
			depth int
			write bool
		}{{"read4K/1", 4096, 1, false}, {"write4K/1", 4096, 1, true}, {"read4K/32", 4096, 32, false}, {"write4K/32", 4096, 32, true}, {"read1M/4", 1 << 20, 4, false}, {"write1M/4", 1 << 20, 4, true}} {
			b.Run(fmt.Sprintf("tls=%t/%s", encrypted, l.name), func(b *testing.B) {
				b.SetBytes(l.size)
				var wg sync.WaitGroup
				before := cpu()
				for d := range l.depth {
					wg.Go(func() {
						p := make([]byte, l.size)
						var err error
						for i := d; i < b.N && err == nil; i += l.depth {
							off := int64(uint64(i)*2654435761%uint64(64<<20)) / l.size * l.size
							if l.write {
								_, err = r.WriteAt(p, off)
							} else {
								_, err = r.ReadAt(p, off)
							}
						}
						if err != nil {
							b.Error(err)
						}
					})
				}
				wg.Wait()
				b.ReportMetric(float64((cpu()-before).Microseconds())/float64(b.N), "cpu-us/op")
			})
		}
	}
}

// cpu is what this process has used.
func cpu() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
