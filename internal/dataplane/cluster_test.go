package dataplane

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/block/blocktest"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/disk"
	"ashlar/internal/nbd"
	"ashlar/internal/replica/local"
)

// town is nodes of one cluster on this host: each a bed with a certificate of its own, one catalogue for all of them.
type town struct {
	t    *testing.T
	ca   *authority
	dir  string
	beds []*bed
	set  []client.Cluster // what each was told
}

// newTown makes n nodes, of which nobody was told yet (tell).
// townClose is how long a volume's close waits for a node that is away, when nobody forces it. What must not wait for it is held to half of it, so that a machine may stall.
const townClose = 40 * time.Second

func newTown(t *testing.T, n int, makeBed func(*testing.T) *bed) *town {
	t.Helper()
	w := &town{t: t, ca: newAuthority(t), dir: t.TempDir()}
	authority := w.ca.file(w.dir, "ca.crt")
	var peers []client.Peer
	for i := range n {
		b := makeBed(t)
		b.node = fmt.Sprintf("node%d", i+1)
		b.cfg.BootID = fmt.Sprintf("00000000-1111-2222-3333-%012d", i+1)
		b.cfg.far = farTimes{beat: 100 * time.Millisecond, silence: 400 * time.Millisecond, open: 2 * time.Second, close: townClose, last: 500 * time.Millisecond, look: 20 * time.Millisecond, confirm: 100 * time.Millisecond}
		if i > 0 {
			b.cat.of = w.beds[0].cat
		}
		cert, key := w.certificate(b.node, id("node", i+1))
		peers = append(peers, client.Peer{Node: b.node, NodeID: id("node", i+1), Data: freeAddress(t), Ledger: freeAddress(t)})
		w.beds = append(w.beds, b)
		w.set = append(w.set, client.Cluster{ClusterID: testCluster, Node: b.node, Listen: peers[i].Data, CertFile: cert, KeyFile: key, CAFile: authority})
	}
	t.Cleanup(func() { // before the node that has the replicas goes
		for _, b := range w.beds {
			b.end()
		}
	})
	for i := range w.set {
		w.set[i].Peers = slices.Delete(slices.Clone(peers), i, i+1)
	}
	return w
}

// certificate issues a node's.
func (w *town) certificate(node, nodeID string) (cert, key string) {
	u, err := url.Parse("ashlar://" + testCluster + "/" + nodeID)
	if err != nil {
		w.t.Fatal(err)
	}
	w.ca.uris = []*url.URL{u}
	return w.ca.write(w.dir, node, time.Now().Add(time.Hour))
}

// tell tells node i, by its client, of the cluster.
func (w *town) tell(i int, c *client.Client) {
	w.t.Helper()
	if err := c.SetCluster(w.t.Context(), w.set[i]); err != nil {
		w.t.Fatalf("node %d: %v", i+1, err)
	}
}

// ready starts every node's data process, with its disk.
func (w *town) ready() (clients []*client.Client) {
	w.t.Helper()
	for i, b := range w.beds {
		c := b.ready()
		w.tell(i, c)
		clients = append(clients, c)
	}
	return clients
}

// farVolume makes a volume whose replica is node at's, to be opened by node by; numbers from 0.
func (w *town) farVolume(c *client.Client, n, at, by int) client.OpenVolume {
	w.t.Helper()
	return w.openBy(w.beds[at].volume(c, n, 16*mib), at, by)
}

func (w *town) openBy(a client.OpenVolume, at, by int) client.OpenVolume {
	a.Node, a.ReplicaNode = w.beds[by].node, w.beds[at].node
	return a
}

// through puts a wire between node from and node to that can be cut.
func (w *town) through(from, to int) *wire {
	w.t.Helper()
	x := newWire(w.t, w.set[to].Listen)
	for i := range w.set[from].Peers {
		if w.set[from].Peers[i].Node == w.beds[to].node {
			w.set[from].Peers[i].Data = x.address
		}
	}
	return x
}

// wire passes bytes on, until it is cut: then nothing passes any more and nobody is told, as when a switch dies.
type wire struct {
	address string
	mu      sync.Mutex // guards the rest
	open    chan struct{}
	conns   []net.Conn
}

func newWire(t *testing.T, to string) *wire {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	x := &wire{address: ln.Addr().String(), open: make(chan struct{})}
	close(x.open)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { x.join(&wg, in, to) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		x.mend()
		x.mu.Lock()
		for _, c := range x.conns {
			c.Close()
		}
		x.mu.Unlock()
		wg.Wait()
	})
	return x
}

func (x *wire) join(wg *sync.WaitGroup, in net.Conn, to string) {
	x.wait()
	out, err := net.Dial("tcp", to)
	if err != nil {
		in.Close()
		return
	}
	x.mu.Lock()
	x.conns = append(x.conns, in, out)
	x.mu.Unlock()
	pump := func(from, to net.Conn) {
		defer from.Close()
		defer to.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := from.Read(buf)
			if n > 0 {
				x.wait()
				if _, err := to.Write(buf[:n]); err != nil {
					return
				}
			}
			if err != nil {
				x.wait()
				return
			}
		}
	}
	wg.Go(func() { pump(in, out) })
	pump(out, in)
}

func (x *wire) wait() {
	x.mu.Lock()
	open := x.open
	x.mu.Unlock()
	<-open
}

func (x *wire) cut() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.open = make(chan struct{})
}

func (x *wire) mend() {
	x.mu.Lock()
	defer x.mu.Unlock()
	select {
	case <-x.open:
	default:
		close(x.open)
	}
}

