// Package dataplane is the data process of a node (`ashlar data`): what is open here, and everything that keeps it open. It owns the files, the listening
// sockets and the guests' I/O; it knows nothing of the catalogue, and outlives the agent that tells it what to do.
//
//	        agent ──verbs──▶ control socket ─▶ Process ─┬─ disks.go     directories with replicas and images
//	          ▲                                         ├─ replicas.go  made and deleted on them
//	ledger.sock ◀─ wireLedger ◀─ volume.Volume ◀────────┼─ volumes.go   opened, exported, reopened, closed
//	                                                    ├─ operate.go   verbs on open volumes
//	   other nodes ──TLS──▶ cluster.go ─▶ held.go: replicas that are open here, shared
//	        guest ──NBD──▶ export ─▶ Gate ─▶ …          └─ images.go    imports in work processes
//
// Killed at any instant, it is started again by the holder (package hold), reads open.json (openlist.go) and takes every volume up where it was, without
// the catalogue; clients wait in the backlog of listening sockets that the holder kept.
//
// A volume's replica may be another node's (member.go, package replica/remote); then its I/O waits while that is away, and nothing else does.
//
// Read next: run.go (the life of the process), then volumes.go; docs/formats/open.md and docs/formats/disk.md; package client (the wire).
package dataplane
