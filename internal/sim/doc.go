// Package sim is a whole cluster in one goroutine bubble (testing/synctest): the real engine, replicas, wire between nodes, plans, agents and control, over disks, a
// network and a catalogue in memory that a seed breaks. Guests on every node write and read all the while, and their history must be one that a single disk could have had.
//
// What is not the real thing: the kernel (disk.Mem), TCP (net.go: streams that can be cut in one direction, late, or broken), etcd (catalog.Mem behind access.go: away,
// late, answers lost), and the data process's own shell (machine.go does what dataplane does with sockets and open.json).
//
// Read next: sim_test.go (what is broken, and what must hold), machine.go, guest.go.
package sim
