//go:build integration

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
	"testing"
	"time"
)

// This file installs the package in a real Debian with systemd: made by mmdebstrap, booted in QEMU (TCG), spoken to through a shell on its serial line.

const (
	readyMark = "ASHLAR-READY"
	doneMark  = "ASHLAR-DONE "
	bootLimit = 4 * time.Minute
	lineLimit = 3 * time.Minute
)

// connect makes the volume the machine's disk again, and looks whether what was written is on it.
const connect = "nbd-client -unix /run/ashlar/nbd/v1.sock -N v1 /dev/nbd0 && mount /dev/nbd0 /mnt && sha256sum -c /root/sum"

// shellUnit is a shell on the serial line that says how each line ended.
const shellUnit = `[Unit]
After=multi-user.target
[Service]
ExecStart=/bin/sh -c 'stty -echo -F /dev/ttyS0; echo; echo ` + readyMark + `; while read -r line; do eval "$line" </dev/null 2>&1; echo "` + doneMark + `$?"; done'
StandardInput=tty-force
StandardOutput=tty
TTYPath=/dev/ttyS0
Environment=HOME=/root TERM=dumb DEBIAN_FRONTEND=noninteractive
[Install]
WantedBy=multi-user.target
`

// guestsUnit stands where libvirtd does at boot: it notes whether the exports were there before it.
const guestsUnit = `[Unit]
Description=Where guests would start
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'test -S /run/ashlar/nbd/v1.sock && echo there > /root/at-boot || echo missing > /root/at-boot'
[Install]
WantedBy=multi-user.target
`

