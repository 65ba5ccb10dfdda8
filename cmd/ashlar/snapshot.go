package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
)

func (a *app) snapshotCommand() *cobra.Command {
	return group("snapshot", "Snapshots of volumes: take, list, go back, delete", a.snapshotCreate(), a.snapshotList(), a.snapshotShow(), a.snapshotRevert(), a.snapshotDiff(), a.snapshotDelete())
}

// borrowTimeout bounds the opening and closing of a volume that was detached.
const borrowTimeout = 30 * time.Second

// borrow runs f while a volume is attached: as it is if it has a frontend already, else attached without a frontend, so that nobody can use it, and detached again
// afterwards, also when f failed or was interrupted.
func (a *app) borrow(ctx context.Context, c *client.Client, name string, f func() error) (err error) {
	v, err := c.Volume(ctx, name)
	if err != nil {
		return err
	}
	if v.State == "attaching" && !v.DisableFrontend {
		if v, err = a.waitAttached(ctx, c, name, client.Attachment{}); err != nil {
			return err
		}
	}
	if v.State == "attached" && !v.DisableFrontend {
		return f()
	}
	// An attachment of its own, so that it cannot be taken for a person's. Beside another one without a frontend, too: that may be a command's, which is about to take it back.
	at := client.Attachment{DisableFrontend: true, ID: "cli-" + a.now().UTC().Format("150405.000000000")}
	if v.DisableFrontend {
		at.Node = v.Controllers[0].HostID
	}
	a.wait, a.noWait, a.timeout = true, false, borrowTimeout
	defer func() {
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), borrowTimeout)
		defer cancel()
		e := a.giveBack(late, c, name, at.ID)
		if e == nil {
			_, e = a.waitDetached(late, c, name)
		}
		if err == nil {
			err = e
		}
	}()
	if _, err := a.attachVolume(ctx, c, name, at); err != nil { // it may have been recorded all the same
		return err
	}
	return f()
}

// giveBack takes an attachment back. A node that does not answer may be starting again, and would keep the attachment for ever.
func (a *app) giveBack(ctx context.Context, c *client.Client, name, id string) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for told := false; ; told = true {
		_, err := c.Detach(ctx, name, client.Detachment{ID: id})
		if api.CodeOf(err) != api.CodeUnreachable {
			return err
		}
		if !told {
			fmt.Fprintf(a.err, "no answer from the node; waiting to detach volume %s again\n", name)
		}
		select {
		case <-ctx.Done():
			return api.Because(err, api.CodeUnreachable, "volume %s is still attached for this command, because the node does not answer; `ashlar volume detach %s --force` when it does", name, name)
		case <-tick.C:
		}
	}
}

func (a *app) snapshotCreate() *cobra.Command {
	var labels []string
	cmd := &cobra.Command{
		Use: "create VOLUME [NAME]", Short: "Take a snapshot, also under a running guest",
		Long:    "Take a snapshot: all that a guest was told is written, at one instant. It costs milliseconds and no space until things change. Without a NAME one is made up.",
		Example: "  ashlar snapshot create db1 before-upgrade --label why=upgrade", Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			n := client.NewSnapshot{Labels: map[string]string{}}
			if len(args) == 2 {
				n.Name = args[1]
			}
			for _, l := range labels {
				key, value, ok := strings.Cut(l, "=")
				if !ok || key == "" {
					return usageError{cmd, fmt.Errorf("label %q must be KEY=VALUE", l)}
				}
				n.Labels[key] = value
			}
			return a.withNode(func(c *client.Client) error {
				var s api.Snapshot
				err := a.borrow(cmd.Context(), c, args[0], func() (err error) {
					s, err = c.CreateSnapshot(cmd.Context(), args[0], n)
					return err
				})
				if err != nil {
					return stillGoing(err, "the snapshot of volume %s may still be taken; `ashlar snapshot list %s`", args[0], args[0])
				}
				return a.print(s, func() { a.say("volume %s: snapshot %s taken", args[0], s.Name) })
			})
		},
	}
	cmd.Flags().StringArrayVar(&labels, "label", nil, "KEY=VALUE to keep with it; may be repeated")
	return cmd
}

func (a *app) snapshotList() *cobra.Command {
	return &cobra.Command{
		Use: "list VOLUME", Aliases: []string{"ls"}, Short: "List a volume's snapshots", Example: "  ashlar snapshot list db1", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				list, err := c.SnapshotRecords(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return a.print(list, func() {
					rows := [][]string{{"NAME", "PARENT", ">USED", ">SIZE", "BY", "STATE", "CREATED"}}
					for _, s := range list {
						rows = append(rows, []string{s.Name, dash(s.Parent), size(s.Size), size(s.RestoreSize), by(s), snapshotState(s), a.ago(s.CreationTime)})
					}
					a.table(rows)
				})
			})
		},
	}
}

func by(s api.SnapshotCR) string {
	if s.UserCreated {
		return "user"
	}
	return "system"
}

func snapshotState(s api.SnapshotCR) string {
	switch {
	case s.MarkRemoved:
		return "removed"
	case s.Children["volume-head"]:
		return "ready, below the present"
	}
	return "ready"
}

