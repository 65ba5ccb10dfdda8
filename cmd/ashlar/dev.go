package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/testbed"
)

// maxSocketDir keeps a throw-away cluster's sockets within the 107 bytes that the kernel takes.
const maxSocketDir = 60

// devNode is a node of a throw-away cluster, for -o json.
type devNode struct {
	Name    string `json:"name"`
	Address string `json:"address"` // in the cluster
	REST    string `json:"rest"`
	RunDir  string `json:"runDir"`
	DataDir string `json:"dataDir"`
}

func (a *app) devCommand() *cobra.Command {
	var nodes int
	var dir string
	var keep bool
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run a throw-away cluster on this machine",
		Long: `Run a throw-away cluster on this machine: that many nodes as processes in a scratch directory, joined over loopback, with certificates and all. It lasts until Ctrl-C, which stops every node and
removes the directory (--keep leaves it). Everything works as on as many machines; kill what you like. It is for trying things, not for data.`,
		Example: "  ashlar dev --nodes 3\n  ashlar dev --nodes 3 --dir /tmp/try --keep\n  # in another terminal, with what it prints:\n  export ASHLAR_RUN_DIR=/tmp/ashlar-dev-123/2/run\n  ashlar node list",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if nodes < 1 || nodes > 16 {
				return usageError{cmd, fmt.Errorf("--nodes %d: from 1 to 16", nodes)}
			}
			dir, err := devDir(dir)
			if err != nil {
				return err
			}
			if keep {
				defer a.say("what it was is in %s", dir)
			} else {
				defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
			}
			return a.dev(cmd.Context(), dir, nodes)
		},
	}
	cmd.Flags().IntVar(&nodes, "nodes", 3, "how many nodes")
	cmd.Flags().StringVar(&dir, "dir", "", "directory to make it in, which must be empty or not there, and short; default: a new one in the directory for temporary files")
	cmd.Flags().BoolVar(&keep, "keep", false, "leave the directory behind, with logs and data")
	return cmd
}

// devDir is an empty directory; one that holds something is somebody's.
func devDir(dir string) (string, error) {
	if dir == "" {
		return os.MkdirTemp("", "ashlar-dev-")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if len(dir) > maxSocketDir {
		return "", api.Failure(api.CodeInvalid, "directory %s: it has %d characters, and sockets' paths in it would be too long; at most %d", dir, len(dir), maxSocketDir)
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if len(entries) > 0 {
		return "", api.Failure(api.CodeConflict, "directory %s: it is not empty, and would be removed in the end; name another", dir)
	}
	return dir, os.MkdirAll(dir, 0o700)
}

// dev runs the cluster until ctx ends.
func (a *app) dev(ctx context.Context, dir string, nodes int) error {
	bin, err := os.Executable()
	if err != nil {
		return err
	}
	c, err := testbed.StartCluster(ctx, testbed.ClusterConfig{Bin: bin, Dir: dir, Nodes: nodes, Tell: func(what string) { fmt.Fprintln(a.err, what) }})
	if err != nil {
		return err
	}
	var list []devNode
	rows := [][]string{{"NODE", "ADDRESS", "REST", "RUN DIRECTORY"}}
	for i, p := range c.Nodes {
		n := devNode{Name: p.Name, Address: c.Host(i), REST: "http://" + p.Listen, RunDir: p.RunDir, DataDir: p.DataDir}
		list = append(list, n)
		rows = append(rows, []string{n.Name, n.Address, n.REST, n.RunDir})
	}
	err = a.print(list, func() {
		a.table(rows)
		a.say("\nIn another terminal, for example:\n\n  export ASHLAR_RUN_DIR=%s\n  ashlar status\n  ashlar volume create v1 --size 1Gi\n  ashlar volume attach v1 --node %s\n\nCtrl-C ends it all.", list[0].RunDir, list[len(list)-1].Name)
	})
	if err == nil {
		<-ctx.Done()
		fmt.Fprintln(a.err, "stopping")
	}
	return errors.Join(err, c.Stop(context.WithoutCancel(ctx)))
}
