package dataplane

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// stageVariable, in the environment, says that this process has executed itself already.
	stageVariable = "ASHLAR_DATA_STAGE"
	// wantFiles is how many descriptors a data process may want: clients, layers, listeners.
	wantFiles = 1 << 20
	// leastMemory is the lowest soft limit of the heap.
	leastMemory = 256 << 20
)

// becomeFlusher makes every thread of this process one whose memory allocations never wait for I/O that might be waiting for this process
// (PR_SET_IO_FLUSHER). The mark is a thread's and inherited by those it starts, and Go has started some already: so a locked thread sets it, and executes the program
// again. It returns only if that is done or cannot be: whether the mark holds now.
func becomeFlusher(log *slog.Logger) bool {
	if os.Getenv(stageVariable) != "" {
		// Children (the holder, imports) make up their own minds.
		if err := os.Unsetenv(stageVariable); err != nil {
			log.Warn("environment cannot be cleaned", "error", err)
		}
		return isFlusher()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		log.Warn("PR_SET_IO_FLUSHER is not allowed (CAP_SYS_RESOURCE): under memory pressure guests' writes may wait for themselves", "error", err)
		return false
	}
	err := syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), stageVariable+"=2"))
	log.Warn("cannot execute itself to spread PR_SET_IO_FLUSHER", "error", err)
	return false
}

// isFlusher tells whether the mark holds on this thread.
func isFlusher() bool {
	got, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0)
	return err == nil && got == 1
}

// raiseLimits allows as many descriptors as the system lets us, and bounds the heap softly unless the environment says otherwise.
func raiseLimits(log *slog.Logger) {
	var l unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l)
	if err == nil && l.Max < wantFiles {
		if e := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: wantFiles, Max: wantFiles}); e != nil {
			err = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: l.Max, Max: l.Max})
		}
	} else if err == nil {
		err = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: l.Max, Max: l.Max})
	}
	if err != nil {
		log.Warn("the limit on descriptors stays as it is", "error", err)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		var info unix.Sysinfo_t
		if unix.Sysinfo(&info) == nil {
			debug.SetMemoryLimit(max(leastMemory, int64(info.Totalram)*int64(info.Unit)/4))
		}
	}
}

// processors is what GOMAXPROCS, which is now, becomes. A request that waits for the medium does so in a system call, and a call keeps one of the runtime's processors until the monitor takes it away, tens of microseconds
// later at best: with two of them, a deep queue reached the medium two requests deep. Around the page cache every request waits; else only those that miss it, and more than a few processors would only take turns more often.
func processors(now int, direct bool) int {
	if direct {
		now = max(now, min(4*now, mostProcessors))
	}
	return max(now, leastProcessors)
}

const (
	leastProcessors = 8  // as deep as any disk is worth being asked
	mostProcessors  = 64 // machines beyond it have enough of their own
)

// hostBootID returns the kernel's id of this boot.
func hostBootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("boot id: %w", err)
	}
	id := string(text)
	for len(id) > 0 && (id[len(id)-1] == '\n') {
		id = id[:len(id)-1]
	}
	if id == "" {
		return "", errors.New("boot id: the kernel's is empty")
	}
	return id, nil
}
