package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
)

func (a *app) diskCommand() *cobra.Command {
	return group("disk", "Directories of nodes that hold volumes and images", a.diskList(), a.diskShow(), a.diskAdd(), a.diskTag(), a.diskCordon(), a.diskUncordon(), a.diskEvict(), a.diskRemove())
}

// diskPlace is where a disk is: NODE/DISK, or DISK with --node, or DISK of the node that answers.
type diskPlace struct{ node string }

func (p *diskPlace) flag(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVar(&p.node, "node", "", "the disk's node, if its name is given alone; default: the node that answers")
	return cmd
}

func (p *diskPlace) find(ctx context.Context, cmd *cobra.Command, c *client.Client, arg string) (node, disk string, err error) {
	node, disk, both := strings.Cut(arg, "/")
	switch {
	case both && p.node != "" && p.node != node:
		return "", "", usageError{cmd, fmt.Errorf("disk %s is of node %s, --node says %s", arg, node, p.node)}
	case both && (node == "" || disk == ""):
		return "", "", usageError{cmd, fmt.Errorf("%q is no disk: NODE/DISK, or DISK with --node", arg)}
	case both:
		return node, disk, nil
	case p.node != "":
		return p.node, arg, nil
	}
	about, err := c.About(ctx)
	return about.Node, arg, err
}

// diskAs is a disk as -o json shows it.
type diskAs struct {
	Node string `json:"node"`
	Name string `json:"name"`
	api.Disk
}

func disksOf(nodes []api.Node, only string) []diskAs {
	out := []diskAs{}
	for _, n := range nodes {
		if only != "" && n.Name != only {
			continue
		}
		for _, name := range slices.Sorted(maps.Keys(n.Disks)) {
			out = append(out, diskAs{Node: n.Name, Name: name, Disk: n.Disks[name]})
		}
	}
	return out
}

func (a *app) diskList() *cobra.Command {
	var node string
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List disks", Example: "  ashlar disk list\n  ashlar disk list --node n1", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withNode(func(c *client.Client) error {
				nodes, err := c.Nodes(cmd.Context())
				if err == nil && node != "" && !slices.ContainsFunc(nodes, func(n api.Node) bool { return n.Name == node }) {
					err = api.Failure(api.CodeNotFound, "node %q: there is no such node", node)
				}
				if err != nil {
					return err
				}
				byName := map[string]api.Node{}
				for _, n := range nodes {
					if node == "" || n.Name == node {
						byName[n.Name] = n
					}
				}
				return a.print(disksOf(nodes, node), func() { a.diskTable(byName) })
			})
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "only this node's")
	return cmd
}

// diskTable lists the disks of nodes.
func (a *app) diskTable(nodes map[string]api.Node) {
	rows := [][]string{{"DISK", "STATE", ">SIZE", ">FREE", ">SCHEDULED", ">RESERVED", ">COPIES", ">IMAGES", "TAGS", "PATH"}}
	for _, node := range slices.Sorted(maps.Keys(nodes)) {
		n := nodes[node]
		for _, name := range slices.Sorted(maps.Keys(n.Disks)) {
			d := n.Disks[name]
			rows = append(rows, []string{node + "/" + name, diskState(d), size(d.StorageMaximum), size(d.StorageAvailable), size(d.StorageScheduled), size(d.StorageReserved),
				fmt.Sprint(len(d.ScheduledReplica)), fmt.Sprint(len(d.ScheduledBackingImage)), dash(strings.Join(d.Tags, ",")), d.Path})
		}
	}
	a.table(rows)
}

// diskState is a disk's in a word.
func diskState(d api.Disk) string {
	switch {
	case d.Lost:
		return "given up"
	case d.Conditions["Ready"].Reason == "NodeDown":
		return "down"
	case d.Conditions["Ready"].Status != "True":
		return "not ready"
	case d.EvictionRequested:
		return "being emptied"
	case !d.AllowScheduling:
		return "cordoned"
	case d.Conditions["Schedulable"].Status != "True":
		return "takes nothing"
	}
	return "ready"
}

