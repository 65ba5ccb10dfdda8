package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
	"ashlar/internal/disk"
)

// How long the taker waits to see whether the giver is dead, and for its last words after it has everything.
const (
	deathPatience   = 2 * time.Second
	partingPatience = 10 * time.Second
)

// errNobody: no process has the run directory; there is nobody to take over from.
var errNobody = errors.New("nobody to take over from")

// taker is a hand-over under way, in the process that takes.
type taker struct {
	p    *Process
	from *peer
	took []*slot // in order
}

// greet connects to the process that has the run directory and agrees with it. errNobody; ErrRefused, also from a build that cannot hand over.
func greet(ctx context.Context, cfg Config) (*peer, error) {
	from, err := dialHandover(ctx, cfg.RunDir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("%w: %w", errNobody, err)
	}
	if err != nil {
		return nil, err
	}
	ours := ourWindows()
	err = from.send(frame{Kind: kindHello, Role: roleTake, Version: cfg.Version, PID: os.Getpid(), Windows: &ours})
	var hello frame
	if err == nil {
		hello, err = from.expect(kindHello)
	}
	if err == nil {
		hello.drop()
		from.version = hello.Version
		giver := party{version: hello.Version}
		if hello.Windows != nil {
			giver.windows = *hello.Windows
		}
		err = agree(giver, party{version: cfg.Version, windows: ours})
	}
	if err != nil {
		from.close()
		return nil, err
	}
	return from, nil
}

// begin receives the run directory's lock and the disks.
func (t *taker) begin(ctx context.Context) error {
	p := t.p
	f, err := t.from.expectSoon(kindBegin)
	if err != nil {
		return err
	}
	if f.file == nil || f.Disks < 0 {
		f.drop()
		return fmt.Errorf("hand-over: %w: it begins without the run directory's lock", errFrame)
	}
	if err := p.locks.Inherit(f.file); err != nil {
		return err
	}
	if err := p.list.share(); err != nil {
		return err
	}
	for range f.Disks {
		d, err := t.from.expect(kindDisk)
		if err != nil {
			return err
		}
		if d.Disk == nil || d.file == nil {
			d.drop()
			return fmt.Errorf("hand-over: %w: a disk without its lock", errFrame)
		}
		if err := p.adoptPassed(*d.Disk, d.file); err != nil {
			return errors.Join(err, t.from.send(frame{Kind: kindRefused, Text: err.Error()}))
		}
	}
	return t.from.send(frame{Kind: kindReady})
}

// expectSoon is expect for a giver that may have to wait for verbs first.
func (c *peer) expectSoon(kind string) (frame, error) {
	f, err := c.receive(verbPatience + stepTimeout)
	switch {
	case err != nil:
		return f, err
	case f.Kind == kind:
		return f, nil
	}
	f.drop()
	if f.Kind == kindRefused {
		return f, fmt.Errorf("%w: %s", ErrRefused, f.Text)
	}
	return f, fmt.Errorf("hand-over: %w: %.20q, wanted %q", errFrame, f.Kind, kind)
}

// take takes volumes until the giver says that it was all (mine is true), wants them back, or is gone. It returns nil when this process has the run directory.
func (t *taker) take(ctx context.Context) error {
	defer context.AfterFunc(ctx, t.from.close)()
	err := t.begin(ctx)
	for err == nil {
		var f frame
		if f, err = t.from.receive(0); err != nil {
			break
		}
		switch f.Kind {
		case kindVolume:
			err = t.takeOne(ctx, f)
		case kindReturn:
			f.drop()
			return t.giveBack(ctx)
		case kindCommit:
			f.drop()
			return t.own(true)
		default:
			f.drop()
			err = fmt.Errorf("hand-over: %w: %.20q", errFrame, f.Kind)
		}
	}
	if errors.Is(err, ErrRefused) || ctx.Err() != nil || t.p.locks.Run() == nil || !t.giverDied() {
		return err
	}
	t.p.log.Warn("the data process before this one died while it handed over; clients of what it still had connect again", "error", err)
	return t.own(false)
}

// takeOne takes one volume.
func (t *taker) takeOne(ctx context.Context, f frame) error {
	v, err := t.from.receiveVolume(f)
	if err != nil {
		return err
	}
	defer v.drop()
	s, err := t.p.newSlot(v.entry.Open.VolumeID)
	if err == nil {
		err = s.take(ctx)
	}
	if err != nil {
		return err
	}
	defer s.give()
	w, err := t.p.takeInto(ctx, s, v)
	if err != nil {
		t.p.forget(v.entry.Open.VolumeID)
		t.p.log.Error("a volume cannot be taken over", "volume", v.entry.Open.Volume, "error", err)
		return t.from.send(frame{Kind: kindRefused, Text: err.Error()})
	}
	t.took = append(t.took, s)
	return t.from.send(frame{Kind: kindTook, Epoch: w.Epoch, Session: w.Session})
}

