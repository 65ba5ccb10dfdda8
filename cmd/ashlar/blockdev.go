package main

import (
	"github.com/spf13/cobra"

	"ashlar/internal/export/blockdev"
)

// blockdevCommand touches a loop device in place of the data process, which starts it.
func (a *app) blockdevCommand() *cobra.Command {
	return &cobra.Command{
		Use: "blockdev", Short: "Touch a block device (the data process starts it)", Hidden: true, DisableFlagParsing: true,
		PersistentPreRunE: func(*cobra.Command, []string) error { return nil },
		RunE: func(cmd *cobra.Command, args []string) error {
			if code := blockdev.Tool(cmd.Context(), args, a.out); code != 0 {
				return exitStatus(code)
			}
			return nil
		},
	}
}
