//go:build integration

package nbd

import (
	"bytes"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/block/blocktest"
)

// dialTo starts a server program, which has to make the socket that its arguments name, and connects to it.
func dialTo(t testing.TB, socket, name string, args ...string) *Client {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	var c *Client
	until(t, name+" to serve", func() bool {
		var err error
		c, err = Dial(t.Context(), "nbd+unix:///?socket="+socket, ClientOptions{})
		if err != nil && !errors.Is(err, os.ErrNotExist) && cmd.ProcessState != nil {
			t.Fatal(err)
		}
		return err == nil
	})
	t.Cleanup(func() {
		if err := c.Close(); err != nil && !errors.Is(err, block.ErrClosed) {
			t.Error(err)
		}
	})
	return c
}

// TestClientOfOtherServers runs the suite of block.Device against the servers that people have.
func TestClientOfOtherServers(t *testing.T) {
	for name, start := range map[string]func(t testing.TB, n int64) (*Client, int64){
		"nbdkit": func(t testing.TB, n int64) (*Client, int64) {
			s := filepath.Join(t.TempDir(), "s")
			return dialTo(t, s, "nbdkit", "-f", "-U", s, "memory", strconv.FormatInt(n, 10)), 1
		},
		"nbdkit without structured replies": func(t testing.TB, n int64) (*Client, int64) {
			s := filepath.Join(t.TempDir(), "s")
			return dialTo(t, s, "nbdkit", "-f", "--no-sr", "-U", s, "memory", strconv.FormatInt(n, 10)), 1
		},
		"nbdkit with blocks": func(t testing.TB, n int64) (*Client, int64) {
			s := filepath.Join(t.TempDir(), "s")
			return dialTo(t, s, "nbdkit", "-f", "-U", s, "--filter=blocksize-policy", "memory", strconv.FormatInt(n, 10),
				"blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"), block.UnitBytes
		},
		"qemu-nbd": func(t testing.TB, n int64) (*Client, int64) {
			s, disk := filepath.Join(t.TempDir(), "s"), filepath.Join(t.TempDir(), "disk")
			if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, n)); err != nil {
				t.Fatal(err)
			}
			return dialTo(t, s, "qemu-nbd", "-t", "--discard=unmap", "--detect-zeroes=off", "-f", "raw", "-x", "", "-k", s, disk), 1
		},
	} {
		t.Run(name, func(t *testing.T) {
			align := int64(1)
			if name == "nbdkit with blocks" {
				align = block.UnitBytes
			}
			blocktest.Run(t, blocktest.Config{
				AlignBytes: align, Steps: 150,
				New: func(t testing.TB, n int64) block.Device {
					c, want := start(t, n)
					if c.AlignBytes() != want {
						t.Errorf("AlignBytes() = %d, want %d", c.AlignBytes(), want)
					}
					return c
				},
			})
		})
	}
}

// TestTLSClients: the programs that people have reach a volume over TLS with certificates, and not without or with wrong ones.
func TestTLSClients(t *testing.T) {
	a, stranger := newAuthority(t), newAuthority(t)
	dev, model := sparseDisk(t)
	s, err := NewServer(Config{Exports: Single{Name: "vol", Device: dev}, TLS: a.server(a.good())})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), <-served); err != nil {
			t.Error(err)
		}
	})
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	good, bad := a.export("client", a.good()), stranger.export("client", stranger.good())
	qemu := func(dir string) []string {
		return []string{"--object", "tls-creds-x509,id=t,dir=" + dir + ",endpoint=client", "--image-opts",
			"driver=nbd,host=127.0.0.1,port=" + port + ",export=vol,tls-creds=t"}
	}
	uri := "nbds://localhost:" + port + "/vol?tls-certificates="
	run(t, "qemu-img", append([]string{"info"}, qemu(good)...)...)
	if got := run(t, "nbdinfo", "--size", uri+good); strings.TrimSpace(got) != strconv.Itoa(diskBytes) {
		t.Errorf("size %s", got)
	}
	file := filepath.Join(t.TempDir(), "out")
	run(t, "nbdcopy", uri+good, file)
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, model) {
		t.Errorf("the copy over TLS differs: %v", err)
	}
	before := s.Stats()["vol"]
	for _, cmd := range []*exec.Cmd{
		exec.Command("qemu-img", append([]string{"info"}, qemu(bad)...)...),
		exec.Command("nbdinfo", uri+bad), exec.Command("nbdinfo", "nbd://localhost:"+port+"/vol"),
	} {
		if out, err := cmd.CombinedOutput(); err == nil {
			t.Errorf("%v works: %s", cmd.Args, out)
		} else {
			t.Logf("%v: %s", cmd.Args[0], out)
		}
	}
	if after := s.Stats()["vol"]; after.Accepted != before.Accepted {
		t.Errorf("a stranger was served: %+v", after)
	}
}

// TestClientOfOthersOverTLS: our client and nbdkit's server.
func TestClientOfOthersOverTLS(t *testing.T) {
	a := newAuthority(t)
	socket := filepath.Join(t.TempDir(), "s")
	cmd := exec.Command("nbdkit", "-f", "-U", socket, "--tls=require", "--tls-verify-peer", "--tls-certificates="+a.export("server", a.good()), "memory", "1M")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	uri := "nbds+unix:///?socket=" + socket
	var c *Client
	until(t, "nbdkit to serve", func() bool {
		var err error
		c, err = Dial(t.Context(), uri, ClientOptions{TLS: a.client(a.good())})
		return err == nil
	})
	if _, err := c.WriteAt([]byte("over TLS"), 5000); err != nil {
		t.Error(err)
	}
	if err := errors.Join(c.Flush(), c.Close()); err != nil {
		t.Error(err)
	}
	byURI, err := Dial(t.Context(), uri+"&tls-certificates="+a.export("client", a.good()), ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 8)
	if _, err := byURI.ReadAt(got, 5000); err != nil || string(got) != "over TLS" {
		t.Errorf("certificates of the URI: %q, %v", got, err)
	}
	if err := byURI.Close(); err != nil {
		t.Error(err)
	}
	for name, o := range map[string]ClientOptions{"no certificate": {TLS: a.client()}, "another authority": {TLS: newAuthority(t).client(a.good())}} {
		if _, err := Dial(t.Context(), uri, o); !errors.Is(err, ErrTLS) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Dial(t.Context(), "nbd+unix:///?socket="+socket, ClientOptions{}); !errors.Is(err, ErrTLS) {
		t.Errorf("without TLS: %v", err)
	}
}
