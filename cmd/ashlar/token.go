package main

import (
	"time"

	"github.com/spf13/cobra"

	"ashlar/internal/api/client"
)

// tokenCommand is credentials for clients beyond this machine.
func (a *app) tokenCommand() *cobra.Command {
	return group("token", "Credentials for clients beyond this machine", a.tokenCreate(), a.tokenList(), a.tokenDelete())
}

func (a *app) tokenCreate() *cobra.Command {
	var n client.NewToken
	var expires time.Duration
	cmd := &cobra.Command{
		Use: "create NAME", Short: "Make a token, and print it once",
		Long: `Create makes a token and prints it: it is kept nowhere, and cannot be shown again. Clients send it as a bearer token or as the password of basic authentication;
"ashlar --server https://… --token-file FILE" does.`,
		Example: "  ashlar token create backup-host --read-only --expires 8760h > token && chmod 600 token", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			n.Name = args[0]
			if expires > 0 {
				n.Expires = a.now().Add(expires)
			}
			return a.withNode(func(c *client.Client) error {
				t, err := c.CreateToken(cmd.Context(), n)
				if err != nil {
					return err
				}
				return a.print(t, func() { a.say("%s", t.Token) })
			})
		},
	}
	cmd.Flags().BoolVar(&n.ReadOnly, "read-only", false, "good for reading only, guests' data included")
	cmd.Flags().DurationVar(&expires, "expires", 0, "how long it is good for (24h, 8760h); 0: until it is deleted")
	return cmd
}

func (a *app) tokenList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List tokens, without their secrets", Example: "  ashlar token list", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withNode(func(c *client.Client) error {
				list, err := c.Tokens(cmd.Context())
				if err != nil {
					return err
				}
				return a.print(list, func() {
					rows := [][]string{{"NAME", "MAY", "CREATED", "EXPIRES"}}
					for _, t := range list {
						may, expires := "everything", t.Expires
						if t.ReadOnly {
							may = "read"
						}
						if t.Expired {
							expires = "expired"
						}
						rows = append(rows, []string{t.Name, may, a.ago(t.Created), dash(expires)})
					}
					a.table(rows)
				})
			})
		},
	}
}

func (a *app) tokenDelete() *cobra.Command {
	return &cobra.Command{
		Use: "delete NAME…", Aliases: []string{"rm"}, Short: "Make tokens invalid", Example: "  ashlar token delete backup-host", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				for _, name := range args {
					if err := c.DeleteToken(cmd.Context(), name); err != nil {
						return err
					}
					a.say("token %s: deleted", name)
				}
				return a.print(deleted{args}, func() {})
			})
		},
	}
}