func (a *app) diskShow() *cobra.Command {
	var at diskPlace
	cmd := &cobra.Command{
		Use: "show NODE/DISK", Short: "Show a disk and what is on it", Example: "  ashlar disk show n1/default\n  ashlar disk show default", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				node, name, err := at.find(cmd.Context(), cmd, c, args[0])
				if err != nil {
					return err
				}
				n, err := c.Node(cmd.Context(), node)
				if err != nil {
					return err
				}
				d, ok := n.Disks[name]
				if !ok {
					return api.Failure(api.CodeNotFound, "node %s has no disk %q; it has: %s", node, name, few(slices.Sorted(maps.Keys(n.Disks))))
				}
				has, err := c.NodeContents(cmd.Context(), node)
				if err != nil {
					return err
				}
				has = onDisk(has, name)
				return a.print(struct {
					diskAs
					Contents api.NodeContents `json:"contents"`
				}{diskAs{node, name, d}, has}, func() { a.showDisk(node+"/"+name, d, has) })
			})
		},
	}
	return at.flag(cmd)
}

// onDisk keeps of a node's contents what is on one disk.
func onDisk(has api.NodeContents, disk string) api.NodeContents {
	has.Copies = slices.DeleteFunc(has.Copies, func(v api.CopyOnNode) bool { return v.Disk != disk })
	has.Images = slices.DeleteFunc(has.Images, func(i api.ImageOn) bool { return i.Disk != disk })
	has.Attached = slices.DeleteFunc(has.Attached, func(name string) bool {
		return !slices.ContainsFunc(has.Copies, func(v api.CopyOnNode) bool { return v.Volume == name })
	})
	return has
}

func (a *app) showDisk(name string, d api.Disk, has api.NodeContents) {
	a.fields("Disk", name, "State", diskState(d), "Path", d.Path, "Size", size(d.StorageMaximum), "Free", size(d.StorageAvailable), "Scheduled", size(d.StorageScheduled),
		"Reserved", size(d.StorageReserved), "Tags", strings.Join(d.Tags, ", "), "Id", d.DiskUUID)
	for _, cond := range slices.Sorted(maps.Keys(d.Conditions)) {
		if c := d.Conditions[cond]; c.Message != "" {
			a.say("\n%s is %s: %s", cond, c.Status, c.Message)
		}
	}
	rows := [][]string{{"ON IT", "NAME", "STATE"}}
	for _, v := range has.Copies {
		rows = append(rows, []string{"copy of volume", v.Volume, dash(v.Waits)})
	}
	for _, i := range has.Images {
		rows = append(rows, []string{"copy of image", i.Image, dash(i.State)})
	}
	a.say("")
	a.table(rows)
}

// changeDisk changes the disk that an argument names.
func (a *app) changeDisk(cmd *cobra.Command, at diskPlace, arg string, change client.DiskChange, said string) error {
	return a.withNode(func(c *client.Client) error {
		node, name, err := at.find(cmd.Context(), cmd, c, arg)
		if err != nil {
			return err
		}
		change.Disk = name
		n, err := c.ChangeDisk(cmd.Context(), node, change)
		if err != nil {
			return err
		}
		return a.print(diskAs{node, name, n.Disks[name]}, func() { a.say("disk %s/%s: %s", node, name, said) })
	})
}

