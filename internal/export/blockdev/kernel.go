package blockdev

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/block"
	"ashlar/internal/export/netnbd"
	"ashlar/internal/nbd"
)

const (
	// pairBufferBytes is how much the kernel holds between itself and us: a request that does not fit is sent in parts, and whoever sends it waits.
	pairBufferBytes = 4 << 20
	// takenWithin and takenTries are how long, and for how many offers, the driver may need to see that the connection before is dead. A machine where a process takes seconds to
	// start must not be told that a device lives.
	takenWithin = 2 * time.Second
	takenTries  = 20
	// againFirst and againMost are how long a broken connection is left before the driver is given another: the first time, and at most.
	againFirst = 20 * time.Millisecond
	againMost  = 5 * time.Second
)

// kernelServed is a volume that is a device of the kernel's nbd driver: a socket pair, of which the driver has one end and our server the other. When the connection ends and nobody wanted
// that, the driver is given another.
type kernelServed struct {
	f      *Frontend
	volume string
	export nbd.Export
	server *nbd.Server
	dev    string // /dev/nbdN
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex    // guards the rest
	leaving bool          // the connection's end is wanted
	serving bool          // the serving goroutine goes on
	ended   chan struct{} // closed when it does not
}

// identifier is what tells volume's device from all others of the host.
func (f *Frontend) identifier(volume string) string {
	return "ashlar " + filepath.Join(f.cfg.RunDir, volume)
}

// nbdDevices returns the devices (/dev/nbdN) that were made with this identifier. It asks the kernel alone.
func nbdDevices(identifier string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(sysBlock, "nbd*", "backend"))
	if err != nil {
		return nil, fmt.Errorf("blockdev: list nbd devices: %w", err)
	}
	var out []string
	for _, name := range files {
		dev := "/dev/" + filepath.Base(filepath.Dir(name))
		if backendOf(dev) == identifier {
			out = append(out, dev)
		}
	}
	return out, nil
}

// backendOf is the identifier that dev was made with; empty if it has none.
func backendOf(dev string) string {
	text, err := os.ReadFile(filepath.Join(sysBlock, filepath.Base(dev), "backend"))
	if err != nil {
		return "" // disconnected meanwhile
	}
	return strings.TrimSuffix(string(text), "\n")
}

// usesKernel chooses what a new device is made of. FUSE with resend comes first: a kill is a pause there, and nothing of it was ever seen to fail. Where the kernel cannot resend, a kill would
// be EIO, and its nbd driver keeps what was not answered.
func usesKernel(resends bool, kernel func() bool) bool { return !resends && kernel() }

func (f *Frontend) choose(ctx context.Context) bool {
	if f.cfg.onlyFUSE {
		return false
	}
	return usesKernel(f.Resends(), func() bool { return f.kernelThere(ctx) })
}

// kernelThere tells whether the driver can be used, after loading its module if need be.
func (f *Frontend) kernelThere(ctx context.Context) bool {
	err := driverThere()
	if errors.Is(err, netnbd.ErrAbsent) {
		if _, loadErr := f.tool(ctx, verbNBDLoad); loadErr == nil {
			err = driverThere()
		}
	}
	if err != nil && !errors.Is(err, netnbd.ErrAbsent) {
		f.cfg.Report("", fmt.Errorf("blockdev: find the kernel's nbd driver: %w", err))
	}
	return err == nil
}

func driverThere() error {
	c, err := netnbd.Dial()
	if err != nil {
		return err
	}
	return c.Close()
}

// heldSocket returns the server's end of the connection that a process before had; nil if none is held, or a FUSE session is, which other tells.
func (f *Frontend) heldSocket(ctx context.Context, volume string) (held *os.File, other bool, err error) {
	held, err = f.cfg.Keeper.Get(ctx, heldName(volume))
	if errors.Is(err, f.cfg.NotHeld) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("look for the held descriptor: %w", err)
	}
	info, err := held.Stat()
	if err != nil || info.Mode().Type() != os.ModeSocket {
		return nil, true, errors.Join(err, held.Close())
	}
	return held, false, nil
}

// addKernel makes dev volume's device of the nbd driver, or goes on with the one that a process before made; nil if it is to be FUSE.
func (f *Frontend) addKernel(ctx context.Context, volume string, dev block.Device, o Options) (*kernelServed, error) {
	held, fuse, err := f.heldSocket(ctx, volume)
	if err != nil {
		return nil, err
	}
	found, err := nbdDevices(f.identifier(volume))
	if err != nil || (len(found) == 0 && held == nil && (fuse || !f.choose(ctx))) {
		return nil, errors.Join(err, closeFile(held))
	}
	k, err := f.newKernel(volume, dev, o)
	if err != nil {
		return nil, errors.Join(err, closeFile(held))
	}
	if len(found) > 0 {
		k.dev = found[0]
		err = k.goOn(ctx, held)
	} else if err = closeFile(held); err == nil { // what is held has lost its device
		err = errUnconnected
	}
	if errors.Is(err, errUnconnected) {
		err = k.begin(ctx)
	}
	if err != nil {
		k.cancel()
		return nil, errors.Join(err, k.server.Close())
	}
	return k, nil
}

