package main

import (
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/spf13/cobra"

	"ashlar/internal/node"
)

func (a *app) recoverCommand() *cobra.Command {
	cfg := node.Config{Version: version}
	var external func()
	cmd := &cobra.Command{
		Use: "recover DISK…", Short: "Rebuild a lost catalogue from the layers on disks",
		Long: `Rebuild the catalogue of this node from the layers on its disks (directories), or bring one that was restored from an old copy up to what they prove.
"ashlar serve" must be stopped; the data process may go on, with guests on it. Nothing newer is replaced by something older, and run again it changes
nothing more. What only the catalogue knew (labels, settings) is gone. A copy of a volume that has lost its own record gets it again from its layers.`,
		Example: "  ashlar recover /var/lib/ashlar/disks/default", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			external()
			var err error
			if cfg.DataDir, err = filepath.Abs(cfg.DataDir); err != nil {
				return fmt.Errorf("data directory: %w", err)
			}
			if cfg.RunDir, err = filepath.Abs(a.runDir); err != nil {
				return fmt.Errorf("run directory: %w", err)
			}
			for i := range args {
				if args[i], err = filepath.Abs(args[i]); err != nil {
					return fmt.Errorf("disk: %w", err)
				}
			}
			cfg.Log = slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelWarn}))
			rep, err := node.Recover(cmd.Context(), cfg, args, hostname())
			if err != nil {
				return err
			}
			return a.print(rep, func() {
				rows := [][]string{{"WHAT", "NAME"}}
				for _, part := range []struct {
					what  string
					names []string
				}{{"volume", rep.Volumes}, {"image", rep.Images}, {"brought up to date", rep.Advanced}, {"copy made to open again", rep.Rebuilt}, {"conflict", rep.Conflicts}} {
					for _, n := range part.names {
						rows = append(rows, []string{part.what, n})
					}
				}
				if len(rows) > 1 {
					a.table(rows)
				}
				if rep.Guessed && len(rep.Volumes) > 0 {
					a.say("no record says what this node is called: %s is a guess. If `ashlar serve` has another name, move %s away and run this again with --name.", rep.Node, filepath.Join(cfg.DataDir, "etcd"))
				}
				a.say("node %s: recovered %d volumes and %d images; %d records were up to date. Start `ashlar serve` now.", rep.Node, len(rep.Volumes), len(rep.Images), rep.Unchanged)
			})
		},
	}
	external = etcdFlags(cmd, &cfg)
	flags := cmd.Flags()
	flags.StringVar(&cfg.DataDir, "data-dir", a.env("ASHLAR_DATA_DIR", "/var/lib/ashlar"), "directory of the catalogue and the first disk (ASHLAR_DATA_DIR)")
	flags.StringVar(&cfg.Name, "name", a.env("ASHLAR_NAME", ""), "the node's name (ASHLAR_NAME); default: as the disks' records have it, else the host's")
	return cmd
}
