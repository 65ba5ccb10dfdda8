package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
	"ashlar/internal/node"
)

// memberPatience is how long a node may take to come up as what it has become.
const memberPatience = time.Minute

func (a *app) clusterInit() *cobra.Command {
	var address string
	cmd := &cobra.Command{
		Use: "init", Short: "Open this node's cluster of one, so that others can join",
		Long: `Init gives the node an address in its cluster and opens it there. Four TCP ports in a row are used, beginning with the address's (9510 unless another is named): between
nodes, two of the catalogue's, and the data process's. All of them speak TLS with certificates of the cluster's own authority. Guests do not notice; the API is away for a moment.`,
		Example: "  ashlar cluster init --address 192.0.2.1\n  ashlar cluster init --address kvm1.example:9510", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withNode(func(c *client.Client) error {
				if address == "" {
					return usageError{cmd, fmt.Errorf("--address is needed: the host name or IP address by which other machines reach this one")}
				}
				if _, err := c.InitCluster(cmd.Context(), address); err != nil {
					return err
				}
				info, err := a.waitMember(cmd.Context(), c, "")
				if err != nil {
					return err
				}
				return a.print(info, func() {
					a.say("cluster %s is open at %s\nanother machine joins it so:\n  here:   ashlar cluster token\n  there:  ashlar node join %s --token TOKEN --address ITS-ADDRESS", info.ClusterID, info.Address, info.Address)
				})
			})
		},
	}
	cmd.Flags().StringVar(&address, "address", "", "HOST or HOST:PORT by which other machines reach this one")
	return cmd
}

// waitMember waits until the node is what it has become.
func (a *app) waitMember(ctx context.Context, c *client.Client, was string) (api.ClusterInfo, error) {
	short, cancel := context.WithTimeout(ctx, memberPatience)
	defer cancel()
	info, err := c.WaitCluster(short, was)
	return info, stillGoing(err, "the node has changed and does not answer yet; look with `ashlar status`")
}

func (a *app) clusterToken() *cobra.Command {
	var life time.Duration
	cmd := &cobra.Command{
		Use: "token", Short: "Make a token that lets one machine join, and print it once",
		Long: `Token makes a join token and prints it: it is kept nowhere, and cannot be shown again. One machine can join with it, before it expires. It also says which cluster it is of, so
that the machine knows whom it speaks to.`,
		Example: "  ashlar cluster token --expires 15m", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withNode(func(c *client.Client) error {
				t, err := c.CreateJoinToken(cmd.Context(), life)
				if err != nil {
					return err
				}
				return a.print(t, func() { a.say("%s", t.Token) })
			})
		},
	}
	cmd.Flags().DurationVar(&life, "expires", time.Hour, "how long it is good for (15m, 24h)")
	cmd.AddCommand(a.clusterTokenList(), a.clusterTokenDelete())
	return cmd
}

func (a *app) clusterTokenList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List join tokens, without what they are, and who used them", Example: "  ashlar cluster token list", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withNode(func(c *client.Client) error {
				list, err := c.JoinTokens(cmd.Context())
				if err != nil {
					return err
				}
				return a.print(list, func() {
					rows := [][]string{{"NAME", "CREATED", "EXPIRES", "USED BY"}}
					for _, t := range list {
						rows = append(rows, []string{t.Name, a.ago(t.Created), t.Expires, dash(t.UsedBy)})
					}
					a.table(rows)
				})
			})
		},
	}
}

func (a *app) clusterTokenDelete() *cobra.Command {
	return &cobra.Command{
		Use: "delete NAME…", Aliases: []string{"rm"}, Short: "Make join tokens invalid; nodes that joined stay", Example: "  ashlar cluster token delete j-1a2b3c", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				for _, name := range args {
					if err := c.DeleteJoinToken(cmd.Context(), name); err != nil {
						return err
					}
					a.say("join token %s: deleted", name)
				}
				return a.print(deleted{args}, func() {})
			})
		},
	}
}

func (a *app) clusterReaddress() *cobra.Command {
	cfg := node.Config{Version: version}
	var address string
	cmd := &cobra.Command{
		Use: "readdress", Short: "Tell this node and its cluster its new address",
		Long: `Readdress is for a node whose address has changed, or will: serve may run or not. The others learn of it when the node reaches them; guests on this node do not notice, and
those on other nodes whose copies are here wait until then.`,
		Example: "  ashlar cluster readdress --address 192.0.2.17", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if address == "" {
				return usageError{cmd, fmt.Errorf("--address is needed: the host name or IP address by which other machines reach this one now")}
			}
			return a.withNode(func(c *client.Client) error {
				was, err := c.Readdress(cmd.Context(), address)
				if api.CodeOf(err) == api.CodeUnreachable && a.server == "" {
					cfg.RunDir, cfg.Log = a.runDir, slog.New(slog.DiscardHandler)
					if err := node.Readdress(cmd.Context(), cfg, address); err != nil {
						return err
					}
					return a.print(map[string]string{"address": address}, func() { a.say("this node is at %s from the next start of serve on", address) })
				}
				if err != nil {
					return err
				}
				if was.Address == node.FullAddress(address) {
					was.Address = "" // it has it already
				}
				info, err := a.waitMember(cmd.Context(), c, was.Address)
				if err != nil {
					return err
				}
				return a.print(info, func() { a.say("node %s is at %s", info.Node, info.Address) })
			})
		},
	}
	cmd.Flags().StringVar(&address, "address", "", "HOST or HOST:PORT by which other machines reach this one")
	optionOf("data-dir").define(cmd, &cfg.DataDir)
	return cmd
}

func (a *app) clusterRescue() *cobra.Command {
	cfg := node.Config{Version: version}
	var lost bool
	cmd := &cobra.Command{
		Use: "rescue", Short: "Go on with this node's catalogue alone, when most voters are lost for good",
		Long: `Rescue makes this node's member of the catalogue the only one: for when the majority of the nodes that kept the catalogue is lost for good, and nothing can be changed any
more. What this member knows is kept; what only the others knew is gone. The lost nodes must never start again with what they have: they would go on by themselves. Stop serve here
first; guests go on. Afterwards start it, and remove the lost nodes: other nodes take their places.`,
		Example: "  systemctl stop ashlar && ashlar cluster rescue --others-are-lost && systemctl start ashlar\n  ashlar node remove kvm2 --force", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !lost {
				return usageError{cmd, fmt.Errorf("--others-are-lost is needed: say that the other voters will never start again with what they have")}
			}
			cfg.RunDir, cfg.Log = a.runDir, slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelError}))
			if err := node.Rescue(cmd.Context(), cfg); err != nil {
				return err
			}
			return a.print(map[string]bool{"rescued": true}, func() { a.say("this node keeps the catalogue alone now; start serve, then remove the lost nodes") })
		},
	}
	cmd.Flags().BoolVar(&lost, "others-are-lost", false, "the other voters will never start again with what they have")
	optionOf("data-dir").define(cmd, &cfg.DataDir)
	return cmd
}
