package main

import (
	"cmp"
	"context"
	"errors"
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
	return group("image", "Golden images that volumes are made of", a.imageImport(), a.imageExport(), a.imageList(), a.imageShow(), a.imageDelete())
}

func (a *app) imageImport() *cobra.Command {
	var src importSource
	var n client.NewImage
	cmd := &cobra.Command{
		Use:   "import NAME [URL|FILE|-]",
		Short: "Import an image: from a URL, a file, standard input, or a volume",
		Long: `Import an image: raw or qcow2, told by its content, as it is or in gzip, xz or zstd. With a checksum, what arrives is verified while it streams, and refused if it
differs. A URL is http, https, nbd, nbds (with ?tls-certificates=DIR, if the server wants a certificate or has an
authority of its own) or nbd+unix; proxies are taken from the environment of the node. A transfer that breaks off goes on where it was,
if the server can. With --volume the image is made of a volume, or of one of its snapshots.

The import goes on when this command is interrupted or its node's serve is restarted; "ashlar image show NAME" tells how far it is. Not so from standard
input, or from a file on another machine than the node: those bytes come through this command.`,
		Example: `  ashlar image import debian https://example.org/debian-12-generic-amd64.qcow2 --checksum sha512:1c4c…
  ashlar image import win /srv/images/win.raw.xz
  ssh old 'cat /dev/vg/vm7' | ashlar image import vm7 -
  ashlar image import golden --volume vm1 --snapshot ready`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 2 {
				src.from = args[1]
			}
			if (src.from == "") == (src.volume == "") {
				return usageError{cmd, errors.New("either a URL, a file or - for standard input, or --volume")}
			}
			return a.withNode(func(c *client.Client) error {
				start := a.now()
				n.Name = args[0]
				img, err := a.importImage(cmd.Context(), c, n, src)
				if err != nil {
					return err
				}
				return a.print(img, func() {
					if !a.waiting() {
						a.say("image %s: import begun; `ashlar image show %s` tells how far it is", img.Name, img.Name)
						return
					}
					a.say("image %s: ready, %s (%s received, %s) in %s", img.Name, size(img.VirtualSize), size(img.Size), img.Format, a.now().Sub(start).Round(10*time.Millisecond))
				})
			})
		},
	}
	cmd.Flags().StringVar(&src.sum, "checksum", "", "what the file must have: sha512:HEX or sha256:HEX")
	cmd.Flags().StringVar(&src.volume, "volume", "", "a volume to make it of")
	cmd.Flags().StringVar(&src.snapshot, "snapshot", "", "of that volume; default: the present")
	selectorFlags(cmd, &n.NodeSelector, &n.DiskSelector)
	cmd.Flags().IntVar(&n.Copies, "copies", 0, "on how many nodes to keep it; default 3, or as many as there are")
	return a.waits(cmd, 0)
}

// importSource is where an image comes from: a URL, a file, "-", or a volume.
type importSource struct {
	from, sum, volume, snapshot string
}

// open turns it into what the node is asked, and the bytes to be sent to it, if they come through us.
// alone tells that it may read a path itself.
func (s importSource) open(alone bool, n *client.NewImage) (*client.Upload, error) {
	n.ExpectedChecksum = s.sum
	if s.volume != "" {
		n.Volume, n.Snapshot = s.volume, s.snapshot
		return nil, nil
	}
	if s.from == "-" {
		n.Upload = true
		return &client.Upload{Body: os.Stdin, SizeBytes: -1}, nil
	}
	if u, err := url.Parse(s.from); err == nil && u.Scheme != "" && (u.Host != "" || strings.HasPrefix(u.Scheme, "nbd")) {
		n.URL = s.from
		return nil, nil
	}
	path, err := filepath.Abs(s.from)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", n.Name, err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, api.Because(err, api.CodeNotFound, "image %s: %v; give a file on this machine or a URL", n.Name, err)
	}
	if !info.Mode().IsRegular() && info.Mode()&os.ModeDevice == 0 {
		return nil, api.Failure(api.CodeInvalid, "image %s: %s is no file", n.Name, path)
	}
	if alone {
		n.Path = path
		return nil, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", n.Name, err)
	}
	n.Upload = true
	return &client.Upload{Body: f, SizeBytes: info.Size()}, nil
}

// alone tells whether the only node there is is asked over its socket, so that a path here is a path wherever a copy is placed.
func (a *app) alone(ctx context.Context, c *client.Client) (bool, error) {
	if !a.onNode() {
		return false, nil
	}
	nodes, err := c.Nodes(ctx)
	return len(nodes) == 1, err
}

