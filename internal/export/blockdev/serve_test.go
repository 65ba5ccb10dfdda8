package blockdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/block"
)

var errNotHeld = errors.New("not held")

// keeper holds descriptors in the test's process, and answers children that ask over a socket pair: one packet a request, PUT, GET or DROP and a name.
type keeper struct {
	mu   sync.Mutex // guards held
	held map[string]*os.File
}

func newKeeper(t testing.TB) *keeper {
	k := &keeper{held: map[string]*os.File{}}
	t.Cleanup(func() {
		for name, f := range k.held {
			t.Errorf("%s is still held", name)
			f.Close()
		}
	})
	return k
}

func dup(f *os.File) (*os.File, error) {
	c, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	if ctlErr := c.Control(func(p uintptr) { fd, err = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0) }); ctlErr != nil {
		return nil, ctlErr
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

func (k *keeper) Put(_ context.Context, name string, f *os.File) error {
	d, err := dup(f)
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if old := k.held[name]; old != nil {
		old.Close()
	}
	k.held[name] = d
	return nil
}

func (k *keeper) Get(_ context.Context, name string) (*os.File, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if f := k.held[name]; f != nil {
		return dup(f)
	}
	return nil, errNotHeld
}

func (k *keeper) Drop(_ context.Context, name string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if f := k.held[name]; f != nil {
		f.Close()
		delete(k.held, name)
	}
	return nil
}

func (k *keeper) holds(name string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.held[name] != nil
}

// answer serves one child until it is gone.
func (k *keeper) answer(c *net.UnixConn) {
	defer c.Close()
	b, oob := make([]byte, 512), make([]byte, 64)
	for {
		n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
		if err != nil || n == 0 {
			return
		}
		verb, name, _ := strings.Cut(string(b[:n]), " ")
		var rights []byte
		switch verb {
		case "PUT":
			msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
			if err != nil || len(msgs) != 1 {
				return
			}
			fds, err := unix.ParseUnixRights(&msgs[0])
			if err != nil || len(fds) != 1 {
				return
			}
			f := os.NewFile(uintptr(fds[0]), name)
			err = k.Put(context.Background(), name, f)
			f.Close()
			if err != nil {
				return
			}
		case "GET":
			f, err := k.Get(context.Background(), name)
			if err == nil {
				rights = unix.UnixRights(int(f.Fd()))
				defer f.Close()
			}
		case "DROP":
			k.Drop(context.Background(), name)
		}
		if _, _, err := c.WriteMsgUnix([]byte("ok"), rights, nil); err != nil {
			return
		}
	}
}

// remoteKeeper asks the test's process.
type remoteKeeper struct {
	mu sync.Mutex // one question at a time
	c  *net.UnixConn
}

func (k *remoteKeeper) ask(text string, fd int) (*os.File, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var rights []byte
	if fd >= 0 {
		rights = unix.UnixRights(fd)
	}
	if _, _, err := k.c.WriteMsgUnix([]byte(text), rights, nil); err != nil {
		return nil, err
	}
	b, oob := make([]byte, 64), make([]byte, 64)
	_, oobn, _, _, err := k.c.ReadMsgUnix(b, oob)
	if err != nil || oobn == 0 {
		return nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(fds[0])
	return os.NewFile(uintptr(fds[0]), text), nil
}

func (k *remoteKeeper) Put(_ context.Context, name string, f *os.File) error {
	d, err := dup(f)
	if err != nil {
		return err
	}
	defer d.Close()
	c, err := d.SyscallConn()
	if err != nil {
		return err
	}
	if ctlErr := c.Control(func(fd uintptr) { _, err = k.ask("PUT "+name, int(fd)) }); ctlErr != nil {
		return ctlErr
	}
	return err
}

func (k *remoteKeeper) Get(_ context.Context, name string) (*os.File, error) {
	f, err := k.ask("GET "+name, -1)
	if f == nil && err == nil {
		err = errNotHeld
	}
	return f, err
}

func (k *remoteKeeper) Drop(_ context.Context, name string) error {
	_, err := k.ask("DROP "+name, -1)
	return err
}

// fileDevice keeps its bytes in a file, which outlives the process.
type fileDevice struct {
	f    *os.File
	size int64

	zeroed int64 // how many bytes Zero was given; guarded by mu
	mu     sync.Mutex
}

var _ block.Device = (*fileDevice)(nil)

func openDevice(path string) (*fileDevice, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return &fileDevice{f: f, size: info.Size()}, nil
}

func (d *fileDevice) ReadAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange(off, int64(len(p)), d.size); err != nil {
		return 0, err
	}
	return d.f.ReadAt(p, off)
}

func (d *fileDevice) WriteAt(p []byte, off int64) (int, error) {
	if err := block.CheckRange(off, int64(len(p)), d.size); err != nil {
		return 0, err
	}
	return d.f.WriteAt(p, off)
}

func (d *fileDevice) Zero(off, n int64) error {
	if err := block.CheckRange(off, n, d.size); err != nil {
		return err
	}
	d.mu.Lock()
	d.zeroed += n
	d.mu.Unlock()
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (d *fileDevice) Flush() error { return unix.Fdatasync(int(d.f.Fd())) }
func (d *fileDevice) Extents(off, n int64) ([]block.Extent, error) {
	return []block.Extent{{Off: off, N: n, State: block.Data}}, nil
}
func (d *fileDevice) Size() int64  { return d.size }
func (d *fileDevice) Close() error { return d.f.Close() }

// serveMain is a process that serves one volume from a file until it is killed, or hands over when standard input ends: RUNDIR DEVDIR VOLUME FILE, and the keeper's socket as
// descriptor 3. It says "ready" and the number of requests sent again is said at the end.
func serveMain(args []string) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "serve:", err)
		return 1
	}
	sock := os.NewFile(3, "keeper")
	conn, err := net.FileConn(sock)
	if err != nil {
		return fail(err)
	}
	sock.Close()
	exe, err := os.Executable()
	if err != nil {
		return fail(err)
	}
	f, err := New(Config{RunDir: args[0], DevDir: args[1], Keeper: &remoteKeeper{c: conn.(*net.UnixConn)}, NotHeld: errNotHeld, Tool: []string{exe, "blockdev"},
		Report: func(volume string, err error) { fmt.Fprintln(os.Stderr, "serve: report:", volume, err) }})
	if err != nil {
		return fail(err)
	}
	dev, err := openDevice(args[3])
	if err != nil {
		return fail(err)
	}
	if _, err := f.Add(context.Background(), args[2], dev, Options{}); err != nil {
		return fail(err)
	}
	fmt.Println("ready")
	os.Stdin.Read(make([]byte, 1))
	fmt.Println("resent", f.Stats()[args[2]].Resent)
	if err := f.Detach(context.Background(), args[2]); err != nil {
		return fail(err)
	}
	if err := f.Close(); err != nil {
		return fail(err)
	}
	return 0
}

