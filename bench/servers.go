package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"ashlar/internal/testbed"
)

// server is somebody who serves a disk over NBD on a unix socket.
type server struct {
	name string
	uri  string
	pid  int
	stop func() error
}

// startPeer starts a peer's server and waits for its socket.
func startPeer(ctx context.Context, name, socket, uri string, args ...string) (*server, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop := func() error {
		cmd.Process.Kill()
		cmd.Wait()
		return os.Remove(socket)
	}
	err := testbed.Until(ctx, 10*time.Second, func() (bool, error) {
		_, err := os.Stat(socket)
		return err == nil, nil
	})
	if err != nil {
		stop()
		return nil, fmt.Errorf("%s did not start: %w", name, err)
	}
	return &server{name: name, uri: uri, pid: cmd.Process.Pid, stop: stop}, nil
}

// rawFile makes a sparse raw file for a peer.
func rawFile(dir, name string, sizeBytes int64) (string, error) {
	file := filepath.Join(dir, name)
	f, err := os.Create(file)
	if err != nil {
		return "", err
	}
	if err := f.Truncate(sizeBytes); err != nil {
		return "", err
	}
	return file, f.Close()
}

func (b *bench) nbdkit(ctx context.Context) (*server, error) {
	file, err := rawFile(b.dir, "nbdkit.raw", 1<<30)
	if err != nil {
		return nil, err
	}
	sock := filepath.Join(b.dir, "nbdkit.sock")
	return startPeer(ctx, "nbdkit file", sock, "nbd+unix:///?socket="+sock, "nbdkit", "-f", "-U", sock, "file", file)
}

// qemuNBD starts qemu-nbd with a cache and an aio mode of its own names.
func (b *bench) qemuNBD(ctx context.Context, cache, aio string) (*server, error) {
	file, err := rawFile(b.dir, "qemu-"+cache+".raw", 1<<30)
	if err != nil {
		return nil, err
	}
	sock := filepath.Join(b.dir, "qemu-"+cache+".sock")
	return startPeer(ctx, "qemu-nbd "+cache+"/"+aio, sock, "nbd+unix:///?socket="+sock,
		"qemu-nbd", "-f", "raw", "-k", sock, "-t", "-e", "16", "--cache="+cache, "--aio="+aio, "--discard=unmap", file)
}

// ours creates and attaches a volume of the running node.
func (b *bench) ours(ctx context.Context, volume string) (*server, error) {
	for _, args := range [][]string{{"volume", "create", volume, "--size", "1Gi"}, {"volume", "attach", volume}} {
		if err := b.node.Run(ctx, nil, args...); err != nil {
			return nil, err
		}
	}
	stop := func() error {
		for _, args := range [][]string{{"volume", "detach", volume}, {"volume", "delete", volume}} {
			if err := b.node.Run(context.WithoutCancel(ctx), nil, args...); err != nil {
				return err
			}
		}
		return nil
	}
	return &server{name: "ashlar", uri: b.uri(volume), pid: b.node.PID("data"), stop: stop}, nil
}

func (b *bench) socket(volume string) string {
	return filepath.Join(b.node.RunDir, "nbd", volume+".sock")
}

func (b *bench) uri(volume string) string {
	return "nbd+unix:///" + volume + "?socket=" + b.socket(volume)
}
