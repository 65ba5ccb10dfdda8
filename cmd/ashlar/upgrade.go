package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"ashlar/internal/dataplane"
	dataclient "ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
)

// upgradeCommand is done to this machine's data process itself, not through the API.
func (a *app) upgradeCommand() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "upgrade", Short: "Replace the running data process by the installed version, under running guests",
		Long: `Replace the data process, which has the files and the guests' I/O open, by the version that is installed now. Volumes pass one after the other; each guest sees a pause of some
milliseconds and no error. Plain NBD connections and block devices go on; clients over TLS connect again.

Two versions that cannot do this refuse, and nothing is touched. If a process dies on the way, every volume comes back by itself, and NBD clients connect again.
Imports and exports of images that are under way begin again.`,
		Example: "  ashlar upgrade", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			runDir, err := filepath.Abs(a.runDir)
			if err != nil {
				return fmt.Errorf("run directory: %w", err)
			}
			if running := dataVersion(cmd.Context(), runDir); running == version {
				return a.print(dataplane.Upgraded{From: running, To: running}, func() { a.say("the data process %s runs already; nothing to do", running) })
			}
			a.timeout = timeout
			ctx, cancel := a.bounded(cmd.Context())
			defer cancel()
			up, err := dataplane.Upgrade(ctx, hold.Config{RunDir: runDir, Systemd: a.systemd()}, a.sayHandOver)
			if errors.Is(err, dataplane.ErrCurrent) {
				return a.print(up, func() { a.say("the data process %s runs already; nothing to do", up.From) })
			}
			if err != nil {
				return stillGoing(err, "the data process is still being replaced")
			}
			return a.print(up, func() {
				if len(up.Volumes) > 0 {
					rows := [][]string{{"VOLUME", ">PAUSE", ">CONNECTIONS"}}
					for _, v := range up.Volumes {
						rows = append(rows, []string{v.Volume, fmt.Sprintf("%.1f ms", float64(v.PauseMicros)/1000), fmt.Sprint(v.Conns)})
					}
					a.table(rows)
				}
				a.say("data process %s took over from %s: %d volumes in %v", up.To, up.From, len(up.Volumes), up.Took.Round(time.Millisecond))
			})
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 10*time.Minute, "wait at most this long; what was begun goes on; 0: for ever")
	return cmd
}

// dataVersion is the version of the data process that answers; "" if none does.
func dataVersion(ctx context.Context, runDir string) string {
	sockets, _ := dataclient.DataSockets(runDir) // none: nobody answers
	for _, s := range sockets {
		if hello, err := dataclient.New(s).Hello(ctx); err == nil {
			return hello.Version
		}
	}
	return ""
}

// sayHandOver shows a step of a hand-over, on standard error.
func (a *app) sayHandOver(e dataplane.HandOverEvent) {
	if a.output == "json" {
		return
	}
	switch e.What {
	case dataplane.EventBegan:
		fmt.Fprintf(a.err, "data process %s takes over from %s\n", e.To, e.From)
	case dataplane.EventVolume:
		fmt.Fprintf(a.err, "volume %s: paused for %.1f ms, %d connections\n", e.Volume, float64(e.PauseMicros)/1000, e.Conns)
	}
}