func (a *app) diskAdd() *cobra.Command {
	var at diskPlace
	var reserve string
	var tags []string
	cmd := &cobra.Command{
		Use: "add NODE/DISK PATH", Short: "Give a node one more directory to hold volumes and images",
		Long: `Add gives a node a directory of its own: on a file system of its own, best one for each device. It must be empty, or have been a disk of this cluster before: then what is on it is
there again. With --reserve that much is left alone.`,
		Example: "  ashlar disk add n1/nvme1 /mnt/nvme1\n  ashlar disk add n1/hdd /mnt/hdd --reserve 100Gi --tag slow", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			change := client.DiskChange{Path: args[1], Tags: tags}
			if reserve != "" {
				n, err := api.ParseSize(reserve)
				if err != nil {
					return api.Because(err, api.CodeInvalid, "disk %s: --reserve: %v", args[0], err)
				}
				change.StorageReserved = &n
			}
			return a.changeDisk(cmd, at, args[0], change, "added; `ashlar disk list` tells when it is ready")
		},
	}
	cmd.Flags().StringVar(&reserve, "reserve", "", "how much is left alone, for example 10Gi")
	cmd.Flags().StringSliceVar(&tags, "tag", nil, "a tag; several are allowed")
	return at.flag(cmd)
}

func (a *app) diskTag() *cobra.Command {
	var at diskPlace
	var none bool
	cmd := &cobra.Command{
		Use: "tag NODE/DISK TAG…", Short: "Set a disk's tags, which volumes and images can ask for", Long: "Tag replaces a disk's tags. A volume or image with a disk selector is placed only on disks that have all of its tags.",
		Example: "  ashlar disk tag n1/nvme1 fast\n  ashlar disk tag n1/nvme1 --none", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			tags, err := tagsOf(cmd, args[1:], none)
			if err != nil {
				return err
			}
			return a.changeDisk(cmd, at, args[0], client.DiskChange{Tags: tags}, "tags: "+dash(strings.Join(tags, ", ")))
		},
	}
	cmd.Flags().BoolVar(&none, "none", false, "take all tags away")
	return at.flag(cmd)
}

func (a *app) diskCordon() *cobra.Command {
	var at diskPlace
	return at.flag(&cobra.Command{
		Use: "cordon NODE/DISK", Short: "Place nothing new on a disk", Example: "  ashlar disk cordon n1/hdd", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changeDisk(cmd, at, args[0], client.DiskChange{AllowScheduling: no()}, "cordoned: it takes no new copies")
		},
	})
}

func (a *app) diskUncordon() *cobra.Command {
	var at diskPlace
	return at.flag(&cobra.Command{
		Use: "uncordon NODE/DISK", Short: "Let a disk take copies again, and end its emptying", Example: "  ashlar disk uncordon n1/hdd", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changeDisk(cmd, at, args[0], client.DiskChange{AllowScheduling: yes(), EvictionRequested: no()}, "takes copies")
		},
	})
}

func (a *app) diskEvict() *cobra.Command {
	var at diskPlace
	cmd := &cobra.Command{
		Use: "evict NODE/DISK", Short: "Have everything moved away from a disk",
		Long: `Evict cordons a disk, has all its copies of volumes and images moved to other disks, and waits until they are gone. It is refused when they have nowhere to go. A volume is moved
while it is detached. Interrupted, or out of time, the disk goes on being emptied: "ashlar disk uncordon" takes the wish back.`,
		Example: "  ashlar disk evict n1/hdd && ashlar disk remove n1/hdd", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !a.waiting() {
				return a.changeDisk(cmd, at, args[0], client.DiskChange{AllowScheduling: no(), EvictionRequested: yes()}, "is being emptied")
			}
			return a.withNode(func(c *client.Client) error { return a.evictDisk(cmd, c, at, args[0]) })
		},
	}
	return at.flag(a.waits(cmd, 0))
}

