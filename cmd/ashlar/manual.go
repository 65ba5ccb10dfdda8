package main

import (
	"fmt"
	"os"
	"strings"
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
			forPaper(root)
			day := time.Unix(0, 0).UTC() // the same pages from the same source
			return doc.GenManTree(root, &doc.GenManHeader{Title: "ASHLAR", Section: "1", Source: "ashlar " + version, Manual: "Ashlar", Date: &day}, args[0])
		},
	}
}

// forPaper makes the help of a command and of those below it fit for a page: lines that are to stand as they are stay so, and what this machine is called is nobody's default.
func forPaper(cmd *cobra.Command) {
	lines := strings.Split(cmd.Long, "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, "  ") {
			lines[i] = "    " + line
		}
	}
	cmd.Long = strings.Join(lines, "\n")
	if name := cmd.Flags().Lookup("name"); name != nil && name.DefValue == hostname() {
		name.DefValue = "this machine's name"
	}
	for _, below := range cmd.Commands() {
		forPaper(below)
	}
}
