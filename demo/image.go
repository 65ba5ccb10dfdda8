package main

import (
	"context"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// guestInit is the first program of the demo's Debian: a shell on the serial console that says when a line is done.
const guestInit = `#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -o remount,rw /
stty -echo
echo
echo "ASHLAR-READY $(. /etc/os-release; echo $PRETTY_NAME)"
while IFS= read -r line; do
  eval "$line"
  echo "ASHLAR-DONE $?"
done
`

// initrdInit loads the drivers, mounts the first partition of the disk and goes there. Without a disk it is the trial boot.
const initrdInit = `#!/bin/sh
export PATH=/bin
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
while read m; do insmod /mods/$m; done < /mods/order
if [ ! -e /dev/vda1 ]; then echo "ASHLAR-READY no disk"; exec sh; fi
mount -t ext4 /dev/vda1 /root
mount --move /dev /root/dev
umount /sys; umount /proc
exec switch_root /root /sbin/ashlar-demo </root/dev/console >/root/dev/console 2>&1
`

func command(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// aptSources are this machine's own package sources, whatever they are.
func aptSources() ([]string, error) {
	var files []string
	for _, pattern := range []string{"/etc/apt/sources.list", "/etc/apt/sources.list.d/*.list", "/etc/apt/sources.list.d/debian.sources"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		files = append(files, found...)
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no apt sources on this machine: %w", os.ErrNotExist)
	}
	return files, nil
}

// makeImage builds a Debian out of its packages (a partitioned disk with an ext4 root) as a compressed qcow2.
func makeImage(ctx context.Context, scratch, qcow2 string) error {
	root := filepath.Join(scratch, "root")
	sources, err := aptSources()
	if err != nil {
		return err
	}
	args := append([]string{"--quiet", "--variant=essential", "--include=mount", "--format=directory", "bookworm", root}, sources...)
	if err := command(ctx, "mmdebstrap", args...); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(root, "sbin/ashlar-demo"), []byte(guestInit), 0o755); err != nil {
		return err
	}
	raw := filepath.Join(scratch, "disk.raw")
	fs := filepath.Join(scratch, "root.ext4")
	steps := [][]string{
		{"mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", root, fs, "1000M"},
		{"truncate", "-s", "1024M", raw},
		{"dd", "if=" + fs, "of=" + raw, "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none"},
		{"sh", "-c", `printf 'label: gpt\nstart=1MiB, size=1000MiB, type=L\n' | sfdisk -q "$1"`, "sfdisk", raw},
		{"qemu-img", "convert", "-q", "-c", "-f", "raw", "-O", "qcow2", raw, qcow2},
	}
	for _, s := range steps {
		if err := command(ctx, s[0], s[1:]...); err != nil {
			return err
		}
	}
	for _, gone := range []string{root, raw, fs} {
		if err := os.RemoveAll(gone); err != nil {
			return err
		}
	}
	return nil
}

// newestKernel returns the newest installed cloud kernel and its version.
func newestKernel() (file, version string, err error) {
	found, err := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
	if err != nil || len(found) == 0 {
		return "", "", fmt.Errorf("no cloud kernel in /boot: %w", os.ErrNotExist)
	}
	file = found[len(found)-1]
	return file, strings.TrimPrefix(filepath.Base(file), "vmlinuz-"), nil
}

// makeInitrd packs busybox and the modules that a virtio disk with ext4 needs.
func makeInitrd(ctx context.Context, scratch, version, initrd string) error {
	dir := filepath.Join(scratch, "initrd.d")
	for _, d := range []string{"bin", "mods", "dev", "proc", "sys", "root"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	if err := command(ctx, "cp", "/bin/busybox", filepath.Join(dir, "bin/busybox")); err != nil {
		return err
	}
	for _, applet := range []string{"sh", "mount", "umount", "insmod", "switch_root"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", applet)); err != nil {
			return err
		}
	}
	order := ""
	for _, module := range []string{"virtio_pci", "virtio_blk", "ext4"} {
		out, err := exec.CommandContext(ctx, "modprobe", "-S", version, "--show-depends", module).Output()
		if err != nil {
			return fmt.Errorf("modprobe %s: %w", module, err)
		}
		for _, line := range strings.Split(string(out), "\n") {
			f := strings.Fields(line)
			if len(f) < 2 || f[0] != "insmod" || strings.Contains(order, filepath.Base(f[1])+"\n") {
				continue
			}
			order += filepath.Base(f[1]) + "\n"
			if err := command(ctx, "cp", f[1], filepath.Join(dir, "mods")); err != nil {
				return err
			}
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "mods/order"), []byte(order), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "init"), []byte(initrdInit), 0o755); err != nil {
		return err
	}
	return command(ctx, "sh", "-c", `cd "$1" && find . | cpio -o -H newc -R 0:0 --quiet > "$2"`, "pack", dir, initrd)
}

func sha512File(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha512.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
