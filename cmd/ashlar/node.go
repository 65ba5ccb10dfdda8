package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
)

func (a *app) nodeCommand() *cobra.Command {
	return group("node", "Machines of the cluster", a.nodeList(), a.nodeShow(), a.nodeCordon(), a.nodeUncordon(), a.nodeDrain(), a.nodeEvict(), a.nodeRemove(), a.nodeTag(), a.nodeZone(), a.nodeJoin())
}

func yes() *bool { v := true; return &v }
func no() *bool  { return new(bool) }

func (a *app) nodeList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the nodes", Example: "  ashlar node list\n  ashlar node list -o json | jq '.[] | select(.state != \"up\").name'", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withNode(func(c *client.Client) error {
				o, err := c.Overview(cmd.Context())
				if err != nil {
					return err
				}
				return a.print(o.Nodes, func() { a.nodeTable(o.Nodes) })
			})
		},
	}
}

// nodeTable lists nodes and what they carry.
func (a *app) nodeTable(nodes []api.NodeOverview) {
	rows := [][]string{{"NODE", "ADDRESS", "STATE", "TAKES COPIES", "VERSION", "CATALOGUE", "ZONE", ">DISKS", ">SIZE", ">FREE", ">COPIES", ">ATTACHED"}}
	for _, n := range nodes {
		var total, free int64
		for _, d := range n.Disks {
			total, free = total+d.StorageMaximum, free+d.StorageAvailable
		}
		rows = append(rows, []string{n.Name, address(n.Node), leads(n.Node), takes(n.Node), dash(n.Version), voter(n.Node), dash(n.PlacementZone), fmt.Sprint(len(n.Disks)), size(total), size(free),
			fmt.Sprint(n.Copies), fmt.Sprint(n.Attached)})
	}
	a.table(rows)
}

// address is where other nodes reach one.
func address(n api.Node) string {
	if n.Port == 0 {
		return dash(n.Address)
	}
	if strings.Contains(n.Address, ":") {
		return fmt.Sprintf("[%s]:%d", n.Address, n.Port)
	}
	return fmt.Sprintf("%s:%d", n.Address, n.Port)
}

// leads is a node's state, and that it plans for all: of one in no cluster that goes without saying.
func leads(n api.Node) string {
	if n.Leads && n.Port != 0 {
		return n.State + ", leads"
	}
	return n.State
}

// takes tells whether a node takes copies.
func takes(n api.Node) string {
	switch {
	case n.EvictionRequested:
		return "being emptied"
	case !n.AllowScheduling:
		return "cordoned"
	case n.Conditions["Schedulable"].Status != "True":
		return "no"
	}
	return "yes"
}

// voter is a node's part in keeping the catalogue.
func voter(n api.Node) string {
	switch {
	case !n.Voter:
		return "-"
	case n.State == api.NodeDown:
		return "voter, down"
	case n.Member == "voter" || n.Member == "learner":
		return n.Member
	case n.Member == "":
		return "to be voter"
	}
	return "failed"
}

func (a *app) nodeShow() *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show a node, its disks, and what it has", Example: "  ashlar node show n1", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				n, err := c.Node(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				has, err := c.NodeContents(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return a.print(struct {
					api.Node
					Contents api.NodeContents `json:"contents"`
				}{n, has}, func() { a.showNode(n, has) })
			})
		},
	}
}

func (a *app) showNode(n api.Node, has api.NodeContents) {
	data := "none"
	if n.DataVersion != "" {
		data = fmt.Sprintf("%s, pid %d", n.DataVersion, n.DataPID)
	}
	since := ""
	if n.AliveSince != "" {
		since = a.ago(n.AliveSince)
	}
	member := n.Member
	if n.Voter && member == "" {
		member = "to be voter"
	}
	a.fields("Name", n.Name, "State", leads(n), "Address", address(n), "Zone", n.PlacementZone, "Tags", strings.Join(n.Tags, ", "), "Takes copies", takes(n), "Version", n.Version, "Data process", data,
		"Catalogue", member, "Serve began", since, "Attached", few(has.Attached), "Copies", countOf(len(has.Copies), "of volumes")+", "+countOf(len(has.Images), "of images"), "Id", n.NodeID)
	for _, name := range slices.Sorted(maps.Keys(n.Conditions)) {
		if c := n.Conditions[name]; c.Status == "False" && c.Message != "" {
			a.say("\nnot %s: %s", name, c.Message)
		}
	}
	a.say("")
	a.diskTable(map[string]api.Node{n.Name: n})
}

