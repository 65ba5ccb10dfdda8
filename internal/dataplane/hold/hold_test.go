package hold

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain lets the test binary be the holder and the data process too, by its first argument.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 {
		cfg := Config{RunDir: os.Args[2], HoldArgs: []string{"hold", os.Args[2], os.Args[3]}, DataArgs: []string{os.Args[3], os.Args[2], os.Args[3]}}
		switch os.Args[1] {
		case "hold":
			os.Exit(exit(holdMain(cfg, os.Args[len(os.Args)-1] == DetachFlag)))
		case "data":
			os.Exit(exit(dataMain(cfg)))
		case "data-that-dies":
			os.Exit(3)
		}
	}
	os.Exit(m.Run())
}

func exit(err error) int {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func holdMain(cfg Config, detach bool) error {
	if detach {
		return Detach(context.Background(), cfg)
	}
	return Run(context.Background(), cfg)
}

// dataMain serves one socket, whose listener the holder keeps: it says its pid to whoever connects.
func dataMain(cfg Config) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	lock, err := LockData(cfg.RunDir, "1")
	if err != nil {
		return err
	}
	defer lock.Close()
	k, err := Keep(ctx, cfg)
	if err != nil {
		return err
	}
	defer k.Close()
	f, err := k.Get(ctx, "greeter")
	if errors.Is(err, ErrNotHeld) {
		f, err = newListener(filepath.Join(cfg.RunDir, "greeter.sock"))
		if err == nil {
			err = k.Put(ctx, "greeter", f)
		}
	}
	if err != nil {
		return err
	}
	ln, err := net.FileListener(f)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { ln.Close() })
	for {
		c, err := ln.Accept()
		if err != nil {
			return nil
		}
		fmt.Fprintf(c, "%d\n", os.Getpid())
		c.Close()
	}
}

func newListener(path string) (*os.File, error) {
	os.Remove(path)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	ln.SetUnlinkOnClose(false)
	return ln.File()
}

// eventually polls until ok, at most a minute.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("waited in vain: %s", what)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// newRun returns a Config in a fresh run directory whose processes end with the test.
func newRun(t *testing.T, data string) Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "ashlar-hold")
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := Config{RunDir: dir, HoldArgs: []string{"hold", dir, data}, DataArgs: []string{data, dir, data}}.check()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if c, err := Dial(ctx, cfg); err == nil {
			if err := c.Stop(ctx); err != nil {
				t.Errorf("stop: %v", err)
			}
			c.Close()
		}
		if pid := lockPID(t, dataLock(dir)); pid != 0 {
			syscall.Kill(pid, syscall.SIGKILL)
			eventually(t, "data process ends", func() bool { alive, _, _ := dataAlive(dir); return !alive })
		}
		if t.Failed() {
			for _, p := range []string{cfg.DataLog(), cfg.HoldLog()} {
				text, _ := os.ReadFile(p)
				t.Logf("%s:\n%s", p, text)
			}
		}
		os.RemoveAll(dir)
	})
	return cfg
}

// lockPID reads who holds a lock file; 0 if nobody does.
func lockPID(t *testing.T, path string) int {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer f.Close()
	if flock(f, unix.LOCK_SH|unix.LOCK_NB) == nil {
		return 0
	}
	text, _ := os.ReadFile(path)
	_, after, _ := strings.Cut(string(text), "pid ")
	pid, _ := strconv.Atoi(strings.TrimSpace(after))
	return pid
}

// greeting asks the data process for its pid; the connection waits in the backlog while there is none.
func greeting(t *testing.T, cfg Config) (pid int, ok bool) {
	t.Helper()
	c, err := net.Dial("unix", filepath.Join(cfg.RunDir, "greeter.sock"))
	if err != nil {
		return 0, false
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return 0, false
	}
	pid, err = strconv.Atoi(strings.TrimSpace(line))
	return pid, err == nil
}

