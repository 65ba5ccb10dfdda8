package dataplane

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
	"ashlar/internal/replica"
	"ashlar/internal/volume"
)

const (
	testCluster = "cluster-a"
	testVersion = "1.0.0-test"
	testNode    = "node1"
)

// id makes 32 hex digits that a person can tell apart.
func id(kind string, n int) string { return fmt.Sprintf("%08x%024x", kind[:4], n) }

// memHolder is the holder's twin in memory: it outlives the Processes of a test.
type memHolder struct {
	mu      sync.Mutex // guards both
	held    map[string]int
	stopped bool
}

func newMemHolder(t *testing.T) *memHolder {
	h := &memHolder{held: map[string]int{}}
	t.Cleanup(func() {
		for _, fd := range h.held {
			unix.Close(fd)
		}
	})
	return h
}

func (h *memHolder) Put(_ context.Context, name string, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return raw.Control(func(fd uintptr) {
		if old, ok := h.held[name]; ok {
			unix.Close(old)
		}
		h.held[name], err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	})
}

func (h *memHolder) Get(_ context.Context, name string) (*os.File, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	held, ok := h.held[name]
	if !ok {
		return nil, hold.ErrNotHeld
	}
	fd, err := unix.FcntlInt(uintptr(held), unix.F_DUPFD_CLOEXEC, 0)
	return os.NewFile(uintptr(fd), name), err
}

func (h *memHolder) Drop(_ context.Context, name string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if fd, ok := h.held[name]; ok {
		unix.Close(fd)
		delete(h.held, name)
	}
	return nil
}

func (h *memHolder) List(context.Context) (names []string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for n := range h.held {
		names = append(names, n)
	}
	sort.Strings(names)
	return names, nil
}

func (h *memHolder) Stop(context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stopped = true
	return nil
}

// catalogue is the membership records of a test's volumes, served as the agent does; it can be away.
type catalogue struct {
	t       testing.TB
	runDir  string
	mu      sync.Mutex // guards the rest
	records map[string]client.MembershipEntry
	stop    func()
	onRead  func()                      // may be nil
	onSwap  func(client.MembershipSwap) // of one that is made; may be nil
	of      *catalogue                  // another node's, whose records these are; may be nil
}

func newCatalogue(t testing.TB, runDir string) *catalogue {
	c := &catalogue{t: t, runDir: runDir, records: map[string]client.MembershipEntry{}}
	t.Cleanup(c.away)
	c.back()
	return c
}

