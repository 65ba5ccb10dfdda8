package dataplane

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"testing"

	"ashlar/internal/dataplane/hold"
	"ashlar/internal/job"
)

// TestMain lets the test binary be the holder, the data process and the work process too, by its first argument, as the ashlar binary is by its subcommands.
func TestMain(m *testing.M) {
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
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
		if os.Args[len(os.Args)-1] == hold.DetachFlag {
			os.Exit(exit(hold.Detach(ctx, cfg)))
		}
		os.Exit(exit(hold.Run(ctx, cfg)))
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
