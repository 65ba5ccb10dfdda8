package main

import (
	"github.com/spf13/cobra"

	"ashlar/internal/api/client"
)

func (a *app) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use: "check VOLUME", Short: "Look for damage in a volume's layers",
		Long: `Check reads all metadata of a volume's copies and verifies checksums. It changes nothing, and may run while a guest uses the volume. It exits with 7
if it found problems.`,
		Example: "  ashlar check db1", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				report, err := c.Check(cmd.Context(), args[0])
				if err != nil {
					return stillGoing(err, "the check of volume %s may still be going on", args[0])
				}
				err = a.print(report, func() {
					if len(report.Problems) == 0 {
						a.say("volume %s: no problems found", args[0])
						return
					}
					rows := [][]string{{"OBJECT", "PROBLEM"}}
					for _, p := range report.Problems {
						rows = append(rows, []string{p.Object, p.What})
					}
					a.table(rows)
				})
				if err == nil && len(report.Problems) > 0 {
					err = errProblems
				}
				return err
			})
		},
	}
}
