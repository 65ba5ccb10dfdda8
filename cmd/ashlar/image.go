package main

import (
	"context"
	"fmt"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
)

func (a *app) imageCommand() *cobra.Command {
	return group("image", "Golden images that volumes are made of", a.imageImport(), a.imageList(), a.imageShow(), a.imageDelete())
}

func (a *app) imageImport() *cobra.Command {
	var sum string
	var copies int
	cmd := &cobra.Command{
		Use:   "import NAME URL|FILE",
		Short: "Import an image from a web server or a file on the node",
		Long: `Import an image: raw or qcow2, told by its content. With a checksum, what arrives is verified while it streams, and refused if it differs.

The import goes on when this command is interrupted or its node's serve is restarted; "ashlar image show NAME" tells how far it is.
A FILE is read by the node, on the node, and can be named only over its unix socket.`,
		Example: `  ashlar image import debian https://example.org/debian-12-generic-amd64.qcow2 --checksum sha512:1c4c…
  ashlar image import win /srv/images/win.raw`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			n := client.NewImage{Name: args[0], ExpectedChecksum: sum, Copies: copies}
			if err := source(&n, args[1]); err != nil {
				return err
			}
			return a.withNode(func(c *client.Client) error { return a.importImage(cmd.Context(), c, n) })
		},
	}
	cmd.Flags().StringVar(&sum, "checksum", "", "what the file must have: sha512:HEX or sha256:HEX")
	cmd.Flags().IntVar(&copies, "copies", 0, "on how many nodes to keep it; default 3, or as many as there are")
	return a.waits(cmd, 0)
}

// source tells a URL from a file and makes the file's path absolute.
func source(n *client.NewImage, s string) error {
	if u, err := url.Parse(s); err == nil && u.Host != "" && u.Scheme != "" {
		n.URL = s
		return nil
	}
	path, err := filepath.Abs(s)
	if err != nil {
		return fmt.Errorf("image %s: %w", n.Name, err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return api.Because(err, api.CodeNotFound, "image %s: %v; give a file on this machine or a URL", n.Name, err)
	}
	if !info.Mode().IsRegular() && info.Mode()&os.ModeDevice == 0 {
		return api.Failure(api.CodeInvalid, "image %s: %s is no file", n.Name, path)
	}
	n.Path = path
	return nil
}

func (a *app) importImage(ctx context.Context, c *client.Client, n client.NewImage) error {
	if n.Copies == 0 {
		copies, err := defaultCopies(ctx, c)
		if err != nil {
			return err
		}
		n.Copies = copies
	}
	start := a.now()
	img, err := c.ImportImage(ctx, n)
	if err != nil {
		return stillGoing(err, "the import of image %s may have begun; `ashlar image show %s`", n.Name, n.Name)
	}
	if !a.waiting() {
		return a.print(img, func() { a.say("image %s: import begun; `ashlar image show %s` tells how far it is", n.Name, n.Name) })
	}
	bar := a.progress("image " + n.Name)
	short, cancel := a.bounded(ctx)
	defer cancel()
	img, err = c.WaitImage(short, n.Name, func(img api.BackingImage) (bool, error) {
		s := imageState(img)
		if s.failed {
			return false, api.Failure(api.CodeSource, "image %s: %s; look with `ashlar image show %s`, or delete it and try another source", n.Name, s.message, n.Name)
		}
		bar.at(s.progress, s.state)
		return s.ready, nil
	})
	bar.end()
	if err != nil {
		return stillGoing(err, "the import of image %s goes on; `ashlar image show %s` tells how far it is", n.Name, n.Name)
	}
	return a.print(img, func() {
		a.say("image %s: ready, %s (%s received, %s) in %s", img.Name, size(img.VirtualSize), size(img.Size), img.Format, a.now().Sub(start).Round(10*time.Millisecond))
	})
}

// defaultCopies is min(3, nodes that take copies), and 1 at least.
func defaultCopies(ctx context.Context, c *client.Client) (int, error) {
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return 0, err
	}
	n := 0
	for _, node := range nodes {
		if node.AllowScheduling && node.Conditions["Schedulable"].Status == "True" && node.Conditions["Ready"].Status == "True" {
			n++
		}
	}
	return min(3, max(1, n)), nil
}

