package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"
	"path/filepath"
	"sync"
	"time"

	"ashlar/internal/dataplane/client"
)

// pprofVariable, set to 1, has a process offer its profiles.
const pprofVariable = "ASHLAR_PPROF"

// profiled runs a process of a node; if the environment says so, its profiles can be read meanwhile on a socket in the run directory that only this user can open. A successor under
// running guests puts its own socket in that place. See https://pkg.go.dev/net/http/pprof for the paths.
func (a *app) profiled(ctx context.Context, name string, run func() error) (err error) {
	if a.getenv(pprofVariable) != "1" {
		return run()
	}
	ln, err := client.Listen(filepath.Join(a.runDir, "pprof-"+name+".sock"))
	if err != nil { // guests' I/O comes first
		fmt.Fprintf(a.err, "ashlar: no profiles of %s: %v\n", name, err)
		return run()
	}
	// On a mux of its own: what else the program serves must not show profiles. Index serves the named ones (heap, goroutine, …) below its path.
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	ctx, stop := context.WithCancel(ctx)
	var serving sync.WaitGroup
	var serveErr error
	serving.Go(func() { serveErr = client.Serve(ctx, ln, mux, time.Second) })
	defer func() {
		stop()
		serving.Wait()
		err = errors.Join(err, serveErr)
	}()
	return run()
}
