package main

import (
	"github.com/spf13/cobra"

	"ashlar/internal/dataplane/hold"
)

// holdCommand is the holder; serve starts it.
func (a *app) holdCommand() *cobra.Command {
	var detach bool
	cmd := &cobra.Command{
		Use: "hold", Short: "Run the holder (serve starts it)", Hidden: true, Args: cobra.NoArgs,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { a.lenient = true; return a.configure(cmd) },
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg := hold.Config{RunDir: a.runDir, Systemd: a.systemd()} // it keeps a log of bounded size itself
			if detach {
				return hold.Detach(cmd.Context(), cfg)
			}
			return hold.Run(cmd.Context(), cfg)
		},
	}
	cmd.Flags().BoolVar(&detach, hold.DetachFlag[2:], false, "start it in the background and return when it answers")
	return cmd
}
