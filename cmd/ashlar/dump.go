package main

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"ashlar/internal/disk"
	"ashlar/internal/layer"
)

func (a *app) dumpCommand() *cobra.Command {
	var o layer.DumpOptions
	cmd := &cobra.Command{
		Use: "layer FILE", Short: "Print what a layer file holds (docs/formats/layer.md)",
		Long:    "Print a layer file's superblock, header and state, without a node. It changes nothing and goes on past damage, which it prints.",
		Example: "  ashlar dump layer /var/lib/ashlar/disk1/replicas/…/….layer --map", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			o.JSON = a.output == "json"
			path, err := filepath.Abs(args[0])
			if err != nil {
				return fmt.Errorf("dump %s: %w", args[0], err)
			}
			fsys, err := disk.OpenReal(filepath.Dir(path), disk.RealOptions{})
			if err != nil {
				return fmt.Errorf("dump %s: %w", path, err)
			}
			if err := layer.Dump(a.out, fsys, filepath.Base(path), o); err != nil {
				return fmt.Errorf("dump %s: %w", path, err)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&o.Map, "map", false, "also every run of the map")
	cmd.Flags().BoolVar(&o.Log, "log", false, "also every record of the log")
	return group("dump", "Print files of Ashlar's own formats", cmd)
}
