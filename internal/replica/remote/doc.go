// Package remote is a replica on another node, both ends of the wire: NBD for its bytes and JSON over HTTP for its verbs. docs/formats/remote.md is normative.
//
// The engine's end is a Replica. Its bytes go over a line (line.go): one NBD connection that is made anew whenever it breaks or falls silent, and whose unanswered requests are sent
// again. Each new connection of a Replica begins with a fence of a higher number (replica.go), so that whatever the old one still had under way at the peer has ended before anything is
// sent again. The other end is a Server (server.go), in the process that has the replicas open: opened.go counts who uses which replica, answer.go does the verbs, bytes.go the NBD exports.
//
// Read next: docs/formats/remote.md, remote.go, line.go, replica.go, server.go.
package remote