// TestSetCluster: what holds is in the state, in open.json and after a restart; what cannot be right is refused and changes nothing.
func TestSetCluster(t *testing.T) {
	w := newTown(t, 2, newBed)
	b := w.beds[0]
	c := b.start()
	good := w.set[0]
	refused := func(what string, code client.Code, edit func(*client.Cluster)) {
		t.Helper()
		a := good
		a.Peers = slices.Clone(good.Peers)
		edit(&a)
		wantCode(t, what, c.SetCluster(t.Context(), a), code)
	}
	refused("no certificates beyond loopback", client.CodeInvalid, func(a *client.Cluster) {
		a.CertFile, a.KeyFile, a.CAFile, a.Listen = "", "", "", "0.0.0.0:9513"
	})
	refused("no certificates, a peer beyond loopback", client.CodeInvalid, func(a *client.Cluster) {
		a.CertFile, a.KeyFile, a.CAFile, a.Peers[0].Data = "", "", "", "192.0.2.1:9513"
	})
	refused("a certificate without its key", client.CodeInvalid, func(a *client.Cluster) { a.KeyFile = "" })
	refused("files that are not there", client.CodeInvalid, func(a *client.Cluster) { a.CertFile = "/nonexistent" })
	refused("no address", client.CodeInvalid, func(a *client.Cluster) { a.Listen = "" })
	refused("no port", client.CodeInvalid, func(a *client.Cluster) { a.Peers[0].Ledger = "127.0.0.1" })
	refused("itself as a peer", client.CodeInvalid, func(a *client.Cluster) { a.Peers[0].Node = a.Node })
	refused("a peer without an id", client.CodeInvalid, func(a *client.Cluster) { a.Peers[0].NodeID = "x" })
	refused("a peer twice", client.CodeInvalid, func(a *client.Cluster) { a.Peers = append(a.Peers, a.Peers[0]) })
	refused("no cluster's id", client.CodeInvalid, func(a *client.Cluster) { a.ClusterID = "" })
	if st := b.state(c); st.Cluster.ClusterID != "" {
		t.Fatalf("refused, and set: %+v", st.Cluster)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	refused("a port that is taken", client.CodeInUse, func(a *client.Cluster) { a.Listen = taken.Addr().String() })

	w.tell(0, c)
	rev := b.state(c).Rev
	if w.tell(0, c); b.state(c).Rev != rev {
		t.Error("told again, and something changed")
	}
	same := func(got client.Cluster, when string) {
		t.Helper()
		if got.Listen != good.Listen || !slices.Equal(got.Peers, good.Peers) || got.CertFile != good.CertFile {
			t.Errorf("%s the cluster is %+v", when, got)
		}
	}
	same(b.state(c).Cluster, "set,")
	b.end()
	c = b.start()
	same(b.state(c).Cluster, "after a restart,")
	if err := c.SetCluster(t.Context(), client.Cluster{}); err != nil {
		t.Fatal(err)
	}
	if st := b.state(c); st.Cluster.ClusterID != "" {
		t.Errorf("ended, and there: %+v", st.Cluster)
	}
	if names, _ := b.holder.List(t.Context()); slices.Contains(names, heldCluster) {
		t.Errorf("the socket is kept: %v", names)
	}
	if conn, err := net.Dial("tcp", good.Listen); err == nil {
		conn.Close()
		t.Error("somebody listens")
	}
}

// TestStrangers: who is no node of the cluster, or another than the one that is meant, or was one, gets nowhere; a node whose address changed is found, and what works goes on.
func TestStrangers(t *testing.T) {
	t.Parallel()
	w := newTown(t, 3, newBed)
	cs := w.ready()
	a := w.farVolume(cs[1], 1, 1, 0)
	w.beds[0].open(cs[0], a)
	g := guest(t, w.beds[0].runDir, a.Volume)
	if err := g.write(0, page("x")); err != nil {
		t.Fatal(err)
	}
	reaches := func(what string, cert tls.Certificate) {
		t.Helper()
		pool := x509.NewCertPool()
		pool.AddCert(w.ca.cert)
		conn, err := tls.Dial("tcp", w.set[1].Listen, &tls.Config{RootCAs: pool, ServerName: "node2", Certificates: []tls.Certificate{cert}})
		if err == nil {
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			conn.Write([]byte("ashlar-verbs/1\nPOST /status HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"))
			var n int
			if n, err = conn.Read(make([]byte, 1)); n > 0 {
				t.Errorf("%s is answered", what)
			}
		}
		if err == nil {
			t.Errorf("%s gets in", what)
		}
	}
	load := func(cert, key string) tls.Certificate {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return pair
	}
	reaches("nobody", tls.Certificate{})
	reaches("a node that nobody knows", load(w.certificate("node9", id("node", 9))))
	reaches("a name with another's id", load(w.certificate("node3", id("node", 1))))
	other := newAuthority(t)
	reaches("another authority's", load(other.write(t.TempDir(), "node1", time.Now().Add(time.Hour))))
	w.ca.uris = nil
	reaches("a client of the cluster that is no node", load(w.ca.write(t.TempDir(), "node1", time.Now().Add(time.Hour))))
	w.certificate("node3", id("node", 3)) // as it was

	// Who dials means one node.
	lost := w.farVolume(cs[1], 2, 1, 0)
	for i := range w.set[0].Peers {
		if w.set[0].Peers[i].Node == "node2" {
			w.set[0].Peers[i].Data = w.set[2].Listen
		}
	}
	w.tell(0, cs[0])
	if _, err := cs[0].OpenVolume(t.Context(), lost); !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("node3 answered for node2: %v", err)
	}
	if err := g.write(4096, page("y")); err != nil {
		t.Errorf("a volume that works did not notice: %v", err)
	}
	for i := range w.set[0].Peers {
		if w.set[0].Peers[i].Node == "node2" {
			w.set[0].Peers[i].Data = w.set[1].Listen
		}
	}
	w.tell(0, cs[0])
	w.beds[0].open(cs[0], lost)

	// A node that is removed is cut off, and comes back when it is one again.
	told := w.set[1].Peers
	w.set[1].Peers = slices.DeleteFunc(slices.Clone(told), func(p client.Peer) bool { return p.Node == "node1" })
	w.tell(1, cs[1])
	done := make(chan error, 1)
	go func() { done <- g.write(8192, page("z")) }()
	eventually(t, "the volume's node is away", func() bool { st, _ := status(t, cs[0], a.VolumeID); return st.Away != "" })
	select {
	case err := <-done:
		t.Errorf("a removed node was answered: %v", err)
	default:
	}
	w.set[1].Peers = told
	w.tell(1, cs[1])
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestFarVolume is a volume's life with its replica on another node: everything that a volume does.
func TestFarVolume(t *testing.T) {
	t.Parallel()
	w := newTown(t, 2, newBed)
	cs := w.ready()
	far, near := cs[1], cs[0]
	a := w.farVolume(far, 1, 1, 0)
	st := w.beds[0].open(near, a)
	if st.ReplicaNode != "node2" || len(st.Layers) != 1 || st.Epoch != 1 {
		t.Errorf("open: %+v", st)
	}
	if again, err := near.OpenVolume(t.Context(), a); err != nil || again.Session != st.Session {
		t.Errorf("opened again: %+v, %v", again, err)
	}
	g := guest(t, w.beds[0].runDir, a.Volume)
	write := func(off int64, text string) {
		t.Helper()
		if err := errors.Join(g.write(off, page(text)), g.flush()); err != nil {
			t.Fatal(err)
		}
	}
	read := func(off int64, want string) {
		t.Helper()
		if got, err := g.read(off, 4096); err != nil || !bytes.Equal(got, page(want)) {
			t.Errorf("reads %.20q, %v; want %q", got, err, want)
		}
	}
	write(0, "one")
	op := func(n int, o client.Operate) client.VolumeStatus {
		t.Helper()
		o.VolumeID, o.OpID = a.VolumeID, id("oper", n)
		st, err := near.Operate(t.Context(), o)
		if err != nil {
			t.Fatalf("%s: %v", o.Verb, err)
		}
		return st
	}
	if st := op(1, client.Operate{Verb: verbSnapshot, Snapshot: "s1"}); len(st.Layers) != 2 {
		t.Errorf("after a snapshot: %+v", st.Layers)
	}
	write(0, "two")
	if st := op(2, client.Operate{Verb: verbExpand, SizeBytes: 32 * mib}); st.SizeBytes != 32*mib {
		t.Errorf("expanded to %d bytes", st.SizeBytes)
	}
	g.Close()
	g = guest(t, w.beds[0].runDir, a.Volume)
	write(31*mib, "far end")
	src, err := near.OpenSource(t.Context(), client.OpenSource{ID: id("sour", 1), VolumeID: a.VolumeID, Snapshot: "s1"})
	if err != nil {
		t.Fatal(err)
	}
	sg, err := dialNBD(filepath.Join(w.beds[0].runDir, "source", src.ID+".sock"), src.ID)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := sg.read(0, 4096); err != nil || !bytes.Equal(got, page("one")) {
		t.Errorf("the snapshot reads %.20q, %v", got, err)
	}
	sg.Close()
	if err := near.CloseSource(t.Context(), client.CloseSource{ID: src.ID}); err != nil {
		t.Error(err)
	}
	diff, err := near.Diff(t.Context(), client.Diff{VolumeID: a.VolumeID, From: "s1"})
	if err != nil || len(diff.Ranges) != 2 {
		t.Errorf("diff: %+v, %v", diff, err)
	}
	op(3, client.Operate{Verb: verbSnapshotRemove, Snapshot: "s1"})
	if st := op(4, client.Operate{Verb: verbPurge}); len(st.Layers) > 2 {
		t.Errorf("after a purge: %d layers", len(st.Layers))
	}
	read(0, "two")
	read(31*mib, "far end")
	op(5, client.Operate{Verb: verbSnapshot, Snapshot: "s2"})
	write(0, "three")
	if _, err := near.Check(t.Context(), client.Check{VolumeID: a.VolumeID}); client.CodeOf(err) != client.CodeInvalid {
		t.Errorf("check where the replica is not: %v", err)
	}
	if out, err := far.Check(t.Context(), client.Check{DiskID: a.DiskID, ReplicaID: a.ReplicaID}); err != nil || len(out.Problems) != 0 || len(out.LeftOut) != 1 {
		t.Errorf("check where it is: %+v, %v", out, err)
	}
	if r := w.beds[1].state(far).Disks[0].Replicas[0]; !r.Open || r.SizeBytes != 32*mib {
		t.Errorf("its node says %+v", r)
	}
	eventually(t, "its space is known", func() bool { st, _ := status(t, near, a.VolumeID); return st.Space.ExclusiveBytes > 0 })
	g.Close()
	if err := near.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	if rec := w.beds[0].cat.record(a.VolumeID); rec.WriterNode != "" {
		t.Errorf("closed, and written by %s", rec.WriterNode)
	}
	// Reverting needs no frontend; then it is opened where its replica is, while that is perhaps still open for the other.
	bare := a
	bare.Frontend = ""
	w.beds[0].open(near, bare)
	op(6, client.Operate{Verb: verbRevert, Snapshot: "s2"})
	if err := near.CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	here := a
	here.Node, here.ReplicaNode = "node2", ""
	w.beds[1].open(far, here)
	g = guest(t, w.beds[1].runDir, a.Volume)
	read(0, "two")
	read(31*mib, "far end")
}

// TestFarFailedFlush: a flush that fails on the replica's node is a failure for the guest, and stays one, until a person salvages where the replica is.
func TestFarFailedFlush(t *testing.T) {
	t.Parallel()
	w := newTown(t, 2, newBed)
	mem := w.beds[1].onMem(disk.MemOptions{Seed: 1})
	cs := w.ready()
	a := w.farVolume(cs[1], 1, 1, 0)
	w.beds[0].open(cs[0], a)
	g := guest(t, w.beds[0].runDir, a.Volume)
	if err := errors.Join(g.write(0, page("safe")), g.flush(), g.write(4096, page("lost"))); err != nil {
		t.Fatal(err)
	}
	mem.FailSync("replicas/*/*.layer", 1)
	for _, err := range []error{g.flush(), g.flush(), g.write(8192, page("more"))} {
		if !errors.Is(err, errnoIO) {
			t.Errorf("the guest was told %v, want EIO", err)
		}
	}
	mem.ClearFaults()
	if st, _ := status(t, cs[0], a.VolumeID); st.State != stateFailed || st.Code != client.CodeFailed {
		t.Errorf("state %s, code %s", st.State, st.Code)
	}
	if err := cs[0].CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	salvage, here := a, a
	salvage.Salvage = true
	here.Node, here.ReplicaNode = "node2", ""
	for what, b := range map[string]client.OpenVolume{"as ever": a, "with salvage, from afar": salvage} {
		_, err := cs[0].OpenVolume(t.Context(), b)
		wantCode(t, "opened "+what, err, client.CodeSalvage)
	}
	_, err := cs[1].OpenVolume(t.Context(), here)
	wantCode(t, "opened where the replica is", err, client.CodeSalvage)
	here.Salvage = true
	w.beds[1].open(cs[1], here)
	if err := cs[1].CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	w.beds[0].open(cs[0], salvage)
	g = guest(t, w.beds[0].runDir, a.Volume)
	if got, err := g.read(0, 4096); err != nil || !bytes.Equal(got, page("safe")) {
		t.Errorf("reads %.20q, %v", got, err)
	}
}

// TestFarConformance: what an NBD client sees of a volume whose replica is another node's is a Device like any other. The nodes speak without certificates, as they may on loopback.
func TestFarConformance(t *testing.T) {
	t.Parallel()
	w := newTown(t, 2, newBed)
	for i := range w.set {
		w.set[i].CertFile, w.set[i].KeyFile, w.set[i].CAFile = "", "", ""
	}
	cs := w.ready()
	n := 0
	blocktest.Run(t, blocktest.Config{New: func(t testing.TB, sizeBytes int64) block.Device {
		n++
		a := w.openBy(w.beds[1].volume(cs[1], n, sizeBytes), 1, 0)
		w.beds[0].open(cs[0], a)
		dev, err := nbd.Dial(t.Context(), "nbd+unix:///"+a.Volume+"?socket="+filepath.Join(w.beds[0].runDir, "nbd", a.Volume+".sock"), nbd.ClientOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return dev
	}, Steps: 100})
}

// TestFencedByNode: a volume is open where its replica is, and another node opens it: the first writer is ended, at once and for good; and the other way round.
func TestFencedByNode(t *testing.T) {
	t.Parallel()
	w := newTown(t, 2, newBed)
	cs := w.ready()
	here := w.beds[1].volume(cs[1], 1, 16*mib)
	here.Node = "node2"
	w.beds[1].open(cs[1], here)
	g := guest(t, w.beds[1].runDir, here.Volume)
	if err := g.write(0, page("first")); err != nil {
		t.Fatal(err)
	}
	there := w.openBy(here, 1, 0)
	st := w.beds[0].open(cs[0], there)
	if st.Epoch != 2 {
		t.Errorf("epoch %d", st.Epoch)
	}
	eventually(t, "the first writer is told", func() bool {
		st, _ := status(t, cs[1], here.VolumeID)
		return st.State == stateFailed && st.Code == client.CodeFenced
	})
	if err := g.write(4096, page("late")); err == nil {
		t.Error("a writer that was fenced is answered")
	}
	_, err := cs[1].OpenVolume(t.Context(), here)
	wantCode(t, "open again under its guests", err, client.CodeFenced)
	var answered errNBD
	if _, err := g.read(0, 4096); !errors.As(err, &answered) {
		t.Errorf("and then its guests' connections end: %v", err)
	}
	g2 := guest(t, w.beds[0].runDir, here.Volume)
	if got, err := g2.read(0, 4096); err != nil || !bytes.Equal(got, page("first")) {
		t.Errorf("reads %.20q, %v", got, err)
	}
	if err := g2.write(0, page("second")); err != nil {
		t.Fatal(err)
	}
	if err := cs[1].CloseVolume(t.Context(), client.CloseVolume{VolumeID: here.VolumeID}); err != nil {
		t.Fatal(err)
	}
	if err := g2.write(8192, page("on")); err != nil {
		t.Errorf("the other one's close ended it: %v", err)
	}
	// Back: node1's writer is ended by node2's.
	w.beds[1].open(cs[1], here)
	if err := g2.write(0, page("late")); err == nil {
		t.Error("a writer that was fenced is answered")
	}
	eventually(t, "the second writer is told", func() bool {
		st, _ := status(t, cs[0], here.VolumeID)
		return st.State == stateFailed && st.Code == client.CodeFenced
	})
	g3 := guest(t, w.beds[1].runDir, here.Volume)
	if got, err := g3.read(0, 4096); err != nil || !bytes.Equal(got, page("second")) {
		t.Errorf("reads %.20q, %v", got, err)
	}
	// A restarted process does not take its guests on again.
	if err := cs[1].CloseVolume(t.Context(), client.CloseVolume{VolumeID: here.VolumeID}); err != nil {
		t.Fatal(err)
	}
	w.beds[0].end()
	cs[0] = w.beds[0].start()
	eventually(t, "it is refused", func() bool {
		st, _ := status(t, cs[0], here.VolumeID)
		return st.State == stateFailed && st.Code == client.CodeFenced
	})
	if rec := w.beds[0].cat.record(here.VolumeID); rec.Epoch != 3 {
		t.Errorf("epoch %d was claimed", rec.Epoch)
	}
}

// TestDeleteServedReplica: a replica that only another node has open is taken from it and deleted; one that a volume here has open is not.
func TestDeleteServedReplica(t *testing.T) {
	w := newTown(t, 2, newBed)
	cs := w.ready()
	a := w.farVolume(cs[1], 1, 1, 0)
	w.beds[0].open(cs[0], a)
	del := client.DeleteReplica{DiskID: a.DiskID, ReplicaID: a.ReplicaID}
	if err := cs[1].DeleteReplica(t.Context(), del); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(w.beds[1].disk, replicasDir)); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := cs[0].CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID, Force: true}); err != nil {
		t.Error(err)
	}
	here := w.beds[1].volume(cs[1], 2, mib)
	w.beds[1].open(cs[1], here)
	wantCode(t, "delete what is open", cs[1].DeleteReplica(t.Context(), client.DeleteReplica{DiskID: here.DiskID, ReplicaID: here.ReplicaID}), client.CodeInUse)
}

