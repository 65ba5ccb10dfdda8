package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"ashlar/internal/testbed"
)

// story is the demo's state: what was made, who is running.
type story struct {
	ctx     context.Context
	scratch string
	node    *testbed.Process
	guests  map[string]*guest
	machine machine
	web     *http.Server
	webDone chan error
	url     string
	sum     string
	before  string // checksum that the guest printed of its file
	oks     int
	bin     string // the program that runs
	device  string // a block device that is attached, and where it is mounted
	mount   string
}

var errDemo = errors.New("not as promised")

// Exit codes of the command line, docs/cli.md.
const (
	exitConflict = 4
	exitRefused  = 6
)

func (s *story) title(text string) { fmt.Printf("\n== %s\n", text) }

func (s *story) ok(format string, args ...any) {
	s.oks++
	fmt.Printf("ok  "+format+"\n", args...)
}

// want turns a broken promise into an error.
func want(held bool, format string, args ...any) error {
	if held {
		return nil
	}
	return fmt.Errorf("%w: %s", errDemo, fmt.Sprintf(format, args...))
}

// makeParts builds the image, the initrd, finds the accelerator, and serves the image over HTTP.
func (s *story) makeParts() error {
	s.title("A golden image, made from Debian's packages")
	qcow2 := filepath.Join(s.scratch, "debian.qcow2")
	start := time.Now()
	if err := makeImage(s.ctx, s.scratch, qcow2); err != nil {
		return err
	}
	info, err := os.Stat(qcow2)
	if err != nil {
		return err
	}
	s.ok("debian.qcow2: GPT, ext4 root, compressed, %s (made in %.0f s)", size(info.Size()), time.Since(start).Seconds())
	if s.sum, err = sha512File(qcow2); err != nil {
		return err
	}
	kernel, version, err := newestKernel()
	if err != nil {
		return err
	}
	s.machine = machine{kernel: kernel, initrd: filepath.Join(s.scratch, "initrd.img"), scratch: s.scratch}
	if err := makeInitrd(s.ctx, s.scratch, version, s.machine.initrd); err != nil {
		return err
	}
	s.machine.accel = accelerator(s.ctx, s.machine)
	s.ok("guests will run on kernel %s with %s (KVM is used only where a trial boot proves it)", version, s.machine.accel)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s.web = &http.Server{Handler: http.FileServer(http.Dir(s.scratch)), ReadHeaderTimeout: time.Minute}
	s.webDone = make(chan error, 1)
	s.machine.serve(s.web, l, s.webDone)
	s.url = "http://" + l.Addr().String() + "/debian.qcow2"
	s.ok("served at %s", s.url)
	s.title("One node, nothing else installed")
	return nil
}

// cli runs the command line and shows it as a person would type it.
func (s *story) cli(out any, args ...string) error {
	fmt.Println("$  ashlar " + strings.Join(args, " "))
	return s.node.Run(s.ctx, out, args...)
}

// show runs the command line and shows what it printed.
func (s *story) show(args ...string) error {
	fmt.Println("$  ashlar " + strings.Join(args, " "))
	text, err := s.node.Text(s.ctx, args...)
	for _, line := range strings.Split(strings.TrimRight(text, "\n"), "\n") {
		fmt.Println("   " + line)
	}
	return err
}

type imageView struct {
	Name            string `json:"name"`
	Size            int64  `json:"size"`
	VirtualSize     int64  `json:"virtualSize"`
	CurrentChecksum string `json:"currentChecksum"`
}

type volumeView struct {
	Name        string `json:"name"`
	State       string `json:"state"`
	Robustness  string `json:"robustness"`
	Controllers []struct {
		Endpoint string `json:"endpoint"`
	} `json:"controllers"`
	Replicas []struct {
		DataPath string `json:"dataPath"`
	} `json:"replicas"`
}

