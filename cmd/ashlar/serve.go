package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"ashlar/internal/api/client"
	"ashlar/internal/node"
)

// serveCommands are the processes of a node; all but serve are started by others and hidden.
func (a *app) serveCommands() []*cobra.Command {
	return []*cobra.Command{a.serveCommand(), a.dataCommand(), a.holdCommand(), a.workCommand()}
}

func (a *app) serveCommand() *cobra.Command {
	cfg := node.Config{Version: version}
	var etcd string
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run a node",
		Long: `Run a node: catalogue, control, agent and REST API. It starts the data process, which has the files and the guests' I/O open, and which goes on when this
process stops, crashes or is upgraded. "ashlar shutdown" ends both.`,
		Example: "  ashlar serve\n  ashlar serve --data-dir /srv/ashlar --run-dir /run/ashlar --listen 127.0.0.1:9500 --name kvm1",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if cfg.DataDir, err = filepath.Abs(cfg.DataDir); err != nil {
				return fmt.Errorf("data directory: %w", err)
			}
			if cfg.RunDir, err = filepath.Abs(a.runDir); err != nil {
				return fmt.Errorf("run directory: %w", err)
			}
			if cfg.Listen == "none" {
				cfg.Listen = ""
			}
			if etcd != "" {
				cfg.Etcd = strings.Split(etcd, ",")
			}
			cfg.Log = slog.New(slog.NewTextHandler(a.err, nil))
			return serve(cmd.Context(), cfg)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&cfg.DataDir, "data-dir", a.env("ASHLAR_DATA_DIR", "/var/lib/ashlar"), "directory of the catalogue and the first disk (ASHLAR_DATA_DIR)")
	flags.StringVar(&cfg.Listen, "listen", a.env("ASHLAR_LISTEN", client.DefaultListen), "TCP address of REST, loopback only; none: only the socket in the run directory (ASHLAR_LISTEN)")
	flags.StringVar(&cfg.Name, "name", a.env("ASHLAR_NAME", hostname()), "the node's name (ASHLAR_NAME)")
	flags.StringVar(&etcd, "etcd", a.env("ASHLAR_ETCD", ""), "endpoints of an existing etcd, separated by commas; default: one is embedded (ASHLAR_ETCD)")
	return cmd
}

// hostname is this machine's first name, or "node" if it has none.
func hostname() string {
	name, err := os.Hostname()
	short, _, _ := strings.Cut(strings.ToLower(name), ".")
	if err != nil || short == "" {
		return "node"
	}
	return short
}

// serve runs a node until it is told to stop.
func serve(ctx context.Context, cfg node.Config) error {
	n, err := node.Start(ctx, cfg)
	if err != nil {
		return err
	}
	cfg.Log.Info("node is up", "node", cfg.Name, "version", cfg.Version, "socket", client.Socket(cfg.RunDir), "listen", cfg.Listen)
	err = n.Wait(ctx)
	return errors.Join(err, n.Close())
}