// TestAway: a volume whose replica's node does not answer waits, says so, and is closed only by force; nothing hangs.
func TestAway(t *testing.T) {
	t.Parallel()
	w := newTown(t, 2, newBed)
	x := w.through(0, 1)
	cs := w.ready()
	a := w.farVolume(cs[1], 1, 1, 0)
	w.beds[0].open(cs[0], a)
	other := w.beds[0].volume(cs[0], 7, mib) // here
	other.Node = "node1"
	w.beds[0].open(cs[0], other)
	g, og := guest(t, w.beds[0].runDir, a.Volume), guest(t, w.beds[0].runDir, other.Volume)
	if err := errors.Join(g.write(0, page("x")), og.write(0, page("y"))); err != nil {
		t.Fatal(err)
	}
	x.cut()
	done := make(chan error, 1)
	go func() { done <- g.write(4096, page("waits")) }()
	eventually(t, "it is away", func() bool { st, _ := status(t, cs[0], a.VolumeID); return st.Away != "" && st.State == stateOpen })
	if err := og.write(4096, page("z")); err != nil {
		t.Errorf("another volume: %v", err)
	}
	wantCode(t, "close it without force", cs[0].CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}), client.CodeUnreachable)
	x.mend()
	if err := <-done; err != nil {
		t.Fatalf("after it came back: %v", err)
	}
	if err := g.flush(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is back", func() bool { st, _ := status(t, cs[0], a.VolumeID); return st.Away == "" })
	x.cut()
	go func() { done <- g.write(8192, page("is given up")) }()
	eventually(t, "it is away again", func() bool { st, _ := status(t, cs[0], a.VolumeID); return st.Away != "" })
	began := time.Now()
	if err := cs[0].CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID, Force: true}); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > townClose/2 {
		t.Errorf("a forced close took %v", took)
	}
	if err := <-done; err == nil {
		t.Error("what was given up is acknowledged")
	}
	if _, err := cs[0].OpenVolume(t.Context(), a); !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("open it while it is away: %v", err)
	}
	if _, ok := status(t, cs[0], a.VolumeID); ok {
		t.Error("what could not be opened is there")
	}
	x.mend()
	w.beds[0].open(cs[0], a)
	g = guest(t, w.beds[0].runDir, a.Volume)
	if got, err := g.read(4096, 4096); err != nil || !bytes.Equal(got, page("waits")) {
		t.Errorf("reads %.20q, %v", got, err)
	}
	// A close that waits for a node that fell silent meanwhile is ended by one with force.
	x.cut()
	polite := make(chan error, 1)
	began = time.Now()
	go func() {
		polite <- cs[0].CloseVolume(context.Background(), client.CloseVolume{VolumeID: a.VolumeID})
	}()
	eventually(t, "it is being closed", func() bool { st, _ := status(t, cs[0], a.VolumeID); return st.State == stateClosing && st.Away != "" })
	if err := cs[0].CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID, Force: true}); err != nil {
		t.Error(err)
	}
	<-polite
	if _, ok := status(t, cs[0], a.VolumeID); ok {
		t.Error("closed by force, and there")
	}
	x.mend()
	if took := time.Since(began); took > townClose/2 {
		t.Errorf("it took %v", took)
	}
	w.beds[0].open(cs[0], a)
	g = guest(t, w.beds[0].runDir, a.Volume)
	// The process ends in order while the node is away, and the next one waits for it.
	g.Close()
	x.cut()
	w.beds[0].end()
	cs[0] = w.beds[0].start()
	eventually(t, "it says why it waits", func() bool {
		st, _ := status(t, cs[0], a.VolumeID)
		return st.State == stateOpening && st.Away != ""
	})
	x.mend()
	eventually(t, "it is open again", func() bool {
		st, _ := status(t, cs[0], a.VolumeID)
		return st.State == stateOpen && st.Session > 1
	})
	g = guest(t, w.beds[0].runDir, a.Volume)
	if got, err := g.read(4096, 4096); err != nil || !bytes.Equal(got, page("waits")) {
		t.Errorf("reads %.20q, %v", got, err)
	}
}

