package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
)

func (a *app) volumeExport() *cobra.Command {
	var n client.NewExport
	cmd := &cobra.Command{
		Use: "export NAME FILE", Short: "Write a volume, or one of its snapshots, into an image file",
		Long: `Export writes what a snapshot holds, or without --snapshot what the volume holds now (a snapshot is taken for the time, so that guests go on), into a new file. On the node
itself the file is written there, with its holes; from another machine it is downloaded. "-" writes raw to standard output. The volume may be attached or not.`,
		Example: "  ashlar volume export db1 /backup/db1.qcow2 --format qcow2 --compress zstd\n  ashlar volume export db1 db1.raw --snapshot before-upgrade\n  ashlar volume export db1 - | ssh other 'cat > db1.raw'",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if n.Format == "" {
				n.Format = "raw"
				if strings.HasSuffix(args[1], ".qcow2") {
					n.Format = "qcow2"
				}
			}
			return a.withNode(func(c *client.Client) error {
				here, err := a.volumeHere(cmd.Context(), c, args[0])
				if err != nil {
					return err
				}
				if args[1] == "-" || !here {
					if n.Compress != "" {
						return api.Failure(api.CodeInvalid, "volume %s: --compress needs a file on the node that has the volume", args[0])
					}
					return a.download(cmd.Context(), args[1], "volume "+args[0], func(ctx context.Context, d client.Download) (client.Downloaded, error) {
						d.Format, d.Snapshot = n.Format, n.Snapshot
						return c.DownloadVolume(ctx, args[0], d)
					})
				}
				return a.exportFile(cmd.Context(), c, args[0], args[1], n)
			})
		},
	}
	cmd.Flags().StringVar(&n.Format, "format", "", "raw or qcow2; default: as the file's name ends, else raw")
	cmd.Flags().StringVar(&n.Snapshot, "snapshot", "", "what to write; default: the present")
	cmd.Flags().StringVar(&n.Compress, "compress", "", "of qcow2: zlib or zstd; default: not at all")
	return a.waits(cmd, 0)
}

// volumeHere tells whether the node that has a volume is the one that is asked, over its socket: it can write a file for us.
func (a *app) volumeHere(ctx context.Context, c *client.Client, name string) (bool, error) {
	if !a.onNode() {
		return false, nil
	}
	v, err := c.Volume(ctx, name)
	if err != nil {
		return false, err
	}
	about, err := c.About(ctx)
	host := v.Controllers[0].HostID
	if host == "" {
		host = v.Replicas[0].HostID
	}
	return host == "" || host == about.Node, err
}

// onNode tells whether commands go to the node over its socket, so that files here are files there.
func (a *app) onNode() bool {
	address := a.server
	if address == "" {
		address = client.Address(a.runDir)
	}
	return strings.HasPrefix(address, "unix:")
}

// exportFile has the node write the file, and shows how far it is.
func (a *app) exportFile(ctx context.Context, c *client.Client, volume, file string, n client.NewExport) error {
	var err error
	if n.Path, err = filepath.Abs(file); err != nil {
		return fmt.Errorf("export: %w", err)
	}
	if _, err := os.Lstat(n.Path); err == nil { // said before a snapshot is taken for nothing; the node looks again when it makes the file
		return fmt.Errorf("volume %s: export to %s: %w", volume, n.Path, fs.ErrExist)
	}
	start := a.now()
	op, err := c.ExportFile(ctx, volume, n)
	if err != nil {
		return err
	}
	if !a.waiting() {
		return a.print(op, func() { a.say("volume %s: export to %s begun", volume, n.Path) })
	}
	bar := a.progress("volume " + volume)
	short, cancel := a.bounded(ctx)
	defer cancel()
	op, err = c.WaitOperation(short, op.ID, func(op api.Operation) { bar.at(op.Progress, op.State) })
	bar.end()
	if err != nil {
		return stillGoing(err, "the export of volume %s to %s goes on", volume, n.Path)
	}
	info, err := os.Stat(n.Path)
	if err != nil {
		return fmt.Errorf("export of volume %s: %w", volume, err)
	}
	return a.print(op, func() {
		a.say("volume %s: %s, %s (%s), in %s", volume, n.Path, size(info.Size()), n.Format, a.now().Sub(start).Round(10*time.Millisecond))
	})
}

func (a *app) imageExport() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "export NAME FILE", Short: "Download an image's content into a file",
		Long: `Export downloads an image into a new file: raw, or as qcow2. What arrives is compared with the sum the node says at the end, and a file that broke off is removed.
"-" is standard output.`,
		Example: "  ashlar image export debian debian.qcow2\n  ashlar image export debian - --format raw | sha512sum", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if format == "" {
				format = "raw"
				if strings.HasSuffix(args[1], ".qcow2") {
					format = "qcow2"
				}
			}
			return a.withNode(func(c *client.Client) error {
				return a.download(cmd.Context(), args[1], "image "+args[0], func(ctx context.Context, d client.Download) (client.Downloaded, error) {
					d.Format = format
					return c.DownloadImage(ctx, args[0], d)
				})
			})
		},
	}
	cmd.Flags().StringVar(&format, "format", "", "raw or qcow2; default: as the file's name ends, else raw")
	return cmd
}

// download fetches something into a new file, or to standard output. A file that did not come whole is removed.
func (a *app) download(ctx context.Context, file, what string, fetch func(context.Context, client.Download) (client.Downloaded, error)) (err error) {
	out := a.out
	var f *os.File
	if file != "-" {
		if f, err = os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		defer func() {
			if err = errors.Join(err, f.Close()); err != nil {
				err = errors.Join(err, os.Remove(file))
			}
		}()
		out = f
	}
	buffered := bufio.NewWriterSize(out, 1<<20)
	bar := a.progress(what)
	total := int64(-1)
	start := a.now()
	got, err := fetch(ctx, client.Download{To: io.Writer(buffered), Size: func(n int64) { total = n }, Progress: func(done int64) {
		if total > 0 {
			bar.at(int(done*100/total), "downloading")
		}
	}})
	bar.end()
	if err = errors.Join(err, buffered.Flush()); err != nil {
		return err
	}
	if f == nil {
		return nil
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return a.print(map[string]any{"file": file, "bytes": got.SizeBytes, "sha512": got.SHA512, "verified": got.Verified}, func() {
		a.say("%s: %s, %s, in %s", what, file, size(got.SizeBytes), a.now().Sub(start).Round(10*time.Millisecond))
	})
}
