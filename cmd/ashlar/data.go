package main

import (
	"github.com/spf13/cobra"

	"ashlar/internal/dataplane"
)

// dataCommand is the data process; the holder starts it.
func (a *app) dataCommand() *cobra.Command {
	var direct bool
	cmd := &cobra.Command{
		Use: "data", Short: "Run the data process (the holder starts it)", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return dataplane.Run(cmd.Context(), dataplane.Config{RunDir: a.runDir, Version: version, Direct: direct})
		},
	}
	cmd.Flags().BoolVar(&direct, "direct", a.getenv("ASHLAR_DIRECT") == "1", "go around the page cache for guests' data (ASHLAR_DIRECT=1)")
	return cmd
}
