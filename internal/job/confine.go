package job

import (
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

const (
	// confinedEnv marks the second life of a work process: it was limited before its first instruction.
	confinedEnv = "ASHLAR_WORK_CONFINED"
	// memoryEnv tells the first life the limit, before it has read its spec.
	memoryEnv = "ASHLAR_WORK_MEMORY"
	workNice  = 10
)

// confine limits this process. Some of the limits belong to the calling thread alone, and the runtime has others already, so they are set on one thread, which then
// executes the same binary: all threads of the new program inherit them. In that second life confine only checks.
func confine() error {
	if os.Getenv(confinedEnv) != "" {
		if on, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); err != nil || on != 1 {
			return fmt.Errorf("%s is set, but the process may gain privileges: %w", confinedEnv, ErrSpec)
		}
		return nil
	}
	runtime.LockOSThread() // never unlocked: the thread ends with exec
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no new privileges: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("core limit: %w", err)
	}
	limit, err := strconv.ParseInt(os.Getenv(memoryEnv), 10, 64)
	if err != nil {
		return fmt.Errorf("%s: %w", memoryEnv, err)
	}
	if limit > 0 {
		if err := unix.Setrlimit(unix.RLIMIT_DATA, &unix.Rlimit{Cur: uint64(limit), Max: uint64(limit)}); err != nil {
			return fmt.Errorf("data limit: %w", err)
		}
	}
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, workNice); err != nil {
		return fmt.Errorf("nice: %w", err)
	}
	if err := unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), confinedEnv+"=1")); err != nil {
		return fmt.Errorf("execute again: %w", err)
	}
	return nil // not reached
}
