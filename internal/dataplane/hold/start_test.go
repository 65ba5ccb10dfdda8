package hold

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestStart: a successor is started on request, whether or not one runs, and is collected when it ends; what cannot be started says so.
func TestStart(t *testing.T) {
	cfg := newRun(t, "data-that-dies")
	runHere(t, cfg)
	c := dial(t, cfg)
	pid, err := c.Start(t.Context())
	if err != nil || pid <= 0 {
		t.Fatalf("start: %d, %v", pid, err)
	}
	eventually(t, "it ends and is collected", func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) })
	if st, err := c.Status(t.Context()); err != nil || st.Data.Starts == 0 {
		t.Errorf("status %+v, %v", st, err)
	}
}

func TestStartOfNothing(t *testing.T) {
	cfg := newRun(t, "data-that-dies")
	cfg.Binary = filepath.Join(cfg.RunDir, "none")
	runHere(t, cfg)
	c := dial(t, cfg)
	if _, err := c.Start(t.Context()); !errors.Is(err, ErrStart) {
		t.Errorf("start of a program that is not there: %v, want ErrStart", err)
	}
	if _, err := c.Status(t.Context()); err != nil {
		t.Errorf("the connection after a refusal: %v", err)
	}
}

// TestOlderHolderRefusesStart: what a holder that does not know START answers is ErrRefused, so that whoever asks starts the successor himself.
func TestOlderHolderRefusesStart(t *testing.T) {
	if err := (reply{code: codeInvalid, text: "unknown verb"}).err(); !errors.Is(err, ErrRefused) || errors.Is(err, ErrStart) {
		t.Errorf("ERR invalid is %v", err)
	}
}

// TestLockPasses: the run directory's lock is held until the giver and the taker have closed it, and says who has it.
func TestLockPasses(t *testing.T) {
	dir := t.TempDir()
	giver, err := LockData(dir, "1.0")
	if err != nil {
		t.Fatal(err)
	}
	taker, err := LockVersion(dir, "1.1")
	if err != nil {
		t.Fatal(err)
	}
	if taker.Run() != nil {
		t.Error("a taker has the lock before it was passed")
	}
	fd, err := dup(giver.Run())
	if err != nil {
		t.Fatal(err)
	}
	if err := taker.Inherit(os.NewFile(uintptr(fd), "passed")); err != nil {
		t.Fatal(err)
	}
	stranger, err := os.OpenFile(dataLock(dir), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	other, err := LockVersion(dir, "1.2")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.Inherit(stranger); !errors.Is(err, ErrRunning) {
		t.Errorf("a descriptor without the lock was taken for one with it: %v", err)
	}
	if VersionEnded(dir, "1.0") {
		t.Error("the giver is taken for dead")
	}
	if err := giver.Close(); err != nil {
		t.Fatal(err)
	}
	if !VersionEnded(dir, "1.0") || VersionEnded(dir, "1.1") {
		t.Error("who lives, and who does not")
	}
	if err := taker.Sign(); err != nil {
		t.Fatal(err)
	}
	alive, who, err := dataAlive(dir)
	if want := fmt.Sprintf("data 1.1, pid %d", os.Getpid()); err != nil || !alive || who != want {
		t.Errorf("the lock is held %v by %q, %v; want %q", alive, who, err, want)
	}
	if err := taker.Close(); err != nil {
		t.Fatal(err)
	}
	if alive, _, _ := dataAlive(dir); alive {
		t.Error("the lock is held by nobody's descriptor")
	}
}

// TestEndAfterHandOverIsNoDeath: the holder's data process ends while another has the lock that it passed: nobody is started beside that one, and nothing counts as a death.
func TestEndAfterHandOverIsNoDeath(t *testing.T) {
	cfg := newRun(t, "data")
	// A holder of its own: one in this process would end first, and the data process would start another.
	conn, err := Ensure(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	var pid int
	eventually(t, "a data process", func() (ok bool) { pid, ok = greeting(t, cfg); return ok })
	lock := passedLock(t, pid, dataLock(cfg.RunDir))
	syscall.Kill(pid, syscall.SIGKILL)
	c := dial(t, cfg)
	eventually(t, "the holder saw the end", func() bool {
		st, err := c.Status(t.Context())
		return err == nil && st.Data.Who != ""
	})
	select {
	case <-time.After(5 * lockPoll):
	case <-t.Context().Done():
	}
	if st, err := c.Status(t.Context()); err != nil || st.Data.Starts != 1 || st.Data.YoungDeaths != 0 {
		t.Errorf("while another has the lock: %+v, %v", st, err)
	}
	lock.Close()
	eventually(t, "another is started, and serves", func() bool {
		now, ok := greeting(t, cfg)
		return ok && now != pid
	})
	if st, err := c.Status(t.Context()); err != nil || st.Data.Starts != 2 {
		t.Errorf("once nobody has the lock: %+v, %v", st, err)
	}
}

// passedLock takes a copy of a process's descriptor, as if it had passed it.
func passedLock(t *testing.T, pid int, path string) *os.File {
	t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	for _, l := range links {
		if to, err := os.Readlink(l); err != nil || !strings.HasSuffix(to, strings.TrimPrefix(path, "/tmp")) {
			continue
		}
		n, err := strconv.Atoi(filepath.Base(l))
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.PidfdGetfd(pidfd, n, 0)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), path)
	}
	t.Fatalf("process %d does not have %s open", pid, path)
	return nil
}