// child is a running serveMain.
type child struct {
	t     testing.TB
	cmd   *exec.Cmd
	stdin interface{ Close() error }
	wg    sync.WaitGroup
	out   *os.File
}

// start runs a server and returns once it serves.
func (b *bed) start(volume, file string) *child {
	t := b.t
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	ours.Close()
	c := &child{t: t, cmd: exec.Command(exe, "serve", b.run, b.devs, volume, file)}
	c.cmd.ExtraFiles = []*os.File{theirs}
	c.cmd.Stderr = os.Stderr
	c.stdin, err = c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c.out, c.cmd.Stdout = r, w
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	w.Close()
	c.wg.Go(func() { b.keeper.answer(conn.(*net.UnixConn)) })
	line := make([]byte, 64)
	n, _ := r.Read(line)
	if string(line[:n]) != "ready\n" {
		c.kill()
		t.Fatalf("server said %q", line[:n])
	}
	return c
}

// kill kills the server with SIGKILL and waits until it is gone.
func (c *child) kill() {
	c.cmd.Process.Signal(syscall.SIGKILL)
	c.cmd.Wait()
	c.out.Close()
	c.wg.Wait()
}

// handOver has the server detach and end.
func (c *child) handOver() {
	c.t.Helper()
	c.stdin.Close()
	if err := c.cmd.Wait(); err != nil {
		c.t.Errorf("server: %v", err)
	}
	c.out.Close()
	c.wg.Wait()
}

// bed is where a test's block devices are.
type bed struct {
	t      testing.TB
	dir    string
	run    string
	devs   string
	keeper *keeper
	open   []*fileDevice // closed when everything else was cleaned up
}

func newBed(t testing.TB) *bed {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ashlar-blockdev-")
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{t: t, dir: dir, run: filepath.Join(dir, "run"), devs: filepath.Join(dir, "dev")}
	t.Cleanup(func() {
		for _, d := range b.open {
			d.Close()
		}
		os.RemoveAll(dir)
	})
	b.keeper = newKeeper(t)
	return b
}

// frontend returns one in this process.
func (b *bed) frontend() *Frontend {
	b.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		b.t.Fatal(err)
	}
	f, err := New(Config{RunDir: b.run, DevDir: b.devs, Keeper: b.keeper, NotHeld: errNotHeld, Tool: []string{exe, "blockdev"},
		Report: func(volume string, err error) { b.t.Logf("report: %s: %v", volume, err) }})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		if err := f.Close(); err != nil {
			b.t.Error(err)
		}
	})
	return f
}

// file makes an empty file of n bytes.
func (b *bed) file(name string, n int64) string {
	b.t.Helper()
	path := filepath.Join(b.dir, name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		b.t.Fatal(err)
	}
	if err := os.Truncate(path, n); err != nil {
		b.t.Fatal(err)
	}
	return path
}

// device returns the file as a Device.
func (b *bed) device(path string) *fileDevice {
	b.t.Helper()
	d, err := openDevice(path)
	if err != nil {
		b.t.Fatal(err)
	}
	b.open = append(b.open, d)
	return d
}

// command runs a program and returns what it wrote.
func (b *bed) command(name string, args ...string) string {
	b.t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		b.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// workload writes, syncs, compares and deletes files in dir until the deadline.
func workload(dir string, deadline time.Time) error {
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := 0; time.Now().Before(deadline); i++ {
		p := make([]byte, rnd.IntN(2<<20)+1)
		for j := range p {
			p[j] = byte(rnd.Uint32())
		}
		name := filepath.Join(dir, strconv.Itoa(i%20))
		f, err := os.Create(name)
		if err != nil {
			return err
		}
		_, err = f.Write(p)
		if i%2 == 0 {
			err = errors.Join(err, f.Sync())
			unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		got, err := os.ReadFile(name)
		if err != nil || !bytes.Equal(got, p) {
			return fmt.Errorf("file %d differs: %w", i, err)
		}
		if i%3 == 0 {
			if err := os.Remove(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// workloadMain is a process that does the workload: DIR DURATION.
func workloadMain(args []string) int {
	d, err := time.ParseDuration(args[1])
	if err == nil {
		err = workload(args[0], time.Now().Add(d))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "workload:", err)
		return 1
	}
	return 0
}
