package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
)

// TestProfiled: profiles are on a socket that only this user can open, while the process runs, if the environment says so; a socket that cannot be made does not keep the process
// from running.
func TestProfiled(t *testing.T) {
	dir, err := os.MkdirTemp("", "a") // short: a socket lies in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "pprof-data.sock")
	env := map[string]string{}
	var said bytes.Buffer
	a := newApp(&said, &said, func(name string) string { return env[name] })
	a.runDir = dir
	errRun := errors.New("how it ended")
	run := func(look func()) {
		t.Helper()
		ran := false
		err := a.profiled(t.Context(), "data", func() error { ran = true; look(); return errRun })
		if !ran || !errors.Is(err, errRun) {
			t.Errorf("ran %v: %v", ran, err)
		}
	}
	run(func() {
		if _, err := os.Stat(socket); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a socket that nobody asked for: %v", err)
		}
	})
	env[pprofVariable] = "1"
	run(func() {
		info, err := os.Stat(socket)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("the socket: %v, %v", info, err)
		}
		c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}
		for path, want := range map[string]int{"heap?debug=1": 200, "goroutine?debug=1": 200, "cmdline": 200, "nothing": 404} {
			res, err := c.Get("http://ashlar/debug/pprof/" + path)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if res.StatusCode != want {
				t.Errorf("%s: status %d", path, res.StatusCode)
			}
		}
	})
	a.runDir = filepath.Join(dir, string(bytes.Repeat([]byte("x"), 200)))
	run(func() {})
	if said.Len() == 0 {
		t.Error("nothing was said about profiles that cannot be had")
	}
}