func (c *catalogue) Read(_ context.Context, volumeID string) (client.MembershipEntry, error) {
	if c.of != nil {
		return c.of.Read(context.Background(), volumeID)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.onRead != nil {
		c.onRead()
	}
	e, ok := c.records[volumeID]
	if !ok {
		return e, client.ErrNotFound
	}
	return e, nil
}

func (c *catalogue) Swap(_ context.Context, a client.MembershipSwap) (int64, error) {
	if c.of != nil {
		return c.of.Swap(context.Background(), a)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.records[a.VolumeID].Rev != a.Was {
		return 0, client.ErrConflict
	}
	if c.onSwap != nil {
		c.onSwap(a)
	}
	c.records[a.VolumeID] = client.MembershipEntry{Record: a.Record, Rev: a.Was + 1}
	return a.Was + 1, nil
}

// record returns a volume's record.
func (c *catalogue) record(volumeID string) (rec replica.Record) {
	e, err := c.Read(context.Background(), volumeID)
	if err == nil {
		err = json.Unmarshal(e.Record, &rec)
	}
	if err != nil {
		c.t.Fatalf("record of volume %s: %v", volumeID, err)
	}
	return rec
}

// away takes the socket from the data process, as if serve were down.
func (c *catalogue) away() {
	c.mu.Lock()
	stop := c.stop
	c.stop = nil
	c.mu.Unlock()
	if stop != nil {
		stop()
	}
}

func (c *catalogue) back() {
	path := client.LedgerSocket(c.runDir)
	ln, err := client.Listen(path)
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- client.Serve(ctx, ln, client.LedgerHandler(c), time.Second) }()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stop = func() {
		cancel()
		if err := <-done; err != nil {
			c.t.Errorf("ledger: %v", err)
		}
		os.Remove(path)
	}
}

// create makes a volume's first record, as control does.
func (c *catalogue) create(a client.CreateReplica) {
	rec := volume.NewRecord(a.VolumeID, []replica.Member{{ReplicaID: a.ReplicaID, Node: testNode}},
		replica.Chain{SizeBytes: a.SizeBytes, Layers: []replica.LayerID{replica.LayerID(a.HeadID)}, Base: replica.LayerID(a.ImageID)}, time.Now())
	text, err := json.Marshal(rec)
	if err == nil {
		_, err = c.Swap(context.Background(), client.MembershipSwap{VolumeID: a.VolumeID, Record: text})
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// bed is a run directory, a disk and a catalogue, and what of a data process runs on them.
type bed struct {
	t      *testing.T
	runDir string
	disk   string
	cat    *catalogue
	holder *memHolder
	cfg    Config
	diskID string
	node   string // its name; testNode by default
	log    *bytes.Buffer
	logMu  sync.Mutex

	p    *Process // nil while none runs
	stop func()
}

// shortDir makes a directory whose name leaves room for sockets.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ashlar")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func newBed(t *testing.T) *bed {
	t.Helper()
	dir := shortDir(t)
	b := &bed{t: t, runDir: filepath.Join(dir, "run"), disk: filepath.Join(dir, "disk"), holder: newMemHolder(t), log: new(bytes.Buffer)}
	if err := os.Mkdir(b.disk, 0o700); err != nil {
		t.Fatal(err)
	}
	b.cat = newCatalogue(t, b.runDir)
	b.cfg = Config{RunDir: b.runDir, Version: testVersion, BootID: "00000000-1111-2222-3333-444444444444", NoExec: true, Log: slog.New(slog.NewTextHandler(b, nil))}
	t.Cleanup(func() {
		b.end()
		if t.Failed() {
			t.Logf("the data process said:\n%s", b.log)
		}
	})
	return b
}

// Write takes the log.
func (b *bed) Write(p []byte) (int, error) {
	b.logMu.Lock()
	defer b.logMu.Unlock()
	return b.log.Write(p)
}

// start runs a Process in this process.
func (b *bed) start() *client.Client {
	b.t.Helper()
	cfg, err := b.cfg.check()
	if err != nil {
		b.t.Fatal(err)
	}
	p, err := newProcess(cfg, b.holder)
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.serve(ctx) }()
	b.p = p
	b.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("data process: %v", err)
		}
	})
	c := b.client()
	eventually(b.t, "the data process answers", func() bool { _, err := c.Hello(b.t.Context()); return err == nil })
	return c
}

func (b *bed) client() *client.Client { return client.New(client.DataSocket(b.runDir, testVersion)) }

// end stops the Process as SIGTERM does.
func (b *bed) end() {
	if b.p != nil {
		b.stop()
		b.p = nil
	}
}

// adopt takes the bed's disk into use.
func (b *bed) adopt(c *client.Client) {
	b.t.Helper()
	st, err := c.AdoptDisk(b.t.Context(), client.Disk{Path: b.disk, ClusterID: testCluster})
	if err != nil {
		b.t.Fatal(err)
	}
	b.diskID = st.DiskID
}

// ready starts a Process that has the disk.
func (b *bed) ready() *client.Client {
	b.t.Helper()
	c := b.start()
	b.adopt(c)
	return c
}

// volume makes a volume: record and replica.
func (b *bed) volume(c *client.Client, n int, sizeBytes int64) client.OpenVolume {
	b.t.Helper()
	a := client.CreateReplica{DiskID: b.diskID, ReplicaID: id("repl", n), VolumeID: id("volu", n), Volume: fmt.Sprintf("vol%d", n), HeadID: id("repl", n), SizeBytes: sizeBytes}
	b.cat.create(a)
	if err := c.CreateReplica(b.t.Context(), a); err != nil {
		b.t.Fatal(err)
	}
	return client.OpenVolume{VolumeID: a.VolumeID, Volume: a.Volume, Node: testNode, DiskID: a.DiskID, ReplicaID: a.ReplicaID, Frontend: "nbd"}
}

func (b *bed) open(c *client.Client, a client.OpenVolume) client.VolumeStatus {
	b.t.Helper()
	st, err := c.OpenVolume(b.t.Context(), a)
	if err != nil {
		b.t.Fatal(err)
	}
	if st.State != stateOpen {
		b.t.Fatalf("opened, and is %q: %+v", st.State, st)
	}
	return st
}

