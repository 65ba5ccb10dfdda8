package main

import (
	"github.com/spf13/cobra"

	"ashlar/internal/job"
)

// exitStatus ends a command with an exit code that another package chose and explained.
type exitStatus int

func (e exitStatus) Error() string { return "ended with an exit code of its own" }

// workCommand is a work process; the data process starts it with a job on standard input.
func (a *app) workCommand() *cobra.Command {
	return &cobra.Command{
		Use: "work", Short: "Do one import (the data process starts it)", Hidden: true, Args: cobra.NoArgs,
		PersistentPreRunE: func(*cobra.Command, []string) error { return nil },
		RunE: func(cmd *cobra.Command, _ []string) error {
			if code := job.Main(cmd.Context(), cmd.InOrStdin(), a.out); code != 0 {
				return exitStatus(code)
			}
			return nil
		},
	}
}
