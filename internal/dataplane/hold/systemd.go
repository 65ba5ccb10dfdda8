package hold

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// Under systemd (Config.Systemd) nobody starts a process of his own: the holder is ashlar-hold.service, and the data process of a version is
// ashlar-data@VERSION.service, which the holder has systemctl start. So each is in a control group of its own, and stopping or upgrading one never signals another.

const (
	holdUnit = "ashlar-hold.service"
	// unitPatience bounds what systemctl is waited for, and how long a started unit may take to its lock.
	unitPatience = 10 * time.Second
)

// dataUnit names the unit of a version. Characters that unit names do not have become dashes: the name is only a name.
func dataUnit(version string) string {
	clean := strings.Map(func(r rune) rune {
		if 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune(":_.-", r) {
			return r
		}
		return '-'
	}, version)
	return "ashlar-data@" + clean + ".service"
}

// systemctl runs one of its commands and returns what it printed.
func systemctl(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, unitPatience)
	defer cancel()
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		return text, fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, text)
	}
	return text, nil
}

// installedVersion asks the newest installed program which version it is.
func installedVersion(ctx context.Context, cfg Config) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, unitPatience)
	defer cancel()
	out, err := exec.CommandContext(ctx, cfg.Binary, "version", "-o", "json").Output()
	var v struct{ Version string }
	if err == nil {
		err = json.Unmarshal(out, &v)
	}
	if err == nil && v.Version == "" {
		err = errors.New("it said nothing")
	}
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", cfg.Binary, err)
	}
	return v.Version, nil
}

// startUnit has systemd start the data process of the newest installed version, and returns the unit and its pid.
func startUnit(ctx context.Context, cfg Config) (unit string, pid int, err error) {
	version, err := installedVersion(ctx, cfg)
	if err != nil {
		return "", 0, fmt.Errorf("start data: %w", err)
	}
	unit = dataUnit(version)
	if _, err := systemctl(ctx, "start", unit); err != nil {
		return unit, 0, fmt.Errorf("start data: %w", err)
	}
	text, err := systemctl(ctx, "show", "-p", "MainPID", "--value", unit)
	if err == nil {
		pid, err = strconv.Atoi(text)
	}
	if err != nil {
		return unit, 0, fmt.Errorf("start data: %s: %w", unit, err)
	}
	return unit, pid, nil
}

// liveUnit is live for a data process that is systemd's child.
func (s *supervisor) liveUnit(ctx context.Context) (how string, ended bool) {
	unit, pid, err := startUnit(ctx, s.cfg)
	if ctx.Err() != nil {
		return "", false
	}
	if err != nil {
		return err.Error(), true
	}
	s.set(func(st *DataStatus) {
		st.Running, st.PID, st.Started, st.RetryAt = true, pid, time.Now(), time.Time{}
		st.Starts++
	})
	s.cfg.Log.Info("data process started", "pid", pid, "unit", unit)
	for deadline := time.Now().Add(unitPatience); ; {
		alive, _, err := dataAlive(s.cfg.RunDir)
		if err != nil {
			return err.Error(), true
		}
		if alive {
			break
		}
		state, err := systemctl(ctx, "show", "-p", "ActiveState", "--value", unit)
		if err != nil || state != "active" && state != "activating" || time.Now().After(deadline) {
			return fmt.Sprintf("%s is %s and has no lock: see journalctl -u %s", unit, state, unit), ctx.Err() == nil
		}
		if !wait(ctx, lockPoll) {
			return "", false
		}
	}
	if !s.untilFree(ctx) {
		return "", false
	}
	result, err := systemctl(ctx, "show", "-p", "Result", "--value", unit)
	if err != nil {
		result = err.Error()
	}
	return unit + " ended: " + result, true
}