func (s *story) importImage() error {
	s.title("Import it, verified")
	wrong := strings.Repeat("0", 128)
	err := s.cli(nil, "image", "import", "forged", s.url, "--checksum", "sha512:"+wrong)
	var failed *testbed.CommandError
	if err := want(errors.As(err, &failed) && failed.Code == exitRefused, "an image with a wrong checksum was not refused: %v", err); err != nil {
		return err
	}
	s.ok("a wrong checksum is refused: %s", lastLine(failed.Stderr))
	if err := s.cli(nil, "image", "delete", "forged"); err != nil {
		return err
	}
	start := time.Now()
	if err := s.cli(nil, "image", "import", "debian", s.url, "--checksum", "sha512:"+s.sum); err != nil {
		return err
	}
	took := time.Since(start)
	var img imageView
	if err := s.cli(&img, "image", "show", "debian"); err != nil {
		return err
	}
	if err := want(img.CurrentChecksum == s.sum && img.VirtualSize == 1<<30, "image shows %+v", img); err != nil {
		return err
	}
	s.ok("imported in %.1f s: %s as received, %s of disk, checksum as given", took.Seconds(), size(img.Size), size(img.VirtualSize))
	return nil
}

func (s *story) createVolumes() error {
	s.title("Two volumes from one image")
	for _, name := range []string{"vm1", "vm2"} {
		start := time.Now()
		if err := s.cli(nil, "volume", "create", name, "--size", "4Gi", "--image", "debian"); err != nil {
			return err
		}
		created := time.Since(start)
		if name == "vm1" {
			if err := s.show("volume", "attach", name); err != nil {
				return err
			}
		} else if err := s.cli(nil, "volume", "attach", name); err != nil {
			return err
		}
		var v volumeView
		if err := s.node.Run(s.ctx, &v, "volume", "show", name); err != nil {
			return err
		}
		if err := want(v.State == "attached" && len(v.Controllers) == 1, "%s is %+v", name, v); err != nil {
			return err
		}
		if _, err := os.Stat(s.socket(name)); err != nil {
			return err
		}
		s.ok("%s: 4 GiB, created in %d ms, created and attached in %d ms (each with the start of the command)", name, created.Milliseconds(), time.Since(start).Milliseconds())
	}
	return nil
}

func (s *story) socket(volume string) string {
	return filepath.Join(s.node.RunDir, "nbd", volume+".sock")
}

func (s *story) boot(name string) error {
	g, err := s.machine.boot(s.ctx, name, s.socket(name))
	if err != nil {
		return err
	}
	s.guests[name] = g
	return nil
}

func (s *story) bootBoth() error {
	s.title("Boot a guest from each, at the same time")
	start := time.Now()
	if err := s.machine.bootAll(s, "vm1", "vm2"); err != nil {
		return err
	}
	s.ok("both are up after %.1f s", time.Since(start).Seconds())
	for _, name := range []string{"vm1", "vm2"} {
		text, err := s.guests[name].run(s.ctx, `. /etc/os-release; echo "$PRETTY_NAME, root on $(grep ' / ' /proc/mounts | cut -d' ' -f1,3)"`)
		if err != nil {
			return err
		}
		if err := want(strings.Contains(text, "Debian") && strings.Contains(text, "ext4"), "%s says %q", name, text); err != nil {
			return err
		}
		s.ok("%s: %s", name, text)
	}
	return nil
}

func (s *story) snapshotAndChange() error {
	s.title("Write in one, snapshot it while it runs, write more")
	vm1 := s.guests["vm1"]
	var err error
	if s.before, err = vm1.run(s.ctx, "head -c 20000000 /dev/urandom > /root/before; sync; sha256sum < /root/before"); err != nil {
		return err
	}
	start := time.Now()
	if err := s.cli(nil, "snapshot", "create", "vm1", "clean"); err != nil {
		return err
	}
	s.ok("snapshot of the running guest in %d ms", time.Since(start).Milliseconds())
	if _, err := vm1.run(s.ctx, "echo ruined > /etc/os-release; head -c 30000000 /dev/urandom > /root/after; rm /root/before; sync"); err != nil {
		return err
	}
	if text, err := s.guests["vm2"].run(s.ctx, "ls /root | wc -l"); err != nil || text != "0" {
		return fmt.Errorf("%w: vm2 sees vm1's files: %q, %v", errDemo, text, err)
	}
	s.ok("vm1 ruined itself; vm2 sees nothing of it")
	return s.show("snapshot", "list", "vm1")
}

