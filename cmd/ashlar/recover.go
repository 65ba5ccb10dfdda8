package main

import (
	"github.com/spf13/cobra"

	"ashlar/internal/api"
)

func (a *app) recoverCommand() *cobra.Command {
	return &cobra.Command{
		Use: "recover DISK…", Short: "Rebuild a lost catalogue from the layers on disks", Args: cobra.MinimumNArgs(1),
		RunE: func(*cobra.Command, []string) error {
			return api.Failure(api.CodeNotBuilt, "recover: not built yet")
		},
	}
}