func (f *Frontend) newKernel(volume string, dev block.Device, o Options) (*kernelServed, error) {
	export := nbd.Export{Name: volume, Device: dev, ReadOnly: o.ReadOnly, Far: o.Far}
	if w, ok := dev.(interface{ MayWait() bool }); ok {
		export.MayWait = w.MayWait
	}
	server, err := nbd.NewServer(nbd.Config{Exports: nbd.Single(export), Report: func(err error) { f.cfg.Report(volume, err) }})
	if err != nil {
		return nil, err
	}
	k := &kernelServed{f: f, volume: volume, export: export, server: server}
	k.ctx, k.cancel = context.WithCancel(f.life)
	return k, nil
}

// errUnconnected: the device was disconnected, and is no more than what its last user holds.
var errUnconnected = errors.New("nbd device was disconnected")

// begin makes the device.
func (k *kernelServed) begin(ctx context.Context) error {
	f := k.f
	if err := errors.Join(f.cfg.Keeper.Drop(ctx, heldName(k.volume)), f.dropState(k.volume), f.clean(ctx, k.volume)); err != nil {
		return err
	}
	p, err := k.pair()
	if err != nil {
		return err
	}
	k.dev, err = f.toolWith(ctx, p.kernel, verbNBDConnect, f.identifier(k.volume), bytesText(k.export.Device), strconv.Itoa(int(p.flags)))
	if err = errors.Join(err, p.kernel.Close()); err != nil {
		return errors.Join(err, p.ours.Close())
	}
	return k.settle(ctx, p.ours, p.state)
}

// goOn takes the device up that a process before served: with its connection, if that was left in order, else with a new one.
func (k *kernelServed) goOn(ctx context.Context, held *os.File) error {
	f := k.f
	state, err := f.takeState(k.volume)
	if err != nil {
		return errors.Join(err, closeFile(held))
	}
	if held != nil && state != nil {
		return k.settle(ctx, held, state)
	}
	if held != nil { // what its process had read of it is lost: the driver has to send it again, over another
		if err := errors.Join(shut(held), f.cfg.Keeper.Drop(ctx, heldName(k.volume))); err != nil {
			return fmt.Errorf("end the held connection: %w", err)
		}
	}
	p, err := k.reconnect(ctx)
	if err != nil {
		return err
	}
	return k.settle(ctx, p.ours, p.state)
}

// settle has the connection held, serves it, and sees to size and link.
func (k *kernelServed) settle(ctx context.Context, conn *os.File, state []byte) error {
	f := k.f
	if err := f.cfg.Keeper.Put(ctx, heldName(k.volume), conn); err != nil {
		return errors.Join(fmt.Errorf("have the connection held: %w", err), conn.Close())
	}
	k.start(conn, state)
	have, err := loopBytes(k.dev)
	if err == nil && have != k.export.Device.Size()/sectorBytes*sectorBytes {
		err = k.resize(ctx)
	}
	if err = errors.Join(err, f.link(k.volume, k.dev)); err != nil {
		// What is not answered waits for the next Add.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoWithin)
		defer cancel()
		return errors.Join(err, k.detach(ctx))
	}
	return nil
}

// pair is a new connection: our end, the driver's, and what the server and the driver are told of it.
type pair struct {
	ours, kernel *os.File
	state        []byte
	flags        uint16
}

func (k *kernelServed) pair() (pair, error) {
	var p pair
	var err error
	if p.state, p.flags, err = nbd.FreshState(k.export); err != nil {
		return p, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return p, fmt.Errorf("make a socket pair: %w", err)
	}
	for _, fd := range fds { // smaller buffers only cost time
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, pairBufferBytes)
	}
	p.ours, p.kernel = os.NewFile(uintptr(fds[0]), "nbd server"), os.NewFile(uintptr(fds[1]), "nbd driver")
	return p, nil
}

// reconnect gives the driver a new connection in place of a dead one. ErrExists if that lives; errUnconnected.
func (k *kernelServed) reconnect(ctx context.Context) (pair, error) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for began, try := time.Now(), 0; ; try++ {
		if try >= takenTries && time.Since(began) >= takenWithin {
			return pair{}, fmt.Errorf("%s is served by another process: %w", k.dev, ErrExists)
		}
		p, err := k.pair()
		if err != nil {
			return p, err
		}
		_, err = k.f.toolWith(ctx, p.kernel, verbNBDReconnect, k.dev, k.f.identifier(k.volume), bytesText(k.export.Device))
		err = errors.Join(err, p.kernel.Close())
		if errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("%s: %w: %w", k.dev, errUnconnected, err)
		}
		if err != nil {
			return pair{}, errors.Join(err, p.ours.Close())
		}
		// The driver drops what it has no use for, and says nothing: then this is the last end.
		if !hungUp(p.ours) {
			return p, nil
		}
		if err := p.ours.Close(); err != nil {
			return pair{}, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return pair{}, context.Cause(ctx)
		}
	}
}