func (b *bed) state(c *client.Client) client.State {
	b.t.Helper()
	st, err := c.State(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	return st
}

// status finds a volume in the state; ok is false if it is not there.
func status(t *testing.T, c *client.Client, volumeID string) (client.VolumeStatus, bool) {
	t.Helper()
	st, err := c.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range st.Volumes {
		if v.VolumeID == volumeID {
			return v, true
		}
	}
	return client.VolumeStatus{}, false
}

// eventually polls until ok, at most a minute.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("waited in vain: %s", what)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// wantCode fails the test unless err has the code.
func wantCode(t *testing.T, what string, err error, code client.Code) {
	t.Helper()
	if client.CodeOf(err) != code {
		t.Errorf("%s: %v, want code %q", what, err, code)
	}
}

// nbdConn is the least of an NBD client: enough to write, read and flush as a guest would.
type nbdConn struct {
	net.Conn
	size   int64
	handle uint64
}

// errNBD is an error that the server answered, with its errno.
type errNBD uint32

func (e errNBD) Error() string { return fmt.Sprintf("NBD error %d", uint32(e)) }

const (
	nbdRead, nbdWrite, nbdFlush = 0, 1, 3
	errnoIO                     = errNBD(5)
	errnoNoSpace                = errNBD(28)
)

// dialNBD connects to a volume's socket and chooses its export.
func dialNBD(socket, export string) (*nbdConn, error) {
	conn, err := net.DialTimeout("unix", socket, time.Minute)
	if err != nil {
		return nil, err
	}
	c := &nbdConn{Conn: conn}
	if err := c.negotiate(export); err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

func (c *nbdConn) negotiate(export string) error {
	c.SetDeadline(time.Now().Add(time.Minute))
	hello := make([]byte, 18)
	if _, err := io.ReadFull(c, hello); err != nil {
		return err
	}
	if !strings.HasPrefix(string(hello), "NBDMAGICIHAVEOPT") {
		return fmt.Errorf("not an NBD server: %q", hello)
	}
	req := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	req = append(req, "IHAVEOPT"...)
	req = binary.BigEndian.AppendUint32(req, 1) // NBD_OPT_EXPORT_NAME
	req = binary.BigEndian.AppendUint32(req, uint32(len(export)))
	req = append(req, export...)
	if _, err := c.Write(req); err != nil {
		return err
	}
	info := make([]byte, 10)
	if _, err := io.ReadFull(c, info); err != nil {
		return err
	}
	c.size = int64(binary.BigEndian.Uint64(info))
	return nil
}

// do says one command and waits for its answer.
func (c *nbdConn) do(cmd uint16, off int64, p []byte) error {
	c.SetDeadline(time.Now().Add(time.Minute))
	c.handle++
	req := binary.BigEndian.AppendUint32(nil, 0x25609513)
	req = binary.BigEndian.AppendUint32(req, uint32(cmd)) // flags 0
	req = binary.BigEndian.AppendUint64(req, c.handle)
	req = binary.BigEndian.AppendUint64(req, uint64(off))
	req = binary.BigEndian.AppendUint32(req, uint32(len(p)))
	if cmd == nbdWrite {
		req = append(req, p...)
	}
	if _, err := c.Write(req); err != nil {
		return err
	}
	rep := make([]byte, 16)
	if _, err := io.ReadFull(c, rep); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(rep) != 0x67446698 || binary.BigEndian.Uint64(rep[8:]) != c.handle {
		return errors.New("not the reply that was waited for")
	}
	if e := binary.BigEndian.Uint32(rep[4:]); e != 0 {
		return errNBD(e)
	}
	if cmd == nbdRead {
		_, err := io.ReadFull(c, p)
		return err
	}
	return nil
}

func (c *nbdConn) read(off int64, n int) ([]byte, error) {
	p := make([]byte, n)
	return p, c.do(nbdRead, off, p)
}
func (c *nbdConn) write(off int64, p []byte) error { return c.do(nbdWrite, off, p) }
func (c *nbdConn) flush() error                    { return c.do(nbdFlush, 0, nil) }

// guest connects to a volume as its guest.
func guest(t *testing.T, runDir, name string) *nbdConn {
	t.Helper()
	c, err := dialNBD(filepath.Join(runDir, "nbd", name+".sock"), name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// page is 4096 bytes that say what they are.
func page(text string) []byte {
	p := make([]byte, 4096)
	for i := 0; i < len(p); i += len(text) + 1 {
		copy(p[i:], text+"\n")
	}
	return p
}
