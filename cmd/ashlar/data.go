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
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { a.lenient = true; return a.configure(cmd) },
		RunE: func(cmd *cobra.Command, _ []string) error {
			return dataplane.Run(cmd.Context(), dataplane.Config{RunDir: a.runDir, Version: version, Direct: direct})
		},
	}
	cmd.Flags().BoolVar(&direct, "direct", false, "go around the page cache for guests' data (ASHLAR_DIRECT=1)")
	return cmd
}
