package blockdev

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// openers returns the processes that have dev or a partition of it open, as "1234 (fio)". It looks at /proc, and does not see what a process has only mapped, nor other pid
// namespaces: the kernel's own count has the last word (detach).
func openers(dev string) ([]string, error) {
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return nil, fmt.Errorf("look for who has %s open: %w", dev, err)
	}
	var out []string
	self, last := fmt.Sprint(os.Getpid()), ""
	for _, link := range links {
		pid := strings.Split(link, "/")[2]
		if pid == self || pid == last {
			continue
		}
		target, err := os.Readlink(link)
		if err != nil || (target != dev && !strings.HasPrefix(target, dev+"p")) {
			continue
		}
		name, err := os.ReadFile("/proc/" + pid + "/comm")
		if err != nil {
			continue // it ended
		}
		last = pid
		out = append(out, pid+" ("+strings.TrimSpace(string(name))+")")
	}
	return out, nil
}

// unopened waits until no process has dev open: programs that look at every block device that changes (udev's) do for a moment. EBUSY, with their names, if some
// still do after lookFor or when ctx ends.
func unopened(ctx context.Context, dev string) error {
	ctx, cancel := context.WithTimeout(ctx, lookFor)
	defer cancel()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		who, err := openers(dev)
		if err != nil || len(who) == 0 {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s is open in process %s: %w", dev, strings.Join(who, ", "), unix.EBUSY)
		}
	}
}
