package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
)

func (a *app) volumeCommand() *cobra.Command {
	return group("volume", "Disks of virtual machines", a.volumeCreate(), a.volumeList(), a.volumeShow(), a.volumeAttach(), a.volumeDetach(), a.volumeExpand(),
		a.volumeLimit(), a.volumeExport(), a.volumeSalvage(), a.volumeDelete())
}

func (a *app) volumeCreate() *cobra.Command {
	n := client.NewVolume{}
	var from, sum string
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Create a volume: empty, on top of an image, or with the content of a file, a URL or another NBD export",
		Long: `Create a thin volume. Sizes are bytes or quantities (10Gi, 500M), rounded up to 2 MiB; 10 MiB at least, 15 TiB at most.
Without --size a volume is as large as its image.

With --from the content is imported first, as an image of the volume's name, which stays and may be the base of more volumes; what it may be is told by
"ashlar image import --help".`,
		Example: "  ashlar volume create db1 --image debian --size 20Gi\n  ashlar volume create scratch --size 500M\n  ashlar volume create fast1 --size 50Gi --node-selector rack7 --disk-selector nvme --data-locality best-effort\n  ashlar volume create old1 --from nbd://192.0.2.9/disk1\n  ashlar volume create old2 --from /srv/old2.vmdk.raw.gz",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			n.Name = args[0]
			if from != "" && n.Image != "" {
				return usageError{cmd, errors.New("--from and --image: one of the two")}
			}
			return a.withNode(func(c *client.Client) error {
				if from != "" {
					if err := a.importFor(cmd.Context(), c, n, importSource{from: from, sum: sum}); err != nil {
						return err
					}
					n.Image = n.Name
				}
				return a.createVolume(cmd.Context(), c, n)
			})
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "what it shall hold: a file, a URL (http, https, nbd, nbds), or - for standard input")
	cmd.Flags().StringVar(&sum, "checksum", "", "of --from: sha512:HEX or sha256:HEX")
	cmd.Flags().StringVar(&n.Frontend, "frontend", "", "how it is offered when it is attached: nbd (default) or blockdev")
	limitFlags(cmd.Flags(), &n.Limits)
	cmd.Flags().StringVar(&n.Size, "size", "", "size; default: the image's")
	cmd.Flags().StringVar(&n.Image, "image", "", "image to stand on")
	cmd.Flags().IntVar(&n.Copies, "copies", 1, "copies to keep; this version keeps one, and the volume is degraded while more are wanted")
	selectorFlags(cmd, &n.NodeSelector, &n.DiskSelector)
	cmd.Flags().StringVar(&n.DataLocality, "data-locality", "", "disabled, or best-effort: its copy moves, when it is detached, to the node that used it last; default: the setting default-data-locality")
	return a.waits(cmd, 30*time.Second)
}

func (a *app) createVolume(ctx context.Context, c *client.Client, n client.NewVolume) error {
	if n.Copies > 1 {
		fmt.Fprintf(a.err, "ashlar: volume %s: %d copies are recorded as wanted, and this version keeps one: it shows as degraded\n", n.Name, n.Copies)
	}
	start := a.now()
	v, err := c.CreateVolume(ctx, n)
	if err != nil {
		return err
	}
	if a.waiting() {
		short, cancel := a.bounded(ctx)
		defer cancel()
		last, err := c.WaitVolume(short, n.Name, func(v api.Volume) (bool, error) { return v.State != "creating", nil })
		if err != nil {
			return stillGoing(err, "volume %s is still being created%s; `ashlar volume show %s`", n.Name, because(last), n.Name)
		}
		v = last
	}
	return a.print(v, func() {
		a.say("volume %s: %s, %s, in %s", v.Name, v.State, sizeOf(v.Size), a.now().Sub(start).Round(time.Millisecond))
	})
}

// because is what a volume's record says about why it is not where it should be.
func because(v api.Volume) string {
	if v.Error != "" {
		return ": " + v.Error
	}
	for _, name := range []string{"Scheduled", "WaitForBackingImage", "BackingImageIncompatible"} {
		c := v.Conditions[name]
		if (c.Status == "True") != (name == "Scheduled") && c.Status != "" && c.Message != "" {
			return ": " + c.Message
		}
	}
	return ""
}