func dial(t *testing.T, cfg Config) *Conn {
	t.Helper()
	c, err := Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// runHere runs a holder inside the test.
func runHere(t *testing.T, cfg Config) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("holder: %v", err)
		}
	})
	eventually(t, "holder answers", func() bool {
		c, err := Dial(t.Context(), cfg)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

func memfile(t *testing.T, content string) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("m", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "m")
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString(content); err != nil {
		t.Fatal(err)
	}
	return f
}

func contentOf(t *testing.T, f *os.File) string {
	t.Helper()
	defer f.Close()
	buf := make([]byte, 100)
	n, _ := f.ReadAt(buf, 0)
	return string(buf[:n])
}

func TestDescriptors(t *testing.T) {
	cfg := newRun(t, "data-that-dies")
	runHere(t, cfg)
	c, ctx := dial(t, cfg), t.Context()
	if _, err := c.Get(ctx, "a"); !errors.Is(err, ErrNotHeld) {
		t.Errorf("get of nothing: %v, want ErrNotHeld", err)
	}
	for name, content := range map[string]string{"a": "first", "b/c:1": "other", "a ": ""} {
		err := c.Put(ctx, name, memfile(t, content))
		if content == "" {
			if !errors.Is(err, ErrRefused) {
				t.Errorf("put under a bad name: %v, want ErrRefused", err)
			}
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Put(ctx, "a", memfile(t, "second")); err != nil {
		t.Fatal(err)
	}
	other := dial(t, cfg)
	for range 2 { // what was got stays held
		f, err := other.Get(ctx, "a")
		if err != nil {
			t.Fatal(err)
		}
		if got := contentOf(t, f); got != "second" {
			t.Errorf("got %q, want the one put last", got)
		}
	}
	if names, err := other.List(ctx); err != nil || !reflect.DeepEqual(names, []string{"a", "b/c:1"}) {
		t.Errorf("list: %q, %v", names, err)
	}
	for range 2 {
		if err := other.Drop(ctx, "a"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Get(ctx, "a"); !errors.Is(err, ErrNotHeld) {
		t.Errorf("get of what was dropped: %v, want ErrNotHeld", err)
	}
	st, err := c.Status(ctx)
	if err != nil || st.PID != os.Getpid() || st.Held != 1 {
		t.Errorf("status %+v, %v", st, err)
	}
}

func TestListOfMany(t *testing.T) {
	cfg := newRun(t, "data-that-dies")
	runHere(t, cfg)
	c, f := dial(t, cfg), memfile(t, "x")
	var want []string
	for i := range 500 {
		name := fmt.Sprintf("%s%04d", strings.Repeat("n", maxName-4), i)
		want = append(want, name)
		if err := c.Put(t.Context(), name, f); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := c.List(t.Context()); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("list of %d names gave %d, %v", len(want), len(got), err)
	}
}

// TestDescriptorsDoNotLeak counts this process's descriptors, which include the holder's, around everything that passes some.
func TestDescriptorsDoNotLeak(t *testing.T) {
	cfg := newRun(t, "data-that-dies")
	runHere(t, cfg)
	c, f, ctx := dial(t, cfg), memfile(t, "x"), t.Context()
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, e := range entries {
			if to, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.Contains(to, "memfd:m") {
				n++
			}
		}
		return n
	}
	before := count()
	for range 20 {
		if err := c.Put(ctx, "a", f); err != nil {
			t.Fatal(err)
		}
		got, err := c.Get(ctx, "a")
		if err != nil {
			t.Fatal(err)
		}
		got.Close()
		if err := c.Put(ctx, "bad name", f); !errors.Is(err, ErrRefused) {
			t.Fatal(err)
		}
		if _, err := c.askText(ctx, verbStatus, int(f.Fd())); err != nil { // a descriptor nobody asked for
			t.Fatal(err)
		}
	}
	if err := c.Drop(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if after := count(); after != before {
		t.Errorf("%d copies of the descriptor before, %d after", before, after)
	}
}

// rawClient speaks the protocol by hand.
func rawClient(t *testing.T, cfg Config) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: cfg.Socket(), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestProtocolIsFrozen says packets byte by byte, as docs/formats/hold.md has them.
func TestProtocolIsFrozen(t *testing.T) {
	cfg := newRun(t, "data-that-dies")
	runHere(t, cfg)
	c := rawClient(t, cfg)
	hello := fmt.Sprintf("OK 1 1 %d", os.Getpid())
	fd := int(memfile(t, "x").Fd())
	for _, step := range []struct {
		say   string
		with  int // descriptors sent
		want  string
		comes bool
	}{
		{"LIST", 0, "ERR version HELLO comes first; the holder speaks versions 1-1", false},
		{"HELLO 2 3", 0, "ERR version the holder speaks versions 1-1, the client 2-3", false},
		{"HELLO 1 9", 0, hello, false},
		{"HELLO 1 1", 0, hello, false},
		{"LIST", 0, "OK", false},
		{"PUT a", 1, "OK", false},
		{"PUT b", 0, "ERR invalid PUT takes one descriptor, has 0", false},
		{"PUT b", 2, "ERR invalid PUT takes one descriptor, has 2", false},
		{"PUT b", 9, "ERR invalid not a request of this protocol: packet too long", false},
		{"LIST", 0, "OK a", false},
		{"LIST a", 0, "OK", false},
		{"GET a", 0, "OK", true},
		{"GET b", 0, "ERR not-found b", false},
		{"DROP a", 0, "OK", false},
		{"GET a", 0, "ERR not-found a", false},
		{"get a", 0, `ERR invalid not a request of this protocol: unknown verb "get"`, false},
		{"STATUS now", 0, "ERR invalid not a request of this protocol: STATUS takes 0 arguments, has 1", false},
		{strings.Repeat("x", 600), 0, "ERR invalid not a request of this protocol: packet too long", false},
	} {
		var oob []byte
		if step.with > 0 {
			fds := make([]int, step.with)
			for i := range fds {
				fds[i] = fd
			}
			oob = unix.UnixRights(fds...)
		}
		if _, _, err := c.WriteMsgUnix([]byte(step.say), oob, nil); err != nil {
			t.Fatal(err)
		}
		got, fds, err := receive(c, make([]byte, maxReply))
		if err != nil {
			t.Fatalf("%q: %v", step.say, err)
		}
		if string(got) != step.want || (len(fds) == 1) != step.comes {
			t.Errorf("%.40q with %d: %q with %d descriptors, want %q", step.say, step.with, got, len(fds), step.want)
		}
		closeAll(fds)
	}
}

func TestConcurrentClients(t *testing.T) {
	cfg := newRun(t, "data-that-dies")
	runHere(t, cfg)
	var wg sync.WaitGroup
	shared := dial(t, cfg)
	for i := range 8 {
		c := shared
		if i%2 == 0 {
			c = dial(t, cfg)
		}
		f := memfile(t, fmt.Sprint(i))
		wg.Go(func() {
			name := fmt.Sprint("n", i)
			for range 50 {
				if err := c.Put(t.Context(), name, f); err != nil {
					t.Error(err)
					return
				}
				got, err := c.Get(t.Context(), name)
				if err != nil {
					t.Error(err)
					return
				}
				if s := contentOf(t, got); s != fmt.Sprint(i) {
					t.Errorf("%s is %q", name, s)
				}
			}
		})
	}
	wg.Wait()
}

func TestGivenUp(t *testing.T) {
	cfg := newRun(t, "data-that-dies")
	ln, err := listen(cfg.Socket())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, cfg); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a holder that says nothing: %v, want the context's error", err)
	}
	os.Remove(cfg.Socket())
}

func TestRestartDelay(t *testing.T) {
	for deaths, want := range []time.Duration{0, 0, 0, 0, 100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond, 800 * time.Millisecond,
		1600 * time.Millisecond, 2 * time.Second, 2 * time.Second} {
		if got := restartDelay(deaths); got != want {
			t.Errorf("after %d young deaths: %v, want %v", deaths, got, want)
		}
	}
	if got := restartDelay(1 << 40); got != maxDelay {
		t.Errorf("after very many: %v", got)
	}
}

func TestCrashLoopIsReported(t *testing.T) {
	cfg := newRun(t, "data-that-dies")
	runHere(t, cfg)
	c := dial(t, cfg)
	eventually(t, "the holder backs off", func() bool {
		st, err := c.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return st.Data.YoungDeaths > freeDeaths && !st.Data.RetryAt.IsZero() && strings.HasSuffix(st.Data.LastExit, "exited with status 3")
	})
	// A binary that is not there is a reason too, not the end of the holder.
	gone := newRun(t, "data")
	gone.Binary = filepath.Join(gone.RunDir, "missing")
	runHere(t, gone)
	c = dial(t, gone)
	eventually(t, "the holder says what is missing", func() bool {
		st, err := c.Status(t.Context())
		return err == nil && st.Data.YoungDeaths > freeDeaths && strings.Contains(st.Data.LastExit, "missing")
	})
}

func TestSecondHolderIsRefused(t *testing.T) {
	cfg := newRun(t, "data-that-dies")
	runHere(t, cfg)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := Run(ctx, cfg); !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) {
		t.Errorf("second holder: %v, want ErrRunning that names the first", err)
	}
}

func TestSecondDataIsRefused(t *testing.T) {
	dir := t.TempDir()
	f, err := LockData(dir, "1.0")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := LockData(dir, "1.1"); !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), "data 1.0") {
		t.Errorf("second data: %v, want ErrRunning that names the first", err)
	}
}

