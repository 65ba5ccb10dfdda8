package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/export/netnbd"
)

const (
	// waitSeconds is how long requests wait in the driver while there is no connection at all: a year. As long as the Keeper has the old one, it does not run.
	waitSeconds = 365 * 24 * 3600
	// resendMillis is how often the driver looks at a request that is not answered: what a dead connection was sent goes out on the new one then. The usual 30 s would be
	// the length of the pause after a kill. It is no time limit: the driver has none (netnbd.Connect).
	resendMillis = 2000
	// socketFD is the descriptor of the driver's end in the tool: the first of exec.Cmd.ExtraFiles.
	socketFD = 3
)

// withDriver calls fn with a connection to the driver.
func withDriver(fn func(*netnbd.Conn) error) error {
	c, err := netnbd.Dial()
	if err != nil {
		return err
	}
	return errors.Join(fn(c), c.Close())
}

// nbdIndex is N of /dev/nbdN.
func nbdIndex(dev string) (uint32, error) {
	n, err := strconv.ParseUint(strings.TrimPrefix(dev, "/dev/nbd"), 10, 32)
	if err != nil {
		return 0, fmt.Errorf("number of %s: %w", dev, err)
	}
	return uint32(n), nil
}

// nbdConnect makes a device of socketFD and returns its path.
func nbdConnect(identifier, size, flags string) (dev string, err error) {
	d := netnbd.Device{Identifier: identifier, BlockBytes: sectorBytes, Socket: socketFD, WaitSeconds: waitSeconds}
	if d.SizeBytes, err = strconv.ParseInt(size, 10, 64); err != nil {
		return "", fmt.Errorf("size: %w", err)
	}
	bits, err := strconv.ParseUint(flags, 10, 16)
	if err != nil {
		return "", fmt.Errorf("flags: %w", err)
	}
	d.Flags = uint16(bits)
	err = withDriver(func(c *netnbd.Conn) error {
		index, err := c.Connect(d)
		dev = "/dev/nbd" + strconv.FormatUint(uint64(index), 10)
		return err
	})
	if err != nil {
		return "", err
	}
	return dev, quickResend(dev)
}

func quickResend(dev string) error {
	path := filepath.Join(sysBlock, filepath.Base(dev), "queue", "io_timeout")
	if err := os.WriteFile(path, []byte(strconv.Itoa(resendMillis)), 0); err != nil {
		return fmt.Errorf("set how soon %s sends again: %w", dev, err)
	}
	return nil
}

// nbdReconfigure gives dev its size and, if socket is not negative, another connection.
func nbdReconfigure(dev, identifier, size string, socket int) error {
	index, err := nbdIndex(dev)
	if err != nil {
		return err
	}
	n, err := strconv.ParseInt(size, 10, 64)
	if err != nil {
		return fmt.Errorf("size: %w", err)
	}
	if err := quickResend(dev); err != nil { // whoever made it may have died before that
		return err
	}
	return withDriver(func(c *netnbd.Conn) error {
		return c.Reconfigure(netnbd.Change{Index: index, Identifier: identifier, SizeBytes: n, Socket: socket})
	})
}

// nbdRemove disconnects dev if nobody uses it, else EBUSY. Somebody must serve it.
func nbdRemove(ctx context.Context, dev, identifier string) error {
	if backendOf(dev) != identifier {
		return nil
	}
	// O_EXCL without O_CREAT: nobody may mount it from here on, and nobody has it mounted (open(2)).
	f, err := openLoop(dev, unix.O_EXCL)
	if err != nil {
		return err
	}
	err = unopened(ctx, dev)
	if err == nil {
		err = nbdDisconnect(dev)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return waitFree(ctx, dev, identifier)
}

// nbdSweep is nbdRemove for a device that nobody serves: to open it might wait for ever, so that what the kernel shows has to do.
func nbdSweep(ctx context.Context, dev, identifier string) error {
	if backendOf(dev) != identifier {
		return nil
	}
	points, err := mountsOf(dev)
	if err != nil {
		return err
	}
	holders, err := filepath.Glob(filepath.Join(sysBlock, filepath.Base(dev), "holders", "*"))
	if err != nil {
		return fmt.Errorf("look for who holds %s: %w", dev, err)
	}
	if len(points)+len(holders) > 0 {
		return fmt.Errorf("%s is mounted at %q, or part of %q: %w", dev, points, holders, unix.EBUSY)
	}
	if err := unopened(ctx, dev); err != nil {
		return err
	}
	return nbdDrop(ctx, dev, identifier)
}

// nbdDrop disconnects dev, whoever uses it.
func nbdDrop(ctx context.Context, dev, identifier string) error {
	if backendOf(dev) != identifier {
		return nil
	}
	if err := nbdDisconnect(dev); err != nil {
		return err
	}
	return waitFree(ctx, dev, identifier)
}

func nbdDisconnect(dev string) error {
	index, err := nbdIndex(dev)
	if err != nil {
		return err
	}
	return withDriver(func(c *netnbd.Conn) error { return c.Disconnect(index) })
}

// waitFree waits until nobody has dev open any more, but not long: it is disconnected, and goes when its last user does.
func waitFree(ctx context.Context, dev, identifier string) error {
	ctx, cancel := context.WithTimeout(ctx, lookFor)
	defer cancel()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for backendOf(dev) == identifier {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
	return nil
}

// nbdLoad has the driver's module loaded, if there is one.
func nbdLoad(ctx context.Context) error {
	if err := exec.CommandContext(ctx, "modprobe", "nbd").Run(); err != nil {
		return fmt.Errorf("modprobe nbd: %w", err)
	}
	return nil
}