func (a *app) snapshotShow() *cobra.Command {
	return &cobra.Command{
		Use: "show VOLUME NAME", Short: "Show a snapshot", Example: "  ashlar snapshot show db1 before-upgrade", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				s, err := c.SnapshotRecord(cmd.Context(), args[0], args[1])
				if err != nil {
					return err
				}
				return a.print(s, func() {
					var labels []string
					for _, k := range slices.Sorted(maps.Keys(s.Labels)) {
						labels = append(labels, k+"="+s.Labels[k])
					}
					a.fields("Volume", s.Volume, "Name", s.Name, "State", snapshotState(s), "Parent", s.Parent, "Children", strings.Join(slices.Sorted(maps.Keys(s.Children)), ", "),
						"Used", size(s.Size), "Space", spaceText(s.Space), "Taken by", by(s), "Created", a.ago(s.CreationTime), "Labels", strings.Join(labels, ", "), "Checksum", s.Checksum)
				})
			})
		},
	}
}

func (a *app) snapshotRevert() *cobra.Command {
	return &cobra.Command{
		Use: "revert VOLUME NAME", Short: "Make a snapshot's content the present again",
		Long: `Go back to a snapshot: what was written since is gone, unless a snapshot keeps it. No guest may be using the volume: shut the guest down and detach the volume
first; this command then attaches it without a frontend, reverts, and detaches it again.`,
		Example: "  ashlar volume detach db1\n  ashlar snapshot revert db1 before-upgrade\n  ashlar volume attach db1", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			volume, name := args[0], args[1]
			return a.withNode(func(c *client.Client) error {
				ctx := cmd.Context()
				err := a.borrow(ctx, c, volume, func() error { return c.Revert(ctx, volume, name) })
				if api.CodeOf(err) == api.CodeFrontend {
					return api.Because(err, api.CodeFrontend, "volume %s is attached, and a guest may be using it; shut the guest down, then `ashlar volume detach %s`, and revert again",
						volume, volume)
				}
				if err != nil {
					return stillGoing(err, "the revert of volume %s may still be done; `ashlar snapshot list %s`", volume, volume)
				}
				v, err := c.Volume(ctx, volume)
				if err != nil {
					return err
				}
				return a.print(v, func() { a.say("volume %s: back at snapshot %s (%s)", volume, name, v.State) })
			})
		},
	}
}

func (a *app) snapshotDelete() *cobra.Command {
	return a.waits(&cobra.Command{
		Use: "delete VOLUME NAME…", Aliases: []string{"rm"}, Short: "Delete snapshots and free their space",
		Long:    "Delete snapshots: they are marked removed, and then a purge frees what no younger layer needs.",
		Example: "  ashlar snapshot delete db1 before-upgrade", Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				v, err := c.Volume(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				// A volume that is only borrowed is detached again, so the purge must have ended.
				wait, timeout := a.waiting() || v.State != "attached", a.timeout
				return a.borrow(cmd.Context(), c, args[0], func() error {
					a.wait, a.noWait, a.timeout = wait, !wait, timeout
					return a.deleteSnapshots(cmd.Context(), c, args[0], args[1:])
				})
			})
		},
	}, 0)
}

func (a *app) deleteSnapshots(ctx context.Context, c *client.Client, volume string, names []string) error {
	for _, name := range names {
		if err := c.DeleteSnapshot(ctx, volume, name); err != nil {
			return err
		}
	}
	v, err := c.Purge(ctx, volume)
	if err != nil {
		return err
	}
	if a.waiting() {
		bar := a.progress("purge of volume " + volume)
		short, cancel := a.bounded(ctx)
		defer cancel()
		v, err = c.WaitVolume(short, volume, func(v api.Volume) (bool, error) {
			for _, p := range v.PurgeStatus {
				switch {
				case p.State == "error":
					return false, api.Failure(api.CodeFailed, "volume %s: purge: %s", volume, p.Error)
				case p.IsPurging:
					bar.at(p.Progress, "")
					return false, nil
				}
			}
			return true, nil
		})
		bar.end()
		if err != nil {
			return stillGoing(err, "the purge of volume %s goes on while it is attached", volume)
		}
	}
	return a.print(v, func() { a.say("volume %s: snapshot %s deleted", volume, strings.Join(names, ", ")) })
}

func (a *app) snapshotDiff() *cobra.Command {
	return &cobra.Command{
		Use: "diff VOLUME FROM [TO]", Short: "Tell where two snapshots of a volume may differ",
		Long: `Diff lists the ranges, in bytes, that may read differently in two snapshots of which FROM is older; without TO, in FROM and the present. FROM "-" is what is below the
oldest snapshot: the image, or nothing. What is not listed is the same.`,
		Example: "  ashlar snapshot diff db1 monday tuesday\n  ashlar snapshot diff db1 - -o json | jq '[.[].n] | add'", Args: cobra.RangeArgs(2, 3),
		RunE: func(cmd *cobra.Command, args []string) error {
			from, to := args[1], ""
			if from == "-" {
				from = ""
			}
			if len(args) == 3 {
				to = args[2]
			}
			return a.withNode(func(c *client.Client) error {
				all := []api.DiffChunk{}
				err := a.borrow(cmd.Context(), c, args[0], func() error {
					return c.SnapshotDiff(cmd.Context(), args[0], from, to, func(r api.DiffChunk) error { all = append(all, r); return nil })
				})
				if err != nil {
					return err
				}
				return a.print(all, func() { a.showDiff(all) })
			})
		},
	}
}

func (a *app) showDiff(all []api.DiffChunk) {
	rows := [][]string{{">OFFSET", ">LENGTH", "READS"}}
	var sum int64
	for _, r := range all {
		reads := "data"
		if r.Zero {
			reads = "zero"
		}
		rows = append(rows, []string{fmt.Sprint(r.Off), fmt.Sprint(r.N), reads})
		sum += r.N
	}
	a.table(rows)
	a.say("%s in %d ranges", size(sum), len(all))
}
