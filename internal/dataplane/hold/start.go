package hold

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"
)

const (
	// startPatience bounds one attempt to start a holder, retryDelay is the pause between two.
	startPatience = 5 * time.Second
	retryDelay    = 50 * time.Millisecond
	dialDelay     = 2 * time.Millisecond
)

// Ensure connects to the holder of a run directory, and starts one, detached, if there is none. It returns when the holder answers, or with
// ctx's error; a holder of another version is ErrVersion at once.
func Ensure(ctx context.Context, cfg Config) (*Conn, error) {
	cfg, err := cfg.check()
	if err != nil {
		return nil, err
	}
	for {
		conn, err := Dial(ctx, cfg)
		if err == nil || errors.Is(err, ErrVersion) {
			return conn, err
		}
		if err = intermediate(ctx, cfg); err != nil {
			cfg.Log.Warn("the holder could not be started", "error", err)
			if !wait(ctx, retryDelay) {
				return nil, errors.Join(ctx.Err(), err)
			}
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
}

// intermediate runs a process that starts the holder and ends: so the holder is nobody's child, and we wait for ours.
func intermediate(ctx context.Context, cfg Config) error {
	if cfg.Systemd {
		_, err := systemctl(ctx, "start", holdUnit)
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	if cfg.Start != nil {
		return cfg.Start(ctx)
	}
	if err := os.MkdirAll(cfg.RunDir, 0o755); err != nil {
		return fmt.Errorf("start the holder: %w", err)
	}
	args := append(append([]string{}, cfg.HoldArgs...), DetachFlag)
	cmd := exec.CommandContext(ctx, cfg.Binary, args...)
	cmd.Dir = "/"
	log, err := OpenLog(cfg.HoldLog(), MaxLogBytes)
	if err != nil {
		return fmt.Errorf("start the holder: %w", err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log.File(), log.File()
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("start the holder (see %s): %w", cfg.HoldLog(), err)
	}
	return nil
}

// Detach starts a holder as a process of its own session, with its output going to its log, and returns when it answers. It is what
// `ashlar hold --detach` does; the caller exits next, which leaves the holder to init.
func Detach(ctx context.Context, cfg Config) error {
	cfg, err := cfg.check()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	log, err := OpenLog(cfg.HoldLog(), MaxLogBytes)
	if err != nil {
		return fmt.Errorf("detach the holder: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(cfg.Binary, cfg.HoldArgs...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log.File(), log.File()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("detach the holder: %w", err)
	}
	pid := cmd.Process.Pid
	if err := cmd.Process.Release(); err != nil {
		return fmt.Errorf("detach the holder: %w", err)
	}
	return untilHeld(ctx, cfg, pid)
}

// untilHeld waits until the process pid is the holder, or has ended because another is. It leaves none behind that might become one later.
func untilHeld(ctx context.Context, cfg Config, pid int) error {
	for {
		how, gone := reap(pid)
		conn, err := Dial(ctx, cfg)
		if err == nil {
			holder := conn.pid
			if err := conn.Close(); err != nil || gone || holder == pid {
				return err
			}
		} else if gone {
			return fmt.Errorf("detach the holder: %s, and no other answers: %w", how, err)
		}
		if !wait(ctx, dialDelay) {
			return fmt.Errorf("detach the holder: it does not answer: %w", errors.Join(ctx.Err(), err))
		}
	}
}
