package main

import (
	"github.com/spf13/cobra"

	"ashlar/internal/dataplane"
	"ashlar/internal/dataplane/hold"
)

// dataCommand is the data process; the holder starts it.
func (a *app) dataCommand() *cobra.Command {
	var direct, takeOver bool
	var group string
	cmd := &cobra.Command{
		Use: "data", Short: "Run the data process (the holder starts it)", Hidden: true, Args: cobra.NoArgs,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { a.lenient = true; return a.configure(cmd) },
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.profiled(cmd.Context(), "data", func() error {
				return dataplane.Run(cmd.Context(), dataplane.Config{RunDir: a.runDir, Version: version, Direct: direct, SocketGroup: group, TakeOver: takeOver, Systemd: a.systemd()})
			})
		},
	}
	cmd.Flags().BoolVar(&direct, "direct", false, "go around the page cache for guests' data (ASHLAR_DIRECT=1)")
	cmd.Flags().BoolVar(&takeOver, hold.TakeOverFlag[2:], false, "take over from the data process that runs, under running guests, if there is one")
	optionOf("socket-group").define(cmd, &group)
	return cmd
}
