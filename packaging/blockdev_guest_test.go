//go:build integration

package main

import (
	"strings"
	"testing"
)

// writer begins to write files directly to /mnt, to read them back and to compare, until /root/stop is there. /root/count says how many, /root/code how it ended.
const writer = `printf 'n=0; while ! test -e /root/stop; do dd if=/dev/urandom of=/root/src bs=64k count=4 status=none; ` +
	`dd if=/root/src of=/mnt/f$((n %% 8)) bs=16k oflag=direct conv=fsync status=none || exit 1; ` +
	`dd if=/mnt/f$((n %% 8)) of=/root/back bs=64k iflag=direct status=none || exit 2; ` +
	`cmp /root/src /root/back || exit 3; n=$((n + 1)); echo $n > /root/count; done' > /root/writer; ` +
	`echo 0 > /root/count; (sh /root/writer > /root/writer.log 2>&1; echo $? > /root/code) &`

// wroteMore waits until the writer has finished two files more.
const wroteMore = `c=$(cat /root/count); for i in $(seq 60); do sleep 0.5; test "$(cat /root/count)" -gt $((c + 1)) && break; done; test "$(cat /root/count)" -gt $((c + 1))`

// TestBlockDeviceOfAnOlderKernel is the block device on Debian's kernel 6.1, where FUSE cannot send again what a dead process had read: it is the nbd driver's, and the data process may be killed
// and replaced under it.
func TestBlockDeviceOfAnOlderKernel(t *testing.T) {
	m := newMachine(t, packages(t)...)
	defer m.kill()
	m.boot()
	m.do("dpkg -i /root/ashlar_0.9.1_amd64.deb > /root/dpkg.log")
	m.do("rmmod nbd; ashlar volume create b1 --size 64Mi --frontend blockdev && ashlar volume attach b1") // it is loaded again by who needs it
	if dev := m.do("for i in $(seq 60); do test -e /dev/ashlar/b1 && break; sleep 0.5; done; readlink /dev/ashlar/b1"); !strings.HasPrefix(dev, "/dev/nbd") {
		t.Fatalf("the block device is %s", dev)
	}

	// Five kills under a file system that is written to: a pause each, and no error.
	m.do("mkfs.ext4 -q /dev/ashlar/b1 && mount /dev/ashlar/b1 /mnt")
	m.do(writer)
	m.do(wroteMore)
	for range 5 {
		m.killed("ashlar-data@0.9.1.service", wroteMore)
	}
	m.do("dpkg -i /root/ashlar_0.9.2_amd64.deb > /root/dpkg.log && ashlar upgrade") // and one in order
	m.do(wroteMore)
	m.do("touch /root/stop; for i in $(seq 60); do test -e /root/code && break; sleep 0.5; done; cat /root/writer.log; test $(cat /root/code) = 0")

	// In use it stays; then it goes, and all that belongs to it.
	m.refused("ashlar volume detach b1", "mounted or open")
	m.do("umount /mnt && e2fsck -fn /dev/ashlar/b1 && ! dmesg | grep 'I/O error'")
	m.do("ashlar volume detach b1 && test ! -e /dev/ashlar/b1 && ! cat /sys/block/nbd*/backend")

	m.off("systemctl poweroff")
}