// evictDisk empties a disk and waits, as drain does for a node.
func (a *app) evictDisk(cmd *cobra.Command, c *client.Client, at diskPlace, arg string) error {
	ctx := cmd.Context()
	node, name, err := at.find(ctx, cmd, c, arg)
	if err != nil {
		return err
	}
	n, err := c.ChangeDisk(ctx, node, client.DiskChange{Disk: name, AllowScheduling: no(), EvictionRequested: yes()})
	if err != nil {
		return err
	}
	short, cancel := a.bounded(ctx)
	defer cancel()
	told, left := "", ""
	_, err = c.WaitNode(short, node, func(has api.NodeContents) (bool, error) {
		has = onDisk(has, name)
		has.Attached = nil // what is attached here may have its copy elsewhere; those with a copy here say that they wait
		left = stillThere(has)
		if left != told && left != "" && a.output != "json" {
			fmt.Fprintf(a.err, "disk %s/%s: %s\n", node, name, left)
		}
		told = left
		return left == "", nil
	})
	if err != nil {
		return stillGoing(err, "disk %s/%s goes on being emptied; still there: %s; `ashlar disk uncordon %s/%s` ends it", node, name, left, node, name)
	}
	return a.print(diskAs{node, name, n.Disks[name]}, func() { a.say("disk %s/%s: empty", node, name) })
}

func (a *app) diskRemove() *cobra.Command {
	var at diskPlace
	var o client.RemoveOptions
	cmd := &cobra.Command{
		Use: "remove NODE/DISK", Aliases: []string{"rm"}, Short: "Take an empty disk away from its node",
		Long: `Remove takes a disk away that takes no copies and has none; its directory stays as it is. With --force a disk that cannot be read any more is given up with what it has: copies of
images are forgotten, and **volumes whose only copy it had are lost**. They are faulted until you delete them, and the disk is listed as given up until then.`,
		Example: "  ashlar disk evict n1/hdd && ashlar disk remove n1/hdd\n  ashlar disk remove n1/hdd --force   # it died", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				node, name, err := at.find(cmd.Context(), cmd, c, args[0])
				if err != nil {
					return err
				}
				if o.Force {
					return a.giveUpDisk(cmd.Context(), c, node, name)
				}
				if _, err := c.RemoveDisk(cmd.Context(), node, name, o); err != nil {
					return err
				}
				return a.print(deleted{[]string{node + "/" + name}}, func() { a.say("disk %s/%s: removed", node, name) })
			})
		},
	}
	cmd.Flags().BoolVar(&o.Force, "force", false, "also one that cannot be read and has something: that is given up")
	return at.flag(cmd)
}

// givenUp is what was lost with a disk, as -o json shows it.
type givenUp struct {
	Disk    string   `json:"givenUp"` // NODE/DISK
	Volumes []string `json:"volumes"` // that had a copy there
	Images  []string `json:"images"`  // that had a copy there
}

// giveUpDisk gives a disk up, and says what was on it.
func (a *app) giveUpDisk(ctx context.Context, c *client.Client, node, disk string) error {
	has, err := c.NodeContents(ctx, node)
	if err != nil {
		return err
	}
	if _, err := c.RemoveDisk(ctx, node, disk, client.RemoveOptions{Force: true}); err != nil {
		return err
	}
	lost := givenUp{Disk: node + "/" + disk, Volumes: []string{}, Images: []string{}}
	has = onDisk(has, disk)
	for _, v := range has.Copies {
		lost.Volumes = append(lost.Volumes, v.Volume)
	}
	for _, i := range has.Images {
		lost.Images = append(lost.Images, i.Image)
	}
	lost.Volumes, lost.Images = slices.Compact(lost.Volumes), slices.Compact(lost.Images)
	return a.print(lost, func() {
		a.say("disk %s: given up", lost.Disk)
		if len(lost.Volumes) > 0 {
			a.say("Its copies of volumes are lost: %s. Those that had no other are faulted; `ashlar volume delete` forgets them, and then the disk is forgotten.", few(lost.Volumes))
		}
		if len(lost.Images) > 0 {
			a.say("Its copies of images are lost: %s.", few(lost.Images))
		}
	})
}

// selectorFlags let a volume or an image ask for tags.
func selectorFlags(cmd *cobra.Command, node, disk *[]string) {
	cmd.Flags().StringSliceVar(node, "node-selector", nil, "only nodes with this tag; several: with all of them")
	cmd.Flags().StringSliceVar(disk, "disk-selector", nil, "only disks with this tag; several: with all of them")
}