func (a *app) volumeList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List volumes", Example: "  ashlar volume list\n  ashlar volume list -o json", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withNode(func(c *client.Client) error {
				list, err := c.Volumes(cmd.Context())
				if err != nil {
					return err
				}
				return a.print(list, func() {
					rows := [][]string{{"NAME", "STATE", "HEALTH", ">SIZE", ">USED", "COPIES", "NODE", "IMAGE", "CREATED"}}
					for _, v := range list {
						rows = append(rows, []string{v.Name, v.State, v.Robustness, sizeOf(v.Size), size(used(v)), copies(v), dash(v.Controllers[0].HostID),
							dash(v.BackingImage), a.ago(v.Created)})
					}
					a.table(rows)
				})
			})
		},
	}
}

// used is what a volume's copies take on disk.
func used(v api.Volume) int64 {
	var sum int64
	for _, r := range v.Replicas {
		n, err := strconv.ParseInt(r.AllocatedBytes, 10, 64)
		if err == nil {
			sum += n
		}
	}
	return sum
}

// copies says how many there are of how many wanted.
func copies(v api.Volume) string {
	placed := 0
	for _, r := range v.Replicas {
		if r.HostID != "" {
			placed++
		}
	}
	return fmt.Sprintf("%d/%d", placed, v.NumberOfReplicas)
}

func (a *app) volumeShow() *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show a volume, its copies, and how to use it", Example: "  ashlar volume show db1", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				v, err := c.Volume(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return a.print(v, func() { a.showVolume(v) })
			})
		},
	}
}

func (a *app) showVolume(v api.Volume) {
	ctl := v.Controllers[0]
	frontend := v.Frontend
	if v.DisableFrontend {
		frontend += " (disabled for this attachment)"
	}
	a.fields("Name", v.Name, "State", v.State, "Health", v.Robustness, "Size", sizeOf(v.Size), "Used", size(used(v)), "Space", spaceText(v.Space), "Limits", limitsOf(v), "Image", v.BackingImage, "Copies", copies(v),
		"Node", ctl.HostID, "Frontend", frontend, "Endpoint", ctl.Endpoint, "Node selector", strings.Join(v.NodeSelector, ", "), "Disk selector", strings.Join(v.DiskSelector, ", "),
		"Locality", locality(v), "Created", a.ago(v.Created), "Problem", v.Error)
	a.say("")
	rows := [][]string{{"COPY", "NODE", "DISK", "MODE", ">USED", "PATH"}}
	for _, r := range v.Replicas {
		mode := r.Mode
		if r.FailedAt != "" {
			mode = "failed"
		}
		rows = append(rows, []string{r.Name, dash(r.HostID), dash(r.DiskPath), dash(mode), sizeOf(r.AllocatedBytes), dash(r.DataPath)})
	}
	a.table(rows)
	for _, name := range slices.Sorted(maps.Keys(v.Conditions)) {
		if c := v.Conditions[name]; c.Message != "" {
			a.say("\n%s is %s: %s", name, c.Status, c.Message)
		}
	}
}

// spaceText says in one line what something takes on disk, as docs/rest.md has the words: exact, where the layers were counted.
func spaceText(s api.Space) string {
	text := sizeOf(s.Exclusive) + " exclusive, " + sizeOf(s.Shared) + " shared"
	if s.Reclaimable != "" && s.Reclaimable != "0" {
		text += ", " + sizeOf(s.Reclaimable) + " reclaimable"
	}
	return text
}

// limitsOf is a volume's limits, if it has any.
func limitsOf(v api.Volume) string {
	if l := v.Limits; l.IOPS == 0 && l.BurstIOPS == 0 && emptyRate(l.BytesPerSecond) && emptyRate(l.BurstBytesPerSecond) {
		return ""
	}
	return limitsText(v.Limits)
}

// locality is a volume's, if it has one.
func locality(v api.Volume) string {
	if v.DataLocality == "disabled" {
		return ""
	}
	return v.DataLocality
}

func (a *app) volumeDetach() *cobra.Command {
	var d client.Detachment
	cmd := &cobra.Command{
		Use: "detach NAME", Short: "Take a volume back from its guest",
		Long: `Detach a volume. Shut the guest down first: it loses its disk. A volume whose block device is mounted or open stays attached; with --force or --no-wait it is
detached as soon as nobody uses it. A volume whose node is down is detached at once, and can be attached elsewhere: should that node still write, the next writer ends it.`,
		Example: "  ashlar volume detach db1", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				was, err := c.Volume(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				v, err := c.Detach(cmd.Context(), args[0], d)
				if err != nil {
					return err
				}
				if a.waiting() {
					if v, err = a.waitDetached(cmd.Context(), c, args[0]); err != nil {
						return err
					}
					if v.Conditions[inUse].Status == "True" {
						return a.keepAttached(cmd.Context(), c, was, v, d)
					}
					if v.State == "attached" {
						return api.Failure(api.CodeConflict, "volume %s stays attached: others asked for it too; --force takes it from them", v.Name)
					}
				}
				return a.print(v, func() { a.say("volume %s: %s", v.Name, v.State) })
			})
		},
	}
	cmd.Flags().BoolVar(&d.Force, "force", false, "also attachments that others made")
	return a.waits(cmd, time.Minute)
}