func TestConfig(t *testing.T) {
	for _, dir := range []string{"", "relative", "/" + strings.Repeat("x", 120)} {
		if _, err := Ensure(t.Context(), Config{RunDir: dir}); err == nil {
			t.Errorf("run directory %.20q is taken", dir)
		}
	}
}

func TestLogIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.log")
	l, err := OpenLog(path, 1000)
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Repeat("a", 99) + "\n"
	for range 100 {
		if _, err := l.Write([]byte(line)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, path + ".1"} {
		info, err := os.Stat(p)
		if err != nil || info.Size() > 1000 || info.Size() == 0 {
			t.Errorf("%s: %d bytes, %v", p, info.Size(), err)
		}
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("b", 5000)), 0o600); err != nil { // a panic wrote past the bound
		t.Fatal(err)
	}
	if l, err = OpenLog(path, 1000); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if info, err := os.Stat(path); err != nil || info.Size() != 0 {
		t.Errorf("not bounded when opened: %d bytes, %v", info.Size(), err)
	}
}

// TestDataComesBack kills the data process: clients queue in the held listener and the next process serves them.
func TestDataComesBack(t *testing.T) {
	cfg := newRun(t, "data")
	k, err := Keep(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	var pid int
	eventually(t, "data serves", func() (ok bool) { pid, ok = greeting(t, cfg); return ok })
	made := func() syscall.Timespec { // inode numbers are used again
		var st syscall.Stat_t
		if err := syscall.Stat(filepath.Join(cfg.RunDir, "greeter.sock"), &st); err != nil {
			t.Fatal(err)
		}
		return st.Ctim
	}
	first := made()
	for i := range 3 {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		var next int
		// A connection made while the killed one still listens may be cut; one made after waits.
		eventually(t, "data serves again", func() (ok bool) { next, ok = greeting(t, cfg); return ok && next != pid })
		t.Logf("kill %d: served again after %v", i+1, time.Since(began).Round(time.Millisecond))
		if made() != first {
			t.Error("it is another socket: who waited in the first waits for ever")
		}
		pid = next
	}
	if text, err := os.ReadFile(cfg.HoldLog()); err != nil || !strings.Contains(string(text), "holder ready") {
		t.Errorf("the holder's log: %s, %v", text, err)
	}
	st, err := k.Status(t.Context())
	if err != nil || st.Data.Starts != 4 || st.Data.PID != pid || !st.Data.Running || !strings.Contains(st.Data.LastExit, "signal 9") {
		t.Errorf("status %+v, %v", st, err)
	}
}

// TestHolderComesBack kills the holder: the data process starts another, hands its descriptors in, and is not started a second time.
func TestHolderComesBack(t *testing.T) {
	cfg := newRun(t, "data")
	k, err := Keep(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	eventually(t, "data serves", func() (ok bool) { pid, ok = greeting(t, cfg); return ok })
	if err := k.Close(); err != nil { // as if serve were down: data alone sees it
		t.Fatal(err)
	}
	old := lockPID(t, cfg.holdLock())
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another holder has the listener", func() bool {
		c, err := Dial(t.Context(), cfg)
		if err != nil {
			return false
		}
		defer c.Close()
		names, err := c.List(t.Context())
		return err == nil && reflect.DeepEqual(names, []string{"greeter"}) && lockPID(t, cfg.holdLock()) != old
	})
	if now, ok := greeting(t, cfg); !ok || now != pid {
		t.Errorf("data process %d became %d", pid, now)
	}
	c := dial(t, cfg)
	eventually(t, "the new holder knows of the data process", func() bool { st, err := c.Status(t.Context()); return err == nil && st.Data.Running })
	if st, err := c.Status(t.Context()); err != nil || st.Data.Starts != 0 || !strings.Contains(st.Data.Who, strconv.Itoa(pid)) {
		t.Errorf("the new holder says of a data process that ran already: %+v, %v", st.Data, err)
	}
	// The new holder is not its parent, and still notices its death.
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "data serves again", func() bool { now, ok := greeting(t, cfg); return ok && now != pid })
}

