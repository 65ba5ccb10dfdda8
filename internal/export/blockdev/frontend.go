package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"ashlar/internal/block"
	"ashlar/internal/export/fuse"
)

// The ways this package fails; everything else is an error of the operating system, wrapped.
var (
	// ErrBusy: the block device is open or mounted. Nothing was changed.
	ErrBusy = errors.New("block device in use")
	// ErrName: a volume's name cannot be part of a path.
	ErrName = errors.New("unusable volume name")
	// ErrExists: the volume is a block device already, here or of another living process, or is being added or removed.
	ErrExists = errors.New("already a block device")
	// ErrNotFound: the volume was not added.
	ErrNotFound = errors.New("no block device of that name")
	// ErrUnsupported: this host or process cannot make block devices.
	ErrUnsupported = errors.New("block devices not supported here")
	// ErrClosed: the frontend was closed.
	ErrClosed = errors.New("block device frontend closed")
)

// Keeper keeps descriptors by name beyond the life of this process. All methods may be called concurrently.
type Keeper interface {
	// Put keeps a copy of f under name, in place of what was there. The caller keeps f.
	Put(ctx context.Context, name string, f *os.File) error
	// Get returns a copy of what is kept under name, or an error that is Config.NotHeld.
	Get(ctx context.Context, name string) (*os.File, error)
	// Drop stops keeping it; also if there was none.
	Drop(ctx context.Context, name string) error
}

// Config says where block devices are and who keeps them alive.
type Config struct {
	// RunDir has the mount points: RUNDIR/fuse/VOLUME. Absolute, without symbolic links; required.
	RunDir string
	// DevDir has the links: DEVDIR/VOLUME. Absolute. Default: /dev/ashlar.
	DevDir string
	// Keeper keeps the sessions' descriptors under "fuse/VOLUME"; required.
	Keeper Keeper
	// NotHeld is the Keeper's error for a name it does not keep; required.
	NotHeld error
	// Tool is the program, and its first arguments, that ends in a call of Tool with the arguments that follow. Default: this executable with "blockdev".
	Tool []string
	// Report, if not nil, is told of failures that no caller gets, concurrently; volume is empty for those of none.
	Report func(volume string, err error)
	// Threads is how many goroutines a volume may have that answer requests that are not slow. Default: one for each processor, at most 4.
	Threads int

	withoutResend bool // tests: as on an older kernel
	onlyFUSE      bool // tests: as without the kernel's nbd driver
}

func (c Config) check() (Config, error) {
	if !filepath.IsAbs(c.RunDir) {
		return c, fmt.Errorf("blockdev: run directory %q is not an absolute path", c.RunDir)
	}
	if c.DevDir == "" {
		c.DevDir = "/dev/ashlar"
	}
	if !filepath.IsAbs(c.DevDir) {
		return c, fmt.Errorf("blockdev: device directory %q is not an absolute path", c.DevDir)
	}
	c.RunDir, c.DevDir = filepath.Clean(c.RunDir), filepath.Clean(c.DevDir)
	if c.Keeper == nil || c.NotHeld == nil {
		return c, errors.New("blockdev: config without keeper, or without its error for what is not held")
	}
	if len(c.Tool) == 0 {
		exe, err := os.Executable()
		if err != nil {
			return c, fmt.Errorf("blockdev: find own executable: %w", err)
		}
		c.Tool = []string{exe, "blockdev"}
	}
	if c.Report == nil {
		c.Report = func(string, error) {}
	}
	return c, nil
}

// keepBuffers is how many idle buffers of a megabyte are kept for all volumes together.
const keepBuffers = 16

// Frontend makes volumes block devices. All methods may be called concurrently; for one volume, one at a time gets its way, and others get ErrExists.
type Frontend struct {
	cfg     Config
	buffers *fuse.Buffers
	life    context.Context // ends with Close
	end     context.CancelFunc

	probe   sync.Once
	resends bool // set by probe

	spawned sync.WaitGroup // tools that run
	calls   sync.WaitGroup // methods under way on a volume

	mu      sync.Mutex // guards the rest
	closed  bool
	volumes map[string]*served
}

// served is a volume that is added, or whose name is taken for the time of a call.
type served struct {
	busy     bool
	session  *fuse.Session // nil: not added, or
	kernel   *kernelServed // a device of the kernel's nbd driver
	dev      block.Device
	readOnly bool
}

