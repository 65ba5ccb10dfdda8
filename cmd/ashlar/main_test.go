package main

import (
	"context"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
	"ashlar/internal/catalog"
	"ashlar/internal/catalog/catalogtest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"ashlar": main})
}

// extra counts shutdowns.
type extra struct {
	api.Extra
	shutdowns atomic.Int32
}

func (e *extra) VolumeCounters(context.Context, func(string, map[string]uint64)) error { return nil }
func (e *extra) Shutdown(context.Context) error {
	e.shutdowns.Add(1)
	return nil
}

// TestScripts runs the commands as a person would, each script against a fresh node: the real API over a unix socket, with a stand-in for control and agent behind it.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			runDir := filepath.Join(env.WorkDir, "run")
			env.Setenv("ASHLAR_RUN_DIR", runDir)
			if err := os.MkdirAll(runDir, 0o755); err != nil {
				return err
			}
			mem, stop, err := fakeNode(runDir)
			if err == nil {
				env.Defer(stop)
				env.Values["records"] = mem
			}
			return err
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// waitfor IMAGE: until the node knows the image.
			"waitfor": func(ts *testscript.TestScript, _ bool, args []string) {
				c, err := client.New("unix://" + client.Socket(ts.Getenv("ASHLAR_RUN_DIR")))
				ts.Check(err)
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				for {
					_, err := c.Image(ctx, args[0])
					if api.CodeOf(err) != api.CodeNotFound {
						ts.Check(err)
						return
					}
				}
			},
			// cluster: the node n1 becomes one of three, of which n3 is down.
			"cluster": func(ts *testscript.TestScript, _ bool, _ []string) {
				ts.Check(threeNodes(ts.Value("records").(*catalog.Mem)))
			},
			// leads NODE: it plans for the cluster.
			"leads": func(ts *testscript.TestScript, _ bool, args []string) {
				_, _, err := catalog.Upsert(context.Background(), ts.Value("records").(*catalog.Mem), catalog.LeaderKey(), func(l *catalog.Leader) error {
					l.Node = args[0]
					return nil
				})
				ts.Check(err)
			},
			// breakdisk NODE DISK: the node says that it cannot use the disk.
			"breakdisk": func(ts *testscript.TestScript, _ bool, args []string) {
				_, _, err := catalog.Update(context.Background(), ts.Value("records").(*catalog.Mem), catalog.NodeKey(catalog.Observed, args[0]), func(o *catalog.NodeObserved) error {
					o.Disks[args[1]].Conditions[catalog.ConditionReady] = catalog.Condition{Status: catalog.ConditionFalse, Message: "input/output error"}
					return nil
				})
				ts.Check(err)
			},
			// exits CODE COMMAND…: the command must end with this exit code.
			"exits": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) < 2 {
					ts.Fatalf("usage: exits CODE COMMAND…")
				}
				err := ts.Exec(args[1], args[2:]...)
				code := "0"
				if e, ok := err.(interface{ ExitCode() int }); ok {
					code = strconv.Itoa(e.ExitCode())
				} else if err != nil {
					ts.Fatalf("%v", err)
				}
				if code != args[0] {
					ts.Fatalf("exit code %s, want %s", code, args[0])
				}
			},
		},
	})
}

// fakeNode serves the API on runDir/api.sock until stop is called.
func fakeNode(runDir string) (mem *catalog.Mem, stop func(), err error) {
	mem = catalog.NewMem()
	standIn := &catalogtest.StandIn{Catalog: mem, Node: "n1", RunDir: "/run/ashlar"}
	l, err := net.Listen("unix", client.Socket(runDir))
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	srv := &http.Server{Handler: api.New(api.Config{Catalog: mem, Node: "n1", Version: "v0.1.0", Extra: &extra{}, OperationTimeout: 5 * time.Second})}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(l) })
	wg.Go(func() { _ = standIn.Run(ctx) })
	c, err := client.New("unix://" + client.Socket(runDir))
	if err == nil {
		for limit := time.Now().Add(time.Minute); ; <-time.After(time.Millisecond) {
			if err = c.Ready(ctx); err == nil || time.Now().After(limit) {
				break
			}
		}
	}
	return mem, func() {
		cancel()
		srv.Close()
		wg.Wait()
		mem.Close()
	}, err
}

