package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/cobra"

	dataclient "ashlar/internal/dataplane/client"
	"ashlar/internal/image"
)

// maxLogTail is how much of each log goes into a bundle.
const maxLogTail = 4 << 20

// supportCommand packs what somebody who helps needs to see.
func (a *app) supportCommand() *cobra.Command {
	var to string
	cmd := &cobra.Command{
		Use: "support-bundle", Short: "Pack what somebody who helps needs to see into one file",
		Long: `Support-bundle writes one compressed archive: versions, configuration, what doctor says, the node's records, events and metrics, the state of its processes, their logs, and
what the machine is. It holds no guest data, no tokens and no keys; it does hold names of volumes, images, nodes and paths. Only its owner can read it. What
cannot be had is noted in the archive, so that it also works when the node is down.`,
		Example: "  ashlar support-bundle\n  ashlar support-bundle --to /tmp/bundle.tar.gz", Args: cobra.NoArgs,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { a.lenient = true; return a.configure(cmd) },
		RunE: func(cmd *cobra.Command, _ []string) error {
			if to == "" {
				to = fmt.Sprintf("ashlar-support-%s-%s.tar.gz", hostname(), a.now().UTC().Format("20060102-150405"))
			}
			parts, err := a.bundle(cmd.Context(), to)
			if err != nil {
				return err
			}
			return a.print(map[string]any{"file": to, "parts": parts}, func() { a.say("%s: %d parts", to, parts) })
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "file to write; default: ashlar-support-HOST-TIME.tar.gz here")
	return cmd
}

// bundle writes the archive; one that could not be finished is removed.
func (a *app) bundle(ctx context.Context, to string) (parts int, err error) {
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, fmt.Errorf("support bundle: %w", err)
	}
	packed := gzip.NewWriter(f)
	archive := tar.NewWriter(packed)
	for name, data := range a.collect(ctx) {
		err = archive.WriteHeader(&tar.Header{Name: "ashlar-support/" + name, Mode: 0o600, Size: int64(len(data)), ModTime: a.now()})
		if err == nil {
			_, err = archive.Write(data)
		}
		if err != nil {
			break
		}
		parts++
	}
	if err = errors.Join(err, archive.Close(), packed.Close(), f.Sync(), f.Close()); err != nil {
		return 0, errors.Join(fmt.Errorf("support bundle %s: %w", to, err), os.Remove(to))
	}
	return parts, nil
}

// collect gets all parts side by side: one that hangs (df does, when a file system's server is gone) holds up no other.
func (a *app) collect(ctx context.Context) map[string][]byte {
	var mu sync.Mutex // guards all
	all := map[string][]byte{}
	var wg sync.WaitGroup
	for name, part := range a.bundleParts() {
		wg.Go(func() {
			data, err := part(ctx)
			if err != nil {
				name, data = name+".missing", append([]byte(err.Error()+"\n"), data...)
			}
			mu.Lock()
			defer mu.Unlock()
			all[name] = data
		})
	}
	wg.Wait()
	return all
}

// bundleParts are the files of a bundle and how each is had.
func (a *app) bundleParts() map[string]func(context.Context) ([]byte, error) {
	file := func(name string) func(context.Context) ([]byte, error) {
		return func(context.Context) ([]byte, error) { return fileTail(name, maxLogTail) }
	}
	output := func(name string, args ...string) func(context.Context) ([]byte, error) {
		return func(ctx context.Context) ([]byte, error) {
			ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
			defer cancel()
			cmd := exec.CommandContext(ctx, name, args...)
			cmd.WaitDelay = time.Second // a process that cannot die does not hold us
			return cmd.CombinedOutput()
		}
	}
	asJSON := func(get func(context.Context) (any, error)) func(context.Context) ([]byte, error) {
		return func(ctx context.Context) ([]byte, error) {
			ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
			defer cancel()
			v, err := get(ctx)
			if err != nil {
				return nil, err
			}
			return json.MarshalIndent(v, "", "  ")
		}
	}
	return map[string]func(context.Context) ([]byte, error){
		"version.txt": func(context.Context) ([]byte, error) { return []byte(version + "\n"), nil },
		"time.txt": func(context.Context) ([]byte, error) {
			return []byte(a.now().UTC().Format(time.RFC3339Nano) + "\n"), nil
		},
		"config.toml":   file(a.configPath()), // it names files of secrets, and holds none
		"doctor.json":   asJSON(func(ctx context.Context) (any, error) { return a.diagnose(ctx), nil }),
		"status.json":   asJSON(a.wholeStatus),
		"settings.json": asJSON(a.allSettings),
		"data.json":     asJSON(a.dataStates),
		"metrics.txt":   a.metrics,
		"data.log":      file(filepath.Join(a.runDir, "data.log")),
		"data.log.1":    file(filepath.Join(a.runDir, "data.log.1")),
		"hold.log":      file(filepath.Join(a.runDir, "hold.log")),
		"open.json":     file(filepath.Join(a.runDir, "data", "open.json")),
		"journal.txt":   output("journalctl", "--no-pager", "-n", "5000", "-u", "ashlar*"),
		"kernel.txt":    output("uname", "-a"),
		"dmesg.txt":     output("dmesg"),
		"mounts.txt":    file("/proc/mounts"),
		"memory.txt":    file("/proc/meminfo"),
		"processes.txt": output("ps", "-eo", "pid,ppid,stat,rss,etime,nlwp,comm"),
		"space.txt":     output("df", "-h"),
		"block.txt":     output("lsblk", "-a"),
		"run-dir.txt":   output("ls", "-laR", a.runDir),
	}
}

// fileTail is the end of a file, at most n bytes.
func fileTail(name string, n int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Mode().IsRegular() && info.Size() > n {
		if _, err := f.Seek(-n, io.SeekEnd); err != nil {
			return nil, err
		}
	}
	var b bytes.Buffer
	_, err = io.Copy(&b, io.LimitReader(f, n))
	return b.Bytes(), err
}

func (a *app) wholeStatus(ctx context.Context) (any, error) {
	c, err := a.node()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	s, err := readStatus(ctx, c)
	if err == nil {
		s.Events, err = c.Events(ctx) // all of them
	}
	for _, i := range s.Images { // a signed URL keeps its secret in its query
		if source, ok := i.Parameters["url"]; ok {
			i.Parameters["url"] = image.DisplaySource(source)
		}
	}
	return s, err
}

func (a *app) allSettings(ctx context.Context) (any, error) {
	c, err := a.node()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Settings(ctx)
}

func (a *app) dataStates(ctx context.Context) (any, error) {
	sockets, err := dataclient.DataSockets(a.runDir)
	if err != nil {
		return nil, err
	}
	out := map[string]any{}
	for _, s := range sockets {
		st, err := dataclient.New(s).State(ctx)
		if out[s] = st; err != nil {
			out[s] = err.Error()
		}
	}
	return out, nil
}

func (a *app) metrics(ctx context.Context) ([]byte, error) {
	c, err := a.node()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Metrics(ctx)
}