// TestBothComeBack kills holder and data: the third that watches (serve) starts the holder, and that starts data.
func TestBothComeBack(t *testing.T) {
	cfg := newRun(t, "data")
	k, err := Keep(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := k.Put(t.Context(), "mine", memfile(t, "kept")); err != nil {
		t.Fatal(err)
	}
	var pid int
	eventually(t, "data serves", func() (ok bool) { pid, ok = greeting(t, cfg); return ok })
	syscall.Kill(lockPID(t, cfg.holdLock()), syscall.SIGKILL)
	syscall.Kill(pid, syscall.SIGKILL)
	eventually(t, "data serves again", func() bool { now, ok := greeting(t, cfg); return ok && now != pid })
	f, err := k.Get(t.Context(), "mine")
	if err != nil {
		t.Fatal(err)
	}
	if got := contentOf(t, f); got != "kept" {
		t.Errorf("handed in again: %q", got)
	}
}

// TestStopIsForGood stops the holder: no Keeper starts it again, and data, once dead, stays dead.
func TestStopIsForGood(t *testing.T) {
	cfg := newRun(t, "data")
	k, err := Keep(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	var pid int
	eventually(t, "data serves", func() (ok bool) { pid, ok = greeting(t, cfg); return ok })
	if err := k.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "data ends", func() bool { alive, _, _ := dataAlive(cfg.RunDir); return !alive })
	eventually(t, "the Keeper gives up", func() bool { return errors.Is(k.Drop(t.Context(), "x"), ErrClosed) })
	if _, err := Dial(t.Context(), cfg); err == nil {
		t.Error("a holder runs again")
	}
	// Whoever starts afresh gets one, as ever.
	k2, err := Keep(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer k2.Close()
	eventually(t, "data serves", func() bool { _, ok := greeting(t, cfg); return ok })
}

func TestManyEnsureOneHolder(t *testing.T) {
	cfg := newRun(t, "data-that-dies")
	var wg sync.WaitGroup
	pids := make([]int, 6)
	for i := range pids {
		wg.Go(func() {
			c, err := Ensure(t.Context(), cfg)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			st, err := c.Status(t.Context())
			if err != nil {
				t.Error(err)
			}
			pids[i] = st.PID
		})
	}
	wg.Wait()
	for _, p := range pids {
		if p != pids[0] {
			t.Fatalf("several holders: %v", pids)
		}
	}
}

func FuzzRequest(f *testing.F) {
	for _, s := range []string{"HELLO 1 1", "PUT a", "GET a/b:c", "LIST", "LIST a", "DROP x", "STATUS", "STOP", "", " ", "HELLO 0 1", "HELLO -1 99999999999999999999", "PUT  a", "PUT \x00"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		r, err := parseRequest(p)
		if err != nil {
			if !errors.Is(err, errRequest) {
				t.Errorf("%q: %v is not errRequest", p, err)
			}
			return
		}
		if r.name != "" && !validName(r.name) {
			t.Errorf("%q: bad name %q passed", p, r.name)
		}
		if (r.verb == verbPut || r.verb == verbGet || r.verb == verbDrop) && r.name == "" {
			t.Errorf("%q: no name passed", p)
		}
	})
}

func FuzzReply(f *testing.F) {
	for _, s := range []string{"OK", "OK 1 1 77", "ERR not-found a", "ERR", "ERR ", "", "NO", "OK {}"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		r, err := parseReply(p)
		if err == nil && r.ok == (r.err() != nil) {
			t.Errorf("%q: ok %v and error %v", p, r.ok, r.err())
		}
	})
}