// writer is what vm2 does all the time from now on: it appends numbered lines, each forced to the disk, and stops at the first error.
const writer = `: > /root/log; ( n=0; while [ ! -e /stop ]; do n=$((n+1)); echo "line $n" >> /root/log && sync /root/log || { echo "failed at $n" > /dev/shm-failed; break; }; done ) & true`

func (s *story) lines() (int, error) {
	text, err := s.guests["vm2"].run(s.ctx, "wc -l < /root/log")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(text))
}

// progress waits until vm2 has written more than it had.
func (s *story) progress(had int) (int, error) {
	now := had
	err := testbed.Until(s.ctx, 30*time.Second, func() (bool, error) {
		var err error
		now, err = s.lines()
		return now > had+20, err
	})
	return now, err
}

// goesOn waits until vm2 has written more than it has now.
func (s *story) goesOn() (int, error) {
	had, err := s.lines()
	if err != nil {
		return 0, err
	}
	return s.progress(had)
}

func (s *story) noErrors() error {
	text, err := s.guests["vm2"].run(s.ctx, `dmesg | grep -cE 'I/O error|EXT4-fs (error|warning)|Buffer I/O|Remounting' ; ls /dev/shm-failed 2>/dev/null; true`)
	if err != nil {
		return err
	}
	return want(text == "0", "vm2 saw an error: %q", text)
}

func (s *story) killServe() error {
	s.title("Kill the control plane under the running guests")
	if _, err := s.guests["vm2"].run(s.ctx, writer); err != nil {
		return err
	}
	had, err := s.progress(0)
	if err != nil {
		return err
	}
	data := s.node.PID("data")
	if err := s.node.KillServe(); err != nil {
		return err
	}
	now, err := s.goesOn()
	if err != nil {
		return err
	}
	s.ok("`ashlar serve` is dead (kill -9); vm2 went on writing: %d lines before, %d after", had, now)
	start := time.Now()
	if err := s.node.StartServe(s.ctx); err != nil {
		return err
	}
	if err := want(s.node.PID("data") == data && data != 0, "the data process changed from %d to %d", data, s.node.PID("data")); err != nil {
		return err
	}
	if err := s.noErrors(); err != nil {
		return err
	}
	s.ok("started again in %d ms, it found the same data process (pid %d); the guest noticed nothing", time.Since(start).Milliseconds(), data)
	return nil
}

func (s *story) killData() error {
	s.title("Kill the data process itself")
	had, err := s.lines()
	if err != nil {
		return err
	}
	old := s.node.PID("data")
	start := time.Now()
	if err := s.node.Kill("data"); err != nil {
		return err
	}
	if err := testbed.Until(s.ctx, 20*time.Second, func() (bool, error) {
		pid := s.node.PID("data")
		return pid != 0 && pid != old, nil
	}); err != nil {
		return err
	}
	now, err := s.goesOn()
	if err != nil {
		return err
	}
	if err := s.noErrors(); err != nil {
		return err
	}
	s.ok("the holder started another (pid %d for %d); QEMU reconnected and vm2 writes on after %.1f s: %d lines before, %d after, no error", s.node.PID("data"), old, time.Since(start).Seconds(), had, now)
	return nil
}

func (s *story) revert() error {
	s.title("Take the ruined guest back to its snapshot")
	if err := s.guests["vm1"].powerOff(s.ctx); err != nil {
		return err
	}
	delete(s.guests, "vm1")
	start := time.Now()
	for _, args := range [][]string{{"volume", "detach", "vm1"}, {"snapshot", "revert", "vm1", "clean"}, {"volume", "attach", "vm1"}} {
		if err := s.cli(nil, args...); err != nil {
			return err
		}
	}
	s.ok("detached, reverted, attached in %d ms", time.Since(start).Milliseconds())
	if err := s.boot("vm1"); err != nil {
		return err
	}
	text, err := s.guests["vm1"].run(s.ctx, "sha256sum < /root/before; ls /root; . /etc/os-release; echo $PRETTY_NAME")
	if err != nil {
		return err
	}
	held := strings.HasPrefix(text, s.before) && !strings.Contains(text, "after") && strings.Contains(text, "Debian")
	if err := want(held, "after the revert vm1 says %q, want checksum %s", text, s.before); err != nil {
		return err
	}
	s.ok("vm1 boots again: its file has the checksum it had, what came after is gone")
	return nil
}