// giveBack gives everything back. ErrRefused: it is done, and this process ends.
func (t *taker) giveBack(ctx context.Context) error {
	for i := len(t.took) - 1; i >= 0; i-- {
		v := &given{s: t.took[i]}
		if err := v.s.take(ctx); err != nil {
			return err
		}
		out, err := t.p.letGoOf(ctx, v.s)
		if err == nil {
			if err = t.from.passVolume(out); err == nil {
				_, err = t.from.expect(kindTook)
			}
		}
		out.drop()
		t.p.forget(out.entry.Open.VolumeID)
		v.s.give()
		if err != nil && !errors.Is(err, ErrRefused) {
			return err
		}
	}
	err := t.from.send(frame{Kind: kindReturned})
	return errors.Join(fmt.Errorf("%w: everything was given back", ErrRefused), err)
}

// giverDied tells whether the giver is dead; one that only closed the connection is not.
func (t *taker) giverDied() bool {
	for deadline := time.Now().Add(deathPatience); time.Now().Before(deadline); <-time.After(deathPoll) {
		if hold.VersionEnded(t.p.cfg.RunDir, t.from.version) {
			return true
		}
	}
	return false
}

// own makes the run directory this process's. After a commit it tells the giver, and waits until that has ended its imports.
func (t *taker) own(committed bool) error {
	p := t.p
	if err := p.list.unshare(); err != nil {
		return err
	}
	if err := p.locks.Sign(); err != nil {
		return err
	}
	if committed && t.from.send(frame{Kind: kindMine}) == nil {
		if f, err := t.from.receive(partingPatience); err == nil {
			f.drop() // nothing more is said
		}
	}
	t.from.close()
	for _, d := range p.disks() {
		if err := errors.Join(d.sweep(), d.scan()); err != nil {
			p.log.Error("disk", "path", d.path, "error", err)
		}
	}
	return nil
}

// succeed takes over from the process that has the run directory and then is a data process as Run's. errNobody.
func succeed(ctx context.Context, cfg Config, flusher bool) error {
	from, err := greet(ctx, cfg)
	if err != nil {
		return forWire(fmt.Errorf("data process: %w", err))
	}
	defer from.close()
	locks, err := hold.LockVersion(cfg.RunDir, cfg.Version)
	if err != nil {
		return forWire(fmt.Errorf("data process: %w", err))
	}
	defer locks.Close()
	keeper, err := hold.Keep(ctx, cfg.hold())
	if err != nil {
		return fmt.Errorf("data process: %w", err)
	}
	defer keeper.Close()
	p, err := newProcess(cfg, keeper)
	if err != nil {
		return err
	}
	p.flusher, p.locks = flusher, locks
	return p.takeOver(ctx, from)
}

// takeOver takes everything and serves it until ctx ends. When it fails this process serves nothing.
func (p *Process) takeOver(ctx context.Context, from *peer) error {
	t := &taker{p: p, from: from}
	if err := t.take(ctx); err != nil {
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		return forWire(fmt.Errorf("data process: take over from %s: %w", from.version, errors.Join(err, p.close(late))))
	}
	p.log.Info("took over", "from", from.version, "volumes", len(t.took))
	return p.serve(ctx)
}

// passLock returns a copy of the descriptor that has the disk's lock.
func (d *diskDir) passLock() (*os.File, error) {
	f, ok := d.lock.(interface{ Fd() uintptr })
	if !ok {
		return nil, fmt.Errorf("disk %s: pass the lock: %w", d.path, disk.ErrNotSupported)
	}
	return dupFile(f.Fd(), d.path)
}

// adoptPassed takes a disk into use whose lock was passed, and which the giver still uses: what lies about on it may be the giver's, so nothing is swept. It owns lock.
func (p *Process) adoptPassed(a client.Disk, lock *os.File) error {
	fsys, err := p.cfg.OpenFS(filepath.Clean(a.Path))
	if err != nil {
		return errors.Join(fmt.Errorf("disk %s: %w", a.Path, err), lock.Close())
	}
	d := &diskDir{path: filepath.Clean(a.Path), fs: fsys}
	adopter, ok := fsys.(interface {
		Adopt(f *os.File, name string) (*disk.RealFile, error)
	})
	if !ok {
		err = errors.Join(fmt.Errorf("disk %s: use a lock that was passed: %w", a.Path, disk.ErrNotSupported), lock.Close())
	} else if f, adoptErr := adopter.Adopt(lock, diskLockName); adoptErr != nil {
		err = adoptErr
	} else {
		d.lock = f
		if err = f.Lock(); err == nil {
			d.marker, _, err = lookAtDisk(fsys, a)
		}
	}
	if err == nil {
		err = d.scan()
	}
	if err != nil {
		if d.lock != nil {
			return errors.Join(fmt.Errorf("disk %s: %w", a.Path, err), d.close())
		}
		return fmt.Errorf("disk %s: %w", a.Path, err)
	}
	p.mu.Lock()
	p.diskByID[d.DiskID] = d
	p.mu.Unlock()
	return nil
}