func (v *served) added() bool { return v.session != nil || v.kernel != nil }

// New returns a frontend without volumes. It touches nothing: a host that cannot make block devices shows in Supported and Add.
func New(cfg Config) (*Frontend, error) {
	cfg, err := cfg.check()
	if err != nil {
		return nil, err
	}
	life, end := context.WithCancel(context.Background())
	return &Frontend{cfg: cfg, buffers: fuse.NewBuffers(keepBuffers), life: life, end: end, volumes: map[string]*served{}}, nil
}

// Options are what Add may be told about a block device.
type Options struct {
	ReadOnly bool // refuse writes, discards and zeroing
	Far      bool // see nbd.Export
}

// Path is where volume's block device is, whether it was added or not.
func (f *Frontend) Path(volume string) string { return filepath.Join(f.cfg.DevDir, volume) }

func (f *Frontend) mountPath(volume string) string {
	return filepath.Join(f.cfg.RunDir, "fuse", volume)
}

// heldName is a volume's session at the Keeper.
func heldName(volume string) string { return "fuse/" + volume }

// take begins a call on volume, which has it to itself until give.
func (f *Frontend) take(volume string) (*served, error) {
	if err := checkName(volume); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, ErrClosed
	}
	v := f.volumes[volume]
	if v == nil {
		v = &served{}
		f.volumes[volume] = v
	}
	if v.busy {
		return nil, fmt.Errorf("another call is under way: %w", ErrExists)
	}
	v.busy = true
	f.calls.Add(1)
	return v, nil
}

func (f *Frontend) give(volume string, v *served) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v.busy = false
	if !v.added() {
		delete(f.volumes, volume)
	}
	f.calls.Done()
}

// set changes what v serves; nil for nothing.
func (f *Frontend) set(v *served, s *fuse.Session, dev block.Device) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v.session, v.dev = s, dev
}

// setKernel is set for a device of the kernel's nbd driver; nil for nothing.
func (f *Frontend) setKernel(v *served, k *kernelServed) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v.kernel = k
}

// Add makes dev the block device of volume, and returns its path. If a session of volume is held, it goes on where the process before stopped: users of the device notice a
// pause. Otherwise everything is made anew, and what a dead process left is cleaned away; who still uses that has EIO. dev stays the caller's, who must Remove or Detach
// the volume before closing it. Its size may change (Resize); sizes that are not a multiple of 512 lose the rest.
// It returns ErrName, ErrExists, ErrUnsupported or ErrClosed, and then nothing was changed, or another error; what was held is still held then, to be tried again.
func (f *Frontend) Add(ctx context.Context, volume string, dev block.Device, o Options) (string, error) {
	v, err := f.take(volume)
	if err != nil {
		return "", fmt.Errorf("blockdev: add %s: %w", volume, err)
	}
	defer f.give(volume, v)
	if v.added() {
		return "", fmt.Errorf("blockdev: add %s: %w", volume, ErrExists)
	}
	if err := Supported(); err != nil {
		return "", fmt.Errorf("add %s: %w", volume, err)
	}
	k, err := f.addKernel(ctx, volume, dev, o)
	if err != nil {
		return "", fmt.Errorf("blockdev: add %s: %w", volume, err)
	}
	if k != nil {
		f.setKernel(v, k)
		return f.Path(volume), nil
	}
	cfg := fuse.Config{Device: dev, ReadOnly: o.ReadOnly, Buffers: f.buffers, Workers: f.cfg.Threads, WithoutResend: f.cfg.withoutResend,
		Report: func(err error) { f.cfg.Report(volume, err) }}
	s, err := f.adopt(ctx, volume, cfg)
	if err != nil {
		return "", fmt.Errorf("blockdev: add %s: %w", volume, err)
	}
	if s != nil {
		if err := f.goOn(ctx, volume, s, cfg); err != nil {
			// What is held stays: nothing was lost yet.
			return "", errors.Join(fmt.Errorf("blockdev: go on with %s: %w", volume, err), s.Detach(context.WithoutCancel(ctx)))
		}
	} else if !f.Resends() && !f.cfg.withoutResend {
		return "", fmt.Errorf("blockdev: add %s: %w: this kernel is older than 6.9 and cannot send requests again after a kill, and has no nbd driver either (modprobe nbd)", volume, ErrUnsupported)
	} else if s, err = f.begin(ctx, volume, cfg); err != nil {
		return "", fmt.Errorf("blockdev: add %s: %w", volume, err)
	}
	v.readOnly = o.ReadOnly
	f.set(v, s, dev)
	return f.Path(volume), nil
}

