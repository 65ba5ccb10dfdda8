package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
	"ashlar/internal/catalog"
	"ashlar/internal/node"
)

// clusterCommand is what concerns the catalogue as a whole.
func (a *app) clusterCommand() *cobra.Command {
	return group("cluster", "Make a cluster; back up and restore its catalogue", a.clusterInit(), a.clusterToken(), a.clusterReaddress(), a.clusterRescue(), a.clusterBackup(), a.clusterRestore())
}

func (a *app) clusterBackup() *cobra.Command {
	return &cobra.Command{
		Use: "backup FILE", Short: "Write all records of the catalogue into one file",
		Long: `Backup writes what the catalogue knows, as of one instant, into a new file that only its owner can read; "-" is standard output. Volumes and images themselves are not in
it: their layers can rebuild their records ("ashlar recover"), but not settings, labels, limits and tokens, which is what a backup is for.`,
		Example: "  ashlar cluster backup /backup/ashlar-$(date +%F).json", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				if args[0] == "-" {
					return c.Backup(cmd.Context(), a.out)
				}
				f, err := os.OpenFile(args[0], os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
				if err != nil {
					return fmt.Errorf("backup: %w", err)
				}
				err = c.Backup(cmd.Context(), f)
				if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
					return errors.Join(err, os.Remove(args[0]))
				}
				info, err := os.Stat(args[0])
				if err != nil {
					return err
				}
				return a.print(map[string]any{"file": args[0], "bytes": info.Size()}, func() { a.say("%s: %s", args[0], size(info.Size())) })
			})
		},
	}
}

func (a *app) clusterRestore() *cobra.Command {
	cfg := node.Config{Version: version}
	var external func()
	cmd := &cobra.Command{
		Use: "restore FILE", Short: "Bring the records of a backup back into an empty catalogue",
		Long: `Restore reads a file that "ashlar cluster backup" wrote into this node's catalogue, which must be empty: stop "ashlar serve" and move DATA-DIR/etcd away first. Guests
go on meanwhile. What happened after the backup is not in it: volumes whose disks know more refuse to open until "ashlar recover" was run. With an etcd that is not the nodes' own
(etcd in the configuration) the records are brought back into that, which must have none of Ashlar's; all nodes' serve must be stopped.`,
		Example: "  systemctl stop ashlar; mv /var/lib/ashlar/etcd /var/lib/ashlar/etcd.old\n  ashlar cluster restore /backup/ashlar-2026-11-22.json\n  ashlar recover /var/lib/ashlar/disks/default; systemctl start ashlar",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			in := io.Reader(cmd.InOrStdin())
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return fmt.Errorf("restore: %w", err)
				}
				defer f.Close()
				in = f
			}
			external()
			cfg.RunDir = a.runDir
			cfg.Log = slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelWarn}))
			done, err := node.Restore(cmd.Context(), cfg, in)
			switch {
			case errors.Is(err, catalog.ErrNotEmpty) && len(cfg.Etcd) > 0:
				return api.Because(err, api.CodeConflict, "restore %s: %v; delete Ashlar's records from the etcd at %s first (`etcdctl del --prefix /ashlar/`)", args[0], err, strings.Join(cfg.Etcd, ", "))
			case errors.Is(err, catalog.ErrNotEmpty):
				return api.Because(err, api.CodeConflict, "restore %s: %v; move %s/etcd away first", args[0], err, cfg.DataDir)
			case errors.Is(err, catalog.ErrBackup), errors.Is(err, catalog.ErrNewer):
				return api.Because(err, api.CodeInvalid, "restore %s: %v", args[0], err)
			case err != nil:
				return err
			}
			return a.print(done, func() {
				a.say("%d records of cluster %s, as of %s. Now run `ashlar recover` on the node's disks, then start `ashlar serve`.", done.Records, done.ClusterID, done.Time.Local().Format("2006-01-02 15:04:05"))
			})
		},
	}
	optionOf("data-dir").define(cmd, &cfg.DataDir)
	external = etcdFlags(cmd, &cfg)
	return cmd
}