// importImage begins an import and, if wanted, waits for its end; bytes that come through us are always waited for.
func (a *app) importImage(ctx context.Context, c *client.Client, n client.NewImage, src importSource) (img api.BackingImage, err error) {
	alone, err := a.alone(ctx, c)
	if err != nil {
		return img, err
	}
	up, err := src.open(alone, &n)
	if err != nil {
		return img, err
	}
	if up != nil {
		if f, ok := up.Body.(*os.File); ok && f != os.Stdin {
			defer f.Close() // it was only read
		}
	}
	if n.Copies == 0 {
		if n.Copies, err = defaultCopies(ctx, c); err != nil {
			return img, err
		}
	}
	if img, err = c.ImportImage(ctx, n); err != nil {
		return img, stillGoing(err, "the import of image %s may have begun; `ashlar image show %s`", n.Name, n.Name)
	}
	if up != nil {
		bar := a.progress("image " + n.Name)
		if up.SizeBytes > 0 {
			up.Progress = func(done int64) { bar.at(int(done*100/up.SizeBytes), "sending") }
		}
		img, err = c.UploadImage(ctx, n.Name, *up)
		bar.end()
		if err != nil {
			return img, fmt.Errorf("image %s: %w; delete it and begin again", n.Name, err)
		}
	}
	if !a.waiting() {
		return img, nil
	}
	return a.waitImage(ctx, c, n.Name)
}

// waitImage shows an import until it is ready or has failed.
func (a *app) waitImage(ctx context.Context, c *client.Client, name string) (api.BackingImage, error) {
	bar := a.progress("image " + name)
	short, cancel := a.bounded(ctx)
	defer cancel()
	img, err := c.WaitImage(short, name, func(img api.BackingImage) (bool, error) {
		s := imageState(img)
		if s.failed {
			return false, api.Failure(api.CodeSource, "image %s: %s; look with `ashlar image show %s`, or delete it and try another source", name, s.message, name)
		}
		bar.at(s.progress, s.state)
		return s.ready, nil
	})
	bar.end()
	why := ""
	if img.Error != "" {
		why = ": " + img.Error
	}
	return img, stillGoing(err, "the import of image %s goes on%s; `ashlar image show %s` tells how far it is", name, why, name)
}

// importFor imports what a new volume shall hold, as an image of the volume's name. It is waited for however long it takes: there is no volume without it.
func (a *app) importFor(ctx context.Context, c *client.Client, n client.NewVolume, src importSource) error {
	wait, timeout := a.noWait, a.timeout
	a.noWait, a.timeout = false, 0
	defer func() { a.noWait, a.timeout = wait, timeout }()
	_, err := a.importImage(ctx, c, client.NewImage{Name: n.Name, NodeSelector: n.NodeSelector, DiskSelector: n.DiskSelector}, src)
	return err
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
					rows := [][]string{{"NAME", "STATE", ">SIZE", ">RECEIVED", "FORMAT", "COPIES", "CREATED"}}
					for _, i := range list {
						rows = append(rows, []string{i.Name, imageState(i).String(), size(i.VirtualSize), size(i.Size), dash(i.Format), readyCopies(i), a.ago(i.Created)})
					}
					a.table(rows)
				})
			})
		},
	}
}

// readyCopies says how many copies are ready of how many wanted.
func readyCopies(i api.BackingImage) string {
	n := 0
	for _, d := range i.DiskFileStatusMap {
		if d.State == "ready" {
			n++
		}
	}
	return fmt.Sprintf("%d/%d", n, i.MinNumberOfCopies)
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
				nodes, err := c.Nodes(cmd.Context())
				if err != nil {
					return err
				}
				return a.print(img, func() { a.showImage(img, nodes) })
			})
		},
	}
}

func (a *app) showImage(img api.BackingImage, nodes []api.Node) {
	place := map[string]string{} // of a disk, by its id
	for _, d := range disksOf(nodes, "") {
		place[d.DiskUUID] = d.Node + "/" + d.Name
	}
	sum := img.CurrentChecksum
	if sum != "" {
		sum = "sha512:" + sum
	}
	a.fields("Name", img.Name, "State", imageState(img).String(), "Source", img.Parameters["url"]+img.Parameters["path"], "Format", img.Format,
		"Size", api.FormatSize(img.VirtualSize), "Received", api.FormatSize(img.Size), "Space", spaceText(img.Space), "Checksum", sum, "Digest", img.Digest, "Created", a.ago(img.Created),
		"Copies", fmt.Sprintf("%d wanted", img.MinNumberOfCopies), "Node selector", strings.Join(img.NodeSelector, ", "), "Disk selector", strings.Join(img.DiskSelector, ", "), "Problem", img.Error, "Id", img.UUID)
	a.say("")
	rows := [][]string{{"DISK", "STATE", ">PROGRESS", ">ON DISK", "MESSAGE"}}
	for _, disk := range slices.Sorted(maps.Keys(img.DiskFileStatusMap)) {
		d := img.DiskFileStatusMap[disk]
		rows = append(rows, []string{cmp.Or(place[disk], disk), dash(d.State), fmt.Sprintf("%d %%", d.Progress), size(d.AllocatedBytes), dash(strings.TrimSpace(d.Message))})
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