// inUse is the condition of a volume that cannot be detached because its block device is mounted or open.
const inUse = "InUse"

// keepAttached takes back the wish to detach a volume that is in use, so that it is as it was, and says why. A wish that was there before stands, and so does a forced one,
// which took others' attachments too.
func (a *app) keepAttached(ctx context.Context, c *client.Client, was, v api.Volume, d client.Detachment) error {
	why := v.Conditions[inUse].Message
	if d.Force || was.State != "attached" {
		return api.Failure(api.CodeInUse, "volume %s cannot be detached yet: %s; then it is detached by itself", v.Name, why)
	}
	at := client.Attachment{Node: was.Controllers[0].HostID, DisableFrontend: was.DisableFrontend}
	if _, err := c.Attach(ctx, v.Name, at); err != nil {
		return fmt.Errorf("volume %s: %s; it is detached then, because it could not be attached again: %w", v.Name, why, err)
	}
	if _, err := a.waitAttached(ctx, c, v.Name, client.Attachment{DisableFrontend: true}); err != nil {
		return err
	}
	return api.Failure(api.CodeInUse, "volume %s stays attached: %s", v.Name, why)
}

func (a *app) waitDetached(ctx context.Context, c *client.Client, name string) (api.Volume, error) {
	short, cancel := a.bounded(ctx)
	defer cancel()
	v, err := c.WaitVolume(short, name, func(v api.Volume) (bool, error) {
		// Others may hold it too; then it stays attached, and is said to be.
		return v.State != "detaching" || v.Conditions[inUse].Status == "True", nil
	})
	return v, stillGoing(err, "volume %s is still detaching%s", name, because(v))
}

func (a *app) volumeExpand() *cobra.Command {
	var bytes string
	cmd := &cobra.Command{
		Use: "expand NAME --size SIZE", Short: "Make a volume larger, also under a running guest",
		Long:    "Expand a volume, attached or not. It cannot shrink. A running guest sees the new size when its NBD client connects again;\na block device has it at once (then resize2fs, xfs_growfs).",
		Example: "  ashlar volume expand db1 --size 40Gi", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if bytes == "" {
				return usageError{cmd, errors.New("--size is missing")}
			}
			return a.withNode(func(c *client.Client) error {
				v, err := c.Expand(cmd.Context(), args[0], bytes)
				if err != nil {
					return stillGoing(err, "the expansion of volume %s goes on; `ashlar volume show %s`", args[0], args[0])
				}
				return a.print(v, func() { a.say("volume %s: %s", v.Name, sizeOf(v.Size)) })
			})
		},
	}
	cmd.Flags().StringVar(&bytes, "size", "", "the new size")
	return cmd
}

func (a *app) volumeSalvage() *cobra.Command {
	return &cobra.Command{
		Use: "salvage NAME", Short: "Open a faulted volume from what is left of it",
		Long: `Salvage a volume whose last copy failed: a flush did not succeed, so what was written since the flush before it may be lost, although a guest
was told nothing worse than an I/O error. It is a person's decision to go on with such a disk. Check its file systems afterwards.`,
		Example: "  ashlar volume salvage db1", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				v, err := c.Salvage(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return a.print(v, func() {
					a.say("volume %s: will be opened from what is left when it is attached; check its file systems then", v.Name)
				})
			})
		},
	}
}

func (a *app) volumeDelete() *cobra.Command {
	return a.waits(&cobra.Command{
		Use: "delete NAME…", Aliases: []string{"rm"}, Short: "Delete volumes with all their snapshots, attached or not", Example: "  ashlar volume delete db1",
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				for _, name := range args {
					if err := c.DeleteVolume(cmd.Context(), name); err != nil {
						return err
					}
					if a.waiting() {
						short, cancel := a.bounded(cmd.Context())
						err := c.WaitVolumeGone(short, name)
						cancel()
						if err != nil {
							return stillGoing(err, "the deletion of volume %s goes on", name)
						}
					}
					a.say("volume %s: deleted", name)
				}
				return a.print(deleted{args}, func() {})
			})
		},
	}, time.Minute)
}

// deleted is what deleting prints as JSON.
type deleted struct {
	Deleted []string `json:"deleted"`
}