// threeNodes makes the records of a cluster: n1 and n2 live, n3 does not.
func threeNodes(mem *catalog.Mem) error {
	ctx := context.Background()
	for i, name := range []string{"n1", "n2", "n3"} {
		_, _, err := catalog.Upsert(ctx, mem, catalog.NodeKey(catalog.Wanted, name), func(w *catalog.NodeWanted) error {
			w.Name, w.ID, w.Voter, w.AllowScheduling = name, "id-of-"+name, true, true
			if w.Disks == nil {
				w.Disks = map[string]catalog.DiskWanted{"default": {Path: "/srv/ashlar", AllowScheduling: true}}
			}
			return nil
		})
		if err != nil {
			return err
		}
		yes := catalog.Condition{Status: catalog.ConditionTrue}
		_, _, err = catalog.Upsert(ctx, mem, catalog.NodeKey(catalog.Observed, name), func(o *catalog.NodeObserved) error {
			o.Name, o.Address, o.Port, o.Member, o.Version, o.Ready = name, "192.0.2."+strconv.Itoa(i+1), 9510, "voter", "v0.1.0", true
			if o.Disks == nil {
				o.Disks = map[string]catalog.DiskObserved{"default": {DiskID: "disk-of-" + name, TotalBytes: 1 << 40, FreeBytes: 1 << 39,
					Conditions: map[string]catalog.Condition{catalog.ConditionReady: yes, catalog.ConditionSchedulable: yes}}}
			}
			return nil
		})
		if err != nil {
			return err
		}
		if name == "n3" {
			continue
		}
		if _, err := catalog.Write(ctx, mem, catalog.AliveKey(name), catalog.Alive{Node: name, Since: time.Now()}, 0); err != nil {
			return err
		}
	}
	return nil
}

// TestTable aligns columns whatever is in them, and paints on a terminal only.
func TestTable(t *testing.T) {
	var out strings.Builder
	a := newApp(&out, &out, func(string) string { return "" })
	rows := func() [][]string {
		return [][]string{{"NAME", ">SIZE", "STATE"}, {"ä", "1 GiB", "healthy"}, {"longer", "10 GiB", "-"}}
	}
	a.table(rows())
	want := "NAME      SIZE  STATE\nä        1 GiB  healthy\nlonger  10 GiB  -\n"
	if out.String() != want {
		t.Errorf("plain:\n%s\nwant:\n%s", out.String(), want)
	}
	out.Reset()
	a.terminal = true
	a.table(rows())
	if !strings.Contains(out.String(), "\x1b[32mhealthy\x1b[0m") || !strings.Contains(out.String(), "\x1b[1mNAME      SIZE  STATE\x1b[0m") {
		t.Errorf("painted: %q", out.String())
	}
}

// TestProgress prints a line for every ten per cent, or draws a bar on a terminal.
func TestProgress(t *testing.T) {
	var out strings.Builder
	a := newApp(&out, &out, func(string) string { return "" })
	p := a.progress("x")
	for _, n := range []int{0, 3, 9, 10, 15, 57, 99, 100, 120} {
		p.at(n, "s")
	}
	p.end()
	if want := "x: 0 % s\nx: 10 % s\nx: 57 % s\nx: 99 % s\nx: 100 % s\n"; out.String() != want {
		t.Errorf("lines: %q", out.String())
	}
	out.Reset()
	a.live = true
	p = a.progress("x")
	p.at(50, "s")
	p.end()
	if got := out.String(); !strings.Contains(got, "[###############---------------]  50 % s") || !strings.HasSuffix(got, "\n") {
		t.Errorf("bar: %q", got)
	}
}

// TestAgo says times for people.
func TestAgo(t *testing.T) {
	a := newApp(nil, nil, func(string) string { return "" })
	now := time.Date(2030, 1, 10, 12, 0, 0, 0, time.UTC)
	a.now = func() time.Time { return now }
	for d, want := range map[time.Duration]string{
		time.Second: "just now", 30 * time.Second: "30 s ago", 5 * time.Minute: "5 min ago", 3 * time.Hour: "3 h ago", 72 * time.Hour: "3 days ago", -time.Hour: "just now",
	} {
		if got := a.ago(now.Add(-d).Format(time.RFC3339)); got != want {
			t.Errorf("%v is %q, want %q", d, got, want)
		}
	}
	if a.ago("") != "" {
		t.Error("no time")
	}
}

// TestPaste writes QEMU's and libvirt's syntax with their own quoting.
func TestPaste(t *testing.T) {
	p, err := newPaste("db1", "nbd+unix:///db1?socket=/run/a,b%26c/db1.sock")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(p.QEMU[0], "server.path=/run/a,,b&c/db1.sock,export=db1,reconnect-delay=30") || !strings.Contains(p.Libvirt, "socket='/run/a,b&amp;c/db1.sock'") {
		t.Errorf("%+v", p)
	}
	long := strings.Repeat("x", 63)
	if a, b := qemuNode(long), qemuNode(long[:62]); len(a) > 31 || a == b || len(qemuNode("db1")) > 31 {
		t.Errorf("%s, %s", a, b)
	}
}
