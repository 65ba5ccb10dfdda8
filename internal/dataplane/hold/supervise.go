package hold

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// When data is started again.
//
//	           lock free: start                     exited
//	waiting ──────────────────▶ child runs ───────────────────┐
//	   ▲  │                                                   ▼
//	   │  └─ lock taken: somebody else's data runs ── freed ─ dead ── young deaths in a row? wait restartDelay
//	   └──────────────────────────────────────────────────────────┘
const (
	// young is the life below which a death counts as one of a row.
	young = 2 * time.Second
	// freeDeaths young deaths in a row are answered at once: somebody who kills it three times gets it back three times without a pause.
	freeDeaths = 3
	firstDelay = 100 * time.Millisecond
	// maxDelay leaves room for the start itself: volumes are to be back within 5 s of every death, of the tenth in a row too.
	maxDelay = 2 * time.Second
	// lockPoll is how often a data process that is not our child is looked at.
	lockPoll = 20 * time.Millisecond
)

// restartDelay says how long to wait before data is started again after it died young so many times in a row.
func restartDelay(youngDeaths int) time.Duration {
	if youngDeaths <= freeDeaths {
		return 0
	}
	d := firstDelay
	for range youngDeaths - freeDeaths - 1 {
		if d *= 2; d >= maxDelay {
			return maxDelay
		}
	}
	return d
}

// DataStatus is what the holder knows of the data process.
type DataStatus struct {
	Running     bool      `json:"running"`
	PID         int       `json:"pid,omitempty"` // if it is the holder's child
	Who         string    `json:"who,omitempty"` // what it wrote into its lock
	Starts      int       `json:"starts"`        // by this holder
	Started     time.Time `json:"started"`
	LastExit    string    `json:"lastExit,omitempty"` // how the last one ended, or could not be started
	YoungDeaths int       `json:"youngDeaths,omitempty"`
	RetryAt     time.Time `json:"retryAt,omitzero"` // it died young repeatedly and is started again only then
}

// supervisor keeps one data process alive.
type supervisor struct {
	cfg Config
	mu  sync.Mutex // guards st
	st  DataStatus
}

func (s *supervisor) status() DataStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.st
}

func (s *supervisor) set(change func(*DataStatus)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.st)
}

// run starts data, and starts it again, until ctx ends; then it leaves whatever runs alone.
func (s *supervisor) run(ctx context.Context) {
	// Reaped by hand, so that the end of ctx ends the wait.
	died := make(chan os.Signal, 1)
	signal.Notify(died, syscall.SIGCHLD)
	defer signal.Stop(died)
	for deaths := 0; ctx.Err() == nil; {
		began := time.Now()
		how, ended := s.live(ctx, died)
		if !ended {
			return
		}
		if deaths++; time.Since(began) >= young {
			deaths = 1
		}
		delay := restartDelay(deaths)
		s.set(func(st *DataStatus) {
			st.Running, st.PID, st.Who, st.LastExit, st.YoungDeaths = false, 0, "", how, deaths
			if delay > 0 {
				st.RetryAt = time.Now().Add(delay)
			}
		})
		s.cfg.Log.Warn("data process ended", "how", how, "lived", time.Since(began).Round(time.Millisecond), "young deaths", deaths, "starting again in", delay)
		if !wait(ctx, delay) {
			return
		}
	}
}

// live sees one data process through from start to end and says how it ended; false if ctx ended first.
func (s *supervisor) live(ctx context.Context, died <-chan os.Signal) (how string, ended bool) {
	alive, who, err := dataAlive(s.cfg.RunDir)
	if err != nil {
		return err.Error(), true
	}
	if alive {
		s.set(func(st *DataStatus) { st.Running, st.Who, st.RetryAt = true, who, time.Time{} })
		s.cfg.Log.Info("a data process runs already", "who", who)
		return "ended (not this holder's child): " + who, s.untilFree(ctx)
	}
	pid, err := s.start()
	if err != nil {
		return err.Error(), true
	}
	s.cfg.Log.Info("data process started", "pid", pid, "binary", s.cfg.Binary)
	for {
		select {
		case <-ctx.Done():
			return "", false
		case <-died:
			if how, gone := reap(pid); gone {
				return how, true
			}
		}
	}
}

// start starts the data process in a session of its own, with its output going to its log.
func (s *supervisor) start() (pid int, err error) {
	log, err := OpenLog(s.cfg.DataLog(), MaxLogBytes)
	if err != nil {
		return 0, fmt.Errorf("start data: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(s.cfg.Binary, s.cfg.DataArgs...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log.File(), log.File()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start data: %w", err)
	}
	pid = cmd.Process.Pid
	s.set(func(st *DataStatus) {
		st.Running, st.PID, st.Started, st.RetryAt = true, pid, time.Now(), time.Time{}
		st.Starts++
	})
	return pid, cmd.Process.Release()
}

// reap collects pid if it is dead.
func reap(pid int) (how string, gone bool) {
	var ws unix.WaitStatus
	got, err := unix.Wait4(pid, &ws, unix.WNOHANG, nil)
	switch {
	case err != nil:
		return fmt.Sprintf("pid %d is not there: %v", pid, err), true
	case got != pid:
		return "", false
	case ws.Signaled():
		return fmt.Sprintf("pid %d killed by signal %d (%v)", pid, ws.Signal(), ws.Signal()), true
	}
	return fmt.Sprintf("pid %d exited with status %d", pid, ws.ExitStatus()), true
}

// untilFree waits until no process has the data lock; false if ctx ended first.
func (s *supervisor) untilFree(ctx context.Context) bool {
	for wait(ctx, lockPoll) {
		if alive, _, err := dataAlive(s.cfg.RunDir); err == nil && !alive {
			return true
		}
	}
	return false
}

// wait waits for d or the end of ctx; false if ctx ended.
func wait(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