// goOn sees to it that an adopted session has all that belongs to it.
func (f *Frontend) goOn(ctx context.Context, volume string, s *fuse.Session, cfg fuse.Config) error {
	if !s.Resends() {
		// A copy would keep the mount from ending with this process, and what it had read would wait for ever.
		if err := f.cfg.Keeper.Drop(ctx, heldName(volume)); err != nil {
			return fmt.Errorf("drop the held descriptor: %w", err)
		}
	}
	return f.expose(ctx, volume, cfg)
}

// begin makes session, mount, loop device and link, or nothing.
func (f *Frontend) begin(ctx context.Context, volume string, cfg fuse.Config) (*fuse.Session, error) {
	if err := f.clean(ctx, volume); err != nil {
		return nil, err
	}
	path := f.mountPath(volume)
	file, err := mountFile(path, cfg.ReadOnly)
	if err != nil {
		return nil, errors.Join(err, unmount(path))
	}
	s, err := fuse.Negotiate(ctx, file, cfg)
	if err != nil {
		return nil, errors.Join(err, unmount(path))
	}
	if s.Resends() {
		err = f.keep(ctx, volume, s)
	}
	if err == nil {
		err = f.expose(ctx, volume, cfg)
	}
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoWithin)
		defer cancel()
		err = errors.Join(err, f.cfg.Keeper.Drop(ctx, heldName(volume)), abort(path), s.Close(), f.sweep(ctx, volume))
		return nil, err
	}
	return s, nil
}

// undoWithin bounds what is done after a failure, when the caller's context may have ended.
const undoWithin = 10 * time.Second

// keep hands the session's descriptor to the Keeper.
func (f *Frontend) keep(ctx context.Context, volume string, s *fuse.Session) error {
	file, err := s.Dup()
	if err != nil {
		return err
	}
	if err := errors.Join(f.cfg.Keeper.Put(ctx, heldName(volume), file), file.Close()); err != nil {
		return fmt.Errorf("have the descriptor held: %w", err)
	}
	return nil
}

// expose puts a loop device on the mount, unless there is one, brings it to the file's size, and links it.
func (f *Frontend) expose(ctx context.Context, volume string, cfg fuse.Config) error {
	path := f.mountPath(volume)
	devs, err := loopsOn(path)
	if err != nil {
		return err
	}
	var dev string
	if len(devs) > 0 {
		dev = devs[0]
		// The size may have changed while nobody served.
		var have int64
		if have, err = loopBytes(dev); err == nil && have != cfg.Device.Size()/sectorBytes*sectorBytes {
			_, err = f.tool(ctx, verbResize, dev, path)
		}
	} else {
		mode := "rw"
		if cfg.ReadOnly {
			mode = "ro"
		}
		dev, err = f.tool(ctx, verbAttach, path, mode)
	}
	if err != nil {
		return err
	}
	return f.link(volume, dev)
}

// Remove takes volume's block device away: what was written is flushed, then loop device, mount, held descriptor and link go. ErrBusy if it is open or mounted by
// anybody, and then all is as it was. A volume that was not added only loses what is left of it, so that Remove can be repeated, and
// clean up after another process. When it returns nil, no call to the Device is running any more.
func (f *Frontend) Remove(ctx context.Context, volume string) error {
	v, err := f.take(volume)
	if err != nil {
		return fmt.Errorf("blockdev: remove %s: %w", volume, err)
	}
	defer f.give(volume, v)
	if v.kernel != nil {
		if err := v.kernel.remove(ctx); err != nil {
			return fmt.Errorf("blockdev: remove %s: %w", volume, err)
		}
		f.setKernel(v, nil)
		return nil
	}
	if v.session == nil {
		if err := f.removeHeld(ctx, volume); err != nil {
			return fmt.Errorf("blockdev: remove %s: %w", volume, err)
		}
		return nil
	}
	if err := f.detachLoops(ctx, volume); err != nil {
		return fmt.Errorf("blockdev: remove %s: %w", volume, err)
	}
	// From here on nobody can get at it, and there is no way back.
	flushErr := v.dev.Flush()
	if err := errors.Join(flushErr, f.takeDown(ctx, volume, v)); err != nil {
		return fmt.Errorf("blockdev: remove %s: %w", volume, err)
	}
	return nil
}

