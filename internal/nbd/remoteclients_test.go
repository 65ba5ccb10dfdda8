//go:build integration

package nbd

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
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
