// Package blockdev is the frontend that makes a volume a block device of its host: /dev/ashlar/VOLUME is a link to a loop device, on a file
// that this process serves through FUSE.
//
//	/dev/ashlar/VOLUME ──▶ /dev/loopN ──▶ RUN/fuse/VOLUME ──▶ fuse.Session ──▶ block.Device
//	 symbolic link          kernel         a mount, one file    this process
//
// Mount, loop device and link outlive the process. What keeps them alive is the session's descriptor, which a Keeper has a copy of: requests wait
// while nobody serves, and whoever adds the volume next adopts the descriptor and goes on. Where the kernel cannot send requests again that a
// dead process had read (before 6.9), devices are of the nbd driver instead, or there are none.
//
// The serving process never does I/O on its own device, nor opens it: a thread that waits there when the process is killed could not die before the next
// process answers, which waits for the first to die. Whatever touches the file or the loop device is therefore done by a short-lived process
// of its own (Tool, tool.go), which holds no lock.
//
// Read next: frontend.go (the volumes), tool.go (what touches the device), stale.go (what dead processes leave), package export/fuse (the
// protocol), docs/formats/blockdev.md (what is relied on).
package blockdev
