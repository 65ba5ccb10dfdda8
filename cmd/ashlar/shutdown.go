package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
)

func (a *app) shutdownCommand() *cobra.Command {
	var o client.ShutdownOptions
	var name string
	cmd := &cobra.Command{
		Use: "shutdown [--node NAME]", Short: "Stop a node completely, guests' I/O included",
		Long: `Shut the node down: volumes are flushed and closed, then the data process, the holder and serve end. To stop or upgrade only serve, which guests do not
notice, stop that process instead. While a block device of it is mounted or open the node is not shut down, also by force: unmount it first.`,
		Example: "  ashlar shutdown\n  ashlar shutdown --node n2   # from any node of the cluster", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withNode(func(c *client.Client) error {
				about, err := c.About(cmd.Context())
				if err != nil {
					return err
				}
				if name != "" && name != about.Node {
					return a.shutdownOther(cmd.Context(), c, name, o)
				}
				if err := c.Shutdown(cmd.Context(), about.Node, o); err != nil {
					return err
				}
				if !a.waiting() {
					return a.print(about, func() { a.say("node %s: shutting down", about.Node) })
				}
				short, cancel := a.bounded(cmd.Context())
				defer cancel()
				if err := waitSilent(short, c); err != nil {
					return stillGoing(err, "node %s is still shutting down", about.Node)
				}
				return a.print(about, func() { a.say("node %s: shut down", about.Node) })
			})
		},
	}
	cmd.Flags().StringVar(&name, "node", "", "which; default: the node that answers")
	cmd.Flags().BoolVar(&o.Force, "force", false, "also while volumes are attached: their guests get I/O errors until the node is back")
	return a.waits(cmd, 2*time.Minute)
}

// shutdownOther stops another node than the one that answers, and waits until that takes it for down.
func (a *app) shutdownOther(ctx context.Context, c *client.Client, name string, o client.ShutdownOptions) error {
	if err := c.Shutdown(ctx, name, o); err != nil {
		return err
	}
	said := "shutting down"
	if a.waiting() {
		short, cancel := a.bounded(ctx)
		defer cancel()
		err := c.WaitNodeState(short, name, func(n api.Node) bool { return n.State == api.NodeDown })
		if api.CodeOf(err) == api.CodeUnreachable {
			return api.Because(err, api.CodeUnreachable, "node %s is shutting down, and the catalogue does not answer without it: more than half of its members must run", name)
		}
		if err != nil {
			return stillGoing(err, "node %s is still shutting down", name)
		}
		said = "shut down"
	}
	return a.nodeEmptied(ctx, c, name, said)
}

// waitSilent waits until a node answers no more, which is the last thing of its end.
func waitSilent(ctx context.Context, c *client.Client) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := c.About(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if api.CodeOf(err) == api.CodeUnreachable {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}
