package node

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
)

// TestLock: neither the data directory nor the run directory of a node can be a second one's, and what was refused leaves nothing locked.
func TestLock(t *testing.T) {
	data, run := t.TempDir(), t.TempDir()
	first := &Node{cfg: Config{DataDir: data, RunDir: run}}
	if err := first.lock(); err != nil {
		t.Fatal(err)
	}
	undo := func(n *Node) {
		for _, f := range n.undo {
			if err := f(); err != nil {
				t.Error(err)
			}
		}
		n.undo = nil
	}
	for _, cfg := range []Config{{DataDir: data, RunDir: t.TempDir()}, {DataDir: t.TempDir(), RunDir: run}} {
		second := &Node{cfg: cfg}
		if err := second.lock(); !errors.Is(err, ErrInUse) {
			t.Errorf("second node on %s and %s: %v, want ErrInUse", cfg.DataDir, cfg.RunDir, err)
		}
		undo(second)
	}
	undo(first)
	if err := first.lock(); err != nil {
		t.Errorf("after the first one ended: %v", err)
	}
	undo(first)
}

func TestCheck(t *testing.T) {
	good := func() Config {
		return Config{DataDir: "/d", RunDir: "/r", Name: "n1", Version: "v1", Listen: "127.0.0.1:0"}
	}
	if cfg := good(); cfg.check() != nil {
		t.Error(cfg.check())
	}
	for what, spoil := range map[string]func(*Config){
		"relative data directory": func(c *Config) { c.DataDir = "d" },
		"relative run directory":  func(c *Config) { c.RunDir = "r" },
		"long run directory":      func(c *Config) { c.RunDir = filepath.Join("/", strings.Repeat("r", 100)) },
		"no name":                 func(c *Config) { c.Name = "" },
		"no port":                 func(c *Config) { c.Listen = "127.0.0.1" },
		"port too large":          func(c *Config) { c.Listen = "127.0.0.1:99999" },
	} {
		cfg := good()
		spoil(&cfg)
		if err := cfg.check(); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v, want ErrConfig", what, err)
		}
	}
}

// TestFullAddress: the port that a node has unless another is named, also of an IPv6 address.
func TestFullAddress(t *testing.T) {
	for address, want := range map[string]string{
		"192.0.2.1": "192.0.2.1:9510", "192.0.2.1:77": "192.0.2.1:77", "kvm1.example": "kvm1.example:9510", "2001:db8::1": "[2001:db8::1]:9510", "[2001:db8::1]": "[2001:db8::1]:9510",
		"[2001:db8::1]:77": "[2001:db8::1]:77", "what?": "what?",
	} {
		if got := FullAddress(address); got != want {
			t.Errorf("%q: %q, want %q", address, got, want)
		}
	}
}
