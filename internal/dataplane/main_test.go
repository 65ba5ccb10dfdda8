package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"ashlar/internal/dataplane/hold"
	"ashlar/internal/export/blockdev"
	"ashlar/internal/job"
)

// TestMain lets the test binary be the holder, the data process and the work process too, by its first argument, as the ashlar binary is by its subcommands.
func TestMain(m *testing.M) {
	if os.Getpid() == 1 && os.Getenv("ASHLAR_TEST_GUEST") != "" { // from the kernel's command line
		guestInit()
	}
	if len(os.Args) < 2 {
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	switch os.Args[1] {
	case "work":
		os.Exit(job.Main(ctx, os.Stdin, os.Stdout))
	case "hold":
		cfg := childConfig(os.Args[2], os.Args[3]).hold()
		if os.Args[len(os.Args)-1] == hold.DetachFlag {
			os.Exit(exit(hold.Detach(ctx, cfg)))
		}
		os.Exit(exit(hold.Run(ctx, cfg)))
	case "blockdev":
		os.Exit(blockdev.Tool(ctx, os.Args[2:], os.Stdout))
	case "flusher":
		os.Exit(exit(flusherMain()))
	case "data":
		os.Exit(exit(Run(ctx, childConfig(os.Args[2], os.Args[3]))))
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

// childConfig is the Config of a data process, and of the holder that starts it, made of the test binary.
func childConfig(runDir, version string) Config {
	return Config{RunDir: runDir, Version: version, HoldArgs: []string{"hold", runDir, version}, DataArgs: []string{"data", runDir, version}}
}

// guestInit is the first process of a virtual machine (TestIOFlusher): it runs the one check that this host may not allow, and switches the machine off.
func guestInit() {
	err := errors.Join(os.MkdirAll("/proc", 0o700), os.MkdirAll("/dev", 0o700))
	if err == nil {
		err = errors.Join(syscall.Mount("proc", "/proc", "proc", 0, ""), syscall.Mount("dev", "/dev", "devtmpfs", 0, ""))
	}
	if err == nil {
		cmd := exec.Command("/init", "flusher")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
		err = cmd.Run()
	}
	fmt.Println("GUEST DONE", err)
	syscall.Sync()
	err = syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
	fmt.Println("GUEST CANNOT STOP", err)
	select {}
}

// flusherMain becomes an I/O flusher as a data process does, and looks at many threads, old and new.
func flusherMain() error {
	pid := os.Getpid()
	if !becomeFlusher(slog.New(slog.NewTextHandler(os.Stdout, nil))) {
		return errors.New("not an I/O flusher")
	}
	var wg sync.WaitGroup
	var without atomic.Int32
	start := make(chan struct{})
	const threads = 32
	for range threads {
		wg.Go(func() {
			runtime.LockOSThread() // never unlocked: each has a thread of its own
			<-start
			if !isFlusher() {
				without.Add(1)
			}
		})
	}
	close(start)
	wg.Wait()
	if n := without.Load(); n > 0 || os.Getpid() != pid || os.Getenv(stageVariable) != "" {
		return fmt.Errorf("%d threads without the mark, pid %d was %d, %s=%q", n, os.Getpid(), pid, stageVariable, os.Getenv(stageVariable))
	}
	fmt.Printf("FLUSHER ON ALL %d THREADS\n", threads)
	return nil
}
