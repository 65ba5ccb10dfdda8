package main

import (
	"github.com/spf13/cobra"

	"ashlar/internal/api/client"
)

func (a *app) shutdownCommand() *cobra.Command {
	var o client.ShutdownOptions
	cmd := &cobra.Command{
		Use: "shutdown", Short: "Stop this node completely, guests' I/O included",
		Long: `Shut the node down: volumes are flushed and closed, then the data process, the holder and serve end. To stop or upgrade only serve, which guests do not
notice, stop that process instead.`,
		Example: "  ashlar shutdown", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withNode(func(c *client.Client) error {
				about, err := c.About(cmd.Context())
				if err != nil {
					return err
				}
				if err := c.Shutdown(cmd.Context(), about.Node, o); err != nil {
					return err
				}
				return a.print(about, func() { a.say("node %s: shutting down", about.Node) })
			})
		},
	}
	cmd.Flags().BoolVar(&o.Force, "force", false, "also while volumes are attached: their guests get I/O errors until the node is back")
	return cmd
}