// TestFarHandOver passes both nodes' data processes on, in turn, under a guest that writes: its connection never ends and it sees no error.
func TestFarHandOver(t *testing.T) {
	t.Parallel()
	w := newTown(t, 2, newBed)
	var sides []*side
	var cs []*client.Client
	for i, b := range w.beds {
		sides = append(sides, b.startSide("1.0"))
		c := b.clientOf("1.0")
		b.adopt(c)
		w.tell(i, c)
		cs = append(cs, c)
	}
	a := w.farVolume(cs[1], 1, 1, 0)
	w.beds[0].open(cs[0], a)
	g := guest(t, w.beds[0].runDir, a.Volume)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	said, longest := 0, time.Duration(0)
	var answered atomic.Int64
	wg.Go(func() {
		for n := 1; ctx.Err() == nil; n++ {
			began := time.Now()
			if err := g.write(4096*int64(n%512), page(fmt.Sprint(n))); err != nil {
				t.Errorf("write %d: %v", n, err)
				return
			}
			said, longest = n, max(longest, time.Since(began))
			answered.Add(1)
		}
	})
	for round, node := range []int{1, 0, 1, 0} {
		before := answered.Load()
		eventually(t, "the guest writes", func() bool { return answered.Load() > before+50 })
		version := fmt.Sprintf("1.%d", round+1)
		next := w.beds[node].succeedSide(version)
		if err := sides[node].end(t); err != nil {
			t.Fatalf("round %d: the giver ended with %v", round, err)
		}
		w.beds[node].answers(version)
		sides[node], cs[node] = next, w.beds[node].clientOf(version)
		eventually(t, "it is open", func() bool { st, _ := status(t, cs[0], a.VolumeID); return st.State == stateOpen && st.Away == "" })
	}
	cancel()
	wg.Wait()
	if n := said; n > 0 {
		if got, err := g.read(4096*int64(n%512), 4096); err != nil || !bytes.Equal(got, page(fmt.Sprint(n))) {
			t.Errorf("the last write is not there: %v", err)
		}
	}
	st, _ := status(t, cs[0], a.VolumeID)
	if st.Epoch != 1 || st.Clients != 1 {
		t.Errorf("epoch %d, %d connections", st.Epoch, st.Clients)
	}
	t.Logf("%d writes, four hand-overs, the longest write took %v", said, longest.Round(time.Millisecond))
}