// takeDown ends a session and everything on it.
func (f *Frontend) takeDown(ctx context.Context, volume string, v *served) error {
	if err := f.cfg.Keeper.Drop(ctx, heldName(volume)); err != nil {
		return fmt.Errorf("drop the held descriptor: %w", err)
	}
	// Detaching the session first: the mount's end would be reported as a failure otherwise.
	if err := v.session.Detach(ctx); err != nil && !errors.Is(err, fuse.ErrClosed) {
		return err
	}
	f.set(v, nil, nil)
	return f.sweep(ctx, volume)
}

// Force is Remove for a device that is in use, or whose Device does not answer: its users get EIO from the moment of the call, also for what they wrote and did not sync. Calls to the
// Device under way are waited for until ctx ends; after that error the volume is still here, and Force can be repeated.
func (f *Frontend) Force(ctx context.Context, volume string) error {
	v, err := f.take(volume)
	if err != nil {
		return fmt.Errorf("blockdev: force %s: %w", volume, err)
	}
	defer f.give(volume, v)
	if err := f.force(ctx, volume, v); err != nil {
		return fmt.Errorf("blockdev: force %s: %w", volume, err)
	}
	return nil
}

func (f *Frontend) force(ctx context.Context, volume string, v *served) error {
	if v.kernel != nil {
		if err := v.kernel.force(ctx); err != nil {
			return err
		}
		f.setKernel(v, nil)
		return nil
	}
	if v.session == nil {
		if there, err := f.removeKernelHeld(ctx, volume, verbNBDDrop); there || err != nil {
			return err
		}
	}
	// The loop device first: once the mount is gone nothing tells which one it was.
	devs, err := loopsOn(f.mountPath(volume))
	if err != nil {
		return err
	}
	err = abort(f.mountPath(volume))
	for _, dev := range devs {
		_, dropErr := f.tool(ctx, verbDrop, dev)
		err = errors.Join(err, dropErr)
	}
	if v.session != nil {
		err = errors.Join(err, f.takeDown(ctx, volume, v))
	} else {
		err = errors.Join(err, f.cfg.Keeper.Drop(ctx, heldName(volume)), f.sweep(ctx, volume))
	}
	return err
}

// on calls fn with the loop or nbd device of volume, which was added.
func (f *Frontend) on(volume, verb string, fn func(v *served, dev string) error) error {
	v, err := f.take(volume)
	if err != nil {
		return fmt.Errorf("blockdev: %s %s: %w", verb, volume, err)
	}
	defer f.give(volume, v)
	if !v.added() {
		return fmt.Errorf("blockdev: %s %s: %w", verb, volume, ErrNotFound)
	}
	if v.kernel != nil {
		if err := fn(v, v.kernel.dev); err != nil {
			return fmt.Errorf("blockdev: %s %s: %w", verb, volume, err)
		}
		return nil
	}
	devs, err := loopsOn(f.mountPath(volume))
	if err == nil && len(devs) == 0 {
		err = fmt.Errorf("its loop device was detached: %w", ErrNotFound)
	}
	if err == nil {
		err = fn(v, devs[0])
	}
	if err != nil {
		return fmt.Errorf("blockdev: %s %s: %w", verb, volume, err)
	}
	return nil
}

// Resize has the block device take the size that its Device has now; who has it open or mounted goes on, and file systems can then be grown. The Device must answer
// meanwhile: a held Gate holds it up. ErrNotFound if the volume was not added.
func (f *Frontend) Resize(ctx context.Context, volume string) error {
	return f.on(volume, "resize", func(v *served, dev string) error {
		if v.kernel != nil {
			return v.kernel.resize(ctx)
		}
		_, err := f.tool(ctx, verbResize, dev, f.mountPath(volume))
		return err
	})
}

// Sync has the kernel write out, through the Device, and flush, what it holds for the block device: its page cache, and the file systems on it that are mounted in this
// mount namespace. The Device must answer meanwhile: a held Gate holds it up until ctx ends. ErrNotFound if the volume was not added.
func (f *Frontend) Sync(ctx context.Context, volume string) error {
	return f.on(volume, "sync", func(_ *served, dev string) error {
		_, err := f.tool(ctx, verbSync, dev)
		return err
	})
}