// hungUp tells whether the other end of a socket is closed.
func hungUp(f *os.File) bool {
	fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLRDHUP}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0 && fds[0].Revents&(unix.POLLHUP|unix.POLLRDHUP|unix.POLLERR) != 0
}

func bytesText(dev block.Device) string {
	return strconv.FormatInt(dev.Size()/sectorBytes*sectorBytes, 10)
}

func (k *kernelServed) resize(ctx context.Context) error {
	_, err := k.f.tool(ctx, verbNBDResize, k.dev, k.f.identifier(k.volume), bytesText(k.export.Device))
	return err
}

// start serves conn, or a new connection if that is nil, until the connection's end is wanted.
func (k *kernelServed) start(conn *os.File, state []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.startLocked(conn, state)
}

func (k *kernelServed) startLocked(conn *os.File, state []byte) {
	k.leaving, k.serving, k.ended = false, true, make(chan struct{})
	k.wg.Go(func() {
		wait := againFirst
		for {
			if conn != nil {
				began := time.Now()
				err := errors.Join(k.server.ServeAdopted(conn, state), closeFile(conn))
				if k.over() {
					return
				}
				if time.Since(began) > againMost {
					wait = againFirst
				}
				k.f.cfg.Report(k.volume, fmt.Errorf("blockdev: the connection of %s ended, it gets another: %w", k.dev, errors.Join(errBroken, err)))
			}
			select {
			case <-time.After(wait):
			case <-k.ctx.Done():
			}
			if k.over() {
				return
			}
			conn, state = k.again()
			wait = min(2*wait, againMost)
		}
	})
}

// errBroken: nobody wanted the connection to end.
var errBroken = errors.New("connection to the kernel's nbd driver broken")

// again is reconnect for the serving goroutine; nil if that failed.
func (k *kernelServed) again() (*os.File, []byte) {
	p, err := k.reconnect(k.ctx)
	if err == nil {
		err = k.f.cfg.Keeper.Put(k.ctx, heldName(k.volume), p.ours)
	}
	if err != nil {
		k.f.cfg.Report(k.volume, fmt.Errorf("blockdev: connect again to the kernel's nbd driver: %w", errors.Join(err, closeFile(p.ours))))
		return nil, nil
	}
	return p.ours, p.state
}

// over tells the serving goroutine whether it ends.
func (k *kernelServed) over() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.leaving && k.ctx.Err() == nil {
		return false
	}
	k.serving = false
	close(k.ended)
	return true
}

// leave says that the connection's end is wanted, and returns what is closed when it is served no more.
func (k *kernelServed) leave() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.leaving = true
	return k.ended
}

// stay takes leave back.
func (k *kernelServed) stay() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.leaving = false; !k.serving {
		k.startLocked(nil, nil)
	}
}

// detach ends serving: requests that arrived are answered, and the connection waits with the Keeper. After an error it is served on.
func (k *kernelServed) detach(ctx context.Context) error {
	ended := k.leave()
	given, err := k.detachConn(ctx, ended)
	if err != nil {
		for _, d := range given {
			err = errors.Join(err, d.File.Close())
		}
		k.server.Resume(k.volume)
		k.stay()
		return err
	}
	for _, d := range given { // none if the connection was dead: the next process makes another
		if err := k.f.saveState(k.volume, d.State); err != nil {
			k.server.Resume(k.volume)
			k.start(d.File, d.State)
			return err
		}
		if err := d.File.Close(); err != nil {
			return fmt.Errorf("close the connection: %w", err)
		}
	}
	return k.close()
}

// detachConn is the server's Detach, repeated until nothing is served: a connection that is just being taken up is not seen by it.
func (k *kernelServed) detachConn(ctx context.Context, ended <-chan struct{}) (given []nbd.Detached, err error) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		more, err := k.server.Detach(ctx, k.volume)
		given = append(given, more...)
		if err != nil {
			return given, err
		}
		select {
		case <-ended:
			return given, nil
		case <-ctx.Done():
			return given, context.Cause(ctx)
		case <-tick.C:
		}
	}
}