// TestFailover cuts a writer off; another node opens the volume at the node that has its replica. When the wire is mended the first writer is refused for good, and everything that was acknowledged is there.
func TestFailover(t *testing.T) {
	t.Parallel()
	w := newTown(t, 3, newBed) // node1 writes, node2 has the replica, node3 takes over
	x := w.through(0, 1)
	cs := w.ready()
	a := w.farVolume(cs[1], 1, 1, 0)
	w.beds[0].open(cs[0], a)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	g := guest(t, w.beds[0].runDir, a.Volume)
	l := &ackedLog{acked: map[int64]uint64{}, pending: map[int64]uint64{}}
	var wg sync.WaitGroup
	var lastErr error
	writes := make(chan uint64, 1<<16)
	wg.Go(func() {
		rng := rand.New(rand.NewPCG(seed, 3))
		for {
			l.seq++
			at := rng.Int64N(512)
			l.pending[at] = l.seq
			if lastErr = g.write(at*4096, stamped(l.seq)); lastErr != nil {
				return
			}
			l.acked[at] = l.seq
			writes <- l.seq
		}
	})
	for range 200 {
		<-writes
	}
	x.cut()
	eventually(t, "the writer waits", func() bool { st, _ := status(t, cs[0], a.VolumeID); return st.Away != "" })
	there := w.openBy(a, 1, 2)
	began := time.Now()
	st := w.beds[2].open(cs[2], there)
	g3 := guest(t, w.beds[2].runDir, a.Volume)
	if err := g3.write(600*4096, page("took over")); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	if st.Epoch != 2 {
		t.Errorf("epoch %d", st.Epoch)
	}
	pg := &patientGuest{t: t, conn: g3}
	pg.verify(l2(l))
	before, err := g3.read(0, 512*4096)
	if err != nil {
		t.Fatal(err)
	}
	x.mend()
	wg.Wait() // with an error: it was told, and stops
	if lastErr == nil {
		t.Error("the first writer was answered")
	}
	eventually(t, "the first writer is refused", func() bool {
		st, _ := status(t, cs[0], a.VolumeID)
		return st.State == stateFailed && st.Code == client.CodeFenced
	})
	if err := g.write(0, page("late")); err == nil {
		t.Error("the first writer goes on")
	}
	after, err := g3.read(0, 512*4096)
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("what the first writer had under way arrived late: %v", err)
	}
	t.Logf("from the question to the first write: %v", took.Round(time.Millisecond))
}