func countOf(n int, what string) string { return fmt.Sprintf("%d %s", n, what) }

// few lists the first names of many.
func few(names []string) string {
	const most = 8
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

// changeNodes changes nodes one after another and says what became of each.
func (a *app) changeNodes(ctx context.Context, names []string, change client.NodeChange, said string) error {
	return a.withNode(func(c *client.Client) error {
		var all []api.Node
		for _, name := range names {
			n, err := c.ChangeNode(ctx, name, change)
			if err != nil {
				return err
			}
			all = append(all, n)
			a.say("node %s: %s", name, said)
		}
		return a.print(all, func() {})
	})
}

func (a *app) nodeCordon() *cobra.Command {
	return &cobra.Command{
		Use: "cordon NAME…", Short: "Place nothing new on a node", Long: "Cordon keeps new copies of volumes and images away from a node. What is there stays, and goes on.",
		Example: "  ashlar node cordon n1", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changeNodes(cmd.Context(), args, client.NodeChange{AllowScheduling: no()}, "cordoned: it takes no new copies")
		},
	}
}

func (a *app) nodeUncordon() *cobra.Command {
	return &cobra.Command{
		Use: "uncordon NAME…", Short: "Let a node take copies again, and end its emptying", Example: "  ashlar node uncordon n1", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changeNodes(cmd.Context(), args, client.NodeChange{AllowScheduling: yes(), EvictionRequested: no()}, "takes copies")
		},
	}
}

func (a *app) nodeEvict() *cobra.Command {
	return &cobra.Command{
		Use: "evict NAME…", Short: "Ask for everything to leave a node, and do not wait",
		Long: `Evict cordons a node and asks for all its copies of volumes and images to be moved to others. It is refused when they have nowhere to go. A volume is moved while it is detached;
"ashlar node show" tells what is still there, "ashlar node uncordon" takes the wish back, "ashlar node drain" waits.`,
		Example: "  ashlar node evict n1", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changeNodes(cmd.Context(), args, evictNode(), "is being emptied")
		},
	}
}

// evictNode asks for a node to be emptied.
func evictNode() client.NodeChange {
	return client.NodeChange{AllowScheduling: no(), EvictionRequested: yes()}
}

func (a *app) nodeDrain() *cobra.Command {
	cmd := &cobra.Command{
		Use: "drain NAME", Short: "Empty a node, and wait until nothing is left on it",
		Long: `Drain cordons a node, has all its copies of volumes and images moved to others, and waits until they are gone and no volume is attached to it. It is refused when they have nowhere to go.
A volume is moved while it is detached: those in the way are named, with the node that uses them.

Interrupted, or out of time, the node goes on being emptied: "ashlar node uncordon" takes the wish back.`,
		Example: "  ashlar node drain n1\n  ashlar node drain n1 --timeout 10m && ashlar shutdown --node n1", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				if _, err := c.ChangeNode(cmd.Context(), args[0], evictNode()); err != nil {
					return err
				}
				if !a.waiting() {
					return a.nodeEmptied(cmd.Context(), c, args[0], "is being emptied")
				}
				return a.drain(cmd.Context(), c, args[0])
			})
		},
	}
	return a.waits(cmd, 0)
}

// nodeEmptied prints a node.
func (a *app) nodeEmptied(ctx context.Context, c *client.Client, name, said string) error {
	n, err := c.Node(ctx, name)
	if err != nil {
		return err
	}
	return a.print(n, func() { a.say("node %s: %s", name, said) })
}

// drain waits until a node is empty, and says what is still there whenever that changes.
func (a *app) drain(ctx context.Context, c *client.Client, name string) error {
	short, cancel := a.bounded(ctx)
	defer cancel()
	told, left := "", ""
	_, err := c.WaitNode(short, name, func(has api.NodeContents) (bool, error) {
		left = stillThere(has)
		if left != told && left != "" && a.output != "json" {
			fmt.Fprintf(a.err, "node %s: %s\n", name, left)
		}
		told = left
		return left == "", nil
	})
	if err != nil {
		return stillGoing(err, "node %s goes on being emptied; still there: %s; `ashlar node uncordon %s` ends it", name, left, name)
	}
	return a.nodeEmptied(ctx, c, name, "empty")
}

