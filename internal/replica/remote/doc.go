// Package remote is a replica on another node, both ends of the wire: NBD for its bytes and JSON over HTTP for its verbs. docs/formats/remote.md is normative.
//
// A Replica is the engine's end: it connects again by itself when the connection breaks or the peer falls silent, and sends again what was not answered. A Server is the
// other end, in the process that has the replica open.
//
// Read next: docs/formats/remote.md.
package remote
