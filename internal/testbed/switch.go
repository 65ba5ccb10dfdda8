package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Switch is an Ethernet switch in this process with a network namespace on every port, so that a test decides frame by frame what passes between nodes, in each direction. It needs
// root, /dev/net/tun and iproute2, and nothing of the kernel's traffic control. Its verbs may be called concurrently. A frame that a cut stops is lost without a word, as on a real cable:
// nobody gets an error, and nothing ends but what notices by itself.
type Switch struct {
	name  string
	ports []*port
	ctx   context.Context
	stop  context.CancelFunc
	wg    sync.WaitGroup

	mu    sync.Mutex
	links map[link]path
}

// port is one namespace's end: its device tap0 there, and our end of it.
type port struct {
	namespace string
	tap       *os.File
}

// link is a direction between two ports.
type link struct{ from, to int }

// path is what happens to frames on a link.
type path struct {
	cut   bool
	delay time.Duration
	queue chan frame
}

type frame struct {
	due  time.Time
	data []byte
}

const (
	switchMTU = 9000
	maxFrame  = switchMTU + 14
	// queueFrames bounds what waits on a link; what comes on top is lost, as in any switch.
	queueFrames = 4096
)

// NewSwitch makes n namespaces called NAME-0 … and connects them. The caller closes it.
func NewSwitch(name string, n int) (*Switch, error) {
	s := &Switch{name: name, links: map[link]path{}}
	s.ctx, s.stop = context.WithCancel(context.Background())
	for i := range n {
		p, err := s.plug(i)
		if p != nil {
			s.ports = append(s.ports, p)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("port %d: %w", i, err), s.Close())
		}
	}
	for from := range n {
		for to := range n {
			if from != to {
				q := make(chan frame, queueFrames)
				s.links[link{from, to}] = path{queue: q}
				s.wg.Go(func() { s.carry(q, s.ports[to].tap) })
			}
		}
	}
	for i := range n {
		s.wg.Go(func() { s.read(i) })
	}
	return s, nil
}

// Namespace is the name of a port's network namespace (ip netns).
func (s *Switch) Namespace(i int) string { return s.ports[i].namespace }

// Address is a port's IPv4 address.
func (s *Switch) Address(i int) string { return "10.83.0." + strconv.Itoa(i+1) }

// Cut loses every frame from one port to another, in this direction only.
func (s *Switch) Cut(from, to int) { s.change(link{from, to}, func(p *path) { p.cut = true }) }

// Delay holds every frame from one port to another for d.
func (s *Switch) Delay(from, to int, d time.Duration) {
	s.change(link{from, to}, func(p *path) { p.delay = d })
}

// Isolate cuts a port off from all others, in both directions.
func (s *Switch) Isolate(i int) {
	for other := range s.ports {
		if other != i {
			s.Cut(i, other)
			s.Cut(other, i)
		}
	}
}

// Heal ends all cuts and delays.
func (s *Switch) Heal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l, p := range s.links {
		s.links[l] = path{queue: p.queue}
	}
}

func (s *Switch) change(l link, edit func(*path)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, ok := s.links[l]
	if !ok {
		return
	}
	edit(&p)
	s.links[l] = p
}

// Close unplugs everything and removes the namespaces; what still runs in them keeps them alive, but without a name or a network.
func (s *Switch) Close() error {
	s.stop()
	var errs []error
	for _, p := range s.ports {
		if p.tap != nil {
			errs = append(errs, p.tap.Close())
		}
	}
	s.wg.Wait()
	for _, p := range s.ports {
		errs = append(errs, run("ip", "netns", "del", p.namespace))
	}
	s.ports = nil
	return errors.Join(errs...)
}

// run runs a program and returns what it said when it fails.
func run(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w: %s", name, args, err, out)
	}
	return nil
}

func hardware(i int) string { return fmt.Sprintf("02:00:00:00:53:%02x", i) }

// plug makes a namespace with its device. What it made is returned with an error too.
func (s *Switch) plug(i int) (*port, error) {
	p := &port{namespace: s.name + "-" + strconv.Itoa(i)}
	if err := run("ip", "netns", "add", p.namespace); err != nil {
		return nil, err
	}
	var err error
	if p.tap, err = openTap(p.namespace); err != nil {
		return p, err
	}
	for _, args := range [][]string{
		{"link", "set", "lo", "up"},
		{"link", "set", "tap0", "address", hardware(i), "mtu", strconv.Itoa(switchMTU), "up"},
		{"addr", "add", s.Address(i) + "/24", "dev", "tap0"},
	} {
		if err := run("ip", append([]string{"-n", p.namespace}, args...)...); err != nil {
			return p, err
		}
	}
	return p, nil
}

// openTap makes tap0 in a namespace and returns our end (Linux, Documentation/networking/tuntap.rst). A thread of its own goes there and back.
func openTap(namespace string) (*os.File, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
	if err != nil {
		return nil, err
	}
	defer home.Close()
	there, err := os.Open("/var/run/netns/" + namespace)
	if err != nil {
		return nil, err
	}
	defer there.Close()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("enter namespace %s: %w", namespace, err)
	}
	tap, err := makeTap()
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		panic("testbed: cannot leave a network namespace: " + back.Error()) // this thread is lost, and everything on it would be in the wrong network
	}
	return tap, err
}

func makeTap() (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/net/tun: %w", err)
	}
	req := struct {
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}{flags: unix.IFF_TAP | unix.IFF_NO_PI}
	copy(req.name[:], "tap0")
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return nil, errors.Join(fmt.Errorf("TUNSETIFF: %w", errno), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "tap0"), nil
}

// read sends what comes out of a port where its destination address says: to one port, or for all the others (broadcast, multicast) to each.
func (s *Switch) read(from int) {
	buf := make([]byte, maxFrame)
	for {
		n, err := s.ports[from].tap.Read(buf)
		if err != nil {
			return
		}
		if n < 14 {
			continue
		}
		to := -1
		if buf[0]&1 == 0 { // the last byte of our addresses is the port's number
			if to = int(buf[5]); to >= len(s.ports) || to == from {
				continue
			}
		}
		s.send(from, to, append([]byte{}, buf[:n]...))
	}
}

func (s *Switch) send(from, to int, data []byte) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for other := range s.ports {
		p, ok := s.links[link{from, other}]
		if !ok || p.cut || to >= 0 && to != other {
			continue
		}
		select {
		case p.queue <- frame{due: now.Add(p.delay), data: data}:
		default:
		}
	}
}

// carry hands a link's frames over when they are due.
func (s *Switch) carry(queue <-chan frame, to *os.File) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case f := <-queue:
			if wait := time.Until(f.due); wait > 0 {
				timer.Reset(wait)
				select {
				case <-s.ctx.Done():
					return
				case <-timer.C:
				}
			}
			if _, err := to.Write(f.data); err != nil && s.ctx.Err() != nil {
				return
			}
		}
	}
}