// stillThere says what a node has and what is in the way of its leaving; "" if it is empty.
func stillThere(has api.NodeContents) string {
	var volumes, images, waiting []string
	for _, v := range has.Copies {
		volumes = append(volumes, v.Volume)
		if v.Waits != "" && !slices.Contains(has.Attached, v.Volume) {
			waiting = append(waiting, v.Volume+" ("+v.Waits+")")
		}
	}
	for _, i := range has.Images {
		images = append(images, i.Image)
		if i.Waits != "" && !slices.Contains(waiting, i.Waits) {
			waiting = append(waiting, i.Waits)
		}
	}
	var parts []string
	add := func(format string, names []string) {
		if len(names) > 0 {
			parts = append(parts, fmt.Sprintf(format, few(slices.Compact(names))))
		}
	}
	add("copies of volumes %s", volumes)
	add("copies of images %s", images)
	add("in the way: attached here: %s", has.Attached)
	add("in the way: %s", waiting)
	return strings.Join(parts, "; ")
}

func (a *app) nodeRemove() *cobra.Command {
	var o client.RemoveOptions
	cmd := &cobra.Command{
		Use: "remove NAME", Aliases: []string{"rm"}, Short: "Have the cluster forget a node that is empty",
		Long: `Remove takes a node out of the cluster: its certificate is good for nothing from then on, and its member of the catalogue goes to another node. It must have nothing: drain it
first. One that runs gives its member up and ends, with all its processes; it is not removed through itself: ask another node. One that is stopped is removed as well, unless it is one of two
that keep the catalogue. With --force a dead node that has something is given up: **volumes whose only copy it had are lost**, and what was to be attached there is not any more. The last node
cannot be removed.`,
		Example: "  ashlar node drain n1 && ashlar node remove n1\n  ashlar node remove n1 --force   # it burnt down", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				if err := c.RemoveNode(cmd.Context(), args[0], o); err != nil {
					return err
				}
				if !a.waiting() {
					return a.print(map[string]string{"removing": args[0]}, func() { a.say("node %s: is being removed", args[0]) })
				}
				short, cancel := a.bounded(cmd.Context())
				defer cancel()
				if err := c.WaitNodeGone(short, args[0]); err != nil {
					return stillGoing(err, "node %s is still being removed; `ashlar node show %s`", args[0], args[0])
				}
				return a.print(deleted{args}, func() { a.say("node %s: removed", args[0]) })
			})
		},
	}
	cmd.Flags().BoolVar(&o.Force, "force", false, "also a dead one that has something: what only it had is lost")
	return a.waits(cmd, time.Minute)
}

func (a *app) nodeTag() *cobra.Command {
	var none bool
	cmd := &cobra.Command{
		Use: "tag NAME TAG…", Short: "Set a node's tags, which volumes and images can ask for", Long: "Tag replaces a node's tags. A volume or image with a node selector is placed only on nodes that have all of its tags.",
		Example: "  ashlar node tag n1 fast rack7\n  ashlar node tag n1 --none", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			tags, err := tagsOf(cmd, args[1:], none)
			if err != nil {
				return err
			}
			return a.changeNodes(cmd.Context(), args[:1], client.NodeChange{Tags: tags}, "tags: "+dash(strings.Join(tags, ", ")))
		},
	}
	cmd.Flags().BoolVar(&none, "none", false, "take all tags away")
	return cmd
}

// tagsOf are the tags that were given: at least one, or none on purpose.
func tagsOf(cmd *cobra.Command, tags []string, none bool) ([]string, error) {
	if none == (len(tags) > 0) {
		return nil, usageError{cmd, errors.New("either tags or --none")}
	}
	return append([]string{}, tags...), nil
}

func (a *app) nodeZone() *cobra.Command {
	var none bool
	cmd := &cobra.Command{
		Use: "zone NAME ZONE", Short: "Say which zone a node is in: what fails together", Long: "Zone names what may fail as a whole: a rack, a room, a site. Copies of a volume are kept in different zones where there are enough.",
		Example: "  ashlar node zone n1 room-a\n  ashlar node zone n1 --none", Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			zone := strings.Join(args[1:], "")
			if none == (zone != "") {
				return usageError{cmd, errors.New("either a zone or --none")}
			}
			return a.changeNodes(cmd.Context(), args[:1], client.NodeChange{PlacementZone: &zone}, "zone: "+dash(zone))
		},
	}
	cmd.Flags().BoolVar(&none, "none", false, "in no zone")
	return cmd
}
