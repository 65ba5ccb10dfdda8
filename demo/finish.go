package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// serve runs the web server in the guests' wait group's stead: its end is awaited in clean.
func (m machine) serve(web *http.Server, l net.Listener, done chan<- error) {
	var g errgroup.Group
	g.Go(func() error {
		err := web.Serve(l)
		done <- err
		return err
	})
}

// bootAll boots several guests at once.
func (m machine) bootAll(s *story, names ...string) error {
	var g errgroup.Group
	booted := make([]*guest, len(names))
	for i, name := range names {
		g.Go(func() (err error) {
			booted[i], err = m.boot(s.ctx, name, s.socket(name))
			return err
		})
	}
	err := g.Wait()
	for i, name := range names {
		if booted[i] != nil {
			s.guests[name] = booted[i]
		}
	}
	return err
}

// onDisk adds up what the files below a directory really occupy.
func onDisk(dir string) (int64, error) {
	var sum int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			sum += st.Blocks * 512
		}
		return nil
	})
	return sum, err
}

func (s *story) sizes() error {
	s.title("What it costs")
	if err := s.show("volume", "list"); err != nil {
		return err
	}
	if err := s.show("image", "list"); err != nil {
		return err
	}
	images, err := onDisk(filepath.Join(s.node.DataDir, "disks", "default", "images"))
	if err != nil {
		return err
	}
	replicas, err := onDisk(filepath.Join(s.node.DataDir, "disks", "default", "replicas"))
	if err != nil {
		return err
	}
	const promised = 2 * 4 << 30
	if err := want(images > 0 && replicas > 0 && images+replicas < promised/8, "image %d, volumes %d bytes on disk", images, replicas); err != nil {
		return err
	}
	s.ok("guests were promised %s; on disk lie %s of image, once, and %s of what the volumes changed", size(promised), size(images), size(replicas))
	return nil
}

func (s *story) remove() error {
	s.title("Put it away")
	if _, err := s.guests["vm2"].run(s.ctx, "touch /stop; wait; sync"); err != nil {
		return err
	}
	for _, name := range []string{"vm1", "vm2"} {
		if err := s.guests[name].powerOff(s.ctx); err != nil {
			return err
		}
		delete(s.guests, name)
		if err := s.cli(nil, "volume", "detach", name); err != nil {
			return err
		}
		if err := s.cli(nil, "check", name); err != nil {
			return err
		}
	}
	s.ok("both volumes pass `ashlar check`")
	err := s.cli(nil, "image", "delete", "debian")
	if err := want(err != nil, "an image in use was deleted"); err != nil {
		return err
	}
	s.ok("the image cannot be deleted while volumes stand on it: %s", lastLine(err.Error()))
	for _, args := range [][]string{{"volume", "delete", "vm1"}, {"volume", "delete", "vm2"}, {"image", "delete", "debian"}} {
		if err := s.cli(nil, args...); err != nil {
			return err
		}
	}
	left, err := onDisk(filepath.Join(s.node.DataDir, "disks", "default"))
	if err != nil {
		return err
	}
	if err := want(left < 1<<20, "%d bytes are left on the disk after everything was deleted", left); err != nil {
		return err
	}
	s.ok("everything deleted; %s are left on the disk", size(left))
	return nil
}

// clean ends whatever still runs.
func (s *story) clean() error {
	var errs []error
	if s.device != "" {
		_ = command(context.WithoutCancel(s.ctx), "umount", s.mount) // perhaps it was never mounted
	}
	for _, g := range s.guests {
		g.kill()
	}
	if s.web != nil {
		errs = append(errs, s.web.Close())
		if err := <-s.webDone; !errors.Is(err, http.ErrServerClosed) {
			errs = append(errs, err)
		}
	}
	if s.node != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), time.Minute)
		defer cancel()
		errs = append(errs, s.node.Stop(ctx))
		for _, sub := range []string{"serve", "data", "hold"} {
			if pid := s.node.PID(sub); pid != 0 {
				errs = append(errs, fmt.Errorf("%w: `ashlar %s` (pid %d) still runs: %w", errDemo, sub, pid, os.ErrExist))
			}
		}
	}
	return errors.Join(errs...)
}

func size(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d KiB", n>>10)
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}