// stamped is a block that says its number.
func stamped(seq uint64) []byte { return bytes.Repeat([]byte(fmt.Sprintf("%08d", seq))[:8], 512) }

// l2 is a log with stamped's numbers as verify reads them.
func l2(l *ackedLog) *ackedLog {
	as := func(seq uint64) (n uint64) {
		for _, c := range stamped(seq)[:8] {
			n = n<<8 | uint64(c)
		}
		return n
	}
	out := &ackedLog{acked: map[int64]uint64{}, pending: map[int64]uint64{}}
	for at, seq := range l.pending {
		out.pending[at] = as(seq)
	}
	for at, seq := range l.acked {
		out.acked[at] = as(seq)
	}
	return out
}

// TestPeerLedger: while the own serve is down membership records are had from another node's, over TLS, and from nobody who is not one.
func TestPeerLedger(t *testing.T) {
	w := newTown(t, 2, newBed)
	cs := w.ready()
	a := w.beds[0].volume(cs[0], 1, mib)
	w.beds[0].cat.away()
	_, err := cs[0].OpenVolume(t.Context(), a)
	wantCode(t, "nobody has the catalogue", err, client.CodeUnreachable)

	pool := x509.NewCertPool()
	pool.AddCert(w.ca.cert)
	pair, err := tls.LoadX509KeyPair(w.set[1].CertFile, w.set[1].KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := tls.Listen("tcp", w.set[0].Peers[0].Ledger, &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert})
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var asked []string
	mux := http.NewServeMux()
	mux.Handle(client.LedgerPath, http.StripPrefix("/node/v1/ledger", client.LedgerHandler(w.beds[0].cat)))
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		mu.Lock()
		asked = append(asked, r.TLS.PeerCertificates[0].Subject.CommonName+" "+r.URL.Path+" "+r.Header.Get("Ashlar-Node-Api"))
		mu.Unlock()
		mux.ServeHTTP(rw, r)
	})}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	defer func() { srv.Close(); <-done }()
	w.beds[0].open(cs[0], a)
	mu.Lock()
	defer mu.Unlock()
	if len(asked) < 3 || asked[0] != "node1 /node/v1/ledger/read 1-1" {
		t.Errorf("asked: %v", asked)
	}
}

