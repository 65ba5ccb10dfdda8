// Package export offers Devices to clients: the frontends. Here is NBD, on a unix socket per volume, at a path that is the same
// on every host, so that a guest's definition works wherever it runs, and beside that on one TCP port for all; package blockdev makes volumes block devices.
//
// The listening sockets do not belong to this package but to a Listeners, which may keep them beyond the life of the process: then clients
// that connect while there is no process wait in the socket's backlog, and are never refused.
//
// Read next: nbd.go (the frontend), tcp.go (all volumes on one port), listen.go (sockets), package nbd (the protocol).
package export
