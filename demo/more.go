package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"ashlar/internal/testbed"
)

// exportLive writes vm2's disk into an image file while its guest goes on writing, and lets QEMU and e2fsck judge it.
func (s *story) exportLive() error {
	s.title("An image file of a disk that is in use")
	had, err := s.lines()
	if err != nil {
		return err
	}
	file := filepath.Join(s.scratch, "vm2.qcow2")
	if err := s.show("volume", "export", "vm2", file, "--compress", "zstd"); err != nil {
		return err
	}
	for _, step := range [][]string{
		{"qemu-img", "check", "-q", file},
		{"qemu-img", "convert", "-q", "-O", "raw", file, file + ".raw"},
		{"dd", "if=" + file + ".raw", "of=" + file + ".root", "bs=1M", "skip=1", "count=1000", "conv=sparse", "status=none"},
	} {
		if err := command(s.ctx, step[0], step[1:]...); err != nil {
			return err
		}
	}
	// 1: the journal was replayed, as after a power cut; anything above is damage.
	text, err := exec.CommandContext(s.ctx, "e2fsck", "-fp", file+".root").CombinedOutput()
	if exit, ok := err.(*exec.ExitError); err != nil && (!ok || exit.ExitCode() > 1) {
		return fmt.Errorf("%w: e2fsck of the export: %w\n%s", errDemo, err, text)
	}
	now, err := s.lines()
	if err != nil {
		return err
	}
	info, err := os.Stat(file)
	if err != nil {
		return err
	}
	if err := os.Remove(file + ".raw"); err != nil {
		return err
	}
	if err := want(now > had, "vm2 did not write during the export: %d lines before, %d after", had, now); err != nil {
		return err
	}
	s.ok("%s of qcow2: `qemu-img check` finds nothing, its file system is whole, and vm2 wrote on meanwhile (%d lines before, %d after)", size(info.Size()), had, now)
	return os.Remove(file + ".root")
}

// blockDevice makes a disk for this machine itself; it stays mounted while the data process is upgraded.
func (s *story) blockDevice() error {
	s.title("A block device for this machine itself")
	for _, need := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(need); err != nil {
			fmt.Printf("--  left out: this machine has no %s\n", need)
			return nil
		}
	}
	if err := s.cli(nil, "volume", "create", "data", "--size", "256Mi", "--frontend", "blockdev"); err != nil {
		return err
	}
	if err := s.show("volume", "attach", "data"); err != nil {
		return err
	}
	var v volumeView
	if err := s.node.Run(s.ctx, &v, "volume", "show", "data"); err != nil {
		return err
	}
	s.device, s.mount = v.Controllers[0].Endpoint, filepath.Join(s.scratch, "mnt")
	if err := os.Mkdir(s.mount, 0o700); err != nil {
		return err
	}
	for _, step := range [][]string{{"mkfs.ext4", "-q", s.device}, {"mount", s.device, s.mount}, {"cp", "-r", "/etc/init.d", "/bin/bash", s.mount}, {"sync", "-f", s.mount}} {
		fmt.Println("#  " + strings.Join(step, " "))
		if err := command(s.ctx, step[0], step[1:]...); err != nil {
			return err
		}
	}
	err := s.cli(nil, "volume", "detach", "data")
	var failed *testbed.CommandError
	if err := want(errors.As(err, &failed) && failed.Code == exitConflict, "a mounted device was taken away, or something else is wrong: %v", err); err != nil {
		return err
	}
	s.ok("mounted; it is not taken away under the mount: %s", lastLine(err.Error()))
	return nil
}

// takeOver has the installed build take over, and wants vm2's connection to have been passed on: QEMU would come back after a break, too, and nobody would know.
func (s *story) takeOver() error {
	var up struct {
		Volumes []struct {
			Volume      string `json:"volume"`
			PauseMicros int64  `json:"pauseMicros"`
			Conns       int    `json:"conns"`
		} `json:"volumes"`
	}
	if err := s.cli(&up, "upgrade"); err != nil {
		return err
	}
	passed := false
	for _, v := range up.Volumes {
		fmt.Printf("   %s: paused for %.1f ms, %d connections passed on\n", v.Volume, float64(v.PauseMicros)/1000, v.Conns)
		passed = passed || v.Volume == "vm2" && v.Conns == 1
	}
	return want(passed, "vm2's connection was not passed on: %+v", up)
}

// upgrade replaces the data process by another build, with vm2 writing and the block device mounted.
func (s *story) upgrade() error {
	s.title("Upgrade the data path under running guests")
	next := s.bin + ".next"
	build := exec.CommandContext(s.ctx, "go", "build", "-trimpath", "-ldflags", "-X main.version=demo-next", "-o", next, "./cmd/ashlar")
	if text, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the next version: %w\n%s", err, text)
	}
	if err := os.Rename(next, s.bin); err != nil { // as a package's upgrade does
		return err
	}
	had, err := s.lines()
	if err != nil {
		return err
	}
	old, start := s.node.PID("data"), time.Now()
	if err := s.takeOver(); err != nil {
		return err
	}
	now, err := s.goesOn()
	if err != nil {
		return err
	}
	if err := want(s.node.PID("data") != old, "the data process is still pid %d", old); err != nil {
		return err
	}
	if err := s.noErrors(); err != nil {
		return err
	}
	s.ok("another build has every volume after %.1f s (pid %d for %d); vm2's connection never broke: %d lines before, %d after", time.Since(start).Seconds(), s.node.PID("data"), old, had, now)
	if s.device == "" {
		return nil
	}
	// Compared after it was mounted anew: what the page cache still has proves nothing.
	for _, step := range [][]string{{"cp", "/bin/ls", s.mount}, {"umount", s.mount}, {"mount", s.device, s.mount}, {"cmp", "/bin/bash", filepath.Join(s.mount, "bash")},
		{"cmp", "/bin/ls", filepath.Join(s.mount, "ls")}, {"umount", s.mount}, {"e2fsck", "-fn", s.device}} {
		fmt.Println("#  " + strings.Join(step, " "))
		if err := command(s.ctx, step[0], step[1:]...); err != nil {
			return err
		}
	}
	for _, args := range [][]string{{"volume", "detach", "data"}, {"volume", "delete", "data"}} {
		if err := s.cli(nil, args...); err != nil {
			return err
		}
	}
	s.device = ""
	s.ok("the mounted file system went on too; unmounted, e2fsck finds nothing")
	return nil
}
