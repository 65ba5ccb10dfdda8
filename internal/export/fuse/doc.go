// Package fuse is a FUSE server of one regular file, which is a block.Device: just enough of the kernel's protocol to put a loop device on it.
// It exists because the session must outlive the process that serves it: a Session can be started on a descriptor that another process
// negotiated (Adopt), and it asks the kernel to send again what that process had read and not answered (FUSE_NOTIFY_RESEND).
//
//	              Mount                Adopt (the descriptor was kept)
//	new session ─────────▶ serving ◀──────────────────────── waiting
//	                         │  └────────── Detach ────────────▲   requests wait in the kernel
//	                         └── Close, or the mount ends ──▶ ended
//
// Sources: linux/include/uapi/linux/fuse.h (protocol 7.45), linux/fs/fuse/dev.c, man 4 fuse.
//
// Read next: wire.go (the bytes), session.go (who reads and who serves), serve.go (requests to Device calls), buffer.go, and package
// export/blockdev, which puts the loop device on it. docs/formats/blockdev.md says what is relied on, and why a request may be carried out twice.
package fuse