func within(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// close frees what is no longer served.
func (k *kernelServed) close() error {
	k.cancel()
	k.wg.Wait()
	return k.server.Close()
}

// remove has the driver let the connection go, unless somebody uses the device. ErrBusy.
func (k *kernelServed) remove(ctx context.Context) error {
	ended := k.leave()
	if err := k.f.dropDevice(ctx, k.volume, k.dev, verbNBDRemove); err != nil {
		k.stay()
		return err
	}
	// From here on nobody can get at it, and there is no way back.
	flushErr := k.export.Device.Flush()
	return errors.Join(flushErr, k.gone(ctx, ended))
}

// force breaks the connection first: a driver that waits for us to take something would wait for ever.
func (k *kernelServed) force(ctx context.Context) error {
	ended := k.leave()
	now, cancel := context.WithCancel(ctx)
	cancel()
	given, _ := k.server.Detach(now, k.volume) // what it says is that the connection was cut
	var err error
	for _, d := range given {
		err = errors.Join(err, shut(d.File))
	}
	err = errors.Join(err, k.f.dropDevice(ctx, k.volume, k.dev, verbNBDDrop))
	return errors.Join(err, k.gone(ctx, ended))
}

// gone waits until nothing is served, and takes the rest away.
func (k *kernelServed) gone(ctx context.Context, ended <-chan struct{}) error {
	if err := within(ctx, ended); err != nil {
		return err
	}
	return errors.Join(k.f.forget(ctx, k.volume), k.close())
}

// forget takes away what belongs to a device that is gone.
func (f *Frontend) forget(ctx context.Context, volume string) error {
	if err := f.cfg.Keeper.Drop(ctx, heldName(volume)); err != nil {
		return fmt.Errorf("drop the held connection: %w", err)
	}
	return errors.Join(f.dropState(volume), f.unlink(volume))
}

// dropDevice runs a verb that disconnects dev. ErrBusy if it is used, and the verb minds.
func (f *Frontend) dropDevice(ctx context.Context, volume, dev, verb string) error {
	_, err := f.tool(ctx, verb, dev, f.identifier(volume))
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s is open or mounted; close or unmount it first: %w: %w", f.Path(volume), ErrBusy, err)
	}
	return err
}

// removeKernelHeld takes away volume's devices of the nbd driver, which nobody serves; false if there is none and none is held. The verb says whether that minds users.
func (f *Frontend) removeKernelHeld(ctx context.Context, volume, verb string) (bool, error) {
	held, _, err := f.heldSocket(ctx, volume)
	if err != nil {
		return false, err
	}
	found, err := nbdDevices(f.identifier(volume))
	if err != nil || (held == nil && len(found) == 0) {
		return false, errors.Join(err, closeFile(held))
	}
	for _, dev := range found {
		if err := f.dropDevice(ctx, volume, dev, verb); err != nil {
			return true, errors.Join(err, closeFile(held))
		}
	}
	return true, errors.Join(closeFile(held), f.forget(ctx, volume))
}

// statePath is where an orderly end leaves what the next process must know of the connection.
func (f *Frontend) statePath(volume string) string {
	return filepath.Join(f.cfg.RunDir, "blockdev", volume+".json")
}

// saveState is in one step: there is a whole state or none. A host that goes down takes the device with it, so nothing is synced.
func (f *Frontend) saveState(volume string, state []byte) error {
	path := f.statePath(volume)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("save the state of a connection: %w", err)
	}
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path))
	if err := os.WriteFile(tmp, state, 0o600); err != nil {
		return fmt.Errorf("save the state of a connection: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("save the state of a connection: %w", err)
	}
	return nil
}

// takeState returns the state that was saved, nil if there is none, and removes it: it is good once, for as soon as one byte more is read it is wrong.
func (f *Frontend) takeState(volume string) ([]byte, error) {
	state, err := os.ReadFile(f.statePath(volume))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the state of a connection: %w", err)
	}
	return state, f.dropState(volume)
}

func (f *Frontend) dropState(volume string) error {
	if err := os.Remove(f.statePath(volume)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the state of a connection: %w", err)
	}
	return nil
}

func closeFile(f *os.File) error {
	if f == nil {
		return nil
	}
	if err := f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("close %s: %w", f.Name(), err)
	}
	return nil
}

// shut ends a connection whoever else has a copy of it, and closes f.
func shut(f *os.File) error {
	err := unix.Shutdown(int(f.Fd()), unix.SHUT_RDWR)
	if err != nil && !errors.Is(err, unix.ENOTCONN) {
		return errors.Join(fmt.Errorf("end a connection: %w", err), closeFile(f))
	}
	return closeFile(f)
}

func (k *kernelServed) stats() Stats {
	s := k.server.Stats()[k.volume]
	return Stats{Reads: s.Reads, Writes: s.Writes, Flushes: s.Flushes, Zeroes: s.Zeroes, ReadBytes: s.ReadBytes, WrittenBytes: s.WrittenBytes, Errors: s.Errors, Conns: 1}
}
