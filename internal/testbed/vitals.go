package testbed

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Vitals are what must not grow without bound in a process of the node.
type Vitals struct {
	ResidentBytes  int64 // with the pages of mapped files, such as the catalogue's
	PrivateBytes   int64 // without
	Threads, Files int
	Goroutines     int   // 0 where unknown: not asked for, or no profiles
	HeapBytes      int64 // 0 where unknown; after a garbage collection: what is in use
}

// ErrVitals: what a process says of itself cannot be understood.
var ErrVitals = errors.New("unknown vitals")

// Vitals looks at the process that runs a subcommand, from outside.
func (p *Process) Vitals(subcommand string) (Vitals, error) {
	pid := p.PID(subcommand)
	if pid == 0 {
		return Vitals{}, fmt.Errorf("no `ashlar %s` is running: %w", subcommand, os.ErrNotExist)
	}
	return VitalsOf(pid)
}

// VitalsOf looks at any process, from outside.
func VitalsOf(pid int) (v Vitals, err error) {
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	files, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		return v, err
	}
	v.Files = len(files)
	status, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		return v, err
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		n, _, _ := strings.Cut(strings.TrimSpace(value), " ")
		switch name {
		case "VmRSS":
			v.ResidentBytes, err = strconv.ParseInt(n, 10, 64)
			v.ResidentBytes *= 1024
		case "RssAnon":
			v.PrivateBytes, err = strconv.ParseInt(n, 10, 64)
			v.PrivateBytes *= 1024
		case "Threads":
			v.Threads, err = strconv.Atoi(n)
		}
		if err != nil {
			return v, fmt.Errorf("%s: %w: %w", proc, ErrVitals, err)
		}
	}
	return v, nil
}

// Inside is Vitals with what the process itself tells, after a garbage collection. The node must run with ASHLAR_PPROF=1, and the subcommand be serve or data.
func (p *Process) Inside(ctx context.Context, subcommand string) (Vitals, error) {
	v, err := p.Vitals(subcommand)
	if err != nil {
		return v, err
	}
	if v.HeapBytes, err = p.profile(ctx, subcommand, "heap?gc=1&debug=1", "# HeapAlloc = "); err != nil {
		return v, err
	}
	n, err := p.profile(ctx, subcommand, "goroutine?debug=1", "goroutine profile: total ")
	v.Goroutines = int(n)
	return v, err
}

// profile gets the number that follows some words in a profile.
func (p *Process) profile(ctx context.Context, subcommand, what, words string) (int64, error) {
	var n int64
	err := p.Profile(ctx, subcommand, what, func(r io.Reader) error {
		lines := bufio.NewScanner(r)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			if rest, ok := strings.CutPrefix(lines.Text(), words); ok {
				var err error
				n, err = strconv.ParseInt(rest, 10, 64)
				return err
			}
		}
		return errors.Join(lines.Err(), fmt.Errorf("%s of %s: %w", what, subcommand, ErrVitals))
	})
	return n, err
}

// Profile reads one of the profiles that net/http/pprof serves: `heap`, `goroutine?debug=2`, `profile?seconds=10`.
func (p *Process) Profile(ctx context.Context, subcommand, what string, read func(io.Reader) error) error {
	socket := filepath.Join(p.RunDir, "pprof-"+subcommand+".sock")
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://ashlar/debug/pprof/"+what, nil)
	if err != nil {
		return err
	}
	res, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s of %s: %s: %w", what, subcommand, res.Status, ErrVitals)
	}
	return read(res.Body)
}

// Workers are the work processes that the data process runs: imports and exports.
func (p *Process) Workers() (pids []int) {
	data := p.PID("data")
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if data == 0 || err != nil {
		return nil
	}
	for _, dir := range dirs {
		line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if words := strings.Split(string(line), "\x00"); err != nil || len(words) < 2 || words[1] != "work" {
			continue
		}
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue // it has ended
		}
		// PID (NAME) STATE PARENT …; a name may hold anything.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err == nil && len(fields) > 1 && fields[1] == strconv.Itoa(data) {
			pids = append(pids, pid)
		}
	}
	return pids
}
