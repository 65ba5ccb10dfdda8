package hold

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
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
//
// A successor (START) is started beside it and gets the lock from it: when the child exits the lock is taken, and that is no death.
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
	cfg        Config
	mu         sync.Mutex // guards the rest
	st         DataStatus
	successors []int // children beside the one that live sees through; to be reaped
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
		if alive, who, err := dataAlive(s.cfg.RunDir); err == nil && alive {
			s.cfg.Log.Info("data process ended, and another has its lock", "how", how, "who", who)
			deaths = 0
			continue
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
	if s.cfg.Systemd {
		return s.liveUnit(ctx)
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
			s.reapSuccessors()
			if how, gone := reap(pid); gone {
				return how, true
			}
		}
	}
}

// start starts the data process that live sees through.
func (s *supervisor) start() (pid int, err error) {
	if pid, err = startData(s.cfg, s.cfg.DataArgs); err != nil {
		return 0, err
	}
	s.set(func(st *DataStatus) {
		st.Running, st.PID, st.Started, st.RetryAt = true, pid, time.Now(), time.Time{}
		st.Starts++
	})
	return pid, nil
}

// startData starts the newest installed data process with args, in a session of its own and with its output going to its log.
func startData(cfg Config, args []string) (pid int, err error) {
	log, err := OpenLog(cfg.DataLog(), MaxLogBytes)
	if err != nil {
		return 0, fmt.Errorf("start data: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(cfg.Binary, args...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log.File(), log.File()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start data: %w", err)
	}
	pid = cmd.Process.Pid
	return pid, cmd.Process.Release()
}

// StartSuccessor starts the newest installed data process, detached, to take over from the one that runs: for holders that do not know START.
func StartSuccessor(cfg Config) (pid int, err error) {
	cfg, err = cfg.check()
	if err != nil {
		return 0, err
	}
	if cfg.Systemd {
		_, pid, err := startUnit(context.Background(), cfg)
		return pid, err
	}
	return startData(cfg, append(append([]string{}, cfg.DataArgs...), TakeOverFlag))
}

// startSuccessor is StartSuccessor for a child of this holder.
func (s *supervisor) startSuccessor() (pid int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if pid, err = StartSuccessor(s.cfg); err != nil {
		return 0, err
	}
	s.st.Starts++
	if !s.cfg.Systemd { // whose child it is
		s.successors = append(s.successors, pid)
	}
	s.cfg.Log.Info("successor started", "pid", pid, "binary", s.cfg.Binary)
	return pid, nil
}

// reapSuccessors collects those that ended.
func (s *supervisor) reapSuccessors() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.successors = slices.DeleteFunc(s.successors, func(pid int) bool {
		how, gone := reap(pid)
		if gone {
			s.cfg.Log.Info("a data process that was started to take over ended", "how", how)
		}
		return gone
	})
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
		s.reapSuccessors()
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
