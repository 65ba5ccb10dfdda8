package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// manualCommand writes the manual pages of every command; the package's build calls it.
func (a *app) manualCommand() *cobra.Command {
	return &cobra.Command{
		Use: "manual DIR", Short: "Write manual pages of all commands into a directory", Hidden: true, Args: cobra.ExactArgs(1),
		PersistentPreRunE: func(*cobra.Command, []string) error { return nil },
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return fmt.Errorf("manual: %w", err)
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			day := time.Unix(0, 0).UTC() // the same pages from the same source
			return doc.GenManTree(root, &doc.GenManHeader{Title: "ASHLAR", Section: "1", Source: "ashlar " + version, Manual: "Ashlar", Date: &day}, args[0])
		},
	}
}
