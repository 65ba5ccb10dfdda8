package export

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"ashlar/internal/block"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = time.Minute

func newFrontend(t *testing.T, dir string, l Listeners) *NBD {
	t.Helper()
	n, err := NewNBD(NBDConfig{Dir: dir, Listeners: l, Report: func(v string, err error) { t.Logf("%s: %v", v, err) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func newLocal(t *testing.T) *Local {
	t.Helper()
	l := NewLocal(Access{})
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// visit negotiates for name with the old EXPORT_NAME option, which needs the fewest bytes, reads n bytes at 0, and returns them.
func visit(path, name string, n int) ([]byte, error) {
	c, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return converse(c, name, n)
}

// enter negotiates for name and returns the export's transmission flags.
func enter(c net.Conn, name string) (flags uint16, err error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return 0, err
	}
	var hello [18]byte
	if _, err := io.ReadFull(c, hello[:]); err != nil {
		return 0, err
	}
	p := []byte{0, 0, 0, 3}
	p = append(p, "IHAVEOPT"...)
	p = binary.BigEndian.AppendUint32(p, 1)
	p = binary.BigEndian.AppendUint32(p, uint32(len(name)))
	p = append(p, name...)
	if _, err := c.Write(p); err != nil {
		return 0, err
	}
	var size [10]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint16(size[8:]), nil
}

// request is a request of n bytes at 0.
func request(cmd uint16, n int) []byte {
	req := binary.BigEndian.AppendUint32(nil, 0x25609513)
	req = binary.BigEndian.AppendUint16(req, 0)
	req = binary.BigEndian.AppendUint16(req, cmd)
	req = append(req, make([]byte, 16)...)
	return binary.BigEndian.AppendUint32(req, uint32(n))
}

func converse(c net.Conn, name string, n int) ([]byte, error) {
	if _, err := enter(c, name); err != nil {
		return nil, err
	}
	if _, err := c.Write(request(0, n)); err != nil {
		return nil, err
	}
	reply := make([]byte, 16+n)
	if _, err := io.ReadFull(c, reply); err != nil {
		return nil, err
	}
	if e := binary.BigEndian.Uint32(reply[4:]); e != 0 {
		return nil, fmt.Errorf("error %d", e)
	}
	return reply[16:], nil
}

func disk(t *testing.T, content string) *block.Mem {
	t.Helper()
	d := block.NewMem(1 << 20)
	if _, err := d.WriteAt([]byte(content), 0); err != nil {
		t.Fatal(err)
	}
	return d
}

func wantVisit(t *testing.T, path, name, content string) {
	t.Helper()
	got, err := visit(path, name, len(content))
	if err != nil || string(got) != content {
		t.Fatalf("visit %s as %q: %q, %v; want %q", path, name, got, err, content)
	}
}

func TestAddServeRemove(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "run", "nbd")
	// Whatever the umask, nobody else gets in.
	for _, umask := range []int{0, 0o077, 0o777} {
		old := unix.Umask(umask)
		n := newFrontend(t, dir, newLocal(t))
		uriA, errA := n.Add(ctx, "a", disk(t, "content of a"), Options{})
		_, errB := n.Add(ctx, "b", disk(t, "content of b"), Options{ReadOnly: true})
		unix.Umask(old)
		if errA != nil || errB != nil {
			t.Fatal(errA, errB)
		}
		if want := "nbd+unix:///a?socket=" + filepath.Join(dir, "a.sock"); uriA != want {
			t.Fatalf("URI %s, want %s", uriA, want)
		}
		for path, mode := range map[string]fs.FileMode{dir: fs.ModeDir | 0o700, n.Path("a"): fs.ModeSocket | 0o600} {
			info, err := os.Lstat(path)
			if err != nil || info.Mode() != mode {
				t.Fatalf("umask %o: %s: %v %v, want %v", umask, path, info.Mode(), err, mode)
			}
		}
		wantVisit(t, n.Path("a"), "a", "content of a")
		wantVisit(t, n.Path("a"), "", "content of a")
		wantVisit(t, n.Path("b"), "b", "content of b")
		if _, err := visit(n.Path("a"), "b", 1); err == nil {
			t.Fatal("the socket of a serves b")
		}
		if st := n.Stats(); len(st) != 2 || st["a"].Reads != 2 || st["b"].ReadBytes != 12 {
			t.Fatalf("stats %+v", st)
		}
		if _, err := n.Add(ctx, "a", disk(t, ""), Options{}); !errors.Is(err, ErrExists) {
			t.Fatal(err)
		}
		if err := n.Remove(ctx, "a"); err != nil {
			t.Fatal(err)
		}
		if err := n.Remove(ctx, "a"); err != nil {
			t.Fatal("again:", err)
		}
		if _, err := visit(n.Path("a"), "a", 1); !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		wantVisit(t, n.Path("b"), "b", "content of b")
		if _, err := n.Add(ctx, "a", disk(t, "another a"), Options{}); err != nil {
			t.Fatal(err)
		}
		wantVisit(t, n.Path("a"), "a", "another a")
		for _, v := range []string{"a", "b"} {
			if err := n.Remove(ctx, v); err != nil {
				t.Fatal(err)
			}
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
			t.Fatalf("left behind: %v %v", left, err)
		}
	}
}

// TestRemoveEndsConnections: a connected client is answered what it has sent, then its connection ends.
func TestRemoveEndsConnections(t *testing.T) {
	n := newFrontend(t, t.TempDir(), newLocal(t))
	if _, err := n.Add(context.Background(), "v", disk(t, "x"), Options{}); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("unix", n.Path("v"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := converse(c, "v", 1); err != nil {
		t.Fatal(err)
	}
	if conns := n.Conns("v"); len(conns) != 1 || conns[0].Export != "v" {
		t.Fatalf("connections %+v", conns)
	}
	if err := n.Remove(context.Background(), "v"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if conns := n.Conns("v"); conns != nil {
		t.Fatalf("connections %+v", conns)
	}
}

// TestReadOnly: a client is told, and refused.
func TestReadOnly(t *testing.T) {
	n := newFrontend(t, t.TempDir(), newLocal(t))
	dev := disk(t, "x")
	if _, err := n.Add(context.Background(), "v", dev, Options{ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("unix", n.Path("v"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if flags, err := enter(c, "v"); err != nil || flags&2 == 0 {
		t.Fatalf("flags %#x, %v", flags, err)
	}
	var reply [16]byte
	_, err = c.Write(append(request(1, 1), 'y'))
	if _, e := io.ReadFull(c, reply[:]); err != nil || e != nil {
		t.Fatal(err, e)
	}
	if e := binary.BigEndian.Uint32(reply[4:]); e != 1 { // EPERM
		t.Errorf("a write is answered with %d", e)
	}
	wantVisit(t, n.Path("v"), "v", "x")
}

// stuck is a device whose reads wait.
type stuck struct {
	*block.Mem
	reading, goOn chan struct{}
}

func (d stuck) ReadAt(p []byte, off int64) (int, error) {
	d.reading <- struct{}{}
	<-d.goOn
	return d.Mem.ReadAt(p, off)
}

// TestRemoveWaitsForCalls: Remove does not say that it is done while the Device is at work.
func TestRemoveWaitsForCalls(t *testing.T) {
	n := newFrontend(t, t.TempDir(), newLocal(t))
	for _, patient := range []bool{false, true} {
		dev := stuck{disk(t, "x"), make(chan struct{}), make(chan struct{})}
		if _, err := n.Add(context.Background(), "v", dev, Options{}); err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("unix", n.Path("v"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var wg sync.WaitGroup
		var got []byte
		wg.Go(func() { got, err = converse(c, "v", 1) })
		<-dev.reading
		ctx, cancel := context.WithCancel(context.Background())
		if !patient {
			cancel()
			if err := n.Remove(ctx, "v"); !errors.Is(err, context.Canceled) {
				t.Errorf("Remove during a call, without patience: %v", err)
			}
			close(dev.goOn)
			wg.Wait()
			continue
		}
		var removed atomic.Bool
		wg.Go(func() {
			if err := n.Remove(ctx, "v"); err != nil {
				t.Error(err)
			}
			removed.Store(true)
		})
		for deadline := time.Now().Add(patience); ; runtime.Gosched() {
			if _, err := os.Lstat(n.Path("v")); errors.Is(err, fs.ErrNotExist) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("the socket stays")
			}
		}
		if removed.Load() {
			t.Error("Remove returned during a call")
		}
		close(dev.goOn)
		wg.Wait()
		cancel()
		if err != nil || string(got) != "x" {
			t.Errorf("what was asked before was answered with %q, %v", got, err)
		}
	}
}

// TestRestart: between the end of one frontend and the start of the next, clients that connect wait, and are served by the next.
func TestRestart(t *testing.T) {
	ctx := context.Background()
	dir, held := t.TempDir(), newLocal(t)
	first := newFrontend(t, dir, held)
	if _, err := first.Add(ctx, "v", disk(t, "old"), Options{}); err != nil {
		t.Fatal(err)
	}
	before, err := os.Lstat(first.Path("v"))
	if err != nil {
		t.Fatal(err)
	}
	wantVisit(t, first.Path("v"), "v", "old")
	if err := first.Drain(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Add(ctx, "w", disk(t, ""), Options{}); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
	var clients []net.Conn
	for range 5 {
		c, err := net.Dial("unix", first.Path("v"))
		if err != nil {
			t.Fatalf("while nobody serves: %v", err)
		}
		defer c.Close()
		clients = append(clients, c)
	}
	second := newFrontend(t, dir, held)
	if _, err := second.Add(ctx, "v", disk(t, "new"), Options{}); err != nil {
		t.Fatal(err)
	}
	for _, c := range clients {
		if got, err := converse(c, "v", 3); err != nil || string(got) != "new" {
			t.Fatalf("%q %v", got, err)
		}
	}
	after, err := os.Lstat(first.Path("v"))
	if err != nil || !os.SameFile(before, after) {
		t.Fatalf("the socket was replaced: %v", err)
	}
}

// TestStaleSocket: a socket whose process died is replaced; a kept one whose path is gone too.
func TestStaleSocket(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	lost := NewLocal(Access{})
	n := newFrontend(t, dir, lost)
	if _, err := n.Add(ctx, "v", disk(t, "dead"), Options{}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(n.Close(), lost.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := visit(n.Path("v"), "v", 1); !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatal(err)
	}
	held := newLocal(t)
	for _, content := range []string{"alive", "moved"} {
		m := newFrontend(t, dir, held)
		if _, err := m.Add(ctx, "v", disk(t, content), Options{}); err != nil {
			t.Fatal(err)
		}
		wantVisit(t, m.Path("v"), "v", content)
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(m.Path("v")); err != nil {
			t.Fatal(err)
		}
	}
}

func TestInUse(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	mine, other := newFrontend(t, dir, newLocal(t)), newFrontend(t, dir, newLocal(t))
	if _, err := mine.Add(ctx, "v", disk(t, "mine"), Options{}); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Add(ctx, "v", disk(t, "stolen"), Options{}); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}
	wantVisit(t, mine.Path("v"), "v", "mine")
	if err := os.WriteFile(other.Path("file"), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Add(ctx, "file", disk(t, ""), Options{}); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}
	if err := other.Remove(ctx, "file"); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(other.Path("file")); err != nil || string(got) != "precious" {
		t.Fatal("the file was changed")
	}
}

func TestNames(t *testing.T) {
	ctx := context.Background()
	n := newFrontend(t, t.TempDir(), newLocal(t))
	for _, name := range []string{"", ".", "..", ".hidden", "a/b", "../a", "a\x00b", "a\nb", "\xff"} {
		if _, err := n.Add(ctx, name, disk(t, ""), Options{}); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", name, err)
		}
		if err := n.Remove(ctx, name); !errors.Is(err, ErrName) {
			t.Errorf("remove %q: %v", name, err)
		}
	}
	uri, err := n.Add(ctx, "a b&c?d#e%f+ü", disk(t, "odd"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(uri, "nbd+unix:///a%20b%26c%3Fd%23e%25f%2B%C3%BC?socket=/") {
		t.Fatal(uri)
	}
	wantVisit(t, n.Path("a b&c?d#e%f+ü"), "a b&c?d#e%f+ü", "odd")
}

// TestPathLength: the longest path works, one byte more is refused by name.
func TestPathLength(t *testing.T) {
	ctx := context.Background()
	dir, err := os.MkdirTemp("/tmp", "x")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	n := newFrontend(t, dir, newLocal(t))
	longest := strings.Repeat("v", MaxPathBytes-len(n.Path("")))
	if _, err := n.Add(ctx, longest, disk(t, "long"), Options{}); err != nil {
		t.Fatal(err)
	}
	wantVisit(t, n.Path(longest), longest, "long")
	if _, err := n.Add(ctx, longest+"v", disk(t, ""), Options{}); !errors.Is(err, ErrPathTooLong) {
		t.Fatal(err)
	}
	// The temporary name must not be what breaks the limit: the directory alone leaves room for the shortest volume.
	deep := filepath.Join(dir, strings.Repeat("d", MaxPathBytes-len(dir)-len("//v.sock")))
	m := newFrontend(t, deep, newLocal(t))
	if _, err := m.Add(ctx, "v", disk(t, "deep"), Options{}); err != nil {
		t.Fatal(err)
	}
	wantVisit(t, m.Path("v"), "v", "deep")
}

// brokenListeners fails as a holder that is gone does.
type brokenListeners struct{}

var errHolder = errors.New("holder is gone")

func (brokenListeners) Listen(context.Context, string, string) (net.Listener, error) {
	return nil, errHolder
}
func (brokenListeners) Forget(context.Context, string) error { return errHolder }

func TestHolderFails(t *testing.T) {
	ctx := context.Background()
	n := newFrontend(t, t.TempDir(), brokenListeners{})
	for range 2 { // a failed Add leaves nothing behind
		if _, err := n.Add(ctx, "v", disk(t, ""), Options{}); !errors.Is(err, errHolder) {
			t.Fatal(err)
		}
	}
	if err := n.Remove(ctx, "v"); !errors.Is(err, errHolder) {
		t.Fatal(err)
	}
}

// TestConcurrent adds, uses and removes many volumes at the same time.
func TestConcurrent(t *testing.T) {
	ctx := context.Background()
	n := newFrontend(t, t.TempDir(), newLocal(t))
	var wg sync.WaitGroup
	for i := range 30 {
		wg.Go(func() {
			name := fmt.Sprint("v", i)
			for range 3 {
				if _, err := n.Add(ctx, name, disk(t, name), Options{}); err != nil {
					t.Error(err)
					return
				}
				if got, err := visit(n.Path(name), name, len(name)); err != nil || string(got) != name {
					t.Errorf("%q %v", got, err)
				}
				_ = n.Stats()
				_ = n.Conns(name)
				if err := n.Remove(ctx, name); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestConfig(t *testing.T) {
	for _, cfg := range []NBDConfig{{}, {Dir: "relative", Listeners: NewLocal(Access{})}, {Dir: "/run"}} {
		if _, err := NewNBD(cfg); err == nil {
			t.Errorf("%+v accepted", cfg)
		}
	}
}