// overall is an image's state in one word, from those of its copies: the best one counts.
type overall struct {
	ready, failed bool
	state         string
	progress      int
	message       string
}

func imageState(img api.BackingImage) overall {
	rank := func(state string) int {
		return slices.Index([]string{"failed", "unknown", "", "pending", "starting", "in-progress", "ready"}, state)
	}
	best := overall{state: "pending"}
	first := true
	for _, disk := range slices.Sorted(maps.Keys(img.DiskFileStatusMap)) {
		d := img.DiskFileStatusMap[disk]
		if first || rank(d.State) > rank(best.state) {
			best = overall{ready: d.State == "ready", failed: d.State == "failed", state: d.State, progress: d.Progress, message: d.Message}
			first = false
		}
	}
	if best.state == "" {
		best.state = "pending"
	}
	if img.DeletionTimestamp != "" {
		best = overall{state: "deleting"}
	}
	return best
}

func (o overall) String() string {
	if o.state == "in-progress" {
		return fmt.Sprintf("importing %d %%", o.progress)
	}
	return o.state
}

func (a *app) imageList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List images", Example: "  ashlar image list", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withNode(func(c *client.Client) error {
				list, err := c.Images(cmd.Context())
				if err != nil {
					return err
				}
				return a.print(list, func() {
					rows := [][]string{{"NAME", "STATE", ">SIZE", ">RECEIVED", "FORMAT", "CREATED"}}
					for _, i := range list {
						rows = append(rows, []string{i.Name, imageState(i).String(), size(i.VirtualSize), size(i.Size), dash(i.Format), a.ago(i.Created)})
					}
					a.table(rows)
				})
			})
		},
	}
}

func (a *app) imageShow() *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show an image and its copies", Example: "  ashlar image show debian", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				img, err := c.Image(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return a.print(img, func() { a.showImage(img) })
			})
		},
	}
}

func (a *app) showImage(img api.BackingImage) {
	sum := img.CurrentChecksum
	if sum != "" {
		sum = "sha512:" + sum
	}
	a.fields("Name", img.Name, "State", imageState(img).String(), "Source", img.Parameters["url"]+img.Parameters["path"], "Format", img.Format,
		"Size", api.FormatSize(img.VirtualSize), "Received", api.FormatSize(img.Size), "Checksum", sum, "Digest", img.Digest, "Created", a.ago(img.Created), "Id", img.UUID)
	a.say("")
	rows := [][]string{{"DISK", "STATE", ">PROGRESS", ">ON DISK", "MESSAGE"}}
	for _, disk := range slices.Sorted(maps.Keys(img.DiskFileStatusMap)) {
		d := img.DiskFileStatusMap[disk]
		rows = append(rows, []string{disk, dash(d.State), fmt.Sprintf("%d %%", d.Progress), size(d.AllocatedBytes), dash(strings.TrimSpace(d.Message))})
	}
	a.table(rows)
}

func (a *app) imageDelete() *cobra.Command {
	return a.waits(&cobra.Command{
		Use: "delete NAME…", Aliases: []string{"rm"}, Short: "Delete images that no volume stands on", Example: "  ashlar image delete debian", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				for _, name := range args {
					if err := c.DeleteImage(cmd.Context(), name); err != nil {
						return err
					}
					if a.waiting() {
						short, cancel := a.bounded(cmd.Context())
						err := c.WaitImageGone(short, name)
						cancel()
						if err != nil {
							return stillGoing(err, "the deletion of image %s goes on", name)
						}
					}
					a.say("image %s: deleted", name)
				}
				return a.print(deleted{args}, func() {})
			})
		},
	}, time.Minute)
}
