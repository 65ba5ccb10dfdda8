package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// guest is a running virtual machine whose serial console is a shell: a line goes in, its output and its exit code come out.
type guest struct {
	name  string
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines chan string
	read  sync.WaitGroup
}

// machine is what every guest here has in common.
type machine struct {
	accel, kernel, initrd string
	scratch               string
}

const (
	readyMark = "ASHLAR-READY"
	doneMark  = "ASHLAR-DONE "
	bootLimit = 3 * time.Minute // TCG on a busy machine; 5 s is usual
	lineLimit = 2 * time.Minute
)

var errGuest = errors.New("the guest did not do as it was told")

// qemuArgs are a guest's arguments; its disk comes over NBD and waits for the server to come back if it is gone.
func (m machine) qemuArgs(name, socket string) []string {
	args := []string{"-name", name, "-accel", m.accel, "-machine", "q35", "-m", "256", "-smp", "1", "-display", "none", "-nodefaults",
		"-serial", "stdio", "-no-reboot", "-kernel", m.kernel, "-initrd", m.initrd,
		"-append", "console=ttyS0 panic=-1 quiet mitigations=off nokaslr no_timer_check cryptomgr.notests"}
	if socket == "" {
		return args
	}
	return append(args,
		"-blockdev", "driver=nbd,node-name=d0,server.type=unix,server.path="+socket+",export="+name+",reconnect-delay=60,discard=unmap",
		"-device", "virtio-blk-pci,drive=d0")
}

// boot starts a guest and waits until its shell answers.
func (m machine) boot(ctx context.Context, name, socket string) (*guest, error) {
	g := &guest{name: name, lines: make(chan string, 4096)}
	g.cmd = exec.CommandContext(ctx, "qemu-system-x86_64", m.qemuArgs(name, socket)...)
	var err error
	if g.stdin, err = g.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	transcript, err := os.OpenFile(filepath.Join(m.scratch, name+".console"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	g.cmd.Stderr = transcript
	if err := g.cmd.Start(); err != nil {
		return nil, err
	}
	g.read.Go(func() {
		defer close(g.lines)
		defer transcript.Close()
		s := bufio.NewScanner(io.TeeReader(out, transcript))
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			g.lines <- strings.TrimRight(s.Text(), "\r")
		}
	})
	_, err = g.until(ctx, bootLimit, readyMark)
	if err != nil {
		g.kill()
		return nil, fmt.Errorf("boot %s: %w (see %s)", name, err, transcript.Name())
	}
	return g, nil
}

// until collects console lines until one contains mark, which is returned last.
func (g *guest) until(ctx context.Context, limit time.Duration, mark string) ([]string, error) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	var got []string
	for {
		select {
		case <-ctx.Done():
			return got, ctx.Err()
		case <-timer.C:
			return got, fmt.Errorf("%w: nothing said %q within %v", errGuest, mark, limit)
		case line, ok := <-g.lines:
			if !ok {
				return got, fmt.Errorf("%w: it ended before it said %q", errGuest, mark)
			}
			got = append(got, line)
			if strings.Contains(line, mark) {
				return got, nil
			}
		}
	}
}

// run executes one line in the guest and returns its output; an exit code other than zero is an error.
func (g *guest) run(ctx context.Context, line string) (string, error) {
	if _, err := io.WriteString(g.stdin, line+"\n"); err != nil {
		return "", err
	}
	got, err := g.until(ctx, lineLimit, doneMark)
	if err != nil {
		return "", fmt.Errorf("%s: %q: %w", g.name, line, err)
	}
	last := got[len(got)-1]
	at := strings.Index(last, doneMark)
	text := strings.TrimSpace(strings.Join(append(got[:len(got)-1], last[:at]), "\n"))
	code, err := strconv.Atoi(strings.TrimSpace(last[at+len(doneMark):]))
	if err != nil {
		return text, fmt.Errorf("%s: %q: %w", g.name, line, errGuest)
	}
	if code != 0 {
		return text, fmt.Errorf("%s: %q: %w: exit code %d: %s", g.name, line, errGuest, code, text)
	}
	return text, nil
}

// powerOff asks the guest to sync and stop, and waits until it has.
func (g *guest) powerOff(ctx context.Context) error {
	if _, err := io.WriteString(g.stdin, "sync; mount -o remount,ro /; echo b > /proc/sysrq-trigger\n"); err != nil {
		return err
	}
	ended := make(chan error, 1)
	g.read.Go(func() {
		for range g.lines { // whatever it still says
		}
	})
	g.read.Go(func() { ended <- g.cmd.Wait() })
	select {
	case err := <-ended:
		g.read.Wait()
		return err
	case <-ctx.Done():
	case <-time.After(lineLimit):
	}
	g.cmd.Process.Kill()
	g.read.Wait()
	return fmt.Errorf("%s: power off: %w", g.name, errGuest)
}

// kill ends the guest like a pulled plug.
func (g *guest) kill() {
	g.cmd.Process.Kill()
	for range g.lines {
	}
	g.read.Wait()
	g.cmd.Wait()
}

// accelerator proves KVM by booting with it, within a bound: /dev/kvm may exist and yet not run a Linux guest.
func accelerator(ctx context.Context, m machine) string {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return "tcg"
	}
	ctx, cancel := context.WithTimeout(ctx, 12*time.Second)
	defer cancel()
	m.accel = "kvm"
	g, err := m.boot(ctx, "kvm-trial", "")
	if err != nil {
		return "tcg"
	}
	g.kill()
	return "kvm"
}