// TestLostIncarnation: a volume whose replica's host was booted again is lost to its guests until it is detached, also for a restarted process; then it is what a power cut leaves, and needs no salvage.
func TestLostIncarnation(t *testing.T) {
	t.Parallel()
	w := newTown(t, 2, newBed)
	cs := w.ready()
	a := w.farVolume(cs[1], 1, 1, 0)
	w.beds[0].open(cs[0], a)
	g := guest(t, w.beds[0].runDir, a.Volume)
	if err := errors.Join(g.write(0, page("flushed")), g.flush(), g.write(4096, page("not flushed"))); err != nil {
		t.Fatal(err)
	}
	b := w.beds[1]
	b.end()
	b.cfg.BootID = "00000000-1111-2222-3333-999999999999"
	cs[1] = b.ready()
	w.tell(1, cs[1])
	if err := g.write(8192, page("late")); err == nil {
		t.Error("the guest goes on")
	}
	eventually(t, "it is lost", func() bool { st, _ := status(t, cs[0], a.VolumeID); return st.State == stateFailed })
	st, _ := status(t, cs[0], a.VolumeID)
	if st.Code != client.CodeFailed {
		t.Errorf("lost: %+v", st)
	}
	w.beds[0].end()
	cs[0] = w.beds[0].start()
	eventually(t, "it is still lost", func() bool {
		st, _ := status(t, cs[0], a.VolumeID)
		return st.State == stateFailed && st.Code == client.CodeFailed
	})
	if err := cs[0].CloseVolume(t.Context(), client.CloseVolume{VolumeID: a.VolumeID}); err != nil {
		t.Fatal(err)
	}
	w.beds[0].open(cs[0], a)
	g = guest(t, w.beds[0].runDir, a.Volume)
	if got, err := g.read(0, 4096); err != nil || !bytes.Equal(got, page("flushed")) {
		t.Errorf("reads %.20q, %v", got, err)
	}
}

