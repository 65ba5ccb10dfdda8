package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
	"ashlar/internal/replica/replicatest"
)

const (
	testReplica = "abcdef0123456789abcdef0123456789"
	testSize    = 1 << 20
	testHead    = replica.LayerID("00000000000000000000000000000001")
)

// far is the node that has the replica: a disk, and the process that serves it.
type far struct {
	t     testing.TB
	net   *network
	extra map[string]block.Device               // sources
	wrap  func(replica.Replica) replica.Replica // of each connection; may be nil

	mu    sync.Mutex // guards the rest
	fsys  *disk.Mem
	dir   string
	boot  int
	srv   *Server
	ln    *listener
	open  *local.Replica
	opens int
	fail  error // of OpenReplica
	wg    sync.WaitGroup
}

func newFar(t testing.TB, head replica.LayerID, size int64) *far {
	t.Helper()
	f := &far{t: t, net: newNetwork(), fsys: disk.NewMem(disk.MemOptions{}), extra: map[string]block.Device{}}
	dir, err := local.Create(f.fsys, local.CreateConfig{ReplicaID: testReplica, VolumeID: replicatest.VolumeID, Volume: "db1", HeadID: head, SizeBytes: size, BootID: f.bootID()})
	if err != nil {
		t.Fatal(err)
	}
	f.dir = dir
	f.start()
	t.Cleanup(f.stop)
	return f
}

func (f *far) isOpen() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.open != nil
}

func (f *far) openedTimes() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.opens
}

func (f *far) bootID() string { return fmt.Sprintf("2f1c7d8e-0000-4000-8000-%012d", f.boot+1) }

func logger(t testing.TB) *slog.Logger {
	if os.Getenv("REMOTE_LOG") == "" {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// start begins to serve.
func (f *far) start() {
	ln := f.net.listen()
	srv := NewServer(ServerConfig{Host: &host{f: f, fsys: f.fsys, boot: f.bootID()}, Log: logger(f.t)})
	f.mu.Lock()
	f.srv, f.ln = srv, ln
	f.mu.Unlock()
	f.wg.Go(func() {
		if err := srv.Serve(context.Background(), ln); err != nil && !errors.Is(err, block.ErrClosed) { // which it is when stop was quicker
			f.t.Error(err)
		}
	})
}

// stop ends the process in good order.
func (f *far) stop() {
	f.net.away()
	_ = f.srv.Close()
	f.wg.Wait()
	if f.isOpen() {
		f.t.Error("the replica was not released")
	}
}

// restart kills the process and starts another; with cut, the machine lost power, and keep says what its disk kept.
func (f *far) restart(cut bool, keep disk.CrashOptions) {
	f.net.away()
	f.net.cut() // from here on nobody hears anything
	if cut {
		f.fsys = f.fsys.CrashClone(keep)
		f.boot++
	} else {
		f.fsys = f.fsys.Clone()
	}
	f.stop()
	f.start()
}

// host is a process.
type host struct {
	f    *far
	fsys *disk.Mem
	boot string
}

func (h *host) OpenReplica(_ context.Context, id string) (Served, error) {
	f := h.f
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return Served{}, f.fail
	}
	if id != testReplica {
		return Served{}, fmt.Errorf("replica %s: %w", id, ErrUnknown)
	}
	r, err := local.Open(h.fsys, f.dir, local.OpenConfig{BootID: h.boot})
	if err != nil {
		return Served{}, err
	}
	f.open = r
	f.opens++
	connect := func() replica.Replica { return r.Connect() }
	if f.wrap != nil {
		connect = func() replica.Replica { return f.wrap(r.Connect()) }
	}
	return Served{Connect: connect, Release: func() {
		if err := r.Close(); err != nil {
			f.t.Error(err)
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		f.open = nil
	}}, nil
}

func (h *host) OpenSource(_ context.Context, name string) (block.Device, json.RawMessage, error) {
	d, ok := h.f.extra[name]
	if !ok {
		return nil, nil, fmt.Errorf("source %s: %w", name, ErrUnknown)
	}
	return keptOpen{d}, json.RawMessage(`{"name":"` + name + `"}`), nil
}

// keptOpen is a device that its user closes and its owner goes on with.
type keptOpen struct{ block.Device }

func (keptOpen) Close() error { return nil }

// client opens the replica; it is closed when the test ends.
func (f *far) client(t testing.TB) *Replica {
	t.Helper()
	r, err := Open(context.Background(), f.config())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func (f *far) config() Config {
	return Config{ReplicaID: testReplica, VolumeID: replicatest.VolumeID, Dial: f.net.dial, Log: logger(f.t)}
}

// writer is a client that was let in.
func (f *far) writer(t testing.TB, w replica.Writer) *Replica {
	t.Helper()
	r := f.client(t)
	if err := r.Fence(context.Background(), w); err != nil {
		t.Fatal(err)
	}
	return r
}

// Connect implements replicatest.Copy.
func (f *far) Connect(t testing.TB) replica.Replica { return f.client(t) }

// Restart implements replicatest.Copy.
func (f *far) Restart(testing.TB) { f.restart(false, disk.CrashOptions{}) }

// seeded returns a random source and says its seed.
func seeded(t testing.TB) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("ASHLAR_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("ASHLAR_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 7))
}

func TestReplicaRemote(t *testing.T) {
	replicatest.Run(t, replicatest.Config{Steps: 100, New: func(t testing.TB, head replica.LayerID, sizeBytes int64) replicatest.Copy {
		return newFar(t, head, sizeBytes)
	}})
}
