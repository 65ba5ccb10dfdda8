package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/testbed"
)

// blockdev compares the block device with what one has otherwise: nbdkit's file over NBD, nbdfuse, and a loop device on that.
func (b *bench) blockdev(ctx context.Context) error {
	us, err := b.ourDevice(ctx)
	if err != nil {
		return err
	}
	peer, err := b.nbdfuse(ctx)
	if err != nil {
		return errors.Join(err, us.stop())
	}
	got, err := b.beside(ctx, us, peer)
	if err = errors.Join(err, peer.stop(), us.stop()); err != nil {
		return err
	}
	for _, l := range loads {
		mine, theirs := got[l.name][us.name].value(l), got[l.name][peer.name].value(l)
		b.note(result{What: "block device: " + l.name, Ours: mine, Peer: theirs, PeerName: peer.name, Ratio: mine / theirs, Target: ">= 1.0 x", Holds: mine >= theirs})
	}
	return nil
}

func (b *bench) beside(ctx context.Context, servers ...*server) (map[string]map[string]measure, error) {
	for _, s := range servers {
		if err := prefill(ctx, s.uri); err != nil {
			return nil, err
		}
	}
	return b.table(ctx, "block device, direct I/O", servers, loads)
}

// ourDevice attaches a volume as a block device; the server's uri is the device.
func (b *bench) ourDevice(ctx context.Context) (*server, error) {
	const volume = "dev"
	for _, args := range [][]string{{"volume", "create", volume, "--size", "1Gi", "--frontend", "blockdev"}, {"volume", "attach", volume}} {
		if err := b.node.Run(ctx, nil, args...); err != nil {
			return nil, err
		}
	}
	var v struct{ Controllers []struct{ Endpoint string } }
	if err := b.node.Run(ctx, &v, "volume", "show", volume); err != nil {
		return nil, err
	}
	if len(v.Controllers) != 1 || !strings.HasPrefix(v.Controllers[0].Endpoint, "/dev/") {
		return nil, fmt.Errorf("the volume is no block device: %+v: %w", v, errBench)
	}
	stop := func() error {
		for _, args := range [][]string{{"volume", "detach", volume}, {"volume", "delete", volume}} {
			if err := b.node.Run(context.WithoutCancel(ctx), nil, args...); err != nil {
				return err
			}
		}
		return nil
	}
	return &server{name: "ashlar", uri: v.Controllers[0].Endpoint, pid: b.node.PID("data"), stop: stop}, nil
}

// nbdfuse starts the peer on a file as large as our volume.
func (b *bench) nbdfuse(ctx context.Context) (s *server, err error) {
	kit, err := b.nbdkit(ctx)
	if err != nil {
		return nil, err
	}
	undo := []func() error{kit.stop}
	stop := func() error {
		var all []error
		for i := len(undo) - 1; i >= 0; i-- {
			all = append(all, undo[i]())
		}
		return errors.Join(all...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, stop())
		}
	}()
	at := filepath.Join(b.dir, "nbdfuse")
	if err := os.WriteFile(at, nil, 0o600); err != nil {
		return nil, err
	}
	fuse := exec.Command("nbdfuse", at, kit.uri)
	if err := fuse.Start(); err != nil {
		return nil, err
	}
	undo = append(undo, func() error { return errors.Join(unix.Unmount(at, unix.MNT_DETACH), fuse.Wait()) })
	if err := testbed.Until(ctx, 10*time.Second, func() (bool, error) {
		info, err := os.Stat(at)
		return err == nil && info.Size() == 1<<30, nil
	}); err != nil {
		return nil, fmt.Errorf("nbdfuse did not start: %w", err)
	}
	out, err := exec.CommandContext(ctx, "losetup", "--show", "-f", "--direct-io=on", at).Output()
	if err != nil {
		return nil, fmt.Errorf("losetup: %w", err)
	}
	dev := string(bytes.TrimSpace(out))
	undo = append(undo, func() error { return exec.Command("losetup", "-d", dev).Run() })
	return &server{name: "nbdkit, nbdfuse, loop", uri: dev, pid: kit.pid, stop: stop}, nil
}
