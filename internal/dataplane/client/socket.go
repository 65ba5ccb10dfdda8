package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"
)

// maxSocketPath is what fits into a unix socket's address with its ending zero.
const maxSocketPath = 107

// How long a peer may take to say who it is; bodies and answers have no deadline, because verbs take as long as they take.
const headerTimeout = 10 * time.Second

// DataDir returns the directory of data processes' sockets and locks below a run directory.
func DataDir(runDir string) string { return filepath.Join(runDir, "data") }

// DataSocket returns where the data process of a version listens.
func DataSocket(runDir, version string) string {
	return filepath.Join(DataDir(runDir), version+".sock")
}

// LedgerSocket returns where the agent serves membership records to data processes.
func LedgerSocket(runDir string) string { return filepath.Join(runDir, "ledger.sock") }

// DataSockets returns the sockets of every data process below a run directory, sorted; none is no error. A socket is no proof that somebody
// serves it: connect and say Hello.
func DataSockets(runDir string) ([]string, error) {
	entries, err := os.ReadDir(DataDir(runDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list data sockets: %w", err)
	}
	var paths []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".sock") && e.Type()&fs.ModeSocket != 0 {
			paths = append(paths, filepath.Join(DataDir(runDir), e.Name()))
		}
	}
	sort.Strings(paths)
	return paths, nil
}

// Listen listens on a unix socket that only this user can open: its directory is made 0700 if it is missing, the socket is 0600, and a socket left
// by a dead process is replaced. The caller makes sure (with a lock) that no live process listens there. Closing the listener leaves the
// socket file.
func Listen(path string) (*net.UnixListener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("listen on %s: %w: a socket path has at most %d bytes, this has %d; choose a shorter run directory",
			path, ErrInvalid, maxSocketPath, len(path))
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	ln.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), ln.Close())
	}
	return ln, nil
}

// Serve answers requests on ln with h until ctx ends; then it lets requests under way finish for at most grace, and returns nil. It closes ln.
func Serve(ctx context.Context, ln net.Listener, h http.Handler, grace time.Duration) error {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       headerTimeout,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          log.New(discard{}, "", 0),
		// Requests end with the process, not with ctx: they get the grace.
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		if srv.Shutdown(late) != nil {
			srv.Close() //nolint:errcheck // ends what outlived the grace; nothing can be done about its error
		}
	})
	err := srv.Serve(ln)
	if stop() {
		return fmt.Errorf("serve %s: %w", ln.Addr(), err) // ctx lives: the listener failed
	}
	<-ended
	return nil
}

// discard drops net/http's remarks about peers that went away.
type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
