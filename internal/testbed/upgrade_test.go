//go:build integration

package testbed_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	dataclient "ashlar/internal/dataplane/client"
	"ashlar/internal/testbed"
)

// The versions of the builds that take turns with the program under test.
const (
	secondVersion = "1.1.0-second"
	foreignBuild  = "9.0.0-foreign"
)

// build makes the program with another version, and perhaps another window of hand-over versions; once.
func build(t *testing.T, version, window string) string {
	t.Helper()
	out := filepath.Join(buildDir, version)
	if _, err := os.Stat(out); err == nil {
		return out
	}
	flags := "-X main.version=" + version
	if window != "" {
		flags += " -X ashlar/internal/dataplane.handoverWindow=" + window
	}
	cmd := exec.Command("go", "build", "-ldflags", flags, "-o", out, "ashlar/cmd/ashlar")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", version, err, text)
	}
	return out
}

// programVersion is that of the program under test.
func programVersion(t *testing.T) string {
	t.Helper()
	text, err := exec.Command(program, "version", "-o", "json").Output()
	var v struct{ Version string }
	if err == nil {
		err = json.Unmarshal(text, &v)
	}
	if err != nil {
		t.Fatal(err)
	}
	return v.Version
}

// install puts a build where the node's program is, as a package manager does: in one step.
func (b *bed) install(build string) {
	b.Helper()
	from, err := os.Open(build)
	if err != nil {
		b.Fatal(err)
	}
	defer from.Close()
	to, err := os.OpenFile(b.p.Bin+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := io.Copy(to, from); err != nil {
		b.Fatal(err)
	}
	if err := to.Close(); err != nil {
		b.Fatal(err)
	}
	if err := os.Rename(b.p.Bin+".new", b.p.Bin); err != nil {
		b.Fatal(err)
	}
}

// newInstalled starts a node of a build that is installed in a place of its own.
func newInstalled(t *testing.T, build string) *bed {
	t.Helper()
	dir := scratch(t)
	b := &bed{T: t, ctx: t.Context(), dir: dir, p: &testbed.Process{Bin: filepath.Join(dir, "ashlar")}}
	b.install(build)
	return startBin(t, dir, b.p.Bin)
}

// dataState asks the data process of a version.
func (b *bed) dataState(version string) dataclient.State {
	b.Helper()
	st, err := dataclient.New(dataclient.DataSocket(b.p.RunDir, version)).State(b.ctx)
	if err != nil {
		b.Fatal(err)
	}
	return st
}

// dataPID is the process that has the run directory.
func (b *bed) dataPID() int {
	text, err := os.ReadFile(filepath.Join(b.p.RunDir, "data", "run.lock"))
	if err != nil {
		return 0
	}
	_, pid, _ := strings.Cut(string(text), "pid ")
	n, _ := strconv.Atoi(strings.TrimSpace(pid))
	return n
}

// upgrade is what `ashlar upgrade -o json` prints.
type upgrade struct {
	From, To string
	PID      int
	Volumes  []struct {
		Volume      string
		PauseMicros int64
		Conns       int
	}
}

// steady is a guest with one connection that must never break: it writes and reads back what it wrote.
type steady struct {
	c     *client
	name  string
	ops   atomic.Int64
	worst atomic.Int64 // nanoseconds
	err   error
}

func (b *bed) steadyGuests(names []string) (guests []*steady, stop func()) {
	b.Helper()
	var wg sync.WaitGroup
	var done atomic.Bool
	for _, name := range names {
		g := &steady{c: b.dial(name), name: name}
		guests = append(guests, g)
		wg.Go(func() {
			for n := int64(0); g.err == nil && !done.Load(); n++ {
				g.err = g.once(n)
				<-time.After(2 * time.Millisecond) // a guest that is not the whole load
			}
		})
	}
	return guests, func() {
		b.Helper()
		done.Store(true)
		wg.Wait()
		for _, g := range guests {
			if g.err != nil {
				b.Errorf("the guest of %s, after %d operations: %v", g.name, g.ops.Load(), g.err)
			}
		}
	}
}

// once writes a page that says which it is, and reads the one before.
func (g *steady) once(n int64) error {
	const pages = 64
	p := func(n int64) []byte { return bytes.Repeat([]byte(fmt.Sprintf("%-16d", n)), 256) }
	start := time.Now()
	if err := g.c.write(4096*(n%pages), p(n)); err != nil {
		return err
	}
	if n > 0 {
		got := make([]byte, 4096)
		if err := g.c.read(4096*((n-1)%pages), got); err != nil {
			return err
		}
		if !bytes.Equal(got, p(n-1)) {
			return fmt.Errorf("page %d reads as %.20q", n-1, got)
		}
	}
	g.ops.Add(2)
	g.worst.Store(max(g.worst.Load(), int64(time.Since(start))))
	return nil
}

// TestUpgradeData replaces the data process five times, back and forth between two builds, under fio verify on a plain NBD connection (fio's engine never connects again: one broken
// connection ends it) and under nineteen other guests. serve stays the first build all the time.
func TestUpgradeData(t *testing.T) {
	first, second := program, build(t, secondVersion, "")
	b := newInstalled(t, first)
	names := []string{"fio"}
	b.cli("volume", "create", "fio", "--size", "256Mi")
	for i := range 19 {
		names = append(names, fmt.Sprintf("v%d", i))
		b.cli("volume", "create", names[i+1], "--size", "16Mi")
	}
	b.attach(names...)
	b.cli("snapshot", "create", "v0", "before")
	f := b.startFio(b.uri("fio"), 96*mib, 600)
	guests, stop := b.steadyGuests(names[1:])
	b.until(20*time.Second, "fio runs", func() bool { return b.writes("fio") > 200 })
	var alone, among []time.Duration
	firstVersion := programVersion(t)
	version, pid := firstVersion, b.dataPID()
	for round := range 5 {
		f.running()
		bin, next := second, secondVersion
		if round%2 == 1 {
			bin, next = first, firstVersion
		}
		b.install(bin)
		before := guests[0].ops.Load()
		var up upgrade
		b.json(&up, "upgrade")
		if up.From != version || up.To != next || len(up.Volumes) != len(names) || up.PID == pid || up.PID != b.dataPID() {
			t.Fatalf("round %d: %+v; the data process was %s, pid %d", round, up, version, pid)
		}
		version, pid = next, up.PID
		for _, v := range up.Volumes {
			pause := time.Duration(v.PauseMicros) * time.Microsecond
			among = append(among, pause)
			if v.Volume == "fio" {
				alone = append(alone, pause)
			}
			if v.Conns != 1 {
				t.Errorf("round %d: %s passed with %d connections", round, v.Volume, v.Conns)
			}
		}
		st := b.dataState(version)
		for _, v := range st.Volumes {
			if v.State != "open" || v.Clients != 1 || v.Epoch != 1 || v.Session != uint64(round+2) {
				t.Errorf("round %d: %s is %s with %d connections, epoch %d, session %d", round, v.Volume, v.State, v.Clients, v.Epoch, v.Session)
			}
		}
		b.until(20*time.Second, "guests go on", func() bool { return guests[0].ops.Load() > before+20 })
		// serve, of the first build, works with either.
		b.until(20*time.Second, "serve speaks to the new one", func() bool {
			_, err := b.p.Text(b.ctx, "snapshot", "create", "v0", fmt.Sprintf("s%d", round))
			return err == nil
		})
	}
	ops, worst := f.wait()
	stop()
	slices.Sort(among)
	t.Logf("fio verified %d operations on one connection over 5 hand-overs; its slowest took %v; its volume paused for %v; %d pauses of 20 volumes: median %v, longest %v",
		ops, worst.Round(time.Millisecond), alone, len(among), among[len(among)/2], among[len(among)-1])
	if p := among[len(among)/2]; p > 100*time.Millisecond {
		t.Errorf("half of the pauses are longer than %v", p)
	}
	// What runs is what any data process is: killed, it comes back, from the build that is installed.
	b.kill("data")
	b.dial("v3")
	b.until(10*time.Second, "v0 is healthy again", func() bool { return b.volume("v0").Robustness == "healthy" })
	b.clean(names...)
}

// TestUpgradeDataRefused: a build of another age, the same build, and one that cannot run are refused, with words; guests do not notice.
func TestUpgradeDataRefused(t *testing.T) {
	first, firstVersion, foreign := program, programVersion(t), build(t, foreignBuild, "7-9")
	b := newInstalled(t, first)
	b.cli("volume", "create", "v", "--size", "16Mi")
	b.attach("v")
	guests, stop := b.steadyGuests([]string{"v"})
	pid := b.dataPID()
	if out := b.cli("upgrade"); !strings.Contains(out, "runs already") {
		t.Errorf("the same version: %s", out)
	}
	b.install(foreign)
	b.refused(exitConflict, []string{firstVersion, "1-1", foreignBuild, "7-9", "hand-over"}, "upgrade")
	cli := b.p.Bin
	if err := os.WriteFile(b.path("broken"), []byte("not a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	b.install(b.path("broken"))
	b.p.Bin = foreign // whoever asks, what is installed counts
	b.refused(exitFailed, []string{"cannot be started"}, "upgrade")
	b.install2(cli, first)
	b.p.Bin = cli
	before := guests[0].ops.Load()
	b.until(10*time.Second, "the guest goes on", func() bool { return guests[0].ops.Load() > before+20 })
	stop()
	b.sameData(pid)
	if st := b.dataState(firstVersion); st.Volumes[0].Session != 1 || st.Volumes[0].Clients != 1 {
		t.Errorf("after refusals: %+v", st.Volumes[0])
	}
	b.clean("v")
}

// install2 is install to another place than the program that is driven.
func (b *bed) install2(place, build string) {
	was := b.p.Bin
	b.p.Bin = place
	defer func() { b.p.Bin = was }()
	b.install(build)
}

// TestUpgradeDataKilled kills one of the two data processes, or both, in the middle of a hand-over: every volume comes back with what was written, and nobody starts a third process beside two.
func TestUpgradeDataKilled(t *testing.T) {
	first, second := program, build(t, secondVersion, "")
	firstVersion := programVersion(t)
	b := newInstalled(t, first)
	var names []string
	for i := range 12 {
		names = append(names, fmt.Sprintf("v%d", i))
		b.cli("volume", "create", names[i], "--size", "16Mi")
	}
	b.attach(names...)
	for i, name := range names {
		c := b.dial(name)
		if err := c.write(0, bytes.Repeat([]byte{byte(i + 1)}, 4096)); err != nil {
			t.Fatal(err)
		}
	}
	b.install(second)
	for round, victim := range []string{"new", "old", "both", "new", "old"} {
		old := b.dataPID()
		said := b.upgradeUntil(fmt.Sprintf("volume %s:", names[2+round%3]), func() {
			for _, pid := range dataPIDs(b) {
				if victim == "both" || (pid == old) == (victim == "old") {
					syscall.Kill(pid, syscall.SIGKILL)
				}
			}
		})
		start := time.Now()
		for i, name := range names {
			got := make([]byte, 4096)
			b.until(20*time.Second, name+" is back", func() bool {
				c, err := dial(b.ctx, b.socket(name), name, 5*time.Second)
				if err != nil {
					return false
				}
				defer c.close()
				return c.read(0, got) == nil
			})
			if got[0] != byte(i+1) || got[4095] != byte(i+1) {
				t.Errorf("round %d: %s reads as %d", round, name, got[0])
			}
		}
		took := time.Since(start)
		b.until(20*time.Second, "one data process", func() bool { return len(dataPIDs(b)) == 1 })
		t.Logf("killed the %s one: everything is served again after %v: %s", victim, took.Round(time.Millisecond), said)
		if took > comeBack {
			t.Errorf("round %d: it took %v", round, took)
		}
		// Which build runs now depends on who died. The next round goes to the other one. Volumes are served before the
		// process that took them over answers requests, so ask until one does.
		b.until(20*time.Second, "a data process that answers", func() bool {
			for build, other := range map[string]string{secondVersion: first, firstVersion: second} {
				st, err := dataclient.New(dataclient.DataSocket(b.p.RunDir, build)).Hello(b.ctx)
				if err == nil && st.Version == build {
					b.install(other)
					return true
				}
			}
			return false
		})
	}
	b.clean(names...)
}

// upgradeUntil runs `ashlar upgrade` and calls do when it says a word; it returns the last line that it said.
func (b *bed) upgradeUntil(word string, do func()) string {
	b.Helper()
	cmd := exec.CommandContext(b.ctx, b.p.Bin, "--run-dir", b.p.RunDir, "upgrade", "--timeout", "20s")
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.Fatal(err)
	}
	last, called := "", false
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "ashlar: ") || !called {
			last = lines.Text()
		}
		if !called && strings.Contains(lines.Text(), word) {
			do()
			called = true
		}
	}
	cmd.Wait() // whether it failed depends on when the process died
	if !called {
		b.Fatalf("it did not say %q: %s", word, last)
	}
	return last
}

// dataPIDs are the data processes of this node.
func dataPIDs(b *bed) (pids []int) {
	for _, u := range users(b.dir) {
		fields := strings.Fields(u)
		if len(fields) > 2 && fields[2] == "data" {
			pid, _ := strconv.Atoi(fields[0])
			pids = append(pids, pid)
		}
	}
	return pids
}