// machine is one Debian on a disk image of its own.
type machine struct {
	t    *testing.T
	disk string
	cmd  *exec.Cmd
	in   io.WriteCloser
	line chan string
	wg   sync.WaitGroup
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// newMachine makes the disk: Debian, this machine's guest kernel's modules, and the packages in /root.
func newMachine(t *testing.T, packages ...string) *machine {
	t.Helper()
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	args := []string{"--quiet", "--variant=minbase", "--include=systemd,systemd-sysv,udev,kmod,e2fsprogs,nbd-client,procps,debconf", "--format=directory", "bookworm", root}
	for _, pattern := range []string{"/etc/apt/sources.list", "/etc/apt/sources.list.d/*.list", "/etc/apt/sources.list.d/debian.sources"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, found...)
	}
	run(t, "mmdebstrap", args...)
	_, version := kernel(t)
	run(t, "mkdir", "-p", filepath.Join(root, "lib/modules"))
	run(t, "cp", "-a", "/lib/modules/"+version, filepath.Join(root, "lib/modules"))
	for name, content := range map[string]string{
		"etc/systemd/system/serial-shell.service": shellUnit,
		"etc/systemd/system/libvirtd.service":     guestsUnit,
		"etc/fstab":                               "/dev/vda / ext4 defaults 0 1\n",
		"etc/hostname":                            "kvm1\n",
		"etc/modules-load.d/test.conf":            "nbd\nfuse\nloop\n",
	} {
		if err := put(filepath.Join(root, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	wants := filepath.Join(root, "etc/systemd/system/multi-user.target.wants")
	run(t, "mkdir", "-p", wants)
	for _, unit := range []string{"serial-shell", "libvirtd"} {
		run(t, "ln", "-s", "/etc/systemd/system/"+unit+".service", wants)
	}
	run(t, "ln", "-s", "/dev/null", filepath.Join(root, "etc/systemd/system/serial-getty@ttyS0.service")) // the line is ours
	for _, p := range packages {
		run(t, "cp", p, filepath.Join(root, "root"))
	}
	m := &machine{t: t, disk: filepath.Join(dir, "disk.raw")}
	run(t, "mke2fs", "-q", "-t", "ext4", "-d", root, m.disk, "3G")
	run(t, "rm", "-rf", root)
	return m
}

func kernel(t *testing.T) (file, version string) {
	t.Helper()
	found, err := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
	if err != nil || len(found) == 0 {
		t.Fatal("no cloud kernel in /boot")
	}
	file = found[len(found)-1]
	return file, strings.TrimPrefix(filepath.Base(file), "vmlinuz-")
}

// boot starts the machine and waits for its shell.
func (m *machine) boot() {
	m.t.Helper()
	file, version := kernel(m.t)
	m.cmd = exec.Command("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "q35", "-m", "1024", "-smp", "2", "-display", "none", "-nodefaults", "-serial", "stdio", "-no-reboot",
		"-kernel", file, "-initrd", "/boot/initrd.img-"+version, "-append", "root=/dev/vda rw console=ttyS0 panic=-1 quiet mitigations=off nokaslr no_timer_check cryptomgr.notests systemd.show_status=0",
		"-drive", "file="+m.disk+",format=raw,if=virtio,cache=writeback,discard=unmap")
	var err error
	if m.in, err = m.cmd.StdinPipe(); err != nil {
		m.t.Fatal(err)
	}
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	m.cmd.Stderr = os.Stderr
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.line = make(chan string, 65536)
	m.wg.Go(func() {
		defer close(m.line)
		for s := bufio.NewScanner(out); s.Scan(); {
			m.line <- strings.TrimRight(s.Text(), "\r")
		}
	})
	began := time.Now()
	if _, err := m.until(bootLimit, readyMark); err != nil {
		m.t.Fatalf("boot: %v", err)
	}
	m.t.Logf("booted in %v", time.Since(began).Round(time.Second))
}

var errSilent = errors.New("the machine did not say it")

// until collects lines until one holds mark, which comes last.
func (m *machine) until(limit time.Duration, mark string) ([]string, error) {
	ctx, cancel := context.WithTimeout(m.t.Context(), limit)
	defer cancel()
	var got []string
	for {
		select {
		case l, ok := <-m.line:
			if !ok {
				return got, fmt.Errorf("%w: %q; it ended after:\n%s", errSilent, mark, strings.Join(got, "\n"))
			}
			if got = append(got, l); strings.Contains(l, mark) {
				return got, nil
			}
		case <-ctx.Done():
			return got, fmt.Errorf("%w: %q within %v, only:\n%s", errSilent, mark, limit, strings.Join(got, "\n"))
		}
	}
}

// try runs one line and returns what it printed and its exit code.
func (m *machine) try(line string) (string, int) {
	m.t.Helper()
	if _, err := io.WriteString(m.in, line+"\n"); err != nil {
		m.t.Fatal(err)
	}
	got, err := m.until(lineLimit, doneMark)
	if err != nil {
		m.t.Fatalf("%s: %v", line, err)
	}
	last := got[len(got)-1]
	at := strings.Index(last, doneMark)
	code, err := strconv.Atoi(strings.TrimSpace(last[at+len(doneMark):]))
	if err != nil {
		m.t.Fatalf("%s: %q", line, last)
	}
	return strings.TrimSpace(strings.Join(append(got[:len(got)-1], last[:at]), "\n")), code
}

// do runs one line that must succeed.
func (m *machine) do(line string) string {
	m.t.Helper()
	out, code := m.try(line)
	m.t.Logf("# %s\n%s", line, out)
	if code != 0 {
		logs, _ := m.try("journalctl --no-pager -n 60 -u 'ashlar*'; tail -n 20 /run/ashlar/data.log")
		m.t.Fatalf("%s: exit code %d\n%s", line, code, logs)
	}
	return out
}

// killed kills a unit's main process, runs a line that must succeed, and wants another process to be in its place.
func (m *machine) killed(unit, then string) {
	m.t.Helper()
	pid := "systemctl show -p MainPID --value " + unit
	m.do("old=$(" + pid + "); test \"$old\" -gt 0 && systemctl kill -s KILL " + unit + " && " + then +
		" && for i in $(seq 300); do new=$(" + pid + "); test \"$new\" -gt 0 && test \"$new\" != \"$old\" && break; sleep 0.1; done; test \"$new\" -gt 0 && test \"$new\" != \"$old\"")
}

// refused runs one line that must fail and say want.
func (m *machine) refused(line, want string) {
	m.t.Helper()
	out, code := m.try(line)
	m.t.Logf("# %s\n%s", line, out)
	if code == 0 || !strings.Contains(out, want) {
		m.t.Errorf("%s: exit code %d, said %q; want a refusal with %q", line, code, out, want)
	}
}

// off says how the machine is to go, and waits until it is gone.
func (m *machine) off(line string) {
	m.t.Helper()
	if _, err := io.WriteString(m.in, line+"\n"); err != nil {
		m.t.Fatal(err)
	}
	timer := time.AfterFunc(lineLimit, func() { _ = m.cmd.Process.Kill() })
	for range m.line {
	}
	m.wg.Wait()
	err := m.cmd.Wait()
	if !timer.Stop() || err != nil {
		m.t.Errorf("%s: it did not go in order: %v", line, err)
	}
	m.cmd = nil
}

func (m *machine) kill() {
	if m.cmd != nil {
		_ = m.cmd.Process.Kill()
		for range m.line {
		}
		m.wg.Wait()
		_ = m.cmd.Wait()
	}
}

// packages builds two packages that differ in their version only.
func packages(t *testing.T) []string {
	t.Helper()
	dir := t.TempDir()
	var out []string
	for _, version := range []string{"0.9.1", "0.9.2"} {
		binary := filepath.Join(dir, "ashlar-"+version)
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X main.version="+version, "-o", binary, "./cmd/ashlar")
		cmd.Dir = ".."
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build: %v\n%s", err, text)
		}
		t.Chdir("..")
		name, err := build(binary, version, dir)
		t.Chdir("packaging")
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, name)
	}
	return out
}

// tour is the README's five minutes, from the installed package: nobody but root, no flags but those that stand there, and the guest's own part by hand.
func (m *machine) tour() {
	m.t.Helper()
	const scribble = "nbd-client -unix /run/ashlar/nbd/vm1.sock -N vm1 /dev/nbd1 && dd if=/dev/urandom of=/dev/nbd1 bs=1M count=1 oflag=direct status=none && nbd-client -d /dev/nbd1"
	m.do("truncate -s 32M /root/golden.raw && dd if=/dev/urandom of=/root/golden.raw bs=1M count=4 conv=notrunc status=none")
	m.do("ashlar image import debian /root/golden.raw --checksum sha512:$(sha512sum /root/golden.raw | cut -d' ' -f1)")
	m.do("ashlar volume create vm1 --size 64Mi --image debian")
	m.do("ashlar volume attach vm1 | grep reconnect-delay=30")
	m.do("ashlar snapshot create vm1 before-upgrade")
	m.do("ashlar volume limit vm1 --iops 2000 --bandwidth 200Mi")
	m.do(scribble)
	m.do("ashlar volume export vm1 /root/vm1.qcow2 --compress zstd && test -s /root/vm1.qcow2")
	m.do("ashlar snapshot diff vm1 before-upgrade | grep '^1 MiB in '")
	m.do("ashlar volume detach vm1 && ashlar snapshot revert vm1 before-upgrade && ashlar volume attach vm1")
	m.do("nbd-client -unix /run/ashlar/nbd/vm1.sock -N vm1 /dev/nbd1 && cmp -n 33554432 /dev/nbd1 /root/golden.raw && nbd-client -d /dev/nbd1")
	m.do("ashlar volume detach vm1 && ashlar volume delete vm1 && ashlar image delete debian && rm /root/golden.raw /root/vm1.qcow2")
}

// TestInstallRebootUpgradeRemovePurge does with the package what its users do.
func TestInstallRebootUpgradeRemovePurge(t *testing.T) {
	m := newMachine(t, packages(t)...)
	defer m.kill()
	m.boot()

	// Install: the node runs, and the command line finds it without set-up.
	m.do("dpkg -i /root/ashlar_0.9.1_amd64.deb")
	m.do("systemctl is-active ashlar.service ashlar-hold.service")
	m.do("ashlar status")
	m.do("ashlar volume create v1 --size 64Mi && ashlar volume attach v1 --frontend nbd")
	m.do("nbd-client -unix /run/ashlar/nbd/v1.sock -N v1 /dev/nbd0 && mkfs.ext4 -q /dev/nbd0 && mount /dev/nbd0 /mnt && dd if=/dev/urandom of=/mnt/f bs=1M count=8 status=none && sync && sha256sum /mnt/f > /root/sum")
	m.do("test \"$(systemctl show -p ActiveState --value 'ashlar-data@0.9.1.service')\" = active")
	m.do("test $(stat -c %a /run/ashlar/api.sock) = 600")

	m.tour()

	// Kill what must come back by itself. The kernel's client does not connect again (nbd-client 3.24 with netlink, whatever -persist says), so that
	// it lets go before the data process dies; it connects while nobody serves, to the socket that the holder keeps.
	m.do("umount /mnt && nbd-client -d /dev/nbd0")
	m.killed("ashlar-data@0.9.1.service", connect)
	m.killed("ashlar-hold.service", "ashlar status --until-attached")
	m.do("dd if=/dev/urandom of=/mnt/g bs=64k count=16 oflag=direct conv=fsync status=none && echo 3 > /proc/sys/vm/drop_caches && sha256sum -c /root/sum")

	// Reboot: exports are there before whoever starts guests.
	m.do("umount /mnt && nbd-client -d /dev/nbd0")
	m.off("systemctl reboot")
	m.boot()
	if got := m.do("cat /root/at-boot"); got != "there" {
		t.Errorf("when guests would start, the export was %s", got)
	}
	m.do(connect)

	// Upgrade under load: no error for the writer, first of the package, then of the data process.
	m.do("(while :; do dd if=/dev/urandom of=/mnt/g bs=64k count=16 oflag=direct conv=fsync status=none || { echo failed > /root/load; exit; }; echo ok > /root/load; test -e /root/stop && exit; done) > /root/load.log 2>&1 & echo $! > /root/writer")
	before := m.do("systemctl show -p MainPID --value ashlar-data@0.9.1.service")
	m.do("dpkg -i /root/ashlar_0.9.2_amd64.deb")
	m.do("ashlar version && ashlar status --until-attached")
	if after := m.do("systemctl show -p MainPID --value ashlar-data@0.9.1.service"); after != before {
		t.Errorf("the package's upgrade replaced the data process: %s, was %s", after, before)
	}
	m.do("ashlar upgrade")
	m.do("test \"$(systemctl show -p ActiveState --value 'ashlar-data@0.9.2.service')\" = active")
	m.do("rm -f /root/load; for i in $(seq 300); do test -e /root/load && break; sleep 0.1; done; touch /root/stop; for i in $(seq 300); do kill -0 $(cat /root/writer) 2>/dev/null || break; sleep 0.1; done; cat /root/load.log; test $(cat /root/load) = ok")
	m.do("echo 3 > /proc/sys/vm/drop_caches && sha256sum -c /root/sum")
	m.do("ashlar doctor || test $? = 7")

	// Remove is refused while a guest's disk is attached; removal keeps data; purge keeps it too unless somebody says otherwise.
	m.refused("dpkg -r ashlar", "attached")
	m.do("umount /mnt && nbd-client -d /dev/nbd0 && ashlar volume detach v1")
	m.do("dpkg -r ashlar && test -e /var/lib/ashlar/etcd && test -e /etc/ashlar/ashlar.toml && ! pgrep -x ashlar")
	m.do("dpkg -P ashlar && test -e /var/lib/ashlar/etcd && test ! -e /etc/ashlar")
	m.do("dpkg -i /root/ashlar_0.9.2_amd64.deb && ashlar volume attach v1 --frontend nbd && " + connect + " && umount /mnt && nbd-client -d /dev/nbd0")
	m.do("ashlar shutdown --force && echo ashlar ashlar/delete-data boolean true | debconf-set-selections && dpkg -P ashlar && test ! -e /var/lib/ashlar")
	m.off("systemctl poweroff")
}