// TestRebootOfNodeLosesNothing: a node whose host is booted again when everything was flushed has lost nothing: the volume waits and goes on, and the record learns of the new boot, so that the next process resumes.
func TestRebootOfNodeLosesNothing(t *testing.T) {
	t.Parallel()
	w := newTown(t, 2, newBed)
	cs := w.ready()
	a := w.farVolume(cs[1], 1, 1, 0)
	w.beds[0].open(cs[0], a)
	g := guest(t, w.beds[0].runDir, a.Volume)
	if err := errors.Join(g.write(0, page("flushed")), g.flush()); err != nil {
		t.Fatal(err)
	}
	b := w.beds[1]
	b.end()
	b.cfg.BootID = "00000000-1111-2222-3333-999999999999"
	cs[1] = b.ready()
	w.tell(1, cs[1])
	if err := g.write(4096, page("goes on")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the record knows of the boot", func() bool { return b.cat.of.record(a.VolumeID).Members[0].Incarnation == b.cfg.BootID })
	eventually(t, "the copy keeps that record, by which the next process resumes", func() bool {
		fsys, err := disk.OpenReal(b.disk, disk.RealOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer fsys.Close() //nolint:errcheck // nothing was written
		found, err := local.List(fsys)
		return err == nil && len(found) == 1 && found[0].Record != nil && found[0].Record.Members[0].Incarnation == b.cfg.BootID
	})
	g.Close()
	w.beds[0].end()
	cs[0] = w.beds[0].start()
	eventually(t, "the next process resumes", func() bool {
		st, _ := status(t, cs[0], a.VolumeID)
		return st.State == stateOpen && st.Epoch == 1 && st.Session == 2
	})
	g = guest(t, w.beds[0].runDir, a.Volume)
	if got, err := g.read(4096, 4096); err != nil || !bytes.Equal(got, page("goes on")) {
		t.Errorf("reads %.20q, %v", got, err)
	}
}

// FuzzCheckCluster: whatever a Cluster says, it is refused or each of its addresses can be dialled and each of its nodes told apart.
func FuzzCheckCluster(f *testing.F) {
	f.Add("c", "n", "127.0.0.1:1", "peer", "00000000000000000000000000000001", "127.0.0.1:2")
	f.Add("", "n", "[::1]:99999", "..", "x", ":")
	f.Fuzz(func(t *testing.T, cluster, node, listen, peer, nodeID, address string) {
		a := client.Cluster{ClusterID: cluster, Node: node, Listen: listen, Peers: []client.Peer{{Node: peer, NodeID: nodeID, Data: address, Ledger: address}}}
		if checkCluster(a) != nil {
			return
		}
		for _, s := range []string{listen, address} {
			if host, _, err := net.SplitHostPort(s); err != nil || !isLoopback(host) {
				t.Errorf("%q without certificates", s)
			}
		}
		if u, err := url.Parse("ashlar://" + cluster + "/" + nodeID); err == nil {
			if got, ok := nodeIDOf(u, cluster); ok && got != nodeID {
				t.Errorf("%q is read as %q", u, got)
			}
		}
		if peer == node || cluster == "" {
			t.Error("it stands for two nodes, or none")
		}
	})
}

// TestSuccessorFlushes: what the process before had not flushed is flushed on the replica's node before its successor serves the guests: only who wrote it would notice that that node was booted again.
func TestSuccessorFlushes(t *testing.T) {
	w := newTown(t, 2, newBed)
	mem := w.beds[1].onMem(disk.MemOptions{Seed: 1})
	cs := []*client.Client{nil, w.beds[1].ready()}
	w.tell(1, cs[1])
	old := w.beds[0].startSide("1.0")
	cs[0] = w.beds[0].clientOf("1.0")
	w.tell(0, cs[0])
	a := w.farVolume(cs[1], 1, 1, 0)
	a.Frontend = ""
	w.beds[0].open(cs[0], a)
	vol := old.p.slot(a.VolumeID).vol
	if _, err := vol.Device().WriteAt(page("not flushed"), 0); err != nil {
		t.Fatal(err)
	}
	var flushed atomic.Int32
	mem.OnOp(func(op disk.Op) {
		if op.Kind == disk.OpSync && strings.HasSuffix(op.Name, ".layer") {
			flushed.Add(1)
		}
	})
	w.beds[0].succeedSide("1.1")
	if err := old.end(t); err != nil {
		t.Fatal(err)
	}
	w.beds[0].answers("1.1")
	eventually(t, "the successor has it", func() bool {
		st, _ := status(t, w.beds[0].clientOf("1.1"), a.VolumeID)
		return st.State == stateOpen && st.Session == 2
	})
	if flushed.Load() == 0 {
		t.Error("the successor serves what is not flushed")
	}
}

// TestHandOverWhileAway: a data process is replaced although the node of a volume's replica does not answer: the successor has the volume, says why it waits, and serves it when that node is back.
func TestHandOverWhileAway(t *testing.T) {
	t.Parallel()
	w := newTown(t, 2, newBed)
	x := w.through(0, 1)
	cs := []*client.Client{nil, w.beds[1].ready()}
	w.tell(1, cs[1])
	old := w.beds[0].startSide("1.0")
	cs[0] = w.beds[0].clientOf("1.0")
	w.tell(0, cs[0])
	a := w.farVolume(cs[1], 1, 1, 0)
	w.beds[0].open(cs[0], a)
	g := &patientGuest{t: t, socket: filepath.Join(w.beds[0].runDir, "nbd", a.Volume+".sock"), name: a.Volume}
	defer g.close()
	if err := g.do(nbdWrite, 0, page("before")); err != nil {
		t.Fatal(err)
	}
	x.cut()
	eventually(t, "it is away", func() bool { st, _ := status(t, cs[0], a.VolumeID); return st.Away != "" })
	w.beds[0].succeedSide("1.1")
	if err := old.end(t); err != nil {
		t.Fatalf("the giver ended with %v", err)
	}
	cs[0] = w.beds[0].answers("1.1")
	eventually(t, "the successor waits for the node", func() bool {
		st, _ := status(t, cs[0], a.VolumeID)
		return st.State == stateOpening && st.Away != ""
	})
	x.mend()
	p := make([]byte, 4096)
	if err := g.do(nbdRead, 0, p); err != nil || !bytes.Equal(p, page("before")) {
		t.Errorf("reads %.20q, %v", p, err)
	}
	if st, _ := status(t, cs[0], a.VolumeID); st.Epoch != 1 || st.Session < 2 {
		t.Errorf("epoch %d, session %d", st.Epoch, st.Session)
	}
}