// Detach ends serving volume and leaves everything else: requests that were read are answered, later ones wait for the next process that adds it, whether the kernel can
// resend or not. The Device must answer meanwhile. If ctx ends first, or the descriptor cannot be handed to the Keeper, the volume is served on. ErrNotFound if the volume was not added.
func (f *Frontend) Detach(ctx context.Context, volume string) error {
	v, err := f.take(volume)
	if err != nil {
		return fmt.Errorf("blockdev: detach %s: %w", volume, err)
	}
	defer f.give(volume, v)
	if !v.added() {
		return fmt.Errorf("blockdev: detach %s: %w", volume, ErrNotFound)
	}
	if err := f.release(ctx, volume, v); err != nil {
		return fmt.Errorf("blockdev: detach %s: %w", volume, err)
	}
	return nil
}

func (f *Frontend) release(ctx context.Context, volume string, v *served) error {
	if v.kernel != nil {
		if err := v.kernel.detach(ctx); err != nil {
			return err
		}
		f.setKernel(v, nil)
		return nil
	}
	s := v.session
	if err := f.keep(ctx, volume, s); err != nil {
		return err
	}
	if err := s.Detach(ctx); err != nil {
		if !s.Resends() {
			err = errors.Join(err, f.cfg.Keeper.Drop(context.WithoutCancel(ctx), heldName(volume)))
		}
		return err
	}
	f.set(v, nil, nil)
	return nil
}

// Stats is what a block device did since this process serves it.
type Stats struct {
	Reads, Writes, Flushes, Zeroes uint64
	ReadBytes, WrittenBytes        uint64
	Errors                         uint64 // of the Device
	Resent                         uint64 // requests the kernel sent again, because a process before had not answered them; the nbd driver does not tell
	Conns                          int    // the loop or nbd device: 1
}

// Stats returns what each added volume did since it was added here.
func (f *Frontend) Stats() map[string]Stats {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make(map[string]Stats, len(f.volumes))
	for name, v := range f.volumes {
		if v.kernel != nil {
			out[name] = v.kernel.stats()
		}
		if v.session == nil {
			continue
		}
		s := v.session.Stats()
		out[name] = Stats{Reads: s.Reads, Writes: s.Writes, Flushes: s.Flushes, Zeroes: s.Zeroes, ReadBytes: s.ReadBytes,
			WrittenBytes: s.WrittenBytes, Errors: s.Errors, Resent: s.Resent, Conns: 1}
	}
	return out
}

// Close detaches all volumes, as Detach does, and waits for calls under way, which get ErrClosed where they can. It waits for the Devices: their gates must be open.
func (f *Frontend) Close() error {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil
	}
	f.closed = true
	f.mu.Unlock()
	f.end()
	f.calls.Wait()
	f.waitTools()
	var wg sync.WaitGroup
	f.mu.Lock()
	errs := make([]error, 0, len(f.volumes))
	var errMu sync.Mutex
	for name, v := range f.volumes {
		wg.Go(func() {
			if err := f.release(context.Background(), name, v); err != nil {
				errMu.Lock()
				defer errMu.Unlock()
				errs = append(errs, fmt.Errorf("blockdev: detach %s: %w", name, err))
			}
		})
	}
	f.mu.Unlock()
	wg.Wait()
	return errors.Join(append(errs, f.buffers.Close())...)
}

// waitTools waits for tools while volumes are still served, so that one that waits for a volume can end; but not for ever: it may wait for a volume that this process does not serve.
func (f *Frontend) waitTools() {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { f.spawned.Wait(); close(done) })
	timer := time.NewTimer(undoWithin)
	defer timer.Stop()
	select {
	case <-done:
		wg.Wait()
	case <-timer.C:
		f.cfg.Report("", errors.New("blockdev: a process that looks at a device of another process does not end; it is left behind"))
	}
}

// checkName refuses names that would leave the directories or not be seen in them. A leading dot is for what is not in place yet.
func checkName(volume string) error {
	bad := volume == "" || volume[0] == '.' || len(volume) > 190 || !utf8.ValidString(volume) ||
		strings.ContainsFunc(volume, func(r rune) bool { return r == '/' || unicode.IsControl(r) })
	if bad {
		return fmt.Errorf("volume %q: %w", volume, ErrName)
	}
	return nil
}
