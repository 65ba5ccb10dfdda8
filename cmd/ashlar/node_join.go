package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"ashlar/internal/api/client"
)

func (a *app) nodeJoin() *cobra.Command {
	var n client.NewMember
	var file string
	cmd := &cobra.Command{
		Use: "join HOST[:PORT]", Short: "Make this machine a node of another's cluster",
		Long: `Join makes this machine, on which "ashlar serve" runs and nothing is kept yet, a node of the cluster that the node at HOST[:PORT] is of. "ashlar cluster token" there makes
the token; it can also stand in a file, or in ASHLAR_JOIN_TOKEN, where other users of this machine do not see it. What this machine was called (serve --name) it is called in the cluster.

A node of that cluster that was off for longer than its certificate lives (90 days) comes back in the same way: it is given another certificate, and is who it was. --address is not needed then.`,
		Example: "  ashlar node join 192.0.2.1 --token-file token --address 192.0.2.2\n  ashlar node join 192.0.2.1 --token-file token    # its certificate had ended", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			n.To = args[0]
			if n.Token == "" && file != "" {
				text, err := os.ReadFile(file)
				if err != nil {
					return fmt.Errorf("join token: %w", err)
				}
				n.Token = strings.TrimSpace(string(text))
			}
			if n.Token == "" {
				n.Token = a.getenv("ASHLAR_JOIN_TOKEN")
			}
			if n.Token == "" {
				return usageError{cmd, fmt.Errorf("--token (or --token-file) and --address are needed")}
			}
			return a.withNode(func(c *client.Client) error {
				// A node that is in a cluster has an address. It cannot say so while the catalogue is away, as it is for one whose certificate has ended.
				if info, err := c.Cluster(cmd.Context()); err == nil && info.Address == "" && n.Address == "" {
					return usageError{cmd, fmt.Errorf("--address is needed: the host name or IP address by which other machines reach this one")}
				}
				if _, err := c.JoinCluster(cmd.Context(), n); err != nil {
					return err
				}
				info, err := a.waitMember(cmd.Context(), c, "")
				if err != nil {
					return err
				}
				return a.print(info, func() { a.say("node %s is in cluster %s at %s", info.Node, info.ClusterID, info.Address) })
			})
		},
	}
	cmd.Flags().StringVar(&n.Token, "token", "", "the join token; other users of this machine can see it while the command runs (ASHLAR_JOIN_TOKEN)")
	cmd.Flags().StringVar(&file, "token-file", "", "file with the join token")
	cmd.Flags().StringVar(&n.Address, "address", "", "HOST or HOST:PORT by which other machines reach this one")
	return cmd
}
