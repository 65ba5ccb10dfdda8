// Command demo runs Ashlar's main job end to end on real input and shows what it did: a Debian made from its packages becomes a golden image, the image
// becomes two volumes, the volumes boot two guests at once; one is snapshotted, changed, and taken back; the control plane and the data process are
// killed under running guests. Every "ok" it prints was checked; the first thing that is not so ends it with an error.
//
// `make demo` calls it. It needs root and the Debian packages that the Makefile installs, works in a scratch directory, and removes it.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"ashlar/internal/testbed"
)

func main() {
	bin := flag.String("ashlar", "bin/ashlar", "the program to show")
	keep := flag.Bool("keep", false, "keep the scratch directory")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *bin, *keep); err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo: FAILED:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, bin string, keep bool) (err error) {
	bin, err = filepath.Abs(bin)
	if err != nil {
		return err
	}
	scratch, err := os.MkdirTemp("", "ashlar-demo")
	if err != nil {
		return err
	}
	s := &story{ctx: ctx, scratch: scratch, guests: map[string]*guest{}}
	defer func() {
		cleanErr := s.clean()
		if keep || err != nil {
			fmt.Println("kept:", scratch)
		} else {
			os.RemoveAll(scratch)
		}
		if err == nil {
			err = cleanErr
		}
	}()
	if err := s.makeParts(); err != nil {
		return err
	}
	// A copy, which the story's upgrade may replace.
	s.bin = filepath.Join(scratch, "ashlar")
	if err := command(ctx, "cp", bin, s.bin); err != nil {
		return err
	}
	if s.node, err = testbed.StartProcess(ctx, s.bin, scratch); err != nil {
		return err
	}
	s.ok("a node is up: `ashlar serve`, and the data process and the holder that it started (pids %d, %d, %d)", s.node.PID("serve"), s.node.PID("data"), s.node.PID("hold"))
	for _, chapter := range []func() error{s.importImage, s.createVolumes, s.bootBoth, s.snapshotAndChange, s.killServe, s.killData, s.exportLive, s.blockDevice,
		s.upgrade, s.revert, s.sizes, s.remove} {
		if err := chapter(); err != nil {
			return err
		}
	}
	fmt.Printf("\nAll of it was checked: %d times ok.\n", s.oks)
	return nil
}
