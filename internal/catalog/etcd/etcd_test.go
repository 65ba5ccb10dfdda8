package etcd_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"ashlar/internal/catalog"
	"ashlar/internal/catalog/catalogtest"
	"ashlar/internal/catalog/etcd"
)

func open(t *testing.T, dir string) *etcd.Store {
	t.Helper()
	s, err := tryOpen(t, etcd.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func tryOpen(t *testing.T, o etcd.Options) (*etcd.Store, error) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	o.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	return etcd.Open(ctx, o)
}

func put(t *testing.T, s *etcd.Store, name string) {
	t.Helper()
	if _, err := s.Put(t.Context(), catalog.VolumeKey(catalog.Wanted, name), []byte(`{}`), 0); err != nil {
		t.Fatal(err)
	}
}

func names(t *testing.T, s *etcd.Store) string {
	t.Helper()
	es, _, err := s.List(t.Context(), catalog.KindVolume)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range es {
		out = append(out, e.Key.Name)
	}
	return strings.Join(out, " ")
}

func subject(s *etcd.Store) catalogtest.Subject {
	return catalogtest.Subject{Catalog: s, Compact: func(t *testing.T) {
		if err := s.Compact(t.Context()); err != nil {
			t.Fatal(err)
		}
	}}
}

// TestSuite runs the contract on the embedded member.
func TestSuite(t *testing.T) {
	t.Parallel()
	catalogtest.Run(t, func(t *testing.T) catalogtest.Subject { return subject(open(t, t.TempDir())) })
}

// TestSuiteEndpoints runs the contract on an etcd that exists already, over the network.
func TestSuiteEndpoints(t *testing.T) {
	t.Parallel()
	cfg := embed.NewConfig()
	cfg.Dir = t.TempDir()
	addr := url.URL{Scheme: "http", Host: freeAddr(t)}
	cfg.ListenPeerUrls, cfg.ListenClientUrls, cfg.AdvertiseClientUrls = nil, []url.URL{addr}, []url.URL{addr}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	<-e.Server.ReadyNotify()
	catalogtest.Run(t, func(t *testing.T) catalogtest.Subject {
		s, err := tryOpen(t, etcd.Options{Endpoints: []string{addr.String()}})
		if err != nil {
			t.Fatal(err)
		}
		es, _, err := s.List(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range es {
			if err := s.Delete(t.Context(), e.Key, e.Rev); err != nil {
				t.Fatal(err)
			}
		}
		return subject(s)
	})
}

func TestReopen(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	put(t, s, "a")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	if got := names(t, s); got != "a" {
		t.Fatalf("records %q after reopening", got)
	}
	put(t, s, "b")
}

// TestInUse: the second opener is told at once, also when the first is some other program's etcd.
func TestInUse(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	start := time.Now()
	if _, err := tryOpen(t, etcd.Options{Dir: dir}); !errors.Is(err, etcd.ErrInUse) {
		t.Fatalf("second open: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "ashlar.lock")); err != nil {
		t.Fatal(err)
	}
	if _, err := tryOpen(t, etcd.Options{Dir: dir}); !errors.Is(err, etcd.ErrInUse) {
		t.Fatalf("second open without our lock: %v", err)
	}
	if d := time.Since(start); d > 20*time.Second { // tryOpen would wait for a minute
		t.Fatalf("it took %v to say so", d)
	}
	put(t, s, "a")
}

// TestCrash: what was acknowledged is in the files at that moment.
func TestCrash(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	for i := range 20 {
		put(t, s, fmt.Sprintf("v%02d", i))
	}
	clone := t.TempDir()
	if err := os.CopyFS(clone, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if got := len(strings.Fields(names(t, open(t, clone)))); got != 20 {
		t.Fatalf("%d of 20 acknowledged records are in the files", got)
	}
}

// TestDamaged: files that etcd refuses are an error, not the end of the process.
func TestDamaged(t *testing.T) {
	for _, c := range []struct{ name, glob string }{{"log", "member/wal/*-*.wal"}, {"database", "member/snap/db"}} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			put(t, s, "a")
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			files, err := filepath.Glob(filepath.Join(dir, c.glob))
			if err != nil || len(files) == 0 {
				t.Fatalf("no %s: %v", c.glob, err)
			}
			for _, f := range files {
				if err := os.WriteFile(f, bytes.Repeat([]byte{0xA5}, 64<<10), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			_, err = tryOpen(t, etcd.Options{Dir: dir})
			if !errors.Is(err, etcd.ErrDamaged) {
				t.Fatalf("open: %v", err)
			}
			t.Log(err)
		})
	}
}

// TestListensNowhere: the embedded member has no listening socket.
func TestListensNowhere(t *testing.T) {
	before := listening(t)
	open(t, t.TempDir())
	if after := listening(t); after != before {
		t.Fatalf("listening sockets went from %d to %d", before, after)
	}
}

// listening counts the listening sockets of this process.
func listening(t *testing.T) int {
	t.Helper()
	mine := map[string]bool{}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if l, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil {
			mine[strings.TrimSuffix(strings.TrimPrefix(l, "socket:["), "]")] = true
		}
	}
	n := 0
	for name, isListening := range map[string]func([]string) (string, bool){
		"tcp":  func(f []string) (string, bool) { return f[9], f[3] == "0A" },
		"tcp6": func(f []string) (string, bool) { return f[9], f[3] == "0A" },
		"unix": func(f []string) (string, bool) { return f[6], f[3] == "00010000" },
	} {
		f, err := os.Open("/proc/self/net/" + name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		sc := bufio.NewScanner(f)
		for sc.Scan() {
			if fields := strings.Fields(sc.Text()); len(fields) > 6 && fields[0] != "sl" && fields[0] != "Num" {
				if inode, ok := isListening(fields); ok && mine[inode] {
					n++
				}
			}
		}
		f.Close()
	}
	return n
}

func TestOptions(t *testing.T) {
	for _, o := range []etcd.Options{{}, {Dir: "x", Endpoints: []string{"y"}}} {
		if _, err := tryOpen(t, o); !errors.Is(err, etcd.ErrOptions) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// TestNobodyThere: an etcd that does not answer is an error when the caller's patience ends.
func TestNobodyThere(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := etcd.Open(ctx, etcd.Options{Endpoints: []string{"http://127.0.0.1:1"}}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("open: %v", err)
	}
}
